//! Vector time: of each process, how many of its updates came before.

use crate::view::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Keleher 1994, vector timestamps: here of updates instead of intervals. A process that is not named has 0.
///
/// It names processes, not ranks: a name stays true across views.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vector(BTreeMap<MemberId, u64>);

impl Vector {
    pub(super) fn of(&self, member: &MemberId) -> u64 {
        self.0.get(member).copied().unwrap_or(0)
    }

    pub(super) fn raise(&mut self, member: &MemberId, number: u64) {
        if number > self.of(member) {
            self.0.insert(member.clone(), number);
        }
    }

    pub(super) fn join(&mut self, other: &Self) {
        for (member, number) in other.iter() {
            self.raise(member, number);
        }
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&MemberId) -> bool) {
        self.0.retain(|member, _| keep(member));
    }

    pub(super) fn without(&self, member: &MemberId) -> Self {
        let mut rest = self.clone();
        rest.0.remove(member);
        rest
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&MemberId, u64)> {
        self.0.iter().map(|(member, number)| (member, *number))
    }
}
