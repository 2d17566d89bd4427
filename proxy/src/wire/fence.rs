//! The fence: a leader emits nothing unless it holds the lease (DESIGN R2).
//!
//! This is the part of it that lives in the process: every batch of frames passes
//! [`Fence::check`] immediately before the system call that sends it. A check in the process
//! alone races with a pause between check and call (a leader woken from SIGSTOP), so the kernel
//! enforces the lease too, by an nftables egress rule whose set element times out; that part comes
//! with the work on faults and slots in at [`Fence::check`]: renew the element, *then* read the
//! clock, check, send.
//!
//! For the record, tried with nft 1.0.6 on Linux 6.18: a `netdev` table with an *egress* chain
//! (`type filter hook egress device eth0 priority 0`), rules on `ip saddr` and `arp saddr ip`, and a
//! set of `type ipv4_addr; flags timeout` can be made by root and equally by the mapped root of a
//! user namespace that owns the network namespace (egress needs Linux 5.16). Frames of a packet
//! socket pass it, as long as `PACKET_QDISC_BYPASS` is not set. Timeouts are counted in jiffies and
//! rounded down (30 ms became 28 ms at 250 Hz), so the kernel shuts early, never late. Adding an
//! element again with the same timeout does not refresh it: delete and add in one transaction, or
//! state `expires`.

use crate::clock::BootTime;

/// Whether frames may leave now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fence {
    /// `None`: shut. A lease that was shut by hand never opens again by the clock's reading.
    lease_until: Option<BootTime>,
}

impl Fence {
    /// A shut fence.
    #[must_use]
    pub const fn shut() -> Self {
        Self { lease_until: None }
    }

    /// Opens the fence until `lease_until`, or moves its end there. The group core is the judge of
    /// what the lease is; an end that lies before the present one is obeyed as well.
    pub fn open_until(&mut self, lease_until: BootTime) {
        self.lease_until = Some(lease_until);
    }

    /// Shuts the fence, at once: before a wedge is acknowledged, and on stepping down.
    pub fn close(&mut self) {
        self.lease_until = None;
    }

    /// Whether the fence was opened and not shut by hand since; the lease may be over all the same.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.lease_until.is_some()
    }

    /// The pure rule: whether a frame may leave at `now` under a lease that ends at `lease_until`.
    /// The end itself is outside the lease.
    #[must_use]
    pub fn check(lease_until: Option<BootTime>, now: BootTime) -> bool {
        lease_until.is_some_and(|end| now < end)
    }

    /// [`Fence::check`] on this fence's lease and the clock, read now: call it after the frames
    /// are ready and immediately before they are sent.
    #[must_use]
    pub fn permits_now(&self) -> bool {
        self.is_open() && Self::check(self.lease_until, BootTime::now())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_under_the_lease() {
        let at = BootTime::from_micros;
        assert!(!Fence::check(None, at(0)));
        assert!(Fence::check(Some(at(10)), at(9)));
        assert!(!Fence::check(Some(at(10)), at(10)), "the end is outside");
        assert!(!Fence::check(Some(at(10)), at(11)));
    }

    #[test]
    fn closing_wins_over_the_clock() {
        let mut fence = Fence::shut();
        assert!(!fence.permits_now());
        fence.open_until(BootTime::now() + Duration::from_secs(3600));
        assert!(fence.permits_now());
        fence.close();
        assert!(!fence.permits_now());
        fence.open_until(BootTime::from_micros(1));
        assert!(
            !fence.permits_now(),
            "a lease that is over lets nothing out"
        );
    }
}
