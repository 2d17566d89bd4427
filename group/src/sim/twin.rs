//! A trace that is cut at every step: before each input, a core is written down and the one restored from it takes its
//! place. Another, never cut, is given the same, and both must do the same.

use crate::core::Core;
use crate::output::Output;
use crate::time::Instant;

/// One core at one step; in a run with twins, a restored one and its uncut twin.
pub(super) struct Pair {
    pub(super) core: Core,
    pub(super) uncut: Option<Core>,
    difference: Option<String>,
}

impl Pair {
    /// The image is of the step before; it is restored at `now`, and then made to `forget` something.
    pub(super) fn new(
        core: Core,
        uncut: Option<Core>,
        now: Instant,
        forget: fn(&mut Core),
    ) -> Self {
        let mut pair = Self {
            core,
            uncut,
            difference: None,
        };
        if pair.uncut.is_some() {
            let image = pair.core.snapshot(pair.core.now);
            pair.core = Core::restore(pair.core.config, &image, now)
                .expect("what was just written down can be read");
            forget(&mut pair.core);
            pair.compare("restored");
        }
        pair
    }

    pub(super) fn give(&mut self, f: impl Fn(&mut Core)) {
        f(&mut self.core);
        if let Some(uncut) = &mut self.uncut {
            f(uncut);
        }
    }

    pub(super) fn poll_output(&mut self) -> Option<Output> {
        let output = self.core.poll_output();
        if let Some(uncut) = &mut self.uncut {
            let expected = uncut.poll_output();
            if output != expected {
                self.difference
                    .get_or_insert_with(|| format!("{output:?} instead of {expected:?}"));
            }
        }
        output
    }

    /// The first difference of this step.
    pub(super) fn difference(&mut self) -> Option<String> {
        self.compare("after the step");
        self.difference.take()
    }

    fn compare(&mut self, when: &str) {
        let Some(uncut) = &self.uncut else { return };
        let (due, expected) = (self.core.poll_timeout(), uncut.poll_timeout());
        if due != expected {
            self.difference
                .get_or_insert_with(|| format!("{when}: due {due:?} instead of {expected:?}"));
        }
        let (status, expected) = (self.core.status(), uncut.status());
        if status != expected {
            self.difference
                .get_or_insert_with(|| format!("{when}: {status:?} instead of {expected:?}"));
        }
    }
}
