//! The one door to the TCP library: a synthetic handshake, at any offset, any number of times.
//!
//! smoltcp has no way to be loaded from a checkpoint. So a fresh socket is walked through a handshake
//! fed from memory, as in FT-TCP and TCP splicing: a fabricated SYN with the negotiated options, its
//! SYN-ACK swallowed, a fabricated ACK. From then on its sequence numbers and those on the wire
//! differ by a constant, which [`Sender`] adds and takes away.
//!
//! The library only *sends*: segmentation, retransmission, the persist timer, the FIN. The client's
//! payload goes from the packet straight into the event log (`receive.rs`) and never through the
//! socket, which is fed fabricated ACKs alone. So the socket's receive half never moves, its window
//! and ACK never reach the wire, and every segment it emits gets its header from us.

use std::panic::{AssertUnwindSafe, catch_unwind};

use memmap2::MmapMut;
use smoltcp::iface::{Config as InterfaceConfig, Interface, PollResult, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as LibraryInstant;
use smoltcp::wire::HardwareAddress;

use crate::fault::planted;
use crate::mapped::MappedSocket;
use crate::output::HEADROOM;
use crate::segment::flag;
use crate::seq::SeqNum;
use crate::time::{Instant, low32};

/// The largest IP packet (of the library's, with a 20-byte IP header and timestamps) given to a
/// wire that segments: `45 * 1448 + 52`; larger ones are refused by some drivers [measured].
const SUPER_SEGMENT_MAX: usize = 45 * 1448 + 52;
/// The library's IPv4 header, overwritten by the real one.
const LIBRARY_IP_HEADER: usize = 20;
/// Emptied packet buffers kept for the next packets.
const POOL_BUFFERS_MAX: usize = 128;
/// Transmit buffers kept for the next connections.
const POOL_MAPPINGS_MAX: usize = 32;
/// Both ends of every connection, as the library sees it (RFC 5737 addresses). One socket set holds
/// one socket, so they need not differ.
const LIBRARY_LOCAL: ([u8; 4], u16) = ([192, 0, 2, 1], 1);
const LIBRARY_PEER: ([u8; 4], u16) = ([192, 0, 2, 2], 2);
/// The fabricated client's first sequence number behind its SYN. The socket receives nothing, so
/// this is RCV.NXT for ever.
const PEER_SEQ: u32 = 1;

/// The library panicked while it worked on one connection; that connection must be given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LibraryFault;

/// The one interface that all sockets share; it holds no connection's state.
pub(crate) struct Library {
    interface: Interface,
    device: Loop,
    /// Transmit buffers that sockets have left, for the next ones: mapping one and touching its
    /// first pages costs more than all else at the birth of a connection.
    mappings: Vec<MmapMut>,
}

impl Library {
    pub(crate) fn new(now: Instant, super_segments: bool) -> Self {
        let mut device = Loop::new(super_segments);
        let config = InterfaceConfig::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut device, library_time(now));
        interface.set_any_ip(true);
        Self {
            interface,
            device,
            mappings: Vec::new(),
        }
    }

    /// An empty buffer for a packet.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        self.device.pool.pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub(crate) fn recycle(&mut self, buf: Vec<u8>) {
        if self.device.pool.len() < POOL_BUFFERS_MAX {
            self.device.pool.push(buf);
        }
    }

    /// Takes a sender's buffer back.
    pub(crate) fn reclaim(&mut self, sender: Sender) {
        if self.mappings.len() < POOL_MAPPINGS_MAX {
            self.mappings.extend(sender.mapped.into_memory());
        }
    }

    fn feed(&mut self, now: Instant, set: &mut SocketSet<'static>, packet: Input) {
        self.device.input = Some(packet);
        self.interface
            .poll_ingress_single(library_time(now), &mut self.device, set);
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

fn library_time(now: Instant) -> LibraryInstant {
    LibraryInstant::from_micros(i64::try_from(now.micros()).unwrap_or(i64::MAX))
}

/// A segment as the socket emitted it: [`HEADROOM`], room for the IP header, the TCP header and the
/// payload. Its header is still the library's.
#[derive(Debug)]
pub(crate) struct Emitted {
    pub(crate) buf: Vec<u8>,
    /// Stream offset of the first payload byte (or of the FIN).
    pub(crate) offset: u64,
    pub(crate) payload_len: usize,
    pub(crate) fin: bool,
    pub(crate) push: bool,
}

/// What a sender is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// The largest segment without options.
    pub(crate) mss: u16,
    /// The client's window scale.
    pub(crate) peer_shift: u8,
    pub(crate) timestamps: bool,
    /// Bytes of the real IP header.
    pub(crate) ip_header_len: usize,
    /// Bytes of transmit buffer.
    pub(crate) capacity: usize,
}

