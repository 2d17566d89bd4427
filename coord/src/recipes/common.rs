//! What the recipes share: where they live, and how a request gets through.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tracing::warn;

use super::session::is_current;
use crate::client::{Client, ClientError};
use crate::wire::{Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, Stat};

/// The pause before a request is repeated that a server refused for the time being.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);

/// Repeats a request that may be done twice without harm, until its outcome is known.
///
/// The client must not have a request timeout (see [`Place`]); each attempt waits for a connection.
pub(crate) async fn repeat<T, F>(mut request: impl FnMut() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    loop {
        match request().await {
            Err(ClientError::ConnectionLoss | ClientError::Timeout) => {}
            // The server is up, and has no quorum or too much to do.
            Err(ClientError::Zk(
                ErrorCode::ConnectionLoss | ErrorCode::OperationTimeout | ErrorCode::Throttled,
            )) => tokio::time::sleep(REFUSED_PAUSE).await,
            outcome => return outcome,
        }
    }
}

/// Whether a request was done cannot be told from its answer.
pub(crate) const fn unknown(error: ClientError) -> bool {
    matches!(
        error,
        ClientError::ConnectionLoss
            | ClientError::Timeout
            | ClientError::Zk(ErrorCode::ConnectionLoss | ErrorCode::OperationTimeout)
    )
}

/// The code of an error, where it was a server's.
pub(crate) fn code<T>(result: &Result<T, ClientError>) -> Option<ErrorCode> {
    result.as_ref().err().and_then(|error| error.code())
}

/// A random name that finds what was created again when the answer was lost: a version 4 UUID, as
/// Curator uses it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guid([u8; 16]);

impl Guid {
    /// A new one.
    pub(crate) fn new() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the operating system has random bytes");
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a recipe lives: a znode, and the session that works there.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Waits as long as it takes: it has no request timeout.
    pub(crate) client: Client,
    /// The znode; empty for the root.
    dir: Arc<str>,
    /// The access control list of what is created there.
    pub(crate) acl: Vec<Acl>,
}

impl Place {
    /// Everybody may do everything there, until [`Self::acl`] is set.
    pub(crate) fn new(client: &Client, dir: &str) -> Self {
        Self {
            client: client.with_request_timeout(None),
            dir: dir.trim_end_matches('/').into(),
            acl: Acl::open(),
        }
    }

    /// The znode.
    pub(crate) fn dir(&self) -> &str {
        if self.dir.is_empty() { "/" } else { &self.dir }
    }

    /// Waits a little after the server has shed a request.
    pub(crate) async fn pause_refused(&self) {
        tokio::time::sleep(REFUSED_PAUSE).await;
    }

