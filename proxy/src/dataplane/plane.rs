//! One VIP on this node: its group, its wire, its role, and the local servers behind it.
//!
//! A plane executes what the cores ask for, in order, and makes no protocol decision of its own.

mod answers;
mod joining;
mod moves;
mod views;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tracing::{debug, error, warn};
use unbroken_group as group;
use unbroken_group::{Command, Output as GroupOutput, RegistryReply};
use unbroken_tcpstate as tcp;
use unbroken_tcpstate::{ConnId, Event, EventNo, Output as TcpOutput, Stack};

use self::joining::Donations;
use super::context::Context;
use super::recent::Recent;
use super::reports::Report;
use super::role::{Keeper, Role};
use super::servers::Servers;
use super::verdict::Verdict;
use crate::clock::BootTime;
use crate::config::{self, Failback};
use crate::fault::planted;
use crate::health::Health;
use crate::registry::{Node, Operation, Request};
use crate::wire::{Flushed, Frame, Kind, Mac, OutPacket, RECEIVE_BATCH, Wire};

/// What does not change in a plane's life.
pub(crate) struct PlaneConfig {
    pub(crate) index: usize,
    pub(crate) vip: IpAddr,
    /// A backup hears what clients send, and keeps the last of it.
    pub(crate) keeps_recent: bool,
    /// The group's znode.
    pub(crate) znode: Arc<str>,
    pub(crate) tcp: tcp::Config,
    pub(crate) secrets: tcp::Secrets,
    /// The group core's configuration, without an incarnation.
    pub(crate) group: GroupTemplate,
    /// What becomes of a replica whose server answered otherwise, by port.
    pub(crate) divergence: BTreeMap<u16, config::Divergence>,
    /// The member that should lead, and when it is handed over to.
    pub(crate) prefer: Option<String>,
    pub(crate) failback: Failback,
    /// Of the servers that are asked.
    pub(crate) health: Vec<Health>,
}

/// Makes a group configuration for each life of this member.
pub(crate) type GroupTemplate = Box<dyn Fn() -> group::Config + Send>;

/// At most this many batches of frames a turn: whoever answers heartbeats works in short slices.
const BATCHES_PER_TURN: usize = 2;
/// How often progress is reported to the group.
const PROGRESS_EVERY: Duration = Duration::from_millis(10);
/// A replica that was given what it cannot use asks again after this long.
const JOIN_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// A foreign announcement of our address is logged no more often than this.
const CLAIM_SAID_EVERY: Duration = Duration::from_secs(10);
/// What the other fields of an event take beside its payload, roughly.
const EVENT_OVERHEAD_BYTES: usize = 64;
/// A server that is further behind than this cannot take over without being waited for.
pub(crate) const BEHIND_BYTES_MAX: u64 = 4 << 20;

/// One VIP.
pub(crate) struct Plane {
    pub(crate) config: PlaneConfig,
    pub(crate) group: group::Core,
    pub(crate) wire: Wire,
    pub(crate) role: Role,
    pub(crate) servers: Servers,
    pub(crate) verdict: Verdict,
    /// Promised to leave the view: nothing is issued, fed or released.
    pub(crate) wedged: bool,
    /// Which life of the group core this is.
    pub(crate) life: u64,
    pub(crate) takeovers: u64,
    pub(crate) opened: u64,
    pub(crate) resets: u64,
    /// Closes that were shown although other replicas' servers went on, or closed otherwise.
    pub(crate) close_divergences: u64,
    pub(crate) issued: u64,
    pub(crate) delivered: u64,
    pub(crate) client_bytes_in: u64,
    pub(crate) client_bytes_out: u64,
    pub(crate) last_event: u64,
    /// The view changed, or the role: the status is written at once.
    pub(crate) changed: bool,
    pub(crate) stopped: bool,
    /// This node leads only where no other could.
    pub(crate) maintenance: bool,
    stopping: bool,
    /// Who led the view installed last.
    led_by: Option<group::MemberId>,
    wire_readable: bool,
    progress_at: BootTime,
    join_again_at: Option<BootTime>,
    /// It leaves its view, since it cannot bring its servers up again.
    pub(crate) lost_servers: bool,
    /// Checkpoints that are being given, or to be read from the disk for that.
    pub(crate) donations: Donations,
    hand_over_at: BootTime,
    /// What clients sent in the last moments, on a backup that hears it.
    recent: Recent,
    /// Who announced our address last, and when.
    pub(crate) claimed: Option<(Mac, BootTime)>,
    /// When that was said last.
    claim_said: BootTime,
    /// Not before this does a leader hand over because others' servers contradict its own.
    yield_at: BootTime,
    /// They do.
    contradicted: bool,
    /// It has ordered so, in this view.
    yielding: bool,
    /// Since when the preferred member could lead in this one's place.
    preferred_since: Option<BootTime>,
    recycled: Vec<Vec<u8>>,
    datagrams_taken: bool,
    stable: EventNo,
    /// What of it the stack has been told.
    stable_told: EventNo,
}

