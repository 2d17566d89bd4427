//! Leaving a view: suspicion, pre-vote, wedge, copying up to the cut, waiting for the old lease, writing the successor.
//!
//! BSS91 §5.5 (flush), with the agreement done by a compare-and-set instead of a protocol of our own.

use crate::config::{Config, planted};
use crate::core::{Core, Phase};
use crate::output::{Lag, Notice, Output};
use crate::time::{Instant, micros};
use crate::view::{Joiner, MemberId, View, ViewId};
use crate::wire::{self, Message, Pos};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Bytes copied to one member at a time.
const COPY_BYTES: usize = 256 * 1024;
/// Each rank waits this much longer before it proposes, so that two rarely do.
const STAGGER: Duration = Duration::from_millis(2);
/// Servers that differ by less than this are equally far; rank decides.
const LAG_STEP_BYTES: u64 = 1 << 20;
/// A joiner becomes full when it is at most this far behind.
pub(crate) const JOINER_GAP_BYTES: u64 = 1 << 20;

/// One attempt to leave the installed view.
#[derive(Serialize, Deserialize)]
pub(crate) struct Proposal {
    stage: Stage,
    began: Instant,
    retry_at: Instant,
    acks: BTreeMap<MemberId, Promise>,
    fetching: Option<MemberId>,
    lease_over_at: Option<Instant>,
}

#[derive(Serialize, Deserialize)]
enum Stage {
    /// A leader first sees that the coordinator answers and that its view is the newest.
    Checking,
    /// May this view be left?
    PreVote { granted: BTreeSet<MemberId> },
    /// Collecting promises and copying what they show.
    Flushing,
    /// The successor is being written.
    Writing { view: Box<View> },
}

/// A wedge-acknowledgement.
#[derive(Clone, Serialize, Deserialize)]
struct Promise {
    held: u64,
    /// No heartbeat of the old view was answered after this moment of the proposer's clock.
    answered_until: Option<Instant>,
    lag: Lag,
    heard: Instant,
}

impl Proposal {
    fn new(now: Instant, stage: Stage) -> Self {
        Self {
            stage,
            began: now,
            retry_at: now,
            acks: BTreeMap::new(),
            fetching: None,
            lease_over_at: None,
        }
    }
}

impl Core {
    // ---- when to propose ---------------------------------------------------------------------------------------

    /// Periodic work of a full member.
    pub(crate) fn tick_full(&mut self) {
        if self.proposal.is_some() {
            self.advance_proposal();
        } else if let Some(since) = self.wedged {
            let view = self.view();
            let rank = view.rank(&self.config.me).unwrap_or(0);
            let patience = self.config.suspect_after * u32::try_from(rank + 1).unwrap_or(u32::MAX);
            if self.now.since(since) >= patience {
                let stage = if self.phase == Phase::Leading {
                    Stage::Flushing
                } else {
                    Stage::PreVote {
                        granted: BTreeSet::new(),
                    }
                };
                self.propose(stage);
            }
        } else if self.phase == Phase::Leading {
            // A view's existence proves every earlier lease over: none is written while a usurped leader may speak.
            if self.now >= self.silent_before && self.leader_has_reason() {
                self.propose(Stage::Checking);
            }
        } else if self.leader_suspected() {
            self.propose(Stage::PreVote {
                granted: BTreeSet::new(),
            });
        }
        if self.phase == Phase::Backup && self.wedged.is_none() {
            self.remind_leader();
        }
        if self.phase == Phase::Backup && (self.wedged.is_some() || !self.leader_fine()) {
            self.read_view_sometimes();
            if self.all_is_lost() {
                self.become_gone();
            }
        }
        if self.phase == Phase::Leading && !self.may_emit(self.now) {
            self.read_view_sometimes();
        }
    }

    /// Whether this backup has recent word that the leader holds its lease.
    fn leader_fine(&self) -> bool {
        let leader = self.view().leader();
        let Some(p) = self.peers.get(leader) else {
            return true;
        };
        let hinted = self
            .proofs
            .ended(leader)
            .is_some_and(|at| at >= p.lease_stated);
        let fresh = self.now.since(p.lease_stated) < self.config.suspect_after;
        fresh && !hinted && !self.proofs.dead(leader)
    }

