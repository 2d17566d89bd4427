//! A client of the simulation: it asks for this and that, breaks off, comes back elsewhere, and writes
//! down what it is told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use super::history::{Answer, Frame, History, Op, data};
use super::random::Random;
use crate::wire::{
    Acl, AddWatchMode, ConnectRequest, ConnectResponse, CreateMode, CreateOp, ErrorCode, EventType,
    MultiOp, ReplyHeader, Request, Response, SetWatches, WatcherEvent, WatcherKind,
    encode_connect_request, encode_request, xid,
};

/// Requests under way at most.
const OPEN_MAX: usize = 8;

/// Silence after which it takes its server for dead, microseconds.
const PATIENCE_US: u64 = 400_000;

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Link {
    Down,
    Connecting,
    Up,
}

/// Which list of a `setWatches` a watch stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum List {
    Data,
    Exist,
    Child,
    Persistent,
    Recursive,
}

pub(super) struct Client {
    pub(super) id: u64,
    link: Link,
    /// Its newest connection.
    conn: u64,
    session: i64,
    password: Option<Bytes>,
    timeout_ms: i32,
    last_zxid: u64,
    next_xid: i32,
    next_value: u64,
    open: VecDeque<(i32, usize)>,
    last_heard: u64,
    watches: BTreeSet<(List, String)>,
    /// Versions that it was shown.
    versions: BTreeMap<String, i32>,
    /// Znodes that come and go, as far as it has heard of them.
    known: BTreeSet<String>,
    closing: bool,
}

impl Client {
    pub(super) fn new(id: u64, timeout_ms: i32) -> Self {
        Self {
            id,
            link: Link::Down,
            conn: 0,
            session: 0,
            password: None,
            timeout_ms,
            last_zxid: 0,
            next_xid: 1,
            next_value: 0,
            open: VecDeque::new(),
            last_heard: 0,
            watches: BTreeSet::new(),
            versions: BTreeMap::new(),
            known: BTreeSet::new(),
            closing: false,
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.link == Link::Down
    }

    /// It has a session and waits for nothing.
    pub(super) fn is_content(&self) -> bool {
        self.link == Link::Up && self.open.is_empty()
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "client {} on connection {}: {:?}, session 0x{:x}, {} open",
            self.id,
            self.conn,
            self.link,
            self.session,
            self.open.len()
        )
    }

