//! A lease: a named resource that is held for a time, longer than any session lasts.
//!
//! A lock goes with its session, and a session with a few seconds of silence. A lease stands in
//! persistent znodes: its holder keeps it through lost sessions, other servers and restarts of the
//! whole ensemble, for as long as it renews it in time; whoever finds it not renewed for its time
//! takes it over.
//!
//! **How it works.** A taker writes itself into the lease's znode by compare-and-set. From then on it
//! writes the znode `beat` below three times in the lease's time, on condition that the lease is still
//! its own. It believes that it holds the lease for `time / (1 + drift)` after the *sending* of the
//! latest such write that was acknowledged, by its own clock, and not an instant longer. Others watch
//! the lease's znode for a release. Who sees one and the same version of `beat` for `time * (1 +
//! drift)` by its own clock, counted from when it had *received* the first sight of it, takes the
//! lease, on condition that `beat` has this version still. No two clocks are compared, only how fast
//! they run: `drift` is the largest part by which one may run faster or slower than true time. The
//! clock is `CLOCK_BOOTTIME`, which goes on while the machine is suspended.
//!
//! | znode | data |
//! |---|---|
//! | `<path>` | JSON: who holds the lease, an id of this tenure, time and drift; written when it is taken and released |
//! | `<path>/beat` | nothing; its version is the number of renewals |
//!
//! **Guarantees.** At no instant do two believe that they hold the lease, as long as no clock runs
//! wrong by more than the drift. What is done upon [`Held::is_held`] may be done late; where that
//! matters pass [`Held::token`] on, which is larger with each holder, or put [`Held::check`] into the
//! multi that does it, which no other holder's instant can precede.
//!
//! **Cost.** Taking a free lease: a sync, a read, and a multi. Holding it: three multis in the lease's
//! time. Waiting for it: a watch, and one read in the lease's time. A release wakes all who wait, and
//! one of them wins.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use unbroken_coord::recipes::lease::{Lease, Terms};
//!
//! let lease = Lease::new(&client, "/app/writer", Terms::new(Duration::from_secs(20)));
//! let held = lease.acquire("machine-3").await?;
//! let work = async { /* ... */ };
//! if held.run(work).await.is_none() {
//!     println!("lost the lease, the work was dropped");
//! }
//! held.release().await?;
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tracing::{debug, info};

use super::RecipeError;
use super::znodes::{Znodes, join, op_check, op_set, unique};
use crate::client::{Client, ClientError, WatchFuture};
use crate::wire::{Acl, ErrorCode, MultiOp, Stat};

/// Parts per million.
const MILLION: u128 = 1_000_000;

/// How long a lease lasts without renewal, and how well clocks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    time: Duration,
    drift_ppm: u32,
}

impl Terms {
    /// A lease of this time, and clocks that are wrong by no more than 1 %.
    ///
    /// # Panics
    /// Where the time is not between 1 ms and a year.
    pub fn new(time: Duration) -> Self {
        let range = Duration::from_millis(1)..=Duration::from_secs(366 * 24 * 3600);
        assert!(range.contains(&time), "a lease of {time:?}");
        Self {
            time,
            drift_ppm: 10_000,
        }
    }

    /// By how much clocks may be wrong, in millionths. All who use a lease should say the same; a
    /// taker goes by the larger of its own and the holder's.
    ///
    /// # Panics
    /// Above 500,000.
    #[must_use]
    pub const fn drift_ppm(mut self, drift_ppm: u32) -> Self {
        assert!(drift_ppm <= 500_000, "no clock is that wrong");
        self.drift_ppm = drift_ppm;
        self
    }

    /// How long the holder believes in a renewal.
    fn believed(self) -> Duration {
        let drift = MILLION + u128::from(self.drift_ppm);
        nanos(self.time.as_nanos() * MILLION / drift)
    }

    /// How long others wait.
    fn waited(self) -> Duration {
        let drift = MILLION + u128::from(self.drift_ppm);
        nanos((self.time.as_nanos() * drift).div_ceil(MILLION))
    }
}

fn nanos(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).expect("a year and a half has fewer"))
}

/// Since the machine was started, suspended or not.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let part = |value| u64::try_from(value).expect("this clock is not negative");
    Duration::from_secs(part(now.tv_sec)) + Duration::from_nanos(part(now.tv_nsec))
}

