//! The data plane: one thread that owns the packet sockets, the connections, the upstream sockets
//! and the group's datagram socket, so that no input crosses a thread between network and server.

mod catchup;
mod checkpoint;
mod closes;
mod context;
mod divergence;
mod history;
mod input;
mod liveness;
mod plane;
mod queues;
mod recent;
mod report;
mod reports;
mod role;
mod runner;
mod servers;
mod spill;
mod upstream;
mod verdict;

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context as _;
use mio::event::Event as Readiness;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use ring::hkdf;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tracing::info;
use unbroken_group as group;
use unbroken_group::driver::Driver;
use unbroken_tcpstate as tcp;

use self::context::{Context, Deferred, group_id, plane_of};
use self::liveness::Liveness;
use self::plane::{Plane, PlaneConfig, group_time};
use self::report::Reporter;
use self::runner::{Program, Runner};
use self::servers::{Order, Servers};
use self::spill::Spill;
use crate::clock::BootTime;
use crate::config::{AddressMode, Config, GroupConfig, Ordering, Resilience, Upstream, VipConfig};
use crate::determinism::Harmless;
use crate::health::Health;
use crate::metrics::NodeMetrics;
use crate::registry::{Answer, Node, Operation, Request};
use crate::status::Board;
use crate::wire::{self, Wire};

pub(crate) use self::servers::Backend;
pub(crate) use self::upstream::Target;

impl From<&Upstream> for Target {
    fn from(upstream: &Upstream) -> Self {
        match upstream {
            Upstream::Tcp(address) => Self::Tcp(*address),
            Upstream::Unix(path) => Self::Unix(path.clone()),
        }
    }
}

/// What the control plane tells the data plane.
#[derive(Debug)]
pub(crate) enum Input {
    /// The coordinator answered.
    Registry(Request, Answer),
    /// Let another lead the group of a plane, this one or the fittest. Answered with whether it was
    /// asked for, or why it cannot be.
    HandOver {
        plane: usize,
        to: Option<String>,
        answer: oneshot::Sender<Result<bool, String>>,
    },
    /// Lead only where no other could, or again as any.
    Maintenance(bool),
    /// Hand over, leave every group, and end.
    Stop,
}

/// What the data plane tells the control plane, apart from requests.
#[derive(Debug)]
pub(crate) enum Note {
    /// The process of this member is dead beyond doubt.
    PeerDied(String),
    /// This node leads a VIP.
    Leading,
    /// This node began to lead a VIP, or leads it no more.
    Turn {
        /// Which VIP, in the configuration's order.
        plane: usize,
        /// Whether it leads now.
        leads: bool,
        /// The view.
        view: u64,
    },
}

/// The control plane's end of the data plane's queue.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    inputs: Sender<Input>,
    waker: Arc<Waker>,
}

impl Handle {
    /// Sends an input and wakes the loop. Without effect once the data plane has ended.
    pub(crate) fn send(&self, input: Input) {
        if self.inputs.send(input).is_ok()
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "waking the data plane");
        }
    }
}

// Tokens below 256 are the loop's own; those of upstream connections are larger (`Servers`).
const WAKER: Token = Token(0);
const WIRES: usize = 1;
const WIRES_MAX: usize = 63;
const DRIVER: usize = 64;
const ALARM: Token = Token(255);
const OWN_TOKENS_END: usize = 256;

/// Priority of the data plane's thread (-20 is the highest, 0 ordinary).
const NICE: i32 = -15;
/// At most this many batches of datagrams a round.
const DATAGRAM_BATCHES: usize = 4;

/// Longest sleep: the status is never older.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// The event loop sleeps in whole milliseconds; shorter sleeps are a timer's.
const SLEEP_GRAIN: Duration = Duration::from_millis(1);

/// The data plane's thread, before it runs.
pub(crate) struct Dataplane {
    poll: Poll,
    driver: Driver,
    planes: Vec<Plane>,
    inputs: Receiver<Input>,
    requests: UnboundedSender<Request>,
    notes: UnboundedSender<Note>,
    reporter: Reporter,
    want_writable: Vec<usize>,
    deferred: Vec<Deferred>,
    alarm: OwnedFd,
    /// Servers that the node runs and that share nothing between connections: they only end with it.
    _runners: Vec<Runner>,
    stopping: bool,
}

