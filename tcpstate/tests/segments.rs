//! A connection, segment by segment.
#![allow(clippy::cast_possible_truncation, reason = "small numbers, in tests")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod vocabulary;

use unbroken_tcpstate::{Checksum, ConnId, Event, EventNo, Replica, ResetBy, ServiceClock, Stack};
use vocabulary::*;

fn data(seq: u32, ack: u32, payload: &[u8]) -> Seg {
    Seg {
        seq,
        ack,
        payload: payload.to_vec(),
        ..ACK
    }
}

/// R1: the ACK field is clamped to what is stable, and the window grows by the difference.
#[test]
fn an_ack_waits_for_stability_and_a_little_for_company() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    let out = b.peer_sends(data(100, iss.wrapping_add(1), b"hello"));
    let [
        Event::Data {
            offset: 0, bytes, ..
        },
    ] = events(&out)[..]
    else {
        panic!("{out:?}")
    };
    assert_eq!(&bytes[..], b"hello");
    assert!(segs(out).is_empty(), "nothing is stable yet");
    // A duplicate is answered whatever is stable: with the clamp.
    let s = one_seg(b.peer_sends(data(100, iss.wrapping_add(1), b"hello")));
    assert_eq!((s.ack, s.window), (100, 32_768), "65536 >> 1");
    nothing(b.stable());
    // The server's answer carries the ACK.
    b.stack.handle_consumed(b.now, conn, 5);
    let s = one_seg(b.server_says(conn, b"world", 2));
    assert_eq!((s.ack, &s.payload[..]), (105, &b"world"[..]));
    // Alone, it leaves after 2 ms.
    b.peer_sends(data(105, iss.wrapping_add(6), b"!"));
    nothing(b.stable());
    let out = b.at(1_003);
    assert_eq!(one_seg(out).ack, 106);
    // Two full segments: at once.
    b.peer_sends(data(106, iss.wrapping_add(6), &[7; 2920]));
    assert_eq!(segs(b.stable())[0].ack, 106 + 2920);
}

/// R1: payload waits for its tag.
#[test]
fn output_waits_for_the_event_it_depends_on() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    let out = b.peer_sends(data(100, iss.wrapping_add(1), b"question"));
    let Out::Event(number, _) = out[0] else {
        panic!()
    };
    nothing(b.server_says(conn, b"answer", number));
    let s = one_seg(b.stable());
    assert_eq!(
        (s.seq, s.ack, &s.payload[..]),
        (iss.wrapping_add(1), 108, &b"answer"[..])
    );
    // What depends on nothing new leaves at once, though later input is not stable.
    b.peer_sends(data(108, iss.wrapping_add(7), b"more"));
    let s = one_seg(b.server_says(conn, b"late", number));
    assert_eq!((s.ack, &s.payload[..]), (108, &b"late"[..]));
}

/// R1: FIN and RST of a known connection are events first.
#[test]
fn a_fin_and_an_rst_wait_for_their_event() {
    let mut b = Bench::new(config(true));
    let (conn, iss) = b.open(99);
    b.server_says(conn, b"bye", 1);
    b.stack.handle_server_fin(b.now, conn);
    let out = b.drain();
    assert!(matches!(
        events(&out)[..],
        [Event::LocalFin { offset: 3, .. }]
    ));
    assert!(segs(out).is_empty());
    let s = one_seg(b.stable());
    assert_eq!((s.flags, s.seq), ("FA", iss.wrapping_add(4)));

    let (conn, iss) = {
        b.peer.set_port(50_000);
        b.open(7)
    };
    b.stack.handle_server_reset(b.now, conn);
    let out = b.drain();
    assert!(matches!(
        events(&out)[..],
        [Event::Reset {
            by: ResetBy::Server,
            ..
        }]
    ));
    assert!(segs(out).is_empty());
    nothing(b.peer_sends(data(8, iss.wrapping_add(1), b"too late")));
    let s = one_seg(b.stable());
    assert_eq!((s.flags, s.seq), ("RA", iss.wrapping_add(1)));
    assert_eq!(
        one_seg(b.peer_sends(data(8, iss.wrapping_add(1), b"too late"))).flags,
        "R"
    );
}

