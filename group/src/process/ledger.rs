//! The ledger: which groups there are and who is in them. The same on every site, because it is changed only by events of
//! the site group, in their order. The leader of each view of sites enters first who takes part.
//!
//! A change of a group (somebody joins, leaves or died, or a gbcast was sent) begins with `Block`: the survivors of its view
//! send nothing new and deliver nothing more in it, and report to the site leader what they hold of each other's lanes. When
//! each of them holds the same, the leader enters the `Cut`. Since it is an entry of the ledger, all end the view at the
//! same place, whatever fails meanwhile. BSS91 §5.5 (flush); the place of Isis' coordinator is taken by the site group.

use super::types::{GROUPS_MAX, GroupId, GroupView, MEMBERS_MAX, NAME_BYTES_MAX};
use super::wire::{Entry, Op};
use crate::view::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Members that keep the state for a joiner: a second one goes on where the first died.
pub(crate) const DONORS: usize = 2;

/// What a site has to do because of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The view of this group is being left.
    Block { group: GroupId },
    /// The next view begins.
    Install(Box<Begun>),
    /// There is no room for one who asked to join.
    Full { member: MemberId, name: String },
    /// A joiner has the state.
    Loaded { group: GroupId, member: MemberId },
}

/// A view of a group, as it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) group: GroupId,
    pub(crate) name: String,
    /// Up to where the lanes of the view before are delivered, by rank in it. `None`: nobody of it is left.
    pub(crate) cut: Option<Vec<u64>>,
    /// The gbcasts between the views, in order: rank in the view before, number in its lane.
    pub(crate) gbcasts: Vec<(u8, u64)>,
    pub(crate) view: GroupView,
    /// The departed who asked for it.
    pub(crate) wished: BTreeSet<MemberId>,
    /// This member begins the group's state.
    pub(crate) init: Option<MemberId>,
    /// Members without the state.
    pub(crate) loading: BTreeMap<MemberId, Loading>,
}

/// A member that is getting the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Loading {
    /// The state is that at the beginning of this view.
    pub(crate) since: u64,
    /// Who has it.
    pub(crate) donors: Vec<MemberId>,
}

/// A change that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    pub(crate) epoch: u64,
    add: Vec<MemberId>,
    /// Who goes, and whether by its own wish.
    leave: BTreeMap<MemberId, bool>,
    gbcasts: Vec<(u8, u64)>,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Group {
    name: String,
    pub(crate) view: GroupView,
    pub(crate) change: Option<Change>,
    loading: BTreeMap<MemberId, Loading>,
}

impl Group {
    /// Who is there to end the view with.
    pub(crate) fn survivors(&self) -> impl Iterator<Item = &MemberId> {
        let leave = self.change.as_ref().map(|c| &c.leave);
        self.view
            .members
            .iter()
            .filter(move |m| leave.is_none_or(|l| !l.contains_key(*m)))
    }
}

/// The whole of it.
///
/// Invariant: a change is under way only in a group that has a survivor; members and joiners of groups are sites.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    next_group: u64,
    next_epoch: u64,
    names: BTreeMap<String, GroupId>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Of each site, the number of its last request that was entered.
    pub(crate) asked: BTreeMap<MemberId, u64>,
    sites: BTreeSet<MemberId>,
}

impl Ledger {
    /// The empty ledger of a generation of the site group: its numbers are met in no other.
    pub(crate) fn of_generation(generation: u32) -> Self {
        let first = u64::from(generation) << 40;
        Self {
            next_group: first,
            next_epoch: first,
            ..Self::default()
        }
    }

    pub(crate) fn group(&self, id: GroupId) -> Option<&Group> {
        self.groups.get(&id)
    }

    /// Whether a change with this number may begin by an entry that is not applied here yet.
    pub(crate) fn is_ahead(&self, epoch: u64) -> bool {
        epoch >= self.next_epoch
    }

