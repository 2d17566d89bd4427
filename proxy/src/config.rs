//! The configuration file: what stands in it, typed and checked.
//!
//! A file is read as a whole and **every** problem is reported, each with file, line, the line's
//! text with a caret, key, value and what was expected. Nothing is guessed: a key that is not known
//! is a problem too, since a misspelt `resilience` must not silently mean the default.
//!
//! Relative paths in the file are relative to the file's folder.

mod document;
mod read;
mod section;
mod service;
mod transport;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unbroken_coord::driver::ServerConfig;
use unbroken_coord::tls::ServerTls;

#[cfg(test)]
mod tests;

pub use document::{Complaint, ConfigErrors, Problem};

/// A whole node: coordinator (or the address of one), group member and proxy.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file this was read from.
    pub file: PathBuf,
    /// `[node]`
    pub node: NodeConfig,
    /// `[coord]`
    pub coord: CoordConfig,
    /// `[group]`
    pub group: GroupConfig,
    /// `[admin]`
    pub admin: AdminConfig,
    /// `[[service]]`, in file order; never empty. Names are distinct, and so are the ports of one VIP.
    pub services: Vec<ServiceConfig>,
    /// Things that are allowed but worth a word to the operator, one sentence each.
    pub warnings: Vec<String>,
}

/// A coordinator server alone (`unbroken coord`): the part of the file it needs.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// The file this was read from.
    pub file: PathBuf,
    /// `[node]`
    pub node: NodeConfig,
    /// `[coord]`, which must not be `external`.
    pub coord: EmbeddedCoord,
    /// `[admin]`
    pub admin: AdminConfig,
    /// Things that are allowed but worth a word to the operator, one sentence each.
    pub warnings: Vec<String>,
}

/// `[node]`: who this is.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// This node's name; a key of `group.members` and, with an embedded coordinator, of `coord.peers`.
    pub name: String,
    /// Folder for the coordinator's log and snapshots; made at start if it is missing.
    pub data_dir: PathBuf,
    /// Folder for input that memory does not hold; a folder in it for each VIP. Default: `history` in `data_dir`.
    pub history_dir: PathBuf,
    /// The group's shared secret, from `key_file`.
    pub key: Key,
}

/// The group's shared secret; the same on every node.
///
/// It is the SHA-256 of the key file's text without surrounding white space, so that any file with
/// at least 32 bytes of secret will do and a newline more or less changes nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// A key from what a key file holds, or `None` where that is shorter than 32 bytes.
    #[must_use]
    pub fn from_file_contents(contents: &[u8]) -> Option<Self> {
        let secret = contents.trim_ascii();
        if secret.len() < 32 {
            return None;
        }
        let digest = ring::digest::digest(&ring::digest::SHA256, secret);
        Some(Self(
            digest.as_ref().try_into().expect("SHA-256 has 32 bytes"),
        ))
    }

    /// The key's bytes, for deriving further keys.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Eight hexadecimal digits by which two nodes' keys can be compared in public: they are of a
    /// hash of the key, and say nothing about it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, &self.0);
        digest.as_ref()[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.fingerprint())
    }
}

/// `[coord]`: where the coordinator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CoordConfig {
    /// A server of the ensemble runs inside this node.
    Embedded(EmbeddedCoord),
    /// An ensemble that somebody else runs, ZooKeeper or `unbroken coord`.
    External(ExternalCoord),
}

/// The coordinator server inside this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedCoord {
    /// Where clients of the ZooKeeper protocol connect, this node's own client among them.
    pub client: SocketAddr,
    /// Where clients connect by TLS alone; needs `tls`.
    pub secure_client: Option<SocketAddr>,
    /// Certificates, from `[coord.tls]`. With them `client` takes TLS, too, and without TLS as long
    /// as `plain` is not switched off.
    pub tls: Option<ServerTls>,
    /// Every server of the ensemble and where its peers reach it; holds this node's name.
    pub peers: BTreeMap<String, SocketAddr>,
    /// Digest of the credentials that may do everything: `super:` and the Base64 of their SHA-1, as
    /// ZooKeeper's `superDigest`. The same on every server.
    pub super_digest: Option<String>,
    /// Whether znodes with a time to live may be created, as ZooKeeper's `extendedTypesEnabled`.
    pub extended_types: bool,
    /// Whether clients may change who the servers are, as ZooKeeper's `reconfigEnabled`. They must
    /// have the right to write `/zookeeper/config`, which nobody but the super user has at first.
    pub reconfig: bool,
    /// Whether this server, as long as its data directory is empty, waits to be taken in by the
    /// others and never begins an ensemble of its own.
    pub join: bool,
    /// Whether a server without a quorum serves clients that asked for it read-only.
    pub read_only: bool,
    /// Sessions of the ensemble beyond which this server opens no more. Default 500,000.
    pub sessions_max: usize,
    /// Connections of clients to this server beyond which it closes every further one. Default 20,000.
    pub connections_max: usize,
    /// Shortest session timeout granted. Default 30 ms.
    pub session_min: Duration,
    /// Longest session timeout granted. Default 60 s.
    pub session_max: Duration,
}

