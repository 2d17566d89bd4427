//! Three real processes on real disks: killed in a loop under writes, and with one disk full.
//!
//! This program is its own server: with [`SERVE`] in its environment it runs one and nothing else.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::watch;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::driver::{self, ServerConfig};
use unbroken_coord::wire::{Acl, CreateMode};

/// Holds the name, the cluster's first three bytes of address, and the directory.
const SERVE: &str = "UNBROKEN_CRASH_SERVE";

const NAMES: [&str; 3] = ["a", "b", "c"];

/// Everything here is over long before.
const TOO_LONG: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> ExitCode {
    if let Ok(what) = std::env::var(SERVE) {
        return serve(&what).await;
    }
    // As the test runner's: those whose name has this in it.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let wanted = |name: &str| filter.as_ref().is_none_or(|filter| name.contains(filter));
    if wanted("nothing_acknowledged_is_lost_by_kill_9") {
        let test = nothing_acknowledged_is_lost_by_kill_9();
        tokio::time::timeout(TOO_LONG, test).await.expect("in time");
        println!("test nothing_acknowledged_is_lost_by_kill_9 ... ok");
    }
    if wanted("a_full_disk_stops_one_server_and_harms_nobody") {
        let test = a_full_disk_stops_one_server_and_harms_nobody();
        tokio::time::timeout(TOO_LONG, test).await.expect("in time");
        println!("test a_full_disk_stops_one_server_and_harms_nobody ... ok");
    }
    ExitCode::SUCCESS
}

fn address(net: [u8; 2], name: &str, port: u16) -> SocketAddr {
    let host = name.as_bytes()[0] - b'a' + 1;
    SocketAddr::from((Ipv4Addr::new(127, net[0], net[1], host), port))
}

/// One server, until it is killed or stops by itself.
async fn serve(what: &str) -> ExitCode {
    let mut parts = what.splitn(4, ' ');
    let mut next = || parts.next().expect("four parts");
    let name = next();
    let net = [0; 2].map(|_| next().parse().expect("a byte of an address"));
    let dir = PathBuf::from(next());
    let peers = NAMES.map(|name| (name.to_owned(), address(net, name, 2888)));
    let listen = address(net, name, 2181);
    let mut config = ServerConfig::new(name, listen, peers.into(), dir, [3; 32]);
    config.snapshot_every = 500;
    let error = match driver::start(config).await {
        Ok(server) => server.failed().await.to_string(),
        Err(error) => error.to_string(),
    };
    eprintln!("{error}");
    ExitCode::FAILURE
}

struct Cluster {
    net: [u8; 2],
    dir: PathBuf,
    running: BTreeMap<&'static str, Child>,
}

impl Cluster {
    fn new(test: u8) -> Self {
        // Each process that runs this has addresses of its own, so that its ports are free.
        let pid = std::process::id();
        let [_, _, high, low] = (pid.wrapping_mul(2) + u32::from(test)).to_be_bytes();
        let dir = std::env::temp_dir().join(format!("unbroken-crash-{pid}-{test}"));
        std::fs::create_dir_all(&dir).expect("a directory");
        Self {
            net: [high | 0x80, low],
            dir,
            running: BTreeMap::new(),
        }
    }

    /// Starts a server; on a file system of so many MiB in memory, if that is said.
    fn start(&mut self, name: &'static str, disk_mib: Option<u32>) {
        let exe = std::env::current_exe().expect("this program");
        let dir = self.dir.join(name);
        let mut command = match disk_mib {
            None => Command::new(exe),
            Some(mib) => {
                std::fs::create_dir_all(&dir).expect("a directory");
                let mut command = Command::new("unshare");
                command
                    .args(["-Urm", "sh", "-c"])
                    .arg(format!(
                        "mount -t tmpfs -o size={mib}m tmpfs \"$0\" && exec \"$1\""
                    ))
                    .args([dir.as_path(), exe.as_path()]);
                command
            }
        };
        let [first, second] = self.net;
        command.env(SERVE, format!("{name} {first} {second} {}", dir.display()));
        let child = command.stderr(Stdio::piped()).kill_on_drop(true).spawn();
        self.running.insert(name, child.expect("a process"));
    }

