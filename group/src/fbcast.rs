//! fbcast: the log of events in order, and how they go over datagrams and come back together.
//!
//! An event is cut into chunks wherever a datagram is full, so that all datagrams of a burst but the last have the same
//! size (the kernel then segments one large send). A receiver puts chunks together by position (event, byte), so a
//! retransmission may cut elsewhere than the original did. BSS91 §5 (FIFO is what remains of CBCAST with one sender).

use crate::config::Limits;
use crate::time::Instant;
use crate::wire::{self, Chunk, Pos};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A missing range is asked for again after this long.
pub(crate) const NAK_INTERVAL: Duration = Duration::from_millis(2);
/// Ranges in one request.
pub(crate) const NAK_RANGES_MAX: usize = 32;
/// What every event counts besides its payload, so that empty events are bounded too.
const EVENT_OVERHEAD_BYTES: u64 = 64;

#[derive(Serialize, Deserialize)]
struct Entry {
    payload: Bytes,
    /// Bytes of all events up to and including this one, since the log began.
    end: u64,
}

/// Events in order, from the oldest that somebody may miss to the newest held here.
///
/// Invariant: holds exactly the events `first..next`, contiguous.
#[derive(Serialize, Deserialize)]
pub(crate) struct EventLog {
    entries: VecDeque<Entry>,
    first: u64,
    /// `end` of the event before `first`.
    base: u64,
}

impl EventLog {
    /// An empty log whose first event will be `cut + 1`.
    pub(crate) fn starting_after(cut: u64) -> Self {
        Self {
            entries: VecDeque::new(),
            first: cut + 1,
            base: 0,
        }
    }

    /// The number of the next event.
    pub(crate) fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// The number of the newest event.
    pub(crate) fn held(&self) -> u64 {
        self.next() - 1
    }

    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    pub(crate) fn push(&mut self, payload: Bytes) {
        let end = self.end_of(self.held()) + payload.len() as u64 + EVENT_OVERHEAD_BYTES;
        self.entries.push_back(Entry { payload, end });
    }

    fn index(&self, number: u64) -> Option<usize> {
        usize::try_from(number.checked_sub(self.first)?).ok()
    }

    pub(crate) fn payload(&self, number: u64) -> Option<&Bytes> {
        self.entries.get(self.index(number)?).map(|e| &e.payload)
    }

    fn end_of(&self, number: u64) -> u64 {
        match self.index(number) {
            None => self.base,
            Some(i) => self
                .entries
                .get(i)
                .or(self.entries.back())
                .map_or(self.base, |e| e.end),
        }
    }

    /// Bytes of the events after `number`.
    pub(crate) fn bytes_after(&self, number: u64) -> u64 {
        self.end_of(self.held()) - self.end_of(number)
    }

    /// Bytes of the events after `a` up to and including `b`.
    pub(crate) fn bytes_between(&self, a: u64, b: u64) -> u64 {
        self.end_of(b).saturating_sub(self.end_of(a))
    }

    /// Forgets events up to and including `number`.
    pub(crate) fn trim_to(&mut self, number: u64) {
        while self.first <= number {
            let Some(e) = self.entries.pop_front() else {
                break;
            };
            self.base = e.end;
            self.first += 1;
        }
    }

    /// Forgets events after `number`: they lie beyond the cut.
    pub(crate) fn truncate_after(&mut self, number: u64) {
        let keep = self.index(number + 1).unwrap_or(0);
        self.entries.truncate(keep);
    }

    /// Fills datagrams with the events from `from` up to (not including) `to`, until `budget` payload bytes are used.
    /// Gives the bodies and the position where it stopped. Every body begins with `header`.
    pub(crate) fn pack(
        &self,
        header: &[u8],
        from: Pos,
        to: Pos,
        budget: usize,
        limits: &Limits,
    ) -> (Vec<Bytes>, Pos) {
        self.pack_after(header, header, from, to, budget, limits)
    }