    fn leader_suspected(&mut self) -> bool {
        if self.leader_fine() {
            return false;
        }
        let view = self.view();
        let leader = view.leader().clone();
        let rank = view.rank(&self.config.me).unwrap_or(0);
        let Some(p) = self.peers.get(&leader) else {
            return false;
        };
        let silent = p.lease_stated + self.config.suspect_after;
        let since = self
            .proofs
            .ended(&leader)
            .map_or(silent, |at| at.min(silent));
        let wait = STAGGER * u32::try_from(rank.saturating_sub(1)).unwrap_or(u32::MAX);
        if self.now < since + wait {
            return false;
        }
        let proved = self.proofs.dead(&leader);
        self.suspect(&leader, proved);
        true
    }

    fn silent(&self, member: &MemberId, after: Duration) -> bool {
        self.peers
            .get(member)
            .is_some_and(|p| self.now.since(p.heard) >= after)
    }

    fn leader_has_reason(&mut self) -> bool {
        let view = self.view().clone();
        let others = view.full.iter().filter(|m| **m != self.config.me);
        let suspect_after = self.config.suspect_after;
        let (mut fine, mut unproved) = (0, 0);
        let mut bad = Vec::new();
        for m in others {
            let dead = self.proofs.dead(m);
            if dead || self.silent(m, suspect_after) {
                unproved += usize::from(!dead);
                bad.push((m.clone(), dead));
            } else {
                fine += 1;
            }
        }
        for (m, dead) in &bad {
            self.suspect(m, *dead);
        }
        let enough = fine >= usize::from(view.k);
        if enough {
            self.too_few_since = None;
        }
        if !bad.is_empty() {
            // With too few that answer, the others might be leaving this view: they shall win.
            let since = *self.too_few_since.get_or_insert(self.now);
            let waited = self.now.since(since) >= suspect_after + view.lease();
            if enough || unproved == 0 || waited {
                return true;
            }
        }
        let joiner_gone = view.joining.iter().any(|j| {
            self.dropped.contains(&j.member)
                || self.proofs.dead(&j.member)
                || self.silent(&j.member, suspect_after * 4)
        });
        let joiner_ready = view.joining.iter().any(|j| self.promotable(&j.member));
        let wants_out = self.handing_over || self.leaving;
        let in_view = |m: &&MemberId| view.contains(m);
        let leavers = self.leave_requests.iter().any(|m| in_view(&m));
        !self.join_requests.is_empty() || joiner_gone || joiner_ready || wants_out || leavers
    }

    fn promotable(&self, joiner: &MemberId) -> bool {
        !self.dropped.contains(joiner)
            && self
                .peers
                .get(joiner)
                .is_some_and(|p| p.ready && self.log.bytes_after(p.held) <= JOINER_GAP_BYTES)
    }

    fn propose(&mut self, stage: Stage) {
        let flush = matches!(stage, Stage::Flushing);
        self.read_at = self.now;
        self.proposal = Some(Proposal::new(self.now, stage));
        if flush {
            self.begin_flush();
        }
        self.advance_proposal();
    }

    // ---- the steps ---------------------------------------------------------------------------------------------

    fn advance_proposal(&mut self) {
        let now = self.now;
        let interval = self.config.heartbeat / 4;
        let Some(p) = &mut self.proposal else { return };
        let retry = now >= p.retry_at;
        if retry {
            p.retry_at = now + interval;
        }
        match &p.stage {
            Stage::Checking => self.read_view(),
            Stage::PreVote { .. } => {
                if self.wedged.is_none() && self.leader_fine() {
                    self.proposal = None;
                    return;
                }
                if retry {
                    self.send_pre_vote();
                }
                self.count_pre_votes();
            }
            Stage::Flushing => {
                if retry {
                    self.send_wedge();
                }
                self.advance_flush(retry);
            }
            Stage::Writing { .. } => {
                if !self.writing {
                    self.read_view_sometimes();
                }
            }
        }
    }

