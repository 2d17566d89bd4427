//! Datagrams between the members: lost, doubled, late, out of order, or cut off one way or both.

use crate::rng::Rng;

pub(super) fn below(rng: &mut Rng, n: u64) -> u64 {
    if n == 0 { 0 } else { rng.next_u64() % n }
}

/// True once in `1000 / permille`.
pub(super) fn chance(rng: &mut Rng, permille: u64) -> bool {
    below(rng, 1000) < permille
}

#[derive(Debug, Default)]
pub(super) struct Network {
    /// Per mille.
    pub(super) loss: u64,
    pub(super) duplicates: u64,
    pub(super) reorder: u64,
    /// One way, from and to.
    blocked: std::collections::BTreeSet<(usize, usize)>,
}

impl Network {
    pub(super) fn cut(&mut self, from: usize, to: usize) {
        self.blocked.insert((from, to));
    }

    pub(super) fn heal(&mut self) {
        self.blocked.clear();
    }

    pub(super) fn open(&self, from: usize, to: usize) -> bool {
        !self.blocked.contains(&(from, to))
    }

    pub(super) fn both_ways(&self, a: usize, b: usize) -> bool {
        self.open(a, b) && self.open(b, a)
    }

    /// After how many microseconds a datagram arrives: none, one or two times.
    pub(super) fn delays(
        &self,
        rng: &mut Rng,
        from: usize,
        to: usize,
    ) -> impl Iterator<Item = u64> + use<> {
        let mut delays = [None, None];
        if self.open(from, to) && !chance(rng, self.loss) {
            let mut first = 30 + below(rng, 40);
            if chance(rng, self.reorder) {
                first += below(rng, 3000);
            }
            delays[0] = Some(first);
            if chance(rng, self.duplicates) {
                delays[1] = Some(30 + below(rng, 20_000));
            }
        }
        delays.into_iter().flatten()
    }
}
