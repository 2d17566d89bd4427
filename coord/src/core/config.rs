//! How a server behaves.

use std::collections::BTreeMap;
use std::time::Duration;

use thiserror::Error;

use crate::quorum::ticks;

/// How a server behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This server's raft id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The servers that began the cluster: raft id and name. The same on every server for ever; who
    /// takes part today stands in the log.
    pub servers: BTreeMap<u64, String>,
    /// Where this server is, for the others and for clients, `host:port` each. It sees to it that the
    /// log says so.
    pub addresses: Option<(String, String)>,
    /// Resolution of all timers.
    pub tick: Duration,
    /// Time between a leader's heartbeats.
    pub heartbeat: Duration,
    /// A follower campaigns after a silence of at least this.
    pub election_min: Duration,
    /// ... and less than this.
    pub election_max: Duration,
    /// A server that has known no leader for this long sends its clients to the others.
    pub leaderless_max: Duration,
    /// Shortest session timeout granted.
    pub session_min: Duration,
    /// Longest session timeout granted.
    pub session_max: Duration,
    /// Sessions of the whole cluster beyond which this server opens no more.
    pub sessions_max: usize,
    /// Silence beyond its timeout after which a session is ended: what a sign of life may take to be
    /// told to the leader.
    pub session_grace: Duration,
    /// A connection that has not opened a session after this long is closed.
    pub handshake_max: Duration,
    /// A snapshot is taken every so many log entries.
    pub snapshot_every: u64,
    /// Log entries kept in memory behind a snapshot, for followers that are a little behind.
    pub entries_kept: u64,
    /// A leader whose oldest write has not become durable for this long hands over.
    pub disk_stuck_max: Duration,
    /// How often the leader looks for containers to delete.
    pub container_check: Duration,
    /// How often the leader looks for znodes that have outlived their time.
    pub ttl_check: Duration,
    /// Whether znodes with a time to live may be created. (ZooKeeper's `extendedTypesEnabled`.)
    pub extended_types: bool,
    /// Who may do everything: `super:` and the digest of its credentials, as in an access list. None:
    /// nobody.
    pub super_digest: Option<String>,
    /// The same for the operator, whose credentials come from the cluster's key.
    pub operator_digest: Option<String>,
    /// Whether clients may change who the servers are. (ZooKeeper's `reconfigEnabled`.)
    pub reconfig: bool,
    /// Whether this server, when it knows no leader, serves clients that asked for it read-only.
    pub read_only: bool,
}

impl Config {
    /// The defaults of the design for server `id` of a cluster that `servers` began.
    #[must_use]
    pub fn new(id: u64, servers: BTreeMap<u64, String>) -> Self {
        Self {
            id,
            name: servers.get(&id).cloned().unwrap_or_default(),
            servers,
            addresses: None,
            tick: Duration::from_millis(5),
            heartbeat: Duration::from_millis(10),
            election_min: Duration::from_millis(50),
            election_max: Duration::from_millis(150),
            leaderless_max: Duration::from_millis(500),
            session_min: Duration::from_millis(30),
            session_max: Duration::from_secs(60),
            sessions_max: 500_000,
            session_grace: Duration::from_millis(8),
            handshake_max: Duration::from_secs(10),
            snapshot_every: 20_000,
            entries_kept: 5_000,
            disk_stuck_max: Duration::from_secs(1),
            container_check: Duration::from_secs(10),
            ttl_check: Duration::from_secs(1),
            extended_types: false,
            super_digest: None,
            operator_digest: None,
            reconfig: true,
            read_only: true,
        }
    }

    /// Checks that the values do not contradict each other.
    ///
    /// # Errors
    /// [`ConfigError`] names the first that does.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.id == 0 || self.servers.is_empty() || self.servers.contains_key(&0) {
            return Err(ConfigError::UnknownServer(self.id));
        }
        if self.tick.is_zero() || self.heartbeat < self.tick {
            return Err(ConfigError::Heartbeat);
        }
        if ticks(self.election_min, self.tick) <= ticks(self.heartbeat, self.tick)
            || ticks(self.election_max, self.tick) <= ticks(self.election_min, self.tick)
        {
            return Err(ConfigError::Election);
        }
        if self.session_min.is_zero() || self.session_max < self.session_min {
            return Err(ConfigError::SessionBounds);
        }
        Ok(())
    }
}

/// What is wrong with a [`Config`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A server has id 0, or there are none.
    #[error("server {0}: ids of servers are above 0, and there must be some")]
    UnknownServer(u64),
    /// The heartbeat is shorter than a tick, or the tick is zero.
    #[error("the heartbeat must be at least one tick, and a tick more than nothing")]
    Heartbeat,
    /// The election timeouts are too short or empty.
    #[error("election timeouts must be above the heartbeat, and the largest above the smallest")]
    Election,
    /// The bounds of session timeouts are empty.
    #[error("the longest session timeout must be at least the shortest, and that above zero")]
    SessionBounds,
}
