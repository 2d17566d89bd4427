//! Conversations with one server, frame by frame: what a client is promised, and the traps.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use super::{Caller, CloseReason, Config, ConnId, Core, Output};
use crate::core::PeerMessage;
use crate::members::Members;
use crate::quorum::{RaftMessage, RaftMessageKind, Recovered, Role};
use crate::session::Run;
use crate::time::Instant;
use crate::txn::{Command, Proposal};
use crate::wire::{
    Acl, ConnectRequest, ConnectResponse, CreateMode, CreateOp, ErrorCode, EventType, OpCode,
    ReplyHeader, Request, Response, SetWatches, WatcherEvent, encode_connect_request,
    encode_request, xid,
};

/// A server and its disk, which writes when it is told to.
struct Bench {
    core: Core,
    now: Instant,
    unwritten: Vec<u64>,
    frames: BTreeMap<ConnId, Vec<Bytes>>,
    closed: Vec<(ConnId, CloseReason)>,
    sent: Vec<PeerMessage>,
}

impl Bench {
    /// The only server of its cluster: it leads.
    fn alone() -> Self {
        let mut bench = Self::new(1);
        while bench.core.status().role != Role::Leader {
            bench.pass(5);
            bench.disk();
        }
        bench.disk();
        bench
    }

    fn new(servers: u64) -> Self {
        let names = (1..=servers).map(|id| (id, format!("s{id}"))).collect();
        let now = Instant::from_millis(1);
        let core = Core::new(Config::new(1, names), Recovered::default(), 42, now).unwrap();
        Self {
            core,
            now,
            unwritten: vec![],
            frames: BTreeMap::new(),
            closed: vec![],
            sent: vec![],
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.core.poll_output() {
            match output {
                Output::Persist { token, .. } => self.unwritten.push(token),
                Output::Reply { conn, frame } | Output::Notify { conn, frame } => {
                    self.frames.entry(conn).or_default().push(frame.slice(4..));
                }
                Output::Close { conn, reason } => self.closed.push((conn, reason)),
                Output::Send { message, .. } => self.sent.push(message),
                Output::SaveSnapshot(_) | Output::Event(_) => {}
            }
        }
    }

    /// The disk writes everything.
    fn disk(&mut self) {
        while !self.unwritten.is_empty() {
            let token = self.unwritten.remove(0);
            self.core.handle_persisted(self.now, token);
            self.drain();
        }
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(5) {
            self.now = self.now + Duration::from_millis(5);
            self.core.handle_timeout(self.now);
            self.drain();
        }
    }

    fn frame(&mut self, conn: u64, frame: &[u8]) {
        self.core.handle_frame(self.now, ConnId(conn), &frame[4..]);
        self.drain();
    }

    fn hello(&mut self, conn: u64, session: i64, password: Option<Bytes>, last_zxid: i64) {
        self.hello_as(conn, caller(), session, password, last_zxid);
    }

    fn hello_as(
        &mut self,
        conn: u64,
        caller: Caller,
        session: i64,
        password: Option<Bytes>,
        last_zxid: i64,
    ) {
        self.core.handle_connect(self.now, ConnId(conn), caller);
        let request = ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: last_zxid,
            timeout_ms: 100,
            session_id: session,
            password,
            read_only: None,
        };
        self.frame(conn, &encode_connect_request(&request));
        self.disk();
    }

    fn connect(&mut self, conn: u64) -> ConnectResponse {
        self.hello(conn, 0, None, 0);
        ConnectResponse::decode(&self.next(conn)).unwrap()
    }

    fn send(&mut self, conn: u64, xid: i32, request: &Request) {
        self.frame(conn, &encode_request(xid, request));
    }

    fn next(&mut self, conn: u64) -> Bytes {
        let frames = self.frames.entry(ConnId(conn)).or_default();
        assert!(!frames.is_empty(), "connection {conn} was told nothing");
        frames.remove(0)
    }

