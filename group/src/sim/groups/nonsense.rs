//! What a peer that has the key may say: bent datagrams, and well-formed ones with numbers that tear at every edge.

use super::world::World;
use crate::process::nonsense::Draw;
use crate::sim::network::{below, chance};
use crate::view::MemberId;
use bytes::Bytes;

/// What a process may hold: its windows, backlogs and reorder buffers are far below in these worlds.
const IMAGE_BYTES_MAX: usize = 64 << 20;

impl World {
    /// Nonsense from the sender of a datagram that is about to arrive.
    pub(super) fn talk_nonsense(&mut self, node: usize, from: &MemberId, body: &Bytes) {
        if !chance(&mut self.rng, 200) {
            return;
        }
        let said = Draw(&mut self.rng).datagram(body);
        let said = Bytes::from(said);
        self.call(node, |p, now| p.handle_datagram(now, from, &said));
        if below(&mut self.rng, 200) == 0
            && let Some(pair) = &self.nodes[node].process
        {
            let image = pair
                .process()
                .snapshot(crate::time::Instant::from_micros(self.now));
            assert!(image.len() <= IMAGE_BYTES_MAX, "{} bytes", image.len());
        }
    }
}
