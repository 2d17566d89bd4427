//! What is made from files, and made anew when they change.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::TlsError;

/// How often the files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells one content of a file from the next: inode, time of change in ns, length.
type Stamp = Option<(u64, i64, i64, u64)>;

struct State<T> {
    made: Option<T>,
    stamps: Vec<Stamp>,
    looked: Instant,
}

struct Inner<T> {
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    state: Mutex<State<T>>,
}

/// Cheap to clone: the clones share it.
pub(crate) struct Reloading<T>(Arc<Inner<T>>);

impl<T> Clone for Reloading<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Clone> Reloading<T> {
    /// Made at once.
    pub(crate) fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let this = Self::later(files, make);
        this.current()?;
        Ok(this)
    }

    /// Made when it is first asked for.
    pub(crate) fn later(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                made: None,
                stamps: Vec::new(),
                looked: Instant::now(),
            }),
            files,
            make: Box::new(make),
        }))
    }

    /// What the files make now, or made before they became unusable.
    pub(crate) fn current(&self) -> Result<T, TlsError> {
        // A panic while it is made leaves what was there.
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(made) = &state.made
            && now - state.looked < LOOK_EVERY
        {
            return Ok(made.clone());
        }
        state.looked = now;
        // Before they are read: what changes meanwhile is seen the next time.
        let stamps: Vec<Stamp> = self.0.files.iter().map(|file| stamp(file)).collect();
        if let Some(made) = &state.made
            && stamps == state.stamps
        {
            return Ok(made.clone());
        }
        match ((self.0.make)(), &state.made) {
            (Ok(made), before) => {
                if before.is_some() {
                    tracing::info!(files = ?self.0.files, "certificates changed and read again");
                }
                state.stamps = stamps;
                state.made = Some(made.clone());
                Ok(made)
            }
            (Err(error), Some(before)) => {
                tracing::warn!(%error, "changed certificates cannot be used; going on with the old");
                Ok(before.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Has the files looked at, however recently that was done.
    #[cfg(test)]
    pub(super) fn look_again(&self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.looked -= LOOK_EVERY;
    }
}

fn stamp(file: &Path) -> Stamp {
    let data = std::fs::metadata(file).ok()?;
    Some((data.ino(), data.mtime(), data.mtime_nsec(), data.len()))
}
