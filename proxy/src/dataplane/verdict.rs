//! What becomes of a replica whose server answered otherwise than the leader's.
//!
//! A backup judges itself. It is unfit at once, which its wedge-acknowledgements say too, so that the verdict
//! outlives the leader, and it reports to the leader. If a second one reports the same answer, the
//! leader is the odd one and hands over; else the backup does by itself what the service's
//! `divergence` says. Reported is every mark at which the hashes differ, and not the first alone: two servers
//! that answer alike may be read at different moments, and so find the first difference at different marks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unbroken_group::MemberId;
use unbroken_tcpstate::{ConnId, OutputMark};

use super::divergence::Divergence;
use super::servers::VOTES_MAX;
use crate::clock::BootTime;
use crate::config;
use crate::fault::planted;

/// How long a backup waits for others that agree with it against the leader.
const VOTE_WAIT: Duration = Duration::from_millis(500);
/// How long a backup that diverged from a leader is held for unfit under the next one, unless it is seen to answer as that one does.
const DOUBTED_FOR: Duration = Duration::from_secs(1);
/// How often it reports meanwhile: a report may be lost.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// A replica that diverges again and again joins anew after a wait, which doubles up to the second of
/// these. The first time it does so at once.
const REJOIN_WAIT: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// One that was in step for so long is forgiven.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);
/// Reports that a leader keeps.
const REPORTS_MAX: usize = 1024;

/// What a backup tells the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DivergenceReport {
    pub(crate) conn: u64,
    /// The leader's mark that was not met.
    pub(crate) before: u64,
    /// The hash there, by the backup's server.
    pub(crate) hash: u64,
}

/// What is to be done with this replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Join anew at once.
    Renew,
    /// Leave; [`Verdict::rejoin_due`] says when to join anew.
    Leave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is known against this replica.
    Fit,
    /// It diverged, and acts at this moment.
    Diverged(BootTime),
    /// It diverged from a former leader; whether from this one too is found out by this moment at the latest.
    Doubted(BootTime),
    /// It has left until this moment, or until the node is started anew.
    Out(Option<BootTime>),
}

/// One VIP's verdict on its replica here, and, on a leader, the others' on it.
#[derive(Debug)]
pub(crate) struct Verdict {
    policies: BTreeMap<u16, config::Divergence>,
    state: State,
    /// Divergences seen by this node.
    count: u64,
    latest: Option<Divergence>,
    /// The policy of the latest that calls for action.
    stop: bool,
    report_at: BootTime,
    /// Where this replica's hashes differ from the leader's, the newest at the end.
    votes: VecDeque<DivergenceReport>,
    evictions: u32,
    evicted_at: BootTime,
    /// Leader: what members reported, by where it was.
    reports: BTreeMap<(u64, u64), BTreeMap<MemberId, u64>>,
    /// Leader: members that have diverged from it.
    accusers: BTreeSet<MemberId>,
}

impl Verdict {
    pub(crate) fn new(policies: BTreeMap<u16, config::Divergence>) -> Self {
        Self {
            policies,
            state: State::Fit,
            count: 0,
            latest: None,
            stop: false,
            report_at: BootTime::default(),
            votes: VecDeque::new(),
            evictions: 0,
            evicted_at: BootTime::default(),
            reports: BTreeMap::new(),
            accusers: BTreeSet::new(),
        }
    }

    /// The server here has diverged from the leader's. `others`: there are other backups, which may
    /// agree with it.
    pub(crate) fn handle_divergence(
        &mut self,
        now: BootTime,
        divergence: Divergence,
        others: bool,
    ) {
        self.count += 1;
        self.latest = Some(divergence);
        let policy = self.policies.get(&divergence.port);
        let policy = policy.copied().unwrap_or(config::Divergence::Evict);
        if policy == config::Divergence::Warn {
            return;
        }
        self.stop |= policy == config::Divergence::Stop;
        if matches!(self.state, State::Fit | State::Doubted(_)) {
            let wait = if others { VOTE_WAIT } else { Duration::ZERO };
            self.state = State::Diverged(now + wait);
            self.report_at = now;
        }
    }

