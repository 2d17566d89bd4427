//! Frames that wait to be sent, bounded in number and in bytes.

use std::collections::VecDeque;

/// Frames that wait at once. A takeover says a word to each connection before the fence opens.
const FRAMES_MAX: usize = 1 << 17;

/// Bytes that wait at once. TCP's windows bound them too; this is for the sum of many connections.
const BYTES_MAX: usize = 64 << 20;

/// Announcements that wait ahead of all others: what the schedule makes while a fence is shut.
const ANNOUNCEMENTS_MAX: usize = 8;

/// The queue. What does not fit is handed back, to be counted and dropped: TCP sends it again.
#[derive(Debug, Default)]
pub(super) struct Queue {
    announcements: VecDeque<Vec<u8>>,
    frames: VecDeque<Vec<u8>>,
    /// Invariant: the sum of the lengths of `frames`.
    bytes: usize,
}

impl Queue {
    /// Appends a frame.
    pub(super) fn push(&mut self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        if self.frames.len() >= FRAMES_MAX || self.bytes + frame.len() > BYTES_MAX {
            return Err(frame);
        }
        self.bytes += frame.len();
        self.frames.push_back(frame);
        Ok(())
    }

    /// Appends a frame of an announcement, which goes before all others: whoever is to receive the
    /// rest must first know where we are.
    pub(super) fn announce(&mut self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        if self.announcements.len() >= ANNOUNCEMENTS_MAX {
            return Err(frame);
        }
        self.announcements.push_back(frame);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.announcements.len() + self.frames.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All frames in the order in which they are to be sent.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.announcements
            .iter()
            .chain(&self.frames)
            .map(Vec::as_slice)
    }

    /// Takes the first frame out.
    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        self.announcements.pop_front().or_else(|| {
            let frame = self.frames.pop_front()?;
            self.bytes -= frame.len();
            Some(frame)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_go_first_and_the_rest_in_order() {
        let mut queue = Queue::default();
        queue.push(vec![1]).unwrap();
        queue.push(vec![2]).unwrap();
        queue.announce(vec![3]).unwrap();
        queue.announce(vec![4]).unwrap();
        assert_eq!(queue.iter().map(|f| f[0]).collect::<Vec<_>>(), [3, 4, 1, 2]);
        let popped: Vec<u8> = std::iter::from_fn(|| queue.pop()).map(|f| f[0]).collect();
        assert_eq!(popped, [3, 4, 1, 2]);
        assert!(queue.is_empty());
    }

    #[test]
    fn each_bound_holds_and_room_comes_back() {
        let mut queue = Queue::default();
        let fill = |queue: &mut Queue, frame: &[u8]| {
            std::iter::repeat_with(|| queue.push(frame.to_vec()))
                .take_while(Result::is_ok)
                .count()
        };
        assert_eq!(fill(&mut queue, &[0; 100]), FRAMES_MAX);
        assert_eq!(queue.push(vec![7]), Err(vec![7]));
        queue.pop();
        assert_eq!(fill(&mut queue, &[0; 100]), 1);

        let mut queue = Queue::default();
        assert_eq!(fill(&mut queue, &[0; 1 << 16]), BYTES_MAX >> 16);
        assert_eq!(queue.push(vec![7]), Err(vec![7]));
        for n in 0..ANNOUNCEMENTS_MAX {
            assert!(
                queue.announce(vec![]).is_ok(),
                "announcement {n} has room of its own"
            );
        }
        assert!(queue.announce(vec![]).is_err());
        while queue.pop().is_some() {}
        assert_eq!(fill(&mut queue, &[0; 1 << 16]), BYTES_MAX >> 16);
    }
}
