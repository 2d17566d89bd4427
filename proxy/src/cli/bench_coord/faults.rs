//! What faults cost: the death of a leader, and silent sessions.

use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use unbroken_coord::wire::{CreateMode, Request};

use super::link::{Expired, Link, create, set};
use super::load::{LONG_SESSION, VALUE, key};

/// A writer that hears nothing for this long tries the next server.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// How long a run waits for writes to be acknowledged again.
const RECOVERY_MAX: Duration = Duration::from_secs(40);

/// One session on each server writes, one write at a time; meanwhile `fault` happens. The longest
/// time in which no write was acknowledged to anybody, in milliseconds.
pub(super) fn gap(
    addresses: &[SocketAddr],
    fault: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let writers: Vec<_> = (0..addresses.len())
        .map(|first| {
            let (addresses, stop) = (addresses.to_vec(), stop.clone());
            let acknowledged = acknowledged.clone();
            std::thread::spawn(move || write_on(&addresses, first, &stop, &acknowledged))
        })
        .collect();
    let result = (|| {
        std::thread::sleep(Duration::from_millis(500));
        let last = |acknowledged: &Mutex<Vec<Instant>>| {
            let acknowledged = acknowledged.lock().expect("writers do not panic");
            acknowledged.last().copied()
        };
        last(&acknowledged).context("no write is acknowledged")?;
        let struck = Instant::now();
        fault()?;
        // Those on the dead server come back a little later than the others.
        let settle = Duration::from_millis(500);
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let times = acknowledged.lock().expect("writers do not panic");
            let since = |window: Duration| times.iter().filter(|at| at.elapsed() < window).count();
            if struck.elapsed() > 2 * settle && since(settle) > 20 {
                break;
            }
            ensure!(
                struck.elapsed() < RECOVERY_MAX,
                "no write was acknowledged within {RECOVERY_MAX:?} of the fault"
            );
        }
        let mut times = acknowledged.lock().expect("writers do not panic").clone();
        times.retain(|at| *at + Duration::from_millis(200) > struck);
        times.sort_unstable();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max();
        Ok(longest.unwrap_or_default().as_secs_f64() * 1000.0)
    })();
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        let _ = writer.join();
    }
    result
}

/// Writes until it is stopped, wherever it can.
fn write_on(
    addresses: &[SocketAddr],
    first: usize,
    stop: &AtomicBool,
    acknowledged: &Mutex<Vec<Instant>>,
) {
    let request = set(&key(first), &VALUE);
    let mut next = first;
    let mut credentials = None;
    while !stop.load(Ordering::Relaxed) {
        let address = addresses[next % addresses.len()];
        let link = match credentials.take() {
            Some(known) => Link::resume(address, LONG_SESSION, known),
            None => Link::open(address, LONG_SESSION),
        };
        let Ok(mut link) = link else {
            next += 1;
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let _ = link.stream.set_read_timeout(Some(ANSWER_MAX));
        while !stop.load(Ordering::Relaxed) && matches!(link.call(&request), Ok(None)) {
            let now = Instant::now();
            if let Ok(mut acknowledged) = acknowledged.lock() {
                acknowledged.push(now);
            }
        }
        credentials = Some(link.credentials);
        next += 1;
    }
}

/// What silent sessions found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expiry {
    /// Session timeout that the server granted, in milliseconds.
    pub(super) granted_ms: f64,
    /// How much later than that the sessions' znodes were gone: the middle one and the last one, in
    /// milliseconds.
    pub(super) late_p50_ms: f64,
    pub(super) late_max_ms: f64,
}

/// Timeouts below this are measured one session after the other; longer ones all together, because
/// nobody wants to wait for that.
const TOGETHER: Duration = Duration::from_millis(500);

