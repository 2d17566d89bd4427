//! Transactions.

use unbroken_coord::client::Client;
use unbroken_coord::recipes::transaction::{Options, Transaction, TransactionError, transact};
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode};

use crate::common::Cluster;
use crate::{Dice, clients, create, harass};

const ACCOUNTS: u64 = 4;

/// Moves money, and counts on the way how often it did. `None` where there was none to move.
async fn transfer(client: &Client, worker: u64, dice: &mut Dice) -> Option<u64> {
    let (from, to) = (dice.below(ACCOUNTS), dice.below(ACCOUNTS));
    let amount = i64::try_from(dice.below(10)).unwrap();
    let options = Options::new().attempts(1000).exactly_once("/bank/markers");
    let moved = transact(client, options, |view| async move {
        let (from, to) = (format!("/bank/{from}"), format!("/bank/{to}"));
        let balance = view.number(&from).await?;
        if balance < amount {
            return Ok::<_, TransactionError>(None);
        }
        view.set(&from, (balance - amount).to_string());
        // Reads its own write where both are the same.
        let other = view.number(&to).await?;
        view.set(&to, (other + amount).to_string());
        let count = format!("/bank/count-{worker}");
        let done = match view.get(&count).await? {
            None => 0,
            Some(_) => view.number(&count).await?,
        };
        view.put(&count, (done + 1).to_string()).await?;
        Ok(Some(u64::try_from(done + 1).unwrap()))
    });
    moved.await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_money_is_lost_and_no_transfer_done_twice() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    create(&clients[0], "/bank", "").await;
    for account in 0..ACCOUNTS {
        create(&clients[0], &format!("/bank/{account}"), "100").await;
    }
    let workers: Vec<_> = clients
        .iter()
        .zip(0..)
        .map(|(client, worker)| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut dice = Dice(worker);
                let mut expected = 0;
                for _ in 0..40 {
                    if let Some(count) = transfer(&client, worker, &mut dice).await {
                        expected += 1;
                        assert_eq!(count, expected, "worker {worker}");
                    }
                }
                expected
            })
        })
        .collect();
    harass(&mut cluster, 2).await;
    for (worker, done) in workers.into_iter().enumerate() {
        let done = done.await.unwrap();
        let path = format!("/bank/count-{worker}");
        let (data, _) = clients[0].sync_and_get(&path).await.unwrap();
        assert_eq!(data, done.to_string(), "transfers of worker {worker}");
    }
    let mut total = 0;
    for account in 0..ACCOUNTS {
        let (data, _) = clients[0].get(&format!("/bank/{account}")).await.unwrap();
        total += String::from_utf8(data.to_vec())
            .unwrap()
            .parse::<u64>()
            .unwrap();
    }
    assert_eq!(total, 100 * ACCOUNTS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_is_refused_whole_and_says_where() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    create(&client, "/t", "").await;
    let mut good = Transaction::new();
    good.check("/t", 0);
    let made = good.create("/t/q-", "x", CreateMode::PersistentSequential, Acl::open());
    let set = good.set("/t", "y", 0);
    let results = good.commit(&client).await.unwrap();
    assert_eq!(results.path(made), "/t/q-0000000000");
    assert_eq!(results.stat(set).version, 1);

    let mut bad = Transaction::new();
    bad.create("/t/new", "", CreateMode::Persistent, Acl::open());
    bad.check("/t", 7).delete("/t/q-0000000000", -1);
    let refused = bad.commit(&client).await;
    let why = TransactionError::Refused {
        operation: "check",
        path: "/t".into(),
        code: ErrorCode::BadVersion,
    };
    assert_eq!(refused.unwrap_err(), why);
    assert_eq!(client.children("/t").await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_found_missing_must_still_be_missing() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    let other = cluster.client("b", 8000).await;
    create(&client, "/seen", "").await;
    let mut runs = 0;
    let found = transact(&client, Options::new(), |view| {
        runs += 1;
        let (first, other) = (runs == 1, other.clone());
        async move {
            let found = view.get("/flag/deep").await?.is_some();
            if first {
                create(&other, "/flag", "").await;
                create(&other, "/flag/deep", "").await;
            }
            view.set("/seen", found.to_string());
            Ok::<_, TransactionError>(found)
        }
    });
    assert!(found.await.unwrap(), "the first run was in vain");
    assert_eq!(runs, 2);
    assert_eq!(client.get("/seen").await.unwrap().0, "true");

    // Somebody is always faster.
    let lost = transact(&client, Options::new().attempts(3), |view| {
        let other = other.clone();
        async move {
            view.require("/seen").await?;
            other.set("/seen", "x", -1).await.unwrap();
            view.set("/seen", "y");
            Ok::<_, TransactionError>(())
        }
    });
    let conflict = TransactionError::Conflict {
        attempts: 3,
        path: "/seen".into(),
    };
    assert_eq!(lost.await, Err(conflict));
}