impl Dataplane {
    /// Opens every socket of the data plane.
    ///
    /// # Errors
    /// A VIP cannot be served on its interface, or the group's address is occupied.
    pub(crate) fn open(
        config: &Config,
        board: Board,
        metrics: &NodeMetrics,
        requests: UnboundedSender<Request>,
        notes: UnboundedSender<Note>,
    ) -> anyhow::Result<(Self, Handle)> {
        let poll = Poll::new().context("creating the event loop")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let now = BootTime::now();
        let members = &config.group.members;
        let mut driver = Driver::open_with(
            &config.node.name,
            members,
            config.node.key.bytes(),
            group_time(now),
            &config.group.transport,
        )?;
        driver
            .register(poll.registry(), DRIVER)
            .context("registering the group's sockets")?;
        let vips = config.vips();
        anyhow::ensure!(vips.len() <= WIRES_MAX, "more than {WIRES_MAX} VIPs");
        let mut planes = Vec::with_capacity(vips.len());
        let targets = config.services.iter().map(|s| Target::from(&s.upstream));
        let liveness = Liveness::watch(targets).context("watching the local servers")?;
        let alarm = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .context("making a timer")?;
        poll.registry()
            .register(&mut SourceFd(&alarm.as_raw_fd()), ALARM, Interest::READABLE)
            .context("registering the timer")?;
        let mut kept_running = Vec::new();
        for (index, vip) in vips.iter().enumerate() {
            let mut wire = Wire::open(&wire::Options {
                fence: vip.fence,
                address: vip.address,
                ..wire::Options::new(vip.interface, vip.vip)
            })?;
            poll.registry()
                .register(&mut wire, Token(WIRES + index), Interest::READABLE)
                .with_context(|| format!("registering the packet socket of {}", vip.vip))?;
            let (disk, folder) = (history_disk_max(vip), history_folder(config, vip));
            let spill = Spill::open(folder, disk, Arc::clone(&waker))
                .with_context(|| format!("keeping the input history of {} on disk", vip.vip))?;
            let mut plane = open_plane(config, index, vip, wire, spill, liveness.clone(), now)?;
            let runners = runners(config, vip, &liveness, &waker)?;
            match vip.ordering {
                Ordering::Connection => kept_running.extend(runners),
                Ordering::Total => {
                    let (history, stall) = (history_max(vip), stall(vip));
                    let order = Order::new(history, stall, runners, now)
                        .context("asking the kernel what servers have taken")?;
                    plane.servers.set_order(order);
                }
            }
            driver.set_member(group_id(index), plane.group.me().clone());
            planes.push(plane);
        }
        let (sender, inputs) = channel();
        let reporter = Reporter::new(config, board, metrics);
        let handle = Handle {
            inputs: sender,
            waker,
        };
        let dataplane = Self {
            poll,
            driver,
            planes,
            inputs,
            requests,
            notes,
            reporter,
            want_writable: Vec::new(),
            deferred: Vec::new(),
            alarm,
            _runners: kept_running,
            stopping: false,
        };
        Ok((dataplane, handle))
    }

