//! The log on disk: what comes back after it was cut off, damaged, or swapped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::disk::{self, DiskError, Identity, KnownPeers, Opened};
use super::engine::{Input, inputs};
use super::storage::{Directory, Storage};
use super::wal::{Record, Replay, SEGMENT_BYTES, Wal};
use crate::quorum::{Conf, EntryKind, HardState, LogEntry, Recovered, SnapshotImage, Write};

struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "unbroken-wal-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const ID: u64 = 0x1234_5678_9abc_def0;

/// Opens a log as a server does.
fn open_wal(dir: &Path) -> Result<(Wal, Replay), DiskError> {
    let storage: Arc<dyn Storage> = Arc::new(Directory::new(dir));
    Wal::open(&storage, ID, SEGMENT_BYTES)
}

fn log_entry(index: u64, term: u64) -> LogEntry {
    LogEntry {
        kind: EntryKind::Normal,
        index,
        term,
        data: Bytes::from(vec![u8::try_from(index % 251).unwrap(); 40]),
    }
}

fn write(wal: &mut Wal, index: u64, term: u64) {
    let hard_state = HardState {
        term,
        vote: 1,
        commit: index - 1,
    };
    wal.append(&[
        Record::Hard(hard_state),
        Record::Entry(log_entry(index, term)),
    ])
    .unwrap();
}

/// The segment with the most frames in it (each opening begins a new one).
fn largest_segment(dir: &Path) -> PathBuf {
    let used = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0)
    };
    let files = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
        .max_by_key(used)
        .unwrap()
}

fn frame_starts(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len().saturating_sub(8))
        .step_by(8)
        .filter(|at| bytes[*at..at + 8] == ID.to_le_bytes())
        .collect()
}

#[test]
fn what_was_written_comes_back_across_segments() {
    let dir = TempDir::new();
    let mut all = Vec::new();
    for opening in 0..3 {
        let (mut wal, replay) = open_wal(&dir.0).unwrap();
        assert_eq!(replay.entries, all);
        for index in opening * 5 + 1..=opening * 5 + 5 {
            write(&mut wal, index, 1);
            all.push(log_entry(index, 1));
        }
    }
    // Entries of a new term replace what stood there.
    let (mut wal, _) = open_wal(&dir.0).unwrap();
    write(&mut wal, 12, 2);
    drop(wal);
    all.truncate(11);
    all.push(log_entry(12, 2));
    let (_, replay) = open_wal(&dir.0).unwrap();
    assert_eq!(replay.entries, all);
    assert_eq!(
        replay.hard_state,
        HardState {
            term: 2,
            vote: 1,
            commit: 11
        }
    );
}

#[test]
fn large_logs_roll_and_are_trimmed() {
    let dir = TempDir::new();
    let (mut wal, _) = open_wal(&dir.0).unwrap();
    let data = Bytes::from(vec![7; 4 << 20]);
    for index in 1..=9 {
        let data = data.clone();
        wal.append(&[Record::Entry(LogEntry {
            kind: EntryKind::Normal,
            index,
            term: 1,
            data,
        })])
        .unwrap();
    }
    let count = |dir: &Path| std::fs::read_dir(dir).unwrap().count();
    assert_eq!(count(&dir.0), 3 + 1, "four of these fill a segment");
    wal.trim(5).unwrap();
    assert_eq!(count(&dir.0), 2 + 1);
    write(&mut wal, 10, 1);
    drop(wal);
    let (_, replay) = open_wal(&dir.0).unwrap();
    assert_eq!(
        replay.entries.iter().map(|e| e.index).collect::<Vec<_>>(),
        [5, 6, 7, 8, 9, 10]
    );
}

