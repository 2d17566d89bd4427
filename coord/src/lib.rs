//! A quorum coordinator that speaks the ZooKeeper protocol.

pub mod client;
pub mod wire;
