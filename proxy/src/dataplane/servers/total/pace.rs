//! How far servers with one order are, and how a leader waits for others'.

use std::time::Duration;

use tracing::warn;

use super::super::super::runner::Runner;
use super::super::Servers;
use crate::clock::BootTime;

/// A leader gives its servers less while another replica is this far behind (256 inputs), and much
/// less from the second bound on: else one that joins under full load never catches up.
const PACED_FROM_BYTES: u64 = 1 << 20;
const PACED_MORE_FROM_BYTES: u64 = 4 << 20;
/// The part of each interval in which a paced leader gives nothing: a half, three quarters.
const PACED_HOLD: Duration = Duration::from_millis(5);
const PACED_MORE_HOLD: Duration = Duration::from_micros(7_500);
/// It is paced as long as that helps, judged after each such time; else not for a while.
const PACE_JUDGED_AFTER: Duration = Duration::from_secs(5);
const PACE_PAUSE: Duration = Duration::from_secs(60);

/// How it stands with servers that are given their inputs in one order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outlook {
    /// They have what there is, or nearly; or there is no such order.
    Even,
    /// They are being started.
    Begins,
    /// They are given again what others have long taken.
    Replaying { done_bytes: u64, total_bytes: u64 },
    /// What they were given is not kept.
    NoHistory,
}

/// Whether holding back has helped those that are behind.
#[derive(Debug)]
pub(super) struct Pace {
    judged_at: BootTime,
    behind_before: u64,
    helps: bool,
}

impl Servers {
    /// Leader: how far the other replicas' servers are behind, at the most. To be told regularly.
    pub(crate) fn pace(&mut self, now: BootTime, behind: u64) {
        let Some(order) = &mut self.order else {
            return;
        };
        if behind < PACED_FROM_BYTES {
            order.pace = None;
            return;
        }
        let pace = order.pace.get_or_insert(Pace {
            judged_at: now + PACE_JUDGED_AFTER,
            behind_before: behind,
            helps: true,
        });
        if now >= pace.judged_at {
            pace.helps = !pace.helps || behind < pace.behind_before;
            pace.behind_before = behind;
            let next = if pace.helps {
                PACE_JUDGED_AFTER
            } else {
                PACE_PAUSE
            };
            pace.judged_at = now + next;
            if !pace.helps {
                warn!(
                    behind,
                    "a replica's server does not keep up, and waiting does not help"
                );
            }
        }
        if pace.helps {
            let more = behind >= PACED_MORE_FROM_BYTES;
            order.hold_until = now + if more { PACED_MORE_HOLD } else { PACED_HOLD };
        }
    }

    /// How much of a checkpoint the servers that are being started have in their files, and of how much,
    /// in bytes.
    pub(crate) fn restoring(&self) -> Option<(u64, u64)> {
        let order = self.order.as_ref()?;
        let all = order.runners.iter().filter_map(Runner::restoring);
        all.reduce(|a, b| (a.0 + b.0, a.1 + b.1))
    }

    /// How far this replica's servers are, for people.
    pub(crate) fn outlook(&self) -> Outlook {
        let Some(order) = &self.order else {
            return Outlook::Even;
        };
        if !order.history.complete() {
            Outlook::NoHistory
        } else if !order.up() {
            Outlook::Begins
        } else if let Some(place) = order.replay.filter(|_| order.behind() > 0) {
            Outlook::Replaying {
                done_bytes: order.history.bytes_before(place),
                total_bytes: order.history.bytes(),
            }
        } else {
            Outlook::Even
        }
    }
}
