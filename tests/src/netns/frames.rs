//! Frames as such: those that pass the switch, in order and from which host, and those that a test
//! makes itself.

#![expect(
    unsafe_code,
    reason = "no crate reads or makes the address of a packet socket, which names the interface"
)]

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

/// Enough for what a switch of this machine passes while the reader is not scheduled.
const RECEIVE_BUFFER: usize = 64 << 20;
/// Bytes kept of a frame: the headers.
const SNAP: usize = 128;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// The host whose port it came in at.
    pub host: String,
    /// When it was read, which is soon after it came.
    pub at: Instant,
    /// Its beginning: Ethernet header and what follows, at most 128 bytes.
    pub head: Vec<u8>,
}

impl Captured {
    /// Whether this frame is a packet from `address`, or claims it as a neighbour (ARP, NDP).
    #[must_use]
    pub fn speaks_for(&self, address: IpAddr) -> bool {
        let at =
            |from: usize, bytes: &[u8]| self.head.get(from..).is_some_and(|b| b.starts_with(bytes));
        match address {
            IpAddr::V4(ip) => {
                let ip = ip.octets();
                (at(12, &[8, 0]) && at(26, &ip)) || (at(12, &[8, 6]) && at(28, &ip))
            }
            IpAddr::V6(ip) => {
                let ip = ip.octets();
                let advertisement = at(20, &[58]) && at(54, &[136]) && at(62, &ip);
                at(12, &[0x86, 0xdd]) && (at(22, &ip) || advertisement)
            }
        }
    }
}

/// Hears every frame that comes in at any port of the switch, from when it was made on.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    ports: BTreeMap<i32, String>,
}

impl Capture {
    /// Called in the switch's namespace; `ports` maps interface numbers to hosts.
    pub(super) fn open(ports: BTreeMap<i32, String>) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::PACKET,
            Type::RAW,
            Some(Protocol::from(i32::from(everything()))),
        )?;
        enlarge(&socket)?;
        Ok(Self { socket, ports })
    }

    /// The next frame that comes in at a port, or `None` after `wait`.
    ///
    /// # Errors
    /// The socket failed.
    pub fn next(&self, wait: Duration) -> io::Result<Option<Captured>> {
        let deadline = Instant::now() + wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Zero would mean for ever.
            self.socket
                .set_read_timeout(Some(left.max(Duration::from_micros(1))))?;
            let mut head = [MaybeUninit::uninit(); SNAP];
            let (n, from) = match self.socket.recv_from(&mut head) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let Some(host) = port(&from).and_then(|port| self.ports.get(&port)) else {
                continue;
            };
            // SAFETY: recvfrom(2) has written the first `n` bytes.
            let head = head[..n]
                .iter()
                .map(|b| unsafe { b.assume_init() })
                .collect();
            return Ok(Some(Captured {
                host: host.clone(),
                at: Instant::now(),
                head,
            }));
        }
    }
}

/// Sends frames as they are from a host's eth0, past whatever the host's own programs would check.
#[derive(Debug)]
pub struct Injector {
    socket: Socket,
    to: SockAddr,
}

impl Injector {
    /// Called in the host's namespace.
    pub(super) fn open(interface: &str) -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        let to = link_address(&socket, interface, 0)?;
        Ok(Self { socket, to })
    }

    /// Sends one frame, its Ethernet header in front. False if a rule on the way out dropped it.
    ///
    /// # Errors
    /// The socket failed.
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        match self.socket.send_to(frame, &self.to) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// One end of a link, in both directions: what comes in there, whoever it is for, and what is put on it.
#[derive(Debug)]
pub(super) struct Port(Socket);

impl Port {
    /// Called in the namespace of the interface.
    pub(super) fn open(interface: &str) -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        enlarge(&socket)?;
        socket.set_nonblocking(true)?;
        socket.bind(&link_address(&socket, interface, everything())?)?;
        Ok(Self(socket))
    }

    /// The next frame that has come in; `None` if there is none now.
    pub(super) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        loop {
            // SAFETY: what is initialised may be seen as what may not be; recvfrom(2) only writes bytes.
            let room = unsafe { &mut *(std::ptr::from_mut(buffer) as *mut [MaybeUninit<u8>]) };
            match self.0.recv_from(room) {
                Ok((n, from)) if port(&from).is_some() => return Ok(Some(&buffer[..n])),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends one frame. One that the interface does not take now is lost.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self.0.send(frame) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            sent => sent.map(drop),
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// All protocols, as packet sockets are told: in network order.
fn everything() -> u16 {
    let all = u16::try_from(libc::ETH_P_ALL);
    all.expect("a small constant").to_be()
}

fn enlarge(socket: &Socket) -> io::Result<()> {
    rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER)
        .or_else(|_| rustix::net::sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BUFFER))?;
    Ok(())
}

/// The address of an interface; `protocol` in network order, 0 for who only sends.
fn link_address(socket: &Socket, interface: &str, protocol: u16) -> io::Result<SockAddr> {
    let index = rustix::net::netdevice::name_to_index(socket, interface)?;
    let fill = |storage: *mut SockAddrStorage, length: *mut libc::socklen_t| {
        // SAFETY: the storage is zeroed and larger than any address.
        let address = unsafe { &mut *storage.cast::<libc::sockaddr_ll>() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("a small constant");
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index).expect("a small number");
        let size = size_of::<libc::sockaddr_ll>();
        // SAFETY: the length belongs to us during the call.
        unsafe { *length = libc::socklen_t::try_from(size).expect("a few bytes") };
        Ok(())
    };
    // SAFETY: the closure sets family, protocol, interface and length; zeroes are right for the rest.
    let ((), address) = unsafe { SockAddr::try_init(fill) }?;
    Ok(address)
}

/// The interface at which a frame came in; `None` for one that goes out.
fn port(from: &SockAddr) -> Option<i32> {
    let length = usize::try_from(from.len()).ok()?;
    // The kernel gives as many bytes of the hardware address as there are.
    if i32::from(from.family()) != libc::AF_PACKET || length < 12 {
        return None;
    }
    // SAFETY: the storage behind a `SockAddr` is larger than any address and initialised; the
    // family says that this is one of a packet socket.
    let address = unsafe { *from.as_ptr().cast::<libc::sockaddr_ll>() };
    (address.sll_pkttype != libc::PACKET_OUTGOING).then_some(address.sll_ifindex)
}
