//! Release consistency as a state machine: what to send, what to apply, when a lock is held.

use super::Diff;
use super::vector::Vector;
use super::wire::{self, Ordered, Update};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use thiserror::Error;

mod snapshot;

pub use snapshot::SnapshotError;

/// The number of a lock: below [`Config::locks_max`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockId(pub u32);

/// The number of a barrier: below [`Config::barriers_max`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BarrierId(pub u32);

impl fmt::Display for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BarrierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Sizes and limits. All processes of a region have the same: what one refuses, all must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of the region.
    pub region_bytes: u64,
    /// Locks; memory is used for those that were ever requested.
    pub locks_max: u32,
    /// Barriers.
    pub barriers_max: u32,
    /// Bytes of changes that one update carries, about; a release that changed more is sent in parts. At least 64.
    pub update_bytes_max: usize,
    /// Bytes of one sender's updates that wait for others'. More is taken for a fault of that sender.
    pub held_bytes_max: usize,
}

impl Config {
    /// The usual limits for a region of that size.
    pub fn new(region_bytes: u64) -> Self {
        Self {
            region_bytes,
            locks_max: 1024,
            barriers_max: 16,
            update_bytes_max: 32 << 10,
            // A release that changed every second byte takes less than four times the region (an offset, a length and
            // a byte for two bytes of memory); then there is room for what follows it.
            held_bytes_max: usize::try_from(region_bytes)
                .unwrap_or(usize::MAX)
                .saturating_mul(8)
                .saturating_add(1 << 20),
        }
    }
}

/// What to do, in this order.
#[must_use]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send to all other members, each sender's messages in their order.
    Fbcast(Bytes),
    /// Send to all members, this one included, all in one order.
    Abcast(Bytes),
    /// Write into the region: [`Pages::apply`](super::Pages::apply).
    Apply(Diff),
    /// The lock is held: the application may go on.
    Granted {
        /// Which.
        lock: LockId,
        /// A holder departed without passing the lock on, or what it had written was lost with it: data that the lock
        /// guards is consistent among members, but may be half of what the application would write. Until the next
        /// release.
        abandoned: bool,
    },
    /// All have come to the barrier, and what they had written is applied: the application may go on.
    Passed {
        /// Which.
        barrier: BarrierId,
        /// Who came, in order: the same at all of them.
        members: Vec<MemberId>,
    },
    /// The region is no longer a true copy, or may soon not be: leave, and join again. Said once; nothing else follows.
    Failed(Failure),
}

/// Why this process has to join again.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The view does not hold this process.
    #[error("not in the view")]
    Excluded,
    /// A member's update is missing, or its next one is not what this program writes.
    #[error("update {expected} of {member} is missing or damaged")]
    Update {
        /// Who sent it.
        member: MemberId,
        /// The number that should have come.
        expected: u64,
    },
    /// A member departed whose last updates came here with the copy that this process began with, and to no other.
    #[error("the copy holds updates of {member} that are lost")]
    Donor {
        /// Who sent them.
        member: MemberId,
    },
    /// A member's updates wait for others' that do not come.
    #[error("too many updates of {member} wait")]
    Held {
        /// Who sent them.
        member: MemberId,
    },
}

/// Why a call of the application was refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommandError {
    /// A number that the configuration does not have.
    #[error("no such lock or barrier")]
    Unknown,
    /// This process holds the lock, queues for it, or waits at the barrier: its threads agree among themselves first.
    #[error("this process has it or waits for it already")]
    Busy,
    /// The lock is not held.
    #[error("the lock is not held")]
    NotHeld,
    /// A diff that does not lie within the region.
    #[error("not within the region")]
    OutOfRange,
    /// After [`Output::Failed`].
    #[error("this process has to join again")]
    Failed,
}

/// An update that waits.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Held {
    update: Update,
    /// Encoded size.
    bytes: usize,
}

