//! What a server keeps on disk, and the threads that write it.
//!
//! ```text
//! data_dir/lock              held while a server runs
//! data_dir/identity          which server this is, of which cluster
//! data_dir/known-peers        peers that were seen with something on their disk
//! data_dir/wal-*.log         the log: see `wal`
//! data_dir/snapshot-*.state  the newest snapshot
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::engine::{Input, InputSender};
use super::wal::{FRAME_BYTES_MAX, Record, Wal, write_atomically};
use crate::quorum::{Recovered, SnapshotImage, Write};

/// What is wrong with the data directory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The system refused an operation.
    #[error("the data directory cannot be read or written: {0}")]
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
    /// The directory belongs to another server, or the set of servers was changed.
    #[error(
        "the data directory is that of server {found} of {found_servers:?}, not of {expected} of \
         {expected_servers:?}"
    )]
    NotOurs {
        /// Server that wrote it.
        found: String,
        /// Its cluster.
        found_servers: Vec<String>,
        /// Server that was configured.
        expected: String,
        /// Its cluster.
        expected_servers: Vec<String>,
    },
}

/// Which server a directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Random; marks the frames of this log.
    pub(super) log_id: u64,
    pub(super) name: String,
    pub(super) servers: BTreeMap<u64, String>,
}

const IDENTITY_MAGIC: [u8; 8] = *b"UBCID\0\0\x01";
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
    /// Unlocks when it is dropped, last.
    _lock: File,
}

/// A directory that was read and checked, and is not written to yet.
pub(super) struct Opened {
    dir: PathBuf,
    wal: Wal,
    lock: File,
    pub(super) recovered: Recovered,
}

/// A directory that is ours alone, and was not read yet.
pub(super) struct Claimed {
    dir: PathBuf,
    lock: File,
    /// None if no server has been here.
    identity: Option<Identity>,
}

/// Takes the directory, and makes it if it is not there.
pub(super) fn claim(
    dir: &Path,
    name: &str,
    servers: &BTreeMap<u64, String>,
) -> Result<Claimed, DiskError> {
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
    let path = dir.join("identity");
    let identity = if path.exists() {
        let found: Identity = read_checked(&path, IDENTITY_MAGIC)?;
        if found.name != name || found.servers != *servers {
            return Err(DiskError::NotOurs {
                found: found.name,
                found_servers: found.servers.into_values().collect(),
                expected: name.to_owned(),
                expected_servers: servers.values().cloned().collect(),
            });
        }
        Some(found)
    } else {
        None
    };
    Ok(Claimed {
        dir: dir.to_owned(),
        lock,
        identity,
    })
}

impl Claimed {
    /// Whether no server has been running here: its disk is new, or was lost.
    pub(super) fn is_fresh(&self) -> bool {
        self.identity.is_none()
    }

    /// Reads the directory. A fresh one becomes that of `new`.
    pub(super) fn open(self, new: Identity) -> Result<Opened, DiskError> {
        let Self {
            dir,
            lock,
            identity,
        } = self;
        let identity = match identity {
            Some(identity) => identity,
            None => {
                write_checked(&dir.join("identity"), IDENTITY_MAGIC, &new)?;
                new
            }
        };
        let (wal, recovered) = read(&dir, identity.log_id)?;
        Ok(Opened {
            dir,
            wal,
            lock,
            recovered,
        })
    }
}

fn read(dir: &Path, log_id: u64) -> Result<(Wal, Recovered), DiskError> {
    let snapshot = match newest_snapshot(dir)? {
        Some(path) => Some(read_checked::<SnapshotImage>(&path, SNAPSHOT_MAGIC)?),
        None => None,
    };
    let (mut wal, replay) = Wal::open(dir, log_id)?;
    let base = snapshot.as_ref().map_or(0, |image| image.index);
    let mut entries = replay.entries;
    if entries.last().is_some_and(|entry| entry.index < base) {
        // Stopped between saving a leader's snapshot and noting it in the log.
        wal.append(&[Record::Reset { index: base }])?;
    }
    entries.retain(|entry| entry.index > base);
    let gap = entries.first().is_some_and(|entry| entry.index != base + 1);
    if replay.reset > base || gap {
        return Err(DiskError::Damaged {
            path: dir.to_owned(),
            offset: 0,
            what: "the log begins after the newest snapshot ends",
        });
    }
    let recovered = Recovered {
        snapshot,
        hard_state: replay.hard_state,
        entries,
    };
    Ok((wal, recovered))
}

