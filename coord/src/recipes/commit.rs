//! Atomic commitment: all participants do something, or none does; two-phase and three-phase commit
//! with a journal that any process can go on from.
//!
//! **How it works.** A transaction's journal is a few znodes. The coordinator writes them in one step,
//! the participants find the transaction in their list of work, are asked whether they can commit, and
//! vote. The decision is a change of one znode, the phase, by compare-and-set on its version, so that
//! there can never be two; it is durable at a majority before anybody hears of it. Then every
//! participant does what was decided and records that it has; when all have, the journal goes.
//!
//! *Two phases* ([`Protocol::TwoPhase`]): the coordinator decides to commit when all have voted yes, and
//! to abort when one votes no or patience ends. If its session ends first, whoever notices (any
//! participant, or [`Commits::recover`]) decides to abort. While it lives and does not decide, all wait.
//!
//! *Three phases* ([`Protocol::ThreePhase`]): when all have voted yes it first writes *pre-committed*,
//! which the participants acknowledge, and then decides. So whoever finds the coordinator gone, or just
//! silent for twice its patience, can finish for it: pre-committed is committed, anything before is
//! aborted. No participant waits for a coordinator that hangs.
//!
//! | znode | data |
//! |---|---|
//! | `<root>/work/<participant>/<id>` | nothing: the participant has not done its part |
//! | `<root>/tx/<id>` | JSON: protocol, participants, the coordinator's patience |
//! | `<root>/tx/<id>/payload` | what it is about, as given |
//! | `<root>/tx/<id>/phase` | `preparing`, `pre-committed`, `committed`, `aborted` |
//! | `<root>/tx/<id>/coordinator` | nothing, ephemeral |
//! | `<root>/tx/<id>/votes/<participant>` | `yes` or `no`, written while `preparing` |
//! | `<root>/tx/<id>/acks/<participant>` | nothing: it knows of `pre-committed` |
//! | `<root>/tx/<id>/done/<participant>` | nothing: it has done what was decided |
//!
//! **Guarantees.** There is one decision, and commit only where all have voted yes. A participant is told
//! the decision until it has recorded it, whatever dies: [`Participant::commit`] and
//! [`Participant::abort`] are called again, with the same id, only if the process stopped between the
//! call and the record. What they give back is done in the same step as the record, so that effects on
//! znodes are exactly once; other effects must be idempotent by the id.
//!
//! **Cost.** With n participants, in steps that take a round trip each: begin 1; votes 1 (all at once);
//! decision 1, with three phases 3; doing it 1. Each participant writes two (three) small multis, and
//! the removal of the journal takes about 3 n deletions that nobody waits for.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::wire::MultiOp;
//! use unbroken_coord::recipes::commit::{
//!     CommitError, Commits, Outcome, Participant, Protocol, Vote, Work,
//! };
//!
//! struct Stock;
//!
//! impl Participant for Stock {
//!     async fn prepare(&mut self, work: &Work) -> Vote {
//!         // Reserve it durably, under `work.id`.
//!         if work.payload.len() < 100 { Vote::Yes } else { Vote::No }
//!     }
//!     async fn commit(&mut self, work: &Work) -> Vec<MultiOp> { Vec::new() }
//!     async fn abort(&mut self, work: &Work) -> Vec<MultiOp> { Vec::new() }
//! }
//!
//! # async fn example(client: Client) -> Result<(), CommitError> {
//! let commits = Commits::open(&client, "/app/commits").await?;
//! tokio::spawn({
//!     let commits = commits.clone();
//!     async move { commits.participate("stock", &mut Stock).await }
//! });
//! let patience = Duration::from_secs(2);
//! let order = commits.begin(Protocol::TwoPhase, ["stock", "till"], "tea", patience).await?;
//! assert_eq!(order.finish().await?, Outcome::Committed);
//! # Ok(())
//! # }
//! ```

mod participant;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info};

use super::znodes::{Znodes, join, present, unique};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, CreateMode, ErrorCode, validate_path};
use rules::{Journal, Phase, coordinate, recover};

pub use participant::{Participant, Work};
pub use rules::{Outcome, Protocol, Vote};

