//! Lock, read/write lock, semaphore and election, on three real servers that are killed, with
//! connections that are cut and znodes that are deleted behind the holders' backs.

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;
#[path = "common/gate.rs"]
mod gate;
#[path = "common/recipes.rs"]
mod helpers;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::Cluster;
use gate::Gate;
use helpers::{Dice, SOON, children, gated, seed, soon, until_expired};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::recipes::election::Election;
use unbroken_coord::recipes::lock::Lock;
use unbroken_coord::recipes::rwlock::RwLock;
use unbroken_coord::recipes::semaphore::Semaphore;
use unbroken_coord::recipes::{Hold, HoldState, LostReason, RecipeError};
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode, MultiOp};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_is_handed_on_in_the_order_of_arrival() {
    let cluster = Cluster::start(|_| {}).await;
    let clients = [
        cluster.client("a", 10_000).await,
        cluster.client("b", 10_000).await,
        cluster.client("c", 10_000).await,
    ];
    let (got, mut order) = mpsc::unbounded_channel();
    let first = Lock::new(&clients[0], "/deep/down/lock").label("first");
    let held = soon("the lock is free", first.acquire()).await.unwrap();
    assert!(held.is_held());
    assert!(first.try_acquire().await.unwrap().is_none());
    let mut waiters = JoinSet::new();
    for number in 0..6 {
        let lock = Lock::new(&clients[number % 3], "/deep/down/lock").label(number.to_string());
        let got = got.clone();
        waiters.spawn(async move {
            let held = lock.acquire().await.unwrap();
            got.send((number, held.token())).unwrap();
            held.release().await.unwrap();
        });
        children(&clients[0], "/deep/down/lock", number + 2).await;
    }
    let line = first.contenders().await.unwrap();
    let labels: Vec<_> = line.iter().map(|c| c.label.clone()).collect();
    assert_eq!(labels, ["first", "0", "1", "2", "3", "4", "5"]);
    assert!(order.try_recv().is_err(), "nobody has got it yet");
    let mut last = held.token();
    held.release().await.unwrap();
    for number in 0..6 {
        let (who, token) = soon("the next one gets it", order.recv()).await.unwrap();
        assert_eq!(who, number);
        assert!(token > last, "a fencing token grows");
        last = token;
    }
    while let Some(ended) = waiters.join_next().await {
        ended.unwrap();
    }
    // The last one let go at another server.
    clients[0].sync("/").await.unwrap();
    assert!(
        clients[0]
            .children("/deep/down/lock")
            .await
            .unwrap()
            .is_empty()
    );
}

/// One who gives up in the middle of the line leaves nothing behind, and does not wake the last one
/// too early.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_acquire_leaves_the_line() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let lock = Lock::new(&client, "/lock");
    let held = lock.acquire().await.unwrap();
    let waiting = |label: &'static str| {
        let lock = lock.clone().label(label);
        tokio::spawn(async move { lock.acquire().await })
    };
    let middle = waiting("middle");
    children(&client, "/lock", 2).await;
    let last = waiting("last");
    children(&client, "/lock", 3).await;
    middle.abort();
    children(&client, "/lock", 2).await;
    assert!(!last.is_finished());
    drop(held);
    let held = soon("the last one's turn", last).await.unwrap().unwrap();
    assert!(held.is_held());
    // Given up at any moment of the first steps, too.
    for steps in 0..40 {
        let lock = lock.clone();
        let mut acquire = Box::pin(async move { lock.acquire().await });
        for _ in 0..steps {
            tokio::select! {
                biased;
                _ = &mut acquire => panic!("it is held"),
                () = tokio::task::yield_now() => {}
            }
        }
        drop(acquire);
    }
    held.release().await.unwrap();
    children(&client, "/lock", 0).await;
}