    /// Applies an entry of the site group's log.
    pub(crate) fn apply(&mut self, entry: &Entry) -> Vec<Effect> {
        let mut effects = Vec::new();
        match entry {
            Entry::Asked { by, number, op } => {
                let last = self.asked.entry(by.clone()).or_default();
                if *number != *last + 1 {
                    return effects; // entered twice, by a leader and its successor
                }
                *last = *number;
                if self.sites.contains(by) {
                    self.on_op(by, op, &mut effects);
                }
            }
            Entry::Sites(sites) => return self.on_sites(sites),
            Entry::Cut { group, epoch, cut } => {
                let current = self.groups.get(group).filter(|g| {
                    g.change.as_ref().is_some_and(|c| c.epoch == *epoch)
                        && g.view.members.len() == cut.len()
                });
                if current.is_some() {
                    self.finish(*group, Some(cut.clone()), &mut effects);
                }
            }
        }
        effects
    }

    /// These take part from now on.
    fn on_sites(&mut self, sites: &[MemberId]) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.sites = sites.iter().cloned().collect();
        self.asked.retain(|m, _| sites.contains(m));
        let ids: Vec<GroupId> = self.groups.keys().copied().collect();
        for id in ids {
            let sites = &self.sites;
            let g = self.groups.get_mut(&id).expect("listed above");
            if let Some(change) = &mut g.change {
                change.add.retain(|m| sites.contains(m));
            }
            let members = g.view.members.iter();
            let gone: Vec<MemberId> = members.filter(|m| !sites.contains(*m)).cloned().collect();
            for m in gone {
                self.depart(id, &m, false, &mut effects);
            }
        }
        effects
    }

    fn on_op(&mut self, by: &MemberId, op: &Op, effects: &mut Vec<Effect>) {
        match op {
            Op::Join { name } => self.join(by, name, effects),
            Op::Leave { group } => self.depart(*group, by, true, effects),
            Op::Expel { group, member } => {
                if self.is_member(*group, by) {
                    self.depart(*group, member, false, effects);
                }
            }
            Op::Gbcast {
                group,
                view,
                number,
            } => {
                let Some(g) = self.groups.get(group) else {
                    return;
                };
                let rank = g.view.rank(by).and_then(|r| u8::try_from(r).ok());
                // One of an older view is sent again by its sender, in the newer one.
                if let (Some(rank), true) = (rank, g.view.id == *view) {
                    self.change(*group, effects).gbcasts.push((rank, *number));
                }
            }
            Op::Loaded { group, since } => {
                // One that was told to begin anew meanwhile has not.
                let loads = |l: &Loading| l.since == *since;
                if let Some(g) = self.groups.get_mut(group)
                    && g.loading.get(by).is_some_and(loads)
                {
                    g.loading.remove(by);
                    effects.push(Effect::Loaded {
                        group: *group,
                        member: by.clone(),
                    });
                }
            }
        }
    }

    fn is_member(&self, group: GroupId, member: &MemberId) -> bool {
        self.groups
            .get(&group)
            .is_some_and(|g| g.view.members.contains(member))
    }

    fn join(&mut self, by: &MemberId, name: &str, effects: &mut Vec<Effect>) {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return;
        }
        let Some(id) = self.names.get(name).copied() else {
            if self.groups.len() >= GROUPS_MAX * 10 {
                return effects.push(full(by, name));
            }
            self.next_group += 1;
            let id = GroupId(self.next_group);
            self.names.insert(name.to_owned(), id);
            let group = Group {
                name: name.to_owned(),
                view: GroupView {
                    id: 0,
                    members: Vec::new(),
                    joined: Vec::new(),
                    departed: Vec::new(),
                },
                change: None,
                loading: BTreeMap::new(),
            };
            self.groups.insert(id, group);
            self.change(id, &mut Vec::new()).add.push(by.clone());
            return self.finish(id, None, effects);
        };
        let g = &self.groups[&id];
        let adding = g.change.as_ref().map_or(&[][..], |c| &c.add);
        if g.view.members.contains(by) || adding.contains(by) {
            return;
        }
        if g.view.members.len() + adding.len() >= MEMBERS_MAX {
            return effects.push(full(by, name));
        }
        self.change(id, effects).add.push(by.clone());
    }

    fn depart(
        &mut self,
        group: GroupId,
        member: &MemberId,
        wished: bool,
        effects: &mut Vec<Effect>,
    ) {
        // One that waits to be let in is meant by nobody: what is asked for is about the membership that it had.
        if !self.is_member(group, member) {
            return;
        }
        let change = self.change(group, effects);
        change.leave.entry(member.clone()).or_insert(wished);
        if self.groups[&group].survivors().next().is_none() {
            self.finish(group, None, effects);
        }
    }

    /// The change that is under way, begun if there is none.
    fn change(&mut self, group: GroupId, effects: &mut Vec<Effect>) -> &mut Change {
        let epoch = self.next_epoch;
        let g = self
            .groups
            .get_mut(&group)
            .expect("the caller looked it up");
        if g.change.is_none() {
            self.next_epoch += 1;
            effects.push(Effect::Block { group });
        }
        g.change.get_or_insert_with(|| Change {
            epoch,
            add: Vec::new(),
            leave: BTreeMap::new(),
            gbcasts: Vec::new(),
        })
    }

    /// Ends the view of a group and begins the next.
    fn finish(&mut self, id: GroupId, cut: Option<Vec<u64>>, effects: &mut Vec<Effect>) {
        let g = self.groups.get_mut(&id).expect("the caller looked it up");
        let change = g.change.take().expect("a change ends a view");
        let mut members: Vec<MemberId> = g.view.members.clone();
        members.retain(|m| !change.leave.contains_key(m));
        members.extend(change.add.iter().cloned());
        let view = GroupView {
            id: g.view.id + 1,
            members,
            joined: change.add,
            departed: change.leave.keys().cloned().collect(),
        };
        g.loading.retain(|m, _| view.members.contains(m));
        let mut loaded: Vec<MemberId> = view
            .members
            .iter()
            .filter(|m| !g.loading.contains_key(*m) && !view.joined.contains(m))
            .cloned()
            .collect();
        let mut init = None;
        if let (true, Some(first)) = (loaded.is_empty(), view.members.first()) {
            // Nobody has the state: the oldest begins it.
            g.loading.remove(first);
            loaded.push(first.clone());
            init = Some(first.clone());
        }
        loaded.truncate(DONORS);
        for m in view.members.iter().filter(|m| !loaded.contains(*m)) {
            let new = view.joined.contains(m);
            if let Some(l) = g.loading.get_mut(m) {
                l.donors.retain(|d| view.members.contains(d));
            }
            if new || g.loading.get(m).is_some_and(|l| l.donors.is_empty()) {
                let loading = Loading {
                    since: view.id,
                    donors: loaded.clone(),
                };
                g.loading.insert(m.clone(), loading);
            }
        }
        g.view = view.clone();
        let begun = Begun {
            group: id,
            name: g.name.clone(),
            cut,
            gbcasts: change.gbcasts,
            view,
            wished: change
                .leave
                .into_iter()
                .filter_map(|(m, wished)| wished.then_some(m))
                .collect(),
            init,
            loading: g.loading.clone(),
        };
        if g.view.members.is_empty() {
            self.names.remove(&g.name);
            self.groups.remove(&id);
        }
        effects.push(Effect::Install(Box::new(begun)));
    }
}

