//! A cluster of real nodes: the `unbroken` program and its servers on the hosts of a [`Lab`].
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use unbroken_tests::cluster::{Cluster, Options, Service};
//!
//! let mut cluster = Cluster::start(Options::new("path/to/lab-node", [Service::lab("path/to/lab-server")]))?;
//! let (leader, view) = cluster.wait_whole()?;
//! let client = cluster.connect(80)?;
//! cluster.lab().kill_host(&leader)?;
//! cluster.wait_leader(view)?; // and the client has noticed nothing
//! # Ok(()) }
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use unbroken::status::{Redundancy, Role, Status};

use crate::disk::Disk;
use crate::netns::{Host, Lab, LabOptions, Process, wait_until};

/// The virtual address of every service that names no other, in the network of the lab.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);

/// Where each node's page is, on its own loopback.
const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9600);

/// How long a node may take to answer one question.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// How long anything that is waited for may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of each node's log that a failed test shows.
const TAIL_LINES: usize = 40;

/// A service and the server behind it.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the server on each replica's loopback.
    pub upstream: u16,
    /// The server's command line, started in the replica's folder; empty where the node starts it (`command` in `keys`).
    pub server: Vec<String>,
    /// Further lines of its `[[service]]`; a `vip` or `interface` there takes the place of the usual one.
    pub keys: String,
}

impl Service {
    /// The tests' deterministic server ([`crate::server`]) on port 80. `program`: `env!("CARGO_BIN_EXE_lab-server")`.
    #[must_use]
    pub fn lab(program: &str) -> Self {
        Self {
            name: "lab".to_owned(),
            port: 80,
            upstream: 7000,
            server: vec![program.to_owned(), "127.0.0.1:7000".to_owned()],
            keys: String::new(),
        }
    }
}

/// What kind of cluster to make.
#[derive(Debug, Clone)]
pub struct Options {
    /// The node's program: `env!("CARGO_BIN_EXE_lab-node")`.
    pub program: PathBuf,
    /// What stands before the node's own arguments: for a program that is a node only if told so.
    pub arguments: Vec<String>,
    /// Replica hosts `r1`, `r2`, ...; 3 by default.
    pub replicas: u8,
    /// Coordinators on hosts of their own behind the replicas', in place of those in the nodes; 0 by default.
    pub coordinators: u8,
    /// Size of the packets that the network takes; 1500 by default.
    pub mtu: Option<u16>,
    /// Further lines of each node's `[group]`.
    pub group: String,
    /// Further variables of every node's environment.
    pub environment: Vec<(&'static str, String)>,
    /// Gives each replica's data folder a disk of its own, of so many bytes: see [`Cluster::disk`].
    pub disk: Option<u64>,
    /// At least one.
    pub services: Vec<Service>,
}

impl Options {
    /// Three replicas with a coordinator in each.
    pub fn new(program: impl Into<PathBuf>, services: impl Into<Vec<Service>>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            replicas: 3,
            coordinators: 0,
            mtu: None,
            group: String::new(),
            environment: Vec::new(),
            disk: None,
            services: services.into(),
        }
    }
}

/// What runs on a host.
#[derive(Debug, Default)]
struct Running {
    node: Option<Process>,
    servers: BTreeMap<String, Process>,
}

