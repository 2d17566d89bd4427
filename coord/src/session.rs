//! Sessions: the replicated record of each, and the leader's own table of deadlines.
//!
//! A session is created, taken over by another connection, and ended by log entries only. That it
//! is alive is not logged: every server tells the leader, with each heartbeat, which of its
//! sessions were heard from, and the leader alone decides that one has been silent for too long.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::Instant;

/// A session. Never zero, and never a value that ZooKeeper gives a special meaning as an owner.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct SessionId(pub i64);

impl SessionId {
    /// The session that the log entry at `zxid` creates.
    #[must_use]
    pub fn of_zxid(zxid: u64) -> Self {
        // The high byte keeps clear of zero and of the marks of containers and TTL nodes.
        Self(((zxid & 0x00ff_ffff_ffff_ffff) | 0x0100_0000_0000_0000).cast_signed())
    }

    /// A name for a connection that has no session in the log. No session of the log is called so.
    #[must_use]
    pub(crate) fn local(random: u64) -> Self {
        Self(((random & 0x00ff_ffff_ffff_ffff) | 0x0200_0000_0000_0000).cast_signed())
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:x}", self.0)
    }
}

/// Length of a session's password in bytes.
pub const PASSWORD_LEN: usize = 16;

/// The secret that lets a client take its session to another connection.
pub type Password = [u8; PASSWORD_LEN];

/// Compares without telling by its time where two passwords differ.
#[must_use]
pub fn same_password(a: &Password, b: &[u8]) -> bool {
    b.len() == a.len() && a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y)) == 0
}

/// One run of one server: a restarted server is another run, and answers for nothing of the last.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Run {
    /// The server's raft id.
    pub server: u64,
    /// Random, drawn at its start.
    pub incarnation: u64,
}

/// What the log knows of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Silence after which the leader ends it, milliseconds.
    pub timeout_ms: u32,
    /// Its secret.
    pub password: Password,
    /// The server whose connection has it.
    pub owner: Run,
    /// The owner's name for the connection.
    pub owner_request: u64,
    /// zxid of the entry that gave it to this connection. A write that names another comes from a
    /// connection that lost the session.
    pub attached: u64,
    /// Number of the last write of this connection that was applied, from 1. A write is applied
    /// only if it is the next: so a repeated proposal is applied once, and none overtakes another.
    pub writes: u64,
}

/// The leader's deadlines. Not replicated: a new leader starts all anew.
#[derive(Debug)]
pub(crate) struct Deadlines {
    /// Given to every session beyond its timeout.
    grace: Duration,
    by_session: BTreeMap<SessionId, Deadline>,
    /// When to look at a session again. A sign of life moves its deadline and not this, so that it
    /// costs little; it may therefore be too early, and never is too late.
    by_time: BTreeSet<(Instant, SessionId)>,
    /// Those whose end stands in the log. What comes of them now comes too late.
    condemned: BTreeSet<SessionId>,
}

#[derive(Debug)]
struct Deadline {
    heard: Instant,
    timeout: Duration,
    /// Its place in `by_time`.
    look: Instant,
}

/// A session whose time has run out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overdue {
    pub(crate) session: SessionId,
    /// When it ran out.
    pub(crate) since: Instant,
}

impl Deadlines {
    /// Of sessions that are given `grace` beyond their timeouts.
    pub(crate) fn new(grace: Duration) -> Self {
        Self {
            grace,
            by_session: BTreeMap::new(),
            by_time: BTreeSet::new(),
            condemned: BTreeSet::new(),
        }
    }

    /// Begins, or begins anew, the count of a session.
    pub(crate) fn start(&mut self, session: SessionId, timeout: Duration, now: Instant) {
        self.condemned.remove(&session);
        let look = now + timeout + self.grace;
        let deadline = Deadline {
            heard: now,
            timeout,
            look,
        };
        if let Some(old) = self.by_session.insert(session, deadline) {
            self.by_time.remove(&(old.look, session));
        }
        self.by_time.insert((look, session));
    }

    /// The end of a session is in the log. Until it is applied, or another connection has taken the
    /// session up before, nobody may be told that the session lives.
    pub(crate) fn condemn(&mut self, session: SessionId) {
        self.condemned.insert(session);
    }

    pub(crate) fn is_condemned(&self, session: SessionId) -> bool {
        self.condemned.contains(&session)
    }

