//! To the client: the server's bytes through the gate into the library, and its segments onto the
//! wire with a header of ours.

use std::time::Duration;

use super::{ACKED_LATE_MAX, Context, Endpoint, Fate, Mark};
use crate::adopt::{Emitted, LibraryFault, Sender, Terms};
use crate::config::Config;
use crate::event::{Event, EventNo, ResetBy};
use crate::fault::planted;
use crate::output::{HEADROOM, Output, Packet};
use crate::segment::{Segment, TIMESTAMP_LEN, flag, seal, timestamp_option};
use crate::seq::SeqNum;
use crate::time::{Instant, micros_of};

/// How far beyond what this leader knows an acknowledgement is believed after a takeover: the
/// earlier leader may have sent that much more than the record says.
const ADOPTED_ACK_SLACK: u64 = 1 << 30;
/// An idle connection gives its transmit buffer back after this long, or twice that.
const SENDER_IDLE: Duration = Duration::from_secs(4);
/// A TCP header without options.
const TCP_HEADER: usize = 20;
/// RFC 5961 §5.2: an acknowledgement older than this is a forgery.
const OLD_ACK_MAX: u64 = 1 << 30;

impl Endpoint {
    /// Something of ours is not acknowledged yet.
    pub(super) fn outstanding(&self) -> bool {
        self.peer_acked < self.snd_nxt
    }

    /// Whether an earlier leader may have sent more than we know of.
    pub(super) fn adopted(&self, now: Instant) -> bool {
        self.adopted_until.is_some_and(|until| now < until)
    }

    /// The segment's ACK and window. False: it acknowledges what was never sent; drop it.
    pub(super) fn on_ack(
        &mut self,
        cx: &mut Context<'_>,
        segment: &Segment<'_>,
        offset: i64,
    ) -> bool {
        let slack = if self.adopted(cx.now) && !planted!(RecordTakenForTruth) {
            ADOPTED_ACK_SLACK
        } else {
            0
        };
        let limit = (self.snd_nxt + slack).min(self.state.fin_end().unwrap_or(u64::MAX));
        let ack = segment.ack.offset(self.state.iss, self.peer_acked);
        if ack > limit.cast_signed()
            || ack + OLD_ACK_MAX.cast_signed() < self.peer_acked.cast_signed()
        {
            return false;
        }
        // An old acknowledgement takes nothing back; its payload counts. (-1 acknowledges nothing,
        // not even our SYN; only a fabricated segment does.)
        let Ok(ack) = u64::try_from(ack) else {
            return false;
        };
        let before = (self.peer_acked, self.peer_edge);
        // RFC 9293 §3.10.7.4: the window of a newer segment only.
        if offset > self.snd_wl1 || (offset == self.snd_wl1 && ack >= self.snd_wl2) {
            let shift = self.state.negotiated.peer_shift.unwrap_or(0);
            self.snd_wl1 = offset;
            self.snd_wl2 = ack;
            self.peer_edge = ack + (u64::from(segment.window) << shift);
        }
        if ack > self.snd_nxt {
            // An earlier leader sent it. What we last said had too low a number to be believed.
            self.snd_nxt = ack;
            self.ack_now = true;
        }
        let mut resend = false;
        if ack > self.peer_acked {
            let in_flight = self.snd_nxt - self.peer_acked;
            let acked = ack - self.peer_acked;
            self.peer_acked = ack;
            resend = self.recovery.on_ack(cx.now, ack, acked, in_flight);
        } else if ack == self.peer_acked
            && segment.payload.is_empty()
            && !segment.has(flag::FIN)
            && self.outstanding()
            && (self.peer_edge == before.1 || segment.options.sack.is_some())
        {
            resend = self.recovery.on_dup_ack(self.peer_acked, self.snd_nxt);
        }
        self.note_acked(cx, before.1);
        if resend {
            self.resend_first(cx);
        }
        true
    }

    /// Sees to it that backups learn of progress: soon, or at once when it is a lot.
    fn note_acked(&mut self, cx: &mut Context<'_>, edge_before: u64) {
        let quarter = cx.config.retained_output_max as u64 / 4;
        let moved = self.peer_acked - self.state.acked.min(self.peer_acked);
        let window_changed = (self.peer_edge > self.peer_acked) != (self.state.window > 0);
        if moved >= quarter.max(1) {
            self.announce_acked(cx);
        } else if moved > 0 || (window_changed && edge_before != self.peer_edge) {
            self.acked_due.get_or_insert(cx.now + ACKED_LATE_MAX);
        }
    }

