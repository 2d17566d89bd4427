//! How much a program may hand to its node's thread before it waits.

use super::SendError;
use super::tasks::first;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

/// Bytes that may wait for the thread, or for it to find room in the group.
const UNPLACED_BYTES_MAX: u64 = 1 << 20;
/// The same over all groups of the node; one that has none waiting may always hand over a message.
const ALL_UNPLACED_BYTES_MAX: u64 = 16 << 20;
/// What a message counts besides its bytes.
const MESSAGE_BYTES: u64 = 64;

/// What the handles of one membership have handed over and the thread has not placed yet. So a message is handed over
/// without waiting for the thread, and yet a sender is held up by a group that is full.
#[derive(Default)]
pub(crate) struct Room {
    unplaced: AtomicU64,
    /// Over all groups of the node.
    all: Arc<Unplaced>,
    out: AtomicBool,
    /// There may be room where there was none, for messages or calls.
    pub(super) news: Notify,
}

#[derive(Default)]
pub(super) struct Unplaced {
    bytes: AtomicU64,
    news: Notify,
}

fn cost(bytes: usize) -> u64 {
    bytes as u64 + MESSAGE_BYTES
}

impl Room {
    pub(super) fn new(all: Arc<Unplaced>) -> Self {
        Self {
            all,
            ..Self::default()
        }
    }

    /// Waits until a message of so many bytes may be handed over, and counts it until the place that is given is dropped.
    pub(super) async fn wait(self: &Arc<Self>, bytes: usize) -> Result<Place, SendError> {
        let place = || Place {
            room: Arc::clone(self),
            cost: cost(bytes),
        };
        if self.take(bytes)? {
            return Ok(place());
        }
        loop {
            // Before the attempt, so that no news is missed.
            let (news, all) = (self.news.notified(), self.all.news.notified());
            let (mut news, mut all) = (std::pin::pin!(news), std::pin::pin!(all));
            news.as_mut().enable();
            all.as_mut().enable();
            if self.take(bytes)? {
                return Ok(place());
            }
            first(news, all).await;
        }
    }

    fn take(&self, bytes: usize) -> Result<bool, SendError> {
        if self.out.load(Ordering::Relaxed) {
            return Err(SendError::NotAMember);
        }
        let full = self.all.bytes.load(Ordering::Relaxed) >= ALL_UNPLACED_BYTES_MAX;
        let most = if full { 1 } else { UNPLACED_BYTES_MAX };
        let more = |now: u64| (now < most).then(|| now + cost(bytes));
        let unplaced = &self.unplaced;
        let taken = unplaced.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        if taken.is_ok() {
            self.all.bytes.fetch_add(cost(bytes), Ordering::Relaxed);
        }
        Ok(taken.is_ok())
    }

    fn release(&self, cost: u64) {
        // Who waits tries again when there is half of the room, or when nothing of its own waits.
        let enough = |before: u64, most: u64| before >= most / 2 && before - cost < most / 2;
        let before = self.unplaced.fetch_sub(cost, Ordering::Relaxed);
        if enough(before, UNPLACED_BYTES_MAX) || before == cost {
            self.news.notify_waiters();
        }
        let before = self.all.bytes.fetch_sub(cost, Ordering::Relaxed);
        if enough(before, ALL_UNPLACED_BYTES_MAX) {
            self.all.news.notify_waiters();
        }
    }

    /// The member is out, or on its way: nothing more is taken.
    pub(super) fn close(&self) {
        self.out.store(true, Ordering::Relaxed);
        self.news.notify_waiters();
    }
}

/// The room of a message that was handed over and is not in the group yet, nor dropped.
pub(crate) struct Place {
    room: Arc<Room>,
    cost: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.release(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn now<T>(f: impl Future<Output = T>) -> Option<T> {
        match pin!(f).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(t) => Some(t),
            Poll::Pending => None,
        }
    }

    /// Many groups together have a bound of their own; one that has nothing waiting is held up by no other.
    #[test]
    fn what_waits_for_the_thread_is_bounded_over_all_groups() {
        let all = Arc::<Unplaced>::default();
        let rooms: Vec<_> = (0..100)
            .map(|_| Arc::new(Room::new(Arc::clone(&all))))
            .collect();
        let mut places = Vec::new();
        for room in &rooms {
            while let Some(place) = now(room.wait(100_000)) {
                places.push(place.unwrap());
            }
        }
        let waits = all.bytes.load(Ordering::Relaxed);
        let most = ALL_UNPLACED_BYTES_MAX + 101 * cost(100_000);
        assert!((ALL_UNPLACED_BYTES_MAX..most).contains(&waits), "{waits}");
        assert!(rooms.iter().all(|r| r.unplaced.load(Ordering::Relaxed) > 0));
        // Who waits is woken by what another lets go.
        let mut waiting = pin!(rooms[99].wait(1));
        assert!(now(waiting.as_mut()).is_none());
        places.pop(); // its own last
        assert!(now(waiting.as_mut()).unwrap().is_ok());
        drop(places);
        assert_eq!(all.bytes.load(Ordering::Relaxed), 0);
    }
}
