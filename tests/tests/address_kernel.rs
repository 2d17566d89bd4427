//! How the VIP moves, and by which ways its clients come: address modes, IPv4 and IPv6, routers that
//! change, paths that shrink, others that claim the address, the user's hooks.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use socket2::{Domain, Protocol, Socket, Type};
use unbroken_tests::client::{self, PATIENCE, Progress};
use unbroken_tests::cluster::{Cluster, Options, Service, VIP};
use unbroken_tests::netns::{Capture, Captured, userns, wait_until};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x100);
/// What every virtual MAC address begins with.
const VIRTUAL: [u8; 2] = [0x02, 0x75];

fn options(keys: &str) -> Options {
    let service = Service {
        keys: keys.to_owned(),
        ..Service::lab(SERVER)
    };
    Options::new(NODE, [service])
}

fn connect(cluster: &Cluster, vip: IpAddr, from: Option<IpAddr>) -> TcpStream {
    cluster.lab().host("c").enter(|| {
        let domain = Domain::for_address(SocketAddr::new(vip, 80));
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap();
        if let Some(from) = from {
            socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
        }
        let to = SocketAddr::new(vip, 80);
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        socket.into()
    })
}

/// How often each leader is killed: `UNBROKEN_ROUNDS=100 cargo test ...` makes a measurement of it.
fn rounds() -> u32 {
    std::env::var("UNBROKEN_ROUNDS").map_or(2, |text| text.parse().unwrap())
}

/// What the switch saw meanwhile.
#[derive(Debug, Default)]
struct Seen {
    /// Source MAC addresses of the VIP's frames, by host.
    sources: BTreeMap<String, BTreeSet<[u8; 6]>>,
    /// The client's frames for the VIP: their destinations, and how often each payload was sent.
    homes: BTreeSet<[u8; 6]>,
    payloads: BTreeMap<(u16, u32), u32>,
}

impl Seen {
    fn note(&mut self, frame: &Captured, vip: IpAddr) {
        let head = &frame.head;
        let mac = |at: usize| -> [u8; 6] { head[at..at + 6].try_into().unwrap() };
        if frame.speaks_for(vip) {
            self.sources
                .entry(frame.host.clone())
                .or_default()
                .insert(mac(6));
        }
        let (to, tcp, total) = match vip {
            IpAddr::V4(vip) => {
                if head[12..14] != [8, 0] || head[30..34] != vip.octets() || head[23] != 6 {
                    return;
                }
                let total = 14 + usize::from(u16::from_be_bytes([head[16], head[17]]));
                (mac(0), 34, total)
            }
            IpAddr::V6(vip) => {
                if head[12..14] != [0x86, 0xdd] || head[38..54] != vip.octets() || head[20] != 6 {
                    return;
                }
                let total = 54 + usize::from(u16::from_be_bytes([head[18], head[19]]));
                (mac(0), 54, total)
            }
        };
        self.homes.insert(to);
        if total > tcp + usize::from(head[tcp + 12] >> 4) * 4 {
            let port = u16::from_be_bytes([head[tcp], head[tcp + 1]]);
            let seq = u32::from_be_bytes(head[tcp + 4..tcp + 8].try_into().unwrap());
            *self.payloads.entry((port, seq)).or_default() += 1;
        }
    }

    fn listen(seen: &Mutex<Self>, capture: &Capture, vip: IpAddr, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            if let Some(frame) = capture.next(Duration::from_millis(100)).unwrap() {
                seen.lock().unwrap().note(&frame, vip);
            }
        }
    }
}

