//! A core as bytes: everything but its configuration.
//!
//! ```text
//! "UBG" | format u8 | crc32c of the rest u32 | postcard of (moment, core)
//! ```
//!
//! Moments are written as they are, on the clock that the core was driven by, and not as time remaining: a lease and the
//! answer it rests on are facts about real time, which passes for the other members while an image lies somewhere. Time
//! remaining would let a leader that was restored late speak beyond its lease; and heartbeats that are on their way
//! bring back moments of the clock that they were sent by.

use crate::config::Config;
use crate::core::{Core, Phase};
use crate::time::Instant;
use crate::view::MemberId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

const MAGIC: [u8; 3] = *b"UBG";
/// Raised with every change to what a core holds.
const FORMAT: u8 = 2;

/// Why an image is not restored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not written by [`Core::snapshot`] (or [`crate::process::Process::snapshot`], whose images are others).
    #[error("not a snapshot: wrong magic")]
    Magic,
    /// Written by a version that this one does not know.
    #[error("unknown format version {0}")]
    Version(u8),
    /// The bytes are damaged.
    #[error("damaged snapshot")]
    Damaged,
    /// Undamaged, but not a state that a core can be in.
    #[error("inconsistent snapshot")]
    Inconsistent,
    /// The configuration is another group's.
    #[error("snapshot of a member of group {0}")]
    OtherGroup(u32),
    /// The configuration is another member's, or another incarnation's.
    #[error("snapshot of {0}")]
    OtherMember(MemberId),
    /// It was taken in the future of the clock: this is another clock.
    #[error("snapshot taken at {0:?}, which is to come")]
    OtherClock(Instant),
}

/// Of the configuration, an image holds what says whose it is.
pub(crate) mod identity {
    use crate::config::Config;
    use crate::view::MemberId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(config: &Config, to: S) -> Result<S::Ok, S::Error> {
        (config.group_id, &config.me).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Config, D::Error> {
        let (group_id, me): (u32, MemberId) = Deserialize::deserialize(from)?;
        Ok(Config::new(group_id, me, Vec::new(), 0))
    }
}

/// What is in an image, behind its magic, version and checksum.
pub(crate) fn seal(magic: [u8; 3], format: u8, what: &impl Serialize) -> Vec<u8> {
    let body = postcard::to_allocvec(what).expect("plain values");
    let mut image = magic.to_vec();
    image.push(format);
    image.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    image.extend_from_slice(&body);
    image
}

/// Reads what [`seal`] wrote. What a length in it claims is taken from the bytes that are there, or not at all.
pub(crate) fn open<T: DeserializeOwned>(
    magic: [u8; 3],
    format: u8,
    image: &[u8],
) -> Result<T, SnapshotError> {
    let rest = image.strip_prefix(&magic).ok_or(SnapshotError::Magic)?;
    let (&version, rest) = rest.split_first().ok_or(SnapshotError::Damaged)?;
    if version != format {
        return Err(SnapshotError::Version(version));
    }
    let (crc, body) = rest.split_first_chunk().ok_or(SnapshotError::Damaged)?;
    if crc32c::crc32c(body).to_le_bytes() != *crc {
        return Err(SnapshotError::Damaged);
    }
    match postcard::take_from_bytes(body) {
        Ok((what, [])) => Ok(what),
        Ok(_) | Err(_) => Err(SnapshotError::Damaged),
    }
}

impl Core {
    /// This member as bytes, generator and timers included, for [`Core::restore`].
    ///
    /// The image takes the core's place: give the core nothing after it, and restore it once. A core that is restored
    /// from an older image has forgotten what its incarnation acknowledged and promised, and nothing that the group
    /// guarantees holds any more; a process that died joins as a new incarnation instead.
    ///
    /// # Panics
    /// When outputs are pending (drain [`Core::poll_output`] first), or `now` goes back.
    pub fn snapshot(&self, now: Instant) -> Vec<u8> {
        assert!(self.outputs.is_empty(), "outputs are drained first");
        assert!(now >= self.now, "time goes back");
        seal(MAGIC, FORMAT, &(now, self))
    }

