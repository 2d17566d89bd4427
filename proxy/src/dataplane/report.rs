//! What the data plane says about itself: status for people, metrics for Prometheus (R6).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use unbroken_group::{GroupStatus, MemberStatus as GroupMember, Role as GroupRole};

use super::Note;
use super::catchup::{Estimate, Step};
use super::divergence::Divergence;
use super::plane::{BEHIND_BYTES_MAX, Plane, mac_text};
use super::role::Role;
use super::servers::Outlook;
use crate::clock::BootTime;
use crate::config::{Config, FenceMode};
use crate::fault::planted;
use crate::metrics::{NodeMetrics, ServiceMetrics};
use crate::status::{
    Board, CatchUpStage, DivergenceStatus, LeaseStatus, MemberState, MemberStatus, Redundancy,
    Role as StatusRole, ServiceCounters, ServiceStatus, ViewStatus,
};

/// How often the status is written when nothing striking has happened.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// Who is less behind than this is up to date, if he was further behind before.
const CAUGHT_UP_BYTES: u64 = 64 << 10;

/// How long a foreign announcement is shown.
const ALARM_LASTS: Duration = Duration::from_secs(60);

/// Writes status and metrics of all planes.
pub(crate) struct Reporter {
    board: Board,
    me: String,
    configured: Vec<String>,
    /// A backup that was silent for so long could not take over, as far as the leader knows.
    silence_us: u64,
    /// For each plane, its services: where they stand on the board, and their metrics.
    services: Vec<Vec<(usize, ServiceMetrics)>>,
    next: BootTime,
    /// For each plane, of the members that are being brought up to date, by name.
    estimates: Vec<BTreeMap<String, Option<Estimate>>>,
    /// Which planes led when it was last looked.
    led: Vec<bool>,
}

impl Reporter {
    pub(crate) fn new(config: &Config, board: Board, metrics: &NodeMetrics) -> Self {
        let place = |name: &str| config.services.iter().position(|s| s.name == name);
        let services = config
            .vips()
            .iter()
            .map(|vip| {
                let of_vip = vip.services.iter();
                of_vip
                    .filter_map(|s| Some((place(&s.name)?, metrics.service(&s.name))))
                    .collect()
            })
            .collect();
        Self {
            board,
            me: config.node.name.clone(),
            configured: config.group.members.keys().cloned().collect(),
            silence_us: u64::try_from(4 * config.group.suspect_after.as_micros())
                .unwrap_or(u64::MAX),
            services,
            next: BootTime::from_micros(0),
            estimates: config.vips().iter().map(|_| BTreeMap::new()).collect(),
            led: vec![false; config.vips().len()],
        }
    }

    /// Writes what is due.
    pub(crate) fn report(
        &mut self,
        now: BootTime,
        planes: &mut [Plane],
        notes: &UnboundedSender<Note>,
    ) {
        let changed = planes.iter().any(|p| p.changed);
        if !changed && now < self.next {
            return;
        }
        self.next = now + REPORT_EVERY;
        let mut reports = Vec::with_capacity(planes.len());
        let mut estimates = std::mem::take(&mut self.estimates);
        for (plane, estimates) in planes.iter().zip(&mut estimates) {
            reports.push(self.look(now, plane, estimates));
        }
        self.estimates = estimates;
        if changed && planes.iter().any(|p| matches!(p.role, Role::Leader(_))) {
            // The control plane is gone only when the node stops.
            let _ = notes.send(Note::Leading);
        }
        for (index, (led, plane)) in self.led.iter_mut().zip(planes.iter()).enumerate() {
            let leads = matches!(plane.role, Role::Leader(_));
            if std::mem::replace(led, leads) != leads {
                let view = plane.group.status().view.map_or(0, |view| view.id.0);
                let _ = notes.send(Note::Turn {
                    plane: index,
                    leads,
                    view,
                });
            }
        }
        let services = &self.services;
        let written = self.board.try_update(|status| {
            for (report, places) in reports.iter_mut().zip(services) {
                if !status.coordinator.quorum && !planted!(QuorumUnneeded) {
                    report.redundancy = Redundancy::Unprotected;
                    let further = report.reason.take();
                    let further = further.map_or(String::new(), |reason| format!("; {reason}"));
                    report.reason = Some(format!(
                        "no quorum of coordinators: nobody could take over{further}"
                    ));
                }
                for (place, _) in places {
                    if let Some(service) = status.services.get_mut(*place) {
                        report.write(service);
                    }
                }
            }
        });
        for (report, places) in reports.iter().zip(&self.services) {
            for (_, metrics) in places {
                report.measure(metrics);
            }
        }
        if written {
            planes.iter_mut().for_each(|p| p.changed = false);
        }
    }

