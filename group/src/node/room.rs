//! How much a program may hand to its node's thread before it waits.

use super::SendError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

/// Bytes that may wait for the thread, or for it to find room in the group.
const UNPLACED_BYTES_MAX: u64 = 1 << 20;
/// Who waits tries again below this.
const ENOUGH_BYTES: u64 = UNPLACED_BYTES_MAX / 2;
/// What a message counts besides its bytes.
const MESSAGE_BYTES: u64 = 64;

/// What the handles of one membership have handed over and the thread has not placed yet. So a message is handed over
/// without waiting for the thread, and yet a sender is held up by a group that is full.
#[derive(Default)]
pub(crate) struct Room {
    unplaced: AtomicU64,
    out: AtomicBool,
    /// There may be room where there was none, for messages or calls.
    pub(super) news: Notify,
}

fn cost(bytes: usize) -> u64 {
    bytes as u64 + MESSAGE_BYTES
}

impl Room {
    /// Waits until a message of so many bytes may be handed over, and counts it.
    pub(super) async fn wait(&self, bytes: usize) -> Result<(), SendError> {
        if self.take(bytes)? {
            return Ok(());
        }
        loop {
            // Before the attempt, so that no news is missed.
            let news = self.news.notified();
            let mut news = std::pin::pin!(news);
            news.as_mut().enable();
            if self.take(bytes)? {
                return Ok(());
            }
            news.await;
        }
    }

    fn take(&self, bytes: usize) -> Result<bool, SendError> {
        if self.out.load(Ordering::Relaxed) {
            return Err(SendError::NotAMember);
        }
        let more = |now: u64| (now < UNPLACED_BYTES_MAX).then(|| now + cost(bytes));
        let unplaced = &self.unplaced;
        Ok(unplaced
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok())
    }

    /// The thread has placed, or dropped, a message of so many bytes.
    pub(super) fn placed(&self, bytes: usize) {
        let before = self.unplaced.fetch_sub(cost(bytes), Ordering::Relaxed);
        if before >= ENOUGH_BYTES && before - cost(bytes) < ENOUGH_BYTES {
            self.news.notify_waiters();
        }
    }

    /// The member is out, or on its way: nothing more is taken.
    pub(super) fn close(&self) {
        self.out.store(true, Ordering::Relaxed);
        self.news.notify_waiters();
    }
}
