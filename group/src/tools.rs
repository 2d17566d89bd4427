//! Tools over groups: what programs would else write again and again.
//!
//! [`Replicated`] keeps a deterministic [`Machine`] at every member: updates by abcast, reads local, state transfer to joiners.
//! [`Map`], [`Value`], [`Locks`] and [`Token`] are machines. [`Succession`] tells who leads and who comes next; a [`Rank`] also
//! tells which part of a piece of work is a member's own. [`PrimaryBackup`] and [`Cohorts`] answer requests, one member after or
//! beside the other, and go on when one departs. [`Cuts`] records the states of all at one point, and [`Topics`] is
//! publish and subscribe. [`Durable`] is a machine that is on the members' disks, and goes on after all have failed.

mod cohorts;
mod cut;
mod durable;
mod locks;
mod map;
mod primary_backup;
mod replicated;
mod requests;
mod sharing;
mod succession;
mod token;
mod topics;
mod value;

pub use self::cohorts::Cohorts;
pub use self::cut::{Cut, CutEvent, CutEvents, Cuts, Part, Record};
pub use self::durable::{DiskError, Durable, DurableError};
pub use self::locks::Locks;
pub use self::map::Map;
pub use self::primary_backup::{Client, Executed, HeldBy, PrimaryBackup, Service};
pub use self::replicated::{Machine, Replicated, UpdateError};
pub use self::requests::{RequestError, RequestId};
pub use self::succession::{Rank, Succession};
pub use self::token::Token;
pub use self::topics::{Publication, Publisher, Subscription, TOPIC_BYTES_MAX, Topics};
pub use self::value::Value;
