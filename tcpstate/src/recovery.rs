//! What the library lacks as a sender: a congestion window, quick repair of a loss, and a timer
//! below one second.
//!
//! smoltcp retransmits one segment on exactly three duplicate ACKs, knows no partial ACKs and waits
//! at least a second otherwise. So duplicate ACKs stay here: this module decides when the segment at
//! SND.UNA goes out again (the caller then makes the socket do it), and how much may be in flight.

use std::time::Duration;

use crate::time::{Instant, micros_of};

/// RFC 6928: the initial window, in segments.
const INITIAL_WINDOW_SEGMENTS: u64 = 10;
/// Without progress for this long (or longer, by the round trip) the first segment goes out again.
/// Above Linux's delayed ACK of 40 ms, so that a client that merely waits is not bothered.
const NO_PROGRESS_MIN: Duration = Duration::from_millis(60);
/// The longest wait, however often it was in vain.
const NO_PROGRESS_MAX: Duration = Duration::from_secs(60);
/// RFC 5681 §3.2: the third duplicate ACK is taken for a loss.
const DUP_ACK_THRESHOLD: u8 = 3;
/// The most bytes in flight that this sender ever asks for.
const WINDOW_MAX: u64 = 1 << 30;

/// The sender's view of the path (RFC 5681, RFC 6582), in stream offsets.
#[derive(Debug)]
pub(crate) struct Recovery {
    mss: u64,
    /// Congestion window, in bytes.
    cwnd: u64,
    ssthresh: u64,
    /// Smoothed round trip in microseconds.
    srtt_us: Option<u64>,
    /// A segment whose round trip is being measured: its end, when it left.
    sample: Option<(u64, Instant)>,
    dup_acks: u8,
    /// In recovery until everything up to here is acknowledged.
    recover: Option<u64>,
    /// When the client last acknowledged something new, or this connection last began to wait.
    progress_at: Instant,
    /// How often in a row the timer has fired in vain.
    backoff: u32,
}

impl Recovery {
    pub(crate) fn new(now: Instant, mss: u16) -> Self {
        let mss = u64::from(mss);
        Self {
            mss,
            cwnd: INITIAL_WINDOW_SEGMENTS * mss,
            ssthresh: WINDOW_MAX,
            srtt_us: None,
            sample: None,
            dup_acks: 0,
            recover: None,
            progress_at: now,
            backoff: 0,
        }
    }

    /// The path takes smaller segments than it did.
    pub(crate) fn shrink_segments(&mut self, mss: u16) {
        self.mss = u64::from(mss);
    }

    /// How many bytes may be in flight.
    pub(crate) fn cwnd(&self) -> u64 {
        self.cwnd
    }

    /// How far the library may send. Bytes enter it as the window allows; while a loss is repaired
    /// that is not enough, since a timeout of its own sends everything again.
    pub(crate) fn edge(&self, una: u64) -> u64 {
        match self.recover {
            Some(_) => una + self.cwnd,
            None => u64::MAX,
        }
    }

    /// Bytes up to `end` left; `una` was the oldest outstanding before.
    pub(crate) fn on_sent(&mut self, now: Instant, una: u64, start: u64, end: u64, new: bool) {
        if start == una {
            self.progress_at = self.progress_at.max(now);
        }
        if new && self.sample.is_none() {
            self.sample = Some((end, now));
        } else if !new {
            // Karn: what was sent twice measures nothing.
            self.sample = None;
        }
    }

    /// The client acknowledged `acked` new bytes, up to `una`. `in_flight` is what was out before.
    /// True: the next segment is missing too (RFC 6582 §3.2, a partial ACK); send it again.
    pub(crate) fn on_ack(&mut self, now: Instant, una: u64, acked: u64, in_flight: u64) -> bool {
        self.progress_at = now;
        self.backoff = 0;
        self.dup_acks = 0;
        if let Some((end, sent)) = self.sample
            && una >= end
        {
            self.sample = None;
            let rtt = micros_of(now.since(sent));
            self.srtt_us = Some(self.srtt_us.map_or(rtt, |s| (s * 7 + rtt) / 8));
        }
        if let Some(recover) = self.recover {
            if una < recover {
                return true;
            }
            self.recover = None;
            self.cwnd = self.ssthresh;
            return false;
        }
        // RFC 7661: a window that was not used proves nothing, and does not grow.
        if in_flight * 2 < self.cwnd {
            return false;
        }
        let growth = if self.cwnd < self.ssthresh {
            acked
        } else {
            (self.mss * acked / self.cwnd).max(1)
        };
        self.cwnd = (self.cwnd + growth).min(WINDOW_MAX);
        false
    }

    /// A duplicate ACK (RFC 5681 §2). `sacked`: it carries a SACK block, so something behind the
    /// oldest segment did arrive. True: send the oldest segment again.
    pub(crate) fn on_dup_ack(&mut self, una: u64, nxt: u64) -> bool {
        self.dup_acks = self.dup_acks.saturating_add(1);
        if self.recover.is_some() || self.dup_acks != DUP_ACK_THRESHOLD {
            return false;
        }
        self.enter(una, nxt);
        true
    }

    fn enter(&mut self, una: u64, nxt: u64) {
        let in_flight = nxt - una;
        // RFC 9438 §4.6: a loss costs 30 %.
        self.ssthresh = (in_flight * 7 / 10).max(2 * self.mss);
        self.cwnd = self.ssthresh;
        self.recover = Some(nxt);
        self.sample = None;
    }

    /// When there was progress last.
    pub(crate) fn progress_at(&self) -> Instant {
        self.progress_at
    }

    /// When the timer fires, if something is outstanding.
    pub(crate) fn deadline(&self) -> Instant {
        let by_round_trip = Duration::from_micros(self.srtt_us.unwrap_or(0) * 2 + 10_000);
        let wait = by_round_trip.max(NO_PROGRESS_MIN) * (1 << self.backoff.min(10));
        self.progress_at + wait.min(NO_PROGRESS_MAX)
    }

    /// The timer fired: send the oldest segment again. The first time it may be a lost tail, or an
    /// ACK that is late, and costs nothing but the probe (RFC 8985 §7); then the window starts over.
    pub(crate) fn on_timeout(&mut self, now: Instant, una: u64, nxt: u64) {
        if self.backoff > 0 {
            self.enter(una, nxt);
            self.cwnd = self.mss;
        } else if self.recover.is_none() {
            // What follows it is lost too, if the answer is a partial ACK.
            self.recover = Some(nxt);
            self.ssthresh = self.cwnd;
            self.sample = None;
        }
        self.backoff = self.backoff.saturating_add(1);
        self.dup_acks = 0;
        // The deadline counts from here; the wait doubles.
        self.progress_at = now;
    }

    /// Nothing was outstanding until now.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.progress_at = now;
    }
}
