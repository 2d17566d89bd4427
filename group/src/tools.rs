//! Tools over groups: what programs would else write again and again.
//!
//! [`Replicated`] keeps a deterministic [`Machine`] at every member: updates by abcast, reads local, state transfer to joiners.
//! [`Map`] and [`Locks`] are machines.

mod locks;
mod map;
mod replicated;

pub use self::locks::Locks;
pub use self::map::Map;
pub use self::replicated::{Machine, Replicated, UpdateError};
