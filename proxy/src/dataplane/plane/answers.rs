//! What a plane does about its servers' answers: a leader tells them, a backup compares and acts.

use tracing::{info, warn};
use unbroken_group as group;
use unbroken_group::Command;

use super::super::context::Context;
use super::super::reports::Report;
use super::super::role::Role;
use super::super::servers::VOTES_MAX;
use super::super::verdict::Action;
use super::super::verdict::DivergenceReport;
use super::moves::HAND_OVER_EVERY;
use super::{Plane, group_time};
use crate::clock::BootTime;
use crate::fault::planted;

impl Plane {
    /// Leader: tells the others what its servers have answered.
    pub(super) fn tell_answers(&mut self, now: BootTime) {
        if let Role::Leader(stack) = &mut self.role {
            while let Some((conn, marks)) = self.servers.poll_marks(now) {
                stack.handle_output_marks(conn, marks);
            }
        }
    }

    /// Backup: acts on what its servers answered otherwise than the leader's.
    pub(super) fn judge_answers(&mut self, now: BootTime, cx: &mut Context<'_>) {
        if self.wedged || !matches!(self.role, Role::Backup(_)) {
            return;
        }
        for divergence in self.servers.take_divergences() {
            let found = divergence.found;
            warn!(
                vip = %self.config.vip, port = divergence.port, conn = divergence.conn.0,
                agreed = found.agreed, before = found.before, first = ?found.first,
                "the server here answered otherwise than the leader's"
            );
            let full = self.group.status().view.map_or(0, |view| view.full.len());
            self.verdict.handle_divergence(now, divergence, full > 2);
            self.progress_at = now;
            self.changed = true;
        }
        if let Some(found) = self.verdict.doubted_at()
            && self.servers.agrees_beyond(found.conn, found.found.before)
        {
            self.verdict.acquit();
            self.progress_at = now;
            self.changed = true;
        }
        for (conn, vote) in self.servers.take_votes() {
            self.verdict.handle_vote(conn, vote);
        }
        if let Some(reports) = self.verdict.poll_reports(now) {
            let report = Report::Diverged(reports).encode();
            // One that is lost, or comes between two views, is repeated.
            let _ = self.group.send_to_leader(group_time(now), &report);
            self.settle(now, cx);
        }
        match self.verdict.poll_action(now) {
            Some(Action::Renew) => {
                warn!(vip = %self.config.vip, "joining anew: what the server here answers is brought up by replay");
                self.renew(now, cx);
            }
            Some(Action::Leave) => {
                let reason = self.verdict.reason(now).unwrap_or_default();
                warn!(vip = %self.config.vip, reason, "leaving the view");
                self.command(now, Command::Leave);
                self.settle(now, cx);
            }
            None => {}
        }
    }

    pub(super) fn handle_divergence(
        &mut self,
        now: BootTime,
        from: &group::MemberId,
        reports: &[DivergenceReport],
    ) {
        self.changed = true;
        let mut outvoted = None;
        for report in reports.iter().take(VOTES_MAX) {
            if self.verdict.handle_report(from, *report) {
                outvoted = Some(report);
            }
        }
        if let Some(report) = outvoted
            && matches!(self.role, Role::Leader(_))
            && now >= self.hand_over_at
            && !planted!(OutvotedLeads)
        {
            self.hand_over_at = now + HAND_OVER_EVERY;
            warn!(
                vip = %self.config.vip, conn = report.conn, before = report.before,
                "two other servers agree with each other and not with the leader's: handing over"
            );
            self.command(now, Command::HandOver { to: None });
        }
    }

    /// One that has left for a time joins anew when it is over.
    pub(super) fn rejoin_if_due(&mut self, now: BootTime, cx: &mut Context<'_>) {
        if self.verdict.rejoin_due(now) {
            info!(vip = %self.config.vip, "joining anew after a divergence");
            self.renew(now, cx);
        }
    }
}
