//! A lock for one holder at a time, without a herd.
//!
//! Who wants the lock creates an ephemeral sequential znode. The one with the smallest number holds
//! it; each of the others watches the znode just before its own and nothing else, so that a release
//! wakes one waiter, however many there are. They get it in the order in which they came.
//!
//! Taking a free lock costs one round trip (a write and, sent with it, a read), releasing it one
//! write, and handing it on one write and the next one's read.
//!
//! # Layout
//!
//! ```text
//! /path                                    a container
//! /path/_c_<uuid>-lock-0000000042          ephemeral; its data is the holder's label
//! ```
//!
//! This is Curator's `InterProcessMutex`. kazoo's `Lock` takes part when it is told of these names,
//! `Lock(path, extra_lock_patterns=["-lock-"])`; its own names are understood here.
//!
//! # Guarantees
//!
//! - At most one contender's znode is the first, and only its creator's [`Hold`] says that it is held:
//!   never after its session's end ([`Hold::is_held`] says how exact that is). The [fencing
//!   token](Hold::token) is the zxid that created the znode: it grows from holder to holder.
//! - The order is that of arrival. Nobody waits once those before it have released the lock, or their
//!   sessions are over.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn nightly_job(_token: i64) {}
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::lock::Lock;
//!
//! let lock = Lock::new(client, "/jobs/nightly");
//! let held = lock.acquire().await?;
//! // The job is dropped at once should the lock be lost.
//! held.run(nightly_job(held.token())).await?;
//! held.release().await?;
//! # Ok(())
//! # }
//! ```

use bytes::Bytes;

use super::common::{Place, code, repeat};
use super::line::{Marks, in_order};
use super::ticket::stand_in_line;
use super::{Hold, RecipeError};
use crate::client::Client;
use crate::wire::{Acl, ErrorCode, Stat};

/// What Curator and kazoo put before the counter.
const MARKS: Marks<()> = &[("-lock-", ()), ("__lock__", ())];

/// A lock at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Lock {
    place: Place,
    label: Bytes,
}

/// Who holds something, or waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its znode.
    pub path: String,
    /// What it says of itself.
    pub label: Bytes,
    /// Its znode's metadata: session, and since when.
    pub stat: Stat,
}

impl Lock {
    /// The lock at this path. Nothing is sent yet.
    pub fn new(client: &Client, path: &str) -> Self {
        Self {
            place: Place::new(client, path),
            label: Bytes::new(),
        }
    }

    /// What [`Self::contenders`] shows of this one.
    #[must_use]
    pub fn label(self, label: impl Into<Bytes>) -> Self {
        Self {
            label: label.into(),
            ..self
        }
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.acl = acl;
        self
    }

    /// Waits for the lock. May be dropped at any time: the place in the line is given up.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over, [`RecipeError::Removed`] where somebody
    /// else deleted the place in the line.
    pub async fn acquire(&self) -> Result<Hold, RecipeError> {
        let held = self.stand(true).await?;
        Ok(held.expect("who waits gets it"))
    }

    /// Takes the lock where it is free, else gives `None`.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub async fn try_acquire(&self) -> Result<Option<Hold>, RecipeError> {
        self.stand(false).await
    }

    /// The holder, and after it those who wait, in their order.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn contenders(&self) -> Result<Vec<Contender>, RecipeError> {
        contenders(&self.place, MARKS).await
    }

    async fn stand(&self, wait: bool) -> Result<Option<Hold>, RecipeError> {
        stand_in_line(&self.place, "lock-", &self.label, MARKS, |()| true, wait).await
    }

    pub(crate) const fn place(&self) -> &Place {
        &self.place
    }
}

/// The contenders at a place, in order.
pub(crate) async fn contenders<K: Copy>(
    place: &Place,
    marks: Marks<K>,
) -> Result<Vec<Contender>, RecipeError> {
    let children = place.children().await?;
    let mut line = Vec::new();
    for (name, _) in in_order(&children, marks) {
        let path = place.child(name);
        let got = repeat(|| place.client.get(&path)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            continue; // gone since
        }
        let (label, stat) = got?;
        line.push(Contender { path, label, stat });
    }
    Ok(line)
}
