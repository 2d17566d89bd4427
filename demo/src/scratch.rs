//! The folder for everything that the demonstration writes while it runs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

const PREFIX: &str = "unbroken-demo-";

/// Marks a folder that is to stay after its process.
const KEPT: &str = "report.txt";

/// A folder under the system's temporary one, removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    keep: bool,
}

impl Scratch {
    /// Makes it, and removes those of processes that were killed.
    pub(crate) fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        remove_leftovers(&parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        // Left by a process that had the same number.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path, keep: false })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the logs stay, with the report, and nothing large.
    pub(crate) fn keep_logs(&mut self, report: &str) {
        self.keep = true;
        let _ = fs::write(self.path.join(KEPT), report);
        let _ = fs::remove_dir_all(self.path.join("files"));
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let Some(owner) = owner.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        let lives = Path::new("/proc").join(owner.to_string()).exists();
        if !lives && !entry.path().join(KEPT).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
