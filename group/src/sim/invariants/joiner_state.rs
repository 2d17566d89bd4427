//! A joiner restores exactly the state that the leader gave it.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct JoinerState {
    /// By joiner and the event at which the checkpoint stands. (A leader that was stopped may give one for a view that
    /// is over; nobody restores it.)
    gave: BTreeMap<(MemberId, u64), u64>,
}

impl Invariant for JoinerState {
    fn name(&self) -> &'static str {
        "joiner state"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Gave {
                joiner,
                applied,
                chain,
            } => {
                self.gave.insert(((*joiner).clone(), *applied), *chain);
            }
            Observed::Restored { applied, chain } => {
                let given = self.gave.get(&(who.clone(), *applied));
                if given != Some(chain) {
                    return Err(format!("{who} restored {applied}, given was {given:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
