//! The stateless responder: cookies, refusals, ghosts, half-open handshakes.
#![allow(clippy::cast_possible_truncation, reason = "small numbers, in tests")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod vocabulary;

use unbroken_tcpstate::{
    Checksum, ConnId, Event, EventNo, Instant, Replica, ResetBy, Secrets, ServiceClock, Stack,
};
use vocabulary::*;

/// RFC 9293 §3.10.7.2, RFC 7323 §2.2, RFC 2018 §2.
#[test]
fn a_syn_is_answered_with_what_both_can() {
    for ipv6 in [false, true] {
        let mut b = Bench::new(config(ipv6));
        let s = one_seg(b.peer_sends(Seg { seq: 99, ..SYN }));
        assert_eq!((s.flags, s.ack, s.window), ("SA", 100, 65_535));
        assert_eq!(s.mss, Some(if ipv6 { 1440 } else { 1460 }));
        assert_eq!(s.shift, Some(1));
        assert!(s.sack_permitted);
        assert_eq!(
            s.ts,
            Some((640_000, 500)),
            "TSval is the service clock's milliseconds"
        );
        assert_eq!(
            b.stack.connections(),
            0,
            "nothing is remembered but a courtesy"
        );
        let bare = Seg {
            mss: None,
            shift: None,
            sack_permitted: false,
            ts: None,
            ..SYN
        };
        let s = one_seg(b.peer_sends(bare));
        assert_eq!((s.shift, s.sack_permitted, s.ts), (None, false, None));
    }
}

/// The final ACK may reach a different leader, which has only the secrets.
#[test]
fn another_stack_opens_the_connection_with_the_right_options() {
    for ipv6 in [false, true] {
        for (mss, kept) in [
            (1460, 1460),
            (1459, 1440),
            (9000, 8940),
            (600, 536),
            (30, 48),
        ] {
            for shift in [None, Some(0), Some(7), Some(14)] {
                for sack in [false, true] {
                    for ts in [None, Some((7, 0))] {
                        let mut a = Bench::new(config(ipv6));
                        let syn = Seg {
                            mss: Some(mss),
                            shift,
                            sack_permitted: sack,
                            ts,
                            ..SYN
                        };
                        let syn_ack = one_seg(a.peer_sends(Seg { seq: 5, ..syn }));
                        let mut b = Bench::new(config(ipv6));
                        let ack = syn_ack.seq.wrapping_add(1);
                        let out = b.peer_sends(Seg {
                            seq: 6,
                            ack,
                            ts,
                            window: 10,
                            ..ACK
                        });
                        let [Event::Open { state }] = events(&out)[..] else {
                            panic!("{out:?}")
                        };
                        let n = state.negotiated;
                        assert_eq!((n.mss, n.peer_shift, n.sack), (kept, shift, sack));
                        assert_eq!(n.timestamps, ts.is_some());
                        assert_eq!(state.window, 10 << shift.unwrap_or(0));
                        assert_eq!((state.irs.0, state.iss.0), (5, syn_ack.seq));
                    }
                }
            }
        }
    }
}

#[test]
fn a_cookie_is_good_for_its_tuple_its_time_and_its_keys() {
    let mut a = Bench::new(config(false));
    let iss = one_seg(a.peer_sends(Seg { seq: 5, ..SYN })).seq;
    let last = Seg {
        seq: 6,
        ack: iss.wrapping_add(1),
        ..ACK
    };
    // Another key, another port, another ISN, a number that is near.
    let mut other = Bench::new(config(false));
    let now = other.now;
    other.stack = Stack::new(
        config(false),
        Secrets::new(8, &[2; 32]),
        now,
        clock(),
        EventNo(1),
    );
    assert_eq!(one_seg(other.peer_sends(last.clone())).flags, "R");
    let mut other = Bench::new(config(false));
    other.peer.set_port(49_501);
    assert_eq!(one_seg(other.peer_sends(last.clone())).flags, "R");
    let mut other = Bench::new(config(false));
    assert_eq!(
        one_seg(other.peer_sends(Seg {
            seq: 7,
            ..last.clone()
        }))
        .flags,
        "R"
    );
    assert_eq!(
        one_seg(other.peer_sends(Seg {
            ack: iss.wrapping_add(2),
            ..last.clone()
        }))
        .flags,
        "R"
    );
    // The unit that follows accepts it still, the one after does not.
    for (later_s, accepted) in [(0, true), (33, true), (63, true), (64, false)] {
        let mut other = Bench::new(config(false));
        other.at(1_000 + later_s * 1_000);
        let out = other.peer_sends(last.clone());
        assert_eq!(!events(&out).is_empty(), accepted, "{later_s} s later");
    }
    // A neighbouring epoch's key is accepted, not used.
    let mut other = Bench::new(config(false));
    let rotated = Secrets::new(9, &[2; 32]).with_neighbour(&[1; 32]);
    other.stack = Stack::new(config(false), rotated, now, clock(), EventNo(1));
    assert_eq!(events(&other.peer_sends(last)).len(), 1);
}