    fn look(
        &self,
        now: BootTime,
        plane: &Plane,
        estimates: &mut BTreeMap<String, Option<Estimate>>,
    ) -> Report {
        let group = plane.group.status();
        let role = if plane.wedged {
            StatusRole::Wedged
        } else {
            plane.role.status()
        };
        let (behind, lost) = plane.servers.lag(now);
        let failing = plane.server_failing();
        let lost = lost + usize::from(failing);
        let (redundancy, reason) = self.redundancy(now, &group, behind, lost, plane);
        let (redundancy, reason) = with_outlook(redundancy, reason, plane.servers.outlook());
        let members = self.members(now, plane, &group, estimates);
        let (redundancy, mut reason) = with_progress(redundancy, reason, &members, &self.me);
        let kept = plane.servers.kept();
        if kept.not_replayable > 0 {
            let count = kept.not_replayable;
            let what = format!(
                "{count} connections have had more input than history.memory and history.disk hold: \
                 no replica that joins can be brought up with them"
            );
            reason =
                Some(reason.map_or_else(|| what.clone(), |reason| format!("{reason}; {what}")));
        }
        if let Some(own) = plane.verdict.reason(now) {
            reason = Some(own);
        }
        if failing {
            let rest = reason.map_or_else(String::new, |rest| format!("; {rest}"));
            reason = Some(format!("the server on this node does not serve{rest}"));
        }
        let view = group
            .view
            .as_ref()
            .map_or_else(ViewStatus::default, |view| ViewStatus {
                id: view.id.0,
                members: view.full.iter().map(|m| m.name.to_string()).collect(),
                joining: view
                    .joining
                    .iter()
                    .map(|j| j.member.name.to_string())
                    .collect(),
                cut: view.cut,
                k: u32::from(view.k),
            });
        let lease = matches!(plane.role, Role::Leader(_)).then(|| {
            let until = group.lease_until.map_or(0, |t| t.micros());
            LeaseStatus {
                held: until > now.micros() && !plane.wedged,
                remaining_ms: until.saturating_sub(now.micros()) / 1000,
            }
        });
        let wire = plane.wire.counters();
        let connections = match &plane.role {
            Role::Leader(stack) => stack.connections(),
            Role::Backup(replica) => replica.connections(),
            Role::Joining(_) | Role::Outside => 0,
        };
        Report {
            leader: group.view.as_ref().map(|v| v.leader().name.to_string()),
            role,
            members,
            view,
            redundancy,
            reason,
            connections: connections as u64,
            lease,
            alarm: alarm(now, plane, wire.foreign_claims, kept.alarm),
            fence: if plane.wire.fence().is_in_kernel() {
                FenceMode::Kernel
            } else {
                FenceMode::Process
            },
            divergence: plane.verdict.latest().map(Divergence::status),
            counters: ServiceCounters {
                last_event: plane.last_event,
                stable_event: group.stable,
                connections_opened: plane.opened,
                client_bytes_in: plane.client_bytes_in,
                client_bytes_out: plane.client_bytes_out,
                frames_in: wire.frames_in,
                frames_out: wire.frames_out,
                takeovers: plane.takeovers,
                divergences: plane.verdict.count(),
                datagrams_dropped: group.counters.malformed
                    + group.counters.wrong_view
                    + group.counters.stranger,
                history_bytes: kept.memory_bytes,
                history_disk_bytes: kept.disk_bytes,
                not_replayable: kept.not_replayable,
                close_divergences: plane.close_divergences,
            },
            fenced: wire.fenced,
            foreign_claims: wire.foreign_claims,
            views: group.counters.views,
            resets: plane.resets,
            issued: plane.issued,
            delivered: plane.delivered,
            dropped_datagrams: [
                ("malformed", group.counters.malformed),
                ("wrong-view", group.counters.wrong_view),
                ("not-a-member", group.counters.stranger),
            ],
            dropped_packets: plane.dropped_packets(),
        }
    }

    fn members(
        &self,
        now: BootTime,
        plane: &Plane,
        group: &GroupStatus,
        estimates: &mut BTreeMap<String, Option<Estimate>>,
    ) -> Vec<MemberStatus> {
        let leading = group.role == Some(GroupRole::Leader);
        let of = |name: &str| group.members.iter().find(|m| *m.member.name == *name);
        self.configured
            .iter()
            .map(|name| {
                let member = of(name);
                MemberStatus {
                    name: name.clone(),
                    state: match member {
                        Some(m) if m.full => MemberState::Full,
                        Some(_) => MemberState::Joining,
                        None => MemberState::Absent,
                    },
                    lag_events: member
                        .filter(|_| leading && *name != self.me)
                        .map(|m| group.held.saturating_sub(m.held)),
                    last_heard_ms: member
                        .and_then(|m| m.last_heard)
                        .map(|t| now.micros().saturating_sub(t.micros()) / 1000),
                    catching_up: {
                        let slot = estimates.entry(name.clone()).or_default();
                        let step = member.and_then(|m| self.step(plane, group, m, slot.is_some()));
                        match step {
                            Some(step) => Some(Estimate::step(slot, now, step)),
                            None => {
                                *slot = None;
                                None
                            }
                        }
                    },
                }
            })
            .collect()
    }

