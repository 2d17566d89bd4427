//! Runs the group's simulator over many seeds, or one with its trace.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use unbroken_group::Fault;
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
  --long        members stopped for up to half a minute, and slow hosts (without --groups)
  --twins       at every input, go on with what was restored from a snapshot, beside one that never was
  --jobs N      threads (one for each processor)
";

fn fault(name: &str) -> Option<Fault> {
    let name = format!("group/{name}");
    Fault::ALL
        .iter()
        .copied()
        .find(|fault| fault.name() == name)
}

struct Wish {
    options: Options,
    from: u64,
    seeds: u64,
    groups: bool,
    jobs: usize,
}

fn wish() -> Option<Wish> {
    let mut wish = Wish {
        options: Options::default(),
        from: 1,
        seeds: 1000,
        groups: false,
        jobs: std::thread::available_parallelism().map_or(1, Into::into),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next()?.parse::<u64>().ok();
        match arg.as_str() {
            "--seeds" => wish.seeds = number()?,
            "--from" => wish.from = number()?,
            "--seed" => (wish.from, wish.seeds) = (number()?, 1),
            "--nodes" => wish.options.nodes = usize::try_from(number()?).ok()?,
            "--jobs" => wish.jobs = usize::try_from(number()?).ok().filter(|n| *n > 0)?,
            "--groups" => wish.groups = true,
            "--trace" => wish.options.trace = true,
            "--long" => wish.options.long = true,
            "--twins" => wish.options.twins = true,
            "--fault" => wish.options.fault = Some(fault(&args.next()?)?),
            _ => return None,
        }
    }
    Some(wish)
}

/// How a run ended, and what is counted of it.
type Ran = (Outcome, [u64; 4]);

fn ran_core(options: &Options) -> Ran {
    let r = run(options);
    let counts = [r.steps, r.views, r.events, u64::from(r.generations)];
    (r.outcome, counts)
}

fn ran_groups(options: &Options) -> Ran {
    let r = run_groups(options);
    (r.outcome, [r.steps, r.views, r.delivered, r.transfers])
}

fn main() -> ExitCode {
    let Some(wish) = wish() else {
        eprint!("{USAGE}");
        return ExitCode::from(64);
    };
    let (ran, counted): (fn(&Options) -> Ran, _) = if wish.groups {
        let counted = [
            "views of groups begun",
            "messages delivered",
            "states given to joiners",
        ];
        (ran_groups, counted)
    } else {
        (ran_core, ["views installed", "events", "generations"])
    };
    let next = AtomicU64::new(wish.from);
    let end = wish.from.saturating_add(wish.seeds);
    let sums = Mutex::new([0; 4]);
    // Told in the order of the seeds, whoever ran them.
    let failures = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..wish.jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let options = Options {
                        seed,
                        ..wish.options.clone()
                    };
                    // An invariant of the code itself: its message is printed where it panics.
                    let Ok((outcome, counts)) = std::panic::catch_unwind(|| ran(&options)) else {
                        let line = format!("seed {seed}: panicked");
                        let mut failures = failures.lock().expect("nobody panics with it");
                        failures.insert(seed, line);
                        continue;
                    };
                    let mut sums = sums.lock().expect("nobody panics with it");
                    for (sum, count) in sums.iter_mut().zip(counts) {
                        *sum += count;
                    }
                    if let Outcome::Failed {
                        invariant,
                        what,
                        at_us,
                    } = outcome
                    {
                        let line =
                            format!("seed {seed}: {invariant} violated at {at_us} us: {what}");
                        let mut failures = failures.lock().expect("nobody panics with it");
                        failures.insert(seed, line);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("all have ended");
    for line in failures.values() {
        println!("{line}");
    }
    let [steps, sums @ ..] = sums.into_inner().expect("all have ended");
    let counted = sums.iter().zip(counted).map(|(n, of)| format!("{n} {of}"));
    let counted = counted.collect::<Vec<_>>().join(", ");
    let failed = failures.len();
    println!(
        "{} seeds, {failed} failed; {steps} steps, {counted}",
        wish.seeds
    );
    ExitCode::from(u8::from(failed > 0))
}
