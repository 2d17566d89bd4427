//! Hostile datagrams: dropped, counted once, and nothing is kept of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::header::{HEADER_BYTES, Header, OVERHEAD_BYTES};
use super::inbound::{Counters, Inbound};
use super::outbound::Outbound;
use super::seal::GroupKey;
use crate::rng::Rng;
use crate::view::MemberId;

const GROUP: u32 = 3;
const INSTANCE: u128 = 5;
const KEY: [u8; 32] = [1; 32];

fn address(rank: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, rank + 1], 7000))
}

/// Of three members, by rank; `b`, the second, listens.
fn members() -> BTreeMap<String, SocketAddr> {
    ["a", "b", "c"]
        .into_iter()
        .map(str::to_owned)
        .zip((0..).map(address))
        .collect()
}

fn listener() -> Inbound {
    let mut inbound = Inbound::new(&members(), 1, GroupKey::new(&KEY));
    inbound.set_instance(GROUP, INSTANCE);
    inbound
}

struct Peer {
    rank: u8,
    outbound: Outbound,
}

impl Peer {
    fn with_key(rank: u8, incarnation: u128, key: [u8; 32]) -> Self {
        let outbound = Outbound::new(rank, GroupKey::new(&key));
        let mut peer = Self { rank, outbound };
        peer.outbound.set_instance(GROUP, INSTANCE);
        peer.live(incarnation);
        peer
    }

    fn new(rank: u8, incarnation: u128) -> Self {
        Self::with_key(rank, incarnation, KEY)
    }

    fn live(&mut self, incarnation: u128) {
        let name = ["a", "b", "c"][usize::from(self.rank)];
        self.outbound
            .set_member(GROUP, MemberId::new(name, incarnation));
    }

    fn epoch(&mut self, epoch: u64) {
        self.outbound.set_epoch(GROUP, epoch);
    }

