//! Whether this replica's server answers as the leader's does.
//!
//! Every replica hashes what its server says on each connection, as it reads it. The leader tells the
//! others its hashes, as events; each compares them with its own at the same offsets and judges itself.
//!
//! *Which offsets.* Each multiple of [`GRID_BYTES`] (so that a stream that never pauses is compared too),
//! the end, and wherever the leader's server had said all it had to say when the leader looked: there a
//! request is answered, so the other servers pause there too, and a single wrong answer is told from
//! the right ones before it. A hash covers all output before its offset, so a mark that was lost or
//! could not be compared is made up for by the next.
//!
//! *Which hash.* CRC-64/XZ: one word of state for each connection, memory speed, and a burst of up to
//! 64 bits is never missed; anything else is with a probability of 2^-64. Being linear, it tells where a
//! short burst stands (see [`locate`]). It is no defence against a server that wants to deceive.

use std::collections::VecDeque;
use std::sync::Arc;

use crc64fast::Digest;
use unbroken_tcpstate::{ConnId, OUTPUT_MARKS_MAX, OutputMark};

use crate::determinism::{Harmless, LINE_BYTES_MAX};
use crate::status::DivergenceStatus;

/// A mark is made at each multiple of this many bytes.
const GRID_BYTES: u64 = 64 * 1024;
/// The longest burst of which the place is computed, in bits.
const BURST_BITS_MAX: u32 = 32;
/// Places that are remembered of a connection that has diverged until they are taken.
const VOTES_MAX: usize = 32;
/// Bytes that are searched for it.
const SEARCH_BYTES_MAX: u64 = 4 * GRID_BYTES;

/// What this replica's server has said on one connection, in short.
#[derive(Clone)]
pub(crate) struct Answer {
    harmless: Arc<Harmless>,
    digest: Digest,
    /// Offset up to which `digest` goes. With patterns, whole lines only.
    offset: u64,
    /// The line that is not complete, where there are patterns to be looked for in it.
    line: Vec<u8>,
    /// Hashes on the way since `settled`, by offset.
    marks: VecDeque<OutputMark>,
    /// The leader's, for which this server has not said enough.
    awaited: VecDeque<OutputMark>,
    /// Up to here the leader has told, or this replica has agreed.
    settled: u64,
    /// It has said something else than the leader's, which is found once.
    diverged: bool,
    /// What this server's hash is where it is not the leader's, until somebody takes it.
    votes: VecDeque<OutputMark>,
    /// Leader: it stands in the list of those to tell of.
    pub(crate) listed: bool,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("offset", &self.offset)
            .field("settled", &self.settled)
            .field("diverged", &self.diverged)
            .finish_non_exhaustive()
    }
}

/// A place where two servers' answers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// Up to here they agree.
    pub(crate) agreed: u64,
    /// Before this they differ.
    pub(crate) before: u64,
    /// The first byte that differs, where the hashes tell.
    pub(crate) first: Option<u64>,
}

/// A connection on which this replica's server has answered otherwise than the leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Divergence {
    pub(crate) conn: ConnId,
    /// Port of the VIP.
    pub(crate) port: u16,
    pub(crate) found: Found,
}

impl Divergence {
    /// As the status tells it.
    pub(crate) fn status(&self) -> DivergenceStatus {
        DivergenceStatus {
            connection: self.conn.0,
            port: self.port,
            agreed: self.found.agreed,
            before: self.found.before,
            first: self.found.first,
        }
    }
}

impl Answer {
    pub(crate) fn new(harmless: Arc<Harmless>) -> Self {
        Self {
            harmless,
            digest: Digest::new(),
            offset: 0,
            line: Vec::new(),
            marks: VecDeque::new(),
            awaited: VecDeque::new(),
            settled: 0,
            diverged: false,
            votes: VecDeque::new(),
            listed: false,
        }
    }

    /// The connection to the server begins anew: it will say everything again.
    pub(crate) fn restart(&mut self) {
        self.digest = Digest::new();
        self.offset = 0;
        self.line.clear();
        self.marks.clear();
    }

    /// Another leads: what it says is compared, and what the last one said no more.
    pub(crate) fn judge_anew(&mut self) {
        self.awaited.clear();
        self.votes.clear();
        self.diverged = false;
    }

    /// Hashes of what this server said, at marks of the leader's that differ, since this was last asked.
    /// Two servers that pause at different places have some of them in common sooner or later.
    pub(crate) fn take_votes(&mut self) -> impl Iterator<Item = OutputMark> {
        self.votes.drain(..)
    }

