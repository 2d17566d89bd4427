//! Requests: what a client asks after the handshake.

use bytes::Bytes;

use super::{Acl, DecodeError, MULTI_OPS_MAX, MultiOp, ReadOp, Reader, Writer};

macro_rules! op_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal;)+) => {
        /// The operations of the protocol that are spoken here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum OpCode {
            $($(#[doc = $doc])+ $name,)+
        }

        impl OpCode {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The number on the wire.
            pub const fn code(self) -> i32 {
                match self {
                    $(Self::$name => $code,)+
                }
            }

            /// The operation of a number, where it is known.
            pub const fn from_code(code: i32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)+
                    _ => None,
                }
            }
        }
    };
}

op_codes! {
    /// Create a znode; answered by its path.
    Create = 1;
    /// Delete a znode.
    Delete = 2;
    /// A znode's metadata.
    Exists = 3;
    /// A znode's data.
    GetData = 4;
    /// Set a znode's data.
    SetData = 5;
    /// A znode's access control list.
    GetAcl = 6;
    /// Set a znode's access control list.
    SetAcl = 7;
    /// The names of a znode's children.
    GetChildren = 8;
    /// Wait until this server has all that was committed before.
    Sync = 9;
    /// Keep the session alive.
    Ping = 11;
    /// The names of a znode's children, and its metadata.
    GetChildren2 = 12;
    /// Check a version; by itself, or in a multi.
    Check = 13;
    /// Several operations, all or none.
    Multi = 14;
    /// Create a znode; answered by its path and metadata.
    Create2 = 15;
    /// Change who the servers are; answered by the new configuration.
    Reconfig = 16;
    /// Ask whether there are watches.
    CheckWatches = 17;
    /// Remove watches.
    RemoveWatches = 18;
    /// Create a container.
    CreateContainer = 19;
    /// Create a znode that goes when nobody cares for it any more.
    CreateTtl = 21;
    /// Several reads.
    MultiRead = 22;
    /// Add an identity to the session.
    Auth = 100;
    /// Set one-shot watches again, on a new connection.
    SetWatches = 101;
    /// Negotiate with a security layer.
    Sasl = 102;
    /// The session's own ephemeral znodes.
    GetEphemerals = 103;
    /// How many znodes there are below one.
    GetAllChildrenNumber = 104;
    /// Set watches of all kinds again, on a new connection.
    SetWatches2 = 105;
    /// Set a persistent watch.
    AddWatch = 106;
    /// Who the client has proved to be.
    WhoAmI = 107;
    /// End the session.
    CloseSession = -11;
}

/// Which of the create operations was used; they differ in their reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CreateOp {
    /// Replies the path.
    Create,
    /// Replies the path and the metadata.
    Create2,
    /// For containers; replies the path and the metadata.
    Container,
    /// For znodes that live this long, in ms, without children and changes; replies the path and
    /// the metadata.
    Ttl(i64),
}

impl CreateOp {
    /// The number on the wire.
    pub const fn op(self) -> OpCode {
        match self {
            Self::Create => OpCode::Create,
            Self::Create2 => OpCode::Create2,
            Self::Container => OpCode::CreateContainer,
            Self::Ttl(_) => OpCode::CreateTtl,
        }
    }

    /// Whether the reply holds the metadata.
    pub const fn replies_stat(self) -> bool {
        !matches!(self, Self::Create)
    }
}

/// The watches that a client had, set again after it has reconnected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetWatches {
    /// What changed after this zxid is told at once.
    pub relative_zxid: i64,
    /// Paths with data watches.
    pub data: Vec<String>,
    /// Paths with watches for their creation.
    pub exist: Vec<String>,
    /// Paths with child watches.
    pub child: Vec<String>,
    /// Paths with persistent watches (`setWatches2` only).
    pub persistent: Vec<String>,
    /// Paths with persistent recursive watches (`setWatches2` only).
    pub persistent_recursive: Vec<String>,
}

