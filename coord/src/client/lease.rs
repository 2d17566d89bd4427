//! Until when a session is certainly alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// A lease is this fraction of the timeout shorter than the timeout, so that no clock that is less
/// than 1.5 % slower than the leader's outlives the session.
const CLOCK_MARGIN: u32 = 64;

/// An extension below this fraction of the timeout is not told to those who wait.
const STEP: u32 = 16;

/// What the session's task knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tenure {
    /// 0 before the first.
    pub(super) session_id: i64,
    pub(super) until: Option<Instant>,
    /// This session has ended, and no other begins.
    pub(super) over: bool,
}

impl Tenure {
    pub(super) const NONE: Self = Self {
        session_id: 0,
        until: None,
        over: false,
    };

    pub(super) fn is_certain(&self) -> bool {
        !self.over && self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// The task's end.
#[derive(Debug)]
pub(super) struct TenureSender {
    sender: watch::Sender<Tenure>,
    wanted: Arc<AtomicUsize>,
}

/// The handle's end.
#[derive(Clone, Debug)]
pub(super) struct TenureReceiver {
    receiver: watch::Receiver<Tenure>,
    wanted: Arc<AtomicUsize>,
}

pub(super) fn tenure() -> (TenureSender, TenureReceiver) {
    let (sender, receiver) = watch::channel(Tenure::NONE);
    let wanted = Arc::new(AtomicUsize::new(0));
    let handle = TenureReceiver {
        receiver,
        wanted: wanted.clone(),
    };
    (TenureSender { sender, wanted }, handle)
}

impl TenureSender {
    /// Whether anybody holds a lease.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// The quorum has heard of the session, by something that was sent at `sent`.
    pub(super) fn confirm(&self, session_id: i64, sent: Instant, timeout: Duration) {
        let until = sent + (timeout - timeout / CLOCK_MARGIN);
        self.sender.send_if_modified(|tenure| {
            let told = tenure.until.filter(|_| tenure.session_id == session_id);
            let worth = told.is_none_or(|told| until >= told + timeout / STEP);
            if worth {
                (tenure.session_id, tenure.until) = (session_id, Some(until));
            }
            worth
        });
    }

    /// The session has ended; another may follow unless `over`.
    pub(super) fn end(&self, over: bool) {
        self.sender.send_replace(Tenure {
            over,
            ..Tenure::NONE
        });
    }
}

impl TenureReceiver {
    /// Makes the task confirm the session from now on.
    pub(super) fn want(&self) -> Wanted {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        Wanted(self.wanted.clone())
    }

    /// The session, once it is certain; `None` where there will be none.
    pub(super) async fn certain(&self) -> Option<i64> {
        let mut receiver = self.receiver.clone();
        let tenure = receiver
            .wait_for(|tenure| tenure.over || tenure.is_certain())
            .await
            .ok()?;
        (!tenure.over).then_some(tenure.session_id)
    }

    pub(super) fn lease(&self, session_id: i64, wanted: Wanted) -> Lease {
        Lease {
            session_id,
            tenure: self.receiver.clone(),
            _wanted: Arc::new(wanted),
        }
    }
}

/// Somebody wants to know; until it is dropped.
#[derive(Debug)]
pub(super) struct Wanted(Arc<AtomicUsize>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How certain it is that a session lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It lives until then at least: nobody else can see its ephemeral znodes gone before.
    Certain {
        /// By this machine's monotonic clock.
        until: Instant,
    },
    /// The quorum has not been heard from for as long as the session's timeout: it may live, or
    /// have expired already.
    Uncertain,
    /// It has expired or was closed, and its ephemeral znodes are gone or are going.
    Gone,
}

/// What is known, by this machine's own clock, of one session's life; [`super::Client::lease`]
/// gives it.
///
/// A session ends when the leader of the quorum has heard nothing of it for its timeout. So it
/// lives for that long, at least, after the *sending* of whatever the quorum has confirmed since: a
/// write, a `sync`, the opening of the session. (A server answers pings and reads by itself, and
/// may be cut off from the quorum while it does: they prove nothing.) While a lease is held, the
/// client sends a `sync` every third of the timeout if it writes nothing.
///
/// **On this coordinator** the leader counts a sync as a sign of life before it confirms it, so a
/// certain session has not expired, whatever happens to servers and network, if no clock runs 1.5 %
/// faster than another. **On Apache ZooKeeper** a sync proves that the server reaches the leader,
/// which may have last heard of the session a tick (2 s by default) earlier: there, a lease is
/// certain only if the timeout exceeds what the work under it takes by that much.
///
/// The clock is `CLOCK_MONOTONIC`, which stands while the machine is suspended: what must not
/// happen after an expiry, ever, needs a fencing token that the resource checks.
#[derive(Clone, Debug)]
pub struct Lease {
    session_id: i64,
    tenure: watch::Receiver<Tenure>,
    _wanted: Arc<Wanted>,
}

impl Lease {
    /// The session that this is about; a client that renews expired sessions may hold another by
    /// now.
    #[must_use]
    pub fn session_id(&self) -> i64 {
        self.session_id
    }

    /// How things stand now. Cheap enough to be asked before each step of the work.
    #[must_use]
    pub fn standing(&self) -> Standing {
        // A task that has gone without a word has closed the session, or left it to expire.
        let gone = self.tenure.has_changed().is_err();
        let tenure = *self.tenure.borrow();
        match tenure.until {
            _ if gone || tenure.session_id != self.session_id => Standing::Gone,
            Some(until) if Instant::now() < until => Standing::Certain { until },
            _ => Standing::Uncertain,
        }
    }

    /// Whether the session certainly lives.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        matches!(self.standing(), Standing::Certain { .. })
    }

    /// Until when the session certainly lives; `None` where it may have ended.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        match self.standing() {
            Standing::Certain { until } => Some(until),
            Standing::Uncertain | Standing::Gone => None,
        }
    }

    /// Waits until the session is no longer certain to live, by the clock if nothing is heard;
    /// gives [`Standing::Uncertain`] or [`Standing::Gone`].
    pub async fn uncertain(&self) -> Standing {
        let mut tenure = self.tenure.clone();
        loop {
            tenure.borrow_and_update();
            match self.standing() {
                Standing::Certain { until } => tokio::select! {
                    () = sleep_until(until) => {}
                    // Err: the task has ended, and the next look shows it.
                    _ = tenure.changed() => {}
                },
                standing => return standing,
            }
        }
    }

    /// Waits until the session certainly lives, again; gives [`Standing::Certain`] or
    /// [`Standing::Gone`].
    pub async fn certain(&self) -> Standing {
        let mut tenure = self.tenure.clone();
        loop {
            tenure.borrow_and_update();
            match self.standing() {
                Standing::Uncertain => {
                    let _: Result<(), _> = tenure.changed().await;
                }
                standing => return standing,
            }
        }
    }

    /// Waits until the session is known to have ended.
    pub async fn gone(&self) {
        let mut tenure = self.tenure.clone();
        loop {
            tenure.borrow_and_update();
            if self.standing() == Standing::Gone {
                return;
            }
            let _: Result<(), _> = tenure.changed().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lease_ends_by_the_clock_and_comes_back_with_the_next_word() {
        let timeout = Duration::from_millis(64);
        let (sender, receiver) = tenure();
        assert!(!sender.is_wanted());
        let wanted = receiver.want();
        sender.confirm(7, Instant::now() + Duration::from_secs(60), timeout);
        assert_eq!(receiver.certain().await, Some(7));
        let lease = receiver.lease(7, wanted);
        assert!(sender.is_wanted() && lease.is_certain());
        // A session that was heard of now, and not again.
        sender.end(false);
        let sent = Instant::now();
        sender.confirm(7, sent, timeout);
        assert_eq!(lease.uncertain().await, Standing::Uncertain);
        assert!(
            sent.elapsed() >= Duration::from_millis(63),
            "not before its time"
        );
        assert_eq!((lease.until(), lease.is_certain()), (None, false));
        // It waits for the word, not for the clock.
        let again = tokio::spawn({
            let lease = lease.clone();
            async move { lease.certain().await }
        });
        tokio::task::yield_now().await;
        let (sent, timeout) = (Instant::now(), Duration::from_secs(64));
        sender.confirm(7, sent, timeout);
        let until = sent + Duration::from_secs(63);
        assert_eq!(again.await.unwrap(), Standing::Certain { until });
        assert_eq!(lease.until(), Some(until));
        // An older word that arrives late takes nothing back.
        sender.confirm(7, sent - Duration::from_secs(20), timeout);
        assert_eq!(lease.until(), Some(until));
        sender.end(false);
        lease.gone().await;
        assert_eq!(lease.certain().await, Standing::Gone);
        // A session after it is another.
        sender.confirm(8, Instant::now(), timeout);
        assert_eq!(lease.standing(), Standing::Gone);
        drop(lease);
        assert!(!sender.is_wanted());
        sender.end(true);
        assert_eq!(receiver.certain().await, None);
    }

    #[tokio::test]
    async fn a_task_that_ends_without_a_word_leaves_nothing_certain() {
        let (sender, receiver) = tenure();
        sender.confirm(7, Instant::now(), Duration::from_secs(64));
        let lease = receiver.lease(7, receiver.want());
        assert!(lease.is_certain());
        drop(sender);
        assert_eq!(lease.uncertain().await, Standing::Gone);
        lease.gone().await;
    }
}
