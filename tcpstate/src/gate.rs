//! R1, output commit: the server's bytes wait here until what they depend on is stable.

use std::collections::VecDeque;

use crate::event::EventNo;
use crate::fault::planted;

/// An empty gate keeps no more memory than this.
const KEPT_BYTES_MAX: usize = 64 * 1024;

/// Bytes of one connection's server, each with the newest event that the server had been given.
#[derive(Default)]
pub(crate) struct Gate {
    bytes: VecDeque<u8>,
    /// Runs of bytes with the same tag; tags never decrease.
    runs: VecDeque<(EventNo, usize)>,
}

impl std::fmt::Debug for Gate {
    /// Payload is never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("len", &self.bytes.len())
            .field("runs", &self.runs)
            .finish()
    }
}

impl Gate {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Appends bytes that depend on `tag` and all before.
    pub(crate) fn append(&mut self, bytes: &[u8], tag: EventNo) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend(bytes);
        match self.runs.back_mut() {
            Some((last, len)) if *last >= tag => *len += bytes.len(),
            _ => self.runs.push_back((tag, bytes.len())),
        }
    }

    /// The event that the first byte waits for.
    pub(crate) fn waits_for(&self) -> Option<EventNo> {
        self.runs.front().map(|(tag, _)| *tag)
    }

    /// How many bytes are released when `stable` is.
    pub(crate) fn released_len(&self, stable: EventNo) -> usize {
        self.runs
            .iter()
            .take_while(|(tag, _)| *tag <= stable || planted!(CommitWaitSkipped))
            .map(|(_, n)| n)
            .sum()
    }

    /// A contiguous piece at the front that is released when `stable` is.
    pub(crate) fn released(&self, stable: EventNo) -> &[u8] {
        let released = self.released_len(stable);
        let (head, _) = self.bytes.as_slices();
        &head[..released.min(head.len())]
    }

    /// Drops `n` bytes from the front, which must be there.
    pub(crate) fn consume(&mut self, mut n: usize) {
        self.bytes.drain(..n);
        if self.bytes.is_empty() && self.bytes.capacity() > KEPT_BYTES_MAX {
            self.bytes = VecDeque::new();
        }
        while n > 0 {
            let (_, len) = self.runs.front_mut().expect("runs cover all bytes");
            let step = n.min(*len);
            *len -= step;
            n -= step;
            if *len == 0 {
                self.runs.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_order_when_their_tag_is_stable() {
        let mut gate = Gate::default();
        gate.append(b"abc", EventNo(5));
        gate.append(b"de", EventNo(5));
        gate.append(b"fgh", EventNo(9));
        assert_eq!(gate.released(EventNo(4)), b"");
        assert_eq!(gate.released(EventNo(5)), b"abcde");
        gate.consume(4);
        assert_eq!(gate.waits_for(), Some(EventNo(5)));
        assert_eq!(gate.released(EventNo(8)), b"e");
        gate.consume(1);
        assert_eq!(gate.waits_for(), Some(EventNo(9)));
        assert_eq!(gate.released(EventNo(9)), b"fgh");
        gate.consume(3);
        assert!(gate.is_empty() && gate.waits_for().is_none());
    }
}
