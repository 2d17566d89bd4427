//! One process's membership in one group: its lanes, what waits for its turn, and the change from view to view.
//!
//! What datagrams do is in `receiving.rs`, what goes out in `sending.rs`.

mod receiving;
mod sending;
mod snapshot;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use self::snapshot::FORGETTING;

use super::abcast::Total;
use super::cbcast::{Pending, Threads};
use super::lane::{Allowance, Incoming, Outgoing};
use super::ledger::Begun;
use super::loading::{Donating, Load};
use super::replies::Calls;
use super::types::{
    CallRef, Calling, GroupEvent, GroupId, GroupView, Message, Multicast, Order, Output,
    ProcessConfig,
};
use super::wire::{Envelope, Kind, Op};
use crate::config::planted;
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// What an endpoint works with during one input.
pub(crate) struct Cx<'a> {
    pub(crate) now: Instant,
    pub(crate) config: &'a ProcessConfig,
    pub(crate) out: &'a mut VecDeque<Output>,
    /// Requests for the ledger.
    pub(crate) requests: &'a mut Vec<Op>,
    /// Bytes that may be sent again because of the datagram that is being taken.
    pub(crate) resend_left: &'a mut usize,
    pub(crate) allowance: &'a mut Allowance,
}

/// What a waiting message costs besides its body.
const EVENT_BYTES: u64 = 64;

/// Of one sender, bytes of cbcasts and abcasts that wait for their turn, and of gbcasts that wait for the end of the view.
const KEPT_BYTES_MAX: u64 = 64 << 20;

/// Messages between two members.
#[derive(Serialize, Deserialize)]
struct Direct {
    out: Outgoing,
    inc: Incoming,
}

impl Direct {
    fn new() -> Self {
        Self {
            out: Outgoing::new(1),
            inc: Incoming::new(),
        }
    }
}

/// The view is being left.
#[derive(Serialize, Deserialize)]
struct Blocked {
    /// Lanes to be fetched from other members than their sender.
    holders: BTreeMap<u8, u8>,
}

/// One membership.
#[derive(Serialize, Deserialize)]
pub(crate) struct Endpoint {
    pub(crate) id: GroupId,
    me: MemberId,
    view: GroupView,
    rank: usize,
    /// The members of the view but this one.
    #[serde(with = "crate::process::snapshot::shared")]
    others: Arc<[MemberId]>,
    out: Outgoing,
    /// How far this member's own lane was given to the ordering.
    own_taken: u64,
    /// By rank; the one at this member's own is unused.
    ins: Vec<Incoming>,
    threads: Threads,
    total: Total,
    /// gbcasts that wait for the end of the view: rank and number.
    gbcasts: BTreeMap<(u8, u64), (Bytes, Option<Calling>)>,
    /// By rank, their bytes.
    gbcast_bytes: Vec<u64>,
    /// This member's own among them, sent again in the next view if it comes too late for this one.
    own_gbcasts: VecDeque<(u64, Multicast)>,
    /// By member and lane: messages and replies.
    directs: BTreeMap<(MemberId, u8), Direct>,
    /// Of each member, the first view with both of us: it tells our direct lanes from those of an earlier membership.
    together: BTreeMap<MemberId, u64>,
    /// Messages that wait for the next view.
    queue: VecDeque<Multicast>,
    queue_bytes: u64,
    /// By stability wanted, numbers in this member's lane and the sender's own numbers.
    done: BTreeMap<usize, VecDeque<(u64, u64)>>,
    calls: Calls,
    blocked: Option<Blocked>,
    leaving: Leaving,
    load: Option<Load>,
    donating: BTreeMap<u64, Donating>,
    /// What happens before the state is there.
    buffered: VecDeque<GroupEvent>,
    buffered_bytes: u64,
    paused: bool,
    refused: Refusals,
    expelled: BTreeSet<MemberId>,
    /// The last message of this member's lane that others deliver only when they hear that it is stable.
    safe_until: u64,
    slow_after: Option<Duration>,
    buffer_bytes_max: u64,
}

