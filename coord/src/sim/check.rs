//! Judges a history.
//!
//! # Why this is sound, and misses nothing that it looks for
//!
//! Whether a history is linearizable is hard to decide only because the order is unknown. Here the
//! service names it: every answer carries a zxid, and the entries that servers applied, which the
//! simulation sees (and which must be the same on all servers), tell what lies at each. So the order
//! is a *witness*, and it remains to verify it, in time n log n:
//!
//! - it fits real time: an update stands after everything that anybody had been shown when it was
//!   sent; a `sync` is answered at a point that is not before that;
//! - it explains the answers: replayed in this order through a [model](super::model) written apart,
//!   every update answers what its client was answered, and every read what it was answered at its
//!   zxid, byte for byte, metadata included;
//! - each update of the order is one that a client asked for, and stands there once at most. One
//!   without an answer may stand there or not: the log knows.
//!
//! A history that passes is linearizable, whatever the service did inside: the witness proves it.
//! One that fails breaks what the service promises: that zxids are the order. Nothing is searched for,
//! so nothing is given up on.
//!
//! Reads alone are promised less (never behind what their session has seen), and are held to that;
//! watches are checked against the changes between the zxids of the answers around them.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Frame, History};
use super::model::{Answer, Effect, Model};
use super::told::{self, Change};
use crate::members::Members;
use crate::tree::Kind;
use crate::txn::{self, Command, Entry};
use crate::wire::{
    CreateMode, ErrorCode, EventType, MultiOp, MultiResult, Request, Response, SetWatches,
};

/// How much was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Updates that were answered.
    pub updates: u64,
    /// Updates that may have been done or not.
    pub unknown: u64,
    /// ... and were.
    pub unknown_done: u64,
    /// Reads.
    pub reads: u64,
    /// Barriers.
    pub syncs: u64,
    /// Watch events.
    pub events: u64,
    /// Watch events that a client was told when it came back.
    pub caught_up: u64,
    /// Sessions that ended by their silence.
    pub expired: u64,
}

/// Replays and judges.
pub(super) struct Checker<'a> {
    history: &'a History,
    model: Model,
    report: Report,
    /// Where each operation that changes something stands in the order.
    done: BTreeMap<usize, u64>,
    /// Session and index of the entry that gave it to this connection.
    attached: BTreeMap<u64, (i64, u64)>,
    by_attached: BTreeMap<u64, u64>,
    /// When each session had ended.
    ended: BTreeMap<i64, u64>,
    /// Changes, in their order.
    changes: Vec<Change>,
    /// What clients must be told at once when they set their watches again.
    missed: BTreeMap<usize, BTreeSet<(String, EventType)>>,
}

/// The model at the end, and how much was checked.
///
/// # Errors
/// The first promise that was broken.
pub(super) fn check(history: &History) -> Result<(Model, Report), String> {
    let mut checker = Checker {
        history,
        model: Model::new(),
        report: Report::default(),
        done: BTreeMap::new(),
        attached: BTreeMap::new(),
        by_attached: BTreeMap::new(),
        ended: BTreeMap::new(),
        changes: Vec::new(),
        missed: BTreeMap::new(),
    };
    checker.replay()?;
    checker.all_answers_stand()?;
    checker.fits_time()?;
    let missed = &checker.missed;
    for (conn, record) in &history.conns {
        told::check(history, &checker.changes, missed, record)
            .map_err(|error| format!("connection {conn} of client {}: {error}", record.client))?;
        let events = record.frames.iter();
        let events = events.filter(|frame| matches!(frame, Frame::Event { .. }));
        checker.report.events += events.count() as u64;
    }
    let caught_up = missed.values().map(|missed| missed.len() as u64);
    checker.report.caught_up = caught_up.sum();
    Ok((checker.model, checker.report))
}

