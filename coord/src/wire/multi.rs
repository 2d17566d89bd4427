//! `multi`: several operations in one request, all or none.

use bytes::Bytes;

use super::{Acl, CreateOp, DecodeError, ErrorCode, OpCode, Reader, Stat, Writer};

/// The type field of a failed operation's result, and of the trailer.
const TYPE_NONE: i32 = -1;

/// One operation of a multi.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MultiOp {
    /// Creates a znode.
    Create {
        /// Which operation; it decides the form of the result.
        op: CreateOp,
        /// Its path, or the beginning of it for a sequential one.
        path: String,
        /// Its data.
        data: Option<Bytes>,
        /// Its access control list.
        acl: Vec<Acl>,
        /// A [`super::CreateMode`].
        flags: i32,
    },
    /// Deletes a znode.
    Delete {
        /// Which.
        path: String,
        /// The version it must have; -1 fits any.
        version: i32,
    },
    /// Sets a znode's data.
    SetData {
        /// Which.
        path: String,
        /// The new data.
        data: Option<Bytes>,
        /// The version it must have; -1 fits any.
        version: i32,
    },
    /// Checks a znode's version.
    Check {
        /// Which.
        path: String,
        /// The version it must have; -1 fits any, so that it checks existence alone.
        version: i32,
    },
}

/// `MultiHeader{type, done, err}`, before each operation, each result, and as the trailer.
struct MultiHeader {
    kind: i32,
    done: bool,
}

impl MultiHeader {
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let header = Self {
            kind: r.int()?,
            done: r.bool()?,
        };
        r.int()?; // err: repeated by an error result's body
        Ok(header)
    }

    fn encode(w: &mut Writer, kind: i32, done: bool, err: i32) {
        w.int(kind);
        w.bool(done);
        w.int(err);
    }
}

impl MultiOp {
    const fn op(&self) -> OpCode {
        match self {
            Self::Create { op, .. } => op.op(),
            Self::Delete { .. } => OpCode::Delete,
            Self::SetData { .. } => OpCode::SetData,
            Self::Check { .. } => OpCode::Check,
        }
    }

    pub(super) fn decode_all(r: &mut Reader<'_>, ops_max: usize) -> Result<Vec<Self>, DecodeError> {
        let mut ops = Vec::new();
        loop {
            let header = MultiHeader::decode(r)?;
            if header.done {
                return Ok(ops);
            }
            if ops.len() == ops_max {
                return Err(DecodeError::MultiTooLong);
            }
            ops.push(Self::decode_one(header.kind, r)?);
        }
    }

    fn decode_one(kind: i32, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let create = |op, r: &mut Reader<'_>| {
            Ok(Self::Create {
                op,
                path: r.string()?,
                data: r.buffer()?,
                acl: r.vector(Acl::decode)?,
                flags: r.int()?,
            })
        };
        match OpCode::from_code(kind) {
            Some(OpCode::Create) => create(CreateOp::Create, r),
            Some(OpCode::Create2) => create(CreateOp::Create2, r),
            Some(OpCode::CreateContainer) => create(CreateOp::Container, r),
            Some(OpCode::CreateTtl) => {
                let mut create = create(CreateOp::Ttl(0), r)?;
                let ttl_ms = r.long()?;
                if let Self::Create { op, .. } = &mut create {
                    *op = CreateOp::Ttl(ttl_ms);
                }
                Ok(create)
            }
            Some(OpCode::Delete) => Ok(Self::Delete {
                path: r.string()?,
                version: r.int()?,
            }),
            Some(OpCode::SetData) => Ok(Self::SetData {
                path: r.string()?,
                data: r.buffer()?,
                version: r.int()?,
            }),
            Some(OpCode::Check) => Ok(Self::Check {
                path: r.string()?,
                version: r.int()?,
            }),
            _ => Err(DecodeError::NotInMulti(kind)),
        }
    }

    pub(super) fn encode_all(ops: &[Self], w: &mut Writer) {
        for op in ops {
            MultiHeader::encode(w, op.op().code(), false, -1);
            match op {
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
                Self::SetData {
                    path,
                    data,
                    version,
                } => {
                    w.string(path);
                    w.buffer(data.as_deref());
                    w.int(*version);
                }
            }
        }
        MultiHeader::encode(w, TYPE_NONE, true, -1);
    }
}

/// The result of one operation of a multi.
///
/// Where the multi failed, every result is an [`Self::Error`]: `None` before the operation at
/// fault, its true code there, and [`ErrorCode::RuntimeInconsistency`] after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MultiResult {
    /// A create.
    Created {
        /// The path it got.
        path: String,
    },
    /// A create2, createContainer or createTTL. As in ZooKeeper all three are answered as a
    /// create2: its Java client passes over results of the two others.
    Created2 {
        /// The path it got.
        path: String,
        /// Its metadata.
        stat: Stat,
    },
    /// A delete.
    Deleted,
    /// A setData.
    Set(Stat),
    /// A check.
    Checked,
    /// Any operation of a multi that failed.
    Error(Option<ErrorCode>),
}

