//! A consistent cut: what every member had at one point of the group's history, and what was on its way between two of them.
//!
//! BJ87 (gbcast), Chandy & Lamport 1985. The marker is a gbcast: all members record their state at the same place among all
//! multicasts, so of these none is on its way. Messages to one member have an order of their own: each member sends a marker
//! after its last one before the cut, to every other; what comes before it and after the receiver's own cut was on its way. A
//! message that was sent after its sender's cut and comes before the receiver's is held back until then, so that nothing is in
//! the cut as received that is not in it as sent.

use crate::node::{Event, Events, Group, Received, SendError};
use crate::process::{Order, Want};
use crate::view::MemberId;
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Begins every message of this tool. (A program's own must not.)
const MAGIC: [u8; 16] = *b"\0unbroken cut 1\0";
/// More than this on its way to one member does not fit its answer, and its part is missing.
const CHANNELS_BYTES_MAX: usize = 128 << 10;
/// Bytes of one sender that are held back for a cut that has not begun here.
const EARLY_BYTES_MAX: usize = 1 << 20;
/// What each of them costs besides its body.
const HELD_BYTES: usize = 64;

/// What a member had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its state.
    pub state: Bytes,
    /// Messages to it alone that were on their way, by sender and in order; of a sender that departed meanwhile, those that came.
    pub channels: BTreeMap<MemberId, Vec<Bytes>>,
}

/// A cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What each member had. One is missing if its program gave no state, or if it is larger than a message may be (128 KiB).
    pub parts: BTreeMap<MemberId, Part>,
    /// Who departed before its part was here.
    pub failed: Vec<MemberId>,
    /// Whether the time was over first.
    pub timed_out: bool,
}

/// Takes cuts of a group. Clones are handles of the same.
#[derive(Clone)]
pub struct Cuts {
    group: Group,
    /// Numbers this member's cuts in the order in which they are sent.
    number: Arc<tokio::sync::Mutex<u64>>,
}

/// What happens: [`Event`]s, and cuts.
#[derive(Debug)]
pub enum CutEvent {
    /// What happens in the group.
    Event(Event),
    /// Record the state as it is after all events before this one.
    Record(Record),
}

/// A member's events, with those of cuts among them.
///
/// Every member of the group takes its events from one of these, and sends messages to single members from the task that does,
/// so that each is sent before or after a cut and not meanwhile.
pub struct CutEvents {
    group: Group,
    events: Events,
    taker: Taker,
}

/// What a member's events mean for cuts; sends and receives nothing itself.
struct Taker {
    me: MemberId,
    members: Vec<MemberId>,
    /// Each caller's last cut that began here.
    begun: BTreeMap<MemberId, u64>,
    open: BTreeMap<Key, Arc<Mutex<Open>>>,
    /// By sender: markers of cuts that have not begun here, and what was sent after them.
    early: BTreeMap<MemberId, Held>,
    /// Given next.
    ready: VecDeque<CutEvent>,
    /// Sent next.
    markers: VecDeque<(MemberId, Key)>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Key {
    caller: MemberId,
    number: u64,
}

enum Early {
    /// `false`: messages after it could not be held back, and this member has no part in the cut.
    Marker(Key, bool),
    Message(Received),
}

impl Early {
    fn bytes(&self) -> usize {
        HELD_BYTES
            + match self {
                Self::Marker(key, _) => key.caller.name.len(),
                Self::Message(m) => m.body().len(),
            }
    }
}

/// What one sender sent from a marker on.
#[derive(Default)]
struct Held {
    queue: VecDeque<Early>,
    bytes: usize,
}

impl Held {
    fn push(&mut self, early: Early) {
        self.bytes += early.bytes();
        self.queue.push_back(early);
    }

    fn pop(&mut self) -> Option<Early> {
        let early = self.queue.pop_front()?;
        self.bytes -= early.bytes();
        Some(early)
    }

    fn has(&self, key: &Key) -> bool {
        let same = |early: &Early| matches!(early, Early::Marker(k, _) if k == key);
        self.queue.iter().any(same)
    }
}

/// A cut that has begun here.
struct Open {
    call: Option<Received>,
    state: Option<Bytes>,
    /// Whose markers have not come.
    awaited: BTreeSet<MemberId>,
    channels: BTreeMap<MemberId, Vec<Bytes>>,
    bytes: usize,
}

impl Open {
    fn settle(&mut self) {
        if self.awaited.is_empty()
            && let Some(state) = self.state.take()
            && let Some(call) = self.call.take()
        {
            let part = Part {
                state,
                channels: std::mem::take(&mut self.channels),
            };
            call.reply(postcard::to_stdvec(&part).expect("bytes can be serialised"));
        }
    }

