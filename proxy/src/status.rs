//! What a node says about itself: `/status.json`, `unbroken status`, the status page.
//!
//! The JSON is an interface: fields are added, never renamed or removed, and whoever reads it
//! ignores what it does not know.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use unbroken_coord::driver;

use crate::config::FenceMode;

/// A node as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// Version of the program.
    pub version: String,
    /// The process, in its own pid namespace.
    #[serde(default)]
    pub pid: u32,
    /// Milliseconds since the node started.
    #[serde(default)]
    pub uptime_ms: u64,
    /// The node was asked to stop and is doing so.
    #[serde(default)]
    pub stopping: bool,
    /// The node leads only where no other could (`unbroken maintenance`).
    #[serde(default)]
    pub maintenance: bool,
    /// The coordinator as this node sees it.
    pub coordinator: CoordinatorStatus,
    /// In the order of the configuration.
    pub services: Vec<ServiceStatus>,
}

/// The coordinator as one node sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorStatus {
    /// What the server inside this node is.
    pub role: CoordinatorRole,
    /// Name of the server that leads the quorum, where it is known.
    #[serde(default)]
    pub leader: Option<String>,
    /// Last transaction applied here.
    pub zxid: i64,
    /// Sessions of the ensemble.
    pub sessions: u64,
    /// A quorum was seen within the last second; without it no view can change, so nobody can take over.
    #[serde(default)]
    pub quorum: bool,
}

impl From<&driver::Status> for CoordinatorStatus {
    fn from(status: &driver::Status) -> Self {
        Self {
            role: match status.role {
                driver::Role::Leader => CoordinatorRole::Leader,
                driver::Role::Follower => CoordinatorRole::Follower,
                driver::Role::Candidate => CoordinatorRole::Candidate,
                driver::Role::Observer => CoordinatorRole::Observer,
            },
            leader: status.leader.clone(),
            zxid: i64::try_from(status.zxid).unwrap_or(i64::MAX),
            sessions: status.sessions as u64,
            quorum: status.leader.is_some(),
        }
    }
}

/// What a coordinator server is in its ensemble.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CoordinatorRole {
    /// Leads the quorum.
    Leader,
    /// Follows a leader.
    Follower,
    /// Follows a leader and has no vote: it is joining, or stays an observer.
    Observer,
    /// Asks to be elected: for now there is no leader.
    Candidate,
    /// Runs elsewhere; this node has a session.
    External,
    /// Not running yet, or (external) without a session.
    #[default]
    Unavailable,
}

/// One service on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// The service's name.
    pub name: String,
    /// Its floating address.
    pub vip: IpAddr,
    /// Its ports.
    pub ports: Vec<u16>,
    /// The member that leads the view, where this node knows one.
    pub leader: Option<String>,
    /// What this node is in the view.
    pub role: Role,
    /// The view installed last.
    pub view: ViewStatus,
    /// Whether the death of the leader would cost a client anything.
    pub redundancy: Redundancy,
    /// Why redundancy is less than `protected`.
    #[serde(default)]
    pub redundancy_reason: Option<String>,
    /// Connections that live now.
    pub connections: u64,
    /// The leader's lease; `None` on a backup.
    #[serde(default)]
    pub lease: Option<LeaseStatus>,
    /// What an operator should look at now: another station that announces the VIP, a disk that fails.
    #[serde(default)]
    pub alarm: Option<String>,
    /// Who enforces the lease on this node.
    #[serde(default)]
    pub fence: Option<FenceMode>,
    /// Every member the configuration names, with what this node knows of it.
    #[serde(default)]
    pub members: Vec<MemberStatus>,
    /// The last time that the server here answered otherwise than the leader's, since the node started.
    #[serde(default)]
    pub divergence: Option<DivergenceStatus>,
    /// Counts since the node started.
    #[serde(default)]
    pub counters: ServiceCounters,
}

