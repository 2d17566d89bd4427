//! A count that outlives the failure of all its processes: three of them keep it on their disks and write as fast as they can.
//! Again and again all are killed (SIGKILL), at once or one after the other, and come back in another order. Nothing that was
//! acknowledged may be lost, and who was not the last to fail has to wait for who was.
//!
//! `cargo run -p unbroken-group --example durable`

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "an example"
)]

#[path = "local/mod.rs"]
#[expect(dead_code, reason = "its nodes are of one process")]
mod local;

use bytes::Bytes;
use local::Error;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use unbroken_group::MemberId;
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::registry::FileRegistry;
use unbroken_group::tools::{Durable, Machine};

const HELP: &str = "Kills all processes of a durable group again and again, and looks for what they had acknowledged.

Usage: durable [--rounds NUMBER]

  --rounds NUMBER  failures of all (5)

Example: durable --rounds 20";

const NAMES: [&str; 3] = ["r1", "r2", "r3"];
/// Nothing that is waited for takes as long.
const LONG: Duration = Duration::from_secs(60);

/// Of each writer, its last update; an update that comes out of turn is a mistake that stays.
#[derive(Default)]
struct Counts {
    last: BTreeMap<String, u64>,
    out_of_turn: bool,
}

impl Machine for Counts {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        let update = String::from_utf8_lossy(update);
        if let Some((writer, number)) = update.split_once(' ')
            && let Ok(number) = number.parse::<u64>()
        {
            let last = self.last.entry(writer.to_owned()).or_default();
            self.out_of_turn |= number != *last + 1;
            *last = number;
        }
        Bytes::new()
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let mut text = format!("{}\n", self.out_of_turn);
        for (writer, number) in &self.last {
            text += &format!("{writer} {number}\n");
        }
        vec![text.into()]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (out_of_turn, rest) = text.split_once('\n')?;
        let counts = rest.lines().map(|line| {
            let (writer, number) = line.split_once(' ')?;
            Some((writer.to_owned(), number.parse().ok()?))
        });
        Some(Self {
            last: counts.collect::<Option<_>>()?,
            out_of_turn: out_of_turn.parse().ok()?,
        })
    }
}

// ---- one process -------------------------------------------------------------------------------------------------------

