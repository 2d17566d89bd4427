//! Several processes share one mapped region: they relax a grid together (Jacobi), with a barrier after each step, and
//! count their steps under a lock. In the middle a new one joins, and one is killed while it holds the lock and has
//! scribbled over the count. In the end the grid has to be, bit for bit, what one process alone computes.
//!
//! `cargo run -p unbroken-group --example dsm`

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "an example"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;
use unbroken_group::MemberId;
use unbroken_group::dsm::Region;
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::registry::FileRegistry;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The grid's width and height, borders included.
const SIDE: usize = 130;
const STEPS: u64 = 60;
/// In this step one is killed.
const KILLED_AT: u64 = 20;
const GRID_BYTES: usize = SIDE * SIDE * 8;

// What lies where: steps done, steps counted under the lock, and the two grids between which the steps alternate.
const DONE: usize = 0;
const COUNTED: usize = 8;
const GRIDS: usize = 4096;
const BYTES: usize = GRIDS + 2 * GRID_BYTES;
const LOCK: u32 = 0;

/// The grid before the first step: one hot edge.
fn beginning() -> Vec<f64> {
    let hot = |i: usize| if i < SIDE { 100.0 + i as f64 } else { 0.0 };
    (0..SIDE * SIDE).map(hot).collect()
}

/// One row of the next grid: each point is the mean of its neighbours.
fn relax(from: &[f64], row: usize, to: &mut [f64]) {
    to.copy_from_slice(&from[row * SIDE..][..SIDE]);
    for (column, to) in to.iter_mut().enumerate().take(SIDE - 1).skip(1) {
        let at = row * SIDE + column;
        *to = (from[at - SIDE] + from[at + SIDE] + from[at - 1] + from[at + 1]) / 4.0;
    }
}

fn grid(step: u64) -> usize {
    GRIDS + usize::from(step % 2 == 1) * GRID_BYTES
}

/// A line that the parent waits for.
fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

/// A member's work: steps of which each has its share of rows. Gives how often it has counted.
async fn work(region: &Region, victim: bool) -> Result<u64, Error> {
    let mut members: Vec<MemberId> = Vec::new();
    let (mut done, mut counted) = (0, 0);
    loop {
        let now = region.barrier(0).await?;
        // A step counts if those who began it are those who ended it, and all see that alike. Else a part may be missing,
        // and it is done again: where the last one ended is still there.
        if now == members {
            done += 1;
        } else {
            done = region.get(DONE);
        }
        members = now;
        region.set::<u64>(DONE, done);
        if done == STEPS {
            return Ok(counted);
        }
        if victim && done == KILLED_AT {
            let held = region.lock(LOCK).await?;
            held.set(COUNTED, 999_999_u64); // never released, so seen by nobody
            say(&format!("holding {counted}"));
            std::future::pending::<()>().await;
        }
        let rank = members.iter().position(|m| *m == region.me());
        let rank = rank.ok_or("not among those who came")?;
        {
            let from = region.slice::<f64>(grid(done), SIDE * SIDE);
            for row in (1..SIDE - 1).skip(rank).step_by(members.len()) {
                let at = grid(done + 1) + row * SIDE * 8;
                relax(&from, row, &mut region.slice_mut::<f64>(at, SIDE));
            }
        }
        let held = region.lock(LOCK).await?;
        if held.abandoned() {
            say("abandoned");
        }
        held.set(COUNTED, held.get::<u64>(COUNTED) + 1);
        counted += 1;
    }
}

/// One process.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn member(name: &str, dir: &Path, addresses: &[String]) -> Result<(), Error> {
    let mut members: BTreeMap<String, SocketAddr> = BTreeMap::new();
    for (i, address) in addresses.iter().enumerate() {
        members.insert(format!("r{}", i + 1), address.parse()?);
    }
    let mut config = NodeConfig::new(name, members, [7; 32]);
    // The machine may be busy; that a process is dead is seen at once, from its connections.
    config.lease = Duration::from_secs(1);
    config.suspect_after = Duration::from_secs(2);
    let node = Node::start(config, FileRegistry::open(dir)?)?;
    let (region, rest) = Region::join(&node, "grid", BYTES).await?;
    let rest = tokio::spawn(rest);
    say("joined");
    let (told, go) = tokio::sync::oneshot::channel();
    std::thread::spawn(|| {
        let mut lines = std::io::stdin().lines();
        if let Some(Ok(_)) = lines.next() {
            let _ = told.send(());
        }
        let _ = lines.next();
        std::process::exit(1);
    });
    if name == "r1" {
        // The founder lays out both grids, and lets others see them.
        let held = region.lock(LOCK).await?;
        for at in [grid(0), grid(1)] {
            held.slice_mut(at, SIDE * SIDE)
                .copy_from_slice(&beginning());
        }
    }
    // Nobody begins before the parent says so (three are there then), or goes on without it.
    if name != "r4" {
        go.await?;
    }
    let counted = work(&region, name == "r3").await?;
    if name == "r1" {
        let whole: Vec<u8> = region.slice::<u8>(0, BYTES).to_vec();
        std::fs::write(dir.join("result"), whole)?;
    }
    say(&format!("counted {counted}"));
    region.leave().await;
    rest.await?;
    node.stop().await;
    Ok(())
}