/// The one promise that matters: when the second one has the lock, the first one knows that it has
/// not, though nobody could tell it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_is_cut_off_knows_before_the_next_one_gets_it() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 600).await;
    let other = cluster.client("b", 10_000).await;
    let held = Arc::new(Lock::new(&cut, "/lock").acquire().await.unwrap());
    let next = Lock::new(&other, "/lock");
    let inside = Arc::new(AtomicUsize::new(0));
    let work = {
        let (held, inside) = (held.clone(), inside.clone());
        tokio::spawn(async move {
            let busy = async {
                inside.fetch_add(1, Ordering::SeqCst);
                std::future::pending::<()>().await;
            };
            held.run(busy).await
        })
    };
    let mut state = held.state();
    let waiting = tokio::spawn(async move { next.acquire().await });
    children(&other, "/lock", 2).await;
    assert!(held.is_held() && *state.borrow() == HoldState::Held);
    gate.shut();
    soon(
        "the connection is missed",
        state.wait_for(|s| *s != HoldState::Held),
    )
    .await
    .unwrap();
    let next = soon("the session expires", waiting).await.unwrap().unwrap();
    assert!(!held.is_held(), "believed held after the next one got it");
    assert_eq!(held.lost().await, LostReason::Deadline);
    assert_eq!(work.await.unwrap(), Err(LostReason::Deadline));
    assert_eq!(inside.load(Ordering::SeqCst), 1, "the work had begun");
    assert!(next.is_held());
    assert!(next.token() > held.token());
    // What is sent with the lost lock is refused, whatever the clocks say.
    gate.open();
    let stale = other.multi(vec![held.check()]).await.unwrap_err();
    assert_eq!(stale.code(), Some(ErrorCode::NoNode));
    other.multi(vec![next.check()]).await.unwrap();
    let held = Arc::into_inner(held).unwrap();
    assert_eq!(
        held.release().await,
        Err(RecipeError::Lost(LostReason::Deadline))
    );
}

/// A short loss of the connection is no loss of the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_survives_its_server_and_the_leader() {
    let mut cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let watcher = cluster.client("b", 10_000).await;
    let held = Lock::new(&client, "/lock").acquire().await.unwrap();
    for _ in 0..2 {
        let leader = cluster.leader().await;
        cluster.kill(&leader);
        client.sync("/").await.ok();
        watcher.sync("/").await.ok();
        assert!(held.is_held());
        cluster.up(&leader).await;
        cluster.leader().await;
        let mut client_state = client.state();
        let connected = client_state.wait_for(|s| format!("{s:?}").starts_with("Connected"));
        soon("reconnected", connected).await.unwrap();
        let mut state = held.state();
        soon("held again", state.wait_for(|s| *s == HoldState::Held))
            .await
            .unwrap();
    }
    held.release().await.unwrap();
    let again = Lock::new(&watcher, "/lock");
    assert!(soon("free", again.acquire()).await.unwrap().is_held());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn znodes_deleted_behind_their_backs() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let other = cluster.client("b", 10_000).await;
    let lock = Lock::new(&client, "/lock");
    let held = lock.acquire().await.unwrap();
    let waiting = {
        let lock = lock.clone();
        tokio::spawn(async move { lock.acquire().await })
    };
    let names = children(&other, "/lock", 2).await;
    let place = names.iter().find(|name| !held.path().ends_with(*name));
    let place = format!("/lock/{}", place.unwrap());
    other.delete(&place, -1).await.unwrap();
    let removed = soon("the waiter is told", waiting).await.unwrap();
    assert_eq!(removed.unwrap_err(), RecipeError::Removed { path: place });
    other.delete(held.path(), -1).await.unwrap();
    assert_eq!(
        soon("the holder is told", held.lost()).await,
        LostReason::Removed
    );
    assert!(!held.is_held());
    assert_eq!(
        held.release().await,
        Err(RecipeError::Lost(LostReason::Removed))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_client_ends_the_hold() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let lock = Lock::new(&client, "/lock");
    let held = lock.acquire().await.unwrap();
    let waiting = {
        let lock = lock.clone();
        tokio::spawn(async move { lock.acquire().await })
    };
    children(&client, "/lock", 2).await;
    client.close().await.unwrap();
    assert!(!held.is_held());
    assert!(soon("the waiter ends", waiting).await.unwrap().is_err());
}

