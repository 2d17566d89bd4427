//! Every input of a VIP in one order, kept so that a fresh server can be brought to the same state
//! (`ordering = "total"`).
//!
//! Inputs are written one behind the other into chunks when they arrive, so that a checkpoint is a
//! list of chunks to be shared and never a walk over a million entries.
//!
//! ```text
//! u64 event number | u64 connection | u8 kind | u32 port or length | bytes
//! ```

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use unbroken_tcpstate::{ConnId, EventNo};

/// A chunk is closed once it holds so much.
const CHUNK_BYTES: usize = 256 * 1024;
/// What stands in front of an input's bytes.
const HEAD_BYTES: usize = 21;
/// What an input costs its reader beside its bytes: each waits until the server has taken the one
/// before.
pub(crate) const INPUT_COST_BYTES: u64 = 4096;

const OPEN: u8 = 0;
const DATA: u8 = 1;
const FIN: u8 = 2;
const END: u8 = 3;
const ABORT: u8 = 4;

/// What the servers are given, in this order on every replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) number: EventNo,
    pub(crate) conn: ConnId,
    pub(crate) what: What,
}

/// One input of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// A connection to this port of the VIP.
    Open {
        port: u16,
    },
    Data(Bytes),
    /// The client closed its side.
    Fin,
    /// The connection is over; `abort`: it was broken off.
    End {
        abort: bool,
    },
}

impl Entry {
    /// How much this one puts a server behind.
    pub(crate) fn cost_bytes(&self) -> u64 {
        let bytes = match &self.what {
            What::Data(bytes) => bytes.len(),
            What::Open { .. } | What::Fin | What::End { .. } => 0,
        };
        bytes as u64 + INPUT_COST_BYTES
    }
}

/// A place between two inputs: bytes before it, since this history began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Place(u64);

/// All inputs since the server's first state or since a checkpoint, as long as they fit.
///
/// Invariant: chunks are contiguous from `base`; the tail follows them.
#[derive(Debug)]
pub(crate) struct History {
    /// Each with its first byte's place.
    chunks: VecDeque<(u64, Bytes)>,
    tail: BytesMut,
    base: u64,
    end: u64,
    bytes_max: u64,
    /// What all of it costs a server that begins at its start.
    cost_bytes: u64,
    recording: bool,
    complete: bool,
}

