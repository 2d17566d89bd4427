//! Who was last to fail, from the logs of those that are back. No I/O.
//!
//! Skeen 1985, "Determining the last process to fail": each process keeps on disk who was in its last view. Those may have
//! gone on without it; so the last is known when everybody that the newest view names is back. There a view counts when it is
//! on disk: hence the two steps in which a joiner is let in.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What the ordered messages and views of a durable group have come to, the same at all members at the same place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Book {
    /// Counts the beginnings after a failure of all.
    pub(super) era: u64,
    /// Counts the changes of `roster` and `joining` in this era.
    pub(super) version: u64,
    /// Counts ordered messages and views, over all eras.
    pub(super) index: u64,
    /// Members that may go on alone. An update is acknowledged when all of them have it on disk.
    ///
    /// Invariant: who is in it at any member is in `roster` or `joining` on the disk of everybody that is in it.
    pub(super) roster: BTreeSet<String>,
    /// Members that are told of on the disks of the others, and are not let in yet.
    pub(super) joining: BTreeMap<String, u64>,
}

impl Book {
    /// The first of all: whoever is named may have been there.
    pub(super) fn blank(founders: &BTreeSet<String>) -> Self {
        Self {
            roster: founders.clone(),
            ..Self::default()
        }
    }

    /// The last to fail begins anew.
    pub(super) fn begin(&self, era: u64, me: &str) -> Self {
        Self {
            era,
            version: 0,
            index: self.index + 1,
            roster: [me.to_owned()].into(),
            joining: BTreeMap::new(),
        }
    }

    /// A view without these.
    pub(super) fn depart<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        self.index += 1;
        for name in names {
            let was = self.roster.remove(name) | self.joining.remove(name).is_some();
            self.version += u64::from(was);
        }
    }

    /// A member has the state on disk and asks the others to write it down.
    pub(super) fn ask(&mut self, name: &str) {
        self.index += 1;
        if !self.roster.contains(name) {
            self.joining.insert(name.to_owned(), self.index);
            self.version += 1;
        }
    }

    /// A member knows that all of the roster have written it down.
    pub(super) fn admit(&mut self, name: &str) {
        self.index += 1;
        if self.joining.remove(name).is_some() {
            self.roster.insert(name.to_owned());
            self.version += 1;
        }
    }
}

/// What a member's disk says, when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    pub(super) book: Book,
    /// Whether it was let in, as far as it knew: only then is its state sure to have what was acknowledged.
    pub(super) full: bool,
}

/// The outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Last {
    /// This one was last, or among the last, and has all that anybody has. The era that it begins.
    Is(String, u64),
    /// These may have been, and are not there, or have lost their disks.
    Awaits(BTreeSet<String>),
}

