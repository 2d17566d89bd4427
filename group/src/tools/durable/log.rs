//! A member's disk: a checkpoint, and a log of what came after it.
//!
//! ```text
//! checkpoint            head | frame          written beside, synced, renamed
//! log.NUMBER            head | frame | ...    NUMBER is the checkpoint's; a frame is written when the one before is durable
//! frame:  length u32 | number u64 | crc u32 | payload        the checksum covers all of it, and the file's head
//! ```
//!
//! A frame that is broken with a whole one behind it was durable once, and has been damaged: the log is refused. A broken end
//! was being written when the machine stopped, was acknowledged to nobody, and is cut off. (Damage to the very last frame
//! looks the same.)

use bytes::Bytes;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

const MAGIC: &[u8; 8] = b"UBDLOG\0\x01";
const HEAD: usize = 16;
/// A log that is larger than its checkpoint and than this makes way for a new checkpoint.
const LOG_BYTES_MIN: u64 = 1 << 20;

/// Why a member's disk cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The system says so.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
    /// What was durable once has changed, or another version wrote it.
    #[error("{path} is damaged at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How it shows.
        what: &'static str,
    },
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, DiskError> {
    result.map_err(|source| DiskError::Io {
        path: path.to_owned(),
        source,
    })
}

/// What a disk holds.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// `None`: nothing yet.
    pub(super) checkpoint: Option<Bytes>,
    pub(super) records: Vec<Bytes>,
}

/// The files of one member, open for writing by one process.
#[derive(Debug)]
pub(super) struct Disk {
    directory: PathBuf,
    _lock: File,
    log: Option<File>,
    /// Of the checkpoint: names its log.
    number: u64,
    frames: u64,
    log_bytes: u64,
    checkpoint_bytes: u64,
}

