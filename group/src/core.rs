//! The only mutator: one member of one group.
//!
//! Entry points and time are here. What a datagram does is in `receiving.rs`, what goes out in `sending.rs`, leaving a view in
//! `flush.rs`, getting into one and installing it in `membership.rs`.

use crate::config::{Config, planted};
use crate::detector::{Peer, Proofs};
use crate::fbcast::{Assembler, EventLog};
use crate::flush::{JOINER_GAP_BYTES, Proposal};
use crate::membership::Seeking;
use crate::output::{
    Command, CommandError, ControlEvent, Counters, GroupStatus, Lag, MemberStatus, Notice, Output,
    RegistryReply, Role,
};
use crate::rng::Rng;
use crate::time::{Instant, micros};
use crate::transfer::{Donor, Receiving};
use crate::view::{MemberId, View};
use crate::wire::{self, Pos, Reader};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Where this member stands.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Made, and not told to join.
    Idle,
    /// In no view: founding or asking to join.
    Seeking,
    /// Joining member of the installed view.
    Joining,
    /// Full member of the installed view, not leading.
    Backup,
    /// Leader of the installed view.
    Leading,
    /// Out for good.
    Gone,
}

/// Service clock: microseconds that never go back, across any number of leaders.
#[derive(Copy, Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ServiceClock {
    seen_us: u64,
    running_since: Option<(Instant, u64)>,
}

impl ServiceClock {
    pub(crate) fn now(&self, now: Instant) -> u64 {
        let running = self
            .running_since
            .map_or(0, |(at, us)| us + micros(now.since(at)));
        running.max(self.seen_us)
    }

    pub(crate) fn observe(&mut self, us: u64) {
        self.seen_us = self.seen_us.max(us);
    }

    /// Lets the clock run from `now`, at `us` or above.
    pub(crate) fn run(&mut self, now: Instant, us: u64) {
        let from = self.now(now).max(us);
        self.running_since = Some((now, from));
    }

    pub(crate) fn stop(&mut self, now: Instant) {
        self.seen_us = self.now(now);
        self.running_since = None;
    }
}

/// Acknowledgements that a receiver owes its leader.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct AckDebt {
    pub(crate) at_once: bool,
    pub(crate) bytes: usize,
    pub(crate) by: Option<Instant>,
}

/// One member of one process group: views, fbcast, stability, leases, state transfer.
///
/// No I/O, no clock, no randomness. Call one entry point, drain [`Core::poll_output`] to `None` and execute in order,
/// then read [`Core::poll_timeout`]. One core is one incarnation; after [`Output::Outside`] it is spent.
///
/// Its serde form is the inside of an image, without the checks: [`Core::snapshot`] and [`Core::restore`] are the way.
/// A field that is added here is in the image; raise the format's number in `snapshot.rs`.
#[derive(Serialize, Deserialize)]
pub struct Core {
    #[serde(with = "crate::snapshot::identity")]
    pub(crate) config: Config,
    pub(crate) rng: Rng,
    pub(crate) now: Instant,
    pub(crate) phase: Phase,
    pub(crate) view: Option<View>,
    pub(crate) version: i32,
    /// Set from the promise to leave `view` until another is installed.
    pub(crate) wedged: Option<Instant>,
    pub(crate) seeking: Seeking,
    pub(crate) proposal: Option<Proposal>,
    pub(crate) clock: ServiceClock,
    pub(crate) proofs: Proofs,
    pub(crate) peers: BTreeMap<MemberId, Peer>,
    /// Invariant: on a leader, holds all its events after `trim`.
    pub(crate) log: EventLog,
    pub(crate) assembler: Assembler,
    /// Invariant: delivered <= log.held(); equal on a leader.
    pub(crate) delivered: u64,
    pub(crate) stable: u64,
    pub(crate) trim: u64,
    pub(crate) next_send: Pos,
    pub(crate) urgent_to: u64,
    pub(crate) probe_at: Option<Instant>,
    pub(crate) heartbeat_at: Instant,
    pub(crate) ack: AckDebt,
    /// Member: when it last answered a heartbeat of this view.
    pub(crate) answered_leader: Option<Instant>,
    pub(crate) lag: Lag,
    /// Leader alone in its view: until when its coordinator write lets it speak.
    pub(crate) alone_until: Option<Instant>,
    pub(crate) renewing: Option<(u64, Instant)>,
    pub(crate) renew_at: Instant,
    /// A usurper of an unproved lone leader waits once more.
    pub(crate) silent_before: Instant,
    pub(crate) reading: bool,
    pub(crate) read_at: Instant,
    pub(crate) writing: bool,
    /// When the last compare-and-set was sent.
    pub(crate) cas_sent: Instant,
    pub(crate) join_requests: BTreeSet<MemberId>,
    pub(crate) leave_requests: BTreeSet<MemberId>,
    pub(crate) dropped: BTreeSet<MemberId>,
    pub(crate) leaving: bool,
    pub(crate) handing_over: bool,
    /// Who shall lead then, by name.
    pub(crate) hand_over_to: Option<String>,
    pub(crate) too_few_since: Option<Instant>,
    pub(crate) lost_since: Option<Instant>,
    pub(crate) donors: BTreeMap<MemberId, Option<Donor>>,
    pub(crate) receiving: Option<Receiving>,
    pub(crate) joined_since: u64,
    pub(crate) checkpoint_done: bool,
    pub(crate) ready: bool,
    /// A proposer to whom a promise must be repeated because copies came.
    pub(crate) owed_wedge_ack: BTreeSet<MemberId>,
    pub(crate) suspected: BTreeSet<MemberId>,
    pub(crate) lease_held: bool,
    pub(crate) instance: Option<u128>,
    pub(crate) tick_at: Instant,
    pub(crate) due: Option<Instant>,
    /// Bytes that may be sent again because of the datagram that is being taken.
    #[serde(skip)]
    pub(crate) resend_left: usize,
    /// Empty whenever an image is taken.
    #[serde(skip)]
    pub(crate) outputs: VecDeque<Output>,
    pub(crate) counters: Counters,
}

