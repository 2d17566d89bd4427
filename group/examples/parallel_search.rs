//! A parallel search: each member searches the part of the whole that its rank says; what a dead one leaves, the others search.
//!
//! `cargo run -p unbroken-group --example parallel_search`

#![expect(clippy::print_stdout, reason = "an example")]

mod local;

use local::{Error, Local, argument};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;
use unbroken_group::node::{Group, Handler, Node, Received};
use unbroken_group::process::{GroupView, Order, ThreadId, Want};
use unbroken_group::tools::Rank;

const HELP: &str = "\
Several nodes in this process search for numbers below 1,000,000 whose Collatz sequence is long; one is killed in the middle.

Usage: parallel_search [--members NUMBER]

  --members NUMBER   how many search [default: 4]

Examples:
  cargo run -p unbroken-group --example parallel_search
  cargo run -p unbroken-group --example parallel_search -- --members 7";

const LIMIT: u64 = 1_000_000;
const LONG: u32 = 450;

fn collatz(mut n: u64) -> u32 {
    let mut steps = 0;
    while n > 1 {
        n = if n.is_multiple_of(2) {
            n / 2
        } else {
            3 * n + 1
        };
        steps += 1;
    }
    steps
}

fn search(range: Range<u64>) -> Vec<u64> {
    range.filter(|n| collatz(*n) >= LONG).collect()
}

/// What a member has searched.
#[derive(Serialize, Deserialize)]
struct Searched {
    range: Range<u64>,
    found: Vec<u64>,
}

/// A member that searches.
struct Searcher {
    rank: Mutex<Option<Rank>>,
    begun: Arc<Notify>,
}

impl Handler for Searcher {
    async fn view(&self, group: &Group, view: GroupView) {
        let mut rank = self.rank.lock().unwrap_or_else(PoisonError::into_inner);
        *rank = Rank::of(&view, group.me());
    }

    /// Asked for the numbers of a range: all members see the question in the same view, so their parts are the whole.
    async fn message(&self, _: &Group, question: Received) {
        let rank = *self.rank.lock().unwrap_or_else(PoisonError::into_inner);
        let asked: Result<Range<u64>, _> = postcard::from_bytes(question.body());
        let (Some(rank), Ok(asked)) = (rank, asked) else {
            return;
        };
        let part = rank.part(asked.end.saturating_sub(asked.start));
        let range = asked.start + part.start..asked.start + part.end;
        self.begun.notify_one();
        let searching = range.clone();
        let found = tokio::task::spawn_blocking(move || search(searching)).await;
        if let Ok(found) = found
            && let Ok(answer) = postcard::to_stdvec(&Searched { range, found })
        {
            question.reply(answer);
        }
    }
}

async fn join(site: &Local, name: &str, begun: &Arc<Notify>) -> Result<(Node, Group), Error> {
    let node = site.start(name)?;
    let (group, events) = Group::join(&node, "search").await?;
    let own = group.clone();
    let searcher = Searcher {
        rank: Mutex::new(None),
        begun: Arc::clone(begun),
    };
    tokio::spawn(async move { own.run(events, searcher).await });
    Ok((node, group))
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let count = argument(HELP, "--members", 4, 2);
    let names: Vec<String> = (1..=count).map(|i| format!("r{i}")).collect();
    let site = Local::new(&names)?;
    let mut nodes = Vec::new();
    let mut asker = None;
    let mut begun = Arc::new(Notify::new());
    for name in &names {
        begun = Arc::new(Notify::new());
        let (node, group) = join(&site, name, &begun).await?;
        nodes.push(node);
        asker.get_or_insert(group);
    }
    let asker = asker.ok_or("nobody")?;
    println!("{count} members search, the last is killed when it has begun");
    let victim = nodes.pop();
    let killing = tokio::spawn(async move {
        begun.notified().await;
        drop(victim);
    });
    let mut found = BTreeSet::new();
    let mut missing: Vec<Range<u64>> = std::iter::once(0..LIMIT).collect();
    while let Some(range) = missing.pop() {
        println!("asked for {range:?}");
        let question = postcard::to_stdvec(&range)?;
        let order = Order::Total(ThreadId::default());
        let mut replies = asker.call(order, question, Want::All, None).await?;
        let mut searched = Vec::new();
        while let Some((from, body)) = replies.next().await {
            let answer: Searched = postcard::from_bytes(&body)?;
            println!(
                "  {} searched {:?}: {}",
                from.name,
                answer.range,
                answer.found.len()
            );
            searched.push((answer.range.start, answer.range.end));
            found.extend(answer.found);
        }
        for dead in replies.failed() {
            println!("  {} died without an answer", dead.name);
        }
        searched.sort_unstable();
        let mut from = range.start;
        for (start, end) in searched.into_iter().chain([(range.end, range.end)]) {
            if from < start {
                missing.push(from..start);
            }
            from = end;
        }
    }
    killing.await?;
    let right: BTreeSet<u64> = search(0..LIMIT).into_iter().collect();
    println!("{} numbers found: {found:?}", found.len());
    if found != right {
        return Err(format!("one member alone finds {right:?}").into());
    }
    println!("one member alone finds the same");
    for node in nodes {
        node.stop().await;
    }
    Ok(())
}
