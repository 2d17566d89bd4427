//! Every input of a VIP in one order, kept so that a fresh server can be brought to the same state
//! (`ordering = "total"`; DESIGN §5, "Joining").
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

/// A place between two inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cursor {
    chunk: usize,
    at: usize,
}

/// All inputs since the server's first state, as long as they fit.
#[derive(Debug)]
pub(crate) struct History {
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
    bytes: u64,
    bytes_max: u64,
    /// What all of it costs a server that begins at its start.
    cost_bytes: u64,
    complete: bool,
}

impl History {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            chunks: VecDeque::new(),
            tail: BytesMut::new(),
            bytes: 0,
            bytes_max,
            cost_bytes: 0,
            complete: true,
        }
    }

    /// What another replica has kept.
    pub(crate) fn restore(bytes_max: u64, chunk: Bytes, cost_bytes: u64) -> Self {
        Self {
            bytes: chunk.len() as u64,
            chunks: VecDeque::from([chunk]),
            cost_bytes,
            ..Self::new(bytes_max)
        }
    }

    /// Writes an input behind the others. Past the bound all of it is given up: a part of it brings
    /// no server anywhere.
    pub(crate) fn append(&mut self, entry: &Entry) {
        self.cost_bytes += entry.cost_bytes();
        if !self.complete {
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
        self.bytes += (self.tail.len() - before) as u64;
        if self.tail.len() >= CHUNK_BYTES {
            self.seal();
        }
        if self.bytes > self.bytes_max {
            self.complete = false;
            self.chunks = VecDeque::new();
            self.tail = BytesMut::new();
            self.bytes = 0;
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }

    /// Whether a fresh server can be brought up from here.
    pub(crate) fn complete(&self) -> bool {
        self.complete
    }

    /// Bytes kept.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    /// Everything, to be shared.
    pub(crate) fn chunks(&mut self) -> Vec<Bytes> {
        self.seal();
        self.chunks.iter().cloned().collect()
    }

    /// The input at a place, which then lies behind it. `None`: the end, or what cannot be read.
    pub(crate) fn read(&mut self, cursor: &mut Cursor) -> Option<Entry> {
        loop {
            if cursor.chunk == self.chunks.len() {
                self.seal();
            }
            let chunk = self.chunks.get(cursor.chunk)?;
            let mut head = chunk.get(cursor.at..)?;
            if head.is_empty() {
                *cursor = Cursor {
                    chunk: cursor.chunk + 1,
                    at: 0,
                };
                continue;
            }
            if head.len() < HEAD_BYTES {
                return None;
            }
            let number = EventNo(head.get_u64_le());
            let conn = ConnId(head.get_u64_le());
            let kind = head.get_u8();
            let argument = head.get_u32_le();
            let start = cursor.at + HEAD_BYTES;
            let mut end = start;
            let what = match kind {
                OPEN => What::Open {
                    port: u16::try_from(argument).ok()?,
                },
                DATA => {
                    end = start + usize::try_from(argument).ok()?;
                    if end > chunk.len() {
                        return None;
                    }
                    What::Data(chunk.slice(start..end))
                }
                FIN => What::Fin,
                END | ABORT => What::End {
                    abort: kind == ABORT,
                },
                _ => return None,
            };
            cursor.at = end;
            return Some(Entry { number, conn, what });
        }
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
        let mut cursor = Cursor::default();
        std::iter::from_fn(|| history.read(&mut cursor)).collect()
    }

    #[test]
    fn gives_back_what_was_written_and_what_follows() {
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e));
        assert_eq!(all(&mut history), entries());
        // A reader at the end goes on when more is written.
        let mut cursor = Cursor::default();
        while history.read(&mut cursor).is_some() {}
        history.append(&entries()[2]);
        assert_eq!(history.read(&mut cursor), Some(entries()[2].clone()));
        assert_eq!(history.read(&mut cursor), None);
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
    fn past_its_bound_it_is_nothing() {
        let mut history = History::new(1000);
        entries().iter().for_each(|e| history.append(e));
        assert!(!history.complete());
        assert_eq!((history.bytes(), all(&mut history)), (0, Vec::new()));
        let total = entries().iter().map(Entry::cost_bytes).sum::<u64>();
        assert_eq!(history.cost_bytes(), total);
    }
}
