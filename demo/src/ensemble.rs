//! An ensemble of Apache ZooKeeper servers on hosts of their own, in place of the coordinator that
//! the nodes have in them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use unbroken_tests::netns::{Host, Process};

/// Servers of an ensemble.
pub(crate) const SERVERS: u8 = 3;

/// Where Debian puts it; the package is `zookeeper`.
const JAR: &str = "/usr/share/java/zookeeper.jar";

/// What the server needs besides and the jar does not name.
const MORE_JARS: &str = "/usr/share/java/metrics-core.jar:/usr/share/java/snappy-java.jar";

/// How long the servers may take to elect a leader. They start in a second or two each.
const START_MAX: Duration = Duration::from_secs(60);

const CLIENT_PORT: u16 = 2181;

/// The servers; they end with their hosts.
#[derive(Debug)]
pub(crate) struct Ensemble {
    servers: Vec<(Ipv4Addr, Process)>,
}

impl Ensemble {
    /// Starts a server on each of `hosts`, with all it writes in `dir`, and waits until every one of
    /// them serves.
    pub(crate) fn start(hosts: &[&Host], dir: &Path) -> Result<Self> {
        if !Path::new(JAR).exists() {
            bail!("{JAR} is missing: --coordinator apache needs the package zookeeper");
        }
        let members: String = (1..)
            .zip(hosts)
            .map(|(id, host)| format!("server.{id}={}:2888:3888\n", host.address()))
            .collect();
        let mut servers = Vec::new();
        for (id, host) in (1..).zip(hosts) {
            let dir = dir.join(format!("zookeeper-{id}"));
            servers.push((host.address(), start_server(host, &dir, id, &members)?));
        }
        for ((address, server), host) in servers.iter_mut().zip(hosts) {
            let client = SocketAddr::from((*address, CLIENT_PORT));
            host.enter(|| server.wait_ready("serving", START_MAX, |_| serves(client)))?;
        }
        Ok(Self { servers })
    }

    /// A node's `external`: each node begins with another server.
    pub(crate) fn external(&self, node: usize) -> String {
        let count = self.servers.len();
        let servers: Vec<String> = (0..count)
            .map(|i| self.servers[(node + i) % count].0)
            .map(|address| format!("{address}:{CLIENT_PORT}"))
            .collect();
        format!("zk://{}", servers.join(","))
    }

    /// A server that has ended.
    pub(crate) fn fallen(&mut self) -> Option<String> {
        self.servers.iter_mut().find_map(|(_, server)| {
            let ended = !server.is_running();
            ended.then(|| format!("{} has ended by itself", server.label()))
        })
    }
}

fn start_server(host: &Host, dir: &Path, id: u8, members: &str) -> Result<Process> {
    let data = dir.join("data");
    fs::create_dir_all(&data)?;
    fs::write(data.join("myid"), id.to_string())?;
    let file = dir.join("zoo.cfg");
    // The tick is the default of its packages: sessions are granted from two of them on.
    fs::write(
        &file,
        format!(
            "tickTime=2000\ninitLimit=10\nsyncLimit=5\ndataDir={}\nclientPort={CLIENT_PORT}\n\
             admin.enableServer=false\n4lw.commands.whitelist=srvr\n{members}",
            data.display()
        ),
    )?;
    let mut command = Command::new("java");
    command
        .args(["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
        .arg("-Djava.awt.headless=true")
        .args(["-cp", &format!("{JAR}:{MORE_JARS}")])
        .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
        .arg(&file);
    let label = format!("ZooKeeper server {id}");
    Ok(host.spawn(&label, command, &dir.join("server.log"))?)
}

/// Whether a server has a quorum.
fn serves(server: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"srvr")?;
        let mut answer = String::new();
        stream.take(1 << 16).read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains("Mode: "))
}
