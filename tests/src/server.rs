//! The deterministic server that the clients of [`crate::client`] talk to: what it answers on a
//! connection follows from what was sent on that connection and nothing else.

use std::io::{self, Read, Write};
use std::net::TcpStream;

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

/// A file in the server's working folder that makes it a faulty one: it holds the offset of the output byte that each
/// connection gets wrong. Looked for whenever a connection begins.
pub const FLIP: &str = "flip";

/// A file in the server's working folder that makes it die by SIGKILL as soon as it has closed a connection.
pub const DIE: &str = "die";

/// A file in the server's working folder: it holds how many of the connections that begin are broken off at once.
pub const RESET: &str = "reset";

/// Whether a connection that begins is broken off.
///
/// # Errors
/// The number cannot be written back.
pub fn is_broken_off() -> io::Result<bool> {
    let left = std::fs::read_to_string(RESET).ok();
    let left = left.and_then(|left| left.trim().parse().ok());
    let Some(left) = left.filter(|left: &u32| *left > 0) else {
        return Ok(false);
    };
    std::fs::write(RESET, (left - 1).to_string())?;
    Ok(true)
}

/// Serves one connection to its end.
///
/// # Errors
/// The connection failed or asked for nothing sensible.
pub fn serve_one(stream: TcpStream) -> io::Result<()> {
    let flip = std::fs::read_to_string(FLIP).ok();
    let flip = flip.and_then(|offset| offset.trim().parse().ok());
    serve_faulty(stream, flip)
}

/// The byte at offset `flip` of the output is wrong.
fn serve_faulty(mut stream: TcpStream, flip: Option<u64>) -> io::Result<()> {
    let mut written = 0;
    stream.set_nodelay(true)?;
    let mut session = Session::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut output = session.output(CHUNK);
        while !output.is_empty() {
            let place = flip.and_then(|flip| flip.checked_sub(written));
            if let Some(byte) = place
                .and_then(|at| usize::try_from(at).ok())
                .and_then(|at| output.get_mut(at))
            {
                *byte ^= 0x20;
            }
            written += output.len() as u64;
            stream.write_all(&output)?;
            output = session.output(CHUNK);
        }
        match session.state() {
            SessionState::Open => {}
            SessionState::Done => return Ok(()),
            SessionState::Refused => return Err(io::ErrorKind::InvalidData.into()),
        }
        match stream.read(&mut buffer)? {
            0 => session.end(),
            n => session.input(&buffer[..n]),
        }
    }
}

/// How a [`Session`] stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// It goes on.
    Open,
    /// The server closes: all has been answered.
    Done,
    /// The server closes: what was asked makes no sense.
    Refused,
}

/// The server's side of one connection as a plain value: bytes in, bytes out.
pub struct Session {
    work: Work,
    /// Answers that were not taken yet.
    ready: Vec<u8>,
}

enum Work {
    First(Vec<u8>),
    Download {
        seed: u64,
        sent: u64,
        length: u64,
    },
    Upload {
        digest: Context,
        received: u64,
        length: u64,
    },
    Exchange {
        size: usize,
        digest: Context,
        request: Vec<u8>,
    },
    Done,
    Refused,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            work: Work::First(Vec::new()),
            ready: Vec::new(),
        }
    }
}

impl Session {
    /// Bytes from the client.
    pub fn input(&mut self, mut bytes: &[u8]) {
        if let Work::First(first) = &mut self.work {
            let (taken, rest) = bytes.split_at(bytes.len().min(REQUEST_LEN - first.len()));
            first.extend_from_slice(taken);
            bytes = rest;
            let Ok(first) = <&[u8; REQUEST_LEN]>::try_from(&first[..]) else {
                return;
            };
            self.work = match Request::decode(first) {
                None => Work::Refused,
                Some(Request::Download { seed, length }) => Work::Download {
                    seed,
                    sent: 0,
                    length,
                },
                Some(Request::Upload { length }) => Work::Upload {
                    digest: Context::new(&SHA256),
                    received: 0,
                    length,
                },
                Some(Request::Exchange { size }) => {
                    let size = usize::try_from(size).expect("32 bits");
                    Work::Exchange {
                        size,
                        digest: Context::new(&SHA256),
                        request: Vec::new(),
                    }
                }
            };
        }
        match &mut self.work {
            Work::Upload {
                digest, received, ..
            } => {
                digest.update(bytes);
                *received += bytes.len() as u64;
            }
            Work::Exchange {
                size,
                digest,
                request,
            } => {
                while !bytes.is_empty() {
                    let (taken, rest) = bytes.split_at(bytes.len().min(*size - request.len()));
                    request.extend_from_slice(taken);
                    bytes = rest;
                    if request.len() == *size {
                        digest.update(request);
                        self.ready
                            .extend_from_slice(digest.clone().finish().as_ref());
                        self.ready.extend_from_slice(&request[DIGEST_LEN..]);
                        request.clear();
                    }
                }
            }
            // Nothing was asked for beyond the request; what comes is not looked at.
            Work::First(_) | Work::Download { .. } | Work::Done | Work::Refused => {}
        }
    }

    /// The end of the client's stream.
    pub fn end(&mut self) {
        match &self.work {
            Work::Upload {
                digest,
                received,
                length,
            } if received == length => {
                self.ready
                    .extend_from_slice(digest.clone().finish().as_ref());
                self.work = Work::Done;
            }
            Work::Exchange { request, .. } if request.is_empty() => self.work = Work::Done,
            Work::Upload { .. } | Work::Exchange { .. } | Work::First(_) => {
                self.work = Work::Refused;
            }
            // A client may close its side at once and still read.
            Work::Download { .. } | Work::Done | Work::Refused => {}
        }
    }

    /// The next answer bytes, at most `room`; none if there are none now.
    pub fn output(&mut self, room: usize) -> Vec<u8> {
        if let Work::Download { seed, sent, length } = &mut self.work {
            let left = usize::try_from(*length - *sent).unwrap_or(usize::MAX);
            let mut bytes = vec![0; left.min(room)];
            pattern::fill(*seed, *sent, &mut bytes);
            *sent += bytes.len() as u64;
            if sent == length {
                self.work = Work::Done;
            }
            return bytes;
        }
        let rest = self.ready.split_off(self.ready.len().min(room));
        std::mem::replace(&mut self.ready, rest)
    }

    /// How it stands, once all output was taken.
    #[must_use]
    pub fn state(&self) -> SessionState {
        match self.work {
            Work::Refused => SessionState::Refused,
            Work::Done if self.ready.is_empty() => SessionState::Done,
            _ => SessionState::Open,
        }
    }
}
