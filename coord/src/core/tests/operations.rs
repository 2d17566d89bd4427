//! The operations beyond the everyday ones, each through the core.

use super::*;
use crate::core::Surroundings;
use crate::wire::tests::{Bytemill, requests};
use crate::wire::{FourLetterWord, Id, ReadOp, ReadResult};

impl Bench {
    /// A request and its answer, with whatever the disk has to do between them.
    fn ask(&mut self, conn: u64, request: &Request) -> Result<Response, ErrorCode> {
        self.send(conn, 7, request);
        self.disk();
        self.expect(conn, 7, request.op())
    }

    fn make(&mut self, conn: u64, path: &str, mode: CreateMode) {
        let made = self.ask(conn, &create(path, mode));
        assert!(matches!(made, Ok(Response::Created { .. })), "{made:?}");
    }

    fn word(&mut self, word: FourLetterWord) -> String {
        let surroundings = Surroundings {
            client_port: 2181,
            environment: vec![("os.name", "Linux".into())],
            ..Surroundings::default()
        };
        self.core.four_letter_word(word, &surroundings)
    }
}

fn add_watch(path: &str, mode: i32) -> Request {
    Request::AddWatch {
        path: path.into(),
        mode,
    }
}

fn check_watches(path: &str, kind: i32) -> Request {
    Request::CheckWatches {
        path: path.into(),
        kind,
    }
}

fn remove_watches(path: &str, kind: i32) -> Request {
    Request::RemoveWatches {
        path: path.into(),
        kind,
    }
}

const PERSISTENT: i32 = 0;
const RECURSIVE: i32 = 1;

#[test]
fn persistent_watches_tell_of_every_change_before_the_answer() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    assert_eq!(
        bench.ask(1, &add_watch("/a", PERSISTENT)),
        Ok(Response::WatchAdded)
    );
    assert_eq!(
        bench.ask(2, &add_watch("/", RECURSIVE)),
        Ok(Response::WatchAdded)
    );
    for path in ["/a", "/a/b"] {
        bench.send(1, 7, &create(path, CreateMode::Persistent));
        bench.disk();
        match path {
            "/a" => bench.expect_event(1, EventType::NodeCreated, "/a"),
            _ => bench.expect_event(1, EventType::NodeChildrenChanged, "/a"),
        }
        assert!(bench.expect(1, 7, OpCode::Create).is_ok());
        bench.expect_event(2, EventType::NodeCreated, path);
    }
    bench.expect_nothing(1);
    bench.expect_nothing(2);
}

#[test]
fn a_connection_that_watches_twice_is_told_once() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    bench.make(2, "/a", CreateMode::Persistent);
    assert!(bench.ask(1, &add_watch("/a", RECURSIVE)).is_ok());
    assert!(bench.ask(1, &get("/a", true)).is_ok());
    assert!(bench.ask(2, &set("/a")).is_ok());
    bench.expect_event(1, EventType::NodeDataChanged, "/a");
    bench.expect_nothing(1);
    assert!(bench.ask(2, &set("/a")).is_ok());
    bench.expect_event(1, EventType::NodeDataChanged, "/a");
    bench.expect_nothing(1);
}

#[test]
fn each_kind_of_watch_is_asked_for_and_removed_by_itself() {
    let none = Err(ErrorCode::NoWatcher);
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.make(1, "/a", CreateMode::Persistent);
    for kind in 1..=5 {
        assert_eq!(bench.ask(1, &check_watches("/a", kind)), none, "{kind}");
        assert_eq!(bench.ask(1, &remove_watches("/a", kind)), none, "{kind}");
    }
    assert_eq!(
        bench.ask(1, &check_watches("/a", 6)),
        Err(ErrorCode::MarshallingError)
    );
    assert!(bench.ask(1, &add_watch("/a", PERSISTENT)).is_ok());
    assert!(bench.ask(1, &get("/a", true)).is_ok());
    assert_eq!(bench.ask(1, &check_watches("/a", 1)), none);
    assert_eq!(bench.ask(1, &check_watches("/a", 2)), Ok(Response::Empty));
    assert_eq!(bench.ask(1, &check_watches("/a", 3)), Ok(Response::Empty));
    assert_eq!(bench.ask(1, &remove_watches("/a", 2)), Ok(Response::Empty));
    assert_eq!(bench.ask(1, &check_watches("/a", 2)), none);
    assert_eq!(
        bench.ask(1, &check_watches("/a", 4)),
        Ok(Response::Empty),
        "it stays"
    );
    assert_eq!(bench.ask(1, &remove_watches("/a", 3)), Ok(Response::Empty));
    assert!(bench.ask(1, &set("/a")).is_ok());
    bench.expect_nothing(1);
    assert_eq!(
        bench.ask(1, &add_watch("/a", 7)),
        Err(ErrorCode::MarshallingError)
    );
}