impl Core {
    /// A member that has not joined. `seed` drives its proposal ids; `now` starts its timers.
    ///
    /// # Panics
    /// When the limits cannot work: datagrams below 256 bytes, events of 2 GiB or more; or a lease not below
    /// `suspect_after`.
    pub fn new(config: Config, seed: u64, now: Instant) -> Self {
        assert!(
            config.limits.datagram_bytes_max >= 256,
            "a datagram holds a header and a chunk"
        );
        assert!(
            config.limits.datagram_bytes_max <= 65_000,
            "a datagram fits UDP"
        );
        assert!(
            config.limits.event_bytes_max < 1 << 31,
            "an event's length fits 32 bits"
        );
        assert!(
            config.lease < config.suspect_after,
            "the lease ends before anyone is suspected"
        );
        Self {
            rng: Rng::new(seed),
            now,
            phase: Phase::Idle,
            view: None,
            version: 0,
            wedged: None,
            seeking: Seeking::default(),
            proposal: None,
            clock: ServiceClock::default(),
            proofs: Proofs::default(),
            peers: BTreeMap::new(),
            log: EventLog::starting_after(0),
            assembler: Assembler::starting_after(0),
            delivered: 0,
            stable: 0,
            trim: 0,
            next_send: Pos::start(1),
            urgent_to: 0,
            probe_at: None,
            heartbeat_at: now,
            ack: AckDebt::default(),
            answered_leader: None,
            lag: Lag::default(),
            alone_until: None,
            renewing: None,
            renew_at: now,
            silent_before: now,
            reading: false,
            read_at: now,
            writing: false,
            cas_sent: now,
            join_requests: BTreeSet::new(),
            leave_requests: BTreeSet::new(),
            dropped: BTreeSet::new(),
            leaving: false,
            handing_over: false,
            hand_over_to: None,
            too_few_since: None,
            lost_since: None,
            donors: BTreeMap::new(),
            receiving: None,
            joined_since: 0,
            checkpoint_done: false,
            ready: false,
            owed_wedge_ack: BTreeSet::new(),
            suspected: BTreeSet::new(),
            lease_held: false,
            instance: None,
            tick_at: now,
            due: None,
            resend_left: 0,
            outputs: VecDeque::new(),
            counters: Counters::default(),
            config,
        }
    }

    // ---- entry points ------------------------------------------------------------------------------------------

