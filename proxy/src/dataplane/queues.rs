//! Has the server taken what it was given? The kernel says so: how much lies unread in the queue of
//! the server's end of a connection, and whether that end was accepted at all.
//!
//! Both ends are on this machine, in one network namespace, so `sock_diag` finds the server's end by
//! its addresses (one look into a hash table, 2 to 3 us). What our own end knows does not do:
//! `TCP_INFO` and `SIOCOUTQ` tell what the peer's *kernel* has.
//!
//! The messages are fixed structures of `linux/inet_diag.h` and `linux/unix_diag.h`, read and written
//! here by offset: one question is asked for every input, so it goes through no allocation.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

const AF_UNIX: u8 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const IPPROTO_TCP: u8 = 6;
const UDIAG_SHOW_PEER: u32 = 0x4;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// Neither direction goes on: what the kernel sets on our end when the other is closed.
const SHUTDOWN_BOTH: u8 = 3;

const ESTABLISHED: u8 = 1;
const SYN_RECEIVED: u8 = 3;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;
const NEW_SYN_RECEIVED: u8 = 12;

const HEADER_BYTES: usize = 16;
const TCP_REQUEST_BYTES: usize = HEADER_BYTES + 56;
const UNIX_REQUEST_BYTES: usize = HEADER_BYTES + 24;
const UNIX_MESSAGE_BYTES: usize = HEADER_BYTES + 16;

/// What the kernel shows of the server's end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is in the listener's queue: nobody has accepted it.
    NotAccepted,
    /// The server has it, and so many bytes are unread; an unread end of input counts as one.
    Unread(u32),
    /// The server has closed it.
    Closed,
    /// There is no such socket: it is closed, or not in this network namespace.
    Missing,
}

/// Asks the kernel about sockets.
#[derive(Debug)]
pub(crate) struct Queues {
    socket: Socket,
    seq: u32,
}

impl Queues {
    /// # Errors
    /// The kernel has no `sock_diag`.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(AF_NETLINK),
            Type::DGRAM,
            Some(Protocol::from(NETLINK_SOCK_DIAG)),
        )?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, seq: 0 })
    }

    /// The end at `server` of the TCP connection whose other end is `ours`.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub(crate) fn tcp(&mut self, server: SocketAddr, ours: SocketAddr) -> io::Result<Seen> {
        let mut request = [0; TCP_REQUEST_BYTES];
        let body = &mut request[HEADER_BYTES..];
        body[0] = if server.is_ipv4() { AF_INET } else { AF_INET6 };
        body[1] = IPPROTO_TCP;
        body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        body[8..10].copy_from_slice(&server.port().to_be_bytes());
        body[10..12].copy_from_slice(&ours.port().to_be_bytes());
        put_address(&mut body[12..28], server.ip());
        put_address(&mut body[28..44], ours.ip());
        // INET_DIAG_NOCOOKIE.
        body[48..56].fill(0xff);
        let mut answer = [0; 512];
        let Some(answer) = self.ask(&mut request, &mut answer)? else {
            return Ok(Seen::Missing);
        };
        let field = |at: usize| u32_at(answer, HEADER_BYTES + at);
        let (Some(state), Some(unread), Some(inode)) =
            (answer.get(HEADER_BYTES + 1), field(56), field(68))
        else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(match *state {
            // Where there is no such connection, the kernel shows the listener.
            LISTEN => Seen::Missing,
            SYN_RECEIVED | NEW_SYN_RECEIVED => Seen::NotAccepted,
            ESTABLISHED | CLOSE_WAIT if inode == 0 => Seen::NotAccepted,
            // Closed, and the rest is the kernel's.
            _ if inode == 0 => Seen::Closed,
            _ => Seen::Unread(unread),
        })
    }

    /// The other end of our Unix socket with this inode. Its end of input cannot be seen.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub(crate) fn unix(&mut self, inode: u32) -> io::Result<Seen> {
        let mut request = [0; UNIX_REQUEST_BYTES];
        let body = &mut request[HEADER_BYTES..];
        body[0] = AF_UNIX;
        body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        body[8..12].copy_from_slice(&inode.to_ne_bytes());
        body[12..16].copy_from_slice(&(UDIAG_SHOW_PEER | UDIAG_SHOW_RQLEN).to_ne_bytes());
        body[16..24].fill(0xff);
        let mut answer = [0; 512];
        let Some(answer) = self.ask(&mut request, &mut answer)? else {
            return Ok(Seen::Missing);
        };
        let (mut peer, mut unread, mut over) = (None, None, false);
        let mut rest = answer.get(UNIX_MESSAGE_BYTES..).unwrap_or_default();
        while let [l0, l1, t0, t1, value @ ..] = rest {
            let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
            match u16::from_ne_bytes([*t0, *t1]) {
                UNIX_DIAG_PEER => peer = u32_at(value, 0),
                // The queue in front of us, then what is on its way to the peer.
                UNIX_DIAG_RQLEN => unread = u32_at(value, 4),
                UNIX_DIAG_SHUTDOWN => over = value.first() == Some(&SHUTDOWN_BOTH),
                _ => {}
            }
            rest = rest
                .get(length.max(4).next_multiple_of(4)..)
                .unwrap_or_default();
        }
        Ok(match (peer, unread) {
            (None, _) => Seen::Closed,
            (Some(0), _) if over => Seen::Closed,
            (Some(0), _) => Seen::NotAccepted,
            (Some(_), unread) => Seen::Unread(unread.unwrap_or(0)),
        })
    }

    /// One question, and the message that answers it; `None`: there is no such socket.
    fn ask<'a>(&mut self, request: &mut [u8], buf: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        self.seq = self.seq.wrapping_add(1);
        let length = u32::try_from(request.len()).expect("a small constant");
        request[0..4].copy_from_slice(&length.to_ne_bytes());
        request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        request[8..12].copy_from_slice(&self.seq.to_ne_bytes());
        // The kernel answers within the call; there is nothing to wait for.
        self.socket.send(request)?;
        loop {
            let n = io::Read::read(&mut &self.socket, buf)?;
            let answer = &buf[..n];
            if u32_at(answer, 8) != Some(self.seq) {
                continue;
            }
            let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
            if kind != Some(NLMSG_ERROR) {
                return Ok(Some(&buf[..n]));
            }
            let code = u32_at(answer, HEADER_BYTES).map_or(0, u32::cast_signed);
            let error = io::Error::from_raw_os_error(-code);
            return match error.kind() {
                io::ErrorKind::NotFound => Ok(None),
                _ => Err(error),
            };
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(four.try_into().expect("four bytes")))
}