/// A line for the parent.
fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn member(name: &str, life: &str, dir: &Path, addresses: &[String]) -> Result<(), Error> {
    let mut members: BTreeMap<String, SocketAddr> = BTreeMap::new();
    for (name, address) in NAMES.iter().zip(addresses) {
        members.insert((*name).to_owned(), address.parse()?);
    }
    let founders: BTreeSet<String> = members.keys().cloned().collect();
    let mut config = NodeConfig::new(name, members, [7; 32]);
    // The machine may be busy; that a process is dead is seen at once, from its connections.
    config.lease = Duration::from_secs(1);
    config.suspect_after = Duration::from_secs(2);
    let node = Node::start(config, FileRegistry::open(dir.join("registry"))?)?;
    let disk = dir.join(name);
    let (counts, work) = Durable::<Counts>::open(&node, "counts", &disk, &founders).await?;
    let work = tokio::spawn(work);
    let mut awaited = BTreeSet::new();
    while counts.read(|_| ()).is_none() {
        let now = counts.awaits();
        if now != awaited {
            awaited = now;
            let names: Vec<&str> = awaited.iter().map(String::as_str).collect();
            say(&format!("awaits {}", names.join(",")));
        }
        if work.is_finished() {
            work.await??;
            return Err("it ended before it began".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let state = counts.read(Counts::snapshot).ok_or("it is out")?.concat();
    for line in String::from_utf8(state)?.lines() {
        say(&format!("has {line}"));
    }
    say("runs");
    for number in 1_u64.. {
        let update = format!("{name}.{life} {number}");
        counts.update(update.as_bytes()).await?;
        say(&format!("acknowledged {number}"));
    }
    Ok(())
}

// ---- the parent --------------------------------------------------------------------------------------------------------

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn order(&mut self) -> Vec<&'static str> {
        let mut names = NAMES.to_vec();
        for i in (1..names.len()).rev() {
            let j = usize::try_from(self.below(i as u64 + 1)).unwrap_or(0);
            names.swap(i, j);
        }
        names
    }
}

/// Who said it, and what; `None`: it has ended.
type Heard = (&'static str, Option<String>);

struct Drill {
    dir: PathBuf,
    addresses: Vec<String>,
    running: BTreeMap<&'static str, Child>,
    life: u64,
    said: Sender<Heard>,
    heard: Receiver<Heard>,
    /// By writer, its last acknowledged update.
    acknowledged: BTreeMap<String, u64>,
    /// What was so when the round began.
    before: BTreeMap<String, u64>,
    /// What the one that comes back says that it has.
    has: BTreeMap<&'static str, BTreeMap<String, u64>>,
    awaits: BTreeMap<&'static str, String>,
    ready: BTreeSet<&'static str>,
}

impl Drill {
    fn start(&mut self, name: &'static str) -> Result<(), Error> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["member", name, &self.life.to_string()])
            .arg(&self.dir)
            .args(&self.addresses)
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
        let said = self.said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = said.send((name, Some(line)));
            }
            let _ = said.send((name, None));
        });
        self.running.insert(name, child);
        Ok(())
    }

    /// Takes what they say until this is so.
    fn until(&mut self, what: &str, f: impl Fn(&Self) -> bool) -> Result<(), Error> {
        while !f(self) {
            let heard = self.heard.recv_timeout(LONG);
            let (name, line) = heard.map_err(|_| format!("not within a minute: {what}"))?;
            let Some(line) = line else {
                return Err(format!("{name} has ended by itself").into());
            };
            self.take(name, &line)?;
        }
        Ok(())
    }

    fn take(&mut self, name: &'static str, line: &str) -> Result<(), Error> {
        let (what, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (what, rest) {
            ("has", "false") => {
                self.has.insert(name, BTreeMap::new());
            }
            ("has", "true") => return Err(format!("{name}: an update came out of turn").into()),
            ("has", count) => {
                let (writer, number) = count.split_once(' ').ok_or("no count")?;
                let has = self.has.entry(name).or_default();
                has.insert(writer.to_owned(), number.parse()?);
            }
            ("runs", _) => {
                let has = self.has.remove(name).unwrap_or_default();
                for (writer, number) in &self.before {
                    let there = has.get(writer).copied().unwrap_or(0);
                    if there < *number {
                        let lost = format!("{name} has {there} updates of {writer}, and {number}");
                        return Err(format!("{lost} were acknowledged").into());
                    }
                }
                self.ready.insert(name);
            }
            ("awaits", names) => {
                self.awaits.insert(name, names.to_owned());
            }
            ("acknowledged", number) => {
                let writer = format!("{name}.{}", self.life);
                self.acknowledged.insert(writer, number.parse()?);
            }
            _ => return Err(format!("{name} says {line}").into()),
        }
        Ok(())
    }

    fn count_of(&self, name: &str) -> u64 {
        let writer = format!("{name}.{}", self.life);
        self.acknowledged.get(&writer).copied().unwrap_or(0)
    }

    /// Waits until each that runs had so many more updates acknowledged.
    fn progress(&mut self, more: u64) -> Result<(), Error> {
        let names: Vec<&str> = self.running.keys().copied().collect();
        let goals: Vec<(&str, u64)> = names
            .into_iter()
            .map(|name| (name, self.count_of(name) + more))
            .collect();
        let reached = |d: &Self| goals.iter().all(|(name, goal)| d.count_of(name) >= *goal);
        self.until("acknowledgements", reached)
    }

    /// SIGKILL. What it has said before is taken too.
    fn kill(&mut self, names: &[&'static str]) -> Result<(), Error> {
        for name in names {
            self.running.get_mut(name).ok_or("it runs")?.kill()?;
        }
        let mut ended = BTreeSet::new();
        while ended.len() < names.len() {
            match self.heard.recv_timeout(LONG)? {
                (name, Some(line)) => self.take(name, &line)?,
                (name, None) => {
                    ended.insert(name);
                }
            }
        }
        for name in names {
            let mut dead = self.running.remove(name).ok_or("it ran")?;
            dead.wait()?;
            if !ended.contains(name) {
                return Err("another has ended by itself".into());
            }
        }
        Ok(())
    }

    /// All come back, who was `last` to fail after the others.
    fn come_back(
        &mut self,
        order: &[&'static str],
        last: Option<&'static str>,
    ) -> Result<(), Error> {
        self.life += 1;
        self.before = self.acknowledged.clone();
        self.awaits.clear();
        self.ready.clear();
        for name in order.iter().filter(|name| Some(**name) != last) {
            self.start(name)?;
        }
        if let Some(last) = last {
            let all_wait = |d: &Self| {
                let others = NAMES.iter().filter(|name| **name != last);
                others
                    .into_iter()
                    .all(|n| d.awaits.get(n).is_some_and(|who| who == last))
            };
            self.until("the others wait for the last to fail", all_wait)?;
            if !self.ready.is_empty() {
                return Err(format!("{:?} did not wait for {last}", self.ready).into());
            }
            self.start(last)?;
        }
        self.until("all are back", |d| d.ready.len() == NAMES.len())
    }
}

impl Drop for Drill {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn drill(rounds: usize) -> Result<(), Error> {
    let free: Vec<TcpListener> = NAMES
        .iter()
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let addresses = free.iter().map(|l| Ok(l.local_addr()?.to_string()));
    let addresses = addresses.collect::<Result<_, Error>>()?;
    drop(free);
    let (said, heard) = channel();
    let id = std::process::id();
    let mut drill = Drill {
        dir: std::env::temp_dir().join(format!("unbroken-example-durable-{id}")),
        addresses,
        running: BTreeMap::new(),
        life: 0,
        said,
        heard,
        acknowledged: BTreeMap::new(),
        before: BTreeMap::new(),
        has: BTreeMap::new(),
        awaits: BTreeMap::new(),
        ready: BTreeSet::new(),
    };
    let mut chance = Chance(u64::from(id));
    let mut last = None;
    for round in 1..=rounds {
        drill.come_back(&chance.order(), last)?;
        drill.progress(1 + chance.below(30))?;
        let order = chance.order();
        if round % 2 == 0 {
            drill.kill(&order)?;
            last = None;
            println!("all are killed at once");
        } else {
            for name in &order {
                drill.kill(&[name])?;
                // The second was sent when it was dead: those that are left go on without it, and have that on their disks.
                drill.progress(2 + chance.below(5))?;
            }
            last = order.last().copied();
            println!("killed one after the other: {}", order.join(", "));
        }
    }
    drill.come_back(&chance.order(), last)?;
    let count: u64 = drill.acknowledged.values().sum();
    println!("{rounds} failures of all: none of {count} acknowledged updates is lost");
    Ok(())
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, what, name, life, dir, addresses @ ..] = &arguments[..]
        && what == "member"
    {
        return member(name, life, Path::new(dir), addresses);
    }
    drill(local::argument(HELP, "--rounds", 5, 1))
}
