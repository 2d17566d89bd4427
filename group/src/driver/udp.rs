//! Datagrams: one socket for all groups of a node, and a second that hears their multicast where it is configured.
//!
//! What a datagram looks like is in `header.rs`, who is believed in `inbound.rs`, and how fast they go in `pacing.rs`.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;
use std::sync::Arc;

use bytes::Bytes;
use mio::net::UdpSocket;
use mio::{Interest, Registry, Token};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, SockRef, Socket, Type};

use super::header::OVERHEAD_BYTES;
use super::inbound::{Counters, Inbound};
use super::outbound::Outbound;
use super::pacing::{Pacer, Parcel};
use super::seal::GroupKey;
use super::{DriverError, Options};
use crate::time::Instant;
use crate::view::MemberId;

/// A received super-datagram (GRO) at most.
const SLOT_BYTES: usize = 65_536;
/// What one system call may carry; IPv4 allows 65,507.
const BURST_BYTES: usize = 65_000;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// How many mio tokens the datagrams use.
pub(super) const UDP_TOKENS: usize = 2;

/// Where datagrams go that are for several members: once, for the network to copy. IPv4.
///
/// The network must carry them to every member: what is lost there is asked for again and then sent to the one that
/// misses it, but signs of life are not, so a member that hears no multicast is no member for long.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Multicast {
    /// Multicast address and port, the same on every member and of this cluster alone.
    pub group: SocketAddrV4,
    /// This node's address on the interface that leads to the others.
    pub interface: Ipv4Addr,
    /// Routers that a datagram may cross, and one more: 1 to 255; 1 stays on the link.
    pub hops: u8,
    /// Whether other members run on this host, as in a test: the kernel then copies what this node sends to every
    /// member here, this one too.
    pub shared_host: bool,
}

/// Datagrams in.
pub struct Receiver {
    /// This node's own first, then the one that hears multicast.
    inlets: Vec<Inlet>,
    slots: Vec<u8>,
    inbound: Inbound,
}

struct Inlet {
    socket: Arc<UdpSocket>,
    state: Arc<UdpSocketState>,
    readable: bool,
}

/// Datagrams out.
pub struct Sender {
    outlet: Outlet,
    addresses: BTreeMap<String, SocketAddr>,
    multicast: Option<SocketAddr>,
    outbound: Outbound,
    pacer: Option<Pacer>,
    buf: Vec<u8>,
}

struct Outlet {
    socket: Arc<UdpSocket>,
    state: Arc<UdpSocketState>,
    counters: SendCounters,
}

/// What became of datagrams to send, since the start. One that goes to several members is counted for each, by
/// multicast once.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct SendCounters {
    /// Given to the kernel.
    pub sent: u64,
    /// Not taken by the kernel; they are lost as if by the network.
    pub refused: u64,
    /// Dropped because too many waited for their pace.
    pub overflowed: u64,
}

pub(super) fn open(
    me: &str,
    members: &BTreeMap<String, SocketAddr>,
    key: &GroupKey,
    options: &Options,
) -> Result<(Receiver, Sender), DriverError> {
    let address = members[me];
    let own = open_own(address).map_err(|source| DriverError::Listen { address, source })?;
    let (socket, state) = (own.socket.clone(), own.state.clone());
    let mut inlets = vec![own];
    if let Some(multicast) = &options.multicast {
        let failed = |source| DriverError::Multicast {
            group: multicast.group,
            interface: multicast.interface,
            source,
        };
        inlets.push(open_multicast(&socket, multicast).map_err(failed)?);
    }
    let rank = members.keys().position(|n| n == me);
    let rank = rank.expect("looked up above");
    let receiver = Receiver {
        inlets,
        slots: vec![0; BATCH_SIZE * SLOT_BYTES],
        inbound: Inbound::new(members, rank, key.clone()),
    };
    let rank = u8::try_from(rank).map_err(|_| DriverError::Listen {
        address,
        source: io::Error::other("more than 256 members"),
    })?;
    let sender = Sender {
        outlet: Outlet {
            socket,
            state,
            counters: SendCounters::default(),
        },
        addresses: members.clone(),
        multicast: options.multicast.map(|m| m.group.into()),
        outbound: Outbound::new(rank, key.clone()),
        pacer: options.pacing.map(Pacer::new),
        buf: Vec::with_capacity(BURST_BYTES),
    };
    Ok((receiver, sender))
}

