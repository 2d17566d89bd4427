//! The packet socket and the neighbourhood of the VIP.
//!
//! A [`Wire`] is one virtual address on one interface. The kernel does not own the address; this
//! socket hears every frame for it, answers for it as a neighbour (ARP, NDP, echo), and sends what
//! the endpoint emits. It is driven by one thread:
//!
//! ```text
//!   readable ──> receive(now, f) ──> f(Frame)          answers are queued by themselves
//!   endpoint ──> send(OutPacket) ──> queue ──> flush() ── fence ──> sendmmsg
//!   timer    ──> handle_timeout(now)                   announcements are queued
//! ```
//!
//! **Nothing leaves a node that does not own the VIP and hold its lease**: while not the owner,
//! every method that would emit does nothing; and each batch passes the [`Fence`] immediately
//! before its system call.

mod fence;
mod filter;
mod neighbour;
mod nft;
mod packet;
mod queue;
mod socket;

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use thiserror::Error;

pub use fence::Fence;

pub use crate::clock::BootTime;
use crate::config::{AddressMode, FenceMode};
use crate::fault::planted;
pub use neighbour::Announcer;
pub use nft::KernelFenceError;
pub use packet::{Frame, HEADROOM, Kind, Mac, OutPacket};

use neighbour::{Meaning, Station};
use queue::Queue;
use socket::{BATCH, SLOT};

/// The most frames that one [`Wire::receive`] takes.
pub const RECEIVE_BATCH: usize = BATCH;

/// Batches that [`Wire::discard_input`] throws away: under a flood of frames there is always one more.
const DISCARD_BATCHES_MAX: usize = 1024;

/// Why a VIP cannot be served on an interface.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WireError {
    /// No interface of this name in this network namespace.
    #[error("no interface {interface:?} in this network namespace")]
    NoInterface {
        /// The interface asked for.
        interface: String,
    },
    /// Packet sockets are not permitted to this process.
    #[error(
        "opening a packet socket on {interface:?} is not permitted: \
         run as root or grant CAP_NET_RAW (setcap cap_net_raw,cap_net_admin+ep)"
    )]
    MissingCapability {
        /// The interface asked for.
        interface: String,
    },
    /// The kernel has the VIP among its own addresses and would answer for it with resets.
    #[error(
        "the kernel itself owns {vip} (on interface {owner:?}) and would answer for it: \
         remove it there (ip address del {vip} dev {owner})"
    )]
    OwnedByKernel {
        /// The VIP.
        vip: IpAddr,
        /// The interface that holds it.
        owner: String,
    },
    /// An IPv6 VIP on an interface without IPv6.
    #[error(
        "IPv6 is disabled on interface {interface:?}, which is to serve {vip} \
         (sysctl net.ipv6.conf.{interface}.disable_ipv6=0)"
    )]
    Ipv6Disabled {
        /// The interface asked for.
        interface: String,
        /// The VIP.
        vip: IpAddr,
    },
    /// The interface cannot carry a VIP: loopback, a tunnel, and the like have no Ethernet.
    #[error("interface {interface:?} is not an Ethernet interface")]
    NotEthernet {
        /// The interface asked for.
        interface: String,
    },
    /// The kernel does not enforce the lease.
    #[error(
        "no kernel fence for {vip} on interface {interface:?}; with fence = \"process\" in the \
         [[service]] the node checks its lease alone, which a pause at the wrong moment can defeat"
    )]
    NoKernelFence {
        /// The interface asked for.
        interface: String,
        /// The VIP.
        vip: IpAddr,
        /// Why.
        source: KernelFenceError,
    },
    /// Anything else that the kernel refused.
    #[error("cannot {action} on interface {interface:?}")]
    Os {
        /// What was being done.
        action: &'static str,
        /// The interface asked for.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What [`Wire::flush`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Flushed {
    /// The queue is empty.
    All,
    /// The kernel takes no more now. Register for *writable*, and only now: a packet socket becomes
    /// writable again with nearly every frame that has left, so a standing interest would wake the
    /// loop for each.
    Blocked,
    /// The fence is shut or the lease is over. The frames are kept for a renewal of the lease, and
    /// dropped by [`Wire::set_owner`]`(false)`.
    Fenced,
}

