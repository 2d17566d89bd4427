//! fbcast between many: one member's messages in order, to all others of a view or to one of them.
//!
//! BSS91 §5, §5.3 (stability): FBCAST is the FIFO layer below. The sender numbers messages, packs many into a datagram and does not wait;
//! receivers acknowledge cumulatively and ask for what is missing; messages are kept until all hold them.

use super::wire::{self, Header, Small};
use crate::config::Limits;
use crate::core::AckDebt;
use crate::fbcast::{Assembler, EventLog};
use crate::time::Instant;
use crate::wire::{Chunk, Pos};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// When nothing acknowledges what was sent, its end is announced again after this long; doubled up to 32 times.
pub(crate) const PROBE_AFTER: Duration = Duration::from_millis(3);
/// Payload bytes of one burst of datagrams.
const BURST_BYTES: usize = 60 * 1024;
/// An amortised acknowledgement waits for this many bytes at most.
const ACK_BYTES: usize = 64 * 1024;
/// Or for this long.
const ACK_DELAY: Duration = Duration::from_millis(1);
/// Bytes sent again because of one datagram, however many requests are in it.
pub(crate) const RESEND_BYTES: usize = 128 * 1024;

/// Announced so often without an acknowledgement, what was sent is not on its way any more: some 45 ms.
const QUIET_PROBES: u32 = 4;

/// How much may be sent now, of what the process may have on its way to all its groups.
#[derive(Copy, Clone, Default)]
pub(crate) struct Allowance {
    pub(crate) bytes: u64,
    /// Something was not sent for this.
    pub(crate) missed: bool,
}

/// What this member sends.
///
/// Invariant: the log holds every message that somebody may not hold.
#[derive(Serialize, Deserialize)]
pub(crate) struct Outgoing {
    pub(crate) log: EventLog,
    next_send: Pos,
    urgent_to: u64,
    probe_at: Option<Instant>,
    probes: u32,
    /// What each receiver holds: this fills the window.
    held: Vec<u64>,
    /// What each receiver held before it reported for the end of the view: this is stable, since it is within every cut.
    /// Invariant: at most `held`.
    vouched: Vec<u64>,
    /// Receivers that depart.
    gone: Vec<bool>,
    /// The window has been full since, without an acknowledgement by the slowest.
    pub(crate) stalled_since: Option<Instant>,
}

impl Outgoing {
    pub(crate) fn new(receivers: usize) -> Self {
        Self {
            log: EventLog::starting_after(0),
            next_send: Pos::start(1),
            urgent_to: 0,
            probe_at: None,
            probes: 0,
            held: vec![0; receivers],
            vouched: vec![0; receivers],
            gone: vec![false; receivers],
            stalled_since: None,
        }
    }

    pub(crate) fn push(&mut self, message: Bytes, urgent: bool) -> u64 {
        self.log.push(message);
        let number = self.log.held();
        if urgent {
            self.urgent_to = number;
        }
        number
    }

    /// The highest that was sent in whole.
    pub(crate) fn sent(&self) -> u64 {
        self.next_send.number - 1
    }

    /// The highest that all receivers hold.
    pub(crate) fn all_hold(&self) -> u64 {
        let there = self.held.iter().zip(&self.gone).filter(|(_, gone)| !**gone);
        let least = there.map(|(held, _)| *held).min();
        least.unwrap_or_else(|| self.log.held())
    }

    /// This receiver departs: it is not waited for. Whether that is news.
    pub(crate) fn give_up(&mut self, receiver: usize) -> bool {
        let gone = self.gone.get_mut(receiver);
        gone.is_some_and(|gone| !std::mem::replace(gone, true))
    }

    /// The highest that `k` receivers vouch for, at most all.
    pub(crate) fn held_by(&self, k: usize) -> u64 {
        let k = k.min(self.vouched.len());
        if k == 0 {
            return self.log.held();
        }
        match k {
            // What is asked for most, without a copy.
            1 => self.vouched.iter().copied().max().unwrap_or(0),
            _ if k == self.vouched.len() => self.vouched.iter().copied().min().unwrap_or(0),
            _ => {
                let mut vouched = self.vouched.clone();
                let (_, kth, _) = vouched.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
                *kth
            }
        }
    }

    /// The receiver that holds least.
    pub(crate) fn slowest(&self) -> Option<usize> {
        (0..self.held.len()).min_by_key(|i| self.held[*i])
    }

