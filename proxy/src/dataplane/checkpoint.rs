//! What a joining replica is given: the records of all connections, and their inputs for replay.
//!
//! ```text
//! u32 header length | header (postcard, version in front) | bytes of every input, in header order
//!                   | with one order for all connections: the servers' images, the history of all inputs
//! ```
//! The bytes are shared with the log, not copied, and read from the disk when it is their turn; the
//! joiner takes them as they come, and hands to the disk what is too much for its memory.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use unbroken_tcpstate::{DecodeError, Image};

use super::history;
use super::servers::{InputHeader, OrderHeader, OrderImage};
use super::spill::{FRAME_BYTES, Piece, Spill};

const VERSION: u16 = 2;
/// More than the records of as many connections as a node can have.
const HEADER_BYTES_MAX: usize = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u16,
    /// [`Image::encode`]: it has a version of its own.
    tcp: Vec<u8>,
    inputs: Vec<InputHeader>,
    order: Option<OrderHeader>,
}

/// Why a checkpoint cannot be used: its donor speaks another version, or it is damaged, or its donor is
/// at a loss itself.
#[derive(Debug, Error)]
pub(crate) enum CheckpointError {
    #[error("the checkpoint is shorter or longer than it says")]
    Length,
    #[error("the checkpoint's header cannot be read: {0}")]
    Header(#[from] postcard::Error),
    #[error("the checkpoint's records: {0}")]
    Records(#[from] DecodeError),
    #[error("the checkpoint has version {0}, this program reads {VERSION}")]
    Version(u16),
    #[error("the checkpoint's history of inputs is damaged")]
    History,
    #[error("the leader's history brings no server up for now")]
    Unusable,
}

/// A checkpoint taken apart.
pub(crate) struct Checkpoint {
    pub(crate) tcp: Image,
    pub(crate) inputs: Vec<(InputHeader, Vec<Piece>)>,
    pub(crate) order: Option<OrderImage>,
}

/// Writes a checkpoint as a list of pieces.
pub(crate) fn encode(
    tcp: &Image,
    inputs: (Vec<InputHeader>, Vec<Piece>),
    order: Option<(OrderHeader, Vec<Piece>)>,
) -> Vec<Piece> {
    let (order, history) = order.unzip();
    let header = Header {
        version: VERSION,
        tcp: tcp.encode(),
        inputs: inputs.0,
        order,
    };
    let header = postcard::to_stdvec(&header).expect("a header of ours is serialisable");
    let length = u32::try_from(header.len()).expect("records of bounded connections fit 4 GiB");
    let mut head = BytesMut::with_capacity(4 + header.len());
    head.extend_from_slice(&length.to_le_bytes());
    head.extend_from_slice(&header);
    let mut pieces = vec![Piece::Memory(head.freeze())];
    pieces.extend(inputs.1);
    pieces.extend(history.unwrap_or_default());
    pieces
}

/// A checkpoint that is coming.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    /// Bytes that have come, and shall come.
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
    /// The header, until it is whole.
    head: BytesMut,
    body: Option<Body>,
    /// It is of no use: nothing more is kept of it.
    failed: bool,
}

/// What follows the header, as it comes.
#[derive(Debug)]
struct Body {
    tcp: Image,
    inputs: Vec<(InputHeader, Vec<Piece>)>,
    order: Option<OrderImage>,
    /// What is coming now, and how much of it is left.
    part: Part,
    left: u64,
    /// Too little for a piece.
    rest: BytesMut,
    memory_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Input(usize),
    Image(usize),
    History,
    End,
}

impl Incoming {
    /// Takes the next bytes. What exceeds `memory_bytes_max` goes to the disk.
    ///
    /// # Errors
    /// It is of no use. Said once.
    pub(crate) fn push(
        &mut self,
        bytes: Bytes,
        total: u64,
        (spill, memory_bytes_max): (&Spill, u64),
    ) -> Result<(), CheckpointError> {
        self.done_bytes += bytes.len() as u64;
        self.total_bytes = total;
        if self.failed {
            return Ok(());
        }
        let taken = self.take(bytes, (spill, memory_bytes_max));
        if taken.is_err() {
            *self = Self {
                done_bytes: self.done_bytes,
                total_bytes: total,
                failed: true,
                ..Self::default()
            };
        }
        taken
    }

    fn take(&mut self, bytes: Bytes, disk: (&Spill, u64)) -> Result<(), CheckpointError> {
        if let Some(body) = &mut self.body {
            return body.take(bytes, disk);
        }
        self.head.extend_from_slice(&bytes);
        let Some(length) = self.head.get(..4) else {
            return Ok(());
        };
        let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > HEADER_BYTES_MAX {
            return Err(CheckpointError::Length);
        }
        if self.head.len() < 4 + length {
            return Ok(());
        }
        let mut head = std::mem::take(&mut self.head).freeze();
        let rest = head.split_off(4 + length);
        let header: Header = postcard::from_bytes(&head[4..])?;
        self.body.insert(Body::new(header)?).take(rest, disk)
    }

