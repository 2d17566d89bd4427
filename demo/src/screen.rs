//! What is shown while it runs: one line for each thing that happens and, on a terminal, a line for
//! each client that is drawn again and again. On standard error, so that the report stands alone.

use std::io::{self, IsTerminal as _, Write as _};

use crate::pace::{millions, now_us, seconds};
use crate::series::Series;
use crate::traffic::{Client, Unit};

/// Between two drawings on a terminal, in microseconds.
const DRAW_EVERY_US: u64 = 100_000;

/// The window that a speed is taken over, in microseconds.
const SPEED_OVER_US: u64 = 1_000_000;

const BAR_WIDTH: u64 = 24;

/// The screen.
pub(crate) struct Screen {
    terminal: bool,
    verbose: bool,
    start_us: u64,
    drawn_us: u64,
    /// Lines under the last message that the next one overwrites.
    lines: usize,
    waiting: Option<String>,
}

impl Screen {
    pub(crate) fn new(verbose: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let start_us = now_us();
        Self {
            terminal,
            verbose,
            start_us,
            drawn_us: 0,
            lines: 0,
            waiting: None,
        }
    }

    /// A line that stays.
    pub(crate) fn say(&mut self, text: impl AsRef<str>) {
        self.erase();
        let at = seconds(now_us() - self.start_us);
        eprintln!("{at:6.1} s  {}", text.as_ref());
        self.waiting = None;
    }

    /// What the cluster still lacks.
    pub(crate) fn waiting_for(&mut self, why: &str) {
        if self.waiting.as_deref() != Some(why) {
            if self.verbose {
                self.say(format!("waiting: {why}"));
            }
            self.waiting = Some(why.to_owned());
        }
    }

    /// The clients' lines.
    pub(crate) fn draw(&mut self, now: u64, clients: &[Client]) {
        if !self.terminal || now < self.drawn_us + DRAW_EVERY_US {
            return;
        }
        self.drawn_us = now;
        let mut lines: Vec<String> = clients
            .iter()
            .map(|client| client.with_series(|s| line(client, s, self.start_us, now)))
            .collect();
        if let Some(why) = &self.waiting {
            lines.push(format!("  waiting: {why}"));
        }
        self.erase();
        // Cut to any usual terminal: a wrapped line could not be taken back.
        let text: String = lines.iter().map(|line| format!("{line:.79}\n")).collect();
        eprint!("{text}");
        let _ = io::stderr().flush();
        self.lines = lines.len();
    }

    /// Takes the drawn lines back.
    pub(crate) fn erase(&mut self) {
        if self.lines > 0 {
            eprint!("\x1b[{}A\x1b[J", self.lines);
            self.lines = 0;
        }
    }
}

fn line(client: &Client, series: &Series, start_us: u64, now: u64) -> String {
    // What comes after its end is no gap.
    let done = client.outcome().is_some();
    let now = if done {
        series.last_us().unwrap_or(now)
    } else {
        now
    };
    let total = series.total();
    let speed: u64 = series
        .steps(now.saturating_sub(SPEED_OVER_US), SPEED_OVER_US, 1)
        .iter()
        .sum();
    let gap = series
        .longest_gap(start_us, now)
        .map_or(0, |gap| gap.length_us)
        / 1_000;
    let name = client.name;
    let end = if done { ", done" } else { "" };
    match (client.unit, client.size) {
        (Unit::Bytes, Some(size)) => {
            let filled = total * BAR_WIDTH / size.max(1);
            let bar: String = (0..BAR_WIDTH)
                .map(|i| if i < filled { '#' } else { '.' })
                .collect();
            format!(
                "  {name:<9} [{bar}] {:>5.1} MB {:>5.1} MB/s  longest gap {gap} ms{end}",
                millions(total),
                millions(speed)
            )
        }
        _ => format!("  {name:<9} {total:>9} answered, {speed:>5}/s  longest gap {gap} ms{end}"),
    }
}

/// What is going on, on one line of a terminal.
pub(crate) fn show(what: &str) {
    let mut err = io::stderr();
    if err.is_terminal() {
        let _ = write!(err, "\r\x1b[K{what}");
    } else {
        let _ = writeln!(err, "{what}");
    }
    let _ = err.flush();
}

/// Takes the line of [`show`] back.
pub(crate) fn clear() {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
