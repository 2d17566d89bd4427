use std::ops::Deref;
use std::sync::atomic::AtomicU32;
use std::thread;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};

use super::*;

/// A folder of files, for tests of what is kept there.
pub(crate) struct Disk {
    spill: Spill,
    poll: std::cell::RefCell<Poll>,
    folder: PathBuf,
}

impl Disk {
    pub(crate) fn new(bytes_max: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("unbroken-spill-{}-{number}", std::process::id());
        Self::at(std::env::temp_dir().join(name), bytes_max)
    }

    fn at(folder: PathBuf, bytes_max: u64) -> Self {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        Self {
            spill: Spill::open(folder.clone(), bytes_max, waker).unwrap(),
            poll: poll.into(),
            folder,
        }
    }

    /// Waits until the data plane would be woken, for something that was read.
    pub(crate) fn wait_loaded(&self) {
        let mut events = Events::with_capacity(1);
        while self.spill.poll_loaded().is_none() {
            let wait = Some(Duration::from_secs(30));
            self.poll.borrow_mut().poll(&mut events, wait).unwrap();
            assert!(!events.is_empty(), "nothing was read");
        }
    }

    pub(crate) fn wait_written(&self) {
        wait(|| self.spill.waiting_bytes() == 0);
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.folder).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Waits until no file is left.
    pub(crate) fn wait_empty(&self) {
        wait(|| self.files().is_empty());
    }

    /// Changes one byte of every file.
    pub(crate) fn damage(&self) {
        for path in self.files() {
            let mut bytes = fs::read(&path).unwrap();
            bytes[100] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
}

impl Deref for Disk {
    type Target = Spill;

    fn deref(&self) -> &Spill {
        &self.spill
    }
}

fn wait(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_stored_is_read_again_until_it_is_dropped() {
    let disk = Disk::new(1 << 20);
    let bytes = Bytes::from(vec![7; 10_000]);
    let stored = disk.store(bytes.clone()).unwrap();
    assert_eq!(disk.used_bytes(), 10_000);
    disk.wait_written();
    assert_eq!(
        (stored.held(), stored.read().unwrap()),
        (None, bytes.clone())
    );
    let loading = disk.load(&stored, For::Connection(ConnId(3))).unwrap();
    disk.wait_loaded();
    assert_eq!(loading.get(), Some(Ok(&bytes)));
    drop(stored);
    assert_eq!(disk.used_bytes(), 0);
    disk.wait_empty();
}

#[test]
fn the_disks_bound_holds() {
    let disk = Disk::new(20_000);
    let frame = || disk.store(Bytes::from(vec![7; 10_000]));
    let kept = [frame().unwrap(), frame().unwrap()];
    assert!(frame().is_none());
    drop(kept);
    assert!(frame().is_some());
    assert!(Disk::new(0).store(Bytes::from_static(b"x")).is_none());
}

#[test]
fn what_an_earlier_node_left_is_removed() {
    let first = Disk::new(1 << 20);
    let stored = first.store(Bytes::from_static(b"left")).unwrap();
    first.wait_written();
    let folder = first.folder.clone();
    // Killed: nothing is cleaned up.
    std::mem::forget((first, stored));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    let second = Disk::at(folder.clone(), 1 << 20);
    assert_eq!(second.files(), Vec::<PathBuf>::new());
    drop(second);
    assert!(!folder.exists(), "a node that ends leaves nothing");
}

#[test]
fn a_disk_that_takes_nothing_is_an_alarm_and_costs_no_byte() {
    let disk = Disk::new(1 << 20);
    // As good as full: no file can be made there.
    fs::remove_dir(&disk.folder).unwrap();
    let bytes = Bytes::from(vec![7; 10_000]);
    let stored = disk.store(bytes.clone()).unwrap();
    wait(|| stored.failed());
    assert!(disk.take_failed() && !disk.take_failed());
    assert_eq!(stored.held(), Some(bytes));
    let alarm = disk.alarm().unwrap();
    assert!(
        alarm.starts_with("writing the input history in "),
        "{alarm}"
    );
    // Nothing more is tried for the time being, and what fails is counted as long as it is kept.
    assert!(disk.store(Bytes::from_static(b"more")).is_none());
    assert_eq!(disk.waiting_bytes(), 10_000);
    drop(stored);
    assert_eq!((disk.waiting_bytes(), disk.used_bytes()), (0, 0));
    // The disk is tried again, and the alarm ends.
    fs::create_dir(&disk.folder).unwrap();
    wait(|| disk.alarm().is_none());
    assert!(disk.store(Bytes::from_static(b"more")).is_some());
}

#[test]
fn a_file_taken_is_its_pieces() {
    let path = std::env::temp_dir().join(format!("unbroken-taken-{}", std::process::id()));
    for length in [0, 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES] {
        let contents: Vec<u8> = (0..length)
            .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
            .collect();
        fs::write(&path, &contents).unwrap();
        let pieces = take(&path).unwrap();
        assert!(!path.exists());
        assert_eq!(total(&pieces), length as u64);
        let read: Vec<u8> = pieces.iter().flat_map(|p| p.read().unwrap()).collect();
        assert_eq!(read, contents);
    }
}

#[test]
fn a_disk_that_does_not_keep_up_says_so_before_it_refuses() {
    let disk = Disk::new(1 << 30);
    let frame = Bytes::from(vec![7; 8 << 20]);
    // As if the thread had come to none of it.
    disk.shared
        .waiting
        .fetch_add(WAITING_MUCH_BYTES + 1, Ordering::AcqRel);
    assert!(disk.is_behind() && disk.store(frame.clone()).is_some());
    disk.shared
        .waiting
        .fetch_add(WAITING_BYTES_MAX - WAITING_MUCH_BYTES, Ordering::AcqRel);
    assert!(disk.store(frame).is_none());
    disk.shared
        .waiting
        .fetch_sub(WAITING_BYTES_MAX + 1, Ordering::AcqRel);
    disk.wait_written();
    assert!(!disk.is_behind());
}

#[test]
fn not_more_is_read_than_is_used() {
    let disk = Disk::new(1 << 30);
    let frames = LOADED_BYTES_MAX / FRAME_BYTES as u64;
    let stored = disk.store(Bytes::from(vec![7; FRAME_BYTES])).unwrap();
    let conn = For::Connection(ConnId(1));
    let mut loading: Vec<_> = (0..frames)
        .map(|_| disk.load(&stored, conn).unwrap())
        .collect();
    assert!(disk.load(&stored, conn).is_none() && !disk.may_load());
    // The order of all inputs does not wait for connections.
    assert!(disk.load(&stored, For::All).is_some());
    loading.clear();
    wait(|| disk.may_load());
    assert!(disk.load(&stored, conn).is_some());
}
