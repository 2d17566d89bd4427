//! abcast: one order at all members.
//!
//! BSS91 §5.2: an abcast is a cbcast that nobody delivers before it was given its place; the holder of a token places those
//! whose causal turn has come, and sends the order (a *sequence*) in its own lane. The token moves to a member that sends
//! most of the abcasts, so that it can place its own at once. At the end of a view all members hold the same messages and
//! sequences; what has no place by then is delivered in a fixed order (thread, rank), the same at all.

use super::cbcast::{Pending, Threads};
use super::types::ThreadId;
use super::wire::TotalId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// The token goes to a member that sent this many placed abcasts in a row.
const MOVE_AFTER: u32 = 16;
/// Places that were announced and wait for what comes before: more is a peer's error.
const SEQUENCES_MAX: usize = 65_536;

/// A sequence to be sent in the lane of the token's holder.
pub(crate) struct Sequence {
    pub(crate) first: u64,
    pub(crate) ids: Vec<TotalId>,
    pub(crate) token: Option<u8>,
}

/// The total order of one view.
#[derive(Serialize, Deserialize)]
pub(crate) struct Total {
    me: usize,
    /// The index of the next abcast to be delivered.
    next: u64,
    /// Invariant: set at one member at most.
    holder: bool,
    /// Known places from `next` on.
    places: VecDeque<TotalId>,
    /// Sequences that came before their turn, by first index.
    early: BTreeMap<u64, (Vec<TotalId>, Option<u8>)>,
    /// Where the known places end.
    end: u64,
    /// Places given here and not sent yet.
    fresh: Vec<TotalId>,
    /// Who sent the last abcasts, and how many in a row.
    run: (usize, u32),
}

impl Total {
    /// The oldest member holds the token first.
    pub(crate) fn new(me: usize) -> Self {
        Self {
            me,
            next: 1,
            holder: me == 0,
            places: VecDeque::new(),
            early: BTreeMap::new(),
            end: 1,
            fresh: Vec::new(),
            run: (0, 0),
        }
    }

    /// A sequence arrived in some lane.
    pub(crate) fn insert(&mut self, first: u64, ids: Vec<TotalId>, token: Option<u8>) {
        if self.early.len() + self.places.len() >= SEQUENCES_MAX {
            return;
        }
        self.early.insert(first, (ids, token));
        while let Some((ids, token)) = self.early.remove(&self.end) {
            // A token that passes without a place keeps its index; it is the last with it.
            self.end += ids.len() as u64;
            self.places.extend(ids);
            if token == u8::try_from(self.me).ok() {
                self.holder = true;
            }
        }
    }

    /// The next abcast that can be delivered. A holder that may (`place`) gives places.
    pub(crate) fn next(
        &mut self,
        threads: &mut Threads,
        place: bool,
    ) -> Option<(ThreadId, usize, Pending)> {
        if let Some(id) = self.places.front().copied() {
            let sender = usize::from(id.sender);
            let pending = threads.next_total(id.thread, sender, id.count)?;
            self.places.pop_front();
            self.next += 1;
            return Some((id.thread, sender, pending));
        }
        if !(self.holder && place) {
            return None;
        }
        let (thread, sender, count) = threads.ready_totals().next()?;
        let id = TotalId {
            sender: u8::try_from(sender).ok()?,
            thread,
            count,
        };
        let pending = threads.next_total(thread, sender, count)?;
        self.fresh.push(id);
        self.next += 1;
        self.end += 1;
        self.run = if self.run.0 == sender {
            (sender, self.run.1 + 1)
        } else {
            (sender, 1)
        };
        Some((thread, sender, pending))
    }

    /// At the end of a view, when no more places come: the next abcast in the fixed order.
    pub(crate) fn next_at_end(
        &mut self,
        threads: &mut Threads,
    ) -> Option<(ThreadId, usize, Pending)> {
        self.places.clear();
        let (thread, sender, count) = threads.ready_totals().next()?;
        let pending = threads.next_total(thread, sender, count)?;
        Some((thread, sender, pending))
    }

    /// The places that were given since the last call, to be sent to the others.
    pub(crate) fn sequence(&mut self, ranks: usize) -> Option<Sequence> {
        if self.fresh.is_empty() {
            return None;
        }
        let ids = std::mem::take(&mut self.fresh);
        let (sender, times) = self.run;
        let moves = sender != self.me && times >= MOVE_AFTER && sender < ranks;
        let token = if moves {
            u8::try_from(sender).ok()
        } else {
            None
        };
        if token.is_some() {
            self.holder = false;
            self.run = (self.me, 0);
        }
        Some(Sequence {
            first: self.end - ids.len() as u64,
            ids,
            token,
        })
    }

    /// Whether this member places abcasts.
    #[cfg(test)]
    pub(crate) fn holds_token(&self) -> bool {
        self.holder
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::vclock::VClock;
    use bytes::Bytes;

    const T: ThreadId = ThreadId(1);

    fn abcast(stamp: &[u64]) -> Pending {
        Pending {
            stamp: VClock(stamp.to_vec()),
            total: true,
            body: Bytes::new(),
            call: None,
        }
    }

    #[test]
    fn the_holder_places_and_the_others_follow() {
        let (mut at0, mut total0) = (Threads::new(2), Total::new(0));
        let (mut at1, mut total1) = (Threads::new(2), Total::new(1));
        // Each sends one; rank 1's own is not delivered there before it has its place.
        at1.insert(T, 1, abcast(&[0, 1]));
        assert!(total1.next(&mut at1, true).is_none());
        at0.insert(T, 0, abcast(&[1, 0]));
        at0.insert(T, 1, abcast(&[0, 1]));
        let first = total0.next(&mut at0, true).map(|(_, s, _)| s);
        let second = total0.next(&mut at0, true).map(|(_, s, _)| s);
        assert_eq!((first, second), (Some(0), Some(1)));
        let s = total0.sequence(2).unwrap();
        total1.insert(s.first, s.ids, s.token);
        assert!(
            total1.next(&mut at1, true).is_none(),
            "the first has not come"
        );
        at1.insert(T, 0, abcast(&[1, 0]));
        assert_eq!(total1.next(&mut at1, true).map(|(_, s, _)| s), Some(0));
        assert_eq!(total1.next(&mut at1, true).map(|(_, s, _)| s), Some(1));
    }

    #[test]
    fn the_token_goes_to_whoever_sends_alone() {
        let (mut at0, mut total0) = (Threads::new(2), Total::new(0));
        let mut total1 = Total::new(1);
        for count in 1..=u64::from(MOVE_AFTER) {
            at0.insert(T, 1, abcast(&[0, count]));
            assert!(total0.next(&mut at0, true).is_some());
        }
        let s = total0.sequence(2).unwrap();
        assert_eq!(s.token, Some(1));
        assert!(!total0.holds_token() && !total1.holds_token());
        total1.insert(s.first, s.ids, s.token);
        assert!(total1.holds_token());
    }
}
