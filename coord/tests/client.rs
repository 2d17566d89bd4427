//! The client against three real servers: every operation, and what it promises under faults.

#![expect(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;

use std::time::Duration;

use common::Cluster;
use unbroken_coord::client::blocking;
use unbroken_coord::client::{
    Client, ClientError, ConnectOptions, Identity, NewNode, Notice, Reconfig, SessionState,
    Standing, WatchEvent,
};
use unbroken_coord::wire::{
    Acl, AddWatchMode, CreateMode, ErrorCode, EventType, Id, MultiOp, MultiResult, ReadOp,
    ReadResult, WatcherKind, perms,
};

fn zk<T>(code: ErrorCode) -> Result<T, ClientError> {
    Err(ClientError::Zk(code))
}

fn notice(event: EventType, path: &str) -> Option<Result<Notice, ClientError>> {
    let path = path.into();
    Some(Ok(Notice::Event(WatchEvent { event, path })))
}

async fn make(client: &Client, path: &str) {
    client
        .create(path, "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
}

/// The blocking face has the same operations, so this tries both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_by_the_blocking_client() {
    let cluster = Cluster::start(|_| {}).await;
    let mut options = ConnectOptions::new(cluster.hosts("b"));
    let outside = blocking_connect(options.clone()).await;
    options.chroot = "/app".into();
    tokio::task::spawn_blocking(move || {
        let persistent = CreateMode::Persistent;
        outside.create("/app", "", persistent, Acl::open()).unwrap();
        let client = blocking::Client::connect(options).unwrap();
        assert!(matches!(client.state(), SessionState::Connected { .. }));

        // Data, null and not.
        let (path, stat) = client.create_node("/a", NewNode::new(persistent)).unwrap();
        assert_eq!((path.as_str(), stat.version), ("/a", 0));
        assert_eq!(client.get_or_null("/a").unwrap().0, None);
        assert_eq!(client.get("/a").unwrap().0, "");
        assert_eq!(client.set("/a", "one", 0).unwrap().version, 1);
        assert_eq!(client.set("/a", "two", 0), zk(ErrorCode::BadVersion));
        assert_eq!(client.sync_and_get("/a").unwrap().0, "one");
        client.set_or_null("/a", None, 1).unwrap();
        client.sync("/a").unwrap();
        assert_eq!(client.exists("/a").unwrap().unwrap().version, 2);
        assert_eq!(client.exists("/none").unwrap(), None);
        client.check("/a", 2).unwrap();
        assert_eq!(outside.exists("/app/a").unwrap().unwrap().version, 2);

        // Children, ephemerals, sequence.
        let mode = CreateMode::EphemeralSequential;
        let one = client.create("/a/e-", "1", mode, Acl::open()).unwrap();
        assert_eq!(one, "/a/e-0000000000");
        let container = NewNode::new(CreateMode::Container).data("c");
        client.create_node("/a/c", container).unwrap();
        let mut children = client.children("/a").unwrap();
        children.sort();
        assert_eq!(children, ["c", "e-0000000000"]);
        assert_eq!(client.children2("/a").unwrap().1.num_children, 2);
        assert_eq!(client.all_children_number("/").unwrap(), 3);
        assert_eq!(client.ephemerals("/a").unwrap(), [one.as_str()]);
        assert_eq!(client.ephemerals("/b").unwrap(), [""; 0]);

        // Several at once.
        let ops = vec![
            MultiOp::check("/a", 2),
            MultiOp::set("/a", "three", 2),
            MultiOp::create("/m", "", persistent, Acl::open()),
            MultiOp::create_node("/m/n", NewNode::new(persistent)),
            MultiOp::delete("/a/c", -1),
        ];
        let results = client.multi(ops).unwrap();
        assert_eq!(results[2], MultiResult::Created { path: "/m".into() });
        assert!(matches!(&results[3], MultiResult::Created2 { path, .. } if path == "/m/n"));
        let failed = client.multi(vec![MultiOp::check("/a", 3), MultiOp::delete("/m", -1)]);
        let (index, code) = (1, ErrorCode::NotEmpty);
        assert_eq!(failed, Err(ClientError::Multi { index, code }));
        let reads = vec![
            ReadOp::data("/a"),
            ReadOp::data("/x"),
            ReadOp::children("/m"),
        ];
        let results = client.multi_read(reads).unwrap();
        assert!(
            matches!(&results[0], ReadResult::Data { data: Some(data), .. } if data == "three")
        );
        assert_eq!(results[1], ReadResult::Error(ErrorCode::NoNode));
        assert_eq!(results[2], ReadResult::Children(vec!["n".into()]));

        // Who may do what.
        client
            .authenticate(Identity::digest("me", "secret"))
            .unwrap();
        let refused = client.authenticate(Identity {
            scheme: "none-such".into(),
            auth: "".into(),
        });
        assert_eq!(refused, zk(ErrorCode::AuthFailed));
        let who = client.who_am_i().unwrap();
        assert!(who.iter().any(|id| id.scheme == "digest" && id.id == "me"));
        let mine = Acl {
            perms: perms::ALL,
            id: Id {
                scheme: "auth".into(),
                id: String::new(),
            },
        };
        assert_eq!(client.set_acl("/m", vec![mine], 0).unwrap().aversion, 1);
        assert!(client.acl("/m").unwrap().0[0].id.id.starts_with("me:"));
        // The refused proof has cost the connection: they may be on different servers now.
        outside.sync("/").unwrap();
        assert_eq!(
            outside.get("/app/m").err(),
            Some(ClientError::Zk(ErrorCode::NoAuth))
        );

        // Watches.
        let (_, _, watch) = client.get_and_watch("/a").unwrap();
        assert_eq!(client.check_watches("/a", WatcherKind::Data), Ok(true));
        let mut persistent = client.watch("/a", AddWatchMode::Persistent).unwrap();
        outside.set("/app/a", "four", -1).unwrap();
        assert_eq!(watch.wait().unwrap().path, "/a");
        assert_eq!(persistent.next(), notice(EventType::NodeDataChanged, "/a"));
        let (_, _, watch) = client.children_and_watch("/a").unwrap();
        let watch = watch
            .wait_for(Duration::from_millis(1))
            .expect_err("nothing happens");
        let (_, created) = client.exists_and_watch("/new").unwrap();
        outside
            .create("/app/new", "", CreateMode::Persistent, Acl::open())
            .unwrap();
        assert_eq!(created.wait().unwrap().event, EventType::NodeCreated);
        client.remove_watches("/a", WatcherKind::Children).unwrap();
        assert_eq!(watch.wait().unwrap().event, EventType::ChildWatchRemoved);
        assert_eq!(client.check_watches("/a", WatcherKind::Any), Ok(true));
        drop(persistent);
        assert_eq!(client.check_watches("/a", WatcherKind::Any), Ok(false));

        // The servers themselves, whatever the chroot.
        let (_, stat) = client.config().unwrap();
        let _ = client.config_and_watch().unwrap();
        let nobody = Reconfig::Change {
            joining: vec![],
            leaving: vec!["9".into()],
        };
        assert!(client.reconfig(&nobody, -1).is_err(), "{stat:?}");

        // The end.
        let lease = client.lease().unwrap();
        assert_eq!(Some(lease.session_id()), client.session_id());
        let mut events = client.events().unwrap();
        client.delete("/new", 0).unwrap();
        client.close().unwrap();
        assert_eq!(client.get("/a"), Err(ClientError::Closed));
        assert_eq!(lease.uncertain(), Standing::Gone);
        assert!(events.any(|event| {
            event == unbroken_coord::client::SessionEvent::State(SessionState::Closed)
        }));
        outside.sync("/").unwrap();
        assert_eq!(outside.exists("/app/a/e-0000000000").unwrap(), None);
        // To drop is to close, before the drop returns.
        let other = blocking::Client::connect(ConnectOptions::new(cluster.hosts("b"))).unwrap();
        other
            .create("/gone", "", CreateMode::Ephemeral, Acl::open())
            .unwrap();
        drop(other);
        outside.sync("/").unwrap();
        assert_eq!(outside.exists("/gone").unwrap(), None);
        drop(outside);
        cluster
    })
    .await
    .unwrap();
}

