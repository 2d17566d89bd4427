//! A place in a line: an ephemeral sequential znode that is found again when the answer is lost.

use std::pin::pin;

use bytes::Bytes;
use tracing::debug;

use super::common::{Cleanup, Created, Guid, Place, code, created, repeat, unknown};
use super::hold::{Hold, until_removed};
use super::line::{Marks, Position, position};
use super::{LostReason, RecipeError};
use crate::client::ClientError;
use crate::wire::{CreateMode, ErrorCode};

/// One's own znode in a line. Dropped, it is deleted.
#[derive(Debug)]
pub(crate) struct Ticket {
    place: Place,
    /// How its name begins: Curator's protection.
    mark: String,
    created: Created,
    cleanup: Cleanup,
}

impl Ticket {
    /// Creates it: a znode whose name ends in `suffix` and the counter. What is above it is created
    /// where it is missing.
    ///
    /// Gives as well the children as they were at some time after, where that cost nothing.
    pub(crate) async fn draw(
        place: &Place,
        suffix: &str,
        data: &Bytes,
    ) -> Result<(Self, Option<Vec<String>>), RecipeError> {
        let mark = format!("_c_{}-", Guid::new());
        let name = format!("{mark}{suffix}");
        let mut cleanup = Cleanup::marked(place, mark.clone());
        let mut in_doubt = false;
        let (created, children) = loop {
            let op = place.create_op(&name, data, CreateMode::EphemeralSequential);
            let create = place.client.multi(vec![op]);
            // Requested together, so that taking what is free costs one round trip.
            let (results, children) = tokio::join!(create, place.client.children(place.dir()));
            match results {
                Ok(results) => {
                    let result = results.first().ok_or(ClientError::Protocol)?;
                    break (created(place, result)?, children.ok());
                }
                Err(error) if unknown(error) => {
                    debug!(%name, %error, "created or not?");
                    in_doubt = true;
                    if let Some(found) = find(place, &mark).await? {
                        break (found, None);
                    }
                }
                Err(error) if error.code() == Some(ErrorCode::NoNode) => place.ensure().await?,
                Err(error) if error.code() == Some(ErrorCode::Throttled) => {
                    place.pause_refused().await;
                }
                Err(error) => {
                    if !in_doubt && !error.outcome_unknown() {
                        cleanup.disarm();
                    }
                    return Err(error.into());
                }
            }
        };
        if !in_doubt {
            cleanup.set_paths(vec![place.child(&created.name)]);
        }
        let ticket = Self {
            place: place.clone(),
            mark,
            created,
            cleanup,
        };
        // The two requests may have changed places.
        let children = children.filter(|names| names.contains(&ticket.created.name));
        Ok((ticket, children))
    }

    /// What no other name contains.
    pub(crate) fn mark(&self) -> &str {
        &self.mark
    }

    /// Its znode's name.
    pub(crate) fn name(&self) -> &str {
        &self.created.name
    }

    /// Its znode's path.
    pub(crate) fn path(&self) -> String {
        self.place.child(&self.created.name)
    }

    /// The zxid that created it.
    pub(crate) const fn czxid(&self) -> i64 {
        self.created.stat.czxid
    }

    /// Somebody else has deleted it.
    pub(crate) fn removed(mut self) -> RecipeError {
        self.cleanup.disarm();
        RecipeError::Removed { path: self.path() }
    }

    /// Deletes it, and returns when it is gone.
    pub(crate) async fn give_up(self) -> Result<(), RecipeError> {
        self.cleanup.finish().await?;
        Ok(())
    }

    /// Returns when somebody else has deleted it.
    pub(crate) async fn until_removed(&self) {
        until_removed(&self.place, self.path(), self.czxid()).await;
    }

    /// What it has become: something that is held as long as its znode is there.
    ///
    /// # Errors
    /// The session may be over already.
    pub(crate) async fn into_hold(self, token: i64) -> Result<Hold, LostReason> {
        let node = (self.path(), self.czxid());
        let owner = self.created.stat.ephemeral_owner;
        Hold::new(&self.place, owner, vec![node], token, self.cleanup).await
    }
}

/// What was created under a mark by a request whose answer was lost.
async fn find(place: &Place, mark: &str) -> Result<Option<Created>, ClientError> {
    // What the lost connection carried is committed by now, or never will be.
    repeat(|| place.client.sync(place.dir())).await?;
    let mut children = place.children().await?;
    children.retain(|name| name.contains(mark));
    children.sort_unstable();
    for name in children {
        let path = place.child(&name);
        if let Some(stat) = repeat(|| place.client.exists(&path)).await? {
            return Ok(Some(Created { name, stat }));
        }
    }
    Ok(None)
}

/// Stands in a line until nobody is in the way. `None` only where `wait` is false, and somebody is.
pub(crate) async fn stand_in_line<K: Copy>(
    place: &Place,
    suffix: &str,
    data: &Bytes,
    marks: Marks<K>,
    blocks: impl Fn(K) -> bool,
    wait: bool,
) -> Result<Option<Hold>, RecipeError> {
    let (ticket, mut seen) = Ticket::draw(place, suffix, data).await?;
    let outcome = {
        let mut removed = pin!(ticket.until_removed());
        loop {
            let children = match seen.take() {
                Some(children) => children,
                None => place.children().await?,
            };
            match position(&children, ticket.mark(), marks, &blocks) {
                Position::Gone => break Outcome::Gone,
                Position::Free => break Outcome::Free,
                Position::Behind(_) if !wait => break Outcome::Busy,
                Position::Behind(name) => {
                    let before = place.child(name);
                    tokio::select! {
                        gone = until_changed(place, &before) => gone?,
                        () = &mut removed => break Outcome::Gone,
                    }
                }
            }
        }
    };
    match outcome {
        Outcome::Gone => Err(ticket.removed()),
        Outcome::Busy => ticket.give_up().await.map(|()| None),
        Outcome::Free => {
            let token = ticket.czxid();
            Ok(Some(ticket.into_hold(token).await?))
        }
    }
}

enum Outcome {
    Gone,
    Free,
    Busy,
}

/// Returns when the znode is changed or deleted, or is not there to begin with.
pub(crate) async fn until_changed(place: &Place, path: &str) -> Result<(), ClientError> {
    // Not `exists`, which would leave a watch behind where there is nothing to wait for.
    let got = repeat(|| place.client.get_and_watch(path)).await;
    if code(&got) == Some(ErrorCode::NoNode) {
        return Ok(());
    }
    let (_, _, changed) = got?;
    changed.await.map(drop)
}
