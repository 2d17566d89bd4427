//! Messages to one member: in order, each once.

use super::{Invariant, Seen, Who};
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Direct(BTreeMap<(Who, u64), u64>);

impl Invariant for Direct {
    fn see(&mut self, who: &Who, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Left => {
                self.0.retain(|(w, _), _| w != who);
                Ok(())
            }
            Seen::Delivered {
                id,
                order: None,
                from,
            } => {
                let last = self.0.entry((*who, id.sender)).or_default();
                let expected = *last + 1;
                *last = id.count;
                if id.count == expected {
                    Ok(())
                } else {
                    Err(format!("{id:?} of {from}, expected {expected}"))
                }
            }
            _ => Ok(()),
        }
    }

    fn name(&self) -> &'static str {
        "direct"
    }
}
