//! Group membership: who is there, each with some data of its own.
//!
//! A member is an ephemeral znode of its name. Who follows the group watches the list of the children
//! and each one's data, and reads again only what has changed.
//!
//! # Layout
//!
//! ```text
//! /path/<name>                             ephemeral; its data is the member's
//! ```
//!
//! This is Curator's `GroupMember`. (kazoo's `Party` has names that nobody can choose.)
//!
//! # Guarantees
//!
//! - A name is one session's at a time. Who joins under a name that an earlier session still has (its
//!   own, before it was restarted) waits until that is over.
//! - Who follows sees each state that stays, in order; states that were brief may be missed.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::group::Group;
//!
//! let workers = Group::new(client, "/workers");
//! let me = workers.join("host-7", "10.0.0.7:9000").await?;
//! let mut members = workers.follow();
//! while me.is_held() {
//!     for (name, member) in members.next().await? {
//!         println!("{name} at {:?}", member.data);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Deref;
use std::pin::Pin;
use std::task::Poll;

use bytes::Bytes;

use super::common::{Cleanup, Place, code, created, repeat, unknown};
use super::session::is_current;
use super::ticket::until_changed;
use super::{Hold, RecipeError};
use crate::client::{Client, ClientError, WatchFuture};
use crate::wire::{Acl, CreateMode, ErrorCode, Stat};

/// A group at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Group {
    place: Place,
}

/// One member, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its data.
    pub data: Bytes,
    /// Its znode's metadata: the session, since when, and the version of the data.
    pub stat: Stat,
}

/// One's own place in a group.
#[derive(Debug)]
#[must_use = "who drops it leaves the group"]
pub struct Joined {
    hold: Hold,
    place: Place,
}

impl Group {
    /// The group at this path. Nothing is sent yet.
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

    /// Joins under a name. Waits where another session has it. May be dropped at any time.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over or the name is none (it may not hold `/`),
    /// [`RecipeError::Taken`] where this very session has joined under the name already.
    pub async fn join(&self, name: &str, data: impl Into<Bytes>) -> Result<Joined, RecipeError> {
        let (place, data) = (&self.place, data.into());
        if name.is_empty() || name.contains('/') {
            return Err(RecipeError::BadName {
                name: name.to_owned(),
            });
        }
        let path = place.child(name);
        let mut in_doubt = false;
        // Whatever is there now is not what we create below.
        if repeat(|| place.client.exists(&path)).await?.is_some() {
            self.until_free(&path).await?;
        }
        let mut cleanup = Cleanup::owned(place, path.clone());
        let stat = loop {
            let op = place.create_op(name, &data, CreateMode::Ephemeral);
            match place.client.multi(vec![op]).await {
                Ok(results) => {
                    let result = results.first().ok_or(ClientError::Protocol)?;
                    break created(place, result)?.stat;
                }
                Err(error) if unknown(error) => {
                    in_doubt = true;
                    // Where it was done, the next attempt finds the name in use.
                    repeat(|| place.client.sync(place.dir())).await?;
                }
                Err(error) => match error.code() {
                    Some(ErrorCode::NoNode) => place.ensure().await?,
                    Some(ErrorCode::Throttled) => place.pause_refused().await,
                    Some(ErrorCode::NodeExists) => {
                        if in_doubt
                            && let Some(stat) = repeat(|| place.client.exists(&path)).await?
                            && is_current(&place.client, stat.ephemeral_owner).await?
                        {
                            break stat;
                        }
                        cleanup.disarm();
                        self.until_free(&path).await?;
                        cleanup = Cleanup::owned(place, path.clone());
                    }
                    _ => return Err(error.into()),
                },
            }
        };
        cleanup.set_node(path.clone(), stat.czxid);
        let nodes = vec![(path, stat.czxid)];
        let hold = Hold::new(place, stat.ephemeral_owner, nodes, stat.czxid, cleanup).await?;
        Ok(Joined {
            hold,
            place: place.clone(),
        })
    }

    /// Returns when another session no longer has this name.
    async fn until_free(&self, path: &str) -> Result<(), RecipeError> {
        while let Some(stat) = repeat(|| self.place.client.exists(path)).await? {
            if is_current(&self.place.client, stat.ephemeral_owner).await? {
                return Err(RecipeError::Taken {
                    path: path.to_owned(),
                });
            }
            until_changed(&self.place, path).await?;
        }
        Ok(())
    }

