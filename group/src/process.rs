//! Process groups, many of them, over one site group: fbcast, cbcast, abcast, gbcast, views, state transfer, calls.
//!
//! ```text
//!   groups     chat {r1,r2}     prices {r1,r2,r3}  ...       each with its views and its members' lanes
//!                  \              /
//!   ledger      who is in which group, when each view ends   the same at all sites: a state machine fed by
//!                       |
//!   site group  Core: one leader's events, cuts, views       agreed through the coordinator
//! ```
//!
//! Messages go straight from the sender to the members of the group. Only changes go through the site leader: joining,
//! leaving, failures, gbcasts. So one failed process costs one change of the site group's view, and all its groups follow
//! from it in one step.
//!
//! [`Process`] does no I/O, reads no clock and draws no randomness, as [`Core`]. What is promised:
//!
//! - All members that go from one view of a group to the next have delivered the same messages in between, none of them before
//!   or after.
//! - fbcasts of one sender are delivered in its order, cbcasts after what they may depend on, abcasts in one order, gbcasts
//!   between the same messages everywhere.
//! - A message of a survivor is delivered; one of a member that failed is delivered at all survivors or at none.
//! - A *safe* message that anybody delivered is delivered by all that go on, unless half of the members fail in that view.
//! - Only one lineage of views exists (primary partition): a process that was cut off learns that it is out.

mod abcast;
mod cbcast;
mod endpoint;
mod gbcast;
mod lane;
mod ledger;
mod loading;
#[cfg(test)]
pub(crate) mod nonsense;
mod replies;
mod snapshot;
#[cfg(test)]
mod tests;
mod types;
mod vclock;
mod wire;

#[cfg(test)]
pub(crate) use self::endpoint::FORGETTING;
use self::endpoint::{Cx, Endpoint};
use self::gbcast::Flushes;
use self::lane::Allowance;
use self::ledger::{Effect, Ledger};
pub use self::types::{
    CallRef, Calling, Command, GROUPS_MAX, GroupEvent, GroupId, GroupView, MEMBERS_MAX, Message,
    Multicast, NAME_BYTES_MAX, Order, Output, ProcessConfig, Refused, Request, Stability, ThreadId,
    Want,
};
use self::wire::{Entry, Header, Op, Small, ToLeader};
use crate::core::Core;
use crate::output::{self, ControlEvent, GroupStatus, RegistryReply, Role};
use crate::time::Instant;
use crate::view::MemberId;
use crate::wire::Reader;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// What was said to the site leader and is not done is said again after this long.
const REPEAT_AFTER: Duration = Duration::from_millis(5);
/// Requests that wait to be entered: beyond it joining and gbcasts are refused.
const REQUESTS_MAX: usize = 20_000;

/// The messages of a datagram of this size or more share its bytes; those of a smaller one are copied.
const SHARED_BYTES_MIN: usize = 512;

/// One process's part in all its groups.
///
/// Call one entry point, drain [`Process::poll_output`] to `None` and execute in order, then read
/// [`Process::poll_timeout`]. After [`Output::Outside`] it is spent.
///
/// Its serde form is the inside of an image, without the checks: [`Process::snapshot`] and [`Process::restore`] are the way.
/// A field that is added here is in the image; raise the format's number in `snapshot.rs`.
#[derive(Serialize, Deserialize)]
pub struct Process {
    #[serde(with = "snapshot::identity")]
    config: ProcessConfig,
    core: Core,
    me: MemberId,
    now: Instant,
    role: Option<Role>,
    ledger: Ledger,
    /// Events of the site group up to this one are in the ledger.
    applied: u64,
    /// Leader: entries that are not stable yet.
    appended: VecDeque<(u64, Entry)>,
    /// Leader: of each site, the number of its last request that was appended.
    asked: BTreeMap<MemberId, u64>,
    flushes: Flushes,
    /// This process's requests that are not in the ledger, and the number of the first.
    requests: VecDeque<Op>,
    first_request: u64,
    /// Groups that had a message refused for a bound of the whole process, and were not told yet that there is room.
    refused: BTreeSet<GroupId>,
    /// Of each group, the bytes on their way and the backlog that are in the totals.
    counted: BTreeMap<GroupId, (u64, u64)>,
    flight_bytes: u64,
    backlog_bytes: u64,
    /// Groups that have something to send and wait for their turn, each once.
    waiting: VecDeque<GroupId>,
    /// Groups whose view is being left.
    changing: BTreeSet<GroupId>,
    repeat_at: Option<Instant>,
    endpoints: BTreeMap<GroupId, Endpoint>,
    touched: BTreeSet<GroupId>,
    due: BTreeMap<GroupId, Instant>,
    dues: BTreeSet<(Instant, GroupId)>,
    /// The held lanes that were reported last, by group.
    reported: BTreeMap<GroupId, Vec<u64>>,
    /// Something changed that the site leader has to hear of, or to act on.
    speak: bool,
    /// The core's outputs are being carried out; what they cause in the core comes after them.
    #[serde(skip)]
    draining: bool,
    /// Bytes that may be sent again because of the datagram that is being taken.
    #[serde(skip)]
    resend_left: usize,
    /// What the group that is being flushed may send.
    #[serde(skip)]
    allowance: Allowance,
    image: Vec<u8>,
    /// Empty whenever an image is taken.
    #[serde(skip)]
    out: VecDeque<Output>,
    gone: bool,
}

