//! What each copy has answered so far, shared between the copies' threads and the one that judges.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::script::Conn;

/// How a connection ended, as a client sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum End {
    /// Not yet.
    #[default]
    Open,
    /// The server closed its side.
    Closed,
    /// The server broke it off.
    Reset,
    /// The server did not take it.
    Refused,
    /// The client broke it off: how far the server had come by then is chance.
    ByClient,
}

impl End {
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Open => "left open",
            Self::Closed => "closed by the server",
            Self::Reset => "reset by the server",
            Self::Refused => "refused",
            Self::ByClient => "reset by the client",
        }
    }
}

/// One connection of one copy.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    /// What the server said, as far as it is kept.
    pub(super) output: Vec<u8>,
    /// How much it said in all.
    pub(super) total: u64,
    /// What the client said, as far as it is kept.
    pub(super) sent: Vec<Bytes>,
    pub(super) sent_total: u64,
    /// Offsets of output, each with how much the client had sent before it came.
    marks: Vec<(u64, u64)>,
    pub(super) end: End,
    pub(super) last_output: Option<Instant>,
}

impl Transcript {
    /// How much the client had sent when the output at `offset` came.
    pub(super) fn sent_before(&self, offset: u64) -> u64 {
        let next = self.marks.partition_point(|(at, _)| *at <= offset);
        next.checked_sub(1).map_or(0, |i| self.marks[i].1)
    }

    /// Whether all of it was kept.
    pub(super) fn complete(&self) -> bool {
        self.output.len() as u64 == self.total
    }

    /// The last `max` bytes of the client's first `upto`.
    pub(super) fn sent_tail(&self, upto: u64, max: usize) -> Vec<u8> {
        let all = self.sent.iter().flat_map(|b| b.iter().copied());
        let upto = usize::try_from(upto).unwrap_or(usize::MAX);
        let mut tail: Vec<u8> = all.take(upto).collect();
        tail.split_off(tail.len().saturating_sub(max))
    }
}

/// One copy.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) conns: BTreeMap<Conn, Transcript>,
    /// Steps done.
    pub(super) steps: usize,
    /// Every step was done.
    pub(super) played: bool,
    /// The server's process ended by itself, and how.
    pub(super) exited: Option<String>,
    /// Waits that were in vain: line of the script, and what did not come.
    pub(super) vain: Vec<(usize, String)>,
    pub(super) last_output: Option<Instant>,
    /// Bytes kept, of both sides.
    kept: usize,
    /// Something was not kept, for want of room.
    pub(super) truncated: bool,
}

impl Answers {
    /// Forgets a connection that was compared.
    pub(super) fn forget(&mut self, conn: Conn) {
        if let Some(old) = self.conns.remove(&conn) {
            self.kept -= old.output.len() + old.sent.iter().map(Bytes::len).sum::<usize>();
        }
    }
}

/// All copies.
#[derive(Debug)]
pub(super) struct Board {
    copies: Vec<Mutex<Answers>>,
    /// Most bytes that are kept of each copy.
    keep: usize,
    /// What comes now is the end of the trial and no answer.
    closed: AtomicBool,
}

impl Board {
    pub(super) fn new(copies: usize, keep: usize) -> Self {
        Self {
            copies: (0..copies).map(|_| Mutex::default()).collect(),
            keep,
            closed: AtomicBool::new(false),
        }
    }

    /// Takes nothing down any more: the copies are about to be stopped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(super) fn copies(&self) -> usize {
        self.copies.len()
    }

    pub(super) fn lock(&self, copy: usize) -> MutexGuard<'_, Answers> {
        self.copies[copy]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The client of `conn` sent this.
    pub(super) fn sent(&self, copy: usize, conn: Conn, bytes: &Bytes) {
        let mut answers = self.lock(copy);
        let answers = &mut *answers;
        let transcript = answers.conns.entry(conn).or_default();
        transcript.sent_total += bytes.len() as u64;
        // Either all of its beginning is kept or nothing follows.
        let kept: u64 = transcript.sent_total - bytes.len() as u64;
        let whole = transcript.sent.iter().map(|b| b.len() as u64).sum::<u64>() == kept;
        if whole && answers.kept + bytes.len() <= self.keep {
            answers.kept += bytes.len();
            transcript.sent.push(bytes.clone());
        }
    }

    /// The server said this on `conn`.
    pub(super) fn received(&self, copy: usize, conn: Conn, bytes: &[u8], now: Instant) {
        if self.closed.load(Ordering::SeqCst) {
            return;
        }
        let mut answers = self.lock(copy);
        let answers = &mut *answers;
        let transcript = answers.conns.entry(conn).or_default();
        let sent = transcript.sent_total;
        if transcript.marks.last().is_none_or(|(_, s)| *s != sent) {
            transcript.marks.push((transcript.total, sent));
        }
        let room = self.keep.saturating_sub(answers.kept);
        let room = if transcript.complete() { room } else { 0 };
        let kept = bytes.len().min(room);
        transcript.output.extend_from_slice(&bytes[..kept]);
        transcript.total += bytes.len() as u64;
        transcript.last_output = Some(now);
        answers.last_output = Some(now);
        answers.kept += kept;
        answers.truncated |= kept < bytes.len();
    }

    /// `conn` ended.
    pub(super) fn ended(&self, copy: usize, conn: Conn, end: End, now: Instant) {
        if self.closed.load(Ordering::SeqCst) {
            return;
        }
        let mut answers = self.lock(copy);
        let transcript = answers.conns.entry(conn).or_default();
        if transcript.end == End::Open {
            transcript.end = end;
        }
        answers.last_output = Some(now);
    }

    /// What of each copy must agree before it is worth comparing: how far every connection has come.
    pub(super) fn agree_in_length(&self) -> bool {
        let shape = |copy| -> Vec<(Conn, u64, End)> {
            let answers = self.lock(copy);
            let conns = answers.conns.iter();
            conns
                // How far a connection came that the client reset is chance.
                .map(|(conn, t)| {
                    (
                        *conn,
                        if t.end == End::ByClient { 0 } else { t.total },
                        t.end,
                    )
                })
                .collect()
        };
        let first = shape(0);
        (1..self.copies()).all(|copy| shape(copy) == first)
    }
}
