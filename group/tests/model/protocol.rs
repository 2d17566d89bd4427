//! The steps of the protocol.

use crate::state::{Life, N, NONE, Net, Node, Set, State, View};

/// A defect planted in the model.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Defect {
    /// The new view is written without waiting for the old lease.
    SkipLeaseWait,
    /// The cut is the proposer's own highest event; nothing is fetched or copied.
    CutIsOwnHighest,
    /// A dead member's promise counts although the cut does not cover what it held.
    UncoveredPromise,
    /// A wedged member goes on acknowledging events and answering heartbeats.
    AckAfterWedge,
    /// `n - k - 1` promises are enough.
    QuorumTooSmall,
    /// An event counts as stable with one holder too few.
    StableTooEarly,
    /// The usurper of a lone leader speaks at once.
    SkipSecondWait,
    /// A dead founder of a generation is succeeded at once, although it may not have waited its second wait.
    TrustFounder,
    /// A usurper writes the next view before its second wait is over.
    WriteWhileSilent,
    /// The successor is written without comparing the version.
    BlindWrite,
}

/// What the network may do.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    /// Every message may be lost, or late by any time, at any time: covers any number of partitions.
    Asynchronous,
    /// Works, but for one partition that cuts off one node, and may heal.
    OnePartition,
}

#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) network: Network,
    /// `Resilience::All` instead of `Majority`.
    pub(crate) all: bool,
    pub(crate) crashes: u8,
    /// Crashed and excluded nodes come back and join.
    pub(crate) joins: bool,
    /// Events beyond the oldest cut that matters.
    pub(crate) events: u8,
    /// Members that can do nothing any more are taken to be out.
    pub(crate) reduced: bool,
    pub(crate) defect: Option<Defect>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The leader multicasts its next event.
    Multicast(usize),
    /// A member receives, delivers and acknowledges the next event.
    Receive(usize),
    /// A member answers its leader's heartbeat.
    Answer(usize),
    /// An answer, or the lone leader's write, grows older than the lease.
    Expire {
        leader: usize,
        from: usize,
    },
    /// A lone leader renews its lease at the coordinator.
    Renew(usize),
    /// A member promises to leave its view, and proposes.
    Wedge(usize),
    /// A member's promise reaches the proposer.
    Promise {
        from: usize,
        to: usize,
    },
    /// One event goes from one wedged member to another.
    Copy {
        from: usize,
        to: usize,
    },
    /// The successor is written.
    Write {
        by: usize,
        next: View,
    },
    /// A node learns of a view, and installs it or is out.
    Learn {
        node: usize,
        view: usize,
    },
    /// A member that can never go on begins anew.
    GiveUp(usize),
    /// A new generation.
    Found {
        by: usize,
        wait_again: bool,
    },
    Crash(usize),
    Restart(usize),
    CutOff(usize),
    Heal,
}

fn small(i: usize) -> u8 {
    u8::try_from(i).expect("a node, or a place in the window")
}

