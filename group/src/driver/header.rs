//! What stands in the clear in front of each sealed body. All of it is authenticated with the body.
//!
//! ```text
//!   0 version | 1 lane | 2 sender | 3.. group u32 | 7.. incarnation u128 | 23.. epoch u64 | 31.. counter u64
//! ```
//! Numbers are little-endian. `sender` is the rank of its name among the configured members.

use super::seal::TAG_BYTES;

/// Raised with every change to what stands in a datagram or how it is sealed.
///
/// A node speaks this version alone until there is a release. From then on it opens its predecessor's version too, and sends
/// that until every member of the view has shown, by a datagram of the newer one, that it opens it; so a cluster is upgraded
/// node by node, one version at a time. What is of neither version is dropped, and counted apart from damage.
const VERSION: u8 = 2;
/// The only lane so far; a node with several data-plane shards will number them.
const LANE: u8 = 0;
/// Bytes of a [`Header`].
pub(super) const HEADER_BYTES: usize = 39;
/// Bytes that a datagram has besides its body.
pub(super) const OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) rank: u8,
    pub(super) group: u32,
    pub(super) incarnation: u128,
    pub(super) epoch: u64,
    pub(super) counter: u64,
}

impl Header {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[VERSION, LANE, self.rank]);
        out.extend_from_slice(&self.group.to_le_bytes());
        out.extend_from_slice(&self.incarnation.to_le_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.counter.to_le_bytes());
    }

    /// Whether a datagram is of a version that this node does not speak.
    pub(super) fn is_of_another_version(datagram: &[u8]) -> bool {
        datagram.first().is_some_and(|v| *v != VERSION)
    }

    /// The header of a datagram; `None` if it is of another version or lane, or too short for any body.
    pub(super) fn of(datagram: &[u8]) -> Option<Self> {
        if datagram.len() < OVERHEAD_BYTES || datagram[..2] != [VERSION, LANE] {
            return None;
        }
        let mut rest = &datagram[3..HEADER_BYTES];
        let header = Self {
            rank: datagram[2],
            group: u32::from_le_bytes(take(&mut rest)),
            incarnation: u128::from_le_bytes(take(&mut rest)),
            epoch: u64::from_le_bytes(take(&mut rest)),
            counter: u64::from_le_bytes(take(&mut rest)),
        };
        Some(header)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest
        .split_first_chunk()
        .expect("the length has been checked");
    *rest = tail;
    *head
}
