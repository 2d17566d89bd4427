//! Links between servers: TCP with Noise, one connection for each direction.
//!
//! Whoever sends dials. The pattern is `NNpsk0` with a key derived from the cluster's pre-shared
//! key: only who has it can speak or listen, and every connection has fresh keys. Inside, messages
//! are postcard, each with its length in front; the stream of them is cut into Noise records.
//!
//! Where it is configured, TLS lies beneath: both sides show a certificate that the authority has
//! signed and that names the server. Noise stays on top, because an authority signs for many: that
//! a server belongs to *this* cluster is proven by the cluster's key alone.
//!
//! Here are the handshakes; what follows is served by [`links`](super::links).
//!
//! When the connection that a peer has dialled ends and its listener refuses, its process is dead:
//! the core is told, and need not wait for the silence.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snow::TransportState;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::disk::KnownPeers;
use super::engine::{Alive, Input, InputSender, while_alive};
use super::links::{Direction, Made, RECORD_MAX};
use super::roster::{Caller, Roster, Verdict};
use super::stream::Stream;
use crate::tls::{PeerTls, Reloading, TlsError, names, server_name};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// Version of everything that peers say to each other.
const VERSION: u16 = 2;

const DIAL_MAX: Duration = Duration::from_millis(500);
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);
const DIAL_AGAIN_MIN: Duration = Duration::from_millis(10);
const DIAL_AGAIN_MAX: Duration = Duration::from_millis(500);

/// A new cluster begins without those that have not answered after this long, if a majority has.
const BEGIN_WITH_MAJORITY: Duration = Duration::from_secs(1);

/// Inbound connections in their handshake at most.
const HANDSHAKES_MAX: usize = 64;

/// The first thing that a dialler says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    version: u16,
    purpose: Purpose,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Purpose {
    /// It will send messages.
    Link(Caller),
    /// The server of this name has nothing on its disk and wants to know whether that was always
    /// so, and who it is.
    Ask(String),
}

/// What a server with an empty disk begins as.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    /// Its raft id.
    pub(super) id: u64,
    /// Who began the cluster.
    pub(super) founders: BTreeMap<u64, String>,
}

/// Why a link could not be made, or ended.
#[derive(Debug, Error)]
enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("not authenticated (is the key the same on every server?): {0}")]
    Noise(#[from] snow::Error),
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
    #[error("the peer's certificate is not that of the server it says it is: {0:?}")]
    OtherName(Hello),
    #[error("no answer in time")]
    Slow,
    #[error("a peer of another version: {0:?}")]
    Version(Hello),
    #[error("one of the two servers does not know the other, or not yet: {0:?}")]
    Stranger(Hello),
    #[error("the peer does not know this server, or not yet")]
    Unwelcome,
    #[error("the peer says that this server was removed")]
    Removed,
    #[error("the peer's address is not known")]
    NoAddress,
    #[error("not a message of ours")]
    Malformed,
}

/// This server among its peers.
#[derive(Clone)]
pub(super) struct Peers {
    roster: Arc<Roster>,
    psk: [u8; 32],
    /// Beneath Noise, if it is wanted.
    tls: Option<Reloading<PeerTls>>,
    known: Arc<KnownPeers>,
    engine: InputSender,
}

/// TCP, or TLS over it, while the handshakes are made.
trait Channel: AsyncRead + AsyncWrite + Unpin + Send {
    /// For the engine.
    fn into_stream(self: Box<Self>) -> io::Result<Stream>;
}

impl Channel for TcpStream {
    fn into_stream(self: Box<Self>) -> io::Result<Stream> {
        Ok(Stream::plain(self.into_std()?))
    }
}

impl Channel for tokio_rustls::server::TlsStream<TcpStream> {
    fn into_stream(self: Box<Self>) -> io::Result<Stream> {
        let (stream, tls) = self.into_inner();
        Ok(Stream::tls(stream.into_std()?, tls.into()))
    }
}

impl Channel for tokio_rustls::client::TlsStream<TcpStream> {
    fn into_stream(self: Box<Self>) -> io::Result<Stream> {
        let (stream, tls) = self.into_inner();
        Ok(Stream::tls(stream.into_std()?, tls.into()))
    }
}

