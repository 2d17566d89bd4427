//! The server as a program that the node runs (`command`): started, watched, and begun anew when the
//! data plane says so.
//!
//! A server with shared state (`ordering = "total"`) begins with an empty folder each time, so that
//! it begins with the same state on every replica; what a user-given `restore` puts there is the
//! state of a checkpoint. A thread of its own does it all: the data plane only looks at [`State`].

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mio::Waker;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    setpriority_process, waitid,
};
use tracing::{debug, error, info, warn};

use super::liveness::{self, Liveness, start_time};
use super::spill::{self, Piece};
use super::upstream::Target;

/// How often a running program is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Between two attempts to start a program that ended by itself.
const START_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// `ready` is asked again when it has not answered by then.
const READY_MAX: Duration = Duration::from_secs(10);
/// A line of `checkpoint` is looked at up to here.
const LINE_BYTES_MAX: usize = 1024;
/// What a program is given to end after SIGTERM when the node stops, or after SIGKILL.
const END_MAX: Duration = Duration::from_secs(3);
/// The line with which `checkpoint` says that the server may go on.
const TAKEN: &str = "taken";
/// The exit code with which `checkpoint` says that this is no moment for it (`EX_TEMPFAIL`).
const NOT_NOW: i32 = 75;
/// Where a checkpoint's file stands, for `restore` and `checkpoint`.
const CHECKPOINT_VARIABLE: &str = "UNBROKEN_CHECKPOINT";

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// The service's name.
    pub(crate) name: String,
    pub(crate) target: Target,
    /// The server; without it, `restore` starts one that somebody else looks after.
    pub(crate) command: Option<Vec<String>>,
    pub(crate) restore: Option<Vec<String>>,
    /// Ends with 0 once the server can be given input; without it, it can when it listens.
    pub(crate) ready: Option<Vec<String>>,
    /// Writes the running server's state into a file.
    pub(crate) checkpoint: Option<Vec<String>>,
    /// The program's own folder, and beside it the file with its pid.
    pub(crate) folder: PathBuf,
    /// It begins with an empty folder, and is not started again by itself: its state is gone with it.
    pub(crate) shared_state: bool,
}

/// What a server is in, and for the how manieth time it was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Starting(u64),
    /// It listens.
    Up(u64),
    /// It ended by itself, or cannot be started.
    Down(u64),
}

enum Order {
    /// Begin anew, as run number so and so, from this checkpoint or from nothing.
    Restart(u64, Option<Vec<Piece>>),
    Stop,
}

/// How far a checkpoint of a server's state has come.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// The server is to be given nothing.
    Running,
    /// Its state is taken, and being written: it may go on.
    Taken,
    /// All of it.
    Done(Vec<Piece>),
    /// The user's command says that this is no moment for it.
    NotNow,
    Failed,
}

/// A checkpoint being taken by the user's command, which is killed if this is dropped before.
#[derive(Debug)]
pub(crate) struct Attempt(Arc<Mutex<Progress>>);

