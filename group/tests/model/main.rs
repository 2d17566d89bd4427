//! The view change (R1 and R2 in ARCHITECTURE.md) as a model, checked in every state that three nodes can reach with two crashes and
//! any partition: any number of view changes, joins and total failures in a row, members any number of views behind.
//!
//! The model is written from the code by hand. It shows that the *protocol* is sound, and the simulator (`src/sim`) that
//! the code follows it; whoever changes a function on the right changes the step on the left.
//!
//! | step | in the code |
//! |---|---|
//! | `Multicast`, `Receive` | `Core::multicast`, `on_chunk`, `on_header`, `update_stable` |
//! | `Answer`, `Expire` | `on_heartbeat`, `lease_until` |
//! | `Renew` | `renew_alone`, `on_renewed` |
//! | `Wedge` | `propose`, `begin_flush`, `wedge` |
//! | `Promise` | `on_wedge`, `send_wedge_ack`, `on_wedge_ack` |
//! | `Copy` | `copy_to`, `fetch_from` with `on_nak`, `on_chunk` of a copy |
//! | `Write` | `advance_flush`, `old_lease_may_hold`, `successor`, `write` |
//! | `Learn` | `on_view_inside`, `on_view_outside`, `install`, `become_gone` |
//! | `GiveUp` | `all_is_lost`, `tick_joining` |
//! | `Found` | `lost`, `found_generation` |
//!
//! What is left out, and why nothing is lost by it. A step may be possible here that is not in the code, never the other
//! way round (a safety property that holds of more behaviours holds of fewer):
//!
//! - **Silence, suspicion, pre-vote and patience** only say when a step is *tried*. Here each may be tried at any time.
//! - **Messages.** An answer and its arrival are one step. An answer that is lost or late is one that was not given, or one
//!   whose arrival changed nothing in between: what a proposer knows of another only grows, promises are not taken back, and
//!   a wedged member's log changes by copies alone. What a member sent before it died is still received: events from the
//!   view's record (`issued`), copies from the crashed node's log. An acknowledgement counts at once, which makes
//!   more events stable than in truth. `Network::Asynchronous` asks for no connection at all, so it holds every
//!   partition, one-way ones too; `Network::OnePartition` has one, with the coordinator on the larger side.
//! - **The registry's write** is one step, at the moment when the request is *sent*: a proposer that has sent it takes no
//!   other step (`Stage::Writing`), nobody sees the old value in between to any effect, and of two requests for one version
//!   one is as if never sent.
//! - **Time.** A lease is a set: whose answers, younger than the lease, the leader has. Any of them may grow old at any time.
//!   That the proposer has waited until the last answer of those who promised is older than the lease and the margin is the
//!   one fact about clocks that is assumed; that this is *enough* is what is checked. The usurper's second wait is the
//!   same, about the lone leader's last write.
//! - **Fitness** decides who leads: here anybody of those proposed may.
//! - **A joiner's checkpoint and log**: it counts nowhere until its leader has its promise and has brought it to the cut.
//! - **Trimming**, payloads, the service clock, leaving by request are not here; the simulator has them.
//!
//! Reductions: names do not matter (`State::representative`); views, promises, events and members that can have no effect
//! any more are forgotten (`State::tidy`), so there is no bound on the number of view changes. Bounded are the crashes, and the
//! events beyond the oldest cut that a living member still has installed.

#![expect(clippy::expect_used, reason = "helpers of tests")]

mod protocol;
mod state;

use protocol::{Defect, Network, Protocol, Step};
use state::{Life, N, Net, State};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::BTreeSet;

const ONE_LEADER: &str = "at most one node may emit";
const NOTHING_LOST: &str = "a stable event is in every later view of its generation";
const MEMBERS_HOLD: &str = "a view's full members hold its cut and have delivered nothing beyond";
const PROMISES_KEPT: &str = "a wedged member acknowledges nothing";
const ONE_CHAIN: &str = "no two views have one number";

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        self.steps(state, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        Some(self.apply(state, step))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::always(ONE_LEADER, |_, s: &State| {
                (0..N).filter(|i| s.may_emit(*i)).count() <= 1
            }),
            Property::always(NOTHING_LOST, |_, s: &State| !s.broken.lost),
            Property::always(MEMBERS_HOLD, |_, s: &State| !s.broken.bad_member),
            Property::always(PROMISES_KEPT, |_, s: &State| !s.broken.promise),
            Property::always(ONE_CHAIN, |_, s: &State| !s.broken.fork),
        ];
        if self.defect.is_none() {
            all.extend(self.shown());
        }
        all
    }
}

