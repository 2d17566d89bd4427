//! What a node is for a VIP, and who keeps the server's output in each role.

use unbroken_tcpstate::{ConnId, ConnState, EventNo, Instant, Replica, Stack};

use super::checkpoint::Incoming;
use super::servers::OutputKeeper;
use crate::clock::BootTime;
use crate::status;

/// What this node is in its view.
#[derive(Debug, Default)]
pub(crate) enum Role {
    /// In no view.
    #[default]
    Outside,
    /// In a view, receiving the checkpoint.
    Joining(Box<Incoming>),
    /// Holds the record of every connection.
    Backup(Box<Replica>),
    /// Owns the VIP.
    Leader(Box<Stack>),
}

impl Role {
    pub(crate) fn status(&self) -> status::Role {
        match self {
            Self::Outside => status::Role::Outside,
            Self::Joining(_) => status::Role::Joining,
            Self::Backup(_) => status::Role::Backup,
            Self::Leader(_) => status::Role::Leader,
        }
    }
}

/// A role with the moment at which it is used.
pub(crate) struct Keeper<'a> {
    pub(crate) role: &'a mut Role,
    pub(crate) now: BootTime,
    /// Counts what a leader gives to clients.
    pub(crate) bytes_out: &'a mut u64,
}

impl Keeper<'_> {
    fn now(&self) -> Instant {
        Instant::from_micros(self.now.micros())
    }

    fn state(&self, conn: ConnId) -> Option<&ConnState> {
        match &*self.role {
            Role::Leader(stack) => stack.state(conn),
            Role::Backup(replica) => replica.state(conn),
            Role::Joining(_) | Role::Outside => None,
        }
    }
}

impl OutputKeeper for Keeper<'_> {
    fn room(&self, conn: ConnId) -> usize {
        match &*self.role {
            Role::Leader(stack) => stack.output_room(conn),
            Role::Backup(replica) => replica.output_room(conn),
            Role::Joining(_) | Role::Outside => 0,
        }
    }

    fn produced(&self, conn: ConnId) -> u64 {
        match &*self.role {
            Role::Leader(stack) => stack.output_produced(conn),
            Role::Backup(replica) => replica.output_produced(conn),
            Role::Joining(_) | Role::Outside => 0,
        }
    }

    fn bytes(&mut self, conn: ConnId, bytes: &[u8], tag: EventNo) {
        let now = self.now();
        match &mut *self.role {
            Role::Leader(stack) => {
                *self.bytes_out += bytes.len() as u64;
                stack.handle_server_bytes(now, conn, bytes, tag);
            }
            Role::Backup(replica) => replica.handle_server_bytes(conn, bytes),
            Role::Joining(_) | Role::Outside => {}
        }
    }

    fn fin(&mut self, conn: ConnId) {
        let now = self.now();
        match &mut *self.role {
            Role::Leader(stack) => stack.handle_server_fin(now, conn),
            Role::Backup(_) | Role::Joining(_) | Role::Outside => {}
        }
    }

    fn reset(&mut self, conn: ConnId) {
        let now = self.now();
        match &mut *self.role {
            Role::Leader(stack) => stack.handle_server_reset(now, conn),
            Role::Backup(_) | Role::Joining(_) | Role::Outside => {}
        }
    }

    fn end_known(&self, conn: ConnId) -> bool {
        self.state(conn).is_none_or(|s| s.local_fin.is_some())
    }

    fn lives(&self, conn: ConnId) -> bool {
        self.state(conn).is_some()
    }

    fn acked(&self, conn: ConnId) -> u64 {
        self.state(conn).map_or(0, |s| s.acked)
    }

    fn give_up(&mut self, conn: ConnId) {
        let now = self.now();
        // A backup goes on trying: it is not the one whom the client asks.
        if let Role::Leader(stack) = &mut *self.role {
            stack.handle_server_reset(now, conn);
        }
    }

    fn consumed(&mut self, conn: ConnId, offset: u64) {
        let now = self.now();
        if let Role::Leader(stack) = &mut *self.role {
            stack.handle_consumed(now, conn, offset);
        }
    }

    fn resumes(&mut self, conn: ConnId, offset: u64) {
        // A leader has produced all that; what its server says again is passed over.
        if let Role::Backup(replica) = &mut *self.role {
            replica.handle_server_resumed(conn, offset);
        }
    }

    fn wants(&self, conn: ConnId) -> bool {
        match &*self.role {
            Role::Leader(stack) => stack.wants_output(conn),
            Role::Backup(replica) => replica.wants_output(conn),
            Role::Joining(_) | Role::Outside => false,
        }
    }

    fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    fn skip(&mut self, conn: ConnId) {
        if let Role::Leader(stack) = &mut *self.role {
            stack.handle_server_stalled(conn);
        }
    }

    fn client_stalled(&mut self, conn: ConnId) {
        let now = self.now();
        if let Role::Leader(stack) = &mut *self.role {
            stack.handle_client_stalled(now, conn);
        }
    }
}
