//! A queue, first in first out or by priority, each item taken once.
//!
//! An item is a persistent sequential znode whose name bears its priority. There are two ways to get
//! one:
//!
//! - [`Queue::take`], **at most once**: in one step the item is deleted and a claim to it created. The
//!   claim tells us that it was we who took it, should the answer be lost; it is deleted in the
//!   background. An item is lost only with the process (or the session) that has just taken it.
//! - [`Queue::reserve`], **at least once**: an ephemeral claim is created; nobody else gets the item as
//!   long as that exists. [`Reserved::done`] deletes item and claim in one step. When the claim goes
//!   with its session, or is dropped, the item is back in its old place.
//!
//! Who puts an item in, too, leaves a mark in the same step until the answer has arrived: an item is
//! never put in twice.
//!
//! # Layout
//!
//! ```text
//! /path/entries/entry-100-0000000042       an item; 100 is its priority, the lowest is first
//! /path/taken/entry-100-0000000042         ephemeral: somebody's claim to it
//! /path/marks/<uuid>                       ephemeral: this was put in
//! ```
//!
//! This is kazoo's `LockingQueue`, which may be used along with it. (Curator's queues write a format
//! of their own.)
//!
//! # Guarantees
//!
//! - Items leave in the order of priority, and of arrival among equals, as far as the session's server
//!   knows of them.
//! - [`Queue::put`] that returned has put in exactly one item. Ended in an error, at most one.
//! - `take` may be dropped at any time: an item that it was about to take goes back to its place.
//! - All who wait are woken by a new item, and all but one sleep on: for very many consumers use
//!   several queues.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn work(_: &[u8]) {}
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::queue::Queue;
//!
//! let jobs = Queue::new(client, "/jobs");
//! jobs.put("resize 17").await?;
//! jobs.put_with(1, "urgent").await?;
//!
//! let job = jobs.reserve().await?;
//! job.run(work(&job.item().value)).await?;
//! job.done().await?;
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeSet;
use std::ops::Deref;

use bytes::Bytes;
use tokio::runtime::Handle;
use tracing::{debug, warn};

use super::common::{Cleanup, Guid, Place, code, created, repeat, unknown};
use super::line::Sequence;
use super::session::{current, proves};
use super::{Hold, LostReason, RecipeError};
use crate::client::{Client, ClientError, WatchFuture};
use crate::wire::{Acl, CreateMode, ErrorCode, MultiOp};

/// The priority of an item that was put in without one: kazoo's.
pub const PRIORITY: u16 = 100;

/// The last priority.
pub const PRIORITY_MAX: u16 = 999;

/// A queue at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Queue {
    entries: Place,
    taken: Place,
    marks: Place,
}

/// What was in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What was put in.
    pub value: Bytes,
    /// Its priority, 0 to [`PRIORITY_MAX`]; the lowest is first.
    pub priority: u16,
    /// Its znode's name.
    pub name: String,
}

/// An item that nobody else gets as long as this is held.
#[derive(Debug)]
#[must_use = "what is dropped is back in the queue"]
pub struct Reserved {
    hold: Hold,
    item: Item,
    queue: Queue,
}

fn parse(name: &str) -> Option<(u16, Sequence)> {
    let (priority, number) = name.strip_prefix("entry-")?.split_once('-')?;
    Some((priority.parse().ok()?, Sequence::parse(number)?))
}

/// What may be taken, the first one first.
fn available(entries: &[String], taken: &[String]) -> Vec<(u16, String)> {
    let taken: BTreeSet<&String> = taken.iter().collect();
    let mut free: Vec<_> = entries
        .iter()
        .filter(|name| !taken.contains(name))
        .filter_map(|name| parse(name).map(|(priority, number)| (priority, number, name)))
        .collect();
    free.sort_by(|(a_priority, a, _), (b_priority, b, _)| {
        let arrival = match (a == b, a.before(*b)) {
            (true, _) => std::cmp::Ordering::Equal,
            (_, true) => std::cmp::Ordering::Less,
            (_, false) => std::cmp::Ordering::Greater,
        };
        a_priority.cmp(b_priority).then(arrival)
    });
    free.into_iter()
        .map(|(priority, _, name)| (priority, name.clone()))
        .collect()
}

impl Queue {
    /// The queue at this path. Nothing is sent yet.
    pub fn new(client: &Client, path: &str) -> Self {
        let place = Place::new(client, path);
        Self {
            entries: place.below("entries"),
            taken: place.below("taken"),
            marks: place.below("marks"),
        }
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.entries.acl.clone_from(&acl);
        self.taken.acl.clone_from(&acl);
        self.marks.acl = acl;
        self
    }

