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
//! being written when the machine stopped, has been acknowledged to nobody, and is cut off. The log
//! id is random, so that a client cannot forge a frame inside its data.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::{DiskError, sync_dir};
use crate::quorum::{HardState, LogEntry};

const HEAD: usize = 32;
const VERSION: u16 = 1;

/// Bytes after which a new segment is begun; one frame may go beyond.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

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
    path: PathBuf,
    number: u64,
    /// The highest index of an entry in it.
    max_index: u64,
}

/// The log, open for appending.
pub(super) struct Wal {
    dir: PathBuf,
    log_id: u64,
    segments: Vec<Segment>,
    file: File,
    offset: u64,
    next_frame: u64,
    chain: u32,
    hard_state: HardState,
    buffer: Vec<u8>,
}

impl Wal {
    /// Reads all segments in `dir`, cuts off a torn tail, and begins a new segment.
    pub(super) fn open(dir: &Path, log_id: u64) -> Result<(Self, Replay), DiskError> {
        let mut segments = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let number = name
                .strip_prefix("wal-")
                .and_then(|name| name.strip_suffix(".log"));
            if let Some(Ok(number)) = number.map(|hex| u64::from_str_radix(hex, 16)) {
                segments.push(Segment {
                    path,
                    number,
                    max_index: 0,
                });
            }
        }
        segments.sort_by_key(|segment| segment.number);
        let mut replay = Replay::default();
        let mut chain: Option<(u64, u32)> = None;
        let count = segments.len();
        for (place, segment) in segments.iter_mut().enumerate() {
            read_segment(segment, log_id, place + 1 == count, &mut chain, &mut replay)?;
        }
        let (next_frame, chain) = chain.unwrap_or((0, 0));
        let number = segments.last().map_or(0, |segment| segment.number + 1);
        let (segment, file) = create_segment(dir, number)?;
        segments.push(segment);
        let mut wal = Self {
            dir: dir.to_owned(),
            log_id,
            segments,
            file,
            offset: 0,
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
        if self.offset >= SEGMENT_BYTES {
            let number = self.segments.last().map_or(0, |segment| segment.number + 1);
            let (segment, file) = create_segment(&self.dir, number)?;
            self.segments.push(segment);
            self.file = file;
            self.offset = 0;
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
        self.file.write_all_at(&self.buffer, self.offset)?;
        self.file.sync_data()?;
        self.offset += self.buffer.len() as u64;
        self.next_frame += 1;
        self.chain = crc;
        Ok(())
    }

    /// Deletes the segments that hold nothing after `index`, which a durable snapshot contains.
    pub(super) fn trim(&mut self, index: u64) -> io::Result<()> {
        let last = self.segments.len() - 1;
        let count = self.segments[..last]
            .iter()
            .take_while(|s| s.max_index <= index)
            .count();
        for segment in self.segments.drain(..count) {
            std::fs::remove_file(&segment.path)?;
        }
        Ok(())
    }
}

fn checksum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..24]), &frame[HEAD..])
}

fn create_segment(dir: &Path, number: u64) -> io::Result<(Segment, File)> {
    let path = dir.join(format!("wal-{number:016x}.log"));
    let file = OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)?;
    // So that an append changes no metadata. A file system that cannot is only slower.
    let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SEGMENT_BYTES);
    file.sync_all()?;
    sync_dir(dir)?;
    Ok((
        Segment {
            path,
            number,
            max_index: 0,
        },
        file,
    ))
}

fn read_segment(
    segment: &mut Segment,
    log_id: u64,
    last: bool,
    chain: &mut Option<(u64, u32)>,
    replay: &mut Replay,
) -> Result<(), DiskError> {
    let mut bytes = Vec::new();
    File::open(&segment.path)?.read_to_end(&mut bytes)?;
    let damaged = |offset: usize, what: &'static str| DiskError::Damaged {
        path: segment.path.clone(),
        offset: offset as u64,
        what,
    };
    let mut offset = 0;
    while let Some((frame, end)) = frame_at(&bytes, offset, log_id) {
        let number = u64::from_le_bytes(frame[8..16].try_into().expect("eight bytes"));
        let previous = u32::from_le_bytes(frame[20..24].try_into().expect("four bytes"));
        let crc = u32::from_le_bytes(frame[24..28].try_into().expect("four bytes"));
        // The oldest segment may follow on ones that were deleted.
        if chain.is_some_and(|expected| expected != (number, previous)) {
            return Err(damaged(
                offset,
                "a frame does not follow on the one before it",
            ));
        }
        *chain = Some((number + 1, crc));
        let records: Vec<Record> = postcard::from_bytes(&frame[HEAD..])
            .map_err(|_| damaged(offset, "a frame holds no records"))?;
        for record in records {
            if let Record::Entry(entry) = &record {
                segment.max_index = segment.max_index.max(entry.index);
            }
            replay.take(record).map_err(|what| damaged(offset, what))?;
        }
        offset = end;
    }
    let rest = &bytes[offset.min(bytes.len())..];
    if rest.iter().any(|byte| *byte != 0) {
        if !last {
            return Err(damaged(offset, "a frame is broken and segments follow"));
        }
        let mut after = (offset + 8..bytes.len()).step_by(8);
        if after.any(|later| frame_at(&bytes, later, log_id).is_some()) {
            return Err(damaged(offset, "a frame is broken and sound ones follow"));
        }
        tracing::warn!(path = %segment.path.display(), offset, "cut off an unfinished write");
    }
    if !rest.is_empty() {
        // Nothing more is written here: give back what was set aside, too.
        let file = OpenOptions::new().write(true).open(&segment.path)?;
        file.set_len(offset as u64)?;
        file.sync_all()?;
    }
    Ok(())
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

/// Writes a file so that it is there whole or not at all.
pub(super) fn write_atomically(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_dir(path.parent().expect("a file is in a directory"))
}
