//! Every fault of the leader, under three clients of the kernel's that verify every byte: none of them may notice.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use rustix::process::Signal;
use unbroken::status::{Redundancy, Role};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// Something that befalls the leader, and what mends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL to the node alone: its server lives on and is closed by the kernel.
    Node,
    /// SIGKILL to its server, and at once to the node too.
    ServerAndNode,
    /// SIGKILL to everything on the host, the node first.
    Machine,
    /// The cable is pulled: the carrier is lost.
    Cable,
    /// The switch passes nothing any more: the carrier stays.
    Mute,
    /// It hears and is not heard.
    Silent,
    /// It is heard and does not hear.
    Deaf,
    /// SIGSTOP until somebody else leads, then SIGCONT.
    Stopped,
}

impl Fault {
    fn strike(self, cluster: &mut Cluster, leader: &str) {
        match self {
            Self::Node => cluster.node(leader).signal(Signal::KILL).unwrap(),
            Self::ServerAndNode => {
                cluster.server(leader, "lab").signal(Signal::KILL).unwrap();
                cluster.node(leader).signal(Signal::KILL).unwrap();
            }
            Self::Machine => drop(cluster.lab().kill_host(leader).unwrap()),
            Self::Cable => cluster.lab().cut(leader).unwrap(),
            Self::Mute => cluster.lab().mute(leader).unwrap(),
            Self::Silent => cluster.lab().silence(leader).unwrap(),
            Self::Deaf => cluster.lab().deafen(leader).unwrap(),
            Self::Stopped => cluster.node(leader).signal(Signal::STOP).unwrap(),
        }
    }

    fn mend(self, cluster: &mut Cluster, victim: &str) {
        match self {
            Self::Node | Self::ServerAndNode | Self::Machine => {
                cluster.kill(victim).unwrap();
                cluster.start_replica(victim).unwrap();
            }
            Self::Cable => cluster.lab().plug(victim).unwrap(),
            Self::Mute => cluster.lab().unmute(victim).unwrap(),
            Self::Silent | Self::Deaf => cluster.lab().unsilence(victim).unwrap(),
            Self::Stopped => cluster.node(victim).signal(Signal::CONT).unwrap(),
        }
    }
}

/// Each fault befalls whoever leads, under the same three connections.
fn survive(faults: &[Fault]) {
    let mut service = Service::lab(SERVER);
    // The whole input of a connection that lives through all of it is replayed to who joins.
    service.keys = "history = { memory = \"2GiB\" }".to_owned();
    let mut cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
    let (mut leader, mut view) = cluster.wait_whole().unwrap();
    let bytes = (faults.len() as u64 * 12) << 20;
    let clients = Traffic::with_bulk(&cluster, 80, &Kind::BUSY, bytes);
    for fault in faults {
        clients.wait_progress();
        eprintln!("{leader} leads view {view}: {fault:?}");
        fault.strike(&mut cluster, &leader);
        let victim = leader;
        let heir = cluster.wait_other_leader(&victim).unwrap().0;
        clients.wait_progress();
        fault.mend(&mut cluster, &victim);
        (leader, view) = cluster.wait_whole().unwrap();
        assert_eq!(leader, heir, "the mended {victim} disturbed its heir");
    }
    clients.finish();
}

#[test]
fn the_leaders_node_and_machine_die() {
    userns::privileged("the_leaders_node_and_machine_die", || {
        survive(&[Fault::Node, Fault::ServerAndNode, Fault::Machine]);
    });
}

#[test]
fn the_leader_is_cut_off() {
    userns::privileged("the_leader_is_cut_off", || {
        survive(&[Fault::Cable, Fault::Mute, Fault::Silent, Fault::Deaf]);
    });
}

#[test]
fn the_leader_stops_and_wakes() {
    userns::privileged("the_leader_stops_and_wakes", || {
        survive(&[Fault::Stopped, Fault::Stopped]);
    });
}

