//! A program's handle of a group.

use super::worker::{Input, Joined, Membership, ReplyEvent, Seen, Sending};
use super::{Events, Inputs, Node, Room};
use crate::process::{
    Calling, Command, GroupId, GroupView, Multicast, Order, Refused, Stability, ThreadId, Want,
};
use crate::view::MemberId;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::{oneshot, watch};

/// Messages up to this size are never too large for an event, so nobody waits to hear that one is.
const SURELY_TAKEN_BYTES: usize = 64 * 1024;

/// Why a group was not joined.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The name is empty or too long, this node is in too many groups, or the group is full.
    #[error("this group cannot be joined")]
    Refused,
    /// This node is a member already, or is joining.
    #[error("this node is in the group already")]
    Already,
    /// The node was stopped.
    #[error("the node is gone")]
    Gone,
}

/// Why a message was not sent.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SendError {
    /// This node is not a member (any more), or the receiver is not.
    #[error("not a member of this group")]
    NotAMember,
    /// The message is larger than an event may be.
    #[error("the message is too large")]
    TooLarge,
    /// The node was stopped. Whether the message went out is not known.
    #[error("the node is gone")]
    Gone,
}

/// Why a call has no answer.
pub type CallError = SendError;

/// A membership. Clones are handles of the same.
#[derive(Clone)]
pub struct Group {
    id: GroupId,
    me: MemberId,
    inputs: Inputs,
    view: watch::Receiver<Option<Seen>>,
    progress: watch::Receiver<(u64, u64)>,
    room: Arc<Room>,
}

impl Group {
    /// Joins the group of this name, or founds it. The first event is [`super::Event::Init`] or, when the state has come, [`super::Event::State`].
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join(node: &Node, name: &str) -> Result<(Self, Events), JoinError> {
        Self::join_by(&node.inputs, name).await
    }

    pub(crate) async fn join_by(inputs: &Inputs, name: &str) -> Result<(Self, Events), JoinError> {
        let (done, joined) = oneshot::channel();
        if !inputs.put(Input::Join(name.to_owned(), done)) {
            return Err(JoinError::Gone);
        }
        let joined: Joined = joined.await.map_err(|_| JoinError::Gone)??;
        let group = Self {
            id: joined.events.group,
            me: joined.me,
            inputs: inputs.clone(),
            view: joined.view,
            progress: joined.progress,
            room: joined.room,
        };
        Ok((group, joined.events))
    }

    /// The group's number.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// This member.
    pub fn me(&self) -> &MemberId {
        &self.me
    }

    /// The newest view; it may be ahead of the events that the program has taken. `None` before the first.
    pub fn view(&self) -> Option<GroupView> {
        self.view.borrow().as_ref().map(|seen| seen.view.clone())
    }

    pub(crate) fn views(&self) -> watch::Receiver<Option<Seen>> {
        self.view.clone()
    }

    /// Follows the state that is on its way here.
    pub fn progress(&self) -> Progress {
        Progress(self.progress.clone())
    }

    /// Waits until this membership of a member has ended, and gives the view in which that is seen: the member is not in it, or
    /// came back. `None`: this node is out first.
    pub async fn monitor(&self, member: &MemberId) -> Option<u64> {
        let mut view = self.view.clone();
        let first = view.wait_for(Option::is_some).await;
        let since = first.ok()?.as_ref().and_then(|seen| seen.since(member));
        let gone = |seen: &Option<Seen>| {
            let seen = seen.as_ref();
            seen.is_some_and(|s| s.since(member).is_none() || s.since(member) != since)
        };
        let view = view.wait_for(gone).await.ok()?;
        view.as_ref().map(|seen| seen.view.id)
    }

