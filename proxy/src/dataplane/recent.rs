//! What clients sent in the last moments, kept by a backup that hears it (address mode `flood`): a
//! new leader begins with what came while nobody led.
//!
//! The leader hears the same frames at the same time, and multicasts their payload at once. So an
//! event of its that arrives now says that what came some time before was in time for it: of a
//! living leader's clients little is kept.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::BootTime;
use crate::wire::{Frame, Kind, Mac};

/// Longer than any takeover; what is older, a client has sent again.
const AGE_MAX: Duration = Duration::from_millis(500);
/// Time from a frame's arrival here until the leader's event with it: the leader may have had other
/// work, but then it lives, and its clients' segments are safe in its socket.
const BEFORE_EVENT: Duration = Duration::from_millis(20);
const FRAMES_MAX: usize = 4096;
const BYTES_MAX: usize = 8 << 20;

/// A frame as it came.
#[derive(Debug)]
struct Kept {
    at: BootTime,
    source: Mac,
    checksum_ok: bool,
    packet: Vec<u8>,
}

/// The last frames, in order; the oldest go first.
#[derive(Debug, Default)]
pub(super) struct Recent {
    frames: VecDeque<Kept>,
    /// Invariant: the sum of the lengths of `frames`.
    bytes: usize,
}

impl Recent {
    /// Keeps a client's packet.
    pub(super) fn keep(&mut self, now: BootTime, frame: &Frame<'_>) {
        let Kind::Ip(packet) = frame.kind else { return };
        self.forget(|oldest| now.since(oldest.at) > AGE_MAX);
        self.bytes += packet.len();
        self.frames.push_back(Kept {
            at: now,
            source: frame.source,
            checksum_ok: frame.checksum_ok,
            packet: packet.to_vec(),
        });
        while self.frames.len() > FRAMES_MAX || self.bytes > BYTES_MAX {
            self.pop();
        }
    }

    /// The leader has multicast an event.
    pub(super) fn handle_event(&mut self, now: BootTime) {
        self.forget(|oldest| now.since(oldest.at) > BEFORE_EVENT);
    }

    /// Gives all that is kept, oldest first, and keeps nothing.
    pub(super) fn replay(&mut self, now: BootTime, mut f: impl FnMut(Frame<'_>)) {
        self.forget(|oldest| now.since(oldest.at) > AGE_MAX);
        while let Some(kept) = self.pop() {
            f(Frame {
                source: kept.source,
                kind: Kind::Ip(&kept.packet),
                checksum_ok: kept.checksum_ok,
            });
        }
    }

    /// How many are kept.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Keeps nothing.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn forget(&mut self, old: impl Fn(&Kept) -> bool) {
        while self.frames.front().is_some_and(&old) {
            self.pop();
        }
    }

    fn pop(&mut self) -> Option<Kept> {
        let kept = self.frames.pop_front()?;
        self.bytes -= kept.packet.len();
        Some(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime::from_micros(ms * 1000)
    }

    fn keep(recent: &mut Recent, ms: u64, packet: &[u8]) {
        let frame = Frame {
            source: [1; 6],
            kind: Kind::Ip(packet),
            checksum_ok: true,
        };
        recent.keep(at(ms), &frame);
    }

    fn replayed(recent: &mut Recent, ms: u64) -> Vec<u8> {
        let mut firsts = Vec::new();
        recent.replay(at(ms), |frame| match frame.kind {
            Kind::Ip(packet) => firsts.push(packet[0]),
            Kind::Claim(_) => panic!("only packets are kept"),
        });
        firsts
    }

    #[test]
    fn what_came_in_the_gap_is_there_in_order() {
        let mut recent = Recent::default();
        for (ms, byte) in [(1000, 1), (1010, 2), (1030, 3)] {
            keep(&mut recent, ms, &[byte; 100]);
        }
        recent.handle_event(at(1031));
        keep(&mut recent, 1090, &[4; 100]);
        assert_eq!(
            replayed(&mut recent, 1100),
            [3, 4],
            "20 ms before the event"
        );
        assert_eq!((replayed(&mut recent, 1100), recent.bytes), (vec![], 0));
        keep(&mut recent, 2000, &[5]);
        assert!(replayed(&mut recent, 2501).is_empty(), "too old to matter");
    }

    #[test]
    fn each_bound_holds() {
        let mut recent = Recent::default();
        for _ in 0..FRAMES_MAX {
            keep(&mut recent, 1, &[1]);
        }
        keep(&mut recent, 1, &[2]);
        assert_eq!(recent.len(), FRAMES_MAX);
        assert_eq!(replayed(&mut recent, 1).last(), Some(&2), "the newest stay");
        for n in 0..200 {
            keep(&mut recent, 1, &vec![n; 1 << 16]);
        }
        assert_eq!(recent.bytes, BYTES_MAX);
        assert_eq!(replayed(&mut recent, 1).first(), Some(&72));
    }
}
