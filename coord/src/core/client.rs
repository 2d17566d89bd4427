//! One client's connection: its handshake, and its requests in their order.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::convert::{Shape, operation, respond};
use super::status::Latency;
use super::words::short_name;
use super::{Barrier, CloseReason, ConnId, Core, Outgoing, Output, RESEND_MIN};
use crate::acl;
use crate::session::{PASSWORD_LEN, Password, SessionId};
use crate::time::Instant;
use crate::txn::{Command, Done, Op, Proposal, Refused};
use crate::wire::{
    ConnectRequest, ConnectResponse, ErrorCode, Id, OpCode, Request, RequestHeader, Response,
    encode_connect_response, encode_error, encode_reply,
};

/// Requests of one connection that wait for their answer at most; a client with more is cut off.
/// (A driver stops reading from it well before.)
const REQUESTS_PER_CONNECTION_MAX: usize = 4096;

/// Replies that wait to be taken by the driver, in bytes: a client whose reads, all answered together
/// after a write, exceed this is cut off.
const UNSENT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Frames of one connection that come before its session is open at most.
const EARLY_FRAMES_MAX: usize = 64;

/// Identities that one connection may prove at most.
const IDENTITIES_MAX: usize = 64;

/// A request that waits its turn.
#[derive(Debug)]
enum Pending {
    /// Waits until it has been applied here.
    Write {
        xid: i32,
        number: u64,
        shape: Shape,
        /// Its key in the outbox, once it is on its way; before that, what it is to do.
        state: Sending,
    },
    /// Is answered from the state here, when all before it have been answered.
    Read { xid: i32, request: Request },
    /// Waits until all that was committed before it came has been applied here.
    Sync {
        xid: i32,
        path: String,
        barrier: u64,
        index: Option<u64>,
    },
    /// Is refused, when all before it have been answered.
    Refuse {
        xid: i32,
        code: ErrorCode,
        close: bool,
    },
}

#[derive(Debug)]
enum Sending {
    /// Behind a sync: what comes after must not be seen by what came before.
    Held(Vec<Id>, Op),
    Sent(u64),
}

#[derive(Debug)]
enum Phase {
    /// Nothing has come yet.
    New,
    /// The session is being created or taken over.
    Opening {
        request: ConnectRequest,
        /// Its key in the outbox.
        out: u64,
        /// What has come meanwhile.
        early: Vec<Bytes>,
    },
    /// In a session.
    Open { session: SessionId, attached: u64 },
    /// Served from the state here while there is no quorum: see [`super::read_only`].
    ReadOnly { session: SessionId },
}

/// Who is at the other end of a client's connection, as far as the driver knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Caller {
    /// Where the connection comes from.
    pub address: Option<SocketAddr>,
    /// Who the client has proved to be with the connection itself, such as the subject of its
    /// certificate (scheme `x509`).
    pub proven: Vec<Id>,
}

/// What was said on a connection.
#[derive(Debug, Default)]
pub(super) struct Talk {
    pub(super) received: u64,
    pub(super) sent: u64,
    /// The operation last asked for, as `cons` prints it.
    pub(super) last_op: &'static str,
    pub(super) last_xid: i32,
    pub(super) last_zxid: u64,
    pub(super) last_reply: Instant,
    pub(super) latency: Latency,
}

/// A client's connection.
pub(super) struct Conn {
    phase: Phase,
    pub(super) since: Instant,
    /// When it last sent something, and, of a read-only one, how long it may be silent.
    pub(super) heard: Instant,
    pub(super) patience: Duration,
    pub(super) talk: Talk,
    address: Option<SocketAddr>,
    /// Who the client has proved to be, besides somebody.
    who: Arc<Vec<Id>>,
    queue: VecDeque<Pending>,
    /// When each of the queue came.
    arrived: VecDeque<Instant>,
    /// Syncs in the queue, and writes that wait behind them.
    syncs: usize,
    held: usize,
    /// Number of the last write.
    writes: u64,
}

