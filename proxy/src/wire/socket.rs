//! The packet socket itself: the only unsafe code of the node's wire.

#![expect(
    unsafe_code,
    reason = "no crate offers packet sockets with virtio-net headers"
)]

use std::ffi::c_void;
use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::filter::Instruction;
use super::packet::Mac;

/// Frames moved by one system call.
pub(super) const BATCH: usize = 32;

/// Bytes of receive slot per frame: a 64 KB super-segment with its headers.
pub(super) const SLOT: usize = 66 * 1024;

const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const RECEIVE_BUFFER: libc::c_int = 32 << 20;
/// Enough to hand the queue of the interface a full window of many connections; what does not fit
/// waits in our own queue, where the fence still rules over it.
const SEND_BUFFER: libc::c_int = 4 << 20;

/// What the kernel says of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: libc::c_int,
    pub(super) mac: Mac,
    pub(super) mtu: u16,
}

/// A non-blocking packet socket that is not bound yet, and so receives nothing yet.
pub(super) fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket(2) and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).expect("an option is a few bytes");
    // SAFETY: pointer and length describe `value`, which outlives the call; the kernel only reads.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            ptr::from_ref(value).cast::<c_void>(),
            len,
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Asks `name` of interface `interface`; the answer's union is read by the caller.
fn ifreq(fd: BorrowedFd<'_>, interface: &str, request: libc::Ioctl) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut req: libc::ifreq = unsafe { zeroed() };
    if interface.len() >= req.ifr_name.len() || interface.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in req.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: `req` is a whole ifreq with a terminated name, which these requests read and fill.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(&mut req)) };
    if r == 0 {
        Ok(req)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Looks an interface up in the network namespace of the socket.
pub(super) fn link(fd: BorrowedFd<'_>, interface: &str) -> io::Result<Link> {
    let index = ifreq(fd, interface, libc::SIOCGIFINDEX)?;
    let address = ifreq(fd, interface, libc::SIOCGIFHWADDR)?;
    let mtu = ifreq(fd, interface, libc::SIOCGIFMTU)?;
    // SAFETY: each union is read as the member that its request fills.
    let (index, address, mtu) = unsafe {
        (
            index.ifr_ifru.ifru_ifindex,
            address.ifr_ifru.ifru_hwaddr,
            mtu.ifr_ifru.ifru_mtu,
        )
    };
    if address.sa_family != libc::ARPHRD_ETHER {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "not an Ethernet interface",
        ));
    }
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address.sa_data) {
        *to = from.cast_unsigned();
    }
    Ok(Link {
        index,
        mac,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
    })
}

/// Whether the interface is up and has a carrier.
pub(super) fn has_carrier(fd: BorrowedFd<'_>, interface: &str) -> io::Result<bool> {
    let req = ifreq(fd, interface, libc::SIOCGIFFLAGS)?;
    // SAFETY: SIOCGIFFLAGS fills this member.
    let flags = i32::from(unsafe { req.ifr_ifru.ifru_flags });
    let needed = libc::IFF_UP | libc::IFF_RUNNING;
    Ok(flags & needed == needed)
}

/// Sets the options, attaches the filter and binds to the interface, in this order: no frame that
/// the filter would drop is ever queued.
pub(super) fn bind(fd: BorrowedFd<'_>, index: i32, program: &[Instruction]) -> io::Result<()> {
    set_option(fd, libc::SOL_PACKET, PACKET_VNET_HDR, &1i32)?;
    set_option(fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1i32)?;
    // The forced form needs CAP_NET_ADMIN in the first user namespace; the other is capped by
    // net.core.rmem_max and never fails for the size.
    for (forced, plain, bytes) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER),
    ] {
        if set_option(fd, libc::SOL_SOCKET, forced, &bytes).is_err() {
            set_option(fd, libc::SOL_SOCKET, plain, &bytes)?;
        }
    }
    let mut code: Vec<libc::sock_filter> = program
        .iter()
        .map(|i| libc::sock_filter {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect();
    let filter = libc::sock_fprog {
        len: u16::try_from(code.len()).expect("a few dozen instructions"),
        filter: code.as_mut_ptr(),
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;

    // SAFETY: `sockaddr_ll` is plain data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).expect("a small constant");
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL)
        .expect("a small constant")
        .to_be();
    address.sll_ifindex = index;
    let len = libc::socklen_t::try_from(size_of_val(&address)).expect("a few bytes");
    // SAFETY: pointer and length describe `address`, which outlives the call.
    let r = unsafe { libc::bind(fd.as_raw_fd(), ptr::from_ref(&address).cast(), len) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Has the interface take in frames for `mac` as well, as long as the socket lives (packet(7)).
pub(super) fn listen_to(fd: BorrowedFd<'_>, index: i32, mac: Mac) -> io::Result<()> {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&mac);
    let membership = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: u16::try_from(libc::PACKET_MR_UNICAST).expect("a small constant"),
        mr_alen: 6,
        mr_address: address,
    };
    let name = libc::PACKET_ADD_MEMBERSHIP;
    set_option(fd, libc::SOL_PACKET, name, &membership)
}

/// Receives up to [`BATCH`] frames into consecutive slots of [`SLOT`] bytes and notes their
/// lengths. `slots` holds all of them.
pub(super) fn receive(
    fd: BorrowedFd<'_>,
    slots: &mut [u8],
    lengths: &mut [usize; BATCH],
) -> io::Result<usize> {
    assert!(
        slots.len() >= BATCH * SLOT,
        "one slot for each frame of a batch"
    );
    // SAFETY: both are plain data, for which all zeroes is a value.
    let (mut iov, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
        unsafe { (zeroed(), zeroed()) };
    for ((iov, message), slot) in iov
        .iter_mut()
        .zip(&mut messages)
        .zip(slots.chunks_exact_mut(SLOT))
    {
        *iov = libc::iovec {
            iov_base: slot.as_mut_ptr().cast(),
            iov_len: slot.len(),
        };
        message.msg_hdr.msg_iov = iov;
        message.msg_hdr.msg_iovlen = 1;
    }
    let count = libc::c_uint::try_from(BATCH).expect("a small constant");
    // SAFETY: every message points to one iovec, and each of those to its own slot of `slots`, all
    // alive and not otherwise used during the call; no timeout is given.
    let n = unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
            ptr::null_mut(),
        )
    };
    let Ok(n) = usize::try_from(n) else {
        return Err(io::Error::last_os_error());
    };
    for (length, message) in lengths.iter_mut().zip(&messages[..n]) {
        *length = message.msg_len as usize;
    }
    Ok(n)
}

/// Sends up to [`BATCH`] frames, each with its virtio-net header in front; how many were taken.
/// An error concerns the first frame only.
pub(super) fn send<'a>(
    fd: BorrowedFd<'_>,
    frames: impl Iterator<Item = &'a [u8]>,
) -> io::Result<usize> {
    // SAFETY: both are plain data, for which all zeroes is a value.
    let (mut iov, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
        unsafe { (zeroed(), zeroed()) };
    let mut count: libc::c_uint = 0;
    for ((iov, message), frame) in iov.iter_mut().zip(&mut messages).zip(frames) {
        *iov = libc::iovec {
            iov_base: frame.as_ptr().cast_mut().cast(),
            iov_len: frame.len(),
        };
        message.msg_hdr.msg_iov = iov;
        message.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    // SAFETY: the first `count` messages point to one iovec each, and those to frames that are
    // borrowed for longer than the call; the kernel only reads them.
    let n = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