    /// The hash of what the server here said differs from the leader's at this mark.
    pub(crate) fn handle_vote(&mut self, conn: ConnId, ours: OutputMark) {
        if self.votes.len() == VOTES_MAX {
            self.votes.pop_front();
        }
        self.votes.push_back(DivergenceReport {
            conn: conn.0,
            before: ours.offset,
            hash: ours.hash,
        });
    }

    /// Whether this replica should not lead.
    pub(crate) fn unfit(&self) -> bool {
        self.state != State::Fit
    }

    /// A view with another leader, or this one as leader (`leads`): the verdict was on the last one's answers. A backup is doubted
    /// until it is seen to answer as the new one does: that one may die at once, and two faults in a row must not let it lead.
    pub(crate) fn handle_new_leader(&mut self, now: BootTime, leads: bool) {
        match self.state {
            State::Doubted(_) | State::Diverged(_) if leads || planted!(DoubtForgotten) => {
                self.state = State::Fit;
            }
            State::Diverged(_) => self.state = State::Doubted(now + DOUBTED_FOR),
            State::Fit | State::Doubted(_) | State::Out(_) => {}
        }
        if !self.is_out() {
            self.stop = false;
        }
        self.votes.clear();
        self.reports.clear();
        self.accusers.clear();
    }

    /// Where this replica is yet to be seen to answer as the leader does.
    pub(crate) fn doubted_at(&self) -> Option<Divergence> {
        self.latest
            .filter(|_| matches!(self.state, State::Doubted(_)))
    }

    /// It does.
    pub(crate) fn acquit(&mut self) {
        if matches!(self.state, State::Doubted(_)) {
            self.state = State::Fit;
        }
    }

    /// This replica begins a new life, brought up by replay: what its servers answered in the last one says nothing any more.
    pub(crate) fn handle_new_life(&mut self) {
        if !self.is_out() {
            self.state = State::Fit;
            self.stop = false;
            self.votes.clear();
        }
    }

    /// Who is a full member now. One that was brought up anew is another.
    pub(crate) fn handle_view(&mut self, full: &[MemberId]) {
        self.accusers.retain(|member| full.contains(member));
    }

    /// Backup: what is reported to the leader now.
    pub(crate) fn poll_reports(&mut self, now: BootTime) -> Option<Vec<DivergenceReport>> {
        if !matches!(self.state, State::Diverged(_)) || now < self.report_at {
            return None;
        }
        self.report_at = now + REPORT_EVERY;
        Some(self.votes.iter().copied().collect())
    }

    /// Leader: a member's report. True if it is the second that says the same.
    pub(crate) fn handle_report(&mut self, from: &MemberId, report: DivergenceReport) -> bool {
        self.accusers.insert(from.clone());
        let key = (report.conn, report.before);
        if self.reports.len() >= REPORTS_MAX && !self.reports.contains_key(&key) {
            self.reports.pop_first();
        }
        let place = self.reports.entry(key).or_default();
        place.insert(from.clone(), report.hash);
        place.values().filter(|hash| **hash == report.hash).count() >= 2
    }

    /// When something is due.
    pub(crate) fn poll_timeout(&self) -> Option<BootTime> {
        match self.state {
            State::Fit => None,
            State::Diverged(at) => Some(at.min(self.report_at)),
            State::Doubted(at) => Some(at),
            State::Out(at) => at,
        }
    }

