//! Clients of all kinds at once, on the client host, against the server of [`crate::server`]: they go on
//! until they are told to stop, and notice the first thing that is wrong.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::client::{self, Outcome, Progress};
use crate::cluster::{Cluster, PATIENCE, VIP};
use crate::netns::{Host, wait_until};

/// What a bulk client moves a second: what lives through a fault shall not be over before it.
const RATE: u64 = 4 << 20;
/// Payload of one bulk connection: it lives for some seconds, and the next one follows.
const BULK_BYTES: u64 = 16 << 20;
/// Payload of a brief connection.
const BRIEF_BYTES: u64 = 1000;

/// Bytes of a request of an exchange, and of its answer.
pub const EXCHANGE_BYTES: u32 = 64;

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads at a steady pace.
    Download,
    /// Writes at a steady pace, and has what was received confirmed.
    Upload,
    /// Asks every few milliseconds.
    Exchange,
    /// Asks now and then; between, nothing is on its way.
    Idle,
    /// Connects, reads a little and is closed, again and again.
    Brief,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Download,
        Self::Upload,
        Self::Exchange,
        Self::Idle,
        Self::Brief,
    ];

    /// Those whose bytes flow all the time.
    pub const BUSY: [Self; 3] = [Self::Download, Self::Upload, Self::Exchange];

    fn run(
        self,
        host: &Host,
        server: SocketAddr,
        bulk_bytes: u64,
        progress: &Arc<Progress>,
        stop: &AtomicBool,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let more = || !stop.load(Ordering::Relaxed);
        while more() {
            let stream = host
                .enter(|| TcpStream::connect_timeout(&server, PATIENCE))
                .context("connecting")?;
            let seed = outcomes.len() as u64;
            let outcome = match self {
                Self::Download => client::download(stream, seed, bulk_bytes, Some(RATE), progress),
                Self::Upload => client::upload(stream, seed, bulk_bytes, Some(RATE), progress),
                Self::Exchange => client::exchange(
                    stream,
                    EXCHANGE_BYTES,
                    Duration::from_millis(2),
                    progress,
                    more,
                ),
                Self::Idle => client::exchange(
                    stream,
                    EXCHANGE_BYTES,
                    Duration::from_millis(700),
                    progress,
                    more,
                ),
                Self::Brief => client::download(stream, seed, BRIEF_BYTES, None, progress),
            };
            outcomes.push(outcome?);
        }
        Ok(outcomes)
    }
}

/// Clients that run.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    kind: Kind,
    /// Of all its connections together.
    progress: Arc<Progress>,
    thread: JoinHandle<Result<Vec<Outcome>>>,
}

impl Traffic {
    /// Starts a client of each kind against a port of the virtual address, and waits until all have moved.
    ///
    /// # Panics
    /// One does not, or ends.
    pub fn start(cluster: &Cluster, port: u16, kinds: &[Kind]) -> Self {
        Self::with_bulk(cluster, port, kinds, BULK_BYTES)
    }

    /// The same, with so many bytes on one bulk connection, at 4 MiB a second: for one to live through all of a test.
    ///
    /// # Panics
    /// As above.
    pub fn with_bulk(cluster: &Cluster, port: u16, kinds: &[Kind], bulk_bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let server = SocketAddr::from((VIP, port));
        let clients = kinds.iter().map(|kind| {
            let (kind, host) = (*kind, cluster.lab().host("c").clone());
            let (stop, progress) = (Arc::clone(&stop), Progress::shared());
            let mine = Arc::clone(&progress);
            let thread = thread::spawn(move || {
                let ended = kind.run(&host, server, bulk_bytes, &mine, &stop);
                ended.inspect_err(|e| eprintln!("the {kind:?}: {e:#}"))
            });
            Client {
                kind,
                progress,
                thread,
            }
        });
        let clients = clients.collect();
        let traffic = Self { stop, clients };
        traffic.wait_progress();
        traffic
    }

    /// Waits until every client has moved on.
    ///
    /// # Panics
    /// One does not, or has ended.
    pub fn wait_progress(&self) {
        let moved = |c: &Client| c.progress.sample().bytes;
        let before: Vec<u64> = self.clients.iter().map(moved).collect();
        let mut standing = Vec::new();
        let waited = wait_until("every client moves on", PATIENCE, || {
            let clients = self.clients.iter().zip(&before);
            standing = clients
                .filter(|(c, before)| moved(c) <= **before && !c.thread.is_finished())
                .map(|(c, _)| c.kind)
                .collect();
            standing.is_empty()
        });
        waited.unwrap_or_else(|e| panic!("{e}: not {standing:?}"));
        if let Some(ended) = self.clients.iter().find(|c| c.thread.is_finished()) {
            panic!("the {:?} has ended", ended.kind);
        }
    }

    /// Tells all to end, waits for them, and has each be content: what each connection saw, by client.
    ///
    /// # Panics
    /// A client found something wrong.
    pub fn finish(self) -> Vec<(Kind, Vec<Outcome>)> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.clients.into_iter().map(|client| {
            let outcomes = client.thread.join().expect("a client does not panic");
            let kind = client.kind;
            let outcomes = outcomes.unwrap_or_else(|e| panic!("the {kind:?}: {e:#}"));
            assert!(!outcomes.is_empty(), "the {kind:?} had no connection");
            (kind, outcomes)
        });
        ended.collect()
    }
}