impl Conn {
    pub(super) fn session(&self) -> Option<SessionId> {
        match self.phase {
            Phase::Open { session, .. } | Phase::ReadOnly { session } => Some(session),
            Phase::New | Phase::Opening { .. } => None,
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        matches!(self.phase, Phase::ReadOnly { .. })
    }

    pub(super) fn become_read_only(&mut self, session: SessionId, timeout_ms: u32) {
        self.phase = Phase::ReadOnly { session };
        self.patience = Duration::from_millis(u64::from(timeout_ms));
    }

    /// What it asked for at first, and still waits for.
    pub(super) fn wish(&self) -> Option<&ConnectRequest> {
        match &self.phase {
            Phase::Opening { request, .. } => Some(request),
            Phase::New | Phase::Open { .. } | Phase::ReadOnly { .. } => None,
        }
    }

    pub(super) fn who(&self) -> Arc<Vec<Id>> {
        self.who.clone()
    }

    /// Where it comes from, for people.
    pub(super) fn address(&self, conn: ConnId) -> String {
        match self.address {
            Some(address) => address.to_string(),
            None => format!("unknown:{}", conn.0),
        }
    }

    /// Requests that wait for their answer.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }
}

impl Core {
    /// A client has connected.
    pub fn handle_connect(&mut self, now: Instant, conn: ConnId, caller: Caller) {
        self.advance(now);
        let Caller { address, proven } = caller;
        let mut who = proven;
        who.extend(address.map(|address| Id {
            scheme: "ip".into(),
            id: address.ip().to_canonical().to_string(),
        }));
        who.truncate(IDENTITIES_MAX);
        let state = Conn {
            phase: Phase::New,
            since: now,
            heard: now,
            patience: Duration::MAX,
            talk: Talk::default(),
            address,
            who: Arc::new(who),
            queue: VecDeque::new(),
            arrived: VecDeque::new(),
            syncs: 0,
            held: 0,
            writes: 0,
        };
        self.counters.connections += 1;
        self.conns.insert(conn, state);
        self.opening.insert(conn);
    }

    /// A client's connection has ended. Its session goes on until it expires.
    pub fn handle_disconnect(&mut self, now: Instant, conn: ConnId) {
        self.advance(now);
        self.forget(conn);
    }

    /// A client has sent a frame (without its length). Frames of unknown connections, which the core
    /// has closed meanwhile, are ignored.
    pub fn handle_frame(&mut self, now: Instant, conn: ConnId, frame: &[u8]) {
        self.advance(now);
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        self.counters.frames_received += 1;
        self.counters.bytes_received += u64::try_from(frame.len()).expect("a frame is small");
        state.talk.received += 1;
        state.heard = self.now;
        match state.phase {
            Phase::New => match ConnectRequest::decode(frame) {
                Ok(request) => self.on_connect_request(conn, request),
                Err(_) => self.close(conn, CloseReason::Protocol),
            },
            // Java's client does not wait for its session before it says who it is, and which
            // watches it had.
            Phase::Opening { ref mut early, .. } => {
                if early.len() >= EARLY_FRAMES_MAX {
                    self.close(conn, CloseReason::TooMuch);
                } else {
                    early.push(Bytes::copy_from_slice(frame));
                }
            }
            Phase::Open { session, .. } => {
                if state.queue.len() >= REQUESTS_PER_CONNECTION_MAX {
                    self.close(conn, CloseReason::TooMuch);
                    return;
                }
                self.touch(session);
                self.on_request_frame(conn, frame);
            }
            Phase::ReadOnly { .. } => self.on_request_frame(conn, frame),
        }
    }

    fn on_request_frame(&mut self, conn: ConnId, frame: &[u8]) {
        match RequestHeader::split(frame) {
            Ok((header, body)) => self.on_request(conn, header, body),
            Err(_) => self.close(conn, CloseReason::Protocol),
        }
    }

    /// The session timeout for who asks for this, in milliseconds.
    pub(super) fn granted_ms(&self, request: &ConnectRequest) -> u32 {
        let ms = |limit: Duration| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let asked = u32::try_from(request.timeout_ms).unwrap_or(0);
        asked.clamp(ms(self.config.session_min), ms(self.config.session_max))
    }

    pub(super) fn new_password(&mut self) -> Password {
        let mut password: Password = [0; PASSWORD_LEN];
        for half in password.chunks_mut(8) {
            half.copy_from_slice(&self.rng.next().to_be_bytes());
        }
        password
    }

