//! The recipes that hold data, one after the other, on a coordinator or on Apache ZooKeeper:
//!
//! ```text
//! cargo run -p unbroken-coord --example three
//! cargo run -p unbroken-coord --example recipes_data -- 127.0.0.1:2181
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::recipes::cache::{Cache, Limits, Scope};
use unbroken_coord::recipes::channel::{Channel, Start};
use unbroken_coord::recipes::commit::{Commits, Outcome, Participant, Protocol, Vote, Work};
use unbroken_coord::recipes::config::{Config, ConfigMap, Json};
use unbroken_coord::recipes::consensus::{Consensus, Sequence};
use unbroken_coord::recipes::lease::{Lease, Terms};
use unbroken_coord::recipes::transaction::{Options, TransactionError, transact};
use unbroken_coord::wire::MultiOp;

/// Commits whatever has a short name.
struct Shop(&'static str);

impl Participant for Shop {
    async fn prepare(&mut self, work: &Work) -> Vote {
        let vote = if work.payload.len() < 10 {
            Vote::Yes
        } else {
            Vote::No
        };
        println!("  {}: {vote:?} to {:?}", self.0, work.payload);
        vote
    }

    async fn commit(&mut self, work: &Work) -> Vec<MultiOp> {
        println!("  {}: {:?} is done", self.0, work.payload);
        Vec::new()
    }

    async fn abort(&mut self, work: &Work) -> Vec<MultiOp> {
        println!("  {}: no {:?}", self.0, work.payload);
        Vec::new()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let servers = std::env::args().nth(1).unwrap_or("127.0.0.1:2181".into());
    let options: ConnectOptions = servers.parse()?;
    let client = Client::connect(options).await?;

    let cache = Cache::start(&client, "/demo", Scope::Subtree, Limits::default());
    cache.fresh().await?;

    let visits = transact(
        &client,
        Options::new().exactly_once("/demo/markers"),
        |view| async move {
            let visits = match view.get("/demo/visits").await? {
                None => 0,
                Some(_) => view.number("/demo/visits").await?,
            };
            view.put("/demo/visits", (visits + 1).to_string()).await?;
            Ok::<_, TransactionError>(visits + 1)
        },
    );
    println!("transaction: visit {}", visits.await?);

    let limit = Config::<Json<u32>>::follow(&client, "/demo/limit");
    let version = limit.update(|old| Some(Json(old.map_or(1, |old| old.0 + 1))));
    let version = version.await?;
    println!("configuration: version {version:?}");
    let pair = ConfigMap::<BTreeMap<String, String>>::follow(&client, "/demo/pair");
    let both = [("left", "1"), ("right", "1")].map(|(key, value)| (key.into(), value.into()));
    println!(
        "  several entries: version {}",
        pair.replace(&both.into()).await?
    );

    let primary = Consensus::new(&client, "/demo/primary");
    let decided = primary
        .propose(format!("process {}", std::process::id()))
        .await?;
    println!("consensus: {}", String::from_utf8_lossy(&decided));
    let log = Sequence::open(&client, "/demo/log").await?;
    println!("  decision {} of a sequence", log.append("x").await?);

    let lease = Lease::new(&client, "/demo/lease", Terms::new(Duration::from_secs(2)));
    let held = lease.acquire("example").await?;
    println!(
        "lease: held for {:?} more, token {}",
        held.left(),
        held.token()
    );
    held.release().await?;

    let channel = Channel::open(&client, "/demo/events").await?;
    let mut reader = channel.subscribe_as("example", Start::Latest).await?;
    let mut publisher = channel.publisher().await?;
    publisher.publish_all(["one", "two"]).await?;
    for _ in 0..2 {
        let event = reader.next().await?;
        println!("channel: {} {:?}", event.position, event.data);
    }
    reader.commit().await?;
    println!("  begins at {}", channel.truncate_read().await?);

    let commits = Commits::open(&client, "/demo/commits").await?;
    let tasks = ["stock", "till"].map(|name| {
        let commits = commits.clone();
        tokio::spawn(async move { commits.participate(name, &mut Shop(name)).await })
    });
    for (protocol, what, outcome) in [
        (Protocol::TwoPhase, "tea", Outcome::Committed),
        (Protocol::ThreePhase, "tea", Outcome::Committed),
        (Protocol::ThreePhase, "a castle in Spain", Outcome::Aborted),
    ] {
        let patience = Duration::from_secs(5);
        let running = commits
            .begin(protocol, ["stock", "till"], what, patience)
            .await?;
        println!("{protocol:?}: {what:?}");
        assert_eq!(running.finish().await?, outcome);
    }
    tasks.iter().for_each(tokio::task::JoinHandle::abort);

    client.sync("/demo").await?;
    cache.fresh().await?;
    let visits = cache.get("/demo/visits").fresh().flatten();
    let visits = visits.ok_or("the cache has missed it")?;
    assert_eq!(visits.data, client.get("/demo/visits").await?.0);
    println!("cache: {:?} (znodes, bytes)", cache.usage());
    client.close().await?;
    Ok(())
}
