//! Two drivers on loopback: what is sealed by a member arrives, what is not does not, and a death is seen.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "helpers of tests"
)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::num::NonZeroU32;
use std::time::{Duration, Instant as Clock};

use bytes::Bytes;
use mio::{Events, Poll};
use unbroken_group::driver::{
    ControlInput, Driver, DriverError, Multicast, Options, Pacing, TOKENS,
};
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
        Self::open_with(me, members, key, Options::default())
    }

    fn open_with(
        me: &str,
        members: &BTreeMap<String, SocketAddr>,
        key: [u8; 32],
        options: Options,
    ) -> Self {
        let poll = Poll::new().unwrap();
        let now = Instant::from_micros(0);
        let mut driver = Driver::open_with(me, members, &key, now, &options).unwrap();
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

    /// A life in the group, and its keys.
    fn live(&mut self, me: &MemberId) {
        self.driver.set_member(GROUP, me.clone());
        self.driver.set_instance(GROUP, 5);
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
    let now = a.now();
    a.driver.sender.send(now, GROUP, &to, &bodies);
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
    let now = a.now();
    let to = [MemberId::new("b", 1)];
    a.driver
        .sender
        .send(now, GROUP, &to, &[Bytes::from_static(b"x")]);
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

#[test]
fn what_is_sent_after_a_view_is_sealed_in_its_epoch_and_heard() {
    let members = members(&["a", "b"]);
    let (mut a, mut b) = (
        Node::open("a", &members, [1; 32]),
        Node::open("b", &members, [1; 32]),
    );
    let me = MemberId::new("a", 77);
    a.live(&me);
    b.driver.set_instance(GROUP, 5);
    let to = [MemberId::new("b", 1)];
    // Epochs in which b itself is not, as of a member that is ahead or behind.
    for epoch in [0, 1, 2, 3, 900, 7] {
        a.driver.set_epoch(GROUP, epoch);
        let body = Bytes::from(epoch.to_le_bytes().to_vec());
        a.driver
            .sender
            .send(a.now(), GROUP, &to, std::slice::from_ref(&body));
        b.until(|input| matches!(input, Input::Datagram(GROUP, _, got) if got == body));
    }
    let counters = b.driver.receiver.counters();
    assert_eq!(
        (counters.received, counters.forged, counters.stale),
        (6, 0, 0)
    );
    assert_eq!(a.driver.sender.counters().sent, 6);
}

#[test]
fn every_datagram_of_a_stranger_is_counted_the_empty_one_too() {
    let members = members(&["a", "b"]);
    let mut b = Node::open("b", &members, [1; 32]);
    b.driver.set_instance(GROUP, 5);
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut long = vec![0; 1200];
    long[0] = 2; // the version
    for datagram in [&b""[..], b"x", &long] {
        stranger.send_to(datagram, members["b"]).unwrap();
    }
    let count = |b: &Node| {
        let c = b.driver.receiver.counters();
        (c.malformed, c.other_version, c.stranger)
    };
    let mut events = Events::with_capacity(TOKENS);
    while count(&b) != (1, 1, 1) {
        let counters = b.driver.receiver.counters();
        assert!(
            b.started.elapsed() < Duration::from_secs(10),
            "{counters:?}"
        );
        let receiver = &mut b.driver.receiver;
        receiver.receive(|_, _, _| panic!("heard")).unwrap();
        if !b.driver.receiver.readable() {
            b.poll
                .poll(&mut events, Some(Duration::from_millis(5)))
                .unwrap();
            for event in &events {
                b.driver.handle_ready(event.token());
            }
        }
    }
}

/// Of this test alone: its port was free a moment ago.
fn multicast() -> Multicast {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    Multicast {
        group: SocketAddrV4::new(
            Ipv4Addr::new(239, 255, 77, 1),
            free.local_addr().unwrap().port(),
        ),
        interface: Ipv4Addr::LOCALHOST,
        hops: 1,
        shared_host: true,
    }
}

#[test]
fn what_is_for_several_goes_once_by_multicast_and_arrives_at_each() {
    let members = members(&["a", "b", "c"]);
    let multicast = multicast();
    let options = Options {
        multicast: Some(multicast),
        ..Options::default()
    };
    let mut nodes = ["a", "b", "c"].map(|me| Node::open_with(me, &members, [1; 32], options));
    let me = MemberId::new("a", 77);
    nodes[0].live(&me);
    for node in &mut nodes {
        node.driver.set_instance(GROUP, 5);
    }
    let [a, others @ ..] = &mut nodes;
    let to = [MemberId::new("b", 1), MemberId::new("c", 1)];
    let mut bodies: Vec<Bytes> = (0..100u8).map(|i| Bytes::from(vec![i; 1360])).collect();
    bodies.push(Bytes::from_static(b"last"));
    let count = bodies.len() as u64;
    a.driver.sender.send(a.now(), GROUP, &to, &bodies);
    assert_eq!(
        a.driver.sender.counters().sent,
        count,
        "once, not once each"
    );
    for other in others.iter_mut() {
        let mut got = Vec::new();
        other.until(|input| {
            if let Input::Datagram(GROUP, from, body) = input {
                assert_eq!(from, me);
                got.push(body);
            }
            got.len() == bodies.len()
        });
        got.sort();
        let mut sent: Vec<Vec<u8>> = bodies.iter().map(|b| b.to_vec()).collect();
        sent.sort();
        assert!(got == sent);
    }
    // What is for one goes to it alone; and whoever else speaks on the multicast address is a stranger.
    a.driver
        .sender
        .send(a.now(), GROUP, &to[..1], &[Bytes::from_static(b"alone")]);
    others[0].until(|input| matches!(input, Input::Datagram(_, _, body) if body == b"alone"));
    let stranger = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    stranger.set_multicast_if_v4(&multicast.interface).unwrap();
    let mut forged = vec![0; 100];
    forged[0] = 2;
    stranger
        .send_to(&forged, &SocketAddr::from(multicast.group).into())
        .unwrap();
    for node in [0, 1, 2] {
        let node = &mut nodes[node];
        // Its own multicast comes back to the sender, and is dropped.
        let mut events = Events::with_capacity(TOKENS);
        let done = |c: unbroken_group::driver::Counters| c.stranger == 1;
        while !done(node.driver.receiver.counters()) {
            assert!(node.started.elapsed() < Duration::from_secs(10));
            let receiver = &mut node.driver.receiver;
            receiver.receive(|_, _, _| panic!("heard")).unwrap();
            node.poll
                .poll(&mut events, Some(Duration::from_millis(5)))
                .unwrap();
            for event in &events {
                node.driver.handle_ready(event.token());
            }
        }
    }
    let received = nodes.each_ref().map(|n| n.driver.receiver.counters());
    assert_eq!(received.map(|c| c.received), [0, count + 1, count]);
    assert_eq!(received.map(|c| c.own), [count, 0, 0]);
}

#[test]
fn what_is_no_multicast_address_is_refused() {
    let members = members(&["a", "b"]);
    let group = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 7000);
    let options = Options {
        multicast: Some(Multicast {
            group,
            ..multicast()
        }),
        ..Options::default()
    };
    let opened = Driver::open_with("a", &members, &[1; 32], Instant::from_micros(0), &options);
    assert!(matches!(opened, Err(DriverError::Multicast { group: g, .. }) if g == group));
}

#[test]
fn a_paced_sender_keeps_its_pace_in_order_and_drops_what_is_too_much() {
    let members = members(&["a", "b"]);
    let pacing = Pacing {
        bytes_per_us: NonZeroU32::new(10).unwrap(),
        burst_bytes: 5000,
        queue_bytes_max: 60_000,
    };
    let options = Options {
        pacing: Some(pacing),
        ..Options::default()
    };
    let mut a = Node::open_with("a", &members, [1; 32], options);
    let mut b = Node::open("b", &members, [1; 32]);
    a.live(&MemberId::new("a", 77));
    b.driver.set_instance(GROUP, 5);
    let to = [MemberId::new("b", 1)];
    let bodies: Vec<Bytes> = (0..100u8).map(|i| Bytes::from(vec![i; 945])).collect(); // 1000 as they are sent
    // The time is the test's: nothing here depends on how fast the machine is.
    let at = Instant::from_micros;
    a.driver.sender.send(at(1000), GROUP, &to, &bodies);
    let sent = a.driver.sender.counters();
    assert_eq!((sent.sent, sent.overflowed, sent.refused), (5, 35, 0));
    assert_eq!(a.driver.sender.queued_bytes(), 60_000);
    let mut wakes = 0;
    while let Some(due) = a.driver.sender.poll_timeout() {
        assert_eq!(a.driver.poll_timeout().map(|t| t <= due), Some(true));
        a.driver.sender.handle_timeout(due);
        wakes += 1;
        let gone = 1000 * a.driver.sender.counters().sent.min(65);
        assert!(gone <= 5000 + 10 * (due.micros() - 1000));
        // What comes meanwhile does not overtake.
        if wakes == 1 {
            a.driver
                .sender
                .send(due, GROUP, &to, &[Bytes::from_static(b"last")]);
        }
    }
    assert_eq!(wakes, 13);
    let mut got = Vec::new();
    b.until(|input| {
        if let Input::Datagram(_, _, body) = input {
            got.push(body);
        }
        got.len() == 66
    });
    assert_eq!(got.pop().as_deref(), Some(&b"last"[..]));
    let order: Vec<u8> = got.iter().map(|body| body[0]).collect();
    assert_eq!(order, (0..65).collect::<Vec<u8>>());
}
