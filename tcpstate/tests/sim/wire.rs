//! The wire: it cuts super-segments, completes checksums, and a judge watches what leaves.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared: each test uses a part of it"
)]

use etherparse::{IpSlice, TcpOptionElement, TcpSlice};
use unbroken_tcpstate::{Event, Packet};

/// The packets that a wire makes of one of ours: super-segments cut, checksums complete.
pub fn onto_the_wire(packet: &Packet) -> Vec<Vec<u8>> {
    let ip = packet.ip();
    let ip_len = if ip[0] >> 4 == 6 { 40 } else { 20 };
    let tcp_len = usize::from(ip[ip_len + 12] >> 4) * 4;
    let headers = ip_len + tcp_len;
    let payload = &ip[headers..];
    let size = packet.gso.map_or(payload.len().max(1), usize::from);
    assert!(
        packet.gso.is_some() || ip.len() <= 1500,
        "a packet above the MTU: {}",
        ip.len()
    );
    let pieces: Vec<&[u8]> = if payload.is_empty() {
        vec![&[]]
    } else {
        payload.chunks(size).collect()
    };
    let last = pieces.len() - 1;
    pieces
        .iter()
        .enumerate()
        .map(|(i, piece)| {
            let mut out = ip[..headers].to_vec();
            out.extend_from_slice(piece);
            let len = out.len();
            if ip_len == 40 {
                out[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
            } else {
                out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
                out[10..12].fill(0);
                let sum = !fold(sum(&out[..20]));
                out[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            let seq = u32::from_be_bytes(out[ip_len + 4..ip_len + 8].try_into().unwrap());
            let seq = seq.wrapping_add((i * size) as u32);
            out[ip_len + 4..ip_len + 8].copy_from_slice(&seq.to_be_bytes());
            if i != last {
                out[ip_len + 13] &= !0x09;
            }
            if packet.partial_checksum {
                out[ip_len + 16..ip_len + 18].fill(0);
                let addresses = if ip_len == 40 {
                    &out[8..40]
                } else {
                    &out[12..20]
                };
                let pseudo = sum(addresses) + 6 + (len - ip_len) as u64;
                let check = !fold(pseudo + sum(&out[ip_len..]));
                out[ip_len + 16..ip_len + 18].copy_from_slice(&check.to_be_bytes());
            }
            out
        })
        .collect()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|p| u64::from(p[0]) << 8 | u64::from(*p.get(1).unwrap_or(&0)))
        .sum()
}

fn fold(mut s: u64) -> u16 {
    while s > 0xffff {
        s = (s & 0xffff) + (s >> 16);
    }
    s as u16
}

/// Watches R1 and R4 on everything that leaves, across all leaders.
#[derive(Default)]
pub struct Judge {
    tsval: Option<u32>,
    ack: u64,
    edge: u64,
}

impl Judge {
    /// One packet of ours. `tags`: (end of output, event it depends on), ascending.
    pub fn judge(&mut self, ip: &[u8], log: &[Event], stable: usize, tags: &[(u64, u64)]) {
        let parsed = IpSlice::from_slice(ip).expect("a sound IP packet");
        let tcp = TcpSlice::from_slice(parsed.payload().payload).expect("a sound segment");
        for option in tcp.options_iterator() {
            if let TcpOptionElement::Timestamp(val, _) = option.unwrap() {
                let ahead = self
                    .tsval
                    .is_none_or(|last| val.wrapping_sub(last) as i32 >= 0);
                assert!(ahead, "R4: TSval went back from {:?} to {val}", self.tsval);
                self.tsval = Some(val);
            }
        }
        let Some((opened, state)) = log.iter().enumerate().rev().find_map(|(i, e)| match e {
            Event::Open { state } => Some((i, state)),
            _ => None,
        }) else {
            return;
        };
        if tcp.syn() {
            return;
        }
        let settled = &log[..stable];
        let ended = |events: &[Event]| {
            events
                .iter()
                .any(|e| matches!(e, Event::Reset { .. } | Event::Closed { .. }))
        };
        if tcp.rst() {
            assert!(
                ended(settled),
                "R1: an RST of a connection before its event is stable"
            );
            return;
        }
        if ended(log) {
            return;
        }
        // R1: the ACK field is clamped to what is stable.
        let received: u64 = settled
            .iter()
            .skip(opened)
            .map(|e| match e {
                Event::Data { bytes, .. } => bytes.len() as u64,
                Event::PeerFin { .. } => 1,
                _ => 0,
            })
            .sum();
        let ack = u64::from(
            tcp.acknowledgment_number()
                .wrapping_sub(state.irs.0.wrapping_add(1)),
        );
        assert!(
            ack <= received,
            "R1: acknowledged {ack}, stable is {received}"
        );
        assert!(
            ack >= self.ack,
            "R4: the ACK went back from {} to {ack}",
            self.ack
        );
        self.ack = ack;
        // R4: the right edge, within the rounding of the scaled field.
        let shift = state.receive_shift().unwrap_or(0);
        let edge = ack + (u64::from(tcp.window_size()) << shift);
        let fin = settled.iter().any(|e| matches!(e, Event::PeerFin { .. }));
        assert!(
            fin || edge + (1 << shift) > self.edge,
            "R4: the right edge went back from {} to {edge}",
            self.edge
        );
        self.edge = self.edge.max(edge);
        // R1: payload, and the FIN.
        let start = u64::from(
            tcp.sequence_number()
                .wrapping_sub(state.iss.0.wrapping_add(1)),
        );
        let end = start + tcp.payload().len() as u64;
        if !tcp.payload().is_empty() {
            let tag = tags
                .iter()
                .find(|(upto, _)| *upto >= end)
                .map(|(_, tag)| *tag);
            let tag = tag.expect("output was produced before it left");
            assert!(
                tag <= stable as u64,
                "R1: output depends on {tag}, stable is {stable}"
            );
        }
        if tcp.fin() {
            let fin_at = settled.iter().find_map(|e| match e {
                Event::LocalFin { offset, .. } => Some(*offset),
                _ => None,
            });
            assert_eq!(fin_at, Some(end), "R1: a FIN before its event is stable");
        }
    }
}
