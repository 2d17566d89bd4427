//! The lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use unbroken_coord::client::{Client, ClientError, ConnectOptions};
use unbroken_coord::recipes::lease::{Lease, Terms};
use unbroken_coord::wire::{Acl, CreateMode, EventType};

use crate::common::Cluster;
use crate::gate::Gate;
use crate::{clients, create, harass};

fn terms() -> Terms {
    Terms::new(Duration::from_millis(400))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_holds_it_at_a_time_and_tokens_grow() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let inside = Arc::new(AtomicBool::new(false));
    let last_token = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for (client, who) in clients.iter().zip(0..) {
        let lease = Lease::new(client, "/app/lease", terms());
        let (inside, last_token) = (inside.clone(), last_token.clone());
        tasks.push(tokio::spawn(async move {
            for round in 0..8 {
                let held = lease.acquire(&format!("worker {who}")).await.unwrap();
                let before = last_token.swap(held.token(), Ordering::SeqCst);
                assert!(before < held.token(), "{before} then {}", held.token());
                if held.is_held() {
                    assert!(!inside.swap(true, Ordering::SeqCst), "two are inside");
                    held.run(tokio::task::yield_now()).await;
                    inside.store(false, Ordering::SeqCst);
                }
                // By drop or by word: both free it at once.
                if round % 2 == 0 {
                    held.release().await.unwrap();
                }
            }
        }));
    }
    harass(&mut cluster, 1).await;
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_falls_silent_gives_up_before_another_takes_it() {
    let cluster = Cluster::start(|_| {}).await;
    let first = cluster.client("a", 8000).await;
    let second = cluster.client("b", 8000).await;
    let held = Lease::new(&first, "/silent", terms())
        .acquire("one")
        .await
        .unwrap();
    let other = Lease::new(&second, "/silent", terms());
    assert!(other.try_acquire("two").await.unwrap().is_none());
    let holder = other.holder().await.unwrap().unwrap();
    assert_eq!((holder.name.as_str(), holder.token), ("one", held.token()));
    create(&second, "/fenced", "").await;
    first.multi(vec![held.check()]).await.unwrap();
    let check = held.check();
    // Its session ends, so that nothing is renewed any more; nobody tells it.
    first.close().await.unwrap();
    let taken = other.acquire("two").await.unwrap();
    assert!(!held.is_held(), "two believe that they hold it");
    assert!(taken.token() > held.token());
    held.lost().await;
    assert!(held.run(std::future::pending::<()>()).await.is_none());
    let fenced = second.multi(vec![check]).await;
    assert!(
        matches!(fenced, Err(ClientError::Multi { index: 0, .. })),
        "{fenced:?}"
    );
    drop(held);
    assert_eq!(other.holder().await.unwrap().unwrap().name, "two");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_outlives_the_holders_session() {
    let cluster = Cluster::start(|_| {}).await;
    let gate = Gate::to(cluster.hosts("a")).await;
    let mut options = ConnectOptions::new([gate.host()]).renew_session(true);
    options.session_timeout = Duration::from_millis(300);
    let client = Client::connect(options).await.unwrap();
    client
        .create("/mine", "", CreateMode::Ephemeral, Acl::open())
        .await
        .unwrap();
    let lease = Lease::new(&client, "/long", Terms::new(Duration::from_secs(60)));
    let held = lease.acquire("one").await.unwrap();
    let other = cluster.client("b", 8000).await;
    let (_, gone) = other.exists_and_watch("/mine").await.unwrap();
    gate.shut();
    assert_eq!(gone.await.unwrap().event, EventType::NodeDeleted);
    assert!(held.is_held(), "the session has expired, the lease has not");
    gate.open();
    // On the next session.
    while let Err(lost) = client.multi(vec![held.check()]).await {
        assert!(!matches!(lost, ClientError::Multi { .. }), "{lost}");
    }
    held.release().await.unwrap();
    assert_eq!(lease.holder().await.unwrap(), None);
}
