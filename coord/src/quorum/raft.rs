//! raft-rs as a [`Consensus`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use raft::eraftpb as pb;
use raft::{Config, INVALID_ID, ProgressState, RawNode, SnapshotStatus, StateRole};

use super::log::Log;
use super::message::{
    RaftMessage, RaftMessageKind, change_marker, conf_from_engine, entry_from_engine,
    image_from_engine,
};
use super::{
    Conf, Consensus, EntryKind, HardState, QuorumConfig, QuorumOutput, Recovered, Role,
    SnapshotImage, Write,
};
use crate::rng::mix;

/// Bytes of entries in one message at most (one entry always fits).
const MESSAGE_BYTES_MAX: u64 = 1024 * 1024;

/// Messages with entries on their way to one follower at most.
const IN_FLIGHT_MAX: usize = 256;

/// A follower that has not taken a snapshot after this many ticks is sent another, then after twice
/// as many, and so on up to [`SNAPSHOT_TICKS_MAX`]: the engine itself would wait for ever.
const SNAPSHOT_TICKS: u32 = 200;
const SNAPSHOT_TICKS_MAX: u32 = 200 * 32;

/// What waits for one write to be durable.
struct Pending {
    /// The engine's number, and our token.
    number: u64,
    /// False for a batch that has nothing to write and only keeps its place in the order.
    written: bool,
    /// Messages that make promises on the strength of it.
    messages: Vec<RaftMessage>,
}

pub(crate) struct RaftQuorum {
    node: RawNode<Log>,
    id: u64,
    seed: u64,
    incarnation: u64,
    election_ticks: (usize, usize),
    pending: VecDeque<Pending>,
    /// The batch with a snapshot that is not durable yet. Until it is, the engine must not be told
    /// that it was applied, and must not campaign: it would look for entries that are gone.
    installing: Option<u64>,
    /// So many changes of the membership have been handed out to be applied; the engine is told what
    /// they changed before it does anything else.
    changing: usize,
    /// Followers that were sent a snapshot: ticks since then, and how many are too many.
    snapshots: BTreeMap<u64, (u32, u32)>,
    /// A commit index that was not worth a write of its own.
    unsaved: Option<HardState>,
    outputs: VecDeque<QuorumOutput>,
}

impl RaftQuorum {
    /// # Panics
    /// If the configuration contradicts itself; the core has checked it.
    pub(crate) fn new(config: &QuorumConfig, mut recovered: Recovered) -> Self {
        if planted!(VoteForgotten) {
            recovered.hard_state.vote = 0;
        }
        let applied = recovered.snapshot.as_ref().map_or(0, |image| image.index);
        let founders = Conf {
            voters: config.founders.clone(),
            learners: [].into(),
        };
        let log = Log::new(recovered, founders);
        let (min, max) = config.election_ticks;
        let engine = Config {
            id: config.id,
            election_tick: min,
            min_election_tick: min,
            max_election_tick: max,
            heartbeat_tick: config.heartbeat_ticks,
            applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            read_only_option: if planted!(BarrierByLease) {
                raft::ReadOnlyOption::LeaseBased
            } else {
                raft::ReadOnlyOption::Safe
            },
            batch_append: true,
            max_uncommitted_size: config.uncommitted_bytes_max.max(MESSAGE_BYTES_MAX),
            ..Config::default()
        };
        let node = RawNode::new(&engine, log, &logger()).expect("the configuration was checked");
        let mut quorum = Self {
            node,
            id: config.id,
            seed: config.seed,
            incarnation: config.incarnation,
            election_ticks: config.election_ticks,
            pending: VecDeque::new(),
            installing: None,
            changing: 0,
            snapshots: BTreeMap::new(),
            unsaved: None,
            outputs: VecDeque::new(),
        };
        quorum.settle();
        quorum
    }

    /// The engine draws its election timeout from a global generator; ours takes its place after
    /// everything that may have drawn.
    fn settle(&mut self) {
        let (min, max) = self.election_ticks;
        let span = (max - min) as u64;
        let draw = mix(self.seed ^ mix(self.id) ^ mix(self.node.raft.term ^ 0x7465_726d));
        let ticks = min + usize::try_from(draw % span).expect("less than a usize");
        self.node.raft.set_randomized_election_timeout(ticks);
    }

