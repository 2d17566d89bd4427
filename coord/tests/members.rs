//! Real servers on loopback that come and go under a client's writes: three, four, five, without
//! the leader, with one whose disk was lost, killed in between.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use unbroken_coord::client::{Client, ClientError, ConnectOptions, Identity, Reconfig};
use unbroken_coord::driver::{self, Role, Server, ServerConfig, ServerError, operator_credentials};
use unbroken_coord::members::{Listed, listed};
use unbroken_coord::tree::CONFIG_PATH;
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode};

const KEY: [u8; 32] = [9; 32];

/// Servers by name; the directory goes with it.
struct Site {
    dir: PathBuf,
    net: u8,
    servers: BTreeMap<String, Server>,
}

impl Site {
    fn new(net: u8) -> Self {
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("unbroken-members-{pid}-{net}"));
        let servers = BTreeMap::new();
        Self { dir, net, servers }
    }

    /// Each test of each process has loopback addresses of its own.
    fn address(&self, name: &str, port: u16) -> SocketAddr {
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let last = self.net * 16 + name.as_bytes()[0] - b'a' + 1;
        SocketAddr::from((Ipv4Addr::new(127, high | 0x80, low, last), port))
    }

    fn config(&self, name: &str, peers: &str) -> ServerConfig {
        let peers = peers
            .split(' ')
            .map(|peer| (peer.to_owned(), self.address(peer, 2888)));
        let client = self.address(name, 2181);
        let mut config = ServerConfig::new(name, client, peers.collect(), self.dir.join(name), KEY);
        config.snapshot_every = 500;
        config
    }

    async fn up(&mut self, name: &str, peers: &str, join: bool) {
        let mut config = self.config(name, peers);
        config.join = join;
        // The address of one that was just dropped may be in use for a moment.
        let server = loop {
            match driver::start(config.clone()).await {
                Ok(server) => break server,
                Err(
                    driver::StartError::Listen { .. }
                    | driver::StartError::Disk(driver::DiskError::Locked { .. }),
                ) => tokio::task::yield_now().await,
                Err(error) => panic!("server {name}: {error}"),
            }
        };
        self.servers.insert(name.to_owned(), server);
    }

    fn kill(&mut self, name: &str) {
        drop(self.servers.remove(name).expect("it runs"));
    }

    async fn leader(&self) -> String {
        loop {
            let leads = |server: &&Server| server.status().role == Role::Leader;
            let found = self.servers.values().find(leads).map(Server::status);
            if let Some(status) = found {
                return status.name;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn client(&self, names: &str) -> Client {
        let hosts = names
            .split(' ')
            .map(|name| self.address(name, 2181).to_string());
        let mut options = ConnectOptions::new(hosts);
        options.session_timeout = Duration::from_secs(10);
        options.request_timeout = Some(Duration::from_secs(60));
        let (user, password) = operator_credentials(&KEY);
        options.identities.push(Identity::digest(&user, &password));
        Client::connect(options).await.expect("a session")
    }

    /// Repeats a change until it is made.
    async fn change(&self, admin: &Client, joining: Option<&str>, leaving: Option<&str>) {
        let line = |name: &str| {
            let (peer, client) = (self.address(name, 2888), self.address(name, 2181));
            format!("server.{name}={peer}:3888;{client}")
        };
        let change = Reconfig::Change {
            joining: joining.map(line).into_iter().collect(),
            leaving: leaving.map(str::to_owned).into_iter().collect(),
        };
        loop {
            match admin.reconfig(&change, -1).await {
                Ok(_) => return,
                Err(ClientError::Zk(
                    ErrorCode::ReconfigInProgress | ErrorCode::NewConfigNoQuorum,
                )) => tokio::task::yield_now().await,
                Err(ClientError::Zk(code)) => panic!("+{joining:?} -{leaving:?}: {code}"),
                Err(_) => {
                    let now = members(admin).await;
                    let is = |name: &str| now.iter().any(|member| member.name == name);
                    if joining.is_none_or(is) && !leaving.is_some_and(is) {
                        return;
                    }
                }
            }
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.servers.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn members(client: &Client) -> Vec<Listed> {
    loop {
        if client.sync(CONFIG_PATH).await.is_ok()
            && let Ok((text, _)) = client.get(CONFIG_PATH).await
        {
            return listed(&String::from_utf8_lossy(&text)).1;
        }
    }
}

/// Waits until exactly these vote; the watch tells of each change.
async fn until_voters(client: &Client, names: &str) {
    loop {
        let (text, _, changed) = client
            .get_and_watch(CONFIG_PATH)
            .await
            .expect("the znode is there");
        let (_, servers) = listed(&String::from_utf8_lossy(&text));
        let mut voters: Vec<&str> = servers
            .iter()
            .filter(|server| server.role == "participant")
            .map(|server| &*server.name)
            .collect();
        voters.sort_unstable();
        if voters.join(" ") == names {
            return;
        }
        let _ = tokio::time::timeout(Duration::from_millis(200), changed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_come_and_go_under_writes() {
    let mut site = Site::new(1);
    for name in ["a", "b", "c"] {
        site.up(name, "a b c", false).await;
    }
    let admin = site.client("a b c d e").await;
    until_voters(&admin, "a b c").await;

    // A writer whose every acknowledged write is looked for in the end.
    let writer = site.client("b c d e a").await;
    writer
        .create("/w", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut acknowledged = Vec::new();
            let mut next = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                next += 1;
                let path = format!("/w/{next}");
                let created = writer
                    .create(&path, "x", CreateMode::Persistent, Acl::open())
                    .await;
                match created {
                    Ok(_) => acknowledged.push(path),
                    Err(ClientError::Zk(code)) => panic!("{path}: {code}"),
                    Err(_) => {}
                }
            }
            acknowledged
        }
    });

    // Three become four: d waits until it is taken in, with or without its configuration saying so.
    site.up("d", "a b c d", true).await;
    site.change(&admin, Some("d"), None).await;
    until_voters(&admin, "a b c d").await;
    // Four become five: added before it runs, and the leader dies meanwhile.
    site.change(&admin, Some("e"), None).await;
    let leader = site.leader().await;
    site.kill(&leader);
    site.up("e", "a b c d e", false).await;
    site.up(&leader, "a b c", false).await;
    until_voters(&admin, "a b c d e").await;

    // The leader goes, and stops by itself.
    let leader = site.leader().await;
    site.change(&admin, None, Some(&leader)).await;
    let rest: Vec<&str> = ["a", "b", "c", "d", "e"]
        .into_iter()
        .filter(|name| **name != *leader)
        .collect();
    until_voters(&admin, &rest.join(" ")).await;
    let error = site.servers[&leader].failed().await;
    assert!(matches!(*error, ServerError::Removed), "{error}");
    site.kill(&leader);

    // One loses its disk: it is refused under its old id, and taken in as a new one.
    let lost = *rest
        .iter()
        .find(|name| !site.servers[**name].status().name.is_empty())
        .unwrap();
    site.kill(lost);
    std::fs::remove_dir_all(site.dir.join(lost)).unwrap();
    site.up(lost, "a b c d e", false).await;
    let error = site.servers[lost].failed().await;
    assert!(matches!(*error, ServerError::Forgotten { .. }), "{error}");
    site.kill(lost);
    site.change(&admin, None, Some(lost)).await;
    site.up(lost, "a b c d e", true).await;
    site.change(&admin, Some(lost), None).await;
    until_voters(&admin, &rest.join(" ")).await;

    stop.store(true, Ordering::Relaxed);
    let acknowledged = writing.await.unwrap();
    assert!(!acknowledged.is_empty());
    // The one that came last has them all, too.
    let reader = site.client(lost).await;
    reader.sync("/").await.unwrap();
    let there = reader.children("/w").await.unwrap();
    for path in &acknowledged {
        let name = path.trim_start_matches("/w/");
        assert!(there.iter().any(|child| child == name), "{path} is lost");
    }
    println!("{} writes, none lost", acknowledged.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_lost_majority_becomes_a_cluster_again() {
    let mut site = Site::new(2);
    for name in ["a", "b", "c"] {
        site.up(name, "a b c", false).await;
    }
    let client = site.client("a b c").await;
    client
        .create("/kept", "1", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    until_voters(&client, "a b c").await;
    let zxid = u64::try_from(client.get("/kept").await.unwrap().1.czxid).unwrap();
    let mut status = site.servers["a"].watch_status();
    status.wait_for(|status| status.zxid >= zxid).await.unwrap();
    drop(status);
    assert!(
        driver::recover(&site.dir.join("a"), "a").is_err(),
        "it runs"
    );
    drop(client);
    for name in ["a", "b", "c"] {
        let server = site.servers.remove(name).unwrap();
        server.shutdown().await;
    }
    assert!(
        driver::recover(&site.dir.join("x"), "x").is_err(),
        "nobody was there"
    );
    let survivor = driver::recover(&site.dir.join("a"), "a").unwrap();
    assert_eq!(
        (survivor.zxid >= zxid, survivor.others),
        (true, vec!["b".into(), "c".into()])
    );

    // One of the others lives after all: it is told to stop.
    site.up("a", "a b c", false).await;
    site.up("b", "a b c", false).await;
    let client = site.client("a").await;
    assert_eq!(&client.get("/kept").await.unwrap().0[..], b"1");
    let error = site.servers["b"].failed().await;
    assert!(matches!(*error, ServerError::Removed), "{error}");
    site.kill("b");
    std::fs::remove_dir_all(site.dir.join("b")).unwrap();
    site.up("b", "a b c", true).await;
    site.change(&client, Some("b"), None).await;
    until_voters(&client, "a b").await;
    client.set("/kept", "2", 0).await.unwrap();
}
