//! The task that reads again whenever something has changed.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::{BadValue, Following, Known, Version};
use crate::client::{ClientError, SessionState, WatchFuture};
use crate::recipes::znodes::Znodes;

/// What one reading found.
pub(super) struct Reading<T> {
    /// `None` where there is no znode; of a bad one its version.
    pub(super) found: Option<Result<Version<T>, (i32, BadValue)>>,
    /// One of these fires when the reading is out of date.
    pub(super) watches: Vec<WatchFuture>,
}

/// What is known, and the task that keeps it so.
pub(super) struct Follower<T> {
    known: watch::Receiver<Known<T>>,
    task: AbortHandle,
}

impl<T> Drop for Follower<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T: Send + Sync + 'static> Follower<T> {
    pub(super) fn start<F>(
        nodes: Znodes,
        path: &str,
        read: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<Reading<T>, ClientError>> + Send,
    {
        let (sender, known) = watch::channel(Known {
            version: None,
            following: Following::Starting,
        });
        let path = path.to_owned();
        let task = async move {
            let ended = follow(&nodes, &path, &sender, read).await;
            debug!(path, %ended, "configuration no longer followed");
            sender.send_modify(|known| known.following = Following::Ended(ended));
        };
        Self {
            known,
            task: tokio::spawn(task).abort_handle(),
        }
    }

    pub(super) fn current(&self) -> Option<Arc<Version<T>>> {
        self.known.borrow().version.clone()
    }

    pub(super) fn changes(&self) -> watch::Receiver<Known<T>> {
        self.known.clone()
    }

    pub(super) async fn first(&self) -> Result<Arc<Version<T>>, ClientError> {
        let mut known = self.known.clone();
        let enough = |known: &Known<T>| {
            known.version.is_some() || matches!(known.following, Following::Ended(_))
        };
        let known = known.wait_for(enough).await;
        let known = known.map_err(|_| ClientError::Closed)?;
        match (&known.version, &known.following) {
            (Some(version), _) => Ok(version.clone()),
            (None, Following::Ended(error)) => Err(*error),
            (None, _) => Err(ClientError::Closed),
        }
    }
}

/// Gives why nothing more can be followed.
async fn follow<T, F>(
    nodes: &Znodes,
    path: &str,
    sender: &watch::Sender<Known<T>>,
    read: impl Fn() -> F,
) -> ClientError
where
    F: Future<Output = Result<Reading<T>, ClientError>>,
{
    loop {
        if let Err(error) = nodes.session().await {
            return error;
        }
        let mut state = nodes.client.state();
        state.mark_unchanged();
        let mut reading = match read().await {
            Ok(reading) => reading,
            // The next round finds out whether there will be another session.
            Err(ClientError::SessionExpired) => continue,
            Err(error) => return error,
        };
        sender.send_if_modified(|known| adopt(path, known, reading.found.take()));
        // Whatever happened to the connection, what is there is read again on the next one: its
        // watches would be set again by themselves, but whether they all fired nobody would know.
        tokio::select! {
            () = any(&mut reading.watches) => {}
            _ = state.changed() => {
                let connected = matches!(*state.borrow(), SessionState::Connected { .. });
                if !connected {
                    sender.send_modify(|known| known.following = Following::Stale);
                }
            }
        }
    }
}

/// Takes over what was found; whether that is news.
fn adopt<T>(
    path: &str,
    known: &mut Known<T>,
    found: Option<Result<Version<T>, (i32, BadValue)>>,
) -> bool {
    let (version, following) = match found {
        None => (None, Following::Missing),
        Some(Ok(version)) => (Some(version), Following::Current),
        Some(Err((version, why))) => (None, Following::Bad { version, why }),
    };
    let moved = |version: &Version<T>| {
        let old = known.version.as_ref();
        old.is_none_or(|old| (old.zxid, old.version) != (version.zxid, version.version))
    };
    let version = version.filter(moved);
    if version.is_none() && known.following == following {
        return false;
    }
    if let Following::Bad { version, why } = &following {
        warn!(path, version, %why, "configuration not adopted");
    }
    if let Some(version) = version {
        known.version = Some(Arc::new(version));
    }
    known.following = following;
    true
}

/// Waits for one of the watches.
async fn any(watches: &mut [WatchFuture]) {
    poll_fn(|context| {
        let fired = |watch: &mut WatchFuture| Pin::new(watch).poll(context).is_ready();
        if watches.iter_mut().any(fired) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(value: u32, zxid: i64) -> Option<Result<Version<u32>, (i32, BadValue)>> {
        Some(Ok(Version {
            value,
            version: 0,
            zxid,
        }))
    }

    #[test]
    fn only_good_versions_are_adopted_and_only_news_are_told() {
        let mut known = Known {
            version: None,
            following: Following::Starting,
        };
        let value = |known: &Known<u32>| known.version.as_ref().map(|version| version.value);
        assert!(adopt("/a", &mut known, None));
        assert_eq!(known.following, Following::Missing);
        assert!(adopt("/a", &mut known, version(1, 10)));
        assert!(!adopt("/a", &mut known, version(1, 10)));
        let bad = || Some(Err((1, BadValue::new("no number"))));
        assert!(adopt("/a", &mut known, bad()));
        assert!(!adopt("/a", &mut known, bad()));
        assert_eq!(value(&known), Some(1), "the one before it stays");
        known.following = Following::Stale;
        assert!(
            adopt("/a", &mut known, version(1, 10)),
            "not stale any more"
        );
        assert!(adopt("/a", &mut known, version(2, 11)));
        assert_eq!(value(&known), Some(2));
        assert!(adopt("/a", &mut known, None));
        assert_eq!(
            (value(&known), known.following),
            (Some(2), Following::Missing)
        );
    }
}
