//! Answers to four-letter words, in the form that ZooKeeper's tools read.

use std::fmt::{self, Write as _};
use std::time::Duration;

use super::status::Latency;
use super::{ConnId, Core};
use crate::quorum::Role;
use crate::session::SessionId;
use crate::wire::{FourLetterWord, OpCode};

/// The version that `srvr` and `envi` show first; clients read it to know what they can ask.
const VERSION: &str = concat!("3.8.0-unbroken-", env!("CARGO_PKG_VERSION"));

const NOT_SERVING: &str = "This ZooKeeper instance is not currently serving requests\n";

/// Bytes of one answer at most; what does not fit is left out, and the answer says so.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// What only the driver knows of a server, for the four-letter words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The port for clients.
    pub client_port: u16,
    /// The port for clients that speak TLS.
    pub secure_client_port: Option<u16>,
    /// Where the server keeps its data.
    pub data_dir: String,
    /// Length of the snapshots there, in bytes.
    pub snapshot_bytes: u64,
    /// Length of the log there, in bytes.
    pub log_bytes: u64,
    /// Files and connections that the process has open.
    pub open_files: u64,
    /// ... and may have open.
    pub open_files_max: u64,
    /// What the server runs on: names and values.
    pub environment: Vec<(&'static str, String)>,
}

/// Lines, as many as an answer holds.
#[derive(Default)]
struct Lines {
    text: String,
    left_out: usize,
}

impl Lines {
    fn add(&mut self, line: fmt::Arguments<'_>) {
        if self.text.len() >= ANSWER_BYTES_MAX {
            self.left_out += 1;
        } else {
            let _ = writeln!(self.text, "{line}");
        }
    }

    fn finish(mut self) -> String {
        if self.left_out > 0 {
            let _ = writeln!(self.text, "... and {} lines more", self.left_out);
        }
        self.text
    }
}

impl Core {
    /// Answers a four-letter word.
    #[must_use]
    pub fn four_letter_word(
        &mut self,
        word: FourLetterWord,
        surroundings: &Surroundings,
    ) -> String {
        let has_leader = self.quorum.leader().is_some();
        let serving = has_leader || self.serves_read_only();
        match word {
            FourLetterWord::Ruok => "imok".into(),
            FourLetterWord::Isro if has_leader => "rw".into(),
            FourLetterWord::Isro => (if serving { "ro" } else { "null" }).into(),
            FourLetterWord::Envi => self.envi(surroundings),
            FourLetterWord::Conf => self.conf(surroundings),
            FourLetterWord::Dirs => format!(
                "datadir_size: {}\nlogdir_size: {}\n",
                surroundings.snapshot_bytes, surroundings.log_bytes
            ),
            FourLetterWord::Crst => {
                self.reset_connections();
                "Connection stats reset.\n".into()
            }
            FourLetterWord::Srst => {
                self.counters.reset();
                "Server stats reset.\n".into()
            }
            _ if !serving => NOT_SERVING.into(),
            FourLetterWord::Srvr => self.srvr(""),
            FourLetterWord::Stat => {
                let clients = self.connections(false);
                self.srvr(&format!("Clients:\n{clients}\n"))
            }
            FourLetterWord::Mntr => self.mntr(surroundings),
            FourLetterWord::Cons => format!("{}\n", self.connections(true)),
            FourLetterWord::Dump => self.dump(),
            FourLetterWord::Wchs => format!(
                "{} connections watching {} paths\nTotal watches:{}\n",
                self.watches.connections(),
                self.watches.paths(),
                self.watches.len()
            ),
            FourLetterWord::Wchc => self.wchc(),
            FourLetterWord::Wchp => self.wchp(),
        }
    }

