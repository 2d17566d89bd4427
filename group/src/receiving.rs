//! What a datagram does to a member: events, heartbeats, requests for what is missing.

use crate::config::planted;
use crate::core::{Core, Phase};
use crate::output::Output;
use crate::sending::TELL_INTERVAL;
use crate::time::Instant;
use crate::view::{MemberId, View};
use crate::wire::{self, Chunk, Header, Item, Message, Pos};
use bytes::Bytes;
use std::time::Duration;

#[cfg(test)]
mod tests;

/// An amortised acknowledgement waits at most this long.
const ACK_DELAY: Duration = Duration::from_millis(1);
/// Bytes sent again because of one datagram, however many requests are in it.
pub(crate) const RESEND_BYTES: usize = 256 * 1024;

impl Core {
    pub(crate) fn on_item(&mut self, from: &MemberId, header: &Header, item: Item<'_>) {
        match item {
            Item::Message(Message::NewView { version, znode }) => {
                self.on_znode(&znode, version);
                return;
            }
            Item::Message(Message::WantView) => return self.tell_view(from),
            Item::Message(Message::JoinRequest) => return self.on_join_request(from),
            _ => {}
        }
        if !self.in_this_view(from, header) {
            return;
        }
        match item {
            Item::Chunk(chunk) => self.on_chunk(from, header, &chunk),
            Item::Piece(piece) => self.on_piece(&piece),
            Item::Unicast(payload) => {
                if self.can_multicast() {
                    let payload = Bytes::copy_from_slice(payload);
                    self.outputs.push_back(Output::Unicast {
                        from: from.clone(),
                        payload,
                    });
                }
            }
            Item::Message(message) => self.on_message(from, message),
        }
    }

    pub(crate) fn in_this_view(&self, from: &MemberId, header: &Header) -> bool {
        self.view
            .as_ref()
            .is_some_and(|v| self.is_of(v, header) && v.contains(from))
    }

    fn is_of(&self, view: &View, header: &Header) -> bool {
        header.view_id == view.id.0 || planted!(self.config, ViewUnchecked)
    }

    pub(crate) fn on_message(&mut self, from: &MemberId, message: Message) {
        match message {
            Message::Heartbeat { sent_us } => self.on_heartbeat(from, sent_us),
            Message::Alive { sent_us, lag } => {
                if let Some(p) = self.peers.get_mut(from) {
                    // A heartbeat of ours from the future is a peer's error; it must not lengthen the lease.
                    let mut sent = Instant::from_micros(sent_us).min(self.now);
                    if planted!(self.config, LeaseFromAnswer) {
                        sent = self.now;
                    }
                    p.answered = p.answered.max(Some(sent));
                    p.lag = lag;
                }
            }
            Message::Nak { ranges } => self.on_nak(from, &ranges),
            Message::PreVote => self.on_pre_vote(from),
            Message::PreVoteAnswer { granted } => self.on_pre_vote_answer(from, granted),
            Message::Wedge => self.on_wedge(from),
            Message::WedgeAck {
                held,
                answered_ago_us,
                clock_us,
                lag,
                ready,
            } => {
                self.clock.observe(clock_us);
                self.on_wedge_ack(from, held, answered_ago_us, lag, ready);
            }
            Message::JoinReady => {
                if let Some(p) = self.peers.get_mut(from) {
                    let known = std::mem::replace(&mut p.ready, true);
                    if !known {
                        self.act_at_once();
                    }
                }
            }
            Message::LeaveRequest => {
                if self.phase == Phase::Leading && self.leave_requests.insert(from.clone()) {
                    self.act_at_once();
                }
            }
            Message::PiecesWanted { since, offset, len } => {
                self.on_pieces_wanted(from, since, offset, len);
            }
            Message::NewView { .. } | Message::WantView | Message::JoinRequest => {}
        }
    }

    /// What the header says, after the items: an item may have installed the header's view.
    pub(crate) fn on_header(&mut self, from: &MemberId, header: &Header) {
        let Some(view) = &self.view else { return };
        if !self.is_of(view, header) {
            self.counters.wrong_view += 1;
            if header.view_id > view.id.0 {
                self.want_view(from);
            } else if header.view_id > 0 {
                self.tell_view(from);
            }
            return;
        }
        if !view.contains(from) {
            self.counters.stranger += 1;
            return;
        }
        let from_leader = view.leader() == from;
        let now = self.now;
        let counts = self.can_multicast();
        let Some(peer) = self.peers.get_mut(from) else {
            return;
        };
        peer.heard = now;
        if header.has(wire::LEADER) && from_leader {
            if header.has(wire::LEASE) {
                peer.lease_stated = now;
            }
            if self.wedged.is_none() {
                if self.suspected.remove(from) {
                    self.counters.false_suspicions += 1;
                }
                self.assembler.announce(header.held);
                self.trim = self.trim.max(header.trim);
                self.log.trim_to(self.trim.min(self.delivered));
                if header.has(wire::URGENT) {
                    self.ack.at_once = true;
                }
            }
        } else if header.has(wire::ACK) && counts {
            let held = header.held.min(self.log.held());
            if held > peer.held {
                peer.held = held;
                self.update_stable();
                self.collect();
            }
        }
    }

