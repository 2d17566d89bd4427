//! Agreement about closes (R5: a close is an output).
//!
//! What this node's server closed is not shown to the client at once: a server that is stopped, or that
//! alone has had enough, closes too. Backups report their servers' closes to the leader; the leader
//! shows its own when an electable one has reported the same. Nothing here knows sockets or time but
//! what it is handed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use unbroken_group::MemberId;
use unbroken_tcpstate::ConnId;

use super::reports::CloseReport;
use crate::clock::BootTime;
use crate::fault::planted;

/// A report that may have been lost is repeated after this long, later after twice as long, and so on.
const REPEAT_MIN: Duration = Duration::from_millis(20);
const REPEAT_MAX: Duration = Duration::from_secs(1);

/// How a server closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closed {
    /// In order, behind its last byte at this offset.
    Fin(u64),
    /// It broke the connection off: how much it said before is a matter of chance.
    Reset,
}

impl Closed {
    fn agrees(self, other: Self) -> bool {
        match (self, other) {
            (Self::Fin(a), Self::Fin(b)) => a == b,
            // A server that closes with input unread resets, or not, as the input came before or after.
            (Self::Reset, _) | (_, Self::Reset) => true,
        }
    }
}

/// A close of this node's server that nobody has been shown.
#[derive(Debug)]
struct Own {
    closed: Closed,
    /// What was heard of the server before, as an offset.
    said: u64,
    /// Since when it could have been agreed upon.
    since: Option<BootTime>,
}

/// What the leader does about a close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is agreed on, or there is nobody to ask: show it.
    Show,
    /// Somebody else's server goes on with this connection.
    WentOn,
    /// Those who could be asked have closed too, in other ways.
    Differs,
    /// It broke before all was said that somebody else's server said to its end.
    Broke,
}

/// Whether a leader may hand over because another's server goes on with what this one's closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MayYield {
    /// It may.
    Yes,
    /// It is doing so: who leads next will show what is to be shown.
    UnderWay,
    /// Not for a moment: it came to lead, or handed over, a moment ago.
    No,
}

/// What is done about a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    Show,
    /// It is shown although the servers differ.
    ShowDiffering,
    HandOver,
    Wait,
}

impl Verdict {
    pub(crate) fn deed(self, may_yield: MayYield) -> Deed {
        match (self, may_yield) {
            (Self::Show, _) => Deed::Show,
            (Self::WentOn | Self::Broke, MayYield::Yes) => Deed::HandOver,
            (Self::WentOn | Self::Broke, MayYield::UnderWay) => Deed::Wait,
            // Another's server has all that was said: it will be its to say, as soon as it may lead.
            (Self::Broke, MayYield::No) => Deed::Wait,
            (Self::WentOn, MayYield::No) | (Self::Differs, _) => Deed::ShowDiffering,
        }
    }
}

/// What is asked of the leader's stack.
pub(crate) trait Shown {
    /// Whether nothing is left to be shown: the close was agreed on before, or the connection is over.
    fn is_over(&self, conn: ConnId, closed: Closed) -> bool;
    /// What the client is known to have of the server's output, as an offset.
    fn acked(&self, conn: ConnId) -> u64;
    /// How long a close of this connection waits.
    fn close_wait(&self, conn: ConnId) -> Duration;
}

/// Closes of this node's server, and what the others say of theirs.
#[derive(Debug, Default)]
pub(crate) struct Closes {
    own: BTreeMap<ConnId, Own>,
    /// What members reported, of connections that live.
    reported: BTreeMap<ConnId, Vec<(MemberId, Closed)>>,
    runs: BTreeMap<MemberId, u64>,
    /// Deaths of servers on this node.
    run: u64,
    /// To be judged by a leader, to be reported by a backup.
    fresh: BTreeSet<ConnId>,
    /// Say that the earlier reports are void, even if there is nothing else to say.
    void: bool,
    repeat_at: Option<BootTime>,
    repeat_after: Duration,
}

