//! How certain it is that a session lives, by the local clock.

use tokio::sync::watch;

use super::LostReason;
use crate::client::{Client, ClientError, Lease, SessionState, Standing};

/// What is known here about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// It lives, by the local clock.
    Alive {
        /// Whether a server holds it at the moment.
        connected: bool,
    },
    /// It is over, or may be.
    Over(LostReason),
}

/// One session, which the client may have replaced by another since.
#[derive(Clone, Debug)]
pub(crate) struct SessionView {
    lease: Lease,
    state: watch::Receiver<SessionState>,
}

impl SessionView {
    /// The session with this id, as the owner of an ephemeral znode says it. Returns when it is
    /// certain that it lives, or does no more.
    pub(crate) async fn new(client: &Client, id: i64) -> Self {
        let lease = client.lease_of(id);
        lease.certain().await;
        Self {
            lease,
            state: client.state(),
        }
    }

    /// What is known at this moment.
    pub(crate) fn look(&self) -> Certainty {
        let state = *self.state.borrow();
        match self.lease.standing() {
            Standing::Certain { .. } => Certainty::Alive {
                connected: matches!(state, SessionState::Connected { .. }),
            },
            Standing::Uncertain => Certainty::Over(LostReason::Deadline),
            Standing::Gone => Certainty::Over(match state {
                SessionState::Closed | SessionState::AuthFailed => LostReason::Closed,
                _ => LostReason::SessionExpired,
            }),
        }
    }

    /// Returns when there may be something new to look at.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            // Err: the client's task has ended. The lease shows it.
            Ok(()) = self.state.changed() => {}
            _ = self.lease.uncertain() => {}
        }
    }
}

/// The client's session. Waits for a connection.
///
/// # Errors
/// [`ClientError::SessionExpired`], [`ClientError::Closed`] where there is no session any more.
pub(crate) async fn current(client: &Client) -> Result<i64, ClientError> {
    let mut state = client.state();
    loop {
        match *state.borrow_and_update() {
            SessionState::Connected { session_id } => return Ok(session_id),
            SessionState::Closed | SessionState::AuthFailed => return Err(ClientError::Closed),
            SessionState::Expired
            | SessionState::Disconnected
            | SessionState::ConnectedReadOnly { .. } => {}
        }
        // Where the client renews no session, nothing follows an expired one.
        if state.changed().await.is_err() {
            return Err(ClientError::SessionExpired);
        }
    }
}

/// Whether the client's session is the one with this id. Waits for a connection.
///
/// # Errors
/// As [`current`].
pub(crate) async fn is_current(client: &Client, id: i64) -> Result<bool, ClientError> {
    Ok(current(client).await? == id)
}

/// Whether a mark that `session` would have left, and that was looked for just now in vain, proves
/// that nothing was done. It does not where the session is over: the mark went with it.
///
/// # Errors
/// [`ClientError::SessionExpired`] where it does not; else as [`current`].
pub(crate) async fn proves(client: &Client, session: i64) -> Result<(), ClientError> {
    if is_current(client, session).await? {
        Ok(())
    } else {
        Err(ClientError::SessionExpired)
    }
}
