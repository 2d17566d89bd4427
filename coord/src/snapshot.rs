//! The state as bytes: what a snapshot on disk and on the wire holds.
//!
//! ```text
//! "UBCS" | version u16 | reserved u16 | crc32c of the rest u32 | postcard of the state
//! ```

use bytes::Bytes;
use thiserror::Error;

use crate::txn::State;

const MAGIC: [u8; 4] = *b"UBCS";
const VERSION: u16 = 1;
const HEAD: usize = 12;

/// Why bytes are not a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not a snapshot at all, or cut off.
    #[error("not a snapshot")]
    NotASnapshot,
    /// Written by another version of this program.
    #[error("snapshot version {0} is not known")]
    Version(u16),
    /// The checksum does not match.
    #[error("the snapshot's checksum does not match: it is damaged")]
    Damaged,
}

/// Writes the state down.
#[must_use]
pub fn encode(state: &State) -> Bytes {
    let mut without = None;
    if planted!(SnapshotWithoutSessions) {
        without = Some(State {
            sessions: [].into(),
            ..state.clone()
        });
    }
    let state = without.as_ref().unwrap_or(state);
    let mut bytes = vec![0; HEAD];
    bytes = postcard::to_extend(state, bytes).expect("a vector takes everything");
    let crc = crc32c::crc32c(&bytes[HEAD..]);
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes.into()
}

/// Reads it back.
///
/// # Errors
/// [`SnapshotError`].
pub fn decode(bytes: &[u8]) -> Result<State, SnapshotError> {
    let (head, body) = bytes
        .split_at_checked(HEAD)
        .ok_or(SnapshotError::NotASnapshot)?;
    if head[..4] != MAGIC {
        return Err(SnapshotError::NotASnapshot);
    }
    let version = u16::from_le_bytes([head[4], head[5]]);
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    if crc32c::crc32c(body).to_le_bytes() != head[8..12] {
        return Err(SnapshotError::Damaged);
    }
    postcard::from_bytes(body).map_err(|_| SnapshotError::Damaged)
}
