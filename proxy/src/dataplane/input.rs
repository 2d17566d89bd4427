//! The input of one connection: every byte that the client sent since `Open`, as far as it is kept.
//!
//! One copy serves two readers: the local server is fed from it, and a replica that joins later is
//! brought to the same point by replay.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;
use unbroken_tcpstate::EventNo;

/// What a retained segment costs beside its bytes.
const SEGMENT_OVERHEAD_BYTES: u64 = 64;

#[derive(Debug)]
struct Segment {
    start: u64,
    number: EventNo,
    bytes: Bytes,
}

/// The retained input of one connection.
///
/// Invariant: segments are contiguous from `base` to `end`; `base == 0` means that the whole input
/// since `Open` is here, so that a fresh server can be brought up by replay.
#[derive(Debug, Default)]
pub(crate) struct Input {
    segments: VecDeque<Segment>,
    base: u64,
    /// The event that held the byte before `base`, once bytes were forgotten.
    forgotten: Option<EventNo>,
    end: u64,
    fin: bool,
}

impl Input {
    /// An input of which the bytes before `base` are no longer kept.
    pub(crate) fn starting_at(base: u64) -> Self {
        Self {
            base,
            end: base,
            ..Self::default()
        }
    }

    /// Appends the bytes of event `number` at `offset`, which must be the end.
    pub(crate) fn push(&mut self, number: EventNo, offset: u64, bytes: Bytes) {
        assert_eq!(
            offset, self.end,
            "the event log is contiguous on a connection"
        );
        assert!(!self.fin, "no input follows the client's FIN");
        if bytes.is_empty() {
            return;
        }
        self.end += bytes.len() as u64;
        self.segments.push_back(Segment {
            start: offset,
            number,
            bytes,
        });
    }

    /// The client closed its side: nothing follows.
    pub(crate) fn finish(&mut self) {
        self.fin = true;
    }

    pub(crate) fn finished(&self) -> bool {
        self.fin
    }

    /// Offset behind the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Offset of the first byte that is still kept.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Whether a fresh server can be brought up from here.
    pub(crate) fn complete(&self) -> bool {
        self.base == 0
    }

    /// What this input costs in memory, in bytes.
    pub(crate) fn cost_bytes(&self) -> u64 {
        self.end - self.base + self.segments.len() as u64 * SEGMENT_OVERHEAD_BYTES
    }

    /// Forgets what the server has taken already. The connection can then no longer be replayed.
    pub(crate) fn forget_before(&mut self, taken: u64) {
        while let Some(first) = self.segments.front() {
            let end = first.start + first.bytes.len() as u64;
            if end > taken {
                break;
            }
            self.base = end;
            self.forgotten = Some(first.number);
            self.segments.pop_front();
        }
    }

    /// Fills `slices` with the bytes from `offset` on, and gives the number of the newest event
    /// among them.
    pub(crate) fn gather<'a>(
        &'a self,
        offset: u64,
        slices: &mut Vec<IoSlice<'a>>,
        max: usize,
    ) -> Option<EventNo> {
        let first = self
            .segments
            .partition_point(|s| s.start + s.bytes.len() as u64 <= offset);
        let mut newest = None;
        for segment in self.segments.range(first..).take(max) {
            let skip = usize::try_from(offset.saturating_sub(segment.start))
                .expect("a segment is at most 64 KiB");
            slices.push(IoSlice::new(&segment.bytes[skip..]));
            newest = Some(segment.number);
        }
        newest
    }

    /// The number of the event that holds the byte before `offset`; `None` at the beginning, and
    /// where a checkpoint did not bring the bytes.
    pub(crate) fn number_before(&self, offset: u64) -> Option<EventNo> {
        match self.segments.partition_point(|s| s.start < offset) {
            0 => self.forgotten,
            i => Some(self.segments[i - 1].number),
        }
    }

    /// The retained bytes in order, shared rather than copied.
    pub(crate) fn segments(&self) -> impl Iterator<Item = Bytes> + '_ {
        self.segments.iter().map(|s| s.bytes.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(input: &Input, offset: u64) -> Vec<u8> {
        let mut slices = Vec::new();
        input.gather(offset, &mut slices, 16);
        slices.iter().flat_map(|s| s.to_vec()).collect()
    }

    #[test]
    fn gathers_from_any_offset() {
        let mut input = Input::default();
        input.push(EventNo(3), 0, Bytes::from_static(b"abc"));
        input.push(EventNo(5), 3, Bytes::from_static(b"defg"));
        for (offset, rest) in (0..).zip([&b"abcdefg"[..], b"bcdefg", b"cdefg", b"defg", b"efg"]) {
            assert_eq!(collect(&input, offset), rest);
        }
        assert_eq!(input.number_before(3), Some(EventNo(3)));
        assert_eq!(input.number_before(4), Some(EventNo(5)));
        assert_eq!(input.number_before(0), None);
    }

    #[test]
    fn forgets_only_whole_segments_that_were_taken() {
        let mut input = Input::default();
        input.push(EventNo(3), 0, Bytes::from_static(b"abc"));
        input.push(EventNo(5), 3, Bytes::from_static(b"defg"));
        input.forget_before(2);
        assert!(input.complete());
        input.forget_before(5);
        assert!(!input.complete());
        assert_eq!(input.base(), 3);
        // R1: what the server answers still depends on what was forgotten.
        assert_eq!(input.number_before(3), Some(EventNo(3)));
        assert_eq!(collect(&input, 5), b"fg");
    }
}
