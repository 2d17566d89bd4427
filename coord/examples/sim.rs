//! Simulates many clusters, one seed each: `cargo run --release -p unbroken-coord --features faults
//! --example sim -- --seeds 10000`. See `--help`.

#![expect(
    clippy::disallowed_methods,
    reason = "this is no core: it tells how long it took"
)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Instant;

use unbroken_coord::faults::{self, Fault};
use unbroken_coord::sim::{self, Summary};

const USAGE: &str = "\
Simulates clusters of servers: one seed, one run. Prints each seed that breaks a promise.

  cargo run --release -p unbroken-coord --features faults --example sim -- [OPTIONS]

  --seeds N     how many seeds (1000)
  --from N      the first (0)
  --seed N      only this one
  --jobs N      threads (as many as there are processors)
  --trace       print what happens
  --fault NAME  plant a defect, and stop when it is found
  --faults      plant each defect in turn, and tell after how many seeds it is found
";

struct Options {
    from: u64,
    seeds: u64,
    jobs: usize,
    trace: bool,
    plant: Vec<Fault>,
}

fn options() -> Option<Options> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options {
        from: 0,
        seeds: 1000,
        jobs,
        trace: false,
        plant: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next()?.parse::<u64>().ok();
        match arg.as_str() {
            "--seeds" => options.seeds = number()?,
            "--from" => options.from = number()?,
            "--seed" => (options.from, options.seeds) = (number()?, 1),
            "--jobs" => options.jobs = usize::try_from(number()?).ok()?.max(1),
            "--trace" => options.trace = true,
            "--fault" => {
                let name = args.next()?.replace('-', "");
                let named = |fault: &&Fault| format!("{fault:?}").eq_ignore_ascii_case(&name);
                options.plant = vec![*Fault::ALL.iter().find(named)?];
            }
            "--faults" => options.plant = Fault::ALL.to_vec(),
            _ => return None,
        }
    }
    Some(options)
}

/// Runs the seeds on all threads. Stops at the first failure if `first_only`.
fn storm(
    options: &Options,
    fault: Option<Fault>,
    first_only: bool,
) -> (Summary, u64, Vec<(u64, String)>) {
    let next = AtomicU64::new(options.from);
    let end = options.from + options.seeds;
    let total = Mutex::new((Summary::default(), 0_u64));
    let (failed, failures) = mpsc::channel();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            let (next, total, failed) = (&next, &total, failed.clone());
            scope.spawn(move || {
                faults::plant(fault);
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let run = sim::run(seed, options.trace);
                    let mut total = total.lock().expect("nobody panics with it");
                    total.1 += 1;
                    match run {
                        Ok(run) => total.0.add(&run),
                        Err(error) => {
                            let _ = failed.send((seed, error));
                            if first_only {
                                next.store(end, Ordering::Relaxed);
                            }
                        }
                    }
                    if std::io::stderr().is_terminal() && total.1.is_multiple_of(20) {
                        bar(total.1, options.seeds, started);
                    }
                }
            });
        }
    });
    drop(failed);
    let mut failures: Vec<_> = failures.into_iter().collect();
    failures.sort();
    let (summary, runs) = *total.lock().expect("nobody panics with it");
    (summary, runs, failures)
}

fn bar(done: u64, of: u64, started: Instant) {
    let width = 40;
    let full = usize::try_from(done * width / of.max(1)).unwrap_or(0);
    let rate = done as f64 / started.elapsed().as_secs_f64() * 60.0;
    let bar: String = (0..40)
        .map(|at| if at < full { '#' } else { '.' })
        .collect();
    eprint!("\r[{bar}] {done}/{of}  {rate:.0} a minute ");
    let _ = std::io::stderr().flush();
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprint!("{USAGE}");
        return ExitCode::from(64);
    };
    // What a run panics with is in its failure.
    std::panic::set_hook(Box::new(|_| {}));
    if options.plant.is_empty() {
        let started = Instant::now();
        let (summary, runs, failures) = storm(&options, None, false);
        eprintln!();
        for (seed, error) in &failures {
            println!("seed {seed}: {error}");
            println!("  again: --seed {seed} --trace");
        }
        println!("{summary:#?}");
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{runs} histories in {seconds:.0} s ({:.0} a minute), {} failed",
            runs as f64 / seconds * 60.0,
            failures.len()
        );
        return if failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let mut missed = 0;
    for fault in &options.plant {
        let (_, runs, failures) = storm(&options, Some(*fault), true);
        match failures.first() {
            Some((seed, error)) => {
                println!("{fault:?}: found after {runs} seeds, by seed {seed}: {error}");
            }
            None => {
                missed += 1;
                println!("{fault:?}: NOT FOUND in {runs} seeds");
            }
        }
    }
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
