//! What a request can end in.

use thiserror::Error;

use crate::wire::{ErrorCode, PathError};

/// Why a request did not succeed.
///
/// Of a write that ended in [`Self::ConnectionLoss`] or [`Self::Timeout`] nobody knows whether it
/// was done: read again before repeating it. Every other error means that it was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The server answered with an error.
    #[error("{0}")]
    Zk(ErrorCode),
    /// A multi failed, and nothing of it was done.
    #[error("operation {index} of the multi: {code}")]
    Multi {
        /// The operation at fault, counted from 0.
        index: usize,
        /// What is wrong with it.
        code: ErrorCode,
    },
    /// The connection ended after the request was sent and before it was answered. The outcome
    /// is unknown.
    #[error("connection lost, the outcome is unknown")]
    ConnectionLoss,
    /// The deadline passed; the request may have been sent. The outcome is unknown.
    #[error("no answer in time, the outcome is unknown")]
    Timeout,
    /// The session has expired: its ephemeral znodes and watches are gone. Of requests that were
    /// under way the outcome is unknown.
    #[error("session expired")]
    SessionExpired,
    /// The client was closed.
    #[error("client closed")]
    Closed,
    /// No server answered within the time that was given for it.
    #[error("no server answered")]
    NotConnected,
    /// The path is not valid; nothing was sent.
    #[error("{0}")]
    BadPath(#[from] PathError),
    /// The request is larger than a server takes; nothing was sent.
    #[error("request of {bytes} bytes exceeds the limit")]
    TooLarge {
        /// Its size in bytes.
        bytes: usize,
    },
    /// The server's answer does not fit the request.
    #[error("the server does not speak the protocol")]
    Protocol,
}

impl ClientError {
    /// The server's error code, where it gave one.
    pub const fn code(self) -> Option<ErrorCode> {
        match self {
            Self::Zk(code) | Self::Multi { code, .. } => Some(code),
            Self::ConnectionLoss
            | Self::Timeout
            | Self::SessionExpired
            | Self::Closed
            | Self::NotConnected
            | Self::BadPath(_)
            | Self::TooLarge { .. }
            | Self::Protocol => None,
        }
    }

    /// Whether a write that ended so may have been done.
    pub const fn outcome_unknown(self) -> bool {
        matches!(
            self,
            Self::ConnectionLoss | Self::Timeout | Self::SessionExpired | Self::Protocol
        )
    }
}
