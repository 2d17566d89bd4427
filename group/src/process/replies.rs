//! Calls: a multicast that asks for replies, and who still owes one.
//!
//! BJ87: a caller waits for none, one, some or all replies; a member that fails without having answered counts as one
//! that will not, and the caller is told so.

use super::types::{Calling, GroupEvent, Want};
use crate::time::Instant;
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Calls of one member that may be open at a time.
pub(crate) const CALLS_MAX: usize = 65_536;

#[derive(Serialize, Deserialize)]
struct Call {
    owing: BTreeSet<MemberId>,
    missing: usize,
    failed: Vec<MemberId>,
    deadline: Option<Instant>,
    /// A gbcast that was not delivered yet: who owes is not known before.
    undelivered: bool,
}

/// The open calls of this member.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Calls(BTreeMap<u64, Call>);

impl Calls {
    pub(crate) fn full(&self) -> bool {
        self.0.len() >= CALLS_MAX
    }

    /// A call goes out to these members.
    pub(crate) fn begin(
        &mut self,
        now: Instant,
        calling: &Calling,
        members: &[MemberId],
        undelivered: bool,
    ) {
        let missing = match calling.want {
            Want::One => 1,
            Want::Number(n) => usize::from(n),
            Want::All => members.len(),
        };
        let deadline =
            (calling.timeout_us > 0).then(|| now + Duration::from_micros(calling.timeout_us));
        let call = Call {
            owing: members.iter().cloned().collect(),
            missing,
            failed: Vec::new(),
            deadline,
            undelivered,
        };
        self.0.insert(calling.call, call);
    }

    /// A member answers, or says that it will not.
    pub(crate) fn on_reply(
        &mut self,
        call: u64,
        from: &MemberId,
        body: Option<Bytes>,
    ) -> Vec<GroupEvent> {
        let Some(c) = self.0.get_mut(&call) else {
            return Vec::new();
        };
        if !c.owing.remove(from) {
            return Vec::new();
        }
        let mut events = Vec::new();
        if let Some(body) = body {
            c.missing = c.missing.saturating_sub(1);
            let from = from.clone();
            events.push(GroupEvent::Reply { call, from, body });
        }
        events.extend(self.close(call));
        events
    }

    /// A gbcast was delivered to those to whom it was sent. (Some may have answered before it was delivered here.)
    pub(crate) fn on_delivered(&mut self, call: u64) -> Option<GroupEvent> {
        self.0.get_mut(&call)?.undelivered = false;
        self.close(call)
    }

    /// These departed.
    pub(crate) fn on_departed(&mut self, departed: &[MemberId]) -> Vec<GroupEvent> {
        for c in self.0.values_mut() {
            for m in departed {
                if c.owing.remove(m) {
                    c.failed.push(m.clone());
                }
            }
        }
        let calls: Vec<u64> = self.0.keys().copied().collect();
        calls
            .into_iter()
            .filter_map(|call| self.close(call))
            .collect()
    }

    fn close(&mut self, call: u64) -> Option<GroupEvent> {
        let c = self.0.get(&call)?;
        if c.undelivered || c.missing > 0 && !c.owing.is_empty() {
            return None;
        }
        let c = self.0.remove(&call)?;
        Some(GroupEvent::CallDone {
            call,
            failed: c.failed,
            timed_out: false,
        })
    }

    pub(crate) fn on_time(&mut self, now: Instant) -> Vec<GroupEvent> {
        let over = |c: &Call| c.deadline.is_some_and(|d| d <= now);
        let late: Vec<u64> = self
            .0
            .iter()
            .filter(|(_, c)| over(c))
            .map(|(call, _)| *call)
            .collect();
        late.into_iter()
            .filter_map(|call| {
                let c = self.0.remove(&call)?;
                Some(GroupEvent::CallDone {
                    call,
                    failed: c.failed,
                    timed_out: true,
                })
            })
            .collect()
    }

    pub(crate) fn due(&self) -> Option<Instant> {
        self.0.values().filter_map(|c| c.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(i: u128) -> MemberId {
        MemberId::new(format!("r{i}"), i)
    }

    fn calling(want: Want, timeout_us: u64) -> Calling {
        Calling {
            call: 5,
            want,
            timeout_us,
        }
    }

    fn done(failed: Vec<MemberId>, timed_out: bool) -> GroupEvent {
        GroupEvent::CallDone {
            call: 5,
            failed,
            timed_out,
        }
    }

    #[test]
    fn all_answer_or_fail() {
        let now = Instant::from_micros(0);
        let mut c = Calls::default();
        c.begin(
            now,
            &calling(Want::All, 0),
            &[member(1), member(2), member(3)],
            false,
        );
        assert_eq!(c.on_reply(5, &member(1), Some(Bytes::new())).len(), 1);
        assert_eq!(c.on_reply(5, &member(1), Some(Bytes::new())), [], "twice");
        assert_eq!(c.on_departed(&[member(2)]), []);
        assert_eq!(
            c.on_reply(5, &member(3), None),
            [done(vec![member(2)], false)]
        );
        assert_eq!(c.on_reply(5, &member(3), Some(Bytes::new())), [], "over");
    }

    #[test]
    fn one_is_enough_and_time_ends() {
        let now = Instant::from_micros(0);
        let mut c = Calls::default();
        c.begin(
            now,
            &calling(Want::One, 1000),
            &[member(1), member(2)],
            false,
        );
        assert_eq!(c.due(), Some(Instant::from_micros(1000)));
        let events = c.on_reply(5, &member(2), Some(Bytes::new()));
        assert_eq!(events.last(), Some(&done(vec![], false)));
        c.begin(now, &calling(Want::One, 1000), &[member(1)], false);
        assert_eq!(c.on_time(Instant::from_micros(999)), []);
        assert_eq!(c.on_time(Instant::from_micros(1000)), [done(vec![], true)]);
        assert_eq!(c.due(), None);
    }
}
