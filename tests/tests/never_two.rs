//! Never two: leaders are put to sleep in the middle of downloads and woken while their successors
//! serve, and the switch sees no frame of the VIP from the old one after the new one's first.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use unbroken_tests::client::{self, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service, VIP};
use unbroken_tests::netns::{Capture, Injector, userns, wait_until};
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
const ROUNDS: u32 = 8;

fn options() -> Options {
    Options::new(NODE, [Service::lab(SERVER)])
}

/// How many leaders are put to sleep: `UNBROKEN_ROUNDS=1000 cargo test ...` takes its time.
fn rounds() -> u32 {
    std::env::var("UNBROKEN_ROUNDS").map_or(ROUNDS, |text| text.parse().unwrap())
}

/// Which hosts spoke for the VIP, in order, each as often as it began to.
#[derive(Debug, Default)]
struct Speakers {
    turns: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Speakers {
    fn listen(&self, capture: &Capture, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let frame = capture.next(Duration::from_millis(100)).unwrap();
            let Some(frame) = frame.filter(|f| f.speaks_for(VIP.into())) else {
                continue;
            };
            let mut turns = self.turns.lock().unwrap();
            if turns.last() != Some(&frame.host) {
                turns.push(frame.host);
                self.changed.notify_all();
            }
        }
    }

    /// Waits until somebody else than `old` has spoken last. Says whether that was so in time.
    fn wait_for_other(&self, old: &str, time: Duration) -> bool {
        let turns = self.turns.lock().unwrap();
        let still = |turns: &mut Vec<String>| turns.last().is_none_or(|last| last == old);
        let (_turns, waited) = self.changed.wait_timeout_while(turns, time, still).unwrap();
        !waited.timed_out()
    }
}

/// Downloads, one after another, until told to stop.
fn download(cluster: &Cluster, stop: &AtomicBool) {
    let mut seed = 0;
    while !stop.load(Ordering::Relaxed) {
        seed += 1;
        let stream = cluster.connect(80).unwrap();
        let rate = Some(30 << 20);
        client::download(stream, seed, 10 << 20, rate, &Progress::shared()).unwrap();
    }
}

fn takeovers(cluster: &Cluster) -> u64 {
    let statuses = cluster.statuses();
    let services = statuses.iter().map(|s| &s.as_ref().unwrap().services[0]);
    services.map(|service| service.counters.takeovers).sum()
}

/// How a leader sleeps.
#[derive(Debug, Clone, Copy)]
enum Nap {
    /// Until somebody else has spoken, and so long after.
    Succeeded(Duration),
    /// So long, whatever the others do.
    For(Duration),
    /// It wakes every 100 ms for 5, until somebody else has spoken and so often after.
    Doze(u32),
}

impl Nap {
    fn take(self, signal: impl Fn(Signal), wait_for_other: impl Fn(Duration) -> bool) {
        signal(Signal::STOP);
        match self {
            Self::Succeeded(time) => {
                assert!(wait_for_other(PATIENCE), "nobody succeeded");
                std::thread::sleep(time);
            }
            Self::For(time) => std::thread::sleep(time),
            Self::Doze(after) => {
                let (mut left, mut succeeded) = (PATIENCE.as_millis() / 100, after);
                while succeeded > 0 {
                    left = left.checked_sub(1).expect("nobody succeeded");
                    succeeded -= u32::from(wait_for_other(Duration::ZERO));
                    std::thread::sleep(Duration::from_millis(95));
                    signal(Signal::CONT);
                    std::thread::sleep(Duration::from_millis(5));
                    signal(Signal::STOP);
                }
            }
        }
        signal(Signal::CONT);
    }
}

/// Naps that end when the successor serves, or a moment later.
fn naps(rounds: u32) -> Vec<Nap> {
    let after = |round: u32| Duration::from_millis(u64::from(round) * 37 % 150);
    (0..rounds)
        .map(|round| Nap::Succeeded(after(round)))
        .collect()
}

