//! Services on real nodes: handlers that call while they are called, a primary and coordinators that die in the middle.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::Duration;
use tokio::time::timeout;
use unbroken_group::node::{Event, Group, Handler, Node, Received};
use unbroken_group::process::{GroupView, Order, ThreadId, Want};
use unbroken_group::tools::{
    Client, Cohorts, Executed, HeldBy, PrimaryBackup, RequestError, RequestId, Service,
};

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

const TOTAL: Order = Order::Total(ThreadId(0));

/// Answers `sum` by asking all for their `one`; remembers how often.
#[derive(Default)]
struct Adder {
    sums: Mutex<u64>,
    views: AtomicU64,
}

impl Handler for &Adder {
    async fn message(&self, group: &Group, message: Received) {
        if message.body() == "one" {
            return message.reply("1");
        }
        *self.sums.lock().unwrap() += 1;
        let mut replies = group
            .call(Order::Fifo, "one", Want::All, None)
            .await
            .unwrap();
        let count = replies.all().await.len();
        message.reply(count.to_string());
    }

    async fn view(&self, group: &Group, view: GroupView) {
        self.views.fetch_add(1, Ordering::Relaxed);
        // A handler of views may call too.
        if view.members.len() == 3 {
            let mut replies = group.call(TOTAL, "one", Want::All, None).await.unwrap();
            assert_eq!(replies.all().await.len(), 3);
        }
    }

