//! What the recipes on persistent znodes share: requests that are repeated until their outcome is
//! known, ids, and paths.

use bytes::Bytes;

use super::common::{self, Guid};
use crate::client::{Client, ClientError, SessionState};
use crate::wire::{
    Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, Stat, parent, validate_path,
};

/// A client, and what the znodes that a recipe creates are like.
///
/// Its requests are those whose repetition does no harm. They are repeated when the connection
/// was lost under way, and on the session that follows an expired one, where the client opens one.
#[derive(Clone, Debug)]
pub(super) struct Znodes {
    pub(super) client: Client,
    pub(super) acl: Vec<Acl>,
}

impl Znodes {
    pub(super) fn new(client: &Client) -> Self {
        Self {
            client: client.with_request_timeout(None),
            acl: Acl::open(),
        }
    }

    /// Repeats `request` until its outcome is known.
    pub(super) async fn repeat<T, F>(
        &self,
        mut request: impl FnMut() -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        loop {
            match common::repeat(&mut request).await {
                Err(ClientError::SessionExpired) => self.session().await?,
                outcome => return outcome,
            }
        }
    }

    /// Waits for a session.
    ///
    /// # Errors
    /// [`ClientError::SessionExpired`] or [`ClientError::Closed`] where there will be none.
    pub(super) async fn session(&self) -> Result<(), ClientError> {
        let mut state = self.client.state();
        let connected = |state: &SessionState| matches!(state, SessionState::Connected { .. });
        if state.wait_for(connected).await.is_ok() {
            return Ok(());
        }
        Err(match *state.borrow() {
            SessionState::Closed => ClientError::Closed,
            _ => ClientError::SessionExpired,
        })
    }

    /// Creates a persistent znode. Whether it was there already is not told: after a lost
    /// connection nobody could say.
    pub(super) async fn create(&self, path: &str, data: &Bytes) -> Result<(), ClientError> {
        let create = || {
            self.client
                .create(path, data.clone(), CreateMode::Persistent, self.acl.clone())
        };
        match self.repeat(create).await {
            Ok(_) | Err(ClientError::Zk(ErrorCode::NodeExists)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sees to it that there is a persistent znode, and above it all it needs. A new one is empty.
    pub(super) async fn ensure(&self, path: &str) -> Result<(), ClientError> {
        validate_path(path)?;
        let empty = Bytes::new();
        match self.create(path, &empty).await {
            Err(ClientError::Zk(ErrorCode::NoNode)) => {}
            outcome => return outcome,
        }
        for (end, _) in path.match_indices('/').skip(1) {
            self.create(&path[..end], &empty).await?;
        }
        self.create(path, &empty).await
    }

    /// The znode's data and metadata, `None` where there is none.
    pub(super) async fn get(&self, path: &str) -> Result<Option<(Bytes, Stat)>, ClientError> {
        present(self.repeat(|| self.client.get(path)).await)
    }

    /// As [`Self::get`], with all that was acknowledged before the call.
    pub(super) async fn get_newest(
        &self,
        path: &str,
    ) -> Result<Option<(Bytes, Stat)>, ClientError> {
        present(self.repeat(|| self.client.sync_and_get(path)).await)
    }

    /// The names of the znode's children, sorted; empty where there is no such znode.
    pub(super) async fn children(&self, path: &str) -> Result<Vec<String>, ClientError> {
        let children = present(self.repeat(|| self.client.children(path)).await)?;
        let mut children = children.unwrap_or_default();
        children.sort_unstable();
        Ok(children)
    }

    /// Deletes a znode where it exists.
    pub(super) async fn delete(&self, path: &str) -> Result<(), ClientError> {
        present(self.repeat(|| self.client.delete(path, -1)).await).map(drop)
    }

    /// Does `ops` in one step and exactly once, however often the connection is lost: the same
    /// step creates the ephemeral znode `marker`, which tells a repetition that it was done. Its
    /// parent is created where it is missing, and the marker is deleted afterwards.
    ///
    /// Gives the results, or `None` where they were lost with a connection.
    ///
    /// # Errors
    /// [`ClientError::Multi`] with an index into `ops`. After [`ClientError::SessionExpired`] the
    /// outcome is unknown.
    pub(super) async fn multi_once(
        &self,
        marker: &str,
        ops: &[MultiOp],
    ) -> Result<Option<Vec<MultiResult>>, ClientError> {
        let marked: Vec<MultiOp> =
            std::iter::once(self.op_create(marker, "", CreateMode::Ephemeral))
                .chain(ops.iter().cloned())
                .collect();
        loop {
            match common::repeat(|| self.client.multi(marked.clone())).await {
                Ok(mut results) => {
                    self.forget(marker);
                    results.remove(0);
                    return Ok(Some(results));
                }
                Err(ClientError::Multi { index: 0, code }) => match code {
                    ErrorCode::NodeExists => {
                        self.forget(marker);
                        return Ok(None);
                    }
                    ErrorCode::NoNode => {
                        let (directory, _) = parent(marker).expect("a marker is not the root");
                        self.ensure(directory).await?;
                    }
                    code => return Err(ClientError::Zk(code)),
                },
                Err(ClientError::Multi { index, code }) => {
                    return Err(ClientError::Multi {
                        index: index - 1,
                        code,
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Deletes a marker that has served. If this fails it goes with the session.
    fn forget(&self, marker: &str) {
        let (client, marker) = (self.client.clone(), marker.to_owned());
        tokio::spawn(async move {
            let _: Result<(), ClientError> = client.delete(&marker, -1).await;
        });
    }

    /// A create for a multi.
    pub(super) fn op_create(
        &self,
        path: &str,
        data: impl Into<Bytes>,
        mode: CreateMode,
    ) -> MultiOp {
        op_create(path, data, mode, self.acl.clone())
    }
}

pub(super) fn op_create(
    path: &str,
    data: impl Into<Bytes>,
    mode: CreateMode,
    acl: Vec<Acl>,
) -> MultiOp {
    MultiOp::Create {
        op: CreateOp::Create,
        path: path.to_owned(),
        data: Some(data.into()),
        acl,
        flags: mode.flags(),
    }
}

pub(super) fn op_set(path: &str, data: impl Into<Bytes>, version: i32) -> MultiOp {
    MultiOp::SetData {
        path: path.to_owned(),
        data: Some(data.into()),
        version,
    }
}

pub(super) fn op_delete(path: &str, version: i32) -> MultiOp {
    MultiOp::Delete {
        path: path.to_owned(),
        version,
    }
}

pub(super) fn op_check(path: &str, version: i32) -> MultiOp {
    MultiOp::Check {
        path: path.to_owned(),
        version,
    }
}

/// `None` instead of [`ErrorCode::NoNode`].
pub(super) fn present<T>(outcome: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(ClientError::Zk(ErrorCode::NoNode)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The path of a child.
pub(super) fn join(path: &str, name: &str) -> String {
    let path = if path == "/" { "" } else { path };
    format!("{path}/{name}")
}

/// An id that nothing else has.
pub(super) fn unique() -> String {
    Guid::new().to_string()
}

/// Waits for all of these, which are polled in their order, so that requests are made in it.
pub(super) async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, done) in waiting.iter_mut().zip(&mut done) {
            if done.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(output) => *done = Some(output),
                    std::task::Poll::Pending => ready = false,
                }
            }
        }
        if ready {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter()
        .map(|output| output.expect("all are done"))
        .collect()
}
