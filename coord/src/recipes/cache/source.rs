//! Where the cache hears of changes from.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_core::Stream;
use tokio::sync::watch;

use crate::client::{
    Client, ClientError, Notice, SessionState, WatchEvent, WatchFuture, WatchStream,
};

/// What the cache hears.
pub(super) enum Input {
    Event(WatchEvent),
    Disconnected,
    Missed,
    Ended(ClientError),
}

/// A persistent watch, or one-shot ones on servers that know no others.
pub(super) enum Source {
    Stream(WatchStream),
    Shots(Shots),
}

impl Source {
    /// The next input that is there already; wakes `context` when there is one.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Input> {
        match self {
            Self::Stream(stream) => Pin::new(stream).poll_next(context).map(from_notice),
            Self::Shots(shots) => {
                shots.fired.lock().waker = Some(context.waker().clone());
                match shots.try_next() {
                    Some(input) => Poll::Ready(input),
                    None => Poll::Pending,
                }
            }
        }
    }

    /// The next input that is there already.
    pub(super) fn try_next(&mut self) -> Option<Input> {
        match self {
            Self::Stream(stream) => stream.try_next().map(|item| from_notice(Some(item))),
            Self::Shots(shots) => shots.try_next(),
        }
    }
}

fn from_notice(item: Option<Result<Notice, ClientError>>) -> Input {
    match item {
        Some(Ok(Notice::Event(event))) => Input::Event(event),
        Some(Ok(Notice::Disconnected)) => Input::Disconnected,
        Some(Ok(Notice::Missed)) => Input::Missed,
        Some(Err(error)) => Input::Ended(error),
        None => Input::Ended(ClientError::Closed),
    }
}

/// What a one-shot watch looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Node,
    Children,
}

type Key = (Kind, String);

/// One-shot watches, as many as the cache has znodes. When one fires its waker writes its key down
/// on the spot, before the session goes on to the next answer, so that whoever looks then sees it.
pub(super) struct Shots {
    watches: BTreeMap<Key, WatchFuture>,
    fired: Arc<Fired>,
    /// What has fired and was not given out yet.
    told: VecDeque<Result<WatchEvent, ClientError>>,
    state: watch::Receiver<SessionState>,
}

struct Fired(Mutex<Keys>);

struct Keys {
    keys: VecDeque<Key>,
    waker: Option<Waker>,
}

impl Fired {
    fn lock(&self) -> MutexGuard<'_, Keys> {
        // No code that can panic runs under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes by writing down.
struct Note {
    key: Key,
    fired: Arc<Fired>,
}

impl Wake for Note {
    fn wake(self: Arc<Self>) {
        let mut keys = self.fired.lock();
        keys.keys.push_back(self.key.clone());
        let waker = keys.waker.take();
        drop(keys);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Shots {
    pub(super) fn new(client: &Client) -> Self {
        let mut state = client.state();
        state.mark_unchanged();
        Self {
            watches: BTreeMap::new(),
            fired: Arc::new(Fired(Mutex::new(Keys {
                keys: VecDeque::new(),
                waker: None,
            }))),
            told: VecDeque::new(),
            state,
        }
    }

    /// Listens to a watch, and no longer to the one before it on the same thing.
    pub(super) fn add(&mut self, kind: Kind, path: &str, mut watch: WatchFuture) {
        let key = (kind, path.to_owned());
        match self.poll(&key, &mut watch) {
            Poll::Ready(told) => self.told.push_back(told),
            Poll::Pending => {
                self.watches.insert(key, watch);
            }
        }
    }

    /// Sees to it that the key is written down when the watch fires, unless it has.
    fn poll(&self, key: &Key, watch: &mut WatchFuture) -> Poll<Result<WatchEvent, ClientError>> {
        let note = Note {
            key: key.clone(),
            fired: self.fired.clone(),
        };
        let waker = Waker::from(Arc::new(note));
        Pin::new(watch).poll(&mut Context::from_waker(&waker))
    }

    fn try_next(&mut self) -> Option<Input> {
        loop {
            if let Some(told) = self.told.pop_front() {
                return Some(match told {
                    Ok(event) => Input::Event(event),
                    Err(error) => Input::Ended(error),
                });
            }
            match self.state.has_changed() {
                Ok(false) => {}
                Ok(true) => {
                    return Some(if self.state.borrow_and_update().is_connected() {
                        // Perhaps it was lost in between.
                        Input::Missed
                    } else {
                        Input::Disconnected
                    });
                }
                Err(_) => return Some(Input::Ended(ClientError::Closed)),
            }
            let key = self.fired.lock().keys.pop_front()?;
            if let Some(mut watch) = self.watches.remove(&key) {
                match self.poll(&key, &mut watch) {
                    Poll::Ready(told) => self.told.push_back(told),
                    // It was the one before it.
                    Poll::Pending => {
                        self.watches.insert(key, watch);
                    }
                }
            }
        }
    }
}