    fn seal(&mut self, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        self.outbound.sealer(GROUP).unwrap().seal(&mut out, body);
        out
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Heard {
    from: MemberId,
    body: Vec<u8>,
}

fn total(c: Counters) -> u64 {
    c.received
        + c.malformed
        + c.other_version
        + c.stranger
        + c.forged
        + c.replayed
        + c.stale
        + c.own
}

/// Gives one datagram to the listener: it is counted once, and handed on at most once.
fn give(inbound: &mut Inbound, from: SocketAddr, datagram: &[u8]) -> Option<Heard> {
    let before = inbound.counters();
    let mut heard = Vec::new();
    inbound.take(from, &mut datagram.to_vec(), &mut |group, from, body| {
        assert_eq!(group, GROUP);
        heard.push(Heard {
            from: from.clone(),
            body: body.to_vec(),
        });
    });
    let after = inbound.counters();
    assert_eq!(total(after), total(before) + 1, "{before:?} {after:?}");
    assert_eq!(after.received - before.received, heard.len() as u64);
    heard.pop()
}

/// Gives one datagram, and says which counter it moved.
fn fate(inbound: &mut Inbound, from: SocketAddr, datagram: &[u8]) -> &'static str {
    let before = inbound.counters();
    give(inbound, from, datagram);
    let after = inbound.counters();
    let moved = [
        ("received", after.received - before.received),
        ("malformed", after.malformed - before.malformed),
        ("version", after.other_version - before.other_version),
        ("stranger", after.stranger - before.stranger),
        ("forged", after.forged - before.forged),
        ("replayed", after.replayed - before.replayed),
        ("stale", after.stale - before.stale),
        ("own", after.own - before.own),
    ];
    let moved = moved.into_iter().find(|(_, by)| *by > 0);
    moved.expect("counted").0
}

#[test]
fn a_header_is_read_as_it_was_put_and_only_of_this_version_and_lane() {
    let header = Header {
        rank: 2,
        group: 3,
        incarnation: 4 << 100,
        epoch: 5 << 40,
        counter: 6 << 50,
    };
    let mut bytes = Vec::new();
    header.put(&mut bytes);
    assert_eq!(bytes.len(), HEADER_BYTES);
    assert_eq!(Header::of(&bytes), None, "no room for a tag");
    bytes.resize(OVERHEAD_BYTES, 0);
    assert_eq!(Header::of(&bytes), Some(header));
    for at in 0..2 {
        let mut other = bytes.clone();
        other[at] ^= 1;
        assert_eq!(Header::of(&other), None);
    }
}

#[test]
fn each_kind_of_wrong_datagram_has_its_counter() {
    let mut b = listener();
    let mut a = Peer::new(0, 7);
    let good = a.seal(b"good");
    assert_eq!(fate(&mut b, address(0), b""), "malformed");
    assert_eq!(
        fate(&mut b, address(0), &good[..OVERHEAD_BYTES - 1]),
        "malformed"
    );
    let mut version = good.clone();
    version[0] += 1;
    assert_eq!(fate(&mut b, address(0), &version), "version");
    assert_eq!(fate(&mut b, address(1), &good), "own");
    assert_eq!(fate(&mut b, address(2), &good), "stranger");
    assert_eq!(fate(&mut b, address(9), &good), "stranger");
    let mut group = good.clone();
    group[3] += 1;
    assert_eq!(fate(&mut b, address(0), &group), "stranger");
    let mut rank = good.clone();
    rank[2] = 200;
    assert_eq!(fate(&mut b, address(0), &rank), "stranger");
    for at in 7..good.len() {
        let mut bent = good.clone();
        bent[at] ^= 0x80;
        assert_eq!(fate(&mut b, address(0), &bent), "forged", "byte {at}");
    }
    let mut outsider = Peer::with_key(0, 7, [2; 32]);
    assert_eq!(fate(&mut b, address(0), &outsider.seal(b"x")), "forged");
    assert_eq!(fate(&mut b, address(0), &good), "received");
    assert_eq!(fate(&mut b, address(0), &good), "replayed");
    a.epoch(4);
    assert_eq!(fate(&mut b, address(0), &a.seal(b"next")), "received");
    assert_eq!(fate(&mut b, address(0), &good), "stale");
}

#[test]
fn an_epoch_is_heard_until_its_sender_is_three_further() {
    let mut b = listener();
    let mut a = Peer::new(0, 7);
    a.epoch(10);
    let late: Vec<_> = (0..4).map(|_| a.seal(b"late")).collect();
    for (epoch, late) in (11..).zip(&late) {
        a.epoch(epoch);
        assert_eq!(fate(&mut b, address(0), &a.seal(b"now")), "received");
        let expected = if epoch <= 12 { "received" } else { "stale" };
        assert_eq!(fate(&mut b, address(0), late), expected, "epoch {epoch}");
    }
    assert_eq!(b.kept(GROUP, 0), [(7, vec![12, 13, 14])]);
    // The numbers went on: nothing that was heard is heard again in the epochs that are still open.
    a.epoch(12);
    assert_eq!(fate(&mut b, address(0), &a.seal(b"now")), "received");
    // One that is far behind the others, as it is still joining, is heard all the same.
    assert_eq!(
        fate(&mut b, address(2), &Peer::new(2, 1).seal(b"let me in")),
        "received"
    );
    // And so is a new process of the member that was far ahead.
    assert_eq!(
        fate(&mut b, address(0), &Peer::new(0, 8).seal(b"let me in")),
        "received"
    );
}

#[test]
fn what_was_heard_in_one_epoch_is_not_heard_again_in_the_next() {
    let mut b = listener();
    let mut a = Peer::new(0, 7);
    a.epoch(1);
    let first: Vec<_> = (0..100).map(|_| a.seal(b"first")).collect();
    for datagram in &first {
        assert_eq!(fate(&mut b, address(0), datagram), "received");
    }
    for epoch in 2..4 {
        a.epoch(epoch);
        assert_eq!(fate(&mut b, address(0), &a.seal(b"next")), "received");
        for datagram in &first {
            assert_eq!(fate(&mut b, address(0), datagram), "replayed");
        }
    }
}

#[test]
fn a_flood_of_forgeries_pushes_nothing_out_and_nothing_of_it_is_kept() {
    let mut b = listener();
    let mut a = Peer::new(0, 7);
    a.epoch(9);
    let good = a.seal(b"good");
    assert_eq!(fate(&mut b, address(0), &good), "received");
    let kept = b.kept(GROUP, 0);
    let mut rng = Rng::new(1);
    for n in 0..2000u64 {
        // Of other lives, of other epochs, and of both.
        let life = if n % 3 == 0 { 7 } else { rng.next_u128() };
        let mut outsider = Peer::with_key(0, life, [2; 32]);
        outsider.epoch(9 + rng.next_u64() / 2);
        let mut forged = outsider.seal(b"forged");
        // A number that is surely not too old.
        forged[31..39].copy_from_slice(&(u64::MAX - n).to_le_bytes());
        assert_eq!(fate(&mut b, address(0), &forged), "forged");
        assert_eq!(b.kept(GROUP, 0), kept);
    }
    assert_eq!(fate(&mut b, address(0), &good), "replayed");
    assert_eq!(fate(&mut b, address(0), &a.seal(b"more")), "received");
}

#[test]
fn what_earlier_lives_sent_pushes_out_no_later_one() {
    let mut b = listener();
    let mut a = Peer::new(0, 100);
    let mut recorded = Vec::new();
    for life in 0..10 {
        // Each joins as a process that knows nothing, and then takes part in a view.
        a = Peer::new(0, 100 + life);
        recorded.push(a.seal(b"let me in"));
        a.epoch(10 + u64::try_from(life).unwrap());
        recorded.push(a.seal(b"here I am"));
    }
    for datagram in &recorded {
        assert_eq!(fate(&mut b, address(0), datagram), "received");
    }
    let last = recorded.pop().unwrap();
    for _ in 0..20 {
        for datagram in &recorded {
            give(&mut b, address(0), datagram);
            assert!(b.kept(GROUP, 0).len() <= 4);
        }
        assert_eq!(fate(&mut b, address(0), &last), "replayed");
    }
    assert_eq!(fate(&mut b, address(0), &a.seal(b"more")), "received");
}

#[test]
fn a_number_is_never_used_twice_under_one_key() {
    let mut a = Peer::new(0, 7);
    let mut seen = BTreeSet::new();
    for step in 0..50u64 {
        match step % 5 {
            1 => a.epoch(step),
            2 => a.live(7),
            3 => a.outbound.set_instance(GROUP, INSTANCE),
            4 => a.epoch(step / 2), // not back
            _ => {}
        }
        let header = Header::of(&a.seal(b"x")).unwrap();
        assert!(seen.insert(header.counter), "{header:?}");
    }
}

/// Everything that went over the wire, and what of it was heard.
struct Wire {
    rng: Rng,
    b: Inbound,
    /// By number: the sender's address, the datagram, and what it says.
    sent: Vec<(SocketAddr, Vec<u8>, Heard)>,
    heard: BTreeSet<u64>,
}

impl Wire {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.rng.next_u64() % (n as u64)).unwrap()
    }

    /// One that was sent; the newest more often.
    fn any(&mut self) -> (SocketAddr, Vec<u8>) {
        let back = match self.below(3) {
            0 => self.below(self.sent.len()),
            1 => self.below(self.sent.len().min(6000)),
            _ => self.below(self.sent.len().min(50)),
        };
        let (from, datagram, _) = &self.sent[self.sent.len() - 1 - back];
        (*from, datagram.clone())
    }

    /// Gives a datagram; whatever is heard was sent so, and was not heard before.
    fn give(&mut self, from: SocketAddr, datagram: &[u8]) -> bool {
        let Some(heard) = give(&mut self.b, from, datagram) else {
            return false;
        };
        let number = u64::from_le_bytes(heard.body[..8].try_into().expect("no shorter was sent"));
        let at = usize::try_from(number).expect("a number that was sent");
        let (address, _, sent) = self.sent.get(at).expect("a number that was sent");
        assert_eq!((*address, sent), (from, &heard));
        assert!(self.heard.insert(number), "{number} twice");
        true
    }

    fn garbage(&mut self) -> Vec<u8> {
        let len = self.below(200);
        (0..len)
            .map(|_| self.rng.next_u64().to_le_bytes()[0])
            .collect()
    }

    fn hostile(&mut self) {
        let (mut from, mut datagram) = self.any();
        match self.below(9) {
            0 => {
                for _ in 0..=self.below(3) {
                    let at = self.below(datagram.len());
                    datagram[at] ^= 1 << self.below(8);
                }
            }
            1 => datagram.truncate(self.below(datagram.len())),
            2 => datagram.extend(self.garbage()),
            // The head of one and the tail of another, cut anywhere or between header and body.
            3 => {
                let (_, other) = self.any();
                let at = if self.below(2) == 0 {
                    HEADER_BYTES
                } else {
                    self.below(datagram.len().min(other.len()))
                };
                datagram.truncate(at);
                datagram.extend_from_slice(&other[at..]);
            }
            // Header fields of one in another.
            4 => {
                let (_, other) = self.any();
                let field = [2..3, 3..7, 7..23, 23..31, 31..39][self.below(5)].clone();
                datagram[field.clone()].copy_from_slice(&other[field]);
            }
            5 => datagram = self.garbage(),
            6 => {
                let garbage = self.garbage();
                datagram.truncate(HEADER_BYTES);
                datagram.extend(garbage);
            }
            7 => {
                from = if self.below(4) == 0 {
                    SocketAddr::from(([10, 0, 0, 1], 7001))
                } else {
                    address([0, 1, 2][self.below(3)])
                };
            }
            _ => {} // as it was
        }
        self.give(from, &datagram);
    }
}