/// A request, without its header.
///
/// `version` -1 fits any. Fields are as the client wrote them: paths, flags and lists are not
/// validated here, because what is wrong with them has its own reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Creates a znode. `flags` is a [`super::CreateMode`].
    Create {
        /// Which operation.
        op: CreateOp,
        /// Its path, or the beginning of it for a sequential one.
        path: String,
        /// Its data; null and empty differ.
        data: Option<Bytes>,
        /// Its access control list; null reads as empty, and both are refused.
        acl: Vec<Acl>,
        /// What kind it is.
        flags: i32,
    },
    /// Deletes a znode.
    Delete {
        /// Which.
        path: String,
        /// The version it must have.
        version: i32,
    },
    /// Asks for a znode's metadata.
    Exists {
        /// Which.
        path: String,
        /// Whether to be told of its creation, deletion or change.
        watch: bool,
    },
    /// Asks for a znode's data.
    GetData {
        /// Which.
        path: String,
        /// Whether to be told of its change or deletion.
        watch: bool,
    },
    /// Sets a znode's data.
    SetData {
        /// Which.
        path: String,
        /// The new data; null and empty differ.
        data: Option<Bytes>,
        /// The version it must have.
        version: i32,
    },
    /// Asks for a znode's access control list.
    GetAcl {
        /// Which.
        path: String,
    },
    /// Sets a znode's access control list.
    SetAcl {
        /// Which.
        path: String,
        /// The new list.
        acl: Vec<Acl>,
        /// The version (of the list) it must have.
        version: i32,
    },
    /// Asks for the names of a znode's children.
    GetChildren {
        /// Which.
        path: String,
        /// Whether to be told when one is created or deleted.
        watch: bool,
    },
    /// As [`Self::GetChildren`], and the znode's metadata.
    GetChildren2 {
        /// Which.
        path: String,
        /// Whether to be told when one is created or deleted.
        watch: bool,
    },
    /// Waits until the server has all that was committed before.
    Sync {
        /// Given back in the reply.
        path: String,
    },
    /// Keeps the session alive.
    Ping,
    /// Checks a znode's version.
    Check {
        /// Which.
        path: String,
        /// The version it must have.
        version: i32,
    },
    /// All of these, or none.
    Multi(Vec<MultiOp>),
    /// Removes watches.
    RemoveWatches {
        /// Where.
        path: String,
        /// Which; a [`super::WatcherKind`].
        kind: i32,
    },
    /// Adds an identity to the session.
    Auth {
        /// Always 0 so far.
        kind: i32,
        /// `digest`, ...
        scheme: String,
        /// What the scheme wants: `user:password`.
        auth: Option<Bytes>,
    },
    /// Sets watches again.
    SetWatches(SetWatches),
    /// Sets a persistent watch.
    AddWatch {
        /// Where.
        path: String,
        /// Which; an [`super::AddWatchMode`].
        mode: i32,
    },
    /// Asks whether the connection has a watch.
    CheckWatches {
        /// Where.
        path: String,
        /// Which; a [`super::WatcherKind`].
        kind: i32,
    },
    /// Changes who the servers are: by who joins and who leaves, or by naming all.
    Reconfig {
        /// Servers that join, `server.ID=..` each, separated by commas.
        joining: Option<String>,
        /// Ids of servers that leave, separated by commas.
        leaving: Option<String>,
        /// All servers, one a line; then the other two are not looked at.
        new_members: Option<String>,
        /// The configuration that it must replace; -1 fits any.
        config_version: i64,
    },
    /// Several reads, each with a result of its own.
    MultiRead(Vec<ReadOp>),
    /// A step of a negotiation with a security layer.
    Sasl {
        /// What the layer wants to say.
        token: Option<Bytes>,
    },
    /// Asks for the session's ephemeral znodes.
    GetEphemerals {
        /// What their paths begin with; empty for all.
        prefix: String,
    },
    /// Asks how many znodes there are below one.
    GetAllChildrenNumber {
        /// Which.
        path: String,
    },
    /// Asks who the client has proved to be.
    WhoAmI,
    /// Ends the session.
    CloseSession,
}

