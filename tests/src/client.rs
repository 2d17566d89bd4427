//! Clients that verify: plain blocking TCP of the kernel, for the server of [`crate::server`].
//!
//! Each takes a connected stream (made within [`crate::netns::Host::enter`], it stays on that host),
//! tells its [`Progress`] as it goes, and ends with an [`Outcome`] or the first thing that was wrong:
//! a byte that differs, an error of the connection, or no progress for as long as its patience.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};
use thiserror::Error;

use crate::pattern;
use crate::server::{DIGEST_LEN, Request};

/// Bytes moved by one read or write.
const CHUNK: usize = 64 * 1024;

/// How long a client waits for the next byte before it gives up (30 s without progress fail).
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why a client is not content.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection failed.
    #[error("connection failed after {bytes} bytes: {source}")]
    Connection {
        /// Bytes moved before.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No progress for as long as the client's patience.
    #[error("no progress for {after:?} after {bytes} bytes")]
    Stalled {
        /// Bytes moved before.
        bytes: u64,
        /// The client's patience.
        after: Duration,
    },
    /// A wrong byte arrived.
    #[error("the byte at offset {offset} is wrong")]
    Wrong {
        /// The stream offset of the first byte that differs.
        offset: u64,
    },
    /// The stream ended too early, or did not end where it should.
    #[error("the stream ended at {ended} instead of {expected}")]
    Length {
        /// Bytes that came.
        ended: u64,
        /// Bytes that should have come; more came if this is the smaller.
        expected: u64,
    },
    /// The server's digest of what it received differs from ours.
    #[error("the server has received something else than was sent (digests differ)")]
    Digest,
}

/// What a client has done so far; shared with whoever watches.
#[derive(Debug)]
pub struct Progress {
    start: Instant,
    bytes: AtomicU64,
    operations: AtomicU64,
    /// Microseconds from `start` to the latest progress.
    latest_us: AtomicU64,
    longest_gap_us: AtomicU64,
    /// The longest gap since it was last taken.
    recent_gap_us: AtomicU64,
    finished: AtomicBool,
}

/// A look at a [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Since the client began.
    pub elapsed: Duration,
    /// Payload bytes moved and, for what is received, verified.
    pub bytes: u64,
    /// Requests answered.
    pub operations: u64,
    /// The longest time without progress, the present one included.
    pub longest_gap: Duration,
    /// Whether the client has ended, well or not.
    pub finished: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            bytes: AtomicU64::new(0),
            operations: AtomicU64::new(0),
            latest_us: AtomicU64::new(0),
            longest_gap_us: AtomicU64::new(0),
            recent_gap_us: AtomicU64::new(0),
            finished: AtomicBool::new(false),
        }
    }
}

