//! Links between servers: TCP with Noise, one connection for each direction.
//!
//! Whoever sends dials. The pattern is `NNpsk0` with a key derived from the cluster's pre-shared
//! key: only who has it can speak or listen, and every connection has fresh keys. Inside, messages
//! are postcard, each with its length in front; the stream of them is cut into Noise records.
//!
//! When the connection that a peer has dialled ends and its listener refuses, its process is dead:
//! the core is told, and need not wait for the silence.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snow::TransportState;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::disk::KnownPeers;
use super::engine::{Alive, Input, InputSender, while_alive};
use crate::core::PeerMessage;

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// Version of everything that peers say to each other.
const VERSION: u16 = 1;

/// Noise's limit of one record, and what is left of it for us.
const RECORD_MAX: usize = 65_535;
const PLAIN_MAX: usize = RECORD_MAX - 16;

/// One message at most. Snapshots are the large ones.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Messages waiting for one peer at most; more are dropped, and the engine is told.
pub(super) const QUEUE_MAX: usize = 4096;

/// Messages sealed together at most.
const BATCH_MAX: usize = 128;

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
    from: String,
    to: String,
    /// It has nothing on its disk, and only wants to know whether that was always so.
    fresh: bool,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    /// The dialler has been here before with something on its disk.
    known: bool,
}

/// Why a link could not be made, or ended.
#[derive(Debug, Error)]
enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("not authenticated (is the key the same on every server?): {0}")]
    Noise(#[from] snow::Error),
    #[error("no answer in time")]
    Slow,
    #[error("a stranger, or a peer of another version: {0:?}")]
    Stranger(Hello),
    #[error("not a message of ours")]
    Malformed,
}

/// This server among its peers.
#[derive(Clone)]
pub(super) struct Peers {
    name: Arc<str>,
    ids: Arc<BTreeMap<String, u64>>,
    addresses: Arc<BTreeMap<u64, SocketAddr>>,
    psk: [u8; 32],
    known: Arc<KnownPeers>,
    engine: InputSender,
}

impl Peers {
    pub(super) fn new(
        name: &str,
        ids: BTreeMap<String, u64>,
        addresses: BTreeMap<u64, SocketAddr>,
        key: &[u8; 32],
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
            name: name.into(),
            ids: Arc::new(ids),
            addresses: Arc::new(addresses),
            psk,
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
        mut stream: TcpStream,
    ) -> Result<Option<(TcpStream, TransportState, u64)>, LinkError> {
        stream.set_nodelay(true)?;
        let mut noise = self.builder()?.build_responder()?;
        let record = read_record(&mut stream).await?;
        let mut buffer = vec![0; RECORD_MAX];
        let length = noise.read_message(&record, &mut buffer)?;
        let hello: Hello =
            postcard::from_bytes(&buffer[..length]).map_err(|_| LinkError::Malformed)?;
        let from = match self.ids.get(&hello.from) {
            Some(id) if hello.version == VERSION && hello.to == *self.name => *id,
            _ => return Err(LinkError::Stranger(hello)),
        };
        if !hello.fresh {
            self.known.note(&hello.from)?;
        }
        let welcome = Welcome {
            known: self.known.contains(&hello.from),
        };
        let welcome = postcard::to_allocvec(&welcome).map_err(|_| LinkError::Malformed)?;
        let length = noise.write_message(&welcome, &mut buffer)?;
        write_record(&mut stream, &buffer[..length]).await?;
        let noise = noise.into_transport_mode()?;
        Ok((!hello.fresh).then_some((stream, noise, from)))
    }