    fn on_connect_request(&mut self, conn: ConnId, request: ConnectRequest) {
        if request.read_only == Some(true) && self.serves_read_only() {
            self.open_read_only(conn, &request);
            return;
        }
        let timeout_ms = self.granted_ms(&request);
        let command = if request.session_id == 0 {
            if self.state.sessions.len() >= self.config.sessions_max {
                tracing::warn!(
                    limit = self.config.sessions_max,
                    "too many sessions: refused"
                );
                self.close(conn, CloseReason::TooManySessions);
                return;
            }
            let password = self.new_password();
            Command::Create {
                request: conn.0,
                timeout_ms,
                password,
            }
        } else {
            Command::Attach {
                request: conn.0,
                session: SessionId(request.session_id),
                password: request.password.as_deref().unwrap_or_default().to_vec(),
                timeout_ms,
            }
        };
        let out = self.submit(command);
        if let Some(state) = self.conns.get_mut(&conn) {
            state.phase = Phase::Opening {
                request,
                out,
                early: Vec::new(),
            };
        }
    }

    /// Sends a proposal to the leader with the next drain, and again until it comes back.
    fn submit(&mut self, command: Command) -> u64 {
        let out = self.next_out;
        self.next_out += 1;
        let proposal = Proposal {
            origin: self.run,
            command,
        };
        self.forward.push(proposal.clone());
        self.outbox.insert(
            out,
            Outgoing {
                proposal,
                sent: self.now,
                again: RESEND_MIN,
            },
        );
        out
    }

    /// The session of a connection is there. False if the connection does not wait for it.
    pub(super) fn on_opened(&mut self, conn: ConnId, session: SessionId) -> bool {
        let zxid = self.state.zxid.cast_signed();
        let Some(state) = self.conns.get_mut(&conn) else {
            return false;
        };
        let Phase::Opening {
            request,
            out,
            early,
        } = &mut state.phase
        else {
            return false;
        };
        self.outbox.remove(out);
        if request.last_zxid_seen > zxid && !planted!(FutureIgnored) {
            self.close(conn, CloseReason::FromTheFuture);
            return false;
        }
        let early = std::mem::take(early);
        let record = &self.state.sessions[&session];
        let response = ConnectResponse {
            protocol_version: 0,
            timeout_ms: i32::try_from(record.timeout_ms).unwrap_or(i32::MAX),
            session_id: session.0,
            password: Some(Bytes::copy_from_slice(&record.password)),
            read_only: request.read_only.map(|_| false),
        };
        state.phase = Phase::Open {
            session,
            attached: record.attached,
        };
        state.writes = record.writes;
        self.opening.remove(&conn);
        self.here.insert(session, conn);
        self.touch(session);
        self.reply(conn, encode_connect_response(&response));
        for frame in early {
            self.handle_frame(self.now, conn, &frame);
        }
        true
    }

    /// Ends a session that nobody knows of: its client went away before it was created, or it was
    /// created twice. Should the proposal be lost, it ends by its silence.
    pub(super) fn abandon(&mut self, session: SessionId) {
        if let Some(record) = self.state.sessions.get(&session) {
            let command = Command::Expire {
                session,
                attached: record.attached,
            };
            self.forward.push(Proposal {
                origin: self.run,
                command,
            });
        }
    }

    pub(super) fn on_open_refused(&mut self, conn: ConnId) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        if let Phase::Opening { request, .. } = &state.phase {
            let request = request.clone();
            self.refuse_session(conn, &request);
        }
    }

    /// There is no such session, or its password is another.
    pub(super) fn refuse_session(&mut self, conn: ConnId, request: &ConnectRequest) {
        let response = ConnectResponse::expired(request.read_only.map(|_| false));
        self.reply(conn, encode_connect_response(&response));
        self.close(conn, CloseReason::Expired);
    }

    /// A connection no longer waits for its session. Answers what it has sent meanwhile.
    pub(super) fn take_opening(&mut self, conn: ConnId) -> Vec<Bytes> {
        let Some(state) = self.conns.get_mut(&conn) else {
            return Vec::new();
        };
        let Phase::Opening { out, early, .. } = &mut state.phase else {
            return Vec::new();
        };
        self.outbox.remove(out);
        std::mem::take(early)
    }

