//! The clients from outside: starts them on the client host, sets their pace, watches them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use serde::Serialize;
use unbroken_tests::netns::Host;

use crate::args::{Bytes, escape};
use crate::pace::{PIECE_BYTES_MAX, Pacer, Rate, UNLIMITED, now_us};
use crate::payload::{Checker, stream_sha256};
use crate::series::Series;

/// What a client counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Unit {
    /// Bytes of a transfer.
    Bytes,
    /// Requests that were answered.
    Requests,
}

/// How a client ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything came, and was right; the SHA-256 of it.
    Done { sha256: String },
    /// An error of the connection, or a wrong byte.
    Failed { reason: String },
}

/// What a client and the thread that listens to it share.
#[derive(Debug)]
struct Shared {
    series: Mutex<Series>,
    outcome: Mutex<Option<Outcome>>,
    rate: Rate,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client program that runs on the client host; killed when dropped.
#[derive(Debug)]
pub(crate) struct Client {
    /// What it is called in the report.
    pub(crate) name: &'static str,
    /// What it counts.
    pub(crate) unit: Unit,
    /// How much it has to do, where that is fixed.
    pub(crate) size: Option<u64>,
    started_us: u64,
    shared: Arc<Shared>,
    child: Arc<Mutex<Child>>,
    stdin: Option<ChildStdin>,
}

/// Where clients run, and what they are told.
pub(crate) struct Setting<'a> {
    /// The client host.
    pub(crate) host: &'a Host,
    /// This program.
    pub(crate) program: &'a Path,
    /// Folder for what clients write to standard error.
    pub(crate) logs: &'a Path,
    /// Bytes a second that transfers begin with.
    pub(crate) rate: u64,
}

impl Setting<'_> {
    fn start(
        &self,
        name: &'static str,
        unit: Unit,
        size: Option<u64>,
        mut command: Command,
        listen: impl FnOnce(ChildStdout, &Shared, &dyn Fn() -> Result<()>) -> Result<Outcome>
        + Send
        + 'static,
    ) -> Result<Client> {
        let log = self.logs.join(format!("{name}.log"));
        let errors = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = self
            .host
            .enter(move || command.spawn())
            .with_context(|| format!("starting the client {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it is piped");
        let child = Arc::new(Mutex::new(child));
        let shared = Arc::new(Shared {
            series: Mutex::default(),
            outcome: Mutex::default(),
            rate: Rate::new(self.rate),
        });
        let (told, process) = (Arc::clone(&shared), Arc::clone(&child));
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let wait = || {
                    let status = lock(&process).wait().context("waiting for its end")?;
                    if !status.success() {
                        let said = std::fs::read_to_string(&log).unwrap_or_default();
                        anyhow::bail!("it ended with {status}: {}", said.trim());
                    }
                    Ok(())
                };
                let outcome =
                    listen(stdout, &told, &wait).unwrap_or_else(|error| Outcome::Failed {
                        reason: format!("{error:#}"),
                    });
                *lock(&told.outcome) = Some(outcome);
            })?;
        Ok(Client {
            name,
            unit,
            size,
            started_us: now_us(),
            shared,
            child,
            stdin,
        })
    }

    /// A download of `bytes` bytes of the stream `seed`, by curl where it is installed.
    pub(crate) fn download(&self, vip: SocketAddr, seed: u64, bytes: u64) -> Result<Client> {
        let curl = self
            .host
            .enter(|| Command::new("curl").arg("--version").output())
            .is_ok();
        let (name, command) = if curl {
            let mut command = Command::new("curl");
            command.args([
                "--silent",
                "--show-error",
                "--fail",
                "--no-buffer",
                "--noproxy",
                "*",
            ]);
            command.arg(format!("http://{vip}/{FILE}"));
            ("curl", command)
        } else {
            let mut command = Command::new(self.program);
            command.args(["client", "get", "--connect", &vip.to_string(), "--path"]);
            command.arg(format!("/{FILE}"));
            ("download", command)
        };
        self.start(
            name,
            Unit::Bytes,
            Some(bytes),
            command,
            move |mut stdout, shared, wait| {
                // What waits in the pipe would hide the beginning of a gap.
                let _ = rustix::pipe::fcntl_setpipe_size(&stdout, 4096);
                let mut pacer = Pacer::new();
                let mut checker = Checker::new(seed);
                let mut buffer = vec![0; PIECE_BYTES_MAX];
                loop {
                    let most = pacer.wait(&shared.rate);
                    let got = stdout
                        .read(&mut buffer[..most])
                        .context("reading what it wrote")?;
                    if got == 0 {
                        break;
                    }
                    pacer.done(&shared.rate, got);
                    checker.update(&buffer[..got]);
                    lock(&shared.series).push(now_us(), checker.bytes());
                    if let Some(at) = checker.first_wrong() {
                        anyhow::bail!("byte {at} is wrong");
                    }
                }
                wait()?;
                let got = checker.bytes();
                anyhow::ensure!(got == bytes, "{got} bytes came instead of {bytes}");
                let sha256 = checker.finish();
                let expected = stream_sha256(seed, bytes);
                anyhow::ensure!(
                    sha256 == expected,
                    "SHA-256 is {sha256} instead of {expected}"
                );
                Ok(Outcome::Done { sha256 })
            },
        )
    }

    /// A request each millisecond with chained answers.
    pub(crate) fn exchange(&self, vip: SocketAddr, seed: u64) -> Result<Client> {
        let mut command = self.part(vip, "exchange");
        command.args(["--seed", &seed.to_string()]);
        self.start("exchange", Unit::Requests, None, command, listen_to_lines)
    }

    /// An upload of `bytes` bytes of the stream `seed`.
    pub(crate) fn upload(&self, vip: SocketAddr, seed: u64, bytes: u64) -> Result<Client> {
        let mut command = self.part(vip, "upload");
        command.args(["--seed", &seed.to_string(), "--bytes", &bytes.to_string()]);
        command.args(["--rate", &self.rate.to_string()]);
        self.start("upload", Unit::Bytes, Some(bytes), command, listen_to_lines)
    }

    /// A request each millisecond that is always answered alike.
    pub(crate) fn talk(&self, vip: SocketAddr, ask: &Bytes, answer: &Bytes) -> Result<Client> {
        let mut command = self.part(vip, "talk");
        command.args(["--request", &escape(ask), "--response", &escape(answer)]);
        self.start("requests", Unit::Requests, None, command, listen_to_lines)
    }

    /// A numbered line each millisecond that must come back.
    pub(crate) fn echo(&self, vip: SocketAddr) -> Result<Client> {
        self.start(
            "echo",
            Unit::Requests,
            None,
            self.part(vip, "echo"),
            listen_to_lines,
        )
    }

    fn part(&self, vip: SocketAddr, name: &str) -> Command {
        let mut command = Command::new(self.program);
        command.args(["client", name, "--connect", &vip.to_string()]);
        command
    }
}

