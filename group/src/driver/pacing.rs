//! How fast datagrams go to one destination: a token bucket and a bounded queue for each. No I/O, no clock.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;

use crate::time::Instant;

/// How fast a [`Sender`](super::Sender) sends to one destination, so that the receive buffer there is not overrun.
///
/// What may not go yet waits in order, signs of life too: `queue_bytes_max / bytes_per_us` is how late they can be, and
/// must stay well below the group's lease.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Pacing {
    /// Bytes a microsecond to one destination, headers of UDP and below not counted; 1 is 8 Mbit/s, 125 is 1 Gbit/s.
    pub bytes_per_us: NonZeroU32,
    /// Bytes that may go at once after a pause, and the most that one system call carries. Less than one datagram counts
    /// as one datagram.
    pub burst_bytes: u32,
    /// Bytes that may wait for one destination; what is beyond is dropped and counted. 0: nothing waits.
    pub queue_bytes_max: u32,
}

/// What one system call carries.
pub(super) struct Parcel {
    pub(super) contents: Bytes,
    /// Length of each datagram in it but the last; `None` when it is one.
    pub(super) segment: Option<usize>,
    pub(super) datagrams: u64,
}

pub(super) struct Pacer {
    pacing: Pacing,
    /// One for each destination that was ever sent to: as many as are configured.
    flows: BTreeMap<SocketAddr, Flow>,
}

struct Flow {
    /// Below zero after a datagram that is larger than a burst.
    tokens: i64,
    filled: Instant,
    queue: VecDeque<Parcel>,
    queued_bytes: usize,
}

impl Pacer {
    pub(super) fn new(pacing: Pacing) -> Self {
        Self {
            pacing,
            flows: BTreeMap::new(),
        }
    }

    /// Datagrams of this length that one parcel may hold.
    pub(super) fn datagrams_max(&self, stride: usize) -> usize {
        usize::try_from(self.pacing.burst_bytes).unwrap_or(usize::MAX) / stride.max(1)
    }

    /// Whether this many bytes may go now; they are paid for then. Nothing overtakes what waits.
    pub(super) fn admit(&mut self, now: Instant, to: SocketAddr, bytes: usize) -> bool {
        let flow = self.flows.entry(to).or_insert_with(|| Flow {
            tokens: i64::from(self.pacing.burst_bytes),
            filled: now,
            queue: VecDeque::new(),
            queued_bytes: 0,
        });
        flow.queue.is_empty() && flow.pay(&self.pacing, now, bytes)
    }

    /// Lets a parcel wait that was not admitted; false when the queue is full and it is to be dropped.
    pub(super) fn queue(&mut self, to: SocketAddr, parcel: Parcel) -> bool {
        let Some(flow) = self.flows.get_mut(&to) else {
            return false;
        };
        let bytes = flow.queued_bytes + parcel.contents.len();
        if u32::try_from(bytes).is_ok_and(|bytes| bytes <= self.pacing.queue_bytes_max) {
            flow.queued_bytes = bytes;
            flow.queue.push_back(parcel);
            return true;
        }
        false
    }

    /// The next parcel that may go now.
    pub(super) fn due(&mut self, now: Instant) -> Option<(SocketAddr, Parcel)> {
        for (to, flow) in &mut self.flows {
            let Some(parcel) = flow.queue.front() else {
                continue;
            };
            let bytes = parcel.contents.len();
            if flow.pay(&self.pacing, now, bytes) {
                flow.queued_bytes -= bytes;
                return flow.queue.pop_front().map(|parcel| (*to, parcel));
            }
        }
        None
    }

    /// When the next parcel may go.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let at = |flow: &Flow| {
            let bytes = flow.queue.front()?.contents.len();
            let lacking = price(&self.pacing, bytes) - flow.tokens;
            let us = u64::try_from(lacking).unwrap_or(0);
            let us = us.div_ceil(u64::from(self.pacing.bytes_per_us.get()));
            Some(flow.filled + Duration::from_micros(us))
        };
        self.flows.values().filter_map(at).min()
    }

    pub(super) fn queued_bytes(&self) -> usize {
        self.flows.values().map(|flow| flow.queued_bytes).sum()
    }
}

/// What the bucket must hold before this many bytes go: a full bucket lets anything go.
fn price(pacing: &Pacing, bytes: usize) -> i64 {
    i64::try_from(bytes)
        .unwrap_or(i64::MAX)
        .min(i64::from(pacing.burst_bytes))
}

