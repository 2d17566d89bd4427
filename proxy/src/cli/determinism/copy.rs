//! One copy of the server: started, watched, stopped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// How often it is looked whether a copy listens, and whether it has taken its input.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// A copy that does not end on SIGTERM is killed after this long.
const STOP_WITHIN: Duration = Duration::from_secs(3);
/// Lines of a copy's log that an error message shows.
const TAIL_LINES: usize = 10;
/// How many ports are tried.
const PORTS_TRIED: usize = 4;
/// State of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// How a copy is started.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// The program and its arguments, with placeholders.
    pub(super) command: Vec<OsString>,
    /// The port it listens on by itself; else it is told one.
    pub(super) fixed_port: Option<u16>,
    /// How long it may take until it listens.
    pub(super) start_within: Duration,
}

/// Why a copy does not run.
enum StartError {
    /// Its port was free, and then somebody else's.
    PortTaken,
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for StartError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// A running copy.
pub(super) struct Copy {
    child: Child,
    pub(super) address: SocketAddr,
    log: PathBuf,
}

impl Copy {
    /// Starts copy `number` (from 1) in `folder`, which is its own, and waits until it listens.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not listen.
    pub(super) async fn start(
        recipe: &Recipe,
        number: usize,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        for _ in 1..PORTS_TRIED {
            match Self::try_start(recipe, number, folder).await {
                // Somebody else was faster.
                Err(StartError::PortTaken) => {}
                Err(StartError::Other(error)) => return Err(error),
                Ok(copy) => return Ok(copy),
            }
        }
        match Self::try_start(recipe, number, folder).await {
            Ok(copy) => Ok(copy),
            Err(StartError::Other(error)) => Err(error),
            Err(StartError::PortTaken) => bail!("somebody else listens on its port"),
        }
    }

    async fn try_start(recipe: &Recipe, number: usize, folder: &Path) -> Result<Self, StartError> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let port = match recipe.fixed_port {
            Some(port) => port,
            None => free_port()?,
        };
        let fill = |argument: &OsString| -> OsString {
            // What is not Unicode holds no placeholder.
            let Some(text) = argument.to_str() else {
                return argument.clone();
            };
            text.replace("{port}", &port.to_string())
                .replace("{copy}", &number.to_string())
                .replace("{dir}", &folder.to_string_lossy())
                .into()
        };
        let mut arguments = recipe.command.iter().map(fill);
        let program = arguments.next().context("there is no command")?;
        let log = folder.join("output.log");
        let out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let child = Command::new(&program)
            .args(arguments)
            .env("PORT", port.to_string())
            .env("COPY", number.to_string())
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            // Its children are stopped with it, and a Ctrl-C reaches us alone.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut copy = Self {
            child,
            address: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
            log,
        };
        if let Err(error) = copy.wait_listening(recipe).await {
            copy.stop().await;
            let taken = listens(port).is_some();
            return Err(if taken {
                StartError::PortTaken
            } else {
                StartError::Other(error)
            });
        }
        Ok(copy)
    }

    async fn wait_listening(&mut self, recipe: &Recipe) -> anyhow::Result<()> {
        let deadline = Instant::now() + recipe.start_within;
        let port = self.address.port();
        loop {
            let group = self.child.id().unwrap_or(0);
            if let Some((ip, socket)) = listens(port)
                && holds(group, socket)
            {
                self.address.set_ip(ip);
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "it ended ({}) before it listened on port {port}; a server must stay in the \
                     foreground{}",
                    describe(status),
                    self.tail()
                );
            }
            if Instant::now() >= deadline {
                let hint = match recipe.fixed_port {
                    Some(_) => "",
                    None => {
                        "; it was told the port by {port} in its arguments and by PORT in its \
                         environment; a server that takes neither needs --port"
                    }
                };
                bail!(
                    "it did not listen on port {port} within {:?} (--start-within){hint}{}",
                    recipe.start_within,
                    self.tail()
                );
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for its end, and says how it ended. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> String {
        match self.child.wait().await {
            Ok(status) => describe(status),
            Err(error) => format!("it cannot be waited for: {error}"),
        }
    }

    /// Ends it and what it has started: SIGTERM, then SIGKILL.
    pub(super) async fn stop(mut self) {
        // Once it was waited for, its pid may be somebody else's.
        let Some(group) = self.child.id().and_then(|id| i32::try_from(id).ok()) else {
            return;
        };
        let Some(group) = Pid::from_raw(group) else {
            return;
        };
        // It may have ended just now.
        let _ = rustix::process::kill_process_group(group, Signal::TERM);
        if timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
            let _ = self.child.wait().await;
        }
    }

    /// The end of what it printed.
    fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        tail.iter().map(|line| format!("\n  | {line}")).collect()
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("finding a free port")?;
    Ok(listener.local_addr()?.port())
}

