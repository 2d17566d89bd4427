//! Getting into a view: founding, joining, total failure; and installing the one that was agreed.

use crate::config::{Config, planted};
use crate::core::{Core, Phase};
use crate::detector::Peer;
use crate::fbcast::{Assembler, EventLog};
use crate::output::{
    CasResult, Command, CommandError, Installed, Notice, Output, ReadResult, RegistryReply, Role,
};
use crate::time::{Instant, micros};
use crate::transfer::{Donor, Receiving};
use crate::view::{MemberId, View, ViewId};
use crate::wire::Message;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// How often one outside asks to join.
const JOIN_INTERVAL: Duration = Duration::from_millis(20);
/// How often the view is read while nothing better is known.
const READ_INTERVAL: Duration = Duration::from_millis(100);
/// After a read or a write that failed.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// Each generation numbers its events from here, so that no number is ever used twice.
const GENERATION_EVENTS: u64 = 1 << 40;
/// A generation starts its service clock this far ahead of what is known of the old one's.
const GENERATION_CLOCK_STEP: Duration = Duration::from_secs(3600);
/// Outsiders whose last answer is remembered.
const TOLD_MAX: usize = 64;

/// What one outside all views knows.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Seeking {
    seen: Option<(View, i32)>,
    founding: Option<View>,
    join_at: Instant,
    told: BTreeMap<MemberId, Instant>,
    pub(crate) asked_at: Option<Instant>,
    lease: LeaseWatch,
    /// The generation being founded must wait out this lease of an unproved leader once more.
    wait_again: Option<Duration>,
    /// The cut at which this member began to join.
    joined_cut: u64,
    /// Not before: a view that a peer made up, and that is in no znode, must not make us write without rest.
    write_at: Instant,
}

/// The lease node of a lone leader, watched for signs of life.
#[derive(Default, Serialize, Deserialize)]
struct LeaseWatch {
    reading: bool,
    read_at: Instant,
    last: Option<(Option<Bytes>, Instant)>,
}

/// Whether a view may be the one that began its generation over another: an earlier lone leader's lease may outlive it.
/// Whatever follows it was written after its leader's second wait.
fn began_generation(view: &View) -> bool {
    view.generation > 1 && view.k == 0 && view.cut == generation_cut(view.generation)
}

/// The cut at which a generation begins.
fn generation_cut(generation: u32) -> u64 {
    u64::from(generation - 1) * GENERATION_EVENTS
}

/// What one outside may conclude about the members of the view it reads.
enum Lost {
    No,
    /// Every old incarnation is proved dead.
    AllDead,
    /// None can qualify any more; the old leader's lease may have to be waited for once more.
    NoneQualifies,
}

impl Seeking {
    pub(crate) fn view_id(&self) -> u64 {
        self.seen.as_ref().map_or(0, |(v, _)| v.id.0)
    }

    pub(crate) fn told(&self, to: &MemberId) -> Option<Instant> {
        self.told.get(to).copied()
    }

    pub(crate) fn tell(&mut self, to: &MemberId, now: Instant) {
        if self.told.len() >= TOLD_MAX {
            self.told.pop_first();
        }
        self.told.insert(to.clone(), now);
    }
}

impl Core {
    // ---- commands ----------------------------------------------------------------------------------------------

