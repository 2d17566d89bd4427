//! Graceful stop: SIGTERM or SIGINT turns a watch true; a second one ends the process at once.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// What a process ended by the second signal says: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// A receiver that turns true when the process is asked to stop. To be called inside a runtime.
pub(super) fn on_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let mut terminate =
        signal(SignalKind::terminate()).context("installing the handler of SIGTERM")?;
    let mut interrupt =
        signal(SignalKind::interrupt()).context("installing the handler of SIGINT")?;
    let (stop, shutdown) = watch::channel(false);
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let name = next().await;
        info!(signal = name, "stopping");
        stop.send_replace(true);
        let name = next().await;
        warn!(signal = name, "asked twice: ending at once");
        std::process::exit(EXIT_INTERRUPTED);
    });
    Ok(shutdown)
}
