//! `ordering = "total"`: every server is given its inputs (opens, bytes, ends) one at a
//! time in the order of the event log, the next only when it has taken the last.
//!
//! ```text
//!  events ──> history ──────────────┐ (replay)
//!         └─> pending ──> give ──> one connection's input ──> its socket ──> server
//!                           ^                                                   │
//!                           └──── taken? (the kernel's queues, `queues.rs`) <───┘
//! ```
//! A server whose state is shared by its connections then goes through the same states on every
//! replica, if it is a single-threaded loop. What it was given is kept as a whole, so that a fresh
//! server can be brought to the same state: one that joins, and one that died.

mod checkpoints;
mod image;
mod pace;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::Duration;

use bytes::Bytes;
use mio::Registry;
use tracing::{error, info, warn};
use unbroken_tcpstate::{ConnId, Event, EventNo};

pub(crate) use self::image::{OrderHeader, OrderImage};
pub(crate) use self::pace::Outlook;
use self::pace::Pace;
use super::super::history::{Entry, Found, History, INPUT_COST_BYTES, Place, What};
use super::super::queues::{Queues, Seen};
use super::super::runner::{Attempt, Progress, Runner};
use super::super::spill::{Piece, Spill};
use super::super::upstream::Upstream;
use super::{Input, OutputKeeper, Servers};
use crate::clock::BootTime;
use crate::fault::planted;

/// After an input the queue is looked at when the server says something, and at the latest so much
/// later; then after twice that, and so on. A server that answers each input tells by that.
const FIRST_LOOK: Duration = Duration::from_micros(40);
const FIRST_LOOK_ANSWERING: Duration = Duration::from_micros(500);
const LOOKS_APART_MAX: Duration = Duration::from_millis(1);
/// Inputs of one connection that follow each other directly are one stream: so many go together.
const TOGETHER_MAX: usize = 16;
/// Inputs that wait to be given are in memory up to here, beside their history.
const PENDING_BYTES_MAX: usize = 64 << 20;
/// Inputs given in one turn at most.
const GIVE_PER_TURN: usize = 64;
/// A Unix socket does not show whether the end of input was read; the server gets this long.
const END_UNSEEN: Duration = Duration::from_millis(2);
/// What others have passed over is waited for this long all the same: a replay is faster than life.
const PASSED_OVER_WAIT: Duration = Duration::from_millis(10);
/// A server that cannot be brought up is tried again after this long.
const BEGIN_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A connection that stood when a checkpoint was taken.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Live {
    pub(super) conn: ConnId,
    pub(super) port: u16,
    /// Its input that is in the checkpoint's state, and what its server had answered.
    pub(super) taken: u64,
    pub(super) produced: u64,
}

/// What servers begin with in place of all inputs up to some event.
#[derive(Debug)]
struct Base {
    /// One for each service.
    images: Vec<Vec<Piece>>,
    live: Vec<Live>,
}

/// A checkpoint being taken of this replica's servers.
#[derive(Debug)]
struct Taking {
    attempts: Vec<Attempt>,
    since: BootTime,
    place: Place,
    cost_bytes: u64,
    given: EventNo,
    /// The connections as they stood when the servers' state was taken; until then nothing is given.
    live: Option<Vec<Live>>,
    /// What the servers had answered by then has had its time to be read.
    ripe: bool,
}

/// The input that was given last, until the server has taken it.
#[derive(Debug)]
struct Waiting {
    conn: ConnId,
    number: EventNo,
    /// The server's accepting it is what is waited for.
    open: bool,
    since: BootTime,
    look_at: BootTime,
    apart: Duration,
    /// That it is passed over was asked for.
    asked: bool,
}

impl Waiting {
    fn new(now: BootTime, conn: ConnId, number: EventNo, open: bool, answers: bool) -> Self {
        let first = if answers && !open {
            FIRST_LOOK_ANSWERING
        } else {
            FIRST_LOOK
        };
        Self {
            conn,
            number,
            open,
            since: now,
            look_at: now + first,
            apart: first * 2,
            asked: false,
        }
    }
}

