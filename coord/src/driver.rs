//! A server with its sockets, disk and clock around the [`Core`].
//!
//! One thread runs the core and serves its clients and the links to the other servers; one writes the
//! log, one snapshots. Tasks of the tokio runtime that [`start`] was called in accept, dial and make
//! handshakes. No answer to a heartbeat ever waits for the disk.

mod accept;
mod clients;
pub(crate) mod disk;
mod engine;
mod environment;
mod links;
mod peers;
mod recovery;
mod roster;
pub(crate) mod storage;
mod stream;
pub(crate) mod wal;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use self::accept::{Entrance, Slots};
use self::clients::Clients;
use self::disk::{Claimed, Identity, KnownPeers};
use self::engine::{Alive, Clock, Engine, Input, InputSender, Inputs, while_alive};
use self::environment::Environment;
use self::links::Links;
use self::peers::{Beginning, Peers};
use self::roster::Roster;
use crate::core::{Config, ConfigError, Core};
use crate::members;
use crate::metrics::Metrics;
use crate::snapshot::SnapshotError;
use crate::tls::{ServerTls, TlsError};

pub use self::disk::DiskError;
pub use self::recovery::{RecoverError, Survivor, operator_credentials, recover};
pub use crate::core::Status;
pub use crate::quorum::Role;

/// The default of [`ServerConfig::connections_max`].
const CONNECTIONS_MAX: usize = 20_000;

/// What a server needs to know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Its name, one of `peers`.
    pub name: String,
    /// Where clients connect.
    pub client_listen: SocketAddr,
    /// Where clients connect by TLS alone, if [`Self::tls`] says how.
    pub secure_listen: Option<SocketAddr>,
    /// Certificates. With them, `client_listen` takes TLS, too. None.
    pub tls: Option<ServerTls>,
    /// Servers of the cluster, this one too: name and `host:port` where it listens for the others. A
    /// new cluster consists of these, so they must be the same on each of its servers. Later the log
    /// says who takes part, and these are where a server looks for the others when it knows no
    /// better. A host name is looked up whenever it is dialled.
    pub peers: BTreeMap<String, String>,
    /// With an empty data directory: wait until the cluster takes this server in, and never begin a
    /// new one. (A server that finds a cluster running does not begin one either.)
    pub join: bool,
    /// Where it keeps its log. Nobody else may use it.
    pub data_dir: PathBuf,
    /// The cluster's key: who has it is a server.
    pub key: [u8; 32],
    /// Resolution of the timers. 5 ms.
    pub tick: Duration,
    /// Time between a leader's heartbeats. 10 ms.
    pub heartbeat: Duration,
    /// Shortest silence after which a server campaigns. 50 ms.
    pub election_min: Duration,
    /// Bound of the longest. 150 ms.
    pub election_max: Duration,
    /// Shortest session timeout granted. 30 ms.
    pub session_min: Duration,
    /// Longest session timeout granted. 60 s.
    pub session_max: Duration,
    /// Sessions of the whole cluster beyond which this server opens no more. 500,000.
    pub sessions_max: usize,
    /// Connections of clients to this server beyond which it closes every further one. 20,000.
    pub connections_max: usize,
    /// Log entries between two snapshots. 20,000.
    pub snapshot_every: u64,
    /// Whether znodes with a time to live may be created. No.
    pub extended_types: bool,
    /// Who may do everything: `super:` and a digest, as in an access list. Nobody.
    pub super_digest: Option<String>,
    /// Whether clients may change who the servers are, if they have the right to write
    /// `/zookeeper/config`. Yes.
    pub reconfig: bool,
    /// Whether this server, when it knows no leader, serves clients that asked for it read-only. Yes.
    pub read_only: bool,
}

