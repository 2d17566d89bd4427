//! Links between two servers, with the right key and with the wrong one.

use std::net::Ipv4Addr;

use tokio::sync::watch;

use super::super::engine::Inputs;
use super::*;
use crate::driver::engine::inputs;
use crate::session::SessionId;

struct End {
    peers: Peers,
    inputs: Inputs,
    listener: Option<TcpListener>,
    dir: std::path::PathBuf,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Servers a (1) and b (2), each with its own key.
async fn pair(key_a: u8, key_b: u8) -> (End, End) {
    let mut listeners = Vec::new();
    let mut addresses = BTreeMap::new();
    for id in 1..=2 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        addresses.insert(id, listener.local_addr().unwrap());
        listeners.push(listener);
    }
    let ids = BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 2)]);
    let mut ends =
        [("a", key_a), ("b", key_b)]
            .into_iter()
            .zip(listeners)
            .map(|((name, key), listener)| {
                let port = addresses[&ids[name]].port();
                let dir = std::env::temp_dir()
                    .join(format!("unbroken-peers-{}-{port}", std::process::id()));
                std::fs::create_dir_all(&dir).unwrap();
                let known = KnownPeers::open(&dir).unwrap();
                let (engine, inputs) = inputs().unwrap();
                let peers = Peers::new(
                    name,
                    ids.clone(),
                    addresses.clone(),
                    &[key; 32],
                    known,
                    engine,
                );
                End {
                    peers,
                    inputs,
                    listener: Some(listener),
                    dir,
                }
            });
    (ends.next().unwrap(), ends.next().unwrap())
}

fn touch(count: i64) -> PeerMessage {
    PeerMessage::Touch((0..count).map(|id| (SessionId(id), 0)).collect())
}

/// Waits for the next input in a thread, so that the tasks go on.
async fn next(inputs: Inputs) -> (Input, Inputs) {
    tokio::task::spawn_blocking(move || (inputs.recv().unwrap(), inputs))
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_every_size_arrive_in_order_and_the_end_is_noticed() {
    let (a, mut b) = pair(1, 1).await;
    let (alive_sender, alive) = watch::channel(());
    let accept = b
        .peers
        .clone()
        .accept(b.listener.take().unwrap(), alive.clone());
    let accept = tokio::spawn(while_alive(alive.clone(), accept));
    let (queue, messages) = mpsc::channel(QUEUE_MAX);
    let dial = tokio::spawn(a.peers.clone().dial(2, messages));
    // What comes before there is a connection is dropped: repeat the first until it arrives.
    let mut received = std::mem::replace(&mut b.inputs, inputs().unwrap().1);
    loop {
        queue.send(touch(1)).await.unwrap();
        if let Ok(Some(Input::Peer { from: 1, message })) = received.try_recv() {
            assert_eq!(message, touch(1));
            break;
        }
        tokio::task::yield_now().await;
    }
    // 300,000 sessions are more than one Noise record holds.
    for count in [0, 10, 300_000, 3] {
        queue.send(touch(count)).await.unwrap();
    }
    let mut sizes = Vec::new();
    while sizes.last() != Some(&3) {
        let (input, back) = next(received).await;
        received = back;
        let Input::Peer {
            from: 1,
            message: PeerMessage::Touch(sessions),
        } = input
        else {
            panic!("something else came");
        };
        sizes.push(sessions.len());
    }
    sizes.retain(|size| *size != 1);
    assert_eq!(sizes, [0, 10, 300_000, 3]);
    assert!(b.peers.known.contains("a"));
    // a's process ends: its listener refuses, too.
    let mut a = a;
    a.listener = None;
    drop(queue);
    dial.await.unwrap();
    let (input, _) = next(received).await;
    assert!(matches!(input, Input::PeerDied(1)), "a death beyond doubt");
    drop(alive_sender);
    accept.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_another_key_or_another_name_is_refused() {
    let (a, mut b) = pair(1, 2).await;
    let (_alive_sender, alive) = watch::channel(());
    let listener = b.listener.take().unwrap();
    tokio::spawn(while_alive(
        alive.clone(),
        b.peers.clone().accept(listener, alive),
    ));
    assert!(a.peers.connect(2, false).await.is_err());
    assert!(!b.peers.known.contains("a"));
    // The right key and a name that nobody has.
    let mut stranger = b.peers.clone();
    stranger.name = "mallory".into();
    assert!(stranger.connect(2, false).await.is_err());
    // Who has lost its disk is told that it is known, and nothing else.
    let mut first = b.peers.clone();
    first.name = "a".into();
    assert!(matches!(first.connect(2, true).await, Ok((_, _, false))));
    assert!(matches!(first.connect(2, false).await, Ok((_, _, true))));
    assert!(matches!(first.connect(2, true).await, Ok((_, _, true))));
    assert_eq!(first.may_begin(1).await, Err("b".to_owned()));
    drop(a);
}
