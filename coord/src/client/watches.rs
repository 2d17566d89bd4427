//! The watches that a session has set, as its client knows them.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::{mpsc, oneshot};

use super::ClientError;
use super::connection::Command;
use super::feed::{Feed, FeedSender};
use crate::wire::{AddWatchMode, EventType, SetWatches, WatcherKind, parent};

/// Largest total length of the paths in one setWatches, in bytes: well below a frame's limit.
const SET_WATCHES_BYTES_MAX: usize = 128 * 1024;

/// What a watch saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// What happened.
    pub event: EventType,
    /// The znode, without the chroot.
    pub path: String,
}

pub(super) type Watcher = oneshot::Sender<Result<WatchEvent, ClientError>>;

/// Resolves when the watch fires, once. It survives reconnection; what changed in the meantime is
/// told after it.
#[derive(Debug)]
#[must_use = "a watch that is dropped tells nobody"]
pub struct WatchFuture(oneshot::Receiver<Result<WatchEvent, ClientError>>);

impl WatchFuture {
    pub(super) fn channel() -> (Watcher, Self) {
        let (watcher, receiver) = oneshot::channel();
        (watcher, Self(receiver))
    }
}

impl Future for WatchFuture {
    /// [`ClientError::SessionExpired`] or [`ClientError::Closed`] where the watch can no longer
    /// fire.
    type Output = Result<WatchEvent, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(cx)
            .map(|told| told.unwrap_or(Err(ClientError::Closed)))
    }
}

/// What a persistent watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A znode changed. It comes before any answer in which the session sees the change.
    Event(WatchEvent),
    /// The connection is lost. What changes from now on is not told, until [`Self::Missed`].
    Disconnected,
    /// Events before this one may be missing, and those after it are all told: read again. So it is
    /// after a reconnection (the servers keep no account of what a persistent watch missed), and
    /// where 4096 notices were not read in time.
    Missed,
}

pub(super) type NoticeSender = FeedSender<Result<Notice, ClientError>>;

/// The events of a persistent watch, in order and in step with the answers to requests: an event is
/// here before the answer to a request that could see its change is given. The watch is removed
/// when this is dropped.
///
/// It is a [`Stream`] (of `futures-core`, so that the combinators of both `futures` and
/// `tokio-stream` fit), and [`Self::next`] needs neither. The last item is the error that ended
/// it, [`ClientError::SessionExpired`] or [`ClientError::Closed`], or a `PersistentWatchRemoved`.
#[derive(Debug)]
#[must_use = "a watch that is dropped tells nobody"]
pub struct WatchStream {
    pub(super) feed: Feed<Result<Notice, ClientError>>,
    /// With the chroot.
    pub(super) path: String,
    pub(super) commands: mpsc::WeakSender<Command>,
}

impl WatchStream {
    /// The next notice; `None` after the error that ended the watch. May be dropped and called
    /// again: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<Notice, ClientError>> {
        poll_fn(|cx| self.feed.poll_next(cx)).await
    }

    /// The next notice if there is one already. After the answer to a read, `None` says that what
    /// was read is not older than anything that was told.
    pub fn try_next(&mut self) -> Option<Result<Notice, ClientError>> {
        self.feed.try_next()
    }
}

impl Stream for WatchStream {
    type Item = Result<Notice, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.feed.poll_next(cx)
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        // Before the task is asked to look.
        self.feed.abandon();
        if let Some(commands) = self.commands.upgrade() {
            let path = std::mem::take(&mut self.path);
            // Where the task is that busy, the server goes on telling a client that ignores it.
            let _: Result<(), _> = commands.try_send(Command::Forget { path });
        }
    }
}

/// What a one-shot watch looks at. The server forgets each kind of watch on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WatchKind {
    Data,
    /// Set by an `exists` that found nothing.
    Exist,
    Child,
}

/// Whom to tell once a request has set its watch.
#[derive(Debug)]
pub(super) enum Watching {
    Once(Watcher),
    Always(AddWatchMode, NoticeSender),
    /// A recursive watch that was replaced at the server.
    Again,
    /// Who watches is to be told that the server has forgotten it.
    Removed(WatcherKind),
}

/// Paths here hold the chroot.
#[derive(Debug, Default)]
pub(super) struct Watches {
    once: BTreeMap<(WatchKind, String), Vec<Watcher>>,
    always: BTreeMap<(AddWatchMode, String), Vec<NoticeSender>>,
}

impl Watches {
    pub(super) fn add(&mut self, kind: WatchKind, path: String, watcher: Watcher) {
        let watchers = self.once.entry((kind, path)).or_default();
        // Callers who lost interest leave closed channels behind; they are swept whenever the
        // list would grow, so it stays within twice the number of the interested.
        if watchers.len() == watchers.capacity() {
            watchers.retain(|watcher| !watcher.is_closed());
        }
        watchers.push(watcher);
    }