/// Why a transaction could not be carried on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// A participant's name cannot be that of a znode.
    #[error("{0:?} cannot be the name of a participant")]
    BadName(String),
    /// A transaction has at least one participant.
    #[error("a transaction without participants")]
    NobodyTakesPart,
    /// Others have decided and finished while this coordinator's session was lost, and the journal
    /// is gone.
    #[error("transaction {id} is over, and its journal gone")]
    Forgotten {
        /// The transaction.
        id: String,
    },
    /// What a participant wanted to be done with its record was refused.
    #[error("transaction {id}: operation {index} that the participant gave: {code}")]
    Effect {
        /// The transaction.
        id: String,
        /// Which of the operations, counted from 0.
        index: usize,
        /// Why.
        code: ErrorCode,
    },
    /// A znode holds something else than a journal's data.
    #[error("{path} holds something else than a journal's data")]
    Foreign {
        /// Which.
        path: String,
    },
    /// The session or the server.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// What stands in a transaction's own znode.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    protocol: Protocol,
    participants: BTreeSet<String>,
    patience_ms: u64,
}

/// A place for transactions.
#[derive(Clone, Debug)]
pub struct Commits {
    nodes: Znodes,
    root: Arc<str>,
}

impl Commits {
    /// The place at `root`, which is created where it is missing.
    ///
    /// # Errors
    /// [`CommitError::Client`].
    pub async fn open(client: &Client, root: &str) -> Result<Self, CommitError> {
        Self::open_with(client, root, Acl::open()).await
    }

    /// As [`Self::open`], with an access control list for all that is created.
    ///
    /// # Errors
    /// [`CommitError::Client`].
    pub async fn open_with(
        client: &Client,
        root: &str,
        acl: Vec<Acl>,
    ) -> Result<Self, CommitError> {
        let nodes = Znodes {
            acl,
            ..Znodes::new(client)
        };
        for part in ["tx", "work"] {
            nodes.ensure(&join(root, part)).await?;
        }
        Ok(Self {
            nodes,
            root: root.into(),
        })
    }

    /// Begins a transaction among these participants, which need not run yet. The coordinator is
    /// whoever calls [`Running::finish`]. `patience` is how long it waits for votes, and for
    /// acknowledgements; in whole ms.
    ///
    /// # Errors
    /// [`CommitError::BadName`], [`CommitError::NobodyTakesPart`], [`CommitError::Client`]. If the
    /// session ends under way the transaction is not begun, or will be aborted.
    pub async fn begin(
        &self,
        protocol: Protocol,
        participants: impl IntoIterator<Item = impl Into<String>>,
        payload: impl Into<Bytes>,
        patience: Duration,
    ) -> Result<Running, CommitError> {
        let manifest = Manifest {
            protocol,
            participants: participants.into_iter().map(Into::into).collect(),
            patience_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        };
        if manifest.participants.is_empty() {
            return Err(CommitError::NobodyTakesPart);
        }
        let id = unique();
        let path = self.transaction(&id);
        let create = |path: &str, data: Bytes, mode| self.nodes.op_create(path, data, mode);
        let stays = CreateMode::Persistent;
        let text = serde_json::to_vec(&manifest).expect("it has a form in JSON");
        let mut ops = vec![create(&path, text.into(), stays)];
        let parts = [
            ("payload", payload.into()),
            ("phase", Phase::Preparing.as_str().into()),
            ("votes", Bytes::new()),
            ("acks", Bytes::new()),
            ("done", Bytes::new()),
        ];
        for (part, data) in parts {
            ops.push(create(&join(&path, part), data, stays));
        }
        let coordinator = join(&path, "coordinator");
        ops.push(create(&coordinator, Bytes::new(), CreateMode::Ephemeral));
        for name in &manifest.participants {
            self.nodes.ensure(&self.work_of(name)?).await?;
            let work = join(&self.work_of(name)?, &id);
            ops.push(create(&work, Bytes::new(), stays));
        }
        let nodes = &self.nodes;
        match super::common::repeat(|| nodes.client.multi(ops.clone())).await {
            Ok(_) => {}
            // The first attempt was done, its answer lost.
            Err(ClientError::Multi {
                index: 0,
                code: ErrorCode::NodeExists,
            }) => {}
            Err(error) => return Err(error.into()),
        }
        debug!(id, ?protocol, "transaction begun");
        Ok(Running {
            commits: self.clone(),
            id,
            manifest,
            patience,
        })
    }

