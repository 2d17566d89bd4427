//! Durable machines on real nodes and disks: all die, in one order, and come back in another; what was acknowledged is there
//! when the last to die is back, and nobody goes on before.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::time::timeout;
use unbroken_group::MemberId;
use unbroken_group::node::Node;
use unbroken_group::process::GroupView;
use unbroken_group::tools::{DiskError, Durable, DurableError, Machine};

/// All updates, in order, with commas; and who was seen to depart, which is no part of the state.
#[derive(Default)]
struct Book(Vec<u8>, BTreeSet<String>);

impl Machine for Book {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        if !self.0.is_empty() {
            self.0.push(b',');
        }
        self.0.extend_from_slice(update);
        Bytes::new()
    }

    fn view(&mut self, view: &GroupView) {
        let departed = view.departed.iter().map(|m| m.name.to_string());
        self.1.extend(departed);
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![self.0.clone().into()]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        Some(Self(bytes.to_vec(), BTreeSet::new()))
    }
}

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

struct World {
    site: Site,
    dir: PathBuf,
    founders: BTreeSet<String>,
}

struct Up {
    node: Node,
    book: Durable<Book>,
    work: tokio::task::JoinHandle<Result<(), DurableError>>,
}

impl World {
    fn new(test: &str, count: usize) -> Self {
        let name = format!("unbroken-durable-{test}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&dir);
        Self {
            site: Site::new(count),
            dir,
            founders: (1..=count).map(|i| format!("r{i}")).collect(),
        }
    }

    async fn start(&self, i: usize) -> Up {
        let node = self.site.start(i);
        let dir = self.dir.join(i.to_string());
        let open = async {
            loop {
                // The thread of the one that died may still have the disk.
                match Durable::open(&node, "book", &dir, &self.founders).await {
                    Err(DurableError::Disk(DiskError::Io { source, .. }))
                        if source.kind() == std::io::ErrorKind::WouldBlock =>
                    {
                        tokio::task::yield_now().await;
                    }
                    opened => return opened,
                }
            }
        };
        let (book, work) = soon("open", open).await.unwrap();
        let work = tokio::spawn(work);
        Up { node, book, work }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Up {
    /// Its process dies.
    async fn die(self) {
        drop(self.node);
        drop(self.book);
        let ended = soon("its work ends", self.work).await.unwrap();
        assert!(matches!(ended, Err(DurableError::Out(_))), "{ended:?}");
    }

    async fn add(&self, what: &'static str) {
        soon("update", self.book.update(what.as_bytes()))
            .await
            .unwrap();
    }

    async fn has(&self, all: &str) {
        let is = |b: &Book| b.0 == all.as_bytes();
        soon(all, self.book.until(is)).await.unwrap();
    }

    async fn awaits(&self, names: &[&str]) {
        let names: BTreeSet<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let seen = async {
            while self.book.awaits() != names {
                tokio::task::yield_now().await;
            }
        };
        soon("who is awaited", seen).await;
        assert!(self.book.read(|_| ()).is_none(), "it waits");
    }

    /// Waits until it goes on without a member that has died.
    async fn goes_on_without(&self, name: &str) {
        let gone = self.book.until(|b| b.1.contains(name));
        soon("the dead one is out", gone).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_to_fail_is_waited_for_and_nothing_acknowledged_is_lost() {
    let world = World::new("last", 3);
    let first = world.start(1).await;
    first.awaits(&["r2", "r3"]).await;
    let second = world.start(2).await;
    let third = world.start(3).await;
    first.add("a").await;
    third.add("b").await;
    for up in [&first, &second, &third] {
        up.has("a,b").await;
    }
    first.die().await;
    second.add("c").await;
    second.die().await;
    third.add("d").await;
    third.die().await;

    let first = world.start(1).await;
    first.awaits(&["r2", "r3"]).await;
    let second = world.start(2).await;
    second.awaits(&["r3"]).await;
    first.awaits(&["r3"]).await;
    let third = world.start(3).await;
    for up in [&first, &second, &third] {
        up.has("a,b,c,d").await;
    }
    first.add("e").await;
    // One after the other, and the first comes back in between.
    third.die().await;
    // Two deaths in one view are more than a majority of three survives.
    first.goes_on_without("r3").await;
    second.goes_on_without("r3").await;
    second.die().await;
    let third = world.start(3).await;
    third.has("a,b,c,d,e").await;
    first.die().await;
    third.add("f").await;
    third.die().await;
    let second = world.start(2).await;
    second.awaits(&["r1"]).await;
    let third = world.start(3).await;
    third.has("a,b,c,d,e,f").await;
    second.has("a,b,c,d,e,f").await;
    second.die().await;
    third.die().await;

    // The operator says that those who may have been last do not come back.
    let first = world.start(1).await;
    let second = world.start(2).await;
    second.awaits(&["r3"]).await;
    let without = BTreeSet::from(["r3".to_owned()]);
    soon("the word", second.book.go_without(without))
        .await
        .unwrap();
    first.has("a,b,c,d,e,f").await;
    first.add("g").await;
    second.has("a,b,c,d,e,f,g").await;
    // It comes back all the same, and gets what the others have.
    let third = world.start(3).await;
    third.has("a,b,c,d,e,f,g").await;
    for up in [first, second, third] {
        up.die().await;
    }
}

/// Updates until its process dies; gives those that were acknowledged.
async fn writes(book: Durable<Book>, name: String, counted: Arc<AtomicU64>) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for n in 0.. {
        let update = format!("{name}.{n}");
        if book.update(update.as_bytes()).await.is_err() {
            break;
        }
        counted.fetch_add(1, Ordering::Relaxed);
        acknowledged.push(update);
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_order_of_deaths_and_returns_what_was_acknowledged_is_there() {
    let world = World::new("orders", 3);
    let orders = [[1, 2, 3], [3, 2, 1], [2, 3, 1], [1, 3, 2], [3, 1, 2]];
    let mut acknowledged: Vec<String> = Vec::new();
    for (round, returns) in orders.iter().enumerate() {
        let mut ups = Vec::new();
        for i in returns {
            ups.push((*i, world.start(*i).await));
        }
        let counted = Arc::new(AtomicU64::new(0));
        let mut writers = Vec::new();
        for (i, up) in &ups {
            soon("all are back", up.book.until(|_| true)).await.unwrap();
            let all = up.book.read(|b| String::from_utf8(b.0.clone()).unwrap());
            let all = all.unwrap();
            let all: BTreeSet<&str> = all.split(',').collect();
            let lost: Vec<&String> = acknowledged
                .iter()
                .filter(|a| !all.contains(a.as_str()))
                .collect();
            assert!(lost.is_empty(), "round {round}, r{i}: {lost:?}");
            let name = format!("{round}.{i}");
            writers.push(tokio::spawn(writes(
                up.book.clone(),
                name,
                Arc::clone(&counted),
            )));
        }
        // They die in another order, in the midst of their updates.
        let deaths = orders[(round + 2) % orders.len()];
        for i in deaths {
            let until = counted.load(Ordering::Relaxed) + 5;
            let more = async {
                while counted.load(Ordering::Relaxed) < until {
                    tokio::task::yield_now().await;
                }
            };
            soon("updates", more).await;
            let at = ups.iter().position(|(n, _)| *n == i).unwrap();
            ups.remove(at).1.die().await;
        }
        for writer in writers {
            acknowledged.extend(soon("it ends", writer).await.unwrap());
        }
    }
    assert!(acknowledged.len() >= 75);
}