    fn expect(&mut self, conn: u64, xid: i32, op: OpCode) -> Result<Response, ErrorCode> {
        let frame = self.next(conn);
        let (header, body) = ReplyHeader::split(&frame).unwrap();
        assert_eq!(header.xid, xid);
        match header.err {
            None => Ok(Response::decode(op, body).unwrap()),
            Some(code) => {
                assert!(body.is_empty(), "an error has no body");
                Err(code)
            }
        }
    }

    fn expect_event(&mut self, conn: u64, event: EventType, path: &str) {
        let frame = self.next(conn);
        let (header, body) = ReplyHeader::split(&frame).unwrap();
        assert_eq!((header.xid, header.zxid), (xid::NOTIFICATION, -1));
        assert_eq!(
            WatcherEvent::decode(body).unwrap(),
            WatcherEvent::new(event, path)
        );
    }

    fn expect_nothing(&mut self, conn: u64) {
        let frames = self.frames.entry(ConnId(conn)).or_default();
        assert!(frames.is_empty(), "connection {conn} was told {frames:?}");
    }

    fn expect_closed(&mut self, conn: u64, reason: CloseReason) {
        self.expect_nothing(conn);
        assert_eq!(self.closed, [(ConnId(conn), reason)]);
        self.closed.clear();
    }
}

fn caller() -> Caller {
    Caller {
        address: Some(([10, 0, 0, 1], 4321).into()),
        proven: vec![],
    }
}

fn create(path: &str, mode: CreateMode) -> Request {
    let acl = Acl::open();
    Request::Create {
        op: CreateOp::Create,
        path: path.into(),
        data: None,
        acl,
        flags: mode.flags(),
    }
}

fn set(path: &str) -> Request {
    Request::SetData {
        path: path.into(),
        data: Some("new".into()),
        version: -1,
    }
}

fn get(path: &str, watch: bool) -> Request {
    Request::GetData {
        path: path.into(),
        watch,
    }
}

fn version(response: Result<Response, ErrorCode>) -> i32 {
    match response {
        Ok(Response::Data { stat, .. } | Response::Stat(stat)) => stat.version,
        other => panic!("{other:?}"),
    }
}

mod lease;
mod operations;

#[test]
fn a_write_is_answered_when_it_is_on_disk_and_a_ping_at_once() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.send(1, 1, &create("/x", CreateMode::Persistent));
    bench.send(1, 2, &get("/x", false));
    bench.expect_nothing(1);
    bench.send(1, xid::PING, &Request::Ping);
    assert_eq!(
        bench.expect(1, xid::PING, OpCode::Ping),
        Ok(Response::Empty)
    );
    bench.disk();
    let created = bench.expect(1, 1, OpCode::Create);
    assert_eq!(created, Ok(Response::Created { path: "/x".into() }));
    assert_eq!(version(bench.expect(1, 2, OpCode::GetData)), 0);
}

#[test]
fn reads_stand_between_the_writes_around_them() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.send(1, 1, &create("/x", CreateMode::Persistent));
    for xid in [2, 4, 6] {
        bench.send(1, xid, &set("/x"));
        bench.send(1, xid + 1, &get("/x", false));
    }
    bench.disk();
    bench.expect(1, 1, OpCode::Create).unwrap();
    for (xid, now) in [(2, 1), (4, 2), (6, 3)] {
        assert_eq!(version(bench.expect(1, xid, OpCode::SetData)), now);
        assert_eq!(version(bench.expect(1, xid + 1, OpCode::GetData)), now);
    }
}

#[test]
fn what_follows_a_sync_waits_for_it_writes_too() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.send(1, 1, &create("/x", CreateMode::Persistent));
    bench.send(1, 2, &Request::Sync { path: "/x".into() });
    bench.send(1, 3, &get("/x", false));
    bench.send(1, 4, &set("/x"));
    bench.send(1, 5, &get("/x", false));
    bench.disk();
    bench.expect(1, 1, OpCode::Create).unwrap();
    assert_eq!(
        bench.expect(1, 2, OpCode::Sync),
        Ok(Response::Synced { path: "/x".into() })
    );
    assert_eq!(version(bench.expect(1, 3, OpCode::GetData)), 0);
    assert_eq!(version(bench.expect(1, 4, OpCode::SetData)), 1);
    assert_eq!(version(bench.expect(1, 5, OpCode::GetData)), 1);
}