/// The sending half of one connection.
#[derive(Debug)]
pub(crate) struct Sender {
    mapped: MappedSocket,
    terms: Terms,
    /// The socket's number of stream offset `base`.
    first: SeqNum,
    base: u64,
    /// Offset behind the last byte given to the socket.
    pushed: u64,
    /// What the socket was last told: SND.UNA as an offset, and the window field.
    una: u64,
    window: u16,
    closed: bool,
}

impl Sender {
    /// Makes a socket whose next byte is stream offset `una`, with nothing sent and nothing
    /// buffered, towards a client with `window` bytes of room.
    pub(crate) fn adopt(
        library: &mut Library,
        now: Instant,
        terms: Terms,
        una: u64,
        window: u64,
    ) -> Result<Self, LibraryFault> {
        let mut mapped = MappedSocket::new(terms.capacity, library.mappings.pop());
        let socket = mapped.socket_mut();
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        // Its own congestion control grows by one segment an ACK, whatever that acknowledges; ours
        // (recovery.rs) is the window it is told.
        socket.set_congestion_control(tcp::CongestionControl::None);
        socket.set_tsval_generator(terms.timestamps.then_some(no_tsval as fn() -> u32));
        socket.listen(LIBRARY_LOCAL.1).map_err(|_| LibraryFault)?;
        let mut sender = Self {
            mapped,
            terms,
            first: SeqNum(0),
            base: una,
            pushed: una,
            una,
            window: scaled(window, terms.peer_shift),
            closed: false,
        };
        let mut options = vec![2, 4];
        options.extend(terms.mss.to_be_bytes());
        options.extend([1, 3, 3, terms.peer_shift]);
        if terms.timestamps {
            options.extend([1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
        let syn = Input::new(flag::SYN, PEER_SEQ - 1, 0, u16::MAX, &options);
        library.device.ip_header_len = LIBRARY_IP_HEADER;
        library.device.discard_emitted();
        guarded(|| {
            library.feed(now, sender.mapped.set_mut(), syn);
            library.interface.poll_egress(
                library_time(now),
                &mut library.device,
                sender.mapped.set_mut(),
            );
        })?;
        let syn_ack = library.device.emitted.pop().ok_or(LibraryFault)?;
        let tcp = &syn_ack[HEADROOM + LIBRARY_IP_HEADER..];
        let iss = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        library.recycle(syn_ack);
        sender.first = SeqNum(iss).plus(1);
        sender.feed_ack(library, now, una, sender.window)?;
        match sender.mapped.socket().state() {
            tcp::State::Established => Ok(sender),
            _ => Err(LibraryFault),
        }
    }

    /// Bytes in the transmit buffer.
    pub(crate) fn queued(&self) -> usize {
        self.mapped.socket().send_queue()
    }

    /// Offset behind the last byte given to the socket, plus one for the FIN.
    pub(crate) fn end(&self) -> u64 {
        self.pushed + u64::from(self.closed)
    }

    /// Offset behind the last byte given to the socket.
    pub(crate) fn pushed(&self) -> u64 {
        self.pushed
    }

    /// SND.UNA as the socket knows it.
    pub(crate) fn una(&self) -> u64 {
        self.una
    }

    /// Whether the FIN was queued.
    pub(crate) fn closed(&self) -> bool {
        self.closed
    }

    /// Appends as many bytes as fit; returns how many.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> usize {
        let n = self.mapped.socket_mut().send_slice(bytes).unwrap_or(0);
        self.pushed += n as u64;
        n
    }

    /// Passes over `n` bytes that the client has already, before they are pushed. Only with an empty
    /// buffer: then the constant between the two sequence spaces may change.
    pub(crate) fn skip(&mut self, n: u64) {
        assert_eq!(
            self.una, self.pushed,
            "nothing is outstanding when bytes are passed over"
        );
        if !planted!(TranslationNotMoved) {
            self.first = self.first.plus(low32(self.una - self.base));
        }
        self.pushed += n;
        self.una = self.pushed;
        self.base = self.pushed;
    }

    /// Queues the FIN behind what was pushed.
    pub(crate) fn close(&mut self) {
        self.mapped.socket_mut().close();
        self.closed = true;
    }

    /// The client acknowledges everything before `offset`, and its window, with our congestion
    /// window applied, is `window` bytes beyond that.
    pub(crate) fn acknowledge(
        &mut self,
        library: &mut Library,
        now: Instant,
        offset: u64,
        window: u64,
    ) -> Result<(), LibraryFault> {
        let offset = offset.clamp(self.una, self.end());
        let field = scaled(window, self.terms.peer_shift);
        if offset == self.una && field == self.window {
            return Ok(());
        }
        self.feed_ack(library, now, offset, field)
    }

    /// Whether bytes (not only the FIN) are outstanding or waiting in the socket.
    pub(crate) fn has_bytes(&self) -> bool {
        self.una < self.pushed
    }

    /// Makes the socket send the segment at SND.UNA again: the third duplicate ACK does. A first ACK
    /// with another window makes it forget earlier duplicates. Not for a lone FIN: the library would
    /// drop its timer and never send it again.
    pub(crate) fn retransmit(
        &mut self,
        library: &mut Library,
        now: Instant,
    ) -> Result<(), LibraryFault> {
        let (una, window) = (self.una, self.window);
        self.feed_ack(library, now, una, window ^ 1)?;
        for _ in 0..4 {
            self.feed_ack(library, now, una, window)?;
        }
        Ok(())
    }

    fn feed_ack(
        &mut self,
        library: &mut Library,
        now: Instant,
        offset: u64,
        window: u16,
    ) -> Result<(), LibraryFault> {
        let ack = self.first.plus(low32(offset - self.base));
        let options: &[u8] = if self.terms.timestamps {
            &NO_TIMESTAMP
        } else {
            &[]
        };
        let input = Input::new(flag::ACK, PEER_SEQ, ack.0, window, options);
        guarded(|| library.feed(now, self.mapped.set_mut(), input))?;
        // Whatever it wanted to answer: our own layer has answered already.
        library.device.discard_emitted();
        self.una = offset;
        self.window = window;
        Ok(())
    }

    /// Collects what the socket wants to send now.
    pub(crate) fn poll(
        &mut self,
        library: &mut Library,
        now: Instant,
        into: &mut Vec<Emitted>,
    ) -> Result<(), LibraryFault> {
        library.device.ip_header_len = self.terms.ip_header_len;
        library.device.discard_emitted();
        guarded(|| {
            while library.interface.poll_egress(
                library_time(now),
                &mut library.device,
                self.mapped.set_mut(),
            ) == PollResult::SocketStateChanged
            {}
        })?;
        let start = HEADROOM + self.terms.ip_header_len;
        let buffers: Vec<_> = library.device.emitted.drain(..).collect();
        for buf in buffers {
            let tcp = &buf[start..];
            let header_len = usize::from(tcp[12] >> 4) * 4;
            let seq = SeqNum(u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]));
            let flags = tcp[13];
            let payload_len = tcp.len() - header_len;
            let fin = flags & flag::FIN != 0;
            if payload_len == 0 && !fin {
                library.recycle(buf);
                continue;
            }
            let una_seq = self.first.plus(low32(self.una - self.base));
            let offset = self
                .una
                .checked_add_signed(seq.distance(una_seq))
                .ok_or(LibraryFault)?;
            let push = flags & flag::PSH != 0;
            into.push(Emitted {
                buf,
                offset,
                payload_len,
                fin,
                push,
            });
        }
        Ok(())
    }

