//! How certain it is that a session lives, by the local clock.

use tokio::sync::watch;
use tokio::time::Instant;

use super::LostReason;
use crate::client::{Client, SessionState};

/// What is known here about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// It lives, at least until then.
    Alive {
        /// Whether a server holds it at the moment.
        connected: bool,
        /// No server lets it expire before this instant. `None`: not known while connected.
        until: Option<Instant>,
    },
    /// It is over, or may be.
    Over(LostReason),
}

/// One session, which the client may have replaced by another since.
#[derive(Clone, Debug)]
pub(crate) struct SessionView {
    id: i64,
    state: watch::Receiver<SessionState>,
}

impl SessionView {
    /// The session with this id, as the owner of an ephemeral znode says it.
    pub(crate) fn new(client: &Client, id: i64) -> Self {
        Self {
            id,
            state: client.state(),
        }
    }

    /// What is known at this moment.
    pub(crate) fn look(&self) -> Certainty {
        match *self.state.borrow() {
            SessionState::Connected { session_id } if session_id == self.id => Certainty::Alive {
                connected: true,
                until: None,
            },
            SessionState::Connected { .. } | SessionState::Expired => {
                Certainty::Over(LostReason::SessionExpired)
            }
            SessionState::Disconnected | SessionState::ConnectedReadOnly { .. } => {
                Certainty::Over(LostReason::Deadline)
            }
            SessionState::Closed | SessionState::AuthFailed => Certainty::Over(LostReason::Closed),
        }
    }

    /// Returns when there is something new to look at.
    pub(crate) async fn changed(&mut self) {
        // Err: the client's task has ended. Its last word stands, and is looked at by now.
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