#[test]
fn strangers_are_refused_with_an_rst_they_must_believe() {
    let mut b = Bench::new(config(false));
    let s = one_seg(b.peer_sends_to(81, Seg { seq: 50, ..SYN }));
    assert_eq!(
        (s.flags, s.seq, s.ack),
        ("RA", 0, 51),
        "no service on that port"
    );
    let s = one_seg(b.peer_sends(Seg {
        seq: 50,
        ack: 70,
        payload: b"abc".to_vec(),
        ..ACK
    }));
    assert_eq!((s.flags, s.seq), ("R", 70));
    nothing(b.peer_sends(Seg { flags: "R", ..ACK }));
    nothing(b.peer_sends(Seg { flags: "FS", ..SYN }));
    // What is not a segment for us, or is damaged, is not answered at all.
    let mut packet = build(b.peer, std::net::SocketAddr::new(b.vip, 80), &SYN);
    *packet.last_mut().unwrap() ^= 1;
    b.stack
        .handle_packet(b.now, &packet, LINK, Checksum::Verify);
    packet[6] |= 0x20;
    b.stack
        .handle_packet(b.now, &packet, LINK, Checksum::Verified);
    b.stack
        .handle_packet(b.now, &packet[..30], LINK, Checksum::Verified);
    nothing(b.drain());
    let c = b.stack.counters();
    assert_eq!((c.bad_checksums, c.fragments, c.malformed), (1, 1, 1));
}

/// A request that was answered and closed is repeated by a late segment: it must not run again.
#[test]
fn an_old_segment_on_a_closed_tuple_opens_nothing() {
    let mut b = Bench::new(config(false));
    let iss = one_seg(b.peer_sends(Seg { seq: 9, ..SYN })).seq;
    let request = Seg {
        seq: 10,
        ack: iss.wrapping_add(1),
        payload: b"INCR".to_vec(),
        ..ACK
    };
    b.peer_sends(request.clone());
    let conn = ConnId(1);
    b.stable();
    b.server_says(conn, b"1", 2);
    let out = b.peer_sends(Seg {
        flags: "FA",
        seq: 14,
        ack: iss.wrapping_add(2),
        ..ACK
    });
    assert!(matches!(
        events(&out)[..],
        [Event::PeerFin { offset: 4, .. }]
    ));
    b.stable();
    b.stack.handle_server_fin(b.now, conn);
    b.stable();
    let out = b.peer_sends(Seg {
        seq: 15,
        ack: iss.wrapping_add(3),
        ..ACK
    });
    assert!(
        matches!(events(&out).last(), Some(Event::Closed { .. })),
        "{out:?}"
    );
    assert_eq!(b.stack.connections(), 0);

    let mut replica = Replica::new(config(false));
    for (i, event) in b.log.iter().enumerate() {
        replica.apply(b.now, EventNo(i as u64 + 1), event);
    }
    let image = replica.snapshot(b.now);
    assert_eq!(image, b.stack.snapshot(b.now));
    let now = b.now;
    let later = ServiceClock {
        at: now,
        value_us: 640_050_000,
    };
    let next = b.stack.next_event();
    let restored = Replica::restore(config(false), now, image);
    let mut heirs: Vec<Bench> = [replica, restored]
        .into_iter()
        .map(|replica| {
            let stack = Stack::take_over(config(false), secrets(), now, later, next, replica);
            Bench::with(stack, &config(false), now)
        })
        .collect();
    for bench in heirs.iter_mut().chain([&mut b]) {
        let s = one_seg(bench.peer_sends(request.clone()));
        assert_eq!(
            (s.flags, s.seq, s.ack),
            ("A", iss.wrapping_add(3), 15),
            "TIME-WAIT's ACK"
        );
        // The FIN comes again: the same.
        let fin = Seg {
            flags: "FA",
            seq: 14,
            ack: iss.wrapping_add(2),
            ..ACK
        };
        assert_eq!(one_seg(bench.peer_sends(fin)).ack, 15);
        assert_eq!(bench.stack.connections(), 0);
        assert_eq!(bench.stack.counters().ghosts, 1);
        // A new incarnation of the same tuple is welcome.
        let (_, fresh) = bench.open(70_000);
        assert_ne!(fresh, iss);
        assert_eq!(bench.stack.connections(), 1);
    }
    // Long after, nothing is known any more, and the cookie is worth nothing either.
    b.at(200_000);
    b.stack
        .handle_server_reset(b.now, ConnId(b.log.len() as u64));
    b.stable();
    b.peer.set_port(49_500);
    b.at(300_000);
    assert_eq!(one_seg(b.peer_sends(request)).flags, "R");
    assert_eq!(b.stack.closed_tuples(), (0, 0));
}