#[test]
fn a_watch_is_told_once_and_before_the_writer() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    bench.send(1, 1, &create("/x", CreateMode::Persistent));
    bench.disk();
    bench.expect(1, 1, OpCode::Create).unwrap();
    for conn in [1, 2] {
        bench.send(conn, 2, &get("/x", true));
        bench.expect(conn, 2, OpCode::GetData).unwrap();
    }
    bench.send(1, 3, &set("/x"));
    bench.send(1, 4, &set("/x"));
    bench.disk();
    bench.expect_event(1, EventType::NodeDataChanged, "/x");
    assert_eq!(version(bench.expect(1, 3, OpCode::SetData)), 1);
    assert_eq!(version(bench.expect(1, 4, OpCode::SetData)), 2);
    bench.expect_event(2, EventType::NodeDataChanged, "/x");
    bench.expect_nothing(2);
}

#[test]
fn children_and_existence_are_watched() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.send(
        1,
        1,
        &Request::Exists {
            path: "/e".into(),
            watch: true,
        },
    );
    assert_eq!(bench.expect(1, 1, OpCode::Exists), Err(ErrorCode::NoNode));
    bench.send(
        1,
        2,
        &Request::GetChildren {
            path: "/".into(),
            watch: true,
        },
    );
    let children = bench.expect(1, 2, OpCode::GetChildren);
    assert_eq!(children, Ok(Response::Children(vec!["zookeeper".into()])));
    bench.send(1, 3, &create("/e", CreateMode::Ephemeral));
    bench.disk();
    bench.expect_event(1, EventType::NodeCreated, "/e");
    bench.expect_event(1, EventType::NodeChildrenChanged, "/");
    bench.expect(1, 3, OpCode::Create).unwrap();
}

#[test]
fn watches_set_again_tell_first_what_was_missed() {
    let mut bench = Bench::alone();
    bench.connect(1);
    for (xid, path) in [(1, "/same"), (2, "/changed"), (3, "/made")] {
        bench.send(1, xid, &create(path, CreateMode::Persistent));
        bench.disk();
        bench.expect(1, xid, OpCode::Create).unwrap();
    }
    let relative_zxid = bench.core.state().zxid.cast_signed();
    bench.send(1, 4, &set("/changed"));
    bench.disk();
    bench.expect(1, 4, OpCode::SetData).unwrap();
    let watches = SetWatches {
        relative_zxid,
        data: vec!["/same".into(), "/changed".into(), "/gone".into()],
        exist: vec!["/made".into(), "/never".into()],
        child: vec!["/gone".into(), "/".into()],
        ..SetWatches::default()
    };
    bench.send(1, xid::SET_WATCHES, &Request::SetWatches(watches));
    bench.expect_event(1, EventType::NodeDataChanged, "/changed");
    bench.expect_event(1, EventType::NodeDeleted, "/gone");
    bench.expect_event(1, EventType::NodeCreated, "/made");
    bench.expect_event(1, EventType::NodeDeleted, "/gone");
    let set_again = bench.expect(1, xid::SET_WATCHES, OpCode::SetWatches);
    assert_eq!(set_again, Ok(Response::Empty));
    // The others were set.
    assert_eq!(bench.core.status().watches, 3);
}