    /// Puts an item in, behind all of the same [`PRIORITY`].
    ///
    /// # Errors
    /// [`RecipeError::Client`]. Where that is the session's end, the item may be in or not.
    pub async fn put(&self, value: impl Into<Bytes>) -> Result<(), RecipeError> {
        self.put_with(PRIORITY, value).await
    }

    /// Puts an item in, behind all of its priority and before those of greater ones.
    ///
    /// # Errors
    /// As [`Self::put_all`].
    pub async fn put_with(
        &self,
        priority: u16,
        value: impl Into<Bytes>,
    ) -> Result<(), RecipeError> {
        self.put_all(priority, vec![value.into()]).await
    }

    /// Puts all of these in, in this order, or none.
    ///
    /// # Errors
    /// [`RecipeError::OutOfRange`] where the priority is greater than [`PRIORITY_MAX`];
    /// [`RecipeError::Client`] as for [`Self::put`], or because all of it is too large for one
    /// request.
    pub async fn put_all(&self, priority: u16, values: Vec<Bytes>) -> Result<(), RecipeError> {
        if priority > PRIORITY_MAX {
            return Err(RecipeError::OutOfRange {
                what: "priority",
                value: priority.into(),
                min: 0,
                max: PRIORITY_MAX.into(),
            });
        }
        let mark = Guid::new().to_string();
        let mark_path = self.marks.child(&mark);
        let name = format!("entry-{priority:03}-");
        let mode = CreateMode::PersistentSequential;
        let mut ops: Vec<MultiOp> = values
            .iter()
            .map(|value| self.entries.create_op(&name, value, mode))
            .collect();
        ops.push(
            self.marks
                .create_op(&mark, &Bytes::new(), CreateMode::Ephemeral),
        );
        let client = &self.entries.client;
        // However this ends, the mark goes.
        let mut cleanup = Cleanup::path(&self.marks, mark_path.clone());
        let session = current(client).await?;
        loop {
            match client.multi(ops.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if unknown(error) => {
                    debug!(%mark, %error, "put in or not?");
                    repeat(|| client.sync(self.marks.dir())).await?;
                    if repeat(|| client.exists(&mark_path)).await?.is_some() {
                        return Ok(());
                    }
                    proves(client, session).await?;
                }
                Err(error) => match error.code() {
                    Some(ErrorCode::NoNode) => self.ensure().await?,
                    Some(ErrorCode::Throttled) => self.entries.pause_refused().await,
                    _ => {
                        if !error.outcome_unknown() {
                            cleanup.disarm();
                        }
                        return Err(error.into());
                    }
                },
            }
        }
    }

    /// Waits for an item and takes it. May be dropped at any time: an item that was about to be
    /// taken goes back to its place.
    ///
    /// # Errors
    /// [`RecipeError::Client`]. Where that is the session's end, an item may be lost; see the
    /// [module](self).
    pub async fn take(&self) -> Result<Item, RecipeError> {
        let taken = self.first(true, Self::take_this).await?;
        Ok(taken.expect("who waits gets one"))
    }

