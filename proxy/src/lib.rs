//! The node: wire, address, data plane, roles, failover, command line.

pub mod config;