/// Readers run together; a writer that waits stops later readers, and goes before them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_get_the_lock_unless_a_write_waits() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let other = cluster.client("b", 10_000).await;
    let (lock, elsewhere) = (RwLock::new(&client, "/rw"), RwLock::new(&other, "/rw"));
    let one = lock.read().await.unwrap();
    let two = soon("readers together", elsewhere.read()).await.unwrap();
    assert!(lock.try_write().await.unwrap().is_none());
    let (got, mut order) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for (number, write) in [(0, true), (1, false), (2, false), (3, true)] {
        let (lock, got) = (elsewhere.clone(), got.clone());
        tasks.spawn(async move {
            let held = if write {
                lock.write().await.unwrap()
            } else {
                lock.read().await.unwrap()
            };
            got.send((number, held)).unwrap();
        });
        children(&client, "/rw", number + 3).await;
    }
    assert!(lock.try_read().await.unwrap().is_none(), "a write waits");
    drop(one);
    children(&client, "/rw", 5).await;
    assert!(order.try_recv().is_err(), "a reader is still inside");
    drop(two);
    let (number, writing) = soon("the writer's turn", order.recv()).await.unwrap();
    assert_eq!(number, 0);
    writing.release().await.unwrap();
    let (a, reading_a) = soon("a reader's turn", order.recv()).await.unwrap();
    let (b, reading_b) = soon("the other's, too", order.recv()).await.unwrap();
    assert_eq!([a.min(b), a.max(b)], [1, 2]);
    assert!(reading_a.is_held() && reading_b.is_held());
    drop(reading_a);
    reading_b.release().await.unwrap();
    let (number, writing) = soon("the last writer's turn", order.recv()).await.unwrap();
    assert_eq!(number, 3);
    assert!(lock.try_read().await.unwrap().is_none());
    writing.release().await.unwrap();
    assert!(lock.try_read().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permits_are_given_in_order_and_taken_from_the_dead() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 600).await;
    let client = cluster.client("b", 10_000).await;
    let mine = Semaphore::new(&cut, "/permits", 3).unwrap();
    let permits = Semaphore::new(&client, "/permits", 3).unwrap();
    let dying = soon("two permits", mine.acquire(2)).await.unwrap();
    assert_eq!(permits.available().await.unwrap(), 1);
    let one = soon("the last", permits.acquire(1)).await.unwrap();
    assert!(permits.try_acquire(1).await.unwrap().is_none());
    let range = permits.acquire(4).await.unwrap_err();
    assert!(matches!(
        range,
        RecipeError::OutOfRange {
            value: 4,
            max: 3,
            ..
        }
    ));
    let (got, mut order) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for (number, count) in [(0, 2), (1, 1)] {
        let (permits, got) = (permits.clone(), got.clone());
        tasks.spawn(async move {
            let held = permits.acquire(count).await.unwrap();
            got.send((number, held)).unwrap();
        });
        children(&client, "/permits/locks", number + 1).await;
    }
    one.release().await.unwrap();
    children(&client, "/permits/leases", 4).await;
    assert!(order.try_recv().is_err(), "two are wanted, one is free");
    gate.shut();
    let (number, two) = soon("the dead one's permits", order.recv()).await.unwrap();
    assert_eq!(number, 0);
    assert!(!dying.is_held(), "believed held after others got them");
    let (number, last) = soon("the other one's turn", order.recv()).await.unwrap();
    assert_eq!(number, 1);
    assert_eq!(permits.available().await.unwrap(), 0);
    two.release().await.unwrap();
    drop(last);
    children(&client, "/permits/leases", 0).await;
    children(&client, "/permits/locks", 0).await;
    // A permit that is waited for is given up without a trace.
    let all = permits.acquire(3).await.unwrap();
    let waiting = {
        let permits = permits.clone();
        tokio::spawn(async move { permits.acquire(1).await })
    };
    children(&client, "/permits/leases", 4).await;
    waiting.abort();
    children(&client, "/permits/leases", 3).await;
    children(&client, "/permits/locks", 0).await;
    all.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_candidate_succeeds_and_all_follow() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 600).await;
    let client = cluster.client("b", 10_000).await;
    let observer = cluster.client("c", 10_000).await;
    let mut leaders = Election::new(&observer, "/election").follow();
    assert_eq!(leaders.next().await.unwrap(), None);
    let first = Election::new(&cut, "/election").label("first");
    let leading = soon("the only candidate leads", first.campaign(50))
        .await
        .unwrap();
    let seen = soon("it is seen", leaders.next()).await.unwrap().unwrap();
    assert_eq!(
        (&seen.label[..], seen.token),
        (&b"first"[..], leading.token())
    );
    let (got, mut order) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    // The best one does not depose the leader; of equals the first one is better.
    for (there, (label, rank)) in [("poor", 30), ("good", 10), ("also", 10), ("fair", 20)]
        .into_iter()
        .enumerate()
    {
        let election = Election::new(&client, "/election").label(label);
        let got = got.clone();
        tasks.spawn(async move {
            let leading = election.campaign(rank).await.unwrap();
            got.send((label, leading)).unwrap();
        });
        children(&client, "/election", there + 3).await;
    }
    let line = first.candidates().await.unwrap();
    let line: Vec<_> = line
        .iter()
        .map(|c| (std::str::from_utf8(&c.label).unwrap(), c.leads))
        .collect();
    let wanted = [
        ("good", false),
        ("also", false),
        ("fair", false),
        ("poor", false),
        ("first", true),
    ];
    assert_eq!(line, wanted);
    assert!(order.try_recv().is_err() && leading.is_held());
    gate.shut();
    let mut last = leading.token();
    for wanted in ["good", "also", "fair", "poor"] {
        let (label, next) = soon("the next one leads", order.recv()).await.unwrap();
        assert!(
            !leading.is_held(),
            "believed to lead after the next one did"
        );
        assert_eq!(label, wanted);
        assert!(next.token() > last);
        last = next.token();
        loop {
            // Between two leaders there may be none.
            if let Some(seen) = soon("it is seen", leaders.next()).await.unwrap() {
                assert_eq!((&seen.label[..], seen.token), (label.as_bytes(), last));
                break;
            }
        }
        next.release().await.unwrap();
    }
    assert_eq!(soon("nobody is left", leaders.next()).await.unwrap(), None);
}

