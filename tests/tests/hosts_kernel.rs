//! What befalls a replica's host and is nobody's death: its disk is full, its clock is set, it is slow. No client may notice.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use unbroken::status::Redundancy;
use unbroken_coord::client::ConnectOptions;
use unbroken_coord::client::blocking::Client;
use unbroken_coord::wire::{Acl, CreateMode};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
/// Bytes of a download or upload: about a second of one.
const BULK: u64 = 4 << 20;

fn options() -> Options {
    Options::new(NODE, [Service::lab(SERVER)])
}

/// A client of all coordinators, on the client host.
fn coordinator(cluster: &Cluster) -> Client {
    let address = |name: &String| format!("{}:2181", cluster.lab().host(name).address());
    let servers: Vec<String> = cluster.replicas().iter().map(address).collect();
    let host = cluster.lab().host("c");
    host.enter(|| Client::connect(ConnectOptions::new(servers)))
        .unwrap()
}

/// Where a counter is that somebody keeps writing, with much beside it, so that a disk fills.
const COUNTER: &str = "/counter";
const BESIDE: usize = 64 << 10;

fn write_counter(client: &Client, stop: &AtomicBool, promised: &AtomicU64) {
    let mut number = promised.load(Ordering::Relaxed);
    while !stop.load(Ordering::Relaxed) {
        let mut value = (number + 1).to_be_bytes().to_vec();
        value.resize(BESIDE, 0);
        // What is lost with a connection may have been written, or not.
        if client.set(COUNTER, value, -1).is_ok() {
            number += 1;
            promised.store(number, Ordering::Relaxed);
        }
    }
}

/// The disk under a coordinator is full: the leader's, then a backup's. The node stops and says why, nobody loses what was
/// promised, and started with room it comes back by itself.
#[test]
fn the_disk_is_full() {
    userns::privileged("the_disk_is_full", || {
        let mut cluster = Cluster::start(Options {
            disk: Some(64 << 20),
            ..options()
        })
        .unwrap();
        cluster.wait_whole().unwrap();
        let traffic = Traffic::with_bulk(&cluster, 80, &Kind::BUSY, BULK);
        let client = coordinator(&cluster);
        client
            .create(COUNTER, vec![0; 8], CreateMode::Persistent, Acl::open())
            .unwrap();
        let promised = AtomicU64::new(0);
        for leads in [true, false] {
            let (leader, _) = cluster.wait_whole().unwrap();
            let backup = cluster.replicas().into_iter().find(|name| *name != leader);
            let victim = if leads {
                leader.clone()
            } else {
                backup.unwrap()
            };
            let ballast = cluster.disk(&victim).join("ballast");
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| write_counter(&client, &stop, &promised));
                fill(&ballast);
                let ended = cluster.node(&victim).wait(PATIENCE);
                stop.store(true, Ordering::Relaxed);
                assert_eq!(ended.unwrap().code(), Some(1));
            });
            said(&mut cluster, &victim);
            cluster.wait_other_leader(&victim).unwrap();
            traffic.wait_progress();
            let heir = cluster.wait_leader(0).unwrap().0;
            wait_until("the leader says that one is missing", PATIENCE, || {
                let status = cluster.status(&heir);
                status.is_some_and(|s| s.services[0].redundancy == Redundancy::Degraded)
            })
            .unwrap();
            std::fs::remove_file(&ballast).unwrap();
            cluster.start_node(&victim).unwrap();
            cluster.wait_whole().unwrap();
            let (value, _) = client.get(COUNTER).unwrap();
            let found = u64::from_be_bytes(value[..8].try_into().unwrap());
            let promised = promised.load(Ordering::Relaxed);
            assert!(
                found >= promised,
                "{promised} was promised, {found} is there"
            );
        }
        traffic.finish();
    });
}

/// Leaves no byte free.
fn fill(ballast: &Path) {
    let mut file = std::fs::File::create(ballast).unwrap();
    let full = std::io::copy(&mut std::io::repeat(0), &mut file).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
}

fn said(cluster: &mut Cluster, victim: &str) {
    let log = cluster.node(victim).log_text();
    let last = log.lines().last().unwrap_or_default();
    for word in ["disk failed", "No space left on device"] {
        assert!(last.contains(word), "its last words: {last:?}");
    }
}

/// What sets a clock for one program: the machine's own is not touched.
fn faketime() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").unwrap().flatten();
    let mut files = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
    let found = files.find(|file| file.exists());
    found.expect("libfaketime.so.1 (package faketime)")
}