/// RFC 2018: up to three blocks, the latest first; RFC 5681 §4.2: at once.
#[test]
fn gaps_are_reported_and_filled() {
    let mut b = Bench::new(config(false));
    let (_, iss) = b.open(99);
    let una = iss.wrapping_add(1);
    let s = one_seg(b.peer_sends(data(110, una, b"0123456789")));
    assert_eq!((s.ack, &s.sack[..]), (100, &[(110, 120)][..]));
    let s = one_seg(b.peer_sends(data(130, una, b"0123456789")));
    assert_eq!(s.sack, [(130, 140), (110, 120)]);
    let out = b.peer_sends(data(100, una, b"abcdefghij"));
    let lens: Vec<_> = events(&out)
        .iter()
        .map(|e| {
            if let Event::Data { offset, bytes, .. } = e {
                (*offset, bytes.len())
            } else {
                panic!()
            }
        })
        .collect();
    assert_eq!(lens, [(0, 10), (10, 10)]);
    let s = one_seg(b.stable());
    assert_eq!(
        (s.ack, &s.sack[..]),
        (120, &[(130, 140)][..]),
        "a filled gap is told at once"
    );
}

/// The FIN counts only when everything before it is there.
#[test]
fn a_fin_beyond_a_gap_waits() {
    let mut b = Bench::new(config(false));
    let (_, iss) = b.open(99);
    let una = iss.wrapping_add(1);
    let out = b.peer_sends(Seg {
        flags: "FA",
        ..data(105, una, b"world")
    });
    assert!(events(&out).is_empty());
    let out = b.peer_sends(data(100, una, b"hello"));
    assert!(matches!(
        events(&out)[..],
        [
            Event::Data { .. },
            Event::Data { .. },
            Event::PeerFin { offset: 10, .. }
        ]
    ));
    assert_eq!(one_seg(b.stable()).ack, 111);
    // Nothing follows a FIN, and its retransmission is answered.
    let s = one_seg(b.peer_sends(Seg {
        flags: "FA",
        ..data(105, una, b"world")
    }));
    assert_eq!(s.ack, 111);
    let out = b.peer_sends(data(111, una, b"beyond"));
    assert!(events(&out).is_empty());
}

/// RFC 5961 §3.2, §4.2 and §7, over the wire.
#[test]
fn forged_resets_and_syns_are_challenged() {
    let mut b = Bench::new(config(false));
    let (_, iss) = b.open(99);
    let s = one_seg(b.peer_sends(Seg {
        flags: "R",
        ..data(101, 0, b"")
    }));
    assert_eq!((s.flags, s.ack), ("A", 100));
    nothing(b.peer_sends(Seg {
        flags: "R",
        ..data(102, 0, b"")
    }));
    b.at(1_200);
    let s = one_seg(b.peer_sends(Seg {
        seq: 4_000_000,
        ..SYN
    }));
    assert_eq!((s.flags, s.seq, s.ack), ("A", iss.wrapping_add(1), 100));
    b.at(1_400);
    let s = one_seg(b.peer_sends(data(100, iss.wrapping_add(900), b"x")));
    assert_eq!(
        (s.flags, s.ack),
        ("A", 100),
        "it acknowledges what was never sent"
    );
    assert_eq!(b.stack.connections(), 1);
    let out = b.peer_sends(Seg {
        flags: "R",
        ..data(100, 0, b"")
    });
    assert!(matches!(
        events(&out)[..],
        [Event::Reset {
            by: ResetBy::Peer,
            ..
        }]
    ));
    assert_eq!(b.stack.connections(), 0);
}

