//! Whether the local server lives (R5: a crash is not a close).
//!
//! When a server dies, its kernel closes its connections, and that looks like a server which closes
//! them on purpose. The difference is told by the process: `PF_EXITING` in `/proc/PID/stat`, read
//! *after* the end of the connection was seen. (For some milliseconds after a SIGKILL neither the
//! pidfd nor the listener says that the process is dying; the flag does.)
//!
//! Which process it is, is found from the listening socket by a thread of its own, since it means
//! looking through `/proc`; the data plane only reads a few `stat` files when a connection ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use super::upstream::Target;
use crate::fault::planted;

/// How often the listening sockets are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The same while a server is known to be dead: until its successor is known, it passes for dead too.
const LOOK_AFTER_DEATH: Duration = Duration::from_millis(50);
/// A local listener accepts or refuses at once; one whose queue is full may do neither.
const PROBE_MAX: Duration = Duration::from_millis(1);
/// `PF_EXITING` of the kernel's `sched.h`.
const PF_EXITING: u64 = 0x4;
/// `TCP_LISTEN` as `/proc/net/tcp` prints it.
const LISTEN: &str = "0A";
/// `SO_ACCEPTCON` as `/proc/net/unix` prints it.
const UNIX_LISTENS: &str = "00010000";

/// What is known of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// A process that listens there is alive, and not about to end.
    Alive,
    /// Every process that listened there has ended or is ending.
    Dead,
    /// No process is known (it may be in another container).
    Unknown,
}

/// A process, named so that a reused pid is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    pid: u32,
    started: u64,
}

type Table = BTreeMap<Target, Vec<Process>>;

/// The processes behind the targets of all services.
#[derive(Debug, Clone)]
pub(crate) struct Liveness(Arc<Mutex<Table>>);

impl Liveness {
    /// Looks at the targets now, and goes on looking until the last handle is gone.
    pub(crate) fn watch(targets: impl IntoIterator<Item = Target>) -> std::io::Result<Self> {
        let mut table: Table = targets.into_iter().map(|t| (t, Vec::new())).collect();
        look(&mut table);
        let shared = Arc::new(Mutex::new(table));
        let weak = Arc::downgrade(&shared);
        thread::Builder::new()
            .name("liveness".into())
            .spawn(move || keep_looking(&weak))?;
        Ok(Self(shared))
    }

    /// Looks now at servers whose processes have ended: others may listen in their place.
    pub(crate) fn refresh(&self) {
        refresh(&self.0);
    }

    /// Whether the server at `target` lives. To be asked after its connection was seen to end.
    pub(crate) fn of(&self, target: &Target) -> Life {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match table.get(target) {
            None => Life::Unknown,
            Some(known) if known.is_empty() => Life::Unknown,
            Some(known) if known.iter().any(|p| lives(*p)) || planted!(DeathUnseen) => Life::Alive,
            Some(_) => Life::Dead,
        }
    }
}

/// Whether somebody listens at `target`. The server notices nothing of the question.
pub(crate) fn listens(target: &Target) -> bool {
    !listeners(target).is_empty()
}

/// Whether the server accepts a connection now: the question for one whose process is unknown.
pub(crate) fn accepts(target: &Target) -> bool {
    match target {
        Target::Tcp(address) => TcpStream::connect_timeout(address, PROBE_MAX).is_ok(),
        // Not blocking: a full queue must not hold the data plane.
        Target::Unix(path) => mio::net::UnixStream::connect(path).is_ok(),
    }
}

fn keep_looking(shared: &Weak<Mutex<Table>>) {
    let mut wait = LOOK_EVERY;
    loop {
        thread::sleep(wait);
        let Some(table) = shared.upgrade() else {
            return;
        };
        wait = if refresh(&table) {
            LOOK_AFTER_DEATH
        } else {
            LOOK_EVERY
        };
    }
}

