//! Hosts made of network namespaces, joined by one switch: the network that whole-system tests and
//! the demonstration run on.
//!
//! ```text
//!             switch (a namespace of its own, bridge br0)
//!      ┌──────────┬──────────┬──────────┐
//!      c          r1         r2         r3        each: eth0, lo, its own kernel TCP
//!  10.98.0.10  10.98.0.11 10.98.0.12 10.98.0.13   /24, and fd98::10 .. /64
//! ```
//!
//! Nothing of it touches the network of the machine: every link lies between two of the new
//! namespaces. Only iproute2 is needed, and either root or user namespaces (see [`userns`]).
//!
//! A [`Lab`] cleans up when it is dropped, panic included; when its process dies in any other way
//! (a signal, SIGKILL), a janitor process, whose standard input ends with it, does the same; and what
//! even that left behind is removed by the next lab, which knows it by the dead owner's pid in its
//! name.
//!
//! ```no_run
//! use unbroken_tests::netns::{Lab, LabOptions};
//! let lab = Lab::new(LabOptions { replicas: 3 })?;
//! let r1 = lab.host("r1");
//! let listener = r1.enter(|| std::net::TcpListener::bind("10.98.0.11:80"))?;
//! let mut curl = std::process::Command::new("curl");
//! curl.arg("http://10.98.0.11/");
//! let fetch = lab.host("c").spawn("curl", curl, "/tmp/curl.log".as_ref())?;
//! lab.cut("r1")?;
//! # drop((listener, fetch));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod frames;
mod host;
mod path;
mod process;
pub mod userns;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use socket2::{Domain, Type};
use thiserror::Error;

use frames::Port;
pub use frames::{Capture, Captured, Injector};
pub use host::Host;
pub use path::{Path, PathOptions};
pub use process::{Process, ProcessError, Timeout, wait_until};

/// Every namespace of every lab is called `ub-<owner's pid>-<number>-<host>`.
const PREFIX: &str = "ub-";
const NAMESPACES: &str = "/run/netns";
const SWITCH: &str = "sw";

/// How long killed processes may take to be gone: the kernel frees a large process slowly.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// How long the links may take to come up; some milliseconds are usual.
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// Why there is no network of hosts.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LabError {
    /// A program is missing.
    #[error("the program `{program}` is missing: install the package {package}")]
    MissingTool {
        /// Its name.
        program: String,
        /// Debian's package of it.
        package: &'static str,
    },
    /// `ip` refused.
    #[error("`ip {arguments}` failed in {place}: {message}")]
    Ip {
        /// Where it ran.
        place: String,
        /// Its arguments or batch lines.
        arguments: String,
        /// What it said.
        message: String,
    },
    /// The kernel refused something.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was being done.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What kind of network to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabOptions {
    /// Hosts `r1` to `rN`, beside the client host `c`: 1 to 80.
    pub replicas: u8,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { replicas: 3 }
    }
}

/// The processes that a [`Lab::kill_host`] killed.
#[derive(Debug, Clone)]
pub struct Killed {
    /// Just before the first signal was sent.
    pub at: Instant,
    /// Each process, as (pid, command line), in the order of the signals.
    pub processes: Vec<(u32, String)>,
}

/// The network: a switch, a client host `c`, replica hosts `r1`, `r2`, ...
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    hosts: BTreeMap<String, Host>,
    switch: Host,
    janitor: Child,
}

