//! Whatever a peer sends: no panic, no unbounded memory, and a replica that accepts every event.
#![allow(clippy::cast_possible_truncation, reason = "small numbers, in tests")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod vocabulary;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use unbroken_tcpstate::{
    Checksum, ConnId, Event, EventNo, Image, Instant, Output, Replica, ServiceClock, Stack,
};
use vocabulary::*;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 13) % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
}

#[test]
fn random_bytes_are_refused() {
    let mut rng = Rng(99);
    let mut b = Bench::new(config(false));
    let valid = build(b.peer, SocketAddr::new(b.vip, 80), &SYN);
    for _ in 0..60_000 {
        let mut packet = if rng.below(3) == 0 {
            let n = rng.below(100) as usize;
            rng.bytes(n)
        } else {
            valid.clone()
        };
        for _ in 0..=rng.below(4) {
            if !packet.is_empty() {
                let at = rng.below(packet.len() as u64) as usize;
                packet[at] = rng.below(256) as u8;
            }
        }
        packet.truncate(rng.below(120) as usize + 1);
        b.stack
            .handle_packet(b.now, &packet, LINK, Checksum::Verified);
        while let Some(output) = b.stack.poll_output() {
            drop(output);
        }
        let bytes = Bytes::from(packet);
        let _ = Event::decode(&bytes);
        let _ = Image::decode(&bytes);
    }
    assert!(b.stack.connections() < 10);
}

#[test]
fn decoders_survive_damage() {
    let mut rng = Rng(5);
    let mut b = Bench::new(config(true));
    let (conn, iss) = b.open(7);
    let ack = iss.wrapping_add(1);
    b.peer_sends(Seg {
        seq: 8,
        ack,
        payload: b"hello".to_vec(),
        ..ACK
    });
    b.stack.handle_server_fin(b.now, conn);
    b.peer_sends(Seg {
        flags: "R",
        seq: 13,
        ..ACK
    });
    b.drain();
    let image = b.stack.snapshot(b.now).encode();
    for event in &b.log {
        let mut encoded = Vec::new();
        event.encode(&mut encoded);
        assert_eq!(
            &Event::decode(&Bytes::from(encoded.clone())).unwrap(),
            event
        );
        for _ in 0..3_000 {
            let mut damaged = encoded.clone();
            let at = rng.below(damaged.len() as u64) as usize;
            damaged[at] = rng.below(256) as u8;
            damaged.truncate(rng.below(damaged.len() as u64 + 1) as usize);
            let _ = Event::decode(&Bytes::from(damaged));
        }
        encoded[0] = 200;
        assert!(
            Event::decode(&Bytes::from(encoded)).is_err(),
            "a version from the future"
        );
    }
    for at in 0..image.len() {
        let mut damaged = image.clone();
        damaged[at] ^= 1 << rng.below(8);
        let _ = Image::decode(&damaged);
        assert!(Image::decode(&image[..at]).is_err());
    }
}

/// A peer that sends anything near what it should, while everything else goes on.
#[test]
fn hostile_segments_break_nothing() {
    for seed in 1..=60u64 {
        hostile(seed);
    }
}

