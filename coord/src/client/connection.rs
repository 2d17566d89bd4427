//! The task that owns the session: it connects, sends, receives, keeps alive, and connects anew.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{debug, info, warn};

use super::dial::dial;
use super::watches::{WatchEvent, WatchKind, Watcher, Watches};
use super::{ClientError, ConnectOptions, SessionState};
use crate::wire::{
    ConnectRequest, ConnectResponse, ErrorCode, OpCode, PASSWORD_BYTES, REPLY_BYTES_MAX,
    ReplyHeader, Request, Response, WatcherEvent, encode_connect_request, encode_request,
    split_frame, xid,
};

/// Requests that may wait for their answers, or for a connection.
pub(super) const REQUESTS_MAX: usize = 1024;

/// Bytes that may wait for the socket before more requests are taken.
const OUT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The first pause after every server has failed.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(4);

/// How patient an attempt becomes after many rounds, unless the options say more.
const ATTEMPT_TIMEOUT_MAX: Duration = Duration::from_secs(4);

/// Room for one read.
const READ_BYTES: usize = 16 * 1024;

pub(super) type Reply = Result<Response, ClientError>;

/// What the handles ask of the task.
pub(super) enum Command {
    Request {
        frame_xid_zero: Bytes,
        op: OpCode,
        /// Where a watch is to be set, the path with the chroot and whom to tell.
        watch: Option<(String, Watcher)>,
        reply: oneshot::Sender<Reply>,
    },
    Close {
        reply: oneshot::Sender<Reply>,
    },
}

struct Pending {
    xid: i32,
    op: OpCode,
    watch: Option<(String, Watcher)>,
    reply: oneshot::Sender<Reply>,
}

/// A session id as ZooKeeper's tools print it.
struct Hex(i64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Lost,
    Expired,
    Closed,
}

struct Session {
    /// 0 until one is open.
    id: i64,
    password: Bytes,
    /// As granted.
    timeout: Duration,
    last_zxid: i64,
}

pub(super) struct Connection {
    options: ConnectOptions,
    commands: mpsc::Receiver<Command>,
    state: watch::Sender<SessionState>,
    session: Session,
    watches: Watches,
    /// Taken from `commands` while there was no connection.
    backlog: VecDeque<Command>,
    in_flight: VecDeque<Pending>,
    last_xid: i32,
}

impl Connection {
    pub(super) fn new(
        options: ConnectOptions,
        commands: mpsc::Receiver<Command>,
        state: watch::Sender<SessionState>,
    ) -> Self {
        Self {
            session: Session::fresh(&options),
            options,
            commands,
            state,
            watches: Watches::default(),
            backlog: VecDeque::new(),
            in_flight: VecDeque::new(),
            last_xid: 0,
        }
    }

    /// Runs until the client is closed or dropped, or the session has expired for good.
    pub(super) async fn run(mut self) {
        let mut host = 0;
        let error = loop {
            let end = match self.establish(host).await {
                Ok((index, mut wire)) => {
                    host = index;
                    self.on_connected(index);
                    let end = self.serve(&mut wire).await;
                    debug!(server = %self.options.hosts[index], ?end, "connection ended");
                    // The one that was lost is tried last.
                    host = (host + 1) % self.options.hosts.len();
                    end
                }
                Err(end) => end,
            };
            match end {
                End::Lost => {
                    self.state.send_replace(SessionState::Disconnected);
                    self.fail_in_flight(ClientError::ConnectionLoss);
                }
                End::Expired => {
                    warn!(session = %Hex(self.session.id), "session expired");
                    self.state.send_replace(SessionState::Expired);
                    self.fail_in_flight(ClientError::SessionExpired);
                    self.watches.fail(ClientError::SessionExpired);
                    if !self.options.renew_session {
                        break ClientError::SessionExpired;
                    }
                    self.session = Session::fresh(&self.options);
                }
                End::Closed => {
                    self.state.send_replace(SessionState::Closed);
                    break ClientError::Closed;
                }
            }
        };
        self.fail_in_flight(error);
        self.watches.fail(error);
        self.commands.close();
        for command in std::mem::take(&mut self.backlog) {
            refuse(command, error);
        }
        while let Some(command) = self.commands.recv().await {
            refuse(command, error);
        }
    }

    fn on_connected(&self, host: usize) {
        let server = &self.options.hosts[host];
        let (session_id, timeout) = (self.session.id, self.session.timeout);
        info!(%server, session = %Hex(session_id), ?timeout, "connected");
        self.state
            .send_replace(SessionState::Connected { session_id });
    }

