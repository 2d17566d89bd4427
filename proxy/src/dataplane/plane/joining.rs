//! A replica joins: its checkpoint is given by the leader, and taken.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use tracing::{error, info, warn};
use unbroken_group::{Command, MemberId, View};
use unbroken_tcpstate::Replica;

use super::super::catchup::Step;
use super::super::checkpoint::{self, CheckpointError, Incoming};
use super::super::servers::Outlook;
use super::super::spill::{self, For, Loading, Piece, Spill};
use super::{JOIN_AGAIN_AFTER, Plane, Role, tcp_time};
use crate::clock::BootTime;
use crate::status::CatchUpStage;

/// So many parts of a checkpoint are read from the disk before they are asked for.
const LOADED_MAX: usize = 4;

/// The checkpoints that a leader gives.
#[derive(Debug, Default)]
pub(crate) struct Donations(BTreeMap<MemberId, Donation>);

#[derive(Debug)]
struct Donation {
    pieces: VecDeque<Piece>,
    total_bytes: u64,
    /// The first of the pieces, being read where they are in files.
    loading: VecDeque<Option<Loading>>,
    /// The group waits for the next.
    wanted: bool,
}

/// The next part of a checkpoint.
enum Next {
    Part(Bytes),
    NotYet,
    Unreadable,
}

impl Donations {
    /// Forgets those of who joins no longer.
    pub(super) fn keep(&mut self, view: &View) {
        self.0.retain(|joiner, _| view.joiner(joiner).is_some());
    }

    /// Length of what is given to a joiner.
    pub(crate) fn total_bytes(&self, joiner: &MemberId) -> Option<u64> {
        self.0.get(joiner).map(|d| d.total_bytes)
    }
}

impl Donation {
    fn next(&mut self, spill: &Spill) -> Next {
        for piece in self.pieces.iter().skip(self.loading.len()) {
            if self.loading.len() == LOADED_MAX {
                break;
            }
            self.loading.push_back(match piece {
                Piece::Stored(stored) if stored.held().is_none() => spill.load(stored, For::All),
                Piece::Memory(_) | Piece::Stored(_) => None,
            });
        }
        let Some(piece) = self.pieces.front() else {
            return Next::NotYet;
        };
        let bytes = match self.loading.front().and_then(Option::as_ref) {
            Some(loading) => match loading.get() {
                None => return Next::NotYet,
                Some(Err(_)) => return Next::Unreadable,
                Some(Ok(bytes)) => bytes.clone(),
            },
            None => match piece.now() {
                Some(bytes) => bytes,
                // It was in memory a moment ago.
                None => {
                    self.loading.clear();
                    return self.next(spill);
                }
            },
        };
        self.pieces.pop_front();
        self.loading.pop_front();
        Next::Part(bytes)
    }
}

impl Plane {
    pub(super) fn give_checkpoint(&mut self, now: BootTime, joiner: MemberId) {
        let Role::Leader(stack) = &self.role else {
            return;
        };
        let image = stack.snapshot(tcp_time(now));
        let order = self.servers.order_image();
        // With one order for all connections, the inputs of each are in it.
        let inputs = match order {
            Some(_) => Default::default(),
            None => self.servers.inputs(),
        };
        let pieces = checkpoint::encode(&image, inputs, order);
        let total = spill::total(&pieces);
        info!(vip = %self.config.vip, %joiner, bytes = total, "giving a checkpoint");
        let donation = Donation {
            pieces: pieces.into(),
            total_bytes: total,
            loading: VecDeque::new(),
            wanted: false,
        };
        self.donations.0.insert(joiner.clone(), donation);
        self.command(now, Command::CheckpointBegin { joiner, total });
    }

    /// The group wants the next part of a checkpoint.
    pub(super) fn want_part(&mut self, now: BootTime, joiner: &MemberId) {
        if let Some(donation) = self.donations.0.get_mut(joiner) {
            donation.wanted = true;
            self.give_parts(now);
        }
    }