    /// Asks the others whether they know this server, whose disk is empty, as one that had
    /// something on it. `Err` names one that does. A new cluster begins when all have been asked,
    /// or, after a while, as many as make a majority with this one.
    pub(super) async fn may_begin(&self, this: u64) -> Result<(), String> {
        let mut silent: Vec<u64> = self
            .ids
            .values()
            .copied()
            .filter(|id| *id != this)
            .collect();
        let few_enough = silent.len() / 2;
        let patience = sleep(BEGIN_WITH_MAJORITY);
        tokio::pin!(patience);
        loop {
            let mut asks = JoinSet::new();
            for peer in &silent {
                let (peers, peer) = (self.clone(), *peer);
                asks.spawn(async move { (peer, peers.connect(peer, true).await) });
            }
            while let Some(asked) = asks.join_next().await {
                match asked {
                    Ok((peer, Ok((_, _, true)))) => return Err(self.name_of(peer).to_owned()),
                    Ok((peer, Ok((_, _, false)))) => silent.retain(|id| *id != peer),
                    Ok((_, Err(_))) | Err(_) => {}
                }
            }
            if silent.is_empty() || (patience.is_elapsed() && silent.len() <= few_enough) {
                return Ok(());
            }
            tokio::select! {
                () = &mut patience, if !patience.is_elapsed() => {}
                () = sleep(DIAL_AGAIN_MIN) => {}
            }
        }
    }

