//! Changes of the membership under a virtual clock: servers are added, removed, lost with their disks
//! and replaced while they crash, while the network is cut and while a client writes. One seed is
//! one run: `SEED=7 cargo test -p unbroken-coord --test membership_sim`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use unbroken_coord::acl;
use unbroken_coord::core::{Caller, Config, ConnId, Core, Event, Output, PeerMessage};
use unbroken_coord::members::{Members, Standing};
use unbroken_coord::quorum::{Recovered, Role, Write};
use unbroken_coord::time::Instant;
use unbroken_coord::wire::{
    Acl, ConnectRequest, ConnectResponse, CreateMode, CreateOp, ErrorCode, ReplyHeader, Request,
    encode_connect_request, encode_request,
};

/// Microseconds in which things go wrong, and in which they must have come right again.
const STORM_US: u64 = 8_000_000;
const PEACE_US: u64 = 30_000_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A place in a list of this length; 0 where it is empty.
    fn place(&mut self, length: usize) -> usize {
        let place = self.below(length.max(1) as u64);
        usize::try_from(place).expect("less than a usize")
    }
}

/// One server as one raft id: a machine that lost its disk is another one.
struct Server {
    name: String,
    core: Option<Core>,
    disk: Recovered,
    writing: VecDeque<(u64, Write)>,
    disk_free: u64,
    /// Counts restarts: what was meant for an earlier run does not reach a later one.
    run: u64,
    /// It was told that it is no member any more, or its disk is lost.
    retired: bool,
    tick_due: bool,
    /// The zxid at which its state was compared last.
    summed: u64,
}

#[expect(clippy::large_enum_variant, reason = "most of them are messages")]
enum What {
    Peer(u64, PeerMessage),
    Durable(u64),
    Tick(u64),
    Frame(ConnId, Bytes),
    Start,
}

#[expect(clippy::large_enum_variant, reason = "most of them are messages")]
enum Turn {
    Server(u64, What),
    Reply(ConnId, Option<Bytes>),
    Talker(usize),
    Fault,
}

/// A client with one request at a time.
#[derive(Default)]
struct Talker {
    conn: Option<(u64, ConnId)>,
    ready: bool,
    /// What it asked, and until when it waits.
    asked: Option<(Asked, u64)>,
}

#[derive(Debug)]
enum Asked {
    Session,
    Write(String),
    Change(String, String),
}

/// How often each thing happened.
#[derive(Debug, Default)]
struct Count {
    written: u64,
    changed: u64,
    refused: u64,
    promoted: u64,
    crashed: u64,
    lost_disks: u64,
    cut: u64,
    led_itself_out: u64,
    lost_majorities: u64,
}

struct World {
    seed: u64,
    random: Random,
    now: u64,
    queue: BTreeMap<(u64, u64), Turn>,
    next_turn: u64,
    founders: BTreeMap<u64, String>,
    servers: BTreeMap<u64, Server>,
    cut: BTreeSet<(u64, u64)>,
    loss_percent: u64,
    /// The writer, and the one who changes the membership.
    talkers: [Talker; 2],
    next_conn: u64,
    next_path: u64,
    written: Vec<String>,
    /// Whose disk was lost and who is not replaced yet.
    wounded: Option<String>,
    /// Who led in each term.
    leaders: BTreeMap<u64, u64>,
    /// Checksum of the state at each zxid.
    states: BTreeMap<u64, u32>,
    newest: Members,
    count: Count,
}

const WRITER: usize = 0;
const ADMIN: usize = 1;

impl World {
    fn new(seed: u64) -> Self {
        let founders: BTreeMap<u64, String> = (1..=3).map(|id| (id, format!("m{id}"))).collect();
        let mut world = Self {
            seed,
            random: Random(seed),
            now: 0,
            queue: BTreeMap::new(),
            next_turn: 0,
            newest: Members::founded(&founders),
            servers: BTreeMap::new(),
            cut: BTreeSet::new(),
            loss_percent: 0,
            talkers: [Talker::default(), Talker::default()],
            next_conn: 1,
            next_path: 0,
            written: Vec::new(),
            wounded: None,
            leaders: BTreeMap::new(),
            states: BTreeMap::new(),
            count: Count::default(),
            founders: founders.clone(),
        };
        for (id, name) in founders {
            world.put(id, name);
            world.start(id);
        }
        world.at(1000, Turn::Talker(WRITER));
        world.at(200_000, Turn::Talker(ADMIN));
        world.at(400_000, Turn::Fault);
        world
    }

    fn at(&mut self, time: u64, turn: Turn) {
        self.next_turn += 1;
        self.queue
            .insert((time.max(self.now), self.next_turn), turn);
    }

