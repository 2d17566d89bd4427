//! Barriers, queues and groups, on three real servers that are killed, with connections that are cut.

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;
#[path = "common/gate.rs"]
mod gate;
#[path = "common/recipes.rs"]
mod helpers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::Cluster;
use gate::Gate;
use helpers::{Dice, children, gated, seed, soon, until_expired};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::recipes::barrier::Barrier;
use unbroken_coord::recipes::double_barrier::DoubleBarrier;
use unbroken_coord::recipes::group::Group;
use unbroken_coord::recipes::queue::Queue;
use unbroken_coord::recipes::{LostReason, RecipeError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_barrier_holds_everybody_until_it_is_opened() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = [
        cluster.client("a", 10_000).await,
        cluster.client("b", 10_000).await,
        cluster.client("c", 10_000).await,
    ];
    let barrier = Barrier::new(&clients[0], "/gate/way");
    soon("it was never closed", barrier.wait()).await.unwrap();
    barrier.close().await.unwrap();
    barrier.close().await.unwrap();
    let (through, opened) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut waiters = JoinSet::new();
    for client in &clients {
        let barrier = Barrier::new(client, "/gate/way");
        let (through, opened) = (through.clone(), opened.clone());
        waiters.spawn(async move {
            barrier.wait().await.unwrap();
            assert_eq!(opened.load(Ordering::SeqCst), 1, "through a closed barrier");
            through.fetch_add(1, Ordering::SeqCst);
        });
    }
    let leader = cluster.leader().await;
    cluster.kill(&leader);
    clients[1].sync("/").await.ok();
    assert_eq!(through.load(Ordering::SeqCst), 0);
    opened.store(1, Ordering::SeqCst);
    barrier.open().await.unwrap();
    barrier.open().await.unwrap();
    while let Some(ended) = soon("all go on", waiters.join_next()).await {
        ended.unwrap();
    }
}

