//! Clients' connections: frames in, frames out.
//!
//! They are accepted by a task and served by the engine's own thread: what one system call reads is
//! handed to the core at once, and what the core answers to all of that goes out with one system
//! call for each client. No request crosses a thread.
//!
//! Nothing is queued in front of the core. A client is read from only as long as it takes its
//! answers, a little from each in turn, so that nobody's haste is another's wait.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::time::Duration;

use bytes::Bytes;
use mio::event::Event;
use mio::{Registry, Token};
use tokio::sync::OwnedSemaphorePermit;

use super::engine::Clock;
use super::environment::Environment;
use super::stream::{Outgoing, Spare, Stream};
use crate::core::{Caller, ConnId, Core};
use crate::metrics::Metrics;
use crate::time::Instant;
use crate::wire::{FourLetterWord, REQUEST_BYTES_MAX};

/// Frames of one client that wait for an answer at most; then nothing more is read from it.
const OPEN_FRAMES_MAX: usize = 1024;

/// Bytes of such frames at most, counted until all of them are answered.
const OPEN_BYTES_MAX: usize = 8 * 1024 * 1024;

/// ... and of all clients together: beyond it nothing is read from anybody.
const OPEN_BYTES_ALL_MAX: usize = 128 * 1024 * 1024;

/// Nothing is read from a client on the way to which there are more bytes than this.
const OUTBOUND_BYTES_ENOUGH: usize = 1024 * 1024;

/// Bytes on their way to one client at most that is still told events, and to all clients together;
/// who reads more slowly is cut off. Answers stop long before.
const OUTBOUND_BYTES_MAX: usize = 16 * 1024 * 1024;
const OUTBOUND_TOTAL_MAX: usize = 512 * 1024 * 1024;

/// Clients that are read from in one turn at most, and bytes of each.
const READS_PER_TURN: usize = 64;
const READ_BYTES: usize = 64 * 1024;

/// A connection that is being closed and does not take its last bytes is dropped after this long.
const LINGER: Duration = Duration::from_secs(5);

/// A connection that was accepted, for the engine's thread.
pub(super) struct Accepted {
    pub(super) stream: Stream,
    pub(super) caller: Caller,
    /// Counts it among the connections as long as it is there.
    pub(super) slot: OwnedSemaphorePermit,
}

/// One client.
struct Client {
    stream: Stream,
    /// What has come and is no whole frame yet, or must wait.
    inbound: Vec<u8>,
    outbound: Outgoing,
    /// Frames that were handed to the core and not answered.
    open_frames: usize,
    /// Their bytes, and those of the answered ones among them. None when there are none.
    open_bytes: usize,
    /// Something has come: until then it may also be a four-letter word.
    greeted: bool,
    /// The socket may have more to read.
    readable: bool,
    /// It will not send more than what may be there to read.
    ended: bool,
    /// It stands in [`Clients::ready`].
    listed: bool,
    /// It stands in [`Clients::dirty`].
    dirty: bool,
    /// It is closed when all is out. The core does not know it any more.
    closing: bool,
    _slot: OwnedSemaphorePermit,
}

impl Client {
    /// Whether it may be given more to answer.
    fn has_room(&self) -> bool {
        self.may_send() && self.outbound.len() < OUTBOUND_BYTES_ENOUGH
    }

    fn may_send(&self) -> bool {
        self.open_frames < OPEN_FRAMES_MAX && self.open_bytes < OPEN_BYTES_MAX
    }

    fn has_frame(&self) -> bool {
        matches!(next_frame(&self.inbound), Ok(Some(_)) | Err(_))
    }
}

/// Where the first frame in `bytes` ends. `Err` tells a length that is not allowed.
fn next_frame(bytes: &[u8]) -> Result<Option<usize>, i32> {
    let Some(prefix) = bytes.first_chunk::<4>() else {
        return Ok(None);
    };
    let announced = i32::from_be_bytes(*prefix);
    match usize::try_from(announced) {
        Ok(length) if length <= REQUEST_BYTES_MAX => {
            Ok(Some(4 + length).filter(|end| *end <= bytes.len()))
        }
        _ => Err(announced),
    }
}

