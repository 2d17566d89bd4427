//! A joiner's state is the one at the beginning of a view, and every member's state is the same there.

use super::{Invariant, Seen, Who};
use crate::process::GroupId;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(super) struct State {
    at: BTreeMap<(GroupId, u64), u64>,
    given: BTreeSet<(GroupId, u64)>,
}

impl Invariant for State {
    fn see(&mut self, who: &Who, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Gave { view, state } => {
                self.given.insert((who.1, *state));
                let known = *self.at.entry((who.1, *view)).or_insert(*state);
                if known != *state {
                    return Err(format!("view {view}: {known:x} and {state:x}"));
                }
            }
            Seen::Restored { state } if !self.given.contains(&(who.1, *state)) => {
                return Err(format!("nobody gave {state:x}"));
            }
            Seen::View { view, state } => {
                let known = *self.at.entry((who.1, view.id)).or_insert(*state);
                if known != *state {
                    return Err(format!("view {}: {known:x} and {state:x}", view.id));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "state"
    }
}