impl History {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            chunks: VecDeque::new(),
            tail: BytesMut::new(),
            base: 0,
            end: 0,
            bytes_max,
            cost_bytes: 0,
            recording: true,
            complete: true,
        }
    }

    /// What another replica has kept.
    pub(crate) fn restore(bytes_max: u64, chunk: Bytes, cost_bytes: u64) -> Self {
        Self {
            end: chunk.len() as u64,
            chunks: VecDeque::from([(0, chunk)]),
            cost_bytes,
            ..Self::new(bytes_max)
        }
    }

    /// Writes an input behind the others. Past the bound all of it is given up: a part of it brings
    /// no server anywhere.
    pub(crate) fn append(&mut self, entry: &Entry) {
        self.cost_bytes += entry.cost_bytes();
        if !self.recording {
            return;
        }
        let (kind, argument, bytes) = match &entry.what {
            What::Open { port } => (OPEN, u32::from(*port), None),
            What::Data(bytes) => {
                let length = u32::try_from(bytes.len()).expect("an event is below 64 KiB");
                (DATA, length, Some(bytes))
            }
            What::Fin => (FIN, 0, None),
            What::End { abort: false } => (END, 0, None),
            What::End { abort: true } => (ABORT, 0, None),
        };
        let before = self.tail.len();
        self.tail.put_u64_le(entry.number.0);
        self.tail.put_u64_le(entry.conn.0);
        self.tail.put_u8(kind);
        self.tail.put_u32_le(argument);
        if let Some(bytes) = bytes {
            self.tail.put_slice(bytes);
        }
        self.end += (self.tail.len() - before) as u64;
        if self.tail.len() >= CHUNK_BYTES {
            self.seal();
        }
        if self.bytes() > self.bytes_max {
            (self.recording, self.complete) = (false, false);
            self.chunks = VecDeque::new();
            self.tail = BytesMut::new();
            self.base = self.end;
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            let start = self.end - self.tail.len() as u64;
            self.chunks.push_back((start, self.tail.split().freeze()));
        }
    }

    /// Whether a server can be brought up from here.
    pub(crate) fn complete(&self) -> bool {
        self.complete
    }

    /// Bytes kept.
    pub(crate) fn bytes(&self) -> u64 {
        self.end - self.base
    }

    pub(crate) fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    /// Everything, to be shared.
    pub(crate) fn chunks(&mut self) -> Vec<Bytes> {
        self.seal();
        self.chunks.iter().map(|(_, chunk)| chunk.clone()).collect()
    }

    /// Its beginning.
    pub(crate) fn start(&self) -> Place {
        Place(self.base)
    }

    /// Behind everything that was written.
    pub(crate) fn end(&self) -> Place {
        Place(self.end)
    }

    /// Keeps what comes from now on, though what came before is lost: a checkpoint is being taken.
    pub(crate) fn record(&mut self) {
        self.recording = true;
    }

    /// A checkpoint holds everything before `place`, which cost `cost_bytes`: it need not be kept.
    pub(crate) fn cut(&mut self, place: Place, cost_bytes: u64) {
        self.seal();
        let Place(place) = place;
        assert!(
            self.base <= place && place <= self.end,
            "a checkpoint is of what is kept"
        );
        while let Some((start, chunk)) = self.chunks.front_mut() {
            let skip = usize::try_from(place.saturating_sub(*start)).unwrap_or(usize::MAX);
            if skip < chunk.len() {
                // Copied, so that the rest of the chunk is let go.
                *chunk = Bytes::copy_from_slice(&chunk[skip..]);
                *start += skip as u64;
                break;
            }
            self.chunks.pop_front();
        }
        self.base = place;
        self.cost_bytes -= cost_bytes;
        self.complete = self.recording;
    }

    /// The input at a place, which then lies behind it. `None`: the end, or what cannot be read.
    pub(crate) fn read(&mut self, place: &mut Place) -> Option<Entry> {
        let sealed = self.end - self.tail.len() as u64;
        if place.0 >= sealed {
            self.seal();
        }
        let index = self.chunks.partition_point(|(start, _)| *start <= place.0);
        let (start, chunk) = self.chunks.get(index.checked_sub(1)?)?;
        let at = usize::try_from(place.0 - start).ok()?;
        let mut head = chunk.get(at..at + HEAD_BYTES)?;
        let number = EventNo(head.get_u64_le());
        let conn = ConnId(head.get_u64_le());
        let kind = head.get_u8();
        let argument = head.get_u32_le();
        let from = at + HEAD_BYTES;
        let mut to = from;
        let what = match kind {
            OPEN => What::Open {
                port: u16::try_from(argument).ok()?,
            },
            DATA => {
                to = from + usize::try_from(argument).ok()?;
                if to > chunk.len() {
                    return None;
                }
                What::Data(chunk.slice(from..to))
            }
            FIN => What::Fin,
            END | ABORT => What::End {
                abort: kind == ABORT,
            },
            _ => return None,
        };
        place.0 = start + to as u64;
        Some(Entry { number, conn, what })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let entry = |number, what| Entry {
            number: EventNo(number),
            conn: ConnId(3),
            what,
        };
        vec![
            entry(3, What::Open { port: 6379 }),
            entry(5, What::Data(Bytes::from(vec![7; CHUNK_BYTES]))),
            entry(6, What::Data(Bytes::from_static(b"x"))),
            entry(8, What::Fin),
            entry(9, What::End { abort: false }),
            entry(12, What::End { abort: true }),
        ]
    }

    fn all(history: &mut History) -> Vec<Entry> {
        let mut place = history.start();
        std::iter::from_fn(|| history.read(&mut place)).collect()
    }

    #[test]
    fn gives_back_what_was_written_and_what_follows() {
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e));
        assert_eq!(all(&mut history), entries());
        // A reader at the end goes on when more is written.
        let mut place = history.start();
        while history.read(&mut place).is_some() {}
        history.append(&entries()[2]);
        assert_eq!(history.read(&mut place), Some(entries()[2].clone()));
        assert_eq!(history.read(&mut place), None);
    }

    #[test]
    fn another_replica_reads_the_same() {
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e));
        let cost = history.cost_bytes();
        let whole: Vec<u8> = history.chunks().iter().flat_map(|c| c.to_vec()).collect();
        let mut other = History::restore(1 << 20, whole.clone().into(), cost);
        assert_eq!(all(&mut other), entries());
        // What is damaged ends the reading.
        for end in 0..whole.len().min(100) {
            let mut short = History::restore(1 << 20, whole[..end].to_vec().into(), cost);
            assert!(all(&mut short).len() <= 1);
        }
    }

    #[test]
    fn a_checkpoint_takes_the_place_of_what_came_before() {
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e));
        let (mut place, mut cost) = (history.start(), 0);
        for kept in 0..entries().len() {
            let mut cut = History::new(1 << 20);
            entries().iter().for_each(|e| cut.append(e));
            cut.cut(place, cost);
            assert_eq!(all(&mut cut), entries()[kept..]);
            let left: u64 = entries()[kept..].iter().map(Entry::cost_bytes).sum();
            assert_eq!(cut.cost_bytes(), left);
            cut.append(&entries()[2]);
            assert_eq!(all(&mut cut).len(), entries().len() - kept + 1);
            cost += history.read(&mut place).unwrap().cost_bytes();
        }
        assert_eq!(place, history.end());
    }

    #[test]
    fn what_was_given_up_begins_again_with_a_checkpoint() {
        let mut history = History::new(1000);
        entries().iter().for_each(|e| history.append(e));
        let cost = history.cost_bytes();
        let place = history.end();
        history.record();
        history.append(&entries()[3]);
        assert!(!history.complete());
        history.cut(place, cost);
        assert!(history.complete());
        assert_eq!(all(&mut history), [entries()[3].clone()]);
    }

    #[test]
    fn past_its_bound_it_is_nothing() {
        let mut history = History::new(1000);
        entries().iter().for_each(|e| history.append(e));
        assert!(!history.complete());
        assert_eq!((history.bytes(), all(&mut history)), (0, Vec::new()));
        let total = entries().iter().map(Entry::cost_bytes).sum::<u64>();
        assert_eq!(history.cost_bytes(), total);
    }
}
