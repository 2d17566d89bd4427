//! Two drivers on loopback: what is sealed by a member arrives, what is not does not, and a death is seen.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "helpers of tests"
)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant as Clock};

use bytes::Bytes;
use mio::{Events, Poll};
use unbroken_group::driver::{ControlInput, Driver, TOKENS};
use unbroken_group::{ControlEvent, Instant, MemberId};

const GROUP: u32 = 3;

struct Node {
    poll: Poll,
    driver: Driver,
    started: Clock,
}

/// Ports that were free a moment ago.
fn members(names: &[&str]) -> BTreeMap<String, SocketAddr> {
    let free: Vec<_> = names
        .iter()
        .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    names
        .iter()
        .zip(&free)
        .map(|(name, listener)| ((*name).to_owned(), listener.local_addr().unwrap()))
        .collect()
}

impl Node {
    fn open(me: &str, members: &BTreeMap<String, SocketAddr>, key: [u8; 32]) -> Self {
        let poll = Poll::new().unwrap();
        let mut driver = Driver::open(me, members, &key, Instant::from_micros(0)).unwrap();
        driver.register(poll.registry(), 0).unwrap();
        Self {
            poll,
            driver,
            started: Clock::now(),
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(u64::try_from(self.started.elapsed().as_micros()).unwrap())
    }

    /// Runs the driver until it has something for `f` that makes it say yes, for 10 s at most.
    fn until(&mut self, mut f: impl FnMut(Input) -> bool) {
        let mut events = Events::with_capacity(TOKENS);
        while self.started.elapsed() < Duration::from_secs(10) {
            let mut done = false;
            self.driver
                .receiver
                .receive(|group, from, body| {
                    done |= f(Input::Datagram(group, from.clone(), body.to_vec()));
                })
                .unwrap();
            let now = self.now();
            while let Some(input) = self.driver.control.poll_input(now) {
                done |= f(Input::Control(input));
            }
            if done {
                return;
            }
            if !self.driver.receiver.readable() {
                self.poll
                    .poll(&mut events, Some(Duration::from_millis(5)))
                    .unwrap();
                for event in &events {
                    self.driver.handle_ready(event.token());
                }
            }
        }
        panic!("nothing came within 10 s");
    }
}

enum Input {
    Datagram(u32, MemberId, Vec<u8>),
    Control(ControlInput),
}

#[test]
fn datagrams_arrive_whole_and_once_sealed_by_their_sender() {
    let members = members(&["a", "b"]);
    let (mut a, mut b) = (
        Node::open("a", &members, [1; 32]),
        Node::open("b", &members, [1; 32]),
    );
    let me = MemberId::new("a", 77);
    a.driver.set_member(GROUP, me.clone());
    a.driver.set_instance(GROUP, 5);
    b.driver.set_instance(GROUP, 5);
    let to = [MemberId::new("b", 1)];
    // More than one burst, of more than one segment, the last one shorter.
    let mut bodies: Vec<Bytes> = (0..100u8).map(|i| Bytes::from(vec![i; 1360])).collect();
    bodies.push(Bytes::from_static(b"last"));
    a.driver.sender.send(GROUP, &to, &bodies);
    let mut got = Vec::new();
    b.until(|input| {
        if let Input::Datagram(group, from, body) = input {
            assert_eq!((group, &from), (GROUP, &me));
            got.push(body);
        }
        got.len() == bodies.len()
    });
    got.sort();
    let mut sent: Vec<Vec<u8>> = bodies.iter().map(|b| b.to_vec()).collect();
    sent.sort();
    assert_eq!(got, sent);
}

#[test]
fn whoever_has_not_the_key_is_not_heard() {
    let members = members(&["a", "b"]);
    let (mut a, mut b) = (
        Node::open("a", &members, [1; 32]),
        Node::open("b", &members, [2; 32]),
    );
    for node in [&mut a, &mut b] {
        node.driver.set_instance(GROUP, 5);
    }
    a.driver.set_member(GROUP, MemberId::new("a", 77));
    a.driver
        .sender
        .send(GROUP, &[MemberId::new("b", 1)], &[Bytes::from_static(b"x")]);
    while b.driver.receiver.counters().forged == 0 {
        assert!(
            b.started.elapsed() < Duration::from_secs(10),
            "the datagram never came"
        );
        b.driver.handle_ready(mio::Token(0));
        b.driver
            .receiver
            .receive(|_, _, _| panic!("heard without the key"))
            .unwrap();
    }
    // And nothing is believed of who answers its control connection.
    b.driver.set_member(GROUP, MemberId::new("b", 9));
    let mut events = Events::with_capacity(TOKENS);
    let deadline = Clock::now() + Duration::from_millis(300);
    while Clock::now() < deadline {
        for node in [&mut a, &mut b] {
            let now = node.now();
            while let Some(input) = node.driver.control.poll_input(now) {
                assert!(
                    !matches!(input.event, ControlEvent::Connected { .. }),
                    "{input:?}"
                );
            }
            node.poll
                .poll(&mut events, Some(Duration::from_millis(1)))
                .unwrap();
            for event in &events {
                node.driver.handle_ready(event.token());
            }
        }
    }
}

#[test]
fn a_death_ends_the_connection_and_the_listener_refuses() {
    let members = members(&["a", "b"]);
    let mut a = Node::open("a", &members, [1; 32]);
    a.driver.set_member(GROUP, MemberId::new("a", 1));
    let (ready, wait) = std::sync::mpsc::channel();
    let addresses = members.clone();
    let (kill, killed) = std::sync::mpsc::channel::<()>();
    let b = std::thread::spawn(move || {
        let mut b = Node::open("b", &addresses, [1; 32]);
        b.driver.set_member(GROUP, MemberId::new("b", 42));
        ready.send(()).unwrap();
        let mut events = Events::with_capacity(TOKENS);
        while killed.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            let now = b.now();
            while b.driver.control.poll_input(now).is_some() {}
            b.poll
                .poll(&mut events, Some(Duration::from_millis(5)))
                .unwrap();
            for event in &events {
                b.driver.handle_ready(event.token());
            }
        }
    });
    wait.recv().unwrap();
    let control = |input: Input| match input {
        Input::Control(input) => Some(input.event),
        Input::Datagram(..) => None,
    };
    a.until(|i| {
        matches!(
            control(i),
            Some(ControlEvent::Connected {
                incarnation: 42,
                ..
            })
        )
    });
    kill.send(()).unwrap();
    b.join().unwrap();
    let mut ended = false;
    a.until(|i| match control(i) {
        Some(ControlEvent::Ended { .. }) => {
            ended = true;
            false
        }
        Some(ControlEvent::Refused { .. }) => ended,
        _ => false,
    });
}

