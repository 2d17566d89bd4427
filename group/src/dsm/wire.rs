//! What the processes of a region tell each other: a version, then postcard.

use super::vector::Vector;
use super::{BarrierId, Diff, LockId};
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of the messages; the first byte of each.
pub(super) const FORMAT: u8 = 1;

/// A part of what one process wrote up to a release: sent by fbcast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Update {
    /// One more than in the sender's update before; the first has 1.
    pub(super) number: u64,
    /// The release has no further part: what was held back may be applied, all of it or nothing.
    pub(super) last: bool,
    /// Updates of others that come before this one. Only the first part of a release names any.
    pub(super) after: Vector,
    /// What changed.
    pub(super) diffs: Vec<Diff>,
}

/// What all processes see in one order: sent by abcast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ordered {
    /// The sender queues for a lock.
    Request { lock: LockId },
    /// The holder passes a lock on; who gets it must first have applied `path`.
    Release { lock: LockId, path: Vector },
    /// The sender has come to a barrier; who passes must first have applied `path`.
    Arrive { barrier: BarrierId, path: Vector },
}

pub(super) fn encode<T: Serialize>(message: &T) -> Bytes {
    let out = postcard::to_extend(message, vec![FORMAT])
        .expect("a message has no unserialisable part and memory for it was there");
    out.into()
}

/// `None` for what we did not write, and for what has something behind it.
pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (&FORMAT, rest) = bytes.split_first()? else {
        return None;
    };
    match postcard::take_from_bytes(rest) {
        Ok((message, [])) => Some(message),
        _ => None,
    }
}
