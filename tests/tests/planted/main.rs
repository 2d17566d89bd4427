//! Shows that the tests can fail: plants each known defect in turn and runs the test that must find it. See `--help`.

mod build;
mod hunts;
mod trial;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use build::Tests;
use hunts::Hunt;
use trial::{Ended, Trial};

const USAGE: &str = "\
Shows that the tests can fail: builds them once with every known defect in them, and runs for each defect the test that
must find it, first without the defect (it must pass), then with it (it must fail).

  just planted [OPTIONS] [NAME..]

  NAME            a defect (tcpstate/ack-before-commit), or those of a package (tcpstate); all, if none is given
  --quick         those that simulations find, without real kernels
  --list          what there is to plant, and which test must find it
  --json          the outcome as JSON, at the end
  --deadline SECS how long one test may take (300); one that a defect keeps from ending has found it, too

It fails if a defect was not found. What the tests print is kept in target/tmp/planted.

  just planted --quick
  just planted proxy/no-fence

Without just: cargo test --workspace --features unbroken-tests/faults --test planted -- [OPTIONS] [NAME..]
";

/// What can be planted, and what it is.
fn faults() -> BTreeMap<String, &'static str> {
    let mut faults = BTreeMap::new();
    for fault in unbroken_tcpstate::Fault::ALL {
        faults.insert(fault.name(), fault.what());
    }
    for fault in unbroken_group::Fault::ALL {
        faults.insert(fault.name(), fault.what());
    }
    for fault in unbroken_coord::faults::Fault::ALL {
        faults.insert(fault.name(), fault.what());
    }
    for fault in unbroken::Fault::ALL {
        faults.insert(fault.name(), fault.what());
    }
    faults
}

struct Wish {
    hunts: Vec<Hunt>,
    list: bool,
    json: bool,
    deadline: Duration,
}

/// What the arguments ask for; `None`: they are wrong.
fn wish(hunts: Vec<Hunt>, arguments: impl IntoIterator<Item = String>) -> Option<Wish> {
    let mut names = Vec::new();
    let (mut quick, mut list, mut json, mut deadline) = (false, false, false, 300);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => quick = true,
            "--list" => list = true,
            "--json" => json = true,
            "--deadline" => deadline = arguments.next()?.parse().ok().filter(|secs| *secs > 0)?,
            option if option.starts_with('-') => return None,
            _ => names.push(argument),
        }
    }
    let matches = |hunt: &Hunt, name: &String| hunt.fault == name || hunt.package() == name;
    let unknown = |name: &&String| !hunts.iter().any(|hunt| matches(hunt, name));
    if let Some(name) = names.iter().find(unknown) {
        eprintln!("{name}: no such defect; --list shows what there is\n");
        return None;
    }
    let wanted = |hunt: &Hunt| {
        let named = names.is_empty() || names.iter().any(|name| matches(hunt, name));
        named && !(quick && hunt.needs_kernels())
    };
    Some(Wish {
        hunts: hunts.into_iter().filter(wanted).collect(),
        list,
        json,
        deadline: Duration::from_secs(deadline),
    })
}

/// Every defect is hunted by a test, and nothing else is.
fn check_hunts(hunts: &[Hunt], faults: &BTreeMap<String, &'static str>) -> Result<()> {
    if let Some(hunt) = hunts.iter().find(|hunt| !faults.contains_key(hunt.fault)) {
        bail!("hunts.txt: {}: no such defect", hunt.fault);
    }
    let hunted = |name: &&String| hunts.iter().any(|hunt| hunt.fault == name.as_str());
    if let Some(name) = faults.keys().find(|name| !hunted(name)) {
        bail!("hunts.txt: {name}: no test must find it");
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// The test failed.
    Found,
    /// The test did not end within the deadline.
    FoundByDeadline,
    NotFound,
    /// The test fails without the defect, too.
    FailsAnyway,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::FoundByDeadline => "found (deadline)",
            Self::NotFound => "NOT FOUND",
            Self::FailsAnyway => "FAILS ANYWAY",
        }
    }
}

