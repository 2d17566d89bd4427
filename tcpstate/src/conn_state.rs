//! `ConnState`: the small, replicated record from which a connection can be taken up anywhere.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::seq::SeqNum;

/// The link-layer address of a next hop, learnt from the client's own frames.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct LinkAddr(pub [u8; 6]);

/// A connection's name on the wire: the VIP's end and the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// Our end: the VIP and a service's port.
    pub local: SocketAddr,
    /// The client's end.
    pub remote: SocketAddr,
}

impl Tuple {
    /// Whether this is an IPv6 connection.
    pub const fn is_ipv6(&self) -> bool {
        self.local.is_ipv6()
    }

    /// Bytes of an IP header in front of this connection's segments.
    pub const fn ip_header_len(&self) -> usize {
        if self.is_ipv6() { 40 } else { 20 }
    }
}

/// What the handshake settled, for the life of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The largest segment the client takes (its MSS option, RFC 6691), rounded down by the cookie.
    pub mss: u16,
    /// The client's window scale; `None`: neither side scales (RFC 7323 §2.2).
    pub peer_shift: Option<u8>,
    /// SACK was permitted by both (RFC 2018).
    pub sack: bool,
    /// Timestamps are in use (RFC 7323 §3).
    pub timestamps: bool,
}

/// The replicated record of one connection: everything but the bytes.
///
/// Offsets count payload bytes from 0. Invariant: changed by events alone, so that every replica that
/// applied the same events holds the same record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnState {
    /// Both ends.
    pub tuple: Tuple,
    /// Where frames to the client go.
    pub next_hop: LinkAddr,
    /// Receive capacity in bytes; it fixes our window scale, so it never changes (R4).
    pub receive_capacity: u32,
    /// What the handshake settled.
    pub negotiated: Negotiated,
    /// The client's initial sequence number.
    pub irs: SeqNum,
    /// Ours.
    pub iss: SeqNum,
    /// RCV.NXT: bytes of the client in the event log. Without its FIN.
    pub received: u64,
    /// SND.UNA: bytes of ours that the client is known to have. One more than `local_fin` when it
    /// has acknowledged our FIN. Lags what it really has.
    pub acked: u64,
    /// The client's window beyond `acked`, in bytes.
    pub window: u32,
    /// TS.Recent (RFC 7323 §4.3). Lags.
    pub ts_recent: u32,
    /// The client has closed its side, at `received`.
    pub peer_fin: bool,
    /// We have closed ours, at this offset.
    pub local_fin: Option<u64>,
}

impl ConnState {
    /// The service's port.
    pub const fn local_port(&self) -> u16 {
        self.tuple.local.port()
    }

    /// The client's address.
    pub const fn remote(&self) -> SocketAddr {
        self.tuple.remote
    }

    /// Our window scale, or `None` if the client does not scale.
    pub fn receive_shift(&self) -> Option<u8> {
        self.negotiated
            .peer_shift
            .map(|_| shift_for(self.receive_capacity))
    }

    /// How far beyond what it has we let the client send, in bytes.
    pub fn receive_window_max(&self) -> u64 {
        match self.negotiated.peer_shift {
            Some(_) => u64::from(self.receive_capacity),
            None => u64::from(self.receive_capacity.min(u32::from(u16::MAX))),
        }
    }

    /// Offset behind all we shall ever send, FIN included, once it is known.
    pub(crate) fn fin_end(&self) -> Option<u64> {
        self.local_fin.map(|at| at + 1)
    }

    /// Both sides have closed and know it: nothing is left to say.
    pub fn finished(&self) -> bool {
        self.peer_fin && self.fin_end().is_some_and(|end| self.acked >= end)
    }

    /// Advances the record by one event of this connection.
    ///
    /// # Panics
    /// If the event does not follow: the log is contiguous on each connection, and a replica that
    /// went on after a gap would corrupt the stream.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Data { offset, bytes, .. } => {
                assert_eq!(
                    *offset, self.received,
                    "input is contiguous on a connection"
                );
                assert!(!self.peer_fin, "no input follows the client's FIN");
                self.received += bytes.len() as u64;
            }
            Event::Acked {
                offset,
                window,
                ts_recent,
                next_hop,
                ..
            } => {
                self.acked = self.acked.max(*offset);
                self.window = *window;
                self.ts_recent = *ts_recent;
                self.next_hop = *next_hop;
            }
            Event::PeerFin { offset, .. } => {
                assert_eq!(
                    *offset, self.received,
                    "the client's FIN follows its last byte"
                );
                self.peer_fin = true;
            }
            Event::LocalFin { offset, .. } => self.local_fin = Some(*offset),
            Event::HalfOpen { .. }
            | Event::Open { .. }
            | Event::Reset { .. }
            | Event::Closed { .. }
            | Event::Skip { .. }
            | Event::Answered { .. } => {}
        }
    }
}

/// The smallest shift with which `capacity` bytes fit the 16-bit window field (RFC 7323 §2.3: at
/// most 14).
pub(crate) fn shift_for(capacity: u32) -> u8 {
    (0..14)
        .find(|shift| capacity >> shift <= u32::from(u16::MAX))
        .unwrap_or(14)
}