impl Process {
    /// A process that takes part in no group. `seed` drives the site group's proposal ids.
    pub fn new(config: ProcessConfig, seed: u64, now: Instant) -> Self {
        let mut core = Core::new(config.core.clone(), seed, now);
        core.handle_command(now, output::Command::Join)
            .expect("a new core has not joined");
        Self {
            me: config.core.me.clone(),
            config,
            core,
            now,
            role: None,
            ledger: Ledger::default(),
            applied: 0,
            appended: VecDeque::new(),
            asked: BTreeMap::new(),
            flushes: Flushes::default(),
            requests: VecDeque::new(),
            first_request: 1,
            refused: BTreeSet::new(),
            counted: BTreeMap::new(),
            flight_bytes: 0,
            backlog_bytes: 0,
            waiting: VecDeque::new(),
            changing: BTreeSet::new(),
            repeat_at: None,
            endpoints: BTreeMap::new(),
            touched: BTreeSet::new(),
            due: BTreeMap::new(),
            dues: BTreeSet::new(),
            reported: BTreeMap::new(),
            speak: false,
            draining: false,
            resend_left: 0,
            allowance: Allowance::default(),
            image: Vec::new(),
            out: VecDeque::new(),
            gone: false,
        }
    }

    // ---- entry points ------------------------------------------------------------------------------------------

    /// A datagram's body, from a member that the driver has authenticated.
    pub fn handle_datagram(&mut self, now: Instant, from: &MemberId, body: &[u8]) {
        self.handle_bodies(now, from, [body]);
    }

