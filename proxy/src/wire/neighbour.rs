//! How the VIP behaves as a neighbour: ARP (RFC 826), neighbour discovery (RFC 4861), echo
//! (RFC 792, RFC 4443), and the announcements by which a new owner makes itself known.
//!
//! Pure functions from a received frame to what it asks for, and a sans-IO schedule. Whether an
//! answer may be sent is not decided here: a node that does not own the VIP drops it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use etherparse::{Icmpv4Slice, Icmpv4Type, Ipv4HeaderSlice, Ipv6HeaderSlice};
use pnet::packet::arp::{
    ArpHardwareTypes, ArpOperation, ArpOperations, ArpPacket, MutableArpPacket,
};
use pnet::packet::ethernet::EtherTypes;
use pnet::util::MacAddr;

use super::packet::{
    BROADCAST, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, HEADROOM, Mac, PROTOCOL_ICMP,
    PROTOCOL_ICMPV6, RawFrame, finish, mac_at, sum, trim_ip, write_ethernet,
};
use crate::clock::BootTime;
use crate::fault::planted;

const ECHO_REPLY_V6: u8 = 129;
const ECHO_REQUEST_V6: u8 = 128;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const OPTION_SOURCE_LINK: u8 = 1;
const OPTION_TARGET_LINK: u8 = 2;
const FLAG_SOLICITED: u8 = 0x40;
const FLAG_OVERRIDE: u8 = 0x20;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// What a frame means to the neighbourhood of the VIP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// A packet for the VIP that is none of this module's business.
    Packet(&'a [u8]),
    /// Asks for this answer: a whole frame with headers and headroom.
    Answer(Vec<u8>),
    /// Another station says that the VIP is its own.
    Claim(Mac),
    /// Malformed, fragmented echo, or merely about the VIP.
    Nothing,
}

/// The link-layer addresses of the VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Station {
    /// What our frames bear as their source, and so what switches learn.
    pub(super) source: Mac,
    /// Where neighbours are told to send what is for the VIP.
    pub(super) home: Mac,
}

impl Station {
    /// A station like any other.
    pub(super) const fn at(mac: Mac) -> Self {
        Self {
            source: mac,
            home: mac,
        }
    }
}

/// The link-layer address that belongs to `vip` and to no machine: locally administered, readable for
/// IPv4. Every replica comes to the same.
pub(super) fn virtual_mac(vip: IpAddr) -> Mac {
    let [a, b, c, d] = match vip {
        IpAddr::V4(vip) => vip.octets(),
        IpAddr::V6(vip) => {
            let digest = ring::digest::digest(&ring::digest::SHA256, &vip.octets());
            let start = digest.as_ref().first_chunk();
            *start.expect("SHA-256 has 32 bytes")
        }
    };
    [0x02, 0x75, a, b, c, d]
}

/// Reads a frame that the filter let through. `station` is the VIP's on this link.
pub(super) fn read<'a>(frame: &RawFrame<'a>, vip: IpAddr, station: Station) -> Meaning<'a> {
    match (vip, frame.ethertype) {
        (IpAddr::V4(vip), ETHERTYPE_ARP) => arp(frame, vip, station),
        (IpAddr::V4(vip), ETHERTYPE_IPV4) => ipv4(frame, vip, station),
        (IpAddr::V6(vip), ETHERTYPE_IPV6) => ipv6(frame, vip, station),
        _ => Meaning::Nothing,
    }
}

fn with_headroom(body: usize) -> Vec<u8> {
    vec![0; HEADROOM + body]
}

fn arp<'a>(frame: &RawFrame<'a>, vip: Ipv4Addr, station: Station) -> Meaning<'a> {
    let Some(packet) = ArpPacket::new(frame.body) else {
        return Meaning::Nothing;
    };
    let well_formed = packet.get_hardware_type() == ArpHardwareTypes::Ethernet
        && packet.get_protocol_type() == EtherTypes::Ipv4
        && packet.get_hw_addr_len() == 6
        && packet.get_proto_addr_len() == 4;
    if !well_formed {
        return Meaning::Nothing;
    }
    let sender: Mac = packet.get_sender_hw_addr().octets();
    if packet.get_sender_proto_addr() == vip {
        return if sender == station.home {
            Meaning::Nothing
        } else {
            Meaning::Claim(sender)
        };
    }
    if packet.get_operation() != ArpOperations::Request || packet.get_target_proto_addr() != vip {
        return Meaning::Nothing;
    }
    // A probe (RFC 5227, sender address 0.0.0.0) is answered like any other request: it is how
    // another host finds out that the address is taken.
    let asker = packet.get_sender_proto_addr();
    Meaning::Answer(arp_frame(
        ArpOperations::Reply,
        vip,
        station,
        asker,
        sender,
        frame.source,
    ))
}

