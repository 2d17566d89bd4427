//! Topics on real nodes: one order for all subscribers, whoever publishes and whoever dies; what is retained comes first.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use site::{LONG, Site};
use tokio::time::timeout;
use unbroken_group::node::{JoinError, Node};
use unbroken_group::tools::{Publication, Subscription, TOPIC_BYTES_MAX, Topics};

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

fn topics(node: &Node) -> Topics {
    let (topics, work) = Topics::new(node);
    tokio::spawn(work);
    topics
}

async fn subscribe(topics: &Topics, topic: &str) -> Subscription {
    soon("subscribe", topics.subscribe(topic)).await.unwrap()
}

async fn next(subscription: &mut Subscription) -> Publication {
    soon("a publication", subscription.next()).await.unwrap()
}

/// Waits until the topic has so many members.
async fn members(subscription: &Subscription, count: usize) {
    let group = subscription.publisher().group().clone();
    let there = async {
        while group.view().is_none_or(|v| v.members.len() != count) {
            tokio::task::yield_now().await;
        }
    };
    soon("members", there).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_see_one_order_and_a_publisher_may_die() {
    const EACH: usize = 100;
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let hubs: Vec<Topics> = nodes.iter().map(topics).collect();
    let mut first = subscribe(&hubs[0], "news").await;
    let mut second = subscribe(&hubs[1], "news").await;
    members(&first, 2).await;
    // It publishes and takes nothing.
    let third = soon("join", hubs[2].publisher("news")).await.unwrap();
    members(&first, 3).await;
    let publishing = [first.publisher().clone(), third.clone()].map(|publisher| {
        tokio::spawn(async move {
            for n in 0..EACH {
                let body = n.to_string();
                publisher.publish(body.as_bytes()).await.unwrap();
            }
        })
    });
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..2 * EACH {
        one.push(next(&mut first).await);
        two.push(next(&mut second).await);
    }
    assert_eq!(one, two);
    for p in publishing {
        soon("publishing", p).await.unwrap();
    }
    for publisher in [first.publisher(), &third] {
        let of = one.iter().filter(|p| p.from == *publisher.group().me());
        let of: Vec<usize> = of
            .map(|p| std::str::from_utf8(&p.body).unwrap().parse().unwrap())
            .collect();
        assert_eq!(of, (0..EACH).collect::<Vec<_>>(), "in its order");
    }
    // A process dies while it publishes: the others have the same of it.
    let dying = tokio::spawn(async move { while third.publish(b"x").await.is_ok() {} });
    next(&mut second).await;
    drop(nodes.pop());
    soon("it ends", dying).await.unwrap();
    members(&first, 2).await;
    first.publisher().publish(b"the end").await.unwrap();
    let mut counts = [0, 1];
    for (subscription, count) in [&mut first, &mut second].into_iter().zip(&mut counts) {
        while next(subscription).await.body != "the end" {
            *count += 1;
        }
    }
    assert_eq!(counts[0], counts[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_retained_comes_first() {
    let site = Site::new(2);
    let (one, two) = (site.start(1), site.start(2));
    let (hub, other) = (topics(&one), topics(&two));
    let mut first = subscribe(&hub, "weather").await;
    first.publisher().publish_retained(b"rain").await.unwrap();
    first.publisher().publish(b"in a while").await.unwrap();
    assert_eq!(next(&mut first).await.body, "rain");
    let live = next(&mut first).await;
    assert_eq!((&live.body[..], live.retained), (&b"in a while"[..], false));
    // In another process, and a second time in this one.
    let mut late = subscribe(&other, "weather").await;
    let mut again = subscribe(&hub, "weather").await;
    for subscription in [&mut late, &mut again] {
        let old = next(subscription).await;
        assert_eq!((&old.body[..], old.retained), (&b"rain"[..], true));
        assert_eq!(old.from, *first.publisher().group().me());
    }
    late.publisher().publish_retained(b"").await.unwrap();
    for subscription in [&mut first, &mut late, &mut again] {
        assert_eq!(next(subscription).await.body, "");
    }
    // Nothing is retained now. One handle that is left keeps the membership; without any, it ends, and may begin again.
    drop(first);
    members(&again, 2).await;
    drop(again);
    members(&late, 1).await;
    let mut anew = subscribe(&hub, "weather").await;
    late.publisher().publish(b"sun").await.unwrap();
    assert_eq!(next(&mut anew).await.body, "sun");
    drop(two);
    drop(one);
    assert_eq!(soon("the end", anew.next()).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_topics_of_one_process() {
    const TOPICS: usize = 100;
    let site = Site::new(2);
    let (one, two) = (site.start(1), site.start(2));
    let (hub, other) = (topics(&one), topics(&two));
    let mut subscriptions = Vec::new();
    for i in 0..TOPICS {
        subscriptions.push(subscribe(&hub, &format!("t{i}")).await);
    }
    for i in 0..TOPICS {
        let topic = format!("t{i}");
        let publisher = soon("join", other.publisher(&topic)).await.unwrap();
        publisher.publish(i.to_string().as_bytes()).await.unwrap();
    }
    for (i, subscription) in subscriptions.iter_mut().enumerate() {
        assert_eq!(next(subscription).await.body, i.to_string());
    }
    for name in [String::new(), "x".repeat(TOPIC_BYTES_MAX + 1)] {
        let refused = soon("refused", hub.publisher(&name)).await;
        assert_eq!(refused.err(), Some(JoinError::Refused));
    }
}
