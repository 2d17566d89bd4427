//! The small servers that each replica runs its own copies of: deterministic, and knowing nothing of
//! replication.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use ring::digest::{Context, SHA256};

use crate::payload::{Exchange, MESSAGE_BYTES, hex};

/// Longest request head that the file server reads, in bytes.
const HEAD_BYTES_MAX: u64 = 16 * 1024;

/// Serves each connection on a thread of its own with `serve`, for ever.
///
/// # Errors
/// The listener failed.
pub(crate) fn run<F>(listener: &TcpListener, serve: F) -> io::Result<()>
where
    F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let serve = Arc::new(serve);
    loop {
        let (stream, _) = listener.accept()?;
        let serve = Arc::clone(&serve);
        thread::spawn(move || {
            // A client that goes away is that client's business.
            let _ = stream.set_nodelay(true);
            let _ = serve(stream);
        });
    }
}

/// HTTP/1.1 from a folder: GET and HEAD of plain files, connections kept. Its answers hold nothing
/// that differs between two copies, no date above all.
pub(crate) fn files(root: &Path, stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let Some((method, path)) = read_head(&mut reader)? else {
            return Ok(());
        };
        let plain = path
            .trim_start_matches('/')
            .split('/')
            .all(|part| !part.is_empty() && part != ".." && part != ".");
        let file = plain.then(|| File::open(root.join(path.trim_start_matches('/'))));
        match (method.as_str(), file) {
            ("GET" | "HEAD", Some(Ok(mut file))) if file.metadata()?.is_file() => {
                let length = file.metadata()?.len();
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\
                     Content-Length: {length}\r\n\r\n"
                )?;
                if method == "GET" {
                    io::copy(&mut file, &mut stream)?;
                }
            }
            ("GET" | "HEAD", _) => {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            }
            _ => {
                stream.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")?
            }
        }
    }
}

/// Reads one request's head: its method and path, or `None` at the end of the connection.
fn read_head(reader: &mut BufReader<TcpStream>) -> io::Result<Option<(String, String)>> {
    let mut head = reader.take(HEAD_BYTES_MAX);
    let mut first = String::new();
    if head.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    let mut words = first.split_whitespace();
    match (words.next(), words.next()) {
        (Some(method), Some(path)) => Ok(Some((method.to_owned(), path.to_owned()))),
        _ => Ok(None),
    }
}

/// One answer to each request, chained over the connection: see [`Exchange`].
pub(crate) fn exchange(mut stream: TcpStream) -> io::Result<()> {
    let mut state = Exchange::default();
    // Many requests at a time, as a replica that replays a connection gets them.
    let mut buffer = vec![0; MESSAGE_BYTES * 1024];
    let mut held = 0;
    let mut answers = Vec::new();
    loop {
        let got = stream.read(&mut buffer[held..])?;
        if got == 0 {
            return Ok(());
        }
        answers.clear();
        held = state.answer_all(&mut buffer, held + got, &mut answers);
        stream.write_all(&answers)?;
    }
}

/// Takes a length (8 bytes, big-endian) and that many bytes, and answers their SHA-256 in
/// hexadecimal and a line feed. Then it waits for the client to close.
pub(crate) fn upload(mut stream: TcpStream) -> io::Result<()> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let mut left = u64::from_be_bytes(length);
    let mut hasher = Context::new(&SHA256);
    let mut buffer = vec![0; 256 * 1024];
    while left > 0 {
        let most = usize::try_from(left.min(buffer.len() as u64)).expect("a buffer's length");
        let got = stream.read(&mut buffer[..most])?;
        if got == 0 {
            return Ok(());
        }
        hasher.update(&buffer[..got]);
        left -= got as u64;
    }
    writeln!(stream, "{}", hex(hasher.finish()))?;
    io::copy(&mut stream, &mut io::sink())?;
    stream.shutdown(Shutdown::Both)
}
