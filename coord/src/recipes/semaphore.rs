//! A semaphore: so many permits, and who gets one holds it by a lease.
//!
//! Who wants permits first takes a [lock](super::lock) that only one holds at a time: the turnstile.
//! Inside it creates its leases, ephemeral znodes, and waits until no more leases exist than there
//! are permits; then it leaves the turnstile to the next. Only the one in the turnstile watches the
//! leases, so that a permit which is given back wakes one waiter. Several permits are taken in one
//! step, and nobody gets half of what it asked for.
//!
//! A free permit costs two round trips.
//!
//! # Layout
//!
//! ```text
//! /path/locks/_c_<uuid>-lock-0000000007    the turnstile
//! /path/leases/_c_<uuid>-lease-0000000042  ephemeral, one for each permit that is held
//! ```
//!
//! This is Curator's `InterProcessSemaphoreV2`. (kazoo's `Semaphore` has another.) The number of
//! permits stands nowhere: all must name the same.
//!
//! # Guarantees
//!
//! - Whoever holds permits saw its own leases and all earlier ones among at most `permits`: so there
//!   are never more, even where somebody deleted the turnstile's znodes.
//! - Permits are given in the order of arrival. Permits of a session that is over are free again.
//! - The token of a hold is larger than that of every hold before it.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::semaphore::Semaphore;
//!
//! let uploads = Semaphore::new(client, "/limits/uploads", 8)?;
//! let held = uploads.acquire(1).await?;
//! held.release().await?;
//! # Ok(())
//! # }
//! ```

use std::pin::pin;

use bytes::Bytes;

use super::common::{Cleanup, Created, Guid, Place, code, created, repeat, unknown};
use super::lock::Lock;
use super::{Hold, LostReason, RecipeError};
use crate::client::{Client, ClientError, WatchFuture};
use crate::wire::{Acl, CreateMode, ErrorCode};

/// The most permits that one semaphore may have: what one list of children holds with ease.
pub const PERMITS_MAX: usize = 4096;

/// A semaphore at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Semaphore {
    turnstile: Lock,
    leases: Place,
    label: Bytes,
    permits: usize,
}

impl Semaphore {
    /// The semaphore at this path, with this many permits. Nothing is sent yet.
    ///
    /// # Errors
    /// [`RecipeError::OutOfRange`] unless `permits` is 1 to [`PERMITS_MAX`].
    pub fn new(client: &Client, path: &str, permits: usize) -> Result<Self, RecipeError> {
        in_range("permits", permits, PERMITS_MAX)?;
        let place = Place::new(client, path);
        Ok(Self {
            turnstile: Lock::new(client, &place.child("locks")),
            leases: place.below("leases"),
            label: Bytes::new(),
            permits,
        })
    }

    /// The data of the lease znodes.
    #[must_use]
    pub fn label(mut self, label: impl Into<Bytes>) -> Self {
        self.label = label.into();
        self.turnstile = self.turnstile.label(self.label.clone());
        self
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.turnstile = self.turnstile.acl(acl.clone());
        self.leases.acl = acl;
        self
    }

    /// Waits for `count` permits, and takes all of them in one step. May be dropped at any time.
    ///
    /// # Errors
    /// [`RecipeError::OutOfRange`] unless `count` is 1 to the number of permits; else as
    /// [`Lock::acquire`].
    pub async fn acquire(&self, count: usize) -> Result<Hold, RecipeError> {
        in_range("count", count, self.permits)?;
        let turn = self.turnstile.acquire().await?;
        let leases = Leases::create(&self.leases, &self.label, count).await?;
        {
            let mut turn_lost = pin!(turn.lost());
            loop {
                let (children, changed) = leases.watch().await?;
                match verdict(&children, &leases.names(), self.permits) {
                    Verdict::Gone => return Err(leases.removed()),
                    Verdict::Granted => break,
                    Verdict::Full => tokio::select! {
                        told = changed => drop(told?),
                        reason = &mut turn_lost => return Err(reason.into()),
                    },
                }
            }
        }
        // Dropped, the turnstile opens in the background.
        drop(turn);
        Ok(leases.into_hold().await?)
    }

    /// Takes `count` permits where they are free and nobody waits, else gives `None`. (Two that try
    /// for the last one at the same moment may both be refused.)
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub async fn try_acquire(&self, count: usize) -> Result<Option<Hold>, RecipeError> {
        in_range("count", count, self.permits)?;
        if !self.turnstile.place().children().await?.is_empty() {
            return Ok(None);
        }
        let leases = Leases::create(&self.leases, &self.label, count).await?;
        let children = self.leases.children().await?;
        match verdict(&children, &leases.names(), self.permits) {
            Verdict::Gone => Err(leases.removed()),
            Verdict::Granted => Ok(Some(leases.into_hold().await?)),
            Verdict::Full => {
                leases.cleanup.finish().await?;
                Ok(None)
            }
        }
    }

    /// How many permits nobody has at the moment, by the word of the session's server.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn available(&self) -> Result<usize, RecipeError> {
        let taken = self.leases.children().await?.len();
        Ok(self.permits.saturating_sub(taken))
    }
}

