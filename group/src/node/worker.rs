//! The node's thread: sockets, clock and coordinator on one side, the process on the other.

mod placing;

use super::bundle::{self, Bundles};
use super::events::Batch;
use super::{
    Event, Events, Inputs, JoinError, NodeConfig, Place, Received, Room, StartError, StateWanted,
    Unplaced, now,
};
use crate::driver::{Driver, TOKENS};
use crate::output::{GroupStatus, RegistryReply};
use crate::process::{
    Command, GroupEvent, GroupId, GroupView, Multicast, Output, Process, ProcessConfig, Refused,
};
use crate::registry::{Answer, Registry};
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use mio::{Events as Ready, Poll, Token, Waker};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};

/// Batches of datagrams taken before timers are looked at.
const BATCHES_MAX: usize = 8;
/// Inputs of programs taken before sockets are looked at.
const INPUTS_MAX: usize = 512;
/// A thread that always has something to do looks at its sockets this often: which are ready is told by looking only.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// The status is told this often at most.
const STATUS_EVERY: Duration = Duration::from_millis(20);
/// A life that was shorter than this is followed by a pause, which doubles from the first of these to the last.
const SHORT_LIFE: Duration = Duration::from_secs(10);
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];
const WAKER: Token = Token(TOKENS);

/// What the thread is asked for.
pub(crate) enum Input {
    Registry(u64, RegistryReply),
    Join(String, oneshot::Sender<Result<Joined, JoinError>>),
    /// Without a sender for the answer: it is not too large, and who sends waits for nothing.
    Send(Sending, Option<oneshot::Sender<Result<(), Refused>>>),
    /// Of this membership; `None`: it names what no later one has.
    Command(
        Command,
        Option<Membership>,
        Option<oneshot::Sender<Result<(), Refused>>>,
    ),
    /// The program has taken what held up this group.
    Resume(GroupId),
    Stop(oneshot::Sender<()>),
    End,
}

/// Which of this node's memberships, one after the other in the same group, a handle is of.
#[derive(Clone)]
pub(crate) struct Membership {
    pub(crate) group: GroupId,
    pub(crate) room: Arc<Room>,
}

/// A message, and where its fate is told.
pub(crate) struct Sending {
    pub(crate) of: Membership,
    pub(crate) message: Multicast,
    /// Until it is in the group. A call has none: it is refused where there is no room.
    pub(crate) place: Option<Place>,
    pub(crate) done: Option<oneshot::Sender<()>>,
    pub(crate) replies: Option<UnboundedSender<ReplyEvent>>,
}

pub(crate) enum ReplyEvent {
    Reply(MemberId, Bytes),
    Over {
        failed: Vec<MemberId>,
        timed_out: bool,
    },
}

/// The newest view, and with which view each of its members came: one may leave and come back between two looks.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) view: GroupView,
    since: Vec<u64>,
}

impl Seen {
    fn new(view: GroupView, before: Option<&Self>) -> Self {
        let since = view.members.iter().map(|m| {
            let before = before.filter(|_| !view.joined.contains(m));
            before.and_then(|b| b.since(m)).unwrap_or(view.id)
        });
        Self {
            since: since.collect(),
            view,
        }
    }

    /// The first view of this membership of a member.
    pub(crate) fn since(&self, member: &MemberId) -> Option<u64> {
        self.since.get(self.view.rank(member)?).copied()
    }
}

/// A membership as it begins.
pub(crate) struct Joined {
    pub(crate) me: MemberId,
    pub(crate) events: Events,
    pub(crate) view: watch::Receiver<Option<Seen>>,
    pub(crate) progress: watch::Receiver<(u64, u64)>,
    pub(crate) room: Arc<Room>,
}

/// The thread's side of one membership.
struct Seat {
    name: String,
    batches: UnboundedSender<Batch>,
    /// What has happened since the last batch.
    batch: Batch,
    queued: Arc<AtomicU64>,
    paused: bool,
    view: watch::Sender<Option<Seen>>,
    progress: watch::Sender<(u64, u64)>,
    room: Arc<Room>,
    /// What was handed over and finds no room in the group, and a wish to leave behind it.
    held: VecDeque<Input>,
    done: BTreeMap<u64, oneshot::Sender<()>>,
    calls: BTreeMap<u64, UnboundedSender<ReplyEvent>>,
    /// Nobody waited for it any more when it began; it is being left.
    unwanted: bool,
}