    /// Takes an item where there is one that nobody has reserved.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub async fn try_take(&self) -> Result<Option<Item>, RecipeError> {
        self.first(false, Self::take_this).await
    }

    /// Waits for an item and reserves it. May be dropped at any time.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over.
    pub async fn reserve(&self) -> Result<Reserved, RecipeError> {
        let reserved = self.first(true, Self::reserve_this).await?;
        Ok(reserved.expect("who waits gets one"))
    }

    /// Reserves an item where there is one that nobody has reserved.
    ///
    /// # Errors
    /// As [`Self::reserve`].
    pub async fn try_reserve(&self) -> Result<Option<Reserved>, RecipeError> {
        self.first(false, Self::reserve_this).await
    }

    /// How many items there are, the reserved ones among them, by the word of the session's server.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn len(&self) -> Result<usize, RecipeError> {
        Ok(self.entries.children().await?.len())
    }

    /// Whether there are no items, by the word of the session's server.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn is_empty(&self) -> Result<bool, RecipeError> {
        Ok(self.len().await? == 0)
    }

    async fn ensure(&self) -> Result<(), RecipeError> {
        for place in [&self.entries, &self.taken, &self.marks] {
            place.ensure_persistent().await?;
        }
        Ok(())
    }

    /// Tries the items in their order until `get` succeeds with one; waits for more where it is to.
    async fn first<'a, T, F>(
        &'a self,
        wait: bool,
        get: impl Fn(&'a Self, u16, String) -> F,
    ) -> Result<Option<T>, RecipeError>
    where
        F: Future<Output = Result<Option<T>, RecipeError>> + 'a,
    {
        // Watches are set only where there was nothing to take.
        let mut watching = false;
        loop {
            let (entries, taken, changed) = if watching {
                let (taken, released) = self.list_and_watch(&self.taken).await?;
                let (entries, put) = self.list_and_watch(&self.entries).await?;
                (entries, taken, Some((put, released)))
            } else {
                let taken = self.taken.children().await?;
                (self.entries.children().await?, taken, None)
            };
            for (priority, name) in available(&entries, &taken) {
                if let Some(got) = get(self, priority, name).await? {
                    return Ok(Some(got));
                }
            }
            if !wait {
                return Ok(None);
            }
            if let Some((put, released)) = changed {
                tokio::select! {
                    told = put => drop(told?),
                    told = released => drop(told?),
                }
            }
            watching = true;
        }
    }

    async fn list_and_watch(
        &self,
        place: &Place,
    ) -> Result<(Vec<String>, WatchFuture), RecipeError> {
        loop {
            let listed = repeat(|| place.client.children_and_watch(place.dir())).await;
            if code(&listed) != Some(ErrorCode::NoNode) {
                let (names, _, changed) = listed?;
                return Ok((names, changed));
            }
            self.ensure().await?;
        }
    }

    /// `None` where somebody else was faster.
    async fn take_this(&self, priority: u16, name: String) -> Result<Option<Item>, RecipeError> {
        let client = &self.entries.client;
        let (entry, claim) = (self.entries.child(&name), self.taken.child(&name));
        let got = repeat(|| client.get(&entry)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(None);
        }
        let (value, _) = got?;
        let guid = Bytes::from(Guid::new().to_string());
        let ops = vec![
            self.taken.create_op(&name, &guid, CreateMode::Ephemeral),
            MultiOp::Delete {
                path: entry,
                version: -1,
            },
        ];
        let mut taking = Taking {
            queue: self,
            name: &name,
            value: &value,
            guid: &guid,
            armed: true,
            runtime: Handle::current(),
        };
        let session = current(client).await?;
        let won = loop {
            match client.multi(ops.clone()).await {
                Ok(results) => {
                    let result = results.first().ok_or(ClientError::Protocol)?;
                    break Some(created(&self.taken, result)?.stat.czxid);
                }
                Err(error) if unknown(error) => {
                    debug!(%name, %error, "taken or not?");
                    // Either it was done, and the claim is ours; or not, and the loop goes on.
                    if let Some((_, stat)) = self.claim(&name, &guid).await? {
                        break Some(stat.czxid);
                    }
                    proves(client, session).await?;
                }
                Err(error) => match error.code() {
                    Some(ErrorCode::NodeExists | ErrorCode::NoNode) => break None,
                    Some(ErrorCode::Throttled) => self.entries.pause_refused().await,
                    _ => return Err(error.into()),
                },
            }
        };
        taking.armed = false;
        drop(taking);
        let Some(czxid) = won else {
            return Ok(None);
        };
        // Dropped, it deletes the claim in the background.
        Cleanup::owned(&self.taken, claim.clone()).set_node(claim, czxid);
        Ok(Some(Item {
            value,
            priority,
            name,
        }))
    }

    /// `None` where somebody else was faster.
    async fn reserve_this(
        &self,
        priority: u16,
        name: String,
    ) -> Result<Option<Reserved>, RecipeError> {
        let client = &self.entries.client;
        let (entry, claim) = (self.entries.child(&name), self.taken.child(&name));
        let guid = Bytes::from(Guid::new().to_string());
        let ops = vec![
            MultiOp::Check {
                path: entry.clone(),
                version: -1,
            },
            self.taken.create_op(&name, &guid, CreateMode::Ephemeral),
        ];
        let mut cleanup = Cleanup::holding(&self.taken, claim.clone(), guid.clone());
        let stat = loop {
            match client.multi(ops.clone()).await {
                Ok(results) => {
                    let result = results.get(1).ok_or(ClientError::Protocol)?;
                    break created(&self.taken, result)?.stat;
                }
                Err(error) if unknown(error) => {
                    if let Some((_, stat)) = self.claim(&name, &guid).await? {
                        break stat;
                    }
                }
                Err(error) => match error.code() {
                    Some(ErrorCode::NodeExists | ErrorCode::NoNode) => {
                        cleanup.disarm();
                        return Ok(None);
                    }
                    Some(ErrorCode::Throttled) => self.entries.pause_refused().await,
                    _ => return Err(error.into()),
                },
            }
        };
        cleanup.set_node(claim.clone(), stat.czxid);
        let nodes = vec![(claim, stat.czxid)];
        let owner = stat.ephemeral_owner;
        let hold = Hold::new(&self.taken, owner, nodes, stat.czxid, cleanup).await?;
        let got = repeat(|| client.get(&entry)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(None); // deleted without a claim, by somebody who is not of this recipe
        }
        let item = Item {
            value: got?.0,
            priority,
            name,
        };
        Ok(Some(Reserved {
            hold,
            item,
            queue: self.clone(),
        }))
    }

    /// The claim to this item, where it is the one that bears `guid`.
    async fn claim(
        &self,
        name: &str,
        guid: &Bytes,
    ) -> Result<Option<(Bytes, crate::wire::Stat)>, ClientError> {
        let client = &self.taken.client;
        let path = self.taken.child(name);
        repeat(|| client.sync(&path)).await?;
        let got = repeat(|| client.get(&path)).await;
        match code(&got) {
            Some(ErrorCode::NoNode) => Ok(None),
            _ => Ok(Some(got?).filter(|(data, _)| data == guid)),
        }
    }
}

