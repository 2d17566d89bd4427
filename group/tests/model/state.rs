//! What the model remembers: three nodes, the chain of views in the registry, and nothing that cannot matter any more.

use std::fmt;
use std::hash::{Hash, Hasher};

/// Nodes.
pub(crate) const N: usize = 3;
/// Views remembered at once: those that a living member has installed, each one's successor, and the newest. Three nodes
/// need no more, however far they are apart (whoever writes a view lives in the one before it, or founds).
pub(crate) const WINDOW: usize = 2 * N;
/// "In no view."
pub(crate) const NONE: u8 = u8::MAX;

/// A set of nodes.
#[derive(Copy, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Set(pub(crate) u8);

impl Set {
    pub(crate) const ALL: Self = Self((1 << N) - 1);

    pub(crate) fn of(i: usize) -> Self {
        Self(1 << i)
    }

    pub(crate) fn has(self, i: usize) -> bool {
        self.0 & (1 << i) != 0
    }

    pub(crate) fn with(self, i: usize) -> Self {
        Self(self.0 | 1 << i)
    }

    pub(crate) fn without(self, i: usize) -> Self {
        Self(self.0 & !(1 << i))
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..N).filter(move |i| self.has(*i))
    }

    /// Every subset, the empty one and this one included.
    pub(crate) fn subsets(self) -> impl Iterator<Item = Self> {
        (0..=self.0).filter(move |s| s & !self.0 == 0).map(Self)
    }

    fn renamed(self, names: &[u8; N]) -> Self {
        self.iter().map(|i| usize::from(names[i])).collect()
    }
}

impl FromIterator<usize> for Set {
    fn from_iter<I: IntoIterator<Item = usize>>(nodes: I) -> Self {
        nodes.into_iter().fold(Self::default(), Self::with)
    }
}

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// A view as the znode holds it, and what became of its events.
#[derive(Copy, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct View {
    pub(crate) full: Set,
    /// Living incarnations only: the entry of one that died has no effect.
    pub(crate) joining: Set,
    pub(crate) leader: u8,
    pub(crate) k: u8,
    pub(crate) cut: u8,
    /// Begins a generation.
    pub(crate) fresh: bool,
    /// Does not follow directly on the one before it in the window: what lay between is forgotten.
    pub(crate) gap: bool,
    /// The newest event that its leader gave out.
    pub(crate) issued: u8,
    /// The newest event that its leader knew to be stable: `k` backups had acknowledged it while it could still count.
    pub(crate) stable: u8,
    /// The newest event that each full member received before it wedged: delivered and acknowledged.
    pub(crate) delivered: [u8; N],
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            full,
            joining,
            leader,
            k,
            cut,
            ..
        } = self;
        write!(f, "{full:?} led by {leader}, k {k}, cut {cut}")?;
        if !joining.is_empty() {
            write!(f, ", joining {joining:?}")?;
        }
        Ok(())
    }
}

impl View {
    pub(crate) fn leader(&self) -> usize {
        usize::from(self.leader)
    }

    /// `View::quorum`.
    pub(crate) fn quorum(&self) -> usize {
        self.full.len() - usize::from(self.k)
    }

    /// The newest event that `k` backups have acknowledged.
    pub(crate) fn acknowledged(&self, k: u8) -> u8 {
        if k == 0 {
            return self.issued;
        }
        let backups = self.full.without(self.leader());
        let mut held: Vec<u8> = backups.iter().map(|m| self.delivered[m]).collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        held.get(usize::from(k) - 1).copied().unwrap_or(0)
    }
}

/// A process.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Life {
    Up,
    Crashed,
}

/// One node, with its present incarnation. `view == NONE`: outside (`Phase::Seeking`; `Gone` begins anew as that).
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) life: Life,
    /// Installed view, by its place in the window.
    pub(crate) view: u8,
    /// Joining member of that view.
    pub(crate) joining: bool,
    pub(crate) wedged: bool,
    pub(crate) held: u8,
    /// Promises that it knows: 0, or 1 + the newest event that the other said it holds. Its own is `wedged`, `held`.
    pub(crate) acks: [u8; N],
    /// As leader: whose answers, not older than the lease, it has. Its own bit: its last write to the coordinator, when that
    /// makes or keeps it a lone leader.
    pub(crate) credit: Set,
    /// Planted defect only: answers given after the promise, of which the proposer cannot know.
    pub(crate) stray: Set,
    /// A usurper waits once more (`silent_before`): lone leaders whose last write may be younger than their lease.
    pub(crate) silent: Set,
}