impl Closes {
    /// This node's server closed a connection, and lived afterwards. `said`: what was heard of it before, as an offset.
    pub(crate) fn note(&mut self, conn: ConnId, closed: Closed, said: u64) {
        let since = None;
        let own = Own {
            closed,
            said,
            since,
        };
        self.own.insert(conn, own);
        self.fresh.insert(conn);
        self.repeat_after = REPEAT_MIN;
        self.repeat_at = None;
    }

    /// Whether this node's server closed the connection, and nobody was shown.
    pub(crate) fn is_own(&self, conn: ConnId) -> bool {
        self.own.contains_key(&conn)
    }

    /// The connection is over, or its close agreed on.
    pub(crate) fn settle(&mut self, conn: ConnId) {
        self.own.remove(&conn);
        self.fresh.remove(&conn);
        self.reported.remove(&conn);
    }

    /// A server of this node died: what it closed is void, and what was reported of it. Gives back the
    /// connections of those that `died` names.
    pub(crate) fn void(&mut self, died: impl Fn(ConnId) -> bool) -> Vec<ConnId> {
        self.run += 1;
        self.void = true;
        let gone: Vec<ConnId> = self.own.keys().copied().filter(|c| died(*c)).collect();
        for conn in &gone {
            self.own.remove(conn);
        }
        self.again();
        gone
    }

    /// Connections of own closes.
    pub(crate) fn own(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.own.keys().copied()
    }

    /// A view begins: reports were for another leader, waiting starts again.
    pub(crate) fn handle_view(&mut self) {
        self.reported.clear();
        for own in self.own.values_mut() {
            own.since = None;
        }
        self.again();
    }

    /// Everything is to be judged, or reported, again.
    pub(crate) fn again(&mut self) {
        self.fresh = self.own.keys().copied().collect();
        self.repeat_after = REPEAT_MIN;
        self.repeat_at = None;
    }

    // --- backup -----------------------------------------------------------------------------------

    /// The next message to the leader with at most `max` closes: the run and the closes. Drain to `None`.
    pub(crate) fn poll_report(
        &mut self,
        now: BootTime,
        max: usize,
    ) -> Option<(u64, Vec<CloseReport>)> {
        if planted!(ClosesUnreported) {
            return None;
        }
        if self.fresh.is_empty() && self.repeat_at.is_some_and(|at| at <= now) {
            let after = self.repeat_after;
            self.again();
            self.repeat_after = (after * 2).min(REPEAT_MAX);
        }
        if self.fresh.is_empty() && !self.void {
            return None;
        }
        self.void = false;
        let mut closes = Vec::new();
        while closes.len() < max
            && let Some(conn) = self.fresh.pop_first()
        {
            if let Some(own) = self.own.get(&conn) {
                closes.push(CloseReport::new(conn, own.closed));
            }
        }
        self.repeat_at = (!self.own.is_empty()).then(|| now + self.repeat_after);
        Some((self.run, closes))
    }

    /// When something is to be reported again.
    pub(crate) fn poll_timeout(&self) -> Option<BootTime> {
        self.repeat_at
    }

    // --- leader -----------------------------------------------------------------------------------

    /// A member reports closes; those of connections that `lives` does not know are of no interest.
    pub(crate) fn handle_report(
        &mut self,
        from: &MemberId,
        run: u64,
        closes: &[CloseReport],
        lives: impl Fn(ConnId) -> bool,
    ) {
        let known = self.runs.entry(from.clone()).or_insert(run);
        if run < *known {
            return;
        }
        if run > *known {
            *known = run;
            self.reported.retain(|_, said| {
                said.retain(|(by, _)| by != from);
                !said.is_empty()
            });
        }
        for close in closes.iter().filter(|c| lives(c.conn())) {
            let conn = close.conn();
            let said = self.reported.entry(conn).or_default();
            said.retain(|(by, _)| by != from);
            said.push((from.clone(), close.closed()));
            if self.own.contains_key(&conn) {
                self.fresh.insert(conn);
            }
        }
    }

    /// Whether there are reports that nothing was made of yet.
    pub(crate) fn has_reports(&self) -> bool {
        !self.reported.is_empty()
    }

