//! SEG.*: reading segments from IP packets, and writing our own.
//!
//! Everything here is a pure function of bytes; a packet that is not a whole, sound TCP segment is
//! refused with a [`Refused`] that says why, for the counters.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpSlice, TcpOptionElement, TcpSlice};

use crate::checksum;
use crate::config::MSS_MIN;
use crate::conn_state::{LinkAddr, Tuple};
use crate::fault::planted;
use crate::output::{Checksum, HEADROOM, Packet};
use crate::seq::SeqNum;

/// The control bits (RFC 9293 §3.1).
pub(crate) mod flag {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
}

/// A segment from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    pub(crate) tuple: Tuple,
    pub(crate) seq: SeqNum,
    /// SEG.ACK; meaningless without the ACK flag.
    pub(crate) ack: SeqNum,
    pub(crate) flags: u8,
    /// SEG.WND as on the wire, not scaled.
    pub(crate) window: u16,
    pub(crate) options: Options,
    pub(crate) payload: &'a [u8],
}

/// The options we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Options {
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
    /// TSval, TSecr.
    pub(crate) timestamp: Option<(u32, u32)>,
    /// The first SACK block, if any: enough to know that the client misses something.
    pub(crate) sack: Option<(SeqNum, SeqNum)>,
}

/// Why a packet is no segment of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not a whole IP packet with a whole TCP segment.
    Malformed,
    /// A fragment: the MSS makes them needless, and they are a favourite of attackers.
    Fragment,
    /// Not TCP, or not to this address.
    NotOurs,
    /// Damaged on the way.
    Checksum,
}

impl<'a> Segment<'a> {
    /// Reads an IP packet to `vip`.
    pub(crate) fn parse(packet: &'a [u8], vip: IpAddr, trust: Checksum) -> Result<Self, Refused> {
        let ip = IpSlice::from_slice(packet).map_err(|_| Refused::Malformed)?;
        if ip.is_fragmenting_payload() {
            return Err(Refused::Fragment);
        }
        let (source, destination) = (ip.source_addr(), ip.destination_addr());
        if ip.payload_ip_number() != etherparse::IpNumber::TCP
            || destination != vip
            || !is_unicast(source)
        {
            return Err(Refused::NotOurs);
        }
        // Borrow from `packet`, not from `ip`: both are the same bytes.
        let body = ip.payload().payload;
        let tcp = TcpSlice::from_slice(body).map_err(|_| Refused::Malformed)?;
        if tcp.source_port() == 0 || tcp.destination_port() == 0 {
            return Err(Refused::Malformed);
        }
        let verify = trust == Checksum::Verify && !planted!(ChecksumsUnchecked);
        if verify && !checksum::tcp_is_sound(source, destination, body) {
            return Err(Refused::Checksum);
        }
        let bit = |set: bool, flag: u8| if set { flag } else { 0 };
        let flags = bit(tcp.fin(), flag::FIN)
            | bit(tcp.syn(), flag::SYN)
            | bit(tcp.rst(), flag::RST)
            | bit(tcp.psh(), flag::PSH)
            | bit(tcp.ack(), flag::ACK);
        Ok(Self {
            tuple: Tuple {
                local: SocketAddr::new(destination, tcp.destination_port()),
                remote: SocketAddr::new(source, tcp.source_port()),
            },
            seq: SeqNum(tcp.sequence_number()),
            ack: SeqNum(tcp.acknowledgment_number()),
            flags,
            window: tcp.window_size(),
            options: Options::parse(&tcp),
            payload: tcp.payload(),
        })
    }

    pub(crate) const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// SEG.LEN: payload, and one each for SYN and FIN.
    pub(crate) fn len(&self) -> u64 {
        self.payload.len() as u64 + u64::from(self.has(flag::SYN)) + u64::from(self.has(flag::FIN))
    }
}

impl Options {
    /// Unknown options are skipped; a malformed one ends the list (as Linux does).
    fn parse(tcp: &TcpSlice<'_>) -> Self {
        let mut options = Self::default();
        for option in tcp.options_iterator() {
            match option {
                Ok(TcpOptionElement::MaximumSegmentSize(mss)) => options.mss = Some(mss),
                // RFC 7323 §2.3: more than 14 counts as 14.
                Ok(TcpOptionElement::WindowScale(shift)) => {
                    options.window_scale = Some(shift.min(14));
                }
                Ok(TcpOptionElement::SelectiveAcknowledgementPermitted) => {
                    options.sack_permitted = true;
                }
                Ok(TcpOptionElement::SelectiveAcknowledgement((left, right), _)) => {
                    options.sack = Some((SeqNum(left), SeqNum(right)));
                }
                Ok(TcpOptionElement::Timestamp(val, ecr)) => {
                    options.timestamp = Some((val, ecr));
                }
                Ok(TcpOptionElement::Noop) => {}
                Err(_) => break,
            }
        }
        options
    }

    /// The MSS as we take it (RFC 9293 §3.7.1: 536 if absent, 1220 for IPv6).
    pub(crate) fn mss_or_default(&self, ipv6: bool) -> u16 {
        let default = if ipv6 { 1220 } else { 536 };
        let least = u16::try_from(MSS_MIN).expect("a small constant");
        self.mss.filter(|&m| m != 0).unwrap_or(default).max(least)
    }
}