impl Protocol {
    /// What must be reachable, so that the above does not hold for want of anything happening.
    fn shown(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::sometimes("a dead leader is succeeded", |_, s: &State| {
                succeeded(s).is_some_and(|(old, _)| s.nodes[old].life == Life::Crashed)
            }),
            Property::sometimes("a leader is reinstated", |_, s: &State| {
                succeeded(s).is_some_and(|(old, new)| old == new && s.latest().full.len() == N)
            }),
            Property::sometimes("the last of three goes on", |_, s: &State| {
                let goes_on = !s.latest().gap && !s.latest().fresh && s.latest().k == 0;
                goes_on && s.newest() > 0 && s.views[s.newest() - 1].k > 0 && dead(s) == 2
            }),
            Property::sometimes("all is lost, and service resumes", |_, s: &State| {
                s.latest().fresh && dead(s) == 2 && (0..N).any(|i| s.may_emit(i))
            }),
            Property::sometimes("a leader speaks while all others left", |_, s: &State| {
                let left = |i: usize, m: usize| m == i || s.nodes[m].wedged;
                (0..N).any(|i| s.may_emit(i) && s.view_of(i).full.iter().all(|m| left(i, m)))
            }),
            Property::sometimes("a usurper waits while another speaks", |_, s: &State| {
                (0..N).any(|i| s.may_emit(i)) && s.nodes.iter().any(|n| !n.silent.is_empty())
            }),
        ];
        if self.joins {
            all.push(Property::sometimes("one comes back", |_, s: &State| {
                let promoted = |i: usize| s.nodes[i].joining && s.nodes[i].wedged;
                (0..N).any(|i| promoted(i) && s.latest().full.has(i))
            }));
        }
        if self.network == Network::OnePartition {
            let name = "a leader that is cut off is succeeded";
            all.push(Property::sometimes(name, |_, s: &State| {
                let cut_off = |i: usize| matches!(s.net, Net::CutOff(c) if usize::from(c) == i);
                succeeded(s).is_some_and(|(old, new)| {
                    cut_off(old) && new != old && s.latest().full.len() == 2
                })
            }));
        }
        all
    }
}

fn dead(s: &State) -> usize {
    let dead = s.nodes.iter().filter(|n| n.life == Life::Crashed);
    dead.count()
}

/// The leaders of the last two views, when the second has installed its own and directly follows the first.
fn succeeded(s: &State) -> Option<(usize, usize)> {
    let (old, new) = (s.newest().checked_sub(1)?, s.latest().leader());
    let follows = !s.latest().gap && !s.latest().fresh;
    let installed = s.leads(new) && s.nodes[new].place() == s.newest();
    (follows && installed).then(|| (s.views[old].leader(), new))
}

const SOUND: Protocol = Protocol {
    network: Network::Asynchronous,
    all: false,
    crashes: 2,
    joins: true,
    events: 2,
    reduced: true,
    defect: None,
};

/// Every reachable state, each property.
fn holds(p: Protocol) {
    let name = format!("{p:?}");
    let checker = p
        .checker()
        .threads(2)
        .symmetry_fn(State::representative)
        .spawn_dfs()
        .join();
    println!(
        "{name}: {} states, {} steps, depth {}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth()
    );
    // No limit on states, depth or time was set: the search ended because nothing was left.
    assert!(checker.is_done());
    checker.assert_properties();
}

/// The defect breaks each of these; the shortest way to each is printed.
fn breaks(defect: Defect, properties: &[&'static str]) {
    let p = Protocol {
        defect: Some(defect),
        ..SOUND
    };
    let wanted: BTreeSet<&'static str> = properties.iter().copied().collect();
    let checker = p
        .checker()
        .finish_when(HasDiscoveries::AllOf(wanted))
        .spawn_bfs()
        .join();
    println!("{defect:?}: {} states", checker.unique_state_count());
    for property in properties {
        let path = checker.assert_any_discovery(property);
        println!("  not: {property}");
        for step in path.into_actions() {
            println!("    {step:?}");
        }
    }
}

#[test]
fn the_view_change_is_sound_on_any_network() {
    holds(SOUND);
    holds(Protocol { events: 3, ..SOUND });
}

#[test]
fn the_view_change_is_sound_with_one_partition() {
    holds(Protocol {
        network: Network::OnePartition,
        ..SOUND
    });
}

#[test]
fn the_view_change_is_sound_when_all_backups_must_hold() {
    holds(Protocol { all: true, ..SOUND });
}

#[test]
fn members_taken_to_be_out_would_have_broken_nothing() {
    holds(Protocol {
        joins: false,
        events: 1,
        reduced: false,
        ..SOUND
    });
}

#[test]
fn skipping_the_lease_wait_makes_two_leaders() {
    breaks(Defect::SkipLeaseWait, &[ONE_LEADER]);
}

#[test]
fn the_proposers_own_highest_as_cut_loses_events() {
    breaks(Defect::CutIsOwnHighest, &[NOTHING_LOST, MEMBERS_HOLD]);
}

/// Three members are enough for this one.
#[test]
fn counting_what_the_dead_promised_loses_events() {
    breaks(Defect::UncoveredPromise, &[NOTHING_LOST]);
}

#[test]
fn acknowledging_after_the_promise_loses_events_and_makes_two_leaders() {
    breaks(
        Defect::AckAfterWedge,
        &[PROMISES_KEPT, ONE_LEADER, NOTHING_LOST],
    );
}

#[test]
fn a_quorum_too_small_loses_events_and_makes_two_leaders() {
    breaks(Defect::QuorumTooSmall, &[ONE_LEADER, NOTHING_LOST]);
}

#[test]
fn stable_with_one_holder_too_few_loses_events() {
    breaks(Defect::StableTooEarly, &[NOTHING_LOST]);
}

#[test]
fn skipping_the_second_wait_makes_two_leaders() {
    breaks(Defect::SkipSecondWait, &[ONE_LEADER]);
}

/// The model found this one in the code.
#[test]
fn succeeding_a_dead_usurper_at_once_makes_two_leaders() {
    breaks(Defect::TrustFounder, &[ONE_LEADER]);
}

/// And this one.
#[test]
fn a_view_written_before_the_second_wait_is_over_makes_two_leaders() {
    breaks(Defect::WriteWhileSilent, &[ONE_LEADER]);
}

#[test]
fn writing_without_comparing_forks_the_chain() {
    breaks(Defect::BlindWrite, &[ONE_CHAIN]);
}