/// A request/response client and a download go on while leaders are killed.
fn survives(mode: &str, vip: IpAddr) -> Seen {
    let prefix = if vip.is_ipv4() { 24 } else { 64 };
    let keys = format!("vip = \"{vip}/{prefix}\"\naddress = \"{mode}\"");
    let mut cluster = Cluster::start(options(&keys)).unwrap();
    let (mut leader, mut view) = cluster.wait_whole().unwrap();
    let (stop, seen) = (AtomicBool::new(false), Mutex::new(Seen::default()));
    let capture = cluster.lab().capture().unwrap();
    let [asks, loads] = [(); 2].map(|()| connect(&cluster, vip, None));
    let (asked, loaded) = (Progress::shared(), Progress::shared());
    let mut gaps = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| Seen::listen(&seen, &capture, vip, &stop));
        let exchange = scope.spawn(|| {
            let every = Duration::from_millis(1);
            client::exchange(asks, 64, every, &asked, || !stop.load(Ordering::Relaxed))
        });
        let download = scope.spawn(|| {
            let length = u64::from(rounds()) * (12 << 20);
            client::download(loads, 1, length, Some(8 << 20), &loaded)
        });
        let moved = |progress: &Progress| progress.sample().bytes;
        for _ in 0..rounds() {
            let before = moved(&asked);
            wait_until("requests answered", PATIENCE, || {
                moved(&asked) > before + 2000
            })
            .unwrap();
            let _ = asked.take_recent_gap();
            cluster.node(&leader).signal(Signal::KILL).unwrap();
            let dead = leader;
            let before = moved(&asked);
            cluster.wait_leader(view).unwrap();
            wait_until("requests answered", PATIENCE, || {
                moved(&asked) > before + 2000
            })
            .unwrap();
            gaps.push(asked.take_recent_gap());
            cluster.kill(&dead).unwrap();
            cluster.start_replica(&dead).unwrap();
            (leader, view) = cluster.wait_whole().unwrap();
        }
        wait_until("the end of the download", PATIENCE, || {
            loaded.sample().finished
        })
        .unwrap();
        stop.store(true, Ordering::Relaxed);
        exchange.join().unwrap().unwrap();
        download.join().unwrap().unwrap();
    });
    gaps.sort();
    let at = |percent: usize| gaps[(gaps.len() - 1) * percent / 100];
    let seen = seen.into_inner().unwrap();
    let again: u32 = seen.payloads.values().map(|times| times - 1).sum();
    println!(
        "{mode} {vip}: request/response gap after SIGKILL p50 {:?}, p99 {:?} of {}; {again} of {} segments sent again",
        at(50),
        at(99),
        gaps.len(),
        seen.payloads.len(),
    );
    assert!(seen.sources.len() >= 2, "the VIP has moved");
    seen
}

#[test]
fn each_leader_answers_at_its_own_address() {
    userns::privileged("each_leader_answers_at_its_own_address", || {
        for vip in [VIP.into(), VIP6.into()] {
            let seen = survives("garp", vip);
            for (host, sources) in &seen.sources {
                assert_eq!(sources.len(), 1, "{host}: {sources:?}");
                assert!(sources.iter().all(|mac| mac[..2] != VIRTUAL));
            }
            assert!(
                seen.homes.len() >= 2,
                "the client is told where the VIP went"
            );
        }
    });
}

#[test]
fn a_virtual_address_moves_with_the_leader() {
    userns::privileged("a_virtual_address_moves_with_the_leader", || {
        for vip in [VIP.into(), VIP6.into()] {
            let seen = survives("vmac", vip);
            for (host, sources) in &seen.sources {
                let all_virtual = sources.iter().all(|mac| mac[..2] == VIRTUAL);
                assert!(all_virtual && sources.len() == 1, "{host}: {sources:?}");
            }
            assert_eq!(seen.homes.len(), 1, "the client's cache stays right");
        }
    });
}

#[test]
fn no_switch_learns_where_a_flooded_address_is() {
    userns::privileged("no_switch_learns_where_a_flooded_address_is", || {
        for vip in [VIP.into(), VIP6.into()] {
            let seen = survives("flood", vip);
            for sources in seen.sources.values() {
                assert!(sources.iter().all(|mac| mac[..2] != VIRTUAL), "{sources:?}");
            }
            assert_eq!(seen.homes.len(), 1);
            assert!(seen.homes.iter().all(|mac| mac[..2] == VIRTUAL));
        }
    });
}