/// Who believes to hold what, all of one process.
#[derive(Default)]
struct Believers(Mutex<Vec<(Arc<Hold>, usize)>>);

impl Believers {
    /// Who has just got something must be alone with it, as `fits` judges: given what the others
    /// hold that believe it at one moment, and what it holds itself.
    fn enter(&self, hold: &Arc<Hold>, kind: usize, fits: impl Fn(&[usize], usize) -> bool) {
        let mut believers = self.0.lock().expect("nobody panics with it");
        believers.retain(|(other, _)| Arc::strong_count(other) > 1 || other.is_held());
        let others: Vec<usize> = believers
            .iter()
            .filter(|(other, _)| other.is_held())
            .map(|(_, kind)| *kind)
            .collect();
        // In this order: if it is still held now, it was at every moment above.
        if hold.is_held() {
            assert!(fits(&others, kind), "{others:?} were inside with {kind}");
        }
        believers.push((hold.clone(), kind));
    }

    fn leave(&self, hold: &Arc<Hold>) {
        let mut believers = self.0.lock().expect("nobody panics with it");
        believers.retain(|(other, _)| !Arc::ptr_eq(other, hold));
    }
}

/// Workers on three clients take a lock, a read/write lock and a semaphore, while servers are killed
/// and connections cut: nobody believes to be inside with others who believe it, and the counter
/// that only holders may raise has been raised once for each of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_inside_with_others_whatever_dies() {
    const WORKERS: usize = 9;
    const PERMITS: usize = 2;
    let seed = seed();
    let mut cluster = Cluster::start(|_| {}).await;
    let mut clients = Vec::new();
    let mut gates = Vec::new();
    for server in ["a", "b", "c"] {
        let gate = Gate::to(cluster.hosts(server)).await;
        let mut options = ConnectOptions::new([gate.host()])
            .session_timeout(Duration::from_millis(500))
            .request_timeout(Some(SOON));
        options.renew_session = true;
        clients.push(Client::connect(options).await.unwrap());
        gates.push(gate);
    }
    let judge = cluster.client("a", 20_000).await;
    judge
        .create("/counter", "", CreateMode::Persistent, Acl::open())
        .await
        .unwrap();
    let believers: Arc<[Believers; 3]> = Arc::default();
    let (raised, unsure) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let tokens = Arc::new(Mutex::new(0));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        let client = clients[worker % clients.len()].clone();
        let (believers, stopped) = (believers.clone(), stopped.clone());
        let (raised, unsure, tokens) = (raised.clone(), unsure.clone(), tokens.clone());
        let mut dice = Dice(seed.wrapping_mul(worker as u64 * 2 + 3) | 1);
        workers.spawn(async move {
            let lock = Lock::new(&client, "/chaos/lock");
            let rwlock = RwLock::new(&client, "/chaos/rwlock");
            let permits = Semaphore::new(&client, "/chaos/permits", PERMITS).unwrap();
            let mut rounds = 0;
            while !*stopped.borrow() {
                let what = dice.below(4);
                let got = match what {
                    0 => lock.acquire().await,
                    1 => rwlock.read().await,
                    2 => rwlock.write().await,
                    _ => permits.acquire(1 + worker % PERMITS).await,
                };
                // The session has expired: the client opens another.
                let Ok(held) = got else { continue };
                let held = Arc::new(held);
                match what {
                    0 => {
                        believers[0].enter(&held, 0, |others, _| others.is_empty());
                        let mut last = tokens.lock().unwrap();
                        assert!(held.token() > *last, "a fencing token that grows");
                        *last = held.token();
                    }
                    1 => believers[1].enter(&held, 0, |others, _| others.iter().all(|k| *k == 0)),
                    2 => believers[1].enter(&held, 1, |others, _| others.is_empty()),
                    _ => believers[2].enter(&held, 1 + worker % PERMITS, |others, mine| {
                        others.iter().sum::<usize>() + mine <= PERMITS
                    }),
                }
                if what == 0 {
                    // A read and a write that would lose updates if two did it at once.
                    let raise = async {
                        let (data, stat) = client.sync_and_get("/counter").await?;
                        let count: usize = std::str::from_utf8(&data).unwrap().parse().unwrap_or(0);
                        let set = MultiOp::SetData {
                            path: "/counter".into(),
                            data: Some((count + 1).to_string().into()),
                            version: stat.version,
                        };
                        client.multi(vec![held.check(), set]).await
                    };
                    match held.run(raise).await {
                        Ok(Ok(_)) => drop(raised.fetch_add(1, Ordering::SeqCst)),
                        Ok(Err(error)) if !error.outcome_unknown() => {}
                        _ => drop(unsure.fetch_add(1, Ordering::SeqCst)),
                    }
                }
                for _ in 0..dice.below(4) {
                    tokio::task::yield_now().await;
                }
                let which = [0, 1, 1, 2][usize::try_from(what).unwrap()];
                believers[which].leave(&held);
                if let Some(held) = Arc::into_inner(held) {
                    if dice.below(3) == 0 {
                        drop(held);
                    } else {
                        let _ = held.release().await;
                    }
                }
                rounds += 1;
            }
            rounds
        });
    }
    let mut dice = Dice(seed | 1);
    for _ in 0..6 {
        match dice.below(3) {
            0 => {
                let leader = cluster.leader().await;
                cluster.kill(&leader);
                judge.sync("/").await.ok();
                cluster.up(&leader).await;
            }
            1 => {
                let any = ["a", "b", "c"][usize::try_from(dice.below(3)).unwrap()];
                cluster.kill(any);
                judge.sync("/").await.ok();
                cluster.up(any).await;
            }
            _ => {
                let cut = usize::try_from(dice.below(3)).unwrap();
                until_expired(&judge, &clients[cut], &gates[cut], cut).await;
            }
        }
        cluster.leader().await;
        for _ in 0..30 {
            judge.sync("/").await.ok();
        }
    }
    stop.send_replace(true);
    let mut rounds = 0;
    while let Some(ended) = soon("every wait ends", workers.join_next()).await {
        rounds += ended.unwrap();
    }
    let (data, _) = judge.sync_and_get("/counter").await.unwrap();
    let count: usize = std::str::from_utf8(&data).unwrap().parse().unwrap_or(0);
    let (raised, unsure) = (raised.load(Ordering::SeqCst), unsure.load(Ordering::SeqCst));
    println!("{rounds} rounds, counter {count}, raised {raised}, unsure {unsure}");
    assert!((raised..=raised + unsure).contains(&count));
    assert!(rounds > WORKERS, "they got somewhere");
    // Nothing is left behind, but by those who are gone.
    for path in ["/chaos/lock", "/chaos/rwlock", "/chaos/permits/leases"] {
        children(&judge, path, 0).await;
    }
}
