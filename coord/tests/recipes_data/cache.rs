//! The read cache.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::recipes::cache::{
    Cache, CacheError, CacheEvent, Events, Limits, Lookup, Node, Scope, Status,
};
use unbroken_coord::wire::{Acl, CreateMode};

use crate::common::Cluster;
use crate::gate::Gate;
use crate::{Dice, clients, create, harass};

const PATHS: [&str; 9] = [
    "/app",
    "/app/a",
    "/app/b",
    "/app/c",
    "/app/a/x",
    "/app/a/y",
    "/app/b/x",
    "/app/b/x/1",
    "/else",
];

/// Creates, sets or deletes something, where that is possible.
async fn change(client: &Client, dice: &mut Dice) {
    let path = PATHS[usize::try_from(dice.below(9)).unwrap()];
    let _ = match dice.below(5) {
        0 => client.delete(path, -1).await,
        1 | 2 => {
            let create = client.create(path, "new", CreateMode::Persistent, Acl::open());
            create.await.map(drop)
        }
        value => client.set(path, value.to_string(), -1).await.map(drop),
    };
}

fn follow(held: &mut BTreeMap<String, Node>, event: CacheEvent) {
    match event {
        CacheEvent::Added { path, node } => assert_eq!(held.insert(path, node), None),
        CacheEvent::Changed { path, node } => {
            assert!(held.insert(path, node).is_some());
        }
        CacheEvent::Removed { path } => assert!(held.remove(&path).is_some(), "{path}"),
        CacheEvent::Stale | CacheEvent::Fresh => {}
        other => panic!("{other:?}"),
    }
}

/// What there is to cache below `/app`, by mzxid.
async fn tree(client: &Client) -> BTreeMap<String, i64> {
    let mut tree = BTreeMap::new();
    for path in &PATHS[..8] {
        if let Ok((_, stat)) = client.get(path).await {
            tree.insert((*path).to_owned(), stat.mzxid);
        }
    }
    tree
}

/// Waits until what follows the events is what is there.
async fn caught_up(client: &Client, held: &mut BTreeMap<String, Node>, events: &mut Events) {
    client.sync("/").await.unwrap();
    let there = tree(client).await;
    let same = |held: &BTreeMap<String, Node>| {
        let held = held
            .iter()
            .map(|(path, node)| (path.clone(), node.stat.mzxid));
        held.collect::<BTreeMap<_, _>>() == there
    };
    while !same(held) {
        follow(held, events.next().await.unwrap());
    }
}

