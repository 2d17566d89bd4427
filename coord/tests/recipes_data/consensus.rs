//! Consensus.

use std::collections::BTreeSet;

use unbroken_coord::recipes::consensus::{Consensus, Sequence};

use crate::common::Cluster;
use crate::{clients, create, harass};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_learn_the_same_decisions() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    create(&clients[0], "/c", "").await;
    let mut tasks = Vec::new();
    for (client, who) in clients.iter().zip(0..) {
        let client = client.clone();
        tasks.push(tokio::spawn(async move {
            let mut decisions = Vec::new();
            for instance in 0..30 {
                let instance = Consensus::new(&client, &format!("/c/{instance}"));
                // One only learns.
                decisions.push(if who == 0 {
                    instance.decide().await.unwrap()
                } else {
                    instance.propose(format!("by {who}")).await.unwrap()
                });
            }
            decisions
        }));
    }
    harass(&mut cluster, 2).await;
    let mut decisions = Vec::new();
    for task in tasks {
        decisions.push(task.await.unwrap());
    }
    assert!(decisions.iter().all(|other| *other == decisions[0]));
    let again = Consensus::new(&clients[0], "/c/7");
    assert_eq!(
        again.decided().await.unwrap().as_ref(),
        Some(&decisions[0][7])
    );
    assert_eq!(again.propose("late").await.unwrap(), decisions[0][7]);
    let open = Consensus::new(&clients[0], "/c/none");
    assert_eq!(open.decided().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_holds_each_appended_value_once_in_one_order() {
    const EACH: u64 = 25;
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    let mut writers = Vec::new();
    let mut readers = Vec::new();
    for (client, who) in clients.iter().zip(0..) {
        let sequence = Sequence::open(client, "/app/log").await.unwrap();
        let mut cursor = sequence.cursor(0);
        readers.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            for expected in 0..3 * EACH {
                let (index, value) = cursor.next().await.unwrap();
                assert_eq!(index, expected);
                seen.push(value);
            }
            seen
        }));
        writers.push(tokio::spawn(async move {
            let mut last = None;
            for i in 0..EACH {
                let index = sequence.append(format!("{who}.{i}")).await.unwrap();
                assert!(last < Some(index), "{last:?} then {index}");
                last = Some(index);
            }
        }));
    }
    harass(&mut cluster, 2).await;
    for writer in writers {
        writer.await.unwrap();
    }
    let mut seen = Vec::new();
    for reader in readers {
        seen.push(reader.await.unwrap());
    }
    assert!(seen.iter().all(|other| *other == seen[0]));
    let distinct: BTreeSet<_> = seen[0].iter().collect();
    assert_eq!(distinct.len(), seen[0].len());
}
