//! Kernel clients keep their connections while the leader dies at random outputs.
//!
//! The simulation of `unbroken-tcpstate` crashes its leader at every event, but against a client on
//! smoltcp, which shares the stack's blind spots. Here the client is Linux. Three replicas, each with
//! a packet socket on a host of its own, run in one thread with the real stack, record and event
//! encoding; between them lies a model of the group (what a member holds lags by a few events, one
//! holder makes an event stable, the survivors agree on the most that any of them holds), and each has
//! its own copy of the server, which lags too. Everything else is left to the kernel.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec};
use unbroken::wire::{BootTime, Flushed, Kind, Options, OutPacket, RECEIVE_BATCH, Wire};
use unbroken_tcpstate as tcp;
use unbroken_tcpstate::{Checksum, ConnId, Event, EventNo, LinkAddr, Output, Replica, Stack};
use unbroken_tests::client::{self, ClientError, Outcome, Progress};
use unbroken_tests::netns::{Host, Lab, LabOptions, userns};
use unbroken_tests::server::{Session, SessionState};

const PORT: u16 = 80;
const REPLICAS: usize = 3;
/// The most events by which a member that holds least lags behind.
const LAG_MAX: u64 = 8;
/// Outputs that a leader whose end is decided may still make.
const DOOMED_OUTPUTS_MAX: u64 = 30;
/// For how long a member lags by the same, at most.
const LAG_STAYS_MAX_US: u64 = 4_000;
/// For how long nobody leads after a crash, at most.
const GAP_MAX_US: u64 = 15_000;
const VIP4: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x100);

/// SplitMix64: the test's own choices follow from its seed, the kernel's do not.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % n
    }
}

fn now() -> tcp::Instant {
    tcp::Instant::from_micros(BootTime::now().micros())
}

enum Input {
    Bytes(Bytes),
    End,
}

/// One connection's server on one replica.
#[derive(Default)]
struct Served {
    session: Session,
    waiting: VecDeque<(EventNo, Input)>,
    taken: u64,
    /// The newest event given to the server.
    tag: EventNo,
    end_told: bool,
}

enum Role {
    Leader(Box<Stack>),
    Backup(Box<Replica>),
}

struct Node {
    wire: Wire,
    role: Role,
    served: BTreeMap<ConnId, Served>,
    /// Events that it holds, and has applied.
    held: u64,
    /// Events by which a backup holds less than there is.
    lag: u64,
    lag_until: tcp::Instant,
}

impl Node {
    fn note(&mut self, number: EventNo, event: &Event) {
        let wait = |served: &mut BTreeMap<_, Served>, conn, input| {
            if let Some(one) = served.get_mut(conn) {
                one.waiting.push_back((number, input));
            }
        };
        match event {
            Event::Open { .. } => {
                let one = Served {
                    tag: number,
                    ..Served::default()
                };
                self.served.insert(ConnId(number.0), one);
            }
            Event::Data { conn, bytes, .. } => {
                wait(&mut self.served, conn, Input::Bytes(bytes.clone()));
            }
            Event::PeerFin { conn, .. } => wait(&mut self.served, conn, Input::End),
            Event::Reset { conn, .. } | Event::Closed { conn } => {
                self.served.remove(conn);
            }
            Event::HalfOpen { .. }
            | Event::Acked { .. }
            | Event::LocalFin { .. }
            | Event::Skip { .. }
            | Event::Answered { .. } => {}
        }
    }

    fn apply(&mut self, number: EventNo, event: &Event) {
        let Role::Backup(replica) = &mut self.role else {
            panic!("a leader applies nothing")
        };
        replica.apply(now(), number, event);
        self.held = number.0;
        self.note(number, event);
    }

