//! Records that requests and responses share.

use serde::{Deserialize, Serialize};

use super::{DecodeError, ErrorCode, Reader, Writer};

/// The metadata of a znode, in the protocol's own field order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stat {
    /// zxid of the creation.
    pub czxid: i64,
    /// zxid of the last change of the data.
    pub mzxid: i64,
    /// Time of the creation, in ms since 1970.
    pub ctime: i64,
    /// Time of the last change of the data, in ms since 1970.
    pub mtime: i64,
    /// Number of changes of the data.
    pub version: i32,
    /// Number of changes of the children: creations and deletions.
    pub cversion: i32,
    /// Number of changes of the access control list.
    pub aversion: i32,
    /// Session that owns an ephemeral znode, else 0.
    pub ephemeral_owner: i64,
    /// Length of the data, in bytes.
    pub data_length: i32,
    /// Number of children.
    pub num_children: i32,
    /// zxid of the last change of the children.
    pub pzxid: i64,
}

impl Stat {
    /// Length on the wire, in bytes.
    pub const BYTES: usize = 68;

    /// Reads the record.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            czxid: r.long()?,
            mzxid: r.long()?,
            ctime: r.long()?,
            mtime: r.long()?,
            version: r.int()?,
            cversion: r.int()?,
            aversion: r.int()?,
            ephemeral_owner: r.long()?,
            data_length: r.int()?,
            num_children: r.int()?,
            pzxid: r.long()?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.long(self.czxid);
        w.long(self.mzxid);
        w.long(self.ctime);
        w.long(self.mtime);
        w.int(self.version);
        w.int(self.cversion);
        w.int(self.aversion);
        w.long(self.ephemeral_owner);
        w.int(self.data_length);
        w.int(self.num_children);
        w.long(self.pzxid);
    }
}

/// Permission bits of an [`Acl`].
pub mod perms {
    /// Read data and children.
    pub const READ: i32 = 1;
    /// Set data.
    pub const WRITE: i32 = 2;
    /// Create children.
    pub const CREATE: i32 = 4;
    /// Delete children.
    pub const DELETE: i32 = 8;
    /// Set the access control list.
    pub const ADMIN: i32 = 16;
    /// All of them.
    pub const ALL: i32 = 31;
}

/// Whom an access control entry means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Id {
    /// `world`, `auth`, `digest`, `ip`, ...
    pub scheme: String,
    /// What the scheme says it is: `anyone`, `user:hash`, `10.0.0.0/8`.
    pub id: String,
}

impl Id {
    /// `world:anyone`.
    pub fn anyone() -> Self {
        Self {
            scheme: "world".into(),
            id: "anyone".into(),
        }
    }

    /// Reads the record; null reads as empty: the id of the scheme `auth` is.
    ///
    /// # Errors
    /// Those of [`Reader::string_or_empty`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            scheme: r.string_or_empty()?,
            id: r.string_or_empty()?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.string(&self.scheme);
        w.string(&self.id);
    }
}

/// One entry of an access control list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Acl {
    /// A sum of [`perms`].
    pub perms: i32,
    /// Whom the permissions are given.
    pub id: Id,
}

impl Acl {
    /// Everybody may do everything: ZooKeeper's `OPEN_ACL_UNSAFE`.
    pub fn open() -> Vec<Self> {
        vec![Self {
            perms: perms::ALL,
            id: Id::anyone(),
        }]
    }

    /// Everybody may read, nobody may write: ZooKeeper's `READ_ACL_UNSAFE`.
    pub fn read_only() -> Vec<Self> {
        vec![Self {
            perms: perms::READ,
            id: Id::anyone(),
        }]
    }

    /// Reads the record.
    ///
    /// # Errors
    /// Those of [`Id::decode`].
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            perms: r.int()?,
            id: Id::decode(r)?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.perms);
        self.id.encode(w);
    }
}

