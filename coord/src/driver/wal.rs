//! The log on disk: segments of frames, each frame one `fdatasync`.
//!
//! ```text
//! frame:  log id u64 | number u64 | length u32 | previous crc u32 | crc u32 | 0 u32 | payload | pad to 8
//! ```
//!
//! Numbers count upwards through all segments and each frame holds the checksum of the one before,
//! so that a frame that is missing, repeated or from elsewhere is noticed. A frame is written only
//! when the one before is durable. Therefore a broken frame with a sound one after it was durable
//! once and has been damaged: the log is refused. A broken frame with nothing sound after it was
//! being written when the machine stopped, has been acknowledged to nobody, and is cut off; unless
//! the [mark](Mark) says that it was durable. The log id is random, so that a client cannot forge a
//! frame inside its data.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::disk::DiskError;
use super::storage::{Storage, StorageFile, write_atomically};
use crate::quorum::{HardState, LogEntry};

const HEAD: usize = 32;
const VERSION: u16 = 1;

/// Bytes after which a new segment is begun, but in tests; one frame may go beyond.
pub(super) const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// Bytes of a segment that are filled with zeros together, before the log gets there: overwriting what
/// has been written changes no metadata of the file, and takes half the time of a first write.
const FILL_BYTES: usize = 256 * 1024;

/// Payload of one frame at most: a group of writes is cut at this, and one write may exceed it by
/// one message of entries.
pub(super) const FRAME_BYTES_MAX: usize = 256 * 1024 * 1024;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Record {
    /// The first of each segment: the format, and what earlier segments said last.
    Head { version: u16, hard_state: HardState },
    /// The hard state from here on.
    Hard(HardState),
    /// An entry; it replaces what stood at its index and after.
    Entry(LogEntry),
    /// Everything before was replaced by the snapshot of this index.
    Reset { index: u64 },
}

/// What the segments say.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) hard_state: HardState,
    pub(super) entries: Vec<LogEntry>,
    /// Index of the last snapshot that replaced the log.
    pub(super) reset: u64,
}

impl Replay {
    fn take(&mut self, record: Record) -> Result<(), &'static str> {
        match record {
            Record::Head {
                version: VERSION,
                hard_state,
            }
            | Record::Hard(hard_state) => {
                self.hard_state = hard_state;
            }
            Record::Head { .. } => return Err("it was written by another version"),
            Record::Reset { index } => {
                self.entries.clear();
                self.reset = index;
            }
            Record::Entry(entry) => {
                if let Some(first) = self.entries.first().map(|entry| entry.index) {
                    let next = first + self.entries.len() as u64;
                    if entry.index > next {
                        return Err("entries are missing");
                    }
                    let keep = usize::try_from(entry.index.saturating_sub(first));
                    self.entries.truncate(keep.expect("not beyond its end"));
                }
                self.entries.push(entry);
            }
        }
        Ok(())
    }
}

struct Segment {
    name: String,
    number: u64,
    /// The highest index of an entry in it.
    max_index: u64,
}

/// How far the log was known to be durable: the number of its frames, and the checksum of the last.
///
/// A frame that was being written when the machine stopped looks like the last frame damaged later.
/// The mark tells them apart: it is written, to a file of its own, when a frame has become durable,
/// and a log that ends before its mark has lost what may have been acknowledged (the persist records
/// of Alagappan et al., FAST'18). It is not synced while the log is in use, so that it costs no time,
/// and may lag behind by what the system has not written back yet; it never runs ahead.
///
/// The first sector of the file is written with the file, when the log is opened; the second again and
/// again, and if that is torn, the first stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    frames: u64,
    crc: u32,
}

impl Mark {
    const NAME: &'static str = "mark";
    const MAGIC: [u8; 8] = *b"UBCMARK\x01";
    const SECTOR: usize = 512;
    const BYTES: usize = 32;