    /// The znode of this name below.
    pub(crate) fn child(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// The same one level deeper.
    pub(crate) fn below(&self, name: &str) -> Self {
        Self {
            dir: self.child(name).into(),
            ..self.clone()
        }
    }

    /// Creates the znode and those above it, where they are missing. The last one is a container
    /// where the server has those: it goes some time after its last child.
    pub(crate) async fn ensure(&self) -> Result<(), ClientError> {
        ensure(&self.client, &self.dir, &self.acl).await
    }

    /// As [`Self::ensure`], but the znode stays.
    pub(crate) async fn ensure_persistent(&self) -> Result<(), ClientError> {
        ensure_as(&self.client, &self.dir, &self.acl, CreateMode::Persistent).await
    }

    /// The names of the children, none where there is no such znode.
    pub(crate) async fn children(&self) -> Result<Vec<String>, ClientError> {
        let children = repeat(|| self.client.children(self.dir())).await;
        match code(&children) {
            Some(ErrorCode::NoNode) => Ok(Vec::new()),
            _ => children,
        }
    }

    /// The operation that creates a znode of this name here; its result is
    /// [`MultiResult::Created2`].
    pub(crate) fn create_op(&self, name: &str, data: &Bytes, mode: CreateMode) -> MultiOp {
        MultiOp::Create {
            op: CreateOp::Create2,
            path: self.child(name),
            data: Some(data.clone()),
            acl: self.acl.clone(),
            flags: mode.flags(),
        }
    }
}

/// Creates `path` and what is above it. See [`Place::ensure`].
pub(crate) async fn ensure(client: &Client, path: &str, acl: &[Acl]) -> Result<(), ClientError> {
    match ensure_as(client, path, acl, CreateMode::Container).await {
        // Before ZooKeeper 3.5.
        Err(ClientError::Zk(ErrorCode::Unimplemented)) => {
            ensure_as(client, path, acl, CreateMode::Persistent).await
        }
        outcome => outcome,
    }
}

async fn ensure_as(
    client: &Client,
    path: &str,
    acl: &[Acl],
    mode: CreateMode,
) -> Result<(), ClientError> {
    if path.is_empty() {
        return Ok(());
    }
    let create = |path: String, mode| {
        let acl = acl.to_vec();
        async move {
            let created = repeat(|| client.create(&path, "", mode, acl.clone())).await;
            match code(&created) {
                Some(ErrorCode::NodeExists) => Ok(()),
                _ => created.map(drop),
            }
        }
    };
    match create(path.to_owned(), mode).await {
        Err(ClientError::Zk(ErrorCode::NoNode)) => {}
        outcome => return outcome,
    }
    for (slash, _) in path.match_indices('/').skip(1) {
        create(path[..slash].to_owned(), CreateMode::Persistent).await?;
    }
    create(path.to_owned(), mode).await
}

/// What was created, as far as it is known here; deletes it when it is dropped.
///
/// Deleting is repeated in the background until it has succeeded or the session is over, which
/// deletes what is ephemeral.
#[derive(Debug)]
pub(crate) struct Cleanup {
    place: Place,
    what: What,
    runtime: Handle,
}

#[derive(Debug)]
enum What {
    Nothing,
    /// Whatever bears this mark in its name; nobody knows what was created.
    Marked(String),
    /// Exactly these, whose names nobody else ever has.
    Paths(Vec<String>),
    /// The znode of a name that others may have after us, if it is ours.
    Node(String, Ours),
}

/// By what we know a znode for ours whose name says nothing.
#[derive(Debug)]
enum Ours {
    Czxid(i64),
    Data(Bytes),
    Session,
}

impl Cleanup {
    fn new(place: &Place, what: What) -> Self {
        Self {
            place: place.clone(),
            what,
            runtime: Handle::current(),
        }
    }

    /// Of everything at this place that has `mark` in its name.
    pub(crate) fn marked(place: &Place, mark: String) -> Self {
        Self::new(place, What::Marked(mark))
    }

    /// Of a znode whose name is unique.
    pub(crate) fn path(place: &Place, path: String) -> Self {
        Self::new(place, What::Paths(vec![path]))
    }

    /// Of this znode, if our session owns it.
    pub(crate) fn owned(place: &Place, path: String) -> Self {
        Self::new(place, What::Node(path, Ours::Session))
    }

    /// Of this znode, if it holds this data.
    pub(crate) fn holding(place: &Place, path: String, data: Bytes) -> Self {
        Self::new(place, What::Node(path, Ours::Data(data)))
    }

    /// From now on exactly these paths are to be deleted; their names are unique.
    pub(crate) fn set_paths(&mut self, paths: Vec<String>) {
        self.what = What::Paths(paths);
    }

    /// From now on the znode is to be deleted that was created by this zxid.
    pub(crate) fn set_node(&mut self, path: String, czxid: i64) {
        self.what = What::Node(path, Ours::Czxid(czxid));
    }

    /// There is nothing to delete any more.
    pub(crate) fn disarm(&mut self) {
        self.what = What::Nothing;
    }

    /// There was nothing to delete.
    pub(crate) fn forget(mut self) {
        self.disarm();
    }

