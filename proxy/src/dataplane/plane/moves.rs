//! When another node leads: the server behind the leader fails, closes what others' servers go on with
//! (R5), an operator says so, or the configuration.

use std::time::Duration;

use tracing::{error, info, warn};
use unbroken_group as group;
use unbroken_group::Command;

use super::super::closes::MayYield;
use super::super::context::Context;
use super::super::reports::Report;
use super::super::role::{Keeper, Role};
use super::{Plane, group_time, is_fit};
use crate::clock::BootTime;
use crate::config::Failback;
use crate::fault::planted;
use crate::health::Health;

/// A leader without a server, or with one that others' servers contradict, hands over no more often
/// than this.
pub(super) const HAND_OVER_EVERY: Duration = Duration::from_secs(1);
/// Without a connection for this long, a service counts as idle.
const IDLE_FOR: Duration = Duration::from_secs(1);

impl Plane {
    /// The other full members whose servers could go on with every connection.
    fn electable(&self) -> Vec<group::MemberStatus> {
        let me = self.group.me();
        let members = self.group.status().members.into_iter();
        members
            .filter(|m| m.full && m.member != *me && is_fit(&m.lag))
            .collect()
    }

    /// Lets another lead, for an operator; a backup passes the wish on. Says whether that could be done
    /// at this moment.
    pub(crate) fn hand_over(
        &mut self,
        now: BootTime,
        to: Option<String>,
        cx: &mut Context<'_>,
    ) -> Result<bool, String> {
        let asked = match self.role {
            _ if self.wedged => Ok(false),
            Role::Leader(_) => self.order_hand_over(now, to),
            Role::Backup(_) => {
                let report = Report::HandOver { to }.encode();
                Ok(self.group.send_to_leader(group_time(now), &report))
            }
            Role::Joining(_) | Role::Outside => Ok(false),
        };
        self.settle(now, cx);
        asked
    }

    /// Leader: begins to hand over; `false`: not at this moment.
    pub(super) fn order_hand_over(
        &mut self,
        now: BootTime,
        to: Option<String>,
    ) -> Result<bool, String> {
        if self.wedged || !matches!(self.role, Role::Leader(_)) {
            return Ok(false);
        }
        let electable = self.electable();
        match &to {
            Some(to) if **to == *self.group.me().name => return Ok(true),
            Some(to) if !electable.iter().any(|m| *m.member.name == **to) => {
                let mut members = self.group.status().members.into_iter();
                let full = members.any(|m| m.full && *m.member.name == **to);
                let why = if full {
                    "its server is not fit to lead, or behind"
                } else {
                    "it is no full member of the view"
                };
                return Err(format!("{to} cannot lead now: {why}"));
            }
            None if electable.is_empty() => {
                return Err("no other node could lead now".to_owned());
            }
            Some(_) | None => {}
        }
        info!(vip = %self.config.vip, to = to.as_deref().unwrap_or("the fittest"), "handing over as asked");
        self.command(now, Command::HandOver { to });
        Ok(true)
    }

    /// Leader: hands over if there is a reason that can wait.
    pub(super) fn yield_if_due(&mut self, now: BootTime) {
        if self.wedged || !matches!(self.role, Role::Leader(_)) {
            // The next time as leader begins its own wait.
            self.preferred_since = None;
            return;
        }
        if now >= self.hand_over_at
            && let Some(to) = self.yields(now)
        {
            self.hand_over_at = now + HAND_OVER_EVERY;
            self.command(now, Command::HandOver { to });
        }
    }

    /// Whether another should lead, and who, as this node's upkeep and the configuration go.
    fn yields(&mut self, now: BootTime) -> Option<Option<String>> {
        let resting = self.maintenance && !planted!(MaintenanceIgnored);
        if resting && self.electable().iter().any(|m| !m.lag.reluctant) {
            info!(vip = %self.config.vip, "in maintenance: handing over");
            return Some(None);
        }
        let prefer = self
            .config
            .prefer
            .clone()
            .filter(|_| !planted!(PreferenceIgnored))?;
        if *prefer == *self.group.me().name || self.config.failback == Failback::Never {
            return None;
        }
        let there = self
            .electable()
            .iter()
            .any(|m| *m.member.name == *prefer && !m.lag.reluctant);
        let idle = match &self.role {
            Role::Leader(stack) => stack.connections() == 0,
            Role::Backup(_) | Role::Joining(_) | Role::Outside => false,
        };
        let (wanted, after) = match self.config.failback {
            Failback::Never => (false, Duration::ZERO),
            Failback::Idle => (there && idle, IDLE_FOR),
            Failback::After(time) => (there, time),
        };
        if !wanted {
            self.preferred_since = None;
            return None;
        }
        let since = *self.preferred_since.get_or_insert(now);
        if now.since(since) < after {
            return None;
        }
        self.preferred_since = None;
        info!(vip = %self.config.vip, to = %prefer, "handing over to the preferred node");
        Some(Some(prefer))
    }

