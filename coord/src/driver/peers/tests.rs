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

/// Servers a (1) and b (2), each with its own key; both have begun.
async fn pair(key_a: u8, key_b: u8) -> (End, End) {
    let mut ends = Vec::new();
    let mut seeds = BTreeMap::new();
    let mut listeners = Vec::new();
    for name in ["a", "b"] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        seeds.insert(name.to_owned(), listener.local_addr().unwrap().to_string());
        listeners.push(listener);
    }
    let founders = founders();
    for ((id, name), (key, listener)) in founders
        .iter()
        .zip([key_a, key_b].into_iter().zip(listeners))
    {
        let port = listener.local_addr().unwrap().port();
        let dir =
            std::env::temp_dir().join(format!("unbroken-peers-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let known = KnownPeers::open(&dir).unwrap();
        let (engine, inputs) = inputs().unwrap();
        let roster = Roster::new(name, seeds.clone());
        roster.begin(*id, &founders);
        let peers = Peers::new(Arc::new(roster), &[key; 32], known, engine);
        ends.push(End {
            peers,
            inputs,
            listener: Some(listener),
            dir,
        });
    }
    let b = ends.pop().unwrap();
    (ends.pop().unwrap(), b)
}

fn founders() -> BTreeMap<u64, String> {
    (1..).zip(["a", "b"].map(str::to_owned)).collect()
}

/// The same server with another idea of who it is.
fn pretending(end: &End, name: &str, id: Option<u64>) -> Peers {
    let mut seeds = end.peers.roster.seeds();
    seeds.insert("b".into(), end.peers.roster.peer(2).unwrap().1[0].clone());
    let roster = Roster::new(name, seeds);
    if let Some(id) = id {
        roster.begin(id, &founders());
    }
    let mut peers = end.peers.clone();
    peers.roster = Arc::new(roster);
    peers
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
    assert!(b.peers.known.contains(1));
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
    assert!(a.peers.connect(2, 0).await.is_err());
    assert!(!b.peers.known.contains(1));
    // The right key, and a name that this id does not have.
    let stranger = pretending(&b, "mallory", Some(1)).connect(2, 0).await;
    assert!(
        matches!(stranger, Err(LinkError::Unwelcome)),
        "{:?}",
        stranger.err()
    );
    // Who has lost its disk is told that it is known, and nothing else.
    let fresh = pretending(&b, "a", None);
    let beginning = fresh.beginning(false).await;
    assert_eq!(
        beginning,
        Ok(Beginning {
            id: 1,
            founders: founders()
        })
    );
    pretending(&b, "a", Some(1)).connect(2, 0).await.unwrap();
    assert_eq!(fresh.beginning(false).await, Err("b".to_owned()));
    assert!(fresh.connect(2, 0).await.is_err(), "it has not begun");
    drop(a);
}