    /// Forgets what others than these `electable` ones reported: to be called regularly. Members repeat their
    /// reports, so nothing is lost; and one whose server died says so by not being electable, again and again,
    /// while the message that voids its reports may be lost.
    pub(crate) fn keep_reports(&mut self, electable: &[MemberId]) {
        self.reported.retain(|_, said| {
            said.retain(|(by, _)| electable.contains(by));
            !said.is_empty()
        });
    }

    /// Forgets the runs of members that are no more.
    pub(crate) fn keep_members(&mut self, members: &[MemberId]) {
        self.runs.retain(|m, _| members.contains(m));
    }

    /// Whether something is to be judged at once.
    pub(crate) fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Judges what is to be judged. `electable` are those who could be asked: the other full members
    /// that could lead. What waits on is not named.
    pub(crate) fn judge(
        &mut self,
        now: BootTime,
        electable: &[MemberId],
        shown: &impl Shown,
    ) -> Vec<(ConnId, Closed, Verdict)> {
        let mut verdicts = Vec::new();
        for conn in std::mem::take(&mut self.fresh) {
            let Some(own) = self.own.get_mut(&conn) else {
                continue;
            };
            if shown.is_over(conn, own.closed) {
                self.settle(conn);
                continue;
            }
            let said = self.reported.get(&conn).map_or(&[][..], Vec::as_slice);
            let heard: Vec<Closed> = said
                .iter()
                .filter(|(by, _)| electable.contains(by))
                .map(|(_, closed)| *closed)
                .collect();
            // A connection that broke before all was said that another's server said to its end was broken by no
            // close: a part of the server has died.
            let broke = own.closed == Closed::Reset
                && (heard.iter()).any(|c| matches!(c, Closed::Fin(end) if *end > own.said));
            if broke {
                verdicts.push((conn, own.closed, Verdict::Broke));
                continue;
            }
            if electable.is_empty() || heard.iter().any(|c| c.agrees(own.closed)) {
                verdicts.push((conn, own.closed, Verdict::Show));
                continue;
            }
            // A backup whose record is full learns of its server's end only when the client has read
            // on: until then silence says nothing.
            let told = match own.closed {
                Closed::Fin(offset) => shown.acked(conn) >= offset,
                Closed::Reset => true,
            };
            if told {
                own.since.get_or_insert(now);
            }
            let expired = own
                .since
                .is_some_and(|since| now.since(since) >= shown.close_wait(conn));
            if !expired {
                continue;
            }
            let others_agree = heard
                .iter()
                .enumerate()
                .any(|(i, a)| heard[..i].iter().any(|b| a.agrees(*b)));
            let verdict = if heard.len() < electable.len() || others_agree {
                Verdict::WentOn
            } else {
                Verdict::Differs
            };
            verdicts.push((conn, own.closed, verdict));
        }
        verdicts
    }
}