impl Flow {
    fn pay(&mut self, pacing: &Pacing, now: Instant, bytes: usize) -> bool {
        let us = i64::try_from(now.since(self.filled).as_micros()).unwrap_or(i64::MAX);
        let new = us.saturating_mul(i64::from(pacing.bytes_per_us.get()));
        self.tokens = self
            .tokens
            .saturating_add(new)
            .min(i64::from(pacing.burst_bytes));
        self.filled = self.filled.max(now);
        if self.tokens < price(pacing, bytes) {
            return false;
        }
        self.tokens = self
            .tokens
            .saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pacer(bytes_per_us: u32, burst_bytes: u32, queue_bytes_max: u32) -> Pacer {
        Pacer::new(Pacing {
            bytes_per_us: NonZeroU32::new(bytes_per_us).unwrap(),
            burst_bytes,
            queue_bytes_max,
        })
    }

    fn parcel(bytes: usize) -> Parcel {
        Parcel {
            contents: Bytes::from(vec![0; bytes]),
            segment: None,
            datagrams: 1,
        }
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let mut pacer = pacer(2, 3000, 1 << 20);
        let at = Instant::from_micros;
        let mut gone = 0;
        for _ in 0..100 {
            if pacer.admit(at(0), address(1), 1000) {
                gone += 1;
            } else {
                assert!(pacer.queue(address(1), parcel(1000)));
            }
        }
        assert_eq!(gone, 3);
        assert!(pacer.due(at(0)).is_none());
        // Woken exactly when it asks to be, it sends one each time: 500 us apart.
        for nth in 1..=97 {
            let due = pacer.poll_timeout().unwrap();
            assert_eq!(due, at(500 * nth));
            assert!(pacer.due(at(due.micros() - 1)).is_none());
            assert!(pacer.due(due).is_some());
            assert!(pacer.due(due).is_none());
        }
        assert_eq!((pacer.poll_timeout(), pacer.queued_bytes()), (None, 0));
    }

    #[test]
    fn over_any_stretch_no_more_goes_than_the_burst_and_the_rate_allow() {
        let mut rng = crate::rng::Rng::new(5);
        let mut pacer = pacer(3, 4000, 20_000);
        let (mut now, mut gone) = (1, Vec::new());
        for _ in 0..20_000 {
            let idle = if rng.next_u64().is_multiple_of(100) {
                20_000
            } else {
                300
            };
            now += rng.next_u64() % idle;
            let at = Instant::from_micros(now);
            while let Some((_, parcel)) = pacer.due(at) {
                gone.push((now, parcel.contents.len()));
            }
            let bytes = usize::try_from(rng.next_u64() % 1500).unwrap() + 1;
            if pacer.admit(at, address(1), bytes) {
                gone.push((now, bytes));
            } else {
                pacer.queue(address(1), parcel(bytes));
            }
            assert!(pacer.queued_bytes() <= 20_000);
        }
        for from in (0..gone.len()).step_by(37) {
            let mut sum = 0;
            for (at, bytes) in gone[from..].iter().take(200) {
                sum += u64::try_from(*bytes).unwrap();
                assert!(sum <= 4000 + 3 * (at - gone[from].0), "from {from}");
            }
        }
    }

    #[test]
    fn a_full_queue_takes_no_more_and_destinations_do_not_share() {
        let mut pacer = pacer(1, 1000, 2500);
        let now = Instant::from_micros(9);
        assert!(pacer.admit(now, address(1), 1000));
        assert!(!pacer.admit(now, address(1), 1000));
        assert!(pacer.queue(address(1), parcel(1000)));
        let later = Instant::from_micros(9 + 500);
        assert!(!pacer.admit(later, address(1), 1), "nothing overtakes");
        assert!(pacer.queue(address(1), parcel(1500)));
        assert!(!pacer.queue(address(1), parcel(1)));
        assert_eq!(pacer.queued_bytes(), 2500);
        assert!(pacer.admit(now, address(2), 1000));
    }

    #[test]
    fn a_datagram_larger_than_the_burst_goes_and_is_paid_for() {
        let mut pacer = pacer(1, 100, 10_000);
        assert_eq!(pacer.datagrams_max(1000), 0);
        let now = Instant::from_micros(0);
        assert!(pacer.admit(now, address(1), 1000));
        assert!(!pacer.admit(now, address(1), 50));
        assert!(pacer.queue(address(1), parcel(50)));
        assert_eq!(pacer.poll_timeout(), Some(Instant::from_micros(950)));
        assert!(pacer.due(Instant::from_micros(950)).is_some());
    }
}
