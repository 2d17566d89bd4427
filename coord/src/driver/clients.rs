//! Clients' connections: frames in, frames out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::engine::{Alive, Input, InputSender, while_alive};
use crate::core::{Caller, ConnId};
use crate::wire::{FourLetterWord, REQUEST_BYTES_MAX};

/// Frames of one client that wait for an answer at most; then nothing more is read from it.
const OPEN_FRAMES_MAX: usize = 1024;

/// Bytes on their way to one client at most; one that reads more slowly is cut off.
const OUTBOUND_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Client connections at most; more are refused by closing them.
const CONNECTIONS_MAX: usize = 20_000;

/// A connection that has sent nothing at all for this long is closed.
const FIRST_BYTES_MAX: Duration = Duration::from_secs(10);

/// Frames written with one system call at most.
const WRITE_BATCH: usize = 64;

/// The way to one client.
pub(super) struct Outbound {
    frames: mpsc::UnboundedSender<Option<Bytes>>,
    queued_bytes: AtomicUsize,
    open_frames: Semaphore,
}

impl Outbound {
    /// Queues a frame. False if the client reads too slowly.
    pub(super) fn send(&self, frame: Bytes) -> bool {
        let queued = self.queued_bytes.fetch_add(frame.len(), Ordering::Relaxed);
        if queued > OUTBOUND_BYTES_MAX {
            return false;
        }
        // One that has gone will say so by `Input::Disconnect`.
        let _ = self.frames.send(Some(frame));
        true
    }

    /// One more frame may be read.
    pub(super) fn answered(&self) {
        self.open_frames.add_permits(1);
    }

    /// Ends the connection after what was queued.
    pub(super) fn close(&self) {
        let _ = self.frames.send(None);
    }
}

/// Accepts clients.
pub(super) async fn accept(listener: TcpListener, engine: InputSender, alive: Alive) {
    let next = AtomicU64::new(1);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others may end.
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(%address, "too many clients: connection refused");
            continue;
        };
        let conn = ConnId(next.fetch_add(1, Ordering::Relaxed));
        let (engine, alive) = (engine.clone(), alive.clone());
        tokio::spawn(async move {
            while_alive(alive, serve(stream, address, conn, &engine)).await;
            drop(slot);
        });
    }
}

async fn serve(stream: TcpStream, address: SocketAddr, conn: ConnId, engine: &InputSender) {
    let _ = stream.set_nodelay(true);
    let (mut read, mut write) = stream.into_split();
    let mut buffer = BytesMut::with_capacity(4096);
    let first = tokio::time::timeout(FIRST_BYTES_MAX, async {
        while buffer.len() < 4 {
            if !matches!(read.read_buf(&mut buffer).await, Ok(count) if count > 0) {
                return None;
            }
        }
        <[u8; 4]>::try_from(&buffer[..4]).ok()
    });
    let Ok(Some(first)) = first.await else { return };
    if let Some(word) = FourLetterWord::detect(first) {
        let (answer, answered) = oneshot::channel();
        if engine.send(Input::Word { word, answer }).await
            && let Ok(text) = answered.await
        {
            let _ = write.write_all(text.as_bytes()).await;
            let _ = write.shutdown().await;
        }
        return;
    }
    let (frames, queue) = mpsc::unbounded_channel();
    let outbound = Arc::new(Outbound {
        frames,
        queued_bytes: AtomicUsize::new(0),
        open_frames: Semaphore::new(OPEN_FRAMES_MAX),
    });
    let caller = Caller {
        address: Some(address),
        proven: Vec::new(),
    };
    if !engine
        .send(Input::Connect {
            conn,
            caller,
            outbound: outbound.clone(),
        })
        .await
    {
        return;
    }
    tokio::select! {
        () = read_frames(read, buffer, conn, &outbound, engine) => {}
        () = write_frames(&mut write, queue, &outbound) => {}
    }
    let _ = write.shutdown().await;
    engine.send(Input::Disconnect(conn)).await;
}

async fn read_frames(
    mut read: OwnedReadHalf,
    mut buffer: BytesMut,
    conn: ConnId,
    outbound: &Outbound,
    engine: &InputSender,
) {
    loop {
        while let Some(prefix) = buffer.first_chunk::<4>() {
            let announced = i32::from_be_bytes(*prefix);
            let length = match usize::try_from(announced) {
                Ok(length) if length <= REQUEST_BYTES_MAX => length,
                _ => {
                    // People lose days over a connection that is closed for no visible reason.
                    tracing::warn!(
                        conn = conn.0,
                        announced,
                        limit = REQUEST_BYTES_MAX,
                        "a client's frame exceeds the limit: connection closed"
                    );
                    return;
                }
            };
            if buffer.len() < 4 + length {
                buffer.reserve(4 + length - buffer.len());
                break;
            }
            let frame = buffer.split_to(4 + length).freeze().slice(4..);
            let Ok(permit) = outbound.open_frames.acquire().await else {
                return;
            };
            permit.forget();
            if !engine.send(Input::Frame { conn, frame }).await {
                return;
            }
        }
        if !matches!(read.read_buf(&mut buffer).await, Ok(count) if count > 0) {
            return;
        }
    }
}

async fn write_frames(
    write: &mut OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Option<Bytes>>,
    outbound: &Outbound,
) {
    let mut batch = Vec::with_capacity(WRITE_BATCH);
    let mut joined = Vec::new();
    while queue.recv_many(&mut batch, WRITE_BATCH).await > 0 {
        let mut last = false;
        joined.clear();
        for frame in batch.drain(..) {
            match frame {
                Some(frame) => joined.extend_from_slice(&frame),
                None => last = true,
            }
        }
        if write.write_all(&joined).await.is_err() {
            return;
        }
        outbound
            .queued_bytes
            .fetch_sub(joined.len(), Ordering::Relaxed);
        if last {
            return;
        }
    }
}
