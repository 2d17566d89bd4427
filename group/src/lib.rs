//! Process groups with virtual synchrony: views agreed through a coordinator's znode, one sender that numbers events,
//! stability by `k` acknowledgements, leases, and state transfer to joiners.
//!
//! ```text
//!                 multicast          Deliver (backups)
//!   leader's node ---------> Core --------------------> backup's node
//!                              |  Stable(n): k backups hold all events up to n
//!                              |
//!         wedge, copy to the cut, wait for the old lease, compare-and-set, install
//! ```
//!
//! [`Core`] does no I/O and reads no clock: it is handed the time, datagrams, the coordinator's answers and news of the
//! control connections, and hands back [`Output`]s to execute in order. The rules it keeps (R2 in ARCHITECTURE.md):
//!
//! - A member that promised to leave a view (*wedged*) acknowledges, answers and delivers nothing more in it.
//! - Every event that was ever stable is at or below the cut of every later view of its generation.
//! - Members that install a view have delivered exactly the events up to its cut.
//! - Two leaders never may emit at one moment, as long as clocks run at rates within a tenth of each other.
//!
//! ```
//! use unbroken_group::{Command, Config, Core, Instant, MemberId, Output};
//!
//! let me = MemberId::new("r1", 0x1234);
//! let mut core = Core::new(Config::new(1, me, vec!["r1".into()], 42), 7, Instant::from_micros(0));
//! core.handle_command(Instant::from_micros(1), Command::Join).unwrap();
//! assert!(matches!(core.poll_output(), Some(Output::ReadView)));
//! ```

mod config;
mod core;
mod detector;
pub mod driver;
pub mod dsm;
mod fbcast;
mod flush;
mod membership;
pub mod node;
mod output;
pub mod process;
mod receiving;
pub mod registry;
mod rng;
mod sending;
#[cfg(any(test, feature = "faults"))]
pub mod sim;
mod snapshot;
mod stability;
mod time;
pub mod tools;
mod transfer;
mod view;
mod wire;

pub use crate::core::Core;
#[cfg(any(test, feature = "faults"))]
pub use config::Fault;
pub use config::{Config, Limits, Resilience};
pub use output::{
    CasResult, Command, CommandError, ControlEvent, Counters, GroupStatus, Installed, Lag,
    MemberStatus, Notice, Output, ReadResult, RegistryReply, Role,
};
pub use snapshot::SnapshotError;
pub use time::Instant;
pub use view::{Joiner, MemberId, View, ViewDecodeError, ViewId};
