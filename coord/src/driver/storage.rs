//! What the log and the snapshots need of a file system, and the real one.
//!
//! All that they know of the disk goes through [`Storage`], so that a simulated disk can lose, tear
//! and damage what they write. What a caller may rely on is what a journalling file system promises
//! on Linux: bytes are durable after a sync of their file, names after a sync of the directory, and
//! after a *failed* sync nothing is known, not even if a later one succeeds.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// One flat directory of files.
pub(crate) trait Storage: fmt::Debug + Send + Sync {
    /// The names of all files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A whole file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// An empty file under this name, in the place of one that may be there.
    fn create(&self, name: &str) -> io::Result<Box<dyn StorageFile>>;
    /// A file that is there, for writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn StorageFile>>;
    /// Gives a file another name, in the place of one that may have it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Deletes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names durable: files created, renamed and deleted.
    fn sync_names(&self) -> io::Result<()>;
    /// Where a file is, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// A file open for writing.
pub(crate) trait StorageFile: Send {
    /// Writes at `offset`; what lies between the end and there is zero.
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Sets room aside, filled with zeros, so that writing there changes no metadata.
    fn allocate(&mut self, bytes: u64) -> io::Result<()>;
    /// Cuts the file off, or extends it with zeros.
    fn set_len(&mut self, bytes: u64) -> io::Result<()>;
    /// Makes the bytes durable, and the length if it is needed to read them.
    fn sync_data(&mut self) -> io::Result<()>;
    /// Makes the bytes and the length durable.
    fn sync_all(&mut self) -> io::Result<()>;
}

/// A directory of the real file system.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory must be there.
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    fn open_with(&self, name: &str, options: &OpenOptions) -> io::Result<Box<dyn StorageFile>> {
        let path = self.path(name);
        let file = options.open(&path).map_err(at(&path, "open"))?;
        Ok(Box::new(RealFile { path, file }))
    }
}

/// An error that says what could not be done to which file.
fn at<'a>(path: &'a Path, what: &'a str) -> impl Fn(io::Error) -> io::Error + 'a {
    move |error| {
        io::Error::new(
            error.kind(),
            format!("cannot {what} {}: {error}", path.display()),
        )
    }
}

impl Storage for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(at(&self.path, "list"))? {
            // Ours are all ASCII; others do not concern us.
            names.extend(entry?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let path = self.path(name);
        std::fs::read(&path).map_err(at(&path, "read"))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        self.open_with(name, options.create(true).truncate(true).write(true))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        self.open_with(name, OpenOptions::new().write(true))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let path = self.path(from);
        std::fs::rename(&path, self.path(to)).map_err(at(&path, "rename"))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name);
        std::fs::remove_file(&path).map_err(at(&path, "delete"))
    }

    fn sync_names(&self) -> io::Result<()> {
        let synced = File::open(&self.path).and_then(|dir| dir.sync_all());
        synced.map_err(at(&self.path, "make durable the names in"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

struct RealFile {
    path: PathBuf,
    file: File,
}

impl StorageFile for RealFile {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(at(&self.path, "write"))
    }

    fn allocate(&mut self, bytes: u64) -> io::Result<()> {
        let none = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&self.file, none, 0, bytes)
            .map_err(|error| at(&self.path, "allocate")(error.into()))
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.file
            .set_len(bytes)
            .map_err(at(&self.path, "cut to length"))
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.file
            .sync_data()
            .map_err(at(&self.path, "make durable"))
    }

    fn sync_all(&mut self) -> io::Result<()> {
        self.file.sync_all().map_err(at(&self.path, "make durable"))
    }
}

/// Writes a file so that it is there whole or not at all, and durable.
pub(super) fn write_atomically(
    storage: &dyn Storage,
    name: &str,
    parts: &[&[u8]],
) -> io::Result<()> {
    let temporary = format!("{name}{TEMPORARY}");
    let mut file = storage.create(&temporary)?;
    let mut offset = 0;
    for part in parts {
        file.write_all_at(part, offset)?;
        offset += part.len() as u64;
    }
    file.sync_all()?;
    storage.rename(&temporary, name)?;
    if planted!(SnapshotNotSynced) {
        return Ok(());
    }
    storage.sync_names()
}

/// Ends the names of files that were not finished.
pub(super) const TEMPORARY: &str = ".tmp";
