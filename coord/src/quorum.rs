//! The consensus engine, behind an interface of our own: what [`Core`](crate::core::Core) needs of
//! it, in our own types, so that the engine could be another one.
//!
//! The engine is raft-rs, which does no I/O. Its own jitter is overridden: the election timeout is
//! a function of the seed, the server and the term, so that a run can be repeated.
//!
//! # Changes of the membership
//!
//! An entry of the kind [`EntryKind::Membership`] is one of the engine's configuration changes, and
//! what it changes is decided when it is applied, by the state machine, on every server alike. The
//! engine refuses a second one before the first is applied at the leader, and a server does not
//! campaign while it knows of a committed one that it has not applied.
//!
//! That is not yet enough when servers crash, because a configuration takes effect by its
//! application: if two changes were committed and some servers forgot that the *first* was, they
//! could elect a leader by the majority of a configuration two steps back, which need not meet the
//! present one. So a server that holds the second change must know for good that the first is
//! committed. It does: the leader sends the second with a commit index at or above the first, and a
//! batch of entries is written together with the hard state that came with it, whole or not at all
//! ([`Write`]). Who lacks the second change entirely is outvoted by those who hold it, because one
//! step apart majorities meet.

mod log;
mod message;
mod raft;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use message::{RaftMessage, RaftMessageKind};
pub(crate) use raft::RaftQuorum;

/// What a record of the log is to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum EntryKind {
    /// Nothing but data.
    #[default]
    Normal,
    /// Its application may change who votes ([`Consensus::reconfigure`]).
    Membership,
}

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its place, from 1, without gaps.
    pub index: u64,
    /// The term of the leader that wrote it.
    pub term: u64,
    /// Whether it may change who votes.
    pub kind: EntryKind,
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

/// Who votes and who is only sent the log, at one index.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Conf {
    /// Raft ids of the voters.
    pub voters: BTreeSet<u64>,
    /// Raft ids of the others.
    pub learners: BTreeSet<u64>,
}

/// The state machine at one index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotImage {
    /// Index of the last entry that it contains.
    pub index: u64,
    /// Term of that entry.
    pub term: u64,
    /// Who takes part after that entry.
    pub conf: Conf,
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
    /// It follows, and has no vote: an observer, a server that is joining, or one that was removed.
    Observer,
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
    /// Who votes before the first entry of the log.
    pub(crate) founders: BTreeSet<u64>,
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
    /// Puts an entry into the log, if this server leads. False: it was not taken. One of the kind
    /// [`EntryKind::Membership`] is taken only when the one before it is applied here.
    fn propose(&mut self, kind: EntryKind, data: Vec<u8>) -> bool;
    /// Must be called when an entry of the kind [`EntryKind::Membership`] has been applied, before
    /// anything else: this is what takes part from then on. At most one voter more or less.
    fn reconfigure(&mut self, conf: &Conf);
    /// How far a peer's log is known to agree with that of this server, which leads; nothing if it
    /// does not, or the peer was not heard of lately.
    fn matched(&self, peer: u64) -> Option<u64>;
    /// The last index of the log.
    fn last_index(&self) -> u64;
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
