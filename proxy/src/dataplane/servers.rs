//! The local server's side of every connection: input kept and fed, output read.
//!
//! Leader and backup run the same code here (R3: every replica's server is fed from the event log);
//! they differ only in who keeps the output, which is [`OutputKeeper`].

mod answers;
mod ending;
mod keeping;
mod lingering;
mod total;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::time::Duration;

use mio::{Registry, Token};
use tracing::{debug, warn};
use unbroken_tcpstate::{ConnId, Event, EventNo};

use self::answers::Answers;
pub(crate) use self::answers::VOTES_MAX;
use self::lingering::Lingering;
pub(crate) use self::total::{Order, OrderHeader, OrderImage, Outlook};
use super::closes::Closes;
use super::divergence::Answer;
use super::input::{Input, Next};
use super::liveness::{self, Liveness};
use super::spill::{Piece, Spill};
use super::upstream::{ReadOutcome, Target, Upstream};
use crate::clock::BootTime;
use crate::fault::planted;

/// Who keeps what the local server answers: the leader's stack, or a backup's record.
pub(crate) trait OutputKeeper {
    /// How many bytes of the server's output it takes now.
    fn room(&self, conn: ConnId) -> usize;
    /// Offset of the server's output up to which it has bytes already (a replay produces them
    /// again, and they are skipped).
    fn produced(&self, conn: ConnId) -> u64;
    /// Bytes of the server; `tag` is the newest event that the server was given before (R1).
    fn bytes(&mut self, conn: ConnId, bytes: &[u8], tag: EventNo);
    /// The server closed its side, and the replicas agree (R5).
    fn fin(&mut self, conn: ConnId);
    /// The server broke the connection off, and the replicas agree (R5).
    fn reset(&mut self, conn: ConnId);
    /// Whether the end of the server's output is agreed on already, or the connection over.
    fn end_known(&self, conn: ConnId) -> bool;
    /// Whether there is still a client.
    fn lives(&self, conn: ConnId) -> bool;
    /// What the client is known to have of the output, as an offset.
    fn acked(&self, conn: ConnId) -> u64;
    /// The server has not been there for too long to be waited for.
    fn give_up(&mut self, conn: ConnId);
    /// The server has taken the input up to `offset`.
    fn consumed(&mut self, conn: ConnId, offset: u64);
    /// The server began with a state in which it has said everything before `offset`.
    fn resumes(&mut self, conn: ConnId, offset: u64);
    /// Whether the server's output is of use to anybody.
    fn wants(&self, conn: ConnId) -> bool;
    /// Whether it is this replica that speaks to clients.
    fn leads(&self) -> bool;
    /// The server leaves input untaken which others wait behind.
    fn skip(&mut self, conn: ConnId);
    /// The client leaves so much unread that others wait for it.
    fn client_stalled(&mut self, conn: ConnId);
}

/// How often a server that is not there is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(20);
/// After this long without a server a leader tells the client.
const CONNECT_GIVE_UP: Duration = Duration::from_secs(1);
/// The same, where a server was there and died: it may be started again, and is brought to the same
/// point by replay.
const RESTART_GIVE_UP: Duration = Duration::from_secs(30);
/// How often the processes behind the targets are looked at.
const LIFE_EVERY: Duration = Duration::from_millis(20);
/// So many connections that a replica which joins brings up are made in a millisecond: a listener's queue is short, and what
/// overflows it is made again after a second, or reset.
const RESTORES_PER_MS: usize = 64;
/// A connection to the server that is being made counts as missing after this long.
const CONNECT_PATIENCE: Duration = Duration::from_millis(100);
/// Where the server's process is unknown, a close counts as one if the server still accepts
/// connections after this long (R5).
const CLOSE_PROBE: Duration = Duration::from_millis(50);
/// One connection's turn: others wait no longer than this many bytes take.
const TURN_BYTES: usize = 512 * 1024;
/// Waiting connections served in one turn.
const LATER_PER_TURN: usize = 64;
/// Bytes read from the server at once.
const READ_BYTES: usize = 128 * 1024;

