//! A crash is not a close (R5): what happens to the leader's *server*, under clients of the kernel's that
//! verify every byte. None of them may notice.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use unbroken_tests::client::{self, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::userns;
use unbroken_tests::server;
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
/// Connections whose closes are timed.
const TIMED: usize = 300;

/// The server with a health check that it answers, since the kernel accepts for one that hangs: a
/// download of one byte.
fn checked() -> Service {
    let request = format!("D{}\\u0001", "\\u0000".repeat(15));
    Service {
        keys: format!(
            "health = {{ send = \"{request}\", interval = \"100ms\", timeout = \"200ms\", failures = 2 }}"
        ),
        ..Service::lab(SERVER)
    }
}

/// At the very moment of its death the leader's server has closed a connection: that client's stream ends where it should,
/// and the others' do not end.
#[test]
fn the_leaders_server_dies_as_it_closes() {
    userns::privileged("the_leaders_server_dies_as_it_closes", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        let (mut leader, _) = cluster.wait_whole().unwrap();
        let traffic = Traffic::start(&cluster, 80, &Kind::ALL);
        for _ in 0..2 {
            let order = cluster.folder(&leader).join(server::DIE);
            std::fs::write(&order, "").unwrap();
            let was = leader;
            let status = cluster.server(&was, "lab").wait(PATIENCE).unwrap();
            assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
            cluster.wait_other_leader(&was).unwrap();
            traffic.wait_progress();
            std::fs::remove_file(&order).unwrap();
            cluster.start_server(&was, "lab").unwrap();
            (leader, _) = cluster.wait_whole().unwrap();
        }
        traffic.finish();
        assert_eq!(divergences(&cluster), 0);
    });
}

/// Who joins replays every connection to its own server; where one of these is broken off before the server has said what the
/// others' have said, that is no close: it is made again, and the client is served by the joiner when it leads.
#[test]
fn a_replay_that_is_broken_off_is_made_again() {
    userns::privileged("a_replay_that_is_broken_off_is_made_again", || {
        let mut options = Options::new(NODE, [Service::lab(SERVER)]);
        options.replicas = 2;
        options.coordinators = 3;
        let mut cluster = Cluster::start(options).unwrap();
        let (leader, view) = cluster.wait_whole().unwrap();
        let traffic = Traffic::start(&cluster, 80, &[Kind::Exchange, Kind::Exchange]);
        traffic.wait_progress();
        let joiner = cluster.replicas().into_iter().find(|r| *r != leader);
        let joiner = joiner.unwrap();
        cluster.kill(&joiner).unwrap();
        cluster.start_server(&joiner, "lab").unwrap();
        let resets = cluster.folder(&joiner).join(server::RESET);
        std::fs::write(&resets, "6").unwrap();
        cluster.start_node(&joiner).unwrap();
        cluster.wait_whole().unwrap();
        assert_eq!(std::fs::read_to_string(&resets).unwrap(), "0");
        cluster.kill(&leader).unwrap();
        assert_eq!(cluster.wait_leader(view).unwrap().0, joiner);
        traffic.wait_progress();
        traffic.finish();
    });
}

/// The process that listens lives on, so nothing tells the death of its worker from closes but that the others' servers
/// do not close.
#[test]
fn the_leaders_worker_dies_and_its_master_stays() {
    userns::privileged("the_leaders_worker_dies_and_its_master_stays", || {
        let mut service = Service::lab(SERVER);
        service.server.push("--prefork".to_owned());
        let mut cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        let traffic = Traffic::start(&cluster, 80, &Kind::ALL);
        let master = cluster.server(&leader, "lab");
        let worker = master.wait_for_line("worker ", PATIENCE).unwrap();
        let worker = worker.trim_start_matches("worker ").parse().ok();
        kill_process(worker.and_then(Pid::from_raw).unwrap(), Signal::KILL).unwrap();
        cluster.wait_other_leader(&leader).unwrap();
        assert!(cluster.server(&leader, "lab").is_running());
        traffic.wait_progress();
        cluster.wait_whole().unwrap();
        traffic.finish();
    });
}

fn divergences(cluster: &Cluster) -> u64 {
    let statuses = cluster.statuses().into_iter().flatten();
    statuses
        .map(|s| s.services[0].counters.close_divergences)
        .sum()
}

#[test]
fn the_leaders_server_dies_or_closes_everything_or_hangs() {
    userns::privileged(
        "the_leaders_server_dies_or_closes_everything_or_hangs",
        || {
            let mut cluster = Cluster::start(Options::new(NODE, [checked()])).unwrap();
            let (mut leader, _) = cluster.wait_whole().unwrap();
            let traffic = Traffic::start(&cluster, 80, &Kind::ALL);
            for signal in [Signal::KILL, Signal::TERM, Signal::STOP] {
                // After SIGTERM it closes all connections and lives on.
                cluster.server(&leader, "lab").signal(signal).unwrap();
                let was = leader;
                cluster.wait_other_leader(&was).unwrap();
                traffic.wait_progress();
                cluster.server(&was, "lab").kill().unwrap();
                cluster.start_server(&was, "lab").unwrap();
                (leader, _) = cluster.wait_whole().unwrap();
            }
            traffic.finish();
            assert_eq!(divergences(&cluster), 0);
        },
    );
}

/// The time from the request to the end of the stream of a brief connection, of [`TIMED`] the median.
fn median_close(cluster: &Cluster) -> Duration {
    let mut times: Vec<Duration> = (0..TIMED)
        .map(|_| {
            let stream = cluster.connect(80).unwrap();
            let begun = Instant::now();
            client::download(stream, 1, 100, None, &Progress::shared()).unwrap();
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[TIMED / 2]
}

#[test]
fn a_server_that_closes_is_seen_to_close() {
    userns::privileged("a_server_that_closes_is_seen_to_close", || {
        let mut medians = Vec::new();
        for replicas in [1, 3] {
            let mut options = Options::new(NODE, [Service::lab(SERVER)]);
            options.replicas = replicas;
            let cluster = Cluster::start(options).unwrap();
            let whole = cluster.wait_whole().unwrap();
            medians.push(median_close(&cluster));
            assert_eq!(cluster.wait_whole().unwrap(), whole, "nobody handed over");
            assert_eq!(divergences(&cluster), 0);
        }
        eprintln!(
            "request to end of stream, median of {TIMED}: {:?} with one replica, {:?} with three",
            medians[0], medians[1]
        );
    });
}