impl Protocol {
    pub(crate) fn has(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    /// `Resilience::k`.
    fn k(&self, full: usize) -> u8 {
        let k = if self.all { full - 1 } else { full / 2 };
        small(k.min(full - 1))
    }

    pub(crate) fn first(&self) -> State {
        State::first(self.k(N))
    }

    fn connected(s: &State, a: usize, b: usize) -> bool {
        match s.net {
            Net::CutOff(i) => usize::from(i) != a && usize::from(i) != b,
            Net::Whole | Net::Healed => true,
        }
    }

    fn reaches_registry(s: &State, i: usize) -> bool {
        !matches!(s.net, Net::CutOff(c) if usize::from(c) == i)
    }

    /// Whether the leader of the view that `b` has installed can still count an acknowledgement.
    fn leader_listens(s: &State, b: usize) -> bool {
        let leader = s.view_of(b).leader();
        let l = &s.nodes[leader];
        s.leads(leader) && l.view == s.nodes[b].view && !l.wedged
    }

    // ---- which steps are possible ------------------------------------------------------------------------------

    pub(crate) fn steps(&self, s: &State, out: &mut Vec<Step>) {
        for i in 0..N {
            let n = &s.nodes[i];
            if n.inside() {
                self.steps_in_view(s, i, out);
                if s.crashes < self.crashes {
                    out.push(Step::Crash(i));
                }
            } else if n.up() {
                self.steps_outside(s, i, out);
            } else {
                out.push(Step::Restart(i));
            }
        }
        if self.network == Network::OnePartition {
            match s.net {
                Net::Whole => out.extend((0..N).map(Step::CutOff)),
                Net::CutOff(_) => out.push(Step::Heal),
                Net::Healed => {}
            }
        }
    }

    fn steps_in_view(&self, s: &State, i: usize, out: &mut Vec<Step>) {
        let n = &s.nodes[i];
        let newest = n.place() == s.newest();
        for from in n.credit.or(n.stray).iter() {
            out.push(Step::Expire { leader: i, from });
        }
        if s.leads(i) && !n.wedged {
            self.steps_of_leader(s, i, out);
        } else if !s.leads(i) && !n.joining {
            self.steps_of_backup(s, i, out);
        }
        if newest && !n.wedged && !n.joining {
            out.push(Step::Wedge(i));
        }
        let proposes = n.wedged && !n.joining;
        if newest && proposes {
            for m in (0..N).filter(|m| *m != i) {
                self.steps_of_pair(s, i, m, out);
            }
        }
        if proposes && (newest || self.has(Defect::BlindWrite)) {
            self.writes(s, i, out);
        }
        if Self::reaches_registry(s, i) && !newest {
            // A joiner hears of the newest: it takes part in nothing, and any other would change nothing.
            let first = if n.joining && !n.wedged {
                s.newest()
            } else {
                n.place() + 1
            };
            out.extend((first..=s.newest()).map(|view| Step::Learn { node: i, view }));
        }
        if n.joining || Self::all_is_lost(s, i) {
            out.push(Step::GiveUp(i));
        }
    }

    fn steps_of_leader(&self, s: &State, i: usize, out: &mut Vec<Step>) {
        let n = &s.nodes[i];
        let v = s.view_of(i);
        // In a view that was left, one event beyond the cut is as bad as many.
        let most = match s.views[..=s.newest()].get(n.place() + 1) {
            Some(next) if v.k == 0 || next.fresh => 0,
            Some(next) => self.events.min(next.cut + 1),
            None => self.events,
        };
        if n.held < most {
            out.push(Step::Multicast(i));
        }
        let newest = n.place() == s.newest();
        if v.k == 0 && newest && !n.credit.has(i) && Self::reaches_registry(s, i) {
            out.push(Step::Renew(i));
        }
    }

    fn steps_of_backup(&self, s: &State, b: usize, out: &mut Vec<Step>) {
        let n = &s.nodes[b];
        let v = s.view_of(b);
        let leader = v.leader();
        let l = &s.nodes[leader];
        let listens = Self::leader_listens(s, b);
        let may = !n.wedged || (self.has(Defect::AckAfterWedge) && listens);
        if !may || !Self::connected(s, b, leader) {
            return;
        }
        if n.held < v.issued && (listens || n.place() == s.newest()) {
            out.push(Step::Receive(b));
        }
        if listens && v.k > 0 && !l.credit.or(l.stray).has(b) {
            out.push(Step::Answer(b));
        }
    }

    /// What passes between a proposer and another member of the newest view.
    fn steps_of_pair(&self, s: &State, i: usize, m: usize, out: &mut Vec<Step>) {
        let (n, other) = (&s.nodes[i], &s.nodes[m]);
        if other.view != n.view || !Self::connected(s, i, m) {
            return;
        }
        let asks = !other.joining || s.leads(i);
        let held = if other.joining { n.held } else { other.held };
        if other.up() && asks && (!other.wedged || n.acks[m] != held + 1) {
            out.push(Step::Promise { from: m, to: i });
        }
        // To `i`, which lives; what a dead member had sent may still be on its way. A leader holds all of its events.
        let takes = !s.leads(i) && !other.joining && other.wedged && other.held > n.held;
        if takes && !self.has(Defect::CutIsOwnHighest) {
            out.push(Step::Copy { from: m, to: i });
        }
    }

    fn steps_outside(&self, s: &State, i: usize, out: &mut Vec<Step>) {
        if !Self::reaches_registry(s, i) {
            return;
        }
        if s.latest().joining.has(i) {
            let view = s.newest();
            out.push(Step::Learn { node: i, view });
        }
        if let Some(wait_again) = self.lost(s) {
            out.push(Step::Found { by: i, wait_again });
        }
    }

    /// `Proofs::dead`, `Core::proved_gone`: of the incarnation that is a member of the newest view. It can be proved as
    /// soon as it is true.
    fn dead(s: &State, m: usize) -> bool {
        !s.nodes[m].inside()
    }

    /// `Core::lost`: can nobody of the newest view go on? And whether the lease is waited for a second time.
    fn lost(&self, s: &State) -> Option<bool> {
        let v = s.latest();
        let leader = v.leader();
        let backups = v.full.without(leader);
        let gone: Set = backups.iter().filter(|m| Self::dead(s, *m)).collect();
        let leader_gone = Self::dead(s, leader);
        if leader_gone && gone == backups {
            return Some(v.fresh && !self.has(Defect::TrustFounder));
        }
        let none_qualifies = if leader_gone {
            gone.len() >= usize::from(v.k)
        } else if backups.is_empty() {
            true
        } else {
            // Waited for: what the dead had answered is older than the lease.
            let l = &s.nodes[leader];
            let leased = l.place() == s.newest() && !l.credit.and(gone).is_empty();
            gone.len() >= v.quorum() && !leased
        };
        none_qualifies.then_some(!self.has(Defect::SkipSecondWait))
    }

    /// `Core::all_is_lost`.
    fn all_is_lost(s: &State, i: usize) -> bool {
        let v = s.view_of(i);
        let gone = v.full.without(v.leader()).without(i).iter();
        let gone = gone.filter(|m| Self::dead(s, *m)).count();
        !s.leads(i) && Self::dead(s, v.leader()) && gone >= usize::from(v.k)
    }

    /// `Core::advance_flush`, `Core::old_lease_may_hold`, `Core::successor`: every view that `p` may write now.
    fn writes(&self, s: &State, p: usize, out: &mut Vec<Step>) {
        if !Self::reaches_registry(s, p) {
            return;
        }
        let n = &s.nodes[p];
        let v = s.view_of(p);
        let leader = v.leader();
        let promised: Set = (0..N).filter(|m| n.acks[*m] > 0).collect();
        let answered = promised.and(v.full).with(p);
        let over = answered.has(leader)
            || Self::dead(s, leader)
            || s.nodes[leader].view != n.view
            || s.nodes[leader].credit.and(answered).is_empty();
        let over = over && (n.silent.is_empty() || self.has(Defect::WriteWhileSilent));
        if !over && !self.has(Defect::SkipLeaseWait) {
            return;
        }
        let said = |m: usize| if m == p { n.held } else { n.acks[m] - 1 };
        for others in answered.without(p).subsets() {
            // Those that can still give what they hold: any that promised may have fallen silent, or died.
            let sources = others.with(p);
            let target = sources.iter().map(said).max().unwrap_or(0);
            let blind = self.has(Defect::CutIsOwnHighest);
            if !blind && sources.iter().any(|m| said(m) < target) {
                continue; // to be fetched, to be copied
            }
            let cut = if blind { n.held } else { target };
            let covered = |m: &usize| {
                let any = Self::dead(s, *m) && self.has(Defect::UncoveredPromise);
                said(*m) <= cut || *m == p || blind || any
            };
            let backups = answered.without(leader).iter().filter(covered).count();
            let quorum = v.quorum() - usize::from(self.has(Defect::QuorumTooSmall));
            let by_leader = answered.has(leader) && covered(&leader);
            if !(by_leader || backups >= quorum) {
                continue;
            }
            let joiners = promised.and(v.joining).iter();
            let caught_up = joiners.filter(|j| n.acks[*j] == cut + 1).collect();
            self.successors(s, p, (sources, caught_up, cut), out);
        }
    }

    fn successors(
        &self,
        s: &State,
        p: usize,
        (sources, caught_up, cut): (Set, Set, u8),
        out: &mut Vec<Step>,
    ) {
        let v = s.view_of(p);
        let old = v.leader();
        let mut put = |full: Set, joining: Set, leader: usize| {
            let next = View {
                full,
                joining,
                leader: small(leader),
                k: self.k(full.len()),
                cut,
                fresh: false,
                gap: false,
                issued: cut,
                stable: cut,
                delivered: [cut; N],
            };
            out.push(Step::Write { by: p, next });
        };
        if sources.has(old) {
            let (promoted, asking) = if p == old {
                let asks = |m: &usize| {
                    let n = &s.nodes[*m];
                    self.joins && n.up() && n.view == NONE && Self::connected(s, p, *m)
                };
                (caught_up, (0..N).filter(asks).collect())
            } else {
                (Set::default(), Set::default())
            };
            for promoted in promoted.subsets() {
                let full = sources.or(promoted);
                for asking in Set(asking.0 & !full.0).subsets() {
                    put(full, Set(v.joining.0 & !full.0).or(asking), old);
                }
            }
        }
        // The fittest leads, and who is fittest is anybody's guess; or the old leader hands over.
        if !sources.has(old) || (p == old && sources.len() > 1) {
            for leader in sources.without(old).iter() {
                put(sources, Set::default(), leader);
            }
        }
    }

    // ---- what they do ------------------------------------------------------------------------------------------

    pub(crate) fn apply(&self, s: &State, step: Step) -> State {
        let mut s = *s;
        match step {
            Step::Multicast(i) => {
                s.nodes[i].held += 1;
                let at = s.nodes[i].place();
                s.views[at].issued = s.nodes[i].held;
                self.count(&mut s, at);
            }
            Step::Receive(b) => self.receive(&mut s, b),
            Step::Answer(b) => {
                let leader = s.view_of(b).leader();
                let wedged = s.nodes[b].wedged;
                let l = &mut s.nodes[leader];
                if wedged {
                    s.broken.promise = true;
                    l.stray = l.stray.with(b);
                } else {
                    l.credit = l.credit.with(b);
                }
            }
            Step::Expire { leader, from } => {
                let l = &mut s.nodes[leader];
                l.credit = l.credit.without(from);
                l.stray = l.stray.without(from);
            }
            Step::Renew(i) => s.nodes[i].credit = Set::of(i),
            Step::Wedge(i) => s.nodes[i].wedged = true,
            Step::Promise { from, to } => {
                if s.nodes[from].joining {
                    s.nodes[from].held = s.nodes[to].held;
                }
                s.nodes[from].wedged = true;
                s.nodes[to].acks[from] = s.nodes[from].held + 1;
            }
            Step::Copy { from, to } => {
                s.nodes[to].held += 1;
                // Its promise is said again (`owed_wedge_ack`).
                let held = s.nodes[to].held;
                let known = &mut s.nodes[from].acks[to];
                if *known > 0 {
                    *known = held + 1;
                }
            }
            Step::Write { by, next } => Self::write(&mut s, by, next),
            Step::Learn { node, view } => Self::learn(&mut s, node, view),
            Step::GiveUp(i) | Step::Restart(i) => s.end(i, Node::OUTSIDE),
            Step::Found { by, wait_again } => Self::found(&mut s, by, wait_again),
            Step::Crash(i) => {
                s.crashes += 1;
                let dead = Node {
                    life: Life::Crashed,
                    ..s.nodes[i]
                };
                s.end(i, dead);
            }
            Step::CutOff(i) => s.net = Net::CutOff(small(i)),
            Step::Heal => s.net = Net::Healed,
        }
        // These defects give something to do to members that would have nothing to do.
        if !self.has(Defect::BlindWrite) && !self.has(Defect::AckAfterWedge) {
            s.tidy(self.reduced);
        }
        s
    }

    /// `Core::update_stable`.
    fn count(&self, s: &mut State, place: usize) {
        let v = &mut s.views[place];
        let k = v.k - u8::from(v.k > 0 && self.has(Defect::StableTooEarly));
        v.stable = v.stable.max(v.acknowledged(k));
        let stable = v.stable;
        if place < s.newest() {
            let next = &s.views[place + 1];
            s.broken.lost |= !next.fresh && stable > next.cut;
        }
    }

    fn receive(&self, s: &mut State, b: usize) {
        let n = &mut s.nodes[b];
        n.held += 1;
        let (at, held, wedged) = (n.place(), n.held, n.wedged);
        s.broken.promise |= wedged;
        s.views[at].delivered[b] = held;
        if Self::leader_listens(s, b) {
            self.count(s, at);
        }
    }

    /// What a member has given to its server: a wedged one delivers no copies, a leader delivers as it multicasts.
    fn delivered(s: &State, m: usize) -> u8 {
        if s.nodes[m].joining || s.leads(m) {
            s.nodes[m].held
        } else {
            s.view_of(m).delivered[m]
        }
    }

    fn write(s: &mut State, by: usize, next: View) {
        if s.nodes[by].place() < s.newest() {
            s.broken.fork = true;
            return;
        }
        s.broken.lost |= s.latest().stable > next.cut;
        for m in next.full.iter().filter(|m| s.nodes[*m].inside()) {
            let n = &s.nodes[m];
            let exact = n.held >= next.cut && Self::delivered(s, m) <= next.cut;
            s.broken.bad_member |= !exact || !n.wedged;
        }
        s.push(next);
        if next.k == 0 {
            s.nodes[by].credit = Set::of(by);
        }
    }

    fn found(s: &mut State, by: usize, wait_again: bool) {
        s.push(View {
            full: Set::of(by),
            leader: small(by),
            fresh: true,
            ..View::default()
        });
        s.end(by, Node::OUTSIDE);
        let lone = s.lone_leases();
        s.nodes[by] = Node {
            view: s.len - 1,
            credit: Set::of(by),
            silent: if wait_again { lone } else { Set::default() },
            ..Node::OUTSIDE
        };
    }

    /// `Core::on_view_inside`, `Core::on_view_outside`.
    fn learn(s: &mut State, i: usize, w: usize) {
        let n = s.nodes[i];
        let next = s.views[w];
        let member = Node {
            view: small(w),
            held: next.cut,
            ..Node::OUTSIDE
        };
        if next.joining.has(i) {
            s.nodes[i] = Node {
                joining: true,
                ..member
            };
            return;
        }
        let follows = n.view != NONE && w == n.place() + 1 && !next.fresh && !next.gap;
        let takes = follows && next.full.has(i) && n.wedged;
        if takes && n.held >= next.cut && Self::delivered(s, i) <= next.cut {
            s.nodes[i] = Node {
                // A lone leader's lease counts from the write of its view, not from when it hears the outcome.
                credit: n.credit.and(Set::of(i)),
                silent: n.silent,
                ..member
            };
        } else {
            s.end(i, Node::OUTSIDE);
        }
    }
}
