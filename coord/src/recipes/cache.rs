//! A read cache that watches keep valid: one znode, its children, or everything below it.
//!
//! **How it works.** The cache sets a persistent watch (a recursive one for children and subtrees) and
//! then reads what is there; after that each event makes it read one znode again. On servers that know no
//! persistent watches (before ZooKeeper 3.6) it sets one-shot watches on each znode instead. When the
//! connection was lost it reads everything again.
//!
//! **Guarantees.** Watches are told before the change can be read, and the cache looks at what was told
//! whenever it is asked: so what it gives as [`Lookup::Fresh`] is never older than anything that its
//! session has been told or shown, by this cache or by any other call of the same client. What may be
//! older is labelled [`Lookup::Stale`]: between an event and the answer to reading again, and without a
//! connection. Of a znode's [`Stat`] the part on its own data is fresh; `cversion`, `num_children` and
//! `pzxid` are those of when it was read, because recursive watches say nothing about them: ask
//! [`Cache::children`].
//!
//! [`Cache::subscribe`] gives the content of the moment and all changes after it, in an order in which
//! each path's changes are. Several changes that follow each other quickly may be told as one.
//!
//! **Bounds.** [`Limits`] bound the number of znodes and their bytes. Where more is there the cache gives
//! up: it holds nothing, says [`Status::TooLarge`], and every lookup is [`Lookup::Unknown`].
//!
//! **Cost.** A lookup takes no round trip, and no time to speak of. An event costs one read, filling the
//! cache two reads for each znode, up to 64 of them at once.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), unbroken_coord::recipes::cache::CacheError> {
//! use unbroken_coord::recipes::cache::{Cache, Limits, Lookup, Scope};
//!
//! let cache = Cache::start(&client, "/app/services", Scope::Subtree, Limits::default());
//! cache.fresh().await?;
//! match cache.get("/app/services/web") {
//!     Lookup::Fresh(Some(node)) => println!("{:?}", node.data),
//!     Lookup::Fresh(None) => println!("no such service"),
//!     Lookup::Stale(node) => println!("it was {node:?}"),
//!     Lookup::Unknown => println!("ask again"),
//! }
//! let (_now, mut events) = cache.subscribe();
//! while let Some(event) = events.next().await {
//!     println!("{event:?}");
//! }
//! # Ok(())
//! # }
//! ```

mod core;
mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{broadcast, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, warn};

use self::core::{Answer, Ask, Core};
use self::source::{Input, Kind, Shots, Source};
use super::common::repeat;
use super::znodes::{Znodes, present};
use crate::client::{Client, ClientError, WatchFuture};
use crate::wire::{AddWatchMode, ErrorCode, EventType, Stat, validate_path};

/// Reads that are under way at once.
const READS_MAX: usize = 64;

/// Events that wait for a subscriber at most; one that is slower misses some, and is told so.
const EVENTS_MAX: usize = 4096;

/// How much of the tree to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One znode.
    Node,
    /// A znode and its children. (The watch covers what is below them, too: prefer
    /// [`Self::Subtree`] or several caches where that changes much.)
    Children,
    /// A znode and everything below it.
    Subtree,
}

/// How much to hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many znodes.
    pub nodes: usize,
    /// Total length of their paths and data, in bytes.
    pub bytes: usize,
}

impl Default for Limits {
    /// 100,000 znodes, 64 MiB.
    fn default() -> Self {
        Self {
            nodes: 100_000,
            bytes: 64 * 1024 * 1024,
        }
    }
}

/// A znode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its data.
    pub data: Bytes,
    /// Its metadata; of the part on its children see the [module](self).
    pub stat: Stat,
}

/// What the cache knows of something.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Lookup<T> {
    /// No older than anything that the session was told.
    Fresh(T),
    /// So it was; there may be news.
    Stale(T),
    /// It was not read yet, is out of the cache's scope, or the cache has given up.
    Unknown,
}

impl<T> Lookup<T> {
    /// What is known, old or new.
    pub fn known(self) -> Option<T> {
        match self {
            Self::Fresh(known) | Self::Stale(known) => Some(known),
            Self::Unknown => None,
        }
    }