/// What is known of one member's updates.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Sender {
    /// Number of its last update that was applied.
    applied: u64,
    /// The copy that this process began with holds its updates up to this one. Those above `applied` were on their way
    /// when the copy was made: they count when they have come, as everywhere, and change nothing then.
    copied: u64,
    /// Invariant: consecutive, the first has `applied + 1`.
    held: VecDeque<Held>,
    /// How many of `held` are the last part of a release.
    whole: usize,
    /// Of all in `held`.
    held_bytes: usize,
}

/// The same at all members, between the same two ordered messages.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Lock {
    /// The first holds the lock. Each at most once.
    queue: VecDeque<MemberId>,
    /// What the next holder must have applied: the lock's path.
    path: Vector,
    abandoned: bool,
}

/// The same at all members, between the same two ordered messages.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Barrier {
    arrived: BTreeSet<MemberId>,
    path: Vector,
}

/// This process and a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mine {
    /// The request is under way, or queued.
    Requested,
    /// First in the queue, but updates on the path are missing.
    Waiting,
    /// The application goes on.
    Held,
}

/// This process and a barrier.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stop {
    /// Not all have come.
    Arrived,
    /// All have; updates are missing.
    Waiting {
        path: Vector,
        members: Vec<MemberId>,
    },
}

/// A defect that can be planted in tests: the simulation has to find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A lock is held as soon as it is this process's turn.
    GrantWithoutUpdates,
    /// Updates are applied as they come.
    ApplyAsTheyCome,
    /// A lock's path holds the last releaser's updates only, not what these depend on.
    PathOfOneMember,
    /// What a departed member's updates depended on counts as there.
    KeepOrphans,
    /// A barrier is passed when all have come.
    PassWithoutUpdates,
    /// A release's parts are applied one by one.
    ApplyParts,
    /// A departed holder's lock is not passed on.
    KeepLockOfDeparted,
    /// A joiner begins with what was applied here, without what had been ordered.
    SnapshotWithoutLocks,
    /// A joiner takes for delivered what the donor had only sent.
    CopiedIsDelivered,
    /// A joiner goes back to what was on its way to all when its copy was made.
    ApplyCopiedAgain,
}

/// One process's part in a region's consistency. See [the module](super) for the contract with who drives it.
#[derive(Clone, Debug)]
pub struct DsmCore {
    config: Config,
    me: MemberId,
    /// The other members of the view.
    others: BTreeMap<MemberId, Sender>,
    /// Updates that this process has sent.
    sent: u64,
    /// How many of these were delivered to itself, and so to all that had its view.
    delivered: u64,
    /// What happened before this process's present: its own updates, and those on the path of every lock it took and
    /// every barrier it passed.
    /// Invariant: all of it is applied.
    seen: Vector,
    locks: BTreeMap<LockId, Lock>,
    barriers: BTreeMap<BarrierId, Barrier>,
    mine: BTreeMap<LockId, Mine>,
    stops: BTreeMap<BarrierId, Stop>,
    outputs: VecDeque<Output>,
    failed: bool,
    ignored: u64,
    #[cfg(test)]
    pub(super) fault: Option<Fault>,
}

impl DsmCore {
    /// A process of a region that begins: its bytes are zero, and nobody has a lock.
    ///
    /// # Panics
    /// Where `me` is not among the members, or the configuration has no room for an update.
    pub fn new(config: Config, me: MemberId, members: &[MemberId]) -> Self {
        assert!(members.contains(&me), "a process is in its own view");
        assert!(config.update_bytes_max >= 64);
        let others = members.iter().filter(|m| **m != me);
        Self {
            others: others.map(|m| (m.clone(), Sender::default())).collect(),
            config,
            me,
            sent: 0,
            delivered: 0,
            seen: Vector::default(),
            locks: BTreeMap::new(),
            barriers: BTreeMap::new(),
            mine: BTreeMap::new(),
            stops: BTreeMap::new(),
            outputs: VecDeque::new(),
            failed: false,
            ignored: 0,
            #[cfg(test)]
            fault: None,
        }
    }

