//! `unbroken node`: a replica.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tracing::{info, warn};

use super::shutdown;
use crate::config::Config;

/// Runs a node: coordinator, group member and proxy
///
/// Stays in the foreground. SIGTERM or SIGINT stops it gracefully: a leader hands over first.
/// A second signal ends it at once.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  unbroken node -c /etc/unbroken/node.toml --log info")]
pub struct NodeArgs {
    /// Configuration of this node
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

/// The control plane's threads: coordinator and admin page. The data plane has its own.
const WORKER_THREADS: usize = 2;

pub(super) fn run(args: &NodeArgs) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .context("starting the control plane's threads")?;
    runtime.block_on(async {
        let shutdown = shutdown::on_signal()?;
        info!(
            node = %config.node.name,
            version = env!("CARGO_PKG_VERSION"),
            key = %config.node.key.fingerprint(),
            "starting"
        );
        crate::node::run(config, shutdown).await
    })?;
    info!("stopped");
    Ok(ExitCode::SUCCESS)
}
