//! What a program is told of a group.

use super::Inputs;
use super::worker::Input;
use crate::process::{CallRef, Command, GroupId, GroupView, Message, Order};
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::sync::mpsc::UnboundedReceiver;

/// What an event costs in the queue besides its bytes.
const EVENT_BYTES: u64 = 100;

/// What happens in a group, in order: the same messages between the same views at every member.
#[derive(Debug)]
pub enum Event {
    /// This member is the first: the state is whatever the program begins with.
    Init,
    /// The state at the beginning of the view that follows. It may come again, in place of the one before: see
    /// [`crate::process::GroupEvent::State`].
    State(Bytes),
    /// A view begins. All messages of the view before came before it, and none of its own.
    View(GroupView),
    /// A message.
    Message(Received),
    /// Give the state as it is after all events before this one.
    StateWanted(StateWanted),
    /// This member is out; nothing follows.
    Left {
        /// Whether by its own wish.
        wished: bool,
    },
}

impl Event {
    pub(super) fn bytes(&self) -> u64 {
        EVENT_BYTES
            + match self {
                Self::State(bytes) => bytes.len() as u64,
                Self::Message(m) => m.message.body.len() as u64,
                Self::Init | Self::View(_) | Self::StateWanted(_) | Self::Left { .. } => 0,
            }
    }
}

/// Events that happened together, and what they count in the queue.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) events: VecDeque<Event>,
    pub(super) bytes: u64,
}

impl Batch {
    pub(super) fn push(&mut self, event: Event) {
        self.bytes += event.bytes();
        self.events.push_back(event);
    }
}

/// The events of one group: a stream.
pub struct Events {
    pub(super) group: GroupId,
    pub(super) batches: UnboundedReceiver<Batch>,
    /// What the program has not taken of the batch that it is at.
    pub(super) batch: VecDeque<Event>,
    pub(super) queued: Arc<AtomicU64>,
    /// Below this many queued bytes a node that takes no more takes again.
    pub(super) resume_below: u64,
    pub(super) inputs: Inputs,
}

impl Events {
    fn begin(&mut self, batch: Batch) -> Option<Event> {
        let bytes = batch.bytes;
        let before = self.queued.fetch_sub(bytes, Ordering::Relaxed);
        if before >= self.resume_below && before - bytes < self.resume_below {
            self.inputs.put(Input::Resume(self.group));
        }
        self.batch = batch.events;
        self.batch.pop_front()
    }

    /// Whether the next event came together with the last.
    pub(crate) fn more_at_hand(&self) -> bool {
        !self.batch.is_empty()
    }

    /// The next event; `None` after [`Event::Left`], or when the node is gone.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.batch.pop_front() {
            return Some(event);
        }
        let batch = self.batches.recv().await?;
        self.begin(batch)
    }

    /// The next event, waited for by blocking the thread. Not within an asynchronous runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        if let Some(event) = self.batch.pop_front() {
            return Some(event);
        }
        let batch = self.batches.blocking_recv()?;
        self.begin(batch)
    }
}

impl futures_core::Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Some(event) = self.batch.pop_front() {
            return Poll::Ready(Some(event));
        }
        let batch = std::task::ready!(self.batches.poll_recv(cx));
        Poll::Ready(batch.and_then(|batch| self.begin(batch)))
    }
}

/// A message that was delivered here.
pub struct Received {
    pub(super) group: GroupId,
    pub(super) message: Message,
    /// Where the answer goes; `None`: no call.
    pub(super) inputs: Option<Inputs>,
}

impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.message.fmt(f)
    }
}

impl Received {
    /// One that nobody sent, for tests of what is made of messages.
    #[cfg(test)]
    pub(crate) fn made(from: MemberId, order: Option<Order>, body: Bytes) -> Self {
        Self {
            group: GroupId(0),
            message: Message {
                from,
                body,
                order,
                call: None,
            },
            inputs: None,
        }
    }

    /// Its sender.
    pub fn from(&self) -> &MemberId {
        &self.message.from
    }

    /// What was sent.
    pub fn body(&self) -> &Bytes {
        &self.message.body
    }

    /// Its order; `None`: it was sent to this member alone.
    pub fn order(&self) -> Option<Order> {
        self.message.order
    }

    /// Whether an answer is waited for.
    pub fn is_call(&self) -> bool {
        self.message.call.is_some()
    }

    /// Answers a call. Not waited for; an answer to no call goes nowhere.
    pub fn reply(mut self, body: impl Into<Bytes>) {
        if let Some(to) = self.message.call.take() {
            self.answer(to, Some(body.into()));
        }
    }

    fn answer(&self, to: CallRef, body: Option<Bytes>) {
        let group = self.group;
        if let Some(inputs) = &self.inputs {
            inputs.put(Input::Command(
                Command::Reply { group, to, body },
                None,
                None,
            ));
        }
    }
}

impl Drop for Received {
    /// A call that is dropped without an answer is declined, so that its caller does not wait for it.
    fn drop(&mut self) {
        if let Some(to) = self.message.call.take() {
            self.answer(to, None);
        }
    }
}

/// Someone joins and needs the state.
pub struct StateWanted {
    pub(super) group: GroupId,
    pub(super) view: u64,
    pub(super) inputs: Inputs,
}

impl std::fmt::Debug for StateWanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StateWanted(view {})", self.view)
    }
}

impl StateWanted {
    /// Gives the state. If this is dropped, the joiner asks another donor, and if none gives, goes on asking.
    pub fn give(self, segments: Vec<Bytes>) {
        let command = Command::State {
            group: self.group,
            view: self.view,
            segments,
        };
        self.inputs.put(Input::Command(command, None, None));
    }
}
