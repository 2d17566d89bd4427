//! Small datagrams of many groups together: one for all that goes to the same members at the same moment.
//!
//! A body that begins with [`FORMAT`] holds bodies, each behind its length (two bytes, little-endian), until its end or a
//! length of zero. A body that goes alone goes as it is.

use crate::view::MemberId;
use bytes::Bytes;
use std::sync::Arc;

/// The first byte; the site core's bodies begin with 1, those of processes with 2.
const FORMAT: u8 = 3;
/// Bytes in front of a body in a bundle.
const LENGTH_BYTES: usize = 2;
/// Sets of receivers with an open bundle.
const OPEN_MAX: usize = 16;
/// Bytes that one set of receivers may have open.
const OPEN_BYTES_MAX: usize = 60 * 1024;

struct Open {
    to: Arc<[MemberId]>,
    bodies: Vec<Bytes>,
    bytes: usize,
}

/// What was given and is not sent yet.
pub(super) struct Bundles {
    open: Vec<Open>,
    datagram_bytes_max: usize,
}

impl Bundles {
    pub(super) fn new(datagram_bytes_max: usize) -> Self {
        Self {
            open: Vec::new(),
            datagram_bytes_max,
        }
    }

    /// Takes bodies for `to`. What is sent to the same receivers keeps its order.
    pub(super) fn put(
        &mut self,
        to: Arc<[MemberId]>,
        bodies: Vec<Bytes>,
        send: &mut impl FnMut(&[MemberId], &[Bytes]),
    ) {
        let small = |body: &Bytes| body.len() + LENGTH_BYTES < self.datagram_bytes_max / 2;
        let at = self.open.iter().position(|open| open.to == to);
        let [body] = &*bodies else {
            self.close(at, send);
            return send(&to, &bodies);
        };
        if !small(body) {
            self.close(at, send);
            return send(&to, &bodies);
        }
        let at = at.unwrap_or_else(|| {
            if self.open.len() == OPEN_MAX {
                self.close(Some(0), send);
            }
            self.open.push(Open {
                to,
                bodies: Vec::new(),
                bytes: 0,
            });
            self.open.len() - 1
        });
        let open = &mut self.open[at];
        open.bytes += body.len() + LENGTH_BYTES;
        open.bodies.extend(bodies);
        if open.bytes >= OPEN_BYTES_MAX {
            self.close(Some(at), send);
        }
    }

    /// Sends everything.
    pub(super) fn flush(&mut self, send: &mut impl FnMut(&[MemberId], &[Bytes])) {
        while !self.open.is_empty() {
            self.close(Some(0), send);
        }
    }

    fn close(&mut self, at: Option<usize>, send: &mut impl FnMut(&[MemberId], &[Bytes])) {
        let Some(at) = at else { return };
        let open = self.open.remove(at);
        if open.bodies.len() == 1 {
            return send(&open.to, &open.bodies);
        }
        let max = self.datagram_bytes_max;
        let mut bundles: Vec<Bytes> = Vec::new();
        let mut left = 1 + open.bytes;
        let mut bundle: Vec<u8> = Vec::with_capacity(max.min(left));
        for body in &open.bodies {
            if !bundle.is_empty() && bundle.len() + LENGTH_BYTES + body.len() > max {
                // All but the last are of one size, so that one system call sends them.
                bundle.resize(max, 0);
                let next = Vec::with_capacity(max.min(left));
                bundles.push(std::mem::replace(&mut bundle, next).into());
            }
            if bundle.is_empty() {
                bundle.push(FORMAT);
            }
            let length = u16::try_from(body.len()).expect("a small body");
            bundle.extend_from_slice(&length.to_le_bytes());
            bundle.extend_from_slice(body);
            left -= LENGTH_BYTES + body.len();
        }
        bundles.push(bundle.into());
        send(&open.to, &bundles);
    }
}

