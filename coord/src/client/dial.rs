//! Getting a connection to any server, fast: a server that does not answer costs a stagger, not
//! a timeout.

use std::io;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connects to the first server, counted from `first`, that accepts. The next one is tried when
/// one has failed, or has not answered within `stagger`; the first connection made is taken.
pub(super) async fn dial(
    hosts: &[String],
    first: usize,
    stagger: Duration,
    limit: Duration,
) -> Option<(usize, TcpStream)> {
    let mut attempts = JoinSet::new();
    let mut order = (0..hosts.len()).map(|i| (first + i) % hosts.len());
    loop {
        if let Some(index) = order.next() {
            let host = hosts[index].clone();
            attempts.spawn(async move { (index, timeout(limit, connect(&host)).await) });
        }
        tokio::select! {
            attempt = attempts.join_next() => match attempt {
                None => return None,
                Some(Ok((index, Ok(Ok(stream))))) => return Some((index, stream)),
                Some(Ok((index, failed))) => {
                    let reason = match failed {
                        Ok(result) => result.err(),
                        Err(_) => Some(io::ErrorKind::TimedOut.into()),
                    };
                    tracing::debug!(host = %hosts[index], ?reason, "server not reached");
                }
                Some(Err(panicked)) => tracing::error!(%panicked, "attempt to connect"),
            },
            () = sleep(stagger), if order.len() > 0 => {}
        }
    }
}

async fn connect(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for addr in lookup_host(host).await? {
        match TcpStream::connect(addr).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
