//! A node: one process's thread for all its groups, and the handles that programs hold.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use unbroken_group::node::{Event, Group, Node, NodeConfig};
//! use unbroken_group::registry::MemoryRegistry;
//!
//! let members = [("r1".to_owned(), "127.0.0.1:7400".parse()?)].into();
//! let node = Node::start(NodeConfig::new("r1", members, [7; 32]), MemoryRegistry::default())?;
//! let (group, mut events) = Group::join(&node, "chat").await?;
//! group.abcast("hello").await?;
//! while let Some(event) = events.next().await {
//!     match event {
//!         Event::Message(m) => println!("{}: {:?}", m.from(), m.body()),
//!         Event::StateWanted(wanted) => wanted.give(vec![]),
//!         Event::View(view) => println!("now {:?}", view.members),
//!         Event::Init | Event::State(_) => {}
//!         Event::Left { .. } => break,
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! **Nothing that a program does can stop the delivery to others.** The node's thread calls no code of the program and waits
//! for nothing it does: events go into a queue. A program that does not take them makes its node take no more messages, which
//! pushes back on the senders, and is made to leave when that lasts (`slow_after`).
//!
//! What a member itself sends to its group comes back to it outside that bound: a program that sends and takes no events fills
//! its own queue. Whoever sends must take.

mod bundle;
mod events;
mod group;
mod handler;
mod room;
pub(crate) mod tasks;
mod worker;

pub use self::events::{Event, Events, Received, StateWanted};
pub use self::group::{CallError, Group, JoinError, Progress, Replies, SendError};
pub use self::handler::Handler;
use self::room::{Place, Room, Unplaced};
pub(crate) use self::worker::Seen;
use self::worker::{Input, Worker};

use crate::config::Config;
use crate::driver::DriverError;
use crate::output::GroupStatus;
use crate::registry::Registry;
use crate::time::Instant;
use mio::Waker;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::{oneshot, watch};

/// What a node is told before it starts.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This node's name among `members`.
    pub name: String,
    /// Names and group addresses of all nodes, the same everywhere.
    pub members: BTreeMap<String, SocketAddr>,
    /// 32 secret bytes, the same everywhere.
    pub key: [u8; 32],
    /// The number of the site group: nodes of different sites do not hear each other.
    pub site: u32,
    /// IP multicast and pacing of datagrams.
    pub driver: crate::driver::Options,
    /// How often the site leader asks for a sign of life; 10 ms by default.
    pub heartbeat: Duration,
    /// How long an answer lets the site leader act; 30 ms by default, below `suspect_after`.
    pub lease: Duration,
    /// Silence after which a node is suspected; 50 ms by default.
    pub suspect_after: Duration,
    /// Largest body of a datagram, in bytes; 1360 by default, which fits an Ethernet frame.
    pub datagram_bytes_max: usize,
    /// Bytes of events that a program may leave in its queue before its node takes no more; 16 MiB by default.
    pub queue_bytes_max: u64,
    /// A member that holds up its group for this long is made to leave; 5 s by default, `None`: never.
    pub slow_after: Option<Duration>,
    /// The node's thread looks at its sockets for this long after the last that came before it sleeps: no wake-up delays
    /// what comes meanwhile, and a core has no rest. Zero by default.
    pub spin: Duration,
}

impl NodeConfig {
    /// The defaults.
    pub fn new(name: &str, members: BTreeMap<String, SocketAddr>, key: [u8; 32]) -> Self {
        Self {
            name: name.to_owned(),
            members,
            key,
            site: 1,
            driver: crate::driver::Options::default(),
            heartbeat: Duration::from_millis(10),
            lease: Duration::from_millis(30),
            suspect_after: Duration::from_millis(50),
            datagram_bytes_max: 1360,
            queue_bytes_max: 16 << 20,
            slow_after: Some(Duration::from_secs(5)),
            spin: Duration::ZERO,
        }
    }