    fn encode(self, log_id: u64) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&Self::MAGIC);
        bytes[8..16].copy_from_slice(&log_id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.frames.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.crc.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], log_id: u64) -> Option<Self> {
        let bytes = bytes.get(..Self::BYTES)?;
        let frames = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
        let crc = u32::from_le_bytes(bytes[24..28].try_into().expect("four bytes"));
        let mark = Self { frames, crc };
        (mark.encode(log_id) == bytes).then_some(mark)
    }

    /// The newest that can be read.
    fn read(storage: &dyn Storage, log_id: u64) -> Result<Self, DiskError> {
        let bytes = storage.read(Self::NAME)?;
        let second = bytes.get(Self::SECTOR..).unwrap_or_default();
        let newest = Self::decode(&bytes, log_id).max(Self::decode(second, log_id));
        newest.ok_or_else(|| DiskError::Damaged {
            path: storage.path(Self::NAME),
            offset: 0,
            what: "it does not say how far the log was durable",
        })
    }

    /// Begins the file anew.
    fn create(self, storage: &dyn Storage, log_id: u64) -> io::Result<Box<dyn StorageFile>> {
        let mut sectors = [0; 2 * Self::SECTOR];
        sectors[..Self::BYTES].copy_from_slice(&self.encode(log_id));
        write_atomically(storage, Self::NAME, &[&sectors])?;
        storage.open(Self::NAME)
    }
}

/// The log, open for appending.
pub(crate) struct Wal {
    storage: Arc<dyn Storage>,
    log_id: u64,
    segment_bytes: u64,
    segments: Vec<Segment>,
    file: Box<dyn StorageFile>,
    mark: Box<dyn StorageFile>,
    offset: u64,
    /// Everything in the segment before this has been written once.
    filled: u64,
    next_frame: u64,
    chain: u32,
    hard_state: HardState,
    buffer: Vec<u8>,
}

#[cfg(any(test, feature = "faults"))]
impl Wal {
    /// Whether the mark on this disk, as it stands, knows of the newest frame. It is written after
    /// each frame and synced at the end alone, so a power failure may leave it behind.
    pub(crate) fn is_marked(
        storage: &Arc<dyn Storage>,
        log_id: u64,
        segment_bytes: u64,
    ) -> Result<bool, DiskError> {
        let mark = Mark::read(&**storage, log_id)?;
        let (wal, _) = Self::open(storage, log_id, segment_bytes)?;
        // To open it was to write the head of a new segment.
        Ok(mark.frames + 1 >= wal.next_frame)
    }
}

impl Wal {
    /// Reads all segments, cuts off a torn tail, and begins a new segment. One is full when it has
    /// `segment_bytes`.
    pub(super) fn open(
        storage: &Arc<dyn Storage>,
        log_id: u64,
        segment_bytes: u64,
    ) -> Result<(Self, Replay), DiskError> {
        // What a run before saw in the directory need not be durable, if it was killed.
        storage.sync_names()?;
        let names = storage.list()?;
        let mut segments: Vec<Segment> = names.iter().filter_map(|name| segment(name)).collect();
        segments.sort_by_key(|segment| segment.number);
        let mark = if names.iter().any(|name| name == Mark::NAME) {
            Mark::read(&**storage, log_id)?
        } else if let Some(first) = segments.first() {
            return Err(DiskError::Damaged {
                path: storage.path(&first.name),
                offset: 0,
                what: "there is a log, and no mark that says how far it was durable",
            });
        } else {
            Mark { frames: 0, crc: 0 }
        };
        let mut reader = Reader {
            storage: &**storage,
            log_id,
            mark,
            chain: None,
            replay: Replay::default(),
        };
        let count = segments.len();
        for (place, segment) in segments.iter_mut().enumerate() {
            reader.segment(segment, place + 1 == count)?;
        }
        let Reader { chain, replay, .. } = reader;
        let (next_frame, chain) = chain.unwrap_or((0, 0));
        let unchecked = planted!(MarkUnchecked, DamageCutOff);
        if mark.frames > next_frame && !unchecked {
            let last = segments.last().map_or(Mark::NAME, |s| s.name.as_str());
            return Err(DiskError::Damaged {
                path: storage.path(last),
                offset: 0,
                what: "the log ends before what was durable",
            });
        }
        let mark = Mark {
            frames: next_frame,
            crc: chain,
        };
        let mark = mark.create(&**storage, log_id)?;
        let number = segments.last().map_or(0, |segment| segment.number + 1);
        let (segment, file) = create_segment(&**storage, number, segment_bytes)?;
        segments.push(segment);
        let mut wal = Self {
            storage: storage.clone(),
            log_id,
            segment_bytes,
            segments,
            file,
            mark,
            offset: 0,
            filled: 0,
            next_frame,
            chain,
            hard_state: replay.hard_state,
            buffer: Vec::new(),
        };
        wal.write_head()?;
        Ok((wal, replay))
    }

