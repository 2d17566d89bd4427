//! A server of the simulation: the real core, log and snapshots on a simulated disk.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::disk::SimDisk;
use crate::core::{ConnId, Core, PeerMessage};
use crate::driver::disk::{DiskError, Group, recover, save_snapshot};
use crate::driver::storage::Storage;
use crate::driver::wal::Wal;
use crate::quorum::{HardState, LogEntry, Recovered, SnapshotImage, Write};
use crate::time::Instant;

/// Bytes of a segment of the log: small, so that there are many.
const SEGMENT_BYTES: u64 = 16 * 1024;

/// Something that reaches a server.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "most of them are messages")]
pub(super) enum What {
    Peer { from: u64, message: PeerMessage },
    Unreachable(u64),
    Died(u64),
    LogWritten { run: u64 },
    SnapshotSaved { run: u64 },
    Tick { run: u64 },
    Frame { conn: ConnId, frame: Bytes },
    Gone { conn: ConnId },
    Resume,
}

/// For the thread that writes the log.
#[derive(Debug, Clone)]
pub(super) enum Job {
    Write { token: u64, write: Write },
    Trim(u64),
}

/// What a log must say if it holds what was written to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Promised {
    hard_state: HardState,
    /// Index of the newest snapshot that came from a leader.
    installed: u64,
    entries: BTreeMap<u64, LogEntry>,
}

impl Promised {
    fn take(&mut self, write: &Write) {
        if let Some(image) = &write.snapshot {
            self.entries.clear();
            self.installed = image.index;
        }
        if let Some(hard_state) = write.hard_state {
            self.hard_state = hard_state;
        }
        if let Some(first) = write.entries.first() {
            self.entries.split_off(&first.index);
        }
        let entries = write
            .entries
            .iter()
            .map(|entry| (entry.index, entry.clone()));
        self.entries.extend(entries);
    }

    /// Whether this was recovered, from a log that may have been trimmed behind a snapshot.
    fn is(&self, recovered: &Recovered) -> bool {
        let (base, term) = match &recovered.snapshot {
            Some(image) => (image.index, image.term),
            None => (0, 0),
        };
        if recovered.hard_state != self.hard_state || base < self.installed {
            return false;
        }
        let goes_on = base == self.installed
            || self
                .entries
                .get(&base)
                .is_some_and(|entry| entry.term == term);
        if !goes_on {
            return recovered.entries.is_empty();
        }
        let mine = self.entries.range(base + 1..).map(|(_, entry)| entry);
        mine.eq(recovered.entries.iter())
    }
}

/// Its clocks: one that runs at its own rate, and one that says what day it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    pub(super) offset_us: u64,
    pub(super) rate_ppm: u64,
    pub(super) wall_ms: i64,
}

impl Clock {
    pub(super) fn local(self, world_us: u64) -> Instant {
        Instant::from_micros(self.offset_us + world_us * self.rate_ppm / 1_000_000)
    }

    /// When the world's clock will be there.
    pub(super) fn world(self, local: Instant) -> u64 {
        let elapsed = local.micros().saturating_sub(self.offset_us);
        (elapsed * 1_000_000).div_ceil(self.rate_ppm)
    }
}

pub(super) struct Server {
    pub(super) core: Option<Core>,
    /// Counts restarts: what was meant for an earlier run does not reach a later one.
    pub(super) run: u64,
    pub(super) disk: SimDisk,
    log_id: u64,
    wal: Option<Wal>,
    /// What the disk has confirmed.
    promised: Promised,
    pub(super) jobs: VecDeque<Job>,
    pub(super) writing: Vec<Job>,
    pub(super) snapshots: VecDeque<SnapshotImage>,
    pub(super) saving: Option<SnapshotImage>,
    pub(super) disk_free: u64,
    pub(super) clock: Clock,
    pub(super) paused_until: u64,
    /// Inputs that came while it was paused.
    pub(super) backlog: VecDeque<What>,
    pub(super) tick_due: bool,
    pub(super) conns: BTreeMap<ConnId, u64>,
    /// The entries of its log.
    pub(super) log: BTreeMap<u64, LogEntry>,
    pub(super) applied: u64,
    /// It found its disk damaged and does not come back.
    pub(super) dead: bool,
    /// Outputs that are still carried out before the machine stops.
    pub(super) stop_in: Option<u64>,
    /// The last zxid whose state was written down.
    pub(super) summed: u64,
    /// When each session was last heard of, as this server was told while it led (by its own clock,
    /// microseconds), and in which term.
    pub(super) heard: BTreeMap<i64, (u64, u64)>,
}

