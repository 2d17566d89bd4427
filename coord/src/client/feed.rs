//! What a session tells its holder by and by, as a stream: bounded queues from the session's task
//! to whoever reads.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Items that wait to be read at most; what is more makes room by forgetting all of them.
pub(super) const FEED_ITEMS_MAX: usize = 4096;

struct Queue<T> {
    items: VecDeque<T>,
    waker: Option<Waker>,
    /// Nothing more comes.
    ended: bool,
    /// Nobody reads any more.
    abandoned: bool,
}

struct Shared<T>(Mutex<Queue<T>>);

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        // No code that can panic runs under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task's end.
pub(super) struct FeedSender<T>(Arc<Shared<T>>);

/// The reader's end.
pub(super) struct Feed<T>(Arc<Shared<T>>);

pub(super) fn feed<T>() -> (FeedSender<T>, Feed<T>) {
    let shared = Arc::new(Shared(Mutex::new(Queue {
        items: VecDeque::new(),
        waker: None,
        ended: false,
        abandoned: false,
    })));
    (FeedSender(shared.clone()), Feed(shared))
}

impl<T> FeedSender<T> {
    /// Queues `item`. Where too much waits already, all of it gives way to `overflow` alone.
    pub(super) fn push(&self, item: T, overflow: impl FnOnce() -> T) {
        let mut queue = self.0.lock();
        if queue.abandoned || queue.ended {
            return;
        }
        if queue.items.len() >= FEED_ITEMS_MAX {
            queue.items.clear();
            queue.items.push_back(overflow());
        }
        queue.items.push_back(item);
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.0.lock().abandoned
    }
}

impl<T> Drop for FeedSender<T> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.ended = true;
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Feed<T> {
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut queue = self.0.lock();
        if let Some(item) = queue.items.pop_front() {
            return Poll::Ready(Some(item));
        }
        if queue.ended {
            return Poll::Ready(None);
        }
        queue.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn try_next(&mut self) -> Option<T> {
        self.0.lock().items.pop_front()
    }

    /// Nobody reads any more, from now on.
    pub(super) fn abandon(&mut self) {
        let mut queue = self.0.lock();
        queue.abandoned = true;
        queue.items.clear();
    }
}

impl<T> Drop for Feed<T> {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl<T> fmt::Debug for FeedSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FeedSender")
    }
}

impl<T> fmt::Debug for Feed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Feed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test]
    async fn items_come_in_order_and_then_the_end() {
        let (sender, mut feed) = feed();
        sender.push(1, || 0);
        sender.push(2, || 0);
        assert_eq!(poll_fn(|cx| feed.poll_next(cx)).await, Some(1));
        let reader = tokio::spawn(async move {
            assert_eq!(poll_fn(|cx| feed.poll_next(cx)).await, Some(2));
            poll_fn(|cx| feed.poll_next(cx)).await
        });
        tokio::task::yield_now().await;
        drop(sender);
        assert_eq!(reader.await.unwrap(), None, "woken by the end");
    }

    #[test]
    fn what_is_not_read_is_bounded_and_said_to_be_missing() {
        let (sender, mut feed) = feed();
        for i in 0..=FEED_ITEMS_MAX {
            sender.push(i, || usize::MAX);
        }
        assert_eq!(feed.try_next(), Some(usize::MAX));
        assert_eq!(feed.try_next(), Some(FEED_ITEMS_MAX));
        assert_eq!(feed.try_next(), None);
        assert!(!sender.is_abandoned());
        drop(feed);
        assert!(sender.is_abandoned());
    }
}