    /// What was decided; `None` where nothing is yet, or the journal is gone. All that was
    /// acknowledged before the call is seen.
    ///
    /// # Errors
    /// [`CommitError::Client`].
    pub async fn outcome(&self, id: &str) -> Result<Option<Outcome>, CommitError> {
        let path = join(&self.transaction(id), "phase");
        let Some((data, _)) = self.nodes.get_newest(&path).await? else {
            return Ok(None);
        };
        Ok(match self.phase(&path, &data)? {
            Phase::Preparing | Phase::PreCommitted => None,
            Phase::Decided(outcome) => Some(outcome),
        })
    }

    /// Decides every transaction whose coordinator is gone, and removes journals that nobody needs
    /// any more. Gives how many it has decided. Participants do this when they begin; any other
    /// process may at any time.
    ///
    /// # Errors
    /// [`CommitError::Client`], [`CommitError::Foreign`].
    pub async fn recover(&self) -> Result<usize, CommitError> {
        let mut decided = 0;
        for id in self.nodes.children(&join(&self.root, "tx")).await? {
            let manifest = self.manifest(&id).await?;
            while let Some(journal) = self.journal(&id, manifest.as_ref()).await? {
                let Some(next) = recover(&journal, false) else {
                    self.collect(&id, &journal).await?;
                    break;
                };
                if self.move_to(&id, next, journal.version).await? {
                    decided += 1;
                }
            }
        }
        Ok(decided)
    }

    /// The whole journal; `None` where it is gone, or is being removed: then it is.
    async fn journal(
        &self,
        id: &str,
        manifest: Option<&Manifest>,
    ) -> Result<Option<Journal>, CommitError> {
        let path = self.transaction(id);
        let (nodes, phase_path) = (&self.nodes, join(&path, "phase"));
        let (Some(manifest), Some((phase, stat))) = (manifest, nodes.get(&phase_path).await?)
        else {
            self.remove(id).await?;
            return Ok(None);
        };
        let coordinator = join(&path, "coordinator");
        let coordinator = nodes.repeat(|| nodes.client.exists(&coordinator)).await?;
        let done = nodes.children(&join(&path, "done")).await?;
        Ok(Some(Journal {
            protocol: manifest.protocol,
            participants: manifest.participants.clone(),
            phase: self.phase(&phase_path, &phase)?,
            version: stat.version,
            // Of no concern to those who finish for others.
            votes: BTreeMap::new(),
            acks: BTreeSet::new(),
            done: done.into_iter().collect(),
            coordinator: coordinator.is_some(),
        }))
    }

    async fn manifest(&self, id: &str) -> Result<Option<Manifest>, CommitError> {
        let path = self.transaction(id);
        let Some((data, _)) = self.nodes.get(&path).await? else {
            return Ok(None);
        };
        let manifest = serde_json::from_slice(&data);
        manifest.map_err(|_| CommitError::Foreign { path })
    }

