//! Who leads, and who comes next: ranks by age.
//!
//! BJ87, Birman 1993: all members see the same views with the members in the same order, so each knows its rank and that of all
//! others without a word being said. The oldest leads; when it departs, the next oldest does.

use crate::node::{Group, Seen};
use crate::process::GroupView;
use crate::view::MemberId;
use tokio::sync::watch;

/// A member's place in a view.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Rank {
    /// The view's number. A leader's number is larger than that of every leader before: what it does to the world outside may
    /// be fenced by it.
    pub view: u64,
    /// 0 for the oldest, who leads.
    pub rank: usize,
    /// How many members there are.
    pub size: usize,
}

impl Rank {
    /// A member's place in this view.
    pub fn of(view: &GroupView, member: &MemberId) -> Option<Self> {
        let rank = view.rank(member)?;
        Some(Self {
            view: view.id,
            rank,
            size: view.members.len(),
        })
    }

    /// Whether it leads.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }
}

/// Follows the ranks of a group.
///
/// It speaks of the newest view, which may be ahead of the events that the program has taken: who must do things in the order of
/// the messages takes the views from there, with [`Rank::of`]. A member that was cut off learns that it is out, and thinks what
/// it thought before until then.
#[derive(Clone)]
pub struct Succession {
    me: MemberId,
    views: watch::Receiver<Option<Seen>>,
    told: Option<Rank>,
}

impl Succession {
    /// Of this group.
    pub fn of(group: &Group) -> Self {
        Self {
            me: group.me().clone(),
            views: group.views(),
            told: None,
        }
    }

    /// This member's place; `None` before the first view, and when it is out.
    pub fn now(&self) -> Option<Rank> {
        self.view(Rank::of)
    }

    /// Who has this rank.
    pub fn member(&self, rank: usize) -> Option<MemberId> {
        self.view(|view, _| view.members.get(rank).cloned())
    }

    /// Who leads.
    pub fn leader(&self) -> Option<MemberId> {
        self.member(0)
    }

    fn view<T>(&self, f: impl FnOnce(&GroupView, &MemberId) -> Option<T>) -> Option<T> {
        // Its sender is dropped when this member is out.
        self.views.has_changed().ok()?;
        let seen = self.views.borrow();
        f(&seen.as_ref()?.view, &self.me)
    }

    /// Waits until this member's rank or the number of members is another than was told last, and tells it; the first time at
    /// once. `None`: this member is out.
    pub async fn changed(&mut self) -> Option<Rank> {
        loop {
            let now = self.now();
            let place = |r: Rank| (r.rank, r.size);
            if now.is_some() && now.map(place) != self.told.map(place) {
                self.told = now;
                return now;
            }
            self.views.changed().await.ok()?;
        }
    }

    /// Waits until this member has this rank or a lower one. `None`: it is out.
    pub async fn until_rank(&mut self, rank: usize) -> Option<Rank> {
        loop {
            if let Some(now) = self.now().filter(|now| now.rank <= rank) {
                return Some(now);
            }
            self.views.changed().await.ok()?;
        }
    }

    /// Waits until this member leads. `None`: it is out.
    pub async fn until_leader(&mut self) -> Option<Rank> {
        self.until_rank(0).await
    }
}