// With one thread the task that was woken last is the next to run: who has an answer looks at the
// cache before the cache's own task has seen what came before that answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_is_never_older_than_what_the_session_has_read() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let reader = clients[0].clone();
    let cache = Cache::start(&reader, "/app", Scope::Subtree, Limits::default());
    let (mut held, mut events) = cache.subscribe();
    let writing = Arc::new(AtomicBool::new(true));
    let mut writers = Vec::new();
    for (client, seed) in clients[1..].iter().zip(0..) {
        let (client, writing) = (client.clone(), writing.clone());
        writers.push(tokio::spawn(async move {
            let mut dice = Dice(seed);
            while writing.load(Ordering::Relaxed) {
                change(&client, &mut dice).await;
            }
        }));
    }
    let checker = tokio::spawn({
        let (cache, writing) = (cache.clone(), writing.clone());
        async move {
            let mut dice = Dice(9);
            let mut fresh = 0;
            while writing.load(Ordering::Relaxed) || fresh == 0 {
                let path = PATHS[usize::try_from(dice.below(8)).unwrap()];
                // Of its own writes the session hears twice, right after each other.
                let read = if dice.below(2) == 0 {
                    reader.set(path, "mine", -1).await.map(Some)
                } else {
                    reader.exists(path).await
                };
                let Ok(read) = read else {
                    continue;
                };
                // At once, with no chance for the cache's own task to come between.
                if let Lookup::Fresh(node) = cache.get(path) {
                    fresh += 1;
                    let at = |zxid: Option<i64>| zxid.unwrap_or(i64::MAX);
                    let cached = at(node.map(|node| node.stat.mzxid));
                    let read = read.map_or(0, |stat| stat.mzxid);
                    assert!(cached >= read, "{path}: {cached}, but {read} was read");
                }
            }
            fresh
        }
    });
    harass(&mut cluster, 2).await;
    writing.store(false, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let fresh = checker.await.unwrap();
    caught_up(&clients[0], &mut held, &mut events).await;
    cache.fresh().await.unwrap();
    let content = |nodes: BTreeMap<String, Node>| -> Vec<_> {
        let nodes = nodes.into_iter();
        nodes
            .map(|(path, node)| (path, node.data, node.stat.mzxid))
            .collect()
    };
    let count = held.len();
    assert_eq!(content(cache.subscribe().0), content(held));
    let names = cache.children("/app").fresh().unwrap();
    let mut there = clients[0].children("/app").await.unwrap_or_default();
    there.sort_unstable();
    assert_eq!(names, there);
    println!("{fresh} fresh lookups, {count} znodes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_says_when_it_may_be_stale_and_recovers_even_from_a_lost_session() {
    let cluster = Cluster::start(|_| {}).await;
    let gate = Gate::to(cluster.hosts("a")).await;
    let mut options = ConnectOptions::new([gate.host()]).renew_session(true);
    options.session_timeout = std::time::Duration::from_millis(300);
    let client = Client::connect(options).await.unwrap();
    let writer = cluster.client("b", 8000).await;
    create(&writer, "/app", "old").await;
    create(&writer, "/app/gone", "").await;
    create(&writer, "/app/deep", "").await;
    create(&writer, "/app/deep/er", "").await;
    client.sync("/app").await.unwrap();
    let node = Cache::start(&client, "/app", Scope::Node, Limits::default());
    let children = Cache::start(&client, "/app", Scope::Children, Limits::default());
    let subtree = Cache::start(&client, "/app", Scope::Subtree, Limits::default());
    for (cache, count) in [(&node, 1), (&children, 3), (&subtree, 4)] {
        cache.fresh().await.unwrap();
        assert_eq!(cache.usage().0, count);
    }
    assert_eq!(children.get("/app/deep/er"), Lookup::Unknown);
    client
        .create("/mine", "", CreateMode::Ephemeral, Acl::open())
        .await
        .unwrap();
    writer.sync("/mine").await.unwrap();
    let (_, expired) = writer.exists_and_watch("/mine").await.unwrap();
    let mut status = subtree.status();
    gate.shut();
    status
        .wait_for(|status| *status == Status::Stale)
        .await
        .unwrap();
    let old = subtree.get("/app");
    assert!(
        matches!(&old, Lookup::Stale(Some(node)) if node.data == "old"),
        "{old:?}"
    );
    expired.await.unwrap();
    writer.set("/app", "new", -1).await.unwrap();
    writer.delete("/app/gone", -1).await.unwrap();
    create(&writer, "/app/deep/est", "").await;
    gate.open();
    for (cache, count) in [(&node, 1), (&children, 2), (&subtree, 4)] {
        // Whatever server it has got by now knows of it.
        while client.sync("/app").await.is_err() {}
        cache.fresh().await.unwrap();
        let new = cache.get("/app").fresh().unwrap().unwrap();
        assert_eq!((&new.data[..], cache.usage().0), (&b"new"[..], count));
    }

    let small = Limits {
        nodes: 3,
        bytes: 1 << 20,
    };
    let small = Cache::start(&writer, "/app", Scope::Subtree, small);
    let refused = small.fresh().await.unwrap_err();
    assert!(matches!(refused, CacheError::TooLarge { .. }), "{refused}");
    assert_eq!(small.get("/app"), Lookup::Unknown);
    writer.close().await.unwrap();
    client.close().await.unwrap();
    let ended = |status: &Status| matches!(status, Status::Ended(_));
    status.wait_for(ended).await.unwrap();
    assert!(matches!(subtree.get("/app"), Lookup::Stale(Some(_))));
}