fn open_own(address: SocketAddr) -> io::Result<Inlet> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.bind(&address.into())?;
    Inlet::new(socket)
}

/// Datagrams leave by the node's own socket, so that they come from its configured address; they arrive at a second one,
/// bound to the multicast address so that it hears nothing else.
fn open_multicast(own: &UdpSocket, multicast: &Multicast) -> io::Result<Inlet> {
    if !multicast.group.ip().is_multicast() {
        return Err(io::Error::other("not a multicast address"));
    }
    let own = SockRef::from(own);
    if own.domain()? != Domain::IPV4 {
        return Err(io::Error::other("the group's addresses are not IPv4"));
    }
    own.set_multicast_if_v4(&multicast.interface)?;
    own.set_multicast_ttl_v4(multicast.hops.max(1).into())?;
    own.set_multicast_loop_v4(multicast.shared_host)?;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // Several members of one host hear the same address.
    socket.set_reuse_address(true)?;
    socket.set_multicast_all_v4(false)?;
    socket.bind(&SocketAddr::from(multicast.group).into())?;
    socket.join_multicast_v4(multicast.group.ip(), &multicast.interface)?;
    Inlet::new(socket)
}

impl Inlet {
    fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        // The kernel bounds these by limits of its own; bursts of events must not be lost for want of room.
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
        // Beyond them where we may (CAP_NET_ADMIN).
        let _ =
            rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
        socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
        let socket = UdpSocket::from_std(socket.into());
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self {
            socket: Arc::new(socket),
            state: Arc::new(state),
            readable: true,
        })
    }

    /// Takes one batch and judges each datagram of it.
    fn receive(
        &mut self,
        slots: &mut [u8],
        inbound: &mut Inbound,
        f: &mut impl FnMut(u32, &MemberId, &[u8]),
    ) -> io::Result<()> {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let received = {
            let mut slices: Vec<IoSliceMut<'_>> = slots
                .chunks_exact_mut(SLOT_BYTES)
                .map(IoSliceMut::new)
                .collect();
            self.state
                .recv(UdpSockRef::from(&*self.socket), &mut slices, &mut metas)
        };
        match received {
            Ok(n) => {
                // A short batch emptied the queue; what comes later makes the socket readable anew.
                self.readable = n == BATCH_SIZE;
                for (slot, meta) in slots.chunks_exact_mut(SLOT_BYTES).zip(&metas[..n]) {
                    let bytes = &mut slot[..meta.len.min(SLOT_BYTES)];
                    if bytes.is_empty() {
                        inbound.take(meta.addr, bytes, f); // counted like any other
                    }
                    for datagram in bytes.chunks_mut(meta.stride.max(1)) {
                        inbound.take(meta.addr, datagram, f);
                    }
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            // An ICMP answer to something that we sent: the member's process is not there.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl Receiver {
    /// Registers each socket under one of [`UDP_TOKENS`] tokens.
    pub(super) fn register(&mut self, registry: &Registry, base: usize) -> io::Result<()> {
        use std::os::fd::AsRawFd as _;
        for (inlet, token) in self.inlets.iter().zip(base..) {
            let fd = inlet.socket.as_fd().as_raw_fd();
            let mut source = mio::unix::SourceFd(&fd);
            registry.register(&mut source, Token(token), Interest::READABLE)?;
        }
        Ok(())
    }

    pub(super) fn handle_readable(&mut self, index: usize) {
        if let Some(inlet) = self.inlets.get_mut(index) {
            inlet.readable = true;
        }
    }

    /// Whether [`Self::receive`] may give something.
    pub fn readable(&self) -> bool {
        self.inlets.iter().any(|inlet| inlet.readable)
    }

    /// The instance of a group is known: its members can be heard.
    pub fn set_instance(&mut self, group: u32, instance: u128) {
        self.inbound.set_instance(group, instance);
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.inbound.counters()
    }

    /// Receives one batch from each socket, and hands each body that was sealed by a member to `f`, with group and
    /// sender. Call again while [`Self::readable`].
    ///
    /// # Errors
    /// A socket failed.
    pub fn receive(&mut self, mut f: impl FnMut(u32, &MemberId, &[u8])) -> io::Result<()> {
        let mut outcome = Ok(());
        for inlet in self.inlets.iter_mut().filter(|inlet| inlet.readable) {
            let received = inlet.receive(&mut self.slots, &mut self.inbound, &mut f);
            outcome = outcome.and(received);
        }
        outcome
    }
}

impl Sender {
    /// This member's life in a group: its datagrams are sealed as this incarnation's from now on. The epoch stays.
    pub fn set_member(&mut self, group: u32, me: MemberId) {
        self.outbound.set_member(group, me);
    }

    /// The instance of a group is known: this member can be heard.
    pub fn set_instance(&mut self, group: u32, instance: u128) {
        self.outbound.set_instance(group, instance);
    }

    /// A view is installed: what is sent from now on is sealed under a key of this epoch, the view's id. Lower than
    /// before: nothing changes. A member that has installed no view sends in epoch 0.
    pub fn set_epoch(&mut self, group: u32, epoch: u64) {
        self.outbound.set_epoch(group, epoch);
    }

    /// What happened so far.
    pub fn counters(&self) -> SendCounters {
        self.outlet.counters
    }

    /// Bytes that wait for their pace.
    pub fn queued_bytes(&self) -> usize {
        self.pacer.as_ref().map_or(0, Pacer::queued_bytes)
    }

    /// When [`Self::handle_timeout`] has something to send. Always `None` without a pace.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.pacer.as_ref().and_then(Pacer::poll_timeout)
    }

    /// Sends what waited for its pace and may go now. Harmless when early, late or repeated.
    pub fn handle_timeout(&mut self, now: Instant) {
        let Some(pacer) = &mut self.pacer else { return };
        while let Some((to, parcel)) = pacer.due(now) {
            self.outlet
                .transmit(to, &parcel.contents, parcel.segment, parcel.datagrams);
        }
    }

    /// Seals each body once and sends it to each of `to`; by multicast, where configured, when these are several. All
    /// bodies but the last must be of equal size. What the kernel does not take is lost, as it could be on the way, and
    /// so is what finds its destination's queue full.
    pub fn send(&mut self, now: Instant, group: u32, to: &[MemberId], bodies: &[Bytes]) {
        self.handle_timeout(now); // what waits goes first
        let Some(mut sealer) = self.outbound.sealer(group) else {
            return;
        };
        let stride = OVERHEAD_BYTES + bodies.first().map_or(0, Bytes::len);
        let mut most = (BURST_BYTES / stride).min(self.outlet.state.max_gso_segments());
        if let Some(pacer) = &self.pacer {
            most = most.min(pacer.datagrams_max(stride));
        }
        let multicast = self.multicast.filter(|_| to.len() > 1);
        for burst in bodies.chunks(most.max(1)) {
            self.buf.clear();
            for body in burst {
                sealer.seal(&mut self.buf, body);
            }
            let mut sealed = Sealed {
                contents: &self.buf,
                segment: (burst.len() > 1).then_some(stride),
                datagrams: burst.len() as u64,
                kept: None,
            };
            if let Some(group) = multicast {
                sealed.go(now, group, &mut self.pacer, &mut self.outlet);
                continue;
            }
            for member in to {
                if let Some(destination) = self.addresses.get(&*member.name) {
                    sealed.go(now, *destination, &mut self.pacer, &mut self.outlet);
                }
            }
        }
    }
}

/// What one system call carries, on its way to each of its receivers.
struct Sealed<'a> {
    contents: &'a [u8],
    segment: Option<usize>,
    datagrams: u64,
    /// A copy, once the first receiver must wait for it.
    kept: Option<Bytes>,
}

impl Sealed<'_> {
    /// Now, or later, or not at all.
    fn go(&mut self, now: Instant, to: SocketAddr, pacer: &mut Option<Pacer>, outlet: &mut Outlet) {
        if let Some(pacer) = pacer
            && !pacer.admit(now, to, self.contents.len())
        {
            let contents = self
                .kept
                .get_or_insert_with(|| Bytes::copy_from_slice(self.contents));
            let parcel = Parcel {
                contents: contents.clone(),
                segment: self.segment,
                datagrams: self.datagrams,
            };
            if !pacer.queue(to, parcel) {
                outlet.counters.overflowed += self.datagrams;
            }
            return;
        }
        outlet.transmit(to, self.contents, self.segment, self.datagrams);
    }
}

impl Outlet {
    fn transmit(&mut self, to: SocketAddr, contents: &[u8], segment: Option<usize>, count: u64) {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size: segment,
            src_ip: None,
        };
        let socket = UdpSockRef::from(&*self.socket);
        match self.state.try_send(socket, &transmit) {
            Ok(()) => self.counters.sent += count,
            Err(_) => self.counters.refused += count,
        }
    }
}