fn arp_frame(
    operation: ArpOperation,
    vip: Ipv4Addr,
    station: Station,
    target: Ipv4Addr,
    target_mac: Mac,
    to: Mac,
) -> Vec<u8> {
    let mut buf = with_headroom(ArpPacket::minimum_packet_size());
    {
        let mut packet = MutableArpPacket::new(&mut buf[HEADROOM..]).expect("sized for it");
        packet.set_hardware_type(ArpHardwareTypes::Ethernet);
        packet.set_protocol_type(EtherTypes::Ipv4);
        packet.set_hw_addr_len(6);
        packet.set_proto_addr_len(4);
        packet.set_operation(operation);
        packet.set_sender_hw_addr(MacAddr::from(station.home));
        packet.set_sender_proto_addr(vip);
        packet.set_target_hw_addr(MacAddr::from(target_mac));
        packet.set_target_proto_addr(target);
    }
    write_ethernet(&mut buf, to, station.source, ETHERTYPE_ARP);
    buf
}

fn ipv4<'a>(frame: &RawFrame<'a>, vip: Ipv4Addr, station: Station) -> Meaning<'a> {
    let Some(packet) = trim_ip(frame.ethertype, frame.body) else {
        return Meaning::Nothing;
    };
    let Ok(header) = Ipv4HeaderSlice::from_slice(packet) else {
        return Meaning::Nothing;
    };
    if header.destination_addr() != vip {
        return Meaning::Nothing;
    }
    if header.protocol().0 != PROTOCOL_ICMP {
        return Meaning::Packet(packet);
    }
    let icmp = &packet[header.slice().len()..];
    let Ok(message) = Icmpv4Slice::from_slice(icmp) else {
        return Meaning::Nothing;
    };
    if !matches!(message.icmp_type(), Icmpv4Type::EchoRequest(_)) {
        return Meaning::Packet(packet);
    }
    let intact = frame.checksum_ok || finish(sum(0, icmp)) == 0;
    let asker = header.source_addr();
    // RFC 1122 §3.2.2: no answer to what was sent to many, or claims to come from many.
    let single = !asker.is_multicast() && !asker.is_broadcast() && !asker.is_unspecified();
    if !intact || !single || header.is_fragmenting_payload() || frame.destination[0] & 1 == 1 {
        return Meaning::Nothing;
    }
    let mut buf = with_headroom(20 + icmp.len());
    let reply = &mut buf[HEADROOM..];
    reply[0] = 0x45;
    let total = u16::try_from(20 + icmp.len()).expect("no longer than the request");
    reply[2..4].copy_from_slice(&total.to_be_bytes());
    reply[6] = 0x40; // don't fragment; the request came in one piece
    reply[8] = 64;
    reply[9] = PROTOCOL_ICMP;
    reply[12..16].copy_from_slice(&vip.octets());
    reply[16..20].copy_from_slice(&asker.octets());
    let checksum = finish(sum(0, &reply[..20]));
    reply[10..12].copy_from_slice(&checksum.to_be_bytes());
    reply[20..].copy_from_slice(icmp);
    reply[20..24].fill(0); // type 0: echo reply
    let checksum = finish(sum(0, &reply[20..]));
    reply[22..24].copy_from_slice(&checksum.to_be_bytes());
    write_ethernet(&mut buf, frame.source, station.source, ETHERTYPE_IPV4);
    Meaning::Answer(buf)
}

