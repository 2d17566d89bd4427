//! The small clients, each a process of its own in the client host: ordinary programs on ordinary
//! sockets of the kernel, which never try a connection again.
//!
//! They report on standard output, a line each: `P MICROSECONDS TOTAL` (progress: monotonic clock,
//! units done so far), at the end `D TEXT` (done) or `E TEXT` (what went wrong).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::pace::{Pacer, Rate, UNLIMITED, now_us};
use crate::payload::{self, Exchange, MESSAGE_BYTES, fill, request};

/// Between two requests, in microseconds.
const REQUEST_INTERVAL_US: u64 = 1_000;

/// Writes progress, at most one line a millisecond.
struct Reporter {
    written_us: u64,
}

impl Reporter {
    fn new() -> Self {
        Self { written_us: 0 }
    }

    fn progress(&mut self, total: u64) {
        let now = now_us();
        if now >= self.written_us + 900 {
            self.written_us = now;
            println!("P {now} {total}");
        }
    }
}

/// Runs one client to its end and says how it ended.
pub(crate) fn report(outcome: &Result<String>) -> bool {
    match outcome {
        Ok(text) => println!("D {text}"),
        Err(error) => println!("E {error:#}"),
    }
    outcome.is_ok()
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Fetches `path` over HTTP and writes the body to standard output: stands in for curl.
///
/// # Errors
/// The connection failed, or the answer was not a whole file.
pub(crate) fn get(address: SocketAddr, path: &str) -> Result<()> {
    let mut stream = connect(address)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reader = BufReader::with_capacity(16 * 1024, stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.split(' ').nth(1) != Some("200") {
        bail!("the server answered {:?}", line.trim_end());
    }
    let mut length = None;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let field = line.trim_end();
        if field.is_empty() {
            break;
        }
        if let Some((name, value)) = field.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(
                value
                    .trim()
                    .parse::<u64>()
                    .context("reading Content-Length")?,
            );
        }
    }
    let length = length.context("the server gave no Content-Length")?;
    let copied = io::copy(&mut reader.take(length), &mut io::stdout().lock())?;
    if copied != length {
        bail!("the connection ended after {copied} of {length} bytes");
    }
    Ok(())
}

/// True once standard input has ended: the demonstration wants the client to finish.
pub(crate) fn end_of_input() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        flag.store(true, Ordering::Relaxed);
    });
    ended
}

/// Sends a request each millisecond, the next only when the last is answered, and reads what
/// `expected` says of each answer, until `ended` is set.
fn converse(
    address: SocketAddr,
    ended: &AtomicBool,
    mut request: impl FnMut(u64) -> Vec<u8>,
    mut expected: impl FnMut(&[u8]) -> Vec<u8>,
) -> Result<String> {
    let mut stream = connect(address)?;
    let mut reporter = Reporter::new();
    let mut hasher = ring::digest::Context::new(&ring::digest::SHA256);
    let mut answer = Vec::new();
    let mut due_us = now_us();
    let mut count = 0;
    while !ended.load(Ordering::Relaxed) {
        let now = now_us();
        if now < due_us {
            thread::sleep(Duration::from_micros(due_us - now));
        }
        due_us = (due_us + REQUEST_INTERVAL_US).max(now_us());
        let question = request(count);
        stream
            .write_all(&question)
            .with_context(|| format!("sending request {count}"))?;
        let should = expected(&question);
        answer.resize(should.len(), 0);
        stream
            .read_exact(&mut answer)
            .with_context(|| format!("reading answer {count}"))?;
        if let Some(at) = answer
            .iter()
            .zip(&should)
            .position(|(is, should)| is != should)
        {
            bail!("answer {count} is wrong from its byte {at} on");
        }
        hasher.update(&answer);
        count += 1;
        reporter.progress(count);
    }
    stream.shutdown(Shutdown::Write).context("closing")?;
    let rest = io::copy(&mut stream, &mut io::sink()).context("waiting for the server's close")?;
    if rest != 0 {
        bail!("{rest} bytes after the last answer");
    }
    Ok(format!("{count} {}", payload::hex(hasher.finish())))
}

/// The request/response client; the server is [`crate::serve::exchange`].
///
/// # Errors
/// The connection failed, or an answer was wrong.
pub(crate) fn exchange(address: SocketAddr, ended: &AtomicBool, seed: u64) -> Result<String> {
    let mut state = Exchange::default();
    converse(
        address,
        ended,
        |number| request(seed, number).to_vec(),
        |question| {
            let question: &[u8; MESSAGE_BYTES] = question.try_into().expect("a whole request");
            state.answer(question).to_vec()
        },
    )
}

/// The client of a server that somebody else wrote: the same request again and again, with the same
/// answer each time.
///
/// # Errors
/// The connection failed, or an answer was wrong.
pub(crate) fn talk(
    address: SocketAddr,
    ended: &AtomicBool,
    request: &[u8],
    response: &[u8],
) -> Result<String> {
    converse(address, ended, |_| request.to_vec(), |_| response.to_vec())
}