fn full(member: &MemberId, name: &str) -> Effect {
    Effect::Full {
        member: member.clone(),
        name: name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_group_says_so() {
        let most = MEMBERS_MAX as u128;
        let mut b = Book::new(most + 1);
        let group = begun(&b.join(1)).group;
        for i in 2..=most {
            b.join(i);
        }
        assert_eq!(b.join(most + 1), [full(&site(most + 1), "g")]);
        assert_eq!(b.cut(group).view.members.len(), MEMBERS_MAX);
        assert_eq!(b.join(most + 1), [full(&site(most + 1), "g")]);
    }

    fn site(i: u128) -> MemberId {
        MemberId::new(format!("r{i}"), i)
    }

    struct Book {
        ledger: Ledger,
        numbers: BTreeMap<MemberId, u64>,
    }

    impl Book {
        fn new(sites: u128) -> Self {
            let mut ledger = Ledger::default();
            let sites: Vec<MemberId> = (1..=sites).map(site).collect();
            assert!(ledger.on_sites(&sites).is_empty());
            Self {
                ledger,
                numbers: BTreeMap::new(),
            }
        }

        fn ask(&mut self, by: u128, op: Op) -> Vec<Effect> {
            let number = self.numbers.entry(site(by)).or_default();
            *number += 1;
            let entry = Entry::Asked {
                by: site(by),
                number: *number,
                op,
            };
            self.ledger.apply(&entry)
        }

        fn join(&mut self, by: u128) -> Vec<Effect> {
            self.ask(by, Op::Join { name: "g".into() })
        }

        fn cut(&mut self, group: GroupId) -> Begun {
            let g = &self.ledger.groups[&group];
            let entry = Entry::Cut {
                group,
                epoch: g.change.as_ref().unwrap().epoch,
                cut: vec![0; g.view.members.len()],
            };
            begun(&self.ledger.apply(&entry))
        }
    }

    fn begun(effects: &[Effect]) -> Begun {
        match effects.last() {
            Some(Effect::Install(b)) => (**b).clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_founds_and_the_second_waits_for_the_end_of_the_view() {
        let mut b = Book::new(3);
        let first = begun(&b.join(1));
        assert_eq!(
            (first.view.id, first.init, first.cut),
            (1, Some(site(1)), None)
        );
        let group = first.group;
        assert_eq!(b.join(2), [Effect::Block { group }]);
        assert_eq!(b.join(3), [], "it joins in the same change");
        let second = b.cut(group);
        assert_eq!(second.view.members, [site(1), site(2), site(3)]);
        assert_eq!(second.loading[&site(2)].donors, [site(1)]);
        assert_eq!(second.init, None);
    }

    #[test]
    fn a_joiner_gets_another_donor_or_becomes_the_first() {
        let mut b = Book::new(4);
        let group = begun(&b.join(1)).group;
        b.join(2);
        b.cut(group);
        b.ask(2, Op::Loaded { group, since: 1 });
        assert!(b.ledger.groups[&group].loading.contains_key(&site(2)));
        b.ask(2, Op::Loaded { group, since: 2 });
        b.join(3);
        let v = b.cut(group);
        assert_eq!(v.loading[&site(3)].donors, [site(1), site(2)]);
        b.ledger.on_sites(&[site(2), site(3), site(4)]);
        let v = b.cut(group);
        assert_eq!(v.loading[&site(3)].donors, [site(2)], "it goes on there");
        assert_eq!(v.loading[&site(3)].since, 3);
        b.join(4);
        b.cut(group);
        b.ledger.on_sites(&[site(3), site(4)]);
        let v = b.cut(group);
        assert_eq!(v.init, Some(site(3)), "nobody has the state");
        assert_eq!(v.loading[&site(4)].donors, [site(3)]);
        assert_eq!(v.loading[&site(4)].since, v.view.id);
    }

    #[test]
    fn when_all_are_gone_a_waiting_joiner_begins_anew() {
        let mut b = Book::new(2);
        let group = begun(&b.join(1)).group;
        b.join(2);
        let effects = b.ledger.on_sites(&[site(2)]);
        let v = begun(&effects);
        assert_eq!((v.cut, v.init), (None, Some(site(2))));
        b.ask(2, Op::Leave { group });
        assert!(b.ledger.groups.is_empty() && b.ledger.names.is_empty());
    }

    #[test]
    fn an_expulsion_ends_no_joining_that_came_after_it() {
        let mut b = Book::new(3);
        let group = begun(&b.join(1)).group;
        b.join(2);
        b.join(3);
        let member = site(2);
        b.ask(1, Op::Expel { group, member });
        let v = b.cut(group);
        assert_eq!(
            v.view.members,
            [site(1), site(2), site(3)],
            "it was no member"
        );
        b.ledger.on_sites(&[site(1), site(3)]);
        assert_eq!(b.cut(group).view.members, [site(1), site(3)]);
        b.ledger.on_sites(&[site(1), site(3), site(4)]);
        b.join(4);
        b.ledger.on_sites(&[site(1), site(3)]);
        assert_eq!(b.cut(group).view.members, [site(1), site(3)], "it died");
    }

    #[test]
    fn a_request_is_entered_once() {
        let mut b = Book::new(2);
        b.join(1);
        let entry = Entry::Asked {
            by: site(1),
            number: 1,
            op: Op::Leave { group: GroupId(1) },
        };
        assert_eq!(b.ledger.apply(&entry), []);
    }
}
