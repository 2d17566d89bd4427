//! A memory that several processes share.

mod pages;

pub use pages::{OutOfRange, REGIONS_MAX, Region};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Bytes that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// Where, from the region's beginning.
    pub offset: u64,
    /// What is there now.
    pub bytes: Bytes,
}

impl Diff {
    /// Where it ends, exclusive; `None` for what no memory holds.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.bytes.len() as u64)
    }
}
