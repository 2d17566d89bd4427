//! Processes that share a region, on a network that delays, reorders between senders, and loses members: everything
//! from one seed.
//!
//! What the model network promises is what the contract in [the module](super) asks for: fbcast in each sender's order,
//! abcast in one order for all, and views that all survivors install after the same messages. Of a departed member's
//! messages any prefix survives that holds what a survivor has delivered.

use super::consistency::Fault;
use super::{BarrierId, Config, Diff, DsmCore, Failure, LockId, Output, Pages};
use crate::rng::Rng;
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// What a process shares: real pages, or a model of them.
pub(super) trait Memory {
    fn read(&self, offset: usize, buffer: &mut [u8]);
    fn write(&mut self, offset: usize, bytes: &[u8]);
    fn collect(&mut self) -> Vec<Diff>;
    fn apply(&mut self, diff: &Diff);
    fn contents(&mut self) -> Vec<Diff>;
}

impl Memory for Pages {
    fn read(&self, offset: usize, buffer: &mut [u8]) {
        Self::read(self, offset, buffer);
    }
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        Self::write(self, offset, bytes);
    }
    fn collect(&mut self) -> Vec<Diff> {
        Self::collect(self)
    }
    fn apply(&mut self, diff: &Diff) {
        Self::apply(self, diff).expect("the core lets nothing else through");
    }
    fn contents(&mut self) -> Vec<Diff> {
        Self::contents(self)
    }
}

/// The same without pages.
pub(super) struct Plain {
    now: Vec<u8>,
    agreed: Vec<u8>,
}

impl Plain {
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            now: vec![0; bytes],
            agreed: vec![0; bytes],
        }
    }
}

impl Memory for Plain {
    fn read(&self, offset: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.now[offset..][..buffer.len()]);
    }
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.now[offset..][..bytes.len()].copy_from_slice(bytes);
    }
    fn collect(&mut self) -> Vec<Diff> {
        let mut diffs: Vec<(usize, Vec<u8>)> = Vec::new();
        for (n, now) in self.now.iter().enumerate() {
            if *now != self.agreed[n] {
                match diffs.last_mut() {
                    Some((at, bytes)) if *at + bytes.len() == n => bytes.push(*now),
                    _ => diffs.push((n, vec![*now])),
                }
            }
        }
        self.agreed.clone_from(&self.now);
        let diff = |(offset, bytes): (usize, Vec<u8>)| Diff {
            offset: offset as u64,
            bytes: bytes.into(),
        };
        diffs.into_iter().map(diff).collect()
    }
    fn apply(&mut self, diff: &Diff) {
        let at = usize::try_from(diff.offset).unwrap();
        for memory in [&mut self.now, &mut self.agreed] {
            memory[at..][..diff.bytes.len()].copy_from_slice(&diff.bytes);
        }
    }
    fn contents(&mut self) -> Vec<Diff> {
        vec![Diff {
            offset: 0,
            bytes: self.agreed.clone().into(),
        }]
    }
}

/// How a run goes.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) members: usize,
    /// Critical sections of each member, per round; each round ends at the barrier.
    pub(super) sections: u32,
    pub(super) rounds: u32,
    pub(super) locks: u32,
    /// Departures, at most; one member stays.
    pub(super) departures: u32,
    pub(super) joins: u32,
    pub(super) fault: Option<Fault>,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xd5a1);
        let mut below = |n: u64| u32::try_from(rng.next_u64() % n).unwrap();
        Self {
            seed,
            members: 2 + below(4) as usize,
            sections: 3 + below(8),
            rounds: 1 + below(3),
            locks: 1 + below(4),
            departures: below(4),
            joins: below(3),
            fault: None,
        }
    }
}

/// What a run has seen, to know that it saw something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) steps: u64,
    pub(super) sections: u32,
    pub(super) barriers: u32,
    pub(super) departures: u32,
    pub(super) joins: u32,
    /// Sections whose update was lost with its member.
    pub(super) lost: u32,
    pub(super) abandoned: u32,
    pub(super) parts: u32,
    /// Members that had to go because their donor took with it what only they got.
    pub(super) donors: u32,
}

/// What the application of a process does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum App {
    Idle,
    /// Queues for the last of these, holds the others.
    Wants(Vec<u32>),
    Holds(Vec<u32>),
    AtBarrier,
}

