//! The session as its client knows it, and what it tells of itself.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;

use super::feed::Feed;
use super::{ConnectOptions, WatchEvent};
use crate::wire::{ConnectRequest, ConnectResponse, PASSWORD_BYTES};

/// How the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionState {
    /// A server holds the session.
    Connected {
        /// The session; another than before where an expired one was renewed.
        session_id: i64,
    },
    /// A server that is cut off from the quorum answers reads, which may be stale; it refuses
    /// writes. Only with [`ConnectOptions::read_only`]. The client looks for a better server
    /// meanwhile.
    ConnectedReadOnly {
        /// The session, or the server's name for this connection where there was none before.
        session_id: i64,
    },
    /// No connection, and the session (where there was one) may live or not. Requests wait.
    Disconnected,
    /// The session is gone: a server has said so.
    Expired,
    /// A server does not accept an identity any more that it accepted before. The client has
    /// ended, and leaves the session to its timeout.
    AuthFailed,
    /// The client was closed.
    Closed,
}

impl SessionState {
    /// Whether the client has ended for good, if it does not renew sessions.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Expired | Self::AuthFailed | Self::Closed)
    }

    /// Whether requests are being answered, reads at least.
    #[must_use]
    pub const fn is_connected(self) -> bool {
        matches!(
            self,
            Self::Connected { .. } | Self::ConnectedReadOnly { .. }
        )
    }
}

/// One thing that happened to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionEvent {
    /// The session is in another state from now on.
    State(SessionState),
    /// A watch of this client saw something (also told to whoever set it).
    Watch(WatchEvent),
    /// More was not read in time than is kept: what came before is lost.
    Missed,
}

/// All that happens to a session, in order: changes of state and watch events. Ends with the
/// client.
#[derive(Debug)]
pub struct SessionEvents(pub(super) Feed<SessionEvent>);

impl SessionEvents {
    /// The next event; `None` once the client has ended. May be dropped and called again: nothing
    /// is lost.
    pub async fn next(&mut self) -> Option<SessionEvent> {
        poll_fn(|cx| self.0.poll_next(cx)).await
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<SessionEvent> {
        self.0.try_next()
    }
}

impl Stream for SessionEvents {
    type Item = SessionEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next(cx)
    }
}

/// A session id as ZooKeeper's tools print it.
pub(super) struct Hex(pub(super) i64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

pub(super) struct Session {
    /// 0 until one is open.
    pub(super) id: i64,
    password: Bytes,
    /// As granted.
    pub(super) timeout: Duration,
    pub(super) last_zxid: i64,
    /// The server that holds it now is cut off from the quorum.
    pub(super) read_only: bool,
}

impl Session {
    pub(super) fn fresh(options: &ConnectOptions) -> Self {
        Self {
            id: 0,
            password: Bytes::from_static(&[0; PASSWORD_BYTES]),
            timeout: options.session_timeout,
            last_zxid: 0,
            read_only: false,
        }
    }

    pub(super) fn hello(&self, options: &ConnectOptions) -> ConnectRequest {
        ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: self.last_zxid,
            timeout_ms: i32::try_from(options.session_timeout.as_millis()).unwrap_or(i32::MAX),
            session_id: self.id,
            password: Some(self.password.clone()),
            read_only: Some(options.read_only),
        }
    }

    /// Gives the id to show.
    pub(super) fn granted(&mut self, answer: ConnectResponse) -> i64 {
        self.read_only = answer.read_only == Some(true);
        let timeout_ms = u64::try_from(answer.timeout_ms).unwrap_or(0);
        self.timeout = Duration::from_millis(timeout_ms);
        // What a server without a quorum grants, the quorum knows nothing of.
        if !self.read_only {
            self.id = answer.session_id;
            self.password = answer.password.unwrap_or_default();
        }
        if self.id == 0 {
            answer.session_id
        } else {
            self.id
        }
    }
}
