//! A quorum coordinator that speaks the ZooKeeper protocol.

pub mod wire;
