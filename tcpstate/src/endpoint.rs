//! One connection on the leader: the only mutator of its record.
//!
//! ```text
//!  packet ─ guard ─┬─ payload ─ reassembly ─ Data, PeerFin ──> event log ──> our server
//!                  └─ ACK, window ─┐                              │ stable
//!  server's bytes ─ gate (R1) ─ Sender (the library) ─ segments ──┴─ ACK, window, TSval ──> client
//! ```
//!
//! `receiving.rs` holds the left-to-right half, `sending.rs` the other; here is what both share: the
//! connection's life, and what one turn ([`Endpoint::pump`]) does.

mod receiving;
mod sending;

use std::collections::VecDeque;
use std::time::Duration;

use crate::adopt::{Library, LibraryFault, Sender};
use crate::config::Config;
use crate::conn_state::{ConnState, LinkAddr};
use crate::event::{ConnId, Event, EventNo, ResetBy};
use crate::fault::planted;
use crate::gate::Gate;
use crate::output::{Notice, Output, Packet};
use crate::receive::Reassembly;
use crate::recovery::Recovery;
use crate::segment::{Reply, Segment, TIMESTAMP_LEN, flag};
use crate::seq::SeqNum;
use crate::time::{Instant, ServiceClock};

/// `Acked` events are at most this late while the acknowledgement moves.
const ACKED_LATE_MAX: Duration = Duration::from_millis(5);
/// Between two challenge ACKs of one connection (RFC 5961 §7).
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(100);

/// A client is given up when it was silent at this many looks in a row. A clock that jumped, or a
/// process that slept, makes for one look and not for eight.
const SILENCES_MAX: u32 = 8;
/// After a takeover, a client tells within this time what an earlier leader has sent it.
const ADOPTED_ACK_TIME: Duration = Duration::from_secs(300);

/// What a connection works with during one call.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) config: &'a Config,
    pub(crate) clock: ServiceClock,
    /// Every event up to here is stable.
    pub(crate) stable: EventNo,
    /// Bytes that may yet be kept beyond gaps, by all connections together.
    pub(crate) reassembly_room: usize,
    pub(crate) library: &'a mut Library,
    pub(crate) log: &'a mut Log,
}

/// Where events are born, and what the driver is asked.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) next: EventNo,
    pub(crate) outputs: VecDeque<Output>,
    /// Events of live connections that are not known to be stable, in order.
    pub(crate) unstable: VecDeque<(EventNo, ConnId)>,
}

impl Log {
    /// Numbers an event and hands it to the driver.
    pub(crate) fn append(&mut self, event: Event) -> EventNo {
        let number = self.next;
        self.next = number.next();
        let conn = match &event {
            Event::Open { .. } => Some(ConnId(number.0)),
            other => other.conn(),
        };
        if let Some(conn) = conn {
            self.unstable.push_back((number, conn));
        }
        self.outputs.push_back(Output::Replicate { number, event });
        number
    }
}

/// What happens when an event becomes stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// The ACK may cover everything before this offset.
    Received(u64),
    /// Our FIN may leave.
    LocalFin,
    /// Our RST may leave.
    Reset,
}

