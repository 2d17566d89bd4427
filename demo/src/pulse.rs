//! A server of thousands of connections, each of which is given bytes at a steady pace, or an answer to each request.
//!
//! What it sends follows from what it was asked, and only *when* it sends from the clock: pulses are due at moments that the
//! client names, so that every copy of the server is in time, one that was started later too.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::pace::now_us;
use crate::payload::{Exchange, MESSAGE_BYTES, fill};

/// Bytes of a pulse.
pub(crate) const PULSE_BYTES: u64 = 64;

/// Pulses written at once by a server that has some to make up for.
const PULSES_MAX: u64 = 256;

/// Requests read at once.
const REQUESTS_MAX: usize = 32;

/// What a connection asks for, in its first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// [`PULSE_BYTES`] of the stream `seed` at `start_us` of the monotonic clock and every `period_us` from then on, until
    /// the client resets.
    Pulses {
        seed: u64,
        start_us: u64,
        period_us: u64,
    },
    /// An answer to each message that follows: see [`Exchange`].
    Exchange,
}

impl Ask {
    /// The first message.
    pub(crate) fn encode(self) -> [u8; MESSAGE_BYTES] {
        let (seed, start, period) = match self {
            Self::Pulses {
                seed,
                start_us,
                period_us,
            } => (seed, start_us, period_us),
            Self::Exchange => (0, 0, 0),
        };
        let mut message = [0; MESSAGE_BYTES];
        for (place, number) in message.chunks_exact_mut(8).zip([seed, start, period]) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        message
    }

    fn decode(message: &[u8; MESSAGE_BYTES]) -> Self {
        let (numbers, _) = message.as_chunks::<8>();
        let [seed, start_us, period_us, _] = [0, 1, 2, 3].map(|i| u64::from_be_bytes(numbers[i]));
        match period_us {
            0 => Self::Exchange,
            _ => Self::Pulses {
                seed,
                start_us,
                period_us,
            },
        }
    }
}

/// Serves for ever.
///
/// # Errors
/// The listener failed.
pub(crate) fn serve(listen: SocketAddr) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(listen).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            // A client that goes away is that client's business.
            tokio::spawn(async move { one(stream).await });
        }
    })
}

async fn one(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    stream.read_exact(&mut message).await?;
    match Ask::decode(&message) {
        Ask::Exchange => exchange(stream).await,
        Ask::Pulses {
            seed,
            start_us,
            period_us,
        } => pulses(stream, seed, start_us, period_us).await,
    }
}

async fn pulses(mut stream: TcpStream, seed: u64, start_us: u64, period_us: u64) -> io::Result<()> {
    let mut sent = 0;
    let mut buffer = Vec::new();
    loop {
        let due_us = start_us.saturating_add(sent * period_us);
        let now = now_us();
        if now < due_us {
            tokio::time::sleep(Duration::from_micros(due_us - now)).await;
            continue;
        }
        let count = ((now - due_us) / period_us + 1).min(PULSES_MAX);
        let bytes = usize::try_from(count * PULSE_BYTES).expect("a few pulses");
        buffer.resize(bytes, 0);
        fill(seed, sent * PULSE_BYTES, &mut buffer);
        stream.write_all(&buffer).await?;
        sent += count;
    }
}

async fn exchange(mut stream: TcpStream) -> io::Result<()> {
    let mut state = Exchange::default();
    let mut buffer = [0; MESSAGE_BYTES * REQUESTS_MAX];
    let mut held = 0;
    let mut answers = Vec::new();
    loop {
        let got = stream.read(&mut buffer[held..]).await?;
        if got == 0 {
            return Ok(());
        }
        answers.clear();
        held = state.answer_all(&mut buffer, held + got, &mut answers);
        stream.write_all(&answers).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ask_is_read_as_it_was_written() {
        let pulses = Ask::Pulses {
            seed: 1,
            start_us: 2,
            period_us: 3,
        };
        for ask in [pulses, Ask::Exchange] {
            assert_eq!(Ask::decode(&ask.encode()), ask);
        }
    }
}
