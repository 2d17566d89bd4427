//! One TCP connection as a replicable state machine, on smoltcp. Sans-IO.
//!
//! [`Stack`] is the leader's whole TCP for one floating address: packets of clients go in, events
//! come out, and what a client may see leaves only when the events it depends on are *stable*, that
//! is, held by enough backups. [`Replica`] is what a backup makes of the same events; when the leader
//! dies, [`Stack::take_over`] turns it into the next stack, and the clients notice nothing: same
//! address, same sequence numbers.
//!
//! ```text
//!            Stack (leader)                                    Replica (each backup)
//!  packets ──> handle_packet ──> Output::Replicate ── log ──────> apply
//!  server  ──> handle_server_bytes (gate: R1)          │          handle_server_bytes <── its server
//!              handle_stable <── held by k backups ────┘
//!              Output::Transmit ──> client                Stack::take_over(replica) ──> next leader
//! ```
//!
//! # Contract
//!
//! One mutation, then [`Stack::poll_output`] to `None`, in order; then the next. `now` never goes
//! back. Nothing here reads a clock, draws a random number, or does I/O: the same inputs give the same
//! outputs, byte for byte. A peer can cause neither an error nor a panic, and holds no more memory
//! than its window, a bounded number of handshakes, and one remembered tuple a connection.
//!
//! # Example
//!
//! ```
//! use unbroken_tcpstate::{Checksum, Config, EventNo, Instant, LinkAddr, Secrets, ServiceClock, Stack};
//!
//! let vip = "10.0.0.100".parse().unwrap();
//! let now = Instant::from_millis(0);
//! let clock = ServiceClock { at: now, value_us: 1 };
//! let mut stack = Stack::new(
//!     Config::new(vip, [80]),
//!     Secrets::new(0, &[7; 32]),
//!     now,
//!     clock,
//!     EventNo(1),
//! );
//! stack.handle_packet(now, b"not a packet", LinkAddr::default(), Checksum::Verify);
//! assert!(stack.poll_output().is_none());
//! assert_eq!(stack.counters().malformed, 1);
//! ```

mod adopt;
mod checksum;
mod closed;
mod config;
mod conn_state;
mod endpoint;
mod error;
mod event;
mod fault;
mod gate;
mod guard;
mod icmp;
mod mapped;
mod output;
mod receive;
mod recovery;
mod replica;
mod segment;
mod seq;
mod stack;
mod syn;
mod time;
mod timer;

pub use config::Config;
pub use conn_state::{ConnState, LinkAddr, Negotiated, Tuple};
pub use error::DecodeError;
pub use event::{
    ConnId, DATA_BYTES_MAX, Event, EventNo, HalfOpen, OUTPUT_MARKS_MAX, OutputMark, ResetBy,
};
#[cfg(feature = "faults")]
pub use fault::Fault;
pub use output::{Checksum, HEADROOM, Notice, Output, Packet};
pub use replica::{Image, Replica};
pub use seq::SeqNum;
pub use stack::{Counters, Stack};
pub use syn::Secrets;
pub use time::{Instant, ServiceClock};
