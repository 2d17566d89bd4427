//! The `unbroken` program, built beside the tests that start it.

use std::process::ExitCode;

fn main() -> ExitCode {
    unbroken::main_from(std::env::args_os())
}
