//! A process as bytes: its core, the ledger, every membership; as `UBP`, and otherwise as the image of a core
//! ([`crate::Core::snapshot`]), moments being those of the process's clock.

use super::{GroupId, Process, ProcessConfig};
use crate::snapshot::{SnapshotError, open, seal};
use crate::time::Instant;

const MAGIC: [u8; 3] = *b"UBP";
/// Raised with every change to what a process holds.
const FORMAT: u8 = 3;

/// Of the configuration, an image holds what says whose it is; that stands in the core.
pub(super) mod identity {
    use super::ProcessConfig;
    use crate::config::Config;
    use crate::view::MemberId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(_: &ProcessConfig, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_unit()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<ProcessConfig, D::Error> {
        <()>::deserialize(from)?;
        let nobody = MemberId::new("", 0);
        Ok(ProcessConfig::new(Config::new(0, nobody, Vec::new(), 0)))
    }
}

/// Members that messages share.
pub(super) mod shared {
    use crate::view::MemberId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub(crate) fn serialize<S: Serializer>(
        all: &Arc<[MemberId]>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        all.as_ref().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<[MemberId]>, D::Error> {
        Vec::deserialize(from).map(Arc::from)
    }
}

impl Process {
    /// This process as bytes, for [`Process::restore`], on the terms of [`crate::Core::snapshot`].
    ///
    /// # Panics
    /// When outputs are pending (drain [`Process::poll_output`] first), or `now` goes back.
    pub fn snapshot(&self, now: Instant) -> Vec<u8> {
        let drained = self.out.is_empty() && self.core.outputs.is_empty();
        assert!(
            drained && self.touched.is_empty(),
            "outputs are drained first"
        );
        assert!(now >= self.now, "time goes back");
        seal(MAGIC, FORMAT, &(now, self))
    }

    /// The process that `image` was taken of, on the terms of [`crate::Core::restore`].
    ///
    /// # Errors
    /// [`SnapshotError`], whatever the bytes are.
    ///
    /// # Panics
    /// When the limits cannot work, as [`Process::new`].
    pub fn restore(
        config: ProcessConfig,
        image: &[u8],
        now: Instant,
    ) -> Result<Self, SnapshotError> {
        let (taken, mut process): (Instant, Self) = open(MAGIC, FORMAT, image)?;
        process.core.own(config.core.clone(), taken, now)?;
        if taken < process.now || !process.consistent() {
            return Err(SnapshotError::Inconsistent);
        }
        process.config = config;
        Ok(process)
    }