    /// A message that no correct peer sends to us would make the engine panic.
    fn acceptable(&self, message: &RaftMessage) -> bool {
        let last = self.node.raft.raft_log.last_index();
        message.to == self.id
            && message.from != self.id
            && message.from != INVALID_ID
            // A leader tells a follower to commit only what that follower has acknowledged: so
            // this one has forgotten its log. It must not take part under its old name.
            && (message.kind != RaftMessageKind::Heartbeat || message.commit <= last)
            && (message.kind != RaftMessageKind::TimeoutNow || self.installing.is_none())
            && (message.kind != RaftMessageKind::ReadIndex || message.entries.len() == 1)
    }

    /// Turns what the engine has ready into outputs.
    fn pump(&mut self) {
        assert_eq!(
            self.changing, 0,
            "changes of the membership are applied first"
        );
        while self.changing == 0 && self.node.has_ready() {
            let mut ready = self.node.ready();
            let number = ready.number();
            let mut promises = Vec::new();
            let leads = self.node.raft.state == StateRole::Leader;
            let messages = ready
                .take_messages()
                .into_iter()
                .chain(ready.take_persisted_messages());
            for message in messages.filter_map(RaftMessage::from_engine) {
                // Raft thesis §10.2.1: a leader may send entries before its own disk has them. Its
                // own vote has been durable since before it was asked for by others.
                if !leads && message.kind.promises() && !planted!(AckBeforeSync) {
                    promises.push(message);
                } else {
                    self.outputs.push_back(QuorumOutput::Send(message));
                }
            }
            if let Some(state) = ready.hs() {
                let state = HardState {
                    term: state.term,
                    vote: state.vote,
                    commit: state.commit,
                };
                self.node.mut_store().set_hard_state(state);
                self.unsaved = Some(state);
            }
            let image = (!ready.snapshot().is_empty()).then(|| image_from_engine(ready.snapshot()));
            if let Some(image) = &image {
                self.node.mut_store().restore(image.clone());
            }
            let entries = ready.take_entries();
            self.node.mut_store().append(&entries);
            if ready.must_sync() {
                let write = Write {
                    snapshot: image.clone(),
                    hard_state: self.unsaved.take(),
                    entries: entries.iter().map(entry_from_engine).collect(),
                };
                self.outputs.push_back(QuorumOutput::Persist {
                    token: number,
                    write,
                });
            }
            let written = ready.must_sync();
            self.pending.push_back(Pending {
                number,
                written,
                messages: promises,
            });
            if let Some(image) = image {
                self.installing = Some(number);
                self.outputs.push_back(QuorumOutput::Restore(image));
            }
            for entry in ready.take_committed_entries() {
                let entry = entry_from_engine(&entry);
                self.changing += usize::from(entry.kind == EntryKind::Membership);
                self.outputs.push_back(QuorumOutput::Apply(entry));
            }
            for read in ready.take_read_states() {
                if let Some(context) = self.own_context(&read.request_ctx) {
                    self.outputs.push_back(QuorumOutput::Barrier {
                        context,
                        index: read.index,
                    });
                }
            }
            self.node.advance_append_async(ready);
            if self.installing.is_none() && self.changing == 0 {
                self.node.advance_apply();
            }
            self.release();
        }
        self.settle();
    }

    /// Lets go what waited for nothing, or for writes that are durable now.
    fn release(&mut self) {
        while self.pending.front().is_some_and(|pending| !pending.written) {
            let pending = self.pending.pop_front().expect("just seen");
            self.node.on_persist_ready(pending.number);
            self.outputs
                .extend(pending.messages.into_iter().map(QuorumOutput::Send));
        }
    }

