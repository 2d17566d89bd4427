//! What an operator asks of a running node: let another lead, and maintenance.
//!
//! Maintenance outlives the process: while its mark stands in the data folder, the node leads only where
//! no other could.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::info;

use crate::config::Config;
use crate::dataplane::{Handle, Input};
use crate::status::{Board, Role, ServiceStatus};

/// The mark in the data folder.
const MARK: &str = "maintenance";
/// How long a hand-over is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// After this long it is asked for again: what was sent to the leader may be lost.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How often the status is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(5);

/// The body of `POST /handover`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandOver {
    /// Which service, and those that share its VIP; `None`: all that `to` can lead, or that this node leads.
    pub service: Option<String>,
    /// Who shall lead; `None`: the fittest.
    pub to: Option<String>,
}

/// The body of `POST /maintenance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maintenance {
    /// Whether this node shall be in maintenance.
    pub on: bool,
}

/// One service that another node leads now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The service.
    pub service: String,
    /// Who led before.
    pub from: String,
    /// Who leads now; the same if it led already.
    pub to: String,
    /// The view in which it does.
    pub view: u64,
    /// From the request until this node knew, in milliseconds.
    pub took_ms: u64,
}

/// What became of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Services that another leads now, or that led there already.
    pub moved: Vec<Moved>,
    /// What did not move, and why.
    #[serde(default)]
    pub failed: Vec<String>,
}

/// Carries out what operators ask.
#[derive(Debug, Clone)]
pub struct Operator {
    handle: Handle,
    board: Board,
    /// Names of the services of each VIP, as the data plane has them.
    planes: Vec<Vec<String>>,
    /// Who there is, by the configuration.
    members: Vec<String>,
    mark: PathBuf,
}

impl Operator {
    pub(crate) fn new(config: &Config, board: Board, handle: Handle) -> Self {
        let of_vip = |vip: &crate::config::VipConfig<'_>| {
            let names = vip.services.iter().map(|s| s.name.clone());
            names.collect()
        };
        Self {
            handle,
            board,
            planes: config.vips().iter().map(of_vip).collect(),
            members: config.group.members.keys().cloned().collect(),
            mark: config.node.data_dir.join(MARK),
        }
    }

    /// Goes on with the maintenance that the mark tells of.
    pub(crate) fn resume(&self) {
        if self.mark.exists() {
            info!("in maintenance: this node leads only where no other could");
            self.announce(true);
        }
    }

    fn announce(&self, on: bool) {
        self.board.update(|status| status.maintenance = on);
        self.handle.send(Input::Maintenance(on));
    }

    fn service(&self, plane: usize) -> Option<ServiceStatus> {
        let name = self.planes.get(plane)?.first()?;
        let services = self.board.read().services;
        services.into_iter().find(|s| s.name == *name)
    }

    fn led(&self) -> Vec<usize> {
        let leads = |plane: &usize| {
            let service = self.service(*plane);
            service.is_some_and(|s| s.role == Role::Leader)
        };
        (0..self.planes.len()).filter(leads).collect()
    }

    /// Lets another lead, and waits until it does.
    ///
    /// # Errors
    /// The request makes no sense on this node; nothing was done.
    pub async fn hand_over(&self, request: &HandOver) -> Result<Outcome, String> {
        let planes = match (&request.service, &request.to) {
            (Some(name), _) => {
                let plane = self.planes.iter().position(|names| names.contains(name));
                let known = || self.planes.concat().join(", ");
                vec![plane.ok_or_else(|| format!("no service \"{name}\", only: {}", known()))?]
            }
            (None, Some(_)) => (0..self.planes.len()).collect(),
            (None, None) => self.led(),
        };
        if planes.is_empty() {
            return Err(
                "this node leads nothing: name a service, or the node that shall lead".to_owned(),
            );
        }
        if let Some(to) = request.to.as_ref().filter(|to| !self.members.contains(to)) {
            let names = self.members.join(", ");
            return Err(format!("no node \"{to}\", only: {names}"));
        }
        Ok(self.move_all(&planes, request.to.as_deref()).await)
    }

    /// Begins or ends maintenance; at its beginning, what this node leads is handed over.
    ///
    /// # Errors
    /// The mark cannot be written or removed; nothing was done.
    pub async fn maintain(&self, request: Maintenance) -> Result<Outcome, String> {
        let marked = if request.on {
            let made = fs::create_dir_all(self.mark.parent().unwrap_or(&self.mark));
            made.and_then(|()| fs::write(&self.mark, "made by `unbroken maintenance on`\n"))
        } else {
            match fs::remove_file(&self.mark) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        };
        marked.map_err(|error| format!("{}: {error}", self.mark.display()))?;
        info!(on = request.on, "maintenance");
        self.announce(request.on);
        if !request.on {
            return Ok(Outcome::default());
        }
        Ok(self.move_all(&self.led(), None).await)
    }

    /// All at once: whoever asked waits for the slowest, and not for all in turn.
    async fn move_all(&self, planes: &[usize], to: Option<&str>) -> Outcome {
        let mut moves = JoinSet::new();
        for plane in planes.iter().copied() {
            let (operator, to) = (self.clone(), to.map(str::to_owned));
            moves.spawn(async move { (plane, operator.move_one(plane, to.as_deref()).await) });
        }
        let mut ended = moves.join_all().await;
        ended.sort_by_key(|(plane, _)| *plane);
        let mut outcome = Outcome::default();
        for (plane, end) in ended {
            match end {
                Ok(moved) => outcome.moved.extend(moved),
                Err(why) => {
                    let names = self.planes[plane].join(", ");
                    outcome.failed.push(format!("{names}: {why}"));
                }
            }
        }
        outcome
    }

    async fn move_one(&self, plane: usize, to: Option<&str>) -> Result<Vec<Moved>, String> {
        let begun = Instant::now();
        let first = self.service(plane).and_then(|s| s.leader);
        let first = first.ok_or("no leader is known")?;
        let arrived = |s: &ServiceStatus| match (to, &s.leader) {
            (_, None) => false,
            (Some(to), Some(leader)) => leader == to,
            (None, Some(leader)) => *leader != first,
        };
        let mut asked: Option<Instant> = None;
        loop {
            if let Some(service) = self.service(plane)
                && arrived(&service)
                && let Some(leader) = &service.leader
            {
                let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                let names = self.planes[plane].iter();
                let moved = |name: &String| Moved {
                    service: name.clone(),
                    from: first.clone(),
                    to: leader.clone(),
                    view: service.view.id,
                    took_ms,
                };
                return Ok(names.map(moved).collect());
            }
            if begun.elapsed() >= PATIENCE {
                let whom = to.unwrap_or("another node");
                return Err(format!("{whom} did not take over within {PATIENCE:?}"));
            }
            if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN) {
                asked = self.ask(plane, to).await?.then(Instant::now);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Asks the data plane once. False: it cannot be asked just now.
    async fn ask(&self, plane: usize, to: Option<&str>) -> Result<bool, String> {
        let (answer, answered) = oneshot::channel();
        let to = to.map(str::to_owned);
        self.handle.send(Input::HandOver { plane, to, answer });
        answered
            .await
            .unwrap_or_else(|_| Err("the node is stopping".to_owned()))
    }
}
