//! A world with one client, three replicas, and a leader that dies when it is told to.
//!
//! Everything is drawn from one seed and runs on a virtual clock. What the leader sends is judged on
//! its way out ([`wire::Judge`]); what the client and the servers have in the end is compared byte by
//! byte.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared: each test uses a part of it"
)]

pub mod app;
pub mod client;
pub mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use app::{App, Server};
use bytes::Bytes;
use client::{Client, Script};
use unbroken_tcpstate::{
    Checksum, Config, ConnId, Event, EventNo, Instant, LinkAddr, Output, Replica, ResetBy, Secrets,
    ServiceClock, Stack,
};

/// What happens, and to whom.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub app: App,
    pub script: Script,
    pub ipv6: bool,
    pub offload: bool,
    /// Bytes of receive capacity: above 65,535 the window is scaled.
    pub capacity: u32,
    pub seed: u64,
    /// Kill the leader before it executes its n-th output.
    pub crash_at: Option<usize>,
    /// And the next one after so many outputs of its own.
    pub crash_again_after: Option<usize>,
    /// Kill the leader at this moment, whatever it does.
    pub crash_at_us: Option<u64>,
    /// A segment in so many is lost, each way.
    pub loss: Option<u64>,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// Outputs of all leaders.
    pub outputs: usize,
    pub events: usize,
    pub micros: u64,
    /// A digest of everything that happened, in order.
    pub trace: u64,
    /// How many outputs there were before the connection was known to a backup.
    pub opened_at: usize,
    /// The client's handshake died with its leader, and nobody had anything to say.
    pub handshake_lost: bool,
}

const WIRE_US: u64 = 100;
const REPLICATION_US: u64 = 70;
const LEADER_SERVER_US: u64 = 15;
const LIMIT_US: u64 = 400_000_000;
const CLIENT_LINK: LinkAddr = LinkAddr([2, 0, 0, 0, 0, 9]);

/// A node's servers, and what they have not been given yet.
struct Servers {
    app: App,
    lag_us: u64,
    queue: VecDeque<(u64, EventNo, Event)>,
    servers: BTreeMap<ConnId, Server>,
    /// Servers of connections that are over.
    past: Vec<Server>,
}

impl Servers {
    fn take(&mut self, now: u64, number: EventNo, event: &Event) {
        self.queue
            .push_back((now + self.lag_us, number, event.clone()));
    }

    /// Feeds what is due; returns the connections that were fed.
    fn feed(&mut self, now: u64) -> Vec<ConnId> {
        let mut fed = Vec::new();
        while self.queue.front().is_some_and(|(at, ..)| *at <= now) {
            let (_, number, event) = self.queue.pop_front().unwrap();
            let conn = match &event {
                Event::Open { .. } => {
                    let conn = ConnId(number.0);
                    self.servers.insert(conn, Server::new(self.app, number.0));
                    conn
                }
                other => match other.conn() {
                    Some(conn) => conn,
                    None => continue,
                },
            };
            let Some(server) = self.servers.get_mut(&conn) else {
                continue;
            };
            match &event {
                Event::Data { offset, bytes, .. } => {
                    assert_eq!(*offset, server.input.len() as u64, "input is contiguous");
                    server.input.extend_from_slice(bytes);
                    server.tag = number.0;
                }
                Event::PeerFin { .. } => {
                    server.fin = true;
                    server.tag = number.0;
                }
                Event::Reset { .. } | Event::Closed { .. } => {
                    self.past.extend(self.servers.remove(&conn));
                    continue;
                }
                _ => {}
            }
            fed.push(conn);
        }
        fed
    }
}

struct Leader {
    stack: Stack,
    servers: Servers,
    /// For the judge: up to which offset of output was tagged with what.
    tags: Vec<(u64, u64)>,
}

struct Backup {
    replica: Replica,
    servers: Servers,
}

pub struct World {
    plan: Plan,
    config: Config,
    rng: u64,
    now: u64,
    pub client: Client,
    to_vip: BTreeMap<(u64, u64), Vec<u8>>,
    to_client: BTreeMap<(u64, u64), Vec<u8>>,
    sequence: u64,
    leader: Option<Leader>,
    backups: Vec<Backup>,
    /// Executed events; number n is at n - 1.
    log: Vec<Event>,
    held: usize,
    stable: usize,
    /// (when, event count): backups hold; the leader knows.
    holds: VecDeque<(u64, usize)>,
    stables: VecDeque<(u64, usize)>,
    take_over_at: Option<u64>,
    clock: ServiceClock,
    outputs: usize,
    crash_at: Option<usize>,
    crash_at_us: Option<u64>,
    judge: wire::Judge,
    trace: u64,
    handshake_lost: bool,
    client_stuck: bool,
    opened_at: Option<usize>,
}

