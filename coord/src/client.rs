//! An asynchronous client for this coordinator and for Apache ZooKeeper.
//!
//! A [`Client`] is a handle to one session and cheap to clone. A task of its own holds the
//! connection: it keeps the session alive, moves it to another server when its own is lost, and
//! sets its watches again there. Requests are answered in the order in which they were made
//! (an `async fn` makes its request when it is first polled), and any number of them may be under
//! way: they are not waited for one by one.
//!
//! ```no_run
//! # async fn example() -> Result<(), unbroken_coord::client::ClientError> {
//! use unbroken_coord::client::{Client, ConnectOptions};
//! use unbroken_coord::wire::{Acl, CreateMode};
//!
//! let client = Client::connect(ConnectOptions::new(["10.0.0.1:2181", "10.0.0.2:2181"])).await?;
//! client.create("/hello", "world", CreateMode::Ephemeral, Acl::open()).await?;
//! let (data, stat, changed) = client.get_and_watch("/hello").await?;
//! assert_eq!(data, "world");
//! client.set("/hello", "you", stat.version).await?;
//! println!("{:?}", changed.await?);
//! client.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # When the connection is lost
//!
//! Requests under way fail with [`ClientError::ConnectionLoss`], because nobody knows whether a
//! write among them was done; new ones wait for the next connection. One-shot watches tell after
//! the reconnection what they missed; persistent ones ([`Client::watch`]) say that they have missed
//! something. Identities ([`Client::authenticate`]) are proven anew before anything else is asked.
//!
//! # When the session may be lost
//!
//! That a session has expired is certain only when a server says so ([`SessionState::Expired`]),
//! which takes a connection. That it *may* have expired is known without: [`Client::lease`] tells
//! until when it certainly lives, by the local clock, and whoever holds a lock by an ephemeral
//! znode must have stopped by then.

pub mod blocking;
mod connection;
mod dial;
mod error;
mod feed;
mod lease;
mod link;
mod multi;
mod ops;
mod options;
mod session;
#[cfg(test)]
mod tests;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::wire::{
    CreateMode, ErrorCode, REQUEST_BYTES_MAX, Request, Response, encode_request, validate_path,
};
use connection::{Command, Connection, REQUESTS_MAX, Reply, strip_chroot};
use lease::TenureReceiver;
use watches::Watching;

pub use error::ClientError;
pub use lease::{Lease, Standing};
pub use ops::{NewNode, Reconfig};
pub use options::{ConnectOptions, ConnectStringError, Identity};
pub use session::{SessionEvent, SessionEvents, SessionState};
pub use watches::{Notice, WatchEvent, WatchFuture, WatchStream};

/// A handle to a session. When the last clone is dropped the session is closed, too.
#[derive(Clone, Debug)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<SessionState>,
    tenure: TenureReceiver,
    chroot: Arc<str>,
    request_timeout: Option<Duration>,
}

impl Client {
    /// Begins to connect, and returns at once: requests wait for the session.
    ///
    /// # Panics
    /// Outside a tokio runtime, or without a host.
    pub fn start(options: ConnectOptions) -> Self {
        assert!(!options.hosts.is_empty(), "a client needs a server");
        let (commands, receiver) = mpsc::channel(REQUESTS_MAX);
        let (state_sender, state) = watch::channel(SessionState::Disconnected);
        let (tenure_sender, tenure) = lease::tenure();
        let client = Self {
            commands,
            state,
            tenure,
            chroot: options.chroot.as_str().into(),
            request_timeout: options.request_timeout,
        };
        tokio::spawn(Connection::new(options, receiver, state_sender, tenure_sender).run());
        client
    }

