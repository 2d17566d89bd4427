//! Whole members on loopback: core, driver, a thread each, and a coordinator in memory.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant as Clock;

use bytes::Bytes;
use mio::{Events, Poll};
use unbroken_group::driver::{Driver, TOKENS};
use unbroken_group::{
    CasResult, Command, Config, Core, Instant, MemberId, Output, ReadResult, RegistryReply, Role,
};

pub(crate) const GROUP: u32 = 1;

/// The coordinator: two nodes with versions.
#[derive(Default)]
pub(crate) struct Registry {
    view: Option<(Bytes, i32)>,
    lease: Option<(Bytes, i32)>,
}

impl Registry {
    fn read(node: Option<&(Bytes, i32)>) -> ReadResult {
        node.map_or(ReadResult::Absent, |(value, version)| ReadResult::Value {
            value: value.clone(),
            version: *version,
        })
    }

    fn answer(&mut self, output: &Output) -> Option<RegistryReply> {
        Some(match output {
            Output::ReadView => RegistryReply::View(Self::read(self.view.as_ref())),
            Output::ReadLease => RegistryReply::Lease(Self::read(self.lease.as_ref())),
            Output::CompareAndSet {
                expected_version,
                value,
            } => {
                let have = self.view.as_ref().map(|(_, v)| *v);
                let written = have == *expected_version;
                let version = have.map_or(0, |v| v + 1);
                if written {
                    self.view = Some((value.clone(), version));
                }
                RegistryReply::Cas(result(written, version))
            }
            Output::RenewLease {
                view_version,
                value,
            } => {
                let written = self.view.as_ref().map(|(_, v)| *v) == Some(*view_version);
                let version = self.lease.as_ref().map_or(0, |(_, v)| v + 1);
                if written {
                    self.lease = Some((value.clone(), version));
                }
                RegistryReply::Renew(result(written, version))
            }
            _ => return None,
        })
    }
}

fn result(written: bool, version: i32) -> CasResult {
    if written {
        CasResult::Written { version }
    } else {
        CasResult::BadVersion
    }
}

/// What a member tells the test.
#[derive(Default, Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) role: Option<Role>,
    pub(crate) full: usize,
    pub(crate) applied: u64,
    pub(crate) digest: u64,
    pub(crate) stable: u64,
    pub(crate) view: u64,
    /// When the newest view was installed, in microseconds of the test's clock.
    pub(crate) installed_us: u64,
    pub(crate) counters: unbroken_group::Counters,
}

