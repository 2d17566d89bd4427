//! Event channels: named by paths, read in one order by everyone, resumed at any server.
//!
//! **How it works.** A channel is a log of entries, and an entry a znode that holds a batch of events.
//! [`Publisher`]s append by creating sequential znodes: the server's counter gives each its place, so
//! that publishers need not agree. The log is cut into segments of a fixed number of entries, so that
//! no znode gets too many children; an entry that finds its segment full is void, and its publisher
//! takes it away and appends to the next segment. As the counters leave no gaps, a [`Subscriber`] knows
//! the name of the next entry: it reads by name, several entries ahead, and at the end of the log waits
//! with a watch for the one that is to come. No list of children is read, and no herd woken for it.
//!
//! A [`Position`] is all that a reader needs to go on later, on another machine, with another server. A
//! subscriber that is registered under a name keeps it in the channel. A prefix of the log is taken away
//! by [`Channel::truncate_before`], or, as far as every registered subscriber has read, by
//! [`Channel::truncate_read`]; the new beginning is written before anything is deleted, so that a reader
//! who comes too late is told [`ChannelError::Truncated`], and from where it can read.
//!
//! | znode | data |
//! |---|---|
//! | `<path>` | JSON: how many entries a segment has |
//! | `<path>/log/0000000003/e-0000000017` | entry 17 of segment 3: its publisher, a count, the events |
//! | `<path>/floor` | number of the first entry that is kept, as text |
//! | `<path>/publishers/<id>` | how often it has appended, as text; ephemeral |
//! | `<path>/subscribers/<name>` | position of the first event that it has not read, as text |
//!
//! **Guarantees.** All subscribers see the same events in the same order, that of their commits; none
//! twice and none left out, from the position on at which they began. Events of one publisher keep their
//! order. An event that [`Publisher::publish`] has confirmed is in the log once, though the connection be
//! lost on the way: each append also sets the publisher's own znode, on condition of its version, so that
//! a repetition is seen to be one. If the session expires during a publish its outcome is unknown, and the
//! error says so.
//!
//! **Cost.** To publish a batch: one multi. To read: one round trip for up to 16 entries; at the end of
//! the log four more requests for each wait.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), unbroken_coord::recipes::channel::ChannelError> {
//! use unbroken_coord::recipes::channel::{Channel, Start};
//!
//! let orders = Channel::open(&client, "/app/orders").await?;
//! let mut publisher = orders.publisher().await?;
//! publisher.publish("tea").await?;
//! publisher.publish_all(["milk", "sugar"]).await?;
//!
//! let mut kitchen = orders.subscribe_as("kitchen", Start::Earliest).await?;
//! loop {
//!     let event = kitchen.next().await?;
//!     println!("{}: {}", event.position, String::from_utf8_lossy(&event.data));
//!     kitchen.commit().await?;
//! }
//! # }
//! ```

mod entry;
mod publish;
mod subscribe;
mod truncate;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::znodes::{Znodes, join};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, Stat};

pub use entry::EVENT_BYTES_MAX;
pub use publish::Publisher;
pub use subscribe::{Event, Start, Subscriber};

/// Entries in a segment, where the channel's creator does not say otherwise.
const SEGMENT_ENTRIES: u64 = 1024;

/// Where an event is in its channel, and where a reader goes on. Prints as `entry.index`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position {
    /// Which entry of the log, counted from 0 since the channel was created.
    pub entry: u64,
    /// Which event of the entry.
    pub index: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.entry, self.index)
    }
}

/// A text is no [`Position`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no position; expected entry.index, like 17.0")]
pub struct BadPosition(String);

impl FromStr for Position {
    type Err = BadPosition;

    fn from_str(text: &str) -> Result<Self, BadPosition> {
        let parse = |text: &str| {
            let (entry, index) = text.split_once('.')?;
            Some(Self {
                entry: entry.parse().ok()?,
                index: index.parse().ok()?,
            })
        };
        parse(text).ok_or_else(|| BadPosition(text.to_owned()))
    }
}