    /// A receiver acknowledges; `vouches`: before it reported for the end of the view. Whether that is news.
    pub(crate) fn acknowledged(&mut self, receiver: usize, held: u64, vouches: bool) -> bool {
        // More than was sent is a peer's error; it must not make us forget what others miss.
        let held = held.min(self.sent());
        if let Some(vouched) = self.vouched.get_mut(receiver).filter(|_| vouches) {
            *vouched = (*vouched).max(held);
        }
        let least = self.all_hold();
        let Some(known) = self.held.get_mut(receiver).filter(|known| **known < held) else {
            return false;
        };
        *known = held;
        if self.all_hold() > least {
            self.stalled_since = None;
            self.probes = 0;
        }
        if self.all_hold() == self.log.held() {
            self.probe_at = None;
        }
        true
    }

    /// Bytes of the messages that were sent in whole and are on their way.
    pub(crate) fn flight_bytes(&self) -> u64 {
        if self.probes >= QUIET_PROBES {
            return 0;
        }
        self.log.bytes_between(self.all_hold(), self.sent())
    }

    /// Bytes that not all hold, sent or not.
    pub(crate) fn backlog_bytes(&self) -> u64 {
        self.log.bytes_after(self.all_hold())
    }

    pub(crate) fn unsent(&self) -> bool {
        self.next_send < Pos::start(self.log.next())
    }

    /// As an image must have it: for so many receivers, with a log that ends where it can.
    pub(crate) fn consistent(&self, receivers: usize, taken: Option<u64>) -> bool {
        [self.held.len(), self.vouched.len(), self.gone.len()] == [receivers; 3]
            && spans(
                &self.log,
                taken.unwrap_or(self.log.first().saturating_sub(1)),
            )
            && (1..=self.log.next()).contains(&self.next_send.number)
    }

    /// Forgets what all hold, up to `done`.
    pub(crate) fn collect(&mut self, done: u64) {
        self.log.trim_to(self.all_hold().min(done));
    }

    /// The next burst of datagrams, its first body with `first` in front. Empty when there is nothing to send or the window
    /// is full.
    pub(crate) fn burst(
        &mut self,
        now: Instant,
        header: &mut Header,
        first: &[Small],
        limits: &Limits,
        allowance: &mut Allowance,
    ) -> Vec<Bytes> {
        if !self.unsent() {
            return Vec::new();
        }
        if self.held.is_empty() {
            self.next_send = Pos::start(self.log.next());
            return Vec::new();
        }
        if self.log.bytes_between(self.all_hold(), self.sent()) >= limits.flight_bytes_max {
            self.stalled_since.get_or_insert(now);
            return Vec::new();
        }
        // A message that was begun is sent to its end: nobody acknowledges a part of one.
        let begun = self.next_send.offset > 0;
        if allowance.bytes == 0 && !begun {
            allowance.missed = true;
            return Vec::new();
        }
        if self.urgent_to >= self.next_send.number {
            header.flags |= wire::URGENT;
        }
        self.probe_at = Some(now + PROBE_AFTER);
        let head = header.bytes();
        let mut front = head.clone();
        for small in first {
            crate::wire::put_message(&mut front, small);
        }
        let from = self.next_send;
        let (until, most) = match usize::try_from(allowance.bytes) {
            Ok(0) => (from.number + 1, BURST_BYTES),
            most => (
                self.log.next(),
                most.map_or(BURST_BYTES, |b| b.min(BURST_BYTES)),
            ),
        };
        let until = Pos::start(until);
        let (bodies, at) = self
            .log
            .pack_after(&front, &head, from, until, most, limits);
        self.next_send = at;
        let sent: usize = bodies.iter().map(Bytes::len).sum();
        allowance.bytes = allowance.bytes.saturating_sub(sent as u64);
        bodies
    }

    /// Datagrams with one of the ranges that a receiver misses.
    pub(crate) fn again(
        &self,
        header: &Header,
        (from, to): (Pos, Pos),
        budget: usize,
        limits: &Limits,
    ) -> Vec<Bytes> {
        let to = to.min(self.next_send);
        if from.number < self.log.first() {
            return Vec::new(); // an old request that was long on its way
        }
        let head = header.bytes();
        self.log.pack(&head, from, to, budget, limits).0
    }

    pub(crate) fn probe_due(&self) -> Option<Instant> {
        self.probe_at
    }

    /// Whether the end is to be announced again.
    pub(crate) fn probe(&mut self, now: Instant) -> bool {
        if self.probe_at.is_none_or(|t| t > now) {
            return false;
        }
        let behind = self.all_hold() < self.sent();
        self.probes = (self.probes + 1).min(5);
        self.probe_at = behind.then(|| now + PROBE_AFTER * (1 << self.probes));
        behind
    }
}

