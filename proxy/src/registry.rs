//! The coordinator as the data plane sees it: a few znodes, read and written on its behalf.
//!
//! The data plane's thread never waits. It sends a [`Request`] down a channel; this task carries it
//! out with the coordinator's client and answers through the data plane's own queue and waker.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, warn};
use unbroken_coord::client::{Client, ClientError, SessionState};
use unbroken_coord::wire::{Acl, CreateMode, CreateOp, ErrorCode, MultiOp, Stat};

/// Under this znode each group has one, named by its VIP.
pub(crate) const GROUPS: &str = "/unbroken/groups";

/// Under this znode each group has one that is written before a read ([`Reads::Barrier`]). Not under
/// the group's own, which does not exist before the first view.
const BARRIERS: &str = "/unbroken/barriers";

/// What makes a read linearizable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// `sync`, which is a barrier on a coordinator of ours.
    Sync,
    /// A write, which is one on Apache ZooKeeper too: its `sync` asks a leader that may have been
    /// replaced without knowing it (ZOOKEEPER-1675).
    ///
    /// Why a write is enough. Let X be any write that was acknowledged to anybody before ours, W, is
    /// sent. Both are in the one order in which leaders commit. A leader that commits W after X was
    /// acknowledged has X in its history: X is on a quorum, and so is the promise to a new leader
    /// before it leads, so that it begins with X; while an old leader that lacks X finds no quorum for
    /// W any more. So W comes after X. A server answers W when it has applied all up to W; it
    /// executes a session's requests in their order, and a server that lags behind what a session has
    /// been told refuses the session. So a read behind W, *in the same session*, sees X.
    Barrier,
}

/// An operation the data plane asks for.
#[derive(Debug)]
pub(crate) enum Operation {
    /// A linearizable read.
    Read,
    /// Write `value` if the znode's version is `expected`; `None`: if there is no such znode.
    CompareAndSet { expected: Option<i32>, value: Bytes },
    /// Write the lease node, whatever its version, if the view's version is `view_version`, in
    /// one transaction.
    RenewLease { view_version: i32, value: Bytes },
}

/// Which of a group's znodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Node {
    /// The view.
    View,
    /// The lease of a leader that is alone in its view.
    Lease,
}

/// One operation on one znode.
#[derive(Debug)]
pub(crate) struct Request {
    /// Who asked, to be given back with the answer.
    pub(crate) plane: usize,
    /// Which life of the group core asked: an answer for a former one is void.
    pub(crate) life: u64,
    /// The group's znode; the lease node stands below it.
    pub(crate) group: Arc<str>,
    /// Which znode.
    pub(crate) node: Node,
    /// What to do with it.
    pub(crate) operation: Operation,
}

/// How an operation ended.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The znode's data and version.
    Value(Bytes, i32),
    /// There is no such znode.
    Absent,
    /// Written; the znode's new version.
    Written(i32),
    /// Not written: another version is there.
    BadVersion,
    /// Nobody knows whether it was done: read again.
    Unknown,
}

/// How long one operation may take before its outcome counts as unknown.
const OPERATION_MAX: Duration = Duration::from_millis(1000);

/// Carries out operations until the data plane hangs up. Each runs by itself: a slow one delays
/// no other.
pub(crate) async fn serve(
    client: Client,
    reads: Reads,
    mut requests: mpsc::UnboundedReceiver<Request>,
    answer: impl Fn(Request, Answer) + Clone + Send + Sync + 'static,
) {
    while let Some(request) = requests.recv().await {
        let client = client.clone();
        let answer = answer.clone();
        tokio::spawn(async move {
            let outcome = carry_out(&client, reads, &request).await;
            answer(request, outcome);
        });
    }
}

/// Carries out one operation, and gives up waiting for it after [`OPERATION_MAX`].
pub(crate) async fn carry_out(client: &Client, reads: Reads, request: &Request) -> Answer {
    match timeout(OPERATION_MAX, execute(client, reads, request)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => {
            debug!(group = %request.group, %error, "coordinator operation failed");
            Answer::Unknown
        }
        Err(_) => {
            warn!(group = %request.group, "no answer from the coordinator");
            Answer::Unknown
        }
    }
}

impl Request {
    fn path(&self) -> String {
        match self.node {
            Node::View => self.group.to_string(),
            Node::Lease => format!("{}/lease", self.group),
        }
    }

    /// Path of the group's barrier.
    fn barrier(&self) -> String {
        let name = self.group.rsplit('/').next().expect("at least one part");
        format!("{BARRIERS}/{name}")
    }
}

