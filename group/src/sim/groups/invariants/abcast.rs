//! abcast: those that go on together have delivered the abcasts of the view in one order.

use super::{Agreement, Invariant, Seen, Who};
use crate::process::Order;

#[derive(Default)]
pub(super) struct Abcast(Agreement);

impl Invariant for Abcast {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id,
                order: Some(Order::Total(_)),
                ..
            } => self.0.give(who, *id),
            Seen::View { .. } => return self.0.end(who, view),
            Seen::Left => self.0.forget(who),
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "abcast"
    }
}
