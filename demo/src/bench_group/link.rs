//! The stage's side of one member: a process on a host of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use unbroken_tests::netns::Host;

use super::member::{Answer, Ask, Counted, Flooded, View};

/// A member's process; killed when dropped.
pub(super) struct Link {
    pub(super) name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Link {
    /// Starts it.
    pub(super) fn start(host: &Host, program: &Path, log: &Path) -> Result<Self> {
        let name = host.name().to_owned();
        let errors = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        command
            .args(["group-member", &name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = host.enter(move || command.spawn())?;
        let input = child.stdin.take().context("a pipe was asked for")?;
        let output = child.stdout.take().context("a pipe was asked for")?;
        Ok(Self {
            name,
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Asks and does not wait; [`Link::wait`] must follow.
    pub(super) fn tell(&mut self, ask: &Ask) -> Result<()> {
        let line = serde_json::to_string(ask)?;
        writeln!(self.input, "{line}").with_context(|| format!("telling {}", self.name))
    }

    /// The answer to what it was told.
    pub(super) fn wait(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("{} has ended", self.name);
        }
        match serde_json::from_str(&line)? {
            Answer::Failed(why) => bail!("{}: {why}", self.name),
            answer => Ok(answer),
        }
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.tell(ask)?;
        self.wait()
    }

    /// When it was done and how long it took, in nanoseconds.
    pub(super) fn done(&mut self, ask: &Ask) -> Result<(u64, u64)> {
        match self.ask(ask)? {
            Answer::Done { at, began } => Ok((began, at - began)),
            other => self.unexpected(&other),
        }
    }

    /// Nanoseconds each.
    pub(super) fn times(&mut self, ask: &Ask) -> Result<Vec<u64>> {
        match self.ask(ask)? {
            Answer::Times(times) => Ok(times),
            other => self.unexpected(&other),
        }
    }

    pub(super) fn flood(&mut self, ask: &Ask) -> Result<Flooded> {
        match self.ask(ask)? {
            Answer::Flooded(flooded) => Ok(flooded),
            other => self.unexpected(&other),
        }
    }

    pub(super) fn count(&mut self) -> Result<Counted> {
        match self.ask(&Ask::Count)? {
            Answer::Counted(counted) => Ok(counted),
            other => self.unexpected(&other),
        }
    }

    pub(super) fn views(&mut self, group: &str) -> Result<Vec<View>> {
        let group = group.to_owned();
        match self.ask(&Ask::Views { group })? {
            Answer::Views(views) => Ok(views),
            other => self.unexpected(&other),
        }
    }

    pub(super) fn resident(&mut self) -> Result<u64> {
        match self.ask(&Ask::Resident)? {
            Answer::Resident { bytes } => Ok(bytes),
            other => self.unexpected(&other),
        }
    }

    fn unexpected<T>(&self, answer: &Answer) -> Result<T> {
        bail!("{} answered {answer:?}", self.name)
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}
