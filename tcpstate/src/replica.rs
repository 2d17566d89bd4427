//! A backup's record of every connection, and of its own server's output.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::closed::{ClosedTuples, Ending, Past, Remembered};
use crate::config::Config;
use crate::conn_state::{ConnState, Tuple};
use crate::error::DecodeError;
use crate::event::{ConnId, Event, EventNo, HalfOpen, ResetBy};
use crate::fault::planted;
use crate::time::Instant;

/// Everything that a replica must know of a VIP's connections, without their bytes: what a joiner is
/// given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub(crate) connections: Vec<(ConnId, ConnState)>,
    pub(crate) half_open: Vec<HalfOpen>,
    pub(crate) closed: Vec<Remembered>,
}

/// First bytes of an encoded image: what it is, and its version.
const MAGIC: [u8; 4] = *b"UTI\x01";

impl Image {
    /// The connections in it.
    pub fn connections(&self) -> impl Iterator<Item = (ConnId, &ConnState)> {
        self.connections.iter().map(|(id, state)| (*id, state))
    }

    /// The image as bytes. Integrity is the carrier's matter.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, MAGIC.to_vec()).expect("writing to a Vec cannot fail")
    }

    /// Reads an image.
    ///
    /// # Errors
    /// If `bytes` are not an image of a version that we know.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (magic, body) = bytes.split_at_checked(4).ok_or(DecodeError::Truncated)?;
        if magic[..3] != MAGIC[..3] {
            return Err(DecodeError::Malformed);
        }
        if magic[3] != MAGIC[3] {
            return Err(DecodeError::Version(magic[3]));
        }
        match postcard::take_from_bytes(body) {
            Ok((image, [])) => Ok(image),
            _ => Err(DecodeError::Malformed),
        }
    }
}

/// A record without output keeps no more memory than this.
const KEPT_BYTES_MAX: usize = 64 * 1024;

/// One connection's record and what its server has said.
pub(crate) struct Record {
    pub(crate) state: ConnState,
    /// Our server's output from `state.acked` on, as far as it has produced it.
    pub(crate) retained: VecDeque<u8>,
    /// Offset behind our server's last byte.
    pub(crate) produced: u64,
    /// What our server is known to have taken; told only once this node leads.
    pub(crate) consumed: u64,
    /// Our server closed its side.
    pub(crate) server_fin: bool,
    /// Our server broke off, or could not be reached.
    pub(crate) server_reset: bool,
}

impl std::fmt::Debug for Record {
    /// Payload is never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record")
            .field("state", &self.state)
            .field("retained", &self.retained.len())
            .field("produced", &self.produced)
            .finish_non_exhaustive()
    }
}

impl Record {
    fn new(state: ConnState) -> Self {
        Self {
            state,
            retained: VecDeque::new(),
            produced: 0,
            consumed: 0,
            server_fin: false,
            server_reset: false,
        }
    }

    /// Drops what the client is known to have.
    fn discard_acknowledged(&mut self) {
        let start = self.produced - self.retained.len() as u64;
        let known = self.state.acked.saturating_sub(start);
        let known = usize::try_from(known)
            .unwrap_or(usize::MAX)
            .min(self.retained.len());
        self.retained.drain(..known);
        if self.retained.is_empty() && self.retained.capacity() > KEPT_BYTES_MAX {
            self.retained = VecDeque::new();
        }
    }
}

/// The record that every member but the leader keeps: fed by events alone, and by its own server.
#[derive(Debug)]
pub struct Replica {
    config: Config,
    applied: Option<EventNo>,
    pub(crate) records: BTreeMap<ConnId, Record>,
    /// With the time at which each was announced; those that nobody completed are not worth
    /// resuming.
    pub(crate) half_open: BTreeMap<Tuple, (HalfOpen, Instant)>,
    pub(crate) closed: ClosedTuples,
    /// Records whose room has reopened since the driver last asked.
    reopened: BTreeSet<ConnId>,
}