pub(super) fn in_range(what: &'static str, value: usize, max: usize) -> Result<(), RecipeError> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(RecipeError::OutOfRange {
            what,
            value,
            min: 1,
            max,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Gone,
    Granted,
    Full,
}

/// Whether the holder of `mine` may go on, where these leases exist.
fn verdict(leases: &[String], mine: &[&str], permits: usize) -> Verdict {
    if !mine.iter().all(|name| leases.iter().any(|l| l == name)) {
        Verdict::Gone
    } else if leases.len() <= permits {
        Verdict::Granted
    } else {
        Verdict::Full
    }
}

/// Our leases, which may be too many yet.
struct Leases {
    place: Place,
    created: Vec<Created>,
    cleanup: Cleanup,
}

impl Leases {
    async fn create(place: &Place, label: &Bytes, count: usize) -> Result<Self, RecipeError> {
        // Nobody counts on their names but we: should an answer be lost, what was created under
        // this mark is deleted, and the next attempt has another.
        loop {
            let mark = format!("_c_{}-", Guid::new());
            let mut cleanup = Cleanup::marked(place, mark.clone());
            let name = format!("{mark}lease-");
            let op = place.create_op(&name, label, CreateMode::EphemeralSequential);
            match place.client.multi(vec![op; count]).await {
                Ok(results) => {
                    let created = results.iter().map(|result| created(place, result));
                    let created = created.collect::<Result<Vec<_>, _>>()?;
                    if created.len() != count {
                        return Err(ClientError::Protocol.into());
                    }
                    let paths = created.iter().map(|lease| place.child(&lease.name));
                    cleanup.set_paths(paths.collect());
                    return Ok(Self {
                        place: place.clone(),
                        created,
                        cleanup,
                    });
                }
                Err(error) if unknown(error) => {
                    cleanup.finish().await?;
                }
                Err(error) => {
                    if !error.outcome_unknown() {
                        cleanup.disarm();
                    }
                    match error.code() {
                        Some(ErrorCode::NoNode) => place.ensure().await?,
                        Some(ErrorCode::Throttled) => place.pause_refused().await,
                        _ => return Err(error.into()),
                    }
                }
            }
        }
    }

    fn names(&self) -> Vec<&str> {
        self.created.iter().map(|lease| &*lease.name).collect()
    }

    async fn watch(&self) -> Result<(Vec<String>, WatchFuture), RecipeError> {
        let place = &self.place;
        let listed = repeat(|| place.client.children_and_watch(place.dir())).await;
        if code(&listed) == Some(ErrorCode::NoNode) {
            return Err(RecipeError::Removed {
                path: place.dir().to_owned(),
            });
        }
        let (children, _, changed) = listed?;
        Ok((children, changed))
    }

    fn removed(self) -> RecipeError {
        let path = self.place.child(&self.created[0].name);
        RecipeError::Removed { path }
    }

    async fn into_hold(self) -> Result<Hold, LostReason> {
        let nodes = self.created.iter();
        let nodes = nodes.map(|lease| (self.place.child(&lease.name), lease.stat.czxid));
        // One multi creates all of them: one owner, one zxid.
        let stat = self.created[0].stat;
        let (owner, token) = (stat.ephemeral_owner, stat.czxid);
        let nodes = nodes.collect();
        Hold::new(&self.place, owner, nodes, token, self.cleanup).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Up to four who want one or two of up to three permits, every order of their creations and
    /// of their looks: never more inside than permits, though there is no turnstile at all.
    #[test]
    fn without_a_turnstile_there_are_never_too_many() {
        fn explore(wanted: &[usize], leases: &mut Vec<String>, inside: u32, permits: usize) {
            let names = |who: usize| -> Vec<String> {
                (0..wanted[who]).map(|i| format!("{who}-{i}")).collect()
            };
            let granted: usize = (0..wanted.len())
                .filter(|who| inside >> who & 1 == 1)
                .map(|who| wanted[who])
                .sum();
            assert!(granted <= permits);
            for who in 0..wanted.len() {
                let mine = names(who);
                if !leases.contains(&mine[0]) {
                    let before = leases.len();
                    leases.extend(mine);
                    explore(wanted, leases, inside, permits);
                    leases.truncate(before);
                } else if inside >> who & 1 == 0 {
                    let mine: Vec<&str> = mine.iter().map(String::as_str).collect();
                    if verdict(leases, &mine, permits) == Verdict::Granted {
                        explore(wanted, leases, inside | 1 << who, permits);
                    }
                }
            }
        }
        for permits in 1..=3 {
            for wanted in [&[1, 1, 1, 1][..], &[2, 1, 1], &[2, 2, 1], &[1, 2]] {
                if wanted.iter().all(|count| *count <= permits) {
                    explore(wanted, &mut Vec::new(), 0, permits);
                }
            }
        }
    }

    #[test]
    fn a_lease_that_was_deleted_is_missed() {
        let leases = ["a".to_owned(), "b".to_owned()];
        assert_eq!(verdict(&leases, &["a", "b"], 2), Verdict::Granted);
        assert_eq!(verdict(&leases, &["a"], 1), Verdict::Full);
        assert_eq!(verdict(&leases, &["a", "c"], 3), Verdict::Gone);
    }
}
