//! R4: the service clock of whoever may emit is never behind what anyone emitted before in this generation.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Clock {
    highest: BTreeMap<u32, u64>,
}

impl Invariant for Clock {
    fn name(&self) -> &'static str {
        "service clock"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        let Observed::Clock {
            generation,
            clock_us,
        } = what
        else {
            return Ok(());
        };
        let highest = self.highest.entry(*generation).or_default();
        if clock_us < highest {
            return Err(format!("{who} speaks at {clock_us} after {highest}"));
        }
        *highest = *clock_us;
        Ok(())
    }
}
