//! The simulator as a test: many seeds pass; the same seed is the same run; each planted fault is found.

use super::run_groups;
use super::world::{run_forgetting, run_nonsense};
use crate::config::Fault;
use crate::process::{FORGETTING, Process};
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
    seeds(1, 100);
}

/// Runs in which defects show themselves that seldom do.
#[test]
fn telling_seeds_pass() {
    seeds(90, 1);
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
    found_from(1, fault, invariants);
}

/// Beginning with a seed that is known to find it.
fn found_from(first: u64, fault: Fault, invariants: &[&str]) {
    for seed in first..first + 1000 {
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
    found_from(
        31,
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
    // Of each kind of message: which is missing first differs from seed to seed.
    found(
        Fault::JoinerForgets,
        &[
            "state",
            "view synchrony",
            "fbcast",
            "cbcast",
            "abcast",
            "safe",
        ],
    );
}

#[test]
fn messages_of_an_earlier_membership_are_found() {
    found_from(10, Fault::OldDirects, &["direct", "liveness"]);
}

#[test]
fn an_acknowledgement_after_the_report_that_counts_is_found() {
    found_from(90, Fault::VouchAfterReport, &["safe"]);
}

fn with_twins(seed: u64) -> Options {
    Options {
        seed,
        twins: true,
        ..Options::default()
    }
}

#[test]
fn a_run_cut_again_and_again_is_the_uncut_run() {
    for seed in 1..=7 {
        let uncut = Options {
            twins: false,
            ..with_twins(seed)
        };
        assert_eq!(run_groups(&with_twins(seed)), run_groups(&uncut), "{seed}");
    }
}

#[test]
fn a_snapshot_that_forgets_is_found() {
    let missed = |forget: fn(&mut Process)| {
        (1..=12).any(|seed| {
            let outcome = run_forgetting(&with_twins(seed), forget).outcome;
            matches!(outcome, Outcome::Failed { invariant, .. } if invariant == "twin")
        })
    };
    let not_missed = FORGETTING.iter().filter(|(_, forget)| !missed(*forget));
    let not_missed: Vec<_> = not_missed.map(|(field, _)| field).collect();
    assert!(not_missed.is_empty(), "{not_missed:?}");
}

#[test]
fn nonsense_of_members_is_borne() {
    for seed in 1..=60 {
        let options = Options {
            seed,
            ..Options::default()
        };
        let report = run_nonsense(&options);
        assert!(report.delivered > 0, "{seed}");
    }
}
