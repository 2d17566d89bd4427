//! `unbroken bench-coord`: the coordinator beside Apache ZooKeeper, in one run.
//!
//! Both ensembles run at the same time with their own disks' worth of files, and rounds alternate
//! between them, so that whatever else the machine does falls on both alike. All servers sync every
//! write to the disk. The figures are medians of the rounds.

mod ensemble;
mod faults;
mod link;
mod load;
mod report;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use rustix::process::Signal;

use ensemble::{Ensemble, Kind, find_zookeeper};
use load::{Work, load};
use report::{Better, Figure, Report};

/// Measures the coordinator beside Apache ZooKeeper: speed, memory, fail-over and expiry
///
/// Starts three servers of each on this machine, every write synced to the disk, and loads them in
/// turn. Without Apache ZooKeeper (Debian: apt-get install zookeeper default-jre-headless) only ours
/// are measured. Takes about three minutes, with --quick one.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  unbroken bench-coord --quick\n  unbroken bench-coord --json > figures.json"
)]
pub(super) struct BenchCoordArgs {
    /// Fewer and shorter rounds, for a first look
    #[arg(long)]
    quick: bool,
    /// Do not measure Apache ZooKeeper
    #[arg(long)]
    alone: bool,
    /// Folder for the servers' files, removed at the end; on the disk that is to be measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print everything as one JSON object
    #[arg(long)]
    json: bool,
}

const fn figure(
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    better: Better,
) -> Figure {
    Figure {
        key,
        title,
        unit,
        better,
    }
}

/// A load: figures, work, connections, outstanding, and whether only one server is asked.
struct Load {
    rate: Figure,
    p50: Figure,
    p99: Figure,
    work: Work,
    connections: usize,
    outstanding: usize,
    one_server: bool,
}

const fn more(key: &'static str, title: &'static str) -> Figure {
    figure(key, title, "1/s", Better::More)
}

const fn less(key: &'static str, title: &'static str) -> Figure {
    figure(key, title, "ms", Better::Less)
}

const LOADS: [Load; 5] = [
    Load {
        rate: more("write_1_rate", "writes, one at a time"),
        p50: less("write_1_p50", "  p50"),
        p99: less("write_1_p99", "  p99"),
        work: Work::Set,
        connections: 1,
        outstanding: 1,
        one_server: true,
    },
    Load {
        rate: more("write_256_rate", "writes, 256 outstanding"),
        p50: less("write_256_p50", "  p50"),
        p99: less("write_256_p99", "  p99"),
        work: Work::Set,
        connections: 3,
        outstanding: 256,
        one_server: false,
    },
    Load {
        rate: more("write_1000_rate", "writes, 1000 outstanding"),
        p50: less("write_1000_p50", "  p50"),
        p99: less("write_1000_p99", "  p99"),
        work: Work::Set,
        connections: 3,
        outstanding: 1000,
        one_server: false,
    },
    Load {
        rate: more("read_1_rate", "reads, one at a time"),
        p50: less("read_1_p50", "  p50"),
        p99: less("read_1_p99", "  p99"),
        work: Work::Get,
        connections: 1,
        outstanding: 1,
        one_server: true,
    },
    Load {
        rate: more("read_240_rate", "reads, 240 outstanding on 60 connections"),
        p50: less("read_240_p50", "  p50"),
        p99: less("read_240_p99", "  p99"),
        work: Work::Get,
        connections: 60,
        outstanding: 240,
        one_server: false,
    },
];

const FAN_OUT: Figure = less("watch_1000", "change to the last of 1000 watchers");
const START: Figure = less("start", "start of three servers, to the first write");
const RESTART: Figure = less("restart", "restart of one server, to its first sync");
const RESIDENT: Figure = figure(
    "resident",
    "resident memory after load",
    "MiB",
    Better::Less,
);
const KILL: Figure = less("kill", "leader kill -9, longest gap in writes");
const STOP: Figure = less("stop", "leader SIGSTOP, longest gap in writes");
const GRANTED: Figure = figure(
    "granted",
    "session timeout granted for 40 ms",
    "ms",
    Better::Less,
);
const LATE: Figure = less("expiry_late", "  expired later than that");
const LATE_MAX: Figure = less("expiry_late_max", "  latest of them");
const LOST: Figure = figure(
    "held_lost",
    "  lost of 60 held under 256 writes",
    "sessions",
    Better::Neither,
);
const OWN_GAP: Figure = figure(
    "held_own_gap",
    "  longest pause in our own pings",
    "ms",
    Better::Neither,
);