/// Where two servers' answers differed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DivergenceStatus {
    /// The connection, by the number of its first event.
    pub connection: u64,
    /// Its port.
    pub port: u16,
    /// Offset in the server's output up to which both agree.
    pub agreed: u64,
    /// Offset before which they differ.
    pub before: u64,
    /// Offset of the first byte that differs, where the hashes tell.
    #[serde(default)]
    pub first: Option<u64>,
}

impl ServiceStatus {
    /// A service that is not in any view yet.
    #[must_use]
    pub fn starting(name: &str, vip: IpAddr, ports: &[u16]) -> Self {
        Self {
            name: name.to_owned(),
            vip,
            ports: ports.to_vec(),
            leader: None,
            role: Role::Outside,
            view: ViewStatus::default(),
            redundancy: Redundancy::Unprotected,
            redundancy_reason: Some("this node is in no view yet".to_owned()),
            connections: 0,
            lease: None,
            alarm: None,
            fence: None,
            members: Vec::new(),
            divergence: None,
            counters: ServiceCounters::default(),
        }
    }
}

/// What a node is for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Owns the VIP.
    Leader,
    /// Holds every event and could lead.
    Backup,
    /// In the view, but still without the checkpoint or some events.
    Joining,
    /// Has left a view and has not installed the next.
    Wedged,
    /// In no view.
    Outside,
}

/// Whether the death of the leader would cost a client anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Redundancy {
    /// No backup could take over.
    Unprotected,
    /// A backup is being brought up to date.
    CatchingUp,
    /// A backup could take over, but fewer could than are configured.
    Degraded,
    /// As many backups as configured could take over.
    Protected,
}

/// A view of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewStatus {
    /// 0 before the first.
    pub id: u64,
    /// Full members in the order of rank.
    pub members: Vec<String>,
    /// Members that are joining.
    #[serde(default)]
    pub joining: Vec<String>,
    /// Number of the last event of the view before.
    #[serde(default)]
    pub cut: u64,
    /// Backups that must hold an event before its effects leave.
    #[serde(default)]
    pub k: u32,
}

/// The leader's right to emit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Held at this moment.
    pub held: bool,
    /// Milliseconds it would still last if nobody answered any more.
    pub remaining_ms: u64,
}

/// A member as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// What it is in the view.
    pub state: MemberState,
    /// Events issued that it is not known to hold (known to the leader only).
    #[serde(default)]
    pub lag_events: Option<u64>,
    /// Milliseconds since anything was heard of it; `None` for this node itself, or if never.
    #[serde(default)]
    pub last_heard_ms: Option<u64>,
    /// How far it is with being brought up to date (known to the leader, and of this node itself).
    #[serde(default)]
    pub catching_up: Option<CatchUp>,
}

/// How far a replica is with being brought up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatchUp {
    /// What it is at.
    pub stage: CatchUpStage,
    /// Bytes done of this stage. In a replay with `ordering = "total"`, the leader counts 4 KiB for each
    /// input of another replica beside its bytes.
    pub done_bytes: u64,
    /// Bytes of this stage, as far as they are known.
    pub total_bytes: u64,
    /// Seconds left of this stage at the rate of the last seconds; `None` while nothing moves.
    #[serde(default)]
    pub seconds_left: Option<u64>,
}

/// The stages of being brought up to date, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CatchUpStage {
    /// The checkpoint is on its way.
    Transfer,
    /// The server begins with the state of a checkpoint: its file is written, then `restore` runs.
    Restore,
    /// The server is given inputs that others have long taken.
    Replay,
}

impl fmt::Display for CatchUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MB: f64 = 1e6;
        let Self {
            stage,
            done_bytes,
            total_bytes,
            seconds_left,
        } = self;
        let percent = done_bytes.saturating_mul(100) / (*total_bytes).max(1);
        let total = *total_bytes as f64 / MB;
        write!(f, "{}: {percent} % of {total:.1} MB", word(stage))?;
        match seconds_left {
            Some(seconds) => write!(f, ", about {seconds} s left"),
            None => Ok(()),
        }
    }
}