    /// Lets the servers take at most `inputs` each, and takes what they say.
    fn pump(&mut self, inputs: usize) {
        for (conn, one) in &mut self.served {
            for _ in 0..inputs {
                let Some((number, input)) = one.waiting.pop_front() else {
                    break;
                };
                one.tag = number;
                match input {
                    Input::Bytes(bytes) => {
                        one.session.input(&bytes);
                        one.taken += bytes.len() as u64;
                    }
                    Input::End => one.session.end(),
                }
                if let Role::Leader(stack) = &mut self.role {
                    stack.handle_consumed(now(), *conn, one.taken);
                }
            }
            loop {
                let room = match &self.role {
                    Role::Leader(stack) => stack.output_room(*conn),
                    Role::Backup(replica) => replica.output_room(*conn),
                };
                let output = one.session.output(room.min(64 * 1024));
                if output.is_empty() {
                    break;
                }
                match &mut self.role {
                    Role::Leader(stack) => {
                        stack.handle_server_bytes(now(), *conn, &output, one.tag);
                    }
                    Role::Backup(replica) => replica.handle_server_bytes(*conn, &output),
                }
            }
            if one.session.state() == SessionState::Open || one.end_told {
                continue;
            }
            one.end_told = true;
            match (&mut self.role, one.session.state()) {
                (Role::Leader(stack), SessionState::Refused) => {
                    stack.handle_server_reset(now(), *conn);
                }
                (Role::Leader(stack), _) => stack.handle_server_fin(now(), *conn),
                (Role::Backup(replica), SessionState::Refused) => {
                    replica.handle_server_reset(*conn);
                }
                (Role::Backup(replica), _) => replica.handle_server_fin(*conn),
            }
        }
    }
}

struct Cluster {
    config: tcp::Config,
    secrets: tcp::Secrets,
    clock: tcp::ServiceClock,
    nodes: Vec<Node>,
    leader: usize,
    /// Event n at n - 1, as encoded.
    log: Vec<Bytes>,
    stable: u64,
    /// Outputs until the next crash, and its range.
    countdown: u64,
    /// It dies as soon as it holds events alone.
    doomed: bool,
    between_crashes: u64,
    crashes: u32,
    rng: Rng,
    spare: Vec<Vec<u8>>,
}

impl Cluster {
    fn new(lab: &Lab, vip: IpAddr, seed: u64, between_crashes: u64) -> Self {
        let hosts = (1..=REPLICAS).map(|i| lab.host(&format!("r{i}")));
        let wires: Vec<Wire> = hosts
            .map(|host: &Host| host.enter(|| Wire::open(&Options::new("eth0", vip)).unwrap()))
            .collect();
        let mut config = tcp::Config::new(vip, [PORT]);
        config.mtu = usize::from(wires[0].mtu());
        config.segmentation_offload = true;
        config.checksum_offload = true;
        let secrets = tcp::Secrets::new(1, &[7; 32]);
        let clock = tcp::ServiceClock {
            at: now(),
            value_us: 1_000_000_000,
        };
        let nodes = wires
            .into_iter()
            .map(|wire| {
                let role = Role::Backup(Box::new(Replica::new(config.clone())));
                Node {
                    wire,
                    role,
                    served: BTreeMap::new(),
                    held: 0,
                    lag: 0,
                    lag_until: now(),
                }
            })
            .collect();
        let mut cluster = Self {
            config,
            secrets,
            clock,
            nodes,
            leader: 0,
            log: Vec::new(),
            stable: 0,
            countdown: u64::MAX,
            doomed: false,
            between_crashes,
            crashes: 0,
            rng: Rng(seed),
            spare: Vec::new(),
        };
        let stack = Stack::new(
            cluster.config.clone(),
            cluster.secrets.clone(),
            now(),
            cluster.clock,
            EventNo(1),
        );
        cluster.nodes[0].role = Role::Leader(Box::new(stack));
        cluster.claim();
        cluster
    }

    fn claim(&mut self) {
        self.countdown = 1 + self.rng.below(self.between_crashes);
        self.doomed = false;
        let wire = &mut self.nodes[self.leader].wire;
        let at = BootTime::now();
        wire.discard_input();
        wire.set_owner(at, true);
        wire.fence_mut().open_until(at + Duration::from_secs(3600));
        wire.handle_timeout(at);
    }

    /// One turn of every node. False if nothing is waiting for another.
    fn turn(&mut self) -> bool {
        if self.doomed && self.alone_with_events() {
            self.crash();
        }
        let busy = self.lead();
        self.replicate() | busy
    }

