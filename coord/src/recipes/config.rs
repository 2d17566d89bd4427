//! Configuration that follows changes: typed values, of one znode or of a directory of them.
//!
//! **How it works.** A [`Config`] holds one value in one znode, a [`ConfigMap`] one entry in each
//! child of a znode. A task reads it, sets watches on what it read, and publishes each version on a
//! [`watch`] channel; when a watch fires or the connection comes back it reads again. What cannot be
//! read as the type is reported as [`Following::Bad`], and the version before it stays adopted.
//!
//! `update` is a compare-and-set: it reads the newest version, computes the next one, and writes on
//! the condition that nothing has changed, again and again until that succeeds. It is done exactly
//! once though connections be lost: the same step creates an ephemeral marker beside the znode, in
//! `.updates`, by which a repetition sees that it was done.
//!
//! | znode | data |
//! |---|---|
//! | `<path>` | the value; of a map nothing, but each update of a map sets it, so that its version is the map's |
//! | `<path>/<key>` | an entry of a map |
//! | `<parent>/.updates/<id>` | marker of an update under way, ephemeral |
//!
//! **Guarantees.** Versions are seen in their order, though some may be skipped; in the end the
//! newest is. An update of several entries of a map is one step and is seen as one: readers read
//! again if the map's own version moved while they read its entries. Entries that are changed by
//! other means (`zk set`) are followed too, each by itself. What is known stays known when the
//! connection or the session is lost; it is labelled [`Following::Stale`] then.
//!
//! **Cost.** A version of a value is read in one round trip, of a map in four however many its
//! entries; an update is a read, a multi, and a delete that is not waited for.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), unbroken_coord::recipes::config::ConfigError> {
//! use unbroken_coord::recipes::config::{Config, Json};
//!
//! #[derive(serde::Serialize, serde::Deserialize)]
//! struct Limits { connections: u32 }
//!
//! let limits = Config::<Json<Limits>>::follow(&client, "/app/limits");
//! limits.update(|old| {
//!     let connections = old.map_or(100, |old| old.0.connections * 2);
//!     Some(Json(Limits { connections }))
//! }).await?;
//! let mut changes = limits.changes();
//! while changes.changed().await.is_ok() {
//!     if let Some(limits) = &changes.borrow_and_update().version {
//!         println!("{} connections from version {} on", limits.value.0.connections, limits.version);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod follow;
mod map;
mod value;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::watch;

use super::znodes::{Znodes, join, op_create, op_set, present, unique};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, CreateMode, ErrorCode, MultiOp, Stat, parent};
use follow::{Follower, Reading};

pub use map::ConfigMap;
pub use value::{BadValue, Entries, Json, Value};

/// Name of the znode, beside that of the configuration, below which updates leave their markers.
const MARKERS: &str = ".updates";

/// How often an update tries before it gives up.
const ATTEMPTS_MAX: u32 = 100;

/// The longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_millis(64);

/// A version of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version<T> {
    /// What it says.
    pub value: T,
    /// Version of its znode. It begins at 0 again when the znode is created anew.
    pub version: i32,
    /// zxid of its latest change; grows from each version to the next.
    pub zxid: i64,
}

/// What is known of a configuration.
#[derive(Debug)]
pub struct Known<T> {
    /// The newest version that could be read. A bad one, a deletion, or a lost connection leaves the
    /// one before it here.
    pub version: Option<Arc<Version<T>>>,
    /// Whether that is how it stands.
    pub following: Following,
}

impl<T> Clone for Known<T> {
    fn clone(&self) -> Self {
        Self {
            version: self.version.clone(),
            following: self.following.clone(),
        }
    }
}

/// How what is known compares with what is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Following {
    /// Nothing was read yet.
    Starting,
    /// As new as the session's server.
    Current,
    /// There is no such znode (any more).
    Missing,
    /// What is there is not adopted: it does not read as the type.
    Bad {
        /// Version of the znode that cannot be read.
        version: i32,
        /// What is wrong with it.
        why: BadValue,
    },
    /// The connection is lost; there may be newer versions.
    Stale,
    /// Nothing is followed any more.
    Ended(ClientError),
}

/// Why a configuration could not be read or updated.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// What is there does not read as the type.
    #[error("{path}, version {version}: {why}")]
    Bad {
        /// The znode.
        path: String,
        /// Its version.
        version: i32,
        /// What is wrong with it.
        why: BadValue,
    },
    /// The key of an entry cannot be a znode's name.
    #[error("{0:?} cannot be the key of an entry")]
    BadKey(String),
    /// The version differs from the expected one.
    #[error("{path} has another version than {expected}")]
    Changed {
        /// The znode.
        path: String,
        /// The version that was expected.
        expected: i32,
    },
    /// Others have changed it each time.
    #[error("{path} was changed by others in each of {attempts} attempts")]
    Conflict {
        /// The znode.
        path: String,
        /// How many there were.
        attempts: u32,
    },
    /// The session or the server.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// A value in a znode, followed as it changes, until this is dropped.
pub struct Config<T> {
    place: Place,
    follower: Follower<T>,
}

/// Where a configuration is.
#[derive(Clone, Debug)]
struct Place {
    nodes: Znodes,
    path: Arc<str>,
}

impl<T> fmt::Debug for Config<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("path", &self.place.path)
            .finish_non_exhaustive()
    }
}

