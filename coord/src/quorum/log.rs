//! The log as the engine reads it: entries after the last compaction, in memory. What it holds is
//! on its way to the disk; the engine is told when it has got there.

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb as pb;
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};

use super::message::{conf_to_engine, entry_to_engine, image_to_engine};
use super::{Conf, HardState, Recovered, SnapshotImage};

pub(super) struct Log {
    hard_state: HardState,
    /// Who takes part after the entries that were applied before the start.
    conf: Conf,
    /// Index and term of the entry before the first one held.
    base: (u64, u64),
    entries: VecDeque<pb::Entry>,
    /// What followers that are too far behind are sent.
    image: Option<SnapshotImage>,
    /// The engine asked for an image and there was none that would do.
    wanted: Cell<bool>,
}

impl Log {
    pub(super) fn new(recovered: Recovered, founders: Conf) -> Self {
        let base = recovered
            .snapshot
            .as_ref()
            .map_or((0, 0), |image| (image.index, image.term));
        let entries: VecDeque<_> = recovered.entries.into_iter().map(entry_to_engine).collect();
        for (entry, index) in entries.iter().zip(base.0 + 1..) {
            assert_eq!(entry.index, index, "the log has no gaps");
        }
        let last = base.0 + entries.len() as u64;
        let mut hard_state = recovered.hard_state;
        // The commit index is written lazily; a snapshot proves what it contains committed.
        hard_state.commit = hard_state.commit.clamp(base.0, last);
        let conf = recovered
            .snapshot
            .as_ref()
            .map_or(founders, |image| image.conf.clone());
        Self {
            hard_state,
            conf,
            base,
            entries,
            image: recovered.snapshot,
            wanted: Cell::new(false),
        }
    }

    pub(super) fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    pub(super) fn last(&self) -> u64 {
        self.base.0 + self.entries.len() as u64
    }

    pub(super) fn first(&self) -> u64 {
        self.base.0 + 1
    }

    pub(super) fn append(&mut self, entries: &[pb::Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            self.base.0 < first.index && first.index <= self.last() + 1,
            "the log has no gaps and no second past"
        );
        let keep = usize::try_from(first.index - self.base.0 - 1).expect("fits, it is in memory");
        self.entries.truncate(keep);
        self.entries.extend(entries.iter().cloned());
    }

    /// Everything is replaced by an image that came from the leader.
    pub(super) fn restore(&mut self, image: SnapshotImage) {
        self.base = (image.index, image.term);
        self.entries.clear();
        self.hard_state.term = self.hard_state.term.max(image.term);
        self.hard_state.commit = self.hard_state.commit.max(image.index);
        self.image = Some(image);
    }

    pub(super) fn offer(&mut self, image: SnapshotImage) {
        self.wanted.set(false);
        self.image = Some(image);
    }

    pub(super) fn wants_image(&self) -> bool {
        self.wanted.get()
    }

    pub(super) fn compact(&mut self, index: u64) {
        if index <= self.base.0 {
            return;
        }
        let term = self.term_at(index).expect("only what is held is compacted");
        let count = usize::try_from(index - self.base.0).expect("fits, it is in memory");
        self.entries.drain(..count);
        self.base = (index, term);
    }

    pub(super) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.base.0 {
            return Some(self.base.1);
        }
        let place = usize::try_from(index.checked_sub(self.base.0 + 1)?).ok()?;
        self.entries.get(place).map(|entry| entry.term)
    }
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let mut hard_state = pb::HardState::default();
        hard_state.term = self.hard_state.term;
        hard_state.vote = self.hard_state.vote;
        hard_state.commit = self.hard_state.commit;
        Ok(RaftState::new(hard_state, conf_to_engine(&self.conf)))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<pb::Entry>> {
        if low <= self.base.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(
            high <= self.last() + 1,
            "the engine asks for what it was told of"
        );
        let place = |index: u64| usize::try_from(index - self.base.0 - 1).expect("in memory");
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let mut result = Vec::new();
        for entry in self.entries.range(place(low)..place(high)) {
            // An entry's frame on the wire takes about this much beside its data.
            size += entry.data.len() as u64 + 16;
            if size > limit && !result.is_empty() {
                break;
            }
            result.push(entry.clone());
        }
        Ok(result)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_at(index)
            .ok_or(Error::Store(if index < self.base.0 {
                StorageError::Compacted
            } else {
                StorageError::Unavailable
            }))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<pb::Snapshot> {
        match &self.image {
            // The follower goes on after the image, so the log must still hold what comes next; and
            // it takes no image in which it is not a member yet.
            Some(image)
                if image.index >= request_index
                    && image.index >= self.base.0
                    && (image.conf.voters.contains(&to) || image.conf.learners.contains(&to)) =>
            {
                Ok(image_to_engine(image.clone()))
            }
            _ => {
                self.wanted.set(true);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}
