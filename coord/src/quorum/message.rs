//! The engine's messages in our own types: protobuf is never parsed from the network.

use bytes::Bytes;
use raft::eraftpb as pb;
use serde::{Deserialize, Serialize};

use super::{Conf, EntryKind, LogEntry, SnapshotImage};

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $name:ident = $engine:ident;)+) => {
        /// What a [`RaftMessage`] is. Messages that a server sends to itself are not spelled here,
        /// so that none can come over the network.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum RaftMessageKind {
            $($(#[doc = $doc])+ $name,)+
        }

        impl RaftMessageKind {
            pub(super) fn engine(self) -> pb::MessageType {
                match self {
                    $(Self::$name => pb::MessageType::$engine,)+
                }
            }

            fn from_engine(kind: pb::MessageType) -> Option<Self> {
                match kind {
                    $(pb::MessageType::$engine => Some(Self::$name),)+
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// Entries for a follower.
    Append = MsgAppend;
    /// A follower's answer to `Append` and `Snapshot`.
    AppendResponse = MsgAppendResponse;
    /// A candidate asks for a vote.
    RequestVote = MsgRequestVote;
    /// The answer.
    RequestVoteResponse = MsgRequestVoteResponse;
    /// An image of the state machine for a follower that is too far behind.
    Snapshot = MsgSnapshot;
    /// The leader is alive.
    Heartbeat = MsgHeartbeat;
    /// So is the follower.
    HeartbeatResponse = MsgHeartbeatResponse;
    /// A follower passes on the wish to change the leader.
    TransferLeader = MsgTransferLeader;
    /// The leader asks a follower to take over.
    TimeoutNow = MsgTimeoutNow;
    /// A follower asks for a read barrier.
    ReadIndex = MsgReadIndex;
    /// The answer.
    ReadIndexResponse = MsgReadIndexResp;
    /// Would you vote for me?
    RequestPreVote = MsgRequestPreVote;
    /// The answer.
    RequestPreVoteResponse = MsgRequestPreVoteResponse;
}

impl RaftMessageKind {
    /// Whether it states something that must not be forgotten, so that it waits for the disk: a
    /// vote (given, or asked for: a candidate votes for itself) or the acknowledgement of entries.
    /// Heartbeats and their answers never wait.
    pub(super) fn promises(self) -> bool {
        match self {
            Self::AppendResponse | Self::RequestVote | Self::RequestVoteResponse => true,
            Self::Append
            | Self::Snapshot
            | Self::Heartbeat
            | Self::HeartbeatResponse
            | Self::TransferLeader
            | Self::TimeoutNow
            | Self::ReadIndex
            | Self::ReadIndexResponse
            | Self::RequestPreVote
            | Self::RequestPreVoteResponse => false,
        }
    }
}

/// A message between two engines. The fields are raft's, and mean what its paper says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftMessage {
    /// What it is.
    pub kind: RaftMessageKind,
    /// Receiver.
    pub to: u64,
    /// Sender.
    pub from: u64,
    /// The sender's term (of a pre-vote: the term it would have). 0 for what has none.
    pub term: u64,
    /// Term of the entry at `index`.
    pub log_term: u64,
    /// An index.
    pub index: u64,
    /// Entries after `index`.
    pub entries: Vec<LogEntry>,
    /// The sender's commit index.
    pub commit: u64,
    /// Its term.
    pub commit_term: u64,
    /// With `Snapshot` alone.
    pub snapshot: Option<SnapshotImage>,
    /// The index from which a follower asks for a snapshot.
    pub request_snapshot: u64,
    /// An answer that says no.
    pub reject: bool,
    /// Where the follower's log ends.
    pub reject_hint: u64,
    /// Ties an answer to its question.
    pub context: Bytes,
    /// Election priority.
    pub priority: i64,
}

/// The engine counts entries by their type and reads what they change only when they are proposed:
/// then it wants to see a change, and server 0 is the one that it passes over. What is really
/// changed stands in the entry's context, in our own words.
pub(super) fn change_marker() -> pb::ConfChangeV2 {
    let mut change = pb::ConfChangeSingle::default();
    change.set_change_type(pb::ConfChangeType::AddNode);
    let mut marker = pb::ConfChangeV2::default();
    marker.set_changes(vec![change].into());
    marker
}

pub(super) fn entry_to_engine(entry: LogEntry) -> pb::Entry {
    let mut engine = pb::Entry {
        index: entry.index,
        term: entry.term,
        ..Default::default()
    };
    match entry.kind {
        EntryKind::Normal => engine.data = entry.data,
        EntryKind::Membership => {
            engine.set_entry_type(pb::EntryType::EntryConfChangeV2);
            engine.context = entry.data;
        }
    }
    engine
}

pub(super) fn entry_from_engine(entry: &pb::Entry) -> LogEntry {
    let (kind, data) = match entry.get_entry_type() {
        pb::EntryType::EntryNormal => (EntryKind::Normal, &entry.data),
        _ => (EntryKind::Membership, &entry.context),
    };
    LogEntry {
        index: entry.index,
        term: entry.term,
        kind,
        data: data.clone(),
    }
}

pub(super) fn conf_to_engine(conf: &Conf) -> pb::ConfState {
    pb::ConfState {
        voters: conf.voters.iter().copied().collect(),
        learners: conf.learners.iter().copied().collect(),
        ..pb::ConfState::default()
    }
}

pub(super) fn conf_from_engine(conf: &pb::ConfState) -> Conf {
    Conf {
        voters: conf.voters.iter().copied().collect(),
        learners: conf.learners.iter().copied().collect(),
    }
}

pub(super) fn image_to_engine(image: SnapshotImage) -> pb::Snapshot {
    let mut engine = pb::Snapshot::default();
    let meta = engine.mut_metadata();
    meta.index = image.index;
    meta.term = image.term;
    meta.set_conf_state(conf_to_engine(&image.conf));
    engine.data = image.data;
    engine
}

pub(super) fn image_from_engine(snapshot: &pb::Snapshot) -> SnapshotImage {
    let meta = snapshot.get_metadata();
    SnapshotImage {
        index: meta.index,
        term: meta.term,
        conf: conf_from_engine(meta.get_conf_state()),
        data: snapshot.data.clone(),
    }
}

impl RaftMessage {
    /// `None` for what the engine sends to itself.
    pub(super) fn from_engine(mut message: pb::Message) -> Option<Self> {
        Some(Self {
            kind: RaftMessageKind::from_engine(message.get_msg_type())?,
            to: message.to,
            from: message.from,
            term: message.term,
            log_term: message.log_term,
            index: message.index,
            entries: message.entries.iter().map(entry_from_engine).collect(),
            commit: message.commit,
            commit_term: message.commit_term,
            snapshot: (!message.get_snapshot().is_empty())
                .then(|| image_from_engine(message.get_snapshot())),
            request_snapshot: message.request_snapshot,
            reject: message.reject,
            reject_hint: message.reject_hint,
            context: message.take_context(),
            priority: message.priority,
        })
    }

    pub(super) fn into_engine(self) -> pb::Message {
        let mut message = pb::Message::default();
        message.set_msg_type(self.kind.engine());
        message.to = self.to;
        message.from = self.from;
        message.term = self.term;
        message.log_term = self.log_term;
        message.index = self.index;
        message.entries = self
            .entries
            .into_iter()
            .map(entry_to_engine)
            .collect::<Vec<_>>()
            .into();
        message.commit = self.commit;
        message.commit_term = self.commit_term;
        if let Some(image) = self.snapshot {
            message.set_snapshot(image_to_engine(image));
        }
        message.request_snapshot = self.request_snapshot;
        message.reject = self.reject;
        message.reject_hint = self.reject_hint;
        message.context = self.context;
        message.priority = self.priority;
        message
    }
}
