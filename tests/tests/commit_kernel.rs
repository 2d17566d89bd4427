//! Output commit (R1) and what is heard while nobody leads, shown with nodes that are held still; and what a server says
//! again that was started again.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};
use unbroken_tests::server::Request;
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// Bytes of a request and of its answer.
const SIZE: u32 = 64;
/// The backups sleep for so long, which is well within the lease.
const ASLEEP: Duration = Duration::from_millis(300);
/// A busy machine may make a takeover longer than the client's timer, now and then.
const ROUNDS: u32 = 10;

fn open(cluster: &Cluster) -> TcpStream {
    let mut client = cluster.connect(80).unwrap();
    client.set_nodelay(true).unwrap();
    let request = Request::Exchange { size: SIZE };
    client.write_all(&request.encode()).unwrap();
    client
}

fn ask(client: &mut TcpStream) {
    client.write_all(&[b'?'; SIZE as usize]).unwrap();
}

fn hear(client: &mut TcpStream) {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.read_exact(&mut [0; SIZE as usize]).unwrap();
}

/// Stops a node, and returns once all its threads stand still.
fn stop(cluster: &mut Cluster, name: &str) {
    cluster.node(name).signal(Signal::STOP).unwrap();
    let tasks = format!("/proc/{}/task", cluster.node(name).pid());
    let still = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    wait_until("it stands still", PATIENCE, || {
        std::fs::read_dir(&tasks).unwrap().all(still)
    })
    .unwrap();
}

fn go_on(cluster: &mut Cluster, name: &str) {
    cluster.node(name).signal(Signal::CONT).unwrap();
}

/// The backups sleep while the leader has its lease: it takes the request, and its server answers at once. Nothing of that
/// may reach the client before a backup has woken.
#[test]
fn nothing_is_shown_before_the_backups_hold_it() {
    userns::privileged("nothing_is_shown_before_the_backups_hold_it", || {
        let mut options = Options::new(NODE, [Service::lab(SERVER)]);
        options.group = "lease = \"5s\"\nsuspect_after = \"8s\"".to_owned();
        let mut cluster = Cluster::start(options).unwrap();
        let (leader, view) = cluster.wait_whole().unwrap();
        let mut client = open(&cluster);
        ask(&mut client);
        hear(&mut client);
        let mut backups = cluster.replicas();
        backups.retain(|name| *name != leader);
        for name in &backups {
            stop(&mut cluster, name);
        }
        ask(&mut client);
        client.set_read_timeout(Some(ASLEEP)).unwrap();
        let error = client
            .read(&mut [0; 1])
            .expect_err("nobody else holds the request");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        for name in &backups {
            go_on(&mut cluster, name);
        }
        hear(&mut client);
        assert_eq!(cluster.wait_whole().unwrap(), (leader, view));
    });
}

/// Segments that the client's host has sent again.
fn sent_again(cluster: &Cluster) -> u64 {
    let counters = cluster.lab().host("c").enter(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp");
        text.unwrap()
    });
    let mut lines = counters.lines().filter(|line| line.starts_with("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == "RetransSegs").unwrap();
    value.parse().unwrap()
}

/// In the address mode `flood` backups hear what clients send. A request that the leader did not take is answered by its
/// successor, before the client sends it again.
#[test]
fn with_flood_a_request_lost_in_the_gap_is_not_waited_for() {
    userns::privileged(
        "with_flood_a_request_lost_in_the_gap_is_not_waited_for",
        || {
            let service = Service {
                keys: "address = \"flood\"".to_owned(),
                ..Service::lab(SERVER)
            };
            let mut cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
            let unseen = (0..ROUNDS).any(|_| {
                let (leader, view) = cluster.wait_whole().unwrap();
                let mut client = open(&cluster);
                ask(&mut client);
                hear(&mut client);
                let before = sent_again(&cluster);
                stop(&mut cluster, &leader);
                ask(&mut client);
                hear(&mut client);
                let again = sent_again(&cluster) - before;
                assert!(cluster.wait_leader(view).unwrap().0 != leader);
                go_on(&mut cluster, &leader);
                again == 0
            });
            assert!(unseen, "the client sent its request again each time");
        },
    );
}

/// A backup's server is brought to the same point by replay. It says everything once more, and nobody is to hear that.
#[test]
fn what_a_restarted_server_says_again_is_not_heard_twice() {
    userns::privileged(
        "what_a_restarted_server_says_again_is_not_heard_twice",
        || {
            let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
            let (leader, _) = cluster.wait_whole().unwrap();
            let client = Traffic::start(&cluster, 80, &[Kind::Exchange]);
            client.wait_progress();
            let mut backups = cluster.replicas().into_iter();
            let backup = backups.find(|name| *name != leader).unwrap();
            cluster.restart_server(&backup, "lab", |_| ()).unwrap();
            cluster.wait_whole().unwrap();
            let mut command = Command::new(NODE);
            command.args(["handover", &backup]);
            let output = cluster.lab().host(&backup).output(command).unwrap();
            assert!(output.status.success(), "{output:?}");
            assert_eq!(cluster.wait_other_leader(&leader).unwrap().0, backup);
            client.wait_progress();
            client.finish();
        },
    );
}