    /// Whether a server is known not to serve.
    pub(crate) fn server_failing(&self) -> bool {
        let unwell = self.config.health.iter().any(Health::is_failing);
        self.servers.is_down() || unwell && !planted!(HealthIgnored)
    }

    /// Leader, regularly: closes that wait are judged again, for waiting has its end, and those who could
    /// be asked change.
    pub(super) fn look_at_closes(&mut self) {
        if !matches!(self.role, Role::Leader(_)) {
            return;
        }
        if self.servers.has_close_reports() {
            let electable: Vec<_> = self.electable().into_iter().map(|m| m.member).collect();
            self.servers.keep_close_reports(&electable);
        }
        if self.servers.closes_wait() {
            self.servers.judge_again();
        }
    }

    /// A close of the local server is shown once it is agreed on; backups report theirs (R5).
    pub(super) fn agree_on_closes(&mut self, now: BootTime) {
        self.servers.check_life(now);
        match &self.role {
            Role::Leader(_) if self.servers.closes_changed() => {
                let mut electable: Vec<_> =
                    self.electable().into_iter().map(|m| m.member).collect();
                if planted!(ClosesUnagreed) {
                    electable.clear();
                }
                let may_yield = match (now >= self.yield_at, self.yielding) {
                    (true, _) => MayYield::Yes,
                    (false, true) => MayYield::UnderWay,
                    (false, false) => MayYield::No,
                };
                let bytes_out = &mut self.client_bytes_out;
                let mut keeper = Keeper {
                    role: &mut self.role,
                    now,
                    bytes_out,
                };
                let judged = self
                    .servers
                    .judge_closes(now, &electable, may_yield, &mut keeper);
                self.close_divergences += judged.diverged;
                self.contradicted |= judged.hand_over;
            }
            Role::Backup(_) => {
                let bytes_max = self.group.unicast_bytes_max();
                while let Some(report) = self.servers.poll_report(now, bytes_max) {
                    // One that is lost, or comes between two views, is repeated.
                    let _ = self.group.send_to_leader(group_time(now), &report.encode());
                }
            }
            Role::Leader(_) | Role::Joining(_) | Role::Outside => {}
        }
    }

    /// A leader whose server is gone, or closes what others' servers go on with, lets another lead
    /// (R5), if there is one that could.
    pub(super) fn hand_over_if_failing(&mut self, now: BootTime, cx: &mut Context<'_>) {
        let died = self.servers.take_dead();
        if self.lost_servers {
            return;
        }
        if died && !self.servers.begin_again(now) {
            self.lost_servers = true;
            error!(vip = %self.config.vip, "the server died, and what it was given is not kept: joining anew");
            self.command(now, Command::Leave);
            self.settle(now, cx);
            return;
        }
        let failing = died | self.server_failing();
        let contradicted = std::mem::take(&mut self.contradicted);
        let due = now >= self.hand_over_at;
        if !matches!(self.role, Role::Leader(_)) || !(failing && due || contradicted) {
            return;
        }
        if self.electable().is_empty() {
            return;
        }
        self.hand_over_at = now + HAND_OVER_EVERY;
        self.yield_at = now + HAND_OVER_EVERY;
        self.yielding = true;
        if failing {
            self.group.set_progress(group::Lag {
                behind_bytes: 0,
                unfit: true,
                reluctant: self.maintenance,
            });
            warn!(vip = %self.config.vip, "the server behind the leader is gone, or does not answer: handing over");
        } else {
            warn!(vip = %self.config.vip, "the server behind the leader closed what others' servers go on with: handing over");
        }
        self.command(now, Command::HandOver { to: None });
        self.settle(now, cx);
    }
}
