//! At no moment may two members emit. Moments are global here; the members' clocks drift.

use super::{Invariant, Observed};
use crate::view::MemberId;

#[derive(Default)]
pub(super) struct OneLeaderEmits;

impl Invariant for OneLeaderEmits {
    fn name(&self) -> &'static str {
        "one leader emits"
    }

    fn observe(&mut self, _who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Emitters(who) if who.len() > 1 => Err(format!("{who:?} may emit at once")),
            _ => Ok(()),
        }
    }
}
