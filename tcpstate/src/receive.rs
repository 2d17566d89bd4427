//! The receiving half: reassembly, straight from packets into the event log.
//!
//! Bytes that are in order leave as `Data` events at once. Bytes beyond a gap are kept here, within
//! the window, and announced to the client as SACK blocks (RFC 2018). They are *not* replicated: a
//! new leader does not have them, does not say so, and gets them again.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::segment::SACK_BLOCKS_MAX;

/// The most pieces kept beyond gaps; further ones are dropped, and come again.
const PIECES_MAX: usize = 256;

/// What the client has sent beyond what is in order.
///
/// Invariant: pieces neither touch `received` nor overlap; all lie below the accepted right edge.
#[derive(Debug, Default)]
pub(crate) struct Reassembly {
    pieces: BTreeMap<u64, Bytes>,
    /// Bytes in `pieces`.
    held: usize,
    /// Offset of the client's FIN, once seen.
    fin_at: Option<u64>,
    /// Start of the piece that arrived last: its block is reported first (RFC 2018 §4).
    latest: u64,
}

/// A segment's payload, cut to what is new and acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trimmed<'a> {
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
    /// The FIN lies within what is acceptable.
    pub(crate) fin: bool,
}

/// Cuts a payload that starts at `offset` to `[received, limit)`. `None` if nothing of it is new
/// (the FIN counts).
pub(crate) fn trim(
    offset: i64,
    payload: &[u8],
    fin: bool,
    received: u64,
    limit: u64,
) -> Option<Trimmed<'_>> {
    let end = offset + i64::try_from(payload.len()).ok()?;
    let from = offset.max(received.cast_signed());
    let to = end.min(limit.cast_signed());
    let fin = fin && end >= received.cast_signed() && end <= limit.cast_signed();
    let bytes = if from < to {
        let skip = usize::try_from(from - offset).ok()?;
        let len = usize::try_from(to - from).ok()?;
        &payload[skip..skip + len]
    } else if fin {
        return Some(Trimmed {
            offset: u64::try_from(end).ok()?,
            bytes: &[],
            fin,
        });
    } else {
        return None;
    };
    Some(Trimmed {
        offset: u64::try_from(from).ok()?,
        bytes,
        fin,
    })
}

impl Reassembly {
    /// Bytes kept beyond gaps.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Whether anything waits behind a gap.
    pub(crate) fn has_gap(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Notes the FIN. The first one counts; bytes beyond it are never taken.
    pub(crate) fn note_fin(&mut self, at: u64) {
        self.fin_at.get_or_insert(at);
    }

    /// Where the FIN is, if it was seen.
    pub(crate) fn fin_at(&self) -> Option<u64> {
        self.fin_at
    }

    /// Keeps bytes beyond a gap.
    pub(crate) fn keep(&mut self, mut offset: u64, mut bytes: &[u8]) {
        self.latest = offset;
        if let Some((&start, piece)) = self.pieces.range(..=offset).next_back() {
            let covered = (start + piece.len() as u64).saturating_sub(offset);
            let covered = usize::try_from(covered)
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            bytes = &bytes[covered..];
            offset += covered as u64;
        }
        while !bytes.is_empty() && self.pieces.len() < PIECES_MAX {
            let next = self
                .pieces
                .range(offset..)
                .next()
                .map(|(s, p)| (*s, p.len() as u64));
            let (free, skip) = match next {
                Some((start, len)) => (start - offset, len),
                None => (u64::MAX, 0),
            };
            let free = usize::try_from(free).unwrap_or(usize::MAX).min(bytes.len());
            if free > 0 {
                self.held += free;
                self.pieces
                    .insert(offset, Bytes::copy_from_slice(&bytes[..free]));
            }
            let step = free.saturating_add(usize::try_from(skip).unwrap_or(usize::MAX));
            let step = step.min(bytes.len());
            bytes = &bytes[step..];
            offset += step as u64;
        }
    }

    /// Takes the next piece that has become in order, cut to begin at `received`.
    pub(crate) fn take(&mut self, received: u64) -> Option<Bytes> {
        loop {
            let (&start, _) = self.pieces.first_key_value()?;
            if start > received {
                return None;
            }
            let (_, piece) = self.pieces.pop_first()?;
            self.held -= piece.len();
            let old = usize::try_from(received - start).unwrap_or(usize::MAX);
            if old < piece.len() {
                return Some(piece.slice(old..));
            }
        }
    }

    /// Up to three SACK blocks, the most recent first.
    pub(crate) fn blocks(&self) -> Vec<(u64, u64)> {
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (&start, piece) in &self.pieces {
            let end = start + piece.len() as u64;
            match merged.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ => merged.push((start, end)),
            }
        }
        if let Some(i) = merged
            .iter()
            .position(|(s, e)| (*s..*e).contains(&self.latest))
        {
            merged[..=i].rotate_right(1);
        }
        merged.truncate(SACK_BLOCKS_MAX);
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trimming_cuts_both_ends_and_knows_the_fin() {
        let data = b"0123456789";
        let t = trim(5, data, true, 8, 20).unwrap();
        assert_eq!((t.offset, t.bytes, t.fin), (8, &b"3456789"[..], true));
        let t = trim(5, data, true, 5, 12).unwrap();
        assert_eq!((t.offset, t.bytes, t.fin), (5, &b"0123456"[..], false));
        assert_eq!(trim(0, data, false, 10, 20), None, "a duplicate");
        assert_eq!(trim(20, data, false, 10, 20), None, "beyond the window");
        let t = trim(0, data, true, 10, 20).unwrap();
        assert_eq!(
            (t.offset, t.bytes, t.fin),
            (10, &b""[..], true),
            "only the FIN is new"
        );
        assert_eq!(trim(-1, b"x", false, 0, 20), None, "a keep-alive");
    }

    /// Every order of overlapping pieces gives the same bytes.
    #[test]
    fn pieces_in_any_order_and_overlap_give_the_stream() {
        let stream: Vec<u8> = (0..100u8).collect();
        let cuts = [
            (10usize, 30usize),
            (20, 50),
            (45, 60),
            (60, 61),
            (90, 100),
            (5, 95),
            (0, 7),
        ];
        for rotation in 0..cuts.len() {
            let mut order = cuts;
            order.rotate_left(rotation);
            let mut got = Vec::new();
            let mut r = Reassembly::default();
            for (from, to) in order.iter().chain(&[(0, 100)]) {
                let received = got.len() as u64;
                let Some(t) = trim(*from as i64, &stream[*from..*to], false, received, 100) else {
                    continue;
                };
                if t.offset == received {
                    got.extend_from_slice(t.bytes);
                } else {
                    r.keep(t.offset, t.bytes);
                }
                while let Some(piece) = r.take(got.len() as u64) {
                    got.extend_from_slice(&piece);
                }
                for (start, end) in r.blocks() {
                    assert!(start > got.len() as u64 && end > start);
                }
            }
            assert_eq!(got, stream, "rotation {rotation}");
            assert!(!r.has_gap() && r.held() == 0);
        }
    }

    #[test]
    fn the_latest_block_comes_first_and_pieces_are_bounded() {
        let mut r = Reassembly::default();
        for start in [50u64, 10, 30, 70] {
            r.keep(start, b"ab");
        }
        assert_eq!(r.blocks(), [(70, 72), (10, 12), (30, 32)]);
        for i in 0..10_000u64 {
            r.keep(100 + 2 * i, b"x");
        }
        assert_eq!(r.pieces.len(), PIECES_MAX);
    }
}
