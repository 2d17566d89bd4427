//! What goes out: messages, acknowledgements, requests for what is missing.

use super::{Blocked, Cx, Direct, Endpoint, Leaving};
use crate::process::lane;
use crate::process::loading::Donating;
use crate::process::types::{
    CallRef, GroupEvent, Message, Multicast, Order, Output, ProcessConfig, Refused, Stability,
};
use crate::process::wire::{BLOCKED, DIRECT, Envelope, Header, Kind, Lack, Op, REPLIES, Small};
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Lanes acknowledged in one datagram.
const ACKS_MAX: usize = 64;

impl Endpoint {
    fn envelope_room(&self) -> usize {
        // Kind, thread, call, and a stamp of ten bytes a rank at most.
        64 + 10 * self.view.members.len()
    }

    // ---- the program's wishes ----------------------------------------------------------------------------------

    pub(crate) fn multicast(&mut self, cx: &mut Cx<'_>, m: Multicast) -> Result<(), Refused> {
        if self.leaving != Leaving::No {
            return Err(Refused::NotAMember);
        }
        if m.body.len() + self.envelope_room() > cx.config.core.limits.event_bytes_max {
            return Err(Refused::TooLarge);
        }
        if !self.has_room(cx.config) {
            self.refused.multicast = true;
            return Err(Refused::Backlog);
        }
        if m.calling.is_some() && self.calls.full() {
            self.refused.call = true;
            return Err(Refused::Backlog);
        }
        if self.blocked.is_some() {
            self.queue_bytes += m.body.len() as u64;
            self.queue.push_back(m);
        } else {
            self.send(cx, m);
        }
        Ok(())
    }

    pub(crate) fn has_room(&self, config: &ProcessConfig) -> bool {
        self.backlog_bytes() < config.backlog_bytes_max
    }

    pub(crate) fn backlog_bytes(&self) -> u64 {
        // What waits costs memory even where it is empty.
        self.queue_bytes + self.queue.len() as u64 * 64 + self.out.backlog_bytes()
    }

    pub(super) fn send(&mut self, cx: &mut Cx<'_>, m: Multicast) {
        let kind = match m.order {
            Order::Fifo => Some(Kind::Fifo),
            Order::Causal(thread) => self
                .threads
                .stamp(thread, self.rank)
                .map(|stamp| Kind::Causal { thread, stamp }),
            Order::Total(thread) => self
                .threads
                .stamp(thread, self.rank)
                .map(|stamp| Kind::Total { thread, stamp }),
            Order::View => Some(Kind::View),
        };
        // Too many threads in this view: it waits for the next.
        let Some(kind) = kind else {
            // What is there already while the view lasts has asked for it.
            if self.queue.is_empty() {
                cx.requests.push(Op::Gbcast {
                    group: self.id,
                    view: self.view.id,
                    number: 0,
                });
            }
            self.queue_bytes += m.body.len() as u64;
            self.queue.push_back(m);
            return;
        };
        let urgent = m.safe || m.done.is_some() || m.calling.is_some();
        let at_once = !m.safe && m.order != Order::View;
        let envelope = Envelope {
            kind,
            safe: m.safe,
            call: m.calling,
        };
        let number = self.out.push(envelope.put(&m.body), urgent);
        if m.safe {
            self.safe_until = number;
        }
        if let (Some((token, stability)), false) = (m.done, m.order == Order::View) {
            let holders = match stability {
                Stability::Held(k) => usize::from(k),
                Stability::All => usize::MAX,
            };
            let queue = self.done.entry(holders).or_default();
            queue.push_back((number, token));
        }
        if let Some(calling) = &m.calling {
            let undelivered = m.order == Order::View;
            let members = &self.view.members;
            self.calls.begin(cx.now, calling, members, undelivered);
        }
        if m.order == Order::View {
            // Whether it is delivered in this view, and to whom, is known when the view ends.
            self.own_gbcasts.push_back((number, m));
            cx.requests.push(Op::Gbcast {
                group: self.id,
                view: self.view.id,
                number,
            });
        } else if at_once && self.own_taken + 1 == number {
            // What the ordering would find in the log, without reading it from there.
            self.own_taken = number;
            self.take(cx, self.rank, number, envelope, m.body);
        }
        self.settle_done(cx);
        self.feed(cx, self.rank);
    }

