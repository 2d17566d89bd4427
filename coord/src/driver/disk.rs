//! What a server keeps on disk, and the threads that write it.
//!
//! ```text
//! data_dir/lock              held while a server runs
//! data_dir/identity          which server this is, of which cluster
//! data_dir/known-peers        peers that were seen with something on their disk
//! data_dir/wal-*.log         the log: see `wal`
//! data_dir/mark              how far the log was known to be durable: see `wal`
//! data_dir/snapshot-*.state  the newest snapshot
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::engine::{Clock, Input, InputSender};
use super::storage::{Directory, Storage, TEMPORARY, write_atomically};
use super::wal::{FRAME_BYTES_MAX, Record, SEGMENT_BYTES, Wal};
use crate::metrics::Histogram;
use crate::quorum::{Recovered, SnapshotImage, Write};

/// What is wrong with the data directory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The system refused an operation; the error names the file.
    #[error("the data directory: {0}")]
    Io(#[from] io::Error),
    /// Another process uses it.
    #[error("{path}: another server uses this data directory")]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// A file is not what was written. Restore it, or let this server begin anew with an empty
    /// directory after it was removed from the cluster.
    #[error("{path}: damaged at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What was found.
        what: &'static str,
    },
    /// The directory belongs to another server.
    #[error("the data directory is that of server {found}, not of {expected}")]
    NotOurs {
        /// Server that wrote it.
        found: String,
        /// Server that was configured.
        expected: String,
    },
}

/// Which server a directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Random; marks the frames of this log.
    pub(super) log_id: u64,
    pub(super) name: String,
    /// Its raft id: another one if it comes back with an empty directory.
    pub(super) id: u64,
    /// Who began the cluster.
    pub(super) founders: BTreeMap<u64, String>,
}

const IDENTITY: &str = "identity";
const IDENTITY_MAGIC: [u8; 8] = *b"UBCID\0\0\x02";
const SNAPSHOT_MAGIC: [u8; 8] = *b"UBCSNAP\x01";

enum Job {
    Write {
        token: u64,
        write: Write,
    },
    /// A snapshot up to this index is durable: the log before it may go.
    Trim(u64),
}

/// The writing side. Dropping it ends the threads when they have written what they were given.
pub(super) struct Disk {
    jobs: Option<Sender<Job>>,
    snapshots: Option<Sender<SnapshotImage>>,
    threads: Vec<JoinHandle<()>>,
    /// How long syncs of the log took.
    syncs: Arc<Mutex<Histogram>>,
    /// Unlocks when it is dropped, last.
    _lock: File,
}

/// A directory that was read and checked, and is not written to yet.
pub(super) struct Opened {
    storage: Arc<dyn Storage>,
    wal: Wal,
    lock: File,
    pub(super) recovered: Recovered,
}

/// A directory that is ours alone, and was not read yet.
pub(super) struct Claimed {
    storage: Arc<dyn Storage>,
    lock: File,
    /// None if no server has been here.
    identity: Option<Identity>,
}

/// Takes the directory, and makes it if it is not there.
pub(super) fn claim(dir: &Path, name: &str) -> Result<Claimed, DiskError> {
    std::fs::create_dir_all(dir)?;
    let path = dir.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Err(DiskError::Locked { path }),
        Err(std::fs::TryLockError::Error(error)) => return Err(error.into()),
    }
    let storage: Arc<dyn Storage> = Arc::new(Directory::new(dir));
    let identity = if dir.join(IDENTITY).exists() {
        let found: Identity = read_checked(&*storage, IDENTITY, IDENTITY_MAGIC)?;
        if found.name != name {
            return Err(DiskError::NotOurs {
                found: found.name,
                expected: name.to_owned(),
            });
        }
        Some(found)
    } else {
        None
    };
    Ok(Claimed {
        storage,
        lock,
        identity,
    })
}

impl Claimed {
    /// Which server has been running here; none if the disk is new, or was lost.
    pub(super) fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Reads the directory. A fresh one becomes that of `new`.
    pub(super) fn open(self, new: Identity) -> Result<Opened, DiskError> {
        let Self {
            storage,
            lock,
            identity,
        } = self;
        let identity = match identity {
            Some(identity) => identity,
            None => {
                write_checked(&*storage, IDENTITY, IDENTITY_MAGIC, &new)?;
                new
            }
        };
        let (wal, recovered) = recover(&storage, identity.log_id, SEGMENT_BYTES)?;
        Ok(Opened {
            storage,
            wal,
            lock,
            recovered,
        })
    }
}

