//! What is stable, what may be forgotten, and who is too slow for either.

use crate::config::planted;
use crate::core::{Core, Phase};
use crate::output::{Notice, Output};
use crate::view::MemberId;

impl Core {
    /// The highest event that every other full member holds.
    pub(crate) fn full_held(&self) -> u64 {
        let view = self.view();
        let held = self
            .peers
            .iter()
            .filter(|(m, _)| view.is_full(m))
            .map(|(_, p)| p.held);
        held.min().unwrap_or_else(|| self.log.held())
    }

    /// `k` acknowledgements make an event stable.
    pub(crate) fn update_stable(&mut self) {
        let view = self.view();
        let mut k = usize::from(view.k);
        if planted!(self.config, StableAtKMinusOne) {
            k = k.saturating_sub(1);
        }
        let mut held: Vec<u64> = self
            .peers
            .iter()
            .filter(|(m, _)| view.is_full(m))
            .map(|(_, p)| p.held)
            .collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        let stable = if k == 0 {
            self.log.held()
        } else {
            held.get(k - 1).copied().unwrap_or(0)
        };
        if stable > self.stable {
            self.stable = stable;
            self.outputs.push_back(Output::Stable { number: stable });
            if stable == self.log.held() {
                self.probe_at = None;
            }
        }
    }

    /// Forgets what every full member holds, and joiners too unless they are far too slow.
    pub(crate) fn collect(&mut self) {
        let full = self.full_held();
        let mut trim = full;
        let mut slow = Vec::new();
        for (m, p) in self
            .peers
            .iter()
            .filter(|(m, _)| self.view().joiner(m).is_some())
        {
            let bytes = self.log.bytes_between(p.held, full);
            if bytes > self.config.limits.joiner_bytes_max {
                slow.push(m.clone());
            } else if !self.dropped.contains(m) {
                trim = trim.min(p.held);
            }
        }
        for m in slow {
            self.drop_joiner(&m);
        }
        if planted!(self.config, EarlyTrim) {
            trim = self.stable;
        }
        self.trim = self.trim.max(full.min(trim));
        self.log.trim_to(trim);
    }

    pub(crate) fn drop_joiner(&mut self, joiner: &MemberId) {
        if self.phase == Phase::Leading
            && self.view().joiner(joiner).is_some()
            && self.dropped.insert(joiner.clone())
        {
            self.notice(Notice::JoinerDropped {
                member: joiner.clone(),
            });
        }
    }
}