    /// True where this has replaced a recursive watch on the same path at the server, which keeps
    /// one mode for each path: the newest.
    pub(super) fn add_persistent(
        &mut self,
        mode: AddWatchMode,
        path: String,
        sender: NoticeSender,
    ) -> bool {
        let recursive = (AddWatchMode::PersistentRecursive, path.clone());
        let replaced = mode == AddWatchMode::Persistent && self.always.contains_key(&recursive);
        self.always.entry((mode, path)).or_default().push(sender);
        replaced
    }

    /// Tells whom an event of the server concerns.
    pub(super) fn fire(&mut self, event: EventType, path: &str, told: &WatchEvent) {
        self.fire_once(event, path, told);
        let changes_node = match event {
            EventType::NodeCreated | EventType::NodeDeleted | EventType::NodeDataChanged => true,
            EventType::NodeChildrenChanged => false,
            EventType::None
            | EventType::DataWatchRemoved
            | EventType::ChildWatchRemoved
            | EventType::PersistentWatchRemoved => return,
        };
        if self.always.is_empty() {
            return;
        }
        self.tell(AddWatchMode::Persistent, path, told);
        let mut above = changes_node.then_some(path);
        while let Some(path) = above {
            self.tell(AddWatchMode::PersistentRecursive, path, told);
            above = parent(path).map(|(parent, _)| parent);
        }
    }

    fn tell(&mut self, mode: AddWatchMode, path: &str, told: &WatchEvent) {
        if let Some(senders) = self.always.get(&(mode, path.to_owned())) {
            for sender in senders {
                notify(sender, Notice::Event(told.clone()));
            }
        }
    }

    fn fire_once(&mut self, event: EventType, path: &str, told: &WatchEvent) {
        let kinds: &[WatchKind] = match event {
            EventType::NodeCreated | EventType::NodeDataChanged => {
                &[WatchKind::Data, WatchKind::Exist]
            }
            EventType::NodeDeleted => &[WatchKind::Data, WatchKind::Exist, WatchKind::Child],
            EventType::NodeChildrenChanged => &[WatchKind::Child],
            EventType::DataWatchRemoved => &[WatchKind::Data, WatchKind::Exist],
            EventType::ChildWatchRemoved => &[WatchKind::Child],
            EventType::None | EventType::PersistentWatchRemoved => &[],
        };
        for &kind in kinds {
            for watcher in self
                .once
                .remove(&(kind, path.to_owned()))
                .into_iter()
                .flatten()
            {
                // Err: nobody waits for this one any more.
                let _: Result<(), _> = watcher.send(Ok(told.clone()));
            }
        }
    }

    /// The server has forgotten these watches of a path, because it was asked to. `local` is the
    /// path without the chroot.
    pub(super) fn removed(&mut self, kind: WatcherKind, path: &str, local: &str) {
        let told = |event| WatchEvent {
            event,
            path: local.to_owned(),
        };
        if matches!(kind, WatcherKind::Data | WatcherKind::Any) {
            let event = EventType::DataWatchRemoved;
            self.fire_once(event, path, &told(event));
        }
        if matches!(kind, WatcherKind::Children | WatcherKind::Any) {
            let event = EventType::ChildWatchRemoved;
            self.fire_once(event, path, &told(event));
        }
        let plain = matches!(kind, WatcherKind::Persistent | WatcherKind::Any);
        let recursive = matches!(kind, WatcherKind::PersistentRecursive | WatcherKind::Any);
        for (mode, is_meant) in [
            (AddWatchMode::Persistent, plain),
            (AddWatchMode::PersistentRecursive, recursive),
        ] {
            let key = (mode, path.to_owned());
            let senders = is_meant.then(|| self.always.remove(&key)).flatten();
            for sender in senders.into_iter().flatten() {
                let event = told(EventType::PersistentWatchRemoved);
                notify(&sender, Notice::Event(event));
            }
        }
    }

    /// The connection is lost.
    pub(super) fn disconnected(&self) {
        self.always
            .values()
            .flatten()
            .for_each(|sender| notify(sender, Notice::Disconnected));
    }

    /// The persistent watches are set again.
    pub(super) fn missed(&self) {
        self.always
            .values()
            .flatten()
            .for_each(|sender| notify(sender, Notice::Missed));
    }

    /// The recursive watch of this path is set again.
    pub(super) fn missed_at(&self, path: String) {
        let key = (AddWatchMode::PersistentRecursive, path);
        for sender in self.always.get(&key).into_iter().flatten() {
            notify(sender, Notice::Missed);
        }
    }

