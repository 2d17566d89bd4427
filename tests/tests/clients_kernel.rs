//! Clients of every kind, in every state, while the leader dies: kernels set in every way, and connections that are idle,
//! stuck, half closed, opening and closing at that very moment.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::tcp_congestion;
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use unbroken_tests::client::{self, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service};
use unbroken_tests::netns::{Host, PathOptions, userns, wait_until};
use unbroken_tests::pattern;
use unbroken_tests::server::Request;
use unbroken_tests::traffic::{Kind, Traffic};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");

/// Kills the leader's machine, waits for its heir, and starts it again. `meanwhile` runs before that.
fn fail_over(cluster: &mut Cluster, meanwhile: impl FnOnce()) {
    let (leader, view) = cluster.wait_whole().unwrap();
    cluster.node(&leader).signal(Signal::KILL).unwrap();
    cluster.wait_leader(view).unwrap();
    meanwhile();
    cluster.kill(&leader).unwrap();
    cluster.start_replica(&leader).unwrap();
    cluster.wait_whole().unwrap();
}

/// Three connections of clients whose kernel is set as said, under a failover.
fn survive(cluster: &mut Cluster, what: &str) {
    eprintln!("{what}");
    let traffic = Traffic::start(cluster, 80, &Kind::BUSY);
    fail_over(cluster, || traffic.wait_progress());
    traffic.finish();
}

#[test]
fn kernels_set_in_every_way() {
    userns::privileged("kernels_set_in_every_way", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        for algorithm in ["reno", "cubic", "bbr"] {
            choose_congestion_control(&cluster, algorithm);
            survive(&mut cluster, algorithm);
        }
        let knobs = [
            ("net/ipv4/tcp_timestamps", "0"),
            ("net/ipv4/tcp_sack", "0"),
            ("net/ipv4/tcp_window_scaling", "0"),
        ];
        for (knob, value) in knobs {
            let host = cluster.lab().host("c").clone();
            let file = std::path::Path::new("/proc/sys").join(knob);
            let usual = host.enter(|| std::fs::read_to_string(&file)).unwrap();
            host.sysctl(knob, value);
            let taken = host.enter(|| std::fs::read_to_string(&file)).unwrap();
            assert_eq!(taken.trim(), value, "{knob}: this kernel does not take it");
            survive(&mut cluster, &format!("{knob} = {value}"));
            host.sysctl(knob, usual.trim());
        }
        // The last: there is no way back that every kernel knows.
        for host in cluster.lab().hosts() {
            host.offloads_off("eth0").unwrap();
        }
        survive(&mut cluster, "offloads off");
    });
}

/// By the route, and not by the default, which a namespace may choose from some algorithms only.
fn choose_congestion_control(cluster: &Cluster, algorithm: &str) {
    let host = cluster.lab().host("c");
    let address = host.address();
    host.ip(&format!(
        "route replace 10.98.0.0/24 dev eth0 proto kernel scope link src {address} congctl {algorithm}"
    ))
    .unwrap();
    let stream = cluster.connect(80).unwrap();
    let taken = tcp_congestion(&stream).unwrap();
    assert_eq!(taken, algorithm, "what the kernel took");
}

#[test]
fn large_frames() {
    userns::privileged("large_frames", || {
        let mut options = Options::new(NODE, [Service::lab(SERVER)]);
        options.mtu = Some(9000);
        let mut cluster = Cluster::start(options).unwrap();
        survive(&mut cluster, "MTU 9000");
    });
}

/// A round trip of 10 ms, and one frame of a hundred is lost in each direction, during the takeover too.
#[test]
fn a_long_and_lossy_path() {
    userns::privileged("a_long_and_lossy_path", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        let options = PathOptions {
            delay: Duration::from_millis(5),
            loss_ppm: 10_000,
            seed: 1,
        };
        let path = cluster.lab().lengthen("c", options).unwrap();
        for algorithm in ["reno", "cubic", "bbr"] {
            choose_congestion_control(&cluster, algorithm);
            eprintln!("{algorithm}");
            // At what such a path carries, a connection of this size lives longer than the failover takes.
            let traffic = Traffic::with_bulk(&cluster, 80, &Kind::BUSY, 2 << 20);
            let before = path.counts();
            fail_over(&mut cluster, || traffic.wait_progress());
            traffic.finish();
            let (carried, lost) = path.counts();
            eprintln!("carried {}, lost {}", carried - before.0, lost - before.1);
            assert!(lost > before.1, "nothing was lost");
        }
    });
}

/// From this port of the client's. One that a connection in TIME-WAIT holds is free when the kernel lets go (RFC 6191: when its
/// clock of timestamps has moved on).
fn connect_from(cluster: &Cluster, port: u16) -> TcpStream {
    let from = SocketAddr::from((cluster.lab().host("c").address(), port));
    let mut connected = None;
    wait_until("the port is free", PATIENCE, || {
        let attempt = cluster.lab().host("c").enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            let vip = SocketAddr::from((unbroken_tests::cluster::VIP, 80));
            socket.connect_timeout(&vip.into(), PATIENCE)?;
            Ok::<TcpStream, std::io::Error>(socket.into())
        });
        match attempt {
            Ok(stream) => connected = Some(stream),
            Err(e) if e.kind() == ErrorKind::AddrNotAvailable => {}
            Err(e) => panic!("from {from} again: {e}"),
        }
        connected.is_some()
    })
    .unwrap();
    connected.unwrap()
}

