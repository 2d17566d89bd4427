//! The run itself.

use super::app::{self, App};
use super::control::Connection;
use super::invariants::{self, Invariant, Observed};
use super::network::{Network, below, chance};
use super::plan::{Options, Trouble};
use super::registry::{Registry, Request};
use super::twin::Pair;
use crate::core::Core;
use crate::output::{Command, ControlEvent, Output, RegistryReply, Role};
use crate::rng::Rng;
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// After healing, all must be well within this long.
const LIVE_WITHIN: u64 = 8_000_000;
/// Datagrams that the kernel keeps for a process that is stopped.
const INBOX_MAX: usize = 3000;
const REGISTRY_GIVES_UP: u64 = 60_000;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All invariants held, and the group came together again.
    Passed,
    /// One did not.
    Failed {
        /// Which.
        invariant: String,
        /// How.
        what: String,
        /// When, in microseconds.
        at_us: u64,
    },
}

/// What a run says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Digest of everything that happened, in order.
    pub fingerprint: u64,
    /// Steps taken.
    pub steps: u64,
    /// Views installed by anyone.
    pub views: u64,
    /// Events multicast.
    pub events: u64,
    /// The highest generation.
    pub generations: u32,
    /// Longest time without a member that may emit, in microseconds, before all was healed.
    pub longest_silence_us: u64,
}

pub(super) enum Happening {
    Timer {
        node: usize,
        epoch: u64,
    },
    Arrives {
        node: usize,
        life: u64,
        what: Incoming,
    },
    Registry {
        node: usize,
        epoch: u64,
        request: Request,
        answer_after: Option<u64>,
    },
    Dial {
        from: usize,
        to: usize,
        attempt: u64,
    },
    Challenge {
        from: usize,
        to: usize,
        attempt: u64,
    },
    Ends {
        at: usize,
        peer: usize,
        incarnation: u128,
        attempt: u64,
    },
    Ready {
        node: usize,
        epoch: u64,
    },
    Respawn {
        node: usize,
        life: u64,
    },
    Resume {
        node: usize,
        life: u64,
    },
    Kill {
        node: usize,
        life: u64,
    },
    Load,
    /// A replica's server keeps up, or does not.
    Progress {
        node: usize,
    },
    Trouble(Trouble),
    Heal,
    Check,
}

#[derive(Clone)]
pub(super) enum Incoming {
    Datagram { from: MemberId, body: Bytes },
    Control { peer: usize, event: ControlEvent },
    Registry { epoch: u64, reply: RegistryReply },
}

pub(super) struct Node {
    pub(super) name: String,
    pub(super) core: Option<Core>,
    /// In a run with twins, the core that was never restored.
    pub(super) uncut: Option<Core>,
    /// Counts cores; what belongs to an older one is void.
    pub(super) epoch: u64,
    /// Counts processes.
    pub(super) life: u64,
    pub(super) alive: bool,
    pub(super) stopped: bool,
    pub(super) app: App,
    pub(super) generation: u32,
    pub(super) view: u64,
    pub(super) inbox: VecDeque<Incoming>,
    pub(super) skew_ppm: i64,
    pub(super) offset: u64,
    pub(super) registry_off: bool,
    pub(super) checkpoint_bytes: Option<u64>,
    /// What it has yet to give of checkpoints that it gives in parts.
    pub(super) parts: BTreeMap<MemberId, VecDeque<Bytes>>,
    pub(super) connections: Vec<(Connection, Instant)>,
    pub(super) timer_at: u64,
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
    pub(super) fingerprint: u64,
    pub(super) steps: u64,
    pub(super) views: u64,
    pub(super) events: u64,
    pub(super) stable_since_heal: bool,
    pub(super) healed: bool,
    pub(super) spoke_at: u64,
    pub(super) longest_silence_us: u64,
    /// Done to every twin: what a snapshot would forget.
    pub(super) forget: fn(&mut Core),
}

/// Runs one seed to its end.
pub fn run(options: &Options) -> Report {
    run_forgetting(options, |_| {})
}

