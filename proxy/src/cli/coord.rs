//! `unbroken coord`: a coordinator server alone.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tracing::{info, warn};

use super::shutdown;
use crate::config::CoordinatorConfig;

/// Runs a coordinator server alone, without a group member or a proxy
///
/// Speaks the ZooKeeper client protocol. Reads [node], [coord] and [admin] of the file; [group] and
/// [[service]] may be there and are not looked at. SIGTERM or SIGINT stops it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  unbroken coord -c /etc/unbroken/coord.toml")]
pub struct CoordArgs {
    /// Configuration of this server
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) fn run(args: &CoordArgs) -> anyhow::Result<ExitCode> {
    let config = CoordinatorConfig::load(&args.config)?;
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the server's threads")?;
    runtime.block_on(serve(config))?;
    info!("stopped");
    Ok(ExitCode::SUCCESS)
}

async fn serve(config: CoordinatorConfig) -> anyhow::Result<()> {
    let _shutdown = shutdown::on_signal()?;
    anyhow::bail!(
        "coordinator {}: the server is not part of this build yet",
        config.node.name
    )
}
