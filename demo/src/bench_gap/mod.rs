//! `unbroken-demo bench-gap`: what clients notice of the leader's faults, fault after fault, in one run.
//!
//! Each fault befalls the leader of a whole cluster of three under two clients of the kernel's, one of which receives at a
//! steady pace while the other asks; both compare every byte. Between the faults the same is measured without one, so that
//! what the machine itself makes clients wait can be seen.

mod crowd;
mod direct;
mod report;
mod watched;

use std::fmt;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use rustix::process::{Resource, Rlimit, Signal};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service, VIP};
use unbroken_tests::netns::userns;

use self::crowd::Crowd;
use self::direct::Pair;
use self::report::{Goals, Report};
use self::watched::Watched;
use crate::payload::mix;
use crate::scratch::Scratch;
use crate::screen::{clear, show};

/// Measures what clients notice of the leader's faults
///
/// Makes a client host and three replica hosts (network namespaces on one switch), and lets faults befall the leader again
/// and again under clients of the kernel's that compare every byte. A receiving client's figure is the longest silence less
/// the pace of what it receives (1 ms); an asking client's is the longest round trip. Exit status: 0 measured, whether goals
/// are met or missed; 1 a connection broke, a byte was wrong, or there was nothing to measure on; 64 wrong usage. Takes about
/// eight minutes, with --quick one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  unbroken-demo bench-gap --quick\n  \
                  unbroken-demo bench-gap --only kill,flood --faults 30\n  \
                  unbroken-demo bench-gap --only many --connections 2000\n  \
                  unbroken-demo bench-gap --json > figures.json")]
pub(crate) struct BenchGapArgs {
    /// Ten faults of each kind, for a first look
    #[arg(long)]
    quick: bool,
    /// Only these kinds
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KINDS")]
    only: Vec<Part>,
    /// How many faults of each kind; 100 by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    faults: Option<u64>,
    /// How many connections are taken over at once
    #[arg(long, value_name = "N", default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(2..=20_000))]
    connections: u32,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// SIGKILL of everything on the leader's host
    Kill,
    /// The same in the address mode `flood`
    Flood,
    /// The cable is pulled: the carrier is lost
    Cut,
    /// The switch passes nothing any more: the carrier stays
    Mute,
    /// SIGSTOP of the leader's node
    Stop,
    /// SIGKILL under thousands of connections
    Many,
    /// A server without us, and an address that is moved by hand
    Direct,
}

/// What befalls the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing: what the machine itself makes clients wait.
    None,
    Kill,
    Cut,
    Mute,
    Stop,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no fault",
            Self::Kill => "SIGKILL",
            Self::Cut => "cable cut",
            Self::Mute => "mute",
            Self::Stop => "SIGSTOP",
        })
    }
}

impl Fault {
    fn strike(self, cluster: &mut Cluster, leader: &str) -> Result<()> {
        match self {
            Self::None => {}
            Self::Kill => drop(cluster.lab().kill_host(leader)?),
            Self::Cut => cluster.lab().cut(leader)?,
            Self::Mute => cluster.lab().mute(leader)?,
            Self::Stop => cluster.node(leader).signal(Signal::STOP)?,
        }
        Ok(())
    }

    fn mend(self, cluster: &mut Cluster, victim: &str) -> Result<()> {
        match self {
            Self::None => {}
            Self::Kill => {
                cluster.kill(victim)?;
                cluster.start_replica(victim)?;
            }
            Self::Cut => cluster.lab().plug(victim)?,
            Self::Mute => cluster.lab().unmute(victim)?,
            Self::Stop => cluster.node(victim).signal(Signal::CONT)?,
        }
        Ok(())
    }

    /// Of a receiving and of an asking client.
    fn goals(self, flood: bool) -> [Goals; 2] {
        match self {
            Self::None => [&[], &[]],
            Self::Kill if flood => [&[("p50", 10.0), ("p99", 50.0)], &[("p99", 50.0)]],
            Self::Kill => [&[("p50", 10.0), ("p99", 50.0)], &[("max", 250.0)]],
            Self::Cut | Self::Mute | Self::Stop => [&[("p99", 150.0)], &[]],
        }
    }
}

/// How long clients are watched from a fault on, or without one.
const WINDOW: Duration = Duration::from_millis(300);
/// A client that has waited for less than this is no longer in a gap.
const MOVING_US: u64 = 10_000;
/// So often a client was served before anything befalls it.
const WARM: u64 = 30;
const PORT: u16 = 80;
const UPSTREAM: u16 = 7000;
/// How often clients are looked at.
const LOOK: Duration = Duration::from_millis(5);
const CROWD_GOALS: Goals = &[("max", 300.0)];