    fn send_pre_vote(&mut self) {
        let body = wire::body(&self.header(), &[Message::PreVote]);
        let to = self.view().full.clone();
        self.send_all(&to, body);
    }

    pub(crate) fn on_pre_vote(&mut self, from: &MemberId) {
        let granted = match self.phase {
            _ if !self.view().is_full(from) => return,
            Phase::Leading => self.wedged.is_some() || !self.may_emit(self.now),
            Phase::Backup => self.wedged.is_some() || !self.leader_fine(),
            Phase::Idle | Phase::Seeking | Phase::Joining | Phase::Gone => return,
        };
        self.send(from, Message::PreVoteAnswer { granted });
    }

    pub(crate) fn on_pre_vote_answer(&mut self, from: &MemberId, yes: bool) {
        if let Some(Proposal {
            stage: Stage::PreVote { granted },
            ..
        }) = &mut self.proposal
        {
            if yes {
                granted.insert(from.clone());
            } else {
                granted.remove(from);
            }
            self.count_pre_votes();
        }
    }

    fn count_pre_votes(&mut self) {
        let view = self.view();
        let (leader, quorum) = (view.leader().clone(), view.quorum());
        let Some(Proposal {
            stage: Stage::PreVote { granted },
            ..
        }) = &self.proposal
        else {
            return;
        };
        let backups = 1 + granted.iter().filter(|m| **m != leader).count();
        if granted.contains(&leader) || backups >= quorum {
            self.begin_flush();
            self.send_wedge();
            self.advance_flush(false);
        }
    }

    /// Promises to leave the installed view.
    pub(crate) fn wedge(&mut self) {
        if self.wedged.is_none() {
            self.wedged = Some(self.now);
            self.counters.wedges += 1;
            self.outputs.push_back(Output::Wedged);
            let from = self.view().id;
            self.notice(Notice::ViewChange { from });
        }
    }

    fn begin_flush(&mut self) {
        self.wedge();
        let mine = Promise {
            held: self.log.held(),
            answered_until: self.answered_leader,
            lag: self.lag,
            heard: self.now,
        };
        let (me, now) = (self.config.me.clone(), self.now);
        if let Some(p) = &mut self.proposal {
            p.stage = Stage::Flushing;
            p.began = now;
            p.acks.insert(me, mine);
        }
    }

    fn send_wedge(&mut self) {
        let view = self.view();
        let mut to = view.full.clone();
        if self.phase == Phase::Leading {
            let ready = view
                .joining
                .iter()
                .map(|j| &j.member)
                .filter(|m| self.promotable(m));
            to.extend(ready.cloned());
        }
        let body = wire::body(&self.header(), &[Message::Wedge]);
        self.send_all(&to, body);
    }

    pub(crate) fn on_wedge(&mut self, from: &MemberId) {
        let view = self.view();
        let may = match self.phase {
            Phase::Backup | Phase::Leading => view.is_full(from),
            Phase::Joining => self.ready && view.leader() == from,
            Phase::Idle | Phase::Seeking | Phase::Gone => false,
        };
        if may {
            self.wedge();
            self.send_wedge_ack(from);
        }
    }

    pub(crate) fn send_wedge_ack(&mut self, to: &MemberId) {
        let answered = self.answered_leader.map(|at| micros(self.now.since(at)));
        let message = Message::WedgeAck {
            held: self.log.held(),
            answered_ago_us: answered,
            clock_us: self.clock.now(self.now),
            lag: self.lag,
            ready: self.phase == Phase::Joining,
        };
        self.send(to, message);
    }

    pub(crate) fn on_wedge_ack(
        &mut self,
        from: &MemberId,
        held: u64,
        answered_ago_us: Option<u64>,
        lag: Lag,
        ready: bool,
    ) {
        let now = self.now;
        if ready == self.view().is_full(from) {
            return; // it and we differ about what it is
        }
        let Some(p) = &mut self.proposal else { return };
        if !matches!(p.stage, Stage::Flushing) {
            return;
        }
        // It was sent before it came: the answer was given no later than this.
        let until = answered_ago_us.map(|us| now.back(Duration::from_micros(us)));
        let before = p.acks.get(from).map(|a| (a.held, a.answered_until));
        let until = match before {
            Some((_, Some(earlier))) => until.map(|u| u.min(earlier)),
            _ => until,
        };
        let promise = Promise {
            held,
            answered_until: until,
            lag,
            heard: now,
        };
        p.acks.insert(from.clone(), promise);
        let progress = before.is_none_or(|(h, _)| held > h);
        self.advance_flush(progress);
    }