impl ServerConfig {
    /// A configuration with the defaults, which stand at the fields.
    #[must_use]
    pub fn new(
        name: &str,
        client_listen: SocketAddr,
        peers: BTreeMap<String, impl ToString>,
        data_dir: PathBuf,
        key: [u8; 32],
    ) -> Self {
        let defaults = Config::new(0, BTreeMap::new());
        Self {
            name: name.to_owned(),
            client_listen,
            secure_listen: None,
            tls: None,
            peers: peers
                .into_iter()
                .map(|(name, address)| (name, address.to_string()))
                .collect(),
            join: false,
            data_dir,
            key,
            tick: defaults.tick,
            heartbeat: defaults.heartbeat,
            election_min: defaults.election_min,
            election_max: defaults.election_max,
            session_min: defaults.session_min,
            session_max: defaults.session_max,
            sessions_max: defaults.sessions_max,
            connections_max: CONNECTIONS_MAX,
            snapshot_every: defaults.snapshot_every,
            extended_types: defaults.extended_types,
            super_digest: defaults.super_digest,
            reconfig: defaults.reconfig,
            read_only: defaults.read_only,
        }
    }
}

/// Why a server cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The server's name is not among its peers.
    #[error("server {0:?} is not one of its own peers")]
    NotAPeer(String),
    /// Where a server is said to be is no address.
    #[error("peer {name:?}: {address:?} is not host:port")]
    Address {
        /// Whose address.
        name: String,
        /// What stands there.
        address: String,
    },
    /// The timers contradict each other.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The certificates cannot be used.
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
    /// There is an address for TLS, and no certificate.
    #[error("an address for clients by TLS needs certificates")]
    NoCertificates,
    /// An address cannot be listened on.
    #[error("cannot listen for {whom} on {address}")]
    Listen {
        /// For whom.
        whom: &'static str,
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The data directory cannot be used.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// The snapshot in the data directory cannot be read.
    #[error("the snapshot in the data directory: {0}")]
    Snapshot(#[from] SnapshotError),
    /// A thread cannot be started, or the system has no randomness.
    #[error("{0}")]
    System(io::Error),
}

/// Why a server has stopped by itself.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// What it acknowledges would not be durable: it must not go on.
    #[error("the disk failed: {0}")]
    Disk(io::Error),
    /// Its data directory is empty, and a peer knows it as a server that had something there. It has
    /// forgotten what it voted and acknowledged, and could undo what the cluster has promised. Give
    /// it back its data directory.
    #[error("the data directory is empty, but server {peer:?} knows that this server had one")]
    Forgotten {
        /// Who knows.
        peer: String,
    },
    /// It was removed from the cluster, and takes part no longer. To bring it back, empty its data
    /// directory and add it again: it returns as a new server.
    #[error(
        "this server was removed from the cluster; to bring it back, empty its data directory and \
         add it again"
    )]
    Removed,
    /// A server with an empty disk has waited for its peers, and then could not start.
    #[error("{0}")]
    Start(StartError),
    /// A defect: its core has stopped.
    #[error("the coordinator's core has stopped unexpectedly")]
    Stopped,
}

/// A running server. Dropping it stops it as a crash would; [`Server::shutdown`] says goodbye.
#[derive(Debug)]
pub struct Server {
    engine: InputSender,
    roster: Arc<Roster>,
    status: watch::Receiver<Status>,
    metrics: Arc<Mutex<Metrics>>,
    failed: watch::Receiver<Option<Arc<ServerError>>>,
    client_address: SocketAddr,
    secure_address: Option<SocketAddr>,
    /// A server with an empty disk first asks the others.
    beginning: Option<tokio::task::JoinHandle<()>>,
}

