//! The node's packet socket against a kernel host: neighbour resolution, echo, offloads, checksums,
//! ownership, and what is said when it cannot be opened.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::thread::{CapabilitySet, CapabilitySets};
use socket2::{Domain, Protocol, Socket, Type};
use unbroken::wire::{
    BootTime, Flushed, Frame, HEADROOM, Kind, Mac, Options, OutPacket, RECEIVE_BATCH, Wire,
    WireError,
};
use unbroken_tests::netns::{Host, Lab, LabOptions, userns, wait_until};

const SOON: Duration = Duration::from_secs(20);
const VIP4: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x100);
const VIPS: [IpAddr; 2] = [IpAddr::V4(VIP4), IpAddr::V6(VIP6)];
const MSS: u16 = 1400;

fn open(host: &Host, vip: IpAddr) -> Result<Wire, WireError> {
    host.enter(|| Wire::open(&Options::new("eth0", vip)))
}

/// A wire that owns its VIP under a lease that outlasts the test.
fn owner(host: &Host, vip: IpAddr) -> Wire {
    let mut wire = open(host, vip).unwrap();
    let now = BootTime::now();
    wire.set_owner(now, true);
    wire.fence_mut().open_until(now + Duration::from_secs(3600));
    wire
}

/// Runs the wire's loop, in the manner of the node's, until `f` says that all is done. `f` is given
/// each frame and may send.
fn run(wire: &mut Wire, mut f: impl FnMut(Option<&Frame<'_>>, &mut Vec<OutPacket>) -> bool) {
    let deadline = Instant::now() + SOON;
    let (mut out, mut spare) = (Vec::new(), Vec::new());
    loop {
        let mut done = f(None, &mut out);
        while wire
            .receive(BootTime::now(), |frame| done |= f(Some(&frame), &mut out))
            .unwrap()
            == RECEIVE_BATCH
        {}
        wire.handle_timeout(BootTime::now());
        for packet in out.drain(..) {
            wire.send(packet);
        }
        assert_ne!(wire.flush(&mut spare).unwrap(), Flushed::Fenced);
        if done {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "nothing came of it: {:?}",
            wire.counters()
        );
        // A short wait beside the readiness: `f` may look at something else than frames.
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        rustix::event::poll(
            &mut [PollFd::new(&wire.as_fd(), PollFlags::IN)],
            Some(&wait),
        )
        .unwrap();
    }
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u64;
    for part in parts {
        for word in part.chunks(2) {
            total += u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap()
}

/// An echo request of 1000 bytes from the kernel host, and whether its reply is the same.
fn ping(vip: IpAddr) -> bool {
    let (domain, protocol, kind) = match vip {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let mut request = vec![kind, 0, 0, 0, 0x4d, 0x2a, 0, 1];
    request.extend((0..1000u32).map(|i| i.to_le_bytes()[0]));
    if vip.is_ipv4() {
        let checksum = !sum(&[&request]);
        request[2..4].copy_from_slice(&checksum.to_be_bytes());
    } // the kernel fills in that of ICMPv6
    socket
        .send_to(&request, &SocketAddr::new(vip, 0).into())
        .unwrap();
    // IPv4 raw sockets show the IP header, IPv6 ones do not.
    let skip = if vip.is_ipv4() { 20 } else { 0 };
    let mut buffer = [0; 2048];
    loop {
        let Ok(n) = (&socket).read(&mut buffer) else {
            return false;
        };
        // It hears other ICMP too, its own request included when both are on one host.
        let reply = &buffer[skip..n];
        if reply[0] == if vip.is_ipv4() { 0 } else { 129 } {
            return reply[4..] == request[4..];
        }
    }
}

#[test]
fn a_kernel_host_resolves_and_pings_the_vip() {
    userns::privileged("a_kernel_host_resolves_and_pings_the_vip", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        for vip in VIPS {
            let mut wire = owner(lab.host("r1"), vip);
            std::thread::scope(|scope| {
                let pinger = scope.spawn(|| lab.host("c").enter(|| ping(vip)));
                run(&mut wire, |_, _| pinger.is_finished());
                assert!(pinger.join().unwrap(), "{vip} does not answer");
            });
            let counters = wire.counters();
            assert!(counters.answered >= 2, "resolution and echo: {counters:?}");
            assert_eq!((counters.foreign_claims, counters.send_errors), (0, 0));
        }
    });
}

/// The few fields of a TCP packet that a test looks at, and the same the other way.
#[derive(Debug, Clone)]
struct Tcp {
    from: SocketAddr,
    to: SocketAddr,
    seq: u32,
    ack: u32,
    flags: u8,
    payload: Vec<u8>,
    checksum_right: bool,
}

const SYN: u8 = 2;
const ACK: u8 = 16;

impl Tcp {
    fn parse(packet: &[u8]) -> Option<Self> {
        let u16_at = |b: &[u8], i: usize| u16::from_be_bytes([b[i], b[i + 1]]);
        let u32_at = |b: &[u8], i: usize| u32::from_be_bytes(b[i..i + 4].try_into().unwrap());
        let (tcp, from, to): (&[u8], IpAddr, IpAddr) = if packet[0] >> 4 == 4 {
            let ip = |i: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[i..i + 4]).unwrap());
            (packet.get(20..).filter(|_| packet[9] == 6)?, ip(12), ip(16))
        } else {
            let ip = |i: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[i..i + 16]).unwrap());
            (packet.get(40..).filter(|_| packet[6] == 6)?, ip(8), ip(24))
        };
        Some(Self {
            from: SocketAddr::new(from, u16_at(tcp, 0)),
            to: SocketAddr::new(to, u16_at(tcp, 2)),
            seq: u32_at(tcp, 4),
            ack: u32_at(tcp, 8),
            flags: tcp[13],
            payload: tcp[usize::from(tcp[12] >> 4) * 4..].to_vec(),
            checksum_right: sum(&[&pseudo(from, to, tcp.len()), tcp]) == 0xffff,
        })
    }

    /// The packet, its checksum either whole or the sum of the pseudo-header alone.
    fn build(&self, next_hop: Mac, gso: Option<u16>, partial: bool) -> OutPacket {
        let mut tcp = Vec::new();
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(self.to.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let options: &[u8] = if self.flags & SYN != 0 {
            &[2, 4, 0x05, 0x78]
        } else {
            &[]
        };
        let words = u8::try_from(5 + options.len() / 4).unwrap();
        tcp.extend([words << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(options);
        tcp.extend(&self.payload);
        let pseudo = pseudo(self.from.ip(), self.to.ip(), tcp.len());
        let checksum = if partial {
            sum(&[&pseudo])
        } else {
            !sum(&[&pseudo, &tcp])
        };
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        let length = u16::try_from(tcp.len()).unwrap();
        let mut buf = vec![0; HEADROOM];
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut ip = vec![0x45, 0];
                ip.extend((20 + length).to_be_bytes());
                ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
                ip.extend(from.octets());
                ip.extend(to.octets());
                let checksum = !sum(&[&ip]);
                ip[10..12].copy_from_slice(&checksum.to_be_bytes());
                buf.extend(ip);
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                buf.extend([0x60, 0, 0, 0]);
                buf.extend(length.to_be_bytes());
                buf.extend([6, 64]);
                buf.extend(from.octets());
                buf.extend(to.octets());
            }
            _ => panic!("one family"),
        }
        buf.extend(tcp);
        OutPacket {
            buf,
            next_hop,
            gso,
            partial_checksum: partial,
        }
    }
}

