//! Files as bytes that are shared and not held in memory: the kernel reads them when they are used,
//! and drops them again when memory is short.
#![expect(
    unsafe_code,
    reason = "a mapped file must not change, which no type can say"
)]

use std::fs::{self, File};
use std::io;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

/// The contents of a file of ours, which loses its name: it lives as long as the bytes.
///
/// # Errors
/// It cannot be read.
pub(crate) fn take(path: &Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    fs::remove_file(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the file has no name any more and is closed by whoever wrote it (a program of the user
    // that has ended, or ourselves), so nobody changes or truncates it while it is mapped.
    let map = unsafe { Mmap::map(&file)? };
    Ok(Bytes::from_owner(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_outlive_the_name() {
        let path = std::env::temp_dir().join(format!("unbroken-mapped-{}", std::process::id()));
        for contents in [&b"what was written"[..], b""] {
            fs::write(&path, contents).unwrap();
            let bytes = take(&path).unwrap();
            assert!(!path.exists());
            assert_eq!(bytes.slice(..), contents);
        }
    }
}
