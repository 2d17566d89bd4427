//! fbcast: from one sender in its order, each once, none missing in between.

use super::{Invariant, Seen, Who};
use crate::process::Order;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Fbcast(BTreeMap<(Who, u64), u64>);

impl Invariant for Fbcast {
    fn see(&mut self, who: &Who, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        if let Seen::Left = seen {
            self.0.retain(|(w, _), _| w != who);
        }
        let Seen::Delivered {
            id,
            order: Some(Order::Fifo),
            ..
        } = seen
        else {
            return Ok(());
        };
        let last = self.0.insert((*who, id.sender), id.count);
        match last {
            Some(last) if id.count != last + 1 => Err(format!("{id:?} after {last}")),
            _ => Ok(()),
        }
    }

    fn name(&self) -> &'static str {
        "fbcast"
    }
}