/// What stands in the lease's znode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    holder: String,
    /// Another one each time that it is taken.
    tenure: String,
    time_us: u64,
    drift_ppm: u32,
}

impl Record {
    /// `None` where the lease is free.
    fn read(data: &[u8]) -> Option<Option<Self>> {
        if data.is_empty() {
            return Some(None);
        }
        serde_json::from_slice(data).ok().map(Some)
    }

    fn write(&self) -> Bytes {
        serde_json::to_vec(self)
            .expect("a record has a form in JSON")
            .into()
    }

    /// How long this one's renewals must be believed in, where `mine` are the reader's terms.
    fn waited(&self, mine: Terms) -> Duration {
        let terms = Terms {
            time: Duration::from_micros(self.time_us),
            drift_ppm: self.drift_ppm.max(mine.drift_ppm),
        };
        terms.waited()
    }
}

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The name it gave.
    pub name: String,
    /// Its [`Held::token`].
    pub token: u64,
}

/// A lease, held by somebody or nobody.
#[derive(Clone, Debug)]
pub struct Lease {
    nodes: Znodes,
    path: Arc<str>,
    terms: Terms,
}

impl Lease {
    /// The lease at `path`, and on which terms this client takes it.
    pub fn new(client: &Client, path: &str, terms: Terms) -> Self {
        Self {
            nodes: Znodes::new(client),
            path: path.into(),
            terms,
        }
    }