/// The order of all inputs of a VIP, and how far the servers have come in it.
#[derive(Debug)]
pub(crate) struct Order {
    history: History,
    history_bytes_max: u64,
    /// What a server begins with, if not with nothing.
    base: Option<Base>,
    /// Each with its place in the history.
    pending: VecDeque<(Place, Entry)>,
    pending_bytes: usize,
    /// Inputs before the pending ones that are given again.
    replay: Option<Place>,
    /// Connections of the base that are yet to be opened.
    reopen: VecDeque<Live>,
    /// What the server has been given so far cost so much.
    given_cost: u64,
    /// When the replay began, and with how much before it.
    replay_from: Option<(BootTime, u64)>,
    waiting: Option<Waiting>,
    skips: BTreeSet<(ConnId, EventNo)>,
    /// Connections whose input is not waited for.
    passed: BTreeSet<ConnId>,
    stall: Duration,
    /// The server said something when it took the last input.
    answers: bool,
    pace: Option<Pace>,
    /// Nothing is given before.
    hold_until: BootTime,
    queues: Queues,
    runners: Vec<Runner>,
    attempt: Option<Taking>,
    attempt_after: BootTime,
    /// The server has said something since it was given the last input.
    spoke: bool,
    /// Since when a checkpoint has been wanted.
    due_since: Option<BootTime>,
    /// It is given nothing more for a moment, in which it may say something.
    listening: bool,
    /// The servers have been given nothing since they began, which was with nothing.
    pristine: bool,
    began_at: BootTime,
    /// The servers lack inputs that are not kept.
    ruined: bool,
    /// What they are given next is being read from the disk.
    loading: bool,
    blind: bool,
    queues_failed: bool,
}

impl Order {
    /// # Errors
    /// The kernel does not show queues.
    pub(crate) fn new(
        history_bytes_max: u64,
        stall: Duration,
        runners: Vec<Runner>,
        now: BootTime,
    ) -> io::Result<Self> {
        Ok(Self {
            history: History::new(history_bytes_max),
            history_bytes_max,
            base: None,
            pending: VecDeque::new(),
            pending_bytes: 0,
            replay: None,
            reopen: VecDeque::new(),
            given_cost: 0,
            replay_from: None,
            waiting: None,
            skips: BTreeSet::new(),
            passed: BTreeSet::new(),
            stall,
            answers: false,
            pace: None,
            hold_until: now,
            queues: Queues::open()?,
            runners,
            attempt: None,
            attempt_after: now,
            spoke: true,
            due_since: None,
            listening: false,
            pristine: true,
            began_at: now,
            ruined: false,
            loading: false,
            blind: false,
            queues_failed: false,
        })
    }

    fn append(&mut self, entry: Entry, spill: &Spill) {
        let complete = self.history.complete();
        let place = self.history.end();
        self.history.append(&entry, spill);
        if complete && !self.history.complete() {
            self.on_given_up();
        }
        if self.replay.is_none() {
            self.pending_bytes += entry.bytes();
            self.pending.push_back((place, entry));
            // A server that is far behind is given what the history holds, which may be on disk.
            if self.pending_bytes > PENDING_BYTES_MAX && self.history.complete() {
                self.replay = self.pending.front().map(|(place, _)| *place);
                self.forget_pending();
            }
        }
    }

    fn forget_pending(&mut self) {
        self.pending.clear();
        self.pending_bytes = 0;
    }

    /// The history keeps nothing any more.
    fn on_given_up(&mut self) {
        error!("the history of inputs is full: no replica can be brought up any more");
        // What a checkpoint was to take the place of is gone; the next begins another history.
        self.attempt = None;
        // What was to be given again is gone.
        self.ruined |= self.replay.take().is_some();
    }

    fn next(&mut self, spill: &Spill) -> Option<Entry> {
        self.loading = false;
        if let Some(cursor) = &mut self.replay {
            match self.history.read(cursor, spill) {
                Found::Input(entry) => return Some(entry),
                Found::Loading => {
                    self.loading = true;
                    return None;
                }
                Found::Damaged => {
                    error!("the history of inputs is damaged");
                    self.ruined = true;
                    return None;
                }
                Found::End => {}
            }
            self.replay = None;
            if let Some((_, bytes)) = self.replay_from.take() {
                info!(bytes, "the server was brought up by replay");
            }
        }
        let (_, entry) = self.pending.pop_front()?;
        self.pending_bytes -= entry.bytes();
        Some(entry)
    }

    /// Where the inputs begin that the servers have not been given.
    fn place(&self) -> Place {
        match (self.replay, self.pending.front()) {
            (Some(place), _) => place,
            (None, Some((place, _))) => *place,
            (None, None) => self.history.end(),
        }
    }