    /// Sends to all, FIFO. Returns when the message is on its way.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn fbcast(&self, body: impl Into<Bytes>) -> Result<(), SendError> {
        self.send(Multicast::new(Order::Fifo, body)).await
    }

    /// Sends to all, FIFO. Returns when every member holds the message.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn fbcast_sync(&self, body: impl Into<Bytes>) -> Result<(), SendError> {
        let message = Multicast::new(Order::Fifo, body);
        self.send_stable(message, Stability::All).await
    }

    /// Sends to all, after what it may depend on in this causal thread.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn cbcast(&self, thread: ThreadId, body: impl Into<Bytes>) -> Result<(), SendError> {
        self.send(Multicast::new(Order::Causal(thread), body)).await
    }

    /// Sends to all, in one order at all members.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn abcast(&self, body: impl Into<Bytes>) -> Result<(), SendError> {
        let order = Order::Total(ThreadId::default());
        self.send(Multicast::new(order, body)).await
    }

    /// Sends to all, between the same messages of all others everywhere.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn gbcast(&self, body: impl Into<Bytes>) -> Result<(), SendError> {
        self.send(Multicast::new(Order::View, body)).await
    }

    /// Sends a message. Returns when it is on its way: waits for room, and for nothing else. What this member sends and its
    /// group does not get, because the member is out before, nobody gets.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, message: Multicast) -> Result<(), SendError> {
        self.place(message, None).await
    }

    /// Sends a message and waits until it is as stable as this.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send_stable(
        &self,
        mut message: Multicast,
        stability: Stability,
    ) -> Result<(), SendError> {
        message.done = Some((0, stability));
        let (done, stable) = oneshot::channel();
        self.place(message, Some(done)).await?;
        stable.await.map_err(|_| SendError::NotAMember)
    }

    /// Asks all, in this order, and gathers replies: as many as wanted, until all have answered or departed, or until the time
    /// is over (`None`: without end).
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(
        &self,
        order: Order,
        body: impl Into<Bytes>,
        want: Want,
        timeout: Option<Duration>,
    ) -> Result<Replies, CallError> {
        let mut message = Multicast::new(order, body);
        message.calling = Some(Calling {
            call: 0,
            want,
            timeout_us: timeout.map_or(0, |t| u64::try_from(t.as_micros()).unwrap_or(0).max(1)),
        });
        let (replies, events) = mpsc::unbounded_channel();
        self.ask(|| Sending {
            of: self.membership(),
            message: message.clone(),
            place: None,
            done: None,
            replies: Some(replies.clone()),
        })
        .await?;
        Ok(Replies {
            events,
            failed: Vec::new(),
            timed_out: false,
            over: false,
        })
    }

    /// Sends to one member.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send_to(&self, to: &MemberId, body: impl Into<Bytes>) -> Result<(), SendError> {
        let body = body.into();
        loop {
            let room = self.room.news.notified();
            let mut room = std::pin::pin!(room);
            room.as_mut().enable();
            let command = Command::Send {
                group: self.id,
                to: to.clone(),
                body: body.clone(),
            };
            match self.command(command).await? {
                Ok(()) => return Ok(()),
                Err(Refused::Backlog) => room.await,
                Err(refused) => return Err(error(refused)),
            }
        }
    }

    /// Makes another member leave.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn expel(&self, member: &MemberId) -> Result<(), SendError> {
        let command = Command::Expel {
            group: self.id,
            member: member.clone(),
        };
        self.command(command).await?.map_err(error)
    }

    /// Leaves the group when all hold what was sent; [`super::Event::Left`] is the last event.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn leave(&self) -> Result<(), SendError> {
        let command = Command::Leave { group: self.id };
        self.command(command).await?.map_err(error)
    }

    /// As [`Group::leave`], by one that cannot wait.
    pub(crate) fn begin_to_leave(&self) {
        let command = Command::Leave { group: self.id };
        self.inputs
            .put(Input::Command(command, Some(self.membership()), None));
    }

    fn membership(&self) -> Membership {
        Membership {
            group: self.id,
            room: Arc::clone(&self.room),
        }
    }

    async fn command(&self, command: Command) -> Result<Result<(), Refused>, SendError> {
        let (done, result) = oneshot::channel();
        if !self
            .inputs
            .put(Input::Command(command, Some(self.membership()), Some(done)))
        {
            return Err(SendError::Gone);
        }
        result.await.map_err(|_| SendError::Gone)
    }

    async fn place(
        &self,
        message: Multicast,
        done: Option<oneshot::Sender<()>>,
    ) -> Result<(), SendError> {
        let place = self.room.wait(message.body.len()).await?;
        let large = message.body.len() > SURELY_TAKEN_BYTES;
        let sending = Sending {
            of: self.membership(),
            message,
            place: Some(place),
            done,
            replies: None,
        };
        let (answer, result) = if large {
            let (answer, result) = oneshot::channel();
            (Some(answer), Some(result))
        } else {
            (None, None)
        };
        if !self.inputs.put(Input::Send(sending, answer)) {
            return Err(SendError::Gone);
        }
        match result {
            Some(result) => result.await.map_err(|_| SendError::Gone)?.map_err(error),
            None => Ok(()),
        }
    }

    /// Sends a call: it may be refused because too many are open, and then waits outside, so that it holds up no message.
    async fn ask(&self, sending: impl Fn() -> Sending) -> Result<(), SendError> {
        loop {
            // Before the attempt, so that no room is missed.
            let room = self.room.news.notified();
            let mut room = std::pin::pin!(room);
            room.as_mut().enable();
            let (done, result) = oneshot::channel();
            if !self.inputs.put(Input::Send(sending(), Some(done))) {
                return Err(SendError::Gone);
            }
            match result.await.map_err(|_| SendError::Gone)? {
                Ok(()) => return Ok(()),
                Err(Refused::Backlog) => room.await,
                Err(refused) => return Err(error(refused)),
            }
        }
    }
}

