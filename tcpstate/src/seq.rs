//! `SeqNum`, modulo 2^32, and its relation to 64-bit stream offsets.
//!
//! On the wire a byte is named by a 32-bit sequence number that wraps; everywhere else by its offset
//! in the stream, from 0, in 64 bits. The first payload byte is `isn + 1 + 0`; a FIN takes the number
//! behind the last byte.

use serde::{Deserialize, Serialize};

use crate::time::low32;

/// A TCP sequence number. Compared only relative to another (RFC 9293 §3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct SeqNum(pub u32);

impl SeqNum {
    /// The number `n` further on.
    pub const fn plus(self, n: u32) -> Self {
        Self(self.0.wrapping_add(n))
    }

    /// The number of stream offset `offset`, if `self` is the initial sequence number.
    pub const fn at_offset(self, offset: u64) -> Self {
        Self(self.0.wrapping_add(1).wrapping_add(low32(offset)))
    }

    /// Distance from `other` to `self`, negative if `self` lies before it. Exact within 2^31.
    pub const fn distance(self, other: Self) -> i64 {
        self.0.wrapping_sub(other.0).cast_signed() as i64
    }

    /// The stream offset of `self` if `isn` is the initial sequence number: the one nearest to
    /// `near`. Negative for numbers before the first byte (the SYN is -1).
    pub fn offset(self, isn: Self, near: u64) -> i64 {
        near.cast_signed() + self.distance(isn.at_offset(near))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_survive_wrapping() {
        let isn = SeqNum(0xffff_fff0);
        for near in [0u64, 15, 16, 1 << 31, 1 << 32, (1 << 32) + 7, 5 << 32] {
            for delta in [-1000i64, -1, 0, 1, 70_000] {
                let Ok(offset) = u64::try_from(near.cast_signed() + delta) else {
                    continue;
                };
                assert_eq!(
                    isn.at_offset(offset).offset(isn, near),
                    offset.cast_signed()
                );
            }
        }
        assert_eq!(isn.offset(isn, 0), -1);
        assert_eq!(isn.at_offset(0), SeqNum(0xffff_fff1));
    }
}
