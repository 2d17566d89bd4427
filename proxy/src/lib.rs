//! The node: wire, address, data plane, roles, failover, command line.

pub mod config;
pub mod metrics;
pub mod status;
pub mod wire;
