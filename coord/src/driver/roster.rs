//! Whom this server takes for its peers, and where they are.
//!
//! The log says it, and the log may be behind: a server that has just begun knows only who founded
//! the cluster. So one with an id that is newer than anything known here is let in, too, if it
//! has the key; one whose id is known to have been removed never is.

use std::collections::BTreeMap;
use std::sync::RwLock;

use serde::{Deserialize, Serialize};

use crate::members::Members;

/// Servers that are known only because they have dialled, at most.
const MET_MAX: usize = 16;

/// Marks who founded a cluster: two that differ are not servers of the same one.
pub(super) fn digest(founders: &BTreeMap<u64, String>) -> u32 {
    let bytes = postcard::to_allocvec(founders).expect("memory takes everything");
    crc32c::crc32c(&bytes)
}

/// Who dials, and whom it means to reach.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Caller {
    /// Its name.
    pub(super) name: String,
    /// Its raft id.
    pub(super) id: u64,
    /// Where it can be dialled.
    pub(super) address: String,
    /// [`digest`] of its founders.
    pub(super) cluster: u32,
    /// Raft id of the one it wants.
    pub(super) to: u64,
}

/// What one who is dialled answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Verdict {
    /// Go on.
    Welcome,
    /// The caller was removed from the cluster for ever.
    Removed,
    /// Not now: one of the two does not know the other yet, or takes it for somebody else.
    Stranger,
    /// To a question: this server has not begun either, and would found a cluster of these.
    Fresh {
        /// Names of the founders.
        founders: Vec<String>,
    },
    /// To a question: this is what this server knows of the cluster.
    Founded {
        /// Who began it.
        founders: BTreeMap<u64, String>,
        /// [`Members::version`] here.
        version: u64,
        /// The caller's id, if it is a member.
        id: Option<u64>,
        /// Whether that one has been seen with something on its disk.
        known: bool,
    },
}

#[derive(Debug)]
struct Inner {
    /// This server's id and its cluster's founders, once it has begun.
    this: Option<(u64, BTreeMap<u64, String>)>,
    members: Members,
    /// Addresses in the configuration, by name.
    seeds: BTreeMap<String, String>,
    /// Name and address of servers that the log here does not know yet.
    met: BTreeMap<u64, (String, String)>,
}

#[derive(Debug)]
pub(super) struct Roster {
    name: String,
    inner: RwLock<Inner>,
}