#[test]
fn watches_of_all_kinds_come_back_with_the_connection() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    bench.make(1, "/a", CreateMode::Persistent);
    let watches = Request::SetWatches(SetWatches {
        relative_zxid: 0,
        persistent: vec!["/a".into(), "/gone".into()],
        persistent_recursive: vec!["/".into()],
        ..SetWatches::default()
    });
    assert_eq!(watches.op(), OpCode::SetWatches2);
    assert_eq!(
        bench.ask(1, &watches),
        Ok(Response::Empty),
        "nothing is told of the past"
    );
    bench.make(2, "/a/b", CreateMode::Persistent);
    bench.expect_event(1, EventType::NodeCreated, "/a/b");
    bench.expect_event(1, EventType::NodeChildrenChanged, "/a");
    bench.expect_nothing(1);
}

#[test]
fn several_reads_answer_each_for_itself() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.make(1, "/a", CreateMode::Persistent);
    bench.make(1, "/a/b", CreateMode::Persistent);
    let reads = Request::MultiRead(vec![
        ReadOp::GetChildren {
            path: "/a".into(),
            watch: false,
        },
        ReadOp::GetData {
            path: "/none".into(),
            watch: true,
        },
        ReadOp::GetData {
            path: "/a/b".into(),
            watch: true,
        },
    ]);
    let Ok(Response::MultiRead(results)) = bench.ask(1, &reads) else {
        panic!("no reads")
    };
    assert_eq!(results[0], ReadResult::Children(vec!["b".into()]));
    assert_eq!(results[1], ReadResult::Error(ErrorCode::NoNode));
    assert!(matches!(results[2], ReadResult::Data { data: None, .. }));
    assert_eq!(
        bench.ask(1, &check_watches("/none", 3)),
        Err(ErrorCode::NoWatcher)
    );
    assert_eq!(bench.ask(1, &check_watches("/a/b", 2)), Ok(Response::Empty));
}

#[test]
fn several_reads_have_one_bound() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.make(1, "/a", CreateMode::Persistent);
    let megabyte = Request::SetData {
        path: "/a".into(),
        data: Some(vec![7; 1_000_000].into()),
        version: -1,
    };
    assert!(bench.ask(1, &megabyte).is_ok());
    let read = ReadOp::GetData {
        path: "/a".into(),
        watch: false,
    };
    let Ok(Response::MultiRead(results)) = bench.ask(1, &Request::MultiRead(vec![read; 1000]))
    else {
        panic!("no reads")
    };
    let there = |result: &ReadResult| matches!(result, ReadResult::Data { .. });
    assert_eq!(results.len(), 1000);
    assert_eq!(results.iter().filter(|result| there(result)).count(), 16);
    assert_eq!(results[999], ReadResult::Error(ErrorCode::MarshallingError));
}

