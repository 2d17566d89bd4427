//! Every input of a VIP in one order, kept so that a fresh server can be brought to the same state
//! (`ordering = "total"`).
//!
//! Inputs are written one behind the other into chunks when they arrive, so that a checkpoint is a
//! list of chunks to be shared and never a walk over a million entries. The older ones are in files
//! when there are too many for memory.
//!
//! ```text
//! u64 event number | u64 connection | u8 kind | u32 port or length | bytes
//! ```

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use unbroken_tcpstate::{ConnId, EventNo};

use super::spill::{FRAME_BYTES, For, Loading, Piece, Spill};

/// A chunk is closed once it holds so much.
const CHUNK_BYTES: usize = FRAME_BYTES;
/// So many chunks are read from files before they are needed.
const LOADED_MAX: usize = 4;
/// An event is below that.
const INPUT_BYTES_MAX: usize = 1 << 16;
/// What stands in front of an input's bytes.
const HEAD_BYTES: usize = 21;
/// What an input costs its reader beside its bytes: each waits until the server has taken the one
/// before.
pub(crate) const INPUT_COST_BYTES: u64 = 4096;

const OPEN: u8 = 0;
const DATA: u8 = 1;
const FIN: u8 = 2;
const END: u8 = 3;
const ABORT: u8 = 4;

/// What the servers are given, in this order on every replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) number: EventNo,
    pub(crate) conn: ConnId,
    pub(crate) what: What,
}

/// One input of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// A connection to this port of the VIP.
    Open {
        port: u16,
    },
    Data(Bytes),
    /// The client closed its side.
    Fin,
    /// The connection is over; `abort`: it was broken off.
    End {
        abort: bool,
    },
}

impl Entry {
    /// How much this one puts a server behind.
    pub(crate) fn cost_bytes(&self) -> u64 {
        self.bytes() as u64 + INPUT_COST_BYTES
    }

    /// Bytes of the client's in it.
    pub(crate) fn bytes(&self) -> usize {
        match &self.what {
            What::Data(bytes) => bytes.len(),
            What::Open { .. } | What::Fin | What::End { .. } => 0,
        }
    }
}

/// A place between two inputs: bytes before it, since this history began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Place(u64);

/// What is found at a place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Input(Entry),
    /// It is being read; who waits for it is woken.
    Loading,
    /// Nothing: the end.
    End,
    /// What cannot be read.
    Damaged,
}

/// All inputs since the server's first state or since a checkpoint, as long as they fit.
///
/// Invariant: chunks are contiguous from `base`; the tail follows them.
#[derive(Debug)]
pub(crate) struct History {
    /// Each with its first byte's place.
    chunks: VecDeque<(u64, Piece)>,
    tail: BytesMut,
    base: u64,
    end: u64,
    memory_bytes_max: u64,
    /// Of chunks and tail.
    memory_bytes: u64,
    /// Chunks that are being read, by their places.
    loading: VecDeque<(u64, Loading)>,
    /// What all of it costs a server that begins at its start.
    cost_bytes: u64,
    recording: bool,
    complete: bool,
}

impl History {
    pub(crate) fn new(memory_bytes_max: u64) -> Self {
        Self {
            chunks: VecDeque::new(),
            tail: BytesMut::new(),
            base: 0,
            end: 0,
            memory_bytes_max,
            memory_bytes: 0,
            loading: VecDeque::new(),
            cost_bytes: 0,
            recording: true,
            complete: true,
        }
    }

    /// What another replica has kept, in pieces that end where inputs do.
    pub(crate) fn restore(memory_bytes_max: u64, pieces: Vec<Piece>, cost_bytes: u64) -> Self {
        let mut restored = Self {
            cost_bytes,
            ..Self::new(memory_bytes_max)
        };
        for piece in pieces {
            let start = restored.end;
            restored.end += piece.len() as u64;
            if let Piece::Memory(bytes) = &piece {
                restored.memory_bytes += bytes.len() as u64;
            }
            restored.chunks.push_back((start, piece));
        }
        restored
    }