    /// The next thing to do; drain to `None` after every input.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The application wants a lock: it goes on at [`Output::Granted`].
    ///
    /// # Errors
    /// `Unknown`, `Busy`, `Failed`.
    pub fn handle_local_acquire(&mut self, lock: LockId) -> Result<(), CommandError> {
        self.working()?;
        if lock.0 >= self.config.locks_max {
            return Err(CommandError::Unknown);
        }
        if self.mine.contains_key(&lock) {
            return Err(CommandError::Busy);
        }
        self.mine.insert(lock, Mine::Requested);
        self.abcast(&Ordered::Request { lock });
        Ok(())
    }

    /// The application is done with a lock; `diffs` is what [`Pages::collect`](super::Pages::collect) found after its
    /// last write. All of it is sent, whichever lock guards it.
    ///
    /// # Errors
    /// `NotHeld`: the diffs are sent all the same, since the region counts them as sent. `OutOfRange`, `Failed`: they
    /// are not.
    pub fn handle_local_release(
        &mut self,
        lock: LockId,
        diffs: Vec<Diff>,
    ) -> Result<(), CommandError> {
        self.working()?;
        self.publish(diffs)?;
        if self.mine.get(&lock) != Some(&Mine::Held) {
            return Err(CommandError::NotHeld);
        }
        self.mine.remove(&lock);
        let path = self.path();
        self.abcast(&Ordered::Release { lock, path });
        Ok(())
    }

    /// The application has come to a barrier, and goes on at [`Output::Passed`]. `diffs` as in a release.
    ///
    /// # Errors
    /// `Unknown`, `Busy`: the diffs are sent all the same. `OutOfRange`, `Failed`: they are not.
    pub fn handle_local_barrier(
        &mut self,
        barrier: BarrierId,
        diffs: Vec<Diff>,
    ) -> Result<(), CommandError> {
        self.working()?;
        self.publish(diffs)?;
        if barrier.0 >= self.config.barriers_max {
            return Err(CommandError::Unknown);
        }
        if self.stops.contains_key(&barrier) {
            return Err(CommandError::Busy);
        }
        self.stops.insert(barrier, Stop::Arrived);
        let path = self.path();
        self.abcast(&Ordered::Arrive { barrier, path });
        Ok(())
    }

    /// A delivery of the fbcast; this process's own ones too.
    pub fn handle_update(&mut self, from: &MemberId, bytes: &[u8]) {
        if self.failed {
            return;
        }
        if *from == self.me {
            self.delivered = self.sent.min(self.delivered + 1);
            return;
        }
        let copied_again = self.has(Fault::ApplyCopiedAgain);
        let Some(sender) = self.others.get_mut(from) else {
            self.ignored += 1;
            return;
        };
        let expected = sender.applied + sender.held.len() as u64 + 1;
        let update = wire::decode::<Update>(bytes);
        let within = |d: &Diff| d.end().is_some_and(|end| end <= self.config.region_bytes);
        match update {
            // In the copy that this process began with.
            Some(update) if update.number < expected => {}
            Some(mut update) if update.number == expected && update.diffs.iter().all(within) => {
                if update.number <= sender.copied && !copied_again {
                    update.diffs.clear();
                }
                sender.held_bytes += bytes.len();
                sender.whole += usize::from(update.last);
                sender.held.push_back(Held {
                    update,
                    bytes: bytes.len(),
                });
                self.apply_what_may_be();
                if self.others[from].held_bytes > self.config.held_bytes_max {
                    let member = from.clone();
                    self.fail(Failure::Held { member });
                }
            }
            _ => {
                let member = from.clone();
                self.fail(Failure::Update { member, expected });
            }
        }
    }