/// Rounds of three, out of four processes that hurry: nobody is inside with others of another round,
/// nobody begins before three have come, and nobody is through before all three have left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rounds_begin_and_end_together() {
    const COUNT: usize = 3;
    const ROUNDS: usize = 12;
    let mut cluster = Cluster::start(|_| {}).await;
    let mut processes = JoinSet::new();
    // Of each round, how many have entered, and how many of these began to leave.
    let rounds: Arc<Mutex<BTreeMap<i32, (usize, usize)>>> = Arc::default();
    let came = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(tokio::sync::watch::Sender::new(0_usize));
    for server in ["a", "b", "c", "a"] {
        let client = cluster.client(server, 10_000).await;
        let (came, rounds, done) = (came.clone(), rounds.clone(), done.clone());
        processes.spawn(async move {
            let barrier = DoubleBarrier::new(&client, "/rounds", COUNT).unwrap();
            let mut over = done.subscribe();
            loop {
                came.fetch_add(1, Ordering::SeqCst);
                // The last ones to come find nobody to begin with.
                let entered = tokio::select! {
                    entered = barrier.enter() => entered.unwrap(),
                    _ = over.wait_for(|done| *done >= COUNT * ROUNDS) => return,
                };
                let round = entered.round();
                {
                    let mut rounds = rounds.lock().unwrap();
                    let others = rounds.iter().filter(|(other, _)| **other != round);
                    for (other, (entered, left)) in others {
                        assert!(entered <= left, "round {other} is on in round {round}");
                    }
                    assert_eq!(entered.count(), COUNT);
                    assert!(came.load(Ordering::SeqCst) >= COUNT);
                    rounds.entry(round).or_default().0 += 1;
                }
                for _ in 0..5 {
                    tokio::task::yield_now().await;
                }
                rounds.lock().unwrap().entry(round).or_default().1 += 1;
                entered.leave().await.unwrap();
                let (entered, left) = rounds.lock().unwrap()[&round];
                // Who gave up at the end may have been in the last rounds.
                let all = *done.borrow() >= COUNT * ROUNDS || (entered, left) == (COUNT, COUNT);
                assert!(
                    all,
                    "through round {round} after {entered} entered and {left} left"
                );
                done.send_modify(|done| *done += 1);
            }
        });
    }
    let watcher = cluster.client("b", 10_000).await;
    for _ in 0..2 {
        let leader = cluster.leader().await;
        cluster.kill(&leader);
        watcher.sync("/").await.ok();
        cluster.up(&leader).await;
    }
    while let Some(ended) = soon("every round ends", processes.join_next()).await {
        ended.unwrap();
    }
    assert!(*done.borrow() >= COUNT * ROUNDS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_member_keeps_nobody_inside() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 500).await;
    let client = cluster.client("b", 10_000).await;
    let theirs = DoubleBarrier::new(&cut, "/step", 2).unwrap();
    let ours = DoubleBarrier::new(&client, "/step", 2).unwrap();
    // One who gives up waiting does not count.
    let early = {
        let ours = ours.clone();
        tokio::spawn(async move { ours.enter().await })
    };
    children(&client, "/step", 2).await; // itself, and `ready`
    early.abort();
    children(&client, "/step", 1).await;
    let entering = tokio::spawn(async move { theirs.enter().await });
    children(&client, "/step", 2).await;
    assert!(!entering.is_finished());
    let we = soon("two are enough", ours.enter()).await.unwrap();
    let they = soon("two are enough", entering).await.unwrap().unwrap();
    let leaving = tokio::spawn(we.leave());
    gate.shut();
    soon("the dead have left", leaving).await.unwrap().unwrap();
    assert!(!they.is_held());
    assert!(they.leave().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn items_leave_in_order() {
    let cluster = Cluster::start(|_| {}).await;
    let (one, two) = (
        cluster.client("a", 10_000).await,
        cluster.client("b", 10_000).await,
    );
    let (put, take) = (Queue::new(&one, "/jobs"), Queue::new(&two, "/jobs"));
    assert!(take.try_take().await.unwrap().is_none());
    let waiting = {
        let take = take.clone();
        tokio::spawn(async move { take.take().await.unwrap() })
    };
    put.put("first").await.unwrap();
    assert_eq!(soon("it is woken", waiting).await.unwrap().value, "first");
    put.put("b").await.unwrap();
    put.put_with(200, "d").await.unwrap();
    put.put_all(100, vec!["c".into(), "c2".into()])
        .await
        .unwrap();
    put.put_with(1, "a").await.unwrap();
    two.sync("/jobs").await.unwrap();
    assert_eq!(take.len().await.unwrap(), 5);
    for wanted in ["a", "b", "c", "c2", "d"] {
        let item = take.try_take().await.unwrap().unwrap();
        assert_eq!(item.value, wanted);
    }
    assert!(take.is_empty().await.unwrap());
    let range = put.put_with(1000, "x").await.unwrap_err();
    assert!(matches!(range, RecipeError::OutOfRange { value: 1000, .. }));
    children(&one, "/jobs/marks", 0).await;
    children(&one, "/jobs/taken", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reserved_item_comes_back_when_its_consumer_is_lost() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 500).await;
    let client = cluster.client("b", 10_000).await;
    let (theirs, ours) = (Queue::new(&cut, "/jobs"), Queue::new(&client, "/jobs"));
    ours.put("one").await.unwrap();
    ours.put("two").await.unwrap();
    // Put back by hand, and by being dropped.
    let reserved = ours.reserve().await.unwrap();
    assert_eq!(reserved.item().value, "one");
    reserved.put_back().await.unwrap();
    drop(ours.reserve().await.unwrap());
    children(&client, "/jobs/taken", 0).await;
    // The other's server may not have heard of it yet.
    cut.sync("/jobs").await.unwrap();
    let reserved = theirs.reserve().await.unwrap();
    assert_eq!(reserved.item().value, "one");
    client.sync("/jobs").await.unwrap();
    let two = ours.try_reserve().await.unwrap().unwrap();
    assert_eq!(two.item().value, "two");
    assert!(ours.try_take().await.unwrap().is_none());
    two.done().await.unwrap();
    let waiting = {
        let ours = ours.clone();
        tokio::spawn(async move { ours.reserve().await })
    };
    gate.shut();
    let again = soon("it comes back", waiting).await.unwrap().unwrap();
    assert_eq!(again.item().value, "one");
    assert!(!reserved.is_held(), "believed ours after another got it");
    assert_eq!(
        reserved.done().await.unwrap_err(),
        RecipeError::Lost(LostReason::Deadline)
    );
    assert_eq!(again.done().await.unwrap().value, "one");
    assert!(ours.is_empty().await.unwrap());
    // The claim is deleted behind its back.
    ours.put("three").await.unwrap();
    let reserved = ours.reserve().await.unwrap();
    client.delete(reserved.path(), -1).await.unwrap();
    assert_eq!(soon("told", reserved.lost()).await, LostReason::Removed);
    assert_eq!(ours.take().await.unwrap().value, "three");
    assert!(reserved.done().await.is_err());
}

/// A take that is dropped at any moment loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_take_puts_the_item_back_in_its_place() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 10_000).await;
    let queue = Queue::new(&client, "/jobs");
    let items = 30_usize;
    for item in 0..items {
        queue.put(item.to_string()).await.unwrap();
    }
    let mut got = Vec::new();
    let mut dropped = 0_usize;
    while got.len() < items {
        let mut take = Box::pin(queue.take());
        let mut taken = None;
        for _ in 0..dropped % 41 {
            tokio::select! {
                biased;
                item = &mut take => {
                    taken = Some(item.unwrap());
                    break;
                }
                () = tokio::task::yield_now() => {}
            }
        }
        drop(take);
        dropped += 1;
        if dropped > 2000 {
            // Too slow a machine to win the race by yielding.
            taken = Some(soon("an item", queue.take()).await.unwrap());
        }
        if let Some(item) = taken {
            let item: usize = std::str::from_utf8(&item.value).unwrap().parse().unwrap();
            got.push(item);
        }
    }
    let distinct: BTreeSet<_> = got.iter().copied().collect();
    assert_eq!(distinct.len(), items, "each item once: {got:?}");
    children(&client, "/jobs/taken", 0).await;
    children(&client, "/jobs/entries", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_change_and_go() {
    let cluster = Cluster::start(|_| {}).await;
    let (cut, gate) = gated(&cluster, "a", 500).await;
    let client = cluster.client("b", 10_000).await;
    let observer = cluster.client("c", 10_000).await;
    let group = Group::new(&client, "/group");
    let mut members = Group::new(&observer, "/group").follow();
    let mut now = async || -> BTreeMap<String, Bytes> {
        let seen = soon("a change", members.next()).await.unwrap();
        seen.into_iter().map(|(name, m)| (name, m.data)).collect()
    };
    let is = |pairs: &[(&str, &str)]| -> BTreeMap<String, Bytes> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, data)| ((*name).to_owned(), Bytes::copy_from_slice(data.as_bytes())))
            .collect()
    };
    assert_eq!(now().await, is(&[]));
    let one = group.join("one", "1").await.unwrap();
    assert_eq!(now().await, is(&[("one", "1")]));
    let two = Group::new(&cut, "/group").join("two", "2").await.unwrap();
    assert_eq!(now().await, is(&[("one", "1"), ("two", "2")]));
    one.set("one more").await.unwrap();
    assert_eq!(now().await, is(&[("one", "one more"), ("two", "2")]));
    let twice = group.join("one", "").await.unwrap_err();
    assert_eq!(
        twice,
        RecipeError::Taken {
            path: "/group/one".into()
        }
    );
    let bad = group.join("a/b", "").await.unwrap_err();
    assert!(matches!(bad, RecipeError::BadName { .. }));
    // A name is another's when the session that had it is over.
    let heir = {
        let group = group.clone();
        tokio::spawn(async move { group.join("two", "heir").await })
    };
    gate.shut();
    let heir = soon("the name is free", heir).await.unwrap().unwrap();
    assert!(
        !two.is_held(),
        "believed a member after another got the name"
    );
    loop {
        let seen = now().await;
        if seen == is(&[("one", "one more"), ("two", "heir")]) {
            break;
        }
    }
    assert_eq!(two.set("late").await, Err(LostReason::Deadline.into()));
    one.leave().await.unwrap();
    assert_eq!(now().await, is(&[("two", "heir")]));
    drop(heir);
    assert_eq!(now().await, is(&[]));
    // The first session's clean-up, late, leaves the heir's znode alone.
    gate.open();
    let heir = group.join("two", "heir again").await.unwrap();
    assert_eq!(now().await, is(&[("two", "heir again")]));
    cut.sync("/").await.ok();
    assert!(heir.is_held());
    assert_eq!(group.members().await.unwrap().len(), 1);
}