#[test]
fn a_session_lists_its_own_ephemerals() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.connect(2);
    bench.make(1, "/a", CreateMode::Persistent);
    bench.make(1, "/a/e", CreateMode::Ephemeral);
    bench.make(1, "/e", CreateMode::Ephemeral);
    bench.make(2, "/other", CreateMode::Ephemeral);
    let mut list = |conn, prefix: &str| {
        let prefix = prefix.to_owned();
        match bench.ask(conn, &Request::GetEphemerals { prefix }) {
            Ok(Response::Ephemerals(paths)) => paths.join(" "),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(list(1, "/"), "/a/e /e");
    assert_eq!(list(1, ""), "/a/e /e");
    assert_eq!(list(1, "/a"), "/a/e");
    assert_eq!(list(2, "/"), "/other");
}

#[test]
fn descendants_are_counted_at_every_depth() {
    let mut bench = Bench::alone();
    bench.connect(1);
    for path in ["/a", "/a/b", "/a/b/c", "/a!", "/ab"] {
        bench.make(1, path, CreateMode::Persistent);
    }
    let mut count = |path: &str| {
        let path = path.to_owned();
        match bench.ask(1, &Request::GetAllChildrenNumber { path }) {
            Ok(Response::ChildrenNumber(number)) => Ok(number),
            Ok(other) => panic!("{other:?}"),
            Err(code) => Err(code),
        }
    };
    assert_eq!(count("/a"), Ok(2));
    assert_eq!(count("/a/b/c"), Ok(0));
    assert_eq!(count("/"), Ok(8), "with /zookeeper and its two");
    assert_eq!(count("/none"), Err(ErrorCode::NoNode));
}

#[test]
fn who_am_i_names_and_does_not_prove() {
    let mut bench = Bench::alone();
    bench.connect(1);
    let auth = Request::Auth {
        kind: 0,
        scheme: "digest".into(),
        auth: Some("me:secret".into()),
    };
    assert_eq!(bench.ask(1, &auth), Ok(Response::Empty));
    let id = |scheme: &str, id: &str| Id {
        scheme: scheme.into(),
        id: id.into(),
    };
    assert_eq!(
        bench.ask(1, &Request::WhoAmI),
        Ok(Response::Who(vec![
            id("ip", "10.0.0.1"),
            id("digest", "me")
        ]))
    );
}

#[test]
fn sasl_is_answered_as_by_a_server_that_has_none() {
    let mut bench = Bench::alone();
    bench.connect(1);
    let token = Some("anything".into());
    assert_eq!(
        bench.ask(1, &Request::Sasl { token }),
        Ok(Response::Sasl { token: None })
    );
}

#[test]
fn every_word_has_an_answer() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.make(1, "/e", CreateMode::Ephemeral);
    assert!(bench.ask(1, &get("/e", true)).is_ok());
    let expected: [(FourLetterWord, &[&str]); 15] = [
        (FourLetterWord::Ruok, &["imok"]),
        (FourLetterWord::Isro, &["rw"]),
        (
            FourLetterWord::Srvr,
            &[
                "Zookeeper version: 3.8.0-",
                "Mode: standalone\n",
                "Node count: 5\n",
            ],
        ),
        (
            FourLetterWord::Stat,
            &["Clients:\n /10.0.0.1:4321[1](queued=0,"],
        ),
        (
            FourLetterWord::Mntr,
            &[
                "zk_server_state\tstandalone\n",
                "zk_watch_count\t1\n",
                "zk_ephemerals_count\t1\n",
                "zk_approximate_data_size\t46\n",
            ],
        ),
        (
            FourLetterWord::Conf,
            &["clientPort=2181\n", "serverId=1\n", "membership: \n"],
        ),
        (
            FourLetterWord::Cons,
            &["[1](queued=0,recved=3,sent=3,sid=0x1", ",lop=GETD,"],
        ),
        (
            FourLetterWord::Wchs,
            &["1 connections watching 1 paths\nTotal watches:1\n"],
        ),
        (FourLetterWord::Wchc, &["0x1", "\n\t/e\n"]),
        (FourLetterWord::Wchp, &["/e\n\t0x1"]),
        (
            FourLetterWord::Dump,
            &[
                "Global Sessions(1):\n0x1",
                "Sessions with Ephemerals (1):\n0x1",
                ":\n\t/e\n",
            ],
        ),
        (
            FourLetterWord::Envi,
            &["Environment:\nzookeeper.version=3.8.0-", "os.name=Linux\n"],
        ),
        (FourLetterWord::Dirs, &["datadir_size: 0\nlogdir_size: 0\n"]),
        (FourLetterWord::Crst, &["Connection stats reset.\n"]),
        (FourLetterWord::Srst, &["Server stats reset.\n"]),
    ];
    for (word, parts) in expected {
        let answer = bench.word(word);
        for part in parts {
            assert!(
                answer.contains(part),
                "{word:?} does not say {part:?}: {answer}"
            );
        }
    }
    assert!(
        bench.word(FourLetterWord::Srvr).contains("Received: 0\n"),
        "srst was heard"
    );
    assert!(
        bench.word(FourLetterWord::Cons).contains("recved=0,"),
        "crst was heard"
    );
}

