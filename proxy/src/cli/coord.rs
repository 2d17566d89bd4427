//! `unbroken coord`: a coordinator server alone.

mod member;
mod recover;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use tracing::{info, warn};
use unbroken_coord::driver;

use super::shutdown;
use crate::admin::{self, Admin};
use crate::config::CoordinatorConfig;
use crate::metrics::NodeMetrics;
use crate::status::{Board, CoordinatorStatus};

/// Runs a coordinator server alone, without a group member or a proxy
///
/// Speaks the ZooKeeper client protocol. Reads [node], [coord] and [admin] of the file; [group] and
/// [[service]] may be there and are not looked at. SIGTERM or SIGINT stops it.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  \
        unbroken coord -c /etc/unbroken/coord.toml\n  \
        unbroken coord member list\n  \
        unbroken coord member add -c /etc/unbroken/coord.toml c4 --peer 10.98.0.14:2888"
)]
pub struct CoordArgs {
    /// Configuration of this server
    #[arg(short, long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<CoordCommand>,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, at the start")]
enum CoordCommand {
    Member(member::MemberArgs),
    Recover(recover::RecoverArgs),
}

impl CoordArgs {
    /// Whether this is a server and no command that ends by itself.
    pub(super) fn serves(&self) -> bool {
        self.command.is_none()
    }
}

pub(super) fn run(args: &CoordArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        Some(CoordCommand::Member(args)) => return member::run(args),
        Some(CoordCommand::Recover(args)) => return recover::run(args),
        None => {}
    }
    let file = args
        .config
        .as_ref()
        .expect("required where there is no command");
    let config = CoordinatorConfig::load(file)?;
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
    let mut shutdown = shutdown::on_signal()?;
    // First of all: a page that cannot be served must not cost the ensemble a server later.
    let listener = admin::bind(config.admin.listen).await?;
    let board = Board::new(&config.node.name, Vec::new());
    let metrics = Arc::new(NodeMetrics::new(&config.node.name));
    let CoordinatorConfig { node, coord, .. } = &config;
    let server = driver::start(coord.server(&node.name, node.data_dir.clone(), &node.key))
        .await
        .context("starting the coordinator")?;
    info!(name = %config.node.name, clients = %server.client_address(), "coordinator started");

    metrics.show_coordinator(server.meter());
    let page = Admin {
        board: board.clone(),
        metrics,
        operator: None,
    };
    let mut admin = std::pin::pin!(admin::serve(listener, page, shutdown.clone()));
    let mut status = server.watch_status();
    let result = loop {
        let seen = CoordinatorStatus::from(&*status.borrow_and_update());
        board.update(|status| status.coordinator = seen);
        tokio::select! {
            error = server.failed() => break Err(anyhow::Error::new(error).context("the coordinator stopped")),
            result = &mut admin => break result,
            _ = shutdown.wait_for(|stop| *stop) => break Ok(()),
            _ = status.changed() => {}
        }
    };
    board.update(|status| status.stopping = true);
    server.shutdown().await;
    result
}