    pub(crate) fn fetch_from(&self) -> Option<MemberId> {
        let p = self.proposal.as_ref()?;
        self.wedged?;
        p.fetching.clone()
    }

    pub(crate) fn lease_over_at(&self) -> Option<Instant> {
        self.proposal.as_ref()?.lease_over_at
    }

    /// This process was stopped: nobody is left out for the silence.
    pub(crate) fn on_late_wake(&mut self) {
        let now = self.now;
        if let Some(p) = &mut self.proposal {
            p.began = p.began.max(now);
            for a in p.acks.values_mut() {
                a.heard = a.heard.max(now);
            }
        }
    }

    /// The way to a new view is open: enough promises, every proposed member holds up to the cut, the old lease is over.
    fn advance_flush(&mut self, may_copy: bool) {
        let view = self.view().clone();
        let (me, now) = (self.config.me.clone(), self.now);
        let leader = view.leader().clone();
        let Some(p) = &self.proposal else { return };
        if !matches!(p.stage, Stage::Flushing) {
            return;
        }
        let waited = now.since(p.began);
        let patience = self.config.suspect_after;
        let missing = |m: &MemberId| *m != me && !p.acks.contains_key(m) && !self.proofs.dead(m);
        let slow = |m: &MemberId| {
            let hears = self.phase == Phase::Leading || *m == leader;
            let hinted = *m == leader && self.proofs.ended(m).is_some();
            waited >= patience || hinted || (hears && self.silent(m, patience))
        };
        if view.full.iter().any(|m| missing(m) && !slow(m)) {
            return;
        }
        if self.phase == Phase::Leading && waited < self.config.heartbeat {
            let mut ready = view.joining.iter().map(|j| &j.member);
            if ready.any(|m| missing(m) && self.promotable(m)) {
                return;
            }
        }
        // Those that can still give what they hold.
        let sources: BTreeMap<&MemberId, &Promise> = p
            .acks
            .iter()
            .filter(|(m, a)| {
                view.is_full(m)
                    && (**m == me || (!self.proofs.dead(m) && now.since(a.heard) < patience * 2))
            })
            .collect();
        let mut target = sources.values().map(|a| a.held).max().unwrap_or(0);
        target = target.max(self.log.held());
        if planted!(self.config, CutIsOwnHighest) {
            target = self.log.held();
        }
        // A promise of one that died is counted only if the cut covers what it held: else an event that only the dead
        // hold, and that may be stable, would be lost while the count says that none can be.
        let covered = |m: &MemberId| p.acks.get(m).is_some_and(|a| a.held <= target || *m == me);
        let backups = view
            .full
            .iter()
            .filter(|m| **m != leader && covered(m))
            .count();
        let lax = planted!(self.config, CutIsOwnHighest);
        if !(covered(&leader) || backups >= view.quorum() || lax) {
            return;
        }
        if self.log.held() < target {
            let holder = sources
                .iter()
                .find(|(_, a)| a.held >= target)
                .map(|(m, _)| (*m).clone());
            if let Some(p) = &mut self.proposal {
                p.fetching = holder;
            }
            self.assembler.announce(target);
            return;
        }
        let leaves = |m: &MemberId| self.leave_requests.contains(m) || (*m == me && self.leaving);
        let proposed: Vec<MemberId> = sources
            .keys()
            .filter(|m| !leaves(m))
            .map(|m| (*m).clone())
            .collect();
        let behind: Vec<(MemberId, u64)> = proposed
            .iter()
            .filter(|m| **m != me)
            .filter_map(|m| p.acks.get(m).map(|a| (m.clone(), a.held)))
            .filter(|(_, held)| *held < target)
            .collect();
        let promoted: Vec<MemberId> = view
            .joining
            .iter()
            .map(|j| &j.member)
            .filter(|m| self.phase == Phase::Leading && p.acks.contains_key(*m))
            .filter(|m| !self.proofs.dead(m) && !leaves(m))
            .cloned()
            .collect();
        let late: Vec<(MemberId, u64)> = promoted
            .iter()
            .filter_map(|m| p.acks.get(m).map(|a| (m.clone(), a.held)))
            .filter(|(_, held)| *held < target)
            .collect();
        if let Some(p) = &mut self.proposal {
            p.fetching = None;
        }
        let copying = !behind.is_empty() || (!late.is_empty() && waited < patience);
        if copying && !planted!(self.config, CutIsOwnHighest) {
            if may_copy {
                for (m, held) in behind.into_iter().chain(late) {
                    self.copy_to(&m, held + 1, target);
                }
            }
            return;
        }
        let promoted: Vec<MemberId> = promoted
            .into_iter()
            .filter(|m| !late.iter().any(|(l, _)| l == m))
            .collect();
        if self.old_lease_may_hold(&view) {
            return;
        }
        if proposed.is_empty() {
            self.become_gone(); // leaving, and nobody is there to go on
            return;
        }
        let next = self.successor(&view, proposed, promoted, target);
        self.write(next);
    }

