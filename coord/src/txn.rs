//! What stands in the log, and what applying it does: a pure function of the state and the entry.
//!
//! Everything is decided here, at apply, on every server alike: whether a version matches, what
//! a sequential znode is called, whether a `multi` goes through.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::members::{Members, Reconfig};
use crate::session::{Password, Run, Session, SessionId, same_password};
use crate::tree::{CONFIG_PATH, Change, NewZnode, Stamp, Tree, Undo};
use crate::wire::{Acl, ErrorCode, Id, Stat, perms};

/// One entry of the log, before and after it is given its index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The leader's wall clock at the proposal, milliseconds since 1970.
    pub time_ms: i64,
    /// Who asked for it and will answer for it.
    pub proposal: Proposal,
}

/// What a server asks the leader to put into the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The server that asks.
    pub origin: Run,
    /// What it asks.
    pub command: Command,
}

/// A change of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Create a session for a connection of the origin.
    Create {
        /// The origin's name for the connection.
        request: u64,
        /// Negotiated timeout, milliseconds.
        timeout_ms: u32,
        /// Its secret, drawn by the origin.
        password: Password,
    },
    /// Give an existing session to a connection of the origin.
    Attach {
        /// The origin's name for the connection.
        request: u64,
        /// Which session.
        session: SessionId,
        /// The secret that the client showed.
        password: Vec<u8>,
        /// Negotiated timeout, milliseconds.
        timeout_ms: u32,
    },
    /// The leader found the session silent. Void if it has changed hands since.
    Expire {
        /// Which session.
        session: SessionId,
        /// [`Session::attached`] when the leader decided.
        attached: u64,
    },
    /// A write of a session.
    Write {
        /// Which session.
        session: SessionId,
        /// [`Session::attached`] as the origin knows it.
        attached: u64,
        /// Number of this write among the connection's, from 1.
        number: u64,
        /// Who the client has proved to be.
        who: Vec<Id>,
        /// What to do.
        op: Op,
    },
    /// Delete a container that has had children and has none now, or a znode that has outlived its
    /// time. Void if that is no longer so.
    Reap {
        /// Which.
        path: String,
    },
    /// The leader found that a server which is joining has caught up: it votes from now on.
    Promote {
        /// Its raft id.
        member: u64,
    },
    /// The origin tells where it is.
    Announce {
        /// `host:port` for the other servers.
        peer: String,
        /// `host:port` for clients.
        client: String,
    },
}

/// A write of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Create a znode.
    Create(NewZnode),
    /// Delete a znode.
    Delete {
        /// Path.
        path: String,
        /// Expected version, -1 for any.
        version: i32,
    },
    /// Set data.
    SetData {
        /// Path.
        path: String,
        /// Data.
        data: Option<Bytes>,
        /// Expected version, -1 for any.
        version: i32,
    },
    /// Set the access list.
    SetAcl {
        /// Path.
        path: String,
        /// List.
        acl: Vec<Acl>,
        /// Expected `aversion`, -1 for any.
        version: i32,
    },
    /// Only check that the znode has this version.
    Check {
        /// Path.
        path: String,
        /// Expected version, -1 for any.
        version: i32,
    },
    /// All or none.
    Multi(Vec<Self>),
    /// End the session.
    Close,
    /// Refuse: the origin found a part of a `multi` malformed; the rest must be refused with it.
    Malformed(ErrorCode),
    /// Change who the servers are.
    Reconfig(Reconfig),
}

/// What a write answers when it succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// Created, with this path and metadata.
    Created(String, Stat),
    /// Deleted.
    Deleted,
    /// Data or access list set; the metadata after.
    Set(Stat),
    /// Checked.
    Checked,
    /// Every part of a `multi`.
    Multi(Vec<Self>),
    /// The session has ended.
    Closed,
    /// The membership has changed: what `/zookeeper/config` holds now.
    Configured(Bytes, Stat),
}

/// Why a write was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The code.
    pub code: ErrorCode,
    /// For a `multi`: which of its parts was at fault.
    pub part: Option<usize>,
}

impl From<ErrorCode> for Refused {
    fn from(code: ErrorCode) -> Self {
        Self { code, part: None }
    }
}

