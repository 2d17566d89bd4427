//! How connections to the local server end, and what is made of it (R5): a crash is hidden, a close is
//! shown once it is agreed on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tracing::{debug, warn};
use unbroken_group::MemberId;
use unbroken_tcpstate::ConnId;

use super::super::closes::{Closed, Deed, MayYield, Shown};
use super::super::liveness::Life;
use super::super::reports::{CloseReport, Report};
use super::{
    Backend, CLOSE_PROBE, CONNECT_RETRY, Close, LIFE_EVERY, Later, OutputKeeper, Server, Servers,
    Target,
};
use crate::clock::BootTime;

/// What became of the closes that were judged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Judged {
    /// Another replica's server goes on with a connection that this one's closed.
    pub(crate) hand_over: bool,
    /// Closes that were shown although others' servers went on, or closed otherwise.
    pub(crate) diverged: u64,
}

/// What a close is held against, on a leader.
struct Asked<'a, K> {
    keeper: &'a K,
    servers: &'a HashMap<ConnId, Server>,
    backends: &'a BTreeMap<u16, Backend>,
}

impl<K: OutputKeeper> Shown for Asked<'_, K> {
    fn is_over(&self, conn: ConnId, closed: Closed) -> bool {
        match closed {
            Closed::Fin(_) => self.keeper.end_known(conn),
            Closed::Reset => !self.keeper.lives(conn),
        }
    }

    fn acked(&self, conn: ConnId) -> u64 {
        self.keeper.acked(conn)
    }

    fn close_wait(&self, conn: ConnId) -> Duration {
        let backend = self
            .servers
            .get(&conn)
            .and_then(|s| self.backends.get(&s.port));
        backend.map_or(Duration::ZERO, |b| b.close_wait)
    }
}

impl Servers {
    /// The connection to the server ended. Whether that was a close or a crash is the process's to
    /// say (R5).
    pub(super) fn on_close(
        &mut self,
        now: BootTime,
        conn: ConnId,
        close: Close,
        keeper: &impl OutputKeeper,
    ) {
        let Some(server) = self.servers.get(&conn) else {
            return;
        };
        let said = keeper.produced(conn).max(keeper.acked(conn));
        // With one order nothing of a connection can be given again by itself.
        if close == Close::Reset && server.server_offset < said && !self.ordered() {
            return self.again(now, conn);
        }
        match self.liveness.of(&server.target) {
            Life::Alive => self.closed(conn, close, keeper),
            Life::Dead => self.died(now, conn),
            Life::Unknown => self.later(conn, now + CLOSE_PROBE, Later::JudgeClose(close)),
        }
    }

    /// A connection broke before the server here had said what other replicas' servers have said on it: that is no close of
    /// theirs. (A kernel resets what stood in a listener's full queue for too long.) It is made again, and replayed.
    fn again(&mut self, now: BootTime, conn: ConnId) {
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        debug!(
            conn = conn.0,
            "the connection to the server broke too early: made again"
        );
        if server.upstream.take().is_some() {
            server.absent_since = now;
        }
        server.answer.restart();
        if server.input.complete() {
            self.later(conn, now + CONNECT_RETRY, Later::Connect);
        } else {
            server.lost = true;
        }
    }

    /// The server closed, and lived afterwards: what the others' servers do decides.
    pub(super) fn closed(&mut self, conn: ConnId, close: Close, keeper: &impl OutputKeeper) {
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        match close {
            Close::Fin if !server.ended => {
                server.ended = true;
                if !keeper.end_known(conn) {
                    let end = server.server_offset;
                    self.closes.note(conn, Closed::Fin(end), end);
                }
            }
            Close::Fin => {}
            Close::Reset => {
                server.upstream = None;
                if keeper.lives(conn) {
                    // One that was brought back may have repeated less than its predecessor had said.
                    let said = server.server_offset.max(keeper.produced(conn));
                    self.closes.note(conn, Closed::Reset, said);
                } else {
                    server.lost = true;
                }
            }
        }
    }

    /// The server died. The client is told nothing; should the server come back, it is brought to
    /// the same point by replay.
    pub(super) fn died(&mut self, now: BootTime, conn: ConnId) {
        let Some(server) = self.servers.get_mut(&conn) else {
            return;
        };
        self.dead = true;
        // Said once, however many connections it had; what it closed before is looked at in this turn.
        if !self.down.contains(&server.target) && !self.died.contains(&server.target) {
            warn!(target = ?server.target, "the local server died");
            self.died.insert(server.target.clone());
            self.life_at = now;
        }
        // A line that it did not end is not compared.
        server.answer.restart();
        server.upstream = None;
        server.ended = false;
        server.absent_since = now;
        server.absence_told = false;
        server.had_died = true;
        if server.input.complete() {
            self.later(conn, now + CONNECT_RETRY, Later::Connect);
        } else {
            server.lost = true;
        }
    }

