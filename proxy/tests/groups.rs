//! Process groups over three real coordinators, ours and Apache ZooKeeper's: nodes come together, one dies, one of the
//! coordinators too.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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

/// Three nodes agree by the coordinators at `hosts`. In the middle one of these ends, and the node that leads the site.
async fn agree(
    hosts: Vec<String>,
    registry: fn(Client, Handle, &str) -> CoordinatorRegistry,
    end_one: impl Future<Output = ()>,
) {
    let members = free(&["r1", "r2", "r3"]);
    let mut nodes = Vec::new();
    for name in members.keys() {
        let options = ConnectOptions::new(hosts.clone()).session_timeout(Duration::from_secs(4));
        let client = soon("a session", Client::connect(options)).await.unwrap();
        let registry = registry(client, Handle::current(), "test");
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
    soon("one ends", end_one).await;
    drop(nodes.remove(0));
    let [first, second, third] = maps.try_into().ok().unwrap();
    let dead = first.group().me().clone();
    let departed = soon("it departs", second.group().monitor(&dead)).await;
    assert!(departed.is_some(), "seen by a member");
    soon("after both", second.set("k", "w"))
        .await
        .unwrap()
        .unwrap();
    let seen = third.until(|m| m.get(b"k").is_some_and(|v| v == "w"));
    soon("seen", seen).await.unwrap();
    let view = second.group().view().unwrap();
    assert_eq!(view.members.len(), 2);
    for node in nodes {
        soon("stop", node.stop()).await;
    }
}

fn addresses(servers: &BTreeMap<String, SocketAddr>) -> Vec<String> {
    servers.values().map(ToString::to_string).collect()
}

fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("unbroken-{name}-{}", std::process::id()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_agree_on_their_views_through_the_coordinator() {
    let dir = directory("groups");
    let peers = free(&["a", "b", "c"]);
    let clients = free(&["a", "b", "c"]);
    let mut servers: Vec<Server> = Vec::new();
    for name in peers.keys() {
        let config = ServerConfig::new(name, clients[name], peers.clone(), dir.join(name), [7; 32]);
        servers.push(driver::start(config).await.unwrap());
    }
    let one = servers.pop().unwrap();
    agree(
        addresses(&clients),
        CoordinatorRegistry::new,
        one.shutdown(),
    )
    .await;
    for server in servers {
        server.shutdown().await;
    }
    let _ = fs::remove_dir_all(&dir);
}

/// Apache ZooKeeper's server as a process; it ends with this.
struct ZooKeeper(Child);

impl Drop for ZooKeeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where Debian's packages put it and what it needs.
const JARS: [&str; 3] = [
    "/usr/share/java/zookeeper.jar",
    "/usr/share/java/snappy-java.jar",
    "/usr/share/java/metrics-core.jar",
];

impl ZooKeeper {
    fn start(dir: &Path, id: usize, client: SocketAddr, members: &str) -> Self {
        for jar in JARS {
            let there = Path::new(jar).exists();
            assert!(there, "{jar} is missing: install the package zookeeper");
        }
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("myid"), id.to_string()).unwrap();
        let config = format!(
            "tickTime=2000\ninitLimit=10\nsyncLimit=5\ndataDir={}\nclientPort={}\n\
             clientPortAddress=127.0.0.1\nadmin.enableServer=false\n{members}",
            dir.display(),
            client.port()
        );
        let file = dir.join("zoo.cfg");
        fs::write(&file, config).unwrap();
        let log = File::create(dir.join("log")).unwrap();
        let java = Command::new("java")
            .args(["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .args(["-Djava.awt.headless=true", "-cp", &JARS.join(":")])
            .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        Self(java.expect("java is missing: install the package default-jre-headless"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_agree_on_their_views_through_apache_zookeeper() {
    let dir = directory("groups-zookeeper");
    let names = ["1", "2", "3"];
    let (peers, elections, clients) = (free(&names), free(&names), free(&names));
    let members: String = names
        .iter()
        .map(|n| {
            let (peer, election) = (peers[*n].port(), elections[*n].port());
            format!("server.{n}=127.0.0.1:{peer}:{election}\n")
        })
        .collect();
    let mut servers: Vec<ZooKeeper> = (1..)
        .zip(names)
        .map(|(id, n)| ZooKeeper::start(&dir.join(n), id, clients[n], &members))
        .collect();
    // The largest id leads where all are new: that one is killed.
    let leader = servers.pop().unwrap();
    let kill = async { drop(leader) };
    agree(addresses(&clients), CoordinatorRegistry::external, kill).await;
    drop(servers);
    let _ = fs::remove_dir_all(&dir);
}
