//! The tools on real nodes: replicated machines stay alike, counters are exact, locks exclude and outlive their holders.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use tokio::time::timeout;
use unbroken_group::node::Node;
use unbroken_group::tools::{Locks, Machine, Map, Replicated, UpdateError};

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

async fn join<M: Machine>(node: &Node, name: &str) -> Replicated<M> {
    let (replicated, work) = soon("join", Replicated::join(node, name)).await.unwrap();
    tokio::spawn(work);
    soon("the state", replicated.until(|_| true)).await.unwrap();
    replicated
}

fn number(bytes: Option<&Bytes>) -> u64 {
    bytes.map_or(0, |b| {
        String::from_utf8(b.to_vec()).unwrap().parse().unwrap()
    })
}

/// Adds one to a key by compare-and-set.
async fn add(map: &Replicated<Map>, key: &'static str) {
    let mut seen = map.get(key.as_bytes());
    loop {
        let next = (number(seen.as_ref()) + 1).to_string();
        let had = soon("replace", map.replace(key, seen.clone(), next)).await;
        let had = had.unwrap();
        if had == seen {
            return;
        }
        seen = had;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_counts_exactly_and_comes_to_those_who_join() {
    const EACH: u64 = 40;
    let site = Site::new(3);
    let (one, two) = (site.start(1), site.start(2));
    let maps = [join::<Map>(&one, "map").await, join(&two, "map").await];
    let adding = maps.clone().map(|map| {
        tokio::spawn(async move {
            for _ in 0..EACH {
                add(&map, "n").await;
            }
        })
    });
    // It joins while the others write.
    let three = site.start(3);
    let late: Replicated<Map> = join(&three, "map").await;
    for a in adding {
        soon("adding", a).await.unwrap();
    }
    add(&late, "n").await;
    for map in maps.iter().chain([&late]) {
        let all = |m: &Map| number(m.get(b"n")) == 2 * EACH + 1;
        soon("the same everywhere", map.until(all)).await.unwrap();
    }
    assert_eq!(late.remove("n").await.unwrap(), Some("81".into()));
    assert_eq!(late.get(b"n"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_has_one_holder_and_goes_on_when_it_dies() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut locks = Vec::new();
    for node in &nodes {
        locks.push(join::<Locks>(node, "locks").await);
    }
    let whole = |l: &Replicated<Locks>| l.group().view().map(|v| v.members.len());
    soon("the lock", locks[2].acquire("door")).await.unwrap();
    assert_eq!(whole(&locks[2]), Some(3));
    let waiting = locks[0].clone();
    let waiting = tokio::spawn(async move { waiting.acquire("door").await });
    let queued = |l: &Locks| l.queue("door").count() == 2;
    soon("it waits", locks[1].until(queued)).await.unwrap();
    assert!(!waiting.is_finished(), "held by another");
    // The holder's process dies.
    drop(nodes.pop());
    soon("the next holder", waiting).await.unwrap().unwrap();
    let me = locks[0].group().me().clone();
    let mine = |l: &Locks| l.holder("door") == Some(&me);
    soon("seen elsewhere", locks[1].until(mine)).await.unwrap();
    locks[0].release("door").await.unwrap();
    soon("free again", locks[1].acquire("door")).await.unwrap();
    let dead = soon("the dead learn it", locks[2].acquire("door")).await;
    assert!(
        matches!(dead, Err(UpdateError::Send(_) | UpdateError::Out)),
        "{dead:?}"
    );
}