    pub(crate) fn on_command(&mut self, command: Command) -> Result<(), CommandError> {
        match command {
            Command::Join => {
                if self.phase != Phase::Idle {
                    return Err(CommandError::AlreadyJoined);
                }
                self.phase = Phase::Seeking;
                self.read_at = self.now;
            }
            Command::Leave => {
                self.leaving = true;
                let alone = self.view.as_ref().is_some_and(|v| v.full.len() == 1);
                match self.phase {
                    Phase::Idle | Phase::Seeking | Phase::Joining => self.become_gone(),
                    Phase::Leading if alone => self.become_gone(),
                    // Said again with each answer to a heartbeat.
                    Phase::Backup if self.wedged.is_none() => {
                        let leader = self.view().leader().clone();
                        self.send(&leader, Message::LeaveRequest);
                    }
                    Phase::Leading | Phase::Backup | Phase::Gone => {}
                }
            }
            Command::HandOver { to } => {
                if !self.can_multicast() {
                    return Err(CommandError::NotLeading);
                }
                let mut others = self.view().full[1..].iter();
                if others.len() == 0 {
                    return Err(CommandError::Alone);
                }
                if to
                    .as_ref()
                    .is_some_and(|to| others.all(|m| *m.name != **to))
                {
                    return Err(CommandError::NoSuchMember);
                }
                self.handing_over = true;
                self.hand_over_to = to;
            }
            Command::ReadyToBeFull => {
                if self.phase != Phase::Joining || !self.has_checkpoint() {
                    return Err(CommandError::NotJoining);
                }
                self.ready = true;
                // Said again with each answer to a heartbeat.
                let leader = self.view().leader().clone();
                self.send(&leader, Message::JoinReady);
            }
            Command::Checkpoint { joiner, segments } => {
                self.begin_donation(&joiner, Donor::new(segments))?;
            }
            Command::CheckpointBegin { joiner, total } => {
                self.begin_donation(&joiner, Donor::in_parts(total))?;
            }
            Command::CheckpointPart { joiner, bytes } => self.on_part(&joiner, bytes)?,
            Command::CheckpointFailed { joiner } => match self.donors.get(&joiner) {
                Some(Some(_)) => self.drop_joiner(&joiner),
                Some(None) | None => return Err(CommandError::NoSuchJoiner),
            },
        }
        Ok(())
    }

    // ---- the coordinator ---------------------------------------------------------------------------------------

    pub(crate) fn read_view(&mut self) {
        if !self.reading && self.now >= self.read_at {
            self.reading = true;
            self.outputs.push_back(Output::ReadView);
        }
    }

    pub(crate) fn read_view_sometimes(&mut self) {
        if !self.reading && self.now >= self.read_at {
            self.read_view();
            self.read_at = self.now + READ_INTERVAL;
        }
    }

    pub(crate) fn compare_and_set(&mut self, expected_version: Option<i32>, view: &View) {
        self.writing = true;
        self.cas_sent = self.now;
        let value = Bytes::from(view.encode());
        self.outputs.push_back(Output::CompareAndSet {
            expected_version,
            value,
        });
    }

    pub(crate) fn on_registry(&mut self, reply: RegistryReply) {
        let gone = self.phase == Phase::Gone;
        match reply {
            RegistryReply::View(result) => {
                self.reading = false;
                if gone {
                    return;
                }
                match result {
                    ReadResult::Value { value, version } => {
                        self.on_znode(&value, version);
                        let same = View::decode(&value).is_ok_and(|v| v.id.0 == self.view_id());
                        if same && self.phase != Phase::Gone {
                            self.version = version;
                            self.on_read_same();
                        }
                    }
                    ReadResult::Absent if self.phase == Phase::Seeking => self.found(),
                    ReadResult::Absent => {}
                    ReadResult::Unknown => self.read_at = self.now + RETRY_INTERVAL,
                }
            }
            RegistryReply::Cas(result) => {
                self.writing = false;
                if gone {
                    return;
                }
                match (result, self.seeking.founding.take()) {
                    (CasResult::Written { version }, Some(view)) => {
                        self.seeking.founding = Some(view.clone());
                        self.on_view(view, version);
                    }
                    (CasResult::Written { version }, None) => self.on_written(version),
                    (CasResult::BadVersion | CasResult::Unknown, founding) => {
                        self.seeking.founding = founding;
                        self.seeking.write_at = self.now + RETRY_INTERVAL;
                        self.read_at = self.now;
                        self.read_view();
                    }
                }
            }
            RegistryReply::Lease(result) => self.on_lease_read(result),
            RegistryReply::Renew(result) => self.on_renewed(result),
        }
    }

    pub(crate) fn on_znode(&mut self, bytes: &[u8], version: i32) {
        match View::decode(bytes) {
            Ok(view) => self.on_view(view, version),
            Err(_) => self.notice(Notice::DamagedView),
        }
    }

    // ---- outside -----------------------------------------------------------------------------------------------