impl Attempt {
    pub(crate) fn progress(&self) -> Progress {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A server that the node runs. It ends with the last handle.
#[derive(Debug)]
pub(crate) struct Runner {
    orders: Sender<Order>,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
    runs: u64,
    program: Program,
    waker: Arc<Waker>,
    /// A checkpoint's command runs, perhaps of an attempt that was given up.
    busy: Arc<AtomicBool>,
    restoring: Arc<Restoring>,
}

/// How much of a checkpoint is in its file, in bytes; all zero while none is being restored.
#[derive(Debug, Default)]
struct Restoring {
    done: AtomicU64,
    total: AtomicU64,
}

impl Runner {
    /// Starts the program. `waker` wakes the data plane when its state changes.
    ///
    /// # Errors
    /// Its folder cannot be made.
    pub(crate) fn start(
        program: Program,
        liveness: Liveness,
        waker: Arc<Waker>,
    ) -> anyhow::Result<Self> {
        let folder = &program.folder;
        fs::create_dir_all(folder)
            .with_context(|| format!("making the server's folder {}", folder.display()))?;
        let (sender, orders) = channel();
        let state = Arc::new(Mutex::new(State::Starting(0)));
        let mut run = Run {
            program: program.clone(),
            liveness,
            state: Arc::clone(&state),
            waker: Arc::clone(&waker),
            orders,
            order: None,
            child: None,
            number: 0,
            checkpoint: None,
            restoring: Arc::default(),
        };
        let restoring = Arc::clone(&run.restoring);
        let thread = thread::Builder::new()
            .name("server".into())
            .spawn(move || run.serve())?;
        Ok(Self {
            orders: sender,
            state,
            thread: Some(thread),
            runs: 0,
            program,
            waker,
            busy: Arc::default(),
            restoring,
        })
    }

    /// Whether the server of the last restart listens.
    pub(crate) fn up(&self) -> bool {
        self.state() == State::Up(self.runs)
    }

    /// Whether the server of the last restart has ended.
    pub(crate) fn down(&self) -> bool {
        self.state() == State::Down(self.runs)
    }

    fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much of a checkpoint that it begins with is in its file, and of how much, in bytes.
    pub(crate) fn restoring(&self) -> Option<(u64, u64)> {
        let load = |n: &AtomicU64| n.load(Ordering::Acquire);
        let (done, total) = (load(&self.restoring.done), load(&self.restoring.total));
        (total > 0).then_some((done, total))
    }

    /// Whether its state can be taken now, and brought elsewhere.
    pub(crate) fn has_checkpoints(&self) -> bool {
        self.program.checkpoint.is_some()
            && self.program.restore.is_some()
            && !self.busy.load(Ordering::Acquire)
    }

    /// Takes a checkpoint of the server's state, by the user's command.
    pub(crate) fn checkpoint(&self) -> Attempt {
        let progress = Arc::new(Mutex::new(Progress::Running));
        let weak = Arc::downgrade(&progress);
        let (program, waker) = (self.program.clone(), Arc::clone(&self.waker));
        let set = move |progress: &Weak<Mutex<Progress>>, now| {
            let Some(progress) = progress.upgrade() else {
                return;
            };
            *progress.lock().unwrap_or_else(PoisonError::into_inner) = now;
            if let Err(error) = waker.wake() {
                error!(%error, "waking the data plane");
            }
        };
        let (refused, wanted) = (set.clone(), weak.clone());
        let busy = Arc::clone(&self.busy);
        busy.store(true, Ordering::Release);
        let thread = thread::Builder::new().name("checkpoint".into());
        let spawned = thread.spawn(move || {
            // The data plane, whose thread this one comes from, is more urgent.
            let _ = setpriority_process(None, 0);
            let taken = || set(&wanted, Progress::Taken);
            let given_up = || wanted.strong_count() == 0;
            let end = take_checkpoint(&program, taken, given_up).unwrap_or_else(|error| {
                warn!(service = %program.name, "taking a checkpoint: {error:#}");
                Progress::Failed
            });
            busy.store(false, Ordering::Release);
            set(&wanted, end);
        });
        if let Err(error) = spawned {
            warn!(%error, "starting a thread for a checkpoint");
            self.busy.store(false, Ordering::Release);
            refused(&weak, Progress::Failed);
        }
        Attempt(progress)
    }

    /// Kills the server and begins another, with the state of a checkpoint or with none.
    pub(crate) fn restart(&mut self, checkpoint: Option<Vec<Piece>>) {
        self.runs += 1;
        // The thread is gone only when the node stops.
        let _ = self.orders.send(Order::Restart(self.runs, checkpoint));
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread that watches a server panicked");
        }
    }
}

/// The thread's side.
struct Run {
    program: Program,
    liveness: Liveness,
    state: Arc<Mutex<State>>,
    waker: Arc<Waker>,
    orders: Receiver<Order>,
    /// One that cut a command short and is to be carried out.
    order: Option<Order>,
    child: Option<Running>,
    number: u64,
    checkpoint: Option<Vec<Piece>>,
    restoring: Arc<Restoring>,
}

impl Run {
    fn serve(&mut self) {
        self.kill_leftover();
        let mut wait = self.begin();
        loop {
            match self.next_order(wait) {
                Some(Order::Restart(number, checkpoint)) => {
                    self.kill();
                    (self.number, self.checkpoint) = (number, checkpoint);
                    wait = self.begin();
                }
                Some(Order::Stop) => return self.end(),
                None => wait = self.look(),
            }
        }
    }

