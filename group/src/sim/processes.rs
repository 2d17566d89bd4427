//! Processes and the control connections between them: started, stopped, killed, found dead.

use super::app::App;
use super::control::Connection;
use super::network::{below, chance};
use super::plan::Trouble;
use super::world::{Happening, Incoming, Node, World};
use crate::config::Config;
use crate::core::Core;
use crate::output::{Command, ControlEvent};
use crate::view::MemberId;
use std::time::Duration;

const CHALLENGE_AGAIN: u64 = 500_000;

impl World {
    // ---- control connections -----------------------------------------------------------------------------------

    pub(super) fn tell(&mut self, at: usize, peer: usize, us: u64, event: ControlEvent) {
        let life = self.nodes[at].life;
        let what = Incoming::Control { peer, event };
        self.after(
            us,
            Happening::Arrives {
                node: at,
                life,
                what,
            },
        );
    }

    pub(super) fn redial(&mut self, from: usize, to: usize, us: u64) {
        let c = &mut self.nodes[from].connections[to].0;
        c.attempt += 1;
        let attempt = c.attempt;
        self.after(us, Happening::Dial { from, to, attempt });
    }

    pub(super) fn dial(&mut self, from: usize, to: usize, attempt: u64) {
        let n = &self.nodes[from];
        if !n.alive || n.connections[to].0.attempt != attempt {
            return;
        }
        if n.stopped || !self.network.both_ways(from, to) {
            return self.redial(from, to, 50_000);
        }
        let since = self.local(from, self.now);
        let t = &self.nodes[to];
        if !t.alive {
            self.tell(from, to, 100, ControlEvent::Refused { since });
            return self.redial(from, to, 20_000);
        }
        let Some(core) = t.core.as_ref().filter(|_| !t.stopped) else {
            return self.redial(from, to, 50_000);
        };
        let incarnation = core.me().incarnation;
        self.nodes[from].connections[to] = (
            Connection {
                up: Some(incarnation),
                attempt,
            },
            since,
        );
        self.after(CHALLENGE_AGAIN, Happening::Challenge { from, to, attempt });
        let us = 100 + below(&mut self.rng, 300);
        self.tell(from, to, us, ControlEvent::Connected { incarnation, since });
    }

    /// A connection that is up is asked again now and then who is there, so that evidence is never older than a view.
    pub(super) fn challenge(&mut self, from: usize, to: usize, attempt: u64) {
        let c = self.nodes[from].connections[to].0;
        if !self.nodes[from].alive || c.attempt != attempt {
            return;
        }
        self.after(CHALLENGE_AGAIN, Happening::Challenge { from, to, attempt });
        let t = &self.nodes[to];
        let there = t
            .core
            .as_ref()
            .filter(|_| t.alive && !t.stopped)
            .map(|c| c.me().incarnation);
        let asks = !self.nodes[from].stopped && self.network.both_ways(from, to);
        if let (Some(incarnation), true) = (there.filter(|i| c.up == Some(*i)), asks) {
            let since = self.local(from, self.now);
            self.nodes[from].connections[to].1 = since;
            self.tell(
                from,
                to,
                200,
                ControlEvent::Connected { incarnation, since },
            );
        }
    }

    /// The incarnation of `node` is over: its connections end at the other ends.
    pub(super) fn hang_up(&mut self, node: usize) {
        let Some(core) = &self.nodes[node].core else {
            return;
        };
        let mine = core.me().incarnation;
        for at in 0..self.nodes.len() {
            let c = self.nodes[at].connections[node].0;
            if at != node && self.nodes[at].alive && c.up == Some(mine) {
                let us = 50 + below(&mut self.rng, 100);
                let us = if self.network.both_ways(at, node) {
                    us
                } else {
                    1_000_000
                };
                let attempt = c.attempt;
                self.after(
                    us,
                    Happening::Ends {
                        at,
                        peer: node,
                        incarnation: mine,
                        attempt,
                    },
                );
            }
        }
    }

    // ---- processes ---------------------------------------------------------------------------------------------

    pub(super) fn new_core(&mut self, node: usize) {
        self.hang_up(node);
        let incarnation = self.rng.next_u128();
        let members = self.nodes.iter().map(|n| n.name.clone()).collect();
        let me = MemberId::new(self.nodes[node].name.clone(), incarnation);
        let mut config = Config::new(1, me.clone(), members, self.rng.next_u128());
        config.total_failure_after = Duration::from_millis(400);
        config.lease_alone = Duration::from_millis(100);
        config.limits.flight_bytes_max = 64 << 10;
        #[cfg(any(test, feature = "faults"))]
        {
            config.fault = self.options.fault.or(config.fault);
        }
        let now = self.local(node, self.now);
        let seed = self.rng.next_u64();
        let twins = self.options.twins;
        let uncut = twins.then(|| Core::new(config.clone(), seed, now));
        let core = Core::new(config, seed, now);
        let n = &mut self.nodes[node];
        n.uncut = uncut;
        n.core = Some(core);
        n.epoch += 1;
        n.app = App::default();
        n.view = 0;
        n.timer_at = u64::MAX;
        self.log(|| format!("{me} begins"));
        for peer in 0..self.nodes.len() {
            let (c, since) = self.nodes[node].connections[peer];
            if let Some(incarnation) = c.up {
                self.tell(
                    node,
                    peer,
                    0,
                    ControlEvent::Connected { incarnation, since },
                );
            }
        }
        self.call(node, |core, now| {
            core.handle_command(now, Command::Join)
                .expect("a new core joins once");
        });
    }