    /// There was a sign of life at `heard`. Unknown sessions are ignored: they have ended, or are not
    /// yet applied here.
    pub(crate) fn touch(&mut self, session: SessionId, heard: Instant) {
        if let Some(deadline) = self.by_session.get_mut(&session) {
            deadline.heard = deadline.heard.max(heard);
        }
    }

    /// The leader was asleep for `pause`, in which nobody could be heard: it does not count.
    pub(crate) fn postpone(&mut self, pause: Duration) {
        for deadline in self.by_session.values_mut() {
            deadline.heard = deadline.heard + pause;
            deadline.look = deadline.look + pause;
        }
        let later = std::mem::take(&mut self.by_time).into_iter();
        self.by_time = later.map(|(at, session)| (at + pause, session)).collect();
    }

    pub(crate) fn end(&mut self, session: SessionId) {
        self.condemned.remove(&session);
        if let Some(deadline) = self.by_session.remove(&session) {
            self.by_time.remove(&(deadline.look, session));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.condemned.clear();
        self.by_session.clear();
        self.by_time.clear();
    }

    /// The next session whose time has run out. It is named again after `again`, in case the proposal
    /// to end it is lost.
    pub(crate) fn pop_expired(&mut self, now: Instant, again: Duration) -> Option<Overdue> {
        loop {
            let (look, session) = *self.by_time.first()?;
            if look > now {
                return None;
            }
            let deadline = &self.by_session[&session];
            let due = deadline.heard + deadline.timeout + self.grace;
            if due <= now {
                self.look_at(session, now + again);
                return Some(Overdue {
                    session,
                    since: due,
                });
            }
            self.look_at(session, due);
        }
    }

    /// Looks at a session that was named again at `at`, and not before.
    pub(crate) fn look_at(&mut self, session: SessionId, at: Instant) {
        if let Some(deadline) = self.by_session.get_mut(&session) {
            let old = std::mem::replace(&mut deadline.look, at);
            self.by_time.remove(&(old, session));
            self.by_time.insert((at, session));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_move_with_touches_and_are_asked_again() {
        let (a, b) = (SessionId(1), SessionId(2));
        let ms = Instant::from_millis;
        let again = Duration::from_millis(50);
        let mut deadlines = Deadlines::new(Duration::from_millis(8));
        let overdue = |session, since| {
            Some(Overdue {
                session,
                since: ms(since),
            })
        };
        deadlines.start(a, Duration::from_millis(92), ms(0));
        deadlines.start(b, Duration::from_millis(22), ms(0));
        deadlines.touch(b, ms(20));
        deadlines.touch(b, ms(10));
        assert_eq!(deadlines.pop_expired(ms(49), again), None);
        assert_eq!(deadlines.pop_expired(ms(50), again), overdue(b, 50));
        assert_eq!(deadlines.pop_expired(ms(50), again), None);
        assert_eq!(deadlines.pop_expired(ms(100), again), overdue(a, 100));
        assert_eq!(
            deadlines.pop_expired(ms(100), again),
            overdue(b, 50),
            "the first proposal was lost"
        );
        deadlines.postpone(Duration::from_millis(1000));
        assert_eq!(deadlines.pop_expired(ms(1149), again), None);
        assert_eq!(deadlines.pop_expired(ms(1150), again), overdue(a, 1100));
        deadlines.touch(b, ms(1140));
        assert_eq!(
            deadlines.pop_expired(ms(1160), again),
            None,
            "it was heard after all"
        );
        assert_eq!(deadlines.pop_expired(ms(1170), again), overdue(b, 1170));
        deadlines.look_at(b, ms(1175));
        assert_eq!(deadlines.pop_expired(ms(1174), again), None);
        assert_eq!(deadlines.pop_expired(ms(1175), again), overdue(b, 1170));
        deadlines.end(a);
        deadlines.end(b);
        deadlines.touch(a, ms(200));
        assert_eq!(
            deadlines.pop_expired(ms(9000), again),
            None,
            "ended sessions do not come back"
        );
    }

    #[test]
    fn session_ids_keep_clear_of_special_owners() {
        for zxid in [1, u64::MAX, 1 << 63, 0xff << 56] {
            let id = SessionId::of_zxid(zxid).0;
            assert!(id > 0 && id >> 56 == 1, "{id:x}");
        }
    }

    #[test]
    fn passwords() {
        assert!(same_password(&[7; 16], &[7; 16]));
        assert!(!same_password(&[7; 16], &[7; 15]));
        assert!(!same_password(&[7; 16], &[8; 16]));
        assert!(
            !same_password(&[0; 16], &[]),
            "an absent password never passes"
        );
    }
}
