//! What a plane may use of the thread it runs on.

use std::net::IpAddr;

use bytes::Bytes;
use mio::Registry;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{debug, info, warn};
use unbroken_group::driver::Sender;
use unbroken_group::{MemberId, Notice, ViewId};

use super::Note;
use super::plane::group_time;
use crate::clock::BootTime;
use crate::registry::Request;

/// The thread's shared parts, lent to one plane for one turn.
pub(crate) struct Context<'a> {
    pub(crate) registry: &'a Registry,
    pub(crate) sender: &'a mut Sender,
    pub(crate) requests: &'a UnboundedSender<Request>,
    pub(crate) notes: &'a UnboundedSender<Note>,
    pub(crate) want_writable: &'a mut Vec<usize>,
    /// For the parts that are in use while a plane has its turn.
    pub(crate) deferred: &'a mut Vec<Deferred>,
}

/// What is done once the planes have had their turn.
pub(crate) enum Deferred {
    /// The receiver can derive a group's keys.
    Instance(u32, u128),
    /// The control connections tell of a new life.
    Life(u32, u128),
}

impl Context<'_> {
    /// Sends datagrams of a plane's group.
    pub(crate) fn send(&mut self, now: BootTime, plane: usize, to: &[MemberId], bodies: &[Bytes]) {
        self.sender
            .send(group_time(now), group_id(plane), to, bodies);
    }

    /// A view is installed: what follows is sealed in its epoch.
    pub(crate) fn set_epoch(&mut self, plane: usize, view_id: ViewId) {
        self.sender.set_epoch(group_id(plane), view_id.0);
    }

    /// The group's keys can be derived.
    pub(crate) fn set_instance(&mut self, plane: usize, instance: u128) {
        self.sender.set_instance(group_id(plane), instance);
        self.deferred
            .push(Deferred::Instance(group_id(plane), instance));
    }

    /// A plane begins a new life in its group.
    pub(crate) fn renew(&mut self, plane: usize, me: MemberId) {
        self.deferred
            .push(Deferred::Life(group_id(plane), me.incarnation));
        self.sender.set_member(group_id(plane), me);
    }

    /// Asks the coordinator; the answer comes through the data plane's queue.
    pub(crate) fn ask(&self, request: Request) {
        // The control plane is gone only when the node is stopping: the core then waits in vain.
        let _ = self.requests.send(request);
    }

    /// The wire of a plane takes no more for now.
    pub(crate) fn want_writable(&mut self, plane: usize) {
        self.want_writable.push(plane);
    }

    /// Tells the operator, and the coordinator of a death.
    pub(crate) fn notice(&self, vip: IpAddr, notice: Notice) {
        match notice {
            Notice::Suspected { member, proved } => {
                info!(%vip, %member, proved, "member suspected");
                if proved {
                    let _ = self.notes.send(Note::PeerDied(member.name.to_string()));
                }
            }
            Notice::ViewChange { from } => debug!(%vip, view_id = from.0, "leaving the view"),
            Notice::TotalFailure { generation } => {
                warn!(%vip, generation, "all replicas were lost: connections are lost, service resumes");
            }
            Notice::JoinerDropped { member } => {
                warn!(%vip, %member, "a joining member fell too far behind and joins anew");
            }
            Notice::LeaseLost => warn!(%vip, "the lease ran out; silent until it holds again"),
            Notice::DamagedView => warn!(%vip, "the group's znode cannot be read as a view"),
            other => info!(%vip, notice = ?other, "group"),
        }
    }
}

/// The group of a plane.
pub(crate) fn group_id(plane: usize) -> u32 {
    u32::try_from(plane).expect("a node has few VIPs")
}

/// The plane of a group; of a foreign one, an index that no plane has.
pub(crate) fn plane_of(group: u32) -> usize {
    usize::try_from(group).unwrap_or(usize::MAX)
}