impl Node {
    pub(crate) const OUTSIDE: Self = Self {
        life: Life::Up,
        view: NONE,
        joining: false,
        wedged: false,
        held: 0,
        acks: [0; N],
        credit: Set(0),
        stray: Set(0),
        silent: Set(0),
    };

    pub(crate) fn up(&self) -> bool {
        self.life == Life::Up
    }

    /// Alive and member of a view.
    pub(crate) fn inside(&self) -> bool {
        self.up() && self.view != NONE
    }

    pub(crate) fn place(&self) -> usize {
        usize::from(self.view)
    }
}

/// What a step broke. Nothing in the sound protocol.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Broken {
    /// A stable event lies beyond the cut of a later view of its generation.
    pub(crate) lost: bool,
    /// A full member of a new view does not hold its cut, or has delivered more.
    pub(crate) bad_member: bool,
    /// A wedged member acknowledged an event or answered a heartbeat.
    pub(crate) promise: bool,
    /// Two views with one number.
    pub(crate) fork: bool,
}

/// The one partition that an explicit network may have.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Net {
    Whole,
    /// This node hears nobody and is heard by nobody, the coordinator included.
    CutOff(u8),
    Healed,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct State {
    pub(crate) nodes: [Node; N],
    pub(crate) views: [View; WINDOW],
    pub(crate) len: u8,
    pub(crate) crashes: u8,
    pub(crate) net: Net,
    pub(crate) broken: Broken,
}

impl State {
    /// One view of all three, led by node 0, nothing multicast yet.
    pub(crate) fn first(k: u8) -> Self {
        let member = Node {
            view: 0,
            ..Node::OUTSIDE
        };
        let mut views = [View::default(); WINDOW];
        views[0] = View {
            full: Set::ALL,
            k,
            ..View::default()
        };
        Self {
            nodes: [member; N],
            views,
            len: 1,
            crashes: 0,
            net: Net::Whole,
            broken: Broken::default(),
        }
    }

    /// The registry's next view.
    pub(crate) fn push(&mut self, view: View) {
        self.views[usize::from(self.len)] = view;
        self.len += 1;
    }

    /// The place of the view that the registry holds.
    pub(crate) fn newest(&self) -> usize {
        usize::from(self.len) - 1
    }

    pub(crate) fn latest(&self) -> &View {
        &self.views[self.newest()]
    }

    /// Installed view of a member.
    pub(crate) fn view_of(&self, i: usize) -> &View {
        &self.views[self.nodes[i].place()]
    }

    /// Leads the view that it has installed.
    pub(crate) fn leads(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        n.inside() && !n.joining && self.view_of(i).leader() == i
    }

    /// `Core::may_emit`.
    pub(crate) fn may_emit(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        if !self.leads(i) || n.wedged || !n.silent.is_empty() {
            return false;
        }
        let v = self.view_of(i);
        if v.k == 0 {
            return n.credit.has(i);
        }
        let answered = n.credit.or(n.stray).and(v.full).without(i);
        answered.len() >= usize::from(v.k)
    }

    /// Those whose last write as a lone leader is younger than their lease.
    pub(crate) fn lone_leases(&self) -> Set {
        (0..N)
            .filter(|m| self.nodes[*m].inside() && self.nodes[*m].credit.has(*m))
            .collect()
    }

    /// This incarnation ends; `node` is what follows it.
    pub(crate) fn end(&mut self, i: usize, node: Node) {
        self.nodes[i] = node;
        for v in &mut self.views {
            v.joining = v.joining.without(i);
        }
    }

