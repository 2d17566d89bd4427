//! Servers, disks, a network, clocks and clients under one virtual clock, all from one seed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

use super::client::Client;
use super::history::History;
use super::plan::{Kind, Plan};
use super::random::Random;
use super::server::{Clock, Job, Server, What};
use crate::core::{Caller, Config, ConnId, Core, Output, PeerMessage};
use crate::driver::disk::DiskError;
use crate::quorum::Role;
use crate::session::SessionId;
use crate::txn::{Command, Entry};

/// Storage operations in which a machine may stop, after the first of them.
const STOP_WITHIN: u64 = 14;

#[expect(clippy::large_enum_variant, reason = "most of them are messages")]
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

/// A client's connection.
struct Link {
    server: u64,
    conn: ConnId,
    /// When the last frame each way arrives.
    to_server: u64,
    to_client: u64,
}

/// How much happened, to see that the tests test something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Happened {
    /// Processes killed and machines that lost their power.
    pub stops: u64,
    /// Snapshots that followers were sent.
    pub snapshots_installed: u64,
    /// Servers that stopped because their disk failed.
    pub disk_failures: u64,
    /// Servers that refused a damaged disk.
    pub damaged: u64,
    /// Damage that took nothing away.
    pub harmless: u64,
    /// Connections that took up a session.
    pub resumed: u64,
    /// Terms that had a leader.
    pub leaders: u64,
}

pub(super) struct World {
    pub(super) plan: Plan,
    random: Random,
    now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    pub(super) servers: BTreeMap<u64, Server>,
    pub(super) clients: BTreeMap<u64, Client>,
    links: BTreeMap<u64, Link>,
    next_conn: u64,
    cut: BTreeSet<(u64, u64)>,
    loss_percent: u64,
    /// When the last message from one to another arrives.
    wires: BTreeMap<(u64, u64), u64>,
    /// Who led in each term.
    leaders: BTreeMap<u64, u64>,
    pub(super) history: History,
    pub(super) happened: Happened,
    tracing: bool,
}

macro_rules! trace {
    ($world:expr, $($what:tt)+) => {
        if $world.tracing {
            println!("{:>9} {}", $world.now, format_args!($($what)+));
        }
    };
}

impl World {
    pub(super) fn new(seed: u64, tracing: bool) -> Result<Self, String> {
        let mut random = Random::new(seed);
        let plan = Plan::of(&mut random);
        let names = (1..=plan.servers).map(|id| (id, format!("s{id}")));
        let history = History {
            founders: names.collect(),
            ..History::default()
        };
        let mut world = Self {
            plan,
            random,
            now: 0,
            queue: BTreeMap::new(),
            next_event: 0,
            servers: BTreeMap::new(),
            clients: BTreeMap::new(),
            links: BTreeMap::new(),
            next_conn: 1,
            cut: BTreeSet::new(),
            loss_percent: 0,
            wires: BTreeMap::new(),
            leaders: BTreeMap::new(),
            history,
            happened: Happened::default(),
            tracing,
        };
        trace!(world, "{:?}", world.plan);
        for id in 1..=world.plan.servers {
            let skew = world.random.below(2 * world.plan.skew_ppm + 1);
            let clock = Clock {
                offset_us: world.random.below(10_000_000),
                rate_ppm: 1_000_000 + skew - world.plan.skew_ppm,
                wall_ms: 1_700_000_000_000,
            };
            let seed = world.random.next();
            world.servers.insert(id, Server::new(seed, clock));
            world.start(id)?;
        }
        for id in 0..world.plan.clients {
            // The shortest expire in the storm, the longest do not.
            let timeout_ms = *world.random.pick(&[60, 150, 300, 1000, 30_000]);
            world.clients.insert(id, Client::new(id, timeout_ms));
            world.at(1000 * id, Event::Client(id));
        }
        let first = 200_000 + world.random.below(200_000);
        world.at(first, Event::Fault);
        Ok(world)
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.queue
            .insert((time.max(self.now), self.next_event), event);
    }

    pub(super) fn go(&mut self, until: u64) -> Result<(), String> {
        while let Some(entry) = self.queue.first_entry() {
            let (time, _) = *entry.key();
            if time > until {
                break;
            }
            let event = entry.remove();
            self.now = time;
            match event {
                Event::Server(id, what) => self.at_server(id, what)?,
                Event::ToClient {
                    client,
                    conn,
                    frame,
                } => self.at_client(client, conn, frame)?,
                Event::Client(id) => self.client_turn(id),
                Event::Fault => self.fault()?,
            }
        }
        self.now = until;
        Ok(())
    }

