//! Links to the other servers, once the handshake is made: messages in, messages out.
//!
//! They are served by the engine's own thread, like clients, so that a message crosses no other one
//! between two cores. What the core says to a peer in one turn goes out with one system call.

use std::collections::BTreeMap;
use std::io;

use mio::event::Event;
use mio::{Registry, Token};
use snow::TransportState;
use thiserror::Error;
use tokio::sync::oneshot;

use super::stream::{Outgoing, Spare, Stream};
use crate::core::PeerMessage;

/// Noise's limit of one record, and what is left of it for us.
pub(super) const RECORD_MAX: usize = 65_535;
const PLAIN_MAX: usize = RECORD_MAX - 16;

/// One message at most. Snapshots are the large ones.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Messages are dropped while more bytes than this wait for a peer.
const BACKLOG_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Bytes sealed ahead of what the socket takes, and bytes written to a peer in one turn.
const SEALED_BYTES_ENOUGH: usize = 2 * RECORD_MAX;
const TURN_BYTES_MAX: usize = 1024 * 1024;

/// Reads from a peer in one turn, and bytes of each; at least a record.
const READS_PER_TURN: usize = 4;
const READ_BYTES: usize = 128 * 1024;

/// Room that is kept for the next messages; more is given back.
const ROOM_BYTES_KEPT: usize = 1024 * 1024;

/// Which way a link carries messages. There is one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the peer: this server dialled.
    Out,
    /// From the peer.
    In,
}

/// A link whose handshake is made, for the engine's thread.
pub(super) struct Made {
    pub(super) peer: u64,
    pub(super) direction: Direction,
    pub(super) stream: Stream,
    pub(super) noise: TransportState,
    /// Dropped when the link ends.
    pub(super) _ended: oneshot::Sender<()>,
}

/// Why a link ended.
#[derive(Debug, Error)]
enum LinkEnd {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("closed by the peer")]
    Closed,
    #[error("not what the peer has sealed: {0}")]
    Noise(#[from] snow::Error),
    #[error("not a message of ours")]
    Malformed,
}

struct Link {
    made: Made,
    /// Sealed bytes that came and are no whole record yet.
    raw: Vec<u8>,
    /// Messages, each with its length in front: those that came and are not whole yet, or those that
    /// go and are not sealed yet. The first `start` bytes are done with.
    plain: Vec<u8>,
    start: usize,
    sealed: Outgoing,
    /// The socket may have more to read, or room to write.
    readable: bool,
    writable: bool,
}

/// Something that links had to tell.
#[derive(Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "it is handed on at once, and nearly always the large one"
)]
pub(super) enum Told {
    /// A peer has said this.
    Message { from: u64, message: PeerMessage },
    /// What was sent to this peer last may be lost.
    Unreachable(u64),
}

/// All links of this server.
pub(super) struct Links {
    registry: Registry,
    links: BTreeMap<u64, Link>,
    /// The link to each peer.
    out: BTreeMap<u64, u64>,
    next: u64,
    buffer: Vec<u8>,
    spare: Spare,
}

impl Links {
    pub(super) fn new(registry: Registry) -> Self {
        Self {
            registry,
            links: BTreeMap::new(),
            out: BTreeMap::new(),
            next: 0,
            buffer: vec![0; READ_BYTES],
            spare: Spare::default(),
        }
    }

    /// Takes a new link. What the operating system calls it is `token(number)`.
    pub(super) fn add(&mut self, mut made: Made, token: impl FnOnce(u64) -> Token) {
        let number = self.next;
        self.next += 1;
        if let Err(error) = made.stream.register(&self.registry, token(number)) {
            tracing::warn!(peer = made.peer, %error, "cannot serve a peer");
            return;
        }
        if made.direction == Direction::Out
            && let Some(old) = self.out.insert(made.peer, number)
        {
            self.links.remove(&old);
        }
        let holds_back = made.stream.holds_back();
        let link = Link {
            made,
            raw: Vec::new(),
            plain: Vec::new(),
            start: 0,
            sealed: Outgoing::default(),
            readable: holds_back,
            writable: true,
        };
        self.links.insert(number, link);
    }

    /// Ends all links with peers that are not wanted any more.
    pub(super) fn retain(&mut self, wanted: impl Fn(u64) -> bool) {
        self.links.retain(|_, link| wanted(link.made.peer));
        self.out.retain(|peer, _| wanted(*peer));
    }

    /// The operating system has something to tell of a link.
    pub(super) fn on_event(&mut self, number: u64, event: &Event) {
        if let Some(link) = self.links.get_mut(&number) {
            link.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
            link.writable |= event.is_writable();
        }
    }

    /// Whether there is more for [`Links::turn`] and [`Links::flush`] to do at once.
    pub(super) fn has_ready(&self) -> bool {
        let mut links = self.links.values();
        links.any(|link| link.readable || (link.writable && link.has_more()))
    }