impl Plane {
    pub(crate) fn new(config: PlaneConfig, wire: Wire, servers: Servers, now: BootTime) -> Self {
        let group = group::Core::new((config.group)(), super::seed(), group_time(now));
        let verdict = Verdict::new(config.divergence.clone());
        Self {
            config,
            verdict,
            group,
            wire,
            role: Role::Outside,
            servers,
            wedged: false,
            life: 0,
            takeovers: 0,
            opened: 0,
            resets: 0,
            close_divergences: 0,
            issued: 0,
            delivered: 0,
            client_bytes_in: 0,
            client_bytes_out: 0,
            last_event: 0,
            changed: true,
            stopped: false,
            maintenance: false,
            stopping: false,
            led_by: None,
            wire_readable: true,
            progress_at: now,
            join_again_at: None,
            lost_servers: false,
            donations: Donations::default(),
            hand_over_at: now,
            recent: Recent::default(),
            claimed: None,
            claim_said: BootTime::from_micros(0),
            yield_at: now,
            contradicted: false,
            yielding: false,
            preferred_since: None,
            recycled: Vec::new(),
            datagrams_taken: false,
            stable: EventNo(0),
            stable_told: EventNo(0),
        }
    }

    /// Takes part in the group.
    pub(crate) fn join(&mut self, now: BootTime, cx: &mut Context<'_>) {
        self.command(now, Command::Join);
        self.settle(now, cx);
    }

    /// Leaves for good; a leader hands over first.
    pub(crate) fn stop(&mut self, now: BootTime, cx: &mut Context<'_>) {
        self.stopping = true;
        self.command(now, Command::Leave);
        self.settle(now, cx);
    }

    fn command(&mut self, now: BootTime, command: Command) {
        if let Err(error) = self.group.handle_command(group_time(now), command) {
            debug!(vip = %self.config.vip, %error, "the group refused");
        }
    }

    /// A datagram of the group arrived. [`Self::handle_datagrams_end`] must follow the last of a batch: many datagrams
    /// are acknowledged by one.
    pub(crate) fn handle_datagram(&mut self, now: BootTime, from: &group::MemberId, body: &[u8]) {
        self.group.handle_datagram(group_time(now), from, body);
        self.datagrams_taken = true;
    }

    /// No further datagram waits.
    pub(crate) fn handle_datagrams_end(&mut self, now: BootTime, cx: &mut Context<'_>) {
        if std::mem::take(&mut self.datagrams_taken) {
            self.settle(now, cx);
        }
    }

    /// A peer's control connection came or went.
    pub(crate) fn handle_control(
        &mut self,
        now: BootTime,
        peer: &str,
        event: group::ControlEvent,
        cx: &mut Context<'_>,
    ) {
        self.group.handle_control(group_time(now), peer, event);
        self.settle(now, cx);
    }