    fn write_head(&mut self) -> io::Result<()> {
        self.put(&[Record::Head {
            version: VERSION,
            hard_state: self.hard_state,
        }])
    }

    /// Writes the records as one frame and makes them durable.
    pub(super) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        self.put(records)?;
        for record in records {
            match record {
                Record::Hard(hard_state) => self.hard_state = *hard_state,
                Record::Entry(entry) => {
                    let segment = self.segments.last_mut().expect("one is open");
                    segment.max_index = segment.max_index.max(entry.index);
                }
                Record::Head { .. } | Record::Reset { .. } => {}
            }
        }
        if self.offset >= self.segment_bytes {
            let number = self.segments.last().map_or(0, |segment| segment.number + 1);
            let (segment, file) = create_segment(&*self.storage, number, self.segment_bytes)?;
            self.segments.push(segment);
            self.file = file;
            self.offset = 0;
            self.filled = 0;
            self.write_head()?;
        }
        Ok(())
    }

    fn put(&mut self, records: &[Record]) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.resize(HEAD, 0);
        let buffer = std::mem::take(&mut self.buffer);
        self.buffer = postcard::to_extend(records, buffer).map_err(io::Error::other)?;
        let payload = self.buffer.len() - HEAD;
        if payload > FRAME_BYTES_MAX {
            return Err(io::Error::other("a log frame above the limit"));
        }
        let length = u32::try_from(payload).expect("below the limit");
        self.buffer[..8].copy_from_slice(&self.log_id.to_le_bytes());
        self.buffer[8..16].copy_from_slice(&self.next_frame.to_le_bytes());
        self.buffer[16..20].copy_from_slice(&length.to_le_bytes());
        self.buffer[20..24].copy_from_slice(&self.chain.to_le_bytes());
        let crc = checksum(&self.buffer);
        self.buffer[24..28].copy_from_slice(&crc.to_le_bytes());
        self.buffer.resize(self.buffer.len().next_multiple_of(8), 0);
        let length = self.buffer.len();
        let end = self.offset + length as u64;
        if end > self.filled {
            // Zeros are what stands behind the log in any case.
            let segment = usize::try_from(self.segment_bytes).unwrap_or(FILL_BYTES);
            let fill = FILL_BYTES.min(segment);
            self.buffer.resize(length.next_multiple_of(fill), 0);
            self.filled = self.offset + self.buffer.len() as u64;
        }
        self.file.write_all_at(&self.buffer, self.offset)?;
        let synced = self.file.sync_data();
        if !planted!(SyncErrorIgnored) {
            synced?;
        }
        self.offset = end;
        self.next_frame += 1;
        self.chain = crc;
        Ok(())
    }

    /// Deletes the segments that hold nothing after `index`, which a durable snapshot contains.
    pub(crate) fn trim(&mut self, index: u64) -> io::Result<()> {
        let last = self.segments.len() - 1;
        let count = self.segments[..last]
            .iter()
            .take_while(|s| s.max_index <= index)
            .count();
        for segment in self.segments.drain(..count) {
            self.storage.remove(&segment.name)?;
        }
        Ok(())
    }

    /// Notes that everything appended so far is durable. Costs no sync.
    pub(crate) fn write_mark(&mut self) -> io::Result<()> {
        let mark = Mark {
            frames: self.next_frame,
            crc: self.chain,
        };
        self.mark
            .write_all_at(&mark.encode(self.log_id), Mark::SECTOR as u64)
    }

    /// [`Wal::write_mark`], for good.
    pub(super) fn sync_mark(&mut self) -> io::Result<()> {
        self.write_mark()?;
        self.mark.sync_all()
    }
}

fn checksum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..24]), &frame[HEAD..])
}

/// The segment that this file is, if it is one.
fn segment(name: &str) -> Option<Segment> {
    let hex = name.strip_prefix("wal-")?.strip_suffix(".log")?;
    Some(Segment {
        name: name.to_owned(),
        number: u64::from_str_radix(hex, 16).ok()?,
        max_index: 0,
    })
}