    fn lead(&mut self) -> bool {
        let node = &mut self.nodes[self.leader];
        let Role::Leader(stack) = &mut node.role else {
            panic!("the leader leads")
        };
        let received = node
            .wire
            .receive(BootTime::now(), |frame| {
                if let Kind::Ip(packet) = frame.kind {
                    let trust = if frame.checksum_ok {
                        Checksum::Verified
                    } else {
                        Checksum::Verify
                    };
                    stack.handle_packet(now(), packet, LinkAddr(frame.source), trust);
                }
            })
            .unwrap();
        if stack.poll_timeout().is_some_and(|at| at <= now()) {
            stack.handle_timeout(now());
        }
        if !self.drain() {
            return true;
        }
        // The leader's own server lags too.
        let inputs = usize::try_from(self.rng.below(4)).unwrap();
        self.nodes[self.leader].pump(inputs);
        if !self.drain() {
            return true;
        }
        let node = &mut self.nodes[self.leader];
        node.wire.handle_timeout(BootTime::now());
        assert_ne!(node.wire.flush(&mut self.spare).unwrap(), Flushed::Fenced);
        let Role::Leader(stack) = &mut node.role else {
            panic!("the leader leads")
        };
        for buf in self.spare.drain(..) {
            stack.recycle(buf);
        }
        received == RECEIVE_BATCH || node.served.values().any(|one| !one.waiting.is_empty())
    }

    /// Executes the leader's outputs. False if it crashed over it.
    fn drain(&mut self) -> bool {
        loop {
            let node = &mut self.nodes[self.leader];
            let Role::Leader(stack) = &mut node.role else {
                panic!("the leader leads")
            };
            let Some(output) = stack.poll_output() else {
                return true;
            };
            match output {
                Output::Transmit(packet) => node.wire.send(OutPacket {
                    buf: packet.buf,
                    next_hop: packet.next_hop.0,
                    gso: packet.gso,
                    partial_checksum: packet.partial_checksum,
                }),
                Output::Replicate { number, event } => {
                    let mut encoded = Vec::new();
                    event.encode(&mut encoded);
                    self.log.push(encoded.into());
                    assert_eq!(number.0, self.log.len() as u64, "events are contiguous");
                    node.note(number, &event);
                }
                Output::Room(_) | Output::Notice(_) => {}
            }
            self.countdown -= 1;
            if self.countdown > 0 {
                continue;
            }
            if !self.doomed && self.rng.below(2) == 0 {
                // Between turns then, at the next moment at which it costs most, if one comes soon.
                self.doomed = true;
                self.countdown = DOOMED_OUTPUTS_MAX;
            } else {
                // Half of the crashes come after what was emitted has left, half before.
                if self.rng.below(2) == 0 {
                    let _ = self.nodes[self.leader].wire.flush(&mut self.spare).unwrap();
                }
                self.crash();
                return false;
            }
        }
    }

    /// Whether only the leader holds some events, after it had every chance to show what depends on
    /// them.
    fn alone_with_events(&self) -> bool {
        let backups = (0..REPLICAS).filter(|i| *i != self.leader);
        self.log.len() as u64 > backups.map(|i| self.nodes[i].held).max().unwrap()
    }

    fn event(&self, number: u64) -> Event {
        let at = usize::try_from(number - 1).unwrap();
        Event::decode(&self.log[at]).unwrap()
    }

    fn hold(&mut self, node: usize, up_to: u64) {
        for number in self.nodes[node].held + 1..=up_to {
            let event = self.event(number);
            self.nodes[node].apply(EventNo(number), &event);
        }
    }

