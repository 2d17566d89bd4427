//! State transfer: the joiner pulls its checkpoint piece by piece, at its own pace, so that a large one never holds up
//! the leader's traffic, and a lost piece costs one more request.

use crate::config::Limits;
use crate::core::{Core, Phase};
use crate::output::{CommandError, Output};
use crate::time::Instant;
use crate::view::MemberId;
use crate::wire::{self, Message, Piece};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Without progress for this long, the joiner asks again.
pub(crate) const PIECE_RETRY: Duration = Duration::from_millis(5);

/// Of a checkpoint given in parts so much is wanted ahead of what the joiner asks for, in windows, and so much kept
/// behind it, where it may ask again.
const AHEAD_WINDOWS: u64 = 16;
const BEHIND_WINDOWS: u64 = 4;

/// The leader's side: one checkpoint, kept until its joiner is full or gone.
///
/// Invariant: segments are contiguous and end at `given`; those before are dropped only where nobody asks again.
#[derive(Serialize, Deserialize)]
pub(crate) struct Donor {
    segments: VecDeque<(u64, Bytes)>,
    given: u64,
    total: u64,
    /// How far the joiner has asked.
    pub(crate) asked: u64,
    /// A part was asked for, and has not come.
    wanting: bool,
}

impl Donor {
    pub(crate) fn new(segments: Vec<Bytes>) -> Self {
        let mut donor = Self::in_parts(segments.iter().map(|s| s.len() as u64).sum());
        for segment in segments {
            donor.give(segment);
        }
        donor
    }

    /// A checkpoint of this length, of which nothing was given yet.
    pub(crate) fn in_parts(total: u64) -> Self {
        Self {
            segments: VecDeque::new(),
            given: 0,
            total,
            asked: 0,
            wanting: false,
        }
    }

    fn give(&mut self, mut segment: Bytes) {
        let room = usize::try_from(self.total - self.given).unwrap_or(usize::MAX);
        segment.truncate(room);
        self.wanting = false;
        if !segment.is_empty() {
            let start = self.given;
            self.given += segment.len() as u64;
            self.segments.push_back((start, segment));
        }
    }

    /// The next part, if it is time for it and it was not asked for yet.
    fn want(&mut self, limits: &Limits) -> Option<u64> {
        let ahead = self.asked + AHEAD_WINDOWS * window(limits);
        if self.wanting || self.given >= self.total.min(ahead) {
            return None;
        }
        self.wanting = true;
        let behind = self.asked.saturating_sub(BEHIND_WINDOWS * window(limits));
        while let Some((start, segment)) = self.segments.front()
            && start + segment.len() as u64 <= behind
        {
            self.segments.pop_front();
        }
        Some(self.given)
    }

    /// Datagrams with the part `offset..offset + len`; an empty checkpoint is one empty piece.
    pub(crate) fn pieces(
        &mut self,
        header: &[u8],
        since: u64,
        offset: u64,
        len: u32,
        limits: &Limits,
    ) -> Vec<Bytes> {
        let room = limits.datagram_bytes_max - header.len() - wire::PIECE_BYTES;
        let end = offset.saturating_add(u64::from(len.min(limits.transfer_window_bytes)));
        let end = end.min(self.given);
        let first = self.segments.front().map_or(0, |(start, _)| *start);
        self.asked = self.asked.max(offset.min(self.total));
        let mut bodies = Vec::new();
        let mut at = offset;
        while (first <= at && at < end) || (self.total == 0 && bodies.is_empty()) {
            let want = usize::try_from(end.saturating_sub(at)).map_or(room, |n| n.min(room));
            let mut bytes = BytesMut::with_capacity(want);
            self.copy(at, want, &mut bytes);
            let mut out = BytesMut::with_capacity(limits.datagram_bytes_max);
            out.extend_from_slice(header);
            let piece = Piece {
                since,
                offset: at,
                total: self.total,
                bytes: &bytes,
            };
            wire::put_piece(&mut out, &piece);
            at += want as u64;
            bodies.push(out.freeze());
        }
        bodies
    }

    fn copy(&self, mut at: u64, mut want: usize, out: &mut BytesMut) {
        let mut i = self
            .segments
            .partition_point(|(start, _)| *start <= at)
            .saturating_sub(1);
        while want > 0 {
            let Some((start, segment)) = self.segments.get(i) else {
                return;
            };
            let skip = usize::try_from(at - start).expect("a segment fits memory");
            let part = segment.get(skip..).unwrap_or_default();
            let part = &part[..part.len().min(want)];
            out.extend_from_slice(part);
            at += part.len() as u64;
            want -= part.len();
            i += 1;
        }
    }
}