/// A gratuitous ARP of `mac` for the VIP.
fn claim(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(VIP.octets());
    frame.extend([0; 6]);
    frame.extend(VIP.octets());
    frame
}

#[test]
fn a_foreign_claim_is_answered_now_and_then_and_an_alarm() {
    userns::privileged(
        "a_foreign_claim_is_answered_now_and_then_and_an_alarm",
        || {
            let cluster = Cluster::start(options("address = \"vmac\"")).unwrap();
            let (leader, _) = cluster.wait_whole().unwrap();
            let alarm = || cluster.status(&leader).unwrap().services[0].alarm.clone();
            assert_eq!(alarm(), None);
            let capture = cluster.lab().capture().unwrap();
            let stranger = cluster.lab().host("c").injector().unwrap();
            // A duplicate-address probe (RFC 5227) first, from who has no address yet: it is told.
            let mut probe = claim([2, 0x98, 0, 0, 0, 0x66]);
            probe[28..32].fill(0);
            stranger.send(&probe).unwrap();
            let answers = |frame: &Captured| {
                let operation = frame.head.get(20..22) == Some(&[0, 2]);
                frame.speaks_for(VIP.into()) && frame.host == leader && operation
            };
            let told =
                |frame: &Captured| answers(frame) && frame.head[32..38] == [2, 0x98, 0, 0, 0, 0x66];
            while !told(&capture.next(PATIENCE).unwrap().expect("the prober is told")) {}
            assert_eq!(alarm(), None, "a probe claims nothing");

            let begun = std::time::Instant::now();
            let mut answered = 0;
            for _ in 0..150 {
                stranger.send(&claim([2, 0x98, 0, 0, 0, 0x66])).unwrap();
                while let Some(frame) = capture.next(Duration::from_millis(1)).unwrap() {
                    answered += u128::from(answers(&frame) && frame.head[..6] == [0xff; 6]);
                }
            }
            // One for each 200 ms, and what the schedule makes in any case.
            let most = begun.elapsed().as_millis() / 200 + 8;
            assert!(
                (1..=most).contains(&answered),
                "{answered} of at most {most}"
            );
            wait_until("an alarm", PATIENCE, || alarm().is_some()).unwrap();
            let text = alarm().unwrap();
            assert!(
                text.contains("02:98:00:00:00:66 announces 10.98.0.100"),
                "{text}"
            );
        },
    );
}

#[test]
fn hooks_are_told_who_leads() {
    userns::privileged("hooks_are_told_who_leads", || {
        let hook =
            r#"["sh", "-c", "echo $UNBROKEN_EVENT $UNBROKEN_SERVICE $UNBROKEN_NODE >> hooks"]"#;
        let keys = format!("on_promote = {hook}\non_demote = {hook}");
        let mut cluster = Cluster::start(options(&keys)).unwrap();
        let (leader, view) = cluster.wait_whole().unwrap();
        let folder = |name: &str| cluster.folder(name).join("hooks");
        let (first, files) = (
            folder(&leader),
            cluster.replicas().into_iter().map(|n| (folder(&n), n)),
        );
        let files: BTreeMap<_, _> = files.map(|(file, name)| (name, file)).collect();
        let said = |file| std::fs::read_to_string(file).unwrap_or_default();
        let promoted = |name: &str| format!("promote lab {name}\n");
        wait_until("the promotion", PATIENCE, || {
            said(&first) == promoted(&leader)
        })
        .unwrap();
        let node = cluster.node(&leader);
        node.signal(Signal::TERM).unwrap();
        assert!(node.wait(PATIENCE).unwrap().success());
        assert_eq!(
            said(&first),
            format!("{}demote lab {leader}\n", promoted(&leader))
        );
        let (second, _) = cluster.wait_leader(view).unwrap();
        wait_until("the promotion", PATIENCE, || {
            said(&files[&second]) == promoted(&second)
        })
        .unwrap();
    });
}