#[cfg(test)]
mod sim;

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(1);
    const CONN: ConnId = ConnId(7);

    /// What the client has; the connection is over when `None`.
    struct Client(Option<u64>);

    impl Shown for Client {
        fn is_over(&self, _: ConnId, _: Closed) -> bool {
            self.0.is_none()
        }

        fn acked(&self, _: ConnId) -> u64 {
            self.0.unwrap_or(0)
        }

        fn close_wait(&self, _: ConnId) -> Duration {
            WAIT
        }
    }

    const HAS_ALL: Client = Client(Some(100));

    pub(super) fn at(ms: u64) -> BootTime {
        BootTime::from_micros(ms * 1000)
    }

    pub(super) fn members(count: u128) -> Vec<MemberId> {
        (2..2 + count)
            .map(|i| MemberId::new(format!("r{i}"), i))
            .collect()
    }

    /// A leader whose server closed at 100.
    fn closed() -> Closes {
        let mut closes = Closes::default();
        closes.note(CONN, Closed::Fin(100), 100);
        closes
    }

    fn says(closes: &mut Closes, by: &MemberId, run: u64, closed: Closed) {
        closes.handle_report(by, run, &[CloseReport::new(CONN, closed)], |_| true);
    }

    /// What is decided at `ms`, everything being looked at.
    fn verdict(
        closes: &mut Closes,
        ms: u64,
        electable: &[MemberId],
        client: &Client,
    ) -> Option<Verdict> {
        closes.again();
        let verdicts = closes.judge(at(ms), electable, client);
        verdicts.first().map(|(_, _, verdict)| *verdict)
    }

    #[test]
    fn an_agreed_close_is_shown_at_once_whoever_was_first() {
        let others = members(2);
        let mut closes = closed();
        assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
        says(&mut closes, &others[1], 0, Closed::Fin(100));
        assert!(closes.has_fresh());
        assert_eq!(
            closes.judge(at(1), &others, &HAS_ALL),
            [(CONN, Closed::Fin(100), Verdict::Show)]
        );
        let mut closes = Closes::default();
        says(&mut closes, &others[0], 0, Closed::Fin(100));
        assert!(!closes.has_fresh());
        closes.note(CONN, Closed::Fin(100), 100);
        assert_eq!(
            verdict(&mut closes, 0, &others, &HAS_ALL),
            Some(Verdict::Show)
        );
    }

    #[test]
    fn offsets_matter() {
        let others = members(1);
        let mut closes = closed();
        says(&mut closes, &others[0], 0, Closed::Fin(99));
        assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
        says(&mut closes, &others[0], 0, Closed::Reset);
        assert_eq!(
            verdict(&mut closes, 0, &others, &HAS_ALL),
            Some(Verdict::Show)
        );
        // It is shown if nothing is missing that another's server said before it closed.
        for (said, expected) in [(5, Verdict::Show), (4, Verdict::Broke)] {
            let mut closes = Closes::default();
            closes.note(CONN, Closed::Reset, said);
            assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
            says(&mut closes, &others[0], 0, Closed::Fin(5));
            assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), Some(expected));
        }
    }

    #[test]
    fn what_broke_is_never_shown_while_another_could_finish_it() {
        use MayYield::{No, UnderWay, Yes};
        let deeds = |verdict: Verdict| [Yes, UnderWay, No].map(|may| verdict.deed(may));
        assert_eq!(deeds(Verdict::Show), [Deed::Show; 3]);
        assert_eq!(deeds(Verdict::Differs), [Deed::ShowDiffering; 3]);
        let went_on = [Deed::HandOver, Deed::Wait, Deed::ShowDiffering];
        assert_eq!(deeds(Verdict::WentOn), went_on);
        let broke = [Deed::HandOver, Deed::Wait, Deed::Wait];
        assert_eq!(deeds(Verdict::Broke), broke);
    }

    #[test]
    fn with_nobody_to_ask_a_close_is_shown_at_once() {
        assert_eq!(
            verdict(&mut closed(), 0, &[], &HAS_ALL),
            Some(Verdict::Show)
        );
        // A report of one that could not lead counts for nothing.
        let others = members(2);
        let mut closes = closed();
        says(&mut closes, &others[0], 0, Closed::Fin(100));
        assert_eq!(verdict(&mut closes, 0, &others[1..], &HAS_ALL), None);
    }

    #[test]
    fn a_server_that_goes_on_contradicts_in_the_end() {
        let others = members(2);
        let mut closes = closed();
        assert_eq!(verdict(&mut closes, 5, &others, &HAS_ALL), None);
        assert_eq!(verdict(&mut closes, 1004, &others, &HAS_ALL), None);
        assert_eq!(
            verdict(&mut closes, 1005, &others, &HAS_ALL),
            Some(Verdict::WentOn)
        );
        // Both closed otherwise: only if they agree do they outvote this one.
        says(&mut closes, &others[0], 0, Closed::Fin(90));
        says(&mut closes, &others[1], 0, Closed::Fin(80));
        assert_eq!(
            verdict(&mut closes, 1005, &others, &HAS_ALL),
            Some(Verdict::Differs)
        );
        says(&mut closes, &others[1], 0, Closed::Fin(90));
        assert_eq!(
            verdict(&mut closes, 1005, &others, &HAS_ALL),
            Some(Verdict::WentOn)
        );
    }

    #[test]
    fn a_slow_client_does_not_contradict_anybody() {
        let others = members(1);
        let mut closes = closed();
        assert_eq!(verdict(&mut closes, 0, &others, &Client(Some(99))), None);
        assert_eq!(
            verdict(&mut closes, 60_000, &others, &Client(Some(99))),
            None
        );
        assert_eq!(verdict(&mut closes, 60_000, &others, &HAS_ALL), None);
        assert_eq!(
            verdict(&mut closes, 61_000, &others, &HAS_ALL),
            Some(Verdict::WentOn)
        );
    }

    #[test]
    fn a_death_voids_what_was_said_before() {
        let others = members(1);
        // On the leader, by what the member says next, in whatever order that comes.
        let mut closes = closed();
        closes.handle_report(&others[0], 1, &[], |_| true);
        says(&mut closes, &others[0], 0, Closed::Fin(100));
        assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
        says(&mut closes, &others[0], 1, Closed::Fin(100));
        closes.handle_report(&others[0], 2, &[], |_| true);
        assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
        says(&mut closes, &others[0], 2, Closed::Fin(100));
        assert_eq!(
            verdict(&mut closes, 0, &others, &HAS_ALL),
            Some(Verdict::Show)
        );
        // On the member: the others' closes are said again, in a new run.
        let mut closes = closed();
        closes.note(ConnId(8), Closed::Reset, 0);
        assert_eq!(
            closes.poll_report(at(0), 10).map(|(r, c)| (r, c.len())),
            Some((0, 2))
        );
        assert_eq!(closes.void(|c| c == CONN), [CONN]);
        let still = CloseReport::new(ConnId(8), Closed::Reset);
        assert_eq!(closes.poll_report(at(0), 10), Some((1, vec![still])));
        assert_eq!(closes.void(|_| true), [ConnId(8)]);
        assert_eq!(closes.poll_report(at(0), 10), Some((2, vec![])));
        assert_eq!(closes.poll_report(at(9999), 10), None);
    }

    #[test]
    fn a_report_is_repeated_until_the_close_is_agreed_on() {
        let mut closes = closed();
        closes.note(ConnId(8), Closed::Reset, 0);
        closes.note(ConnId(9), Closed::Reset, 0);
        let mut said = Vec::new();
        let mut now = at(0);
        for _ in 0..3 {
            while let Some((0, some)) = closes.poll_report(now, 2) {
                said.push(some.len());
            }
            now = closes.poll_timeout().unwrap();
        }
        assert_eq!(said, [2, 1, 2, 1, 2, 1]);
        assert!(now > at(60), "each time later");
        for conn in [CONN, ConnId(8), ConnId(9)] {
            closes.settle(conn);
        }
        assert_eq!(closes.poll_report(at(99_999), 2), None);
    }

    #[test]
    fn a_new_view_asks_and_waits_again() {
        let others = members(1);
        let mut closes = closed();
        assert_eq!(verdict(&mut closes, 0, &others, &HAS_ALL), None);
        says(&mut closes, &others[0], 0, Closed::Fin(100));
        closes.handle_view();
        assert_eq!(verdict(&mut closes, 5000, &others, &HAS_ALL), None);
        assert_eq!(
            verdict(&mut closes, 6000, &others, &HAS_ALL),
            Some(Verdict::WentOn)
        );
    }

    #[test]
    fn what_is_over_is_forgotten() {
        let mut closes = closed();
        assert_eq!(verdict(&mut closes, 0, &[], &Client(None)), None);
        assert!(!closes.is_own(CONN));
        // Nobody fills the leader's memory with connections that there are not.
        let report = [CloseReport::new(ConnId(99), Closed::Reset)];
        closes.handle_report(&members(1)[0], 0, &report, |_| false);
        assert!(closes.reported.is_empty());
    }
}