#[test]
fn words_of_a_server_without_a_quorum() {
    let mut bench = Bench::new(3);
    assert_eq!(bench.word(FourLetterWord::Ruok), "imok");
    for word in [
        FourLetterWord::Srvr,
        FourLetterWord::Mntr,
        FourLetterWord::Wchp,
    ] {
        assert!(bench.word(word).contains("not currently serving"));
    }
    assert!(
        bench
            .word(FourLetterWord::Envi)
            .starts_with("Environment:\n")
    );
}

#[test]
fn a_word_says_no_more_than_fits() {
    let mut bench = Bench::alone();
    bench.connect(1);
    for i in 0..3000 {
        let path = format!("/{i}{}", "x".repeat(1000));
        assert_eq!(
            bench.ask(1, &add_watch(&path, PERSISTENT)),
            Ok(Response::WatchAdded)
        );
    }
    let answer = bench.word(FourLetterWord::Wchp);
    assert!(answer.len() < 1024 * 1024 + 4096, "{}", answer.len());
    assert!(answer.ends_with(" lines more\n"));
}

fn create_ttl(path: &str, mode: CreateMode, ttl_ms: i64) -> Request {
    Request::Create {
        op: CreateOp::Ttl(ttl_ms),
        path: path.into(),
        data: None,
        acl: Acl::open(),
        flags: mode.flags(),
    }
}

#[test]
fn a_time_to_live_ends_what_nobody_changes() {
    let mode = CreateMode::PersistentWithTtl;
    let mut bench = Bench::alone();
    bench.connect(1);
    assert_eq!(
        bench.ask(1, &create_ttl("/t", mode, 1)),
        Err(ErrorCode::Unimplemented),
        "off by default"
    );
    bench.core.config.extended_types = true;
    bench.core.set_wall_clock(bench.now, 1_000_000_000);
    for (mode, ttl_ms) in [
        (mode, 0),
        (mode, -1),
        (mode, 1 << 40),
        (CreateMode::Persistent, 5),
        (CreateMode::Container, 5),
    ] {
        let made = bench.ask(1, &create_ttl("/t", mode, ttl_ms));
        assert_eq!(made, Err(ErrorCode::BadArguments), "{mode:?} {ttl_ms}");
    }
    assert_eq!(
        bench.ask(1, &create("/t", mode)),
        Err(ErrorCode::BadArguments)
    );

    let Ok(Response::Created2 { stat, .. }) = bench.ask(1, &create_ttl("/t", mode, 3000)) else {
        panic!("not created")
    };
    assert_eq!(stat.ephemeral_owner, 0);
    bench.make(1, "/t/child", CreateMode::Ephemeral);
    let live = |bench: &mut Bench, ms: u64| {
        for _ in 0..ms / 20 {
            bench.pass(20);
            bench.send(1, xid::PING, &Request::Ping);
            bench.disk();
            assert!(bench.expect(1, xid::PING, OpCode::Ping).is_ok());
        }
    };
    live(&mut bench, 5000);
    assert!(bench.ask(1, &get("/t", false)).is_ok(), "it has a child");
    assert!(bench.ask(1, &set("/t")).is_ok());
    let delete = |path: &str| Request::Delete {
        path: path.into(),
        version: -1,
    };
    assert!(bench.ask(1, &delete("/t/child")).is_ok());
    live(&mut bench, 2500);
    assert!(bench.ask(1, &get("/t", false)).is_ok(), "it was changed");
    live(&mut bench, 2000);
    assert_eq!(bench.ask(1, &get("/t", false)), Err(ErrorCode::NoNode));
}

#[test]
fn the_super_user_may_do_everything() {
    let mut bench = Bench::alone();
    bench.connect(1);
    let locked = Request::SetData {
        path: "/zookeeper/config".into(),
        data: None,
        version: -1,
    };
    let auth = |auth: &'static str| Request::Auth {
        kind: 0,
        scheme: "digest".into(),
        auth: Some(auth.into()),
    };
    assert_eq!(bench.ask(1, &auth("super:test")), Ok(Response::Empty));
    assert_eq!(
        bench.ask(1, &locked),
        Err(ErrorCode::NoAuth),
        "nobody is super by default"
    );
    bench.core.config.super_digest = Some("super:D/InIHSb7yEEbrWz8b9l71RjZJU=".into());
    assert_eq!(bench.ask(1, &auth("super:wrong")), Ok(Response::Empty));
    assert_eq!(bench.ask(1, &locked), Err(ErrorCode::NoAuth));
    assert_eq!(bench.ask(1, &auth("super:test")), Ok(Response::Empty));
    assert!(bench.ask(1, &locked).is_ok());
}