    fn state(&self, state: Bytes) {
        *self.sums.lock().unwrap() = std::str::from_utf8(&state).unwrap().parse().unwrap();
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![self.sums.lock().unwrap().to_string().into()]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_call_the_group_and_hold_up_nothing() {
    const EACH: usize = 20;
    let site = Site::new(3);
    let nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut groups: Vec<Group> = Vec::new();
    let mut running = Vec::new();
    let adders: [&'static Adder; 3] = std::array::from_fn(|_| &*Box::leak(Box::default()));
    for (node, adder) in nodes.iter().zip(adders) {
        let (group, events) = soon("join", Group::join(node, "adders")).await.unwrap();
        let own = group.clone();
        running.push(tokio::spawn(async move { own.run(events, adder).await }));
        groups.push(group);
    }
    let whole = groups[2].call(TOTAL, "sum", Want::All, None);
    let mut replies = soon("the first call", whole).await.unwrap();
    assert_eq!(soon("replies", replies.all()).await.len(), 3);
    // All ask at once, and each that is asked asks all.
    let asking = groups.iter().flat_map(|group| {
        (0..EACH).map(|_| {
            let group = group.clone();
            tokio::spawn(async move {
                let mut replies = group.call(TOTAL, "sum", Want::All, None).await.unwrap();
                replies.all().await
            })
        })
    });
    for asked in asking.collect::<Vec<_>>() {
        let replies = soon("an answer", asked).await.unwrap();
        assert_eq!(replies.len(), 3);
        assert!(replies.iter().all(|(_, count)| count == "3"), "{replies:?}");
    }
    for adder in adders {
        // Those who joined later had the rest by the state.
        assert_eq!(*adder.sums.lock().unwrap(), 1 + 3 * EACH as u64);
        assert!(adder.views.load(Ordering::Relaxed) > 0);
    }
    groups[1].leave().await.unwrap();
    assert!(soon("it leaves", running.remove(1)).await.unwrap());
    drop(nodes);
    for run in running {
        assert!(!soon("it ends", run).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closure_is_a_handler() {
    let site = Site::new(1);
    let node = site.start(1);
    let (group, events) = soon("join", Group::join(&node, "echo")).await.unwrap();
    let own = group.clone();
    let run = tokio::spawn(async move {
        let echo = async |message: Received| {
            let body = message.body().clone();
            message.reply(if body == "large" {
                vec![0; 200_000].into()
            } else {
                body
            });
        };
        own.run(events, echo).await
    });
    let mut replies = group.call(TOTAL, "hello", Want::One, None).await.unwrap();
    let (_, body) = soon("an echo", replies.next()).await.unwrap();
    assert_eq!(body, "hello");
    // A reply that fits no message is none.
    let mut replies = group.call(TOTAL, "large", Want::One, None).await.unwrap();
    assert_eq!(soon("no reply", replies.next()).await, None);
    group.leave().await.unwrap();
    assert!(soon("the end", run).await.unwrap());
}

/// A sum; each execution counts, and `stall` waits in the middle of its first.
#[derive(Default)]
struct Sum(u64);

static EXECUTIONS: AtomicU64 = AtomicU64::new(0);
static STALLS: AtomicU64 = AtomicU64::new(0);
static STALLED: Barrier = Barrier::new(2);

fn number(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes).unwrap().parse().unwrap()
}

impl Service for Sum {
    fn execute(&self, request: &Bytes) -> Executed {
        if request == "large" {
            return Executed {
                change: "1000".into(),
                answer: vec![0; 200_000].into(),
            };
        }
        if request == "stall" {
            EXECUTIONS.fetch_add(1, Ordering::Relaxed);
            if STALLS.fetch_add(1, Ordering::Relaxed) == 0 {
                STALLED.wait();
                STALLED.wait();
            }
            return Executed {
                change: "1".into(),
                answer: "stalled".into(),
            };
        }
        let sum = self.0 + number(request);
        Executed {
            change: request.clone(),
            answer: sum.to_string().into(),
        }
    }

    fn apply(&mut self, change: &Bytes) {
        self.0 += number(change);
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![self.0.to_string().into()]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        Some(Self(number(bytes)))
    }
}

async fn service(node: &Node, name: &str) -> PrimaryBackup<Sum> {
    let (service, work) = soon("join", PrimaryBackup::join(node, name)).await.unwrap();
    tokio::spawn(work);
    soon("the state", service.until(|_| true)).await.unwrap();
    service
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_primary_dies_and_each_request_counts_once() {
    const EACH: u64 = 60;
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut services = Vec::new();
    for node in &nodes {
        services.push(service(node, "sum").await);
    }
    assert_eq!(
        services[1].primary().as_ref(),
        Some(services[0].group().me())
    );
    let ask = |mut client: Client<Sum>| async move {
        let mut answers = Vec::new();
        for _ in 0..EACH {
            answers.push(number(&client.call("1").await.unwrap()));
        }
        answers
    };
    let asking: Vec<_> = services[1..]
        .iter()
        .map(|s| tokio::spawn(ask(s.client())))
        .collect();
    // In the middle.
    let middle = services[2].until(|s| s.0 > EACH / 2);
    soon("the middle", middle).await.unwrap();
    drop(nodes.remove(0));
    let mut answers = BTreeSet::new();
    for a in asking {
        answers.extend(soon("answers", a).await.unwrap());
    }
    assert_eq!(answers, (1..=2 * EACH).collect(), "each answered once");
    for s in &services[1..] {
        soon("the sum", s.until(|s| s.0 == 2 * EACH)).await.unwrap();
    }
    assert_eq!(
        services[2].primary().as_ref(),
        Some(services[1].group().me())
    );
    // Asked again, at another member, it does nothing more; neither does what was overtaken.
    let id = |number| RequestId {
        client: "a client".into(),
        number,
    };
    let first = soon("new", services[1].request(id(7), "5")).await;
    let again = soon("again", services[2].request(id(7), "5")).await;
    assert_eq!((&first, &first), (&again, &Ok("125".into())));
    let stale = soon("stale", services[2].request(id(6), "5")).await;
    assert_eq!(stale, Err(RequestError::Stale));
    // An answer that fits no message has no effect, and the next is not held up.
    let large = soon("large", services[2].request(id(8), "large")).await;
    assert_eq!(large, Err(RequestError::TooLarge));
    assert_eq!(services[2].read(|s| s.0), Some(125));
    // The table of clients comes with the state.
    let node = site.start(1);
    let late = service(&node, "sum").await;
    assert_eq!(late.read(|s| s.0), Some(125));
    let known = soon("known", late.request(id(8), "large")).await;
    assert_eq!(known, Err(RequestError::TooLarge));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_may_wait_until_all_have_it() {
    let site = Site::new(3);
    let nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let first = service(&nodes[0], "all").await;
    let second = service(&nodes[1], "all").await;
    let (slow, mut events) = soon("join", Group::join(&nodes[2], "all")).await.unwrap();
    let loaded = async { while !matches!(events.next().await, Some(Event::State(_))) {} };
    soon("its state", loaded).await;
    // It takes nothing for now.
    let mut asking = second.client().held_by(HeldBy::All);
    let mut all = pin!(asking.call("1"));
    tokio::select! {
        biased;
        answer = &mut all => panic!("{answer:?} before all have it"),
        done = soon("the sum", second.until(|s| s.0 == 1)) => done.unwrap(),
    }
    let half = soon("half", second.client().call("1")).await;
    assert_eq!(half, Ok("2".into()));
    assert!(timeout(Duration::ZERO, &mut all).await.is_err());
    tokio::spawn(async move { while events.next().await.is_some() {} });
    assert_eq!(soon("all", all).await, Ok("1".into()));
    // Who departs is not waited for.
    let id = RequestId {
        client: "a client".into(),
        number: 1,
    };
    slow.leave().await.unwrap();
    let answer = first.request_held(id, "1", HeldBy::All);
    assert_eq!(soon("without it", answer).await, Ok("3".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_primary_that_dies_while_it_executes_is_succeeded() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut services = Vec::new();
    for node in &nodes {
        services.push(service(node, "stalling").await);
    }
    let mut client = services[2].client();
    let asking = tokio::spawn(async move { client.call("stall").await });
    let meet = || {
        soon(
            "it executes",
            tokio::task::spawn_blocking(|| STALLED.wait()),
        )
    };
    meet().await.unwrap();
    drop(nodes.remove(0));
    let answer = soon("the next answers", asking).await.unwrap();
    assert_eq!(answer, Ok("stalled".into()));
    meet().await.unwrap();
    assert_eq!(EXECUTIONS.load(Ordering::Relaxed), 2);
    for s in &services[1..] {
        soon("once", s.until(|s| s.0 == 1)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cohorts_take_over_from_a_coordinator_that_dies() {
    const REQUESTS: usize = 30;
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut cohorts = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        // The first never comes to an end with anything.
        let compute = move |request: Bytes| async move {
            if i == 0 {
                std::future::pending::<()>().await;
            }
            Bytes::from([&request[..], b" done"].concat())
        };
        let joining = Cohorts::join(node, "cohorts", compute);
        let (member, work) = soon("join", joining).await.unwrap();
        tokio::spawn(work);
        cohorts.push(member);
    }
    let id = |n: usize| RequestId {
        client: format!("c{n}").into(),
        number: 1,
    };
    let asking: Vec<_> = (0..REQUESTS)
        .map(|n| {
            let cohorts = cohorts[2].clone();
            tokio::spawn(async move { cohorts.request(id(n), n.to_string()).await })
        })
        .collect();
    // All are answered but those of the first, and the others know which those are.
    let stuck = async || {
        while cohorts[0].waiting() != (REQUESTS / 3, REQUESTS / 3)
            || cohorts[1].waiting() != (REQUESTS / 3, 0)
        {
            tokio::task::yield_now().await;
        }
    };
    soon("some wait", stuck()).await;
    drop(nodes.remove(0));
    for (n, a) in asking.into_iter().enumerate() {
        let answer = soon("an answer", a).await.unwrap();
        assert_eq!(answer, Ok(format!("{n} done").into()));
        // The other one has it too.
        let other = async {
            while cohorts[1].answer(&id(n)) != Some(answer.clone()) {
                tokio::task::yield_now().await;
            }
        };
        soon("a copy", other).await;
    }
    assert_eq!(cohorts[2].waiting(), (0, 0));
    assert_eq!(
        soon("call", cohorts[1].call("x")).await,
        Ok("x done".into())
    );
}
