//! The node's one clock: microseconds of CLOCK_BOOTTIME, which goes on while the machine sleeps
//! (R2: a lease must not outlive a suspend).

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point in time, in microseconds since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micros(pub u64);

impl Micros {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let t = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(t.tv_sec).expect("boot time is not negative");
        let nanos = u64::try_from(t.tv_nsec).expect("nanoseconds are not negative");
        Self(seconds * 1_000_000 + nanos / 1_000)
    }

    /// Time passed since `earlier`; zero if that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Micros {
    type Output = Self;

    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_micros()).unwrap_or(u64::MAX)))
    }
}
