//! Getting a connection to any server, fast: a server that does not answer costs a stagger, not
//! a timeout.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;

use super::ConnectOptions;
use super::link::Stream;
use crate::tls::{ClientTls, Reloading};

/// Pauses between two rounds of questions for a server that has a quorum.
const SEARCH_PAUSE_MIN: Duration = Duration::from_millis(100);
const SEARCH_PAUSE_MAX: Duration = Duration::from_secs(10);

/// The way to the servers.
#[derive(Clone)]
pub(super) struct Dialer {
    hosts: Arc<[String]>,
    stagger: Duration,
    tls: Option<(ClientTls, Reloading<Arc<ClientConfig>>)>,
}

impl Dialer {
    pub(super) fn new(options: &ConnectOptions) -> Self {
        Self {
            hosts: options.hosts.clone().into(),
            stagger: options.stagger,
            tls: options.tls.as_ref().map(|tls| (tls.clone(), tls.load())),
        }
    }

    /// Connects to the first server, counted from `first`, that accepts. The next one is tried
    /// when one has failed, or has not answered within the stagger; the first connection made is
    /// taken.
    pub(super) async fn dial(
        &self,
        first: usize,
        limit: Duration,
    ) -> Option<(usize, Box<dyn Stream>)> {
        let mut attempts = JoinSet::new();
        let hosts = self.hosts.len();
        let mut order = (0..hosts).map(|i| (first + i) % hosts);
        loop {
            if let Some(index) = order.next() {
                let this = self.clone();
                attempts.spawn(async move { (index, timeout(limit, this.connect(index)).await) });
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
                        tracing::debug!(host = %self.hosts[index], ?reason, "server not reached");
                    }
                    Some(Err(panicked)) => tracing::error!(%panicked, "attempt to connect"),
                },
                () = sleep(self.stagger), if order.len() > 0 => {}
            }
        }
    }

    async fn connect(&self, index: usize) -> io::Result<Box<dyn Stream>> {
        let host = &self.hosts[index];
        let stream = connect(host).await?;
        let Some((tls, config)) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let name = host
            .rsplit_once(':')
            .map_or(host.as_str(), |(name, _)| name);
        let config = config.current();
        // A file that is wrong will be wrong at every server: this is not for debugging alone.
        let unusable = |error| {
            tracing::warn!(%error, "tls");
            io::Error::other(error)
        };
        let config = config.map_err(unusable)?;
        let expected = tls.expected(name).map_err(unusable)?;
        let secured = TlsConnector::from(config).connect(expected, stream).await;
        let secured = secured.inspect_err(|error| tracing::warn!(%host, %error, "tls"))?;
        Ok(Box::new(secured))
    }

    /// Asks the servers after `host`, and again and again, whether they have a quorum.
    pub(super) async fn find_writable(&self, host: usize, limit: Duration) -> usize {
        let mut pause = SEARCH_PAUSE_MIN;
        loop {
            for step in 1..=self.hosts.len() {
                let index = (host + step) % self.hosts.len();
                if let Ok(Ok(true)) = timeout(limit, self.is_writable(index)).await {
                    return index;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(SEARCH_PAUSE_MAX);
        }
    }

    async fn is_writable(&self, index: usize) -> io::Result<bool> {
        let mut stream = self.connect(index).await?;
        stream.write_all(b"isro").await?;
        stream.flush().await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        Ok(answer == *b"rw")
    }
}

async fn connect(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    // Names are resolved each time: servers move.
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
