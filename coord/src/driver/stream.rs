//! A client's byte stream as the engine's thread sees it: read and written without waiting.

use std::io::{self, Read, Write};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use tokio_rustls::rustls::Connection;

/// A stream of bytes on a socket that does not block.
#[derive(Debug)]
pub(super) enum Stream {
    /// TCP.
    Plain(TcpStream),
    /// TLS over it, its handshake done.
    Tls(Box<TlsSocket>),
}

/// A socket, and what TLS makes of its bytes.
#[derive(Debug)]
pub(super) struct TlsSocket {
    socket: TcpStream,
    tls: Connection,
}

impl TlsSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Gone without a goodbye: our frames say themselves where they end.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                result => return result,
            }
            if self.tls.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            let processed = self.tls.process_new_packets();
            // It may have an answer of its own, such as why it will not go on.
            let pushed = self.push();
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            pushed?;
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push()?;
        let count = self.tls.writer().write(bytes)?;
        self.push()?;
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }

    /// Writes what is encrypted already, as far as there is room.
    fn push(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match retry(|| self.tls.write_tls(&mut self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Stream {
    /// A connection that was accepted elsewhere, already not blocking.
    pub(super) fn plain(stream: std::net::TcpStream) -> Self {
        Self::Plain(TcpStream::from_std(stream))
    }

    /// As [`Self::plain`], after TLS's handshake.
    pub(super) fn tls(stream: std::net::TcpStream, tls: Connection) -> Self {
        let socket = TcpStream::from_std(stream);
        Self::Tls(Box::new(TlsSocket { socket, tls }))
    }

    /// Whether something may be there to read or to write of which the socket says nothing.
    pub(super) fn holds_back(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(_) => true,
        }
    }

    /// Whether bytes that were taken are not out yet.
    pub(super) fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.tls.wants_write(),
        }
    }

    /// Writes what was taken and is not out yet, as far as there is room.
    pub(super) fn push(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.push(),
        }
    }

    fn socket(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.socket,
        }
    }

    /// Has `registry` tell, once for each change, when there is more to read or room to write.
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.register(self.socket(), token, interest)
    }

    /// Whether a read that does not fill its buffer has taken all that there is.
    pub(super) fn short_read_is_all(&self) -> bool {
        match self {
            Self::Plain(_) => true,
            Self::Tls(_) => false,
        }
    }

    /// Reads what is there. `WouldBlock` if that is nothing.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        retry(|| match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        })
    }

    /// Writes what there is room for. `WouldBlock` if that is nothing.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        })
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&mut self) {
        // It may have gone already.
        if let Self::Tls(stream) = self {
            stream.tls.send_close_notify();
            let _ = stream.push();
        }
        let _ = self.socket().shutdown(std::net::Shutdown::Write);
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Bytes on their way out.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    /// So many are out already.
    start: usize,
}

impl Outgoing {
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends; an empty queue takes its room from `spare`.
    pub(super) fn push(&mut self, bytes: &[u8], spare: &mut Spare) {
        if self.bytes.capacity() == 0 {
            self.bytes = spare.take();
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes until everything is out, or there is no room for more. Gives its room back when it is
    /// empty.
    pub(super) fn flush(&mut self, stream: &mut Stream, spare: &mut Spare) -> io::Result<()> {
        while !self.is_empty() {
            match stream.write(&self.bytes[self.start..]) {
                Ok(count) => self.start += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.start > self.bytes.len() / 2 {
                        self.bytes.drain(..self.start);
                        self.start = 0;
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.start = 0;
        spare.give(std::mem::take(&mut self.bytes));
        Ok(())
    }
}

/// Room that nobody uses at the moment, so that an idle connection holds none.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<Vec<u8>>);

impl Spare {
    /// Buffers kept, and bytes of each at most.
    const COUNT_MAX: usize = 32;
    const BYTES_MAX: usize = 64 * 1024;

    fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_default()
    }

    fn give(&mut self, mut buffer: Vec<u8>) {
        if self.0.len() < Self::COUNT_MAX && (1..=Self::BYTES_MAX).contains(&buffer.capacity()) {
            buffer.clear();
            self.0.push(buffer);
        }
    }
}