    fn server(&mut self, id: u64) -> &mut Server {
        self.servers.get_mut(&id).expect("one of them")
    }

    fn start(&mut self, id: u64) -> Result<(), String> {
        if self.server(id).dead {
            return Ok(());
        }
        let config = Config {
            snapshot_every: self.plan.snapshot_every,
            entries_kept: self.plan.entries_kept,
            container_check: Duration::from_millis(500),
            disk_stuck_max: Duration::from_millis(150),
            ..Config::new(id, self.history.founders.clone())
        };
        let seed = self.random.next();
        let stops = self
            .random
            .percent(10)
            .then(|| self.random.below(STOP_WITHIN));
        let now = self.now;
        let server = self.server(id);
        server.run += 1;
        if let Some(operations) = stops {
            server.disk.stop_after(operations);
        }
        let recovered = match server.recover() {
            Ok(recovered) => recovered,
            Err(DiskError::Io(_)) if stops.is_some() => {
                server.stop(true, None);
                let again = now + 1000 + self.random.below(100_000);
                self.at(again, Event::Server(id, What::Resume));
                return Ok(());
            }
            Err(error) => return Err(format!("server {id} cannot start: {error}")),
        };
        // It has come up.
        server.disk.after_kill();
        server
            .accept(&recovered)
            .map_err(|error| format!("server {id}: {error}"))?;
        let local = server.clock.local(now);
        let wall_ms = server.clock.wall_ms + i64::try_from(now / 1000).expect("short runs");
        let mut core = Core::new(config, recovered, seed, local)
            .map_err(|error| format!("server {id}: its own snapshot: {error}"))?;
        core.set_wall_clock(local, wall_ms);
        server.core = Some(core);
        server.disk_free = now;
        trace!(self, "{id} starts");
        self.sum(id);
        self.drain(id)
    }

    /// A server's process ends; with its machine's power, or without.
    fn stop(&mut self, id: u64, power: bool) {
        let operations = self.random.below(STOP_WITHIN);
        self.stop_disk(id, power, Some(operations));
    }

    fn stop_disk(&mut self, id: u64, power: bool, operations: Option<u64>) {
        trace!(self, "{id} stops{}", if power { ": no power" } else { "" });
        self.happened.stops += 1;
        let server = self.server(id);
        server.stop(power, operations);
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
        if !power && self.random.percent(30) {
            for other in 1..=self.plan.servers {
                let at = self.now + 500 + self.random.below(5000);
                self.at(at, Event::Server(other, What::Died(id)));
            }
        }
        let back = self.now + 1000 + self.random.below(800_000);
        self.at(back, Event::Server(id, What::Resume));
    }

    fn running(&self, id: u64) -> bool {
        self.servers[&id].core.is_some()
    }

