//! What was once stable is in every later view of its generation, with the same content.

use super::{Invariant, Observed};
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct StableSurvives {
    /// By generation: the highest stable number of each view, and the digest of the state there.
    stable: BTreeMap<u32, BTreeMap<u64, (u64, u64)>>,
    /// By generation: the cut of each view that anyone installed.
    cuts: BTreeMap<u32, BTreeMap<u64, u64>>,
}

impl Invariant for StableSurvives {
    fn name(&self) -> &'static str {
        "stable survives"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Stable {
                generation,
                view,
                number,
                chain,
            } => {
                let of = self.stable.entry(*generation).or_default();
                let entry = of.entry(*view).or_insert((*number, *chain));
                if entry.0 < *number {
                    *entry = (*number, *chain);
                }
                let cuts = self.cuts.entry(*generation).or_default();
                if let Some((later, cut)) = cuts.range(view + 1..).find(|(_, cut)| **cut < *number)
                {
                    return Err(format!(
                        "{who} took {number} for stable in view {view}; view {later} cut at {cut}"
                    ));
                }
            }
            Observed::Installed {
                generation,
                view,
                cut,
                survivor,
                chain_at,
                ..
            } => {
                self.cuts
                    .entry(*generation)
                    .or_default()
                    .insert(*view, *cut);
                let of = self.stable.entry(*generation).or_default();
                for (earlier, (number, chain)) in of.range(..view) {
                    if number > cut {
                        return Err(format!(
                            "{number} was stable in view {earlier}; {who} installs {view} cut at {cut}"
                        ));
                    }
                    let here = chain_at(*number);
                    if *survivor && here.is_some_and(|here| here != *chain) {
                        return Err(format!("{who} holds something else as {number}"));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
