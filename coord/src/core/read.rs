//! Requests that are answered from the state here, and the watches that they leave behind.

use bytes::Bytes;

use super::convert::valid;
use super::words::short_name;
use super::{CloseReason, ConnId, Core, Output};
use crate::acl;
use crate::watch::WatchKind;
use crate::wire::{
    AddWatchMode, ErrorCode, EventType, Id, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, ReadOp, ReadResult,
    Request, Response, SetWatches, Stat, WatcherEvent, WatcherKind, encode_error, encode_event,
    encode_reply, perms,
};

impl Core {
    pub(super) fn answer_read(&mut self, conn: ConnId, xid: i32, request: &Request) {
        let zxid = self.state.zxid.cast_signed();
        let frame = match self.read(conn, request) {
            Ok(response) => encode_reply(xid, zxid, &response),
            Err(code) => encode_error(xid, zxid, code),
        };
        if frame.len() > REQUEST_BYTES_MAX {
            // ZooKeeper's clients take no more by default, and hang up without a word.
            let (op, bytes) = (short_name(request.op()), frame.len());
            tracing::warn!(
                conn = conn.0,
                op,
                bytes,
                "a reply longer than most clients accept"
            );
            self.counters.long_replies += 1;
        }
        self.reply(conn, frame);
    }

    fn read(&mut self, conn: ConnId, request: &Request) -> Result<Response, ErrorCode> {
        let Some(state) = self.conns.get(&conn) else {
            return Err(ErrorCode::ConnectionLoss);
        };
        let (who, session) = (state.who(), state.session());
        let tree = &self.state.tree;
        match request {
            Request::Exists { path, watch } => {
                exists_perhaps(path)?;
                let stat = tree.znode(path).map(|znode| znode.stat());
                self.watch(conn, *watch, WatchKind::Data, path);
                stat.map(Response::Stat).ok_or(ErrorCode::NoNode)
            }
            Request::GetData { path, watch } => {
                let (data, stat) = self.read_data(conn, path, *watch, &who)?;
                Ok(Response::Data { data, stat })
            }
            Request::GetAcl { path } => {
                exists_perhaps(path)?;
                let znode = tree.read(path, perms::READ | perms::ADMIN, &who)?;
                let acl = if acl::allows(&znode.acl, perms::ADMIN, &who) {
                    znode.acl.to_vec()
                } else {
                    acl::masked(&znode.acl)
                };
                let stat = znode.stat();
                Ok(Response::Acl { acl, stat })
            }
            Request::GetChildren { path, watch } => {
                let (children, _) = self.read_children(conn, path, *watch, &who)?;
                Ok(Response::Children(children))
            }
            Request::GetChildren2 { path, watch } => {
                let (children, stat) = self.read_children(conn, path, *watch, &who)?;
                Ok(Response::Children2 { children, stat })
            }
            Request::MultiRead(reads) => Ok(Response::MultiRead(self.read_many(conn, reads, &who))),
            Request::GetEphemerals { prefix } => {
                let own = session.map(|session| tree.ephemerals(session));
                let all = prefix.trim().is_empty() || prefix.trim() == "/";
                let own = own.into_iter().flatten();
                let chosen = own.filter(|path| all || path.starts_with(prefix.as_str()));
                Ok(Response::Ephemerals(chosen.map(str::to_owned).collect()))
            }
            Request::GetAllChildrenNumber { path } => {
                exists_perhaps(path)?;
                tree.read(path, perms::READ, &who)?;
                let below = tree.count_below(path);
                Ok(Response::ChildrenNumber(
                    i32::try_from(below).unwrap_or(i32::MAX),
                ))
            }
            Request::WhoAmI => {
                let names = who.iter().map(acl::user);
                Ok(Response::Who(names.collect()))
            }
            Request::SetWatches(watches) => {
                self.set_watches(conn, watches);
                Ok(Response::Empty)
            }
            Request::AddWatch { path, mode } => {
                let kind = match AddWatchMode::from_code(*mode)? {
                    AddWatchMode::Persistent => WatchKind::Persistent,
                    AddWatchMode::PersistentRecursive => WatchKind::Recursive,
                };
                valid(path)?;
                self.watch(conn, true, kind, path);
                Ok(Response::WatchAdded)
            }
            Request::CheckWatches { path, kind } => {
                let kinds = watch_kinds(*kind)?;
                let any = kinds.iter().any(|kind| self.watches.has(conn, *kind, path));
                any.then_some(Response::Empty).ok_or(ErrorCode::NoWatcher)
            }
            Request::RemoveWatches { path, kind } => {
                let kinds = watch_kinds(*kind)?.iter();
                let removed = kinds.filter(|kind| self.watches.remove(conn, **kind, path));
                let any = removed.count() > 0;
                any.then_some(Response::Empty).ok_or(ErrorCode::NoWatcher)
            }
            Request::Create { .. }
            | Request::Delete { .. }
            | Request::SetData { .. }
            | Request::SetAcl { .. }
            | Request::Check { .. }
            | Request::Multi(_)
            | Request::Reconfig { .. }
            | Request::CloseSession
            | Request::Sync { .. }
            | Request::Ping
            | Request::Auth { .. }
            | Request::Sasl { .. } => unreachable!("no reads"),
        }
    }

