//! One connection: a byte stream to a server, and the bytes on their way in and out.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::wire::{
    ConnectRequest, ConnectResponse, REPLY_BYTES_MAX, encode_connect_request, split_frame,
};

/// Room for one read.
const READ_BYTES: usize = 16 * 1024;

/// TCP, or TLS over it.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

pub(super) struct Link {
    stream: Box<dyn Stream>,
    pub(super) inbox: BytesMut,
    pub(super) out: BytesMut,
    /// Written to the stream, which may hold some of it back (TLS does).
    unflushed: bool,
    heard_at: Instant,
    sent_at: Instant,
    pinged_at: Instant,
}

impl Link {
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        let now = Instant::now();
        Self {
            stream,
            inbox: BytesMut::with_capacity(READ_BYTES),
            out: BytesMut::new(),
            unflushed: false,
            heard_at: now,
            sent_at: now,
            pinged_at: now,
        }
    }

    /// `None` where the server hangs up, talks nonsense, or takes too long.
    pub(super) async fn handshake(
        &mut self,
        hello: &ConnectRequest,
        deadline: Instant,
    ) -> Option<ConnectResponse> {
        let exchange = async {
            self.out.extend_from_slice(&encode_connect_request(hello));
            loop {
                if let Some((frame, _)) = split_frame(&self.inbox, REPLY_BYTES_MAX).ok()? {
                    let bytes = frame.len() + 4;
                    let answer = ConnectResponse::decode(frame).ok()?;
                    self.inbox.advance(bytes);
                    return Some(answer);
                }
                self.carry().await.ok()?;
            }
        };
        let answer = timeout_at(deadline, exchange).await.ok()?;
        let now = Instant::now();
        (self.heard_at, self.sent_at, self.pinged_at) = (now, now, now);
        answer
    }

    /// Carries bytes both ways until some have arrived, or all are out.
    ///
    /// # Errors
    /// Of the stream; [`io::ErrorKind::UnexpectedEof`] where the server has hung up.
    pub(super) async fn carry(&mut self) -> io::Result<()> {
        self.inbox.reserve(READ_BYTES);
        poll_fn(|cx| {
            // What is out may make room for more requests.
            let sent = self.poll_out(cx)?;
            match self.poll_in(cx) {
                Poll::Pending if sent => Poll::Ready(Ok(())),
                read => read,
            }
        })
        .await
    }

    /// Writes what the stream takes at once.
    ///
    /// # Errors
    /// Of the stream.
    pub(super) async fn push(&mut self) -> io::Result<()> {
        poll_fn(|cx| Poll::Ready(self.poll_out(cx).map(drop))).await
    }

    /// Whether something has arrived by now.
    pub(super) async fn hears(&mut self) -> bool {
        self.inbox.reserve(READ_BYTES);
        poll_fn(|cx| Poll::Ready(matches!(self.poll_in(cx), Poll::Ready(Ok(()))))).await
    }

    fn poll_in(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match pin!(self.stream.read_buf(&mut self.inbox)).poll(cx) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            Poll::Ready(Ok(_)) => {
                self.heard_at = Instant::now();
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// True once everything is out that was not before.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        while !self.out.is_empty() {
            match pin!(self.stream.write_buf(&mut self.out)).poll(cx) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(_)) => {
                    self.sent_at = Instant::now();
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
        }
        if !self.unflushed {
            return Ok(false);
        }
        match pin!(self.stream.flush()).poll(cx) {
            Poll::Ready(Ok(())) => {
                self.unflushed = false;
                Ok(true)
            }
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => Ok(false),
        }
    }

    pub(super) fn pinged(&mut self, now: Instant) {
        self.pinged_at = now;
    }

    /// When to ping: a third of the timeout after the last sign in either direction, so that a
    /// server which is busy with our writes is still asked for a sign of life.
    pub(super) fn ping_at(&self, timeout: Duration) -> Instant {
        self.heard_at.min(self.sent_at).max(self.pinged_at) + timeout / 3
    }

    /// When to give the connection up: early enough for another server to save the session.
    pub(super) fn dead_at(&self, timeout: Duration) -> Instant {
        self.heard_at + timeout * 2 / 3
    }
}