    /// As [`Process::handle_datagram`], of a datagram with several bodies: what it makes this process send again is bounded for
    /// all of them together.
    pub fn handle_bodies<'a>(
        &mut self,
        now: Instant,
        from: &MemberId,
        bodies: impl IntoIterator<Item = &'a [u8]>,
    ) {
        self.core.begin_datagram();
        self.resend_left = lane::RESEND_BYTES;
        for body in bodies {
            self.handle_body(now, from, body);
        }
    }

    fn handle_body(&mut self, now: Instant, from: &MemberId, body: &[u8]) {
        self.now = now;
        if body.first() != Some(&wire::FORMAT) {
            self.core.handle_body(now, from, body);
            return self.drain_core();
        }
        // One copy for all messages in it.
        let shared = (body.len() >= SHARED_BYTES_MIN).then(|| Bytes::copy_from_slice(body));
        let body = shared.as_deref().unwrap_or(body);
        let Some((header, items)) = Header::read(body) else {
            return;
        };
        if self.gone || *from == self.me {
            return;
        }
        let id = GroupId(header.group);
        let items = Reader::<Small>::over(items);
        if header.flags & wire::FROM_LEADER != 0 {
            return self.on_fetch(from, id, header.view, items);
        }
        self.at(id, |e, cx| {
            e.on_datagram(cx, from, &header, items, shared.as_ref());
        });
    }

    /// The coordinator's answer.
    pub fn handle_registry(&mut self, now: Instant, reply: RegistryReply) {
        self.now = now;
        self.core.handle_registry(now, reply);
        self.drain_core();
    }

    /// News of a control connection.
    pub fn handle_control(&mut self, now: Instant, peer: &str, event: ControlEvent) {
        self.now = now;
        self.core.handle_control(now, peer, event);
        self.drain_core();
    }

    /// The program's wish.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn handle_command(&mut self, now: Instant, command: Command) -> Result<(), Refused> {
        self.now = now;
        if self.gone {
            return Err(Refused::NotAMember);
        }
        match command {
            Command::Join { group } => {
                let named = !group.is_empty() && group.len() <= NAME_BYTES_MAX;
                let room = self.endpoints.len() < GROUPS_MAX && self.requests.len() < REQUESTS_MAX;
                if !(named && room) {
                    return Err(Refused::CannotJoin);
                }
                self.ask(Op::Join { name: group });
                Ok(())
            }
            Command::Leave { group } => self.member(group, |e, _| {
                e.leave();
                Ok(())
            }),
            Command::Expel { group, member } => self.member(group, |_, cx| {
                cx.requests.push(Op::Expel { group, member });
                Ok(())
            }),
            Command::Multicast { group, message } => {
                let there = self.endpoints.contains_key(&group);
                if there && !self.room_in_process(group, message.order) {
                    self.refused.insert(group);
                    return Err(Refused::Backlog);
                }
                self.member(group, |e, cx| e.multicast(cx, message))
            }
            Command::Send { group, to, body } => {
                self.member(group, |e, cx| e.send_direct(cx, &to, body))
            }
            Command::Reply { group, to, body } => {
                self.member(group, |e, cx| e.reply(cx, &to, body))
            }
            Command::State {
                group,
                view,
                segments,
            } => self.member(group, |e, _| e.give_state(view, segments)),
            Command::Pause { group, paused } => self.member(group, |e, _| {
                e.pause(paused);
                Ok(())
            }),
            Command::Stop => {
                let left = self.core.handle_command(now, output::Command::Leave);
                left.expect("leaving is never refused");
                self.drain_core();
                Ok(())
            }
        }
    }

    /// Whether the group takes a multicast of this order now, or refuses it at once for another reason than room.
    pub fn room(&self, group: GroupId, order: Order) -> bool {
        let endpoint = self.endpoints.get(&group);
        self.room_in_process(group, order) && endpoint.is_none_or(|e| e.has_room(&self.config))
    }

    fn room_in_process(&self, group: GroupId, order: Order) -> bool {
        let endpoint = self.endpoints.get(&group);
        let room = self.backlog_bytes < self.config.total_backlog_bytes_max
            || endpoint.is_none_or(|e| e.backlog_bytes() == 0);
        room && (order != Order::View || self.requests.len() < REQUESTS_MAX)
    }

    /// A timer: harmless when early, late or repeated. Drain the sockets first, as for [`Core::handle_timeout`].
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        self.core.handle_timeout(now);
        self.drain_core();
        if self.repeat_at.is_some_and(|t| t <= now) {
            self.repeat_at = None;
            self.reported.clear();
            self.speak = true;
        }
        while let Some((at, id)) = self.dues.first().copied() {
            if at > now {
                break;
            }
            self.set_due(id, None);
            self.at(id, |e, cx| e.on_time(cx));
        }
    }

    /// When to call [`Process::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let dues = self.dues.first().map(|(at, _)| *at);
        let all = [self.core.poll_timeout(), dues, self.repeat_at];
        all.into_iter().flatten().min()
    }

    /// The next output that is decided already; use it between the datagrams of one batch, so that one acknowledgement
    /// covers them all.
    pub fn poll_ready(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// The next output; drain to `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        while self.out.is_empty() {
            self.flush();
            if self.touched.is_empty() && !self.speak {
                break;
            }
        }
        self.out.pop_front()
    }

    /// The site group, for status and metrics.
    pub fn status(&self) -> GroupStatus {
        self.core.status()
    }

    /// This incarnation.
    pub fn me(&self) -> &MemberId {
        &self.me
    }

    // ---- endpoints ---------------------------------------------------------------------------------------------

    /// Lets an endpoint do something, and carries out what it asks for.
    fn at<T>(&mut self, id: GroupId, f: impl FnOnce(&mut Endpoint, &mut Cx<'_>) -> T) -> Option<T> {
        let endpoint = self.endpoints.get_mut(&id)?;
        let mut requests = Vec::new();
        let mut cx = Cx {
            now: self.now,
            config: &self.config,
            out: &mut self.out,
            requests: &mut requests,
            resend_left: &mut self.resend_left,
            allowance: &mut self.allowance,
        };
        let result = f(endpoint, &mut cx);
        let (flight, backlog) = (endpoint.flight_bytes(), endpoint.backlog_bytes());
        self.count(id, flight, backlog);
        self.touched.insert(id);
        for op in requests {
            self.ask(op);
        }
        Some(result)
    }

    fn member(
        &mut self,
        id: GroupId,
        f: impl FnOnce(&mut Endpoint, &mut Cx<'_>) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        self.at(id, f).unwrap_or(Err(Refused::NotAMember))
    }

    /// Brings the totals up to date.
    fn count(&mut self, id: GroupId, flight: u64, backlog: u64) {
        let old = if (flight, backlog) == (0, 0) {
            self.counted.remove(&id)
        } else {
            self.counted.insert(id, (flight, backlog))
        };
        let (old_flight, old_backlog) = old.unwrap_or_default();
        self.flight_bytes = self.flight_bytes - old_flight + flight;
        self.backlog_bytes = self.backlog_bytes - old_backlog + backlog;
    }

    fn remove(&mut self, id: GroupId) {
        self.endpoints.remove(&id);
        self.set_due(id, None);
        self.count(id, 0, 0);
        self.refused.remove(&id);
        self.waiting.retain(|waits| *waits != id);
    }

    fn set_due(&mut self, id: GroupId, at: Option<Instant>) {
        let old = match at {
            Some(at) => self.due.insert(id, at),
            None => self.due.remove(&id),
        };
        if let Some(old) = old {
            self.dues.remove(&(old, id));
        }
        if let Some(at) = at {
            self.dues.insert((at, id));
        }
    }

    /// Sends what is due of the groups that something happened to.
    fn flush(&mut self) {
        while let Some(id) = self.touched.pop_first() {
            // Messages of others wait, and this group's come after them.
            self.flush_group(id, self.waiting.is_empty());
        }
        while self.flight_bytes < self.config.total_flight_bytes_max
            && let Some(id) = self.waiting.pop_front()
        {
            self.flush_group(id, true);
        }
        self.tell_of_room();
        if std::mem::take(&mut self.speak) {
            self.say_to_leader();
            self.end_views();
        }
        while let Some(output) = self.core.poll_output() {
            self.draining = true;
            self.on_core(output);
            self.draining = false;
            self.drain_core();
        }
    }

    fn flush_group(&mut self, id: GroupId, may_send: bool) {
        let most = self.config.total_flight_bytes_max;
        let bytes = most.saturating_sub(self.flight_bytes);
        self.allowance = Allowance {
            bytes: if may_send { bytes } else { 0 },
            missed: false,
        };
        self.at(id, |e, cx| e.flush(cx));
        if self.allowance.missed && !self.waiting.contains(&id) {
            self.waiting.push_back(id);
        }
        self.touched.remove(&id);
        let due = self.endpoints.get(&id).and_then(Endpoint::due);
        self.set_due(id, due);
        self.speak |= self.changing.contains(&id);
    }

    /// Says that there is room, once, where something was refused for want of it in the process.
    fn tell_of_room(&mut self) {
        let most = self.config.total_backlog_bytes_max;
        if self.refused.is_empty() || self.requests.len() > REQUESTS_MAX / 2 {
            return;
        }
        let all = self.backlog_bytes <= most - most / 8;
        let empty = |id: &GroupId| self.counted.get(id).is_none_or(|(_, bytes)| *bytes == 0);
        let told = self.refused.extract_if(.., |id| all || empty(id));
        for group in told.collect::<Vec<_>>() {
            let event = GroupEvent::Room;
            self.out.push_back(Output::Group { group, event });
        }
    }

    // ---- the site group ----------------------------------------------------------------------------------------

    fn drain_core(&mut self) {
        if self.draining {
            return;
        }
        self.draining = true;
        while let Some(output) = self.core.poll_ready() {
            self.on_core(output);
        }
        self.draining = false;
    }

    fn on_core(&mut self, output: output::Output) {
        use output::Output as Of;
        match output {
            Of::Send { to, bodies } => self.out.push_back(Output::Send { to, bodies }),
            Of::Deliver { number, payload } => {
                // What a leader entered can be read, or its version is another: then this process cannot take part.
                match postcard::from_bytes::<Entry>(&payload) {
                    Ok(entry) => self.apply(number, &entry),
                    Err(_) => self.become_gone(),
                }
            }
            Of::Stable { number } => self.apply_appended(number),
            Of::Wedged => {}
            Of::Install(installed) => self.on_install(&installed),
            Of::Outside => self.become_gone(),
            Of::Instance(instance) => self.out.push_back(Output::Instance(instance)),
            Of::ReadView => self.out.push_back(Output::Registry(Request::ReadView)),
            Of::CompareAndSet {
                expected_version,
                value,
            } => self.out.push_back(Output::Registry(Request::CompareAndSet {
                expected_version,
                value,
            })),
            Of::ReadLease => self.out.push_back(Output::Registry(Request::ReadLease)),
            Of::RenewLease {
                view_version,
                value,
            } => self.out.push_back(Output::Registry(Request::RenewLease {
                view_version,
                value,
            })),
            Of::CheckpointWanted { joiner, .. } => {
                let image = (self.applied, &self.ledger);
                let image = postcard::to_stdvec(&image).expect("a ledger can be serialised");
                let command = output::Command::Checkpoint {
                    joiner,
                    segments: vec![Bytes::from(image)],
                };
                let given = self.core.handle_command(self.now, command);
                given.expect("the core has just asked for it");
            }
            Of::CheckpointPartWanted { .. } => unreachable!("the image is given as a whole"),
            Of::CheckpointChunk { bytes, .. } => self.image.extend_from_slice(&bytes),
            Of::CheckpointDone => {
                let image = std::mem::take(&mut self.image);
                let Ok((applied, ledger)) = postcard::from_bytes::<(u64, Ledger)>(&image) else {
                    return self.become_gone(); // of another version
                };
                self.applied = applied;
                self.ledger = ledger;
                let changing = self
                    .ledger
                    .groups
                    .iter()
                    .filter(|(_, g)| g.change.is_some());
                self.changing = changing.map(|(id, _)| *id).collect();
                let ready = self
                    .core
                    .handle_command(self.now, output::Command::ReadyToBeFull);
                ready.expect("the checkpoint has come");
            }
            Of::Unicast { from, payload } => self.on_to_leader(&from, &payload),
            Of::Notice(notice) => self.out.push_back(Output::Notice(notice)),
        }
    }

    fn on_install(&mut self, installed: &output::Installed) {
        let view = &installed.view;
        let first = self.role.is_none();
        self.role = Some(installed.role);
        self.out.push_back(Output::Epoch {
            view_id: view.id.0,
            sites: view.members().cloned().collect(),
        });
        self.apply_appended(installed.cut);
        assert!(
            self.appended.is_empty(),
            "a survivor's events are within the cut"
        );
        if first && installed.role == Role::Leader {
            self.applied = installed.cut;
            self.ledger = Ledger::of_generation(view.generation);
        }
        self.asked = self.ledger.asked.clone();
        self.flushes = Flushes::default();
        self.reported.clear();
        self.speak = true;
        if installed.role == Role::Leader {
            // Who takes part is an entry like any other, so that joiners, who do not see every view, read the same.
            self.append(Entry::Sites(view.full.clone()));
        }
    }

    fn become_gone(&mut self) {
        if self.gone {
            return;
        }
        self.gone = true;
        let ids: Vec<GroupId> = self.endpoints.keys().copied().collect();
        for id in ids {
            self.at(id, |e, cx| e.on_outside(cx));
            self.remove(id);
        }
        self.touched.clear();
        self.requests.clear();
        self.repeat_at = None;
        self.out.push_back(Output::Outside);
    }

    // ---- the ledger --------------------------------------------------------------------------------------------

    /// Enters something, as the site leader. It takes effect when it is stable: a leader that was cut off must not act on
    /// what nobody else will know.
    fn append(&mut self, entry: Entry) {
        let number = self.core.next_number();
        let payload = postcard::to_stdvec(&entry).expect("an entry can be serialised");
        self.appended.push_back((number, entry));
        self.core
            .multicast(self.now, number, Bytes::from(payload), true);
    }

    fn may_append(&self) -> bool {
        self.core.can_multicast() && self.core.window_open()
    }

    fn apply_appended(&mut self, until: u64) {
        while let Some((number, _)) = self.appended.front()
            && *number <= until
        {
            let (number, entry) = self.appended.pop_front().expect("looked at above");
            self.apply(number, &entry);
        }
    }

    fn apply(&mut self, number: u64, entry: &Entry) {
        assert!(number > self.applied, "entries come in order");
        self.applied = number;
        if let Entry::Asked { by, number, .. } = entry
            && *by == self.me
        {
            while self.first_request <= *number && self.requests.pop_front().is_some() {
                self.first_request += 1;
            }
            self.tell_of_room();
        }
        let effects = self.ledger.apply(entry);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Block { group } => {
                    self.changing.insert(group);
                    self.speak = true;
                    self.at(group, |e, _| e.block());
                    self.flushes.began(&self.ledger, group);
                }
                Effect::Install(begun) => {
                    let id = begun.group;
                    self.changing.remove(&id);
                    self.reported.remove(&id);
                    self.flushes.ended(id);
                    let survives = begun.view.members.contains(&self.me);
                    let endpoint = self.endpoints.get(&id).filter(|_| survives);
                    if let (Some(endpoint), Some(cut)) = (endpoint, &begun.cut)
                        && !endpoint.holds(cut)
                    {
                        // The leader is at fault. Without the others' messages this process cannot go on.
                        return self.become_gone();
                    }
                    match self.at(id, |e, cx| e.install(cx, &begun)) {
                        Some(true) => {}
                        Some(false) => self.remove(id),
                        None if begun.view.members.contains(&self.me) => self.enter(&begun),
                        None => {}
                    }
                }
                Effect::Full { member, name } if member == self.me => {
                    self.out.push_back(Output::CannotJoin { name });
                }
                Effect::Full { .. } => {}
                Effect::Loaded { group, member } => {
                    self.at(group, |e, _| e.on_loaded(&member));
                }
            }
        }
    }

    fn enter(&mut self, begun: &ledger::Begun) {
        let mut requests = Vec::new();
        let mut cx = Cx {
            now: self.now,
            config: &self.config,
            out: &mut self.out,
            requests: &mut requests,
            resend_left: &mut self.resend_left,
            allowance: &mut Allowance::default(),
        };
        let endpoint = Endpoint::new(&mut cx, &self.me, begun);
        self.endpoints.insert(begun.group, endpoint);
        self.touched.insert(begun.group);
        for op in requests {
            self.ask(op);
        }
    }

    fn ask(&mut self, op: Op) {
        self.requests.push_back(op);
        self.speak = true;
    }

    fn on_fetch(&mut self, from: &MemberId, id: GroupId, view: u64, items: Reader<'_, Small>) {
        let led_by = self.core.view.as_ref().map(crate::view::View::leader);
        let current = self.ledger.group(id).is_some_and(|g| g.view.id == view);
        if led_by != Some(from) || !current {
            return;
        }
        for item in items {
            if let crate::wire::Item::Message(Small::Fetch { wants, .. }) = item {
                self.at(id, |e, _| e.on_fetch(&wants));
            }
        }
    }

    /// Says, or says again, what the site leader has to know of this process.
    fn say_to_leader(&mut self) {
        if self.gone || !matches!(self.role, Some(Role::Leader | Role::Backup)) {
            return;
        }
        if self.requests.is_empty() && self.changing.is_empty() {
            return;
        }
        self.repeat_at.get_or_insert(self.now + REPEAT_AFTER);
        self.wait_for_survivors_only();
        if self.core.can_multicast() {
            let (first, ops) = (self.first_request, self.requests.clone());
            let me = self.me.clone();
            return self.on_requests(&me, first, ops);
        }
        if self.role != Some(Role::Backup) {
            return;
        }
        let mut reports = self.reports();
        reports.retain(|r| self.reported.get(&r.group) != Some(&r.held));
        for r in &reports {
            self.reported.insert(r.group, r.held.clone());
        }
        let most = self.core.unicast_bytes_max();
        for words in gbcast::to_leader(self.first_request, &self.requests, &reports, most) {
            self.core.send_to_leader(self.now, &words);
        }
    }

    /// Those that depart hold nobody up any more.
    fn wait_for_survivors_only(&mut self) {
        for id in &self.changing {
            if let (Some(endpoint), Some(group)) =
                (self.endpoints.get_mut(id), self.ledger.group(*id))
            {
                let news = endpoint.wait_for_only(&group.survivors().collect());
                if news {
                    self.touched.insert(*id);
                }
            }
        }
    }

    fn on_to_leader(&mut self, from: &MemberId, payload: &[u8]) {
        match postcard::from_bytes::<ToLeader>(payload) {
            Ok(ToLeader::Requests { first, ops }) => self.on_requests(from, first, ops.into()),
            Ok(ToLeader::Reports(reports)) => {
                for r in reports {
                    self.flushes.on_report(&self.ledger, from, r);
                }
                self.speak = true;
            }
            Err(_) => {}
        }
    }

    fn on_requests(&mut self, from: &MemberId, first: u64, ops: VecDeque<Op>) {
        for (number, op) in (first..).zip(ops) {
            let last = self.asked.get(from).copied().unwrap_or(0);
            if number != last + 1 || !self.may_append() {
                continue;
            }
            self.asked.insert(from.clone(), number);
            self.append(Entry::Asked {
                by: from.clone(),
                number,
                op,
            });
        }
        self.drain_core();
    }
}
