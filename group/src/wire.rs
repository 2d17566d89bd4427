//! The body of a datagram: a fixed header, then messages, until the end.
//!
//! Events and checkpoint pieces are laid out by hand so that a datagram can be filled to the byte; everything else is
//! postcard. A body comes authenticated, but from a peer that may run another version or be at fault: nothing here
//! trusts a length.

use crate::output::Lag;
use bytes::{Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// Version of this format; the first byte of each body.
pub(crate) const FORMAT: u8 = 1;
/// Bytes of [`Header`].
pub(crate) const HEADER_BYTES: usize = 2 + 5 * 8;
/// Bytes in front of the bytes of an event chunk.
pub(crate) const CHUNK_BYTES: usize = 1 + 8 + 4 + 4 + 2;
/// Bytes in front of the bytes of a checkpoint piece.
pub(crate) const PIECE_BYTES: usize = 1 + 8 + 8 + 8 + 2;

/// The sender waits for this: acknowledge at once.
pub(crate) const URGENT: u8 = 1;
/// The sender leads this view and holds its lease.
pub(crate) const LEASE: u8 = 2;
/// `held` acknowledges.
pub(crate) const ACK: u8 = 4;
/// Chunks are copies made while the view is being left.
pub(crate) const COPY: u8 = 8;
/// The sender leads this view: `stable`, `trim` and `sent` are meant.
pub(crate) const LEADER: u8 = 16;

/// Largest number of an event or a view, of a byte of a checkpoint, and largest clock in microseconds, that is believed:
/// no group comes near it, and one more, or a lease more, never overflows.
pub(crate) const NUMBER_MAX: u64 = 1 << 62;

/// What every datagram says.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    pub(crate) view_id: u64,
    pub(crate) clock_us: u64,
    /// Receiver: highest event held. Leader: highest event that has been sent in whole (0: not said).
    pub(crate) held: u64,
    /// Leader: highest stable event.
    pub(crate) stable: u64,
    /// Leader: every full member holds all events up to this one.
    pub(crate) trim: u64,
}

impl Header {
    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The header as the beginning of a body.
    pub(crate) fn bytes(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(HEADER_BYTES);
        self.put(&mut out);
        out
    }

    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.extend_from_slice(&[FORMAT, self.flags]);
        for n in [
            self.view_id,
            self.clock_us,
            self.held,
            self.stable,
            self.trim,
        ] {
            out.extend_from_slice(&n.to_le_bytes());
        }
    }
}

/// A position in the sequence of events: an event, and a byte in it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Pos {
    pub(crate) number: u64,
    pub(crate) offset: u32,
}

impl Pos {
    pub(crate) const fn start(number: u64) -> Self {
        Self { number, offset: 0 }
    }
}

/// A part of an event, or all of it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk<'a> {
    pub(crate) pos: Pos,
    pub(crate) total: u32,
    pub(crate) bytes: &'a [u8],
}

/// A part of a checkpoint.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece<'a> {
    pub(crate) since: u64,
    pub(crate) offset: u64,
    pub(crate) total: u64,
    pub(crate) bytes: &'a [u8],
}

/// Everything that is small.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Leader: are you there? By the leader's clock.
    Heartbeat { sent_us: u64 },
    /// The answer, naming the heartbeat.
    Alive { sent_us: u64, lag: Lag },
    /// These events are missing (from, to), the last position of each range excluded.
    Nak { ranges: Vec<(Pos, Pos)> },
    /// May this view be left?
    PreVote,
    /// The answer to it.
    PreVoteAnswer { granted: bool },
    /// Promise to leave this view.
    Wedge,
    /// The promise. `answered_ago_us`: how long ago the last heartbeat of this view was answered.
    WedgeAck {
        held: u64,
        answered_ago_us: Option<u64>,
        clock_us: u64,
        lag: Lag,
        ready: bool,
    },
    /// The znode as it now is.
    NewView { version: i32, znode: Vec<u8> },
    /// Tell me the view you are in.
    WantView,
    /// Let me join.
    JoinRequest,
    /// I hold my checkpoint and the events since.
    JoinReady,
    /// Let me go.
    LeaveRequest,
    /// This part of my checkpoint, please.
    PiecesWanted { since: u64, offset: u64, len: u32 },
}

/// A small message that comes from a peer.
pub(crate) trait Small {
    /// Whether its numbers are ones that a sound peer can have.
    fn is_plausible(&self) -> bool;
}

