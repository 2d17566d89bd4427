//! From the client: segments into events, and what the ACK and the window on the wire may say.

use bytes::Bytes;

use super::{CHALLENGE_INTERVAL, Context, Endpoint, Mark, SILENCES_MAX};
use crate::conn_state::LinkAddr;
use crate::event::{DATA_BYTES_MAX, Event};
use crate::fault::planted;
use crate::guard::{Verdict, View, judge};
use crate::receive::trim;
use crate::segment::{Segment, flag};
use crate::seq::SeqNum;

/// The most segments whose TSval waits for the ACK to reach them.
const TS_PENDING_MAX: usize = 64;

/// What every segment of ours says about the other direction.
pub(super) struct AckFields {
    pub(super) ack: SeqNum,
    pub(super) window: u16,
    pub(super) timestamp: Option<(u32, u32)>,
}

impl Endpoint {
    /// Takes a segment. True: the client has broken the connection off.
    pub(super) fn on_segment(
        &mut self,
        cx: &mut Context<'_>,
        segment: &Segment<'_>,
        link: LinkAddr,
    ) -> bool {
        let offset = segment.seq.offset(self.state.irs, self.state.received);
        let view = View {
            received: self.state.received + u64::from(self.state.peer_fin),
            last_ack: self.last_ack,
            limit: self.limit(),
            ts_recent: self.state.negotiated.timestamps.then_some(self.ts_recent),
        };
        match judge(&view, segment, offset) {
            Verdict::Accept => {}
            verdict @ (Verdict::Answer | Verdict::Challenge) => {
                if verdict == Verdict::Answer {
                    self.ack_now |= !planted!(DuplicatesUnanswered);
                } else {
                    self.challenge(cx);
                }
                self.learn_from_old(cx, segment, offset);
                return false;
            }
            Verdict::Drop => return false,
            Verdict::Reset => return true,
        }
        self.heard(cx);
        self.next_hop = link;
        self.note_timestamp(segment, offset);
        if self.on_ack(cx, segment, offset) {
            self.on_payload(cx, segment, offset);
        } else {
            self.challenge(cx);
        }
        false
    }

    /// After a takeover the client may hold more of our output than we know of. Then all we send has
    /// too low a number for it, and it cannot learn that we have its bytes; if it answers with old
    /// numbers (a sender that goes back on a timeout), neither side would ever believe the other. An
    /// acknowledgement is cumulative, so that of an old segment is as true as any.
    fn learn_from_old(&mut self, cx: &mut Context<'_>, segment: &Segment<'_>, offset: i64) {
        let plain = segment.has(flag::ACK) && !segment.has(flag::SYN) && !segment.has(flag::RST);
        let plain = plain && !planted!(OldSegmentsUnheard);
        if plain && self.adopted(cx.now) && offset <= self.state.received.cast_signed() {
            self.on_ack(cx, segment, offset);
        }
    }

    fn heard(&mut self, cx: &Context<'_>) {
        self.silences = 0;
        self.silence_check_at = cx.now + cx.config.give_up_after / SILENCES_MAX;
    }

    /// RFC 5961 §7: challenge ACKs are throttled.
    fn challenge(&mut self, cx: &Context<'_>) {
        if cx.now >= self.challenge_after {
            self.challenge_after = cx.now + CHALLENGE_INTERVAL;
            self.ack_now = true;
        }
    }

    /// The right edge that is honoured: the largest that this leader has advertised, or an earlier
    /// one can have, the rounding of the scaled field included.
    fn limit(&self) -> u64 {
        self.edge.max(self.edge_sent).max(self.edge_inherited)
    }

    fn on_payload(&mut self, cx: &mut Context<'_>, segment: &Segment<'_>, offset: i64) {
        let received = self.state.received;
        let fin = segment.has(flag::FIN);
        if self.state.peer_fin {
            // Nothing follows its FIN. A retransmission of it wants its ACK again.
            self.ack_now |= segment.len() > 0;
            return;
        }
        let limit = self
            .reassembly
            .fin_at()
            .unwrap_or(u64::MAX)
            .min(self.limit());
        let Some(new) = trim(offset, segment.payload, fin, received, limit) else {
            // A duplicate, or nothing fits: say where we are.
            self.ack_now |= segment.len() > 0;
            return;
        };
        if new.fin {
            self.reassembly
                .note_fin(new.offset + new.bytes.len() as u64);
        }
        // Cut at the right: tell the client where the window ends.
        let end = offset + segment.payload.len().cast_signed() as i64;
        self.ack_now |= end > (new.offset + new.bytes.len() as u64).cast_signed();
        if new.offset > received {
            if !new.bytes.is_empty() && new.bytes.len() <= cx.reassembly_room {
                self.reassembly.keep(new.offset, new.bytes);
            }
            // RFC 5681 §4.2: out of order, so at once, with SACK blocks.
            self.ack_now = true;
            return;
        }
        self.ack_quick |= self.reassembly.has_gap();
        for piece in new.bytes.chunks(DATA_BYTES_MAX) {
            self.announce_data(cx, Bytes::copy_from_slice(piece));
        }
        while let Some(piece) = self.reassembly.take(self.state.received) {
            self.announce_data(cx, piece);
        }
        if planted!(AckBeforeCommit) {
            self.stable_received = self.state.received;
        }
        if self.reassembly.fin_at() == Some(self.state.received) {
            let offset = self.state.received;
            let number = self.announce(
                cx,
                Event::PeerFin {
                    conn: self.id,
                    offset,
                },
            );
            self.unstable
                .push_back((number, Mark::Received(offset + 1)));
            self.ack_quick = true;
        }
    }