fn pseudo(from: IpAddr, to: IpAddr, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend([0, 6]);
    bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
    bytes
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap())
        .collect()
}

/// A TCP of the simplest kind on the wire meets a kernel's: the kernel's super-segments arrive whole and
/// vouched for, ours are cut on the way and their checksums filled in.
fn super_segments(lab: &Lab, vip: IpAddr) {
    const UP: usize = 12 * MSS as usize;
    const DOWN: usize = 30 * MSS as usize + 17;
    let mut wire = owner(lab.host("r1"), vip);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            lab.host("c").enter(|| {
                let mut stream = TcpStream::connect_timeout(&SocketAddr::new(vip, 9), SOON)?;
                stream.set_read_timeout(Some(SOON))?;
                stream.write_all(&pattern(UP))?;
                let mut received = vec![0; DOWN];
                stream.read_exact(&mut received)?;
                Ok::<_, std::io::Error>(received)
            })
        });
        let (mut received, mut largest, mut sent) = (Vec::new(), 0, false);
        run(&mut wire, |frame, out| {
            let Some(Frame {
                kind: Kind::Ip(packet),
                source,
                checksum_ok,
            }) = frame
            else {
                return client.is_finished();
            };
            let Some(tcp) = Tcp::parse(packet) else {
                return false;
            };
            assert!(
                checksum_ok | tcp.checksum_right,
                "vouched for, or right: {tcp:?}"
            );
            let reply = Tcp {
                from: tcp.to,
                to: tcp.from,
                seq: 5001,
                ack: tcp
                    .seq
                    .wrapping_add(u32::try_from(tcp.payload.len()).unwrap()),
                flags: ACK,
                payload: Vec::new(),
                checksum_right: true,
            };
            if tcp.flags & SYN != 0 {
                let (seq, ack) = (5000, tcp.seq.wrapping_add(1));
                let answer = Tcp {
                    seq,
                    ack,
                    flags: SYN | ACK,
                    ..reply
                };
                out.push(answer.build(*source, None, true));
                return false;
            }
            if !tcp.payload.is_empty() {
                largest = largest.max(packet.len());
                received.extend(tcp.payload);
                out.push(reply.build(*source, None, true));
            }
            if received.len() == UP && !sent {
                sent = true;
                let data = Tcp {
                    payload: pattern(DOWN),
                    ..reply
                };
                out.push(data.build(*source, Some(MSS), true));
            }
            false
        });
        assert_eq!(received, pattern(UP));
        assert!(
            largest > 2 * usize::from(wire.mtu()),
            "no super-segment: {largest} bytes at most"
        );
        assert_eq!(client.join().unwrap().unwrap(), pattern(DOWN));
    });
    assert_eq!(wire.counters().send_errors, 0);
}

