//! One process of the benchmark: a member of groups, told over its standard input what to do.

use std::collections::BTreeMap;
use std::io::{BufRead as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use unbroken::groups::CoordinatorRegistry;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_group::node::{Event, Events, Group, Node, NodeConfig};
use unbroken_group::process::{Multicast, Order, Stability};

/// The first byte of a message or datagram whose way is timed; its send time follows.
const TIMED: u8 = b't';
/// Ends the answering of pings.
const LAST: u8 = b'l';
const PING_PORT: u16 = 7500;
/// How long a step may take that should take milliseconds.
const LONG: Duration = Duration::from_secs(60);

/// What a member is asked to do; each is answered by one [`Answer`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Keep all threads on this core; `None`: on any.
    Pin(Option<usize>),
    /// Start the node.
    Start {
        members: BTreeMap<String, SocketAddr>,
        coordinators: Vec<String>,
        settings: Settings,
    },
    /// Join these groups, all at once; taken by one thread, or each by a task.
    Join { groups: Vec<String>, tasks: bool },
    /// Wait until these groups have so many members.
    Await { groups: Vec<String>, members: usize },
    /// Answer datagrams of bare UDP.
    Pong { spin: bool },
    /// Send so many and wait for each.
    Ping {
        to: SocketAddr,
        count: u32,
        bytes: usize,
        spin: bool,
    },
    /// Send so many fbcasts and wait until each is stable.
    Stable {
        group: String,
        count: u32,
        bytes: usize,
    },
    /// The one-way times of pings or fbcasts that came here since the last time.
    OneWay,
    /// Send fbcasts for so long, to the groups in turn, and wait until all are stable; and after every so many to each
    /// group, where that is given.
    Flood {
        groups: Vec<String>,
        bytes: usize,
        milliseconds: u64,
        outstanding: Option<u64>,
    },
    /// Forget what was counted.
    Reset,
    /// What was delivered since.
    Count,
    /// Leave a group.
    Leave { group: String },
    /// Stop the node.
    Stop,
    /// The views of a group.
    Views { group: String },
    /// Resident memory.
    Resident,
}

/// How the nodes are set.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) suspect_after_ms: u64,
    /// 0: none.
    pub(super) spin_us: u64,
}

/// Times are nanoseconds of CLOCK_MONOTONIC, the same on all hosts of one machine.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Done { at: u64, began: u64 },
    Times(Vec<u64>),
    Flooded(Flooded),
    Counted(Counted),
    Views(Vec<View>),
    Resident { bytes: u64 },
    Failed(String),
}

/// What was sent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Flooded {
    pub(super) messages: u64,
    pub(super) began: u64,
    pub(super) cpu: u64,
}

/// What was delivered.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Counted {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    /// When the last came.
    pub(super) last: u64,
    pub(super) cpu: u64,
}

/// A view, and when the program took it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct View {
    pub(super) members: usize,
    pub(super) at: u64,
}

/// What the takers of events have seen.
#[derive(Default)]
struct Seen {
    counted: Counted,
    times: Vec<u64>,
    views: BTreeMap<String, Vec<View>>,
}

type Shared = Arc<Mutex<Seen>>;

struct Member {
    name: String,
    runtime: Runtime,
    seen: Shared,
    node: Option<Node>,
    groups: BTreeMap<String, Group>,
    pong: Option<JoinHandle<()>>,
    cpu_at_reset: u64,
}

/// Serves until the standard input ends.
pub(super) fn run(name: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let mut member = Member {
        name: name.to_owned(),
        runtime,
        seen: Shared::default(),
        node: None,
        groups: BTreeMap::new(),
        pong: None,
        cpu_at_reset: 0,
    };
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?)?;
        let answer = member
            .answer(ask)
            .unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    Ok(())
}

