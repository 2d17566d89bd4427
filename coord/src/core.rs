//! The server's core: the only thing that changes state, and a plain value.
//!
//! It is handed the time, frames of clients, messages of peers and the disk's confirmations; it
//! hands back what to write, send and answer ([`Output`]), and when to wake it. Any number of
//! inputs may be handed in before the outputs are drained: they then share one write.
//!
//! # How a write goes
//!
//! The session's server numbers the write and sends it to the leader, which stamps the time on it
//! and proposes it. When it has been applied *here*, its watches are told, and then the client.
//! A write is repeated until it comes back, because its number makes the repetition harmless: so a
//! change of leader costs a client time and nothing else. Reads are answered here, in the order of
//! their session, between the writes around them.

mod client;
mod config;
mod convert;
mod leader;
mod members;
mod read;
mod read_only;
mod status;
mod words;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::client::Caller;
use self::client::Conn;
pub use self::config::{Config, ConfigError};
pub(crate) use self::members::replay;
pub use self::status::Status;
pub use self::words::Surroundings;
use crate::members::Members;
use crate::quorum::{
    Consensus, EntryKind, LogEntry, QuorumConfig, QuorumOutput, RaftMessage, RaftMessageKind,
    RaftQuorum, Recovered, Role, SnapshotImage, Write, ticks,
};
use crate::rng::Rng;
use crate::session::{Deadlines, Run, SessionId};
use crate::snapshot;
use crate::time::Instant;
use crate::tree::Change;
use crate::txn::{Entry, Outcome, Proposal, State};
use crate::watch::Watches;
use crate::wire::{WatcherEvent, encode_event};

/// Proposals not yet committed, in bytes, at most; a leader drops more, and their servers repeat them.
const UNCOMMITTED_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A proposal that has not come back after this long is sent again, then after twice as long, and
/// so on up to [`RESEND_MAX`].
const RESEND_MIN: Duration = Duration::from_millis(250);
const RESEND_MAX: Duration = Duration::from_secs(2);

/// A read barrier that has not been answered after this long is asked again.
const BARRIER_AGAIN: Duration = Duration::from_millis(25);

/// How long a server waits for the one before it to campaign when all know that the leader is dead.
const CAMPAIGN_STEP: Duration = Duration::from_millis(15);

/// Sessions in one [`PeerMessage::Touch`] at most.
const TOUCH_MAX: usize = 10_000;

/// A client's connection to this server. The driver numbers them and never repeats a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// What servers say to each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// The consensus engine's.
    Raft(RaftMessage),
    /// Proposals for the leader, in order.
    Forward(Vec<Proposal>),
    /// Sessions that were heard from, for the leader, and how long ago in microseconds.
    Touch(Vec<(SessionId, u32)>),
    /// What has been committed? With the sessions that ask.
    Question {
        /// The consensus engine's question.
        question: RaftMessage,
        /// The sessions.
        sessions: Vec<SessionId>,
    },
}

/// What the driver is to do, in this order.
#[must_use]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Write, make durable, and then call [`Core::handle_persisted`] with the token. Writes are made
    /// in this order.
    Persist {
        /// Names the write.
        token: u64,
        /// What to write.
        write: Write,
    },
    /// Keep this snapshot and then call [`Core::handle_saved`] with its index. The log up to it is no
    /// longer needed.
    SaveSnapshot(SnapshotImage),
    /// Send to a peer. May be lost, or be late; [`Core::handle_unreachable`] is then welcome.
    Send {
        /// Raft id of the peer.
        to: u64,
        /// What.
        message: PeerMessage,
    },
    /// Send a client the answer to one of its frames.
    Reply {
        /// Whom.
        conn: ConnId,
        /// The whole frame.
        frame: Bytes,
    },
    /// Send a client a watch event.
    Notify {
        /// Whom.
        conn: ConnId,
        /// The whole frame.
        frame: Bytes,
    },
    /// Close a client's connection, once what was sent before is out. The core has forgotten it.
    Close {
        /// Whom.
        conn: ConnId,
        /// Why, for the log.
        reason: CloseReason,
    },
    /// Something to tell the operator.
    Event(Event),
}

