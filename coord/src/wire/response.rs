//! Responses: what a server answers to a request that succeeded. An error has no body.

use bytes::Bytes;

use super::{Acl, DecodeError, Id, MultiResult, OpCode, ReadResult, Reader, Stat, Writer};

/// The body of a successful reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// To create.
    Created {
        /// The path it got.
        path: String,
    },
    /// To create2, createContainer and createTTL.
    Created2 {
        /// The path it got.
        path: String,
        /// Its metadata.
        stat: Stat,
    },
    /// To exists, setData and setACL.
    Stat(Stat),
    /// To getData and reconfig.
    Data {
        /// The data; null and empty differ.
        data: Option<Bytes>,
        /// The znode's metadata.
        stat: Stat,
    },
    /// To getACL.
    Acl {
        /// The access control list.
        acl: Vec<Acl>,
        /// The znode's metadata.
        stat: Stat,
    },
    /// To getChildren.
    Children(Vec<String>),
    /// To getChildren2.
    Children2 {
        /// The names.
        children: Vec<String>,
        /// The znode's metadata.
        stat: Stat,
    },
    /// To sync.
    Synced {
        /// The path of the request.
        path: String,
    },
    /// To multi, failed ones too: a failed multi has header err 0.
    Multi(Vec<MultiResult>),
    /// To multiRead.
    MultiRead(Vec<ReadResult>),
    /// To sasl.
    Sasl {
        /// What the security layer answers; null where there is none.
        token: Option<Bytes>,
    },
    /// To getEphemerals.
    Ephemerals(Vec<String>),
    /// To getAllChildrenNumber.
    ChildrenNumber(i32),
    /// To whoAmI: names, without what proves them.
    Who(Vec<Id>),
    /// To addWatch: ZooKeeper's `ErrorResponse` with err 0.
    WatchAdded,
    /// To what has no body: delete, check, ping, checkWatches, removeWatches, auth, setWatches,
    /// closeSession.
    Empty,
}

impl Response {
    /// Reads the body of a successful reply to an `op`.
    ///
    /// # Errors
    /// [`DecodeError`] where the server does not speak the protocol.
    pub fn decode(op: OpCode, body: &[u8]) -> Result<Self, DecodeError> {
        let r = &mut Reader::new(body);
        Ok(match op {
            OpCode::Create => Self::Created { path: r.string()? },
            OpCode::Create2 | OpCode::CreateContainer | OpCode::CreateTtl => Self::Created2 {
                path: r.string()?,
                stat: Stat::decode(r)?,
            },
            OpCode::Exists | OpCode::SetData | OpCode::SetAcl => Self::Stat(Stat::decode(r)?),
            OpCode::GetData | OpCode::Reconfig => Self::Data {
                data: r.buffer()?,
                stat: Stat::decode(r)?,
            },
            OpCode::GetAcl => Self::Acl {
                acl: r.vector(Acl::decode)?,
                stat: Stat::decode(r)?,
            },
            OpCode::GetChildren => Self::Children(r.strings()?),
            OpCode::GetChildren2 => Self::Children2 {
                children: r.strings()?,
                stat: Stat::decode(r)?,
            },
            OpCode::Sync => Self::Synced { path: r.string()? },
            OpCode::Multi => Self::Multi(MultiResult::decode_all(r)?),
            OpCode::MultiRead => Self::MultiRead(ReadResult::decode_all(r)?),
            OpCode::Sasl => Self::Sasl { token: r.buffer()? },
            OpCode::GetEphemerals => Self::Ephemerals(r.strings()?),
            OpCode::GetAllChildrenNumber => Self::ChildrenNumber(r.int()?),
            OpCode::WhoAmI => Self::Who(r.vector(Id::decode)?),
            OpCode::AddWatch => Self::WatchAdded,
            OpCode::Delete
            | OpCode::Check
            | OpCode::Ping
            | OpCode::CheckWatches
            | OpCode::RemoveWatches
            | OpCode::Auth
            | OpCode::SetWatches
            | OpCode::SetWatches2
            | OpCode::CloseSession => Self::Empty,
        })
    }

    /// Writes the body.
    pub fn encode(&self, w: &mut Writer) {
        match self {
            Self::Created { path } | Self::Synced { path } => w.string(path),
            Self::Created2 { path, stat } => {
                w.string(path);
                stat.encode(w);
            }
            Self::Stat(stat) => stat.encode(w),
            Self::Data { data, stat } => {
                w.buffer(data.as_deref());
                stat.encode(w);
            }
            Self::Acl { acl, stat } => {
                w.vector(acl, |w, acl| acl.encode(w));
                stat.encode(w);
            }
            Self::Children(children) => w.strings(children),
            Self::Children2 { children, stat } => {
                w.strings(children);
                stat.encode(w);
            }
            Self::Multi(results) => MultiResult::encode_all(results, w),
            Self::MultiRead(results) => ReadResult::encode_all(results, w),
            Self::Sasl { token } => w.buffer(token.as_deref()),
            Self::Ephemerals(paths) => w.strings(paths),
            Self::ChildrenNumber(number) => w.int(*number),
            Self::Who(ids) => w.vector(ids, |w, id| id.encode(w)),
            Self::WatchAdded => w.int(0),
            Self::Empty => {}
        }
    }
}