/// Reads the log and the newest snapshot.
pub(crate) fn recover(
    storage: &Arc<dyn Storage>,
    log_id: u64,
    segment_bytes: u64,
) -> Result<(Wal, Recovered), DiskError> {
    for name in storage.list()? {
        if name.ends_with(TEMPORARY) {
            storage.remove(&name)?;
        }
    }
    let snapshot = match snapshots(&**storage)?.pop() {
        Some(name) => Some(read_checked::<SnapshotImage>(
            &**storage,
            &name,
            SNAPSHOT_MAGIC,
        )?),
        None => None,
    };
    let (mut wal, replay) = Wal::open(storage, log_id, segment_bytes)?;
    let (base, base_term) = snapshot
        .as_ref()
        .map_or((0, 0), |image| (image.index, image.term));
    let mut entries = replay.entries;
    let first = entries.first().map_or(base + 1, |entry| entry.index);
    if replay.reset > base || first > base + 1 {
        return Err(DiskError::Damaged {
            path: storage.path(""),
            offset: 0,
            what: "the log begins after the newest snapshot ends",
        });
    }
    let goes_on = match entries.iter().find(|entry| entry.index == base) {
        Some(entry) => entry.term == base_term,
        // It begins right after it, or ends before.
        None => first == base + 1,
    };
    if !goes_on && !entries.is_empty() {
        // The snapshot was saved, and the machine stopped before the log had the entries in it (a
        // follower may apply what others have on disk) or knew that it replaces them. What stands
        // in their place is of another leader and led to nothing.
        entries.clear();
        wal.append(&[Record::Reset { index: base }])?;
    }
    entries.retain(|entry| entry.index > base);
    let recovered = Recovered {
        snapshot,
        hard_state: replay.hard_state,
        entries,
    };
    Ok((wal, recovered))
}

impl Opened {
    /// For who changes what is there and starts no threads. The file is the lock.
    pub(super) fn into_parts(self) -> (Arc<dyn Storage>, Wal, File, Recovered) {
        (self.storage, self.wal, self.lock, self.recovered)
    }

    /// Starts the threads. They tell `engine` what is durable.
    pub(super) fn start(self, engine: &InputSender) -> io::Result<Disk> {
        let Self {
            storage,
            wal,
            lock,
            recovered: _,
        } = self;
        let (jobs, job_queue) = channel();
        let (snapshots, snapshot_queue) = channel();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run)
        };
        let syncs = Arc::new(Mutex::new(Histogram::default()));
        let (to_engine, to_log, to_syncs) = (engine.clone(), storage.clone(), syncs.clone());
        let writer = move || {
            if let Err(error) = write_log(wal, &*to_log, &job_queue, &to_engine, &to_syncs) {
                to_engine.send_blocking(Input::DiskFailed(error));
            }
        };
        let (to_engine, trims) = (engine.clone(), jobs.clone());
        let saver = move || {
            if let Err(error) = save_snapshots(&*storage, &snapshot_queue, &trims, &to_engine) {
                to_engine.send_blocking(Input::DiskFailed(error));
            }
        };
        let threads = vec![
            spawn("coord-log", Box::new(writer))?,
            spawn("coord-snapshot", Box::new(saver))?,
        ];
        Ok(Disk {
            jobs: Some(jobs),
            snapshots: Some(snapshots),
            threads,
            syncs,
            _lock: lock,
        })
    }
}

impl Disk {
    /// Appends to the log; [`Input::Persisted`] follows.
    pub(super) fn write(&self, token: u64, write: Write) {
        if let Some(jobs) = &self.jobs {
            // A thread that has failed has said so.
            let _ = jobs.send(Job::Write { token, write });
        }
    }

    /// How long syncs of the log took.
    pub(super) fn syncs(&self) -> Histogram {
        let syncs = self.syncs.lock();
        syncs.expect("no thread panics while it holds this").clone()
    }

    /// Saves a snapshot; [`Input::Saved`] follows.
    pub(super) fn save(&self, image: SnapshotImage) {
        if let Some(snapshots) = &self.snapshots {
            let _ = snapshots.send(image);
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.snapshots = None;
        self.jobs = None;
        // The saver holds a sender to the writer, so it ends first.
        for thread in self.threads.drain(..).rev() {
            let _ = thread.join();
        }
    }
}

/// What shares one frame of the log, and so one sync.
#[derive(Default)]
pub(crate) struct Group {
    records: Vec<Record>,
    bytes: usize,
}

impl Group {
    /// Adds a write. A leader's snapshot in it is saved at once: its record in the log says that it
    /// is there.
    pub(crate) fn add(&mut self, storage: &dyn Storage, write: Write) -> io::Result<()> {
        if let Some(image) = write.snapshot {
            save_snapshot(storage, &image)?;
            if !planted!(ResetForgotten) {
                self.records.push(Record::Reset { index: image.index });
            }
        }
        self.records.extend(write.hard_state.map(Record::Hard));
        let lengths = write.entries.iter().map(|entry| entry.data.len());
        self.bytes += lengths.sum::<usize>();
        self.records
            .extend(write.entries.into_iter().map(Record::Entry));
        Ok(())
    }

    /// Whether it should be written before more is added.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= FRAME_BYTES_MAX / 16
    }

    /// Makes it durable.
    pub(crate) fn commit(self, wal: &mut Wal) -> io::Result<()> {
        wal.append(&self.records)
    }
}

