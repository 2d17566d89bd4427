//! What goes into a process and what comes out of it.

use crate::output::{Notice, RegistryReply};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// A group's number: never given to another.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct GroupId(pub u64);

/// A causal thread: messages are ordered causally within one, and independently of all others.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct ThreadId(pub u16);

/// Who is in a group, from one change to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    /// Counts the views of this group, from 1.
    pub id: u64,
    /// Members by age: whoever has been in it longest is first.
    pub members: Vec<MemberId>,
    /// Who is new in this view.
    pub joined: Vec<MemberId>,
    /// Who was in the view before and is not in this one.
    pub departed: Vec<MemberId>,
}

impl GroupView {
    /// The rank of a member, 0 for the oldest.
    pub fn rank(&self, member: &MemberId) -> Option<usize> {
        self.members.iter().position(|m| m == member)
    }

    /// The oldest member.
    pub fn leader(&self) -> Option<&MemberId> {
        self.members.first()
    }
}

/// How a multicast is ordered.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// fbcast: with respect to the other fbcasts of its sender.
    Fifo,
    /// cbcast: after every message of its causal thread that its sender had delivered or sent before.
    Causal(ThreadId),
    /// abcast: in one order at all members, which respects causality within the thread.
    Total(ThreadId),
    /// gbcast: as a change of the view is, between the same messages at all members.
    View,
}

/// When a multicast counts as done for its sender.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stability {
    /// When this many other members hold it (at most as many as there are).
    Held(u8),
    /// When every member holds it.
    All,
}

/// How many replies a call waits for.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Want {
    /// The first.
    One,
    /// This many.
    Number(u16),
    /// One of each member of the view in which it was sent.
    All,
}

/// A call that a message makes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calling {
    /// The caller's number for it.
    pub call: u64,
    /// Replies wanted.
    pub want: Want,
    /// How long they are waited for, in microseconds; 0: without end.
    pub timeout_us: u64,
}

/// A message for a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Multicast {
    /// Its order.
    pub order: Order,
    /// What is sent.
    pub body: Bytes,
    /// Deliver it nowhere before half of the other members hold it: what anyone has delivered then outlives the failure of
    /// fewer than half of them. Costs a round trip.
    pub safe: bool,
    /// Tell the sender, under its number, when the message is stable.
    pub done: Option<(u64, Stability)>,
    /// Ask for replies.
    pub calling: Option<Calling>,
}

impl Multicast {
    /// A message in this order, without further wishes.
    pub fn new(order: Order, body: impl Into<Bytes>) -> Self {
        Self {
            order,
            body: body.into(),
            safe: false,
            done: None,
            calling: None,
        }
    }
}

/// Names a call at those who may answer it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CallRef {
    /// Who asks.
    pub caller: MemberId,
    /// Its number.
    pub call: u64,
}

/// What a process asks of its core.
#[derive(Clone, Debug)]
pub enum Command {
    /// Join the group of this name, or found it. [`GroupEvent::Joined`] or [`Output::CannotJoin`] follows.
    Join {
        /// The name, at most [`NAME_BYTES_MAX`] bytes.
        group: String,
    },
    /// Leave a group, when what this member sent is held by all.
    Leave {
        /// Which.
        group: GroupId,
    },
    /// Make another member leave.
    Expel {
        /// From which group.
        group: GroupId,
        /// Whom.
        member: MemberId,
    },
    /// Send to a group.
    Multicast {
        /// Which.
        group: GroupId,
        /// What.
        message: Multicast,
    },
    /// Send to one member, FIFO among what is sent to it.
    Send {
        /// The group that both are members of.
        group: GroupId,
        /// To whom.
        to: MemberId,
        /// What.
        body: Bytes,
    },
    /// Answer a call; `None` says that no answer will come.
    Reply {
        /// The group.
        group: GroupId,
        /// The call.
        to: CallRef,
        /// The answer.
        body: Option<Bytes>,
    },
    /// Donor: the state that [`GroupEvent::StateWanted`] asked for.
    State {
        /// The group.
        group: GroupId,
        /// At the beginning of which view.
        view: u64,
        /// The state, in order. Every member makes the same bytes of the same state, or a second donor begins anew.
        segments: Vec<Bytes>,
    },
    /// The program does not keep up (`true`): take no more messages of this group until it does (`false`).
    Pause {
        /// The group.
        group: GroupId,
        /// Whether to.
        paused: bool,
    },
    /// Leave everything; [`Output::Outside`] follows.
    Stop,
}

/// A group's name is at most this long.
pub const NAME_BYTES_MAX: usize = 200;
/// A group has at most this many members.
pub const MEMBERS_MAX: usize = 250;
/// One process is a member of at most this many groups.
pub const GROUPS_MAX: usize = 10_000;

/// Why a command was refused.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refused {
    /// Not a member of such a group (any more).
    #[error("not a member of this group")]
    NotAMember,
    /// Too much is on its way; wait for [`GroupEvent::Room`].
    #[error("too much is on its way")]
    Backlog,
    /// The message is larger than an event may be.
    #[error("the message is too large")]
    TooLarge,
    /// The name is empty or too long, or the process is in too many groups, or in this one already.
    #[error("this group cannot be joined")]
    CannotJoin,
    /// Nobody asked for it.
    #[error("nobody asked for it")]
    NotWanted,
}