#[derive(Debug)]
struct Server {
    port: u16,
    target: Target,
    opened: EventNo,
    input: Input,
    fin_number: Option<EventNo>,
    upstream: Option<Upstream>,
    /// Offset of the server's output read so far, in this run of the server.
    server_offset: u64,
    answer: Answer,
    /// Since when there has been no connection to the server.
    absent_since: BootTime,
    /// That it is not there has been said.
    absence_told: bool,
    /// There was a connection to it, and it died.
    had_died: bool,
    /// What is to be done later, and when.
    later: Option<(BootTime, Later)>,
    /// Nothing more is asked of the server: it broke the connection off, or its input is gone.
    lost: bool,
    /// It goes once the server has taken the end of its input; `true`: it was broken off.
    closing: Option<bool>,
    queued: bool,
    ended: bool,
}

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Later {
    /// Connect to the server, and replay.
    Connect,
    /// See whether the server still accepts: then this was its close (R5).
    JudgeClose(Close),
}

/// How a connection to the server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Close {
    Fin,
    Reset,
}

/// The local copy of a service's server.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) target: Target,
    /// How long a close of it waits for another replica's (R5).
    pub(crate) close_wait: Duration,
}

/// Every connection's server side, with the bound on what is kept for replay.
#[derive(Debug)]
pub(crate) struct Servers {
    plane: usize,
    backends: BTreeMap<u16, Backend>,
    servers: HashMap<ConnId, Server>,
    /// Those that are over for the client, and with which the server here is behind.
    lingering: Lingering,
    ready: VecDeque<ConnId>,
    /// Connections that wait for a moment, by it.
    waiting: BTreeSet<(BootTime, ConnId)>,
    answers: Answers,
    closes: Closes,
    liveness: Liveness,
    /// Targets whose process is known to be dead.
    down: BTreeSet<Target>,
    /// Targets that died since the last look.
    died: BTreeSet<Target>,
    life_at: BootTime,
    /// The server died, or is not there: somebody else should lead.
    dead: bool,
    history_max_bytes: u64,
    history_bytes: u64,
    /// Nothing can be done about that below this.
    relieve_above_bytes: u64,
    /// Where inputs go that are too many for memory.
    spill: Spill,
    /// Connections whose servers wait for what cannot be read from there yet.
    hungry: VecDeque<ConnId>,
    /// Inputs of all connections in one order, if they are to be.
    order: Option<Order>,
    /// With an order: the newest event that the servers were given (R1).
    given: Option<EventNo>,
    /// A server has said something since the last look at what was taken.
    heard: bool,
    scratch: Vec<u8>,
}

/// What a checkpoint says of one connection's input; the bytes follow apart.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct InputHeader {
    pub(crate) conn: u64,
    pub(crate) port: u16,
    pub(crate) base: u64,
    pub(crate) end: u64,
    pub(crate) finished: bool,
}

impl Servers {
    pub(crate) fn new(
        plane: usize,
        backends: BTreeMap<u16, Backend>,
        history_max_bytes: u64,
        spill: Spill,
        liveness: Liveness,
    ) -> Self {
        Self {
            plane,
            backends,
            servers: HashMap::new(),
            lingering: Lingering::default(),
            ready: VecDeque::new(),
            waiting: BTreeSet::new(),
            answers: Answers::default(),
            closes: Closes::default(),
            liveness,
            down: BTreeSet::new(),
            died: BTreeSet::new(),
            life_at: BootTime::from_micros(0),
            dead: false,
            history_max_bytes,
            history_bytes: 0,
            relieve_above_bytes: 0,
            spill,
            hungry: VecDeque::new(),
            order: None,
            given: None,
            heard: false,
            scratch: vec![0; READ_BYTES],
        }
    }

    /// Readiness of connection `conn` arrives under this token: the plane in the low byte.
    fn token(&self, conn: ConnId) -> Token {
        let raw = (conn.0 << 8) | self.plane as u64;
        Token(usize::try_from(raw).expect("64-bit machines only"))
    }