    fn fault(&mut self) -> Result<(), String> {
        if self.now >= self.plan.storm_us {
            return Ok(());
        }
        let id = 1 + self.random.below(self.plan.servers);
        let kind = *self.random.pick(&self.plan.faults);
        trace!(self, "{kind:?} {id}");
        let now = self.now;
        match kind {
            Kind::Kill if self.running(id) => self.stop(id, false),
            Kind::PowerFailure if self.running(id) => self.stop(id, true),
            Kind::Blackout => {
                let spared = self.random.below(self.plan.servers + 3);
                for id in (1..=self.plan.servers).filter(|id| *id != spared) {
                    if self.running(id) {
                        self.stop(id, true);
                    }
                }
            }
            Kind::StopInOutput => {
                let after = self.random.below(30);
                self.server(id).stop_in = Some(after);
            }
            Kind::Pause => {
                let until = now + self.random.below(400_000);
                self.server(id).paused_until = until;
                self.at(until, Event::Server(id, What::Resume));
            }
            Kind::CutOneWay => {
                let hears = self.random.percent(50);
                for other in 1..=self.plan.servers {
                    self.cut
                        .insert(if hears { (id, other) } else { (other, id) });
                }
            }
            Kind::Isolate => {
                for other in 1..=self.plan.servers {
                    self.cut.extend([(id, other), (other, id)]);
                }
            }
            Kind::Split => {
                let side = self.random.next();
                let all = 1..=self.plan.servers;
                for (a, b) in all.clone().flat_map(|a| all.clone().map(move |b| (a, b))) {
                    if side >> a & 1 != side >> b & 1 {
                        self.cut.insert((a, b));
                    }
                }
            }
            Kind::Loss => self.loss_percent = self.random.below(20),
            Kind::SlowDisk => {
                let free = now + self.random.below(500_000);
                self.server(id).disk_free = free;
            }
            Kind::SyncError if self.running(id) => self.server(id).disk.fail_sync(),
            Kind::FullDisk => {
                let room = self.random.place(40_000);
                self.server(id).disk.set_room(Some(room));
            }
            Kind::Damage if self.running(id) => self.damage(id)?,
            Kind::WallClock => {
                let by = i64::try_from(self.random.below(7_200_000)).expect("two hours");
                let server = self.server(id);
                server.clock.wall_ms += by - 3_600_000;
                let local = server.clock.local(now);
                let wall_ms = server.clock.wall_ms + i64::try_from(now / 1000).expect("short");
                if let Some(core) = &mut server.core {
                    core.set_wall_clock(local, wall_ms);
                }
            }
            Kind::Transfer => {
                let local = self.servers[&id].clock.local(now);
                if let Some(core) = &mut self.server(id).core {
                    core.handle_transfer(local, None);
                    self.drain(id)?;
                }
            }
            Kind::Heal => self.heal(),
            _ => {}
        }
        let next = now + 10_000 + self.random.below(self.plan.fault_every_us);
        self.at(next, Event::Fault);
        Ok(())
    }

    /// Ends what goes on by itself.
    pub(super) fn heal(&mut self) {
        self.cut.clear();
        self.loss_percent = 0;
    }

    /// The storm is over.
    pub(super) fn calm(&mut self) {
        self.heal();
        for server in self.servers.values_mut() {
            server.stop_in = None;
            server.disk.set_room(None);
            server.disk.after_kill();
        }
    }

    fn damage(&mut self, id: u64) -> Result<(), String> {
        let dead = self.servers.values().filter(|server| server.dead).count() as u64;
        // The system has written back what it had (a frame's mark, for one).
        self.server(id).disk.settle();
        self.stop(id, true);
        // More than a minority may not be lost.
        if dead < (self.plan.servers - 1) / 2 {
            let found = self.server(id).damage();
            let found = found.map_err(|error| format!("server {id}: {error}"))?;
            let dead = self.servers[&id].dead;
            trace!(self, "{id} damaged: {found:?}");
            self.happened.damaged += u64::from(dead);
            self.happened.harmless += u64::from(found.is_some() && !dead);
        }
        Ok(())
    }

    fn at_server(&mut self, id: u64, what: What) -> Result<(), String> {
        let now = self.now;
        if matches!(what, What::Resume) {
            if !self.running(id) {
                self.server(id).disk.set_room(None);
                return self.start(id);
            }
            if self.servers[&id].paused_until <= now {
                // A process that wakes reads what has come from whom in any order.
                let clients_first = self.random.percent(50);
                let backlog = std::mem::take(&mut self.server(id).backlog);
                let of_client =
                    |what: &What| matches!(what, What::Frame { .. } | What::Gone { .. });
                let (clients, others): (Vec<_>, Vec<_>) = backlog
                    .into_iter()
                    .partition(|what| clients_first && of_client(what));
                for what in clients.into_iter().chain(others) {
                    self.at_server(id, what)?;
                }
            }
            return Ok(());
        }
        let server = self.server(id);
        if server.paused_until > now {
            server.backlog.push_back(what);
            return Ok(());
        }
        let local = server.clock.local(now);
        let run = server.run;
        let Some(core) = &mut server.core else {
            return Ok(());
        };
        match what {
            What::Peer { from, message } => {
                if let PeerMessage::Touch(sessions) = &message
                    && core.status().role == Role::Leader
                {
                    let term = core.status().term;
                    for (session, ago_us) in sessions {
                        let at = local.micros().saturating_sub(u64::from(*ago_us));
                        let heard = server.heard.entry(session.0).or_default();
                        *heard = (at.max(heard.0), term);
                    }
                }
                core.handle_peer(local, from, message);
            }
            What::Unreachable(peer) => core.handle_unreachable(local, peer),
            What::Died(peer) => {
                if peer != id {
                    core.handle_peer_died(local, peer);
                }
            }
            What::LogWritten { run: of } => {
                if run != of {
                    return Ok(());
                }
                let written = server.write_log();
                return self.on_log_written(id, written);
            }
            What::SnapshotSaved { run: of } => {
                if run != of {
                    return Ok(());
                }
                match server.save() {
                    Ok(index) => {
                        if let Some(core) = &mut server.core {
                            core.handle_saved(local, index);
                        }
                        self.begin_writes(id);
                    }
                    Err(error) => self.disk_failed(id, &error),
                }
            }
            What::Tick { run: of } => {
                if run != of {
                    return Ok(());
                }
                server.tick_due = false;
                core.handle_timeout(local);
            }
            What::Frame { conn, frame } => {
                if server.conns.contains_key(&conn) {
                    core.handle_frame(local, conn, &frame[4..]);
                }
            }
            What::Gone { conn } => {
                server.conns.remove(&conn);
                core.handle_disconnect(local, conn);
            }
            What::Resume => unreachable!("handled above"),
        }
        self.drain(id)
    }