impl<T: Value> Config<T> {
    /// Begins to follow the value at `path`, which need not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn follow(client: &Client, path: &str) -> Self {
        let place = Place::new(client, path);
        let reading = place.clone();
        let read = move || {
            let place = reading.clone();
            async move { place.read_and_watch().await }
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

    /// Computes the next value from the newest one (`None` where there is no znode) and writes it,
    /// again where another update came between. `None` from `next` leaves it as it is. Gives the
    /// version it is at then.
    ///
    /// # Errors
    /// [`ConfigError::Bad`] where what is there cannot be read: see [`Self::replace`].
    /// [`ConfigError::Conflict`] after very many attempts. After [`ClientError::SessionExpired`] it
    /// may have been done.
    pub async fn update(
        &self,
        mut next: impl FnMut(Option<&T>) -> Option<T>,
    ) -> Result<Option<i32>, ConfigError> {
        let place = &self.place;
        let mut attempts = Attempts(0);
        loop {
            let old = place.read().await?;
            let value = match &old {
                None => next(None),
                Some((data, stat)) => next(Some(&place.parse(data, stat)?)),
            };
            let version = old.map(|(_, stat)| stat.version);
            let Some(value) = value else {
                return Ok(version);
            };
            let step = place.write(value.to_bytes(), version);
            if place.try_write(&step).await? {
                return Ok(Some(step.becomes));
            }
            attempts.pause(&place.path).await?;
        }
    }

    /// Writes the value if the znode has this version, `None` if there is none; gives its new
    /// version.
    ///
    /// # Errors
    /// [`ConfigError::Changed`].
    pub async fn set_if(&self, version: Option<i32>, value: &T) -> Result<i32, ConfigError> {
        let step = self.place.write(value.to_bytes(), version);
        if self.place.try_write(&step).await? {
            return Ok(step.becomes);
        }
        Err(ConfigError::Changed {
            path: self.place.path.to_string(),
            expected: version.unwrap_or(-1),
        })
    }

    /// Writes the value whatever is there; gives its new version.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub async fn replace(&self, value: &T) -> Result<i32, ConfigError> {
        let place = &self.place;
        let mut attempts = Attempts(0);
        loop {
            let version = place.read().await?.map(|(_, stat)| stat.version);
            let step = place.write(value.to_bytes(), version);
            if place.try_write(&step).await? {
                return Ok(step.becomes);
            }
            attempts.pause(&place.path).await?;
        }
    }
}

/// What turns one version into the next.
struct Step {
    ops: Vec<MultiOp>,
    /// The version when it is done.
    becomes: i32,
}

/// How often an update was tried in vain.
struct Attempts(u32);

impl Attempts {
    /// Waits a random while, so that two updates that met do not meet again.
    async fn pause(&mut self, path: &str) -> Result<(), ConfigError> {
        self.0 += 1;
        if self.0 == ATTEMPTS_MAX {
            return Err(ConfigError::Conflict {
                path: path.to_owned(),
                attempts: self.0,
            });
        }
        let chance = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
        let longest = PAUSE_MAX.min(Duration::from_millis(1 << self.0.min(10)));
        tokio::time::sleep(longest.mul_f64(chance)).await;
        Ok(())
    }
}

impl Place {
    fn new(client: &Client, path: &str) -> Self {
        Self {
            nodes: Znodes::new(client),
            path: path.into(),
        }
    }

    async fn read(&self) -> Result<Option<(Bytes, Stat)>, ClientError> {
        self.nodes.get_newest(&self.path).await
    }

    async fn read_and_watch<T: Value>(self) -> Result<Reading<T>, ClientError> {
        let client = &self.nodes.client;
        loop {
            let read = || client.get_and_watch(&self.path);
            if let Some((data, stat, changed)) = present(self.nodes.repeat(read).await)? {
                let found = T::from_bytes(&data).map(|value| Version {
                    value,
                    version: stat.version,
                    zxid: stat.mzxid,
                });
                return Ok(Reading {
                    found: Some(found.map_err(|why| (stat.version, why))),
                    watches: vec![changed],
                });
            }
            let (found, created) = self
                .nodes
                .repeat(|| client.exists_and_watch(&self.path))
                .await?;
            if found.is_none() {
                return Ok(Reading {
                    found: None,
                    watches: vec![created],
                });
            }
        }
    }

    fn parse<T: Value>(&self, data: &Bytes, stat: &Stat) -> Result<T, ConfigError> {
        T::from_bytes(data).map_err(|why| ConfigError::Bad {
            path: self.path.to_string(),
            version: stat.version,
            why,
        })
    }

    /// The write that follows this version.
    fn write(&self, data: Bytes, version: Option<i32>) -> Step {
        let (op, becomes) = match version {
            None => (
                op_create(
                    &self.path,
                    data,
                    CreateMode::Persistent,
                    self.nodes.acl.clone(),
                ),
                0,
            ),
            Some(version) => (op_set(&self.path, data, version), version.wrapping_add(1)),
        };
        Step {
            ops: vec![op],
            becomes,
        }
    }

    /// Whether it was done; otherwise something there has changed.
    async fn try_write(&self, step: &Step) -> Result<bool, ClientError> {
        let (above, _) = parent(&self.path).ok_or(ClientError::Zk(ErrorCode::BadArguments))?;
        let marker = join(&join(above, MARKERS), &unique());
        match self.nodes.multi_once(&marker, &step.ops).await {
            Ok(_) => Ok(true),
            Err(ClientError::Multi {
                code:
                    ErrorCode::BadVersion
                    | ErrorCode::NodeExists
                    | ErrorCode::NoNode
                    | ErrorCode::NotEmpty,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