/// The joiner's side.
///
/// Invariant: `at <= asked`; nothing kept begins before `at`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Receiving {
    pub(crate) at: u64,
    total: Option<u64>,
    asked: u64,
    kept: BTreeMap<u64, Bytes>,
    pub(crate) retry_at: Instant,
    /// Nothing is asked for now: what has come is still being put away.
    held: bool,
}

impl Receiving {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            at: 0,
            total: None,
            asked: 0,
            kept: BTreeMap::new(),
            retry_at: now,
            held: false,
        }
    }

    pub(crate) fn total(&self) -> Option<u64> {
        self.total
    }

    pub(crate) fn done(&self) -> bool {
        self.total == Some(self.at)
    }

    /// Takes a piece; gives what is now in order, with its position.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        piece: &Piece<'_>,
        limits: &Limits,
    ) -> Vec<(u64, Bytes)> {
        let end = piece.offset.checked_add(piece.bytes.len() as u64);
        let fits = end.is_some_and(|end| end <= piece.total && end <= self.at + window(limits) * 2);
        if !fits || self.total.is_some_and(|t| t != piece.total) {
            return Vec::new();
        }
        self.total = Some(piece.total);
        if piece.offset >= self.at && !piece.bytes.is_empty() {
            self.kept
                .entry(piece.offset)
                .or_insert_with(|| Bytes::copy_from_slice(piece.bytes));
        }
        let mut out = Vec::new();
        while let Some(first) = self.kept.first_entry() {
            let start = *first.key();
            if start > self.at {
                break;
            }
            let mut bytes = first.remove();
            let skip = usize::try_from(self.at - start).unwrap_or(usize::MAX);
            if skip < bytes.len() {
                let new = bytes.split_off(skip);
                out.push((self.at, new.clone()));
                self.at += new.len() as u64;
            }
        }
        self.asked = self.asked.max(self.at); // more may have come than was asked for
        if !out.is_empty() {
            self.retry_at = now + PIECE_RETRY;
        }
        out
    }

    /// What to ask for now: the next part when half of the window has come, the missing part when nothing comes.
    pub(crate) fn want(&mut self, now: Instant, limits: &Limits) -> Option<(u64, u32)> {
        if self.done() {
            return None;
        }
        if self.held {
            self.retry_at = self.retry_at.max(now + PIECE_RETRY);
            return None;
        }
        let window = window(limits);
        if now >= self.retry_at {
            self.retry_at = now + PIECE_RETRY;
            let end = self
                .kept
                .first_key_value()
                .map_or(self.at + window, |(start, _)| *start);
            self.asked = self.asked.max(end);
            return Some((self.at, u32::try_from(end - self.at).unwrap_or(u32::MAX)));
        }
        let more = self.total.is_some_and(|t| self.asked < t);
        if more && self.asked - self.at <= window / 2 {
            let from = self.asked;
            self.asked += window / 2;
            return Some((from, u32::try_from(window / 2).unwrap_or(u32::MAX)));
        }
        None
    }
}

fn window(limits: &Limits) -> u64 {
    u64::from(limits.transfer_window_bytes)
}

impl Core {
    pub(crate) fn begin_donation(
        &mut self,
        joiner: &MemberId,
        donor: Donor,
    ) -> Result<(), CommandError> {
        let Some(slot @ None) = self.donors.get_mut(joiner) else {
            return Err(CommandError::NoSuchJoiner);
        };
        *slot = Some(donor);
        self.want_part(joiner);
        Ok(())
    }

    pub(crate) fn on_part(&mut self, joiner: &MemberId, bytes: Bytes) -> Result<(), CommandError> {
        let donor = self.donors.get_mut(joiner).and_then(Option::as_mut);
        let donor = donor.filter(|d| d.wanting && !bytes.is_empty());
        donor.ok_or(CommandError::NoSuchJoiner)?.give(bytes);
        self.want_part(joiner);
        Ok(())
    }

    fn want_part(&mut self, joiner: &MemberId) {
        if let Some(Some(donor)) = self.donors.get_mut(joiner)
            && let Some(offset) = donor.want(&self.config.limits)
        {
            self.outputs.push_back(Output::CheckpointPartWanted {
                joiner: joiner.clone(),
                offset,
            });
        }
    }

    pub(crate) fn on_pieces_wanted(&mut self, from: &MemberId, since: u64, offset: u64, len: u32) {
        let header = self.header();
        let Some(Some(donor)) = self.donors.get_mut(from).filter(|_| self.resend_left > 0) else {
            return;
        };
        let bodies = donor.pieces(&header.bytes(), since, offset, len, &self.config.limits);
        let sent = bodies.iter().map(Bytes::len).sum();
        self.resend_left = self.resend_left.saturating_sub(sent);
        self.send_bodies(from, bodies);
        self.want_part(from);
    }