#[test]
fn schemes_of_auth() {
    let attempts = [
        ("digest", Some("u:p"), true),
        ("digest", Some("u"), true),
        ("ip", Some("x"), true),
        ("digest", None, false),
        ("digest", Some(""), false),
        ("world", Some("anyone"), false),
        ("super", Some("x"), false),
        ("x509", Some("CN=me"), false),
        ("nope", Some("x"), false),
    ];
    for (scheme, auth, passes) in attempts {
        let mut bench = Bench::alone();
        bench.connect(1);
        let auth = Request::Auth {
            kind: 0,
            scheme: scheme.into(),
            auth: auth.map(Bytes::from),
        };
        let answer = bench.ask(1, &auth);
        if passes {
            assert_eq!(answer, Ok(Response::Empty), "{auth:?}");
        } else {
            assert_eq!(answer, Err(ErrorCode::AuthFailed), "{auth:?}");
            bench.expect_closed(1, CloseReason::Auth);
        }
    }
}

#[test]
fn a_certificate_is_an_identity_like_others() {
    let mut bench = Bench::alone();
    let me = Id {
        scheme: "x509".into(),
        id: "CN=me".into(),
    };
    let caller = Caller {
        proven: vec![me.clone()],
        ..caller()
    };
    bench.hello_as(1, caller, 0, None, 0);
    assert!(ConnectResponse::decode(&bench.next(1)).is_ok());
    bench.connect(2);
    let mine = Request::Create {
        op: CreateOp::Create,
        path: "/mine".into(),
        data: None,
        acl: vec![Acl {
            perms: 31,
            id: Id {
                scheme: "auth".into(),
                id: String::new(),
            },
        }],
        flags: 0,
    };
    assert_eq!(
        bench.ask(2, &mine),
        Err(ErrorCode::InvalidAcl),
        "an address proves nobody"
    );
    assert!(bench.ask(1, &mine).is_ok());
    assert!(bench.ask(1, &get("/mine", false)).is_ok());
    assert_eq!(bench.ask(2, &get("/mine", false)), Err(ErrorCode::NoAuth));
    let Ok(Response::Acl { acl, .. }) = bench.ask(
        1,
        &Request::GetAcl {
            path: "/mine".into(),
        },
    ) else {
        panic!("no list")
    };
    assert_eq!(acl, [Acl { perms: 31, id: me }]);
}

#[test]
fn who_may_only_read_sees_no_digest() {
    let mut bench = Bench::alone();
    bench.connect(1);
    let grant = |perms, scheme: &str, id: &str| Acl {
        perms,
        id: Id {
            scheme: scheme.into(),
            id: id.into(),
        },
    };
    let acl = vec![grant(1, "world", "anyone"), grant(31, "digest", "u:secret")];
    let make = Request::Create {
        op: CreateOp::Create,
        path: "/a".into(),
        data: None,
        acl,
        flags: 0,
    };
    assert!(bench.ask(1, &make).is_ok());
    let Ok(Response::Acl { acl, .. }) = bench.ask(1, &Request::GetAcl { path: "/a".into() }) else {
        panic!("no list")
    };
    assert_eq!(
        acl,
        [grant(1, "world", "anyone"), grant(31, "digest", "u:x")]
    );
}