fn ipv6<'a>(frame: &RawFrame<'a>, vip: Ipv6Addr, station: Station) -> Meaning<'a> {
    let Some(packet) = trim_ip(frame.ethertype, frame.body) else {
        return Meaning::Nothing;
    };
    let Ok(header) = Ipv6HeaderSlice::from_slice(packet) else {
        return Meaning::Nothing;
    };
    let (source, destination) = (header.source_addr(), header.destination_addr());
    let icmp = &packet[40..];
    if header.next_header().0 != PROTOCOL_ICMPV6 {
        return if destination == vip {
            Meaning::Packet(packet)
        } else {
            Meaning::Nothing
        };
    }
    let Some(&kind) = icmp.first() else {
        return Meaning::Nothing;
    };
    let intact = || frame.checksum_ok || finish(sum(pseudo(source, destination, icmp), icmp)) == 0;
    match kind {
        ECHO_REQUEST_V6 if destination == vip => {
            let single = !source.is_multicast() && !source.is_unspecified();
            if icmp.len() < 8 || !single || !intact() {
                return Meaning::Nothing;
            }
            Meaning::Answer(icmpv6_frame(
                ECHO_REPLY_V6,
                vip,
                station,
                source,
                frame.source,
                64,
                |b| {
                    b.extend_from_slice(&icmp[4..]);
                },
            ))
        }
        SOLICITATION | ADVERTISEMENT => {
            // RFC 4861 §7.1: hop limit 255 proves that no router forwarded it.
            let valid = header.hop_limit() == 255
                && icmp.len() >= 24
                && icmp[1] == 0
                && icmp[8..24] == vip.octets()
                && intact();
            if !valid {
                Meaning::Nothing
            } else if kind == SOLICITATION {
                solicitation(frame, vip, station, source, icmp)
            } else {
                let owner = link_option(icmp, OPTION_TARGET_LINK).unwrap_or(frame.source);
                if owner == station.home {
                    Meaning::Nothing
                } else {
                    Meaning::Claim(owner)
                }
            }
        }
        _ if destination == vip => Meaning::Packet(packet),
        _ => Meaning::Nothing,
    }
}

fn solicitation<'a>(
    frame: &RawFrame<'a>,
    vip: Ipv6Addr,
    station: Station,
    source: Ipv6Addr,
    icmp: &[u8],
) -> Meaning<'a> {
    if source == vip {
        return Meaning::Claim(frame.source);
    }
    // RFC 4861 §7.2.4: who asks with no address (duplicate address detection) is answered by
    // telling everyone.
    Meaning::Answer(if source.is_unspecified() {
        advertisement(vip, station, ALL_NODES, ALL_NODES_MAC, FLAG_OVERRIDE)
    } else {
        let to = link_option(icmp, OPTION_SOURCE_LINK).unwrap_or(frame.source);
        advertisement(vip, station, source, to, FLAG_SOLICITED | FLAG_OVERRIDE)
    })
}

/// The link-layer address option `kind` of a neighbour message.
fn link_option(icmp: &[u8], kind: u8) -> Option<Mac> {
    let mut rest = icmp.get(24..)?;
    while let [found, units, ..] = rest {
        let length = usize::from(*units) * 8;
        if length == 0 {
            return None;
        }
        if *found == kind {
            return mac_at(rest.get(..length)?, 2);
        }
        rest = rest.get(length..)?;
    }
    None
}

fn advertisement(vip: Ipv6Addr, station: Station, to: Ipv6Addr, to_mac: Mac, flags: u8) -> Vec<u8> {
    icmpv6_frame(ADVERTISEMENT, vip, station, to, to_mac, 255, |body| {
        body.extend([flags, 0, 0, 0]);
        body.extend(vip.octets());
        body.extend([OPTION_TARGET_LINK, 1]);
        body.extend(station.home);
    })
}

/// The sum of the IPv6 pseudo-header (RFC 8200 §8.1) of an ICMPv6 message.
fn pseudo(source: Ipv6Addr, destination: Ipv6Addr, icmp: &[u8]) -> u32 {
    let length = u32::try_from(icmp.len()).expect("within an IPv6 packet");
    let mut total = sum(0, &source.octets());
    total = sum(total, &destination.octets());
    total = sum(total, &length.to_be_bytes());
    sum(total, &[0, 0, 0, PROTOCOL_ICMPV6])
}