    /// What a member lacks, if it is being brought up to date. Of others only the leader knows.
    fn step(
        &self,
        plane: &Plane,
        group: &GroupStatus,
        member: &GroupMember,
        begun: bool,
    ) -> Option<Step> {
        let behind_bytes = if *member.member.name == *self.me {
            if let Some(step) = plane.own_step() {
                return Some(step);
            }
            plane.servers.behind_bytes()
        } else if group.role == Some(GroupRole::Leader) {
            if let Some(total) = plane.donations.total_bytes(&member.member)
                && let Some(asked) = group.transfers.get(&member.member)
                && *asked < total
                && !member.full
            {
                return Some(Step {
                    stage: CatchUpStage::Transfer,
                    left_bytes: total - asked,
                    total_bytes: Some(total),
                });
            }
            member.lag.behind_bytes
        } else {
            return None;
        };
        let far = behind_bytes > BEHIND_BYTES_MAX || (begun && behind_bytes > CAUGHT_UP_BYTES);
        far.then_some(Step {
            stage: CatchUpStage::Replay,
            left_bytes: behind_bytes,
            total_bytes: None,
        })
    }

    /// Whether the leader's death would cost a client anything, and why. Only the leader knows how
    /// far the others are; a backup judges by the view and by itself.
    fn redundancy(
        &self,
        now: BootTime,
        group: &GroupStatus,
        behind: u64,
        lost: usize,
        plane: &Plane,
    ) -> (Redundancy, Option<String>) {
        let Some(view) = &group.view else {
            return (
                Redundancy::Unprotected,
                Some("this node is in no view".to_owned()),
            );
        };
        let leading = group.role == Some(GroupRole::Leader);
        let heard = |m: &GroupMember| {
            m.last_heard
                .is_some_and(|t| now.micros().saturating_sub(t.micros()) < self.silence_us)
        };
        let fit = |m: &&GroupMember| {
            let own = *m.member.name == *self.me;
            if leading && !own && !heard(m) && !planted!(SilenceUnseen) {
                return false;
            }
            let behind = if own { behind } else { m.lag.behind_bytes };
            let unfit = if own {
                lost > 0 || plane.verdict.unfit()
            } else {
                m.lag.unfit
            };
            m.full && m.member != *view.leader() && !unfit && behind <= BEHIND_BYTES_MAX
        };
        let able = group.members.iter().filter(fit).count();
        let wanted = self.configured.len() - 1;
        let full = view.full.len() - 1;
        if able >= wanted {
            return (Redundancy::Protected, None);
        }
        let joining = view.joining.len();
        let behind = full - able.min(full);
        let why = if joining > 0 {
            format!("{able} of {wanted} backups could take over; {joining} joining")
        } else if behind > 0 {
            format!("{able} of {wanted} backups could take over; {behind} behind or silent")
        } else {
            format!(
                "{able} of {wanted} backups could take over; {} not there",
                wanted - full
            )
        };
        let odd: Vec<&str> = view
            .full
            .iter()
            .filter(|m| plane.verdict.accused_by(m))
            .map(|m| &*m.name)
            .collect();
        let why = if odd.is_empty() {
            why
        } else {
            format!(
                "{why}; answers otherwise than this node: {}",
                odd.join(", ")
            )
        };
        let state = if able > 0 {
            Redundancy::Degraded
        } else if joining + behind > 0 {
            Redundancy::CatchingUp
        } else {
            Redundancy::Unprotected
        };
        (state, Some(why))
    }
}

/// Adds what this node knows of its own servers with one order.
fn with_outlook(
    redundancy: Redundancy,
    reason: Option<String>,
    outlook: Outlook,
) -> (Redundancy, Option<String>) {
    let own = match outlook {
        Outlook::Even | Outlook::Replaying { .. } => return (redundancy, reason),
        Outlook::NoHistory => {
            "more input than history.memory and history.disk hold: a replica that is lost cannot come back"
                .to_owned()
        }
        Outlook::Begins => "this node's server begins anew".to_owned(),
    };
    let redundancy = match redundancy {
        Redundancy::Protected => Redundancy::Degraded,
        other => other,
    };
    let reason = reason.map_or_else(|| own.clone(), |reason| format!("{reason}; {own}"));
    (redundancy, Some(reason))
}