/// As Apache ZooKeeper 3.8 answers, seen on the wire.
#[test]
fn paths_that_are_none() {
    let mut bench = Bench::alone();
    bench.connect(1);
    let (no_node, bad) = (Err(ErrorCode::NoNode), Err(ErrorCode::BadArguments));
    // path, create, getData, delete, setData
    let expected = [
        ("a", bad, no_node, bad, bad),
        ("//a", bad, no_node, no_node, bad),
        ("/r//x", no_node, no_node, no_node, bad),
        ("/r/./x", no_node, no_node, no_node, bad),
        ("/r/x/", no_node, no_node, no_node, bad),
        ("/r\u{1}", bad, no_node, no_node, bad),
        ("/..", bad, no_node, no_node, bad),
        ("/\u{e000}", bad, no_node, no_node, bad),
        ("/\u{1F600}", bad, no_node, no_node, bad),
    ];
    for (path, created, read, deleted, written) in expected {
        let delete = Request::Delete {
            path: path.into(),
            version: -1,
        };
        let unit = |answer: Result<Response, ErrorCode>| answer.map(drop);
        let mode = CreateMode::Persistent;
        assert_eq!(
            unit(bench.ask(1, &create(path, mode))),
            created,
            "create {path:?}"
        );
        assert_eq!(
            unit(bench.ask(1, &get(path, true))),
            read,
            "getData {path:?}"
        );
        assert_eq!(unit(bench.ask(1, &delete)), deleted, "delete {path:?}");
        assert_eq!(unit(bench.ask(1, &set(path))), written, "setData {path:?}");
    }
    let root = create("/", CreateMode::Persistent);
    assert_eq!(bench.ask(1, &root), Err(ErrorCode::NodeExists));
    let sequential = create("/s/", CreateMode::PersistentSequential);
    assert_eq!(bench.ask(1, &sequential), Err(ErrorCode::NoNode));
    bench.make(1, "/s", CreateMode::Persistent);
    let path = "/s/0000000000".into();
    assert_eq!(bench.ask(1, &sequential), Ok(Response::Created { path }));
    assert_eq!(bench.core.watches.len(), 0, "nobody watches what cannot be");
}

/// Opens a connection as a client that accepts a server which is read-only.
fn hello_read_only(bench: &mut Bench, conn: u64, session: i64, password: Option<Bytes>) {
    bench.core.handle_connect(bench.now, ConnId(conn), caller());
    let request = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 10_000,
        session_id: session,
        password,
        read_only: Some(true),
    };
    bench.frame(conn, &encode_connect_request(&request));
    bench.disk();
}

#[test]
fn without_a_quorum_those_who_accept_it_may_read() {
    let mut bench = Bench::new(3);
    hello_read_only(&mut bench, 1, 0, None);
    bench.expect_nothing(1);
    bench.send(1, 5, &get("/", false));
    bench.pass(600);
    let answer = ConnectResponse::decode(&bench.next(1)).unwrap();
    assert_eq!((answer.read_only, answer.timeout_ms), (Some(true), 10_000));
    assert!(
        bench.expect(1, 5, OpCode::GetData).is_ok(),
        "what it sent early"
    );
    assert_eq!(bench.word(FourLetterWord::Isro), "ro");
    assert!(
        bench
            .word(FourLetterWord::Srvr)
            .contains("Mode: read-only\n")
    );

    let refused = Err(ErrorCode::NotReadOnly);
    let path = "/a".to_owned();
    assert_eq!(bench.ask(1, &create("/a", CreateMode::Ephemeral)), refused);
    assert_eq!(bench.ask(1, &set("/")), refused);
    assert_eq!(bench.ask(1, &Request::Multi(vec![])), refused);
    assert_eq!(bench.ask(1, &Request::Sync { path }), refused);
    assert_eq!(bench.ask(1, &Request::Ping), Ok(Response::Empty));
    assert!(bench.ask(1, &add_watch("/", RECURSIVE)).is_ok());
    assert!(bench.core.outbox.is_empty(), "nothing waits for the log");

    hello_read_only(&mut bench, 2, 0, None);
    let other = ConnectResponse::decode(&bench.next(2)).unwrap();
    assert_ne!(other.session_id, answer.session_id);
    assert_eq!(bench.ask(2, &Request::CloseSession), Ok(Response::Empty));
    bench.expect_closed(2, CloseReason::Goodbye);
    hello_read_only(
        &mut bench,
        3,
        0x0100_0000_0000_0007,
        Some(vec![0; 16].into()),
    );
    bench.expect_closed(3, CloseReason::Leaderless);
    bench.core.handle_connect(bench.now, ConnId(4), caller());
    bench.hello(4, 0, None, 0);
    bench.pass(20);
    bench.expect_closed(4, CloseReason::Leaderless);

    bench.pass(9_000);
    assert_eq!(bench.ask(1, &Request::Ping), Ok(Response::Empty));
    bench.pass(9_000);
    assert!(bench.closed.is_empty(), "it was heard of");
    bench.pass(2_000);
    bench.expect_closed(1, CloseReason::Expired);
}

#[test]
fn a_server_that_may_not_be_read_only_is_not() {
    let mut bench = Bench::new(3);
    bench.core.config.read_only = false;
    hello_read_only(&mut bench, 1, 0, None);
    bench.pass(600);
    bench.expect_closed(1, CloseReason::Leaderless);
    assert_eq!(bench.word(FourLetterWord::Isro), "null");
}