    fn record(&mut self, from: &MemberId, body: &Bytes) {
        self.bytes += body.len() + 16;
        if self.bytes > CHANNELS_BYTES_MAX {
            // Without its call it is declined.
            self.call = None;
            self.channels.clear();
        }
        if self.call.is_some() {
            let channel = self.channels.entry(from.clone()).or_default();
            channel.push(body.clone());
        }
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The wish for a member's state. If it is dropped, the member's part of the cut is missing.
pub struct Record(Arc<Mutex<Open>>);

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Record")
    }
}

impl Record {
    /// Gives the state.
    pub fn give(self, state: impl Into<Bytes>) {
        let mut open = lock(&self.0);
        open.state = Some(state.into());
        open.settle();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let mut open = lock(&self.0);
        if open.state.is_none() {
            open.call = None;
        }
    }
}

fn marker(key: &Key) -> Bytes {
    let key = postcard::to_stdvec(key).expect("names can be serialised");
    let mut body = BytesMut::with_capacity(MAGIC.len() + key.len());
    body.put_slice(&MAGIC);
    body.put_slice(&key);
    body.freeze()
}

fn key(body: &Bytes) -> Option<Key> {
    postcard::from_bytes(body.strip_prefix(&MAGIC)?).ok()
}

impl Cuts {
    /// Cuts of this group; the events of the membership come out of the second.
    pub fn over(group: Group, events: Events) -> (Self, CutEvents) {
        let cuts = Self {
            group: group.clone(),
            number: Arc::default(),
        };
        let taker = Taker::new(group.me().clone());
        let events = CutEvents {
            group,
            events,
            taker,
        };
        (cuts, events)
    }

    /// Takes a cut of all members, this one too: somebody must be taking its events meanwhile.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn take(&self, timeout: Option<Duration>) -> Result<Cut, SendError> {
        let mut replies = {
            let mut number = self.number.lock().await;
            *number += 1;
            let key = Key {
                caller: self.group.me().clone(),
                number: *number,
            };
            let call = self
                .group
                .call(Order::View, marker(&key), Want::All, timeout);
            call.await?
        };
        let mut parts = BTreeMap::new();
        while let Some((from, body)) = replies.next().await {
            if let Ok(part) = postcard::from_bytes(&body) {
                parts.insert(from, part);
            }
        }
        Ok(Cut {
            parts,
            failed: replies.failed().to_vec(),
            timed_out: replies.timed_out(),
        })
    }
}

impl CutEvents {
    /// The next event; `None` when this member is out.
    pub async fn next(&mut self) -> Option<CutEvent> {
        loop {
            while let Some((to, key)) = self.taker.markers.front() {
                // One that is out needs none. (Sent twice, if this future is dropped at the wrong moment, it does no harm.)
                let _ = self.group.send_to(to, marker(key)).await;
                self.taker.markers.pop_front();
            }
            if let Some(event) = self.taker.ready.pop_front() {
                return Some(event);
            }
            let event = self.events.next().await?;
            self.taker.take(event);
        }
    }
}

impl Taker {
    fn new(me: MemberId) -> Self {
        Self {
            me,
            members: Vec::new(),
            begun: BTreeMap::new(),
            open: BTreeMap::new(),
            early: BTreeMap::new(),
            ready: VecDeque::new(),
            markers: VecDeque::new(),
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Message(m) if m.order() == Some(Order::View) => match key(m.body()) {
                Some(key) if key.caller == *m.from() => self.begin(key, m),
                _ => self.ready.push_back(CutEvent::Event(Event::Message(m))),
            },
            Event::Message(m) if m.order().is_none() => self.on_message(m),
            Event::View(view) => {
                self.members.clone_from(&view.members);
                self.begun.retain(|m, _| view.members.contains(m));
                for member in &view.departed {
                    for open in self.open.values() {
                        let mut open = lock(open);
                        open.awaited.remove(member);
                        open.settle();
                    }
                    // It began a cut that nobody else did.
                    for early in self.early.remove(member).unwrap_or_default().queue {
                        if let Early::Message(m) = early {
                            self.give(m);
                        }
                    }
                }
                self.close();
                self.ready.push_back(CutEvent::Event(Event::View(view)));
            }
            other => self.ready.push_back(CutEvent::Event(other)),
        }
    }

