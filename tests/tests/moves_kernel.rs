//! Planned moves under clients of the kernel's that verify every byte: hand-over, preference,
//! maintenance, rolling restart. None of them may notice.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::process::{Command, Output};

use rustix::process::Signal;
use unbroken::status::{Role, ServiceStatus};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// A second service with an address, hence a leader, of its own.
fn mail() -> Service {
    Service {
        name: "mail".to_owned(),
        port: 25,
        upstream: 7001,
        server: vec![SERVER.to_owned(), "127.0.0.1:7001".to_owned()],
        keys: "vip = \"10.98.0.101/24\"\nprefer = \"r3\"\nfailback = \"100ms\"".to_owned(),
    }
}

/// Runs `unbroken ARGUMENTS` on a replica's host.
fn run(cluster: &Cluster, on: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(NODE);
    command.args(arguments);
    cluster.lab().host(on).output(command).unwrap()
}

/// Runs it, has it succeed, and gives back its JSON.
fn done(cluster: &Cluster, on: &str, arguments: &[&str]) -> serde_json::Value {
    let output = run(cluster, on, &[arguments, &["--json"]].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?} on {on}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs it, has it fail with 1, and gives back what it said.
fn refused(cluster: &Cluster, on: &str, arguments: &[&str]) -> String {
    let output = run(cluster, on, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?} on {on}");
    String::from_utf8(output.stderr).unwrap()
}

fn leader_of(cluster: &Cluster, service: &str) -> Option<String> {
    let statuses = cluster.statuses().into_iter().flatten();
    let leads = |s: &ServiceStatus| s.name == service && s.role == Role::Leader;
    statuses
        .filter(|status| status.services.iter().any(leads))
        .map(|status| status.node)
        .next()
}

fn wait_leads(cluster: &Cluster, service: &str, node: &str) {
    wait_until(&format!("{node} leads {service}"), PATIENCE, || {
        leader_of(cluster, service).as_deref() == Some(node)
    })
    .unwrap();
}

fn restart_node(cluster: &mut Cluster, name: &str) {
    cluster.node(name).signal(Signal::TERM).unwrap();
    let ended = cluster.node(name).wait(PATIENCE).unwrap();
    assert!(ended.success(), "{name}: {ended}");
    cluster.start_node(name).unwrap();
}

#[test]
fn planned_moves_disturb_nobody() {
    userns::privileged("planned_moves_disturb_nobody", || {
        let services = [Service::lab(SERVER), mail()];
        let mut cluster = Cluster::start(Options::new(NODE, services)).unwrap();
        cluster.wait_whole().unwrap();
        // Whoever was there first, the preferred one leads in the end.
        wait_leads(&cluster, "mail", "r3");
        let traffic = Traffic::start(&cluster, 80, &Kind::ALL);

        // Any node can be asked for any.
        let leader = leader_of(&cluster, "lab").unwrap();
        let mut targets = cluster.replicas();
        targets.retain(|name| *name != leader);
        targets.push(leader.clone());
        let mut from = leader;
        for to in targets {
            cluster.wait_whole().unwrap();
            let outcome = done(&cluster, "r1", &["handover", &to, "--service", "lab"]);
            let moved = &outcome["moved"][0];
            assert_eq!(moved["service"], "lab", "{outcome}");
            assert_eq!(
                (moved["from"].as_str(), moved["to"].as_str()),
                (Some(&*from), Some(&*to)),
                "{outcome}"
            );
            wait_leads(&cluster, "lab", &to);
            traffic.wait_progress();
            from = to;
        }
        assert_eq!(leader_of(&cluster, "mail").as_deref(), Some("r3"));
        let said = refused(&cluster, "r1", &["handover", "r9", "--service", "lab"]);
        assert!(said.contains("only: r1, r2, r3"), "{said}");
        let said = refused(&cluster, "r2", &["handover", "--service", "web"]);
        assert!(said.contains("only: lab, mail"), "{said}");

        // In maintenance a node leads nothing, after a restart neither, and is passed over.
        // That one service would rather be led by it changes nothing.
        done(&cluster, "r1", &["handover", "r3", "--service", "lab"]);
        wait_leads(&cluster, "lab", "r3");
        let (resting, _) = cluster.wait_whole().unwrap();
        let outcome = done(&cluster, &resting, &["maintenance", "on"]);
        assert_eq!(outcome["maintenance"], true);
        assert_eq!(outcome["moved"][0]["from"], *resting, "{outcome}");
        cluster.wait_whole().unwrap();
        restart_node(&mut cluster, &resting);
        let (leader, _) = cluster.wait_whole().unwrap();
        let outcome = done(&cluster, &resting, &["maintenance"]);
        assert_eq!(outcome["maintenance"], true);
        let outcome = done(&cluster, &leader, &["handover", "--service", "lab"]);
        let next = outcome["moved"][0]["to"].as_str().unwrap();
        assert!(next != leader && next != resting, "{outcome}");
        traffic.wait_progress();
        assert_ne!(leader_of(&cluster, "mail"), Some(resting.clone()));
        let outcome = done(&cluster, &resting, &["maintenance", "off"]);
        assert_eq!(outcome["maintenance"], false);
        assert!(!cluster.status(&resting).unwrap().maintenance);

        // All nodes, one after the other.
        for name in cluster.replicas() {
            cluster.wait_whole().unwrap();
            restart_node(&mut cluster, &name);
            traffic.wait_progress();
        }
        cluster.wait_whole().unwrap();
        wait_leads(&cluster, "mail", "r3");
        traffic.finish();
    });
}
