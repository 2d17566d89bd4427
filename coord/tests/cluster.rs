//! Three real servers on loopback with real disks, and real clients.
#![expect(clippy::disallowed_methods, reason = "prints how long things took")]

mod common;

use std::time::Instant;

use common::Cluster;
use unbroken_coord::client::ClientError;
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode};

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