    /// A message to this member alone.
    fn on_message(&mut self, m: Received) {
        let from = m.from().clone();
        let held = self.early.get_mut(&from);
        match (key(m.body()), held) {
            (Some(key), held) => {
                let begun = self.begun.get(&key.caller).copied().unwrap_or(0);
                if let Some(open) = self.open.get(&key) {
                    let mut open = lock(open);
                    open.awaited.remove(&from);
                    open.settle();
                } else if let Some(held) = held {
                    // It may come twice; a second one would keep back what follows for ever.
                    if key.number > begun && !held.has(&key) {
                        held.push(Early::Marker(key, true));
                    }
                } else if key.number > begun && self.members.contains(&key.caller) {
                    let held = self.early.entry(from.clone()).or_default();
                    held.push(Early::Marker(key, true));
                }
                self.close();
            }
            (None, Some(held)) => held.push(Early::Message(m)),
            (None, None) => self.give(m),
        }
        self.bound(&from);
    }

    /// Gives what is too much to be held back: this member's part of those cuts will be missing.
    fn bound(&mut self, from: &MemberId) {
        let too_much = |held: &&mut Held| held.bytes > EARLY_BYTES_MAX;
        let Some(held) = self.early.get_mut(from).filter(too_much) else {
            return;
        };
        let mut markers = Held::default();
        for early in std::mem::take(held).queue {
            match early {
                Early::Marker(key, _) => markers.push(Early::Marker(key, false)),
                Early::Message(m) => self.give(m),
            }
        }
        // Nobody's cuts are so many: it is at fault.
        if markers.bytes > EARLY_BYTES_MAX / 2 {
            self.early.remove(from);
        } else {
            self.early.insert(from.clone(), markers);
        }
    }

    /// Gives a message to the program; it belongs to the channels of the cuts that wait for its sender's marker.
    fn give(&mut self, m: Received) {
        for open in self.open.values() {
            let mut open = lock(open);
            if open.awaited.contains(m.from()) {
                open.record(m.from(), m.body());
            }
        }
        self.ready.push_back(CutEvent::Event(Event::Message(m)));
    }

    /// The marker came: the cut is here.
    fn begin(&mut self, key: Key, call: Received) {
        self.begun.insert(key.caller.clone(), key.number);
        let others = self.members.iter().filter(|m| **m != self.me);
        let mut awaited: BTreeSet<MemberId> = others.cloned().collect();
        let to = awaited.iter().map(|m| (m.clone(), key.clone()));
        self.markers.extend(to);
        let mut after = Vec::new();
        let mut whole = true;
        self.early.retain(|from, held| {
            if let Some(Early::Marker(k, w)) = held.queue.front()
                && *k == key
            {
                whole &= w;
                held.pop();
                awaited.remove(from);
                while let Some(Early::Message(_)) = held.queue.front() {
                    after.extend(held.pop());
                }
            }
            !held.queue.is_empty()
        });
        let open = Arc::new(Mutex::new(Open {
            call: whole.then_some(call),
            state: None,
            awaited,
            channels: BTreeMap::new(),
            bytes: 0,
        }));
        self.open.insert(key, Arc::clone(&open));
        self.ready.push_back(CutEvent::Record(Record(open)));
        for early in after {
            if let Early::Message(m) = early {
                self.give(m);
            }
        }
        self.close();
    }

