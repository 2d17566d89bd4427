//! The leader's part in changes of the membership, and every server's part in what follows.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{CloseReason, Core, Event, Output};
use crate::members::Members;
use crate::quorum::{Conf, EntryKind, Recovered, SnapshotImage};
use crate::snapshot::{self, SnapshotError};
use crate::time::Instant;
use crate::tree::CONFIG_PATH;
use crate::txn::{Command, Entry, Op, Proposal, State};
use crate::wire::{ErrorCode, perms};

/// A server that is joining votes when it lacks so many entries at most. A busy leader is always
/// some entries ahead of everybody.
const CAUGHT_UP_WITHIN: u64 = 1000;

/// A promotion or an announcement that has not come back after this long is proposed again.
const AGAIN: Duration = Duration::from_millis(250);

/// A server that was removed still votes for so long. Who does not know yet that it was removed may
/// need its vote to find out, should the leader fail just now.
const LINGER: Duration = Duration::from_secs(2);

/// Who takes part, as the engine wants to know it.
pub(super) fn conf(members: &Members) -> Conf {
    Conf {
        voters: members.voters().collect(),
        learners: members.learners().collect(),
    }
}

impl SnapshotImage {
    /// The state as it is now, after an entry of this term.
    pub(crate) fn of(state: &State, term: u64) -> Self {
        Self {
            index: state.zxid,
            term,
            conf: conf(&state.members),
            data: snapshot::encode(state),
        }
    }
}

impl Core {
    /// What the leader puts into the log for this proposal, and as what. `None`: nothing now; its
    /// origin repeats it.
    pub(super) fn admit(&mut self, mut proposal: Proposal) -> Option<(EntryKind, Proposal)> {
        let Command::Write { op, who, .. } = &mut proposal.command else {
            let kind = match proposal.command {
                Command::Promote { .. } => EntryKind::Membership,
                _ => EntryKind::Normal,
            };
            return Some((kind, proposal));
        };
        let Op::Reconfig(change) = op else {
            return Some((EntryKind::Normal, proposal));
        };
        // What earlier leaders left behind must be applied before this can be judged.
        if self.settled_term != self.quorum.term() {
            return None;
        }
        let config = self.state.tree.read(CONFIG_PATH, perms::WRITE, who);
        let next = self.state.members.reconfigured(change, self.state.zxid + 1);
        let (Ok(_), Ok(next)) = (config, next) else {
            // It is refused when it is applied, in its place among the other writes.
            return Some((EntryKind::Membership, proposal));
        };
        if next.voters().eq(self.state.members.voters()) {
            return Some((EntryKind::Membership, proposal));
        }
        let voters = next.voters().count();
        let active = next.voters().filter(|id| self.is_active(*id)).count();
        if active <= voters / 2 {
            *op = Op::Malformed(ErrorCode::NewConfigNoQuorum);
            return Some((EntryKind::Normal, proposal));
        }
        if !next.voters().any(|id| id == self.config.id) {
            let heirs = next.voters().filter(|id| self.is_active(*id));
            if let Some(heir) = heirs.max_by_key(|id| (self.quorum.matched(*id), !*id)) {
                tracing::info!(heir, "this server is to leave: handing leadership over");
                self.quorum.transfer(heir);
            }
            return None;
        }
        Some((EntryKind::Membership, proposal))
    }

    /// Whether a server was heard of lately.
    fn is_active(&self, id: u64) -> bool {
        let limit = self.config.election_max;
        id == self.config.id
            || self
                .heard
                .get(&id)
                .is_some_and(|at| self.now.since(*at) < limit)
    }

    /// A server was heard of.
    pub(super) fn hear(&mut self, from: u64) {
        if self.state.members.get(from).is_some() {
            self.heard.insert(from, self.now);
        }
    }

    /// A leader promotes the server that is joining once it has caught up.
    pub(super) fn check_joining(&mut self) {
        if self.now < self.next_promotion || self.settled_term != self.quorum.term() {
            return;
        }
        let Some(member) = self.state.members.joining() else {
            return;
        };
        let lacks = |matched| self.quorum.last_index().saturating_sub(matched);
        let caught_up = self.quorum.matched(member).map(lacks);
        if caught_up.is_some_and(|lacks| lacks <= CAUGHT_UP_WITHIN) && self.is_active(member) {
            self.next_promotion = self.now + AGAIN;
            let command = Command::Promote { member };
            self.propose(Proposal {
                origin: self.run,
                command,
            });
        }
    }

    /// Tells the others where this server is, if they know something else.
    pub(super) fn check_announcement(&mut self) {
        let Some((peer, client)) = &self.config.addresses else {
            return;
        };
        let member = self.state.members.get(self.config.id);
        let known = member.is_none_or(|member| member.peer == *peer && member.client == *client);
        if known || self.now < self.next_announcement || self.quorum.leader().is_none() {
            return;
        }
        self.next_announcement = self.now + AGAIN;
        self.forward.push(Proposal {
            origin: self.run,
            command: Command::Announce {
                peer: peer.clone(),
                client: client.clone(),
            },
        });
    }

    /// The membership has changed, or is known for the first time.
    pub(super) fn on_members(&mut self) {
        let members = &self.state.members;
        self.heard.retain(|id, _| members.get(*id).is_some());
        let gone = members.was_removed(self.config.id);
        let event = Event::Members(members.clone());
        self.outputs.push_back(Output::Event(event));
        if gone {
            self.leave();
        }
    }

    /// A peer says that this server was removed: it knows the log better.
    pub fn handle_removed(&mut self, now: Instant) {
        self.advance(now);
        self.leave();
    }

    fn leave(&mut self) {
        if self.leaves_at.is_none() {
            tracing::warn!("this server was removed from the cluster");
            self.leaves_at = Some(self.now + LINGER);
            self.close_all(CloseReason::Removed);
        }
    }

    pub(super) fn check_removed(&mut self) {
        if self.leaves_at.is_some_and(|at| at <= self.now) {
            self.leaves_at = Some(self.now + LINGER);
            self.outputs.push_back(Output::Event(Event::Removed));
        }
    }

    /// The name of a server, as far as it is known here.
    pub(super) fn name_of(&self, id: u64) -> Option<String> {
        let member = self.state.members.get(id);
        member.map(|member| member.name.clone())
    }
}

/// The state of a server that starts: that of its snapshot, or the one before the first entry.
pub(super) fn recovered(
    founders: &BTreeMap<u64, String>,
    recovered: &Recovered,
) -> Result<State, SnapshotError> {
    let Some(image) = &recovered.snapshot else {
        return Ok(State {
            members: Members::founded(founders),
            ..Default::default()
        });
    };
    let mut state = snapshot::decode(&image.data)?;
    state.zxid = image.index;
    Ok(state)
}

/// The state after everything that a server's disk holds, committed or not.
pub(crate) fn replay(
    founders: &BTreeMap<u64, String>,
    disk: &Recovered,
) -> Result<State, SnapshotError> {
    let mut state = recovered(founders, disk)?;
    for logged in &disk.entries {
        if logged.data.is_empty() {
            state.skip(logged.index);
        } else {
            let entry: Entry = postcard::from_bytes(&logged.data)
                .expect("the log's checksums held, and we wrote it");
            state.apply(logged.index, &entry);
        }
    }
    Ok(state)
}
