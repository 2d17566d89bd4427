//! The servers' answers in short: the leader tells its hashes, the others compare.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use unbroken_tcpstate::{ConnId, OutputMark};

use super::super::divergence::{Answer, Divergence, Found};
use super::Servers;
use crate::clock::BootTime;
use crate::determinism::Harmless;
use crate::fault::planted;

/// A leader tells of what its server has said after this long: by then an answer is usually whole.
const ANNOUNCE_EVERY: Duration = Duration::from_millis(10);
/// Connections told of at once; the others wait for the next time.
const ANNOUNCE_MAX: usize = 64;
/// Places of divergence, the newest, that are kept until they are taken.
pub(crate) const VOTES_MAX: usize = 32;

/// What is shared by all connections' [`Answer`]s.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// Patterns declared harmless, by port.
    harmless: BTreeMap<u16, Arc<Harmless>>,
    /// This node leads: it tells, and does not judge.
    announcing: bool,
    /// Connections of which there is something to tell.
    news: VecDeque<ConnId>,
    /// When they are told of.
    announce_at: BootTime,
    /// How many of them still this time.
    left: usize,
    found: Vec<Divergence>,
    /// Hashes that differ from the leader's, for those who vote on who is right.
    votes: VecDeque<(ConnId, OutputMark)>,
}

impl Answers {
    /// The answer of a connection to `port` that begins.
    pub(super) fn begin(&self, port: u16) -> Answer {
        Answer::new(self.harmless.get(&port).cloned().unwrap_or_default())
    }

    /// A connection's server was read.
    pub(super) fn note(
        &mut self,
        now: BootTime,
        (conn, port): (ConnId, u16),
        answer: &mut Answer,
        found: Option<Found>,
        ended: bool,
    ) {
        if self.announcing {
            if answer.has_news() && !std::mem::replace(&mut answer.listed, true) {
                if self.news.is_empty() {
                    self.announce_at = now + ANNOUNCE_EVERY;
                    self.left = ANNOUNCE_MAX;
                }
                self.news.push_back(conn);
            }
            if ended {
                // Nothing can be told of a connection that is over.
                self.announce_at = now;
                self.left = self.left.max(self.news.len());
            }
        } else {
            self.judge((conn, port), answer, found);
        }
    }

    /// A server was read on a connection that is over: there is nothing to tell of it.
    pub(super) fn note_over(
        &mut self,
        name: (ConnId, u16),
        answer: &mut Answer,
        found: Option<Found>,
    ) {
        if !self.announcing {
            self.judge(name, answer, found);
        }
    }

    fn judge(&mut self, (conn, port): (ConnId, u16), answer: &mut Answer, found: Option<Found>) {
        let found = found.map(|found| Divergence { conn, port, found });
        self.found.extend(found);
        for vote in answer.take_votes() {
            if self.votes.len() == VOTES_MAX {
                self.votes.pop_front();
            }
            self.votes.push_back((conn, vote));
        }
    }
}

impl Servers {
    /// What may differ in the answers of the server on `port`.
    pub(crate) fn declare_harmless(&mut self, port: u16, harmless: Arc<Harmless>) {
        self.answers.harmless.insert(port, harmless);
    }

    /// This node leads from now on: the others compare with what its servers say.
    pub(crate) fn tell_answers(&mut self) {
        self.answers.announcing = true;
        self.answers.news.clear();
        for conn in self.connections() {
            let server = self.servers.get_mut(&conn).expect("it was listed just now");
            server.answer.listed = server.answer.has_news();
            if server.answer.listed {
                self.answers.news.push_back(conn);
            }
        }
    }

    /// Another leads: what was compared with the last leader's answers says nothing now.
    pub(crate) fn judge_answers_anew(&mut self) {
        self.answers.found.clear();
        self.answers.votes.clear();
        for server in self.servers.values_mut().chain(self.lingering.iter_mut()) {
            server.answer.judge_anew();
        }
    }

    /// Leader: the next connection's marks that are due.
    pub(crate) fn poll_marks(&mut self, now: BootTime) -> Option<(ConnId, Vec<OutputMark>)> {
        if !self.answers.announcing || now < self.answers.announce_at {
            return None;
        }
        while self.answers.left > 0
            && let Some(conn) = self.answers.news.pop_front()
        {
            let Some(server) = self.servers.get_mut(&conn) else {
                continue;
            };
            server.answer.listed = false;
            if server.answer.has_news() {
                self.answers.left -= 1;
                return Some((conn, server.answer.announce()));
            }
        }
        self.answers.announce_at = now + ANNOUNCE_EVERY;
        self.answers.left = ANNOUNCE_MAX;
        None
    }

    /// When marks are due.
    pub(crate) fn marks_timeout(&self) -> Option<BootTime> {
        let waiting = self.answers.announcing && !self.answers.news.is_empty();
        waiting.then_some(self.answers.announce_at)
    }

    /// The leader's server has said this.
    pub(super) fn handle_marks(&mut self, conn: ConnId, marks: &[OutputMark]) {
        if self.answers.announcing || planted!(AnswersUnjudged) {
            return;
        }
        let server = match self.servers.get_mut(&conn) {
            Some(server) => Some(server),
            None => self.lingering.get_mut(conn),
        };
        if let Some(server) = server {
            for mark in marks {
                let found = server.answer.handle_mark(*mark);
                let what = (conn, server.port);
                self.answers.judge(what, &mut server.answer, found);
            }
        }
    }

    /// Where this replica's servers were found to differ from the leader's since this was last asked.
    pub(crate) fn take_divergences(&mut self) -> Vec<Divergence> {
        std::mem::take(&mut self.answers.found)
    }

    /// Hashes that differ from the leader's since this was last asked, with their offsets.
    pub(crate) fn take_votes(&mut self) -> impl Iterator<Item = (ConnId, OutputMark)> {
        self.answers.votes.drain(..)
    }

    /// Whether the server here is known to have answered as the leader's has, up to this offset. Of a connection that is over nothing
    /// is known.
    pub(crate) fn agrees_beyond(&self, conn: ConnId, offset: u64) -> bool {
        let server = self.servers.get(&conn);
        server.is_some_and(|server| server.answer.settled() >= offset)
    }

    /// This node leads no more: it judges, and does not tell.
    pub(super) fn judge_answers(&mut self) {
        self.answers.announcing = false;
    }

    /// Every connection is gone.
    pub(super) fn forget_answers(&mut self) {
        self.answers.news.clear();
        self.answers.found.clear();
        self.answers.votes.clear();
    }
}
