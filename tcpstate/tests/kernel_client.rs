//! The same with the kernel's TCP as the client: it shares none of our library's blind spots.
//!
//! In a network namespace of its own (as root, or in a user namespace): a veth pair, one end with an
//! address for the kernel's sockets, the other read and written by the replicas. The leader dies at
//! random moments, again and again; a fresh replica joins from a snapshot each time.
#![allow(clippy::cast_possible_truncation, reason = "small numbers, in tests")]
#![allow(clippy::disallowed_methods, reason = "real clients, in real time")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "sim/app.rs"]
mod app;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant as Clock};

use app::{App, Server, pattern};
use pnet::datalink::{self, Channel, DataLinkSender};
use unbroken_tcpstate::{
    Checksum, Config, ConnId, Event, EventNo, Instant, LinkAddr, Output, Replica, Secrets,
    ServiceClock, Stack,
};

const INSIDE: &str = "UNBROKEN_TEST_INSIDE_NAMESPACE";
const BYTES: u64 = 6_000_000;
const CRASHES: usize = 12;

fn sh(line: &str) {
    let status = Command::new("sh")
        .args(["-c", line])
        .status()
        .expect("a shell");
    assert!(status.success(), "{line}");
}

#[test]
fn kernel_clients_survive_every_leader() {
    if std::env::var_os(INSIDE).is_none() {
        // Again, in a namespace that goes away by itself.
        let me = std::env::current_exe().unwrap();
        let status = Command::new("unshare")
            .args(["-r", "-n", "--kill-child", "-f"])
            .arg(me)
            .args([
                "--exact",
                "kernel_clients_survive_every_leader",
                "--nocapture",
            ])
            .env(INSIDE, "1")
            .status()
            .expect("unshare (util-linux)");
        assert!(status.success());
        return;
    }
    sh("ip link set lo up
        ip link add client type veth peer name wire
        ip link set client address 02:00:00:00:00:02
        ip link set wire address 02:00:00:00:00:01
        sysctl -qw net.ipv6.conf.client.accept_dad=0
        ip addr add 10.0.0.2/24 dev client
        ip link set client up
        ip link set wire up
        ip addr add fd00::2/64 dev client nodad
        ip neigh add 10.0.0.100 lladdr 02:00:00:00:00:01 dev client nud permanent
        ip neigh add fd00::100 lladdr 02:00:00:00:00:01 dev client nud permanent");
    for vip in ["10.0.0.100", "fd00::100"] {
        crash_under(vip.parse().unwrap());
    }
}

fn crash_under(vip: IpAddr) {
    let (done, finished) = channel();
    let mut clients = Vec::new();
    for which in 0..3usize {
        let done = done.clone();
        clients.push(std::thread::spawn(move || {
            match which {
                0 => download(vip),
                1 => upload(vip),
                _ => echo(vip),
            }
            done.send(which).unwrap();
        }));
    }
    drop(done);
    Cluster::new(vip).run(&finished);
    for client in clients {
        client.join().expect("a client found an error");
    }
}

fn connect(vip: IpAddr, port: u16) -> TcpStream {
    let stream = TcpStream::connect_timeout(&SocketAddr::new(vip, port), Duration::from_secs(20))
        .expect("the VIP answers");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Downloads until the cluster has had its crashes.
fn download(vip: IpAddr) {
    for _ in 0..4 {
        let mut stream = connect(vip, 7001);
        stream.write_all(b"GET file").unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got.len() as u64, BYTES);
        assert!(
            got.iter()
                .enumerate()
                .all(|(i, b)| *b == pattern(i as u64, 0x5a))
        );
    }
}

fn upload(vip: IpAddr) {
    for _ in 0..4 {
        let bytes: Vec<u8> = (0..BYTES).map(|o| pattern(o, 0x33)).collect();
        let mut stream = connect(vip, 7003);
        stream.write_all(&bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, Server::whole_answer(App::Upload, &bytes));
    }
}

fn echo(vip: IpAddr) {
    let mut stream = connect(vip, 7002);
    for round in 0..2_500u64 {
        let question: Vec<u8> = (0..64 + round % 1000).map(|o| pattern(o, round)).collect();
        stream.write_all(&question).unwrap();
        let mut answer = vec![0; question.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, question, "round {round}");
    }
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

fn app_of(port: u16) -> App {
    match port {
        7001 => App::Download {
            bytes: BYTES,
            asks: true,
            closes: true,
        },
        7002 => App::Echo,
        _ => App::Upload,
    }
}

#[derive(Default)]
struct Servers(BTreeMap<ConnId, Server>);

impl Servers {
    fn take(&mut self, number: EventNo, event: &Event) -> Option<ConnId> {
        if let Event::Open { state } = event {
            let conn = ConnId(number.0);
            self.0
                .insert(conn, Server::new(app_of(state.local_port()), number.0));
            return Some(conn);
        }
        let conn = event.conn()?;
        let server = self.0.get_mut(&conn)?;
        match event {
            Event::Data { bytes, .. } => server.input.extend_from_slice(bytes),
            Event::PeerFin { .. } => server.fin = true,
            Event::Reset { .. } | Event::Closed { .. } => {
                self.0.remove(&conn);
                return None;
            }
            _ => return None,
        }
        server.tag = number.0;
        Some(conn)
    }

    /// Another copy of every server, brought to the same point by replay.
    fn replayed(&self, ports: &BTreeMap<ConnId, u16>) -> Self {
        let copy = |(conn, server): (&ConnId, &Server)| {
            let mut fresh = Server::new(app_of(ports[conn]), server.tag);
            fresh.input.clone_from(&server.input);
            fresh.fin = server.fin;
            (*conn, fresh)
        };
        Self(self.0.iter().map(copy).collect())
    }
}

struct Cluster {
    config: Config,
    start: Clock,
    clock: ServiceClock,
    stack: Option<Stack>,
    servers: Servers,
    backup: Replica,
    backup_servers: Servers,
    next: EventNo,
    /// Events on their way to the backup.
    flying: Vec<(EventNo, Event)>,
    ports: BTreeMap<ConnId, u16>,
    sender: Box<dyn DataLinkSender>,
    frames: Receiver<Vec<u8>>,
    rng: u64,
}

fn secrets() -> Secrets {
    Secrets::new(0, &[9; 32])
}

impl Cluster {
    fn new(vip: IpAddr) -> Self {
        let mut config = Config::new(vip, [7001, 7002, 7003]);
        config.retained_output_max = 256 * 1024;
        let interface = datalink::interfaces()
            .into_iter()
            .find(|i| i.name == "wire")
            .expect("our end");
        let options = datalink::Config {
            read_buffer_size: 70_000,
            write_buffer_size: 70_000,
            ..datalink::Config::default()
        };
        let Ok(Channel::Ethernet(sender, mut receiver)) = datalink::channel(&interface, options)
        else {
            panic!("a packet socket");
        };
        let (send, frames) = channel();
        std::thread::spawn(move || {
            while let Ok(frame) = receiver.next() {
                if send.send(frame.to_vec()).is_err() {
                    break;
                }
            }
        });
        let clock = ServiceClock {
            at: Instant::default(),
            value_us: 1_000_000_000,
        };
        Self {
            stack: Some(Stack::new(
                config.clone(),
                secrets(),
                Instant::default(),
                clock,
                EventNo(1),
            )),
            backup: Replica::new(config.clone()),
            config,
            start: Clock::now(),
            clock,
            servers: Servers::default(),
            backup_servers: Servers::default(),
            next: EventNo(1),
            flying: Vec::new(),
            ports: BTreeMap::new(),
            sender,
            frames,
            rng: 0x1234_5678_9abc_def1,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(u64::try_from(self.start.elapsed().as_micros()).unwrap())
    }

    fn random(&mut self, below: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng >> 11) % below
    }

    fn run(mut self, finished: &Receiver<usize>) {
        let mut crash_at = Instant::from_millis(120);
        let mut crashes = 0;
        let mut left = 3;
        while left > 0 {
            left -= finished.try_iter().count();
            let mut now = self.now();
            if now >= crash_at && crashes < CRASHES {
                crashes += 1;
                let gap = [0, 5, 40, 120][self.random(4) as usize];
                self.crash(Duration::from_millis(gap));
                now = self.now();
                crash_at = now + Duration::from_millis(60 + self.random(250));
            }
            let stack = self.stack.as_mut().expect("a leader");
            let wait = stack
                .poll_timeout()
                .map_or(Duration::from_millis(5), |at| at.since(now));
            match self.frames.recv_timeout(wait.min(Duration::from_millis(5))) {
                Ok(frame) => {
                    self.receive(&frame);
                    for _ in 0..31 {
                        let Ok(frame) = self.frames.try_recv() else {
                            break;
                        };
                        self.receive(&frame);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("the wire is gone"),
            }
            let now = self.now();
            self.stack.as_mut().unwrap().handle_timeout(now);
            self.drain();
            self.replicate();
            self.serve();
        }
        println!(
            "{}: {crashes} leaders died, {:?}",
            self.config.vip,
            self.stack.unwrap().counters()
        );
    }

    fn receive(&mut self, frame: &[u8]) {
        let now = self.now();
        if frame.len() < 14 || frame[6..12] == [2, 0, 0, 0, 0, 1] {
            return;
        }
        let link = LinkAddr(frame[6..12].try_into().unwrap());
        // It never left this machine: its checksum is not filled in.
        let stack = self.stack.as_mut().unwrap();
        stack.handle_packet(now, &frame[14..], link, Checksum::Verified);
        self.drain();
    }

    fn drain(&mut self) {
        loop {
            let stack = self.stack.as_mut().unwrap();
            let Some(output) = stack.poll_output() else {
                return;
            };
            match output {
                Output::Transmit(packet) => {
                    let kind: u16 = if packet.ip()[0] >> 4 == 6 {
                        0x86dd
                    } else {
                        0x0800
                    };
                    let mut frame = packet.next_hop.0.to_vec();
                    frame.extend([2, 0, 0, 0, 0, 1]);
                    frame.extend(kind.to_be_bytes());
                    frame.extend_from_slice(packet.ip());
                    stack.recycle(packet.buf);
                    self.sender.send_to(&frame, None).unwrap().unwrap();
                }
                Output::Replicate { number, event } => {
                    assert_eq!(number, self.next);
                    self.next = number.next();
                    if let Event::Open { state } = &event {
                        self.ports.insert(ConnId(number.0), state.local_port());
                    }
                    let now = self.now();
                    if let Some(conn) = self.servers.take(number, &event) {
                        let at = self.servers.0[&conn].input.len() as u64;
                        self.stack.as_mut().unwrap().handle_consumed(now, conn, at);
                    }
                    self.flying.push((number, event));
                }
                Output::Room(_) | Output::Notice(_) => {}
            }
        }
    }

    /// The backup holds what is on its way, or some of it.
    fn replicate(&mut self) {
        let some = if self.random(4) == 0 {
            self.flying.len() / 2
        } else {
            self.flying.len()
        };
        self.hold(some);
        let Some(now) = self.backup_holds() else {
            return;
        };
        let at = self.now();
        self.stack.as_mut().unwrap().handle_stable(at, now);
        self.drain();
    }

    fn backup_holds(&self) -> Option<EventNo> {
        let first = self.flying.first().map_or(self.next, |(n, _)| *n);
        first.0.checked_sub(1).map(EventNo)
    }

    fn hold(&mut self, count: usize) {
        let now = self.now();
        for (number, event) in self.flying.drain(..count) {
            self.backup.apply(now, number, &event);
            self.backup_servers.take(number, &event);
        }
    }

    fn serve(&mut self) {
        let now = self.now();
        let conns: Vec<ConnId> = self.servers.0.keys().copied().collect();
        for conn in conns {
            loop {
                let stack = self.stack.as_mut().unwrap();
                let room = stack.output_room(conn);
                let Some(server) = self.servers.0.get_mut(&conn) else {
                    break;
                };
                let tag = EventNo(server.tag);
                let bytes = server.read(room.min(60_000));
                let (said, ends) = server.said();
                if !bytes.is_empty() {
                    stack.handle_server_bytes(now, conn, &bytes, tag);
                    self.drain();
                } else if ends && server.out == said && !server.end_told {
                    server.end_told = true;
                    stack.handle_server_fin(now, conn);
                    self.drain();
                } else {
                    break;
                }
            }
        }
        let conns: Vec<ConnId> = self.backup_servers.0.keys().copied().collect();
        for conn in conns {
            // A backup's server is behind, now and then.
            if self.random(3) == 0 {
                continue;
            }
            let server = self.backup_servers.0.get_mut(&conn).unwrap();
            loop {
                let bytes = server.read(self.backup.output_room(conn).min(60_000));
                if bytes.is_empty() {
                    break;
                }
                self.backup.handle_server_bytes(conn, &bytes);
            }
            let (said, ends) = server.said();
            if ends && server.out == said && !server.end_told {
                server.end_told = true;
                self.backup.handle_server_fin(conn);
            }
        }
    }

    /// The leader is gone; what was on its way reaches the backup in part.
    fn crash(&mut self, gap: Duration) {
        let reaches = self.random(self.flying.len() as u64 + 1) as usize;
        self.hold(reaches);
        self.next = EventNo(self.backup_holds().unwrap().0 + 1);
        self.flying.clear();
        self.stack = None;
        let until = Clock::now() + gap;
        // What the clients send meanwhile goes to nobody.
        while let Some(left) = until.checked_duration_since(Clock::now()) {
            let _ = self.frames.recv_timeout(left);
        }
        let _ = self.frames.try_iter().count();
        let now = self.now();
        self.clock = ServiceClock {
            at: now,
            value_us: self.clock.read_us(now) + 30_000,
        };
        let replica = std::mem::replace(&mut self.backup, Replica::new(self.config.clone()));
        let image = replica.snapshot(now);
        self.servers = std::mem::take(&mut self.backup_servers);
        self.backup_servers = self.servers.replayed(&self.ports);
        self.backup = Replica::restore(self.config.clone(), now, image);
        self.stack = Some(Stack::take_over(
            self.config.clone(),
            secrets(),
            now,
            self.clock,
            self.next,
            replica,
        ));
        self.drain();
    }
}
