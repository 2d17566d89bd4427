//! A small vocabulary named from the wire: what the peer sends, what we expect.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared: each test uses a part of it"
)]

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpSlice, PacketBuilder, TcpOptionElement, TcpSlice};
use unbroken_tcpstate::{
    Checksum, Config, ConnId, Event, EventNo, Instant, LinkAddr, Output, Packet, Secrets,
    ServiceClock, Stack,
};

pub const LINK: LinkAddr = LinkAddr([2, 0, 0, 0, 0, 9]);

/// A segment, either way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seg {
    pub flags: &'static str,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    pub mss: Option<u16>,
    pub shift: Option<u8>,
    pub sack_permitted: bool,
    pub ts: Option<(u32, u32)>,
    pub sack: Vec<(u32, u32)>,
    pub payload: Vec<u8>,
}

/// What came out, in order.
#[derive(Debug)]
pub enum Out {
    Seg(Seg),
    Event(u64, Event),
    Room(ConnId),
    Notice,
}

/// A stack with a peer at 49500, and a clock.
pub struct Bench {
    pub stack: Stack,
    pub now: Instant,
    pub vip: IpAddr,
    pub peer: SocketAddr,
    pub log: Vec<Event>,
    pub packets: Vec<Packet>,
}

pub fn secrets() -> Secrets {
    Secrets::new(8, &[1; 32])
}

pub fn config(ipv6: bool) -> Config {
    let vip: IpAddr = if ipv6 { "fd00::100" } else { "10.0.0.100" }
        .parse()
        .unwrap();
    let mut config = Config::new(vip, [80]);
    config.receive_capacity = 65_536;
    config.transmit_capacity = 65_536;
    config
}

impl Bench {
    pub fn new(config: Config) -> Self {
        let now = Instant::from_millis(1_000);
        let stack = Stack::new(config.clone(), secrets(), now, clock(), EventNo(1));
        Self::with(stack, &config, now)
    }

    pub fn with(stack: Stack, config: &Config, now: Instant) -> Self {
        let peer: IpAddr = if config.vip.is_ipv6() {
            "fd00::9"
        } else {
            "10.0.0.9"
        }
        .parse()
        .unwrap();
        Self {
            stack,
            now,
            vip: config.vip,
            peer: SocketAddr::new(peer, 49_500),
            log: Vec::new(),
            packets: Vec::new(),
        }
    }

    /// The peer sends.
    pub fn peer_sends(&mut self, seg: Seg) -> Vec<Out> {
        self.peer_sends_to(80, seg)
    }

    pub fn peer_sends_to(&mut self, port: u16, seg: Seg) -> Vec<Out> {
        let packet = build(self.peer, SocketAddr::new(self.vip, port), &seg);
        self.stack
            .handle_packet(self.now, &packet, LINK, Checksum::Verify);
        self.drain()
    }

    /// Backups hold everything so far.
    pub fn stable(&mut self) -> Vec<Out> {
        let all = EventNo(self.stack.next_event().0 - 1);
        self.stack.handle_stable(self.now, all);
        self.drain()
    }

    pub fn server_says(&mut self, conn: ConnId, bytes: &[u8], tag: u64) -> Vec<Out> {
        self.stack
            .handle_server_bytes(self.now, conn, bytes, EventNo(tag));
        self.drain()
    }

    /// Time passes; everything that falls due is served on the way.
    pub fn at(&mut self, ms: u64) -> Vec<Out> {
        let end = Instant::from_millis(ms);
        let mut out = Vec::new();
        while let Some(at) = self.stack.poll_timeout().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.stack.handle_timeout(self.now);
            out.extend(self.drain());
        }
        self.now = end;
        out
    }

    pub fn drain(&mut self) -> Vec<Out> {
        let mut out = Vec::new();
        while let Some(output) = self.stack.poll_output() {
            out.push(match output {
                Output::Transmit(packet) => {
                    assert_eq!(packet.next_hop, LINK);
                    let seg = parse(packet.ip(), !packet.partial_checksum);
                    self.packets.push(packet);
                    Out::Seg(seg)
                }
                Output::Replicate { number, event } => {
                    self.log.push(event.clone());
                    Out::Event(number.0, event)
                }
                Output::Room(conn) => Out::Room(conn),
                Output::Notice(_) => Out::Notice,
            });
        }
        out
    }

    /// A handshake with the usual options; everything stable. Gives the ISS.
    pub fn open(&mut self, irs: u32) -> (ConnId, u32) {
        let syn_ack = one_seg(self.peer_sends(Seg { seq: irs, ..SYN }));
        let out = self.peer_sends(Seg {
            seq: irs + 1,
            ack: syn_ack.seq.wrapping_add(1),
            ..ACK
        });
        let conn = match &out[..] {
            [Out::Event(number, Event::Open { .. })] => ConnId(*number),
            other => panic!("not one Open: {other:?}"),
        };
        self.stable();
        (conn, syn_ack.seq)
    }
}