fn hostile(seed: u64) {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let ipv6 = seed.is_multiple_of(2);
    let mut c = config(ipv6);
    c.max_connections = 8;
    c.max_closed = 16;
    c.max_half_open = 4;
    c.receive_capacity = 40_000;
    c.transmit_capacity = 20_000;
    c.retained_output_max = 20_000;
    c.segmentation_offload = seed.is_multiple_of(3);
    let mut now = Instant::from_millis(1_000);
    let mut clock = ServiceClock {
        at: now,
        value_us: 50_000_000,
    };
    let mut stack = Stack::new(c.clone(), secrets(), now, clock, EventNo(1));
    let mut replica = Replica::new(c.clone());
    let mut bench = Bench::new(c.clone());
    let mut log: Vec<Event> = Vec::new();
    let mut iss = 0u32;
    let mut produced = std::collections::BTreeMap::<ConnId, u64>::new();
    for _ in 0..1_500 {
        now = now + Duration::from_micros(rng.pick(&[0, 10, 300, 5_000, 200_000]));
        let conns: Vec<ConnId> = stack
            .snapshot(now)
            .connections()
            .map(|(id, _)| id)
            .collect();
        let some = if conns.is_empty() {
            ConnId(1)
        } else {
            rng.pick(&conns)
        };
        let all = EventNo(stack.next_event().0 - 1);
        match rng.below(12) {
            0 => {
                bench.peer.set_port(1_000 + rng.below(12) as u16);
                let syn = Seg {
                    seq: 100,
                    shift: rng.pick(&[None, Some(0), Some(14)]),
                    ..SYN
                };
                let packet = build(bench.peer, SocketAddr::new(c.vip, 80), &syn);
                stack.handle_packet(now, &packet, LINK, Checksum::Verify);
            }
            1 => {
                let last = Seg {
                    seq: 101,
                    ack: iss.wrapping_add(1),
                    ..ACK
                };
                let packet = build(bench.peer, SocketAddr::new(c.vip, 80), &last);
                stack.handle_packet(now, &packet, LINK, Checksum::Verify);
            }
            2 => stack.handle_stable(now, EventNo(rng.below(all.0 + 1))),
            3 => stack.handle_stable(now, all),
            4 => {
                let n = stack.output_room(some).min(rng.below(9_000) as usize);
                let tag = EventNo(rng.below(all.0 + 1));
                stack.handle_server_bytes(now, some, &vec![3; n], tag);
                *produced.entry(some).or_default() += n as u64;
            }
            5 if rng.below(6) == 0 => stack.handle_server_fin(now, some),
            6 if rng.below(12) == 0 => stack.handle_server_reset(now, some),
            7 => stack.handle_consumed(now, some, rng.below(100_000)),
            8 => stack.handle_timeout(now),
            9 if rng.below(10) == 0 => {
                // The leader dies; its heir knows what the replica knows.
                let image = replica.snapshot(now);
                clock = ServiceClock {
                    at: now,
                    value_us: clock.read_us(now) + 1_000,
                };
                let next = EventNo(log.len() as u64 + 1);
                let heir = std::mem::replace(
                    &mut replica,
                    Replica::restore(c.clone(), now, Image::decode(&image.encode()).unwrap()),
                );
                stack = Stack::take_over(c.clone(), secrets(), now, clock, next, heir);
            }
            _ => {
                // Near the truth, or at the edges of the number space.
                let Some(state) = stack.state(some).cloned() else {
                    continue;
                };
                let near = [
                    0u32,
                    1,
                    2,
                    1460,
                    30_000,
                    70_000,
                    1 << 30,
                    u32::MAX / 2,
                    u32::MAX,
                ];
                let off = |rng: &mut Rng| {
                    let n = rng.pick(&near);
                    if rng.below(2) == 0 {
                        n
                    } else {
                        n.wrapping_neg()
                    }
                };
                let len = rng.pick(&[0usize, 0, 1, 100, 1460, 20_000, 60_000]);
                let received = state.received as u32;
                let (a, s) = (off(&mut rng), off(&mut rng));
                let seg = Seg {
                    flags: rng.pick(&["A", "A", "A", "AP", "FA", "R", "RA", "S", "SA", ""]),
                    seq: state
                        .irs
                        .0
                        .wrapping_add(1 + received)
                        .wrapping_add(s / 4 * rng.below(2) as u32),
                    ack: state
                        .iss
                        .0
                        .wrapping_add(1 + state.acked as u32)
                        .wrapping_add(a),
                    window: rng.pick(&[0, 1, 500, 65_535]),
                    ts: rng.pick(&[None, Some((501, 0)), Some((502, 9)), Some((1 << 31, 0))]),
                    sack: if rng.below(4) == 0 {
                        vec![(a, s)]
                    } else {
                        Vec::new()
                    },
                    payload: rng.bytes(len),
                    ..ACK
                };
                let packet = build(state.tuple.remote, state.tuple.local, &seg);
                stack.handle_packet(now, &packet, LINK, Checksum::Verify);
            }
        }
        let mut outputs = 0;
        while let Some(output) = stack.poll_output() {
            outputs += 1;
            match output {
                Output::Replicate { number, event } => {
                    assert_eq!(number.0 as usize, log.len() + 1);
                    replica.apply(now, number, &event);
                    log.push(event);
                }
                Output::Transmit(packet) => {
                    let seg = parse(packet.ip(), !packet.partial_checksum);
                    if seg.flags == "SA" {
                        iss = seg.seq;
                    }
                    assert!(packet.gso.is_some() || packet.ip().len() <= 1_500);
                    stack.recycle(packet.buf);
                }
                Output::Room(_) | Output::Notice(_) => {}
            }
        }
        assert!(outputs < 400, "one input, {outputs} outputs");
        assert!(stack.connections() <= 8);
        let (ours, theirs) = (stack.snapshot(now), replica.snapshot(now));
        let ours: Vec<_> = ours.connections().collect();
        let theirs: Vec<_> = theirs.connections().collect();
        assert_eq!(
            ours,
            theirs,
            "leader and replica agree, seed {seed}, {:?}",
            log.last()
        );
        assert!(stack.closed_tuples().0 <= 16);
    }
    let opened = log
        .iter()
        .filter(|e| matches!(e, Event::Open { .. }))
        .count();
    assert!(opened > 0, "seed {seed} opened nothing");
}
