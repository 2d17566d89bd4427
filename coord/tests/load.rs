//! Clients that take no answers, and clients that ask for much: nobody else is to notice.

#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(clippy::disallowed_methods, reason = "waits have an end")]

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;

use std::time::{Duration, Instant};

use common::Cluster;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use unbroken_coord::driver::Server;
use unbroken_coord::metrics::Metrics;
use unbroken_coord::wire::{
    Acl, AddWatchMode, ConnectRequest, CreateMode, PATH_BYTES_MAX, Request, encode_connect_request,
    encode_request,
};

/// How long anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A session on a bare connection, which reads only when it is told to.
async fn bare(cluster: &Cluster, server: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server_of(cluster, server).client_address())
        .await
        .unwrap();
    let hello = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 60_000,
        session_id: 0,
        password: None,
        read_only: Some(false),
    };
    stream
        .write_all(&encode_connect_request(&hello))
        .await
        .unwrap();
    frame(&mut stream).await;
    stream
}

fn server_of<'a>(cluster: &'a Cluster, name: &str) -> &'a Server {
    cluster.servers[name].as_ref().unwrap()
}

/// The length of the next frame, which is read and thrown away.
async fn frame(stream: &mut TcpStream) -> usize {
    let length = usize::try_from(stream.read_u32().await.unwrap()).unwrap();
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    length
}

async fn until(cluster: &Cluster, server: &str, mut reached: impl FnMut(&Metrics) -> bool) {
    let begin = Instant::now();
    loop {
        let metrics = server_of(cluster, server).metrics();
        if reached(&metrics) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{metrics:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_never_reads_is_cut_off_and_the_others_are_told() {
    let cluster = Cluster::start(|_| {}).await;
    let writer = cluster.client("a", 10_000).await;
    // A long path makes long events.
    let path = format!("/{}", "x".repeat(PATH_BYTES_MAX - 1));
    writer
        .create(&path, "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let watch = Request::AddWatch {
        path: path.clone(),
        mode: AddWatchMode::Persistent as i32,
    };
    let mut good = bare(&cluster, "a").await;
    let mut slow = bare(&cluster, "a").await;
    for watcher in [&mut good, &mut slow] {
        watcher.write_all(&encode_request(1, &watch)).await.unwrap();
        frame(watcher).await;
    }
    const CHANGES: usize = 2500;
    let reader = tokio::spawn(async move {
        for _ in 0..CHANGES {
            assert!(frame(&mut good).await > PATH_BYTES_MAX);
        }
    });
    for _ in 0..CHANGES / 100 {
        let mut changes = JoinSet::new();
        for _ in 0..100 {
            let (writer, path) = (writer.clone(), path.clone());
            changes.spawn(async move { writer.set(&path, "", -1).await });
        }
        while let Some(change) = changes.join_next().await {
            change.unwrap().unwrap();
        }
    }
    reader.await.unwrap();
    until(&cluster, "a", |metrics| {
        metrics.slow_clients_cut == 1 && metrics.outbound_bytes == 0
    })
    .await;
    // What was on its way is there, and then the end.
    let mut rest = 0;
    let mut buffer = vec![0; 1 << 20];
    while let Ok(count @ 1..) = slow.read(&mut buffer).await {
        rest += count;
    }
    assert!(
        rest < CHANGES * PATH_BYTES_MAX,
        "it was not told everything"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_much_and_reads_nothing_costs_little_and_delays_nobody() {
    let cluster = Cluster::start(|_| {}).await;
    let writer = cluster.client("a", 10_000).await;
    const BYTES: usize = 900_000;
    writer
        .create(
            "/big",
            vec![b'x'; BYTES],
            CreateMode::Persistent,
            Acl::open(),
        )
        .await
        .unwrap();
    let get = Request::GetData {
        path: "/big".into(),
        watch: false,
    };
    const READS: i32 = 500;
    let mut greedy = bare(&cluster, "a").await;
    let asked: Vec<u8> = (1..=READS)
        .flat_map(|xid| encode_request(xid, &get).to_vec())
        .collect();
    greedy.write_all(&asked).await.unwrap();
    until(&cluster, "a", |metrics| metrics.outbound_bytes > 0).await;
    let mut most = 0;
    for _ in 0..50 {
        writer.get("/").await.unwrap();
        writer.set("/big", vec![b'y'; BYTES], -1).await.unwrap();
        most = most.max(server_of(&cluster, "a").metrics().outbound_bytes);
    }
    assert!(
        most < 8 << 20,
        "{most} bytes wait for one who does not read"
    );
    // It was asked, so it is answered, all of it.
    for _ in 0..READS {
        assert!(frame(&mut greedy).await > BYTES);
    }
    until(&cluster, "a", |metrics| {
        metrics.outbound_bytes == 0 && metrics.read.count() >= 550
    })
    .await;
    let metrics = server_of(&cluster, "a").metrics();
    assert_eq!(metrics.slow_clients_cut, 0);
    assert!(metrics.sync.count() > 0 && metrics.durable.count() > 0);
    assert!(
        metrics.write.count() >= 51 && metrics.read.count() >= 550,
        "{metrics:?}"
    );
    assert_eq!(metrics.requests["GETD"], 550);
}