/// `count` sessions of `timeout` go silent; another one waits for the end of what they leave.
pub(super) fn expiry(
    addresses: &[SocketAddr],
    timeout: Duration,
    count: usize,
) -> anyhow::Result<Expiry> {
    let mut observer = Link::open(addresses[0], LONG_SESSION)?;
    let granted = Link::open(addresses[0], timeout)?.granted;
    let mut late = Vec::with_capacity(count);
    if granted < TOGETHER {
        for index in 0..count {
            late.extend(silence(&mut observer, addresses, timeout, index, 1)?);
        }
    } else {
        late = silence(&mut observer, addresses, timeout, 0, count)?;
    }
    late.sort_unstable_by(f64::total_cmp);
    Ok(Expiry {
        granted_ms: granted.as_secs_f64() * 1000.0,
        late_p50_ms: late[late.len() / 2],
        late_max_ms: late[late.len() - 1],
    })
}

/// Ends `count` connections without a word. How much later than granted their znodes were gone.
fn silence(
    observer: &mut Link,
    addresses: &[SocketAddr],
    timeout: Duration,
    first: usize,
    count: usize,
) -> anyhow::Result<Vec<f64>> {
    let mut silent = Vec::new();
    let mut granted = timeout;
    for index in first..first + count {
        let mut victim = Link::open(addresses[index % addresses.len()], timeout)?;
        granted = victim.granted;
        let path = format!("/bench/silent-{}", victim.credentials.session);
        victim.must(&create(&path, b"", CreateMode::Ephemeral))?;
        observer.must(&Request::Sync { path: path.clone() })?;
        let watch = Request::Exists {
            path: path.clone(),
            watch: true,
        };
        observer.must(&watch)?;
        victim.ping()?;
        silent.push((path, Instant::now()));
    }
    let patience = granted * 3 + Duration::from_secs(5);
    observer.stream.set_read_timeout(Some(patience))?;
    let mut late = Vec::with_capacity(count);
    while late.len() < count {
        let path = observer.event().context("a silent session did not end")?;
        let (_, since) = silent
            .iter()
            .find(|(silent, _)| *silent == path)
            .with_context(|| format!("an event of {path}"))?;
        late.push((since.elapsed().as_secs_f64() - granted.as_secs_f64()) * 1000.0);
    }
    Ok(late)
}

/// What sessions that said something in time found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// Sessions that were ended all the same.
    pub(super) lost: u32,
    /// The longest time between two of our own pings, in milliseconds: sessions that end in one above
    /// their timeout are our fault.
    pub(super) own_gap_ms: f64,
}

/// Keeps `count` sessions of `timeout`, with a ping three times in it, until `stop`.
pub(super) fn hold(
    addresses: &[SocketAddr],
    timeout: Duration,
    count: usize,
    stop: &AtomicBool,
) -> anyhow::Result<Held> {
    let open = |address| -> anyhow::Result<Link> {
        let link = Link::open(address, timeout)?;
        link.stream.set_nonblocking(true)?;
        Ok(link)
    };
    let mut links = Vec::with_capacity(count);
    let mut granted = timeout;
    let mut lost = 0;
    let mut buffer = [0; 4096];
    let mut next = Instant::now();
    let mut pinged: Option<Instant> = None;
    let mut own_gap = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        // Opened one at a time, so that the first does not wait for the last.
        if links.len() < count {
            let address = addresses[links.len() % addresses.len()];
            let link = open(address)?;
            granted = link.granted;
            links.push((address, link));
        }
        for (address, link) in &mut links {
            let answers = loop {
                match link.stream.read(&mut buffer) {
                    Ok(0) => break false,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
                    Err(_) => break false,
                }
            };
            if answers && link.ping().is_ok() {
                continue;
            }
            match Link::resume(*address, timeout, link.credentials.clone()) {
                Ok(resumed) => {
                    resumed.stream.set_nonblocking(true)?;
                    *link = resumed;
                }
                Err(error) if error.is::<Expired>() => {
                    lost += 1;
                    *link = open(*address)?;
                }
                Err(error) => return Err(error).context("a session could not come back"),
            }
        }
        if links.len() == count {
            own_gap = own_gap.max(pinged.map_or(Duration::ZERO, |at| at.elapsed()));
            pinged = Some(Instant::now());
            next = (next + granted / 3).max(Instant::now());
            std::thread::sleep(next - Instant::now());
        }
    }
    Ok(Held {
        lost,
        own_gap_ms: own_gap.as_secs_f64() * 1000.0,
    })
}
