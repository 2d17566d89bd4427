//! For the worst day: the operator's own credentials, and what is left when a majority of the
//! servers is gone for ever.

use std::path::Path;

use thiserror::Error;

use super::disk::{self, DiskError};
use super::wal::Record;
use crate::acl;
use crate::core::replay;
use crate::quorum::{HardState, SnapshotImage};
use crate::snapshot::SnapshotError;

/// Name and password that may do everything at the servers of the cluster with this key, as the
/// scheme `digest` wants them: who can read the key file is an operator. The key cannot be told from
/// the password; but the password goes over the network as it is, so use TLS where others listen.
#[must_use]
pub fn operator_credentials(key: &[u8; 32]) -> (String, String) {
    let salt = ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, b"unbroken coord operator 1");
    let mut password = [0; 32];
    salt.extract(key)
        .expand(&[b"password"], ring::hkdf::HKDF_SHA256)
        .and_then(|key| key.fill(&mut password))
        .expect("32 bytes are the length of the hash");
    let hex = password.iter().map(|byte| format!("{byte:02x}")).collect();
    ("operator".to_owned(), hex)
}

/// What the servers know of [`operator_credentials`].
pub(super) fn operator_digest(key: &[u8; 32]) -> String {
    let (user, password) = operator_credentials(key);
    let id = acl::digest_identity(format!("{user}:{password}").as_bytes());
    id.expect("name and password are there").id
}

/// Why a server's data cannot be made a cluster of its own.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// The data directory cannot be used: the server runs, or the data is damaged.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// No server has been here.
    #[error("no server has kept anything in this data directory")]
    Empty,
    /// The snapshot cannot be read.
    #[error("the snapshot in the data directory: {0}")]
    Snapshot(#[from] SnapshotError),
    /// The server was removed from its cluster: its data is old.
    #[error("the data is that of a server that was removed from its cluster")]
    Removed,
}

/// What [`recover`] made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivor {
    /// The last transaction in the data; what others had acknowledged beyond it is lost.
    pub zxid: u64,
    /// Znodes.
    pub znodes: usize,
    /// The servers that take part no longer.
    pub others: Vec<String>,
}

/// Makes the stopped server that has its data in `dir` the only member of its cluster.
///
/// To be used only when a majority of the servers is gone **for ever**: writes that this server had
/// not heard of are lost, and if the others live, there are two clusters that both believe to be the
/// right one. Everything in this server's log is kept, what was perhaps never committed, too: it
/// cannot tell, and what was acknowledged must not be lost. The others' ids are void from then on;
/// they come back with empty data directories, as new members.
///
/// # Errors
/// [`RecoverError`]. Nothing has been changed then.
pub fn recover(dir: &Path, name: &str) -> Result<Survivor, RecoverError> {
    let claimed = disk::claim(dir, name)?;
    let identity = claimed.identity().cloned().ok_or(RecoverError::Empty)?;
    let (storage, mut wal, _lock, recovered) = claimed.open(identity.clone())?.into_parts();
    let last = recovered
        .entries
        .last()
        .map(|entry| (entry.index, entry.term));
    let base = recovered
        .snapshot
        .as_ref()
        .map(|image| (image.index, image.term));
    let (last_index, last_term) = last.or(base).unwrap_or((0, 0));
    let mut state = replay(&identity.founders, &recovered)?;
    let znodes = state.tree.len();
    let others = state.members.iter().filter(|(id, _)| *id != identity.id);
    let others = others.map(|(_, member)| member.name.clone()).collect();
    // A new entry, as it were: nothing of the old cluster's can be taken for it.
    let index = last_index + 1;
    let term = recovered.hard_state.term.max(last_term) + 1;
    if !state.survive(identity.id, index) {
        return Err(RecoverError::Removed);
    }
    let image = SnapshotImage::of(&state, term);
    disk::save_snapshot(&*storage, &image).map_err(DiskError::Io)?;
    let hard_state = HardState {
        term,
        vote: 0,
        commit: index,
    };
    wal.append(&[Record::Reset { index }, Record::Hard(hard_state)])
        .map_err(DiskError::Io)?;
    Ok(Survivor {
        zxid: last_index,
        znodes,
        others,
    })
}
