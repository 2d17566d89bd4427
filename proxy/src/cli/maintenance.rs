//! `unbroken maintenance`: this node leads only where no other could.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::ask::{AdminArgs, lines};
use crate::admin::fetch_status;
use crate::operator::Maintenance;

/// Begins or ends maintenance of the node on this machine, or says how it stands
///
/// In maintenance a node hands over what it leads and leads only where no other could; it goes on backing
/// the others. This holds until it is switched off, restarts of the node included. The exit code is 1 if
/// something could not be handed over, since no other node can lead it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken maintenance on && systemctl restart unbroken && unbroken maintenance off\n  \
    unbroken maintenance --json")]
pub struct MaintenanceArgs {
    /// Without it, only say how it stands
    #[arg(value_name = "on|off")]
    state: Option<Switch>,
    #[command(flatten)]
    asked: AdminArgs,
    /// Print JSON: {"maintenance": true, "moved": [...], "failed": [...]}
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(super) fn run(args: &MaintenanceArgs) -> anyhow::Result<ExitCode> {
    let (on, outcome) = match args.state {
        Some(state) => {
            let on = state == Switch::On;
            (on, args.asked.post("/maintenance", &Maintenance { on })?)
        }
        None => {
            let status = fetch_status(&args.asked.address()?)?;
            (status.maintenance, Default::default())
        }
    };
    if args.json {
        let mut json = serde_json::to_value(&outcome)?;
        json["maintenance"] = on.into();
        println!("{json}");
    } else {
        println!("maintenance {}", if on { "on" } else { "off" });
        for line in lines(&outcome) {
            println!("{line}");
        }
    }
    Ok(if outcome.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