/// Why a client's connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client closed its session.
    Goodbye,
    /// Its session has expired.
    Expired,
    /// It has taken its session to another connection.
    Moved,
    /// It has not opened a session in time.
    Handshake,
    /// It has seen a state that this cluster has never had.
    FromTheFuture,
    /// It does not speak the protocol, or asked for what is not there.
    Protocol,
    /// It failed to prove who it is.
    Auth,
    /// It has too many requests open, or too many watches.
    TooMuch,
    /// This server has no leader and cannot serve.
    Leaderless,
    /// There is a leader again, and this client was served without one.
    QuorumIsBack,
    /// There are as many sessions as there may be.
    TooManySessions,
    /// This server was so far behind that it had to skip ahead.
    SkippedAhead,
    /// This server was removed from the cluster.
    Removed,
}

/// What an operator may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The leader changed, or was lost.
    Leader {
        /// Its raft id.
        leader: Option<u64>,
        /// The term.
        term: u64,
    },
    /// The leader has ended a session for its silence.
    SessionExpired(SessionId),
    /// Who the servers are now. Comes first of all, and then with every change.
    Members(Members),
    /// This server is no longer one of them, for ever, and nobody needs its vote any more: it must
    /// stop.
    Removed,
}

/// What a server waits to see in its own log.
struct Outgoing {
    proposal: Proposal,
    sent: Instant,
    again: Duration,
}

/// A question to the leader: what has been committed before now?
struct Barrier {
    conns: BTreeSet<ConnId>,
    asked: Instant,
}

/// The core. See the [module](self).
pub struct Core {
    config: Config,
    run: Run,
    rng: Rng,
    quorum: Box<dyn Consensus + Send>,
    state: State,
    now: Instant,
    started: Instant,
    /// Wall clock minus `now`, milliseconds: only for the times that znodes show.
    wall_offset_ms: i64,
    next_tick: Instant,
    next_touch: Instant,
    next_container_check: Instant,
    next_ttl_check: Instant,
    /// Whom this server took for the leader when it looked last.
    led: (u64, Option<u64>),
    leaderless_since: Option<Instant>,
    /// The dead leader in whose place this server campaigns, and when.
    campaign: Option<(Instant, u64)>,

    conns: BTreeMap<ConnId, Conn>,
    /// Connections that have no session yet.
    opening: BTreeSet<ConnId>,
    here: BTreeMap<SessionId, ConnId>,
    watches: Watches,
    /// Sessions of this server that were heard from, and when last.
    touched: BTreeMap<SessionId, Instant>,
    /// When each peer was heard from last.
    heard: BTreeMap<u64, Instant>,

    outbox: BTreeMap<u64, Outgoing>,
    next_out: u64,
    /// On their way to the leader with the next drain.
    forward: Vec<Proposal>,
    barriers: BTreeMap<u64, Barrier>,
    next_barrier: u64,
    /// The barrier that syncs may still join: it has not been asked for yet.
    open_barrier: Option<u64>,
    /// The newest term of which an entry has been applied. A leader answers no barrier before.
    settled_term: u64,
    /// Syncs whose barrier is known and not applied yet.
    waiting: BTreeSet<(u64, ConnId)>,

    /// Writes that are not durable yet, and when they were asked for.
    writes: VecDeque<(u64, Instant)>,
    /// Not before this does a leader with a stuck disk hand over again.
    next_hand_over: Instant,
    /// Only of use while this server leads.
    deadlines: Deadlines,
    /// Index of the newest snapshot taken, and of the newest that is durable.
    snapshot_taken: u64,
    /// Not before these does a leader promote, and this server announce itself, again.
    next_promotion: Instant,
    next_announcement: Instant,
    /// This server was removed, and stops then.
    leaves_at: Option<Instant>,
    outputs: VecDeque<Output>,
    /// Bytes of the replies in `outputs`.
    unsent_bytes: usize,
    counters: status::Counters,
}