fn frame(number: u64, salt: u32, payload: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    let len = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut head = [0; HEAD];
    head[..4].copy_from_slice(&len.to_le_bytes());
    head[4..12].copy_from_slice(&number.to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c_append(salt, &head[..12]), payload);
    head[12..].copy_from_slice(&sum.to_le_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(payload);
    Ok(())
}

/// The payload of the frame at the beginning of these bytes, if it is whole and may have its number.
fn whole(bytes: &[u8], may: impl Fn(u64) -> bool, salt: u32) -> Option<&[u8]> {
    let (head, rest) = bytes.split_at_checked(HEAD)?;
    let len = u32::from_le_bytes(head[..4].try_into().ok()?) as usize;
    let is = u64::from_le_bytes(head[4..12].try_into().ok()?);
    // Before the checksum: this is tried at every byte behind a broken frame.
    let payload = rest.get(..len).filter(|_| may(is))?;
    let sum = crc32c::crc32c_append(crc32c::crc32c_append(salt, &head[..12]), payload);
    (head[12..] == sum.to_le_bytes()).then_some(payload)
}

fn begin(number: u64) -> Vec<u8> {
    [&MAGIC[..], &number.to_le_bytes()].concat()
}

impl Disk {
    /// Opens a member's directory, made if there is none, and reads what is there.
    pub(super) fn open(directory: &Path) -> Result<(Self, Found), DiskError> {
        at(directory, std::fs::create_dir_all(directory))?;
        let path = directory.join("lock");
        let lock = at(&path, File::create(&path))?;
        let taken = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        at(&path, taken.map_err(Into::into))?;
        let mut disk = Self {
            directory: directory.to_owned(),
            _lock: lock,
            log: None,
            number: 0,
            frames: 0,
            log_bytes: 0,
            checkpoint_bytes: 0,
        };
        let path = directory.join("checkpoint");
        let bytes = match std::fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((disk, Found::default())),
            bytes => Bytes::from(at(&path, bytes)?),
        };
        let damaged = |path: &Path, offset: usize, what| DiskError::Damaged {
            path: path.to_owned(),
            offset: offset as u64,
            what,
        };
        let Some((Ok(number), payload)) = bytes
            .split_at_checked(HEAD)
            .filter(|(h, _)| h.starts_with(MAGIC))
            .map(|(h, rest)| (h[8..].try_into().map(u64::from_le_bytes), rest))
        else {
            return Err(damaged(&path, 0, "not written by this program"));
        };
        let salt = crc32c::crc32c(&bytes[..HEAD]);
        let Some(state) = whole(payload, |n| n == 0, salt) else {
            return Err(damaged(&path, HEAD, "its checksum is wrong"));
        };
        let state = bytes.slice_ref(state);
        disk.number = number;
        disk.checkpoint_bytes = bytes.len() as u64;
        let records = disk.read_log(damaged)?;
        let found = Found {
            checkpoint: Some(state),
            records,
        };
        Ok((disk, found))
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join(format!("log.{}", self.number))
    }

    fn read_log(
        &mut self,
        damaged: impl Fn(&Path, usize, &'static str) -> DiskError,
    ) -> Result<Vec<Bytes>, DiskError> {
        let path = self.log_path();
        let mut options = OpenOptions::new();
        // The checkpoint was renamed and its log not begun: as if it were empty.
        let file = options
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path);
        let mut file = at(&path, file)?;
        let bytes = Bytes::from(at(&path, std::fs::read(&path))?);
        let head = begin(self.number);
        let mut records = Vec::new();
        let mut end = HEAD;
        let salt = crc32c::crc32c(&head);
        if bytes.len() < HEAD && head.starts_with(&bytes) {
            at(&path, file.seek(SeekFrom::Start(0)))?;
            at(&path, file.write_all(&head))?;
        } else if !bytes.starts_with(&head) {
            return Err(damaged(&path, 0, "not the log of this checkpoint"));
        } else {
            while let Some(record) = whole(&bytes[end..], |n| n == self.frames, salt) {
                let batch = postcard::from_bytes::<Vec<Bytes>>(record);
                records.extend(batch.map_err(|_| damaged(&path, end, "not records"))?);
                end += HEAD + record.len();
                self.frames += 1;
            }
            let rest = &bytes[end..];
            let last = self.frames + (rest.len() / HEAD) as u64;
            let later = |n: u64| n > self.frames && n <= last;
            if (1..rest.len()).any(|at| whole(&rest[at..], later, salt).is_some()) {
                return Err(damaged(&path, end, "a whole record follows"));
            }
        }
        at(&path, file.set_len(end as u64))?;
        at(&path, file.sync_all())?;
        at(&path, file.seek(SeekFrom::End(0)))?;
        self.log_bytes = end as u64;
        self.log = Some(file);
        Ok(records)
    }

    /// Writes a checkpoint in the place of everything before it. Durable when this returns.
    pub(super) fn checkpoint(&mut self, state: &[u8]) -> Result<(), DiskError> {
        let old = self.log_path();
        let number = self.number + 1;
        let mut bytes = begin(number);
        let salt = crc32c::crc32c(&bytes);
        let new = self.directory.join("checkpoint.new");
        at(&new, frame(0, salt, state, &mut bytes))?;
        let path = self.directory.join("checkpoint");
        let mut file = at(&new, File::create(&new))?;
        at(&new, file.write_all(&bytes))?;
        at(&new, file.sync_all())?;
        at(&path, std::fs::rename(&new, &path))?;
        self.checkpoint_bytes = bytes.len() as u64;
        self.number = number;
        self.frames = 0;
        let path = self.log_path();
        let mut log = at(&path, File::create(&path))?;
        let head = begin(number);
        at(&path, log.write_all(&head))?;
        at(&path, log.sync_all())?;
        let directory = at(&self.directory, File::open(&self.directory))?;
        at(&self.directory, directory.sync_all())?;
        self.log = Some(log);
        self.log_bytes = head.len() as u64;
        // What is left over does no harm.
        let _ = std::fs::remove_file(old);
        Ok(())
    }

    /// Appends records behind a checkpoint, as one frame. Durable when this returns.
    pub(super) fn append(&mut self, records: &[Bytes]) -> Result<(), DiskError> {
        let path = self.log_path();
        let log = self.log.as_mut().expect("a checkpoint comes first");
        let salt = crc32c::crc32c(&begin(self.number));
        let mut bytes = Vec::new();
        // One frame: what was torn is all of it.
        let records = postcard::to_stdvec(records).expect("bytes can be serialised");
        at(&path, frame(self.frames, salt, &records, &mut bytes))?;
        self.frames += 1;
        at(&path, log.write_all(&bytes))?;
        at(&path, log.sync_data())?;
        self.log_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Whether a checkpoint is due.
    pub(super) fn is_long(&self) -> bool {
        self.log_bytes > self.checkpoint_bytes.max(LOG_BYTES_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let name = format!("unbroken-durable-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            let _ = std::fs::remove_dir_all(&dir);
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn records(n: u8) -> Vec<Bytes> {
        (0..n)
            .map(|i| Bytes::from(vec![i; 3 + usize::from(i) * 7]))
            .collect()
    }

    fn written(dir: &Dir) -> (PathBuf, Vec<u8>) {
        let (mut disk, found) = Disk::open(&dir.0).unwrap();
        assert!(found.checkpoint.is_none());
        disk.checkpoint(b"old").unwrap();
        disk.append(&records(1)).unwrap();
        disk.checkpoint(b"state").unwrap();
        disk.append(&records(2)).unwrap();
        for record in &records(6)[2..] {
            disk.append(std::slice::from_ref(record)).unwrap();
        }
        let path = disk.log_path();
        (path.clone(), std::fs::read(path).unwrap())
    }

    #[test]
    fn what_was_written_is_found_and_belongs_to_one() {
        let dir = Dir::new("found");
        let (path, _) = written(&dir);
        let (mut disk, found) = Disk::open(&dir.0).unwrap();
        assert_eq!(found.checkpoint, Some("state".into()));
        assert_eq!(found.records, records(6));
        assert!(
            matches!(Disk::open(&dir.0), Err(DiskError::Io { .. })),
            "in use"
        );
        disk.append(&records(7)[6..]).unwrap();
        drop(disk);
        assert_eq!(Disk::open(&dir.0).unwrap().1.records, records(7));
        // It died before the checkpoint's log was there.
        std::fs::remove_file(path).unwrap();
        let (_, found) = Disk::open(&dir.0).unwrap();
        assert_eq!(
            (found.checkpoint, found.records.len()),
            (Some("state".into()), 0)
        );
    }

    #[test]
    fn a_torn_end_is_cut_off_and_written_over() {
        let dir = Dir::new("torn");
        let (path, bytes) = written(&dir);
        let last = bytes.len() - HEAD - 2 - records(6)[5].len();
        for end in last..bytes.len() {
            // Short, or as long as it would have been, with zeros.
            for torn in [
                bytes[..end].to_vec(),
                [&bytes[..end], &vec![0; bytes.len() - end][..]].concat(),
            ] {
                if torn == bytes {
                    continue;
                }
                std::fs::write(&path, &torn).unwrap();
                let (mut disk, found) = Disk::open(&dir.0).unwrap();
                assert_eq!(found.records, records(5), "cut at {end}");
                disk.append(&["new".into()]).unwrap();
                drop(disk);
                let found = Disk::open(&dir.0).unwrap().1;
                assert_eq!(found.records.last(), Some(&"new".into()));
            }
        }
        for end in 0..HEAD {
            std::fs::write(&path, &bytes[..end]).unwrap();
            assert_eq!(Disk::open(&dir.0).unwrap().1.records.len(), 0);
        }
    }

    #[test]
    fn what_is_within_a_torn_end_is_no_record_that_follows() {
        let dir = Dir::new("within");
        let (path, bytes) = written(&dir);
        // The end that was being written holds a frame of this log, as a program's bytes may.
        let torn = [&bytes[..], &[0xff; HEAD], &bytes[HEAD..]].concat();
        std::fs::write(&path, torn).unwrap();
        assert_eq!(Disk::open(&dir.0).unwrap().1.records, records(6));
    }

    #[test]
    fn a_flipped_bit_is_refused_or_never_taken_for_a_record() {
        let dir = Dir::new("flipped");
        let (path, bytes) = written(&dir);
        let last = bytes.len() - HEAD - 2 - records(6)[5].len();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            match Disk::open(&dir.0) {
                Err(DiskError::Damaged { .. }) => assert!(bit / 8 < last),
                Ok((_, found)) => {
                    assert!(bit / 8 >= last, "bit {bit}");
                    assert_eq!(found.records, records(5));
                }
                Err(other) => panic!("{other}"),
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let path = dir.0.join("checkpoint");
        let bytes = std::fs::read(&path).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            let got = Disk::open(&dir.0);
            assert!(
                matches!(got, Err(DiskError::Damaged { .. })),
                "bit {bit}: {got:?}"
            );
        }
    }

    #[test]
    fn a_log_grows_to_a_bound() {
        let dir = Dir::new("bound");
        let (mut disk, _) = Disk::open(&dir.0).unwrap();
        disk.checkpoint(b"").unwrap();
        let mut appended = 0;
        while !disk.is_long() {
            disk.append(&[Bytes::from(vec![1; 100_000])]).unwrap();
            appended += 1;
        }
        assert_eq!(appended, 11);
        disk.checkpoint(b"all").unwrap();
        assert!(!disk.is_long());
        let files = std::fs::read_dir(&dir.0).unwrap().count();
        assert_eq!(files, 3, "lock, checkpoint, log");
    }
}
