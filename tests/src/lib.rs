//! Whole-system tests: their network of hosts, oracles and invariants.

pub mod client;
pub mod cluster;
pub mod disk;
pub mod netns;
pub mod pattern;
pub mod server;
pub mod traffic;
