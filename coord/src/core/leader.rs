//! What the leader does beside consensus: it stamps proposals, ends silent sessions, and clears
//! containers away. Every server reports its sessions' signs of life to it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Core, Output, PeerMessage, TOUCH_MAX};
use crate::quorum::{RaftMessage, RaftMessageKind, Role};
use crate::session::{Overdue, SessionId};
use crate::time::as_micros;
use crate::txn::{Command, Entry, Proposal};

/// A session whose server is silent, too, is given so much longer at most: it may be heard there.
const SILENT_OWNER_MAX: Duration = Duration::from_millis(50);

/// A proposal to end a session is repeated after this long, should it be lost.
const EXPIRE_AGAIN: Duration = Duration::from_millis(500);

/// Containers, and znodes with a time to live, that one look ends at most.
const REAPED_AT_ONCE_MAX: usize = 1000;

impl Core {
    fn leads(&self) -> bool {
        self.quorum.role() == Role::Leader
    }

    /// Puts a proposal into the log, if this server leads and there is room; if not, it is dropped,
    /// and its origin sends it again. True if it is in the log.
    pub(super) fn propose(&mut self, proposal: Proposal) -> bool {
        if !self.leads() {
            return false;
        }
        let Some((kind, proposal)) = self.admit(proposal) else {
            return false;
        };
        match &proposal.command {
            Command::Attach { session, .. } | Command::Write { session, .. } => {
                self.deadlines.touch(*session, self.now);
            }
            Command::Create { .. }
            | Command::Expire { .. }
            | Command::Reap { .. }
            | Command::Promote { .. }
            | Command::Announce { .. } => {}
        }
        let entry = Entry {
            time_ms: self.wall_ms(self.now),
            proposal,
        };
        let data = postcard::to_allocvec(&entry).expect("memory takes everything");
        let proposed = self.quorum.propose(kind, data);
        if !proposed {
            self.counters.proposals_dropped += 1;
        }
        proposed
    }

    pub(super) fn start_deadline(&mut self, session: SessionId) {
        if self.leads()
            && let Some(record) = self.state.sessions.get(&session)
        {
            let timeout = Duration::from_millis(u64::from(record.timeout_ms));
            self.deadlines.start(session, timeout, self.now);
        }
    }

    /// A new leader knows nothing of who was silent.
    pub(super) fn restart_deadlines(&mut self) {
        if self.leads() {
            let sessions: Vec<SessionId> = self.state.sessions.keys().copied().collect();
            for session in sessions {
                self.start_deadline(session);
            }
        }
    }

    pub(super) fn expire_sessions(&mut self) {
        if !self.leads() {
            return;
        }
        while let Some(overdue) = self.deadlines.pop_expired(self.now, EXPIRE_AGAIN) {
            let Overdue { session, since } = overdue;
            let Some(record) = self.state.sessions.get(&session) else {
                continue;
            };
            if self.now.since(since) < SILENT_OWNER_MAX && self.is_silent(record.owner.server) {
                self.deadlines.look_at(session, self.now + self.config.tick);
                continue;
            }
            let attached = record.attached;
            let proposed = self.propose(Proposal {
                origin: self.run,
                command: Command::Expire { session, attached },
            });
            if proposed {
                self.deadlines.condemn(session);
            }
        }
    }

    /// Whether a server is late with what it says at least once in every heartbeat.
    fn is_silent(&self, server: u64) -> bool {
        let limit = self.config.heartbeat + self.config.tick;
        let heard = self.heard.get(&server);
        server != self.config.id && heard.is_none_or(|heard| self.now.since(*heard) > limit)
    }

    /// A session of this server was heard from.
    pub(super) fn touch(&mut self, session: SessionId) {
        if self.leads() {
            self.deadlines.touch(session, self.now);
        } else {
            self.touched.insert(session, self.now);
        }
    }