#[test]
fn who_is_there_is_asked_again_and_told_to_a_new_life() {
    let members = members(&["a", "b"]);
    let mut a = Node::open("a", &members, [1; 32]);
    let mut b = Node::open("b", &members, [1; 32]);
    a.driver.set_member(GROUP, MemberId::new("a", 1));
    b.driver.set_member(GROUP, MemberId::new("b", 2));
    let mut events = Events::with_capacity(TOKENS);
    let mut heard = Vec::new();
    while heard.len() < 3 {
        assert!(a.started.elapsed() < Duration::from_secs(10), "{heard:?}");
        for node in [&mut a, &mut b] {
            let now = node.now();
            while let Some(input) = node.driver.control.poll_input(now) {
                if input.peer == "b" {
                    heard.push(input.event);
                }
            }
            node.poll
                .poll(&mut events, Some(Duration::from_millis(2)))
                .unwrap();
            for event in &events {
                node.driver.handle_ready(event.token());
            }
        }
        if heard.len() == 2 {
            a.driver.set_member(GROUP, MemberId::new("a", 3));
        }
    }
    let since = |event: &ControlEvent| match event {
        ControlEvent::Connected {
            incarnation: 2,
            since,
        } => *since,
        other => panic!("{other:?}"),
    };
    let times: Vec<Instant> = heard.iter().map(since).collect();
    assert!(
        times[0] < times[1],
        "asked again, so the evidence is younger"
    );
    assert_eq!(
        times[1], times[2],
        "a new life is told what is known, not more"
    );
}