    /// As [`Self::pack`], the first body beginning with `first` in place of `header`.
    pub(crate) fn pack_after(
        &self,
        first: &[u8],
        header: &[u8],
        from: Pos,
        to: Pos,
        budget: usize,
        limits: &Limits,
    ) -> (Vec<Bytes>, Pos) {
        let mut bodies = Vec::new();
        let mut at = from;
        let mut used = 0;
        let mut out = BytesMut::new();
        while at < to && used < budget {
            let Some(payload) = self.payload(at.number) else {
                break;
            };
            let offset = at.offset as usize;
            let stop = if at.number == to.number {
                to.offset as usize
            } else {
                payload.len()
            };
            let rest = payload
                .get(offset..stop.min(payload.len()))
                .unwrap_or_default();
            if rest.is_empty() && !payload.is_empty() {
                at = Pos::start(at.number + 1);
                continue;
            }
            if out.is_empty() {
                out.reserve(limits.datagram_bytes_max);
                out.extend_from_slice(if bodies.is_empty() { first } else { header });
            }
            let room = limits
                .datagram_bytes_max
                .saturating_sub(out.len() + wire::CHUNK_BYTES);
            if room == 0 && !rest.is_empty()
                || out.len() + wire::CHUNK_BYTES > limits.datagram_bytes_max
            {
                wire::pad(&mut out, limits.datagram_bytes_max);
                bodies.push(out.split().freeze());
                continue;
            }
            let bytes = &rest[..rest.len().min(room)];
            let total = u32::try_from(payload.len()).expect("event_bytes_max fits 32 bits");
            wire::put_chunk(
                &mut out,
                &Chunk {
                    pos: at,
                    total,
                    bytes,
                },
            );
            used += bytes.len() + wire::CHUNK_BYTES;
            let end = offset + bytes.len();
            at = if end == payload.len() {
                Pos::start(at.number + 1)
            } else {
                Pos {
                    number: at.number,
                    offset: u32::try_from(end).expect("within the event"),
                }
            };
        }
        if !out.is_empty() {
            bodies.push(out.freeze());
        }
        (bodies, at)
    }
}

/// An event that is at least one part in so many of its datagram is not copied out of it.
const SHARE_MIN: usize = 16;

#[derive(Serialize, Deserialize)]
struct Kept {
    total: u32,
    bytes: Bytes,
}

/// Puts chunks together in order.
///
/// Invariant: `at` is the first byte that is missing; nothing kept lies before it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Assembler {
    at: Pos,
    partial: BytesMut,
    kept: BTreeMap<Pos, Kept>,
    kept_bytes: usize,
    /// The sender says it has sent all events up to this one.
    announced: u64,
    nak_at: Option<Instant>,
}

impl Assembler {
    pub(crate) fn starting_after(cut: u64) -> Self {
        Self {
            at: Pos::start(cut + 1),
            partial: BytesMut::new(),
            kept: BTreeMap::new(),
            kept_bytes: 0,
            announced: cut,
            nak_at: None,
        }
    }

    /// Takes a chunk; events that it completes go to `log`. Returns whether it brought anything new. An event that is whole
    /// in the chunk may stay where it is, in the datagram that it lies `within`.
    pub(crate) fn take(
        &mut self,
        chunk: &Chunk<'_>,
        within: Option<&Bytes>,
        log: &mut EventLog,
        limits: &Limits,
    ) -> bool {
        if chunk.total as usize > limits.event_bytes_max || chunk.pos.number < self.at.number {
            return false;
        }
        if chunk.pos > self.at {
            let cost = chunk.bytes.len() + wire::CHUNK_BYTES;
            if self.kept_bytes + cost > limits.reorder_bytes_max {
                return false;
            }
            let longer = self
                .kept
                .get(&chunk.pos)
                .is_none_or(|k| k.bytes.len() < chunk.bytes.len());
            if longer {
                let bytes = Bytes::copy_from_slice(chunk.bytes);
                let old = self.kept.insert(
                    chunk.pos,
                    Kept {
                        total: chunk.total,
                        bytes,
                    },
                );
                self.kept_bytes += cost;
                self.kept_bytes -= old.map_or(0, |k| k.bytes.len() + wire::CHUNK_BYTES);
            }
            return longer;
        }
        if !self.append(chunk, within, log) {
            return false;
        }
        while let Some(first) = self.kept.first_entry() {
            if *first.key() > self.at {
                break;
            }
            let (pos, k) = first.remove_entry();
            self.kept_bytes -= k.bytes.len() + wire::CHUNK_BYTES;
            self.append(
                &Chunk {
                    pos,
                    total: k.total,
                    bytes: &k.bytes,
                },
                None,
                log,
            );
        }
        true
    }