pub fn clock() -> ServiceClock {
    ServiceClock {
        at: Instant::from_millis(1_000),
        value_us: 640_000_000,
    }
}

pub const SYN: Seg = Seg {
    flags: "S",
    seq: 0,
    ack: 0,
    window: 64_000,
    mss: Some(1460),
    shift: Some(7),
    sack_permitted: true,
    ts: Some((500, 0)),
    sack: Vec::new(),
    payload: Vec::new(),
};

pub const ACK: Seg = Seg {
    flags: "A",
    seq: 0,
    ack: 0,
    window: 500,
    mss: None,
    shift: None,
    sack_permitted: false,
    ts: Some((501, 0)),
    sack: Vec::new(),
    payload: Vec::new(),
};

pub fn build(from: SocketAddr, to: SocketAddr, seg: &Seg) -> Vec<u8> {
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => PacketBuilder::ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => PacketBuilder::ipv6(a.octets(), b.octets(), 64),
        _ => panic!("one family"),
    };
    let mut tcp = ip.tcp(from.port(), to.port(), seg.seq, seg.window);
    for flag in seg.flags.chars() {
        tcp = match flag {
            'S' => tcp.syn(),
            'A' => tcp.ack(seg.ack),
            'F' => tcp.fin(),
            'R' => tcp.rst(),
            'P' => tcp.psh(),
            other => panic!("flag {other}"),
        };
    }
    let mut options = Vec::new();
    options.extend(seg.mss.map(TcpOptionElement::MaximumSegmentSize));
    options.extend(seg.shift.map(TcpOptionElement::WindowScale));
    if seg.sack_permitted {
        options.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
    }
    options.extend(seg.ts.map(|(v, e)| TcpOptionElement::Timestamp(v, e)));
    if let Some(first) = seg.sack.first() {
        options.push(TcpOptionElement::SelectiveAcknowledgement(
            *first, [None; 3],
        ));
    }
    let tcp = tcp.options(&options).unwrap();
    let mut packet = Vec::new();
    tcp.write(&mut packet, &seg.payload).unwrap();
    packet
}

pub fn parse(packet: &[u8], whole_checksum: bool) -> Seg {
    let ip = IpSlice::from_slice(packet).unwrap();
    let tcp = TcpSlice::from_slice(ip.payload().payload).unwrap();
    if whole_checksum {
        let expected = match &ip {
            IpSlice::Ipv4(ip) => {
                tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())
            }
            IpSlice::Ipv6(ip) => {
                tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination())
            }
        };
        assert_eq!(tcp.checksum(), expected.unwrap());
    }
    let flags = match (tcp.syn(), tcp.fin(), tcp.rst(), tcp.psh(), tcp.ack()) {
        (true, false, false, false, true) => "SA",
        (false, true, false, _, true) => "FA",
        (false, false, true, false, false) => "R",
        (false, false, true, false, true) => "RA",
        (false, false, false, _, true) => "A",
        other => panic!("flags {other:?}"),
    };
    let mut seg = Seg {
        flags,
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        window: tcp.window_size(),
        payload: tcp.payload().to_vec(),
        ..Seg::default()
    };
    for option in tcp.options_iterator() {
        match option.unwrap() {
            TcpOptionElement::MaximumSegmentSize(m) => seg.mss = Some(m),
            TcpOptionElement::WindowScale(s) => seg.shift = Some(s),
            TcpOptionElement::SelectiveAcknowledgementPermitted => seg.sack_permitted = true,
            TcpOptionElement::SelectiveAcknowledgement(first, rest) => {
                seg.sack = std::iter::once(first)
                    .chain(rest.into_iter().flatten())
                    .collect();
            }
            TcpOptionElement::Timestamp(v, e) => seg.ts = Some((v, e)),
            TcpOptionElement::Noop => {}
        }
    }
    seg
}

pub fn segs(out: Vec<Out>) -> Vec<Seg> {
    out.into_iter()
        .filter_map(|o| if let Out::Seg(s) = o { Some(s) } else { None })
        .collect()
}

pub fn events(out: &[Out]) -> Vec<&Event> {
    out.iter()
        .filter_map(|o| {
            if let Out::Event(_, e) = o {
                Some(e)
            } else {
                None
            }
        })
        .collect()
}

/// Exactly one segment, and nothing else of note.
pub fn one_seg(out: Vec<Out>) -> Seg {
    let text = format!("{out:?}");
    let mut segs = segs(out);
    assert_eq!(segs.len(), 1, "{text}");
    segs.remove(0)
}

pub fn nothing(out: Vec<Out>) {
    assert!(out.is_empty(), "{out:?}");
}