impl Lab {
    /// Makes the network, after removing what labs of dead processes left behind.
    ///
    /// # Errors
    /// No iproute2, or no right to make namespaces: see [`userns`] for the latter.
    ///
    /// # Panics
    /// If `options.replicas` is out of its range.
    pub fn new(options: LabOptions) -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            (1..=80).contains(&options.replicas),
            "1 to 80 replica hosts"
        );
        remove_leftovers();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX}{}-{number}-", std::process::id());
        let names: Vec<String> = std::iter::once("c".to_owned())
            .chain((1..=options.replicas).map(|i| format!("r{i}")))
            .collect();
        let namespaces: Vec<String> = std::iter::once(SWITCH)
            .chain(names.iter().map(String::as_str))
            .map(|name| format!("{prefix}{name}"))
            .collect();
        // The janitor first: whatever happens from here on is cleaned up.
        let janitor = start_janitor(&namespaces)?;
        let made = build(&prefix, &names, &namespaces);
        match made {
            Ok((switch, hosts)) => Ok(Self {
                prefix,
                hosts,
                switch,
                janitor,
            }),
            Err(e) => {
                stop_janitor(janitor);
                Err(e)
            }
        }
    }

    /// The host of this name: `c`, `r1`, `r2`, ...
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn host(&self, name: &str) -> &Host {
        self.hosts
            .get(name)
            .unwrap_or_else(|| panic!("no host {name:?} in this lab"))
    }

    /// All hosts, the client first.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// What the names of this lab's namespaces begin with; a host's name follows.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Pulls the host's cable: its interface loses the carrier, the switch forgets its address.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut(&self, host: &str) -> Result<(), LabError> {
        self.port(host, "down")
    }

    /// Plugs the cable in again.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn plug(&self, host: &str) -> Result<(), LabError> {
        self.port(host, "up")
    }

    fn port(&self, host: &str, state: &str) -> Result<(), LabError> {
        let port = self.host(host).name();
        self.switch.ip(&format!("link set dev {port} {state}"))
    }

    /// Sets the size of the packets that every link takes, in bytes; 1500 by default.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), LabError> {
        for host in self.hosts() {
            let port = host.name();
            self.switch.ip(&format!("link set dev {port} mtu {mtu}"))?;
            host.ip(&format!("link set dev eth0 mtu {mtu}"))?;
        }
        self.switch.ip(&format!("link set dev br0 mtu {mtu}"))
    }

    /// Makes the way between the host and the switch a long and lossy one. Each of its frames is one segment from then on,
    /// so that what is lost is what a network loses.
    ///
    /// # Errors
    /// `ip` or `ethtool` failed, or packet sockets are not permitted.
    pub fn lengthen(&self, host: &str, options: PathOptions) -> Result<Path, LabError> {
        let end = self.host(host);
        let port = end.name();
        let [near, far] = ["near", "far"].map(|side| format!("{port}-{side}"));
        self.switch.ip(&format!(
            "link set dev {port} nomaster\nlink add {near} type veth peer name {far}\n\
             link set dev {near} up\nlink set dev {far} master br0 up"
        ))?;
        end.offloads_off("eth0")?;
        self.switch.offloads_off(&far)?;
        wait_until_connected(&self.switch, &self.hosts)?;
        let open = || {
            let [host, switch] = [port, &near].map(|name| Port::open(name).map(Arc::new));
            Path::open(&host?, &switch?, options)
        };
        self.switch.enter(open).map_err(|source| LabError::Os {
            action: format!("lengthen the way to {port}"),
            source,
        })
    }

    /// Makes the switch drop every frame from and to the host, silently: the carrier stays, as when
    /// the fault lies farther away.
    ///
    /// # Errors
    /// `bridge` failed.
    pub fn mute(&self, host: &str) -> Result<(), LabError> {
        self.port_state(host, "disabled")
    }

    /// Ends [`Lab::mute`].
    ///
    /// # Errors
    /// `bridge` failed.
    pub fn unmute(&self, host: &str) -> Result<(), LabError> {
        self.port_state(host, "forwarding")
    }

    /// Makes the switch drop, silently, every frame from the host: it hears and is not heard.
    ///
    /// # Errors
    /// `nft` (package nftables) failed.
    pub fn silence(&self, host: &str) -> Result<(), LabError> {
        self.drop_frames(host, "ingress")
    }

    /// Makes the switch drop, silently, every frame to the host: it is heard and does not hear.
    ///
    /// # Errors
    /// `nft` (package nftables) failed.
    pub fn deafen(&self, host: &str) -> Result<(), LabError> {
        self.drop_frames(host, "egress")
    }

    /// Ends [`Lab::silence`] and [`Lab::deafen`].
    ///
    /// # Errors
    /// `nft` failed.
    pub fn unsilence(&self, host: &str) -> Result<(), LabError> {
        self.nft(&format!("delete table netdev {}", self.host(host).name()))
    }

    fn drop_frames(&self, host: &str, hook: &str) -> Result<(), LabError> {
        let port = self.host(host).name();
        self.nft(&format!(
            "table netdev {port} {{\n chain {hook} {{\n  \
             type filter hook {hook} device {port} priority 0; policy drop;\n }}\n}}"
        ))
    }

    fn nft(&self, rules: &str) -> Result<(), LabError> {
        let mut command = Command::new("nft");
        command.arg(rules);
        self.switch.tool(command, &format!("nft {rules}"))
    }

    /// A disabled port of a bridge (IEEE 802.1D) neither forwards nor learns nor delivers.
    fn port_state(&self, host: &str, state: &str) -> Result<(), LabError> {
        let port = self.host(host).name().to_owned();
        let mut command = Command::new("bridge");
        command.args(["link", "set", "dev", &port, "state", state]);
        self.switch.tool(
            command,
            &format!("bridge link set dev {port} state {state}"),
        )
    }

    /// Listens at all ports of the switch, from now on.
    ///
    /// # Errors
    /// Packet sockets are not permitted.
    pub fn capture(&self) -> io::Result<Capture> {
        self.switch.enter(|| {
            let any = socket2::Socket::new(Domain::UNIX, Type::DGRAM, None)?;
            let mut ports = BTreeMap::new();
            for name in self.hosts.keys() {
                let index = rustix::net::netdevice::name_to_index(&any, name)?;
                ports.insert(i32::try_from(index).expect("a small number"), name.clone());
            }
            Capture::open(ports)
        })
    }

    /// Kills everything that runs on the host with SIGKILL, as the loss of a machine would: the node
    /// first, so that it sees nothing of its servers' deaths, then all others. Returns when all
    /// are dead. Whoever holds a [`Process`] of the host finds it dead too.
    ///
    /// # Errors
    /// A process outlived SIGKILL by ten seconds.
    pub fn kill_host(&self, host: &str) -> Result<Killed, LabError> {
        kill_all(self.host(host))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in self.hosts.values() {
            // A process that cannot be killed is the janitor's affair, and then the next lab's.
            let _ = kill_all(host);
        }
        let namespaces = self.hosts.values().chain(std::iter::once(&self.switch));
        let lines: Vec<String> = namespaces
            .map(|h| format!("netns delete {}", h.namespace()))
            .collect();
        let _ = ip_batch(&lines.join("\n"));
        // Nothing is left for it; it ends when its input does.
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

type Built = (Host, BTreeMap<String, Host>);

fn build(prefix: &str, names: &[String], namespaces: &[String]) -> Result<Built, LabError> {
    let lines: Vec<String> = namespaces
        .iter()
        .map(|n| format!("netns add {n}"))
        .collect();
    ip_batch(&lines.join("\n"))?;

    let open = |name: &str, number: u8| {
        let namespace = format!("{prefix}{name}");
        let v4 = Ipv4Addr::new(10, 98, 0, number);
        let v6 = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, decimal_as_hex(number));
        Host::open(name, &namespace, v4, v6).map_err(|source| LabError::Os {
            action: format!("open the network namespace {namespace}"),
            source,
        })
    };
    let switch = open(SWITCH, 0)?;
    // The switch has no addresses of its own.
    switch.sysctl("net/ipv6/conf/default/disable_ipv6", "1");
    let mut lines = vec!["link add br0 type bridge stp_state 0 forward_delay 0".to_owned()];
    lines.push("link set dev br0 up".to_owned());
    let mut hosts = BTreeMap::new();
    for (name, number) in names.iter().zip(10u8..) {
        let host = open(name, number)?;
        lines.push(format!(
            "link add {name} type veth peer name eth0 address 02:98:00:00:00:{number:02} netns {}",
            host.namespace()
        ));
        lines.push(format!("link set dev {name} master br0 up"));
        hosts.insert(name.clone(), host);
    }
    switch.ip(&lines.join("\n"))?;
    for host in hosts.values() {
        // Without duplicate address detection an address is usable at once.
        for scope in ["all", "default", "eth0"] {
            host.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0");
            host.sysctl(&format!("net/ipv6/conf/{scope}/accept_ra"), "0");
        }
        // A host that forwards would answer for the virtual address with ICMP of its own.
        host.sysctl("net/ipv4/ip_forward", "0");
        host.ip(&format!(
            "link set dev lo up\nlink set dev eth0 up\n\
             addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad",
            host.address(),
            host.address6(),
        ))?;
    }
    wait_until_connected(&switch, &hosts)?;
    Ok((switch, hosts))
}