    /// The view after the one that `i` has installed, when a member wrote it in that generation.
    fn next_of(&self, i: usize) -> Option<&View> {
        let w = self.nodes[i].place() + 1;
        let next = self.views[..usize::from(self.len)].get(w)?;
        (!next.fresh && !next.gap).then_some(next)
    }

    /// A wedged full member of the view after its own, which it will install when it hears of it.
    fn goes_on(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        let takes = |next: &View| next.full.has(i) && n.held >= next.cut;
        n.inside() && n.wedged && self.next_of(i).is_some_and(takes)
    }

    /// Takes part in the view at `w`, or may yet.
    fn in_or_for(&self, i: usize, w: usize) -> bool {
        let n = &self.nodes[i];
        let there = n.inside() && n.place() == w && !n.wedged && !n.joining;
        there || (n.inside() && n.place() + 1 == w && self.goes_on(i))
    }

    /// Whether a member that the registry has left behind can do nothing any more but hear of it and be out: it may not
    /// emit, commits nothing, and nobody counts it.
    fn idle(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        let newest = self.newest();
        if !n.inside() || n.place() == newest {
            return false;
        }
        if (n.wedged && !self.goes_on(i)) || (n.joining && !n.wedged) {
            return true;
        }
        let at = n.place() + usize::from(n.wedged);
        if at == newest {
            return false;
        }
        let v = &self.views[at];
        let leader = v.leader();
        if leader != i {
            return !self.in_or_for(leader, at);
        }
        let mut others = v.full.without(i).iter();
        n.credit.or(n.stray).is_empty() && !others.any(|m| self.in_or_for(m, at))
    }

    /// Puts away what cannot have any effect, so that states that differ only in it are one.
    ///
    /// One that is idle is taken to be out at once, even before it can have heard: that commutes with every other step,
    /// and takes nothing away from anybody.
    pub(crate) fn tidy(&mut self, and_idle: bool) {
        for i in 0..N {
            self.nodes[i] = self.tidied(i);
        }
        while let Some(i) = (0..N).find(|i| and_idle && self.idle(*i)) {
            if self.nodes[i].joining && self.latest().joining.has(i) {
                self.nodes[i] = Node {
                    view: self.len - 1,
                    joining: true,
                    held: self.latest().cut,
                    ..Node::OUTSIDE
                };
            } else {
                self.end(i, Node::OUTSIDE);
            }
        }
        let lone = self.lone_leases();
        for n in &mut self.nodes {
            n.silent = n.silent.and(lone);
        }
        self.forget_views();
        for w in 0..self.newest() {
            let takes_part = |n: &Node| n.inside() && n.place() == w && !n.wedged;
            let busy = self.nodes.iter().any(takes_part);
            let v = &mut self.views[w];
            v.joining = Set::default();
            v.fresh &= w > 0 && !v.gap;
            v.stable = v.cut;
            if !busy {
                v.issued = v.cut;
            }
            if !busy || v.k <= 1 {
                v.delivered = [v.cut; N];
            }
        }
        self.renumber();
    }

    fn tidied(&self, i: usize) -> Node {
        let newest = self.newest();
        let mut n = self.nodes[i];
        if n.view == NONE {
            return n;
        }
        if n.life == Life::Crashed {
            // Copies that it sent may still be on their way.
            let copies = n.place() == newest && n.wedged && !n.joining;
            let rest = if copies {
                (n.view, true, n.held)
            } else {
                (NONE, false, 0)
            };
            let (view, wedged, held) = rest;
            return Node {
                life: Life::Crashed,
                view,
                wedged,
                held,
                ..Node::OUTSIDE
            };
        }
        // Only a leader that may speak has a lease; only in the newest view are promises counted.
        if !self.leads(i) || n.wedged {
            let alone = self.next_of(i).filter(|v| v.k == 0 && v.leader() == i);
            let written = alone.map_or(Set::default(), |_| Set::of(i));
            n.credit = n.credit.and(written);
            n.stray = Set::default();
        }
        if n.place() < newest {
            n.acks = [0; N];
            if n.wedged {
                n.held = match self.next_of(i) {
                    Some(next) if self.goes_on(i) => next.cut,
                    _ => self.views[n.place()].cut,
                };
            }
        }
        n
    }