    /// The backups take what they take, and the leader learns what is stable.
    fn replicate(&mut self) -> bool {
        let newest = self.log.len() as u64;
        for i in (0..REPLICAS)
            .filter(|i| *i != self.leader)
            .collect::<Vec<_>>()
        {
            // A lag stays for a while: a crash must find it.
            if now() >= self.nodes[i].lag_until {
                let lags = self.rng.below(2) == 0;
                self.nodes[i].lag = if lags { self.rng.below(LAG_MAX + 1) } else { 0 };
                let stays = Duration::from_micros(self.rng.below(LAG_STAYS_MAX_US));
                self.nodes[i].lag_until = now() + stays;
            }
            self.hold(i, newest.saturating_sub(self.nodes[i].lag));
            let inputs = usize::try_from(self.rng.below(6)).unwrap();
            self.nodes[i].pump(inputs);
        }
        let backups = (0..REPLICAS).filter(|i| *i != self.leader);
        let stable = backups.map(|i| self.nodes[i].held).max().unwrap();
        if stable > self.stable {
            self.stable = stable;
            let Role::Leader(stack) = &mut self.nodes[self.leader].role else {
                panic!("the leader leads")
            };
            stack.handle_stable(now(), EventNo(stable));
            return true;
        }
        false
    }

    /// The leader is gone with everything that only it knew; another leads on; it comes back empty.
    fn crash(&mut self) {
        self.crashes += 1;
        let dead = self.leader;
        let read = self.clock.read_us(now());
        self.nodes[dead].wire.set_owner(BootTime::now(), false);
        let survivors: Vec<usize> = (0..REPLICAS).filter(|i| *i != dead).collect();
        let cut = survivors.iter().map(|i| self.nodes[*i].held).max().unwrap();
        assert!(cut >= self.stable, "what was stable is held");
        self.log.truncate(usize::try_from(cut).unwrap());
        for i in &survivors {
            self.hold(*i, cut);
        }
        // The fault itself: for this long nobody is there.
        std::thread::sleep(Duration::from_micros(self.rng.below(GAP_MAX_US)));

        self.leader = survivors[usize::try_from(self.rng.below(2)).unwrap()];
        // Strictly above whatever the old one can have shown.
        self.clock = tcp::ServiceClock {
            at: now(),
            value_us: read + 50_000,
        };
        let node = &mut self.nodes[self.leader];
        let config = self.config.clone();
        let empty = || Role::Backup(Box::new(Replica::new(config.clone())));
        let Role::Backup(replica) = std::mem::replace(&mut node.role, empty()) else {
            panic!("a backup takes over")
        };
        let mut stack = Stack::take_over(
            self.config.clone(),
            self.secrets.clone(),
            now(),
            self.clock,
            EventNo(cut + 1),
            *replica,
        );
        for (conn, one) in &node.served {
            stack.handle_consumed(now(), *conn, one.taken);
        }
        node.role = Role::Leader(Box::new(stack));
        self.stable = 0;
        self.claim();

        let back = &mut self.nodes[dead];
        back.role = empty();
        back.served.clear();
        (back.held, back.lag) = (0, 0);
        self.hold(dead, cut);
    }

    /// Waits until a frame comes, a timer is due, or a moment has passed.
    fn rest(&self) {
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 500_000,
        };
        let wire = &self.nodes[self.leader].wire;
        rustix::event::poll(
            &mut [PollFd::new(&wire.as_fd(), PollFlags::IN)],
            Some(&wait),
        )
        .unwrap();
    }

    /// Leads until all clients are done; their connections must be over soon after.
    fn run(&mut self, mut done: impl FnMut() -> bool) {
        while !done() {
            if !self.turn() {
                self.rest();
            }
        }
        (self.countdown, self.doomed) = (u64::MAX, false);
        let patience = Instant::now() + client::PATIENCE;
        while self.nodes.iter().any(|node| !node.served.is_empty()) {
            assert!(
                Instant::now() < patience,
                "a connection outlives its client"
            );
            if !self.turn() {
                self.rest();
            }
        }
    }
}

type Client<'a> = Box<dyn FnOnce() -> Result<Vec<Outcome>, ClientError> + Send + 'a>;

fn connect(vip: IpAddr) -> Result<TcpStream, ClientError> {
    TcpStream::connect_timeout(&SocketAddr::new(vip, PORT), client::PATIENCE)
        .map_err(|source| ClientError::Connection { bytes: 0, source })
}