impl EmbeddedCoord {
    /// The server `name` of the ensemble, which keeps its data in `data_dir`.
    pub fn server(&self, name: &str, data_dir: PathBuf, key: &Key) -> ServerConfig {
        let peers = self.peers.clone();
        ServerConfig {
            secure_listen: self.secure_client,
            tls: self.tls.clone(),
            super_digest: self.super_digest.clone(),
            extended_types: self.extended_types,
            reconfig: self.reconfig,
            join: self.join,
            read_only: self.read_only,
            sessions_max: self.sessions_max,
            connections_max: self.connections_max,
            session_min: self.session_min,
            session_max: self.session_max,
            ..ServerConfig::new(name, self.client, peers, data_dir, *key.bytes())
        }
    }
}

/// An ensemble that runs elsewhere: `zk://host:2181,host:2181/chroot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalCoord {
    /// `host:port` each, in the order given; never empty. Hosts may be names.
    pub servers: Vec<String>,
    /// Put before every path: empty, or starts with `/` and does not end in one.
    pub chroot: String,
}

/// `[group]`: the replicas and their timing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    /// Every replica and the address of its datagrams; holds this node's name.
    pub members: BTreeMap<String, SocketAddr>,
    /// How many backups must hold an event before its effects leave.
    pub resilience: Resilience,
    /// How often a silent member says that it lives. Shorter than `lease`.
    pub heartbeat: Duration,
    /// How long an answered heartbeat entitles the leader to emit. Shorter than `suspect_after`.
    pub lease: Duration,
    /// Silence after which a member is suspected.
    pub suspect_after: Duration,
    /// `group.multicast` and `group.pacing`; ordinary without them.
    pub transport: unbroken_group::driver::Options,
}

/// `group.resilience`: the number `k` of backups that make an event stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resilience {
    /// The leader and `k` backups are a majority: `floor(n / 2)`.
    Majority,
    /// Every full member.
    All,
    /// So many, at least 1.
    Backups(u32),
}

impl Resilience {
    /// The effective `k` of a view with `full` full members, the leader among them: never more than
    /// there are backups.
    #[must_use]
    pub fn k(self, full: usize) -> usize {
        let backups = full.saturating_sub(1);
        match self {
            Self::Majority => full / 2,
            Self::All => backups,
            Self::Backups(count) => usize::try_from(count).unwrap_or(usize::MAX),
        }
        .min(backups)
    }
}

/// `[admin]`: the page for operators and scripts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// Where `/`, `/status.json`, `/metrics` and `/healthz` are served. Default 127.0.0.1:9600.
    pub listen: SocketAddr,
}

/// One `[[service]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceConfig {
    /// Names the service in status, metrics and logs.
    pub name: String,
    /// The floating address. Services with the same one share group, leader and lease.
    pub vip: IpAddr,
    /// Length of the VIP's network prefix; 32 or 128 where none was given.
    pub prefix: u8,
    /// Ports of the VIP, at least one, distinct among all services of the VIP.
    pub ports: Vec<u16>,
    /// Network interface the VIP lives on.
    pub interface: String,
    /// Where the local copy of the server listens.
    pub upstream: Upstream,
    /// How the VIP moves between nodes.
    pub address: AddressMode,
    /// Run when this node begins to lead, and when it no longer does; empty for none.
    pub hooks: HooksConfig,
    /// Who enforces the lease.
    pub fence: FenceMode,
    /// What order the servers need.
    pub ordering: Ordering,
    /// How long a close waits for another replica's agreement (rule R5).
    pub close_wait: Duration,
    /// What becomes of a replica whose server answered differently.
    pub divergence: Divergence,
    /// Regular expressions over single lines of the server's output: what may differ between replicas.
    pub harmless: Vec<String>,
    /// How the server is asked whether it still answers; `None`: it is not asked.
    pub health: Option<HealthConfig>,
    /// The member that leads if it is as fit as others. The same for all services of a VIP.
    pub prefer: Option<String>,
    /// When a leader that is not the preferred one hands over to it.
    pub failback: Failback,
    /// How much of a connection's input is kept for a replica that joins.
    pub history: HistoryConfig,
    /// The server as a program that the node runs and watches, with its arguments.
    pub command: Option<Vec<String>>,
    /// Begins a server anew that somebody else looks after, or puts a checkpoint's state in the
    /// server's folder.
    pub restore: Option<Vec<String>>,
    /// Ends with 0 once a server that was begun can be given input.
    pub ready: Option<Vec<String>>,
    /// Writes the state of the running server into a file.
    pub checkpoint: Option<Vec<String>>,
    /// With `ordering = "total"`: how long an input may be left untaken before others pass it.
    pub stall: Duration,
}

/// Commands of the user's for networks that move addresses by API; program and arguments each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HooksConfig {
    /// When this node begins to lead.
    pub on_promote: Vec<String>,
    /// When it no longer leads, or ends.
    pub on_demote: Vec<String>,
}