    pub(crate) fn want_view(&mut self, from: &MemberId) {
        let due = self
            .seeking
            .asked_at
            .is_none_or(|t| self.now.since(t) >= TELL_INTERVAL);
        if due {
            self.seeking.asked_at = Some(self.now);
            self.send(from, Message::WantView);
            self.read_view();
        }
    }

    pub(crate) fn on_chunk(&mut self, from: &MemberId, header: &Header, chunk: &Chunk<'_>) {
        let copy = header.has(wire::COPY);
        let allowed = match (self.phase, self.wedged.is_some()) {
            (Phase::Backup | Phase::Joining, false) => !copy && self.view().leader() == from,
            (Phase::Backup | Phase::Joining, true) => copy || planted!(self.config, AckAfterWedge),
            // A leader holds all its own events.
            _ => false,
        };
        if !allowed {
            return;
        }
        let before = self.log.held();
        let new = self
            .assembler
            .take(chunk, None, &mut self.log, &self.config.limits);
        if copy {
            if self.log.held() > before && self.proposal.is_none() {
                self.owed_wedge_ack.insert(from.clone());
            }
            return;
        }
        self.ack.bytes += chunk.bytes.len() + wire::CHUNK_BYTES;
        if new {
            self.ack.by.get_or_insert(self.now + ACK_DELAY);
        } else {
            self.ack.at_once = true; // a repetition: the leader has missed an acknowledgement
        }
        self.deliver();
    }

    /// Delivers what is held, in order, if this member may.
    pub(crate) fn deliver(&mut self) {
        if self.wedged.is_some() && !planted!(self.config, AckAfterWedge) {
            return;
        }
        if self.phase == Phase::Joining && !self.checkpoint_done {
            let waiting = self.log.bytes_after(self.delivered);
            if waiting > self.config.limits.joiner_buffer_bytes_max {
                self.become_gone();
            }
            return;
        }
        self.deliver_to(self.log.held());
    }

    pub(crate) fn deliver_to(&mut self, last: u64) {
        while self.delivered < last {
            self.delivered += 1;
            let number = self.delivered;
            let payload = self
                .log
                .payload(number)
                .expect("held until delivered")
                .clone();
            if planted!(self.config, JoinerSkipsOne)
                && self.phase == Phase::Joining
                && number == self.joined_cut() + 1
            {
                continue;
            }
            self.outputs.push_back(Output::Deliver { number, payload });
        }
    }

    pub(crate) fn on_heartbeat(&mut self, from: &MemberId, sent_us: u64) {
        if self.view().leader() != from
            || (self.wedged.is_some() && !planted!(self.config, AckAfterWedge))
        {
            return;
        }
        self.answered_leader = Some(self.now);
        let mut messages = vec![Message::Alive {
            sent_us,
            lag: self.lag,
        }];
        if self.phase == Phase::Joining && self.ready {
            messages.push(Message::JoinReady);
        }
        if self.leaving {
            messages.push(Message::LeaveRequest);
        }
        let body = wire::body(&self.header(), &messages);
        self.send_bodies(from, vec![body]);
    }

    pub(crate) fn on_nak(&mut self, from: &MemberId, ranges: &[(Pos, Pos)]) {
        if planted!(self.config, NaksUnanswered) {
            return;
        }
        let mut header = self.header();
        if self.wedged.is_some() {
            header.flags |= wire::COPY;
        } else if self.phase != Phase::Leading {
            return;
        }
        let sent = if self.wedged.is_some() {
            Pos::start(self.log.next())
        } else {
            self.next_send
        };
        for (a, b) in ranges.iter().take(crate::fbcast::NAK_RANGES_MAX) {
            if self.resend_left == 0 {
                break;
            }
            let to = (*b).min(sent);
            if a.number < self.log.first() {
                continue; // an old request that was long on its way: whoever sent it holds this by now
            }
            let (bodies, _) = self.log.pack(
                &header.bytes(),
                *a,
                to,
                self.resend_left,
                &self.config.limits,
            );
            let sent = bodies.iter().map(Bytes::len).sum();
            self.resend_left = self.resend_left.saturating_sub(sent);
            self.counters.retransmitted += bodies.len() as u64;
            self.send_bodies(from, bodies);
        }
    }
}
