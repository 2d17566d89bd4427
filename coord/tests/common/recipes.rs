//! What the tests of the recipes share.

use std::time::Duration;

use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::wire::{Acl, CreateMode};

use crate::common::Cluster;
use crate::gate::Gate;

/// What must happen happens within this time, on a slow machine, too. Nothing waits for it otherwise.
pub(crate) const SOON: Duration = Duration::from_secs(60);

pub(crate) async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, event).await {
        Ok(value) => value,
        Err(_) => panic!("did not happen: {what}"),
    }
}

/// Returns when the znode has so many children; where that is none, it may have gone itself.
pub(crate) async fn children(client: &Client, path: &str, count: usize) -> Vec<String> {
    let counted = async {
        loop {
            match client.children_and_watch(path).await {
                Ok((children, ..)) if children.len() == count => return children,
                Ok((.., changed)) => drop(changed.await.expect("the session lives")),
                Err(_) if count == 0 => return Vec::new(),
                Err(_) => {
                    let (stat, created) = client
                        .exists_and_watch(path)
                        .await
                        .expect("the session lives");
                    if stat.is_none() {
                        created.await.expect("the session lives");
                    }
                }
            }
        }
    };
    soon(&format!("{count} children of {path}"), counted).await
}

/// A client behind a gate of its own.
pub(crate) async fn gated(cluster: &Cluster, server: &str, timeout_ms: u64) -> (Client, Gate) {
    let gate = Gate::to(cluster.hosts(server)).await;
    let options = ConnectOptions::new([gate.host()])
        .session_timeout(Duration::from_millis(timeout_ms))
        .request_timeout(Some(SOON));
    (Client::connect(options).await.expect("a session"), gate)
}

/// Shuts a client's gate until its session has expired, as `judge` sees it.
pub(crate) async fn until_expired(judge: &Client, client: &Client, gate: &Gate, number: usize) {
    let path = format!("/mark-{number}");
    let marked = client.create(&path, "", CreateMode::Ephemeral, Acl::open());
    let marked = marked.await.is_ok();
    gate.shut();
    let gone = async {
        loop {
            match judge.exists_and_watch(&path).await {
                Ok((Some(_), gone)) => drop(gone.await),
                Ok((None, _)) => return,
                Err(_) => {}
            }
        }
    };
    if marked {
        soon("the session expires", gone).await;
    }
    gate.open();
}

/// A generator of our own, so that a seed is a run (of the test's own choices).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// The environment's `SEED`, or one of this run's own.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| (u64::from(std::process::id()) * 0x9e37_79b9) | 1);
    println!("SEED={seed}");
    seed
}