    /// What this server is, in ZooKeeper's words.
    fn mode(&self) -> &'static str {
        match self.quorum.role() {
            _ if self.serves_read_only() => "read-only",
            _ if self.state.members.len() == 1 => "standalone",
            Role::Leader => "leader",
            Role::Follower | Role::Candidate => "follower",
            Role::Observer => "observer",
        }
    }

    fn srvr(&self, clients: &str) -> String {
        let status = self.status();
        format!(
            "Zookeeper version: {VERSION}, built on unknown date\n{clients}\
             Latency min/avg/max: {}\nReceived: {}\nSent: {}\nConnections: {}\nOutstanding: {}\n\
             Zxid: 0x{:x}\nMode: {}\nNode count: {}\n",
            self.counters.latency,
            status.frames_received,
            status.frames_sent,
            status.connections,
            status.outstanding,
            status.zxid,
            self.mode(),
            status.znodes,
        )
    }

    fn envi(&self, surroundings: &Surroundings) -> String {
        let mut lines = Lines::default();
        lines.add(format_args!("Environment:"));
        lines.add(format_args!(
            "zookeeper.version={VERSION}, built on unknown date"
        ));
        for (name, value) in &surroundings.environment {
            lines.add(format_args!("{name}={value}"));
        }
        lines.finish()
    }

    fn conf(&self, surroundings: &Surroundings) -> String {
        let mut lines = Lines::default();
        let mut line = |name: &str, value: &dyn fmt::Display| {
            lines.add(format_args!("{name}={value}"));
        };
        line("clientPort", &surroundings.client_port);
        let secure_port = surroundings.secure_client_port.map_or(-1, i32::from);
        line("secureClientPort", &secure_port);
        line("dataDir", &surroundings.data_dir);
        line("dataDirSize", &surroundings.snapshot_bytes);
        line("dataLogDir", &surroundings.data_dir);
        line("dataLogSize", &surroundings.log_bytes);
        line("tickTime", &self.config.tick.as_millis());
        line("minSessionTimeout", &self.config.session_min.as_millis());
        line("maxSessionTimeout", &self.config.session_max.as_millis());
        line("serverId", &self.config.id);
        lines.add(format_args!("membership: "));
        let config = self.state.tree.znode("/zookeeper/config");
        let config = config.and_then(|znode| znode.data.as_deref());
        for member in String::from_utf8_lossy(config.unwrap_or_default()).lines() {
            lines.add(format_args!("{member}"));
        }
        lines.finish()
    }

    fn mntr(&self, surroundings: &Surroundings) -> String {
        let status = self.status();
        let uptime = self.now.since(self.started);
        let mut lines = Lines::default();
        let mut line = |name: &str, value: &dyn fmt::Display| {
            lines.add(format_args!("zk_{name}\t{value}"));
        };
        let version = format_args!("{VERSION}, built on unknown date").to_string();
        line("version", &version);
        line("server_state", &self.mode());
        let latency = &self.counters.latency;
        line("avg_latency", &format_args!("{:.4}", latency.average_ms()));
        line("max_latency", &latency.max_ms());
        line("min_latency", &latency.min_ms());
        line("packets_received", &status.frames_received);
        line("packets_sent", &status.frames_sent);
        line("bytes_received_count", &self.counters.bytes_received);
        line("num_alive_connections", &status.connections);
        line("outstanding_requests", &status.outstanding);
        line("znode_count", &status.znodes);
        line("watch_count", &status.watches);
        line("ephemerals_count", &status.ephemerals);
        line("approximate_data_size", &self.state.tree.data_bytes());
        line("global_sessions", &status.sessions);
        let local = self.conns.values().filter(|state| state.is_read_only());
        line("local_sessions", &local.count());
        line("open_file_descriptor_count", &surroundings.open_files);
        line("max_file_descriptor_count", &surroundings.open_files_max);
        line("uptime", &uptime.as_millis());
        line("quorum_size", &self.state.members.voters().count());
        line("auth_failed_count", &self.counters.auth_failed);
        line("connection_request_count", &self.counters.connections);
        line("stale_sessions_expired", &self.counters.sessions_expired);
        line("long_replies", &self.counters.long_replies);
        let writes = &self.counters.write;
        line("avg_updatelatency", &milliseconds(writes.average()));
        line("max_updatelatency", &milliseconds(writes.max()));
        line("cnt_updatelatency", &writes.count());
        line("sum_updatelatency", &milliseconds(writes.sum()));
        let reads = &self.counters.read;
        line("avg_readlatency", &milliseconds(reads.average()));
        line("max_readlatency", &milliseconds(reads.max()));
        line("cnt_readlatency", &reads.count());
        line("sum_readlatency", &milliseconds(reads.sum()));
        line("term", &status.term);
        line("proposals_dropped", &status.proposals_dropped);
        lines.finish()
    }

    fn dump(&self) -> String {
        let mut lines = Lines::default();
        lines.add(format_args!("SessionTracker dump:"));
        let sessions = &self.state.sessions;
        lines.add(format_args!("Global Sessions({}):", sessions.len()));
        for (session, record) in sessions {
            lines.add(format_args!("{session}\t{}ms", record.timeout_ms));
        }
        lines.add(format_args!("ephemeral nodes dump:"));
        let owners = self.state.tree.owners();
        lines.add(format_args!("Sessions with Ephemerals ({}):", owners.len()));
        for owner in owners {
            lines.add(format_args!("{owner}:"));
            for path in self.state.tree.ephemerals(owner) {
                lines.add(format_args!("\t{path}"));
            }
        }
        lines.add(format_args!("Connections dump:"));
        for (conn, state) in &self.conns {
            lines.add(format_args!(
                "\tip: /{} sessionId: {}",
                state.address(*conn),
                self.session_of(*conn)
            ));
        }
        lines.finish()
    }

    fn wchc(&self) -> String {
        let mut lines = Lines::default();
        for (conn, paths) in self.watches.by_connection() {
            lines.add(format_args!("{}", self.session_of(conn)));
            for path in paths {
                lines.add(format_args!("\t{path}"));
            }
        }
        lines.add(format_args!(""));
        lines.finish()
    }

    fn wchp(&self) -> String {
        let mut lines = Lines::default();
        for (path, conns) in self.watches.by_path() {
            lines.add(format_args!("{path}"));
            for conn in conns {
                lines.add(format_args!("\t{}", self.session_of(conn)));
            }
        }
        lines.add(format_args!(""));
        lines.finish()
    }

    /// The session of a connection; 0 if it has none.
    fn session_of(&self, conn: ConnId) -> SessionId {
        let state = self.conns.get(&conn);
        state.and_then(|state| state.session()).unwrap_or_default()
    }

    fn connections(&self, in_detail: bool) -> String {
        let mut lines = Lines::default();
        for (conn, state) in &self.conns {
            let session = state.session();
            let talk = &state.talk;
            let detail = session
                .filter(|_| in_detail)
                .map_or(String::new(), |session| {
                    let timeout = self.state.sessions.get(&session).map(|s| s.timeout_ms);
                    format!(
                        ",sid={session},lop={},est={},to={},lcxid=0x{:x},lzxid=0x{:x},lresp={},\
                     llat={},minlat={},avglat={:.4},maxlat={}",
                        talk.last_op,
                        self.wall_ms(state.since),
                        timeout.unwrap_or_default(),
                        talk.last_xid,
                        talk.last_zxid,
                        self.wall_ms(talk.last_reply),
                        talk.latency.last_ms(),
                        talk.latency.min_ms(),
                        talk.latency.average_ms(),
                        talk.latency.max_ms(),
                    )
                });
            lines.add(format_args!(
                " /{}[{}](queued={},recved={},sent={}{detail})",
                state.address(*conn),
                u8::from(session.is_some()),
                state.queued(),
                talk.received,
                talk.sent,
            ));
        }
        lines.finish()
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.3}", duration.as_secs_f64() * 1000.0)
}