    /// Deletes now, and returns when all of it is gone. Where this is not waited for to its end,
    /// the background does it. Gives the number of znodes that were there.
    pub(crate) async fn finish(mut self) -> Result<usize, ClientError> {
        let deleted = delete(&self.place, &self.what).await?;
        self.disarm();
        Ok(deleted)
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        let what = std::mem::replace(&mut self.what, What::Nothing);
        if matches!(what, What::Nothing) {
            return;
        }
        let place = self.place.clone();
        // A runtime that shuts down drops the task, and with it the last handle to the session.
        self.runtime.spawn(async move {
            match delete(&place, &what).await {
                // The session's end deletes them, or there is no server to tell.
                Ok(_) | Err(ClientError::SessionExpired | ClientError::Closed) => {}
                Err(error) => warn!(dir = place.dir(), %error, "znodes left behind"),
            }
        });
    }
}

async fn delete(place: &Place, what: &What) -> Result<usize, ClientError> {
    match what {
        What::Nothing => Ok(0),
        What::Paths(paths) => delete_all(place, paths).await,
        What::Marked(mark) => {
            // The connection that carried the create may have been lost; what it did is committed
            // by now or never will be, and `sync` shows it.
            repeat(|| place.client.sync(place.dir())).await?;
            let children = place.children().await?;
            let marked = children.iter().filter(|name| name.contains(mark));
            let paths: Vec<String> = marked.map(|name| place.child(name)).collect();
            delete_all(place, &paths).await
        }
        What::Node(path, ours) => delete_ours(place, path, ours).await,
    }
}

async fn delete_all(place: &Place, paths: &[String]) -> Result<usize, ClientError> {
    let mut deleted = 0;
    for path in paths {
        let mut in_doubt = false;
        deleted += loop {
            match place.client.delete(path, -1).await {
                Ok(()) => break 1,
                // Our own first attempt has done it.
                Err(ClientError::Zk(ErrorCode::NoNode)) => break usize::from(in_doubt),
                Err(error) if unknown(error) => in_doubt = true,
                Err(ClientError::Zk(ErrorCode::Throttled)) => place.pause_refused().await,
                Err(error) => return Err(error),
            }
        };
    }
    Ok(deleted)
}

async fn delete_ours(place: &Place, path: &str, ours: &Ours) -> Result<usize, ClientError> {
    let mut in_doubt = false;
    loop {
        // It is looked at before each attempt: after one that was done, somebody else may have the
        // name.
        if in_doubt || !matches!(ours, Ours::Czxid(_)) {
            repeat(|| place.client.sync(path)).await?;
        }
        let got = repeat(|| place.client.get(path)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(usize::from(in_doubt));
        }
        let (data, stat) = got?;
        let is_ours = match ours {
            Ours::Czxid(czxid) => stat.czxid == *czxid,
            Ours::Data(mine) => data == mine,
            Ours::Session => is_current(&place.client, stat.ephemeral_owner).await?,
        };
        if !is_ours {
            return Ok(usize::from(in_doubt));
        }
        match place.client.delete(path, -1).await {
            Ok(()) => return Ok(1),
            Err(ClientError::Zk(ErrorCode::NoNode)) => {}
            Err(error) if unknown(error) => in_doubt = true,
            Err(ClientError::Zk(ErrorCode::Throttled)) => place.pause_refused().await,
            Err(error) => return Err(error),
        }
    }
}

/// A znode that was created here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Created {
    /// Its name, without the directory.
    pub(crate) name: String,
    /// Its metadata when it was created: `ephemeral_owner` is the session that did it.
    pub(crate) stat: Stat,
}

/// The only result of a multi with one create2.
pub(crate) fn created(place: &Place, result: &MultiResult) -> Result<Created, ClientError> {
    match result {
        MultiResult::Created2 { path, stat, .. } => Ok(Created {
            name: path
                .strip_prefix(&*place.dir)
                .and_then(|rest| rest.strip_prefix('/'))
                .ok_or(ClientError::Protocol)?
                .to_owned(),
            stat: *stat,
        }),
        _ => Err(ClientError::Protocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_look_like_javas() {
        let text = Guid::new().to_string();
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(&text[14..15], "4");
        assert!("89ab".contains(&text[19..20]), "{text}");
        assert_ne!(text, Guid::new().to_string());
    }
}
