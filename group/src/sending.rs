//! What goes out of the core: headers, events, acknowledgements, requests for what is missing.

use crate::config::planted;
use crate::core::{AckDebt, Core, Phase};
use crate::output::{Notice, Output};
use crate::time::Instant;
use crate::view::{MemberId, View};
use crate::wire::{self, Header, Message, Pos};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// An amortised acknowledgement waits for this many bytes at most.
const ACK_BYTES: usize = 64 * 1024;
/// When nothing acknowledges what output waits for, the tail is announced again after this long.
const PROBE_AFTER: Duration = Duration::from_millis(3);
/// Payload bytes of one burst of datagrams; what follows goes out with the next.
const BURST_BYTES: usize = 60 * 1024;
/// The same peer is told of a newer view, or asked for one, at most this often.
pub(crate) const TELL_INTERVAL: Duration = Duration::from_millis(5);

impl Core {
    /// The installed view.
    pub(crate) fn view(&self) -> &View {
        self.view.as_ref().expect("a member has a view")
    }

    pub(crate) fn view_id(&self) -> u64 {
        self.view.as_ref().map_or(0, |v| v.id.0)
    }

    pub(crate) fn notice(&mut self, n: Notice) {
        tracing::debug!(group = self.config.group_id, me = %self.config.me, notice = ?n, "notice");
        self.outputs.push_back(Output::Notice(n));
    }

    pub(crate) fn header(&self) -> Header {
        let mut h = Header {
            view_id: self
                .view
                .as_ref()
                .map_or_else(|| self.seeking.view_id(), |v| v.id.0),
            clock_us: self.clock.now(self.now),
            ..Header::default()
        };
        let free = self.wedged.is_none();
        match self.phase {
            Phase::Leading if free => {
                h.flags |= wire::LEADER;
                if self.may_emit(self.now) {
                    h.flags |= wire::LEASE;
                }
                h.stable = self.stable;
                h.trim = self.trim;
            }
            Phase::Backup | Phase::Joining if free || planted!(self.config, AckAfterWedge) => {
                h.flags |= wire::ACK;
                h.held = self.log.held();
            }
            _ => {}
        }
        h
    }

    pub(crate) fn send_bodies(&mut self, to: &MemberId, bodies: Vec<Bytes>) {
        if !bodies.is_empty() {
            self.outputs.push_back(Output::Send {
                to: Arc::from([to.clone()]),
                bodies,
            });
        }
    }

    pub(crate) fn send(&mut self, to: &MemberId, message: Message) {
        let body = wire::body(&self.header(), &[message]);
        self.send_bodies(to, vec![body]);
    }

    /// Sends one body to all of these but this member.
    pub(crate) fn send_all(&mut self, to: &[MemberId], body: Bytes) {
        let to: Arc<[MemberId]> = to
            .iter()
            .filter(|m| **m != self.config.me)
            .cloned()
            .collect();
        if !to.is_empty() {
            self.outputs.push_back(Output::Send {
                to,
                bodies: vec![body],
            });
        }
    }

    /// Tells a peer of the view installed here, at a bounded rate.
    pub(crate) fn tell_view(&mut self, to: &MemberId) {
        let Some(view) = &self.view else { return };
        let last = self
            .peers
            .get(to)
            .and_then(|p| p.told)
            .or(self.seeking.told(to));
        if last.is_some_and(|t| self.now.since(t) < TELL_INTERVAL) {
            return;
        }
        let message = Message::NewView {
            version: self.version,
            znode: view.encode(),
        };
        match self.peers.get_mut(to) {
            Some(p) => p.told = Some(self.now),
            None => self.seeking.tell(to, self.now),
        }
        self.send(to, message);
    }