#[test]
fn whatever_comes_nothing_is_heard_that_was_not_sent_nor_twice() {
    for seed in 1..=3 {
        let mut wire = Wire {
            rng: Rng::new(seed),
            b: listener(),
            sent: Vec::new(),
            heard: BTreeSet::new(),
        };
        let mut peers = [Peer::new(0, 1), Peer::new(2, 2)];
        let (mut epoch, mut lives) = ([0; 2], [1, 2]);
        for step in 0..40_000u64 {
            if step > 0 && wire.below(3) > 0 {
                wire.hostile();
                continue;
            }
            let who = wire.below(2);
            let peer = &mut peers[who];
            if wire.below(400) == 0 {
                epoch[who] += 1 + wire.rng.next_u64() % 3;
                peer.epoch(epoch[who]);
            }
            // No more lives than are kept: of one that is forgotten, what it sent in epoch 0 would be heard again.
            if wire.below(3000) == 0 && lives[who] < 7 {
                // A new life of the process, which knows the last view, or a new process, which knows none.
                lives[who] += 2;
                if wire.below(2) == 0 {
                    peer.live(lives[who]);
                } else {
                    *peer = Peer::new(peer.rank, lives[who]);
                }
            }
            let mut body = (wire.sent.len() as u64).to_le_bytes().to_vec();
            body.extend(wire.garbage());
            let datagram = peer.seal(&body);
            let from = MemberId::new(["a", "c"][who], lives[who]);
            let address = address(peer.rank);
            let said = Heard { from, body };
            wire.sent.push((address, datagram.clone(), said));
            // Most arrive at once; the others may be played later.
            if wire.below(10) > 0 {
                assert!(
                    wire.give(address, &datagram),
                    "seed {seed}, step {step}: {:?}",
                    wire.b.counters()
                );
            }
            for rank in [0, 2] {
                let kept = wire.b.kept(GROUP, rank);
                assert!(kept.len() <= 4 && kept.iter().all(|(_, keys)| keys.len() <= 3));
            }
        }
        let c = wire.b.counters();
        let kinds = [
            c.received,
            c.malformed,
            c.stranger,
            c.forged,
            c.replayed,
            c.stale,
            c.own,
        ];
        assert!(kinds.iter().all(|n| *n > 100), "seed {seed}: {c:?}");
    }
}
