//! A safe message that anybody delivered is delivered by all that go on, unless half of the members failed.

use super::{Invariant, Seen, Who};
use crate::process::GroupId;
use crate::sim::groups::program::Id;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(super) struct Safe {
    members: BTreeMap<(GroupId, u64), usize>,
    /// By view: delivered by anybody.
    anybody: BTreeMap<(GroupId, u64), BTreeSet<Id>>,
    mine: BTreeMap<Who, BTreeSet<Id>>,
    /// Views that ended with enough members left, and what they ended with.
    ended: BTreeMap<(GroupId, u64), BTreeSet<Id>>,
}

impl Invariant for Safe {
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Delivered {
                id, order: Some(_), ..
            } if id.safe => {
                self.mine.entry(*who).or_default().insert(*id);
                self.anybody.entry((who.1, view)).or_default().insert(*id);
                if let Some(ended) = self.ended.get(&(who.1, view))
                    && !ended.contains(id)
                {
                    return Err(format!("{id:?} in view {view}, which ended without it"));
                }
            }
            Seen::View { view: next, .. } => {
                let mine = self.mine.remove(who).unwrap_or_default();
                self.members.insert((who.1, next.id), next.members.len());
                let n = self.members.get(&(who.1, view)).copied().unwrap_or(0);
                if view > 0 && next.departed.len() <= n / 2 {
                    let anybody = self.anybody.get(&(who.1, view));
                    let lost = anybody.and_then(|a| a.difference(&mine).next());
                    if let Some(lost) = lost {
                        return Err(format!(
                            "{lost:?} was delivered in view {view}, and not here"
                        ));
                    }
                    self.ended.insert((who.1, view), mine);
                }
            }
            Seen::Left => {
                self.mine.remove(who);
            }
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "safe"
    }
}