fn create_segment(
    storage: &dyn Storage,
    number: u64,
    bytes: u64,
) -> io::Result<(Segment, Box<dyn StorageFile>)> {
    let name = format!("wal-{number:016x}.log");
    let mut file = storage.create(&name)?;
    // So that an append changes no metadata. A file system that cannot is only slower, and one that
    // is full may still have room for a little.
    let _ = file.allocate(bytes);
    file.sync_all()?;
    storage.sync_names()?;
    let segment = segment(&name).expect("a segment's name");
    Ok((segment, file))
}

struct Reader<'a> {
    storage: &'a dyn Storage,
    log_id: u64,
    mark: Mark,
    /// Number of the next frame, and checksum of the one before it.
    chain: Option<(u64, u32)>,
    replay: Replay,
}

impl Reader<'_> {
    fn segment(&mut self, segment: &mut Segment, last: bool) -> Result<(), DiskError> {
        let bytes = self.storage.read(&segment.name)?;
        let path = self.storage.path(&segment.name);
        let damaged = |offset: usize, what: &'static str| DiskError::Damaged {
            path: path.clone(),
            offset: offset as u64,
            what,
        };
        let (mut offset, mut newest) = (0, 0..0);
        while let Some((frame, end)) = frame_at(&bytes, offset, self.log_id) {
            let number = u64::from_le_bytes(frame[8..16].try_into().expect("eight bytes"));
            let previous = u32::from_le_bytes(frame[20..24].try_into().expect("four bytes"));
            let crc = u32::from_le_bytes(frame[24..28].try_into().expect("four bytes"));
            // The oldest segment may follow on ones that were deleted.
            let follows = self.chain.is_none_or(|next| next == (number, previous));
            let marked = number + 1 != self.mark.frames || crc == self.mark.crc;
            if !follows || !marked {
                return Err(damaged(
                    offset,
                    "a frame does not follow on the one before it",
                ));
            }
            self.chain = Some((number + 1, crc));
            let records: Vec<Record> = postcard::from_bytes(&frame[HEAD..])
                .map_err(|_| damaged(offset, "a frame holds no records"))?;
            for record in records {
                if let Record::Entry(entry) = &record {
                    segment.max_index = segment.max_index.max(entry.index);
                }
                self.replay
                    .take(record)
                    .map_err(|what| damaged(offset, what))?;
            }
            newest = offset..end.min(bytes.len());
            offset = end;
        }
        let rest = bytes.get(offset..).unwrap_or_default();
        if rest.iter().any(|byte| *byte != 0) {
            if !last {
                return Err(damaged(offset, "a frame is broken and segments follow"));
            }
            let mut after = (offset + 8..bytes.len()).step_by(8);
            let follows = after.any(|later| frame_at(&bytes, later, self.log_id).is_some());
            if follows && !planted!(DamageCutOff) {
                return Err(damaged(offset, "a frame is broken and sound ones follow"));
            }
            let next = self.chain.map_or(0, |(number, _)| number);
            let unchecked = planted!(MarkUnchecked, DamageCutOff);
            if self.mark.frames > next && !unchecked {
                return Err(damaged(offset, "a frame is broken that was durable"));
            }
            tracing::warn!(path = %path.display(), offset, "cut off an unfinished write");
        }
        if last || !rest.is_empty() {
            // The newest frame may have been read from the system's memory and not be on the disk:
            // whoever wrote it was killed before its sync, or the sync failed, after which Linux
            // takes the page for written. So it is written once more. And nothing more comes here:
            // what was set aside is given back.
            let mut file = self.storage.open(&segment.name)?;
            if !planted!(TailNotRewritten) {
                file.write_all_at(&bytes[newest.clone()], newest.start as u64)?;
            }
            file.set_len(offset.min(bytes.len()) as u64)?;
            file.sync_all()?;
        }
        Ok(())
    }
}

/// The sound frame at `offset`, if there is one, and where the next would be.
fn frame_at(bytes: &[u8], offset: usize, log_id: u64) -> Option<(&[u8], usize)> {
    let rest = bytes.get(offset..)?;
    let head = rest.get(..HEAD)?;
    if head[..8] != log_id.to_le_bytes() {
        return None;
    }
    let length = u32::from_le_bytes(head[16..20].try_into().expect("four bytes")) as usize;
    if length > FRAME_BYTES_MAX {
        return None;
    }
    let frame = rest.get(..HEAD + length)?;
    if frame[24..28] != checksum(frame).to_le_bytes() {
        return None;
    }
    Some((frame, offset + (HEAD + length).next_multiple_of(8)))
}