    /// A datagram's body, from a member that the driver has authenticated.
    pub fn handle_datagram(&mut self, now: Instant, from: &MemberId, body: &[u8]) {
        self.begin_datagram();
        self.handle_body(now, from, body);
    }

    /// The bodies that follow came in one datagram.
    pub(crate) fn begin_datagram(&mut self) {
        self.resend_left = crate::receiving::RESEND_BYTES;
    }

    pub(crate) fn handle_body(&mut self, now: Instant, from: &MemberId, body: &[u8]) {
        self.enter(now);
        if matches!(self.phase, Phase::Idle | Phase::Gone) || *from == self.config.me {
            return;
        }
        let Some((header, mut items)) = Reader::new(body) else {
            self.counters.malformed += 1;
            return;
        };
        self.clock.observe(header.clock_us);
        for item in items.by_ref() {
            self.on_item(from, &header, item);
            if self.phase == Phase::Gone {
                return;
            }
        }
        if items.damaged() {
            self.counters.malformed += 1;
        }
        self.on_header(from, &header);
    }

    /// The coordinator's answer to a request.
    pub fn handle_registry(&mut self, now: Instant, reply: RegistryReply) {
        self.enter(now);
        self.on_registry(reply);
        self.tick();
    }

    /// News of a control connection.
    pub fn handle_control(&mut self, now: Instant, peer: &str, event: ControlEvent) {
        self.enter(now);
        self.proofs.record(now, peer, event);
        if !matches!(self.phase, Phase::Idle | Phase::Gone) {
            self.tick();
        }
    }

    /// The node's wish.
    ///
    /// # Errors
    /// [`CommandError`] when this member's role does not allow it.
    pub fn handle_command(&mut self, now: Instant, command: Command) -> Result<(), CommandError> {
        self.enter(now);
        self.on_command(command)?;
        self.tick();
        Ok(())
    }

    /// What this replica reports of itself from now on.
    pub fn set_progress(&mut self, lag: Lag) {
        self.lag = lag;
    }

    /// Multicasts an event; `urgent` when output waits for it. The caller has applied it already: it is not delivered
    /// back.
    ///
    /// # Panics
    /// When this member does not lead an installed, unwedged view; when `number` is not the next; when the payload is
    /// longer than the limit. All three would tear the replicas apart.
    pub fn multicast(&mut self, now: Instant, number: u64, payload: Bytes, urgent: bool) {
        self.enter(now);
        assert!(
            self.can_multicast(),
            "only the leader of an unwedged view multicasts"
        );
        assert_eq!(number, self.log.next(), "events are numbered without a gap");
        assert!(
            payload.len() <= self.config.limits.event_bytes_max,
            "event_bytes_max"
        );
        self.log.push(payload);
        self.delivered = number;
        if urgent {
            self.urgent_to = number;
        }
        if self.view().k == 0 {
            self.update_stable();
        }
    }

    /// The number that the next event has.
    pub fn next_number(&self) -> u64 {
        self.log.next()
    }

    /// Whether [`Core::multicast`] is allowed now.
    pub fn can_multicast(&self) -> bool {
        self.phase == Phase::Leading && self.wedged.is_none()
    }

    /// Whether the leader should take new input: false while too much is unstable or unheld, or while a joiner that is
    /// there falls behind (a lone leader could else outrun it for ever).
    pub fn window_open(&self) -> bool {
        let limits = &self.config.limits;
        self.can_multicast()
            && self.log.bytes_after(self.stable) < limits.window_bytes_max
            && self.log.bytes_after(self.full_held()) < limits.retained_bytes_max
            && self.joiners().all(|(m, p)| {
                // One that is ready shall come near enough to become full.
                let most = if p.ready {
                    JOINER_GAP_BYTES / 2
                } else {
                    limits.window_bytes_max
                };
                self.dropped.contains(m)
                    || self.now.since(p.heard) >= self.config.suspect_after
                    || self.log.bytes_after(p.held) < most
            })
    }

    pub(crate) fn joiners(&self) -> impl Iterator<Item = (&MemberId, &Peer)> {
        self.peers
            .iter()
            .filter(|(m, _)| self.view.as_ref().is_some_and(|v| v.joiner(m).is_some()))
    }

