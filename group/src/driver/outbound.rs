//! Sealing what this node sends: its life, epoch and counter in each group. No I/O.

use std::collections::BTreeMap;

use ring::aead::LessSafeKey;

use super::header::Header;
use super::seal::{self, GroupKey};
use crate::view::MemberId;

pub(super) struct Outbound {
    rank: u8,
    key: GroupKey,
    groups: BTreeMap<u32, Own>,
}

#[derive(Default)]
struct Own {
    instance: Option<u128>,
    me: Option<MemberId>,
    epoch: u64,
    key: Option<LessSafeKey>,
    /// The last number used. It restarts with a new incarnation only, so no key ever seals two datagrams under one
    /// number, and receivers need one window a life.
    counter: u64,
}

/// Seals datagrams of one group, one after the other.
pub(super) struct Sealer<'a> {
    key: &'a LessSafeKey,
    /// Its counter is the last one used.
    header: Header,
    counter: &'a mut u64,
}

impl Outbound {
    pub(super) fn new(rank: u8, key: GroupKey) -> Self {
        Self {
            rank,
            key,
            groups: BTreeMap::new(),
        }
    }

    pub(super) fn set_member(&mut self, group: u32, me: MemberId) {
        let own = self.groups.entry(group).or_default();
        if own.me.as_ref() == Some(&me) {
            return; // its numbers must not begin again
        }
        own.me = Some(me);
        own.counter = 0;
        own.derive(&self.key);
    }

    pub(super) fn set_instance(&mut self, group: u32, instance: u128) {
        let own = self.groups.entry(group).or_default();
        if own.instance.is_some_and(|old| old != instance) {
            own.epoch = 0; // another group's views
        }
        own.instance = Some(instance);
        own.derive(&self.key);
    }

    pub(super) fn set_epoch(&mut self, group: u32, epoch: u64) {
        let own = self.groups.entry(group).or_default();
        if epoch > own.epoch {
            own.epoch = epoch;
            own.derive(&self.key);
        }
    }

    /// `None` while this node has no life in the group, or does not know its instance.
    pub(super) fn sealer(&mut self, group: u32) -> Option<Sealer<'_>> {
        let own = self.groups.get_mut(&group)?;
        let header = Header {
            rank: self.rank,
            group,
            incarnation: own.me.as_ref()?.incarnation,
            epoch: own.epoch,
            counter: own.counter,
        };
        Some(Sealer {
            key: own.key.as_ref()?,
            header,
            counter: &mut own.counter,
        })
    }
}

impl Own {
    fn derive(&mut self, key: &GroupKey) {
        self.key = match (self.instance, &self.me) {
            (Some(instance), Some(me)) => {
                Some(key.sender(instance, &me.name, me.incarnation, self.epoch))
            }
            _ => None,
        };
    }
}

impl Sealer<'_> {
    /// Appends one datagram.
    pub(super) fn seal(&mut self, out: &mut Vec<u8>, body: &[u8]) {
        *self.counter += 1;
        self.header.counter = *self.counter;
        let start = out.len();
        self.header.put(out);
        let from = out.len();
        out.extend_from_slice(body);
        seal::seal(self.key, self.header.counter, out, start, from);
    }
}