impl Request {
    /// The operation. `SetWatches` is the older one where it suffices.
    pub fn op(&self) -> OpCode {
        match self {
            Self::Create { op, .. } => op.op(),
            Self::Delete { .. } => OpCode::Delete,
            Self::Exists { .. } => OpCode::Exists,
            Self::GetData { .. } => OpCode::GetData,
            Self::SetData { .. } => OpCode::SetData,
            Self::GetAcl { .. } => OpCode::GetAcl,
            Self::SetAcl { .. } => OpCode::SetAcl,
            Self::GetChildren { .. } => OpCode::GetChildren,
            Self::GetChildren2 { .. } => OpCode::GetChildren2,
            Self::Sync { .. } => OpCode::Sync,
            Self::Ping => OpCode::Ping,
            Self::Check { .. } => OpCode::Check,
            Self::Multi(_) => OpCode::Multi,
            Self::RemoveWatches { .. } => OpCode::RemoveWatches,
            Self::Auth { .. } => OpCode::Auth,
            Self::SetWatches(watches) => {
                if watches.persistent.is_empty() && watches.persistent_recursive.is_empty() {
                    OpCode::SetWatches
                } else {
                    OpCode::SetWatches2
                }
            }
            Self::AddWatch { .. } => OpCode::AddWatch,
            Self::CheckWatches { .. } => OpCode::CheckWatches,
            Self::Reconfig { .. } => OpCode::Reconfig,
            Self::MultiRead(_) => OpCode::MultiRead,
            Self::Sasl { .. } => OpCode::Sasl,
            Self::GetEphemerals { .. } => OpCode::GetEphemerals,
            Self::GetAllChildrenNumber { .. } => OpCode::GetAllChildrenNumber,
            Self::WhoAmI => OpCode::WhoAmI,
            Self::CloseSession => OpCode::CloseSession,
        }
    }

    /// Whether it changes what is replicated, and so goes through the quorum's log.
    pub fn is_write(&self) -> bool {
        match self {
            Self::Create { .. }
            | Self::Delete { .. }
            | Self::SetData { .. }
            | Self::SetAcl { .. }
            | Self::Check { .. }
            | Self::Multi(_)
            | Self::Reconfig { .. }
            | Self::CloseSession => true,
            Self::Exists { .. }
            | Self::GetData { .. }
            | Self::GetAcl { .. }
            | Self::GetChildren { .. }
            | Self::GetChildren2 { .. }
            | Self::Sync { .. }
            | Self::Ping
            | Self::RemoveWatches { .. }
            | Self::Auth { .. }
            | Self::SetWatches(_)
            | Self::AddWatch { .. }
            | Self::CheckWatches { .. }
            | Self::MultiRead(_)
            | Self::Sasl { .. }
            | Self::GetEphemerals { .. }
            | Self::GetAllChildrenNumber { .. }
            | Self::WhoAmI => false,
        }
    }

    /// Reads the body of the request with operation `op`. Bytes after it are ignored, as
    /// ZooKeeper does.
    ///
    /// # Errors
    /// [`DecodeError`]; its [`DecodeError::code`] is what to answer.
    pub fn decode(op: i32, body: &[u8]) -> Result<Self, DecodeError> {
        let op = OpCode::from_code(op).ok_or(DecodeError::UnknownOp(op))?;
        let r = &mut Reader::new(body);
        Ok(match op {
            OpCode::Create => Self::decode_create(CreateOp::Create, r)?,
            OpCode::Create2 => Self::decode_create(CreateOp::Create2, r)?,
            OpCode::CreateContainer => Self::decode_create(CreateOp::Container, r)?,
            OpCode::CreateTtl => {
                let mut request = Self::decode_create(CreateOp::Ttl(0), r)?;
                let ttl_ms = r.long()?;
                if let Self::Create { op, .. } = &mut request {
                    *op = CreateOp::Ttl(ttl_ms);
                }
                request
            }
            OpCode::Delete => Self::Delete {
                path: r.string()?,
                version: r.int()?,
            },
            OpCode::Exists => Self::Exists {
                path: r.string()?,
                watch: r.bool()?,
            },
            OpCode::GetData => Self::GetData {
                path: r.string()?,
                watch: r.bool()?,
            },
            OpCode::SetData => Self::SetData {
                path: r.string()?,
                data: r.buffer()?,
                version: r.int()?,
            },
            OpCode::GetAcl => Self::GetAcl { path: r.string()? },
            OpCode::SetAcl => Self::SetAcl {
                path: r.string()?,
                acl: r.vector(Acl::decode)?,
                version: r.int()?,
            },
            OpCode::GetChildren => Self::GetChildren {
                path: r.string()?,
                watch: r.bool()?,
            },
            OpCode::GetChildren2 => Self::GetChildren2 {
                path: r.string()?,
                watch: r.bool()?,
            },
            OpCode::Sync => Self::Sync { path: r.string()? },
            OpCode::Ping => Self::Ping,
            OpCode::Check => Self::Check {
                path: r.string()?,
                version: r.int()?,
            },
            OpCode::Multi => Self::Multi(MultiOp::decode_all(r, MULTI_OPS_MAX)?),
            OpCode::RemoveWatches => Self::RemoveWatches {
                path: r.string()?,
                kind: r.int()?,
            },
            OpCode::Auth => Self::Auth {
                kind: r.int()?,
                scheme: r.string()?,
                auth: r.buffer()?,
            },
            OpCode::SetWatches | OpCode::SetWatches2 => {
                let mut watches = SetWatches {
                    relative_zxid: r.long()?,
                    data: r.strings()?,
                    exist: r.strings()?,
                    child: r.strings()?,
                    ..SetWatches::default()
                };
                if op == OpCode::SetWatches2 {
                    watches.persistent = r.strings()?;
                    watches.persistent_recursive = r.strings()?;
                }
                Self::SetWatches(watches)
            }
            OpCode::AddWatch => Self::AddWatch {
                path: r.string()?,
                mode: r.int()?,
            },
            OpCode::CheckWatches => Self::CheckWatches {
                path: r.string()?,
                kind: r.int()?,
            },
            OpCode::Reconfig => Self::Reconfig {
                joining: r.optional_string()?,
                leaving: r.optional_string()?,
                new_members: r.optional_string()?,
                config_version: r.long()?,
            },
            OpCode::MultiRead => Self::MultiRead(ReadOp::decode_all(r, MULTI_OPS_MAX)?),
            OpCode::Sasl => Self::Sasl { token: r.buffer()? },
            OpCode::GetEphemerals => Self::GetEphemerals {
                prefix: r.string_or_empty()?,
            },
            OpCode::GetAllChildrenNumber => Self::GetAllChildrenNumber { path: r.string()? },
            OpCode::WhoAmI => Self::WhoAmI,
            OpCode::CloseSession => Self::CloseSession,
        })
    }

