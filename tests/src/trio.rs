//! Three clients of the kernel's at once, each of which verifies every byte: what a whole-system test has survive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::client::{self, ClientError, Outcome, Progress};
use crate::cluster::{Cluster, PATIENCE};
use crate::netns::wait_until;

/// What the bulk clients move: more than the faults last, at their pace.
const RATE: u64 = 4 << 20;

/// A download, an upload and an exchange on their way.
#[derive(Debug)]
pub struct Trio {
    stop: Arc<AtomicBool>,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    kind: &'static str,
    progress: Arc<Progress>,
    thread: JoinHandle<Result<Outcome, ClientError>>,
}

impl Trio {
    /// Connects the three to port 80, whose server is [`crate::server`]; the bulk ones move `bulk_bytes`.
    ///
    /// # Panics
    /// If one cannot connect.
    pub fn start(cluster: &Cluster, bulk_bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for kind in ["download", "upload", "exchange"] {
            let stream = cluster.connect(80).expect("as the test expects");
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
    ///
    /// # Panics
    /// If one does not.
    pub fn wait_progress(&self) {
        let moved = |running: &Running| running.progress.sample().bytes;
        let before: Vec<u64> = self.running.iter().map(moved).collect();
        wait_until("every client moves on", PATIENCE, || {
            let mut all = self.running.iter().zip(&before);
            all.all(|(running, before)| {
                let sample = running.progress.sample();
                sample.finished || sample.bytes > *before
            })
        })
        .expect("as the test expects");
    }

    /// Tells the exchange to end, waits for all, and has each be content.
    ///
    /// # Panics
    /// If one is not.
    pub fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for Running { kind, thread, .. } in self.running {
            let outcome = thread.join().expect("as the test expects");
            let outcome = outcome.unwrap_or_else(|e| panic!("the {kind}: {e}"));
            assert!(outcome.bytes > 0, "the {kind} moved nothing");
        }
    }
}
