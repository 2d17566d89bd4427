//! gbcast: at the end of a view, after all other messages of it, in one order.

use super::{Agreement, Invariant, Seen, Who};
use crate::process::Order;

#[derive(Default)]
pub(super) struct Gbcast(Agreement);

impl Invariant for Gbcast {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id,
                order: Some(Order::View),
                ..
            } => self.0.give(who, *id),
            Seen::Delivered {
                id, order: Some(_), ..
            } => {
                if let Some(gbcast) = self.0.last(who) {
                    return Err(format!("{id:?} after {gbcast:?} in one view"));
                }
            }
            Seen::View { .. } => return self.0.end(who, view),
            Seen::Left => self.0.forget(who),
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "gbcast"
    }
}