    pub(crate) fn seek(&mut self) {
        if !self.writing {
            self.read_view_sometimes();
        }
        let Some((view, version)) = self.seeking.seen.clone() else {
            return;
        };
        if self.writing || self.now < self.seeking.write_at {
            return;
        }
        let lost = match self.lost(&view) {
            Lost::No => {
                self.lost_since = None;
                None
            }
            // A usurper that died may have done so before its own wait was over.
            Lost::AllDead => Some(began_generation(&view)),
            Lost::NoneQualifies => {
                let since = *self.lost_since.get_or_insert(self.now);
                let lease = view.lease() + Config::drift_margin(view.lease());
                let wait = self.config.total_failure_after.max(lease);
                (self.now.since(since) >= wait).then_some(true)
            }
        };
        if let Some(wait_again) = lost {
            self.found_generation(&view, version, wait_again);
            return;
        }
        if self.now >= self.seeking.join_at {
            self.seeking.join_at = self.now + JOIN_INTERVAL;
            self.send(view.leader(), Message::JoinRequest);
        }
    }

    /// No znode: this member founds the group.
    fn found(&mut self) {
        if self.writing {
            return;
        }
        let view = View {
            instance: self.config.fresh_instance,
            generation: 1,
            id: ViewId(1),
            full: vec![self.config.me.clone()],
            joining: Vec::new(),
            k: 0,
            lease_us: micros(self.config.lease_alone),
            clock_us: self.clock.now(self.now),
            cut: 0,
            proposal: self.rng.next_u128(),
        };
        self.compare_and_set(None, &view);
        self.seeking.founding = Some(view);
    }

    fn found_generation(&mut self, old: &View, version: i32, wait_again: bool) {
        self.clock.observe(old.clock_us);
        let generation = old.generation + 1;
        let view = View {
            instance: old.instance,
            generation,
            id: ViewId(old.id.0 + 1),
            full: vec![self.config.me.clone()],
            joining: Vec::new(),
            k: 0,
            // Who succeeds this one waits for as long as this view says, and so for the old leader's lease too.
            lease_us: micros(self.config.lease_alone.max(old.lease())),
            clock_us: self.clock.now(self.now) + micros(GENERATION_CLOCK_STEP),
            cut: generation_cut(generation),
            proposal: self.rng.next_u128(),
        };
        self.compare_and_set(Some(version), &view);
        self.seeking.founding = Some(view);
        self.seeking.wait_again = if wait_again { Some(old.lease()) } else { None };
    }

    fn proved_gone(&self, member: &MemberId) -> bool {
        let me = &self.config.me;
        // The listener of this name is ours: whoever held it before is dead.
        (member.name == me.name && member != me) || self.proofs.gone(member)
    }

    /// Total failure: can nobody of this view go on?
    fn lost(&mut self, view: &View) -> Lost {
        let leader = view.leader();
        let leader_gone = self.proved_gone(leader);
        let backups: Vec<&MemberId> = view.full.iter().skip(1).collect();
        let gone = backups.iter().filter(|m| self.proved_gone(m)).count();
        if leader_gone && gone == backups.len() {
            return Lost::AllDead;
        }
        if leader_gone {
            // n-k promises can no longer come together.
            return if gone >= usize::from(view.k) {
                Lost::NoneQualifies
            } else {
                Lost::No
            };
        }
        if backups.is_empty() {
            return if self.lone_leader_is_silent(view) {
                Lost::NoneQualifies
            } else {
                Lost::No
            };
        }
        // A leader that lives would propose itself; one that does not answer has no lease without k others.
        if gone >= view.quorum() {
            Lost::NoneQualifies
        } else {
            Lost::No
        }
    }

    fn lone_leader_is_silent(&mut self, view: &View) -> bool {
        let now = self.now;
        let watch = &mut self.seeking.lease;
        if !watch.reading && now >= watch.read_at {
            watch.reading = true;
            watch.read_at = now + view.lease() / 4;
            self.outputs.push_back(Output::ReadLease);
        }
        let wait = view.lease() + Config::drift_margin(view.lease());
        watch
            .last
            .as_ref()
            .is_some_and(|(_, since)| now.since(*since) >= wait)
    }

