//! A client of the simulation, and what it holds the servers to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use unbroken_coord::wire::{
    Acl, ConnectRequest, ConnectResponse, CreateMode, CreateOp, ErrorCode, EventType, MultiOp,
    MultiResult, OpCode, ReplyHeader, Request, Response, WatcherEvent, encode_connect_request,
    encode_request, xid,
};

use super::Random;

pub(crate) const REGISTERS: u64 = 3;

/// What all clients together know to be true.
#[derive(Default)]
pub(crate) struct Oracle {
    registers: BTreeMap<String, Register>,
    sequentials: BTreeSet<String>,
    /// For the test of the test: how much has happened.
    pub(crate) acknowledged: u64,
    pub(crate) unknown: u64,
    pub(crate) synced_reads: u64,
    pub(crate) expired: u64,
    pub(crate) resumed: u64,
    pub(crate) watch_events: u64,
}

#[derive(Default)]
struct Register {
    values: BTreeMap<i32, String>,
    acknowledged: u64,
    unknown: u64,
    newest: i32,
}

impl Register {
    /// Somebody was shown this version with this value.
    fn shown(&mut self, path: &str, version: i32, value: &str) {
        let known = self
            .values
            .entry(version)
            .or_insert_with(|| value.to_owned());
        assert_eq!(known, value, "two values of {path} at version {version}");
    }
}

impl Oracle {
    fn register(&mut self, path: &str) -> &mut Register {
        self.registers.entry(path.to_owned()).or_default()
    }

    /// After everything has healed, the state is what was acknowledged, and nothing was done twice.
    pub(crate) fn check_final(&mut self, path: &str, version: i32, value: Option<&str>) {
        let Some(register) = self.registers.get_mut(path) else {
            return;
        };
        let version_count = u64::try_from(version).expect("versions count upwards");
        let (least, most) = (
            register.acknowledged,
            register.acknowledged + register.unknown,
        );
        assert!(
            (least..=most).contains(&version_count),
            "{path} was set {version} times; {least} were acknowledged and at most {most} asked for"
        );
        assert!(
            version >= register.newest,
            "{path} is at {version} and was at {}",
            register.newest
        );
        register.shown(path, version, value.unwrap_or_default());
    }
}

#[derive(Debug)]
enum Sent {
    Create {
        ephemeral: bool,
    },
    Set {
        path: String,
        value: String,
    },
    /// Reads after a sync must show what was acknowledged before the sync was sent.
    Get {
        path: String,
        at_least: i32,
        watch: bool,
    },
    Sync {
        path: String,
    },
    Multi {
        path: String,
        value: String,
    },
    Exists,
    Close,
}

#[derive(PartialEq, Eq, Clone, Copy, Debug)]
enum Link {
    Down,
    Connecting,
    Up,
}

pub(crate) struct Client {
    id: u64,
    link: Link,
    session: i64,
    password: Option<bytes::Bytes>,
    pub(crate) timeout_ms: i32,
    last_zxid: i64,
    next_xid: i32,
    next_value: u64,
    sent: VecDeque<(i32, Sent)>,
    last_heard: u64,
    /// What was acknowledged when the last sync was sent, by register.
    synced: BTreeMap<String, i32>,
    /// Paths watched on this connection, and the mzxid that was shown with the watch.
    watched: BTreeMap<String, i64>,
    /// Ephemerals that this session was told it has.
    pub(crate) ephemerals: BTreeSet<String>,
    /// It has asked for the end of its session.
    pub(crate) closing: bool,
}

impl Client {
    pub(crate) fn new(id: u64, timeout_ms: i32) -> Self {
        Self {
            id,
            link: Link::Down,
            session: 0,
            password: None,
            timeout_ms,
            last_zxid: 0,
            next_xid: 1,
            next_value: 0,
            sent: VecDeque::new(),
            last_heard: 0,
            synced: BTreeMap::new(),
            watched: BTreeMap::new(),
            ephemerals: BTreeSet::new(),
            closing: false,
        }
    }

    pub(crate) fn session(&self) -> i64 {
        self.session
    }

    pub(crate) fn is_down(&self) -> bool {
        self.link == Link::Down
    }

    pub(crate) fn idle(&self) -> bool {
        self.sent.is_empty() && self.link == Link::Up
    }