/// Starts a server in the current tokio runtime.
///
/// A server with an empty data directory takes part only when it has asked the others whether they
/// know it as one that had something there. The first time it begins when all have answered, or,
/// after a second, as many as make a majority with it; one that they know has lost its disk, and
/// [`Server::failed`] says so.
///
/// # Errors
/// [`StartError`]. Nothing is left running then.
pub async fn start(config: ServerConfig) -> Result<Server, StartError> {
    let Some(peer_listen) = config.peers.get(&config.name) else {
        return Err(StartError::NotAPeer(config.name));
    };
    core_config(&config, 1, &BTreeMap::from([(1, config.name.clone())])).validate()?;
    let certificates = config.tls.as_ref().map(ServerTls::load_for_clients);
    let certificates = certificates.transpose()?;
    let between_peers = config.tls.as_ref().filter(|tls| tls.peers);
    let between_peers = between_peers.map(ServerTls::load_for_peers).transpose()?;
    if config.secure_listen.is_some() && certificates.is_none() {
        return Err(StartError::NoCertificates);
    }
    let client_listener = listen("clients", &config.client_listen.to_string()).await?;
    let secure_listener = match config.secure_listen {
        Some(address) => Some(listen("clients by TLS", &address.to_string()).await?),
        None => None,
    };
    let peer_listener = listen("peers", peer_listen).await?;
    let client_address = client_listener.local_addr().map_err(StartError::System)?;
    let secure_address = secure_listener.as_ref().map(TcpListener::local_addr);
    let secure_address = secure_address.transpose().map_err(StartError::System)?;
    let peer_address = peer_listener.local_addr().map_err(StartError::System)?;
    let mut seeds = config.peers.clone();
    if peer_listen.ends_with(":0") {
        seeds.insert(config.name.clone(), peer_address.to_string());
    }
    for (name, address) in &seeds {
        if !members::is_address(address) {
            let (name, address) = (name.clone(), address.clone());
            return Err(StartError::Address { name, address });
        }
    }
    let addresses = (seeds[&config.name].clone(), client_address.to_string());

    let claimed = disk::claim(&config.data_dir, &config.name)?;
    let known = KnownPeers::open(&config.data_dir)?;
    let (engine, inputs) = engine::inputs().map_err(StartError::System)?;
    let roster = Arc::new(Roster::new(&config.name, seeds));
    let tls = between_peers;
    let peers = Peers::new(roster.clone(), &config.key, tls, known, engine.clone());
    let (alive_sender, alive) = watch::channel(());
    let entrance = |plain| match &certificates {
        None => Entrance::Plain,
        Some(certificates) => Entrance::Tls {
            certificates: certificates.clone(),
            plain,
        },
    };
    let slots = Slots::new(config.connections_max);
    let plain = config.tls.as_ref().is_none_or(|tls| tls.plain);
    let doors = [
        (Some(client_listener), entrance(plain)),
        (secure_listener, entrance(false)),
    ];
    for (listener, entrance) in doors {
        if let Some(listener) = listener {
            let (slots, engine) = (slots.clone(), engine.clone());
            let accept = accept::accept(listener, entrance, slots, engine, alive.clone());
            tokio::spawn(while_alive(alive.clone(), accept));
        }
    }
    let accept = peers.clone().accept(peer_listener, alive.clone());
    tokio::spawn(while_alive(alive.clone(), accept));
    let metrics = Arc::new(Mutex::new(Metrics::default()));
    let (status_sender, status) = watch::channel(Status::starting(&config.name));
    let (failed_sender, failed) = watch::channel(None);
    let join = config.join;
    let launch = Launch {
        environment: Environment {
            client_port: client_address.port(),
            secure_client_port: secure_address.map(|address| address.port()),
            data_dir: config.data_dir.clone(),
        },
        config,
        addresses,
        seed: random()?,
        log_id: random()?,
        inputs,
        engine: engine.clone(),
        peers: peers.clone(),
        roster: roster.clone(),
        alive: (alive_sender, alive),
        status: status_sender,
        metrics: metrics.clone(),
        failed: failed_sender,
    };
    let beginning = if claimed.identity().is_none() {
        let begin = async move {
            match peers.beginning(join).await {
                Ok(beginning) => {
                    let failed = launch.failed.clone();
                    let launched =
                        tokio::task::spawn_blocking(move || launch.go(claimed, Some(beginning)));
                    if let Ok(Err(error)) = launched.await {
                        fail(&failed, ServerError::Start(error));
                    }
                }
                Err(peer) => fail(&launch.failed, ServerError::Forgotten { peer }),
            }
        };
        Some(tokio::spawn(begin))
    } else {
        launch.go(claimed, None)?;
        None
    };
    Ok(Server {
        engine,
        roster,
        status,
        metrics,
        failed,
        client_address,
        secure_address,
        beginning,
    })
}

