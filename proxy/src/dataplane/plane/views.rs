//! What a plane becomes with each view: leader, backup, joiner, or nothing.

use tracing::{debug, info, warn};
use unbroken_group as group;
use unbroken_group::{Command, Installed};
use unbroken_tcpstate as tcp;
use unbroken_tcpstate::{EventNo, Replica, Stack};

use super::super::context::Context;
use super::super::role::Role;
use super::{Plane, group_time, handle_packet, moves, tcp_time};
use crate::clock::BootTime;
use crate::fault::planted;
use crate::wire::{Kind, RECEIVE_BATCH};

/// Batches of frames that a new leader takes out of its socket before its first turn.
const BATCHES_LEFT_MAX: usize = 128;

impl Plane {
    pub(super) fn wedge(&mut self) {
        if planted!(WedgeIgnored) {
            return;
        }
        self.wedged = true;
        self.changed = true;
        self.wire.fence_mut().close();
        debug!(vip = %self.config.vip, "wedged");
    }

    pub(super) fn install(&mut self, now: BootTime, installed: &Installed, cx: &mut Context<'_>) {
        let view = &installed.view;
        self.wedged = false;
        self.changed = true;
        info!(
            vip = %self.config.vip, view_id = view.id.0, leader = %view.leader(), role = ?installed.role,
            full = view.full.len(), joining = view.joining.len(), cut = installed.cut,
            k = view.k, "view installed"
        );
        if self.led_by.as_ref() != Some(view.leader()) {
            self.led_by = Some(view.leader().clone());
            let leads = *view.leader() == *self.group.me();
            self.verdict.handle_new_leader(now, leads);
            self.servers.judge_answers_anew();
        }
        self.verdict.handle_view(&view.full);
        self.servers.handle_view(&view.full);
        self.contradicted = false;
        self.donations.keep(view);
        self.yielding = false;
        let old = std::mem::take(&mut self.role);
        self.role = match (installed.role, old) {
            (group::Role::Leader, Role::Leader(stack)) if installed.survivor => Role::Leader(stack),
            (group::Role::Leader, Role::Backup(replica)) if installed.survivor => {
                self.role = self.take_over(now, installed, *replica);
                return;
            }
            (group::Role::Leader, old) => {
                drop(old);
                self.servers.clear(now);
                self.role = self.found(now, installed);
                return;
            }
            (group::Role::Backup, Role::Backup(replica)) if installed.survivor => {
                Role::Backup(replica)
            }
            (group::Role::Joining, Role::Joining(image)) => Role::Joining(image),
            // Its checkpoint is restored already; it waits to be made full.
            (group::Role::Joining, Role::Backup(replica)) => Role::Backup(replica),
            (group::Role::Joining, old) => {
                drop(old);
                self.servers.clear(now);
                Role::Joining(Box::default())
            }
            // A backup of a first view knows that no connection lives.
            (group::Role::Backup, Role::Outside | Role::Joining(_)) => {
                self.servers.clear(now);
                Role::Backup(Box::new(Replica::new(self.config.tcp.clone())))
            }
            // A leader that is led now: its stack cannot become a record, so it joins anew (R3).
            (group::Role::Backup, Role::Leader(_) | Role::Backup(_)) => {
                info!(vip = %self.config.vip, "no longer the leader: joining anew");
                self.wire.set_owner(now, false);
                self.renew(now, cx);
                return;
            }
        };
        if !matches!(self.role, Role::Leader(_)) {
            self.wire.set_owner(now, false);
        }
    }

    /// The first leader of a generation: no connection lives.
    fn found(&mut self, now: BootTime, installed: &Installed) -> Role {
        let clock = tcp::ServiceClock {
            at: tcp_time(now),
            value_us: installed.clock_us,
        };
        let stack = Stack::new(
            self.config.tcp.clone(),
            self.config.secrets.clone(),
            tcp_time(now),
            clock,
            EventNo(installed.cut).next(),
        );
        self.stable_told = EventNo(0);
        self.servers.tell_answers();
        self.claim(now);
        Role::Leader(Box::new(stack))
    }