/// The bodies that a datagram holds; what is damaged ends it.
pub(super) fn bodies(datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (mut alone, mut rest) = match datagram.split_first() {
        Some((&FORMAT, rest)) => (None, rest),
        _ => (Some(datagram), &[][..]),
    };
    let mut next = move || {
        let (length, after) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes(*length));
        let (body, after) = after.split_at_checked(length)?;
        rest = after;
        (length > 0).then_some(body)
    };
    std::iter::from_fn(move || alone.take().or_else(&mut next)).fuse()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 300;

    fn to(names: &[&str]) -> Arc<[MemberId]> {
        names.iter().map(|n| MemberId::new(*n, 1)).collect()
    }

    fn body(n: u8, len: usize) -> Bytes {
        vec![n.max(4); len].into()
    }

    #[test]
    fn what_goes_to_the_same_members_goes_together_and_in_order() {
        let mut sent: Vec<(usize, Vec<Bytes>)> = Vec::new();
        let mut send = |to: &[MemberId], bodies: &[Bytes]| sent.push((to.len(), bodies.to_vec()));
        let mut bundles = Bundles::new(MAX);
        for n in 0..40 {
            bundles.put(to(&["a", "b"]), vec![body(n, 50)], &mut send);
        }
        bundles.put(to(&["c"]), vec![body(50, 20)], &mut send);
        // Large ones, and bursts, go as they are, after what was there before.
        bundles.put(to(&["a", "b"]), vec![body(60, 200)], &mut send);
        bundles.put(to(&["a", "b"]), vec![body(61, MAX), body(62, 9)], &mut send);
        bundles.flush(&mut send);
        let mut got = Vec::new();
        for (_, sent_bodies) in sent.iter().filter(|(receivers, _)| *receivers == 2) {
            let (last, full) = sent_bodies.split_last().unwrap();
            assert!(full.iter().all(|b| b.len() == MAX) && last.len() <= MAX);
            let parts = sent_bodies.iter().flat_map(|b| bodies(b));
            got.extend(parts.map(|b| (b[0], b.len())));
        }
        let small = (0..40).map(|n: u8| (n.max(4), 50));
        let wanted = small.chain([(60, 200), (61, MAX), (62, 9)]);
        assert_eq!(got, wanted.collect::<Vec<_>>());
        let alone = sent.iter().find(|(receivers, _)| *receivers == 1);
        assert_eq!(alone.unwrap().1, [body(50, 20)], "alone it goes as it is");
        assert!(sent.len() == 4, "{}", sent.len());
    }

    #[test]
    fn nothing_is_open_without_end() {
        let mut bytes = 0;
        let mut send = |_: &[MemberId], bodies: &[Bytes]| {
            bytes += bodies.iter().map(Bytes::len).sum::<usize>();
        };
        let mut bundles = Bundles::new(1360);
        for n in 0..1000 {
            bundles.put(to(&["a"]), vec![body(9, 100)], &mut send);
            let receivers = to(&[&format!("m{n}")]);
            bundles.put(receivers, vec![body(9, 100)], &mut send);
            assert!(bundles.open.len() <= OPEN_MAX);
            assert!(bundles.open.iter().all(|open| open.bytes < OPEN_BYTES_MAX));
        }
        bundles.flush(&mut send);
        assert!(bytes >= 200_000);
    }

    #[test]
    fn what_is_damaged_ends_and_harms_nothing() {
        let bodies = |datagram: &[u8]| bodies(datagram).count();
        assert_eq!(bodies(&[]), 1, "for others to judge");
        assert_eq!(bodies(&[FORMAT]), 0);
        assert_eq!(bodies(&[FORMAT, 1, 0, 7, 9]), 1);
        assert_eq!(bodies(&[FORMAT, 1, 0, 7, 9, 0, 1]), 1);
        assert_eq!(bodies(&[FORMAT, 0, 0, 1, 0, 7]), 0);
        assert_eq!(bodies(&[FORMAT, 1, 0, 7, 2, 0, 8, 8]), 2);
    }
}