    /// Tells of what has become stable.
    pub(super) fn settle_done(&mut self, cx: &mut Cx<'_>) {
        if self.done.is_empty() {
            return;
        }
        let mut numbers = Vec::new();
        for (holders, queue) in &mut self.done {
            let stable = self.out.held_by(*holders);
            while let Some((number, token)) = queue.front().copied() {
                if number > stable {
                    break;
                }
                numbers.push(token);
                queue.pop_front();
            }
        }
        self.done.retain(|_, queue| !queue.is_empty());
        for number in numbers {
            self.tell(cx, GroupEvent::Done { number });
        }
    }

    /// The places that this member has given to abcasts, for the others.
    pub(super) fn send_sequence(&mut self, cx: &mut Cx<'_>) {
        let Some(s) = self.total.sequence(self.view.members.len()) else {
            return;
        };
        if self.others.is_empty() {
            return;
        }
        let envelope = Envelope {
            kind: Kind::Sequence {
                first: s.first,
                ids: s.ids,
                token: s.token,
            },
            safe: false,
            call: None,
        };
        self.out.push(envelope.put(&[]), false);
        let held = self.out.log.held();
        self.take_lane(cx, self.rank, held, false);
    }

    pub(crate) fn send_direct(
        &mut self,
        cx: &mut Cx<'_>,
        to: &MemberId,
        body: Bytes,
    ) -> Result<(), Refused> {
        if self.view.rank(to).is_none() {
            return Err(Refused::NotAMember);
        }
        if body.len() + self.envelope_room() > cx.config.core.limits.event_bytes_max {
            return Err(Refused::TooLarge);
        }
        if *to == self.me {
            let message = Message {
                from: to.clone(),
                order: None,
                body,
                call: None,
            };
            self.emit(cx, GroupEvent::Message(message));
            return Ok(());
        }
        if self.direct_backlog_bytes(to) >= cx.config.backlog_bytes_max {
            self.refused.directs.insert(to.clone());
            return Err(Refused::Backlog);
        }
        self.push_direct(to, Kind::Direct, &body);
        Ok(())
    }

    /// Bytes that are on their way from here.
    pub(crate) fn flight_bytes(&self) -> u64 {
        let directs = self.directs.values().map(|d| d.out.flight_bytes());
        self.out.flight_bytes() + directs.sum::<u64>()
    }

    fn direct_backlog_bytes(&self, to: &MemberId) -> u64 {
        let direct = self.directs.get(&(to.clone(), DIRECT));
        direct.map_or(0, |d| d.out.backlog_bytes())
    }

    /// Messages of departed members' lanes are gone, and nobody waits for room in them.
    pub(super) fn forget_directs(&mut self, cx: &mut Cx<'_>, members: &[MemberId]) {
        self.directs.retain(|(m, _), _| members.contains(m));
        let waiting = self.refused.directs.len();
        self.refused.directs.retain(|m| members.contains(m));
        if self.refused.directs.len() < waiting {
            self.tell(cx, GroupEvent::Room);
        }
    }

    fn push_direct(&mut self, to: &MemberId, kind: Kind, body: &[u8]) {
        let lane = if matches!(kind, Kind::Reply { .. }) {
            REPLIES
        } else {
            DIRECT
        };
        let envelope = Envelope {
            kind,
            safe: false,
            call: None,
        };
        let direct = self.direct(to, lane);
        direct.out.push(envelope.put(body), true);
    }

