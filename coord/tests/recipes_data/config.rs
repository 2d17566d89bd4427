//! Configuration.

use std::collections::BTreeMap;

use unbroken_coord::recipes::config::{Config, ConfigError, ConfigMap, Following, Json};
use unbroken_coord::recipes::transaction::Transaction;
use unbroken_coord::wire::{Acl, CreateMode};

use crate::common::Cluster;
use crate::lossy::Lossy;
use crate::{clients, create, harass};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_update_counts_once_and_followers_see_them_in_order() {
    const EACH: u64 = 30;
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let follower = Config::<Json<u64>>::follow(&clients[2], "/app/count");
    assert_eq!(follower.current(), None);
    let mut changes = follower.changes();
    let seen = tokio::spawn(async move {
        let (mut value, mut zxid) = (0, 0);
        while value < 3 * EACH {
            let known = changes
                .wait_for(|known| known.version.as_ref().is_some_and(|v| v.zxid > zxid))
                .await
                .unwrap();
            let version = known.version.clone().unwrap();
            assert!(version.value.0 > value, "{} after {value}", version.value.0);
            (value, zxid) = (version.value.0, version.zxid);
        }
    });
    let mut tasks = Vec::new();
    for client in &clients {
        let count = Config::<Json<u64>>::follow(client, "/app/count");
        tasks.push(tokio::spawn(async move {
            for _ in 0..EACH {
                let next = |old: Option<&Json<u64>>| Some(Json(old.map_or(1, |old| old.0 + 1)));
                count.update(next).await.unwrap();
            }
        }));
    }
    harass(&mut cluster, 2).await;
    for task in tasks {
        task.await.unwrap();
    }
    seen.await.unwrap();
    assert_eq!(follower.first().await.unwrap().value, Json(3 * EACH));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_whose_answer_is_lost_counts_once() {
    const EACH: u64 = 25;
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    let mut tasks = Vec::new();
    for (server, seed) in [("a", 1), ("b", 2)] {
        let (client, way) = Lossy::client(&cluster, server, seed).await;
        tasks.push(tokio::spawn(async move {
            let count = Config::<Json<u64>>::follow(&client, "/count");
            for _ in 0..EACH {
                let next = |old: Option<&Json<u64>>| Some(Json(old.map_or(1, |old| old.0 + 1)));
                count.update(next).await.unwrap();
            }
            drop(way);
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let (count, _) = client.sync_and_get("/count").await.unwrap();
    assert_eq!(count, (2 * EACH).to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_values_are_reported_and_not_adopted() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    create(&client, "/limit", "10").await;
    let limit = Config::<Json<u32>>::follow(&client, "/limit");
    assert_eq!(limit.first().await.unwrap().value, Json(10));
    client.set("/limit", "many", -1).await.unwrap();
    let mut changes = limit.changes();
    let bad = |following: &Following| matches!(following, Following::Bad { version: 1, .. });
    let known = changes.wait_for(|known| bad(&known.following)).await;
    assert_eq!(known.unwrap().version.as_ref().unwrap().value, Json(10));
    let refused = limit.update(|_| Some(Json(1))).await.unwrap_err();
    assert!(
        matches!(refused, ConfigError::Bad { version: 1, .. }),
        "{refused}"
    );
    assert_eq!(limit.replace(&Json(20)).await.unwrap(), 2);
    let good = changes.wait_for(|known| known.following == Following::Current);
    assert_eq!(
        good.await.unwrap().version.as_ref().unwrap().value,
        Json(20)
    );
    assert_eq!(limit.set_if(Some(2), &Json(30)).await.unwrap(), 3);
    let refused = limit.set_if(Some(2), &Json(40)).await.unwrap_err();
    assert!(
        matches!(refused, ConfigError::Changed { expected: 2, .. }),
        "{refused}"
    );
    assert_eq!(limit.update(|_| None).await.unwrap(), Some(3));
    client.delete("/limit", -1).await.unwrap();
    let gone = changes.wait_for(|known| known.following == Following::Missing);
    assert_eq!(
        gone.await.unwrap().version.as_ref().unwrap().value,
        Json(30)
    );
    client.close().await.unwrap();
    let ended = |following: &Following| matches!(following, Following::Ended(_));
    changes
        .wait_for(|known| ended(&known.following))
        .await
        .unwrap();
}

/// Steps that follow each other as quickly as they can, while a map is read in four.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_step_is_never_seen() {
    let cluster = Cluster::start(|_| {}).await;
    let (writer, reader) = (
        cluster.client("a", 8000).await,
        cluster.client("a", 8000).await,
    );
    create(&writer, "/map", "").await;
    create(&writer, "/map/left", "0").await;
    let map = ConfigMap::<BTreeMap<String, String>>::follow(&reader, "/map");
    let mut changes = map.changes();
    let seen = tokio::spawn(async move {
        let mut count = 0;
        while count < 300 {
            changes.changed().await.unwrap();
            let Some(version) = changes.borrow_and_update().version.clone() else {
                continue;
            };
            count = version.value["left"].parse().unwrap();
            let odd = version.value.get("odd").map(String::as_str);
            let expected = (count % 2 == 1).then_some(version.value["left"].as_str());
            assert_eq!(odd, expected, "{:?}", version.value);
        }
    });
    for count in 1..=300 {
        let mut step = Transaction::new();
        step.set("/map", "", -1);
        step.set("/map/left", count.to_string(), -1);
        if count % 2 == 1 {
            step.create(
                "/map/odd",
                count.to_string(),
                CreateMode::Persistent,
                Acl::open(),
            );
        } else {
            step.delete("/map/odd", -1);
        }
        step.commit(&writer).await.unwrap();
    }
    seen.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_change_together_are_seen_together() {
    type Map = BTreeMap<String, String>;
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let follower = ConfigMap::<Map>::follow(&clients[1], "/app/pair");
    let mut changes = follower.changes();
    let writers: Vec<_> = [0, 2]
        .into_iter()
        .map(|i| {
            let pair = ConfigMap::<Map>::follow(&clients[i], "/app/pair");
            tokio::spawn(async move {
                for _ in 0..25 {
                    let next = |old: Option<&Map>| {
                        let count = old.map_or(0, |old| old["left"].parse::<u64>().unwrap()) + 1;
                        let mut new: Map = ["left", "right"]
                            .map(|side| (side.to_owned(), count.to_string()))
                            .into();
                        if count.is_multiple_of(2) {
                            new.insert("even".into(), count.to_string());
                        }
                        Some(new)
                    };
                    pair.update(next).await.unwrap();
                }
            })
        })
        .collect();
    let seen = tokio::spawn(async move {
        let mut count = 0;
        while count < 50 {
            changes.changed().await.unwrap();
            let known = changes.borrow_and_update().clone();
            let Some(version) = known.version else {
                continue;
            };
            let (left, right) = (&version.value["left"], &version.value["right"]);
            assert_eq!(left, right, "half of an update was seen");
            let now: u64 = left.parse().unwrap();
            assert!(now >= count, "{now} after {count}");
            assert_eq!(version.value.contains_key("even"), now.is_multiple_of(2));
            count = now;
        }
        changes
    });
    harass(&mut cluster, 1).await;
    for writer in writers {
        writer.await.unwrap();
    }
    let mut changes = seen.await.unwrap();
    // By other means, one at a time: followed as well.
    clients[0]
        .set("/app/pair/left", "by hand", -1)
        .await
        .unwrap();
    let by_hand = |map: &Map| map["left"] == "by hand";
    changes
        .wait_for(|known| known.version.as_ref().is_some_and(|v| by_hand(&v.value)))
        .await
        .unwrap();
    clients[0].delete("/app/pair/even", -1).await.unwrap();
    let without = |map: &Map| !map.contains_key("even");
    changes
        .wait_for(|known| known.version.as_ref().is_some_and(|v| without(&v.value)))
        .await
        .unwrap();
    let bad = follower.update(|_| Some([("a/b".to_owned(), String::new())].into()));
    assert_eq!(bad.await, Err(ConfigError::BadKey("a/b".into())));
}
