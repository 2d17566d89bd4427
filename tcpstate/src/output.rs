//! What the stack asks of its driver.

use crate::conn_state::LinkAddr;
use crate::event::{ConnId, Event, EventNo, ResetBy};

/// Free bytes in front of the IP packet in [`Packet::buf`], for the driver's own headers
/// (virtio-net and Ethernet).
pub const HEADROOM: usize = 24;

/// How far a packet's TCP checksum is to be trusted on the way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// The wire has verified it, or it never left the machine.
    Verified,
    /// To be verified here.
    Verify,
}

/// One IP packet to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// [`HEADROOM`] bytes of any content, then the IP packet.
    pub buf: Vec<u8>,
    /// Where the frame goes.
    pub next_hop: LinkAddr,
    /// Set: a super-segment, to be cut into segments of this much payload.
    pub gso: Option<u16>,
    /// The checksum field holds the pseudo header's sum and is to be completed by the wire; else it
    /// is complete.
    pub partial_checksum: bool,
}

impl Packet {
    /// The IP packet, without the headroom.
    pub fn ip(&self) -> &[u8] {
        &self.buf[HEADROOM..]
    }
}

/// What the driver shall do, in this order.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this to the client, if the lease permits; hand the buffer back to `Stack::recycle`.
    Transmit(Packet),
    /// Multicast this event, and apply it to the local server.
    Replicate {
        /// Its number: one more than that of the last.
        number: EventNo,
        /// The event.
        event: Event,
    },
    /// `Stack::output_room` of this connection has reopened.
    Room(ConnId),
    /// Something that a person may want to know.
    Notice(Notice),
}

/// What a person may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A connection was broken off.
    Reset {
        /// Which.
        conn: ConnId,
        /// By whom.
        by: ResetBy,
    },
    /// The TCP library failed on this connection; it is reset, others go on.
    LibraryFault {
        /// Which.
        conn: ConnId,
    },
}