    /// All of it has come. `None`: it is of no use, which was said before.
    ///
    /// # Errors
    /// It is shorter than it says.
    pub(crate) fn finish(self) -> Result<Option<Checkpoint>, CheckpointError> {
        if self.failed {
            return Ok(None);
        }
        let body = self.body.ok_or(CheckpointError::Length)?;
        if body.part != Part::End {
            return Err(CheckpointError::Length);
        }
        Ok(Some(Checkpoint {
            tcp: body.tcp,
            inputs: body.inputs,
            order: body.order,
        }))
    }
}

impl Body {
    fn new(header: Header) -> Result<Self, CheckpointError> {
        if header.version != VERSION {
            return Err(CheckpointError::Version(header.version));
        }
        let tcp = Image::decode(&header.tcp)?;
        if let Some(order) = &header.order {
            order.total_bytes().ok_or(CheckpointError::Length)?;
            if !order.is_usable(&tcp) {
                return Err(CheckpointError::Unusable);
            }
        }
        if header.inputs.iter().any(|i| i.end < i.base) {
            return Err(CheckpointError::Length);
        }
        let order = header.order.map(|header| OrderImage {
            images: vec![Vec::new(); header.images().len()],
            header,
            history: Vec::new(),
        });
        let inputs = header.inputs.into_iter().map(|i| (i, Vec::new()));
        let mut body = Self {
            tcp,
            inputs: inputs.collect(),
            order,
            part: Part::Input(0),
            left: 0,
            rest: BytesMut::new(),
            memory_bytes: 0,
        };
        body.begin(Part::Input(0));
        Ok(body)
    }

    /// Goes on with this part, or the next that there is. What is empty is passed over.
    fn begin(&mut self, mut part: Part) {
        loop {
            let length = match part {
                Part::Input(i) => self.inputs.get(i).map(|(input, _)| input.end - input.base),
                Part::Image(i) => {
                    let images = self.order.as_ref().map_or(&[][..], |o| o.header.images());
                    images.get(i).copied()
                }
                Part::History => self.order.as_ref().map(|o| o.header.bytes),
                Part::End => break,
            };
            if let Some(length) = length.filter(|length| *length > 0) {
                (self.part, self.left) = (part, length);
                return;
            }
            part = match (part, length) {
                (Part::Input(i), Some(_)) => Part::Input(i + 1),
                (Part::Input(_), None) => Part::Image(0),
                (Part::Image(i), Some(_)) => Part::Image(i + 1),
                (Part::Image(_), None) => Part::History,
                (Part::History | Part::End, _) => Part::End,
            };
        }
        (self.part, self.left) = (Part::End, 0);
    }