    /// Writes an input behind the others. Past the bound all of it is given up: a part of it brings
    /// no server anywhere.
    pub(crate) fn append(&mut self, entry: &Entry, spill: &Spill) {
        self.cost_bytes += entry.cost_bytes();
        if !self.recording {
            return;
        }
        let (kind, argument, bytes) = match &entry.what {
            What::Open { port } => (OPEN, u32::from(*port), None),
            What::Data(bytes) => {
                let length = u32::try_from(bytes.len()).expect("an event is below 64 KiB");
                (DATA, length, Some(bytes))
            }
            What::Fin => (FIN, 0, None),
            What::End { abort: false } => (END, 0, None),
            What::End { abort: true } => (ABORT, 0, None),
        };
        let before = self.tail.len();
        self.tail.put_u64_le(entry.number.0);
        self.tail.put_u64_le(entry.conn.0);
        self.tail.put_u8(kind);
        self.tail.put_u32_le(argument);
        if let Some(bytes) = bytes {
            self.tail.put_slice(bytes);
        }
        let added = (self.tail.len() - before) as u64;
        self.end += added;
        self.memory_bytes += added;
        if self.tail.len() >= CHUNK_BYTES {
            self.seal();
        }
        while self.memory_bytes > self.memory_bytes_max {
            if !self.spill(spill) {
                self.give_up();
                break;
            }
        }
    }

    /// Hands the oldest chunk that is in memory to the disk. False: there is none, or the disk does not
    /// take it.
    fn spill(&mut self, spill: &Spill) -> bool {
        // Those in files come first, but for what a checkpoint has cut.
        let in_memory = |(_, piece): &(u64, Piece)| matches!(piece, Piece::Memory(_));
        let Some(index) = self.chunks.iter().position(in_memory) else {
            return false;
        };
        let Piece::Memory(bytes) = &self.chunks[index].1 else {
            return false;
        };
        let Some(stored) = spill.store(bytes.clone()) else {
            return false;
        };
        self.memory_bytes -= bytes.len() as u64;
        self.chunks[index].1 = Piece::Stored(stored);
        true
    }

    /// Keeps nothing any more.
    pub(crate) fn give_up(&mut self) {
        (self.recording, self.complete) = (false, false);
        self.chunks = VecDeque::new();
        self.loading = VecDeque::new();
        self.tail = BytesMut::new();
        (self.base, self.memory_bytes) = (self.end, 0);
    }

