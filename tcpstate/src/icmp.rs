//! Routers' word that a packet was too large for what lies behind them (path MTU discovery: RFC 1191,
//! RFC 8201).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::IpSlice;

use crate::checksum;
use crate::conn_state::Tuple;
use crate::output::Checksum;
use crate::seq::SeqNum;

const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const PACKET_TOO_BIG: u8 = 2;
/// The ICMP header; the packet that was too large follows.
const HEADER: usize = 8;
/// No path of ours is taken for smaller, whoever says so: Linux's `min_pmtu`, and RFC 8200 §5.
const MTU_MIN_V4: u16 = 552;
const MTU_MIN_V6: u16 = 1280;

/// A packet of ours was too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooBig {
    pub(crate) tuple: Tuple,
    /// Of the packet; whoever forges this word must know it (RFC 5927 §4).
    pub(crate) seq: SeqNum,
    /// What fits, IP header included.
    pub(crate) mtu: u16,
}

impl TooBig {
    /// Reads an IP packet to `vip`; `None` for anything else.
    pub(crate) fn parse(packet: &[u8], vip: IpAddr, trust: Checksum) -> Option<Self> {
        let ip = IpSlice::from_slice(packet).ok()?;
        let (source, destination) = (ip.source_addr(), ip.destination_addr());
        if ip.is_fragmenting_payload() || destination != vip {
            return None;
        }
        let icmp = ip.payload().payload;
        let (kind, mtu, base) = match vip {
            IpAddr::V4(_) if ip.payload_ip_number() == etherparse::IpNumber::ICMP => {
                let kind = [DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED];
                let mtu = u16::from_be_bytes([*icmp.get(6)?, *icmp.get(7)?]);
                (kind, mtu.max(MTU_MIN_V4), 0)
            }
            IpAddr::V6(_) if ip.payload_ip_number() == etherparse::IpNumber::IPV6_ICMP => {
                let mtu = u32::from_be_bytes(icmp.get(4..8)?.try_into().ok()?);
                let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
                let number = u64::from(etherparse::IpNumber::IPV6_ICMP.0);
                let base = checksum::pseudo_header_of(source, destination, number, icmp.len());
                ([PACKET_TOO_BIG, 0], mtu.max(MTU_MIN_V6), base)
            }
            _ => return None,
        };
        let sound = || checksum::fold(base + checksum::sum(icmp)) == 0xffff;
        if !icmp.starts_with(&kind) || (trust == Checksum::Verify && !sound()) {
            return None;
        }
        let (remote, tcp) = quoted(icmp.get(HEADER..)?, vip)?;
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        Some(Self {
            tuple: Tuple {
                local: SocketAddr::new(vip, port(0)?),
                remote: SocketAddr::new(remote, port(2)?),
            },
            seq: SeqNum(u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?)),
            mtu,
        })
    }
}

/// The packet of ours that a router quotes: whom it was for, and the start of its TCP header. It is cut
/// short, so that a parser of whole packets refuses it.
fn quoted(packet: &[u8], vip: IpAddr) -> Option<(IpAddr, &[u8])> {
    let tcp = etherparse::IpNumber::TCP.0;
    match vip {
        IpAddr::V4(vip) => {
            let first = *packet.first()?;
            let ours = first >> 4 == 4 && *packet.get(9)? == tcp;
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let remote: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            let body = packet.get(usize::from(first & 0x0f) * 4..)?;
            (ours && source == vip.octets()).then(|| (Ipv4Addr::from(remote).into(), body))
        }
        IpAddr::V6(vip) => {
            let ours = *packet.first()? >> 4 == 6 && *packet.get(6)? == tcp;
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let remote: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let body = packet.get(40..)?;
            (ours && source == vip.octets()).then(|| (Ipv6Addr::from(remote).into(), body))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);

    /// What a router at 10.98.0.14 says of a packet of ours.
    fn message(mtu: u16) -> Vec<u8> {
        let mut icmp = vec![3, 4, 0, 0, 0, 0];
        icmp.extend(mtu.to_be_bytes());
        icmp.extend([0x45, 0, 5, 220, 0, 0, 0x40, 0, 63, 6, 0, 0]);
        icmp.extend(VIP.octets());
        icmp.extend([10, 99, 0, 10, 0, 80, 0x9c, 0x40, 1, 2, 3, 4]);
        let check = !checksum::fold(checksum::sum(&icmp));
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        let total = u8::try_from(20 + icmp.len()).unwrap();
        let mut packet = vec![0x45, 0, 0, total, 0, 0, 0, 0, 64, 1, 0, 0, 10, 98, 0, 14];
        packet.extend(VIP.octets());
        packet.extend(icmp);
        packet
    }

    #[test]
    fn the_connection_and_what_fits_are_read() {
        let read = |packet: &[u8]| TooBig::parse(packet, VIP.into(), Checksum::Verify);
        let found = read(&message(1200)).unwrap();
        assert_eq!(found.tuple.local, "10.98.0.100:80".parse().unwrap());
        assert_eq!(found.tuple.remote, "10.99.0.10:40000".parse().unwrap());
        assert_eq!((found.seq, found.mtu), (SeqNum(0x0102_0304), 1200));
        // RFC 1191 §5: routers of old state none; and nobody makes our segments tiny.
        assert_eq!(read(&message(0)).unwrap().mtu, MTU_MIN_V4);
        assert_eq!(read(&message(68)).unwrap().mtu, MTU_MIN_V4);
    }

    #[test]
    fn anything_else_is_not_it() {
        let read = |packet: &[u8]| TooBig::parse(packet, VIP.into(), Checksum::Verify);
        let right = message(1200);
        for cut in 0..right.len() {
            assert_eq!(read(&right[..cut]), None, "cut at {cut}");
        }
        for (at, byte) in [(9, 6), (20, 8), (21, 1), (22, 9), (27, 0xb1), (40, 9)] {
            let mut wrong = right.clone();
            wrong[at] = byte;
            assert_eq!(read(&wrong), None, "byte {at}");
        }
    }
}