#[test]
fn a_session_moves_to_who_knows_its_password() {
    let mut bench = Bench::alone();
    let session = bench.connect(1);
    assert_eq!(session.timeout_ms, 100);
    bench.hello(2, session.session_id, Some(Bytes::from_static(&[0; 16])), 0);
    let refused = ConnectResponse::decode(&bench.next(2)).unwrap();
    assert_eq!(refused, ConnectResponse::expired(None));
    bench.expect_closed(2, CloseReason::Expired);
    bench.send(1, 1, &create("/mine", CreateMode::Ephemeral));
    bench.disk();
    bench.expect(1, 1, OpCode::Create).unwrap();
    bench.hello(3, session.session_id, session.password.clone(), 0);
    let moved = ConnectResponse::decode(&bench.next(3)).unwrap();
    assert_eq!(moved.session_id, session.session_id);
    bench.expect_closed(1, CloseReason::Moved);
    bench.send(3, 1, &get("/mine", false));
    assert_eq!(version(bench.expect(3, 1, OpCode::GetData)), 0);
}

#[test]
fn what_comes_before_the_session_is_open_waits_for_it() {
    let mut bench = Bench::alone();
    bench.core.handle_connect(bench.now, ConnId(1), caller());
    let hello = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 100,
        session_id: 0,
        password: None,
        read_only: None,
    };
    bench.frame(1, &encode_connect_request(&hello));
    bench.send(1, 1, &create("/early", CreateMode::Ephemeral));
    bench.send(1, 2, &get("/early", false));
    bench.expect_nothing(1);
    bench.disk();
    let session = ConnectResponse::decode(&bench.next(1)).unwrap().session_id;
    bench.expect(1, 1, OpCode::Create).unwrap();
    let Ok(Response::Data { stat, .. }) = bench.expect(1, 2, OpCode::GetData) else {
        panic!("it was created");
    };
    assert_eq!(stat.ephemeral_owner, session);
}

#[test]
fn a_session_that_nobody_waits_for_is_ended() {
    let mut bench = Bench::alone();
    bench.core.handle_connect(bench.now, ConnId(1), caller());
    let hello = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 60_000,
        session_id: 0,
        password: None,
        read_only: None,
    };
    bench.frame(1, &encode_connect_request(&hello));
    bench.core.handle_disconnect(bench.now, ConnId(1));
    bench.disk();
    assert_eq!(bench.core.state().sessions.len(), 0);
    assert!(bench.core.state().zxid >= 3, "it was there for a moment");
}

#[test]
fn a_silent_session_ends_and_a_loud_one_does_not() {
    let mut bench = Bench::alone();
    let loud = bench.connect(1);
    let silent = bench.connect(2);
    bench.send(2, 1, &create("/silent", CreateMode::Ephemeral));
    bench.disk();
    bench.expect(2, 1, OpCode::Create).unwrap();
    for _ in 0..10 {
        bench.pass(30);
        bench.send(1, xid::PING, &Request::Ping);
        bench.expect(1, xid::PING, OpCode::Ping).unwrap();
        bench.disk();
    }
    bench.expect_closed(2, CloseReason::Expired);
    assert!(bench.core.state().tree.znode("/silent").is_none());
    assert_eq!(
        bench
            .core
            .state()
            .sessions
            .keys()
            .map(|s| s.0)
            .collect::<Vec<_>>(),
        [loud.session_id]
    );
    bench.hello(3, silent.session_id, silent.password, 0);
    let late = ConnectResponse::decode(&bench.next(3)).unwrap();
    assert_eq!((late.session_id, late.timeout_ms), (0, 0));
}