    /// A further piece of the same connection's input, if it follows directly.
    fn next_of(&mut self, conn: ConnId, spill: &Spill) -> Option<(EventNo, Bytes)> {
        if self.replay.is_some() {
            let mut ahead = self.replay?;
            return match self.history.read(&mut ahead, spill) {
                Found::Input(Entry {
                    number,
                    conn: of,
                    what: What::Data(bytes),
                }) if of == conn => {
                    self.replay = Some(ahead);
                    Some((number, bytes))
                }
                _ => None,
            };
        }
        let (_, entry) = self
            .pending
            .pop_front_if(|(_, entry)| entry.conn == conn && matches!(entry.what, What::Data(_)))?;
        self.pending_bytes -= entry.bytes();
        let Entry { number, what, .. } = entry;
        match what {
            What::Data(bytes) => Some((number, bytes)),
            What::Open { .. } | What::Fin | What::End { .. } => None,
        }
    }

    /// Whether the server's input at `number` was passed over by an event.
    fn skipped(&self, conn: ConnId, number: EventNo) -> bool {
        self.skips
            .range((conn, number)..=(conn, EventNo(u64::MAX)))
            .next()
            .is_some()
    }

    fn up(&self) -> bool {
        self.runners.iter().all(Runner::up)
    }

    /// What the servers have yet to be given, as bytes that they are behind.
    fn behind(&self) -> u64 {
        self.history.cost_bytes() - self.given_cost
    }

    /// Servers that begin with nothing, and are given everything again.
    fn begin(&mut self, now: BootTime) {
        self.forget_pending();
        self.loading = false;
        self.waiting = None;
        self.passed.clear();
        self.replay = Some(self.history.start());
        self.attempt = None;
        let base = self.base.as_ref();
        self.reopen = base.map_or(VecDeque::new(), |b| b.live.iter().cloned().collect());
        self.given_cost = 0;
        self.replay_from = Some((now, self.behind()));
        self.began_at = now;
        self.ruined = false;
        let pristine = std::mem::replace(&mut self.pristine, true);
        if let Some(base) = &self.base {
            for (runner, image) in self.runners.iter_mut().zip(&base.images) {
                runner.restart(Some(image.clone()));
            }
            // Not to be begun with when it is not wanted any more.
            self.pristine = false;
        } else if !pristine {
            for runner in &mut self.runners {
                runner.restart(None);
            }
        }
    }
}

impl Servers {
    /// Inputs are given in one order over all connections.
    pub(crate) fn set_order(&mut self, order: Order) {
        self.order = Some(order);
        self.given = Some(EventNo(0));
    }

    /// Whether inputs are given in one order.
    pub(crate) fn ordered(&self) -> bool {
        self.order.is_some()
    }

    /// Puts what an event means for a server in its place. True: in no order but the connection's.
    pub(super) fn enqueue(&mut self, number: EventNo, event: &Event) -> bool {
        let Some(order) = &mut self.order else {
            return true;
        };
        let (conn, what) = match event {
            Event::Open { state } => {
                let port = state.local_port();
                (ConnId(number.0), What::Open { port })
            }
            Event::Data { conn, bytes, .. } => (*conn, What::Data(bytes.clone())),
            Event::PeerFin { conn, .. } => (*conn, What::Fin),
            Event::Reset { conn, .. } => (*conn, What::End { abort: true }),
            Event::Closed { conn } => (*conn, What::End { abort: false }),
            Event::Skip { conn } => {
                order.skips.insert((*conn, number));
                return false;
            }
            // Compared at once, whatever the servers wait for.
            Event::Answered { .. } => return true,
            Event::HalfOpen { .. } | Event::Acked { .. } | Event::LocalFin { .. } => return false,
        };
        let over = matches!(what, What::End { .. });
        order.append(Entry { number, conn, what }, &self.spill);
        if over {
            // What its server says is of use to nobody now, but must be drained.
            self.wake(conn);
        }
        false
    }

    /// Whether a connection's server is read for nobody: it must not be held up by what it says.
    pub(super) fn is_unwanted(&self, conn: ConnId, keeper: &impl OutputKeeper) -> bool {
        self.given.is_some() && !keeper.wants(conn)
    }

    /// Gives the servers what they may be given now.
    pub(crate) fn advance(
        &mut self,
        now: BootTime,
        registry: &Registry,
        keeper: &mut impl OutputKeeper,
    ) {
        let Some(mut order) = self.order.take() else {
            return;
        };
        if order.ruined || order.runners.iter().any(Runner::down) {
            self.dead = true;
        }
        order.spoke |= self.heard;
        if order.up() && !order.ruined {
            for _ in 0..GIVE_PER_TURN {
                if !self.settled(now, &mut order, keeper) {
                    break;
                }
                if !self.checkpoint(now, &mut order, keeper) || now < order.hold_until {
                    break;
                }
                if let Some(live) = order.reopen.pop_front() {
                    self.reopen(now, &live, &mut order, registry, keeper);
                    continue;
                }
                let Some(entry) = order.next(&self.spill) else {
                    break;
                };
                order.given_cost += entry.cost_bytes();
                self.give(now, entry, &mut order, registry, keeper);
            }
        }
        order.spoke |= std::mem::take(&mut self.heard);
        self.order = Some(order);
    }

