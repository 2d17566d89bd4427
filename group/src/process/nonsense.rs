//! Datagrams that no sound member sends.

use super::types::{Calling, ThreadId, Want};
use super::vclock::VClock;
use super::wire::{self, Envelope, Header, Kind, Small, TotalId};
use crate::rng::Rng;
use crate::wire::{Chunk, Piece, Pos};

/// Draws them.
pub(crate) struct Draw<'a>(pub(crate) &'a mut Rng);

impl Draw<'_> {
    fn below(&mut self, n: usize) -> usize {
        let n = u64::try_from(n).expect("small");
        usize::try_from(self.0.next_u64() % n).expect("small")
    }

    fn byte(&mut self) -> u8 {
        self.0.next_u64().to_le_bytes()[0]
    }

    fn number(&mut self) -> u64 {
        let edges = [0, 1, 2, u64::MAX, 1 << 63, (1 << 62) - 1, 1 << 40];
        match self.below(4) {
            0 => edges[self.below(edges.len())],
            1 => self.0.next_u64(),
            _ => self.0.next_u64() % 300,
        }
    }

    fn pos(&mut self) -> Pos {
        Pos {
            number: self.number(),
            offset: u32::try_from(self.number() % 2000).expect("small"),
        }
    }

    fn rank(&mut self) -> u8 {
        if self.below(8) == 0 {
            self.byte()
        } else {
            self.byte() % 10
        }
    }

    /// In place of a real one that comes from the same member.
    pub(crate) fn datagram(&mut self, real: &[u8]) -> Vec<u8> {
        let ours = Header::read(real);
        match (self.below(10), ours) {
            (0, _) | (_, None) => (0..self.below(200)).map(|_| self.byte()).collect(),
            (1..=3, Some(_)) => {
                let mut bent = real.to_vec();
                for _ in 0..=self.below(3) {
                    let at = self.below(bent.len());
                    bent[at] = self.byte();
                }
                bent.truncate(1 + self.below(bent.len()));
                // Another format is the core's, whose nonsense is tried elsewhere.
                bent[0] = wire::FORMAT;
                bent
            }
            (_, Some((header, _))) => self.made(header),
        }
    }

    fn made(&mut self, mut header: Header) -> Vec<u8> {
        if self.below(3) == 0 {
            header.flags = self.byte();
            header.lane = if self.below(2) == 0 {
                self.rank()
            } else {
                250 + self.byte() % 6
            };
        }
        if self.below(2) == 0 {
            (header.sent, header.stable, header.trim) =
                (self.number(), self.number(), self.number());
        }
        let mut out = header.bytes();
        for _ in 0..self.below(6) {
            match self.below(4) {
                0 | 1 => {
                    let bytes = self.envelope();
                    let whole = self.below(2) == 0;
                    let total = if whole {
                        bytes.len() as u64
                    } else {
                        self.number()
                    };
                    let next = header.sent.wrapping_add(self.number() % 3);
                    let chunk = Chunk {
                        pos: if whole && self.below(2) == 0 {
                            Pos::start(next)
                        } else if whole {
                            Pos::start(self.number())
                        } else {
                            self.pos()
                        },
                        total: u32::try_from(total & u64::from(u32::MAX)).expect("masked"),
                        bytes: &bytes,
                    };
                    crate::wire::put_chunk(&mut out, &chunk);
                }
                2 => {
                    let bytes = vec![self.byte(); self.below(300)];
                    let piece = Piece {
                        since: self.number(),
                        offset: self.number(),
                        total: self.number(),
                        bytes: &bytes,
                    };
                    crate::wire::put_piece(&mut out, &piece);
                }
                _ => crate::wire::put_message(&mut out, &self.small()),
            }
        }
        out.to_vec()
    }

    fn small(&mut self) -> Small {
        match self.below(6) {
            0 => Small::Acks(
                (0..self.below(9))
                    .map(|_| (self.rank(), self.number()))
                    .collect(),
            ),
            1 => Small::DirectAck(self.number()),
            2 => Small::Nak(
                (0..self.below(70))
                    .map(|_| (self.pos(), self.pos()))
                    .collect(),
            ),
            3 => Small::Fetch {
                epoch: self.number(),
                wants: (0..self.below(20))
                    .map(|_| (self.rank(), self.number(), self.rank()))
                    .collect(),
            },
            4 => Small::StateWanted {
                since: self.number(),
                offset: self.number(),
                len: u32::try_from(self.number() & 0xffff_ffff).expect("masked"),
                image: (self.below(2) == 0).then_some(7),
            },
            _ => Small::StateIs {
                since: self.number(),
                image: 7,
            },
        }
    }

    fn envelope(&mut self) -> Vec<u8> {
        let thread = ThreadId(u16::from(self.byte()));
        let stamp = VClock((0..self.below(10)).map(|_| self.number()).collect());
        let kind = match self.below(7) {
            0 => Kind::Fifo,
            1 => Kind::Causal { thread, stamp },
            2 => Kind::Total { thread, stamp },
            3 => Kind::Sequence {
                first: self.number(),
                ids: (0..self.below(9))
                    .map(|_| TotalId {
                        sender: self.rank(),
                        thread,
                        count: self.number(),
                    })
                    .collect(),
                token: (self.below(2) == 0).then(|| self.rank()),
            },
            4 => Kind::View,
            5 => Kind::Direct,
            _ => Kind::Reply {
                call: self.number(),
                declined: self.below(2) == 0,
            },
        };
        let call = (self.below(4) == 0).then(|| Calling {
            call: self.number(),
            want: Want::All,
            timeout_us: self.number(),
        });
        let envelope = Envelope {
            kind,
            safe: self.below(2) == 0,
            call,
        };
        envelope.put(&[7; 20]).to_vec()
    }
}
