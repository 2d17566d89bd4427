//! `unbroken status`: what the nodes say about themselves.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::ask::DEFAULT_ADMIN;
use crate::admin::fetch_status;
use crate::config::{Config, FenceMode};
use crate::status::{Role, ServiceStatus, Status, word};

/// Shows roles, views, redundancy and connections of one node or several
///
/// Asks the admin page of each node. The exit code is 1 if any node did not answer.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken status\n  \
    unbroken status --admin 10.98.0.11:9600,10.98.0.12:9600,10.98.0.13:9600 --watch\n  \
    unbroken status -c /etc/unbroken/node.toml --json")]
pub struct StatusArgs {
    /// Admin page of the node, or of several, with commas between [default: 127.0.0.1:9600]
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        conflicts_with = "config"
    )]
    admin: Vec<String>,
    /// Take the admin page's address from this configuration
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the status as JSON: an object for one node, for several an array of
    /// {"admin", "status"} or {"admin", "error"}
    #[arg(long)]
    json: bool,
    /// Repeat every second until interrupted
    #[arg(long)]
    watch: bool,
}

const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What one node answered.
#[derive(Debug, Serialize)]
struct Answer {
    admin: String,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Status(Box<Status>),
    Error(String),
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let addresses = match &args.config {
        Some(file) => vec![Config::load(file)?.admin.listen.to_string()],
        None if args.admin.is_empty() => vec![DEFAULT_ADMIN.to_owned()],
        None => args.admin.clone(),
    };
    loop {
        let answers = ask_all(&addresses);
        let text = if args.json {
            json(&answers)?
        } else {
            table(&answers)
        };
        let mut stdout = std::io::stdout().lock();
        if args.watch && !args.json && stdout.is_terminal() {
            // Clear the screen and go to its top.
            write!(stdout, "\x1b[2J\x1b[H")?;
        }
        writeln!(stdout, "{text}")?;
        stdout.flush()?;
        if !args.watch {
            let failed = answers
                .iter()
                .any(|answer| matches!(answer.outcome, Outcome::Error(_)));
            return Ok(if failed {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            });
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// Asks all at once: one that is down must not delay the others.
fn ask_all(addresses: &[String]) -> Vec<Answer> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = addresses
            .iter()
            .map(|address| scope.spawn(|| fetch_status(address)))
            .collect();
        let answers = asked.into_iter().zip(addresses).map(|(asked, address)| {
            let outcome = match asked.join() {
                Ok(Ok(status)) => Outcome::Status(Box::new(status)),
                Ok(Err(error)) => Outcome::Error(format!("{error:#}")),
                Err(_) => Outcome::Error("asking it panicked".to_owned()),
            };
            Answer {
                admin: address.clone(),
                outcome,
            }
        });
        answers.collect()
    })
}

fn json(answers: &[Answer]) -> anyhow::Result<String> {
    Ok(match answers {
        [
            Answer {
                outcome: Outcome::Status(status),
                ..
            },
        ] => serde_json::to_string(status)?,
        [one] => serde_json::to_string(one)?,
        all => serde_json::to_string(all)?,
    })
}

const HEADINGS: [&str; 10] = [
    "NODE",
    "SERVICE",
    "ADDRESS",
    "ROLE",
    "LEADER",
    "VIEW",
    "MEMBERS",
    "REDUNDANCY",
    "CONNECTIONS",
    "EVENTS",
];

fn table(answers: &[Answer]) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    let mut remarks = Vec::new();
    for Answer { admin, outcome } in answers {
        match outcome {
            Outcome::Status(status) => {
                rows.extend(status.services.iter().map(|service| row(status, service)));
                remarks.push(coordinator_line(status));
                for service in &status.services {
                    if let Some(reason) = &service.redundancy_reason {
                        remarks.push(format!("{}: {}: {reason}", status.node, service.name));
                    }
                    if let Some(alarm) = &service.alarm {
                        remarks.push(format!("{}: {}: {alarm}", status.node, service.name));
                    }
                    if service.fence == Some(FenceMode::Process) {
                        let what = "fence process: the kernel does not enforce the lease";
                        remarks.push(format!("{}: {}: {what}", status.node, service.name));
                    }
                    if let Some(place) = &service.divergence {
                        let count = service.counters.divergences;
                        remarks.push(format!(
                            "{}: {}: its server answered otherwise than the leader's, {count} times, at last on {place}",
                            status.node, service.name
                        ));
                    }
                }
            }
            Outcome::Error(error) => remarks.push(format!("{admin}: no answer: {error}")),
        }
    }
    let mut lines = if rows.len() > 1 {
        align(&rows)
    } else {
        Vec::new()
    };
    lines.append(&mut remarks);
    lines.join("\n")
}

