//! Consensus: of all values that are proposed, everyone learns the same one.
//!
//! **How it works.** An instance is a persistent znode. To propose is to create it with the value
//! as its data; the first creation wins, which the coordinator orders, and the others read what
//! was decided. A lost connection does no harm: the proposal is repeated, and whoever won, the
//! answer is what the znode holds. [`Consensus::decide`] waits by a watch.
//!
//! A [`Sequence`] is a row of instances, decided one after another without a gap: a replicated log.
//! [`Sequence::append`] proposes at the first free place until its own value wins, and a [`Cursor`]
//! reads the decisions in order. Values carry a random id there, so that a proposer
//! knows its own among equals.
//!
//! | znode | data |
//! |---|---|
//! | `<path>` | the decision |
//! | `<path>/0000000007` | decision 7 of a sequence: proposal id (a UUID as text), value |
//!
//! **Guarantees.** Agreement and integrity: every call on every machine that gives a decision gives
//! the same one, which somebody proposed. Termination: while a majority of the servers can be
//! reached. All of it as long as nobody deletes the znode.
//!
//! **Cost.** A proposal takes one round trip (a quorum write) where it wins, two where it does not;
//! a decision already made one.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), unbroken_coord::client::ClientError> {
//! use unbroken_coord::recipes::consensus::Consensus;
//!
//! let primary = Consensus::new(&client, "/app/primary-of-shard-7");
//! let decided = primary.propose("machine-3").await?;
//! println!("the primary is {}", String::from_utf8_lossy(&decided));
//! # Ok(())
//! # }
//! ```

use bytes::Bytes;

use super::znodes::{Znodes, join, present, unique};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, ErrorCode};

/// Length of the id in front of a sequence's values, in bytes: a UUID as text.
const ID_BYTES: usize = 36;

/// One named instance.
#[derive(Clone, Debug)]
pub struct Consensus {
    nodes: Znodes,
    path: String,
}

impl Consensus {
    /// The instance at `path`, whose parent must exist.
    pub fn new(client: &Client, path: &str) -> Self {
        Self {
            nodes: Znodes::new(client),
            path: path.to_owned(),
        }
    }

    /// Sets the access control list of the znode that a proposal creates; open to all otherwise.
    /// Who may write or delete it must be trusted not to.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.nodes.acl = acl;
        self
    }

    /// Proposes a value, and gives the decision.
    ///
    /// # Errors
    /// [`ErrorCode::NoNode`] where the parent is missing, or somebody deleted the decision
    /// meanwhile. After other errors the proposal may win yet.
    pub async fn propose(&self, value: impl Into<Bytes>) -> Result<Bytes, ClientError> {
        self.nodes.create(&self.path, &value.into()).await?;
        let decided = self.nodes.get(&self.path).await?;
        decided
            .map(|(value, _)| value)
            .ok_or(ClientError::Zk(ErrorCode::NoNode))
    }

    /// The decision, where one was acknowledged to anybody before the call.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn decided(&self) -> Result<Option<Bytes>, ClientError> {
        let decided = self.nodes.get_newest(&self.path).await?;
        Ok(decided.map(|(value, _)| value))
    }

    /// Waits for the decision.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn decide(&self) -> Result<Bytes, ClientError> {
        loop {
            if let Some((value, _)) = self.nodes.get(&self.path).await? {
                return Ok(value);
            }
            let watch = || self.nodes.client.exists_and_watch(&self.path);
            let (found, changed) = self.nodes.repeat(watch).await?;
            if found.is_none() {
                match changed.await {
                    Ok(_) => {}
                    Err(ClientError::SessionExpired) => self.nodes.session().await?,
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// A row of instances, decided in order.
#[derive(Clone, Debug)]
pub struct Sequence {
    nodes: Znodes,
    path: String,
}

impl Sequence {
    /// The sequence at `path`; the znode is created where it is missing.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn open(client: &Client, path: &str) -> Result<Self, ClientError> {
        let nodes = Znodes::new(client);
        nodes.ensure(path).await?;
        Ok(Self {
            nodes,
            path: path.to_owned(),
        })
    }

    /// Proposes a value for instance `index`, and gives the decision, and whether it is this
    /// proposal. To leave no gap, propose only where all before it are decided;
    /// [`Self::append`] does.
    ///
    /// # Errors
    /// As [`Consensus::propose`].
    pub async fn propose(
        &self,
        index: u64,
        value: impl Into<Bytes>,
    ) -> Result<(Bytes, bool), ClientError> {
        let value = value.into();
        let id = unique();
        let proposal: Bytes = [id.as_bytes(), &value].concat().into();
        let decided = self.instance(index).propose(proposal).await?;
        let mine = decided.starts_with(id.as_bytes());
        Ok((without_id(&decided)?, mine))
    }

    /// Appends a value, and gives its index.
    ///
    /// # Errors
    /// As [`Consensus::propose`]; a value whose append failed may be in the sequence all the same.
    pub async fn append(&self, value: impl Into<Bytes>) -> Result<u64, ClientError> {
        let value = value.into();
        let mut index = self.len().await?;
        loop {
            if self.propose(index, value.clone()).await?.1 {
                return Ok(index);
            }
            index += 1;
        }
    }

    /// How many instances are decided, as far as the session's server knows: at least as many as
    /// this client has seen.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn len(&self) -> Result<u64, ClientError> {
        // Creations, and there are no deletions.
        let stat = self.nodes.repeat(|| self.nodes.client.exists(&self.path));
        let stat = present(stat.await)?.flatten();
        Ok(stat.map_or(0, |stat| u64::try_from(stat.num_children).unwrap_or(0)))
    }

    /// Whether nothing is decided yet, as far as the session's server knows.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn is_empty(&self) -> Result<bool, ClientError> {
        Ok(self.len().await? == 0)
    }

    /// Reads the decisions in order, from instance `from` on.
    pub fn cursor(&self, from: u64) -> Cursor {
        Cursor {
            sequence: self.clone(),
            next: from,
        }
    }

    fn instance(&self, index: u64) -> Consensus {
        Consensus {
            nodes: self.nodes.clone(),
            path: join(&self.path, &format!("{index:010}")),
        }
    }
}

/// A position in a [`Sequence`].
#[derive(Clone, Debug)]
pub struct Cursor {
    sequence: Sequence,
    next: u64,
}

impl Cursor {
    /// The instance that [`Self::next`] reads.
    pub const fn position(&self) -> u64 {
        self.next
    }

    /// Waits for the next decision; gives its index and value.
    ///
    /// Cancel safe: if the future is dropped, the position stays.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn next(&mut self) -> Result<(u64, Bytes), ClientError> {
        let index = self.next;
        let decided = self.sequence.instance(index).decide().await?;
        self.next += 1;
        Ok((index, without_id(&decided)?))
    }
}

fn without_id(decided: &Bytes) -> Result<Bytes, ClientError> {
    if decided.len() < ID_BYTES {
        // Not written by this recipe.
        return Err(ClientError::Protocol);
    }
    Ok(decided.slice(ID_BYTES..))
}