struct Process<M> {
    core: DsmCore,
    memory: M,
    app: App,
    /// Critical sections to do before the next barrier.
    left: u32,
    /// Barriers passed.
    round: u32,
    /// Increments that no update carries yet.
    unsent: Vec<u32>,
    /// Ordered messages delivered.
    position: usize,
    /// It has to go.
    spoiled: bool,
}

/// A critical section whose update was sent.
struct Section {
    lock: u32,
    member: usize,
    number: u64,
    lost: bool,
}

pub(super) struct World<M> {
    plan: Plan,
    rng: Rng,
    /// A member's index is its place in its first view; departed ones stay `None`.
    processes: Vec<Option<Process<M>>>,
    /// All fbcasts of each member ever, and how many of them each other has had.
    sent: Vec<Vec<Bytes>>,
    had: BTreeMap<(usize, usize), usize>,
    /// Updates that their makers have not handed to the fbcast yet.
    outbox: Vec<VecDeque<Bytes>>,
    /// Handed to abcast, not ordered yet.
    unordered: Vec<VecDeque<Bytes>>,
    ordered: Vec<(usize, Bytes)>,
    /// Pairs whose messages take long; with itself: one that is slow to send.
    slow: Vec<(usize, usize)>,
    sections: Vec<Section>,
    /// Of each round, who came to its barrier.
    came: BTreeMap<u32, Vec<MemberId>>,
    memory: fn() -> M,
    region: usize,
    departures_left: u32,
    joins_left: u32,
    seen: Seen,
}

/// Counters lie close together and unaligned, so that processes share pages and words.
const fn counter(lock: u32) -> usize {
    3 + lock as usize * 8
}

/// Written under a lock: the counter of another lock as it was seen.
const fn copy(lock: u32) -> usize {
    203 + lock as usize * 8
}

/// Filled with the counter's low byte under the lock: takes several parts to send. The first lies on two pages.
const fn field(lock: u32) -> usize {
    3996 + lock as usize * FIELD
}
const FIELD: usize = 300;

/// Written by one member, without a lock, before each barrier.
const fn round_of(member: usize) -> usize {
    403 + member * 8
}

fn name(member: usize) -> MemberId {
    MemberId::new(format!("m{member}"), member as u128 + 100)
}

impl<M: Memory> World<M> {
    pub(super) fn new(plan: Plan, region: usize, memory: fn() -> M) -> Self {
        let mut world = Self {
            rng: Rng::new(plan.seed),
            processes: Vec::new(),
            sent: Vec::new(),
            had: BTreeMap::new(),
            outbox: Vec::new(),
            unordered: Vec::new(),
            ordered: Vec::new(),
            slow: Vec::new(),
            sections: Vec::new(),
            came: BTreeMap::new(),
            memory,
            region,
            departures_left: plan.departures,
            joins_left: plan.joins,
            seen: Seen::default(),
            plan,
        };
        let view: Vec<_> = (0..world.plan.members).map(name).collect();
        for n in 0..world.plan.members {
            let core = DsmCore::new(world.config(), name(n), &view);
            world.add(core, (memory)(), 0);
        }
        world
    }

    /// Runs until all have done what they have to.
    pub(super) fn run(mut self) -> Result<Seen, String> {
        for step in 0_u64.. {
            self.seen.steps = step;
            if step > 300_000 {
                let apps: Vec<_> = self.alive().map(|n| self.at(n).app.clone()).collect();
                return Err(format!("stuck: {apps:?}"));
            }
            let spoiled = self.alive().filter(|n| self.at(*n).spoiled).count();
            if spoiled == self.alive().count() {
                return Ok(self.seen); // nobody has the region any more
            }
            if self.below(60) == 0 || (spoiled > 0 && self.below(5) == 0) {
                self.change_view()?;
            }
            if !self.step()? && spoiled == 0 {
                break;
            }
        }
        self.check_end()?;
        Ok(self.seen)
    }