fn icmpv6_frame(
    kind: u8,
    vip: Ipv6Addr,
    station: Station,
    to: Ipv6Addr,
    to_mac: Mac,
    hop_limit: u8,
    body: impl FnOnce(&mut Vec<u8>),
) -> Vec<u8> {
    let mut buf = with_headroom(40);
    buf.extend([kind, 0, 0, 0]);
    body(&mut buf);
    let icmp_at = HEADROOM + 40;
    let checksum = finish(sum(pseudo(vip, to, &buf[icmp_at..]), &buf[icmp_at..]));
    buf[icmp_at + 2..icmp_at + 4].copy_from_slice(&checksum.to_be_bytes());
    let length = u16::try_from(buf.len() - icmp_at).expect("no longer than the request");
    let header = &mut buf[HEADROOM..icmp_at];
    header[0] = 0x60;
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header[6] = PROTOCOL_ICMPV6;
    header[7] = hop_limit;
    header[8..24].copy_from_slice(&vip.octets());
    header[24..40].copy_from_slice(&to.octets());
    write_ethernet(&mut buf, to_mac, station.source, ETHERTYPE_IPV6);
    buf
}

/// The frames by which the owner of `vip` makes itself known: a gratuitous ARP in request form and
/// one in reply form, since there are neighbours that heed only the one or the other; for
/// IPv6 an unsolicited advertisement with the override flag (RFC 4861 §7.2.6).
pub(super) fn announcement(vip: IpAddr, station: Station) -> Vec<Vec<u8>> {
    match vip {
        IpAddr::V4(vip) => vec![
            arp_frame(ArpOperations::Request, vip, station, vip, [0; 6], BROADCAST),
            arp_frame(
                ArpOperations::Reply,
                vip,
                station,
                vip,
                station.home,
                BROADCAST,
            ),
        ],
        IpAddr::V6(vip) => vec![advertisement(
            vip,
            station,
            ALL_NODES,
            ALL_NODES_MAC,
            FLAG_OVERRIDE,
        )],
    }
}

/// After taking over: spaced, because a switch or a neighbour may miss some.
const BURST: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
const PERIOD: Duration = Duration::from_secs(30);
/// The least time between two announcements that foreign claims provoke: two owners that contradict
/// each other must not fill the link.
const CLAIM_SPACING: Duration = Duration::from_millis(200);

/// When to announce the VIP: a burst on taking it, then periodically, and again whenever another
/// station announces it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Announcer {
    since: Option<BootTime>,
    /// Announcements of the burst that were made.
    step: usize,
    next: Option<BootTime>,
    last: Option<BootTime>,
}

impl Announcer {
    /// The VIP became ours at `now`: the burst begins.
    pub fn start(&mut self, now: BootTime) {
        *self = Self {
            since: Some(now),
            step: 0,
            next: Some(now),
            last: None,
        };
    }

    /// The VIP is no longer ours.
    pub fn stop(&mut self) {
        *self = Self::default();
    }

    /// Another station announced the VIP at `now`: ours is brought forward, within its rate.
    pub fn handle_claim(&mut self, now: BootTime) {
        if planted!(ClaimsUnanswered) {
            return;
        }
        let Some(next) = self.next else { return };
        let earliest = self.last.map_or(now, |last| now.max(last + CLAIM_SPACING));
        self.next = Some(next.min(earliest));
    }

    /// When [`Announcer::handle_timeout`] is to be called; `None` while the VIP is not ours.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<BootTime> {
        self.next
    }

    /// Whether an announcement is due at `now`; if so it counts as made.
    pub fn handle_timeout(&mut self, now: BootTime) -> bool {
        let (Some(since), Some(next)) = (self.since, self.next) else {
            return false;
        };
        if now < next {
            return false;
        }
        // A late wake-up makes one announcement, not all that were missed.
        while self.step < BURST.len() && since + BURST[self.step] <= now {
            self.step += 1;
        }
        self.last = Some(now);
        self.next = Some(
            BURST
                .get(self.step)
                .map_or(now + PERIOD, |after| since + *after),
        );
        true
    }
}

#[cfg(test)]
mod tests;