/// What was refused for want of room, and not yet told that there is some.
#[derive(Default, Serialize, Deserialize)]
struct Refusals {
    multicast: bool,
    call: bool,
    directs: BTreeSet<MemberId>,
}

#[derive(Copy, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Leaving {
    No,
    /// When all hold what this member sent.
    Wished,
    Asked,
}

impl Endpoint {
    /// This process joined.
    pub(crate) fn new(cx: &mut Cx<'_>, me: &MemberId, begun: &Begun) -> Self {
        let mut endpoint = Self {
            id: begun.group,
            me: me.clone(),
            view: GroupView {
                id: 0,
                members: Vec::new(),
                joined: Vec::new(),
                departed: Vec::new(),
            },
            rank: 0,
            others: Arc::from([]),
            out: Outgoing::new(0),
            own_taken: 0,
            ins: Vec::new(),
            threads: Threads::new(0),
            total: Total::new(0),
            gbcasts: BTreeMap::new(),
            gbcast_bytes: Vec::new(),
            own_gbcasts: VecDeque::new(),
            directs: BTreeMap::new(),
            together: BTreeMap::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            done: BTreeMap::new(),
            calls: Calls::default(),
            blocked: None,
            leaving: Leaving::No,
            load: None,
            donating: BTreeMap::new(),
            buffered: VecDeque::new(),
            buffered_bytes: 0,
            paused: false,
            refused: Refusals::default(),
            expelled: BTreeSet::new(),
            safe_until: 0,
            slow_after: cx.config.slow_after,
            buffer_bytes_max: cx.config.core.limits.joiner_buffer_bytes_max,
        };
        endpoint.tell(
            cx,
            GroupEvent::Joined {
                name: begun.name.clone(),
            },
        );
        endpoint.begin(cx, begun);
        endpoint
    }

    /// An event that does not wait for the state.
    fn tell(&self, cx: &mut Cx<'_>, event: GroupEvent) {
        cx.out.push_back(Output::Group {
            group: self.id,
            event,
        });
    }

    /// An event in the order that the state is part of.
    fn emit(&mut self, cx: &mut Cx<'_>, event: GroupEvent) {
        if self.load.is_some() {
            if let GroupEvent::Message(m) = &event {
                self.buffered_bytes += m.body.len() as u64 + EVENT_BYTES;
            }
            self.buffered.push_back(event);
        } else {
            self.tell(cx, event);
        }
    }

    // ---- ordering ----------------------------------------------------------------------------------------------

    /// Gives the ordering what a lane holds, and delivers what can be. While the view is being left nothing is delivered:
    /// what this member has delivered must be within what it reported.
    fn feed(&mut self, cx: &mut Cx<'_>, rank: usize) {
        if self.blocked.is_some() && !planted!(cx.config.core, DeliverWhileBlocked) {
            return;
        }
        let held = self.held_of(rank);
        self.take_lane(cx, rank, held, false);
        self.drain(cx, true);
        self.send_sequence(cx);
    }

    fn held_of(&self, rank: usize) -> u64 {
        if rank == self.rank {
            self.out.log.held()
        } else {
            self.ins[rank].log.held()
        }
    }

    /// Half of the others: what is held by so many outlives fewer failures than that.
    fn safe_holders(&self) -> usize {
        self.view.members.len() / 2
    }

    fn take_lane(&mut self, cx: &mut Cx<'_>, rank: usize, until: u64, ending: bool) {
        let own = rank == self.rank;
        let stable = if own {
            self.out.held_by(self.safe_holders())
        } else {
            self.ins[rank].stable
        };
        loop {
            let (taken, log) = if own {
                (self.own_taken, &self.out.log)
            } else {
                (self.ins[rank].taken, &self.ins[rank].log)
            };
            if taken >= until {
                break;
            }
            let number = taken + 1;
            let message = log.payload(number).expect("held until it is taken");
            let message = Envelope::take(message);
            let safe = message.as_ref().is_some_and(|(e, _)| e.safe);
            if safe && number > stable && !ending && !planted!(cx.config.core, SafeAtOnce) {
                break;
            }
            if own {
                self.own_taken = number;
            } else {
                self.ins[rank].taken = number;
            }
            // What cannot be read is passed over: its sender is at fault, and all members pass it over.
            if let Some((envelope, body)) = message {
                self.take(cx, rank, number, envelope, body);
            }
        }
        if own {
            self.out.collect(self.own_taken);
        } else {
            self.ins[rank].collect();
        }
    }

