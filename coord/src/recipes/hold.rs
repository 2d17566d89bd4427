//! What is held for as long as a session lives.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, info};

use super::RecipeError;
use super::common::{Cleanup, Place, repeat};
use super::session::{Certainty, SessionView};
use crate::client::ClientError;
use crate::wire::MultiOp;

/// How certain it is that something is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// A server confirms the session.
    Held,
    /// No server holds the session at the moment. It is held all the same until the local deadline:
    /// this becomes [`Self::Held`] again, or [`Self::Lost`] by then.
    Uncertain,
    /// It is not held any more, or may not be. Final.
    Lost(LostReason),
    /// It was given back. Final.
    Released,
}

/// Why something is no longer held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LostReason {
    /// The session has expired.
    #[error("the session has expired")]
    SessionExpired,
    /// No server has answered for the session's timeout: it may have expired.
    #[error("no server has confirmed the session within its timeout")]
    Deadline,
    /// The client was closed.
    #[error("the client was closed")]
    Closed,
    /// Somebody else deleted the znode that stands for it.
    #[error("its znode was deleted by somebody else")]
    Removed,
}

/// Something that its session holds: a lock, a lease, a leadership, a place in a group.
///
/// It stands for ephemeral znodes, and is lost with them. [`Self::is_held`] looks at the clock
/// itself, so that it is right even in a process that was stopped for an hour and has just gone on;
/// between its answer and what is done upon it time may pass all the same. Where that matters, pass
/// [`Self::token`] along with every request to what is protected, and let that refuse smaller ones
/// than it has seen; or, where the protected thing is a znode, put [`Self::check`] into the same
/// multi.
///
/// The deadline is that of the session's [`Lease`](crate::client::Lease), which says how far it may be
/// trusted; [`HoldState::Lost`] comes at that moment by the clock, before a server says anything.
///
/// Dropped, it is given back in the background; [`Self::release`] waits for that.
#[derive(Debug)]
#[must_use = "what is dropped is given back"]
pub struct Hold {
    shared: Arc<Shared>,
    paths: Vec<String>,
    token: i64,
    monitor: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<HoldState>,
    session: SessionView,
    /// Taken by the first who finds it lost, or gives it back.
    cleanup: Mutex<Option<Cleanup>>,
}

impl Shared {
    /// Looks at the clock and the session, and says whether it is held.
    fn check(&self) -> Result<(), LostReason> {
        match *self.state.borrow() {
            HoldState::Lost(reason) => return Err(reason),
            HoldState::Released => return Err(LostReason::Closed),
            HoldState::Held | HoldState::Uncertain => {}
        }
        match self.session.look() {
            Certainty::Over(reason) => Err(self.lose(reason)),
            Certainty::Alive { connected } => {
                self.connected(connected);
                Ok(())
            }
        }
    }

    fn connected(&self, connected: bool) {
        let now = if connected {
            HoldState::Held
        } else {
            HoldState::Uncertain
        };
        self.state.send_if_modified(|state| {
            let changed = matches!(state, HoldState::Held | HoldState::Uncertain) && *state != now;
            if changed {
                *state = now;
            }
            changed
        });
    }

    /// Gives the reason that stands: what is lost stays lost for the first one.
    fn lose(&self, reason: LostReason) -> LostReason {
        let mut stands = reason;
        let first = self.state.send_if_modified(|state| match *state {
            HoldState::Held | HoldState::Uncertain => {
                *state = HoldState::Lost(reason);
                true
            }
            HoldState::Lost(earlier) => {
                stands = earlier;
                false
            }
            HoldState::Released => false,
        });
        if first {
            info!(%reason, "hold lost");
            let cleanup = self.take_cleanup();
            match reason {
                // The session may live on after all, and others wait for the znodes to go; of
                // several znodes, all must go with the first.
                LostReason::Deadline | LostReason::Removed | LostReason::Closed => drop(cleanup),
                LostReason::SessionExpired => cleanup.into_iter().for_each(Cleanup::forget),
            }
        }
        stands
    }