/// Name of the file that is downloaded.
pub(crate) const FILE: &str = "file.bin";

/// Listens to one of our clients: see [`crate::client`] for the lines.
fn listen_to_lines(
    stdout: ChildStdout,
    shared: &Shared,
    wait: &dyn Fn() -> Result<()>,
) -> Result<Outcome> {
    let mut done = None;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading its report")?;
        match line.split_at_checked(2) {
            Some(("P ", text)) => {
                let (us, total) = text
                    .split_once(' ')
                    .context("a progress line of two numbers")?;
                lock(&shared.series).push(us.parse()?, total.parse()?);
            }
            Some(("D ", text)) => {
                let (_, sha256) = text.split_once(' ').context("a last line of two words")?;
                done = Some(Outcome::Done {
                    sha256: sha256.to_owned(),
                });
            }
            Some(("E ", text)) => anyhow::bail!("{text}"),
            _ => anyhow::bail!("it wrote {line:?}"),
        }
    }
    wait()?;
    done.context("it ended without a word")
}

impl Client {
    /// What it did so far.
    pub(crate) fn series(&self) -> Series {
        lock(&self.shared.series).clone()
    }

    /// Calls `look` with what it did so far.
    pub(crate) fn with_series<T>(&self, look: impl FnOnce(&Series) -> T) -> T {
        look(&lock(&self.shared.series))
    }

    /// When the latest progress was: its start, before the first.
    pub(crate) fn last_progress_us(&self) -> u64 {
        self.with_series(Series::last_us).unwrap_or(self.started_us)
    }

    /// How it ended, if it has.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        lock(&self.shared.outcome).clone()
    }

    /// Sets the pace of a transfer such that it would be over in `seconds`.
    pub(crate) fn spread(&mut self, seconds: u64) {
        if let Some(size) = self.size {
            let left = size.saturating_sub(self.with_series(Series::total));
            self.set_rate((left / seconds.max(1)).max(1));
        }
    }

    /// Lets it come to its end: a transfer at full speed, an exchange after the answer it waits for.
    pub(crate) fn finish(&mut self) {
        if self.size.is_some() {
            self.set_rate(UNLIMITED);
        }
        // The end of its input ends an exchange; an upload has all it needs to know.
        self.stdin = None;
    }

    fn set_rate(&mut self, bytes_per_second: u64) {
        self.shared.rate.set(bytes_per_second);
        // Only the upload reads its input. A client that is gone says so by its outcome.
        if let Some(stdin) = self.stdin.as_mut().filter(|_| self.name == "upload") {
            let _ = writeln!(stdin, "{bytes_per_second}");
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // If the lock is taken, its thread waits for it to end already. What lives on all the same
        // ends with the client host.
        if let (None, Ok(mut child)) = (self.outcome(), self.child.try_lock()) {
            let _ = child.kill();
        }
    }
}