/// The shortest timeout that is asked for.
const SHORT_SESSION: Duration = Duration::from_millis(40);

/// How long and how often.
struct Extent {
    rounds: usize,
    warm: Duration,
    duration: Duration,
    /// Loads both ensembles before anything is measured: a JVM wants to have compiled first.
    warm_up: Duration,
    watch_rounds: usize,
    fault_rounds: usize,
    silent: usize,
    hold: Duration,
}

pub(super) fn run(args: &BenchCoordArgs) -> anyhow::Result<ExitCode> {
    let extent = if args.quick {
        Extent {
            rounds: 1,
            warm: Duration::from_millis(200),
            duration: Duration::from_millis(500),
            warm_up: Duration::from_secs(3),
            watch_rounds: 3,
            fault_rounds: 1,
            silent: 5,
            hold: Duration::from_secs(2),
        }
    } else {
        Extent {
            rounds: 3,
            warm: Duration::from_millis(300),
            duration: Duration::from_secs(1),
            warm_up: Duration::from_secs(6),
            watch_rounds: 3,
            fault_rounds: 3,
            silent: 20,
            hold: Duration::from_secs(5),
        }
    };
    let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = base.join(format!("unbroken-bench-coord-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let result = measure(args, &extent, &dir);
    if result.is_ok() {
        let _ = std::fs::remove_dir_all(&dir);
    } else {
        eprintln!("the servers' files are left in {}", dir.display());
    }
    let report = result?;
    if args.json {
        println!("{}", serde_json::to_string(&report.to_json())?);
    } else {
        print!("{}", report.table());
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(
    args: &BenchCoordArgs,
    extent: &Extent,
    dir: &std::path::Path,
) -> anyhow::Result<Report> {
    let mut kinds = vec![Kind::Unbroken];
    let mut missing = None;
    if !args.alone {
        match find_zookeeper() {
            Ok(kind) => kinds.push(kind),
            Err(what) => {
                missing = Some(format!(
                    "Apache ZooKeeper was not measured: {what} (Debian: apt-get install zookeeper \
                     default-jre-headless)"
                ));
            }
        }
    }
    let mut report = Report::new(kinds.iter().map(Kind::name).collect());
    missing.into_iter().for_each(|note| report.note(note));
    if rustix::fs::statfs(dir)?.f_type == TMPFS_MAGIC {
        report.note(format!(
            "{} is in memory: syncs cost nothing there (--dir names a disk)",
            dir.display()
        ));
    }
    let mut ensembles = Vec::new();
    for (index, kind) in kinds.into_iter().enumerate() {
        show(&format!("starting {}", kind.name()));
        let ensemble = Ensemble::start(kind, dir)?;
        report.add(START, index, milliseconds(ensemble.started_in));
        ensembles.push(ensemble);
    }
    for ensemble in &ensembles {
        show(&format!("warming {} up", ensemble.kind.name()));
        for work in [Work::Set, Work::Get] {
            let half = extent.warm_up / 2;
            load(&ensemble.addresses, work, 6, 256, Duration::ZERO, half)?;
        }
    }
    for round in 0..extent.rounds {
        for figures in &LOADS {
            for (index, ensemble) in in_turn(&mut ensembles, round) {
                show(&format!(
                    "round {}: {}, {}",
                    round + 1,
                    figures.rate.title,
                    ensemble.kind.name()
                ));
                let leader = [ensemble.addresses[ensemble.leader()?]];
                let addresses = if figures.one_server {
                    &leader[..]
                } else {
                    &ensemble.addresses
                };
                let sample = load(
                    addresses,
                    figures.work,
                    figures.connections,
                    figures.outstanding,
                    extent.warm,
                    extent.duration,
                )
                .with_context(|| format!("{} on {}", figures.rate.title, ensemble.kind.name()))?;
                report.add(figures.rate, index, sample.per_second);
                report.add(figures.p50, index, sample.p50_ms);
                report.add(figures.p99, index, sample.p99_ms);
            }
        }
        for (index, ensemble) in in_turn(&mut ensembles, round) {
            show(&format!(
                "round {}: watches, {}",
                round + 1,
                ensemble.kind.name()
            ));
            for figure in load::fan_out(&ensemble.addresses, WATCHERS, extent.watch_rounds)? {
                report.add(FAN_OUT, index, figure);
            }
        }
    }
    for (index, ensemble) in ensembles.iter().enumerate() {
        report.add(RESIDENT, index, ensemble.resident_mib()?);
    }
    for round in 0..extent.rounds {
        for (index, ensemble) in in_turn(&mut ensembles, round) {
            sessions(ensemble, index, extent, &mut report)?;
        }
    }
    for round in 0..extent.fault_rounds {
        for (index, ensemble) in in_turn(&mut ensembles, round) {
            leader_faults(ensemble, index, round, &mut report)?;
        }
    }
    clear();
    Ok(report)
}

/// Sessions that watch in [`FAN_OUT`].
const WATCHERS: usize = 1000;

const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// All ensembles; the first of a round is another one each time.
fn in_turn(
    ensembles: &mut [Ensemble],
    round: usize,
) -> impl Iterator<Item = (usize, &mut Ensemble)> {
    let count = ensembles.len();
    let mut turns: Vec<_> = ensembles.iter_mut().enumerate().collect();
    turns.rotate_left(round % count);
    turns.into_iter()
}

fn sessions(
    ensemble: &Ensemble,
    index: usize,
    extent: &Extent,
    report: &mut Report,
) -> anyhow::Result<()> {
    show(&format!("expiry, {}", ensemble.kind.name()));
    let expiry = faults::expiry(&ensemble.addresses, SHORT_SESSION, extent.silent)?;
    report.add(GRANTED, index, expiry.granted_ms);
    report.add(LATE, index, expiry.late_p50_ms);
    report.add(LATE_MAX, index, expiry.late_max_ms);
    show(&format!(
        "short sessions under load, {}",
        ensemble.kind.name()
    ));
    let stop = AtomicBool::new(false);
    let held = std::thread::scope(|scope| {
        let held = scope.spawn(|| faults::hold(&ensemble.addresses, SHORT_SESSION, HELD, &stop));
        let loaded = load(
            &ensemble.addresses,
            Work::Set,
            3,
            256,
            Duration::ZERO,
            extent.hold,
        );
        stop.store(true, Ordering::Relaxed);
        let held = held.join().expect("it returns its errors");
        loaded.and(held)
    })?;
    report.add(LOST, index, f64::from(held.lost));
    report.add(OWN_GAP, index, held.own_gap_ms);
    Ok(())
}

/// Sessions that are held in [`LOST`].
const HELD: usize = 60;

fn leader_faults(
    ensemble: &mut Ensemble,
    index: usize,
    round: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    show(&format!("leader kill -9, {}", ensemble.kind.name()));
    let leader = ensemble.leader()?;
    let gap = faults::gap(&ensemble.addresses, || {
        ensemble.signal(leader, Signal::KILL)
    })?;
    report.add(KILL, index, gap);
    let back = ensemble.restart(leader)?;
    report.add(RESTART, index, milliseconds(back));
    // It may take a stopped leader's peers many seconds to notice.
    if round == 0 {
        show(&format!("leader SIGSTOP, {}", ensemble.kind.name()));
        let leader = ensemble.leader()?;
        let gap = faults::gap(&ensemble.addresses, || {
            ensemble.signal(leader, Signal::STOP)
        });
        ensemble.signal(leader, Signal::CONT)?;
        report.add(STOP, index, gap?);
        ensemble.leader()?;
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Says on a terminal what is being done.
fn show(what: &str) {
    let mut stderr = std::io::stderr().lock();
    if stderr.is_terminal() {
        // Progress that cannot be shown is no reason to fail.
        let _ = write!(stderr, "\r\x1b[K{what}");
        let _ = stderr.flush();
    }
}

fn clear() {
    show("");
}
