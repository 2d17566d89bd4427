//! The task that owns the session: it connects, sends, receives, keeps alive, and connects anew.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::dial::Dialer;
use super::feed::FeedSender;
use super::lease::TenureSender;
use super::link::Link;
use super::session::{Hex, Session};
use super::watches::{WatchEvent, WatchKind, Watches, Watching};
use super::{ClientError, ConnectOptions, Identity, SessionEvent, SessionState};
use crate::wire::{
    AddWatchMode, ErrorCode, OpCode, REPLY_BYTES_MAX, ReplyHeader, Request, Response, WatcherEvent,
    WatcherKind, encode_request, split_frame, xid,
};

/// Requests that may wait for their answers, or for a connection.
pub(super) const REQUESTS_MAX: usize = 1024;

/// Bytes that may wait for the socket before more requests are taken.
const OUT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The first pause after every server has failed.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(4);

/// How patient an attempt becomes after many rounds, unless the options say more.
const ATTEMPT_TIMEOUT_MAX: Duration = Duration::from_secs(4);

pub(super) type Reply = Result<Response, ClientError>;

/// What the handles ask of the task.
#[derive(Debug)]
pub(super) enum Command {
    Request {
        frame_xid_zero: Bytes,
        op: OpCode,
        /// Only the quorum can answer it with success, so that the session lives if it does.
        confirms: bool,
        /// Where a watch is to be set, the path with the chroot and whom to tell.
        watching: Option<(String, Watching)>,
        reply: oneshot::Sender<Reply>,
    },
    Auth {
        identity: Identity,
        reply: oneshot::Sender<Reply>,
    },
    Subscribe(FeedSender<SessionEvent>),
    /// The session's life is of interest from now on.
    Confirm,
    /// A persistent watch of this path (with the chroot) is not read any more.
    Forget {
        path: String,
    },
    Close {
        reply: oneshot::Sender<Reply>,
    },
}

struct Pending {
    xid: i32,
    op: OpCode,
    confirms: bool,
    sent: Instant,
    watching: Option<(String, Watching)>,
    /// `None`: asked by the task itself.
    reply: Option<oneshot::Sender<Reply>>,
}

/// An identity of the session's holder; it belongs to a connection, so it is given anew to each.
struct Claim {
    identity: Identity,
    /// Said on this connection and not answered yet.
    asked: bool,
    /// Until it is accepted for the first time.
    waiting: Option<oneshot::Sender<Reply>>,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Lost,
    Expired,
    AuthFailed,
    Closed,
}

/// The server sent what cannot be.
struct Garbled;

type Search = Pin<Box<dyn Future<Output = usize> + Send>>;

pub(super) struct Connection {
    options: ConnectOptions,
    dialer: Dialer,
    commands: mpsc::Receiver<Command>,
    state: watch::Sender<SessionState>,
    tenure: TenureSender,
    session: Session,
    claims: Vec<Claim>,
    watches: Watches,
    /// setWatches under way.
    setting_watches: usize,
    subscribers: Vec<FeedSender<SessionEvent>>,
    /// Taken from `commands` while there was no connection.
    backlog: VecDeque<Command>,
    in_flight: VecDeque<Pending>,
    last_xid: i32,
    /// When the quorum was last asked for a sign that the session lives, and whether by a sync of
    /// our own that is not answered yet.
    confirm_sent: Instant,
    confirming: bool,
}

impl Connection {
    pub(super) fn new(
        options: ConnectOptions,
        commands: mpsc::Receiver<Command>,
        state: watch::Sender<SessionState>,
        tenure: TenureSender,
    ) -> Self {
        let claims = options.identities.iter().map(|identity| Claim {
            identity: identity.clone(),
            asked: false,
            waiting: None,
        });
        Self {
            session: Session::fresh(&options),
            claims: claims.collect(),
            dialer: Dialer::new(&options),
            options,
            commands,
            state,
            tenure,
            watches: Watches::default(),
            setting_watches: 0,
            subscribers: Vec::new(),
            backlog: VecDeque::new(),
            in_flight: VecDeque::new(),
            last_xid: 0,
            confirm_sent: Instant::now(),
            confirming: false,
        }
    }

