//! One client, and the longest that it had to wait.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use unbroken_tests::netns::Host;

use crate::pace::now_us;
use crate::payload::{Exchange, MESSAGE_BYTES, fill, request};
use crate::pulse::Ask;

/// Between two pulses, and between a request and the next, in microseconds.
const PACE_US: u64 = 1_000;

/// A client that waits for so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the client stands.
#[derive(Debug, Default)]
struct Wait {
    /// From here on it waits: when the next pulse is due, or when the request that is not answered was sent.
    since_us: Option<u64>,
    /// The longest since it was taken.
    longest_us: u64,
    moves: u64,
}

impl Wait {
    /// What it waited for came at `now`.
    fn over(&mut self, now: u64) {
        self.longest_us = self.longest_us.max(self.open(now));
        self.since_us = None;
        self.moves += 1;
    }

    fn open(&self, now: u64) -> u64 {
        self.since_us.map_or(0, |since| now.saturating_sub(since))
    }
}

/// A client on a thread of its own.
pub(super) struct Watched {
    name: &'static str,
    wait: Arc<Mutex<Wait>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watched {
    /// One that receives a pulse a millisecond: it waits from when the next one is due, a pace after the last that came.
    ///
    /// # Errors
    /// There is no connection.
    pub(super) fn receive(host: &Host, address: SocketAddr, seed: u64) -> Result<Self> {
        Self::start(
            "the receiving client",
            host,
            address,
            move |stream, wait, stop| receive(stream, seed, wait, stop),
        )
    }

    /// One that sends a request a millisecond: it waits from the request to its answer.
    ///
    /// # Errors
    /// There is no connection.
    pub(super) fn exchange(host: &Host, address: SocketAddr, seed: u64) -> Result<Self> {
        Self::start(
            "the asking client",
            host,
            address,
            move |stream, wait, stop| exchange(stream, seed, wait, stop),
        )
    }

    fn start(
        name: &'static str,
        host: &Host,
        address: SocketAddr,
        run: impl FnOnce(TcpStream, &Mutex<Wait>, &AtomicBool) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let stream = host.enter(|| TcpStream::connect_timeout(&address, PATIENCE));
        let stream = stream.with_context(|| format!("{name}: connecting to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (wait, stop) = (Arc::default(), Arc::default());
        let (theirs, told) = (Arc::clone(&wait), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(stream, &theirs, &told))?;
        Ok(Self {
            name,
            wait,
            stop,
            thread,
        })
    }

    /// How often it was given what it waited for.
    pub(super) fn moves(&self) -> u64 {
        lock(&self.wait).moves
    }

    /// For how long it has been waiting, in microseconds.
    pub(super) fn open_us(&self) -> u64 {
        lock(&self.wait).open(now_us())
    }

    /// The longest wait since the last call, the present one included, in microseconds.
    pub(super) fn take_us(&self) -> u64 {
        let mut wait = lock(&self.wait);
        let open = wait.open(now_us());
        std::mem::take(&mut wait.longest_us).max(open)
    }

    /// Whether it still runs; it does until it is ended or something is wrong.
    pub(super) fn runs(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Closes the connection.
    ///
    /// # Errors
    /// What was wrong with it.
    pub(super) fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(done) => done.context(self.name),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Reads pulses and compares every byte. Ends with a reset: a stream without an end has no other.
fn receive(mut stream: TcpStream, seed: u64, wait: &Mutex<Wait>, stop: &AtomicBool) -> Result<()> {
    let ask = Ask::Pulses {
        seed,
        start_us: now_us(),
        period_us: PACE_US,
    };
    stream.write_all(&ask.encode())?;
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    let mut buffer = vec![0; 64 * 1024];
    let mut should = Vec::new();
    let mut offset = 0;
    while !stop.load(Ordering::Relaxed) {
        let got = match stream.read(&mut buffer) {
            Ok(0) => bail!("the connection ended at byte {offset}"),
            Ok(got) => got,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("reading byte {offset}")),
        };
        let now = now_us();
        {
            let mut wait = lock(wait);
            wait.over(now);
            wait.since_us = Some(now + PACE_US);
        }
        should.resize(got, 0);
        fill(seed, offset, &mut should);
        let differs = buffer
            .iter()
            .zip(&should)
            .position(|(is, should)| is != should);
        if let Some(at) = differs {
            bail!("byte {} is wrong", offset + at as u64);
        }
        offset += got as u64;
    }
    Ok(())
}

/// Asks and compares every answer.
fn exchange(mut stream: TcpStream, seed: u64, wait: &Mutex<Wait>, stop: &AtomicBool) -> Result<()> {
    stream.write_all(&Ask::Exchange.encode())?;
    let mut state = Exchange::default();
    let mut answer = [0; MESSAGE_BYTES];
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let question = request(seed, number);
        let sent_us = now_us();
        lock(wait).since_us = Some(sent_us);
        let asked = stream.write_all(&question);
        asked.with_context(|| format!("sending request {number}"))?;
        let answered = stream.read_exact(&mut answer);
        answered.with_context(|| format!("reading answer {number}"))?;
        let now = now_us();
        lock(wait).over(now);
        if answer != state.answer(&question) {
            bail!("answer {number} is wrong");
        }
        number += 1;
        if let Some(early) = (sent_us + PACE_US).checked_sub(now) {
            thread::sleep(Duration::from_micros(early));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_is_kept_until_it_is_taken() {
        let mut wait = Wait {
            since_us: Some(10),
            ..Wait::default()
        };
        wait.over(60);
        wait.since_us = Some(70);
        wait.over(71);
        assert_eq!((wait.longest_us, wait.moves), (50, 2));
        wait.since_us = Some(100);
        assert_eq!(wait.open(90), 0, "not due yet");
        assert_eq!(wait.open(130), 30);
    }
}
