//! `unbroken-demo bench-group`: the group toolkit beside bare UDP and iperf3, in one run.
//!
//! Every member is a process on a host of its own (a network namespace), and the nodes agree by three coordinators that
//! sync every write to the disk. Rounds alternate between ours and the peer, so that whatever else the machine does
//! falls on both; a ratio is taken within each round.

mod iperf;
mod link;
mod measure;
pub(crate) mod member;
mod report;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use unbroken_tests::netns::{Lab, LabOptions, Process, userns};

use self::link::Link;
use self::measure::Bench;
use self::member::{Ask, Settings};
use crate::scratch::Scratch;
use crate::screen::{clear, show};

/// Measures the group toolkit: latency, rates, view changes, many groups
///
/// Makes five hosts (network namespaces on one switch), a process of the toolkit on each, and three coordinators with
/// their logs on the disk. Peers: a bare UDP ping-pong and iperf3 (Debian: apt-get install iperf3) between the same
/// hosts. Takes about two minutes, with --quick half of one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  unbroken-demo bench-group --quick\n  \
                  unbroken-demo bench-group --only latency --spin-us 50\n  \
                  unbroken-demo bench-group --json > figures.json")]
pub(crate) struct BenchGroupArgs {
    /// Fewer and shorter rounds, for a first look
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PARTS")]
    only: Vec<Part>,
    /// Nodes look at their sockets for so long before they sleep, in microseconds; the ping-pong then spins too
    #[arg(long, value_name = "US", default_value_t = 0)]
    spin_us: u64,
    /// Where the two processes run whose latency is measured
    #[arg(long, value_enum, default_value_t = Cores::Apart)]
    cores: Cores,
    /// Silence after which a node is suspected, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(10..=10_000))]
    suspect_after_ms: u64,
    /// Folder for the coordinators' logs, removed at the end; on the disk that is to be measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One way and until stable, beside a UDP ping-pong
    Latency,
    /// Messages and bytes a second, beside iperf3
    Rate,
    /// A member joins, leaves, is killed
    Views,
    /// A thousand groups in one process
    Many,
}

/// Which cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cores {
    /// Each process on a core of its own
    Apart,
    /// All on one core
    Same,
    /// Wherever the kernel likes
    Any,
}

/// How long and how often.
struct Extent {
    rounds: usize,
    pings: u32,
    flood_ms: u64,
    changes: usize,
    groups: usize,
}

/// Members, each on its own host.
const MEMBERS: u8 = 5;
const COORDINATORS: u8 = 3;
const GROUP_PORT: u16 = 7400;