/// Why a channel could not be written or read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The events from this position on were truncated.
    #[error("{path}: {asked} was truncated, the first event that is kept is {first}")]
    Truncated {
        /// The channel.
        path: String,
        /// Where the reader is.
        asked: Position,
        /// Where it can go on.
        first: Position,
    },
    /// An entry is missing that was not truncated: somebody has deleted it.
    #[error("{path} is missing, though it was not truncated")]
    Gap {
        /// The entry.
        path: String,
    },
    /// A znode holds something else than a channel writes there.
    #[error("{path} holds something else than a channel's data")]
    Foreign {
        /// Which.
        path: String,
    },
    /// An event is too large; nothing was published.
    #[error("an event of {bytes} bytes, and {EVENT_BYTES_MAX} are allowed")]
    TooLarge {
        /// Its size in bytes.
        bytes: usize,
    },
    /// The session or the server.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// What stands in the channel's own znode.
#[derive(Serialize, Deserialize)]
struct Meta {
    segment_entries: u64,
}

/// A channel.
#[derive(Clone, Debug)]
pub struct Channel {
    nodes: Znodes,
    path: Arc<str>,
    segment_entries: u64,
}

impl Channel {
    /// Opens the channel at `path`, and creates it where it is missing.
    ///
    /// # Errors
    /// [`ChannelError::Foreign`], [`ChannelError::Client`].
    pub async fn open(client: &Client, path: &str) -> Result<Self, ChannelError> {
        Self::open_with(client, path, SEGMENT_ENTRIES, Acl::open()).await
    }

    /// As [`Self::open`]; where it is created its segments have this many entries, and its znodes
    /// this access control list.
    ///
    /// # Errors
    /// As [`Self::open`].
    ///
    /// # Panics
    /// Unless there are 1 to 100,000 entries.
    pub async fn open_with(
        client: &Client,
        path: &str,
        segment_entries: u64,
        acl: Vec<Acl>,
    ) -> Result<Self, ChannelError> {
        let allowed = 1..=100_000;
        assert!(
            allowed.contains(&segment_entries),
            "{segment_entries} entries in a segment"
        );
        let nodes = Znodes {
            acl,
            ..Znodes::new(client)
        };
        let mut channel = Self {
            nodes,
            path: path.into(),
            segment_entries,
        };
        let meta = match channel.nodes.get(path).await? {
            Some((meta, _)) if !meta.is_empty() => meta,
            _ => channel.create().await?,
        };
        let meta: Option<Meta> = serde_json::from_slice(&meta).ok();
        let entries = meta.map(|meta| meta.segment_entries);
        match entries.filter(|entries| allowed.contains(entries)) {
            Some(entries) => channel.segment_entries = entries,
            None => return Err(channel.foreign(path)),
        }
        Ok(channel)
    }

    /// Creates what is missing, the channel's own data last; gives that.
    async fn create(&self) -> Result<Bytes, ChannelError> {
        let nodes = &self.nodes;
        for part in ["publishers", "subscribers"] {
            nodes.ensure(&join(&self.path, part)).await?;
        }
        nodes.ensure(&self.segment(0)).await?;
        nodes.create(&self.floor_path(), &"0".into()).await?;
        let meta = Meta {
            segment_entries: self.segment_entries,
        };
        let meta = serde_json::to_vec(&meta).expect("it has a form in JSON");
        // Whoever is first says it: the znode is there, and has version 0 until then.
        let written = nodes.repeat(|| nodes.client.set(&self.path, meta.clone(), 0));
        match written.await {
            Ok(_) => {}
            Err(error) if error.code() == Some(crate::wire::ErrorCode::BadVersion) => {}
            Err(error) => return Err(error.into()),
        }
        let (meta, _) = nodes.get(&self.path).await?.unwrap_or_default();
        Ok(meta)
    }

