//! The node: puts the parts together.

use tokio::sync::watch;

use crate::config::Config;

/// Runs a node until `shutdown` turns true.
///
/// # Errors
/// The node cannot start, or fails.
pub async fn run(config: Config, shutdown: watch::Receiver<bool>) -> anyhow::Result<()> {
    drop(shutdown);
    anyhow::bail!("node {}: the data plane is not part of this build yet", config.node.name)
}