/// Runs one seed; its twins forget something.
pub(super) fn run_forgetting(options: &Options, forget: fn(&mut Core)) -> Report {
    let mut w = World::new(options.clone());
    w.forget = forget;
    while w.failure.is_none() {
        let Some(((at, _), what)) = w.queue.pop_first() else {
            break;
        };
        w.now = at;
        if at > w.options.healed_at() + LIVE_WITHIN {
            w.fail(
                "liveness",
                format!("not together: {}", w.where_everyone_is()),
            );
            break;
        }
        w.steps += 1;
        if matches!(what, Happening::Check) && w.all_is_well() {
            break;
        }
        w.happen(what);
        w.watch_emitters();
    }
    let outcome = match w.failure.take() {
        None => Outcome::Passed,
        Some((invariant, what)) => Outcome::Failed {
            invariant,
            what,
            at_us: w.now,
        },
    };
    Report {
        outcome,
        fingerprint: w.fingerprint,
        steps: w.steps,
        views: w.views,
        events: w.events,
        generations: w.nodes.iter().map(|n| n.generation).max().unwrap_or(0),
        longest_silence_us: w.longest_silence_us,
    }
}

impl World {
    fn new(options: Options) -> Self {
        let mut rng = Rng::new(app::mix(options.seed ^ 0x5eed));
        let count = match options.nodes {
            0 => [3, 3, 3, 2, 4, 5][usize::try_from(below(&mut rng, 6)).expect("below six")],
            n => n,
        };
        let nodes = (0..count).map(|i| Node {
            name: format!("r{}", i + 1),
            core: None,
            uncut: None,
            epoch: 0,
            life: 0,
            alive: false,
            stopped: false,
            app: App::default(),
            generation: 0,
            view: 0,
            inbox: VecDeque::new(),
            skew_ppm: i64::try_from(below(&mut rng, 40_000)).expect("small") - 20_000,
            offset: 1_000_000 + below(&mut rng, 1 << 40),
            registry_off: false,
            checkpoint_bytes: None,
            parts: BTreeMap::new(),
            connections: vec![(Connection::default(), Instant::from_micros(0)); count],
            timer_at: u64::MAX,
        });
        let nodes: Vec<Node> = nodes.collect();
        let mut w = Self {
            options,
            rng,
            now: 0,
            seq: 0,
            queue: BTreeMap::new(),
            nodes,
            network: Network::default(),
            registry: Registry::default(),
            invariants: invariants::all(),
            failure: None,
            fingerprint: 0,
            steps: 0,
            views: 0,
            events: 0,
            stable_since_heal: false,
            healed: false,
            spoke_at: 0,
            longest_silence_us: 0,
            forget: |_| {},
        };
        let plan = w.options.draw(&mut w.rng, count);
        for (at, trouble) in plan {
            w.at(at, Happening::Trouble(trouble));
        }
        for node in 0..count {
            let at = below(&mut w.rng, 20_000);
            w.at(at, Happening::Trouble(Trouble::Restart(node)));
            w.at(at, Happening::Progress { node });
        }
        w.at(1000, Happening::Load);
        w.at(w.options.healed_at(), Happening::Heal);
        w
    }

    fn at(&mut self, at: u64, what: Happening) {
        self.seq += 1;
        self.queue.insert((at.max(self.now), self.seq), what);
    }

    pub(super) fn after(&mut self, us: u64, what: Happening) {
        self.at(self.now + us, what);
    }

    fn fail(&mut self, invariant: &str, what: String) {
        self.log(|| format!("VIOLATED {invariant}: {what}"));
        self.failure.get_or_insert((invariant.to_owned(), what));
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        let line = line();
        self.fingerprint = app::mix(self.fingerprint ^ app::digest(line.as_bytes()) ^ self.now);
        if self.options.trace {
            println!("{:>10} {line}", self.now);
        }
    }

    // ---- clocks ------------------------------------------------------------------------------------------------

    pub(super) fn local(&self, node: usize, at: u64) -> Instant {
        let n = &self.nodes[node];
        let at = i128::from(at);
        let skewed = at + at * i128::from(n.skew_ppm) / 1_000_000 + i128::from(n.offset);
        Instant::from_micros(u64::try_from(skewed).expect("after the origin"))
    }

    fn global(&self, node: usize, local: Instant) -> u64 {
        let n = &self.nodes[node];
        let since = i128::from(local.micros()) - i128::from(n.offset);
        let at = since * 1_000_000 / (1_000_000 + i128::from(n.skew_ppm)) + 1;
        u64::try_from(at.max(0)).expect("not negative")
    }

