//! The thread that runs the core: one input after the other, then what it wants done.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use super::clients::Outbound;
use super::disk::Disk;
use super::environment::Environment;
use super::{ServerError, Status};
use crate::core::{Caller, ConnId, Core, Event, Output, PeerMessage};
use crate::time::Instant;
use crate::wire::FourLetterWord;

/// Inputs waiting for the core at most. Clients wait for room; what peers send beyond it is dropped
/// (and repeated by them).
const INPUTS_MAX: usize = 16_384;

/// Inputs taken between two looks at the outputs at most: they share one disk write.
const BATCH_MAX: usize = 256;

/// How old a [`Status`] may be.
const STATUS_EVERY: Duration = Duration::from_millis(20);

/// Something for the core.
pub(super) enum Input {
    Peer {
        from: u64,
        message: PeerMessage,
    },
    Unreachable(u64),
    PeerDied(u64),
    Connect {
        conn: ConnId,
        caller: Caller,
        outbound: Arc<Outbound>,
    },
    Frame {
        conn: ConnId,
        frame: Bytes,
    },
    Disconnect(ConnId),
    Word {
        word: FourLetterWord,
        answer: oneshot::Sender<String>,
    },
    Persisted(u64),
    Saved(u64),
    DiskFailed(std::io::Error),
    Transfer(Option<u64>),
    Stop,
}

/// The way to the core's thread.
#[derive(Debug, Clone)]
pub(super) struct InputSender(SyncSender<Input>);

impl InputSender {
    /// From a task: waits for room without blocking its thread. False if the core is gone.
    pub(super) async fn send(&self, mut input: Input) -> bool {
        loop {
            match self.0.try_send(input) {
                Ok(()) => return true,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) => {
                    input = back;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// Drops the input if there is no room.
    pub(super) fn try_send(&self, input: Input) {
        let _ = self.0.try_send(input);
    }

    /// From a thread of its own.
    pub(super) fn send_blocking(&self, input: Input) {
        let _ = self.0.send(input);
    }
}

pub(super) fn inputs() -> (InputSender, Receiver<Input>) {
    let (sender, receiver) = sync_channel(INPUTS_MAX);
    (InputSender(sender), receiver)
}

/// The clock of one server: time since its start.
#[derive(Clone, Copy)]
pub(super) struct Clock(std::time::Instant);

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the driver is where time comes from"
    )]
    pub(super) fn start() -> Self {
        Self(std::time::Instant::now())
    }

