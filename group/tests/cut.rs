//! Consistent cuts on real nodes: money that members send to each other is neither lost nor made, whenever it is counted.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::watch;
use tokio::time::timeout;
use unbroken_group::MemberId;
use unbroken_group::node::{Event, Group, Node};
use unbroken_group::tools::{Cut, CutEvent, CutEvents, Cuts};

const BEGIN: u64 = 1000;

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// A bank: gives a part of what it has to each other one in turn, and on from whatever comes.
struct Bank {
    group: Group,
    balance: u64,
    others: Vec<MemberId>,
    turn: usize,
    members: watch::Sender<usize>,
    transfers: Arc<AtomicU64>,
    /// Whether it answers cuts.
    records: Arc<AtomicBool>,
}

impl Bank {
    async fn pay(&mut self) {
        self.turn += 1;
        let amount = self.balance.min(1 + self.turn as u64 % 7);
        if let Some(to) = self.others.get(self.turn % self.others.len().max(1))
            && amount > 0
            && self
                .group
                .send_to(to, amount.to_le_bytes().to_vec())
                .await
                .is_ok()
        {
            self.balance -= amount;
            self.transfers.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn run(mut self, mut events: CutEvents) {
        while let Some(event) = events.next().await {
            match event {
                CutEvent::Record(record) => {
                    if self.records.load(Ordering::Relaxed) {
                        record.give(self.balance.to_le_bytes().to_vec());
                    }
                }
                CutEvent::Event(Event::Message(m)) => {
                    self.balance += number(m.body());
                    self.pay().await;
                }
                CutEvent::Event(Event::View(view)) => {
                    let me = self.group.me().clone();
                    self.others = view.members.into_iter().filter(|m| *m != me).collect();
                    let all = self.others.len() + 1;
                    // What sets it going.
                    if all == 3 {
                        for _ in 0..30 {
                            self.pay().await;
                        }
                    }
                    self.members.send_replace(all);
                }
                CutEvent::Event(Event::StateWanted(wanted)) => wanted.give(Vec::new()),
                CutEvent::Event(Event::Init | Event::State(_) | Event::Left { .. }) => {}
            }
        }
    }
}

/// What is in the members, and what is on its way.
fn count(cut: &Cut) -> (u64, u64) {
    let parts = cut.parts.values();
    let on_its_way = parts.clone().flat_map(|p| p.channels.values().flatten());
    (
        parts.map(|p| number(&p.state)).sum(),
        on_its_way.map(|b: &Bytes| number(b)).sum(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_money_is_lost_or_made() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = Vec::new();
    let mut banks = Vec::new();
    let transfers = Arc::new(AtomicU64::new(0));
    for i in 1..=3 {
        let node = site.start(i);
        let (group, events) = soon("join", Group::join(&node, "banks")).await.unwrap();
        let (cuts, events) = Cuts::over(group.clone(), events);
        let (sender, members) = watch::channel(0);
        let records = Arc::new(AtomicBool::new(true));
        let bank = Bank {
            group,
            balance: BEGIN,
            others: Vec::new(),
            turn: i,
            members: sender,
            transfers: Arc::clone(&transfers),
            records: Arc::clone(&records),
        };
        tokio::spawn(bank.run(events));
        nodes.push(node);
        banks.push((cuts, members, records));
    }
    for (_, members, _) in &mut banks {
        soon("three", members.wait_for(|m| *m == 3)).await.unwrap();
    }
    let mut moved = 0;
    for round in 0..40 {
        // Two at once, now and then.
        let (a, b) = (&banks[round % 3].0, &banks[(round + 1) % 3].0);
        let (a, b) = if round % 5 == 0 {
            let both = async { tokio::join!(a.take(None), b.take(None)) };
            let (a, b) = soon("cuts", both).await;
            (a.unwrap(), b.ok())
        } else {
            (soon("a cut", a.take(None)).await.unwrap(), None)
        };
        for cut in [Some(a), b].into_iter().flatten() {
            assert_eq!((cut.parts.len(), &cut.failed[..]), (3, &[][..]));
            let (held, on_its_way) = count(&cut);
            assert_eq!(held + on_its_way, 3 * BEGIN, "cut {round}: {cut:?}");
            moved += on_its_way;
        }
    }
    assert!(moved > 0, "some of it was on its way");
    assert!(transfers.load(Ordering::Relaxed) > 100);

    // One gives no state: its part is missing, and nobody waits for it.
    banks[1].2.store(false, Ordering::Relaxed);
    let cut = soon("a cut", banks[0].0.take(None)).await.unwrap();
    assert_eq!((cut.parts.len(), &cut.failed[..]), (2, &[][..]));
    banks[1].2.store(true, Ordering::Relaxed);

    // One dies while cuts are taken: they end, and say so if its part is missing.
    let (cuts, mut members, _) = banks.remove(0);
    let dead = {
        let part = soon("a cut", cuts.take(None)).await.unwrap();
        let mut parts = part.parts.keys();
        parts.find(|m| *m.name == *"r3").unwrap().clone()
    };
    let taking = tokio::spawn(async move {
        loop {
            let cut = cuts.take(None).await.unwrap();
            let whole = cut.parts.contains_key(&dead);
            if *members.borrow_and_update() == 2 && !whole {
                return cut;
            }
            assert!(!(whole && cut.failed.contains(&dead)));
        }
    });
    drop(nodes.pop());
    let cut = soon("cuts go on", taking).await.unwrap();
    assert_eq!(cut.parts.len(), 2);
    let (held, on_its_way) = count(&cut);
    assert!(held + on_its_way <= 3 * BEGIN);
}
