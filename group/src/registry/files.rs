//! The two znodes as files: for several processes of one machine, without a coordinator.

use super::{Answer, CasResult, ReadResult, Registry, RegistryReply, write};
use crate::process::Request;
use bytes::{Buf, Bytes};
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

/// Two files in a directory, under a lock that ends with its holder.
///
/// For processes of one machine, on a file system that has `flock`: not for a network. What is written is on disk before
/// it is answered. It fails with its machine, as all its users do.
///
/// Files are read and written by a thread of their own: a process that is stopped while it holds the lock holds up the
/// other nodes' answers, not their threads.
pub struct FileRegistry {
    requests: mpsc::Sender<(Request, Answer)>,
}

impl FileRegistry {
    /// In this directory, which is made if there is none. All nodes of the site name the same one.
    ///
    /// # Errors
    /// What the system says about the directory, its files or the thread.
    pub fn open(directory: impl AsRef<Path>) -> io::Result<Self> {
        let directory = directory.as_ref().to_owned();
        std::fs::create_dir_all(&directory)?;
        let files = Files::open(&directory)?;
        let (requests, receiver) = mpsc::channel::<(Request, Answer)>();
        std::thread::Builder::new()
            .name("group registry".into())
            .spawn(move || {
                for (request, answer) in receiver {
                    match files.carry_out(request) {
                        Ok(reply) => answer.send(reply),
                        // Dropped, the answer says that the outcome is unknown.
                        Err(error) => {
                            tracing::warn!(%error, directory = %directory.display(), "registry");
                        }
                    }
                }
            })?;
        Ok(Self { requests })
    }
}

impl Registry for FileRegistry {
    fn request(&mut self, request: Request, answer: Answer) {
        // A thread that is gone drops the answer.
        let _ = self.requests.send((request, answer));
    }
}

/// Each is a version, a checksum, and the contents.
struct Files {
    lock: File,
    view: PathBuf,
    lease: PathBuf,
    directory: File,
}

type Node = Option<(Bytes, i32)>;

impl Files {
    fn open(directory: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(false);
        Ok(Self {
            lock: options.open(directory.join("lock"))?,
            view: directory.join("view"),
            lease: directory.join("lease"),
            directory: File::open(directory)?,
        })
    }

    fn carry_out(&self, request: Request) -> io::Result<RegistryReply> {
        flock(&self.lock, FlockOperation::LockExclusive)?;
        let reply = self.under_lock(request);
        flock(&self.lock, FlockOperation::Unlock)?;
        reply
    }

    fn under_lock(&self, request: Request) -> io::Result<RegistryReply> {
        let mut view = read(&self.view)?;
        let version = view.as_ref().map(|(_, v)| *v);
        Ok(match request {
            Request::ReadView => RegistryReply::View(found(view)),
            Request::ReadLease => RegistryReply::Lease(found(read(&self.lease)?)),
            Request::CompareAndSet {
                expected_version,
                value,
            } => {
                let may = version == expected_version;
                RegistryReply::Cas(self.replace(&self.view, &mut view, may, value)?)
            }
            Request::RenewLease {
                view_version,
                value,
            } => {
                let may = version == Some(view_version);
                let mut lease = read(&self.lease)?;
                RegistryReply::Renew(self.replace(&self.lease, &mut lease, may, value)?)
            }
        })
    }

    /// Writes a new file in the place of the old: whoever dies meanwhile leaves one or the other.
    fn replace(
        &self,
        path: &Path,
        node: &mut Node,
        may: bool,
        value: Bytes,
    ) -> io::Result<CasResult> {
        let result = write(node, may, value);
        if let (CasResult::Written { version }, Some((value, _))) = (&result, node) {
            let new = path.with_extension("new");
            let mut file = File::create(&new)?;
            file.write_all(&version.to_le_bytes())?;
            file.write_all(&crc32c::crc32c(value).to_le_bytes())?;
            file.write_all(value)?;
            file.sync_all()?;
            std::fs::rename(&new, path)?;
            self.directory.sync_all()?;
        }
        Ok(result)
    }
}

fn found(node: Node) -> ReadResult {
    node.map_or(ReadResult::Absent, |(value, version)| ReadResult::Value {
        value,
        version,
    })
}

fn read(path: &Path) -> io::Result<Node> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let value = parse(bytes.into());
    let damaged = || io::Error::other(format!("{} is damaged", path.display()));
    Ok(Some(value.ok_or_else(damaged)?))
}

fn parse(mut bytes: Bytes) -> Option<(Bytes, i32)> {
    let version = bytes.try_get_i32_le().ok()?;
    let sum = bytes.try_get_u32_le().ok()?;
    (crc32c::crc32c(&bytes) == sum).then_some((bytes, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_conditional_and_outlive_who_wrote() {
        let dir = std::env::temp_dir().join(format!("unbroken-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let set = |expected_version, value: &'static [u8]| Request::CompareAndSet {
            expected_version,
            value: value.into(),
        };
        let done = |request| Files::open(&dir).unwrap().carry_out(request).unwrap();
        let written = |version| RegistryReply::Cas(CasResult::Written { version });
        assert_eq!(
            done(Request::ReadView),
            RegistryReply::View(ReadResult::Absent)
        );
        assert_eq!(done(set(None, b"one")), written(0));
        assert_eq!(
            done(set(None, b"two")),
            RegistryReply::Cas(CasResult::BadVersion)
        );
        assert_eq!(done(set(Some(0), b"two")), written(1));
        let renew = |view_version| Request::RenewLease {
            view_version,
            value: "l".into(),
        };
        assert_eq!(done(renew(0)), RegistryReply::Renew(CasResult::BadVersion));
        let renewed = RegistryReply::Renew(CasResult::Written { version: 0 });
        assert_eq!(done(renew(1)), renewed);
        let value = ReadResult::Value {
            value: "two".into(),
            version: 1,
        };
        assert_eq!(done(Request::ReadView), RegistryReply::View(value));
        let mut bytes = std::fs::read(dir.join("view")).unwrap();
        bytes[9] ^= 1;
        std::fs::write(dir.join("view"), bytes).unwrap();
        let error = Files::open(&dir).unwrap().carry_out(Request::ReadView);
        assert!(error.unwrap_err().to_string().contains("view is damaged"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
