//! What must hold in every run, one file for each multicast and promise. A checker counts once it has caught a planted fault
//! (`../tests.rs`).

mod abcast;
mod cbcast;
mod direct;
mod fbcast;
mod gbcast;
mod safe;
mod state;
mod view_synchrony;

use super::program::Id;
use crate::process::{GroupId, GroupView, Order};
use crate::view::MemberId;
use std::collections::BTreeMap;

/// Something that happened to a member of a group.
pub(super) enum Seen<'a> {
    /// It sends this.
    Sent { id: Id, order: Order },
    /// It is given this.
    Delivered {
        id: Id,
        order: Option<Order>,
        from: &'a MemberId,
    },
    /// A view begins. `state` before it.
    View { view: &'a GroupView, state: u64 },
    /// It gave its state at the beginning of a view.
    Gave { view: u64, state: u64 },
    /// It was given the state.
    Restored { state: u64 },
    /// It is out.
    Left,
}

/// One member's part in one group: its incarnation, and the group.
pub(super) type Who = (u128, GroupId);

/// What each member was given of its view, in order: the same for all that go on to the next.
#[derive(Default)]
struct Agreement {
    given: BTreeMap<Who, Vec<Id>>,
    /// By group and the view that ended.
    agreed: BTreeMap<(GroupId, u64), Vec<Id>>,
}

impl Agreement {
    fn last(&self, who: &Who) -> Option<&Id> {
        self.given.get(who)?.last()
    }

    fn give(&mut self, who: &Who, id: Id) {
        self.given.entry(*who).or_default().push(id);
    }

    fn forget(&mut self, who: &Who) {
        self.given.remove(who);
    }

    /// The view ends for this member (0: it was in none).
    fn end(&mut self, who: &Who, view: u64) -> Result<(), String> {
        let mine = self.given.remove(who).unwrap_or_default();
        if view == 0 {
            return Ok(());
        }
        let agreed = self.agreed.entry((who.1, view)).or_insert(mine.clone());
        if *agreed == mine {
            Ok(())
        } else {
            Err(format!("view {view}: {agreed:?} and {mine:?}"))
        }
    }
}

/// One invariant.
pub(super) trait Invariant {
    /// Takes note; an error is a violation. `view`: the member's view, 0 before the first.
    fn see(&mut self, who: &Who, view: u64, seen: &Seen<'_>) -> Result<(), String>;
    fn name(&self) -> &'static str;
}

/// All of them.
pub(super) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::<fbcast::Fbcast>::default(),
        Box::<cbcast::Cbcast>::default(),
        Box::<abcast::Abcast>::default(),
        Box::<gbcast::Gbcast>::default(),
        Box::<view_synchrony::ViewSynchrony>::default(),
        Box::<state::State>::default(),
        Box::<safe::Safe>::default(),
        Box::<direct::Direct>::default(),
    ]
}