/// A child, and what it says.
struct Started {
    name: String,
    child: Child,
    // Not the child's, which closes it when it is waited for.
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Started {
    fn new(name: &str, dir: &Path, addresses: &[String]) -> Result<Self, Error> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["member", name])
            .arg(dir)
            .args(addresses)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no pipe")?).lines();
        let stdin = child.stdin.take().ok_or("no pipe")?;
        let name = name.to_owned();
        println!("{name} is process {}", child.id());
        Ok(Self {
            name,
            child,
            stdin,
            lines,
        })
    }

    /// Waits until it says something that begins so; gives the number behind, and whether it said "abandoned" before.
    fn until(&mut self, what: &str) -> Result<(u64, bool), Error> {
        let mut abandoned = false;
        for line in self.lines.by_ref() {
            let line = line?;
            println!("  {}: {line}", self.name);
            abandoned |= line == "abandoned";
            if let Some(rest) = line.strip_prefix(what) {
                return Ok((rest.trim().parse().unwrap_or(0), abandoned));
            }
        }
        Err(format!("{} ended without saying \"{what}\"", self.name).into())
    }

    fn go(&mut self) -> Result<(), Error> {
        Ok(writeln!(self.stdin, "go")?)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parent(dir: &Path) -> Result<(), Error> {
    let free: Vec<TcpListener> = (0..4)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let mut addresses = Vec::new();
    for listener in &free {
        addresses.push(listener.local_addr()?.to_string());
    }
    drop(free);
    let mut members = Vec::new();
    for name in ["r1", "r2", "r3"] {
        let mut started = Started::new(name, dir, &addresses)?;
        started.until("joined")?;
        members.push(started);
    }
    for started in &mut members {
        started.go()?;
    }
    let mut victim = members.pop().ok_or("three were started")?;
    let (mut expected, _) = victim.until("holding")?;
    let mut late = Started::new("r4", dir, &addresses)?;
    late.until("joined")?;
    members.push(late);
    println!("r3 is killed while it holds the lock");
    drop(victim);
    let mut abandoned = 0;
    for started in &mut members {
        let (counted, said) = started.until("counted")?;
        expected += counted;
        abandoned += u32::from(said);
    }
    for started in &mut members {
        let status = started.child.wait()?;
        if !status.success() {
            return Err(format!("{} ended with {status}", started.name).into());
        }
    }
    let result = std::fs::read(dir.join("result"))?;
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| result[at + i]));
    let (done, counted) = (word(DONE), word(COUNTED));
    let mut alone = [beginning(), beginning()];
    for _ in 0..STEPS {
        let [from, to] = &mut alone;
        for row in 1..SIDE - 1 {
            relax(from, row, &mut to[row * SIDE..][..SIDE]);
        }
        alone.swap(0, 1);
    }
    let same = (0..SIDE * SIDE).all(|i| word(grid(STEPS) + i * 8) == alone[0][i].to_bits());
    println!(
        "steps {done} of {STEPS}; counted {counted} of {expected}; the grid is the same: {same}"
    );
    if (done, counted, abandoned) != (STEPS, expected, 1) || !same {
        return Err("the memory is not what it has to be".into());
    }
    println!("PASS");
    Ok(())
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, what, name, dir, addresses @ ..] = &arguments[..]
        && what == "member"
    {
        return member(name, Path::new(dir), addresses);
    }
    let dir = std::env::temp_dir().join(format!("unbroken-dsm-{}", std::process::id()));
    let result = parent(&dir);
    let _ = std::fs::remove_dir_all(&dir);
    result
}