    /// What a replica that has diverged does now.
    pub(crate) fn poll_action(&mut self, now: BootTime) -> Option<Action> {
        if matches!(self.state, State::Doubted(at) if now >= at) {
            self.acquit();
        }
        let State::Diverged(at) = self.state else {
            return None;
        };
        if now < at {
            return None;
        }
        if self.stop {
            self.state = State::Out(None);
            return Some(Action::Leave);
        }
        if now.since(self.evicted_at) > FORGIVEN_AFTER {
            self.evictions = 0;
        }
        self.evicted_at = now;
        self.evictions += 1;
        self.votes.clear();
        if self.evictions == 1 {
            self.state = State::Fit;
            return Some(Action::Renew);
        }
        let [least, most] = REJOIN_WAIT;
        let wait = least * 2_u32.saturating_pow(self.evictions - 2).min(64);
        self.state = State::Out(Some(now + wait.min(most)));
        Some(Action::Leave)
    }

    /// Whether this replica stays out for now.
    pub(crate) fn is_out(&self) -> bool {
        matches!(self.state, State::Out(_))
    }

    /// True once, when a replica that is out shall join anew.
    pub(crate) fn rejoin_due(&mut self, now: BootTime) -> bool {
        let due = matches!(self.state, State::Out(Some(at)) if now >= at);
        if due {
            self.state = State::Fit;
        }
        due
    }

    /// Divergences seen by this node since it started.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The newest of them.
    pub(crate) fn latest(&self) -> Option<&Divergence> {
        self.latest.as_ref()
    }

    /// Why this replica cannot take over, for people.
    pub(crate) fn reason(&self, now: BootTime) -> Option<String> {
        let place = self
            .latest
            .map_or(String::new(), |latest| format!(" ({})", latest.status()));
        let what = "the server here answered otherwise than the leader's";
        match self.state {
            State::Fit => None,
            State::Diverged(_) => Some(format!("{what}{place}")),
            State::Doubted(_) => Some(format!("{what}{place}, before another led")),
            State::Out(Some(at)) => Some(format!(
                "{what}{place}; it is brought up anew in {} s",
                at.since(now).as_secs() + 1
            )),
            State::Out(None) => Some(format!(
                "{what}{place}; it stays out until the node is started anew (divergence = \"stop\")"
            )),
        }
    }

    /// Leader: whether this member's server answers otherwise.
    pub(crate) fn accused_by(&self, member: &MemberId) -> bool {
        self.accusers.contains(member)
    }
}