    fn copy_to(&mut self, to: &MemberId, first: u64, last: u64) {
        if first < self.log.first() {
            return; // it reports less than every full member held: its error, it will be left out
        }
        let mut header = self.header();
        header.flags |= wire::COPY;
        let until = Pos::start(last + 1);
        let limits = &self.config.limits;
        let (bodies, _) = self.log.pack(
            &header.bytes(),
            Pos::start(first),
            until,
            COPY_BYTES,
            limits,
        );
        self.counters.retransmitted += bodies.len() as u64;
        self.send_bodies(to, bodies);
    }

    /// R2: whether the lease of the view that is being left may still hold; sets the timer.
    fn old_lease_may_hold(&mut self, view: &View) -> bool {
        let leader = view.leader();
        let Some(p) = &mut self.proposal else {
            return true;
        };
        p.lease_over_at = None;
        let over = p.acks.contains_key(leader) || self.proofs.dead(leader);
        if over || planted!(self.config, SkipLeaseWait) {
            return false;
        }
        let answers = p.acks.iter().filter(|(m, _)| view.is_full(m));
        let Some(last) = answers.filter_map(|(_, a)| a.answered_until).max() else {
            return false; // none of a set that meets every set of k ever answered: there was no lease
        };
        let until = last + view.lease() + Config::drift_margin(view.lease());
        if self.now < until {
            p.lease_over_at = Some(until);
            return true;
        }
        false
    }

