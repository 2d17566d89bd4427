//! `unbroken handover`: let another node lead.

use std::process::ExitCode;

use clap::Args;

use super::ask::{AdminArgs, lines};
use crate::operator::HandOver;

/// Lets another node lead, and waits until it does; no client notices
///
/// Asks the node on this machine, which passes the request on to the leader. Without NODE the fittest
/// backup leads next; without --service all services are moved to NODE, or, without NODE, those that this
/// node leads. The exit code is 1 if a service did not move.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken handover                      what this node leads goes to the fittest backup\n  \
    unbroken handover r2                   r2 leads every service\n  \
    unbroken handover r2 --service web --json")]
pub struct HandoverArgs {
    /// The node that shall lead
    #[arg(value_name = "NODE")]
    node: Option<String>,
    /// Only this service, and those that share its VIP
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,
    #[command(flatten)]
    asked: AdminArgs,
    /// Print the outcome as JSON: {"moved": [{"service", "from", "to", "view", "took_ms"}], "failed": [...]}
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &HandoverArgs) -> anyhow::Result<ExitCode> {
    let request = HandOver {
        service: args.service.clone(),
        to: args.node.clone(),
    };
    let outcome = args.asked.post("/handover", &request)?;
    if args.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        println!("{}", lines(&outcome).join("\n"));
    }
    Ok(if outcome.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