impl Server {
    pub(super) fn new(seed: u64, clock: Clock) -> Self {
        Self {
            core: None,
            run: 0,
            disk: SimDisk::new(seed),
            log_id: seed,
            wal: None,
            promised: Promised::default(),
            jobs: VecDeque::new(),
            writing: Vec::new(),
            snapshots: VecDeque::new(),
            saving: None,
            disk_free: 0,
            clock,
            paused_until: 0,
            backlog: VecDeque::new(),
            tick_due: false,
            conns: BTreeMap::new(),
            log: BTreeMap::new(),
            applied: 0,
            dead: false,
            stop_in: None,
            summed: 0,
            heard: BTreeMap::new(),
        }
    }

    fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.disk.clone())
    }

    /// What the log's thread does with what it has taken. Answers the newest write that is durable.
    pub(super) fn write_log(&mut self) -> io::Result<Option<u64>> {
        let jobs = std::mem::take(&mut self.writing);
        let written = self.carry_out(&jobs);
        if written.is_err() {
            self.writing = jobs;
            return written;
        }
        for job in jobs {
            if let Job::Write { write, .. } = job {
                self.promised.take(&write);
            }
        }
        written
    }

    fn carry_out(&mut self, jobs: &[Job]) -> io::Result<Option<u64>> {
        let storage = self.storage();
        let wal = self.wal.as_mut().expect("it runs");
        let mut group = Group::default();
        let mut durable = None;
        for job in jobs {
            match job {
                Job::Trim(index) => wal.trim(*index)?,
                Job::Write { token, write } => {
                    durable = Some(*token);
                    group.add(&*storage, write.clone())?;
                }
            }
        }
        if durable.is_some() {
            group.commit(wal)?;
            wal.write_mark()?;
        }
        Ok(durable)
    }

    /// What the snapshots' thread does with the one it has taken. Answers its index.
    pub(super) fn save(&mut self) -> io::Result<u64> {
        let image = self.saving.take().expect("it was begun");
        save_snapshot(&*self.storage(), &image)?;
        self.jobs.push_back(Job::Trim(image.index));
        Ok(image.index)
    }

    /// The process ends, or the machine stops, in the middle of what its disk was doing.
    pub(super) fn stop(&mut self, power: bool, operations: Option<u64>) {
        self.core = None;
        if let Some(operations) = operations {
            self.disk.stop_after(operations);
            if self.saving.is_some() && operations % 2 == 0 {
                let _ = self.save();
            }
            // Nobody is told of it, so it is not confirmed, whatever comes of it.
            let jobs = std::mem::take(&mut self.writing);
            let _ = self.carry_out(&jobs);
            self.writing = jobs;
            if self.saving.is_some() {
                let _ = self.save();
            }
        }
        self.wal = None;
        self.jobs.clear();
        self.snapshots.clear();
        self.saving = None;
        self.tick_due = false;
        self.backlog.clear();
        self.paused_until = 0;
        self.stop_in = None;
        if power {
            self.disk.after_power_failure();
        } else {
            self.disk.after_kill();
        }
    }

    /// Reads the disk as a server that starts.
    ///
    /// # Errors
    /// What the server said to the disk, or the machine stopped.
    pub(super) fn recover(&mut self) -> Result<Recovered, DiskError> {
        let (wal, recovered) = recover(&self.storage(), self.log_id, SEGMENT_BYTES)?;
        self.wal = Some(wal);
        Ok(recovered)
    }

    /// What a disk holds on which this was found: what was confirmed, or that and what was being
    /// written. `None` if it is neither.
    fn held(&self, recovered: &Recovered) -> Option<Promised> {
        let mut with_last = self.promised.clone();
        for job in &self.writing {
            if let Job::Write { write, .. } = job {
                with_last.take(write);
            }
        }
        [with_last, self.promised.clone()]
            .into_iter()
            .find(|held| held.is(recovered))
    }

    /// Takes up what was recovered.
    ///
    /// # Errors
    /// If it is not what a disk must hold.
    pub(super) fn accept(&mut self, recovered: &Recovered) -> Result<(), String> {
        if let Some(held) = self.held(recovered) {
            self.promised = held;
            self.writing.clear();
        } else {
            return Err(format!(
                "the disk holds {}; written was {:?} with snapshot {} and entries {:?}",
                brief(recovered),
                self.promised.hard_state,
                self.promised.installed,
                self.promised
                    .entries
                    .values()
                    .map(|e| (e.index, e.term))
                    .collect::<Vec<_>>(),
            ));
        }
        let base = recovered.snapshot.as_ref().map_or(0, |image| image.index);
        // What is behind the snapshot is not asked of it again.
        self.promised.installed = base;
        self.promised.entries = self.promised.entries.split_off(&(base + 1));
        if recovered.entries.is_empty() {
            self.promised.entries.clear();
        }
        self.log = recovered
            .entries
            .iter()
            .map(|e| (e.index, e.clone()))
            .collect();
        self.applied = base;
        self.summed = base;
        self.heard.clear();
        Ok(())
    }

    /// Damages the disk of a server that is down, and looks whether a server that starts notices.
    ///
    /// # Errors
    /// The damage, if it goes unnoticed and something is missing.
    pub(super) fn damage(&mut self) -> Result<Option<String>, String> {
        self.disk.set_room(None);
        let sound = |disk: &SimDisk| {
            let storage: Arc<dyn Storage> = Arc::new(disk.copy());
            recover(&storage, self.log_id, SEGMENT_BYTES).map(|(_, recovered)| recovered)
        };
        let before = match sound(&self.disk) {
            Ok(recovered) => recovered,
            Err(error) => return Err(format!("a sound disk is refused: {error}")),
        };
        let marked: Arc<dyn Storage> = Arc::new(self.disk.copy());
        let marked = Wal::is_marked(&marked, self.log_id, SEGMENT_BYTES);
        let undamaged = self.disk.copy();
        let Some(what) = self.disk.damage() else {
            return Ok(None);
        };
        match sound(&self.disk) {
            // A frame that was not acknowledged may go.
            Ok(after) if after == before || self.held(&after).is_some() => {
                Ok(Some(format!("{what}: harmless")))
            }
            // The one thing that cannot be told from a torn write: the newest frame, when the power
            // failed before the mark knew of it, and its sector is damaged as well.
            Ok(_) if matches!(marked, Ok(false)) => {
                self.disk = undamaged;
                Ok(Some(format!("{what}: not to be noticed")))
            }
            Ok(after) => Err(format!(
                "{what}, and the server started without what was lost: {}, and before {}",
                brief(&after),
                brief(&before)
            )),
            Err(DiskError::Damaged { .. }) => {
                self.dead = true;
                Ok(Some(what))
            }
            Err(error) => Err(format!("{what}: {error}")),
        }
    }
}

fn brief(recovered: &Recovered) -> String {
    let snapshot = recovered.snapshot.as_ref();
    let entries = recovered.entries.iter().map(|e| (e.index, e.term));
    format!(
        "{:?} with snapshot {:?} and entries {:?}",
        recovered.hard_state,
        snapshot.map(|image| (image.index, image.term)),
        entries.collect::<Vec<_>>()
    )
}
