//! The event log's vocabulary: the only thing that is replicated.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::conn_state::{ConnState, LinkAddr, Negotiated, Tuple};
use crate::error::DecodeError;
use crate::seq::SeqNum;

/// The number of an event: contiguous in a group, for ever, across views.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct EventNo(pub u64);

impl EventNo {
    /// The number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A connection's name within the group: the number of its `Open` event.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct ConnId(pub u64);

/// Who broke a connection off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ResetBy {
    /// The client sent an RST.
    Peer,
    /// Our server broke it off, or is not there: the client is told by an RST.
    Server,
    /// The client answered nothing for too long, or the TCP library failed: told by an RST.
    Stack,
}

/// A handshake of which the last ACK is outstanding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HalfOpen {
    /// Both ends.
    pub tuple: Tuple,
    /// Where the SYN-ACK goes.
    pub next_hop: LinkAddr,
    /// What the SYN offered and we took.
    pub negotiated: Negotiated,
    /// The client's initial sequence number.
    pub irs: SeqNum,
    /// Ours: the cookie.
    pub iss: SeqNum,
    /// TSval of the SYN.
    pub ts_recent: u32,
}

/// One entry of the event log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A handshake is under way (lazy: only those that last). A new leader sends its SYN-ACK again.
    HalfOpen {
        /// The handshake.
        half: HalfOpen,
    },
    /// A connection begins; its [`ConnId`] is this event's number.
    Open {
        /// Its first record.
        state: ConnState,
    },
    /// Input for the server.
    Data {
        /// Which connection.
        conn: ConnId,
        /// Offset of the first byte; equal to the record's `received`.
        offset: u64,
        /// Payload, 1 to [`DATA_BYTES_MAX`] bytes.
        bytes: Bytes,
    },
    /// The client has our output up to `offset` (lazy; moves the backups' retained output along).
    Acked {
        /// Which connection.
        conn: ConnId,
        /// SND.UNA as an offset; one more than the FIN's when the FIN is acknowledged.
        offset: u64,
        /// The client's window beyond `offset`, in bytes.
        window: u32,
        /// TS.Recent.
        ts_recent: u32,
        /// Where frames to the client go by now.
        next_hop: LinkAddr,
    },
    /// The client closed its side.
    PeerFin {
        /// Which connection.
        conn: ConnId,
        /// Offset behind its last byte.
        offset: u64,
    },
    /// Our server closed its side; the FIN leaves when this is stable.
    LocalFin {
        /// Which connection.
        conn: ConnId,
        /// Offset behind its last byte.
        offset: u64,
    },
    /// The connection is broken off; nothing of it follows.
    Reset {
        /// Which connection.
        conn: ConnId,
        /// By whom.
        by: ResetBy,
    },
    /// Both sides have closed; nothing of it follows.
    Closed {
        /// Which connection.
        conn: ConnId,
    },
    /// Our server leaves this connection's input untaken: with one order for all connections, no
    /// replica waits for it any more until it is taken.
    Skip {
        /// Which connection.
        conn: ConnId,
    },
    /// What our server answered so far, as hashes (lazy): the other replicas compare their own servers' answers.
    Answered {
        /// Which connection.
        conn: ConnId,
        /// In the order of offsets, at most [`OUTPUT_MARKS_MAX`].
        marks: Vec<OutputMark>,
    },
}

/// Most marks of one [`Event::Answered`].
pub const OUTPUT_MARKS_MAX: usize = 64;

/// A server's output on one connection up to an offset, in short. What is hashed how is the driver's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputMark {
    /// Offset behind the last byte hashed.
    pub offset: u64,
    /// Hash of all output before it.
    pub hash: u64,
}

/// The most payload in one [`Event::Data`]: what one 64 KiB super-segment carries. With the
/// encoding's overhead an event stays below 64 KiB.
pub const DATA_BYTES_MAX: usize = 65_483;

/// First byte of every encoded event.
const VERSION: u8 = 1;
/// Second byte of a `Data` event, whose payload is sliced and not copied; others have 0.
const KIND_DATA: u8 = 1;
const KIND_OTHER: u8 = 0;

/// `Data` without its bytes, which follow as they are.
#[derive(Serialize, Deserialize)]
struct DataHeader {
    conn: ConnId,
    offset: u64,
}

impl Event {
    /// Appends the encoded event to `out`: a version byte, then postcard.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        match self {
            Self::Data {
                conn,
                offset,
                bytes,
            } => {
                out.push(KIND_DATA);
                let header = DataHeader {
                    conn: *conn,
                    offset: *offset,
                };
                encode_into(&header, out);
                out.extend_from_slice(bytes);
            }
            other => {
                out.push(KIND_OTHER);
                encode_into(other, out);
            }
        }
    }

    /// Reads one event that fills `buf`. `Data` shares `buf`'s memory.
    ///
    /// # Errors
    /// If `buf` was not written by [`Event::encode`] of a version that we know.
    pub fn decode(buf: &Bytes) -> Result<Self, DecodeError> {
        let [version, kind, ..] = buf[..] else {
            return Err(DecodeError::Truncated);
        };
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let body = &buf[2..];
        match kind {
            KIND_DATA => {
                let (DataHeader { conn, offset }, rest) =
                    postcard::take_from_bytes(body).map_err(|_| DecodeError::Malformed)?;
                if rest.is_empty() || rest.len() > DATA_BYTES_MAX {
                    return Err(DecodeError::Malformed);
                }
                let bytes = buf.slice(buf.len() - rest.len()..);
                Ok(Self::Data {
                    conn,
                    offset,
                    bytes,
                })
            }
            KIND_OTHER => match postcard::take_from_bytes(body) {
                Ok((Self::Data { .. }, _)) | Err(_) => Err(DecodeError::Malformed),
                Ok((event, [])) => Ok(event),
                Ok((_, _)) => Err(DecodeError::Malformed),
            },
            _ => Err(DecodeError::Malformed),
        }
    }

    /// The connection this is about, if the event names one (an `Open` is named by its number).
    pub const fn conn(&self) -> Option<ConnId> {
        match self {
            Self::Data { conn, .. }
            | Self::Acked { conn, .. }
            | Self::PeerFin { conn, .. }
            | Self::LocalFin { conn, .. }
            | Self::Reset { conn, .. }
            | Self::Closed { conn }
            | Self::Skip { conn }
            | Self::Answered { conn, .. } => Some(*conn),
            Self::HalfOpen { .. } | Self::Open { .. } => None,
        }
    }
}

/// Appends `value` in postcard.
fn encode_into(value: &impl Serialize, out: &mut Vec<u8>) {
    postcard::to_io(value, out).expect("writing to a Vec cannot fail");
}