    /// The plane and connection behind a token, if it is one of ours (`ConnId` starts at 1).
    pub(crate) fn conn_of(token: Token) -> Option<(usize, ConnId)> {
        let raw = token.0 as u64;
        let plane = usize::from(raw.to_le_bytes()[0]);
        (raw >> 8 != 0).then_some((plane, ConnId(raw >> 8)))
    }

    /// Gives an event to the local server, and keeps its bytes.
    pub(crate) fn apply(&mut self, now: BootTime, number: EventNo, event: &Event, reg: &Registry) {
        if let Event::LocalFin { conn, .. } | Event::Reset { conn, .. } | Event::Closed { conn } =
            event
        {
            self.closes.settle(*conn);
        }
        if !self.enqueue(number, event) {
            return;
        }
        match event {
            Event::Open { state } => {
                let port = state.local_port();
                self.open(now, ConnId(number.0), port, Input::default(), number, reg);
            }
            Event::Data {
                conn,
                offset,
                bytes,
            } => {
                let Some(server) = self.servers.get_mut(conn) else {
                    return;
                };
                let before = server.input.cost_bytes();
                server.input.push(number, *offset, bytes.clone());
                if server.input.given_up() || planted!(HistoryTrimmed) {
                    let taken = server.upstream.as_ref().map_or(0, Upstream::taken);
                    server.input.forget_before(taken);
                }
                self.history_bytes = self.history_bytes + server.input.cost_bytes() - before;
                self.wake(*conn);
                self.relieve();
            }
            Event::PeerFin { conn, .. } => {
                if let Some(server) = self.servers.get_mut(conn) {
                    server.input.finish();
                    server.fin_number = Some(number);
                    self.wake(*conn);
                }
            }
            Event::Reset { conn, .. } => {
                if let Some(upstream) = self.remove(*conn) {
                    upstream.abort();
                }
            }
            Event::Closed { conn } => self.end_connection(now, *conn),
            Event::Answered { conn, marks } => self.handle_marks(*conn, marks),
            // Seen above.
            Event::HalfOpen { .. }
            | Event::Acked { .. }
            | Event::LocalFin { .. }
            | Event::Skip { .. } => {}
        }
    }

    fn open(
        &mut self,
        now: BootTime,
        conn: ConnId,
        port: u16,
        input: Input,
        number: EventNo,
        reg: &Registry,
    ) {
        if self.keep(now, conn, port, input, number) {
            self.connect(now, conn, reg);
        }
    }

    /// Begins to keep a connection's input, without a connection to the server; false where no server is.
    fn keep(
        &mut self,
        now: BootTime,
        conn: ConnId,
        port: u16,
        input: Input,
        number: EventNo,
    ) -> bool {
        let Some(backend) = self.backends.get(&port) else {
            warn!(port, "a connection to a port that no service has");
            return false;
        };
        let target = backend.target.clone();
        self.history_bytes += input.cost_bytes();
        let server = Server {
            port,
            target,
            opened: number,
            fin_number: input.finished().then_some(number),
            lost: !input.complete(),
            input,
            upstream: None,
            server_offset: 0,
            answer: self.answers.begin(port),
            absent_since: now,
            absence_told: false,
            had_died: false,
            closing: None,
            later: None,
            queued: false,
            ended: false,
        };
        self.servers.insert(conn, server);
        true
    }

    fn connect(&mut self, now: BootTime, conn: ConnId, reg: &Registry) {
        let token = self.token(conn);
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        if server.lost {
            return;
        }
        server.server_offset = 0;
        server.answer.restart();
        match Upstream::connect(&server.target, reg, token) {
            Ok(upstream) => server.upstream = Some(upstream),
            Err(error) => {
                debug!(%error, target = ?server.target, "the local server did not answer");
                self.later(conn, now + CONNECT_RETRY, Later::Connect);
            }
        }
    }

