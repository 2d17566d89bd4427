//! A connection whose input exceeds memory by far: replicas that join are brought to its point from disk.

#![expect(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use unbroken::status::{CatchUp, Status};
use unbroken_tests::client::{self, ClientError, Outcome, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service, whole};
use unbroken_tests::netns::{userns, wait_until};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
/// One request, and its answer: about 16 MB a second.
const REQUEST_BYTES: u32 = 64 << 10;
const PERIOD: Duration = Duration::from_millis(4);

fn cluster(history: &str) -> Cluster {
    let mut service = Service::lab(SERVER);
    service.keys = format!("history = {history}");
    Cluster::start(Options::new(NODE, [service])).unwrap()
}

/// A client on one connection, each of whose answers depends on everything that it has said.
struct Talker {
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Outcome, ClientError>>,
}

impl Talker {
    fn start(cluster: &Cluster) -> Self {
        let stream = cluster.connect(80).unwrap();
        let (progress, stop) = (Progress::shared(), Arc::<AtomicBool>::default());
        let (mine, stopped) = (Arc::clone(&progress), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let more = || !stopped.load(Ordering::Relaxed);
            client::exchange(stream, REQUEST_BYTES, PERIOD, &mine, more)
        });
        Self {
            progress,
            stop,
            thread,
        }
    }

    fn said(&self) -> u64 {
        self.progress.sample().bytes
    }

    /// Waits until it has said so much more.
    fn go_on(&self, bytes: u64) {
        let until = self.said() + bytes;
        wait_until("the client goes on", PATIENCE, || {
            assert!(!self.thread.is_finished(), "the client ended");
            self.said() >= until
        })
        .unwrap();
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap();
    }
}

/// Megabytes that a client says before replicas join: `UNBROKEN_MB=1000 cargo test ...` tries more.
fn input_bytes() -> u64 {
    let megabytes = std::env::var("UNBROKEN_MB");
    megabytes.map_or(32, |text| text.parse::<u64>().unwrap()) << 20
}

fn each(cluster: &Cluster, mut check: impl FnMut(&Status) -> bool) -> bool {
    let statuses = cluster.statuses();
    statuses.iter().all(|s| s.as_ref().is_some_and(&mut check))
}

#[test]
fn a_replica_is_brought_up_from_disk() {
    userns::privileged("a_replica_is_brought_up_from_disk", || {
        let bytes = input_bytes();
        let mut cluster = cluster(&format!(
            "{{ memory = \"1MiB\", disk = \"{}MiB\" }}",
            (bytes >> 20) * 4 + 1024
        ));
        let (leader, _) = cluster.wait_whole().unwrap();
        let talker = Talker::start(&cluster);
        talker.go_on(bytes);
        // Most of it is on disk, on every replica.
        let mut kept = Vec::new();
        let waited = wait_until("the input is on disk", PATIENCE, || {
            kept.clear();
            each(&cluster, |status| {
                let counters = &status.services[0].counters;
                kept.push((counters.history_bytes, counters.history_disk_bytes));
                counters.history_bytes < 2 << 20 && counters.history_disk_bytes > bytes - (2 << 20)
            })
        });
        waited.unwrap_or_else(|error| panic!("{error}: {kept:?}"));
        for backup in cluster.replicas() {
            if backup == leader {
                continue;
            }
            cluster.kill(&backup).unwrap();
            cluster.start_replica(&backup).unwrap();
            let mut seen: Vec<CatchUp> = Vec::new();
            wait_until("the replica is back", PATIENCE, || {
                let statuses = cluster.statuses();
                for status in statuses.iter().flatten() {
                    let members = status.services.first().map_or(&[][..], |s| &s.members);
                    let of = members.iter().filter(|m| m.name == backup);
                    seen.extend(of.filter_map(|m| m.catching_up));
                }
                whole(&statuses, &cluster.replicas()).is_ok()
            })
            .unwrap();
            println!("{backup}: {seen:?}");
            let full =
                |step: &CatchUp| step.total_bytes >= bytes && step.done_bytes <= step.total_bytes;
            assert!(seen.iter().any(full), "how far {backup} is was not told");
            talker.go_on(1);
        }
        // Both others were brought up from disk: whoever leads now speaks for that.
        cluster.kill(&leader).unwrap();
        cluster.wait_other_leader(&leader).unwrap();
        talker.go_on(1 << 20);
        cluster.start_replica(&leader).unwrap();
        cluster.wait_whole().unwrap();
        assert!(each(&cluster, |s| s.services[0].counters.not_replayable == 0));
        talker.finish();
        wait_until("the files go with the connection", PATIENCE, || {
            let gone = each(&cluster, |s| s.services[0].counters.history_disk_bytes == 0);
            let empty = |name: &String| {
                let folder = cluster.folder(name).join("data/history/10.98.0.100");
                fs::read_dir(folder).unwrap().next().is_none()
            };
            gone && cluster.replicas().iter().all(empty)
        })
        .unwrap();
    });
}

/// Past memory and disk the connection lives on, and everybody is told, once in the log.
#[test]
fn what_exceeds_the_disk_is_said_and_served() {
    userns::privileged("what_exceeds_the_disk_is_said_and_served", || {
        let cluster = cluster("{ memory = \"1MiB\", disk = \"1MiB\" }");
        cluster.wait_whole().unwrap();
        let talker = Talker::start(&cluster);
        talker.go_on(8 << 20);
        let mut reasons = Vec::new();
        let waited = wait_until("it is said", PATIENCE, || {
            reasons.clear();
            each(&cluster, |status| {
                let service = &status.services[0];
                reasons.push(service.redundancy_reason.clone());
                let reason = service.redundancy_reason.as_deref().unwrap_or_default();
                service.counters.not_replayable == 1 && reason.contains("history.disk")
            })
        });
        waited.unwrap_or_else(|error| panic!("{error}: {reasons:?}"));
        talker.go_on(4 << 20);
        for name in cluster.replicas() {
            let log = fs::read_to_string(cluster.folder(&name).join("node.log")).unwrap();
            let said = log.matches("connection not replayable").count();
            assert_eq!(said, 1, "{name} says it {said} times");
        }
        talker.finish();
    });
}
