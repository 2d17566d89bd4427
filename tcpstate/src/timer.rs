//! One wheel for all connections: each has at most one entry, at its earliest deadline.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::ConnId;
use crate::time::Instant;

/// Deadlines of connections, in order. A connection that idles has none.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    queue: BTreeSet<(Instant, ConnId)>,
    armed: BTreeMap<ConnId, Instant>,
}

impl Timers {
    /// Sets or clears a connection's deadline.
    pub(crate) fn arm(&mut self, conn: ConnId, at: Option<Instant>) {
        let before = match at {
            Some(at) => self.armed.insert(conn, at),
            None => self.armed.remove(&conn),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.queue.remove(&(before, conn));
        }
        if let Some(at) = at {
            self.queue.insert((at, conn));
        }
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Takes one connection whose deadline has come.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<ConnId> {
        let (at, conn) = *self.queue.first()?;
        if at > now {
            return None;
        }
        self.queue.pop_first();
        self.armed.remove(&conn);
        Some(conn)
    }
}
