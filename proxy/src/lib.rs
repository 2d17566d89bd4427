//! The node: wire, address, data plane, roles, failover, command line.
//!
//! Everything the program does starts at [`main_from`], so that another program can be an
//! `unbroken` too by calling it with the arguments it was given.

use std::ffi::OsString;
use std::process::ExitCode;

pub mod admin;
pub mod cli;
pub mod clock;
pub mod config;
mod dataplane;
pub mod determinism;
mod fault;
pub mod groups;
mod health;
mod hooks;
pub mod metrics;
pub mod node;
pub mod operator;
mod registry;
pub mod status;
pub mod wire;

#[cfg(feature = "faults")]
pub use fault::Fault;

/// Runs the program with `args`, the program's own name first, and says how it ended: 0 done,
/// 1 failed, 64 wrong usage or configuration.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    cli::run(args)
}