impl Member {
    fn answer(&mut self, ask: Ask) -> Result<Answer> {
        let began = now();
        match ask {
            Ask::Pin(core) => pin(core)?,
            Ask::Start {
                members,
                coordinators,
                settings,
            } => self.start(members, coordinators, settings)?,
            Ask::Join { groups, tasks } => self.join(&groups, tasks)?,
            Ask::Await { groups, members } => self.wait_for(&groups, members)?,
            Ask::Pong { spin } => self.pong(spin)?,
            Ask::Ping {
                to,
                count,
                bytes,
                spin,
            } => return Ok(Answer::Times(ping(to, count, bytes, spin)?)),
            Ask::Stable {
                group,
                count,
                bytes,
            } => return Ok(Answer::Times(self.stable(&group, count, bytes)?)),
            Ask::OneWay => {
                if let Some(pong) = self.pong.take() {
                    let _ = pong.join();
                }
                let times = std::mem::take(&mut lock(&self.seen).times);
                return Ok(Answer::Times(times));
            }
            Ask::Flood {
                groups,
                bytes,
                milliseconds,
                outstanding,
            } => return self.flood(&groups, bytes, milliseconds, outstanding),
            Ask::Reset => {
                lock(&self.seen).counted = Counted::default();
                self.cpu_at_reset = cpu();
            }
            Ask::Count => {
                let mut counted = lock(&self.seen).counted;
                counted.cpu = cpu() - self.cpu_at_reset;
                return Ok(Answer::Counted(counted));
            }
            Ask::Leave { group } => {
                let group = self.groups.remove(&group).context("not a member")?;
                self.runtime.block_on(group.leave())?;
            }
            Ask::Stop => {
                self.groups.clear();
                if let Some(node) = self.node.take() {
                    self.runtime.block_on(node.stop());
                }
            }
            Ask::Views { group } => {
                let views = lock(&self.seen).views.get(&group).cloned();
                return Ok(Answer::Views(views.unwrap_or_default()));
            }
            Ask::Resident => return resident(),
        }
        Ok(Answer::Done { at: now(), began })
    }

    fn start(
        &mut self,
        members: BTreeMap<String, SocketAddr>,
        coordinators: Vec<String>,
        settings: Settings,
    ) -> Result<()> {
        let options = ConnectOptions::new(coordinators).session_timeout(Duration::from_secs(4));
        let client = self.runtime.block_on(Client::connect(options))?;
        let registry = CoordinatorRegistry::new(client, self.runtime.handle().clone(), "bench");
        let mut config = NodeConfig::new(&self.name, members, [9; 32]);
        config.suspect_after = Duration::from_millis(settings.suspect_after_ms);
        config.lease = config.suspect_after / 2;
        config.spin = Duration::from_micros(settings.spin_us);
        self.node = Some(Node::start(config, registry)?);
        Ok(())
    }

    fn join(&mut self, groups: &[String], tasks: bool) -> Result<()> {
        let node = self.node.as_ref().context("no node")?;
        let joined = self.runtime.block_on(async {
            let joins = groups.iter().map(|name| Group::join(node, name));
            let mut joined = Vec::new();
            // All requests are made before the first is waited for.
            for join in all(joins).await {
                joined.push(join?);
            }
            Ok::<_, anyhow::Error>(joined)
        })?;
        for (name, (group, events)) in groups.iter().zip(joined) {
            self.groups.insert(name.clone(), group);
            let (name, seen) = (name.clone(), Arc::clone(&self.seen));
            if tasks {
                self.runtime.spawn(take_all(name, events, seen));
            } else {
                thread::Builder::new()
                    .name(format!("takes {name}"))
                    .spawn(move || block_and_take(&name, events, &seen))?;
            }
        }
        Ok(())
    }