fn write_log(
    mut wal: Wal,
    storage: &dyn Storage,
    jobs: &Receiver<Job>,
    engine: &InputSender,
    syncs: &Mutex<Histogram>,
) -> io::Result<()> {
    let clock = Clock::start();
    while let Ok(first) = jobs.recv() {
        // Everything that has come meanwhile shares one frame.
        let mut next = Some(first);
        let mut group = Group::default();
        let mut durable = None;
        while let Some(job) = next.take() {
            match job {
                Job::Trim(index) => wal.trim(index)?,
                Job::Write { token, write } => {
                    group.add(storage, write)?;
                    durable = Some(token);
                }
            }
            if !group.is_full() {
                next = jobs.try_recv().ok();
            }
        }
        if let Some(token) = durable {
            let begin = clock.now();
            group.commit(&mut wal)?;
            let took = clock.now().since(begin);
            engine.send_blocking(Input::Persisted(token));
            wal.write_mark()?;
            let syncs = syncs.lock();
            syncs
                .expect("no thread panics while it holds this")
                .add(took);
        }
    }
    wal.sync_mark()
}

fn save_snapshots(
    storage: &dyn Storage,
    snapshots: &Receiver<SnapshotImage>,
    log: &Sender<Job>,
    engine: &InputSender,
) -> io::Result<()> {
    while let Ok(image) = snapshots.recv() {
        save_snapshot(storage, &image)?;
        // The log's thread may have saved a newer one that came from the leader; then this was
        // deleted again at once, and the newer one stands for it.
        let _ = log.send(Job::Trim(image.index));
        engine.send_blocking(Input::Saved(image.index));
    }
    Ok(())
}

/// The names of the snapshots, oldest first.
fn snapshots(storage: &dyn Storage) -> io::Result<Vec<String>> {
    let mut found = storage.list()?;
    found.retain(|name| name.starts_with("snapshot-") && name.ends_with(".state"));
    // The index has a fixed width, so the order of names is the order of indexes.
    found.sort();
    Ok(found)
}

/// Saves a snapshot for good and deletes the older ones.
pub(crate) fn save_snapshot(storage: &dyn Storage, image: &SnapshotImage) -> io::Result<()> {
    let name = format!("snapshot-{:016x}.state", image.index);
    write_checked(storage, &name, SNAPSHOT_MAGIC, image)?;
    let mut old = snapshots(storage)?;
    old.pop();
    for name in old {
        match storage.remove(&name) {
            // Two threads save snapshots; the other may have been here.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn write_checked<T: Serialize>(
    storage: &dyn Storage,
    name: &str,
    magic: [u8; 8],
    value: &T,
) -> io::Result<()> {
    let body = postcard::to_allocvec(value).map_err(io::Error::other)?;
    let crc = crc32c::crc32c(&body).to_le_bytes();
    write_atomically(storage, name, &[&magic, &crc, &body])
}

fn read_checked<T: DeserializeOwned>(
    storage: &dyn Storage,
    name: &str,
    magic: [u8; 8],
) -> Result<T, DiskError> {
    let bytes = storage.read(name)?;
    let damaged = |what| DiskError::Damaged {
        path: storage.path(name),
        offset: 0,
        what,
    };
    let (head, body) = bytes
        .split_at_checked(12)
        .ok_or_else(|| damaged("it is cut off"))?;
    if head[..8] != magic {
        return Err(damaged("it is another kind of file, or of another version"));
    }
    if head[8..] != crc32c::crc32c(body).to_le_bytes() {
        return Err(damaged("its checksum does not match"));
    }
    postcard::from_bytes(body).map_err(|_| damaged("it cannot be read"))
}

/// The peers that have been seen with something on their disk. If one of them comes back with
/// nothing, it has forgotten what it promised.
#[derive(Debug)]
pub(super) struct KnownPeers {
    storage: Directory,
    ids: Mutex<BTreeSet<u64>>,
}

const KNOWN: &str = "known-peers";
const KNOWN_MAGIC: [u8; 8] = *b"UBCPEER\x02";

impl KnownPeers {
    pub(super) fn open(dir: &Path) -> Result<Self, DiskError> {
        let storage = Directory::new(dir);
        let ids = if dir.join(KNOWN).exists() {
            read_checked(&storage, KNOWN, KNOWN_MAGIC)?
        } else {
            BTreeSet::new()
        };
        Ok(Self {
            storage,
            ids: Mutex::new(ids),
        })
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.ids
            .lock()
            .expect("no thread panics while it holds this")
            .contains(&id)
    }

    /// Remembers a peer for good before it is listened to. Blocks for a moment, once for each peer.
    pub(super) fn note(&self, id: u64) -> io::Result<()> {
        let mut ids = self
            .ids
            .lock()
            .expect("no thread panics while it holds this");
        if ids.insert(id) {
            write_checked(&self.storage, KNOWN, KNOWN_MAGIC, &*ids)?;
        }
        Ok(())
    }
}
