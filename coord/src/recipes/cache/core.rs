//! The cache's decisions: what is known, what must be read again, and what has come of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use bytes::Bytes;

use super::{CacheEvent, Limits, Lookup, Node, Scope};
use crate::recipes::znodes::join;
use crate::wire::{EventType, Stat, parent};

/// A path to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) path: String,
    /// Whether its children's names are wanted, too.
    pub(super) list: bool,
    /// Whether its round waits for this.
    walk: bool,
    generation: u64,
    round: u64,
}

/// What was read: the znode and its children's names.
pub(super) type Answer = Option<(Bytes, Stat, Vec<String>)>;

struct Held {
    node: Node,
    /// The round in which it was read last.
    round: u64,
}

struct Pending {
    /// The number of the latest reason to read it; answers to earlier ones may be too old.
    generation: u64,
    list: bool,
}

pub(super) struct Core {
    root: String,
    scope: Scope,
    limits: Limits,
    nodes: BTreeMap<String, Held>,
    /// Total length of paths and data.
    bytes: usize,
    /// What must be read again. What is held of it is out of date.
    pending: BTreeMap<String, Pending>,
    queue: VecDeque<(String, u64)>,
    generation: u64,
    /// A round reads everything.
    round: u64,
    /// What this round has yet to read.
    walking: BTreeSet<String>,
    /// Whether the round is over.
    complete: bool,
    connected: bool,
    overflow: bool,
    events: Vec<CacheEvent>,
}

impl Core {
    pub(super) fn new(root: &str, scope: Scope, limits: Limits) -> Self {
        Self {
            root: root.to_owned(),
            scope,
            limits,
            nodes: BTreeMap::new(),
            bytes: 0,
            pending: BTreeMap::new(),
            queue: VecDeque::new(),
            generation: 0,
            round: 0,
            walking: BTreeSet::new(),
            complete: false,
            connected: false,
            overflow: false,
            events: Vec::new(),
        }
    }

    /// All changes from now on are told; those before may not have been.
    pub(super) fn handle_missed(&mut self) {
        if self.overflow {
            return;
        }
        self.connected = true;
        self.complete = false;
        self.round += 1;
        self.walking.clear();
        // Answers to what was asked before may be too old now.
        let pending = std::mem::take(&mut self.pending);
        for (path, due) in pending {
            self.mark(path, due.list);
        }
        let root = self.root.clone();
        self.walk(root);
    }

    /// No change is told any more, for the time being.
    pub(super) fn handle_disconnected(&mut self) {
        if std::mem::replace(&mut self.connected, false) && self.complete {
            self.events.push(CacheEvent::Stale);
        }
        self.complete = false;
    }

    /// A change was told.
    pub(super) fn handle_event(&mut self, event: EventType, path: &str) {
        if self.overflow || !self.covers(path) {
            return;
        }
        match event {
            EventType::NodeCreated => {
                let list = self.lists(path);
                self.mark(path.to_owned(), list);
            }
            EventType::NodeDataChanged => self.mark(path.to_owned(), false),
            EventType::NodeChildrenChanged => {
                if self.lists(path) {
                    self.mark(path.to_owned(), true);
                }
            }
            EventType::NodeDeleted => {
                self.pending.remove(path);
                self.remove(path);
                self.walked(path);
            }
            EventType::None
            | EventType::DataWatchRemoved
            | EventType::ChildWatchRemoved
            | EventType::PersistentWatchRemoved => {}
        }
    }

    /// The root was deleted, and nothing but reading it tells when it comes back.
    pub(super) fn look_for_root(&mut self, path: &str) {
        if path == self.root && !self.overflow {
            let list = self.lists(path);
            self.mark(path.to_owned(), list);
        }
    }

    /// What was read, after all changes that were told before the answer came.
    pub(super) fn handle_answer(&mut self, ask: &Ask, answer: Answer) {
        if self.overflow {
            return;
        }
        let path = &ask.path;
        // What was asked for before the round came to this path says nothing about its children.
        let walk = ask.walk && ask.round == self.round && self.walking.contains(path);
        if let Some((.., names)) = answer.as_ref().filter(|_| ask.list) {
            for name in names {
                let child = join(path, name);
                if walk {
                    self.walk(child);
                } else if !self.nodes.contains_key(&child) && !self.pending.contains_key(&child) {
                    let list = self.lists(&child);
                    self.mark(child, list);
                }
            }
        }
        let due = self.pending.get(path);
        let newest = due.is_some_and(|due| due.generation == ask.generation);
        match answer {
            Some((data, stat, _)) if newest => self.insert(ask, Node { data, stat }),
            // Not the newest perhaps, but newer: something that changes all the time is followed.
            Some((data, stat, _)) if due.is_some() => {
                let held = self.nodes.get(path);
                if held.is_some_and(|held| held.node.stat.mzxid < stat.mzxid) {
                    self.insert(ask, Node { data, stat });
                }
            }
            None if newest => self.remove(path),
            Some(_) | None => {}
        }
        if newest {
            self.pending.remove(path);
        }
        if walk {
            self.walked(path);
        }
    }

    /// The next path to read.
    pub(super) fn poll_ask(&mut self) -> Option<Ask> {
        loop {
            let (path, generation) = self.queue.pop_front()?;
            let due = self.pending.get(&path);
            if let Some(due) = due.filter(|due| due.generation == generation) {
                return Some(Ask {
                    list: due.list,
                    walk: self.walking.contains(&path),
                    path,
                    generation,
                    round: self.round,
                });
            }
        }
    }