/// Says whether some server is known to be dead.
fn refresh(table: &Mutex<Table>) -> bool {
    let mut copy = table.lock().unwrap_or_else(PoisonError::into_inner).clone();
    look(&mut copy);
    let dead = |known: &Vec<Process>| !known.is_empty() && !known.iter().any(|p| lives(*p));
    let any = copy.values().any(dead);
    *table.lock().unwrap_or_else(PoisonError::into_inner) = copy;
    any
}

/// Brings the table up to date: looks for the processes of targets that have none, or whose have all
/// ended. (Looking is dear: the kernel walks its whole table of connections.) A target without a
/// listener keeps its last processes: that they are dead is what will be asked.
fn look(table: &mut Table) {
    let mut wanted = BTreeMap::new();
    for (target, known) in table.iter() {
        if !known.iter().any(|p| lives(*p)) {
            wanted.insert(target.clone(), listeners(target));
        }
    }
    wanted.retain(|_, inodes| !inodes.is_empty());
    if wanted.is_empty() {
        return;
    }
    let mut found: Table = BTreeMap::new();
    for pid in processes() {
        let sockets = sockets_of(pid);
        for (target, inodes) in &wanted {
            if !sockets.is_disjoint(inodes)
                && let Some((started, _)) = stat(pid)
            {
                found
                    .entry(target.clone())
                    .or_default()
                    .push(Process { pid, started });
            }
        }
    }
    table.extend(found);
}

/// Inodes of the sockets that listen at `target` in this network namespace.
fn listeners(target: &Target) -> BTreeSet<u64> {
    let mut inodes = BTreeSet::new();
    match target {
        Target::Tcp(address) => {
            let port = format!(":{:04X}", address.port());
            for file in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
                for line in fs::read_to_string(file).unwrap_or_default().lines().skip(1) {
                    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                    if let [_, local, _, LISTEN, _, _, _, _, _, inode, ..] = fields[..]
                        && local.ends_with(&port)
                    {
                        inodes.extend(inode.parse::<u64>());
                    }
                }
            }
        }
        Target::Unix(path) => {
            let file = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
            for line in file.lines().skip(1) {
                let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                if let [_, _, _, UNIX_LISTENS, _, _, inode, name] = fields[..]
                    && path.to_str() == Some(name)
                {
                    inodes.extend(inode.parse::<u64>());
                }
            }
        }
    }
    inodes
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

fn sockets_of(pid: u32) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|e| {
            let link = fs::read_link(e.path()).ok()?;
            link.to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse()
                .ok()
        })
        .collect()
}

/// Start time and flags of a process that is not a zombie.
fn stat(pid: u32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything; what follows its last parenthesis is plain.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some((fields.get(19)?.parse().ok()?, fields.get(6)?.parse().ok()?))
}

/// When a living process began, in the kernel's ticks: with its pid it names the process.
pub(super) fn start_time(pid: u32) -> Option<u64> {
    stat(pid).map(|(started, _)| started)
}

fn lives(process: Process) -> bool {
    stat(process.pid)
        .is_some_and(|(started, flags)| started == process.started && flags & PF_EXITING == 0)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn finds_the_process_behind_a_listener_and_sees_it_die() {
        // The child inherits nothing: it listens by itself and says where.
        let script = "import socket,time\ns=socket.socket()\ns.bind(('127.0.0.1',0))\ns.listen()\n\
                      print(s.getsockname()[1],flush=True)\ntime.sleep(60)";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 (Debian package python3)");
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut port)
            .unwrap();
        let target = Target::Tcp(([127, 0, 0, 1], port.trim().parse().unwrap()).into());
        let liveness = Liveness::watch([target.clone()]).unwrap();
        assert_eq!(liveness.of(&target), Life::Alive);
        assert!(accepts(&target));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(liveness.of(&target), Life::Dead);
        assert!(!accepts(&target));
    }

    #[test]
    fn knows_that_it_does_not_know() {
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let liveness = Liveness::watch([Target::Tcp(free)]).unwrap();
        assert_eq!(liveness.of(&Target::Tcp(free)), Life::Unknown);
    }
}
