//! `unbroken check`: is this configuration right?

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::config::{Config, CoordConfig, CoordinatorConfig, Resilience};

/// Checks a configuration file and says all that is wrong with it
///
/// Nothing is started and nothing is changed. Every problem is reported with its line, the key, the
/// value and what was expected; the exit code is then 64.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  unbroken check -c /etc/unbroken/node.toml")]
pub struct CheckArgs {
    /// Configuration to check
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Check it as the file of a coordinator alone (`unbroken coord`)
    #[arg(long)]
    coord: bool,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let (summary, warnings) = if args.coord {
        let config = CoordinatorConfig::load(&args.config)?;
        (coordinator_summary(&config), config.warnings)
    } else {
        let config = Config::load(&args.config)?;
        (node_summary(&config), config.warnings)
    };
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
    println!("{}: ok\n{summary}", args.config.display());
    Ok(ExitCode::SUCCESS)
}

fn coordinator_summary(config: &CoordinatorConfig) -> String {
    format!(
        "  node {}, key {}\n  coordinator for clients on {}, ensemble of {}\n  admin page on {}",
        config.node.name,
        config.node.key.fingerprint(),
        config.coord.client,
        config.coord.peers.len(),
        config.admin.listen
    )
}

fn node_summary(config: &Config) -> String {
    let mut lines = vec![format!(
        "  node {}, key {}",
        config.node.name,
        config.node.key.fingerprint()
    )];
    lines.push(match &config.coord {
        CoordConfig::Embedded(coord) => {
            format!(
                "  coordinator embedded, for clients on {}, ensemble of {}",
                coord.client,
                coord.peers.len()
            )
        }
        CoordConfig::External(coord) => {
            format!(
                "  coordinator external: {}{}",
                coord.servers.join(", "),
                coord.chroot
            )
        }
    });
    let members = config.group.members.len();
    let resilience = match config.group.resilience {
        Resilience::Majority => "majority",
        Resilience::All => "all",
        Resilience::Backups(_) => "a number",
    };
    lines.push(format!(
        "  group of {members}, events held by {} of the backups before their effects leave ({resilience})",
        config.group.resilience.k(members)
    ));
    lines.push(format!("  admin page on {}", config.admin.listen));
    for service in &config.services {
        let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
        lines.push(format!(
            "  service {}: {}/{} port {} on {}, served by {}",
            service.name,
            service.vip,
            service.prefix,
            ports.join(", "),
            service.interface,
            service.upstream
        ));
    }
    lines.join("\n")
}