impl Roster {
    pub(super) fn new(name: &str, seeds: BTreeMap<String, String>) -> Self {
        Self {
            name: name.to_owned(),
            inner: RwLock::new(Inner {
                this: None,
                members: Members::default(),
                seeds,
                met: BTreeMap::new(),
            }),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        let inner = self.inner.read();
        inner.expect("no thread panics while it holds this")
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        let inner = self.inner.write();
        inner.expect("no thread panics while it holds this")
    }

    /// This server's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The other servers of the configuration: name and address.
    pub(super) fn seeds(&self) -> BTreeMap<String, String> {
        let mut seeds = self.read().seeds.clone();
        seeds.remove(&self.name);
        seeds
    }

    /// This server takes part from now on.
    pub(super) fn begin(&self, id: u64, founders: &BTreeMap<u64, String>) {
        let mut inner = self.write();
        inner.members = Members::founded(founders);
        inner.this = Some((id, founders.clone()));
    }

    /// The log says this.
    pub(super) fn update(&self, members: &Members) {
        let mut inner = self.write();
        inner.met.retain(|id, _| members.is_unknown(*id));
        inner.members = members.clone();
    }

    /// Who `caller` may be here. True beside [`Verdict::Welcome`]: it is new to this server.
    pub(super) fn judge(&self, caller: &Caller) -> (Verdict, bool) {
        let mut inner = self.write();
        let Some((this, founders)) = &inner.this else {
            return (Verdict::Stranger, false);
        };
        if digest(founders) != caller.cluster {
            return (Verdict::Stranger, false);
        }
        if inner.members.was_removed(caller.id) {
            return (Verdict::Removed, false);
        }
        if *this != caller.to || *this == caller.id {
            return (Verdict::Stranger, false);
        }
        match inner.members.get(caller.id) {
            Some(member) if member.name == caller.name => (Verdict::Welcome, false),
            Some(_) => (Verdict::Stranger, false),
            None => {
                let new = !inner.met.contains_key(&caller.id);
                if new && inner.met.len() >= MET_MAX {
                    return (Verdict::Stranger, false);
                }
                let found = (caller.name.clone(), caller.address.clone());
                inner.met.insert(caller.id, found);
                (Verdict::Welcome, new)
            }
        }
    }

    /// What a server without a disk, which asks who it is, is told.
    pub(super) fn answer(&self, name: &str, known: impl Fn(u64) -> bool) -> Verdict {
        let inner = self.read();
        match &inner.this {
            None => Verdict::Fresh {
                founders: inner.seeds.keys().cloned().collect(),
            },
            Some((_, founders)) => {
                let id = inner.members.find(name);
                Verdict::Founded {
                    founders: founders.clone(),
                    version: inner.members.version(),
                    id,
                    known: id.is_some_and(known),
                }
            }
        }
    }

    /// How this server introduces itself to `to`; nothing if it has not begun.
    pub(super) fn caller(&self, to: u64) -> Option<Caller> {
        let inner = self.read();
        let (id, founders) = inner.this.as_ref()?;
        Some(Caller {
            name: self.name.clone(),
            id: *id,
            address: inner.seeds.get(&self.name).cloned().unwrap_or_default(),
            cluster: digest(founders),
            to,
        })
    }

    /// A server's name, and where it may be: what the log says first, then the configuration.
    pub(super) fn peer(&self, id: u64) -> Option<(String, Vec<String>)> {
        let inner = self.read();
        let (name, address) = match inner.members.get(id) {
            Some(member) => (&member.name, &member.peer),
            None => inner.met.get(&id).map(|(name, address)| (name, address))?,
        };
        let mut addresses = vec![address.clone()];
        addresses.extend(
            inner
                .seeds
                .get(name)
                .filter(|seed| *seed != address)
                .cloned(),
        );
        addresses.retain(|address| !address.is_empty());
        Some((name.clone(), addresses))
    }

    /// The raft id of the server with this name.
    pub(super) fn id_of(&self, name: &str) -> Option<u64> {
        self.read().members.find(name)
    }

    /// What to call a server in the log.
    pub(super) fn name_of(&self, id: u64) -> String {
        self.peer(id)
            .map_or_else(|| format!("server {id}"), |(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_let_in() {
        let founders: BTreeMap<u64, String> = (1..).zip(["a", "b"].map(str::to_owned)).collect();
        let seeds = [("a".to_owned(), "h:1".to_owned())].into();
        let roster = Roster::new("a", seeds);
        let caller = |id, name: &str, to| Caller {
            name: name.into(),
            id,
            address: "x:1".into(),
            cluster: digest(&founders),
            to,
        };
        assert_eq!(
            roster.judge(&caller(2, "b", 1)).0,
            Verdict::Stranger,
            "not begun"
        );
        assert!(roster.caller(2).is_none());
        roster.begin(1, &founders);
        assert_eq!(roster.judge(&caller(2, "b", 1)), (Verdict::Welcome, false));
        assert_eq!(
            roster.judge(&caller(2, "c", 1)).0,
            Verdict::Stranger,
            "another name"
        );
        assert_eq!(
            roster.judge(&caller(2, "b", 3)).0,
            Verdict::Stranger,
            "meant for another"
        );
        assert_eq!(
            roster.judge(&caller(1, "a", 1)).0,
            Verdict::Stranger,
            "ourselves"
        );
        let mut other = caller(2, "b", 1);
        other.cluster += 1;
        assert_eq!(roster.judge(&other).0, Verdict::Stranger, "another cluster");
        assert_eq!(roster.judge(&caller(7, "g", 1)), (Verdict::Welcome, true));
        assert_eq!(roster.judge(&caller(7, "g", 1)), (Verdict::Welcome, false));
        assert_eq!(roster.peer(7), Some(("g".into(), vec!["x:1".into()])));
        for id in 8..100 {
            let (verdict, _) = roster.judge(&caller(id, "m", 1));
            let room = id < 7 + MET_MAX as u64;
            assert_eq!(verdict == Verdict::Welcome, room, "id {id}");
        }
        let leaving = crate::members::Reconfig::parse(None, Some("b"), None, -1).unwrap();
        let mut members = Members::founded(&founders);
        members = members.reconfigured(&leaving, 5).unwrap();
        roster.update(&members);
        assert_eq!(roster.judge(&caller(2, "b", 1)).0, Verdict::Removed);
    }
}