/// Who has the VIP, asked by a stranger at `from`: as neighbours are, or, without an address, as a host does before it takes
/// one (RFC 4861 §7.2, RFC 4862 §5.4).
fn solicitation(from: Ipv6Addr) -> Vec<u8> {
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0x100);
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(VIP6.octets());
    let mut summed = [from.octets(), group.octets()].concat();
    summed.extend([0, 0, 0, 24, 0, 0, 0, 58]);
    summed.extend(&icmp);
    let (words, _) = summed.as_chunks::<2>();
    let sum: u32 = words
        .iter()
        .map(|w| u32::from(u16::from_be_bytes(*w)))
        .sum();
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    icmp[2..4].copy_from_slice(&(!sum).to_be_bytes());
    let mut frame = vec![0x33, 0x33, 0xff, 0, 1, 0];
    frame.extend(STRANGER);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 58, 255]);
    frame.extend(from.octets());
    frame.extend(group.octets());
    frame.extend(icmp);
    frame
}

const STRANGER: [u8; 6] = [2, 0x98, 0, 0, 0, 0x66];

/// Each probe for duplicates is answered to everybody, and is no claim.
#[test]
fn who_would_take_the_address_is_told() {
    userns::privileged("who_would_take_the_address_is_told", || {
        let cluster = Cluster::start(options(&format!("vip = \"{VIP6}/64\""))).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        let capture = cluster.lab().capture().unwrap();
        let stranger = cluster.lab().host("c").injector().unwrap();
        for _ in 0..20 {
            let probe = solicitation(Ipv6Addr::UNSPECIFIED);
            stranger.send(&probe).unwrap();
        }
        // Whoever has an address is answered there, after those.
        let last = solicitation(cluster.lab().host("c").address6());
        stranger.send(&last).unwrap();
        let mut told = 0;
        loop {
            let frame = capture.next(PATIENCE).unwrap().expect("an answer");
            let advertises = frame.speaks_for(VIP6.into()) && frame.head[54] == 136;
            if !advertises || frame.host != leader {
                continue;
            }
            match &frame.head[..6] {
                to if to == STRANGER => break,
                to => told += u32::from(to == [0x33, 0x33, 0, 0, 0, 1]),
            }
        }
        // What a new leader announces by itself is a few.
        assert!(told >= 20, "{told} of 20 probes were answered");
        let alarm = cluster.status(&leader).unwrap().services[0].alarm.clone();
        assert_eq!(alarm, None, "a probe claims nothing");
    });
}

/// Clients at 10.99.0.10 and fd99::10 behind one of two routers, r4 and r5, which also hold the coordinators.
fn behind_routers(vip: IpAddr) -> Cluster {
    let prefix = if vip.is_ipv4() { 24 } else { 64 };
    let cluster = Cluster::start(Options {
        coordinators: 3,
        ..options(&format!("vip = \"{vip}/{prefix}\""))
    })
    .unwrap();
    for router in ["r4", "r5"] {
        let host = cluster.lab().host(router);
        for (knob, value) in [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/eth0/send_redirects", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ] {
            host.sysctl(knob, value);
        }
        let routes = "route add 10.99.0.10/32 via 10.98.0.10\nroute add fd99::10/128 via fd98::10";
        host.ip(routes).unwrap();
    }
    let client = cluster.lab().host("c");
    client.sysctl("net/ipv4/conf/all/accept_redirects", "0");
    client.sysctl("net/ipv4/conf/eth0/accept_redirects", "0");
    client.sysctl("net/ipv6/conf/eth0/accept_redirects", "0");
    client.sysctl("net/ipv4/conf/all/rp_filter", "0");
    let addresses = "addr add 10.99.0.10/32 dev lo\naddr add fd99::10/128 dev lo nodad";
    client.ip(addresses).unwrap();
    route(&cluster, vip, "r4");
    cluster.wait_whole().unwrap();
    cluster
}

