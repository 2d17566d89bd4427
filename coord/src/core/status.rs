//! What the core tells of itself.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::Core;
use crate::metrics::{Histogram, Metrics};
use crate::quorum::Role;
use crate::time::as_micros;

/// Counted since the start, or since they were last set to nothing.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) proposals_dropped: u64,
    pub(super) frames_received: u64,
    pub(super) frames_sent: u64,
    pub(super) bytes_received: u64,
    pub(super) connections: u64,
    pub(super) auth_failed: u64,
    pub(super) sessions_expired: u64,
    pub(super) long_replies: u64,
    pub(super) latency: Latency,
    /// Until a write was applied, until another request was answered, until a write was durable.
    pub(super) write: Histogram,
    pub(super) read: Histogram,
    pub(super) durable: Histogram,
    pub(super) requests: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// What `srst` sets to nothing: metrics go on.
    pub(super) fn reset(&mut self) {
        self.frames_received = 0;
        self.frames_sent = 0;
        self.latency = Latency::default();
    }
}

/// Time from a request to its answer, as the core sees it.
#[derive(Debug, Default)]
pub(super) struct Latency {
    count: u64,
    total_us: u64,
    min_us: u64,
    max_us: u64,
    last_us: u64,
}

impl Latency {
    pub(super) fn add(&mut self, took: Duration) {
        let us = as_micros(took);
        self.min_us = if self.count == 0 {
            us
        } else {
            self.min_us.min(us)
        };
        self.max_us = self.max_us.max(us);
        self.last_us = us;
        self.count += 1;
        self.total_us = self.total_us.saturating_add(us);
    }

    pub(super) const fn min_ms(&self) -> u64 {
        self.min_us / 1000
    }

    pub(super) const fn max_ms(&self) -> u64 {
        self.max_us / 1000
    }

    pub(super) const fn last_ms(&self) -> u64 {
        self.last_us / 1000
    }

    /// Zero while nothing has been answered.
    pub(super) fn average_ms(&self) -> f64 {
        let average = Duration::from_micros(self.total_us / self.count.max(1));
        average.as_secs_f64() * 1000.0
    }
}

/// A server's state at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Name of this server.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// The term of the quorum.
    pub term: u64,
    /// The last log entry applied here.
    pub zxid: u64,
    /// The last log entry known to be committed.
    pub committed: u64,
    /// Sessions of the whole cluster.
    pub sessions: usize,
    /// Client connections of this server.
    pub connections: usize,
    /// Writes of this server's clients that have not come back yet.
    pub outstanding: usize,
    /// Znodes.
    pub znodes: usize,
    /// Ephemeral znodes.
    pub ephemerals: usize,
    /// Watches of this server's connections.
    pub watches: usize,
    /// Frames received from clients.
    pub frames_received: u64,
    /// Frames sent to clients.
    pub frames_sent: u64,
    /// Proposals that the leader had no room for. They are sent again.
    pub proposals_dropped: u64,
}

impl Status {
    /// That of a server which has not begun to take part.
    pub(crate) fn starting(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            role: Role::Follower,
            leader: None,
            term: 0,
            zxid: 0,
            committed: 0,
            sessions: 0,
            connections: 0,
            outstanding: 0,
            znodes: 0,
            ephemerals: 0,
            watches: 0,
            frames_received: 0,
            frames_sent: 0,
            proposals_dropped: 0,
        }
    }
}

impl Core {
    /// What was counted here; the driver adds its own.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let Counters {
            bytes_received,
            connections,
            auth_failed,
            sessions_expired,
            write,
            read,
            durable,
            requests,
            ..
        } = &self.counters;
        Metrics {
            durable: durable.clone(),
            write: write.clone(),
            read: read.clone(),
            requests: requests.clone(),
            bytes_received: *bytes_received,
            connections_opened: *connections,
            auth_failed: *auth_failed,
            sessions_expired: *sessions_expired,
            writes_not_durable: self.writes.len() as u64,
            ..Metrics::default()
        }
    }

    /// This server's state now.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            name: self.config.name.clone(),
            role: self.quorum.role(),
            leader: self.quorum.leader().and_then(|id| self.name_of(id)),
            term: self.quorum.term(),
            zxid: self.state.zxid,
            committed: self.quorum.committed(),
            sessions: self.state.sessions.len(),
            connections: self.conns.len(),
            outstanding: self.outbox.len(),
            znodes: self.state.tree.len(),
            ephemerals: self.state.tree.ephemeral_count(),
            watches: self.watches.len(),
            frames_received: self.counters.frames_received,
            frames_sent: self.counters.frames_sent,
            proposals_dropped: self.counters.proposals_dropped,
        }
    }
}