/// Waits until frames pass: the kernel notices a carrier only after a moment, and drops what is sent
/// before without a word.
fn wait_until_connected(switch: &Host, hosts: &BTreeMap<String, Host>) -> Result<(), LabError> {
    let shows = |host: &Host, program: &str, arguments: &[&str], text: &str| {
        let mut command = Command::new(program);
        command.args(arguments);
        let output = host.output(command).map(|o| o.stdout).unwrap_or_default();
        String::from_utf8_lossy(&output).matches(text).count()
    };
    wait_until("a link between all hosts", CONNECT_WAIT, || {
        shows(
            switch,
            "bridge",
            &["-o", "link", "show"],
            "state forwarding",
        ) == hosts.len()
            && shows(
                switch,
                "ip",
                &["-o", "link", "show", "dev", "br0"],
                "state UP",
            ) == 1
            && hosts
                .values()
                .all(|h| shows(h, "ip", &["-o", "link", "show", "dev", "eth0"], "state UP") == 1)
    })
    .map_err(|timeout| LabError::Os {
        action: "connect the hosts".to_owned(),
        source: io::Error::new(io::ErrorKind::TimedOut, timeout),
    })
}

/// 10 as 0x10, so that `fd98::10` belongs to `10.98.0.10` for the reader too.
fn decimal_as_hex(number: u8) -> u16 {
    u16::from(number / 100) << 8 | u16::from(number / 10 % 10) << 4 | u16::from(number % 10)
}