    /// A backup becomes the leader: every connection is rebuilt from its record.
    fn take_over(&mut self, now: BootTime, installed: &Installed, replica: Replica) -> Role {
        // What is ahead by half of all TSvals is behind.
        let ahead_us = u64::from(planted!(ClockNotCarried)) * (1000 << 31);
        let clock = tcp::ServiceClock {
            at: tcp_time(now),
            value_us: installed.clock_us + ahead_us,
        };
        let mut stack = Stack::take_over(
            self.config.tcp.clone(),
            self.config.secrets.clone(),
            tcp_time(now),
            clock,
            EventNo(installed.cut).next(),
            replica,
        );
        self.takeovers += 1;
        self.yield_at = now + moves::HAND_OVER_EVERY;
        for conn in self.servers.connections() {
            if self.servers.serves(conn) {
                stack.handle_consumed(tcp_time(now), conn, self.servers.taken(conn));
            } else {
                // Nobody here can answer it: told plainly rather than left hanging.
                warn!(conn = conn.0, "no server for this connection here: reset");
                stack.handle_server_reset(tcp_time(now), conn);
            }
            self.servers.wake(conn);
        }
        info!(vip = %self.config.vip, connections = stack.connections(), "took over");
        self.servers.tell_answers();
        self.stable_told = EventNo(0);
        if self.config.keeps_recent && !planted!(GapForgotten) {
            self.replay_recent(now, &mut stack);
        }
        self.claim(now);
        Role::Leader(Box::new(stack))
    }

    /// The first input of a new leader is what clients sent while nobody led.
    fn replay_recent(&mut self, now: BootTime, stack: &mut Stack) {
        let recent = &mut self.recent;
        for _ in 0..BATCHES_LEFT_MAX {
            let received = self.wire.receive(now, |frame| recent.keep(now, &frame));
            match received {
                Ok(RECEIVE_BATCH) => {}
                Ok(_) => break,
                Err(error) => {
                    warn!(vip = %self.config.vip, %error, "receiving frames");
                    break;
                }
            }
        }
        debug!(vip = %self.config.vip, frames = recent.len(), "frames from before the takeover");
        recent.replay(now, |frame| {
            if let Kind::Ip(packet) = frame.kind {
                handle_packet(stack, now, packet, &frame);
            }
        });
    }

    /// Claims the address; frames from before are stale.
    fn claim(&mut self, now: BootTime) {
        self.wire.discard_input();
        self.wire.set_owner(now, true);
        self.wire.handle_timeout(now);
        self.wire_readable = true;
    }

    /// This incarnation is out of the group.
    pub(super) fn outside(&mut self, now: BootTime, cx: &mut Context<'_>) {
        self.wire.set_owner(now, false);
        self.changed = true;
        if self.stopping || self.verdict.is_out() {
            self.servers.clear(now);
            self.role = Role::Outside;
            self.wedged = false;
            self.stopped = self.stopping;
        } else {
            info!(vip = %self.config.vip, "out of the view: joining anew");
            self.renew(now, cx);
        }
    }

    /// A new life in the group: every upstream connection is closed first (R3).
    pub(super) fn renew(&mut self, now: BootTime, cx: &mut Context<'_>) {
        self.servers.clear(now);
        self.verdict.handle_new_life();
        self.recent.clear();
        self.role = Role::Outside;
        self.wedged = false;
        self.changed = true;
        self.life += 1;
        self.join_again_at = None;
        self.lost_servers = false;
        let config = (self.config.group)();
        cx.renew(self.config.index, config.me.clone());
        self.group = group::Core::new(config, super::super::seed(), group_time(now));
        self.command(now, Command::Join);
    }
}
