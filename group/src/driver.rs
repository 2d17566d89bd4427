//! The only I/O of this crate: datagrams and control connections on a node's group address.
//!
//! Runtime-free and non-blocking: the owner of an event loop registers the [`Driver`], says when it is ready, and
//! lends it time. One driver serves all groups of a node; each datagram names its group and lane.
//!
//! Datagrams are sealed (AES-256-GCM) under a key of their own sender's life and epoch: HKDF(group key, instance, name,
//! incarnation, view id), with a counter as nonce and the header as associated data. Whoever has the group's key is a
//! member; whoever has it not can neither read nor be heard, and what it sends is counted and dropped.
//!
//! The epoch changes with each view, so that no key outlives one; receivers follow without agreement, because the header
//! names it. It is no forward secrecy: all keys can be derived from the group's.

mod closing;
mod control;
mod header;
mod inbound;
mod outbound;
mod pacing;
mod seal;
#[cfg(test)]
mod tests;
mod udp;
mod window;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use mio::{Registry, Token};
use thiserror::Error;

use crate::time::Instant;
use crate::view::MemberId;

pub use self::control::{CONTROL_TOKENS, Control, ControlInput};
pub use self::inbound::Counters;
pub use self::pacing::Pacing;
pub use self::seal::GroupKey;
use self::udp::UDP_TOKENS;
pub use self::udp::{Multicast, Receiver, SendCounters, Sender};

/// How many mio tokens a driver uses, from the base it is given.
pub const TOKENS: usize = UDP_TOKENS + CONTROL_TOKENS;

/// What a driver does beyond the ordinary.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Datagrams for several members go out once. `None`: once to each.
    pub multicast: Option<Multicast>,
    /// Datagrams go no faster than this to one destination. `None`: as fast as they are given.
    pub pacing: Option<Pacing>,
}

/// Why a driver cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DriverError {
    /// This node is not among the members.
    #[error("{0:?} is not one of the configured members")]
    NotAMember(String),
    /// The address cannot be had.
    #[error("cannot listen for group members on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Multicast cannot be had.
    #[error("cannot use multicast {group} by interface {interface}")]
    Multicast {
        /// The multicast address.
        group: SocketAddrV4,
        /// By which interface.
        interface: Ipv4Addr,
        /// Why not.
        source: io::Error,
    },
}

/// The sockets of one node. Its halves are borrowed apart, so that what is received can be answered at once.
pub struct Driver {
    /// Datagrams in.
    pub receiver: Receiver,
    /// Datagrams out.
    pub sender: Sender,
    /// Control connections: who is there, who died.
    pub control: Control,
    base: usize,
}

impl Driver {
    /// Opens the sockets of the member `me` of `members` (name and group address, the same on every node).
    ///
    /// # Errors
    /// [`DriverError`]; nothing stays open then.
    pub fn open(
        me: &str,
        members: &BTreeMap<String, SocketAddr>,
        key: &[u8; 32],
        now: Instant,
    ) -> Result<Self, DriverError> {
        Self::open_with(me, members, key, now, &Options::default())
    }

    /// Opens the sockets, with options.
    ///
    /// # Errors
    /// [`DriverError`]; nothing stays open then.
    pub fn open_with(
        me: &str,
        members: &BTreeMap<String, SocketAddr>,
        key: &[u8; 32],
        now: Instant,
        options: &Options,
    ) -> Result<Self, DriverError> {
        let address = *members
            .get(me)
            .ok_or_else(|| DriverError::NotAMember(me.to_owned()))?;
        let listen = |source| DriverError::Listen { address, source };
        let key = GroupKey::new(key);
        let (receiver, sender) = udp::open(me, members, &key, options)?;
        let control = Control::open(me, members, &key, now).map_err(listen)?;
        Ok(Self {
            receiver,
            sender,
            control,
            base: 0,
        })
    }

    /// Registers every socket under [`TOKENS`] tokens from `base` on.
    ///
    /// # Errors
    /// The event loop refused.
    pub fn register(&mut self, registry: &Registry, base: usize) -> io::Result<()> {
        self.base = base;
        self.receiver.register(registry, base)?;
        self.control.register(registry, base + UDP_TOKENS)
    }

    /// A socket of the driver became ready.
    pub fn handle_ready(&mut self, token: Token) {
        match token.0.checked_sub(self.base) {
            Some(n) if n < UDP_TOKENS => self.receiver.handle_readable(n),
            Some(n) => self.control.handle_ready(n - UDP_TOKENS),
            None => {}
        }
    }

    /// This node begins a life in a group: its datagrams are sealed as this incarnation's from now on, and peers learn
    /// of it by their control connections. (Where the halves are lent out, do the same at each of them.)
    pub fn set_member(&mut self, group: u32, me: MemberId) {
        self.control.set_incarnation(group, me.incarnation);
        self.sender.set_member(group, me);
    }

    /// The instance of a group is known: datagrams can be sealed and opened.
    pub fn set_instance(&mut self, group: u32, instance: u128) {
        self.receiver.set_instance(group, instance);
        self.sender.set_instance(group, instance);
    }

    /// A view of a group is installed: this member's datagrams are sealed in its epoch from now on.
    pub fn set_epoch(&mut self, group: u32, epoch: u64) {
        self.sender.set_epoch(group, epoch);
    }

    /// When [`Control::poll_input`] or [`Sender::handle_timeout`] wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = [self.control.poll_timeout(), self.sender.poll_timeout()];
        due.into_iter().flatten().min()
    }
}