    fn storm(&self) -> bool {
        self.now < STORM_US
    }

    fn put(&mut self, id: u64, name: String) {
        let server = Server {
            name,
            core: None,
            disk: Recovered::default(),
            writing: VecDeque::new(),
            disk_free: 0,
            run: 0,
            retired: false,
            tick_due: false,
            summed: 0,
        };
        self.servers.insert(id, server);
    }

    fn start(&mut self, id: u64) {
        let seed = self.random.next();
        let now = Instant::from_micros(self.now);
        let server = self.servers.get_mut(&id).expect("put before");
        if server.retired || server.core.is_some() {
            return;
        }
        let config = Config {
            name: server.name.clone(),
            addresses: Some((
                format!("{}:2888", server.name),
                format!("{}:2181", server.name),
            )),
            snapshot_every: 80,
            entries_kept: 20,
            disk_stuck_max: std::time::Duration::from_millis(150),
            ..Config::new(id, self.founders.clone())
        };
        server.run += 1;
        server.disk_free = self.now;
        let core = Core::new(config, server.disk.clone(), seed, now);
        server.core = Some(core.expect("its own snapshot"));
        self.drain(id);
    }

    /// The process ends. Some of what was being written has got to the disk: a part from the front.
    fn crash(&mut self, id: u64, for_good: bool) {
        let server = self.servers.get_mut(&id).expect("put before");
        let Some(_) = server.core.take() else { return };
        server.tick_due = false;
        server.retired |= for_good;
        let keep = self.random.below(server.writing.len() as u64 + 1);
        for _ in 0..keep {
            if let Some((_, write)) = server.writing.pop_front() {
                persist(&mut server.disk, write);
            }
        }
        server.writing.clear();
        for (_, conn) in self
            .talkers
            .iter()
            .filter_map(|t| t.conn)
            .filter(|c| c.0 == id)
            .collect::<Vec<_>>()
        {
            self.at(self.now + 200, Turn::Reply(conn, None));
        }
        if !for_good {
            let back = self.now + 1000 + self.random.below(600_000);
            self.at(back, Turn::Server(id, What::Start));
        }
    }

    /// Machines that the newest membership names and that nobody runs yet are started, as who they
    /// are now.
    fn recruit(&mut self) {
        for (id, member) in self.newest.clone().iter() {
            if !self.servers.contains_key(&id) {
                self.put(id, member.name.clone());
                let at = self.now + self.random.below(300_000);
                self.at(at, Turn::Server(id, What::Start));
                if self.wounded.as_ref() == Some(&member.name) {
                    self.wounded = None;
                }
            }
        }
    }

    fn go(&mut self, until: u64) {
        while let Some(((time, _), turn)) = self.queue.pop_first() {
            if time > until {
                self.at(time, turn);
                break;
            }
            self.now = time;
            match turn {
                Turn::Server(id, what) => self.at_server(id, what),
                Turn::Reply(conn, frame) => self.at_talker(conn, frame),
                Turn::Talker(which) => self.talk(which),
                Turn::Fault => self.fault(),
            }
        }
        self.now = until;
    }

    fn fault(&mut self) {
        if !self.storm() {
            self.cut.clear();
            self.loss_percent = 0;
            return;
        }
        let up: Vec<u64> = self
            .servers
            .iter()
            .filter(|(_, s)| s.core.is_some())
            .map(|(id, _)| *id)
            .collect();
        if let Some(id) = up.get(self.random.place(up.len())).copied() {
            match self.random.below(10) {
                0..=2 => {
                    self.count.crashed += 1;
                    self.crash(id, false);
                }
                3 => {
                    // The power fails, for all but perhaps one.
                    let spared = up[self.random.place(up.len())];
                    for id in up.into_iter().filter(|id| *id != spared) {
                        self.count.crashed += 1;
                        self.crash(id, false);
                    }
                }
                4..=5 => {
                    let both = self.random.below(3) > 0;
                    self.count.cut += 1;
                    for other in up.into_iter().filter(|other| *other != id) {
                        self.cut.insert((id, other));
                        if both {
                            self.cut.insert((other, id));
                        }
                    }
                }
                6 => self.loss_percent = self.random.below(15),
                7 if self.wounded.is_none() && self.newest.voters().count() >= 3 => {
                    // A disk is lost. Only one at a time: what a majority forgets is gone.
                    let busy = matches!(self.talkers[ADMIN].asked, Some((Asked::Change(..), _)));
                    if !busy
                        && self
                            .newest
                            .get(id)
                            .is_some_and(|m| m.standing == Standing::Voter)
                    {
                        self.count.lost_disks += 1;
                        self.wounded = Some(self.servers[&id].name.clone());
                        self.crash(id, true);
                    }
                }
                _ => {
                    self.cut.clear();
                    self.loss_percent = 0;
                }
            }
        }
        let next = self.now + 20_000 + self.random.below(400_000);
        self.at(next, Turn::Fault);
    }

