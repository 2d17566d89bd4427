//! Configuration in a directory of znodes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::follow::{Follower, Reading};
use super::{Attempts, BadValue, ConfigError, Entries, Known, Place, Step, Version};
use crate::client::{Client, ClientError, WatchFuture};
use crate::recipes::znodes::{all, join, op_create, op_delete, op_set, present};
use crate::wire::{Acl, CreateMode, MultiOp, Stat, validate_path};

/// A configuration of several entries that change together, each in a znode of its own below one,
/// followed until this is dropped.
pub struct ConfigMap<T> {
    place: Place,
    follower: Follower<T>,
}

impl<T> fmt::Debug for ConfigMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigMap")
            .field("path", &self.place.path)
            .finish_non_exhaustive()
    }
}

impl<T: Entries> ConfigMap<T> {
    /// Begins to follow the entries below `path`, which need not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn follow(client: &Client, path: &str) -> Self {
        let place = Place::new(client, path);
        let reading = place.clone();
        let read = move || {
            let place = reading.clone();
            async move { place.read_map_and_watch().await }
        };
        let follower = Follower::start(place.nodes.clone(), path, read);
        Self { place, follower }
    }

    /// Sets the access control list of what [`Self::update`] creates; open to all otherwise.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.nodes.acl = acl;
        self
    }

    /// The newest version that is known, if any.
    pub fn current(&self) -> Option<Arc<Version<T>>> {
        self.follower.current()
    }

    /// What is known, now and from now on. Versions that follow each other quickly may be skipped.
    pub fn changes(&self) -> watch::Receiver<Known<T>> {
        self.follower.changes()
    }

    /// Waits for the first version, and gives the newest.
    ///
    /// # Errors
    /// [`ClientError`] where nothing is followed any more.
    pub async fn first(&self) -> Result<Arc<Version<T>>, ClientError> {
        self.follower.first().await
    }

    /// Computes the next entries from the newest (`None` where there is no znode), and writes
    /// those that differ in one step, again where another update came between. `None` from `next`
    /// leaves everything as it is. Gives the version it is at then.
    ///
    /// # Errors
    /// As [`super::Config::update`]; [`ConfigError::BadKey`].
    pub async fn update(
        &self,
        mut next: impl FnMut(Option<&T>) -> Option<T>,
    ) -> Result<Option<i32>, ConfigError> {
        let place = &self.place;
        let mut attempts = Attempts(0);
        loop {
            let image = place.read_map_newest().await?;
            let old = match &image {
                None => None,
                Some(image) => Some(place.parse_map::<T>(image)?),
            };
            let Some(value) = next(old.as_ref()) else {
                return Ok(image.map(|image| image.stat.version));
            };
            let step = place.change(image.as_ref(), &value.to_entries())?;
            if place.try_write(&step).await? {
                return Ok(Some(step.becomes));
            }
            attempts.pause(&place.path).await?;
        }
    }

    /// Writes these entries whatever is there, and deletes all others; gives the new version.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub async fn replace(&self, value: &T) -> Result<i32, ConfigError> {
        let place = &self.place;
        let entries = value.to_entries();
        let mut attempts = Attempts(0);
        loop {
            let image = place.read_map_newest().await?;
            let step = place.change(image.as_ref(), &entries)?;
            if place.try_write(&step).await? {
                return Ok(step.becomes);
            }
            attempts.pause(&place.path).await?;
        }
    }
}

/// A map as it was at one moment.
struct Image {
    stat: Stat,
    entries: BTreeMap<String, (Bytes, Stat)>,
}

impl Image {
    fn parse<T: Entries>(&self) -> Result<Version<T>, (i32, BadValue)> {
        let entries = self.entries.iter();
        let entries = entries.map(|(key, (data, _))| (key.clone(), data.clone()));
        let newest = self.entries.values().map(|(_, stat)| stat.mzxid);
        // A deletion that was not done by an update shows in the parent's pzxid alone.
        let newest = newest.chain([self.stat.mzxid, self.stat.pzxid]).max();
        match T::from_entries(&entries.collect()) {
            Ok(value) => Ok(Version {
                value,
                version: self.stat.version,
                zxid: newest.unwrap_or(self.stat.mzxid),
            }),
            Err(why) => Err((self.stat.version, why)),
        }
    }
}

impl Place {
    async fn read_map_and_watch<T: Entries>(self) -> Result<Reading<T>, ClientError> {
        let mut watches = Some(Vec::new());
        let image = self.read_map(&mut watches).await?;
        Ok(Reading {
            found: image.map(|image| image.parse()),
            watches: watches.unwrap_or_default(),
        })
    }