    pub(crate) fn on_piece(&mut self, piece: &Piece<'_>) {
        let Some(r) = &mut self.receiving else { return };
        if piece.since != self.joined_since || r.done() {
            return;
        }
        let had_total = r.total().is_some();
        let got = r.take(self.now, piece, &self.config.limits);
        let total = r.total().unwrap_or(piece.total);
        let done = r.done();
        if !had_total {
            tracing::debug!(bytes = total, "checkpoint begins");
        }
        for (offset, bytes) in got {
            self.outputs.push_back(Output::CheckpointChunk {
                offset,
                total,
                bytes,
            });
        }
        if done {
            self.receiving = None;
            self.checkpoint_done = true;
            self.outputs.push_back(Output::CheckpointDone);
            self.deliver();
        }
    }

    pub(crate) fn ask_for_pieces(&mut self) {
        if self.phase != Phase::Joining || self.wedged.is_some() {
            return;
        }
        let since = self.joined_since;
        while let Some((offset, len)) = self
            .receiving
            .as_mut()
            .and_then(|r| r.want(self.now, &self.config.limits))
        {
            let leader = self.view().leader().clone();
            self.send(&leader, Message::PiecesWanted { since, offset, len });
        }
    }

    /// Joiner: whether the transfer of its checkpoint is held up for now, because what has come is still being put away.
    /// To be told again as long as it is; what was asked for before comes all the same.
    pub fn hold_transfer(&mut self, held: bool) {
        if let Some(receiving) = &mut self.receiving {
            receiving.held = held;
        }
    }

    /// Whether the checkpoint has come in whole.
    pub(crate) fn has_checkpoint(&self) -> bool {
        self.checkpoint_done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Header, Item, Reader};

    #[test]
    fn more_than_was_asked_for_is_taken_and_asked_on_from_there() {
        let limits = Limits {
            transfer_window_bytes: 1000,
            ..Limits::default()
        };
        let now = Instant::from_micros(0);
        let mut receiving = Receiving::new(now);
        receiving.held = true;
        assert_eq!(receiving.want(now, &limits), None);
        // Looked at again later, not at once.
        assert!(receiving.retry_at > now);
        receiving.held = false;
        let now = receiving.retry_at;
        assert_eq!(receiving.want(now, &limits), Some((0, 1000)));
        let piece = Piece {
            since: 1,
            offset: 0,
            total: 9000,
            bytes: &[7; 1800],
        };
        assert_eq!(receiving.take(now, &piece, &limits).len(), 1);
        assert_eq!(receiving.want(now, &limits), Some((1800, 500)));
    }

    #[test]
    fn a_checkpoint_arrives_whole_through_loss() {
        let limits = Limits {
            datagram_bytes_max: 200,
            transfer_window_bytes: 2000,
            ..Limits::default()
        };
        let mut rng = crate::rng::Rng::new(1);
        for size in [0usize, 1, 117, 5000, 40_000] {
            let image: Vec<u8> = (0..size)
                .map(|i| u8::try_from(i * 7 % 251).unwrap())
                .collect();
            for whole in [true, false] {
                let segments = image.chunks(333).map(Bytes::copy_from_slice).collect();
                let mut donor = if whole {
                    Donor::new(segments)
                } else {
                    Donor::in_parts(size as u64)
                };
                let mut now = Instant::from_micros(0);
                let mut r = Receiving::new(now);
                let mut got = Vec::new();
                let mut steps = 0;
                while !r.done() {
                    steps += 1;
                    assert!(steps < 10_000, "no progress at {size}");
                    let Some((offset, len)) = r.want(now, &limits) else {
                        now += PIECE_RETRY;
                        continue;
                    };
                    if donor.want(&limits) == Some(donor.given) && rng.next_u64().is_multiple_of(2)
                    {
                        let at = usize::try_from(donor.given).unwrap();
                        let end = (at + 777).min(size);
                        donor.give(Bytes::copy_from_slice(&image[at..end]));
                    } else {
                        // It was asked for, and comes later.
                        donor.wanting = false;
                    }
                    for body in donor.pieces(&Header::default().bytes(), 1, offset, len, &limits) {
                        assert!(body.len() <= 200);
                        if rng.next_u64().is_multiple_of(4) {
                            continue;
                        }
                        for item in Reader::new(&body).unwrap().1 {
                            let Item::Piece(p) = item else {
                                panic!("only pieces")
                            };
                            for (at, bytes) in r.take(now, &p, &limits) {
                                assert_eq!(at, got.len() as u64);
                                got.extend_from_slice(&bytes);
                            }
                        }
                    }
                }
                assert_eq!(got, image);
                let kept: usize = donor.segments.iter().map(|(_, s)| s.len()).sum();
                assert!(whole || kept <= 2000 * 21 + 777, "{kept} bytes are kept");
            }
        }
    }
}