    /// The first frame of a new connection.
    pub(super) fn connect(&mut self, now: u64, conn: u64, history: &mut History) -> Bytes {
        self.link = Link::Connecting;
        self.conn = conn;
        self.last_heard = now;
        let record = history.conns.entry(conn).or_default();
        record.client = self.id;
        record.wanted = self.session;
        record.seen = self.last_zxid;
        encode_connect_request(&ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: self.last_zxid.cast_signed(),
            timeout_ms: self.timeout_ms,
            session_id: self.session,
            password: self.password.clone(),
            read_only: Some(false),
        })
    }

    pub(super) fn gives_up(&self, now: u64) -> bool {
        self.link != Link::Down && now > self.last_heard + PATIENCE_US
    }

    /// The connection is gone: what was under way has happened or not.
    pub(super) fn disconnected(&mut self) {
        self.link = Link::Down;
        self.open.clear();
        if self.closing {
            self.forget_session();
        }
    }

    fn forget_session(&mut self) {
        self.session = 0;
        self.password = None;
        self.watches.clear();
        self.closing = false;
    }

    fn send(&mut self, now: u64, xid: i32, request: Request, history: &mut History) -> Bytes {
        let frame = encode_request(xid, &request);
        let place = history.ops.len();
        let record = history.conns.entry(self.conn).or_default();
        if request.is_write() {
            record.writes.push(place);
        }
        if matches!(request, Request::SetWatches(_)) {
            record.restores = Some(place);
        }
        history.ops.push(Op {
            conn: self.conn,
            request,
            sent: now,
            answer: None,
        });
        self.open.push_back((xid, place));
        frame
    }

    /// The next request, or a ping.
    pub(super) fn request(
        &mut self,
        now: u64,
        random: &mut Random,
        quiet: bool,
        history: &mut History,
    ) -> Option<Bytes> {
        if self.link != Link::Up || self.closing {
            return None;
        }
        if quiet || self.open.len() >= OPEN_MAX || random.percent(8) {
            return Some(encode_request(xid::PING, &Request::Ping));
        }
        let xid = self.next_xid;
        self.next_xid += 1;
        let request = self.choose(random);
        self.closing = matches!(request, Request::CloseSession);
        Some(self.send(now, xid, request, history))
    }

    fn choose(&mut self, random: &mut Random) -> Request {
        self.next_value += 1;
        let register = format!("/r{}", random.below(3));
        let other = format!("/r{}", random.below(3));
        let value = data(&format!("{}-{}", self.id, self.next_value));
        let known: Vec<String> = self.known.iter().cloned().collect();
        let some = if known.is_empty() || random.percent(20) {
            format!("/d/e{}", random.below(4))
        } else {
            random.pick(&known).clone()
        };
        let readable = random
            .pick(&["/r0", "/r1", "/r2", "/d", "/c", "/"].map(str::to_owned))
            .clone();
        let readable = if random.percent(30) {
            some.clone()
        } else {
            readable
        };
        let watch = random.percent(40);
        let create = |random: &mut Random, path: &str, mode: CreateMode, value| Request::Create {
            op: if mode == CreateMode::Container {
                CreateOp::Container
            } else {
                *random.pick(&[CreateOp::Create, CreateOp::Create2])
            },
            path: path.to_owned(),
            data: value,
            acl: Acl::open(),
            flags: mode.flags(),
        };
        let version = match random.below(4) {
            0 => self.versions.get(&register).copied().unwrap_or(0),
            _ => -1,
        };
        match random.below(100) {
            0..=3 => create(random, &register, CreateMode::Persistent, value),
            4..=6 => create(random, "/d", CreateMode::Persistent, None),
            7..=8 => create(random, "/c", CreateMode::Container, value),
            9..=24 => Request::SetData {
                path: register,
                data: value,
                version,
            },
            25 => Request::Delete {
                path: register,
                version,
            },
            26..=30 => create(random, "/d/s-", CreateMode::PersistentSequential, value),
            31..=36 => create(random, "/d/n-", CreateMode::EphemeralSequential, value),
            37..=39 => {
                let path = format!("/d/e{}", random.below(4));
                create(random, &path, CreateMode::Ephemeral, value)
            }
            40..=41 => create(random, "/c/x", CreateMode::PersistentSequential, None),
            42..=50 => Request::Delete {
                path: some,
                version: -1,
            },
            51..=57 => Request::Multi(self.multi(random, register, other, some, value)),
            58..=59 => Request::AddWatch {
                path: readable,
                mode: random
                    .pick(&[AddWatchMode::Persistent, AddWatchMode::PersistentRecursive])
                    .code(),
            },
            60 => Request::RemoveWatches {
                path: readable,
                kind: random
                    .pick(&[WatcherKind::Data, WatcherKind::Children, WatcherKind::Any])
                    .code(),
            },
            61..=67 => Request::GetData {
                path: readable,
                watch,
            },
            68..=75 => Request::Exists {
                path: readable,
                watch,
            },
            76..=80 => Request::GetChildren {
                path: readable,
                watch,
            },
            81..=86 => Request::GetChildren2 {
                path: readable,
                watch,
            },
            87..=97 => Request::Sync { path: readable },
            98 => Request::Check {
                path: register,
                version,
            },
            _ if random.percent(30) => Request::CloseSession,
            _ => Request::Exists {
                path: register,
                watch,
            },
        }
    }

    fn multi(
        &self,
        random: &mut Random,
        register: String,
        other: String,
        some: String,
        value: Option<Bytes>,
    ) -> Vec<MultiOp> {
        let set = |path: String| MultiOp::SetData {
            path,
            data: value.clone(),
            version: -1,
        };
        let check = |path: &str, version| MultiOp::Check {
            path: path.to_owned(),
            version,
        };
        let create = |path: &str, mode: CreateMode| MultiOp::Create {
            op: CreateOp::Create2,
            path: path.to_owned(),
            data: value.clone(),
            acl: Acl::open(),
            flags: mode.flags(),
        };
        match random.below(5) {
            0 => vec![set(register), set(other)],
            // Fails, and takes what came before it with it.
            1 => vec![
                set(register),
                create("/d/m-", CreateMode::PersistentSequential),
                check("/none", -1),
            ],
            2 => {
                let version = self.versions.get(&register).copied().unwrap_or(0);
                vec![check(&register, version), set(register.clone()), set(other)]
            }
            3 => vec![
                create("/d/m-", CreateMode::EphemeralSequential),
                MultiOp::Delete {
                    path: some,
                    version: -1,
                },
            ],
            _ => vec![
                MultiOp::Delete {
                    path: register.clone(),
                    version: -1,
                },
                create(&register, CreateMode::Persistent),
                set(register),
            ],
        }
    }

    /// A frame from the server, without its length. Answers what is sent in reply at once.
    ///
    /// # Errors
    /// What the server did wrong.
    pub(super) fn frame(
        &mut self,
        now: u64,
        frame: &[u8],
        history: &mut History,
    ) -> Result<Option<Bytes>, String> {
        self.last_heard = now;
        match self.link {
            Link::Down => Ok(None),
            Link::Connecting => self.opened(now, frame, history),
            Link::Up => self.reply(now, frame, history).map(|()| None),
        }
    }

    fn opened(
        &mut self,
        now: u64,
        frame: &[u8],
        history: &mut History,
    ) -> Result<Option<Bytes>, String> {
        let response = ConnectResponse::decode(frame)
            .map_err(|error| format!("no connect response: {error}"))?;
        let record = history.conns.get_mut(&self.conn).expect("it was connected");
        if response.session_id == 0 {
            record.refused = Some(now);
            self.forget_session();
            self.link = Link::Down;
            return Ok(None);
        }
        if self.session != 0 && self.session != response.session_id {
            return Err(format!(
                "session {} was asked for, {} came",
                self.session, response.session_id
            ));
        }
        record.session = Some(response.session_id);
        self.session = response.session_id;
        self.password = response.password;
        self.link = Link::Up;
        if self.watches.is_empty() {
            return Ok(None);
        }
        let list = |list| {
            let of = self.watches.iter().filter(move |(kind, _)| *kind == list);
            of.map(|(_, path)| path.clone()).collect()
        };
        let watches = SetWatches {
            relative_zxid: self.last_zxid.cast_signed(),
            data: list(List::Data),
            exist: list(List::Exist),
            child: list(List::Child),
            persistent: list(List::Persistent),
            persistent_recursive: list(List::Recursive),
        };
        let request = Request::SetWatches(watches);
        Ok(Some(self.send(now, xid::SET_WATCHES, request, history)))
    }

    fn reply(&mut self, now: u64, frame: &[u8], history: &mut History) -> Result<(), String> {
        let bad = |error| format!("connection {}: {error}", self.conn);
        let (header, body) = ReplyHeader::split(frame).map_err(|error| bad(error.to_string()))?;
        let record = history.conns.get_mut(&self.conn).expect("it was connected");
        if header.xid == xid::NOTIFICATION {
            let event = WatcherEvent::decode(body).map_err(|error| bad(error.to_string()))?;
            let of: &[List] = match event.event {
                EventType::NodeCreated | EventType::NodeDataChanged => &[List::Data, List::Exist],
                EventType::NodeChildrenChanged => &[List::Child],
                EventType::NodeDeleted => &[List::Data, List::Exist, List::Child],
                other => return Err(format!("an event {other:?}")),
            };
            for list in of {
                self.watches.remove(&(*list, event.path.clone()));
            }
            record.frames.push(Frame::Event {
                at: now,
                kind: event.event,
                path: event.path,
            });
            return Ok(());
        }
        let zxid = header.zxid.cast_unsigned();
        self.last_zxid = self.last_zxid.max(zxid);
        if header.xid == xid::PING {
            record.frames.push(Frame::Pong { zxid });
            return Ok(());
        }
        let Some((xid, place)) = self.open.pop_front() else {
            return Err(bad(format!(
                "an answer to {}, which was not asked",
                header.xid
            )));
        };
        if header.xid != xid {
            return Err(bad(format!(
                "an answer to {} in the place of {xid}",
                header.xid
            )));
        }
        let op = &mut history.ops[place];
        let result =
            match header.err {
                Some(code) => Err(code),
                None => Ok(Response::decode(op.request.op(), body)
                    .map_err(|error| bad(error.to_string()))?),
            };
        self.learn(&op.request, &result);
        op.answer = Some(Answer {
            at: now,
            zxid,
            result,
        });
        record.frames.push(Frame::Reply(place));
        Ok(())
    }

    /// Keeps in mind what an answer says.
    fn learn(&mut self, request: &Request, result: &Result<Response, ErrorCode>) {
        let watched = match (request, result) {
            (Request::Exists { path, watch: true }, Err(_)) => Some((List::Exist, path)),
            (
                Request::Exists { path, watch: true } | Request::GetData { path, watch: true },
                Ok(_),
            ) => Some((List::Data, path)),
            (
                Request::GetChildren { path, watch: true }
                | Request::GetChildren2 { path, watch: true },
                Ok(_),
            ) => Some((List::Child, path)),
            (Request::AddWatch { path, mode }, Ok(_)) => {
                let recursive = *mode == AddWatchMode::PersistentRecursive.code();
                let list = if recursive {
                    List::Recursive
                } else {
                    List::Persistent
                };
                Some((list, path))
            }
            _ => None,
        };
        if let Some((list, path)) = watched {
            self.watches.insert((list, path.clone()));
        }
        match (request, result) {
            (
                Request::SetData { path, .. } | Request::Exists { path, .. },
                Ok(Response::Stat(stat)),
            )
            | (Request::GetData { path, .. }, Ok(Response::Data { stat, .. })) => {
                self.versions.insert(path.clone(), stat.version);
            }
            (
                Request::GetChildren { path, .. } | Request::GetChildren2 { path, .. },
                Ok(
                    Response::Children(names)
                    | Response::Children2 {
                        children: names, ..
                    },
                ),
            ) if path == "/d" || path == "/c" => {
                let prefix = format!("{path}/");
                self.known.retain(|known| !known.starts_with(&prefix));
                self.known
                    .extend(names.iter().map(|name| format!("{prefix}{name}")));
            }
            (_, Ok(Response::Created { path } | Response::Created2 { path, .. }))
                if path.len() > 3 =>
            {
                self.known.insert(path.clone());
            }
            (Request::Delete { path, .. }, _) => {
                self.known.remove(path);
            }
            (Request::RemoveWatches { path, kind }, Ok(_)) => {
                let kind = WatcherKind::from_code(*kind).expect("one that we sent");
                self.watches.retain(|(list, of)| {
                    let gone = match kind {
                        WatcherKind::Data => matches!(list, List::Data | List::Exist),
                        WatcherKind::Children => *list == List::Child,
                        _ => true,
                    };
                    of != path || !gone
                });
            }
            (Request::CloseSession, Ok(_)) => self.forget_session(),
            _ => {}
        }
    }
}
