//! What a process does in its groups: sends in all orders, calls, answers, joins and leaves, keeps a state.

use crate::process::{GroupEvent, Message, Order};
use crate::sim::app::mix;
use crate::view::MemberId;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::BTreeMap;

/// What a message's body says: who sent it and which of its messages of this kind it is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id {
    pub(super) sender: u64,
    pub(super) kind: u8,
    pub(super) count: u64,
    pub(super) safe: bool,
}

impl Id {
    pub(super) fn body(self, size: usize) -> Bytes {
        let mut out = BytesMut::with_capacity(18 + size);
        out.put_u64(self.sender);
        out.put_u8(self.kind);
        out.put_u64(self.count);
        out.put_u8(u8::from(self.safe));
        out.resize(18 + size, 7);
        out.freeze()
    }

    pub(super) fn read(body: &Bytes) -> Self {
        let mut body = body.clone();
        // Only nonsense is shorter.
        Self {
            sender: body.try_get_u64().unwrap_or(0),
            kind: body.try_get_u8().unwrap_or(0),
            count: body.try_get_u64().unwrap_or(0),
            safe: body.try_get_u8().unwrap_or(0) != 0,
        }
    }

    fn digest(self) -> u64 {
        mix(mix(self.sender ^ u64::from(self.kind)) ^ self.count)
    }
}

pub(super) const DIRECT: u8 = 255;

/// The kind of an order: each is numbered apart.
pub(super) fn kind(order: Order) -> u8 {
    match order {
        Order::Fifo => 0,
        Order::View => 1,
        Order::Causal(t) => 10 + u8::try_from(t.0).unwrap_or(0),
        Order::Total(t) => 20 + u8::try_from(t.0).unwrap_or(0),
    }
}

/// One process's side of one group.
#[derive(Default)]
pub(super) struct Program {
    /// View, once the state is there.
    pub(super) view: u64,
    pub(super) members: Vec<MemberId>,
    /// The state: the same set of messages gives the same, in whatever order they came.
    pub(super) state: u64,
    pub(super) has_state: bool,
    pub(super) sent: BTreeMap<u8, u64>,
    pub(super) direct_sent: BTreeMap<MemberId, u64>,
    pub(super) open_calls: BTreeMap<u64, bool>,
    pub(super) awaited: BTreeMap<u64, bool>,
    pub(super) next_number: u64,
    pub(super) leaving: bool,
    /// Tells this membership from others of the same process.
    pub(super) sender: u64,
}

impl Program {
    /// Takes an event into the state.
    pub(super) fn take(&mut self, event: &GroupEvent) {
        match event {
            GroupEvent::Init => {
                (self.state, self.has_state) = (1, true);
            }
            GroupEvent::State(bytes) => {
                self.state = bytes.clone().try_get_u64().unwrap_or(0);
                self.has_state = true;
            }
            GroupEvent::View(view) => {
                self.view = view.id;
                self.members.clone_from(&view.members);
                self.direct_sent.retain(|m, _| view.members.contains(m));
                // The same at all members, as the view is.
                self.state = mix(self.state ^ view.id);
            }
            GroupEvent::Message(Message {
                order: Some(_),
                body,
                ..
            }) => self.state = self.state.wrapping_add(Id::read(body).digest()),
            _ => {}
        }
    }

    pub(super) fn image(&self, size: usize) -> Vec<Bytes> {
        let mut out = BytesMut::new();
        out.put_u64(self.state);
        out.resize(8 + size, 3);
        vec![out.freeze()]
    }
}
