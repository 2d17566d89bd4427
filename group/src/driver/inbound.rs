//! Judging what this node receives: who sealed it, in which epoch, and whether it was seen before. No I/O.
//!
//! Whatever a datagram claims, judging it takes at most one key derivation and one opening, and keeps nothing unless
//! the datagram proves itself: a flood of forgeries costs a bounded time each, and no memory.
//!
//! What is kept is bounded, so a replay can be heard in two cases: from a life that four later ones have pushed out, if it
//! is of epoch 0 (a request to join) or not stale yet; and by a process that has just started and heard nothing. View
//! and incarnation are still judged by the core.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ring::aead::LessSafeKey;

use super::header::{HEADER_BYTES, Header};
use super::seal::{self, GroupKey};
use super::window::ReplayWindow;
use crate::view::MemberId;

/// Lives of one member that are kept.
const LIVES_MAX: usize = 4;
/// A life is heard in its newest epoch, and in as many before it: datagrams overtake each other on their way.
const EPOCHS_BEHIND: u64 = 2;
/// Keys of one life that are kept: one for each epoch in which it is heard.
const EPOCHS_MAX: usize = 3;

/// What happened to datagrams, since the start. Each is counted once.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Accepted.
    pub received: u64,
    /// Too short, or of another lane.
    pub malformed: u64,
    /// Of another version of the wire: that node is to be upgraded, or this one.
    pub other_version: u64,
    /// From an address that is not that of the member it names, or of a group that is not here or not known yet.
    pub stranger: u64,
    /// Not sealed by the member that it names, as the life and in the epoch that it names.
    pub forged: u64,
    /// Seen before, or too old to tell: 4032 numbers or more behind the newest of that life.
    pub replayed: u64,
    /// Of an epoch more than two behind the newest that its sender has proved.
    pub stale: u64,
    /// From this node's own address: its own multicast, come back.
    pub own: u64,
}

/// Why a datagram is dropped.
enum Refusal {
    Malformed,
    OtherVersion,
    Stranger,
    Forged,
    Replayed,
    Stale,
    Own,
}

pub(super) struct Inbound {
    keyring: Keyring,
    counters: Counters,
}

struct Keyring {
    /// By rank.
    names: Vec<String>,
    ranks: BTreeMap<SocketAddr, usize>,
    own_rank: usize,
    key: GroupKey,
    groups: BTreeMap<u32, Group>,
}

struct Group {
    instance: u128,
    /// By rank. Invariant: at most [`LIVES_MAX`] each, the one proved last at the end.
    lives: Vec<Vec<Life>>,
}

struct Life {
    member: MemberId,
    /// One for all epochs, because a life's numbers never restart.
    window: ReplayWindow,
    /// Invariant: 1 to [`EPOCHS_MAX`], ascending, none more than [`EPOCHS_BEHIND`] behind the last.
    keys: Vec<(u64, LessSafeKey)>,
}

impl Inbound {
    pub(super) fn new(
        members: &BTreeMap<String, SocketAddr>,
        own_rank: usize,
        key: GroupKey,
    ) -> Self {
        Self {
            keyring: Keyring {
                names: members.keys().cloned().collect(),
                ranks: members.values().copied().zip(0..).collect(),
                own_rank,
                key,
                groups: BTreeMap::new(),
            },
            counters: Counters::default(),
        }
    }

