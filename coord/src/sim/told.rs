//! What one connection was told, and what it should have been: an exact account.
//!
//! A server puts an event out when it applies the change, and an answer at zxid *z* after everything
//! up to *z*. So what comes between two answers is known: the events of the changes between their
//! zxids, for what the connection watched then, in their order. Nothing may be missing, come twice,
//! come early, or come that was not asked for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::history::{Conn, Frame, History};
use super::model::What;
use crate::wire::{AddWatchMode, ErrorCode, EventType, Request, SetWatches, WatcherKind};

/// How a path is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watch {
    /// Creation, deletion or a change of data, once.
    Data,
    /// Deletion, or a child created or deleted, once.
    Children,
    /// All of these, for good.
    Persistent,
    /// Creation, deletion and changes of data of all below, for good.
    Recursive,
}

/// One change of the tree.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) zxid: u64,
    pub(super) path: String,
    pub(super) what: What,
}

/// An event that came, and when.
type Got = (u64, EventType, String);

pub(super) struct Account<'a> {
    history: &'a History,
    changes: &'a [Change],
    missed: &'a BTreeMap<usize, BTreeSet<(String, EventType)>>,
    watches: BTreeMap<String, BTreeSet<Watch>>,
    /// Changes before this place have been told.
    next: usize,
    got: VecDeque<Got>,
}

fn parent(path: &str) -> Option<&str> {
    match path.rfind('/')? {
        0 if path == "/" => None,
        0 => Some("/"),
        at => Some(&path[..at]),
    }
}

/// Checks one connection. `missed` is what each `setWatches` must be told at once.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn check(
    history: &History,
    changes: &[Change],
    missed: &BTreeMap<usize, BTreeSet<(String, EventType)>>,
    conn: &Conn,
) -> Result<(), String> {
    let mut account = Account {
        history,
        changes,
        missed,
        watches: BTreeMap::new(),
        next: 0,
        got: VecDeque::new(),
    };
    let mut seen = conn.seen;
    let mut restored = conn.restores.is_none();
    for frame in &conn.frames {
        let (zxid, op) = match frame {
            Frame::Event { at, kind, path } => {
                account.got.push_back((*at, *kind, path.clone()));
                continue;
            }
            Frame::Pong { zxid } => (*zxid, None),
            Frame::Reply(place) => {
                let answer = history.ops[*place].answer.as_ref();
                (answer.expect("it was answered").zxid, Some(*place))
            }
        };
        if zxid < seen {
            return Err(format!("it was taken back from {seen} to {zxid}"));
        }
        seen = zxid;
        account.up_to(zxid)?;
        if let Some(place) = op {
            restored |= conn.restores == Some(place);
            account.answered(place)?;
        }
        // Until its watches are set again, that answer will explain what it is told.
        if restored && let Some((_, kind, path)) = account.got.front() {
            return Err(format!(
                "it was told of {kind:?} {path} before an answer at {zxid}, and had not asked or \
                 had been told"
            ));
        }
    }
    if restored { account.rest() } else { Ok(()) }
}