#[test]
fn read_only_ends_when_there_is_a_leader() {
    let mut bench = Bench::new(3);
    bench.pass(600);
    hello_read_only(&mut bench, 1, 0, None);
    assert!(ConnectResponse::decode(&bench.next(1)).is_ok());
    let heartbeat = RaftMessage {
        kind: RaftMessageKind::Heartbeat,
        to: 1,
        from: 2,
        term: 1000,
        log_term: 0,
        index: 0,
        entries: vec![],
        commit: 0,
        commit_term: 0,
        snapshot: None,
        request_snapshot: 0,
        reject: false,
        reject_hint: 0,
        context: Bytes::new(),
        priority: 0,
    };
    let heartbeat = PeerMessage::Raft(heartbeat);
    bench.core.handle_peer(bench.now, 2, heartbeat);
    bench.drain();
    bench.expect_closed(1, CloseReason::QuorumIsBack);
    assert_eq!(bench.word(FourLetterWord::Isro), "rw");
}

#[test]
fn sessions_are_bounded() {
    let mut bench = Bench::alone();
    bench.core.config.sessions_max = 2;
    bench.connect(1);
    let second = bench.connect(2);
    bench.hello(3, 0, None, 0);
    bench.expect_closed(3, CloseReason::TooManySessions);
    bench.hello(4, second.session_id, second.password, 0);
    let answer = ConnectResponse::decode(&bench.next(4)).unwrap();
    assert_eq!(answer.session_id, second.session_id, "it counts already");
}

/// Whatever clients send, nobody else is harmed, and each frame is answered or its connection closed.
#[test]
fn damaged_requests_harm_nobody() {
    let mut bench = Bench::alone();
    bench.core.config.extended_types = true;
    // Two changes of the membership wait for each other, and here no time passes.
    bench.core.config.reconfig = false;
    let frames: Vec<Bytes> = requests().iter().map(|r| encode_request(7, r)).collect();
    let (mut answered, mut closed) = (0, 0);
    for seed in 0..1500 {
        let mut mill = Bytemill(seed);
        let conn = seed + 1;
        bench.connect(conn);
        let mut sent = 0;
        for _ in 0..4 {
            let mut frame = frames[mill.below(frames.len())].to_vec();
            for _ in 0..mill.below(3) {
                // The length in front is the driver's, and the xid says nothing.
                let at = 8 + mill.below(frame.len() - 8);
                frame[at] = mill.next().to_le_bytes()[0];
            }
            if mill.below(8) == 0 {
                frame.truncate(4 + mill.below(frame.len() - 3));
            }
            bench.frame(conn, &frame);
            sent += 1;
        }
        bench.disk();
        bench.core.state.tree.check_invariants();
        let events = |frame: &Bytes| {
            ReplyHeader::split(frame).is_ok_and(|(header, _)| header.xid == xid::NOTIFICATION)
        };
        let mut frames = bench.frames.remove(&ConnId(conn)).unwrap_or_default();
        frames.retain(|frame| !events(frame));
        answered += frames.len();
        if std::mem::take(&mut bench.closed)
            .iter()
            .any(|(id, _)| *id == ConnId(conn))
        {
            closed += 1;
        } else {
            assert_eq!(frames.len(), sent, "seed {seed}");
        }
        bench.core.handle_disconnect(bench.now, ConnId(conn));
    }
    assert!(
        answered > 3000 && closed > 100,
        "{answered} answered, {closed} closed"
    );
    assert_eq!(bench.core.watches.len(), 0);
    assert!(bench.core.outbox.is_empty() && bench.core.conns.is_empty());
}

#[test]
fn reconfig_judges_the_change_before_the_right_to_make_it() {
    let reconfig = |config_version| Request::Reconfig {
        joining: Some("server.9=127.0.0.1:1:2:observer;127.0.0.1:3".into()),
        leaving: None,
        new_members: None,
        config_version,
    };
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.core.config.reconfig = false;
    assert_eq!(
        bench.ask(1, &reconfig(-1)),
        Err(ErrorCode::ReconfigDisabled)
    );
    bench.core.config.reconfig = true;
    assert_eq!(bench.ask(1, &reconfig(7)), Err(ErrorCode::BadVersion));
    bench.connect(2);
    assert_eq!(bench.ask(2, &reconfig(-1)), Err(ErrorCode::NoAuth));
}