    pub(super) fn set_instance(&mut self, group: u32, instance: u128) {
        let groups = &mut self.keyring.groups;
        if groups.get(&group).is_some_and(|g| g.instance == instance) {
            return; // the replay windows stay
        }
        let lives = self.keyring.names.iter().map(|_| Vec::new()).collect();
        groups.insert(group, Group { instance, lives });
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Opens one datagram in place and hands its body to `f`, or drops it; counts it either way.
    pub(super) fn take(
        &mut self,
        from: SocketAddr,
        datagram: &mut [u8],
        f: &mut impl FnMut(u32, &MemberId, &[u8]),
    ) {
        let counters = &mut self.counters;
        let counter = match self.keyring.open(from, datagram) {
            Ok((group, member, plain)) => {
                f(group, member, plain);
                &mut counters.received
            }
            Err(Refusal::Malformed) => &mut counters.malformed,
            Err(Refusal::OtherVersion) => {
                if counters.other_version == 0 {
                    let version = datagram.first();
                    tracing::warn!(%from, ?version, "datagrams of another version are dropped");
                }
                &mut counters.other_version
            }
            Err(Refusal::Stranger) => &mut counters.stranger,
            Err(Refusal::Forged) => &mut counters.forged,
            Err(Refusal::Replayed) => &mut counters.replayed,
            Err(Refusal::Stale) => &mut counters.stale,
            Err(Refusal::Own) => &mut counters.own,
        };
        *counter += 1;
    }

    /// Lives and keys that are kept of one member.
    #[cfg(test)]
    pub(super) fn kept(&self, group: u32, rank: usize) -> Vec<(u128, Vec<u64>)> {
        let lives = &self.keyring.groups[&group].lives[rank];
        let epochs = |l: &Life| l.keys.iter().map(|(epoch, _)| *epoch).collect();
        lives
            .iter()
            .map(|l| (l.member.incarnation, epochs(l)))
            .collect()
    }
}

impl Keyring {
    /// The cheap checks come first; nothing is changed before the datagram has proved itself.
    fn open<'a>(
        &'a mut self,
        from: SocketAddr,
        datagram: &'a mut [u8],
    ) -> Result<(u32, &'a MemberId, &'a [u8]), Refusal> {
        if Header::is_of_another_version(datagram) {
            return Err(Refusal::OtherVersion);
        }
        let header = Header::of(datagram).ok_or(Refusal::Malformed)?;
        let rank = usize::from(header.rank);
        match self.ranks.get(&from) {
            Some(r) if *r == self.own_rank => return Err(Refusal::Own),
            Some(r) if *r == rank => {}
            _ => return Err(Refusal::Stranger),
        }
        let group = self.groups.get_mut(&header.group);
        let group = group.ok_or(Refusal::Stranger)?;
        let (instance, lives) = (group.instance, &mut group.lives[rank]);
        let at = lives
            .iter()
            .position(|l| l.member.incarnation == header.incarnation);
        let newest = match at {
            Some(at) => Some(lives[at].newest()),
            // A process that has been in no view yet knows no epoch.
            None if header.epoch == 0 => None,
            // Views are numbered on from one life to the next, so what an earlier life sent long ago is known by its
            // epoch, even when its window is forgotten.
            None => lives.iter().map(Life::newest).max(),
        };
        if newest.is_some_and(|newest| header.epoch < newest.saturating_sub(EPOCHS_BEHIND)) {
            return Err(Refusal::Stale);
        }
        if at.is_some_and(|at| !lives[at].window.fresh(header.counter)) {
            return Err(Refusal::Replayed);
        }
        let (head, body) = datagram.split_at_mut(HEADER_BYTES);
        let kept = at.and_then(|at| lives[at].key(header.epoch));
        if let (Some(key), Some(at)) = (kept, at) {
            let plain = seal::open(key, header.counter, head, body).ok_or(Refusal::Forged)?;
            lives[at].window.note(header.counter);
            return Ok((header.group, &lives[at].member, plain));
        }
        // A life or an epoch not heard before.
        let name = &self.names[rank];
        let key = self
            .key
            .sender(instance, name, header.incarnation, header.epoch);
        let plain = seal::open(&key, header.counter, head, body).ok_or(Refusal::Forged)?;
        let at = at.unwrap_or_else(|| {
            make_room(lives);
            lives.push(Life {
                member: MemberId::new(name.clone(), header.incarnation),
                window: ReplayWindow::default(),
                keys: Vec::with_capacity(EPOCHS_MAX),
            });
            lives.len() - 1
        });
        let life = &mut lives[at];
        life.keep(header.epoch, key);
        life.window.note(header.counter);
        Ok((header.group, &life.member, plain))
    }
}

/// Forgets the life that has come least far, the oldest of several: a datagram of an earlier life, played again, can
/// push out no life that has installed a later view.
fn make_room(lives: &mut Vec<Life>) {
    if lives.len() < LIVES_MAX {
        return;
    }
    let (last, _) = lives
        .iter()
        .enumerate()
        .min_by_key(|(_, life)| life.newest())
        .expect("not empty");
    lives.remove(last);
}

impl Life {
    fn newest(&self) -> u64 {
        self.keys.last().map_or(0, |(epoch, _)| *epoch)
    }

    fn key(&self, epoch: u64) -> Option<&LessSafeKey> {
        let mut keys = self.keys.iter();
        keys.find(|(e, _)| *e == epoch).map(|(_, key)| key)
    }

    fn keep(&mut self, epoch: u64, key: LessSafeKey) {
        let newest = self.newest().max(epoch);
        self.keys
            .retain(|(e, _)| *e >= newest.saturating_sub(EPOCHS_BEHIND));
        let at = self.keys.partition_point(|(e, _)| *e < epoch);
        self.keys.insert(at, (epoch, key));
    }
}