    /// Runs until the client is closed or dropped, or the session has expired for good.
    pub(super) async fn run(mut self) {
        let mut host = 0;
        let error = loop {
            let end = match self.establish(host).await {
                Ok((index, mut link)) => {
                    let (end, next) = self.serve(&mut link, index).await;
                    debug!(server = %self.options.hosts[index], ?end, "connection ended");
                    host = next;
                    end
                }
                Err(end) => end,
            };
            match end {
                End::Lost => {
                    self.set_state(SessionState::Disconnected);
                    self.watches.disconnected();
                    self.fail_in_flight(ClientError::ConnectionLoss);
                }
                End::Expired => {
                    warn!(session = %Hex(self.session.id), "session expired");
                    self.tenure.end(!self.options.renew_session);
                    self.set_state(SessionState::Expired);
                    self.fail_in_flight(ClientError::SessionExpired);
                    self.watches.fail(ClientError::SessionExpired);
                    if !self.options.renew_session {
                        break ClientError::SessionExpired;
                    }
                    self.session = Session::fresh(&self.options);
                }
                End::AuthFailed => {
                    warn!(session = %Hex(self.session.id), "an identity is not accepted any more");
                    self.tenure.end(true);
                    self.set_state(SessionState::AuthFailed);
                    break ClientError::Zk(ErrorCode::AuthFailed);
                }
                End::Closed => {
                    self.tenure.end(true);
                    self.set_state(SessionState::Closed);
                    break ClientError::Closed;
                }
            }
        };
        self.fail_in_flight(error);
        self.watches.fail(error);
        self.subscribers.clear();
        for claim in std::mem::take(&mut self.claims) {
            if let Some(waiting) = claim.waiting {
                answer(waiting, Err(error));
            }
        }
        self.commands.close();
        for command in std::mem::take(&mut self.backlog) {
            refuse(command, error);
        }
        while let Some(command) = self.commands.recv().await {
            refuse(command, error);
        }
    }

    fn set_state(&mut self, state: SessionState) {
        self.tell(|| SessionEvent::State(state));
        self.state.send_replace(state);
    }

    fn tell(&mut self, event: impl Fn() -> SessionEvent) {
        self.subscribers.retain(|feed| !feed.is_abandoned());
        for feed in &self.subscribers {
            feed.push(event(), || SessionEvent::Missed);
        }
    }

    fn fail_in_flight(&mut self, error: ClientError) {
        for pending in self.in_flight.drain(..) {
            if let Some(reply) = pending.reply {
                answer(reply, Err(error));
            }
        }
        self.confirming = false;
        self.setting_watches = 0;
    }

