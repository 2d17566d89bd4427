//! One host: a network namespace, and how to run code and programs in it.

use std::fs::File;
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Injector, LabError, NAMESPACES, Process};

/// A host of a [`super::Lab`]. Clones are the same host.
#[derive(Debug, Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    namespace: String,
    file: File,
    /// What `/proc/PID/ns/net` shows for processes of this host.
    identity: (u64, u64),
    address: Ipv4Addr,
    address6: Ipv6Addr,
}

impl Host {
    pub(super) fn open(
        name: &str,
        namespace: &str,
        address: Ipv4Addr,
        address6: Ipv6Addr,
    ) -> io::Result<Self> {
        let file = File::open(Path::new(NAMESPACES).join(namespace))?;
        let meta = file.metadata()?;
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        let identity = (meta.dev(), meta.ino());
        let inner = Inner {
            name,
            namespace,
            file,
            identity,
            address,
            address6,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// `c`, `r1`, `r2`, ...
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The name of its network namespace, for `ip netns exec`.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// Its IPv4 address on eth0, of a /24.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.inner.address
    }

    /// Its IPv6 address on eth0, of a /64.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        self.inner.address6
    }

    /// Runs a closure on this host: sockets made in it, and processes started by it, belong to the
    /// host and stay there when they outlive it. It runs on a thread of its own.
    ///
    /// # Panics
    /// If the closure does, or the namespace cannot be entered (it was entered once, by `new`).
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name(format!("on {}", self.inner.name));
            let thread = builder.spawn_scoped(scope, || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(self.inner.file.as_fd(), kind)
                    .expect("the namespace is open and ours");
                f()
            });
            match thread.expect("a thread can be started").join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Whatever this host might send, without its programs.
    ///
    /// # Errors
    /// Packet sockets are not permitted.
    pub fn injector(&self) -> io::Result<Injector> {
        self.enter(|| Injector::open("eth0"))
    }

    /// Starts a program on this host, its output appended to the file `log`. `label` names it
    /// in messages.
    ///
    /// # Errors
    /// The log cannot be opened, or the program not started.
    pub fn spawn(&self, label: &str, mut command: Command, log: &Path) -> io::Result<Process> {
        let out = File::options().create(true).append(true).open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let child = self.enter(move || command.spawn())?;
        Ok(Process::new(
            format!("{label} on {}", self.inner.name),
            child,
            log.to_owned(),
        ))
    }

    /// Runs a program on this host to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, mut command: Command) -> io::Result<Output> {
        self.enter(move || command.output())
    }

    /// Runs `ip` on this host, once for each line.
    ///
    /// # Errors
    /// `ip` is missing or failed; it stops at the first line that fails.
    pub fn ip(&self, lines: &str) -> Result<(), LabError> {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]);
        self.enter(|| run_tool(command, lines, &self.inner.name))
    }

    /// Has every frame that leaves by this interface be one segment, with its checksum in it.
    ///
    /// # Errors
    /// `ethtool` (package ethtool) is missing or failed.
    pub fn offloads_off(&self, interface: &str) -> Result<(), LabError> {
        let mut command = Command::new("ethtool");
        command.args(["-K", interface]);
        command.args(["tso", "off", "gso", "off", "gro", "off", "tx", "off"]);
        self.tool(command, &format!("ethtool -K {interface}"))
    }

    /// Runs a tool on this host.
    pub(super) fn tool(&self, command: Command, what: &str) -> Result<(), LabError> {
        self.enter(|| run_tool(command, what, &self.inner.name))
    }

    /// Sets a knob under `/proc/sys`, as `net/ipv4/tcp_sack`, which shows the namespace of whoever looks. Where
    /// `/proc/sys` is read-only (some containers) the default has to do: no test's right or wrong may hang on it.
    pub fn sysctl(&self, knob: &str, value: &str) {
        self.enter(|| {
            let _ = std::fs::write(Path::new("/proc/sys").join(knob), value);
        });
    }

    /// Whether a living process of this pid is on this host.
    pub(super) fn holds(&self, pid: u32) -> bool {
        std::fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inner.identity)
    }
}

/// Runs a tool in the namespace of the calling thread, with `input` on its standard input.
pub(super) fn run_tool(mut command: Command, input: &str, place: &str) -> Result<(), LabError> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            let program = command.get_program().to_string_lossy().into_owned();
            let package = match &program[..] {
                "nft" => "nftables",
                "ethtool" => "ethtool",
                _ => "iproute2",
            };
            LabError::MissingTool { program, package }
        }
        _ => LabError::Os {
            action: format!("run {command:?}"),
            source,
        },
    })?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that fails early closes its input; its own message says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|source| LabError::Os {
        action: format!("wait for {command:?}"),
        source,
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Ip {
        place: place.to_owned(),
        arguments: input.to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