    /// What dead servers closed before is void, and the node's earlier reports with it.
    fn void(&mut self, now: BootTime, dead: &BTreeSet<Target>) {
        let servers = &self.servers;
        let died = |conn| servers.get(&conn).is_some_and(|s| dead.contains(&s.target));
        if self.closes.own().any(died) {
            for conn in self.closes.void(died) {
                self.died(now, conn);
            }
        }
    }

    /// Looks whether the servers live, every few milliseconds.
    pub(crate) fn check_life(&mut self, now: BootTime) {
        if now < self.life_at {
            return;
        }
        self.life_at = now + LIFE_EVERY;
        for backend in self.backends.values() {
            let target = &backend.target;
            let known_down = self.down.contains(target);
            match self.liveness.of(target) {
                Life::Dead if !known_down => {
                    self.down.insert(target.clone());
                    if self.died.insert(target.clone()) {
                        warn!(?target, "the local server is gone");
                    }
                }
                Life::Alive | Life::Unknown if known_down => {
                    self.down.remove(target);
                }
                Life::Alive | Life::Dead | Life::Unknown => {}
            }
        }
        if !self.died.is_empty() {
            let died = std::mem::take(&mut self.died);
            self.void(now, &died);
            self.died.clear();
        }
    }

    /// Whether a server is known to be dead.
    pub(crate) fn is_down(&self) -> bool {
        !self.down.is_empty()
    }

    /// Leader: judges the closes that wait, and shows what is agreed on. What others' servers went on
    /// with is a reason to hand over, or shown all the same where that must not be.
    pub(crate) fn judge_closes(
        &mut self,
        now: BootTime,
        electable: &[MemberId],
        may_yield: MayYield,
        keeper: &mut impl OutputKeeper,
    ) -> Judged {
        let asked = Asked {
            keeper: &*keeper,
            servers: &self.servers,
            backends: &self.backends,
        };
        let verdicts = self.closes.judge(now, electable, &asked);
        let mut judged = Judged::default();
        let mut lives: BTreeMap<Target, Life> = BTreeMap::new();
        for (conn, closed, verdict) in verdicts {
            let Some(server) = self.servers.get_mut(&conn) else {
                continue;
            };
            // It may have died since.
            let life = match lives.get(&server.target) {
                Some(life) => *life,
                None => {
                    let life = self.liveness.of(&server.target);
                    lives.insert(server.target.clone(), life);
                    life
                }
            };
            if life == Life::Dead {
                self.closes.settle(conn);
                self.died(now, conn);
                continue;
            }
            match verdict.deed(may_yield) {
                Deed::Show => {}
                Deed::ShowDiffering => {
                    warn!(
                        conn = conn.0,
                        ?closed,
                        "the servers differ about the end of a connection"
                    );
                    judged.diverged += 1;
                }
                Deed::HandOver => {
                    debug!(conn = conn.0, "closed here, and not elsewhere");
                    judged.hand_over = true;
                    continue;
                }
                Deed::Wait => continue,
            }
            self.closes.settle(conn);
            match closed {
                Closed::Fin(_) => keeper.fin(conn),
                Closed::Reset => {
                    server.lost = true;
                    keeper.reset(conn);
                }
            }
        }
        judged
    }

    /// Whether a close waits to be judged or reported, by what has happened.
    pub(crate) fn closes_changed(&self) -> bool {
        self.closes.has_fresh()
    }

    /// Whether closes of this node's servers wait for agreement.
    pub(crate) fn closes_wait(&self) -> bool {
        self.closes.own().next().is_some()
    }

    /// Leader: whether others have reported closes that wait for this node's.
    pub(crate) fn has_close_reports(&self) -> bool {
        self.closes.has_reports()
    }

    /// Leader: forgets what others than these reported.
    pub(crate) fn keep_close_reports(&mut self, electable: &[MemberId]) {
        self.closes.keep_reports(electable);
    }

    /// All closes that wait are to be judged, or reported, again.
    pub(crate) fn judge_again(&mut self) {
        self.closes.again();
    }

    /// A view begins, with these members.
    pub(crate) fn handle_view(&mut self, members: &[MemberId]) {
        self.closes.handle_view();
        self.closes.keep_members(members);
    }

    /// Leader: a member's report.
    pub(crate) fn handle_closes(&mut self, from: &MemberId, run: u64, closes: &[CloseReport]) {
        let servers = &self.servers;
        let lives = |conn| servers.contains_key(&conn);
        self.closes.handle_report(from, run, closes, lives);
    }

    /// Backup: the next report, which has at most `bytes_max` bytes.
    pub(crate) fn poll_report(&mut self, now: BootTime, bytes_max: usize) -> Option<Report> {
        let room = bytes_max.saturating_sub(Report::OVERHEAD_BYTES);
        let max = room / CloseReport::BYTES_MAX;
        let (run, closes) = self.closes.poll_report(now, max)?;
        Some(Report::Closes { run, closes })
    }

    /// When a report is to be repeated.
    pub(crate) fn report_timeout(&self) -> Option<BootTime> {
        self.closes.poll_timeout()
    }
}
