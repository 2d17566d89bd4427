//! The simulator as a test: many seeds pass; the same seed is the same run; each planted fault is found.

use super::run_groups;
use crate::config::Fault;
use crate::sim::{Options, Outcome};

fn seeds(from: u64, count: u64) {
    for seed in from..from + count {
        let report = run_groups(&Options {
            seed,
            ..Options::default()
        });
        assert_eq!(
            report.outcome,
            Outcome::Passed,
            "see: cargo run --release -p unbroken-group --features faults --bin sim -- --groups --seed {seed} --trace"
        );
    }
}

#[test]
fn many_seeds_pass() {
    seeds(1, 40);
}

#[test]
fn one_seed_is_one_run() {
    for seed in 1..4 {
        let options = Options {
            seed,
            ..Options::default()
        };
        assert_eq!(run_groups(&options), run_groups(&options));
    }
}

fn found(fault: Fault, invariants: &[&str]) {
    for seed in 1..400 {
        let report = run_groups(&Options {
            seed,
            fault: Some(fault),
            ..Options::default()
        });
        if let Outcome::Failed { invariant, .. } = report.outcome {
            assert!(invariants.contains(&invariant.as_str()), "{invariant}");
            return;
        }
    }
    panic!("{fault:?} is not found");
}

#[test]
fn delivering_while_the_view_is_left_is_found() {
    found(
        Fault::DeliverWhileBlocked,
        &["view synchrony", "state", "abcast", "fbcast"],
    );
}

#[test]
fn a_cut_that_not_all_hold_is_found() {
    // Whoever holds less leaves for good; whoever holds more has lost what others sent.
    let known = [
        "view synchrony",
        "state",
        "abcast",
        "gbcast",
        "fbcast",
        "liveness",
    ];
    found(Fault::CutIsFirstReport, &known);
}

#[test]
fn a_cbcast_that_does_not_wait_is_found() {
    found(Fault::CausalAtOnce, &["cbcast"]);
}

#[test]
fn two_tokens_are_found() {
    found(Fault::TwoTokens, &["abcast", "cbcast", "liveness"]);
}

#[test]
fn a_safe_message_that_does_not_wait_is_found() {
    found(Fault::SafeAtOnce, &["safe"]);
}

#[test]
fn a_gbcast_that_does_not_wait_is_found() {
    found(Fault::GbcastAtOnce, &["gbcast"]);
}

#[test]
fn a_joiner_that_forgets_what_waited_is_found() {
    found(
        Fault::JoinerForgets,
        &["state", "view synchrony", "fbcast", "cbcast"],
    );
}

#[test]
fn messages_of_an_earlier_membership_are_found() {
    found(Fault::OldDirects, &["direct", "liveness"]);
}

#[test]
fn an_acknowledgement_after_the_report_that_counts_is_found() {
    found(Fault::VouchAfterReport, &["safe"]);
}
