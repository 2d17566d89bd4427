//! Live traffic as input: clients are served by the first copy, the others are given the same.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::player::Feed;
use super::script::{Conn, Step};

/// Bytes read from a client at once.
const READ_BYTES: usize = 64 * 1024;
/// Answers that wait for a client who does not read.
const ANSWERS_MAX: usize = 16;
/// After a failed accept (no more file descriptors), the next try comes this much later.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// The names of live connections: their clients' addresses.
pub(super) type Names = Arc<Mutex<Vec<String>>>;

pub(super) async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))
}

/// Serves clients for ever. What they say goes to every one of `feeds`; the first is the copy that
/// answers them.
pub(super) async fn serve(listener: TcpListener, feeds: Vec<mpsc::Sender<Feed>>, names: Names) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let conn = name(&names, from);
                let client = Client {
                    conn,
                    feeds: feeds.clone(),
                };
                tokio::spawn(client.serve(stream));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a client");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn name(names: &Names, from: SocketAddr) -> Conn {
    let mut names = names.lock().unwrap_or_else(PoisonError::into_inner);
    names.push(from.to_string());
    names.len() - 1
}

struct Client {
    conn: Conn,
    feeds: Vec<mpsc::Sender<Feed>>,
}

impl Client {
    async fn serve(self, stream: TcpStream) {
        // The answer must not wait for the client's.
        let _ = stream.set_nodelay(true);
        let (read, mut write) = stream.into_split();
        let (answers, mut answered) = mpsc::channel::<Bytes>(ANSWERS_MAX);
        self.feed(Step::Open(self.conn), Some(answers)).await;
        let take = tokio::spawn(async move {
            while let Some(bytes) = answered.recv().await {
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            // The copy's connection ended.
            let _ = write.shutdown().await;
        });
        let last = self.read(read).await;
        self.feed(last, None).await;
        let _ = take.await;
    }

    /// Reads the client to its end, and says how it ended.
    async fn read(&self, mut read: OwnedReadHalf) -> Step {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match read.read(&mut buffer).await {
                Ok(0) => return Step::Close(self.conn),
                Ok(n) => {
                    let bytes = Bytes::copy_from_slice(&buffer[..n]);
                    self.feed(Step::Send(self.conn, bytes), None).await;
                }
                Err(_) => return Step::Reset(self.conn),
            }
        }
    }

    async fn feed(&self, step: Step, mut client: Option<mpsc::Sender<Bytes>>) {
        let at = Instant::now();
        for feed in &self.feeds {
            let feed_step = Feed {
                at,
                line: 0,
                step: step.clone(),
                client: client.take(),
            };
            // A copy that is gone was noted.
            let _ = feed.send(feed_step).await;
        }
    }
}
