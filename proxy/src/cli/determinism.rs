//! `unbroken determinism`: is my server fit?

mod board;
mod capture;
mod compare;
mod copy;
mod live;
mod namespace;
mod player;
mod report;
mod script;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use humantime_serde::re::humantime;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use self::board::{Board, End};
use self::compare::Difference;
use self::copy::{Copy, Recipe};
use self::player::{Feed, Pace, Player};
use self::report::Report;
use self::script::{Conn, Input};
use super::{EXIT_USAGE, shutdown};
use crate::determinism::Harmless;

/// Steps that wait for a copy.
const FEED_MAX: usize = 1024;
/// How often it is looked how far the copies are.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Checks whether a server is fit: whether copies of it answer the same input alike
///
/// Starts several copies of a server, gives each the same input, and compares what they answer, byte by
/// byte on each connection. Replicas of a service must do so, or a client sees after a takeover what
/// another server would have said.
///
/// A copy is told its port: {port} in the arguments is replaced by it, and PORT is in its environment. A
/// server whose port is fixed is given with --port, and each copy runs in a network of its own
/// (without root: in a user namespace). {copy} is the copy's number, {dir} a fresh folder of its own; COPY is in
/// the environment too.
///
/// The copies are tried at different moments (--stagger) and their input is cut at different places
/// (--seed), since replicas live at different moments and read in different pieces.
#[derive(Debug, Args)]
#[command(after_help = after_help())]
pub struct DeterminismArgs {
    /// The server and its arguments
    #[arg(
        last = true,
        value_name = "COMMAND",
        required_unless_present = "server_addr"
    )]
    command: Vec<OsString>,
    /// How many copies are started
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    copies: u8,
    /// A server that runs already; several may be given, beside COMMAND or without it
    #[arg(long, value_name = "ADDRESS:PORT")]
    server_addr: Vec<SocketAddr>,
    /// The port on which the server listens by itself, inside a network of its own
    #[arg(long, value_name = "PORT", requires = "command", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Input: a script (its format is below)
    #[arg(long, value_name = "FILE", group = "input", help_heading = "Input")]
    script: Option<PathBuf>,
    /// Input: what clients sent in a capture file (pcap or pcapng)
    #[arg(long, value_name = "FILE", group = "input", help_heading = "Input")]
    pcap: Option<PathBuf>,
    /// Of the capture, only connections to this port
    #[arg(long, value_name = "PORT", help_heading = "Input")]
    pcap_port: Option<u16>,
    /// Input: live clients that connect here. The first copy answers them, the others are given the
    /// same. Ends at Ctrl-C, SIGTERM or --for
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        group = "input",
        help_heading = "Input"
    )]
    listen: Option<String>,
    /// How long live clients are served
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Input")]
    r#for: Option<Duration>,

    /// What may differ: a regular expression, looked for within single lines of the output. A match counts as
    /// equal where the other copies have a match at the same place and of the same length
    #[arg(long, value_name = "REGEX")]
    ignore: Vec<String>,
    /// The order that the service will have: within each connection, or across all of them (then each
    /// input is given when the one before was taken)
    #[arg(long, value_enum, default_value_t = Ordering::Connection)]
    ordering: Ordering,
    /// How much later each copy is given its input than the one before. More than a second, so that a
    /// server that tells the time is found out
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1100ms")]
    stagger: Duration,
    /// Where input is cut into pieces, except for the first copy; the same number cuts alike
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Send to each copy just what the script or the client sends at once
    #[arg(long)]
    no_pieces: bool,

    /// An answer is over when nothing has come for so long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "100ms", help_heading = "Patience")]
    quiet: Duration,
    /// In the end, the copies have said all when nothing has come from any for so long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "500ms", help_heading = "Patience")]
    settle: Duration,
    /// The longest that a single answer is waited for, and in the end a copy that says less
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s", help_heading = "Patience")]
    timeout: Duration,
    /// How long a copy may take until it listens
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s", help_heading = "Patience")]
    start_within: Duration,

    /// Most memory for each copy's conversations, in MiB; what is beyond is not compared, and that is said
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Differences that are shown
    #[arg(long, value_name = "N", default_value_t = 3)]
    show: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// As `[[service]] ordering`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ordering {
    Connection,
    Total,
}