    fn at_server(&mut self, id: u64, what: What) {
        let now = Instant::from_micros(self.now);
        if matches!(what, What::Start) {
            self.start(id);
            return;
        }
        let server = self.servers.get_mut(&id).expect("put before");
        let Some(core) = &mut server.core else { return };
        match what {
            What::Peer(from, message) => {
                // What the handshake of the real links says.
                if core.state().members.was_removed(from) {
                    let removed = self.servers.get_mut(&from);
                    if let Some(removed) = removed.and_then(|server| server.core.as_mut()) {
                        removed.handle_removed(now);
                    }
                    return;
                }
                core.handle_peer(now, from, message);
            }
            What::Durable(run) => {
                if run != server.run {
                    return;
                }
                if let Some((token, write)) = server.writing.pop_front() {
                    persist(&mut server.disk, write);
                    core.handle_persisted(now, token);
                }
            }
            What::Tick(run) => {
                if run != server.run {
                    return;
                }
                server.tick_due = false;
                core.handle_timeout(now);
            }
            What::Frame(conn, frame) => core.handle_frame(now, conn, &frame[4..]),
            What::Start => unreachable!("handled above"),
        }
        self.drain(id);
    }

    fn drain(&mut self, id: u64) {
        let now = Instant::from_micros(self.now);
        let server = self.servers.get_mut(&id).expect("put before");
        let Some(core) = &mut server.core else { return };
        let mut outputs = Vec::new();
        while let Some(output) = core.poll_output() {
            if let Output::SaveSnapshot(image) = &output {
                let saved = image.index;
                server.disk.entries.retain(|entry| entry.index > saved);
                server.disk.snapshot = Some(image.clone());
                core.handle_saved(now, saved);
            }
            outputs.push(output);
        }
        let status = core.status();
        if status.role == Role::Leader {
            let leader = *self.leaders.entry(status.term).or_insert(id);
            assert_eq!(
                leader, id,
                "seed {}: two leaders in term {}",
                self.seed, status.term
            );
        }
        let state = core.state();
        // Every state would take too long, and what differs once differs for ever.
        let seen = state.zxid % 8 != 0 || server.summed == state.zxid;
        let sum = if seen {
            None
        } else {
            server.summed = state.zxid;
            let bytes = postcard::to_allocvec(state).expect("memory takes everything");
            Some(crc32c::crc32c(&bytes))
        };
        let known = sum.map(|sum| *self.states.entry(state.zxid).or_insert(sum));
        assert_eq!(
            known, sum,
            "seed {}: two states at zxid {}",
            self.seed, state.zxid
        );
        if state.members.version() > self.newest.version() {
            let joined = self.newest.joining();
            if joined.is_some_and(|id| state.members.voters().any(|voter| voter == id)) {
                self.count.promoted += 1;
            }
            self.newest = state.members.clone();
        }
        if !server.tick_due
            && let Some(wake) = core.poll_timeout()
        {
            server.tick_due = true;
            let run = server.run;
            let wake = wake.micros() + self.random.below(300);
            self.at(wake, Turn::Server(id, What::Tick(run)));
        }
        for output in outputs {
            self.carry_out(id, output);
        }
        self.recruit();
    }

    fn carry_out(&mut self, id: u64, output: Output) {
        match output {
            Output::Persist { token, write } => {
                let takes = 100 + self.random.below(3000);
                let server = self.servers.get_mut(&id).expect("put before");
                server.writing.push_back((token, write));
                server.disk_free = server.disk_free.max(self.now) + takes;
                let (at, run) = (server.disk_free, server.run);
                self.at(at, Turn::Server(id, What::Durable(run)));
            }
            Output::Send { to, message } => {
                let lost = self.random.below(100) < self.loss_percent;
                if !lost && !self.cut.contains(&(id, to)) && self.servers.contains_key(&to) {
                    let at = self.now + 50 + self.random.below(1500);
                    self.at(at, Turn::Server(to, What::Peer(id, message)));
                }
            }
            Output::Reply { conn, frame } => {
                let at = self.now + 100;
                self.at(at, Turn::Reply(conn, Some(frame)));
            }
            Output::Close { conn, .. } => self.at(self.now + 100, Turn::Reply(conn, None)),
            Output::Event(Event::Removed) => self.crash(id, true),
            Output::SaveSnapshot(_) | Output::Notify { .. } | Output::Event(_) => {}
        }
    }

