//! One-shot watches of the connections of one server.
//!
//! Watches are not replicated: they belong to a connection, and fire when this server applies the
//! change, before it answers anybody who could see it.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::ConnId;
use crate::tree::{self, Change};
use crate::wire::EventType;

/// Watches of one connection at most; a connection that asks for more is closed.
const WATCHES_PER_CONNECTION_MAX: usize = 100_000;

/// What a watch waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum WatchKind {
    /// Creation, deletion, or a change of data (set by `exists` and `getData`).
    Data,
    /// Deletion, or a child created or deleted (set by `getChildren`).
    Children,
}

/// One event, for all who are to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fired {
    pub(crate) kind: EventType,
    pub(crate) path: String,
    pub(crate) conns: BTreeSet<ConnId>,
}

#[derive(Debug, Default)]
pub(crate) struct Watches {
    by_path: BTreeMap<(WatchKind, String), BTreeSet<ConnId>>,
    /// Invariant: the same pairs as `by_path`, the other way round.
    by_conn: BTreeMap<ConnId, BTreeSet<(WatchKind, String)>>,
    count: usize,
}

impl Watches {
    /// Sets a watch; setting it twice is setting it once. False if the connection has too many.
    #[must_use]
    pub(crate) fn set(&mut self, conn: ConnId, kind: WatchKind, path: &str) -> bool {
        let key = (kind, path.to_owned());
        let own = self.by_conn.entry(conn).or_default();
        if own.len() >= WATCHES_PER_CONNECTION_MAX && !own.contains(&key) {
            return false;
        }
        if own.insert(key.clone()) {
            self.by_path.entry(key).or_default().insert(conn);
            self.count += 1;
        }
        true
    }

    /// Takes one watch away. False if there was none.
    pub(crate) fn remove(&mut self, conn: ConnId, kind: WatchKind, path: &str) -> bool {
        let key = (kind, path.to_owned());
        let had = self
            .by_conn
            .get_mut(&conn)
            .is_some_and(|own| own.remove(&key));
        if had {
            self.count -= 1;
            if let Some(conns) = self.by_path.get_mut(&key) {
                conns.remove(&conn);
                if conns.is_empty() {
                    self.by_path.remove(&key);
                }
            }
        }
        had
    }

    pub(crate) fn forget(&mut self, conn: ConnId) {
        for key in self.by_conn.remove(&conn).unwrap_or_default() {
            self.count -= 1;
            if let Some(conns) = self.by_path.get_mut(&key) {
                conns.remove(&conn);
                if conns.is_empty() {
                    self.by_path.remove(&key);
                }
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Takes out what `change` fires. Nobody is told twice of one deletion.
    pub(crate) fn fire(&mut self, change: &Change) -> Vec<Fired> {
        let mut fired = Vec::new();
        let mut tell = |kind, path: &str, conns: BTreeSet<ConnId>| {
            if !conns.is_empty() {
                fired.push(Fired {
                    kind,
                    path: path.to_owned(),
                    conns,
                });
            }
        };
        let (path, lists_parent) = match change {
            Change::Created(path) => {
                tell(
                    EventType::NodeCreated,
                    path,
                    self.take(WatchKind::Data, path),
                );
                (path, true)
            }
            Change::Deleted(path) => {
                let mut conns = self.take(WatchKind::Data, path);
                conns.extend(self.take(WatchKind::Children, path));
                tell(EventType::NodeDeleted, path, conns);
                (path, true)
            }
            Change::Data(path) => {
                tell(
                    EventType::NodeDataChanged,
                    path,
                    self.take(WatchKind::Data, path),
                );
                (path, false)
            }
        };
        if lists_parent && let Some(parent) = tree::parent(path) {
            tell(
                EventType::NodeChildrenChanged,
                parent,
                self.take(WatchKind::Children, parent),
            );
        }
        fired
    }

    fn take(&mut self, kind: WatchKind, path: &str) -> BTreeSet<ConnId> {
        if self.count == 0 {
            return BTreeSet::new();
        }
        let key = (kind, path.to_owned());
        let conns = self.by_path.remove(&key).unwrap_or_default();
        for conn in &conns {
            self.count -= 1;
            if let Some(own) = self.by_conn.get_mut(conn) {
                own.remove(&key);
            }
        }
        conns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conns(ids: &[u64]) -> BTreeSet<ConnId> {
        ids.iter().map(|id| ConnId(*id)).collect()
    }

    #[test]
    fn each_watch_fires_once_and_tells_each_connection_once() {
        let mut watches = Watches::default();
        let (a, b) = (ConnId(1), ConnId(2));
        assert!(watches.set(a, WatchKind::Data, "/x/y"));
        assert!(watches.set(a, WatchKind::Data, "/x/y"));
        assert!(watches.set(a, WatchKind::Children, "/x/y"));
        assert!(watches.set(b, WatchKind::Children, "/x"));
        assert_eq!(watches.len(), 3);
        let fired = watches.fire(&Change::Deleted("/x/y".into()));
        assert_eq!(
            fired,
            [
                Fired {
                    kind: EventType::NodeDeleted,
                    path: "/x/y".into(),
                    conns: conns(&[1])
                },
                Fired {
                    kind: EventType::NodeChildrenChanged,
                    path: "/x".into(),
                    conns: conns(&[2])
                },
            ]
        );
        assert_eq!(watches.len(), 0);
        assert_eq!(watches.fire(&Change::Created("/x/y".into())), []);
    }

    #[test]
    fn data_changes_leave_child_watches_alone() {
        let mut watches = Watches::default();
        assert!(watches.set(ConnId(1), WatchKind::Children, "/x"));
        assert!(watches.set(ConnId(1), WatchKind::Data, "/"));
        assert_eq!(watches.fire(&Change::Data("/x".into())), []);
        watches.forget(ConnId(1));
        assert_eq!(watches.len(), 0);
        assert_eq!(watches.fire(&Change::Created("/x/z".into())), []);
    }
}