    /// Runs until it was told to stop and has left every group.
    ///
    /// # Errors
    /// The event loop failed.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        // A leader that is not scheduled is a silent leader. Without the privilege: as it is.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "the data plane runs at ordinary priority");
        }
        self.each_plane(BootTime::now(), Plane::join);
        loop {
            let mut timeout = self.sleep(BootTime::now());
            if !timeout.is_zero() && timeout < SLEEP_GRAIN {
                self.set_alarm(timeout)?;
                timeout = SLEEP_GRAIN;
            }
            match self.poll.poll(&mut events, Some(timeout)) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).context("waiting for events"),
            }
            let now = BootTime::now();
            for event in &events {
                self.handle_readiness(event);
            }
            // Sockets are drained before any timer is judged.
            self.receive_datagrams(now);
            self.receive_control(now);
            self.receive_inputs(now);
            self.each_plane(now, Plane::turn);
            self.driver.sender.handle_timeout(group_time(now));
            self.arm_writable();
            self.settle_deferred();
            self.reporter.report(now, &mut self.planes, &self.notes);
            if self.stopping && self.planes.iter().all(|p| p.stopped) {
                info!("left every group");
                return Ok(());
            }
        }
    }

    fn set_alarm(&self, after: Duration) -> anyhow::Result<()> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(after).context("a sleep")?,
        };
        timerfd_settime(&self.alarm, TimerfdTimerFlags::empty(), &once)
            .context("setting a timer")?;
        Ok(())
    }

    fn sleep(&self, now: BootTime) -> Duration {
        if self.driver.receiver.readable() || self.planes.iter().any(Plane::has_work) {
            return Duration::ZERO;
        }
        let planes = self.planes.iter().filter_map(Plane::poll_timeout);
        let driver = self
            .driver
            .poll_timeout()
            .map(|t| BootTime::from_micros(t.micros()));
        let next = planes.chain(driver).min();
        next.map_or(SLEEP_MAX, |at| at.since(now).min(SLEEP_MAX))
    }

    fn handle_readiness(&mut self, event: &Readiness) {
        let token = event.token();
        match token.0 {
            0 => {}
            t if t < DRIVER => {
                let plane = &mut self.planes[t - WIRES];
                plane.handle_wire_readable();
                if event.is_writable() {
                    self.listen_wire(t - WIRES, Interest::READABLE);
                }
            }
            t if t == ALARM.0 => {}
            t if t < OWN_TOKENS_END => {
                self.driver.handle_ready(token);
            }
            _ => {
                if let Some((plane, conn)) = Servers::conn_of(token)
                    && let Some(plane) = self.planes.get_mut(plane)
                {
                    let readable = event.is_readable() || event.is_read_closed();
                    let writable = event.is_writable() || event.is_write_closed();
                    plane.handle_server_ready(conn, readable || event.is_error(), writable);
                }
            }
        }
    }

    /// Lends the thread's parts to each plane in turn.
    fn each_plane(&mut self, now: BootTime, f: impl Fn(&mut Plane, BootTime, &mut Context<'_>)) {
        let mut cx = Context {
            registry: self.poll.registry(),
            sender: &mut self.driver.sender,
            requests: &self.requests,
            notes: &self.notes,
            want_writable: &mut self.want_writable,
            deferred: &mut self.deferred,
        };
        for plane in &mut self.planes {
            f(plane, now, &mut cx);
        }
    }

    fn plane(&mut self, index: usize, f: impl FnOnce(&mut Plane, &mut Context<'_>)) {
        let Some(plane) = self.planes.get_mut(index) else {
            return;
        };
        let mut cx = Context {
            registry: self.poll.registry(),
            sender: &mut self.driver.sender,
            requests: &self.requests,
            notes: &self.notes,
            want_writable: &mut self.want_writable,
            deferred: &mut self.deferred,
        };
        f(plane, &mut cx);
    }

    fn receive_datagrams(&mut self, now: BootTime) {
        // Bounded: whatever arrives meanwhile is taken in the next round.
        for _ in 0..DATAGRAM_BATCHES {
            if !self.driver.receiver.readable() {
                break;
            }
            let planes = &mut self.planes;
            let received = self.driver.receiver.receive(|group, from, body| {
                if let Some(plane) = planes.get_mut(plane_of(group)) {
                    plane.handle_datagram(now, from, body);
                }
            });
            self.each_plane(now, Plane::handle_datagrams_end);
            if let Err(error) = received {
                tracing::warn!(%error, "receiving the group's datagrams");
                break;
            }
        }
    }

    fn receive_control(&mut self, now: BootTime) {
        while let Some(input) = self.driver.control.poll_input(group_time(now)) {
            let plane = plane_of(input.group);
            self.plane(plane, |p, cx| {
                p.handle_control(now, &input.peer, input.event, cx)
            });
        }
    }

    fn settle_deferred(&mut self) {
        for deferred in self.deferred.drain(..) {
            match deferred {
                Deferred::Instance(group, instance) => {
                    self.driver.receiver.set_instance(group, instance);
                }
                Deferred::Life(group, incarnation) => {
                    self.driver.control.set_incarnation(group, incarnation);
                }
            }
        }
    }

    fn receive_inputs(&mut self, now: BootTime) {
        while let Ok(input) = self.inputs.try_recv() {
            match input {
                Input::Registry(request, answer) => {
                    let reply = reply(&request, answer);
                    let life = request.life;
                    self.plane(request.plane, |p, cx| {
                        p.handle_registry(now, life, reply, cx)
                    });
                }
                Input::HandOver { plane, to, answer } => self.plane(plane, |p, cx| {
                    // Who asked may have given up.
                    let _ = answer.send(p.hand_over(now, to, cx));
                }),
                Input::Maintenance(on) => {
                    self.each_plane(now, |p, _, _| p.maintenance = on);
                }
                Input::Stop => {
                    self.stopping = true;
                    self.each_plane(now, Plane::stop);
                }
            }
        }
    }

    /// Asks to be woken when a wire that was full takes more, and only then: a packet socket
    /// becomes writable with nearly every frame that has left.
    fn arm_writable(&mut self) {
        for index in std::mem::take(&mut self.want_writable) {
            self.listen_wire(index, Interest::READABLE | Interest::WRITABLE);
        }
    }

    fn listen_wire(&mut self, index: usize, interest: Interest) {
        let wire = &mut self.planes[index].wire;
        if let Err(error) = self
            .poll
            .registry()
            .reregister(wire, Token(WIRES + index), interest)
        {
            tracing::error!(%error, "listening to the wire");
        }
    }
}

fn reply(request: &Request, answer: Answer) -> group::RegistryReply {
    use group::{CasResult, ReadResult, RegistryReply};
    let read = |answer| match answer {
        Answer::Value(value, version) => ReadResult::Value { value, version },
        Answer::Absent => ReadResult::Absent,
        Answer::Written(_) | Answer::BadVersion | Answer::Unknown => ReadResult::Unknown,
    };
    let written = |answer| match answer {
        Answer::Written(version) => CasResult::Written { version },
        Answer::BadVersion => CasResult::BadVersion,
        Answer::Value(..) | Answer::Absent | Answer::Unknown => CasResult::Unknown,
    };
    match (&request.operation, request.node) {
        (Operation::Read, Node::View) => RegistryReply::View(read(answer)),
        (Operation::Read, Node::Lease) => RegistryReply::Lease(read(answer)),
        (Operation::CompareAndSet { .. }, _) => RegistryReply::Cas(written(answer)),
        (Operation::RenewLease { .. }, _) => RegistryReply::Renew(written(answer)),
    }
}

fn open_plane(
    config: &Config,
    index: usize,
    vip: &VipConfig<'_>,
    wire: Wire,
    spill: Spill,
    liveness: Liveness,
    now: BootTime,
) -> anyhow::Result<Plane> {
    let backends = crate::node::backends(&vip.services);
    let mut tcp_config = tcp::Config::new(vip.vip, backends.keys().copied());
    tcp_config.mtu = usize::from(wire.mtu());
    tcp_config.segmentation_offload = true;
    tcp_config.checksum_offload = true;
    let mut servers = Servers::new(index, backends, history_max(vip), spill, liveness);
    let mut policies = std::collections::BTreeMap::new();
    for service in &vip.services {
        let harmless = Harmless::new(&service.harmless).expect("patterns were checked when read");
        let harmless = Arc::new(harmless);
        for port in &service.ports {
            servers.declare_harmless(*port, Arc::clone(&harmless));
            policies.insert(*port, service.divergence);
        }
    }
    let mut health = Vec::new();
    for service in &vip.services {
        if let Some(check) = &service.health {
            let watched = Health::watch(&service.name, &service.upstream, check);
            health.push(watched.with_context(|| format!("checking {}", service.name))?);
        }
    }
    let plane = PlaneConfig {
        index,
        vip: vip.vip,
        keeps_recent: vip.address == AddressMode::Flood,
        znode: crate::node::znode(vip.vip).into(),
        tcp: tcp_config,
        secrets: secrets(config, vip),
        divergence: policies,
        group: group_template(config, index, vip),
        prefer: vip.prefer.map(str::to_owned),
        failback: vip.failback,
        health,
    };
    Ok(Plane::new(plane, wire, servers, now))
}

/// Input kept in memory, in bytes, for all services of a VIP.
fn history_max(vip: &VipConfig<'_>) -> u64 {
    let services = vip.services.iter();
    services.map(|s| s.history.memory_bytes_max).sum()
}

/// Input kept on disk, in bytes, for all services of a VIP.
fn history_disk_max(vip: &VipConfig<'_>) -> u64 {
    let services = vip.services.iter();
    services.map(|s| s.history.disk_bytes_max).sum()
}

/// Where it is kept. Nothing else may be there.
fn history_folder(config: &Config, vip: &VipConfig<'_>) -> PathBuf {
    config.node.history_dir.join(vip.vip.to_string())
}

/// One order has one patience: the shortest that any of its services asks for.
fn stall(vip: &VipConfig<'_>) -> Duration {
    let services = vip.services.iter();
    services.map(|s| s.stall).min().unwrap_or_default()
}

/// Starts the servers that the node runs for a VIP.
fn runners(
    config: &Config,
    vip: &VipConfig<'_>,
    liveness: &Liveness,
    waker: &Arc<Waker>,
) -> anyhow::Result<Vec<Runner>> {
    let mut runners = Vec::new();
    for service in &vip.services {
        if service.command.is_none() && service.restore.is_none() {
            continue;
        }
        let program = Program {
            name: service.name.clone(),
            target: Target::from(&service.upstream),
            command: service.command.clone(),
            restore: service.restore.clone(),
            ready: service.ready.clone(),
            checkpoint: service.checkpoint.clone(),
            folder: config.node.data_dir.join("servers").join(&service.name),
            shared_state: vip.ordering == Ordering::Total,
        };
        runners.push(Runner::start(program, liveness.clone(), Arc::clone(waker))?);
    }
    Ok(runners)
}

fn group_template(config: &Config, index: usize, vip: &VipConfig<'_>) -> plane::GroupTemplate {
    let prefer = vip.prefer.map(str::to_owned);
    let name = config.node.name.clone();
    let GroupConfig {
        members,
        resilience,
        heartbeat,
        lease,
        suspect_after,
        transport: _,
    } = config.group.clone();
    Box::new(move || {
        let me = group::MemberId::new(name.clone(), random());
        let names = members.keys().cloned().collect();
        let mut group = group::Config::new(group_id(index), me, names, random());
        group.resilience = match resilience {
            Resilience::Majority => group::Resilience::Majority,
            Resilience::All => group::Resilience::All,
            Resilience::Backups(k) => group::Resilience::Count(u8::try_from(k).unwrap_or(u8::MAX)),
        };
        group.heartbeat = heartbeat;
        group.lease = lease;
        group.suspect_after = suspect_after;
        group.prefer.clone_from(&prefer);
        group
    })
}

/// The stack's secrets: the same on every replica, of one VIP only.
fn secrets(config: &Config, vip: &VipConfig<'_>) -> tcp::Secrets {
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"unbroken tcp v1");
    let vip = vip.vip.to_string();
    let mut secret = [0; 32];
    salt.extract(config.node.key.bytes())
        .expand(&[vip.as_bytes()], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut secret))
        .expect("32 bytes are a length that HKDF gives");
    tcp::Secrets::new(0, &secret)
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has randomness");
    u128::from_le_bytes(bytes)
}

/// A seed for a core.
fn seed() -> u64 {
    (random() >> 64) as u64
}
