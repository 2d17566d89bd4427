//! A replica whose server answers otherwise than the leader's is found out before it can lead.

#![expect(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};

use unbroken::status::{DivergenceStatus, Role, ServiceStatus};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{userns, wait_until};
use unbroken_tests::server::{FLIP, Request};
use unbroken_tests::traffic::{EXCHANGE_BYTES, Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// The output byte that a faulty server gets wrong: in the sixteenth answer.
const WRONG_AT: u64 = 1000;
/// The answer that it is in.
const WRONG_ANSWER: std::ops::Range<u64> = 960..1024;

fn cluster(keys: &str) -> Cluster {
    let service = Service {
        keys: keys.to_owned(),
        ..Service::lab(SERVER)
    };
    Cluster::start(Options::new(NODE, [service])).unwrap()
}

fn service(cluster: &Cluster, replica: &str) -> Option<ServiceStatus> {
    cluster.status(replica)?.services.into_iter().next()
}

/// Makes a replica's server a faulty one, from the next connection on.
fn break_server(cluster: &Cluster, replica: &str) {
    fs::write(cluster.folder(replica).join(FLIP), WRONG_AT.to_string()).unwrap();
}

fn mend_server(cluster: &Cluster, replica: &str) {
    fs::remove_file(cluster.folder(replica).join(FLIP)).unwrap();
}

/// Waits until a replica says that its server has diverged.
fn wait_divergence(cluster: &Cluster, replica: &str) -> DivergenceStatus {
    let mut found = None;
    wait_until("the divergence is found", PATIENCE, || {
        found = service(cluster, replica).and_then(|s| s.divergence);
        found.is_some()
    })
    .unwrap();
    found.unwrap()
}

/// The other replicas, in order.
fn others(cluster: &Cluster, name: &str) -> [String; 2] {
    let mut names = cluster.replicas();
    names.retain(|n| n != name);
    names.try_into().unwrap()
}

#[test]
fn a_flipped_byte_of_a_backup_is_found_before_it_can_lead() {
    userns::privileged(
        "a_flipped_byte_of_a_backup_is_found_before_it_can_lead",
        || {
            let mut cluster = cluster("");
            let (leader, view) = cluster.wait_whole().unwrap();
            let [faulty, sound] = others(&cluster, &leader);
            break_server(&cluster, &faulty);
            let client = Traffic::start(&cluster, 80, &[Kind::Exchange]);
            let found = wait_divergence(&cluster, &faulty);
            assert_eq!((found.port, found.first), (80, Some(WRONG_AT)), "{found:?}");
            assert!(
                found.agreed <= WRONG_AT && WRONG_AT < found.before,
                "{found:?}"
            );
            assert!(service(&cluster, &sound).unwrap().divergence.is_none());

            // It is brought up anew again and again, and in vain, for its server is still faulty.
            cluster.kill(&leader).unwrap();
            assert_eq!(cluster.wait_leader(view).unwrap().0, sound);
            client.wait_progress();
            mend_server(&cluster, &faulty);
            cluster.start_replica(&leader).unwrap();
            cluster.wait_whole().unwrap();
            assert!(service(&cluster, &faulty).unwrap().counters.divergences > 0);

            // Mended and brought up by replay, it may lead.
            for name in [&sound, &leader] {
                if cluster.leader().unwrap().0 != faulty {
                    let (_, view) = cluster.leader().unwrap();
                    cluster.kill(name).unwrap();
                    cluster.wait_leader(view).unwrap();
                    client.wait_progress();
                    cluster.start_replica(name).unwrap();
                    cluster.wait_whole().unwrap();
                }
            }
            client.finish();
        },
    );
}

/// A server that says which version it is; another one where the folder has a file `newer` when it starts.
const VERSIONED: &str = r#"
import os, socketserver
version = "1.10" if os.path.exists("newer") else "1.09"
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline() not in (b"\r\n", b""):
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nServer: lab/%s\r\n\r\nhello\n" % version.encode())
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// One question, and what the service says of itself.
fn ask_version(cluster: &Cluster) -> String {
    let mut client = cluster.connect(80).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn another_version_of_a_server_is_found_before_it_can_lead_unless_that_is_harmless() {
    let name = "another_version_of_a_server_is_found_before_it_can_lead_unless_that_is_harmless";
    userns::privileged(name, || {
        for harmless in [false, true] {
            let keys = if harmless {
                "harmless = [\"^Server: .*\"]\n"
            } else {
                ""
            };
            let web = Service {
                server: ["python3", "-c", VERSIONED].map(str::to_owned).into(),
                keys: keys.to_owned(),
                ..Service::lab(SERVER)
            };
            let mut cluster = Cluster::start(Options::new(NODE, [web])).unwrap();
            let (leader, view) = cluster.wait_whole().unwrap();
            let [newer, sound] = others(&cluster, &leader);
            let renew = |cluster: &Cluster| {
                fs::write(cluster.folder(&newer).join("newer"), "").unwrap();
            };
            cluster.restart_server(&newer, "lab", renew).unwrap();
            cluster.wait_whole().unwrap();
            let answer = ask_version(&cluster);
            if harmless {
                for _ in 0..20 {
                    assert_eq!(ask_version(&cluster), answer);
                }
                let found = service(&cluster, &newer).unwrap();
                assert_eq!(found.counters.divergences, 0, "{found:?}");
                continue;
            }
            let found = wait_divergence(&cluster, &newer);
            let at = answer.find("1.09").unwrap() as u64 + 2;
            assert_eq!((found.port, found.first), (80, Some(at)), "{found:?}");
            cluster.kill(&leader).unwrap();
            assert_eq!(cluster.wait_leader(view).unwrap().0, sound);
            assert_eq!(ask_version(&cluster), answer);
        }
    });
}

/// A server that says how many bytes it was sent until their end, and writes that down; where the folder has a file `slow` when it
/// starts, it begins to read late, and counts one too many.
const COUNTS: &str = r#"
import os, socketserver, time
slow = os.path.exists("slow")
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        if slow:
            time.sleep(0.5)
        count = 0
        while data := self.request.recv(65536):
            count += len(data)
        with open("count", "w") as file:
            file.write(str(count))
        self.request.sendall(b"%010d" % (count + slow))
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

#[test]
fn a_server_that_is_slower_is_given_all_and_compared_when_the_client_is_gone() {
    let name = "a_server_that_is_slower_is_given_all_and_compared_when_the_client_is_gone";
    userns::privileged(name, || {
        // More than the sockets before a server that does not read take.
        let sent = vec![7; 8 << 20];
        let counts = Service {
            server: ["python3", "-c", COUNTS].map(str::to_owned).into(),
            ..Service::lab(SERVER)
        };
        let mut cluster = Cluster::start(Options::new(NODE, [counts])).unwrap();
        let (leader, view) = cluster.wait_whole().unwrap();
        let [slow, sound] = others(&cluster, &leader);
        cluster.kill(&slow).unwrap();
        fs::write(cluster.folder(&slow).join("slow"), "").unwrap();
        cluster.start_replica(&slow).unwrap();
        cluster.wait_whole().unwrap();

        let mut client = cluster.connect(80).unwrap();
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.parse(), Ok(sent.len()));
        drop(client);
        let found = wait_divergence(&cluster, &slow);
        assert_eq!((found.port, found.first), (80, Some(9)), "{found:?}");
        let count = fs::read_to_string(cluster.folder(&slow).join("count")).unwrap();
        assert_eq!(count.parse(), Ok(sent.len()));
        cluster.kill(&leader).unwrap();
        assert_eq!(cluster.wait_leader(view).unwrap().0, sound);
    });
}

#[test]
fn with_stop_it_stays_out_and_with_warn_it_stays() {
    userns::privileged("with_stop_it_stays_out_and_with_warn_it_stays", || {
        for policy in ["stop", "warn"] {
            let mut cluster = cluster(&format!("divergence = \"{policy}\"\n"));
            let (leader, _) = cluster.wait_whole().unwrap();
            let [faulty, _] = others(&cluster, &leader);
            break_server(&cluster, &faulty);
            let client = Traffic::start(&cluster, 80, &[Kind::Exchange]);
            wait_divergence(&cluster, &faulty);
            if policy == "stop" {
                wait_until("it is out and says why", PATIENCE, || {
                    service(&cluster, &faulty).is_some_and(|s| {
                        let reason = s.redundancy_reason.unwrap_or_default();
                        s.role == Role::Outside && reason.contains("until the node is started anew")
                    })
                })
                .unwrap();
                wait_until("the others go on without it", PATIENCE, || {
                    service(&cluster, &leader).is_some_and(|s| s.view.members.len() == 2)
                })
                .unwrap();
                mend_server(&cluster, &faulty);
                cluster.kill(&faulty).unwrap();
                cluster.start_replica(&faulty).unwrap();
            }
            cluster.wait_whole().unwrap();
            client.finish();
        }
    });
}

#[test]
fn a_leader_that_two_others_contradict_hands_over() {
    userns::privileged("a_leader_that_two_others_contradict_hands_over", || {
        let cluster = cluster("");
        let (leader, view) = cluster.wait_whole().unwrap();
        break_server(&cluster, &leader);
        // It will be told the wrong byte, and does not look at it.
        let mut client = cluster.connect(80).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
            .write_all(
                &Request::Exchange {
                    size: EXCHANGE_BYTES,
                }
                .encode(),
            )
            .unwrap();
        for _ in 0..2 * WRONG_ANSWER.end / u64::from(EXCHANGE_BYTES) {
            exchange(&mut client);
        }
        let (next, _) = cluster.wait_leader(view).unwrap();
        assert_ne!(next, leader);
        exchange(&mut client);
        // The two who agree were not brought up anew.
        for name in others(&cluster, &leader) {
            let service = service(&cluster, &name).unwrap();
            assert!(service.view.members.contains(&name), "{service:?}");
            assert_eq!(service.counters.divergences, 1);
        }
        mend_server(&cluster, &leader);
        cluster.wait_whole().unwrap();
        exchange(&mut client);
    });
}

/// One request and its answer.
fn exchange(client: &mut TcpStream) {
    let mut bytes = [b'x'; EXCHANGE_BYTES as usize];
    client.write_all(&bytes).unwrap();
    client.read_exact(&mut bytes).unwrap();
}