#[test]
fn super_segments_pass_both_ways() {
    userns::privileged("super_segments_pass_both_ways", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        for vip in VIPS {
            super_segments(&lab, vip);
        }
    });
}

#[test]
fn a_damaged_checksum_is_not_vouched_for() {
    userns::privileged("a_damaged_checksum_is_not_vouched_for", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let pairs = [("10.98.0.200", VIPS[0]), ("fd98::200", VIPS[1])];
        for (from, vip) in pairs.map(|(from, vip)| (from.parse::<IpAddr>().unwrap(), vip)) {
            let mut wire = open(lab.host("r1"), vip).unwrap();
            let mut sender = owner(lab.host("c"), from);
            let whole = Tcp {
                from: SocketAddr::new(from, 1),
                to: SocketAddr::new(vip, 2),
                seq: 3,
                ack: 4,
                flags: ACK,
                payload: pattern(100),
                checksum_right: true,
            };
            let intact = whole.build(wire.mac(), None, false);
            let mut damaged = intact.clone();
            *damaged.buf.last_mut().unwrap() ^= 0x40;
            sender.send(intact);
            sender.send(damaged);
            assert_eq!(sender.flush(&mut Vec::new()).unwrap(), Flushed::All);
            let mut seen = Vec::new();
            run(&mut wire, |frame, _| {
                if let Some(Frame {
                    kind: Kind::Ip(packet),
                    checksum_ok,
                    ..
                }) = frame
                {
                    seen.push((*checksum_ok, Tcp::parse(packet).unwrap().checksum_right));
                }
                seen.len() == 2
            });
            assert_eq!(seen, [(false, true), (false, false)]);
        }
    });
}