/// The right edge moves with what our own server has taken, and its opening is told.
#[test]
fn the_window_closes_and_opens_with_the_server() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    let una = iss.wrapping_add(1);
    let mut seq = 100;
    for _ in 0..4 {
        b.peer_sends(data(seq, una, &[1; 16_384]));
        seq += 16_384;
        let s = one_seg(b.stable());
        assert_eq!((s.ack, u32::from(s.window) * 2), (seq, 100 + 65_536 - seq));
    }
    // A probe of the closed window is answered, and not taken.
    let out = b.peer_sends(data(seq, una, b"x"));
    assert!(events(&out).is_empty());
    assert_eq!(one_seg(out).window, 0);
    // The server takes a little: not worth a word. Then more.
    b.stack.handle_consumed(b.now, conn, 1_000);
    nothing(b.drain());
    b.stack.handle_consumed(b.now, conn, 30_000);
    let s = one_seg(b.drain());
    assert_eq!((s.ack, s.window), (seq, 15_000));
}

/// Output room reopens by a quarter at once.
#[test]
fn output_is_bounded_and_its_room_is_told() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    assert_eq!(b.stack.output_room(conn), 65_536);
    let out = b.server_says(conn, &[9; 65_536], 1);
    let sent: usize = segs(out).iter().map(|s| s.payload.len()).sum();
    assert_eq!(sent, 14_480, "RFC 6928: ten segments, then wait");
    assert_eq!(b.stack.output_room(conn), 0);
    b.at(1_001);
    let out = b.peer_sends(data(100, iss.wrapping_add(1 + 14_480), b""));
    assert_eq!(b.stack.output_room(conn), 0, "14480 is less than a quarter");
    assert!(!out.iter().any(|o| matches!(o, Out::Room(_))));
    let flight: usize = segs(out).iter().map(|s| s.payload.len()).sum();
    assert!(flight > 14_480, "slow start: {flight}");
    let out = b.peer_sends(data(100, iss.wrapping_add(1 + 28_960), b""));
    assert!(out.iter().any(|o| matches!(o, Out::Room(c) if *c == conn)));
    assert_eq!(b.stack.output_room(conn), 28_960);
    assert_eq!(b.stack.output_produced(conn), 65_536);
}

/// `Acked` is lazy: at most 5 ms late, and at once after a quarter of the retention bound.
#[test]
fn backups_learn_of_acknowledgements_soon() {
    let mut c = config(false);
    c.retained_output_max = 20_000;
    let mut b = Bench::new(c);
    let (conn, iss) = b.open(99);
    b.server_says(conn, &[9; 14_000], 1);
    let out = b.peer_sends(data(100, iss.wrapping_add(1 + 1_000), b""));
    assert!(events(&out).is_empty());
    let out = b.at(1_006);
    assert!(
        matches!(
            events(&out)[..],
            [Event::Acked {
                offset: 1_000,
                window: 64_000,
                ..
            }]
        ),
        "{out:?}"
    );
    let out = b.peer_sends(data(100, iss.wrapping_add(1 + 7_000), b""));
    assert!(matches!(
        events(&out)[..],
        [Event::Acked { offset: 7_000, .. }]
    ));
}