impl Core {
    /// A server with what it found on its disk (nothing, for a new cluster). `seed` must not be
    /// guessable: session passwords come from it.
    ///
    /// # Errors
    /// [`snapshot::SnapshotError`] if the recovered snapshot cannot be read.
    ///
    /// # Panics
    /// If [`Config::validate`] finds fault.
    pub fn new(
        config: Config,
        recovered: Recovered,
        seed: u64,
        now: Instant,
    ) -> Result<Self, snapshot::SnapshotError> {
        config.validate().expect("the configuration was validated");
        let state = members::recovered(&config.servers, &recovered)?;
        let mut rng = Rng::new(seed);
        let run = Run {
            server: config.id,
            incarnation: rng.next(),
        };
        let quorum = RaftQuorum::new(
            &QuorumConfig {
                id: config.id,
                founders: config.servers.keys().copied().collect(),
                heartbeat_ticks: ticks(config.heartbeat, config.tick),
                election_ticks: (
                    ticks(config.election_min, config.tick),
                    ticks(config.election_max, config.tick),
                ),
                seed: rng.next(),
                incarnation: run.incarnation,
                uncommitted_bytes_max: UNCOMMITTED_BYTES_MAX,
            },
            recovered,
        );
        let snapshot_taken = state.zxid;
        let mut core = Self {
            run,
            rng,
            quorum: Box::new(quorum),
            state,
            now,
            started: now,
            wall_offset_ms: 0,
            next_tick: now + config.tick,
            next_touch: now + config.tick,
            next_container_check: now + config.container_check,
            next_ttl_check: now + config.ttl_check,
            led: (0, None),
            leaderless_since: Some(now),
            campaign: None,
            conns: BTreeMap::new(),
            opening: BTreeSet::new(),
            here: BTreeMap::new(),
            watches: Watches::default(),
            touched: BTreeMap::new(),
            outbox: BTreeMap::new(),
            next_out: 0,
            forward: Vec::new(),
            barriers: BTreeMap::new(),
            next_barrier: 0,
            open_barrier: None,
            settled_term: 0,
            waiting: BTreeSet::new(),
            writes: VecDeque::new(),
            next_hand_over: now,
            deadlines: Deadlines::new(config.session_grace),
            snapshot_taken,
            heard: BTreeMap::new(),
            next_promotion: now,
            next_announcement: now,
            leaves_at: None,
            outputs: VecDeque::new(),
            unsent_bytes: 0,
            counters: status::Counters::default(),
            config,
        };
        core.on_members();
        Ok(core)
    }

    /// Tells the wall clock, in milliseconds since 1970. Only the times that znodes show come from it.
    pub fn set_wall_clock(&mut self, now: Instant, wall_ms: i64) {
        self.advance(now);
        let now_ms = i64::try_from(now.micros() / 1000).unwrap_or(i64::MAX);
        self.wall_offset_ms = wall_ms.saturating_sub(now_ms);
    }

    /// The time of day at `at`, in milliseconds since 1970.
    fn wall_ms(&self, at: Instant) -> i64 {
        let at_ms = i64::try_from(at.micros() / 1000).unwrap_or(i64::MAX);
        at_ms.saturating_add(self.wall_offset_ms)
    }

    /// A message has come from a peer. `from` is who the link says it is.
    pub fn handle_peer(&mut self, now: Instant, from: u64, message: PeerMessage) {
        self.advance(now);
        if self.state.members.was_removed(from) {
            return;
        }
        self.hear(from);
        match message {
            PeerMessage::Raft(message) => {
                if message.from == from {
                    self.quorum.step(message);
                }
            }
            PeerMessage::Forward(proposals) => {
                for proposal in proposals {
                    self.propose(proposal);
                }
            }
            PeerMessage::Touch(sessions) => {
                for (session, ago) in sessions {
                    let ago = Duration::from_micros(u64::from(ago));
                    self.deadlines.touch(session, now - ago);
                }
            }
            PeerMessage::Question { question, sessions } => {
                if question.from == from {
                    self.on_question(question, &sessions);
                }
            }
        }
    }

