//! Taking clients' connections in: TLS's handshake, where they speak it, and then on to the engine.
//!
//! With TLS, each connection's beginning is a task of its own: one that is slow or silent keeps
//! nobody else waiting, and is dropped after a time.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;

use super::clients::Accepted;
use super::engine::{Alive, Input, InputSender, while_alive};
use super::stream::Stream;
use crate::core::Caller;
use crate::tls::{Reloading, subject};
use crate::wire::Id;

/// A connection that has not finished its handshake after this long is dropped.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// The first byte of every TLS connection: a record of the handshake. A session begins with the
/// length of a short frame, and four-letter words are letters.
const TLS_HANDSHAKE: u8 = 0x16;

pub(super) type Certificates = Reloading<Arc<rustls::ServerConfig>>;

/// How clients may come in at a port.
#[derive(Clone)]
pub(super) enum Entrance {
    Plain,
    Tls {
        certificates: Certificates,
        /// Without TLS, too.
        plain: bool,
    },
}

/// Counts the clients of all ports of a server.
#[derive(Clone)]
pub(super) struct Slots(Arc<Semaphore>);

impl Slots {
    /// Of so many at most; more are refused by closing them.
    pub(super) fn new(connections_max: usize) -> Self {
        Self(Arc::new(Semaphore::new(connections_max)))
    }
}

/// Accepts clients.
pub(super) async fn accept(
    listener: TcpListener,
    entrance: Entrance,
    slots: Slots,
    engine: InputSender,
    alive: Alive,
) {
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
        let Ok(slot) = slots.0.clone().try_acquire_owned() else {
            tracing::warn!(%address, "too many clients: connection refused");
            continue;
        };
        let _ = stream.set_nodelay(true);
        match &entrance {
            Entrance::Plain => enter(plain(stream), address, slot, &engine).await,
            Entrance::Tls {
                certificates,
                plain,
            } => {
                let (certificates, plain) = (certificates.clone(), *plain);
                let engine = engine.clone();
                let begin = async move {
                    let begun = timeout(HANDSHAKE_MAX, begin(stream, &certificates, plain)).await;
                    let begun = begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                    enter(begun, address, slot, &engine).await;
                };
                tokio::spawn(while_alive(alive.clone(), begin));
            }
        }
    }
}

/// Hands the engine a connection that has got so far.
async fn enter(
    begun: io::Result<(Stream, Vec<Id>)>,
    address: SocketAddr,
    slot: OwnedSemaphorePermit,
    engine: &InputSender,
) {
    match begun {
        Ok((stream, proven)) => {
            let address = Some(address);
            let caller = Caller { address, proven };
            let accepted = Accepted {
                stream,
                caller,
                slot,
            };
            // False: the engine has ended, and so does this task.
            engine.send(Input::Connect(accepted)).await;
        }
        Err(error) => tracing::debug!(%address, %error, "client's connection did not begin"),
    }
}

fn plain(stream: TcpStream) -> io::Result<(Stream, Vec<Id>)> {
    Ok((Stream::plain(stream.into_std()?), Vec::new()))
}

async fn begin(
    stream: TcpStream,
    certificates: &Certificates,
    may_be_plain: bool,
) -> io::Result<(Stream, Vec<Id>)> {
    if may_be_plain {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[0] != TLS_HANDSHAKE {
            return plain(stream);
        }
    }
    let config = certificates.current().map_err(io::Error::other)?;
    let (stream, tls) = TlsAcceptor::from(config).accept(stream).await?.into_inner();
    let shown = tls.peer_certificates().and_then(<[_]>::first);
    let id = shown
        .and_then(|certificate| subject(certificate))
        .map(|id| Id {
            scheme: "x509".to_owned(),
            id,
        });
    Ok((
        Stream::tls(stream.into_std()?, tls.into()),
        id.into_iter().collect(),
    ))
}
