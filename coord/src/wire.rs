//! The ZooKeeper client protocol on the wire: jute records in length-prefixed frames.
//!
//! The codec is symmetric: a server decodes [`Request`]s and encodes [`Response`]s, a client does
//! the reverse, both from the same definitions. It does no I/O, and no input makes it panic or
//! allocate more than a small multiple of the frame that it was handed.
//!
//! ```
//! use unbroken_coord::wire::{OpCode, Request, RequestHeader, encode_request, split_frame};
//!
//! let request = Request::Sync { path: "/a".into() };
//! let bytes = encode_request(7, &request);
//! let (frame, rest) = split_frame(&bytes, 1024).unwrap().expect("a whole frame");
//! assert!(rest.is_empty());
//! let (header, body) = RequestHeader::split(frame).unwrap();
//! assert_eq!((header.xid, header.op), (7, OpCode::Sync.code()));
//! assert_eq!(Request::decode(header.op, body).unwrap(), request);
//! ```

mod error;
mod frame;
mod jute;
mod multi;
mod path;
mod request;
mod response;
mod session;
mod types;
mod words;

#[cfg(test)]
pub(crate) mod tests;

pub use error::{DecodeError, ErrorCode, FrameError};
pub use frame::{
    Split, encode_connect_request, encode_connect_response, encode_error, encode_event,
    encode_reply, encode_request, split_frame,
};
pub use jute::{Reader, Writer};
pub use multi::{MultiOp, MultiResult, ReadOp, ReadResult};
pub use path::{PATH_BYTES_MAX, PATH_NAMES_MAX, PathError, parent, validate_path};
pub use request::{CreateOp, OpCode, Request, SetWatches};
pub use response::Response;
pub use session::{
    ConnectRequest, ConnectResponse, EventType, KeeperState, ReplyHeader, RequestHeader,
    WatcherEvent, xid,
};
pub use types::{Acl, AddWatchMode, CreateMode, Id, Stat, WatcherKind, perms};
pub use words::FourLetterWord;

/// Largest frame that a server accepts, in bytes without the length prefix (ZooKeeper's default
/// `jute.maxbuffer`, 0xfffff).
pub const REQUEST_BYTES_MAX: usize = 1_048_575;

/// Largest frame that a client accepts from a server, in bytes without the length prefix. Larger
/// than [`REQUEST_BYTES_MAX`], because the names of a node's children may together exceed what
/// any one of their creations was allowed.
pub const REPLY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Length of a session's password, in bytes.
pub const PASSWORD_BYTES: usize = 16;

/// Largest number of operations in one `multi`. ZooKeeper has no such bound besides the frame's;
/// an operation takes at least 9 bytes, and none needs a million of them.
pub const MULTI_OPS_MAX: usize = 16_384;