    /// Gives what is wanted and was read. Whether there was anything.
    pub(super) fn give_parts(&mut self, now: BootTime) -> bool {
        let (spill, _) = self.servers.spill();
        let mut commands = Vec::new();
        for (joiner, donation) in &mut self.donations.0 {
            if !donation.wanted {
                continue;
            }
            let joiner = joiner.clone();
            match donation.next(spill) {
                Next::NotYet => continue,
                Next::Part(bytes) => commands.push(Command::CheckpointPart { joiner, bytes }),
                Next::Unreadable => {
                    error!(%joiner, "a checkpoint cannot be read from the disk: not given");
                    commands.push(Command::CheckpointFailed { joiner });
                }
            }
            donation.wanted = false;
        }
        let any = !commands.is_empty();
        for command in commands {
            self.command(now, command);
        }
        any
    }

    /// The next bytes of this replica's own checkpoint.
    pub(super) fn take_chunk(&mut self, now: BootTime, bytes: Bytes, total: u64) {
        if let Role::Joining(incoming) = &mut self.role
            && let Err(error) = incoming.push(bytes, total, self.servers.spill())
        {
            self.refuse_checkpoint(now, &error);
        }
    }

    fn refuse_checkpoint(&mut self, now: BootTime, error: &CheckpointError) {
        match error {
            CheckpointError::Unusable => {
                warn!(vip = %self.config.vip, %error, "joining anew later");
                self.join_again_at = Some(now + JOIN_AGAIN_AFTER);
            }
            CheckpointError::Length
            | CheckpointError::Header(_)
            | CheckpointError::Records(_)
            | CheckpointError::Version(_)
            | CheckpointError::History => {
                error!(vip = %self.config.vip, %error, "unusable checkpoint; joining anew");
                self.command(now, Command::Leave);
            }
        }
    }

    /// What this node's own servers lack, if they are being brought up to date.
    pub(crate) fn own_step(&self) -> Option<Step> {
        let (stage, done_bytes, total_bytes) = if let Role::Joining(incoming) = &self.role {
            let Incoming {
                done_bytes,
                total_bytes,
                ..
            } = **incoming;
            (CatchUpStage::Transfer, done_bytes, total_bytes)
        } else if let Some((done, total)) = self.servers.restoring() {
            (CatchUpStage::Restore, done, total)
        } else if let Outlook::Replaying {
            done_bytes,
            total_bytes,
        } = self.servers.outlook()
        {
            (CatchUpStage::Replay, done_bytes, total_bytes)
        } else {
            return None;
        };
        Some(Step {
            stage,
            left_bytes: total_bytes.saturating_sub(done_bytes),
            total_bytes: Some(total_bytes),
        })
    }

    /// All of it has come.
    pub(super) fn restore(&mut self, now: BootTime) {
        let Role::Joining(incoming) = &mut self.role else {
            return;
        };
        let incoming = std::mem::take(incoming);
        let bytes = incoming.done_bytes;
        let checkpoint = match incoming.finish() {
            Ok(Some(checkpoint)) => checkpoint,
            Ok(None) => return,
            Err(error) => return self.refuse_checkpoint(now, &error),
        };
        let connections = checkpoint.tcp.connections().count();
        let replica = Replica::restore(self.config.tcp.clone(), tcp_time(now), checkpoint.tcp);
        self.servers.clear(now);
        for (header, pieces) in checkpoint.inputs {
            self.servers.restore(now, &header, pieces);
        }
        if let Some(order) = checkpoint.order {
            self.servers.restore_order(now, order);
        }
        self.role = Role::Backup(Box::new(replica));
        self.changed = true;
        info!(vip = %self.config.vip, bytes, connections, "checkpoint restored, replaying");
        self.command(now, Command::ReadyToBeFull);
    }
}
