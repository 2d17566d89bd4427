//! The run itself.

use super::invariants::{self, Invariant, Seen, Who};
use super::program::Program;
use super::twin::Pair;
use crate::config::Config;
use crate::output::{ControlEvent, RegistryReply};
use crate::process::{GroupId, Order, Output, Process, ProcessConfig, Request};
use crate::rng::Rng;
use crate::sim::app;
use crate::sim::network::{Network, below, chance};
use crate::sim::plan::Options;
use crate::sim::registry::{self, Registry};
use crate::sim::world::Outcome;
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub(super) const NAMES: [&str; 3] = ["a", "b", "c"];
/// When all is healed in a long run, in microseconds.
const LONG: u64 = 900_000;
/// In a short one, which seven of ten are: what is found at all is mostly found soon.
const SHORT: u64 = 250_000;
const LIVE_WITHIN: u64 = 10_000_000;
const INBOX_MAX: usize = 3000;

/// What a run says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Digest of everything that happened, in order.
    pub fingerprint: u64,
    /// Steps taken.
    pub steps: u64,
    /// Views of groups begun by anyone.
    pub views: u64,
    /// Messages delivered to anyone.
    pub delivered: u64,
    /// States given to joiners.
    pub transfers: u64,
}

pub(super) enum Happening {
    Timer {
        node: usize,
        epoch: u64,
    },
    Arrives {
        node: usize,
        epoch: u64,
        what: Incoming,
    },
    Registry {
        node: usize,
        epoch: u64,
        request: Request,
        lost: bool,
    },
    Act {
        node: usize,
    },
    /// One safe message: aimed at a moment at which a view ends.
    SendSafe {
        node: usize,
        group: GroupId,
    },
    /// One that left comes back at once, while what it sent is still on its way.
    Rejoin {
        node: usize,
        wish: &'static str,
    },
    /// Those who have a group's state die, aimed at a moment at which one more has just got it.
    KillDonors {
        group: GroupId,
        but: usize,
    },
    Unpause {
        node: usize,
        group: GroupId,
    },
    Trouble,
    Restart {
        node: usize,
    },
    HealNetwork,
    Heal,
    Check,
}

#[derive(Clone)]
pub(super) enum Incoming {
    Datagram { from: Arc<MemberId>, body: Bytes },
    Control { peer: usize, event: ControlEvent },
    Registry(RegistryReply),
}

pub(super) struct Node {
    pub(super) process: Option<Pair>,
    /// Counts processes.
    epoch: u64,
    pub(super) paused_until: u64,
    inbox: VecDeque<Incoming>,
    registry_off: bool,
    timer_at: u64,
    pub(super) programs: BTreeMap<GroupId, Program>,
    pub(super) names: BTreeMap<GroupId, String>,
    pub(super) wanted: BTreeSet<&'static str>,
}

pub(super) struct World {
    pub(super) options: Options,
    pub(super) rng: Rng,
    pub(super) now: u64,
    pub(super) seq: u64,
    pub(super) queue: BTreeMap<(u64, u64), Happening>,
    pub(super) nodes: Vec<Node>,
    pub(super) network: Network,
    pub(super) registry: Registry,
    pub(super) invariants: Vec<Box<dyn Invariant>>,
    pub(super) failure: Option<(String, String)>,
    pub(super) healed: bool,
    /// When all is healed.
    healed_at: u64,
    /// Until then programs go on sending.
    pub(super) quiet_at: u64,
    pub(super) report: GroupReport,
    pub(super) incarnations: u128,
    pub(super) memberships: u64,
    pub(super) checks: u64,
    /// Members say nonsense besides; nothing is promised then but that it is borne.
    pub(super) nonsense: bool,
    /// Done to every twin: what a snapshot would forget.
    forget: fn(&mut Process),
}

/// Runs one seed to its end.
pub fn run_groups(options: &Options) -> GroupReport {
    run_forgetting(options, |_| {})
}

/// Runs one seed; its twins forget something.
pub(super) fn run_forgetting(options: &Options, forget: fn(&mut Process)) -> GroupReport {
    let mut w = World::new(options.clone());
    w.forget = forget;
    w.run()
}

/// Runs one seed in which members say nonsense.
#[cfg(test)]
pub(super) fn run_nonsense(options: &Options) -> GroupReport {
    let mut w = World::new(options.clone());
    w.nonsense = true;
    w.run()
}