/// Runs the benchmark.
///
/// # Errors
/// There is no network of hosts, or what a client saw was wrong.
pub(crate) fn run(args: &BenchGapArgs) -> Result<ExitCode> {
    userns::reexec_in_user_namespace_if_needed()?;
    raise_limit()?;
    let faults = args.faults.unwrap_or(if args.quick { 10 } else { 100 });
    let scratch = Scratch::new()?;
    let mut bench = Bench {
        args,
        faults,
        program: std::env::current_exe().context("finding this program")?,
        report: Report::default(),
    };
    let outcome = bench.run(scratch.path());
    clear();
    outcome?;
    if args.json {
        println!("{}", serde_json::to_string(&bench.report.json())?);
    } else {
        print!("{}", bench.report.table());
    }
    Ok(ExitCode::SUCCESS)
}

/// Thousands of connections in one process want as many descriptors.
fn raise_limit() -> Result<()> {
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    rustix::process::setrlimit(Resource::Nofile, limit).context("raising the limit of open files")
}

struct Bench<'a> {
    args: &'a BenchGapArgs,
    faults: u64,
    program: std::path::PathBuf,
    report: Report,
}

impl Bench<'_> {
    fn wanted(&self, part: Part) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&part)
    }

    fn run(&mut self, scratch: &Path) -> Result<()> {
        let mut kinds = vec![Fault::None];
        for (part, fault) in [
            (Part::Kill, Fault::Kill),
            (Part::Cut, Fault::Cut),
            (Part::Mute, Fault::Mute),
            (Part::Stop, Fault::Stop),
        ] {
            if self.wanted(part) {
                kinds.push(fault);
            }
        }
        if kinds.len() > 1 {
            self.faults("garp", &kinds)?;
        }
        if self.wanted(Part::Flood) {
            self.faults("flood", &[Fault::None, Fault::Kill])?;
        }
        if self.wanted(Part::Many) {
            self.many()?;
        }
        if self.wanted(Part::Direct) {
            self.direct(scratch)?;
        }
        Ok(())
    }

    fn cluster(&self, address: &str) -> Result<Cluster> {
        let server = ["serve", "pulses", "--listen", "127.0.0.1:7000"].map(str::to_owned);
        let mut command = vec![self.program.display().to_string()];
        command.extend(server);
        let service = Service {
            name: "pulses".to_owned(),
            port: PORT,
            upstream: UPSTREAM,
            server: command,
            keys: format!("address = \"{address}\"\nhistory = {{ memory = \"1GiB\" }}"),
        };
        let mut options = Options::new(&self.program, [service]);
        options.arguments = vec!["unbroken".to_owned()];
        Cluster::start(options)
    }

    // ---- one receiving and one asking client -------------------------------------------------------------------

    /// The kinds take turns, so that whatever else the machine does falls on all of them.
    fn faults(&mut self, address: &str, kinds: &[Fault]) -> Result<()> {
        show(&format!("{address}: starting three replicas"));
        let mut cluster = self.cluster(address)?;
        for round in 0..self.faults {
            for kind in kinds {
                bar(&format!("{address}: {kind}"), round, self.faults);
                let gaps = self.fault(&mut cluster, *kind, round);
                let gaps = gaps.map_err(|error| told(error, &cluster))?;
                let clients = [("receive", "receiving"), ("ask", "asking")];
                let goals = kind.goals(address == "flood");
                for (((key, client), goals), gap_us) in clients.iter().zip(goals).zip(gaps) {
                    let title = format!("{address}, {kind}: {client} client");
                    let key = format!("{address}_{kind:?}_{key}").to_lowercase();
                    self.report.add(&key, &title, goals, gap_us);
                }
            }
        }
        Ok(())
    }

    /// The longest wait of the receiving and of the asking client.
    fn fault(&mut self, cluster: &mut Cluster, kind: Fault, round: u64) -> Result<[u64; 2]> {
        let (leader, _) = cluster.wait_whole()?;
        let (host, address) = (cluster.lab().host("c"), SocketAddr::from((VIP, PORT)));
        let clients = [
            Watched::receive(host, address, round)?,
            Watched::exchange(host, address, round)?,
        ];
        let all = |what: &dyn Fn(&Watched) -> bool| clients.iter().all(what);
        let wait = |limit: Duration, done: &dyn Fn() -> bool| {
            let from = Instant::now();
            // One that has ended says why at its end.
            while !done() && all(&Watched::runs) {
                if from.elapsed() > limit {
                    bail!("the clients do not move for {limit:?} ({kind}, round {round})");
                }
                thread::sleep(LOOK);
            }
            Ok(())
        };
        let moving = || all(&|client| client.open_us() < MOVING_US);
        wait(PATIENCE, &|| {
            all(&|client| client.moves() > WARM) && moving()
        })?;
        // Not always at the same moment after the clients began.
        thread::sleep(Duration::from_micros(mix(round) % 20_000));
        for client in &clients {
            client.take_us();
        }
        let from = Instant::now();
        kind.strike(cluster, &leader)?;
        wait(PATIENCE, &|| from.elapsed() >= WINDOW && moving())?;
        let gaps = clients.each_ref().map(Watched::take_us);
        for client in clients {
            client.end()?;
        }
        if kind != Fault::None {
            cluster.wait_other_leader(&leader)?;
            kind.mend(cluster, &leader)?;
        }
        Ok(gaps)
    }

    // ---- thousands of connections ------------------------------------------------------------------------------

    fn many(&mut self) -> Result<()> {
        let count = usize::try_from(self.args.connections).context("too many connections")?;
        show(&format!("{count} connections: starting three replicas"));
        let mut cluster = self.cluster("garp")?;
        let done = self.crowd(&mut cluster, count);
        done.map_err(|error| told(error, &cluster))
    }

    fn crowd(&mut self, cluster: &mut Cluster, count: usize) -> Result<()> {
        let rounds = (self.faults / 10).max(2);
        cluster.wait_whole()?;
        let crowd = Crowd::start(cluster.lab().host("c"), (VIP, PORT).into(), count)?;
        until(|| {
            let connected = crowd.connected()?;
            bar("connecting", connected as u64, count as u64);
            Ok(connected == count)
        })?;
        for round in 0..rounds {
            for kind in [Fault::None, Fault::Kill] {
                bar(&format!("{count} connections: {kind}"), round, rounds);
                let (leader, _) = cluster.wait_whole()?;
                crowd.mark();
                let from = Instant::now();
                kind.strike(cluster, &leader)?;
                until(|| {
                    crowd.connected()?;
                    Ok(crowd.moved() == count && from.elapsed() > WINDOW * 3)
                })?;
                self.add_crowd(kind, count, crowd.take());
                if kind != Fault::None {
                    cluster.wait_other_leader(&leader)?;
                    kind.mend(cluster, &leader)?;
                }
            }
        }
        crowd.end()
    }

    fn add_crowd(&mut self, kind: Fault, count: usize, waited: crowd::Waited) {
        let goals = if kind == Fault::None {
            &[]
        } else {
            CROWD_GOALS
        };
        let mut all = [&waited.receiving_us[..], &waited.asking_us].concat();
        all.sort_unstable();
        let last = |values: Vec<u64>| values.into_iter().max().unwrap_or_default();
        let half = all.get(all.len() / 2).copied().unwrap_or_default();
        for (key, title, goals, value) in [
            ("half", "half waited no longer than", &[][..], half),
            (
                "receive",
                "longest of all that receive",
                goals,
                last(waited.receiving_us),
            ),
            (
                "ask",
                "longest of all that ask",
                goals,
                last(waited.asking_us),
            ),
        ] {
            let key = format!("many_{kind:?}_{key}").to_lowercase();
            let title = format!("{count} at once, {kind}: {title}");
            self.report.add(&key, &title, goals, value);
        }
    }

    // ---- without us --------------------------------------------------------------------------------------------

    fn direct(&mut self, scratch: &Path) -> Result<()> {
        show("without us: starting two servers");
        let mut pair = Pair::start(&self.program, scratch)?;
        let rounds = (self.faults / 5).max(2);
        for round in 0..rounds {
            bar("without us", round, rounds);
            let broken = pair.kill(&self.program, scratch)?;
            let title = "without us, server killed: connection lost, until a new one";
            self.report.add("direct", title, &[], broken.gap_us);
        }
        self.report.note(
            "Without us: the address is moved by hand at the very moment of the death; what a detector takes comes on top.",
        );
        Ok(())
    }
}

/// Waits until something is so.
fn until(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let from = Instant::now();
    while !done()? {
        if from.elapsed() > PATIENCE {
            bail!("the connections do not all move for {PATIENCE:?}");
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// An error with what the nodes said last.
fn told(error: anyhow::Error, cluster: &Cluster) -> anyhow::Error {
    clear();
    eprintln!("{}", cluster.tails());
    error
}

/// How far a part has come, on a terminal.
fn bar(what: &str, done: u64, all: u64) {
    const WIDTH: u64 = 24;
    if !std::io::stderr().is_terminal() {
        return;
    }
    let filled = done * WIDTH / all.max(1);
    let bar: String = (0..WIDTH)
        .map(|i| if i < filled { '#' } else { '.' })
        .collect();
    show(&format!("[{bar}] {done}/{all} {what}"));
}