    /// Somebody has lost interest in a persistent watch of this path. True if the server may
    /// forget all watches of it, because nobody here has any.
    pub(super) fn forget(&mut self, path: &str) -> bool {
        self.sweep(path);
        let modes = [AddWatchMode::Persistent, AddWatchMode::PersistentRecursive];
        let kinds = [WatchKind::Data, WatchKind::Exist, WatchKind::Child];
        let mut always = modes.iter().map(|mode| (*mode, path.to_owned()));
        let mut once = kinds.iter().map(|kind| (*kind, path.to_owned()));
        !always.any(|key| self.always.contains_key(&key))
            && !once.any(|key| self.once.contains_key(&key))
    }

    fn sweep(&mut self, path: &str) {
        for mode in [AddWatchMode::Persistent, AddWatchMode::PersistentRecursive] {
            let key = (mode, path.to_owned());
            if let Some(senders) = self.always.get_mut(&key) {
                senders.retain(|sender| !sender.is_abandoned());
                if senders.is_empty() {
                    self.always.remove(&key);
                }
            }
        }
        for kind in [WatchKind::Data, WatchKind::Exist, WatchKind::Child] {
            let key = (kind, path.to_owned());
            if let Some(watchers) = self.once.get_mut(&key) {
                watchers.retain(|watcher| !watcher.is_closed());
                if watchers.is_empty() {
                    self.once.remove(&key);
                }
            }
        }
    }

    /// The watches to set again on a new connection, in requests of bounded size.
    pub(super) fn set_again(&mut self, relative_zxid: i64) -> Vec<SetWatches> {
        self.once.retain(|_, watchers| {
            watchers.retain(|watcher| !watcher.is_closed());
            !watchers.is_empty()
        });
        self.always.retain(|_, senders| {
            senders.retain(|sender| !sender.is_abandoned());
            !senders.is_empty()
        });
        let mut batches = Batches::new(relative_zxid);
        for (kind, path) in self.once.keys() {
            let request = batches.room_for(path);
            match kind {
                WatchKind::Data => &mut request.data,
                WatchKind::Exist => &mut request.exist,
                WatchKind::Child => &mut request.child,
            }
            .push(path.clone());
        }
        // Recursive ones after the plain ones, which would replace them (see `add_persistent`).
        for (mode, path) in self.always.keys() {
            let request = batches.room_for(path);
            match mode {
                AddWatchMode::Persistent => &mut request.persistent,
                AddWatchMode::PersistentRecursive => &mut request.persistent_recursive,
            }
            .push(path.clone());
        }
        batches.finish()
    }

    /// Ends all of them.
    pub(super) fn fail(&mut self, error: ClientError) {
        for watcher in std::mem::take(&mut self.once).into_values().flatten() {
            let _: Result<(), _> = watcher.send(Err(error));
        }
        for sender in std::mem::take(&mut self.always).into_values().flatten() {
            sender.push(Err(error), || Ok(Notice::Missed));
        }
    }
}

fn notify(sender: &NoticeSender, notice: Notice) {
    sender.push(Ok(notice), || Ok(Notice::Missed));
}

/// setWatches requests while they are filled.
struct Batches {
    full: Vec<SetWatches>,
    last: SetWatches,
    last_bytes: usize,
}

impl Batches {
    fn new(relative_zxid: i64) -> Self {
        Self {
            full: Vec::new(),
            last: SetWatches {
                relative_zxid,
                ..SetWatches::default()
            },
            last_bytes: 0,
        }
    }

    fn room_for(&mut self, path: &str) -> &mut SetWatches {
        if self.last_bytes > 0 && self.last_bytes + path.len() > SET_WATCHES_BYTES_MAX {
            let fresh = SetWatches {
                relative_zxid: self.last.relative_zxid,
                ..SetWatches::default()
            };
            self.full.push(std::mem::replace(&mut self.last, fresh));
            self.last_bytes = 0;
        }
        self.last_bytes += path.len();
        &mut self.last
    }

