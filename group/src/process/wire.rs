//! Datagrams between members of a group, and what is inside the messages of a lane.
//!
//! A lane is what one member sends, in order: to all members of a view (the multicast lane), or to one (a direct lane). Its
//! messages travel in the chunks of [`crate::wire`].

use super::types::{Calling, GroupId, ThreadId};
use super::vclock::VClock;
use crate::view::MemberId;
use crate::wire::{self, NUMBER_MAX, Pos};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// The first byte of each body; the site core's is 1.
pub(crate) const FORMAT: u8 = 2;
/// Bytes of [`Header`].
pub(crate) const HEADER_BYTES: usize = 3 + 5 * 8;
/// Not a rank: the direct lane of messages from the datagram's sender to its receiver.
pub(crate) const DIRECT: u8 = u8::MAX;
/// Not a rank: the direct lane of replies, which a program that takes no messages hears all the same.
pub(crate) const REPLIES: u8 = u8::MAX - 1;

/// The sender waits for this: acknowledge at once.
pub(crate) const URGENT: u8 = 1;
/// The sender has reported for the end of the view: what it acknowledges may lie beyond the cut. It fills no window, and
/// vouches for nothing.
pub(crate) const BLOCKED: u8 = 4;
/// Not of a member to a member, but of the site leader: see [`Small::Fetch`].
pub(crate) const FROM_LEADER: u8 = 2;

/// What every datagram says.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    /// Whose multicast lane the chunks are of, by rank; or [`DIRECT`] or [`REPLIES`].
    pub(crate) lane: u8,
    pub(crate) group: u64,
    pub(crate) view: u64,
    /// The sender's multicast lane: the highest message that it has sent in whole (0: not said).
    pub(crate) sent: u64,
    /// The highest that half of the others hold.
    pub(crate) stable: u64,
    /// The highest that all hold.
    pub(crate) trim: u64,
}

impl Header {
    /// Whether this is about a lane between two members.
    pub(crate) fn is_direct(&self) -> bool {
        self.lane >= REPLIES
    }

    pub(crate) fn bytes(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&[FORMAT, self.flags, self.lane]);
        for n in [self.group, self.view, self.sent, self.stable, self.trim] {
            out.put_u64_le(n);
        }
        out
    }

    /// The header, and the items after it.
    pub(crate) fn read(mut body: &[u8]) -> Option<(Self, &[u8])> {
        if body.len() < HEADER_BYTES || body.get_u8() != FORMAT {
            return None;
        }
        let header = Self {
            flags: body.get_u8(),
            lane: body.get_u8(),
            group: body.get_u64_le(),
            view: body.get_u64_le(),
            sent: body.get_u64_le(),
            stable: body.get_u64_le(),
            trim: body.get_u64_le(),
        };
        let plausible = header.sent.max(header.stable).max(header.trim) <= NUMBER_MAX;
        plausible.then_some((header, body))
    }
}

/// What a member lacks: a lane, up to which number, and the rank of one that holds it.
pub(crate) type Lack = (u8, u64, u8);

/// Everything that is small.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Small {
    /// Of these multicast lanes (by rank) this is held. Meant for the lane's sender; others pass over it.
    Acks(Vec<(u8, u64)>),
    /// Of the header's direct lane, from the receiver of this datagram, this is held.
    DirectAck(u64),
    /// Of the header's lane these ranges are missing.
    Nak(Vec<(Pos, Pos)>),
    /// The site leader: get the lanes that you lack from these members (lane, up to, holder's rank), so that the view can end.
    Fetch { epoch: u64, wants: Vec<Lack> },
    /// Joiner: this part of the state at the beginning of view `since`, if its checksum is this one.
    StateWanted {
        since: u64,
        offset: u64,
        len: u32,
        image: Option<u32>,
    },
    /// Donor: the state has this checksum.
    StateIs { since: u64, image: u32 },
}

