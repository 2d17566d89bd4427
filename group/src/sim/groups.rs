//! The simulator of whole groups: processes with several groups each, on a network that loses, doubles and delays, through
//! crashes, pauses, partitions and an unreachable coordinator. One seed, one run.

mod acts;
mod invariants;
#[cfg(test)]
mod nonsense;
mod program;
#[cfg(test)]
mod tests;
mod twin;
mod world;

pub use self::world::{GroupReport, run_groups};
