//! cbcast (and abcast, which respects causality): after everything of its thread that its sender had delivered or sent.

use super::{Invariant, Seen, Who};
use crate::process::{GroupId, Order, ThreadId};
use crate::sim::groups::program::Id;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(super) struct Cbcast {
    /// What each member has delivered or sent in its view, by thread.
    past: BTreeMap<(Who, ThreadId), BTreeSet<Id>>,
    delivered: BTreeMap<(Who, ThreadId), BTreeSet<Id>>,
    /// The view of a message's sender, and what it had seen then.
    before: BTreeMap<(GroupId, Id), (u64, BTreeSet<Id>)>,
}

fn thread(order: Order) -> Option<ThreadId> {
    match order {
        Order::Causal(t) | Order::Total(t) => Some(t),
        Order::Fifo | Order::View => None,
    }
}

impl Invariant for Cbcast {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Sent { id, order } => {
                let Some(t) = thread(*order) else {
                    return Ok(());
                };
                let past = self.past.entry((*who, t)).or_default();
                self.before.insert((who.1, *id), (view, past.clone()));
                past.insert(*id);
            }
            Seen::Delivered {
                id,
                order: Some(order),
                ..
            } => {
                let Some(t) = thread(*order) else {
                    return Ok(());
                };
                let key = (*who, t);
                let here = self.delivered.entry(key).or_default();
                if let Some((sent_in, before)) = self.before.get(&(who.1, *id))
                    && *sent_in == view
                    && let Some(missing) = before.difference(here).next()
                {
                    return Err(format!("{id:?} before {missing:?}"));
                }
                here.insert(*id);
                self.past.entry(key).or_default().insert(*id);
            }
            Seen::View { .. } | Seen::Left => {
                self.past.retain(|(w, _), _| w != who);
                self.delivered.retain(|(w, _), _| w != who);
            }
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "cbcast"
    }
}