impl wire::Small for Small {
    fn is_plausible(&self) -> bool {
        match self {
            Self::Nak(ranges) => ranges
                .iter()
                .all(|(a, b)| a.number.max(b.number) <= NUMBER_MAX),
            Self::Fetch { wants, .. } => wants.iter().all(|(_, until, _)| *until <= NUMBER_MAX),
            // Held is compared with what was sent; an offset with what there is.
            Self::Acks(_)
            | Self::DirectAck(_)
            | Self::StateWanted { .. }
            | Self::StateIs { .. } => true,
        }
    }
}

/// An envelope without large stamps fits.
const ENVELOPE_BYTES: usize = 64;

/// What stands before the body of a message in a lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub(crate) kind: Kind,
    pub(crate) safe: bool,
    pub(crate) call: Option<Calling>,
}

/// What a lane carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// fbcast.
    Fifo,
    /// cbcast.
    Causal { thread: ThreadId, stamp: VClock },
    /// abcast: to be ordered by the token's holder.
    Total { thread: ThreadId, stamp: VClock },
    /// The token's holder: these abcasts come next, the first of them having this index. The token goes to that rank.
    Sequence {
        first: u64,
        ids: Vec<TotalId>,
        token: Option<u8>,
    },
    /// gbcast: delivered at the end of the view if the ledger says so.
    View,
    /// Direct: a message for this member alone.
    Direct,
    /// Direct: the reply to a call; without one when `declined`.
    Reply { call: u64, declined: bool },
}

/// An abcast: the sender's rank, its thread, and the sender's count in that thread.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct TotalId {
    pub(crate) sender: u8,
    pub(crate) thread: ThreadId,
    pub(crate) count: u64,
}

impl Envelope {
    pub(crate) fn put(&self, body: &[u8]) -> Bytes {
        // One allocation, of the exact size: it is the one that datagrams are packed from.
        let mut small = [0; ENVELOPE_BYTES];
        let large;
        let head: &[u8] = match postcard::to_slice(self, &mut small) {
            Ok(head) => head,
            Err(_) => {
                large = postcard::to_stdvec(self).expect("an envelope has no unserialisable part");
                &large
            }
        };
        let mut out = Vec::with_capacity(head.len() + body.len());
        out.extend_from_slice(head);
        out.extend_from_slice(body);
        Bytes::from(out)
    }

    /// The envelope and the body; `None` for what is not one.
    pub(crate) fn take(message: &Bytes) -> Option<(Self, Bytes)> {
        let (envelope, rest): (Self, &[u8]) = postcard::take_from_bytes(message).ok()?;
        let body = message.slice(message.len() - rest.len()..);
        Some((envelope, body))
    }
}

/// What a process says to the site leader, in the unicast channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToLeader {
    /// Put these into the ledger; the first has this number among the sender's.
    Requests { first: u64, ops: Vec<Op> },
    /// What this member holds of each lane of views that are being left.
    Reports(Vec<Report>),
}

/// What a member holds of each lane of a view that is being left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) group: GroupId,
    pub(crate) epoch: u64,
    pub(crate) held: Vec<u64>,
}

/// A change of the ledger that a process asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Op {
    Join {
        name: String,
    },
    Leave {
        group: GroupId,
    },
    Expel {
        group: GroupId,
        member: MemberId,
    },
    /// The message `number` of the sender's lane in view `view` is a gbcast.
    Gbcast {
        group: GroupId,
        view: u64,
        number: u64,
    },
    /// The sender, a joiner, has the state at the beginning of view `since`.
    Loaded {
        group: GroupId,
        since: u64,
    },
}

/// An entry of the ledger's log: an event of the site group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Entry {
    /// Of the leader of a new view of sites: these take part.
    Sites(Vec<MemberId>),
    /// Of a process.
    Asked { by: MemberId, number: u64, op: Op },
    /// Every survivor holds all lanes up to here: the view ends.
    Cut {
        group: GroupId,
        epoch: u64,
        cut: Vec<u64>,
    },
}
