//! The threads that write and read the files.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mio::Waker;
use rustix::process::setpriority_process;
use tracing::{error, info};

use super::{For, Job, Place, Shared, Source, Stored};

/// After a failure the disk is tried again this often.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What is written to try it.
const TRIAL: &[u8] = &[0; 4096];

/// Starts the thread that writes files and removes them.
pub(super) fn writer(
    shared: Arc<Shared>,
    jobs: Receiver<Job>,
    waker: Arc<Waker>,
) -> io::Result<JoinHandle<()>> {
    spawn("history-write", move || {
        let mut number = 0_u64;
        let mut tried = Instant::now();
        loop {
            if tried.elapsed() >= TRY_AGAIN_AFTER {
                try_again(&shared);
                tried = Instant::now();
            }
            match jobs.recv_timeout(TRY_AGAIN_AFTER) {
                Ok(Job::Write(stored)) => {
                    // The connection may be over.
                    let Some(stored) = stored.upgrade() else {
                        continue;
                    };
                    number += 1;
                    let path = shared.folder.join(number.to_string());
                    if let Err(error) = keep(&shared, &stored, path) {
                        stored.failed.store(true, Ordering::Release);
                        shared.failed.store(true, Ordering::Release);
                        fail(&shared, "writing", &error);
                        wake(&waker);
                    }
                }
                Ok(Job::Remove(path)) => {
                    if let Err(error) = fs::remove_file(&path) {
                        fail(&shared, "removing a file of", &error);
                    }
                }
                Ok(Job::Read(..)) => unreachable!("the other thread's"),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    })
}

/// Starts the thread that reads files.
pub(super) fn reader(
    shared: Arc<Shared>,
    jobs: Receiver<Job>,
    tell: Sender<For>,
    waker: Arc<Waker>,
) -> io::Result<JoinHandle<()>> {
    spawn("history-read", move || {
        while let Ok(Job::Read(stored, slot, waiter)) = jobs.recv() {
            let Some(slot) = slot.upgrade() else { continue };
            let bytes = stored.read();
            if let Err(error) = &bytes {
                stored.failed.store(true, Ordering::Release);
                shared.failed.store(true, Ordering::Release);
                fail(&shared, "reading", error);
            }
            // It is set once, here.
            let _ = slot.bytes.set(bytes.ok());
            drop((slot, stored));
            if tell.send(waiter).is_err() {
                return;
            }
            wake(&waker);
        }
    })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        // The data plane, whose thread this one comes from, is more urgent.
        let _ = setpriority_process(None, 0);
        work();
    })
}

/// Writes what a `Stored` holds, and lets go of it.
fn keep(shared: &Shared, stored: &Stored, path: PathBuf) -> io::Result<()> {
    let bytes = stored
        .held()
        .expect("held until it is written, which is now");
    if let Err(error) = write(&path, &bytes) {
        // A part of it may be there.
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    let place = Place {
        source: Source::Named(path),
        offset: 0,
        checksum: crc32c::crc32c(&bytes),
    };
    assert!(stored.place.set(place).is_ok(), "it is written once");
    let held: Option<Bytes> = stored
        .held
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if held.is_some() {
        let len = bytes.len() as u64;
        shared.waiting.fetch_sub(len, Ordering::AcqRel);
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Not synced: a machine that loses power loses the connections too.
    File::create_new(path)?.write_all(bytes)
}

fn fail(shared: &Shared, doing: &str, cause: &io::Error) {
    let folder = shared.folder.display();
    error!(%folder, error = %cause, "{doing} the input history on disk");
    shared.set_alarm(Some(format!(
        "{doing} the input history in {folder}: {cause}"
    )));
}

/// The alarm ends when the disk takes something again.
fn try_again(shared: &Shared) {
    let alarm = shared
        .alarm
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some();
    if !alarm {
        return;
    }
    let path = shared.folder.join("trial");
    let tried = write(&path, TRIAL);
    let removed = fs::remove_file(&path);
    if tried.and(removed).is_ok() {
        shared.set_alarm(None);
        info!(folder = %shared.folder.display(), "the input history on disk works again");
    }
}

fn wake(waker: &Waker) {
    if let Err(error) = waker.wake() {
        error!(%error, "waking the data plane");
    }
}