/// What passed, and what did not. All count since the socket was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Frames received, stale ones that were discarded included.
    pub frames_in: u64,
    /// Frames handed to the kernel.
    pub frames_out: u64,
    /// System calls that received something or found nothing.
    pub receive_calls: u64,
    /// System calls that sent.
    pub send_calls: u64,
    /// Stale frames thrown away by [`Wire::discard_input`].
    pub discarded: u64,
    /// Received frames that were malformed or asked for nothing.
    pub ignored: u64,
    /// ARP, neighbour and echo requests answered.
    pub answered: u64,
    /// Announcements made.
    pub announcements: u64,
    /// Another station announced the VIP while it was ours.
    pub foreign_claims: u64,
    /// Flushes that the fence stopped with frames waiting.
    pub fenced: u64,
    /// Frames dropped: not the owner, malformed, or the queue was full.
    pub dropped: u64,
    /// Frames that the kernel refused (interface down, queue full, too large).
    pub send_errors: u64,
}

/// What a [`Wire`] is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options<'a> {
    /// The interface, in the network namespace of the calling thread.
    pub interface: &'a str,
    /// The virtual address.
    pub vip: IpAddr,
    /// Who enforces the lease.
    pub fence: FenceMode,
    /// How the address moves.
    pub address: AddressMode,
}

impl<'a> Options<'a> {
    /// `vip` on `interface`, at the interface's own Ethernet address, fenced by the process alone.
    #[must_use]
    pub const fn new(interface: &'a str, vip: IpAddr) -> Self {
        Self {
            interface,
            vip,
            fence: FenceMode::Process,
            address: AddressMode::Garp,
        }
    }
}

/// One VIP on one interface.
#[derive(Debug)]
pub struct Wire {
    interface: String,
    vip: IpAddr,
    link: socket::Link,
    station: Station,
    socket: OwnedFd,
    /// Keeps the interface in the VIP's solicited-node group, as seen by card and switch.
    _group: Option<UdpSocket>,
    /// `BATCH` slots of `SLOT` bytes; pages are touched only as frames arrive.
    slots: Vec<u8>,
    queue: Queue,
    spent: Vec<Vec<u8>>,
    owns: bool,
    fence: Fence,
    /// Frames passed since the last flush.
    stirred: bool,
    announcer: Announcer,
    counters: Counters,
}