    /// Queues a message. False if it was dropped because too much waits already. What is said while
    /// there is no link is lost; the engine repeats what still matters.
    #[must_use]
    pub(super) fn send(&mut self, to: u64, message: &PeerMessage) -> bool {
        let link = self.out.get(&to).and_then(|link| self.links.get_mut(link));
        let Some(link) = link else { return true };
        if link.plain.len() - link.start > BACKLOG_BYTES_MAX {
            return false;
        }
        let start = link.plain.len();
        link.plain.extend_from_slice(&[0; 4]);
        let plain = std::mem::take(&mut link.plain);
        link.plain = postcard::to_extend(message, plain).expect("memory takes everything");
        let length = link.plain.len() - start - 4;
        let length = u32::try_from(length).expect("a message is far below 4 GiB");
        link.plain[start..start + 4].copy_from_slice(&length.to_le_bytes());
        true
    }

    /// Bytes that wait for peers to take them.
    pub(super) fn backlog(&self) -> u64 {
        let links = self.links.values();
        let waiting = links.filter(|link| link.has_more());
        let bytes = waiting.map(|link| link.plain.len() - link.start + link.sealed.len());
        bytes.sum::<usize>() as u64
    }

    /// Reads what peers say, a bounded part of it.
    pub(super) fn turn(&mut self, mut tell: impl FnMut(Told)) {
        let mut ended = Vec::new();
        for (number, link) in &mut self.links {
            for _ in 0..READS_PER_TURN {
                if !link.readable {
                    break;
                }
                if let Err(end) = link.read(&mut self.buffer, &mut tell) {
                    ended.push((*number, end));
                    break;
                }
            }
        }
        self.end(ended, tell);
    }

    /// Writes what there is to write, a bounded part of it.
    pub(super) fn flush(&mut self, tell: impl FnMut(Told)) {
        let mut ended = Vec::new();
        for (number, link) in &mut self.links {
            if link.writable
                && link.has_more()
                && let Err(end) = link.write(&mut self.buffer, &mut self.spare)
            {
                ended.push((*number, end));
            }
        }
        self.end(ended, tell);
    }

    fn end(&mut self, ended: Vec<(u64, LinkEnd)>, mut tell: impl FnMut(Told)) {
        for (number, why) in ended {
            let Some(link) = self.links.remove(&number) else {
                continue;
            };
            let peer = link.made.peer;
            tracing::debug!(peer, direction = ?link.made.direction, %why, "link ended");
            if self.out.get(&peer) == Some(&number) {
                self.out.remove(&peer);
                tell(Told::Unreachable(peer));
            }
        }
    }
}

impl Link {
    /// Whether anything waits to go out.
    fn has_more(&self) -> bool {
        self.made.stream.has_unsent()
            || self.made.direction == Direction::Out
                && (self.start < self.plain.len() || !self.sealed.is_empty())
    }

    fn write(&mut self, record: &mut [u8], spare: &mut Spare) -> Result<(), LinkEnd> {
        let mut budget = TURN_BYTES_MAX;
        while self.has_more() && budget > 0 {
            while self.sealed.len() < SEALED_BYTES_ENOUGH && self.start < self.plain.len() {
                let end = self.plain.len().min(self.start + PLAIN_MAX);
                let chunk = &self.plain[self.start..end];
                let length = self.made.noise.write_message(chunk, record)?;
                let prefix = u16::try_from(length).expect("a record's limit");
                self.sealed.push(&prefix.to_be_bytes(), spare);
                self.sealed.push(&record[..length], spare);
                budget = budget.saturating_sub(chunk.len());
                self.start = end;
            }
            self.sealed.flush(&mut self.made.stream, spare)?;
            self.made.stream.push()?;
            if !self.sealed.is_empty() || self.made.stream.has_unsent() {
                self.writable = false;
                break;
            }
        }
        self.forget_done();
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8], tell: &mut impl FnMut(Told)) -> Result<(), LinkEnd> {
        let count = match self.made.stream.read(buffer) {
            Ok(0) => return Err(LinkEnd::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        if self.made.direction == Direction::Out {
            // The peer says nothing here.
            return Err(LinkEnd::Malformed);
        }
        self.raw.extend_from_slice(&buffer[..count]);
        self.unseal()?;
        while let Some((prefix, rest)) = self.plain[self.start..].split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*prefix) as usize;
            if length > MESSAGE_BYTES_MAX {
                return Err(LinkEnd::Malformed);
            }
            let Some(bytes) = rest.get(..length) else {
                break;
            };
            let message = postcard::from_bytes(bytes).map_err(|_| LinkEnd::Malformed)?;
            self.start += 4 + length;
            tell(Told::Message {
                from: self.made.peer,
                message,
            });
        }
        self.forget_done();
        Ok(())
    }

    /// Opens the whole records that have come.
    fn unseal(&mut self) -> Result<(), LinkEnd> {
        let mut done = 0;
        while let Some((prefix, rest)) = self.raw[done..].split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*prefix));
            let Some(record) = rest.get(..length) else {
                break;
            };
            let end = self.plain.len();
            self.plain.resize(end + length, 0);
            let length = self
                .made
                .noise
                .read_message(record, &mut self.plain[end..])?;
            self.plain.truncate(end + length);
            done += 2 + record.len();
        }
        self.raw.drain(..done);
        Ok(())
    }

    fn forget_done(&mut self) {
        if self.start == self.plain.len() {
            self.plain.clear();
            self.start = 0;
            self.plain.shrink_to(ROOM_BYTES_KEPT);
        } else if self.start > self.plain.len() / 2 {
            self.plain.drain(..self.start);
            self.start = 0;
        }
    }
}