    /// Lets a connection wait.
    fn later(&mut self, conn: ConnId, at: BootTime, what: Later) {
        if let Some(server) = self.servers.get_mut(&conn) {
            if let Some((old, _)) = server.later.replace((at, what)) {
                self.waiting.remove(&(old, conn));
            }
            self.waiting.insert((at, conn));
        }
    }

    fn remove(&mut self, conn: ConnId) -> Option<Upstream> {
        self.take(conn)?.upstream
    }

    fn take(&mut self, conn: ConnId) -> Option<Server> {
        let server = self.servers.remove(&conn)?;
        self.history_bytes -= server.input.cost_bytes();
        self.closes.settle(conn);
        if let Some((at, _)) = server.later {
            self.waiting.remove(&(at, conn));
        }
        Some(server)
    }

    fn get_mut(&mut self, conn: ConnId) -> Option<&mut Server> {
        match self.servers.get_mut(&conn) {
            Some(server) => Some(server),
            None => self.lingering.get_mut(conn),
        }
    }

    /// Puts a connection in the queue of those that have something to do.
    pub(crate) fn wake(&mut self, conn: ConnId) {
        if let Some(server) = self.get_mut(conn)
            && !server.queued
        {
            server.queued = true;
            self.ready.push_back(conn);
        }
    }

    /// The event loop saw a connection to the server become ready.
    pub(crate) fn handle_ready(&mut self, conn: ConnId, readable: bool, writable: bool) {
        if let Some(upstream) = self.get_mut(conn).and_then(|s| s.upstream.as_mut()) {
            upstream.handle_ready(readable, writable);
            self.wake(conn);
        }
    }

