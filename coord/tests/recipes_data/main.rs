//! The recipes that hold data, on three real servers of which some die.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod cache;
mod channel;
mod commit;
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod common;
mod config;
mod consensus;
#[path = "../common/gate.rs"]
mod gate;
mod lease;
mod lossy;
mod transaction;

use common::Cluster;
use unbroken_coord::client::Client;
use unbroken_coord::wire::{Acl, CreateMode};

/// A client of each server, each of which the others can stand in for.
async fn clients(cluster: &Cluster) -> Vec<Client> {
    let mut clients = Vec::new();
    for server in ["a", "b", "c"] {
        clients.push(cluster.client(server, 8000).await);
    }
    clients
}

/// Kills the leader and starts it again, `times` times.
async fn harass(cluster: &mut Cluster, times: usize) {
    for _ in 0..times {
        let leader = cluster.leader().await;
        cluster.kill(&leader);
        cluster.leader().await;
        cluster.up(&leader).await;
    }
}

async fn create(client: &Client, path: &str, data: &str) {
    client
        .create(path, data.to_owned(), CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
}

/// A generator that needs no more than a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % bound
    }
}
