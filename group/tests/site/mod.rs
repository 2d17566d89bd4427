//! A few nodes on loopback with a coordinator in memory.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use unbroken_group::driver::DriverError;
use unbroken_group::node::{Node, NodeConfig, StartError};
use unbroken_group::registry::MemoryRegistry;

/// Nothing that a test waits for takes as long.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Site {
    pub(crate) members: BTreeMap<String, SocketAddr>,
    pub(crate) registry: MemoryRegistry,
}

impl Site {
    pub(crate) fn new(count: usize) -> Self {
        let free: Vec<_> = (0..count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let addresses = free.iter().map(|l| l.local_addr().unwrap());
        Self {
            members: (1..).map(|i| format!("r{i}")).zip(addresses).collect(),
            registry: MemoryRegistry::default(),
        }
    }

    pub(crate) fn config(&self, i: usize) -> NodeConfig {
        let mut config = NodeConfig::new(&format!("r{i}"), self.members.clone(), [7; 32]);
        // A loaded machine stops threads for a while.
        config.suspect_after = Duration::from_secs(2);
        config.lease = Duration::from_secs(1);
        config
    }

    pub(crate) fn start(&self, i: usize) -> Node {
        let began = std::time::Instant::now();
        loop {
            // The address of one that was just dropped is in use until its thread has ended.
            match Node::start(self.config(i), self.registry.clone()) {
                Err(StartError::Driver(DriverError::Listen { .. })) if began.elapsed() < LONG => {
                    std::thread::yield_now();
                }
                started => return started.unwrap(),
            }
        }
    }
}