    /// The server said this.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> Option<Found> {
        let mut found = None;
        if !self.harmless.is_empty() {
            return self.read_lines(bytes);
        }
        while !bytes.is_empty() {
            // Cut where a mark is due, ours or the leader's.
            let mut due = GRID_BYTES - self.offset % GRID_BYTES;
            if let Some(mark) = self.awaited.front() {
                due = due.min(mark.offset - self.offset);
            }
            let due = usize::try_from(due).expect("the grid is narrow");
            let (piece, rest) = bytes.split_at(bytes.len().min(due));
            found = found.or(self.hash(piece));
            bytes = rest;
        }
        found
    }

    fn read_lines(&mut self, mut bytes: &[u8]) -> Option<Found> {
        let mut found = None;
        while !bytes.is_empty() {
            let room = LINE_BYTES_MAX - self.line.len();
            let end = bytes.iter().take(room).position(|b| *b == b'\n');
            let n = end.map_or(bytes.len().min(room), |at| at + 1);
            self.line.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if end.is_some() || self.line.len() == LINE_BYTES_MAX {
                found = found.or(self.end_line());
            }
        }
        found
    }

    fn end_line(&mut self) -> Option<Found> {
        let mut line = std::mem::take(&mut self.line);
        let end = line.len() - usize::from(line.ends_with(b"\n"));
        self.harmless.mask(&mut line[..end]);
        let found = self.hash(&line);
        line.clear();
        self.line = line;
        found
    }

    fn hash(&mut self, bytes: &[u8]) -> Option<Found> {
        let before = self.offset;
        self.digest.write(bytes);
        self.offset += bytes.len() as u64;
        if before / GRID_BYTES != self.offset / GRID_BYTES {
            self.mark();
        }
        let mut found = None;
        while let Some(theirs) = self.awaited.pop_front_if(|m| m.offset <= self.offset) {
            let ours = OutputMark {
                offset: self.offset,
                hash: self.digest.sum64(),
            };
            found = found.or(self.compare(ours, theirs));
        }
        found
    }

    /// The server has no more to say for now.
    pub(crate) fn pause(&mut self) {
        if self.offset > self.settled && self.marks.back().is_none_or(|m| m.offset < self.offset) {
            self.mark();
        }
    }

    /// The server has said all.
    pub(crate) fn end(&mut self) -> Option<Found> {
        let found = if self.line.is_empty() {
            None
        } else {
            self.end_line()
        };
        self.pause();
        found
    }

    fn mark(&mut self) {
        if self.marks.len() == OUTPUT_MARKS_MAX {
            self.marks.pop_front();
        }
        self.marks.push_back(OutputMark {
            offset: self.offset,
            hash: self.digest.sum64(),
        });
    }

    /// Leader: whether there is something to tell.
    pub(crate) fn has_news(&self) -> bool {
        self.offset > self.settled
    }

    /// Leader: what the others are told.
    pub(crate) fn announce(&mut self) -> Vec<OutputMark> {
        self.pause();
        self.settled = self.offset;
        std::mem::take(&mut self.marks).into()
    }

    /// Up to where the leader has told, or this replica has agreed.
    pub(crate) fn settled(&self) -> u64 {
        self.settled
    }

    /// Backup: whether the leader's server has said more than the one here.
    pub(crate) fn awaits(&self) -> bool {
        !self.awaited.is_empty()
    }

    /// Backup: the leader's server has said this.
    pub(crate) fn handle_mark(&mut self, theirs: OutputMark) -> Option<Found> {
        if theirs.offset <= self.settled {
            return None;
        }
        if theirs.offset > self.offset {
            // A new leader may be behind the last.
            while self
                .awaited
                .pop_back_if(|m| m.offset >= theirs.offset)
                .is_some()
            {}
            if self.awaited.len() == OUTPUT_MARKS_MAX {
                self.awaited.pop_front();
            }
            self.awaited.push_back(theirs);
            return None;
        }
        let ours = if theirs.offset == self.offset {
            OutputMark {
                offset: self.offset,
                hash: self.digest.sum64(),
            }
        } else {
            // Where our server did not pause, there is nothing to compare; the next mark covers it.
            *self.marks.iter().find(|m| m.offset == theirs.offset)?
        };
        self.compare(ours, theirs)
    }

    /// `ours` is at the offset of `theirs`, or beyond if lines end elsewhere here.
    fn compare(&mut self, ours: OutputMark, theirs: OutputMark) -> Option<Found> {
        if ours == theirs && !self.diverged {
            self.settled = ours.offset;
            while self
                .marks
                .pop_front_if(|m| m.offset <= ours.offset)
                .is_some()
            {}
            if self.marks.is_empty() {
                // A connection that idles keeps nothing.
                self.marks = VecDeque::new();
            }
            return None;
        }
        if self.votes.len() == VOTES_MAX {
            self.votes.pop_front();
        }
        self.votes.push_back(OutputMark {
            offset: theirs.offset,
            hash: ours.hash,
        });
        if std::mem::replace(&mut self.diverged, true) {
            return None;
        }
        let length = (theirs.offset - self.settled).min(SEARCH_BYTES_MAX);
        let back = (ours.offset == theirs.offset)
            .then(|| locate(ours.hash ^ theirs.hash, length))
            .flatten();
        Some(Found {
            agreed: self.settled,
            before: theirs.offset,
            first: back.map(|back| theirs.offset - back),
        })
    }
}