    /// Gives up on snapshots that were lost on the way.
    fn watch_snapshots(&mut self) {
        let tracker = self.node.raft.prs();
        let leads = self.node.raft.state == StateRole::Leader;
        let waits = |id: u64| {
            leads
                && tracker
                    .get(id)
                    .is_some_and(|peer| peer.state == ProgressState::Snapshot)
        };
        let mut lost = Vec::new();
        self.snapshots.retain(|id, _| tracker.get(*id).is_some());
        let peers: BTreeSet<u64> = tracker.iter().map(|(id, _)| *id).collect();
        for id in &peers {
            if !waits(*id) {
                // One that is being probed again keeps its patience.
                if !leads
                    || tracker
                        .get(*id)
                        .is_some_and(|p| p.state == ProgressState::Replicate)
                {
                    self.snapshots.remove(id);
                }
                continue;
            }
            let (ticks, limit) = self.snapshots.entry(*id).or_insert((0, SNAPSHOT_TICKS));
            *ticks += 1;
            if *ticks >= *limit {
                *ticks = 0;
                *limit = (*limit * 2).min(SNAPSHOT_TICKS_MAX);
                lost.push(*id);
            }
        }
        for id in lost {
            self.node.report_snapshot(id, SnapshotStatus::Failure);
        }
    }

    fn context(&self, context: u64) -> Vec<u8> {
        [self.id, self.incarnation, context]
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect()
    }

    fn own_context(&self, bytes: &[u8]) -> Option<u64> {
        let context = u64::from_be_bytes(bytes.get(16..)?.try_into().ok()?);
        (bytes == self.context(context)).then_some(context)
    }
}

impl Consensus for RaftQuorum {
    fn tick(&mut self) {
        if self.installing.is_none() && self.changing == 0 {
            self.node.tick();
        }
        self.watch_snapshots();
        self.settle();
    }

    fn step(&mut self, message: RaftMessage) {
        if !self.acceptable(&message) {
            tracing::warn!(from = message.from, kind = ?message.kind, "message not acceptable");
            return;
        }
        let from = message.from;
        if let Err(error) = self.node.step(message.into_engine()) {
            tracing::debug!(from, %error, "message not taken");
        }
        self.settle();
    }

    fn propose(&mut self, kind: EntryKind, data: Vec<u8>) -> bool {
        if self.node.raft.state != StateRole::Leader {
            return false;
        }
        match kind {
            EntryKind::Normal => self.node.propose(Vec::new(), data).is_ok(),
            // The engine would put an empty entry in the place of a change that comes too early.
            EntryKind::Membership => {
                self.changing == 0
                    && !self.node.raft.has_pending_conf()
                    && self.node.propose_conf_change(data, change_marker()).is_ok()
            }
        }
    }

