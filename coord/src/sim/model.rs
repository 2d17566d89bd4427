//! What the service should be: a plain reading of the protocol, written apart from the code that it
//! judges, slow and short.

use std::collections::BTreeMap;

use crate::session::{Run, SessionId};
use crate::tree::Kind;
use crate::txn::{Command, Entry, Op};
use crate::wire::{ErrorCode, Stat};

/// A znode, as its metadata and its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) data: Option<Vec<u8>>,
    pub(super) stat: Stat,
    /// Children ever created under it.
    created: i32,
    container: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) timeout_ms: u32,
    /// Index of the entry that gave it to its connection.
    pub(super) attached: u64,
    owner: (Run, u64),
    writes: u64,
}

/// What a watch may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Created,
    Deleted,
    Data,
}

/// What a write answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Created(String, Stat),
    Stat(Stat),
    Nothing,
    /// All parts, or which failed how.
    Multi(Result<Vec<Self>, (usize, ErrorCode)>),
}

/// What an entry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    /// A session belongs to a connection now.
    Attached { session: i64, owner: (Run, u64) },
    /// A session that somebody wanted is not there, or the secret was wrong.
    Refused { owner: (Run, u64) },
    /// A session has ended by its silence.
    Expired { session: i64 },
    /// A write was carried out or refused.
    Written(Result<Answer, ErrorCode>),
    /// Nothing: it had been done, or nobody may ask for it any more.
    Void,
}

/// The whole service at one zxid.
#[derive(Debug, Clone)]
pub(super) struct Model {
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) sessions: BTreeMap<i64, Session>,
    secrets: BTreeMap<i64, Vec<u8>>,
}

fn parent(path: &str) -> String {
    match path.rfind('/') {
        Some(0) | None => "/".into(),
        Some(at) => path[..at].into(),
    }
}

impl Model {
    pub(super) fn new() -> Self {
        let mut model = Self {
            nodes: BTreeMap::new(),
            sessions: BTreeMap::new(),
            secrets: BTreeMap::new(),
        };
        for (path, children) in [
            ("/", 1),
            ("/zookeeper", 2),
            ("/zookeeper/config", 0),
            ("/zookeeper/quota", 0),
        ] {
            let stat = Stat {
                num_children: children,
                cversion: children,
                ..Stat::default()
            };
            let node = Node {
                data: Some(Vec::new()),
                stat,
                created: children,
                container: false,
            };
            model.nodes.insert(path.into(), node);
        }
        model
    }

    /// Names of the children, sorted.
    pub(super) fn children(&self, path: &str) -> Vec<String> {
        let prefix = if path == "/" {
            "/".to_owned()
        } else {
            format!("{path}/")
        };
        self.nodes
            .range(prefix.clone()..)
            .map_while(|(path, _)| path.strip_prefix(&prefix))
            .filter(|name| !name.is_empty() && !name.contains('/'))
            .map(str::to_owned)
            .collect()
    }

    /// Carries out the entry at `zxid`; what changed, in order, goes to `changes`.
    pub(super) fn apply(
        &mut self,
        zxid: u64,
        entry: &Entry,
        changes: &mut Vec<(String, What)>,
    ) -> Effect {
        let origin = entry.proposal.origin;
        match &entry.proposal.command {
            Command::Create {
                request,
                timeout_ms,
                password,
            } => {
                let session = SessionId::of_zxid(zxid).0;
                let owner = (origin, *request);
                let record = Session {
                    timeout_ms: *timeout_ms,
                    attached: zxid,
                    owner,
                    writes: 0,
                };
                self.sessions.insert(session, record);
                self.secrets.insert(session, password.to_vec());
                Effect::Attached { session, owner }
            }
            Command::Attach {
                request,
                session,
                password,
                timeout_ms,
            } => {
                let owner = (origin, *request);
                let right = self.secrets.get(&session.0) == Some(password);
                match self.sessions.get_mut(&session.0) {
                    Some(record) if right => {
                        if record.owner != owner {
                            *record = Session {
                                timeout_ms: *timeout_ms,
                                attached: zxid,
                                owner,
                                writes: 0,
                            };
                        }
                        Effect::Attached {
                            session: session.0,
                            owner,
                        }
                    }
                    _ => Effect::Refused { owner },
                }
            }
            Command::Expire { session, attached } => match self.sessions.get(&session.0) {
                Some(record) if record.attached == *attached => {
                    self.end(session.0, zxid, changes);
                    Effect::Expired { session: session.0 }
                }
                _ => Effect::Void,
            },
            Command::Write {
                session,
                attached,
                number,
                op,
                ..
            } => {
                match self.sessions.get_mut(&session.0) {
                    Some(record)
                        if record.attached == *attached && record.writes + 1 == *number =>
                    {
                        record.writes += 1;
                    }
                    _ => return Effect::Void,
                }
                // Alone, an operation fails before it changes anything.
                let before = matches!(op, Op::Multi(_)).then(|| self.nodes.clone());
                let result = self.write(session.0, op, zxid, entry.time_ms, changes);
                if let (Ok(Answer::Multi(Err(_))), Some(before)) = (&result, before) {
                    self.nodes = before;
                    changes.clear();
                }
                Effect::Written(result)
            }
            Command::Reap { path } => {
                let idle = self.nodes.get(path).is_some_and(|node| {
                    node.container && node.created > 0 && node.stat.num_children == 0
                });
                if idle {
                    self.remove(path, zxid, changes);
                }
                Effect::Void
            }
            // Who the servers are is no znode of a client's.
            Command::Promote { .. } | Command::Announce { .. } => Effect::Void,
            #[allow(unreachable_patterns, reason = "commands that no client here asks for")]
            other => panic!("the model does not know {other:?}"),
        }
    }