    /// The write of this token, and every one before it, is durable.
    pub fn handle_persisted(&mut self, now: Instant, token: u64) {
        self.advance(now);
        while self
            .writes
            .front()
            .is_some_and(|(first, _)| *first <= token)
        {
            if let Some((_, asked)) = self.writes.pop_front() {
                self.counters.durable.add(now.since(asked));
            }
        }
        self.quorum.persisted(token);
    }

    /// The snapshot up to `index` is durable.
    pub fn handle_saved(&mut self, now: Instant, index: u64) {
        self.advance(now);
        self.quorum
            .compact(index.saturating_sub(self.config.entries_kept));
    }

    /// What was sent to this peer may have been lost.
    pub fn handle_unreachable(&mut self, now: Instant, peer: u64) {
        self.advance(now);
        self.quorum.unreachable(peer);
    }

    /// This peer is known to be dead. If it led, the others need not wait for its silence.
    pub fn handle_peer_died(&mut self, now: Instant, peer: u64) {
        self.advance(now);
        if self.quorum.leader() != Some(peer) || self.quorum.role() == Role::Leader {
            return;
        }
        // In turn, so that two do not split the vote. Who lags behind loses, and the next one asks.
        let survivors = self.state.members.voters().filter(|id| *id != peer);
        let rank = survivors.take_while(|id| *id != self.config.id).count();
        let rank = u32::try_from(rank).expect("a handful of servers");
        self.campaign = Some((now + CAMPAIGN_STEP * rank, peer));
        self.campaign_if_due();
    }

    /// Hands leadership to `to`, or to the server that is furthest along. Does nothing if this
    /// server does not lead.
    pub fn handle_transfer(&mut self, now: Instant, to: Option<u64>) {
        self.advance(now);
        if let Some(to) = to.or_else(|| self.quorum.best_peer()) {
            self.quorum.transfer(to);
        }
    }

