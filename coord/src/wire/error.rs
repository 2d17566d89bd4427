//! What can go wrong on the wire, and the protocol's own error codes.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $text:literal;)+) => {
        /// An error code of the protocol, as it stands in a reply header.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $($(#[doc = $doc])+ $name,)+
            /// A code that this version does not know; never one of the above.
            Other(i32),
        }

        impl ErrorCode {
            /// Every code known by name.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The number on the wire.
            pub const fn code(self) -> i32 {
                match self {
                    $(Self::$name => $code,)+
                    Self::Other(code) => code,
                }
            }

            /// The error of a non-zero header field; `None` for 0, which means success.
            pub const fn from_code(code: i32) -> Option<Self> {
                match code {
                    0 => None,
                    $($code => Some(Self::$name),)+
                    code => Some(Self::Other(code)),
                }
            }
        }

        impl fmt::Display for ErrorCode {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$name => f.write_str($text),)+
                    Self::Other(code) => write!(f, "error {code}"),
                }
            }
        }
    };
}

error_codes! {
    /// The server failed in a way that it cannot name.
    SystemError = -1, "system error";
    /// The server found its own state inconsistent; as an operation's result in a failed multi:
    /// not tried, because an earlier one failed.
    RuntimeInconsistency = -2, "runtime inconsistency";
    /// The server found its data inconsistent.
    DataInconsistency = -3, "data inconsistency";
    /// The connection to the server was lost.
    ConnectionLoss = -4, "connection loss";
    /// A record could not be decoded.
    MarshallingError = -5, "marshalling error";
    /// The operation does not exist here.
    Unimplemented = -6, "unimplemented";
    /// The operation took too long.
    OperationTimeout = -7, "operation timeout";
    /// A path, flag or other argument is not valid.
    BadArguments = -8, "bad arguments";
    /// The session state does not allow the operation.
    InvalidState = -9, "invalid state";
    /// No quorum of the new configuration is in step.
    NewConfigNoQuorum = -13, "no quorum of the new configuration";
    /// Another reconfiguration is under way.
    ReconfigInProgress = -14, "reconfiguration in progress";
    /// No such znode.
    NoNode = -101, "no such znode";
    /// The session may not do this.
    NoAuth = -102, "not authorized";
    /// The version given is not the znode's.
    BadVersion = -103, "version conflict";
    /// An ephemeral znode has no children.
    NoChildrenForEphemerals = -108, "ephemeral znodes have no children";
    /// The znode exists already.
    NodeExists = -110, "znode exists already";
    /// The znode has children.
    NotEmpty = -111, "znode has children";
    /// The session has expired.
    SessionExpired = -112, "session expired";
    /// The event callback is not valid.
    InvalidCallback = -113, "invalid callback";
    /// The access control list is not valid.
    InvalidAcl = -114, "invalid access control list";
    /// Authentication failed.
    AuthFailed = -115, "authentication failed";
    /// The session is held by another server now.
    SessionMoved = -118, "session moved to another server";
    /// The server is read-only.
    NotReadOnly = -119, "write on a read-only server";
    /// An ephemeral operation on a local session.
    EphemeralOnLocalSession = -120, "ephemeral znode on a local session";
    /// No such watcher.
    NoWatcher = -121, "no such watcher";
    /// Reconfiguration is switched off.
    ReconfigDisabled = -123, "reconfiguration is disabled";
    /// The session must authenticate first.
    SessionClosedRequireAuth = -124, "authentication required";
    /// A quota would be exceeded.
    QuotaExceeded = -125, "quota exceeded";
    /// The server sheds load.
    Throttled = -127, "throttled";
}

impl std::error::Error for ErrorCode {}

/// Bytes that are not the record which was expected. Always the peer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// A field runs past the end of its frame.
    #[error("a field runs past the end of its frame")]
    Truncated,
    /// A length is negative, and not the -1 of a null value.
    #[error("negative length {0}")]
    NegativeLength(i32),
    /// A string that must be present is null.
    #[error("a string is null")]
    NullString,
    /// A string is not UTF-8.
    #[error("a string is not UTF-8")]
    NotUtf8,
    /// An operation that this version does not know.
    #[error("unknown operation {0}")]
    UnknownOp(i32),
    /// An operation that a multi may not hold.
    #[error("operation {0} is not allowed in a multi")]
    NotInMulti(i32),
    /// More operations than [`super::MULTI_OPS_MAX`].
    #[error("too many operations in one multi")]
    MultiTooLong,
    /// A field that enumerates has a value outside its enumeration.
    #[error("value {0} is outside its enumeration")]
    BadEnum(i32),
}

impl DecodeError {
    /// The code that a server answers with.
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::UnknownOp(_) => ErrorCode::Unimplemented,
            Self::MultiTooLong | Self::BadEnum(_) => ErrorCode::BadArguments,
            Self::NotInMulti(_)
            | Self::Truncated
            | Self::NegativeLength(_)
            | Self::NullString
            | Self::NotUtf8 => ErrorCode::MarshallingError,
        }
    }
}

/// A length prefix that no correct peer sends: the connection is closed without a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length is negative.
    #[error("negative frame length {0}")]
    Negative(i32),
    /// The length is above the limit.
    #[error("frame of {bytes} bytes exceeds the limit of {limit_bytes}")]
    TooLong {
        /// The length announced.
        bytes: usize,
        /// The limit it exceeds.
        limit_bytes: usize,
    },
}