    fn end(&mut self, session: i64, zxid: u64, changes: &mut Vec<(String, What)>) {
        let own: Vec<String> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.stat.ephemeral_owner == session)
            .map(|(path, _)| path.clone())
            .collect();
        for path in own {
            self.remove(&path, zxid, changes);
        }
        self.sessions.remove(&session);
        self.secrets.remove(&session);
    }

    fn remove(&mut self, path: &str, zxid: u64, changes: &mut Vec<(String, What)>) {
        self.nodes.remove(path);
        let parent = self.nodes.get_mut(&parent(path)).expect("a parent");
        parent.stat.num_children -= 1;
        parent.stat.cversion += 1;
        parent.stat.pzxid = zxid.cast_signed();
        changes.push((path.into(), What::Deleted));
    }

    fn write(
        &mut self,
        session: i64,
        op: &Op,
        zxid: u64,
        time_ms: i64,
        changes: &mut Vec<(String, What)>,
    ) -> Result<Answer, ErrorCode> {
        match op {
            Op::Create(new) => {
                let mut path = new.path.clone();
                let above = parent(&path);
                let count = self.nodes.get(&above).ok_or(ErrorCode::NoNode)?.created;
                if new.sequential {
                    path = format!("{path}{count:010}");
                }
                if self.nodes.contains_key(&path) {
                    return Err(ErrorCode::NodeExists);
                }
                let at = zxid.cast_signed();
                let above = self.nodes.get_mut(&above).expect("just seen");
                if above.stat.ephemeral_owner > 0 {
                    return Err(ErrorCode::NoChildrenForEphemerals);
                }
                above.created += 1;
                above.stat.num_children += 1;
                above.stat.cversion += 1;
                above.stat.pzxid = at;
                let owner = match new.kind {
                    Kind::Ephemeral(session) => session.0,
                    _ => 0,
                };
                let data = new.data.as_ref().map(|data| data.to_vec());
                let length = data.as_ref().map_or(0, Vec::len);
                let stat = Stat {
                    czxid: at,
                    mzxid: at,
                    pzxid: at,
                    ctime: time_ms,
                    mtime: time_ms,
                    ephemeral_owner: owner,
                    data_length: i32::try_from(length).expect("small"),
                    ..Stat::default()
                };
                let node = Node {
                    data,
                    stat,
                    created: 0,
                    container: matches!(new.kind, Kind::Container),
                };
                self.nodes.insert(path.clone(), node);
                changes.push((path.clone(), What::Created));
                Ok(Answer::Created(path, stat))
            }
            Op::Delete { path, version } => {
                let node = self.versioned(path, *version)?;
                if node.stat.num_children > 0 {
                    return Err(ErrorCode::NotEmpty);
                }
                self.remove(path, zxid, changes);
                Ok(Answer::Nothing)
            }
            Op::SetData {
                path,
                data,
                version,
            } => {
                let node = self.versioned(path, *version)?;
                node.data = data.as_ref().map(|data| data.to_vec());
                let length = node.data.as_ref().map_or(0, Vec::len);
                node.stat.data_length = i32::try_from(length).expect("small");
                node.stat.version += 1;
                node.stat.mzxid = zxid.cast_signed();
                node.stat.mtime = time_ms;
                changes.push((path.clone(), What::Data));
                Ok(Answer::Stat(node.stat))
            }
            Op::Check { path, version } => {
                self.versioned(path, *version)?;
                Ok(Answer::Nothing)
            }
            Op::Multi(parts) => {
                let mut answers = Vec::new();
                for (place, part) in parts.iter().enumerate() {
                    match self.write(session, part, zxid, time_ms, changes) {
                        Ok(answer) => answers.push(answer),
                        Err(code) => return Ok(Answer::Multi(Err((place, code)))),
                    }
                }
                Ok(Answer::Multi(Ok(answers)))
            }
            Op::Close => {
                self.end(session, zxid, changes);
                Ok(Answer::Nothing)
            }
            other => panic!("the model does not know {other:?}"),
        }
    }

    fn versioned(&mut self, path: &str, version: i32) -> Result<&mut Node, ErrorCode> {
        let node = self.nodes.get_mut(path).ok_or(ErrorCode::NoNode)?;
        if version == -1 || version == node.stat.version {
            Ok(node)
        } else {
            Err(ErrorCode::BadVersion)
        }
    }
}