/// What became of a read.
enum Read {
    Bytes(usize),
    Nothing,
    End,
}

/// All clients of this server.
pub(super) struct Clients {
    registry: Registry,
    conns: BTreeMap<ConnId, Client>,
    /// Invariant: the sum of theirs.
    open_bytes: usize,
    next: u64,
    /// Those from which something may be read or handed on, in turn.
    ready: VecDeque<ConnId>,
    /// Those with something to write.
    dirty: Vec<ConnId>,
    /// Those that are being closed, and when they are dropped.
    closing: VecDeque<(Instant, ConnId)>,
    spare: Spare,
    buffer: Vec<u8>,
    events_sent: u64,
    cut: u64,
}

impl Clients {
    pub(super) fn new(registry: Registry) -> Self {
        Self {
            registry,
            conns: BTreeMap::new(),
            open_bytes: 0,
            next: 1,
            ready: VecDeque::new(),
            dirty: Vec::new(),
            closing: VecDeque::new(),
            spare: Spare::default(),
            buffer: vec![0; READ_BYTES],
            events_sent: 0,
            cut: 0,
        }
    }

    /// Takes a new connection. What the operating system calls it is `token(conn)`.
    pub(super) fn add(
        &mut self,
        core: &mut Core,
        now: Instant,
        accepted: Accepted,
        token: impl FnOnce(ConnId) -> Token,
    ) {
        let Accepted {
            mut stream,
            caller,
            slot,
        } = accepted;
        let conn = ConnId(self.next);
        self.next += 1;
        if let Err(error) = stream.register(&self.registry, token(conn)) {
            tracing::warn!(%error, "cannot serve a client");
            return;
        }
        let holds_back = stream.holds_back();
        let mut client = Client {
            stream,
            inbound: Vec::new(),
            outbound: Outgoing::default(),
            open_frames: 0,
            open_bytes: 0,
            greeted: false,
            readable: holds_back,
            ended: false,
            listed: false,
            dirty: false,
            closing: false,
            _slot: slot,
        };
        if holds_back {
            list(&mut self.ready, conn, &mut client);
            client.dirty = true;
            self.dirty.push(conn);
        }
        self.conns.insert(conn, client);
        core.handle_connect(now, conn, caller);
    }

