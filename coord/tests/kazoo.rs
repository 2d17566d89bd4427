//! kazoo, the ZooKeeper client of the Python world, unchanged, against three servers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::Command;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::driver::{self, Server, ServerConfig};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kazoo_recipes.py");

/// Three servers on loopback addresses of their own; clients find a free port there.
async fn start_cluster(data: &std::path::Path) -> Vec<Server> {
    // Every 127.x.y.z is ours, so that no port has to be guessed: x and y are the process's.
    let [.., x, y] = std::process::id().to_be_bytes();
    let address = |i: u8, port| SocketAddr::from((Ipv4Addr::new(127, x, y, i), port));
    let peers: BTreeMap<String, SocketAddr> = (1..=3)
        .map(|i| (format!("c{i}"), address(i, 2888)))
        .collect();
    let mut servers = Vec::new();
    for i in 1..=3 {
        let name = format!("c{i}");
        let data_dir = data.join(&name);
        std::fs::create_dir_all(&data_dir).expect("a folder of the test's own");
        let config = ServerConfig::new(&name, address(i, 0), peers.clone(), data_dir, [7; 32]);
        servers.push(driver::start(config).await.expect("a server starts"));
    }
    servers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kazoo_lock_and_election_and_what_they_stand_on() {
    let data =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kazoo-{}", std::process::id()));
    let servers = start_cluster(&data).await;
    let hosts: Vec<String> = servers
        .iter()
        .map(|server| server.client_address().to_string())
        .collect();
    // Waits until there is a quorum.
    Client::connect(ConnectOptions::new(hosts.clone()))
        .await
        .unwrap()
        .close()
        .await
        .unwrap();

    let output = Command::new("python3")
        .arg(SCRIPT)
        .arg(hosts.join(","))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("python3 is needed for this test");
    let (said, complained) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_ne!(
        output.status.code(),
        Some(2),
        "install the Python package kazoo: {complained}"
    );
    assert!(
        output.status.success() && said.ends_with("PASS\n"),
        "{said}\n{complained}"
    );

    for server in servers {
        server.shutdown().await;
    }
    std::fs::remove_dir_all(&data).unwrap();
}