/// A session of 100 ms on server 2, which says `touches` (when, of how long ago) to the leader, and
/// otherwise that it is there as long as `talks`. How long after its creation the session ended.
fn lifetime_elsewhere(touches: &[(u64, u32)], talks: bool) -> u64 {
    let mut bench = Bench::alone();
    let servers = (1..=2).map(|id| (id, format!("s{id}"))).collect();
    bench.core.state.members = Members::founded(&servers);
    let session = Proposal {
        origin: Run {
            server: 2,
            incarnation: 7,
        },
        command: Command::Create {
            request: 1,
            timeout_ms: 100,
            password: [1; 16],
        },
    };
    let create = PeerMessage::Forward(vec![session]);
    bench.core.handle_peer(bench.now, 2, create);
    bench.drain();
    bench.disk();
    let session = *bench.core.state().sessions.keys().next().unwrap();
    for ms in (5..).step_by(5) {
        bench.pass(5);
        bench.disk();
        if bench.core.state().sessions.is_empty() {
            return ms;
        }
        let touched = touches.iter().filter(|(at, _)| *at == ms);
        let touched: Vec<_> = touched.map(|(_, ago)| (session, ago * 1000)).collect();
        if talks || !touched.is_empty() {
            let message = PeerMessage::Touch(touched);
            bench.core.handle_peer(bench.now, 2, message);
        }
    }
    unreachable!("sessions end")
}

#[test]
fn a_sign_of_life_counts_from_when_it_was_given() {
    assert_eq!(
        lifetime_elsewhere(&[], true),
        110,
        "the timeout, 8 ms, a tick"
    );
    assert_eq!(lifetime_elsewhere(&[(50, 0)], true), 160);
    assert_eq!(lifetime_elsewhere(&[(50, 20)], true), 140);
    assert_eq!(lifetime_elsewhere(&[(50, 0), (55, 30)], true), 160);
}

#[test]
fn a_session_whose_server_is_silent_may_be_heard_there() {
    assert_eq!(lifetime_elsewhere(&[], false), 160, "not for ever");
    assert_eq!(lifetime_elsewhere(&[(130, 40)], false), 250);
    assert_eq!(
        lifetime_elsewhere(&[(130, 129)], false),
        135,
        "it tells nothing new"
    );
}

#[test]
fn a_client_from_the_future_is_sent_away() {
    let mut bench = Bench::alone();
    bench.hello(1, 0, None, 1 << 40);
    bench.expect_closed(1, CloseReason::FromTheFuture);
}

#[test]
fn what_is_not_the_protocol_is_answered_or_closed() {
    let mut bench = Bench::alone();
    let raw = |op: i32, body: &[u8]| {
        let mut frame = vec![0; 4];
        frame.extend_from_slice(&7i32.to_be_bytes());
        frame.extend_from_slice(&op.to_be_bytes());
        frame.extend_from_slice(body);
        frame
    };
    bench.connect(1);
    bench.frame(1, &raw(OpCode::GetData.code(), &[0, 0, 9, 9, b'/']));
    assert_eq!(
        bench.expect(1, 7, OpCode::GetData),
        Err(ErrorCode::MarshallingError)
    );
    bench.frame(1, &raw(77, &[]));
    assert_eq!(
        bench.expect(1, 7, OpCode::GetData),
        Err(ErrorCode::Unimplemented)
    );
    bench.expect_closed(1, CloseReason::Protocol);
    bench.connect(2);
    let auth = Request::Auth {
        kind: 0,
        scheme: "nope".into(),
        auth: None,
    };
    bench.send(2, xid::AUTH, &auth);
    assert_eq!(
        bench.expect(2, xid::AUTH, OpCode::Auth),
        Err(ErrorCode::AuthFailed)
    );
    bench.expect_closed(2, CloseReason::Auth);
    bench.core.handle_connect(bench.now, ConnId(3), caller());
    bench.frame(3, &[0, 0, 0, 1, 9]);
    bench.expect_closed(3, CloseReason::Protocol);
    bench.core.handle_connect(bench.now, ConnId(4), caller());
    bench.pass(11_000);
    assert!(bench.closed.contains(&(ConnId(4), CloseReason::Handshake)));
}

#[test]
fn a_client_that_asks_without_end_is_cut_off() {
    let mut bench = Bench::alone();
    bench.connect(1);
    for xid in 0..5000 {
        bench.send(1, xid, &set("/none"));
    }
    bench.expect_closed(1, CloseReason::TooMuch);
    assert_eq!(bench.core.status().outstanding, 0);
}