impl Peers {
    pub(super) fn new(
        roster: Arc<Roster>,
        key: &[u8; 32],
        tls: Option<Reloading<PeerTls>>,
        known: KnownPeers,
        engine: InputSender,
    ) -> Self {
        let salt = ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, b"unbroken coord peers 1");
        let mut psk = [0; 32];
        salt.extract(key)
            .expand(&[b"noise psk"], ring::hkdf::HKDF_SHA256)
            .and_then(|key| key.fill(&mut psk))
            .expect("32 bytes are the length of the hash");
        Self {
            roster,
            psk,
            tls,
            known: Arc::new(known),
            engine,
        }
    }

    /// Accepts peers.
    pub(super) async fn accept(self, listener: TcpListener, alive: Alive) {
        let slots = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
        loop {
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a peer");
                    sleep(DIAL_AGAIN_MIN).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                continue;
            };
            let (peers, alive) = (self.clone(), alive.clone());
            let link = async move {
                let opened = timeout(HANDSHAKE_MAX, peers.answer(stream)).await;
                drop(slot);
                match opened.unwrap_or(Err(LinkError::Slow)) {
                    Ok(Some((stream, noise, from))) => peers.listen(stream, noise, from).await,
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%address, %error, "peer refused"),
                }
            };
            tokio::spawn(while_alive(alive, link));
        }
    }

    /// The handshake of one who has dialled; `None` if it only asked.
    async fn answer(
        &self,
        stream: TcpStream,
    ) -> Result<Option<(Box<dyn Channel>, TransportState, u64)>, LinkError> {
        stream.set_nodelay(true)?;
        let mut certificate = None;
        let mut stream: Box<dyn Channel> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let stream = TlsAcceptor::from(tls.current()?.accept)
                    .accept(stream)
                    .await?;
                let shown = stream.get_ref().1.peer_certificates();
                certificate = shown.and_then(<[_]>::first).cloned();
                Box::new(stream)
            }
        };
        let mut noise = self.builder()?.build_responder()?;
        let record = read_record(&mut stream).await?;
        let mut buffer = vec![0; RECORD_MAX];
        let length = noise.read_message(&record, &mut buffer)?;
        let hello: Hello =
            postcard::from_bytes(&buffer[..length]).map_err(|_| LinkError::Malformed)?;
        if hello.version != VERSION {
            return Err(LinkError::Version(hello));
        }
        let name = match &hello.purpose {
            Purpose::Link(caller) => &caller.name,
            Purpose::Ask(name) => name,
        };
        if certificate.is_some_and(|certificate| !names(&certificate, name)) {
            return Err(LinkError::OtherName(hello));
        }
        let mut from = None;
        let verdict = match &hello.purpose {
            Purpose::Ask(name) => self.roster.answer(name, |id| self.known.contains(id)),
            Purpose::Link(caller) => {
                let (verdict, new) = self.roster.judge(caller);
                if verdict == Verdict::Welcome {
                    self.known.note(caller.id)?;
                    from = Some(caller.id);
                }
                if new {
                    self.engine.send(Input::Met(caller.id)).await;
                }
                verdict
            }
        };
        let answer = postcard::to_allocvec(&verdict).map_err(|_| LinkError::Malformed)?;
        let length = noise.write_message(&answer, &mut buffer)?;
        write_record(&mut stream, &buffer[..length]).await?;
        match (verdict, from) {
            (Verdict::Stranger | Verdict::Removed, _) => Err(LinkError::Stranger(hello)),
            (_, None) => Ok(None),
            (_, Some(from)) => Ok(Some((stream, noise.into_transport_mode()?, from))),
        }
    }

    /// Asks the others who this server is, whose disk is empty, until there is an answer. `Err`
    /// names one that knows it as a server that had something there.
    ///
    /// A new cluster begins when all have been asked and none has begun, or, after a while, as many
    /// as make a majority with this one; a server that is to `join` one never begins one. Where
    /// there is a cluster, its newest word counts.
    pub(super) async fn beginning(&self, join: bool) -> Result<Beginning, String> {
        let peers = self.roster.seeds();
        let patience = sleep(BEGIN_WITH_MAJORITY);
        tokio::pin!(patience);
        let mut told = false;
        let mut wait = DIAL_AGAIN_MIN;
        loop {
            let mut asks = JoinSet::new();
            for (name, address) in peers.clone() {
                let peers = self.clone();
                asks.spawn(async move {
                    let asked = peers.ask(&name, &address).await;
                    (name, asked)
                });
            }
            let mut founded = Vec::new();
            let mut fresh = Vec::new();
            while let Some(asked) = asks.join_next().await {
                match asked {
                    Ok((name, Ok(verdict @ Verdict::Founded { .. }))) => {
                        founded.push((name, verdict));
                    }
                    Ok((_, Ok(Verdict::Fresh { founders }))) => fresh.push(founders),
                    Ok((name, Ok(verdict))) => {
                        tracing::debug!(peer = name, ?verdict, "no answer to the question");
                    }
                    Ok((peer, Err(error))) => tracing::debug!(peer, %error, "cannot ask peer"),
                    Err(_) => {}
                }
            }
            let silent = peers.len() - founded.len() - fresh.len();
            if silent == 0 || patience.is_elapsed() {
                match self.decide(join, peers.len(), &founded, &fresh) {
                    Ok(Some(beginning)) => return Ok(beginning),
                    Ok(None) if patience.is_elapsed() && !told => {
                        told = true;
                        tracing::info!(
                            silent,
                            "the data directory is empty, and no peer takes this server for a member \
                             yet: waiting (unbroken coord member add)"
                        );
                    }
                    Ok(None) => {}
                    Err(peer) => return Err(peer),
                }
            }
            tokio::select! {
                () = &mut patience, if !patience.is_elapsed() => {}
                () = sleep(wait) => wait = (wait * 2).min(DIAL_AGAIN_MAX),
            }
        }
    }

    fn decide(
        &self,
        join: bool,
        peers: usize,
        founded: &[(String, Verdict)],
        fresh: &[Vec<String>],
    ) -> Result<Option<Beginning>, String> {
        let newest = founded.iter().filter_map(|(_, answer)| match answer {
            Verdict::Founded {
                founders,
                version,
                id,
                ..
            } => Some((*version, *id, founders)),
            _ => None,
        });
        if let Some((_, id, founders)) = newest.max_by_key(|(version, ..)| *version) {
            let Some(id) = id else { return Ok(None) };
            let witness = founded.iter().find(|(_, answer)| {
                matches!(answer, Verdict::Founded { id: Some(other), known: true, .. } if *other == id)
            });
            return match witness {
                Some((peer, _)) => Err(peer.clone()),
                None => Ok(Some(Beginning {
                    id,
                    founders: founders.clone(),
                })),
            };
        }
        let mut names: Vec<String> = self.roster.seeds().into_keys().collect();
        names.push(self.roster.name().to_owned());
        names.sort();
        let agreed = fresh.iter().all(|founders| *founders == names);
        let silent = peers - fresh.len();
        if join || !agreed || silent > peers / 2 {
            return Ok(None);
        }
        // Every server counts alike.
        let founders: BTreeMap<u64, String> = (1..).zip(names).collect();
        let id = founders
            .iter()
            .find(|(_, name)| *name == self.roster.name());
        let id = *id.expect("this server is one of them").0;
        Ok(Some(Beginning { id, founders }))
    }

    async fn ask(&self, peer: &str, address: &str) -> Result<Verdict, LinkError> {
        let purpose = Purpose::Ask(self.roster.name().to_owned());
        let (_, _, verdict) = self.open(peer, address, purpose).await?;
        Ok(verdict)
    }

    /// Has the engine listen to a peer, until that stops.
    async fn listen(&self, stream: Box<dyn Channel>, noise: TransportState, from: u64) {
        tracing::debug!(peer = self.roster.name_of(from), "peer connected");
        self.serve(from, Direction::In, stream, noise).await;
        tracing::info!(peer = self.roster.name_of(from), "peer's connection ended");
        // A process that has ended refuses connections at once; one that is only cut off does not.
        let Some((_, addresses)) = self.roster.peer(from) else {
            return;
        };
        let Some(address) = addresses.first() else {
            return;
        };
        if let Ok(Err(error)) = timeout(DIAL_MAX, TcpStream::connect(address)).await
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            self.engine.send(Input::PeerDied(from)).await;
        }
    }

    /// Hands a link to the engine and waits until it has ended.
    async fn serve(
        &self,
        peer: u64,
        direction: Direction,
        stream: Box<dyn Channel>,
        noise: TransportState,
    ) {
        let stream = match stream.into_stream() {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(peer, %error, "cannot serve a peer");
                return;
            }
        };
        let (ended, end) = oneshot::channel();
        let made = Made {
            peer,
            direction,
            stream,
            noise,
            _ended: ended,
        };
        if self.engine.send(Input::Link(Box::new(made))).await {
            // The sender is dropped, and nothing sent.
            let _ = end.await;
        }
    }

    /// Keeps a connection to a peer, on which the engine sends, until `stop` is dropped.
    pub(super) async fn dial(self, peer: u64, stop: oneshot::Receiver<()>) {
        tokio::select! {
            _ = stop => {}
            () = self.keep_dialling(peer) => {}
        }
    }

    async fn keep_dialling(&self, peer: u64) {
        let mut again = DIAL_AGAIN_MIN;
        for attempt in 0.. {
            match self.connect(peer, attempt).await {
                Ok((stream, noise)) => {
                    again = DIAL_AGAIN_MIN;
                    self.serve(peer, Direction::Out, stream, noise).await;
                }
                Err(LinkError::Removed) => {
                    self.engine.send(Input::Removed).await;
                }
                Err(error) => {
                    tracing::debug!(peer = self.roster.name_of(peer), %error, "cannot reach peer");
                }
            }
            sleep(again).await;
            again = (again * 2).min(DIAL_AGAIN_MAX);
        }
    }

    /// Dials a peer at one of its addresses, each in its turn. A name is looked up every time.
    async fn connect(
        &self,
        peer: u64,
        attempt: usize,
    ) -> Result<(Box<dyn Channel>, TransportState), LinkError> {
        let (name, addresses) = self.roster.peer(peer).ok_or(LinkError::NoAddress)?;
        let address = addresses.get(attempt % addresses.len().max(1));
        let address = address.ok_or(LinkError::NoAddress)?;
        let caller = self.roster.caller(peer).ok_or(LinkError::NoAddress)?;
        match self.open(&name, address, Purpose::Link(caller)).await? {
            (stream, noise, Verdict::Welcome) => Ok((stream, noise)),
            (_, _, Verdict::Removed) => Err(LinkError::Removed),
            _ => Err(LinkError::Unwelcome),
        }
    }

    /// Dials and says why.
    async fn open(
        &self,
        peer: &str,
        address: &str,
        purpose: Purpose,
    ) -> Result<(Box<dyn Channel>, TransportState, Verdict), LinkError> {
        let stream = timeout(DIAL_MAX, TcpStream::connect(address))
            .await
            .map_err(|_| LinkError::Slow)??;
        stream.set_nodelay(true)?;
        let version = VERSION;
        let hello = postcard::to_allocvec(&Hello { version, purpose });
        let hello = hello.map_err(|_| LinkError::Malformed)?;
        let handshake = async {
            let mut stream: Box<dyn Channel> = match &self.tls {
                None => Box::new(stream),
                Some(tls) => {
                    let connector = TlsConnector::from(tls.current()?.dial);
                    Box::new(connector.connect(server_name(peer)?, stream).await?)
                }
            };
            let mut noise = self.builder()?.build_initiator()?;
            let mut buffer = vec![0; RECORD_MAX];
            let length = noise.write_message(&hello, &mut buffer)?;
            write_record(&mut stream, &buffer[..length]).await?;
            let answer = read_record(&mut stream).await?;
            let length = noise.read_message(&answer, &mut buffer)?;
            let verdict: Verdict =
                postcard::from_bytes(&buffer[..length]).map_err(|_| LinkError::Malformed)?;
            Ok::<_, LinkError>((stream, noise.into_transport_mode()?, verdict))
        };
        timeout(HANDSHAKE_MAX, handshake)
            .await
            .map_err(|_| LinkError::Slow)?
    }

    fn builder(&self) -> Result<snow::Builder<'_>, snow::Error> {
        snow::Builder::new(PATTERN.parse()?).psk(0, &self.psk)
    }
}

async fn read_record(stream: &mut Box<dyn Channel>) -> Result<Vec<u8>, LinkError> {
    let mut record = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut record).await?;
    Ok(record)
}

async fn write_record(stream: &mut Box<dyn Channel>, record: &[u8]) -> Result<(), LinkError> {
    let length = u16::try_from(record.len()).map_err(|_| LinkError::Malformed)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(record);
    stream.write_all(&framed).await?;
    stream.flush().await?;
    Ok(())
}
