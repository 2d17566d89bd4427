//! A disk of a test's own, in memory and as small as it likes.

use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Makes the file system in a mount namespace of its own, and holds both until its input ends: the machine sees nothing of it.
const HOLD: &str =
    "mkdir -p data && mount -t tmpfs -o size=$1 tmpfs data && echo mounted && exec cat";

/// A file system of a bounded size, which is seen in its own mount namespace alone, and gone when this is dropped.
#[derive(Debug)]
pub struct Disk {
    holder: Child,
    folder: PathBuf,
}

impl Disk {
    /// Makes one of `bytes` bytes; in its namespace it is the folder `data` of `folder`. It takes the privilege to mount.
    ///
    /// # Errors
    /// It cannot be made: `unshare` (util-linux) or the privilege is missing.
    pub fn new(folder: &Path, bytes: u64) -> io::Result<Self> {
        let mut holder = Command::new("unshare")
            .args(["--mount", "sh", "-c", HOLD, "sh", &bytes.to_string()])
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let said = holder.stdout.take().map(BufReader::new);
        let disk = Self {
            holder,
            folder: std::path::absolute(folder)?.join("data"),
        };
        let mut line = String::new();
        if let Some(mut said) = said {
            said.read_line(&mut line)?;
        }
        if line != "mounted\n" {
            return Err(io::Error::other("the disk was not mounted"));
        }
        Ok(disk)
    }

    /// The process whose mount namespace it is in.
    pub fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// Where this process reaches it.
    pub fn path(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder()));
        root.join(self.folder.strip_prefix("/").unwrap_or(&self.folder))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It has ended already, or ends now.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