/// Whether the host's kernel has a connection from this port in TIME-WAIT, as `/proc/net/tcp` prints it.
fn waits(host: &Host, port: u16) -> bool {
    let table = host.enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp"));
    let local = format!(":{port:04X}");
    table.unwrap().lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        matches!(fields[..], [_, from, _, "06", ..] if from.ends_with(&local))
    })
}

/// A conversation, after which the client or the server closes first. The other closes then.
fn converse(stream: TcpStream, client_first: bool) {
    if client_first {
        let mut round = 0;
        let more = || {
            round += 1;
            round < 4
        };
        client::exchange(stream, 64, Duration::ZERO, &Progress::shared(), more).unwrap();
    } else {
        client::download(stream, 9, 1000, None, &Progress::shared()).unwrap();
    }
}

/// Whichever side is in TIME-WAIT: the same four numbers name a new connection afterwards, with the leader that knew the
/// old one, and with its heir.
#[test]
fn connections_in_time_wait() {
    userns::privileged("connections_in_time_wait", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        cluster.wait_whole().unwrap();
        let client = cluster.lab().host("c").clone();
        client.sysctl("net/ipv4/tcp_tw_reuse", "1");
        let capture = cluster.lab().capture().unwrap();
        let ports = [(20_001, true), (20_002, false)];
        for (port, client_first) in ports {
            converse(connect_from(&cluster, port), client_first);
            converse(connect_from(&cluster, port), client_first);
        }
        assert!(waits(&client, 20_001), "the client closed first");
        fail_over(&mut cluster, || {});
        for (port, client_first) in ports {
            converse(connect_from(&cluster, port), client_first);
            // And as the other side's turn.
            converse(connect_from(&cluster, port), !client_first);
        }
        let mut answers = 0;
        while let Some(frame) = capture.next(Duration::ZERO).unwrap() {
            let tcp = frame.speaks_for(unbroken_tests::cluster::VIP.into())
                && frame.head[12..14] == [8, 0]
                && frame.head[23] == 6;
            if tcp {
                answers += 1;
                assert_eq!(frame.head[47] & 4, 0, "an RST from {}", frame.host);
            }
        }
        assert!(answers > 0, "the switch was not heard");
    });
}

/// Asks for `length` bytes of stream `seed` and reads none of them yet.
fn ask(cluster: &Cluster, seed: u64, length: u64) -> TcpStream {
    let mut stream = cluster.connect(80).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = Request::Download { seed, length };
    stream.write_all(&request.encode()).unwrap();
    stream
}

/// Reads stream `seed` to its end, which must be that of the connection.
fn read_all(mut stream: TcpStream, seed: u64, length: u64) {
    let (mut at, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        let n = stream.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        assert_eq!(pattern::first_difference(seed, at, &buffer[..n]), None);
        at += n as u64;
    }
    assert_eq!(at, length);
}

#[test]
fn connections_in_every_state() {
    userns::privileged("connections_in_every_state", || {
        let mut cluster = Cluster::start(Options::new(NODE, [Service::lab(SERVER)])).unwrap();
        cluster.wait_whole().unwrap();
        let length = 8 << 20;
        let stuck = ask(&cluster, 3, length);
        let half_closed = ask(&cluster, 4, length);
        half_closed.shutdown(Shutdown::Write).unwrap();
        // What the server sends before it closes fits into the client's buffer: its FIN is not acknowledged by an
        // application, only by a kernel.
        let closed_by_server = ask(&cluster, 5, 1000);
        let idle = cluster.connect(80).unwrap();
        let (go, wait) = mpsc::channel::<()>();
        let (asked, first) = mpsc::channel::<()>();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let idler = scope.spawn(move || {
                let mut round = 0;
                let more = || {
                    round += 1;
                    if round == 2 {
                        asked.send(()).unwrap();
                        wait.recv().unwrap();
                    }
                    round < 4
                };
                client::exchange(idle, 64, Duration::ZERO, &Progress::shared(), more)
            });
            first.recv().unwrap();
            let (cluster_ref, over_ref) = (&mut cluster, &over);
            // Connections that open, speak and close all the time, so some do at every moment of the takeover.
            let host = cluster_ref.lab().host("c").clone();
            let openers: Vec<_> = (0..4)
                .map(|_| {
                    let host = host.clone();
                    scope.spawn(move || {
                        let mut conversations = 0;
                        while !over_ref.load(Ordering::Relaxed) {
                            let stream = host.enter(connect).unwrap();
                            let mut round = 0;
                            let more = || {
                                round += 1;
                                round < 3
                            };
                            client::exchange(stream, 64, Duration::ZERO, &Progress::shared(), more)
                                .unwrap();
                            conversations += 1;
                        }
                        conversations
                    })
                })
                .collect();
            for _ in 0..2 {
                fail_over(cluster_ref, || {});
            }
            over.store(true, Ordering::Relaxed);
            for opener in openers {
                assert!(opener.join().unwrap() > 0);
            }
            go.send(()).unwrap();
            idler.join().unwrap().unwrap();
        });
        read_all(stuck, 3, length);
        read_all(half_closed, 4, length);
        read_all(closed_by_server, 5, 1000);
    });
}

fn connect() -> std::io::Result<TcpStream> {
    let vip = (unbroken_tests::cluster::VIP, 80).into();
    TcpStream::connect_timeout(&vip, PATIENCE)
}