    /// `kill -9`.
    async fn kill(&mut self, name: &str) {
        let mut child = self.running.remove(name).expect("it runs");
        child.kill().await.expect("it ran");
    }

    async fn client(&self, names: &[&str]) -> Client {
        let hosts = names
            .iter()
            .map(|name| address(self.net, name, 2181).to_string());
        let mut options = ConnectOptions::new(hosts.collect::<Vec<_>>());
        options.session_timeout = Duration::from_secs(30);
        options.request_timeout = Some(Duration::from_secs(30));
        loop {
            if let Ok(client) = Client::connect(options.clone()).await {
                return client;
            }
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

fn remove(dir: &Path) {
    let _ = std::fs::remove_dir_all(dir);
}

/// Writes numbers to its znode, upwards, and tells which was acknowledged last. Which came to its end
/// without an answer may have been written or not.
async fn count(client: Client, path: String, acknowledged: watch::Sender<u64>) {
    for number in 1.. {
        if client.set(&path, number.to_string(), -1).await.is_ok() {
            acknowledged.send_replace(number);
        }
    }
}

async fn nothing_acknowledged_is_lost_by_kill_9() {
    const WRITERS: usize = 8;
    let mut cluster = Cluster::new(0);
    for name in NAMES {
        cluster.start(name, None);
    }
    let client = cluster.client(&NAMES).await;
    let mut acknowledged = Vec::new();
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let path = format!("/w{writer}");
        while client
            .create(&path, "0", CreateMode::Persistent, Acl::open())
            .await
            .is_err()
            && !matches!(client.exists(&path).await, Ok(Some(_)))
        {}
        let (sender, receiver) = watch::channel(0);
        acknowledged.push(receiver);
        writers.push(tokio::spawn(count(client.clone(), path, sender)));
    }
    for round in 0..12 {
        // Let some be acknowledged, by whoever leads now.
        for receiver in &mut acknowledged {
            let seen = *receiver.borrow_and_update();
            let more = receiver.wait_for(|number| *number >= seen + 5);
            more.await.expect("it counts");
        }
        let victims = match round % 4 {
            3 => NAMES.to_vec(),
            one => vec![NAMES[one]],
        };
        for name in &victims {
            cluster.kill(name).await;
        }
        let promised: Vec<u64> = acknowledged.iter().map(|number| *number.borrow()).collect();
        for name in victims {
            cluster.start(name, None);
        }
        // A server that was killed knows all of it when it is back.
        let back = cluster.client(&NAMES[round % 3..]).await;
        let mut synced = back.sync("/").await;
        while synced.is_err() {
            synced = back.sync("/").await;
        }
        for (writer, promised) in promised.iter().enumerate() {
            let path = format!("/w{writer}");
            let data = loop {
                if let Ok((data, _)) = back.get(&path).await {
                    break data;
                }
            };
            let found: u64 = std::str::from_utf8(&data).unwrap().parse().unwrap();
            assert!(
                found >= *promised,
                "{path} is {found}, and {promised} was acknowledged"
            );
        }
        let _ = back.close().await;
    }
    writers.iter().for_each(tokio::task::JoinHandle::abort);
}

async fn a_full_disk_stops_one_server_and_harms_nobody() {
    let mut cluster = Cluster::new(1);
    cluster.start("a", None);
    cluster.start("b", None);
    cluster.start("c", Some(3));
    let client = Arc::new(cluster.client(&["a", "b"]).await);
    client
        .create("/x", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let full = cluster.running.remove("c").expect("it runs");
    let mut stopped = tokio::spawn(full.wait_with_output());
    let mut version = 0;
    let output = loop {
        tokio::select! {
            output = &mut stopped => break output.unwrap().unwrap(),
            stat = client.set("/x", vec![7; 64 * 1024], version) => {
                version = stat.expect("the others go on").version;
                assert!(version < 10_000, "600 MiB do not fill 3 MiB");
            }
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the disk failed: cannot write"), "{said}");
    assert!(said.contains("No space left on device"), "{said}");
    // One may have been cut short by the other branch.
    for _ in 0..20 {
        client.set("/x", "on and on", -1).await.unwrap();
    }
}