    fn on_log_written(
        &mut self,
        id: u64,
        written: std::io::Result<Option<u64>>,
    ) -> Result<(), String> {
        match written {
            Ok(token) => {
                let now = self.now;
                let server = self.server(id);
                let local = server.clock.local(now);
                if let (Some(core), Some(token)) = (&mut server.core, token) {
                    core.handle_persisted(local, token);
                }
                self.begin_writes(id);
                self.drain(id)
            }
            Err(error) => {
                self.disk_failed(id, &error);
                Ok(())
            }
        }
    }

    /// The server says what is wrong with its disk, and stops. What it wrote is still in memory, until
    /// the machine fails, too.
    fn disk_failed(&mut self, id: u64, error: &std::io::Error) {
        trace!(self, "{id}: {error}");
        self.happened.disk_failures += 1;
        let power = self.random.percent(30);
        self.stop_disk(id, power, None);
    }

    /// The threads of the disk take what there is to do.
    fn begin_writes(&mut self, id: u64) {
        let now = self.now;
        let slow = self.random.below(50) < 2;
        let takes = if slow {
            60_000
        } else {
            50 + self.random.below(2000)
        };
        let some = self.random.next();
        let server = self.server(id);
        let run = server.run;
        let mut due = Vec::new();
        if server.writing.is_empty() && !server.jobs.is_empty() {
            // It may be a little ahead of the one that hands out work.
            let take = usize::try_from(some % server.jobs.len() as u64).expect("few") + 1;
            server.writing = server.jobs.drain(..take).collect();
            server.disk_free = server.disk_free.max(now) + takes;
            due.push((server.disk_free, What::LogWritten { run }));
        }
        if server.saving.is_none()
            && let Some(image) = server.snapshots.pop_front()
        {
            server.saving = Some(image);
            due.push((now + takes * 3, What::SnapshotSaved { run }));
        }
        for (at, what) in due {
            self.at(at, Event::Server(id, what));
        }
    }

    /// Writes down what a server's state is.
    fn sum(&mut self, id: u64) {
        let server = self.servers.get_mut(&id).expect("one of them");
        if let Some(core) = &server.core {
            let state = core.state();
            server.summed = state.zxid;
            let sum = crc32c::crc32c(&crate::snapshot::encode(state));
            self.history.states.push((state.zxid, sum));
        }
    }

    fn drain(&mut self, id: u64) -> Result<(), String> {
        loop {
            let server = self.servers.get_mut(&id).expect("one of them");
            let Some(core) = &mut server.core else {
                return Ok(());
            };
            let Some(output) = core.poll_output() else {
                break;
            };
            if server.stop_in == Some(0) {
                self.note_applied(id)?;
                self.stop(id, true);
                return Ok(());
            }
            server.stop_in = server.stop_in.map(|left| left - 1);
            self.carry_out(id, output)?;
        }
        self.note_applied(id)?;
        self.begin_writes(id);
        let late = self.random.below(300);
        let server = self.servers.get_mut(&id).expect("one of them");
        let Some(core) = &server.core else {
            return Ok(());
        };
        let status = core.status();
        if status.role == Role::Leader {
            let leader = *self.leaders.entry(status.term).or_insert_with(|| {
                self.happened.leaders += 1;
                id
            });
            if leader != id {
                return Err(format!(
                    "term {} is led by {leader} and by {id}",
                    status.term
                ));
            }
        }
        if !server.tick_due
            && let Some(wake) = core.poll_timeout()
        {
            server.tick_due = true;
            // Timers are a little late.
            let (at, run) = (server.clock.world(wake) + late, server.run);
            self.at(at, Event::Server(id, What::Tick { run }));
        }
        if self.servers[&id].applied >= self.servers[&id].summed + 40 {
            self.sum(id);
        }
        Ok(())
    }

