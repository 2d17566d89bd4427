//! Reads a node's admin page: as much HTTP as one `GET` needs.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::status::Status;

/// A node that has not answered by then is as good as down.
const TIMEOUT: Duration = Duration::from_secs(2);

/// More than any status; a bound all the same.
const RESPONSE_BYTES_MAX: u64 = 4 << 20;

/// The status of the node whose admin page is at `address` (HOST:PORT).
///
/// # Errors
/// The node cannot be reached or says something that is not a status.
pub fn fetch_status(address: &str) -> anyhow::Result<Status> {
    let (code, body) = get(address, "/status.json")?;
    ensure!(code == 200, "{address} answered HTTP {code}");
    serde_json::from_str(&body)
        .with_context(|| format!("{address} answered something that is no status"))
}

/// Status code and body of `path`.
pub(super) fn get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = connect(address)?;
    let mut response = Vec::new();
    (|| {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        // HTTP/1.0: the server closes behind its answer.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        stream.take(RESPONSE_BYTES_MAX).read_to_end(&mut response)
    })()
    .with_context(|| format!("asking {address} for {path}"))?;
    parse(&String::from_utf8_lossy(&response))
        .with_context(|| format!("{address} does not answer as HTTP"))
}

fn connect(address: &str) -> anyhow::Result<TcpStream> {
    let resolved = address
        .to_socket_addrs()
        .with_context(|| format!("\"{address}\" is no HOST:PORT that resolves"))?;
    let mut last = None;
    for candidate in resolved {
        match TcpStream::connect_timeout(&candidate, TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).with_context(|| format!("connecting to {address}")),
        None => bail!("\"{address}\" resolves to nothing"),
    }
}

fn parse(response: &str) -> Option<(u16, String)> {
    let (head, body) = response.split_once("\r\n\r\n")?;
    let mut words = head.lines().next()?.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    Some((words.next()?.parse().ok()?, body.to_owned()))
}