    /// Whether a part of it could not be written.
    pub(crate) fn spill_failed(&self) -> bool {
        let mut chunks = self.chunks.iter();
        chunks.any(|(_, piece)| matches!(piece, Piece::Stored(stored) if stored.failed()))
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            let start = self.end - self.tail.len() as u64;
            let chunk = Piece::Memory(self.tail.split().freeze());
            self.chunks.push_back((start, chunk));
        }
    }

    /// Whether a server can be brought up from here.
    pub(crate) fn complete(&self) -> bool {
        self.complete
    }

    /// Bytes kept.
    pub(crate) fn bytes(&self) -> u64 {
        self.end - self.base
    }

    /// Bytes of it in memory.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    pub(crate) fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    /// Everything, to be shared.
    pub(crate) fn chunks(&mut self) -> Vec<Piece> {
        self.seal();
        self.chunks.iter().map(|(_, chunk)| chunk.clone()).collect()
    }

    /// How much of it lies before a place, in bytes.
    pub(crate) fn bytes_before(&self, place: Place) -> u64 {
        place.0.saturating_sub(self.base)
    }

    /// Its beginning.
    pub(crate) fn start(&self) -> Place {
        Place(self.base)
    }

    /// Behind everything that was written.
    pub(crate) fn end(&self) -> Place {
        Place(self.end)
    }

    /// Keeps what comes from now on, though what came before is lost: a checkpoint is being taken.
    pub(crate) fn record(&mut self) {
        self.recording = true;
    }

    /// Makes a place one where [`Self::cut`] may cut. False: not now, it lies in what is in files.
    pub(crate) fn mark(&mut self, place: Place) -> bool {
        self.seal();
        let index = self.chunks.partition_point(|(start, _)| *start < place.0);
        let Some((start, piece)) = index.checked_sub(1).and_then(|i| self.chunks.get_mut(i)) else {
            return true;
        };
        let Ok(at) = usize::try_from(place.0 - *start) else {
            return false;
        };
        if at >= piece.len() {
            return true;
        }
        let Piece::Memory(bytes) = piece else {
            return false;
        };
        // Copied, so that neither part keeps the other.
        let rest = Bytes::copy_from_slice(&bytes[at..]);
        *bytes = Bytes::copy_from_slice(&bytes[..at]);
        self.chunks.insert(index, (place.0, Piece::Memory(rest)));
        true
    }

    /// A checkpoint holds everything before `place`, which cost `cost_bytes`: it need not be kept. The
    /// place was marked.
    pub(crate) fn cut(&mut self, place: Place, cost_bytes: u64) {
        self.seal();
        let Place(place) = place;
        assert!(
            self.base <= place && place <= self.end,
            "a checkpoint is of what is kept"
        );
        while let Some((start, piece)) = self.chunks.front()
            && *start < place
        {
            assert!(start + piece.len() as u64 <= place, "marked before");
            if let Piece::Memory(bytes) = piece {
                self.memory_bytes -= bytes.len() as u64;
            }
            self.chunks.pop_front();
        }
        self.base = place;
        self.cost_bytes -= cost_bytes;
        self.complete = self.recording;
    }

    /// What is at a place, which then lies behind it.
    pub(crate) fn read(&mut self, place: &mut Place, spill: &Spill) -> Found {
        let sealed = self.end - self.tail.len() as u64;
        if place.0 >= sealed {
            self.seal();
        }
        let index = self.chunks.partition_point(|(start, _)| *start <= place.0);
        let Some(index) = index.checked_sub(1).filter(|_| place.0 < self.end) else {
            return Found::End;
        };
        let (start, piece) = &self.chunks[index];
        let (start, in_memory) = (*start, piece.now());
        let chunk = match in_memory.map_or_else(|| self.load(index, spill), Ok) {
            Ok(chunk) => chunk,
            Err(found) => return found,
        };
        let entry = usize::try_from(place.0 - start)
            .ok()
            .and_then(|at| parse(&chunk, at));
        let Some((entry, to)) = entry else {
            return Found::Damaged;
        };
        place.0 = start + to as u64;
        Found::Input(entry)
    }

    /// A chunk that is in a file, and those after it: they will be needed soon.
    fn load(&mut self, index: usize, spill: &Spill) -> Result<Bytes, Found> {
        let (first, last) = (index, (index + LOADED_MAX).min(self.chunks.len()));
        let needed = self.chunks[first].0..self.chunks.get(last).map_or(u64::MAX, |(at, _)| *at);
        self.loading.retain(|(at, _)| needed.contains(at));
        for (at, piece) in self.chunks.range(first..last) {
            if let Piece::Stored(stored) = piece
                && self.loading.iter().all(|(known, _)| known != at)
                && let Some(loading) = spill.load(stored, For::All)
            {
                self.loading.push_back((*at, loading));
            }
        }
        let mut loading = self.loading.iter();
        let (_, loading) = loading
            .find(|(at, _)| *at == needed.start)
            .ok_or(Found::Loading)?;
        match loading.get() {
            None => Err(Found::Loading),
            Some(Ok(bytes)) => Ok(bytes.clone()),
            Some(Err(_)) => Err(Found::Damaged),
        }
    }
}

/// The input that begins at `at` in a chunk, and where the next one begins.
fn parse(chunk: &Bytes, at: usize) -> Option<(Entry, usize)> {
    let mut head = chunk.get(at..at + HEAD_BYTES)?;
    let number = EventNo(head.get_u64_le());
    let conn = ConnId(head.get_u64_le());
    let kind = head.get_u8();
    let argument = head.get_u32_le();
    let from = at + HEAD_BYTES;
    let mut to = from;
    let what = match kind {
        OPEN => What::Open {
            port: u16::try_from(argument).ok()?,
        },
        DATA => {
            to = from + usize::try_from(argument).ok()?;
            if to > chunk.len() {
                return None;
            }
            What::Data(chunk.slice(from..to))
        }
        FIN => What::Fin,
        END | ABORT => What::End {
            abort: kind == ABORT,
        },
        _ => return None,
    };
    Some((Entry { number, conn, what }, to))
}