    fn config(&self) -> Config {
        Config {
            update_bytes_max: 96,
            ..Config::new(self.region as u64)
        }
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.rng.next_u64() % n as u64).unwrap()
    }

    fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        let alive = |(n, p): (usize, &Option<_>)| p.is_some().then_some(n);
        self.processes.iter().enumerate().filter_map(alive)
    }

    fn at(&self, n: usize) -> &Process<M> {
        self.processes[n].as_ref().expect("alive")
    }

    fn at_mut(&mut self, n: usize) -> &mut Process<M> {
        self.processes[n].as_mut().expect("alive")
    }

    fn add(&mut self, mut core: DsmCore, memory: M, round: u32) -> usize {
        core.fault = self.plan.fault;
        let n = self.processes.len();
        self.processes.push(Some(Process {
            core,
            memory,
            app: App::Idle,
            left: self.plan.sections,
            round,
            unsent: Vec::new(),
            position: self.ordered.len(),
            spoiled: false,
        }));
        self.sent.push(Vec::new());
        self.outbox.push(VecDeque::new());
        self.unordered.push(VecDeque::new());
        if self.below(4) == 0 {
            self.slow.push((n, n));
        }
        for other in 0..n {
            self.had.insert((other, n), self.sent[other].len());
            self.had.insert((n, other), 0);
            for pair in [(n, other), (other, n)] {
                if self.below(4) == 0 {
                    self.slow.push(pair);
                }
            }
        }
        n
    }

    /// One thing happens. `false`: nothing is left to happen.
    fn step(&mut self) -> Result<bool, String> {
        enum Choice {
            Send(usize),
            Deliver(usize, usize),
            Order(usize),
            DeliverOrdered(usize),
            Act(usize),
        }
        let mut choices = Vec::new();
        let alive: Vec<_> = self.alive().collect();
        for &to in &alive {
            for &from in &alive {
                if from != to && self.had[&(from, to)] < self.sent[from].len() {
                    choices.push(Choice::Deliver(from, to));
                }
            }
            if !self.outbox[to].is_empty() {
                choices.push(Choice::Send(to));
            }
            if !self.unordered[to].is_empty() {
                choices.push(Choice::Order(to));
            }
            if self.at(to).position < self.ordered.len() {
                choices.push(Choice::DeliverOrdered(to));
            }
            match self.at(to).app {
                App::Wants(_) | App::AtBarrier => {}
                _ if self.at(to).spoiled => {}
                App::Idle if self.at(to).round == self.plan.rounds => {}
                App::Idle | App::Holds(_) => choices.push(Choice::Act(to)),
            }
        }
        if choices.is_empty() {
            return Ok(false);
        }
        let pick = self.below(choices.len());
        match choices[pick] {
            // Not now; another choice comes, or this one again.
            Choice::Deliver(from, to) if self.slow.contains(&(from, to)) && self.below(30) != 0 => {
            }
            Choice::Deliver(from, to) => self.deliver(from, to)?,
            Choice::Send(from) if self.slow.contains(&(from, from)) && self.below(30) != 0 => {}
            Choice::Send(from) => self.send(from)?,
            Choice::Order(from) => self.order(from),
            Choice::DeliverOrdered(to) => self.deliver_ordered(to)?,
            Choice::Act(n) => self.act(n)?,
        }
        Ok(true)
    }

    fn deliver(&mut self, from: usize, to: usize) -> Result<(), String> {
        let had = self.had.get_mut(&(from, to)).expect("all pairs");
        let bytes = self.sent[from][*had].clone();
        *had += 1;
        self.at_mut(to).core.handle_update(&name(from), &bytes);
        self.drain(to)
    }

    /// Sent is delivered, to the sender at once.
    fn send(&mut self, from: usize) -> Result<(), String> {
        let bytes = self.outbox[from].pop_front().expect("looked before");
        self.at_mut(from).core.handle_update(&name(from), &bytes);
        self.sent[from].push(bytes);
        self.drain(from)
    }

    fn order(&mut self, from: usize) {
        let bytes = self.unordered[from].pop_front().expect("looked before");
        self.ordered.push((from, bytes));
    }

    fn deliver_ordered(&mut self, to: usize) -> Result<(), String> {
        let position = self.at(to).position;
        let (from, bytes) = self.ordered[position].clone();
        self.at_mut(to).position += 1;
        self.at_mut(to).core.handle_ordered(&name(from), &bytes);
        self.drain(to)
    }

    /// Does what a core asks for.
    fn drain(&mut self, n: usize) -> Result<(), String> {
        while let Some(output) = self.at_mut(n).core.poll_output() {
            match output {
                Output::Fbcast(bytes) => self.outbox[n].push_back(bytes),
                Output::Abcast(bytes) => self.unordered[n].push_back(bytes),
                Output::Apply(diff) => self.at_mut(n).memory.apply(&diff),
                Output::Granted { lock, abandoned } => self.granted(n, lock.0, abandoned)?,
                Output::Passed {
                    barrier: BarrierId(0),
                    members,
                } => self.passed(n, members)?,
                Output::Passed { .. } => return Err("a barrier that nobody came to".into()),
                Output::Failed(Failure::Donor { .. }) => self.at_mut(n).spoiled = true,
                Output::Failed(failure) => return Err(format!("m{n}: {failure}")),
            }
        }
        Ok(())
    }

    fn read(&self, n: usize, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.at(n).memory.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write(&mut self, n: usize, offset: usize, value: u64) {
        self.at_mut(n).memory.write(offset, &value.to_le_bytes());
    }

    fn counted(&self, lock: u32) -> u64 {
        let counts = |s: &&Section| s.lock == lock && !s.lost;
        self.sections.iter().filter(counts).count() as u64
    }

    /// The lock is held: what all holders before wrote is here.
    fn granted(&mut self, n: usize, lock: u32, abandoned: bool) -> Result<(), String> {
        let App::Wants(locks) = self.at(n).app.clone() else {
            return Err(format!("m{n}: lock {lock} for nobody"));
        };
        if locks.last() != Some(&lock) {
            return Err(format!("m{n}: lock {lock} instead of {locks:?}"));
        }
        let holders = self
            .alive()
            .filter(|m| self.at(*m).core.holds(LockId(lock)));
        if holders.count() != 1 {
            return Err(format!("lock {lock} is held twice"));
        }
        let (is, should) = (self.read(n, counter(lock)), self.counted(lock));
        if is != should {
            return Err(format!("m{n}: lock {lock} counts {is} of {should}"));
        }
        // What the holders before knew of other locks' data is known here too.
        for other in (0..self.plan.locks).filter(|o| *o != lock) {
            let (here, then) = (self.read(n, counter(other)), self.read(n, copy(lock)));
            let of = then >> 32;
            if of == u64::from(other) && here < then & 0xffff_ffff {
                return Err(format!(
                    "m{n}: lock {other} counts {here}, lock {lock}'s holder saw {then:x}"
                ));
            }
        }
        self.check_field(n, lock)?;
        self.seen.abandoned += u32::from(abandoned);
        self.at_mut(n).app = App::Holds(locks);
        Ok(())
    }

    /// A field is written as a whole, so it is seen as a whole.
    fn check_field(&self, n: usize, lock: u32) -> Result<(), String> {
        let mut bytes = [0; FIELD];
        self.at(n).memory.read(field(lock), &mut bytes);
        if bytes.iter().any(|b| *b != bytes[0]) {
            return Err(format!("m{n}: lock {lock}'s field is half of an update"));
        }
        Ok(())
    }

    fn passed(&mut self, n: usize, members: Vec<MemberId>) -> Result<(), String> {
        let sections = self.plan.sections;
        let process = self.at_mut(n);
        if process.app != App::AtBarrier {
            return Err(format!("m{n}: a barrier for nobody"));
        }
        process.round += 1;
        process.left = sections;
        self.at_mut(n).app = App::Idle;
        self.seen.barriers += 1;
        let round = self.at(n).round;
        let came = self.came.entry(round).or_insert_with(|| members.clone());
        if *came != members || !members.contains(&name(n)) {
            return Err(format!("m{n} was told that {members:?} came, not {came:?}"));
        }
        let round = u64::from(round);
        for other in self.alive().filter(|m| members.contains(&name(*m))) {
            let is = self.read(n, round_of(other));
            if is < round {
                return Err(format!(
                    "m{n} passed barrier {round}, but sees m{other} at {is}"
                ));
            }
        }
        Ok(())
    }

    fn act(&mut self, n: usize) -> Result<(), String> {
        match self.at(n).app.clone() {
            App::Idle if self.at(n).left == 0 => {
                let round = u64::from(self.at(n).round) + 1;
                self.write(n, round_of(n), round);
                let diffs = self.collect(n);
                let process = self.at_mut(n);
                process.app = App::AtBarrier;
                process
                    .core
                    .handle_local_barrier(BarrierId(0), diffs)
                    .map_err(|e| e.to_string())?;
                self.sent_now(n);
            }
            App::Idle => {
                let lock = u32::try_from(self.below(self.plan.locks as usize)).unwrap();
                self.acquire(n, vec![lock])?;
            }
            App::Holds(mut locks) => {
                let lock = *locks.last().expect("holds one");
                let more = self.plan.locks - lock - 1;
                match self.below(4) {
                    // Another lock besides, in ascending order.
                    0 if more > 0 && locks.len() < 3 => {
                        locks.push(lock + 1 + u32::try_from(self.below(more as usize)).unwrap());
                        self.acquire(n, locks)?;
                    }
                    1 => {} // takes its time
                    _ => {
                        let value = self.read(n, counter(lock)) + 1;
                        self.write(n, counter(lock), value);
                        let fill = [value.to_le_bytes()[0]; FIELD];
                        self.at_mut(n).memory.write(field(lock), &fill);
                        if let [.., other, _] = locks[..] {
                            // Under this lock: what is known of the lock that is held besides.
                            let seen = self.read(n, counter(other));
                            self.write(n, copy(lock), u64::from(other) << 32 | seen);
                        } else if self.plan.locks > 1 {
                            // Or of one that was held some time.
                            let other = (lock + 1) % self.plan.locks;
                            let seen = self.counted_here(n, other);
                            self.write(n, copy(lock), u64::from(other) << 32 | seen);
                        }
                        self.at_mut(n).unsent.push(lock);
                        let diffs = self.collect(n);
                        locks.pop();
                        let process = self.at_mut(n);
                        process.left = process.left.saturating_sub(1);
                        process.app = if locks.is_empty() {
                            App::Idle
                        } else {
                            App::Holds(locks)
                        };
                        process
                            .core
                            .handle_local_release(LockId(lock), diffs)
                            .map_err(|e| e.to_string())?;
                        self.sent_now(n);
                        self.seen.sections += 1;
                    }
                }
            }
            App::Wants(_) | App::AtBarrier => unreachable!("not chosen"),
        }
        self.drain(n)
    }

    /// What this member itself has done to a lock's counter: that came before, whatever else it has seen.
    fn counted_here(&self, n: usize, lock: u32) -> u64 {
        let last = self
            .sections
            .iter()
            .rposition(|s| s.lock == lock && s.member == n && !s.lost);
        let up_to = &self.sections[..last.map_or(0, |l| l + 1)];
        up_to.iter().filter(|s| s.lock == lock && !s.lost).count() as u64
    }

    fn collect(&mut self, n: usize) -> Vec<Diff> {
        self.at_mut(n).memory.collect()
    }

    /// Whatever was not sent yet is in the updates that were just made.
    fn sent_now(&mut self, n: usize) {
        let process = self.at_mut(n);
        let number = process.core.applied(&name(n));
        for lock in std::mem::take(&mut process.unsent) {
            self.sections.push(Section {
                lock,
                member: n,
                number,
                lost: false,
            });
        }
        let before = (self.sent[n].len() + self.outbox[n].len()) as u64;
        self.seen.parts += u32::from(number > before + 1);
    }

    fn acquire(&mut self, n: usize, locks: Vec<u32>) -> Result<(), String> {
        let lock = LockId(*locks.last().expect("wants one"));
        let process = self.at_mut(n);
        process.app = App::Wants(locks);
        process
            .core
            .handle_local_acquire(lock)
            .map_err(|e| e.to_string())
    }

    /// Some depart, some join, or nobody does.
    fn change_view(&mut self) -> Result<(), String> {
        let alive: Vec<_> = self.alive().collect();
        let mut departed: Vec<_> = alive
            .iter()
            .copied()
            .filter(|n| self.at(*n).spoiled)
            .collect();
        self.seen.donors += u32::try_from(departed.len()).unwrap();
        if self.departures_left > 0 && self.below(3) == 0 {
            for &n in &alive {
                if self.departures_left > 0
                    && departed.len() + 1 < alive.len()
                    && !departed.contains(&n)
                    && self.below(2) == 0
                {
                    departed.push(n);
                    self.departures_left -= 1;
                }
            }
        }
        let joins = self.joins_left > 0 && alive.len() < 5 && self.below(4) == 0;
        if departed.is_empty() && !joins {
            return Ok(());
        }
        let stay: Vec<_> = alive
            .iter()
            .copied()
            .filter(|n| !departed.contains(n))
            .collect();
        self.flush(&stay, &departed)?;
        self.count_lost(&stay, &departed)?;

        let mut view: Vec<_> = stay.iter().copied().map(name).collect();
        let joiner = self.processes.len();
        if joins {
            self.joins_left -= 1;
            view.push(name(joiner));
        }
        for &n in &departed {
            self.processes[n] = None;
            self.seen.departures += 1;
        }
        for &n in &stay {
            self.at_mut(n).core.handle_view(&view);
        }
        // A lock may pass on: to be checked when all have the view.
        for &n in &stay {
            self.drain(n)?;
        }
        if joins {
            let donor = stay[self.below(stay.len())];
            self.join(donor, joiner)?;
        }
        Ok(())
    }

    /// Survivors get the same messages, in whatever order the network has.
    fn flush(&mut self, stay: &[usize], departed: &[usize]) -> Result<(), String> {
        for &n in departed {
            // A prefix survives that holds what a survivor has had.
            let had = stay.iter().map(|s| self.had[&(n, *s)]).max();
            let least = had.expect("one stays");
            let cut = match self.below(2) {
                0 => least,
                _ => least + self.below(self.sent[n].len() - least + 1),
            };
            self.sent[n].truncate(cut);
            let ordered = self.below(self.unordered[n].len() + 1);
            for _ in 0..ordered {
                self.order(n);
            }
            self.unordered[n].clear();
            self.outbox[n].clear();
        }
        loop {
            let mut left = Vec::new();
            for &to in stay {
                for from in (0..self.processes.len()).filter(|f| *f != to) {
                    if self.processes[from].is_some()
                        && self.had[&(from, to)] < self.sent[from].len()
                    {
                        left.push((Some(from), to));
                    }
                }
                if self.at(to).position < self.ordered.len() {
                    left.push((None, to));
                }
            }
            if left.is_empty() {
                return Ok(());
            }
            match left[self.below(left.len())] {
                (Some(from), to) => self.deliver(from, to)?,
                (None, to) => self.deliver_ordered(to)?,
            }
        }
    }

    /// Sections whose updates no survivor may ever see, and that survivors agree on that.
    fn count_lost(&mut self, stay: &[usize], departed: &[usize]) -> Result<(), String> {
        for &n in departed {
            // One whose copy holds more than came has to go.
            let goes = |core: &DsmCore| core.copied(&name(n)) > core.applied(&name(n));
            let cores = || stay.iter().map(|s| &self.at(*s).core);
            let mut applied: Vec<_> = cores()
                .filter(|c| !goes(c))
                .map(|c| c.applied(&name(n)))
                .collect();
            if applied.is_empty() {
                applied = cores().map(|c| c.applied(&name(n))).collect();
                applied.truncate(1);
            }
            if applied.iter().any(|a| *a != applied[0]) {
                return Err(format!("survivors differ about m{n}: {applied:?}"));
            }
            let there = match stay {
                // Its copy is the only one.
                [alone] => applied[0].max(self.at(*alone).core.copied(&name(n))),
                _ => applied[0],
            };
            for section in &mut self.sections {
                if section.member == n && section.number > there && !section.lost {
                    section.lost = true;
                    self.seen.lost += 1;
                }
            }
        }
        Ok(())
    }

    fn join(&mut self, donor: usize, joiner: usize) -> Result<(), String> {
        let config = self.config();
        let process = self.at_mut(donor);
        let contents = process.memory.contents();
        let image = process.core.snapshot(contents).map_err(|e| e.to_string())?;
        // Those who came to a barrier that is open wait for nothing of the joiner.
        let round = process.round + u32::from(process.core.is_open(BarrierId(0)));
        let (core, contents) =
            DsmCore::restore(&image, name(joiner), config).map_err(|e| e.to_string())?;
        let mut memory = (self.memory)();
        for diff in &contents {
            memory.apply(diff);
        }
        let n = self.add(core, memory, round);
        assert_eq!(n, joiner);
        self.seen.joins += 1;
        Ok(())
    }

    fn check_end(&self) -> Result<(), String> {
        let mut regions = self.alive().map(|n| {
            let mut bytes = vec![0; self.region];
            self.at(n).memory.read(0, &mut bytes);
            (n, bytes)
        });
        let (first, bytes) = regions.next().expect("one stays");
        if let Some((other, _)) = regions.find(|(_, b)| *b != bytes) {
            return Err(format!("m{first} and m{other} end differently"));
        }
        for lock in 0..self.plan.locks {
            let (is, should) = (self.read(first, counter(lock)), self.counted(lock));
            if is != should {
                return Err(format!("in the end lock {lock} counts {is} of {should}"));
            }
            self.check_field(first, lock)?;
        }
        for n in self.alive() {
            if self.at(n).core.ignored() != 0 || self.at(n).round != self.plan.rounds {
                return Err(format!("m{n} has not done its work"));
            }
        }
        Ok(())
    }
}