    fn take(&mut self, mut bytes: Bytes, disk: (&Spill, u64)) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            if self.part == Part::End {
                return Err(CheckpointError::Length);
            }
            let left = usize::try_from(self.left).unwrap_or(usize::MAX);
            let room = FRAME_BYTES.saturating_sub(self.rest.len()).max(1);
            let n = bytes.len().min(left).min(room);
            self.rest.extend_from_slice(&bytes[..n]);
            bytes.advance(n);
            self.left -= n as u64;
            if self.left == 0 || self.rest.len() >= FRAME_BYTES {
                self.cut(disk)?;
            }
            if self.left == 0 {
                let next = match self.part {
                    Part::Input(i) => Part::Input(i + 1),
                    Part::Image(i) => Part::Image(i + 1),
                    Part::History | Part::End => Part::End,
                };
                self.begin(next);
            }
        }
        Ok(())
    }

    /// Makes a piece of what has come.
    fn cut(&mut self, (spill, memory_bytes_max): (&Spill, u64)) -> Result<(), CheckpointError> {
        let length = if self.part == Part::History {
            let whole = history::whole_inputs(&self.rest).ok_or(CheckpointError::History)?;
            // A frame holds an input at least; the last ends with the history.
            let ends = whole == self.rest.len() || self.left > 0;
            if whole == 0 || !ends {
                return Err(CheckpointError::History);
            }
            whole
        } else {
            self.rest.len()
        };
        let bytes = self.rest.split_to(length).freeze();
        let memory_bytes = self.memory_bytes + bytes.len() as u64;
        let stored = if memory_bytes > memory_bytes_max {
            spill.store(bytes.clone())
        } else {
            None
        };
        let piece = match stored {
            Some(stored) => Piece::Stored(stored),
            None => {
                self.memory_bytes = memory_bytes;
                Piece::Memory(bytes)
            }
        };
        match (self.part, &mut self.order) {
            (Part::Input(i), _) => self.inputs[i].1.push(piece),
            (Part::Image(i), Some(order)) => order.images[i].push(piece),
            (Part::History, Some(order)) => order.history.push(piece),
            (Part::Image(_) | Part::History, None) | (Part::End, _) => {
                unreachable!("parts are of what the header names")
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use unbroken_tcpstate::{Config, ConnId, EventNo, Instant, Replica};

    use super::*;
    use crate::dataplane::history::{Entry, History, What};
    use crate::dataplane::spill::tests::Disk;
    use crate::dataplane::spill::total;

    const MEMORY: u64 = 1 << 20;

    fn records() -> Image {
        let config = Config::new("10.98.0.100".parse().unwrap(), [80]);
        Replica::new(config).snapshot(Instant::from_micros(1))
    }

    fn bytes(pieces: &[Piece]) -> Vec<u8> {
        pieces.iter().flat_map(|p| p.read().unwrap()).collect()
    }

    /// Inputs of these lengths, each in frames.
    fn inputs(lengths: &[usize]) -> (Vec<InputHeader>, Vec<Piece>) {
        let mut headers = Vec::new();
        let mut pieces = Vec::new();
        for (conn, length) in (1..).zip(lengths) {
            headers.push(InputHeader {
                conn,
                port: 80,
                base: 5,
                end: 5 + *length as u64,
                finished: false,
            });
            let contents = Bytes::from(vec![conn.to_le_bytes()[0]; *length]);
            let frames = contents.chunks(FRAME_BYTES).map(|f| contents.slice_ref(f));
            pieces.extend(frames.map(Piece::Memory));
        }
        (headers, pieces)
    }

    /// Has it come in parts of this length.
    fn take(pieces: &[Piece], part: usize, disk: &Disk) -> Result<Incoming, CheckpointError> {
        let all = Bytes::from(bytes(pieces));
        let mut incoming = Incoming::default();
        for chunk in all.chunks(part) {
            incoming.push(all.slice_ref(chunk), all.len() as u64, (disk, MEMORY))?;
        }
        assert_eq!(incoming.done_bytes, total(pieces));
        Ok(incoming)
    }

    #[test]
    fn inputs_come_as_they_were_however_they_are_cut() {
        let lengths = [0, 1, 700_000, 0, FRAME_BYTES, 3 << 20, 0];
        for part in [1000, 1399, FRAME_BYTES, 64 << 20] {
            let disk = Disk::new(64 << 20);
            let (headers, pieces) = inputs(&lengths);
            let given = encode(&records(), (headers, pieces), None);
            let checkpoint = take(&given, part, &disk).unwrap().finish().unwrap();
            let checkpoint = checkpoint.unwrap();
            assert_eq!(checkpoint.inputs.len(), lengths.len());
            for ((header, pieces), length) in checkpoint.inputs.iter().zip(lengths) {
                assert_eq!((header.base, total(pieces)), (5, length as u64));
                let conn = header.conn.to_le_bytes()[0];
                assert!(bytes(pieces).iter().all(|b| *b == conn));
            }
            // What is too much for memory is not there.
            let in_memory = checkpoint.inputs.iter().flat_map(|(_, pieces)| pieces);
            let in_memory = in_memory.filter(|p| matches!(p, Piece::Memory(_)));
            let in_memory: usize = in_memory.map(Piece::len).sum();
            assert!(in_memory as u64 <= MEMORY && disk.used_bytes() > 2 << 20);
        }
    }

    #[test]
    fn a_history_comes_in_pieces_that_end_where_inputs_do() {
        let disk = Disk::new(64 << 20);
        let mut history = History::new(64 << 20);
        let entry = |number: u64| Entry {
            number: EventNo(number),
            conn: ConnId(1),
            what: What::Data(Bytes::from(vec![
                9;
                usize::try_from(number % 9000).unwrap()
            ])),
        };
        for number in 0..1000 {
            history.append(&entry(number), &disk);
        }
        let header = OrderHeader {
            bytes: history.bytes(),
            cost_bytes: history.cost_bytes(),
            skips: Vec::new(),
            complete: true,
            base: None,
        };
        let order = Some((header, history.chunks()));
        let given = encode(&records(), Default::default(), order);
        let incoming = take(&given, 1399, &disk).unwrap();
        let order = incoming.finish().unwrap().unwrap().order.unwrap();
        let mut restored = History::restore(64 << 20, order.history, order.header.cost_bytes);
        let mut place = restored.start();
        for number in 0..1000 {
            let found = restored.read(&mut place, &disk);
            assert_eq!(found, history::Found::Input(entry(number)));
        }
        assert_eq!(restored.read(&mut place, &disk), history::Found::End);
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let disk = Disk::new(64 << 20);
        let (headers, pieces) = inputs(&[1000]);
        let given = encode(&records(), (headers, pieces), None);
        let whole = Bytes::from(bytes(&given));
        for end in 0..whole.len() {
            let short = [Piece::Memory(whole.slice(..end))];
            let taken = take(&short, 64, &disk).and_then(Incoming::finish);
            assert!(matches!(taken, Err(CheckpointError::Length)), "{end} bytes");
        }
        let mut long = given.clone();
        long.push(Piece::Memory(Bytes::from_static(b"more")));
        assert!(matches!(
            take(&long, 64, &disk),
            Err(CheckpointError::Length)
        ));
        // Said once; what comes after is not looked at.
        let mut incoming = Incoming::default();
        let disk = (&*disk, MEMORY);
        let huge = Bytes::from_static(&[255; 64]);
        assert!(incoming.push(huge.clone(), 128, disk).is_err());
        assert!(incoming.push(huge, 128, disk).is_ok());
        assert!(incoming.finish().unwrap().is_none());
    }
}
