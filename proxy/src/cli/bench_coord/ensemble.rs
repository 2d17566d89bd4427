//! Three servers of one kind, as processes of this machine.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use unbroken_coord::wire::Request;

use super::link::{Link, ensure_znode, leads};
use super::load::{KEYS, LONG_SESSION, VALUE, key};
use crate::cli::keygen;

/// Servers of an ensemble.
pub(super) const SERVERS: usize = 3;

/// How long servers may take to serve.
const START_MAX: Duration = Duration::from_secs(30);

/// What can be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// `unbroken coord`, this program.
    Unbroken,
    /// Apache ZooKeeper, with this class path.
    Zookeeper { class_path: String },
}

impl Kind {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Unbroken => "unbroken",
            Self::Zookeeper { .. } => "zookeeper",
        }
    }
}

/// Where Debian's packages put Apache ZooKeeper and what it needs.
const DEBIAN_JARS: [&str; 3] = [
    "/usr/share/java/zookeeper.jar",
    "/usr/share/java/snappy-java.jar",
    "/usr/share/java/metrics-core.jar",
];

/// The peer that is installed, or what is missing.
pub(super) fn find_zookeeper() -> Result<Kind, String> {
    for jar in DEBIAN_JARS {
        if !Path::new(jar).exists() {
            return Err(format!("{jar} is missing"));
        }
    }
    let java = Command::new("java")
        .arg("-version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match java {
        Ok(status) if status.success() => Ok(Kind::Zookeeper {
            class_path: DEBIAN_JARS.join(":"),
        }),
        Ok(status) => Err(format!("java -version: {status}")),
        Err(error) => Err(format!("java cannot be run: {error}")),
    }
}

/// Three servers. Dropping it kills them.
pub(super) struct Ensemble {
    pub(super) kind: Kind,
    dir: PathBuf,
    servers: Vec<Child>,
    /// Where clients connect.
    pub(super) addresses: Vec<SocketAddr>,
    /// From the start of the processes to the first acknowledged write.
    pub(super) started_in: Duration,
}

impl Ensemble {
    /// Starts three servers with empty disks below `dir`, and fills in what the loads use.
    pub(super) fn start(kind: Kind, dir: &Path) -> anyhow::Result<Self> {
        let dir = dir.join(kind.name());
        let ports = free_ports(3 * SERVERS)?;
        let addresses = ports[..SERVERS].iter().map(|port| local(*port)).collect();
        for index in 0..SERVERS {
            fs::create_dir_all(dir.join(format!("{index}")))?;
        }
        match &kind {
            Kind::Unbroken => configure_unbroken(&dir, &ports)?,
            Kind::Zookeeper { .. } => configure_zookeeper(&dir, &ports)?,
        }
        let mut ensemble = Self {
            kind,
            dir,
            servers: Vec::new(),
            addresses,
            started_in: Duration::ZERO,
        };
        let begin = Instant::now();
        for index in 0..SERVERS {
            let server = ensemble.spawn(index)?;
            ensemble.servers.push(server);
        }
        ensemble.first_write(begin)?;
        ensemble.started_in = begin.elapsed();
        ensemble.fill()?;
        Ok(ensemble)
    }

