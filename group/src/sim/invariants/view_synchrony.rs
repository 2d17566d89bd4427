//! Whoever installs a view as a survivor stands exactly at its cut, with the same state as every other survivor.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct ViewSynchrony {
    states: BTreeMap<u64, (MemberId, u64, u64)>,
}

impl Invariant for ViewSynchrony {
    fn name(&self) -> &'static str {
        "view synchrony"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        let Observed::Installed {
            view,
            cut,
            survivor: true,
            applied,
            chain,
            ..
        } = what
        else {
            return Ok(());
        };
        if applied != cut {
            return Err(format!(
                "{who} installs view {view} at {applied}, the cut is {cut}"
            ));
        }
        let first = self
            .states
            .entry(*view)
            .or_insert_with(|| (who.clone(), *cut, *chain));
        if (first.1, first.2) != (*cut, *chain) {
            return Err(format!(
                "{who} and {} install view {view} with different states",
                first.0
            ));
        }
        Ok(())
    }
}