    pub(crate) fn reply(
        &mut self,
        cx: &mut Cx<'_>,
        to: &CallRef,
        body: Option<Bytes>,
    ) -> Result<(), Refused> {
        if self.view.rank(&to.caller).is_none() {
            return Ok(()); // the caller is gone, and nobody waits
        }
        let len = body.as_ref().map_or(0, Bytes::len);
        let fits = len + self.envelope_room() <= cx.config.core.limits.event_bytes_max;
        // An answer that cannot be sent is declined, so that nobody waits for it.
        let body = body.filter(|_| fits);
        let done = if fits { Ok(()) } else { Err(Refused::TooLarge) };
        if to.caller == self.me {
            for event in self.calls.on_reply(to.call, &to.caller, body) {
                self.tell(cx, event);
            }
            return done;
        }
        let kind = Kind::Reply {
            call: to.call,
            declined: body.is_none(),
        };
        self.push_direct(&to.caller, kind, &body.unwrap_or_default());
        done
    }

    pub(crate) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Wished;
        }
    }

    pub(crate) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub(crate) fn give_state(&mut self, view: u64, segments: Vec<Bytes>) -> Result<(), Refused> {
        let donating = self.donating.get_mut(&view);
        match donating.map(|d| d.give(segments)) {
            Some(true) => Ok(()),
            Some(false) | None => Err(Refused::NotWanted),
        }
    }

    // ---- datagrams ---------------------------------------------------------------------------------------------

    pub(super) fn header(&self) -> Header {
        Header {
            flags: if self.blocked.is_some() { BLOCKED } else { 0 },
            lane: u8::try_from(self.rank).expect("MEMBERS_MAX"),
            group: self.id.0,
            view: self.view.id,
            sent: self.out.sent(),
            stable: self.out.held_by(self.safe_holders()),
            trim: self.out.all_hold(),
        }
    }

    pub(super) fn direct_header(&self, with: &MemberId, lane: u8, direct: &Direct) -> Header {
        Header {
            flags: 0,
            lane,
            group: self.id.0,
            view: self.together.get(with).copied().unwrap_or(0),
            sent: direct.out.sent(),
            stable: 0,
            trim: direct.out.all_hold(),
        }
    }

    pub(super) fn send_bodies(cx: &mut Cx<'_>, to: Arc<[MemberId]>, bodies: Vec<Bytes>) {
        if !bodies.is_empty() && !to.is_empty() {
            cx.out.push_back(Output::Send { to, bodies });
        }
    }

    pub(super) fn send_small(&self, cx: &mut Cx<'_>, to: &MemberId, header: &Header, small: Small) {
        let body = lane::body(header, &[small]);
        Self::send_bodies(cx, Arc::from([to.clone()]), vec![body]);
    }

    /// What is due, at the end of each input.
    pub(crate) fn flush(&mut self, cx: &mut Cx<'_>) {
        self.send_messages(cx);
        self.send_acks(cx);
        self.send_naks(cx);
        self.flush_directs(cx);
        if let Some((donor, small)) = self
            .load
            .as_mut()
            .and_then(|l| l.want(cx.now, &cx.config.core.limits))
        {
            self.send_small(cx, &donor, &self.header(), small);
        }
        self.push_back_on_the_slow(cx);
        self.tell_of_room(cx);
        if self.leaving == Leaving::Wished && self.may_leave() {
            self.leaving = Leaving::Asked;
            cx.requests.push(Op::Leave { group: self.id });
        }
    }

    /// Whether all hold what this member sent, and nobody gets the state from here: with the last that has it the state would
    /// go.
    fn may_leave(&self) -> bool {
        let mut outs = self.directs.values().map(|d| &d.out).chain([&self.out]);
        self.blocked.is_none()
            && self.queue.is_empty()
            && !self.donating.values().any(Donating::gives)
            && outs.all(|o| o.all_hold() == o.log.held())
    }

    /// Says that there is room, once, where something was refused for want of it.
    fn tell_of_room(&mut self, cx: &mut Cx<'_>) {
        let enough = cx.config.backlog_bytes_max / 2;
        let multicast = self.refused.multicast && self.backlog_bytes() < enough;
        let call = self.refused.call && !self.calls.full();
        let directs = std::mem::take(&mut self.refused.directs);
        let (free, full): (BTreeSet<_>, BTreeSet<_>) = directs
            .into_iter()
            .partition(|m| self.direct_backlog_bytes(m) < enough);
        self.refused.directs = full;
        self.refused.multicast &= !multicast;
        self.refused.call &= !call;
        if multicast || call || !free.is_empty() {
            self.tell(cx, GroupEvent::Room);
        }
    }

    fn send_messages(&mut self, cx: &mut Cx<'_>) {
        let limits = &cx.config.core.limits;
        while self.out.unsent() {
            let mut header = self.header();
            let mut acks: Vec<(u8, u64)> = Vec::new();
            for (rank, inc) in self.ins.iter_mut().enumerate() {
                if inc.owes() && acks.len() < ACKS_MAX {
                    acks.push((u8::try_from(rank).expect("MEMBERS_MAX"), inc.log.held()));
                }
            }
            let small = [Small::Acks(acks)];
            let Small::Acks(acks) = &small[0] else {
                unreachable!("made above")
            };
            let first: &[Small] = if acks.is_empty() { &[] } else { &small };
            let (now, allowance) = (cx.now, &mut *cx.allowance);
            let bodies = self.out.burst(now, &mut header, first, limits, allowance);
            if bodies.is_empty() {
                break;
            }
            for (rank, _) in acks {
                self.ins[usize::from(*rank)].settle();
            }
            Self::send_bodies(cx, self.others.clone(), bodies);
        }
        self.settle_done(cx);
        if self.out.probe(cx.now) {
            let mut header = self.header();
            header.flags |= crate::process::wire::URGENT;
            Self::send_bodies(cx, self.others.clone(), vec![lane::body(&header, &[])]);
        }
    }

    fn send_acks(&mut self, cx: &mut Cx<'_>) {
        for rank in 0..self.ins.len() {
            if rank == self.rank || !self.ins[rank].ack_due(cx.now) {
                continue;
            }
            let held = self.ins[rank].settle();
            let lane = u8::try_from(rank).expect("MEMBERS_MAX");
            let to = self.view.members[rank].clone();
            self.send_small(cx, &to, &self.header(), Small::Acks(vec![(lane, held)]));
        }
    }

    fn send_naks(&mut self, cx: &mut Cx<'_>) {
        for rank in 0..self.ins.len() {
            let lane = u8::try_from(rank).expect("MEMBERS_MAX");
            let due = self.ins[rank].assembler.nak_due();
            if rank == self.rank || due.is_none_or(|t| t > cx.now) || !self.takes_from(rank) {
                continue;
            }
            let Some(ranges) = self.ins[rank].assembler.missing(cx.now) else {
                continue;
            };
            let holders = self.blocked.as_ref().map(|b| &b.holders);
            let holder = holders.and_then(|h| h.get(&lane)).copied().unwrap_or(lane);
            let Some(to) = self.view.members.get(usize::from(holder)).cloned() else {
                continue;
            };
            let mut header = self.header();
            header.lane = lane;
            // The header speaks of this member's own lane only where it names it.
            header.sent = 0;
            header.stable = 0;
            header.trim = 0;
            self.send_small(cx, &to, &header, Small::Nak(ranges));
        }
    }

    fn flush_directs(&mut self, cx: &mut Cx<'_>) {
        let limits = &cx.config.core.limits;
        // Taken out for the moment, so that the headers can be made beside them.
        let mut directs = std::mem::take(&mut self.directs);
        for ((m, lane), direct) in &mut directs {
            while direct.out.unsent() {
                let mut header = self.direct_header(m, *lane, direct);
                let (now, allowance) = (cx.now, &mut *cx.allowance);
                let out = &mut direct.out;
                let bodies = out.burst(now, &mut header, &[], limits, allowance);
                if bodies.is_empty() {
                    break;
                }
                Self::send_bodies(cx, Arc::from([m.clone()]), bodies);
            }
            let mut small = Vec::new();
            if direct.inc.ack_due(cx.now) {
                small.push(Small::DirectAck(direct.inc.settle()));
            }
            let takes = *lane == REPLIES || self.takes();
            if takes
                && direct.inc.assembler.nak_due().is_some_and(|t| t <= cx.now)
                && let Some(ranges) = direct.inc.assembler.missing(cx.now)
            {
                small.push(Small::Nak(ranges));
            }
            let probe = direct.out.probe(cx.now);
            if probe || !small.is_empty() {
                let mut header = self.direct_header(m, *lane, direct);
                if probe {
                    header.flags |= crate::process::wire::URGENT;
                }
                let body = lane::body(&header, &small);
                Self::send_bodies(cx, Arc::from([m.clone()]), vec![body]);
            }
        }
        self.directs = directs;
    }

    /// A member that holds up everybody for too long has to leave.
    fn push_back_on_the_slow(&mut self, cx: &mut Cx<'_>) {
        let Some(patience) = cx.config.slow_after.filter(|_| self.blocked.is_none()) else {
            return;
        };
        let stalled = |out: &lane::Outgoing| {
            let since = out.stalled_since;
            since.is_some_and(|since| cx.now.since(since) >= patience)
        };
        let slowest = self.out.slowest().filter(|_| stalled(&self.out));
        let mut slow: Vec<MemberId> = Vec::new();
        slow.extend(slowest.and_then(|i| self.others.get(i)).cloned());
        let directs = self.directs.iter().filter(|(_, d)| stalled(&d.out));
        slow.extend(directs.map(|((m, _), _)| m.clone()));
        for member in slow {
            if !self.expelled.insert(member.clone()) {
                continue;
            }
            cx.requests.push(Op::Expel {
                group: self.id,
                member,
            });
        }
    }

    /// The view is being left: what others do not acknowledge fills no window. Whether somebody is given up who was not.
    pub(crate) fn wait_for_only(&mut self, survivors: &BTreeSet<&MemberId>) -> bool {
        let mut news = false;
        for (receiver, m) in self.others.iter().enumerate() {
            if !survivors.contains(m) {
                news |= self.out.give_up(receiver);
            }
        }
        news
    }

    /// The site leader says where to get what is missing.
    pub(crate) fn on_fetch(&mut self, wants: &[Lack]) {
        let Some(Blocked { holders }) = &mut self.blocked else {
            return;
        };
        for (lane, until, holder) in wants.iter().take(self.ins.len()) {
            if let Some(inc) = self.ins.get_mut(usize::from(*lane)) {
                inc.want(*until);
                holders.insert(*lane, *holder);
            }
        }
    }

    /// When [`Self::flush`] has something to do although nothing happens.
    pub(crate) fn due(&self) -> Option<Instant> {
        let lanes = self.ins.iter().enumerate();
        let takes = self.takes();
        let lanes = lanes
            .filter(|(rank, _)| *rank != self.rank)
            .filter_map(|(rank, inc)| inc.due(self.takes_from(rank)));
        let directs = self.directs.iter();
        let directs = directs
            .flat_map(|((_, lane), d)| [d.inc.due(takes || *lane == REPLIES), d.out.probe_due()])
            .flatten();
        let rest = [
            self.out.probe_due(),
            self.calls.due(),
            self.load.as_ref().map(crate::process::loading::Load::due),
            // Looked at again and again while it is full; an acknowledgement ends it.
            self.stalled_since()
                .filter(|_| self.blocked.is_none() && self.expelled.is_empty())
                .and_then(|t| self.slow_at(t)),
        ];
        lanes.chain(directs).chain(rest.into_iter().flatten()).min()
    }

    fn stalled_since(&self) -> Option<Instant> {
        let directs = self.directs.values().filter_map(|d| d.out.stalled_since);
        directs.chain(self.out.stalled_since).min()
    }

    fn slow_at(&self, since: Instant) -> Option<Instant> {
        self.slow_after.map(|patience| since + patience)
    }

    pub(crate) fn on_time(&mut self, cx: &mut Cx<'_>) {
        for event in self.calls.on_time(cx.now) {
            self.tell(cx, event);
        }
    }
}
