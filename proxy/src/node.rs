//! The node: puts the parts together and carries the control plane.
//!
//! ```text
//!   coordinator server (embedded)      admin page
//!            ^                              ^
//!   coordinator client <- registry task     | Board
//!            ^ Request | Answer             |
//!  ==========|=========v====================|==== two channels and a waker
//!            data plane: one thread, one event loop
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};
use unbroken_coord::client::{Client, ConnectOptions, SessionState};
use unbroken_coord::driver as coord;

use crate::admin::{self, Admin};
use crate::config::{Config, CoordConfig, ServiceConfig};
use crate::dataplane::{self, Dataplane, Input, Note};
use crate::hooks::Hooks;
use crate::metrics::NodeMetrics;
use crate::operator::Operator;
use crate::registry::{self, Reads};
use crate::status::{Board, CoordinatorRole, CoordinatorStatus, Role, ServiceStatus};

/// How often the coordinator's state is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a stopping data plane may take to hand over and leave.
const STOP_MAX: Duration = Duration::from_secs(5);
/// The session of the node's own coordinator client. Nothing hangs on it: views are agreed by
/// compare-and-set, and a session's expiry removes nobody.
const SESSION: Duration = Duration::from_millis(400);
/// After how long a silence another server of an external ensemble is tried, which may grant longer
/// sessions only: a view change waits for an answer. Above what a write takes on a busy disk, for
/// ZooKeeper answers a session's pings in their turn, after the writes before them.
const SILENCE: Duration = Duration::from_millis(500);

/// Runs a node until `shutdown` turns true.
///
/// # Errors
/// The node cannot start, or one of its parts failed.
pub async fn run(config: Config, mut shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
    let metrics = Arc::new(NodeMetrics::new(&config.node.name));
    let services = config.services.iter();
    let starting = services
        .map(|s| ServiceStatus::starting(&s.name, s.vip, &s.ports))
        .collect();
    let board = Board::new(&config.node.name, starting);

    // Whatever cannot be had is found before anything is started.
    let listener = admin::bind(config.admin.listen).await?;
    let (requests, request_queue) = mpsc::unbounded_channel();
    let (notes, mut note_queue) = mpsc::unbounded_channel();
    let (dataplane, handle) = Dataplane::open(&config, board.clone(), &metrics, requests, notes)?;

    for vip in config.vips() {
        let vip = vip.vip;
        info!(%vip, "while this node leads, clients on this very host do not reach the address");
    }
    let mut coordinator = Coordinator::start(&config).await?;
    if let Some(server) = &coordinator.server {
        metrics.show_coordinator(server.meter());
    }
    let operator = Operator::new(&config, board.clone(), handle.clone());
    operator.resume();
    let admin = Admin {
        board: board.clone(),
        metrics,
        operator: Some(operator),
    };
    let (stop_admin, admin_stopped) = watch::channel(false);
    let page = tokio::spawn(admin::serve(listener, admin, admin_stopped));
    let answers = handle.clone();
    tokio::spawn(registry::serve(
        coordinator.client.clone(),
        coordinator.reads(),
        request_queue,
        move |request, answer| {
            answers.send(Input::Registry(request, answer));
        },
    ));

    let hooks = Hooks::start(&config);
    let (ended_sender, mut ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("dataplane".into())
        .spawn(move || {
            // The receiver is gone only when the process ends.
            let _ = ended_sender.send(dataplane.run());
        })
        .context("starting the data plane's thread")?;

    let mut look = tokio::time::interval(LOOK_EVERY);
    let outcome = loop {
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => break Ok(()),
            result = &mut ended => break match result {
                Ok(Ok(())) => Err(anyhow::anyhow!("the data plane ended by itself")),
                Ok(Err(error)) => Err(error.context("the data plane failed")),
                Err(_) => Err(anyhow::anyhow!("the data plane's thread panicked")),
            },
            failure = coordinator.failed() => break Err(anyhow::anyhow!("coordinator: {failure}")),
            Some(note) = note_queue.recv() => match note {
                Note::PeerDied(name) => coordinator.peer_died(&name),
                Note::Leading => coordinator.keep_off(&board),
                Note::Turn { plane, leads, view } => hooks.turn(plane, leads, view),
            },
            _ = look.tick() => {
                coordinator.keep_off(&board);
                let status = coordinator.status();
                board.update(|s| s.coordinator = status);
            }
        }
    };

    board.update(|status| status.stopping = true);
    if outcome.is_ok() {
        handle.send(Input::Stop);
        match tokio::time::timeout(STOP_MAX, &mut ended).await {
            Ok(_) => debug!("the data plane has left its groups"),
            Err(_) => warn!("the data plane did not leave its groups in time"),
        }
    }
    hooks.end().await;
    stop_admin.send_replace(true);
    if let Err(error) = page.await {
        error!(%error, "the admin page");
    }
    coordinator.shutdown().await;
    outcome
}

