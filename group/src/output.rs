//! What goes into the core and what comes out of it.

use crate::time::Instant;
use crate::view::{MemberId, View, ViewId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use thiserror::Error;

/// How fit a replica is to lead; reported with every sign of life, ranked at a view change.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Input bytes that this replica's server has not taken yet.
    pub behind_bytes: u64,
    /// The replica knows of itself that its server cannot serve (dead, diverged, catching up), or that its
    /// service interface is without carrier.
    pub unfit: bool,
    /// The replica could serve and is asked not to lead (maintenance): it leads only where no fit one is willing.
    pub reluctant: bool,
}

/// What this member is in the installed view.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It numbers the events and speaks to clients, under its lease.
    Leader,
    /// It follows, and can take over.
    Backup,
    /// It receives a checkpoint and events and is not counted yet.
    Joining,
}

/// A view as it is installed here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The view.
    pub view: View,
    /// What this member is in it.
    pub role: Role,
    /// All events up to this one, and none beyond, were delivered before this output (a joining member's
    /// checkpoint holds them). The view's first event is `cut + 1`.
    pub cut: u64,
    /// Service clock to start from, in microseconds.
    pub clock_us: u64,
    /// Whether the state that this member holds goes on. False: nothing is known, and no connection lives (the
    /// first view of a generation), or the state is yet to come (joining).
    pub survivor: bool,
}

/// Things worth telling the operator; none needs an action by the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A member was silent for too long, or its control connection ended.
    Suspected {
        /// Who.
        member: MemberId,
        /// Its death is proved, not only suspected.
        proved: bool,
    },
    /// The view is being left; no new events until the next.
    ViewChange {
        /// The view that is being left.
        from: ViewId,
    },
    /// All state of the old generation was lost; connections with it.
    TotalFailure {
        /// The new generation.
        generation: u32,
    },
    /// A joining member fell too far behind and must join anew.
    JoinerDropped {
        /// Who.
        member: MemberId,
    },
    /// The leader's lease ran out; nothing is emitted until it holds again.
    LeaseLost,
    /// The znode cannot be read as a view.
    DamagedView,
}

/// What the core asks of its driver. Execute in order.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Output {
    /// Send these datagram bodies, encrypted once, to each of these members. All but the last are of equal size.
    Send {
        /// Receivers; never this member.
        to: Arc<[MemberId]>,
        /// Plaintext bodies.
        bodies: Vec<Bytes>,
    },
    /// Backup or joiner: the next event, in order. The leader's own events are not given back to it.
    Deliver {
        /// The event's number.
        number: u64,
        /// What was multicast.
        payload: Bytes,
    },
    /// Leader: all events up to this number are held by `k` backups. Everyone, after `Install`: the cut is stable.
    Stable {
        /// The highest stable number.
        number: u64,
    },
    /// The installed view is being left: a leader shuts its fence now, before the outputs that follow.
    Wedged,
    /// A view begins.
    Install(Box<Installed>),
    /// This incarnation is out, for good: close all upstream connections and make a new core with a new incarnation.
    Outside,
    /// The group's instance id is known: keys for sending and receiving can be derived.
    Instance(u128),
    /// Read the group's znode, linearizably. Answer with [`RegistryReply::View`].
    ReadView,
    /// Write the group's znode if its version is this one (`None`: create it). Answer with [`RegistryReply::Cas`].
    CompareAndSet {
        /// The version that the znode must have.
        expected_version: Option<i32>,
        /// New contents.
        value: Bytes,
    },
    /// Read the lease node, linearizably. Answer with [`RegistryReply::Lease`].
    ReadLease,
    /// Write the lease node, whatever its version (create it if absent), on condition that the view znode has this
    /// version, in one transaction. Answer with [`RegistryReply::Renew`].
    RenewLease {
        /// The version that the view znode must have.
        view_version: i32,
        /// New contents of the lease node.
        value: Bytes,
    },
    /// Leader, right after `Install`: give a checkpoint of the state exactly at this view's cut, before anything else
    /// is done, with [`Command::Checkpoint`], or its length with [`Command::CheckpointBegin`].
    CheckpointWanted {
        /// For whom.
        joiner: MemberId,
        /// At which view's cut.
        view_id: ViewId,
    },
    /// Leader: give the part of a begun checkpoint that begins there, when it is at hand, with
    /// [`Command::CheckpointPart`].
    CheckpointPartWanted {
        /// For whom.
        joiner: MemberId,
        /// Position of its first byte.
        offset: u64,
    },
    /// Joiner: the next piece of the checkpoint, in order.
    CheckpointChunk {
        /// Position of the first byte.
        offset: u64,
        /// Length of the whole checkpoint.
        total: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Joiner: the checkpoint is complete; the events after it follow.
    CheckpointDone,
    /// A message of the unicast channel arrived.
    Unicast {
        /// Its sender.
        from: MemberId,
        /// What was sent.
        payload: Bytes,
    },
    /// For log and status.
    Notice(Notice),
}

/// The outcome of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadResult {
    /// The node exists.
    Value {
        /// Its contents.
        value: Bytes,
        /// Its version.
        version: i32,
    },
    /// There is no such node.
    Absent,
    /// The read failed; it may be tried again.
    Unknown,
}

