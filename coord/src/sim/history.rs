//! What happened in a run, as the clients saw it and in which order the service says it was.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::quorum::LogEntry;
use crate::wire::{ErrorCode, EventType, Request, Response};

/// One request of a client.
#[derive(Debug, Clone)]
pub(super) struct Op {
    /// The connection it was sent on.
    pub(super) conn: u64,
    pub(super) request: Request,
    /// When it was sent, microseconds.
    pub(super) sent: u64,
    /// `None` if the connection ended first: it was done or not.
    pub(super) answer: Option<Answer>,
}

#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// When it came, microseconds.
    pub(super) at: u64,
    /// The zxid in its header.
    pub(super) zxid: u64,
    pub(super) result: Result<Response, ErrorCode>,
}

/// What came in on a connection.
#[derive(Debug, Clone)]
pub(super) enum Frame {
    /// The answer to this request (a place among the operations).
    Reply(usize),
    /// The answer to a ping.
    Pong { zxid: u64 },
    Event {
        at: u64,
        kind: EventType,
        path: String,
    },
}

/// One connection of a client.
#[derive(Debug, Clone, Default)]
pub(super) struct Conn {
    pub(super) client: u64,
    /// The session, once the server has said so.
    pub(super) session: Option<i64>,
    /// When it was told that its session has expired.
    pub(super) refused: Option<u64>,
    /// The session it asked for, 0 for a new one.
    pub(super) wanted: i64,
    /// What it had seen when it connected.
    pub(super) seen: u64,
    /// Its requests that change something, in their order.
    pub(super) writes: Vec<usize>,
    /// The request that set its watches again.
    pub(super) restores: Option<usize>,
    pub(super) frames: Vec<Frame>,
}

/// One entry of the log, and when it was first applied anywhere.
#[derive(Debug, Clone)]
pub(super) struct Committed {
    pub(super) entry: LogEntry,
    pub(super) at: u64,
}

/// Everything.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// The servers that began.
    pub(super) founders: BTreeMap<u64, String>,
    pub(super) ops: Vec<Op>,
    pub(super) conns: BTreeMap<u64, Conn>,
    /// Index 1 and on.
    pub(super) log: Vec<Committed>,
    /// Checksums of the states of servers, by zxid.
    pub(super) states: Vec<(u64, u32)>,
}

impl History {
    /// Notes that a server has applied this entry.
    ///
    /// # Errors
    /// What is wrong, if another server has applied another one at this index.
    pub(super) fn applied(&mut self, now: u64, entry: &LogEntry) -> Result<(), String> {
        let place = usize::try_from(entry.index - 1).expect("short runs");
        match self.log.get(place) {
            Some(known) if known.entry == *entry => Ok(()),
            Some(known) => Err(format!(
                "two entries at index {}: of term {} and of term {}",
                entry.index, known.entry.term, entry.term
            )),
            None if place == self.log.len() => {
                self.log.push(Committed {
                    entry: entry.clone(),
                    at: now,
                });
                Ok(())
            }
            None => Err(format!(
                "index {} was applied and {} nowhere",
                entry.index,
                self.log.len() + 1
            )),
        }
    }

    /// A checksum of everything, to compare runs.
    pub(super) fn digest(&self) -> u32 {
        let mut sum = 0;
        for committed in &self.log {
            let Committed { entry, at } = committed;
            sum = crc32c::crc32c_append(sum, &entry.index.to_le_bytes());
            sum = crc32c::crc32c_append(sum, &entry.term.to_le_bytes());
            sum = crc32c::crc32c_append(sum, &at.to_le_bytes());
            sum = crc32c::crc32c_append(sum, &entry.data);
        }
        for op in &self.ops {
            let answered = op
                .answer
                .as_ref()
                .map_or((0, 0), |answer| (answer.at, answer.zxid));
            for word in [op.conn, op.sent, answered.0, answered.1] {
                sum = crc32c::crc32c_append(sum, &word.to_le_bytes());
            }
        }
        sum
    }
}

/// The data of a znode, for the requests of the simulation.
pub(super) fn data(text: &str) -> Option<Bytes> {
    Some(Bytes::copy_from_slice(text.as_bytes()))
}