    pub(super) fn has_asks(&self) -> bool {
        !self.queue.is_empty()
    }

    /// What has changed since this was called last.
    pub(super) fn take_events(&mut self) -> Vec<CacheEvent> {
        std::mem::take(&mut self.events)
    }

    /// Whether more is there than may be held; nothing is held then.
    pub(super) const fn overflow(&self) -> bool {
        self.overflow
    }

    pub(super) fn usage(&self) -> (usize, usize) {
        (self.nodes.len(), self.bytes)
    }

    /// Whether everything is up to date.
    pub(super) fn is_fresh(&self) -> bool {
        self.complete && self.pending.is_empty()
    }

    pub(super) fn get(&self, path: &str) -> Lookup<Option<Node>> {
        let held = self.nodes.get(path).map(|held| held.node.clone());
        if self.overflow || !self.covers(path) {
            Lookup::Unknown
        } else if self.complete && !self.pending.contains_key(path) {
            Lookup::Fresh(held)
        } else if held.is_some() || self.round > 1 || self.complete {
            Lookup::Stale(held)
        } else {
            Lookup::Unknown
        }
    }

    /// The names of a znode's children, in order.
    pub(super) fn children(&self, path: &str) -> Lookup<Vec<String>> {
        if self.overflow || !self.lists(path) || self.round == 0 {
            return Lookup::Unknown;
        }
        let prefix = if path == "/" {
            "/"
        } else {
            &format!("{path}/")
        };
        let is_child = |other: &str| other[prefix.len()..].find('/').is_none();
        let names = below(&self.nodes, prefix)
            .filter(|other| is_child(other))
            .map(|other| other[prefix.len()..].to_owned())
            .collect();
        // Whether one that is to be read is there is not known; nor, while the znode is to be
        // listed, whether there are more.
        let listed = self.pending.get(path).is_none_or(|due| !due.list);
        let known = below(&self.pending, prefix)
            .all(|other| !is_child(other) || self.nodes.contains_key(other));
        if self.complete && listed && known {
            Lookup::Fresh(names)
        } else {
            Lookup::Stale(names)
        }
    }

    pub(super) fn snapshot(&self) -> BTreeMap<String, Node> {
        let nodes = self.nodes.iter();
        nodes
            .map(|(path, held)| (path.clone(), held.node.clone()))
            .collect()
    }

    fn covers(&self, path: &str) -> bool {
        let below = |path: &str| {
            let rest = path.strip_prefix(&self.root);
            self.root == "/" || rest.is_some_and(|rest| rest.starts_with('/'))
        };
        path == self.root
            || match self.scope {
                Scope::Node => false,
                Scope::Children => parent(path).is_some_and(|(above, _)| above == self.root),
                Scope::Subtree => below(path),
            }
    }

    /// Whether the children of a path that is covered are covered, too.
    fn lists(&self, path: &str) -> bool {
        match self.scope {
            Scope::Node => false,
            Scope::Children => path == self.root,
            Scope::Subtree => self.covers(path),
        }
    }

    fn walk(&mut self, path: String) {
        let list = self.lists(&path);
        self.walking.insert(path.clone());
        self.mark(path, list);
    }

    fn mark(&mut self, path: String, list: bool) {
        self.generation += 1;
        let generation = self.generation;
        let due = self.pending.entry(path.clone()).or_insert(Pending {
            generation,
            list: false,
        });
        due.generation = generation;
        due.list |= list;
        self.queue.push_back((path, generation));
    }

    /// This round has read a path, or need not any more.
    fn walked(&mut self, path: &str) {
        self.walking.remove(path);
        if self.complete || !self.connected || !self.walking.is_empty() {
            return;
        }
        // Nobody has seen these where they should be.
        let gone = |(path, held): (&String, &Held)| {
            let gone = held.round < self.round && !self.pending.contains_key(path);
            gone.then(|| path.clone())
        };
        let gone: Vec<String> = self.nodes.iter().filter_map(gone).collect();
        for path in gone {
            self.remove(&path);
        }
        self.complete = true;
        self.events.push(CacheEvent::Fresh);
    }

    fn insert(&mut self, ask: &Ask, node: Node) {
        let path = ask.path.as_str();
        self.bytes += path.len() + node.data.len();
        let held = Held {
            node: node.clone(),
            round: ask.round,
        };
        let path = path.to_owned();
        match self.nodes.insert(path.clone(), held) {
            None => self.events.push(CacheEvent::Added { path, node }),
            Some(old) => {
                self.bytes -= path.len() + old.node.data.len();
                let version = |stat: &Stat| (stat.czxid, stat.mzxid);
                if version(&old.node.stat) != version(&node.stat) {
                    self.events.push(CacheEvent::Changed { path, node });
                }
            }
        }
        if self.nodes.len() > self.limits.nodes || self.bytes > self.limits.bytes {
            self.overflow = true;
            self.nodes.clear();
            self.pending.clear();
            self.queue.clear();
            self.walking.clear();
        }
    }

    fn remove(&mut self, path: &str) {
        if let Some(old) = self.nodes.remove(path) {
            self.bytes -= path.len() + old.node.data.len();
            let path = path.to_owned();
            self.events.push(CacheEvent::Removed { path });
        }
    }
}

fn below<'a, T>(map: &'a BTreeMap<String, T>, prefix: &str) -> impl Iterator<Item = &'a String> {
    let from = (Bound::Excluded(prefix), Bound::Unbounded);
    map.range::<str, _>(from)
        .map(|(path, _)| path)
        .take_while(move |path| path.starts_with(prefix))
}