/// The outcome of a conditional write.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum CasResult {
    /// Written; the node now has this version.
    Written {
        /// The version after the write.
        version: i32,
    },
    /// Not written: the version was another, or the node existed already, or did not.
    BadVersion,
    /// Perhaps written, perhaps not, perhaps later.
    Unknown,
}

/// The coordinator's answers. Each request gets exactly one, `Unknown` when the driver gives up waiting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryReply {
    /// To `ReadView`.
    View(ReadResult),
    /// To `CompareAndSet`.
    Cas(CasResult),
    /// To `ReadLease`.
    Lease(ReadResult),
    /// To `RenewLease`.
    Renew(CasResult),
}

/// What the control connections tell.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ControlEvent {
    /// The peer proved, in answer to a challenge sent at `since`, that this incarnation holds its listener.
    Connected {
        /// Who is there.
        incarnation: u128,
        /// When the challenge was sent.
        since: Instant,
    },
    /// The control connection to the peer ended.
    Ended {
        /// When the driver learnt of it; an attempt that begins then or later counts as one after the end.
        at: Instant,
    },
    /// A connection attempt begun at `since` was refused: nobody holds the peer's listener.
    Refused {
        /// When the attempt began.
        since: Instant,
    },
}

/// What the node asks of the core.
#[derive(Clone, Debug)]
pub enum Command {
    /// Take part: found the group or join it. Once per core.
    Join,
    /// Leave for good, handing over first when leading. `Outside` follows.
    Leave,
    /// Leader: let another lead, and follow it.
    HandOver {
        /// The full member that shall lead, by name; it is passed over only if it does not answer. `None`: the fittest.
        to: Option<String>,
    },
    /// Joiner: the checkpoint is restored and later events are being applied.
    ReadyToBeFull,
    /// Leader: the checkpoint that `CheckpointWanted` asked for.
    Checkpoint {
        /// For whom.
        joiner: MemberId,
        /// The image, in order.
        segments: Vec<Bytes>,
    },
    /// The same, where the image is not in memory as a whole: its parts are asked for one after the other.
    CheckpointBegin {
        /// For whom.
        joiner: MemberId,
        /// Length of the image, in bytes.
        total: u64,
    },
    /// Leader: the part that `CheckpointPartWanted` asked for, of any length above 0. What exceeds the image is cut off.
    CheckpointPart {
        /// For whom.
        joiner: MemberId,
        /// The bytes.
        bytes: Bytes,
    },
    /// Leader: the rest of a checkpoint cannot be given. The joiner is left out, and joins anew.
    CheckpointFailed {
        /// For whom it was.
        joiner: MemberId,
    },
}

/// Why a command was refused.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommandError {
    /// Only the leader of an installed, unwedged view can do this.
    #[error("this member does not lead an installed view")]
    NotLeading,
    /// Only a joining member can do this.
    #[error("this member is not joining")]
    NotJoining,
    /// This core has been told to join before, or has left.
    #[error("this core has already joined")]
    AlreadyJoined,
    /// There is nobody to hand over to.
    #[error("no other full member")]
    Alone,
    /// The member named is not another full member of the view.
    #[error("no such full member beside the leader")]
    NoSuchMember,
    /// No such joiner waits for a checkpoint, or for a part of it.
    #[error("no such joiner waits for a checkpoint, or for a part of it")]
    NoSuchJoiner,
}

/// Counters of one core, monotone.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Datagram bodies that could not be read.
    pub malformed: u64,
    /// Datagrams of a view that is not this one.
    pub wrong_view: u64,
    /// Datagrams from an incarnation that is not in the view.
    pub stranger: u64,
    /// Datagrams sent again because somebody missed them.
    pub retransmitted: u64,
    /// Requests for missing events sent.
    pub naks_sent: u64,
    /// Views installed.
    pub views: u64,
    /// Wedges promised.
    pub wedges: u64,
    /// Suspicions that the leader's next word disproved.
    pub false_suspicions: u64,
}

/// One member as this one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Who.
    pub member: MemberId,
    /// Full, or joining.
    pub full: bool,
    /// Highest event it is known to hold (leader's view; 0 elsewhere).
    pub held: u64,
    /// What it last reported of itself.
    pub lag: Lag,
    /// When it was last heard (leader: everyone; backup: the leader).
    pub last_heard: Option<Instant>,
}

/// A snapshot for status and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// The installed view.
    pub view: Option<View>,
    /// The role in it; `None` outside.
    pub role: Option<Role>,
    /// The view is being left.
    pub wedged: bool,
    /// Members of the view.
    pub members: Vec<MemberStatus>,
    /// Highest event held here.
    pub held: u64,
    /// Highest event known to be stable (leader), or the cut.
    pub stable: u64,
    /// Bytes retained because somebody may not hold them.
    pub retained_bytes: u64,
    /// Until when a leader may emit.
    pub lease_until: Option<Instant>,
    /// Counters.
    pub counters: Counters,
    /// Progress of the checkpoint transfers, bytes acknowledged so far by joiner (leader) or received (joiner).
    pub transfers: BTreeMap<MemberId, u64>,
}