impl Small for Message {
    fn is_plausible(&self) -> bool {
        match self {
            Self::Nak { ranges } => ranges
                .iter()
                .all(|(a, b)| a.number.max(b.number) <= NUMBER_MAX),
            Self::WedgeAck { held, clock_us, .. } => (*held).max(*clock_us) <= NUMBER_MAX,
            // Times here are only compared; the others have none.
            Self::Heartbeat { .. }
            | Self::Alive { .. }
            | Self::PreVote
            | Self::PreVoteAnswer { .. }
            | Self::Wedge
            | Self::NewView { .. }
            | Self::WantView
            | Self::JoinRequest
            | Self::JoinReady
            | Self::LeaveRequest
            | Self::PiecesWanted { .. } => true,
        }
    }
}

/// What a body holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item<'a, M = Message> {
    Chunk(Chunk<'a>),
    Piece(Piece<'a>),
    Unicast(&'a [u8]),
    Message(M),
}

const KIND_CHUNK: u8 = 0;
const KIND_PIECE: u8 = 1;
const KIND_UNICAST: u8 = 2;
const KIND_MESSAGE: u8 = 3;
/// The rest of the body is padding, so that all bodies of a burst have one size.
const KIND_PADDING: u8 = 4;

fn len16(n: usize) -> [u8; 2] {
    u16::try_from(n)
        .expect("an item fits a datagram")
        .to_le_bytes()
}

pub(crate) fn put_chunk(out: &mut BytesMut, chunk: &Chunk<'_>) {
    out.extend_from_slice(&[KIND_CHUNK]);
    out.extend_from_slice(&chunk.pos.number.to_le_bytes());
    out.extend_from_slice(&chunk.total.to_le_bytes());
    out.extend_from_slice(&chunk.pos.offset.to_le_bytes());
    out.extend_from_slice(&len16(chunk.bytes.len()));
    out.extend_from_slice(chunk.bytes);
}

pub(crate) fn put_piece(out: &mut BytesMut, piece: &Piece<'_>) {
    out.extend_from_slice(&[KIND_PIECE]);
    out.extend_from_slice(&piece.since.to_le_bytes());
    out.extend_from_slice(&piece.offset.to_le_bytes());
    out.extend_from_slice(&piece.total.to_le_bytes());
    out.extend_from_slice(&len16(piece.bytes.len()));
    out.extend_from_slice(piece.bytes);
}

pub(crate) fn put_unicast(out: &mut BytesMut, bytes: &[u8]) {
    out.extend_from_slice(&[KIND_UNICAST]);
    out.extend_from_slice(&len16(bytes.len()));
    out.extend_from_slice(bytes);
}

pub(crate) fn put_message<M: Serialize>(out: &mut BytesMut, message: &M) {
    let encoded = postcard::to_stdvec(message).expect("a message has no unserialisable part");
    out.extend_from_slice(&[KIND_MESSAGE]);
    out.extend_from_slice(&len16(encoded.len()));
    out.extend_from_slice(&encoded);
}

/// Pads a body to `bytes`.
pub(crate) fn pad(out: &mut BytesMut, bytes: usize) {
    if out.len() < bytes {
        out.resize(bytes, KIND_PADDING);
    }
}

/// One body with these messages.
pub(crate) fn body(header: &Header, messages: &[Message]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_BYTES + 64 * messages.len());
    header.put(&mut out);
    for m in messages {
        put_message(&mut out, m);
    }
    out.freeze()
}

/// Reads a body, item by item, its small messages being of type `M`. `None` from `next` with `damaged` set means that the
/// rest is unreadable.
pub(crate) struct Reader<'a, M = Message> {
    rest: &'a [u8],
    damaged: bool,
    messages: PhantomData<M>,
}

impl<'a> Reader<'a> {
    /// The header and the items after it; `None` when there is not even a header of this format, or an absurd one.
    pub(crate) fn new(body: &'a [u8]) -> Option<(Header, Self)> {
        let mut r = Self::over(body);
        if r.u8()? != FORMAT {
            return None;
        }
        let header = Header {
            flags: r.u8()?,
            view_id: r.number()?,
            clock_us: r.number()?,
            held: r.number()?,
            stable: r.number()?,
            trim: r.number()?,
        };
        Some((header, r))
    }
}