    /// What is known for certain.
    pub fn fresh(self) -> Option<T> {
        match self {
            Self::Fresh(known) => Some(known),
            Self::Stale(_) | Self::Unknown => None,
        }
    }
}

/// What happens in a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheEvent {
    /// A znode that was not there.
    Added {
        /// Its path.
        path: String,
        /// What it is like.
        node: Node,
    },
    /// A znode has other data, or was deleted and created anew.
    Changed {
        /// Its path.
        path: String,
        /// What it is like now.
        node: Node,
    },
    /// A znode is gone.
    Removed {
        /// Its path.
        path: String,
    },
    /// The connection is lost: what follows is not told until [`Self::Fresh`].
    Stale,
    /// Everything was read, and is being followed.
    Fresh,
    /// The subscriber was too slow, and this many events were dropped: subscribe again.
    Missed(u64),
}

/// How a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Not everything is up to date.
    Stale,
    /// Everything is.
    Fresh,
    /// More is there than the limits allow.
    TooLarge,
    /// The client has ended, or the server refused to be read.
    Ended(ClientError),
}

/// Why a cache is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// More is there than the limits allow.
    #[error("more than {} znodes or {} bytes to cache", limits.nodes, limits.bytes)]
    TooLarge {
        /// How much may be there.
        limits: Limits,
    },
    /// The client has ended, or the server refused to be read.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// A cache, kept valid until it is dropped. Clones are the same cache.
#[derive(Clone, Debug)]
pub struct Cache {
    shared: Arc<Shared>,
    status: watch::Receiver<Status>,
    _task: Arc<Task>,
}

#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Shared {
    limits: Limits,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

struct Inner {
    core: Core,
    source: Option<Source>,
    /// Why the source has ended.
    ended: Option<ClientError>,
    subscribers: broadcast::Sender<CacheEvent>,
    status: watch::Sender<Status>,
}

impl Cache {
    /// Begins to fill a cache of what is at `path`, which need not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(client: &Client, path: &str, scope: Scope, limits: Limits) -> Self {
        Self::start_as(client, path, scope, limits, false)
    }

    /// `once`: with one-shot watches, whatever the server knows.
    fn start_as(client: &Client, path: &str, scope: Scope, limits: Limits, once: bool) -> Self {
        let (subscribers, _) = broadcast::channel(EVENTS_MAX);
        let (sender, status) = watch::channel(Status::Stale);
        let shared = Arc::new(Shared {
            limits,
            inner: Mutex::new(Inner {
                core: Core::new(path, scope, limits),
                source: None,
                ended: None,
                subscribers,
                status: sender,
            }),
        });
        let keeper = Keeper {
            nodes: Znodes::new(client),
            root: path.to_owned(),
            scope,
            once,
            shared: shared.clone(),
        };
        let task = tokio::spawn(async move {
            let error = keeper.run().await;
            debug!(path = keeper.root, ?error, "cache no longer kept");
            keeper.shared.lock().finish(error);
        });
        Self {
            shared,
            status,
            _task: Arc::new(Task(task.abort_handle())),
        }
    }

    /// The znode, or that there is none.
    pub fn get(&self, path: &str) -> Lookup<Option<Node>> {
        self.shared.look().core.get(path)
    }

    /// The names of a znode's children, in order; none where there is no such znode.
    pub fn children(&self, path: &str) -> Lookup<Vec<String>> {
        self.shared.look().core.children(path)
    }

    /// Everything that is held, and whatever changes from then on.
    pub fn subscribe(&self) -> (BTreeMap<String, Node>, Events) {
        let inner = self.shared.look();
        let events = Events(inner.subscribers.subscribe());
        (inner.core.snapshot(), events)
    }

    /// How the cache is, now and from now on.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// How many znodes are held, and the length of their paths and data in bytes.
    pub fn usage(&self) -> (usize, usize) {
        self.shared.look().core.usage()
    }

    /// Waits until everything is up to date.
    ///
    /// # Errors
    /// [`CacheError`]: it will not be any more.
    pub async fn fresh(&self) -> Result<(), CacheError> {
        let mut status = self.status.clone();
        loop {
            let now = self.shared.look().status();
            match now {
                Status::Fresh => return Ok(()),
                Status::Stale => {}
                Status::TooLarge => {
                    let limits = self.shared.limits;
                    return Err(CacheError::TooLarge { limits });
                }
                Status::Ended(error) => return Err(error.into()),
            }
            // Told when there was something new, whether or not the status is another.
            if status.changed().await.is_err() {
                return Err(ClientError::Closed.into());
            }
        }
    }
}

