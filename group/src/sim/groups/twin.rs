//! Processes that are cut: before an input, a process is written down and the one restored from it takes its place. Another,
//! never cut, is given the same, and both must do the same.

use crate::process::{Command, Output, Process, ProcessConfig, Refused};
use crate::time::Instant;

/// Beyond the first cuts, one input in so many is cut before, another one in every run.
const EVERY: u64 = 7;
const FIRST: u64 = 200;

/// What a snapshot would forget.
pub(super) type Forget = fn(&mut Process);

/// A process; in a run with twins, a restored one and its uncut twin.
pub(super) struct Pair {
    process: Process,
    uncut: Option<Uncut>,
}

struct Uncut {
    config: ProcessConfig,
    process: Process,
    inputs: u64,
    /// Done to every restored one: what a snapshot would forget.
    forget: Forget,
    difference: Option<String>,
}

impl Pair {
    /// `twin`: the inputs counted before the first, and what is forgotten.
    pub(super) fn new(
        config: ProcessConfig,
        seed: u64,
        now: Instant,
        twin: Option<(u64, Forget)>,
    ) -> Self {
        let uncut = twin.map(|(inputs, forget)| Uncut {
            config: config.clone(),
            process: Process::new(config.clone(), seed, now),
            inputs,
            forget,
            difference: None,
        });
        Self {
            process: Process::new(config, seed, now),
            uncut,
        }
    }

    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// An input comes, before which the process may be cut; its outputs are drained.
    pub(super) fn cut(&mut self, now: Instant) {
        if let Some(twin) = &mut self.uncut {
            twin.inputs += 1;
            if twin.inputs < FIRST || twin.inputs.is_multiple_of(EVERY) {
                let image = self.process.snapshot(now);
                self.process = Process::restore(twin.config.clone(), &image, now)
                    .expect("what was just written down can be read");
                (twin.forget)(&mut self.process);
            }
        }
    }

    pub(super) fn give(&mut self, now: Instant, f: impl Fn(&mut Process, Instant)) {
        self.cut(now);
        self.also(|p| f(p, now));
    }

    /// A command, as an input or in answer to an output.
    pub(super) fn command(&mut self, now: Instant, command: &Command) -> Result<(), Refused> {
        self.also(|p| p.handle_command(now, command.clone()))
    }

    fn also<T: PartialEq + std::fmt::Debug>(&mut self, f: impl Fn(&mut Process) -> T) -> T {
        let result = f(&mut self.process);
        if let Some(twin) = &mut self.uncut {
            let expected = f(&mut twin.process);
            twin.compare("answers", &result, &expected);
        }
        result
    }

    pub(super) fn poll_output(&mut self) -> Option<Output> {
        let output = self.process.poll_output();
        if let Some(twin) = &mut self.uncut {
            let expected = twin.process.poll_output();
            twin.compare("does", &output, &expected);
        }
        output
    }

    /// The first difference so far; asked for when the outputs are drained.
    pub(super) fn difference(&mut self) -> Option<String> {
        let twin = self.uncut.as_mut()?;
        let due = (self.process.poll_timeout(), twin.process.poll_timeout());
        twin.compare("is due", &due.0, &due.1);
        let status = (self.process.status(), twin.process.status());
        twin.compare("is", &status.0, &status.1);
        twin.difference.take()
    }
}

impl Uncut {
    fn compare<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, restored: &T, uncut: &T) {
        if restored != uncut {
            self.difference
                .get_or_insert_with(|| format!("{what} {restored:?} instead of {uncut:?}"));
        }
    }
}