    /// Writes down what a server has applied.
    fn note_applied(&mut self, id: u64) -> Result<(), String> {
        let server = self.servers.get_mut(&id).expect("one of them");
        let Some(core) = &server.core else {
            return Ok(());
        };
        let zxid = core.state().zxid;
        for index in server.applied + 1..=zxid {
            let Some(entry) = server.log.get(&index) else {
                return Err(format!(
                    "server {id} applied index {index} and never had it"
                ));
            };
            let noted = self.history.applied(self.now, entry);
            noted.map_err(|error| format!("server {id}: {error}"))?;
        }
        server.applied = zxid;
        Ok(())
    }

    fn carry_out(&mut self, id: u64, output: Output) -> Result<(), String> {
        match output {
            Output::Persist { token, write } => {
                let server = self.servers.get_mut(&id).expect("one of them");
                if let Some(image) = &write.snapshot {
                    self.happened.snapshots_installed += 1;
                    server.log.clear();
                    server.applied = server.applied.max(image.index);
                }
                if let Some(first) = write.entries.first() {
                    server.log.split_off(&first.index);
                }
                for entry in &write.entries {
                    server.log.insert(entry.index, entry.clone());
                }
                let entries = write.entries.clone();
                server.jobs.push_back(Job::Write { token, write });
                for entry in entries {
                    self.expiry_is_due(id, &entry.data)?;
                }
            }
            Output::SaveSnapshot(image) => {
                self.server(id).snapshots.push_back(image);
                self.sum(id);
            }
            Output::Send { to, message } => self.send(id, to, message),
            Output::Reply { conn, frame } | Output::Notify { conn, frame } => {
                self.tell_client(id, conn, Some(frame));
            }
            Output::Close { conn, reason } => {
                trace!(self, "{id} closes {conn:?}: {reason:?}");
                self.tell_client(id, conn, None);
                self.server(id).conns.remove(&conn);
            }
            Output::Event(event) => trace!(self, "{id}: {event:?}"),
        }
        Ok(())
    }

    /// A session that a leader ends has been silent for its time, as far as that leader heard.
    fn expiry_is_due(&mut self, id: u64, data: &[u8]) -> Result<(), String> {
        let server = &self.servers[&id];
        let Ok(entry) = postcard::from_bytes::<Entry>(data) else {
            return Ok(());
        };
        let Command::Expire {
            session: SessionId(session),
            ..
        } = entry.proposal.command
        else {
            return Ok(());
        };
        let Some(core) = &server.core else {
            return Ok(());
        };
        let status = core.status();
        // Its server may also end one that nobody was given.
        let here = core.state().sessions.get(&SessionId(session));
        if let (Some((at, term)), Some(record)) = (server.heard.get(&session), here)
            && status.role == Role::Leader
            && *term == status.term
        {
            let now = server.clock.local(self.now).micros();
            let silent_us = now.saturating_sub(*at);
            if silent_us + 1000 < u64::from(record.timeout_ms) * 1000 {
                return Err(format!(
                    "server {id} ends session 0x{session:x} after {silent_us} us of {} ms",
                    record.timeout_ms
                ));
            }
        }
        Ok(())
    }

    fn send(&mut self, id: u64, to: u64, message: PeerMessage) {
        let lost = self.random.below(100) < self.loss_percent || self.cut.contains(&(id, to));
        if lost {
            if self.random.percent(5) {
                self.at(self.now + 300, Event::Server(id, What::Unreachable(to)));
            }
            return;
        }
        let slow = self.random.percent(1);
        let mut at = self.now + 50 + self.random.below(if slow { 30_000 } else { 1500 });
        if self.plan.in_order {
            let last = self.wires.entry((id, to)).or_insert(0);
            at = at.max(*last);
            *last = at;
        }
        if self.random.percent(self.plan.twice_percent) {
            let again = at + self.random.below(20_000);
            let what = What::Peer {
                from: id,
                message: message.clone(),
            };
            self.at(again, Event::Server(to, what));
        }
        self.at(at, Event::Server(to, What::Peer { from: id, message }));
    }

