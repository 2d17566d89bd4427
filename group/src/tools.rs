//! Tools over groups: what programs would else write again and again.
//!
//! [`Replicated`] keeps a deterministic [`Machine`] at every member: updates by abcast, reads local, state transfer to joiners.
//! [`Map`], [`Value`], [`Locks`] and [`Token`] are machines. [`Succession`] tells who leads and who comes next; a [`Rank`] also
//! tells which part of a piece of work is a member's own.

mod locks;
mod map;
mod replicated;
mod sharing;
mod succession;
mod token;
mod value;

pub use self::locks::Locks;
pub use self::map::Map;
pub use self::replicated::{Machine, Replicated, UpdateError};
pub use self::succession::{Rank, Succession};
pub use self::token::Token;
pub use self::value::Value;
