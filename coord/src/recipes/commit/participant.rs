//! Taking part in transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info};

use super::rules::{Duty, Journal, Phase, Vote, participate, recover};
use super::{CommitError, Commits, Manifest, Outcome, Protocol};
use crate::client::{ClientError, WatchFuture};
use crate::recipes::common;
use crate::recipes::znodes::{join, op_check, op_delete, present};
use crate::wire::{CreateMode, ErrorCode, MultiOp};

/// The longest that is waited for anything, in ms: a month.
const PATIENCE_MS_MAX: u64 = 30 * 24 * 3_600_000;

/// A transaction as a participant sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its id. All calls for one transaction have the same.
    pub id: String,
    /// What it is about, as its coordinator has given it.
    pub payload: Bytes,
    /// How it is decided.
    pub protocol: Protocol,
}

/// Who takes part in transactions. Its methods are called one at a time.
///
/// A process that stops in the middle starts again where the journal ends, so that each call may come
/// again, with the same [`Work::id`], if the one before was not recorded.
pub trait Participant: Send {
    /// Whether it can commit. After [`Vote::Yes`] it must be able to do either, also after a restart.
    /// Not called any more once the vote is recorded.
    fn prepare(&mut self, work: &Work) -> impl Future<Output = Vote> + Send;

    /// Does it. The operations that it gives are done in one step with the record that it is done,
    /// and exactly once.
    fn commit(&mut self, work: &Work) -> impl Future<Output = Vec<MultiOp>> + Send;

    /// Undoes what [`Self::prepare`] has done for this transaction, if it was called at all. The
    /// operations are as those of [`Self::commit`].
    fn abort(&mut self, work: &Work) -> impl Future<Output = Vec<MultiOp>> + Send;
}

/// A transaction that this participant has not done its part of.
struct Open {
    work: Work,
    manifest: Manifest,
    /// Empty where it has to be looked at.
    watches: Vec<WatchFuture>,
    /// The phase that was seen last, and when it was seen first.
    seen: Option<(Phase, Instant)>,
}

impl Open {
    /// When this participant passes over a silent coordinator, if ever.
    fn deadline(&self) -> Option<Instant> {
        let (_, since) = self.seen?;
        match self.manifest.protocol {
            Protocol::TwoPhase => None,
            Protocol::ThreePhase => {
                let patience = self.manifest.patience_ms.saturating_mul(2);
                Some(since + Duration::from_millis(patience.min(PATIENCE_MS_MAX)))
            }
        }
    }

    fn out_of_patience(&self) -> bool {
        self.deadline()
            .is_some_and(|deadline| deadline <= Instant::now())
    }

    fn saw(&mut self, phase: Phase) {
        if self.seen.is_none_or(|(seen, _)| seen != phase) {
            self.seen = Some((phase, Instant::now()));
        }
    }
}

/// Whether there is something new; what has fired is forgotten.
fn fired(watches: &mut Vec<WatchFuture>, context: &mut Context<'_>) -> bool {
    let fired = watches
        .iter_mut()
        .any(|watch| Pin::new(watch).poll(context).is_ready());
    if fired {
        watches.clear();
    }
    fired
}