#[test]
fn who_one_is_stands_in_the_log() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    let auth = Request::Auth {
        kind: 0,
        scheme: "digest".into(),
        auth: Some("me:pw".into()),
    };
    bench.send(1, xid::AUTH, &auth);
    assert_eq!(
        bench.expect(1, xid::AUTH, OpCode::Auth),
        Ok(Response::Empty)
    );
    let mine = Request::Create {
        op: CreateOp::Create2,
        path: "/mine".into(),
        data: None,
        acl: vec![Acl {
            perms: 31,
            id: crate::wire::Id {
                scheme: "auth".into(),
                id: String::new(),
            },
        }],
        flags: 0,
    };
    bench.send(1, 1, &mine);
    bench.disk();
    assert!(matches!(
        bench.expect(1, 1, OpCode::Create2),
        Ok(Response::Created2 { .. })
    ));
    bench.send(2, 1, &get("/mine", false));
    assert_eq!(bench.expect(2, 1, OpCode::GetData), Err(ErrorCode::NoAuth));
    bench.send(2, 2, &set("/mine"));
    bench.disk();
    assert_eq!(bench.expect(2, 2, OpCode::SetData), Err(ErrorCode::NoAuth));
    bench.send(1, 2, &set("/mine"));
    bench.disk();
    assert_eq!(version(bench.expect(1, 2, OpCode::SetData)), 1);
}

#[test]
fn heartbeats_are_answered_while_the_disk_hangs_and_entries_are_not() {
    let mut bench = Bench::new(3);
    let message = |kind, index, entries| RaftMessage {
        kind,
        to: 1,
        from: 2,
        term: 1,
        log_term: 0,
        index,
        entries,
        commit: 0,
        commit_term: 0,
        snapshot: None,
        request_snapshot: 0,
        reject: false,
        reject_hint: 0,
        context: Bytes::new(),
        priority: 0,
    };
    let entry = crate::quorum::LogEntry {
        kind: crate::quorum::EntryKind::Normal,
        index: 1,
        term: 1,
        data: Bytes::new(),
    };
    let append = message(RaftMessageKind::Append, 0, vec![entry]);
    bench
        .core
        .handle_peer(bench.now, 2, PeerMessage::Raft(append));
    bench.drain();
    for _ in 0..3 {
        let heartbeat = message(RaftMessageKind::Heartbeat, 0, vec![]);
        bench
            .core
            .handle_peer(bench.now, 2, PeerMessage::Raft(heartbeat));
        bench.drain();
    }
    let kinds = |bench: &Bench| -> Vec<RaftMessageKind> {
        let raft = bench.sent.iter().filter_map(|message| match message {
            PeerMessage::Raft(message) => Some(message.kind),
            PeerMessage::Forward(_) | PeerMessage::Touch(_) | PeerMessage::Question { .. } => None,
        });
        raft.collect()
    };
    assert_eq!(kinds(&bench), [RaftMessageKind::HeartbeatResponse; 3]);
    bench.sent.clear();
    bench.disk();
    assert_eq!(kinds(&bench), [RaftMessageKind::AppendResponse]);
    // A message that is not its sender's own changes nothing.
    let mut strange = message(RaftMessageKind::Heartbeat, 0, vec![]);
    strange.from = 9;
    bench
        .core
        .handle_peer(bench.now, 2, PeerMessage::Raft(strange));
    let mut forgotten = message(RaftMessageKind::Heartbeat, 0, vec![]);
    forgotten.commit = 50;
    bench
        .core
        .handle_peer(bench.now, 2, PeerMessage::Raft(forgotten));
    bench.sent.clear();
    bench.drain();
    assert_eq!(kinds(&bench), []);
}

#[test]
fn a_server_without_a_leader_sends_its_clients_away() {
    let mut bench = Bench::new(3);
    bench.hello(1, 0, None, 0);
    bench.pass(400);
    bench.expect_nothing(1);
    assert_eq!(bench.closed, []);
    bench.pass(200);
    bench.expect_closed(1, CloseReason::Leaderless);
}
