//! The recipes that have kazoo's layout, or one that kazoo can be told of, together with kazoo's own.

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;
#[path = "common/gate.rs"]
#[allow(dead_code, reason = "each test file uses its part of it")]
mod gate;
#[path = "common/recipes.rs"]
#[allow(dead_code, reason = "each test file uses its part of it")]
mod helpers;

use std::process::Stdio;

use common::Cluster;
use helpers::{children, soon};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use unbroken_coord::recipes::barrier::Barrier;
use unbroken_coord::recipes::lock::Lock;
use unbroken_coord::recipes::queue::Queue;
use unbroken_coord::recipes::rwlock::RwLock;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recipes_kazoo.py");

struct Kazoo {
    _process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Kazoo {
    async fn start(hosts: &[String]) -> Self {
        let mut process = Command::new("python3")
            .arg(SCRIPT)
            .arg(hosts.join(","))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("python3 is needed for this test");
        let mut kazoo = Self {
            input: process.stdin.take().expect("it is piped"),
            output: BufReader::new(process.stdout.take().expect("it is piped")).lines(),
            _process: process,
        };
        assert_eq!(kazoo.answer().await, "ready");
        kazoo
    }

    async fn tell(&mut self, line: &str) {
        let line = format!("{line}\n");
        let told = self.input.write_all(line.as_bytes()).await;
        told.expect("kazoo (pip install kazoo) listens");
    }

    async fn answer(&mut self) -> String {
        let line = soon("kazoo answers", self.output.next_line()).await;
        let line = line.expect("its output is text");
        line.expect("kazoo (pip install kazoo) goes on")
    }

    async fn ask(&mut self, line: &str) -> String {
        self.tell(line).await;
        self.answer().await
    }

    async fn does(&mut self, line: &str) {
        assert_eq!(self.ask(line).await, "ok", "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kazoo_takes_part() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let mut kazoo = Kazoo::start(&cluster.hosts("b")).await;

    kazoo.does("lock l /lock").await;
    let lock = Lock::new(&client, "/lock").label("ours");
    let held = lock.acquire().await.unwrap();
    kazoo.tell("acquire l").await;
    children(&client, "/lock", 2).await;
    let line = lock.contenders().await.unwrap();
    let labels: Vec<_> = line.iter().map(|c| c.label.clone()).collect();
    assert_eq!(labels, ["ours", "kazoo"]);
    held.release().await.unwrap();
    assert_eq!(kazoo.answer().await, "ok");
    assert!(lock.try_acquire().await.unwrap().is_none());
    let waiting = tokio::spawn(async move { lock.acquire().await });
    children(&client, "/lock", 2).await;
    assert!(!waiting.is_finished());
    kazoo.does("release l").await;
    let held = soon("our turn", waiting).await.unwrap().unwrap();
    assert_eq!(kazoo.ask("try l").await, "False");
    held.release().await.unwrap();

    kazoo.does("read r /rw").await;
    kazoo.does("write w /rw").await;
    let lock = RwLock::new(&client, "/rw");
    let reading = lock.read().await.unwrap();
    assert_eq!(kazoo.ask("try r").await, "True");
    assert!(lock.try_write().await.unwrap().is_none());
    kazoo.does("release r").await;
    kazoo.tell("acquire w").await;
    children(&client, "/rw", 2).await;
    assert!(lock.try_read().await.unwrap().is_none(), "a write waits");
    reading.release().await.unwrap();
    assert_eq!(kazoo.answer().await, "ok");
    kazoo.does("release w").await;
    let writing = soon("our turn", lock.write()).await.unwrap();
    assert_eq!(kazoo.ask("try r").await, "False");
    writing.release().await.unwrap();

    kazoo.does("queue q /jobs").await;
    kazoo.does("put q one").await;
    let queue = Queue::new(&client, "/jobs");
    assert_eq!(soon("theirs", queue.take()).await.unwrap().value, "one");
    queue
        .put_all(100, vec!["two".into(), "three".into()])
        .await
        .unwrap();
    assert_eq!(kazoo.ask("get q").await, "two");
    client.sync("/").await.unwrap();
    let reserved = queue.reserve().await.unwrap();
    assert_eq!(reserved.item().value, "three", "two is claimed");
    kazoo.does("consume q").await;
    reserved.done().await.unwrap();
    children(&client, "/jobs/entries", 0).await;

    kazoo.does("barrier b /barrier").await;
    kazoo.does("close b").await;
    let barrier = Barrier::new(&client, "/barrier");
    let waiting = tokio::spawn(async move { barrier.wait().await });
    kazoo.does("open b").await;
    soon("it is open", waiting).await.unwrap().unwrap();
    let barrier = Barrier::new(&client, "/barrier");
    barrier.close().await.unwrap();
    kazoo.tell("wait b").await;
    barrier.open().await.unwrap();
    assert_eq!(kazoo.answer().await, "ok");
}