    /// Nothing more is recorded of those that wait for no marker.
    fn close(&mut self) {
        self.open.retain(|_, open| !lock(open).awaited.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::GroupView;

    fn member(name: &str) -> MemberId {
        MemberId::new(name, 1)
    }

    /// One of three, told who they are.
    fn taker(me: &str) -> Taker {
        let mut taker = Taker::new(member(me));
        let view = GroupView {
            id: 1,
            members: ["a", "b", "c"].map(member).into(),
            joined: Vec::new(),
            departed: Vec::new(),
        };
        taker.take(Event::View(view));
        assert!(matches!(
            taker.ready.pop_front(),
            Some(CutEvent::Event(Event::View(_)))
        ));
        taker
    }

    fn from(name: &str, order: Option<Order>, body: Bytes) -> Event {
        Event::Message(Received::made(member(name), order, body))
    }

    fn cut(number: u64) -> Key {
        Key {
            caller: member("a"),
            number,
        }
    }

    /// What the program is told next, in words.
    fn told(taker: &mut Taker) -> Option<String> {
        Some(match taker.ready.pop_front()? {
            CutEvent::Record(record) => {
                record.give("");
                "record".to_owned()
            }
            CutEvent::Event(Event::Message(m)) => String::from_utf8_lossy(m.body()).into_owned(),
            CutEvent::Event(other) => panic!("{other:?}"),
        })
    }

    fn channels(taker: &Taker, key: &Key) -> BTreeMap<MemberId, Vec<Bytes>> {
        lock(&taker.open[key]).channels.clone()
    }

    #[test]
    fn what_was_sent_after_its_senders_cut_comes_after_ours() {
        let mut c = taker("c");
        // b's marker and what b sent after it are here before the cut is.
        c.take(from("b", None, marker(&cut(1))));
        c.take(from("b", None, "after".into()));
        assert_eq!(told(&mut c), None);
        c.take(from("a", Some(Order::View), marker(&cut(1))));
        assert!(
            channels(&c, &cut(1)).is_empty(),
            "not on its way at the cut"
        );
        assert_eq!(told(&mut c).as_deref(), Some("record"));
        assert_eq!(told(&mut c).as_deref(), Some("after"));
        assert_eq!(told(&mut c), None);
    }

    #[test]
    fn what_was_sent_before_its_senders_cut_and_comes_after_ours_was_on_its_way() {
        let mut c = taker("c");
        c.take(from("b", None, "before".into()));
        c.take(from("a", Some(Order::View), marker(&cut(1))));
        for (sender, body) in [("a", "one"), ("b", "two")] {
            c.take(from(sender, None, body.into()));
        }
        c.take(from("a", None, marker(&cut(1))));
        c.take(from("a", None, "three".into()));
        let on_its_way = [("a", "one"), ("b", "two")];
        let on_its_way = on_its_way.map(|(from, body)| (member(from), vec![Bytes::from(body)]));
        assert_eq!(channels(&c, &cut(1)), BTreeMap::from(on_its_way));
        let order: Vec<String> = std::iter::from_fn(|| told(&mut c)).collect();
        assert_eq!(order, ["before", "record", "one", "two", "three"]);
        c.take(from("b", None, marker(&cut(1))));
        assert!(c.open.is_empty(), "nothing more is recorded");
        let to: Vec<_> = c.markers.iter().map(|(to, _)| to.clone()).collect();
        assert_eq!(to, ["a", "b"].map(member));
    }

    #[test]
    fn a_marker_that_comes_twice_holds_nothing_back() {
        let mut c = taker("c");
        for _ in 0..2 {
            c.take(from("b", None, marker(&cut(1))));
        }
        c.take(from("a", Some(Order::View), marker(&cut(1))));
        c.take(from("b", None, "later".into()));
        let order: Vec<String> = std::iter::from_fn(|| told(&mut c)).collect();
        assert_eq!(order, ["record", "later"]);
        assert!(c.early.is_empty());
    }

    #[test]
    fn what_is_too_much_to_be_held_back_is_given_and_the_part_is_missing() {
        let mut c = taker("c");
        c.take(from("b", None, marker(&cut(1))));
        let large = Bytes::from(vec![b'x'; 100 << 10]);
        for _ in 0..30 {
            c.take(from("b", None, large.clone()));
            assert!(c.early[&member("b")].bytes <= EARLY_BYTES_MAX);
        }
        c.take(from("a", Some(Order::View), marker(&cut(1))));
        assert!(lock(&c.open[&cut(1)]).call.is_none(), "declined");
        let order: Vec<String> = std::iter::from_fn(|| told(&mut c)).collect();
        assert_eq!(order.len(), 31);
        assert!(c.early.is_empty());
    }

    #[test]
    fn what_a_departed_member_sent_after_a_cut_that_nobody_began_is_given() {
        let mut c = taker("c");
        c.take(from("b", None, marker(&cut(1))));
        c.take(from("b", None, "last".into()));
        let view = GroupView {
            id: 2,
            members: ["a", "c"].map(member).into(),
            joined: Vec::new(),
            departed: vec![member("b")],
        };
        c.take(Event::View(view));
        assert_eq!(told(&mut c).as_deref(), Some("last"));
    }
}