    pub(super) fn now(self) -> Instant {
        Instant::from_micros(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    #[expect(clippy::disallowed_methods, reason = "znodes show the time of day")]
    fn wall_ms() -> i64 {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }
}

/// The core with everything that carries out what it wants.
pub(super) struct Engine {
    pub(super) core: Core,
    pub(super) clock: Clock,
    pub(super) inputs: Receiver<Input>,
    pub(super) disk: Disk,
    pub(super) peers: BTreeMap<u64, mpsc::Sender<PeerMessage>>,
    pub(super) names: BTreeMap<u64, String>,
    pub(super) surroundings: Environment,
    /// Tasks of connections end when this is dropped.
    pub(super) _alive: watch::Sender<()>,
    /// Dropped last: who waits for the end then knows that the disk has been closed.
    pub(super) status: watch::Sender<Status>,
}

/// Ends with the engine.
pub(super) type Alive = watch::Receiver<()>;

/// Runs `work` until it ends or the engine does.
pub(super) async fn while_alive(mut alive: Alive, work: impl Future<Output = ()>) {
    tokio::select! {
        _ = alive.changed() => {}
        () = work => {}
    }
}

impl Engine {
    /// Runs until it is stopped or the disk fails.
    pub(super) fn run(mut self) -> Result<(), ServerError> {
        let mut conns: BTreeMap<ConnId, Arc<Outbound>> = BTreeMap::new();
        let mut next_status = self.clock.now();
        self.core.set_wall_clock(self.clock.now(), Clock::wall_ms());
        loop {
            let wake = self
                .core
                .poll_timeout()
                .unwrap_or(next_status)
                .min(next_status);
            let first = match self.inputs.recv_timeout(wake.since(self.clock.now())) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let more = std::iter::from_fn(|| self.inputs.try_recv().ok()).take(BATCH_MAX);
            let batch: Vec<Input> = first.into_iter().chain(more).collect();
            for input in batch {
                match input {
                    Input::Stop => return Ok(()),
                    Input::DiskFailed(error) => return Err(ServerError::Disk(error)),
                    input => self.take(input, &mut conns),
                }
            }
            self.core.handle_timeout(self.clock.now());
            let mut changed = false;
            while let Some(output) = self.core.poll_output() {
                changed |= self.carry_out(output, &mut conns);
            }
            if changed || self.clock.now() >= next_status {
                next_status = self.clock.now() + STATUS_EVERY;
                self.core.set_wall_clock(self.clock.now(), Clock::wall_ms());
                let status = self.core.status();
                self.status.send_if_modified(|old| {
                    let new = *old != status;
                    *old = status;
                    new
                });
            }
        }
    }

    fn take(&mut self, input: Input, conns: &mut BTreeMap<ConnId, Arc<Outbound>>) {
        let now = self.clock.now();
        match input {
            Input::Peer { from, message } => self.core.handle_peer(now, from, message),
            Input::Unreachable(peer) => self.core.handle_unreachable(now, peer),
            Input::PeerDied(peer) => self.core.handle_peer_died(now, peer),
            Input::Connect {
                conn,
                caller,
                outbound,
            } => {
                conns.insert(conn, outbound);
                self.core.handle_connect(now, conn, caller);
            }
            Input::Frame { conn, frame } => self.core.handle_frame(now, conn, &frame),
            Input::Disconnect(conn) => {
                conns.remove(&conn);
                self.core.handle_disconnect(now, conn);
            }
            Input::Word { word, answer } => {
                // Who asked may have gone.
                let surroundings = self.surroundings.now();
                let _ = answer.send(self.core.four_letter_word(word, &surroundings));
            }
            Input::Persisted(token) => self.core.handle_persisted(now, token),
            Input::Saved(index) => self.core.handle_saved(now, index),
            Input::Transfer(to) => self.core.handle_transfer(now, to),
            Input::Stop | Input::DiskFailed(_) => unreachable!("the loop ends at these"),
        }
    }

    /// True if the status should be looked at.
    fn carry_out(&mut self, output: Output, conns: &mut BTreeMap<ConnId, Arc<Outbound>>) -> bool {
        match output {
            Output::Persist { token, write } => self.disk.write(token, write),
            Output::SaveSnapshot(image) => self.disk.save(image),
            Output::Send { to, message } => {
                let full = self
                    .peers
                    .get(&to)
                    .is_some_and(|peer| peer.try_send(message).is_err());
                if full {
                    self.core.handle_unreachable(self.clock.now(), to);
                }
            }
            Output::Reply { conn, frame } => {
                if let Some(outbound) = conns.get(&conn) {
                    outbound.answered();
                    self.send(conn, frame, conns);
                }
            }
            Output::Notify { conn, frame } => self.send(conn, frame, conns),
            Output::Close { conn, reason } => {
                tracing::debug!(conn = conn.0, ?reason, "client connection closed");
                if let Some(outbound) = conns.remove(&conn) {
                    outbound.close();
                }
            }
            Output::Event(Event::Leader { leader, term }) => {
                let leader = leader.and_then(|id| self.names.get(&id));
                tracing::info!(leader = leader.map_or("none", |name| name), term, "leader");
                return true;
            }
            Output::Event(Event::SessionExpired(session)) => {
                tracing::info!(%session, "session expired");
            }
        }
        false
    }

    fn send(&mut self, conn: ConnId, frame: Bytes, conns: &mut BTreeMap<ConnId, Arc<Outbound>>) {
        if let Some(outbound) = conns.get(&conn)
            && !outbound.send(frame)
        {
            tracing::warn!(conn = conn.0, "client does not read: connection closed");
            outbound.close();
            conns.remove(&conn);
            self.core.handle_disconnect(self.clock.now(), conn);
        }
    }
}