/// Producers and consumers on three clients, while servers are killed and connections cut: every item
/// that was put in comes out once; a reserved one whose consumer was lost may come out again, and
/// is done once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_item_once_whatever_dies() {
    const PRODUCERS: usize = 3;
    let seed = seed();
    let mut cluster = Cluster::start(|_| {}).await;
    let mut clients = Vec::new();
    let mut gates = Vec::new();
    for server in ["a", "b", "c"] {
        let gate = Gate::to(cluster.hosts(server)).await;
        let mut options = ConnectOptions::new([gate.host()])
            .session_timeout(Duration::from_millis(500))
            .request_timeout(Some(helpers::SOON));
        options.renew_session = true;
        clients.push(Client::connect(options).await.unwrap());
        gates.push(gate);
    }
    let judge = cluster.client("a", 20_000).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    // Put in for certain, and perhaps.
    let put: Arc<Mutex<[BTreeSet<String>; 2]>> = Arc::default();
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let queue = Queue::new(&clients[producer % clients.len()], "/chaos");
        let (put, stopped) = (put.clone(), stopped.clone());
        producers.spawn(async move {
            let mut number = 0;
            while !*stopped.borrow() {
                let value = format!("{producer}-{number}");
                let ended = queue.put(value.clone()).await;
                let mut put = put.lock().unwrap();
                put[usize::from(ended.is_err())].insert(value);
                number += 1;
            }
        });
    }
    let (got, mut items) = mpsc::unbounded_channel::<(String, String)>();
    let (lost, mut losses) = mpsc::unbounded_channel();
    let mut consumers = JoinSet::new();
    let (drained, empty) = tokio::sync::watch::channel(false);
    for consumer in 0..5_usize {
        let queue = Queue::new(&clients[consumer % clients.len()], "/chaos");
        let (got, lost, empty) = (got.clone(), lost.clone(), empty.clone());
        consumers.spawn(async move {
            let mut empty = empty;
            loop {
                // Two take, three reserve. Nobody waits once all has been put in and taken; who has
                // an item by then goes on with it.
                let taken = async {
                    if consumer < 2 {
                        return Ok((queue.take().await?, None));
                    }
                    let reserved = queue.reserve().await?;
                    Ok((reserved.item().clone(), Some(reserved)))
                };
                let taken: Result<_, RecipeError> = tokio::select! {
                    biased;
                    taken = taken => taken,
                    _ = empty.wait_for(|empty| *empty) => return,
                };
                // Whatever it was about to take may be lost: a taker's risk.
                let Ok((item, reserved)) = taken else {
                    lost.send(String::new()).unwrap();
                    continue;
                };
                let value = String::from_utf8(item.value.to_vec()).unwrap();
                let done = match reserved {
                    None => true,
                    Some(reserved) => reserved.done().await.is_ok(),
                };
                if done {
                    got.send((value, item.name)).unwrap();
                } else {
                    // Not done, or done and nobody knows: it may come again.
                    lost.send(value).unwrap();
                }
            }
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
    while let Some(ended) = soon("every put ends", producers.join_next()).await {
        ended.unwrap();
    }
    children(&judge, "/chaos/entries", 0).await;
    children(&judge, "/chaos/taken", 0).await;
    drained.send_replace(true);
    while let Some(ended) = soon("every take ends", consumers.join_next()).await {
        ended.unwrap();
    }
    drop((got, lost));
    let (mut seen, mut names) = (BTreeSet::new(), BTreeSet::new());
    while let Some((item, name)) = items.recv().await {
        assert!(seen.insert(item.clone()), "{item} came out twice");
        names.insert(name);
    }
    let (mut unsure, mut anything) = (BTreeSet::new(), 0_usize);
    while let Some(item) = losses.recv().await {
        if item.is_empty() {
            anything += 1;
        } else {
            unsure.insert(item);
        }
    }
    let put = put.lock().unwrap();
    let missing: Vec<_> = put[0]
        .difference(&seen)
        .filter(|i| !unsure.contains(*i))
        .collect();
    println!(
        "{} in, {} perhaps, {} out, {} unsure, {anything} takes failed, missing {missing:?}",
        put[0].len(),
        put[1].len(),
        seen.len(),
        unsure.len()
    );
    // Whether what is missing was in the queue at all: its number is.
    let numbers: BTreeSet<usize> = names
        .iter()
        .map(|name| name.rsplit_once('-').unwrap().1.parse().unwrap())
        .collect();
    let gaps: Vec<usize> = (0..numbers.len() + 9)
        .filter(|number| !numbers.contains(number))
        .collect();
    assert!(
        missing.len() <= anything,
        "lost: {missing:?}, gaps {gaps:?}"
    );
    assert!(
        seen.iter()
            .all(|item| put[0].contains(item) || put[1].contains(item))
    );
    assert!(seen.len() > 20, "they got somewhere");
}