/// What the stack shall do with the connection after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Keep it.
    Live,
    /// It ended in order; `Closed` was announced.
    Closed,
    /// The client broke it off; `Reset` was announced.
    ResetByPeer,
    /// We broke it off; `Reset` is stable and the RST has left.
    ResetByUs,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Endpoint {
    id: ConnId,
    /// The replicated record, as after the last event that was announced.
    state: ConnState,
    /// Announced events of this connection that wait for stability.
    unstable: VecDeque<(EventNo, Mark)>,
    next_hop: LinkAddr,

    // --- receiving ---
    reassembly: Reassembly,
    /// What the ACK may say: everything before it is stable. The FIN counts.
    stable_received: u64,
    /// What our own server has taken.
    consumed: u64,
    /// Invariant: monotone; min(stable, consumed) + capacity, or what was honoured at adoption.
    edge: u64,
    /// Last.ACK.sent, and the largest right edge sent.
    last_ack: u64,
    edge_sent: u64,
    /// The most that an earlier leader can have advertised.
    edge_inherited: u64,
    ts_recent: u32,
    /// Segments in order whose TSval counts once the ACK has reached them.
    ts_pending: VecDeque<(u64, u32)>,
    /// An ACK is owed at once, whatever it says.
    ack_now: bool,
    /// The next ACK that says something new is owed as soon as it may (a gap was filled).
    ack_quick: bool,
    ack_due: Option<Instant>,
    challenge_after: Instant,
    /// When to look next whether the client is heard of at all, and how often in a row it was not.
    silence_check_at: Instant,
    silences: u32,

    // --- sending ---
    /// The most payload in one segment.
    payload_max: u16,
    sender: Option<Sender>,
    recovery: Recovery,
    gate: Gate,
    /// Offset behind the server's last byte so far.
    produced: u64,
    /// SND.UNA: the most that the client has acknowledged, the FIN counted. May lie beyond what our
    /// server has produced, right after a takeover.
    peer_acked: u64,
    /// SND.NXT. Invariant: `peer_acked <= snd_nxt`.
    snd_nxt: u64,
    /// Right edge of the client's window; SND.WL1 and SND.WL2 (RFC 9293 §3.10.7.4).
    peer_edge: u64,
    snd_wl1: i64,
    snd_wl2: u64,
    /// Taken over, and until then an acknowledgement of more than we know of is believed: an earlier
    /// leader may have sent more than the record says.
    adopted_until: Option<Instant>,
    /// The FIN may leave.
    fin_allowed: bool,
    /// `Reset` was announced by us: nothing is taken or sent any more until it is stable.
    resetting: bool,
    /// The RST is due.
    reset_allowed: bool,
    acked_due: Option<Instant>,
    /// Whether the driver was last told that there is room.
    room_open: bool,
}

impl Endpoint {
    /// Takes up a connection from its record. `retained` is the output from the record's `acked` on
    /// that is at hand, all of it released; `produced` the offset behind the server's last byte.
    pub(crate) fn adopt(
        now: Instant,
        config: &Config,
        id: ConnId,
        state: ConnState,
        retained: &[u8],
        produced: u64,
        adopted: bool,
    ) -> Self {
        let fin = state.peer_fin && !(adopted && planted!(RcvNxtWrong));
        let received = state.received + u64::from(fin);
        let mut gate = Gate::default();
        gate.append(retained, EventNo(0));
        let timestamp_len = u16::try_from(TIMESTAMP_LEN).expect("a small constant");
        let options = if state.negotiated.timestamps {
            timestamp_len
        } else {
            0
        };
        let payload_max = state.negotiated.mss.min(config.local_mss()) - options;
        let advertised = !(adopted && planted!(EdgeForgotten));
        let edge = state.received + u64::from(advertised) * state.receive_window_max();
        let rounding = state.receive_shift().map_or(0, |shift| (1u64 << shift) - 1);
        Self {
            id,
            unstable: VecDeque::new(),
            next_hop: state.next_hop,
            reassembly: Reassembly::default(),
            stable_received: received,
            consumed: 0,
            edge,
            last_ack: received,
            edge_sent: 0,
            edge_inherited: if adopted { edge + rounding } else { 0 },
            ts_recent: state.ts_recent,
            ts_pending: VecDeque::new(),
            ack_now: false,
            ack_quick: false,
            ack_due: None,
            challenge_after: now,
            silence_check_at: now + config.give_up_after / SILENCES_MAX,
            silences: 0,
            payload_max,
            sender: None,
            recovery: Recovery::new(now, payload_max),
            gate,
            produced: produced + u64::from(adopted && planted!(SndNxtWrong)),
            peer_acked: state.acked,
            snd_nxt: state.acked,
            peer_edge: state.acked + u64::from(state.window),
            snd_wl1: i64::MIN,
            snd_wl2: 0,
            adopted_until: adopted.then(|| now + ADOPTED_ACK_TIME),
            fin_allowed: state.local_fin.is_some(),
            resetting: false,
            reset_allowed: false,
            acked_due: None,
            room_open: true,
            state,
        }
    }