    /// A delivery of the abcast; this process's own ones too.
    pub fn handle_ordered(&mut self, from: &MemberId, bytes: &[u8]) {
        if self.failed {
            return;
        }
        let known = *from == self.me || self.others.contains_key(from);
        match wire::decode(bytes) {
            Some(message) if known => {
                if !self.on_ordered(from, message) {
                    self.ignored += 1;
                }
            }
            _ => self.ignored += 1,
        }
    }

    /// A new view: all that was sent in the old one and will ever be delivered has been handed in.
    ///
    /// What a departed member sent and no member got is gone for all members alike. What depended on it goes with it:
    /// these updates wait here, as they do at every member, and are dropped. (Their senders departed too: who had
    /// applied the lost one and stays would have made it known to all.)
    pub fn handle_view(&mut self, members: &[MemberId]) {
        if self.failed {
            return;
        }
        if !members.contains(&self.me) {
            return self.fail(Failure::Excluded);
        }
        let stays = |m: &MemberId| members.contains(m);
        // Its last updates are in the copy that this process began with, and reach nobody else. (If there is nobody else,
        // this copy is the one that counts.)
        let only_here = |(m, s): (&MemberId, &Sender)| {
            let member = (!stays(m) && s.copied > s.applied).then(|| m.clone());
            member.filter(|_| members.len() > 1)
        };
        if let Some(member) = self.others.iter().find_map(only_here) {
            return self.fail(Failure::Donor { member });
        }
        // A lock whose path names a lost update: what its holder wrote is not there.
        for lock in self.locks.values_mut() {
            let lost = |(m, n)| !stays(m) && self.others.get(m).is_some_and(|s| s.applied < n);
            lock.abandoned |= lock.path.iter().any(lost);
            if let Some(holder) = lock.queue.front() {
                lock.abandoned |= !stays(holder);
            }
        }
        if self.has(Fault::KeepOrphans) {
            self.apply_orphans(members);
        }
        self.others.retain(|m, _| stays(m));
        for member in members.iter().filter(|m| **m != self.me) {
            self.others.entry(member.clone()).or_default();
        }
        // Nobody waits for what is gone: `covers` passes over it.
        self.seen.retain(stays);
        self.apply_what_may_be();

        let keep_lock = self.has(Fault::KeepLockOfDeparted);
        let mut passed_on = Vec::new();
        for (&id, lock) in &mut self.locks {
            lock.path.retain(stays);
            if keep_lock {
                continue;
            }
            let holder = lock.queue.front().cloned();
            lock.queue.retain(stays);
            if holder.as_ref() != lock.queue.front() {
                passed_on.push(id);
            }
        }
        for lock in passed_on {
            self.on_first(lock);
        }
        for barrier in self.barriers.values_mut() {
            barrier.path.retain(stays);
            barrier.arrived.retain(stays);
        }
        let barriers: Vec<_> = self.barriers.keys().copied().collect();
        for barrier in barriers {
            self.open_if_all_came(barrier);
        }
        self.go_on();
    }

    /// Whether this process holds the lock.
    pub fn holds(&self, lock: LockId) -> bool {
        self.mine.get(&lock) == Some(&Mine::Held)
    }

    /// Updates of a member that are in this process's copy; its own ones count when they are sent.
    pub fn applied(&self, member: &MemberId) -> u64 {
        if *member == self.me {
            self.sent
        } else {
            self.others.get(member).map_or(0, |s| s.applied)
        }
    }

    /// Messages that were no member's, not understood, or out of place.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// What the next holder of a lock that this process passes on must have applied.
    fn path(&self) -> Vector {
        if self.has(Fault::PathOfOneMember) {
            let mut path = Vector::default();
            path.raise(&self.me, self.sent);
            return path;
        }
        self.seen.clone()
    }

