//! The demonstration's clock, and transfers slowed down so that they live through every fault.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A rate that holds nothing back.
pub(crate) const UNLIMITED: u64 = u64::MAX;

/// Largest piece of a transfer, in bytes.
pub(crate) const PIECE_BYTES_MAX: usize = 64 * 1024;

/// Smallest piece: a full segment.
const PIECE_BYTES_MIN: u64 = 1448;

/// How long a piece lasts at the wanted rate.
const PIECE_US: u64 = 2_000;

/// Microseconds of the monotonic clock: the same for every process of this machine.
pub(crate) fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).expect("the clock starts at zero");
    let nanoseconds = u64::try_from(now.tv_nsec).expect("below a second");
    seconds * 1_000_000 + nanoseconds / 1_000
}

/// Microseconds as seconds.
pub(crate) fn seconds(us: u64) -> f64 {
    millions(us)
}

/// Bytes as megabytes.
pub(crate) fn millions(number: u64) -> f64 {
    float(number) / 1e6
}

/// A number for people and pictures, where its last digits do not matter.
#[expect(clippy::cast_precision_loss, reason = "its last digits do not matter")]
pub(crate) fn float(number: u64) -> f64 {
    number as f64
}

/// A rate in bytes a second that one thread sets and another keeps.
#[derive(Debug)]
pub(crate) struct Rate(AtomicU64);

impl Rate {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self(AtomicU64::new(bytes_per_second))
    }

    pub(crate) fn set(&self, bytes_per_second: u64) {
        self.0.store(bytes_per_second, Ordering::Relaxed);
    }

    fn bytes_per_second(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Spreads a transfer evenly. What a fault made late is not made up for.
pub(crate) struct Pacer {
    due_us: u64,
}

impl Pacer {
    pub(crate) fn new() -> Self {
        Self { due_us: 0 }
    }

    /// Waits until the next piece is due, and says how large it may be, in bytes: at least 1.
    pub(crate) fn wait(&mut self, rate: &Rate) -> usize {
        loop {
            let bytes_per_second = rate.bytes_per_second();
            if bytes_per_second == UNLIMITED {
                return PIECE_BYTES_MAX;
            }
            let now = now_us();
            if now >= self.due_us {
                self.due_us = self.due_us.max(now.saturating_sub(PIECE_US));
                return piece(bytes_per_second);
            }
            // In short naps, for the rate may change meanwhile.
            thread::sleep(Duration::from_micros((self.due_us - now).min(20_000)));
        }
    }

    /// Notes that a piece of `bytes` was done.
    pub(crate) fn done(&mut self, rate: &Rate, bytes: usize) {
        let bytes_per_second = rate.bytes_per_second().max(1);
        self.due_us += (bytes as u64).saturating_mul(1_000_000) / bytes_per_second;
    }
}

/// The largest piece at a rate, in bytes.
fn piece(bytes_per_second: u64) -> usize {
    let bytes = (bytes_per_second.saturating_mul(PIECE_US) / 1_000_000)
        .clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX as u64);
    usize::try_from(bytes).expect("at most 64 KiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_has_bounds() {
        assert_eq!(piece(1), 1448);
        assert_eq!(piece(5_000_000), 10_000);
        assert_eq!(piece(UNLIMITED), PIECE_BYTES_MAX);
    }

    #[test]
    fn a_short_piece_brings_the_next_one_sooner() {
        let rate = Rate::new(1_000_000);
        let mut pacer = Pacer::new();
        let most = pacer.wait(&rate);
        let before = pacer.due_us;
        pacer.done(&rate, most / 2);
        assert_eq!(pacer.due_us - before, most as u64 / 2);
    }
}