/// Adds who is being brought up to date, and how far that is.
fn with_progress(
    redundancy: Redundancy,
    reason: Option<String>,
    members: &[MemberStatus],
    me: &str,
) -> (Redundancy, Option<String>) {
    let progress = |m: &MemberStatus| Some(format!("{} {}", m.name, m.catching_up?));
    let told: Vec<String> = reason
        .into_iter()
        .chain(members.iter().filter_map(progress))
        .collect();
    let own = members
        .iter()
        .any(|m| m.name == me && m.catching_up.is_some());
    let redundancy = match redundancy {
        Redundancy::Protected if own => Redundancy::Degraded,
        other => other,
    };
    (redundancy, (!told.is_empty()).then(|| told.join("; ")))
}

/// What an operator should look at.
fn alarm(now: BootTime, plane: &Plane, claims: u64, disk: Option<String>) -> Option<String> {
    let claimed = plane.claimed.and_then(|(by, at)| {
        let ago = now.since(at);
        let (mac, vip) = (mac_text(by), plane.config.vip);
        (ago < ALARM_LASTS).then(|| {
            let ago = ago.as_secs();
            format!("{mac} announces {vip} too: {claims} times, the last {ago} s ago")
        })
    });
    let all: Vec<String> = claimed.into_iter().chain(disk).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// One plane at one moment.
struct Report {
    leader: Option<String>,
    role: StatusRole,
    view: ViewStatus,
    redundancy: Redundancy,
    reason: Option<String>,
    connections: u64,
    lease: Option<LeaseStatus>,
    fence: FenceMode,
    alarm: Option<String>,
    members: Vec<MemberStatus>,
    divergence: Option<DivergenceStatus>,
    counters: ServiceCounters,
    fenced: u64,
    foreign_claims: u64,
    views: u64,
    resets: u64,
    issued: u64,
    delivered: u64,
    dropped_datagrams: [(&'static str, u64); 3],
    dropped_packets: [(&'static str, u64); 5],
}

impl Report {
    fn write(&self, service: &mut ServiceStatus) {
        service.leader.clone_from(&self.leader);
        service.role = self.role;
        service.view.clone_from(&self.view);
        service.redundancy = self.redundancy;
        service.redundancy_reason.clone_from(&self.reason);
        service.connections = self.connections;
        service.lease = self.lease;
        service.alarm.clone_from(&self.alarm);
        service.fence = Some(self.fence);
        service.members.clone_from(&self.members);
        service.divergence = self.divergence;
        service.counters = self.counters;
    }

    fn measure(&self, metrics: &ServiceMetrics) {
        let c = &self.counters;
        let raise = |counter: &prometheus_client::metrics::counter::Counter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        raise(&metrics.frames_received, c.frames_in);
        raise(&metrics.frames_sent, c.frames_out);
        raise(&metrics.connections_opened, c.connections_opened);
        raise(&metrics.client_input, c.client_bytes_in);
        raise(&metrics.client_output, c.client_bytes_out);
        raise(&metrics.takeovers, c.takeovers);
        raise(&metrics.divergences, c.divergences);
        raise(&metrics.views_installed, self.views);
        raise(&metrics.connections_reset, self.resets);
        raise(&metrics.close_divergences, c.close_divergences);
        raise(&metrics.events_issued, self.issued);
        raise(&metrics.events_delivered, self.delivered);
        for (reason, count) in self.dropped_datagrams {
            raise(&metrics.datagrams_dropped(reason), count);
        }
        for (reason, count) in self.dropped_packets {
            raise(&metrics.packets_dropped(reason), count);
        }
        raise(&metrics.fenced, self.fenced);
        raise(&metrics.foreign_announcements, self.foreign_claims);
        metrics.connections.set(self.connections);
        metrics
            .stable_lag
            .set(c.last_event.saturating_sub(c.stable_event));
        metrics.history.set(c.history_bytes);
        metrics.history_disk.set(c.history_disk_bytes);
        metrics.not_replayable.set(c.not_replayable);
        metrics.view_id.set(self.view.id);
        metrics.full_members.set(self.view.members.len() as u64);
        metrics
            .leading
            .set(u64::from(self.role == StatusRole::Leader));
        metrics
            .lease_held
            .set(u64::from(self.lease.is_some_and(|l| l.held)));
        metrics.set_redundancy(self.redundancy);
        for member in &self.members {
            if let Some(lag) = member.lag_events {
                metrics.member_lag(&member.name).set(lag);
            }
        }
    }
}