    fn on_request(&mut self, conn: ConnId, header: RequestHeader, body: &[u8]) {
        let RequestHeader { xid, op } = header;
        if let Some(state) = self.conns.get_mut(&conn) {
            state.talk.last_xid = xid;
            state.talk.last_op = OpCode::from_code(op).map_or("NA", short_name);
            *self
                .counters
                .requests
                .entry(state.talk.last_op)
                .or_default() += 1;
        }
        let request = match Request::decode(op, body) {
            Ok(request) => request,
            Err(error) => {
                let code = error.code();
                // ZooKeeper does so: the client speaks another protocol.
                let close = code == ErrorCode::Unimplemented;
                self.enqueue(conn, Pending::Refuse { xid, code, close });
                return;
            }
        };
        match request {
            // A ping waits for nothing, so that a slow write does not look like a dead server.
            Request::Ping => {
                let zxid = self.state.zxid.cast_signed();
                self.reply(conn, encode_reply(xid, zxid, &Response::Empty));
            }
            Request::Auth { scheme, auth, .. } => self.on_auth(conn, xid, &scheme, auth),
            // Without a security layer there is nothing to negotiate: null, at once.
            Request::Sasl { .. } => {
                let response = Response::Sasl { token: None };
                self.reply(conn, encode_reply(xid, 0, &response));
            }
            request if self.conns.get(&conn).is_some_and(Conn::is_read_only) => {
                self.on_read_only_request(conn, xid, &request);
            }
            Request::Sync { path } => {
                let (barrier, now) = (self.barrier_to_join(), self.now);
                let entry = self.barriers.entry(barrier);
                entry
                    .or_insert(Barrier {
                        conns: [].into(),
                        asked: now,
                    })
                    .conns
                    .insert(conn);
                self.enqueue(
                    conn,
                    Pending::Sync {
                        xid,
                        path,
                        barrier,
                        index: planted!(SyncIsLocal).then_some(0),
                    },
                );
            }
            request if request.is_write() => self.on_write_request(conn, xid, request),
            request => self.enqueue(conn, Pending::Read { xid, request }),
        }
    }