/// Who sees a killed node's control connection end is refused by its listener at once: the proof of death waits for nothing
/// else that the kernel has to close.
#[test]
fn a_killed_node_refuses_as_soon_as_it_ends() {
    userns::privileged("a_killed_node_refuses_as_soon_as_it_ends", || {
        let options = Options::new(NODE, [Service::lab(SERVER)]);
        let mut cluster = Cluster::start(options).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        let address = SocketAddr::from((cluster.lab().host(&leader).address(), 7400));
        let client = cluster.lab().host("c").clone();
        let mut control = client.enter(|| TcpStream::connect(address)).unwrap();
        // A challenge, so that it is known to be accepted.
        control.write_all(b"UBctl\0\0\x01").unwrap();
        control.write_all(&[7; 16]).unwrap();
        control.read_exact(&mut [0; 2]).unwrap();
        cluster.node(&leader).signal(Signal::KILL).unwrap();
        // To its end, or until it is reset.
        let _ = io::copy(&mut control, &mut io::sink());
        let refused = client.enter(|| TcpStream::connect(address));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

/// As many failovers as `UNBROKEN_FAILOVERS` says, on one living set of connections.
#[test]
fn one_connection_lives_through_a_chain_of_failovers() {
    userns::privileged("one_connection_lives_through_a_chain_of_failovers", || {
        let count = std::env::var("UNBROKEN_FAILOVERS");
        let count = count.map_or(5, |count| {
            count.parse().expect("UNBROKEN_FAILOVERS: a number")
        });
        survive(&vec![Fault::Machine; count]);
    });
}

/// A cluster whose coordinators live on hosts of their own, and whose clients wait for both backups.
fn outside() -> Cluster {
    let mut options = Options::new(NODE, [Service::lab(SERVER)]);
    options.coordinators = 3;
    options.group = "resilience = \"all\"".to_owned();
    Cluster::start(options).unwrap()
}

/// With `resilience = "all"`, the last of three goes on; and both come back.
#[test]
fn two_of_three_die_at_once() {
    userns::privileged("two_of_three_die_at_once", || {
        let mut cluster = outside();
        let (leader, view) = cluster.wait_whole().unwrap();
        let clients = Traffic::start(&cluster, 80, &Kind::BUSY);
        clients.wait_progress();
        let backup = cluster.replicas().into_iter().find(|name| *name != leader);
        let dead = [leader, backup.unwrap()];
        for name in &dead {
            cluster.node(name).signal(Signal::KILL).unwrap();
        }
        let heir = cluster.wait_leader(view).unwrap().0;
        assert!(!dead.contains(&heir));
        clients.wait_progress();
        for name in &dead {
            cluster.kill(name).unwrap();
            cluster.start_replica(name).unwrap();
        }
        cluster.wait_whole().unwrap();
        clients.finish();
    });
}

/// The heir dies as soon as it says that it leads.
#[test]
fn the_heir_dies_in_the_takeover() {
    userns::privileged("the_heir_dies_in_the_takeover", || {
        let mut cluster = outside();
        let (leader, _) = cluster.wait_whole().unwrap();
        let clients = Traffic::start(&cluster, 80, &Kind::BUSY);
        clients.wait_progress();
        cluster.node(&leader).signal(Signal::KILL).unwrap();
        let heir = cluster.wait_other_leader(&leader).unwrap().0;
        cluster.node(&heir).signal(Signal::KILL).unwrap();
        let mut others = cluster.replicas().into_iter();
        let next = others.find(|name| *name != leader && *name != heir);
        let next = next.unwrap();
        wait_until("the third leads", PATIENCE, || {
            let status = cluster.status(&next);
            status.is_some_and(|status| status.services[0].role == Role::Leader)
        })
        .unwrap();
        clients.wait_progress();
        for name in [leader, heir] {
            cluster.kill(&name).unwrap();
            cluster.start_replica(&name).unwrap();
        }
        cluster.wait_whole().unwrap();
        clients.finish();
    });
}

/// The leader dies while a replica is being brought up; then, while another is, that one does.
#[test]
fn a_failure_during_joining() {
    userns::privileged("a_failure_during_joining", || {
        let mut cluster = outside();
        let (leader, _) = cluster.wait_whole().unwrap();
        let clients = Traffic::start(&cluster, 80, &Kind::BUSY);
        clients.wait_progress();
        let others = cluster.replicas().into_iter();
        let others: Vec<String> = others.filter(|name| *name != leader).collect();
        cluster.kill(&others[0]).unwrap();
        clients.wait_progress();
        cluster.start_replica(&others[0]).unwrap();
        // Where it is by now is left to chance: waiting, taking the state, or just in.
        cluster.kill(&leader).unwrap();
        let heir = cluster.wait_other_leader(&leader).unwrap().0;
        clients.wait_progress();
        let joiner = [&leader, &others[0]]
            .into_iter()
            .find(|name| **name != heir);
        let joiner = joiner.unwrap().clone();
        cluster.kill(&joiner).unwrap();
        cluster.start_replica(&joiner).unwrap();
        cluster.kill(&joiner).unwrap();
        clients.wait_progress();
        for name in cluster.replicas() {
            if name != heir {
                cluster.kill(&name).unwrap();
                cluster.start_replica(&name).unwrap();
            }
        }
        cluster.wait_whole().unwrap();
        clients.finish();
    });
}

/// Without a quorum of coordinators no view changes, and connections go on, and the leader says what is lost: even when a
/// backup dies that is not needed for `resilience`. With the quorum back, so is everything.
#[test]
fn the_coordinators_lose_their_quorum() {
    userns::privileged("the_coordinators_lose_their_quorum", || {
        for replicas in [3, 2] {
            frozen(replicas);
        }
    });
}

fn frozen(replicas: u8) {
    let mut options = Options::new(NODE, [Service::lab(SERVER)]);
    options.replicas = replicas;
    options.coordinators = 3;
    let mut cluster = Cluster::start(options).unwrap();
    let (leader, view) = cluster.wait_whole().unwrap();
    let clients = Traffic::start(&cluster, 80, &Kind::BUSY);
    clients.wait_progress();
    let coordinators = cluster.coordinators();
    for name in &coordinators[..2] {
        cluster.kill(name).unwrap();
    }
    let said = |cluster: &Cluster, redundancy: Redundancy, what: &[&str]| {
        wait_until(&format!("{redundancy:?} {what:?}"), PATIENCE, || {
            let Some(status) = cluster.status(&leader) else {
                return false;
            };
            let service = &status.services[0];
            assert_eq!(service.role, Role::Leader);
            assert_eq!(service.view.id, view, "no view without a quorum");
            let reason = service.redundancy_reason.as_deref().unwrap_or_default();
            service.redundancy == redundancy && what.iter().all(|what| reason.contains(what))
        })
        .unwrap();
    };
    said(&cluster, Redundancy::Unprotected, &["no quorum"]);
    clients.wait_progress();
    let backup = cluster.replicas().into_iter().find(|name| *name != leader);
    let backup = backup.unwrap();
    if replicas == 3 {
        cluster.kill(&backup).unwrap();
        said(
            &cluster,
            Redundancy::Unprotected,
            &["no quorum", "1 of 2 backups"],
        );
        clients.wait_progress();
    }
    for name in &coordinators[..2] {
        cluster.start_node(name).unwrap();
    }
    if replicas == 3 {
        cluster.start_replica(&backup).unwrap();
    }
    cluster.wait_whole().unwrap();
    // What was frozen moves again.
    cluster.kill(&leader).unwrap();
    cluster.wait_other_leader(&leader).unwrap();
    clients.wait_progress();
    cluster.start_replica(&leader).unwrap();
    cluster.wait_whole().unwrap();
    clients.finish();
}