    fn next_order(&mut self, wait: Duration) -> Option<Order> {
        if self.order.is_some() {
            return self.order.take();
        }
        match self.orders.recv_timeout(wait) {
            Ok(order) => Some(order),
            Err(RecvTimeoutError::Disconnected) => Some(Order::Stop),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    /// Runs a command to its end. An order, or its time, ends it before, and what it started.
    fn run(&mut self, command: &mut Command, max: Duration) -> anyhow::Result<ExitStatus> {
        let mut running = Running::spawn(command)?;
        let begun = Instant::now();
        while !running.has_ended()? {
            self.order = self.next_order(LOOK_EVERY);
            anyhow::ensure!(self.order.is_none(), "cut short by an order");
            anyhow::ensure!(begun.elapsed() < max, "not at its end after {max:?}");
        }
        Ok(running.reap()?)
    }

    /// Starts the program. Gives the time until the next look.
    fn begin(&mut self) -> Duration {
        self.set(State::Starting(self.number));
        let total = self
            .checkpoint
            .as_ref()
            .map_or(0, |image| spill::total(image));
        self.restoring.done.store(0, Ordering::Release);
        self.restoring.total.store(total, Ordering::Release);
        match self.try_begin() {
            Ok(()) => LOOK_EVERY,
            Err(error) => {
                self.kill();
                let name = &self.program.name;
                error!(service = %name, "starting the server: {error:#}");
                self.set(State::Down(self.number));
                START_AGAIN_AFTER
            }
        }
    }

    fn try_begin(&mut self) -> anyhow::Result<()> {
        let program = self.program.clone();
        if program.shared_state {
            empty(&program.folder).context("emptying its folder")?;
        }
        if let Some(restore) = &program.restore
            && (self.checkpoint.is_some() || program.command.is_none())
        {
            let mut path = PathBuf::new();
            if let Some(image) = &self.checkpoint {
                path = program.folder.with_extension("restore");
                let written = write(image, &path, &self.restoring.done);
                written.with_context(|| format!("writing {}", path.display()))?;
            }
            let mut command = prepare(restore, &program.folder);
            let status = self.run(command.env(CHECKPOINT_VARIABLE, &path), Duration::MAX);
            // The state is in the server's folder now, if anywhere.
            let _ = fs::remove_file(&path);
            let status = status.with_context(|| format!("running {}", restore[0]))?;
            anyhow::ensure!(status.success(), "`restore` ended with {status}");
        }
        if let Some(command) = &program.command {
            let child = Running::spawn(&mut prepare(command, &program.folder))
                .with_context(|| format!("running {}", command[0]))?;
            let pid = child.child.id();
            self.child = Some(child);
            info!(service = %program.name, pid, run = self.number, "server started");
            let started = start_time(pid).unwrap_or(0);
            fs::write(self.pid_file(), format!("{pid} {started}\n")).context("noting its pid")?;
        }
        Ok(())
    }

    /// One look at the program.
    fn look(&mut self) -> Duration {
        let now = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(child) = &mut self.child {
            match child.has_ended() {
                Ok(false) => {}
                Ok(true) => {
                    // What it started must not answer in its place.
                    let status = child.kill();
                    warn!(service = %self.program.name, ?status, "the server ended");
                    self.child = None;
                    self.set(State::Down(self.number));
                    return START_AGAIN_AFTER;
                }
                Err(error) => warn!(service = %self.program.name, %error, "looking at the server"),
            }
        }
        match now {
            State::Starting(_) if self.listens() && self.says_ready() => {
                debug!(service = %self.program.name, "the server listens");
                // Its closes are judged by its process, not by that of an earlier run.
                self.liveness.refresh();
                self.set(State::Up(self.number));
            }
            State::Down(_) if self.program.shared_state => {}
            State::Down(_) => return self.begin(),
            State::Starting(_) | State::Up(_) => {}
        }
        LOOK_EVERY
    }

    /// A connection to see whether it is accepted would be an input that no other replica has. Only a
    /// server elsewhere has to bear it: its listener cannot be seen.
    fn listens(&self) -> bool {
        let target = &self.program.target;
        liveness::listens(target) || (self.program.command.is_none() && liveness::accepts(target))
    }

    fn says_ready(&mut self) -> bool {
        let Some(words) = &self.program.ready else {
            return true;
        };
        let mut command = prepare(words, &self.program.folder);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        match self.run(&mut command, READY_MAX) {
            Ok(status) => status.success(),
            Err(error) => {
                debug!(service = %self.program.name, "asking `ready`: {error:#}");
                false
            }
        }
    }

    fn set(&self, state: State) {
        if !matches!(state, State::Starting(_)) {
            self.restoring.total.store(0, Ordering::Release);
        }
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        if let Err(error) = self.waker.wake() {
            error!(%error, "waking the data plane");
        }
    }

    /// The program gets SIGTERM, and SIGKILL if that does not do.
    fn end(&mut self) {
        if let Some(child) = &mut self.child {
            child.signal(Signal::TERM);
            let mut left = END_MAX;
            while matches!(child.has_ended(), Ok(false)) && !left.is_zero() {
                thread::sleep(LOOK_EVERY);
                left = left.saturating_sub(LOOK_EVERY);
            }
        }
        self.kill();
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take()
            && let Err(error) = child.kill()
        {
            warn!(service = %self.program.name, %error, "waiting for the server's end");
        }
        // Nothing of it is left that could be killed.
        let _ = fs::remove_file(self.pid_file());
    }

    fn pid_file(&self) -> PathBuf {
        self.program.folder.with_extension("pid")
    }

    /// A node that was killed leaves its server behind.
    fn kill_leftover(&self) {
        let Ok(text) = fs::read_to_string(self.pid_file()) else {
            return;
        };
        let mut words = text.split_ascii_whitespace();
        let pid: Option<u32> = words.next().and_then(|w| w.parse().ok());
        let started: Option<u64> = words.next().and_then(|w| w.parse().ok());
        let Some(pid) = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) else {
            return;
        };
        let number = pid.as_raw_nonzero().get().unsigned_abs();
        // It is not our child: only this tells when it has ended.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        if started.is_none() || start_time(number) != started {
            return;
        }
        info!(service = %self.program.name, number, "killing the server of an earlier node");
        // It may have ended meanwhile.
        let _ = kill_process_group(pid, Signal::KILL);
        let max = Timespec::try_from(END_MAX).expect("a few seconds");
        let mut end = [PollFd::new(&process, PollFlags::IN)];
        if !matches!(poll(&mut end, Some(&max)), Ok(1)) {
            warn!(service = %self.program.name, number, "it does not end");
        }
    }
}

/// A program with everything that it has started, as far as that is in its process group. Dropped before
/// it is reaped it is killed.
struct Running {
    child: Child,
    /// The number of its group may be another's now.
    reaped: bool,
}

impl Running {
    fn spawn(command: &mut Command) -> io::Result<Self> {
        // The terminal's signals are the node's: it decides when its server ends.
        let child = command.process_group(0).spawn()?;
        Ok(Self {
            child,
            reaped: false,
        })
    }

