//! What a server counts and times, for dashboards.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::time::as_micros;

/// How often something took how long.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Histogram {
    counts: [u64; Self::BOUNDS_US.len() + 1],
    sum_us: u64,
    max_us: u64,
}

impl Histogram {
    /// Upper bounds of the buckets, in microseconds; one more bucket takes what is longer.
    pub const BOUNDS_US: [u64; 15] = [
        50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
        1_000_000, 5_000_000,
    ];

    /// Counts one that took so long.
    pub fn add(&mut self, took: Duration) {
        let us = as_micros(took);
        let bucket = Self::BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[bucket] += 1;
        self.sum_us = self.sum_us.saturating_add(us);
        self.max_us = self.max_us.max(us);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long all of them took together.
    #[must_use]
    pub const fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us)
    }

    /// The longest.
    #[must_use]
    pub const fn max(&self) -> Duration {
        Duration::from_micros(self.max_us)
    }

    /// How long one took on average; nothing if there was none.
    #[must_use]
    pub fn average(&self) -> Duration {
        Duration::from_micros(self.sum_us / self.count().max(1))
    }

    /// For each bound, how many took no longer, as Prometheus counts; those beyond the last bound are
    /// in [`Histogram::count`] alone.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> {
        let mut sum = 0;
        Self::BOUNDS_US
            .into_iter()
            .zip(self.counts)
            .map(move |(bound, count)| {
                sum += count;
                (Duration::from_micros(bound), sum)
            })
    }
}

/// What a server has counted since its start, and how much waits in it now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Metrics {
    /// Syncs of the log to the disk. Each makes everything durable that came during the one before.
    pub sync: Histogram,
    /// Writes from their being asked of the disk until they are durable: a sync, and the wait for it.
    pub durable: Histogram,
    /// Writes of this server's clients, from their arrival until they were applied here.
    pub write: Histogram,
    /// All other requests but pings, from their arrival until they were answered.
    pub read: Histogram,
    /// Requests by operation, in ZooKeeper's short names.
    pub requests: BTreeMap<&'static str, u64>,
    /// Bytes of clients' frames.
    pub bytes_received: u64,
    /// Watch events sent to clients.
    pub events_sent: u64,
    /// Clients that have connected.
    pub connections_opened: u64,
    /// Clients that were cut off because they did not read what they were sent.
    pub slow_clients_cut: u64,
    /// Clients that failed to prove who they are.
    pub auth_failed: u64,
    /// Sessions of the cluster that have ended by their silence while this server ran.
    pub sessions_expired: u64,
    /// Bytes on their way to clients now.
    pub outbound_bytes: u64,
    /// Bytes on their way to the other servers now.
    pub peer_backlog_bytes: u64,
    /// Writes that the disk does not have yet.
    pub writes_not_durable: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_up_to_and_with_its_bounds() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.average(), Duration::ZERO);
        for us in [0, 50, 51, 100, 5_000_000, 5_000_001] {
            histogram.add(Duration::from_micros(us));
        }
        let counts: Vec<u64> = histogram.cumulative().map(|(_, count)| count).collect();
        assert_eq!(counts[..3], [2, 4, 4]);
        assert_eq!(counts[counts.len() - 1], 5);
        assert_eq!(histogram.count(), 6);
        assert_eq!(histogram.sum(), Duration::from_micros(10_000_202));
        assert_eq!(histogram.max(), Duration::from_micros(5_000_001));
    }
}
