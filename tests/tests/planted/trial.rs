//! One test, run once.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::build::Tests;
use crate::hunts::Hunt;

/// Between two looks at whether the test has ended.
const LOOK: Duration = Duration::from_millis(20);
/// Of what a test said, so much is shown.
const SAID_LINES_MAX: usize = 3;
const SAID_MAX: usize = 160;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Passed,
    Failed,
    Deadline,
}

#[derive(Debug, Clone)]
pub(crate) struct Trial {
    pub(crate) ended: Ended,
    pub(crate) took: Duration,
    /// The first thing that a failed test said.
    pub(crate) said: String,
}

impl Tests {
    /// Runs the test of a hunt, with a defect or without. What it prints is kept in a file.
    pub(crate) fn run(
        &self,
        hunt: &Hunt,
        fault: Option<&str>,
        deadline: Duration,
    ) -> Result<Trial> {
        let program = self.program(hunt)?;
        let name = match fault {
            Some(fault) => fault.replace('/', "-"),
            None => format!("sound-{}", hunt.test().replace(['/', ' ', ':'], "-")),
        };
        let path = self.logs.join(format!("{name}.log"));
        let log = File::create(&path).with_context(|| format!("writing {}", path.display()))?;
        let mut command = Command::new(&program.path);
        command.args(["--exact", hunt.case, "--nocapture"]);
        command.current_dir(&program.folder);
        command.env_remove(unbroken_planted::VARIABLE);
        command.envs(fault.map(|fault| (unbroken_planted::VARIABLE, fault)));
        command.envs(hunt.variable);
        command.env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        command.process_group(0);
        let begun = Instant::now();
        let mut test = command
            .spawn()
            .with_context(|| format!("starting {}", program.path.display()))?;
        let status = loop {
            match test.try_wait()? {
                Some(status) => break Some(status),
                None if begun.elapsed() > deadline => break None,
                None => std::thread::sleep(LOOK),
            }
        };
        if status.is_none() {
            let group = i32::try_from(test.id()).ok().and_then(Pid::from_raw);
            kill_process_group(group.context("a process has a number")?, Signal::KILL)?;
            test.wait()?;
        }
        let took = begun.elapsed();
        let text = std::fs::read(&path)?;
        let text = String::from_utf8_lossy(&text);
        // A test of another name would fail no more than it would pass.
        if !text.contains("running 1 test") {
            bail!("{}: no such test (see {})", hunt.test(), path.display());
        }
        let ended = match status {
            None => Ended::Deadline,
            Some(status) if status.success() => Ended::Passed,
            Some(_) => Ended::Failed,
        };
        let said = match ended {
            Ended::Passed => String::new(),
            Ended::Failed | Ended::Deadline => complaint(&text),
        };
        Ok(Trial { ended, took, said })
    }
}

/// What stands behind the first "panicked at", in one line.
fn complaint(text: &str) -> String {
    let lines = text.lines();
    let said = lines.skip_while(|line| !line.contains("panicked at"));
    let said = said.skip(1).take_while(|line| !line.starts_with("note:"));
    let said: Vec<&str> = said.take(SAID_LINES_MAX).map(str::trim).collect();
    said.join(" ").chars().take(SAID_MAX).collect()
}