/// For how long a quorum may be out of sight before the status says so.
const QUORUM_WAIT: Duration = Duration::from_secs(1);

/// The coordinator as this node has it: a server of its own, or somebody's ensemble.
struct Coordinator {
    server: Option<coord::Server>,
    client: Client,
    /// When a quorum was last seen.
    quorate: Option<Instant>,
}

impl Coordinator {
    async fn start(config: &Config) -> anyhow::Result<Self> {
        let (server, options) = match &config.coord {
            CoordConfig::Embedded(embedded) => {
                let data_dir = config.node.data_dir.join("coord");
                let server = embedded.server(&config.node.name, data_dir, &config.node.key);
                let server = coord::start(server)
                    .await
                    .context("starting the coordinator")?;
                info!(client = %server.client_address(), "coordinator started");
                (
                    Some(server),
                    ConnectOptions::new([embedded.client.to_string()]),
                )
            }
            CoordConfig::External(external) => {
                let mut options = ConnectOptions::new(external.servers.clone());
                options.chroot.clone_from(&external.chroot);
                (None, options.silence_max(SILENCE))
            }
        };
        let options = options
            .session_timeout(SESSION)
            .renew_session(true)
            .request_timeout(None);
        Ok(Self {
            server,
            client: Client::start(options),
            quorate: None,
        })
    }

    fn reads(&self) -> Reads {
        match self.server {
            Some(_) => Reads::Sync,
            None => Reads::Barrier,
        }
    }

    async fn failed(&self) -> String {
        match &self.server {
            Some(server) => server.failed().await.to_string(),
            None => std::future::pending().await,
        }
    }

    fn peer_died(&self, name: &str) {
        if let Some(server) = &self.server {
            server.peer_died(name);
        }
    }

    /// Quorum leadership is kept off the node that leads a VIP, so that one kill never costs both.
    fn keep_off(&self, board: &Board) {
        let Some(server) = &self.server else { return };
        let status = server.status();
        let leads_vip = board.read().services.iter().any(|s| s.role == Role::Leader);
        if leads_vip && status.role == coord::Role::Leader {
            debug!("moving quorum leadership to another node");
            server.transfer_leadership(None);
        }
    }

    fn status(&mut self) -> CoordinatorStatus {
        let mut status = match &self.server {
            Some(server) => CoordinatorStatus::from(&server.status()),
            None => {
                let state = self.client.state();
                let quorum = matches!(*state.borrow(), SessionState::Connected { .. });
                let role = if quorum {
                    CoordinatorRole::External
                } else {
                    CoordinatorRole::Unavailable
                };
                CoordinatorStatus {
                    role,
                    quorum,
                    ..CoordinatorStatus::default()
                }
            }
        };
        if status.quorum {
            self.quorate = Some(Instant::now());
        }
        // An election takes less; whether it succeeds is what there is to say.
        status.quorum = self.quorate.is_some_and(|at| at.elapsed() < QUORUM_WAIT);
        status
    }

    async fn shutdown(self) {
        // Best effort: the session would expire by itself.
        let _ = tokio::time::timeout(Duration::from_millis(500), self.client.close()).await;
        if let Some(server) = self.server {
            server.shutdown().await;
        }
    }
}

/// The servers behind a VIP's ports.
pub(crate) fn backends(services: &[&ServiceConfig]) -> BTreeMap<u16, dataplane::Backend> {
    let mut backends = BTreeMap::new();
    for service in services {
        let backend = dataplane::Backend {
            target: dataplane::Target::from(&service.upstream),
            close_wait: service.close_wait,
        };
        backends.extend(service.ports.iter().map(|port| (*port, backend.clone())));
    }
    backends
}

/// The znode of a VIP's group.
pub(crate) fn znode(vip: IpAddr) -> String {
    format!("{}/{vip}", registry::GROUPS)
}
