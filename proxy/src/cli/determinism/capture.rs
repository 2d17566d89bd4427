//! A capture file as input: the clients' side of its TCP connections, in the order of the capture.
//!
//! What a client says after it has seen an answer is given after the answer: its ACK field says how much
//! of it it had seen.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek as _};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use etherparse::{EtherType, LaxNetSlice, LaxSlicedPacket, TcpSlice, TransportSlice};
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};

use super::script::{Input, Step, Until};

/// Most bytes of clients that are replayed.
const INPUT_BYTES_MAX: usize = 1 << 30;
/// First block of a pcapng file (the same in either byte order).
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// Reads a capture, pcap or pcapng; only connections to server port `port`, if one is given.
///
/// # Errors
/// It cannot be read, or no connection in it can be replayed.
pub(super) fn read(path: &Path, port: Option<u16>) -> anyhow::Result<Input> {
    let mut flows = Flows {
        port,
        ..Flows::default()
    };
    read_packets(path, &mut flows).with_context(|| format!("the capture {}", path.display()))?;
    let input = flows.finish();
    ensure!(
        !input.names.is_empty(),
        "the capture {} holds no TCP connection from its beginning{}",
        path.display(),
        port.map_or(String::new(), |p| format!(" to port {p}"))
    );
    Ok(input)
}

fn read_packets(path: &Path, flows: &mut Flows) -> anyhow::Result<()> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    file.rewind()?;
    let file = BufReader::new(file);
    if magic == PCAPNG_MAGIC {
        let mut reader = PcapNgReader::new(file)?;
        let mut links: Vec<DataLink> = Vec::new();
        while let Some(block) = reader.next_block() {
            match block? {
                // Interfaces are counted anew in each section.
                Block::SectionHeader(_) => links.clear(),
                Block::InterfaceDescription(interface) => links.push(interface.linktype),
                Block::EnhancedPacket(packet) => {
                    let link = usize::try_from(packet.interface_id)
                        .ok()
                        .and_then(|i| links.get(i));
                    let link = link.context("a packet of an interface that is not described")?;
                    flows.packet(*link, &packet.data)?;
                }
                Block::SimplePacket(packet) => {
                    let link = links.first().context("a packet before any interface")?;
                    flows.packet(*link, &packet.data)?;
                }
                _ => {}
            }
        }
    } else {
        let mut reader = PcapReader::new(file)?;
        let link = reader.header().datalink;
        while let Some(packet) = reader.next_packet() {
            flows.packet(link, &packet?.data)?;
        }
    }
    Ok(())
}

/// A client's end and its server's.
type Ends = (SocketAddr, SocketAddr);

/// The connections of a capture as they come about.
#[derive(Default)]
struct Flows {
    port: Option<u16>,
    live: HashMap<Ends, Flow>,
    input: Input,
    bytes: usize,
    /// Packets of connections whose beginning was not captured.
    strays: u64,
    cut_off: u64,
    fragments: u64,
}

/// One connection, as far as its client's side goes.
struct Flow {
    conn: usize,
    /// Sequence number of the client's first byte.
    first: u32,
    /// Bytes in order so far.
    next: u64,
    /// What came too early, by offset.
    early: BTreeMap<u64, Bytes>,
    /// Offset behind the last byte, once the client has closed.
    end: Option<u64>,
    closed: bool,
    /// Sequence number of the server's first byte, once its SYN was seen.
    server_first: Option<u32>,
    /// How much of the server's output has been awaited.
    awaited: u64,
}

impl Flows {
    fn packet(&mut self, link: DataLink, data: &[u8]) -> anyhow::Result<()> {
        let Some(packet) = slice(link, data)? else {
            return Ok(());
        };
        let (source, destination, incomplete) = match &packet.net {
            Some(LaxNetSlice::Ipv4(ip)) => (
                IpAddr::from(ip.header().source_addr()),
                IpAddr::from(ip.header().destination_addr()),
                ip.payload(),
            ),
            Some(LaxNetSlice::Ipv6(ip)) => (
                IpAddr::from(ip.header().source_addr()),
                IpAddr::from(ip.header().destination_addr()),
                ip.payload(),
            ),
            _ => return Ok(()),
        };
        if incomplete.fragmented {
            self.fragments += 1;
            return Ok(());
        }
        let incomplete = incomplete.incomplete;
        if let Some(TransportSlice::Tcp(tcp)) = &packet.transport {
            let from = SocketAddr::new(source, tcp.source_port());
            let to = SocketAddr::new(destination, tcp.destination_port());
            self.segment(from, to, tcp, incomplete)?;
        }
        Ok(())
    }

