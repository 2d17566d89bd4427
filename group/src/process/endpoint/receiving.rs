//! What datagrams do.

use super::{Cx, Direct, Endpoint};
use crate::config::planted;
use crate::fbcast::NAK_RANGES_MAX;
use crate::process::types::{GroupEvent, Message};
use crate::process::wire::{BLOCKED, DIRECT, Envelope, Header, Kind, Op, Small};
use crate::view::MemberId;
use crate::wire::{Chunk, Item, Piece, Pos, Reader};
use bytes::Bytes;
use std::sync::Arc;

fn spend(cx: &mut Cx<'_>, bodies: &[Bytes]) {
    let sent = bodies.iter().map(Bytes::len).sum();
    *cx.resend_left = cx.resend_left.saturating_sub(sent);
}

impl Endpoint {
    /// A datagram's items; they lie `within` it where it is worth keeping.
    pub(crate) fn on_datagram(
        &mut self,
        cx: &mut Cx<'_>,
        from: &MemberId,
        header: &Header,
        items: Reader<'_, Small>,
        within: Option<&Bytes>,
    ) {
        let Some(rank) = self.view.rank(from).filter(|r| *r != self.rank) else {
            return;
        };
        let direct = header.is_direct();
        let here = header.view == self.view.id;
        let ours = self.together.get(from) == Some(&header.view);
        if direct && !ours && !planted!(cx.config.core, OldDirects) {
            return;
        }
        for item in items {
            match item {
                Item::Chunk(chunk) if direct => {
                    self.on_direct_chunk(cx, from, header.lane, &chunk, within);
                }
                Item::Chunk(chunk) if here => {
                    self.on_chunk(cx, rank, header.lane, &chunk, within);
                }
                Item::Piece(piece) => self.on_piece(cx, from, &piece),
                Item::Message(small) => self.on_small(cx, (from, rank), header, small),
                Item::Chunk(_) | Item::Unicast(_) => {}
            }
        }
        if direct {
            self.direct(from, header.lane).inc.heed(header);
        } else if here && usize::from(header.lane) == rank {
            self.ins[rank].heed(header);
            self.feed(cx, rank);
        }
    }

    pub(super) fn direct(&mut self, with: &MemberId, lane: u8) -> &mut Direct {
        let key = (with.clone(), lane);
        self.directs.entry(key).or_insert_with(Direct::new)
    }

    fn on_chunk(
        &mut self,
        cx: &mut Cx<'_>,
        rank: usize,
        lane: u8,
        chunk: &Chunk<'_>,
        within: Option<&Bytes>,
    ) {
        let lane = usize::from(lane);
        // Another's lane is copied only while the view is being left.
        let copy = lane != rank && self.blocked.is_some() && lane != self.rank;
        if (lane != rank && !copy) || !self.takes_from(lane) {
            return;
        }
        if let Some(inc) = self.ins.get_mut(lane) {
            inc.take(cx.now, chunk, within, &cx.config.core.limits);
        }
    }

    fn on_direct_chunk(
        &mut self,
        cx: &mut Cx<'_>,
        from: &MemberId,
        lane: u8,
        chunk: &Chunk<'_>,
        within: Option<&Bytes>,
    ) {
        if lane == DIRECT && !self.takes() {
            return;
        }
        let limits = &cx.config.core.limits;
        let now = cx.now;
        let inc = &mut self.direct(from, lane).inc;
        inc.take(now, chunk, within, limits);
        let mut messages = Vec::new();
        while inc.taken < inc.log.held() {
            inc.taken += 1;
            let message = inc.log.payload(inc.taken).expect("held until taken");
            messages.extend(Envelope::take(message));
        }
        inc.log.trim_to(inc.taken);
        for (envelope, body) in messages {
            match envelope.kind {
                Kind::Direct => {
                    let message = Message {
                        from: from.clone(),
                        order: None,
                        body,
                        call: None,
                    };
                    self.emit(cx, GroupEvent::Message(message));
                }
                Kind::Reply { call, declined } => {
                    let body = (!declined).then_some(body);
                    for event in self.calls.on_reply(call, from, body) {
                        self.tell(cx, event);
                    }
                }
                Kind::Fifo
                | Kind::Causal { .. }
                | Kind::Total { .. }
                | Kind::Sequence { .. }
                | Kind::View => {}
            }
        }
    }