    /// Sets the access control list of the znodes where they are created; open to all otherwise.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.nodes.acl = acl;
        self
    }

    /// Who holds it, or held it last and has not released it.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub async fn holder(&self) -> Result<Option<Holder>, RecipeError> {
        let Some((data, stat)) = self.nodes.get_newest(&self.path).await? else {
            return Ok(None);
        };
        let holder = self.record(&data)?.map(|record| Holder {
            name: record.holder,
            token: token(&stat),
        });
        Ok(holder)
    }

    /// Takes the lease if it is free now, in the name of `holder`.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub async fn try_acquire(&self, holder: &str) -> Result<Option<Held>, RecipeError> {
        let sight = self.look().await?;
        match sight.record {
            None => self.take(holder, &sight).await,
            Some(_) => Ok(None),
        }
    }

    /// Waits until the lease is free or not renewed for its time, and takes it, in the name of
    /// `holder`. May be dropped while it waits. (Dropped while it takes, it leaves a lease that
    /// others get after its time.)
    ///
    /// # Errors
    /// [`RecipeError::Client`]; [`RecipeError::Foreign`] where the znode holds something else.
    pub async fn acquire(&self, holder: &str) -> Result<Held, RecipeError> {
        loop {
            let mut sight = self.look().await?;
            let over = match &sight.record {
                None => true,
                Some(record) => {
                    let waited = record.waited(self.terms);
                    let changed = &mut sight.changed;
                    tokio::select! {
                        // Errors show at the next request.
                        _ = changed => false,
                        over = elapsed(sight.seen_at + waited) => over,
                    }
                }
            };
            if over && let Some(held) = self.take(holder, &sight).await? {
                return Ok(held);
            }
        }
    }

    /// The lease as it is, at an instant before `seen_at`.
    async fn look(&self) -> Result<Sight, RecipeError> {
        let beat = join(&self.path, "beat");
        let client = &self.nodes.client;
        loop {
            self.nodes.repeat(|| client.sync(&self.path)).await?;
            let read = || client.get_and_watch(&self.path);
            let read = super::znodes::present(self.nodes.repeat(read).await)?;
            let beaten = self.nodes.repeat(|| client.exists(&beat)).await?;
            let (Some((data, stat, changed)), Some(beaten)) = (read, beaten) else {
                self.nodes.ensure(&beat).await?;
                continue;
            };
            return Ok(Sight {
                record: self.record(&data)?,
                version: stat.version,
                beat: beaten.version,
                changed,
                seen_at: now(),
            });
        }
    }

    fn record(&self, data: &[u8]) -> Result<Option<Record>, RecipeError> {
        Record::read(data).ok_or_else(|| RecipeError::Foreign {
            path: self.path.to_string(),
        })
    }

    /// `None` where another was faster, or the holder has renewed it.
    async fn take(&self, holder: &str, sight: &Sight) -> Result<Option<Held>, RecipeError> {
        let record = Record {
            holder: holder.to_owned(),
            tenure: unique(),
            time_us: u64::try_from(self.terms.time.as_micros()).expect("at most a year"),
            drift_ppm: self.terms.drift_ppm,
        };
        let beat = join(&self.path, "beat");
        let ops = vec![
            op_set(&self.path, record.write(), sight.version),
            op_check(&beat, sight.beat),
        ];
        let sent_at = now();
        let taken = self.nodes.repeat(|| self.nodes.client.multi(ops.clone()));
        match taken.await {
            Ok(_) | Err(ClientError::Multi { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // A repetition of what was done already fails: what is there tells, and gives the token.
        let Some((data, stat)) = self.nodes.get(&self.path).await? else {
            return Ok(None);
        };
        if self.record(&data)?.as_ref() != Some(&record) {
            return Ok(None);
        }
        let tenure = Tenure {
            lease: self.clone(),
            version: stat.version,
        };
        Ok(Some(Held::new(tenure, token(&stat), sent_at)))
    }
}

/// Waits until the clock says `until`.
async fn elapsed(until: Duration) -> bool {
    loop {
        let left = until.saturating_sub(now());
        if left.is_zero() {
            return true;
        }
        sleep(left).await;
    }
}

struct Sight {
    /// `None` where the lease is free.
    record: Option<Record>,
    version: i32,
    beat: i32,
    changed: WatchFuture,
    /// When it had been seen.
    seen_at: Duration,
}

/// zxid of the taking.
fn token(stat: &Stat) -> u64 {
    u64::try_from(stat.mzxid).unwrap_or(0)
}

/// What a holder needs to write.
#[derive(Clone, Debug)]
struct Tenure {
    lease: Lease,
    /// Of the lease's znode, since it was taken.
    version: i32,
}

/// Whether a lease is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Belief {
    /// Held until then.
    Until(Duration),
    /// Not held, and never again by this handle.
    Over,
}

impl Belief {
    fn left(self) -> Duration {
        match self {
            Self::Until(until) => until.saturating_sub(now()),
            Self::Over => Duration::ZERO,
        }
    }
}

/// A lease that is held and renewed, until this is dropped, which releases it.
#[derive(Debug)]
pub struct Held {
    tenure: Tenure,
    token: u64,
    belief: watch::Receiver<Belief>,
    renewal: AbortHandle,
    released: bool,
    runtime: Handle,
}

impl Held {
    fn new(tenure: Tenure, token: u64, sent_at: Duration) -> Self {
        let until = sent_at + tenure.lease.terms.believed();
        let (sender, belief) = watch::channel(Belief::Until(until));
        info!(path = %tenure.lease.path, token, "lease taken");
        let renewing = tenure.clone();
        let renewal = tokio::spawn(async move {
            tokio::select! {
                () = renewing.renew(&sender) => {}
                () = deadline(sender.subscribe()) => {}
            }
            info!(path = %renewing.lease.path, token, "lease lost");
            sender.send_replace(Belief::Over);
        });
        Self {
            tenure,
            token,
            belief,
            renewal: renewal.abort_handle(),
            released: false,
            runtime: Handle::current(),
        }
    }

    /// Larger than that of any holder before.
    pub const fn token(&self) -> u64 {
        self.token
    }

    /// Whether the lease is held at this moment. Looks at the clock itself.
    pub fn is_held(&self) -> bool {
        !self.left().is_zero()
    }

    /// For how long the lease is held from now on if no renewal succeeds; zero where it is lost.
    pub fn left(&self) -> Duration {
        self.belief.borrow().left()
    }

    /// Waits until the lease is lost.
    pub async fn lost(&self) {
        deadline(self.belief.clone()).await;
    }

    /// Runs `work` as long as the lease is held; `None` where it was lost before the end, and the
    /// work was dropped.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.lost() => None,
            done = work => Some(done),
        }
    }

    /// An operation for a multi, which then is done only while nobody else has taken the lease.
    pub fn check(&self) -> MultiOp {
        op_check(&self.tenure.lease.path, self.tenure.version)
    }

    /// Gives the lease back, so that others need not wait.
    ///
    /// # Errors
    /// [`ClientError`]; the lease is not held any more all the same.
    pub async fn release(mut self) -> Result<(), ClientError> {
        self.released = true;
        self.renewal.abort();
        self.tenure.release().await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.renewal.abort();
        if !self.released {
            let tenure = self.tenure.clone();
            self.runtime.spawn(async move {
                if let Err(error) = tenure.release().await {
                    debug!(path = %tenure.lease.path, %error, "lease left to its end");
                }
            });
        }
    }
}

