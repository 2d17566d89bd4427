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
    members: Vec<MemberId>,
    /// Each caller's last cut that began here.
    begun: BTreeMap<MemberId, u64>,
    open: BTreeMap<Key, Arc<Mutex<Open>>>,
    /// By sender: markers of cuts that have not begun here, and what was sent after them.
    early: BTreeMap<MemberId, VecDeque<Early>>,
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
    Marker(Key),
    Message(Received),
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
        let events = CutEvents {
            group,
            events,
            members: Vec::new(),
            begun: BTreeMap::new(),
            open: BTreeMap::new(),
            early: BTreeMap::new(),
            ready: VecDeque::new(),
            markers: VecDeque::new(),
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
            while let Some((to, key)) = self.markers.front() {
                // One that is out needs none. (Sent twice, if this future is dropped at the wrong moment, it does no harm.)
                let _ = self.group.send_to(to, marker(key)).await;
                self.markers.pop_front();
            }
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let event = self.events.next().await?;
            self.take(event);
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
                    for early in self.early.remove(member).unwrap_or_default() {
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
                    held.push_back(Early::Marker(key));
                } else if key.number > begun && self.members.contains(&key.caller) {
                    self.early.insert(from, [Early::Marker(key)].into());
                }
                self.close();
            }
            (None, Some(held)) => held.push_back(Early::Message(m)),
            (None, None) => self.give(m),
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
        let me = self.group.me();
        let others = self.members.iter().filter(|m| *m != me);
        let mut awaited: BTreeSet<MemberId> = others.cloned().collect();
        let to = awaited.iter().map(|m| (m.clone(), key.clone()));
        self.markers.extend(to);
        let mut after = Vec::new();
        self.early.retain(|from, held| {
            let here = matches!(held.front(), Some(Early::Marker(k)) if *k == key);
            if here {
                held.pop_front();
                awaited.remove(from);
                while let Some(Early::Message(_)) = held.front() {
                    after.extend(held.pop_front());
                }
            }
            !held.is_empty()
        });
        let open = Arc::new(Mutex::new(Open {
            call: Some(call),
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