/// RFC 5681 §3.2: three duplicates; the library alone would wait a second for anything else.
#[test]
fn losses_are_repaired_without_the_long_timer() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    b.server_says(conn, &[9; 10_000], 1);
    let first = iss.wrapping_add(1);
    let sack = |to: u32| Seg {
        sack: vec![(first + 1448, first + to)],
        ..data(100, first, b"")
    };
    nothing(b.peer_sends(sack(2_896)));
    nothing(b.peer_sends(sack(4_344)));
    let s = one_seg(b.peer_sends(sack(5_792)));
    assert_eq!((s.seq, s.payload.len()), (first, 1_448));
    nothing(b.peer_sends(sack(7_240)));
    // A partial ACK: the next hole at once (RFC 6582).
    let out = b.peer_sends(data(100, first.wrapping_add(7_240), b""));
    assert_eq!(segs(out)[0].seq, first.wrapping_add(7_240));
    // The tail is lost: one segment after 60 ms.
    let out = b.at(1_065);
    let again: Vec<_> = segs(out).iter().map(|s| s.seq).collect();
    assert_eq!(again, [first.wrapping_add(7_240)]);
    b.peer_sends(data(100, first.wrapping_add(10_000), b""));
    let out = b.at(10_000);
    assert!(segs(out).is_empty());
    assert_eq!(b.stack.poll_timeout(), None);
    // A lone FIN too.
    b.stack.handle_server_fin(b.now, conn);
    b.stable();
    let fins: Vec<_> = segs(b.at(10_100))
        .iter()
        .map(|s| (s.flags, s.seq))
        .collect();
    assert_eq!(fins, [("FA", first.wrapping_add(10_000))]);
}

/// RFC 9293 §3.8.6.1: a closed window is probed, whenever it closed.
#[test]
fn a_closed_window_is_probed() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    b.peer_sends(Seg {
        window: 0,
        ..data(100, iss.wrapping_add(1), b"")
    });
    let s = one_seg(b.server_says(conn, b"waiting", 1));
    assert_eq!(
        (s.seq, s.payload.len()),
        (iss.wrapping_add(1), 1),
        "at once"
    );
    b.peer_sends(Seg {
        window: 0,
        ..data(100, iss.wrapping_add(1), b"")
    });
    let out = b.at(3_100);
    let s = segs(out);
    assert_eq!((s[0].seq, s[0].payload.len()), (iss.wrapping_add(1), 1));
    let out = b.peer_sends(Seg {
        window: 500,
        ..data(100, iss.wrapping_add(1), b"")
    });
    assert_eq!(one_seg(out).payload, b"waiting");
}

/// A client that answers nothing is given up, and told.
#[test]
fn a_silent_client_is_given_up() {
    let mut c = config(false);
    c.give_up_after = std::time::Duration::from_secs(100);
    let mut b = Bench::new(c);
    let (conn, _) = b.open(99);
    b.server_says(conn, b"hello?", 1);
    // Our own clock jumps: that says nothing of the client.
    b.now = unbroken_tcpstate::Instant::from_millis(500_000);
    b.stack.handle_timeout(b.now);
    assert!(events(&b.drain()).is_empty());
    let out = b.at(590_000);
    assert!(
        matches!(
            events(&out)[..],
            [Event::Reset {
                by: ResetBy::Stack,
                ..
            }]
        ),
        "{out:?}"
    );
    b.stable();
    assert_eq!(b.stack.connections(), 0);
}

/// Super-segments carry their segment size, for both families, and the pseudo header's sum.
#[test]
fn offload_makes_super_segments() {
    for ipv6 in [false, true] {
        let mut c = config(ipv6);
        c.segmentation_offload = true;
        c.transmit_capacity = 300_000;
        let mut b = Bench::new(c);
        let (conn, iss) = b.open(99);
        b.server_says(conn, &vec![5; 200_000], 1);
        let mut acked = 0;
        for _ in 0..12 {
            acked = b
                .packets
                .iter()
                .map(|p| p.ip().len() as u32)
                .sum::<u32>()
                .min(acked + 60_000);
            let sent: usize = b
                .packets
                .iter()
                .map(|p| parse(p.ip(), false).payload.len())
                .sum();
            let ack = iss.wrapping_add(1 + sent as u32);
            b.now = b.now + std::time::Duration::from_micros(200);
            b.peer_sends(Seg {
                window: 2_000,
                ..data(100, ack, b"")
            });
        }
        let largest = b.packets.iter().max_by_key(|p| p.ip().len()).unwrap();
        assert!(largest.ip().len() > 40_000, "{}", largest.ip().len());
        assert_eq!(largest.gso, Some(if ipv6 { 1428 } else { 1448 }));
        assert!(largest.partial_checksum);
        assert!(b.packets.iter().all(|p| p.ip().len() <= 65_212 + 20));
    }
}

