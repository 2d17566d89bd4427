//! Session records: the handshake, the headers, watch events.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{DecodeError, ErrorCode, Reader, Writer};

/// The xids that mean something of their own; a client's requests count upwards from 1.
pub mod xid {
    /// A watch event; no request had it.
    pub const NOTIFICATION: i32 = -1;
    /// A ping.
    pub const PING: i32 = -2;
    /// An auth packet.
    pub const AUTH: i32 = -4;
    /// A setWatches.
    pub const SET_WATCHES: i32 = -8;
}

/// The first frame of a connection: opens a session, or takes one up again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Always 0 so far.
    pub protocol_version: i32,
    /// The newest zxid the client has seen. A server behind it must not serve the client.
    pub last_zxid_seen: i64,
    /// The session timeout asked for, in ms.
    pub timeout_ms: i32,
    /// The session to take up, or 0 for a new one.
    pub session_id: i64,
    /// The session's password; null is possible.
    pub password: Option<Bytes>,
    /// Whether a read-only server will do. `None` where an old client (before 3.4) does not say:
    /// the reply then leaves the field out, too.
    pub read_only: Option<bool>,
}

impl ConnectRequest {
    /// Reads the whole frame.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], [`DecodeError::NegativeLength`].
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(frame);
        Ok(Self {
            protocol_version: r.int()?,
            last_zxid_seen: r.long()?,
            timeout_ms: r.int()?,
            session_id: r.long()?,
            password: r.buffer()?,
            read_only: optional_bool(&mut r)?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.protocol_version);
        w.long(self.last_zxid_seen);
        w.int(self.timeout_ms);
        w.long(self.session_id);
        w.buffer(self.password.as_deref());
        if let Some(read_only) = self.read_only {
            w.bool(read_only);
        }
    }
}

/// The answer to a [`ConnectRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectResponse {
    /// Always 0 so far.
    pub protocol_version: i32,
    /// The session timeout granted, in ms. 0 or less: the session has expired.
    pub timeout_ms: i32,
    /// The session, or 0 where it has expired.
    pub session_id: i64,
    /// The password that takes the session up again.
    pub password: Option<Bytes>,
    /// Whether the server is read-only. `None` towards a client that did not ask.
    pub read_only: Option<bool>,
}

impl ConnectResponse {
    /// The answer to one who comes back to a session that is gone: zeros, and then the server
    /// closes.
    pub fn expired(read_only: Option<bool>) -> Self {
        Self {
            protocol_version: 0,
            timeout_ms: 0,
            session_id: 0,
            password: Some(Bytes::from_static(&[0; super::PASSWORD_BYTES])),
            read_only,
        }
    }

    /// Reads the whole frame.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], [`DecodeError::NegativeLength`].
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(frame);
        Ok(Self {
            protocol_version: r.int()?,
            timeout_ms: r.int()?,
            session_id: r.long()?,
            password: r.buffer()?,
            read_only: optional_bool(&mut r)?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.protocol_version);
        w.int(self.timeout_ms);
        w.long(self.session_id);
        w.buffer(self.password.as_deref());
        if let Some(read_only) = self.read_only {
            w.bool(read_only);
        }
    }
}

/// The trailing byte that clients before 3.4 leave out.
fn optional_bool(r: &mut Reader<'_>) -> Result<Option<bool>, DecodeError> {
    if r.rest().is_empty() {
        Ok(None)
    } else {
        r.bool().map(Some)
    }
}

/// The head of every request after the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// The client's number for the request.
    pub xid: i32,
    /// What is asked; [`super::OpCode`] where it is known.
    pub op: i32,
}

impl RequestHeader {
    /// Splits a frame into its header and the request's body.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn split(frame: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let mut r = Reader::new(frame);
        Ok((
            Self {
                xid: r.int()?,
                op: r.int()?,
            },
            r.rest(),
        ))
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.xid);
        w.int(self.op);
    }
}

/// The head of every frame that a server sends after the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// The request's xid, or one of [`xid`].
    pub xid: i32,
    /// The newest zxid that the server has applied; -1 in a watch event.
    pub zxid: i64,
    /// What went wrong; `None` (0 on the wire) for success.
    pub err: Option<ErrorCode>,
}