    /// The coordinator answered.
    pub(crate) fn handle_registry(
        &mut self,
        now: BootTime,
        life: u64,
        reply: RegistryReply,
        cx: &mut Context<'_>,
    ) {
        if life == self.life {
            self.group.handle_registry(group_time(now), reply);
            self.settle(now, cx);
        }
    }

    /// The packet socket has something.
    pub(crate) fn handle_wire_readable(&mut self) {
        self.wire_readable = true;
    }

    /// A connection to the local server became ready.
    pub(crate) fn handle_server_ready(&mut self, conn: ConnId, readable: bool, writable: bool) {
        self.servers.handle_ready(conn, readable, writable);
    }

    /// One slice of work: frames in, timers, servers, frames out.
    pub(crate) fn turn(&mut self, now: BootTime, cx: &mut Context<'_>) {
        self.receive_frames(now, cx);
        self.servers.tend_kept();
        if matches!(self.role, Role::Joining(_)) {
            self.group.hold_transfer(self.servers.spill().0.is_behind());
        }
        if self.give_parts(now) {
            self.settle(now, cx);
        }
        if self
            .group
            .poll_timeout()
            .is_some_and(|at| at <= group_time(now))
        {
            self.group.handle_timeout(group_time(now));
            self.settle(now, cx);
        }
        if !self.wedged {
            if let Role::Leader(stack) = &mut self.role
                && stack.poll_timeout().is_some_and(|at| at <= tcp_time(now))
            {
                stack.handle_timeout(tcp_time(now));
            }
            let bytes_out = &mut self.client_bytes_out;
            let mut keeper = Keeper {
                role: &mut self.role,
                now,
                bytes_out,
            };
            self.servers.handle_timeout(now, cx.registry, &mut keeper);
            self.servers.pump(now, &mut keeper);
            self.servers.advance(now, cx.registry, &mut keeper);
            self.tell_answers(now);
            self.agree_on_closes(now);
            self.settle(now, cx);
            self.judge_answers(now, cx);
            self.hand_over_if_failing(now, cx);
        }
        if self.join_again_at.is_some_and(|at| at <= now) {
            self.join_again_at = None;
            self.command(now, Command::Leave);
            self.settle(now, cx);
        }
        self.rejoin_if_due(now, cx);
        self.report_progress(now);
        self.wire.handle_timeout(now);
        self.flush(cx);
    }

    /// Whether another turn is wanted at once.
    pub(crate) fn has_work(&self) -> bool {
        (!self.wedged && self.servers.has_work()) || (self.wire_readable && self.may_receive())
    }

    /// When the next turn is wanted at the latest.
    pub(crate) fn poll_timeout(&self) -> Option<BootTime> {
        let group = self
            .group
            .poll_timeout()
            .map(|t| BootTime::from_micros(t.micros()));
        let wire = self.wire.poll_timeout();
        let (stack, servers) = match &self.role {
            Role::Leader(stack) if !self.wedged => (
                stack
                    .poll_timeout()
                    .map(|t| BootTime::from_micros(t.micros())),
                self.servers.poll_timeout(),
            ),
            Role::Backup(_) if !self.wedged => {
                let report = self.servers.report_timeout();
                let servers = self.servers.poll_timeout();
                (None, [report, servers].into_iter().flatten().min())
            }
            _ => (None, None),
        };
        let answers = match self.role {
            Role::Leader(_) if !self.wedged => self.servers.marks_timeout(),
            Role::Backup(_) if self.wedged => None,
            _ => self.verdict.poll_timeout(),
        };
        [group, wire, stack, servers, answers]
            .into_iter()
            .flatten()
            .min()
    }

    /// A leader takes no input while it leaves a view, or while too much of it is unstable: what
    /// waits in the packet socket pushes back on the clients by itself.
    fn may_receive(&self) -> bool {
        match self.role {
            Role::Leader(_) => !self.wedged && self.group.window_open(),
            Role::Outside | Role::Joining(_) | Role::Backup(_) => true,
        }
    }