fn after_help() -> String {
    format!(
        "{}\n\n\
         Exit codes: 0 fit, 1 unfit or not to be told, 64 wrong usage.\n\n\
         Examples:\n  \
         unbroken determinism --script ask.txt -- python3 server.py {{port}}\n  \
         unbroken determinism --script ask.txt --ignore '^Date: .*' --port 80 -- nginx -p {{dir}} -c $PWD/nginx.conf -g 'daemon off;'\n  \
         unbroken determinism --pcap clients.pcap --ordering total -- redis-server --port {{port}} --save '' --dir {{dir}}\n  \
         unbroken determinism --listen 0.0.0.0:8080 --for 10m -- ./server --port {{port}}\n  \
         unbroken determinism --script ask.txt --server-addr 10.0.0.1:80 --server-addr 10.0.0.2:80",
        script::FORMAT
    )
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|e| format!("{e}; a duration is written like 100ms or 2s"))
}

/// Where a copy comes from.
enum Source {
    Start(Recipe),
    Running(SocketAddr),
}

pub(super) fn run(args: &DeterminismArgs) -> anyhow::Result<ExitCode> {
    let usage = |error: anyhow::Error| {
        eprintln!("unbroken: error: {error:#}");
        Ok(ExitCode::from(EXIT_USAGE))
    };
    let harmless = match Harmless::new(&args.ignore) {
        Ok(harmless) => harmless,
        Err(error) => return usage(anyhow!(error).context("--ignore")),
    };
    if args.ordering == Ordering::Total && !args.server_addr.is_empty() {
        return usage(anyhow!(
            "--ordering total needs to see what a server has taken, which --server-addr does not show"
        ));
    }
    // clap lets these pass beside another input, since that one excludes what they need.
    if args.r#for.is_some() && args.listen.is_none() {
        return usage(anyhow!("--for is for live clients (--listen)"));
    }
    if args.pcap_port.is_some() && args.pcap.is_none() {
        return usage(anyhow!("--pcap-port is for a capture (--pcap)"));
    }
    let sources = sources(args);
    if sources.len() < 2 {
        return usage(anyhow!(
            "one server cannot differ: give two or more (--copies, --server-addr)"
        ));
    }
    let input = match (&args.script, &args.pcap) {
        (Some(path), _) => Some(script::read(path)),
        (_, Some(path)) => Some(capture::read(path, args.pcap_port)),
        (None, None) if args.listen.is_some() => None,
        (None, None) => return usage(anyhow!("no input: give --script, --pcap or --listen")),
    };
    let input = match input.transpose() {
        Ok(input) => input,
        Err(error) => return usage(error),
    };
    if args.port.is_some() {
        namespace::ensure_allowed()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    let folder = Folder::new()?;
    let report = runtime.block_on(check(args, sources, input, &harmless, &folder.0))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.describe(!harmless.is_empty()));
    }
    Ok(if report.fit {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn sources(args: &DeterminismArgs) -> Vec<Source> {
    let recipe = Recipe {
        command: args.command.clone(),
        fixed_port: args.port,
        start_within: args.start_within,
    };
    let started = if args.command.is_empty() {
        0
    } else {
        usize::from(args.copies)
    };
    let started = (0..started).map(|_| Source::Start(recipe.clone()));
    let running = args.server_addr.iter().copied().map(Source::Running);
    started.chain(running).collect()
}

/// A folder for the copies' files, removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| anyhow!("no randomness from the system: {e}"))?;
        let name = format!("unbroken-determinism-{:016x}", u64::from_ne_bytes(random));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed lies in the folder for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The thread of one copy.
struct Runner {
    feed: mpsc::Sender<Feed>,
    thread: std::thread::JoinHandle<()>,
}

async fn check(
    args: &DeterminismArgs,
    sources: Vec<Source>,
    input: Option<Input>,
    harmless: &Harmless,
    folder: &Path,
) -> anyhow::Result<Report> {
    let mut asked_to_stop = shutdown::on_signal()?;
    let board = Arc::new(Board::new(sources.len(), args.keep as usize * 1024 * 1024));
    let (stop, stopped) = watch::channel(false);
    let (ready, mut readiness) = mpsc::channel(sources.len());
    let copies = sources.len();
    let runners = sources.into_iter().enumerate().map(|(copy, source)| {
        let (feed, feeds) = mpsc::channel(FEED_MAX);
        let work = Work {
            copy,
            source,
            folder: folder.join(format!("copy{}", copy + 1)),
            pace: pace(args, copy),
            board: Arc::clone(&board),
            feeds,
            ready: ready.clone(),
            stop: stopped.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("copy {}", copy + 1))
            .spawn(move || work.run())
            .context("starting a thread")?;
        anyhow::Ok(Runner { feed, thread })
    });
    let runners: Vec<Runner> = runners.collect::<anyhow::Result<_>>()?;
    drop(ready);
    let mut session = Session {
        args,
        harmless,
        board: &board,
        names: Arc::default(),
        tally: Tally::default(),
        steps: 0,
    };
    let feeds: Vec<_> = runners.iter().map(|r| r.feed.clone()).collect();
    let (threads, own_feeds): (Vec<_>, Vec<_>) =
        runners.into_iter().map(|r| (r.thread, r.feed)).unzip();
    drop(own_feeds);
    let result = async {
        for _ in 0..copies {
            tokio::select! {
                started = readiness.recv() => started.context("a copy's thread has ended")??,
                _ = asked_to_stop.wait_for(|stop| *stop) => bail!("interrupted"),
            }
        }
        match input {
            Some(input) => session.play(input, feeds, &mut asked_to_stop).await,
            None => session.serve(feeds, &mut asked_to_stop).await,
        }
    }
    .await;
    board.close();
    stop.send_replace(true);
    for thread in threads {
        thread
            .join()
            .map_err(|_| anyhow!("a copy's thread has failed"))?;
    }
    result?;
    session.report()
}

fn pace(args: &DeterminismArgs, copy: usize) -> Pace {
    let times = u32::try_from(copy).expect("copies are few");
    Pace {
        behind: args.stagger * times,
        quiet: args.quiet,
        patience: args.timeout,
        one_at_a_time: args.ordering == Ordering::Total,
        pieces: (copy > 0 && !args.no_pieces).then(|| {
            args.seed
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(copy as u64)
        }),
    }
}

/// What one copy's thread does.
struct Work {
    copy: usize,
    source: Source,
    folder: PathBuf,
    pace: Pace,
    board: Arc<Board>,
    feeds: mpsc::Receiver<Feed>,
    ready: mpsc::Sender<anyhow::Result<()>>,
    stop: watch::Receiver<bool>,
}

impl Work {
    fn run(self) {
        let number = self.copy + 1;
        let ready = self.ready.clone();
        let result = self.try_run().with_context(|| format!("copy {number}"));
        if let Err(error) = result {
            // Once all are ready nobody listens, and nothing fails.
            let _ = ready.try_send(Err(error));
        }
    }

    fn try_run(self) -> anyhow::Result<()> {
        if let Source::Start(recipe) = &self.source
            && recipe.fixed_port.is_some()
        {
            namespace::enter().context("making a network of its own")?;
        }
        // One thread: its sockets and its server are in this thread's network.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting an event loop")?;
        runtime.block_on(self.attend())
    }

    async fn attend(mut self) -> anyhow::Result<()> {
        let mut server = None;
        let address = match &self.source {
            Source::Running(address) => *address,
            Source::Start(recipe) => {
                let started = tokio::select! {
                    started = Copy::start(recipe, self.copy + 1, &self.folder) => started?,
                    _ = self.stop.wait_for(|stop| *stop) => return Ok(()),
                };
                let address = started.address;
                server = Some(started);
                address
            }
        };
        let _ = self.ready.send(Ok(())).await;
        let mut player = Player::new(self.copy, address, self.pace, Arc::clone(&self.board));
        let mut stop = self.stop.clone();
        let playing = async {
            player.play(&mut self.feeds).await;
            // What it says is read until the end.
            let _ = self.stop.wait_for(|stop| *stop).await;
        };
        let watching = async {
            match &mut server {
                Some(server) => {
                    let how = server.ended().await;
                    self.board.lock(self.copy).exited = Some(how);
                }
                None => std::future::pending::<()>().await,
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = playing => {}
            () = watching => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        if let Some(server) = server {
            server.stop().await;
        }
        Ok(())
    }
}

/// What was compared so far.
#[derive(Default)]
struct Tally {
    compared: BTreeSet<Conn>,
    input_bytes: u64,
    output_bytes: u64,
    ignored_bytes: usize,
    differences: Vec<Difference>,
    left_out: usize,
    notes: Vec<String>,
}

struct Session<'a> {
    args: &'a DeterminismArgs,
    harmless: &'a Harmless,
    board: &'a Board,
    names: live::Names,
    tally: Tally,
    steps: usize,
}

impl Session<'_> {
    /// Plays a script or a capture to its end.
    async fn play(
        &mut self,
        input: Input,
        feeds: Vec<mpsc::Sender<Feed>>,
        stop: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = input.names;
        self.tally.notes = input.notes;
        self.steps = input.steps.len();
        let at = Instant::now();
        for feed in feeds {
            let steps = input.steps.clone();
            tokio::spawn(async move {
                for (line, step) in steps {
                    let step = Feed {
                        at,
                        line,
                        step,
                        client: None,
                    };
                    if feed.send(step).await.is_err() {
                        return;
                    }
                }
            });
        }
        tokio::select! {
            () = self.settle() => Ok(()),
            _ = stop.wait_for(|stop| *stop) => bail!("interrupted"),
        }
    }

    /// Until every copy has done every step and has no more to say.
    async fn settle(&self) {
        let mut progress = Progress::new(self.steps * self.board.copies());
        let mut all_played = None;
        loop {
            sleep(LOOK_EVERY).await;
            let copies = 0..self.board.copies();
            let copies: Vec<_> = copies.map(|c| self.board.lock(c)).collect();
            progress.show(copies.iter().map(|c| c.steps).sum());
            let played = copies.iter().all(|c| c.played);
            let last = copies.iter().filter_map(|c| c.last_output).max();
            drop(copies);
            if !played {
                continue;
            }
            let since = *all_played.get_or_insert_with(Instant::now);
            let last = last.map_or(since, Instant::from_std).max(since);
            let quiet = last.elapsed() >= self.args.settle;
            if quiet && (self.board.agree_in_length() || last.elapsed() >= self.args.timeout) {
                return;
            }
        }
    }

    /// Serves live clients until told to stop.
    async fn serve(
        &mut self,
        feeds: Vec<mpsc::Sender<Feed>>,
        stop: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let address = self.args.listen.as_ref().expect("there is no other input");
        let listener = live::bind(address).await?;
        let address = listener.local_addr()?;
        eprintln!("serving clients on {address} with copy 1; Ctrl-C ends it");
        let serving = tokio::spawn(live::serve(listener, feeds, Arc::clone(&self.names)));
        let until = self.args.r#for.map(|time| Instant::now() + time);
        let mut told_at = Instant::now();
        while !*stop.borrow() && until.is_none_or(|until| Instant::now() < until) {
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
            let known = self.tally.differences.len();
            self.compare_ended();
            for difference in &self.tally.differences[known..] {
                eprintln!("{}", difference.describe());
            }
            if told_at.elapsed() >= TELL_EVERY {
                told_at = Instant::now();
                let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                let differ = self.tally.differences.len() + self.tally.left_out;
                let (connections, compared) = (names.len(), self.tally.compared.len());
                eprintln!("{connections} connections, {compared} compared, {differ} differ");
            }
        }
        serving.abort();
        // The others are behind; what clients have said by now is answered by all.
        self.drain().await;
        Ok(())
    }

    /// Until the copies that are behind have caught up.
    async fn drain(&self) {
        let begun = Instant::now();
        let times = u32::try_from(self.board.copies()).expect("copies are few");
        let patience = self.args.stagger * times + self.args.timeout;
        let least = self.args.stagger * (times - 1) + self.args.settle;
        while begun.elapsed() < least
            || (!self.board.agree_in_length() && begun.elapsed() < patience)
        {
            sleep(LOOK_EVERY).await;
        }
    }

    /// Compares the connections that have ended on every copy, and forgets them.
    fn compare_ended(&mut self) {
        let ended = |copy: usize| -> BTreeSet<Conn> {
            let answers = self.board.lock(copy);
            let ended = answers.conns.iter().filter(|(_, t)| t.end != End::Open);
            ended.map(|(conn, _)| *conn).collect()
        };
        let mut all = ended(0);
        for copy in 1..self.board.copies() {
            let there = ended(copy);
            all.retain(|conn| there.contains(conn));
        }
        for conn in all {
            self.compare(conn);
            for copy in 0..self.board.copies() {
                self.board.lock(copy).forget(conn);
            }
        }
    }

    fn compare(&mut self, conn: Conn) {
        let name = self.names.lock().unwrap_or_else(PoisonError::into_inner)[conn].clone();
        if let Some(transcript) = self.board.lock(0).conns.get(&conn) {
            self.tally.input_bytes += transcript.sent_total;
            self.tally.output_bytes += transcript.total;
        }
        let (found, ignored) = compare::connection(self.board, conn, &name, self.harmless);
        self.tally.ignored_bytes += ignored;
        self.tally.compared.insert(conn);
        for difference in found {
            if self.tally.differences.len() < self.args.show {
                self.tally.differences.push(difference);
            } else {
                self.tally.left_out += 1;
            }
        }
    }

    fn report(mut self) -> anyhow::Result<Report> {
        let conns: BTreeSet<Conn> = (0..self.board.copies())
            .flat_map(|copy| {
                self.board
                    .lock(copy)
                    .conns
                    .keys()
                    .copied()
                    .collect::<Vec<_>>()
            })
            .collect();
        for conn in conns {
            self.compare(conn);
        }
        let first = self.board.lock(0);
        let (vain, exited) = (first.vain.clone(), first.exited.clone());
        drop(first);
        let mut alike = true;
        for copy in 0..self.board.copies() {
            let answers = self.board.lock(copy);
            for (line, what) in &answers.vain {
                let place = match line {
                    0 => String::new(),
                    line => format!("line {line}: "),
                };
                let note = format!("{place}copy {}: waited in vain for {what}", copy + 1);
                self.tally.notes.push(note);
            }
            if let Some(how) = &answers.exited {
                let note = format!("copy {}: the server ended by itself ({how})", copy + 1);
                self.tally.notes.push(note);
            }
            if answers.truncated {
                self.tally.notes.push(format!(
                    "copy {}: more than --keep {} MiB; what was beyond was not compared",
                    copy + 1,
                    self.args.keep
                ));
            }
            alike &= answers.vain == vain && answers.exited == exited;
        }
        let tally = self.tally;
        // Live traffic may have been none.
        ensure!(
            tally.output_bytes > 0 || !tally.differences.is_empty(),
            "nothing was compared: the first copy answered nothing{}",
            tally
                .notes
                .iter()
                .map(|n| format!("\n  note: {n}"))
                .collect::<String>()
        );
        Ok(Report {
            fit: tally.differences.is_empty() && tally.left_out == 0 && alike,
            ordering: match self.args.ordering {
                Ordering::Connection => "connection",
                Ordering::Total => "total",
            },
            copies: self.board.copies(),
            connections: tally.compared.len(),
            input_bytes: tally.input_bytes,
            output_bytes: tally.output_bytes,
            ignored_bytes: tally.ignored_bytes,
            differences: tally.differences,
            differences_left_out: tally.left_out,
            notes: tally.notes,
        })
    }
}

/// Tells how far long work has come, where somebody looks at it.
struct Progress {
    total: usize,
    bar: Option<indicatif::ProgressBar>,
    begun: Instant,
}

impl Progress {
    fn new(total: usize) -> Self {
        Self {
            total,
            bar: None,
            begun: Instant::now(),
        }
    }

    fn show(&mut self, done: usize) {
        // Short work needs no bar, and a file none at all.
        if self.bar.is_none()
            && self.begun.elapsed() > TELL_EVERY
            && std::io::IsTerminal::is_terminal(&std::io::stderr())
        {
            let style = "{msg} {wide_bar} {pos}/{len} steps, {eta} left";
            let style = indicatif::ProgressStyle::with_template(style).expect("it is well formed");
            let bar = indicatif::ProgressBar::new(self.total as u64).with_style(style);
            self.bar = Some(bar.with_message("trying the copies"));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations() {
        assert_eq!(duration("1s 500ms"), Ok(Duration::from_millis(1500)));
        assert!(duration("soon").unwrap_err().contains("100ms"));
    }
}