/// What one entry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A session was created.
    Created {
        /// Its id.
        session: SessionId,
    },
    /// A session has changed hands (or the same entry came twice).
    Attached {
        /// Its id.
        session: SessionId,
    },
    /// There is no such session, or the password was wrong.
    AttachRefused,
    /// A session has ended by its silence, or nothing: it had ended or changed hands before.
    Expired {
        /// Its id, if it has ended now.
        session: Option<SessionId>,
    },
    /// A write was applied or refused.
    Written(Result<Done, Refused>),
    /// A write that was not the connection's next (a repetition, or one before it was lost), or
    /// whose connection has lost the session. Nothing was done and nobody waits for an answer.
    Void,
    /// A container or a znode with a time to live was deleted, or not.
    Reaped,
    /// A server was promoted or has announced itself, or there was nothing to do.
    Arranged,
}

/// The replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    /// Index of the last entry applied.
    pub zxid: u64,
    /// The namespace.
    pub tree: Tree,
    /// The sessions.
    pub sessions: BTreeMap<SessionId, Session>,
    /// The servers.
    pub members: Members,
}

impl State {
    /// Applies the entry at log index `zxid` and tells what came of it and which znodes changed,
    /// in order.
    ///
    /// # Panics
    /// If `zxid` is not above all that were applied before.
    pub fn apply(&mut self, zxid: u64, entry: &Entry) -> (Outcome, Vec<Change>) {
        self.skip(zxid);
        if planted!(EndInTwoSteps) {
            let owners: Vec<SessionId> = self.tree.owners().collect();
            for owner in owners {
                if !self.sessions.contains_key(&owner) {
                    self.end_session(owner, zxid, &mut Vec::new());
                    let left = self.tree.ephemerals(owner).next().map(str::to_owned);
                    left.into_iter()
                        .for_each(|path| drop(self.tree.remove(&path, zxid)));
                }
            }
        }
        let stamp = Stamp {
            zxid,
            time_ms: entry.time_ms,
        };
        let mut changes = Vec::new();
        let origin = entry.proposal.origin;
        let outcome = match &entry.proposal.command {
            Command::Create {
                request,
                timeout_ms,
                password,
            } => {
                let session = SessionId::of_zxid(zxid);
                let record = Session {
                    timeout_ms: *timeout_ms,
                    password: *password,
                    owner: origin,
                    owner_request: *request,
                    attached: zxid,
                    writes: 0,
                };
                self.sessions.insert(session, record);
                Outcome::Created { session }
            }
            Command::Attach {
                request,
                session,
                password,
                timeout_ms,
            } => match self.sessions.get_mut(session) {
                Some(record) if same_password(&record.password, password) => {
                    let repeated = record.owner == origin && record.owner_request == *request;
                    if !repeated {
                        record.owner = origin;
                        record.owner_request = *request;
                        record.attached = zxid;
                        record.writes = 0;
                        record.timeout_ms = *timeout_ms;
                    }
                    Outcome::Attached { session: *session }
                }
                _ => Outcome::AttachRefused,
            },
            Command::Expire { session, attached } => {
                let current = self.sessions.get(session).map(|record| record.attached);
                if current == Some(*attached) || current.is_some() && planted!(ExpireUnchecked) {
                    self.end_session(*session, zxid, &mut changes);
                    Outcome::Expired {
                        session: Some(*session),
                    }
                } else {
                    Outcome::Expired { session: None }
                }
            }
            Command::Write {
                session,
                attached,
                number,
                who,
                op,
            } => {
                let Some(record) = self.sessions.get_mut(session) else {
                    return (Outcome::Void, changes);
                };
                if record.attached != *attached
                    || (record.writes + 1 != *number && !planted!(NumberUnchecked))
                {
                    return (Outcome::Void, changes);
                }
                record.writes = *number;
                Outcome::Written(self.write(*session, op, who, stamp, &mut changes))
            }
            Command::Reap { path } => {
                if self.tree.is_reapable(path, entry.time_ms) {
                    self.tree.remove(path, zxid);
                    changes.push(Change::Deleted(path.clone()));
                }
                Outcome::Reaped
            }
            Command::Promote { member } => {
                if self.members.promote(*member, zxid) {
                    self.show_members(stamp, &mut changes);
                }
                Outcome::Arranged
            }
            Command::Announce { peer, client } => {
                if self.members.announce(origin.server, peer, client, zxid) {
                    self.show_members(stamp, &mut changes);
                }
                Outcome::Arranged
            }
        };
        (outcome, changes)
    }

