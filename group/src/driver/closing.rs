//! In which order a killed process lets go of its sockets.
//!
//! The kernel closes the files of a process that was killed from the highest descriptor down, and the close of a packet
//! socket waits for a grace period of RCU: 15 to 35 ms (measured). A listener that was opened early, as a node's is,
//! would go on accepting meanwhile, and the proof of death (R2) be that late. So the control connections are given
//! descriptors at the upper end: first the listener is gone, then the connections, then everything else.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, getrlimit};

/// Descriptors above this are not used: the kernel's table of them grows to the highest.
const HIGHEST: u64 = 1 << 16;

/// What goes first has the smaller distance from the upper end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    /// Before all others.
    First,
    /// Right after those.
    Second,
}

impl Closing {
    fn distance(self) -> u64 {
        match self {
            Self::First => 64,
            Self::Second => 256,
        }
    }

    /// Gives a socket a descriptor that is closed in this place. Where there is none to be had it stays as it is, which
    /// costs time and nothing else.
    pub(super) fn place<S: AsFd + From<OwnedFd>>(self, socket: S) -> S {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(HIGHEST);
        let from = limit.min(HIGHEST).saturating_sub(self.distance());
        let from = RawFd::try_from(from).expect("not above the highest");
        match fcntl_dupfd_cloexec(&socket, from) {
            Ok(moved) => S::from(moved),
            Err(_) => socket,
        }
    }
}
