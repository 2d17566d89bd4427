//! The operations, one call each.

use std::time::Duration;

use bytes::Bytes;

use super::connection::Reply;
use super::feed::feed;
use super::watches::{WatchFuture, WatchStream, Watching};
use super::{Client, ClientError, answer};
use crate::wire::{
    Acl, AddWatchMode, CreateMode, CreateOp, ErrorCode, Id, MultiOp, Request, Response, Stat,
    WatcherKind,
};

/// A znode to create, for all that [`Client::create`] does not offer.
///
/// ```
/// use unbroken_coord::client::NewNode;
/// use unbroken_coord::wire::CreateMode;
///
/// let node = NewNode::new(CreateMode::Container).data("x");
/// let null = NewNode::new(CreateMode::Persistent); // its data is null, which is not empty
/// # let _ = (node, null);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct NewNode {
    mode: CreateMode,
    ttl_ms: Option<i64>,
    data: Option<Bytes>,
    acl: Vec<Acl>,
}

impl NewNode {
    /// A znode with null data that is open to everybody.
    pub fn new(mode: CreateMode) -> Self {
        Self {
            mode,
            ttl_ms: None,
            data: None,
            acl: Acl::open(),
        }
    }

    /// Persistent, and deleted when it has neither changed nor had children for `ttl` (1 ms to
    /// 2^40 - 1 ms); with a counter appended to its name if `sequential`. Where the servers allow
    /// it, by their option `extended_types`.
    pub fn with_ttl(ttl: Duration, sequential: bool) -> Self {
        let mode = if sequential {
            CreateMode::PersistentSequentialWithTtl
        } else {
            CreateMode::PersistentWithTtl
        };
        Self {
            ttl_ms: Some(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX)),
            ..Self::new(mode)
        }
    }

    /// With this data.
    pub fn data(mut self, data: impl Into<Bytes>) -> Self {
        self.data = Some(data.into());
        self
    }

    /// With this access control list.
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.acl = acl;
        self
    }

    /// `otherwise` for what needs no operation of its own.
    pub(super) fn into_op(self, path: String, otherwise: CreateOp) -> MultiOp {
        MultiOp::Create {
            op: match (self.ttl_ms, self.mode) {
                (Some(ttl_ms), _) => CreateOp::Ttl(ttl_ms),
                (None, CreateMode::Container) => CreateOp::Container,
                (None, _) => otherwise,
            },
            path,
            data: self.data,
            acl: self.acl,
            flags: self.mode.flags(),
        }
    }
}

impl Client {
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
        let node = NewNode::new(mode).data(data).acl(acl);
        match self
            .call(self.create_request(path, node, CreateOp::Create)?)
            .await?
        {
            Response::Created { path } | Response::Created2 { path, .. } => Ok(self.local(&path)),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Creates a znode; gives its path and metadata. (Apache ZooKeeper from 3.5 on.)
    ///
    /// # Errors
    /// As [`Self::create`].
    pub async fn create_node(
        &self,
        path: &str,
        node: NewNode,
    ) -> Result<(String, Stat), ClientError> {
        match self
            .call(self.create_request(path, node, CreateOp::Create2)?)
            .await?
        {
            Response::Created2 { path, stat } => Ok((self.local(&path), stat)),
            _ => Err(ClientError::Protocol),
        }
    }

    fn create_request(
        &self,
        path: &str,
        node: NewNode,
        op: CreateOp,
    ) -> Result<Request, ClientError> {
        let path = self.full_to_create(path, node.mode)?;
        let MultiOp::Create {
            op,
            path,
            data,
            acl,
            flags,
        } = node.into_op(path, op)
        else {
            unreachable!("it makes nothing else")
        };
        Ok(Request::Create {
            op,
            path,
            data,
            acl,
            flags,
        })
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
        let stat = found(
            self.call_and_watch(request, Some((path, Watching::Once(watcher))))
                .await,
        )?;
        Ok((stat, changed))
    }

    /// The znode's data and metadata. Null data reads as empty.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn get(&self, path: &str) -> Result<(Bytes, Stat), ClientError> {
        let (data, stat) = self.get_or_null(path).await?;
        Ok((data.unwrap_or_default(), stat))
    }

