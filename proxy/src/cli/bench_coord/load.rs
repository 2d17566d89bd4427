//! Closed-loop load: each connection keeps so many requests open, and one thread serves them all, so
//! that the generator takes as little of the machine from the servers as it can.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use unbroken_coord::wire::{ReplyHeader, Request, encode_request, xid};

use super::link::{Inbound, Link, get, set};

/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(30);

const READ_BYTES: usize = 64 << 10;

/// Session timeout of those that only make load.
pub(super) const LONG_SESSION: Duration = Duration::from_secs(30);

/// What a load found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
}

/// One connection and what is open on it.
struct Flow {
    stream: TcpStream,
    inbound: Inbound,
    outbound: Vec<u8>,
    /// Numbers of the open requests, and when each was sent.
    open: VecDeque<(i32, Instant)>,
    next_xid: i32,
    window: usize,
}

impl Flow {
    fn new(mut link: Link, window: usize) -> anyhow::Result<Self> {
        let next_xid = link.next_xid();
        link.stream.set_nonblocking(true)?;
        Ok(Self {
            stream: TcpStream::from_std(link.stream),
            inbound: Inbound::default(),
            outbound: Vec::new(),
            open: VecDeque::with_capacity(window),
            next_xid,
            window,
        })
    }

    /// Adds a request: a whole frame, of which the number is ours to set.
    fn ask(&mut self, frame: &[u8], now: Instant) {
        let start = self.outbound.len();
        self.outbound.extend_from_slice(frame);
        self.outbound[start + 4..start + 8].copy_from_slice(&self.next_xid.to_be_bytes());
        self.open.push_back((self.next_xid, now));
        self.next_xid += 1;
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outbound.is_empty() {
            match self.stream.write(&self.outbound) {
                Ok(count) => drop(self.outbound.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there; calls `answered` with the age of each request answered, in their order,
    /// and `told` for each event.
    fn read(
        &mut self,
        buffer: &mut [u8],
        mut answered: impl FnMut(Duration),
        mut told: impl FnMut(),
    ) -> anyhow::Result<()> {
        loop {
            let count = match self.inbound.fill(&mut self.stream, buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("a connection under load broke"),
            };
            let now = Instant::now();
            while let Some(frame) = self.inbound.next()? {
                let (header, _) = ReplyHeader::split(frame)?;
                match header.xid {
                    xid::NOTIFICATION => told(),
                    xid::PING => {}
                    number => {
                        let (expected, sent) = self
                            .open
                            .pop_front()
                            .context("an answer to nothing has come")?;
                        ensure!(
                            number == expected,
                            "answer {number} has come where {expected} was due"
                        );
                        ensure!(header.err.is_none(), "refused: {:?}", header.err);
                        answered(now - sent);
                    }
                }
            }
            if count < buffer.len() {
                return Ok(());
            }
        }
    }
}

/// What is asked again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Set the data of one of the keys.
    Set,
    /// Read one of the keys.
    Get,
}

/// Keys that the load goes over.
pub(super) const KEYS: usize = 1000;

pub(super) fn key(index: usize) -> String {
    format!("/bench/k{index:04}")
}

/// Data of each key.
pub(super) const VALUE: [u8; 100] = [b'x'; 100];

impl Work {
    fn frames(self) -> Vec<Vec<u8>> {
        let request = |index| match self {
            Self::Set => set(&key(index), &VALUE),
            Self::Get => get(&key(index), false),
        };
        (0..KEYS)
            .map(|index| encode_request(0, &request(index)).to_vec())
            .collect()
    }
}

/// Keeps `outstanding` requests open on `connections`, spread over `addresses`, for `duration`;
/// what comes before `warm` has passed does not count.
pub(super) fn load(
    addresses: &[SocketAddr],
    work: Work,
    connections: usize,
    outstanding: usize,
    warm: Duration,
    duration: Duration,
) -> anyhow::Result<Sample> {
    let mut poll = Poll::new()?;
    let mut flows = Vec::with_capacity(connections);
    for index in 0..connections {
        let link = Link::open(addresses[index % addresses.len()], LONG_SESSION)?;
        let window = outstanding / connections + usize::from(index < outstanding % connections);
        flows.push(register(&poll, Flow::new(link, window)?, index)?);
    }
    let frames = work.frames();
    // A fixed walk over the keys that is not their order.
    let mut turn = 0_usize;
    let mut next = || {
        turn = (turn + 617) % KEYS;
        &frames[turn]
    };
    let begin = Instant::now();
    let (count_from, end) = (begin + warm, begin + warm + duration);
    for flow in &mut flows {
        for _ in 0..flow.window {
            flow.ask(next(), begin);
        }
        flow.flush()?;
    }
    let mut took: Vec<u32> = Vec::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut events = Events::with_capacity(1024);
    loop {
        let now = Instant::now();
        if now >= end && flows.iter().all(|flow| flow.open.is_empty()) {
            break;
        }
        ensure!(now < end + PATIENCE, "the last answers do not come");
        wait(&mut poll, &mut events, Duration::from_millis(50))?;
        for event in &events {
            let flow = &mut flows[event.token().0];
            let counts = count_from <= Instant::now() && Instant::now() < end;
            flow.read(
                &mut buffer,
                |age| {
                    if counts {
                        took.push(u32::try_from(age.as_micros()).unwrap_or(u32::MAX));
                    }
                },
                || {},
            )?;
            let now = Instant::now();
            if now < end {
                for _ in flow.open.len()..flow.window {
                    flow.ask(next(), now);
                }
            }
            flow.flush()?;
        }
    }
    ensure!(!took.is_empty(), "nothing was answered in {duration:?}");
    took.sort_unstable();
    let count = u32::try_from(took.len())?;
    Ok(Sample {
        per_second: f64::from(count) / duration.as_secs_f64(),
        p50_ms: percentile_ms(&took, 50),
        p99_ms: percentile_ms(&took, 99),
    })
}

fn register(poll: &Poll, mut flow: Flow, index: usize) -> anyhow::Result<Flow> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    let registry = poll.registry();
    registry.register(&mut flow.stream, Token(index), interest)?;
    Ok(flow)
}

fn wait(poll: &mut Poll, events: &mut Events, patience: Duration) -> io::Result<()> {
    match poll.poll(events, Some(patience)) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        result => result,
    }
}

/// Of sorted microseconds that are at least one.
fn percentile_ms(sorted: &[u32], percent: usize) -> f64 {
    f64::from(sorted[(sorted.len() - 1) * percent / 100]) / 1000.0
}

/// `count` sessions watch one znode, again and again; another one changes it. From the write to the
/// last one told, in milliseconds, one figure for each round.
pub(super) fn fan_out(
    addresses: &[SocketAddr],
    count: usize,
    rounds: usize,
) -> anyhow::Result<Vec<f64>> {
    let mut poll = Poll::new()?;
    let mut flows = Vec::with_capacity(count);
    for index in 0..count {
        let mut link = Link::open(addresses[index % addresses.len()], LONG_SESSION)?;
        link.must(&Request::Sync { path: key(0) })?;
        flows.push(register(&poll, Flow::new(link, 1)?, index)?);
    }
    let mut writer = Link::open(addresses[0], LONG_SESSION)?;
    let watch = encode_request(0, &get(&key(0), true));
    let mut buffer = vec![0; READ_BYTES];
    let mut events = Events::with_capacity(1024);
    let mut figures = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        for flow in &mut flows {
            flow.ask(&watch, Instant::now());
            flow.flush()?;
        }
        let (mut answered, mut told) = (0, 0);
        let limit = Instant::now() + PATIENCE;
        let mut written = None;
        while told < count {
            ensure!(
                Instant::now() < limit,
                "{told} of {count} watchers were told"
            );
            if answered == count && written.is_none() {
                written = Some(Instant::now());
                writer.must(&set(&key(0), &VALUE))?;
            }
            wait(&mut poll, &mut events, Duration::from_millis(10))?;
            for event in &events {
                let flow = &mut flows[event.token().0];
                flow.read(&mut buffer, |_| answered += 1, || told += 1)?;
            }
        }
        let written = written.context("events came before the write")?;
        figures.push(written.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(figures)
}