    /// Whether nothing is waited for (any more).
    fn settled(
        &mut self,
        now: BootTime,
        order: &mut Order,
        keeper: &mut impl OutputKeeper,
    ) -> bool {
        if planted!(OrderIgnored) {
            order.waiting = None;
        }
        let Some(waiting) = &mut order.waiting else {
            return true;
        };
        let conn = waiting.conn;
        let connected = |s: &super::Server| s.upstream.as_ref().is_some_and(Upstream::connected);
        let looks = self.heard || now >= waiting.look_at;
        let taken = looks && self.taken_all(now, order, conn);
        let Some(waiting) = &mut order.waiting else {
            return true;
        };
        if !taken && looks {
            waiting.look_at = now + waiting.apart;
            waiting.apart = (waiting.apart * 2).min(LOOKS_APART_MAX);
        }
        let waited = now.since(waiting.since);
        let number = waiting.number;
        let passed = !taken && waited >= PASSED_OVER_WAIT && order.skipped(conn, number);
        if taken || passed {
            order.answers = self.heard;
            order.waiting = None;
            if passed {
                order.passed.insert(conn);
            }
            let closing = self.servers.get(&conn).and_then(|s| s.closing);
            if let Some(abort) = closing {
                self.finish(conn, abort);
            }
            return true;
        }
        let stalled = waited >= order.stall && self.servers.get(&conn).is_some_and(connected);
        if stalled
            && keeper.leads()
            && let Some(waiting) = &mut order.waiting
            && !std::mem::replace(&mut waiting.asked, true)
        {
            // A server that waits for a client to read is not one that waits for another's input.
            let unread: Vec<ConnId> = self.unread(keeper).collect();
            if unread.is_empty() {
                warn!(conn = conn.0, ?waited, "input left untaken is passed over");
                keeper.skip(conn);
            } else {
                for conn in unread {
                    warn!(
                        conn = conn.0,
                        "a client that does not read holds others up: reset"
                    );
                    keeper.client_stalled(conn);
                }
                (waiting.since, waiting.asked) = (now, false);
            }
        }
        false
    }

    /// Connections whose clients leave so much unread that their servers are not read either.
    fn unread<'a>(&'a self, keeper: &'a impl OutputKeeper) -> impl Iterator<Item = ConnId> + 'a {
        self.servers
            .iter()
            .filter(|(conn, s)| {
                s.upstream.as_ref().is_some_and(Upstream::readable)
                    && keeper.wants(**conn)
                    && keeper.room(**conn) == 0
            })
            .map(|(conn, _)| *conn)
    }

    /// Whether a connection's server has taken everything that it was given.
    fn taken_all(&mut self, now: BootTime, order: &mut Order, conn: ConnId) -> bool {
        let Some(server) = self.servers.get(&conn).filter(|s| !s.lost) else {
            return true;
        };
        let Some(upstream) = server.upstream.as_ref().filter(|u| u.connected()) else {
            return false;
        };
        if upstream.taken() < server.input.end() {
            return false;
        }
        let seen = match upstream.look(&mut order.queues) {
            Ok(seen) => seen,
            Err(error) => {
                if !std::mem::replace(&mut order.queues_failed, true) {
                    error!(%error, "the kernel does not show what the server has taken");
                }
                return true;
            }
        };
        let waiting = order.waiting.as_ref().filter(|w| w.conn == conn);
        match seen {
            Seen::NotAccepted => false,
            Seen::Unread(0) if upstream.end_is_unseen() => {
                waiting.is_none_or(|w| now.since(w.since) >= END_UNSEEN)
            }
            Seen::Unread(n) => n == 0,
            Seen::Closed => true,
            Seen::Missing => {
                let open = waiting.is_some_and(|w| w.open);
                if open && !upstream.readable() && !std::mem::replace(&mut order.blind, true) {
                    error!(
                        target = ?server.target,
                        "the server's end of its connections cannot be seen (another network \
                         namespace?): its inputs are in order only as far as it takes them in order"
                    );
                }
                true
            }
        }
    }