    fn finish(mut self) -> Vec<SetWatches> {
        if self.last_bytes > 0 {
            self.full.push(self.last);
        }
        self.full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(event: EventType) -> WatchEvent {
        WatchEvent {
            event,
            path: "/a".into(),
        }
    }

    #[tokio::test]
    async fn a_deletion_tells_every_kind_once() {
        let mut watches = Watches::default();
        let mut futures = Vec::new();
        for kind in [WatchKind::Data, WatchKind::Exist, WatchKind::Child] {
            let (watcher, future) = WatchFuture::channel();
            watches.add(kind, "/a".into(), watcher);
            futures.push(future);
        }
        let event = told(EventType::NodeDeleted);
        watches.fire(EventType::NodeDeleted, "/a", &event);
        for future in futures {
            assert_eq!(future.await, Ok(event.clone()));
        }
        assert!(watches.once.is_empty());
    }

    #[tokio::test]
    async fn a_change_of_children_tells_child_watches_only() {
        let mut watches = Watches::default();
        let (data, mut data_future) = WatchFuture::channel();
        let (child, child_future) = WatchFuture::channel();
        watches.add(WatchKind::Data, "/a".into(), data);
        watches.add(WatchKind::Child, "/a".into(), child);
        let event = told(EventType::NodeChildrenChanged);
        watches.fire(EventType::NodeChildrenChanged, "/a", &event);
        assert_eq!(child_future.await, Ok(event));
        assert!(data_future.0.try_recv().is_err(), "still armed");
        watches.fail(ClientError::SessionExpired);
        assert_eq!(data_future.await, Err(ClientError::SessionExpired));
    }

    #[test]
    fn what_nobody_waits_for_is_not_set_again_and_requests_are_bounded() {
        let mut watches = Watches::default();
        let mut kept = Vec::new();
        for i in 0..3000 {
            let (watcher, future) = WatchFuture::channel();
            watches.add(WatchKind::Data, format!("/{i:0100}"), watcher);
            if i % 2 == 0 {
                kept.push(future);
            }
        }
        let requests = watches.set_again(9);
        assert_eq!(
            requests.iter().map(|r| r.data.len()).sum::<usize>(),
            kept.len()
        );
        assert!(requests.len() > 1);
        for request in requests {
            let bytes: usize = request.data.iter().map(String::len).sum();
            assert!(bytes <= SET_WATCHES_BYTES_MAX && request.relative_zxid == 9);
        }
    }

    fn stream(watches: &mut Watches, mode: AddWatchMode, path: &str) -> Feed<Told> {
        let (sender, feed) = crate::client::feed::feed();
        watches.add_persistent(mode, path.into(), sender);
        feed
    }

    type Told = Result<Notice, ClientError>;

    #[test]
    fn persistent_watches_see_one_path_and_recursive_ones_all_below() {
        let mut watches = Watches::default();
        let mut plain = stream(&mut watches, AddWatchMode::Persistent, "/a");
        let mut recursive = stream(&mut watches, AddWatchMode::PersistentRecursive, "/a");
        let mut root = stream(&mut watches, AddWatchMode::PersistentRecursive, "/");
        let mut fire = |event, path: &str| {
            let path = path.to_owned();
            let told = WatchEvent { event, path };
            watches.fire(event, &told.path, &told);
            let seen = |feed: &mut Feed<Told>| {
                let seen = feed.try_next();
                assert!(seen.is_none() || seen == Some(Ok(Notice::Event(told.clone()))));
                seen.is_some()
            };
            (seen(&mut plain), seen(&mut recursive), seen(&mut root))
        };
        assert_eq!(fire(EventType::NodeDataChanged, "/a"), (true, true, true));
        assert_eq!(fire(EventType::NodeCreated, "/a/b/c"), (false, true, true));
        assert_eq!(fire(EventType::NodeDeleted, "/ab"), (false, false, true));
        let children = fire(EventType::NodeChildrenChanged, "/a");
        assert_eq!(children, (true, false, false));
        assert_eq!(
            fire(EventType::DataWatchRemoved, "/a"),
            (false, false, false)
        );
    }

    #[test]
    fn a_plain_watch_replaces_a_recursive_one_and_the_other_way_round_is_harmless() {
        let mut watches = Watches::default();
        let (sender, _plain) = crate::client::feed::feed();
        assert!(!watches.add_persistent(AddWatchMode::Persistent, "/a".into(), sender));
        let (sender, _recursive) = crate::client::feed::feed();
        let mode = AddWatchMode::PersistentRecursive;
        assert!(!watches.add_persistent(mode, "/a".into(), sender));
        let (sender, _plain) = crate::client::feed::feed();
        assert!(watches.add_persistent(AddWatchMode::Persistent, "/a".into(), sender));
    }

    #[test]
    fn the_server_forgets_a_path_with_the_last_who_cares() {
        let mut watches = Watches::default();
        let one = stream(&mut watches, AddWatchMode::Persistent, "/a");
        let two = stream(&mut watches, AddWatchMode::Persistent, "/a");
        let (watcher, future) = WatchFuture::channel();
        watches.add(WatchKind::Data, "/a".into(), watcher);
        drop(one);
        assert!(!watches.forget("/a"));
        drop(two);
        assert!(!watches.forget("/a"), "the one-shot watch would go, too");
        drop(future);
        assert!(watches.forget("/a"));
        assert!(watches.set_again(1).is_empty());
    }
}