/// The same inputs give the same outputs, and numbers are those of the log.
#[test]
fn connections_are_named_by_their_open_event() {
    let mut b = Bench::new(config(false));
    let (a, _) = b.open(1);
    b.peer.set_port(1_000);
    let (second, _) = b.open(2);
    assert_eq!((a, second), (ConnId(1), ConnId(2)));
    assert_eq!(b.stack.next_event(), EventNo(3));
    assert_eq!(b.stack.connections(), 2);
}

/// `ordering = "total"`: B's answer may depend on A's question, and waits for that event.
#[test]
fn output_may_wait_for_another_connections_event() {
    let mut b = Bench::new(config(false));
    let (a, iss) = b.open(1);
    b.peer.set_port(1_000);
    let (other, _) = b.open(2);
    b.peer.set_port(49_500);
    let out = b.peer_sends(data(2, iss.wrapping_add(1), b"SET x 1"));
    let Out::Event(number, _) = out[0] else {
        panic!()
    };
    nothing(b.server_says(other, b"x is 1", number));
    let out = segs(b.stable());
    assert_eq!(
        out.iter().map(|s| &s.payload[..]).collect::<Vec<_>>(),
        [&b"x is 1"[..]]
    );
    assert_eq!(b.stack.output_produced(a), 0);
}

/// A client that restarted, and uses its old port: RFC 5961 §4.2's dance, then a new connection.
#[test]
fn a_restarted_client_gets_its_port_back() {
    let mut b = Bench::new(config(true));
    let (_, iss) = b.open(99);
    b.peer_sends(data(100, iss.wrapping_add(1), b"unstable still"));
    let s = one_seg(b.peer_sends(Seg {
        seq: 5_000_000,
        ..SYN
    }));
    assert_eq!((s.flags, s.ack), ("A", 100), "the ACK is clamped");
    let out = b.peer_sends(Seg {
        flags: "R",
        ..data(s.ack, 0, b"")
    });
    assert!(matches!(
        events(&out)[..],
        [Event::Reset {
            by: ResetBy::Peer,
            ..
        }]
    ));
    let (conn, fresh) = b.open(5_000_000);
    assert_ne!(fresh, iss);
    assert_eq!(b.stack.connections(), 1);
    assert_eq!(b.stack.state(conn).map(|s| s.received), Some(0));
}

/// An idle connection gives its buffer back; later output finds the numbers where they were.
#[test]
fn an_idle_connection_costs_no_timer_and_goes_on() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    let mut ack = iss.wrapping_add(1);
    for round in 1..=3u64 {
        let s = one_seg(b.server_says(conn, b"tick", 1));
        assert_eq!((s.seq, &s.payload[..]), (ack, &b"tick"[..]));
        ack = ack.wrapping_add(4);
        b.peer_sends(data(100, ack, b""));
        let out = b.at(1_000 + round * 20_000);
        assert!(segs(out).is_empty());
        assert_eq!(b.stack.poll_timeout(), None);
    }
    b.stack.handle_server_fin(b.now, conn);
    assert_eq!(one_seg(b.stable()).seq, ack);
}

/// What waits beyond gaps is bounded over all connections; the rest comes again.
#[test]
fn reassembly_is_bounded_over_all_connections() {
    let mut c = config(false);
    c.reassembly_max = 1_000;
    let mut b = Bench::new(c);
    let mut ports = Vec::new();
    for port in 1..=5u16 {
        b.peer.set_port(port);
        let (_, iss) = b.open(99);
        let s = one_seg(b.peer_sends(data(110, iss.wrapping_add(1), &[1; 300])));
        assert_eq!(s.sack.is_empty(), port > 3, "port {port}");
        ports.push((port, iss));
    }
    // A filled gap, and an end, give room to others.
    let (port, iss) = ports[0];
    b.peer.set_port(port);
    b.peer_sends(data(100, iss.wrapping_add(1), &[1; 10]));
    let (port, _) = ports[1];
    b.peer.set_port(port);
    b.peer_sends(Seg {
        flags: "R",
        ..data(100, 0, b"")
    });
    for (port, iss) in &ports[3..] {
        b.peer.set_port(*port);
        let s = one_seg(b.peer_sends(data(110, iss.wrapping_add(1), &[1; 300])));
        assert_eq!(s.sack, [(110, 410)]);
    }
}

