//! Time as the caller tells it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time in microseconds since an origin of the caller's choice, on a clock that never goes
/// back. std's `Instant` can be neither constructed, replayed nor written down.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Instant(u64);

impl Instant {
    /// The point `micros` microseconds after the origin.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// The point `millis` milliseconds after the origin.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis * 1_000)
    }

    /// Microseconds since the origin.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero if that lies ahead.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(micros_of(d)))
    }
}

impl std::ops::Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(micros_of(d)))
    }
}

/// A duration in whole microseconds.
pub(crate) fn micros_of(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// The group's **service clock** (R4): one clock for TSval, ISS and cookies across all leaders.
/// It read `value_us` at `at`, and runs on from there at the pace of [`Instant`]. A successor's must
/// start strictly above anything that an earlier leader can have emitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceClock {
    /// When it was read.
    pub at: Instant,
    /// What it read, in microseconds.
    pub value_us: u64,
}

impl ServiceClock {
    /// What it reads at `now`, in microseconds.
    pub fn read_us(&self, now: Instant) -> u64 {
        self.value_us + micros_of(now.since(self.at))
    }

    /// TSval at `now`: milliseconds, modulo 2^32 (RFC 7323 §5.4 asks for 1 ms to 1 s a tick).
    pub fn tsval(&self, now: Instant) -> u32 {
        low32(self.read_us(now) / 1_000)
    }
}

/// The low 32 bits: how a 64-bit count is written into a 32-bit field of the wire.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the wire's fields count modulo 2^32"
)]
pub(crate) const fn low32(v: u64) -> u32 {
    v as u32
}
