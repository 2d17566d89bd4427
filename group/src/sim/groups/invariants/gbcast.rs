//! gbcast: at the end of a view, after all other messages of it, in one order.

use super::{Invariant, Seen, Who};
use crate::process::{GroupId, Order};
use crate::sim::groups::program::Id;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Gbcast {
    delivered: BTreeMap<Who, Vec<Id>>,
    agreed: BTreeMap<(GroupId, u64), Vec<Id>>,
}

impl Invariant for Gbcast {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id,
                order: Some(Order::View),
                ..
            } => self.delivered.entry(who.clone()).or_default().push(*id),
            Seen::Delivered {
                id, order: Some(_), ..
            } => {
                if let Some(gbcast) = self.delivered.get(who).and_then(|d| d.last()) {
                    return Err(format!("{id:?} after {gbcast:?} in one view"));
                }
            }
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
        "gbcast"
    }
}