pub(crate) struct Member {
    pub(crate) seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Member {
    /// A death without a word: sockets are closed as the kernel closes those of a killed process.
    pub(crate) fn kill(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }
}

pub(crate) struct Cluster {
    pub(crate) members: BTreeMap<String, SocketAddr>,
    pub(crate) registry: Arc<Mutex<Registry>>,
    pub(crate) started: Clock,
    /// Events that leaders multicast in all, and how large.
    pub(crate) event_bytes: usize,
    pub(crate) events_max: u64,
}

impl Cluster {
    pub(crate) fn new(count: usize, event_bytes: usize, events_max: u64) -> Self {
        let free: Vec<_> = (0..count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let addresses = free.iter().map(|l| l.local_addr().unwrap());
        let names = (1..).map(|i| format!("r{i}"));
        Self {
            members: names.zip(addresses).collect(),
            registry: Arc::default(),
            started: Clock::now(),
            event_bytes,
            events_max,
        }
    }

    pub(crate) fn start(&self, name: &str, incarnation: u128) -> Member {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let member = Member {
            seen: seen.clone(),
            stop: stop.clone(),
            thread: None,
        };
        let me = MemberId::new(name, incarnation);
        let names = self.members.keys().cloned().collect();
        let config = Config::new(GROUP, me.clone(), names, 99);
        let (members, registry) = (self.members.clone(), self.registry.clone());
        let (started, event_bytes, events_max) = (self.started, self.event_bytes, self.events_max);
        let thread = std::thread::spawn(move || {
            let mut node = Node {
                poll: Poll::new().unwrap(),
                driver: Driver::open(&me.name, &members, &[7; 32], now(started)).unwrap(),
                core: Core::new(config.clone(), 1, now(started)),
                config,
                trace: std::env::var_os("GROUP_TRACE").is_some(),
                registry,
                replies: VecDeque::new(),
                seen,
                mine: Seen::default(),
                image: Vec::new(),
                started,
            };
            node.run(&me, &stop, event_bytes, events_max);
        });
        Member {
            thread: Some(thread),
            ..member
        }
    }
}

fn now(started: Clock) -> Instant {
    Instant::from_micros(u64::try_from(started.elapsed().as_micros()).unwrap() + 1)
}

pub(crate) fn fold(digest: u64, number: u64, payload: &[u8]) -> u64 {
    let first = u64::from(payload.first().copied().unwrap_or(0));
    (digest ^ number ^ (payload.len() as u64) << 20 ^ first << 50)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

struct Node {
    config: Config,
    trace: bool,
    poll: Poll,
    driver: Driver,
    core: Core,
    registry: Arc<Mutex<Registry>>,
    replies: VecDeque<RegistryReply>,
    seen: Arc<Mutex<Seen>>,
    mine: Seen,
    image: Vec<u8>,
    started: Clock,
}

impl Node {
    fn run(&mut self, me: &MemberId, stop: &AtomicBool, event_bytes: usize, events_max: u64) {
        let mut events = Events::with_capacity(TOKENS);
        self.driver.register(self.poll.registry(), 0).unwrap();
        self.driver.set_member(GROUP, me.clone());
        self.core
            .handle_command(now(self.started), Command::Join)
            .unwrap();
        self.drain();
        while !stop.load(Ordering::SeqCst) {
            let mut idle = true;
            // All that waits, before any silence is judged; bounded, so that timers are never starved.
            for _ in 0..2 {
                if !self.driver.receiver.readable() {
                    break;
                }
                let (core, started) = (&mut self.core, self.started);
                let mut ready = Vec::new();
                let received = self.driver.receiver.receive(|_, from, body| {
                    idle = false;
                    core.handle_datagram(now(started), from, body);
                    ready.extend(std::iter::from_fn(|| core.poll_ready()));
                });
                received.unwrap();
                self.execute(ready);
            }
            self.drain();
            while let Some(input) = self.driver.control.poll_input(now(self.started)) {
                self.core
                    .handle_control(now(self.started), &input.peer, input.event);
                self.drain();
            }
            let mut budget = 64;
            while self.core.window_open() && self.mine.applied < events_max && budget > 0 {
                budget -= 1;
                let number = self.mine.applied + 1;
                let byte = u8::try_from(number % 251).unwrap();
                let payload = Bytes::from(vec![byte; event_bytes]);
                self.apply(number, &payload);
                self.core
                    .multicast(now(self.started), number, payload, true);
            }
            let at = now(self.started);
            if self.core.poll_timeout().is_some_and(|t| t <= at) {
                self.core.handle_timeout(at);
            }
            self.drain();
            self.mine.counters = self.core.status().counters;
            *self.seen.lock().unwrap() = self.mine.clone();
            if idle && !self.driver.receiver.readable() {
                let due = [self.core.poll_timeout(), self.driver.poll_timeout()];
                let due = due.into_iter().flatten().min();
                let wait = due.map_or(std::time::Duration::from_millis(5), |t| {
                    t.since(now(self.started))
                });
                self.poll.poll(&mut events, Some(wait)).unwrap();
                for event in &events {
                    self.driver.handle_ready(event.token());
                }
            }
        }
    }

    fn apply(&mut self, number: u64, payload: &[u8]) {
        assert_eq!(number, self.mine.applied + 1, "in order");
        self.mine.digest = fold(self.mine.digest, number, payload);
        self.mine.applied = number;
    }

    fn drain(&mut self) {
        self.drain_outputs();
        while let Some(reply) = self.replies.pop_front() {
            self.core.handle_registry(now(self.started), reply);
            self.drain_outputs();
        }
    }

    fn drain_outputs(&mut self) {
        while let Some(output) = self.core.poll_output() {
            self.execute([output]);
        }
    }

    fn execute(&mut self, outputs: impl IntoIterator<Item = Output>) {
        let mut outside = false;
        for output in outputs {
            if let Some(reply) = self.registry.lock().unwrap().answer(&output) {
                self.replies.push_back(reply);
                continue;
            }
            match output {
                Output::Send { to, bodies } => {
                    let at = now(self.started);
                    self.driver.sender.send(at, GROUP, &to, &bodies);
                }
                Output::Deliver { number, payload } => self.apply(number, &payload),
                Output::Stable { number } => self.mine.stable = number,
                Output::Install(i) => {
                    self.driver.set_epoch(GROUP, i.view.id.0);
                    self.mine.role = Some(i.role);
                    self.mine.full = i.view.full.len();
                    self.mine.view = i.view.id.0;
                    self.mine.installed_us = now(self.started).micros();
                }
                Output::Instance(instance) => {
                    self.driver.sender.set_instance(GROUP, instance);
                    self.driver.receiver.set_instance(GROUP, instance);
                }
                Output::CheckpointWanted { joiner, .. } => {
                    let mut image = self.mine.applied.to_le_bytes().to_vec();
                    image.extend_from_slice(&self.mine.digest.to_le_bytes());
                    image.resize(3_000_000, 5);
                    let segments = image.chunks(100_000).map(Bytes::copy_from_slice).collect();
                    let command = Command::Checkpoint { joiner, segments };
                    self.core
                        .handle_command(now(self.started), command)
                        .unwrap();
                }
                Output::CheckpointChunk { offset, bytes, .. } => {
                    assert_eq!(offset, self.image.len() as u64);
                    self.image.extend_from_slice(&bytes);
                }
                Output::CheckpointDone => {
                    assert_eq!(self.image.len(), 3_000_000);
                    let word =
                        |i: usize| u64::from_le_bytes(self.image[i..i + 8].try_into().unwrap());
                    (self.mine.applied, self.mine.digest) = (word(0), word(8));
                    let at = now(self.started);
                    self.core
                        .handle_command(at, Command::ReadyToBeFull)
                        .unwrap();
                }
                // A loaded machine may stop a thread for long enough to be excluded: it joins anew, as a node does.
                Output::Outside => outside = true,
                Output::Notice(n) if self.trace => {
                    println!("{:>9} {} {n:?}", now(self.started).micros(), self.core.me());
                }
                _ => {}
            }
        }
        if outside {
            self.begin_anew();
        }
    }

    fn begin_anew(&mut self) {
        let mut config = self.config.clone();
        config.me.incarnation = self.core.me().incarnation + 1000;
        self.driver.set_member(GROUP, config.me.clone());
        self.core = Core::new(config, 1, now(self.started));
        self.replies.clear();
        self.mine = Seen::default();
        self.image.clear();
        self.core
            .handle_command(now(self.started), Command::Join)
            .unwrap();
    }
}

/// Waits until `f` says yes, for a minute at most.
pub(crate) fn until(what: &str, mut f: impl FnMut() -> bool) {
    let began = Clock::now();
    while !f() {
        assert!(
            began.elapsed().as_secs() < 60,
            "not within a minute: {what}"
        );
        std::thread::yield_now();
    }
}