/// Says in which round somebody spoke who should have been silent, if in any.
fn sleepers(options: Options, naps: &[Nap]) -> Option<String> {
    let mut cluster = Cluster::start(options).unwrap();
    let mut pids = BTreeMap::new();
    for name in cluster.replicas() {
        pids.insert(name.clone(), cluster.node(&name).pid());
    }
    let signal = |name: &String, signal| {
        let pid = i32::try_from(pids[name]).ok().and_then(Pid::from_raw);
        kill_process(pid.unwrap(), signal).unwrap();
    };
    let cluster = cluster;
    let (mut leader, _) = cluster.wait_whole().unwrap();
    let (stop, speakers) = (AtomicBool::new(false), Speakers::default());
    let capture = cluster.lab().capture().unwrap();
    let mut found = None;
    std::thread::scope(|scope| {
        scope.spawn(|| speakers.listen(&capture, &stop));
        let downloads = [(); 2].map(|()| scope.spawn(|| download(&cluster, &stop)));
        let others = Traffic::start(&cluster, 80, &[Kind::Upload, Kind::Exchange, Kind::Brief]);
        let begun = Instant::now();
        let body = catch_unwind(AssertUnwindSafe(|| {
            for (round, nap) in (0u32..).zip(naps) {
                wait_until("frames of the leader", PATIENCE, || {
                    speakers.turns.lock().unwrap().last() == Some(&leader)
                })
                .unwrap();
                let before = (speakers.turns.lock().unwrap().len(), takeovers(&cluster));
                // At any moment of its work and of its lease.
                std::thread::sleep(Duration::from_micros(u64::from(round) * 7_919 % 20_000));
                let other = |time| speakers.wait_for_other(&leader, time);
                nap.take(|what| signal(&leader, what), other);
                let woken = std::mem::replace(&mut leader, cluster.wait_whole().unwrap().0);
                let turns = speakers.turns.lock().unwrap()[before.0..].to_vec();
                let changes = takeovers(&cluster) - before.1;
                if turns.len() as u64 > changes {
                    found = Some(format!(
                        "round {round}: {woken} woke, and {changes} takeovers made the turns {turns:?}"
                    ));
                    return;
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        let downloads = downloads.map(|download| download.join());
        println!("{} rounds in {:?}", naps.len(), begun.elapsed());
        if let Err(panic) = body {
            resume_unwind(panic);
        }
        // Two leaders may well break a connection; then this is not the first thing to say.
        if found.is_none() {
            for download in downloads {
                download.unwrap();
            }
            others.finish();
        }
    });
    found
}

#[test]
fn a_leader_that_wakes_says_nothing_more() {
    userns::privileged("a_leader_that_wakes_says_nothing_more", || {
        let found = sleepers(options(), &naps(rounds()));
        assert_eq!(found, None);
    });
}

/// Too short for a succession, about as long as one takes, and longer than anybody waits for it: `UNBROKEN_SLEEP` seconds.
#[test]
fn however_long_a_leader_sleeps() {
    userns::privileged("however_long_a_leader_sleeps", || {
        let seconds = std::env::var("UNBROKEN_SLEEP");
        let seconds: u64 = seconds.map_or(2, |text| text.parse().unwrap());
        let naps = [10, 30, 60, 100, 1000 * seconds];
        let naps = naps.map(|millis| Nap::For(Duration::from_millis(millis)));
        assert_eq!(sleepers(options(), &naps), None);
    });
}

/// A twentieth of a processor, in small pieces.
#[test]
fn a_slow_leader_says_nothing_more() {
    userns::privileged("a_slow_leader_says_nothing_more", || {
        assert_eq!(sleepers(options(), &[Nap::Doze(8); 4]), None);
    });
}

#[test]
fn the_fence_is_there_with_the_node_and_gone_after_it() {
    userns::privileged("the_fence_is_there_with_the_node_and_gone_after_it", || {
        let mut cluster = Cluster::start(options()).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        let mut claim = vec![0xff; 6];
        claim.extend([2, 0x98, 0, 0, 0, 0x77, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        claim.extend([2, 0x98, 0, 0, 0, 0x77]);
        claim.extend(VIP.octets());
        claim.extend([0; 6]);
        claim.extend(VIP.octets());
        let injectors: BTreeMap<String, Injector> = cluster
            .replicas()
            .into_iter()
            .map(|name| (name.clone(), cluster.lab().host(&name).injector().unwrap()))
            .collect();
        let leaves = |name: &str| injectors[name].send(&claim).unwrap();

        let replicas = cluster.replicas();
        let mut backups = replicas.iter().filter(|name| **name != leader);
        let (backup, other) = (backups.next().unwrap(), backups.next().unwrap());
        assert!(!leaves(backup) && !leaves(other), "a backup may speak");
        // A leader that sleeps: its kernel shuts by itself.
        cluster.node(&leader).signal(Signal::STOP).unwrap();
        wait_until("a shut fence", PATIENCE, || !leaves(&leader)).unwrap();
        cluster.node(&leader).signal(Signal::CONT).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();

        let returned = replicas.iter().find(|name| **name != leader).unwrap();
        for (name, signal) in [(returned, Signal::TERM), (&leader, Signal::KILL)] {
            let node = cluster.node(name);
            node.signal(signal).unwrap();
            let status = node.wait(PATIENCE).unwrap();
            assert_eq!(status.success(), signal == Signal::TERM);
            assert!(leaves(name), "it has ended, and its rules are still there");
            cluster.start_node(name).unwrap();
            cluster.wait_whole().unwrap();
            assert!(!leaves(name) || cluster.leader().unwrap().0 == *name);
        }
    });
}