    /// The core that `image` was taken of, which goes on as if nothing had been. `config` is the one that it had.
    ///
    /// `now` is read from the same clock as all moments before it: the clock that goes on while the process does not.
    /// Time that has passed since then has passed: leases are over or not, and a long silence is this member's own.
    /// A driver that does not know which requests to the coordinator are outstanding answers each kind of them with
    /// `Unknown`.
    ///
    /// # Errors
    /// [`SnapshotError`], whatever the bytes are.
    ///
    /// # Panics
    /// When the limits cannot work, as [`Core::new`].
    pub fn restore(config: Config, image: &[u8], now: Instant) -> Result<Self, SnapshotError> {
        let (taken, mut core): (Instant, Self) = open(MAGIC, FORMAT, image)?;
        core.own(config, taken, now)?;
        Ok(core)
    }

    /// Gives a core that was read the configuration that is not in the image, if it is the right one.
    pub(crate) fn own(
        &mut self,
        config: Config,
        taken: Instant,
        now: Instant,
    ) -> Result<(), SnapshotError> {
        let core = self;
        if core.config.group_id != config.group_id {
            return Err(SnapshotError::OtherGroup(core.config.group_id));
        }
        if core.config.me != config.me {
            return Err(SnapshotError::OtherMember(core.config.me.clone()));
        }
        if taken < core.now || !core.consistent() {
            return Err(SnapshotError::Inconsistent);
        }
        if taken > now {
            return Err(SnapshotError::OtherClock(taken));
        }
        // A new core checks its configuration; the same checks hold here.
        core.config = Self::new(config, 0, now).config;
        Ok(())
    }

    /// What a core's phase says about its view, and its log about what was delivered. An image that passes its checksum
    /// fails here only if the format changed and its number did not.
    fn consistent(&self) -> bool {
        let me = &self.config.me;
        let view = self.view.as_ref();
        let rank = view.and_then(|v| v.rank(me));
        let placed = match self.phase {
            Phase::Idle | Phase::Seeking => view.is_none(),
            Phase::Joining => view.is_some_and(|v| v.joiner(me).is_some() && !v.full.is_empty()),
            Phase::Backup => rank.is_some_and(|r| r > 0),
            Phase::Leading => rank == Some(0),
            Phase::Gone => true,
        };
        placed && self.log.first() > 0 && self.delivered <= self.log.held()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{CasResult, Command, Lag, ReadResult, RegistryReply};
    use bytes::Bytes;

    fn at(us: u64) -> Instant {
        Instant::from_micros(us)
    }

    fn config() -> Config {
        let members = vec!["r1".into(), "r2".into()];
        Config::new(1, MemberId::new("r1", 0x1234), members, 42)
    }

    fn drain(core: &mut Core) {
        while core.poll_output().is_some() {}
    }

    /// The founder of a group, with events.
    fn founder() -> Core {
        let mut core = Core::new(config(), 7, at(10));
        core.handle_command(at(11), Command::Join).unwrap();
        drain(&mut core);
        core.handle_registry(at(12), RegistryReply::View(ReadResult::Absent));
        drain(&mut core);
        let written = CasResult::Written { version: 0 };
        core.handle_registry(at(13), RegistryReply::Cas(written));
        drain(&mut core);
        for number in 1..4 {
            core.multicast(at(14), number, Bytes::from_static(b"event"), true);
            drain(&mut core);
        }
        core.set_progress(Lag {
            behind_bytes: 5,
            unfit: true,
            reluctant: false,
        });
        assert!(core.can_multicast());
        core
    }

    /// An image with this body, as undamaged as any.
    fn sealed(body: &[u8]) -> Vec<u8> {
        let crc = crc32c::crc32c(body).to_le_bytes();
        [&MAGIC[..], &[FORMAT], &crc, body].concat()
    }

    fn refused(image: &[u8]) -> SnapshotError {
        Core::restore(config(), image, at(20))
            .err()
            .expect("refused")
    }

    #[test]
    fn an_image_is_the_same_after_it_was_restored() {
        for core in [Core::new(config(), 7, at(10)), founder()] {
            let image = core.snapshot(at(20));
            let twin = Core::restore(config(), &image, at(20)).unwrap();
            assert_eq!(twin.snapshot(at(20)), image);
            assert_eq!(twin.status(), core.status());
            assert_eq!(twin.poll_timeout(), core.poll_timeout());
        }
    }

    #[test]
    fn a_damaged_image_is_refused_whatever_the_damage() {
        let good = founder().snapshot(at(20));
        for end in 0..good.len() {
            refused(&good[..end]);
        }
        for i in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[i] ^= 1 << bit;
                let error = refused(&bad);
                let expected = match i {
                    0..3 => SnapshotError::Magic,
                    3 => SnapshotError::Version(bad[3]),
                    _ => SnapshotError::Damaged,
                };
                assert_eq!(error, expected, "bit {bit} of byte {i}");
            }
        }
        let mut long = good[8..].to_vec();
        long.push(0);
        assert_eq!(refused(&sealed(&long)), SnapshotError::Damaged);
    }

