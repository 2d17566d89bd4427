//! Frames as the packet socket carries them: a virtio-net header, an Ethernet header, a packet.
//!
//! The virtio-net header is how a packet socket with `PACKET_VNET_HDR` speaks of checksums and of
//! segmentation: inwards it says whether the kernel (or the sender's kernel, on a virtual link)
//! vouches for the checksum, outwards it asks for the checksum and for cutting a super-segment.

use std::ops::Range;

/// A link-layer (Ethernet) address.
pub type Mac = [u8; 6];

/// Bytes that the sender of an [`OutPacket`] leaves free in front of the IP packet: the virtio-net
/// header (10) and the Ethernet header (14) are written there, so that no payload is copied.
pub const HEADROOM: usize = VNET_LEN + ETHERNET_LEN;

/// Every station of the link.
pub(super) const BROADCAST: Mac = [0xff; 6];

pub(super) const VNET_LEN: usize = 10;
pub(super) const ETHERNET_LEN: usize = 14;
pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(super) const PROTOCOL_ICMP: u8 = 1;
pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_ICMPV6: u8 = 58;

const TCP_CHECKSUM_OFFSET: u16 = 16;
const VNET_NEEDS_CSUM: u8 = 1;
const VNET_DATA_VALID: u8 = 2;
const VNET_GSO_TCPV4: u8 = 1;
const VNET_GSO_TCPV6: u8 = 4;

/// What one received frame is to the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// An IPv4 or IPv6 packet for the VIP, cut to the length its own header states (Ethernet pads
    /// short frames). It may be a super-segment of up to 64 KB. TCP, ICMP errors, or anything else
    /// that the VIP has been sent, echo requests excepted: those are answered here.
    Ip(&'a [u8]),
    /// Another station announces the VIP as its own (ARP or NDP). To a node that does not own the
    /// VIP this is the leader at work; to the owner it is an alarm.
    Claim(Mac),
}

/// One received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Who sent the frame: the next hop towards the client.
    pub source: Mac,
    /// What it holds.
    pub kind: Kind<'a>,
    /// Whether the transport checksum need not be verified: the kernel did, or the packet never
    /// left this machine. When false the receiver verifies it itself.
    pub checksum_ok: bool,
}

/// A TCP packet to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutPacket {
    /// [`HEADROOM`] bytes of any content, then the IP packet.
    pub buf: Vec<u8>,
    /// Where the frame goes: the client itself, or the router before it.
    pub next_hop: Mac,
    /// Cut the payload into segments of this many bytes (the MSS); the packet may then be as large
    /// as 64 KB. `None` for a packet that fits the link.
    pub gso: Option<u16>,
    /// True when the TCP checksum field holds the folded, non-complemented sum of the
    /// pseudo-header only, and the rest is left to the kernel or the card. Segmentation needs it.
    pub partial_checksum: bool,
}

/// The received bytes of one slot, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawFrame<'a> {
    pub(super) destination: Mac,
    pub(super) source: Mac,
    pub(super) ethertype: u16,
    pub(super) body: &'a [u8],
    pub(super) checksum_ok: bool,
}

/// Copies six bytes; `bytes` is at least that long by the callers' own length checks.
pub(super) fn mac_at(bytes: &[u8], at: usize) -> Option<Mac> {
    bytes.get(at..at + 6)?.try_into().ok()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Takes a slot of the socket apart; `None` if it is too short to be a frame.
pub(super) fn parse(slot: &[u8]) -> Option<RawFrame<'_>> {
    let flags = *slot.first()?;
    let frame = slot.get(VNET_LEN..)?;
    let body = frame.get(ETHERNET_LEN..)?;
    Some(RawFrame {
        destination: mac_at(frame, 0)?,
        source: mac_at(frame, 6)?,
        ethertype: u16_at(frame, 12)?,
        body,
        // NEEDS_CSUM: the packet never left the host, its checksum is not filled in.
        // DATA_VALID: the card or the kernel has verified it.
        checksum_ok: flags & (VNET_NEEDS_CSUM | VNET_DATA_VALID) != 0,
    })
}

/// The IP packet in `body` without the padding that Ethernet adds, or `None` if its header is
/// malformed or states more than arrived.
pub(super) fn trim_ip(ethertype: u16, body: &[u8]) -> Option<&[u8]> {
    let first = *body.first()?;
    let total = match (ethertype, first >> 4) {
        (ETHERTYPE_IPV4, 4) => {
            let total = usize::from(u16_at(body, 2)?);
            let header = usize::from(first & 0x0f) * 4;
            if header < 20 || total < header {
                return None;
            }
            total
        }
        // A super-segment of 64 KB still fits the 16-bit field; jumbograms are not accepted.
        (ETHERTYPE_IPV6, 6) => 40 + usize::from(u16_at(body, 4)?),
        _ => return None,
    };
    body.get(..total)
}

/// Where in an outgoing TCP packet (without headroom) the TCP header is; `None` if it is not one
/// that we build: IPv4 with or without options, IPv6 without extension headers.
fn tcp_header(packet: &[u8]) -> Option<(u8, Range<usize>)> {
    let first = *packet.first()?;
    let (version, start) = match first >> 4 {
        4 if *packet.get(9)? == PROTOCOL_TCP => (4, usize::from(first & 0x0f) * 4),
        6 if *packet.get(6)? == PROTOCOL_TCP => (6, 40),
        _ => return None,
    };
    let length = usize::from(*packet.get(start + 12)? >> 4) * 4;
    (length >= 20 && start + length <= packet.len()).then_some((version, start..start + length))
}