/// What kind of znode to create: the `flags` of a create request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(i32)]
pub enum CreateMode {
    /// Stays until it is deleted.
    Persistent = 0,
    /// Deleted when its session ends.
    Ephemeral = 1,
    /// Persistent, a counter appended to its name.
    PersistentSequential = 2,
    /// Ephemeral, a counter appended to its name.
    EphemeralSequential = 3,
    /// Deleted some time after its last child.
    Container = 4,
    /// Deleted when it was neither changed nor had children for a time.
    PersistentWithTtl = 5,
    /// As [`Self::PersistentWithTtl`], a counter appended to its name.
    PersistentSequentialWithTtl = 6,
}

impl CreateMode {
    /// Every mode, in the order of its number.
    pub const ALL: [Self; 7] = [
        Self::Persistent,
        Self::Ephemeral,
        Self::PersistentSequential,
        Self::EphemeralSequential,
        Self::Container,
        Self::PersistentWithTtl,
        Self::PersistentSequentialWithTtl,
    ];

    /// The mode of a request's flags.
    ///
    /// # Errors
    /// [`ErrorCode::BadArguments`] for flags that mean none.
    pub fn from_flags(flags: i32) -> Result<Self, ErrorCode> {
        usize::try_from(flags)
            .ok()
            .and_then(|index| Self::ALL.get(index).copied())
            .ok_or(ErrorCode::BadArguments)
    }

    /// The number on the wire.
    pub const fn flags(self) -> i32 {
        self as i32
    }

    /// Whether the znode dies with its session.
    pub const fn is_ephemeral(self) -> bool {
        matches!(self, Self::Ephemeral | Self::EphemeralSequential)
    }

    /// Whether the server appends a counter to the name.
    pub const fn is_sequential(self) -> bool {
        matches!(
            self,
            Self::PersistentSequential
                | Self::EphemeralSequential
                | Self::PersistentSequentialWithTtl
        )
    }
}

/// What `addWatch` sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum AddWatchMode {
    /// Data and children of one znode, until removed.
    Persistent,
    /// A znode and all below it, until removed; told of no child changes.
    PersistentRecursive,
}

impl AddWatchMode {
    /// The mode of a request's field.
    ///
    /// # Errors
    /// [`ErrorCode::MarshallingError`] where it means none, as ZooKeeper answers.
    pub const fn from_code(code: i32) -> Result<Self, ErrorCode> {
        match code {
            0 => Ok(Self::Persistent),
            1 => Ok(Self::PersistentRecursive),
            _ => Err(ErrorCode::MarshallingError),
        }
    }

    /// The number on the wire.
    pub const fn code(self) -> i32 {
        match self {
            Self::Persistent => 0,
            Self::PersistentRecursive => 1,
        }
    }
}

/// Which watches `removeWatches` takes away, and `checkWatches` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum WatcherKind {
    /// One-shot ones for children.
    Children,
    /// One-shot ones for data and existence.
    Data,
    /// All.
    Any,
    /// Persistent ones (ZooKeeper from 3.9 on).
    Persistent,
    /// Persistent recursive ones (ZooKeeper from 3.9 on).
    PersistentRecursive,
}

impl WatcherKind {
    /// The kind of a request's field.
    ///
    /// # Errors
    /// [`ErrorCode::MarshallingError`] where it means none, as ZooKeeper answers.
    pub const fn from_code(code: i32) -> Result<Self, ErrorCode> {
        match code {
            1 => Ok(Self::Children),
            2 => Ok(Self::Data),
            3 => Ok(Self::Any),
            4 => Ok(Self::Persistent),
            5 => Ok(Self::PersistentRecursive),
            _ => Err(ErrorCode::MarshallingError),
        }
    }

    /// The number on the wire.
    pub const fn code(self) -> i32 {
        match self {
            Self::Children => 1,
            Self::Data => 2,
            Self::Any => 3,
            Self::Persistent => 4,
            Self::PersistentRecursive => 5,
        }
    }
}