    fn read_data(
        &mut self,
        conn: ConnId,
        path: &str,
        watch: bool,
        who: &[Id],
    ) -> Result<(Option<Bytes>, Stat), ErrorCode> {
        exists_perhaps(path)?;
        let znode = self.state.tree.read(path, perms::READ, who)?;
        let read = (znode.data.clone(), znode.stat());
        self.watch(conn, watch, WatchKind::Data, path);
        Ok(read)
    }

    fn read_children(
        &mut self,
        conn: ConnId,
        path: &str,
        watch: bool,
        who: &[Id],
    ) -> Result<(Vec<String>, Stat), ErrorCode> {
        exists_perhaps(path)?;
        let znode = self.state.tree.read(path, perms::READ, who)?;
        let read = (znode.children.iter().cloned().collect(), znode.stat());
        self.watch(conn, watch, WatchKind::Children, path);
        Ok(read)
    }

    /// Errors stand alone. What would make the reply larger than any client takes is an error, too.
    fn read_many(&mut self, conn: ConnId, reads: &[ReadOp], who: &[Id]) -> Vec<ReadResult> {
        let mut room = REPLY_BYTES_MAX;
        let one = |read: &ReadOp| {
            let result = match read {
                ReadOp::GetData { path, watch } => self
                    .read_data(conn, path, *watch, who)
                    .map(|(data, stat)| ReadResult::Data { data, stat }),
                ReadOp::GetChildren { path, watch } => self
                    .read_children(conn, path, *watch, who)
                    .map(|(children, _)| ReadResult::Children(children)),
            };
            let result = result.unwrap_or_else(ReadResult::Error);
            match room.checked_sub(result.bytes()) {
                Some(left) => {
                    room = left;
                    result
                }
                None => {
                    room = 0;
                    ReadResult::Error(ErrorCode::MarshallingError)
                }
            }
        };
        reads.iter().map(one).collect()
    }

    fn watch(&mut self, conn: ConnId, wanted: bool, kind: WatchKind, path: &str) {
        if wanted && self.conns.contains_key(&conn) && !self.watches.set(conn, kind, path) {
            self.close(conn, CloseReason::TooMuch);
        }
    }

    /// Sets watches again for a client that has come back, and tells it first what the one-shot
    /// ones would have told while it was away. (Who set persistent ones looks again by himself.)
    fn set_watches(&mut self, conn: ConnId, watches: &SetWatches) {
        let since = u64::try_from(watches.relative_zxid).unwrap_or(0);
        let lists = [
            (&watches.data, WatchKind::Data, false),
            (&watches.exist, WatchKind::Data, true),
            (&watches.child, WatchKind::Children, false),
            (&watches.persistent, WatchKind::Persistent, false),
            (&watches.persistent_recursive, WatchKind::Recursive, false),
        ];
        for (paths, kind, waits_for_creation) in lists {
            for path in paths {
                let missed = match (self.state.tree.znode(path), waits_for_creation, kind) {
                    (_, _, WatchKind::Persistent | WatchKind::Recursive) => None,
                    _ if planted!(WatchesNotCaughtUp) => None,
                    (Some(_), true, _) => Some(EventType::NodeCreated),
                    (None, true, _) => None,
                    (None, false, _) => Some(EventType::NodeDeleted),
                    (Some(znode), false, WatchKind::Data) => {
                        (znode.mzxid > since).then_some(EventType::NodeDataChanged)
                    }
                    (Some(znode), false, WatchKind::Children) => {
                        (znode.pzxid > since).then_some(EventType::NodeChildrenChanged)
                    }
                };
                match missed {
                    Some(event) => {
                        let frame = encode_event(&WatcherEvent::new(event, path.as_str()));
                        self.outputs.push_back(Output::Notify { conn, frame });
                    }
                    None => self.watch(conn, true, kind, path),
                }
            }
        }
    }
}

/// What cannot be a path is a znode that is not there, to a read.
fn exists_perhaps(path: &str) -> Result<(), ErrorCode> {
    valid(path).map_err(|_| ErrorCode::NoNode)
}

/// What `removeWatches` and `checkWatches` mean by a kind. Each way of watching goes by itself:
/// who removes the one-shot ones keeps the persistent one.
fn watch_kinds(kind: i32) -> Result<&'static [WatchKind], ErrorCode> {
    Ok(match WatcherKind::from_code(kind)? {
        WatcherKind::Children => &[WatchKind::Children],
        WatcherKind::Data => &[WatchKind::Data],
        WatcherKind::Any => &WatchKind::ALL,
        WatcherKind::Persistent => &[WatchKind::Persistent],
        WatcherKind::PersistentRecursive => &[WatchKind::Recursive],
    })
}
