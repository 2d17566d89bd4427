//! abcast: those that go on together have delivered the abcasts of the view in one order.

use super::{Invariant, Seen, Who};
use crate::process::{GroupId, Order};
use crate::sim::groups::program::Id;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Abcast {
    delivered: BTreeMap<Who, Vec<Id>>,
    /// By group and the view that ended.
    agreed: BTreeMap<(GroupId, u64), Vec<Id>>,
}

impl Invariant for Abcast {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id,
                order: Some(Order::Total(_)),
                ..
            } => self.delivered.entry(who.clone()).or_default().push(*id),
            Seen::View { .. } => {
                let mine = self.delivered.remove(who).unwrap_or_default();
                if view > 0 {
                    let agreed = self.agreed.entry((who.1, view)).or_insert(mine.clone());
                    if *agreed != mine {
                        return Err(format!("view {view}: {agreed:?} and {mine:?}"));
                    }
                }
            }
            Seen::Left => {
                self.delivered.remove(who);
            }
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "abcast"
    }
}
