//! The input of one connection: every byte that the client sent since `Open`, as far as it is kept.
//!
//! One copy serves two readers: the local server is fed from it, and a replica that joins later is
//! brought to the same point by replay. What is too much for memory is in files.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use unbroken_tcpstate::{ConnId, EventNo};

use super::spill::{FRAME_BYTES, For, Loading, Piece, Spill, Unreadable};

/// What a retained segment costs in memory beside its bytes.
const SEGMENT_OVERHEAD_BYTES: u64 = 128;
/// Less is not worth a file.
const SPILLED_BYTES_MIN: u64 = 1024;
/// What the server will take next stays in memory.
const NEXT_BYTES: u64 = 2 * FRAME_BYTES as u64;
/// So much of what the server takes next is read from files before it does, in frames.
const LOADED_MAX: usize = 2;

#[derive(Debug)]
struct Segment {
    start: u64,
    /// The newest event in it.
    number: EventNo,
    piece: Piece,
}

impl Segment {
    fn end(&self) -> u64 {
        self.start + self.piece.len() as u64
    }

    fn memory_bytes(&self) -> u64 {
        match &self.piece {
            Piece::Memory(bytes) => bytes.len() as u64,
            Piece::Stored(_) => 0,
        }
    }
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
    /// Bytes of segments that are in memory.
    memory_bytes: u64,
    /// Only what the server has yet to take is kept.
    given_up: bool,
    fin: bool,
    /// What the server takes next and is in files, by its place.
    loading: VecDeque<(u64, Loading)>,
}

/// Whether what a server is to be given next is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Here,
    /// It is being read.
    Loading,
    /// It cannot be read for now: others have read much that they have not used.
    Refused,
}

