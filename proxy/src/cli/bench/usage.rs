//! What a process used meanwhile: CPU time and wake-ups, from /proc.

use std::fs;
use std::ops::Sub;

use anyhow::{Context as _, ensure};

/// A process to watch.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) name: String,
    pid: u32,
}

/// What all threads of a process have used since they started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Nanoseconds on a CPU.
    pub(super) cpu_ns: u64,
    /// Times a thread slept until something happened.
    pub(super) wakeups: u64,
}

impl Sub for Usage {
    type Output = Self;

    /// What was used in between; a thread that ended meanwhile is left out.
    fn sub(self, before: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            wakeups: self.wakeups.saturating_sub(before.wakeups),
        }
    }
}

impl Process {
    /// `NAME=PID`
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let (name, pid) = text.split_once('=').context("expected NAME=PID")?;
        let pid = pid
            .parse()
            .with_context(|| format!("\"{pid}\" is no process id"))?;
        let process = Self {
            name: name.to_owned(),
            pid,
        };
        process.usage()?;
        Ok(process)
    }

    pub(super) fn usage(&self) -> anyhow::Result<Usage> {
        let folder = format!("/proc/{}/task", self.pid);
        let mut usage = Usage::default();
        let mut threads = 0;
        let entries = fs::read_dir(&folder)
            .with_context(|| format!("process {} ({})", self.pid, self.name))?;
        for entry in entries {
            let thread = entry?.path();
            // A thread may end between the listing and the reading.
            let (Ok(schedstat), Ok(status)) = (
                fs::read_to_string(thread.join("schedstat")),
                fs::read_to_string(thread.join("status")),
            ) else {
                continue;
            };
            usage.cpu_ns += number(schedstat.split_whitespace().next());
            let switches = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .map(str::trim);
            usage.wakeups += number(switches);
            threads += 1;
        }
        ensure!(
            threads > 0,
            "process {} ({}) has ended",
            self.pid,
            self.name
        );
        Ok(usage)
    }
}

fn number(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}