    /// Connects to a server that takes the session up, or opens one.
    async fn establish(&mut self, first: usize) -> Result<(usize, Link), End> {
        let mut limit = self.options.attempt_timeout;
        let dialer = self.dialer.clone();
        let hosts = self.options.hosts.len();
        let (mut first, mut failures, mut pause) = (first, 0, RETRY_PAUSE_MIN);
        loop {
            let hello = self.session.hello(&self.options);
            let attempt = async {
                let (index, stream) = dialer.dial(first, limit).await?;
                let mut link = Link::new(stream);
                let sent = Instant::now();
                let answer = link.handshake(&hello, sent + limit).await;
                Some((index, link, sent, answer))
            };
            match self.interruptible(attempt).await? {
                Some((index, link, sent, Some(answer))) => {
                    if answer.timeout_ms <= 0 {
                        return Err(End::Expired);
                    }
                    let session_id = self.session.granted(answer);
                    self.on_connected(index, session_id, sent);
                    return Ok((index, link));
                }
                Some((index, _, _, None)) => {
                    debug!(server = %self.options.hosts[index], "handshake failed");
                    first = (index + 1) % hosts;
                    failures += 1;
                }
                None => failures = hosts,
            }
            if failures >= hosts {
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

    fn on_connected(&mut self, host: usize, session_id: i64, sent: Instant) {
        let server = &self.options.hosts[host];
        let (timeout, read_only) = (self.session.timeout, self.session.read_only);
        info!(%server, session = %Hex(session_id), ?timeout, read_only, "connected");
        if read_only {
            self.set_state(SessionState::ConnectedReadOnly { session_id });
        } else {
            self.confirm_sent = sent;
            self.tenure.confirm(session_id, sent, timeout);
            self.set_state(SessionState::Connected { session_id });
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
                            answer(reply, Err(ClientError::NotConnected));
                            return Err(End::Closed);
                        }
                        Some(request @ Command::Request { .. }) => self.backlog.push_back(request),
                        Some(Command::Auth { identity, reply }) => self.claim(identity, reply),
                        Some(Command::Subscribe(feed)) => self.subscribers.push(feed),
                        Some(Command::Forget { path }) => drop(self.watches.forget(&path)),
                        // To connect is to confirm.
                        Some(Command::Confirm) => {}
                    }
                }
            }
        }
    }

    /// Carries requests and answers until the connection ends; gives the host to try next, too.
    async fn serve(&mut self, link: &mut Link, host: usize) -> (End, usize) {
        // The one that was lost is tried last.
        let next = (host + 1) % self.options.hosts.len();
        let mut search: Option<Search> = self.session.read_only.then(|| self.search(host));
        let mut better = None;
        self.greet(link);
        let mut hung_up = false;
        loop {
            // Frames may have arrived together with the handshake's answer.
            if let Some(end) = self.receive(link) {
                return (end, next);
            }
            if let Some(better) = better
                && self.in_flight.is_empty()
                && !hung_up
            {
                debug!(server = %self.options.hosts[better], "found a server with a quorum");
                return (End::Lost, better);
            }
            let lost = if hung_up { End::Closed } else { End::Lost };
            let room = self.in_flight.len() < REQUESTS_MAX && link.out.len() < OUT_BYTES_MAX;
            let timeout = self.patience();
            let mut timer = link.ping_at(timeout).min(link.dead_at(timeout));
            if let Some(confirm_at) = self.confirm_at() {
                timer = timer.min(confirm_at);
            }
            tokio::select! {
                carried = link.carry() => {
                    if let Err(error) = carried {
                        debug!(%error, "server hung up");
                        return (lost, next);
                    }
                }
                command = self.commands.recv(), if room && !hung_up && better.is_none() => {
                    let reply = oneshot::channel().0;
                    // The last handle was dropped.
                    let command = command.unwrap_or(Command::Close { reply });
                    hung_up = self.send(link, command);
                    // What else waits goes into the same segment.
                    while !hung_up && self.in_flight.len() < REQUESTS_MAX {
                        let Ok(command) = self.commands.try_recv() else { break };
                        hung_up = self.send(link, command);
                    }
                    if link.push().await.is_err() {
                        return (lost, next);
                    }
                }
                found = async { search.as_mut().expect("checked").await }, if search.is_some() => {
                    search = None;
                    better = Some(found);
                }
                () = sleep_until(timer) => {
                    let now = Instant::now();
                    // A late wake-up of our own must not be taken for the server's silence: what
                    // has arrived meanwhile is looked at first.
                    if link.dead_at(timeout) <= now && !link.hears().await {
                        debug!("server fell silent");
                        return (lost, next);
                    }
                    if self.confirm_at().is_some_and(|at| at <= now) {
                        self.confirm(link);
                    }
                    if link.ping_at(timeout) <= now {
                        link.pinged(now);
                        let ping = encode_request(xid::PING, &Request::Ping);
                        link.out.extend_from_slice(&ping);
                    }
                }
            }
        }
    }

    /// The session's timeout, as the connection goes by it: pings are sent after a third of it, and
    /// two thirds of silence end the connection.
    fn patience(&self) -> Duration {
        let asked = self.options.silence_max.map(|silence| silence * 3 / 2);
        asked.map_or(self.session.timeout, |asked| {
            asked.min(self.session.timeout)
        })
    }

    /// Looks for a server that has a quorum.
    fn search(&self, host: usize) -> Search {
        let dialer = self.dialer.clone();
        let limit = self.options.attempt_timeout;
        Box::pin(async move { dialer.find_writable(host, limit).await })
    }

    /// What a new connection has to be told first: who we are, what we watch, and then what waits.
    fn greet(&mut self, link: &mut Link) {
        for claim in &mut self.claims {
            claim.ask(link);
        }
        for watches in self.watches.set_again(self.session.last_zxid) {
            self.setting_watches += 1;
            link.out.extend_from_slice(&encode_request(
                xid::SET_WATCHES,
                &Request::SetWatches(watches),
            ));
        }
        for command in std::mem::take(&mut self.backlog) {
            self.send(link, command);
        }
    }

    /// When to ask the quorum whether the session lives, if anybody wants to know.
    fn confirm_at(&self) -> Option<Instant> {
        (self.tenure.is_wanted() && !self.session.read_only && !self.confirming)
            .then(|| self.confirm_sent + self.session.timeout / 3)
    }

    fn confirm(&mut self, link: &mut Link) {
        self.confirming = true;
        self.send_own(link, &Request::Sync { path: "/".into() }, None);
    }

    fn claim(&mut self, identity: Identity, reply: oneshot::Sender<Reply>) {
        // Given twice is given once.
        self.claims
            .retain(|claim| claim.asked || claim.waiting.is_some() || claim.identity != identity);
        self.claims.push(Claim {
            identity,
            asked: false,
            waiting: Some(reply),
        });
    }

    fn next_xid(&mut self) -> i32 {
        // Java's int, which wraps; the negative ones have meanings of their own.
        self.last_xid = self.last_xid.checked_add(1).unwrap_or(1);
        self.last_xid
    }

    /// Puts a request into the outgoing bytes; true once the session is being closed.
    fn send(&mut self, link: &mut Link, command: Command) -> bool {
        match command {
            Command::Request {
                frame_xid_zero,
                op,
                confirms,
                watching,
                reply,
            } => {
                if reply.is_closed() {
                    return false; // nobody waits for it any more, and it was never sent
                }
                self.put(link, &frame_xid_zero, op, confirms, watching, Some(reply));
            }
            Command::Auth { identity, reply } => {
                self.claim(identity, reply);
                if let Some(claim) = self.claims.last_mut() {
                    claim.ask(link);
                }
            }
            Command::Subscribe(feed) => self.subscribers.push(feed),
            Command::Confirm => {
                if !self.session.read_only && !self.confirming {
                    self.confirm(link);
                }
            }
            Command::Forget { path } => {
                let is_path = |pending: &Pending| {
                    let watching = pending.watching.as_ref();
                    watching.is_some_and(|(other, _)| *other == path)
                };
                if self.watches.forget(&path) && !self.in_flight.iter().any(is_path) {
                    let kind = WatcherKind::Any.code();
                    self.send_own(link, &Request::RemoveWatches { path, kind }, None);
                }
            }
            Command::Close { reply } => {
                let op = OpCode::CloseSession;
                let frame = encode_request(0, &Request::CloseSession);
                self.put(link, &frame, op, false, None, Some(reply));
                return true;
            }
        }
        false
    }

    fn send_own(
        &mut self,
        link: &mut Link,
        request: &Request,
        watching: Option<(String, Watching)>,
    ) {
        let confirms = matches!(request, Request::Sync { .. });
        let frame = encode_request(0, request);
        self.put(link, &frame, request.op(), confirms, watching, None);
    }

    fn put(
        &mut self,
        link: &mut Link,
        frame_xid_zero: &[u8],
        op: OpCode,
        confirms: bool,
        watching: Option<(String, Watching)>,
        reply: Option<oneshot::Sender<Reply>>,
    ) {
        let (xid, sent) = (self.next_xid(), Instant::now());
        let (length, rest) = frame_xid_zero.split_at(4);
        link.out.extend_from_slice(length);
        link.out.extend_from_slice(&xid.to_be_bytes());
        link.out.extend_from_slice(&rest[4..]);
        if confirms {
            self.confirm_sent = sent;
        }
        self.in_flight.push_back(Pending {
            xid,
            op,
            confirms,
            sent,
            watching,
            reply,
        });
    }

    /// Takes what has arrived apart.
    fn receive(&mut self, link: &mut Link) -> Option<End> {
        loop {
            let mut inbox = std::mem::take(&mut link.inbox);
            let (bytes, handled) = match split_frame(&inbox, REPLY_BYTES_MAX) {
                Ok(None) => {
                    link.inbox = inbox;
                    return None;
                }
                Ok(Some((frame, _))) => (frame.len() + 4, self.on_frame(link, frame)),
                Err(error) => {
                    warn!(%error, "server sent a bad frame");
                    return Some(End::Lost);
                }
            };
            inbox.advance(bytes);
            link.inbox = inbox;
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

    fn on_frame(&mut self, link: &mut Link, frame: &[u8]) -> Result<Option<End>, Garbled> {
        let (header, body) = ReplyHeader::split(frame).map_err(|_| Garbled)?;
        // Events say -1, and so may errors.
        self.session.last_zxid = self.session.last_zxid.max(header.zxid);
        match header.xid {
            xid::NOTIFICATION => {
                self.on_event(&WatcherEvent::decode(body).map_err(|_| Garbled)?);
                return Ok(None);
            }
            xid::PING => return Ok(None),
            xid::AUTH => return self.on_auth(header.err),
            xid::SET_WATCHES => {
                // Watches that were not set again would stay silent for ever.
                if header.err.is_some() || self.setting_watches == 0 {
                    return Err(Garbled);
                }
                self.setting_watches -= 1;
                if self.setting_watches == 0 {
                    self.watches.missed();
                }
                return Ok(None);
            }
            _ => {}
        }
        let pending = self.in_flight.pop_front().ok_or(Garbled)?;
        if pending.xid != header.xid {
            self.in_flight.push_front(pending);
            return Err(Garbled);
        }
        if pending.confirms {
            self.confirming &= pending.reply.is_some();
            if header.err.is_none() && !self.session.read_only {
                let (id, timeout) = (self.session.id, self.session.timeout);
                self.tenure.confirm(id, pending.sent, timeout);
            }
        }
        let end = match (pending.op, header.err) {
            (_, Some(ErrorCode::SessionExpired)) => Some(End::Expired),
            (OpCode::CloseSession, _) => Some(End::Closed),
            _ => None,
        };
        // Who has the answer must not find the session certain any more.
        match end {
            Some(End::Expired) => self.tenure.end(!self.options.renew_session),
            Some(End::Closed) => self.tenure.end(true),
            Some(End::Lost | End::AuthFailed) | None => {}
        }
        if let Some((path, watching)) = pending.watching {
            self.on_watching(link, pending.op, header.err, path, watching);
        }
        if let Some(reply) = pending.reply {
            let answered = match header.err {
                Some(ErrorCode::SessionExpired) => Err(ClientError::SessionExpired),
                Some(code) => Err(ClientError::Zk(code)),
                None => Response::decode(pending.op, body).map_err(|_| ClientError::Protocol),
            };
            answer(reply, answered);
        }
        Ok(end)
    }

    fn on_event(&mut self, event: &WatcherEvent) {
        let told = WatchEvent {
            event: event.event,
            path: strip_chroot(&self.options.chroot, &event.path).to_owned(),
        };
        self.tell(|| SessionEvent::Watch(told.clone()));
        self.watches.fire(event.event, &event.path, &told);
    }

    /// The answer to the oldest claim that has none.
    fn on_auth(&mut self, err: Option<ErrorCode>) -> Result<Option<End>, Garbled> {
        let index = self.claims.iter().position(|claim| claim.asked);
        let index = index.ok_or(Garbled)?;
        let claim = &mut self.claims[index];
        claim.asked = false;
        let waiting = claim.waiting.take();
        match (err, waiting) {
            (None, waiting) => {
                if let Some(waiting) = waiting {
                    answer(waiting, Ok(Response::Empty));
                }
                Ok(None)
            }
            // It was accepted before, or stood in the options.
            (Some(_), None) => Ok(Some(End::AuthFailed)),
            (Some(code), Some(waiting)) => {
                self.claims.remove(index);
                answer(waiting, Err(ClientError::Zk(code)));
                // The server closes the connection now, and the session lives on: what is asked
                // from now on is not lost with the one, but waits for the next.
                Ok(Some(End::Lost))
            }
        }
    }

    /// A request that was to set a watch is answered.
    fn on_watching(
        &mut self,
        link: &mut Link,
        op: OpCode,
        err: Option<ErrorCode>,
        path: String,
        watching: Watching,
    ) {
        match watching {
            Watching::Once(watcher) => {
                let kind = match (op, err) {
                    (OpCode::Exists, Some(ErrorCode::NoNode)) => WatchKind::Exist,
                    (OpCode::Exists | OpCode::GetData, None) => WatchKind::Data,
                    (OpCode::GetChildren | OpCode::GetChildren2, None) => WatchKind::Child,
                    _ => return,
                };
                self.watches.add(kind, path, watcher);
            }
            Watching::Always(mode, sender) => {
                if err.is_none() && self.watches.add_persistent(mode, path.clone(), sender) {
                    let mode = AddWatchMode::PersistentRecursive.code();
                    let request = Request::AddWatch {
                        path: path.clone(),
                        mode,
                    };
                    self.send_own(link, &request, Some((path, Watching::Again)));
                }
            }
            Watching::Again => self.watches.missed_at(path),
            Watching::Removed(kind) => {
                if err.is_none() {
                    let local = strip_chroot(&self.options.chroot, &path);
                    self.watches.removed(kind, &path, local);
                }
            }
        }
    }
}

impl Claim {
    fn ask(&mut self, link: &mut Link) {
        self.asked = true;
        let request = Request::Auth {
            kind: 0,
            scheme: self.identity.scheme.clone(),
            auth: Some(self.identity.auth.clone()),
        };
        link.out
            .extend_from_slice(&encode_request(xid::AUTH, &request));
    }
}

fn answer(waiting: oneshot::Sender<Reply>, reply: Reply) {
    // Err: the caller no longer waits.
    let _: Result<(), _> = waiting.send(reply);
}

fn refuse(command: Command, error: ClientError) {
    match command {
        Command::Request { reply, .. } | Command::Auth { reply, .. } => answer(reply, Err(error)),
        Command::Close { reply } => answer(reply, Ok(Response::Empty)),
        Command::Subscribe(_) | Command::Confirm | Command::Forget { .. } => {}
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