/// RFC 9293 §3.10.7.2 (MUST-63): no broadcast, multicast or unspecified source.
fn is_unicast(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(a) => !(a.is_unspecified() || a.is_multicast() || a.is_broadcast()),
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_multicast()),
    }
}

/// Bytes of the timestamp option with its two leading NOPs.
pub(crate) const TIMESTAMP_LEN: usize = 12;
/// The most SACK blocks beside a timestamp (RFC 2018 §3).
pub(crate) const SACK_BLOCKS_MAX: usize = 3;

/// The header of a segment of ours without payload: ACK, RST, SYN-ACK.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reply<'a> {
    pub(crate) tuple: &'a Tuple,
    pub(crate) seq: SeqNum,
    /// `None`: no ACK flag.
    pub(crate) ack: Option<SeqNum>,
    /// Beside ACK.
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
    pub(crate) timestamp: Option<(u32, u32)>,
    pub(crate) sack: &'a [(SeqNum, SeqNum)],
}

impl<'a> Reply<'a> {
    /// A bare segment; the rest is filled in with `..`.
    pub(crate) const fn new(tuple: &'a Tuple, seq: SeqNum) -> Self {
        Self {
            tuple,
            seq,
            ack: None,
            flags: 0,
            window: 0,
            mss: None,
            window_scale: None,
            sack_permitted: false,
            timestamp: None,
            sack: &[],
        }
    }

    /// Writes the packet into `buf`, whose contents it replaces.
    pub(crate) fn emit(&self, mut buf: Vec<u8>, next_hop: LinkAddr, partial: bool) -> Packet {
        let start = HEADROOM + self.tuple.ip_header_len();
        buf.clear();
        buf.resize(start + 20, 0);
        if let Some(mss) = self.mss {
            buf.extend([2, 4]);
            buf.extend(mss.to_be_bytes());
        }
        if self.sack_permitted {
            buf.extend([1, 1, 4, 2]);
        }
        if let Some((val, ecr)) = self.timestamp {
            buf.extend(timestamp_option(val, ecr));
        }
        if let Some(shift) = self.window_scale {
            buf.extend([1, 3, 3, shift]);
        }
        if !self.sack.is_empty() {
            let blocks = &self.sack[..self.sack.len().min(SACK_BLOCKS_MAX)];
            let len = u8::try_from(2 + 8 * blocks.len()).expect("at most three blocks");
            buf.extend([1, 1, 5, len]);
            for (left, right) in blocks {
                buf.extend(left.0.to_be_bytes());
                buf.extend(right.0.to_be_bytes());
            }
        }
        let header_len = buf.len() - start;
        let tcp = &mut buf[start..];
        tcp[0..2].copy_from_slice(&self.tuple.local.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.tuple.remote.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.seq.0.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.ack.unwrap_or_default().0.to_be_bytes());
        tcp[12] = u8::try_from(header_len / 4 * 16).expect("at most 60 bytes of header");
        tcp[13] = self.flags | if self.ack.is_some() { flag::ACK } else { 0 };
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        seal(&mut buf, self.tuple, partial);
        Packet {
            buf,
            next_hop,
            gso: None,
            partial_checksum: partial,
        }
    }
}

/// A timestamp option, aligned as receivers' fast paths expect it (RFC 7323 appendix A).
pub(crate) fn timestamp_option(val: u32, ecr: u32) -> [u8; TIMESTAMP_LEN] {
    let mut option = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];
    option[4..8].copy_from_slice(&val.to_be_bytes());
    option[8..12].copy_from_slice(&ecr.to_be_bytes());
    option
}

/// Writes the IP header in front of a TCP segment and the checksum into it. `buf` is [`HEADROOM`]
/// bytes, room for the IP header, the segment.
pub(crate) fn seal(buf: &mut [u8], tuple: &Tuple, partial: bool) {
    let (ip, tcp) = buf[HEADROOM..].split_at_mut(tuple.ip_header_len());
    let tcp_len = u16::try_from(tcp.len()).expect("a packet of ours is below 64 KiB");
    match (tuple.local.ip(), tuple.remote.ip()) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            // Version 4, 20 bytes, no TOS; identification 0 and don't-fragment (RFC 6864).
            ip.copy_from_slice(&[0; 20]);
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(tcp_len + 20).to_be_bytes());
            ip[6] = 0x40;
            ip[8] = 64;
            ip[9] = 6;
            ip[12..16].copy_from_slice(&local.octets());
            ip[16..20].copy_from_slice(&remote.octets());
            let sum = !checksum::fold(checksum::sum(ip));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            ip[0..4].copy_from_slice(&[0x60, 0, 0, 0]);
            ip[4..6].copy_from_slice(&tcp_len.to_be_bytes());
            ip[6] = 6;
            ip[7] = 64;
            ip[8..24].copy_from_slice(&local.octets());
            ip[24..40].copy_from_slice(&remote.octets());
        }
        _ => unreachable!("a tuple's ends are of one family: both were read from one packet"),
    }
    tcp[16..18].fill(0);
    let pseudo = checksum::pseudo_header(tuple.local.ip(), tuple.remote.ip(), tcp.len());
    let field = if partial {
        checksum::fold(pseudo)
    } else {
        !checksum::fold(pseudo + checksum::sum(tcp))
    };
    tcp[16..18].copy_from_slice(&field.to_be_bytes());
}