    /// In order, as TCP delivers.
    fn tell_client(&mut self, id: u64, conn: ConnId, frame: Option<Bytes>) {
        let Some(client) = self.servers[&id].conns.get(&conn).copied() else {
            return;
        };
        let delay = 20 + self.random.below(300);
        let Some(link) = self.links.get_mut(&client) else {
            return;
        };
        if link.conn == conn {
            link.to_client = link.to_client.max(self.now) + delay;
            let at = link.to_client;
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

    fn at_client(&mut self, id: u64, conn: ConnId, frame: Option<Bytes>) -> Result<(), String> {
        if self.links.get(&id).map(|link| link.conn) != Some(conn) {
            return Ok(());
        }
        let client = self.clients.get_mut(&id).expect("a client");
        let mut answer = None;
        match frame {
            Some(frame) => answer = client.frame(self.now, &frame[4..], &mut self.history)?,
            None => client.disconnected(),
        }
        if client.is_down() {
            client.disconnected();
            self.links.remove(&id);
        }
        if let Some(frame) = answer {
            self.tell_server(id, frame);
        }
        Ok(())
    }

    /// The client's end is gone. The server hears of it soon, late, or never.
    fn break_off(&mut self, id: u64) {
        self.clients.get_mut(&id).expect("a client").disconnected();
        if let Some(link) = self.links.remove(&id)
            && !self.random.percent(20)
        {
            let late = if self.random.percent(30) {
                2_000_000
            } else {
                2000
            };
            let at = self.now + 200 + self.random.below(late);
            self.at(
                at,
                Event::Server(link.server, What::Gone { conn: link.conn }),
            );
        }
    }

    fn client_turn(&mut self, id: u64) {
        let storm = self.now < self.plan.storm_us;
        let again = self.now + 500 + self.random.below(self.plan.client_every_us);
        self.at(again, Event::Client(id));
        let client = &self.clients[&id];
        if client.gives_up(self.now) || storm && !client.is_down() && self.random.percent(1) {
            self.break_off(id);
            if self.random.percent(50) {
                return;
            }
        }
        let client = self.clients.get_mut(&id).expect("a client");
        if client.is_down() {
            let server = 1 + self.random.below(self.plan.servers);
            if !self.running(server) {
                return;
            }
            let conn = ConnId(self.next_conn);
            self.next_conn += 1;
            let client = self.clients.get_mut(&id).expect("a client");
            let frame = client.connect(self.now, conn.0, &mut self.history);
            self.happened.resumed += u64::from(self.history.conns[&conn.0].wanted != 0);
            let link = Link {
                server,
                conn,
                to_server: self.now,
                to_client: self.now,
            };
            self.links.insert(id, link);
            let target = self.servers.get_mut(&server).expect("one of them");
            target.conns.insert(conn, id);
            let local = target.clock.local(self.now);
            let core = target.core.as_mut().expect("it runs");
            core.handle_connect(local, conn, Caller::default());
            self.tell_server(id, frame);
            return;
        }
        let quiet = self.now > self.plan.storm_us + self.plan.peace_us / 2;
        let (now, history) = (self.now, &mut self.history);
        if let Some(frame) = client.request(now, &mut self.random, quiet, history) {
            self.tell_server(id, frame);
        }
    }

    fn tell_server(&mut self, id: u64, frame: Bytes) {
        let delay = 20 + self.random.below(300);
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        link.to_server = link.to_server.max(self.now) + delay;
        let (at, server, conn) = (link.to_server, link.server, link.conn);
        self.at(at, Event::Server(server, What::Frame { conn, frame }));
    }

    /// All servers that can run have applied the same.
    pub(super) fn in_step(&self) -> bool {
        let zxid = |server: &Server| server.core.as_ref().map(|core| core.state().zxid);
        let mut living = self
            .servers
            .values()
            .filter(|server| !server.dead)
            .map(zxid);
        let first = living.next().expect("a majority lives");
        first.is_some() && living.all(|other| other == first)
    }
}