    /// Whether the program has ended; it is not reaped by that.
    fn has_ended(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::Pid(Pid::from_child(&self.child)), options)?;
        Ok(ended.is_some())
    }

    fn signal(&self, signal: Signal) {
        if !self.reaped {
            // There may be nobody left in it who could be signalled.
            let _ = kill_process_group(Pid::from_child(&self.child), signal);
        }
    }

    /// Waits for the program's end; what else is in its group goes on.
    fn reap(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait();
        self.reaped = true;
        status
    }

    fn kill(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::KILL);
        self.reap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.kill();
        }
    }
}

fn prepare(words: &[String], folder: &Path) -> Command {
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

/// Runs the user's command. It has the state in its file when it ends; and it may say `taken` before,
/// when the state can no longer change.
fn take_checkpoint(
    program: &Program,
    taken: impl Fn(),
    given_up: impl Fn() -> bool,
) -> anyhow::Result<Progress> {
    let words = program.checkpoint.as_ref().context("there is no command")?;
    let path = program.folder.with_extension("checkpoint");
    // Of an attempt that was cut short.
    let _ = fs::remove_file(&path);
    let mut command = prepare(words, &program.folder);
    command
        .env(CHECKPOINT_VARIABLE, &path)
        .stdout(Stdio::piped());
    let mut running =
        Running::spawn(&mut command).with_context(|| format!("running {}", words[0]))?;
    let mut output = running.child.stdout.take();
    let mut line = Vec::new();
    loop {
        // Asked before its output is read: then that is all. Who else holds the pipe is not waited for.
        let ended = running.has_ended()?;
        read_output(&mut output, &mut line, |line| {
            if line.trim_ascii() == TAKEN.as_bytes() {
                taken();
            } else {
                let line = String::from_utf8_lossy(line);
                debug!(service = %program.name, %line, "checkpoint");
            }
        })?;
        if ended {
            break;
        }
        anyhow::ensure!(!given_up(), "{} is killed: it took too long", words[0]);
    }
    let status = running.reap().context("waiting for its end")?;
    if status.code() == Some(NOT_NOW) {
        return Ok(Progress::NotNow);
    }
    anyhow::ensure!(status.success(), "{} ended with {status}", words[0]);
    let image = spill::take(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(Progress::Done(image))
}

/// Reads what is there, and waits for a moment if nothing is. `None` in place of the output: its end.
fn read_output(
    output: &mut Option<ChildStdout>,
    line: &mut Vec<u8>,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    let Some(pipe) = output else {
        thread::sleep(LOOK_EVERY);
        return Ok(());
    };
    let wait = Timespec::try_from(LOOK_EVERY).expect("a few milliseconds");
    match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&wait)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    // As much as a pipe holds.
    let mut buffer = vec![0; 64 * 1024];
    let n = pipe.read(&mut buffer)?;
    if n == 0 {
        *output = None;
    }
    for byte in &buffer[..n] {
        if *byte == b'\n' {
            each(line);
            line.clear();
        } else if line.len() < LINE_BYTES_MAX {
            line.push(*byte);
        }
    }
    Ok(())
}

/// Writes an image into a file.
fn write(image: &[Piece], path: &Path, done: &AtomicU64) -> io::Result<()> {
    let mut file = File::create(path)?;
    for piece in image {
        let bytes = piece.read()?;
        file.write_all(&bytes)?;
        done.fetch_add(bytes.len() as u64, Ordering::AcqRel);
    }
    Ok(())
}

fn empty(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
