//! A program under test: its log, its end, and waiting for either.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use thiserror::Error;

/// How often a condition is looked at that cannot be waited for.
const LOOK: Duration = Duration::from_millis(5);

/// Lines of a log that an error message shows.
const TAIL_LINES: usize = 20;

/// A condition that did not come about in time.
#[derive(Debug, Error)]
#[error("{what} did not come about within {after:?}")]
pub struct Timeout {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub after: Duration,
}

/// Why waiting for a program was in vain. Each message ends with the tail of its log.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// It ended first.
    #[error("{label} ended ({status}) before {what}\n{tail}")]
    Ended {
        /// Which program.
        label: String,
        /// How it ended.
        status: ExitStatus,
        /// What was waited for.
        what: String,
        /// The end of its log.
        tail: String,
    },
    /// It took too long.
    #[error("{label}: no {what} within {after:?}\n{tail}")]
    Timeout {
        /// Which program.
        label: String,
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// The end of its log.
        tail: String,
    },
    /// The kernel refused.
    #[error("{label}: {source}")]
    Os {
        /// Which program.
        label: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Waits until `condition` holds, looking every few milliseconds.
///
/// # Errors
/// It did not within `limit`; `what` names it in the message.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<(), Timeout> {
    let start = Instant::now();
    loop {
        if condition() {
            return Ok(());
        }
        if start.elapsed() >= limit {
            return Err(Timeout {
                what: what.to_owned(),
                after: limit,
            });
        }
        std::thread::sleep(LOOK);
    }
}

/// A started program; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    label: String,
    child: Child,
    log: PathBuf,
    status: Option<ExitStatus>,
}

impl Process {
    pub(super) fn new(label: String, child: Child, log: PathBuf) -> Self {
        Self {
            label,
            child,
            log,
            status: None,
        }
    }

    /// What it is called in messages: its label and its host.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its output.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything it has written so far; empty if the log cannot be read.
    #[must_use]
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines that it has written.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        if self.status.is_none() {
            self.status = self.child.try_wait().map_err(|source| self.os(source))?;
        }
        Ok(self.status)
    }

    /// Whether it has not ended yet.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It did not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, ProcessError> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(self.timeout("end", limit));
            }
            let fd = rustix::process::pidfd_open(self.raw(), PidfdFlags::empty())
                .map_err(|e| self.os(e.into()))?;
            let timeout = Timespec::try_from(left).map_err(|_| self.timeout("end", limit))?;
            let mut poll = [PollFd::new(&fd, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(self.os(e.into())),
            }
        }
    }

    /// Waits until `condition` holds or the program ends.
    ///
    /// # Errors
    /// It ended first, or `limit` passed.
    pub fn wait_ready(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Self) -> bool,
    ) -> Result<(), ProcessError> {
        let start = Instant::now();
        loop {
            // The end is asked first: what it did just before is still seen.
            let ended = self.try_wait()?;
            if condition(self) {
                return Ok(());
            }
            if let Some(status) = ended {
                let (label, what, tail) = (self.label.clone(), what.to_owned(), self.tail());
                return Err(ProcessError::Ended {
                    label,
                    status,
                    what,
                    tail,
                });
            }
            if start.elapsed() >= limit {
                return Err(self.timeout(what, limit));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until a line of its log contains `text`; returns that line.
    ///
    /// # Errors
    /// It ended first, or `limit` passed.
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> Result<String, ProcessError> {
        let mut found = None;
        self.wait_ready(&format!("line with {text:?}"), limit, |process| {
            let log = process.log_text();
            found = log
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned);
            found.is_some()
        })?;
        Ok(found.expect("the condition held"))
    }

    /// Sends a signal; nothing if it has ended.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn signal(&mut self, signal: Signal) -> Result<(), ProcessError> {
        // Not reaped yet, so the pid is still its own.
        if self.try_wait()?.is_some() {
            return Ok(());
        }
        rustix::process::kill_process(self.raw(), signal).map_err(|e| self.os(e.into()))
    }

    /// Kills it (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn kill(&mut self) -> Result<ExitStatus, ProcessError> {
        self.signal(Signal::KILL)?;
        let status = self.child.wait().map_err(|source| self.os(source))?;
        self.status = Some(status);
        Ok(status)
    }

    fn raw(&self) -> Pid {
        let raw = i32::try_from(self.child.id()).expect("pids are small");
        Pid::from_raw(raw).expect("pids are positive")
    }

    fn os(&self, source: io::Error) -> ProcessError {
        ProcessError::Os {
            label: self.label.clone(),
            source,
        }
    }

    fn timeout(&self, what: &str, after: Duration) -> ProcessError {
        let (label, what, tail) = (self.label.clone(), what.to_owned(), self.tail());
        ProcessError::Timeout {
            label,
            what,
            after,
            tail,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.kill();
    }
}
