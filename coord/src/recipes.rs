//! What people build on a coordinator: locks, elections, queues and the like.
//!
//! Every recipe here needs a [`Client`](crate::client::Client) and nothing else, so that it runs on
//! Apache ZooKeeper as well. Where Curator or kazoo has a znode layout for the same thing, the recipe
//! has that layout and takes part in what they do; its own page says so.
//!
//! | recipe | module |
//! |---|---|
//! | event channels: resumable, with a prefix that is truncated | [`channel`] |
//! | transaction: several changes in one step, optimistic ones that read before they write | [`transaction`] |
//! | read cache kept valid by watches | [`cache`] |
//! | configuration that follows changes | [`config`] |
//! | lease: held for a time, longer than any session lasts | [`lease`] |
//! | two-phase and three-phase commit with a journal | [`commit`] |
//! | consensus by proposal and decision, and a sequence of decisions | [`consensus`] |
//! | lock, fair and without a herd | [`lock`] |
//! | read/write lock | [`rwlock`] |
//! | semaphore | [`semaphore`] |
//! | leader election | [`election`] |
//! | barrier, double barrier | [`barrier`], [`double_barrier`] |
//! | queue, first in first out or by priority | [`queue`] |
//! | group membership | [`group`] |
//!
//! # What holds for all of them
//!
//! - **Nothing is believed held after its session has expired.** What is held is a [`Hold`]: it knows by
//!   the local clock until when the session is certainly alive, and says that it is lost before any
//!   server could have given it to another. [`Hold::run`] cancels work at that moment.
//! - **Dropping is cleaning up.** A future that waits for something may be dropped at any time (put
//!   [`tokio::time::timeout`] around it); what it had created is deleted in the background, again and
//!   again until that has succeeded or the session is over. The same holds for a dropped [`Hold`].
//! - **A lost connection is bridged.** Requests are repeated, in another server's hands where need be;
//!   what may not be done twice carries a mark by which it is found again. Waiting has no limit but the
//!   caller's own, whatever the client's request timeout is.
//! - **Each wait ends by an event**: nothing here polls.

pub mod barrier;
pub mod cache;
pub mod channel;
pub mod commit;
mod common;
pub mod config;
pub mod consensus;
pub mod double_barrier;
pub mod election;
pub mod group;
mod hold;
pub mod lease;
mod line;
pub mod lock;
pub mod queue;
pub mod rwlock;
pub mod semaphore;
mod session;
mod ticket;
pub mod transaction;
mod znodes;

use thiserror::Error;

use crate::client::ClientError;

pub use hold::{Hold, HoldState, LostReason};

/// Why a recipe did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The session or the server said no.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The znode that stood for the caller was deleted by somebody else.
    #[error("{path} was deleted by somebody else")]
    Removed {
        /// The znode.
        path: String,
    },
    /// What was held is held no longer.
    #[error("no longer held: {0}")]
    Lost(#[from] LostReason),
    /// The data of a znode is not what this recipe writes there.
    #[error("{path} holds something else than this recipe's data")]
    Foreign {
        /// The znode.
        path: String,
    },
    /// This session has that name already.
    #[error("this session has joined as {path} already")]
    Taken {
        /// The znode.
        path: String,
    },
    /// The name cannot be that of a znode.
    #[error("{name:?} is not a name: it may be neither empty nor hold a slash")]
    BadName {
        /// What was given.
        name: String,
    },
    /// An argument is out of its range.
    #[error("{what} is {value}, and may be {min} to {max}")]
    OutOfRange {
        /// Which argument.
        what: &'static str,
        /// What was given.
        value: usize,
        /// The smallest that is allowed.
        min: usize,
        /// The largest that is allowed.
        max: usize,
    },
}