/// What came of handing a part of an input to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spilled {
    Part,
    /// There is none that could be.
    Nothing,
    /// The disk does not take it.
    Refused,
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
        if !bytes.is_empty() {
            self.push_piece(number, Piece::Memory(bytes));
        }
    }

    /// Appends what is kept elsewhere already, or is to be; not empty.
    pub(crate) fn push_piece(&mut self, number: EventNo, piece: Piece) {
        let segment = Segment {
            start: self.end,
            number,
            piece,
        };
        self.end = segment.end();
        self.memory_bytes += segment.memory_bytes();
        self.segments.push_back(segment);
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

    /// Whether it was given up to be so.
    pub(crate) fn given_up(&self) -> bool {
        self.given_up
    }

    /// What this input costs in memory, in bytes.
    pub(crate) fn cost_bytes(&self) -> u64 {
        self.memory_bytes + self.segments.len() as u64 * SEGMENT_OVERHEAD_BYTES
    }

    /// Keeps from now on only what the server has yet to take.
    pub(crate) fn give_up(&mut self, taken: u64) {
        self.given_up = true;
        self.forget_before(taken);
    }

    /// Forgets what the server has taken already. The connection can then no longer be replayed.
    pub(crate) fn forget_before(&mut self, taken: u64) {
        while let Some(first) = self.segments.front() {
            if first.end() > taken {
                break;
            }
            self.base = first.end();
            self.forgotten = Some(first.number);
            self.memory_bytes -= first.memory_bytes();
            self.segments.pop_front();
        }
    }

    /// Hands the next part to the disk: what the server has taken first, then what it will not take
    /// soon.
    pub(crate) fn spill(&mut self, taken: u64, spill: &Spill) -> Spilled {
        let may = |s: &Segment| {
            s.memory_bytes() > 0 && (s.end() <= taken || s.start >= taken + NEXT_BYTES)
        };
        let Some(first) = self.segments.iter().position(may) else {
            return Spilled::Nothing;
        };
        let mut bytes = 0;
        let parts: Vec<&Segment> = self
            .segments
            .range(first..)
            .take_while(|s| {
                bytes += s.piece.len();
                may(s) && bytes <= FRAME_BYTES
            })
            .collect();
        // One that is longer than a frame goes as a whole.
        let count = parts.len().max(1);
        let last = &self.segments[first + count - 1];
        let (start, end, number) = (self.segments[first].start, last.end(), last.number);
        if end - start < SPILLED_BYTES_MIN {
            return Spilled::Nothing;
        }
        let whole = match &self.segments[first].piece {
            Piece::Memory(bytes) if count == 1 => bytes.clone(),
            _ => {
                let length = usize::try_from(end - start).expect("about a frame");
                let mut whole = BytesMut::with_capacity(length);
                for segment in parts {
                    if let Piece::Memory(bytes) = &segment.piece {
                        whole.extend_from_slice(bytes);
                    }
                }
                whole.freeze()
            }
        };
        let Some(stored) = spill.store(whole) else {
            return Spilled::Refused;
        };
        self.memory_bytes -= end - start;
        self.segments[first] = Segment {
            start,
            number,
            piece: Piece::Stored(stored),
        };
        self.segments.drain(first + 1..first + count);
        Spilled::Part
    }

    /// Whether a part of it could not be written.
    pub(crate) fn spill_failed(&self) -> bool {
        let mut pieces = self.segments.iter().map(|s| &s.piece);
        pieces.any(|p| matches!(p, Piece::Stored(stored) if stored.failed()))
    }

    /// Has what the server takes next, from `offset` on, read from files.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn prepare(
        &mut self,
        offset: u64,
        conn: ConnId,
        spill: &Spill,
    ) -> Result<Next, Unreadable> {
        while let Some((start, loading)) = self.loading.front() {
            let read = loading.get().transpose()?;
            let end = read.map_or(u64::MAX, |bytes| start + bytes.len() as u64);
            // A server that was begun anew is given everything again.
            if end > offset && *start <= offset + NEXT_BYTES {
                break;
            }
            self.loading.pop_front();
        }
        let first = self.segments.partition_point(|s| s.end() <= offset);
        let mut next = Next::Here;
        for segment in self.segments.range(first..).take(LOADED_MAX) {
            let Piece::Stored(stored) = &segment.piece else {
                continue;
            };
            if stored.held().is_some() {
                continue;
            }
            let known = self.loading.iter().find(|(at, _)| *at == segment.start);
            let here = match known {
                Some((_, loading)) => loading.get().transpose()?.is_some(),
                None => match spill.load(stored, For::Connection(conn)) {
                    Some(loading) => {
                        self.loading.push_back((segment.start, loading));
                        false
                    }
                    None => {
                        if segment.start <= offset {
                            next = Next::Refused;
                        }
                        break;
                    }
                },
            };
            if !here && segment.start <= offset {
                next = Next::Loading;
            }
        }
        Ok(next)
    }

    /// Gathers the bytes from `offset` on, as far as they are in memory, in at most `max` parts.
    pub(crate) fn gather(&self, offset: u64, max: usize) -> Vec<Bytes> {
        let first = self.segments.partition_point(|s| s.end() <= offset);
        let mut parts = Vec::with_capacity(8);
        for segment in self.segments.range(first..).take(max) {
            let read = || {
                let (_, loading) = self.loading.iter().find(|(at, _)| *at == segment.start)?;
                loading.get()?.ok().cloned()
            };
            let Some(bytes) = segment.piece.now().or_else(read) else {
                break;
            };
            let skip = usize::try_from(offset.saturating_sub(segment.start))
                .expect("within a segment, which is in memory");
            parts.push(bytes.slice(skip..));
        }
        parts
    }

    /// The number of the event that holds the byte before `offset`, or of a later one; `None` at the
    /// beginning, and where a checkpoint did not bring the bytes.
    pub(crate) fn number_before(&self, offset: u64) -> Option<EventNo> {
        match self.segments.partition_point(|s| s.start < offset) {
            0 => self.forgotten,
            i => Some(self.segments[i - 1].number),
        }
    }

    /// The retained bytes in order, shared rather than copied.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.segments.iter().map(|s| s.piece.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::spill::tests::Disk;

    fn collect(input: &Input, offset: u64) -> Vec<u8> {
        let parts = input.gather(offset, 16);
        parts.iter().flat_map(|part| part.to_vec()).collect()
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

    #[test]
    fn what_is_on_disk_is_fed_again_from_the_beginning() {
        const SEGMENTS: u64 = 3000;
        let disk = Disk::new(64 << 20);
        let mut input = Input::default();
        let segment = |i: u64| Bytes::from(vec![i.to_le_bytes()[0]; 1448]);
        for i in 0..SEGMENTS {
            input.push(EventNo(10 + i), i * 1448, segment(i));
        }
        let whole: Vec<u8> = (0..SEGMENTS).flat_map(segment).collect();
        // The server has taken the first half; of the rest, what it takes next stays.
        let taken = input.end() / 2;
        while input.spill(taken, &disk) == Spilled::Part {}
        assert_eq!(input.spill(taken, &disk), Spilled::Nothing);
        assert!(input.cost_bytes() < 2 * NEXT_BYTES && input.complete());
        assert_eq!(
            collect(&input, taken)[..],
            whole[usize::try_from(taken).unwrap()..][..16 * 1448]
        );
        let number = input.number_before(1).unwrap();
        assert!(
            (10..10 + 200).contains(&number.0),
            "at least that of its own event"
        );
        disk.wait_written();
        // A server that was begun anew is fed all of it.
        let mut fed = Vec::new();
        while (fed.len() as u64) < input.end() {
            let at = fed.len() as u64;
            match input.prepare(at, ConnId(1), &disk).unwrap() {
                Next::Loading => disk.wait_loaded(),
                Next::Refused => panic!("nothing else is read"),
                Next::Here => {}
            }
            let parts = input.gather(at, 3);
            fed.extend(parts.iter().flat_map(|part| part.to_vec()));
            assert!(input.loading.len() <= LOADED_MAX + 1);
        }
        assert!(fed == whole);
        // And who joins is given the same.
        let given: Vec<u8> = input.pieces().flat_map(|p| p.read().unwrap()).collect();
        assert!(given == whole);
        input.give_up(taken);
        assert!(!input.complete() && input.given_up());
        let cut = usize::try_from(input.base()).unwrap();
        assert!(cut > 0 && cut as u64 <= taken);
        drop(input);
        disk.wait_empty();
    }
}
