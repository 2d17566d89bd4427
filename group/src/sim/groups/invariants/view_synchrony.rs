//! Those that go from one view to the next have delivered the same messages in it; a view is the same for all.

use super::{Invariant, Seen, Who};
use crate::process::{GroupId, GroupView};
use crate::sim::groups::program::Id;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(super) struct ViewSynchrony {
    delivered: BTreeMap<Who, BTreeSet<Id>>,
    agreed: BTreeMap<(GroupId, u64), BTreeSet<Id>>,
    views: BTreeMap<(GroupId, u64), GroupView>,
}

impl Invariant for ViewSynchrony {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id, order: Some(_), ..
            } if !self.delivered.entry(*who).or_default().insert(*id) => {
                return Err(format!("{id:?} twice"));
            }
            Seen::View { view: next, .. } => {
                let mine = self.delivered.remove(who).unwrap_or_default();
                if view > 0 {
                    if next.id != view + 1 {
                        return Err(format!("view {} after {view}", next.id));
                    }
                    let agreed = self.agreed.entry((who.1, view)).or_insert(mine.clone());
                    if *agreed != mine {
                        let differ: Vec<_> = agreed.symmetric_difference(&mine).collect();
                        return Err(format!("view {view} ends differently: {differ:?}"));
                    }
                }
                let key = (who.1, next.id);
                let known = self.views.entry(key).or_insert_with(|| (*next).clone());
                if *known != **next {
                    return Err(format!("{known:?} and {next:?}"));
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
        "view synchrony"
    }
}
