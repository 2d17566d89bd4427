//! Whole nodes on loopback, as programs use them: real sockets, a thread each, and a coordinator in memory.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::timeout;
use unbroken_group::MemberId;
use unbroken_group::node::{Event, Events, Group, JoinError, Node, SendError};
use unbroken_group::process::{GroupView, Order, ThreadId, Want};

/// One member with what it was told.
struct Member {
    node: Node,
    group: Group,
    events: Events,
    /// What it was given, in order; the state is the list itself.
    log: Vec<Bytes>,
    view: GroupView,
}

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

impl Member {
    async fn join(node: Node, name: &str) -> Self {
        let (group, events) = soon("join", Group::join(&node, name)).await.unwrap();
        Self {
            node,
            group,
            events,
            log: Vec::new(),
            view: GroupView {
                id: 0,
                members: Vec::new(),
                joined: Vec::new(),
                departed: Vec::new(),
            },
        }
    }

    /// Takes one event; gives it if it is none of the usual.
    async fn take(&mut self) -> Option<Event> {
        match soon("an event", self.events.next()).await {
            Some(Event::Init) => None,
            Some(Event::State(bytes)) => {
                self.log = bytes.chunks(8).map(Bytes::copy_from_slice).collect();
                None
            }
            Some(Event::View(view)) => {
                self.view = view;
                None
            }
            Some(Event::StateWanted(wanted)) => {
                wanted.give(self.log.clone());
                None
            }
            Some(Event::Message(m)) => {
                if m.order().is_some() {
                    self.log.push(m.body().clone());
                }
                Some(Event::Message(m))
            }
            other => other,
        }
    }

    async fn until(&mut self, f: impl Fn(&Self) -> bool) {
        while !f(self) {
            self.take().await;
        }
    }

    fn me(&self) -> MemberId {
        self.group.me().clone()
    }
}

async fn members(site: &Site, count: usize) -> Vec<Member> {
    let mut all = Vec::new();
    for i in 1..=count {
        let node = site.start(i);
        let joining = tokio::spawn(Member::join(node, "g"));
        // Those that are in take part in letting it in.
        let mut joining = std::pin::pin!(joining);
        loop {
            let others = async {
                for m in &mut all {
                    let m: &mut Member = m;
                    while let Ok(event) = timeout(Duration::from_millis(5), m.take()).await {
                        drop(event);
                    }
                }
            };
            tokio::select! {
                member = &mut joining => {
                    all.push(member.unwrap());
                    break;
                }
                () = others => tokio::task::yield_now().await,
            }
        }
    }
    for m in &mut all {
        m.until(|m| m.view.members.len() == count).await;
    }
    all
}

