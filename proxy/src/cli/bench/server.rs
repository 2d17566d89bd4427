//! `unbroken bench-server`: the server that the benchmark measures.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use clap::Args;
use tracing::{debug, warn};

use super::protocol::{
    ECHO, ECHO_BYTES_MAX, HEADER_BYTES, PATTERN_BYTES, SEND, TAKE, parse, pattern,
};

/// Serves the benchmark: echoes, sends and takes bytes
///
/// Deterministic: every connection's answers depend on its own bytes alone. Runs on each replica as
/// the server of a service, until it is ended.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  unbroken bench-server --listen 127.0.0.1:7003")]
pub(in crate::cli) struct BenchServerArgs {
    /// Where to listen
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
}

/// A connection is a thread: more than this are refused.
const CONNECTIONS_MAX: usize = 1024;

const BUFFER_BYTES: usize = 256 << 10;

pub(in crate::cli) fn run(args: &BenchServerArgs) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(args.listen)
        .with_context(|| format!("listening on --listen {}", args.listen))?;
    println!("listening on {}", listener.local_addr()?);
    serve(&listener)?;
    Ok(ExitCode::SUCCESS)
}

/// Serves until accepting fails for good.
pub(super) fn serve(listener: &TcpListener) -> anyhow::Result<()> {
    let pattern: Arc<[u8]> = pattern().into();
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("accepting a connection"),
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            warn!(CONNECTIONS_MAX, "too many connections: one refused");
            continue;
        }
        let (pattern, open) = (Arc::clone(&pattern), Arc::clone(&open));
        std::thread::spawn(move || {
            if let Err(error) = converse(&stream, &pattern) {
                debug!(%error, "connection ended");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Answers one connection until its client closes.
fn converse(stream: &TcpStream, pattern: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, stream);
    let mut writer = stream;
    let mut echo = Vec::new();
    loop {
        if reader.fill_buf()?.is_empty() {
            return Ok(());
        }
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header)?;
        match parse(header) {
            (ECHO, length) if length <= ECHO_BYTES_MAX => {
                echo.clear();
                reader.by_ref().take(length).read_to_end(&mut echo)?;
                writer.write_all(&echo)?;
            }
            (SEND, length) => send(&mut writer, length, pattern)?,
            (TAKE, length) => {
                let checksum = take(&mut reader, length)?;
                writer.write_all(&checksum.to_be_bytes())?;
            }
            (operation, length) => {
                debug!(operation, length, "not a request");
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }
}

/// Sends `length` bytes of the pattern, from its start.
fn send(writer: &mut &TcpStream, length: u64, pattern: &[u8]) -> io::Result<()> {
    let mut left = length;
    while left > 0 {
        let piece = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(PATTERN_BYTES);
        writer.write_all(&pattern[..piece])?;
        left -= piece as u64;
    }
    Ok(())
}

/// Takes `length` bytes and returns their CRC-32C.
fn take(reader: &mut BufReader<&TcpStream>, length: u64) -> io::Result<u32> {
    let (mut left, mut checksum) = (length, 0);
    while left > 0 {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let piece = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        checksum = crc32c::crc32c_append(checksum, &bytes[..piece]);
        reader.consume(piece);
        left -= piece as u64;
    }
    Ok(checksum)
}