/// An operation as `cons` prints it.
pub(super) const fn short_name(op: OpCode) -> &'static str {
    match op {
        OpCode::Create | OpCode::Create2 | OpCode::CreateContainer | OpCode::CreateTtl => "CREA",
        OpCode::Delete => "DELE",
        OpCode::Exists => "EXIS",
        OpCode::GetData => "GETD",
        OpCode::SetData => "SETD",
        OpCode::GetAcl => "GETA",
        OpCode::SetAcl => "SETA",
        OpCode::GetChildren | OpCode::GetChildren2 => "GETC",
        OpCode::GetAllChildrenNumber => "GACN",
        OpCode::GetEphemerals => "GETE",
        OpCode::Sync => "SYNC",
        OpCode::Ping => "PING",
        OpCode::Check => "CHEC",
        OpCode::Multi => "MULT",
        OpCode::MultiRead => "MLTR",
        OpCode::Reconfig => "RECO",
        OpCode::CheckWatches => "CHKW",
        OpCode::RemoveWatches => "REMW",
        OpCode::SetWatches => "SETW",
        OpCode::SetWatches2 => "STW2",
        OpCode::AddWatch => "ADDW",
        OpCode::Auth => "AUTH",
        OpCode::Sasl => "SASL",
        OpCode::WhoAmI => "WHOA",
        OpCode::CloseSession => "CLOS",
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, average, max) = (self.min_ms(), self.average_ms(), self.max_ms());
        write!(f, "{min}/{average:.1}/{max}")
    }
}