    pub(crate) fn state(&self) -> &ConnState {
        &self.state
    }

    /// Gives the library's socket up, and its buffer back.
    pub(crate) fn release_sender(&mut self, library: &mut Library) {
        if let Some(sender) = self.sender.take() {
            library.reclaim(sender);
        }
    }

    /// Bytes kept beyond gaps.
    pub(crate) fn held(&self) -> usize {
        self.reassembly.held()
    }

    /// Whether we have announced that it is broken off.
    pub(crate) fn resetting(&self) -> bool {
        self.resetting
    }

    /// Announces an event of this connection.
    fn announce(&mut self, cx: &mut Context<'_>, event: Event) -> EventNo {
        self.state.apply(&event);
        cx.log.append(event)
    }

    /// A segment of this connection.
    pub(crate) fn handle_segment(
        &mut self,
        cx: &mut Context<'_>,
        segment: &Segment<'_>,
        link: LinkAddr,
    ) -> Fate {
        if self.resetting {
            return Fate::Live;
        }
        if self.on_segment(cx, segment, link) {
            self.announce(
                cx,
                Event::Reset {
                    conn: self.id,
                    by: ResetBy::Peer,
                },
            );
            return Fate::ResetByPeer;
        }
        self.pump(cx)
    }

    /// Everything up to `cx.stable` is stable now.
    pub(crate) fn handle_stable(&mut self, cx: &mut Context<'_>) -> Fate {
        while let Some((number, mark)) = self.unstable.front().copied() {
            if number > cx.stable {
                break;
            }
            self.unstable.pop_front();
            match mark {
                Mark::Received(end) => self.stable_received = end,
                Mark::LocalFin => self.fin_allowed = true,
                Mark::Reset => self.reset_allowed = true,
            }
        }
        self.pump(cx)
    }

    /// Its deadline has come, or may have.
    pub(crate) fn handle_timeout(&mut self, cx: &mut Context<'_>) -> Fate {
        if self.resetting {
            return self.pump(cx);
        }
        if self.ack_due.is_some_and(|at| at <= cx.now) {
            self.ack_now = true;
        }
        if self.acked_due.is_some_and(|at| at <= cx.now) {
            self.announce_acked(cx);
        }
        if self.outstanding() && self.silence_check_at <= cx.now {
            self.silences += 1;
            if self.silences >= SILENCES_MAX {
                return self.reset(cx, ResetBy::Stack);
            }
            self.silence_check_at = cx.now + cx.config.give_up_after / SILENCES_MAX;
        }
        self.on_recovery_timeout(cx);
        self.drop_idle_sender(cx);
        self.pump(cx)
    }

    /// Breaks the connection off: the RST leaves when the event is stable.
    pub(crate) fn reset(&mut self, cx: &mut Context<'_>, by: ResetBy) -> Fate {
        if self.resetting {
            return Fate::Live;
        }
        self.resetting = true;
        self.release_sender(cx.library);
        self.reassembly = Reassembly::default();
        let number = self.announce(cx, Event::Reset { conn: self.id, by });
        self.unstable.push_back((number, Mark::Reset));
        cx.log
            .outputs
            .push_back(Output::Notice(Notice::Reset { conn: self.id, by }));
        if planted!(ResetBeforeCommit) {
            self.send_reset(cx);
            return Fate::ResetByUs;
        }
        Fate::Live
    }

    /// Does what has become possible: release output, send, acknowledge, end.
    pub(crate) fn pump(&mut self, cx: &mut Context<'_>) -> Fate {
        if self.resetting {
            if !self.reset_allowed {
                return Fate::Live;
            }
            self.send_reset(cx);
            return Fate::ResetByUs;
        }
        self.update_edge();
        if let Err(LibraryFault) = self.send_what_may_leave(cx) {
            cx.log
                .outputs
                .push_back(Output::Notice(Notice::LibraryFault { conn: self.id }));
            return self.reset(cx, ResetBy::Stack);
        }
        self.acknowledge_if_due(cx);
        self.tell_room(cx);
        let fin_acked = self
            .state
            .fin_end()
            .is_some_and(|end| self.peer_acked >= end);
        if fin_acked && self.state.peer_fin && self.stable_received > self.state.received {
            // The client's FIN is acknowledged before we forget why.
            if self.last_ack < self.stable_received {
                self.send_ack(cx);
            }
            self.announce(cx, Event::Closed { conn: self.id });
            return Fate::Closed;
        }
        Fate::Live
    }