    fn on_auth(&mut self, conn: ConnId, xid: i32, scheme: &str, auth: Option<Bytes>) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        let proven = match scheme {
            "digest" => auth
                .filter(|auth| !auth.is_empty())
                .and_then(|auth| acl::digest_identity(&auth))
                .map(|id| {
                    let config = &self.config;
                    let mut rulers = config.super_digest.iter().chain(&config.operator_digest);
                    if rulers.any(|digest| *digest == id.id) {
                        vec![acl::super_user(), id]
                    } else {
                        vec![id]
                    }
                }),
            // The address is known already.
            "ip" => Some(vec![]),
            _ => None,
        };
        let zxid = self.state.zxid.cast_signed();
        match proven {
            Some(proven) if state.who.len() + proven.len() <= IDENTITIES_MAX => {
                for id in proven {
                    if !state.who.contains(&id) {
                        Arc::make_mut(&mut state.who).push(id);
                    }
                }
                self.reply(conn, encode_reply(xid, zxid, &Response::Empty));
            }
            _ => {
                self.counters.auth_failed += 1;
                self.reply(conn, encode_error(xid, zxid, ErrorCode::AuthFailed));
                self.close(conn, CloseReason::Auth);
            }
        }
    }

    /// The barrier that is asked for with the next drain.
    fn barrier_to_join(&mut self) -> u64 {
        *self.open_barrier.get_or_insert_with(|| {
            self.next_barrier += 1;
            self.next_barrier
        })
    }

    fn on_write_request(&mut self, conn: ConnId, xid: i32, request: Request) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        let Phase::Open { session, attached } = state.phase else {
            return;
        };
        let wanted = match request {
            Request::Reconfig { .. } if !self.config.reconfig => Err(ErrorCode::ReconfigDisabled),
            request => operation(request, session, &self.config),
        };
        match wanted {
            Ok((op, shape)) => {
                state.writes += 1;
                let number = state.writes;
                let who = state.who.to_vec();
                let sending = if state.syncs > 0 {
                    state.held += 1;
                    Sending::Held(who, op)
                } else {
                    let write = Command::Write {
                        session,
                        attached,
                        number,
                        who,
                        op,
                    };
                    Sending::Sent(self.submit(write))
                };
                self.enqueue(
                    conn,
                    Pending::Write {
                        xid,
                        number,
                        shape,
                        state: sending,
                    },
                );
            }
            Err(code) => self.enqueue(
                conn,
                Pending::Refuse {
                    xid,
                    code,
                    close: false,
                },
            ),
        }
    }

    fn enqueue(&mut self, conn: ConnId, pending: Pending) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        state.syncs += usize::from(matches!(pending, Pending::Sync { .. }));
        state.queue.push_back(pending);
        state.arrived.push_back(self.now);
        if state.queue.len() == 1 {
            self.advance_conn(conn);
        }
    }

    /// Answers what can be answered, in order, and sends the writes that no longer wait.
    pub(super) fn advance_conn(&mut self, conn: ConnId) {
        loop {
            let applied = self.state.zxid;
            let Some(state) = self.conns.get_mut(&conn) else {
                return;
            };
            match state.queue.front() {
                Some(Pending::Read { .. } | Pending::Refuse { .. }) => {}
                Some(Pending::Sync {
                    index: Some(index), ..
                }) if *index <= applied => {}
                Some(Pending::Write { .. } | Pending::Sync { .. }) | None => break,
            }
            let pending = state.queue.pop_front().expect("just seen");
            let took = self.count_answer(conn);
            self.counters.read.add(took);
            match pending {
                Pending::Read { .. } if self.unsent_bytes > UNSENT_BYTES_MAX => {
                    self.close(conn, CloseReason::TooMuch);
                }
                Pending::Read { xid, request } => self.answer_read(conn, xid, &request),
                Pending::Refuse { xid, code, close } => {
                    self.reply(conn, encode_error(xid, applied.cast_signed(), code));
                    if close {
                        self.close(conn, CloseReason::Protocol);
                    }
                }
                Pending::Sync { xid, path, .. } => {
                    if let Some(state) = self.conns.get_mut(&conn) {
                        state.syncs -= 1;
                    }
                    let response = Response::Synced { path };
                    self.reply(conn, encode_reply(xid, applied.cast_signed(), &response));
                    self.send_held(conn);
                }
                Pending::Write { .. } => unreachable!("not taken from the queue here"),
            }
        }
    }

    /// Sends the writes that stood behind a sync, up to the next sync.
    fn send_held(&mut self, conn: ConnId) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        let Phase::Open { session, attached } = state.phase else {
            return;
        };
        if state.held == 0 {
            return;
        }
        let mut queue = std::mem::take(&mut state.queue);
        let mut sent = 0;
        for pending in &mut queue {
            match pending {
                Pending::Sync { .. } => break,
                Pending::Write { number, state, .. } => {
                    if let Sending::Held(who, op) = state {
                        let (who, op) = (std::mem::take(who), std::mem::replace(op, Op::Close));
                        let number = *number;
                        let write = Command::Write {
                            session,
                            attached,
                            number,
                            who,
                            op,
                        };
                        *state = Sending::Sent(self.submit(write));
                        sent += 1;
                    }
                }
                Pending::Read { .. } | Pending::Refuse { .. } => {}
            }
        }
        if let Some(state) = self.conns.get_mut(&conn) {
            state.held -= sent;
            state.queue = queue;
        }
    }

    pub(super) fn on_barrier(&mut self, conn: ConnId, context: u64, barrier_index: u64) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        for pending in &mut state.queue {
            if let Pending::Sync { barrier, index, .. } = pending
                && *barrier == context
            {
                *index = Some(barrier_index);
            }
        }
        if barrier_index > self.state.zxid {
            self.waiting.insert((barrier_index, conn));
        } else {
            self.advance_conn(conn);
        }
    }

    /// A write of a connection here has been applied: it is the first in the queue, because all
    /// before it have been answered.
    pub(super) fn on_written(&mut self, conn: ConnId, number: u64, result: Result<Done, Refused>) {
        let Some(state) = self.conns.get_mut(&conn) else {
            return;
        };
        let Some(Pending::Write { number: first, .. }) = state.queue.front() else {
            panic!("write {number} came back and nothing waits for it");
        };
        assert_eq!(*first, number, "writes of a connection come back in order");
        let Some(Pending::Write {
            xid,
            shape,
            state: Sending::Sent(out),
            ..
        }) = state.queue.pop_front()
        else {
            panic!("write {number} came back and was never sent");
        };
        self.outbox.remove(&out);
        let took = self.count_answer(conn);
        self.counters.write.add(took);
        let zxid = self.state.zxid.cast_signed();
        let closed = matches!(result, Ok(Done::Closed));
        let frame = match respond(result, &shape) {
            Ok(response) => encode_reply(xid, zxid, &response),
            Err(code) => encode_error(xid, zxid, code),
        };
        self.reply(conn, frame);
        if closed {
            self.close(conn, CloseReason::Goodbye);
        } else {
            self.advance_conn(conn);
        }
    }

    /// The first of the queue is answered now. How long that took.
    fn count_answer(&mut self, conn: ConnId) -> Duration {
        let mut took = Duration::ZERO;
        if let Some(state) = self.conns.get_mut(&conn)
            && let Some(arrived) = state.arrived.pop_front()
        {
            took = self.now.since(arrived);
            state.talk.latency.add(took);
            self.counters.latency.add(took);
        }
        took
    }

    /// `crst`: counts anew what is counted for each connection.
    pub(super) fn reset_connections(&mut self) {
        for state in self.conns.values_mut() {
            state.talk = Talk {
                last_op: state.talk.last_op,
                last_xid: state.talk.last_xid,
                last_zxid: state.talk.last_zxid,
                last_reply: state.talk.last_reply,
                ..Talk::default()
            };
        }
    }

    pub(super) fn reply(&mut self, conn: ConnId, frame: Bytes) {
        if let Some(state) = self.conns.get_mut(&conn) {
            state.talk.sent += 1;
            state.talk.last_zxid = self.state.zxid;
            state.talk.last_reply = self.now;
            self.counters.frames_sent += 1;
            self.unsent_bytes += frame.len();
            self.outputs.push_back(Output::Reply { conn, frame });
        }
    }

    pub(super) fn close(&mut self, conn: ConnId, reason: CloseReason) {
        if self.forget(conn) {
            self.outputs.push_back(Output::Close { conn, reason });
        }
    }

    pub(super) fn close_all(&mut self, reason: CloseReason) {
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        for conn in all {
            self.close(conn, reason);
        }
    }

    /// Drops everything that belongs to a connection. True if there was one.
    fn forget(&mut self, conn: ConnId) -> bool {
        let Some(state) = self.conns.remove(&conn) else {
            return false;
        };
        self.opening.remove(&conn);
        self.watches.forget(conn);
        match state.phase {
            Phase::New | Phase::ReadOnly { .. } => {}
            Phase::Opening { out, .. } => {
                self.outbox.remove(&out);
            }
            Phase::Open { session, .. } => {
                if self.here.get(&session) == Some(&conn) {
                    self.here.remove(&session);
                }
            }
        }
        for pending in state.queue {
            match pending {
                // It may be applied or not: whoever loses a connection cannot know.
                Pending::Write {
                    state: Sending::Sent(out),
                    ..
                } => {
                    self.outbox.remove(&out);
                }
                Pending::Sync { barrier, .. } => {
                    if let Some(entry) = self.barriers.get_mut(&barrier) {
                        entry.conns.remove(&conn);
                        if entry.conns.is_empty() && self.open_barrier != Some(barrier) {
                            self.barriers.remove(&barrier);
                        }
                    }
                }
                Pending::Write { .. } | Pending::Read { .. } | Pending::Refuse { .. } => {}
            }
        }
        true
    }

    pub(super) fn check_handshakes(&mut self) {
        let limit = self.config.handshake_max;
        let late: Vec<ConnId> = self
            .opening
            .iter()
            .filter(|conn| self.now.since(self.conns[conn].since) > limit)
            .copied()
            .collect();
        for conn in late {
            self.close(conn, CloseReason::Handshake);
        }
    }
}
