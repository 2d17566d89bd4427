//! Links between two servers, with the right key and with the wrong one.

use std::net::Ipv4Addr;

use mio::{Events, Poll, Token};
use tokio::sync::watch;

use super::super::engine::Inputs;
use super::*;
use crate::core::PeerMessage;
use crate::driver::engine::inputs;
use crate::driver::links::{Links, Told};
use crate::session::SessionId;
use crate::tls::ServerTls;

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
        let peers = Peers::new(Arc::new(roster), &[key; 32], None, known, engine);
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

/// A link that was made, for the engine.
async fn made(inputs: Inputs) -> (Made, Inputs) {
    match next(inputs).await {
        (Input::Link(made), inputs) => (*made, inputs),
        _ => panic!("something else came"),
    }
}

/// Passes the sockets' events on until `done`.
fn turn(poll: &mut Poll, links: &mut Links, mut done: impl FnMut(Vec<Told>) -> bool) {
    let mut events = Events::with_capacity(16);
    loop {
        let mut told = Vec::new();
        links.turn(|what| told.push(what));
        links.flush(|what| told.push(what));
        if done(told) {
            return;
        }
        let wait = if links.has_ready() { 0 } else { 10 };
        poll.poll(&mut events, Some(Duration::from_millis(wait)))
            .unwrap();
        for event in &events {
            links.on_event(event.token().0 as u64, event);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_every_size_arrive_in_order_and_the_end_is_noticed() {
    let (mut a, mut b) = pair(1, 1).await;
    let (alive_sender, alive) = watch::channel(());
    let accept = b
        .peers
        .clone()
        .accept(b.listener.take().unwrap(), alive.clone());
    let accept = tokio::spawn(while_alive(alive.clone(), accept));
    let (stop, stopped) = oneshot::channel();
    let dial = tokio::spawn(a.peers.clone().dial(2, stopped));
    let (from_a, _) = made(std::mem::replace(&mut a.inputs, inputs().unwrap().1)).await;
    let (at_b, b_inputs) = made(std::mem::replace(&mut b.inputs, inputs().unwrap().1)).await;
    assert_eq!((from_a.peer, from_a.direction), (2, Direction::Out));
    assert_eq!((at_b.peer, at_b.direction), (1, Direction::In));
    assert!(b.peers.known.contains(1));
    // Both ends in one place.
    let mut poll = Poll::new().unwrap();
    let mut links = Links::new(poll.registry().try_clone().unwrap());
    let token = |number| Token(usize::try_from(number).unwrap());
    links.add(from_a, token);
    links.add(at_b, token);
    // 300,000 sessions are more than one Noise record holds, and more than a socket takes at once.
    let counts = [0, 10, 300_000, 3];
    for count in counts {
        assert!(links.send(2, &touch(count)));
    }
    assert!(links.send(7, &touch(1)), "no link, and nobody is told");
    let mut messages = Vec::new();
    turn(&mut poll, &mut links, |told| {
        messages.extend(told);
        messages.len() == counts.len()
    });
    let expected = counts.map(|count| Told::Message {
        from: 1,
        message: touch(count),
    });
    assert!(messages == expected, "not what was sent");
    // What nobody takes is bounded: events are not looked at now.
    let mut sent = 0;
    while links.send(2, &touch(300_000)) {
        sent += 1;
        assert!(sent < 1000, "without end");
    }
    // a's process ends: its listener refuses, too.
    a.listener = None;
    drop((stop, links));
    dial.await.unwrap();
    let (input, _) = next(b_inputs).await;
    assert!(matches!(input, Input::PeerDied(1)), "a death beyond doubt");
    drop(alive_sender);
    accept.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_seal_what_it_says_is_cut_off_and_its_end_is_told() {
    let (mut a, mut b) = pair(1, 1).await;
    let (_alive_sender, alive) = watch::channel(());
    let accept = b
        .peers
        .clone()
        .accept(b.listener.take().unwrap(), alive.clone());
    tokio::spawn(while_alive(alive, accept));
    let (_stop, stopped) = oneshot::channel();
    tokio::spawn(a.peers.clone().dial(2, stopped));
    let (mut from_a, _) = made(std::mem::replace(&mut a.inputs, inputs().unwrap().1)).await;
    let (at_b, _) = made(std::mem::replace(&mut b.inputs, inputs().unwrap().1)).await;
    from_a
        .stream
        .write(b"\0\x20nothing that was ever sealed by a")
        .unwrap();
    let mut poll = Poll::new().unwrap();
    let mut links = Links::new(poll.registry().try_clone().unwrap());
    let token = |number| Token(usize::try_from(number).unwrap());
    links.add(from_a, token);
    links.add(at_b, token);
    // b drops the link, and so a learns that what it says is lost.
    turn(&mut poll, &mut links, |told| {
        told.contains(&Told::Unreachable(2))
    });
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

/// Both sides' certificates have to name the server, and to be signed by the authority.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_tls_who_has_the_key_needs_a_certificate_of_its_own_name_too() {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let (mut a, mut b) = pair(1, 1).await;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = a.dir.join("ca.pem");
    std::fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    let tls = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        let (cert_file, key_file) = (a.dir.join("cert.pem"), a.dir.join("key.pem"));
        std::fs::write(&cert_file, cert.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        let mut files = ServerTls::new(cert_file, key_file);
        files.ca = Some(ca.clone());
        Some(files.load_for_peers().unwrap())
    };
    let (as_a, as_b, as_c) = (tls("a"), tls("b"), tls("c"));
    let (_alive_sender, alive) = watch::channel(());
    b.peers.tls = as_b;
    let listener = b.listener.take().unwrap();
    let accept = b.peers.clone().accept(listener, alive.clone());
    tokio::spawn(while_alive(alive, accept));
    assert!(a.peers.connect(2, 0).await.is_err(), "no TLS");
    a.peers.tls = as_c;
    assert!(
        a.peers.connect(2, 0).await.is_err(),
        "another's certificate"
    );
    assert!(!b.peers.known.contains(1));
    a.peers.tls = as_a;
    assert!(a.peers.connect(2, 0).await.is_ok());
    assert!(b.peers.known.contains(1));
    // Who answers at b's address is not c.
    let mut seeds = a.peers.roster.seeds();
    let address = seeds.remove("b").unwrap();
    let asked = a.peers.ask("c", &address).await;
    assert!(matches!(asked, Err(LinkError::Io(_))), "{asked:?}");
    assert!(a.peers.ask("b", &address).await.is_ok());
}