/// The cluster. One at a time in a process: each wants all of a small machine. Dropped, it is killed; if the test is
/// failing, it shows the ends of the nodes' logs first.
#[derive(Debug)]
pub struct Cluster {
    running: BTreeMap<String, Running>,
    /// The replicas' disks, which outlive their processes.
    disks: BTreeMap<String, Disk>,
    options: Options,
    dir: PathBuf,
    lab: Lab,
    _stage: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Makes the hosts and starts every replica.
    ///
    /// # Errors
    /// Something does not start, with what it said.
    pub fn start(options: Options) -> Result<Self> {
        static STAGE: Mutex<()> = Mutex::new(());
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir =
            std::env::temp_dir().join(format!("unbroken-cluster-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let lab = Lab::new(LabOptions {
            replicas: options.replicas + options.coordinators,
        })?;
        if let Some(mtu) = options.mtu {
            lab.set_mtu(mtu)?;
        }
        let mut cluster = Self {
            running: BTreeMap::new(),
            disks: BTreeMap::new(),
            options,
            dir,
            lab,
            _stage: stage,
        };
        let key = cluster.dir.join("group.key");
        fs::write(&key, unbroken::cli::keygen::generate()?)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        for index in 1..=cluster.options.replicas + cluster.options.coordinators {
            let name = format!("r{index}");
            fs::create_dir_all(cluster.folder(&name))?;
            let text = cluster.configuration(&name, index > cluster.options.replicas);
            fs::write(cluster.folder(&name).join("node.toml"), text)?;
            cluster.running.insert(name, Running::default());
        }
        let coordinators = cluster.coordinators();
        for name in coordinators.iter().chain(&cluster.replicas()) {
            if let Some(bytes) = cluster.options.disk {
                let disk = Disk::new(&cluster.folder(name), bytes).context("a replica's disk")?;
                cluster.disks.insert(name.to_owned(), disk);
            }
            cluster.start_replica(name)?;
        }
        Ok(cluster)
    }

    /// The hosts, and what can be done to them.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Names of the replicas.
    pub fn replicas(&self) -> Vec<String> {
        let names = 1..=self.options.replicas;
        names.map(|index| format!("r{index}")).collect()
    }

    /// Names of the hosts of coordinators alone.
    pub fn coordinators(&self) -> Vec<String> {
        let first = self.options.replicas + 1;
        let names = first..first + self.options.coordinators;
        names.map(|index| format!("r{index}")).collect()
    }

    /// The folder of a replica: its `node.toml`, its data, its logs.
    pub fn folder(&self, replica: &str) -> PathBuf {
        self.dir.join(replica)
    }

    /// The data folder of a replica with a disk of its own, as this process reaches it.
    ///
    /// # Panics
    /// If there are no such disks.
    pub fn disk(&self, replica: &str) -> PathBuf {
        self.disks
            .get(replica)
            .expect("a replica with a disk")
            .path()
    }

    /// Starts a host's servers, waits until they listen, and starts its node. What ran there before must be dead.
    ///
    /// # Errors
    /// A server does not listen, or a program cannot be started.
    pub fn start_replica(&mut self, name: &str) -> Result<()> {
        let services = if self.coordinators().iter().any(|other| other == name) {
            Vec::new()
        } else {
            self.options.services.clone()
        };
        for service in &services {
            self.start_server(name, &service.name)?;
        }
        self.start_node(name)
    }