/// An item that is being taken. Dropped in the middle, it goes back to its place.
struct Taking<'a> {
    queue: &'a Queue,
    name: &'a str,
    value: &'a Bytes,
    guid: &'a Bytes,
    armed: bool,
    runtime: Handle,
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let (queue, name) = (self.queue.clone(), self.name.to_owned());
        let (value, guid) = (self.value.clone(), self.guid.clone());
        self.runtime.spawn(async move {
            match put_back(&queue, &name, &value, &guid).await {
                Ok(()) | Err(ClientError::SessionExpired | ClientError::Closed) => {}
                Err(error) => warn!(%name, %error, "an item was lost"),
            }
        });
    }
}

/// Undoes [`Queue::take_this`], where it was done: the item is back under its old name, and the claim
/// gone, in one step.
async fn put_back(
    queue: &Queue,
    name: &str,
    value: &Bytes,
    guid: &Bytes,
) -> Result<(), ClientError> {
    while queue.claim(name, guid).await?.is_some() {
        let ops = vec![
            queue.entries.create_op(name, value, CreateMode::Persistent),
            MultiOp::Delete {
                path: queue.taken.child(name),
                version: -1,
            },
        ];
        match queue.entries.client.multi(ops).await {
            Ok(_) => return Ok(()),
            Err(error) if unknown(error) => {}
            Err(error) if error.code() == Some(ErrorCode::Throttled) => {
                queue.entries.pause_refused().await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Reserved {
    /// The item.
    pub const fn item(&self) -> &Item {
        &self.item
    }

    /// The item has been dealt with: deletes it.
    ///
    /// # Errors
    /// [`RecipeError::Lost`] where it was no longer ours: somebody else gets it, or has got it.
    pub async fn done(self) -> Result<Item, RecipeError> {
        self.hold.check_held()?;
        let client = &self.queue.entries.client;
        let entry = self.queue.entries.child(&self.item.name);
        let ops = vec![
            MultiOp::Delete {
                path: entry.clone(),
                version: -1,
            },
            MultiOp::Delete {
                path: self.hold.path().to_owned(),
                version: -1,
            },
        ];
        let mut in_doubt = false;
        loop {
            match client.multi(ops.clone()).await {
                Ok(_) => break,
                Err(error) if unknown(error) => in_doubt = true,
                Err(error) => match error.code() {
                    // Nobody deletes it but who has the claim.
                    Some(ErrorCode::NoNode) if in_doubt && self.hold.is_held() => break,
                    Some(ErrorCode::NoNode) => return Err(LostReason::Removed.into()),
                    Some(ErrorCode::Throttled) => self.queue.entries.pause_refused().await,
                    _ => return Err(error.into()),
                },
            }
        }
        let Self { hold, item, .. } = self;
        hold.forget();
        Ok(item)
    }

    /// Puts the item back in its place, and returns when others can get it.
    ///
    /// # Errors
    /// As [`Hold::release`].
    pub async fn put_back(self) -> Result<(), RecipeError> {
        self.hold.release().await
    }
}

impl Deref for Reserved {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every set of five items, every set of claims: what is free, by priority and arrival.
    #[test]
    fn what_is_available_and_in_which_order() {
        let all = [
            (1, "entry-001-0000000004"),
            (100, "entry-100-0000000001"),
            (100, "entry-100-0000000003"),
            (100, "entry-100-2147483647"),
            (999, "entry-999-0000000000"),
        ];
        let pick = |set: u32| -> Vec<String> {
            (0..all.len())
                .rev()
                .filter(|i| set >> i & 1 == 1)
                .map(|i| all[i].1.to_owned())
                .collect()
        };
        for entries in 0..1_u32 << all.len() {
            for taken in 0..1_u32 << all.len() {
                let mut listed = pick(entries);
                listed.push("entry-x".into());
                let wanted: Vec<_> = (0..all.len())
                    .filter(|i| (entries & !taken) >> i & 1 == 1)
                    .map(|i| (all[i].0, all[i].1.to_owned()))
                    .collect();
                assert_eq!(available(&listed, &pick(taken)), wanted);
            }
        }
    }
}