    // ---- what happens ------------------------------------------------------------------------------------------

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Timer { node, epoch } => {
                let n = &mut self.nodes[node];
                if n.epoch == epoch && n.timer_at <= self.now {
                    n.timer_at = u64::MAX;
                    self.call(node, |core, now| core.handle_timeout(now));
                }
            }
            Happening::Arrives { node, life, what } => {
                let n = &mut self.nodes[node];
                if !n.alive || n.life != life {
                    return;
                }
                if n.stopped {
                    if n.inbox.len() < INBOX_MAX || !matches!(what, Incoming::Datagram { .. }) {
                        n.inbox.push_back(what);
                    }
                    return;
                }
                self.arrives(node, what);
            }
            Happening::Registry {
                node,
                epoch,
                request,
                answer_after,
            } => {
                let reply = self.registry.apply(&request);
                self.log(|| format!("registry: r{} {request:?} -> {}", node + 1, brief(&reply)));
                if let Some(us) = answer_after {
                    self.answer(node, epoch, us, reply);
                }
            }
            Happening::Dial { from, to, attempt } => self.dial(from, to, attempt),
            Happening::Challenge { from, to, attempt } => self.challenge(from, to, attempt),
            Happening::Ends {
                at,
                peer,
                incarnation,
                attempt,
            } => {
                if self.nodes[at].connections[peer].0.attempt != attempt {
                    return;
                }
                if !self.network.both_ways(at, peer) {
                    self.after(
                        100_000,
                        Happening::Ends {
                            at,
                            peer,
                            incarnation,
                            attempt,
                        },
                    );
                    return;
                }
                self.nodes[at].connections[peer].0.up = None;
                let end = self.local(at, self.now);
                self.tell(at, peer, 0, ControlEvent::Ended { at: end });
                self.redial(at, peer, 1);
            }
            Happening::Ready { node, epoch } => {
                if self.nodes[node].stopped {
                    self.after(10_000, Happening::Ready { node, epoch });
                } else if self.nodes[node].epoch == epoch {
                    self.call(node, |core, now| {
                        // It may have been excluded in the meantime.
                        let _ = core.handle_command(now, Command::ReadyToBeFull);
                    });
                }
            }
            Happening::Respawn { node, life } => {
                if self.nodes[node].stopped {
                    self.after(10_000, Happening::Respawn { node, life });
                } else if self.nodes[node].alive && self.nodes[node].life == life {
                    self.new_core(node);
                }
            }
            Happening::Resume { node, life } => {
                if self.nodes[node].life == life {
                    self.resume(node);
                }
            }
            Happening::Kill { node, life } => {
                if self.nodes[node].life == life {
                    self.crash(node);
                    let us = 2000 + below(&mut self.rng, 600_000);
                    self.after(us, Happening::Trouble(Trouble::Restart(node)));
                }
            }
            Happening::Progress { node } => self.progress(node),
            Happening::Load => self.load(),
            Happening::Trouble(trouble) => {
                if !self.healed {
                    self.trouble(trouble);
                }
            }
            Happening::Heal => self.heal(),
            Happening::Check => self.after(10_000, Happening::Check),
        }
    }

    pub(super) fn arrives(&mut self, node: usize, what: Incoming) {
        match what {
            Incoming::Datagram { from, body } => {
                self.call(node, |core, now| core.handle_datagram(now, &from, &body));
            }
            Incoming::Control { peer, event } => {
                let name = self.nodes[peer].name.clone();
                self.log(|| format!("r{} hears of {name}: {event:?}", node + 1));
                self.call(node, |core, now| core.handle_control(now, &name, event));
            }
            Incoming::Registry { epoch, reply } => {
                if self.nodes[node].epoch == epoch {
                    self.call(node, |core, now| core.handle_registry(now, reply.clone()));
                }
            }
        }
    }

    pub(super) fn call(&mut self, node: usize, f: impl Fn(&mut Core, Instant)) {
        if !self.nodes[node].alive || self.nodes[node].stopped {
            return;
        }
        let now = self.local(node, self.now);
        let Some(core) = self.nodes[node].core.take() else {
            return;
        };
        let uncut = self.nodes[node].uncut.take();
        let mut pair = Pair::new(core, uncut, now, self.forget);
        pair.give(|core| f(core, now));
        while let Some(output) = pair.poll_output() {
            if let Some(command) = self.execute(node, &pair.core, output) {
                pair.give(|core| {
                    let taken = core.handle_command(now, command.clone());
                    // Of a part the joiner may be gone.
                    let part = matches!(command, Command::CheckpointPart { .. });
                    assert!(taken.is_ok() || part, "the checkpoint was asked for");
                });
            }
        }
        if let Some(what) = pair.difference() {
            self.fail("twin", what);
        }
        let core = pair.core;
        self.nodes[node].uncut = pair.uncut;
        let epoch = self.nodes[node].epoch;
        if let Some(t) = core.poll_timeout() {
            let late = below(&mut self.rng, 200);
            let at = self.global(node, t).max(self.now + 1) + late;
            if at < self.nodes[node].timer_at {
                self.nodes[node].timer_at = at;
                self.at(at, Happening::Timer { node, epoch });
            }
        }
        self.nodes[node].core = Some(core);
    }

    /// Gives the command that answers the output, if one does.
    fn execute(&mut self, node: usize, core: &Core, output: Output) -> Option<Command> {
        let me = core.me().clone();
        match output {
            Output::Send { to, bodies } => {
                for body in bodies {
                    self.observe(&me, &Observed::Sent { body: &body });
                    for member in to.iter() {
                        self.transmit(node, &me, member, &body);
                    }
                }
            }
            Output::Deliver { number, payload } => {
                self.log(|| format!("{me} is given {number}"));
                self.observe(&me, &Observed::Delivered { number });
                self.nodes[node].app.apply(number, &payload);
            }
            Output::Stable { number } => {
                let n = &self.nodes[node];
                let (generation, view) = (n.generation, n.view);
                if let Some(chain) = n.app.at(number) {
                    let what = Observed::Stable {
                        generation,
                        view,
                        number,
                        chain,
                    };
                    self.observe(&me, &what);
                }
                self.stable_since_heal |= self.healed && core.can_multicast();
            }
            Output::Wedged => {
                self.log(|| format!("{me} wedged"));
                self.observe(&me, &Observed::Wedged);
            }
            Output::Install(installed) => self.installed(node, core, &installed),
            Output::Outside => {
                self.log(|| format!("{me} is outside"));
                let life = self.nodes[node].life;
                let us = 1000 + below(&mut self.rng, 5000);
                self.after(us, Happening::Respawn { node, life });
            }
            Output::Instance(_) => {}
            Output::CheckpointWanted { joiner, .. } => {
                let filler = usize::try_from(below(&mut self.rng, 100_000)).expect("small");
                let filler = if chance(&mut self.rng, 500) {
                    0
                } else {
                    filler
                };
                let app = &self.nodes[node].app;
                let (applied, chain) = (app.applied, app.now());
                let segments = app.checkpoint(filler);
                self.observe(
                    &me,
                    &Observed::Gave {
                        joiner: &joiner,
                        applied,
                        chain,
                    },
                );
                if filler.is_multiple_of(2) {
                    return Some(Command::Checkpoint { joiner, segments });
                }
                // The other half in parts, as they are asked for.
                let total = segments.iter().map(|s| s.len() as u64).sum();
                let parts = &mut self.nodes[node].parts;
                parts.insert(joiner.clone(), segments.into());
                return Some(Command::CheckpointBegin { joiner, total });
            }
            Output::CheckpointPartWanted { joiner, .. } => {
                let parts = self.nodes[node].parts.get_mut(&joiner);
                let bytes = parts.and_then(VecDeque::pop_front);
                let bytes = bytes.expect("no more is asked for than there is");
                return Some(Command::CheckpointPart { joiner, bytes });
            }
            Output::CheckpointChunk {
                offset,
                total,
                bytes,
            } => {
                if offset == 0 {
                    self.nodes[node].checkpoint_bytes = Some(total);
                }
                if let Err(what) = self.nodes[node].app.take_piece(offset, &bytes) {
                    self.fail("joiner state", what);
                }
            }
            Output::CheckpointDone => {
                let n = &mut self.nodes[node];
                let total = n.checkpoint_bytes.take();
                if let Err(what) = n.app.restore(total) {
                    self.fail("joiner state", what);
                    return None;
                }
                let (applied, chain) = (n.app.applied, n.app.now());
                let epoch = n.epoch;
                self.log(|| format!("{me} restored {applied}"));
                self.observe(&me, &Observed::Restored { applied, chain });
                let us = below(&mut self.rng, 20_000);
                self.after(us, Happening::Ready { node, epoch });
            }
            Output::Unicast { .. } => {}
            Output::Notice(n) => self.log(|| format!("{me}: {n:?}")),
            request @ (Output::ReadView
            | Output::CompareAndSet { .. }
            | Output::ReadLease
            | Output::RenewLease { .. }) => self.ask_registry(node, &request),
        }
        None
    }

    pub(super) fn observe(&mut self, who: &MemberId, what: &Observed<'_>) {
        let mut failure = None;
        for i in &mut self.invariants {
            if let Err(what) = i.observe(who, what) {
                failure = Some((i.name(), what));
                break;
            }
        }
        if let Some((name, what)) = failure {
            self.fail(name, what);
        }
    }

    fn installed(&mut self, node: usize, core: &Core, installed: &crate::Installed) {
        let me = core.me().clone();
        let view = &installed.view;
        self.views += 1;
        self.log(|| {
            format!(
                "{me} installs {} as {:?}: full {:?} joining {:?} k {} cut {}",
                view.id,
                installed.role,
                view.full,
                view.joining.iter().map(|j| &j.member).collect::<Vec<_>>(),
                view.k,
                view.cut
            )
        });
        let n = &mut self.nodes[node];
        n.generation = view.generation;
        n.view = view.id.0;
        if installed.role != Role::Joining && !installed.survivor {
            n.app.start_at(installed.cut, u64::from(view.generation));
        }
        let app = std::mem::take(&mut n.app);
        self.observe(
            &me,
            &Observed::Installed {
                generation: view.generation,
                view: view.id.0,
                cut: installed.cut,
                role: installed.role,
                survivor: installed.survivor,
                full: &view.full,
                applied: app.applied,
                chain: app.now(),
                chain_at: &|number| app.at(number),
            },
        );
        self.nodes[node].app = app;
    }

    fn transmit(&mut self, node: usize, me: &MemberId, to: &MemberId, body: &Bytes) {
        let Some(target) = self.nodes.iter().position(|n| *n.name == *to.name) else {
            return;
        };
        for us in self.network.delays(&mut self.rng, node, target) {
            let life = self.nodes[target].life;
            let what = Incoming::Datagram {
                from: me.clone(),
                body: body.clone(),
            };
            self.after(
                us,
                Happening::Arrives {
                    node: target,
                    life,
                    what,
                },
            );
        }
    }

    fn ask_registry(&mut self, node: usize, request: &Output) {
        let request = Request::of(request).expect("a request");
        let epoch = self.nodes[node].epoch;
        let there = 200 + below(&mut self.rng, 3000);
        let back = 200 + below(&mut self.rng, 3000);
        let fate = if self.nodes[node].registry_off {
            3
        } else {
            below(&mut self.rng, 60)
        };
        match fate {
            // Lost on the way; or applied, and the answer lost; or late, long after it was given up.
            0 | 3 => {
                let reply = request.unknown();
                self.answer(node, epoch, REGISTRY_GIVES_UP, reply);
            }
            1 => {
                let reply = request.unknown();
                let what = Happening::Registry {
                    node,
                    epoch,
                    request,
                    answer_after: None,
                };
                self.after(there, what);
                self.answer(node, epoch, REGISTRY_GIVES_UP, reply);
            }
            2 => {
                let reply = request.unknown();
                let late = below(&mut self.rng, 300_000);
                let what = Happening::Registry {
                    node,
                    epoch,
                    request,
                    answer_after: None,
                };
                self.after(late, what);
                self.answer(node, epoch, 20_000, reply);
            }
            _ => {
                let answer_after = Some(back);
                self.after(
                    there,
                    Happening::Registry {
                        node,
                        epoch,
                        request,
                        answer_after,
                    },
                );
            }
        }
    }

    fn answer(&mut self, node: usize, epoch: u64, us: u64, reply: RegistryReply) {
        let life = self.nodes[node].life;
        let what = Incoming::Registry { epoch, reply };
        self.after(us, Happening::Arrives { node, life, what });
    }
}

fn brief(reply: &RegistryReply) -> String {
    use crate::output::{CasResult, ReadResult};
    match reply {
        RegistryReply::View(r) | RegistryReply::Lease(r) => match r {
            ReadResult::Value { version, .. } => format!("version {version}"),
            ReadResult::Absent => "absent".into(),
            ReadResult::Unknown => "unknown".into(),
        },
        RegistryReply::Cas(r) | RegistryReply::Renew(r) => match r {
            CasResult::Written { version } => format!("written {version}"),
            CasResult::BadVersion => "bad version".into(),
            CasResult::Unknown => "unknown".into(),
        },
    }
}
