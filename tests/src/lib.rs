//! Whole-system tests: their network of hosts, oracles and invariants.

pub mod netns;
