//! One client program with thousands of connections: one half receives, the other asks.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use unbroken_tests::netns::Host;

use crate::pace::now_us;
use crate::payload::{Exchange, MESSAGE_BYTES, fill, request};
use crate::pulse::{Ask, PULSE_BYTES};

/// Between two pulses, and between a request and the next, on one connection.
const PACE_US: u64 = 400_000;

/// What one connection has seen since the moment that is asked about.
#[derive(Debug, Default)]
struct Seen {
    /// When the first thing came that was due, or was asked for, after the moment; 0: not yet.
    moved_us: AtomicU64,
    /// The longest that something was waited for, counted from when it was due (a pulse) or asked for, and from the moment
    /// on.
    waited_us: AtomicU64,
}

#[derive(Debug, Default)]
struct Shared {
    /// The moment.
    from_us: AtomicU64,
    connected: AtomicUsize,
    stop: AtomicBool,
    failure: Mutex<Option<String>>,
    seen: Vec<Seen>,
}

impl Shared {
    /// Something came on a connection that was due at `due_us`.
    fn came(&self, index: usize, due_us: u64) {
        let now = now_us();
        let from = self.from_us.load(Ordering::Relaxed);
        let seen = &self.seen[index];
        if now >= from {
            let waited = now.saturating_sub(due_us.max(from));
            seen.waited_us.fetch_max(waited, Ordering::Relaxed);
        }
        if due_us >= from && seen.moved_us.load(Ordering::Relaxed) == 0 {
            seen.moved_us.store(now, Ordering::Relaxed);
        }
    }
}

/// How long each connection waited from a moment on, in microseconds.
#[derive(Debug, Clone)]
pub(super) struct Waited {
    /// Those that receive.
    pub(super) receiving_us: Vec<u64>,
    /// Those that ask.
    pub(super) asking_us: Vec<u64>,
}

/// The program: one thread on the client's host.
pub(super) struct Crowd {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

impl Crowd {
    /// Begins to open `count` connections, one after the other.
    ///
    /// # Errors
    /// There is no thread.
    pub(super) fn start(host: &Host, address: SocketAddr, count: usize) -> Result<Self> {
        let seen = std::iter::repeat_with(Seen::default).take(count);
        let shared = Arc::new(Shared {
            seen: seen.collect(),
            ..Shared::default()
        });
        let (host, theirs) = (host.clone(), Arc::clone(&shared));
        let thread = thread::Builder::new()
            .name("crowd".to_owned())
            .spawn(move || host.enter(|| run(&theirs, address)))?;
        Ok(Self { shared, thread })
    }

    /// How many connections are open.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) fn connected(&self) -> Result<usize> {
        let failure = self.shared.failure.lock();
        if let Some(why) = &*failure.unwrap_or_else(PoisonError::into_inner) {
            bail!("{why}");
        }
        if self.thread.is_finished() {
            bail!("the clients have ended by themselves");
        }
        Ok(self.shared.connected.load(Ordering::Relaxed))
    }

    /// Asks about this moment from now on.
    pub(super) fn mark(&self) {
        // Until everything is cleared nothing is of the moment.
        self.shared.from_us.store(u64::MAX, Ordering::Relaxed);
        for seen in &self.shared.seen {
            seen.waited_us.store(0, Ordering::Relaxed);
            seen.moved_us.store(0, Ordering::Relaxed);
        }
        self.shared.from_us.store(now_us(), Ordering::Relaxed);
    }

    /// How many have moved since the moment.
    pub(super) fn moved(&self) -> usize {
        let seen = self.shared.seen.iter();
        let moved = seen.filter(|seen| seen.moved_us.load(Ordering::Relaxed) != 0);
        moved.count()
    }

    /// What the moment did; all have moved.
    pub(super) fn take(&self) -> Waited {
        let waited = |odd: usize| {
            let of = self.shared.seen.iter().skip(odd).step_by(2);
            of.map(|seen| seen.waited_us.load(Ordering::Relaxed))
                .collect()
        };
        Waited {
            receiving_us: waited(0),
            asking_us: waited(1),
        }
    }

    /// Closes every connection.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) fn end(self) -> Result<()> {
        self.connected()?;
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn run(shared: &Arc<Shared>, address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for index in 0..shared.seen.len() {
            let stream = TcpStream::connect(address).await;
            let stream = stream.with_context(|| format!("connection {index}"))?;
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                if let Err(error) = one(&shared, index, stream).await {
                    let failure = shared.failure.lock();
                    let mut failure = failure.unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert_with(|| format!("connection {index}: {error}"));
                }
            });
        }
        while !shared.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    })
}

async fn one(shared: &Shared, index: usize, stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    if index.is_multiple_of(2) {
        receive(shared, index, stream).await
    } else {
        exchange(shared, index, stream).await
    }
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

async fn receive(shared: &Shared, index: usize, mut stream: TcpStream) -> std::io::Result<()> {
    let (seed, start_us) = (index as u64, now_us());
    let ask = Ask::Pulses {
        seed,
        start_us,
        period_us: PACE_US,
    };
    stream.write_all(&ask.encode()).await?;
    let mut is = [0; 1024];
    let mut should = [0; 1024];
    let mut offset = 0;
    loop {
        let got = stream.read(&mut is).await?;
        if got == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if offset == 0 {
            shared.connected.fetch_add(1, Ordering::Relaxed);
        }
        fill(seed, offset, &mut should[..got]);
        if is[..got] != should[..got] {
            return Err(wrong(format!("wrong from byte {offset} on")));
        }
        let first = offset / PULSE_BYTES;
        offset += got as u64;
        let last = (offset - 1) / PULSE_BYTES;
        for pulse in [first, last] {
            shared.came(index, start_us + pulse * PACE_US);
        }
    }
}

async fn exchange(shared: &Shared, index: usize, mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(&Ask::Exchange.encode()).await?;
    let mut state = Exchange::default();
    let mut answer = [0; MESSAGE_BYTES];
    let mut number = 0;
    loop {
        let question = request(index as u64, number);
        let sent_us = now_us();
        stream.write_all(&question).await?;
        stream.read_exact(&mut answer).await?;
        if number == 0 {
            shared.connected.fetch_add(1, Ordering::Relaxed);
        }
        if answer != state.answer(&question) {
            return Err(wrong(format!("answer {number} is wrong")));
        }
        shared.came(index, sent_us);
        number += 1;
        let next_us = sent_us + PACE_US;
        if let Some(early) = next_us.checked_sub(now_us()) {
            tokio::time::sleep(Duration::from_micros(early)).await;
        }
    }
}