    fn fail_in_flight(&mut self, error: ClientError) {
        for pending in self.in_flight.drain(..) {
            // Err: the caller no longer waits.
            let _: Result<(), _> = pending.reply.send(Err(error));
        }
    }

    /// Connects to a server that takes the session up, or opens one.
    async fn establish(&mut self, first: usize) -> Result<(usize, Wire), End> {
        let mut limit = self.options.attempt_timeout;
        let stagger = self.options.stagger;
        let hosts = self.options.hosts.clone();
        let (mut first, mut failures, mut pause) = (first, 0, RETRY_PAUSE_MIN);
        loop {
            let hello = self.session.hello(&self.options);
            let attempt = async {
                let (index, stream) = dial(&hosts, first, stagger, limit).await?;
                let mut wire = Wire::new(stream);
                let answer = wire.handshake(&hello, Instant::now() + limit).await;
                Some((index, wire, answer))
            };
            match self.interruptible(attempt).await? {
                Some((index, wire, Some(answer))) => {
                    if answer.timeout_ms <= 0 {
                        return Err(End::Expired);
                    }
                    self.session.granted(answer);
                    return Ok((index, wire));
                }
                Some((index, _, None)) => {
                    debug!(server = %hosts[index], "handshake failed");
                    first = (index + 1) % hosts.len();
                    failures += 1;
                }
                None => failures = hosts.len(),
            }
            if failures >= hosts.len() {
                failures = 0;
                // Up to half as long again, so that clients which lost the same server at the
                // same moment do not come back at the same moment.
                let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
                self.interruptible(sleep(pause.mul_f64(1.0 + jitter / 2.0)))
                    .await?;
                pause = (pause * 2).min(self.options.retry_pause_max);
                limit = (limit * 2).min(self.options.attempt_timeout.max(ATTEMPT_TIMEOUT_MAX));
            }
        }
    }

    /// Waits for `step` while keeping an eye on the handles: requests are set aside, and a close
    /// ends everything.
    async fn interruptible<T>(&mut self, step: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(step);
        loop {
            tokio::select! {
                biased;
                done = &mut step => return Ok(done),
                command = self.commands.recv(), if self.backlog.len() < REQUESTS_MAX => {
                    match command {
                        None => return Err(End::Closed),
                        Some(Command::Close { reply }) => {
                            // The session stays behind until its timeout.
                            let _: Result<(), _> = reply.send(Err(ClientError::NotConnected));
                            return Err(End::Closed);
                        }
                        Some(request @ Command::Request { .. }) => self.backlog.push_back(request),
                    }
                }
            }
        }
    }

    /// Carries requests and answers until the connection ends.
    async fn serve(&mut self, wire: &mut Wire) -> End {
        for watches in self.watches.set_again(self.session.last_zxid) {
            wire.out.extend_from_slice(&encode_request(
                xid::SET_WATCHES,
                &Request::SetWatches(watches),
            ));
        }
        for command in std::mem::take(&mut self.backlog) {
            self.send(wire, command);
        }
        let mut hung_up = false;
        loop {
            // Frames may have arrived together with the handshake's answer.
            if let Some(end) = self.receive(wire) {
                return end;
            }
            let timer = wire
                .ping_at(self.session.timeout)
                .min(wire.dead_at(self.session.timeout));
            let room = self.in_flight.len() < REQUESTS_MAX && wire.out.len() < OUT_BYTES_MAX;
            wire.inbox.reserve(READ_BYTES);
            let (reader, writer) = &mut wire.stream.split();
            tokio::select! {
                read = reader.read_buf(&mut wire.inbox) => {
                    if !matches!(read, Ok(1..)) {
                        debug!(?read, "server hung up");
                        return if hung_up { End::Closed } else { End::Lost };
                    }
                    wire.heard_at = Instant::now();
                }
                written = writer.write_buf(&mut wire.out), if !wire.out.is_empty() => {
                    if written.is_err() {
                        return End::Lost;
                    }
                    wire.sent_at = Instant::now();
                }
                command = self.commands.recv(), if room && !hung_up => match command {
                    Some(command) => {
                        hung_up = self.send(wire, command);
                        // What else waits goes into the same segment.
                        while !hung_up && self.in_flight.len() < REQUESTS_MAX {
                            let Ok(command) = self.commands.try_recv() else { break };
                            hung_up = self.send(wire, command);
                        }
                        if wire.try_flush().is_err() {
                            return End::Lost;
                        }
                    }
                    None => {
                        let (reply, _) = oneshot::channel();
                        hung_up = self.send(wire, Command::Close { reply });
                    }
                },
                () = sleep_until(timer) => {
                    let now = Instant::now();
                    if wire.dead_at(self.session.timeout) <= now {
                        // A late wake-up of our own must not be taken for the server's silence:
                        // what has arrived meanwhile is looked at first.
                        match wire.stream.try_read_buf(&mut wire.inbox) {
                            Ok(1..) => wire.heard_at = now,
                            _ => {
                                debug!("server fell silent");
                                return if hung_up { End::Closed } else { End::Lost };
                            }
                        }
                    } else {
                        wire.pinged_at = now;
                        wire.out.extend_from_slice(&encode_request(xid::PING, &Request::Ping));
                    }
                }
            }
        }
    }