impl Wire {
    /// Opens the packet socket and sets up the fence, in the network namespace of the calling thread.
    /// Not the owner, fence shut.
    ///
    /// # Errors
    /// See [`WireError`]; each names the interface.
    pub fn open(options: &Options<'_>) -> Result<Self, WireError> {
        let Options {
            interface,
            vip,
            fence,
            address,
        } = *options;
        let name = || interface.to_owned();
        let os = |action| {
            move |source| WireError::Os {
                action,
                interface: name(),
                source,
            }
        };
        let socket = socket::packet_socket().map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => WireError::MissingCapability { interface: name() },
            _ => os("open a packet socket")(source),
        })?;
        let link = socket::link(socket.as_fd(), interface).map_err(|source| {
            match (source.raw_os_error(), source.kind()) {
                (Some(libc::ENODEV), _) | (None, io::ErrorKind::InvalidInput) => {
                    WireError::NoInterface { interface: name() }
                }
                (None, io::ErrorKind::Unsupported) => WireError::NotEthernet { interface: name() },
                _ => os("read the link")(source),
            }
        })?;
        for owner in pnet::datalink::interfaces() {
            if owner.ips.iter().any(|net| net.ip() == vip) {
                return Err(WireError::OwnedByKernel {
                    vip,
                    owner: owner.name,
                });
            }
        }
        let group = match vip {
            IpAddr::V4(_) => None,
            IpAddr::V6(vip6) => {
                let knob = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
                if std::fs::read_to_string(knob).map_or(true, |v| v.trim() != "0") {
                    return Err(WireError::Ipv6Disabled {
                        interface: name(),
                        vip,
                    });
                }
                Some(
                    join_solicited_node(vip6, link.index)
                        .map_err(os("join the group of the VIP"))?,
                )
            }
        };
        let fence = match fence {
            FenceMode::Process => Fence::shut(),
            FenceMode::Kernel => {
                Fence::with_kernel(interface, vip).map_err(|source| WireError::NoKernelFence {
                    interface: name(),
                    vip,
                    source,
                })?
            }
        };
        socket::bind(socket.as_fd(), link.index, &filter::program(vip))
            .map_err(os("bind the packet socket"))?;
        let home = neighbour::virtual_mac(vip);
        let station = match address {
            AddressMode::Garp => Station::at(link.mac),
            AddressMode::Vmac => Station::at(home),
            AddressMode::Flood => Station {
                source: link.mac,
                home,
            },
        };
        if station.home != link.mac {
            socket::listen_to(socket.as_fd(), link.index, station.home)
                .map_err(os("listen to the virtual MAC address"))?;
        }
        Ok(Self {
            interface: name(),
            vip,
            link,
            station,
            socket,
            _group: group,
            slots: vec![0; BATCH * SLOT],
            queue: Queue::default(),
            spent: Vec::new(),
            owns: false,
            fence,
            stirred: false,
            announcer: Announcer::default(),
            counters: Counters::default(),
        })
    }

    /// The Ethernet address at which the owner says that the VIP is: the interface's own, or a virtual one.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.station.home
    }

    /// The interface's MTU in bytes, as it was when the socket was opened.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.link.mtu
    }

    /// The virtual address.
    #[must_use]
    pub fn vip(&self) -> IpAddr {
        self.vip
    }

    /// Whether the interface is up and has a carrier now.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn has_carrier(&self) -> io::Result<bool> {
        socket::has_carrier(self.socket.as_fd(), &self.interface)
    }

    /// Receives one batch and hands the frames that concern the endpoint to `f`, in order. Requests
    /// to the VIP as a neighbour are answered from here (queued until [`Wire::flush`]).
    /// Returns the number of frames taken from the socket: fewer than [`RECEIVE_BATCH`] means that it was
    /// drained, as an edge-triggered loop needs to know.
    ///
    /// # Errors
    /// The socket failed, for instance because the interface went down (reported once) or is gone.
    pub fn receive(&mut self, now: BootTime, mut f: impl FnMut(Frame<'_>)) -> io::Result<usize> {
        let mut lengths = [0; BATCH];
        let n = self.receive_batch(&mut lengths)?;
        for (slot, length) in self.slots.chunks_exact(SLOT).zip(&lengths[..n]) {
            let Some(raw) = packet::parse(&slot[..*length]) else {
                self.counters.ignored += 1;
                continue;
            };
            let (source, checksum_ok) = (raw.source, raw.checksum_ok);
            match neighbour::read(&raw, self.vip, self.station) {
                Meaning::Packet(p) => f(Frame {
                    source,
                    kind: Kind::Ip(p),
                    checksum_ok,
                }),
                Meaning::Claim(by) => {
                    if self.owns {
                        self.counters.foreign_claims += 1;
                        self.announcer.handle_claim(now);
                    }
                    f(Frame {
                        source,
                        kind: Kind::Claim(by),
                        checksum_ok,
                    });
                }
                Meaning::Answer(frame) => {
                    if self.owns {
                        match self.queue.push(frame) {
                            Ok(()) => self.counters.answered += 1,
                            Err(_) => self.counters.dropped += 1,
                        }
                    }
                }
                Meaning::Nothing => self.counters.ignored += 1,
            }
        }
        Ok(n)
    }

    fn receive_batch(&mut self, lengths: &mut [usize; BATCH]) -> io::Result<usize> {
        loop {
            self.counters.receive_calls += 1;
            match socket::receive(self.socket.as_fd(), &mut self.slots, lengths) {
                Ok(n) => {
                    self.counters.frames_in += n as u64;
                    self.stirred |= n > 0;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Throws away what is waiting in the socket: frames from before a takeover are stale, and
    /// the clients will say again whatever still matters.
    pub fn discard_input(&mut self) {
        if planted!(StaleFramesTaken) {
            return;
        }
        let mut lengths = [0; BATCH];
        for _ in 0..DISCARD_BATCHES_MAX {
            let Ok(n) = self.receive_batch(&mut lengths) else {
                return;
            };
            self.counters.discarded += n as u64;
            if n < BATCH {
                return;
            }
        }
    }

    /// Queues a TCP packet: its headers are written into its headroom, its payload is not copied.
    /// Not the owner: dropped. The buffer comes back from [`Wire::flush`] in either case.
    pub fn send(&mut self, mut packet: OutPacket) {
        let ready = self.owns && packet::write_headers(&mut packet, self.station.source);
        let refused = if ready {
            self.queue.push(packet.buf).err()
        } else {
            Some(packet.buf)
        };
        if let Some(buf) = refused {
            self.counters.dropped += 1;
            self.spent.push(buf);
        }
    }

    /// Sends what is queued, as far as fence and kernel allow, and moves the buffers of frames that
    /// are done with to `recycled` (any content; answers of the wire's own are among them).
    ///
    /// # Errors
    /// None at present: what the kernel refuses is dropped and counted, as the network would drop
    /// it; the type leaves room for a socket that is lost.
    pub fn flush(&mut self, recycled: &mut Vec<Vec<u8>>) -> io::Result<Flushed> {
        let outcome = self.flush_queue();
        // What came in is answered soon: the fence is renewed while others work.
        if std::mem::take(&mut self.stirred) {
            self.fence.refresh();
        }
        recycled.append(&mut self.spent);
        outcome
    }

    fn flush_queue(&mut self) -> io::Result<Flushed> {
        while !self.queue.is_empty() {
            // R2: the clock is read for every batch, after the frames are ready.
            if !self.fence.permits_now() {
                self.counters.fenced += 1;
                return Ok(Flushed::Fenced);
            }
            self.counters.send_calls += 1;
            let frames = self.queue.iter().take(BATCH);
            match socket::send(self.socket.as_fd(), frames) {
                Ok(n) => {
                    self.counters.frames_out += n as u64;
                    self.stirred = true;
                    self.spent.extend((0..n).map_while(|_| self.queue.pop()));
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Flushed::Blocked),
                    Some(libc::EINTR) => {}
                    Some(libc::EBADF | libc::ENOTSOCK) => return Err(e),
                    // The error is the first frame's alone (ENETDOWN, ENOBUFS, EMSGSIZE, ENXIO).
                    _ => {
                        self.counters.send_errors += 1;
                        self.spent.extend(self.queue.pop());
                    }
                },
            }
        }
        Ok(Flushed::All)
    }

    /// Frames that wait to be sent.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Takes or gives up the VIP. Taking it starts the announcements (the first is due at once:
    /// call [`Wire::handle_timeout`] and [`Wire::flush`]); giving it up shuts the fence and drops what is
    /// queued. Saying the same twice changes nothing.
    pub fn set_owner(&mut self, now: BootTime, owns: bool) {
        if self.owns == owns {
            return;
        }
        self.owns = owns;
        if owns {
            self.announcer.start(now);
        } else {
            self.fence.close();
            self.announcer.stop();
            self.counters.dropped += self.queue.len() as u64;
            self.spent.extend(std::iter::from_fn(|| self.queue.pop()));
        }
    }

    /// Whether the VIP is ours.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.owns
    }

    /// The fence, to be opened for as long as the lease lasts, and shut before a wedge.
    pub fn fence_mut(&mut self) -> &mut Fence {
        &mut self.fence
    }

    /// The fence.
    #[must_use]
    pub const fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Queues one announcement now, ahead of what waits; the schedule makes its own by
    /// [`Wire::handle_timeout`].
    pub fn announce(&mut self) {
        if !self.owns || planted!(NotAnnounced) {
            return;
        }
        for frame in neighbour::announcement(self.vip, self.station) {
            if self.queue.announce(frame).is_err() {
                self.counters.dropped += 1;
            }
        }
        self.counters.announcements += 1;
    }

    /// When [`Wire::handle_timeout`] is to be called, if ever.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<BootTime> {
        self.announcer.poll_timeout()
    }

    /// Queues the announcement that is due at `now`, if one is.
    pub fn handle_timeout(&mut self, now: BootTime) {
        if self.announcer.handle_timeout(now) {
            self.announce();
        }
    }

    /// What passed so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

/// Joins the solicited-node multicast group of `vip` (RFC 4291 §2.7.1) through a UDP socket, which,
/// unlike a packet socket's membership, also makes the kernel report the membership (MLD) to
/// switches that forward multicast only where it was asked for.
fn join_solicited_node(vip: std::net::Ipv6Addr, index: libc::c_int) -> io::Result<UdpSocket> {
    let o = vip.octets();
    let (high, low) = (
        0xff00 | u16::from(o[13]),
        u16::from_be_bytes([o[14], o[15]]),
    );
    let group = std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low);
    let socket = UdpSocket::bind((std::net::Ipv6Addr::LOCALHOST, 0))
        .or_else(|_| UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 0)))?;
    socket.join_multicast_v6(&group, index.cast_unsigned())?;
    Ok(socket)
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl mio::event::Source for Wire {
    fn register(
        &mut self,
        registry: &mio::Registry,
        token: mio::Token,
        interests: mio::Interest,
    ) -> io::Result<()> {
        mio::unix::SourceFd(&self.as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(
        &mut self,
        registry: &mio::Registry,
        token: mio::Token,
        interests: mio::Interest,
    ) -> io::Result<()> {
        mio::unix::SourceFd(&self.as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &mio::Registry) -> io::Result<()> {
        mio::unix::SourceFd(&self.as_raw_fd()).deregister(registry)
    }
}