/// What one other member sends.
#[derive(Serialize, Deserialize)]
pub(crate) struct Incoming {
    pub(crate) log: EventLog,
    pub(crate) assembler: Assembler,
    /// The highest message that was given to the ordering.
    pub(crate) taken: u64,
    /// The highest that the sender calls stable.
    pub(crate) stable: u64,
    trim: u64,
    debt: AckDebt,
}

impl Incoming {
    pub(crate) fn new() -> Self {
        Self {
            log: EventLog::starting_after(0),
            assembler: Assembler::starting_after(0),
            taken: 0,
            stable: 0,
            trim: 0,
            debt: AckDebt::default(),
        }
    }

    /// Takes a chunk, which lies `within` a datagram.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        chunk: &Chunk<'_>,
        within: Option<&Bytes>,
        limits: &Limits,
    ) {
        let new = self.assembler.take(chunk, within, &mut self.log, limits);
        self.debt.bytes += chunk.bytes.len() + crate::wire::CHUNK_BYTES;
        if new {
            self.debt.by.get_or_insert(now + ACK_DELAY);
        } else {
            self.debt.at_once = true; // a repetition: the sender missed an acknowledgement
        }
    }

    /// What the sender says of its lane.
    pub(crate) fn heed(&mut self, header: &Header) {
        self.assembler.announce(header.sent);
        self.stable = self.stable.max(header.stable);
        self.trim = self.trim.max(header.trim);
        if header.flags & wire::URGENT != 0 {
            self.debt.at_once = true;
        }
        self.collect();
    }

    /// Forgets what all hold and was taken.
    pub(crate) fn collect(&mut self) {
        self.log.trim_to(self.trim.min(self.taken));
    }

    /// As an image must have it.
    pub(crate) fn consistent(&self) -> bool {
        spans(&self.log, self.taken)
    }

    /// Asks for everything up to `number`.
    pub(crate) fn want(&mut self, number: u64) {
        self.assembler.announce(number);
    }

    /// Whether an acknowledgement is owed at all.
    pub(crate) fn owes(&self) -> bool {
        self.debt.at_once || self.debt.by.is_some()
    }

    pub(crate) fn ack_due(&self, now: Instant) -> bool {
        self.debt.at_once
            || self.debt.bytes >= ACK_BYTES
            || self.debt.by.is_some_and(|by| by <= now)
    }

    pub(crate) fn settle(&mut self) -> u64 {
        self.debt = AckDebt::default();
        self.log.held()
    }

    /// `takes`: whether what is missing is asked for.
    pub(crate) fn due(&self, takes: bool) -> Option<Instant> {
        [self.debt.by, self.assembler.nak_due().filter(|_| takes)]
            .into_iter()
            .flatten()
            .min()
    }
}

/// Whether what was taken lies where a log begins, or in it.
fn spans(log: &EventLog, taken: u64) -> bool {
    let first = log.first();
    (1..=crate::wire::NUMBER_MAX).contains(&first) && (first - 1..=log.held()).contains(&taken)
}

/// One body with these small messages.
pub(crate) fn body(header: &Header, messages: &[Small]) -> Bytes {
    let mut out: BytesMut = header.bytes();
    for m in messages {
        crate::wire::put_message(&mut out, m);
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_so_many_hold_and_who_is_waited_for() {
        let mut out = Outgoing::new(3);
        for _ in 0..9 {
            out.push(Bytes::from_static(b"m"), false);
        }
        let header = &mut Header::default();
        let mut all = Allowance {
            bytes: u64::MAX,
            missed: false,
        };
        let (now, limits) = (Instant::from_micros(1), Limits::default());
        let bodies = out.burst(now, header, &[], &limits, &mut all);
        assert_eq!((bodies.len(), out.sent()), (1, 9));
        assert!(
            out.acknowledged(0, 4, true)
                && out.acknowledged(1, 7, true)
                && !out.acknowledged(1, 6, true)
        );
        let held: Vec<u64> = (0..=4).map(|k| out.held_by(k)).collect();
        assert_eq!(held, [9, 7, 4, 0, 0]);
        assert_eq!((out.all_hold(), out.slowest()), (0, Some(2)));
        assert!(
            out.acknowledged(0, 8, false) && out.held_by(1) == 7,
            "vouches for nothing"
        );
        assert!(
            out.acknowledged(0, 99, true),
            "more than was sent counts as all"
        );
        assert_eq!(out.held_by(1), 9);
        assert!(out.give_up(2) && !out.give_up(2));
        assert_eq!(out.all_hold(), 7);
    }
}