    /// Time has passed. Early, late and repeated calls are harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        if now < self.next_tick {
            return;
        }
        let late = now.since(self.next_tick);
        self.quorum.tick();
        self.next_tick = self.next_tick + self.config.tick;
        if self.next_tick <= now {
            // A process that slept does not make up for it: the others' messages of that time may
            // still wait to be read, and silence must be judged anew.
            self.quorum.tick();
            self.next_tick = now + self.config.tick;
        }
        if late > self.config.election_min {
            self.deadlines.postpone(late);
        }
        self.campaign_if_due();
        self.expire_sessions();
        self.send_touches();
        self.resend();
        self.check_disk();
        self.check_handshakes();
        self.check_containers();
        self.check_joining();
        self.check_announcement();
        self.check_removed();
        if let Some(since) = self.leaderless_since
            && now.since(since) > self.config.leaderless_max
        {
            self.on_leaderless();
            self.end_read_only(false);
        }
    }

    /// When [`Core::handle_timeout`] is wanted.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_tick)
    }

    /// The next thing to do; drain to `None` before waiting for more input.
    pub fn poll_output(&mut self) -> Option<Output> {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                if let Output::Reply { frame, .. } = &output {
                    self.unsent_bytes -= frame.len();
                }
                return Some(output);
            }
            if let Some(wanted) = self.quorum.poll() {
                self.on_quorum(wanted);
            } else if self.check_leader() || self.flush() {
                // There may be more now.
            } else if self.quorum.wants_image() {
                let image = self.image();
                self.quorum.offer(image);
            } else {
                return None;
            }
        }
    }

    /// This server's raft id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.config.id
    }

    /// Bytes of replies that wait in [`Core::poll_output`]. Answers to what is read may be much longer
    /// than the questions: a driver hands in no more when there are enough.
    #[must_use]
    pub fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// The replicated state, for tests and status.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    fn on_quorum(&mut self, wanted: QuorumOutput) {
        match wanted {
            QuorumOutput::Send(message) => {
                let to = message.to;
                let message = match message.kind {
                    RaftMessageKind::ReadIndex => self.question(message),
                    _ => PeerMessage::Raft(message),
                };
                self.outputs.push_back(Output::Send { to, message });
            }
            QuorumOutput::Persist { token, write } => {
                self.writes.push_back((token, self.now));
                self.outputs.push_back(Output::Persist { token, write });
            }
            QuorumOutput::Restore(image) => self.on_restore(&image),
            QuorumOutput::Apply(entry) => {
                self.on_apply(&entry);
                if entry.term > self.settled_term {
                    self.settled_term = entry.term;
                    self.ask_barriers();
                }
                self.on_applied();
            }
            QuorumOutput::Barrier { context, index } => {
                for conn in self
                    .barriers
                    .remove(&context)
                    .map_or(BTreeSet::new(), |b| b.conns)
                {
                    self.on_barrier(conn, context, index);
                }
            }
        }
    }

    fn on_restore(&mut self, image: &SnapshotImage) {
        self.state = snapshot::decode(&image.data)
            .expect("an authenticated peer's snapshot passed its checksum");
        self.state.zxid = image.index;
        self.snapshot_taken = image.index;
        // Watches would miss what was skipped, and the fate of open writes is not known. Clients
        // come back with their last zxid and are told what they missed.
        self.close_all(CloseReason::SkippedAhead);
        self.on_members();
    }

    fn on_apply(&mut self, logged: &LogEntry) {
        let LogEntry { index, data, .. } = logged;
        let index = *index;
        if data.is_empty() {
            self.state.skip(index);
            return;
        }
        let version = self.state.members.version();
        let entry: Entry =
            postcard::from_bytes(data).expect("the log's checksums held, and we wrote it");
        let (outcome, changes) = self.state.apply(index, &entry);
        if logged.kind == EntryKind::Membership {
            self.quorum.reconfigure(&members::conf(&self.state.members));
        }
        if self.state.members.version() != version {
            self.on_members();
        }
        let ours = entry.proposal.origin == self.run;
        if planted!(WatchAfterReply) {
            self.on_outcome(outcome.clone(), &entry.proposal.command, ours);
        }
        for change in &changes {
            if planted!(WatchLost) && matches!(change, Change::Data(_)) {
                continue;
            }
            for fired in self.watches.fire(change) {
                let frame = encode_event(&WatcherEvent::new(fired.kind, fired.path));
                for conn in fired.conns {
                    self.outputs.push_back(Output::Notify {
                        conn,
                        frame: frame.clone(),
                    });
                }
            }
        }
        if !planted!(WatchAfterReply) {
            self.on_outcome(outcome, &entry.proposal.command, ours);
        }
    }

    /// After each entry: syncs that waited for it, and the snapshot that may be due.
    fn on_applied(&mut self) {
        while let Some((index, conn)) = self.waiting.first().copied() {
            if index > self.state.zxid {
                break;
            }
            self.waiting.pop_first();
            self.advance_conn(conn);
        }
        if self.state.zxid - self.snapshot_taken >= self.config.snapshot_every {
            let image = self.image();
            self.snapshot_taken = image.index;
            self.quorum.offer(image.clone());
            self.outputs.push_back(Output::SaveSnapshot(image));
        }
    }

    fn image(&self) -> SnapshotImage {
        let term = self.quorum.term_at(self.state.zxid);
        SnapshotImage::of(&self.state, term.expect("what was applied last is held"))
    }

    fn on_outcome(&mut self, outcome: Outcome, command: &crate::txn::Command, ours: bool) {
        use crate::txn::Command;
        match outcome {
            Outcome::Created { session } | Outcome::Attached { session } => {
                self.start_deadline(session);
                let request = match command {
                    Command::Create { request, .. } | Command::Attach { request, .. } => *request,
                    _ => unreachable!("only these two open sessions"),
                };
                let conn = ConnId(request);
                if let Some(old) = self.here.get(&session).copied()
                    && !(ours && old == conn)
                    && !planted!(MovedKeepsServing)
                {
                    self.close(old, CloseReason::Moved);
                }
                if ours
                    && !self.on_opened(conn, session)
                    && matches!(outcome, Outcome::Created { .. })
                {
                    self.abandon(session);
                }
            }
            Outcome::AttachRefused => {
                if let (true, Command::Attach { request, .. }) = (ours, command) {
                    self.on_open_refused(ConnId(*request));
                }
            }
            Outcome::Expired { session } => {
                if let Some(session) = session {
                    self.counters.sessions_expired += 1;
                    self.deadlines.end(session);
                    if let Some(conn) = self.here.get(&session).copied() {
                        self.close(conn, CloseReason::Expired);
                    }
                    self.outputs
                        .push_back(Output::Event(Event::SessionExpired(session)));
                }
            }
            Outcome::Written(result) => {
                let Command::Write {
                    session, number, ..
                } = command
                else {
                    unreachable!("only writes are written");
                };
                if !self.state.sessions.contains_key(session) {
                    self.deadlines.end(*session);
                }
                if let (true, Some(conn)) = (ours, self.here.get(session).copied()) {
                    self.on_written(conn, *number, result);
                }
            }
            Outcome::Void | Outcome::Reaped | Outcome::Arranged => {}
        }
    }

    /// Notices a change of leader. True if it did something.
    fn check_leader(&mut self) -> bool {
        let led = (self.quorum.term(), self.quorum.leader());
        if led == self.led {
            return false;
        }
        let before = std::mem::replace(&mut self.led, led);
        if led.1.is_none() {
            self.leaderless_since.get_or_insert(self.now);
        } else {
            self.leaderless_since = None;
            self.campaign = None;
            self.end_read_only(true);
        }
        if before.1 != led.1 || led.1.is_some() {
            self.outputs.push_back(Output::Event(Event::Leader {
                leader: led.1,
                term: led.0,
            }));
        }
        self.deadlines.clear();
        self.restart_deadlines();
        if led.1.is_some() {
            // What was on its way to the old leader may be lost.
            for outgoing in self.outbox.values_mut() {
                outgoing.sent = self.now;
                outgoing.again = RESEND_MIN;
            }
            self.forward = self
                .outbox
                .values()
                .map(|out| out.proposal.clone())
                .collect();
            self.ask_barriers();
        }
        true
    }

    /// Asks again for every barrier that has been asked for.
    fn ask_barriers(&mut self) {
        let mut contexts = Vec::new();
        for (context, barrier) in &mut self.barriers {
            if Some(*context) != self.open_barrier {
                barrier.asked = self.now;
                contexts.push(*context);
            }
        }
        contexts
            .into_iter()
            .for_each(|context| self.ask_barrier(context));
    }

    /// Sends what was collected since the last drain. True if there was anything.
    fn flush(&mut self) -> bool {
        let mut any = false;
        if let Some(context) = self.open_barrier.take() {
            any = true;
            self.ask_barrier(context);
        }
        if self.forward.is_empty() {
            return any;
        }
        let proposals = std::mem::take(&mut self.forward);
        match self.quorum.leader() {
            Some(leader) if leader == self.config.id => {
                for proposal in proposals {
                    self.propose(proposal);
                }
            }
            Some(to) => {
                let message = PeerMessage::Forward(proposals);
                self.outputs.push_back(Output::Send { to, message });
            }
            // They stand in the outbox and go to the next leader.
            None => {}
        }
        true
    }

    fn resend(&mut self) {
        let now = self.now;
        let due = |sent: Instant, again| now.since(sent) >= again;
        if self
            .outbox
            .first_key_value()
            .is_some_and(|(_, out)| due(out.sent, out.again))
        {
            // All of them: writes of one session must not overtake each other.
            for outgoing in self.outbox.values_mut() {
                outgoing.sent = now;
                outgoing.again = (outgoing.again * 2).min(RESEND_MAX);
            }
            self.forward = self
                .outbox
                .values()
                .map(|out| out.proposal.clone())
                .collect();
        }
        let mut contexts = Vec::new();
        for (context, barrier) in &mut self.barriers {
            if due(barrier.asked, BARRIER_AGAIN) {
                barrier.asked = now;
                contexts.push(*context);
            }
        }
        contexts
            .into_iter()
            .for_each(|context| self.ask_barrier(context));
    }

    fn campaign_if_due(&mut self) {
        if let Some((at, dead)) = self.campaign
            && at <= self.now
        {
            self.campaign = None;
            if self.quorum.leader() == Some(dead) {
                self.quorum.campaign();
            }
        }
    }
}