    /// That every list is as long as its view says, so that nothing is looked for beyond its end.
    fn consistent(&self) -> bool {
        let due = |(id, at): (&GroupId, &Instant)| self.dues.contains(&(*at, *id));
        let counted = |id: &GroupId, e: &super::Endpoint| {
            let counted = self.counted.get(id).copied().unwrap_or_default();
            counted == (e.flight_bytes(), e.backlog_bytes())
        };
        let total = |of: fn(&(u64, u64)) -> u64| {
            let mut all = self.counted.values().map(of);
            all.try_fold(0_u64, u64::checked_add)
        };
        self.me == self.core.config.me
            && self.due.len() == self.dues.len()
            && self.due.iter().all(due)
            && self
                .endpoints
                .iter()
                .all(|(id, e)| e.id == *id && e.consistent(&self.me) && counted(id, e))
            && self
                .counted
                .keys()
                .all(|id| self.endpoints.contains_key(id))
            && total(|(flight, _)| *flight) == Some(self.flight_bytes)
            && total(|(_, backlog)| *backlog) == Some(self.backlog_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::output::{CasResult, ReadResult, RegistryReply};
    use crate::process::wire::{Entry, Op};
    use crate::process::{
        Command, GroupEvent, GroupId, Multicast, Order, Output, REQUESTS_MAX, Refused, ThreadId,
    };
    use crate::view::MemberId;

    fn at(us: u64) -> Instant {
        Instant::from_micros(us)
    }

    fn config() -> ProcessConfig {
        let me = MemberId::new("r1", 0x1234);
        ProcessConfig::new(Config::new(1, me, vec!["r1".into(), "r2".into()], 42))
    }

    /// Who was refused a gbcast because too many requests wait is told when they do not any more, by a restored process too.
    #[test]
    fn who_was_refused_an_entry_hears_of_room() {
        let mut p = member();
        let group = *p.endpoints.keys().next().unwrap();
        for _ in 0..REQUESTS_MAX {
            p.ask(Op::Join { name: "h".into() });
        }
        let message = Multicast::new(Order::View, "call");
        let refused = p.handle_command(at(100), Command::Multicast { group, message });
        assert_eq!(refused, Err(Refused::Backlog));
        let mut p = Process::restore(config(), &p.snapshot(at(100)), at(100)).unwrap();
        let entered = Entry::Asked {
            by: p.me.clone(),
            number: p.first_request + REQUESTS_MAX as u64,
            op: Op::Leave {
                group: GroupId(999),
            },
        };
        p.apply(p.applied + 1, &entered);
        let room = |o: &Output| matches!(o, Output::Group { group: g, event: GroupEvent::Room } if *g == group);
        assert!(p.out.iter().any(room));
    }

    /// The first of its site, in a group, with messages that wait.
    fn member() -> Process {
        let mut p = Process::new(config(), 7, at(10));
        let mut us = 10;
        let mut drain = |p: &mut Process, reply: Option<RegistryReply>| {
            us += 1;
            if let Some(reply) = reply {
                p.handle_registry(at(us), reply);
            }
            while p.poll_output().is_some() {}
        };
        drain(&mut p, None);
        p.handle_timeout(at(10));
        drain(&mut p, Some(RegistryReply::View(ReadResult::Absent)));
        let written = CasResult::Written { version: 0 };
        drain(&mut p, Some(RegistryReply::Cas(written)));
        let group = "g".to_owned();
        p.handle_command(at(20), Command::Join { group }).unwrap();
        drain(&mut p, None);
        let group = *p.endpoints.keys().next().expect("it founds the group");
        for order in [Order::Fifo, Order::Total(ThreadId(1)), Order::View] {
            let message = Multicast::new(order, vec![7; 9]);
            let command = Command::Multicast { group, message };
            p.handle_command(at(20), command).unwrap();
        }
        drain(&mut p, None);
        p
    }

    fn refused(image: &[u8]) -> SnapshotError {
        Process::restore(config(), image, at(30))
            .err()
            .expect("refused")
    }

    #[test]
    fn an_image_is_the_same_after_it_was_restored() {
        let image = member().snapshot(at(30));
        let twin = Process::restore(config(), &image, at(30)).unwrap();
        assert_eq!(twin.snapshot(at(30)), image);
        assert_eq!(twin.poll_timeout(), member().poll_timeout());
    }

    #[test]
    fn a_damaged_or_strange_image_is_refused() {
        let good = member().snapshot(at(30));
        for end in 0..good.len() {
            refused(&good[..end]);
        }
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            refused(&bad);
        }
        let core = member().core.snapshot(at(30));
        assert_eq!(refused(&core), SnapshotError::Magic);
        let mut other = config();
        other.core.group_id = 2;
        let other = Process::restore(other, &good, at(30)).err();
        assert_eq!(other, Some(SnapshotError::OtherGroup(1)));
    }

    #[test]
    fn nonsense_under_a_right_checksum_does_not_panic() {
        let good = member().snapshot(at(30));
        let body = &good[8..];
        let sealed = |body: &[u8]| {
            let crc = crc32c::crc32c(body).to_le_bytes();
            [&MAGIC[..], &[FORMAT], &crc, body].concat()
        };
        for end in 0..body.len() {
            assert_eq!(refused(&sealed(&body[..end])), SnapshotError::Damaged);
        }
        for i in 0..body.len() {
            for byte in [0, 1, 0x7f, 0x80, 0xff, body[i] ^ 1, body[i].wrapping_add(1)] {
                let mut bad = body.to_vec();
                bad[i] = byte;
                // Most are another possible state.
                let _ = Process::restore(config(), &sealed(&bad), at(30));
            }
        }
    }
}