    /// Hands on what a peer says, until it stops.
    async fn listen(&self, mut stream: TcpStream, mut noise: TransportState, from: u64) {
        tracing::debug!(peer = self.name_of(from), "peer connected");
        let Err(error) = self.receive(&mut stream, &mut noise, from).await;
        tracing::info!(peer = self.name_of(from), %error, "peer's connection ended");
        // A process that has ended refuses connections at once; one that is only cut off does not.
        let Some(address) = self.addresses.get(&from) else {
            return;
        };
        if let Ok(Err(error)) = timeout(DIAL_MAX, TcpStream::connect(address)).await
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            self.engine.send(Input::PeerDied(from)).await;
        }
    }

    async fn receive(
        &self,
        stream: &mut TcpStream,
        noise: &mut TransportState,
        from: u64,
    ) -> Result<Infallible, LinkError> {
        let mut plain = Vec::new();
        let mut start = 0;
        loop {
            let record = read_record(stream).await?;
            plain.drain(..start);
            let end = plain.len();
            plain.resize(end + record.len(), 0);
            let length = noise.read_message(&record, &mut plain[end..])?;
            plain.truncate(end + length);
            start = 0;
            while let Some((prefix, rest)) = plain[start..].split_first_chunk::<4>() {
                let length = u32::from_le_bytes(*prefix) as usize;
                if length > MESSAGE_BYTES_MAX {
                    return Err(LinkError::Malformed);
                }
                let Some(bytes) = rest.get(..length) else {
                    break;
                };
                let message: PeerMessage =
                    postcard::from_bytes(bytes).map_err(|_| LinkError::Malformed)?;
                start += 4 + length;
                self.engine.try_send(Input::Peer { from, message });
            }
        }
    }

    /// Keeps a connection to a peer and sends what comes, until the sender is dropped. What comes
    /// while there is no connection is dropped.
    pub(super) async fn dial(self, peer: u64, mut queue: mpsc::Receiver<PeerMessage>) {
        let mut again = DIAL_AGAIN_MIN;
        loop {
            match self.connect(peer, false).await {
                Ok((stream, noise, _)) => {
                    again = DIAL_AGAIN_MIN;
                    // It is old by now; the engine repeats what still matters.
                    while queue.try_recv().is_ok() {}
                    let error = match self.send(stream, noise, &mut queue).await {
                        Ok(()) => return,
                        Err(error) => error,
                    };
                    tracing::debug!(peer = self.name_of(peer), %error, "connection to peer ended");
                    self.engine.send(Input::Unreachable(peer)).await;
                }
                Err(error) => {
                    tracing::debug!(peer = self.name_of(peer), %error, "cannot reach peer");
                }
            }
            if queue.is_closed() {
                return;
            }
            while queue.try_recv().is_ok() {}
            sleep(again).await;
            again = (again * 2).min(DIAL_AGAIN_MAX);
        }
    }

    /// Dials; the last part of the answer is [`Welcome::known`].
    async fn connect(
        &self,
        peer: u64,
        fresh: bool,
    ) -> Result<(TcpStream, TransportState, bool), LinkError> {
        let address = self.addresses.get(&peer).ok_or(LinkError::Malformed)?;
        let mut stream = timeout(DIAL_MAX, TcpStream::connect(address))
            .await
            .map_err(|_| LinkError::Slow)??;
        stream.set_nodelay(true)?;
        let hello = Hello {
            version: VERSION,
            from: self.name.to_string(),
            to: self.name_of(peer).to_owned(),
            fresh,
        };
        let hello = postcard::to_allocvec(&hello).map_err(|_| LinkError::Malformed)?;
        let handshake = async {
            let mut noise = self.builder()?.build_initiator()?;
            let mut buffer = vec![0; RECORD_MAX];
            let length = noise.write_message(&hello, &mut buffer)?;
            write_record(&mut stream, &buffer[..length]).await?;
            let answer = read_record(&mut stream).await?;
            let length = noise.read_message(&answer, &mut buffer)?;
            let welcome: Welcome =
                postcard::from_bytes(&buffer[..length]).map_err(|_| LinkError::Malformed)?;
            Ok::<_, LinkError>((noise.into_transport_mode()?, welcome.known))
        };
        let (noise, known) = timeout(HANDSHAKE_MAX, handshake)
            .await
            .map_err(|_| LinkError::Slow)??;
        Ok((stream, noise, known))
    }

    async fn send(
        &self,
        mut stream: TcpStream,
        mut noise: TransportState,
        queue: &mut mpsc::Receiver<PeerMessage>,
    ) -> Result<(), LinkError> {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let mut plain = Vec::new();
        let mut sealed = Vec::new();
        let mut nothing = [0; 1];
        loop {
            tokio::select! {
                biased;
                // The peer says nothing here: whatever is read is the end.
                _ = stream.read(&mut nothing) => {
                    return Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
                }
                count = queue.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        return Ok(());
                    }
                }
            }
            plain.clear();
            for message in batch.drain(..) {
                let start = plain.len();
                plain.extend_from_slice(&[0; 4]);
                plain = postcard::to_extend(&message, plain).map_err(|_| LinkError::Malformed)?;
                let length = plain.len() - start - 4;
                let length = u32::try_from(length).map_err(|_| LinkError::Malformed)?;
                plain[start..start + 4].copy_from_slice(&length.to_le_bytes());
            }
            sealed.clear();
            for chunk in plain.chunks(PLAIN_MAX) {
                let start = sealed.len();
                sealed.resize(start + 2 + chunk.len() + 16, 0);
                let length = noise.write_message(chunk, &mut sealed[start + 2..])?;
                let length = u16::try_from(length).expect("a record's limit");
                sealed[start..start + 2].copy_from_slice(&length.to_be_bytes());
            }
            stream.write_all(&sealed).await?;
        }
    }

    fn builder(&self) -> Result<snow::Builder<'_>, snow::Error> {
        snow::Builder::new(PATTERN.parse()?).psk(0, &self.psk)
    }

    fn name_of(&self, id: u64) -> &str {
        self.ids
            .iter()
            .find(|(_, other)| **other == id)
            .map_or("unknown", |(name, _)| name)
    }
}

async fn read_record(stream: &mut TcpStream) -> Result<Vec<u8>, LinkError> {
    let mut record = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut record).await?;
    Ok(record)
}

async fn write_record(stream: &mut TcpStream, record: &[u8]) -> Result<(), LinkError> {
    let length = u16::try_from(record.len()).map_err(|_| LinkError::Malformed)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(record);
    stream.write_all(&framed).await?;
    Ok(())
}
