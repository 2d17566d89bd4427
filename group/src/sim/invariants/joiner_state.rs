//! A joiner restores exactly the state that the leader gave it.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct JoinerState {
    gave: BTreeMap<MemberId, (u64, u64)>,
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
                self.gave.insert((*joiner).clone(), (*applied, *chain));
            }
            Observed::Restored { applied, chain } => {
                if self.gave.get(who) != Some(&(*applied, *chain)) {
                    return Err(format!(
                        "{who} restored {applied}, given was {:?}",
                        self.gave.get(who)
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
