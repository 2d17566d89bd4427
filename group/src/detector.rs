//! Who is heard, who is suspected, who is proved dead.

use crate::output::{ControlEvent, Lag};
use crate::time::Instant;
use crate::view::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is known of one other member of the installed view.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Last valid datagram of this view.
    pub(crate) heard: Instant,
    /// Last datagram in which the leader stated that it holds its lease (kept for every peer, meant for the leader).
    pub(crate) lease_stated: Instant,
    /// Leader: when the newest heartbeat that this member answered was *sent*.
    pub(crate) answered: Option<Instant>,
    /// Leader: highest event this member holds.
    pub(crate) held: u64,
    /// What it reports of itself.
    pub(crate) lag: Lag,
    /// Joiner: it says that it can become full.
    pub(crate) ready: bool,
    /// When this member was last told of the newer view.
    pub(crate) told: Option<Instant>,
}

impl Peer {
    pub(crate) fn new(now: Instant, held: u64) -> Self {
        Self {
            heard: now,
            lease_stated: now,
            answered: None,
            held,
            lag: Lag::default(),
            ready: false,
            told: None,
        }
    }
}

#[derive(Copy, Clone, Debug, Serialize, Deserialize)]
struct End {
    incarnation: u128,
    /// By the driver.
    at: Instant,
    /// When this member was told.
    heard: Instant,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Control {
    /// The incarnation that holds the listener, and when it was challenged.
    current: Option<(u128, Instant)>,
    connected: bool,
    /// The incarnation whose connection ended.
    ended: Option<End>,
    /// When the last attempt that was refused began.
    refused: Option<Instant>,
}

/// The evidence of the control connections, by name.
///
/// A proof must be younger than the knowledge of the incarnation that it is about: an answer that lay in a socket buffer
/// while its sender died and a successor joined would else prove the successor dead.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Proofs {
    controls: BTreeMap<String, Control>,
    known: BTreeMap<MemberId, Instant>,
}

impl Proofs {
    /// These incarnations are members as of `now`; others are forgotten.
    pub(crate) fn learn<'a>(&mut self, now: Instant, members: impl Iterator<Item = &'a MemberId>) {
        let mut known = BTreeMap::new();
        for m in members {
            let since = self.known.get(m).copied().unwrap_or(now);
            known.insert(m.clone(), since);
        }
        self.known = known;
    }

    pub(crate) fn record(&mut self, now: Instant, peer: &str, event: ControlEvent) {
        let c = self.controls.entry(peer.to_owned()).or_default();
        match event {
            ControlEvent::Connected { incarnation, since } => {
                if c.current.is_some_and(|(_, at)| at > since) {
                    return; // an older answer came late
                }
                c.current = Some((incarnation, since));
                c.connected = true;
                if c.ended.is_some_and(|e| e.incarnation == incarnation) {
                    c.ended = None;
                }
            }
            ControlEvent::Ended { at } => {
                if let (Some((incarnation, _)), true) = (c.current, c.connected) {
                    c.ended = Some(End {
                        incarnation,
                        at,
                        heard: now,
                    });
                    c.connected = false;
                }
            }
            ControlEvent::Refused { since } => {
                if c.refused.is_none_or(|r| r < since) {
                    c.refused = Some(since);
                }
            }
        }
    }

    fn end(&self, member: &MemberId) -> Option<End> {
        let end = self.controls.get(&*member.name)?.ended?;
        (end.incarnation == member.incarnation).then_some(end)
    }

    /// When this member heard that this very incarnation's control connection ended, unless it came back.
    pub(crate) fn ended(&self, member: &MemberId) -> Option<Instant> {
        self.end(member).map(|e| e.heard)
    }

    fn replaced(&self, member: &MemberId) -> bool {
        let Some(known) = self.known.get(member) else {
            return false;
        };
        let Some(c) = self.controls.get(&*member.name) else {
            return false;
        };
        c.current
            .is_some_and(|(i, since)| i != member.incarnation && since > *known)
    }

    /// R2: the control connection ended *and* the listener refuses, or a new incarnation holds the listener.
    pub(crate) fn dead(&self, member: &MemberId) -> bool {
        let refused = self.controls.get(&*member.name).and_then(|c| c.refused);
        let end = self.end(member);
        self.replaced(member) || matches!((refused, end), (Some(r), Some(e)) if r >= e.at)
    }

    /// For one that never had a connection to the member: a member holds its listener all its life, so a refusal after it
    /// was known as a member proves its end as well.
    pub(crate) fn gone(&self, member: &MemberId) -> bool {
        let Some(known) = self.known.get(member) else {
            return false;
        };
        let refused = self.controls.get(&*member.name).and_then(|c| c.refused);
        self.dead(member) || refused.is_some_and(|r| r > *known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> Instant {
        Instant::from_micros(us)
    }

    #[test]
    fn an_end_alone_proves_nothing_and_a_refusal_after_it_does() {
        let m = MemberId::new("r1", 1);
        let mut p = Proofs::default();
        p.learn(at(10), [&m].into_iter());
        p.record(
            at(12),
            "r1",
            ControlEvent::Connected {
                incarnation: 1,
                since: at(11),
            },
        );
        p.record(at(20), "r1", ControlEvent::Ended { at: at(20) });
        assert_eq!((p.ended(&m), p.dead(&m)), (Some(at(20)), false));
        p.record(at(21), "r1", ControlEvent::Refused { since: at(15) });
        assert!(!p.dead(&m), "the attempt began before the end");
        p.record(at(23), "r1", ControlEvent::Refused { since: at(21) });
        assert!(p.dead(&m));
    }

    #[test]
    fn a_late_answer_of_the_predecessor_does_not_kill_the_successor() {
        let (old, new) = (MemberId::new("r1", 1), MemberId::new("r1", 2));
        let mut p = Proofs::default();
        p.learn(at(100), [&new].into_iter());
        p.record(
            at(110),
            "r1",
            ControlEvent::Connected {
                incarnation: 1,
                since: at(90),
            },
        );
        assert!(!p.dead(&new) && !p.gone(&new));
        p.learn(at(120), [&old].into_iter());
        p.record(
            at(140),
            "r1",
            ControlEvent::Connected {
                incarnation: 2,
                since: at(130),
            },
        );
        assert!(p.dead(&old) && !p.dead(&new));
    }

    #[test]
    fn a_connection_that_came_back_is_no_hint() {
        let m = MemberId::new("r1", 1);
        let mut p = Proofs::default();
        p.learn(at(10), [&m].into_iter());
        p.record(
            at(12),
            "r1",
            ControlEvent::Connected {
                incarnation: 1,
                since: at(11),
            },
        );
        p.record(at(20), "r1", ControlEvent::Ended { at: at(20) });
        p.record(
            at(22),
            "r1",
            ControlEvent::Connected {
                incarnation: 1,
                since: at(21),
            },
        );
        assert_eq!((p.ended(&m), p.dead(&m)), (None, false));
    }
}