    fn on_lease_read(&mut self, result: ReadResult) {
        let now = self.now;
        let watch = &mut self.seeking.lease;
        watch.reading = false;
        let value = match result {
            ReadResult::Value { value, .. } => Some(value),
            ReadResult::Absent => None,
            ReadResult::Unknown => {
                watch.last = None; // unseen is not unchanged
                return;
            }
        };
        if watch.last.as_ref().is_none_or(|(last, _)| *last != value) {
            watch.last = Some((value, now));
        }
    }

    /// A backup that can never qualify and sees nobody else begin a new generation becomes one that can.
    pub(crate) fn all_is_lost(&mut self) -> bool {
        let view = self.view().clone();
        let leader_dead = self.proofs.dead(view.leader());
        let me = &self.config.me;
        let gone = view
            .full
            .iter()
            .skip(1)
            .filter(|m| *m != me && self.proofs.dead(m))
            .count();
        if !(leader_dead && gone >= usize::from(view.k)) {
            self.lost_since = None;
            return false;
        }
        let since = *self.lost_since.get_or_insert(self.now);
        self.now.since(since) >= self.config.total_failure_after
    }

    pub(crate) fn on_join_request(&mut self, from: &MemberId) {
        let Some(view) = &self.view else { return };
        if self.phase != Phase::Leading || view.contains(from) {
            self.tell_view(from);
            return;
        }
        let configured = self.config.members.iter().any(|name| **name == *from.name);
        if !configured || from.name == self.config.me.name {
            self.counters.stranger += 1;
            return;
        }
        if let Some(old) = view.members().find(|m| m.name == from.name) {
            let heard = self.peers.get(old).map(|p| self.now.since(p.heard));
            let lives = heard.is_some_and(|ago| ago < self.config.suspect_after);
            if lives && !self.proofs.dead(old) {
                return; // perhaps an old request that was long on its way
            }
        }
        if self.join_requests.contains(from) {
            return;
        }
        self.join_requests.retain(|m| m.name != from.name);
        self.join_requests.insert(from.clone());
        self.act_at_once();
    }

    // ---- joining -----------------------------------------------------------------------------------------------

    pub(crate) fn tick_joining(&mut self) {
        let silent = self.config.suspect_after * 4;
        let leader = self.view().leader().clone();
        let heard = self.peers.get(&leader).map(|p| self.now.since(p.heard));
        if heard.is_none_or(|ago| ago >= silent) {
            self.read_view_sometimes();
            // A leader that is alone or dying with all others leaves nobody to tell this joiner: begin anew.
            if heard.is_none_or(|ago| ago >= self.config.total_failure_after) {
                self.become_gone();
            }
        }
    }

    pub(crate) fn joined_cut(&self) -> u64 {
        self.seeking.joined_cut
    }

    // ---- views -------------------------------------------------------------------------------------------------

    /// A view that the znode holds, or held.
    pub(crate) fn on_view(&mut self, view: View, version: i32) {
        match self.phase {
            Phase::Idle | Phase::Gone => {}
            Phase::Seeking => self.on_view_outside(view, version),
            Phase::Joining | Phase::Backup | Phase::Leading => self.on_view_inside(view, version),
        }
    }

    fn on_view_outside(&mut self, view: View, version: i32) {
        if self
            .seeking
            .seen
            .as_ref()
            .is_some_and(|(seen, _)| view.id < seen.id)
        {
            return;
        }
        if self.instance != Some(view.instance) {
            self.instance = Some(view.instance);
            self.outputs.push_back(Output::Instance(view.instance));
        }
        self.clock.observe(view.clock_us);
        let founded = self
            .seeking
            .founding
            .as_ref()
            .is_some_and(|f| f.proposal == view.proposal);
        if founded || view.joiner(&self.config.me).is_some() {
            self.install(view, version);
            return;
        }
        if planted!(self.config, RestartSurvives)
            && let Some(old) = view.full[1..]
                .iter()
                .find(|m| m.name == self.config.me.name)
        {
            self.config.me = old.clone();
            self.log = EventLog::starting_after(view.cut);
            self.assembler = Assembler::starting_after(view.cut);
            self.delivered = view.cut;
            self.phase = Phase::Backup;
            self.install(view, version);
            return;
        }
        let newer = self
            .seeking
            .seen
            .as_ref()
            .is_none_or(|(seen, _)| view.id > seen.id);
        if newer {
            self.proofs.learn(self.now, view.members());
            self.lost_since = None;
            self.seeking.lease = LeaseWatch {
                read_at: self.now,
                ..LeaseWatch::default()
            };
            self.seeking.join_at = self.now;
        }
        self.seeking.seen = Some((view, version));
    }