    /// The view after `view`.
    fn successor(
        &mut self,
        view: &View,
        proposed: Vec<MemberId>,
        promoted: Vec<MemberId>,
        cut: u64,
    ) -> View {
        let old_leader = view.leader();
        let leading = self.phase == Phase::Leading;
        let acks = self
            .proposal
            .as_ref()
            .map(|p| p.acks.clone())
            .unwrap_or_default();
        let rank_of = |m: &MemberId| view.rank(m).unwrap_or(usize::MAX);
        let mut full: Vec<MemberId> = proposed;
        full.sort_by_key(rank_of);
        let stays = full.contains(old_leader) && !(leading && self.handing_over && full.len() > 1);
        let first = if stays {
            old_leader.clone()
        } else {
            let fitness = |m: &&MemberId| {
                let lag = acks
                    .get(*m)
                    .filter(|_| !planted!(self.config, LeaderUnfit))
                    .map_or(Lag::default(), |a| a.lag);
                (
                    *m == old_leader,
                    Some(&*m.name) != self.hand_over_to.as_deref(),
                    lag.unfit,
                    lag.reluctant,
                    lag.behind_bytes / LAG_STEP_BYTES,
                    Some(&*m.name) != self.config.prefer.as_deref(),
                    rank_of(m),
                )
            };
            full.iter()
                .min_by_key(fitness)
                .expect("somebody is proposed")
                .clone()
        };
        full.retain(|m| *m != first);
        full.insert(0, first);
        let id = ViewId(view.id.0 + 1);
        let mut joining = Vec::new();
        if stays {
            full.extend(promoted);
            let long = self.config.suspect_after * 4;
            for j in &view.joining {
                let m = &j.member;
                let gone = leading
                    && (self.dropped.contains(m)
                        || self.leave_requests.contains(m)
                        || self.proofs.dead(m)
                        || self.silent(m, long));
                let replaced = self.join_requests.iter().any(|r| r.name == m.name);
                if !gone && !replaced && !full.contains(m) {
                    joining.push(j.clone());
                }
            }
            if leading {
                for m in &self.join_requests {
                    if !full.iter().any(|f| f.name == m.name) {
                        joining.push(Joiner {
                            member: m.clone(),
                            since: id,
                            cut,
                        });
                    }
                }
            }
        }
        let k = self.config.resilience.k(full.len());
        let lease = if k == 0 {
            self.config.lease_alone
        } else {
            self.config.lease
        };
        // The old leader may have spoken for a lease after its last datagram that anyone here heard.
        let ahead = if planted!(self.config, ClockWithoutLease) {
            0
        } else {
            micros(view.lease().max(lease))
        };
        View {
            instance: view.instance,
            generation: view.generation,
            id,
            k,
            lease_us: micros(lease),
            // Every acknowledgement's clock was observed when it came (R4).
            clock_us: self.clock.now(self.now) + ahead,
            cut,
            proposal: self.rng.next_u128(),
            full,
            joining,
        }
    }

    fn write(&mut self, view: View) {
        self.compare_and_set(Some(self.version), &view);
        if let Some(p) = &mut self.proposal {
            p.stage = Stage::Writing {
                view: Box::new(view),
            };
        }
    }

    // ---- the coordinator's answers -----------------------------------------------------------------------------

    /// The znode was read and holds the view that is installed here.
    pub(crate) fn on_read_same(&mut self) {
        let Some(p) = &self.proposal else { return };
        match &p.stage {
            Stage::Checking => {
                self.begin_flush();
                self.send_wedge();
                self.advance_flush(false);
            }
            Stage::Writing { view } if !self.writing => {
                // The write's outcome was unknown and it is not there (yet): the same again, whichever lands first.
                let view = view.clone();
                self.compare_and_set(Some(self.version), &view);
            }
            Stage::Writing { .. } | Stage::PreVote { .. } | Stage::Flushing => {}
        }
    }

    /// Our successor is in the znode.
    pub(crate) fn on_written(&mut self, version: i32) {
        let Some(Proposal {
            stage: Stage::Writing { view },
            ..
        }) = &self.proposal
        else {
            return;
        };
        let view = view.clone();
        self.on_view(*view, version);
    }

    /// Tells everyone concerned of the view that this member wrote, before it installs it. What is lost of it is made up for by
    /// [`Core::remind_leader`].
    pub(crate) fn tell_written(&mut self, view: &View, version: i32) {
        let leads = *view.leader() == self.config.me;
        let mut concerned: BTreeSet<MemberId> = view.members().cloned().collect();
        if let Some(old) = &self.view {
            concerned.extend(old.members().cloned());
        }
        // As the new leader it tells the members with its first heartbeat; those left out are told here.
        concerned.retain(|m| !(leads && view.contains(m)));
        let message = Message::NewView {
            version,
            znode: view.encode(),
        };
        let body: Bytes = wire::body(&self.header(), &[message]);
        let to: Vec<MemberId> = concerned.into_iter().collect();
        self.send_all(&to, body);
    }

    /// A leader that says nothing may not know that it leads: another wrote the view, and its word was lost.
    fn remind_leader(&mut self) {
        let leader = self.view().leader().clone();
        if self.silent(&leader, self.config.heartbeat + self.config.heartbeat / 2) {
            self.tell_view(&leader);
        }
    }

    /// Whether the proposal that is being written is this one.
    pub(crate) fn wrote(&self, proposal: u128) -> bool {
        matches!(&self.proposal, Some(Proposal { stage: Stage::Writing { view }, .. })
            if view.proposal == proposal)
    }
}