    /// Gives one input, and those of the same connection that follow it directly.
    fn give(
        &mut self,
        now: BootTime,
        entry: Entry,
        order: &mut Order,
        registry: &Registry,
        keeper: &mut impl OutputKeeper,
    ) {
        order.pristine = false;
        (order.spoke, order.listening) = (false, false);
        let Entry { number, conn, what } = entry;
        let mut newest = number;
        let open = matches!(what, What::Open { .. });
        // Its queue has become empty since it was passed over: waited for again.
        if order.passed.contains(&conn) && self.taken_all(now, order, conn) {
            order.passed.remove(&conn);
        }
        match what {
            What::Open { port } => self.open(now, conn, port, Input::default(), number, registry),
            What::Data(bytes) => {
                let Some(server) = self.servers.get_mut(&conn) else {
                    return;
                };
                let before = server.input.cost_bytes();
                let taken = server.upstream.as_ref().map_or(0, Upstream::taken);
                server.input.forget_before(taken);
                server.input.push(number, server.input.end(), bytes);
                for _ in 1..TOGETHER_MAX {
                    let Some((number, bytes)) = order.next_of(conn, &self.spill) else {
                        break;
                    };
                    order.given_cost += bytes.len() as u64 + INPUT_COST_BYTES;
                    server.input.push(number, server.input.end(), bytes);
                    newest = number;
                }
                self.history_bytes = self.history_bytes + server.input.cost_bytes() - before;
            }
            What::Fin => {
                let Some(server) = self.servers.get_mut(&conn) else {
                    return;
                };
                server.input.finish();
                server.fin_number = Some(number);
            }
            What::End { abort } => {
                let Some(server) = self.servers.get_mut(&conn) else {
                    return;
                };
                let shut = server.upstream.as_ref().is_none_or(Upstream::shut);
                if server.lost || shut || order.passed.contains(&conn) {
                    self.given = Some(number);
                    self.finish(conn, abort);
                    return;
                }
                // The end is an input like another: seen in order, then the connection goes.
                server.input.finish();
                server.closing = Some(abort);
            }
        }
        self.given = Some(newest);
        self.turn(now, conn, keeper);
        if !order.passed.contains(&conn) {
            order.waiting = Some(Waiting::new(now, conn, number, open, order.answers));
        }
    }

    fn finish(&mut self, conn: ConnId, abort: bool) {
        if let Some(upstream) = self.remove(conn)
            && abort
        {
            upstream.abort();
        }
    }

    /// The servers died: others begin, and are given everything again. False: what they were given is
    /// not kept.
    pub(crate) fn begin_again(&mut self, now: BootTime) -> bool {
        let Some(order) = &mut self.order else {
            return true;
        };
        if !order.history.complete() {
            return false;
        }
        if now.since(order.began_at) < BEGIN_AGAIN_AFTER {
            self.dead = true;
            return true;
        }
        warn!(
            bytes = order.history.bytes(),
            "the server begins anew, and is given everything again"
        );
        order.begin(now);
        self.drop_connections();
        true
    }

    /// This replica is out of its view: its servers' state is nobody's (R3).
    pub(super) fn clear_order(&mut self, now: BootTime) {
        if let Some(order) = &mut self.order {
            order.history = History::new(order.history_bytes_max);
            order.skips.clear();
            order.base = None;
            order.begin(now);
            self.given = Some(EventNo(0));
        }
    }

    /// What is behind for lack of being given, and whether the servers are up.
    pub(super) fn order_lag(&self) -> (u64, bool) {
        self.order
            .as_ref()
            .map_or((0, true), |order| (order.behind(), order.up()))
    }

    pub(super) fn order_memory_bytes(&self) -> u64 {
        self.order.as_ref().map_or(0, |o| o.history.memory_bytes())
    }

    /// What could not be written, or cannot be read, is of no use to who joins.
    pub(super) fn give_up_order_if_failed(&mut self) {
        let Some(order) = &mut self.order else { return };
        let mut images = order
            .base
            .iter()
            .flat_map(|base| base.images.iter().flatten());
        let image_failed = images.any(|p| matches!(p, Piece::Stored(stored) if stored.failed()));
        if order.history.complete() && (image_failed || order.history.spill_failed()) {
            order.history.give_up();
            order.on_given_up();
        }
    }

    /// When the next look at a queue is due, or the next input.
    pub(super) fn order_timeout(&self) -> Option<BootTime> {
        let order = self.order.as_ref().filter(|o| o.up())?;
        if order.attempt.as_ref().is_some_and(|a| a.live.is_none()) {
            // Its progress wakes the loop; once it is ripe, at once.
            let ripe = order.attempt.as_ref().is_some_and(|a| a.ripe);
            return ripe.then(|| BootTime::from_micros(0));
        }
        match &order.waiting {
            Some(waiting) => Some(waiting.look_at),
            // What was read wakes the loop.
            None if order.loading || order.ruined => None,
            None if order.behind() > 0 => Some(order.hold_until),
            None => None,
        }
    }
}