#[cfg(test)]
mod tests {
    use super::super::divergence::Found;
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime::from_micros(ms * 1000)
    }

    fn divergence(port: u16) -> Divergence {
        Divergence {
            conn: ConnId(7),
            port,
            found: Found {
                agreed: 10,
                before: 20,
                first: Some(12),
            },
        }
    }

    fn verdict() -> Verdict {
        use config::Divergence::{Evict, Stop, Warn};
        Verdict::new(BTreeMap::from([(80, Evict), (81, Warn), (82, Stop)]))
    }

    #[test]
    fn a_replica_that_diverged_is_unfit_at_once_and_joins_anew_when_nobody_agrees_with_it() {
        let mut verdict = verdict();
        verdict.handle_divergence(at(1000), divergence(80), true);
        assert!(verdict.unfit());
        let vote = |offset| OutputMark { offset, hash: 99 };
        (1..=40).for_each(|offset| verdict.handle_vote(ConnId(7), vote(offset)));
        let reports = verdict.poll_reports(at(1000)).unwrap();
        let places: Vec<_> = reports.iter().map(|report| report.before).collect();
        assert_eq!(places, (9..=40).collect::<Vec<_>>(), "the newest");
        assert_eq!(verdict.poll_reports(at(1001)), None);
        assert!(verdict.poll_reports(at(1050)).is_some());
        assert_eq!(verdict.poll_action(at(1499)), None);
        assert_eq!(verdict.poll_action(at(1500)), Some(Action::Renew));
        assert!(!verdict.unfit());
        // Alone with the leader, nobody can agree with it.
        let mut alone = self::verdict();
        alone.handle_divergence(at(1000), divergence(80), false);
        assert_eq!(alone.poll_action(at(1000)), Some(Action::Renew));
    }

    #[test]
    fn again_and_again_it_waits_longer_and_is_forgiven_in_the_end() {
        let mut verdict = verdict();
        let mut waits = Vec::new();
        let mut now = at(0);
        for _ in 0..9 {
            verdict.handle_divergence(now, divergence(80), false);
            match verdict.poll_action(now) {
                Some(Action::Renew) => waits.push(0),
                Some(Action::Leave) => {
                    assert!(verdict.is_out() && !verdict.rejoin_due(now));
                    let until = verdict.poll_timeout().unwrap();
                    waits.push(until.since(now).as_secs());
                    now = until;
                    assert!(verdict.rejoin_due(now) && !verdict.is_out());
                }
                None => panic!("it is due"),
            }
        }
        assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        now = now + FORGIVEN_AFTER + Duration::from_secs(1);
        verdict.handle_divergence(now, divergence(80), false);
        assert_eq!(verdict.poll_action(now), Some(Action::Renew));
    }

    #[test]
    fn policies() {
        let mut verdict = verdict();
        verdict.handle_divergence(at(0), divergence(81), false);
        assert!(!verdict.unfit() && verdict.poll_action(at(9999)).is_none());
        assert_eq!((verdict.count(), verdict.reason(at(0))), (1, None));
        verdict.handle_divergence(at(0), divergence(82), false);
        assert_eq!(verdict.poll_action(at(0)), Some(Action::Leave));
        assert_eq!(verdict.poll_timeout(), None);
        assert!(!verdict.rejoin_due(at(u64::MAX / 2000)));
        let reason = verdict.reason(at(0)).unwrap();
        assert!(
            reason.contains("(port 82, connection 7, at offset 12); it stays out"),
            "{reason}"
        );
    }

    #[test]
    fn a_leader_is_the_odd_one_if_two_say_the_same() {
        let mut leader = verdict();
        let [a, b, c] = ["a", "b", "c"].map(|name| MemberId::new(name, 1));
        let says = |hash| DivergenceReport {
            conn: 7,
            before: 20,
            hash,
        };
        assert!(!leader.handle_report(&a, says(1)));
        assert!(!leader.handle_report(&a, says(1)), "once more is not twice");
        assert!(!leader.handle_report(&b, says(2)));
        assert!(leader.handle_report(&c, says(2)));
        assert!([&a, &b, &c].iter().all(|m| leader.accused_by(m)));
        leader.handle_view(&[a.clone(), c.clone()]);
        assert!(leader.accused_by(&a) && !leader.accused_by(&b));
        let mut backup = verdict();
        backup.handle_divergence(at(0), divergence(80), true);
        // Under the next leader it is doubted, until it is seen to answer alike, or for a second.
        backup.handle_new_leader(at(100), false);
        assert!(
            backup.unfit() && backup.doubted_at().is_some() && backup.reason(at(100)).is_some()
        );
        assert_eq!((backup.poll_action(at(1099)), backup.unfit()), (None, true));
        let mut acquitted = self::verdict();
        acquitted.handle_divergence(at(0), divergence(80), true);
        acquitted.handle_new_leader(at(100), false);
        acquitted.acquit();
        assert!(!acquitted.unfit());
        assert_eq!(backup.poll_timeout(), Some(at(1100)));
        assert_eq!(
            (backup.poll_action(at(1100)), backup.unfit()),
            (None, false)
        );
        // One that is put out meanwhile is brought up anew, and waits for nothing.
        let mut anew = self::verdict();
        anew.handle_divergence(at(0), divergence(80), true);
        anew.handle_new_leader(at(100), false);
        anew.handle_new_life();
        assert_eq!((anew.unfit(), anew.poll_timeout()), (false, None));
        // It diverges from the next one too.
        backup.handle_divergence(at(2000), divergence(80), false);
        assert_eq!(backup.poll_action(at(2000)), Some(Action::Renew));
        // One that leads is measured by nobody.
        let mut leads = self::verdict();
        leads.handle_divergence(at(0), divergence(80), true);
        leads.handle_new_leader(at(100), true);
        assert!(!leads.unfit());
    }
}