    fn wait_for(&self, groups: &[String], members: usize) -> Result<()> {
        let began = Instant::now();
        for name in groups {
            let group = self.groups.get(name).context("not a member")?;
            while group.view().is_none_or(|v| v.members.len() != members) {
                if began.elapsed() > LONG {
                    bail!("{name} has {:?}, not {members} members", group.view());
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    fn pong(&mut self, spin: bool) -> Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", PING_PORT))?;
        socket.set_nonblocking(spin)?;
        let seen = Arc::clone(&self.seen);
        let answering = thread::Builder::new()
            .name("pong".to_owned())
            .spawn(move || {
                let mut times = Vec::new();
                let mut buffer = [0; 65_536];
                loop {
                    let Ok((len, from)) = receive(&socket, &mut buffer) else {
                        return;
                    };
                    match stamp(&buffer[..len]) {
                        Some(sent) => times.push(now() - sent),
                        None if buffer[0] == LAST => break,
                        None => {}
                    }
                    if socket.send_to(&buffer[..len], from).is_err() {
                        return;
                    }
                }
                lock(&seen).times = times;
            })?;
        self.pong = Some(answering);
        Ok(())
    }

    fn stable(&self, group: &str, count: u32, bytes: usize) -> Result<Vec<u64>> {
        let group = self.groups.get(group).context("not a member")?;
        self.runtime.block_on(async {
            let mut times = Vec::new();
            for _ in 0..count {
                let body = timed(bytes);
                let began = now();
                group.fbcast_sync(body).await?;
                times.push(now() - began);
            }
            Ok(times)
        })
    }

    fn flood(
        &self,
        names: &[String],
        bytes: usize,
        milliseconds: u64,
        outstanding: Option<u64>,
    ) -> Result<Answer> {
        let groups: Option<Vec<&Group>> = names.iter().map(|name| self.groups.get(name)).collect();
        let groups = groups.context("not a member")?;
        let body = Bytes::from(vec![b'x'; bytes]);
        let last = Multicast::new(Order::Fifo, body.clone());
        let (began, cpu_began) = (now(), cpu());
        let until = began + milliseconds * 1_000_000;
        let mut messages = 0;
        self.runtime.block_on(async {
            let mut turns = 0;
            'sending: loop {
                for group in &groups {
                    group.fbcast(body.clone()).await?;
                    messages += 1;
                    // The clock is not what is measured.
                    if messages % 64 == 0 && now() >= until {
                        break 'sending;
                    }
                }
                turns += 1;
                if outstanding.is_some_and(|most| turns % most == 0) {
                    messages += stable_everywhere(&groups, &last).await?;
                }
            }
            messages += stable_everywhere(&groups, &last).await?;
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(Answer::Flooded(Flooded {
            messages,
            began,
            cpu: cpu() - cpu_began,
        }))
    }
}

/// Sends one more to each group and waits until all are stable. How many.
async fn stable_everywhere(groups: &[&Group], last: &Multicast) -> Result<u64> {
    let sends = groups
        .iter()
        .map(|group| group.send_stable(last.clone(), Stability::All));
    let sent = all(sends).await;
    let count = sent.len() as u64;
    sent.into_iter().collect::<Result<(), _>>()?;
    Ok(count)
}

/// Waits for all of them together.
async fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (future, done) in waiting.iter_mut().zip(&mut done) {
            if done.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(output) => *done = Some(output),
                    std::task::Poll::Pending => all = false,
                }
            }
        }
        if all {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn take_all(name: String, mut events: Events, seen: Shared) {
    while let Some(event) = events.next().await {
        take(&name, event, &mut lock(&seen));
    }
}

fn block_and_take(name: &str, mut events: Events, seen: &Shared) {
    while let Some(event) = events.blocking_next() {
        take(name, event, &mut lock(seen));
    }
}

fn take(name: &str, event: Event, seen: &mut Seen) {
    match event {
        Event::Message(message) => {
            let body = message.body();
            seen.counted.messages += 1;
            seen.counted.bytes += body.len() as u64;
            // Reading the clock for each would be a good part of what is measured.
            if let Some(sent) = stamp(body) {
                seen.times.push(now() - sent);
            } else if seen.counted.messages.is_multiple_of(64) {
                seen.counted.last = now();
            }
        }
        Event::StateWanted(wanted) => wanted.give(Vec::new()),
        Event::View(view) => {
            let view = View {
                members: view.members.len(),
                at: now(),
            };
            seen.views.entry(name.to_owned()).or_default().push(view);
        }
        Event::Init | Event::State(_) | Event::Left { .. } => {}
    }
}

fn ping(to: SocketAddr, count: u32, bytes: usize, spin: bool) -> Result<Vec<u64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((to.ip(), PING_PORT))?;
    socket.set_nonblocking(spin)?;
    let mut buffer = [0; 65_536];
    let mut times = Vec::new();
    for _ in 0..count {
        let body = timed(bytes);
        let began = now();
        socket.send(&body)?;
        receive(&socket, &mut buffer)?;
        times.push(now() - began);
    }
    socket.send(&[LAST])?;
    Ok(times)
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> std::io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            result => return result,
        }
    }
}

/// A body that carries the time.
fn timed(bytes: usize) -> Bytes {
    let mut body = BytesMut::zeroed(bytes.max(9));
    body[0] = TIMED;
    (&mut body[1..]).put_u64_le(now());
    body.freeze()
}

fn stamp(body: &[u8]) -> Option<u64> {
    let (first, rest) = body.split_first()?;
    let sent = rest.first_chunk()?;
    (*first == TIMED).then(|| u64::from_le_bytes(*sent))
}

fn nanoseconds(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    u64::try_from(t.tv_sec * 1_000_000_000 + t.tv_nsec).unwrap_or(0)
}

/// The time by the clock that all processes of a machine share.
pub(super) fn now() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

/// CPU time of this process.
fn cpu() -> u64 {
    nanoseconds(ClockId::ProcessCPUTime)
}

fn pin(core: Option<usize>) -> Result<()> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    // What is available shrinks when this thread is pinned: count what the machine has.
    let all = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let most = all.trim().rsplit(['-', ',']).next();
    let most = most.and_then(|n| n.parse::<usize>().ok());
    let cores = most.map_or(cores, |last| last + 1);
    let mut set = CpuSet::new();
    match core {
        Some(core) => set.set(core % cores),
        None => (0..cores).for_each(|core| set.set(core)),
    }
    for task in std::fs::read_dir("/proc/self/task")? {
        let id = task?.file_name().to_string_lossy().parse::<i32>()?;
        sched_setaffinity(rustix::process::Pid::from_raw(id), &set)?;
    }
    Ok(())
}

fn resident() -> Result<Answer> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(Answer::Resident {
        bytes: kib.context("VmRSS")? * 1024,
    })
}
