//! Shared memory on real nodes: counters under locks are exact, barriers name who came, joiners begin with what is there,
//! locks outlive their holders, and what a holder had not released is seen by nobody.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use site::{LONG, Site};
use tokio::time::timeout;
use unbroken_group::dsm::{JoinError, Region, RegionError};
use unbroken_group::node::Node;

const BYTES: usize = 64 << 10;

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

async fn join(node: &Node, name: &str) -> Region {
    let (region, work) = soon("join", Region::join(node, name, BYTES)).await.unwrap();
    tokio::spawn(work);
    region
}

async fn lock(region: &Region, lock: u32) -> unbroken_group::dsm::Guard {
    soon("the lock", region.lock(lock)).await.unwrap()
}

/// Adds to two counters, on two pages, under one lock; both are the same whoever looks.
async fn add(region: &Region, times: u64) {
    for _ in 0..times {
        let guard = lock(region, 3).await;
        let (one, two) = (guard.get::<u64>(8), guard.get::<u64>(8192));
        assert_eq!(one, two, "half a release");
        guard.set(8, one + 1);
        guard.set(8192, two + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counters_are_exact_and_come_to_those_who_join() {
    const EACH: u64 = 30;
    let site = Site::new(3);
    let (one, two) = (site.start(1), site.start(2));
    let first = join(&one, "counters").await;
    let second = join(&two, "counters").await;
    // Several threads of one process too.
    let adding = [first.clone(), second.clone(), second.clone()].map(|region| {
        tokio::spawn(async move {
            add(&region, EACH).await;
        })
    });
    let three = site.start(3);
    let late = join(&three, "counters").await;
    add(&late, EACH).await;
    for a in adding {
        soon("adding", a).await.unwrap();
    }
    for region in [&first, &second, &late] {
        assert_eq!(lock(region, 3).await.get::<u64>(8192), 4 * EACH);
    }
    // Who comes to a barrier is the same everywhere, and what was written without a lock is there.
    let come = [&first, &second, &late].map(|region| {
        let region = region.clone();
        tokio::spawn(async move {
            let me = usize::from(region.me().name.as_bytes()[1]);
            region.slice_mut::<u8>(30_000 + me, 1)[0] = 1;
            let came = region.barrier(2).await.unwrap();
            let written = region.slice::<u8>(30_000 + usize::from(b'1'), 3).to_vec();
            (came, written)
        })
    });
    let mut all = Vec::new();
    for c in come {
        all.push(soon("the barrier", c).await.unwrap());
    }
    assert!(all.iter().all(|a| *a == all[0]), "{all:?}");
    assert_eq!((all[0].0.len(), &all[0].1[..]), (3, &[1, 1, 1][..]));
    // Who leaves is not waited for, and may come back with an empty hand.
    lock(&first, 9).await.set(100, 77_u32);
    soon("leave", first.leave()).await;
    assert_eq!(first.lock(3).await.err(), Some(RegionError::Left));
    assert_eq!(lock(&late, 9).await.get::<u32>(100), 77);
    let back = join(&one, "counters").await;
    assert_ne!(back.me(), first.me());
    assert_eq!(lock(&back, 9).await.get::<u32>(100), 77);
    add(&back, 1).await;
    assert_eq!(lock(&late, 3).await.get::<u64>(8), 4 * EACH + 1);
    let other = soon("join", Region::join(&three, "counters", BYTES)).await;
    assert!(matches!(other, Err(JoinError::Group(_))), "it is in it");
    for node in [one, two, three] {
        soon("stop", node.stop()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_outlives_its_holder_without_what_that_had_not_released() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut regions = Vec::new();
    for node in &nodes {
        regions.push(join(node, "holder").await);
    }
    let [first, second, third] = &regions[..] else {
        unreachable!("three joined");
    };
    lock(third, 0).await.set(0, 5_u64);
    let held = lock(third, 0).await;
    assert!(!held.abandoned());
    held.set(0, 999_u64); // never released
    let asks = first.clone();
    let asks = tokio::spawn(async move { asks.lock(0).await });
    // A call that is given up gives the lock back when it comes.
    let also = lock(third, 7).await;
    let given_up = second.lock(7);
    assert!(timeout(std::time::Duration::ZERO, given_up).await.is_err());
    let waits = second.clone();
    let waits = tokio::spawn(async move { waits.barrier(0).await });
    drop(nodes.pop());
    let got = soon("the lock passes on", asks).await.unwrap().unwrap();
    assert!(got.abandoned());
    assert_eq!(got.get::<u64>(0), 5);
    got.set(0, 6_u64);
    got.release();
    let got = lock(second, 0).await;
    assert_eq!((got.abandoned(), got.get::<u64>(0)), (false, 6));
    drop(got);
    let came = soon("without the dead", first.barrier(0)).await.unwrap();
    assert_eq!(came, [first.me(), second.me()]);
    assert_eq!(soon("both", waits).await.unwrap().unwrap(), came);
    let dead = soon("the dead learn it", third.lock(1)).await;
    assert_eq!(dead.err(), Some(RegionError::Left));
    drop((held, also));
    drop(lock(first, 7).await);
    // A thread that panics while it holds a lock takes its member out.
    let panics = second.clone();
    let panicked = tokio::spawn(async move {
        let held = panics.lock(0).await.unwrap();
        held.set(0, 1000_u64);
        panic!("meant");
    });
    assert!(soon("it panics", panicked).await.is_err());
    let got = lock(first, 0).await;
    assert_eq!((got.abandoned(), got.get::<u64>(0)), (true, 6));
    for node in nodes {
        soon("stop", node.stop()).await;
    }
}

/// The example makes real processes, kills one of them, and verifies what is left.
#[test]
fn processes_share_a_region_and_one_is_killed() {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.set_file_name("examples");
    path.push("dsm");
    let ran = std::process::Command::new(&path).output();
    let ran = ran.unwrap_or_else(|e| {
        panic!(
            "{}: {e}: cargo test builds it, cargo test --test does not",
            path.display()
        )
    });
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.ends_with("PASS\n"), "{ran:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_told() {
    let site = Site::new(2);
    let (one, two) = (site.start(1), site.start(2));
    let region = join(&one, "a").await;
    assert_eq!(region.lock(5000).await.err(), Some(RegionError::Unknown));
    assert_eq!(region.barrier(16).await.err(), Some(RegionError::Unknown));
    // Several regions in one process, of any sizes; but one region has one.
    let (small, work) = soon("join", Region::join(&one, "b", 1)).await.unwrap();
    tokio::spawn(work);
    lock(&small, 0).await.set(0, 3_u8);
    assert_eq!(region.get::<u8>(0), 0);
    let other = soon("join", Region::join(&two, "b", BYTES)).await;
    match other.map(|_| ()) {
        Err(JoinError::Size { theirs, ours }) => {
            assert_eq!((theirs, ours), (small.len() as u64, BYTES as u64));
        }
        other => panic!("{other:?}"),
    }
    // A slice that is kept while others write shows what was there, and who locks is told.
    let writer = join(&two, "a").await;
    let kept = region.slice::<u64>(0, 4);
    lock(&writer, 1).await.set(16, 8_u64);
    assert_eq!(region.lock(1).await.err(), Some(RegionError::Borrowed));
    assert_eq!(kept[2], 0);
    drop(kept);
    assert_eq!(lock(&region, 1).await.get::<u64>(16), 8);
    for node in [one, two] {
        soon("stop", node.stop()).await;
    }
}
