//! `unbroken bench`: what a client pays for the virtual IP, against the same server reached directly.
//!
//! One run, rounds alternating between the targets, so that whatever else the machine does falls on
//! all of them alike. Ratios are taken within a round, and their median is what counts.

mod measure;
mod protocol;
mod report;
pub(super) mod server;
mod usage;

use std::io::{IsTerminal as _, Write as _};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;

use measure::{Limits, MEASUREMENTS, Measurement};
use report::Report;
use usage::{Process, Usage};

/// Measures the price of the virtual IP: round trips and bulk, direct and through it
///
/// Every replica runs `unbroken bench-server` as the service's server; --direct names one of these.
/// Rounds alternate between the targets. The run takes about rounds x targets x 5 x seconds. Every
/// byte that comes back is compared with what was sent.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    unbroken bench-server --listen 0.0.0.0:7003                 # on every replica\n  \
    unbroken bench --through 10.98.0.100:7003 --direct 10.98.0.12:7003\n  \
    unbroken bench --through 10.98.0.100:7003 --direct 10.98.0.12:7003 \\\n    \
      --also haproxy=10.98.0.20:7003 --rounds 7 --json")]
pub struct BenchArgs {
    /// The service's virtual IP and port
    #[arg(long, value_name = "HOST:PORT")]
    through: String,
    /// A server of the same kind, reached directly
    #[arg(long, value_name = "HOST:PORT")]
    direct: String,
    /// A further target of the same kind, to stand beside the two; may be repeated
    #[arg(long, value_name = "NAME=HOST:PORT")]
    also: Vec<String>,
    /// Rounds; each measures everything once on every target
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds that a single measurement takes
    #[arg(long, value_name = "S", default_value_t = 0.5)]
    seconds: f64,
    /// Bytes after which a bulk measurement goes on with a new connection, in MiB: the input of a
    /// connection that lives is kept by the replicas
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65536))]
    bulk_mib: u32,
    /// A process of this machine whose CPU time and wake-ups are shown, as used through the virtual
    /// IP; may be repeated
    #[arg(long, value_name = "NAME=PID")]
    process: Vec<String>,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

/// Number of the target that processes are charged for.
const THROUGH: usize = 1;

/// One thing to measure against.
#[derive(Debug, Clone)]
struct Target {
    name: String,
    address: SocketAddr,
}

pub(super) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        (0.01..=60.0).contains(&args.seconds),
        "--seconds {}: expected 0.01 to 60 seconds for a single measurement",
        args.seconds
    );
    let mut targets = vec![
        target("direct", &args.direct)?,
        target("through", &args.through)?,
    ];
    for also in &args.also {
        let (name, address) = also
            .split_once('=')
            .with_context(|| format!("--also {also}: expected NAME=HOST:PORT"))?;
        targets.push(target(name, address)?);
    }
    let processes = args
        .process
        .iter()
        .map(|process| Process::parse(process).with_context(|| format!("--process {process}")));
    let processes: Vec<Process> = processes.collect::<Result<_, _>>()?;
    let limits = Limits {
        duration: Duration::from_secs_f64(args.seconds),
        connection_bytes: u64::from(args.bulk_mib) << 20,
    };
    let mut report = Report::new(&targets, args.rounds, args.seconds);
    let progress = Progress::new(args.rounds);
    for round in 0..args.rounds {
        for measurement in MEASUREMENTS {
            for turn in 0..targets.len() {
                // The first of a round is another one each time: none is always the one that warms up.
                let index = (turn + usize::try_from(round)?) % targets.len();
                let target = &targets[index];
                progress.show(round, measurement, &target.name);
                let before = usages(&processes)?;
                let sample = measurement.run(target.address, limits).with_context(|| {
                    format!(
                        "{} on {} ({})",
                        measurement.title(),
                        target.name,
                        target.address
                    )
                })?;
                if index == THROUGH {
                    let used = usages(&processes)?.into_iter().zip(before);
                    for (process, (after, before)) in processes.iter().zip(used) {
                        report.charge(measurement, process, after - before, sample);
                    }
                }
                report.add(measurement, index, sample);
            }
        }
    }
    progress.clear();
    if args.json {
        println!("{}", serde_json::to_string(&report.to_json())?);
    } else {
        println!("{}", report.table());
    }
    Ok(ExitCode::SUCCESS)
}

fn usages(processes: &[Process]) -> anyhow::Result<Vec<Usage>> {
    processes.iter().map(Process::usage).collect()
}

fn target(name: &str, address: &str) -> anyhow::Result<Target> {
    let resolved = address
        .to_socket_addrs()
        .with_context(|| format!("{name} \"{address}\": expected HOST:PORT"))?
        .next()
        .with_context(|| format!("{name} \"{address}\" resolves to nothing"))?;
    Ok(Target {
        name: name.to_owned(),
        address: resolved,
    })
}

/// A line on the terminal that says how far the run is; nothing where standard error is no terminal.
struct Progress {
    rounds: u32,
    visible: bool,
}

impl Progress {
    fn new(rounds: u32) -> Self {
        Self {
            rounds,
            visible: std::io::stderr().is_terminal(),
        }
    }

    fn show(&self, round: u32, measurement: &Measurement, target: &str) {
        if self.visible {
            let mut stderr = std::io::stderr().lock();
            // Progress that cannot be shown is no reason to fail.
            let _ = write!(
                stderr,
                "\r\x1b[Kround {}/{}: {}, {target}",
                round + 1,
                self.rounds,
                measurement.title()
            );
            let _ = stderr.flush();
        }
    }

    fn clear(&self) {
        if self.visible {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests;
