//! Connections that are over for the client while the server here is still behind: it is given the rest of their input (R3: every
//! replica's server is fed the same), and what it answers is held against what the leader's answered. A server that is always a
//! little slower would else never be compared on short connections.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tracing::debug;
use unbroken_tcpstate::ConnId;

use super::super::upstream::{ReadOutcome, Upstream};
use super::{READ_BYTES, Server, Servers, TURN_BYTES};
use crate::clock::BootTime;
use crate::fault::planted;

/// A server has so long to catch up with a connection that is over.
const LINGER: Duration = Duration::from_secs(5);
/// Such connections at a time; the oldest goes first.
const LINGERING_MAX: usize = 1024;
/// What they may hold of input that the servers have not taken, in bytes of memory, all together.
const LINGERING_BYTES_MAX: u64 = 16 << 20;

/// The connections that linger.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    servers: HashMap<ConnId, (BootTime, Server)>,
    /// Until when. Invariant: the same as in `servers`.
    until: BTreeSet<(BootTime, ConnId)>,
    /// What their inputs cost in memory when they began to linger.
    bytes: u64,
}

impl Lingering {
    fn add(&mut self, now: BootTime, conn: ConnId, mut server: Server) {
        let taken = server.upstream.as_ref().map_or(0, Upstream::taken);
        server.input.give_up(taken);
        server.queued = false;
        self.bytes += server.input.cost_bytes();
        self.servers.insert(conn, (now + LINGER, server));
        self.until.insert((now + LINGER, conn));
        while (self.servers.len() > LINGERING_MAX || self.bytes > LINGERING_BYTES_MAX)
            && let Some((_, oldest)) = self.until.first().copied()
        {
            self.remove(oldest);
        }
    }

    fn remove(&mut self, conn: ConnId) {
        if let Some((until, server)) = self.servers.remove(&conn) {
            self.until.remove(&(until, conn));
            self.bytes -= server.input.cost_bytes();
        }
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Server> {
        self.servers.get_mut(&conn).map(|(_, server)| server)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Server> {
        self.servers.values_mut().map(|(_, server)| server)
    }

    pub(super) fn drain(&mut self) -> impl Iterator<Item = Server> {
        self.until.clear();
        self.bytes = 0;
        self.servers.drain().map(|(_, (_, server))| server)
    }

    pub(super) fn poll_timeout(&self) -> Option<BootTime> {
        self.until.first().map(|(at, _)| *at)
    }

    /// Those that had their time.
    pub(super) fn expire(&mut self, now: BootTime) {
        while let Some((_, conn)) = self.until.first().copied().filter(|(at, _)| *at <= now) {
            debug!(conn = conn.0, "over, and the server here is still behind");
            self.remove(conn);
        }
    }
}

impl Server {
    /// Whether the server has not been given all, or not said all that the leader's has said.
    fn is_behind(&self) -> bool {
        let Some(upstream) = self.upstream.as_ref().filter(|_| !self.ended) else {
            return false;
        };
        upstream.taken() < self.input.end()
            || (self.input.finished() && !upstream.shut())
            || self.answer.awaits()
    }
}

impl Servers {
    /// The connection is over. Where the server here is not at its end yet, it is let go on for a while.
    pub(super) fn end_connection(&mut self, now: BootTime, conn: ConnId) {
        let Some(server) = self.take(conn) else {
            return;
        };
        if server.is_behind() && !planted!(SlowCutOff) {
            self.lingering.add(now, conn, server);
            self.wake(conn);
        }
    }

    /// One that lingers has its turn.
    pub(super) fn turn_lingering(&mut self, conn: ConnId) {
        let Some(server) = self.lingering.get_mut(conn) else {
            return;
        };
        let Some(upstream) = server.upstream.as_mut() else {
            return;
        };
        let readable = server.input.prepare(upstream.taken(), conn, &self.spill);
        let fed = upstream.feed(&server.input);
        let mut over = readable.is_err() || (fed.is_err() && !upstream.connected());
        let (mut found, mut budget) = (None, TURN_BYTES);
        while !over && upstream.readable() {
            if budget == 0 {
                server.queued = true;
                self.ready.push_back(conn);
                break;
            }
            match upstream.read(&mut self.scratch[..READ_BYTES]) {
                Ok(ReadOutcome::Bytes(n)) => {
                    found = found.or(server.answer.read(&self.scratch[..n]));
                    budget = budget.saturating_sub(n);
                }
                Ok(ReadOutcome::Empty) => {
                    server.answer.pause();
                    break;
                }
                Ok(ReadOutcome::End) => {
                    found = found.or(server.answer.end());
                    server.ended = true;
                }
                Err(_) => over = true,
            }
        }
        over |= fed.is_err() && !upstream.readable();
        let name = (conn, server.port);
        self.answers.note_over(name, &mut server.answer, found);
        if over || !server.is_behind() {
            self.lingering.remove(conn);
        }
    }
}
