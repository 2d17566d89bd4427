//! The real log and snapshots on the simulated disk, stopped at every operation.

use bytes::Bytes;

use super::server::{Clock, Job, Server};
use crate::quorum::{Conf, EntryKind, HardState, LogEntry, SnapshotImage, Write};

fn server(seed: u64) -> Server {
    let clock = Clock {
        offset_us: 0,
        rate_ppm: 1_000_000,
        wall_ms: 0,
    };
    Server::new(seed, clock)
}

fn entries(term: u64, indexes: std::ops::RangeInclusive<u64>) -> Write {
    let first = *indexes.start();
    let entry = |index| LogEntry {
        index,
        term,
        kind: EntryKind::Normal,
        // Some larger than a sector.
        data: Bytes::from(vec![7; usize::try_from(index % 5 * 300 + 1).unwrap()]),
    };
    Write {
        snapshot: None,
        hard_state: Some(HardState {
            term,
            vote: 1,
            commit: first - 1,
        }),
        entries: indexes.map(entry).collect(),
    }
}

fn image(index: u64, term: u64) -> SnapshotImage {
    SnapshotImage {
        index,
        term,
        conf: Conf::default(),
        data: Bytes::from(vec![9; 700]),
    }
}

fn start(server: &mut Server) -> Result<(), String> {
    let recovered = server.recover().map_err(|error| error.to_string())?;
    server.accept(&recovered)
}

fn write(server: &mut Server, write: Write) -> std::io::Result<()> {
    server.writing = vec![Job::Write { token: 1, write }];
    server.write_log().map(drop)
}

/// Entries over several segments, a new leader's in the place of an old one's, a snapshot of its own,
/// one of a leader's, and what comes after.
fn life(server: &mut Server) -> std::io::Result<()> {
    for index in 1..=20 {
        write(server, entries(1, index..=index))?;
    }
    write(server, entries(1, 21..=30))?;
    write(server, entries(2, 25..=27))?;
    server.saving = Some(image(22, 1));
    server.save()?;
    server.writing = server.jobs.drain(..).collect();
    server.write_log()?;
    write(server, entries(2, 28..=60))?;
    let installed = Write {
        snapshot: Some(image(50, 3)),
        ..entries(3, 51..=52)
    };
    write(server, installed)?;
    for index in 53..=56 {
        write(server, entries(3, index..=index))?;
    }
    Ok(())
}

#[test]
fn a_disk_that_stops_at_any_operation_holds_what_was_confirmed() {
    for seed in 0..8 {
        for power in [true, false] {
            let mut survived = false;
            for operations in 0..400 {
                let mut server = server(seed);
                server.disk.stop_after(operations);
                // The first start may be cut short, too.
                let lived = start(&mut server).is_ok() && life(&mut server).is_ok();
                server.stop(power, None);
                start(&mut server).unwrap_or_else(|error| {
                    panic!("seed {seed}, power {power}, after {operations}: {error}")
                });
                if lived {
                    survived = true;
                    break;
                }
            }
            assert!(survived, "its life has less than 400 operations");
        }
    }
}

#[test]
fn a_second_stop_while_it_starts_takes_nothing_away() {
    for seed in 0..4 {
        for operations in 0..24 {
            let mut server = server(seed);
            start(&mut server).unwrap();
            life(&mut server).unwrap();
            server.stop(false, None);
            server.disk.stop_after(operations);
            let _ = server.recover();
            server.stop(true, None);
            start(&mut server).unwrap_or_else(|error| {
                panic!("seed {seed}, stopped at {operations} of a start: {error}")
            });
        }
    }
}

/// After a failed sync Linux takes the pages for written: whoever reads them back finds what is not on
/// the disk. (Rebello et al., ATC'20.)
#[test]
fn what_a_failed_sync_left_in_memory_is_made_durable_or_forgotten() {
    for seed in 0..20 {
        let mut server = server(seed);
        start(&mut server).unwrap();
        for index in 1..=5 {
            write(&mut server, entries(1, index..=index)).unwrap();
        }
        server.disk.fail_sync();
        write(&mut server, entries(1, 6..=6)).unwrap_err();
        server.stop(false, None);
        let found = server.recover().unwrap();
        server.accept(&found).unwrap();
        server.stop(true, None);
        let again = server.recover().unwrap();
        assert_eq!(
            found, again,
            "seed {seed}: what was found once was promised"
        );
    }
}

#[test]
fn a_full_disk_takes_nothing_away() {
    for room in (0..60_000).step_by(500) {
        let mut server = server(room);
        start(&mut server).unwrap();
        server.disk.set_room(Some(usize::try_from(room).unwrap()));
        let full = life(&mut server);
        server.disk.set_room(None);
        server.stop(false, None);
        start(&mut server).unwrap_or_else(|error| panic!("room for {room}, {full:?}: {error}"));
    }
}