impl MultiResult {
    pub(super) fn decode_all(r: &mut Reader<'_>) -> Result<Vec<Self>, DecodeError> {
        let mut results = Vec::new();
        loop {
            let header = MultiHeader::decode(r)?;
            if header.done {
                return Ok(results);
            }
            results.push(match OpCode::from_code(header.kind) {
                None if header.kind == TYPE_NONE => Self::Error(ErrorCode::from_code(r.int()?)),
                Some(OpCode::Create) => Self::Created { path: r.string()? },
                Some(OpCode::Create2) => Self::Created2 {
                    path: r.string()?,
                    stat: Stat::decode(r)?,
                },
                Some(OpCode::Delete) => Self::Deleted,
                Some(OpCode::SetData) => Self::Set(Stat::decode(r)?),
                Some(OpCode::Check) => Self::Checked,
                _ => return Err(DecodeError::NotInMulti(header.kind)),
            });
        }
    }

    pub(super) fn encode_all(results: &[Self], w: &mut Writer) {
        for result in results {
            match result {
                Self::Created { path } => {
                    MultiHeader::encode(w, OpCode::Create.code(), false, 0);
                    w.string(path);
                }
                Self::Created2 { path, stat } => {
                    MultiHeader::encode(w, OpCode::Create2.code(), false, 0);
                    w.string(path);
                    stat.encode(w);
                }
                Self::Deleted => MultiHeader::encode(w, OpCode::Delete.code(), false, 0),
                Self::Set(stat) => {
                    MultiHeader::encode(w, OpCode::SetData.code(), false, 0);
                    stat.encode(w);
                }
                Self::Checked => MultiHeader::encode(w, OpCode::Check.code(), false, 0),
                Self::Error(err) => {
                    let code = err.map_or(0, ErrorCode::code);
                    MultiHeader::encode(w, TYPE_NONE, false, code);
                    w.int(code);
                }
            }
        }
        MultiHeader::encode(w, TYPE_NONE, true, -1);
    }
}

/// One read of a multiRead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadOp {
    /// Asks for a znode's data.
    GetData {
        /// Which.
        path: String,
        /// Whether to be told of its change or deletion.
        watch: bool,
    },
    /// Asks for the names of a znode's children.
    GetChildren {
        /// Which.
        path: String,
        /// Whether to be told of its deletion, or of children created or deleted.
        watch: bool,
    },
}

impl ReadOp {
    pub(super) fn decode_all(r: &mut Reader<'_>, ops_max: usize) -> Result<Vec<Self>, DecodeError> {
        let mut ops = Vec::new();
        loop {
            let header = MultiHeader::decode(r)?;
            if header.done {
                return Ok(ops);
            }
            if ops.len() == ops_max {
                return Err(DecodeError::MultiTooLong);
            }
            ops.push(match OpCode::from_code(header.kind) {
                Some(OpCode::GetData) => Self::GetData {
                    path: r.string()?,
                    watch: r.bool()?,
                },
                Some(OpCode::GetChildren) => Self::GetChildren {
                    path: r.string()?,
                    watch: r.bool()?,
                },
                _ => return Err(DecodeError::NotInMulti(header.kind)),
            });
        }
    }

    pub(super) fn encode_all(ops: &[Self], w: &mut Writer) {
        for op in ops {
            let (op, path, watch) = match op {
                Self::GetData { path, watch } => (OpCode::GetData, path, watch),
                Self::GetChildren { path, watch } => (OpCode::GetChildren, path, watch),
            };
            MultiHeader::encode(w, op.code(), false, -1);
            w.string(path);
            w.bool(*watch);
        }
        MultiHeader::encode(w, TYPE_NONE, true, -1);
    }
}

/// The result of one read of a multiRead. Errors stand alone: the others are still answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadResult {
    /// A getData.
    Data {
        /// The data; null and empty differ.
        data: Option<Bytes>,
        /// The znode's metadata.
        stat: Stat,
    },
    /// A getChildren.
    Children(Vec<String>),
    /// A read that failed.
    Error(ErrorCode),
}

impl ReadResult {
    /// Length on the wire, in bytes.
    pub fn bytes(&self) -> usize {
        const HEADER: usize = 9;
        HEADER
            + match self {
                Self::Data { data, .. } => 4 + data.as_ref().map_or(0, Bytes::len) + Stat::BYTES,
                Self::Children(names) => names.iter().fold(4, |sum, name| sum + 4 + name.len()),
                Self::Error(_) => 4,
            }
    }

    pub(super) fn decode_all(r: &mut Reader<'_>) -> Result<Vec<Self>, DecodeError> {
        let mut results = Vec::new();
        loop {
            let header = MultiHeader::decode(r)?;
            if header.done {
                return Ok(results);
            }
            results.push(match OpCode::from_code(header.kind) {
                None if header.kind == TYPE_NONE => {
                    let code = r.int()?;
                    Self::Error(ErrorCode::from_code(code).ok_or(DecodeError::BadEnum(code))?)
                }
                Some(OpCode::GetData) => Self::Data {
                    data: r.buffer()?,
                    stat: Stat::decode(r)?,
                },
                Some(OpCode::GetChildren) => Self::Children(r.strings()?),
                _ => return Err(DecodeError::NotInMulti(header.kind)),
            });
        }
    }

    pub(super) fn encode_all(results: &[Self], w: &mut Writer) {
        for result in results {
            match result {
                Self::Data { data, stat } => {
                    MultiHeader::encode(w, OpCode::GetData.code(), false, 0);
                    w.buffer(data.as_deref());
                    stat.encode(w);
                }
                Self::Children(names) => {
                    MultiHeader::encode(w, OpCode::GetChildren.code(), false, 0);
                    w.strings(names);
                }
                Self::Error(error) => {
                    MultiHeader::encode(w, TYPE_NONE, false, error.code());
                    w.int(error.code());
                }
            }
        }
        MultiHeader::encode(w, TYPE_NONE, true, -1);
    }
}