    /// Appends what of a chunk at or before `at` is new.
    fn append(&mut self, chunk: &Chunk<'_>, within: Option<&Bytes>, log: &mut EventLog) -> bool {
        if chunk.pos.number != self.at.number {
            return false;
        }
        let skip = (self.at.offset - chunk.pos.offset) as usize;
        let Some(new) = chunk.bytes.get(skip..) else {
            return false;
        };
        if new.is_empty() && chunk.total != 0 {
            return false;
        }
        let total = chunk.total as usize;
        let have = self.partial.len() + new.len();
        if have > total {
            return false; // the sender contradicts itself about the event's length
        }
        if have < total {
            if self.partial.is_empty() {
                self.partial.reserve(total);
            }
            self.partial.extend_from_slice(new);
            self.at.offset = u32::try_from(have).expect("within the event");
            return true;
        }
        let payload = if self.partial.is_empty() {
            // A small event does not hold a large datagram.
            match within.filter(|body| new.len() * SHARE_MIN >= body.len()) {
                Some(body) => body.slice_ref(new),
                None => Bytes::copy_from_slice(new),
            }
        } else {
            self.partial.extend_from_slice(new);
            self.partial.split().freeze()
        };
        assert_eq!(
            log.next(),
            self.at.number,
            "the log ends where the assembler stands"
        );
        log.push(payload);
        self.at = Pos::start(self.at.number + 1);
        true
    }

    /// Bytes that came out of order and wait.
    #[cfg(test)]
    pub(crate) fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// The sender says that it has sent everything up to `number`.
    pub(crate) fn announce(&mut self, number: u64) {
        self.announced = self.announced.max(number);
    }

    fn has_gap(&self) -> bool {
        !self.kept.is_empty() || self.announced >= self.at.number
    }

    /// When the missing parts are to be asked for (again).
    pub(crate) fn nak_due(&self) -> Option<Instant> {
        if self.has_gap() {
            Some(self.nak_at.unwrap_or(Instant::from_micros(0)))
        } else {
            None
        }
    }