    /// Where the next entry will be, as far as all that was acknowledged before the call goes.
    ///
    /// # Errors
    /// [`ChannelError::Client`].
    pub async fn end(&self) -> Result<Position, ChannelError> {
        let nodes = &self.nodes;
        nodes.repeat(|| nodes.client.sync(&self.path)).await?;
        let segment = self.newest_segment().await?;
        let used = self.used(segment).await?.unwrap_or(0);
        Ok(Position {
            entry: segment * self.segment_entries + used.min(self.segment_entries),
            index: 0,
        })
    }

    /// The first position that is kept.
    ///
    /// # Errors
    /// [`ChannelError::Foreign`], [`ChannelError::Client`].
    pub async fn begin(&self) -> Result<Position, ChannelError> {
        let (entry, _) = self.floor().await?;
        Ok(Position { entry, index: 0 })
    }

    /// The first entry that is kept, and the version of this.
    async fn floor(&self) -> Result<(u64, i32), ChannelError> {
        let path = self.floor_path();
        let foreign = || self.foreign(&path);
        let (data, stat) = self.nodes.get(&path).await?.ok_or_else(foreign)?;
        let text = std::str::from_utf8(&data).ok();
        let entry = text.and_then(|text| text.parse().ok());
        Ok((entry.ok_or_else(foreign)?, stat.version))
    }

    async fn newest_segment(&self) -> Result<u64, ChannelError> {
        let segments = self.segments().await?;
        segments
            .last()
            .copied()
            .ok_or_else(|| self.foreign(&self.log()))
    }

    /// The segments that there are, in order.
    async fn segments(&self) -> Result<Vec<u64>, ChannelError> {
        let names = self.nodes.children(&self.log()).await?;
        let mut segments: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
        segments.sort_unstable();
        Ok(segments)
    }

    /// How many entries were ever created in a segment, void ones included; `None` where there is
    /// no such segment.
    async fn used(&self, segment: u64) -> Result<Option<u64>, ChannelError> {
        let path = self.segment(segment);
        let stat = self
            .nodes
            .repeat(|| self.nodes.client.exists(&path))
            .await?;
        Ok(stat.as_ref().map(creations))
    }

    fn foreign(&self, path: &str) -> ChannelError {
        ChannelError::Foreign {
            path: path.to_owned(),
        }
    }

    fn log(&self) -> String {
        join(&self.path, "log")
    }

    fn segment(&self, segment: u64) -> String {
        format!("{}/log/{segment:010}", self.path)
    }

    fn entry(&self, entry: u64) -> String {
        let (segment, sequence) = (entry / self.segment_entries, entry % self.segment_entries);
        format!("{}/e-{sequence:010}", self.segment(segment))
    }

    fn floor_path(&self) -> String {
        join(&self.path, "floor")
    }

    fn subscribers(&self) -> String {
        join(&self.path, "subscribers")
    }
}

/// How many children a znode ever had: its cversion counts creations and deletions.
fn creations(stat: &Stat) -> u64 {
    let twice = i64::from(stat.cversion) + i64::from(stat.num_children);
    u64::try_from(twice / 2).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_ordered_and_read_back() {
        let position = |entry, index| Position { entry, index };
        assert!(position(1, 7) < position(2, 0) && position(2, 0) < position(2, 1));
        let text = position(17, 3).to_string();
        assert_eq!((text.as_str(), text.parse()), ("17.3", Ok(position(17, 3))));
        for bad in ["", "17", "17.", ".3", "-1.0", "1.2.3"] {
            assert_eq!(bad.parse::<Position>(), Err(BadPosition(bad.into())));
        }
    }

    #[test]
    fn creations_are_counted_through_deletions() {
        let stat = |created: i32, deleted: i32| Stat {
            cversion: created + deleted,
            num_children: created - deleted,
            ..Stat::default()
        };
        for created in 0..10 {
            for deleted in 0..=created {
                let counted = creations(&stat(created, deleted));
                assert_eq!(counted, u64::try_from(created).unwrap());
            }
        }
    }
}