/// One line of the kernel's table of TCP sockets in this thread's network.
struct Row {
    v6: bool,
    local_port: u16,
    remote_port: u16,
    listening: bool,
    inode: u64,
    /// Bytes not yet read; of a listening socket, connections not yet accepted.
    waiting: u64,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (file, v6) in [
        ("/proc/thread-self/net/tcp", false),
        ("/proc/thread-self/net/tcp6", true),
    ] {
        for line in fs::read_to_string(file).unwrap_or_default().lines().skip(1) {
            rows.extend(row(line, v6));
        }
    }
    rows
}

fn row(line: &str, v6: bool) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let mut port = || u16::from_str_radix(fields.next()?.rsplit_once(':')?.1, 16).ok();
    let (local_port, remote_port) = (port()?, port()?);
    let listening = fields.next()? == LISTEN;
    let waiting = u64::from_str_radix(fields.next()?.split_once(':')?.1, 16).ok()?;
    Some(Row {
        v6,
        local_port,
        remote_port,
        listening,
        waiting,
        inode: fields.nth(4)?.parse().ok()?,
    })
}

/// The loopback address where somebody listens on `port`, and the socket. Looking is not connecting: a copy sees no
/// connection but those of its input.
fn listens(port: u16) -> Option<(IpAddr, u64)> {
    let rows = rows();
    let mut listening = rows.iter().filter(|r| r.listening && r.local_port == port);
    let first = listening.next()?;
    // A socket of the IPv6 table may listen to both; who listens to IPv4 is asked there.
    let v6 = first.v6 && listening.all(|r| r.v6);
    let both = v6 && std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err();
    let ip = if v6 && !both {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    Some((ip, first.inode))
}

/// Whether a process of this group has the socket.
fn holds(group: u32, inode: u64) -> bool {
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let in_group = entries.filter(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name may hold anything; behind its last parenthesis stand state, parent, group.
        let field = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(2));
        field.and_then(|field| field.parse().ok()) == Some(group)
    });
    in_group
        .flat_map(|entry| fs::read_dir(entry.path().join("fd")).into_iter().flatten())
        .flatten()
        .any(|fd| fs::read_link(fd.path()).is_ok_and(|link| link == socket))
}

/// Waits until the server on `server_port` has read all that was sent from `client_port`, and has
/// accepted every connection; false if it has not by `deadline`.
pub(super) async fn taken(server_port: u16, client_port: u16, deadline: Instant) -> bool {
    loop {
        let waits = rows().iter().any(|r| {
            r.local_port == server_port
                && r.waiting > 0
                && (r.listening || r.remote_port == client_port)
        });
        if !waits {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_who_listens() {
        let four = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = four.local_addr().unwrap().port();
        let (ip, socket) = listens(port).unwrap();
        assert_eq!(ip, Ipv4Addr::LOCALHOST);
        let own = rustix::process::getpgrp().as_raw_nonzero().get();
        assert!(holds(own.try_into().unwrap(), socket));
        assert!(!holds(0, socket));
        drop(four);
        assert_eq!(listens(port), None);
    }
}