/// Writes both headers into the headroom of a TCP packet. False if the packet is not one that can
/// be sent: too short for its headers, or offload asked for something that is not TCP.
pub(super) fn write_headers(packet: &mut OutPacket, source: Mac) -> bool {
    let Some(body) = packet.buf.get(HEADROOM..) else {
        return false;
    };
    let ethertype = match body.first().map(|b| b >> 4) {
        Some(4) => ETHERTYPE_IPV4,
        Some(6) => ETHERTYPE_IPV6,
        _ => return false,
    };
    let mut vnet = [0u8; VNET_LEN];
    if packet.partial_checksum {
        let Some((version, tcp)) = tcp_header(body) else {
            return false;
        };
        let (Ok(csum_start), Ok(header_end)) = (
            u16::try_from(ETHERNET_LEN + tcp.start),
            u16::try_from(ETHERNET_LEN + tcp.end),
        ) else {
            return false;
        };
        vnet[0] = VNET_NEEDS_CSUM;
        vnet[6..8].copy_from_slice(&csum_start.to_ne_bytes());
        vnet[8..10].copy_from_slice(&TCP_CHECKSUM_OFFSET.to_ne_bytes());
        // The kernel refuses segmentation of what needs none.
        if let Some(mss) = packet
            .gso
            .filter(|mss| body.len() - tcp.end > usize::from(*mss))
        {
            vnet[1] = if version == 4 {
                VNET_GSO_TCPV4
            } else {
                VNET_GSO_TCPV6
            };
            vnet[2..4].copy_from_slice(&header_end.to_ne_bytes());
            vnet[4..6].copy_from_slice(&mss.to_ne_bytes());
        }
    } else if packet.gso.is_some() {
        return false;
    }
    packet.buf[..VNET_LEN].copy_from_slice(&vnet);
    write_ethernet(&mut packet.buf, packet.next_hop, source, ethertype);
    true
}

/// Writes the Ethernet header behind the virtio-net header; `buf` has its headroom.
pub(super) fn write_ethernet(buf: &mut [u8], destination: Mac, source: Mac, ethertype: u16) {
    buf[VNET_LEN..VNET_LEN + 6].copy_from_slice(&destination);
    buf[VNET_LEN + 6..VNET_LEN + 12].copy_from_slice(&source);
    buf[VNET_LEN + 12..HEADROOM].copy_from_slice(&ethertype.to_be_bytes());
}

/// The Internet checksum's running sum (RFC 1071) over `bytes`, which start at an even offset.
pub(super) fn sum(mut sum: u32, bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if let [last] = words.remainder() {
        sum += u32::from(*last) << 8;
    }
    (sum & 0xffff) + (sum >> 16)
}

/// Folds a running sum to the 16 bits of the header field, complemented.
pub(super) fn finish(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    let folded = sum as u16;
    !folded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(payload: usize) -> Vec<u8> {
        let total = u16::try_from(40 + payload).unwrap();
        let mut p = vec![0u8; HEADROOM];
        p.extend([0x45, 0]);
        p.extend(total.to_be_bytes());
        p.extend([
            0,
            0,
            0x40,
            0,
            64,
            PROTOCOL_TCP,
            0,
            0,
            10,
            0,
            0,
            1,
            10,
            0,
            0,
            2,
        ]);
        p.extend([0; 12]);
        p.extend([0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        p.resize(HEADROOM + 40 + payload, 7);
        p
    }

    #[test]
    fn padding_is_cut_and_lies_are_refused() {
        let mut body = tcp4(0)[HEADROOM..].to_vec();
        body.resize(46, 0);
        assert_eq!(trim_ip(ETHERTYPE_IPV4, &body).map(<[u8]>::len), Some(40));
        body[3] = 47;
        assert_eq!(trim_ip(ETHERTYPE_IPV4, &body), None);
        body[3] = 12;
        assert_eq!(trim_ip(ETHERTYPE_IPV4, &body), None);
        assert_eq!(trim_ip(ETHERTYPE_IPV6, &body), None);
        assert_eq!(trim_ip(ETHERTYPE_IPV4, &[]), None);
    }

    #[test]
    fn offload_fields_follow_the_packet() {
        let template = OutPacket {
            buf: tcp4(3000),
            next_hop: [2; 6],
            gso: Some(1448),
            partial_checksum: true,
        };
        let mut big = template.clone();
        assert!(write_headers(&mut big, [3; 6]));
        let word = |at: usize| u16::from_ne_bytes([big.buf[at], big.buf[at + 1]]);
        assert_eq!((big.buf[0], big.buf[1]), (1, 1));
        assert_eq!((word(2), word(4), word(6), word(8)), (54, 1448, 34, 16));
        assert_eq!(big.buf[10..24], [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 8, 0]);

        let mut small = OutPacket {
            buf: tcp4(1000),
            ..template.clone()
        };
        assert!(write_headers(&mut small, [3; 6]));
        assert_eq!((small.buf[0], small.buf[1]), (1, 0), "fits: nothing to cut");

        let mut whole = OutPacket {
            partial_checksum: false,
            ..template.clone()
        };
        assert!(
            !write_headers(&mut whole, [3; 6]),
            "segmenting needs the checksum left open"
        );
        let mut short = OutPacket {
            buf: vec![0; 30],
            ..template
        };
        assert!(!write_headers(&mut short, [3; 6]));
    }

    #[test]
    fn checksum_is_trusted_only_when_vouched_for() {
        let mut slot = tcp4(0);
        for (flags, trusted) in [(0, false), (1, true), (2, true), (4, false)] {
            slot[0] = flags;
            assert_eq!(parse(&slot).unwrap().checksum_ok, trusted, "flags {flags}");
        }
        assert_eq!(parse(&slot[..HEADROOM - 1]), None);
    }
}