    fn segment(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        tcp: &TcpSlice<'_>,
        incomplete: bool,
    ) -> anyhow::Result<()> {
        if tcp.syn() && !tcp.ack() {
            if self.port.is_none_or(|port| port == to.port()) {
                self.open((from, to), tcp.sequence_number());
            }
            return Ok(());
        }
        if let Some(flow) = self.live.get_mut(&(to, from)) {
            if tcp.syn() {
                flow.server_first = Some(tcp.sequence_number().wrapping_add(1));
            }
            return Ok(());
        }
        let Some(flow) = self.live.get_mut(&(from, to)) else {
            self.strays += 1;
            return Ok(());
        };
        let steps = &mut self.input.steps;
        if tcp.rst() {
            steps.push((0, Step::Reset(flow.conn)));
            self.live.remove(&(from, to));
            return Ok(());
        }
        // Offsets near the one expected: a stream may be longer than sequence numbers reach.
        let expected = flow.first.wrapping_add(low_bits(flow.next));
        let ahead = tcp.sequence_number().wrapping_sub(expected).cast_signed();
        let Some(offset) = flow.next.checked_add_signed(i64::from(ahead)) else {
            return Ok(());
        };
        let payload = tcp.payload();
        if incomplete && !payload.is_empty() {
            // Its tail is missing, and with it the place of all that follows.
            self.cut_off += 1;
            return Ok(());
        }
        if tcp.fin() {
            flow.end = Some(offset + payload.len() as u64);
        }
        self.bytes += payload.len();
        ensure!(
            self.bytes <= INPUT_BYTES_MAX,
            "clients sent more than {INPUT_BYTES_MAX} bytes in it; cut it into smaller ones"
        );
        if !payload.is_empty() && offset + payload.len() as u64 > flow.next {
            flow.early.insert(offset, Bytes::copy_from_slice(payload));
        }
        let seen = match flow.server_first {
            Some(first) if tcp.ack() => {
                let known = first.wrapping_add(low_bits(flow.awaited));
                let more = tcp
                    .acknowledgment_number()
                    .wrapping_sub(known)
                    .cast_signed();
                flow.awaited.saturating_add_signed(i64::from(more.max(0)))
            }
            _ => flow.awaited,
        };
        flow.advance(seen, steps);
        Ok(())
    }

    fn open(&mut self, ends: Ends, iss: u32) {
        let first = iss.wrapping_add(1);
        if self.live.get(&ends).is_some_and(|flow| flow.first == first) {
            // The SYN was sent again.
            return;
        }
        let conn = self.input.names.len();
        self.input.names.push(ends.0.to_string());
        self.input.steps.push((0, Step::Open(conn)));
        let flow = Flow {
            conn,
            first,
            next: 0,
            early: BTreeMap::new(),
            end: None,
            closed: false,
            server_first: None,
            awaited: 0,
        };
        if let Some(old) = self.live.insert(ends, flow) {
            self.input.notes.extend(old.gap(&self.input.names));
        }
    }

    fn finish(mut self) -> Input {
        let mut gaps: Vec<_> = self.live.values().collect();
        gaps.sort_by_key(|flow| flow.conn);
        for flow in gaps {
            self.input.notes.extend(flow.gap(&self.input.names));
        }
        for (count, what) in [
            (
                self.strays,
                "packets of connections that began before the capture were left out",
            ),
            (
                self.cut_off,
                "packets were captured in part and left out: capture with tcpdump -s 0",
            ),
            (self.fragments, "IP fragments were left out"),
        ] {
            if count > 0 {
                self.input.notes.push(format!("{count} {what}"));
            }
        }
        self.input
    }
}

