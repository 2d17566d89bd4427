//! The one-command demonstration: live TCP connections survive the deaths of the servers that answer
//! them.
//!
//! The program is all its parts: with `unbroken` as its first argument it is the node, with `serve` and
//! `client` it is one of the small servers and clients that run on the hosts, otherwise it is the
//! stage: it makes the hosts, starts the parts, breaks things, and reports.

mod args;
mod bench_gap;
mod bench_group;
mod client;
mod cluster;
mod drill;
mod ensemble;
mod pace;
mod payload;
mod picture;
mod pulse;
mod report;
mod scratch;
mod screen;
mod series;
mod serve;
mod stage;
mod stats;
mod traffic;

use std::io;
use std::net::TcpListener;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Client, Part, Serve};

/// Wrong usage (sysexits.h: EX_USAGE).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.nth(1).is_some_and(|word| word == "unbroken") {
        return unbroken::main_from(std::env::args_os().skip(1));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors, and go to standard output.
            let _ = error.print();
            let usage = error.use_stderr();
            return if usage {
                ExitCode::from(EXIT_USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match cli.part {
        Some(Part::Serve(server)) => match serve(server) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.into()),
        },
        Some(Part::Client(Client::Get { connect, path })) => match client::get(connect, &path) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Some(Part::Client(other)) => {
            if client::report(&run_client(&other)) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Some(Part::BenchGroup(args)) => {
            bench_group::run(&args).unwrap_or_else(|error| fail(&error))
        }
        Some(Part::BenchGap(args)) => bench_gap::run(&args).unwrap_or_else(|error| fail(&error)),
        Some(Part::GroupMember { name }) => {
            bench_group::member(&name).unwrap_or_else(|error| fail(&error))
        }
        None => stage::run(&cli.drill).unwrap_or_else(|error| fail(&error)),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("unbroken-demo: error: {error:#}");
    ExitCode::FAILURE
}

fn serve(server: Serve) -> io::Result<()> {
    match server {
        Serve::Files { listen, root } => {
            let listener = TcpListener::bind(listen)?;
            serve::run(&listener, move |stream| serve::files(&root, stream))
        }
        Serve::Exchange { listen } => serve::run(&TcpListener::bind(listen)?, serve::exchange),
        Serve::Upload { listen } => serve::run(&TcpListener::bind(listen)?, serve::upload),
        Serve::Pulses { listen } => pulse::serve(listen),
    }
}

fn run_client(client: &Client) -> anyhow::Result<String> {
    match client {
        Client::Get { connect, path } => client::get(*connect, path).map(|()| String::new()),
        Client::Exchange { connect, seed } => {
            client::exchange(*connect, &client::end_of_input(), *seed)
        }
        Client::Upload {
            connect,
            seed,
            bytes,
            rate,
        } => client::upload(*connect, *seed, *bytes, *rate),
        Client::Talk {
            connect,
            request,
            response,
        } => client::talk(*connect, &client::end_of_input(), &request.0, &response.0),
        Client::Echo { connect } => client::echo(*connect, &client::end_of_input()),
    }
}