    fn hang_up(&mut self, which: usize) {
        self.talkers[which] = Talker::default();
    }

    fn at_talker(&mut self, conn: ConnId, frame: Option<Bytes>) {
        let Some(which) =
            (0..2).find(|which| self.talkers[*which].conn.is_some_and(|c| c.1 == conn))
        else {
            return;
        };
        let Some(frame) = frame else {
            self.hang_up(which);
            return;
        };
        let Some((asked, _)) = self.talkers[which].asked.take() else {
            return;
        };
        if matches!(asked, Asked::Session) {
            let response = ConnectResponse::decode(&frame[4..]).expect("a session");
            self.talkers[which].ready = response.timeout_ms > 0;
            return;
        }
        let (header, _) = ReplyHeader::split(&frame[4..]).expect("a reply");
        match (asked, header.err) {
            (Asked::Write(path), None) => {
                self.count.written += 1;
                self.written.push(path);
            }
            (Asked::Write(path), Some(code)) => panic!("seed {}: {path}: {code}", self.seed),
            (Asked::Change(..), None) => self.count.changed += 1,
            (Asked::Change(joining, leaving), Some(code)) => {
                let fair = [
                    ErrorCode::NewConfigNoQuorum,
                    ErrorCode::ReconfigInProgress,
                    ErrorCode::BadArguments,
                ];
                assert!(
                    fair.contains(&code),
                    "seed {}: +{joining} -{leaving}: {code}",
                    self.seed
                );
                self.count.refused += 1;
            }
            (Asked::Session, _) => unreachable!("handled above"),
        }
    }

    fn talk(&mut self, which: usize) {
        let pause = if which == WRITER { 3_000 } else { 60_000 };
        let next = self.now + 500 + self.random.below(pause);
        self.at(next, Turn::Talker(which));
        let now = Instant::from_micros(self.now);
        match &self.talkers[which].asked {
            Some((_, until)) if self.now < *until => return,
            Some(_) => self.hang_up(which),
            None => {}
        }
        if self.talkers[which].conn.is_none() {
            let up: Vec<u64> = self
                .servers
                .iter()
                .filter(|(_, s)| s.core.is_some())
                .map(|(id, _)| *id)
                .collect();
            if up.is_empty() {
                return;
            }
            let id = up[self.random.place(up.len())];
            let conn = ConnId(self.next_conn);
            self.next_conn += 1;
            let caller = Caller {
                address: None,
                proven: vec![acl::super_user()],
            };
            let core = self
                .servers
                .get_mut(&id)
                .and_then(|server| server.core.as_mut());
            core.expect("it is up").handle_connect(now, conn, caller);
            let hello = ConnectRequest {
                protocol_version: 0,
                last_zxid_seen: 0,
                timeout_ms: 20_000,
                session_id: 0,
                password: None,
                read_only: None,
            };
            self.talkers[which].conn = Some((id, conn));
            self.ask(which, Asked::Session, encode_connect_request(&hello));
            return;
        }
        if !self.talkers[which].ready {
            self.hang_up(which);
            return;
        }
        if which == WRITER {
            self.next_path += 1;
            let path = format!("/w{}", self.next_path);
            let create = Request::Create {
                op: CreateOp::Create,
                path: path.clone(),
                data: None,
                acl: Acl::open(),
                flags: CreateMode::Persistent.flags(),
            };
            self.ask(which, Asked::Write(path), encode_request(1, &create));
        } else if let Some((joining, leaving)) = self.plan() {
            let change = Request::Reconfig {
                joining: Some(joining.clone()),
                leaving: Some(leaving.clone()),
                new_members: None,
                config_version: -1,
            };
            let leads = self.leaders.last_key_value().map(|(_, id)| *id);
            if leads.is_some() && self.newest.find(&leaving) == leads {
                self.count.led_itself_out += 1;
            }
            self.ask(
                which,
                Asked::Change(joining, leaving),
                encode_request(1, &change),
            );
        }
    }

    fn ask(&mut self, which: usize, asked: Asked, frame: Bytes) {
        let (id, conn) = self.talkers[which].conn.expect("it is connected");
        self.talkers[which].asked = Some((asked, self.now + 1_500_000));
        self.at(self.now + 100, Turn::Server(id, What::Frame(conn, frame)));
    }