    fn take(&mut self, cx: &mut Cx<'_>, rank: usize, number: u64, envelope: Envelope, body: Bytes) {
        let call = envelope.call;
        match envelope.kind {
            Kind::Fifo => self.deliver(cx, rank, Order::Fifo, body, call),
            Kind::Causal { thread, .. } if planted!(cx.config.core, CausalAtOnce) => {
                self.deliver(cx, rank, Order::Causal(thread), body, call);
            }
            Kind::Causal { thread, stamp } => {
                let pending = Pending {
                    stamp,
                    total: false,
                    body,
                    call,
                };
                self.threads.insert(thread, rank, pending);
            }
            Kind::Total { thread, stamp } => {
                let pending = Pending {
                    stamp,
                    total: true,
                    body,
                    call,
                };
                self.threads.insert(thread, rank, pending);
            }
            Kind::Sequence { first, ids, token } => {
                if rank != self.rank {
                    self.total.insert(first, ids, token);
                }
            }
            Kind::View if planted!(cx.config.core, GbcastAtOnce) => {
                self.deliver(cx, rank, Order::View, body, call);
            }
            Kind::View => {
                if let Some(kept) = self.gbcast_bytes.get_mut(rank) {
                    *kept += EVENT_BYTES + body.len() as u64;
                }
                let rank = u8::try_from(rank).expect("MEMBERS_MAX");
                self.gbcasts.insert((rank, number), (body, call));
            }
            Kind::Direct | Kind::Reply { .. } => {}
        }
    }

    fn drain(&mut self, cx: &mut Cx<'_>, place: bool) {
        loop {
            if let Some((thread, rank, p)) = self.threads.next_causal() {
                self.deliver(cx, rank, Order::Causal(thread), p.body, p.call);
            } else if let Some((thread, rank, p)) = self.total.next(&mut self.threads, place) {
                self.deliver(cx, rank, Order::Total(thread), p.body, p.call);
            } else {
                break;
            }
        }
    }

    fn deliver(
        &mut self,
        cx: &mut Cx<'_>,
        rank: usize,
        order: Order,
        body: Bytes,
        call: Option<Calling>,
    ) {
        let from = self.view.members[rank].clone();
        let call = call.map(|c| CallRef {
            caller: from.clone(),
            call: c.call,
        });
        let message = Message {
            from,
            order: Some(order),
            body,
            call,
        };
        self.emit(cx, GroupEvent::Message(message));
    }

    /// As [`Self::takes`], of this sender: one whose messages wait and wait for their turn, or for the end of the view, is at
    /// fault, or others are late. What it sends beyond the bound is not taken until then, so that its own window fills.
    fn takes_from(&self, rank: usize) -> bool {
        let kept = self.threads.kept_bytes(rank) + self.gbcast_bytes.get(rank).unwrap_or(&0);
        self.takes() && (self.blocked.is_some() || kept < KEPT_BYTES_MAX)
    }

    /// Whether messages are taken. A program that does not keep up takes none, and neither does a joiner that keeps too many
    /// for when its state is there; but what the end of a view needs is always taken.
    fn takes(&self) -> bool {
        self.blocked.is_some() || !(self.paused || self.buffered_bytes >= self.buffer_bytes_max)
    }

    // ---- views -------------------------------------------------------------------------------------------------

    /// The view is being left.
    pub(crate) fn block(&mut self) {
        self.blocked.get_or_insert(Blocked {
            holders: BTreeMap::new(),
        });
    }

