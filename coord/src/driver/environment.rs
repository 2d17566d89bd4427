//! What a server runs on, for the four-letter words.

use std::path::{Path, PathBuf};

use crate::core::Surroundings;

/// What does not change while the server runs.
pub(super) struct Environment {
    pub(super) client_port: u16,
    pub(super) secure_client_port: Option<u16>,
    pub(super) data_dir: PathBuf,
}

impl Environment {
    /// Looks at the disk and the process.
    pub(super) fn now(&self) -> Surroundings {
        let (snapshot_bytes, log_bytes) = lengths(&self.data_dir);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let open_files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        Surroundings {
            client_port: self.client_port,
            secure_client_port: self.secure_client_port,
            data_dir: self.data_dir.display().to_string(),
            snapshot_bytes,
            log_bytes,
            open_files: u64::try_from(open_files).unwrap_or(u64::MAX),
            open_files_max: limit.current.unwrap_or(u64::MAX),
            environment: environment(),
        }
    }
}

fn environment() -> Vec<(&'static str, String)> {
    let system = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let folder = std::env::current_dir().unwrap_or_default();
    vec![
        ("host.name", text(system.nodename())),
        ("os.name", text(system.sysname())),
        ("os.arch", text(system.machine())),
        ("os.version", text(system.release())),
        ("user.dir", folder.display().to_string()),
    ]
}

/// Lengths of the snapshots and of the log, in bytes.
fn lengths(data_dir: &Path) -> (u64, u64) {
    let (mut snapshots, mut log) = (0, 0);
    for entry in std::fs::read_dir(data_dir).into_iter().flatten().flatten() {
        let length = entry.metadata().map_or(0, |metadata| metadata.len());
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("snapshot") {
            snapshots += length;
        } else {
            log += length;
        }
    }
    (snapshots, log)
}