    fn receive_frames(&mut self, now: BootTime, cx: &mut Context<'_>) {
        for _ in 0..BATCHES_PER_TURN {
            if !self.wire_readable || !self.may_receive() {
                return;
            }
            let stack = match &mut self.role {
                Role::Leader(stack) => Some(stack),
                // Frames that reach a backup are not its own to answer.
                Role::Outside | Role::Joining(_) | Role::Backup(_) => None,
            };
            let mut stack = stack;
            let vip = self.config.vip;
            let (recent, keeps) = (&mut self.recent, self.config.keeps_recent);
            let claimed = &mut self.claimed;
            let received = self.wire.receive(now, |frame| match &mut stack {
                Some(stack) => match frame.kind {
                    Kind::Ip(packet) => handle_packet(stack, now, packet, &frame),
                    Kind::Claim(by) => *claimed = Some((by, now)),
                },
                None if keeps => recent.keep(now, &frame),
                None => {}
            });
            self.warn_of_claim(now);
            match received {
                Ok(n) => self.wire_readable = n == RECEIVE_BATCH,
                Err(error) => {
                    warn!(%vip, %error, "receiving frames");
                    self.wire_readable = false;
                }
            }
            self.settle(now, cx);
        }
    }

    /// Another station says that our address is its own: said at once, and then now and then.
    fn warn_of_claim(&mut self, now: BootTime) {
        if let Some((by, at)) = self.claimed
            && at == now
            && now.since(self.claim_said) >= CLAIM_SAID_EVERY
        {
            self.claim_said = now;
            self.changed = true;
            let by = mac_text(by);
            warn!(vip = %self.config.vip, by, "another station announces the VIP; announcing again");
        }
    }

    /// Executes everything the cores ask for until neither asks for more.
    fn settle(&mut self, now: BootTime, cx: &mut Context<'_>) {
        loop {
            let group = self.drain_group(now, cx);
            if planted!(CommitWaitSkipped)
                && let Role::Leader(stack) = &self.role
            {
                self.stable = EventNo(stack.next_event().0 - 1);
            }
            if self.stable > self.stable_told
                && !self.wedged
                && let Role::Leader(stack) = &mut self.role
            {
                self.stable_told = self.stable;
                stack.handle_stable(tcp_time(now), self.stable);
            }
            let stack = self.drain_stack(now, cx);
            if !group && !stack {
                return;
            }
        }
    }

    fn drain_stack(&mut self, now: BootTime, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        // A wedged leader issues no event and releases nothing; its stack is not touched either.
        while !self.wedged
            && let Role::Leader(stack) = &mut self.role
            && let Some(output) = stack.poll_output()
        {
            any = true;
            match output {
                TcpOutput::Transmit(packet) => self.wire.send(OutPacket {
                    buf: packet.buf,
                    next_hop: packet.next_hop.0,
                    gso: packet.gso,
                    partial_checksum: packet.partial_checksum,
                }),
                TcpOutput::Replicate { number, event } => self.issue(now, number, &event, cx),
                TcpOutput::Room(conn) => self.servers.wake(conn),
                TcpOutput::Notice(notice) => debug!(vip = %self.config.vip, ?notice, "tcp"),
            }
        }
        any
    }

    /// Leader: multicasts an event and gives it to the local server, without waiting.
    fn issue(&mut self, now: BootTime, number: EventNo, event: &Event, cx: &mut Context<'_>) {
        let bytes = match event {
            Event::Data { bytes, .. } => bytes.len(),
            _ => 0,
        };
        let mut payload = Vec::with_capacity(bytes + EVENT_OVERHEAD_BYTES);
        event.encode(&mut payload);
        // Output, or the wire's ACK, waits for these; the others only keep records fresh.
        let urgent = match event {
            Event::Open { .. }
            | Event::Data { .. }
            | Event::PeerFin { .. }
            | Event::LocalFin { .. }
            | Event::Reset { .. } => true,
            Event::HalfOpen { .. }
            | Event::Acked { .. }
            | Event::Closed { .. }
            | Event::Skip { .. }
            | Event::Answered { .. } => false,
        };
        self.group
            .multicast(group_time(now), number.0, payload.into(), urgent);
        self.issued += 1;
        self.note(number, event);
        self.servers.apply(now, number, event, cx.registry);
    }