    fn reconfigure(&mut self, conf: &Conf) {
        assert!(self.changing > 0, "only an entry changes the membership");
        let before = conf_from_engine(&self.node.raft.prs().conf().to_conf_state());
        let mut change = pb::ConfChangeV2::default();
        let mut step = |kind, id: u64| {
            let mut single = pb::ConfChangeSingle::default();
            single.set_change_type(kind);
            single.node_id = id;
            change.mut_changes().push(single);
        };
        for id in before.voters.union(&before.learners) {
            if !conf.voters.contains(id) && !conf.learners.contains(id) {
                step(pb::ConfChangeType::RemoveNode, *id);
            }
        }
        for id in conf.learners.difference(&before.learners) {
            step(pb::ConfChangeType::AddLearnerNode, *id);
        }
        for id in conf.voters.difference(&before.voters) {
            step(pb::ConfChangeType::AddNode, *id);
        }
        if !change.get_changes().is_empty() {
            let after = self.node.apply_conf_change(&change);
            let after = after.expect("at most one voter changes, and one is left");
            assert_eq!(
                conf_from_engine(&after),
                *conf,
                "the engine agrees who takes part"
            );
            tracing::info!(voters = ?conf.voters, learners = ?conf.learners, "membership changed");
        }
        self.changing -= 1;
        // A removed leader is no leader, and proposes nothing more; the engine leaves it standing.
        if self.node.raft.state == StateRole::Leader && !conf.voters.contains(&self.id) {
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, INVALID_ID);
        }
        if self.installing.is_none() && self.changing == 0 {
            self.node.advance_apply();
        }
        self.settle();
    }

    fn matched(&self, peer: u64) -> Option<u64> {
        let leads = self.node.raft.state == StateRole::Leader;
        let progress = self.node.raft.prs().get(peer).filter(|_| leads)?;
        // One that was sent a snapshot and lacks nothing since is probed, not replicated to, until
        // there is a next entry: what it has acknowledged counts all the same.
        let known = progress.state != ProgressState::Snapshot && progress.matched > 0;
        known.then_some(progress.matched)
    }

    fn last_index(&self) -> u64 {
        self.node.raft.raft_log.last_index()
    }

    fn barrier(&mut self, context: u64) {
        let context = self.context(context);
        self.node.read_index(context);
    }

    fn persisted(&mut self, token: u64) {
        while self
            .pending
            .front()
            .is_some_and(|pending| pending.number <= token)
        {
            let pending = self.pending.pop_front().expect("just seen");
            self.outputs
                .extend(pending.messages.into_iter().map(QuorumOutput::Send));
        }
        self.node.on_persist_ready(token);
        if self.installing.is_some_and(|number| number <= token) {
            self.installing = None;
            if self.changing == 0 {
                self.node.advance_apply();
            }
        }
        self.release();
    }

    fn campaign(&mut self) {
        let votes = self.node.raft.promotable();
        if self.node.raft.state == StateRole::Leader
            || self.installing.is_some()
            || self.changing > 0
            || !votes
        {
            return;
        }
        // What a leader sends to hand over: voters then do not insist on the dead leader's lease.
        let mut message = pb::Message::default();
        message.set_msg_type(pb::MessageType::MsgTimeoutNow);
        message.from = self.id;
        message.to = self.id;
        message.term = self.node.raft.term;
        if let Err(error) = self.node.raft.step(message) {
            tracing::debug!(%error, "no campaign");
        }
        self.settle();
    }

    fn transfer(&mut self, to: u64) {
        if self.node.raft.state == StateRole::Leader {
            self.node.transfer_leader(to);
            self.settle();
        }
    }

    fn unreachable(&mut self, peer: u64) {
        self.node.report_unreachable(peer);
        self.node.report_snapshot(peer, SnapshotStatus::Failure);
    }

    fn wants_image(&self) -> bool {
        self.node.store().wants_image()
    }

    fn offer(&mut self, image: SnapshotImage) {
        self.node.mut_store().offer(image);
    }

    fn compact(&mut self, index: u64) {
        self.node.mut_store().compact(index);
    }

    fn poll(&mut self) -> Option<QuorumOutput> {
        if self.outputs.is_empty() {
            self.pump();
        }
        self.outputs.pop_front()
    }

    fn role(&self) -> Role {
        match self.node.raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Follower if !self.node.raft.promotable() => Role::Observer,
            StateRole::Follower => Role::Follower,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
        }
    }

    fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != INVALID_ID)
    }

    fn term(&self) -> u64 {
        self.node.raft.term
    }

    fn committed(&self) -> u64 {
        self.node.raft.raft_log.committed
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        self.node.store().term_at(index)
    }

    fn best_peer(&self) -> Option<u64> {
        let tracker = self.node.raft.prs();
        let others: BTreeSet<u64> = tracker.conf().voters().ids().iter().collect();
        others
            .into_iter()
            .filter(|id| *id != self.id)
            .filter(|id| {
                tracker
                    .get(*id)
                    .is_some_and(|progress| progress.recent_active)
            })
            .max_by_key(|id| {
                (
                    tracker.get(*id).map_or(0, |progress| progress.matched),
                    !*id,
                )
            })
    }
}

/// Hands the engine's own log to `tracing`. Its "info" tells every vote, and is debug to us.
fn logger() -> slog::Logger {
    slog::Logger::root(ToTracing, slog::o!())
}

struct ToTracing;

impl slog::Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        struct Fields(String);
        impl slog::Serializer for Fields {
            fn emit_arguments(
                &mut self,
                key: slog::Key,
                value: &fmt::Arguments<'_>,
            ) -> slog::Result {
                use fmt::Write as _;
                let _ = write!(self.0, " {key}={value}");
                Ok(())
            }
        }
        let text = || {
            use slog::KV as _;
            let mut fields = Fields(record.msg().to_string());
            let _ = record.kv().serialize(record, &mut fields);
            fields.0
        };
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!("raft: {}", text()),
            slog::Level::Warning | slog::Level::Info => tracing::debug!("raft: {}", text()),
            slog::Level::Debug | slog::Level::Trace => tracing::trace!("raft: {}", text()),
        }
        Ok(())
    }
}
