//! Work split among the members of a view, without a word being said.
//!
//! BJ87, Birman 1993: all members see the same view at the same place among the messages, so each can tell from its rank and the
//! number of members which part of a piece of work is its own. When the view changes the work is split anew.

use super::Rank;
use crate::process::GroupView;
use crate::view::MemberId;
use std::ops::Range;

impl Rank {
    /// This member's part of `0..count`, all parts in one piece and in the order of ranks. Together they are the whole; their
    /// sizes differ by one at most.
    pub fn part(&self, count: u64) -> Range<u64> {
        let (rank, size) = (self.rank as u128, self.size.max(1) as u128);
        let edge = |r: u128| u64::try_from(u128::from(count) * r / size).expect("at most count");
        edge(rank)..edge(rank + 1)
    }

    /// Whether this member takes the thing of this number, if they are dealt like cards.
    pub fn deals(&self, number: u64) -> bool {
        let size = u64::try_from(self.size.max(1)).expect("a group is small");
        usize::try_from(number % size).is_ok_and(|r| r == self.rank)
    }
}

impl GroupView {
    /// Whose a key is. A change of the view moves only the keys of those who departed and those that the new ones take.
    ///
    /// Thaler & Ravishankar 1998 (highest random weight).
    pub fn owner(&self, key: &[u8]) -> Option<&MemberId> {
        self.members.iter().max_by_key(|m| {
            let member = fnv(FNV_OFFSET, m.name.as_bytes());
            let member = fnv(member, &m.incarnation.to_le_bytes());
            // Of equal weights the larger member's is taken: the same everywhere.
            (mix(fnv(member, key)), *m)
        })
    }
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a: the same on every machine and in every build, which std's hashers do not promise.
fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    for b in bytes {
        hash = (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}

/// Spreads the difference of the last bytes over all bits (the finaliser of MurmurHash3).
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn view(members: &[u128]) -> GroupView {
        GroupView {
            id: 1,
            members: members
                .iter()
                .map(|i| MemberId::new(format!("r{i}"), *i))
                .collect(),
            joined: Vec::new(),
            departed: Vec::new(),
        }
    }

    #[test]
    fn parts_are_the_whole() {
        for size in 1..8 {
            for count in [0, 1, 5, 7, 1000, u64::MAX] {
                let ranks = (0..size).map(|rank| Rank {
                    view: 1,
                    rank,
                    size,
                });
                let parts: Vec<_> = ranks.map(|r| r.part(count)).collect();
                assert_eq!((parts[0].start, parts[size - 1].end), (0, count));
                assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
                let sizes = parts.iter().map(|p| p.end - p.start);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
    }

    #[test]
    fn each_number_is_dealt_to_one() {
        for number in [0, 1, 2, 3, u64::MAX] {
            let takers = (0..3).filter(|rank| {
                let rank = Rank {
                    view: 1,
                    rank: *rank,
                    size: 3,
                };
                rank.deals(number)
            });
            assert_eq!(takers.count(), 1);
        }
    }

    #[test]
    fn owners_are_even_and_move_little() {
        let (four, three) = (view(&[1, 2, 3, 4]), view(&[1, 2, 4]));
        let mut counts: BTreeMap<&MemberId, u32> = BTreeMap::new();
        for key in 0..10_000u32 {
            let key = key.to_le_bytes();
            let owner = four.owner(&key).unwrap();
            *counts.entry(owner).or_default() += 1;
            // Who is still there keeps what it has.
            if &*owner.name != "r3" {
                assert_eq!(three.owner(&key), Some(owner));
            }
        }
        assert_eq!(counts.len(), 4);
        assert!(
            counts.values().all(|n| (2200..2800).contains(n)),
            "{counts:?}"
        );
        assert_eq!(view(&[]).owner(b"x"), None);
    }
}
