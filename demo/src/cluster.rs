//! The replica hosts: their files, their servers, their nodes, and what the nodes say of themselves.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use unbroken::status::{Role, Status};
use unbroken_tests::netns::{Host, Process};

use crate::ensemble::Ensemble;
use crate::pace::now_us;
use crate::payload::fill;

/// The virtual address; in the network of the lab.
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);

/// Where each node's page is, on its own loopback.
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9600);

/// How often each node is asked for its status: the grain of "new view after".
const ASK_EVERY: Duration = Duration::from_millis(10);

/// How long a server may take to listen.
const SERVER_WAIT: Duration = Duration::from_secs(20);

/// Lines of each node's log that a failure shows.
const TAIL_LINES: usize = 15;

/// One service of the virtual address and the server behind it.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    /// Port of the virtual address.
    pub(crate) port: u16,
    /// Port of the server, on each replica's loopback.
    pub(crate) upstream: u16,
    pub(crate) server: Server,
}

/// A kind of server.
#[derive(Debug, Clone)]
pub(crate) enum Server {
    /// Static files: nginx where it is installed, else ours.
    Files,
    /// Our request/response server.
    Exchange,
    /// Our upload server.
    Upload,
    /// The user's: a shell command.
    Command(String),
}

/// A view as one node announced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sighting {
    /// When the demonstration read it.
    pub(crate) at_us: u64,
    /// The node that said so.
    pub(crate) by: String,
    pub(crate) view: u64,
    pub(crate) leader: Option<String>,
    pub(crate) role: Role,
}

/// What all nodes said so far.
#[derive(Debug, Default)]
struct Observed {
    latest: Vec<Option<Status>>,
    sightings: Vec<Sighting>,
}

#[derive(Debug)]
struct Replica {
    name: String,
    host: Host,
    dir: PathBuf,
    processes: Vec<Process>,
}

/// The cluster; taken down when dropped.
#[derive(Debug)]
pub(crate) struct Cluster {
    services: Vec<Service>,
    program: PathBuf,
    nginx: bool,
    replicas: Vec<Replica>,
    observed: Arc<Mutex<Observed>>,
    stop: Arc<AtomicBool>,
    watchers: Vec<JoinHandle<()>>,
    node_log: &'static str,
    ensemble: Option<Ensemble>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the file that is downloaded: `bytes` bytes of the stream `seed`.
pub(crate) fn write_file(path: &Path, seed: u64, bytes: u64) -> Result<()> {
    let context = || format!("writing {}", path.display());
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).with_context(context)?);
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < bytes {
        let take = usize::try_from((bytes - offset).min(1 << 20)).expect("at most 1 MiB");
        fill(seed, offset, &mut buffer[..take]);
        file.write_all(&buffer[..take]).with_context(context)?;
        offset += take as u64;
    }
    file.flush().with_context(context)
}

impl Cluster {
    /// Writes the configuration of each of `hosts` into `dir` and begins to watch; no replica runs
    /// yet. Without an ensemble, the nodes keep their agreement themselves.
    pub(crate) fn new(
        hosts: &[&Host],
        ensemble: Option<Ensemble>,
        dir: &Path,
        program: &Path,
        services: Vec<Service>,
        verbose: bool,
    ) -> Result<Self> {
        let key = dir.join("group.key");
        fs::write(&key, unbroken::cli::keygen::generate()?)?;
        restrict(&key)?;
        let mut replicas = Vec::new();
        for (index, host) in hosts.iter().enumerate() {
            let replica = Replica {
                name: host.name().to_owned(),
                host: (*host).clone(),
                dir: dir.join(host.name()),
                processes: Vec::new(),
            };
            fs::create_dir_all(&replica.dir)?;
            fs::write(
                replica.dir.join("node.toml"),
                configuration(
                    host,
                    hosts,
                    &key,
                    ensemble.as_ref().map(|ensemble| ensemble.external(index)),
                    &services,
                ),
            )?;
            replicas.push(replica);
        }
        let nginx = Command::new("nginx").arg("-v").output().is_ok();
        let observed = Observed {
            latest: vec![None; replicas.len()],
            sightings: Vec::new(),
        };
        let mut cluster = Self {
            services,
            program: program.to_owned(),
            nginx,
            replicas,
            observed: Arc::new(Mutex::new(observed)),
            stop: Arc::new(AtomicBool::new(false)),
            watchers: Vec::new(),
            node_log: if verbose { "debug" } else { "info" },
            ensemble,
        };
        for (index, replica) in cluster.replicas.iter().enumerate() {
            let host = replica.host.clone();
            let (observed, stop) = (Arc::clone(&cluster.observed), Arc::clone(&cluster.stop));
            let watcher = thread::Builder::new()
                .name(format!("watch {}", replica.name))
                .spawn(move || host.enter(|| watch(index, &observed, &stop)))?;
            cluster.watchers.push(watcher);
        }
        Ok(cluster)
    }