    fn take_cleanup(&self) -> Option<Cleanup> {
        self.cleanup
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Hold {
    /// Of the ephemeral znodes that `cleanup` deletes, all owned by the session `owner`. `nodes` are
    /// their paths and czxids; the first one is whose existence [`Self::check`] asserts.
    ///
    /// # Panics
    /// Without a node, or outside a tokio runtime.
    /// # Errors
    /// The session may be over already.
    pub(crate) async fn new(
        place: &Place,
        owner: i64,
        nodes: Vec<(String, i64)>,
        token: i64,
        cleanup: Cleanup,
    ) -> Result<Self, LostReason> {
        assert!(!nodes.is_empty(), "a hold stands for a znode");
        let paths: Vec<String> = nodes.iter().map(|(path, _)| path.clone()).collect();
        let shared = Arc::new(Shared {
            state: watch::Sender::new(HoldState::Held),
            session: SessionView::new(&place.client, owner).await,
            cleanup: Mutex::new(Some(cleanup)),
        });
        let task = monitor(place.clone(), shared.clone(), nodes);
        let hold = Self {
            shared,
            paths,
            token,
            monitor: tokio::spawn(task).abort_handle(),
        };
        hold.check_held()?;
        Ok(hold)
    }

    /// Whether it is held at this moment, for certain. Once false, it stays so.
    pub fn is_held(&self) -> bool {
        self.shared.check().is_ok()
    }

    /// As [`Self::is_held`], with the reason.
    ///
    /// # Errors
    /// Why it is no longer held.
    pub fn check_held(&self) -> Result<(), LostReason> {
        self.shared.check()
    }

    /// How it is, now and from now on. Short states may be skipped.
    pub fn state(&self) -> watch::Receiver<HoldState> {
        // What the clock says is no older than the call.
        let _: Result<(), LostReason> = self.shared.check();
        self.shared.state.subscribe()
    }

    /// Returns when it is lost.
    pub async fn lost(&self) -> LostReason {
        let mut state = self.state();
        loop {
            if let HoldState::Lost(reason) = *state.borrow_and_update() {
                return reason;
            }
            // The sender is in `self`.
            let _: Result<(), _> = state.changed().await;
        }
    }

    /// Runs `work` as long as it is held. The work is never polled after that, and is dropped when
    /// this returns.
    ///
    /// # Errors
    /// Why it is no longer held; the work was cancelled.
    pub async fn run<F: Future>(&self, work: F) -> Result<F::Output, LostReason> {
        let (mut work, mut lost) = (pin!(work), pin!(self.lost()));
        poll_fn(|cx| {
            // In this order: a process that slept looks at the clock before it goes on.
            self.shared.check()?;
            if let Poll::Ready(reason) = lost.as_mut().poll(cx) {
                return Poll::Ready(Err(reason));
            }
            work.as_mut().poll(cx).map(Ok)
        })
        .await
    }

    /// The fencing token: a zxid. Who holds the same thing later has a larger one.
    pub fn token(&self) -> i64 {
        self.token
    }

    /// The znode that stands for it.
    pub fn path(&self) -> &str {
        &self.paths[0]
    }

    /// An operation for a [`multi`](crate::client::Client::multi), which fails with
    /// [`NoNode`](crate::wire::ErrorCode::NoNode) unless this is still held when the multi is done,
    /// whatever the clocks say.
    pub fn check(&self) -> MultiOp {
        MultiOp::Check {
            path: self.path().to_owned(),
            version: -1,
        }
    }

    /// It is over, and its znodes are gone.
    pub(crate) fn forget(self) {
        self.monitor.abort();
        self.shared
            .take_cleanup()
            .into_iter()
            .for_each(Cleanup::forget);
    }

    /// Gives it back, and returns when it is free for the next. Where this is not waited for to its
    /// end, the background does it.
    ///
    /// # Errors
    /// [`RecipeError::Lost`] where it was lost before.
    pub async fn release(self) -> Result<(), RecipeError> {
        self.monitor.abort();
        self.shared.check()?;
        let Some(cleanup) = self.shared.take_cleanup() else {
            // Lost since the line above: the monitor may be in the middle of its last step.
            return Err(self.shared.lose(LostReason::Removed).into());
        };
        match cleanup.finish().await {
            Ok(deleted) if deleted >= self.paths.len() => {
                self.shared.state.send_replace(HoldState::Released);
                Ok(())
            }
            Ok(_) => Err(self.shared.lose(LostReason::Removed).into()),
            Err(ClientError::SessionExpired) => {
                Err(self.shared.lose(LostReason::SessionExpired).into())
            }
            Err(ClientError::Closed) => Err(self.shared.lose(LostReason::Closed).into()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.monitor.abort();
        drop(self.shared.take_cleanup());
        self.shared.state.send_if_modified(|state| {
            let held = matches!(state, HoldState::Held | HoldState::Uncertain);
            if held {
                *state = HoldState::Released;
            }
            held
        });
    }
}

/// Watches the session, the clock and the znodes until something is lost.
async fn monitor(place: Place, shared: Arc<Shared>, nodes: Vec<(String, i64)>) {
    let mut session = shared.session.clone();
    let mut removed: Vec<_> = nodes
        .into_iter()
        .map(|(path, czxid)| Box::pin(until_removed(&place, path, czxid)))
        .collect();
    loop {
        match session.look() {
            Certainty::Over(reason) => {
                shared.lose(reason);
                return;
            }
            Certainty::Alive { connected } => shared.connected(connected),
        }
        tokio::select! {
            () = session.changed() => {}
            () = any(&mut removed) => {
                shared.lose(LostReason::Removed);
                return;
            }
        }
    }
}

/// Returns when the server says that this very znode is gone. Never where the session ends first.
pub(crate) async fn until_removed(place: &Place, path: String, czxid: i64) {
    loop {
        match repeat(|| place.client.exists_and_watch(&path)).await {
            Ok((Some(stat), changed)) if stat.czxid == czxid => {
                if changed.await.is_err() {
                    break;
                }
            }
            Ok(_) => return,
            Err(error) => {
                debug!(%path, %error, "no longer watched");
                break;
            }
        }
    }
    std::future::pending().await
}

async fn any<F: Future<Output = ()>>(futures: &mut [Pin<Box<F>>]) {
    poll_fn(|cx| {
        for future in futures.iter_mut() {
            if future.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    })
    .await;
}