    /// Puts a request into the outgoing bytes; true once the session is being closed.
    fn send(&mut self, wire: &mut Wire, command: Command) -> bool {
        // Java's int, which wraps; the negative ones have meanings of their own.
        self.last_xid = self.last_xid.checked_add(1).unwrap_or(1);
        let xid = self.last_xid;
        match command {
            Command::Request {
                frame_xid_zero,
                op,
                watch,
                reply,
            } => {
                if reply.is_closed() {
                    return false; // nobody waits for it any more, and it was never sent
                }
                let (length, rest) = frame_xid_zero.split_at(4);
                wire.out.extend_from_slice(length);
                wire.out.extend_from_slice(&xid.to_be_bytes());
                wire.out.extend_from_slice(&rest[4..]);
                self.in_flight.push_back(Pending {
                    xid,
                    op,
                    watch,
                    reply,
                });
                false
            }
            Command::Close { reply } => {
                wire.out
                    .extend_from_slice(&encode_request(xid, &Request::CloseSession));
                let op = OpCode::CloseSession;
                self.in_flight.push_back(Pending {
                    xid,
                    op,
                    watch: None,
                    reply,
                });
                true
            }
        }
    }

    /// Takes what has arrived apart.
    fn receive(&mut self, wire: &mut Wire) -> Option<End> {
        loop {
            let (bytes, handled) = match split_frame(&wire.inbox, REPLY_BYTES_MAX) {
                Ok(None) => return None,
                Ok(Some((frame, _))) => (frame.len() + 4, self.on_frame(frame)),
                Err(error) => {
                    warn!(%error, "server sent a bad frame");
                    return Some(End::Lost);
                }
            };
            wire.inbox.advance(bytes);
            match handled {
                Ok(None) => {}
                Ok(Some(end)) => return Some(end),
                Err(Garbled) => {
                    warn!("server does not speak the protocol");
                    return Some(End::Lost);
                }
            }
        }
    }

    fn on_frame(&mut self, frame: &[u8]) -> Result<Option<End>, Garbled> {
        let (header, body) = ReplyHeader::split(frame).map_err(|_| Garbled)?;
        // Events say -1, and so may errors.
        self.session.last_zxid = self.session.last_zxid.max(header.zxid);
        match header.xid {
            xid::NOTIFICATION => {
                let event = WatcherEvent::decode(body).map_err(|_| Garbled)?;
                let told = WatchEvent {
                    event: event.event,
                    path: strip_chroot(&self.options.chroot, &event.path).to_owned(),
                };
                self.watches.fire(event.event, &event.path, &told);
                return Ok(None);
            }
            xid::PING => return Ok(None),
            xid::SET_WATCHES => {
                // Watches that were not set again would stay silent for ever.
                return header.err.map_or(Ok(None), |_| Err(Garbled));
            }
            _ => {}
        }
        let pending = self.in_flight.pop_front().ok_or(Garbled)?;
        if pending.xid != header.xid {
            self.in_flight.push_front(pending);
            return Err(Garbled);
        }
        let end = match (pending.op, header.err) {
            (_, Some(ErrorCode::SessionExpired)) => Some(End::Expired),
            (OpCode::CloseSession, _) => Some(End::Closed),
            _ => None,
        };
        if let Some((path, watcher)) = pending.watch {
            let kind = match (pending.op, header.err) {
                (OpCode::Exists, Some(ErrorCode::NoNode)) => Some(WatchKind::Exist),
                (OpCode::Exists | OpCode::GetData, None) => Some(WatchKind::Data),
                (OpCode::GetChildren | OpCode::GetChildren2, None) => Some(WatchKind::Child),
                _ => None,
            };
            if let Some(kind) = kind {
                self.watches.add(kind, path, watcher);
            }
        }
        let reply = match header.err {
            Some(ErrorCode::SessionExpired) => Err(ClientError::SessionExpired),
            Some(code) => Err(ClientError::Zk(code)),
            None => Response::decode(pending.op, body).map_err(|_| ClientError::Protocol),
        };
        // Err: the caller no longer waits.
        let _: Result<(), _> = pending.reply.send(reply);
        Ok(end)
    }
}