impl Commits {
    /// Takes part in all transactions that name this participant, as long as the future is polled.
    /// A name is for one process at a time; where two have it, `prepare`, `commit` and `abort` may be
    /// called in both.
    ///
    /// # Errors
    /// [`CommitError::Client`], [`CommitError::Effect`], [`CommitError::BadName`],
    /// [`CommitError::Foreign`]. It may be called again then.
    pub async fn participate<P: Participant>(
        &self,
        name: &str,
        participant: &mut P,
    ) -> Result<Infallible, CommitError> {
        let list = self.work_of(name)?;
        let nodes = &self.nodes;
        nodes.ensure(&list).await?;
        self.recover().await?;
        let mut open: BTreeMap<String, Open> = BTreeMap::new();
        let mut listed = Vec::new();
        loop {
            if listed.is_empty() {
                let read = || nodes.client.children_and_watch(&list);
                let (ids, _, changed) = nodes.repeat(read).await?;
                listed.push(changed);
                open.retain(|id, _| ids.contains(id));
                for id in ids {
                    if open.contains_key(&id) {
                        continue;
                    }
                    match self.open_work(&id).await? {
                        Some(work) => {
                            open.insert(id, work);
                        }
                        // It was over, and its journal removed, before this was listed.
                        None => nodes.delete(&join(&list, &id)).await?,
                    }
                }
            }
            let ids: Vec<String> = open.keys().cloned().collect();
            for id in ids {
                let work = open.get_mut(&id).expect("its id was listed");
                if work.watches.is_empty() || work.out_of_patience() {
                    match self.advance(name, work, participant).await? {
                        Some(watches) => work.watches = watches,
                        None => {
                            open.remove(&id);
                        }
                    }
                }
            }
            let deadline = open.values().filter_map(Open::deadline).min();
            let news = poll_fn(|context| {
                let mut news = fired(&mut listed, context);
                for work in open.values_mut() {
                    news |= fired(&mut work.watches, context);
                }
                if news { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                () = news => {}
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {}
            }
        }
    }

    async fn open_work(&self, id: &str) -> Result<Option<Open>, CommitError> {
        let payload = join(&self.transaction(id), "payload");
        let Some(manifest) = self.manifest(id).await? else {
            return Ok(None);
        };
        let Some((payload, _)) = self.nodes.get(&payload).await? else {
            return Ok(None);
        };
        Ok(Some(Open {
            work: Work {
                id: id.to_owned(),
                payload,
                protocol: manifest.protocol,
            },
            manifest,
            watches: Vec::new(),
            seen: None,
        }))
    }

    /// Does what there is to do for a transaction; gives what to wait for, `None` where nothing is
    /// left.
    async fn advance<P: Participant>(
        &self,
        me: &str,
        open: &mut Open,
        participant: &mut P,
    ) -> Result<Option<Vec<WatchFuture>>, CommitError> {
        let id = open.work.id.clone();
        let path = self.transaction(&id);
        loop {
            let Some((journal, watches)) = self.read_mine(me, &path, &open.manifest).await? else {
                self.nodes.delete(&join(&self.work_of(me)?, &id)).await?;
                return Ok(None);
            };
            open.saw(journal.phase);
            match participate(&journal, me) {
                Duty::Prepare => {
                    let vote = participant.prepare(&open.work).await;
                    self.vote(me, &path, vote, journal.version).await?;
                }
                Duty::Acknowledge => {
                    let ack = join(&join(&path, "acks"), me);
                    present(self.nodes.create(&ack, &Bytes::new()).await)?;
                }
                Duty::Apply(outcome) => {
                    let effects = match outcome {
                        Outcome::Committed => participant.commit(&open.work).await,
                        Outcome::Aborted => participant.abort(&open.work).await,
                    };
                    self.record(me, &id, effects).await?;
                }
                Duty::Wait => match recover(&journal, open.out_of_patience()) {
                    Some(next) => {
                        info!(id, "coordinator gone or silent");
                        self.move_to(&id, next, journal.version).await?;
                    }
                    None => return Ok(Some(watches)),
                },
                Duty::Leave => {
                    if let Some(journal) = self.journal(&id, Some(&open.manifest)).await? {
                        self.collect(&id, &journal).await?;
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// As much of the journal as concerns this participant, and watches on what can change for it.
    async fn read_mine(
        &self,
        me: &str,
        path: &str,
        manifest: &Manifest,
    ) -> Result<Option<(Journal, Vec<WatchFuture>)>, CommitError> {
        let nodes = &self.nodes;
        let phase_path = join(path, "phase");
        let read = || nodes.client.get_and_watch(&phase_path);
        let Some((phase, stat, moved)) = present(nodes.repeat(read).await)? else {
            return Ok(None);
        };
        let coordinator = join(path, "coordinator");
        let read = || nodes.client.exists_and_watch(&coordinator);
        let (coordinator, gone) = nodes.repeat(read).await?;
        let mine = async |part: &str| nodes.get(&join(&join(path, part), me)).await;
        let vote = mine("votes").await?.map(|(vote, _)| {
            let yes = vote == Vote::Yes.as_str();
            (me.to_owned(), if yes { Vote::Yes } else { Vote::No })
        });
        let mut marks = [BTreeSet::new(), BTreeSet::new()];
        for (part, marks) in ["acks", "done"].iter().zip(&mut marks) {
            if mine(part).await?.is_some() {
                marks.insert(me.to_owned());
            }
        }
        let [acks, done] = marks;
        let journal = Journal {
            protocol: manifest.protocol,
            participants: manifest.participants.clone(),
            phase: self.phase(&phase_path, &phase)?,
            version: stat.version,
            votes: vote.into_iter().collect(),
            acks,
            done,
            coordinator: coordinator.is_some(),
        };
        Ok(Some((journal, vec![moved, gone])))
    }

    async fn vote(
        &self,
        me: &str,
        path: &str,
        vote: Vote,
        version: i32,
    ) -> Result<(), CommitError> {
        let nodes = &self.nodes;
        let votes = join(&join(path, "votes"), me);
        let ops = vec![
            op_check(&join(path, "phase"), version),
            nodes.op_create(&votes, vote.as_str(), CreateMode::Persistent),
        ];
        match nodes.repeat(|| nodes.client.multi(ops.clone())).await {
            Ok(_) => Ok(()),
            // Too late, or a repetition. What is there shows it.
            Err(ClientError::Multi {
                code: ErrorCode::BadVersion | ErrorCode::NodeExists | ErrorCode::NoNode,
                ..
            }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Records that this participant has done its part, with what is to be done in the same step.
    async fn record(&self, me: &str, id: &str, effects: Vec<MultiOp>) -> Result<(), CommitError> {
        let nodes = &self.nodes;
        let done = join(&join(&self.transaction(id), "done"), me);
        let count = effects.len();
        // The record first: it is what tells a repetition.
        let mut ops = vec![nodes.op_create(&done, "", CreateMode::Persistent)];
        ops.extend(effects);
        ops.push(op_delete(&join(&self.work_of(me)?, id), -1));
        loop {
            match common::repeat(|| nodes.client.multi(ops.clone())).await {
                Ok(_) => {
                    debug!(id, participant = me, "done");
                    return Ok(());
                }
                Err(ClientError::Multi { index: 0, code }) => match code {
                    ErrorCode::NodeExists | ErrorCode::NoNode => return Ok(()),
                    code => return Err(ClientError::Zk(code).into()),
                },
                Err(ClientError::Multi { index, code }) if index <= count => {
                    return Err(CommitError::Effect {
                        id: id.to_owned(),
                        index: index - 1,
                        code,
                    });
                }
                // Somebody has taken the work off the list by hand.
                Err(ClientError::Multi { .. }) => {
                    ops.truncate(count + 1);
                }
                Err(ClientError::SessionExpired) => nodes.session().await?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}
