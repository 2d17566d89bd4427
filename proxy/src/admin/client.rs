//! Reads a node's admin page: as much HTTP as one `GET` needs.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use crate::status::Status;

/// A node that has not answered by then is as good as down.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A hand-over of every service is answered when it is done.
const POST_TIMEOUT: Duration = Duration::from_secs(60);

/// A request that changes something says so: no page of a web site can make a browser send this.
pub(super) const OPERATOR_HEADER: &str = "X-Unbroken-Operator";

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
    request(address, "GET", path, "", TIMEOUT)
}

/// Puts a request with a JSON body to a node: status code and body of the answer.
///
/// # Errors
/// The node cannot be reached, or does not answer as HTTP in time.
pub fn post(address: &str, path: &str, json: &str) -> anyhow::Result<(u16, String)> {
    let body = format!(
        "Content-Type: application/json\r\n{OPERATOR_HEADER}: 1\r\nContent-Length: {}\r\n\r\n{json}",
        json.len()
    );
    request(address, "POST", path, &body, POST_TIMEOUT)
}

/// One request; `rest` is what follows the first headers: more of them, an empty line, the body.
fn request(
    address: &str,
    method: &str,
    path: &str,
    rest: &str,
    patience: Duration,
) -> anyhow::Result<(u16, String)> {
    let rest = if rest.is_empty() { "\r\n" } else { rest };
    let mut stream = connect(address)?;
    let mut response = Vec::new();
    (|| {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        // HTTP/1.0: the server closes behind its answer. It takes orders by its address, by no name.
        let host = stream.peer_addr()?;
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: {host}\r\n{rest}")?;
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