/// What a configured member is in the current view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Holds every event.
    Full,
    /// Is being brought up.
    Joining,
    /// Not in the view.
    Absent,
}

/// Counts of one service on one node since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceCounters {
    /// Number of the newest event issued or delivered.
    pub last_event: u64,
    /// Number up to which events are known to be stable; on a backup, the cut of its view.
    pub stable_event: u64,
    /// Connections opened.
    pub connections_opened: u64,
    /// Bytes taken from clients.
    pub client_bytes_in: u64,
    /// Bytes given to clients, retransmissions not counted.
    pub client_bytes_out: u64,
    /// Frames for the VIP taken from the wire.
    pub frames_in: u64,
    /// Frames given to the wire.
    pub frames_out: u64,
    /// Times this node became leader while another led before.
    pub takeovers: u64,
    /// Times the server here answered otherwise than the leader's.
    pub divergences: u64,
    /// Group datagrams dropped, whatever the reason.
    pub datagrams_dropped: u64,
    /// Bytes of clients' input that are kept for replay in memory at this moment.
    pub history_bytes: u64,
    /// The same on disk.
    pub history_disk_bytes: u64,
    /// Connections that live and whose input is not kept as a whole: no replica that joins can be brought
    /// up with them.
    pub not_replayable: u64,
    /// Closes of the local server that were shown although other replicas' servers went on, or closed
    /// otherwise.
    pub close_divergences: u64,
}

impl fmt::Display for DivergenceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {}, connection {}, ", self.port, self.connection)?;
        match self.first {
            Some(first) => write!(f, "at offset {first}"),
            None => write!(f, "between offsets {} and {}", self.agreed, self.before),
        }
    }
}

/// The node's status, shared between those who write it and the admin page.
#[derive(Debug, Clone)]
pub struct Board {
    started: Instant,
    status: Arc<RwLock<Status>>,
}

impl Board {
    /// A board for a node that is starting.
    #[must_use]
    pub fn new(node: &str, services: Vec<ServiceStatus>) -> Self {
        let status = Status {
            node: node.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: 0,
            stopping: false,
            maintenance: false,
            coordinator: CoordinatorStatus::default(),
            services,
        };
        Self {
            started: Instant::now(),
            status: Arc::new(RwLock::new(status)),
        }
    }

    /// Changes the status; may wait for a reader.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Changes the status unless somebody is at it right now, and says whether it did. For the data
    /// plane, which must not wait for a reader that was put to sleep: it writes again soon anyway.
    pub fn try_update(&self, change: impl FnOnce(&mut Status)) -> bool {
        match self.status.try_write() {
            Ok(mut status) => {
                change(&mut status);
                true
            }
            Err(_) => false,
        }
    }

    /// The status as it is now.
    #[must_use]
    pub fn read(&self) -> Status {
        let status = self.status.read().unwrap_or_else(PoisonError::into_inner);
        let uptime_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Status {
            uptime_ms,
            ..status.clone()
        }
    }
}

/// The word that the JSON has for a state, so that pages for people and JSON never differ.
pub(crate) fn word(state: &impl Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        _ => unreachable!("a state is a plain word"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_said_to_people_and_programs() {
        let mut progress = CatchUp {
            stage: CatchUpStage::Transfer,
            done_bytes: 262_144_000,
            total_bytes: 1_048_576_000,
            seconds_left: Some(12),
        };
        assert_eq!(
            progress.to_string(),
            "transfer: 25 % of 1048.6 MB, about 12 s left"
        );
        assert_eq!(
            serde_json::to_string(&progress).unwrap(),
            r#"{"stage":"transfer","done_bytes":262144000,"total_bytes":1048576000,"seconds_left":12}"#
        );
        progress.seconds_left = None;
        (progress.done_bytes, progress.total_bytes) = (0, 0);
        assert_eq!(progress.to_string(), "transfer: 0 % of 0.0 MB");
    }
}