/// Returns when the belief is over, by word or by clock.
async fn deadline(mut belief: watch::Receiver<Belief>) {
    loop {
        let left = belief.borrow_and_update().left();
        if left.is_zero() {
            return;
        }
        tokio::select! {
            () = sleep(left) => {}
            told = belief.changed() => if told.is_err() {
                // Nothing is renewed any more. The clock tells.
                let left = belief.borrow().left();
                sleep(left).await;
            },
        }
    }
}

impl Tenure {
    /// Returns when the lease is another's.
    async fn renew(&self, belief: &watch::Sender<Belief>) {
        let Lease { nodes, path, terms } = &self.lease;
        let ops = vec![
            op_check(path, self.version),
            op_set(&join(path, "beat"), "", -1),
        ];
        loop {
            sleep(terms.believed() / 3).await;
            loop {
                let sent_at = now();
                match nodes.client.multi(ops.clone()).await {
                    Ok(_) => {
                        let until = sent_at + terms.believed();
                        // Too late is too late, though nobody took it.
                        belief.send_if_modified(|belief| {
                            let in_time = !belief.left().is_zero();
                            if in_time {
                                *belief = Belief::Until(until);
                            }
                            in_time
                        });
                        break;
                    }
                    Err(ClientError::Multi { code, .. }) => {
                        debug!(%path, %code, "lease not renewed");
                        return;
                    }
                    Err(ClientError::SessionExpired) => {
                        if nodes.session().await.is_err() {
                            // The lease goes on to its end.
                            return std::future::pending().await;
                        }
                    }
                    Err(ClientError::ConnectionLoss) => {}
                    Err(error) => {
                        debug!(%path, %error, "lease not renewed");
                        sleep(terms.believed() / 16).await;
                    }
                }
            }
        }
    }

    async fn release(&self) -> Result<(), ClientError> {
        let Lease { nodes, path, .. } = &self.lease;
        let free = nodes.repeat(|| nodes.client.set(path, "", self.version));
        match free.await {
            // Another's by now, or a repetition.
            Ok(_) | Err(ClientError::Zk(ErrorCode::BadVersion | ErrorCode::NoNode)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the clocks do within their bounds, the holder's belief ends first.
    #[test]
    fn the_holder_gives_up_before_others_take() {
        for drift_ppm in [0, 1, 100, 10_000, 333_333, 500_000] {
            for time_us in [1_000_u64, 1_001, 39_999, 20_000_000, 86_400_000_001] {
                let terms = Terms::new(Duration::from_micros(time_us)).drift_ppm(drift_ppm);
                let drift = MILLION + u128::from(drift_ppm);
                // In true time, where the holder's clock is as slow and the taker's as fast as
                // can be; in millionths of a nanosecond.
                let ends = terms.believed().as_nanos() * drift;
                let taken = terms.waited().as_nanos() * MILLION * MILLION / drift;
                assert!(ends <= taken, "{terms:?}: {ends} after {taken}");
                assert!(
                    terms.believed() * 100 >= terms.time * 66,
                    "and not much earlier"
                );
            }
        }
    }

    #[test]
    fn a_taker_goes_by_the_longer_terms() {
        let record = Record {
            holder: "x".into(),
            tenure: "t".into(),
            time_us: 5_000_000,
            drift_ppm: 0,
        };
        assert_eq!(Record::read(&record.write()), Some(Some(record.clone())));
        assert_eq!(Record::read(b""), Some(None));
        assert_eq!(Record::read(b"x"), None);
        let mine = Terms::new(Duration::from_secs(1)).drift_ppm(100_000);
        assert_eq!(record.waited(mine), Duration::from_millis(5_500));
        let sloppy = Record {
            drift_ppm: 200_000,
            ..record
        };
        assert_eq!(sloppy.waited(mine), Duration::from_secs(6));
    }
}
