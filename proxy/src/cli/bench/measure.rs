//! Single measurements, from the client's side.

use std::io::{self, Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::protocol::{ECHO, PATTERN_BYTES, SEND, TAKE, header, pattern};

/// One thing that is measured.
#[derive(Debug)]
pub(super) enum Measurement {
    /// A request of so many bytes and its echo, one after the other.
    RoundTrip { bytes: usize },
    /// The server sends as fast as it can.
    Down,
    /// The client sends as fast as it can.
    Up,
}

/// Everything a round measures.
pub(super) const MEASUREMENTS: &[Measurement] = &[
    Measurement::RoundTrip { bytes: 64 },
    Measurement::RoundTrip { bytes: 1 << 10 },
    Measurement::RoundTrip { bytes: 16 << 10 },
    Measurement::Down,
    Measurement::Up,
];

/// What one measurement found: by name what stands in the report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Sample {
    /// Microseconds.
    RoundTrip {
        p50_us: f64,
        p99_us: f64,
        requests: u64,
    },
    /// Gigabits of payload a second.
    Bulk { gbps: f64, bytes: u64 },
}

/// How long a measurement goes on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) duration: Duration,
    /// Bulk: so many bytes on one connection, then a new one.
    pub(super) connection_bytes: u64,
}

/// A server that says nothing for so long is given up.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Round trips before the clock runs.
const WARM_UP: u32 = 32;

/// At most this many round trips are remembered: 8 MB.
const ROUND_TRIPS_MAX: usize = 1 << 20;

/// Bulk requests are of this size, two on their way at any time.
const BULK_PIECE_BYTES: u64 = 4 << 20;

impl Measurement {
    /// For people: "round trip 64 B".
    pub(super) fn title(&self) -> String {
        match self {
            Self::RoundTrip { bytes } if *bytes < 1024 => format!("round trip {bytes} B"),
            Self::RoundTrip { bytes } => format!("round trip {} KiB", bytes / 1024),
            Self::Down => "bulk down".to_owned(),
            Self::Up => "bulk up".to_owned(),
        }
    }

    /// For programs: "rtt_64".
    pub(super) fn key(&self) -> String {
        match self {
            Self::RoundTrip { bytes } => format!("rtt_{bytes}"),
            Self::Down => "bulk_down".to_owned(),
            Self::Up => "bulk_up".to_owned(),
        }
    }

    /// Measures once.
    pub(super) fn run(&self, address: SocketAddr, limits: Limits) -> anyhow::Result<Sample> {
        match self {
            Self::RoundTrip { bytes } => round_trips(address, *bytes, limits),
            Self::Down => bulk(address, limits, download),
            Self::Up => bulk(address, limits, upload),
        }
    }
}

fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

fn round_trips(address: SocketAddr, bytes: usize, limits: Limits) -> anyhow::Result<Sample> {
    let mut stream = connect(address)?;
    let payload = &pattern()[..bytes];
    let request = [&header(ECHO, bytes as u64), payload].concat();
    let mut answer = vec![0; bytes];
    let mut once = || -> anyhow::Result<Duration> {
        let start = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        let took = start.elapsed();
        ensure!(answer == payload, "the echo differs from what was sent");
        Ok(took)
    };
    for _ in 0..WARM_UP {
        once()?;
    }
    let mut took = Vec::new();
    let end = Instant::now() + limits.duration;
    while Instant::now() < end && took.len() < ROUND_TRIPS_MAX {
        took.push(once()?);
    }
    took.sort_unstable();
    Ok(Sample::RoundTrip {
        p50_us: percentile_us(&took, 50),
        p99_us: percentile_us(&took, 99),
        requests: took.len() as u64 + u64::from(WARM_UP),
    })
}

/// The nearest-rank percentile of sorted durations, 0 of none.
pub(super) fn percentile_us(sorted: &[Duration], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted
        .get(rank - 1)
        .map_or(0.0, |took| took.as_secs_f64() * 1e6)
}