async fn blocking_connect(options: ConnectOptions) -> blocking::Client {
    let connect = move || blocking::Client::connect(options).unwrap();
    tokio::task::spawn_blocking(connect).await.unwrap()
}

/// A copy kept by a recursive watch is right in the end, whatever servers die meanwhile, if it is
/// read again whenever the stream says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recursive_watch_misses_nothing_without_saying_so() {
    let mut cluster = Cluster::start(|_| {}).await;
    let writer = cluster.client("b", 8000).await;
    let watcher = cluster.client("a", 8000).await;
    make(&writer, "/t").await;
    let mode = AddWatchMode::PersistentRecursive;
    watcher.sync("/").await.unwrap();
    let mut stream = watcher.watch("/t", mode).await.unwrap();
    let follow = tokio::spawn({
        let watcher = watcher.clone();
        async move {
            let mut seen = std::collections::BTreeSet::new();
            let (mut missed, mut read_again) = (0, true);
            while !seen.contains("/t/end") {
                if std::mem::take(&mut read_again) {
                    seen = match watcher.children("/t").await {
                        Ok(names) => names.iter().map(|name| format!("/t/{name}")).collect(),
                        Err(ClientError::ConnectionLoss) => {
                            read_again = true;
                            continue;
                        }
                        Err(error) => panic!("{error}"),
                    };
                    continue;
                }
                match stream.next().await {
                    Some(Ok(Notice::Event(event))) => match event.event {
                        EventType::NodeCreated => drop(seen.insert(event.path)),
                        EventType::NodeDeleted => drop(seen.remove(&event.path)),
                        other => panic!("{other:?}"),
                    },
                    Some(Ok(Notice::Missed)) => {
                        missed += 1;
                        read_again = true;
                    }
                    Some(Ok(Notice::Disconnected)) => {}
                    other => panic!("{other:?}"),
                }
            }
            (seen, missed)
        }
    });
    let mut expected: std::collections::BTreeSet<String> = ["/t/end".to_owned()].into();
    for i in 0..60 {
        if i % 20 == 10 {
            cluster.kill("a");
            cluster.up("a").await;
        }
        let path = format!("/t/{i}");
        // The writer's server may be the leader's follower: its writes wait for the new one.
        make(&writer, &path).await;
        if i % 3 == 0 {
            writer.delete(&path, -1).await.unwrap();
        } else {
            expected.insert(path);
        }
    }
    make(&writer, "/t/end").await;
    let (seen, missed) = follow.await.unwrap();
    assert_eq!(seen, expected);
    assert!(missed > 0, "the watcher's server has died three times");
}