/// A handshake that lasts is announced; its SYN-ACK is repeated, by a new leader too.
#[test]
fn half_open_handshakes_are_announced_and_resumed() {
    let mut b = Bench::new(config(false));
    let iss = one_seg(b.peer_sends(Seg { seq: 9, ..SYN })).seq;
    let out = b.at(1_006);
    let [Event::HalfOpen { half }] = events(&out)[..] else {
        panic!("{out:?}")
    };
    assert_eq!((half.iss.0, half.irs.0), (iss, 9));
    let again = one_seg(b.at(2_100));
    assert_eq!((again.flags, again.seq), ("SA", iss));
    assert_eq!(
        segs(b.at(60_000)).len(),
        2,
        "then after 2 and 4 s, then never"
    );

    let mut replica = Replica::new(config(false));
    let now = Instant::from_millis(1_100);
    replica.apply(now, EventNo(1), &b.log[0]);
    let later = ServiceClock {
        at: now,
        value_us: 640_150_000,
    };
    let stack = Stack::take_over(config(false), secrets(), now, later, EventNo(2), replica);
    let mut heir = Bench::with(stack, &config(false), now);
    let resent = one_seg(heir.drain());
    assert_eq!(
        (resent.flags, resent.seq),
        ("SA", iss),
        "the server may speak first"
    );
    // A client that thinks it is connected challenges that with an ACK, and so opens.
    let out = heir.peer_sends(Seg {
        seq: 10,
        ack: iss.wrapping_add(1),
        ..ACK
    });
    assert!(matches!(events(&out)[..], [Event::Open { .. }]));
    assert_eq!(
        heir.stack.poll_timeout(),
        None,
        "an idle connection has no timer"
    );
}

/// Whose handshake the earlier leader completed is not known for a moment: silence, not RST.
#[test]
fn after_a_takeover_strangers_are_met_with_silence() {
    let now = Instant::from_millis(1_000);
    let replica = Replica::new(config(false));
    let stack = Stack::take_over(config(false), secrets(), now, clock(), EventNo(1), replica);
    let mut b = Bench::with(stack, &config(false), now);
    let stranger = Seg {
        seq: 50,
        ack: 70,
        payload: b"abc".to_vec(),
        ..ACK
    };
    nothing(b.peer_sends(stranger.clone()));
    b.at(5_000);
    assert_eq!(one_seg(b.peer_sends(stranger)).flags, "R");
}

#[test]
fn limits_hold_under_a_flood() {
    let mut c = config(false);
    c.max_connections = 20;
    c.max_half_open = 30;
    c.max_closed = 10;
    let mut b = Bench::new(c);
    for port in 1..=2000u16 {
        b.peer.set_port(port);
        assert_eq!(
            one_seg(b.peer_sends(SYN)).flags,
            "SA",
            "every SYN is answered"
        );
    }
    let out = b.at(1_010);
    assert_eq!(events(&out).len(), 30, "announced handshakes are bounded");
    b.at(30_000);
    for port in 1..=40u16 {
        b.peer.set_port(port);
        let iss = one_seg(b.peer_sends(SYN)).seq;
        b.peer_sends(Seg {
            seq: 1,
            ack: iss.wrapping_add(1),
            ..ACK
        });
    }
    assert_eq!(b.stack.connections(), 20);
    assert_eq!(b.stack.counters().refused_by_limit, 20);
    let conns: Vec<_> = b
        .stack
        .snapshot(b.now)
        .connections()
        .map(|(id, _)| id)
        .collect();
    for conn in conns {
        b.stack.handle_server_reset(b.now, conn);
    }
    let out = b.stable();
    assert_eq!(segs(out).len(), 20, "each is told");
    assert_eq!(b.stack.connections(), 0);
    assert_eq!(b.stack.closed_tuples(), (10, 10));
    assert!(b.log.iter().any(|e| matches!(
        e,
        Event::Reset {
            by: ResetBy::Server,
            ..
        }
    )));
}