    pub(super) fn announce_acked(&mut self, cx: &mut Context<'_>) {
        self.acked_due = None;
        let window = self.peer_edge.saturating_sub(self.peer_acked);
        let event = Event::Acked {
            conn: self.id,
            offset: self.peer_acked,
            window: u32::try_from(window).unwrap_or(u32::MAX),
            ts_recent: self.ts_recent,
            next_hop: self.next_hop,
        };
        self.announce(cx, event);
    }

    /// Bytes of the server; they leave when `tag` is stable (R1).
    pub(crate) fn handle_server_bytes(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        tag: EventNo,
    ) -> Fate {
        if self.resetting {
            return Fate::Live;
        }
        // What lies behind our FIN is not output: this server went on where the agreed one ended.
        let room = self
            .state
            .local_fin
            .map_or(u64::MAX, |fin| fin.saturating_sub(self.produced));
        let bytes = &bytes[..bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        // What the client has already (an earlier leader sent it) is passed over.
        let known = self.peer_acked.saturating_sub(self.produced);
        let known = usize::try_from(known)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        self.produced += known as u64;
        if known > 0
            && let Some(sender) = self.sender.as_mut()
        {
            sender.skip(known as u64);
        }
        let mut bytes = &bytes[known..];
        // The common case takes no detour: nothing waits, and this need not.
        if self.gate.is_empty()
            && tag <= cx.stable
            && let budget = self.budget_for(bytes.len())
            && let Some(sender) = self.sender.as_mut()
        {
            let n = sender.push(&bytes[..budget]);
            self.produced += n as u64;
            bytes = &bytes[n..];
            if n > 0 && !self.outstanding() {
                self.recovery.restart(cx.now);
            }
        }
        self.gate.append(bytes, tag);
        self.produced += bytes.len() as u64;
        self.pump(cx)
    }

    /// The server closed its side.
    pub(crate) fn handle_server_fin(&mut self, cx: &mut Context<'_>) -> Fate {
        if self.resetting || self.state.local_fin.is_some() {
            return Fate::Live;
        }
        if self.produced < self.peer_acked {
            // The client has more than this server ever said: they have diverged.
            return self.reset(cx, ResetBy::Stack);
        }
        let offset = self.produced;
        let number = self.announce(
            cx,
            Event::LocalFin {
                conn: self.id,
                offset,
            },
        );
        self.unstable.push_back((number, Mark::LocalFin));
        self.fin_allowed |= planted!(FinBeforeCommit);
        self.pump(cx)
    }

    /// Offset behind the server's last byte so far.
    pub(crate) fn produced(&self) -> u64 {
        self.produced
    }

    /// How much the driver may read from the server now. Reopens by a quarter of the capacity at
    /// once, so that output is not read in crumbs.
    pub(crate) fn output_room(&self, config: &Config) -> usize {
        if self.resetting || self.state.local_fin.is_some_and(|fin| self.produced >= fin) {
            return 0;
        }
        let held = self.gate.len() + self.sender.as_ref().map_or(0, Sender::queued);
        let room = config.transmit_capacity.saturating_sub(held);
        if room >= config.transmit_capacity / 4 {
            room
        } else {
            0
        }
    }

    pub(super) fn tell_room(&mut self, cx: &mut Context<'_>) {
        let open = self.output_room(cx.config) > 0;
        if open && !self.room_open {
            cx.log.outputs.push_back(Output::Room(self.id));
        }
        self.room_open = open;
    }

    /// Releases what is stable into the library, and sends what it then wants to send.
    pub(super) fn send_what_may_leave(&mut self, cx: &mut Context<'_>) -> Result<(), LibraryFault> {
        self.sync_sender(cx)?;
        self.pass_over_acknowledged();
        let mut budget = self.budget_for(self.gate.released_len(cx.stable));
        let pushed = budget > 0;
        while budget > 0 {
            let sender = match &mut self.sender {
                Some(sender) => sender,
                None => {
                    let start = self.produced - self.gate.len() as u64;
                    let made = Self::make_sender(cx, &self.state, start, self.peer_edge)?;
                    self.sender.insert(made)
                }
            };
            let ready = self.gate.released(cx.stable);
            let n = sender.push(&ready[..ready.len().min(budget)]);
            if n == 0 {
                break;
            }
            budget -= n;
            self.gate.consume(n);
        }
        self.close_if_allowed(cx)?;
        if pushed && !self.outstanding() {
            self.recovery.restart(cx.now);
        }
        self.sync_sender(cx)?;
        let Some(sender) = self.sender.as_mut() else {
            return Ok(());
        };
        let mut emitted = Vec::new();
        sender.poll(cx.library, cx.now, &mut emitted)?;
        for segment in emitted {
            self.send_segment(cx, segment);
        }
        Ok(())
    }

    /// How many of `ready` bytes may enter the library now: what the congestion window leaves, in
    /// whole segments unless it is the tail (RFC 9293 §3.8.6.2.1: no silly small ones).
    fn budget_for(&self, ready: usize) -> usize {
        let in_library = self.sender.as_ref().map_or(0, Sender::queued);
        let cwnd = usize::try_from(self.recovery.cwnd()).unwrap_or(usize::MAX);
        let room = cwnd.saturating_sub(in_library);
        if ready <= room {
            return ready;
        }
        let segment = usize::from(self.payload_max);
        match room / segment * segment {
            0 if in_library == 0 => segment.min(ready),
            whole => whole,
        }
    }

    fn make_sender(
        cx: &mut Context<'_>,
        state: &crate::conn_state::ConnState,
        start: u64,
        peer_edge: u64,
    ) -> Result<Sender, LibraryFault> {
        let theirs = if planted!(MssExceeded) {
            u16::MAX
        } else {
            state.negotiated.mss
        };
        let terms = Terms {
            mss: theirs.min(cx.config.local_mss()),
            peer_shift: state.negotiated.peer_shift.unwrap_or(0),
            timestamps: state.negotiated.timestamps,
            ip_header_len: state.tuple.ip_header_len(),
            capacity: cx.config.transmit_capacity,
        };
        let window = peer_edge.saturating_sub(start);
        Sender::adopt(cx.library, cx.now, terms, start, window)
    }

    /// Tells the library what the client has acknowledged, as far as the library has sent it, and
    /// how much it may send again at once.
    fn sync_sender(&mut self, cx: &mut Context<'_>) -> Result<(), LibraryFault> {
        let Some(sender) = self.sender.as_mut() else {
            return Ok(());
        };
        let una = self.peer_acked.clamp(sender.una(), sender.end());
        let edge = self.peer_edge.min(self.recovery.edge(una));
        sender.acknowledge(cx.library, cx.now, una, edge.saturating_sub(una))
    }

    /// Drops what waits in the gate though the client has it: an earlier leader sent it.
    fn pass_over_acknowledged(&mut self) {
        let start = self.produced - self.gate.len() as u64;
        let known = self.peer_acked.saturating_sub(start);
        let known = usize::try_from(known)
            .unwrap_or(usize::MAX)
            .min(self.gate.len());
        if known > 0 {
            self.gate.consume(known);
            if let Some(sender) = self.sender.as_mut() {
                sender.skip(known as u64);
            }
        }
    }

    /// The FIN follows the last byte, once its event is stable.
    fn close_if_allowed(&mut self, cx: &mut Context<'_>) -> Result<(), LibraryFault> {
        let Some(fin) = self.state.local_fin.filter(|_| self.fin_allowed) else {
            return Ok(());
        };
        if self.produced < fin || !self.gate.is_empty() || self.peer_acked > fin {
            return Ok(());
        }
        if self.sender.is_none() {
            let made = Self::make_sender(cx, &self.state, fin, self.peer_edge)?;
            self.sender = Some(made);
        }
        if let Some(sender) = self.sender.as_mut()
            && !sender.closed()
        {
            sender.close();
        }
        Ok(())
    }

    /// Gives a segment of the library its real header.
    fn send_segment(&mut self, cx: &mut Context<'_>, segment: Emitted) {
        let Emitted {
            mut buf,
            offset,
            payload_len,
            fin,
            push,
        } = segment;
        let start = HEADROOM + self.state.tuple.ip_header_len();
        let fields = self.ack_fields(cx);
        let mut flags = flag::ACK;
        flags |= if push && self.gate.is_empty() {
            flag::PSH
        } else {
            0
        } | if fin { flag::FIN } else { 0 };
        let tcp = &mut buf[start..];
        tcp[0..2].copy_from_slice(&self.state.tuple.local.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.state.tuple.remote.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.state.iss.at_offset(offset).0.to_be_bytes());
        tcp[8..12].copy_from_slice(&fields.ack.0.to_be_bytes());
        tcp[13] = flags;
        tcp[14..16].copy_from_slice(&fields.window.to_be_bytes());
        if let Some((val, ecr)) = fields.timestamp {
            tcp[20..20 + TIMESTAMP_LEN].copy_from_slice(&timestamp_option(val, ecr));
        }
        let partial = cx.config.partial_checksum();
        seal(&mut buf, &self.state.tuple, partial);
        let gso = (payload_len > usize::from(self.payload_max)).then_some(self.payload_max);
        let packet = Packet {
            buf,
            next_hop: self.next_hop,
            gso,
            partial_checksum: partial,
        };
        let end = offset + payload_len as u64 + u64::from(fin);
        self.recovery
            .on_sent(cx.now, self.peer_acked, offset, end, end > self.snd_nxt);
        self.snd_nxt = self.snd_nxt.max(end);
        self.transmit(cx, packet);
    }

    /// Sends the oldest outstanding segment again.
    fn resend_first(&mut self, cx: &mut Context<'_>) {
        let Some(sender) = self.sender.as_mut() else {
            return;
        };
        let una = self.peer_acked.clamp(sender.una(), sender.end());
        let edge = self.peer_edge.min(self.recovery.edge(una));
        let result = sender
            .acknowledge(cx.library, cx.now, una, edge.saturating_sub(una))
            .and_then(|()| {
                if sender.has_bytes() {
                    sender.retransmit(cx.library, cx.now)
                } else {
                    Ok(())
                }
            });
        // A fault shows itself again at the poll that follows.
        if result.is_ok()
            && !sender.has_bytes()
            && sender.closed()
            && self.peer_acked < sender.end()
        {
            // A lone FIN: the library would wait for its own timer.
            let seq = self.state.iss.at_offset(self.peer_acked);
            self.send_header(cx, seq, flag::FIN);
        }
    }

    /// A router says that a segment of ours, from `seq` on, was larger than the `mtu` behind it (RFC 1191,
    /// RFC 8201). The wire cuts to size what the library makes, so only the cut changes, and what
    /// was lost is repaired at once. Not replicated: a successor is told again.
    pub(crate) fn handle_too_big(&mut self, cx: &mut Context<'_>, seq: SeqNum, mtu: u16) -> Fate {
        let offset = seq.offset(self.state.iss, self.peer_acked);
        let una = self.peer_acked.cast_signed();
        let in_flight = offset >= una && offset < self.snd_nxt.cast_signed();
        let headers = self.state.tuple.ip_header_len() + TCP_HEADER;
        let options = if self.state.negotiated.timestamps {
            TIMESTAMP_LEN
        } else {
            0
        };
        let fits = usize::from(mtu).saturating_sub(headers + options);
        let fits = u16::try_from(fits).unwrap_or(u16::MAX);
        if self.resetting
            || !in_flight
            || fits >= self.payload_max
            || !cx.config.segmentation_offload
        {
            return Fate::Live;
        }
        self.payload_max = fits;
        self.recovery.shrink_segments(fits);
        self.recovery
            .on_timeout(cx.now, self.peer_acked, self.snd_nxt);
        self.resend_first(cx);
        self.pump(cx)
    }

    /// When the library's socket, which is idle, may go. In steps, so that an active connection does
    /// not move a timer with every segment.
    pub(super) fn sender_expiry(&self) -> Option<Instant> {
        let sender = self.sender.as_ref()?;
        let idle = !sender.has_bytes() && !sender.closed() && self.gate.is_empty();
        let step = micros_of(SENDER_IDLE);
        let last = self.recovery.progress_at().micros();
        idle.then(|| Instant::from_micros((last / step + 2) * step))
    }

    /// Gives an idle socket's buffer back. The next output makes another, at any offset: that is what
    /// `adopt` is for.
    pub(super) fn drop_idle_sender(&mut self, cx: &mut Context<'_>) {
        if self.sender_expiry().is_some_and(|at| at <= cx.now) {
            self.release_sender(cx.library);
        }
    }

    /// Nothing was acknowledged for too long: repair, before the library's own timer does.
    pub(super) fn on_recovery_timeout(&mut self, cx: &mut Context<'_>) {
        if self.outstanding()
            && self.peer_edge > self.peer_acked
            && self.recovery.deadline() <= cx.now
        {
            self.recovery
                .on_timeout(cx.now, self.peer_acked, self.snd_nxt);
            self.resend_first(cx);
        }
    }
}