    fn on_small(
        &mut self,
        cx: &mut Cx<'_>,
        (from, rank): (&MemberId, usize),
        header: &Header,
        small: Small,
    ) {
        let here = header.view == self.view.id;
        match small {
            Small::Acks(acks) if here => {
                let mine = acks
                    .iter()
                    .find(|(lane, _)| usize::from(*lane) == self.rank);
                if let Some((_, held)) = mine {
                    let vouches =
                        header.flags & BLOCKED == 0 || planted!(cx.config.core, VouchAfterReport);
                    self.on_ack(cx, rank, *held, vouches);
                }
            }
            Small::DirectAck(held) if header.is_direct() => {
                let out = &mut self.direct(from, header.lane).out;
                out.acknowledged(0, held, true);
                out.collect(held);
            }
            Small::Nak(ranges) if header.is_direct() => {
                let lane = header.lane;
                let Some(direct) = self.directs.get(&(from.clone(), lane)) else {
                    return;
                };
                let header = self.direct_header(from, lane, direct);
                let mut bodies = Vec::new();
                for range in ranges.iter().take(NAK_RANGES_MAX) {
                    let limits = &cx.config.core.limits;
                    let again = direct.out.again(&header, *range, *cx.resend_left, limits);
                    spend(cx, &again);
                    bodies.extend(again);
                }
                Self::send_bodies(cx, Arc::from([from.clone()]), bodies);
            }
            Small::Nak(ranges) if here => self.on_nak(cx, from, header.lane, &ranges),
            Small::StateWanted {
                since,
                offset,
                len,
                image,
            } => self.on_state_wanted(cx, from, since, offset, len, image),
            Small::StateIs { since, image } => {
                if let Some(load) = &mut self.load
                    && load.donors.first() == Some(from)
                {
                    load.on_image(cx.now, since, image);
                }
            }
            // A fetch comes from the site leader, and the process hands it over.
            Small::Acks(_) | Small::DirectAck(_) | Small::Nak(_) | Small::Fetch { .. } => {}
        }
    }

    fn on_ack(&mut self, cx: &mut Cx<'_>, rank: usize, held: u64, vouches: bool) {
        let receiver = if rank < self.rank { rank } else { rank - 1 };
        let stable = self.out.held_by(self.safe_holders());
        if !self.out.acknowledged(receiver, held, vouches) {
            return;
        }
        self.settle_done(cx);
        self.feed(cx, self.rank);
        self.out.collect(self.own_taken);
        // Others hold back safe messages until they hear of this.
        if stable < self.safe_until && self.out.held_by(self.safe_holders()) > stable {
            let body = crate::process::lane::body(&self.header(), &[]);
            Self::send_bodies(cx, self.others.clone(), vec![body]);
        }
    }

    fn on_nak(&mut self, cx: &mut Cx<'_>, from: &MemberId, lane: u8, ranges: &[(Pos, Pos)]) {
        let mut header = self.header();
        header.lane = lane;
        let rank = usize::from(lane);
        if rank != self.rank {
            (header.sent, header.stable, header.trim) = (0, 0, 0);
        }
        let limits = &cx.config.core.limits;
        let mut bodies = Vec::new();
        for (a, b) in ranges.iter().take(NAK_RANGES_MAX) {
            let again = if rank == self.rank {
                self.out.again(&header, (*a, *b), *cx.resend_left, limits)
            } else if let Some(inc) = self.ins.get(rank)
                && a.number >= inc.log.first()
            {
                let until = (*b).min(Pos::start(inc.log.next()));
                let head = header.bytes();
                inc.log.pack(&head, *a, until, *cx.resend_left, limits).0
            } else {
                continue;
            };
            spend(cx, &again);
            bodies.extend(again);
        }
        Self::send_bodies(cx, Arc::from([from.clone()]), bodies);
    }

    fn on_state_wanted(
        &mut self,
        cx: &mut Cx<'_>,
        from: &MemberId,
        since: u64,
        offset: u64,
        len: u32,
        image: Option<u32>,
    ) {
        let header = self.header();
        let Some(donating) = self.donating.get_mut(&since) else {
            return;
        };
        if !donating.joiners.contains(from) || *cx.resend_left == 0 {
            return;
        }
        let Some((checksum, donor)) = donating.image() else {
            return;
        };
        if image == Some(checksum) {
            let limits = &cx.config.core.limits;
            let bodies = donor.pieces(&header.bytes(), since, offset, len, limits);
            spend(cx, &bodies);
            Self::send_bodies(cx, Arc::from([from.clone()]), bodies);
        } else {
            let is = Small::StateIs {
                since,
                image: checksum,
            };
            self.send_small(cx, from, &header, is);
        }
    }

    fn on_piece(&mut self, cx: &mut Cx<'_>, from: &MemberId, piece: &Piece<'_>) {
        let limits = &cx.config.core.limits;
        let Some(load) = &mut self.load else { return };
        if load.donors.first() != Some(from) {
            return;
        }
        let Some((received, total)) = load.on_piece(cx.now, piece, limits) else {
            return;
        };
        let whole = load.whole();
        let since = load.since;
        self.tell(cx, GroupEvent::Progress { received, total });
        if let Some(state) = whole {
            self.load = None;
            self.tell(cx, GroupEvent::State(state));
            self.release(cx);
            cx.requests.push(Op::Loaded {
                group: self.id,
                since,
            });
        }
    }
}
