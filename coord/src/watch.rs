//! Watches of the connections of one server: one-shot, persistent, and persistent recursive.
//!
//! Watches are not replicated: they belong to a connection, and fire when this server applies the
//! change, before it answers anybody who could see it. A connection that watches a path in several
//! ways is told of one change once, and each way goes on or ends by its own rule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::core::ConnId;
use crate::tree::{self, Change};
use crate::wire::EventType;

/// Paths that one connection watches at most; a connection that asks for more is closed.
const WATCHES_PER_CONNECTION_MAX: usize = 100_000;

/// Watches of one server at most; the connection that asks for more is closed. (Some 200 bytes each.)
const WATCHES_MAX: usize = 4_000_000;

/// What a watch waits for, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum WatchKind {
    /// Creation, deletion, or a change of data, once (set by `exists` and `getData`).
    Data,
    /// Deletion, or a child created or deleted, once (set by `getChildren`).
    Children,
    /// All of these, until it is removed.
    Persistent,
    /// Creation, deletion or change of data of the znode and all below it, until it is removed. It
    /// hears of no children as such: their creation and deletion are told already.
    Recursive,
}

impl WatchKind {
    pub(crate) const ALL: [Self; 4] = [
        Self::Data,
        Self::Children,
        Self::Persistent,
        Self::Recursive,
    ];

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// One event, for all who are to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fired {
    pub(crate) kind: EventType,
    pub(crate) path: String,
    pub(crate) conns: BTreeSet<ConnId>,
}

#[derive(Debug, Default)]
struct OnPath([BTreeSet<ConnId>; 4]);

