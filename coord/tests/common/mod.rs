//! A cluster of real servers on loopback, with their logs in a temporary directory.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::driver::{self, Role, Server, ServerConfig};

/// Servers a, b, c; each may be down. Everything goes when it is dropped.
pub(crate) struct Cluster {
    pub(crate) servers: BTreeMap<String, Option<Server>>,
    configs: BTreeMap<String, ServerConfig>,
    dir: PathBuf,
}

impl Cluster {
    /// Starts three servers with empty disks. `change` may alter their configurations.
    pub(crate) async fn start(change: impl Fn(&mut ServerConfig)) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let test = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("unbroken-coord-{pid}-{test}"));
        // Each test of each process has loopback addresses of its own, so that its ports are free.
        let [_, _, high, low] = pid.to_be_bytes();
        let address = |server: usize, port| {
            let last = test * 4 + u8::try_from(server).expect("three");
            SocketAddr::from((Ipv4Addr::new(127, high | 0x80, low, last), port))
        };
        let names = ["a", "b", "c"];
        let peers: BTreeMap<String, SocketAddr> = names
            .iter()
            .enumerate()
            .map(|(i, name)| ((*name).into(), address(i, 2888)))
            .collect();
        let mut cluster = Self {
            servers: BTreeMap::new(),
            configs: BTreeMap::new(),
            dir,
        };
        for (i, name) in names.iter().enumerate() {
            let mut config = ServerConfig::new(
                name,
                address(i, 2181),
                peers.clone(),
                cluster.dir.join(name),
                [7; 32],
            );
            change(&mut config);
            cluster.configs.insert((*name).into(), config);
            cluster.servers.insert((*name).into(), None);
        }
        for name in names {
            cluster.up(name).await;
        }
        cluster
    }

    /// Starts a server that is down, with the disk it left.
    pub(crate) async fn up(&mut self, name: &str) {
        // The address of one that was just dropped may be in use for a moment.
        loop {
            match driver::start(self.configs[name].clone()).await {
                Ok(server) => {
                    self.servers.insert(name.into(), Some(server));
                    return;
                }
                Err(
                    driver::StartError::Listen { .. }
                    | driver::StartError::Disk(driver::DiskError::Locked { .. }),
                ) => {
                    tokio::task::yield_now().await;
                }
                Err(error) => panic!("server {name}: {error}"),
            }
        }
    }

    /// Ends a server without a goodbye.
    pub(crate) fn kill(&mut self, name: &str) {
        drop(
            self.servers
                .get_mut(name)
                .expect("a, b or c")
                .take()
                .expect("it runs"),
        );
    }

    /// Ends a server and waits until nothing of it is left.
    pub(crate) async fn stop(&mut self, name: &str) {
        let server = self.servers.get_mut(name).expect("a, b or c").take();
        server.expect("it runs").shutdown().await;
    }

    /// Throws away the disk of a server that is down.
    pub(crate) fn wipe(&self, name: &str) {
        let dir = &self.configs[name].data_dir;
        std::fs::remove_dir_all(dir).expect("it was there");
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = (&str, &Server)> {
        self.servers
            .iter()
            .filter_map(|(name, server)| Some((name.as_str(), server.as_ref()?)))
    }

    /// Waits until one of the running servers leads, and names it.
    pub(crate) async fn leader(&self) -> String {
        loop {
            for (name, server) in self.running() {
                if server.status().role == Role::Leader {
                    return name.to_owned();
                }
            }
            let mut watches: Vec<_> = self.running().map(|(_, s)| s.watch_status()).collect();
            let waits = watches.iter_mut().map(|watch| Box::pin(watch.changed()));
            select_any(waits.collect()).await;
        }
    }

    /// Client addresses, that of `first` at the front.
    pub(crate) fn hosts(&self, first: &str) -> Vec<String> {
        let mut names: Vec<&String> = self.configs.keys().collect();
        names.sort_by_key(|name| *name != first);
        names
            .iter()
            .map(|name| self.configs[*name].client_listen.to_string())
            .collect()
    }

    /// A client that prefers server `first`.
    pub(crate) async fn client(&self, first: &str, timeout_ms: u64) -> Client {
        let mut options = ConnectOptions::new(self.hosts(first));
        options.session_timeout = std::time::Duration::from_millis(timeout_ms);
        options.request_timeout = Some(std::time::Duration::from_secs(20));
        Client::connect(options).await.expect("a session")
    }
}

async fn select_any<F: Future + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|cx| {
        for future in &mut futures {
            if std::pin::Pin::new(future).poll(cx).is_ready() {
                return std::task::Poll::Ready(());
            }
        }
        std::task::Poll::Pending
    })
    .await;
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in self.servers.values_mut() {
            drop(server.take());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