    /// Whether some connection has something to do now.
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty() || (!self.hungry.is_empty() && self.spill.may_load())
    }

    /// Gives each waiting connection one turn. Bounded by the length of the queue on entry.
    pub(crate) fn pump(&mut self, now: BootTime, keeper: &mut impl OutputKeeper) {
        for _ in 0..self.ready.len() {
            let Some(conn) = self.ready.pop_front() else {
                break;
            };
            if let Some(server) = self.servers.get_mut(&conn) {
                server.queued = false;
                self.turn(now, conn, keeper);
            } else if let Some(server) = self.lingering.get_mut(conn) {
                server.queued = false;
                self.turn_lingering(conn);
            }
        }
    }

    fn turn(&mut self, now: BootTime, conn: ConnId, keeper: &mut impl OutputKeeper) {
        let unwanted = self.is_unwanted(conn, keeper);
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        let Some(upstream) = server.upstream.as_mut() else {
            return;
        };
        let before = upstream.taken();
        let (mut outcome, readable) = loop {
            let at = upstream.taken();
            let next = server.input.prepare(at, conn, &self.spill);
            let outcome = upstream.feed(&server.input);
            let starves = outcome.is_ok() && upstream.starves(&server.input);
            match next {
                Ok(Next::Here) if starves && upstream.taken() > at => continue,
                // It was written to the disk at this very moment.
                Ok(Next::Here) if starves && !std::mem::replace(&mut server.queued, true) => {
                    self.ready.push_back(conn);
                }
                Ok(Next::Refused) if starves => self.hungry.push_back(conn),
                Ok(Next::Here | Next::Loading | Next::Refused) | Err(_) => {}
            }
            break (outcome, next.is_ok());
        };
        if !readable {
            self.lose(conn);
            return;
        }
        if upstream.taken() > before {
            keeper.consumed(conn, upstream.taken());
        }
        if !upstream.connected() {
            if let Err(error) = outcome {
                self.refused(now, conn, &error, keeper);
            }
            return;
        }
        // R1: the newest event that the server has been given, whole or in part.
        let tag = if upstream.taken() == server.input.end() && server.fin_number.is_some() {
            server.fin_number.unwrap_or(server.opened)
        } else {
            server
                .input
                .number_before(upstream.taken())
                .unwrap_or(server.opened)
        };
        // With one order, on any connection.
        let mut tag = self.given.unwrap_or(tag);
        if planted!(TagForgotten) {
            tag = server.opened;
        }
        let mut budget = TURN_BYTES;
        let mut ended = false;
        let mut broken = false;
        let mut found = None;
        // What it said before it took no more input is heard; until then, that it takes none is found again.
        while !broken && upstream.readable() {
            let mut skip = keeper.produced(conn).saturating_sub(server.server_offset);
            if planted!(ReplayTakenForNew) {
                skip = 0;
            }
            let want = if unwanted {
                READ_BYTES
            } else if skip > 0 {
                usize::try_from(skip).unwrap_or(READ_BYTES)
            } else {
                keeper.room(conn)
            };
            let want = want.min(READ_BYTES);
            if want == 0 {
                outcome = Ok(());
                break;
            }
            if budget == 0 {
                outcome = Ok(());
                self.ready.push_back(conn);
                server.queued = true;
                break;
            }
            match upstream.read(&mut self.scratch[..want]) {
                Ok(ReadOutcome::Bytes(n)) => {
                    self.heard = true;
                    server.server_offset += n as u64;
                    found = found.or(server.answer.read(&self.scratch[..n]));
                    budget = budget.saturating_sub(n);
                    if skip == 0 {
                        keeper.bytes(conn, &self.scratch[..n], tag);
                    }
                }
                Ok(ReadOutcome::Empty) => {
                    server.answer.pause();
                    break;
                }
                Ok(ReadOutcome::End) => {
                    found = found.or(server.answer.end());
                    ended = true;
                }
                Err(e) => {
                    broken = true;
                    outcome = Err(e);
                }
            }
        }
        let name = (conn, server.port);
        self.answers
            .note(now, name, &mut server.answer, found, ended);
        let close = match (outcome, ended && !server.ended) {
            (Err(error), _) => {
                debug!(conn = conn.0, %error, "the connection to the server broke");
                Close::Reset
            }
            (Ok(()), true) => Close::Fin,
            (Ok(()), false) => return,
        };
        self.on_close(now, conn, close, keeper);
    }

    /// The server is not there (yet): try again, and let a leader tell the client in the end.
    fn refused(
        &mut self,
        now: BootTime,
        conn: ConnId,
        error: &io::Error,
        keeper: &mut impl OutputKeeper,
    ) {
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        server.upstream = None;
        let give_up = if server.had_died {
            RESTART_GIVE_UP
        } else {
            CONNECT_GIVE_UP
        };
        if now.since(server.absent_since) > give_up {
            if !std::mem::replace(&mut server.absence_told, true) {
                warn!(conn = conn.0, %error, target = ?server.target, "the local server is not there");
            }
            self.dead = true;
            keeper.give_up(conn);
        }
        self.later(conn, now + CONNECT_RETRY, Later::Connect);
    }

    /// Whether the server died or was not there since this was last asked.
    pub(crate) fn take_dead(&mut self) -> bool {
        std::mem::take(&mut self.dead)
    }

    /// When something waits to be done.
    pub(crate) fn poll_timeout(&self) -> Option<BootTime> {
        let waiting = self.waiting.first().map(|(at, _)| *at);
        let times = [waiting, self.order_timeout(), self.lingering.poll_timeout()];
        times.into_iter().flatten().min()
    }

    /// Does what has waited long enough.
    pub(crate) fn handle_timeout(
        &mut self,
        now: BootTime,
        reg: &Registry,
        keeper: &mut impl OutputKeeper,
    ) {
        self.lingering.expire(now);
        // A server is asked once a turn, however many of its closes are to be judged.
        let mut asked = BTreeMap::new();
        for _ in 0..LATER_PER_TURN {
            let Some((at, conn)) = self.waiting.first().copied().filter(|(at, _)| *at <= now)
            else {
                return;
            };
            self.waiting.remove(&(at, conn));
            let Some(server) = self.servers.get_mut(&conn) else {
                continue;
            };
            match server.later.take() {
                Some((_, Later::Connect)) => self.connect(now, conn, reg),
                Some((_, Later::JudgeClose(close))) => {
                    let target = server.target.clone();
                    let accepts = *asked.entry(target).or_insert_with_key(liveness::accepts);
                    if accepts {
                        self.closed(conn, close, keeper);
                    } else {
                        self.died(now, conn);
                    }
                }
                None => {}
            }
        }
    }

    /// Input that the servers have not taken yet, in bytes, and how much cannot be served here:
    /// connections (their server refused, broke off, or their history is gone), and dead servers.
    pub(crate) fn lag(&self, now: BootTime) -> (u64, usize) {
        let mut lost = 0;
        for (conn, server) in &self.servers {
            let absent = !server.upstream.as_ref().is_some_and(Upstream::connected)
                && now.since(server.absent_since) > CONNECT_PATIENCE
                && !self.closes.is_own(*conn);
            lost += usize::from(server.lost || absent);
        }
        let (_, up) = self.order_lag();
        (
            self.behind_bytes(),
            lost + self.down.len() + usize::from(!up),
        )
    }

    /// Input that a connection's server has taken.
    pub(crate) fn taken(&self, conn: ConnId) -> u64 {
        self.servers
            .get(&conn)
            .and_then(|s| s.upstream.as_ref())
            .map_or(0, Upstream::taken)
    }

    /// Every connection, in order.
    pub(crate) fn connections(&self) -> Vec<ConnId> {
        let mut all: Vec<_> = self.servers.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Whether this replica's server can go on with the connection.
    pub(crate) fn serves(&self, conn: ConnId) -> bool {
        self.servers.get(&conn).is_some_and(|s| !s.lost)
    }

    /// Closes every upstream connection (R3: whoever leaves a view starts again); servers with shared
    /// state begin anew.
    pub(crate) fn clear(&mut self, now: BootTime) {
        self.drop_connections();
        self.judge_answers();
        self.clear_order(now);
    }

    fn drop_connections(&mut self) {
        let servers = self.servers.drain().map(|(_, server)| server);
        for server in servers.chain(self.lingering.drain()) {
            if let Some(upstream) = server.upstream {
                upstream.abort();
            }
        }
        self.ready.clear();
        self.waiting.clear();
        self.forget_answers();
        let _ = self.closes.void(|_| true);
        self.died.clear();
        self.dead = false;
        self.history_bytes = 0;
        self.hungry.clear();
    }

    /// The inputs as a checkpoint carries them: headers, then the bytes in the same order.
    pub(crate) fn inputs(&self) -> (Vec<InputHeader>, Vec<Piece>) {
        let mut headers = Vec::with_capacity(self.servers.len());
        let mut pieces = Vec::new();
        for conn in self.connections() {
            let Server { port, input, .. } = &self.servers[&conn];
            headers.push(InputHeader {
                conn: conn.0,
                port: *port,
                base: input.base(),
                end: input.end(),
                finished: input.finished(),
            });
            pieces.extend(input.pieces());
        }
        (headers, pieces)
    }

    /// Takes a connection from a checkpoint; the replay begins soon.
    pub(crate) fn restore(&mut self, now: BootTime, header: &InputHeader, pieces: Vec<Piece>) {
        // All of it lies before the cut, so it is stable: the number of its `Open` serves as tag.
        let number = EventNo(header.conn);
        let mut input = Input::starting_at(header.base);
        for mut piece in pieces {
            if planted!(ReplayWrong) {
                piece = Piece::Memory(vec![0; piece.len()].into());
            }
            input.push_piece(number, piece);
        }
        if header.finished {
            input.finish();
        }
        let before = self.servers.len() / RESTORES_PER_MS;
        let conn = ConnId(header.conn);
        if self.keep(now, conn, header.port, input, number) {
            let wait = Duration::from_millis(before as u64);
            self.later(conn, now + wait, Later::Connect);
        }
    }
}