    /// The operating system has something to tell of a connection.
    pub(super) fn on_event(&mut self, conn: ConnId, event: &Event) {
        let Some(client) = self.conns.get_mut(&conn) else {
            return;
        };
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            client.readable = true;
            client.ended |= event.is_read_closed() || event.is_error();
            list(&mut self.ready, conn, client);
        }
        let waits = !client.outbound.is_empty() || client.stream.has_unsent();
        if event.is_writable() && waits && !client.dirty {
            client.dirty = true;
            self.dirty.push(conn);
        }
    }

    /// Whether there is more for [`Clients::turn`] to do at once.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty() && self.open_bytes < OPEN_BYTES_ALL_MAX
    }

    /// Reads from some clients, and hands the core what they sent.
    pub(super) fn turn(&mut self, core: &mut Core, clock: Clock, surroundings: &Environment) {
        let count = self.ready.len().min(READS_PER_TURN);
        for _ in 0..count {
            if self.open_bytes >= OPEN_BYTES_ALL_MAX || core.unsent_bytes() >= OUTBOUND_BYTES_ENOUGH
            {
                // Those who ask for much are served first, and then the others.
                return;
            }
            let Some(conn) = self.ready.pop_front() else {
                return;
            };
            let Some(client) = self.conns.get_mut(&conn) else {
                continue;
            };
            client.listed = false;
            if client.closing || !client.has_room() {
                // Listed again when there is room.
                continue;
            }
            // What had to wait comes first, and nothing is read while it waits.
            let read = if client.has_frame() {
                Read::Nothing
            } else {
                match read(client, &mut self.buffer) {
                    Ok(read) => read,
                    Err(error) => {
                        tracing::debug!(conn = conn.0, %error, "client's connection broke");
                        Read::End
                    }
                }
            };
            let count = match read {
                Read::Bytes(count) => count,
                Read::Nothing => 0,
                Read::End => {
                    self.drop_client(core, clock.now(), conn);
                    continue;
                }
            };
            // Only what is not whole is copied.
            let now = clock.now();
            let mut inbound = std::mem::take(&mut client.inbound);
            let open_bytes = client.open_bytes;
            let fresh = &self.buffer[..count];
            let taken = if inbound.is_empty() {
                let taken = hand_on(client, conn, fresh, core, now);
                inbound.extend_from_slice(&fresh[*taken.as_ref().unwrap_or(&count)..]);
                taken
            } else {
                inbound.extend_from_slice(fresh);
                let taken = hand_on(client, conn, &inbound, core, now);
                inbound.drain(..*taken.as_ref().unwrap_or(&0));
                taken
            };
            self.open_bytes += client.open_bytes - open_bytes;
            match taken {
                Ok(_) => {
                    if inbound.is_empty() {
                        inbound = Vec::new();
                    }
                    client.inbound = inbound;
                    if client.has_room() && (client.readable || client.has_frame()) {
                        list(&mut self.ready, conn, client);
                    }
                }
                Err(Stop::Word(word)) => {
                    let answer = core.four_letter_word(word, &surroundings.now());
                    self.send(conn, answer.as_bytes());
                    core.handle_disconnect(now, conn);
                    self.close(conn, now);
                }
                Err(Stop::Length(announced)) => {
                    // People lose days over a connection that is closed for no visible reason.
                    tracing::warn!(
                        conn = conn.0,
                        announced,
                        limit = REQUEST_BYTES_MAX,
                        "a client's frame exceeds the limit: connection closed"
                    );
                    core.handle_disconnect(now, conn);
                    self.close(conn, now);
                }
            }
        }
    }

    /// Sends the answer to one of a client's frames.
    pub(super) fn reply(&mut self, conn: ConnId, frame: &Bytes) {
        if let Some(client) = self.conns.get_mut(&conn) {
            client.open_frames = client.open_frames.saturating_sub(1);
            if client.open_frames == 0 {
                self.open_bytes -= std::mem::take(&mut client.open_bytes);
            }
            self.send(conn, frame);
        }
    }

    /// Sends a client an event. False if it has to be cut off, because it does not read.
    #[must_use]
    pub(super) fn notify(&mut self, conn: ConnId, frame: &Bytes) -> bool {
        self.events_sent += 1;
        self.send(conn, frame);
        self.conns
            .get(&conn)
            .is_none_or(|client| client.outbound.len() <= OUTBOUND_BYTES_MAX)
    }

    fn send(&mut self, conn: ConnId, bytes: &[u8]) {
        let Some(client) = self.conns.get_mut(&conn) else {
            return;
        };
        client.outbound.push(bytes, &mut self.spare);
        if !client.dirty {
            client.dirty = true;
            self.dirty.push(conn);
        }
    }

    /// Closes a connection that the core has forgotten, when everything is out.
    pub(super) fn close(&mut self, conn: ConnId, now: Instant) {
        let Some(client) = self.conns.get_mut(&conn) else {
            return;
        };
        client.closing = true;
        self.open_bytes -= std::mem::take(&mut client.open_bytes);
        self.closing.push_back((now + LINGER, conn));
        if !client.dirty {
            client.dirty = true;
            self.dirty.push(conn);
        }
    }

    /// Drops a connection as it is.
    pub(super) fn cut(&mut self, core: &mut Core, now: Instant, conn: ConnId) {
        tracing::warn!(conn = conn.0, "client does not read: connection closed");
        self.cut += 1;
        self.drop_client(core, now, conn);
    }

    /// Cuts off those to whom most is on its way, if it is too much for all together. To be called now
    /// and then.
    pub(super) fn relieve(&mut self, core: &mut Core, now: Instant) {
        let outbound = self.conns.iter();
        let mut outbound: Vec<_> = outbound
            .map(|(conn, client)| (client.outbound.len(), *conn))
            .filter(|(bytes, _)| *bytes > 0)
            .collect();
        let mut total: usize = outbound.iter().map(|(bytes, _)| bytes).sum();
        outbound.sort_unstable();
        while total > OUTBOUND_TOTAL_MAX
            && let Some((bytes, conn)) = outbound.pop()
        {
            total -= bytes;
            self.cut(core, now, conn);
        }
    }

    /// Adds what is known here.
    pub(super) fn measure(&self, metrics: &mut Metrics) {
        metrics.events_sent = self.events_sent;
        metrics.slow_clients_cut = self.cut;
        let outbound = self
            .conns
            .values()
            .map(|client| client.outbound.len() as u64);
        metrics.outbound_bytes = outbound.sum();
    }

    fn drop_client(&mut self, core: &mut Core, now: Instant, conn: ConnId) {
        if let Some(client) = self.conns.remove(&conn) {
            self.open_bytes -= client.open_bytes;
            if !client.closing {
                core.handle_disconnect(now, conn);
            }
        }
    }

    /// Writes what there is to write.
    pub(super) fn flush(&mut self, core: &mut Core, now: Instant) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for conn in dirty.drain(..) {
            let Some(client) = self.conns.get_mut(&conn) else {
                continue;
            };
            client.dirty = false;
            let written = client.outbound.flush(&mut client.stream, &mut self.spare);
            let written = written.and_then(|()| client.stream.push());
            let out = client.outbound.is_empty() && !client.stream.has_unsent();
            let done = client.closing && out;
            if written.is_err() {
                self.drop_client(core, now, conn);
            } else if done {
                // What lies unread would make the system throw away what it has not sent yet.
                while client.readable
                    && matches!(read(client, &mut self.buffer), Ok(Read::Bytes(_)))
                {
                }
                client.stream.finish();
                self.conns.remove(&conn);
            } else if client.has_room() && (client.readable || client.has_frame()) {
                list(&mut self.ready, conn, client);
            }
        }
        self.dirty = dirty;
        while self.closing.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, conn)) = self.closing.pop_front() {
                self.conns.remove(&conn);
            }
        }
    }
}