#[derive(Debug, Serialize)]
struct Outcome {
    fault: &'static str,
    what: &'static str,
    test: String,
    verdict: Verdict,
    seconds: f64,
    /// The first thing that the failed test said.
    said: String,
}

fn hunt_all(wish: &Wish, faults: &BTreeMap<String, &'static str>) -> Result<Vec<Outcome>> {
    let tests = Tests::build(&wish.hunts)?;
    let progress = std::io::stderr().is_terminal();
    let show = |text: &str| {
        if progress {
            eprint!("\r\x1b[K{text}");
            let _ = std::io::stderr().flush();
        }
    };
    let wide = |of: fn(&Hunt) -> usize| wish.hunts.iter().map(of).max().unwrap_or(0);
    let (fault_width, test_width) = (wide(|h| h.fault.len()), wide(|h| h.test().len()));
    let row = |fault: &str, test: &str, verdict: &str, seconds: &str, said: &str| {
        if !wish.json {
            println!(
                "{fault:fault_width$}  {test:test_width$}  {verdict:16}  {seconds:>7}  {said}"
            );
        }
    };
    row("fault", "test", "verdict", "seconds", "what the test said");
    // How each test ends without a defect: one for all that it has to find.
    let mut sound: BTreeMap<String, Trial> = BTreeMap::new();
    let mut outcomes = Vec::new();
    for (at, hunt) in wish.hunts.iter().enumerate() {
        let test = hunt.test();
        let step = format!("[{}/{}] {}", at + 1, wish.hunts.len(), hunt.fault);
        if !sound.contains_key(&test) {
            show(&format!("{step}: {test} without it"));
            sound.insert(test.clone(), tests.run(hunt, None, wish.deadline)?);
        }
        let trial = &sound[&test];
        let (verdict, trial) = if trial.ended == Ended::Passed {
            show(&format!("{step}: {test}"));
            let trial = tests.run(hunt, Some(hunt.fault), wish.deadline)?;
            let verdict = match trial.ended {
                Ended::Passed => Verdict::NotFound,
                Ended::Failed => Verdict::Found,
                Ended::Deadline => Verdict::FoundByDeadline,
            };
            (verdict, trial)
        } else {
            (Verdict::FailsAnyway, trial.clone())
        };
        show("");
        let seconds = trial.took.as_secs_f64();
        row(
            hunt.fault,
            &test,
            verdict.text(),
            &format!("{seconds:.1}"),
            &trial.said,
        );
        outcomes.push(Outcome {
            fault: hunt.fault,
            what: faults[hunt.fault],
            test,
            verdict,
            seconds,
            said: trial.said,
        });
    }
    Ok(outcomes)
}

fn run(wish: &Wish, faults: &BTreeMap<String, &'static str>) -> Result<bool> {
    if wish.list {
        for hunt in &wish.hunts {
            let what = faults[hunt.fault];
            println!("{}\n    {what}\n    {}", hunt.fault, hunt.test());
        }
        return Ok(true);
    }
    let outcomes = hunt_all(wish, faults)?;
    let found = |o: &&Outcome| matches!(o.verdict, Verdict::Found | Verdict::FoundByDeadline);
    let count = outcomes.iter().filter(found).count();
    if wish.json {
        let text = serde_json::to_string_pretty(&outcomes).context("writing JSON")?;
        println!("{text}");
    } else {
        println!("{count} of {} planted defects were found", outcomes.len());
    }
    Ok(count == outcomes.len())
}

fn start() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == "--help" || a == "-h") {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let (hunts, faults) = (Hunt::all()?, faults());
    check_hunts(&hunts, &faults)?;
    let Some(wish) = wish(hunts, arguments) else {
        eprint!("{USAGE}");
        return Ok(ExitCode::from(64));
    };
    Ok(ExitCode::from(u8::from(!run(&wish, &faults)?)))
}

fn main() -> ExitCode {
    start().unwrap_or_else(|error| {
        eprintln!("planted: {error:#}");
        ExitCode::FAILURE
    })
}
