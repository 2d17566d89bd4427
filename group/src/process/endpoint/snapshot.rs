//! What must fit together in a membership that was read from an image.

use super::Endpoint;
use crate::view::MemberId;

impl Endpoint {
    /// That every list is as long as the view says, and nothing was taken that is not held.
    pub(crate) fn consistent(&self, me: &MemberId) -> bool {
        let ranks = self.view.members.len();
        let others = self.view.members.iter().filter(|m| *m != me);
        let directs = self.directs.values();
        self.me == *me
            && self.view.rank(me) == Some(self.rank)
            && ranks <= crate::process::MEMBERS_MAX
            && others.eq(self.others.iter())
            && self.ins.len() == ranks
            && self.out.consistent(ranks - 1, Some(self.own_taken))
            && self
                .ins
                .iter()
                .all(crate::process::lane::Incoming::consistent)
            && self.threads.consistent(ranks)
            && self.gbcast_bytes.len() == ranks
            && directs
                .into_iter()
                .all(|d| d.out.consistent(1, None) && d.inc.consistent())
    }
}

/// A field, and what an image that forgot it would do to a restored process.
#[cfg(test)]
type Forgotten = (&'static str, fn(&mut crate::process::Process));

/// Fields of a process, and of its memberships.
#[cfg(test)]
pub(crate) const FORGETTING: &[Forgotten] = {
    macro_rules! forgetting {
        ($($field:ident),* ; $($in_endpoint:ident),*) => {&[
            $((stringify!($field), |p| p.$field = Default::default()),)*
            $((stringify!($in_endpoint), |p| for e in p.endpoints.values_mut() {
                e.$in_endpoint = Default::default();
            }),)*
        ]};
    }
    forgetting![
        asked, flushes, requests, changing, repeat_at, reported, waiting;
        together, done, calls, blocked, load, donating, buffered, paused, queue
    ]
};