fn list(ready: &mut VecDeque<ConnId>, conn: ConnId, client: &mut Client) {
    if !client.listed {
        client.listed = true;
        ready.push_back(conn);
    }
}

fn read(client: &mut Client, buffer: &mut [u8]) -> io::Result<Read> {
    if !client.readable {
        return Ok(Read::Nothing);
    }
    match client.stream.read(buffer) {
        Ok(0) => Ok(Read::End),
        Ok(count) => {
            // The end is not told twice, so it must be read.
            let all = count < buffer.len() && client.stream.short_read_is_all();
            client.readable = client.ended || !all;
            Ok(Read::Bytes(count))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            client.readable = false;
            Ok(Read::Nothing)
        }
        Err(error) => Err(error),
    }
}

/// Why a connection ends with what has come on it.
enum Stop {
    /// It is no session, but a question.
    Word(FourLetterWord),
    /// A frame's length is not allowed.
    Length(i32),
}

/// Hands the core the whole frames in `bytes`, as far as there is room for their answers. How many
/// bytes they were.
fn hand_on(
    client: &mut Client,
    conn: ConnId,
    bytes: &[u8],
    core: &mut Core,
    now: Instant,
) -> Result<usize, Stop> {
    if !client.greeted
        && let Some(first) = bytes.first_chunk::<4>()
    {
        client.greeted = true;
        if let Some(word) = FourLetterWord::detect(*first) {
            return Err(Stop::Word(word));
        }
    }
    let mut start = 0;
    while client.may_send() && core.unsent_bytes() < OUTBOUND_BYTES_ENOUGH {
        let Some(end) = next_frame(&bytes[start..]).map_err(Stop::Length)? else {
            break;
        };
        client.open_frames += 1;
        client.open_bytes += end;
        core.handle_frame(now, conn, &bytes[start + 4..start + end]);
        start += end;
    }
    Ok(start)
}
