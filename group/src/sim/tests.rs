//! The simulator as a test: many seeds pass; the same seed is the same run; each planted fault is found.

use super::world::run_forgetting;
use super::{Options, Outcome, run};
use crate::config::Fault;
use crate::core::{AckDebt, Core};
use crate::rng::Rng;
use crate::wire::Pos;
use std::collections::BTreeSet;

fn seeds(from: u64, count: u64) {
    for seed in from..from + count {
        passes(seed, 0);
    }
}

fn passes(seed: u64, nodes: usize) {
    let report = run(&Options {
        seed,
        nodes,
        ..Options::default()
    });
    assert_eq!(
        report.outcome,
        Outcome::Passed,
        "see: cargo run --release -p unbroken-group --features faults --bin sim -- --seed {seed} --nodes {nodes} --trace"
    );
}

/// Runs in which defects show themselves that seldom do.
#[test]
fn telling_seeds_pass() {
    passes(32, 5);
    passes(77, 0);
}

// In four parts, so that they run beside each other.
#[test]
fn many_seeds_pass() {
    seeds(1, 500);
}

#[test]
fn many_more_seeds_pass() {
    seeds(100_001, 500);
}

#[test]
fn still_more_seeds_pass() {
    seeds(200_001, 500);
}

#[test]
fn and_more_seeds_pass() {
    seeds(300_001, 500);
}

/// Members that are stopped for up to half a minute, and slow hosts.
#[test]
fn long_troubles_are_survived() {
    for seed in 1..=25 {
        let report = run(&Options {
            seed,
            long: true,
            ..Options::default()
        });
        assert_eq!(
            report.outcome,
            Outcome::Passed,
            "see: cargo run --release -p unbroken-group --features faults --bin sim -- --long --seed {seed} --trace"
        );
    }
}

#[test]
fn one_seed_is_one_run() {
    for seed in 1..6 {
        let options = Options {
            seed,
            ..Options::default()
        };
        assert_eq!(run(&options), run(&options));
    }
}

fn found(fault: Fault, invariants: &[&str]) {
    found_from(1, 0, fault, invariants);
}

/// Beginning with a seed that is known to find it. `nodes`: 0 lets the seed choose.
fn found_from(first: u64, nodes: usize, fault: Fault, invariants: &[&str]) {
    for seed in first..first + 1000 {
        let report = run(&Options {
            seed,
            nodes,
            fault: Some(fault),
            ..Options::default()
        });
        if let Outcome::Failed { invariant, .. } = report.outcome
            && invariants.contains(&invariant.as_str())
        {
            return;
        }
    }
    panic!("{fault:?} was not found");
}

#[test]
fn acknowledging_after_the_wedge_is_found() {
    found(Fault::AckAfterWedge, &["no ack after wedge"]);
}

#[test]
fn skipping_the_lease_wait_is_found() {
    found(Fault::SkipLeaseWait, &["one leader emits"]);
}

#[test]
fn cutting_at_ones_own_highest_is_found() {
    found(Fault::CutIsOwnHighest, &["stable survives", "fifo"]);
}

#[test]
fn delivering_beyond_the_cut_is_found() {
    // It takes two proposers that reach different members, so four of them at least.
    found_from(32, 5, Fault::DeliverBeyondCut, &["fifo", "view synchrony"]);
}

#[test]
fn stability_with_one_holder_too_few_is_found() {
    found(Fault::StableAtKMinusOne, &["stable survives"]);
}

#[test]
fn a_restarted_process_that_survives_is_found() {
    found_from(
        77,
        0,
        Fault::RestartSurvives,
        &["view synchrony", "stable survives", "fifo"],
    );
}

#[test]
fn a_joiner_that_misses_an_event_is_found() {
    found(Fault::JoinerSkipsOne, &["fifo", "view synchrony"]);
}

#[test]
fn a_successor_that_is_not_fit_is_found() {
    found(Fault::LeaderUnfit, &["fitness"]);
}

#[test]
fn a_service_clock_that_forgets_the_lease_is_found() {
    found(Fault::ClockWithoutLease, &["service clock"]);
}

#[test]
fn forgetting_events_too_early_is_found() {
    found(Fault::EarlyTrim, &["liveness", "view synchrony", "fifo"]);
}

fn with_twins(seed: u64) -> Options {
    Options {
        seed,
        twins: true,
        ..Options::default()
    }
}

#[test]
fn a_run_cut_at_every_step_is_the_uncut_run() {
    for seed in 1..=12 {
        let uncut = Options {
            twins: false,
            ..with_twins(seed)
        };
        assert_eq!(run(&with_twins(seed)), run(&uncut), "seed {seed}");
    }
}

/// What a snapshot that forgot this would do to a restored core.
macro_rules! forgetting {
    ($($field:ident: $value:expr),* $(,)?) => {
        [$((stringify!($field), (|core| core.$field = $value) as fn(&mut Core))),*]
    };
}

#[test]
fn a_snapshot_that_forgets_is_found() {
    let fields = forgetting![
        rng: Rng::new(0),
        version: 0,
        proposal: None,
        next_send: Pos::start(1),
        probe_at: None,
        ack: AckDebt::default(),
        answered_leader: None,
        reading: false,
        leaving: false,
        handing_over: false,
        ready: false,
        suspected: BTreeSet::new(),
        due: None,
    ];
    for (field, forget) in fields {
        let found = (1..=12).any(|seed| {
            let outcome = run_forgetting(&with_twins(seed), forget).outcome;
            matches!(outcome, Outcome::Failed { invariant, .. } if invariant == "twin")
        });
        assert!(found, "{field} was not missed");
    }
}