/// The server sent what cannot be.
struct Garbled;

fn refuse(command: Command, error: ClientError) {
    match command {
        Command::Request { reply, .. } => {
            let _: Result<(), _> = reply.send(Err(error));
        }
        Command::Close { reply } => {
            let _: Result<(), _> = reply.send(Ok(Response::Empty));
        }
    }
}

/// A path as the caller knows it.
pub(super) fn strip_chroot<'a>(chroot: &str, path: &'a str) -> &'a str {
    match path.strip_prefix(chroot) {
        Some("") => "/",
        Some(rest) if rest.starts_with('/') => rest,
        _ => path,
    }
}

impl Session {
    fn fresh(options: &ConnectOptions) -> Self {
        Self {
            id: 0,
            password: Bytes::from_static(&[0; PASSWORD_BYTES]),
            timeout: options.session_timeout,
            last_zxid: 0,
        }
    }

    fn hello(&self, options: &ConnectOptions) -> ConnectRequest {
        ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: self.last_zxid,
            timeout_ms: i32::try_from(options.session_timeout.as_millis()).unwrap_or(i32::MAX),
            session_id: self.id,
            password: Some(self.password.clone()),
            read_only: Some(false),
        }
    }

    fn granted(&mut self, answer: ConnectResponse) {
        self.id = answer.session_id;
        self.password = answer.password.unwrap_or_default();
        let timeout_ms = u64::try_from(answer.timeout_ms).unwrap_or(0);
        self.timeout = Duration::from_millis(timeout_ms);
    }
}

/// One connection: the socket, and the bytes on their way in and out.
struct Wire {
    stream: TcpStream,
    inbox: BytesMut,
    out: BytesMut,
    heard_at: Instant,
    sent_at: Instant,
    pinged_at: Instant,
}

impl Wire {
    fn new(stream: TcpStream) -> Self {
        let now = Instant::now();
        Self {
            stream,
            inbox: BytesMut::with_capacity(READ_BYTES),
            out: BytesMut::new(),
            heard_at: now,
            sent_at: now,
            pinged_at: now,
        }
    }

    /// `None` where the server hangs up, talks nonsense, or takes too long.
    async fn handshake(
        &mut self,
        hello: &ConnectRequest,
        deadline: Instant,
    ) -> Option<ConnectResponse> {
        let exchange = async {
            self.stream
                .write_all(&encode_connect_request(hello))
                .await
                .ok()?;
            loop {
                if let Some((frame, _)) = split_frame(&self.inbox, REPLY_BYTES_MAX).ok()? {
                    let bytes = frame.len() + 4;
                    let answer = ConnectResponse::decode(frame).ok()?;
                    self.inbox.advance(bytes);
                    return Some(answer);
                }
                if self.stream.read_buf(&mut self.inbox).await.ok()? == 0 {
                    return None;
                }
            }
        };
        let answer = timeout_at(deadline, exchange).await.ok()?;
        let now = Instant::now();
        (self.heard_at, self.sent_at, self.pinged_at) = (now, now, now);
        answer
    }

    /// When to ping: a third of the timeout after the last sign in either direction, so that a
    /// server which is busy with our writes is still asked for a sign of life.
    fn ping_at(&self, timeout: Duration) -> Instant {
        self.heard_at.min(self.sent_at).max(self.pinged_at) + timeout / 3
    }

    /// When to give the connection up: early enough for another server to save the session.
    fn dead_at(&self, timeout: Duration) -> Instant {
        self.heard_at + timeout * 2 / 3
    }

    /// Writes what the socket takes at once.
    fn try_flush(&mut self) -> std::io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.try_write(&self.out) {
                Ok(written) => {
                    self.out.advance(written);
                    self.sent_at = Instant::now();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