    /// The names of the replicas.
    pub(crate) fn names(&self) -> Vec<String> {
        self.replicas
            .iter()
            .map(|replica| replica.name.clone())
            .collect()
    }

    /// What serves the files.
    pub(crate) fn file_server(&self) -> &'static str {
        if self.nginx {
            "nginx"
        } else {
            "our file server"
        }
    }

    /// Starts a replica's servers, waits until they listen, and starts its node.
    pub(crate) fn start(&mut self, name: &str) -> Result<()> {
        let index = self.index(name);
        let mut processes = Vec::new();
        for service in &self.services {
            processes.push(self.start_server(&self.replicas[index], service)?);
        }
        let replica = &self.replicas[index];
        let mut command = Command::new(&self.program);
        command.args(["unbroken", "--log", self.node_log, "node", "-c"]);
        command.arg(replica.dir.join("node.toml"));
        processes.push(replica.host.spawn("node", command, &replica.log())?);
        // The old ones are dead; dropping them reaps them.
        self.replicas[index].processes = processes;
        Ok(())
    }

    fn start_server(&self, replica: &Replica, service: &Service) -> Result<Process> {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, service.upstream));
        let mut command = Command::new(&self.program);
        let files = replica
            .dir
            .parent()
            .expect("it lies in the scratch folder")
            .join("files");
        match &service.server {
            Server::Files if self.nginx => {
                let file = replica.dir.join("nginx.conf");
                fs::write(&file, nginx_configuration(listen, &files, &replica.dir))?;
                command = Command::new("nginx");
                command.arg("-p").arg(&replica.dir).arg("-c").arg(&file);
                command.arg("-e").arg(replica.dir.join("nginx-error.log"));
            }
            Server::Files => {
                command.args(["serve", "files", "--listen", &listen.to_string(), "--root"]);
                command.arg(files);
            }
            Server::Exchange => {
                command.args(["serve", "exchange", "--listen", &listen.to_string()]);
            }
            Server::Upload => {
                command.args(["serve", "upload", "--listen", &listen.to_string()]);
            }
            Server::Command(line) => {
                command = Command::new("sh");
                command.args(["-c", line]).current_dir(&replica.dir);
                command.env("PORT", service.upstream.to_string());
            }
        }
        let log = replica.dir.join(format!("{}.log", service.name));
        let label = format!("the server of {}", service.name);
        let mut process = replica.host.spawn(&label, command, &log)?;
        replica.host.enter(|| {
            process.wait_ready(&format!("listening on {listen}"), SERVER_WAIT, |_| {
                TcpStream::connect(listen).is_ok()
            })
        })?;
        Ok(process)
    }

    /// A process of a replica that should run and does not, with the end of its log.
    pub(crate) fn fallen(&mut self) -> Option<String> {
        for replica in &mut self.replicas {
            for process in &mut replica.processes {
                if !process.is_running() {
                    return Some(format!("{} has ended by itself", process.label()));
                }
            }
        }
        self.ensemble.as_mut().and_then(Ensemble::fallen)
    }

    /// Forgets the processes of a replica that was killed on purpose. Not before: forgetting kills,
    /// and in another order than a dying machine does.
    pub(crate) fn forget(&mut self, name: &str) {
        let index = self.index(name);
        self.replicas[index].processes.clear();
        lock(&self.observed).latest[index] = None;
    }

    /// The leader that it itself and a majority of the nodes name, and the view.
    pub(crate) fn leader(&self) -> Option<(String, u64)> {
        let observed = lock(&self.observed);
        let leads = observed.latest.iter().flatten().filter_map(|status| {
            let service = status.services.first()?;
            (service.role == Role::Leader).then(|| (status.node.clone(), service.view.id))
        });
        let (name, view) = leads.max_by_key(|(_, view)| *view)?;
        let followers = observed.latest.iter().flatten().filter(|status| {
            let service = status.services.first();
            service.is_some_and(|s| s.view.id == view && s.leader.as_deref() == Some(&name))
        });
        (followers.count() > self.replicas.len() / 2).then_some((name, view))
    }

    /// Whether every replica is a full member of one view and says that redundancy is whole; if not,
    /// why not, in a few words.
    pub(crate) fn whole(&self) -> Result<(), String> {
        unbroken_tests::cluster::whole(&lock(&self.observed).latest, &self.names())
    }

    /// The first sighting after `after_us` of a view newer than `view`, by its leader, who is not
    /// `not`.
    pub(crate) fn new_leader(&self, after_us: u64, view: u64, not: &str) -> Option<Sighting> {
        let observed = lock(&self.observed);
        let mut found = observed.sightings.iter().filter(|sighting| {
            sighting.at_us >= after_us
                && sighting.view > view
                && sighting.role == Role::Leader
                && sighting.by != not
        });
        found.next().cloned()
    }

    /// The ends of the nodes' logs.
    pub(crate) fn tails(&self) -> String {
        let mut text = String::new();
        for replica in &self.replicas {
            let log = replica.log();
            let all = fs::read(&log).unwrap_or_default();
            let all = String::from_utf8_lossy(&all);
            let lines: Vec<&str> = all.lines().collect();
            text += &format!("--- {} ({})\n", replica.name, log.display());
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text += line;
                text.push('\n');
            }
        }
        text
    }

    fn index(&self, name: &str) -> usize {
        let found = self
            .replicas
            .iter()
            .position(|replica| replica.name == name);
        found.expect("the nodes name replicas of this cluster only")
    }
}

