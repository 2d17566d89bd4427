//! Of those that can lead, one that is fit does. Judged where both were what they were since before the view that was
//! left: who changes in it may be known as it was.

use super::{Invariant, Observed};
use crate::output::Role;
use crate::view::MemberId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Fitness {
    /// The newest view of anyone.
    newest: u64,
    /// Whether it is unfit, and the newest view when that changed.
    unfit: BTreeMap<MemberId, (bool, u64)>,
    views: BTreeMap<u64, Vec<MemberId>>,
}

impl Fitness {
    /// Whether it was `unfit` since before this view.
    fn was(&self, who: &MemberId, unfit: bool, view: u64) -> bool {
        let (now, since) = self.unfit.get(who).copied().unwrap_or_default();
        now == unfit && since < view
    }
}

impl Invariant for Fitness {
    fn name(&self) -> &'static str {
        "fitness"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Progress { unfit } if !self.was(who, *unfit, u64::MAX) => {
                self.unfit.insert(who.clone(), (*unfit, self.newest));
            }
            Observed::Installed {
                view,
                full,
                role,
                survivor,
                ..
            } => {
                self.newest = self.newest.max(*view);
                self.views.insert(*view, full.to_vec());
                let left = view - 1;
                let Some(before) = self.views.get(&left) else {
                    return Ok(());
                };
                let new = *role == Role::Leader && *survivor && before.first() != Some(who);
                if new && self.was(who, true, left) {
                    let backups = before.iter().skip(1).filter(|m| full.contains(m));
                    let mut fit = backups.filter(|m| self.was(m, false, left));
                    if let Some(fitter) = fit.next() {
                        return Err(format!("{who} leads view {view}, and {fitter} is fit"));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