fn word(sender: usize, n: u32) -> Bytes {
    let mut bytes = u32::try_from(sender).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(&n.to_be_bytes());
    Bytes::from(bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abcasts_come_in_one_order_and_fbcasts_in_their_senders() {
    const EACH: u32 = 200;
    let site = Site::new(3);
    let mut all = members(&site, 3).await;
    let senders: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(i, m)| {
            let group = m.group.clone();
            tokio::spawn(async move {
                for n in 0..EACH {
                    match n % 4 {
                        0 => group.fbcast(word(i, n)).await.unwrap(),
                        1 => group.cbcast(ThreadId(3), word(i, n)).await.unwrap(),
                        _ => group.abcast(word(i, n)).await.unwrap(),
                    }
                }
                group.fbcast_sync(word(i, EACH)).await.unwrap();
            })
        })
        .collect();
    let mut orders = Vec::new();
    for m in &mut all {
        let (mut total, mut last) = (Vec::new(), BTreeMap::new());
        while m.log.len() < 3 * (EACH as usize + 1) {
            let Some(Event::Message(received)) = m.take().await else {
                continue;
            };
            let n = u32::from_be_bytes(received.body()[4..].try_into().unwrap());
            match received.order() {
                Some(Order::Total(_)) => total.push(received.body().clone()),
                Some(Order::Fifo) => {
                    let before = last.insert(received.from().clone(), n);
                    assert!(before.is_none_or(|b| b < n), "{before:?} before {n}");
                }
                _ => {}
            }
        }
        orders.push(total);
    }
    assert_eq!(orders[0].len(), 3 * EACH as usize / 2);
    assert!(orders.iter().all(|o| *o == orders[0]));
    for s in senders {
        soon("senders", s).await.unwrap();
    }
    for m in all {
        soon("stop", m.node.stop()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_member_departs_and_comes_back_with_the_state() {
    let site = Site::new(3);
    let mut all = members(&site, 3).await;
    for n in 0..20 {
        all[0].group.fbcast(word(0, n)).await.unwrap();
    }
    for m in &mut all {
        m.until(|m| m.log.len() == 20).await;
    }
    let victim = all.pop().unwrap();
    let gone = victim.me();
    // It dies while a call waits for it: its program has not answered.
    let mut replies = all[0]
        .group
        .call(Order::Fifo, "who?", Want::All, None)
        .await
        .unwrap();
    let monitor = all[0].group.clone();
    let monitor = tokio::spawn(async move { monitor.monitor(&gone).await });
    let gone = victim.me();
    let Member { node, events, .. } = victim;
    // A killed program declines nothing: what it was given and has not taken is never dropped.
    std::mem::forget(events);
    drop(node);
    for m in &mut all {
        while m.view.members.len() > 2 {
            if let Some(Event::Message(received)) = m.take().await {
                received.reply("me");
            }
        }
        assert_eq!(m.view.departed, std::slice::from_ref(&gone));
    }
    let answers = soon("replies", replies.all()).await;
    assert_eq!(answers.len(), 2);
    assert_eq!(replies.failed(), std::slice::from_ref(&gone));
    assert!(soon("the monitor", monitor).await.unwrap().is_some());

    let node = site.start(3);
    let joining = tokio::spawn(Member::join(node, "g"));
    for m in &mut all {
        m.until(|m| m.view.members.len() == 3).await;
    }
    let mut back = soon("it is back", joining).await.unwrap();
    all[1].group.gbcast(word(1, 99)).await.unwrap();
    back.until(|m| m.log.last() == Some(&word(1, 99))).await;
    for m in &mut all {
        m.until(|m| m.log.last() == Some(&word(1, 99))).await;
        assert_eq!(m.log.len(), 22, "twenty, the call and the last");
    }
    assert_eq!(back.log[..20], all[0].log[..20]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_nothing_is_made_to_leave_and_holds_up_nobody() {
    let site = Site::new(3);
    let mut nodes = Vec::new();
    for i in 1..=3 {
        let mut config = site.config(i);
        config.queue_bytes_max = 200_000;
        config.slow_after = Some(Duration::from_millis(500));
        nodes.push(Node::start(config, site.registry.clone()).unwrap());
    }
    let mut all = Vec::new();
    for node in nodes {
        all.push(Member::join(node, "g").await);
        let most = all.len();
        for m in &mut all {
            m.until(|m| m.view.members.len() == most).await;
        }
    }
    // The third never reads again.
    let slow = all[2].me();
    let group = all[0].group.clone();
    let sender = tokio::spawn(async move {
        for n in 0..3000 {
            let mut body = word(0, n).to_vec();
            body.resize(1000, 1);
            group.fbcast(body).await.unwrap();
        }
    });
    let (first, rest) = all.split_at_mut(1);
    let whole = |m: &Member| m.log.len() == 3000 && m.view.members.len() == 2;
    tokio::join!(first[0].until(whole), rest[0].until(whole));
    assert!(!first[0].view.members.contains(&slow));
    soon("the sender", sender).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_reads_nothing_holds_up_no_view_and_hears_replies() {
    let site = Site::new(3);
    let mut all = Vec::new();
    for i in 1..=3 {
        let mut config = site.config(i);
        config.queue_bytes_max = 50_000;
        config.slow_after = None;
        let node = Node::start(config, site.registry.clone()).unwrap();
        all.push(Member::join(node, "g").await);
        let most = all.len();
        for m in &mut all {
            m.until(|m| m.view.members.len() == most).await;
        }
    }
    let mut deaf = all.pop().unwrap();
    let dying = all.pop().unwrap();
    let mut first = all.pop().unwrap();
    // More than the deaf one's queue holds, and more than fits the window: it lacks the end of what was sent.
    let group = first.group.clone();
    let sender = tokio::spawn(async move {
        for n in 0..400 {
            let mut body = word(0, n).to_vec();
            body.resize(1000, 1);
            group.fbcast(body).await.unwrap();
        }
    });
    first.until(|m| m.log.len() == 400).await;
    soon("the sender", sender).await.unwrap();
    // Its program asks, and is answered although it takes no events.
    let mut replies = deaf
        .group
        .call(Order::Fifo, "anybody?", Want::One, None)
        .await
        .unwrap();
    let answers = async {
        loop {
            if let Some(Event::Message(m)) = first.take().await
                && m.is_call()
            {
                return m.reply("yes");
            }
        }
    };
    answers.await;
    let (who, _) = soon("a reply", replies.next()).await.unwrap();
    assert_eq!(who, first.me());
    // A member dies: those that are left agree on what it was, with the deaf one.
    drop(dying);
    first.until(|m| m.view.members.len() == 2).await;
    assert!(first.view.members.contains(&deaf.me()));
    // Nothing is lost when it reads again.
    deaf.until(|m| m.view.members.len() == 2).await;
    // (fbcasts of two senders come in any order: the deaf one's own call apart, the order is one sender's.)
    let of_first = |m: &Member| {
        let words = m.log.iter().filter(|b| b.len() == 1000);
        words.map(|b| b.slice(..8)).collect::<Vec<_>>()
    };
    assert!(of_first(&deaf) == of_first(&first) && deaf.log.len() == first.log.len());
    assert_eq!(of_first(&first).len(), 400);
}

/// One that is never idle hears the others all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_program_that_never_pauses_is_not_deaf() {
    let site = Site::new(2);
    let busy = site.start(1);
    // In groups of its own, where nothing has to be waited for.
    let mut senders = Vec::new();
    for i in 0..3 {
        let (group, mut events) = Group::join(&busy, &format!("own {i}")).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let send = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                group.fbcast(word(0, 0)).await.unwrap();
            }
        });
        let take = tokio::spawn(async move { while events.next().await.is_some() {} });
        senders.push((stop, send, take));
    }
    // Which the busy one, as the leader of the nodes, has to let in.
    let mut late = Member::join(site.start(2), "late").await;
    late.until(|m| m.view.members.len() == 1).await;
    for (stop, send, take) in senders {
        stop.store(true, Ordering::Relaxed);
        soon("the sender", send).await.unwrap();
        take.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_donor_that_gives_nothing_is_passed_over() {
    let site = Site::new(3);
    let mut all = members(&site, 2).await;
    all[1].group.fbcast(word(1, 1)).await.unwrap();
    for m in &mut all {
        m.until(|m| m.log.len() == 1).await;
    }
    let joining = tokio::spawn(Member::join(site.start(3), "g"));
    // The first donor drops the wish; the second gives.
    let [first, second] = all.get_mut(..).unwrap() else {
        panic!("two")
    };
    loop {
        let event = soon("the wish", first.events.next()).await;
        if let Some(Event::StateWanted(wanted)) = event {
            break drop(wanted);
        }
    }
    second.until(|m| m.view.members.len() == 3).await;
    let mut third = soon("join", joining).await.unwrap();
    third.until(|m| m.view.members.len() == 3).await;
    assert_eq!(third.log, [word(1, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_expelling_and_many_groups_of_one_node() {
    const GROUPS: usize = 200;
    let site = Site::new(2);
    let (one, two) = (site.start(1), site.start(2));
    let mut first = Vec::new();
    for i in 0..GROUPS {
        let joined = soon("join", Group::join(&one, &format!("g{i}"))).await;
        first.push(joined.unwrap());
    }
    let already = Group::join(&one, "g0").await.err();
    assert_eq!(already, Some(JoinError::Already));
    let mut second = Vec::new();
    for (i, (_, events)) in first.iter_mut().enumerate() {
        let name = format!("g{i}");
        let joining = Group::join(&two, &name);
        let giving = async {
            loop {
                match soon("events", events.next()).await {
                    Some(Event::StateWanted(wanted)) => wanted.give(vec![name.clone().into()]),
                    Some(Event::View(v)) if v.members.len() == 2 => break,
                    _ => {}
                }
            }
        };
        let (joined, ()) = soon("join", async { tokio::join!(joining, giving) }).await;
        let (group, mut events) = joined.unwrap();
        match soon("state", events.next()).await {
            Some(Event::State(state)) => assert_eq!(state, name),
            other => panic!("{other:?}"),
        }
        second.push((group, events));
    }
    for (i, (group, events)) in second.iter_mut().enumerate() {
        let by_wish = i % 2 == 0;
        if by_wish {
            group.leave().await.unwrap();
        } else {
            let other = group.me().clone();
            first[i].0.expel(&other).await.unwrap();
        }
        loop {
            match soon("the end", events.next()).await {
                Some(Event::Left { wished }) => {
                    assert_eq!(wished, by_wish);
                    break;
                }
                Some(_) => {}
                None => panic!("no last event"),
            }
        }
        assert!(group.fbcast("late").await.is_err());
    }
    soon("stop", one.stop()).await;
    soon("stop", two.stop()).await;
}

/// The group keeps its number while a member is in it, so an old handle names the same group; it must not act on the membership
/// that came after its own.
#[tokio::test]
async fn an_old_handle_does_nothing_to_a_later_membership() {
    let site = Site::new(2);
    let mut all = members(&site, 2).await;
    let (mut second, mut first) = (all.pop().unwrap(), all.pop().unwrap());
    let old = second.group.clone();
    old.leave().await.unwrap();
    let left = async { while !matches!(second.take().await, Some(Event::Left { .. })) {} };
    tokio::select! {
        () = left => {}
        () = first.until(|_| false) => {}
    }
    let mut again = tokio::select! {
        again = Member::join(second.node, "g") => again,
        () = first.until(|_| false) => unreachable!("without end"),
    };
    assert_eq!(again.group.id(), old.id());
    let other = first.me();
    let sent = tokio::join!(
        soon("fbcast", old.fbcast_sync("from before")),
        soon("send", old.send_to(&other, "from before")),
    );
    assert_eq!(
        sent,
        (Err(SendError::NotAMember), Err(SendError::NotAMember))
    );
    let call = old.call(Order::Fifo, "from before", Want::All, None);
    assert_eq!(soon("call", call).await.err(), Some(SendError::NotAMember));
    let expelled = soon("expel", old.expel(&other)).await;
    assert_eq!(expelled, Err(SendError::NotAMember));
    assert_eq!(soon("leave", old.leave()).await, Err(SendError::NotAMember));
    again.group.abcast("now").await.unwrap();
    // Together: the first still owes the other its state.
    let now = |m: &Member| m.log.last() == Some(&"now".into());
    tokio::join!(again.until(now), first.until(now));
    assert_eq!(
        (&again.log, &first.log),
        (&vec!["now".into()], &vec!["now".into()])
    );
}

/// Nobody waits for the first any more: it is forgotten, or joins and leaves, and the next is not refused for it.
#[tokio::test]
async fn a_join_that_was_given_up_stands_in_nobodys_way() {
    let site = Site::new(1);
    let node = site.start(1);
    let mut given_up = 0;
    for round in 0.. {
        let name = format!("g{round}");
        // The first takes as long as the node needs to found its site.
        if let Ok(joined) = timeout(Duration::ZERO, Group::join(&node, &name)).await {
            drop(joined.unwrap());
            continue;
        }
        if round % 2 == 1 {
            // By now it has joined.
            let another = format!("h{round}");
            soon("another", Group::join(&node, &another)).await.unwrap();
        }
        let (_, mut events) = soon("join", Group::join(&node, &name)).await.unwrap();
        let first = soon("the state", events.next()).await;
        assert!(matches!(first, Some(Event::Init)));
        given_up += 1;
        if given_up == 10 {
            break;
        }
    }
    let already = Group::join(&node, "g0").await.err();
    assert_eq!(already, Some(JoinError::Already));
}
