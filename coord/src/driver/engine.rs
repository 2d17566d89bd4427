//! The thread that runs the core: one input after the other, then what it wants done.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mio::{Events, Poll, Token, Waker};
use tokio::sync::{oneshot, watch};

use super::clients::{Accepted, Clients};
use super::disk::Disk;
use super::environment::Environment;
use super::links::{Links, Made, Told};
use super::roster::Roster;
use super::{ServerError, Status};
use crate::core::{ConnId, Core, Event, Output};
use crate::metrics::Metrics;
use crate::time::Instant;

/// Inputs waiting for the core at most; who has more waits for room.
const INPUTS_MAX: usize = 16_384;

/// Inputs taken between two looks at the outputs at most: they share one disk write.
const BATCH_MAX: usize = 1024;

/// What the operating system tells at once at most.
const EVENTS_MAX: usize = 256;

/// How long the timers wait for what clients have sent at most.
const LATE_MAX: Duration = Duration::from_millis(10);

/// How old a [`Status`] may be.
const STATUS_EVERY: Duration = Duration::from_millis(20);

/// How old [`Metrics`] may be.
const METRICS_EVERY: Duration = Duration::from_millis(200);

/// Something for the core, from another thread.
pub(super) enum Input {
    /// A link with a peer whose handshake is made.
    Link(Box<Made>),
    /// A server that the log here does not know has dialled.
    Met(u64),
    /// A peer says that this server was removed.
    Removed,
    PeerDied(u64),
    Connect(Accepted),
    Persisted(u64),
    Saved(u64),
    DiskFailed(io::Error),
    Transfer(Option<u64>),
    Stop,
}

/// The way to the core's thread.
#[derive(Debug, Clone)]
pub(super) struct InputSender {
    queue: SyncSender<Input>,
    bell: Arc<Bell>,
}

/// Wakes the core's thread, if it sleeps.
#[derive(Debug)]
struct Bell {
    asleep: AtomicBool,
    waker: Waker,
}

impl Bell {
    fn ring(&self) {
        // Pairs with the fence in `Inputs::lie_down`: either the thread sees what was queued, or
        // this sees that it sleeps.
        fence(Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::Relaxed) {
            // It fails only if the poll is gone, and the thread with it.
            let _ = self.waker.wake();
        }
    }
}