    /// What this member holds of each lane of the view that is being left.
    pub(crate) fn report(&self) -> Option<Vec<u64>> {
        self.blocked.as_ref()?;
        Some(
            (0..self.view.members.len())
                .map(|r| self.held_of(r))
                .collect(),
        )
    }

    /// Whether this member holds what a leader says that every survivor holds.
    pub(crate) fn holds(&self, cut: &[u64]) -> bool {
        cut.len() == self.view.members.len()
            && cut
                .iter()
                .enumerate()
                .all(|(rank, last)| self.held_of(rank) >= *last)
    }

    /// The next view begins. `false`: without this member.
    pub(crate) fn install(&mut self, cx: &mut Cx<'_>, begun: &Begun) -> bool {
        let stays = begun.view.members.contains(&self.me);
        if let (Some(cut), true) = (&begun.cut, stays) {
            self.end(cx, cut, &begun.gbcasts);
        }
        if !stays {
            self.load = None;
            let wished = begun.wished.contains(&self.me);
            self.tell(cx, GroupEvent::Left { wished });
            return false;
        }
        // Every survivor holds what this member sent in the view that ends.
        for (_, queue) in std::mem::take(&mut self.done) {
            for (_, number) in queue {
                self.tell(cx, GroupEvent::Done { number });
            }
        }
        for event in self.calls.on_departed(&begun.view.departed) {
            self.tell(cx, event);
        }
        self.forget_directs(cx, &begun.view.members);
        self.begin(cx, begun);
        let again = std::mem::take(&mut self.own_gbcasts);
        for (_, m) in again.into_iter().rev() {
            self.queue.push_front(m);
        }
        // Taken out first: one with a thread too many goes back, and waits for the view after this.
        self.queue_bytes = 0;
        for m in std::mem::take(&mut self.queue) {
            self.send(cx, m);
        }
        true
    }

    /// Delivers exactly up to the cut, and what then has no order in a fixed one.
    fn end(&mut self, cx: &mut Cx<'_>, cut: &[u64], gbcasts: &[(u8, u64)]) {
        for (rank, last) in cut.iter().enumerate() {
            let held = self.held_of(rank);
            assert!(held >= *last, "a cut is what every survivor has reported");
            self.take_lane(cx, rank, *last, true);
        }
        self.drain(cx, false);
        while let Some((thread, rank, p)) = self.total.next_at_end(&mut self.threads) {
            self.deliver(cx, rank, Order::Total(thread), p.body, p.call);
            self.drain(cx, false);
        }
        for key in gbcasts {
            if let Some((body, call)) = self.gbcasts.remove(key) {
                let (rank, number) = *key;
                if usize::from(rank) == self.rank
                    && let Some(i) = self.own_gbcasts.iter().position(|(n, _)| *n == number)
                    && let Some((_, own)) = self.own_gbcasts.remove(i)
                {
                    let called = own.calling.map(|c| c.call);
                    if let Some(event) = called.and_then(|c| self.calls.on_delivered(c)) {
                        self.tell(cx, event);
                    }
                    if let Some((number, _)) = own.done {
                        self.tell(cx, GroupEvent::Done { number });
                    }
                }
                self.deliver(cx, usize::from(rank), Order::View, body, call);
            }
        }
    }

    /// Fresh lanes and clocks for a view.
    fn begin(&mut self, cx: &mut Cx<'_>, begun: &Begun) {
        self.view = begun.view.clone();
        self.rank = self.view.rank(&self.me).expect("the caller checked it");
        let ranks = self.view.members.len();
        self.others = self
            .view
            .members
            .iter()
            .filter(|m| **m != self.me)
            .cloned()
            .collect();
        self.together.retain(|m, _| begun.view.members.contains(m));
        for m in self.others.iter() {
            self.together.entry(m.clone()).or_insert(begun.view.id);
        }
        self.out = Outgoing::new(ranks - 1);
        self.own_taken = 0;
        self.ins = (0..ranks).map(|_| Incoming::new()).collect();
        self.threads = Threads::new(ranks);
        self.total = Total::new(if planted!(cx.config.core, TwoTokens) {
            self.rank.saturating_sub(1)
        } else {
            self.rank
        });
        self.gbcasts.clear();
        self.gbcast_bytes = vec![0; ranks];
        self.blocked = None;
        self.expelled.clear();
        self.safe_until = 0;
        self.follow_loading(cx, begun);
        self.follow_donating(cx, begun);
        self.emit(cx, GroupEvent::View(begun.view.clone()));
    }