    fn decode_create(op: CreateOp, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self::Create {
            op,
            path: r.string()?,
            data: r.buffer()?,
            acl: r.vector(Acl::decode)?,
            flags: r.int()?,
        })
    }

    /// Writes the body.
    pub fn encode(&self, w: &mut Writer) {
        match self {
            Self::Create {
                op,
                path,
                data,
                acl,
                flags,
            } => {
                w.string(path);
                w.buffer(data.as_deref());
                w.vector(acl, |w, acl| acl.encode(w));
                w.int(*flags);
                if let CreateOp::Ttl(ttl_ms) = op {
                    w.long(*ttl_ms);
                }
            }
            Self::Delete { path, version } | Self::Check { path, version } => {
                w.string(path);
                w.int(*version);
            }
            Self::Exists { path, watch }
            | Self::GetData { path, watch }
            | Self::GetChildren { path, watch }
            | Self::GetChildren2 { path, watch } => {
                w.string(path);
                w.bool(*watch);
            }
            Self::SetData {
                path,
                data,
                version,
            } => {
                w.string(path);
                w.buffer(data.as_deref());
                w.int(*version);
            }
            Self::GetAcl { path }
            | Self::Sync { path }
            | Self::GetAllChildrenNumber { path }
            | Self::GetEphemerals { prefix: path } => w.string(path),
            Self::SetAcl { path, acl, version } => {
                w.string(path);
                w.vector(acl, |w, acl| acl.encode(w));
                w.int(*version);
            }
            Self::Ping | Self::CloseSession | Self::WhoAmI => {}
            Self::Multi(ops) => MultiOp::encode_all(ops, w),
            Self::MultiRead(ops) => ReadOp::encode_all(ops, w),
            Self::Sasl { token } => w.buffer(token.as_deref()),
            Self::Reconfig {
                joining,
                leaving,
                new_members,
                config_version,
            } => {
                for list in [joining, leaving, new_members] {
                    w.buffer(list.as_deref().map(str::as_bytes));
                }
                w.long(*config_version);
            }
            Self::RemoveWatches { path, kind: code }
            | Self::CheckWatches { path, kind: code }
            | Self::AddWatch { path, mode: code } => {
                w.string(path);
                w.int(*code);
            }
            Self::Auth { kind, scheme, auth } => {
                w.int(*kind);
                w.string(scheme);
                w.buffer(auth.as_deref());
            }
            Self::SetWatches(watches) => {
                w.long(watches.relative_zxid);
                w.strings(&watches.data);
                w.strings(&watches.exist);
                w.strings(&watches.child);
                if self.op() == OpCode::SetWatches2 {
                    w.strings(&watches.persistent);
                    w.strings(&watches.persistent_recursive);
                }
            }
        }
    }
}