/// CRC-64/XZ's polynomial, the lowest bit first.
const POLYNOMIAL: u64 = 0xc96c_5795_d787_0f42;

/// The state that each byte makes of an empty one.
const TABLE: [u64; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut state = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            state = if state & 1 == 1 {
                (state >> 1) ^ POLYNOMIAL
            } else {
                state >> 1
            };
            bit += 1;
        }
        table[byte] = state;
        byte += 1;
    }
    table
};

/// Where in [`TABLE`] the entry with this highest byte stands; no two share it.
const INVERSE: [u8; 256] = {
    let mut inverse = [0; 256];
    let mut byte = 0_u8;
    loop {
        inverse[(TABLE[byte as usize] >> 56) as usize] = byte;
        if byte == u8::MAX {
            break;
        }
        byte += 1;
    }
    inverse
};

/// From the difference of two hashes: how many bytes before their common end the first byte stands that
/// differs, if all that differs is a burst of at most [`BURST_BITS_MAX`] bits in the last `length`
/// bytes.
///
/// The difference of two CRCs depends on the differing bits alone. Walked back over the equal bytes behind a
/// burst, it becomes the burst itself, which is short; before, it is as good as random, so that a
/// false hit has a probability of about `length` / 2^32.
fn locate(difference: u64, length: u64) -> Option<u64> {
    let mut state = difference;
    for back in 1..=length {
        let byte = INVERSE[(state >> 56) as usize];
        state = ((state ^ TABLE[usize::from(byte)]) << 8) | u64::from(byte);
        if state >> BURST_BITS_MAX == 0 && state & 0xff != 0 {
            return Some(back);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(patterns: &[&str]) -> Answer {
        Answer::new(Arc::new(Harmless::new(patterns).unwrap()))
    }

    /// Bytes that repeat nowhere near.
    fn stream(length: usize) -> Vec<u8> {
        (0..length as u64)
            .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect()
    }

    /// Feeds `bytes` in pieces of `step`, and gives the first difference found.
    fn feed(answer: &mut Answer, bytes: &[u8], step: usize) -> Option<Found> {
        let mut found = None;
        for piece in bytes.chunks(step) {
            found = found.or(answer.read(piece));
        }
        answer.pause();
        found
    }

    fn hear(answer: &mut Answer, marks: &[OutputMark]) -> Option<Found> {
        marks
            .iter()
            .fold(None, |found, mark| found.or(answer.handle_mark(*mark)))
    }

    #[test]
    fn the_same_bytes_agree_however_they_are_cut_and_whoever_is_first() {
        let bytes = stream(300_000);
        for step in [1000, 4096, 65_536, 100_001] {
            let mut leader = answer(&[]);
            assert_eq!(feed(&mut leader, &bytes, 7777), None);
            let marks = leader.announce();
            assert_eq!(marks.len(), 5, "four of the grid, and the end");
            assert!(!leader.has_news());
            let (mut early, mut late) = (answer(&[]), answer(&[]));
            assert_eq!(feed(&mut early, &bytes, step), None);
            assert_eq!(hear(&mut early, &marks), None);
            assert_eq!(hear(&mut late, &marks), None);
            assert_eq!(feed(&mut late, &bytes, step), None);
            for backup in [&early, &late] {
                assert_eq!(backup.settled, 300_000);
                assert!(backup.marks.is_empty() && backup.awaited.is_empty());
            }
        }
    }

    #[test]
    fn a_flipped_byte_is_found_and_its_place_told() {
        let bytes = stream(300_000);
        let mut leader = answer(&[]);
        feed(&mut leader, &bytes, 7777);
        let marks = leader.announce();
        for at in [0, 65_535, 65_536, 200_000, 299_999] {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0x20;
            let mut backup = answer(&[]);
            feed(&mut backup, &wrong, 5000);
            let found = hear(&mut backup, &marks).unwrap();
            assert!(
                (found.agreed..found.before).contains(&(at as u64)),
                "{found:?}"
            );
            assert!(found.before - found.agreed <= GRID_BYTES);
            assert_eq!(found.first, Some(at as u64));
            // Once is enough.
            assert_eq!(hear(&mut backup, &marks), None);
        }
    }

    #[test]
    fn a_burst_is_located_and_what_is_longer_is_not() {
        let bytes = stream(10_000);
        let hash = |bytes: &[u8]| {
            let mut digest = Digest::new();
            digest.write(bytes);
            digest.sum64()
        };
        for (length, told) in [(1, true), (2, true), (4, true), (9, false)] {
            let mut wrong = bytes.clone();
            wrong[4000..4000 + length]
                .iter_mut()
                .for_each(|b| *b ^= 0x5a);
            let place = locate(hash(&bytes) ^ hash(&wrong), 10_000);
            assert_eq!(place, told.then_some(6000), "{length}");
        }
    }

    #[test]
    fn single_answers_are_told_apart() {
        let mut leader = answer(&[]);
        let mut backup = answer(&[]);
        for (request, ours) in [&b"one"[..], b"two", b"3", b"four"].into_iter().zip([
            &b"one"[..],
            b"two",
            b"x",
            b"four",
        ]) {
            leader.read(request);
            backup.read(ours);
            leader.pause();
            backup.pause();
        }
        let found = hear(&mut backup, &leader.announce()).unwrap();
        assert_eq!((found.agreed, found.before, found.first), (6, 7, Some(6)));
    }

    #[test]
    fn two_that_pause_at_different_places_have_a_mark_in_common() {
        let mut leader = answer(&[]);
        let [mut one, mut other] = [answer(&[]), answer(&[])];
        for (step, right) in [b"first", b"wrong", b"third"].into_iter().enumerate() {
            leader.read(right);
            for backup in [&mut one, &mut other] {
                backup.read(if step == 1 { b"right" } else { right });
            }
            one.pause();
            // The other is read when the next answer is there already.
            if step != 1 {
                other.pause();
            }
            leader.pause();
        }
        let marks = leader.announce();
        let found = [&mut one, &mut other].map(|backup| hear(backup, &marks).unwrap().before);
        assert_eq!(found, [10, 15]);
        let votes = [&mut one, &mut other].map(|backup| backup.take_votes().collect::<Vec<_>>());
        assert_eq!(votes[0].len(), 2);
        assert_eq!(votes[0].last(), votes[1].last());
        // What follows never agrees again.
        leader.read(b"more");
        one.read(b"more");
        assert_eq!(hear(&mut one, &leader.announce()), None);
        assert_eq!(one.take_votes().count(), 1);
    }

    #[test]
    fn what_is_harmless_is_not_compared_unless_its_length_differs() {
        let text =
            |date: &str| format!("HTTP/1.0 200 OK\r\nDate: {date}\r\n\r\nbody without an end");
        let run = |date: &str| {
            let mut leader = answer(&["^Date: .*"]);
            let mut backup = answer(&["^Date: .*"]);
            feed(&mut leader, text("Monday").as_bytes(), 3);
            leader.end();
            let found = hear(&mut backup, &leader.announce());
            let found = found.or(feed(&mut backup, text(date).as_bytes(), 5));
            found.or(backup.end())
        };
        assert_eq!(run("Friday"), None);
        assert!(run("Thursday").is_some());
        let mut plain = answer(&[]);
        let mut other = answer(&[]);
        feed(&mut plain, text("Monday").as_bytes(), 3);
        feed(&mut other, text("Friday").as_bytes(), 3);
        assert!(hear(&mut other, &plain.announce()).is_some());
    }

    #[test]
    fn a_server_that_begins_anew_is_compared_from_where_it_stood() {
        let bytes = stream(100_000);
        let mut leader = answer(&[]);
        feed(&mut leader, &bytes[..50_000], 999);
        let mut backup = answer(&[]);
        feed(&mut backup, &bytes[..50_000], 999);
        assert_eq!(hear(&mut backup, &leader.announce()), None);
        backup.restart();
        feed(&mut leader, &bytes[50_000..], 999);
        let marks = leader.announce();
        assert_eq!(hear(&mut backup, &marks), None);
        let mut wrong = bytes;
        wrong[80_000] ^= 1;
        let found = feed(&mut backup, &wrong, 999).unwrap();
        assert_eq!(found.first, Some(80_000));
    }

    #[test]
    fn nothing_grows_without_bound() {
        let mut backup = answer(&[]);
        for offset in 1..10_000 {
            backup.handle_mark(OutputMark { offset, hash: 0 });
        }
        assert_eq!(backup.awaited.len(), OUTPUT_MARKS_MAX);
        let mut ahead = answer(&[]);
        for _ in 0..10_000 {
            ahead.read(b"x");
            ahead.pause();
        }
        assert_eq!(ahead.marks.len(), OUTPUT_MARKS_MAX);
        assert!(ahead.announce().len() <= OUTPUT_MARKS_MAX);
        let mut diverged = answer(&[]);
        for offset in 1..10_000 {
            diverged.read(b"x");
            diverged.pause();
            diverged.handle_mark(OutputMark { offset, hash: 0 });
        }
        assert_eq!(diverged.votes.len(), VOTES_MAX);
        assert_eq!(diverged.marks.len(), OUTPUT_MARKS_MAX);
    }
}
