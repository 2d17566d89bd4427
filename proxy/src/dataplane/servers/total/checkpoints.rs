//! Checkpoints of servers with shared state: the state of a running server, taken by a command of the
//! user, in place of all inputs that led to it.
//!
//! The state must be that after one event exactly. So the command runs while the server is given
//! nothing and has taken everything; and what it has answered must have been read. The server's
//! connections are not in it: whoever begins from it opens them anew, where they stood.

use std::time::Duration;

use mio::Registry;
use tracing::{info, warn};

use super::super::super::spill;
use super::super::{Input, OutputKeeper, Servers};
use super::{Base, Live, Order, Progress, Taking, Waiting};
use crate::clock::BootTime;

/// A replica takes a checkpoint when its history fills this part of its bound, in eighths; the
/// leader, whose clients wait meanwhile, later: by then it may lead no more.
const BACKUP_EIGHTHS: u64 = 4;
const LEADER_EIGHTHS: u64 = 6;
/// How long an answer is waited for before a checkpoint.
const LISTEN: Duration = Duration::from_millis(1);
/// A server that has not answered for so long does not answer every input.
const SILENT_AFTER: Duration = Duration::from_secs(5);
/// Between two attempts, and after one that failed.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
const FAILED_AFTER: Duration = Duration::from_secs(10);
/// For how long a server is given nothing for the sake of a checkpoint.
const BACKUP_HOLD_MAX: Duration = Duration::from_secs(300);
const LEADER_HOLD_MAX: Duration = Duration::from_secs(1);

impl Servers {
    /// Takes a checkpoint if one is due, and goes on with one that is being taken. False: the servers
    /// are to be given nothing. To be called when they have taken everything.
    pub(super) fn checkpoint(
        &mut self,
        now: BootTime,
        order: &mut Order,
        keeper: &impl OutputKeeper,
    ) -> bool {
        let Some(taking) = &order.attempt else {
            return !self.begin_checkpoint(now, order, keeper);
        };
        let progress: Vec<Progress> = taking.attempts.iter().map(|a| a.progress()).collect();
        let again = |order: &mut Order, after| {
            order.attempt = None;
            order.attempt_after = now + after;
            true
        };
        let is = |f: fn(&Progress) -> bool| progress.iter().any(f);
        if is(|p| matches!(p, Progress::Failed)) {
            return again(order, FAILED_AFTER);
        }
        if is(|p| matches!(p, Progress::NotNow)) {
            return again(order, AGAIN_AFTER);
        }
        if taking.live.is_none() {
            if is(|p| matches!(p, Progress::Running)) {
                let max = if keeper.leads() {
                    LEADER_HOLD_MAX
                } else {
                    BACKUP_HOLD_MAX
                };
                if now.since(taking.since) > max {
                    warn!(
                        ?max,
                        "taking a checkpoint keeps the server too long: given up"
                    );
                    return again(order, FAILED_AFTER);
                }
                return false;
            }
            if let Some(taking) = order.attempt.as_mut()
                && !std::mem::replace(&mut taking.ripe, true)
            {
                return false;
            }
            let live = self.live();
            let Some(taking) = order.attempt.as_mut().filter(|_| live.is_some()) else {
                return again(order, AGAIN_AFTER);
            };
            taking.live = live;
        }
        if progress.iter().all(|p| matches!(p, Progress::Done(_))) {
            order.finish_checkpoint(now, progress);
        }
        true
    }

    fn begin_checkpoint(
        &mut self,
        now: BootTime,
        order: &mut Order,
        keeper: &impl OutputKeeper,
    ) -> bool {
        let eighths = if keeper.leads() {
            LEADER_EIGHTHS
        } else {
            BACKUP_EIGHTHS
        };
        let full = order.history.bytes() >= order.history_bytes_max / 8 * eighths;
        let possible =
            !order.runners.is_empty() && order.runners.iter().all(|r| r.has_checkpoints());
        let due = full || !order.history.complete();
        // With a part of the connections in an unfit state it is of no use.
        if !due || !possible || now < order.attempt_after || order.replay.is_some() {
            return false;
        }
        if self.live().is_none() || (!order.history.complete() && order.behind() > 0) {
            order.attempt_after = now + AGAIN_AFTER;
            return false;
        }
        // In the midst of a request is no moment for it; and a server that has answered is seldom there.
        let due_since = *order.due_since.get_or_insert(now);
        if !order.spoke && now.since(due_since) < SILENT_AFTER {
            if !std::mem::replace(&mut order.listening, true) {
                order.hold_until = order.hold_until.max(now + LISTEN);
            }
            return false;
        }
        let place = order.place();
        if !order.history.mark(place) {
            order.attempt_after = now + AGAIN_AFTER;
            return false;
        }
        order.history.record();
        order.attempt = Some(Taking {
            attempts: order.runners.iter().map(|r| r.checkpoint()).collect(),
            since: now,
            place,
            cost_bytes: order.given_cost,
            given: self.given.unwrap_or_default(),
            live: None,
            ripe: false,
        });
        true
    }

    /// The connections as whoever begins from here shall open them; `None` if one is in a state that
    /// an opened one cannot be in, or its server's answers are not all read.
    fn live(&self) -> Option<Vec<Live>> {
        let mut live = Vec::with_capacity(self.servers.len());
        for conn in self.connections() {
            let server = &self.servers[&conn];
            let upstream = server.upstream.as_ref().filter(|u| u.connected())?;
            let half = server.ended || server.lost || server.closing.is_some() || upstream.shut();
            if half || upstream.unread() || upstream.taken() < server.input.end() {
                return None;
            }
            live.push(Live {
                conn,
                port: server.port,
                taken: upstream.taken(),
                produced: server.server_offset,
            });
        }
        Some(live)
    }

    /// Opens a connection of the checkpoint that the servers began from, where it stood.
    pub(super) fn reopen(
        &mut self,
        now: BootTime,
        live: &Live,
        order: &mut Order,
        registry: &Registry,
        keeper: &mut impl OutputKeeper,
    ) {
        let conn = live.conn;
        let number = unbroken_tcpstate::EventNo(conn.0);
        self.open(now, conn, live.port, Input::default(), number, registry);
        if let Some(server) = self.servers.get_mut(&conn) {
            server.input = Input::starting_at(live.taken);
            server.server_offset = live.produced;
            if let Some(upstream) = server.upstream.as_mut() {
                upstream.start_at(live.taken);
            }
        }
        keeper.resumes(conn, live.produced);
        order.pristine = false;
        order.waiting = Some(Waiting::new(now, conn, number, true, false));
    }
}

impl Order {
    fn finish_checkpoint(&mut self, now: BootTime, images: Vec<Progress>) {
        let Some(taking) = self.attempt.take() else {
            return;
        };
        let images: Vec<_> = images
            .into_iter()
            .filter_map(|p| match p {
                Progress::Done(image) => Some(image),
                _ => None,
            })
            .collect();
        let bytes: u64 = images.iter().map(|image| spill::total(image)).sum();
        info!(
            bytes,
            event = taking.given.0,
            took = ?now.since(taking.since),
            "checkpoint of the servers taken"
        );
        self.history.cut(taking.place, taking.cost_bytes);
        self.given_cost -= taking.cost_bytes;
        self.skips.retain(|(_, number)| *number > taking.given);
        self.base = Some(Base {
            images,
            live: taking.live.unwrap_or_default(),
        });
        self.attempt_after = now + AGAIN_AFTER;
        self.due_since = None;
    }
}
