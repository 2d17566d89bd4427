//! The order of all inputs as a checkpoint carries it to a replica that joins.

use std::collections::BTreeMap;

use unbroken_tcpstate::{ConnId, EventNo, Image};

use super::super::super::history::History;
use super::super::super::spill::{self, Piece};
use super::super::Servers;
use super::{Base, Live};
use crate::clock::BootTime;

/// What a checkpoint carries of the order.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct OrderHeader {
    /// Length of the history, in bytes; they follow apart.
    pub(crate) bytes: u64,
    /// What all of it costs a server that begins.
    pub(crate) cost_bytes: u64,
    /// `Skip` events: connection and number.
    pub(crate) skips: Vec<(u64, u64)>,
    /// False: it was too long to be kept, and brings nobody anywhere.
    pub(crate) complete: bool,
    /// What a server begins with; the images' lengths, which stand before the history.
    pub(crate) base: Option<(Vec<u64>, Vec<Live>)>,
}

impl OrderHeader {
    /// Whether servers can be brought up with it to go on where these connections stand: what a client
    /// may still ask for must be said again by the server, and is not if it lies before its state.
    pub(crate) fn is_usable(&self, tcp: &Image) -> bool {
        let live = self.base.iter().flat_map(|(_, live)| live);
        let produced: BTreeMap<ConnId, u64> = live.map(|l| (l.conn, l.produced)).collect();
        self.complete
            && tcp
                .connections()
                .all(|(conn, state)| produced.get(&conn).is_none_or(|p| *p <= state.acked))
    }

    /// Lengths of the servers' images, which follow the header.
    pub(crate) fn images(&self) -> &[u64] {
        self.base.as_ref().map_or(&[], |(lengths, _)| lengths)
    }

    /// Length of everything that follows the header.
    pub(crate) fn total_bytes(&self) -> Option<u64> {
        let images = self.images().iter().copied();
        images.into_iter().try_fold(self.bytes, u64::checked_add)
    }
}

/// The order as a checkpoint brings it.
#[derive(Debug)]
pub(crate) struct OrderImage {
    pub(crate) header: OrderHeader,
    /// One for each of the header's.
    pub(crate) images: Vec<Vec<Piece>>,
    /// In pieces that end where inputs do.
    pub(crate) history: Vec<Piece>,
}

impl Servers {
    /// The order as a checkpoint carries it: the servers' images, then the history.
    pub(crate) fn order_image(&mut self) -> Option<(OrderHeader, Vec<Piece>)> {
        let order = self.order.as_mut()?;
        let base = order.base.as_ref();
        let images = base.map_or(Vec::new(), |b| b.images.clone());
        let lengths = |b: &Base| b.images.iter().map(|image| spill::total(image)).collect();
        let header = OrderHeader {
            bytes: order.history.bytes(),
            cost_bytes: order.history.cost_bytes(),
            skips: order.skips.iter().map(|(c, n)| (c.0, n.0)).collect(),
            complete: order.history.complete(),
            base: base.map(|b| (lengths(b), b.live.clone())),
        };
        let pieces = images.into_iter().flatten().chain(order.history.chunks());
        Some((header, pieces.collect()))
    }

    /// Takes the order from a checkpoint and begins the replay. To be called after [`Self::clear`].
    pub(crate) fn restore_order(&mut self, now: BootTime, image: OrderImage) {
        let Some(order) = &mut self.order else {
            return;
        };
        let OrderImage {
            header,
            images,
            history,
        } = image;
        order.base = header.base.map(|(_, live)| Base { images, live });
        let max = order.history_bytes_max;
        order.history = History::restore(max, history, header.cost_bytes);
        let skips = header.skips.iter();
        order.skips = skips.map(|(c, n)| (ConnId(*c), EventNo(*n))).collect();
        order.begin(now);
    }
}