impl World {
    fn run(mut self) -> GroupReport {
        let w = &mut self;
        while w.failure.is_none() {
            let Some(((at, _), what)) = w.queue.pop_first() else {
                break;
            };
            w.now = at;
            w.report.steps += 1;
            if matches!(what, Happening::Check) {
                match w.not_well() {
                    None => break,
                    Some(what) if at > w.healed_at + LIVE_WITHIN => w.fail("liveness", what),
                    Some(_) => w.after(10_000, Happening::Check),
                }
                continue;
            }
            w.happen(what);
            if w.nonsense {
                w.failure = None;
                if w.healed {
                    break;
                }
            }
        }
        if let Some((invariant, what)) = w.failure.take() {
            w.report.outcome = Outcome::Failed {
                invariant,
                what,
                at_us: w.now,
            };
        }
        self.report
    }
}

impl World {
    fn new(options: Options) -> Self {
        let mut rng = Rng::new(app::mix(options.seed ^ 0x6e0));
        let count = match options.nodes {
            0 => [3, 2, 3, 4, 5, 3, 6, 9][usize::try_from(below(&mut rng, 8)).expect("few")],
            n => n,
        };
        let long = chance(&mut rng, 300);
        let healed_at = if long { LONG } else { SHORT };
        let nodes = (0..count)
            .map(|_| Node {
                process: None,
                epoch: 0,
                paused_until: 0,
                inbox: VecDeque::new(),
                registry_off: false,
                timer_at: u64::MAX,
                programs: BTreeMap::new(),
                names: BTreeMap::new(),
                wanted: BTreeSet::new(),
            })
            .collect();
        let mut w = Self {
            options,
            rng,
            now: 1,
            seq: 0,
            queue: BTreeMap::new(),
            nodes,
            network: Network::default(),
            registry: Registry::default(),
            invariants: invariants::all(),
            failure: None,
            healed: false,
            healed_at,
            quiet_at: healed_at + if long { 200_000 } else { 80_000 },
            report: GroupReport {
                outcome: Outcome::Passed,
                fingerprint: 0,
                steps: 0,
                views: 0,
                delivered: 0,
                transfers: 0,
            },
            incarnations: 0,
            memberships: 0,
            checks: 0,
            nonsense: false,
            forget: |_| {},
        };
        w.network.duplicates = 30;
        for node in 0..count {
            let at = below(&mut w.rng, 20_000);
            w.after(at, Happening::Restart { node });
            w.after(at + 1000, Happening::Act { node });
        }
        let troubles = if long {
            2 + below(&mut w.rng, 6)
        } else {
            1 + below(&mut w.rng, 3)
        };
        for _ in 0..troubles {
            let at = 50_000 + below(&mut w.rng, healed_at - 80_000);
            w.after(at, Happening::Trouble);
        }
        w.after(healed_at, Happening::Heal);
        w
    }

    pub(super) fn after(&mut self, us: u64, what: Happening) {
        self.seq += 1;
        self.queue.insert((self.now + us, self.seq), what);
    }

    pub(super) fn fail(&mut self, invariant: &str, what: String) {
        self.log(|| format!("VIOLATED {invariant}: {what}"));
        self.failure.get_or_insert((invariant.to_owned(), what));
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        let line = line();
        let print = &mut self.report.fingerprint;
        *print = app::mix(*print ^ app::digest(line.as_bytes()) ^ self.now);
        if self.options.trace {
            println!("{:>10} {line}", self.now);
        }
    }

    pub(super) fn see(&mut self, node: usize, group: GroupId, seen: &Seen<'_>) {
        let Some(process) = &self.nodes[node].process else {
            return;
        };
        let who: Who = (process.process().me().incarnation, group);
        let view = self.nodes[node].programs.get(&group).map_or(0, |p| p.view);
        let mut failed = None;
        for invariant in &mut self.invariants {
            if let Err(what) = invariant.see(&who, view, seen) {
                failed.get_or_insert((invariant.name(), what));
            }
        }
        if let Some((name, what)) = failed {
            self.fail(name, format!("{} in {group:?}: {what}", self::name(node)));
        }
    }

