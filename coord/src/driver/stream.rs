//! A client's byte stream as the engine's thread sees it: read and written without waiting.

use std::io::{self, Read, Write};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

/// A stream of bytes on a socket that does not block.
#[derive(Debug)]
pub(super) enum Stream {
    /// TCP.
    Plain(TcpStream),
}

impl Stream {
    /// A connection that was accepted elsewhere, already not blocking.
    pub(super) fn plain(stream: std::net::TcpStream) -> Self {
        Self::Plain(TcpStream::from_std(stream))
    }

    fn socket(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(socket) => socket,
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
        }
    }

    /// Reads what is there. `WouldBlock` if that is nothing.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        retry(|| match self {
            Self::Plain(socket) => socket.read(buffer),
        })
    }

    /// Writes what there is room for. `WouldBlock` if that is nothing.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| match self {
            Self::Plain(socket) => socket.write(bytes),
        })
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&mut self) {
        // It may have gone already.
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