/// What changes in a cache.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<CacheEvent>);

impl Events {
    /// The next event; `None` when the cache was dropped.
    pub async fn next(&mut self) -> Option<CacheEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(CacheEvent::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As it is, with all that was told until now.
    fn look(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        while let Some(input) = inner.source.as_mut().and_then(Source::try_next) {
            inner.hear(input);
        }
        inner.tell();
        inner
    }
}

impl Inner {
    fn hear(&mut self, input: Input) {
        match input {
            Input::Event(event) => {
                self.core.handle_event(event.event, &event.path);
                // What one-shot watches cannot see: a root that comes back.
                if let Some(Source::Shots(_)) = self.source
                    && event.event == EventType::NodeDeleted
                {
                    self.core.look_for_root(&event.path);
                }
            }
            Input::Disconnected => self.core.handle_disconnected(),
            Input::Missed => self.core.handle_missed(),
            Input::Ended(error) => {
                self.source = None;
                self.ended = Some(error);
                self.core.handle_disconnected();
            }
        }
    }

    fn status(&self) -> Status {
        match *self.status.borrow() {
            ended @ Status::Ended(_) => ended,
            _ if self.core.overflow() => Status::TooLarge,
            _ if self.core.is_fresh() => Status::Fresh,
            _ => Status::Stale,
        }
    }

    /// Tells the subscribers.
    fn tell(&mut self) {
        for event in self.core.take_events() {
            // Err: there are none.
            let _: Result<usize, _> = self.subscribers.send(event);
        }
        let status = self.status();
        self.status.send_if_modified(|old| {
            let new = *old != status;
            *old = status;
            new
        });
    }

    /// Nothing is kept any more.
    fn finish(&mut self, error: Option<ClientError>) {
        self.source = None;
        self.core.handle_disconnected();
        self.tell();
        if let Some(error) = error {
            self.status.send_replace(Status::Ended(error));
        }
    }
}

/// The task that reads.
struct Keeper {
    nodes: Znodes,
    root: String,
    scope: Scope,
    once: bool,
    shared: Arc<Shared>,
}

/// What a read gave, with the one-shot watches that it has set.
struct Read {
    ask: Ask,
    outcome: Result<Answer, ClientError>,
    watches: Vec<(Kind, WatchFuture)>,
}

impl Keeper {
    /// Gives the error that ended it, `None` where the limits did.
    async fn run(&self) -> Option<ClientError> {
        if let Err(bad) = validate_path(&self.root) {
            return Some(bad.into());
        }
        loop {
            if let Err(error) = self.nodes.session().await {
                return Some(error);
            }
            let source = match self.source().await {
                Ok(source) => source,
                Err(ClientError::SessionExpired) => continue,
                Err(error) => return Some(error),
            };
            let once = matches!(source, Source::Shots(_));
            {
                let mut inner = self.shared.lock();
                inner.ended = None;
                inner.source = Some(source);
                inner.core.handle_missed();
                inner.tell();
            }
            match self.keep(once).await {
                Some(ClientError::SessionExpired) => {}
                end => return end,
            }
        }
    }

    async fn source(&self) -> Result<Source, ClientError> {
        if self.once {
            return Ok(Source::Shots(Shots::new(&self.nodes.client)));
        }
        let mode = match self.scope {
            Scope::Node => AddWatchMode::Persistent,
            Scope::Children | Scope::Subtree => AddWatchMode::PersistentRecursive,
        };
        let watch = || self.nodes.client.watch(&self.root, mode);
        match repeat(watch).await {
            Ok(stream) => Ok(Source::Stream(stream)),
            Err(ClientError::Zk(ErrorCode::Unimplemented)) => {
                Ok(Source::Shots(Shots::new(&self.nodes.client)))
            }
            Err(error) => Err(error),
        }
    }