    fn note(&mut self, number: EventNo, event: &Event) {
        self.last_event = number.0;
        match event {
            Event::Open { .. } => self.opened += 1,
            Event::Reset { .. } => self.resets += 1,
            Event::Data { bytes, .. } => self.client_bytes_in += bytes.len() as u64,
            _ => {}
        }
    }

    /// Packets of clients that were dropped, by reason, since this node leads.
    pub(crate) fn dropped_packets(&self) -> [(&'static str, u64); 5] {
        let counters = match &self.role {
            Role::Leader(stack) => stack.counters(),
            Role::Outside | Role::Joining(_) | Role::Backup(_) => tcp::Counters::default(),
        };
        [
            ("malformed", counters.malformed),
            ("checksum", counters.bad_checksums),
            ("fragment", counters.fragments),
            ("ghost", counters.ghosts),
            ("limit", counters.refused_by_limit),
        ]
    }

    fn drain_group(&mut self, now: BootTime, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while let Some(output) = self.group.poll_output() {
            any = true;
            match output {
                GroupOutput::Send { to, bodies } => cx.send(now, self.config.index, &to, &bodies),
                GroupOutput::Deliver { number, payload } => {
                    self.deliver(now, EventNo(number), &payload, cx);
                }
                // Told to the stack once the group has nothing more to say: what it would issue in
                // answer must neither follow a wedge nor get into a checkpoint at the cut.
                GroupOutput::Stable { number } => self.stable = EventNo(number),
                GroupOutput::Wedged => self.wedge(),
                GroupOutput::Install(installed) => {
                    cx.set_epoch(self.config.index, installed.view.id);
                    self.install(now, &installed, cx);
                }
                GroupOutput::Outside => self.outside(now, cx),
                GroupOutput::Instance(instance) => cx.set_instance(self.config.index, instance),
                GroupOutput::ReadView => self.ask(cx, Node::View, Operation::Read),
                GroupOutput::CompareAndSet {
                    expected_version,
                    value,
                } => self.ask(
                    cx,
                    Node::View,
                    Operation::CompareAndSet {
                        expected: expected_version,
                        value,
                    },
                ),
                GroupOutput::ReadLease => self.ask(cx, Node::Lease, Operation::Read),
                GroupOutput::RenewLease {
                    view_version,
                    value,
                } => {
                    self.ask(
                        cx,
                        Node::Lease,
                        Operation::RenewLease {
                            view_version,
                            value,
                        },
                    );
                }
                GroupOutput::CheckpointWanted { joiner, .. } => self.give_checkpoint(now, joiner),
                GroupOutput::CheckpointPartWanted { joiner, .. } => self.want_part(now, &joiner),
                GroupOutput::CheckpointChunk { bytes, total, .. } => {
                    self.take_chunk(now, bytes, total);
                }
                GroupOutput::CheckpointDone => self.restore(now),
                GroupOutput::Unicast { from, payload } => match Report::decode(&payload) {
                    Ok(Report::Closes { run, closes }) => {
                        self.servers.handle_closes(&from, run, &closes);
                    }
                    Ok(Report::HandOver { to }) => {
                        if let Err(why) = self.order_hand_over(now, to) {
                            warn!(vip = %self.config.vip, %from, why, "asked to hand over");
                        }
                    }
                    Ok(Report::Diverged(reports)) => self.handle_divergence(now, &from, &reports),
                    Err(error) => debug!(vip = %self.config.vip, %from, %error, "a report"),
                },
                GroupOutput::Notice(notice) => cx.notice(self.config.vip, notice),
            }
        }
        any
    }

    fn ask(&self, cx: &Context<'_>, node: Node, operation: Operation) {
        cx.ask(Request {
            plane: self.config.index,
            life: self.life,
            group: Arc::clone(&self.config.znode),
            node,
            operation,
        });
    }

    fn deliver(&mut self, now: BootTime, number: EventNo, payload: &Bytes, cx: &mut Context<'_>) {
        let event = match Event::decode(payload) {
            Ok(event) => event,
            Err(error) => {
                // The leader speaks another version, or the log is damaged: what this replica
                // would hold from here on is not what the others hold.
                error!(vip = %self.config.vip, %error, "cannot read an event; joining anew");
                self.command(now, Command::Leave);
                return;
            }
        };
        let Role::Backup(replica) = &mut self.role else {
            return;
        };
        replica.apply(tcp_time(now), number, &event);
        // What is delivered while a view is left is older: it says nothing of the gap.
        if !self.wedged {
            self.recent.handle_event(now);
        }
        self.servers.apply(now, number, &event, cx.registry);
        // Retained output was let go: the server may be read again.
        while let Some(conn) = replica.poll_room() {
            self.servers.wake(conn);
        }
        self.delivered += 1;
        self.note(number, &event);
    }

    fn report_progress(&mut self, now: BootTime) {
        if now < self.progress_at {
            return;
        }
        self.progress_at = now + PROGRESS_EVERY;
        self.yield_if_due(now);
        self.look_at_closes();
        let (behind_bytes, lost) = self.servers.lag(now);
        self.group.set_progress(group::Lag {
            behind_bytes,
            unfit: lost > 0
                || behind_bytes > BEHIND_BYTES_MAX
                || self.server_failing()
                || self.verdict.unfit(),
            reluctant: self.maintenance && !planted!(MaintenanceIgnored),
        });
        if matches!(self.role, Role::Leader(_)) && self.servers.ordered() {
            let members = self.group.status().members;
            let others = members.iter().filter(|m| m.member != *self.group.me());
            let behind = others.map(|m| m.lag.behind_bytes).max();
            self.servers.pace(now, behind.unwrap_or(0));
        }
    }

    fn flush(&mut self, cx: &mut Context<'_>) {
        let lease = if self.wedged {
            None
        } else {
            self.group.lease_until()
        };
        if let (Role::Leader(_), Some(until)) = (&self.role, lease) {
            self.wire
                .fence_mut()
                .open_until(BootTime::from_micros(until.micros()));
        }
        match self.wire.flush(&mut self.recycled) {
            Ok(Flushed::All | Flushed::Fenced) => {}
            Ok(Flushed::Blocked) => cx.want_writable(self.config.index),
            Err(error) => warn!(vip = %self.config.vip, %error, "sending frames"),
        }
        if let Role::Leader(stack) = &mut self.role {
            for buf in self.recycled.drain(..) {
                stack.recycle(buf);
            }
        } else {
            self.recycled.clear();
        }
    }
}

/// Whether a replica's server could go on with every connection now.
pub(crate) fn is_fit(lag: &group::Lag) -> bool {
    !lag.unfit && lag.behind_bytes <= BEHIND_BYTES_MAX
}

fn handle_packet(stack: &mut Stack, now: BootTime, packet: &[u8], frame: &Frame<'_>) {
    let checksum = if frame.checksum_ok {
        tcp::Checksum::Verified
    } else {
        tcp::Checksum::Verify
    };
    stack.handle_packet(tcp_time(now), packet, tcp::LinkAddr(frame.source), checksum);
}

/// As everybody writes it.
pub(crate) fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The group core's time.
pub(crate) fn group_time(now: BootTime) -> group::Instant {
    group::Instant::from_micros(now.micros())
}

/// The stack's time.
pub(crate) fn tcp_time(now: BootTime) -> tcp::Instant {
    tcp::Instant::from_micros(now.micros())
}