async fn execute(client: &Client, reads: Reads, request: &Request) -> Result<Answer, ClientError> {
    let path = request.path();
    match &request.operation {
        Operation::Read => {
            let read = match reads {
                Reads::Sync => client.sync_and_get(&path).await,
                Reads::Barrier => write_and_get(client, &request.barrier(), &path).await,
            };
            match read {
                Ok((data, stat)) => Ok(Answer::Value(data, stat.version)),
                Err(ClientError::Zk(ErrorCode::NoNode)) => Ok(Answer::Absent),
                Err(error) => Err(error),
            }
        }
        Operation::CompareAndSet {
            expected: Some(version),
            value,
        } => match client.set(&path, value.clone(), *version).await {
            Ok(stat) => Ok(Answer::Written(stat.version)),
            Err(ClientError::Zk(ErrorCode::BadVersion | ErrorCode::NoNode)) => {
                Ok(Answer::BadVersion)
            }
            Err(error) => Err(error),
        },
        Operation::CompareAndSet {
            expected: None,
            value,
        } => {
            make_parents(client, &path).await?;
            match client
                .create(&path, value.clone(), CreateMode::Persistent, Acl::open())
                .await
            {
                Ok(_) => Ok(Answer::Written(0)),
                Err(ClientError::Zk(ErrorCode::NodeExists)) => Ok(Answer::BadVersion),
                Err(error) => Err(error),
            }
        }
        Operation::RenewLease {
            view_version,
            value,
        } => renew_lease(client, &request.group, &path, *view_version, value).await,
    }
}

/// Writes `barrier`, whatever it holds, then reads `path` in the same session: see
/// [`Reads::Barrier`].
async fn write_and_get(
    client: &Client,
    barrier: &str,
    path: &str,
) -> Result<(Bytes, Stat), ClientError> {
    let session = session(client).await?;
    // Sent together, so that both cost one round trip; the write is polled first. The read counts
    // only if the write was done.
    let (written, read) =
        tokio::join!(biased; client.set(barrier, Bytes::new(), -1), client.get(path));
    let read = match written {
        Ok(_) => read,
        Err(ClientError::Zk(ErrorCode::NoNode)) => {
            // The first read of this group ever.
            make_parents(client, barrier).await?;
            let made = client
                .create(barrier, Bytes::new(), CreateMode::Persistent, Acl::open())
                .await;
            match made {
                Ok(_) => client.get(path).await,
                // Somebody else's write, perhaps before this read was asked for.
                Err(ClientError::Zk(ErrorCode::NodeExists)) => {
                    client.set(barrier, Bytes::new(), -1).await?;
                    client.get(path).await
                }
                Err(error) => return Err(error),
            }
        }
        Err(error) => return Err(error),
    };
    // No session id is used twice, so that it was the same all the time if it is the same now.
    match *client.state().borrow() {
        SessionState::Connected { session_id } if session_id == session => read,
        _ => Err(ClientError::ConnectionLoss),
    }
}

/// The client's session, once it has one.
async fn session(client: &Client) -> Result<i64, ClientError> {
    let mut state = client.state();
    loop {
        if let SessionState::Connected { session_id } = *state.borrow_and_update() {
            return Ok(session_id);
        }
        state.changed().await.map_err(|_| ClientError::Closed)?;
    }
}

async fn renew_lease(
    client: &Client,
    group: &str,
    lease: &str,
    view_version: i32,
    value: &Bytes,
) -> Result<Answer, ClientError> {
    let check = || MultiOp::Check {
        path: group.to_owned(),
        version: view_version,
    };
    let set = MultiOp::SetData {
        path: lease.to_owned(),
        data: Some(value.clone()),
        version: -1,
    };
    match client.multi(vec![check(), set]).await {
        Ok(_) => return Ok(Answer::Written(0)),
        Err(ClientError::Multi {
            index: 1,
            code: ErrorCode::NoNode,
        }) => {}
        Err(ClientError::Multi { .. }) => return Ok(Answer::BadVersion),
        Err(error) => return Err(error),
    }
    let create = MultiOp::Create {
        op: CreateOp::Create,
        path: lease.to_owned(),
        data: Some(value.clone()),
        acl: Acl::open(),
        flags: CreateMode::Persistent.flags(),
    };
    match client.multi(vec![check(), create]).await {
        Ok(_) => Ok(Answer::Written(0)),
        Err(ClientError::Multi { index: 1, .. }) => Ok(Answer::Unknown),
        Err(ClientError::Multi { .. }) => Ok(Answer::BadVersion),
        Err(error) => Err(error),
    }
}

async fn make_parents(client: &Client, path: &str) -> Result<(), ClientError> {
    for (slash, _) in path.match_indices('/').skip(1) {
        match client
            .create(
                &path[..slash],
                Bytes::new(),
                CreateMode::Persistent,
                Acl::open(),
            )
            .await
        {
            Ok(_) | Err(ClientError::Zk(ErrorCode::NodeExists)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
