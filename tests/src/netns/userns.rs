//! Making namespaces without root: re-execution in a user namespace.
//!
//! In a user namespace of its own, a process is root over the network namespaces it makes. It also
//! gets its own mount namespace, with an empty `/run` for `ip netns`, and so the machine sees
//! nothing of it. Some machines refuse (a knob, or a policy of AppArmor); then the message says
//! so, and root is needed.

#![expect(
    unsafe_code,
    reason = "a child sets up its namespaces between fork and exec"
)]

use std::ffi::CStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use thiserror::Error;

const MARK: &str = "UNBROKEN_IN_USER_NAMESPACE";
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_SYS_ADMIN: u32 = 21;

/// The machine lets us make no namespaces.
#[derive(Debug, Error)]
#[error(
    "network namespaces need root or a user namespace, and this machine refuses both \
     (user namespace: {source}{hint}); run it as root"
)]
pub struct Refused {
    /// The kernel's answer.
    source: io::Error,
    /// The setting that is the likely reason.
    hint: String,
}

/// Whether this process may make network namespaces: root, or the root of a user namespace.
#[must_use]
pub fn is_privileged() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    [CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN]
        .iter()
        .all(|cap| held >> cap & 1 == 1)
}

/// Whether this process runs in a user namespace that [`reexec_in_user_namespace_if_needed`] or
/// [`privileged`] made.
#[must_use]
pub fn is_reexecuted() -> bool {
    std::env::var_os(MARK).is_some()
}

/// For the start of `main`, while there is one thread: where this process may not make namespaces, it
/// becomes the same program with the same arguments in a user namespace, where it may. The pid
/// stays the same, so signals and waiting parents are served as before.
///
/// # Errors
/// The machine refuses.
pub fn reexec_in_user_namespace_if_needed() -> Result<(), Refused> {
    if is_privileged() {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let mut command = this_program()?;
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments);
    in_user_namespace(&mut command);
    Err(refused(command.exec()))
}

/// For a test: runs `body`, here if this process may make namespaces, else by running this test
/// alone in a user namespace. `test` is its full name within its binary, as `cargo test -- --list`
/// shows it.
///
/// # Panics
/// If `body` does, if the test of that name fails there or does not exist, or if the machine refuses.
pub fn privileged(test: &str, body: impl FnOnce()) {
    if is_privileged() {
        return body();
    }
    let mut command = this_program().unwrap_or_else(|e| panic!("{e}"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.stdin(Stdio::null());
    in_user_namespace(&mut command);
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{}", refused(e)));
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{test} failed in its user namespace"
    );
    assert!(text.contains("1 passed"), "no test is called {test}");
}

fn this_program() -> Result<Command, Refused> {
    // A second refusal is final: without the mark this would go on for ever.
    if is_reexecuted() {
        return Err(refused(io::Error::other(
            "root there holds no capabilities",
        )));
    }
    let mut command = Command::new(std::env::current_exe().map_err(refused)?);
    command.env(MARK, "1");
    Ok(command)
}

fn refused(source: io::Error) -> Refused {
    let knobs = [
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
        ),
    ];
    let hint = knobs
        .iter()
        .find(|(path, bad)| std::fs::read_to_string(path).is_ok_and(|v| v.trim() == *bad))
        .map_or_else(String::new, |(path, bad)| format!("; {path} is {bad}"));
    Refused { source, hint }
}

fn in_user_namespace(command: &mut Command) {
    let uid_map = format!("0 {} 1\n", rustix::process::geteuid().as_raw());
    let gid_map = format!("0 {} 1\n", rustix::process::getegid().as_raw());
    let setup = move || {
        let new = UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWNET;
        // SAFETY: without `UnshareFlags::FILES` no other thread's descriptors are concerned.
        unsafe { rustix::thread::unshare_unsafe(new) }?;
        write(c"/proc/self/setgroups", b"deny")?;
        write(c"/proc/self/uid_map", uid_map.as_bytes())?;
        write(c"/proc/self/gid_map", gid_map.as_bytes())?;
        let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", private)?;
        rustix::mount::mount(c"tmpfs", c"/run", c"tmpfs", MountFlags::empty(), None)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls on data prepared before:
    // it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(setup);
    }
}

fn write(path: &CStr, text: &[u8]) -> io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, text)?;
    Ok(())
}