    /// A view matters while a living member has it installed, or may install it next, and while it is the newest. A member
    /// that hears of any other is out, whatever it says.
    fn forget_views(&mut self) {
        let lived_in = |s: &Self, w: usize| s.nodes.iter().any(|n| n.inside() && n.place() == w);
        let mut w = 0;
        while w < self.newest() {
            let next_of_one = w > 0 && !self.views[w].gap && lived_in(self, w - 1);
            if lived_in(self, w) || next_of_one {
                w += 1;
                continue;
            }
            self.views[w..].rotate_left(1);
            self.len -= 1;
            self.views[usize::from(self.len)] = View::default();
            self.views[w].gap = true;
            for n in &mut self.nodes {
                if n.view != NONE && n.place() > w {
                    n.view -= 1;
                }
            }
        }
        self.views[0].gap = false;
    }

    /// Events are counted from the oldest cut that matters. What no member can compare has numbers of its own: another
    /// generation, and what follows a gap.
    fn renumber(&mut self) {
        let mut base = 0;
        for w in 0..usize::from(self.len) {
            let v = &mut self.views[w];
            if w == 0 || v.fresh || v.gap {
                base = v.cut;
            }
            v.cut -= base;
            v.issued -= base;
            v.stable -= base;
            for d in &mut v.delivered {
                *d = d.saturating_sub(base);
            }
            for n in &mut self.nodes {
                if n.view != NONE && n.place() == w {
                    n.held -= base;
                    for a in &mut n.acks {
                        *a = a.saturating_sub(base);
                    }
                }
            }
        }
    }

    fn renamed(&self, names: &[u8; N]) -> Self {
        let mut s = *self;
        for (i, to) in names.iter().enumerate() {
            let n = &mut s.nodes[usize::from(*to)];
            *n = self.nodes[i];
            n.credit = n.credit.renamed(names);
            n.stray = n.stray.renamed(names);
            n.silent = n.silent.renamed(names);
            for (j, to) in names.iter().enumerate() {
                n.acks[usize::from(*to)] = self.nodes[i].acks[j];
            }
        }
        for w in 0..usize::from(self.len) {
            let (old, v) = (&self.views[w], &mut s.views[w]);
            v.full = old.full.renamed(names);
            v.joining = old.joining.renamed(names);
            v.leader = names[old.leader()];
            for (j, to) in names.iter().enumerate() {
                v.delivered[usize::from(*to)] = old.delivered[j];
            }
        }
        if let Net::CutOff(i) = self.net {
            s.net = Net::CutOff(names[usize::from(i)]);
        }
        s
    }

    /// Names do not matter: the least of all renamings stands for them.
    pub(crate) fn representative(&self) -> Self {
        const NAMES: [[u8; N]; 5] = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        NAMES
            .iter()
            .map(|names| self.renamed(names))
            .fold(*self, Self::min)
    }
}

impl Hash for State {
    /// One write of few bytes instead of a call for each field.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut out = [0u8; 72];
        let mut at = 0;
        let mut put = |b: u8| {
            out[at] = b;
            at += 1;
        };
        let flags = |bits: [bool; 4]| bits.iter().fold(0, |all, b| all << 1 | u8::from(*b));
        put(self.len);
        for n in &self.nodes {
            put(n.view);
            put(n.held << 4 | flags([n.up(), n.joining, n.wedged, false]));
            put(n.silent.0);
            put(n.credit.0 << 4 | n.stray.0);
            n.acks.iter().for_each(|a| put(*a));
        }
        for v in &self.views[..usize::from(self.len)] {
            put(v.full.0 << 4 | v.joining.0);
            put(v.leader << 4 | v.k);
            put(v.cut << 4 | v.issued);
            put(v.stable << 4 | flags([v.fresh, v.gap, false, false]));
            v.delivered.iter().for_each(|d| put(*d));
        }
        put(self.crashes);
        put(match self.net {
            Net::Whole => 8,
            Net::Healed => 9,
            Net::CutOff(i) => i,
        });
        let b = self.broken;
        put(flags([b.lost, b.bad_member, b.promise, b.fork]));
        state.write(&out);
    }
}