fn core_config(config: &ServerConfig, id: u64, founders: &BTreeMap<u64, String>) -> Config {
    Config {
        name: config.name.clone(),
        reconfig: config.reconfig,
        tick: config.tick,
        heartbeat: config.heartbeat,
        election_min: config.election_min,
        election_max: config.election_max,
        session_min: config.session_min,
        session_max: config.session_max,
        sessions_max: config.sessions_max,
        snapshot_every: config.snapshot_every,
        extended_types: config.extended_types,
        super_digest: config.super_digest.clone(),
        operator_digest: Some(recovery::operator_digest(&config.key)),
        read_only: config.read_only,
        ..Config::new(id, founders.clone())
    }
}

fn fail(failed: &watch::Sender<Option<Arc<ServerError>>>, error: ServerError) {
    tracing::error!(%error, "coordinator stopped");
    failed.send_replace(Some(Arc::new(error)));
}

/// Everything that the engine needs, but for the disk.
struct Launch {
    config: ServerConfig,
    /// For peers and for clients.
    addresses: (String, String),
    seed: u64,
    environment: Environment,
    log_id: u64,
    inputs: Inputs,
    engine: InputSender,
    peers: Peers,
    roster: Arc<Roster>,
    alive: (watch::Sender<()>, Alive),
    status: watch::Sender<Status>,
    metrics: Arc<Mutex<Metrics>>,
    failed: watch::Sender<Option<Arc<ServerError>>>,
}

impl Launch {
    /// Reads the disk and starts the threads. A server with an empty one must know what it begins as.
    fn go(self, claimed: Claimed, beginning: Option<Beginning>) -> Result<(), StartError> {
        let identity = match (claimed.identity(), beginning) {
            (Some(identity), _) => identity.clone(),
            (None, beginning) => {
                let Beginning { id, founders } = beginning.expect("an empty disk says nothing");
                Identity {
                    log_id: self.log_id,
                    name: self.config.name.clone(),
                    id,
                    founders,
                }
            }
        };
        let (id, founders) = (identity.id, identity.founders.clone());
        let opened = claimed.open(identity)?;
        let clock = Clock::start();
        let recovered = opened.recovered.clone();
        let config = Config {
            addresses: Some(self.addresses),
            ..core_config(&self.config, id, &founders)
        };
        let core = Core::new(config, recovered, self.seed, clock.now())?;
        self.roster.begin(id, &founders);
        self.roster.update(&core.state().members);
        let disk = opened.start(&self.engine).map_err(StartError::System)?;
        let (alive_sender, alive) = self.alive;
        let (peers, runtime) = (self.peers, tokio::runtime::Handle::current());
        let link = move |peer| {
            let (stop, stopped) = oneshot::channel();
            let dial = peers.clone().dial(peer, stopped);
            runtime.spawn(while_alive(alive.clone(), dial));
            stop
        };
        let registry = || self.inputs.registry().map_err(StartError::System);
        let (clients, links) = (Clients::new(registry()?), Links::new(registry()?));
        let engine = Engine {
            core,
            clock,
            inputs: self.inputs,
            disk,
            surroundings: self.environment,
            clients,
            peers: BTreeMap::new(),
            links,
            link: Box::new(link),
            roster: self.roster,
            removed: false,
            _alive: alive_sender,
            status: self.status,
            metrics: self.metrics,
        };
        let failed = self.failed;
        let run = move || {
            if let Err(error) = engine.run() {
                fail(&failed, error);
            }
        };
        // The tasks end with the engine, so with an error here, too.
        let thread = std::thread::Builder::new().name("coord".into()).spawn(run);
        thread.map(drop).map_err(StartError::System)
    }
}