impl<'a, M: DeserializeOwned + Small> Reader<'a, M> {
    /// What follows a header that was read elsewhere.
    pub(crate) fn over(rest: &'a [u8]) -> Self {
        Self {
            rest,
            damaged: false,
            messages: PhantomData,
        }
    }

    pub(crate) fn damaged(&self) -> bool {
        self.damaged
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n)?;
        self.rest = rest;
        Some(head)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn number(&mut self) -> Option<u64> {
        self.u64().filter(|n| *n <= NUMBER_MAX)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = u16::from_le_bytes(self.array()?);
        self.take(usize::from(n))
    }

    fn item(&mut self) -> Option<Item<'a, M>> {
        Some(match self.u8()? {
            KIND_CHUNK => {
                let number = self.number()?;
                let total = self.u32()?;
                let offset = self.u32()?;
                let bytes = self.bytes()?;
                let end = u64::from(offset) + bytes.len() as u64;
                if end > u64::from(total) || (bytes.is_empty() && total != 0) {
                    return None;
                }
                Item::Chunk(Chunk {
                    pos: Pos { number, offset },
                    total,
                    bytes,
                })
            }
            KIND_PIECE => Item::Piece(Piece {
                since: self.number()?,
                offset: self.number()?,
                total: self.number()?,
                bytes: self.bytes()?,
            }),
            KIND_UNICAST => Item::Unicast(self.bytes()?),
            KIND_MESSAGE => {
                let message: M = postcard::from_bytes(self.bytes()?).ok()?;
                Item::Message(Some(message).filter(|m| m.is_plausible())?)
            }
            _ => return None,
        })
    }
}

impl<'a, M: DeserializeOwned + Small> Iterator for Reader<'a, M> {
    type Item = Item<'a, M>;

    fn next(&mut self) -> Option<Item<'a, M>> {
        if self.rest.is_empty() || self.damaged {
            return None;
        }
        if self.rest.first() == Some(&KIND_PADDING) {
            self.rest = &[];
            return None;
        }
        let item = self.item();
        self.damaged = item.is_none();
        item
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> BytesMut {
        let header = Header {
            flags: ACK,
            view_id: 7,
            clock_us: 9,
            held: 3,
            stable: 2,
            trim: 1,
        };
        let mut out = BytesMut::new();
        header.put(&mut out);
        assert_eq!(out.len(), HEADER_BYTES);
        let before = out.len();
        put_chunk(
            &mut out,
            &Chunk {
                pos: Pos::start(4),
                total: 3,
                bytes: b"abc",
            },
        );
        assert_eq!(out.len() - before, CHUNK_BYTES + 3);
        let before = out.len();
        put_piece(
            &mut out,
            &Piece {
                since: 7,
                offset: 1,
                total: 9,
                bytes: b"de",
            },
        );
        assert_eq!(out.len() - before, PIECE_BYTES + 2);
        put_unicast(&mut out, b"f");
        put_message(
            &mut out,
            &Message::Nak {
                ranges: vec![(Pos::start(1), Pos::start(2))],
            },
        );
        out
    }

    #[test]
    fn what_was_put_is_read() {
        let out = sample();
        let (header, reader) = Reader::new(&out).unwrap();
        assert!(header.has(ACK) && !header.has(LEASE));
        assert_eq!((header.view_id, header.held, header.trim), (7, 3, 1));
        let items: Vec<_> = reader.collect();
        assert_eq!(items.len(), 4);
        assert_eq!(items[2], Item::Unicast(b"f"));
    }

    #[test]
    fn a_cut_or_flipped_body_is_never_a_panic() {
        let out = sample();
        for end in 0..out.len() {
            if let Some((_, mut reader)) = Reader::new(&out[..end]) {
                while reader.next().is_some() {}
            }
        }
        for i in 0..out.len() {
            for bit in 0..8 {
                let mut bent = out.clone();
                bent[i] ^= 1 << bit;
                if let Some((_, mut reader)) = Reader::new(&bent) {
                    while reader.next().is_some() {}
                }
            }
        }
    }

    #[test]
    fn a_chunk_that_leaves_its_event_is_damage() {
        let mut out = BytesMut::new();
        Header::default().put(&mut out);
        let pos = Pos {
            number: 1,
            offset: 2,
        };
        put_chunk(
            &mut out,
            &Chunk {
                pos,
                total: 3,
                bytes: b"abc",
            },
        );
        let (_, mut reader) = Reader::new(&out).unwrap();
        assert!(reader.next().is_none() && reader.damaged());
    }
}
