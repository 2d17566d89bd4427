//! The `unbroken` program: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    unbroken::main_from(std::env::args_os())
}