pub(super) struct Worker {
    config: NodeConfig,
    poll: Poll,
    driver: Driver,
    /// What is to be sent when the input at hand is through.
    bundles: Bundles,
    process: Process,
    /// Counts processes: answers for an earlier one are void.
    life: u64,
    born_at: Instant,
    /// The process is out, and the next begins then.
    reborn_at: Option<Instant>,
    /// Before the next life, should this one be short.
    pause: Duration,
    registry: Box<dyn Registry>,
    receiver: Receiver<Input>,
    status: Arc<Mutex<Option<GroupStatus>>>,
    status_at: Instant,
    seats: BTreeMap<GroupId, Seat>,
    /// Seats with a batch that was not given yet.
    told: Vec<GroupId>,
    /// Seats with something held.
    holding: BTreeSet<GroupId>,
    /// Whose turn it is next among these.
    place_from: GroupId,
    /// What was handed over and is in no group yet, of all seats.
    unplaced: Arc<Unplaced>,
    joining: BTreeMap<String, oneshot::Sender<Result<Joined, JoinError>>>,
    /// Who joins again before a membership that nobody waited for has ended.
    again: BTreeMap<String, oneshot::Sender<Result<Joined, JoinError>>>,
    next_number: u64,
    stopping: Option<oneshot::Sender<()>>,
    over: bool,
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

fn begin(config: &NodeConfig, driver: &mut Driver, at: Instant) -> io::Result<Process> {
    let me = MemberId::new(config.name.clone(), u128::from_le_bytes(random()?));
    driver.set_member(config.site, me.clone());
    let core = config.core(me, u128::from_le_bytes(random()?));
    let mut process = ProcessConfig::new(core);
    process.slow_after = config.slow_after;
    Ok(Process::new(process, u64::from_le_bytes(random()?), at))
}

impl Worker {
    pub(super) fn open(
        config: NodeConfig,
        registry: Box<dyn Registry>,
        receiver: Receiver<Input>,
        status: Arc<Mutex<Option<GroupStatus>>>,
    ) -> Result<Self, StartError> {
        let at = now();
        let (name, members) = (&config.name, &config.members);
        let mut driver = Driver::open_with(name, members, &config.key, at, &config.driver)?;
        let poll = Poll::new()?;
        driver.register(poll.registry(), 0)?;
        let process = begin(&config, &mut driver, at)?;
        let bundles = Bundles::new(config.datagram_bytes_max);
        Ok(Self {
            config,
            poll,
            driver,
            bundles,
            process,
            life: 0,
            born_at: at,
            reborn_at: None,
            pause: PAUSES[0],
            registry,
            receiver,
            status,
            status_at: at,
            seats: BTreeMap::new(),
            told: Vec::new(),
            holding: BTreeSet::new(),
            place_from: GroupId(0),
            unplaced: Arc::default(),
            joining: BTreeMap::new(),
            again: BTreeMap::new(),
            next_number: 0,
            stopping: None,
            over: false,
        })
    }

    /// What ends the thread's sleep; there is one.
    pub(super) fn waker(&self) -> io::Result<Waker> {
        Waker::new(self.poll.registry(), WAKER)
    }

