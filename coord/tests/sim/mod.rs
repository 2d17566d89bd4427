//! Servers, disks, a network and clients under a virtual clock, all from one seed.

mod client;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use client::{Client, Oracle, REGISTERS};
use unbroken_coord::core::{Caller, Config, ConnId, Core, Output, PeerMessage};
use unbroken_coord::quorum::{Recovered, Write};
use unbroken_coord::time::Instant;

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

const CLIENTS: u64 = 5;
const SERVERS: u64 = 3;

/// Microseconds of a run in which things go wrong, and of the peace after it.
const STORM_US: u64 = 6_000_000;
const PEACE_US: u64 = 4_000_000;

struct Server {
    core: Option<Core>,
    /// Counts restarts: what was meant for an earlier run does not reach a later one.
    run: u64,
    disk: Recovered,
    writing: VecDeque<(u64, Write)>,
    disk_free: u64,
    paused_until: u64,
    conns: BTreeMap<ConnId, u64>,
    /// Inputs that came while it was paused.
    backlog: VecDeque<What>,
    tick_due: bool,
}

enum What {
    Peer { from: u64, message: PeerMessage },
    Durable { run: u64 },
    Tick { run: u64 },
    Frame { conn: ConnId, frame: Bytes },
    Gone { conn: ConnId },
    Resume,
}

enum Event {
    Server(u64, What),
    ToClient {
        client: u64,
        conn: ConnId,
        frame: Option<Bytes>,
    },
    Client(u64),
    Fault,
}

/// One run.
pub(crate) struct World {
    random: Random,
    seed: u64,
    now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    servers: BTreeMap<u64, Server>,
    clients: BTreeMap<u64, Client>,
    /// The connection that a client has, and when the last frame each way arrives.
    links: BTreeMap<u64, (u64, ConnId, u64, u64)>,
    next_conn: u64,
    cut: BTreeSet<(u64, u64)>,
    loss_percent: u64,
    oracle: Oracle,
    /// A checksum of the state at each zxid, by whoever reached it first.
    states: BTreeMap<u64, u32>,
    trace: u32,
    pub(crate) crashes: u64,
    pub(crate) snapshots_installed: u64,
}

/// What a run did, to see that the tests test something.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) trace: u32,
    pub(crate) acknowledged: u64,
    pub(crate) unknown: u64,
    pub(crate) synced_reads: u64,
    pub(crate) expired: u64,
    pub(crate) resumed: u64,
    pub(crate) watch_events: u64,
    pub(crate) crashes: u64,
    pub(crate) snapshots_installed: u64,
}