    /// Whether this member has the state, or who gives it.
    fn follow_loading(&mut self, cx: &mut Cx<'_>, begun: &Begun) {
        let mine = begun.loading.get(&self.me);
        let joined = begun.view.joined.contains(&self.me);
        match (mine, &mut self.load) {
            (Some(loading), Some(load)) if load.since == loading.since => {
                load.donors.clone_from(&loading.donors);
            }
            (Some(loading), Some(_)) => {
                // All donors are gone: the state of this view comes instead, and what happened before is in it.
                self.forget_what_the_state_holds(cx);
                self.load = Some(Load::new(cx.now, loading));
            }
            (Some(loading), None) if joined => self.load = Some(Load::new(cx.now, loading)),
            // The state is here and the ledger has not heard of it; but nobody else has it, and the state was begun anew.
            (Some(loading), None) if begun.init.is_some() => {
                self.load = Some(Load::new(cx.now, loading));
            }
            (Some(_), None) => {}
            (None, _) => {
                if begun.init.as_ref() == Some(&self.me) {
                    self.forget_what_the_state_holds(cx);
                    self.load = None;
                    self.tell(cx, GroupEvent::Init);
                    self.release(cx);
                }
            }
        }
    }

    fn forget_what_the_state_holds(&mut self, cx: &mut Cx<'_>) {
        self.buffered_bytes = 0;
        for event in std::mem::take(&mut self.buffered) {
            match event {
                GroupEvent::Message(m) if m.order.is_none() => {
                    self.buffered.push_back(GroupEvent::Message(m));
                }
                // The program never sees it, so no answer will come.
                GroupEvent::Message(Message { call: Some(to), .. }) => {
                    let declined = self.reply(cx, &to, None);
                    declined.expect("an empty reply is not too large");
                }
                _ => {}
            }
        }
    }

    /// Lets go what waited for the state.
    fn release(&mut self, cx: &mut Cx<'_>) {
        if planted!(cx.config.core, JoinerForgets) {
            self.buffered
                .retain(|e| !matches!(e, GroupEvent::Message(_)));
        }
        self.buffered_bytes = 0;
        for event in std::mem::take(&mut self.buffered) {
            self.tell(cx, event);
        }
    }

    fn follow_donating(&mut self, cx: &mut Cx<'_>, begun: &Begun) {
        self.donating.retain(|since, d| {
            d.joiners
                .retain(|m| begun.loading.get(m).is_some_and(|l| l.since == *since));
            !d.joiners.is_empty()
        });
        let view = begun.view.id;
        let mut joiners = BTreeSet::new();
        for (m, l) in &begun.loading {
            if l.since == view && l.donors.contains(&self.me) {
                joiners.insert(m.clone());
            }
        }
        if !joiners.is_empty() {
            let mut donating = Donating::new();
            donating.joiners = joiners;
            self.donating.insert(view, donating);
            self.emit(cx, GroupEvent::StateWanted { view });
        }
    }

    /// A joiner has the state.
    pub(crate) fn on_loaded(&mut self, member: &MemberId) {
        self.donating.retain(|_, d| {
            d.joiners.remove(member);
            !d.joiners.is_empty()
        });
    }

    /// This process is out of the site group: the membership ends with it.
    pub(crate) fn on_outside(&self, cx: &mut Cx<'_>) {
        self.tell(cx, GroupEvent::Left { wished: false });
    }
}
