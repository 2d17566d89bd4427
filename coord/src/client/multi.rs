//! Several operations in one step.

use bytes::Bytes;

use super::{Client, ClientError, NewNode};
use crate::wire::{
    Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, ReadOp, ReadResult, Request,
    Response,
};

impl MultiOp {
    /// Creates a znode; answered by [`MultiResult::Created`], for a container by
    /// [`MultiResult::Created2`].
    pub fn create(
        path: impl Into<String>,
        data: impl Into<Bytes>,
        mode: CreateMode,
        acl: Vec<Acl>,
    ) -> Self {
        NewNode::new(mode)
            .data(data)
            .acl(acl)
            .into_op(path.into(), CreateOp::Create)
    }

    /// Creates a znode; answered by [`MultiResult::Created2`].
    pub fn create_node(path: impl Into<String>, node: NewNode) -> Self {
        node.into_op(path.into(), CreateOp::Create2)
    }

    /// Deletes a znode; `version` -1 fits any.
    pub fn delete(path: impl Into<String>, version: i32) -> Self {
        Self::Delete {
            path: path.into(),
            version,
        }
    }

    /// Sets a znode's data; `version` -1 fits any.
    pub fn set(path: impl Into<String>, data: impl Into<Bytes>, version: i32) -> Self {
        Self::SetData {
            path: path.into(),
            data: Some(data.into()),
            version,
        }
    }

    /// Checks a znode's version; -1 checks that it exists.
    pub fn check(path: impl Into<String>, version: i32) -> Self {
        Self::Check {
            path: path.into(),
            version,
        }
    }
}

impl ReadOp {
    /// Reads a znode's data; answered by [`ReadResult::Data`].
    pub fn data(path: impl Into<String>) -> Self {
        Self::GetData {
            path: path.into(),
            watch: false,
        }
    }

    /// Lists a znode's children; answered by [`ReadResult::Children`].
    pub fn children(path: impl Into<String>) -> Self {
        Self::GetChildren {
            path: path.into(),
            watch: false,
        }
    }
}

impl Client {
    /// Fails unless the znode has this version; -1 fits any.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`], [`ErrorCode::BadVersion`], ...
    pub async fn check(&self, path: &str, version: i32) -> Result<(), ClientError> {
        // A check by itself is not spoken by every server; a multi of one is.
        self.multi(vec![MultiOp::check(path, version)])
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
                    *path = self.local(path);
                }
                MultiResult::Deleted | MultiResult::Set(_) | MultiResult::Checked => {}
                MultiResult::Error(_) => return Err(ClientError::Protocol),
            }
        }
        Ok(results)
    }

    /// Reads all of these at one moment. Gives their results in order; one that fails does so by
    /// itself ([`ReadResult::Error`]). Sets no watches, whatever the operations say. (Apache
    /// ZooKeeper from 3.6 on.)
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn multi_read(&self, mut ops: Vec<ReadOp>) -> Result<Vec<ReadResult>, ClientError> {
        for op in &mut ops {
            let (ReadOp::GetData { path, watch } | ReadOp::GetChildren { path, watch }) = op;
            (*path, *watch) = (self.full(path)?, false);
        }
        match self.call(Request::MultiRead(ops)).await? {
            Response::MultiRead(results) => Ok(results),
            _ => Err(ClientError::Protocol),
        }
    }
}
