//! State transfer of a group: the joiner pulls the state of the view in which it joined from a donor, piece by piece; if the
//! donor departs or gives nothing, the next one goes on at the same byte, since all made their image of the same state.
//!
//! BJ87 (state transfer at the instant of a view). Messages of the view wait at the joiner until the state is there.

use super::ledger::Loading;
use super::wire::Small;
use crate::config::Limits;
use crate::time::Instant;
use crate::transfer::{Donor, Receiving};
use crate::view::MemberId;
use crate::wire::Piece;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The joiner's side.
#[derive(Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) since: u64,
    pub(crate) donors: Vec<MemberId>,
    receiving: Receiving,
    /// Checksum of the image that is being received.
    image: Option<u32>,
    bytes: BytesMut,
    /// Requests since the donor last gave anything.
    unanswered: u32,
}

/// A donor that leaves this many requests unanswered is passed over, for the time being.
const UNANSWERED_MAX: u32 = 20;

impl Load {
    pub(crate) fn new(now: Instant, loading: &Loading) -> Self {
        Self {
            since: loading.since,
            donors: loading.donors.clone(),
            receiving: Receiving::new(now),
            image: None,
            bytes: BytesMut::new(),
            unanswered: 0,
        }
    }

    /// What to ask the first donor for now.
    pub(crate) fn want(&mut self, now: Instant, limits: &Limits) -> Option<(MemberId, Small)> {
        let (offset, len) = self.receiving.want(now, limits)?;
        self.unanswered += 1;
        if self.unanswered > UNANSWERED_MAX && !self.donors.is_empty() {
            self.unanswered = 1;
            self.donors.rotate_left(1);
        }
        let donor = self.donors.first()?.clone();
        let small = Small::StateWanted {
            since: self.since,
            offset,
            len,
            image: self.image,
        };
        Some((donor, small))
    }

    /// The donor's image has this checksum: begins anew if it is another than so far.
    pub(crate) fn on_image(&mut self, now: Instant, since: u64, image: u32) {
        if since == self.since && self.image != Some(image) {
            self.image = Some(image);
            self.unanswered = 0;
            self.receiving = Receiving::new(now);
            self.bytes.clear();
        }
    }

    /// Takes a piece; gives how much is there and how much there is, if it was news.
    pub(crate) fn on_piece(
        &mut self,
        now: Instant,
        piece: &Piece<'_>,
        limits: &Limits,
    ) -> Option<(u64, u64)> {
        if piece.since != self.since || self.image.is_none() || self.receiving.done() {
            return None;
        }
        let got = self.receiving.take(now, piece, limits);
        for (_, bytes) in &got {
            self.bytes.extend_from_slice(bytes);
        }
        let news = !got.is_empty() || self.receiving.done();
        if news {
            self.unanswered = 0;
        }
        news.then_some((self.receiving.at, piece.total))
    }

    /// The state, when it is there in whole.
    pub(crate) fn whole(&mut self) -> Option<Bytes> {
        let done = self.receiving.done();
        done.then(|| std::mem::take(&mut self.bytes).freeze())
    }

    pub(crate) fn due(&self) -> Instant {
        self.receiving.retry_at
    }
}

/// The donor's side: the image of one view, for its joiners.
#[derive(Serialize, Deserialize)]
pub(crate) struct Donating {
    pub(crate) joiners: BTreeSet<MemberId>,
    image: Option<(u32, Donor)>,
}

impl Donating {
    pub(crate) fn new() -> Self {
        Self {
            joiners: BTreeSet::new(),
            image: None,
        }
    }

    /// The program gives the state; `false` if it did before.
    pub(crate) fn give(&mut self, segments: Vec<Bytes>) -> bool {
        if self.image.is_some() {
            return false;
        }
        let checksum = segments
            .iter()
            .fold(0, |sum, s| crc32c::crc32c_append(sum, s));
        self.image = Some((checksum, Donor::new(segments)));
        true
    }

    /// Whether there is somebody who takes the state from here.
    pub(crate) fn gives(&self) -> bool {
        self.image.is_some() && !self.joiners.is_empty()
    }

    pub(crate) fn image(&mut self) -> Option<(u32, &mut Donor)> {
        self.image.as_mut().map(|(sum, donor)| (*sum, donor))
    }
}
