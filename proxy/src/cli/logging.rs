//! Logs: to standard error, as text for people or JSON for machines.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LoggingArgs {
    /// What is logged: error, warn, info, debug, trace, or a filter as in
    /// "info,unbroken_group=debug" [default: RUST_LOG, else info for node and coord, else warn]
    #[arg(long = "log", value_name = "LEVEL", global = true, display_order = 100)]
    level: Option<String>,
    /// How logs are written to standard error
    #[arg(long, value_name = "FORMAT", global = true, value_enum, default_value_t = LogFormat::Text, display_order = 101)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// Installs the process's logger; a `service` logs what it does, other commands what goes wrong.
pub(super) fn init(args: &LoggingArgs, service: bool) -> anyhow::Result<()> {
    let filter = match &args.level {
        Some(level) => EnvFilter::try_new(level)
            .with_context(|| format!("--log {level}: not a level or filter"))?,
        None => EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new(if service { "info" } else { "warn" })),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let installed = match args.log_format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    // A host process that has a logger already keeps it.
    drop(installed);
    Ok(())
}