    /// As [`Self::get`]; `None` for null data.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn get_or_null(&self, path: &str) -> Result<(Option<Bytes>, Stat), ClientError> {
        let request = Request::GetData {
            path: self.full(path)?,
            watch: false,
        };
        match self.call(request).await? {
            Response::Data { data, stat } => Ok((data, stat)),
            _ => Err(ClientError::Protocol),
        }
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
        let (bytes, stat) = data(
            self.call_and_watch(request, Some((path, Watching::Once(watcher))))
                .await?,
        )?;
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
        self.set_or_null(path, Some(data.into()), version).await
    }

    /// As [`Self::set`]; `None` sets null data.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], ...
    pub async fn set_or_null(
        &self,
        path: &str,
        data: Option<Bytes>,
        version: i32,
    ) -> Result<Stat, ClientError> {
        let request = Request::SetData {
            path: self.full(path)?,
            data,
            version,
        };
        stat(self.call(request).await?)
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
        let answer = self
            .call_and_watch(request, Some((path, Watching::Once(watcher))))
            .await?;
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

    /// Sets the znode's access control list; gives its new metadata. `version` is the list's
    /// ([`Stat::aversion`]); -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], [`ErrorCode::InvalidAcl`],
    /// [`ErrorCode::NoAuth`], ...
    pub async fn set_acl(
        &self,
        path: &str,
        acl: Vec<Acl>,
        version: i32,
    ) -> Result<Stat, ClientError> {
        let request = Request::SetAcl {
            path: self.full(path)?,
            acl,
            version,
        };
        stat(self.call(request).await?)
    }

    /// Watches a znode, there or not, and with [`AddWatchMode::PersistentRecursive`] everything
    /// below it, until the stream is dropped. (Apache ZooKeeper from 3.6 on.)
    ///
    /// Everything that changes after this returns is told: read what there is then, and keep it up
    /// to date by the stream. [`AddWatchMode::Persistent`] tells of the znode and, without saying
    /// which, of children that come and go; a recursive watch tells of each znode by itself and
    /// never says `NodeChildrenChanged`.
    ///
    /// # Errors
    /// [`ErrorCode::Unimplemented`], and a lost connection, where the server is older.
    pub async fn watch(&self, path: &str, mode: AddWatchMode) -> Result<WatchStream, ClientError> {
        let path = self.full(path)?;
        let (sender, feed) = feed();
        let stream = WatchStream {
            feed,
            path: path.clone(),
            commands: self.commands.downgrade(),
        };
        let request = Request::AddWatch {
            path: path.clone(),
            mode: mode.code(),
        };
        let watching = Watching::Always(mode, sender);
        self.call_and_watch(request, Some((path, watching))).await?;
        Ok(stream)
    }

    /// Makes the server forget the session's watches of this path, of one kind or all; who waits
    /// for them here is told so (`DataWatchRemoved`, ...). A [`WatchStream`] need only be dropped.
    ///
    /// # Errors
    /// [`ErrorCode::NoWatcher`] where it has none.
    pub async fn remove_watches(&self, path: &str, kind: WatcherKind) -> Result<(), ClientError> {
        let path = self.full(path)?;
        let request = Request::RemoveWatches {
            path: path.clone(),
            kind: kind.code(),
        };
        let watching = Some((path, Watching::Removed(kind)));
        self.call_and_watch(request, watching).await.map(drop)
    }

    /// Whether the server holds a watch of the session on this path.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn check_watches(&self, path: &str, kind: WatcherKind) -> Result<bool, ClientError> {
        let request = Request::CheckWatches {
            path: self.full(path)?,
            kind: kind.code(),
        };
        match self.call(request).await {
            Ok(_) => Ok(true),
            Err(ClientError::Zk(ErrorCode::NoWatcher)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The paths of the session's own ephemeral znodes that begin with `prefix`, sorted. (Apache
    /// ZooKeeper from 3.6 on.)
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ephemerals(&self, prefix: &str) -> Result<Vec<String>, ClientError> {
        let prefix = format!("{}{prefix}", self.chroot);
        match self.call(Request::GetEphemerals { prefix }).await? {
            Response::Ephemerals(paths) => {
                let below = |path: &&String| {
                    let rest = path.strip_prefix(&*self.chroot);
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                };
                let mut paths: Vec<_> = paths.iter().filter(below).map(|p| self.local(p)).collect();
                paths.sort_unstable();
                Ok(paths)
            }
            _ => Err(ClientError::Protocol),
        }
    }

    /// How many znodes there are below this one, at any depth. (Apache ZooKeeper from 3.6 on.)
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], ...
    pub async fn all_children_number(&self, path: &str) -> Result<u32, ClientError> {
        let request = Request::GetAllChildrenNumber {
            path: self.full(path)?,
        };
        match self.call(request).await? {
            Response::ChildrenNumber(number) => {
                u32::try_from(number).map_err(|_| ClientError::Protocol)
            }
            _ => Err(ClientError::Protocol),
        }
    }

    /// Who the session's holder has proved to be: schemes and names, without what proves them.
    /// (Apache ZooKeeper from 3.7 on.)
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn who_am_i(&self) -> Result<Vec<Id>, ClientError> {
        match self.call(Request::WhoAmI).await? {
            Response::Who(ids) => Ok(ids),
            _ => Err(ClientError::Protocol),
        }
    }

    /// Who the servers are, one a line, and the version of that; whatever the chroot is.
    ///
    /// # Errors
    /// [`ErrorCode::NoAuth`], ...
    pub async fn config(&self) -> Result<(Bytes, Stat), ClientError> {
        let path = CONFIG_PATH.to_owned();
        data(self.call(Request::GetData { path, watch: false }).await?)
    }

    /// As [`Self::config`]; the future resolves when it changes.
    ///
    /// # Errors
    /// [`ErrorCode::NoAuth`], ...
    pub async fn config_and_watch(&self) -> Result<(Bytes, Stat, WatchFuture), ClientError> {
        let path = CONFIG_PATH.to_owned();
        let (watcher, changed) = WatchFuture::channel();
        let request = Request::GetData {
            path: path.clone(),
            watch: true,
        };
        let watching = Some((path, Watching::Once(watcher)));
        let (bytes, stat) = data(self.call_and_watch(request, watching).await?)?;
        Ok((bytes, stat, changed))
    }

    /// Changes who the servers are; gives the new configuration. `version` is that of the
    /// configuration to replace (its `version=` line, hexadecimal there); -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::ReconfigDisabled`], [`ErrorCode::NoAuth`], [`ErrorCode::BadVersion`],
    /// [`ErrorCode::ReconfigInProgress`], [`ErrorCode::NewConfigNoQuorum`],
    /// [`ErrorCode::BadArguments`].
    pub async fn reconfig(
        &self,
        change: &Reconfig,
        version: i64,
    ) -> Result<(Bytes, Stat), ClientError> {
        let list = |names: &[String]| (!names.is_empty()).then(|| names.join(","));
        let (joining, leaving, new_members) = match change {
            Reconfig::Change { joining, leaving } => (list(joining), list(leaving), None),
            Reconfig::Members(members) => (None, None, list(members)),
        };
        let request = Request::Reconfig {
            joining,
            leaving,
            new_members,
            config_version: version,
        };
        data(self.call(request).await?)
    }
}

/// Where the servers tell who they are.
const CONFIG_PATH: &str = "/zookeeper/config";

/// A change of the servers, for [`Client::reconfig`]. A server is written
/// `server.ID=HOST:PEERPORT:PEERPORT:participant;[HOST:]CLIENTPORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reconfig {
    /// Some join, or are described anew, and some leave.
    Change {
        /// Servers.
        joining: Vec<String>,
        /// Ids.
        leaving: Vec<String>,
    },
    /// These, and no others.
    Members(Vec<String>),
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

fn stat(response: Response) -> Result<Stat, ClientError> {
    match response {
        Response::Stat(stat) => Ok(stat),
        _ => Err(ClientError::Protocol),
    }
}