impl Server {
    /// Its state, at most some 20 ms old.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// What it has counted and timed, at most some 200 ms old.
    ///
    /// # Panics
    /// If the engine's thread has panicked while it wrote them down.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.meter().metrics()
    }

    /// A handle to its state and metrics, which may outlive it.
    #[must_use]
    pub fn meter(&self) -> Meter {
        Meter {
            status: self.status.clone(),
            metrics: self.metrics.clone(),
        }
    }

    /// Its state whenever it changes.
    #[must_use]
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Where clients connect: the port that was found, if port 0 was asked for.
    #[must_use]
    pub fn client_address(&self) -> SocketAddr {
        self.client_address
    }

    /// Where clients connect by TLS alone, if [`ServerConfig::secure_listen`] was given.
    #[must_use]
    pub fn secure_address(&self) -> Option<SocketAddr> {
        self.secure_address
    }

    /// Hands leadership to the named server, or to the one that is furthest along. Does nothing if
    /// this server does not lead, or the name is unknown. [`Server::watch_status`] shows when it
    /// has happened.
    pub fn transfer_leadership(&self, to: Option<&str>) {
        let id = to.map(|name| self.roster.id_of(name));
        if id != Some(None) {
            self.engine.try_send(Input::Transfer(id.flatten()));
        }
    }

    /// Tells that the process of a peer is dead beyond doubt: if it led, this server and the other
    /// elect a new leader at once.
    pub fn peer_died(&self, name: &str) {
        if let Some(id) = self.roster.id_of(name) {
            self.engine.try_send(Input::PeerDied(id));
        }
    }

    /// Waits until the server has stopped by itself, and tells why. Never returns while it works.
    pub async fn failed(&self) -> Arc<ServerError> {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().expect("waited for"),
            Err(_) => Arc::new(ServerError::Stopped),
        }
    }

    /// Hands leadership over if it has it, stops, and waits until nothing of it is left.
    pub async fn shutdown(mut self) {
        if self.status().role == Role::Leader {
            self.transfer_leadership(None);
            let mut status = self.watch_status();
            let handed_over = status.wait_for(|status| status.role != Role::Leader);
            let _ = tokio::time::timeout(Duration::from_millis(500), handed_over).await;
        }
        if let Some(beginning) = &self.beginning {
            beginning.abort();
        }
        self.engine.send(Input::Stop).await;
        // The status ends with the thread, after the disk has been closed.
        while self.status.changed().await.is_ok() {}
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &self.beginning {
            // Nobody reads the inputs yet, so there may be no room.
            Some(beginning) if !beginning.is_finished() => {
                beginning.abort();
                self.engine.try_send(Input::Stop);
            }
            _ => self.engine.send_blocking(Input::Stop),
        }
    }
}

async fn listen(whom: &'static str, address: &str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen {
            whom,
            address: address.to_owned(),
            source,
        })
}

fn random() -> Result<u64, StartError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| StartError::System(io::Error::other(error)))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Tells of a server's state and metrics. After its end, how they were last.
#[derive(Debug, Clone)]
pub struct Meter {
    status: watch::Receiver<Status>,
    metrics: Arc<Mutex<Metrics>>,
}

impl Meter {
    /// As [`Server::status`].
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// As [`Server::metrics`].
    ///
    /// # Panics
    /// If the engine's thread has panicked while it wrote them down.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let metrics = self.metrics.lock();
        metrics
            .expect("no thread panics while it holds this")
            .clone()
    }
}
