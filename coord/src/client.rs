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

mod connection;
mod dial;
mod error;
mod options;
#[cfg(test)]
mod tests;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::wire::{
    Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, REQUEST_BYTES_MAX, Request,
    Response, Stat, encode_request, validate_path,
};
use connection::{Command, Connection, REQUESTS_MAX, Reply, strip_chroot};
use watches::Watcher;

pub use error::ClientError;
pub use options::{ConnectOptions, ConnectStringError};
pub use watches::{WatchEvent, WatchFuture};

/// How the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// A server holds the session.
    Connected {
        /// The session; another than before where an expired one was renewed.
        session_id: i64,
    },
    /// No connection, and the session (where there was one) may live or not. Requests wait.
    Disconnected,
    /// The session is gone.
    Expired,
    /// The client was closed.
    Closed,
}

/// A handle to a session. When the last clone is dropped the session is closed, too.
#[derive(Clone, Debug)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<SessionState>,
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
        let client = Self {
            commands,
            state,
            chroot: options.chroot.as_str().into(),
            request_timeout: options.request_timeout,
        };
        tokio::spawn(Connection::new(options, receiver, state_sender).run());
        client
    }

    /// Connects, and returns when the session is open.
    ///
    /// # Errors
    /// [`ClientError::NotConnected`] where no server has opened one within the request timeout.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn connect(options: ConnectOptions) -> Result<Self, ClientError> {
        let client = Self::start(options);
        let mut state = client.state.clone();
        let connected = state.wait_for(|state| matches!(state, SessionState::Connected { .. }));
        let connected = match client.request_timeout {
            None => connected.await.map(drop),
            Some(limit) => match timeout(limit, connected).await {
                Ok(connected) => connected.map(drop),
                Err(_) => return Err(ClientError::NotConnected),
            },
        };
        connected.map_err(|_| ClientError::NotConnected)?;
        Ok(client)
    }

    /// The same session with another deadline for each request.
    #[must_use]
    pub fn with_request_timeout(&self, timeout: Option<Duration>) -> Self {
        Self {
            request_timeout: timeout,
            ..self.clone()
        }
    }

    /// How the session is, now and from now on. Short states may be skipped.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// The session, where a server holds it now.
    pub fn session_id(&self) -> Option<i64> {
        match *self.state.borrow() {
            SessionState::Connected { session_id } => Some(session_id),
            SessionState::Disconnected | SessionState::Expired | SessionState::Closed => None,
        }
    }

    /// Creates a znode; gives its path, which differs from `path` for a sequential one.
    ///
    /// # Errors
    /// [`ErrorCode::NodeExists`], [`ErrorCode::NoNode`] (its parent),
    /// [`ErrorCode::NoChildrenForEphemerals`], ...
    pub async fn create(
        &self,
        path: &str,
        data: impl Into<Bytes>,
        mode: CreateMode,
        acl: Vec<Acl>,
    ) -> Result<String, ClientError> {
        let op = match mode {
            CreateMode::Container => CreateOp::Container,
            _ => CreateOp::Create,
        };
        let path = self.full_to_create(path, mode)?;
        let data = Some(data.into());
        let request = Request::Create {
            op,
            path,
            data,
            acl,
            flags: mode.flags(),
        };
        match self.call(request).await? {
            Response::Created { path } | Response::Created2 { path, .. } => {
                Ok(strip_chroot(&self.chroot, &path).to_owned())
            }
            _ => Err(ClientError::Protocol),
        }
    }

    /// Deletes a znode without children. `version` -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], [`ErrorCode::NotEmpty`], ...
    pub async fn delete(&self, path: &str, version: i32) -> Result<(), ClientError> {
        self.call(Request::Delete {
            path: self.full(path)?,
            version,
        })
        .await
        .map(drop)
    }

    /// The znode's metadata, `None` where there is none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn exists(&self, path: &str) -> Result<Option<Stat>, ClientError> {
        let request = Request::Exists {
            path: self.full(path)?,
            watch: false,
        };
        found(self.call(request).await)
    }

    /// As [`Self::exists`]; the future resolves when the znode is created, changed or deleted.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn exists_and_watch(
        &self,
        path: &str,
    ) -> Result<(Option<Stat>, WatchFuture), ClientError> {
        let path = self.full(path)?;
        let (watcher, changed) = WatchFuture::channel();
        let request = Request::Exists {
            path: path.clone(),
            watch: true,
        };
        let stat = found(self.call_and_watch(request, Some((path, watcher))).await)?;
        Ok((stat, changed))
    }

    /// The znode's data and metadata. Null data reads as empty.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn get(&self, path: &str) -> Result<(Bytes, Stat), ClientError> {
        let request = Request::GetData {
            path: self.full(path)?,
            watch: false,
        };
        data(self.call(request).await?)
    }

    /// As [`Self::get`]; the future resolves when the znode is changed or deleted.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...; no watch is set then.
    pub async fn get_and_watch(
        &self,
        path: &str,
    ) -> Result<(Bytes, Stat, WatchFuture), ClientError> {
        let path = self.full(path)?;
        let (watcher, changed) = WatchFuture::channel();
        let request = Request::GetData {
            path: path.clone(),
            watch: true,
        };
        let (bytes, stat) = data(self.call_and_watch(request, Some((path, watcher))).await?)?;
        Ok((bytes, stat, changed))
    }

    /// A linearizable read: [`Self::sync`] and [`Self::get`] sent together, so that it costs one
    /// round trip. On Apache ZooKeeper `sync` is not a quorum operation, and a read after it may
    /// be stale: there, write first.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn sync_and_get(&self, path: &str) -> Result<(Bytes, Stat), ClientError> {
        let path = self.full(path)?;
        let sync = self.issue(Request::Sync { path: path.clone() }, None);
        let get = self.issue(Request::GetData { path, watch: false }, None);
        let both = async {
            let (sync, get) = (sync.await?, get.await?);
            answer(sync).await?;
            answer(get).await
        };
        data(self.in_time(both).await?)
    }

    /// Sets the znode's data; gives its new metadata. `version` -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], ...
    pub async fn set(
        &self,
        path: &str,
        data: impl Into<Bytes>,
        version: i32,
    ) -> Result<Stat, ClientError> {
        let request = Request::SetData {
            path: self.full(path)?,
            data: Some(data.into()),
            version,
        };
        match self.call(request).await? {
            Response::Stat(stat) => Ok(stat),
            _ => Err(ClientError::Protocol),
        }
    }

    /// The names of the znode's children, in no particular order.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn children(&self, path: &str) -> Result<Vec<String>, ClientError> {
        let request = Request::GetChildren {
            path: self.full(path)?,
            watch: false,
        };
        match self.call(request).await? {
            Response::Children(children) => Ok(children),
            _ => Err(ClientError::Protocol),
        }
    }

    /// The names of the znode's children, and its metadata.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn children2(&self, path: &str) -> Result<(Vec<String>, Stat), ClientError> {
        let request = Request::GetChildren2 {
            path: self.full(path)?,
            watch: false,
        };
        children2(self.call(request).await?)
    }

    /// As [`Self::children2`]; the future resolves when a child is created or deleted, or the
    /// znode itself is deleted.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...; no watch is set then.
    pub async fn children_and_watch(
        &self,
        path: &str,
    ) -> Result<(Vec<String>, Stat, WatchFuture), ClientError> {
        let path = self.full(path)?;
        let (watcher, changed) = WatchFuture::channel();
        let request = Request::GetChildren2 {
            path: path.clone(),
            watch: true,
        };
        let answer = self.call_and_watch(request, Some((path, watcher))).await?;
        let (children, stat) = children2(answer)?;
        Ok((children, stat, changed))
    }

    /// Returns when the session's server has all that was committed before the call, so that
    /// later reads are no older. (On Apache ZooKeeper, see [`Self::sync_and_get`].)
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn sync(&self, path: &str) -> Result<(), ClientError> {
        self.call(Request::Sync {
            path: self.full(path)?,
        })
        .await
        .map(drop)
    }

    /// Fails unless the znode has this version; -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], ...
    pub async fn check(&self, path: &str, version: i32) -> Result<(), ClientError> {
        // A check by itself is not spoken by every server; a multi of one is.
        self.multi(vec![MultiOp::Check {
            path: path.to_owned(),
            version,
        }])
        .await
        .map(drop)
    }

    /// Does all of these in one step, or none. Gives their results in order.
    ///
    /// # Errors
    /// [`ClientError::Multi`] says which operation is at fault.
    pub async fn multi(&self, mut ops: Vec<MultiOp>) -> Result<Vec<MultiResult>, ClientError> {
        for op in &mut ops {
            match op {
                MultiOp::Create { path, flags, .. } => {
                    let mode = CreateMode::from_flags(*flags).map_err(ClientError::Zk)?;
                    *path = self.full_to_create(path, mode)?;
                }
                MultiOp::Delete { path, .. }
                | MultiOp::SetData { path, .. }
                | MultiOp::Check { path, .. } => *path = self.full(path)?,
            }
        }
        let Response::Multi(mut results) = self.call(Request::Multi(ops)).await? else {
            return Err(ClientError::Protocol);
        };
        // Before the fault stand errors without a code, after it runtime inconsistencies.
        let fault = results.iter().position(|result| {
            matches!(result, MultiResult::Error(Some(code))
                if *code != ErrorCode::RuntimeInconsistency)
        });
        if let Some(index) = fault
            && let MultiResult::Error(Some(code)) = results[index]
        {
            return Err(ClientError::Multi { index, code });
        }
        for result in &mut results {
            match result {
                MultiResult::Created { path } | MultiResult::Created2 { path, .. } => {
                    *path = strip_chroot(&self.chroot, path).to_owned();
                }
                MultiResult::Deleted | MultiResult::Set(_) | MultiResult::Checked => {}
                MultiResult::Error(_) => return Err(ClientError::Protocol),
            }
        }
        Ok(results)
    }

    /// The znode's access control list and metadata.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn acl(&self, path: &str) -> Result<(Vec<Acl>, Stat), ClientError> {
        match self
            .call(Request::GetAcl {
                path: self.full(path)?,
            })
            .await?
        {
            Response::Acl { acl, stat } => Ok((acl, stat)),
            _ => Err(ClientError::Protocol),
        }
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

    async fn call_and_watch(&self, request: Request, watch: Option<(String, Watcher)>) -> Reply {
        self.in_time(async { answer(self.issue(request, watch).await?).await })
            .await
    }

    async fn issue(
        &self,
        request: Request,
        watch: Option<(String, Watcher)>,
    ) -> Result<oneshot::Receiver<Reply>, ClientError> {
        let frame_xid_zero = encode_request(0, &request);
        let bytes = frame_xid_zero.len() - 4;
        if bytes > REQUEST_BYTES_MAX {
            return Err(ClientError::TooLarge { bytes });
        }
        let (reply, answered) = oneshot::channel();
        let command = Command::Request {
            frame_xid_zero,
            op: request.op(),
            watch,
            reply,
        };
        match self.commands.send(command).await {
            Ok(()) => Ok(answered),
            Err(_) => Err(self.ended()),
        }
    }

    async fn in_time(&self, reply: impl Future<Output = Reply>) -> Reply {
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
            SessionState::Closed | SessionState::Disconnected | SessionState::Connected { .. } => {
                ClientError::Closed
            }
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
}

async fn answer(answered: oneshot::Receiver<Reply>) -> Reply {
    // The task ends only after it has answered everyone; a panic in it is the exception.
    answered.await.unwrap_or(Err(ClientError::Closed))
}

fn found(reply: Reply) -> Result<Option<Stat>, ClientError> {
    match reply {
        Ok(Response::Stat(stat)) => Ok(Some(stat)),
        Ok(_) => Err(ClientError::Protocol),
        Err(ClientError::Zk(ErrorCode::NoNode)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn data(response: Response) -> Result<(Bytes, Stat), ClientError> {
    match response {
        Response::Data { data, stat } => Ok((data.unwrap_or_default(), stat)),
        _ => Err(ClientError::Protocol),
    }
}

fn children2(response: Response) -> Result<(Vec<String>, Stat), ClientError> {
    match response {
        Response::Children2 { children, stat } => Ok((children, stat)),
        _ => Err(ClientError::Protocol),
    }
}
