//! Events reach an application in the order of their numbers, without a gap and without a repetition.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Fifo {
    last: BTreeMap<MemberId, u64>,
}

impl Invariant for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Restored { applied, .. } => {
                self.last.insert(who.clone(), *applied);
            }
            Observed::Installed {
                cut,
                survivor,
                role,
                ..
            } if *role != crate::Role::Joining => {
                // As a leader it applied its own; what it applied is judged by view synchrony.
                let last = self.last.insert(who.clone(), *cut);
                if let (Some(last), true) = (last, *survivor)
                    && last > *cut
                {
                    return Err(format!("{who} had delivered {last} beyond the cut {cut}"));
                }
            }
            Observed::Delivered { number } => {
                let last = self.last.insert(who.clone(), *number).unwrap_or(0);
                if *number != last + 1 {
                    return Err(format!("{who} was given {number} after {last}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