fn put_address(to: &mut [u8], address: IpAddr) {
    match address {
        IpAddr::V4(v4) => to[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => to.copy_from_slice(&v6.octets()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn over_tcp(address: &str) {
        let mut queues = Queues::open().unwrap();
        let listener = TcpListener::bind(address).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, ours) = (client.peer_addr().unwrap(), client.local_addr().unwrap());
        let mut look = || queues.tcp(server, ours).unwrap();
        assert_eq!(look(), Seen::NotAccepted);
        let (mut accepted, _) = listener.accept().unwrap();
        assert_eq!(look(), Seen::Unread(0));
        client.write_all(&[7; 100]).unwrap();
        assert_eq!(look(), Seen::Unread(100));
        accepted.read_exact(&mut [0; 60]).unwrap();
        assert_eq!(look(), Seen::Unread(40));
        accepted.read_exact(&mut [0; 40]).unwrap();
        assert_eq!(look(), Seen::Unread(0));
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(look(), Seen::Unread(1), "the end is an input, too");
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(look(), Seen::Unread(0));
        drop(accepted);
        assert!(matches!(look(), Seen::Closed | Seen::Missing));
    }

    #[test]
    fn sees_what_a_server_has_not_taken_v4() {
        over_tcp("127.0.0.1:0");
    }

    #[test]
    fn sees_what_a_server_has_not_taken_v6() {
        over_tcp("[::1]:0");
    }

    #[test]
    fn sees_what_a_server_has_not_taken_from_a_unix_socket() {
        let folder = std::env::temp_dir().join(format!("unbroken-queues-{}", std::process::id()));
        let listener = UnixListener::bind(&folder).unwrap();
        let mut client = UnixStream::connect(&folder).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let file = std::fs::metadata(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&client)
        ));
        let inode = u32::try_from(file.unwrap().ino()).unwrap();
        let mut queues = Queues::open().unwrap();
        let mut look = || queues.unix(inode).unwrap();
        assert_eq!(look(), Seen::NotAccepted);
        let (mut accepted, _) = listener.accept().unwrap();
        assert_eq!(look(), Seen::Unread(0));
        client.write_all(&[7; 100]).unwrap();
        assert!(matches!(look(), Seen::Unread(1..)));
        accepted.read_exact(&mut [0; 60]).unwrap();
        assert!(matches!(look(), Seen::Unread(1..)));
        accepted.read_exact(&mut [0; 40]).unwrap();
        assert_eq!(look(), Seen::Unread(0));
        drop(accepted);
        assert_eq!(look(), Seen::Closed);
    }

    #[test]
    fn does_not_take_the_listener_for_the_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let nobody = SocketAddr::new(server.ip(), 1);
        let seen = Queues::open().unwrap().tcp(server, nobody).unwrap();
        assert_eq!(seen, Seen::Missing);
    }
}
