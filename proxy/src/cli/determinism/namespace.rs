//! A network of its own for a copy of a server, so that several can listen on one fixed port.

#![expect(
    unsafe_code,
    reason = "unshare is unsafe in rustix for the sake of one flag, which is not used here"
)]

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, bail};
use rustix::thread::UnshareFlags;
use socket2::{Domain, Protocol, Socket, Type};

/// Says that this process is the one re-executed in a user namespace.
const MARK: &str = "UNBROKEN_DETERMINISM_IN_USER_NAMESPACE";

/// `AF_NETLINK`.
const NETLINK: i32 = 16;

/// Moves the calling thread, and what it starts from now on, into a fresh network that has nothing
/// but a loopback interface.
///
/// # Errors
/// The kernel refuses: root is needed, or a user namespace.
pub(super) fn enter() -> io::Result<()> {
    // SAFETY: no file descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    bring_up_loopback()
}

/// For the start of the program: makes sure that [`enter`] will work, by becoming the same program in
/// a user namespace where it would not.
///
/// # Errors
/// The machine refuses both.
pub(super) fn ensure_allowed() -> anyhow::Result<()> {
    let tried = std::thread::spawn(enter).join();
    let Err(error) = tried.expect("entering a namespace does not panic") else {
        return Ok(());
    };
    if std::env::var_os(MARK).is_some() {
        bail!(
            "a network of its own for each copy (--port) needs root or a user namespace, and this \
             machine refuses both: {error}"
        );
    }
    let program = std::env::current_exe().context("finding this program")?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let error = Command::new("unshare")
        .args(["--user", "--map-root-user", "--"])
        .arg(program)
        .args(arguments)
        .env(MARK, "1")
        .exec();
    Err(error).context(
        "running unshare (Debian package util-linux), which --port needs where it is not used by root",
    )
}

/// What `ip link set lo up` does: one request to rtnetlink (RTM_NEWLINK, see rtnetlink(7)).
fn bring_up_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    const NLMSG_ERROR: u16 = 2;
    /// A new network's first interface.
    const LOOPBACK_INDEX: u32 = 1;

    let mut request = Vec::with_capacity(32);
    request.extend(32_u32.to_ne_bytes());
    request.extend(RTM_NEWLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([0; 4]); // family, padding, type
    request.extend(LOOPBACK_INDEX.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes()); // which flags are changed

    let socket = Socket::new(Domain::from(NETLINK), Type::RAW, Some(Protocol::from(0)))?;
    socket.send(&request)?;
    let mut answer = [0; 64];
    let n = io::Read::read(&mut &socket, &mut answer)?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if n < 20 || kind != NLMSG_ERROR {
        return Err(io::Error::other("rtnetlink answered something else"));
    }
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}
