//! Members and views: who takes part, who leads, and where the view before was cut.

use crate::wire::NUMBER_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// One life of one configured member.
///
/// The incarnation is drawn afresh at every process start (and after every exclusion), so that a restarted
/// process is never mistaken for a survivor.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberId {
    /// The configured name. Shared, because each message that is delivered names its sender.
    #[serde(with = "name")]
    pub name: Arc<str>,
    /// 128 random bits.
    pub incarnation: u128,
}

/// Names in images and datagrams: strings.
mod name {
    use serde::{Deserialize as _, Deserializer, Serializer};
    use std::sync::Arc;

    pub(super) fn serialize<S: Serializer>(name: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(name)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(from).map(Arc::from)
    }
}

impl MemberId {
    /// A member id.
    pub fn new(name: impl Into<Arc<str>>, incarnation: u128) -> Self {
        Self {
            name: name.into(),
            incarnation,
        }
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{:04x}", self.name, self.incarnation & 0xffff)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A view's number; each view of a group has one more than the view before, across generations too.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct ViewId(pub u64);

impl fmt::Display for ViewId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A member that receives events but is not counted yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joiner {
    /// Who.
    pub member: MemberId,
    /// The view in which it began to join: its checkpoint is the leader's state at that view's cut.
    pub since: ViewId,
    /// That view's cut: a joiner may hear of a later view first.
    pub cut: u64,
}

/// What the group's znode holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Random id of the group, written when its znode was made; keys depend on it.
    pub instance: u128,
    /// Raised when all state was lost; connections do not outlive a generation.
    pub generation: u32,
    /// This view's number.
    pub id: ViewId,
    /// Full members in rank order; the first leads. Never empty, names distinct.
    pub full: Vec<MemberId>,
    /// Members that are being brought up to date.
    pub joining: Vec<Joiner>,
    /// Backups that must hold an event before it is stable.
    pub k: u8,
    /// Lease of this view's leader in microseconds.
    pub lease_us: u64,
    /// Service clock at which this view starts, in microseconds.
    pub clock_us: u64,
    /// The last event of the view before; this view's first event is `cut + 1`.
    pub cut: u64,
    /// Random id of the proposal, by which a proposer knows its own write again.
    pub proposal: u128,
}

/// Why a znode's bytes are not a view.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViewDecodeError {
    /// Not written by this program.
    #[error("not a view: wrong magic")]
    Magic,
    /// Written by a version that this one does not know.
    #[error("unknown format version {0}")]
    Version(u8),
    /// The bytes are damaged.
    #[error("damaged view")]
    Damaged,
    /// Decoded, but not a view that can exist.
    #[error("inconsistent view")]
    Inconsistent,
}

const MAGIC: [u8; 3] = *b"UBV";
const FORMAT: u8 = 1;
/// The last event of the generation before is numbered by it (`GENERATION_EVENTS`), far below [`NUMBER_MAX`].
const GENERATION_MAX: u32 = 1 << 20;

impl View {
    /// The leader: the first full member.
    pub fn leader(&self) -> &MemberId {
        self.full.first().expect("a view has a full member")
    }

    /// The rank of a full member; the leader's is 0.
    pub fn rank(&self, member: &MemberId) -> Option<usize> {
        self.full.iter().position(|m| m == member)
    }

    /// Whether this very incarnation is a full member.
    pub fn is_full(&self, member: &MemberId) -> bool {
        self.rank(member).is_some()
    }

    /// The entry of a joining member.
    pub fn joiner(&self, member: &MemberId) -> Option<&Joiner> {
        self.joining.iter().find(|j| &j.member == member)
    }

    /// All members, full ones first.
    pub fn members(&self) -> impl Iterator<Item = &MemberId> {
        self.full
            .iter()
            .chain(self.joining.iter().map(|j| &j.member))
    }

    /// Whether this very incarnation takes part, full or joining.
    pub fn contains(&self, member: &MemberId) -> bool {
        self.members().any(|m| m == member)
    }

    /// The lease of this view's leader.
    pub fn lease(&self) -> Duration {
        Duration::from_micros(self.lease_us)
    }

    /// Wedge-acknowledgements of backups that meet every set of `k` holders: `n - k`.
    pub fn quorum(&self) -> usize {
        self.full.len() - usize::from(self.k)
    }

    /// The znode's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(FORMAT);
        postcard::to_extend(self, out).expect("a view has no unserialisable part")
    }

    /// Reads a znode's bytes.
    ///
    /// # Errors
    /// [`ViewDecodeError`] when the bytes are not a consistent view of a known format.
    pub fn decode(bytes: &[u8]) -> Result<Self, ViewDecodeError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(ViewDecodeError::Magic)?;
        let (&format, rest) = rest.split_first().ok_or(ViewDecodeError::Damaged)?;
        if format != FORMAT {
            return Err(ViewDecodeError::Version(format));
        }
        let view: Self = postcard::from_bytes(rest).map_err(|_| ViewDecodeError::Damaged)?;
        let mut names: Vec<&str> = view.members().map(|m| &*m.name).collect();
        names.sort_unstable();
        let distinct = names.windows(2).all(|w| w[0] != w[1]);
        let numbers = [view.id.0, view.cut, view.clock_us, view.lease_us];
        let joiners = view.joining.iter().map(|j| j.since.0.max(j.cut));
        let absurd = numbers.into_iter().chain(joiners).any(|n| n > NUMBER_MAX)
            || view.generation > GENERATION_MAX;
        let few = usize::from(view.k) >= view.full.len();
        if view.full.is_empty() || !distinct || few || absurd {
            return Err(ViewDecodeError::Inconsistent);
        }
        Ok(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View {
            instance: 7,
            generation: 1,
            id: ViewId(3),
            full: vec![MemberId::new("r1", 1), MemberId::new("r2", 2)],
            joining: vec![Joiner {
                member: MemberId::new("r3", 3),
                since: ViewId(3),
                cut: 107,
            }],
            k: 1,
            lease_us: 30_000,
            clock_us: 5,
            cut: 107,
            proposal: 9,
        }
    }

    #[test]
    fn a_view_survives_its_znode() {
        let v = view();
        assert_eq!(View::decode(&v.encode()), Ok(v));
    }

    #[test]
    fn what_is_not_a_view_is_refused() {
        let good = view().encode();
        assert_eq!(View::decode(b""), Err(ViewDecodeError::Magic));
        let mut other = good.clone();
        other[3] = 9;
        assert_eq!(View::decode(&other), Err(ViewDecodeError::Version(9)));
        for end in 4..good.len() {
            assert!(View::decode(&good[..end]).is_err(), "cut at {end}");
        }
        let mut twins = view();
        twins.full[1].name = "r1".into();
        assert_eq!(
            View::decode(&twins.encode()),
            Err(ViewDecodeError::Inconsistent)
        );
        let mut greedy = view();
        greedy.k = 2;
        assert_eq!(
            View::decode(&greedy.encode()),
            Err(ViewDecodeError::Inconsistent)
        );
    }
}
