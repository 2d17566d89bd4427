//! The end of a view, and gbcast, which is delivered there: at all members between the same messages.
//!
//! BJ87 (GBCAST is ordered with respect to every other multicast), BSS91 §5.5 (flush). Every survivor reports what it
//! holds of each lane; the site leader has it fetch from others what they hold and it does not; when all hold the same, the
//! leader enters the cut. A leader that dies meanwhile is replaced by one that collects the reports anew: what it needs is in
//! the ledger, and survivors repeat their reports until the view has ended.

use super::Process;
use super::ledger::Ledger;
use super::types::{GroupId, Output};
use super::wire::{self, Entry, FROM_LEADER, Header, Lack, Op, Report, Small, ToLeader};
use crate::config::planted;
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// A member that lacks something is told so again after this long.
const FETCH_AGAIN: Duration = Duration::from_millis(5);
/// Groups of which early reports are kept; what is not kept is reported again.
const EARLY_MAX: usize = super::GROUPS_MAX;

/// The site leader's side: the reports that have come.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Flushes {
    current: BTreeMap<GroupId, Flush>,
    /// Of changes that have not begun here: a member takes an entry when it holds it, the leader when enough others do.
    early: BTreeMap<GroupId, BTreeMap<MemberId, Report>>,
}

#[derive(Default, Serialize, Deserialize)]
struct Flush {
    epoch: u64,
    held: BTreeMap<MemberId, Vec<u64>>,
    entered: bool,
    /// When each was last told what it lacks.
    told: BTreeMap<MemberId, Instant>,
}

/// What to do for a group.
enum Step {
    Wait,
    Fetch(Vec<(MemberId, Vec<Lack>)>),
    Enter(Vec<u64>),
}

impl Flushes {
    pub(crate) fn ended(&mut self, group: GroupId) {
        self.current.remove(&group);
    }

    /// A change begins here: what was reported before counts.
    pub(crate) fn began(&mut self, ledger: &Ledger, group: GroupId) {
        for (from, report) in self.early.remove(&group).into_iter().flatten() {
            self.on_report(ledger, &from, report);
        }
    }

    /// A member reports.
    pub(crate) fn on_report(&mut self, ledger: &Ledger, from: &MemberId, report: Report) {
        let Some(g) = ledger.group(report.group) else {
            return;
        };
        let current = g.change.as_ref().is_some_and(|c| c.epoch == report.epoch);
        let fits = report.held.len() == g.view.members.len() && g.view.members.contains(from);
        if !fits {
            return;
        }
        if !current {
            let room = self.early.len() < EARLY_MAX || self.early.contains_key(&report.group);
            if room && ledger.is_ahead(report.epoch) {
                let early = self.early.entry(report.group).or_default();
                early.insert(from.clone(), report);
            }
            return;
        }
        let flush = self.current.entry(report.group).or_default();
        if flush.epoch != report.epoch {
            *flush = Flush {
                epoch: report.epoch,
                ..Flush::default()
            };
        }
        // An older report that comes late claims less; both are true.
        let known = flush.held.entry(from.clone()).or_default();
        if known.is_empty() {
            *known = report.held;
        } else {
            for (known, held) in known.iter_mut().zip(report.held) {
                *known = (*known).max(held);
            }
        }
    }

    fn step(&self, config: &crate::Config, ledger: &Ledger, group: GroupId, now: Instant) -> Step {
        let (Some(flush), Some(g)) = (self.current.get(&group), ledger.group(group)) else {
            return Step::Wait;
        };
        let current = g.change.as_ref().is_some_and(|c| c.epoch == flush.epoch);
        if flush.entered || !current {
            return Step::Wait;
        }
        let survivors: Vec<(&MemberId, &Vec<u64>)> = g
            .survivors()
            .filter_map(|m| Some((m, flush.held.get(m)?)))
            .collect();
        if survivors.len() != g.survivors().count() {
            return Step::Wait;
        }
        let lanes = g.view.members.len();
        let target: Vec<u64> = (0..lanes)
            .map(|lane| survivors.iter().map(|(_, held)| held[lane]).max())
            .map(|held| held.unwrap_or(0))
            .collect();
        if planted!(config, CutIsFirstReport) {
            return Step::Enter(survivors[0].1.clone());
        }
        let mut lacking = Vec::new();
        let mut whole = true;
        for (m, held) in &survivors {
            let mut wants = Vec::new();
            for lane in 0..lanes {
                if held[lane] < target[lane] {
                    let sender = &g.view.members[lane];
                    let full = |(_, held): &&(&MemberId, &Vec<u64>)| held[lane] == target[lane];
                    let holders = survivors.iter().filter(full).map(|(m, _)| *m);
                    // The sender itself, if it is there: it answers such requests anyway.
                    let holder = holders.min_by_key(|m| *m != sender);
                    let holder = holder.and_then(|h| g.view.rank(h));
                    let rank = |r: usize| u8::try_from(r).expect("MEMBERS_MAX");
                    wants.push((rank(lane), target[lane], rank(holder.unwrap_or(lane))));
                }
            }
            if !wants.is_empty() {
                whole = false;
                let told = flush.told.get(*m);
                if told.is_none_or(|t| now.since(*t) >= FETCH_AGAIN) {
                    lacking.push(((*m).clone(), wants));
                }
            }
        }
        match (whole, lacking.is_empty()) {
            (true, _) => Step::Enter(target),
            (false, true) => Step::Wait,
            (false, false) => Step::Fetch(lacking),
        }
    }
}