    /// Only the server `id` is left, from `zxid` on. False if it is no member.
    pub(crate) fn survive(&mut self, id: u64, zxid: u64) -> bool {
        self.skip(zxid);
        let survives = self.members.survive(id, zxid);
        if survives {
            let stamp = Stamp { zxid, time_ms: 0 };
            self.show_members(stamp, &mut Vec::new());
        }
        survives
    }

    /// Passes over an index that holds no entry of ours (a leader's first entry is empty).
    ///
    /// # Panics
    /// If `zxid` is not above all that were applied before.
    pub fn skip(&mut self, zxid: u64) {
        assert!(
            zxid > self.zxid,
            "entry {zxid} is applied after {}",
            self.zxid
        );
        self.zxid = zxid;
    }

    fn end_session(&mut self, session: SessionId, zxid: u64, changes: &mut Vec<Change>) {
        let mut paths: Vec<String> = self.tree.ephemerals(session).map(str::to_owned).collect();
        if planted!(EndInTwoSteps, EphemeralKept) {
            paths.pop();
        }
        for path in paths {
            self.tree.remove(&path, zxid);
            changes.push(Change::Deleted(path));
        }
        self.sessions.remove(&session);
    }

    /// Writes the membership down where clients read it.
    fn show_members(&mut self, stamp: Stamp, changes: &mut Vec<Change>) -> Done {
        let text = Bytes::from(self.members.render());
        let stat = self.tree.overwrite(CONFIG_PATH, text.clone(), stamp);
        changes.push(Change::Data(CONFIG_PATH.into()));
        Done::Configured(text, stat)
    }

    fn write(
        &mut self,
        session: SessionId,
        op: &Op,
        who: &[Id],
        stamp: Stamp,
        changes: &mut Vec<Change>,
    ) -> Result<Done, Refused> {
        match op {
            Op::Multi(parts) => {
                let mut undo = Vec::new();
                let mut done = Vec::with_capacity(parts.len());
                for (part, op) in parts.iter().enumerate() {
                    match self.one(op, who, stamp, changes, &mut undo) {
                        Ok(result) => done.push(result),
                        Err(code) => {
                            let half = usize::from(planted!(MultiHalfDone));
                            let undo = undo.into_iter().skip(half).rev();
                            undo.for_each(|undo| self.tree.undo(undo));
                            changes.clear();
                            return Err(Refused {
                                code,
                                part: Some(part),
                            });
                        }
                    }
                }
                Ok(Done::Multi(done))
            }
            Op::SetAcl { path, acl, version } => Ok(Done::Set(self.tree.set_acl(
                path,
                acl.clone(),
                *version,
                who,
            )?)),
            Op::Reconfig(change) => {
                // ZooKeeper's order: who may not do it still hears that it could not be done.
                let next = self.members.reconfigured(change, stamp.zxid)?;
                self.tree.read(CONFIG_PATH, perms::WRITE, who)?;
                self.members = next;
                Ok(self.show_members(stamp, changes))
            }
            Op::Close => {
                self.end_session(session, stamp.zxid, changes);
                Ok(Done::Closed)
            }
            op => Ok(self.one(op, who, stamp, changes, &mut Vec::new())?),
        }
    }

    fn one(
        &mut self,
        op: &Op,
        who: &[Id],
        stamp: Stamp,
        changes: &mut Vec<Change>,
        undos: &mut Vec<Undo>,
    ) -> Result<Done, ErrorCode> {
        match op {
            Op::Create(new) => {
                let (path, undo) = self.tree.create(new.clone(), who, stamp)?;
                undos.push(undo);
                changes.push(Change::Created(path.clone()));
                let stat = self.tree.znode(&path).expect("just created").stat();
                Ok(Done::Created(path, stat))
            }
            Op::Delete { path, version } => {
                undos.push(self.tree.delete(path, *version, who, stamp)?);
                changes.push(Change::Deleted(path.clone()));
                Ok(Done::Deleted)
            }
            Op::SetData {
                path,
                data,
                version,
            } => {
                let (stat, undo) = self
                    .tree
                    .set_data(path, data.clone(), *version, who, stamp)?;
                undos.push(undo);
                changes.push(Change::Data(path.clone()));
                Ok(Done::Set(stat))
            }
            Op::Check { path, version } => {
                self.tree.check(path, *version, who)?;
                Ok(Done::Checked)
            }
            Op::Malformed(code) => Err(*code),
            Op::SetAcl { .. } | Op::Multi(_) | Op::Close | Op::Reconfig(_) => {
                Err(ErrorCode::BadArguments)
            }
        }
    }
}

#[cfg(test)]
mod tests;