impl OnPath {
    fn is_empty(&self) -> bool {
        self.0.iter().all(BTreeSet::is_empty)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Watches {
    by_path: BTreeMap<Arc<str>, OnPath>,
    /// Invariant: the same watches as `by_path`, the other way round; kinds as bits, never none.
    by_conn: BTreeMap<ConnId, BTreeMap<Arc<str>, u8>>,
    /// Invariant: how many there are; `connections` and `paths` of `wchs` are the maps' sizes.
    count: usize,
    /// Invariant: how many of them are recursive. While none is, a change asks no ancestor.
    recursive: usize,
}

impl Watches {
    /// Sets a watch; setting it twice is setting it once. False if there are too many.
    #[must_use]
    pub(crate) fn set(&mut self, conn: ConnId, kind: WatchKind, path: &str) -> bool {
        let path = match self.by_path.get_key_value(path) {
            Some((shared, _)) => shared.clone(),
            None => Arc::from(path),
        };
        if self.has(conn, kind, &path) {
            return true;
        }
        if self.count >= WATCHES_MAX {
            return false;
        }
        let own = self.by_conn.entry(conn).or_default();
        if own.len() >= WATCHES_PER_CONNECTION_MAX && !own.contains_key(&path) {
            return false;
        }
        *own.entry(path.clone()).or_default() |= kind.bit();
        self.by_path.entry(path).or_default().0[kind as usize].insert(conn);
        self.count += 1;
        self.recursive += usize::from(kind == WatchKind::Recursive);
        true
    }

    /// Is there this watch?
    pub(crate) fn has(&self, conn: ConnId, kind: WatchKind, path: &str) -> bool {
        let own = self.by_conn.get(&conn).and_then(|own| own.get(path));
        own.is_some_and(|bits| bits & kind.bit() != 0)
    }

    /// Takes one watch away. False if there was none.
    pub(crate) fn remove(&mut self, conn: ConnId, kind: WatchKind, path: &str) -> bool {
        if !self.has(conn, kind, path) {
            return false;
        }
        let on_path = self.by_path.get_mut(path).expect("both maps hold the same");
        on_path.0[kind as usize].remove(&conn);
        if on_path.is_empty() {
            self.by_path.remove(path);
        }
        self.disown(conn, kind, path);
        true
    }

    /// The half of [`Self::remove`] that belongs to the connection.
    fn disown(&mut self, conn: ConnId, kind: WatchKind, path: &str) {
        let own = self.by_conn.get_mut(&conn);
        let own = own.expect("both maps hold the same");
        let bits = own.get_mut(path).expect("both maps hold the same");
        *bits &= !kind.bit();
        if *bits == 0 {
            own.remove(path);
        }
        if own.is_empty() {
            self.by_conn.remove(&conn);
        }
        self.count -= 1;
        self.recursive -= usize::from(kind == WatchKind::Recursive);
    }

    pub(crate) fn forget(&mut self, conn: ConnId) {
        for (path, bits) in self.by_conn.remove(&conn).unwrap_or_default() {
            let on_path = self.by_path.get_mut(&path);
            let on_path = on_path.expect("both maps hold the same");
            for kind in WatchKind::ALL {
                if bits & kind.bit() != 0 {
                    on_path.0[kind as usize].remove(&conn);
                    self.count -= 1;
                    self.recursive -= usize::from(kind == WatchKind::Recursive);
                }
            }
            if on_path.is_empty() {
                self.by_path.remove(&path);
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// How many paths are watched.
    pub(crate) fn paths(&self) -> usize {
        self.by_path.len()
    }

    /// How many connections watch something.
    pub(crate) fn connections(&self) -> usize {
        self.by_conn.len()
    }

    /// The watched paths of each connection that watches.
    pub(crate) fn by_connection(
        &self,
    ) -> impl Iterator<Item = (ConnId, impl Iterator<Item = &str>)> {
        self.by_conn
            .iter()
            .map(|(conn, own)| (*conn, own.keys().map(AsRef::as_ref)))
    }

    /// The watching connections of each watched path.
    pub(crate) fn by_path(&self) -> impl Iterator<Item = (&str, BTreeSet<ConnId>)> {
        self.by_path.iter().map(|(path, on_path)| {
            let conns = on_path.0.iter().flatten().copied().collect();
            (path.as_ref(), conns)
        })
    }

    /// Tells what `change` fires, and takes out the one-shot watches among it. Nobody is told twice
    /// of one change of one znode.
    pub(crate) fn fire(&mut self, change: &Change) -> Vec<Fired> {
        if self.count == 0 {
            return Vec::new();
        }
        let (path, kind, lists_parent) = match change {
            Change::Created(path) => (path, EventType::NodeCreated, true),
            Change::Deleted(path) => (path, EventType::NodeDeleted, true),
            Change::Data(path) => (path, EventType::NodeDataChanged, false),
        };
        let mut conns = self.take(WatchKind::Data, path);
        if kind == EventType::NodeDeleted {
            join(&mut conns, self.take(WatchKind::Children, path));
        }
        self.add(&mut conns, WatchKind::Persistent, path);
        if self.recursive > 0 {
            self.add(&mut conns, WatchKind::Recursive, path);
            let ancestors = std::iter::successors(tree::parent(path), |path| tree::parent(path));
            for ancestor in ancestors {
                self.add(&mut conns, WatchKind::Recursive, ancestor);
            }
        }
        let mut fired = Vec::new();
        let mut tell = |kind, path: &str, conns: BTreeSet<ConnId>| {
            if !conns.is_empty() {
                let path = path.to_owned();
                fired.push(Fired { kind, path, conns });
            }
        };
        tell(kind, path, conns);
        if lists_parent && let Some(parent) = tree::parent(path) {
            let mut conns = self.take(WatchKind::Children, parent);
            self.add(&mut conns, WatchKind::Persistent, parent);
            tell(EventType::NodeChildrenChanged, parent, conns);
        }
        fired
    }

    /// Adds those who watch `path` in a way that stays.
    fn add(&self, conns: &mut BTreeSet<ConnId>, kind: WatchKind, path: &str) {
        if let Some(on_path) = self.by_path.get(path) {
            conns.extend(&on_path.0[kind as usize]);
        }
    }

    fn take(&mut self, kind: WatchKind, path: &str) -> BTreeSet<ConnId> {
        let Some(on_path) = self.by_path.get_mut(path) else {
            return BTreeSet::new();
        };
        let conns = std::mem::take(&mut on_path.0[kind as usize]);
        if on_path.is_empty() {
            self.by_path.remove(path);
        }
        for conn in &conns {
            self.disown(*conn, kind, path);
        }
        conns
    }

    /// Checks what must hold after every change.
    ///
    /// # Panics
    /// If it does not.
    #[cfg(test)]
    fn check_invariants(&self) {
        let mut other_way: BTreeMap<ConnId, BTreeMap<Arc<str>, u8>> = BTreeMap::new();
        let (mut count, mut recursive) = (0, 0);
        for (path, on_path) in &self.by_path {
            assert!(!on_path.is_empty(), "{path} is watched by nobody");
            for kind in WatchKind::ALL {
                for conn in &on_path.0[kind as usize] {
                    let own = other_way.entry(*conn).or_default();
                    *own.entry(path.clone()).or_default() |= kind.bit();
                    count += 1;
                    recursive += usize::from(kind == WatchKind::Recursive);
                }
            }
        }
        assert_eq!(other_way, self.by_conn);
        assert_eq!((count, recursive), (self.count, self.recursive));
    }
}

/// The smaller set into the larger one.
fn join(into: &mut BTreeSet<ConnId>, mut other: BTreeSet<ConnId>) {
    if into.len() < other.len() {
        std::mem::swap(into, &mut other);
    }
    into.extend(other);
}

#[cfg(test)]
mod tests {
    use super::*;
    use EventType::{NodeChildrenChanged, NodeCreated, NodeDataChanged, NodeDeleted};
    use WatchKind::{Children, Data, Persistent, Recursive};

    const A: ConnId = ConnId(1);
    const B: ConnId = ConnId(2);

    struct Bench(Watches);

    impl Bench {
        fn new(watches: &[(ConnId, WatchKind, &str)]) -> Self {
            let mut bench = Self(Watches::default());
            for (conn, kind, path) in watches {
                assert!(bench.0.set(*conn, *kind, path));
                assert!(bench.0.set(*conn, *kind, path), "twice is once");
            }
            bench.0.check_invariants();
            bench
        }

        fn fire(&mut self, change: Change, expected: &[(EventType, &str, &[ConnId])]) {
            let fired = self.0.fire(&change);
            let fired: Vec<_> = fired
                .iter()
                .map(|fired| {
                    let conns: Vec<ConnId> = fired.conns.iter().copied().collect();
                    (fired.kind, fired.path.as_str(), conns)
                })
                .collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|(kind, path, conns)| (*kind, *path, conns.to_vec()))
                .collect();
            assert_eq!(fired, expected, "{change:?}");
            self.0.check_invariants();
        }
    }

    fn created(path: &str) -> Change {
        Change::Created(path.into())
    }

    fn deleted(path: &str) -> Change {
        Change::Deleted(path.into())
    }

    fn data(path: &str) -> Change {
        Change::Data(path.into())
    }

    #[test]
    fn each_watch_fires_once_and_tells_each_connection_once() {
        let mut bench = Bench::new(&[
            (A, Data, "/x/y"),
            (A, Children, "/x/y"),
            (B, Children, "/x"),
        ]);
        assert_eq!(bench.0.len(), 3);
        bench.fire(
            deleted("/x/y"),
            &[
                (NodeDeleted, "/x/y", &[A]),
                (NodeChildrenChanged, "/x", &[B]),
            ],
        );
        assert_eq!(bench.0.len(), 0);
        bench.fire(created("/x/y"), &[]);
    }

    #[test]
    fn data_changes_leave_child_watches_alone() {
        let mut bench = Bench::new(&[(A, Children, "/x"), (A, Data, "/")]);
        bench.fire(data("/x"), &[]);
        bench.0.forget(A);
        bench.0.check_invariants();
        assert_eq!(bench.0.len(), 0);
        bench.fire(created("/x/z"), &[]);
    }

    #[test]
    fn persistent_watches_stay_and_hear_of_children() {
        let mut bench = Bench::new(&[(A, Persistent, "/x"), (B, Data, "/x")]);
        for _ in 0..2 {
            bench.fire(created("/x/y"), &[(NodeChildrenChanged, "/x", &[A])]);
            bench.fire(data("/x/y"), &[]);
            bench.fire(deleted("/x/y"), &[(NodeChildrenChanged, "/x", &[A])]);
        }
        bench.fire(data("/x"), &[(NodeDataChanged, "/x", &[A, B])]);
        bench.fire(deleted("/x"), &[(NodeDeleted, "/x", &[A])]);
        bench.fire(created("/x"), &[(NodeCreated, "/x", &[A])]);
    }

    #[test]
    fn recursive_watches_hear_of_all_below_and_never_of_children_as_such() {
        let mut bench = Bench::new(&[(A, Recursive, "/x"), (B, Recursive, "/")]);
        bench.fire(created("/x/y/z"), &[(NodeCreated, "/x/y/z", &[A, B])]);
        bench.fire(data("/x"), &[(NodeDataChanged, "/x", &[A, B])]);
        bench.fire(deleted("/x/y"), &[(NodeDeleted, "/x/y", &[A, B])]);
        bench.fire(created("/xy"), &[(NodeCreated, "/xy", &[B])]);
    }

    #[test]
    fn ways_of_watching_one_path_do_not_disturb_each_other() {
        let mut bench = Bench::new(&[
            (A, Recursive, "/x"),
            (A, Persistent, "/x"),
            (A, Data, "/x"),
            (A, Children, "/x"),
        ]);
        bench.fire(data("/x"), &[(NodeDataChanged, "/x", &[A])]);
        assert!(!bench.0.has(A, Data, "/x") && bench.0.has(A, Children, "/x"));
        bench.fire(deleted("/x"), &[(NodeDeleted, "/x", &[A])]);
        assert_eq!(bench.0.len(), 2, "the persistent ones stay");
        assert!(bench.0.remove(A, Persistent, "/x"));
        assert!(!bench.0.remove(A, Persistent, "/x"));
        bench.fire(created("/x"), &[(NodeCreated, "/x", &[A])]);
        bench.fire(created("/x/y"), &[(NodeCreated, "/x/y", &[A])]);
        assert!(bench.0.remove(A, Recursive, "/x"));
        bench.fire(data("/x"), &[]);
        assert_eq!((bench.0.paths(), bench.0.connections()), (0, 0));
    }

    #[test]
    fn a_connection_has_only_so_many() {
        let mut bench = Bench::new(&[]);
        for i in 0..WATCHES_PER_CONNECTION_MAX {
            assert!(bench.0.set(A, Data, &format!("/{i}")));
        }
        assert!(!bench.0.set(A, Data, "/one/more"));
        assert!(bench.0.set(A, Data, "/7"), "it has this one already");
        assert!(bench.0.set(B, Data, "/one/more"));
    }
}