    pub(super) fn spawn(mut self, inputs: Inputs, end: watch::Sender<bool>) -> io::Result<()> {
        let name = format!("group {}", self.config.name);
        std::thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = self.run(&inputs) {
                tracing::error!(%error, "the node's event loop failed");
            }
            for seat in self.seats.values() {
                seat.room.close();
            }
            drop(self);
            end.send_replace(true);
        })?;
        Ok(())
    }

    fn run(&mut self, inputs: &Inputs) -> io::Result<()> {
        let mut ready = Ready::with_capacity(TOKENS + 1);
        let mut busy_at = now();
        let mut looked_at = busy_at;
        self.settle(inputs)?;
        while !self.over {
            let mut idle = self.receive(inputs)?;
            while let Some(input) = self.driver.control.poll_input(now()) {
                self.process.handle_control(now(), &input.peer, input.event);
                self.settle(inputs)?;
            }
            for _ in 0..INPUTS_MAX {
                match self.receiver.try_recv() {
                    Ok(input) => {
                        idle = false;
                        self.on_input(input);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => self.over = true,
                }
                // One thing after the other, but sent together: what is due is sent when the inputs are through.
                while let Some(output) = self.process.poll_ready() {
                    self.execute(inputs, output)?;
                }
            }
            self.settle(inputs)?;
            if self.place_held(inputs)? {
                idle = false;
            }
            let at = now();
            if self.process.poll_timeout().is_some_and(|t| t <= at) {
                self.process.handle_timeout(at);
                self.settle(inputs)?;
            }
            self.be_reborn(inputs)?;
            self.driver.sender.handle_timeout(at);
            self.tell_status(at);
            if !idle {
                busy_at = at;
                if at.since(looked_at) >= LOOK_EVERY {
                    looked_at = at;
                    self.look(inputs, &mut ready, Some(Duration::ZERO))?;
                }
            } else if !self.driver.receiver.readable() && !self.over {
                let spinning = at.since(busy_at) < self.config.spin;
                self.sleep(inputs, &mut ready, spinning)?;
            }
        }
        if let Some(done) = self.stopping.take() {
            let _ = done.send(());
        }
        Ok(())
    }

    /// Takes datagrams. Whether there was none.
    fn receive(&mut self, inputs: &Inputs) -> io::Result<bool> {
        let mut idle = true;
        for _ in 0..BATCHES_MAX {
            if !self.driver.receiver.readable() {
                break;
            }
            let process = &mut self.process;
            let mut outputs = Vec::new();
            let at = now();
            self.driver.receiver.receive(|_, from, body| {
                idle = false;
                process.handle_bodies(at, from, bundle::bodies(body));
                outputs.extend(std::iter::from_fn(|| process.poll_ready()));
            })?;
            for output in outputs {
                self.execute(inputs, output)?;
            }
            self.settle(inputs)?;
        }
        Ok(idle)
    }

    /// Waits for sockets, inputs or time; when spinning, only looks.
    fn sleep(&mut self, inputs: &Inputs, ready: &mut Ready, spinning: bool) -> io::Result<()> {
        let wait = if spinning {
            // Others of this core go first.
            std::thread::yield_now();
            Some(Duration::ZERO)
        } else {
            let due = [
                self.process.poll_timeout(),
                self.driver.poll_timeout(),
                self.reborn_at,
            ];
            inputs.about_to_sleep();
            // What came before that wakes nobody.
            if let Ok(input) = self.receiver.try_recv() {
                inputs.awake();
                self.on_input(input);
                return self.settle(inputs);
            }
            due.into_iter().flatten().min().map(|t| t.since(now()))
        };
        self.look(inputs, ready, wait)
    }

    /// Learns which sockets are ready, and waits for so long if none is.
    fn look(
        &mut self,
        inputs: &Inputs,
        ready: &mut Ready,
        wait: Option<Duration>,
    ) -> io::Result<()> {
        let polled = self.poll.poll(ready, wait);
        inputs.awake();
        match polled {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => result?,
        }
        for event in ready.iter().filter(|e| e.token() != WAKER) {
            self.driver.handle_ready(event.token());
        }
        Ok(())
    }

    fn tell_status(&mut self, at: Instant) {
        if at >= self.status_at {
            self.status_at = at + STATUS_EVERY;
            let status = self.process.status();
            *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        }
    }

    /// Carries out everything that the process asks for.
    fn settle(&mut self, inputs: &Inputs) -> io::Result<()> {
        while let Some(output) = self.process.poll_output() {
            self.execute(inputs, output)?;
        }
        self.send_bundles();
        // After what had to be sent: the program's thread then wakes up while others are at it already.
        for group in std::mem::take(&mut self.told) {
            self.give_batch(group);
        }
        Ok(())
    }

    fn send_bundles(&mut self) {
        let (sender, site) = (&mut self.driver.sender, self.config.site);
        let mut send = |to: &[_], bodies: &[_]| sender.send(now(), site, to, bodies);
        self.bundles.flush(&mut send);
    }

    fn give_batch(&mut self, group: GroupId) {
        let Some(seat) = self.seats.get_mut(&group) else {
            return;
        };
        let batch = std::mem::take(&mut seat.batch);
        if batch.events.is_empty() {
            return;
        }
        let queued = seat.queued.fetch_add(batch.bytes, Ordering::Relaxed) + batch.bytes;
        // A program that has dropped its events takes none: it is as one that does not keep up.
        let _ = seat.batches.send(batch);
        if queued > self.config.queue_bytes_max && !seat.paused {
            seat.paused = true;
            self.pause(group, true);
        }
    }

    fn execute(&mut self, inputs: &Inputs, output: Output) -> io::Result<()> {
        match output {
            Output::Send { to, bodies } => {
                let (sender, site) = (&mut self.driver.sender, self.config.site);
                let mut send = |to: &[_], bodies: &[_]| sender.send(now(), site, to, bodies);
                self.bundles.put(to, bodies, &mut send);
            }
            Output::Registry(request) => {
                let (life, inputs) = (self.life, inputs.clone());
                let send = move |reply| {
                    inputs.put(Input::Registry(life, reply));
                };
                let answer = Answer {
                    request: request.clone(),
                    send: Some(Box::new(send)),
                };
                self.registry.request(request, answer);
            }
            Output::Instance(instance) => {
                self.send_bundles();
                self.driver.set_instance(self.config.site, instance);
            }
            Output::Epoch { view_id, .. } => {
                self.send_bundles(); // under the key that was meant
                self.driver.set_epoch(self.config.site, view_id);
            }
            Output::Group { group, event } => self.on_event(inputs, group, event),
            Output::CannotJoin { name } => {
                if let Some(done) = self.joining.remove(&name) {
                    let _ = done.send(Err(JoinError::Refused));
                }
            }
            Output::Notice(notice) => tracing::info!(?notice, "site group"),
            Output::Outside => {
                if self.stopping.is_some() {
                    self.over = true;
                    return Ok(());
                }
                self.life += 1;
                let at = now();
                if at.since(self.born_at) >= SHORT_LIFE {
                    self.pause = PAUSES[0];
                }
                // Who is put out again and again does not spin.
                self.reborn_at = Some(at + self.pause);
                self.pause = (self.pause * 2).min(PAUSES[1]);
            }
        }
        Ok(())
    }

    /// The next life begins, if it is time.
    fn be_reborn(&mut self, inputs: &Inputs) -> io::Result<()> {
        let at = now();
        if self.reborn_at.is_none_or(|t| t > at) {
            return Ok(());
        }
        self.reborn_at = None;
        self.born_at = at;
        self.send_bundles();
        self.process = begin(&self.config, &mut self.driver, at)?;
        for (group, done) in std::mem::take(&mut self.joining) {
            self.join(group, done);
        }
        self.settle(inputs)
    }

    fn join(&mut self, group: String, done: oneshot::Sender<Result<Joined, JoinError>>) {
        let name = group.clone();
        match self.process.handle_command(now(), Command::Join { group }) {
            // A process that is out is followed by another, which joins.
            Ok(()) | Err(Refused::NotAMember) => {
                self.joining.insert(name, done);
            }
            Err(_) => {
                let _ = done.send(Err(JoinError::Refused));
            }
        }
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::Registry(life, reply) => {
                if life == self.life {
                    self.process.handle_registry(now(), reply);
                }
            }
            Input::Join(group, done) => {
                // In the place of one that does not wait any more.
                let waits = |known: &BTreeMap<_, oneshot::Sender<_>>| {
                    known.get(&group).map(oneshot::Sender::is_closed)
                };
                let seat = self.seats.values().find(|s| s.name == group);
                match (
                    seat.map(|s| s.unwanted),
                    waits(&self.joining),
                    waits(&self.again),
                ) {
                    (None, None, _) => self.join(group, done),
                    (None, Some(true), _) => {
                        self.joining.insert(group, done);
                    }
                    (Some(true), _, None | Some(true)) => {
                        self.again.insert(group, done);
                    }
                    _ => {
                        let _ = done.send(Err(JoinError::Already));
                    }
                }
            }
            Input::Send(sending, answer) => self.on_sending(sending, answer),
            Input::Command(_, Some(of), done) if !self.is_seated(&of) => {
                if let Some(done) = done {
                    let _ = done.send(Err(Refused::NotAMember));
                }
            }
            Input::Command(Command::Leave { .. }, Some(of), done) => self.on_leave(of, done),
            Input::Command(command, _, done) => {
                let result = self.process.handle_command(now(), command);
                if let Some(done) = done {
                    let _ = done.send(result);
                }
            }
            Input::Resume(group) => {
                if let Some(seat) = self.seats.get_mut(&group).filter(|s| s.paused) {
                    seat.paused = false;
                    self.pause(group, false);
                }
            }
            Input::Stop(done) => {
                self.stopping = Some(done);
                let stopped = self.process.handle_command(now(), Command::Stop);
                // A process that is out already makes way for none.
                self.over |= stopped.is_err();
            }
            // A stop that is under way goes on without its node's handle.
            Input::End => self.over |= self.stopping.is_none(),
        }
    }

    fn is_seated(&self, of: &Membership) -> bool {
        let seat = self.seats.get(&of.group);
        seat.is_some_and(|s| Arc::ptr_eq(&s.room, &of.room))
    }

    fn pause(&mut self, group: GroupId, paused: bool) {
        let command = Command::Pause { group, paused };
        // A member that is out by now has nothing to take.
        let _ = self.process.handle_command(now(), command);
    }

    fn on_leave(&mut self, of: Membership, done: Option<oneshot::Sender<Result<(), Refused>>>) {
        let group = of.group;
        let command = Command::Leave { group };
        if let Some(seat) = self.seats.get_mut(&group) {
            seat.room.close();
            if !seat.held.is_empty() {
                seat.held.push_back(Input::Command(command, Some(of), done));
                return;
            }
        }
        let result = self.process.handle_command(now(), command);
        if let Some(done) = done {
            let _ = done.send(result);
        }
    }

    fn on_send(&mut self, sending: Sending) -> Result<(), Refused> {
        let Sending {
            of: Membership { group, .. },
            mut message,
            place,
            done,
            replies,
        } = sending;
        drop(place);
        let seat = self.seats.get_mut(&group).ok_or(Refused::NotAMember)?;
        if replies.is_some() && !seat.held.is_empty() {
            return Err(Refused::Backlog); // it would overtake them
        }
        self.next_number += 1;
        let number = self.next_number;
        // Before it is sent: in a group of one it is done at once.
        if let (Some(done), Some((own, _))) = (done, &mut message.done) {
            *own = number;
            seat.done.insert(number, done);
        }
        if let (Some(replies), Some(calling)) = (replies, &mut message.calling) {
            calling.call = number;
            seat.calls.insert(number, replies);
        }
        let command = Command::Multicast { group, message };
        let result = self.process.handle_command(now(), command);
        if result.is_err()
            && let Some(seat) = self.seats.get_mut(&group)
        {
            seat.done.remove(&number);
            seat.calls.remove(&number);
        }
        result
    }

    fn on_event(&mut self, inputs: &Inputs, group: GroupId, event: GroupEvent) {
        if let GroupEvent::Joined { name } = event {
            return self.on_joined(inputs, group, name);
        }
        let Some(seat) = self.seats.get_mut(&group) else {
            return;
        };
        let event = match event {
            GroupEvent::Joined { .. } => return,
            GroupEvent::Init => Event::Init,
            GroupEvent::State(state) => Event::State(state),
            GroupEvent::View(view) => {
                let seen = Seen::new(view.clone(), seat.view.borrow().as_ref());
                seat.view.send_replace(Some(seen));
                Event::View(view)
            }
            GroupEvent::Message(message) => Event::Message(Received {
                group,
                inputs: message.call.is_some().then(|| inputs.clone()),
                message,
            }),
            GroupEvent::StateWanted { view } => Event::StateWanted(StateWanted {
                group,
                view,
                inputs: inputs.clone(),
            }),
            GroupEvent::Progress { received, total } => {
                seat.progress.send_replace((received, total));
                return;
            }
            GroupEvent::Reply { call, from, body } => {
                if let Some(replies) = seat.calls.get(&call) {
                    let _ = replies.send(ReplyEvent::Reply(from, body));
                }
                return;
            }
            GroupEvent::CallDone {
                call,
                failed,
                timed_out,
            } => {
                if let Some(replies) = seat.calls.remove(&call) {
                    let _ = replies.send(ReplyEvent::Over { failed, timed_out });
                }
                return;
            }
            GroupEvent::Done { number } => {
                if let Some(done) = seat.done.remove(&number) {
                    let _ = done.send(());
                }
                return;
            }
            GroupEvent::Room => return seat.room.news.notify_waiters(),
            GroupEvent::Left { wished } => {
                seat.batch.push(Event::Left { wished });
                // Those who wait for room learn that there is none.
                seat.room.close();
                self.give_batch(group);
                let seat = self.seats.remove(&group);
                if let Some((name, done)) = seat.and_then(|s| self.again.remove_entry(&s.name)) {
                    self.join(name, done);
                }
                return;
            }
        };
        if seat.batch.events.is_empty() {
            self.told.push(group);
        }
        seat.batch.push(event);
    }

    fn on_joined(&mut self, inputs: &Inputs, group: GroupId, name: String) {
        let (batches, taken) = unbounded_channel();
        let (view, views) = watch::channel(None);
        let (progress, progresses) = watch::channel((0, 0));
        let queued = Arc::new(AtomicU64::new(0));
        let room = Arc::new(Room::new(Arc::clone(&self.unplaced)));
        let joined = Joined {
            me: self.process.me().clone(),
            events: Events {
                group,
                batches: taken,
                batch: VecDeque::new(),
                queued: Arc::clone(&queued),
                resume_below: self.config.queue_bytes_max / 2,
                inputs: inputs.clone(),
            },
            view: views,
            progress: progresses,
            room: Arc::clone(&room),
        };
        let seat = Seat {
            name: name.clone(),
            batches,
            batch: Batch::default(),
            queued,
            paused: false,
            view,
            progress,
            room,
            held: VecDeque::new(),
            done: BTreeMap::new(),
            calls: BTreeMap::new(),
            unwanted: false,
        };
        self.seats.insert(group, seat);
        let waits = self.joining.remove(&name);
        if waits.is_none_or(|w| w.send(Ok(joined)).is_err()) {
            // Nobody waits for it any more.
            let seat = self.seats.get_mut(&group).expect("inserted above");
            seat.unwanted = true;
            let _ = self.process.handle_command(now(), Command::Leave { group });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who looks at the third view alone sees that a member has left and come back.
    #[test]
    fn a_return_between_two_looks_is_seen() {
        let (a, b) = (MemberId::new("r1", 1), MemberId::new("r2", 2));
        let view = |id, members: &[&MemberId], joined: &[&MemberId]| GroupView {
            id,
            members: members.iter().copied().cloned().collect(),
            joined: joined.iter().copied().cloned().collect(),
            departed: Vec::new(),
        };
        let first = Seen::new(view(1, &[&a, &b], &[&a, &b]), None);
        let second = Seen::new(view(2, &[&a], &[]), Some(&first));
        let third = Seen::new(view(3, &[&a, &b], &[&b]), Some(&second));
        let since = |seen: &Seen| (seen.since(&a), seen.since(&b));
        assert_eq!(since(&first), (Some(1), Some(1)));
        assert_eq!(since(&second), (Some(1), None));
        assert_eq!(since(&third), (Some(1), Some(3)));
        let fourth = Seen::new(view(4, &[&a, &b], &[]), Some(&third));
        assert_eq!(since(&fourth), since(&third));
    }
}