fn ip_batch(lines: &str) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    host::run_tool(command, lines, "this namespace")
}

/// Kills what `processes_of` finds until there is nothing left: a process may fork while we look.
fn kill_all(host: &Host) -> Result<Killed, LabError> {
    let at = Instant::now();
    let deadline = at + KILL_WAIT;
    let mut killed = Killed {
        at,
        processes: Vec::new(),
    };
    loop {
        let mut found = processes_of(host);
        if found.is_empty() {
            return Ok(killed);
        }
        found.sort_by_key(|(pid, command)| (!is_node(command), *pid));
        let mut dying = Vec::new();
        for (pid, command) in found {
            let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
                continue;
            };
            // The pidfd pins the process; that it is still one of this host is checked after, so
            // that a pid that was given to somebody else meanwhile is never signalled.
            let Ok(fd) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else {
                continue;
            };
            if !host.holds(pid) || rustix::process::pidfd_send_signal(&fd, Signal::KILL).is_err() {
                continue;
            }
            killed.processes.push((pid, command));
            dying.push(fd);
        }
        for fd in dying {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("ten seconds at most");
            let mut poll = [PollFd::new(&fd, PollFlags::IN)];
            let gone = rustix::event::poll(&mut poll, Some(&timeout));
            if matches!(gone, Ok(0)) {
                return Err(LabError::Os {
                    action: format!("kill what runs on {}", host.name()),
                    source: io::ErrorKind::TimedOut.into(),
                });
            }
        }
    }
}

/// Whether a command line is that of an `unbroken node`, under whatever program name.
fn is_node(command: &str) -> bool {
    let mut words = command.split(' ');
    words
        .next()
        .is_some_and(|program| program.contains("unbroken"))
        && words.any(|word| word == "node")
}

/// Living processes in the host's network namespace, as (pid, command line).
fn processes_of(host: &Host) -> Vec<(u32, String)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id() && host.holds(*pid))
        .map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            (pid, line.trim_end_matches('\0').replace('\0', " "))
        })
        .collect()
}

/// Waits for its input to end, which happens when our process is gone however it went; then kills
/// and removes what is left. In a process group of its own, so that Ctrl-C does not reach it.
const JANITOR: &str = r#"
trap '' INT TERM HUP
cat > /dev/null
for n in "$@"; do
    [ -e "/run/netns/$n" ] || continue
    for p in $(ip netns pids "$n"); do kill -9 "$p"; done
    ip netns delete "$n"
done
"#;

fn start_janitor(namespaces: &[String]) -> Result<Child, LabError> {
    let mut command = Command::new("sh");
    command
        .args(["-c", JANITOR, "unbroken-lab-janitor"])
        .args(namespaces);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    command.spawn().map_err(|source| LabError::Os {
        action: "start the janitor (sh)".to_owned(),
        source,
    })
}

fn stop_janitor(mut janitor: Child) {
    drop(janitor.stdin.take());
    let _ = janitor.wait();
}

/// Removes namespaces whose owner (the pid in their name) lives no more. What fails here fails
/// because another lab is doing the same at this moment.
fn remove_leftovers() {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        let Some(owner) = owner.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if std::path::Path::new("/proc")
            .join(owner.to_string())
            .exists()
        {
            continue;
        }
        if let Ok(host) = Host::open(name, name, Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED) {
            let _ = kill_all(&host);
        }
        let _ = ip_batch(&format!("netns delete {name}"));
    }
}