    /// Connects, and returns when the session is open.
    ///
    /// # Errors
    /// [`ClientError::NotConnected`] where no server has opened one within the request timeout;
    /// [`ErrorCode::AuthFailed`] where it does not accept an identity of the options.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn connect(options: ConnectOptions) -> Result<Self, ClientError> {
        let client = Self::start(options);
        client.connected().await?;
        Ok(client)
    }

    async fn connected(&self) -> Result<(), ClientError> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| state.is_connected() || state.is_over());
        let settled = match self.request_timeout {
            None => settled.await.map(|state| *state),
            Some(limit) => match timeout(limit, settled).await {
                Ok(settled) => settled.map(|state| *state),
                Err(_) => return Err(ClientError::NotConnected),
            },
        };
        match settled {
            Ok(state) if state.is_connected() => Ok(()),
            Ok(_) => Err(self.ended()),
            Err(_) => Err(ClientError::NotConnected),
        }
    }

    /// The same session with another deadline for each request.
    #[must_use]
    pub fn with_request_timeout(&self, timeout: Option<Duration>) -> Self {
        Self {
            request_timeout: timeout,
            ..self.clone()
        }
    }

    /// How the session is, now and from now on. Short states may be skipped; [`Self::events`] skips
    /// none.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// Everything that happens to the session from now on, in order.
    ///
    /// # Errors
    /// [`ClientError::Closed`], [`ClientError::SessionExpired`] where the client has ended.
    pub async fn events(&self) -> Result<SessionEvents, ClientError> {
        let (sender, feed) = feed::feed();
        self.command(Command::Subscribe(sender)).await?;
        Ok(SessionEvents(feed))
    }

    /// The session, where a server holds it now.
    pub fn session_id(&self) -> Option<i64> {
        match *self.state.borrow() {
            SessionState::Connected { session_id }
            | SessionState::ConnectedReadOnly { session_id } => Some(session_id),
            SessionState::Disconnected
            | SessionState::Expired
            | SessionState::AuthFailed
            | SessionState::Closed => None,
        }
    }

    /// Waits until the quorum has confirmed that the session lives, and tells from then on, by the
    /// local clock, until when it certainly does. While a lease is held the session is confirmed
    /// again and again.
    ///
    /// # Errors
    /// [`ClientError::Timeout`] where the quorum does not confirm it within the request timeout,
    /// [`ClientError::SessionExpired`], [`ClientError::Closed`].
    pub async fn lease(&self) -> Result<Lease, ClientError> {
        let wanted = self.tenure.want();
        let confirmed = async {
            self.command(Command::Confirm).await?;
            self.tenure.certain().await.ok_or_else(|| self.ended())
        };
        let session_id = self.in_time(confirmed).await?;
        Ok(self.tenure.lease(session_id, wanted))
    }

    /// As [`Self::lease`], at once and about this session: the owner of an ephemeral znode, say,
    /// whose creation has just confirmed it.
    pub fn lease_of(&self, session_id: i64) -> Lease {
        let wanted = self.tenure.want();
        // Where the task is busy it will see by itself, before long, that somebody wants to know.
        let _: Result<(), _> = self.commands.try_send(Command::Confirm);
        self.tenure.lease(session_id, wanted)
    }

    /// Proves another identity of the session's holder: for the scheme `digest`,
    /// `user:password`. It is kept, and proven anew on each connection before anything else is
    /// asked; should a server not accept it any more, the client ends with
    /// [`SessionState::AuthFailed`].
    ///
    /// # Errors
    /// [`ErrorCode::AuthFailed`]; the identity is then forgotten, and the server closes the
    /// connection, which the session survives.
    pub async fn authenticate(&self, identity: Identity) -> Result<(), ClientError> {
        let (reply, answered) = oneshot::channel();
        let proof = async {
            self.command(Command::Auth { identity, reply }).await?;
            answer(answered).await
        };
        self.in_time(proof).await.map(drop)
    }

    /// Closes the session: its ephemeral znodes are gone when this returns.
    ///
    /// # Errors
    /// [`ClientError::NotConnected`] where there is no server to tell: the session then lasts
    /// until its timeout.
    pub async fn close(&self) -> Result<(), ClientError> {
        let (reply, answered) = oneshot::channel();
        let closing = async {
            if self.commands.send(Command::Close { reply }).await.is_err() {
                return Ok(Response::Empty);
            }
            answer(answered).await
        };
        match self.in_time(closing).await {
            // The server may hang up before its answer is read.
            Ok(_) | Err(ClientError::Closed) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sends one request, the chroot already in its paths.
    async fn call(&self, request: Request) -> Reply {
        self.call_and_watch(request, None).await
    }

    async fn call_and_watch(
        &self,
        request: Request,
        watching: Option<(String, Watching)>,
    ) -> Reply {
        self.in_time(async { answer(self.issue(request, watching).await?).await })
            .await
    }

    async fn issue(
        &self,
        request: Request,
        watching: Option<(String, Watching)>,
    ) -> Result<oneshot::Receiver<Reply>, ClientError> {
        let frame_xid_zero = encode_request(0, &request);
        let bytes = frame_xid_zero.len() - 4;
        if bytes > REQUEST_BYTES_MAX {
            return Err(ClientError::TooLarge { bytes });
        }
        let (reply, answered) = oneshot::channel();
        let confirms = request.is_write() || matches!(request, Request::Sync { .. });
        self.command(Command::Request {
            frame_xid_zero,
            op: request.op(),
            confirms,
            watching,
            reply,
        })
        .await?;
        Ok(answered)
    }

    async fn command(&self, command: Command) -> Result<(), ClientError> {
        self.commands.send(command).await.map_err(|_| self.ended())
    }

    async fn in_time<T>(
        &self,
        reply: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        match self.request_timeout {
            None => reply.await,
            Some(limit) => timeout(limit, reply)
                .await
                .unwrap_or(Err(ClientError::Timeout)),
        }
    }

    /// Why the task no longer takes requests.
    fn ended(&self) -> ClientError {
        match *self.state.borrow() {
            SessionState::Expired => ClientError::SessionExpired,
            SessionState::AuthFailed => ClientError::Zk(ErrorCode::AuthFailed),
            SessionState::Closed
            | SessionState::Disconnected
            | SessionState::Connected { .. }
            | SessionState::ConnectedReadOnly { .. } => ClientError::Closed,
        }
    }

    /// The path as the server knows it.
    fn full(&self, path: &str) -> Result<String, ClientError> {
        validate_path(path)?;
        Ok(match (&*self.chroot, path) {
            ("", path) => path.to_owned(),
            (chroot, "/") => chroot.to_owned(),
            (chroot, path) => format!("{chroot}{path}"),
        })
    }

    /// As [`Self::full`], for a name that a counter may complete.
    fn full_to_create(&self, path: &str, mode: CreateMode) -> Result<String, ClientError> {
        if mode.is_sequential() {
            validate_path(&format!("{path}1"))?;
            Ok(format!("{}{path}", self.chroot))
        } else {
            self.full(path)
        }
    }

    /// A path of the server's as the caller knows it.
    fn local(&self, path: &str) -> String {
        strip_chroot(&self.chroot, path).to_owned()
    }
}

async fn answer(answered: oneshot::Receiver<Reply>) -> Reply {
    // The task ends only after it has answered everyone; a panic in it is the exception.
    answered.await.unwrap_or(Err(ClientError::Closed))
}