    /// Sends what this process has written.
    fn publish(&mut self, diffs: Vec<Diff>) -> Result<(), CommandError> {
        let within = |d: &Diff| d.end().is_some_and(|end| end <= self.config.region_bytes);
        if !diffs.iter().all(within) {
            return Err(CommandError::OutOfRange);
        }
        let mut parts = split(diffs, self.config.update_bytes_max)
            .into_iter()
            .peekable();
        let mut after = self.path().without(&self.me);
        while let Some(diffs) = parts.next() {
            self.sent += 1;
            let update = Update {
                number: self.sent,
                last: parts.peek().is_none(),
                after: std::mem::take(&mut after),
                diffs,
            };
            self.outputs
                .push_back(Output::Fbcast(wire::encode(&update)));
        }
        self.seen.raise(&self.me, self.sent);
        Ok(())
    }

    fn abcast(&mut self, message: &Ordered) {
        self.outputs
            .push_back(Output::Abcast(wire::encode(message)));
    }

    fn working(&self) -> Result<(), CommandError> {
        if self.failed {
            Err(CommandError::Failed)
        } else {
            Ok(())
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.failed = true;
        self.outputs.push_back(Output::Failed(failure));
    }

    /// Whether all of `path` is applied here. What names a process that is not in the view is lost, not awaited; of
    /// itself a process has everything.
    fn covers(&self, path: &Vector) -> bool {
        path.iter()
            .all(|(m, n)| self.others.get(m).is_none_or(|s| s.applied >= n))
    }

    /// Whether the oldest release of a member may be applied.
    fn is_ready(&self, sender: &Sender) -> bool {
        let Some(first) = sender.held.front() else {
            return false;
        };
        let whole = sender.whole > 0 || self.has(Fault::ApplyParts);
        whole && (self.covers(&first.update.after) || self.has(Fault::ApplyAsTheyCome))
    }

    fn apply_what_may_be(&mut self) {
        loop {
            let ready = self.others.iter().find(|(_, s)| self.is_ready(s));
            let Some((member, _)) = ready else {
                break;
            };
            let member = member.clone();
            self.apply_oldest(&member);
        }
        self.go_on();
    }

    /// Applies the oldest release of a member: all its parts.
    fn apply_oldest(&mut self, member: &MemberId) {
        let one_part = self.has(Fault::ApplyParts);
        let sender = self.others.get_mut(member).expect("found just now");
        while let Some(Held { update, bytes }) = sender.held.pop_front() {
            sender.held_bytes -= bytes;
            sender.applied = update.number;
            self.outputs
                .extend(update.diffs.into_iter().map(Output::Apply));
            if update.last {
                sender.whole -= 1;
                break;
            }
            if one_part {
                break;
            }
        }
    }

    /// A planted defect.
    fn apply_orphans(&mut self, members: &[MemberId]) {
        let departed: Vec<_> = self.others.keys().cloned().collect();
        for member in departed.iter().filter(|m| !members.contains(m)) {
            while self.others[member].whole > 0 {
                self.apply_oldest(member);
            }
        }
    }

    /// `false` for what is out of place.
    fn on_ordered(&mut self, from: &MemberId, message: Ordered) -> bool {
        match message {
            Ordered::Request { lock } => {
                if lock.0 >= self.config.locks_max {
                    return false;
                }
                let queue = &mut self.locks.entry(lock).or_default().queue;
                if queue.contains(from) {
                    return false;
                }
                queue.push_back(from.clone());
                if queue.len() == 1 {
                    self.on_first(lock);
                }
            }
            Ordered::Release { lock, path } => {
                let Some(state) = self.locks.get_mut(&lock) else {
                    return false;
                };
                if state.queue.front() != Some(from) {
                    return false;
                }
                state.queue.pop_front();
                state.abandoned = false;
                state.path.join(&path);
                // Not of the view: lost, and a name that never goes away again would cost memory.
                let (me, others) = (&self.me, &self.others);
                state.path.retain(|m| m == me || others.contains_key(m));
                self.on_first(lock);
            }
            Ordered::Arrive { barrier, path } => {
                if barrier.0 >= self.config.barriers_max {
                    return false;
                }
                let state = self.barriers.entry(barrier).or_default();
                if !state.arrived.insert(from.clone()) {
                    return false;
                }
                state.path.join(&path);
                let (me, others) = (&self.me, &self.others);
                state.path.retain(|m| m == me || others.contains_key(m));
                self.open_if_all_came(barrier);
            }
        }
        self.go_on();
        true
    }

    /// Another is first in a lock's queue now, or nobody.
    fn on_first(&mut self, lock: LockId) {
        let state = &self.locks[&lock];
        if state.queue.front() == Some(&self.me)
            && let Some(mine @ Mine::Requested) = self.mine.get_mut(&lock)
        {
            *mine = Mine::Waiting;
        }
    }

    fn open_if_all_came(&mut self, barrier: BarrierId) {
        let Some(state) = self.barriers.get(&barrier) else {
            return;
        };
        let arrived = |m| state.arrived.contains(m);
        if !arrived(&self.me) || !self.others.keys().all(arrived) {
            return;
        }
        // The next round begins.
        let Barrier { path, arrived } = self.barriers.remove(&barrier).expect("found just now");
        if let Some(stop @ Stop::Arrived) = self.stops.get_mut(&barrier) {
            let members = arrived.into_iter().collect();
            *stop = Stop::Waiting { path, members };
        }
    }

    /// Lets the application go on where nothing is missing any more.
    fn go_on(&mut self) {
        let waits = |(lock, mine): (&LockId, &Mine)| (*mine == Mine::Waiting).then_some(*lock);
        let waiting: Vec<LockId> = self.mine.iter().filter_map(waits).collect();
        for lock in waiting {
            let Lock {
                path, abandoned, ..
            } = &self.locks[&lock];
            if self.covers(path) || self.has(Fault::GrantWithoutUpdates) {
                let abandoned = *abandoned;
                self.seen.join(path);
                self.mine.insert(lock, Mine::Held);
                self.outputs.push_back(Output::Granted { lock, abandoned });
            }
        }
        let mut passed = Vec::new();
        for (&barrier, stop) in &self.stops {
            if let Stop::Waiting { path, members } = stop
                && (self.covers(path) || self.has(Fault::PassWithoutUpdates))
            {
                self.seen.join(path);
                passed.push((barrier, members.clone()));
            }
        }
        for (barrier, members) in passed {
            self.stops.remove(&barrier);
            let passed = Output::Passed { barrier, members };
            self.outputs.push_back(passed);
        }
    }

    /// Whether all have come to a barrier that this process waits at.
    #[cfg(test)]
    pub(super) fn is_open(&self, barrier: BarrierId) -> bool {
        matches!(self.stops.get(&barrier), Some(Stop::Waiting { .. }))
    }

    #[cfg(test)]
    pub(super) fn copied(&self, member: &MemberId) -> u64 {
        self.others.get(member).map_or(0, |s| s.copied)
    }

    #[cfg(test)]
    pub(super) fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    #[cfg(test)]
    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests have defects planted")]
    const fn has(&self, _: Fault) -> bool {
        false
    }
}

/// Groups of diffs whose encoding takes about `bytes_max` at most, long diffs cut.
fn split(diffs: Vec<Diff>, bytes_max: usize) -> Vec<Vec<Diff>> {
    /// An offset and a length, at most.
    const HEAD: usize = 16;
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut used = 0;
    for mut diff in diffs {
        while !diff.bytes.is_empty() {
            if used + HEAD >= bytes_max {
                parts.push(std::mem::take(&mut part));
                used = 0;
            }
            let fits = diff.bytes.len().min(bytes_max - used - HEAD);
            let bytes = diff.bytes.split_to(fits);
            used += HEAD + fits;
            part.push(Diff {
                offset: diff.offset,
                bytes,
            });
            diff.offset += fits as u64;
        }
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}