impl Progress {
    /// A progress that starts now.
    #[must_use]
    pub fn shared() -> Arc<Self> {
        Arc::default()
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Notes progress of `bytes` bytes and `operations` operations, now.
    pub fn record(&self, bytes: u64, operations: u64) {
        let now = self.now_us();
        let gap = now.saturating_sub(self.latest_us.swap(now, Ordering::Relaxed));
        self.longest_gap_us.fetch_max(gap, Ordering::Relaxed);
        self.recent_gap_us.fetch_max(gap, Ordering::Relaxed);
        self.operations.fetch_add(operations, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes the end: no gap grows any more.
    pub fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
    }

    fn open_gap_us(&self) -> u64 {
        if self.finished.load(Ordering::Relaxed) {
            return 0;
        }
        self.now_us()
            .saturating_sub(self.latest_us.load(Ordering::Relaxed))
    }

    /// How it stands.
    #[must_use]
    pub fn sample(&self) -> Sample {
        let gap = self
            .longest_gap_us
            .load(Ordering::Relaxed)
            .max(self.open_gap_us());
        Sample {
            elapsed: self.start.elapsed(),
            bytes: self.bytes.load(Ordering::Relaxed),
            operations: self.operations.load(Ordering::Relaxed),
            longest_gap: Duration::from_micros(gap),
            finished: self.finished.load(Ordering::Relaxed),
        }
    }

    /// The longest gap since this was last called, the present one included: call it before and some
    /// time after a fault to learn what the fault cost this client.
    pub fn take_recent_gap(&self) -> Duration {
        let closed = self.recent_gap_us.swap(0, Ordering::Relaxed);
        Duration::from_micros(closed.max(self.open_gap_us()))
    }
}

/// What a client that is content has seen.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Payload bytes moved.
    pub bytes: u64,
    /// SHA-256 of the payload: of what was downloaded, uploaded, or answered.
    pub sha256: [u8; DIGEST_LEN],
    /// From the first byte to the last.
    pub elapsed: Duration,
    /// The longest time without progress.
    pub longest_gap: Duration,
    /// Time of each request from its first byte to its answer's last, in order; empty for bulk.
    pub latencies: Vec<Duration>,
}

/// What all clients have in common.
struct Client {
    stream: TcpStream,
    progress: Arc<Progress>,
    start: Instant,
    bytes: u64,
    digest: Context,
    /// Bytes a second, if it is to go slower than it could.
    rate: Option<u64>,
}

impl Client {
    fn new(
        stream: TcpStream,
        progress: &Arc<Progress>,
        rate: Option<u64>,
    ) -> Result<Self, ClientError> {
        let configure = || {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)
        };
        configure().map_err(|source| ClientError::Connection { bytes: 0, source })?;
        let (progress, digest) = (Arc::clone(progress), Context::new(&SHA256));
        Ok(Self {
            stream,
            progress,
            start: Instant::now(),
            bytes: 0,
            digest,
            rate,
        })
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let bytes = self.bytes;
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Stalled {
                bytes,
                after: PATIENCE,
            },
            _ => ClientError::Connection { bytes, source },
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ClientError> {
        loop {
            match self.stream.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map_err(|e| self.failed(e)),
            }
        }
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ClientError> {
        self.stream.read_exact(buffer).map_err(|e| self.failed(e))
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.stream.write_all(bytes).map_err(|e| self.failed(e))
    }

    /// Counts payload that was moved and waits until it was not moved too fast.
    fn moved(&mut self, payload: &[u8]) {
        self.digest.update(payload);
        self.bytes += payload.len() as u64;
        self.progress.record(payload.len() as u64, 0);
        if let Some(rate) = self.rate {
            let due = Duration::from_secs_f64(self.bytes as f64 / rate as f64);
            if let Some(ahead) = due.checked_sub(self.start.elapsed()) {
                std::thread::sleep(ahead);
            }
        }
    }

    /// Waits for the server's end of the stream, beyond which nothing may come.
    fn expect_end(&mut self) -> Result<(), ClientError> {
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(ClientError::Length {
                ended: self.bytes + 1,
                expected: self.bytes,
            }),
        }
    }

