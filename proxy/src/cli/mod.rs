//! The command line: one file a command.
//!
//! Exit codes: 0 done, 1 failed, 64 wrong usage or configuration.

mod ask;
pub mod bench;
mod bench_coord;
pub mod check;
pub mod completions;
pub mod coord;
pub mod determinism;
pub mod handover;
pub mod keygen;
mod logging;
pub mod maintenance;
pub mod node;
mod shutdown;
pub mod status;
pub mod zk;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::ConfigErrors;

/// Wrong usage or configuration (sysexits.h: EX_USAGE).
pub const EXIT_USAGE: u8 = 64;

/// TCP connections that outlive the server that answers them.
#[derive(Debug, Parser)]
#[command(name = "unbroken", version, subcommand_required = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 64 wrong usage or configuration.\n\
    \n\
    Example:\n  \
      unbroken keygen > group.key            once, then copied to every node\n  \
      unbroken check -c /etc/unbroken/node.toml\n  \
      unbroken node -c /etc/unbroken/node.toml"
)]
struct Cli {
    #[command(flatten)]
    logging: logging::LoggingArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Node(node::NodeArgs),
    Coord(coord::CoordArgs),
    Check(check::CheckArgs),
    Keygen(keygen::KeygenArgs),
    Status(status::StatusArgs),
    Handover(handover::HandoverArgs),
    Maintenance(maintenance::MaintenanceArgs),
    Zk(zk::ZkArgs),
    Bench(bench::BenchArgs),
    Determinism(determinism::DeterminismArgs),
    Completions(completions::CompletionsArgs),
    BenchServer(bench::server::BenchServerArgs),
    BenchCoord(bench_coord::BenchCoordArgs),
}

/// Runs the program with `args`, the program's own name first.
pub(crate) fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and go to standard output. If that is closed,
            // nobody reads it.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let service = match &cli.command {
        Command::Node(_) => true,
        Command::Coord(args) => args.serves(),
        _ => false,
    };
    if let Err(error) = logging::init(&cli.logging, service) {
        eprintln!("unbroken: error: {error:#}");
        return ExitCode::from(EXIT_USAGE);
    }
    let result = match cli.command {
        Command::Node(args) => node::run(&args),
        Command::Coord(args) => coord::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Keygen(args) => keygen::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Handover(args) => handover::run(&args),
        Command::Maintenance(args) => maintenance::run(&args),
        Command::Zk(args) => zk::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Determinism(args) => determinism::run(&args),
        Command::Completions(args) => Ok(completions::run::<Cli>(&args)),
        Command::BenchServer(args) => bench::server::run(&args),
        Command::BenchCoord(args) => bench_coord::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<ConfigErrors>() {
            Some(errors) => {
                eprintln!("{errors}");
                ExitCode::from(EXIT_USAGE)
            }
            None => {
                eprintln!("unbroken: error: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Every command has help with an example.
    #[test]
    fn every_help_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        let mut seen = 0;
        for command in cli.get_subcommands_mut() {
            if command.get_name() == "help" {
                continue;
            }
            let help = command.render_long_help().to_string();
            assert!(
                help.contains("Example"),
                "{} --help has no example:\n{help}",
                command.get_name()
            );
            seen += 1;
        }
        assert!(seen >= 5);
    }
}