    fn spawn(&self, index: usize) -> anyhow::Result<Child> {
        let dir = self.dir.join(format!("{index}"));
        let mut command = match &self.kind {
            Kind::Unbroken => {
                let program = std::env::current_exe().context("finding this program")?;
                let mut command = Command::new(program);
                command.arg("coord").arg("-c").arg(dir.join("coord.toml"));
                command
            }
            Kind::Zookeeper { class_path } => {
                let mut command = Command::new("java");
                command
                    .args(["-cp", class_path, "-Xmx1g", "-Djava.awt.headless=true"])
                    .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
                    .arg(dir.join("zoo.cfg"));
                command
            }
        };
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join("log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {} {index}", self.kind.name()))
    }

    fn first_write(&self, begin: Instant) -> anyhow::Result<()> {
        loop {
            let written = Link::open(self.addresses[0], LONG_SESSION)
                .and_then(|mut link| ensure_znode(&mut link, "/bench", b""));
            match written {
                Ok(()) => return Ok(()),
                Err(error) if begin.elapsed() > START_MAX => {
                    return Err(error).with_context(|| {
                        let log = self.dir.join("0/log");
                        format!("{} does not serve; see {}", self.kind.name(), log.display())
                    });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn fill(&self) -> anyhow::Result<()> {
        let mut link = Link::open(self.addresses[0], LONG_SESSION)?;
        for index in 0..KEYS {
            ensure_znode(&mut link, &key(index), &VALUE)?;
        }
        for address in &self.addresses {
            Link::open(*address, LONG_SESSION)?.must(&Request::Sync { path: key(0) })?;
        }
        Ok(())
    }

    /// Which server leads. Waits until one does.
    pub(super) fn leader(&self) -> anyhow::Result<usize> {
        let begin = Instant::now();
        while begin.elapsed() < START_MAX {
            let mut servers = self.addresses.iter();
            if let Some(leader) = servers.position(|address| leads(*address).unwrap_or(false)) {
                return Ok(leader);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("no server of {} leads", self.kind.name())
    }

    /// The largest resident set of its servers, in MiB.
    pub(super) fn resident_mib(&self) -> anyhow::Result<f64> {
        let mut largest: f64 = 0.0;
        for server in &self.servers {
            let status = fs::read_to_string(format!("/proc/{}/status", server.id()))?;
            let kib = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))
                .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
                .context("VmRSS of a server")?;
            largest = largest.max(kib / 1024.0);
        }
        Ok(largest)
    }

    /// Sends a server a signal.
    pub(super) fn signal(&self, index: usize, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.servers[index].id())?;
        let pid = Pid::from_raw(pid).context("a process id above zero")?;
        kill_process(pid, signal).context("signalling a server")
    }

    /// Starts a server that was killed again, and waits until it serves what all have: how long that
    /// took.
    pub(super) fn restart(&mut self, index: usize) -> anyhow::Result<Duration> {
        let _ = self.servers[index].kill();
        self.servers[index].wait()?;
        let begin = Instant::now();
        self.servers[index] = self.spawn(index)?;
        loop {
            let synced = Link::open(self.addresses[index], LONG_SESSION)
                .and_then(|mut link| link.must(&Request::Sync { path: key(0) }));
            match synced {
                Ok(()) => return Ok(begin.elapsed()),
                Err(error) => ensure!(
                    begin.elapsed() < START_MAX,
                    "a restarted server does not serve: {error:#}"
                ),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Ensemble {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // It may have ended already; a stopped one dies, too.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Ports that nobody uses at this moment.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind(local(0)))
        .collect::<Result<_, _>>()?;
    let ports = listeners.iter().map(|l| l.local_addr().map(|a| a.port()));
    Ok(ports.collect::<Result<_, _>>()?)
}

fn configure_unbroken(dir: &Path, ports: &[u16]) -> anyhow::Result<()> {
    let key = dir.join("key");
    fs::write(&key, keygen::generate()?)?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&key, private)?;
    let peers: Vec<String> = (0..SERVERS)
        .map(|index| format!("n{index} = \"127.0.0.1:{}\"", ports[SERVERS + index]))
        .collect();
    for index in 0..SERVERS {
        let data = dir.join(format!("{index}/data"));
        let config = format!(
            "[node]\nname = \"n{index}\"\ndata_dir = {data:?}\nkey_file = {key:?}\n\
             [coord]\nclient = \"127.0.0.1:{}\"\npeers = {{ {} }}\n\
             [admin]\nlisten = \"127.0.0.1:{}\"\n",
            ports[index],
            peers.join(", "),
            ports[2 * SERVERS + index],
        );
        fs::write(dir.join(format!("{index}/coord.toml")), config)?;
    }
    Ok(())
}

fn configure_zookeeper(dir: &Path, ports: &[u16]) -> anyhow::Result<()> {
    let servers: Vec<String> = (0..SERVERS)
        .map(|index| {
            let (quorum, election) = (ports[SERVERS + index], ports[2 * SERVERS + index]);
            format!("server.{}=127.0.0.1:{quorum}:{election}", index + 1)
        })
        .collect();
    for (index, client) in ports.iter().take(SERVERS).enumerate() {
        let data = dir.join(format!("{index}/data"));
        fs::create_dir_all(&data)?;
        fs::write(data.join("myid"), format!("{}", index + 1))?;
        let config = format!(
            "tickTime=2000\ninitLimit=10\nsyncLimit=5\ndataDir={}\nclientPort={client}\n\
             clientPortAddress=127.0.0.1\nadmin.enableServer=false\nmaxClientCnxns=0\n\
             4lw.commands.whitelist=srvr\n{}\n",
            data.display(),
            servers.join("\n"),
        );
        fs::write(dir.join(format!("{index}/zoo.cfg")), config)?;
    }
    Ok(())
}