    pub(super) fn send_touches(&mut self) {
        if self.now < self.next_touch {
            return;
        }
        self.next_touch = self.now + self.config.tick;
        let Some(leader) = self.quorum.leader() else {
            return;
        };
        let touched = std::mem::take(&mut self.touched);
        if leader == self.config.id {
            for (session, heard) in touched {
                self.deadlines.touch(session, heard);
            }
            return;
        }
        let ago = |heard| u32::try_from(as_micros(self.now.since(heard))).unwrap_or(u32::MAX);
        let touched: Vec<(SessionId, u32)> = touched
            .into_iter()
            .map(|(session, heard)| (session, ago(heard)))
            .collect();
        for chunk in touched.chunks(TOUCH_MAX) {
            let message = PeerMessage::Touch(chunk.to_vec());
            self.outputs.push_back(Output::Send {
                to: leader,
                message,
            });
        }
    }

    /// Asks what has been committed, for syncs. An answered sync means to its client that the
    /// session lives for its timeout from when the sync was sent ([`crate::client::Lease`]), so the
    /// leader must have counted it before it answers, and must not answer where it was too late:
    /// then it is asked again, until the session has ended.
    pub(super) fn ask_barrier(&mut self, context: u64) {
        let sessions = self.sessions_in_barriers();
        let late = |session: &SessionId| self.deadlines.is_condemned(*session);
        if self.leads() && sessions.iter().any(late) {
            return;
        }
        self.quorum.barrier(context);
    }

    /// Whose syncs wait for an answer to a barrier.
    fn sessions_in_barriers(&self) -> BTreeSet<SessionId> {
        let conns = self.barriers.values().flat_map(|barrier| &barrier.conns);
        let sessions = conns.filter_map(|conn| self.conns.get(conn)?.session());
        sessions.collect()
    }

    /// This server's question to the leader goes with the sessions that ask, in one message: the
    /// answer confirms their life, so neither may be lost without the other.
    pub(super) fn question(&self, question: RaftMessage) -> PeerMessage {
        PeerMessage::Question {
            question,
            sessions: self.sessions_in_barriers().into_iter().collect(),
        }
    }

    /// A follower's question. It is dropped, and will be repeated, where this server does not lead
    /// or the end of one of the sessions is in the log already.
    pub(super) fn on_question(&mut self, question: RaftMessage, sessions: &[SessionId]) {
        if !self.leads() || question.kind != RaftMessageKind::ReadIndex {
            return;
        }
        for session in sessions {
            self.deadlines.touch(*session, self.now);
        }
        let late = |session: &SessionId| self.deadlines.is_condemned(*session);
        if !sessions.iter().any(late) {
            self.quorum.step(question);
        }
    }

    /// A leader whose disk hangs can lead no longer, though its heartbeats go on.
    pub(super) fn check_disk(&mut self) {
        let limit = self.config.disk_stuck_max;
        let stuck = self
            .writes
            .front()
            .is_some_and(|(_, asked)| self.now.since(*asked) > limit);
        if stuck
            && self.leads()
            && self.now >= self.next_hand_over
            && let Some(to) = self.quorum.best_peer()
        {
            self.next_hand_over = self.now + limit;
            tracing::warn!(to, "the disk does not answer: handing leadership over");
            self.quorum.transfer(to);
        }
    }

    /// Deletes containers that nobody uses any more, and znodes that have outlived their time.
    pub(super) fn check_containers(&mut self) {
        let mut due: Vec<String> = Vec::new();
        if self.now >= self.next_container_check {
            self.next_container_check = self.now + self.config.container_check;
            let idle = self.state.tree.idle_containers().take(REAPED_AT_ONCE_MAX);
            due.extend(idle.map(str::to_owned));
        }
        if self.now >= self.next_ttl_check {
            self.next_ttl_check = self.now + self.config.ttl_check;
            let outlived = self.state.tree.outlived(self.wall_ms(self.now));
            due.extend(outlived.take(REAPED_AT_ONCE_MAX).map(str::to_owned));
        }
        if !self.leads() {
            return;
        }
        for path in due {
            self.propose(Proposal {
                origin: self.run,
                command: Command::Reap { path },
            });
        }
    }
}
