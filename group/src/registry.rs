//! Where views are agreed: a coordinator's two znodes, behind a small interface; in memory, for tests; in files, for
//! several processes of one machine.

mod files;

pub use self::files::FileRegistry;

use crate::output::{CasResult, ReadResult, RegistryReply};
use crate::process::Request;
use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Carries out requests on the group's znodes: linearizable reads and conditional writes.
///
/// [`Registry::request`] is called on the node's thread and must not wait: it hands the request to a task or thread of its
/// own, which answers when it can.
pub trait Registry: Send + 'static {
    /// Carries out one request and sends the outcome to `answer`.
    fn request(&mut self, request: Request, answer: Answer);
}

/// Takes the outcome of one request to the node. Dropped without one, it says that the outcome is unknown.
pub struct Answer {
    pub(crate) request: Request,
    pub(crate) send: Option<Box<dyn FnOnce(RegistryReply) + Send>>,
}

impl Answer {
    /// The outcome. It must fit the request: [`RegistryReply::View`] for a read of the view, and so on.
    pub fn send(mut self, reply: RegistryReply) {
        if let Some(send) = self.send.take() {
            send(reply);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(send) = self.send.take() {
            send(self.request.unknown());
        }
    }
}

#[derive(Default)]
struct Nodes {
    view: Option<(Bytes, i32)>,
    lease: Option<(Bytes, i32)>,
    available: bool,
}

/// The znodes in memory: for several nodes of one process, in tests and examples.
#[derive(Clone)]
pub struct MemoryRegistry(Arc<Mutex<Nodes>>);

impl Default for MemoryRegistry {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Nodes {
            available: true,
            ..Nodes::default()
        })))
    }
}

impl MemoryRegistry {
    /// Lets it answer, or not: what is asked meanwhile has an unknown outcome.
    pub fn set_available(&self, available: bool) {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.available = available;
    }
}

fn read(node: Option<&(Bytes, i32)>) -> ReadResult {
    node.map_or(ReadResult::Absent, |(value, version)| ReadResult::Value {
        value: value.clone(),
        version: *version,
    })
}

fn write(node: &mut Option<(Bytes, i32)>, may: bool, value: Bytes) -> CasResult {
    if !may {
        return CasResult::BadVersion;
    }
    let version = node.as_ref().map_or(0, |(_, v)| v + 1);
    *node = Some((value, version));
    CasResult::Written { version }
}

impl Registry for MemoryRegistry {
    fn request(&mut self, request: Request, answer: Answer) {
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !nodes.available {
            return;
        }
        let version = nodes.view.as_ref().map(|(_, v)| *v);
        let reply = match request {
            Request::ReadView => RegistryReply::View(read(nodes.view.as_ref())),
            Request::ReadLease => RegistryReply::Lease(read(nodes.lease.as_ref())),
            Request::CompareAndSet {
                expected_version,
                value,
            } => RegistryReply::Cas(write(&mut nodes.view, version == expected_version, value)),
            Request::RenewLease {
                view_version,
                value,
            } => {
                let may = version == Some(view_version);
                RegistryReply::Renew(write(&mut nodes.lease, may, value))
            }
        };
        drop(nodes);
        answer.send(reply);
    }
}