fn coordinator_line(status: &Status) -> String {
    let coordinator = &status.coordinator;
    let stopping = if status.stopping { ", stopping" } else { "" };
    let maintenance = if status.maintenance {
        ", in maintenance"
    } else {
        ""
    };
    format!(
        "{}: coordinator {}, zxid {}, {} sessions, up {} s{stopping}{maintenance}",
        status.node,
        word(&coordinator.role),
        coordinator.zxid,
        coordinator.sessions,
        status.uptime_ms / 1000
    )
}

fn row(status: &Status, service: &ServiceStatus) -> [String; HEADINGS.len()] {
    let ports: Vec<String> = service.ports.iter().map(u16::to_string).collect();
    let mut members = service.view.members.join(",");
    if !service.view.joining.is_empty() {
        members = format!("{members} +{}", service.view.joining.join(","));
    }
    let counters = &service.counters;
    [
        status.node.clone(),
        service.name.clone(),
        format!("{}:{}", service.vip, ports.join(",")),
        word(&service.role),
        service.leader.clone().unwrap_or_else(|| "-".to_owned()),
        service.view.id.to_string(),
        if members.is_empty() {
            "-".to_owned()
        } else {
            members
        },
        word(&service.redundancy),
        service.connections.to_string(),
        match service.role {
            Role::Leader => format!("{} (stable {})", counters.last_event, counters.stable_event),
            _ => counters.last_event.to_string(),
        },
    ]
}

fn align<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Board, CoordinatorRole, Redundancy};

    fn answers() -> Vec<Answer> {
        let mut service =
            ServiceStatus::starting("web", "10.98.0.100".parse().unwrap(), &[80, 443]);
        service.role = Role::Backup;
        service.leader = Some("r2".to_owned());
        service.view.id = 7;
        service.view.members = vec!["r1".to_owned(), "r2".to_owned()];
        service.view.joining = vec!["r3".to_owned()];
        service.redundancy = Redundancy::CatchingUp;
        service.redundancy_reason = Some("r3 is joining".to_owned());
        service.connections = 3;
        service.counters.last_event = 12;
        service.counters.stable_event = 11;
        let board = Board::new("r1", vec![service]);
        board.update(|status| {
            status.coordinator.role = CoordinatorRole::Follower;
            status.coordinator.zxid = 123;
            status.coordinator.sessions = 4;
        });
        let up = Outcome::Status(Box::new(Status {
            uptime_ms: 61_500,
            ..board.read()
        }));
        let down = Outcome::Error("connecting: refused".to_owned());
        vec![
            Answer {
                admin: "a:1".to_owned(),
                outcome: up,
            },
            Answer {
                admin: "b:2".to_owned(),
                outcome: down,
            },
        ]
    }

    #[test]
    fn the_table_has_a_line_for_each_service_and_says_who_is_missing() {
        let expected = "\
NODE  SERVICE  ADDRESS             ROLE    LEADER  VIEW  MEMBERS    REDUNDANCY   CONNECTIONS  EVENTS
r1    web      10.98.0.100:80,443  backup  r2      7     r1,r2 +r3  catching-up  3            12
r1: coordinator follower, zxid 123, 4 sessions, up 61 s
r1: web: r3 is joining
b:2: no answer: connecting: refused";
        assert_eq!(table(&answers()), expected);
        assert_eq!(
            table(&answers()[1..]),
            "b:2: no answer: connecting: refused"
        );
    }

    /// The fields that scripts rely on, by name.
    #[test]
    fn the_json_of_one_node_is_the_status_itself() {
        let json: serde_json::Value =
            serde_json::from_str(&json(&answers()[..1]).unwrap()).unwrap();
        assert_eq!(json["node"], "r1");
        assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
        let coordinator = &json["coordinator"];
        assert_eq!(
            (
                &coordinator["role"],
                &coordinator["zxid"],
                &coordinator["sessions"]
            ),
            (&"follower".into(), &123.into(), &4.into())
        );
        let service = &json["services"][0];
        for (key, value) in [
            ("name", "web".into()),
            ("vip", "10.98.0.100".into()),
            ("ports", vec![80, 443].into()),
            ("leader", "r2".into()),
            ("role", "backup".into()),
            ("redundancy", "catching-up".into()),
            ("connections", 3.into()),
        ] {
            let value: serde_json::Value = value;
            assert_eq!(service[key], value, "{key}");
        }
        assert_eq!(service["view"]["id"], 7);
        assert_eq!(service["view"]["members"], serde_json::json!(["r1", "r2"]));
    }

    #[test]
    fn the_json_of_several_nodes_tells_them_apart() {
        let json: serde_json::Value = serde_json::from_str(&json(&answers()).unwrap()).unwrap();
        assert_eq!(json[0]["admin"], "a:1");
        assert_eq!(json[0]["status"]["node"], "r1");
        assert_eq!(json[1]["error"], "connecting: refused");
    }
}