/// Where the last input ends that is there as a whole. `None`: what is there is none.
pub(crate) fn whole_inputs(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(mut head) = bytes.get(at..at + HEAD_BYTES) {
        head.advance(16);
        let (kind, argument) = (head.get_u8(), head.get_u32_le());
        let length = match kind {
            DATA => usize::try_from(argument).ok()?,
            OPEN | FIN | END | ABORT => 0,
            _ => return None,
        };
        let end = at + HEAD_BYTES + length;
        if length > INPUT_BYTES_MAX {
            return None;
        }
        if end > bytes.len() {
            break;
        }
        at = end;
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::spill::tests::Disk;

    fn entries() -> Vec<Entry> {
        let entry = |number, what| Entry {
            number: EventNo(number),
            conn: ConnId(3),
            what,
        };
        vec![
            entry(3, What::Open { port: 6379 }),
            entry(5, What::Data(Bytes::from(vec![7; CHUNK_BYTES]))),
            entry(6, What::Data(Bytes::from_static(b"x"))),
            entry(8, What::Fin),
            entry(9, What::End { abort: false }),
            entry(12, What::End { abort: true }),
        ]
    }

    /// Reads on, waiting for the disk.
    fn next(history: &mut History, place: &mut Place, disk: &Disk) -> Option<Entry> {
        loop {
            match history.read(place, disk) {
                Found::Input(entry) => return Some(entry),
                Found::Loading => disk.wait_loaded(),
                Found::End | Found::Damaged => return None,
            }
        }
    }

    fn all(history: &mut History, disk: &Disk) -> Vec<Entry> {
        let mut place = history.start();
        std::iter::from_fn(|| next(history, &mut place, disk)).collect()
    }

    fn none() -> Disk {
        Disk::new(0)
    }

    #[test]
    fn gives_back_what_was_written_and_what_follows() {
        let disk = none();
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e, &disk));
        assert_eq!(all(&mut history, &disk), entries());
        // A reader at the end goes on when more is written.
        let mut place = history.start();
        while next(&mut history, &mut place, &disk).is_some() {}
        history.append(&entries()[2], &disk);
        assert_eq!(
            next(&mut history, &mut place, &disk),
            Some(entries()[2].clone())
        );
        assert_eq!(next(&mut history, &mut place, &disk), None);
    }

    #[test]
    fn another_replica_reads_the_same() {
        let disk = none();
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e, &disk));
        let cost = history.cost_bytes();
        let whole: Vec<u8> = history
            .chunks()
            .iter()
            .flat_map(|c| c.read().unwrap())
            .collect();
        let restore = |bytes: &[u8]| {
            let piece = Piece::Memory(Bytes::copy_from_slice(bytes));
            History::restore(1 << 20, vec![piece], cost)
        };
        let mut other = restore(&whole);
        assert_eq!(all(&mut other, &disk), entries());
        // What is damaged ends the reading.
        for end in 0..whole.len().min(100) {
            let mut short = restore(&whole[..end]);
            assert!(all(&mut short, &disk).len() <= 1);
        }
    }

    #[test]
    fn a_checkpoint_takes_the_place_of_what_came_before() {
        let disk = none();
        let mut history = History::new(1 << 20);
        entries().iter().for_each(|e| history.append(e, &disk));
        let (mut place, mut cost) = (history.start(), 0);
        for kept in 0..entries().len() {
            let mut cut = History::new(1 << 20);
            entries().iter().for_each(|e| cut.append(e, &disk));
            assert!(cut.mark(place));
            cut.cut(place, cost);
            let in_memory = cut.memory_bytes();
            assert_eq!(in_memory, cut.bytes());
            assert_eq!(all(&mut cut, &disk), entries()[kept..]);
            let left: u64 = entries()[kept..].iter().map(Entry::cost_bytes).sum();
            assert_eq!(cut.cost_bytes(), left);
            cut.append(&entries()[2], &disk);
            assert_eq!(all(&mut cut, &disk).len(), entries().len() - kept + 1);
            cost += next(&mut history, &mut place, &disk).unwrap().cost_bytes();
        }
        assert_eq!(place, history.end());
    }

    #[test]
    fn what_was_given_up_begins_again_with_a_checkpoint() {
        let disk = none();
        let mut history = History::new(1000);
        entries().iter().for_each(|e| history.append(e, &disk));
        let cost = history.cost_bytes();
        let place = history.end();
        assert!(history.mark(place));
        history.record();
        history.append(&entries()[3], &disk);
        assert!(!history.complete());
        history.cut(place, cost);
        assert!(history.complete());
        assert_eq!(all(&mut history, &disk), [entries()[3].clone()]);
    }

    #[test]
    fn past_its_bound_it_is_nothing() {
        let disk = none();
        let mut history = History::new(1000);
        entries().iter().for_each(|e| history.append(e, &disk));
        assert!(!history.complete());
        assert_eq!((history.bytes(), all(&mut history, &disk)), (0, Vec::new()));
        let total = entries().iter().map(Entry::cost_bytes).sum::<u64>();
        assert_eq!(history.cost_bytes(), total);
    }

    #[test]
    fn what_memory_does_not_hold_is_read_from_the_disk() {
        const ENTRIES: u64 = 4000;
        const MEMORY: u64 = 1 << 20;
        let disk = Disk::new(64 << 20);
        let mut history = History::new(MEMORY);
        let data = |number: u64| Entry {
            number: EventNo(number),
            conn: ConnId(number % 7),
            what: What::Data(Bytes::from(vec![number.to_le_bytes()[0]; 1500])),
        };
        for number in 0..ENTRIES {
            history.append(&data(number), &disk);
            assert!(history.memory_bytes() <= MEMORY);
        }
        assert!(history.complete() && history.bytes() > 5 * MEMORY);
        let used = disk.used_bytes();
        assert_eq!(used + history.memory_bytes(), history.bytes());
        disk.wait_written();
        let mut place = history.start();
        for number in 0..ENTRIES {
            assert_eq!(next(&mut history, &mut place, &disk), Some(data(number)));
        }
        assert_eq!(next(&mut history, &mut place, &disk), None);
        // Another replica takes the same, though its pieces end elsewhere.
        let whole: Vec<u8> = history
            .chunks()
            .iter()
            .flat_map(|c| c.read().unwrap())
            .collect();
        assert_eq!(whole_inputs(&whole), Some(whole.len()));
        assert!(whole_inputs(&whole[..2000]).is_some_and(|n| n == HEAD_BYTES + 1500));
        assert_eq!(whole_inputs(&[9; 30]), None);
        // A place in what is in files cannot be cut at; one behind it can, and the files go.
        assert!(!history.mark(Place(3 * (HEAD_BYTES as u64 + 1500))));
        assert!(history.mark(history.end()));
        let cost = history.cost_bytes();
        history.cut(history.end(), cost);
        assert_eq!((history.bytes(), history.memory_bytes()), (0, 0));
        assert_eq!(disk.used_bytes(), 0);
        disk.wait_empty();
    }

    #[test]
    fn past_the_disks_bound_it_is_nothing_too() {
        let disk = Disk::new(1 << 20);
        let mut history = History::new(1 << 20);
        while history.complete() {
            assert!(history.bytes() < 3 << 20);
            history.append(&entries()[1], &disk);
        }
        assert!(history.bytes() == 0 && disk.used_bytes() == 0);
    }

    #[test]
    fn a_damaged_file_is_not_taken_for_input() {
        let disk = Disk::new(64 << 20);
        let mut history = History::new(1);
        for _ in 0..4 {
            history.append(&entries()[1], &disk);
        }
        disk.wait_written();
        disk.damage();
        assert_eq!(all(&mut history, &disk), []);
        let mut place = history.start();
        assert_eq!(history.read(&mut place, &disk), Found::Damaged);
        assert!(history.spill_failed() && disk.take_failed());
        assert!(disk.alarm().unwrap().contains("checksum"));
    }
}
