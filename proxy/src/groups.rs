//! Process groups over a coordinator: what [`unbroken_group::node::Node`] needs of one, by the client of `unbroken-coord`.

use std::sync::Arc;

use tokio::runtime::Handle;
use unbroken_coord::client::Client;
use unbroken_group::process;
use unbroken_group::registry::{Answer, Registry};
use unbroken_group::{CasResult, ReadResult, RegistryReply};

use crate::registry::{self, GROUPS, Node, Operation, Reads, Request};

/// The znodes of one site group, on the built-in coordinator or on a ZooKeeper ensemble.
///
/// Requests run as tasks of the runtime that the handle names. One that the coordinator does not answer within a second has
/// an unknown outcome.
pub struct CoordinatorRegistry {
    client: Client,
    runtime: Handle,
    reads: Reads,
    group: Arc<str>,
}

impl CoordinatorRegistry {
    /// On servers of `unbroken-coord`, whose `sync` is a barrier. `site`: the znode's name, without a slash; it is made below
    /// `/unbroken/groups`.
    pub fn new(client: Client, runtime: Handle, site: &str) -> Self {
        Self {
            client,
            runtime,
            reads: Reads::Sync,
            group: format!("{GROUPS}/{site}").into(),
        }
    }

    /// On Apache ZooKeeper: each linearizable read stands behind a write (ZOOKEEPER-1675).
    pub fn external(client: Client, runtime: Handle, site: &str) -> Self {
        Self {
            reads: Reads::Barrier,
            ..Self::new(client, runtime, site)
        }
    }
}

impl Registry for CoordinatorRegistry {
    fn request(&mut self, request: process::Request, answer: Answer) {
        let (node, operation) = match request {
            process::Request::ReadView => (Node::View, Operation::Read),
            process::Request::ReadLease => (Node::Lease, Operation::Read),
            process::Request::CompareAndSet {
                expected_version: expected,
                value,
            } => (Node::View, Operation::CompareAndSet { expected, value }),
            process::Request::RenewLease {
                view_version,
                value,
            } => {
                let renew = Operation::RenewLease {
                    view_version,
                    value,
                };
                (Node::Lease, renew)
            }
        };
        let request = Request {
            plane: 0,
            life: 0,
            group: Arc::clone(&self.group),
            node,
            operation,
        };
        let (client, reads) = (self.client.clone(), self.reads);
        self.runtime.spawn(async move {
            let outcome = registry::carry_out(&client, reads, &request).await;
            answer.send(reply(&request, outcome));
        });
    }
}

fn reply(request: &Request, outcome: registry::Answer) -> RegistryReply {
    use registry::Answer as Is;
    match (&request.operation, request.node) {
        (Operation::Read, node) => {
            let read = match outcome {
                Is::Value(value, version) => ReadResult::Value { value, version },
                Is::Absent => ReadResult::Absent,
                Is::Written(_) | Is::BadVersion | Is::Unknown => ReadResult::Unknown,
            };
            match node {
                Node::View => RegistryReply::View(read),
                Node::Lease => RegistryReply::Lease(read),
            }
        }
        (write, _) => {
            let written = match outcome {
                Is::Written(version) => CasResult::Written { version },
                Is::BadVersion => CasResult::BadVersion,
                Is::Value(..) | Is::Absent | Is::Unknown => CasResult::Unknown,
            };
            match write {
                Operation::RenewLease { .. } => RegistryReply::Renew(written),
                Operation::CompareAndSet { .. } | Operation::Read => RegistryReply::Cas(written),
            }
        }
    }
}
