//! What is kept for replicas that join later, within its bounds: in memory, then on disk, then not.

use std::collections::BTreeSet;

use tracing::{error, warn};
use unbroken_tcpstate::ConnId;

use super::super::input::{Input, Spilled};
use super::super::spill::{For, Spill};
use super::super::upstream::Upstream;
use super::{Server, Servers};

/// Once the bound is exceeded, so much of it is made free, as a part of it.
const RELIEF: u64 = 16;
/// Connections that are looked at for something to hand to the disk.
const LOOKED_AT_MAX: usize = 16;
/// Connections that ask again in one turn whether theirs can be read.
const HUNGRY_PER_TURN: usize = 64;

/// What is kept for replicas that join later.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    /// Connections that no replica which joins can be brought up with.
    pub(crate) not_replayable: u64,
    /// What is wrong with the disk.
    pub(crate) alarm: Option<String>,
}

impl Servers {
    /// What is kept now.
    pub(crate) fn kept(&self) -> Kept {
        let partial = self.servers.values().filter(|s| !s.input.complete());
        let not_replayable = if self.ordered() { 0 } else { partial.count() };
        Kept {
            memory_bytes: self.history_bytes
                + self.order_memory_bytes()
                + self.spill.waiting_bytes(),
            disk_bytes: self.spill.used_bytes(),
            not_replayable: not_replayable as u64,
            alarm: self.spill.alarm(),
        }
    }

    /// Input that the servers have not taken yet, in bytes.
    pub(crate) fn behind_bytes(&self) -> u64 {
        let behind = |s: &Server| {
            let taken = s.upstream.as_ref().map_or(0, Upstream::taken);
            s.input.end() - taken.min(s.input.end())
        };
        self.servers.values().map(behind).sum::<u64>() + self.order_lag().0
    }

    /// The disk, for a checkpoint that comes or goes; and how much of it may be in memory instead.
    pub(crate) fn spill(&self) -> (&Spill, u64) {
        (&self.spill, self.history_max_bytes)
    }

    /// Past the bound, the connections that keep most in memory hand it to the disk. One of which the
    /// disk takes nothing keeps only what its server has yet to take: it lives on, but no replica that
    /// joins later can be brought to its point.
    pub(super) fn relieve(&mut self) {
        let max = self.history_max_bytes;
        if self.history_bytes <= max.max(self.relieve_above_bytes) {
            return;
        }
        let target = max - max / RELIEF;
        let mut useless = BTreeSet::new();
        while self.history_bytes > target && useless.len() < LOOKED_AT_MAX {
            let candidates = self.servers.iter_mut();
            let candidates = candidates.filter(|(conn, _)| !useless.contains(*conn));
            let Some((conn, server)) = candidates.max_by_key(|(_, s)| s.input.cost_bytes()) else {
                break;
            };
            let (conn, input) = (*conn, &mut server.input);
            let taken = server.upstream.as_ref().map_or(0, Upstream::taken);
            let before = input.cost_bytes();
            let excess = self.history_bytes - target;
            let enough = (before / 2).max(before.saturating_sub(excess));
            let spilled = loop {
                let spilled = if input.given_up() {
                    Spilled::Nothing
                } else {
                    input.spill(taken, &self.spill)
                };
                if spilled != Spilled::Part || input.cost_bytes() <= enough {
                    break spilled;
                }
            };
            match spilled {
                Spilled::Part => {}
                Spilled::Nothing => drop(useless.insert(conn)),
                Spilled::Refused => give_up(conn, input, taken),
            }
            self.history_bytes = self.history_bytes + input.cost_bytes() - before;
        }
        self.relieve_above_bytes = 0;
        if self.history_bytes > target {
            self.relieve_above_bytes = self.history_bytes + max / RELIEF;
        }
    }

    /// Goes on with what was read from the disk, and sees what could not be written.
    pub(crate) fn tend_kept(&mut self) {
        while let Some(waiter) = self.spill.poll_loaded() {
            match waiter {
                For::Connection(conn) => self.wake(conn),
                // Looked at in every turn.
                For::All => {}
            }
        }
        for _ in 0..HUNGRY_PER_TURN.min(self.hungry.len()) {
            if !self.spill.may_load() {
                break;
            }
            if let Some(conn) = self.hungry.pop_front() {
                self.wake(conn);
            }
        }
        if self.spill.take_failed() {
            for (conn, server) in &mut self.servers {
                if server.input.spill_failed() {
                    let taken = server.upstream.as_ref().map_or(0, Upstream::taken);
                    let before = server.input.cost_bytes();
                    give_up(*conn, &mut server.input, taken);
                    self.history_bytes = self.history_bytes + server.input.cost_bytes() - before;
                }
            }
            self.give_up_order_if_failed();
        }
    }

    /// What its server is to be given next cannot be read any more.
    pub(super) fn lose(&mut self, conn: ConnId) {
        if let Some(server) = self.servers.get_mut(&conn) {
            error!(
                conn = conn.0,
                "input cannot be read back from the disk: no server here for this connection"
            );
            server.lost = true;
            if let Some(upstream) = server.upstream.take() {
                upstream.abort();
            }
        }
    }
}

fn give_up(conn: ConnId, input: &mut Input, taken: u64) {
    if !input.given_up() {
        warn!(
            conn = conn.0,
            bytes = input.end(),
            "input history full: connection not replayable"
        );
    }
    input.give_up(taken);
}