impl Checker<'_> {
    fn replay(&mut self) -> Result<(), String> {
        let history = self.history;
        // What was answered at each zxid, but for updates.
        let mut points: BTreeMap<u64, Vec<Result<usize, u64>>> = BTreeMap::new();
        for (place, op) in history.ops.iter().enumerate() {
            if let Some(answer) = &op.answer
                && !op.request.is_write()
            {
                points.entry(answer.zxid).or_default().push(Ok(place));
            }
        }
        for (conn, record) in &history.conns {
            for frame in &record.frames {
                if let Frame::Pong { zxid } = frame {
                    points.entry(*zxid).or_default().push(Err(*conn));
                }
            }
        }
        let mut states: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for (zxid, sum) in &history.states {
            states.entry(*zxid).or_default().push(*sum);
        }
        let mut replica = txn::State {
            members: Members::founded(&history.founders),
            ..Default::default()
        };
        let last = history.log.len() as u64;
        for zxid in 0..=last {
            if zxid > 0 {
                self.entry(zxid, &mut replica)?;
            }
            for point in points.remove(&zxid).unwrap_or_default() {
                let conn = match point {
                    Ok(place) => history.ops[place].conn,
                    Err(conn) => conn,
                };
                self.serves(conn, zxid)?;
                if let Ok(place) = point {
                    self.read(place)?;
                }
            }
            if let Some(sums) = states.remove(&zxid) {
                let right = crc32c::crc32c(&crate::snapshot::encode(&replica));
                if sums.iter().any(|sum| *sum != right) {
                    return Err(format!(
                        "a server's state at zxid {zxid} is not what its log makes"
                    ));
                }
            }
        }
        if let Some(beyond) = points.keys().next() {
            return Err(format!(
                "an answer at zxid {beyond}, and the log ends at {last}"
            ));
        }
        Ok(())
    }

    fn entry(&mut self, zxid: u64, replica: &mut txn::State) -> Result<(), String> {
        let place = usize::try_from(zxid - 1).expect("short runs");
        let committed = &self.history.log[place];
        if committed.entry.data.is_empty() {
            replica.skip(zxid);
            return Ok(());
        }
        let entry: Entry = postcard::from_bytes(&committed.entry.data)
            .map_err(|error| format!("entry {zxid}: {error}"))?;
        replica.apply(zxid, &entry);
        let mut changes = Vec::new();
        let effect = self.model.apply(zxid, &entry, &mut changes);
        let changes = changes.into_iter();
        self.changes
            .extend(changes.map(|(path, what)| Change { zxid, path, what }));
        match effect {
            Effect::Attached { session, owner } => {
                let attached = self.model.sessions[&session].attached;
                // A session may be created twice for a connection, and then has the first.
                self.attached.entry(owner.1).or_insert((session, attached));
                self.by_attached.insert(attached, owner.1);
            }
            Effect::Expired { session } => {
                self.report.expired += 1;
                self.ended.insert(session, committed.at);
            }
            Effect::Refused { .. } | Effect::Void => {}
            Effect::Written(result) => {
                let Command::Write {
                    session,
                    attached,
                    number,
                    op,
                    ..
                } = &entry.proposal.command
                else {
                    return Err(format!("entry {zxid} is no write and was one"));
                };
                if !self.model.sessions.contains_key(&session.0) {
                    self.ended.insert(session.0, committed.at);
                }
                let place = self
                    .by_attached
                    .get(attached)
                    .and_then(|conn| self.history.conns.get(conn))
                    .and_then(|conn| conn.writes.get(usize::try_from(*number).ok()? - 1));
                let Some(place) = place.copied() else {
                    return Err(format!("entry {zxid} is a write that nobody asked for"));
                };
                let asked = &self.history.ops[place];
                if !same(&asked.request, op) {
                    return Err(format!(
                        "entry {zxid} does {op:?}, and {:?} was asked for",
                        asked.request
                    ));
                }
                self.done.insert(place, zxid);
                if let Some(answer) = &asked.answer
                    && answer.zxid == zxid
                {
                    let right = expected(&asked.request, &result);
                    if answer.result != right {
                        return Err(format!(
                            "{:?} at {zxid} was answered {:?}, and should have been {right:?}",
                            asked.request, answer.result
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The connection has its session at this point.
    fn serves(&self, conn: u64, zxid: u64) -> Result<(), String> {
        let known = self.attached.get(&conn);
        let current = known.and_then(|(session, _)| self.model.sessions.get(session));
        if current.map(|session| session.attached) == known.map(|(_, attached)| *attached)
            && known.is_some()
        {
            return Ok(());
        }
        Err(format!(
            "connection {conn} was answered at zxid {zxid}, where it has no session"
        ))
    }

    fn read(&mut self, place: usize) -> Result<(), String> {
        let op = &self.history.ops[place];
        let answer = op.answer.as_ref().expect("it has a point");
        let node = |path: &String| self.model.nodes.get(path).ok_or(ErrorCode::NoNode);
        let right = match &op.request {
            Request::Exists { path, .. } => node(path).map(|node| Response::Stat(node.stat)),
            Request::GetData { path, .. } => node(path).map(|node| Response::Data {
                data: node.data.clone().map(Into::into),
                stat: node.stat,
            }),
            Request::GetChildren { path, .. } => {
                node(path).map(|_| Response::Children(self.model.children(path)))
            }
            Request::GetChildren2 { path, .. } => node(path).map(|node| Response::Children2 {
                children: self.model.children(path),
                stat: node.stat,
            }),
            Request::Sync { path } => Ok(Response::Synced { path: path.clone() }),
            Request::SetWatches(watches) => {
                let missed = self.missed(watches);
                self.missed.insert(place, missed);
                Ok(Response::Empty)
            }
            Request::AddWatch { .. } => Ok(Response::WatchAdded),
            // Depends on the connection: see `told`.
            Request::RemoveWatches { .. } => return Ok(()),
            other => return Err(format!("{other:?} is not checked")),
        };
        let mut given = answer.result.clone();
        if let Ok(
            Response::Children(names)
            | Response::Children2 {
                children: names, ..
            },
        ) = &mut given
        {
            names.sort();
        }
        if given != right {
            return Err(format!(
                "{:?} at {} was answered {given:?}, and should have been {right:?}",
                op.request, answer.zxid
            ));
        }
        match &op.request {
            Request::Sync { .. } => self.report.syncs += 1,
            _ => self.report.reads += 1,
        }
        Ok(())
    }

    /// What a client that was away must be told when it sets these watches here.
    fn missed(&self, watches: &SetWatches) -> BTreeSet<(String, EventType)> {
        let mut missed = BTreeSet::new();
        let since = watches.relative_zxid;
        let mut tell = |path: &String, event: EventType| {
            missed.insert((path.clone(), event));
        };
        for path in &watches.data {
            match self.model.nodes.get(path) {
                None => tell(path, EventType::NodeDeleted),
                Some(node) if node.stat.mzxid > since => tell(path, EventType::NodeDataChanged),
                Some(_) => {}
            }
        }
        for path in &watches.exist {
            if self.model.nodes.contains_key(path) {
                tell(path, EventType::NodeCreated);
            }
        }
        for path in &watches.child {
            match self.model.nodes.get(path) {
                None => tell(path, EventType::NodeDeleted),
                Some(node) if node.stat.pzxid > since => {
                    tell(path, EventType::NodeChildrenChanged);
                }
                Some(_) => {}
            }
        }
        missed
    }

    /// Every update that was answered stands in the order where its answer says.
    fn all_answers_stand(&mut self) -> Result<(), String> {
        for (place, op) in self.history.ops.iter().enumerate() {
            if !op.request.is_write() {
                continue;
            }
            let done = self.done.get(&place).copied();
            match &op.answer {
                Some(answer) if done == Some(answer.zxid) => self.report.updates += 1,
                Some(answer) => {
                    return Err(format!(
                        "{:?} of connection {} was answered at {}, and stands at {done:?}",
                        op.request, op.conn, answer.zxid
                    ));
                }
                None => {
                    self.report.unknown += 1;
                    self.report.unknown_done += u64::from(done.is_some());
                }
            }
        }
        for (conn, record) in &self.history.conns {
            if let Some(at) = record.refused
                && self
                    .ended
                    .get(&record.wanted)
                    .is_none_or(|ended| *ended > at)
            {
                return Err(format!(
                    "connection {conn} was told that session 0x{:x} has ended, and it had not",
                    record.wanted
                ));
            }
        }
        Ok(())
    }

    fn fits_time(&self) -> Result<(), String> {
        let answers = self.history.ops.iter().filter_map(|op| op.answer.as_ref());
        let mut shown: Vec<(u64, u64)> = answers.map(|answer| (answer.at, answer.zxid)).collect();
        shown.sort_unstable();
        let mut newest = 0;
        for (_, zxid) in &mut shown {
            newest = newest.max(*zxid);
            *zxid = newest;
        }
        for (place, op) in self.history.ops.iter().enumerate() {
            let before = shown.partition_point(|(at, _)| *at < op.sent);
            let Some((_, known)) = before.checked_sub(1).map(|last| shown[last]) else {
                continue;
            };
            if let Some(done) = self.done.get(&place)
                && *done <= known
            {
                return Err(format!(
                    "{:?} stands at {done}, and {known} had been shown before it was sent",
                    op.request
                ));
            }
            if let (Request::Sync { .. }, Some(answer)) = (&op.request, &op.answer)
                && answer.zxid < known
            {
                return Err(format!(
                    "a sync of connection {} was answered at {}, and {known} had been shown before \
                     it was sent",
                    op.conn, answer.zxid
                ));
            }
        }
        Ok(())
    }
}

/// Whether an operation of the log is what the client asked for.
fn same(request: &Request, op: &txn::Op) -> bool {
    let created =
        |path: &String, data: &Option<bytes::Bytes>, flags: i32, new: &crate::tree::NewZnode| {
            let Ok(mode) = CreateMode::from_flags(flags) else {
                return false;
            };
            let ephemeral = matches!(
                mode,
                CreateMode::Ephemeral | CreateMode::EphemeralSequential
            );
            new.path == *path
                && new.data == *data
                && new.sequential == mode.is_sequential()
                && ephemeral == matches!(new.kind, Kind::Ephemeral(_))
        };
    let part = |part: &MultiOp, op: &txn::Op| match (part, op) {
        (
            MultiOp::Create {
                path, data, flags, ..
            },
            txn::Op::Create(new),
        ) => created(path, data, *flags, new),
        (
            MultiOp::Delete { path, version },
            txn::Op::Delete {
                path: of,
                version: at,
            },
        )
        | (
            MultiOp::Check { path, version },
            txn::Op::Check {
                path: of,
                version: at,
            },
        ) => path == of && version == at,
        (
            MultiOp::SetData {
                path,
                data,
                version,
            },
            txn::Op::SetData {
                path: of,
                data: to,
                version: at,
            },
        ) => path == of && data == to && version == at,
        _ => false,
    };
    match (request, op) {
        (
            Request::Create {
                path, data, flags, ..
            },
            txn::Op::Create(new),
        ) => created(path, data, *flags, new),
        (
            Request::Delete { path, version },
            txn::Op::Delete {
                path: of,
                version: at,
            },
        )
        | (
            Request::Check { path, version },
            txn::Op::Check {
                path: of,
                version: at,
            },
        ) => path == of && version == at,
        (
            Request::SetData {
                path,
                data,
                version,
            },
            txn::Op::SetData {
                path: of,
                data: to,
                version: at,
            },
        ) => path == of && data == to && version == at,
        (Request::Multi(parts), txn::Op::Multi(ops)) => {
            parts.len() == ops.len() && parts.iter().zip(ops).all(|(p, op)| part(p, op))
        }
        (Request::CloseSession, txn::Op::Close) => true,
        _ => false,
    }
}

/// What the client should be answered.
fn expected(request: &Request, result: &Result<Answer, ErrorCode>) -> Result<Response, ErrorCode> {
    let answer = result.as_ref().map_err(|code| *code)?;
    Ok(match (request, answer) {
        (Request::Create { op, .. }, Answer::Created(path, stat)) if op.replies_stat() => {
            Response::Created2 {
                path: path.clone(),
                stat: *stat,
            }
        }
        (_, Answer::Created(path, _)) => Response::Created { path: path.clone() },
        (_, Answer::Stat(stat)) => Response::Stat(*stat),
        (_, Answer::Nothing) => Response::Empty,
        (Request::Multi(parts), Answer::Multi(Ok(answers))) => {
            let result = |(part, answer): (&MultiOp, &Answer)| match (part, answer) {
                (MultiOp::Create { op, .. }, Answer::Created(path, stat)) if op.replies_stat() => {
                    MultiResult::Created2 {
                        path: path.clone(),
                        stat: *stat,
                    }
                }
                (_, Answer::Created(path, _)) => MultiResult::Created { path: path.clone() },
                (_, Answer::Stat(stat)) => MultiResult::Set(*stat),
                (MultiOp::Delete { .. }, _) => MultiResult::Deleted,
                _ => MultiResult::Checked,
            };
            Response::Multi(parts.iter().zip(answers).map(result).collect())
        }
        (Request::Multi(parts), Answer::Multi(Err((fault, code)))) => {
            let result = |place: usize| {
                MultiResult::Error(match place.cmp(fault) {
                    std::cmp::Ordering::Less => None,
                    std::cmp::Ordering::Equal => Some(*code),
                    std::cmp::Ordering::Greater => Some(ErrorCode::RuntimeInconsistency),
                })
            };
            Response::Multi((0..parts.len()).map(result).collect())
        }
        (_, Answer::Multi(_)) => return Err(ErrorCode::SystemError),
    })
}