/// Who was last. `known`: the newest that is known of each member's disk, of those too that have gone again; `present`: who
/// is there; `without`: who is not to be waited for.
pub(super) fn last(
    known: &BTreeMap<String, Summary>,
    present: &BTreeSet<String>,
    without: &BTreeSet<String>,
) -> Last {
    let age = |s: &Summary| (s.book.era, s.book.version);
    let Some(newest) = known.values().max_by_key(|s| age(s)) else {
        return Last::Awaits(BTreeSet::new());
    };
    let era = newest.book.era;
    // One that was let in had that era on its disk.
    let lost = |name: &str| known.get(name).is_none_or(|s| s.book.era < era);
    let roster = newest.book.roster.iter();
    let awaited = roster.filter(|n| !present.contains(*n) || lost(n));
    let joining = newest.book.joining.keys();
    let awaited = awaited.chain(joining.filter(|n| !present.contains(*n)));
    let awaited: BTreeSet<String> = awaited.filter(|n| !without.contains(*n)).cloned().collect();
    if !awaited.is_empty() {
        return Last::Awaits(awaited);
    }
    let there = known.iter().filter(|(n, _)| present.contains(*n));
    let whole = |(n, s): &(&String, &Summary)| s.full && newest.book.roster.contains(*n);
    let state =
        |(n, s): &(&String, &Summary)| (age(s), s.book.index, std::cmp::Reverse((*n).clone()));
    // Where none of the roster was let in on its own disk, nothing was acknowledged since: the newest copy has all.
    let best = there.clone().filter(whole).max_by_key(state);
    match best.or_else(|| there.max_by_key(state)) {
        Some((name, _)) => Last::Is(name.clone(), era + 1),
        None => Last::Awaits(newest.book.roster.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn names(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|n| (*n).to_owned()).collect()
    }

    fn summary(era: u64, version: u64, index: u64, roster: &[&str]) -> Summary {
        Summary {
            book: Book {
                era,
                version,
                index,
                roster: names(roster),
                joining: BTreeMap::new(),
            },
            full: true,
        }
    }

    fn known(all: &[(&str, Summary)]) -> BTreeMap<String, Summary> {
        all.iter()
            .map(|(n, s)| ((*n).to_owned(), s.clone()))
            .collect()
    }

    #[test]
    fn who_outlived_the_others_is_the_last() {
        let a = ("a", summary(1, 3, 20, &["a", "b"]));
        let b = ("b", summary(1, 4, 19, &["b"]));
        let none = BTreeSet::new();
        assert_eq!(
            last(&known(std::slice::from_ref(&a)), &names(&["a"]), &none),
            Last::Awaits(names(&["b"]))
        );
        let both = known(&[a.clone(), b]);
        let b_is = Last::Is("b".into(), 2);
        assert_eq!(last(&both, &names(&["a", "b"]), &none), b_is);
        assert_eq!(last(&both, &names(&["b"]), &none), b_is);
        // It has reported and gone again: it is still waited for, unless the operator says otherwise.
        assert_eq!(
            last(&both, &names(&["a"]), &none),
            Last::Awaits(names(&["b"]))
        );
        let told = last(&both, &names(&["a"]), &names(&["b"]));
        assert_eq!(told, Last::Is("a".into(), 2));
    }

    #[test]
    fn who_lost_its_disk_is_no_proof() {
        let a = ("a", summary(1, 3, 20, &["a", "b"]));
        let b = (
            "b",
            Summary {
                book: Book::blank(&names(&["a", "b"])),
                full: true,
            },
        );
        let got = last(&known(&[a, b]), &names(&["a", "b"]), &BTreeSet::new());
        assert_eq!(got, Last::Awaits(names(&["b"])));
    }

    #[test]
    fn a_group_is_begun_by_all_who_found_it() {
        let founders = names(&["a", "b"]);
        let blank = Summary {
            book: Book::blank(&founders),
            full: true,
        };
        let only = known(&[("b", blank.clone())]);
        assert_eq!(
            last(&only, &names(&["b"]), &BTreeSet::new()),
            Last::Awaits(names(&["a"]))
        );
        let both = known(&[("a", blank.clone()), ("b", blank)]);
        let got = last(&both, &founders, &BTreeSet::new());
        assert_eq!(got, Last::Is("a".into(), 1));
    }

    /// A record, as it stands in a log.
    #[derive(Clone, Debug, PartialEq)]
    enum Record {
        Update(u64),
        Gone(Vec<String>),
        Asks(String),
        Admits(String),
    }

    /// A member: what it has delivered, and how much of that is on its disk.
    #[derive(Clone, Default)]
    struct Member {
        disk: (Book, Vec<Record>, bool),
        live: Option<Live>,
    }

    #[derive(Clone)]
    struct Live {
        book: Book,
        state: Vec<Record>,
        full: bool,
        /// Where it is in the order of the group.
        position: usize,
        /// In the main group.
        inside: bool,
    }

    /// Defects, each of which loses something that was acknowledged.
    #[derive(Copy, Clone, Debug, PartialEq)]
    enum Fault {
        AcknowledgeWhenDelivered,
        AdmitAtOnce,
        TakeWhoIsThere,
        LongestLog,
    }

    struct World {
        rng: Rng,
        fault: Option<Fault>,
        members: BTreeMap<String, Member>,
        known: BTreeMap<String, Summary>,
        /// The order of the group since its founder's beginning.
        order: Vec<Record>,
        acknowledged: BTreeSet<u64>,
        next: u64,
        failures_of_all: u32,
    }

    impl World {
        fn below(&mut self, n: usize) -> usize {
            usize::try_from(self.rng.next_u64() % n as u64).unwrap()
        }

        fn pick(&mut self, f: impl Fn(&Member) -> bool) -> Option<String> {
            let of: Vec<String> = self
                .members
                .iter()
                .filter(|(_, m)| f(m))
                .map(|(n, _)| n.clone())
                .collect();
            if of.is_empty() {
                return None;
            }
            let n = self.below(of.len());
            Some(of[n].clone())
        }

        fn inside(m: &Member) -> bool {
            m.live.as_ref().is_some_and(|l| l.inside)
        }

        fn deliver(&mut self, name: &str) {
            let m = self.members.get_mut(name).unwrap();
            let live = m.live.as_mut().unwrap();
            let record = self.order[live.position].clone();
            live.position += 1;
            match &record {
                Record::Update(_) => live.book.index += 1,
                Record::Gone(names) => live.book.depart(names.iter().map(String::as_str)),
                Record::Asks(n) => live.book.ask(n),
                Record::Admits(n) => live.book.admit(n),
            }
            live.full |= live.book.roster.contains(name);
            live.state.push(record);
            if live.book.roster.is_empty() {
                live.inside = false; // nobody that may go on is left: back to the roll call
            }
        }

        fn write(&mut self, name: &str) {
            let m = self.members.get_mut(name).unwrap();
            if let Some(l) = &m.live {
                m.disk = (l.book.clone(), l.state.clone(), l.full);
            }
        }

        /// Whether all whom this member counts have everything that it has on disk.
        fn held_by_all(&self, name: &str) -> bool {
            let l = self.members[name].live.as_ref().unwrap();
            let index = l.book.index;
            l.book.roster.iter().all(|n| {
                let m = &self.members[n];
                Self::inside(m) && m.disk.0.era == l.book.era && m.disk.0.index >= index
            })
        }

        fn crash(&mut self, name: &str) {
            // Others may never get what only this one delivered.
            let inside = Self::inside(&self.members[name]);
            self.members.get_mut(name).unwrap().live = None;
            if !inside {
                return;
            }
            let rest: Vec<String> = self
                .members
                .iter()
                .filter(|(_, m)| Self::inside(m))
                .map(|(n, _)| n.clone())
                .collect();
            let had = rest
                .iter()
                .map(|n| self.members[n].live.as_ref().unwrap().position)
                .max();
            let Some(had) = had else {
                self.failures_of_all += 1;
                self.order.clear();
                return;
            };
            self.order.truncate(had);
            // The same messages before the view, at all.
            self.order.push(Record::Gone(vec![name.to_owned()]));
            for n in rest {
                while Self::inside(&self.members[&n])
                    && self.members[&n].live.as_ref().unwrap().position < self.order.len()
                {
                    self.deliver(&n);
                }
            }
            if !self.members.values().any(Self::inside) {
                self.failures_of_all += 1;
                self.order.clear();
            }
        }

        fn step(&mut self) -> Result<(), String> {
            match self.below(12) {
                0..=2 => {
                    if let Some(n) = self.pick(|m| Self::inside(m) && m.live.as_ref().unwrap().full)
                    {
                        let _ = n;
                        self.next += 1;
                        self.order.push(Record::Update(self.next));
                    }
                }
                3..=5 => {
                    let len = self.order.len();
                    if let Some(n) =
                        self.pick(|m| Self::inside(m) && m.live.as_ref().unwrap().position < len)
                    {
                        self.deliver(&n);
                    }
                }
                6 | 7 => {
                    if let Some(n) = self.pick(Self::inside) {
                        self.write(&n);
                    }
                }
                8 => {
                    if let Some(n) = self.pick(|m| Self::inside(m) && m.live.as_ref().unwrap().full)
                        && (self.held_by_all(&n)
                            || self.fault == Some(Fault::AcknowledgeWhenDelivered))
                    {
                        let state = &self.members[&n].live.as_ref().unwrap().state;
                        let updates = state.iter().filter_map(|r| match r {
                            Record::Update(u) => Some(*u),
                            _ => None,
                        });
                        self.acknowledged.extend(updates);
                    }
                }
                9 => {
                    let chance = self.below(4);
                    if let Some(n) = self.pick(|m| m.live.is_some())
                        && chance == 0
                    {
                        self.crash(&n);
                    }
                }
                10 => {
                    if let Some(n) = self.pick(|m| m.live.is_none()) {
                        let m = self.members.get_mut(&n).unwrap();
                        let (book, state, full) = m.disk.clone();
                        m.live = Some(Live {
                            book: book.clone(),
                            state,
                            full,
                            position: 0,
                            inside: false,
                        });
                        self.known.insert(n, Summary { book, full });
                    }
                }
                _ => self.roll_call()?,
            }
            Ok(())
        }

        fn roll_call(&mut self) -> Result<(), String> {
            let Some(me) = self.pick(|m| m.live.as_ref().is_some_and(|l| !l.inside)) else {
                return self.go_on_joining();
            };
            let (book, _, full) = self.members[&me].disk.clone();
            self.known.insert(me.clone(), Summary { book, full });
            // Once let in, a member tells.
            for (n, m) in &self.members {
                if Self::inside(m) && m.disk.2 {
                    self.known.insert(
                        n.clone(),
                        Summary {
                            book: m.disk.0.clone(),
                            full: true,
                        },
                    );
                }
            }
            let donor = self.pick(|m| Self::inside(m) && m.live.as_ref().unwrap().full);
            if let Some(donor) = donor {
                let from = self.members[&donor].live.clone().unwrap();
                let m = self.members.get_mut(&me).unwrap();
                m.live = Some(Live {
                    full: false,
                    ..from
                });
                self.write(&me);
                self.order.push(Record::Asks(me));
                return Ok(());
            }
            if self.members.values().any(Self::inside) {
                return Ok(());
            }
            let present: BTreeSet<String> = self
                .members
                .iter()
                .filter(|(_, m)| m.live.is_some())
                .map(|(n, _)| n.clone())
                .collect();
            let decided = match self.fault {
                Some(Fault::TakeWhoIsThere) => last(
                    &self.known,
                    &present,
                    &self.members.keys().cloned().collect(),
                ),
                Some(Fault::LongestLog) => {
                    let longest = present
                        .iter()
                        .max_by_key(|n| self.members[*n].disk.0.index)
                        .unwrap();
                    Last::Is(
                        longest.clone(),
                        1 + self.known.values().map(|s| s.book.era).max().unwrap(),
                    )
                }
                _ => last(&self.known, &present, &BTreeSet::new()),
            };
            let Last::Is(name, era) = decided else {
                return Ok(());
            };
            let m = self.members.get_mut(&name).unwrap();
            m.live = Some(Live {
                book: m.disk.0.begin(era, &name),
                state: m.disk.1.clone(),
                full: true,
                position: 0,
                inside: true,
            });
            self.order.clear();
            self.write(&name);
            let (book, state, full) = self.members[&name].disk.clone();
            self.known.insert(name.clone(), Summary { book, full });
            let there = |u: &u64| state.contains(&Record::Update(*u));
            match self.acknowledged.iter().find(|u| !there(u)) {
                Some(lost) => Err(format!("{name} begins era {era} without {lost}")),
                None => Ok(()),
            }
        }

        fn go_on_joining(&mut self) -> Result<(), String> {
            let waits = |m: &Member| Self::inside(m) && !m.live.as_ref().unwrap().full;
            let Some(me) = self.pick(waits) else {
                return Ok(());
            };
            let book = self.members[&me].live.as_ref().unwrap().book.clone();
            let Some(asked) = book.joining.get(&me) else {
                return Ok(());
            };
            let told = book.roster.iter().all(|n| {
                let disk = &self.members[n].disk.0;
                disk.era == book.era && disk.index >= *asked
            });
            let already = self.order.contains(&Record::Admits(me.clone()));
            if !already && (told || self.fault == Some(Fault::AdmitAtOnce)) {
                self.write(&me);
                self.order.push(Record::Admits(me));
            }
            Ok(())
        }
    }

    fn run(seed: u64, fault: Option<Fault>) -> Result<(usize, u32), String> {
        let all: Vec<String> = (0..2 + seed % 4).map(|i| format!("m{i}")).collect();
        let founders: BTreeSet<String> = all.iter().cloned().collect();
        let blank = Member {
            disk: (Book::blank(&founders), Vec::new(), true),
            live: None,
        };
        let mut world = World {
            rng: Rng::new(seed ^ 0x1a57),
            fault,
            members: all.into_iter().map(|n| (n, blank.clone())).collect(),
            known: BTreeMap::new(),
            order: Vec::new(),
            acknowledged: BTreeSet::new(),
            next: 0,
            failures_of_all: 0,
        };
        for _ in 0..1500 {
            world.step()?;
        }
        // In the end all come back, and somebody goes on.
        for _ in 0..1000 {
            if world.members.values().any(World::inside) {
                break;
            }
            let down = world.pick(|m| m.live.is_none());
            if let Some(n) = down {
                let m = world.members.get_mut(&n).unwrap();
                let (book, state, full) = m.disk.clone();
                m.live = Some(Live {
                    book,
                    state,
                    full,
                    position: 0,
                    inside: false,
                });
            }
            world.roll_call()?;
        }
        if !world.members.values().any(World::inside) {
            return Err("nobody goes on although all are back".into());
        }
        Ok((world.acknowledged.len(), world.failures_of_all))
    }

    #[test]
    fn nothing_that_was_acknowledged_is_lost() {
        let (mut acknowledged, mut failures) = (0, 0);
        for seed in 0..400 {
            let (a, f) = run(seed, None).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            acknowledged += a;
            failures += f;
        }
        println!("{acknowledged} acknowledged, all failed {failures} times");
        assert!(
            acknowledged > 5000 && failures > 300,
            "{acknowledged} {failures}"
        );
    }

    #[test]
    fn planted_defects_are_found() {
        for fault in [
            Fault::AcknowledgeWhenDelivered,
            Fault::AdmitAtOnce,
            Fault::TakeWhoIsThere,
            Fault::LongestLog,
        ] {
            let found = (0..3000).any(|seed| run(seed, Some(fault)).is_err());
            assert!(found, "{fault:?}");
        }
    }
}
