//! Three servers on simulated disks and a simulated network, with crashes, torn writes, pauses,
//! partitions and loss; clients that hold them to what they promised.
//!
//! `SEED=17 cargo test -p unbroken-coord --test simulation -- --nocapture` runs one seed,
//! `SEEDS=1000..2000` a range.

mod sim;

use std::ops::Range;

fn seeds() -> Range<u64> {
    let parse = |text: &str| text.trim().parse::<u64>().expect("a seed is a number");
    if let Ok(seed) = std::env::var("SEED") {
        let seed = parse(&seed);
        return seed..seed + 1;
    }
    match std::env::var("SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("SEEDS=FROM..TO");
            parse(from)..parse(to)
        }
        Err(_) => 0..60,
    }
}

#[test]
fn promises_hold_in_every_storm() {
    let mut total = sim::Summary::default();
    for seed in seeds() {
        let run = std::panic::catch_unwind(|| sim::run(seed));
        let Ok(run) = run else {
            panic!(
                "seed {seed} failed: SEED={seed} cargo test -p unbroken-coord --test simulation"
            );
        };
        total.acknowledged += run.acknowledged;
        total.unknown += run.unknown;
        total.synced_reads += run.synced_reads;
        total.expired += run.expired;
        total.resumed += run.resumed;
        total.watch_events += run.watch_events;
        total.crashes += run.crashes;
        total.snapshots_installed += run.snapshots_installed;
    }
    println!("{total:?}");
    // A test that does nothing proves nothing.
    let happened = [
        total.acknowledged,
        total.unknown,
        total.synced_reads,
        total.expired,
        total.resumed,
        total.watch_events,
        total.crashes,
    ];
    assert!(happened.iter().all(|count| *count > 0), "{total:?}");
}

#[test]
fn a_seed_is_a_run() {
    assert_eq!(sim::run(4711), sim::run(4711));
}
