//! Every fault of the leader, under three clients of the kernel's that verify every byte: none of them may notice.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use unbroken_tests::client::{self, ClientError, Outcome, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// What the bulk clients move: more than the faults last, at their pace.
const RATE: u64 = 4 << 20;

/// A download, an upload and an exchange that go on until they are told to stop.
struct Clients {
    stop: Arc<AtomicBool>,
    running: Vec<Running>,
}

struct Running {
    kind: &'static str,
    progress: Arc<Progress>,
    thread: JoinHandle<Result<Outcome, ClientError>>,
}

impl Clients {
    fn start(cluster: &Cluster, bulk_bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for kind in ["download", "upload", "exchange"] {
            let stream = cluster.connect(80).unwrap();
            let (progress, stop) = (Progress::shared(), Arc::clone(&stop));
            let mine = Arc::clone(&progress);
            let thread = thread::spawn(move || match kind {
                "download" => client::download(stream, 1, bulk_bytes, Some(RATE), &mine),
                "upload" => client::upload(stream, 2, bulk_bytes, Some(RATE), &mine),
                _ => client::exchange(stream, 64, Duration::from_millis(2), &mine, || {
                    !stop.load(Ordering::Relaxed)
                }),
            });
            running.push(Running {
                kind,
                progress,
                thread,
            });
        }
        Self { stop, running }
    }

    /// Waits until every client that has not ended has moved on.
    fn wait_progress(&self) {
        let moved = |running: &Running| running.progress.sample().bytes;
        let before: Vec<u64> = self.running.iter().map(moved).collect();
        wait_until("every client moves on", PATIENCE, || {
            let mut all = self.running.iter().zip(&before);
            all.all(|(running, before)| {
                let sample = running.progress.sample();
                sample.finished || sample.bytes > *before
            })
        })
        .unwrap();
    }

    /// Tells the exchange to end, waits for all, and has each be content.
    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for Running { kind, thread, .. } in self.running {
            let outcome = thread.join().unwrap();
            let outcome = outcome.unwrap_or_else(|e| panic!("the {kind}: {e}"));
            assert!(outcome.bytes > 0, "the {kind} moved nothing");
        }
    }
}

#[test]
fn the_leaders_node_and_server_die() {
    userns::privileged("the_leaders_node_and_server_die", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        let (mut leader, mut view) = cluster.wait_whole().unwrap();
        let clients = Clients::start(&cluster, 40 << 20);
        clients.wait_progress();
        for fault in ["node", "machine"] {
            if fault == "node" {
                cluster.node(&leader).signal(Signal::KILL).unwrap();
            } else {
                cluster.lab().kill_host(&leader).unwrap();
            }
            let dead = leader;
            leader = cluster.wait_leader(view).unwrap().0;
            assert_ne!(leader, dead);
            clients.wait_progress();
            cluster.kill(&dead).unwrap();
            cluster.start_replica(&dead).unwrap();
            (leader, view) = cluster.wait_whole().unwrap();
        }
        clients.finish();
    });
}