    pub(super) fn crash(&mut self, node: usize) {
        if !self.nodes[node].alive {
            return;
        }
        self.log(|| format!("r{} crashes", node + 1));
        self.hang_up(node);
        let n = &mut self.nodes[node];
        n.alive = false;
        n.stopped = false;
        n.core = None;
        n.uncut = None;
        n.life += 1;
        n.epoch += 1;
        n.inbox.clear();
        for c in &mut n.connections {
            c.0.up = None;
            c.0.attempt += 1;
        }
    }

    pub(super) fn start(&mut self, node: usize) {
        if self.nodes[node].alive {
            return;
        }
        let n = &mut self.nodes[node];
        n.alive = true;
        n.life += 1;
        for peer in (0..self.nodes.len()).filter(|p| *p != node) {
            self.redial(node, peer, 10);
        }
        self.new_core(node);
    }

    pub(super) fn stop(&mut self, node: usize, us: u64) {
        let n = &mut self.nodes[node];
        if n.alive && !n.stopped {
            n.stopped = true;
            let life = n.life;
            self.log(|| format!("r{} is stopped for {us} us", node + 1));
            self.after(us, Happening::Resume { node, life });
        }
    }

    pub(super) fn resume(&mut self, node: usize) {
        if !self.nodes[node].stopped {
            return;
        }
        self.log(|| format!("r{} goes on", node + 1));
        self.nodes[node].stopped = false;
        // Sockets are drained before timers are judged.
        while let Some(what) = self.nodes[node].inbox.pop_front() {
            self.arrives(node, what);
        }
        self.nodes[node].timer_at = u64::MAX;
        self.call(node, |core, now| core.handle_timeout(now));
    }

    pub(super) fn leader(&self) -> Option<usize> {
        let leads = |n: &Node| n.core.as_ref().is_some_and(Core::can_multicast);
        self.nodes
            .iter()
            .position(|n| n.alive && !n.stopped && leads(n))
    }

    pub(super) fn trouble(&mut self, trouble: Trouble) {
        self.log(|| format!("trouble: {trouble:?}"));
        match trouble {
            Trouble::Crash(n) => self.crash(n),
            Trouble::Restart(n) => self.start(n),
            Trouble::Pause(n, us) => self.stop(n, us),
            Trouble::Cut(ways) => ways.into_iter().for_each(|(a, b)| self.network.cut(a, b)),
            Trouble::Heal => {
                self.network.heal();
                self.network.loss = self.network.loss.min(300);
            }
            Trouble::Noise {
                loss,
                duplicates,
                reorder,
            } => {
                self.network.loss = loss;
                self.network.duplicates = duplicates;
                self.network.reorder = reorder;
            }
            Trouble::RegistryOff(n) => self.nodes[n].registry_off = true,
            Trouble::RegistryOn => self.nodes.iter_mut().for_each(|n| n.registry_off = false),
            Trouble::HandOver => {
                if let Some(n) = self.leader() {
                    self.call(n, |core, now| {
                        let _ = core.handle_command(now, Command::HandOver { to: None });
                    });
                }
            }
            Trouble::Leave(n) => self.call(n, |core, now| {
                let _ = core.handle_command(now, Command::Leave);
            }),
            Trouble::CrashLeader => {
                if let Some(n) = self.leader() {
                    self.crash(n);
                    let us = 2000 + below(&mut self.rng, 400_000);
                    self.after(us, Happening::Trouble(Trouble::Restart(n)));
                }
            }
            Trouble::PauseLeader(us) => {
                if let Some(n) = self.leader() {
                    self.stop(n, us);
                }
            }
            Trouble::CutLeader => {
                if let Some(n) = self.leader() {
                    self.isolate(n);
                }
            }
            Trouble::ResetLeader { cut } => {
                if let Some(n) = self.leader() {
                    for at in (0..self.nodes.len()).filter(|o| *o != n) {
                        if self.nodes[at].connections[n].0.up.take().is_some() {
                            let end = self.local(at, self.now);
                            self.tell(at, n, 50, ControlEvent::Ended { at: end });
                            self.redial(at, n, 100);
                        }
                    }
                    if cut {
                        self.isolate(n);
                    }
                }
            }
            Trouble::CrashLeaderAndCut => {
                if let Some(n) = self.leader() {
                    for a in 0..self.nodes.len() {
                        for b in 0..a {
                            if chance(&mut self.rng, 350) {
                                self.network.cut(a, b);
                                self.network.cut(b, a);
                            }
                        }
                    }
                    // What it sent last may have reached some and not others.
                    self.network.loss = self.network.loss.max(below(&mut self.rng, 600));
                    let life = self.nodes[n].life;
                    let us = below(&mut self.rng, 10_000);
                    self.after(us, Happening::Kill { node: n, life });
                }
            }
        }
    }

    pub(super) fn isolate(&mut self, node: usize) {
        for other in (0..self.nodes.len()).filter(|o| *o != node) {
            self.network.cut(node, other);
            self.network.cut(other, node);
        }
    }

    pub(super) fn heal(&mut self) {
        self.log(|| "all is healed".into());
        self.healed = true;
        self.network.heal();
        self.network.loss = 0;
        for node in 0..self.nodes.len() {
            self.nodes[node].registry_off = false;
            self.resume(node);
            self.start(node);
        }
        self.after(10_000, Happening::Check);
    }
}