    fn core(&self, me: crate::MemberId, instance: u128) -> Config {
        let members = self.members.keys().cloned().collect();
        let mut config = Config::new(self.site, me, members, instance);
        config.heartbeat = self.heartbeat;
        config.lease = self.lease;
        config.suspect_after = self.suspect_after;
        config.limits.datagram_bytes_max = self.datagram_bytes_max;
        config
    }
}

/// Why a node cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// Its sockets cannot be opened.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The event loop or its thread cannot be made.
    #[error("cannot start the node's thread")]
    Thread(#[from] io::Error),
    /// A setting cannot work.
    #[error("{0}")]
    Config(&'static str),
}

/// One process's node. Dropped, it goes away at once, as if it had been killed; see [`Node::stop`].
pub struct Node {
    pub(crate) inputs: Inputs,
    status: Arc<Mutex<Option<GroupStatus>>>,
    ended: watch::Receiver<bool>,
}

/// The way to the node's thread.
#[derive(Clone)]
pub(crate) struct Inputs(Arc<Way>);

struct Way {
    sender: mpsc::Sender<Input>,
    waker: Waker,
    /// The thread sleeps, or is about to.
    asleep: AtomicBool,
}

impl Inputs {
    fn new(sender: mpsc::Sender<Input>, waker: Waker) -> Self {
        let asleep = AtomicBool::new(false);
        Self(Arc::new(Way {
            sender,
            waker,
            asleep,
        }))
    }

    /// `false` when the node is gone.
    pub(crate) fn put(&self, input: Input) -> bool {
        let there = self.0.sender.send(input).is_ok();
        // A system call only for a thread that sleeps. Either this thread sees that it does, or it sees the input: each
        // writes, passes a fence, and reads what the other has written.
        fence(Ordering::SeqCst);
        let asleep = &self.0.asleep;
        if asleep.load(Ordering::Relaxed) && asleep.swap(false, Ordering::Relaxed) {
            // A waker fails only when its loop is gone, and then the send has failed too.
            return there && self.0.waker.wake().is_ok();
        }
        there
    }

    /// The thread goes to sleep, unless it finds an input after this.
    pub(super) fn about_to_sleep(&self) {
        self.0.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The thread does not sleep any more.
    pub(super) fn awake(&self) {
        self.0.asleep.store(false, Ordering::Relaxed);
    }
}

impl Node {
    /// Opens the sockets and starts the thread.
    ///
    /// # Errors
    /// [`StartError`]; nothing stays open then.
    pub fn start(config: NodeConfig, registry: impl Registry) -> Result<Self, StartError> {
        if config.lease >= config.suspect_after {
            return Err(StartError::Config("lease must be below suspect_after"));
        }
        if !(256..=65_000).contains(&config.datagram_bytes_max) {
            return Err(StartError::Config(
                "datagram_bytes_max must be from 256 to 65000",
            ));
        }
        let (sender, receiver) = mpsc::channel();
        let (end, ended) = watch::channel(false);
        let status = Arc::default();
        let worker = Worker::open(config, Box::new(registry), receiver, Arc::clone(&status))?;
        let inputs = Inputs::new(sender, worker.waker()?);
        worker.spawn(inputs.clone(), end)?;
        Ok(Self {
            inputs,
            status,
            ended,
        })
    }

    /// The site group as it was a moment ago; `None` before the first moment.
    pub fn status(&self) -> Option<GroupStatus> {
        let status = self.status.lock();
        status
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Leaves: other nodes hear of it, and need not suspect anybody.
    pub async fn stop(mut self) {
        let (done, gone) = oneshot::channel();
        if self.inputs.put(Input::Stop(done)) {
            let _ = gone.await;
        }
        let _ = self.ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.inputs.put(Input::End);
    }
}

/// The time by the clock that goes on while the machine sleeps.
fn now() -> Instant {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let micros = t.tv_sec * 1_000_000 + t.tv_nsec / 1000;
    Instant::from_micros(u64::try_from(micros).unwrap_or(0))
}