/// A replica's record lags: the client may acknowledge what an earlier leader has sent it and this one's server has yet to
/// say. What comes with such an acknowledgement counts at once.
#[test]
fn a_client_may_hold_more_than_the_record_knows() {
    let mut b = Bench::new(config(false));
    let (conn, iss) = b.open(99);
    assert_eq!(segs(b.server_says(conn, &[7; 100], 1)).len(), 1);
    let mut replica = Replica::new(config(false));
    for (number, event) in (1..).zip(&b.log) {
        replica.apply(b.now, EventNo(number), event);
    }
    let later = ServiceClock {
        at: b.now,
        value_us: 640_150_000,
    };
    let next = b.stack.next_event();
    let stack = Stack::take_over(config(false), secrets(), b.now, later, next, replica);
    let mut heir = Bench::with(stack, &config(false), b.now);
    heir.drain();
    let out = heir.peer_sends(data(100, iss.wrapping_add(101), b"next"));
    assert!(
        matches!(events(&out)[..], [Event::Data { bytes, .. }] if bytes[..] == b"next"[..]),
        "{out:?}"
    );
    heir.stable();
    assert!(segs(heir.server_says(conn, &[7; 100], 1)).is_empty());
    let s = one_seg(heir.server_says(conn, b"more", 1));
    assert_eq!((s.seq, s.ack), (iss.wrapping_add(101), 104));
}

/// RFC 7323 §5.3: an old duplicate, told by its timestamp, is answered and not taken.
#[test]
fn an_old_timestamp_is_not_believed() {
    let mut b = Bench::new(config(false));
    let (_, iss) = b.open(99);
    let old = Seg {
        ts: Some((400, 0)),
        ..data(100, iss.wrapping_add(1), b"old")
    };
    let out = b.peer_sends(old);
    assert!(events(&out).is_empty());
    assert_eq!(one_seg(out).ack, 100);
}

/// A checksum that nobody has verified is verified here.
#[test]
fn a_damaged_segment_is_dropped() {
    let mut b = Bench::new(config(false));
    let (_, iss) = b.open(99);
    let to = std::net::SocketAddr::new(b.vip, 80);
    let mut packet = build(b.peer, to, &data(100, iss.wrapping_add(1), b"whole"));
    *packet.last_mut().unwrap() ^= 1;
    b.stack
        .handle_packet(b.now, &packet, LINK, Checksum::Verify);
    nothing(b.drain());
    assert_eq!(b.stack.counters().bad_checksums, 1);
    b.stack
        .handle_packet(b.now, &packet, LINK, Checksum::Verified);
    assert!(matches!(events(&b.drain())[..], [Event::Data { .. }]));
}

/// RFC 9293 §3.7.1: no segment is larger than the client takes, options included.
#[test]
fn segments_are_no_larger_than_the_client_takes() {
    let mut b = Bench::new(config(false));
    let mss = Some(536);
    let syn_ack = one_seg(b.peer_sends(Seg { mss, ..SYN }));
    let una = syn_ack.seq.wrapping_add(1);
    b.peer_sends(data(1, una, b""));
    b.stable();
    let out = segs(b.server_says(ConnId(1), &[5; 3_000], 1));
    let lens: Vec<usize> = out.iter().map(|s| s.payload.len()).collect();
    assert_eq!(lens.iter().max(), Some(&(536 - 12)), "{lens:?}");
}