#[test]
fn only_the_owner_under_its_lease_emits() {
    userns::privileged("only_the_owner_under_its_lease_emits", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let (vip, host) = (VIPS[0], lab.host("r1"));
        let mut wire = open(host, vip).unwrap();
        let mut witness = open(lab.host("c"), vip).unwrap();
        let packet = || Tcp {
            from: SocketAddr::new(vip, 1),
            to: SocketAddr::new(lab.host("c").address().into(), 2),
            seq: 3,
            ack: 4,
            flags: ACK,
            payload: Vec::new(),
            checksum_right: true,
        };
        let mut spare = Vec::new();
        let mut emit = |wire: &mut Wire| {
            wire.announce();
            wire.send(packet().build([2; 6], None, true));
            let flushed = wire.flush(&mut spare).unwrap();
            (flushed, std::mem::take(&mut spare).len())
        };
        // Not the owner: the buffer comes back, nothing is even queued.
        assert_eq!(emit(&mut wire), (Flushed::All, 1));
        // The owner, but its fence is shut, and then its lease over: kept.
        let now = BootTime::now();
        wire.set_owner(now, true);
        assert_eq!(emit(&mut wire), (Flushed::Fenced, 0));
        wire.fence_mut().open_until(now);
        assert_eq!(emit(&mut wire), (Flushed::Fenced, 0));
        assert_eq!((wire.queued(), wire.counters().frames_out), (6, 0));
        // No longer the owner: dropped, and a lease does not bring it back.
        wire.set_owner(now, false);
        wire.fence_mut().open_until(BootTime::now() + SOON);
        assert_eq!(emit(&mut wire), (Flushed::All, 7));
        assert_eq!(wire.counters().frames_out, 0);
        // The proof that the witness would have heard: the first thing it hears is this.
        wire.set_owner(now, true);
        wire.fence_mut().open_until(BootTime::now() + SOON);
        wire.announce();
        assert_eq!(wire.flush(&mut spare).unwrap(), Flushed::All);
        let mut claims = 0;
        run(&mut witness, |frame, _| {
            claims += usize::from(frame.is_some_and(|f| f.kind == Kind::Claim(wire.mac())));
            claims == 2
        });
        assert_eq!(witness.counters().frames_in, 2);
        // Nor is what this host's own kernel says heard: its question for the VIP, seen by the witness.
        let knock = || {
            std::net::UdpSocket::bind("0.0.0.0:0")
                .unwrap()
                .send_to(b"?", (VIP4, 9))
        };
        host.enter(|| knock().unwrap());
        wait_until("question", SOON, || {
            witness.receive(BootTime::now(), |_| ()).unwrap();
            witness.counters().frames_in == 3
        })
        .unwrap();
        assert_eq!(wire.receive(BootTime::now(), |_| ()).unwrap(), 0);
    });
}

fn neighbour(lab: &Lab, vip: IpAddr) -> String {
    let mut command = Command::new("ip");
    command.args(["neigh", "show", &vip.to_string(), "dev", "eth0"]);
    String::from_utf8(lab.host("c").output(command).unwrap().stdout).unwrap()
}

fn text(mac: Mac) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

