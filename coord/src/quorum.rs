//! The consensus engine, behind an interface of our own: what [`Core`](crate::core::Core) needs of
//! it, in our own types, so that the engine could be another one.
//!
//! The engine is raft-rs, which does no I/O. Its own jitter is overridden: the election timeout is
//! a function of the seed, the server and the term, so that a run can be repeated.

mod log;
mod message;
mod raft;

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use message::{RaftMessage, RaftMessageKind};
pub(crate) use raft::RaftQuorum;

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its place, from 1, without gaps.
    pub index: u64,
    /// The term of the leader that wrote it.
    pub term: u64,
    /// What it holds; empty for a new leader's first.
    pub data: Bytes,
}

/// What a server must not forget besides its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HardState {
    /// The newest term seen.
    pub term: u64,
    /// Whom it voted for in that term, 0 for nobody.
    pub vote: u64,
    /// The last index known to be committed. Losing it costs nothing.
    pub commit: u64,
}

/// The state machine at one index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotImage {
    /// Index of the last entry that it contains.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// The raft ids of the voters.
    pub voters: Vec<u64>,
    /// [`crate::snapshot`]'s encoding of the state.
    pub data: Bytes,
}

/// Everything that a server found on its disk when it started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovered {
    /// The newest snapshot.
    pub snapshot: Option<SnapshotImage>,
    /// Hard state.
    pub hard_state: HardState,
    /// Log entries after the snapshot.
    pub entries: Vec<LogEntry>,
}

/// What is to be written and made durable, all of it or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// A snapshot that came from the leader and replaces everything up to its index, the whole log
    /// included. It comes before the rest.
    pub snapshot: Option<SnapshotImage>,
    /// The hard state, if it changed.
    pub hard_state: Option<HardState>,
    /// Entries to append; they replace what the log holds from the first one's index on.
    pub entries: Vec<LogEntry>,
}

/// How a server takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It orders the writes.
    Leader,
    /// It follows a leader, or waits for one.
    Follower,
    /// It asks for votes.
    Candidate,
}

/// What the engine wants done, in this order.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum QuorumOutput {
    /// Send a message to a peer. May be lost.
    Send(RaftMessage),
    /// Make it durable, then call [`Consensus::persisted`] with the token.
    Persist { token: u64, write: Write },
    /// Replace the state machine by this image.
    Restore(SnapshotImage),
    /// Apply a committed entry.
    Apply(LogEntry),
    /// A read barrier is passed once the state machine has applied `index`.
    Barrier { context: u64, index: u64 },
}

/// Ticks of the engine's clock, and what else it needs to know at the start.
#[derive(Debug, Clone)]
pub(crate) struct QuorumConfig {
    pub(crate) id: u64,
    pub(crate) voters: Vec<u64>,
    /// Ticks between heartbeats.
    pub(crate) heartbeat_ticks: usize,
    /// Silence after which a follower asks for votes: at least, and less than.
    pub(crate) election_ticks: (usize, usize),
    pub(crate) seed: u64,
    /// Marks this run's read barriers, so that an answer to an earlier run is not taken for ours.
    pub(crate) incarnation: u64,
    /// Bytes of proposals not yet committed at most; more are dropped.
    pub(crate) uncommitted_bytes_max: u64,
}

/// What [`Core`](crate::core::Core) needs of a consensus engine.
pub(crate) trait Consensus {
    /// One tick of time has passed.
    fn tick(&mut self);
    /// A message has come from a peer.
    fn step(&mut self, message: RaftMessage);
    /// Puts an entry into the log, if this server leads. False: it was not taken.
    fn propose(&mut self, data: Vec<u8>) -> bool;
    /// Asks what has been committed anywhere before now: [`QuorumOutput::Barrier`] answers, or
    /// nobody, if there is no leader or the question is lost.
    fn barrier(&mut self, context: u64);
    /// The write of this token, and every one before it, is durable.
    fn persisted(&mut self, token: u64);
    /// Asks for votes at once: the leader is known to be dead.
    fn campaign(&mut self);
    /// Asks `to` to become the leader, if this server leads.
    fn transfer(&mut self, to: u64);
    /// Messages to this peer may have been lost.
    fn unreachable(&mut self, peer: u64);
    /// Whether some follower needs an image of the state machine ([`Consensus::offer`]).
    fn wants_image(&self) -> bool;
    /// An image of the state machine, to send to followers that are too far behind.
    fn offer(&mut self, image: SnapshotImage);
    /// Forgets entries up to `index`, which must be applied and contained in a durable snapshot.
    fn compact(&mut self, index: u64);
    /// The next thing to do.
    fn poll(&mut self) -> Option<QuorumOutput>;
    /// What this server is.
    fn role(&self) -> Role;
    /// Who leads, as far as this server knows.
    fn leader(&self) -> Option<u64>;
    /// The current term.
    fn term(&self) -> u64;
    /// The last index known to be committed.
    fn committed(&self) -> u64;
    /// The term of the entry at `index`, if it is still known.
    fn term_at(&self, index: u64) -> Option<u64>;
    /// The other server that is furthest along, for a leader that hands over.
    fn best_peer(&self) -> Option<u64>;
}

/// Durations as ticks, at least one.
pub(crate) fn ticks(duration: Duration, tick: Duration) -> usize {
    let ticks = duration.as_micros().div_ceil(tick.as_micros().max(1));
    usize::try_from(ticks).unwrap_or(usize::MAX).max(1)
}