    // ---- what happens ------------------------------------------------------------------------------------------

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Timer { node, epoch } => {
                let n = &mut self.nodes[node];
                if n.epoch != epoch || n.timer_at > self.now {
                    return;
                }
                if n.paused_until > self.now {
                    let wait = n.paused_until - self.now;
                    return self.after(wait, Happening::Timer { node, epoch });
                }
                self.drain_inbox(node);
                self.nodes[node].timer_at = u64::MAX;
                self.call(node, |p, now| p.handle_timeout(now));
            }
            Happening::Arrives { node, epoch, what } => {
                let n = &mut self.nodes[node];
                if n.epoch != epoch || n.process.is_none() {
                    return;
                }
                if n.paused_until > self.now {
                    if n.inbox.len() < INBOX_MAX || !matches!(what, Incoming::Datagram { .. }) {
                        n.inbox.push_back(what);
                    }
                    return;
                }
                self.drain_inbox(node);
                self.arrives(node, what);
            }
            Happening::Registry {
                node,
                epoch,
                request,
                lost,
            } => {
                let reply = match self.registry_request(&request) {
                    Some(reply) if !lost => reply,
                    _ => request.unknown(),
                };
                let us = 200 + below(&mut self.rng, 800);
                let what = Incoming::Registry(reply);
                self.after(us, Happening::Arrives { node, epoch, what });
            }
            Happening::Act { node } => self.act(node),
            Happening::SendSafe { node, group } => {
                if self.nodes[node].programs.contains_key(&group) {
                    self.multicast(node, group, Some(Order::Fifo));
                }
            }
            Happening::Rejoin { node, wish } => self.join(node, wish),
            Happening::KillDonors { group, but } => self.kill_donors(group, but),
            Happening::Unpause { node, group } => self.unpause(node, group),
            Happening::Trouble => self.trouble(),
            Happening::Restart { node } => self.start(node),
            Happening::HealNetwork => self.network.heal(),
            Happening::Heal => {
                self.log(|| "all is healed".into());
                self.healed = true;
                self.network = Network::default();
                for node in 0..self.nodes.len() {
                    self.nodes[node].registry_off = false;
                    self.nodes[node].paused_until = 0;
                    self.start(node);
                    self.connect(node);
                }
                self.after(self.quiet_at - self.now + 100_000, Happening::Check);
            }
            Happening::Check => unreachable!("the loop takes it"),
        }
    }

    fn drain_inbox(&mut self, node: usize) {
        while let Some(what) = self.nodes[node].inbox.pop_front() {
            self.arrives(node, what);
        }
    }

    fn arrives(&mut self, node: usize, what: Incoming) {
        match what {
            Incoming::Datagram { from, body } => {
                #[cfg(test)]
                if self.nonsense {
                    self.talk_nonsense(node, &from, &body);
                }
                self.call(node, |p, now| p.handle_datagram(now, &from, &body));
            }
            Incoming::Control { peer, event } => {
                let name = name(peer);
                self.call(node, |p, now| p.handle_control(now, &name, event));
            }
            Incoming::Registry(reply) => {
                self.call(node, |p, now| p.handle_registry(now, reply.clone()))
            }
        }
    }

    fn registry_request(&mut self, request: &Request) -> Option<RegistryReply> {
        let request = match request {
            Request::ReadView => registry::Request::ReadView,
            Request::ReadLease => registry::Request::ReadLease,
            Request::CompareAndSet {
                expected_version,
                value,
            } => registry::Request::CompareAndSet {
                expected: *expected_version,
                value: value.clone(),
            },
            Request::RenewLease {
                view_version,
                value,
            } => registry::Request::RenewLease {
                view_version: *view_version,
                value: value.clone(),
            },
        };
        Some(self.registry.apply(&request))
    }

    pub(super) fn call(&mut self, node: usize, f: impl Fn(&mut Process, Instant)) {
        let now = Instant::from_micros(self.now);
        let Some(process) = &mut self.nodes[node].process else {
            return;
        };
        process.give(now, f);
        self.drain(node);
    }

    pub(super) fn drain(&mut self, node: usize) {
        let epoch = self.nodes[node].epoch;
        while let Some(process) = &mut self.nodes[node].process {
            let Some(output) = process.poll_output() else {
                break;
            };
            self.execute(node, output);
            if self.nodes[node].epoch != epoch {
                return;
            }
        }
        let Some(process) = &mut self.nodes[node].process else {
            return;
        };
        let difference = process.difference();
        let due = process.process().poll_timeout();
        if let Some(what) = difference {
            self.fail("twin", what);
        }
        if let Some(at) = due {
            let at = at.micros().max(self.now + 1);
            if at < self.nodes[node].timer_at {
                self.nodes[node].timer_at = at;
                self.after(at - self.now, Happening::Timer { node, epoch });
            }
        }
    }

    fn execute(&mut self, node: usize, output: Output) {
        match output {
            Output::Send { to, bodies } => {
                let Some(process) = &self.nodes[node].process else {
                    return;
                };
                let from = Arc::new(process.process().me().clone());
                for m in to.iter() {
                    let to = index(m);
                    let epoch = self.nodes[to].epoch;
                    for body in &bodies {
                        for us in self.network.delays(&mut self.rng, node, to) {
                            let what = Incoming::Datagram {
                                from: from.clone(),
                                body: body.clone(),
                            };
                            self.after(
                                us,
                                Happening::Arrives {
                                    node: to,
                                    epoch,
                                    what,
                                },
                            );
                        }
                    }
                }
            }
            Output::Registry(request) => {
                let epoch = self.nodes[node].epoch;
                let lost = self.nodes[node].registry_off || chance(&mut self.rng, 10);
                let us = 200 + below(&mut self.rng, 800);
                if self.nodes[node].registry_off {
                    let what = Incoming::Registry(request.unknown());
                    self.after(20_000, Happening::Arrives { node, epoch, what });
                } else {
                    self.after(
                        us,
                        Happening::Registry {
                            node,
                            epoch,
                            request,
                            lost,
                        },
                    );
                }
            }
            Output::Instance(_) | Output::Epoch { .. } => {}
            Output::Group { group, event } => self.on_event(node, group, event),
            Output::CannotJoin { name: group } => self.fail("join", format!("no room in {group}")),
            Output::Notice(notice) => self.log(|| format!("{} {notice:?}", name(node))),
            Output::Outside => {
                self.log(|| format!("{} is outside", name(node)));
                self.end_process(node);
                let us = 1000 + below(&mut self.rng, 10_000);
                self.after(us, Happening::Restart { node });
            }
        }
    }

    // ---- processes ---------------------------------------------------------------------------------------------

    fn start(&mut self, node: usize) {
        if self.nodes[node].process.is_some() {
            return;
        }
        self.incarnations += 1;
        let me = MemberId::new(name(node), self.incarnations);
        let members = (0..self.nodes.len()).map(name).collect();
        let mut core = Config::new(1, me.clone(), members, self.rng.next_u128());
        core.total_failure_after = Duration::from_millis(400);
        core.lease_alone = Duration::from_millis(100);
        core.limits.flight_bytes_max = 64 << 10;
        core.limits.transfer_window_bytes = 8 << 10;
        core.fault = self.options.fault.or(core.fault);
        let mut config = ProcessConfig::new(core);
        config.slow_after = Some(Duration::from_secs(3));
        // Groups have to wait for their turns.
        config.total_flight_bytes_max = 4 << 10;
        let seed = self.rng.next_u64();
        let twin = self
            .options
            .twins
            .then_some((self.options.seed, self.forget));
        let now = Instant::from_micros(self.now);
        let n = &mut self.nodes[node];
        n.epoch += 1;
        n.timer_at = u64::MAX;
        n.inbox.clear();
        n.wanted.clear();
        n.process = Some(Pair::new(config, seed, now, twin));
        self.log(|| format!("{me} begins"));
        self.connect(node);
        self.drain(node);
    }

    /// Control connections both ways.
    fn connect(&mut self, node: usize) {
        for peer in 0..self.nodes.len() {
            if peer == node || !self.network.both_ways(node, peer) {
                continue;
            }
            for (at, of) in [(node, peer), (peer, node)] {
                let since = Instant::from_micros(self.now);
                let (Some(p), epoch) = (&self.nodes[of].process, self.nodes[at].epoch) else {
                    continue;
                };
                let event = ControlEvent::Connected {
                    incarnation: p.process().me().incarnation,
                    since,
                };
                let what = Incoming::Control { peer: of, event };
                let us = 100 + below(&mut self.rng, 300);
                self.after(
                    us,
                    Happening::Arrives {
                        node: at,
                        epoch,
                        what,
                    },
                );
            }
        }
    }

    fn end_process(&mut self, node: usize) {
        let groups: Vec<GroupId> = self.nodes[node].programs.keys().copied().collect();
        for group in groups {
            self.see(node, group, &Seen::Left);
        }
        let n = &mut self.nodes[node];
        n.process = None;
        n.epoch += 1;
        n.paused_until = 0;
        n.programs.clear();
        n.names.clear();
        for at in (0..self.nodes.len()).filter(|at| *at != node) {
            if !self.network.both_ways(at, node) {
                continue;
            }
            let epoch = self.nodes[at].epoch;
            let us = 50 + below(&mut self.rng, 200);
            let then = Instant::from_micros(self.now + us);
            for event in [
                ControlEvent::Ended { at: then },
                ControlEvent::Refused { since: then },
            ] {
                let what = Incoming::Control { peer: node, event };
                self.after(
                    us + 1,
                    Happening::Arrives {
                        node: at,
                        epoch,
                        what,
                    },
                );
            }
        }
    }

    fn kill_donors(&mut self, group: GroupId, but: usize) {
        for node in (0..self.nodes.len()).filter(|n| *n != but) {
            let has = self.nodes[node].programs.get(&group);
            if !self.healed && has.is_some_and(|p| p.has_state) {
                self.log(|| format!("{} dies, who has the state", name(node)));
                self.end_process(node);
                let us = 2000 + below(&mut self.rng, 300_000);
                self.after(us, Happening::Restart { node });
            }
        }
    }

    fn trouble(&mut self) {
        if self.healed {
            return;
        }
        let nodes = self.nodes.len() as u64;
        let node = usize::try_from(below(&mut self.rng, nodes)).expect("few nodes");
        match below(&mut self.rng, 9) {
            0..=3 => {
                self.log(|| format!("{} dies", name(node)));
                self.end_process(node);
                let us = 2000 + below(&mut self.rng, 300_000);
                self.after(us, Happening::Restart { node });
                if chance(&mut self.rng, 300) {
                    self.after(below(&mut self.rng.clone(), 3000), Happening::Trouble);
                }
            }
            4 => {
                let us = 5000 + below(&mut self.rng, 300_000);
                self.log(|| format!("{} is paused for {us}", name(node)));
                self.nodes[node].paused_until = self.now + us;
            }
            5 => {
                self.log(|| format!("{} is cut off", name(node)));
                let ways = below(&mut self.rng, 3);
                for other in (0..self.nodes.len()).filter(|o| *o != node) {
                    if ways != 0 {
                        self.network.cut(node, other);
                    }
                    if ways != 1 {
                        self.network.cut(other, node);
                    }
                }
                let us = 10_000 + below(&mut self.rng, 400_000);
                self.after(us, Happening::HealNetwork);
            }
            6 => {
                self.nodes[node].registry_off = !self.nodes[node].registry_off;
            }
            _ => {
                self.network.loss = below(&mut self.rng, 250);
                self.network.duplicates = below(&mut self.rng, 200);
                self.network.reorder = below(&mut self.rng, 300);
                let noise = format!("{:?}", self.network);
                self.log(|| noise);
            }
        }
    }

    // ---- the end -----------------------------------------------------------------------------------------------

    /// What is not as it must be when all is healed and quiet.
    fn not_well(&mut self) -> Option<String> {
        self.checks += 1;
        if self.checks.is_multiple_of(20) {
            // Connections are tried again, as the driver does.
            for node in 0..self.nodes.len() {
                self.connect(node);
            }
        }
        let mut states: BTreeMap<&str, (u64, Vec<MemberId>, u64)> = BTreeMap::new();
        for (i, n) in self.nodes.iter().enumerate() {
            for wish in NAMES {
                let Some((group, _)) = n.names.iter().find(|(_, name)| *name == wish) else {
                    return Some(format!("{} is not in {wish}", name(i)));
                };
                let p = &n.programs[group];
                if !p.awaited.is_empty() || !p.open_calls.is_empty() {
                    return Some(format!(
                        "{} waits in {wish}: {:?} {:?}",
                        name(i),
                        p.awaited.keys(),
                        p.open_calls.keys()
                    ));
                }
                let mine = (p.view, p.members.clone(), p.state);
                let first = states.entry(wish).or_insert_with(|| mine.clone());
                if *first != mine || mine.1.len() != self.nodes.len() {
                    return Some(format!("{wish}: {first:?} and {} {mine:?}", name(i)));
                }
            }
        }
        None
    }
}

pub(super) fn name(node: usize) -> String {
    format!("r{}", node + 1)
}

pub(super) fn index(member: &MemberId) -> usize {
    member.name[1..].parse::<usize>().expect("our own name") - 1
}
