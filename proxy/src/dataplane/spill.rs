//! Where inputs go that are too many for memory: files, written and read by threads of their own. The
//! data plane never waits for the disk: it hands bytes over, and asks for them before it needs them.
//!
//! ```text
//!  store(bytes) ──> writer ──> a file each     (in memory until it is written)
//!  load(stored) ──> reader ──> Loading         (its tag is told, the data plane is woken)
//!  drop(Stored) ──> writer: the file goes
//! ```
//! Files do not outlive the node: what lies in the folder when it starts is removed. Length and
//! checksum of each are kept in memory, so that a damaged or shortened one is not taken for input.

mod worker;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use mio::Waker;
use unbroken_tcpstate::ConnId;

/// Bytes that are written and read at a time.
pub(crate) const FRAME_BYTES: usize = 256 * 1024;
/// What waits to be written is in memory beside what else is kept there: so much at most.
const WAITING_BYTES_MAX: u64 = 256 << 20;
/// A replica that joins takes no more of its checkpoint while so much waits.
const WAITING_MUCH_BYTES: u64 = 32 << 20;
/// What was read for connections and is not used yet.
const LOADED_BYTES_MAX: u64 = 64 << 20;

/// Bytes that are kept: in memory, or where they must be read from first.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Memory(Bytes),
    Stored(Arc<Stored>),
}

impl Piece {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::Stored(stored) => stored.len,
        }
    }

    /// The bytes, if they are in memory.
    pub(crate) fn now(&self) -> Option<Bytes> {
        match self {
            Self::Memory(bytes) => Some(bytes.clone()),
            Self::Stored(stored) => stored.held(),
        }
    }

    /// The bytes, wherever they are. Not for the data plane.
    ///
    /// # Errors
    /// They cannot be read, or are damaged.
    pub(crate) fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::Stored(stored) => stored.read(),
        }
    }
}

/// Length of all of them.
pub(crate) fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|p| p.len() as u64).sum()
}

/// Bytes in a file, or on their way there.
#[derive(Debug)]
pub(crate) struct Stored {
    len: usize,
    /// Until they are written, or for ever if they cannot be.
    held: Mutex<Option<Bytes>>,
    failed: AtomicBool,
    place: OnceLock<Place>,
    /// What counts them, and removes their file; none for a part of a file that goes by itself.
    shared: Option<Arc<Shared>>,
}

#[derive(Debug)]
struct Place {
    source: Source,
    offset: u64,
    checksum: u32,
}

#[derive(Debug)]
enum Source {
    Named(PathBuf),
    Open(Arc<File>),
}

impl Stored {
    /// The bytes while they are in memory.
    pub(crate) fn held(&self) -> Option<Bytes> {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether they could not be written, and stay in memory; or cannot be read any more.
    pub(crate) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn read(&self) -> io::Result<Bytes> {
        if let Some(bytes) = self.held() {
            return Ok(bytes);
        }
        let place = self.place.get().expect("what is not held was written");
        let mut bytes = BytesMut::zeroed(self.len);
        match &place.source {
            Source::Named(path) => File::open(path)?.read_exact_at(&mut bytes, place.offset)?,
            Source::Open(file) => file.read_exact_at(&mut bytes, place.offset)?,
        }
        if crc32c::crc32c(&bytes) != place.checksum {
            let what = "not what was written: its checksum differs";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(bytes.freeze())
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        let Some(shared) = &self.shared else { return };
        let len = self.len as u64;
        shared.used.fetch_sub(len, Ordering::AcqRel);
        if self
            .held
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
        {
            shared.waiting.fetch_sub(len, Ordering::AcqRel);
        }
        if let Some(Place {
            source: Source::Named(path),
            ..
        }) = self.place.take()
        {
            // The thread is gone only when the node ends, and the folder with it.
            let _ = shared.writer.send(Job::Remove(path));
        }
    }
}

/// The contents of a file of ours, which loses its name: it lives as long as its pieces. Reads all of
/// it, for their checksums.
///
/// # Errors
/// It cannot be read.
pub(crate) fn take(path: &Path) -> io::Result<Vec<Piece>> {
    let file = Arc::new(File::open(path)?);
    fs::remove_file(path)?;
    let length = file.metadata()?.len();
    let mut pieces = Vec::new();
    let mut buffer = vec![0; FRAME_BYTES];
    let mut offset = 0;
    while offset < length {
        let len = usize::try_from(length - offset).map_or(FRAME_BYTES, |n| n.min(FRAME_BYTES));
        let bytes = &mut buffer[..len];
        file.read_exact_at(bytes, offset)?;
        let place = Place {
            source: Source::Open(Arc::clone(&file)),
            offset,
            checksum: crc32c::crc32c(bytes),
        };
        pieces.push(Piece::Stored(Arc::new(Stored {
            len,
            held: Mutex::new(None),
            failed: AtomicBool::new(false),
            place: OnceLock::from(place),
            shared: None,
        })));
        offset += len as u64;
    }
    Ok(pieces)
}

/// Who waits for bytes to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    Connection(ConnId),
    /// The order of all inputs, or who joins: one at a time.
    All,
}

/// Bytes that are being read. Dropped before, they are not.
#[derive(Debug)]
pub(crate) struct Loading(Arc<Slot>);

#[derive(Debug)]
struct Slot {
    len: u64,
    /// `None`: they cannot be read.
    bytes: OnceLock<Option<Bytes>>,
    shared: Arc<Shared>,
}

impl Loading {
    /// The bytes once they are there; or that they cannot be read.
    pub(crate) fn get(&self) -> Option<Result<&Bytes, Unreadable>> {
        self.0.bytes.get().map(|b| b.as_ref().ok_or(Unreadable))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.loaded.fetch_sub(self.len, Ordering::AcqRel);
    }
}

/// What was kept cannot be read any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unreadable;

/// What the data plane and the threads have in common.
#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    bytes_max: u64,
    /// Of files, and of what waits to be written.
    used: AtomicU64,
    /// In memory: waits to be written, or could not be.
    waiting: AtomicU64,
    loaded: AtomicU64,
    /// The last thing that was tried failed, with this.
    alarm: Mutex<Option<String>>,
    /// Something could not be written or read since this was last asked.
    failed: AtomicBool,
    writer: Sender<Job>,
}

