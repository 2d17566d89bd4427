//! What a joiner begins with.

use super::{Barrier, BarrierId, Config, DsmCore, Fault, Lock, LockId, Sender};
use crate::dsm::Diff;
use crate::view::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

const MAGIC: [u8; 3] = *b"UBM";
const FORMAT: u8 = 1;

/// Why a copy was not made, or not taken.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not written by this program.
    #[error("not a copy of a region: wrong magic")]
    Magic,
    /// Written by a version that this one does not know.
    #[error("unknown format version {0}")]
    Version(u8),
    /// The bytes are damaged.
    #[error("damaged copy")]
    Damaged,
    /// Made where sizes or limits are others.
    #[error("a copy with another configuration")]
    Config,
    /// Made in a view that this process is not in, or not as a joiner.
    #[error("a copy that is not for this process")]
    NotForUs,
    /// The donor has to join again itself.
    #[error("the donor has failed")]
    Failed,
}

#[derive(Serialize, Deserialize)]
struct Image {
    region_bytes: u64,
    locks_max: u32,
    barriers_max: u32,
    /// All members of the view, the donor too.
    members: BTreeMap<MemberId, Sender>,
    locks: BTreeMap<LockId, Lock>,
    barriers: BTreeMap<BarrierId, Barrier>,
    contents: Vec<Diff>,
}

impl DsmCore {
    /// A copy for a joiner, to be made right after [`handle_view`](Self::handle_view) with the view that holds it, its
    /// outputs drained, and before any other input. `contents` is
    /// [`Pages::contents`](crate::dsm::Pages::contents), without what was written here and not released.
    ///
    /// # Errors
    /// `Failed`: another donor has to do it.
    pub fn snapshot(&self, contents: Vec<Diff>) -> Result<Vec<u8>, SnapshotError> {
        if self.failed {
            return Err(SnapshotError::Failed);
        }
        let mut members = self.others.clone();
        let donor = Sender {
            applied: if self.has(Fault::CopiedIsDelivered) {
                self.sent
            } else {
                self.delivered
            },
            copied: self.sent,
            ..Sender::default()
        };
        members.insert(self.me.clone(), donor);
        let image = Image {
            region_bytes: self.config.region_bytes,
            locks_max: self.config.locks_max,
            barriers_max: self.config.barriers_max,
            members,
            locks: if self.has(Fault::SnapshotWithoutLocks) {
                BTreeMap::new()
            } else {
                self.locks.clone()
            },
            barriers: self.barriers.clone(),
            contents,
        };
        let mut out = MAGIC.to_vec();
        out.push(FORMAT);
        let mut out = postcard::to_extend(&image, out).expect("a copy has no unserialisable part");
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        Ok(out)
    }

    /// The joiner's core, and what to apply to its region of zeros. What was delivered to it since the view comes
    /// after.
    ///
    /// # Errors
    /// Any but `Failed`.
    pub fn restore(
        image: &[u8],
        me: MemberId,
        config: Config,
    ) -> Result<(Self, Vec<Diff>), SnapshotError> {
        if !image.starts_with(&MAGIC) {
            return Err(SnapshotError::Magic);
        }
        match image.get(MAGIC.len()) {
            Some(&FORMAT) => {}
            Some(&other) => return Err(SnapshotError::Version(other)),
            None => return Err(SnapshotError::Damaged),
        }
        let (image, sum) = image.split_last_chunk().ok_or(SnapshotError::Damaged)?;
        if crc32c::crc32c(image) != u32::from_le_bytes(*sum) {
            return Err(SnapshotError::Damaged);
        }
        let encoded = image.get(MAGIC.len() + 1..).ok_or(SnapshotError::Damaged)?;
        let image: Image = postcard::from_bytes(encoded).map_err(|_| SnapshotError::Damaged)?;
        if (image.region_bytes, image.locks_max, image.barriers_max)
            != (config.region_bytes, config.locks_max, config.barriers_max)
        {
            return Err(SnapshotError::Config);
        }
        image.check()?;
        let mut members = image.members;
        // A joiner has sent nothing: its incarnation is new.
        if members.remove(&me).is_none_or(|s| s.copied != 0) {
            return Err(SnapshotError::NotForUs);
        }
        let names: Vec<_> = members.keys().chain([&me]).cloned().collect();
        let mut core = Self::new(config, me, &names);
        for (member, sender) in &members {
            core.seen.raise(member, sender.applied);
        }
        core.others = members;
        core.locks = image.locks;
        core.barriers = image.barriers;
        Ok((core, image.contents))
    }
}

impl Image {
    /// What the core relies on.
    fn check(&self) -> Result<(), SnapshotError> {
        let within = |d: &Diff| d.end().is_some_and(|end| end <= self.region_bytes);
        let sound = |s: &Sender| {
            let numbers = s.held.iter().map(|h| h.update.number);
            // Far from where numbers end: the next ones are computed without a check.
            s.applied.max(s.copied) < u64::MAX / 2
                && numbers.eq((s.applied + 1..).take(s.held.len()))
                && s.whole == s.held.iter().filter(|h| h.update.last).count()
                && s.held.iter().flat_map(|h| &h.update.diffs).all(within)
                && Some(s.held_bytes)
                    == s.held
                        .iter()
                        .try_fold(0_usize, |sum, h| sum.checked_add(h.bytes))
                && s.held_bytes < usize::MAX / 2
        };
        let right = self.members.values().all(sound)
            && self.contents.iter().all(within)
            && self.locks.keys().all(|l| l.0 < self.locks_max)
            && self.barriers.keys().all(|b| b.0 < self.barriers_max);
        if right {
            Ok(())
        } else {
            Err(SnapshotError::Damaged)
        }
    }
}
