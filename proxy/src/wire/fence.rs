//! The fence: a leader emits nothing unless it holds the lease (R2 in ARCHITECTURE.md).
//!
//! Two checks, because either alone has a hole. The process's: every batch of frames passes
//! [`Fence::permits_now`] immediately before the system call that sends it; but a process can be put
//! to sleep between check and call, and wakes with frames in its hands (SIGSTOP: 3,219 frames were
//! counted). The kernel's: nftables rules drop what the VIP sends unless a set holds it, and its
//! element times out by itself ([`super::nft`]). The thread that sends is the only one to renew it, in the order
//! *renew, read the clock, check, send*: whoever sleeps before the check is stopped by the check,
//! whoever sleeps after it by the timeout, which began before the check.
//!
//! The timeout is asked for so that it ends within the lease: the time from reading the clock until
//! the kernel has it is allowed for by [`SLACK`], and measured. The kernel counts it in ticks and
//! rounds down, so it shuts up to two ticks early, never late.
//!
//! A renewal is a netlink transaction of some 6 us, about 80 a second under load with a lease of 30 ms.
//! It wants no place between a server's answer and the client, so it is made when frames have passed
//! and half of the time is over; before sending only if it was quiet for longer.

use std::net::IpAddr;
use std::time::Duration;

use tracing::warn;

use super::nft::{KernelFence, KernelFenceError};
use crate::clock::BootTime;
use crate::fault::planted;

/// What a renewal may take until the kernel has it. One that takes longer is repeated.
const SLACK: Duration = Duration::from_millis(1);

/// Renewals in a row that took too long, after which nothing is sent this time.
const ATTEMPTS: usize = 3;

/// Whether frames may leave now.
#[derive(Debug, Default)]
pub struct Fence {
    /// `None`: shut. A lease that was shut by hand never opens again by the clock's reading.
    lease_until: Option<BootTime>,
    kernel: Option<Kernel>,
}

/// The kernel's half, and what this thread knows of it.
#[derive(Debug)]
struct Kernel {
    rules: KernelFence,
    /// Until when it is certainly open; `None`: it is certainly shut.
    open_until: Option<BootTime>,
    /// One of the kernel's ticks.
    tick: Duration,
    /// The last renewal failed: said once.
    failing: bool,
    renewals: u64,
}

impl Fence {
    /// A shut fence of the process alone.
    #[must_use]
    pub const fn shut() -> Self {
        Self {
            lease_until: None,
            kernel: None,
        }
    }

    /// A shut fence with the kernel's rules for `vip` on `interface`, which last as long as this value.
    ///
    /// # Errors
    /// The kernel does not take them.
    pub(super) fn with_kernel(interface: &str, vip: IpAddr) -> Result<Self, KernelFenceError> {
        if planted!(NoFence | NoKernelFence | ClockUnread) {
            return Ok(Self::shut());
        }
        let rules = KernelFence::open(interface, vip)?;
        // The coarse clocks advance with the tick.
        let tick = rustix::time::clock_getres(rustix::time::ClockId::MonotonicCoarse);
        let kernel = Kernel {
            rules,
            open_until: None,
            tick: Duration::from_nanos(tick.tv_nsec.unsigned_abs()),
            failing: false,
            renewals: 0,
        };
        Ok(Self {
            lease_until: None,
            kernel: Some(kernel),
        })
    }

    /// Opens the fence until `lease_until`, or moves its end there. The group core is the judge of
    /// what the lease is; an end that lies before the present one is obeyed as well.
    pub fn open_until(&mut self, lease_until: BootTime) {
        self.lease_until = Some(lease_until);
    }

    /// Shuts the fence, at once: before a wedge is acknowledged, and on stepping down.
    pub fn close(&mut self) {
        if planted!(FenceLeftOpen) {
            return;
        }
        self.lease_until = None;
        if let Some(kernel) = &mut self.kernel {
            kernel.shut();
        }
    }