    /// Until when this member, as leader, may emit (R2). `None`: not at all.
    pub fn lease_until(&self) -> Option<Instant> {
        if !self.can_multicast() || self.now < self.silent_before {
            return None;
        }
        let view = self.view();
        let mut k = usize::from(view.k);
        if k == 0 {
            return self.alone_until;
        }
        if planted!(self.config, LeaseByOneTooFew) {
            k = k.max(2) - 1;
        }
        let mut answered: Vec<Instant> = self
            .peers
            .iter()
            .filter(|(m, _)| view.is_full(m))
            .filter_map(|(_, p)| p.answered)
            .collect();
        answered.sort_unstable_by(|a, b| b.cmp(a));
        answered.get(k - 1).map(|t| *t + view.lease())
    }

    /// Whether this member may emit at `now`: ask before every flush to the wire.
    pub fn may_emit(&self, now: Instant) -> bool {
        self.lease_until().is_some_and(|until| now < until)
    }

    /// A service clock value seen elsewhere (a checkpoint, a record).
    pub fn observe_clock(&mut self, clock_us: u64) {
        self.clock.observe(clock_us);
    }

    /// The service clock in microseconds; it runs on a leader and stands elsewhere.
    pub fn service_clock(&self, now: Instant) -> u64 {
        self.clock.now(now)
    }

    /// Sends a message on the unicast channel to the leader: at most one datagram, not repeated when lost. Returns false,
    /// and sends nothing, when there is no leader to send to or the payload is longer than
    /// [`Core::unicast_bytes_max`].
    pub fn send_to_leader(&mut self, now: Instant, payload: &[u8]) -> bool {
        self.enter(now);
        let following = matches!(self.phase, Phase::Backup | Phase::Joining);
        if !following || self.wedged.is_some() || payload.len() > self.unicast_bytes_max() {
            return false;
        }
        let mut out = BytesMut::with_capacity(wire::HEADER_BYTES + 3 + payload.len());
        self.header().put(&mut out);
        wire::put_unicast(&mut out, payload);
        let leader = self.view().leader().clone();
        self.send_bodies(&leader, vec![out.freeze()]);
        true
    }

    /// Longest payload of a unicast message.
    pub fn unicast_bytes_max(&self) -> usize {
        self.config.limits.datagram_bytes_max - wire::HEADER_BYTES - 3
    }