/// A member's process, started by the stage.
///
/// # Errors
/// Its input or output failed.
pub(crate) fn member(name: &str) -> Result<ExitCode> {
    tracing_to_stderr();
    member::run(name)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the benchmark.
///
/// # Errors
/// There is no network of hosts, or a part of it failed.
pub(crate) fn run(args: &BenchGroupArgs) -> Result<ExitCode> {
    userns::reexec_in_user_namespace_if_needed()?;
    let extent = if args.quick {
        Extent {
            rounds: 3,
            pings: 1000,
            flood_ms: 500,
            changes: 5,
            groups: 1000,
        }
    } else {
        Extent {
            rounds: 5,
            pings: 5000,
            flood_ms: 1500,
            changes: 15,
            groups: 1000,
        }
    };
    let mut scratch = Scratch::new()?;
    let outcome = stage(args, &extent, &scratch);
    clear();
    match outcome {
        Ok(report) => {
            if args.json {
                println!("{}", serde_json::to_string(&report.json())?);
            } else {
                print!("{}", report.table());
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            scratch.keep_logs(&format!("{error:#}"));
            Err(error.context(format!("the logs are in {}", scratch.path().display())))
        }
    }
}

fn stage(args: &BenchGroupArgs, extent: &Extent, scratch: &Scratch) -> Result<report::Report> {
    let lab = Lab::new(LabOptions { replicas: MEMBERS })?;
    let program = std::env::current_exe().context("finding this program")?;
    let data = match &args.dir {
        Some(dir) => dir.join(format!("unbroken-bench-group-{}", std::process::id())),
        None => scratch.path().join("coordinators"),
    };
    fs::create_dir_all(&data).with_context(|| format!("making {}", data.display()))?;
    show("starting three coordinators and five members");
    let coordinators = start_coordinators(&lab, &program, &data)?;
    let mut links = Vec::new();
    let mut members = BTreeMap::new();
    for i in 1..=MEMBERS {
        let host = lab.host(&format!("r{i}"));
        let log = scratch.path().join(format!("r{i}.log"));
        members.insert(
            host.name().to_owned(),
            SocketAddr::from((host.address(), GROUP_PORT)),
        );
        links.push(Link::start(host, &program, &log)?);
    }
    let start = Ask::Start {
        members: members.clone(),
        coordinators: coordinators.addresses.clone(),
        settings: Settings {
            suspect_after_ms: args.suspect_after_ms,
            spin_us: args.spin_us,
        },
    };
    for link in &mut links {
        link.done(&start)?;
    }
    let mut bench = Bench {
        lab: &lab,
        links,
        members,
        start,
        extent,
        spin: args.spin_us > 0,
        cores: args.cores,
        suspect_after_ms: args.suspect_after_ms,
        report: report::Report::default(),
    };
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    if wanted(Part::Latency) {
        bench.latency()?;
    }
    if wanted(Part::Rate) {
        bench.rates()?;
    }
    if wanted(Part::Many) {
        bench.many()?;
    }
    // Last: a process is killed there.
    if wanted(Part::Views) {
        bench.views()?;
    }
    if rustix::fs::statfs(&data)?.f_type == TMPFS_MAGIC {
        bench
            .report
            .note("the coordinators' logs were in memory: --dir names a disk");
    }
    let report = std::mem::take(&mut bench.report);
    drop(bench);
    drop(coordinators);
    if args.dir.is_some() {
        let _ = fs::remove_dir_all(&data);
    }
    Ok(report)
}

const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// The coordinators; killed when dropped.
struct Coordinators {
    addresses: Vec<String>,
    _processes: Vec<Process>,
}

fn start_coordinators(
    lab: &Lab,
    program: &std::path::Path,
    data: &std::path::Path,
) -> Result<Coordinators> {
    let key = data.join("key");
    fs::write(&key, unbroken::cli::keygen::generate()?)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let hosts: Vec<_> = (1..=COORDINATORS)
        .map(|i| lab.host(&format!("r{i}")))
        .collect();
    let peers: Vec<String> = hosts
        .iter()
        .map(|host| format!("{} = \"{}:2888\"", host.name(), host.address()))
        .collect();
    let mut addresses = Vec::new();
    let mut processes = Vec::new();
    for host in hosts {
        let (name, address) = (host.name(), host.address());
        let config = format!(
            "[node]\nname = \"{name}\"\ndata_dir = {:?}\nkey_file = {key:?}\n\
             [coord]\nclient = \"{address}:2181\"\npeers = {{ {} }}\n",
            data.join(name),
            peers.join(", "),
        );
        let file = data.join(format!("{name}.toml"));
        fs::write(&file, config)?;
        let mut command = Command::new(program);
        command.args(["unbroken", "coord", "-c"]).arg(&file);
        let log = data.join(format!("{name}.log"));
        processes.push(host.spawn("coordinator", command, &log)?);
        addresses.push(format!("{address}:2181"));
    }
    Ok(Coordinators {
        addresses,
        _processes: processes,
    })
}

fn tracing_to_stderr() {
    // Whoever wants the nodes' logs reads the members' files.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .try_init();
}

/// Long enough for anything that takes milliseconds.
const LONG: Duration = Duration::from_secs(60);