/// Runs the clients on the client host against a cluster whose leaders die; all must be content.
fn survive(vip: IpAddr, seed: u64, between_crashes: u64, clients: Vec<Client<'_>>) {
    let lab = Lab::new(LabOptions { replicas: 3 }).unwrap();
    let mut cluster = Cluster::new(&lab, vip, seed, between_crashes);
    std::thread::scope(|scope| {
        let running: Vec<_> = clients
            .into_iter()
            .map(|client| scope.spawn(|| lab.host("c").enter(client)))
            .collect();
        cluster.run(|| {
            running
                .iter()
                .all(std::thread::ScopedJoinHandle::is_finished)
        });
        for client in running {
            let outcomes = client.join().unwrap().unwrap_or_else(|error| {
                panic!(
                    "{vip}, seed {seed}, after {} crashes: {error}",
                    cluster.crashes
                )
            });
            for outcome in outcomes.iter().filter(|o| o.bytes > 100_000) {
                println!(
                    "{} bytes, longest gap {:?}",
                    outcome.bytes, outcome.longest_gap
                );
            }
        }
    });
    println!(
        "{vip}, seed {seed}: {} crashes, {} events",
        cluster.crashes,
        cluster.log.len()
    );
    assert!(
        cluster.crashes >= 5,
        "the leader died only {} times",
        cluster.crashes
    );
}

fn all_at_once(vip: IpAddr, seed: u64) {
    const BULK: u64 = 24 << 20;
    let progress = || -> Arc<Progress> { Progress::shared() };
    let rate = Some(8 << 20);
    survive(
        vip,
        seed,
        400,
        vec![
            Box::new(move || {
                Ok(vec![client::download(
                    connect(vip)?,
                    seed,
                    BULK,
                    rate,
                    &progress(),
                )?])
            }),
            Box::new(move || {
                Ok(vec![client::upload(
                    connect(vip)?,
                    seed,
                    BULK,
                    rate,
                    &progress(),
                )?])
            }),
            Box::new(move || {
                let mut left = 1_000;
                let period = Duration::from_millis(2);
                let more = move || {
                    left -= 1;
                    left >= 0
                };
                Ok(vec![client::exchange(
                    connect(vip)?,
                    300,
                    period,
                    &progress(),
                    more,
                )?])
            }),
        ],
    );
}

/// Short connections of every kind one after another: most crashes hit an opening or a closing.
fn many_short(vip: IpAddr, seed: u64) {
    let clients = (0..4u64)
        .map(|lane| -> Client<'_> {
            Box::new(move || {
                let mut rng = Rng(seed ^ lane << 32);
                let mut outcomes = Vec::new();
                for _ in 0..40 {
                    let (progress, length) = (Progress::shared(), 1 + rng.below(40_000));
                    let stream = connect(vip)?;
                    outcomes.push(match rng.below(3) {
                        0 => client::download(stream, seed, length, None, &progress)?,
                        1 => client::upload(stream, seed, length, None, &progress)?,
                        _ => {
                            let mut left = rng.below(4);
                            let more = move || {
                                left = left.wrapping_sub(1);
                                left < 4
                            };
                            client::exchange(stream, 100, Duration::ZERO, &progress, more)?
                        }
                    });
                }
                Ok(outcomes)
            })
        })
        .collect();
    survive(vip, seed, 60, clients);
}

/// `default`, or what the environment says: `UNBROKEN_SEED=123 cargo test ...` tries other crashes.
fn seed(default: u64) -> u64 {
    std::env::var("UNBROKEN_SEED").map_or(default, |text| text.parse().unwrap())
}

#[test]
fn bulk_and_requests_survive_v4() {
    userns::privileged("bulk_and_requests_survive_v4", || {
        all_at_once(VIP4.into(), seed(1))
    });
}

#[test]
fn bulk_and_requests_survive_v6() {
    userns::privileged("bulk_and_requests_survive_v6", || {
        all_at_once(VIP6.into(), seed(2))
    });
}

#[test]
fn openings_and_closings_survive_v4() {
    userns::privileged("openings_and_closings_survive_v4", || {
        many_short(VIP4.into(), seed(3))
    });
}

#[test]
fn openings_and_closings_survive_v6() {
    userns::privileged("openings_and_closings_survive_v6", || {
        many_short(VIP6.into(), seed(4))
    });
}
