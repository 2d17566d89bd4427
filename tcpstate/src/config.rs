//! Limits and choices, for one VIP.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

/// Limits and choices for one VIP. The same on every replica, except what describes the machine's
/// wire (`mtu`, offloads).
#[derive(Debug, Clone)]
pub struct Config {
    /// The floating address. Packets to any other are ignored.
    pub vip: IpAddr,
    /// The services' ports. A SYN to any other is refused with RST.
    pub ports: BTreeSet<u16>,
    /// How far a client may be ahead of what its server has taken, in bytes (16 KiB to 1 GiB). It
    /// fixes the window scale: connections keep the one they began with.
    pub receive_capacity: u32,
    /// Output given to TCP and not yet acknowledged, in bytes, per connection.
    pub transmit_capacity: usize,
    /// The interface's MTU, IP header included.
    pub mtu: usize,
    /// The wire takes super-segments and segments them itself.
    pub segmentation_offload: bool,
    /// The wire completes TCP checksums: packets carry the folded, non-complemented sum of the
    /// pseudo header in the field. Implied by `segmentation_offload`.
    pub checksum_offload: bool,
    /// Connections at once; a handshake beyond is not completed.
    pub max_connections: usize,
    /// Handshakes remembered at once; beyond, they are completed by cookie alone.
    pub max_half_open: usize,
    /// Closed tuples remembered at once.
    pub max_closed: usize,
    /// Bytes that all connections together keep beyond gaps; more are dropped, and come again.
    pub reassembly_max: usize,
    /// How far a backup reads its server ahead of the client's last known acknowledgement, in bytes
    /// per connection.
    pub retained_output_max: usize,
    /// Output unacknowledged for this long without any progress: the connection is given up
    /// (RFC 1122 §4.2.3.5 asks for 100 s at least).
    pub give_up_after: Duration,
    /// How long a lone ACK may wait for output that carries it (RFC 1122 §4.2.3.2: at most 500 ms).
    pub ack_delay: Duration,
}

impl Config {
    /// Defaults for a VIP and its ports, for an Ethernet without offloads.
    pub fn new(vip: IpAddr, ports: impl IntoIterator<Item = u16>) -> Self {
        Self {
            vip,
            ports: ports.into_iter().collect(),
            receive_capacity: 1024 * 1024,
            transmit_capacity: 512 * 1024,
            mtu: 1500,
            segmentation_offload: false,
            checksum_offload: false,
            max_connections: 100_000,
            max_half_open: 1_024,
            max_closed: 1 << 18,
            reassembly_max: 256 * 1024 * 1024,
            retained_output_max: 1024 * 1024,
            give_up_after: Duration::from_secs(900),
            ack_delay: Duration::from_millis(2),
        }
    }

    /// The MSS we announce and never exceed: what the MTU leaves for a TCP payload without options
    /// (RFC 6691).
    pub(crate) fn local_mss(&self) -> u16 {
        let headers = if self.vip.is_ipv6() { 60 } else { 40 };
        u16::try_from(self.mtu.saturating_sub(headers).clamp(MSS_MIN, 65_475))
            .expect("clamped below 2^16")
    }

    pub(crate) fn partial_checksum(&self) -> bool {
        self.checksum_offload || self.segmentation_offload
    }
}

/// The least MSS that we take at its word; Linux's `TCP_MIN_SND_MSS`, and smoltcp's.
pub(crate) const MSS_MIN: usize = 48;