/// Runs one seed and checks everything.
pub(crate) fn run(seed: u64) -> Summary {
    let mut world = World::new(seed);
    world.go(STORM_US);
    world.heal();
    world.go(STORM_US + PEACE_US);
    // An entry may just be on its way (a session that expires); it does not stay so.
    for more in 1..=40 {
        if !world.in_step() {
            world.go(STORM_US + PEACE_US + more * 25_000);
        }
    }
    world.check_end();
    Summary {
        trace: world.trace,
        acknowledged: world.oracle.acknowledged,
        unknown: world.oracle.unknown,
        synced_reads: world.oracle.synced_reads,
        expired: world.oracle.expired,
        resumed: world.oracle.resumed,
        watch_events: world.oracle.watch_events,
        crashes: world.crashes,
        snapshots_installed: world.snapshots_installed,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: Random(seed),
            seed,
            now: 0,
            queue: BTreeMap::new(),
            next_event: 0,
            servers: BTreeMap::new(),
            clients: BTreeMap::new(),
            links: BTreeMap::new(),
            next_conn: 1,
            cut: BTreeSet::new(),
            loss_percent: 0,
            oracle: Oracle::default(),
            states: BTreeMap::new(),
            trace: 0,
            crashes: 0,
            snapshots_installed: 0,
        };
        for id in 1..=SERVERS {
            let server = Server {
                core: None,
                run: 0,
                disk: Recovered::default(),
                writing: VecDeque::new(),
                disk_free: 0,
                paused_until: 0,
                conns: BTreeMap::new(),
                backlog: VecDeque::new(),
                tick_due: false,
            };
            world.servers.insert(id, server);
            world.start(id);
        }
        for id in 0..CLIENTS {
            // The shortest expire in the storm, the longest do not.
            let timeout_ms = match id {
                0 => 100,
                1 => 300,
                2 => 1000,
                3 => 4000,
                _ => 30_000,
            };
            world.clients.insert(id, Client::new(id, timeout_ms));
            world.at(1000 * id, Event::Client(id));
        }
        world.at(300_000, Event::Fault);
        world
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.queue
            .insert((time.max(self.now), self.next_event), event);
    }

    fn go(&mut self, until: u64) {
        while let Some(((time, _), event)) = self.queue.pop_first() {
            if time > until {
                self.at(time, event);
                break;
            }
            self.now = time;
            match event {
                Event::Server(id, what) => self.at_server(id, what),
                Event::ToClient {
                    client,
                    conn,
                    frame,
                } => self.at_client(client, conn, frame),
                Event::Client(id) => self.client_turn(id),
                Event::Fault => self.fault(),
            }
        }
        self.now = until;
    }

    fn start(&mut self, id: u64) {
        let config = Config {
            // Small, so that servers fall behind the log.
            snapshot_every: 60,
            entries_kept: 20,
            container_check: Duration::from_millis(500),
            disk_stuck_max: Duration::from_millis(150),
            ..Config::new(id, (1..=SERVERS).map(|id| (id, format!("s{id}"))).collect())
        };
        let now = Instant::from_micros(self.now);
        let seed = self.random.next();
        let server = self.servers.get_mut(&id).expect("one of three");
        server.run += 1;
        let core = Core::new(config, server.disk.clone(), seed, now).expect("its own snapshot");
        server.core = Some(core);
        server.disk_free = self.now;
        server.paused_until = 0;
        self.drain(id);
    }

    fn crash(&mut self, id: u64) {
        self.crashes += 1;
        let server = self.servers.get_mut(&id).expect("one of three");
        server.core = None;
        server.tick_due = false;
        server.backlog.clear();
        // Some of what was being written has got there: a part from the front.
        let keep = self.random.below(server.writing.len() as u64 + 1);
        for _ in 0..keep {
            if let Some((_, write)) = server.writing.pop_front() {
                persist(&mut server.disk, write);
            }
        }
        server.writing.clear();
        for (conn, client) in std::mem::take(&mut server.conns) {
            self.at(
                self.now + 200,
                Event::ToClient {
                    client,
                    conn,
                    frame: None,
                },
            );
        }
        let back = self.now + 1000 + self.random.below(800_000);
        self.at(back, Event::Server(id, What::Resume));
    }

    fn fault(&mut self) {
        if self.now >= STORM_US {
            return;
        }
        let id = 1 + self.random.below(SERVERS);
        match self.random.below(12) {
            0..=2 if self.servers[&id].core.is_some() => self.crash(id),
            10..=11 => {
                // The power fails, for two or for all.
                let spared = self.random.below(SERVERS + 3);
                for id in (1..=SERVERS).filter(|id| *id != spared) {
                    if self.servers[&id].core.is_some() {
                        self.crash(id);
                    }
                }
            }
            3 => {
                let until = self.now + self.random.below(400_000);
                let server = self.servers.get_mut(&id).expect("one of three");
                server.paused_until = until;
                self.at(until, Event::Server(id, What::Resume));
            }
            4..=5 => {
                // One from the others, both ways or one.
                let both = self.random.below(3) > 0;
                for other in (1..=SERVERS).filter(|other| *other != id) {
                    self.cut.insert((id, other));
                    if both {
                        self.cut.insert((other, id));
                    }
                }
            }
            6 => self.loss_percent = self.random.below(20),
            7 => {
                // The disk hangs.
                let server = self.servers.get_mut(&id).expect("one of three");
                server.disk_free = self.now + self.random.below(500_000);
            }
            _ => {
                self.cut.clear();
                self.loss_percent = 0;
            }
        }
        let next = self.now + 20_000 + self.random.below(400_000);
        self.at(next, Event::Fault);
    }

    fn heal(&mut self) {
        self.cut.clear();
        self.loss_percent = 0;
    }

    fn at_server(&mut self, id: u64, what: What) {
        let now = Instant::from_micros(self.now);
        let server = self.servers.get_mut(&id).expect("one of three");
        if matches!(what, What::Resume) {
            if server.core.is_none() {
                self.start(id);
            } else if server.paused_until <= self.now {
                for what in std::mem::take(&mut server.backlog) {
                    self.at_server(id, what);
                }
            }
            return;
        }
        if server.paused_until > self.now {
            server.backlog.push_back(what);
            return;
        }
        let Some(core) = &mut server.core else { return };
        match what {
            What::Peer { from, message } => core.handle_peer(now, from, message),
            What::Durable { run } => {
                if run != server.run {
                    return;
                }
                if let Some((token, write)) = server.writing.pop_front() {
                    persist(&mut server.disk, write);
                    core.handle_persisted(now, token);
                }
            }
            What::Tick { run } => {
                if run != server.run {
                    return;
                }
                server.tick_due = false;
                core.handle_timeout(now);
            }
            What::Frame { conn, frame } => {
                if server.conns.contains_key(&conn) {
                    core.handle_frame(now, conn, &frame[4..]);
                }
            }
            What::Gone { conn } => {
                server.conns.remove(&conn);
                core.handle_disconnect(now, conn);
            }
            What::Resume => unreachable!("handled above"),
        }
        self.drain(id);
    }

    fn drain(&mut self, id: u64) {
        let now = Instant::from_micros(self.now);
        let mut outputs = Vec::new();
        let server = self.servers.get_mut(&id).expect("one of three");
        let Some(core) = &mut server.core else { return };
        while let Some(output) = core.poll_output() {
            if let Output::SaveSnapshot(image) = &output {
                // Saved at once: how long that takes changes nothing that others see.
                server
                    .disk
                    .entries
                    .retain(|entry| entry.index > image.index);
                server.disk.snapshot = Some(image.clone());
                core.handle_saved(now, image.index);
            }
            outputs.push(output);
        }
        let state = core.state();
        let sum = crc32c::crc32c(&unbroken_coord::snapshot::encode(state));
        let known = *self.states.entry(state.zxid).or_insert(sum);
        assert_eq!(
            known, sum,
            "seed {}: two states at zxid {}",
            self.seed, state.zxid
        );
        if !server.tick_due
            && let Some(wake) = core.poll_timeout()
        {
            server.tick_due = true;
            let run = server.run;
            // Timers are a little late.
            let wake = wake.micros() + self.random.below(300);
            self.at(wake, Event::Server(id, What::Tick { run }));
        }
        for output in outputs {
            self.carry_out(id, output);
        }
    }

    fn carry_out(&mut self, id: u64, output: Output) {
        self.trace = crc32c::crc32c_append(self.trace, format!("{id} {output:?}").as_bytes());
        match output {
            Output::Persist { token, write } => {
                self.snapshots_installed += u64::from(write.snapshot.is_some());
                let takes = match self.random.below(50) {
                    0..=1 => 60_000,
                    _ => 50 + self.random.below(2000),
                };
                let server = self.servers.get_mut(&id).expect("one of three");
                server.writing.push_back((token, write));
                server.disk_free = server.disk_free.max(self.now) + takes;
                let (at, run) = (server.disk_free, server.run);
                self.at(at, Event::Server(id, What::Durable { run }));
            }
            Output::SaveSnapshot(_) => {}
            Output::Send { to, message } => {
                let lost = self.random.below(100) < self.loss_percent;
                if !lost && !self.cut.contains(&(id, to)) {
                    let at = self.now + 50 + self.random.below(1500);
                    self.at(at, Event::Server(to, What::Peer { from: id, message }));
                }
            }
            Output::Reply { conn, frame } | Output::Notify { conn, frame } => {
                self.tell_client(id, conn, Some(frame));
            }
            Output::Close { conn, .. } => {
                self.tell_client(id, conn, None);
                let server = self.servers.get_mut(&id).expect("one of three");
                server.conns.remove(&conn);
            }
            Output::Event(_) => {}
        }
    }

    /// In order, as TCP delivers.
    fn tell_client(&mut self, id: u64, conn: ConnId, frame: Option<Bytes>) {
        let Some(client) = self.servers[&id].conns.get(&conn).copied() else {
            return;
        };
        let Some((_, current, _, arrival)) = self.links.get_mut(&client) else {
            return;
        };
        if *current == conn {
            *arrival = (*arrival).max(self.now) + 20 + self.random.below(300);
            let at = *arrival;
            self.at(
                at,
                Event::ToClient {
                    client,
                    conn,
                    frame,
                },
            );
        }
    }

    fn at_client(&mut self, client: u64, conn: ConnId, frame: Option<Bytes>) {
        if self.links.get(&client).map(|link| link.1) != Some(conn) {
            return;
        }
        let state = self.clients.get_mut(&client).expect("a client");
        match frame {
            Some(frame) => state.frame(self.now, &frame[4..], &mut self.oracle),
            None => state.disconnected(&mut self.oracle),
        }
        if state.is_down() {
            state.disconnected(&mut self.oracle);
            self.links.remove(&client);
        }
    }

    fn client_turn(&mut self, id: u64) {
        let again = self.now + 500 + self.random.below(20_000);
        self.at(again, Event::Client(id));
        let client = self.clients.get_mut(&id).expect("a client");
        if client.gives_up(self.now) {
            client.disconnected(&mut self.oracle);
            if let Some((server, conn, ..)) = self.links.remove(&id) {
                self.at(self.now + 200, Event::Server(server, What::Gone { conn }));
            }
            return;
        }
        if client.is_down() {
            let server = 1 + self.random.below(SERVERS);
            if self.servers[&server].core.is_none() {
                return;
            }
            let conn = ConnId(self.next_conn);
            self.next_conn += 1;
            let frame = client.connect(self.now, &mut self.oracle);
            self.links.insert(id, (server, conn, self.now, self.now));
            let now = Instant::from_micros(self.now);
            let target = self.servers.get_mut(&server).expect("one of three");
            target.conns.insert(conn, id);
            target
                .core
                .as_mut()
                .expect("it is up")
                .handle_connect(now, conn, Caller::default());
            self.tell_server(id, frame);
            return;
        }
        let quiet = self.now > STORM_US + PEACE_US / 2;
        if let Some(frame) = client.request(&mut self.random, quiet, &mut self.oracle) {
            self.tell_server(id, frame);
        }
    }

    fn tell_server(&mut self, id: u64, frame: Bytes) {
        let Some((server, conn, arrival, _)) = self.links.get_mut(&id) else {
            return;
        };
        *arrival = (*arrival).max(self.now) + 20 + self.random.below(300);
        let (at, server, conn) = (*arrival, *server, *conn);
        self.at(at, Event::Server(server, What::Frame { conn, frame }));
    }

    fn in_step(&self) -> bool {
        let zxid = |server: &Server| server.core.as_ref().map(|core| core.state().zxid);
        let first = zxid(&self.servers[&1]);
        self.servers.values().all(|server| zxid(server) == first)
    }

    /// After the peace: all agree, and nothing that was promised is missing.
    fn check_end(&mut self) {
        let seed = self.seed;
        let cores: Vec<&Core> = self
            .servers
            .values()
            .map(|s| s.core.as_ref().expect("all are up"))
            .collect();
        let state = cores[0].state();
        for core in &cores {
            let same = core.state() == state;
            assert!(
                same,
                "seed {seed}: {:?} differs from {:?}",
                core.status(),
                cores[0].status()
            );
        }
        state.tree.check_invariants();
        for register in 0..REGISTERS {
            let path = format!("/r{register}");
            if let Some(znode) = state.tree.znode(&path) {
                let value = znode
                    .data
                    .as_ref()
                    .map(|data| String::from_utf8(data.to_vec()).expect("text"));
                self.oracle
                    .check_final(&path, znode.version, value.as_deref());
            }
        }
        let live: BTreeSet<i64> = state.sessions.keys().map(|session| session.0).collect();
        for (path, znode) in state.tree.iter() {
            let owner = znode.stat().ephemeral_owner;
            assert!(
                owner == 0 || live.contains(&owner),
                "seed {seed}: {path} has outlived its session"
            );
        }
        for (id, client) in &self.clients {
            assert!(client.idle(), "seed {seed}: client {id} is not served");
            for path in &client.ephemerals {
                let owner = state
                    .tree
                    .znode(path)
                    .map(|znode| znode.stat().ephemeral_owner);
                assert_eq!(owner, Some(client.session()), "seed {seed}: {path} is gone");
            }
        }
    }
}

fn persist(disk: &mut Recovered, write: Write) {
    if let Some(image) = write.snapshot {
        disk.entries.clear();
        disk.snapshot = Some(image);
    }
    if let Some(hard_state) = write.hard_state {
        disk.hard_state = hard_state;
    }
    if let Some(first) = write.entries.first().map(|entry| entry.index) {
        disk.entries.retain(|entry| entry.index < first);
    }
    let base = disk.snapshot.as_ref().map_or(0, |image| image.index);
    disk.entries
        .extend(write.entries.into_iter().filter(|entry| entry.index > base));
}