impl Opened {
    /// Starts the threads. They tell `engine` what is durable.
    pub(super) fn start(self, engine: &InputSender) -> io::Result<Disk> {
        let Self {
            dir,
            wal,
            lock,
            recovered: _,
        } = self;
        let (jobs, job_queue) = channel();
        let (snapshots, snapshot_queue) = channel();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run)
        };
        let (to_engine, log_dir) = (engine.clone(), dir.clone());
        let writer = move || {
            if let Err(error) = write_log(wal, &log_dir, &job_queue, &to_engine) {
                to_engine.send_blocking(Input::DiskFailed(error));
            }
        };
        let (to_engine, trims) = (engine.clone(), jobs.clone());
        let saver = move || {
            if let Err(error) = save_snapshots(&dir, &snapshot_queue, &trims, &to_engine) {
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

fn write_log(
    mut wal: Wal,
    dir: &Path,
    jobs: &Receiver<Job>,
    engine: &InputSender,
) -> io::Result<()> {
    while let Ok(first) = jobs.recv() {
        // Everything that has come meanwhile shares one frame, and so one fdatasync.
        let mut next = Some(first);
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut durable = None;
        while let Some(job) = next.take() {
            match job {
                Job::Trim(index) => wal.trim(index)?,
                Job::Write { token, write } => {
                    if let Some(image) = write.snapshot {
                        save_snapshot(dir, &image)?;
                        records.push(Record::Reset { index: image.index });
                    }
                    records.extend(write.hard_state.map(Record::Hard));
                    bytes += write
                        .entries
                        .iter()
                        .map(|entry| entry.data.len())
                        .sum::<usize>();
                    records.extend(write.entries.into_iter().map(Record::Entry));
                    durable = Some(token);
                }
            }
            if bytes < FRAME_BYTES_MAX / 16 {
                next = jobs.try_recv().ok();
            }
        }
        if let Some(token) = durable {
            wal.append(&records)?;
            engine.send_blocking(Input::Persisted(token));
        }
    }
    Ok(())
}

fn save_snapshots(
    dir: &Path,
    snapshots: &Receiver<SnapshotImage>,
    log: &Sender<Job>,
    engine: &InputSender,
) -> io::Result<()> {
    while let Ok(image) = snapshots.recv() {
        save_snapshot(dir, &image)?;
        // The log's thread may have saved a newer one that came from the leader; then this was
        // deleted again at once, and the newer one stands for it.
        let _ = log.send(Job::Trim(image.index));
        engine.send_blocking(Input::Saved(image.index));
    }
    Ok(())
}

fn snapshot_path(dir: &Path, index: u64) -> PathBuf {
    dir.join(format!("snapshot-{index:016x}.state"))
}

fn snapshots(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.starts_with("snapshot-") && name.ends_with(".state") {
            found.push(path);
        }
    }
    // The index has a fixed width, so the order of names is the order of indexes.
    found.sort();
    Ok(found)
}

fn newest_snapshot(dir: &Path) -> io::Result<Option<PathBuf>> {
    Ok(snapshots(dir)?.pop())
}

fn save_snapshot(dir: &Path, image: &SnapshotImage) -> io::Result<()> {
    write_checked(&snapshot_path(dir, image.index), SNAPSHOT_MAGIC, image)?;
    let mut old = snapshots(dir)?;
    old.pop();
    for path in old {
        match std::fs::remove_file(path) {
            // Two threads save snapshots; the other may have been here.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn write_checked<T: Serialize>(path: &Path, magic: [u8; 8], value: &T) -> io::Result<()> {
    let body = postcard::to_allocvec(value).map_err(io::Error::other)?;
    write_atomically(path, &[&magic, &crc32c::crc32c(&body).to_le_bytes(), &body])
}

fn read_checked<T: DeserializeOwned>(path: &Path, magic: [u8; 8]) -> Result<T, DiskError> {
    let bytes = std::fs::read(path)?;
    let damaged = |what| DiskError::Damaged {
        path: path.to_owned(),
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

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The peers that have been seen with something on their disk. If one of them comes back with
/// nothing, it has forgotten what it promised.
#[derive(Debug)]
pub(super) struct KnownPeers {
    path: PathBuf,
    names: Mutex<BTreeSet<String>>,
}

const KNOWN_MAGIC: [u8; 8] = *b"UBCPEER\x01";

impl KnownPeers {
    pub(super) fn open(dir: &Path) -> Result<Self, DiskError> {
        let path = dir.join("known-peers");
        let names = if path.exists() {
            read_checked(&path, KNOWN_MAGIC)?
        } else {
            BTreeSet::new()
        };
        Ok(Self {
            path,
            names: Mutex::new(names),
        })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names
            .lock()
            .expect("no thread panics while it holds this")
            .contains(name)
    }

    /// Remembers a peer for good before it is listened to. Blocks for a moment, once for each peer.
    pub(super) fn note(&self, name: &str) -> io::Result<()> {
        let mut names = self
            .names
            .lock()
            .expect("no thread panics while it holds this");
        if names.insert(name.to_owned()) {
            write_checked(&self.path, KNOWN_MAGIC, &*names)?;
        }
        Ok(())
    }
}
