//! Process groups over three real coordinators: nodes come together, one dies, one of the coordinators too.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::timeout;
use unbroken::groups::CoordinatorRegistry;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::driver::{self, Server, ServerConfig};
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::tools::{Map, Replicated};

fn free(names: &[&str]) -> BTreeMap<String, SocketAddr> {
    let held: Vec<TcpListener> = names
        .iter()
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let addresses = held.iter().map(|l| l.local_addr().unwrap());
    names
        .iter()
        .map(|n| (*n).to_owned())
        .zip(addresses)
        .collect()
}

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(Duration::from_secs(60), f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

async fn join(node: &Node) -> Replicated<Map> {
    let (map, work) = soon("join", Replicated::join(node, "map")).await.unwrap();
    tokio::spawn(work);
    soon("the state", map.until(|_| true)).await.unwrap();
    map
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_agree_on_their_views_through_the_coordinator() {
    let dir = std::env::temp_dir().join(format!("unbroken-groups-{}", std::process::id()));
    let peers = free(&["a", "b", "c"]);
    let clients = free(&["a", "b", "c"]);
    let mut servers: Vec<Server> = Vec::new();
    for name in peers.keys() {
        let config = ServerConfig::new(name, clients[name], peers.clone(), dir.join(name), [7; 32]);
        servers.push(driver::start(config).await.unwrap());
    }
    let hosts: Vec<String> = clients.values().map(ToString::to_string).collect();
    let members = free(&["r1", "r2", "r3"]);
    let mut nodes = Vec::new();
    for name in members.keys() {
        let options = ConnectOptions::new(hosts.clone()).session_timeout(Duration::from_secs(4));
        let client = soon("a session", Client::connect(options)).await.unwrap();
        let registry = CoordinatorRegistry::new(client, Handle::current(), "test");
        let mut config = NodeConfig::new(name, members.clone(), [9; 32]);
        config.suspect_after = Duration::from_secs(2);
        config.lease = Duration::from_secs(1);
        nodes.push(Node::start(config, registry).unwrap());
    }
    let mut maps = Vec::new();
    for node in &nodes {
        maps.push(join(node).await);
    }
    maps[0].set("k", "v").await.unwrap();
    // A coordinator ends, and the node that leads the site.
    servers.pop().unwrap().shutdown().await;
    drop(nodes.remove(0));
    let [_, second, third] = maps.try_into().ok().unwrap();
    soon("after both", second.set("k", "w"))
        .await
        .unwrap()
        .unwrap();
    let seen = third.until(|m| m.get(b"k").is_some_and(|v| v == "w"));
    soon("seen", seen).await.unwrap();
    let view = third.group().view().unwrap();
    assert_eq!(view.members.len(), 2);
    for node in nodes {
        soon("stop", node.stop()).await;
    }
    for server in servers {
        server.shutdown().await;
    }
    let _ = std::fs::remove_dir_all(&dir);
}