    /// Whether the fence was opened and not shut by hand since; the lease may be over all the same.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.lease_until.is_some()
    }

    /// Whether the kernel enforces the lease too.
    #[must_use]
    pub const fn is_in_kernel(&self) -> bool {
        self.kernel.is_some()
    }

    /// Times the kernel's half was renewed.
    #[must_use]
    pub fn renewals(&self) -> u64 {
        self.kernel.as_ref().map_or(0, |kernel| kernel.renewals)
    }

    /// The pure rule: whether a frame may leave at `now` under a lease that ends at `lease_until`.
    /// The end itself is outside the lease.
    #[must_use]
    pub fn check(lease_until: Option<BootTime>, now: BootTime) -> bool {
        lease_until.is_some_and(|end| now < end)
    }

    /// [`Fence::check`] on this fence's lease and the clock, read now: call it after the frames
    /// are ready and immediately before they are sent. The kernel's half is renewed first if it must be.
    pub fn permits_now(&mut self) -> bool {
        if planted!(NoFence) {
            return true;
        }
        let Some(lease_until) = self.lease_until else {
            return false;
        };
        if let Some(kernel) = &mut self.kernel
            && !kernel.is_open(BootTime::now())
            && !kernel.renew(lease_until)
        {
            return false;
        }
        planted!(ClockUnread) || Self::check(Some(lease_until), BootTime::now())
    }

    /// Renews the kernel's half if half of its time is over: call it after frames were sent.
    pub fn refresh(&mut self) {
        if let Some(lease_until) = self.lease_until
            && let Some(kernel) = &mut self.kernel
            && kernel.is_half_over(BootTime::now(), lease_until)
        {
            kernel.renew(lease_until);
        }
    }
}

impl Kernel {
    fn is_open(&self, now: BootTime) -> bool {
        Fence::check(self.open_until, now)
    }

    /// The timeout to ask for at `now`; `None` if so little is left of the lease that the kernel cannot
    /// count it (measured: less than a tick may round to no timeout at all).
    fn timeout(&self, now: BootTime, lease_until: BootTime) -> Option<Duration> {
        if planted!(LeaseWithoutEnd) {
            return Some(Duration::from_secs(3600));
        }
        let timeout = lease_until.since(now).checked_sub(SLACK)?;
        // Netlink takes milliseconds.
        let whole = Duration::from_millis(u64::try_from(timeout.as_millis()).ok()?);
        (whole >= self.tick.max(Duration::from_millis(1))).then_some(whole)
    }

    /// How long a timeout certainly lasts, whatever the place in the tick.
    fn certain(&self, timeout: Duration) -> Duration {
        timeout.saturating_sub(2 * self.tick)
    }

    fn is_half_over(&self, now: BootTime, lease_until: BootTime) -> bool {
        let left = self.open_until.map_or(Duration::ZERO, |end| end.since(now));
        self.timeout(now, lease_until)
            .is_some_and(|timeout| 2 * left < self.certain(timeout))
    }

    /// Opens the kernel's half until shortly before `lease_until`. False if it is not known to be open
    /// for any time, or open for longer than that.
    fn renew(&mut self, lease_until: BootTime) -> bool {
        for _ in 0..ATTEMPTS {
            let asked = BootTime::now();
            let Some(timeout) = self.timeout(asked, lease_until) else {
                break;
            };
            // Whatever comes of it, what was known before is not known any more.
            self.open_until = Some(BootTime::from_micros(0));
            if let Err(error) = self.rules.allow(timeout) {
                if !self.failing {
                    warn!(%error, "the kernel's fence cannot be renewed: nothing is sent");
                }
                self.failing = true;
                return false;
            }
            self.failing = false;
            self.renewals += 1;
            if BootTime::now().since(asked) <= SLACK {
                let open_until = asked + self.certain(timeout);
                self.open_until = Some(open_until);
                return true;
            }
        }
        // The lease is over, or this thread was put to sleep in a renewal and the timeout began too late.
        self.shut();
        false
    }

    fn shut(&mut self) {
        if self.open_until.is_none() {
            return;
        }
        match self.rules.shut() {
            Ok(()) => self.open_until = None,
            // It shuts by itself at the end of the lease.
            Err(error) => warn!(%error, "the kernel's fence cannot be shut"),
        }
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