    /// What waits to be sent: new events, acknowledgements, requests for what is missing.
    pub(crate) fn flush_sends(&mut self) {
        match self.phase {
            Phase::Leading if self.wedged.is_none() => self.send_events(),
            Phase::Backup | Phase::Joining => self.settle_ack_debt(),
            _ => {}
        }
        self.ask_for_missing();
        self.ask_for_pieces();
        for proposer in std::mem::take(&mut self.owed_wedge_ack) {
            self.send_wedge_ack(&proposer);
        }
    }

    fn send_events(&mut self) {
        let next = Pos::start(self.log.next());
        if self.next_send >= next {
            return;
        }
        let view = self.view();
        if view.members().count() == 1 {
            self.next_send = next;
            return;
        }
        // A lone leader's events are stable at once; its joiners set the pace.
        let acknowledged = if view.k > 0 {
            self.stable
        } else {
            self.joiners()
                .map(|(_, p)| p.held)
                .max()
                .unwrap_or(self.stable)
        };
        let sent = self.next_send.number.saturating_sub(1);
        let flight = self.log.bytes_between(acknowledged, sent);
        if flight >= self.config.limits.flight_bytes_max {
            return;
        }
        let to: Arc<[MemberId]> = view
            .members()
            .filter(|m| **m != self.config.me)
            .cloned()
            .collect();
        let mut header = self.header();
        if self.urgent_to >= self.next_send.number {
            header.flags |= wire::URGENT;
            self.probe_at = Some(self.now + PROBE_AFTER);
        }
        let from = self.next_send;
        let (bodies, at) = self.log.pack(
            &header.bytes(),
            from,
            next,
            BURST_BYTES,
            &self.config.limits,
        );
        self.next_send = at;
        self.outputs.push_back(Output::Send { to, bodies });
    }

    fn settle_ack_debt(&mut self) {
        let due = self.ack.at_once
            || self.ack.bytes >= ACK_BYTES
            || self.ack.by.is_some_and(|by| by <= self.now);
        if !due {
            return;
        }
        self.ack = AckDebt::default();
        if self.wedged.is_some() && !planted!(self.config, AckAfterWedge) {
            return;
        }
        let leader = self.view().leader().clone();
        let body = wire::body(&self.header(), &[]);
        self.send_bodies(&leader, vec![body]);
    }

    pub(crate) fn nak_due(&self) -> Option<Instant> {
        let asks = match self.phase {
            Phase::Backup | Phase::Joining | Phase::Leading => {
                self.wedged.is_none() || self.fetch_from().is_some()
            }
            _ => false,
        };
        if asks { self.assembler.nak_due() } else { None }
    }

    fn ask_for_missing(&mut self) {
        if self.nak_due().is_none_or(|t| t > self.now) {
            return;
        }
        let from = match self.fetch_from() {
            Some(holder) => holder,
            None if self.wedged.is_none() && self.phase != Phase::Leading => {
                self.view().leader().clone()
            }
            None => return,
        };
        if let Some(ranges) = self.assembler.missing(self.now) {
            self.counters.naks_sent += 1;
            self.send(&from, Message::Nak { ranges });
        }
    }

    /// Asks everyone for a sign of life; `first` goes in front.
    pub(crate) fn send_heartbeat(&mut self, first: &[Message]) {
        let mut messages = first.to_vec();
        messages.push(Message::Heartbeat {
            sent_us: self.now.micros(),
        });
        let mut header = self.header();
        header.held = self.sent_in_whole();
        let to: Vec<MemberId> = self.view().members().cloned().collect();
        self.send_all(&to, wire::body(&header, &messages));
    }

    fn sent_in_whole(&self) -> u64 {
        self.next_send.number - 1
    }

    pub(crate) fn probe(&mut self) {
        if self.can_multicast() && self.stable < self.log.held() {
            let mut header = self.header();
            header.flags |= wire::URGENT;
            header.held = self.sent_in_whole();
            let to: Vec<MemberId> = self.view().full.clone();
            self.send_all(&to, wire::body(&header, &[]));
            self.probe_at = Some(self.now + PROBE_AFTER);
        }
    }
}