    /// What the administrator changes next: in the storm anything, after it what leads to the end.
    fn plan(&mut self) -> Option<(String, String)> {
        let join = |name: &str| format!("server.{name}={name}:2888:3888;{name}:2181");
        let names: BTreeSet<String> = self.newest.iter().map(|(_, m)| m.name.clone()).collect();
        if let Some(wounded) = self.wounded.clone() {
            return Some(if names.contains(&wounded) && self.lost(&wounded) {
                (String::new(), wounded)
            } else {
                (join(&wounded), String::new())
            });
        }
        if !self.storm() {
            let wanted = wanted();
            if self.newest.joining().is_some() {
                return None;
            }
            if let Some(missing) = wanted.difference(&names).next() {
                return Some((join(missing), String::new()));
            }
            let extra = names.difference(&wanted).next()?;
            return Some((String::new(), extra.clone()));
        }
        let machine = format!("m{}", 1 + self.random.below(6));
        match (names.contains(&machine), names.len()) {
            (false, ..=4) => Some((join(&machine), String::new())),
            (true, 3..) => Some((String::new(), machine)),
            _ => None,
        }
    }

    /// Whether the member of this name is one whose disk is gone.
    fn lost(&self, name: &str) -> bool {
        let id = self.newest.find(name);
        id.is_some_and(|id| self.servers.get(&id).is_some_and(|server| server.retired))
    }

    /// A disk was lost just when a server was removed, so that no server that is left knows of a
    /// majority: nothing can help, and nobody may go on.
    fn is_lost(&self) -> bool {
        let mut cores = self
            .servers
            .values()
            .filter_map(|server| server.core.as_ref());
        self.now > STORM_US + PEACE_US / 2
            && cores.all(|core| {
                let voters: Vec<u64> = core.state().members.voters().collect();
                let lost = voters.iter().filter(|id| self.servers[id].retired).count();
                lost * 2 >= voters.len()
            })
    }

    fn finished(&self) -> bool {
        let voters: BTreeSet<&str> = self
            .newest
            .iter()
            .filter(|(_, m)| m.standing == Standing::Voter)
            .map(|(_, m)| &*m.name)
            .collect();
        let zxid = |id: u64| {
            self.servers[&id]
                .core
                .as_ref()
                .map(|core| core.state().zxid)
        };
        let first = self.newest.voters().next().and_then(zxid);
        self.newest.len() == voters.len()
            && wanted().iter().map(String::as_str).eq(voters)
            && first.is_some()
            && self.newest.voters().all(|id| zxid(id) == first)
            && self.talkers[WRITER].asked.is_none()
    }
}

fn wanted() -> BTreeSet<String> {
    ["m2", "m5", "m6"].map(str::to_owned).into()
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

fn run(seed: u64) -> Count {
    let mut world = World::new(seed);
    world.go(STORM_US);
    while !world.finished() {
        if world.is_lost() {
            world.count.lost_majorities += 1;
            return world.count;
        }
        assert!(
            world.now < STORM_US + PEACE_US,
            "seed {seed}: it does not come to rest: {:?}, {:?}",
            world.newest,
            world
                .servers
                .values()
                .filter_map(|s| s.core.as_ref())
                .map(Core::status)
                .collect::<Vec<_>>()
        );
        let until = world.now + 5_000;
        world.go(until);
    }
    for id in world.newest.voters() {
        let core = world.servers[&id].core.as_ref().expect("it takes part");
        for path in &world.written {
            assert!(
                core.state().tree.znode(path).is_some(),
                "seed {seed}: {path} is lost at {id}"
            );
        }
    }
    world.count
}

#[test]
fn members_come_and_go_and_nothing_is_lost() {
    let seeds = match std::env::var("SEED") {
        Ok(text) => {
            let (from, to) = text.split_once("..").unwrap_or((&text, ""));
            let from: u64 = from.parse().expect("SEED=7 or SEED=0..1000");
            from..to.parse().unwrap_or(from + 1)
        }
        Err(_) => 0..40,
    };
    let mut total = Count::default();
    let mut runs = 0;
    for seed in seeds {
        let count = run(seed);
        total.written += count.written;
        total.changed += count.changed;
        total.refused += count.refused;
        total.promoted += count.promoted;
        total.crashed += count.crashed;
        total.lost_disks += count.lost_disks;
        total.cut += count.cut;
        total.led_itself_out += count.led_itself_out;
        total.lost_majorities += count.lost_majorities;
        runs += 1;
    }
    println!("{total:?}");
    assert!(total.lost_majorities * 20 <= runs + 20, "{total:?}");
    let happened = [
        total.written,
        total.changed,
        total.promoted,
        total.crashed,
        total.lost_disks,
        total.cut,
        total.led_itself_out,
    ];
    assert!(happened.iter().all(|count| *count > 0), "{total:?}");
}