    /// A timer: harmless when early, late or repeated. Drain the sockets first: a datagram that waits there is a sign of
    /// life that must be counted before a silence is judged.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.enter(now);
        if matches!(self.phase, Phase::Idle | Phase::Gone) {
            return;
        }
        if self.probe_at.is_some_and(|t| t <= now) {
            self.probe_at = None;
            self.probe();
        }
        if self.tick_at <= now {
            self.tick_at = now + self.tick_interval();
        }
        self.tick();
    }

    /// When to call [`Core::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if matches!(self.phase, Phase::Idle | Phase::Gone) {
            return None;
        }
        let mut at = self.tick_at;
        for t in [
            self.ack.by,
            self.probe_at,
            self.nak_due(),
            self.lease_over_at(),
        ] {
            at = t.map_or(at, |t| at.min(t.max(self.now)));
        }
        Some(at)
    }

    /// The next output that is already decided, without the acknowledgements and bursts that [`Core::poll_output`] forms
    /// when nothing else is left: use it between the datagrams of one batch, so that one acknowledgement covers them all.
    pub fn poll_ready(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The next output; drain to `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.outputs.is_empty() {
            self.flush_sends();
        }
        self.outputs.pop_front()
    }

    /// For status and metrics.
    pub fn status(&self) -> GroupStatus {
        let members = self.view.iter().flat_map(|v| v.members()).map(|m| {
            let peer = self.peers.get(m);
            let me = *m == self.config.me;
            MemberStatus {
                member: m.clone(),
                full: self.view.as_ref().is_some_and(|v| v.is_full(m)),
                held: if me {
                    self.log.held()
                } else {
                    peer.map_or(0, |p| p.held)
                },
                lag: if me {
                    self.lag
                } else {
                    peer.map_or(Lag::default(), |p| p.lag)
                },
                last_heard: if me {
                    Some(self.now)
                } else {
                    peer.map(|p| p.heard)
                },
            }
        });
        let mut transfers: BTreeMap<MemberId, u64> = self
            .donors
            .iter()
            .map(|(m, d)| (m.clone(), d.as_ref().map_or(0, |d| d.asked)))
            .collect();
        if let Some(r) = &self.receiving {
            transfers.insert(self.config.me.clone(), r.at);
        }
        GroupStatus {
            view: self.view.clone(),
            role: self.role(),
            wedged: self.wedged.is_some(),
            members: members.collect(),
            held: self.log.held(),
            stable: self.stable,
            retained_bytes: self.log.bytes_after(self.log.first() - 1),
            lease_until: self.lease_until(),
            counters: self.counters,
            transfers,
        }
    }

    /// The role in the installed view.
    pub fn role(&self) -> Option<Role> {
        match self.phase {
            Phase::Idle | Phase::Seeking | Phase::Gone => None,
            Phase::Joining => Some(Role::Joining),
            Phase::Backup => Some(Role::Backup),
            Phase::Leading => Some(Role::Leader),
        }
    }

    /// This incarnation.
    pub fn me(&self) -> &MemberId {
        &self.config.me
    }

    // ---- time --------------------------------------------------------------------------------------------------

    /// Every entry begins here. A call that comes much later than was asked for means that this process was stopped: the
    /// silence was its own, and nobody is suspected for it. (Leases are not moved: they are judged by the clock alone.)
    fn enter(&mut self, now: Instant) {
        assert!(now >= self.now, "time goes back");
        if self
            .due
            .is_some_and(|due| now.since(due) > self.config.heartbeat)
        {
            for p in self.peers.values_mut() {
                p.heard = now;
                p.lease_stated = now;
            }
            self.too_few_since = None;
            self.lost_since = None;
            if self.proposal.is_some() {
                self.on_late_wake();
            }
        }
        self.now = now;
        self.due = self.poll_timeout();
    }

    fn tick_interval(&self) -> Duration {
        let half = self.config.heartbeat / 2;
        if self.proposal.is_some() {
            half.min(Duration::from_millis(2))
        } else {
            half
        }
    }

    /// Everything that is judged again and again. Repeating it is harmless.
    pub(crate) fn tick(&mut self) {
        let tick = self.now + self.tick_interval();
        self.tick_at = self.tick_at.min(tick).max(self.now);
        match self.phase {
            Phase::Idle | Phase::Gone => return,
            Phase::Seeking => self.seek(),
            Phase::Joining => self.tick_joining(),
            Phase::Backup | Phase::Leading => self.tick_full(),
        }
        if self.phase == Phase::Leading && self.wedged.is_none() {
            self.lead();
        }
        if self.tick_at <= self.now {
            self.tick_at = tick;
        }
    }

    /// What was just learnt is judged when the sockets are drained, and not only at the next tick.
    pub(crate) fn act_at_once(&mut self) {
        self.tick_at = self.now;
    }

    /// The leader's periodic work.
    fn lead(&mut self) {
        if self.now >= self.heartbeat_at {
            self.heartbeat_at = self.now + self.config.heartbeat;
            self.send_heartbeat(&[]);
        }
        self.renew_alone();
        let holds = self.may_emit(self.now);
        if self.lease_held && !holds {
            self.notice(Notice::LeaseLost);
        }
        self.lease_held = holds;
    }

    // ---- resets at a view's beginning --------------------------------------------------------------------------

    /// Forgets everything that belonged to the view before.
    pub(crate) fn reset_for_view(&mut self, cut: u64) {
        self.wedged = None;
        self.proposal = None;
        self.too_few_since = None;
        self.lost_since = None;
        self.answered_leader = None;
        self.owed_wedge_ack.clear();
        self.suspected.clear();
        self.ack = AckDebt::default();
        self.probe_at = None;
        self.urgent_to = 0;
        self.next_send = Pos::start(cut + 1);
        self.heartbeat_at = self.now + self.config.heartbeat;
        self.lease_held = false;
        self.handing_over = false;
        self.hand_over_to = None;
    }

    /// Marks a member as suspected; says so once.
    pub(crate) fn suspect(&mut self, member: &MemberId, proved: bool) {
        if self.suspected.insert(member.clone()) {
            self.notice(Notice::Suspected {
                member: member.clone(),
                proved,
            });
        }
    }
}
