//! Event channels.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use unbroken_coord::client::{Client, ClientError, ConnectOptions};
use unbroken_coord::recipes::channel::{
    Channel, ChannelError, EVENT_BYTES_MAX, Event, Position, Start, Subscriber,
};
use unbroken_coord::wire::{Acl, EventType};

use crate::common::Cluster;
use crate::gate::Gate;
use crate::lossy::Lossy;
use crate::{Dice, clients, harass};

const EACH: usize = 60;

/// With segments so short that everything happens at their ends.
async fn open(client: &Client, path: &str) -> Channel {
    Channel::open_with(client, path, 7, Acl::open())
        .await
        .unwrap()
}

fn text(event: &Event) -> String {
    String::from_utf8(event.data.to_vec()).unwrap()
}

async fn read(subscriber: &mut Subscriber, count: usize) -> Vec<String> {
    let mut events = Vec::new();
    while events.len() < count {
        events.push(text(&subscriber.next().await.unwrap()));
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everyone_reads_the_same_once_and_in_order() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let mut publishers = Vec::new();
    let mut readers = Vec::new();
    let (finished, done) = watch::channel(false);
    for (client, who) in clients.iter().zip(0..) {
        let channel = open(client, "/app/events").await;
        let mut publisher = channel.publisher().await.unwrap();
        publishers.push(tokio::spawn(async move {
            let mut dice = Dice(who);
            let mut sent = Vec::new();
            let mut last = None;
            while sent.len() < EACH {
                let batch = usize::try_from(1 + dice.below(3)).unwrap();
                let upto = (sent.len() + batch).min(EACH);
                let batch: Vec<String> = (sent.len()..upto).map(|i| format!("{who}.{i}")).collect();
                let positions = publisher.publish_all(batch.clone()).await.unwrap();
                for (event, position) in batch.into_iter().zip(positions) {
                    assert!(last < Some(position), "{last:?} then {position}");
                    last = Some(position);
                    sent.push((event, position));
                }
            }
            sent
        }));
        // Reads a while at one server, then goes on at another where it committed.
        let other = clients[(usize::try_from(who).unwrap() + 1) % 3].clone();
        readers.push(tokio::spawn(async move {
            let name = format!("reader {who}");
            let mut events = Vec::new();
            for client in [channel, open(&other, "/app/events").await] {
                let mut subscriber = client.subscribe_as(&name, Start::Earliest).await.unwrap();
                let upto = if events.is_empty() { EACH } else { 3 * EACH };
                while events.len() < upto {
                    events.push(subscriber.next().await.unwrap());
                    subscriber.commit().await.unwrap();
                }
            }
            events
        }));
    }
    // What all have read is taken away meanwhile.
    let channel = open(&clients[0], "/app/events").await;
    let cleaner = tokio::spawn(async move {
        let mut begin = Position::default();
        while !*done.borrow() {
            let now = channel.truncate_read().await.unwrap();
            assert!(now >= begin, "{now} after {begin}");
            begin = now;
        }
        channel
    });
    harass(&mut cluster, 2).await;
    let mut sent = BTreeMap::new();
    for publisher in publishers {
        for (event, position) in publisher.await.unwrap() {
            assert_eq!(
                sent.insert(position, event),
                None,
                "two events at {position}"
            );
        }
    }
    for reader in readers {
        let events = reader.await.unwrap();
        let events: Vec<_> = events.iter().map(|e| (e.position, text(e))).collect();
        let sent: Vec<_> = sent.clone().into_iter().collect();
        assert_eq!(events, sent);
    }
    finished.send_replace(true);
    let channel = cleaner.await.unwrap();
    let (begin, end) = (
        channel.truncate_read().await.unwrap(),
        channel.end().await.unwrap(),
    );
    // The last events were read, their entry is not known to be done.
    assert!(
        begin < end && begin.entry + 1 >= end.entry,
        "{begin} to {end}"
    );
    let mut late = channel
        .subscribe(Start::At(Position::default()))
        .await
        .unwrap();
    match late.next().await {
        Err(ChannelError::Truncated { asked, first, .. }) => {
            assert_eq!((asked, first), (Position::default(), begin));
        }
        other => panic!("{other:?}"),
    }
    let mut rest = channel.subscribe(Start::At(begin)).await.unwrap();
    let expected: Vec<_> = sent
        .range(begin..)
        .map(|(_, event)| event.clone())
        .collect();
    assert_eq!(read(&mut rest, expected.len()).await, expected);
    let segments = clients[0].children("/app/events/log").await.unwrap();
    assert!(segments.len() <= 2, "{segments:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_confirmation_is_lost_is_there_once() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    let mut tasks = Vec::new();
    for (server, seed) in [("a", 3), ("b", 4)] {
        let (client, way) = Lossy::client(&cluster, server, seed).await;
        tasks.push(tokio::spawn(async move {
            let channel = open(&client, "/ch").await;
            let mut publisher = channel.publisher().await.unwrap();
            let mut sent = Vec::new();
            for i in 0..25 {
                let event = format!("{seed}.{i}");
                let position = publisher.publish(event.clone()).await.unwrap();
                sent.push((position, event));
            }
            drop(way);
            sent
        }));
    }
    let mut sent = BTreeMap::new();
    for task in tasks {
        sent.extend(task.await.unwrap());
    }
    let channel = open(&client, "/ch").await;
    let end = channel.end().await.unwrap();
    let mut reader = channel.subscribe(Start::Earliest).await.unwrap();
    let mut read = BTreeMap::new();
    while read.len() < sent.len() || reader.position().entry + 1 < end.entry {
        let event = reader.next().await.unwrap();
        read.insert(event.position, text(&event));
    }
    assert_eq!(read, sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_begin_where_they_say_and_hear_of_what_is_wrong() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    let channel = open(&client, "/ch").await;
    let mut publisher = channel.publisher().await.unwrap();
    let positions = publisher.publish_all(["a", "b", "c"]).await.unwrap();
    let huge = publisher.publish(vec![0; EVENT_BYTES_MAX + 1]).await;
    assert!(
        matches!(huge, Err(ChannelError::TooLarge { .. })),
        "{huge:?}"
    );
    let mut latest = channel.subscribe(Start::Latest).await.unwrap();
    for i in 0..20 {
        publisher.publish(i.to_string()).await.unwrap();
    }
    assert_eq!(read(&mut latest, 20).await.last().unwrap(), "19");
    // A position is text that anybody can go on from.
    let second: Position = positions[1].to_string().parse().unwrap();
    let mut from = channel.subscribe(Start::At(second)).await.unwrap();
    assert_eq!(read(&mut from, 3).await, ["b", "c", "0"]);
    assert_eq!(from.position(), Position { entry: 1, index: 1 });

    // One that nobody waits for is there once or not at all, and others come after it.
    for _ in 0..5 {
        let dropped = publisher.publish("dropped");
        tokio::time::timeout(Duration::ZERO, dropped)
            .await
            .unwrap_err();
    }
    publisher.publish("kept").await.unwrap();
    let mut after = latest.next().await.unwrap();
    let mut dropped = 0;
    while text(&after) != "kept" {
        assert_eq!(text(&after), "dropped");
        dropped += 1;
        after = latest.next().await.unwrap();
    }
    assert!(dropped <= 5, "{dropped} of 5");

    // The end is waited for.
    let waiting = tokio::spawn(async move { latest.next().await });
    publisher.publish("new").await.unwrap();
    assert_eq!(text(&waiting.await.unwrap().unwrap()), "new");

    // A registered one holds back, and another's position that is truncated is refused.
    let slow = channel
        .subscribe_as("slow", Start::At(second))
        .await
        .unwrap();
    assert_eq!(channel.truncate_read().await.unwrap().entry, 0);
    slow.commit().await.unwrap();
    channel
        .truncate_before(Position { entry: 9, index: 0 })
        .await
        .unwrap();
    assert_eq!(channel.begin().await.unwrap().entry, 9);
    let late = channel.subscribe_as("late", Start::At(second)).await;
    assert!(
        matches!(late, Err(ChannelError::Truncated { .. })),
        "{late:?}"
    );
    channel.unsubscribe("slow").await.unwrap();
    let all = Position {
        entry: 1 << 40,
        index: 0,
    };
    let begin = channel.truncate_before(all).await.unwrap();
    assert_eq!(begin, channel.end().await.unwrap(), "never beyond the end");

    // What somebody has deleted is a gap, not the end.
    let position = publisher.publish("gone").await.unwrap();
    let number = position.entry % 7;
    let entry = format!("/ch/log/{:010}/e-{number:010}", position.entry / 7);
    client.delete(&entry, -1).await.unwrap();
    let mut reader = channel.subscribe(Start::Earliest).await.unwrap();
    assert_eq!(reader.next().await, Err(ChannelError::Gap { path: entry }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_goes_on_after_its_session() {
    let cluster = Cluster::start(|_| {}).await;
    let gate = Gate::to(cluster.hosts("a")).await;
    let mut options = ConnectOptions::new([gate.host()]).renew_session(true);
    options.session_timeout = Duration::from_millis(300);
    let client = Client::connect(options).await.unwrap();
    let channel = open(&client, "/ch").await;
    let mut publisher = channel.publisher().await.unwrap();
    publisher.publish("before").await.unwrap();
    let mut subscriber = channel.subscribe(Start::Earliest).await.unwrap();
    assert_eq!(read(&mut subscriber, 1).await, ["before"]);
    let waiting = tokio::spawn(async move { subscriber.next().await });

    let other = cluster.client("b", 8000).await;
    let publishers = other.children("/ch/publishers").await.unwrap();
    let path = format!("/ch/publishers/{}", publishers[0]);
    let (_, gone) = other.exists_and_watch(&path).await.unwrap();
    gate.shut();
    assert_eq!(gone.await.unwrap().event, EventType::NodeDeleted);
    gate.open();
    // Either it had learnt of the end of its session before it sent anything, or it says that it
    // does not know; it never sends twice.
    let mut sent = vec!["before".to_owned()];
    for event in ["one", "two", "three"] {
        match publisher.publish(event).await {
            Ok(_) => sent.push(event.to_owned()),
            Err(ChannelError::Client(ClientError::SessionExpired)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(sent.last().unwrap(), "three");
    assert_eq!(text(&waiting.await.unwrap().unwrap()), sent[1]);
    let mut reader = open(&other, "/ch")
        .await
        .subscribe(Start::Earliest)
        .await
        .unwrap();
    assert_eq!(read(&mut reader, sent.len()).await, sent);
}