fn error(refused: Refused) -> SendError {
    match refused {
        Refused::TooLarge => SendError::TooLarge,
        Refused::NotAMember | Refused::Backlog | Refused::CannotJoin | Refused::NotWanted => {
            SendError::NotAMember
        }
    }
}

/// The progress of a state transfer. (Values are copied out: what a program keeps holds up no thread.)
#[derive(Clone)]
pub struct Progress(watch::Receiver<(u64, u64)>);

impl Progress {
    /// Bytes that have come, and bytes in all.
    pub fn now(&self) -> (u64, u64) {
        *self.0.borrow()
    }

    /// Waits for news, and gives it; `None` when this member is out.
    pub async fn next(&mut self) -> Option<(u64, u64)> {
        self.0.changed().await.ok()?;
        Some(*self.0.borrow_and_update())
    }
}

/// The replies to a call, as they come.
pub struct Replies {
    events: UnboundedReceiver<ReplyEvent>,
    failed: Vec<MemberId>,
    timed_out: bool,
    over: bool,
}

impl Replies {
    /// The next reply, and who gave it; `None` when no more come.
    pub async fn next(&mut self) -> Option<(MemberId, Bytes)> {
        match self.events.recv().await? {
            ReplyEvent::Reply(from, body) => Some((from, body)),
            ReplyEvent::Over { failed, timed_out } => {
                (self.failed, self.timed_out, self.over) = (failed, timed_out, true);
                self.events.close();
                None
            }
        }
    }

    /// All replies.
    pub async fn all(&mut self) -> Vec<(MemberId, Bytes)> {
        let mut replies = Vec::new();
        while let Some(reply) = self.next().await {
            replies.push(reply);
        }
        replies
    }

    /// Whether the call came to its end: `false` when [`Replies::next`] gave `None` because this member is out, and who has the
    /// call is not known.
    pub fn over(&self) -> bool {
        self.over
    }

    /// Who departed without an answer; known when [`Replies::next`] gave `None`.
    pub fn failed(&self) -> &[MemberId] {
        &self.failed
    }

    /// Whether the time was over first; known when [`Replies::next`] gave `None`.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }
}