impl Shared {
    fn set_alarm(&self, what: Option<String>) {
        *self.alarm.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// What the threads do, one after the other.
#[derive(Debug)]
enum Job {
    Write(std::sync::Weak<Stored>),
    Remove(PathBuf),
    Read(Arc<Stored>, std::sync::Weak<Slot>, For),
    Stop,
}

/// The files of one VIP, and the threads that write and read them.
#[derive(Debug)]
pub(crate) struct Spill {
    shared: Arc<Shared>,
    reader: Sender<Job>,
    done: Receiver<For>,
    threads: Vec<JoinHandle<()>>,
}

impl Spill {
    /// Makes the folder, empties it, and starts the threads. `waker` wakes the data plane.
    ///
    /// # Errors
    /// The folder cannot be made, or what lies in it cannot be removed.
    pub(crate) fn open(folder: PathBuf, bytes_max: u64, waker: Arc<Waker>) -> anyhow::Result<Self> {
        let shown = folder.display();
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("emptying {shown}"));
            }
            _ => {}
        }
        if bytes_max > 0 {
            // What clients say is nobody else's to read.
            let mut private = fs::DirBuilder::new();
            let made = private.recursive(true).mode(0o700).create(&folder);
            made.with_context(|| format!("making {shown}"))?;
        }
        let (writer, jobs) = channel();
        let (reader, reads) = channel();
        let (tell, done) = channel();
        let shared = Arc::new(Shared {
            folder,
            bytes_max,
            used: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            loaded: AtomicU64::new(0),
            alarm: Mutex::new(None),
            failed: AtomicBool::new(false),
            writer,
        });
        let threads = vec![
            worker::writer(Arc::clone(&shared), jobs, Arc::clone(&waker))?,
            worker::reader(Arc::clone(&shared), reads, tell, waker)?,
        ];
        Ok(Self {
            shared,
            reader,
            done,
            threads,
        })
    }

    /// Hands bytes over to be written. `None`: there is no room, the disk does not keep up, or it fails.
    pub(crate) fn store(&self, bytes: Bytes) -> Option<Arc<Stored>> {
        let shared = &self.shared;
        let len = bytes.len() as u64;
        let full = shared.used.load(Ordering::Acquire) + len > shared.bytes_max;
        if full || self.waiting_bytes() + len > WAITING_BYTES_MAX || self.alarm().is_some() {
            return None;
        }
        shared.used.fetch_add(len, Ordering::AcqRel);
        shared.waiting.fetch_add(len, Ordering::AcqRel);
        let stored = Arc::new(Stored {
            len: bytes.len(),
            held: Mutex::new(Some(bytes)),
            failed: AtomicBool::new(false),
            place: OnceLock::new(),
            shared: Some(Arc::clone(shared)),
        });
        let job = Job::Write(Arc::downgrade(&stored));
        self.shared.writer.send(job).ok().map(|()| stored)
    }

    /// Asks for bytes to be read; the waiter is told by [`Self::poll_loaded`]. `None`: too much was
    /// read for connections already that they have not used yet.
    pub(crate) fn load(&self, stored: &Arc<Stored>, waiter: For) -> Option<Loading> {
        let len = stored.len as u64;
        if waiter != For::All && !self.may_load() {
            return None;
        }
        self.shared.loaded.fetch_add(len, Ordering::AcqRel);
        let slot = Arc::new(Slot {
            len,
            bytes: OnceLock::new(),
            shared: Arc::clone(&self.shared),
        });
        let job = Job::Read(Arc::clone(stored), Arc::downgrade(&slot), waiter);
        if self.reader.send(job).is_err() {
            // The thread ends with the node, or by a panic of its own.
            let _ = slot.bytes.set(None);
        }
        Some(Loading(slot))
    }

    /// Whether bytes may be read for a connection now.
    pub(crate) fn may_load(&self) -> bool {
        self.shared.loaded.load(Ordering::Acquire) < LOADED_BYTES_MAX
    }

    /// Whose bytes were read since this was last asked.
    pub(crate) fn poll_loaded(&self) -> Option<For> {
        self.done.try_recv().ok()
    }

    /// Whether something could not be written or read since this was last asked.
    pub(crate) fn take_failed(&self) -> bool {
        self.shared.failed.swap(false, Ordering::AcqRel)
    }

    /// Bytes in files, those that wait to be written included.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.shared.used.load(Ordering::Acquire)
    }

    /// Bytes in memory that wait to be written.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        self.shared.waiting.load(Ordering::Acquire)
    }

    /// Whether the disk does not keep up: whoever can wait with more should.
    pub(crate) fn is_behind(&self) -> bool {
        self.waiting_bytes() > WAITING_MUCH_BYTES && self.alarm().is_none()
    }

    /// What is wrong with the disk, for people.
    pub(crate) fn alarm(&self) -> Option<String> {
        self.shared
            .alarm
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        for jobs in [&self.shared.writer, &self.reader] {
            // It may have ended by a panic of its own, which is told below.
            let _ = jobs.send(Job::Stop);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the input history panicked");
            }
        }
        // What remains is removed when the node starts again.
        let _ = fs::remove_dir_all(&self.shared.folder);
    }
}

#[cfg(test)]
pub(super) mod tests;
