//! What the core tells of itself.

use std::fmt::Write as _;

use serde::Serialize;

use super::Core;
use crate::quorum::Role;
use crate::wire::FourLetterWord;

/// Counted since the start.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) proposals_dropped: u64,
    pub(super) frames_received: u64,
    pub(super) frames_sent: u64,
}

/// A server's state at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Name of this server.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// The term of the quorum.
    pub term: u64,
    /// The last log entry applied here.
    pub zxid: u64,
    /// The last log entry known to be committed.
    pub committed: u64,
    /// Sessions of the whole cluster.
    pub sessions: usize,
    /// Client connections of this server.
    pub connections: usize,
    /// Writes of this server's clients that have not come back yet.
    pub outstanding: usize,
    /// Znodes.
    pub znodes: usize,
    /// Ephemeral znodes.
    pub ephemerals: usize,
    /// Watches of this server's connections.
    pub watches: usize,
    /// Frames received from clients.
    pub frames_received: u64,
    /// Frames sent to clients.
    pub frames_sent: u64,
    /// Proposals that the leader had no room for. They are sent again.
    pub proposals_dropped: u64,
}

impl Status {
    /// That of a server which has not begun to take part.
    pub(crate) fn starting(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            role: Role::Follower,
            leader: None,
            term: 0,
            zxid: 0,
            committed: 0,
            sessions: 0,
            connections: 0,
            outstanding: 0,
            znodes: 0,
            ephemerals: 0,
            watches: 0,
            frames_received: 0,
            frames_sent: 0,
            proposals_dropped: 0,
        }
    }
}

/// The version that `srvr` shows first; kazoo reads it.
const VERSION: &str = concat!("3.8.0-unbroken-", env!("CARGO_PKG_VERSION"));

impl Core {
    /// This server's state now.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            name: self.config.servers[&self.config.id].clone(),
            role: self.quorum.role(),
            leader: self
                .quorum
                .leader()
                .and_then(|id| self.config.servers.get(&id))
                .cloned(),
            term: self.quorum.term(),
            zxid: self.state.zxid,
            committed: self.quorum.committed(),
            sessions: self.state.sessions.len(),
            connections: self.conns.len(),
            outstanding: self.outbox.len(),
            znodes: self.state.tree.len(),
            ephemerals: self.state.tree.ephemeral_count(),
            watches: self.watches.len(),
            frames_received: self.counters.frames_received,
            frames_sent: self.counters.frames_sent,
            proposals_dropped: self.counters.proposals_dropped,
        }
    }

    /// Answers a four-letter word, in the form that ZooKeeper's tools read.
    #[must_use]
    pub fn four_letter_word(&self, word: FourLetterWord) -> String {
        let status = self.status();
        let mode = match status.role {
            Role::Leader => "leader",
            Role::Follower | Role::Candidate => "follower",
        };
        let serving = status.leader.is_some();
        const NOT_SERVING: &str = "This ZooKeeper instance is not currently serving requests\n";
        match word {
            FourLetterWord::Ruok => "imok".into(),
            FourLetterWord::Isro => (if serving { "rw" } else { "null" }).into(),
            FourLetterWord::Srvr | FourLetterWord::Stat if !serving => NOT_SERVING.into(),
            FourLetterWord::Srvr | FourLetterWord::Stat => {
                let clients = if word == FourLetterWord::Stat {
                    format!("Clients:\n{}\n", self.connection_lines())
                } else {
                    String::new()
                };
                format!(
                    "Zookeeper version: {VERSION}\n{clients}Latency min/avg/max: 0/0.0/0\n\
                     Received: {}\nSent: {}\nConnections: {}\nOutstanding: {}\nZxid: 0x{:x}\n\
                     Mode: {mode}\nNode count: {}\n",
                    status.frames_received,
                    status.frames_sent,
                    status.connections,
                    status.outstanding,
                    status.zxid,
                    status.znodes,
                )
            }
            FourLetterWord::Mntr if !serving => NOT_SERVING.into(),
            FourLetterWord::Mntr => {
                let mut text = String::new();
                let mut line = |name: &str, value: &dyn std::fmt::Display| {
                    let _ = writeln!(text, "zk_{name}\t{value}");
                };
                line("version", &VERSION);
                line("server_state", &mode);
                line("packets_received", &status.frames_received);
                line("packets_sent", &status.frames_sent);
                line("num_alive_connections", &status.connections);
                line("outstanding_requests", &status.outstanding);
                line("znode_count", &status.znodes);
                line("watch_count", &status.watches);
                line("ephemerals_count", &status.ephemerals);
                line("global_sessions", &status.sessions);
                line("term", &status.term);
                line("proposals_dropped", &status.proposals_dropped);
                text
            }
            FourLetterWord::Conf => format!(
                "serverId={}\ntickTime={}\nminSessionTimeout={}\nmaxSessionTimeout={}\n",
                self.config.id,
                self.config.tick.as_millis(),
                self.config.session_min.as_millis(),
                self.config.session_max.as_millis(),
            ),
            FourLetterWord::Cons => self.connection_lines(),
            FourLetterWord::Wchs => {
                format!(
                    "{} connections watching {} paths\n",
                    status.connections, status.watches
                )
            }
        }
    }

    /// One line for each connection, the first hundred of them.
    fn connection_lines(&self) -> String {
        let mut text = String::new();
        for (id, conn) in self.conns.iter().take(100) {
            let session = conn.session().map_or("none".to_owned(), |s| s.to_string());
            let _ = writeln!(text, " /{}[{}](sid={session})", conn.address(), id.0);
        }
        text
    }
}