const CLOCK: &str = "clock";

fn set_clock(cluster: &Cluster, replica: &str, seconds: i32) {
    let [file, new] = [CLOCK, "clock.new"].map(|name| cluster.folder(replica).join(name));
    std::fs::write(&new, format!("{seconds:+}")).unwrap();
    std::fs::rename(new, file).unwrap();
}

/// How far off a line of a log says that the time is, in seconds, within half a day.
fn off(line: &str) -> Option<i64> {
    let time = line.split_once('T')?.1;
    let mut fields = time.get(..8)?.split(':').map(|field| field.parse::<i64>());
    let mut next = || fields.next()?.ok();
    let said = next()? * 3600 + next()? * 60 + next()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = i64::try_from(now.as_secs()).unwrap();
    Some((said - now + 43_200).rem_euclid(86_400) - 43_200)
}

/// The clock of the leader's host is set an hour ahead, then all hosts' an hour back, and so is a failover survived.
#[test]
fn the_clock_is_set() {
    userns::privileged("the_clock_is_set", || {
        let environment = vec![
            ("LD_PRELOAD", faketime().to_str().unwrap().to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", CLOCK.to_owned()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        let mut cluster = Cluster::start(Options {
            environment,
            ..options()
        })
        .unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        let traffic = Traffic::with_bulk(&cluster, 80, &Kind::ALL, BULK);
        let go_on = || {
            for _ in 0..2 {
                traffic.wait_progress();
            }
            cluster.wait_whole().unwrap();
        };
        set_clock(&cluster, &leader, 3600);
        go_on();
        for replica in cluster.replicas() {
            set_clock(&cluster, &replica, -3600);
        }
        go_on();
        cluster.node(&leader).signal(Signal::KILL).unwrap();
        let (heir, _) = cluster.wait_other_leader(&leader).unwrap();
        traffic.wait_progress();
        // Between two clocks.
        set_clock(&cluster, &heir, 3600);
        cluster.kill(&leader).unwrap();
        cluster.start_replica(&leader).unwrap();
        cluster.wait_whole().unwrap();
        traffic.finish();
        let log = cluster.node(&heir).log_text();
        for hours in [-1, 1] {
            let mut lines = log.lines().filter_map(off);
            let seen = lines.any(|off| (off - hours * 3600).abs() < 600);
            assert!(seen, "no clock was set {hours} h:\n{log}");
        }
    });
}

/// Runs a process for so long of each period.
fn slow_down(pid: u32, run: Duration, period: Duration, stop: &AtomicBool) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    while !stop.load(Ordering::Relaxed) {
        kill_process(pid, Signal::STOP).unwrap();
        std::thread::sleep(period - run);
        kill_process(pid, Signal::CONT).unwrap();
        std::thread::sleep(run);
    }
}

/// A node gets a tenth of a processor, in small pieces: first a backup, then the leader. Clients go on; a leader that is
/// silent for too long is succeeded, and comes back when it can.
#[test]
fn a_host_is_slow() {
    userns::privileged("a_host_is_slow", || {
        let mut cluster = Cluster::start(options()).unwrap();
        cluster.wait_whole().unwrap();
        let traffic = Traffic::with_bulk(&cluster, 80, &Kind::BUSY, BULK);
        // Each stops for longer than the others wait (`suspect_after`, 50 ms).
        for (leads, period) in [(false, 200), (true, 100)] {
            let (leader, _) = cluster.wait_whole().unwrap();
            let mut replicas = cluster.replicas().into_iter();
            let victim = replicas.find(|name| (*name == leader) == leads).unwrap();
            let pid = cluster.node(&victim).pid();
            let (run, period) = (
                Duration::from_millis(period / 10),
                Duration::from_millis(period),
            );
            let stop = AtomicBool::new(false);
            let cluster = &cluster;
            std::thread::scope(|scope| {
                scope.spawn(|| slow_down(pid, run, period, &stop));
                let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    if leads {
                        cluster.wait_other_leader(&leader).unwrap();
                    }
                    for _ in 0..5 {
                        traffic.wait_progress();
                    }
                }));
                stop.store(true, Ordering::Relaxed);
                body.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            });
            eprintln!("{victim} was slow: {:?}", cluster.wait_whole().unwrap());
        }
        traffic.finish();
    });
}