    /// The first frame on a new connection.
    pub(crate) fn connect(&mut self, now: u64, oracle: &mut Oracle) -> bytes::Bytes {
        self.link = Link::Connecting;
        self.last_heard = now;
        oracle.resumed += u64::from(self.session != 0);
        encode_connect_request(&ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: self.last_zxid,
            timeout_ms: self.timeout_ms,
            session_id: self.session,
            password: self.password.clone(),
            read_only: Some(false),
        })
    }

    pub(crate) fn gives_up(&self, now: u64) -> bool {
        self.link != Link::Down && now > self.last_heard + 400_000
    }

    /// The connection is gone: what was under way may have happened or not.
    pub(crate) fn disconnected(&mut self, oracle: &mut Oracle) {
        self.link = Link::Down;
        self.watched.clear();
        self.synced.clear();
        for (_, sent) in std::mem::take(&mut self.sent) {
            match sent {
                Sent::Set { path, .. } | Sent::Multi { path, .. } => {
                    oracle.unknown += 1;
                    oracle.register(&path).unknown += 1;
                }
                Sent::Close => self.forget_session(),
                _ => {}
            }
        }
    }

    fn forget_session(&mut self) {
        self.session = 0;
        self.password = None;
        self.ephemerals.clear();
        self.closing = false;
    }

    /// The next request, or a ping.
    pub(crate) fn request(
        &mut self,
        random: &mut Random,
        quiet: bool,
        oracle: &mut Oracle,
    ) -> Option<bytes::Bytes> {
        if self.link != Link::Up || self.closing {
            return None;
        }
        if quiet || self.sent.len() >= 8 {
            return Some(encode_request(xid::PING, &Request::Ping));
        }
        let xid = self.next_xid;
        self.next_xid += 1;
        let path = format!("/r{}", random.below(REGISTERS));
        self.next_value += 1;
        let value = format!("{}-{}-{}", self.id, self.session, self.next_value);
        let create = |path: &str, mode: CreateMode| Request::Create {
            op: CreateOp::Create,
            path: path.to_owned(),
            data: None,
            acl: Acl::open(),
            flags: mode.flags(),
        };
        let (request, sent) = match random.below(20) {
            0..=1 => (
                create(&path, CreateMode::Persistent),
                Sent::Create { ephemeral: false },
            ),
            2..=6 => (
                Request::SetData {
                    path: path.clone(),
                    data: Some(value.clone().into()),
                    version: if random.below(4) == 0 {
                        oracle.register(&path).newest
                    } else {
                        -1
                    },
                },
                Sent::Set { path, value },
            ),
            7..=10 => {
                let watch = random.below(2) == 0;
                let at_least = self.synced.get(&path).copied().unwrap_or(0);
                (
                    Request::GetData {
                        path: path.clone(),
                        watch,
                    },
                    Sent::Get {
                        path,
                        at_least,
                        watch,
                    },
                )
            }
            11..=13 => {
                let newest = oracle.register(&path).newest;
                self.synced.insert(path.clone(), newest);
                (Request::Sync { path: path.clone() }, Sent::Sync { path })
            }
            14..=15 => {
                let path = format!("/e{}-", self.id);
                let request = create(&path, CreateMode::EphemeralSequential);
                (request, Sent::Create { ephemeral: true })
            }
            16..=17 => (
                Request::Multi(vec![
                    MultiOp::SetData {
                        path: path.clone(),
                        data: Some(value.clone().into()),
                        version: -1,
                    },
                    // Fails half of the time, and takes the first with it.
                    MultiOp::Check {
                        path: if random.below(2) == 0 {
                            "/".into()
                        } else {
                            "/none".into()
                        },
                        version: -1,
                    },
                ]),
                Sent::Multi { path, value },
            ),
            18 => (Request::Exists { path, watch: false }, Sent::Exists),
            _ if random.below(10) == 0 => {
                self.closing = true;
                (Request::CloseSession, Sent::Close)
            }
            _ => (Request::Exists { path, watch: false }, Sent::Exists),
        };
        self.sent.push_back((xid, sent));
        Some(encode_request(xid, &request))
    }

    /// A frame from the server, without its length.
    pub(crate) fn frame(&mut self, now: u64, frame: &[u8], oracle: &mut Oracle) {
        self.last_heard = now;
        match self.link {
            Link::Down => {}
            Link::Connecting => {
                let response = ConnectResponse::decode(frame).expect("a connect response");
                if response.session_id == 0 {
                    oracle.expired += 1;
                    self.forget_session();
                    self.link = Link::Down;
                    return;
                }
                assert!(self.session == 0 || self.session == response.session_id);
                self.session = response.session_id;
                self.password = response.password;
                self.link = Link::Up;
            }
            Link::Up => self.reply(frame, oracle),
        }
    }

    fn reply(&mut self, frame: &[u8], oracle: &mut Oracle) {
        let (header, body) = ReplyHeader::split(frame).expect("a reply");
        if header.xid == xid::NOTIFICATION {
            let event = WatcherEvent::decode(body).expect("an event");
            assert_ne!(event.event, EventType::None);
            oracle.watch_events += 1;
            self.watched.remove(&event.path);
            return;
        }
        assert!(
            header.zxid >= self.last_zxid,
            "client {} was taken back in time",
            self.id
        );
        self.last_zxid = header.zxid;
        if header.xid == xid::PING {
            return;
        }
        let (xid, sent) = self.sent.pop_front().expect("no reply without a request");
        assert_eq!(
            header.xid, xid,
            "replies come in the order of their requests"
        );
        self.check(header, body, sent, oracle);
    }

    fn check(&mut self, header: ReplyHeader, body: &[u8], sent: Sent, oracle: &mut Oracle) {
        let decode = |op| Response::decode(op, body).expect("a response of the right kind");
        match (sent, header.err) {
            (
                Sent::Create {
                    ephemeral: true, ..
                },
                None,
            ) => {
                let Response::Created { path } = decode(OpCode::Create) else {
                    unreachable!()
                };
                assert!(
                    oracle.sequentials.insert(path.clone()),
                    "{path} was given twice"
                );
                self.ephemerals.insert(path);
            }
            (Sent::Create { .. }, None | Some(ErrorCode::NodeExists)) => {}
            (Sent::Set { path, value }, None) => {
                let Response::Stat(stat) = decode(OpCode::SetData) else {
                    unreachable!()
                };
                self.acknowledged(&path, stat.version, &value, oracle);
            }
            (Sent::Set { .. }, Some(ErrorCode::NoNode | ErrorCode::BadVersion)) => {}
            (Sent::Multi { path, value }, None) => {
                let Response::Multi(results) = decode(OpCode::Multi) else {
                    unreachable!()
                };
                match &results[..] {
                    [MultiResult::Set(stat), MultiResult::Checked] => {
                        self.acknowledged(&path, stat.version, &value, oracle);
                    }
                    [MultiResult::Error(_), MultiResult::Error(_)] => {}
                    other => panic!("neither all nor none: {other:?}"),
                }
            }
            (
                Sent::Get {
                    path,
                    at_least,
                    watch,
                },
                None,
            ) => {
                let Response::Data { data, stat } = decode(OpCode::GetData) else {
                    unreachable!()
                };
                assert!(
                    stat.version >= at_least,
                    "{path} at version {} after a sync that came after {at_least}",
                    stat.version
                );
                oracle.synced_reads += u64::from(at_least > 0);
                if let Some(seen) = self.watched.get(&path) {
                    assert_eq!(
                        *seen, stat.mzxid,
                        "{path} changed and its watch was not told first"
                    );
                }
                if watch {
                    self.watched.insert(path.clone(), stat.mzxid);
                }
                let value = String::from_utf8(data.unwrap_or_default().to_vec()).expect("text");
                oracle.register(&path).shown(&path, stat.version, &value);
            }
            (Sent::Get { path, at_least, .. }, Some(ErrorCode::NoNode)) => {
                assert_eq!(at_least, 0, "{path} is gone");
            }
            (Sent::Sync { path }, None) => {
                assert_eq!(decode(OpCode::Sync), Response::Synced { path });
            }
            (Sent::Exists, None | Some(ErrorCode::NoNode)) => {}
            (Sent::Close, None) => self.forget_session(),
            (sent, err) => panic!("{sent:?} was answered by {err:?}"),
        }
    }

    fn acknowledged(&mut self, path: &str, version: i32, value: &str, oracle: &mut Oracle) {
        oracle.acknowledged += 1;
        let register = oracle.register(path);
        register.acknowledged += 1;
        register.newest = register.newest.max(version);
        register.shown(path, version, value);
    }
}