    /// What must hold after every input.
    ///
    /// # Panics
    /// If it does not: stopping beats corrupting a stream.
    pub(crate) fn check_invariants(&self) {
        let received = self.state.received + u64::from(self.state.peer_fin);
        assert!(self.peer_acked <= self.snd_nxt, "SND.UNA <= SND.NXT");
        assert!(
            self.state.acked <= self.peer_acked,
            "the record lags what is acknowledged"
        );
        assert!(
            self.last_ack <= self.stable_received,
            "nothing unstable was acknowledged"
        );
        assert!(
            self.stable_received <= received,
            "nothing is stable that was not received"
        );
        if let Some(sender) = &self.sender {
            let start = self.produced - self.gate.len() as u64;
            assert_eq!(
                sender.pushed(),
                start,
                "the gate follows the library without a gap"
            );
        }
    }

    /// Its next deadline.
    pub(crate) fn poll_timeout(&mut self, library: &mut Library, now: Instant) -> Option<Instant> {
        if self.resetting {
            return None;
        }
        let due = [self.ack_due, self.acked_due, self.sender_expiry()];
        let mut next = due.into_iter().flatten().min();
        let mut sooner = |at: Instant| next = Some(next.map_or(at, |n| n.min(at)));
        if self.outstanding() {
            sooner(self.silence_check_at);
            if self.peer_edge > self.peer_acked {
                sooner(self.recovery.deadline());
            }
        }
        if let Some(at) = self.sender.as_mut().and_then(|s| s.poll_at(library, now)) {
            // It has just been polled: "now" would spin.
            sooner(at.max(now + Duration::from_millis(1)));
        }
        next
    }

    /// The event that its output waits for, if it does.
    pub(crate) fn waits_for(&self, stable: EventNo) -> Option<EventNo> {
        self.gate.waits_for().filter(|tag| *tag > stable)
    }

    /// Right after a takeover: say something, so that the client need not wait for its timers. (With a closed
    /// window the library probes as soon as there is output.)
    pub(crate) fn greet(&mut self, cx: &mut Context<'_>) -> Fate {
        self.ack_now = true;
        self.pump(cx)
    }

    /// Emits an RST at SND.NXT. Where the client expects another number, it challenges, and is
    /// answered exactly (RFC 5961 §3.2).
    fn send_reset(&mut self, cx: &mut Context<'_>) {
        self.send_header(cx, self.state.iss.at_offset(self.snd_nxt), flag::RST);
    }

    /// Emits a segment without payload.
    fn send_header(&mut self, cx: &mut Context<'_>, seq: SeqNum, flags: u8) {
        let ack = self.ack_fields(cx);
        let blocks: Vec<_> = if self.state.negotiated.sack && self.reassembly.has_gap() {
            let at = |offset| self.state.irs.at_offset(offset);
            self.reassembly
                .blocks()
                .iter()
                .map(|(l, r)| (at(*l), at(*r)))
                .collect()
        } else {
            Vec::new()
        };
        let packet = Reply {
            ack: Some(ack.ack),
            flags,
            window: ack.window,
            timestamp: ack.timestamp,
            sack: &blocks,
            ..Reply::new(&self.state.tuple, seq)
        }
        .emit(
            cx.library.buffer(),
            self.next_hop,
            cx.config.partial_checksum(),
        );
        self.transmit(cx, packet);
    }

    fn transmit(&self, cx: &mut Context<'_>, packet: Packet) {
        cx.log.outputs.push_back(Output::Transmit(packet));
    }
}