    fn on_view_inside(&mut self, view: View, version: i32) {
        let cur = self.view();
        if view.id <= cur.id {
            return;
        }
        // The write may be read before its own answer comes.
        if self.wrote(view.proposal) {
            self.tell_written(&view, version);
        }
        let (me, cur) = (&self.config.me, self.view());
        let next = view.id.0 == cur.id.0 + 1 && view.generation == cur.generation;
        if view.is_full(me) {
            let reached = self.delivered.max(if self.phase == Phase::Leading {
                self.log.held()
            } else {
                0
            });
            let whole = self.log.held() >= view.cut && reached <= view.cut;
            let exact = whole || planted!(self.config, DeliverBeyondCut);
            let forced = planted!(
                self.config,
                CutIsOwnHighest | AckAfterWedge | RestartSurvives
            );
            if next && self.wedged.is_some() && (exact || forced) {
                self.install(view, version);
                return;
            }
        } else if let Some(j) = view.joiner(me)
            && self.phase == Phase::Joining
            && j.since.0 == self.joined_since
        {
            self.install(view, version);
            return;
        }
        self.become_gone();
    }

    /// This incarnation is out.
    pub(crate) fn become_gone(&mut self) {
        if self.phase == Phase::Gone {
            return;
        }
        if self.view.is_some() {
            self.wedge();
        }
        self.proposal = None;
        self.phase = Phase::Gone;
        self.outputs.push_back(Output::Outside);
    }

