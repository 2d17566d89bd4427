//! The rules of the protocols, as functions of the journal.
//!
//! Whoever acts reads the journal, asks these functions what is to be done, and does it on condition
//! that the phase is still what it read. So any number of processes may act for a transaction, late or
//! twice, and the tests below try all orders.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// How a transaction is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Votes, then the decision. While its coordinator lives and does not decide, nobody does.
    TwoPhase,
    /// Votes, then a word to all that everyone has voted yes, then the decision. A coordinator that
    /// lives and does nothing is passed over.
    ThreePhase,
}

/// How far a transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Votes are collected.
    Preparing,
    /// Everyone has voted yes (three-phase only).
    PreCommitted,
    /// Decided.
    Decided(Outcome),
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Everyone does it.
    Committed,
    /// Nobody does it.
    Aborted,
}

/// A participant's answer to the question whether it can commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Vote {
    /// It can, and goes on being able to, whatever happens, until it hears the decision.
    Yes,
    /// It cannot.
    No,
}

impl Phase {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::PreCommitted => "pre-committed",
            Self::Decided(Outcome::Committed) => "committed",
            Self::Decided(Outcome::Aborted) => "aborted",
        }
    }

    pub(super) fn from_bytes(data: &[u8]) -> Option<Self> {
        let all = [
            Self::Preparing,
            Self::PreCommitted,
            Self::Decided(Outcome::Committed),
            Self::Decided(Outcome::Aborted),
        ];
        all.into_iter()
            .find(|phase| phase.as_str().as_bytes() == data)
    }
}

impl Vote {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No => "no",
        }
    }
}

/// A transaction as it stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Journal {
    pub(super) protocol: Protocol,
    pub(super) participants: BTreeSet<String>,
    pub(super) phase: Phase,
    /// Counts the changes of the phase.
    pub(super) version: i32,
    pub(super) votes: BTreeMap<String, Vote>,
    /// Who has heard that everyone voted yes.
    pub(super) acks: BTreeSet<String>,
    /// Who has done what was decided.
    pub(super) done: BTreeSet<String>,
    /// Whether its coordinator's session lives.
    pub(super) coordinator: bool,
}

impl Journal {
    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Preparing | Phase::PreCommitted => None,
            Phase::Decided(outcome) => Some(outcome),
        }
    }

    /// Whether nobody needs the journal any more.
    pub(super) fn over(&self) -> bool {
        let all_done = self
            .participants
            .iter()
            .all(|name| self.done.contains(name));
        self.outcome().is_some() && all_done && !self.coordinator
    }
}

/// The phase to which the coordinator goes on; `out_of_patience` where it waits no longer for those
/// who have not answered.
pub(super) fn coordinate(journal: &Journal, out_of_patience: bool) -> Option<Phase> {
    let everyone = |said: &dyn Fn(&String) -> bool| journal.participants.iter().all(said);
    let votes = &journal.votes;
    match journal.phase {
        Phase::Preparing if everyone(&|name| votes.get(name) == Some(&Vote::Yes)) => {
            Some(match journal.protocol {
                Protocol::TwoPhase => Phase::Decided(Outcome::Committed),
                Protocol::ThreePhase => Phase::PreCommitted,
            })
        }
        Phase::Preparing if out_of_patience || votes.values().any(|vote| *vote == Vote::No) => {
            Some(Phase::Decided(Outcome::Aborted))
        }
        Phase::PreCommitted if out_of_patience || everyone(&|name| journal.acks.contains(name)) => {
            Some(Phase::Decided(Outcome::Committed))
        }
        Phase::Preparing | Phase::PreCommitted | Phase::Decided(_) => None,
    }
}

/// The phase to which anybody else goes on; `out_of_patience` where the coordinator has done nothing
/// for too long.
pub(super) fn recover(journal: &Journal, out_of_patience: bool) -> Option<Phase> {
    let passed_over = match journal.protocol {
        Protocol::TwoPhase => false,
        Protocol::ThreePhase => out_of_patience,
    };
    if journal.coordinator && !passed_over {
        return None;
    }
    match journal.phase {
        Phase::Preparing => Some(Phase::Decided(Outcome::Aborted)),
        Phase::PreCommitted => Some(Phase::Decided(Outcome::Committed)),
        Phase::Decided(_) => None,
    }
}

/// What a participant has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Duty {
    /// Find out whether it can commit, and vote.
    Prepare,
    /// Say that it knows that everyone voted yes.
    Acknowledge,
    /// Do what was decided.
    Apply(Outcome),
    /// Wait for others.
    Wait,
    /// Nothing more.
    Leave,
}

pub(super) fn participate(journal: &Journal, me: &str) -> Duty {
    if journal.done.contains(me) || !journal.participants.contains(me) {
        return Duty::Leave;
    }
    match journal.phase {
        Phase::Preparing if !journal.votes.contains_key(me) => Duty::Prepare,
        Phase::PreCommitted if !journal.acks.contains(me) => Duty::Acknowledge,
        Phase::Preparing | Phase::PreCommitted => Duty::Wait,
        Phase::Decided(outcome) => Duty::Apply(outcome),
    }
}