pub fn secrets() -> Secrets {
    Secrets::new(3, &[42; 32])
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let (own, vip): (IpAddr, IpAddr) = if plan.ipv6 {
            ("fd00::9".parse().unwrap(), "fd00::100".parse().unwrap())
        } else {
            ("10.0.0.9".parse().unwrap(), "10.0.0.100".parse().unwrap())
        };
        let mut config = Config::new(vip, [80]);
        config.receive_capacity = plan.capacity;
        config.transmit_capacity = 20_000;
        config.retained_output_max = 28_000;
        config.segmentation_offload = plan.offload;
        let clock = ServiceClock {
            at: Instant::from_micros(0),
            value_us: 77_000_000,
        };
        let servers = |lag_us| Servers {
            app: plan.app,
            lag_us,
            queue: VecDeque::new(),
            servers: BTreeMap::new(),
            past: Vec::new(),
        };
        let mut rng = plan.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut lag = || {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            [10, 300, 2_500, 40_000][(rng >> 20) as usize % 4]
        };
        let backups = (0..2)
            .map(|_| Backup {
                replica: Replica::new(config.clone()),
                servers: servers(lag()),
            })
            .collect();
        let stack = Stack::new(
            config.clone(),
            secrets(),
            Instant::from_micros(0),
            clock,
            EventNo(1),
        );
        Self {
            plan,
            rng,
            now: 0,
            client: Client::new(own, vip, plan.script, plan.seed ^ 0x77),
            to_vip: BTreeMap::new(),
            to_client: BTreeMap::new(),
            sequence: 0,
            leader: Some(Leader {
                stack,
                servers: servers(LEADER_SERVER_US),
                tags: Vec::new(),
            }),
            backups,
            log: Vec::new(),
            held: 0,
            stable: 0,
            holds: VecDeque::new(),
            stables: VecDeque::new(),
            take_over_at: None,
            clock,
            outputs: 0,
            crash_at: plan.crash_at,
            crash_at_us: plan.crash_at_us,
            judge: wire::Judge::default(),
            trace: 0xcbf2_9ce4_8422_2325,
            handshake_lost: false,
            client_stuck: false,
            opened_at: None,
            config,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 11) % below.max(1)
    }

    fn note(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.trace = (self.trace ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn instant(&self) -> Instant {
        Instant::from_micros(self.now)
    }

    /// Runs to the end, and compares.
    pub fn run(mut self) -> Run {
        while !self.finished() {
            let limit = LIMIT_US + self.plan.script.idles_us.unwrap_or(0);
            assert!(self.now < limit, "no end in sight: {}", self.describe());
            self.step();
            if self.handshake_lost || self.client_stuck {
                break;
            }
        }
        if self.client_stuck {
            let whole = Server::whole_answer(self.plan.app, &self.client.sent);
            assert_eq!(self.client.received, whole, "{}", self.describe());
        } else if !self.handshake_lost {
            self.compare();
        }
        Run {
            outputs: self.outputs,
            events: self.log.len(),
            micros: self.now,
            trace: self.trace,
            opened_at: self.opened_at.unwrap_or(usize::MAX),
            handshake_lost: self.handshake_lost,
        }
    }

    fn describe(&self) -> String {
        let states: Vec<_> = self
            .leader
            .iter()
            .flat_map(|l| (1..=self.log.len()).filter_map(|n| l.stack.state(ConnId(n as u64))))
            .collect();
        format!(
            "{:?}\nat {} us, client {} sent {} received {}, stack {:?}, servers {:?}, log {:?}",
            self.plan,
            self.now,
            self.client.debug(),
            self.client.sent.len(),
            self.client.received.len(),
            states,
            self.leader.as_ref().map(|l| l
                .servers
                .servers
                .values()
                .map(|s| (s.input.len(), s.fin, s.out, s.said()))
                .collect::<Vec<_>>()),
            self.log.iter().rev().take(8).map(brief).collect::<Vec<_>>(),
        )
    }

    fn finished(&self) -> bool {
        let Some(leader) = &self.leader else {
            return false;
        };
        self.client.finished()
            && leader.stack.connections() == 0
            && leader.servers.queue.is_empty()
            && self.stable == self.log.len()
            && self.held == self.log.len()
            && self.backups.iter().all(|b| b.servers.queue.is_empty())
            && self.to_client.is_empty()
    }

    fn step(&mut self) {
        // What is due at the earliest time, in a fixed order.
        let mut next = self.client.poll_at(self.now).map(|t| t.max(self.now));
        let mut sooner = |t: Option<u64>| next = [next, t].into_iter().flatten().min();
        sooner(self.to_vip.keys().next().map(|k| k.0));
        sooner(self.to_client.keys().next().map(|k| k.0));
        sooner(self.holds.front().map(|h| h.0));
        sooner(self.stables.front().map(|h| h.0));
        sooner(self.take_over_at);
        sooner(self.crash_at_us);
        if let Some(leader) = &self.leader {
            sooner(leader.stack.poll_timeout().map(Instant::micros));
            sooner(leader.servers.queue.front().map(|q| q.0));
        }
        for backup in &self.backups {
            sooner(backup.servers.queue.front().map(|q| q.0));
        }
        let Some(next) = next else {
            if self.client.forgot_its_fin() {
                self.client_stuck = true;
                return;
            }
            // The one thing that may be lost: a handshake younger than its announcement, which is made
            // late, where the client has nothing to say.
            let known = self
                .log
                .iter()
                .any(|e| matches!(e, Event::Open { .. } | Event::HalfOpen { .. }));
            assert!(
                !known && self.plan.script.sends == 0,
                "everybody waits: {}",
                self.describe()
            );
            self.handshake_lost = true;
            return;
        };
        self.now = self.now.max(next);
        let now = self.instant();
        if self.crash_at_us.is_some_and(|at| at <= self.now) {
            self.crash_at_us = None;
            self.crash();
        }

        while let Some(key) = self
            .to_client
            .keys()
            .next()
            .copied()
            .filter(|k| k.0 <= self.now)
        {
            let packet = self.to_client.remove(&key).unwrap();
            self.client.device.incoming.push_back(packet);
        }
        self.client.turn(self.now);
        while let Some(packet) = self.client.device.outgoing.pop_front() {
            self.note(&packet);
            if !self.lost() {
                self.sequence += 1;
                self.to_vip
                    .insert((self.now + WIRE_US, self.sequence), packet);
            }
        }
        while self.holds.front().is_some_and(|h| h.0 <= self.now) {
            let (_, count) = self.holds.pop_front().unwrap();
            self.backups_hold(count);
        }
        while self.stables.front().is_some_and(|h| h.0 <= self.now) {
            let (_, count) = self.stables.pop_front().unwrap();
            self.stable = self.stable.max(count);
            let stable = EventNo(self.stable as u64);
            self.lead(|l| l.stack.handle_stable(now, stable));
        }
        while let Some(key) = self
            .to_vip
            .keys()
            .next()
            .copied()
            .filter(|k| k.0 <= self.now)
        {
            let packet = self.to_vip.remove(&key).unwrap();
            self.lead(|l| {
                l.stack
                    .handle_packet(now, &packet, CLIENT_LINK, Checksum::Verify)
            });
        }
        self.lead(|l| l.stack.handle_timeout(now));
        self.serve();
        for i in 0..self.backups.len() {
            serve_backup(&mut self.backups[i], self.now);
        }
        if self.take_over_at.is_some_and(|at| at <= self.now) {
            self.take_over();
        }
    }

    fn lost(&mut self) -> bool {
        match self.plan.loss {
            Some(n) => self.random(n) == 0,
            None => false,
        }
    }

    /// One mutation of the leader's stack, then its outputs.
    fn lead(&mut self, f: impl FnOnce(&mut Leader)) {
        if let Some(leader) = &mut self.leader {
            f(leader);
            self.drain();
        }
    }

    fn drain(&mut self) {
        loop {
            let Some(leader) = &mut self.leader else {
                return;
            };
            let Some(output) = leader.stack.poll_output() else {
                return;
            };
            if self.crash_at == Some(self.outputs) {
                return self.crash();
            }
            self.outputs += 1;
            match output {
                Output::Replicate { number, event } => {
                    assert_eq!(number.0 as usize, self.log.len() + 1, "contiguous numbers");
                    let mut encoded = Vec::new();
                    event.encode(&mut encoded);
                    let decoded = Event::decode(&Bytes::from(encoded.clone())).unwrap();
                    assert_eq!(decoded, event);
                    leader.servers.take(self.now, number, &event);
                    self.log.push(event);
                    self.note(&encoded);
                    let count = self.log.len();
                    if self.backups.is_empty() {
                        self.holds.push_back((self.now, count));
                        self.stables.push_back((self.now, count));
                    } else {
                        self.holds.push_back((self.now + REPLICATION_US, count));
                        self.stables
                            .push_back((self.now + 2 * REPLICATION_US, count));
                    }
                }
                Output::Transmit(packet) => {
                    assert_eq!(packet.next_hop, CLIENT_LINK);
                    self.judge
                        .judge(packet.ip(), &self.log, self.stable, &leader.tags);
                    let segments = wire::onto_the_wire(&packet);
                    leader.stack.recycle(packet.buf);
                    for segment in segments {
                        self.note(&segment);
                        if !self.lost() {
                            self.sequence += 1;
                            self.to_client
                                .insert((self.now + WIRE_US, self.sequence), segment);
                        }
                    }
                }
                Output::Room(_) | Output::Notice(_) => {}
            }
        }
    }

    fn backups_hold(&mut self, count: usize) {
        for n in self.held + 1..=count {
            for backup in &mut self.backups {
                let number = EventNo(n as u64);
                backup
                    .replica
                    .apply(Instant::from_micros(self.now), number, &self.log[n - 1]);
                backup.servers.take(self.now, number, &self.log[n - 1]);
            }
        }
        self.held = self.held.max(count);
        self.opened_at.get_or_insert(self.outputs);
    }

    /// The leader's server: fed, read.
    fn serve(&mut self) {
        let now = self.instant();
        let Some(leader) = &mut self.leader else {
            return;
        };
        let fed = leader.servers.feed(self.now);
        for conn in fed {
            if let Some(at) = self
                .leader
                .as_ref()
                .and_then(|l| l.servers.servers.get(&conn))
                .map(|s| s.input.len())
            {
                self.lead(|l| l.stack.handle_consumed(now, conn, at as u64));
            }
        }
        let conns: Vec<ConnId> = self
            .leader
            .iter()
            .flat_map(|l| l.servers.servers.keys().copied())
            .collect();
        for conn in conns {
            loop {
                let Some(leader) = &mut self.leader else {
                    return;
                };
                let room = leader.stack.output_room(conn);
                let Some(server) = leader.servers.servers.get_mut(&conn) else {
                    break;
                };
                let tag = EventNo(server.tag);
                let bytes = server.read(room.min(5_000));
                if !bytes.is_empty() {
                    leader.tags.push((server.out, tag.0));
                    self.lead(|l| l.stack.handle_server_bytes(now, conn, &bytes, tag));
                    continue;
                }
                let (said, ends) = server.said();
                if server.breaks() && !server.end_told {
                    server.end_told = true;
                    self.lead(|l| l.stack.handle_server_reset(now, conn));
                } else if ends && server.out == said && !server.end_told {
                    server.end_told = true;
                    self.lead(|l| l.stack.handle_server_fin(now, conn));
                }
                break;
            }
        }
    }

    /// The leader is gone, with whatever it had not executed.
    fn crash(&mut self) {
        self.leader = None;
        self.crash_at = None;
        self.to_vip.clear();
        // The members agree on a cut: all that is stable or held, and of what was on its way to them
        // some, or none, or all.
        let least = self.held.max(self.stable);
        let span = (self.log.len() - least) as u64;
        let extra = match self.random(3) {
            0 => 0,
            1 => span,
            _ => self.random(span + 1),
        };
        let cut = least + extra as usize;
        self.log.truncate(cut);
        self.holds.clear();
        self.stables.clear();
        self.backups_hold(cut);
        self.stable = cut;
        let gap = [300, 5_000, 60_000, 300_000][self.random(4) as usize];
        self.take_over_at = Some(self.now + gap);
    }

    fn take_over(&mut self) {
        self.take_over_at = None;
        let now = self.instant();
        // What was sent into the gap went to nobody.
        self.to_vip.clear();
        let Backup {
            replica,
            mut servers,
        } = self.backups.remove(0);
        // A replica's record can be handed on as an image at any time.
        let image = replica.snapshot(now);
        let encoded = image.encode();
        assert_eq!(unbroken_tcpstate::Image::decode(&encoded).unwrap(), image);
        self.clock = ServiceClock {
            at: now,
            value_us: self.clock.read_us(now) + 40_000,
        };
        let next = EventNo(self.log.len() as u64 + 1);
        let stack = Stack::take_over(
            self.config.clone(),
            secrets(),
            now,
            self.clock,
            next,
            replica,
        );
        if stack.next_event() == next {
            let taken = stack.snapshot(now);
            assert_eq!(taken, image, "a new leader knows what the replica knew");
        }
        // Its server goes on at its own pace, then keeps up.
        servers.lag_us = LEADER_SERVER_US;
        // The record has what the server said so far; it was all released by what is stable.
        self.leader = Some(Leader {
            stack,
            servers,
            tags: vec![(u64::MAX >> 1, 0)],
        });
        let produced: Vec<_> = self
            .leader
            .iter()
            .flat_map(|l| l.servers.servers.iter().map(|(c, s)| (*c, s.out)))
            .collect();
        let leader = self.leader.as_mut().unwrap();
        leader.tags.clear();
        for (conn, out) in produced {
            leader.tags.push((out, 0));
            if leader.stack.state(conn).is_some()
                && leader.stack.state(conn).unwrap().local_fin.is_none()
            {
                assert_eq!(leader.stack.output_produced(conn), out);
            }
        }
        // The plan stays as it was: it is what a failure prints.
        let again = self
            .plan
            .crash_again_after
            .filter(|_| self.backups.len() == 1);
        self.crash_at = again.map(|n| self.outputs + n);
        self.drain();
    }

    fn compare(&self) {
        let expected = Server::whole_answer(self.plan.app, &self.client.sent);
        let received = &self.client.received;
        let broken_off = self.log.iter().any(|e| matches!(e, Event::Reset { .. }));
        let by_plan =
            self.plan.script.aborts_after.is_some() || matches!(self.plan.app, App::Breaks { .. });
        let context = || self.describe();
        assert!(
            expected.starts_with(received),
            "the client got wrong bytes: {}",
            context()
        );
        // A client that has closed in order may forget us before our last ACK; it says so by RST.
        let whole = received.len() == expected.len();
        assert!(whole || by_plan, "the client misses bytes: {}", context());
        for event in &self.log {
            if let Event::Reset { by, .. } = event {
                assert!(
                    by_plan || *by == ResetBy::Peer,
                    "a connection was broken off for no reason: {}",
                    context()
                );
            }
        }
        assert!(broken_off || !by_plan, "the plan breaks off");
        let leader = self.leader.as_ref().unwrap();
        let sides = std::iter::once(&leader.servers).chain(self.backups.iter().map(|b| &b.servers));
        for side in sides {
            assert!(
                side.servers.is_empty(),
                "a server's connection is left: {}",
                context()
            );
            assert_eq!(
                side.past.len(),
                1,
                "one connection was served once: {}",
                context()
            );
            let server = &side.past[0];
            assert!(
                self.client.sent.starts_with(&server.input),
                "wrong input: {}",
                context()
            );
            if !by_plan {
                assert_eq!(
                    server.input.len(),
                    self.client.sent.len(),
                    "input lost: {}",
                    context()
                );
                assert!(server.fin, "the server did not see the end: {}", context());
            }
        }
        for backup in &self.backups {
            assert_eq!(backup.replica.connections(), 0);
            assert_eq!(
                backup
                    .replica
                    .snapshot(Instant::default())
                    .connections()
                    .count(),
                0,
                "{}",
                context()
            );
        }
    }
}

fn serve_backup(backup: &mut Backup, now: u64) {
    backup.servers.feed(now);
    let conns: Vec<ConnId> = backup.servers.servers.keys().copied().collect();
    for conn in conns {
        let server = backup.servers.servers.get_mut(&conn).unwrap();
        loop {
            let bytes = server.read(backup.replica.output_room(conn).min(5_000));
            if bytes.is_empty() {
                break;
            }
            backup.replica.handle_server_bytes(conn, &bytes);
        }
        let (said, ends) = server.said();
        if server.breaks() && !server.end_told {
            server.end_told = true;
            backup.replica.handle_server_reset(conn);
        } else if ends && server.out == said && !server.end_told {
            server.end_told = true;
            backup.replica.handle_server_fin(conn);
        }
    }
}

fn brief(event: &Event) -> String {
    match event {
        Event::Data { offset, bytes, .. } => format!("Data {offset}+{}", bytes.len()),
        Event::Acked { offset, window, .. } => format!("Acked {offset} wnd {window}"),
        Event::Open { .. } => "Open".into(),
        other => format!("{other:?}"),
    }
}

/// Unused by some of the tests that share this module.
pub const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}