impl InputSender {
    /// From a task: waits for room without blocking its thread. False if the core is gone.
    pub(super) async fn send(&self, mut input: Input) -> bool {
        loop {
            match self.queue.try_send(input) {
                Ok(()) => {
                    self.bell.ring();
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) => {
                    input = back;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// Drops the input if there is no room.
    pub(super) fn try_send(&self, input: Input) {
        if self.queue.try_send(input).is_ok() {
            self.bell.ring();
        }
    }

    /// From a thread of its own.
    pub(super) fn send_blocking(&self, input: Input) {
        if self.queue.send(input).is_ok() {
            self.bell.ring();
        }
    }
}

/// What the core's thread waits for: other threads, and sockets.
pub(super) struct Inputs {
    queue: Receiver<Input>,
    bell: Arc<Bell>,
    poll: Poll,
}

/// The bell's.
const WAKE: Token = Token(0);

impl Inputs {
    /// Gets ready to sleep, unless an input is there.
    fn lie_down(&self) -> Result<Option<Input>, Disconnected> {
        self.bell.asleep.store(true, Ordering::Relaxed);
        // Pairs with the one in `Bell::ring`.
        fence(Ordering::SeqCst);
        let input = self.try_recv();
        if !matches!(input, Ok(None)) {
            self.bell.asleep.store(false, Ordering::Relaxed);
        }
        input
    }

    /// What came first, if anything did.
    pub(super) fn try_recv(&self) -> Result<Option<Input>, Disconnected> {
        match self.queue.try_recv() {
            Ok(input) => Ok(Some(input)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Disconnected),
        }
    }

    /// Where sockets are registered.
    pub(super) fn registry(&self) -> io::Result<mio::Registry> {
        self.poll.registry().try_clone()
    }

    /// Waits for the next input.
    #[cfg(test)]
    pub(super) fn recv(&self) -> Option<Input> {
        self.queue.recv().ok()
    }
}

/// Nobody can send an input any more.
pub(super) struct Disconnected;

pub(super) fn inputs() -> io::Result<(InputSender, Inputs)> {
    let (sender, receiver) = sync_channel(INPUTS_MAX);
    let poll = Poll::new()?;
    let bell = Arc::new(Bell {
        asleep: AtomicBool::new(false),
        waker: Waker::new(poll.registry(), WAKE)?,
    });
    let sender = InputSender {
        queue: sender,
        bell: bell.clone(),
    };
    let inputs = Inputs {
        queue: receiver,
        bell,
        poll,
    };
    Ok((sender, inputs))
}

/// The clock of one server: time since its start.
#[derive(Clone, Copy)]
pub(super) struct Clock(std::time::Instant);

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the driver is where time comes from"
    )]
    pub(super) fn start() -> Self {
        Self(std::time::Instant::now())
    }

    pub(super) fn now(self) -> Instant {
        Instant::from_micros(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    #[expect(clippy::disallowed_methods, reason = "znodes show the time of day")]
    fn wall_ms() -> i64 {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }
}

/// The core with everything that carries out what it wants.
pub(super) struct Engine {
    pub(super) core: Core,
    pub(super) clock: Clock,
    pub(super) inputs: Inputs,
    pub(super) disk: Disk,
    /// A peer is dialled as long as this holds it.
    pub(super) peers: BTreeMap<u64, oneshot::Sender<()>>,
    pub(super) links: Links,
    pub(super) surroundings: Environment,
    pub(super) clients: Clients,
    /// Begins to dial a peer.
    pub(super) link: Box<dyn Fn(u64) -> oneshot::Sender<()> + Send>,
    pub(super) roster: Arc<Roster>,
    /// The log says that this server was removed.
    pub(super) removed: bool,
    /// Tasks of connections end when this is dropped.
    pub(super) _alive: watch::Sender<()>,
    /// Dropped last: who waits for the end then knows that the disk has been closed.
    pub(super) status: watch::Sender<Status>,
    pub(super) metrics: Arc<Mutex<Metrics>>,
}

/// Ends with the engine.
pub(super) type Alive = watch::Receiver<()>;

/// Runs `work` until it ends or the engine does.
pub(super) async fn while_alive(mut alive: Alive, work: impl Future<Output = ()>) {
    tokio::select! {
        _ = alive.changed() => {}
        () = work => {}
    }
}

/// Tokens from here on are links' with peers; those before are clients', who are numbered from 1.
const FIRST_LINK: usize = 1 << (usize::BITS - 2);

fn client_token(conn: ConnId) -> Token {
    let number = usize::try_from(conn.0).expect("fewer connections than addresses");
    assert!(number < FIRST_LINK, "fewer connections than addresses");
    Token(number)
}

fn link_token(number: u64) -> Token {
    Token(FIRST_LINK + usize::try_from(number).expect("fewer links than addresses"))
}

fn hear(core: &mut Core, clock: Clock, told: Told) {
    match told {
        Told::Message { from, message } => core.handle_peer(clock.now(), from, message),
        Told::Unreachable(peer) => core.handle_unreachable(clock.now(), peer),
    }
}

impl Engine {
    /// Runs until it is stopped or the disk fails.
    pub(super) fn run(mut self) -> Result<(), ServerError> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        let mut next_status = self.clock.now();
        let mut next_metrics = self.clock.now();
        self.core.set_wall_clock(self.clock.now(), Clock::wall_ms());
        loop {
            let Ok(first) = self.wait(&mut events, next_status) else {
                return Ok(());
            };
            // What peers and the disk say comes before what clients want.
            let more = std::iter::from_fn(|| self.inputs.try_recv().ok().flatten());
            let batch: Vec<Input> = first.into_iter().chain(more.take(BATCH_MAX)).collect();
            for input in batch {
                match input {
                    Input::Stop => return Ok(()),
                    Input::DiskFailed(error) => return Err(ServerError::Disk(error)),
                    input => self.take(input),
                }
            }
            for event in &events {
                match event.token() {
                    WAKE => {}
                    Token(number) if number >= FIRST_LINK => {
                        self.links.on_event((number - FIRST_LINK) as u64, event);
                    }
                    Token(number) => self.clients.on_event(ConnId(number as u64), event),
                }
            }
            let (core, clock) = (&mut self.core, self.clock);
            self.links.turn(|told| hear(core, clock, told));
            self.clients
                .turn(&mut self.core, self.clock, &self.surroundings);
            // Silence is judged when everybody has been heard, but the timers cannot wait for ever.
            let late = self
                .core
                .poll_timeout()
                .map(|at| self.clock.now().since(at));
            if !self.clients.has_ready() || late > Some(LATE_MAX) {
                self.core.handle_timeout(self.clock.now());
            }
            let mut changed = false;
            while let Some(output) = self.core.poll_output() {
                changed |= self.carry_out(output);
            }
            // Peers first: what they do takes longer.
            let (core, clock) = (&mut self.core, self.clock);
            self.links.flush(|told| hear(core, clock, told));
            self.clients.flush(&mut self.core, self.clock.now());
            if self.removed {
                return Err(ServerError::Removed);
            }
            if changed || self.clock.now() >= next_status {
                next_status = self.clock.now() + STATUS_EVERY;
                self.core.set_wall_clock(self.clock.now(), Clock::wall_ms());
                let status = self.core.status();
                self.status.send_if_modified(|old| {
                    let new = *old != status;
                    *old = status;
                    new
                });
            }
            if self.clock.now() >= next_metrics {
                next_metrics = self.clock.now() + METRICS_EVERY;
                self.measure();
                self.clients.relieve(&mut self.core, self.clock.now());
            }
        }
    }

    /// Puts down what was counted.
    fn measure(&self) {
        let mut metrics = self.core.metrics();
        metrics.sync = self.disk.syncs();
        metrics.peer_backlog_bytes = self.links.backlog();
        self.clients.measure(&mut metrics);
        let shared = self.metrics.lock();
        *shared.expect("no thread panics while it holds this") = metrics;
    }

    /// Sleeps until there is something to do, and no longer than the core wants. If another thread
    /// has said something already, that is returned.
    fn wait(
        &mut self,
        events: &mut Events,
        next_status: Instant,
    ) -> Result<Option<Input>, Disconnected> {
        let wake = self.core.poll_timeout().unwrap_or(next_status);
        let mut patience = wake.min(next_status).since(self.clock.now());
        let mut first = None;
        if self.clients.has_ready() || self.links.has_ready() {
            patience = Duration::ZERO;
        } else {
            first = self.inputs.lie_down()?;
            if first.is_some() {
                patience = Duration::ZERO;
            }
        }
        if let Err(error) = self.inputs.poll.poll(events, Some(patience)) {
            // Interrupted by a signal: there are no events then, and nothing is lost.
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
        }
        self.inputs.bell.asleep.store(false, Ordering::Relaxed);
        Ok(first)
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Link(made) => self.links.add(*made, link_token),
            Input::Met(peer) => {
                self.peers.entry(peer).or_insert_with(|| (self.link)(peer));
            }
            Input::PeerDied(peer) => self.core.handle_peer_died(now, peer),
            Input::Connect(accepted) => {
                self.clients
                    .add(&mut self.core, now, accepted, client_token);
            }
            Input::Persisted(token) => self.core.handle_persisted(now, token),
            Input::Saved(index) => self.core.handle_saved(now, index),
            Input::Transfer(to) => self.core.handle_transfer(now, to),
            Input::Removed => self.core.handle_removed(now),
            Input::Stop | Input::DiskFailed(_) => {
                unreachable!("the loop ends at these")
            }
        }
    }

    /// True if the status should be looked at.
    fn carry_out(&mut self, output: Output) -> bool {
        match output {
            Output::Persist { token, write } => self.disk.write(token, write),
            Output::SaveSnapshot(image) => self.disk.save(image),
            Output::Send { to, message } => {
                if !self.links.send(to, &message) {
                    self.core.handle_unreachable(self.clock.now(), to);
                }
            }
            Output::Reply { conn, frame } => self.clients.reply(conn, &frame),
            Output::Notify { conn, frame } => {
                if !self.clients.notify(conn, &frame) {
                    self.clients.cut(&mut self.core, self.clock.now(), conn);
                }
            }
            Output::Close { conn, reason } => {
                tracing::debug!(conn = conn.0, ?reason, "client connection closed");
                self.clients.close(conn, self.clock.now());
            }
            Output::Event(Event::Leader { leader, term }) => {
                let leader = leader.map_or("none".to_owned(), |id| self.roster.name_of(id));
                tracing::info!(leader, term, "leader");
                return true;
            }
            Output::Event(Event::SessionExpired(session)) => {
                tracing::info!(%session, "session expired");
            }
            Output::Event(Event::Members(members)) => {
                self.roster.update(&members);
                let this = self.core.id();
                let is_peer = |id: u64| id != this && !members.was_removed(id);
                self.peers.retain(|id, _| is_peer(*id));
                self.links.retain(is_peer);
                for id in members.iter().map(|(id, _)| id).filter(|id| is_peer(*id)) {
                    self.peers.entry(id).or_insert_with(|| (self.link)(id));
                }
                return true;
            }
            Output::Event(Event::Removed) => self.removed = true,
        }
        false
    }
}
