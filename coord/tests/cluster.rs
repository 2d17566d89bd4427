//! Three real servers on loopback with real disks, and real clients.
#![expect(clippy::disallowed_methods, reason = "prints how long things took")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::Cluster;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use unbroken_coord::client::{Client, ClientError};
use unbroken_coord::driver::{Role, ServerError};
use unbroken_coord::wire::{
    Acl, ConnectRequest, CreateMode, CreateOp, ErrorCode, Request, encode_connect_request,
    encode_request,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_are_seen_everywhere_after_sync() {
    let cluster = Cluster::start(|_| {}).await;
    let a = cluster.client("a", 4000).await;
    let b = cluster.client("b", 4000).await;
    a.create("/x", "one", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    b.sync("/x").await.unwrap();
    let (data, stat) = b.get("/x").await.unwrap();
    assert_eq!((&data[..], stat.version), (&b"one"[..], 0));
    let stat = b.set("/x", "two", 0).await.unwrap();
    assert_eq!(stat.version, 1);
    let refused = a.set("/x", "three", 0).await;
    assert!(
        matches!(refused, Err(ClientError::Zk(ErrorCode::BadVersion))),
        "{refused:?}"
    );
    let started = Instant::now();
    for version in 1..201 {
        a.set("/x", "again", version).await.unwrap();
    }
    let writes = started.elapsed();
    let started = Instant::now();
    for _ in 0..200 {
        b.sync("/x").await.unwrap();
        b.get("/x").await.unwrap();
    }
    println!(
        "one write {:?}, one sync and read {:?}",
        writes / 200,
        started.elapsed() / 200
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_and_writes_go_on() {
    let mut cluster = Cluster::start(|_| {}).await;
    let first = cluster.client("a", 4000).await;
    first
        .create("/count", "0", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let mut version = 0;
    for round in 0..4 {
        let leader = cluster.leader().await;
        let survivor = cluster
            .running()
            .map(|(name, _)| name)
            .find(|name| *name != leader);
        let client = cluster.client(survivor.unwrap(), 4000).await;
        let started = Instant::now();
        cluster.kill(&leader);
        // The session's server lives, so the write is repeated to the new leader and not lost.
        version = client
            .set("/count", format!("{round}"), version)
            .await
            .unwrap()
            .version;
        println!(
            "leader {leader} killed, next write after {:?}",
            started.elapsed()
        );
        cluster.up(&leader).await;
        let back = cluster.client(&leader, 4000).await;
        back.sync("/").await.unwrap();
        let (data, stat) = back.get("/count").await.unwrap();
        assert_eq!((data, stat.version), (format!("{round}").into(), version));
        client.close().await.unwrap();
        back.close().await.unwrap();
    }
    assert_eq!(version, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_survives_a_power_failure() {
    let mut cluster = Cluster::start(|config| config.snapshot_every = 50).await;
    let client = cluster.client("a", 4000).await;
    client
        .create("/d", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    for i in 0..130 {
        client
            .create(&format!("/d/{i}"), "x", CreateMode::Persistent, Acl::open())
            .await
            .unwrap();
    }
    client
        .create("/d/mine", "", CreateMode::Ephemeral, Acl::open())
        .await
        .unwrap();
    for name in ["a", "b", "c"] {
        cluster.kill(name);
    }
    for name in ["c", "a", "b"] {
        cluster.up(name).await;
    }
    // The session outlives its servers.
    let stat = client
        .exists("/d/mine")
        .await
        .unwrap()
        .expect("the session lives");
    assert_eq!(Some(stat.ephemeral_owner), client.session_id());
    client.sync("/").await.unwrap();
    assert_eq!(client.children("/d").await.unwrap().len(), 131);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_away_for_long_is_sent_a_snapshot() {
    let mut cluster = Cluster::start(|config| config.snapshot_every = 50).await;
    cluster.kill("c");
    let client = cluster.client("a", 4000).await;
    client
        .create("/n", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    // More than the others keep for one that is a little behind.
    let mut last = 0;
    for _ in 0..60 {
        last = last.max(set_at_once(&client, "/n", 100).await);
    }
    cluster.up("c").await;
    let newest = u64::try_from(client.get("/n").await.unwrap().1.mzxid).unwrap();
    let (_, server) = cluster.running().find(|(name, _)| *name == "c").unwrap();
    server
        .watch_status()
        .wait_for(|status| status.zxid >= newest)
        .await
        .unwrap();
    for other in ["a", "b"] {
        cluster.kill(other);
        cluster.up(other).await;
    }
    let late = cluster.client("c", 4000).await;
    late.sync("/n").await.unwrap();
    assert_eq!(late.get("/n").await.unwrap().1.version, last);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_sessions_hold_under_load_and_end_in_silence() {
    let cluster = Cluster::start(|_| {}).await;
    let mut holders = Vec::new();
    for server in ["a", "b", "c"].into_iter().cycle().take(9) {
        let client = cluster.client(server, 100).await;
        let session = client.session_id().unwrap();
        let path = format!("/held-{session:x}");
        client
            .create(&path, "", CreateMode::Ephemeral, Acl::open())
            .await
            .unwrap();
        holders.push((client, session, path));
    }
    let writer = cluster.client("b", 10_000).await;
    writer
        .create("/load", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    // How long this machine made one of our own tasks wait: what it does to them, it does to pings.
    let stall_ms = Arc::new(AtomicU64::new(0));
    let canary = tokio::spawn({
        let stall_ms = stall_ms.clone();
        async move {
            loop {
                let before = Instant::now();
                tokio::time::sleep(Duration::from_millis(2)).await;
                let took = u64::try_from(before.elapsed().as_millis()).unwrap();
                stall_ms.fetch_max(took, Ordering::Relaxed);
            }
        }
    });
    let started = Instant::now();
    let mut writes = 0;
    // Thirty times the session timeout.
    while started.elapsed().as_millis() < 3000 {
        writes = set_at_once(&writer, "/load", 64).await;
    }
    canary.abort();
    let stall_ms = stall_ms.load(Ordering::Relaxed);
    println!(
        "sets: version {writes} in {:?}; longest stall {stall_ms} ms",
        started.elapsed()
    );
    for (client, session, path) in &holders {
        let kept = client.session_id() == Some(*session)
            && matches!(client.exists(path).await, Ok(Some(_)));
        assert!(
            kept || stall_ms > 30,
            "a session that was kept alive has expired"
        );
    }
    // One that falls silent goes, with what it held, though its connection stays.
    let mut silent = TcpStream::connect(&cluster.hosts("a")[0]).await.unwrap();
    let hello = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 100,
        session_id: 0,
        password: None,
        read_only: None,
    };
    silent
        .write_all(&encode_connect_request(&hello))
        .await
        .unwrap();
    let mut answer = [0; 40];
    silent.read_exact(&mut answer).await.unwrap();
    let create = Request::Create {
        op: CreateOp::Create,
        path: "/silent".into(),
        data: None,
        acl: Acl::open(),
        flags: CreateMode::Ephemeral.flags(),
    };
    let (there, watch) = writer.exists_and_watch("/silent").await.unwrap();
    assert_eq!(there, None);
    silent.write_all(&encode_request(1, &create)).await.unwrap();
    watch.await.unwrap();
    let (there, watch) = writer.exists_and_watch("/silent").await.unwrap();
    if there.is_some() {
        watch.await.unwrap();
    }
    assert_eq!(writer.exists("/silent").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lost_its_disk_is_refused() {
    let mut cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 4000).await;
    client
        .create("/x", "1", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let mut status = cluster.running().last().unwrap().1.watch_status();
    status
        .wait_for(|status| status.leader.is_some())
        .await
        .unwrap();
    drop(status);
    cluster.stop("c").await;
    cluster.wipe("c");
    cluster.up("c").await;
    let (_, server) = cluster.running().find(|(name, _)| *name == "c").unwrap();
    let error = server.failed().await;
    assert!(matches!(*error, ServerError::Forgotten { .. }), "{error}");
    assert_eq!(client.set("/x", "2", 0).await.unwrap().version, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn words_are_answered_and_monstrous_frames_are_not() {
    let cluster = Cluster::start(|_| {}).await;
    let leader = cluster.leader().await;
    let _client = cluster.client(&leader, 4000).await;
    let host = &cluster.hosts(&leader)[0];
    for (word, answer) in [
        ("ruok", "imok"),
        ("srvr", "Mode: "),
        ("mntr", "zk_znode_count\t4"),
    ] {
        let mut text = String::from("not currently serving");
        while text.contains("not currently serving") {
            text.clear();
            let mut stream = TcpStream::connect(host).await.unwrap();
            stream.write_all(word.as_bytes()).await.unwrap();
            stream.read_to_string(&mut text).await.unwrap();
        }
        assert!(text.contains(answer), "{word}: {text}");
    }
    for length in [i32::MAX, -1, 1 << 20] {
        let mut stream = TcpStream::connect(host).await.unwrap();
        stream.write_all(&length.to_be_bytes()).await.unwrap();
        let mut nothing = Vec::new();
        // Closed or reset, without a word.
        let _ = stream.read_to_end(&mut nothing).await;
        assert!(nothing.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_on_demand() {
    let cluster = Cluster::start(|_| {}).await;
    let old = cluster.leader().await;
    let client = cluster.client(&old, 4000).await;
    client
        .create("/x", "1", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let to = if old == "a" { "b" } else { "a" };
    let mut status = cluster.servers[to].as_ref().unwrap().watch_status();
    // The wish may be lost, and another may have been elected meanwhile: ask until it is so.
    loop {
        let leader = cluster.leader().await;
        if leader == to {
            break;
        }
        cluster.servers[&leader]
            .as_ref()
            .unwrap()
            .transfer_leadership(Some(to));
        let leads = status.wait_for(|status| status.role == Role::Leader);
        if tokio::time::timeout(Duration::from_secs(1), leads)
            .await
            .is_ok()
        {
            break;
        }
    }
    assert_eq!(client.set("/x", "2", 0).await.unwrap().version, 1);
}

/// So many writes at the same time; the highest version that came back.
async fn set_at_once(client: &Client, path: &'static str, count: usize) -> i32 {
    let mut sets = JoinSet::new();
    for _ in 0..count {
        let client = client.clone();
        sets.spawn(async move { client.set(path, vec![1; 512], -1).await });
    }
    let mut newest = 0;
    while let Some(set) = sets.join_next().await {
        newest = newest.max(set.expect("it ended").expect("it was taken").version);
    }
    newest
}
