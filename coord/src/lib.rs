//! A quorum coordinator that speaks the ZooKeeper protocol.
//!
//! A handful of servers keep one tree of small *znodes* alike: a majority of them has every change on
//! disk before it is answered, so that it survives whatever a minority may suffer. Clients (kazoo,
//! Curator, `zkCli`, or the asynchronous [`client`] here) keep a *session* with any one of them; what
//! they create may be *ephemeral* and goes with the session, and *watches* tell them of changes.
//!
//! ```text
//!   clients ── wire ──> driver::clients ─┐                      ┌─ driver::disk (log, snapshots)
//!                                        ├──> core::Core <──────┤
//!   servers ── Noise ─> driver::peers ───┘   (no I/O, no clock) └─ time
//!                                             │
//!                        quorum (raft) ── txn::State::apply ── tree, session, watch
//! ```
//!
//! The [core](core::Core) is a plain value: it is handed the time, frames, messages and the disk's
//! confirmations, and hands back what to do. The [`driver`] does it. So whole clusters run under a
//! virtual clock in the tests, and one seed is one run.
//!
//! # What is promised
//!
//! - Writes are linearizable; an acknowledged write is on disk at a majority.
//! - A session's requests are answered in their order. Reads are local and never go back in time;
//!   `sync` is a true barrier: reads after it show everything that was acknowledged anywhere before.
//! - A watch is told before its session can see the change by reading.
//! - A change of leader costs time, not connections: servers repeat what they passed on, and what comes
//!   twice is done once.
//! - A session ends by its client's word, or by its silence, which only the leader judges; with it go
//!   all its ephemeral znodes, in one step.
//!
//! # A server, and a client of it
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use unbroken_coord::client::{Client, ConnectOptions};
//! use unbroken_coord::driver::{self, ServerConfig};
//! use unbroken_coord::wire::{Acl, CreateMode};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let data_dir = std::env::temp_dir().join(format!("unbroken-coord-doc-{}", std::process::id()));
//! # let free = || std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
//! # let (peer_address, any) = (free()?, "127.0.0.1:0".parse()?);
//! let peers = BTreeMap::from([("a".to_owned(), peer_address)]);
//! let config = ServerConfig::new("a", any, peers, data_dir.clone(), [0; 32]);
//! let server = driver::start(config).await?;
//!
//! let options = ConnectOptions::new([server.client_address().to_string()]);
//! let client = Client::connect(options).await?;
//! client.create("/hello", "world", CreateMode::Persistent, Acl::open()).await?;
//! let (data, stat) = client.get("/hello").await?;
//! assert_eq!((&data[..], stat.version), (&b"world"[..], 0));
//! client.close().await?;
//! server.shutdown().await;
//! # std::fs::remove_dir_all(data_dir)?;
//! # Ok(())
//! # }
//! ```

/// `true` when the defect is planted; constant `false` in a build that cannot plant any.
macro_rules! planted {
    ($($fault:ident),+) => {{
        #[cfg(any(test, feature = "faults"))]
        {
            matches!($crate::faults::planted(), Some($($crate::faults::Fault::$fault)|+))
        }
        #[cfg(not(any(test, feature = "faults")))]
        {
            false
        }
    }};
}

pub mod acl;
pub mod client;
pub mod core;
pub mod driver;
#[cfg(any(test, feature = "faults"))]
pub mod faults;
pub mod members;
pub mod metrics;
pub mod quorum;
pub mod recipes;
mod rng;
pub mod session;
#[cfg(any(test, feature = "faults"))]
pub mod sim;
pub mod snapshot;
pub mod time;
pub mod tls;
pub mod tree;
pub mod txn;
mod watch;
pub mod wire;
