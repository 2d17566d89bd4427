//! The deterministic server that the clients of [`crate::client`] talk to: what it answers on a
//! connection follows from what was sent on that connection and nothing else.

use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use ring::digest::{Context, SHA256};

use crate::pattern;

/// Bytes of a SHA-256 digest.
pub const DIGEST_LEN: usize = 32;

const REQUEST_LEN: usize = 17;
const CHUNK: usize = 64 * 1024;

/// What a connection asks for, in its first 17 bytes: a letter and two big-endian 64-bit numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Send `length` bytes of the stream `seed`, then close.
    Download {
        /// Which stream.
        seed: u64,
        /// How much of it.
        length: u64,
    },
    /// Take `length` bytes and the end of the stream, answer their SHA-256, close.
    Upload {
        /// How much there will be.
        length: u64,
    },
    /// Answer each `size` bytes with as many: the SHA-256 of all that was asked so far, then the rest
    /// of the request. At the end of the stream, close.
    Exchange {
        /// Bytes of a request and of its answer, at least [`DIGEST_LEN`].
        size: u32,
    },
}

impl Request {
    /// The bytes that a client sends first.
    #[must_use]
    pub fn encode(self) -> [u8; REQUEST_LEN] {
        let (kind, a, b) = match self {
            Self::Download { seed, length } => (b'D', seed, length),
            Self::Upload { length } => (b'U', 0, length),
            Self::Exchange { size } => (b'E', 0, u64::from(size)),
        };
        let mut bytes = [kind; REQUEST_LEN];
        bytes[1..9].copy_from_slice(&a.to_be_bytes());
        bytes[9..].copy_from_slice(&b.to_be_bytes());
        bytes
    }

    /// Reads them; `None` if they make no sense.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let (numbers, []) = bytes[1..].as_chunks::<8>() else {
            return None;
        };
        let [a, b] = [numbers[0], numbers[1]].map(u64::from_be_bytes);
        match bytes[0] {
            b'D' => Some(Self::Download { seed: a, length: b }),
            b'U' => Some(Self::Upload { length: b }),
            b'E' => {
                let size = u32::try_from(b).ok()?;
                (usize::try_from(size).ok()? >= DIGEST_LEN).then_some(Self::Exchange { size })
            }
            _ => None,
        }
    }
}

/// Serves every connection on a thread of its own, for ever.
///
/// # Errors
/// The listener failed.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        std::thread::Builder::new().spawn(move || {
            // The client sees the same as we: a connection that ends.
            let _ = serve_one(stream);
        })?;
    }
}

/// Serves one connection to its end.
///
/// # Errors
/// The connection failed or asked for nothing sensible.
pub fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::with_capacity(CHUNK, stream.try_clone()?);
    let mut first = [0; REQUEST_LEN];
    input.read_exact(&mut first)?;
    match Request::decode(&first).ok_or(io::ErrorKind::InvalidData)? {
        Request::Download { seed, length } => {
            let mut buffer = vec![0; CHUNK];
            let mut sent = 0;
            while sent < length {
                let left = usize::try_from(length - sent).unwrap_or(usize::MAX);
                let chunk = &mut buffer[..CHUNK.min(left)];
                pattern::fill(seed, sent, chunk);
                stream.write_all(chunk)?;
                sent += chunk.len() as u64;
            }
            Ok(())
        }
        Request::Upload { length } => {
            let mut digest = Context::new(&SHA256);
            let mut buffer = vec![0; CHUNK];
            let mut received = 0;
            loop {
                let n = input.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                digest.update(&buffer[..n]);
                received += n as u64;
            }
            if received != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            stream.write_all(digest.finish().as_ref())
        }
        Request::Exchange { size } => {
            let mut digest = Context::new(&SHA256);
            let mut buffer = vec![0; usize::try_from(size).expect("32 bits")];
            loop {
                match input.read_exact(&mut buffer) {
                    Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    done => done?,
                }
                digest.update(&buffer);
                buffer[..DIGEST_LEN].copy_from_slice(digest.clone().finish().as_ref());
                stream.write_all(&buffer)?;
            }
        }
    }
}