impl ReplyHeader {
    /// Splits a frame into its header and the response's body.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn split(frame: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let mut r = Reader::new(frame);
        let header = Self {
            xid: r.int()?,
            zxid: r.long()?,
            err: ErrorCode::from_code(r.int()?),
        };
        Ok((header, r.rest()))
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.xid);
        w.long(self.zxid);
        w.int(self.err.map_or(0, ErrorCode::code));
    }
}

/// What a watch saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum EventType {
    /// Nothing about a znode: the connection's state changed.
    None,
    /// The znode was created.
    NodeCreated,
    /// The znode was deleted.
    NodeDeleted,
    /// The znode's data changed.
    NodeDataChanged,
    /// A child was created or deleted.
    NodeChildrenChanged,
    /// A data watch was removed.
    DataWatchRemoved,
    /// A child watch was removed.
    ChildWatchRemoved,
    /// A persistent watch was removed.
    PersistentWatchRemoved,
}

impl EventType {
    /// The number on the wire.
    pub const fn code(self) -> i32 {
        match self {
            Self::None => -1,
            Self::NodeCreated => 1,
            Self::NodeDeleted => 2,
            Self::NodeDataChanged => 3,
            Self::NodeChildrenChanged => 4,
            Self::DataWatchRemoved => 5,
            Self::ChildWatchRemoved => 6,
            Self::PersistentWatchRemoved => 7,
        }
    }

    const fn from_code(code: i32) -> Result<Self, DecodeError> {
        Ok(match code {
            -1 => Self::None,
            1 => Self::NodeCreated,
            2 => Self::NodeDeleted,
            3 => Self::NodeDataChanged,
            4 => Self::NodeChildrenChanged,
            5 => Self::DataWatchRemoved,
            6 => Self::ChildWatchRemoved,
            7 => Self::PersistentWatchRemoved,
            code => return Err(DecodeError::BadEnum(code)),
        })
    }
}

/// The connection's state, as it stands in a watch event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum KeeperState {
    /// Not connected.
    Disconnected,
    /// Connected to a server that is part of a quorum: what every event of a server says.
    SyncConnected,
    /// Authentication failed.
    AuthFailed,
    /// Connected to a server that is cut off and serves reads only.
    ConnectedReadOnly,
    /// Authenticated by SASL.
    SaslAuthenticated,
    /// The session has expired.
    Expired,
    /// The client was closed.
    Closed,
}

impl KeeperState {
    /// The number on the wire.
    pub const fn code(self) -> i32 {
        match self {
            Self::Disconnected => 0,
            Self::SyncConnected => 3,
            Self::AuthFailed => 4,
            Self::ConnectedReadOnly => 5,
            Self::SaslAuthenticated => 6,
            Self::Expired => -112,
            Self::Closed => 7,
        }
    }

    const fn from_code(code: i32) -> Result<Self, DecodeError> {
        Ok(match code {
            0 => Self::Disconnected,
            3 => Self::SyncConnected,
            4 => Self::AuthFailed,
            5 => Self::ConnectedReadOnly,
            6 => Self::SaslAuthenticated,
            -112 => Self::Expired,
            7 => Self::Closed,
            code => return Err(DecodeError::BadEnum(code)),
        })
    }
}

/// A watch event: the body of a frame with [`xid::NOTIFICATION`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WatcherEvent {
    /// What happened.
    pub event: EventType,
    /// The connection's state.
    pub state: KeeperState,
    /// The znode.
    pub path: String,
}

impl WatcherEvent {
    /// An event about a znode.
    pub fn new(event: EventType, path: impl Into<String>) -> Self {
        Self {
            event,
            state: KeeperState::SyncConnected,
            path: path.into(),
        }
    }

    /// Reads the record.
    ///
    /// # Errors
    /// [`DecodeError::BadEnum`], and those of [`Reader::string`].
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(body);
        Ok(Self {
            event: EventType::from_code(r.int()?)?,
            state: KeeperState::from_code(r.int()?)?,
            path: r.string()?,
        })
    }

    /// Writes the record.
    pub fn encode(&self, w: &mut Writer) {
        w.int(self.event.code());
        w.int(self.state.code());
        w.string(&self.path);
    }
}
