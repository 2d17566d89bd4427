//! The connection to the local copy of the server, one for each client connection.
//!
//! Every replica's server is fed from the event log (R3); what it answers is read by whoever keeps
//! it: the leader's stack or a backup's record. Sockets are non-blocking and edge-triggered.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use socket2::SockRef;

use super::input::Input;
use super::queues::{Queues, Seen};

/// Where the local server listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// What one read from the server gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    Bytes(usize),
    /// Nothing more for now.
    Empty,
    /// The server closed its side.
    End,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One connection to the local server.
#[derive(Debug)]
pub(crate) struct Upstream {
    stream: Stream,
    connected: bool,
    readable: bool,
    writable: bool,
    /// Input taken by the server so far (written to its socket), as a stream offset.
    taken: u64,
    shut: bool,
    ended: bool,
}

/// At most this many segments go into one write.
const GATHER_MAX: usize = 64;

impl Upstream {
    /// Starts connecting; readiness arrives under `token`.
    pub(crate) fn connect(target: &Target, registry: &Registry, token: Token) -> io::Result<Self> {
        let mut stream = match target {
            Target::Tcp(address) => {
                let stream = TcpStream::connect(*address)?;
                // The server's answer must not wait for ours.
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Target::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        match &mut stream {
            Stream::Tcp(s) => registry.register(s, token, interest)?,
            Stream::Unix(s) => registry.register(s, token, interest)?,
        }
        Ok(Self {
            stream,
            connected: false,
            readable: false,
            writable: false,
            taken: 0,
            shut: false,
            ended: false,
        })
    }

    /// Notes what the event loop saw.
    pub(crate) fn handle_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Input that the server has taken, as a stream offset.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// What comes before `offset` is in the state that the server began with.
    pub(crate) fn start_at(&mut self, offset: u64) {
        self.taken = offset;
    }

    /// Whether the connection stands (the open is given to the server).
    pub(crate) fn connected(&self) -> bool {
        self.connected
    }

    /// Whether a read may give something.
    pub(crate) fn readable(&self) -> bool {
        self.connected && self.readable && !self.ended
    }

    /// Whether the server has said something that was not read.
    pub(crate) fn unread(&self) -> bool {
        let bytes = match &self.stream {
            Stream::Tcp(s) => rustix::io::ioctl_fionread(s),
            Stream::Unix(s) => rustix::io::ioctl_fionread(s),
        };
        bytes.map_or(true, |bytes| bytes > 0)
    }

    /// Whether the end of its input was given to the server.
    pub(crate) fn shut(&self) -> bool {
        self.shut
    }

    /// What the kernel shows of the server's end.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn look(&self, queues: &mut Queues) -> io::Result<Seen> {
        match &self.stream {
            Stream::Tcp(s) => match s.peer_addr() {
                Ok(server) => queues.tcp(server, s.local_addr()?),
                // Both sides have closed.
                Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(Seen::Closed),
                Err(e) => Err(e),
            },
            Stream::Unix(s) => {
                let inode = rustix::fs::fstat(s)?.st_ino;
                queues.unix(u32::try_from(inode).map_err(io::Error::other)?)
            }
        }
    }

    /// Whether the server's reading of the end cannot be seen.
    pub(crate) fn end_is_unseen(&self) -> bool {
        self.shut && !self.ended && matches!(self.stream, Stream::Unix(_))
    }

    fn check_connected(&mut self) -> io::Result<bool> {
        if self.connected {
            return Ok(true);
        }
        if !self.writable {
            return Ok(false);
        }
        if let Some(error) = match &self.stream {
            Stream::Tcp(s) => s.take_error()?,
            Stream::Unix(s) => s.take_error()?,
        } {
            return Err(error);
        }
        let peer = match &self.stream {
            Stream::Tcp(s) => s.peer_addr().map(drop),
            Stream::Unix(s) => s.peer_addr().map(drop),
        };
        match peer {
            Ok(()) => {
                self.connected = true;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::NotConnected => {
                self.writable = false;
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Gives the server what it will take of `input`, and its end once all is taken.
    ///
    /// # Errors
    /// The connection failed; the server closed it or is not there.
    pub(crate) fn feed(&mut self, input: &Input) -> io::Result<()> {
        if !self.check_connected()? {
            return Ok(());
        }
        while self.writable && self.taken < input.end() {
            let parts = input.gather(self.taken, GATHER_MAX);
            if parts.is_empty() {
                // It is being read from the disk.
                break;
            }
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let written = match &mut self.stream {
                Stream::Tcp(s) => s.write_vectored(&slices),
                Stream::Unix(s) => s.write_vectored(&slices),
            };
            match written {
                Ok(n) => self.taken += n as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if input.finished() && self.taken == input.end() && !self.shut {
            self.shut = true;
            let done = match &self.stream {
                Stream::Tcp(s) => s.shutdown(Shutdown::Write),
                Stream::Unix(s) => s.shutdown(Shutdown::Write),
            };
            match done {
                // The server had closed already: its end is read as such.
                Err(e) if e.kind() == io::ErrorKind::NotConnected => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Whether the server would take more of `input` than is at hand.
    pub(crate) fn starves(&self, input: &Input) -> bool {
        self.connected && self.writable && self.taken < input.end()
    }

    /// Reads the server's output into `buf`.
    ///
    /// # Errors
    /// The server reset the connection.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> io::Result<ReadOutcome> {
        loop {
            let got = match &mut self.stream {
                Stream::Tcp(s) => s.read(buf),
                Stream::Unix(s) => s.read(buf),
            };
            return match got {
                Ok(0) => {
                    self.ended = true;
                    Ok(ReadOutcome::End)
                }
                Ok(n) => Ok(ReadOutcome::Bytes(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Ok(ReadOutcome::Empty)
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => Err(e),
            };
        }
    }

    /// Closes with a reset, as the client did.
    pub(crate) fn abort(self) {
        if let Stream::Tcp(s) = &self.stream {
            // Best effort: a plain close follows in any case.
            let _ = SockRef::from(s).set_linger(Some(Duration::ZERO));
        }
    }
}
