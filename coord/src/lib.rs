//! A quorum coordinator that speaks the ZooKeeper protocol.

pub mod acl;
pub mod client;
pub mod core;
pub mod driver;
pub mod quorum;
mod rng;
pub mod session;
pub mod snapshot;
pub mod time;
pub mod tree;
pub mod txn;
mod watch;
pub mod wire;
