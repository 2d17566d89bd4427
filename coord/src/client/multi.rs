//! Several operations in one step.

use bytes::Bytes;

use super::{Client, ClientError, NewNode};
use crate::wire::{Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, Request, Response};

impl MultiOp {
    /// Creates a znode; answered by [`MultiResult::Created`], for a container by
    /// [`MultiResult::Created2`].
    pub fn create(
        path: impl Into<String>,
        data: impl Into<Bytes>,
        mode: CreateMode,
        acl: Vec<Acl>,
    ) -> Self {
        let op = match mode {
            CreateMode::Container => CreateOp::Container,
            _ => CreateOp::Create,
        };
        Self::Create {
            op,
            path: path.into(),
            data: Some(data.into()),
            acl,
            flags: mode.flags(),
        }
    }

    /// Creates a znode; answered by [`MultiResult::Created2`].
    pub fn create_node(path: impl Into<String>, node: NewNode) -> Self {
        let NewNode { mode, data, acl } = node;
        let op = match mode {
            CreateMode::Container => CreateOp::Container,
            _ => CreateOp::Create2,
        };
        Self::Create {
            op,
            path: path.into(),
            data,
            acl,
            flags: mode.flags(),
        }
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
}
