//! The watches that a session has set, as its client knows them.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::ClientError;
use crate::wire::{EventType, SetWatches};

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

/// What a watch looks at. The server forgets each kind of watch on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WatchKind {
    Data,
    /// Set by an `exists` that found nothing.
    Exist,
    Child,
}

/// Paths here hold the chroot.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<(WatchKind, String), Vec<Watcher>>);

impl Watches {
    pub(super) fn add(&mut self, kind: WatchKind, path: String, watcher: Watcher) {
        let watchers = self.0.entry((kind, path)).or_default();
        // Callers who lost interest leave closed channels behind; they are swept whenever the
        // list would grow, so it stays within twice the number of the interested.
        if watchers.len() == watchers.capacity() {
            watchers.retain(|watcher| !watcher.is_closed());
        }
        watchers.push(watcher);
    }

    /// Tells whom an event of the server concerns.
    pub(super) fn fire(&mut self, event: EventType, path: &str, told: &WatchEvent) {
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
                .0
                .remove(&(kind, path.to_owned()))
                .into_iter()
                .flatten()
            {
                // Err: nobody waits for this one any more.
                let _: Result<(), _> = watcher.send(Ok(told.clone()));
            }
        }
    }

    /// The watches to set again on a new connection, in requests of bounded size.
    pub(super) fn set_again(&mut self, relative_zxid: i64) -> Vec<SetWatches> {
        self.0.retain(|_, watchers| {
            watchers.retain(|watcher| !watcher.is_closed());
            !watchers.is_empty()
        });
        let fresh = || SetWatches {
            relative_zxid,
            ..SetWatches::default()
        };
        let mut requests = Vec::new();
        let (mut request, mut bytes) = (fresh(), 0);
        for (kind, path) in self.0.keys() {
            if bytes + path.len() > SET_WATCHES_BYTES_MAX && bytes > 0 {
                requests.push(std::mem::replace(&mut request, fresh()));
                bytes = 0;
            }
            bytes += path.len();
            match kind {
                WatchKind::Data => &mut request.data,
                WatchKind::Exist => &mut request.exist,
                WatchKind::Child => &mut request.child,
            }
            .push(path.clone());
        }
        if bytes > 0 {
            requests.push(request);
        }
        requests
    }

    /// Ends all of them.
    pub(super) fn fail(&mut self, error: ClientError) {
        for watcher in std::mem::take(&mut self.0).into_values().flatten() {
            let _: Result<(), _> = watcher.send(Err(error));
        }
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
        assert!(watches.0.is_empty());
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
}
