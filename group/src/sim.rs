//! The simulator: several members, a network, a coordinator and a model application, all from one seed.
//!
//! Faults first, judged by the invariants; then everything is healed and the group must come together again. One seed is
//! one run, byte for byte: [`run`] gives a fingerprint of its trace.

mod app;
mod control;
mod groups;
mod invariants;
mod judge;
mod network;
mod plan;
mod processes;
mod registry;
mod twin;
mod world;

#[cfg(test)]
mod tests;

pub use self::groups::{GroupReport, run_groups};
pub use self::plan::Options;
pub use self::world::{Outcome, Report, run};