    /// Reads the map as it is at one moment, and sets watches where there is room for them.
    async fn read_map(
        &self,
        watches: &mut Option<Vec<WatchFuture>>,
    ) -> Result<Option<Image>, ClientError> {
        let (nodes, client, path) = (&self.nodes, &self.nodes.client, &self.path);
        loop {
            // What fired before this round says nothing about it.
            if let Some(watches) = watches {
                watches.clear();
            }
            let before = if let Some(watches) = watches {
                let (stat, changed) = nodes.repeat(|| client.exists_and_watch(path)).await?;
                watches.push(changed);
                stat
            } else {
                nodes.repeat(|| client.exists(path)).await?
            };
            let Some(before) = before else {
                return Ok(None);
            };
            let names = if let Some(watches) = watches {
                let children = nodes.repeat(|| client.children_and_watch(path)).await;
                present(children)?.map(|(names, _, changed)| {
                    watches.push(changed);
                    names
                })
            } else {
                present(nodes.repeat(|| client.children(path)).await)?
            };
            let names = names.unwrap_or_default();
            let mut reads = Vec::new();
            for name in &names {
                reads.push(self.read_entry(name, watches.is_some()));
            }
            let read = all(reads).await;
            let mut entries = BTreeMap::new();
            for (name, read) in names.iter().zip(read) {
                // One that has gone meanwhile shows in what follows.
                if let Some((data, stat, changed)) = read? {
                    entries.insert(name.clone(), (data, stat));
                    if let (Some(watches), Some(changed)) = (watches.as_mut(), changed) {
                        watches.push(changed);
                    }
                }
            }
            let after = nodes.repeat(|| client.exists(path)).await?;
            let same = |after: Stat| {
                (after.czxid, after.version, after.cversion)
                    == (before.czxid, before.version, before.cversion)
            };
            if after.is_some_and(same) && entries.len() == names.len() {
                return Ok(Some(Image {
                    stat: before,
                    entries,
                }));
            }
        }
    }

    async fn read_map_newest(&self) -> Result<Option<Image>, ClientError> {
        let (client, path) = (&self.nodes.client, &self.path);
        self.nodes.repeat(|| client.sync(path)).await?;
        self.read_map(&mut None).await
    }

    async fn read_entry(
        &self,
        name: &str,
        watched: bool,
    ) -> Result<Option<(Bytes, Stat, Option<WatchFuture>)>, ClientError> {
        let (nodes, path) = (&self.nodes, join(&self.path, name));
        Ok(if watched {
            let read = nodes.repeat(|| nodes.client.get_and_watch(&path)).await;
            present(read)?.map(|(data, stat, changed)| (data, stat, Some(changed)))
        } else {
            nodes
                .get(&path)
                .await?
                .map(|(data, stat)| (data, stat, None))
        })
    }

    fn parse_map<T: Entries>(&self, image: &Image) -> Result<T, ConfigError> {
        match image.parse() {
            Ok(version) => Ok(version.value),
            Err((version, why)) => Err(ConfigError::Bad {
                path: self.path.to_string(),
                version,
                why,
            }),
        }
    }

    /// What turns one into the other.
    fn change(
        &self,
        old: Option<&Image>,
        new: &BTreeMap<String, Bytes>,
    ) -> Result<Step, ConfigError> {
        let none = BTreeMap::new();
        let acl = || self.nodes.acl.clone();
        let (mut ops, becomes, entries) = match old {
            None => {
                let create = op_create(&self.path, "", CreateMode::Persistent, acl());
                (vec![create], 0, &none)
            }
            Some(image) => {
                let version = image.stat.version;
                let set = op_set(&self.path, "", version);
                (vec![set], version.wrapping_add(1), &image.entries)
            }
        };
        let keys: BTreeSet<&String> = entries.keys().chain(new.keys()).collect();
        for key in keys {
            let path = join(&self.path, key);
            let op: MultiOp = match (entries.get(key), new.get(key)) {
                (Some((old, _)), Some(new)) if old == new => continue,
                (Some((_, stat)), Some(data)) => op_set(&path, data.clone(), stat.version),
                (None, Some(data)) => {
                    if key.contains('/') || validate_path(&path).is_err() {
                        return Err(ConfigError::BadKey(key.clone()));
                    }
                    op_create(&path, data.clone(), CreateMode::Persistent, acl())
                }
                (Some((_, stat)), None) => op_delete(&path, stat.version),
                (None, None) => unreachable!("it is a key of one of the two"),
            };
            ops.push(op);
        }
        Ok(Step { ops, becomes })
    }
}