impl Process {
    /// What this process has to report.
    pub(super) fn reports(&self) -> Vec<Report> {
        let blocked = self.changing.iter().filter_map(|id| {
            let held = self.endpoints.get(id)?.report()?;
            let change = self.ledger.group(*id)?.change.as_ref()?;
            Some(Report {
                group: *id,
                epoch: change.epoch,
                held,
            })
        });
        blocked.collect()
    }

    /// The site leader ends the views that can be ended.
    pub(super) fn end_views(&mut self) {
        if !self.may_append() {
            return;
        }
        let me = self.me.clone();
        for report in self.reports() {
            self.flushes.on_report(&self.ledger, &me, report);
        }
        let changing: Vec<GroupId> = self.changing.iter().copied().collect();
        for group in changing {
            let config = &self.config.core;
            match self.flushes.step(config, &self.ledger, group, self.now) {
                Step::Wait => {}
                Step::Fetch(lacking) => {
                    for (m, wants) in lacking {
                        self.tell_to_fetch(group, &m, wants);
                    }
                }
                Step::Enter(cut) => {
                    let flush = self.flushes.current.get_mut(&group);
                    let flush = flush.expect("it made a step");
                    flush.entered = true;
                    let epoch = flush.epoch;
                    self.append(Entry::Cut { group, epoch, cut });
                }
            }
        }
        self.drain_core();
    }

    fn tell_to_fetch(&mut self, group: GroupId, to: &MemberId, wants: Vec<Lack>) {
        let now = self.now;
        let flush = self.flushes.current.get_mut(&group);
        let flush = flush.expect("it made a step");
        flush.told.insert(to.clone(), now);
        let epoch = flush.epoch;
        if *to == self.me {
            self.at(group, |e, _| e.on_fetch(&wants));
            return;
        }
        let view = self.ledger.group(group).map_or(0, |g| g.view.id);
        let header = Header {
            flags: FROM_LEADER,
            lane: wire::DIRECT,
            group: group.0,
            view,
            ..Header::default()
        };
        let body = super::lane::body(&header, &[Small::Fetch { epoch, wants }]);
        self.out.push_back(Output::Send {
            to: Arc::from([to.clone()]),
            bodies: vec![body],
        });
    }
}

/// What a process has to say to the site leader, in messages of at most `most` bytes.
pub(super) fn to_leader(
    first: u64,
    requests: &VecDeque<Op>,
    reports: &[Report],
    most: usize,
) -> Vec<Bytes> {
    /// Messages for one moment; the rest follows when these were heeded.
    const MESSAGES_MAX: usize = 16;
    let mut out = Vec::new();
    let mut put = |words: &ToLeader| {
        let words = postcard::to_stdvec(words).expect("what is said can be serialised");
        out.push(Bytes::from(words));
    };
    let mut ops: Vec<Op> = Vec::new();
    let (mut number, mut used, mut messages) = (first, 0, 0);
    for op in requests {
        let bytes = postcard::to_stdvec(op).map_or(0, |b| b.len());
        if used + bytes + 24 > most {
            let words = ToLeader::Requests {
                first: number,
                ops: std::mem::take(&mut ops),
            };
            if let ToLeader::Requests { ops, .. } = &words {
                number += ops.len() as u64;
            }
            put(&words);
            used = 0;
            messages += 1;
            if messages == MESSAGES_MAX {
                break;
            }
        }
        used += bytes;
        ops.push(op.clone());
    }
    if !ops.is_empty() {
        put(&ToLeader::Requests { first: number, ops });
    }
    let mut part: Vec<Report> = Vec::new();
    let mut used = 0;
    for r in reports {
        let bytes = 24 + 10 * r.held.len();
        if used + bytes + 8 > most && !part.is_empty() {
            put(&ToLeader::Reports(std::mem::take(&mut part)));
            used = 0;
        }
        used += bytes;
        part.push(r.clone());
    }
    if !part.is_empty() {
        put(&ToLeader::Reports(part));
    }
    out
}