/// Where the local copy of the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstream {
    /// `"127.0.0.1:7000"`
    Tcp(SocketAddr),
    /// `"unix:/run/app.sock"`
    Unix(PathBuf),
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// How the VIP moves between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressMode {
    /// The leader's own MAC address, made known by gratuitous ARP or unsolicited NA.
    Garp,
    /// A virtual MAC address that moves with the VIP: neighbours' caches stay right, switches learn the
    /// new port.
    Vmac,
    /// A virtual MAC address that no frame bears as its source, so that no switch learns a port for it
    /// and every replica hears every frame of a client: what comes while nobody leads is not lost.
    Flood,
}

/// Who enforces that a node without the lease emits nothing (rule R2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FenceMode {
    /// The kernel as well, by nftables rules that the node sets up and takes down.
    Kernel,
    /// The node's own check alone, which a pause between check and sending can defeat.
    Process,
}

/// What order the servers need across connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordering {
    /// Each connection's bytes in order: for servers whose connections share nothing.
    Connection,
    /// All inputs in one order, one at a time: for single-threaded servers with shared state.
    Total,
}

/// What becomes of a replica whose server answered differently from the leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// It leaves and is brought up anew.
    Evict,
    /// It is only reported.
    Warn,
    /// It stops.
    Stop,
}

/// `service.health`: how a server is asked whether it still answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthConfig {
    /// What is asked.
    pub check: HealthCheck,
    /// From the beginning of one check to that of the next. Default 1 s.
    pub interval: Duration,
    /// How long a check may take. Default 1 s.
    pub timeout: Duration,
    /// So many failures in a row make a server unhealthy; one success heals it. Default 3.
    pub failures: u32,
}

/// What a health check asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthCheck {
    /// That the server's address accepts a connection. (The kernel does so for a server that hangs.)
    Connect,
    /// That it answers.
    Answer {
        /// What is sent to it.
        send: String,
        /// What the answer holds somewhere; `None`: anything will do.
        expect: Option<String>,
    },
    /// That this program, with its arguments, exits with 0.
    Command(Vec<String>),
}

/// When a leader that is not the preferred one hands over to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failback {
    /// Never by itself.
    Never,
    /// When no connection lives.
    Idle,
    /// When the preferred one has been fit to lead for this long.
    After(Duration),
}

/// Bounds of the input kept for replay; past them a replica cannot be brought up by replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryConfig {
    /// Bytes in memory, over all connections of the service. Default 256 MiB.
    pub memory_bytes_max: u64,
    /// Bytes in files in `node.history_dir`, for what exceeds memory; 0: none. Default 4 GiB.
    pub disk_bytes_max: u64,
}

/// The services of one VIP: they share interface, address mode, ordering, group and leader.
#[derive(Debug, Clone)]
pub struct VipConfig<'a> {
    /// The floating address.
    pub vip: IpAddr,
    /// Length of its network prefix.
    pub prefix: u8,
    /// Network interface it lives on.
    pub interface: &'a str,
    /// How it moves.
    pub address: AddressMode,
    /// Who enforces the lease.
    pub fence: FenceMode,
    /// What order its servers need.
    pub ordering: Ordering,
    /// The member that should lead.
    pub prefer: Option<&'a str>,
    /// When it is handed over to.
    pub failback: Failback,
    /// Its services, in file order; never empty.
    pub services: Vec<&'a ServiceConfig>,
}

impl Config {
    /// Reads and checks the file of a node.
    ///
    /// # Errors
    /// Every problem of the file at once, or the one that it cannot be read.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(file, &document::read_file(file)?)
    }

    /// Checks `text` as the contents of `file`, whose folder relative paths start from.
    ///
    /// # Errors
    /// Every problem of the text at once.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigErrors> {
        read::node(file, text)
    }

    /// The VIPs in the order in which the file names them first, each with its services.
    #[must_use]
    pub fn vips(&self) -> Vec<VipConfig<'_>> {
        let mut vips: Vec<VipConfig<'_>> = Vec::new();
        for service in &self.services {
            match vips.iter_mut().find(|vip| vip.vip == service.vip) {
                Some(vip) => vip.services.push(service),
                None => vips.push(VipConfig {
                    vip: service.vip,
                    prefix: service.prefix,
                    interface: &service.interface,
                    address: service.address,
                    fence: service.fence,
                    ordering: service.ordering,
                    prefer: service.prefer.as_deref(),
                    failback: service.failback,
                    services: vec![service],
                }),
            }
        }
        vips
    }
}

impl CoordinatorConfig {
    /// Reads and checks the file of a coordinator that runs alone: `[node]`, `[coord]` and `[admin]`.
    /// `[group]` and `[[service]]` may be there (one file for both uses) and are not looked at.
    ///
    /// # Errors
    /// Every problem of the file at once, or the one that it cannot be read.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(file, &document::read_file(file)?)
    }

    /// Checks `text` as the contents of `file`, whose folder relative paths start from.
    ///
    /// # Errors
    /// Every problem of the text at once.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigErrors> {
        read::coordinator(file, text)
    }
}