    /// When the socket wants to be polled.
    pub(crate) fn poll_at(&mut self, library: &mut Library, now: Instant) -> Option<Instant> {
        let at = library
            .interface
            .poll_at(library_time(now), self.mapped.set_mut())?;
        Some(Instant::from_micros(
            u64::try_from(at.total_micros()).unwrap_or(0),
        ))
    }
}

/// The window field for `window` bytes, rounded down.
fn scaled(window: u64, shift: u8) -> u16 {
    u16::try_from(window >> shift).unwrap_or(u16::MAX)
}

/// TSval is written at egress from the service clock; the library only needs to leave room.
fn no_tsval() -> u32 {
    0
}

const NO_TIMESTAMP: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];

/// Runs the library so that a panic inside it costs one connection and not the process.
fn guarded(f: impl FnOnce()) -> Result<(), LibraryFault> {
    // What is left behind is one connection's socket, which is dropped, and the device's queues,
    // which are emptied before each use.
    catch_unwind(AssertUnwindSafe(f)).map_err(|_| LibraryFault)
}

/// A fabricated header: IPv4, TCP, options.
#[derive(Debug, Clone, Copy)]
struct Input {
    bytes: [u8; 64],
    len: usize,
}

impl Input {
    fn new(flags: u8, seq: u32, ack: u32, window: u16, options: &[u8]) -> Self {
        let mut bytes = [0; 64];
        let len = 40 + options.len();
        let total = u8::try_from(len).expect("at most 64 bytes");
        bytes[0] = 0x45;
        bytes[3] = total;
        bytes[6] = 0x40;
        bytes[8] = 64;
        bytes[9] = 6;
        bytes[12..16].copy_from_slice(&LIBRARY_PEER.0);
        bytes[16..20].copy_from_slice(&LIBRARY_LOCAL.0);
        bytes[20..22].copy_from_slice(&LIBRARY_PEER.1.to_be_bytes());
        bytes[22..24].copy_from_slice(&LIBRARY_LOCAL.1.to_be_bytes());
        bytes[24..28].copy_from_slice(&seq.to_be_bytes());
        bytes[28..32].copy_from_slice(&ack.to_be_bytes());
        bytes[32] = (total - 20) / 4 * 16;
        bytes[33] = flags;
        bytes[34..36].copy_from_slice(&window.to_be_bytes());
        bytes[40..len].copy_from_slice(options);
        Self { bytes, len }
    }
}

