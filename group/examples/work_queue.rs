//! A work queue: jobs are dealt to the workers, and those of a dead one go to the others; each job is done once.
//!
//! `cargo run -p unbroken-group --example work_queue`

#![expect(clippy::print_stdout, reason = "an example")]

mod local;

use bytes::Bytes;
use local::{Error, Local, argument};
use std::collections::BTreeMap;
use std::time::Duration;
use unbroken_group::tools::Cohorts;

const HELP: &str = "\
A queue of jobs and three workers, each a node of this process; one is killed in the middle.

Usage: work_queue [--jobs NUMBER]

  --jobs NUMBER   how many jobs there are [default: 60]

Examples:
  cargo run -p unbroken-group --example work_queue
  cargo run -p unbroken-group --example work_queue -- --jobs 100";

/// A job: the square of a number, and the work grows with it.
async fn work(worker: String, job: Bytes) -> Bytes {
    let number: u64 = String::from_utf8_lossy(&job).parse().unwrap_or(0);
    tokio::time::sleep(Duration::from_millis(5 * number)).await;
    format!("{worker} {}", number * number).into()
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let count = argument(HELP, "--jobs", 60, 6);
    let names = ["r1", "r2", "r3"].map(str::to_owned);
    let site = Local::new(&names)?;
    let (mut nodes, mut queues) = (Vec::new(), Vec::new());
    for name in &names {
        let node = site.start(name)?;
        let worker = name.clone();
        let (queue, work) =
            Cohorts::join(&node, "jobs", move |job| work(worker.clone(), job)).await?;
        tokio::spawn(work);
        nodes.push(node);
        queues.push(queue);
    }
    let queue = queues.first().ok_or("nobody")?;
    println!("{count} jobs for r1, r2 and r3; r3 is killed while it works");
    let jobs: Vec<_> = (0..count)
        .map(|n| {
            let queue = queue.clone();
            tokio::spawn(async move { queue.call(n.to_string()).await })
        })
        .collect();
    let (mut done_by, mut wrong) = (BTreeMap::new(), 0);
    for (n, job) in jobs.into_iter().enumerate() {
        if n == count / 2 {
            drop(nodes.pop());
        }
        let answer = job.await??;
        let answer = String::from_utf8_lossy(&answer);
        let (worker, square) = answer.split_once(' ').ok_or("no answer of ours")?;
        *done_by.entry(worker.to_owned()).or_insert(0) += 1;
        wrong += usize::from(square != (n * n).to_string());
    }
    for (worker, jobs) in &done_by {
        println!("  {worker} did {jobs}");
    }
    if wrong > 0 || queue.waiting() != (0, 0) {
        return Err(format!("{wrong} answers are wrong").into());
    }
    println!("all {count} jobs are done, each once");
    Ok(())
}