/// The client of an echoing server: numbered lines, each of which must come back.
///
/// # Errors
/// The connection failed, or a line came back changed.
pub(crate) fn echo(address: SocketAddr, ended: &AtomicBool) -> Result<String> {
    converse(
        address,
        ended,
        |number| format!("line {number:010}\n").into_bytes(),
        <[u8]>::to_vec,
    )
}

/// Uploads `length` bytes of the stream `seed` and compares the checksum that the server answers.
/// Each number on standard input is a new rate in bytes a second, `max` for none.
///
/// # Errors
/// The connection failed, or the checksum was wrong.
pub(crate) fn upload(address: SocketAddr, seed: u64, length: u64, rate: u64) -> Result<String> {
    let rate = Arc::new(Rate::new(rate));
    let wanted = Arc::clone(&rate);
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            wanted.set(line.trim().parse().unwrap_or(UNLIMITED));
        }
    });
    let mut stream = connect(address)?;
    stream
        .write_all(&length.to_be_bytes())
        .context("sending the length")?;
    let mut pacer = Pacer::new();
    let mut reporter = Reporter::new();
    let mut hasher = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; crate::pace::PIECE_BYTES_MAX];
    let mut sent = 0;
    while sent < length {
        let piece = pacer.wait(&rate);
        let piece = usize::try_from((length - sent).min(piece as u64)).expect("at most a piece");
        fill(seed, sent, &mut buffer[..piece]);
        hasher.update(&buffer[..piece]);
        stream
            .write_all(&buffer[..piece])
            .with_context(|| format!("sending at byte {sent}"))?;
        pacer.done(&rate, piece);
        sent += piece as u64;
        reporter.progress(sent);
    }
    let should = payload::hex(hasher.finish());
    let mut answer = vec![0; should.len() + 1];
    stream
        .read_exact(&mut answer)
        .context("reading the checksum")?;
    let is = String::from_utf8_lossy(&answer);
    if is.trim_end() != should {
        bail!(
            "the server answered the checksum {}, it should be {should}",
            is.trim_end()
        );
    }
    stream.shutdown(Shutdown::Write).context("closing")?;
    io::copy(&mut stream, &mut io::sink()).context("waiting for the server's close")?;
    println!("P {} {sent}", now_us());
    Ok(format!("{sent} {should}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::serve;

    fn serve_once(
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve::run(&listener, serve));
        address
    }

    #[test]
    fn an_upload_is_answered_with_its_checksum() {
        let address = serve_once(serve::upload);
        let done = upload(address, 5, 1_000_001, UNLIMITED).unwrap();
        assert_eq!(
            done,
            format!("1000001 {}", payload::stream_sha256(5, 1_000_001))
        );
    }

    #[test]
    fn an_upload_that_lost_a_byte_is_noticed() {
        let address = serve_once(|mut stream| {
            let mut length = [0; 8];
            stream.read_exact(&mut length)?;
            let mut bytes = vec![0; usize::try_from(u64::from_be_bytes(length)).unwrap()];
            stream.read_exact(&mut bytes)?;
            bytes[777] ^= 1;
            let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
            writeln!(stream, "{}", payload::hex(digest))
        });
        let error = upload(address, 5, 1_000, UNLIMITED).unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error:#}");
    }

    #[test]
    fn a_wrong_answer_is_noticed() {
        let address = serve_once(|mut stream| {
            let mut byte = [0];
            for number in 0..100 {
                stream.read_exact(&mut byte)?;
                stream.write_all(if number == 42 { b"n" } else { b"y" })?;
            }
            Ok(())
        });
        let error = talk(address, &AtomicBool::new(false), b"?", b"y").unwrap_err();
        assert_eq!(error.to_string(), "answer 42 is wrong from its byte 0 on");
    }

    #[test]
    fn a_connection_that_ends_early_is_noticed() {
        let address = serve_once(|mut stream| stream.read_exact(&mut [0; 10]));
        let error = echo(address, &AtomicBool::new(false)).unwrap_err();
        assert!(error.to_string().starts_with("reading answer"), "{error:#}");
    }

    #[test]
    fn the_exchange_goes_on_until_it_is_told_to_end() {
        let address = serve_once(serve::exchange);
        let ended = Arc::new(AtomicBool::new(false));
        let client = {
            let ended = Arc::clone(&ended);
            thread::spawn(move || exchange(address, &ended, 3))
        };
        ended.store(true, Ordering::Relaxed);
        let done = client.join().unwrap().unwrap();
        let (count, sha256) = done.split_once(' ').unwrap();
        assert!(count.parse::<u64>().is_ok());
        assert_eq!(sha256.len(), 64);
    }
}
