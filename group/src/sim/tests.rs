//! The simulator as a test: many seeds pass; the same seed is the same run; each planted fault is found.

use super::{Options, Outcome, run};
use crate::config::Fault;

fn seeds(from: u64, count: u64) {
    for seed in from..from + count {
        let report = run(&Options {
            seed,
            ..Options::default()
        });
        assert_eq!(
            report.outcome,
            Outcome::Passed,
            "cargo run --release -p unbroken-group --features faults --bin sim -- --seed {seed} --trace"
        );
    }
}

#[test]
fn many_seeds_pass() {
    seeds(1, 100);
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
    for seed in 1..2000 {
        let report = run(&Options {
            seed,
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
    found(
        Fault::DeliverBeyondCut,
        &["view synchrony", "no ack after wedge"],
    );
}

#[test]
fn stability_with_one_holder_too_few_is_found() {
    found(Fault::StableAtKMinusOne, &["stable survives"]);
}

#[test]
fn a_restarted_process_that_survives_is_found() {
    found(
        Fault::RestartSurvives,
        &["view synchrony", "stable survives", "fifo"],
    );
}

#[test]
fn a_joiner_that_misses_an_event_is_found() {
    found(Fault::JoinerSkipsOne, &["fifo", "view synchrony"]);
}