    #[test]
    fn nonsense_under_a_right_checksum_does_not_panic() {
        let good = founder().snapshot(at(20));
        let body = &good[8..];
        for end in 0..body.len() {
            assert_eq!(refused(&sealed(&body[..end])), SnapshotError::Damaged);
        }
        let mut taken = 0;
        for i in 0..body.len() {
            for byte in [0, 1, 0x7f, 0x80, 0xff, body[i] ^ 1, body[i].wrapping_add(1)] {
                let mut bad = body.to_vec();
                bad[i] = byte;
                // Most are another possible state.
                taken += usize::from(Core::restore(config(), &sealed(&bad), at(20)).is_ok());
            }
        }
        assert!(taken > 0, "the checksum was right");
    }

    #[test]
    fn an_image_is_restored_as_whose_it_is_and_on_its_clock() {
        let image = founder().snapshot(at(20));
        let restored = |config: Config, us| Core::restore(config, &image, at(us)).err();
        let mut other = config();
        other.group_id = 2;
        assert_eq!(restored(other, 20), Some(SnapshotError::OtherGroup(1)));
        let mut other = config();
        other.me.incarnation += 1;
        let me = config().me;
        assert_eq!(restored(other, 20), Some(SnapshotError::OtherMember(me)));
        let error = Some(SnapshotError::OtherClock(at(20)));
        assert_eq!(restored(config(), 19), error);
        assert_eq!(restored(config(), 20), None);
    }

    #[test]
    fn time_passes_for_an_image() {
        let core = founder();
        let until = core.lease_until().unwrap();
        let image = core.snapshot(at(20));
        let late = until + std::time::Duration::from_micros(1);
        let mut twin = Core::restore(config(), &image, late).unwrap();
        assert!(twin.may_emit(at(21)) && !twin.may_emit(late));
        twin.handle_timeout(late);
        assert!(!twin.may_emit(late));
    }

    #[test]
    #[should_panic(expected = "outputs are drained first")]
    fn pending_outputs_have_no_place_in_an_image() {
        let mut core = Core::new(config(), 7, at(10));
        core.handle_command(at(11), Command::Join).unwrap();
        let _ = core.snapshot(at(11));
    }

    /// Postcard does not say what it holds. When this fails, a core holds something else: raise [`FORMAT`] (unless it
    /// was raised since the last release), then write down the new image.
    #[test]
    fn the_format_has_its_number() {
        let image = founder().snapshot(at(20));
        let crc = crc32c::crc32c(&image);
        assert_eq!((FORMAT, image.len(), crc), (2, 184, 1_794_964_756));
    }
}