impl Flow {
    /// Gives on what is in order by now.
    fn advance(&mut self, seen: u64, steps: &mut Vec<(usize, Step)>) {
        while let Some(entry) = self.early.first_entry() {
            let offset = *entry.key();
            if offset > self.next {
                break;
            }
            let bytes = entry.remove();
            let known = usize::try_from(self.next - offset).expect("segments are short");
            if known < bytes.len() {
                self.wait(seen, steps);
                self.next += (bytes.len() - known) as u64;
                steps.push((0, Step::Send(self.conn, bytes.slice(known..))));
            }
        }
        if self.end == Some(self.next) && !self.closed {
            self.closed = true;
            self.wait(seen, steps);
            steps.push((0, Step::Close(self.conn)));
        }
    }

    fn wait(&mut self, seen: u64, steps: &mut Vec<(usize, Step)>) {
        if seen > self.awaited {
            // The server's FIN counts as one; whoever waits for a byte too much stops at the end.
            self.awaited = seen;
            steps.push((0, Step::Await(self.conn, Until::Seen(seen))));
        }
    }

    /// What people are told if some of its bytes are missing.
    fn gap(&self, names: &[String]) -> Option<String> {
        let name = &names[self.conn];
        (!self.early.is_empty()).then(|| {
            format!(
                "{name}: bytes at offset {} were not captured; replayed up to there",
                self.next
            )
        })
    }
}

fn low_bits(offset: u64) -> u32 {
    u32::try_from(offset & u64::from(u32::MAX)).expect("it was masked")
}