impl Account<'_> {
    /// What a change tells this connection; one-shot watches are spent.
    fn events(&mut self, change: &Change) -> BTreeSet<(EventType, String)> {
        let kind = match change.what {
            What::Created => EventType::NodeCreated,
            What::Deleted => EventType::NodeDeleted,
            What::Data => EventType::NodeDataChanged,
        };
        let mut events = BTreeSet::new();
        let mut take = |path: &str, watch: Watch| {
            let on_path = self.watches.get_mut(path);
            on_path.is_some_and(|on_path| match watch {
                Watch::Data | Watch::Children => on_path.remove(&watch),
                Watch::Persistent | Watch::Recursive => on_path.contains(&watch),
            })
        };
        let path = change.path.as_str();
        let mut told = take(path, Watch::Data);
        if kind == EventType::NodeDeleted {
            told |= take(path, Watch::Children);
        }
        told |= take(path, Watch::Persistent) | take(path, Watch::Recursive);
        let mut above = parent(path);
        while let Some(ancestor) = above {
            told |= take(ancestor, Watch::Recursive);
            above = parent(ancestor);
        }
        if told {
            events.insert((kind, path.to_owned()));
        }
        if change.what != What::Data
            && let Some(parent) = parent(path)
            && take(parent, Watch::Children) | take(parent, Watch::Persistent)
        {
            events.insert((EventType::NodeChildrenChanged, parent.to_owned()));
        }
        events
    }

    /// The events of a change have come, or are among what is still to come (`all` is false).
    fn tells(&mut self, change: &Change, all: bool) -> Result<(), String> {
        let mut due = self.events(change);
        while !due.is_empty() {
            let Some((at, kind, path)) = self.got.pop_front() else {
                if all {
                    return Err(format!("it was not told of {due:?} at {}", change.zxid));
                }
                return Ok(());
            };
            if !due.remove(&(kind, path.clone())) {
                return Err(format!(
                    "it was told of {kind:?} {path}, and due was {due:?} of {}",
                    change.zxid
                ));
            }
            let place = usize::try_from(change.zxid - 1).expect("short runs");
            if self.history.log[place].at > at {
                return Err(format!("{kind:?} {path} was told before it was so"));
            }
        }
        Ok(())
    }

    /// Everything up to `zxid` was told.
    fn up_to(&mut self, zxid: u64) -> Result<(), String> {
        while let Some(change) = self.changes.get(self.next)
            && change.zxid <= zxid
        {
            self.next += 1;
            self.tells(change, true)?;
        }
        Ok(())
    }

    /// What came after the last answer is the beginning of what follows.
    fn rest(&mut self) -> Result<(), String> {
        while let Some(change) = self.changes.get(self.next)
            && !self.got.is_empty()
        {
            self.next += 1;
            self.tells(change, false)?;
        }
        match self.got.pop_front() {
            None => Ok(()),
            Some((_, kind, path)) => {
                Err(format!("it was told of {kind:?} {path}, which never was"))
            }
        }
    }

    fn set(&mut self, path: &str, watch: Watch) {
        self.watches
            .entry(path.to_owned())
            .or_default()
            .insert(watch);
    }

    /// What an answer says about watches.
    fn answered(&mut self, place: usize) -> Result<(), String> {
        let op = &self.history.ops[place];
        let result = &op.answer.as_ref().expect("it was answered").result;
        match &op.request {
            Request::Exists { path, watch: true } => self.set(path, Watch::Data),
            Request::GetData { path, watch: true } if result.is_ok() => {
                self.set(path, Watch::Data);
            }
            Request::GetChildren { path, watch: true }
            | Request::GetChildren2 { path, watch: true }
                if result.is_ok() =>
            {
                self.set(path, Watch::Children);
            }
            Request::AddWatch { path, mode } => {
                let recursive =
                    AddWatchMode::from_code(*mode) == Ok(AddWatchMode::PersistentRecursive);
                let watch = if recursive {
                    Watch::Recursive
                } else {
                    Watch::Persistent
                };
                self.set(path, watch);
            }
            Request::RemoveWatches { path, kind } => {
                let on_path = self.watches.entry(path.clone()).or_default();
                let before = on_path.len();
                match WatcherKind::from_code(*kind) {
                    Ok(WatcherKind::Data) => {
                        on_path.remove(&Watch::Data);
                    }
                    Ok(WatcherKind::Children) => {
                        on_path.remove(&Watch::Children);
                    }
                    _ => on_path.clear(),
                }
                let right = if on_path.len() < before {
                    Ok(())
                } else {
                    Err(ErrorCode::NoWatcher)
                };
                if result.as_ref().map(|_| ()).map_err(|code| *code) != right {
                    return Err(format!("{:?} was answered {result:?}", op.request));
                }
            }
            Request::SetWatches(watches) => self.restored(place, watches)?,
            _ => {}
        }
        Ok(())
    }

    fn restored(&mut self, place: usize, watches: &SetWatches) -> Result<(), String> {
        let none = BTreeSet::new();
        let missed = self.missed.get(&place).unwrap_or(&none);
        let told: BTreeSet<(String, EventType)> = self
            .got
            .drain(..)
            .map(|(_, kind, path)| (path, kind))
            .collect();
        if told != *missed {
            return Err(format!(
                "it came back and was told {told:?}, and had missed {missed:?}"
            ));
        }
        let was_told = |path: &String, events: &[EventType]| {
            events
                .iter()
                .any(|event| missed.contains(&(path.clone(), *event)))
        };
        use EventType::{NodeChildrenChanged, NodeCreated, NodeDataChanged, NodeDeleted};
        for (paths, watch, events) in [
            (
                &watches.data,
                Watch::Data,
                &[NodeDeleted, NodeDataChanged][..],
            ),
            (&watches.exist, Watch::Data, &[NodeCreated]),
            (
                &watches.child,
                Watch::Children,
                &[NodeDeleted, NodeChildrenChanged],
            ),
            (&watches.persistent, Watch::Persistent, &[]),
            (&watches.persistent_recursive, Watch::Recursive, &[]),
        ] {
            for path in paths.iter().filter(|path| !was_told(path, events)) {
                self.set(path, watch);
            }
        }
        Ok(())
    }
}