/// A message that a group delivers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its sender.
    pub from: MemberId,
    /// Its order; `None`: it was sent to this member alone.
    pub order: Option<Order>,
    /// What was sent.
    pub body: Bytes,
    /// The call to answer with [`Command::Reply`].
    pub call: Option<CallRef>,
}

/// What happens in a group, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupEvent {
    /// This process is a member. First of all events.
    Joined {
        /// The name that it asked for.
        name: String,
    },
    /// This member is the first: the state is whatever it begins with.
    Init,
    /// The state at the beginning of the view that follows. It comes again, in place of the one before, to a member that had
    /// just got it from others who are all gone.
    State(Bytes),
    /// A view begins. All messages of the view before were delivered, and none of this one.
    View(GroupView),
    /// A message.
    Message(Message),
    /// Give the state as it is at this place in the order of events, with [`Command::State`].
    StateWanted {
        /// The view that begins next.
        view: u64,
    },
    /// Progress of the state that is on its way here: not in order with the others.
    Progress {
        /// Bytes that have come.
        received: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A reply to a call of this member.
    Reply {
        /// The call.
        call: u64,
        /// Who answered.
        from: MemberId,
        /// The answer.
        body: Bytes,
    },
    /// No more replies come.
    CallDone {
        /// The call.
        call: u64,
        /// Those who departed without an answer.
        failed: Vec<MemberId>,
        /// Whether the time was over first.
        timed_out: bool,
    },
    /// A message is as stable as was asked for.
    Done {
        /// The sender's number for it.
        number: u64,
    },
    /// There is room for messages again.
    Room,
    /// This member is out; the last of all events.
    Left {
        /// Whether by its own wish.
        wished: bool,
    },
}

/// What a process asks of its driver. Execute in order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Output {
    /// As [`crate::Output::Send`].
    Send {
        /// Receivers.
        to: Arc<[MemberId]>,
        /// Bodies; all but the last are of equal size.
        bodies: Vec<Bytes>,
    },
    /// Something for the coordinator, answered by [`RegistryReply`].
    Registry(Request),
    /// As [`crate::Output::Instance`].
    Instance(u128),
    /// The view of sites changed: keys are rotated.
    Epoch {
        /// The view's number.
        view_id: u64,
        /// The processes that take part.
        sites: Vec<MemberId>,
    },
    /// Something happened in a group.
    Group {
        /// Which.
        group: GroupId,
        /// What.
        event: GroupEvent,
    },
    /// There is no room in the group of this name, or for another group.
    CannotJoin {
        /// The name.
        name: String,
    },
    /// For the log.
    Notice(Notice),
    /// This life is over, and its memberships with it (each has been told): make a new process with a new incarnation.
    Outside,
}

/// A request to the coordinator, as the outputs of [`crate::Core`] that have these names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Read the group's znode.
    ReadView,
    /// Write it on a condition.
    CompareAndSet {
        /// The version that it must have; `None`: it must not exist.
        expected_version: Option<i32>,
        /// New contents.
        value: Bytes,
    },
    /// Read the lease node.
    ReadLease,
    /// Write the lease node if the view's version is this one.
    RenewLease {
        /// The version.
        view_version: i32,
        /// New contents.
        value: Bytes,
    },
}

impl Request {
    /// The answer when the coordinator cannot be reached.
    pub fn unknown(&self) -> RegistryReply {
        use crate::output::{CasResult, ReadResult};
        match self {
            Self::ReadView => RegistryReply::View(ReadResult::Unknown),
            Self::CompareAndSet { .. } => RegistryReply::Cas(CasResult::Unknown),
            Self::ReadLease => RegistryReply::Lease(ReadResult::Unknown),
            Self::RenewLease { .. } => RegistryReply::Renew(CasResult::Unknown),
        }
    }
}

/// Times and bounds of a process's groups, beside those of [`crate::Config`].
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// The site group.
    pub core: crate::Config,
    /// Bytes that a member may have on their way to a group, sent and not held by all, or not sent yet.
    pub backlog_bytes_max: u64,
    /// The same over all groups of the process. One that has nothing on its way to a group may always send it one message.
    pub total_backlog_bytes_max: u64,
    /// Bytes that the process may have sent that not all hold, over all its groups; the groups send in turn. What has had no
    /// acknowledgement for long is not counted: it is lost, or somebody does not take it.
    pub total_flight_bytes_max: u64,
    /// A member that holds up a full window for this long is made to leave. `None`: never.
    pub slow_after: Option<Duration>,
}

impl ProcessConfig {
    /// The defaults: 8 MiB of backlog, 64 MiB over all groups, of which 256 KiB are on their way; slow members leave after five
    /// seconds.
    pub fn new(core: crate::Config) -> Self {
        Self {
            core,
            backlog_bytes_max: 8 << 20,
            total_backlog_bytes_max: 64 << 20,
            // What one group may have on its way, and a burst: it does not feel this bound when it is alone.
            total_flight_bytes_max: 256 << 10,
            slow_after: Some(Duration::from_secs(5)),
        }
    }
}