#[test]
fn an_announcement_moves_the_vip_at_once() {
    userns::privileged("an_announcement_moves_the_vip_at_once", || {
        let lab = Lab::new(LabOptions { replicas: 2 }).unwrap();
        for vip in VIPS {
            let mut old = owner(lab.host("r1"), vip);
            std::thread::scope(|scope| {
                let pinger = scope.spawn(|| lab.host("c").enter(|| ping(vip)));
                run(&mut old, |_, _| pinger.is_finished());
                assert!(pinger.join().unwrap());
            });
            assert!(neighbour(&lab, vip).contains(&text(old.mac())));
            // The new owner's burst begins by itself; the old one, unaware, defends itself.
            let mut new = owner(lab.host("r2"), vip);
            assert!(new.poll_timeout().is_some_and(|at| at <= BootTime::now()));
            new.handle_timeout(BootTime::now());
            assert_eq!(new.flush(&mut Vec::new()).unwrap(), Flushed::All);
            let mac = text(new.mac());
            wait_until("new neighbour", SOON, || {
                neighbour(&lab, vip).contains(&mac)
            })
            .unwrap();
            run(&mut old, |_, _| true);
            assert!(old.counters().foreign_claims > 0, "{:?}", old.counters());
        }
    });
}

#[test]
fn stale_frames_are_discarded() {
    userns::privileged("stale_frames_are_discarded", || {
        const STALE: u16 = 99;
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let mut wire = open(lab.host("r1"), VIPS[0]).unwrap();
        let mut sender = owner(lab.host("c"), "10.98.0.200".parse().unwrap());
        let (to, mac) = (SocketAddr::new(VIPS[0], 2), wire.mac());
        let mut send = |port: u16| {
            let from = SocketAddr::new(sender.vip(), port);
            let (payload, checksum_right) = (Vec::new(), true);
            let tcp = Tcp {
                from,
                to,
                seq: 3,
                ack: 4,
                flags: ACK,
                payload,
                checksum_right,
            };
            sender.send(tcp.build(mac, None, true));
            assert_eq!(sender.flush(&mut Vec::new()).unwrap(), Flushed::All);
        };
        (1..=STALE).for_each(&mut send);
        // Delivery on a virtual link is not instantaneous: until all are in.
        wait_until("stale frames", SOON, || {
            wire.discard_input();
            wire.counters().discarded == u64::from(STALE)
        })
        .unwrap();
        send(1000);
        run(&mut wire, |frame, _| {
            let Some(Frame {
                kind: Kind::Ip(packet),
                ..
            }) = frame
            else {
                return false;
            };
            assert_eq!(Tcp::parse(packet).unwrap().from.port(), 1000);
            true
        });
    });
}

#[test]
fn what_stands_in_the_way_is_named() {
    userns::privileged("what_stands_in_the_way_is_named", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let r1 = lab.host("r1");
        let on = |interface: &str| {
            r1.enter(|| Wire::open(&Options::new(interface, VIPS[0])))
                .unwrap_err()
        };
        let says = |error: WireError, part: &str| {
            let message = error.to_string();
            assert!(message.contains(part), "{message}");
        };
        for name in ["eth7", "a-name-that-is-far-too-long", ""] {
            let error = on(name);
            assert!(matches!(error, WireError::NoInterface { .. }), "{error:?}");
            says(error, &format!("{name:?}"));
        }
        says(on("lo"), "\"lo\" is not an Ethernet");
        for own in [r1.address().into(), r1.address6().into()] {
            let error = open(r1, own).unwrap_err();
            says(error, &format!("owns {own} (on interface \"eth0\")"));
        }
        let error = r1.enter(|| {
            let none = CapabilitySet::empty();
            let sets = CapabilitySets {
                effective: none,
                permitted: none,
                inheritable: none,
            };
            rustix::thread::set_capabilities(None, sets).unwrap();
            Wire::open(&Options::new("eth0", VIPS[0])).unwrap_err()
        });
        says(error, "CAP_NET_RAW");
        r1.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap());
        let error = open(r1, VIPS[1]).unwrap_err();
        says(error, "IPv6 is disabled on interface \"eth0\"");
        // With nothing in its way it opens, and knows its link.
        let wire = open(r1, VIPS[0]).unwrap();
        assert!(wire.has_carrier().unwrap());
        lab.cut("r1").unwrap();
        wait_until("loss of carrier", SOON, || !wire.has_carrier().unwrap()).unwrap();
    });
}