impl Replica {
    fn log(&self) -> PathBuf {
        self.dir.join("node.log")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for watcher in self.watchers.drain(..) {
            let _ = watcher.join();
        }
    }
}

/// Asks the node of this host again and again, and notes what it says.
fn watch(index: usize, observed: &Mutex<Observed>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let status = unbroken_tests::cluster::ask().ok();
        let at_us = now_us();
        {
            let mut observed = lock(observed);
            if let Some(status) = &status
                && let Some(service) = status.services.first()
            {
                let sighting = Sighting {
                    at_us,
                    by: status.node.clone(),
                    view: service.view.id,
                    leader: service.leader.clone(),
                    role: service.role,
                };
                let last = observed
                    .sightings
                    .iter()
                    .rev()
                    .find(|s| s.by == sighting.by);
                let same = last.is_some_and(|last| {
                    (last.view, &last.leader, last.role)
                        == (sighting.view, &sighting.leader, sighting.role)
                });
                if !same {
                    observed.sightings.push(sighting);
                }
            }
            observed.latest[index] = status;
        }
        thread::sleep(ASK_EVERY);
    }
}

/// The key is its owner's alone.
fn restrict(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// A node's configuration file.
fn configuration(
    host: &Host,
    hosts: &[&Host],
    key: &Path,
    external: Option<String>,
    services: &[Service],
) -> String {
    let table = |port: u16| {
        let entries: Vec<String> = hosts
            .iter()
            .map(|h| format!("{} = \"{}:{port}\"", h.name(), h.address()))
            .collect();
        entries.join(", ")
    };
    let (name, address) = (host.name(), host.address());
    let coord = match external {
        None => format!("client = \"{address}:2181\"\npeers = {{ {} }}", table(2888)),
        Some(external) => format!("external = \"{external}\""),
    };
    let mut text = format!(
        "[node]\nname = \"{name}\"\ndata_dir = \"data\"\nkey_file = \"{}\"\n\n\
         [coord]\n{coord}\n\n\
         [group]\nmembers = {{ {} }}\n\n\
         [admin]\nlisten = \"{ADMIN}\"\n",
        key.display(),
        table(7400),
    );
    for service in services {
        text += &format!(
            "\n[[service]]\nname = \"{}\"\nvip = \"{VIP}/24\"\nports = [{}]\ninterface = \"eth0\"\n\
             upstream = \"127.0.0.1:{}\"\nhistory = {{ memory = \"1GiB\" }}\n",
            service.name, service.port, service.upstream,
        );
        if let Server::Files = service.server {
            // nginx tells the time.
            text += "harmless = [\"^Date: .*\"]\n";
        }
    }
    text
}

/// nginx in the foreground as one process. Two copies answer the same request alike if its head is
/// made in the same second: `Date` is the only field of it that is not the file's. The heads of the
/// demonstration are delivered long before the first fault.
fn nginx_configuration(listen: SocketAddr, files: &Path, dir: &Path) -> String {
    let (files, dir) = (files.display(), dir.display());
    // The root of a user namespace is no other user, and may not become one.
    format!(
        "daemon off;\nmaster_process off;\nuser root;\nworker_processes 1;\n\
         pid {dir}/nginx.pid;\nerror_log {dir}/nginx-error.log;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n  access_log off;\n  sendfile on;\n  tcp_nodelay on;\n  server_tokens off;\n\
         \x20 default_type application/octet-stream;\n  send_timeout 1h;\n  keepalive_timeout 1h;\n\
         \x20 client_body_temp_path {dir}/nginx-tmp;\n  proxy_temp_path {dir}/nginx-tmp;\n\
         \x20 fastcgi_temp_path {dir}/nginx-tmp;\n  uwsgi_temp_path {dir}/nginx-tmp;\n\
         \x20 scgi_temp_path {dir}/nginx-tmp;\n\
         \x20 server {{ listen {listen}; root {files}; }}\n}}\n"
    )
}