    /// Starts the node of a host (or the coordinator alone).
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_node(&mut self, name: &str) -> Result<()> {
        let mut command = match self.disks.get(name) {
            None => Command::new(&self.options.program),
            Some(disk) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--mount=/proc/{}/ns/mnt", disk.holder()));
                let mut folder = std::ffi::OsString::from("--wdns=");
                folder.push(self.folder(name));
                command.arg(folder).arg(&self.options.program);
                command
            }
        };
        command.envs(self.options.environment.iter().cloned());
        let role = if self.coordinators().iter().any(|other| other == name) {
            "coord"
        } else {
            "node"
        };
        command.args(&self.options.arguments);
        command.args(["--log", "info", role, "-c"]);
        command.arg(self.folder(name).join("node.toml"));
        command.current_dir(self.folder(name));
        let log = self.folder(name).join("node.log");
        let process = self.host(name).spawn("node", command, &log)?;
        self.running(name).node = Some(process);
        Ok(())
    }

    /// Starts the server of a service on a replica and waits until it listens. Nothing where the node starts it.
    ///
    /// # Errors
    /// It does not listen, with what it said.
    pub fn start_server(&mut self, replica: &str, service: &str) -> Result<()> {
        let service = self.service(service).clone();
        let [program, arguments @ ..] = &service.server[..] else {
            return Ok(());
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(self.folder(replica))
            .env("REPLICA", replica)
            .env("PORT", service.upstream.to_string());
        let log = self.folder(replica).join(format!("{}.log", service.name));
        let host = self.host(replica).clone();
        let mut process = host.spawn(&service.name, command, &log)?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, service.upstream));
        host.enter(|| {
            process.wait_ready(&format!("listening on {listen}"), PATIENCE, |_| {
                TcpStream::connect(listen).is_ok()
            })
        })?;
        self.running(replica).servers.insert(service.name, process);
        Ok(())
    }

    /// Kills a server by SIGKILL, waits until that is known, has `between` done, and starts it again.
    ///
    /// # Errors
    /// One of that does not come about.
    pub fn restart_server(
        &mut self,
        replica: &str,
        service: &str,
        between: impl FnOnce(&Self),
    ) -> Result<()> {
        self.server(replica, service).kill()?;
        wait_until("the death is known", PATIENCE, || {
            whole(&self.statuses(), &self.replicas()).is_err()
        })?;
        between(self);
        self.start_server(replica, service)
    }

    /// The node of a replica.
    ///
    /// # Panics
    /// If none was started.
    pub fn node(&mut self, replica: &str) -> &mut Process {
        let node = self.running(replica).node.as_mut();
        node.expect("the node was started")
    }

    /// The server of a service on a replica.
    ///
    /// # Panics
    /// If none was started.
    pub fn server(&mut self, replica: &str, service: &str) -> &mut Process {
        let server = self.running(replica).servers.get_mut(service);
        server.expect("the server was started")
    }

    /// Loses the machine: node and servers die by SIGKILL, and are forgotten.
    ///
    /// # Errors
    /// Something does not die.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.lab.kill_host(name)?;
        *self.running(name) = Running::default();
        Ok(())
    }

    /// Connects the client host to the virtual address.
    ///
    /// # Errors
    /// The client's kernel says why not.
    pub fn connect(&self, port: u16) -> std::io::Result<TcpStream> {
        self.lab
            .host("c")
            .enter(|| TcpStream::connect_timeout(&(VIP, port).into(), PATIENCE))
    }

    /// What a node says of itself; `None` if it does not answer.
    pub fn status(&self, replica: &str) -> Option<Status> {
        self.host(replica).enter(|| ask().ok())
    }

    /// What every replica says of itself, in order.
    pub fn statuses(&self) -> Vec<Option<Status>> {
        let names = self.replicas();
        names.iter().map(|name| self.status(name)).collect()
    }

    /// Waits until every replica is a full member of one view of every service and says that redundancy is whole. The
    /// leader of the first service, and its view.
    ///
    /// # Errors
    /// That does not come about, and why.
    pub fn wait_whole(&self) -> Result<(String, u64)> {
        let mut why = String::new();
        let waited = wait_until("the cluster is whole", PATIENCE, || {
            match whole(&self.statuses(), &self.replicas()) {
                Ok(()) => true,
                Err(reason) => {
                    why = reason;
                    false
                }
            }
        });
        waited.with_context(|| why)?;
        self.wait_leader(0)
    }

    /// Waits until a node says that it leads a view of the first service newer than `view`. Its name, and the view.
    ///
    /// # Errors
    /// Nobody says so in time.
    pub fn wait_leader(&self, view: u64) -> Result<(String, u64)> {
        let mut found = None;
        let what = format!("somebody leads a view after {view}");
        wait_until(&what, PATIENCE, || {
            found = self.leader().filter(|(_, newer)| *newer > view);
            found.is_some()
        })?;
        found.context(what)
    }

    /// Waits until another node than `not` says that it leads the first service. Its name, and the view.
    ///
    /// # Errors
    /// Nobody else says so in time.
    pub fn wait_other_leader(&self, not: &str) -> Result<(String, u64)> {
        let mut found = None;
        let what = format!("another than {not} leads");
        wait_until(&what, PATIENCE, || {
            found = self.leader().filter(|(name, _)| name != not);
            found.is_some()
        })?;
        found.context(what)
    }

    /// The node that says it leads the newest view of the first service, and the view.
    pub fn leader(&self) -> Option<(String, u64)> {
        let leads = self.statuses().into_iter().flatten().filter_map(|status| {
            let service = status.services.first()?;
            (service.role == Role::Leader).then(|| (status.node.clone(), service.view.id))
        });
        leads.max_by_key(|(_, view)| *view)
    }

    /// The ends of the nodes' logs.
    pub fn tails(&self) -> String {
        let mut text = String::new();
        for name in self.running.keys() {
            let log = fs::read(self.folder(name).join("node.log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let _ = writeln!(text, "--- {name}");
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }

    fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }

    fn running(&mut self, name: &str) -> &mut Running {
        let running = self.running.get_mut(name);
        running.expect("a host of this cluster")
    }

    fn service(&self, name: &str) -> &Service {
        let mut services = self.options.services.iter();
        let found = services.find(|service| service.name == name);
        found.expect("a service of this cluster")
    }

    fn configuration(&self, name: &str, alone: bool) -> String {
        let table = |names: &[String], port: u16| {
            let entry = |n: &String| format!("{n} = \"{}:{port}\"", self.host(n).address());
            names.iter().map(entry).collect::<Vec<_>>().join(", ")
        };
        let address = self.host(name).address();
        let mut text = format!(
            "[node]\nname = \"{name}\"\ndata_dir = \"data\"\nkey_file = \"../group.key\"\n\n\
             [admin]\nlisten = \"{ADMIN}\"\n\n[coord]\n"
        );
        let coordinators = self.coordinators();
        if coordinators.is_empty() || alone {
            let peers = if alone { coordinators } else { self.replicas() };
            let _ = write!(
                text,
                "client = \"{address}:2181\"\npeers = {{ {} }}\n",
                table(&peers, 2888)
            );
        } else {
            let servers = coordinators
                .iter()
                .map(|n| format!("{}:2181", self.host(n).address()));
            let servers: Vec<String> = servers.collect();
            let _ = writeln!(text, "external = \"zk://{}\"", servers.join(","));
        }
        if alone {
            return text;
        }
        let _ = write!(
            text,
            "\n[group]\nmembers = {{ {} }}\n{}\n",
            table(&self.replicas(), 7400),
            self.options.group
        );
        for service in &self.options.services {
            let Service {
                name,
                port,
                upstream,
                keys,
                ..
            } = service;
            let _ = write!(text, "\n[[service]]\nname = \"{name}\"\nports = [{port}]\n");
            for (key, usual) in [
                ("vip", format!("{VIP}/24")),
                ("interface", "eth0".to_owned()),
                ("upstream", format!("127.0.0.1:{upstream}")),
            ] {
                if !keys.lines().any(|line| line.trim_start().starts_with(key)) {
                    let _ = writeln!(text, "{key} = \"{usual}\"");
                }
            }
            let _ = writeln!(text, "{keys}");
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
        self.running.clear();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Whether every one of `replicas` is a full member of one view and says that redundancy is whole; if not, why not.
///
/// # Errors
/// The first thing that is missing, in a few words.
pub fn whole(statuses: &[Option<Status>], replicas: &[String]) -> Result<(), String> {
    let mut views: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, status) in replicas.iter().zip(statuses) {
        let status = status
            .as_ref()
            .ok_or_else(|| format!("{name} does not answer"))?;
        if status.services.is_empty() {
            return Err(format!("{name} has no services yet"));
        }
        for service in &status.services {
            let view = &service.view;
            if view.members.len() != replicas.len() || !view.joining.is_empty() {
                let members = view.members.len();
                return Err(format!("{name}: view {} has {members} members", view.id));
            }
            if !matches!(service.role, Role::Leader | Role::Backup) {
                return Err(format!("{name} is {:?}", service.role));
            }
            if service.redundancy != Redundancy::Protected {
                let why = service.redundancy_reason.as_deref();
                let why = why.unwrap_or("no reason given");
                return Err(format!("{name}: {:?}: {why}", service.redundancy));
            }
            if *views.entry(&service.name).or_insert(view.id) != view.id {
                return Err("the nodes are in different views".to_owned());
            }
        }
    }
    Ok(())
}

/// Asks the node of the calling thread's network namespace how it stands.
///
/// # Errors
/// It does not answer.
pub fn ask() -> Result<Status> {
    let mut stream = TcpStream::connect_timeout(&ADMIN, ANSWER_WAIT)?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    stream
        .write_all(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(1 << 20).read_to_end(&mut answer)?;
    let at = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .context("no HTTP head")?;
    if !answer.starts_with(b"HTTP/1.1 200") {
        bail!("no status");
    }
    Ok(serde_json::from_slice(&answer[at + 4..])?)
}
