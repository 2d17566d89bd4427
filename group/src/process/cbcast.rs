//! cbcast: a message is delivered after all that its sender had delivered or sent before it in the same causal thread.
//!
//! BSS91 §5.1: each message carries the vector of what its sender had delivered, with itself counted; a receiver delays it
//! until what was delivered here admits it. One vector per causal thread (BSS91 §6, on several groups: threads that do not
//! concern each other do not wait for each other). Clocks begin at zero with each view, since a view's end delivers
//! everything.

use super::types::ThreadId;
use super::vclock::VClock;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Threads that one member may have in one view: a peer must not make us keep clocks without end.
pub(crate) const THREADS_MAX: usize = 4096;

/// What a message costs while it waits, besides its body and its stamp.
const PENDING_BYTES: u64 = 64;

/// A message that waits for its turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub(crate) stamp: VClock,
    /// An abcast: it waits for its place in the total order too.
    pub(crate) total: bool,
    pub(crate) body: Bytes,
    pub(crate) call: Option<super::types::Calling>,
}

impl Pending {
    fn bytes(&self) -> u64 {
        PENDING_BYTES + self.body.len() as u64 + 8 * self.stamp.0.len() as u64
    }
}

/// One causal thread in one view.
#[derive(Serialize, Deserialize)]
struct Thread {
    delivered: VClock,
    /// Messages that this member has sent in it.
    sent: u64,
    /// By sender, in its order.
    waiting: Vec<VecDeque<Pending>>,
}

/// All causal threads of one view.
#[derive(Serialize, Deserialize)]
pub(crate) struct Threads {
    ranks: usize,
    threads: BTreeMap<ThreadId, Thread>,
    /// Those in which something waits.
    active: BTreeSet<ThreadId>,
    /// By sender, the bytes of what waits.
    kept: Vec<u64>,
}

impl Threads {
    pub(crate) fn new(ranks: usize) -> Self {
        Self {
            ranks,
            threads: BTreeMap::new(),
            active: BTreeSet::new(),
            kept: vec![0; ranks],
        }
    }

    /// Bytes of this sender's messages that wait for their turn.
    pub(crate) fn kept_bytes(&self, sender: usize) -> u64 {
        self.kept.get(sender).copied().unwrap_or(0)
    }

    /// As an image must have it: every clock as long as the view.
    pub(crate) fn consistent(&self, ranks: usize) -> bool {
        let fits = |t: &Thread| {
            let mut waiting = t.waiting.iter().flatten();
            t.delivered.0.len() == ranks
                && t.waiting.len() == ranks
                && waiting.all(|p| p.stamp.0.len() == ranks)
        };
        let kept = |sender: usize| {
            let waiting = self.threads.values().filter_map(|t| t.waiting.get(sender));
            waiting.flatten().map(Pending::bytes).sum::<u64>()
        };
        self.ranks == ranks
            && self.threads.values().all(fits)
            && (0..ranks).map(kept).eq(self.kept.iter().copied())
    }

    fn thread(&mut self, id: ThreadId) -> Option<&mut Thread> {
        if self.threads.len() >= THREADS_MAX && !self.threads.contains_key(&id) {
            return None;
        }
        let ranks = self.ranks;
        Some(self.threads.entry(id).or_insert_with(|| Thread {
            delivered: VClock::new(ranks),
            sent: 0,
            waiting: vec![VecDeque::new(); ranks],
        }))
    }

    /// The stamp of the next message of this member, of rank `me`; `None` when there are too many threads.
    pub(crate) fn stamp(&mut self, id: ThreadId, me: usize) -> Option<VClock> {
        let thread = self.thread(id)?;
        thread.sent += 1;
        let mut stamp = thread.delivered.clone();
        *stamp.0.get_mut(me)? = thread.sent;
        Some(stamp)
    }

    /// Takes a message of a lane. One that cannot be right is passed over: its sender is at fault.
    pub(crate) fn insert(&mut self, id: ThreadId, sender: usize, pending: Pending) {
        if pending.stamp.0.len() != self.ranks {
            return;
        }
        let bytes = pending.bytes();
        if let Some(queue) = self.thread(id).and_then(|t| t.waiting.get_mut(sender)) {
            queue.push_back(pending);
            self.active.insert(id);
            self.kept[sender] += bytes;
        }
    }

    /// Delivers the next cbcast whose turn it is: lowest thread, then lowest rank.
    pub(crate) fn next_causal(&mut self) -> Option<(ThreadId, usize, Pending)> {
        let found = self.ready().find(|(_, _, p)| !p.total);
        let (id, sender) = found.map(|(id, sender, _)| (id, sender))?;
        Some((id, sender, self.deliver(id, sender)?))
    }

    /// The abcasts whose turn it is but for their place in the total order.
    pub(crate) fn ready_totals(&self) -> impl Iterator<Item = (ThreadId, usize, u64)> {
        self.ready()
            .filter(|(_, _, p)| p.total)
            .map(|(id, sender, p)| (id, sender, p.stamp.0[sender]))
    }

    /// Delivers this abcast, if its causal turn has come.
    pub(crate) fn next_total(
        &mut self,
        id: ThreadId,
        sender: usize,
        count: u64,
    ) -> Option<Pending> {
        let thread = self.threads.get(&id)?;
        let head = thread.waiting.get(sender)?.front()?;
        let ready = head.total
            && head.stamp.0[sender] == count
            && thread.delivered.admits(sender, &head.stamp);
        if ready {
            self.deliver(id, sender)
        } else {
            None
        }
    }

    fn ready(&self) -> impl Iterator<Item = (ThreadId, usize, &Pending)> {
        let active = self.active.iter();
        let active = active.filter_map(|id| Some((id, self.threads.get(id)?)));
        active.flat_map(|(id, t)| {
            t.waiting.iter().enumerate().filter_map(|(sender, queue)| {
                let head = queue.front()?;
                let ready = t.delivered.admits(sender, &head.stamp);
                ready.then_some((*id, sender, head))
            })
        })
    }

    fn deliver(&mut self, id: ThreadId, sender: usize) -> Option<Pending> {
        let thread = self.threads.get_mut(&id)?;
        let pending = thread.waiting.get_mut(sender)?.pop_front()?;
        thread.delivered.0[sender] += 1;
        self.kept[sender] -= pending.bytes();
        if thread.waiting.iter().all(VecDeque::is_empty) {
            self.active.remove(&id);
        }
        Some(pending)
    }
}