    fn install(&mut self, view: View, version: i32) {
        let me = self.config.me.clone();
        let now = self.now;
        let was = self.phase;
        let full = view.is_full(&me);
        let wrote = self.wrote(view.proposal) || was == Phase::Seeking;
        let was_alone = was == Phase::Leading && self.view().k == 0;
        let role = match (full, *view.leader() == me) {
            (false, _) => Role::Joining,
            (true, false) => Role::Backup,
            (true, true) => Role::Leader,
        };
        // Step 5: deliver exactly up to the cut, forget the rest.
        match (was, full) {
            (Phase::Seeking, _) => {
                let (since, cut) = view
                    .joiner(&me)
                    .map_or((view.id, view.cut), |j| (j.since, j.cut));
                self.log = EventLog::starting_after(cut);
                self.assembler = Assembler::starting_after(cut);
                self.delivered = cut;
                self.seeking.joined_cut = cut;
                if !full {
                    self.receiving = Some(Receiving::new(now));
                    self.joined_since = since.0;
                }
            }
            (_, true) => {
                let cut = if planted!(self.config, DeliverBeyondCut) {
                    self.log.held().max(view.cut)
                } else {
                    view.cut
                };
                self.deliver_to(cut.min(self.log.held()));
                self.log.truncate_after(view.cut);
                if self.log.held() != view.cut {
                    // Only a planted defect comes here: the caller has checked that the cut is held.
                    self.log = EventLog::starting_after(view.cut);
                }
                self.delivered = view.cut;
                self.assembler = Assembler::starting_after(view.cut);
            }
            (_, false) => {}
        }
        let known: BTreeMap<MemberId, u64> = self
            .peers
            .iter()
            .map(|(m, p)| (m.clone(), p.held))
            .collect();
        let ready: Vec<MemberId> = self
            .peers
            .iter()
            .filter(|(_, p)| p.ready)
            .map(|(m, _)| m.clone())
            .collect();
        self.peers = view
            .members()
            .filter(|m| **m != me)
            .map(|m| {
                let new = view.joiner(m).is_some_and(|j| j.since == view.id);
                let held = match (view.is_full(m) || new, known.get(m)) {
                    (true, _) | (false, None) => view.cut,
                    (false, Some(held)) => (*held).min(view.cut),
                };
                let mut peer = Peer::new(now, held);
                peer.ready = view.joiner(m).is_some() && ready.contains(m);
                (m.clone(), peer)
            })
            .collect();
        self.proofs.learn(now, view.members());
        let founded = was == Phase::Seeking && full;
        let new_generation = founded && view.generation > 1;
        self.alone_until = match (role == Role::Leader && view.k == 0, wrote, was_alone) {
            // The write of the view is the first renewal.
            (true, true, _) => {
                let until = self.cas_sent + view.lease();
                Some(until.max(if was_alone {
                    self.alone_until.unwrap_or(until)
                } else {
                    until
                }))
            }
            (true, false, true) => self.alone_until,
            (true, false, false) | (false, _, _) => None,
        };
        if founded && let Some(lease) = self.seeking.wait_again.take() {
            self.silent_before = now + lease + Config::drift_margin(lease);
        }
        self.renew_at = now;
        let joining: Vec<MemberId> = view
            .joining
            .iter()
            .filter(|j| j.since == view.id)
            .map(|j| j.member.clone())
            .collect();
        self.donors
            .retain(|m, _| view.joiner(m).is_some() && role == Role::Leader);
        self.join_requests
            .retain(|m| role == Role::Leader && !view.contains(m));
        self.leave_requests.retain(|m| view.contains(m));
        self.dropped.retain(|m| view.joiner(m).is_some());
        self.stable = if full { view.cut } else { self.stable };
        self.trim = 0;
        self.version = version;
        self.seeking.seen = None;
        self.seeking.founding = None;
        self.reset_for_view(view.cut);
        self.clock.observe(view.clock_us);
        self.phase = match role {
            Role::Leader => Phase::Leading,
            Role::Backup => Phase::Backup,
            Role::Joining => Phase::Joining,
        };
        if role == Role::Leader {
            self.clock.run(now, view.clock_us);
        } else {
            self.clock.stop(now);
        }
        if full {
            self.ready = false;
            self.receiving = None;
        }
        let id = view.id;
        let cut = view.cut;
        self.view = Some(view.clone());
        self.counters.views += 1;
        if new_generation {
            self.notice(Notice::TotalFailure {
                generation: view.generation,
            });
        }
        self.outputs.push_back(Output::Install(Box::new(Installed {
            role,
            cut,
            clock_us: self.clock.now(now),
            survivor: full && !founded,
            view,
        })));
        if full {
            self.outputs.push_back(Output::Stable { number: cut });
        }
        if role == Role::Leader {
            for joiner in joining {
                self.donors.insert(joiner.clone(), None);
                self.outputs.push_back(Output::CheckpointWanted {
                    joiner,
                    view_id: id,
                });
            }
            let znode = self.view().encode();
            self.send_heartbeat(&[Message::NewView { version, znode }]);
            self.renew_alone();
        }
    }

    // ---- the lease of a leader that is alone -------------------------------------------------------------------

    pub(crate) fn renew_alone(&mut self) {
        let due = self.renewing.is_none() && self.now >= self.renew_at;
        if self.phase != Phase::Leading || self.wedged.is_some() || self.view().k != 0 || !due {
            return;
        }
        self.renewing = Some((self.view_id(), self.now));
        // Different each time, so that a watcher sees a change.
        let mut value = self.config.me.incarnation.to_le_bytes().to_vec();
        value.extend_from_slice(&self.view_id().to_le_bytes());
        value.extend_from_slice(&self.now.micros().to_le_bytes());
        let view_version = self.version;
        self.outputs.push_back(Output::RenewLease {
            view_version,
            value: Bytes::from(value),
        });
    }

    fn on_renewed(&mut self, result: CasResult) {
        let Some((view_id, sent)) = self.renewing.take() else {
            return;
        };
        if self.phase != Phase::Leading || view_id != self.view_id() || self.view().k != 0 {
            return;
        }
        let lease = self.view().lease();
        match result {
            CasResult::Written { .. } => {
                self.alone_until = self.alone_until.max(Some(sent + lease));
                self.renew_at = sent + lease / 4;
            }
            CasResult::BadVersion => {
                self.renew_at = self.now + RETRY_INTERVAL;
                self.read_view();
            }
            CasResult::Unknown => self.renew_at = self.now + RETRY_INTERVAL,
        }
    }
}
