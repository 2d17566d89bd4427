//! A barrier: whoever comes waits until somebody opens it.
//!
//! The barrier is closed as long as its znode exists. To open it is to delete that.
//!
//! # Layout
//!
//! The znode at the path, persistent: Curator's `DistributedBarrier` and kazoo's `Barrier`. It
//! outlives the session that closed it.
//!
//! # Guarantees
//!
//! Who waits goes on once the barrier has been open after the call began, and not before: the first
//! look is behind a `sync`. All are told by one event each.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::barrier::Barrier;
//!
//! let migrated = Barrier::new(client, "/barriers/migrated");
//! migrated.close().await?; // by who migrates, first of all
//! migrated.wait().await?; // by everybody else
//! # Ok(())
//! # }
//! ```

use super::RecipeError;
use super::common::{Place, code, repeat};
use super::ticket::until_changed;
use crate::client::Client;
use crate::wire::{Acl, ErrorCode};

/// A barrier at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Barrier {
    place: Place,
}

impl Barrier {
    /// The barrier at this path. Nothing is sent yet.
    pub fn new(client: &Client, path: &str) -> Self {
        Self {
            place: Place::new(client, path),
        }
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.acl = acl;
        self
    }

    /// Closes it, where it is not closed already.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn close(&self) -> Result<(), RecipeError> {
        Ok(self.place.ensure_persistent().await?)
    }

    /// Opens it, where it is not open already.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn open(&self) -> Result<(), RecipeError> {
        let deleted = repeat(|| self.place.client.delete(self.place.dir(), -1)).await;
        match code(&deleted) {
            Some(ErrorCode::NoNode) => Ok(()),
            _ => Ok(deleted?),
        }
    }

    /// Returns when it is open.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn wait(&self) -> Result<(), RecipeError> {
        let place = &self.place;
        repeat(|| place.client.sync(place.dir())).await?;
        while repeat(|| place.client.exists(place.dir())).await?.is_some() {
            until_changed(place, place.dir()).await?;
        }
        Ok(())
    }
}
