//! Gives one copy its input, step by step, and writes down what it answers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::board::{Board, End};
use super::copy;
use super::script::{Conn, Step, Until};

/// Bytes read from a server at once.
const READ_BYTES: usize = 64 * 1024;
/// At most this many pieces are made of one send.
const PIECES_MAX: u64 = 8;
/// The longest pause between two pieces, in microseconds.
const PIECE_PAUSE_US_MAX: u64 = 2000;
/// With `ordering = "total"`, an input that is not taken for this long is passed over.
const STALL: Duration = Duration::from_secs(1);

/// One step with when it was due.
#[derive(Debug, Clone)]
pub(super) struct Feed {
    pub(super) at: Instant,
    /// Line of the script.
    pub(super) line: usize,
    pub(super) step: Step,
    /// Where the answers of the connection go that is opened: to a live client.
    pub(super) client: Option<mpsc::Sender<Bytes>>,
}

/// How steps are played.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// Everything comes so much later than it was due.
    pub(super) behind: Duration,
    /// An answer is over when nothing has come for so long.
    pub(super) quiet: Duration,
    /// The longest that anything is waited for.
    pub(super) patience: Duration,
    /// Each input is given when the one before was taken.
    pub(super) one_at_a_time: bool,
    /// Seed for cutting what is sent into pieces; `None`: it is sent as it stands.
    pub(super) pieces: Option<u64>,
}

struct Link {
    write: Option<OwnedWriteHalf>,
    reader: JoinHandle<()>,
    port: u16,
    /// Output before the last step that sent.
    answered: u64,
}

pub(super) struct Player {
    copy: usize,
    address: SocketAddr,
    pace: Pace,
    board: Arc<Board>,
    /// Told whenever something came.
    arrived: Arc<Notify>,
    links: HashMap<Conn, Link>,
    random: u64,
}

impl Player {
    pub(super) fn new(copy: usize, address: SocketAddr, pace: Pace, board: Arc<Board>) -> Self {
        let random = pace.pieces.unwrap_or(0) | 1;
        Self {
            copy,
            address,
            pace,
            board,
            arrived: Arc::new(Notify::new()),
            links: HashMap::new(),
            random,
        }
    }

    /// Plays what comes until nothing does.
    pub(super) async fn play(&mut self, feed: &mut mpsc::Receiver<Feed>) {
        while let Some(feed) = feed.recv().await {
            sleep_until(feed.at + self.pace.behind).await;
            self.step(feed).await;
            self.board.lock(self.copy).steps += 1;
        }
        self.board.lock(self.copy).played = true;
    }

    async fn step(&mut self, feed: Feed) {
        match feed.step {
            Step::Open(conn) => self.open(feed.line, conn, feed.client).await,
            Step::Send(conn, bytes) => self.send(conn, &bytes).await,
            Step::Await(conn, until) => self.wait(feed.line, conn, &until).await,
            Step::Pause(time) => sleep(time).await,
            Step::Close(conn) => {
                let total = self.total(conn);
                if let Some(link) = self.links.get_mut(&conn)
                    && let Some(mut write) = link.write.take()
                {
                    link.answered = total;
                    // The server may have closed first.
                    let _ = write.shutdown().await;
                }
                self.let_it_take(conn).await;
            }
            Step::Reset(conn) => {
                if let Some(link) = self.links.remove(&conn) {
                    self.board
                        .ended(self.copy, conn, End::ByClient, std::time::Instant::now());
                    if let Some(write) = &link.write {
                        let _ = SockRef::from(write.as_ref()).set_linger(Some(Duration::ZERO));
                    }
                    link.reader.abort();
                    // It has let the socket go only now.
                    let _ = link.reader.await;
                }
            }
        }
    }

    async fn open(&mut self, line: usize, conn: Conn, client: Option<mpsc::Sender<Bytes>>) {
        let connected = timeout(self.pace.patience, TcpStream::connect(self.address)).await;
        let now = std::time::Instant::now();
        let Ok(Ok(stream)) = connected else {
            self.board.ended(self.copy, conn, End::Refused, now);
            return;
        };
        self.board.sent(self.copy, conn, &Bytes::new());
        // What is sent in pieces shall arrive in pieces.
        let _ = stream.set_nodelay(true);
        let port = stream.local_addr().map_or(0, |a| a.port());
        let (read, write) = stream.into_split();
        // Only a script waits for what was answered on a connection that ended.
        if line == 0 {
            self.links.retain(|_, link| !link.reader.is_finished());
        }
        let reader = Reader {
            copy: self.copy,
            conn,
            board: Arc::clone(&self.board),
            arrived: Arc::clone(&self.arrived),
            client,
        };
        let link = Link {
            write: Some(write),
            reader: tokio::spawn(reader.run(read)),
            port,
            answered: 0,
        };
        self.links.insert(conn, link);
        self.let_it_take(conn).await;
    }

    async fn send(&mut self, conn: Conn, bytes: &Bytes) {
        let total = self.total(conn);
        if let Some(link) = self.links.get_mut(&conn) {
            link.answered = total;
        }
        for (bytes, pause) in self.pieces(bytes) {
            sleep(pause).await;
            let Some(link) = self.links.get_mut(&conn) else {
                return;
            };
            let Some(write) = &mut link.write else { return };
            self.board.sent(self.copy, conn, &bytes);
            match timeout(self.pace.patience, write.write_all(&bytes)).await {
                Ok(Ok(())) => {}
                // The server has closed: the reader says so.
                Ok(Err(_)) => return,
                Err(_) => {
                    let what = format!("the server took no input for {:?}", self.pace.patience);
                    self.board.lock(self.copy).vain.push((0, what));
                    link.write = None;
                    return;
                }
            }
            self.let_it_take(conn).await;
        }
    }