    fn outcome(&self, latencies: Vec<Duration>) -> Outcome {
        self.progress.finish();
        Outcome {
            bytes: self.bytes,
            sha256: digest_of(&self.digest),
            elapsed: self.start.elapsed(),
            longest_gap: self.progress.sample().longest_gap,
            latencies,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.progress.finish();
    }
}

fn digest_of(context: &Context) -> [u8; DIGEST_LEN] {
    context
        .clone()
        .finish()
        .as_ref()
        .try_into()
        .expect("SHA-256 has 32 bytes")
}

/// Downloads `length` bytes of stream `seed`, verifying each, at most `rate` bytes a second; the server
/// closes first.
///
/// # Errors
/// The first thing that is wrong.
pub fn download(
    stream: TcpStream,
    seed: u64,
    length: u64,
    rate: Option<u64>,
    progress: &Arc<Progress>,
) -> Result<Outcome, ClientError> {
    let mut client = Client::new(stream, progress, rate)?;
    client.write_all(&Request::Download { seed, length }.encode())?;
    let mut buffer = vec![0; CHUNK];
    while client.bytes < length {
        let n = client.read(&mut buffer)?;
        if n == 0 {
            return Err(ClientError::Length {
                ended: client.bytes,
                expected: length,
            });
        }
        if let Some(offset) = pattern::first_difference(seed, client.bytes, &buffer[..n]) {
            return Err(ClientError::Wrong { offset });
        }
        client.moved(&buffer[..n]);
    }
    if client.bytes > length {
        return Err(ClientError::Length {
            ended: client.bytes,
            expected: length,
        });
    }
    client.expect_end()?;
    Ok(client.outcome(Vec::new()))
}

/// Uploads `length` bytes of stream `seed`, at most `rate` bytes a second, closes its side, and compares
/// the digest that the server answers.
///
/// # Errors
/// The first thing that is wrong.
pub fn upload(
    stream: TcpStream,
    seed: u64,
    length: u64,
    rate: Option<u64>,
    progress: &Arc<Progress>,
) -> Result<Outcome, ClientError> {
    let mut client = Client::new(stream, progress, rate)?;
    client.write_all(&Request::Upload { length }.encode())?;
    let mut buffer = vec![0; CHUNK];
    while client.bytes < length {
        let left = usize::try_from(length - client.bytes).unwrap_or(usize::MAX);
        let chunk = &mut buffer[..CHUNK.min(left)];
        pattern::fill(seed, client.bytes, chunk);
        client.write_all(chunk)?;
        client.moved(chunk);
    }
    client
        .stream
        .shutdown(Shutdown::Write)
        .map_err(|e| client.failed(e))?;
    let mut digest = [0; DIGEST_LEN];
    client.read_exact(&mut digest)?;
    if digest != digest_of(&client.digest) {
        return Err(ClientError::Digest);
    }
    client.expect_end()?;
    Ok(client.outcome(Vec::new()))
}

/// Sends a request of `size` bytes every `period` (or as soon as the last is answered, if that is later)
/// until `more` says no, and verifies each answer, which depends on all requests so far: one that was
/// lost or executed twice is found out.
///
/// # Errors
/// The first thing that is wrong.
///
/// # Panics
/// If `size` is below [`DIGEST_LEN`].
pub fn exchange(
    stream: TcpStream,
    size: u32,
    period: Duration,
    progress: &Arc<Progress>,
    mut more: impl FnMut() -> bool,
) -> Result<Outcome, ClientError> {
    let length = usize::try_from(size).expect("32 bits");
    assert!(length >= DIGEST_LEN, "a request has room for a digest");
    let mut client = Client::new(stream, progress, None)?;
    client.write_all(&Request::Exchange { size }.encode())?;
    let (mut request, mut answer) = (vec![0; length], vec![0; length]);
    let mut asked = Context::new(&SHA256);
    let mut latencies = Vec::new();
    let mut due = Instant::now();
    while more() {
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(early);
        }
        due = (due + period).max(Instant::now());
        pattern::fill(u64::from(size), client.bytes, &mut request);
        asked.update(&request);
        let begun = Instant::now();
        client.write_all(&request)?;
        client.read_exact(&mut answer)?;
        latencies.push(begun.elapsed());
        request[..DIGEST_LEN].copy_from_slice(&digest_of(&asked));
        if let Some(at) = request.iter().zip(&answer).position(|(a, b)| a != b) {
            return Err(ClientError::Wrong {
                offset: client.bytes + at as u64,
            });
        }
        client.moved(&answer);
        client.progress.record(0, 1);
    }
    client
        .stream
        .shutdown(Shutdown::Write)
        .map_err(|e| client.failed(e))?;
    client.expect_end()?;
    Ok(client.outcome(latencies))
}