/// Takes a packet apart; `None` if it is no IP packet that can be read.
fn slice(link: DataLink, data: &[u8]) -> anyhow::Result<Option<LaxSlicedPacket<'_>>> {
    let ether = |at: usize, rest: usize| {
        let kind = data.get(at..at + 2)?;
        let kind = EtherType(u16::from_be_bytes([kind[0], kind[1]]));
        Some(LaxSlicedPacket::from_ether_type(kind, data.get(rest..)?))
    };
    Ok(match link {
        DataLink::ETHERNET => LaxSlicedPacket::from_ethernet(data).ok(),
        DataLink::LINUX_SLL => ether(14, 16),
        DataLink::LINUX_SLL2 => ether(0, 20),
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => LaxSlicedPacket::from_ip(data).ok(),
        DataLink::NULL | DataLink::LOOP => data
            .get(4..)
            .and_then(|packet| LaxSlicedPacket::from_ip(packet).ok()),
        other => bail!(
            "its link type is {other:?}; Ethernet, Linux cooked, raw IP and loopback can be read"
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::time::Duration;

    use etherparse::PacketBuilder;
    use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;

    use super::*;

    const CLIENT: u16 = 40_000;
    const SERVER: u16 = 80;

    enum From {
        Client,
        Server,
    }

    /// One frame; numbers are relative to both sides' SYN.
    fn frame(from: &From, flags: &str, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
        let (client_iss, server_iss) = (u32::MAX - 2, 77_u32);
        let builder = PacketBuilder::ethernet2([1; 6], [2; 6]);
        let mut tcp = match from {
            From::Client => builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).tcp(
                CLIENT,
                SERVER,
                client_iss.wrapping_add(seq),
                1000,
            ),
            From::Server => builder.ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64).tcp(
                SERVER,
                CLIENT,
                server_iss.wrapping_add(seq),
                1000,
            ),
        };
        for flag in flags.chars() {
            tcp = match flag {
                'S' => tcp.syn(),
                'A' => tcp.ack(match from {
                    From::Client => server_iss.wrapping_add(ack),
                    From::Server => client_iss.wrapping_add(ack),
                }),
                'F' => tcp.fin(),
                _ => tcp.rst(),
            };
        }
        let mut bytes = Vec::new();
        tcp.write(&mut bytes, payload).unwrap();
        bytes
    }

    fn conversation() -> Vec<Vec<u8>> {
        use From::{Client, Server};
        vec![
            // Of a connection that began earlier.
            frame(&Server, "A", 900, 900, b"stray"),
            frame(&Client, "S", 0, 0, b""),
            frame(&Client, "S", 0, 0, b""),
            frame(&Server, "SA", 0, 1, b""),
            frame(&Client, "A", 1, 1, b""),
            // Out of order, over the wrap of the sequence numbers, and one twice.
            frame(&Client, "A", 4, 1, b"lo"),
            frame(&Client, "A", 1, 1, b"hel"),
            frame(&Client, "A", 1, 1, b"hell"),
            frame(&Server, "A", 1, 6, b"answer"),
            frame(&Client, "A", 6, 7, b"more"),
            frame(&Client, "FA", 10, 7, b""),
            frame(&Server, "FA", 7, 11, b""),
        ]
    }

    fn expected() -> Vec<Step> {
        vec![
            Step::Open(0),
            Step::Send(0, Bytes::from_static(b"hel")),
            Step::Send(0, Bytes::from_static(b"lo")),
            Step::Await(0, Until::Seen(6)),
            Step::Send(0, Bytes::from_static(b"more")),
            Step::Close(0),
        ]
    }

    fn read_bytes(name: &str, bytes: &[u8], port: Option<u16>) -> anyhow::Result<Input> {
        let path = std::env::temp_dir().join(format!("unbroken-{name}-{}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let input = read(&path, port);
        std::fs::remove_file(&path).unwrap();
        input
    }

    fn steps(input: &Input) -> Vec<Step> {
        input.steps.iter().map(|(_, step)| step.clone()).collect()
    }

    fn pcap() -> Vec<u8> {
        let header = PcapHeader {
            datalink: DataLink::ETHERNET,
            ..PcapHeader::default()
        };
        let mut writer = PcapWriter::with_header(Vec::new(), header).unwrap();
        for frame in conversation() {
            let length = u32::try_from(frame.len()).unwrap();
            let packet = PcapPacket::new(Duration::ZERO, length, &frame);
            writer.write_packet(&packet).unwrap();
        }
        writer.into_writer()
    }

    #[test]
    fn reassembles_the_clients_side() {
        let input = read_bytes("classic.pcap", &pcap(), None).unwrap();
        assert_eq!(steps(&input), expected());
        assert_eq!(input.names, ["10.0.0.1:40000"]);
        assert_eq!(
            input.notes,
            ["1 packets of connections that began before the capture were left out"]
        );
        assert!(read_bytes("port.pcap", &pcap(), Some(SERVER)).is_ok());
        let error = read_bytes("other.pcap", &pcap(), Some(81)).unwrap_err();
        assert!(error.to_string().contains("to port 81"), "{error}");
    }

    #[test]
    fn reads_pcapng() {
        let mut writer = PcapNgWriter::new(Vec::new()).unwrap();
        let interface = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: Vec::new(),
        };
        writer.write_pcapng_block(interface).unwrap();
        for frame in conversation() {
            let block = EnhancedPacketBlock {
                interface_id: 0,
                timestamp: Duration::ZERO,
                original_len: u32::try_from(frame.len()).unwrap(),
                data: Cow::Owned(frame),
                options: Vec::new(),
            };
            writer.write_pcapng_block(block).unwrap();
        }
        let input = read_bytes("new.pcapng", &writer.into_inner(), None).unwrap();
        assert_eq!(steps(&input), expected());
    }

    #[test]
    fn says_what_is_missing() {
        let header = PcapHeader {
            datalink: DataLink::ETHERNET,
            ..PcapHeader::default()
        };
        let mut writer = PcapWriter::with_header(Vec::new(), header).unwrap();
        let frames = [
            frame(&From::Client, "S", 0, 0, b""),
            frame(&From::Client, "A", 1, 1, b"one"),
            frame(&From::Client, "A", 9, 1, b"three"),
        ];
        for frame in &frames {
            let length = u32::try_from(frame.len()).unwrap();
            let packet = PcapPacket::new(Duration::ZERO, length, frame);
            writer.write_packet(&packet).unwrap();
        }
        let input = read_bytes("gap.pcap", &writer.into_writer(), None).unwrap();
        assert_eq!(
            input.notes,
            ["10.0.0.1:40000: bytes at offset 3 were not captured; replayed up to there"]
        );
        assert!(read_bytes("no.pcap", b"no capture at all, really not", None).is_err());
    }
}