#[test]
fn an_unfinished_write_is_cut_off_wherever_it_stopped() {
    let dir = TempDir::new();
    let (mut wal, _) = open_wal(&dir.0).unwrap();
    (1..=4).for_each(|index| write(&mut wal, index, 1));
    drop(wal);
    let path = largest_segment(&dir.0);
    let whole = std::fs::read(&path).unwrap();
    let last = *frame_starts(&whole).last().unwrap();
    let end = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    for stop in last..end {
        let copy = TempDir::new();
        let mut torn = whole.clone();
        torn[stop..].fill(0);
        std::fs::write(copy.0.join(path.file_name().unwrap()), &torn).unwrap();
        std::fs::copy(dir.0.join("mark"), copy.0.join("mark")).unwrap();
        let (mut wal, replay) = open_wal(&copy.0).unwrap();
        assert_eq!(replay.entries.len(), 3, "cut at {stop}");
        // And the log goes on from there.
        write(&mut wal, 4, 2);
        drop(wal);
        let (_, replay) = open_wal(&copy.0).unwrap();
        assert_eq!(replay.entries.last(), Some(&log_entry(4, 2)));
    }
}

#[test]
fn damage_before_the_end_is_refused() {
    let dir = TempDir::new();
    let (mut wal, _) = open_wal(&dir.0).unwrap();
    (1..=4).for_each(|index| write(&mut wal, index, 1));
    drop(wal);
    let path = largest_segment(&dir.0);
    let whole = std::fs::read(&path).unwrap();
    let starts = frame_starts(&whole);
    assert_eq!(starts.len(), 5, "a head and four writes");
    for place in starts[1]..starts[4] {
        let copy = TempDir::new();
        let mut damaged = whole.clone();
        damaged[place] ^= 0x10;
        std::fs::write(copy.0.join(path.file_name().unwrap()), &damaged).unwrap();
        std::fs::copy(dir.0.join("mark"), copy.0.join("mark")).unwrap();
        let opened = open_wal(&copy.0).map(|(_, replay)| replay.entries);
        let padding = (1..5).any(|frame| {
            let length = &whole[starts[frame] + 16..starts[frame] + 20];
            let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
            let end = starts[frame] + 32 + length;
            (starts[frame] + 28..starts[frame] + 32).contains(&place)
                || (end..end.next_multiple_of(8)).contains(&place)
        });
        match opened {
            Err(DiskError::Damaged { .. }) => assert!(!padding, "byte {place}"),
            Ok(entries) => {
                assert!(padding, "byte {place} was damaged and nobody noticed");
                assert_eq!(entries.len(), 4);
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_write_that_is_missing_is_noticed() {
    let dir = TempDir::new();
    let (mut wal, _) = open_wal(&dir.0).unwrap();
    for term in 1..=3 {
        // A vote: no index shows that it is gone.
        wal.append(&[Record::Hard(HardState {
            term,
            vote: 1,
            commit: 0,
        })])
        .unwrap();
    }
    drop(wal);
    let path = largest_segment(&dir.0);
    let whole = std::fs::read(&path).unwrap();
    let starts = frame_starts(&whole);
    let mut cut = whole[..starts[2]].to_vec();
    cut.extend_from_slice(&whole[starts[3]..]);
    std::fs::write(&path, &cut).unwrap();
    assert!(matches!(open_wal(&dir.0), Err(DiskError::Damaged { .. })));
}

/// The bytes of the log's files as a server leaves them that has written four entries, and where the
/// last of their frames begins.
fn four_entries_marked(dir: &Path) -> (PathBuf, Vec<u8>, usize) {
    let (mut wal, _) = open_wal(dir).unwrap();
    for index in 1..=4 {
        write(&mut wal, index, 1);
        wal.write_mark().unwrap();
    }
    drop(wal);
    let path = largest_segment(dir);
    let whole = std::fs::read(&path).unwrap();
    let last = *frame_starts(&whole).last().unwrap();
    (path, whole, last)
}

#[test]
fn damage_to_the_newest_frame_is_told_from_a_torn_write() {
    let dir = TempDir::new();
    let (path, whole, last) = four_entries_marked(&dir.0);
    // Flipped bits, zeros, and a write that went elsewhere: it was durable, so it is not cut off.
    let mut flipped = whole.clone();
    flipped[last + 40] ^= 1;
    let mut gone = whole.clone();
    gone[last..].fill(0);
    for damaged in [&flipped, &gone, &whole[..last].to_vec()] {
        std::fs::write(&path, damaged).unwrap();
        let refused = open_wal(&dir.0).map(|(_, replay)| replay.entries);
        assert!(
            matches!(refused, Err(DiskError::Damaged { .. })),
            "{refused:?}"
        );
    }
    std::fs::write(&path, &whole).unwrap();
    let (_, replay) = open_wal(&dir.0).unwrap();
    assert_eq!(replay.entries.len(), 4);
}

#[test]
fn a_torn_mark_leaves_the_one_of_the_opening() {
    let dir = TempDir::new();
    let (path, whole, last) = four_entries_marked(&dir.0);
    let mark = dir.0.join("mark");
    let sound = std::fs::read(&mark).unwrap();
    let mut torn = sound.clone();
    torn[512 + 20] ^= 1;
    std::fs::write(&mark, &torn).unwrap();
    let mut cut = whole.clone();
    cut[last + 8..].fill(0);
    std::fs::write(&path, &cut).unwrap();
    let (_, replay) = open_wal(&dir.0).unwrap();
    assert_eq!(replay.entries.len(), 3);
    // With neither, or without the file, nothing is known.
    let refused = |bytes: Option<&[u8]>| {
        match bytes {
            Some(bytes) => std::fs::write(&mark, bytes).unwrap(),
            None => std::fs::remove_file(&mark).unwrap(),
        }
        let opened = open_wal(&dir.0).map(|(_, replay)| replay.entries);
        assert!(
            matches!(opened, Err(DiskError::Damaged { .. })),
            "{opened:?}"
        );
    };
    torn[20] ^= 1;
    refused(Some(&torn));
    refused(Some(&[]));
    refused(None);
}

fn servers() -> BTreeMap<u64, String> {
    BTreeMap::from([
        (1, "a".to_owned()),
        (2, "b".to_owned()),
        (3, "c".to_owned()),
    ])
}

fn open(dir: &Path, name: &str) -> Result<Opened, DiskError> {
    let identity = Identity {
        log_id: ID,
        name: name.to_owned(),
        id: 1,
        founders: servers(),
    };
    disk::claim(dir, name)?.open(identity)
}

fn image(index: u64) -> SnapshotImage {
    let data = crate::snapshot::encode(&crate::txn::State::default());
    SnapshotImage {
        index,
        term: 1,
        conf: Conf {
            voters: [1, 2, 3].into(),
            learners: [].into(),
        },
        data,
    }
}

/// Opens the directory, has these written, and reads it again.
fn written(dir: &Path, writes: Vec<Write>, save: Option<SnapshotImage>) -> Recovered {
    let (engine, queue) = inputs().unwrap();
    let disk = open(dir, "a").unwrap().start(&engine).unwrap();
    let count = u64::try_from(writes.len()).unwrap();
    for (token, write) in (1..).zip(writes) {
        disk.write(token, write);
    }
    let saving = save.is_some();
    if let Some(image) = save {
        disk.save(image);
    }
    let (mut persisted, mut saved) = (0, !saving);
    while persisted < count || !saved {
        match queue.recv().unwrap() {
            Input::Persisted(token) => persisted = token,
            Input::Saved(_) => saved = true,
            Input::DiskFailed(error) => panic!("{error}"),
            _ => {}
        }
    }
    drop(disk);
    open(dir, "a").unwrap().recovered
}

fn entries(range: std::ops::RangeInclusive<u64>) -> Write {
    let entries = range.map(|index| log_entry(index, 1)).collect();
    let hard_state = Some(HardState {
        term: 1,
        vote: 2,
        commit: 0,
    });
    Write {
        snapshot: None,
        hard_state,
        entries,
    }
}

#[test]
fn a_server_recovers_its_snapshot_and_what_came_after() {
    let dir = TempDir::new();
    let recovered = written(&dir.0, vec![entries(1..=3), entries(4..=8)], Some(image(5)));
    assert_eq!(recovered.snapshot, Some(image(5)));
    assert_eq!(
        recovered
            .entries
            .iter()
            .map(|e| e.index)
            .collect::<Vec<_>>(),
        [6, 7, 8]
    );
    assert_eq!(
        recovered.hard_state,
        HardState {
            term: 1,
            vote: 2,
            commit: 0
        }
    );
}

#[test]
fn a_leaders_snapshot_replaces_the_log() {
    let dir = TempDir::new();
    let installed = Write {
        snapshot: Some(image(20)),
        hard_state: None,
        entries: vec![],
    };
    let recovered = written(
        &dir.0,
        vec![entries(1..=8), installed, entries(21..=22)],
        None,
    );
    assert_eq!(recovered.snapshot, Some(image(20)));
    assert_eq!(
        recovered
            .entries
            .iter()
            .map(|e| e.index)
            .collect::<Vec<_>>(),
        [21, 22]
    );
}

#[test]
fn a_snapshot_that_was_saved_and_not_yet_noted_stands() {
    let dir = TempDir::new();
    written(&dir.0, vec![entries(1..=8)], None);
    // The machine stopped between the two.
    let other = TempDir::new();
    let installed = Write {
        snapshot: Some(image(20)),
        hard_state: None,
        entries: vec![],
    };
    written(&other.0, vec![installed], None);
    let name = "snapshot-0000000000000014.state";
    std::fs::copy(other.0.join(name), dir.0.join(name)).unwrap();
    let recovered = written(&dir.0, vec![entries(21..=21)], None);
    assert_eq!(recovered.snapshot, Some(image(20)));
    assert_eq!(
        recovered
            .entries
            .iter()
            .map(|e| e.index)
            .collect::<Vec<_>>(),
        [21]
    );
}

#[test]
fn a_snapshot_does_not_go_on_in_another_leaders_log() {
    let dir = TempDir::new();
    // The log has entries of term 0 beyond the snapshot of term 1, which replaced them.
    let stale = Write {
        snapshot: None,
        hard_state: None,
        entries: (1..=25).map(|index| log_entry(index, 0)).collect(),
    };
    written(&dir.0, vec![stale], None);
    let other = TempDir::new();
    let installed = Write {
        snapshot: Some(image(20)),
        hard_state: None,
        entries: vec![],
    };
    written(&other.0, vec![installed], None);
    let name = "snapshot-0000000000000014.state";
    std::fs::copy(other.0.join(name), dir.0.join(name)).unwrap();
    // What was being written when the machine stopped is cleared away.
    std::fs::write(dir.0.join("snapshot-0000000000000030.state.tmp"), [1; 9]).unwrap();
    for _ in 0..2 {
        let recovered = open(&dir.0, "a").unwrap().recovered;
        assert_eq!(recovered.snapshot, Some(image(20)));
        assert_eq!(recovered.entries, []);
    }
    let left = std::fs::read_dir(&dir.0).unwrap();
    let mut left = left.map(|entry| entry.unwrap().path());
    assert!(!left.any(|path| path.extension().is_some_and(|ext| ext == "tmp")));
}

#[test]
fn a_lost_or_damaged_snapshot_is_not_passed_over() {
    let dir = TempDir::new();
    let installed = Write {
        snapshot: Some(image(20)),
        hard_state: None,
        entries: vec![],
    };
    written(&dir.0, vec![installed, entries(21..=22)], None);
    let path = dir.0.join("snapshot-0000000000000014.state");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let refused = open(&dir.0, "a").map(|opened| opened.recovered);
    assert!(
        matches!(refused, Err(DiskError::Damaged { .. })),
        "{refused:?}"
    );
    std::fs::remove_file(&path).unwrap();
    let refused = open(&dir.0, "a").map(|opened| opened.recovered);
    assert!(
        matches!(refused, Err(DiskError::Damaged { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_directory_has_one_server() {
    let dir = TempDir::new();
    let opened = open(&dir.0, "a").unwrap();
    let second = open(&dir.0, "a").map(|opened| opened.recovered);
    assert!(
        matches!(second, Err(DiskError::Locked { .. })),
        "{second:?}"
    );
    drop(opened);
    let other = open(&dir.0, "b").map(|opened| opened.recovered);
    assert!(matches!(other, Err(DiskError::NotOurs { .. })), "{other:?}");
}

#[test]
fn known_peers_are_known_for_good() {
    let dir = TempDir::new();
    let known = KnownPeers::open(&dir.0).unwrap();
    assert!(!known.contains(2));
    known.note(2).unwrap();
    known.note(2).unwrap();
    let known = KnownPeers::open(&dir.0).unwrap();
    assert!(known.contains(2) && !known.contains(3));
}
