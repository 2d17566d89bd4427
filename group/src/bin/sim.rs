//! Runs the group's simulator over many seeds, or one with its trace.

use std::process::ExitCode;
use unbroken_group::sim::{Options, Outcome, run, run_groups};

const USAGE: &str = "\
Simulates process groups: one seed, one run. Prints each seed that violates an invariant.

  cargo run --release -p unbroken-group --features faults --bin sim -- [OPTIONS]

  --seeds N     how many seeds (1000)
  --from N      the first (1)
  --seed N      only this one
  --nodes N     members (chosen by the seed)
  --fault NAME  plant a defect, e.g. skip-lease-wait
  --groups      whole processes with many groups (multicasts, state transfer, calls), not the site group alone
  --trace       print what happens
  --twins       at every input, go on with a core restored from a snapshot, beside one that never was
";

fn fault(name: &str) -> Option<unbroken_group::Fault> {
    use unbroken_group::Fault::*;
    [
        AckAfterWedge,
        SkipLeaseWait,
        CutIsOwnHighest,
        DeliverBeyondCut,
        StableAtKMinusOne,
        RestartSurvives,
        EarlyTrim,
        JoinerSkipsOne,
        ClockWithoutLease,
        DeliverWhileBlocked,
        CutIsFirstReport,
        CausalAtOnce,
        TwoTokens,
        SafeAtOnce,
        GbcastAtOnce,
        JoinerForgets,
        OldDirects,
        VouchAfterReport,
    ]
    .into_iter()
    .find(|f| format!("{f:?}").eq_ignore_ascii_case(&name.replace('-', "")))
}

fn main() -> ExitCode {
    let mut options = Options::default();
    let (mut from, mut seeds, mut groups) = (1, 1000, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|v| v.parse::<u64>().ok());
        let good = match arg.as_str() {
            "--seeds" => number().map(|n| seeds = n).is_some(),
            "--from" => number().map(|n| from = n).is_some(),
            "--seed" => number().map(|n| (from, seeds) = (n, 1)).is_some(),
            "--nodes" => number()
                .and_then(|n| usize::try_from(n).ok())
                .map(|n| options.nodes = n)
                .is_some(),
            "--groups" => {
                groups = true;
                true
            }
            "--trace" => {
                options.trace = true;
                true
            }
            "--twins" => {
                options.twins = true;
                true
            }
            "--fault" => {
                options.fault = args.next().and_then(|name| fault(&name));
                options.fault.is_some()
            }
            _ => false,
        };
        if !good {
            eprint!("{USAGE}");
            return ExitCode::from(64);
        }
    }
    if groups {
        return many_groups(&options, from, seeds);
    }
    let (mut failed, mut steps, mut views, mut events, mut generations) = (0, 0, 0, 0, 0);
    for seed in from..from + seeds {
        let report = run(&Options {
            seed,
            ..options.clone()
        });
        steps += report.steps;
        views += report.views;
        events += report.events;
        generations += u64::from(report.generations);
        if let Outcome::Failed {
            invariant,
            what,
            at_us,
        } = report.outcome
        {
            failed += 1;
            println!("seed {seed}: {invariant} violated at {at_us} us: {what}");
        }
    }
    println!(
        "{seeds} seeds, {failed} failed; {steps} steps, {views} views installed, {events} events, \
         {generations} generations"
    );
    ExitCode::from(u8::from(failed > 0))
}

fn many_groups(options: &Options, from: u64, seeds: u64) -> ExitCode {
    let (mut failed, mut steps, mut views, mut delivered, mut transfers) = (0, 0, 0, 0, 0);
    for seed in from..from + seeds {
        let report = run_groups(&Options {
            seed,
            ..options.clone()
        });
        steps += report.steps;
        views += report.views;
        delivered += report.delivered;
        transfers += report.transfers;
        if let Outcome::Failed {
            invariant,
            what,
            at_us,
        } = report.outcome
        {
            failed += 1;
            println!("seed {seed}: {invariant} violated at {at_us} us: {what}");
        }
    }
    println!(
        "{seeds} seeds, {failed} failed; {steps} steps, {views} views of groups begun, {delivered} messages delivered, \
         {transfers} states given to joiners"
    );
    ExitCode::from(u8::from(failed > 0))
}