    /// The missing ranges, when it is time to ask for them.
    pub(crate) fn missing(&mut self, now: Instant) -> Option<Vec<(Pos, Pos)>> {
        if !self.has_gap() {
            self.nak_at = None;
            return None;
        }
        if self.nak_at.is_some_and(|t| t > now) {
            return None;
        }
        self.nak_at = Some(now + NAK_INTERVAL);
        let mut ranges: Vec<(Pos, Pos)> = Vec::new();
        let mut from = self.at;
        for (pos, k) in &self.kept {
            if *pos > from {
                ranges.push((from, *pos));
                if ranges.len() == NAK_RANGES_MAX {
                    return Some(ranges);
                }
            }
            let end = pos.offset as usize + k.bytes.len();
            let after = if end >= k.total as usize {
                Pos::start(pos.number + 1)
            } else {
                Pos {
                    number: pos.number,
                    offset: u32::try_from(end).expect("within the event"),
                }
            };
            from = from.max(after);
        }
        if from.number <= self.announced {
            ranges.push((from, Pos::start(self.announced + 1)));
        }
        if ranges.is_empty() {
            None
        } else {
            Some(ranges)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Header, Item, Reader};

    fn limits() -> Limits {
        Limits {
            datagram_bytes_max: 200,
            ..Limits::default()
        }
    }

    fn payload(n: u64) -> Bytes {
        let len = [0usize, 1, 100, 139, 140, 5000, 7][usize::try_from(n % 7).unwrap()];
        Bytes::from(vec![u8::try_from(n % 251).unwrap(); len])
    }

    fn filled(events: u64) -> EventLog {
        let mut log = EventLog::starting_after(10);
        for n in 11..11 + events {
            log.push(payload(n));
        }
        log
    }

    fn feed(a: &mut Assembler, to: &mut EventLog, bodies: &[Bytes]) {
        for b in bodies {
            for item in Reader::new(b).unwrap().1 {
                let Item::Chunk(c) = item else {
                    panic!("only chunks were packed")
                };
                a.take(&c, Some(b), to, &limits());
            }
        }
    }

    #[test]
    fn what_comes_out_of_order_is_kept_up_to_a_bound() {
        let limits = Limits {
            reorder_bytes_max: 1000,
            ..limits()
        };
        let mut log = EventLog::starting_after(0);
        let mut assembler = Assembler::starting_after(0);
        let chunk = |number| Chunk {
            pos: Pos::start(number),
            total: 100,
            bytes: &[1; 100],
        };
        let taken = |number| assembler.take(&chunk(number), None, &mut log, &limits);
        assert_eq!((2..100).map(taken).filter(|new| *new).count(), 8);
        assert!(assembler.kept_bytes() <= 1000);
        // The event that is missing is taken all the same, and what waited follows.
        assert!(assembler.take(&chunk(1), None, &mut log, &limits));
        assert_eq!((log.held(), assembler.kept_bytes()), (9, 0));
    }

    #[test]
    fn full_datagrams_and_a_rest() {
        let log = filled(20);
        let (bodies, at) = log.pack(
            &Header::default().bytes(),
            Pos::start(11),
            Pos::start(31),
            usize::MAX,
            &limits(),
        );
        assert_eq!(at, Pos::start(31));
        assert!(bodies[..bodies.len() - 1].iter().all(|b| b.len() == 200));
        let mut to = EventLog::starting_after(10);
        feed(&mut Assembler::starting_after(10), &mut to, &bodies);
        assert_eq!(to.held(), 30);
        for n in 11..=30 {
            assert_eq!(to.payload(n), Some(&payload(n)), "{n}");
        }
    }

    #[test]
    fn any_order_and_any_loss_is_mended_by_what_is_asked_for() {
        let log = filled(40);
        let mut rng = crate::rng::Rng::new(5);
        for _ in 0..200 {
            let (bodies, _) = log.pack(
                &Header::default().bytes(),
                Pos::start(11),
                Pos::start(51),
                usize::MAX,
                &limits(),
            );
            let mut mixed: Vec<Bytes> = bodies
                .into_iter()
                .filter(|_| !rng.next_u64().is_multiple_of(3))
                .collect();
            for i in (1..mixed.len()).rev() {
                mixed.swap(i, usize::try_from(rng.next_u64() % (i as u64 + 1)).unwrap());
            }
            let mut to = EventLog::starting_after(10);
            let mut a = Assembler::starting_after(10);
            feed(&mut a, &mut to, &mixed);
            a.announce(50);
            let mut now = Instant::from_micros(1);
            for _ in 0..100 {
                let Some(ranges) = a.missing(now) else { break };
                now += NAK_INTERVAL;
                for (from, until) in ranges {
                    let small = Limits {
                        datagram_bytes_max: 150,
                        ..limits()
                    };
                    let (again, _) =
                        log.pack(&Header::default().bytes(), from, until, usize::MAX, &small);
                    feed(&mut a, &mut to, &again);
                }
            }
            assert_eq!(to.held(), 50);
            assert!((11..=50).all(|n| to.payload(n) == Some(&payload(n))));
            assert_eq!((a.kept_bytes, a.kept.len()), (0, 0));
        }
    }

    #[test]
    fn the_log_counts_its_bytes() {
        let mut log = filled(20);
        let all: u64 = (11..=30)
            .map(|n| payload(n).len() as u64 + EVENT_OVERHEAD_BYTES)
            .sum();
        assert_eq!(log.bytes_after(10), all);
        log.trim_to(20);
        assert_eq!((log.first(), log.held()), (21, 30));
        let some: u64 = (26..=30)
            .map(|n| payload(n).len() as u64 + EVENT_OVERHEAD_BYTES)
            .sum();
        assert_eq!(log.bytes_after(25), some);
        log.truncate_after(25);
        assert_eq!((log.held(), log.bytes_after(25)), (25, 0));
        log.push(payload(1));
        assert_eq!(log.held(), 26);
        log.trim_to(99);
        assert_eq!((log.held(), log.bytes_after(5)), (26, 0));
    }
}