    /// Cuts what is sent at places of chance: a server must not depend on how its input is cut.
    fn pieces(&mut self, bytes: &Bytes) -> Vec<(Bytes, Duration)> {
        if self.pace.pieces.is_none() || bytes.len() < 2 {
            return vec![(bytes.clone(), Duration::ZERO)];
        }
        let length = bytes.len() as u64;
        let mut cuts: Vec<u64> = (0..self.chance(PIECES_MAX))
            .map(|_| 1 + self.chance(length - 1))
            .collect();
        cuts.extend([0, length]);
        cuts.sort_unstable();
        cuts.dedup();
        let range = |from: u64, to: u64| {
            let at = |offset| usize::try_from(offset).expect("it is within the bytes");
            bytes.slice(at(from)..at(to))
        };
        cuts.windows(2)
            .map(|ends| {
                let pause = match ends[0] {
                    0 => 0,
                    _ => self.chance(PIECE_PAUSE_US_MAX),
                };
                (range(ends[0], ends[1]), Duration::from_micros(pause))
            })
            .collect()
    }

    /// A number below `below` (xorshift64: the same seed cuts alike).
    fn chance(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// With inputs one at a time: until the server has taken this one.
    async fn let_it_take(&self, conn: Conn) {
        if self.pace.one_at_a_time
            && let Some(link) = self.links.get(&conn)
        {
            // One that waits for another connection is passed over, as in the live system.
            copy::taken(self.address.port(), link.port, Instant::now() + STALL).await;
        }
    }

    fn total(&self, conn: Conn) -> u64 {
        let answers = self.board.lock(self.copy);
        answers.conns.get(&conn).map_or(0, |t| t.total)
    }

    async fn wait(&mut self, line: usize, conn: Conn, until: &Until) {
        let Some(answered) = self.links.get(&conn).map(|link| link.answered) else {
            return;
        };
        let begun = Instant::now();
        let deadline = begun + self.pace.patience;
        // Where a text need not be looked for again.
        let mut searched = answered;
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            let mut look_again = deadline;
            {
                let answers = self.board.lock(self.copy);
                let Some(transcript) = answers.conns.get(&conn) else {
                    return;
                };
                let ended = transcript.end != End::Open;
                let since = transcript.total - answered;
                let last = transcript.last_output.map_or(begun, Instant::from_std);
                let met = match until {
                    Until::Answer => {
                        let quiet_at = last + self.pace.quiet;
                        if since > 0 {
                            look_again = quiet_at.min(deadline);
                        }
                        ended || (since > 0 && Instant::now() >= quiet_at)
                    }
                    Until::Seen(n) => {
                        let quiet_at = last.max(begun) + self.pace.quiet;
                        look_again = quiet_at.min(deadline);
                        transcript.total >= *n || ended || Instant::now() >= quiet_at
                    }
                    Until::Bytes(n) => since >= *n,
                    Until::Text(text) => {
                        let from = usize::try_from(searched).unwrap_or(usize::MAX);
                        let output = transcript.output.get(from..).unwrap_or_default();
                        searched = (transcript.output.len().saturating_sub(text.len() - 1) as u64)
                            .max(answered);
                        output.windows(text.len()).any(|w| w == text)
                    }
                };
                if met {
                    return;
                }
                if ended || Instant::now() >= deadline {
                    break;
                }
            }
            // Late or in time, it is looked at again.
            let _ = timeout_at(look_again, arrived).await;
        }
        let what = match until {
            Until::Answer | Until::Seen(_) => "an answer".to_owned(),
            Until::Bytes(n) => format!("{n} bytes"),
            Until::Text(text) => format!("\"{}\"", text.escape_ascii()),
        };
        self.board.lock(self.copy).vain.push((line, what));
    }
}

/// Reads one connection to its end.
struct Reader {
    copy: usize,
    conn: Conn,
    board: Arc<Board>,
    arrived: Arc<Notify>,
    client: Option<mpsc::Sender<Bytes>>,
}

impl Reader {
    async fn run(self, mut read: OwnedReadHalf) {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let got = read.read(&mut buffer).await;
            let now = std::time::Instant::now();
            let end = match got {
                Ok(0) => End::Closed,
                Ok(n) => {
                    self.board.received(self.copy, self.conn, &buffer[..n], now);
                    self.arrived.notify_waiters();
                    if let Some(client) = &self.client {
                        // A client that has gone wants nothing more; its copy is read on.
                        let _ = client.send(Bytes::copy_from_slice(&buffer[..n])).await;
                    }
                    continue;
                }
                Err(_) => End::Reset,
            };
            self.board.ended(self.copy, self.conn, end, now);
            self.arrived.notify_waiters();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole() {
        let pace = Pace {
            behind: Duration::ZERO,
            quiet: Duration::ZERO,
            patience: Duration::ZERO,
            one_at_a_time: false,
            pieces: Some(7),
        };
        let board = Arc::new(Board::new(1, 0));
        let address = "127.0.0.1:1".parse().unwrap();
        let mut player = Player::new(0, address, pace, board);
        let bytes = Bytes::from_static(b"twenty bytes of text");
        let mut most = 0;
        for _ in 0..100 {
            let pieces = player.pieces(&bytes);
            most = most.max(pieces.len());
            let joined: Vec<u8> = pieces.iter().flat_map(|(b, _)| b.to_vec()).collect();
            assert_eq!(joined, bytes);
            assert!(pieces.iter().all(|(b, _)| !b.is_empty()));
        }
        assert!(most > 3);
    }
}