    /// Whether the phase was as read.
    async fn move_to(&self, id: &str, phase: Phase, version: i32) -> Result<bool, CommitError> {
        let path = join(&self.transaction(id), "phase");
        let nodes = &self.nodes;
        let text = phase.as_str();
        match nodes
            .repeat(|| nodes.client.set(&path, text, version))
            .await
        {
            Ok(_) => {
                info!(id, phase = text, "transaction goes on");
                Ok(true)
            }
            // Another's, or its own whose answer was lost.
            Err(ClientError::Zk(ErrorCode::BadVersion | ErrorCode::NoNode)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the journal where nobody needs it any more.
    async fn collect(&self, id: &str, journal: &Journal) -> Result<(), CommitError> {
        if journal.over() {
            self.remove(id).await?;
        }
        Ok(())
    }

    /// Removes a journal. The phase goes first: what has none is being removed.
    async fn remove(&self, id: &str) -> Result<(), CommitError> {
        let path = self.transaction(id);
        let nodes = &self.nodes;
        for part in ["phase", "payload", "coordinator"] {
            nodes.delete(&join(&path, part)).await?;
        }
        for part in ["votes", "acks", "done"] {
            let part = join(&path, part);
            for name in nodes.children(&part).await? {
                nodes.delete(&join(&part, &name)).await?;
            }
            nodes.delete(&part).await?;
        }
        Ok(nodes.delete(&path).await?)
    }

    fn phase(&self, path: &str, data: &[u8]) -> Result<Phase, CommitError> {
        Phase::from_bytes(data).ok_or_else(|| CommitError::Foreign {
            path: path.to_owned(),
        })
    }

    fn transaction(&self, id: &str) -> String {
        format!("{}/tx/{id}", self.root)
    }

    fn work_of(&self, participant: &str) -> Result<String, CommitError> {
        let path = format!("{}/work/{participant}", self.root);
        if participant.contains('/') || validate_path(&path).is_err() {
            return Err(CommitError::BadName(participant.to_owned()));
        }
        Ok(path)
    }
}

/// A transaction that was begun here. If it is dropped it goes on as if the coordinator hung; it is
/// recovered when the session ends.
#[derive(Debug)]
#[must_use = "somebody has to coordinate it"]
pub struct Running {
    commits: Commits,
    id: String,
    manifest: Manifest,
    patience: Duration,
}

impl Running {
    /// Its id, by which the participants know it, too.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Coordinates it until it is decided; gives the decision. The participants may still be busy
    /// with it then.
    ///
    /// # Errors
    /// [`CommitError::Client`]: whoever recovers it decides. [`CommitError::Forgotten`].
    pub async fn finish(self) -> Result<Outcome, CommitError> {
        let (commits, id) = (&self.commits, &self.id);
        let (nodes, path) = (&commits.nodes, commits.transaction(id));
        let mut deadline = Instant::now() + self.patience;
        let mut votes = BTreeMap::new();
        let outcome = loop {
            let phase_path = join(&path, "phase");
            let read = || nodes.client.get_and_watch(&phase_path);
            let Some((phase, stat, decided)) = present(nodes.repeat(read).await)? else {
                return Err(CommitError::Forgotten { id: id.clone() });
            };
            let phase = commits.phase(&phase_path, &phase)?;
            let awaited = match phase {
                Phase::Decided(outcome) => break outcome,
                Phase::Preparing => "votes",
                Phase::PreCommitted => "acks",
            };
            let list = join(&path, awaited);
            let read = || nodes.client.children_and_watch(&list);
            let Some((names, _, answered)) = present(nodes.repeat(read).await)? else {
                return Err(CommitError::Forgotten { id: id.clone() });
            };
            if phase == Phase::Preparing {
                for name in &names {
                    if !votes.contains_key(name)
                        && let Some((vote, _)) = nodes.get(&join(&list, name)).await?
                    {
                        let yes = vote == Vote::Yes.as_str();
                        let vote = if yes { Vote::Yes } else { Vote::No };
                        votes.insert(name.clone(), vote);
                    }
                }
            }
            let journal = Journal {
                protocol: self.manifest.protocol,
                participants: self.manifest.participants.clone(),
                phase,
                version: stat.version,
                votes: votes.clone(),
                acks: names.into_iter().collect(),
                done: BTreeSet::new(),
                coordinator: true,
            };
            if let Some(next) = coordinate(&journal, deadline <= Instant::now()) {
                if commits.move_to(id, next, journal.version).await? {
                    deadline = Instant::now() + self.patience;
                }
                continue;
            }
            tokio::select! {
                // Errors show at the next request.
                _ = decided => {}
                _ = answered => {}
                () = sleep_until(deadline) => {}
            }
        };
        // From here on the participants need no coordinator, and the last of them cleans up, or
        // this does.
        nodes.delete(&join(&path, "coordinator")).await?;
        if let Some(journal) = commits.journal(id, Some(&self.manifest)).await? {
            commits.collect(id, &journal).await?;
        }
        Ok(outcome)
    }
}