/// Sends the client's packets for the VIP by way of a router.
fn route(cluster: &Cluster, vip: IpAddr, router: &str) {
    let router = cluster.lab().host(router);
    let line = match vip {
        IpAddr::V4(vip) => format!("{vip}/32 via {}", router.address()),
        IpAddr::V6(vip) => format!("{vip}/128 via {}", router.address6()),
    };
    let line = format!("route replace {line} src {}", afar(vip));
    cluster.lab().host("c").ip(&line).unwrap();
}

fn afar(vip: IpAddr) -> IpAddr {
    match vip {
        IpAddr::V4(_) => Ipv4Addr::new(10, 99, 0, 10).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 0x10).into(),
    }
}

/// A download from afar goes on when the way changes, and when the leader dies: the successor knows the way.
fn served_across(cluster: &mut Cluster, vip: IpAddr, change: impl FnOnce(&Cluster)) {
    let (leader, view) = cluster.wait_whole().unwrap();
    let stream = connect(cluster, vip, Some(afar(vip)));
    let progress = Progress::shared();
    let moved = || progress.sample().bytes;
    let wait_for = |what: &str, more: u64| {
        let then = moved();
        wait_until(what, PATIENCE, || moved() > then + more).unwrap();
    };
    std::thread::scope(|scope| {
        let download =
            scope.spawn(|| client::download(stream, 1, 30 << 20, Some(12 << 20), &progress));
        wait_for("the first bytes", 1 << 20);
        change(cluster);
        wait_for("bytes by the other way", 4 << 20);
        cluster.node(&leader).signal(Signal::KILL).unwrap();
        cluster.wait_leader(view).unwrap();
        wait_for("bytes from the successor", 4 << 20);
        download.join().unwrap().unwrap();
    });
}

#[test]
fn clients_behind_routers_are_served_whichever_they_use() {
    userns::privileged(
        "clients_behind_routers_are_served_whichever_they_use",
        || {
            for vip in [VIP.into(), VIP6.into()] {
                let mut cluster = behind_routers(vip);
                served_across(&mut cluster, vip, |cluster| {
                    // The next hop changes: the other router, and the first is gone.
                    route(cluster, vip, "r5");
                    cluster.lab().cut("r4").unwrap();
                });
            }
        },
    );
}

#[test]
fn segments_fit_a_path_that_shrinks() {
    userns::privileged("segments_fit_a_path_that_shrinks", || {
        // Neither is below what a path must take: 68 (RFC 791), 1280 (RFC 8200).
        let narrow = [
            (VIP.into(), "10.99.0.10/32 via 10.98.0.10 mtu lock 1100"),
            (VIP6.into(), "fd99::10/128 via fd98::10 mtu lock 1300"),
        ];
        for (vip, narrow) in narrow {
            let mut cluster = behind_routers(vip);
            served_across(&mut cluster, vip, |cluster| {
                let router = cluster.lab().host("r4");
                router.ip(&format!("route replace {narrow}")).unwrap();
            });
        }
    });
}

/// What is not made to work is pinned here, so that the documents stay true: a host does not hear its
/// own packet socket's address, so a client on the leader's host finds nobody; on a backup's it does.
#[test]
fn a_client_on_a_backups_host_is_served() {
    userns::privileged("a_client_on_a_backups_host_is_served", || {
        let mut cluster = Cluster::start(options("")).unwrap();
        let (leader, _) = cluster.wait_whole().unwrap();
        for name in cluster.replicas() {
            let said = "clients on this very host do not reach the address";
            let node = cluster.node(&name);
            node.wait_for_line(said, PATIENCE).unwrap();
            let to = SocketAddr::from((VIP, 80));
            let wait = if name == leader {
                Duration::from_millis(500)
            } else {
                PATIENCE
            };
            let host = cluster.lab().host(&name);
            let connected = host.enter(|| TcpStream::connect_timeout(&to, wait));
            assert_eq!(
                connected.is_ok(),
                name != leader,
                "from {name}, led by {leader}"
            );
        }
    });
}