    /// Until the source ends, or the limits are reached.
    async fn keep(&self, once: bool) -> Option<ClientError> {
        let mut state = self.nodes.client.state();
        let mut reads = JoinSet::new();
        loop {
            let room = reads.len() < READS_MAX;
            let work = poll_fn(|context| {
                let mut inner = self.shared.lock();
                while let Some(source) = &mut inner.source
                    && let Poll::Ready(input) = source.poll_next(context)
                {
                    inner.hear(input);
                }
                inner.tell();
                let over = inner.ended.is_some() || inner.core.overflow();
                if over || (room && inner.core.has_asks()) {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            });
            tokio::select! {
                () = work => {
                    let mut inner = self.shared.lock();
                    if inner.core.overflow() {
                        warn!(path = self.root, limits = ?self.shared.limits, "too large to cache");
                        return None;
                    }
                    if let Some(error) = inner.ended {
                        return Some(error);
                    }
                    while reads.len() < READS_MAX && let Some(ask) = inner.core.poll_ask() {
                        let root = once.then(|| Arc::from(self.root.as_str()));
                        reads.spawn(read(self.nodes.clone(), ask, root));
                    }
                }
                Some(done) = reads.join_next() => {
                    // A read that panicked is a bug that must not be hidden by a stale cache.
                    let done = done.expect("reads do not panic");
                    match self.apply(done) {
                        // The source ends as well, with the session.
                        Ok(()) | Err(ClientError::SessionExpired) => {}
                        Err(error) => return Some(error),
                    }
                }
                // One-shot watches say nothing of it.
                Ok(()) = state.changed(), if once => {}
            }
        }
    }

    fn apply(&self, read: Read) -> Result<(), ClientError> {
        let answer = read.outcome?;
        let mut inner = self.shared.lock();
        if let Some(Source::Shots(shots)) = &mut inner.source {
            for (kind, watch) in read.watches {
                shots.add(kind, &read.ask.path, watch);
            }
        }
        // What was told before the answer came counts first.
        while let Some(input) = inner.source.as_mut().and_then(Source::try_next) {
            inner.hear(input);
        }
        inner.core.handle_answer(&read.ask, answer);
        inner.tell();
        Ok(())
    }
}

async fn read(nodes: Znodes, ask: Ask, once: Option<Arc<str>>) -> Read {
    let mut watches = Vec::new();
    let outcome = match once {
        None => read_only(&nodes.client, &ask).await,
        Some(root) => read_and_watch(&nodes.client, &ask, &root, &mut watches).await,
    };
    Read {
        ask,
        outcome,
        watches,
    }
}

async fn read_only(client: &Client, ask: &Ask) -> Result<Answer, ClientError> {
    // Both are asked for at once.
    let names = async {
        if ask.list {
            present(repeat(|| client.children(&ask.path)).await)
        } else {
            Ok(Some(Vec::new()))
        }
    };
    let node = async { present(repeat(|| client.get(&ask.path)).await) };
    let (node, names) = tokio::join!(node, names);
    Ok(match (node?, names?) {
        (Some((data, stat)), Some(names)) => Some((data, stat, names)),
        _ => None,
    })
}

async fn read_and_watch(
    client: &Client,
    ask: &Ask,
    root: &str,
    watches: &mut Vec<(Kind, WatchFuture)>,
) -> Result<Answer, ClientError> {
    let path = &ask.path;
    loop {
        let read = repeat(|| client.get_and_watch(path)).await;
        if let Some((data, stat, changed)) = present(read)? {
            watches.push((Kind::Node, changed));
            if !ask.list {
                return Ok(Some((data, stat, Vec::new())));
            }
            let list = repeat(|| client.children_and_watch(path)).await;
            if let Some((names, _, changed)) = present(list)? {
                watches.push((Kind::Children, changed));
                return Ok(Some((data, stat, names)));
            }
        } else if path != root {
            // Its parent's watch tells if it comes back.
            return Ok(None);
        } else {
            let (found, created) = repeat(|| client.exists_and_watch(path)).await?;
            if found.is_none() {
                watches.push((Kind::Node, created));
                return Ok(None);
            }
        }
    }
}