    fn announce_data(&mut self, cx: &mut Context<'_>, bytes: Bytes) {
        let event = Event::Data {
            conn: self.id,
            offset: self.state.received,
            bytes,
        };
        let number = self.announce(cx, event);
        self.unstable
            .push_back((number, Mark::Received(self.state.received)));
    }

    /// RFC 7323 §4.3: TS.Recent is the TSval of the segment that the last ACK sent points at or lies
    /// behind. Our ACK lags by the time to stability, so segments wait here until it reaches them.
    fn note_timestamp(&mut self, segment: &Segment<'_>, offset: i64) {
        let Some((tsval, _)) = segment.options.timestamp else {
            return;
        };
        if !self.state.negotiated.timestamps {
            return;
        }
        match u64::try_from(offset) {
            Ok(start) if start > self.last_ack => {
                if self.ts_pending.len() < TS_PENDING_MAX {
                    self.ts_pending.push_back((start, tsval));
                }
            }
            _ => self.advance_ts_recent(tsval),
        }
    }

    fn advance_ts_recent(&mut self, tsval: u32) {
        if tsval.wrapping_sub(self.ts_recent).cast_signed() > 0 {
            self.ts_recent = tsval;
        }
    }

    /// Our own server has taken input up to `offset`.
    pub(crate) fn handle_consumed(&mut self, offset: u64) {
        self.consumed = self.consumed.max(offset.min(self.state.received));
    }

    /// edge = min(stable, consumed) + capacity, monotone.
    pub(super) fn update_edge(&mut self) {
        let taken = if planted!(EdgeWithoutServer) {
            self.stable_received
        } else {
            self.consumed.min(self.stable_received)
        };
        self.edge = self.edge.max(taken + self.state.receive_window_max());
    }

    /// What a segment that leaves now says; notes that it was said.
    pub(super) fn ack_fields(&mut self, cx: &Context<'_>) -> AckFields {
        let mut shift = self.state.receive_shift().unwrap_or(0);
        if self.adopted(cx.now) && planted!(ScaleForgotten) {
            shift += 1;
        }
        let ack = self.stable_received;
        // Rounded up, so that the scaled field never falls below the edge.
        let from = if planted!(ClampWithoutWindow) {
            self.state.received
        } else {
            ack
        };
        let field = self.edge.saturating_sub(from).div_ceil(1 << shift);
        let window = u16::try_from(field).unwrap_or(u16::MAX);
        let timestamp = self
            .state
            .negotiated
            .timestamps
            .then(|| (cx.clock.tsval(cx.now), self.ts_recent));
        self.edge_sent = self.edge_sent.max(ack + (u64::from(window) << shift));
        self.last_ack = ack;
        while let Some((start, tsval)) = self.ts_pending.front().copied() {
            if start > ack {
                break;
            }
            self.ts_pending.pop_front();
            self.advance_ts_recent(tsval);
        }
        self.ack_due = None;
        self.ack_quick = false;
        if !self.reassembly.has_gap() {
            self.ack_now = false;
        }
        AckFields {
            ack: self.state.irs.at_offset(ack),
            window,
            timestamp,
        }
    }

    /// Sends an ACK if one is owed, or lets it wait for company.
    pub(super) fn acknowledge_if_due(&mut self, cx: &mut Context<'_>) {
        let news = self.stable_received.saturating_sub(self.last_ack);
        // RFC 5681 §4.2: at least every second full-sized segment.
        let enough = news >= 2 * u64::from(cx.config.local_mss());
        if self.ack_now || (news > 0 && (enough || self.ack_quick)) || self.window_opened(cx) {
            self.send_ack(cx);
        } else if news > 0 {
            self.ack_due.get_or_insert(cx.now + cx.config.ack_delay);
        }
    }

    pub(super) fn send_ack(&mut self, cx: &mut Context<'_>) {
        self.send_header(cx, self.state.iss.at_offset(self.snd_nxt), 0);
        self.ack_now = false;
    }

    /// RFC 9293 §3.8.6.2.2: tell the client when the window has opened by a useful amount, and what
    /// it knows of has become small; while it has plenty, the next ACK will do.
    fn window_opened(&self, cx: &Context<'_>) -> bool {
        if self.state.peer_fin {
            return false;
        }
        let capacity = self.state.receive_window_max();
        let opened = self.edge.saturating_sub(self.edge_sent);
        let known = self.edge_sent.saturating_sub(self.last_ack);
        opened >= (2 * u64::from(cx.config.local_mss())).min(capacity / 2)
            && known < capacity / 2
            && self.edge_sent > 0
    }
}