/// The library's device: one packet in, any number out.
struct Loop {
    capabilities: DeviceCapabilities,
    input: Option<Input>,
    emitted: Vec<Vec<u8>>,
    pool: Vec<Vec<u8>>,
    /// Room to leave for the real IP header.
    ip_header_len: usize,
}

impl Loop {
    fn new(super_segments: bool) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        // The fabricated SYN's MSS bounds segments, for both families alike; an MTU here would have
        // the library drop IPv6 super-segments.
        capabilities.max_transmission_unit = usize::from(u16::MAX);
        capabilities.checksum = phy::ChecksumCapabilities::ignored();
        if super_segments {
            capabilities.segmentation.tcpv4 = std::num::NonZeroUsize::new(SUPER_SEGMENT_MAX);
        }
        Self {
            capabilities,
            input: None,
            emitted: Vec::new(),
            pool: Vec::new(),
            ip_header_len: LIBRARY_IP_HEADER,
        }
    }

    fn discard_emitted(&mut self) {
        while let Some(buf) = self.emitted.pop() {
            if self.pool.len() < POOL_BUFFERS_MAX {
                self.pool.push(buf);
            }
        }
    }
}

struct RxToken(Input);

impl phy::RxToken for RxToken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0.bytes[..self.0.len])
    }
}

struct TxToken<'a>(&'a mut Loop);

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buf = self.0.pool.pop().unwrap_or_default();
        // The library's 20 bytes of IP header end where the real one will.
        let start = HEADROOM + self.0.ip_header_len - LIBRARY_IP_HEADER;
        buf.resize(start + len, 0);
        let result = f(&mut buf[start..]);
        self.0.emitted.push(buf);
        result
    }

    fn set_meta(&mut self, _: PacketMeta) {}
}

impl Device for Loop {
    type RxToken<'a> = RxToken;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: LibraryInstant) -> Option<(RxToken, TxToken<'_>)> {
        let input = self.input.take()?;
        Some((RxToken(input), TxToken(self)))
    }

    fn transmit(&mut self, _: LibraryInstant) -> Option<TxToken<'_>> {
        Some(TxToken(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}