/// An event is in the stream before a read that shows the change is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persistent_watch_is_told_before_the_change_is_read() {
    let cluster = Cluster::start(|_| {}).await;
    let writer = cluster.client("b", 8000).await;
    let reader = cluster.client("c", 8000).await;
    make(&writer, "/x").await;
    reader.sync("/x").await.unwrap();
    let mut stream = reader.watch("/x", AddWatchMode::Persistent).await.unwrap();
    let writing = tokio::spawn(async move {
        for i in 0..100 {
            writer.set("/x", i.to_string(), -1).await.unwrap();
        }
    });
    let (mut told, mut read) = (0, 0);
    while read < 100 {
        let (_, stat) = reader.get("/x").await.unwrap();
        while let Some(notice) = stream.try_next() {
            let event = WatchEvent {
                event: EventType::NodeDataChanged,
                path: "/x".into(),
            };
            assert_eq!(notice, Ok(Notice::Event(event)));
            told += 1;
        }
        read = stat.version;
        assert!(told >= read, "{told} changes told, {read} seen");
    }
    assert_eq!(told, 100);
    writing.await.unwrap();
}

/// A lease holds while any server can be reached that has a quorum behind it, and ends by itself,
/// before the session can expire, where none can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_servers_and_ends_without_them() {
    let mut cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 3000).await;
    let lease = client.lease().await.unwrap();
    let leader = cluster.leader().await;
    for name in ["a", &leader] {
        cluster.kill(name);
        cluster.up(name).await;
        // A new word of the quorum, later than all before.
        let until = lease.until().expect("certain");
        client.sync("/").await.unwrap();
        client.lease().await.unwrap();
        assert!(lease.until().expect("certain") >= until);
    }
    // A server alone answers pings, and they prove nothing.
    let other = ["b", "c"].into_iter().find(|name| *name != "a").unwrap();
    for name in ["a", "b", "c"] {
        if name != other {
            cluster.kill(name);
        }
    }
    let until = lease.until();
    assert_eq!(lease.uncertain().await, Standing::Uncertain);
    assert!(until.is_none_or(|until| until <= tokio::time::Instant::now()));
    // The session is not gone for certain, and when the quorum is back, it lives or does not.
    for name in ["a", "b", "c"] {
        if name != other {
            cluster.up(name).await;
        }
    }
    match lease.certain().await {
        Standing::Certain { .. } => client.sync("/").await.unwrap(),
        Standing::Gone => assert_eq!(client.sync("/").await, Err(ClientError::SessionExpired)),
        Standing::Uncertain => unreachable!("it was waited for"),
    }
}