    /// Who is there, by the word of the session's server.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn members(&self) -> Result<BTreeMap<String, Member>, RecipeError> {
        let mut members = BTreeMap::new();
        for name in self.place.children().await? {
            let path = self.place.child(&name);
            let got = repeat(|| self.place.client.get(&path)).await;
            if code(&got) != Some(ErrorCode::NoNode) {
                let (data, stat) = got?;
                members.insert(name, Member { data, stat });
            }
        }
        Ok(members)
    }

    /// Follows who is there.
    pub fn follow(&self) -> Members {
        Members {
            place: self.place.clone(),
            listed: None,
            members: BTreeMap::new(),
            untold: true,
        }
    }
}

impl Joined {
    /// Changes our data.
    ///
    /// # Errors
    /// [`RecipeError::Lost`] where we are no longer a member, [`RecipeError::Client`].
    pub async fn set(&self, data: impl Into<Bytes>) -> Result<(), RecipeError> {
        self.hold.check_held()?;
        let data = data.into();
        let set = repeat(|| self.place.client.set(self.hold.path(), data.clone(), -1)).await;
        match code(&set) {
            Some(ErrorCode::NoNode) => Err(super::LostReason::Removed.into()),
            _ => Ok(set.map(drop)?),
        }
    }

    /// Leaves the group, and returns when that is so.
    ///
    /// # Errors
    /// As [`Hold::release`].
    pub async fn leave(self) -> Result<(), RecipeError> {
        self.hold.release().await
    }
}

impl Deref for Joined {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

/// Who is there, now and from now on. See [`Group::follow`].
#[derive(Debug)]
pub struct Members {
    place: Place,
    /// Resolves when the list of children has changed since it was read to its end.
    listed: Option<WatchFuture>,
    members: BTreeMap<String, (Member, WatchFuture)>,
    /// There is something that [`Self::next`] has not given yet.
    untold: bool,
}

impl Members {
    /// At first who is there now; then waits for each change. May be dropped: nothing is lost.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over. It may be called again where the client
    /// renews its session.
    pub async fn next(&mut self) -> Result<BTreeMap<String, Member>, RecipeError> {
        loop {
            if self.listed.is_none() {
                self.list().await?;
            }
            if std::mem::take(&mut self.untold) {
                let members = self.members.iter();
                return Ok(members
                    .map(|(name, (member, _))| (name.clone(), member.clone()))
                    .collect());
            }
            match self.changed().await {
                None => self.listed = None,
                Some(name) => {
                    self.members.remove(&name);
                    self.untold = true;
                    let listed = self.listed.take();
                    self.read(name).await?;
                    self.listed = listed;
                }
            }
        }
    }

    /// Reads the list, and the data of those who are new in it.
    async fn list(&mut self) -> Result<(), RecipeError> {
        let place = self.place.clone();
        let listed = repeat(|| place.client.children_and_watch(place.dir())).await;
        if code(&listed) == Some(ErrorCode::NoNode) {
            // There must be something to watch.
            place.ensure().await?;
            return Ok(());
        }
        let (names, _, changed) = listed?;
        let before = self.members.len();
        self.members.retain(|name, _| names.contains(name));
        self.untold |= self.members.len() != before;
        for name in names {
            if !self.members.contains_key(&name) {
                self.untold = true;
                self.read(name).await?;
            }
        }
        self.listed = Some(changed);
        Ok(())
    }

    async fn read(&mut self, name: String) -> Result<(), RecipeError> {
        let path = self.place.child(&name);
        let got = repeat(|| self.place.client.get_and_watch(&path)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(()); // the list has changed, too
        }
        let (data, stat, changed) = got?;
        self.members.insert(name, (Member { data, stat }, changed));
        Ok(())
    }

    /// Waits for a change: of the list, or of this member's data.
    async fn changed(&mut self) -> Option<String> {
        poll_fn(|cx| {
            if let Some(listed) = &mut self.listed
                && Pin::new(listed).poll(cx).is_ready()
            {
                return Poll::Ready(None);
            }
            for (name, (_, changed)) in &mut self.members {
                if Pin::new(changed).poll(cx).is_ready() {
                    return Poll::Ready(Some(name.clone()));
                }
            }
            Poll::Pending
        })
        .await
    }
}