impl Replica {
    /// An empty record.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            applied: None,
            records: BTreeMap::new(),
            half_open: BTreeMap::new(),
            closed: ClosedTuples::default(),
            reopened: BTreeSet::new(),
        }
    }

    /// The record that an image describes. Output is yet to be produced by this node's server; what
    /// the client has already is dropped as it comes.
    pub fn restore(config: Config, now: Instant, image: Image) -> Self {
        let closed = ClosedTuples::restore(now, image.closed, config.max_closed);
        let mut replica = Self::new(config);
        replica.closed = closed;
        replica.half_open = image
            .half_open
            .into_iter()
            .map(|h| (h.tuple, (h, now)))
            .collect();
        replica.records = image
            .connections
            .into_iter()
            .map(|(id, state)| (id, Record::new(state)))
            .collect();
        replica
    }

    /// What a joiner needs to know, as after the last applied event.
    pub fn snapshot(&self, now: Instant) -> Image {
        Image {
            connections: self
                .records
                .iter()
                .map(|(id, r)| (*id, r.state.clone()))
                .collect(),
            half_open: self.half_open.values().map(|(half, _)| *half).collect(),
            closed: self.closed.image(now),
        }
    }

    /// Applies the next event.
    ///
    /// # Panics
    /// If `number` does not follow the last one, or the event does not follow its connection's
    /// record: going on would corrupt a stream.
    pub fn apply(&mut self, now: Instant, number: EventNo, event: &Event) {
        if let Some(applied) = self.applied {
            assert_eq!(number, applied.next(), "events are contiguous");
        }
        self.applied = Some(number);
        match event {
            Event::HalfOpen { half } => {
                if self.half_open.len() >= self.config.max_half_open {
                    self.half_open.pop_first();
                }
                self.half_open.insert(half.tuple, (*half, now));
            }
            Event::Open { state } => {
                self.half_open.remove(&state.tuple);
                self.records
                    .insert(ConnId(number.0), Record::new(state.clone()));
            }
            Event::Data { conn, .. }
            | Event::PeerFin { conn, .. }
            | Event::LocalFin { conn, .. } => {
                if let Some(record) = self.records.get_mut(conn) {
                    record.state.apply(event);
                }
            }
            Event::Acked { conn, .. } => {
                let full = self.output_room(*conn) == 0;
                if let Some(record) = self.records.get_mut(conn) {
                    record.state.apply(event);
                    record.discard_acknowledged();
                }
                if full && self.output_room(*conn) > 0 {
                    self.reopened.insert(*conn);
                }
            }
            Event::Reset { conn, by } => {
                let ending = match by {
                    ResetBy::Peer => Ending::ByPeer,
                    ResetBy::Server | ResetBy::Stack => Ending::ByUs,
                };
                self.forget(now, *conn, ending);
            }
            Event::Closed { conn } => self.forget(now, *conn, Ending::Closed),
            // What the server is given, and when, is the driver's matter.
            Event::Skip { .. } | Event::Answered { .. } => {}
        }
    }

    fn forget(&mut self, now: Instant, conn: ConnId, ending: Ending) {
        if let Some(record) = self.records.remove(&conn) {
            let past = Past::of(&record.state, ending);
            self.closed.remember(now, past, self.config.max_closed);
        }
        self.reopened.remove(&conn);
    }

    /// Output of this node's server, in order. Kept from the client's last known acknowledgement on.
    pub fn handle_server_bytes(&mut self, conn: ConnId, bytes: &[u8]) {
        if let Some(record) = self.records.get_mut(&conn) {
            record.produced += bytes.len() as u64;
            if !planted!(OutputForgotten) {
                record.retained.extend(bytes);
            }
            record.discard_acknowledged();
        }
    }

    /// This node's server began with a state in which it has said everything before `offset`, which
    /// the client must have acknowledged.
    ///
    /// # Panics
    /// If the client may still ask for some of it, and nobody has it.
    pub fn handle_server_resumed(&mut self, conn: ConnId, offset: u64) {
        if let Some(record) = self.records.get_mut(&conn)
            && record.produced < offset
        {
            assert!(
                record.retained.is_empty() && offset <= record.state.acked,
                "output is continuous from the client's acknowledgement on"
            );
            record.produced = offset;
        }
    }

    /// How many bytes may be read from this node's server now.
    pub fn output_room(&self, conn: ConnId) -> usize {
        let Some(record) = self.records.get(&conn) else {
            return 0;
        };
        let room = self
            .config
            .retained_output_max
            .saturating_sub(record.retained.len());
        if room >= self.config.retained_output_max / 4 {
            room
        } else {
            0
        }
    }

    /// Whether output of this connection's server is of use to anybody: not once it is over.
    pub fn wants_output(&self, conn: ConnId) -> bool {
        self.records.contains_key(&conn)
    }

    /// A connection whose [`Replica::output_room`] has reopened, if any. Drain to `None`.
    pub fn poll_room(&mut self) -> Option<ConnId> {
        self.reopened.pop_first()
    }

    /// This node's server closed its side.
    pub fn handle_server_fin(&mut self, conn: ConnId) {
        if let Some(record) = self.records.get_mut(&conn) {
            record.server_fin = true;
        }
    }

    /// This node's server broke the connection off, or could not be reached.
    pub fn handle_server_reset(&mut self, conn: ConnId) {
        if let Some(record) = self.records.get_mut(&conn) {
            record.server_reset = true;
        }
    }

    /// Offset behind the last byte that this node's server has produced.
    pub fn output_produced(&self, conn: ConnId) -> u64 {
        self.records.get(&conn).map_or(0, |r| r.produced)
    }

    /// A connection's record.
    pub fn state(&self, conn: ConnId) -> Option<&ConnState> {
        self.records.get(&conn).map(|r| &r.state)
    }

    /// Connections at present.
    pub fn connections(&self) -> usize {
        self.records.len()
    }
}
