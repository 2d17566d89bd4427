//! What the leader is given to do, and whether all is as it must be.

use super::invariants::Observed;
use super::network::{below, chance};
use super::world::{Happening, World};
use crate::core::Core;
use crate::output::Lag;
use bytes::Bytes;

impl World {
    /// What the replica reports of itself from now on.
    pub(super) fn progress(&mut self, node: usize) {
        let us = 20_000 + below(&mut self.rng, 300_000);
        self.after(us, Happening::Progress { node });
        let lag = Lag {
            behind_bytes: below(&mut self.rng, 4) * below(&mut self.rng, 1 << 20),
            unfit: chance(&mut self.rng, 250),
            reluctant: false,
        };
        let n = &self.nodes[node];
        let Some(core) = n.core.as_ref().filter(|_| n.alive && !n.stopped) else {
            return;
        };
        let me = core.me().clone();
        self.observe(&me, &Observed::Progress { unfit: lag.unfit });
        self.call(node, |core, _| core.set_progress(lag));
    }

    pub(super) fn load(&mut self) {
        let us = 300 + below(&mut self.rng, 4000);
        self.after(us, Happening::Load);
        for node in 0..self.nodes.len() {
            let n = &self.nodes[node];
            let open = n.core.as_ref().is_some_and(Core::window_open);
            if !n.alive || n.stopped || !open {
                continue;
            }
            for _ in 0..=below(&mut self.rng, 2) {
                let size = match below(&mut self.rng, 30) {
                    0 => 0,
                    1 => 20_000,
                    2..=4 => below(&mut self.rng, 4000),
                    _ => below(&mut self.rng, 100),
                };
                let byte = u8::try_from(self.events % 251).expect("small");
                let len = usize::try_from(size).expect("small");
                let mut payload = vec![byte; len];
                if let Some(first) = payload.first_mut() {
                    *first = u8::try_from(below(&mut self.rng, 256)).expect("a byte");
                }
                let payload = Bytes::from(payload);
                let urgent = chance(&mut self.rng, 600);
                let number = self.nodes[node].app.applied + 1;
                self.events += 1;
                // The leader applies its own events itself, and at once.
                self.nodes[node].app.apply(number, &payload);
                self.call(node, |core, now| {
                    core.multicast(now, number, payload.clone(), urgent)
                });
            }
        }
    }

    pub(super) fn watch_emitters(&mut self) {
        let mut who = Vec::new();
        let mut speaks = Vec::new();
        for (i, n) in self.nodes.iter().enumerate() {
            // One that is stopped counts: frames may still be in its hands.
            if let (true, Some(core)) = (n.alive, &n.core)
                && core.may_emit(self.local(i, self.now))
            {
                who.push(core.me().clone());
                speaks.push((i, core.me().clone()));
            }
        }
        if who.is_empty() {
            if !self.healed {
                let silence = self.now - self.spoke_at;
                self.longest_silence_us = self.longest_silence_us.max(silence);
            }
        } else {
            for (node, me) in &speaks {
                let n = &self.nodes[*node];
                let Some(core) = &n.core else { continue };
                let clock_us = core.service_clock(self.local(*node, self.now));
                let generation = n.generation;
                let what = Observed::Clock {
                    generation,
                    clock_us,
                };
                self.observe(me, &what);
            }
            self.spoke_at = self.now;
            if who.len() > 1 {
                let first = who[0].clone();
                self.observe(&first, &Observed::Emitters(&who));
            }
        }
    }

    pub(super) fn all_is_well(&self) -> bool {
        let Some(leader) = self.leader() else {
            return false;
        };
        let Some(core) = &self.nodes[leader].core else {
            return false;
        };
        let id = self.nodes[leader].view;
        let status = core.status();
        let whole = status
            .view
            .is_some_and(|v| v.full.len() == self.nodes.len());
        let together = self.nodes.iter().all(|n| {
            n.view == id
                && n.core
                    .as_ref()
                    .is_some_and(|c| c.status().view.is_some() && !c.status().wedged)
        });
        whole && together && self.stable_since_heal && core.may_emit(self.local(leader, self.now))
    }

    pub(super) fn where_everyone_is(&self) -> String {
        let mut out = String::new();
        for n in &self.nodes {
            let Some(core) = &n.core else { continue };
            let s = core.status();
            out += &format!(
                "{}: {:?} view {:?} wedged {} held {}; ",
                core.me(),
                s.role,
                s.view.map(|v| v.id.0),
                s.wedged,
                s.held
            );
        }
        out
    }
}