/// Repeats `transfer` on fresh connections until the time is over. Connecting is not counted.
fn bulk(
    address: SocketAddr,
    limits: Limits,
    transfer: fn(&TcpStream, Limits) -> anyhow::Result<u64>,
) -> anyhow::Result<Sample> {
    let (mut bytes, mut took) = (0_u64, Duration::ZERO);
    while took < limits.duration {
        let stream = connect(address)?;
        let left = Limits {
            duration: limits.duration - took,
            ..limits
        };
        let start = Instant::now();
        bytes += transfer(&stream, left)?;
        took += start.elapsed();
    }
    Ok(Sample::Bulk {
        gbps: figure(bytes) * 8.0 / took.as_secs_f64() / 1e9,
        bytes,
    })
}

/// A count as a figure to divide.
#[expect(
    clippy::cast_precision_loss,
    reason = "15 digits are more than a benchmark has"
)]
pub(super) fn figure(count: u64) -> f64 {
    count as f64
}

/// Two requests are always on their way, so that the server never waits for the next.
fn download(mut stream: &TcpStream, limits: Limits) -> anyhow::Result<u64> {
    let piece = BULK_PIECE_BYTES.min(limits.connection_bytes);
    let pattern = pattern();
    let mut buffer = vec![0; PATTERN_BYTES];
    let end = Instant::now() + limits.duration;
    let (mut asked, mut received) = (0, 0);
    loop {
        while asked - received < 2 * piece
            && asked < limits.connection_bytes
            && (asked == 0 || Instant::now() < end)
        {
            stream.write_all(&header(SEND, piece))?;
            asked += piece;
        }
        if received == asked {
            return Ok(received);
        }
        let mut left = piece;
        while left > 0 {
            let want = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(PATTERN_BYTES);
            stream.read_exact(&mut buffer[..want])?;
            ensure!(
                buffer[..want] == pattern[..want],
                "what came differs from what was sent"
            );
            left -= want as u64;
        }
        received += piece;
    }
}

/// Sends without waiting; another thread takes the checksums.
fn upload(stream: &TcpStream, limits: Limits) -> anyhow::Result<u64> {
    let piece = BULK_PIECE_BYTES.min(limits.connection_bytes);
    let block = pattern();
    let expected = checksum(&block, piece);
    std::thread::scope(|scope| {
        let (announce, announced) = std::sync::mpsc::channel::<()>();
        let answers = scope.spawn(move || -> anyhow::Result<u64> {
            let mut reader = stream;
            let mut confirmed = 0;
            for () in announced {
                let mut answer = [0; 4];
                reader.read_exact(&mut answer)?;
                let answer = u32::from_be_bytes(answer);
                ensure!(
                    answer == expected,
                    "the server's checksum is {answer:08x}, not {expected:08x}"
                );
                confirmed += piece;
            }
            Ok(confirmed)
        });
        let end = Instant::now() + limits.duration;
        let mut sent = 0;
        let written = loop {
            if sent > 0 && (Instant::now() >= end || sent >= limits.connection_bytes) {
                break Ok(());
            }
            if let Err(error) = send_piece(stream, piece, &block) {
                break Err(error);
            }
            sent += piece;
            // The thread is gone if a checksum was wrong; it says so below.
            let _ = announce.send(());
        };
        drop(announce);
        let confirmed = answers.join().expect("the thread does not panic")?;
        written.context("sending")?;
        Ok(confirmed)
    })
}

fn send_piece(mut stream: &TcpStream, length: u64, block: &[u8]) -> io::Result<()> {
    stream.write_all(&header(TAKE, length))?;
    let mut left = length;
    while left > 0 {
        let piece = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
        stream.write_all(&block[..piece])?;
        left -= piece as u64;
    }
    Ok(())
}

/// CRC-32C of `length` bytes made of `block` over and over.
fn checksum(block: &[u8], length: u64) -> u32 {
    let (mut left, mut checksum) = (length, 0);
    while left > 0 {
        let piece = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
        checksum = crc32c::crc32c_append(checksum, &block[..piece]);
        left -= piece as u64;
    }
    checksum
}
