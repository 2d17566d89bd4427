//! A disk that does what disks do: it forgets what was not synced, in any order and torn anywhere, it
//! fails, it fills up, and what lies on it rots.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::random::Random;
use crate::driver::storage::{Storage, StorageFile};

/// What a disk writes as one, mostly.
const SECTOR: usize = 512;

/// One change of a file that need not be on the disk yet.
#[derive(Debug, Clone)]
enum Dirty {
    Write { offset: usize, bytes: Vec<u8> },
    Len(usize),
}

/// One change of the names that need not be on the disk yet. They get there in their order, as a
/// journal keeps them.
#[derive(Debug, Clone)]
enum Naming {
    Link(String, u64),
    Rename(String, String),
    Unlink(String),
}

#[derive(Debug, Clone, Default)]
struct Inode {
    /// What whoever reads it sees.
    seen: Vec<u8>,
    /// What is on the disk.
    durable: Vec<u8>,
    dirty: Vec<Dirty>,
}

#[derive(Debug, Clone)]
struct Inner {
    random: Random,
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    naming: Vec<Naming>,
    next_inode: u64,
    /// Operations until the machine stops: it does not come back from the last.
    fuse: Option<u64>,
    /// The next sync fails.
    sync_fails: bool,
    /// Bytes that files may still grow by.
    room: Option<usize>,
}

/// The disk of one server. Clones are the same disk.
#[derive(Debug, Clone)]
pub(super) struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            random: Random::new(seed),
            inodes: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            naming: Vec::new(),
            next_inode: 0,
            fuse: None,
            sync_fails: false,
            room: None,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nobody panics while it holds this")
    }

    /// Another disk with the same on it.
    pub(super) fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.inner().clone())))
    }

    /// The machine stops within the next `operations`.
    pub(super) fn stop_after(&self, operations: u64) {
        self.inner().fuse = Some(operations);
    }

    /// The next sync fails, and what it should have written is lost.
    pub(super) fn fail_sync(&self) {
        self.inner().sync_fails = true;
    }

    /// Files may grow by so much; `None` for as much as they like.
    pub(super) fn set_room(&self, room: Option<usize>) {
        self.inner().room = room;
    }

    /// The process was killed: what it wrote is in the system's memory.
    pub(super) fn after_kill(&self) {
        let mut inner = self.inner();
        inner.fuse = None;
        inner.sync_fails = false;
    }

    /// The power failed: of what was not synced, some is there and some is not.
    pub(super) fn after_power_failure(&self) {
        let mut inner = self.inner();
        inner.fuse = None;
        inner.sync_fails = false;
        let inner = &mut *inner;
        let percent = *inner.random.pick(&[0, 50, 90, 100]);
        for inode in inner.inodes.values_mut() {
            for dirty in std::mem::take(&mut inode.dirty) {
                match dirty {
                    Dirty::Len(len) => {
                        if inner.random.percent(percent) {
                            inode.durable.resize(len, 0);
                        }
                    }
                    Dirty::Write { offset, bytes } => {
                        // Sectors are those of the disk, not of the write.
                        let mut at = 0;
                        while at < bytes.len() {
                            let end =
                                (((offset + at) / SECTOR + 1) * SECTOR - offset).min(bytes.len());
                            let keep = match inner.random.below(100) {
                                kept if kept < percent => end,
                                // Torn within.
                                99 => at + inner.random.place(end - at + 1),
                                _ => at,
                            };
                            put(&mut inode.durable, offset + at, &bytes[at..keep]);
                            at = end;
                        }
                    }
                }
            }
            inode.seen.clone_from(&inode.durable);
        }
        let keep = inner.random.place(inner.naming.len() + 1);
        inner.naming.truncate(keep);
        inner.settle_names();
        inner.names.clone_from(&inner.durable_names);
        inner.sweep();
    }

    /// Everything is written back, as the system does with time.
    pub(super) fn settle(&self) {
        let mut inner = self.inner();
        for inode in inner.inodes.values_mut() {
            inode.settle();
        }
        inner.settle_names();
        inner.sweep();
    }

    /// Damages what lies on the disk and tells how. Nothing if there is nothing to damage.
    pub(super) fn damage(&self) -> Option<String> {
        let mut inner = self.inner();
        let inner = &mut *inner;
        let names: Vec<(String, u64)> = inner
            .names
            .iter()
            .filter(|(_, inode)| inner.inodes[inode].seen.iter().any(|byte| *byte != 0))
            .map(|(name, inode)| (name.clone(), *inode))
            .collect();
        if names.is_empty() {
            return None;
        }
        let (name, inode) = inner.random.pick(&names).clone();
        let bytes = &mut inner.inodes.get_mut(&inode).expect("it has a name").seen;
        let used = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .expect("just seen")
            + 1;
        // Mostly where something new is written.
        let from = if inner.random.percent(50) {
            used.saturating_sub(2 * SECTOR)
        } else {
            0
        };
        let at = from + inner.random.place(used - from);
        let sector = at / SECTOR * SECTOR;
        let end = (sector + SECTOR).min(bytes.len());
        let what = match inner.random.below(4) {
            0 | 1 => {
                bytes[at] ^= 1 << inner.random.below(8);
                format!("{name}: a bit flipped in byte {at}")
            }
            2 => {
                bytes[sector..end].fill(0);
                format!("{name}: the sector at {sector} was never written")
            }
            _ => {
                // It went elsewhere: what it should have replaced is there (nothing), and what was
                // elsewhere is not.
                let other = inner.random.place(used) / SECTOR * SECTOR;
                let moved = bytes[sector..end].to_vec();
                bytes[sector..end].fill(0);
                let length = moved.len().min(bytes.len() - other);
                bytes[other..other + length].copy_from_slice(&moved[..length]);
                format!("{name}: the sector at {sector} was written at {other}")
            }
        };
        let inode = inner.inodes.get_mut(&inode).expect("it has a name");
        inode.durable.clone_from(&inode.seen);
        Some(what)
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, new: &[u8]) {
    if new.is_empty() {
        return;
    }
    let end = offset + new.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(new);
}

impl Inode {
    fn settle(&mut self) {
        for dirty in std::mem::take(&mut self.dirty) {
            match dirty {
                Dirty::Len(len) => self.durable.resize(len, 0),
                Dirty::Write { offset, bytes } => put(&mut self.durable, offset, &bytes),
            }
        }
    }
}

impl Inner {
    fn settle_names(&mut self) {
        let names = &mut self.durable_names;
        for naming in std::mem::take(&mut self.naming) {
            match naming {
                Naming::Link(name, inode) => {
                    names.insert(name, inode);
                }
                Naming::Rename(from, to) => {
                    let inode = names.remove(&from).expect("names change in their order");
                    names.insert(to, inode);
                }
                Naming::Unlink(name) => {
                    names.remove(&name);
                }
            }
        }
    }

    /// Forgets files that no name leads to any more.
    fn sweep(&mut self) {
        let (names, durable) = (&self.names, &self.durable_names);
        self.inodes.retain(|inode, _| {
            names.values().any(|named| named == inode)
                || durable.values().any(|named| named == inode)
        });
    }

    /// True if the machine stops in this operation.
    fn stops(&mut self) -> bool {
        match &mut self.fuse {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn step(&mut self) -> io::Result<()> {
        if self.stops() { Err(stopped()) } else { Ok(()) }
    }

    fn find(&self, name: &str) -> io::Result<u64> {
        self.names
            .get(name)
            .copied()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name}: not there")))
    }
}

fn stopped() -> io::Error {
    io::Error::other("the machine has stopped")
}

impl Storage for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.inner().names.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let inner = self.inner();
        Ok(inner.inodes[&inner.find(name)?].seen.clone())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let mut inner = self.inner();
        inner.step()?;
        // One that is there is replaced by another, which is more than emptying it forgets.
        inner.next_inode += 1;
        let inode = inner.next_inode;
        inner.inodes.insert(inode, Inode::default());
        inner.names.insert(name.to_owned(), inode);
        inner.naming.push(Naming::Link(name.to_owned(), inode));
        Ok(Box::new(SimFile {
            disk: self.clone(),
            inode,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let inode = self.inner().find(name)?;
        Ok(Box::new(SimFile {
            disk: self.clone(),
            inode,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        let inode = inner.find(from)?;
        inner.names.remove(from);
        inner.names.insert(to.to_owned(), inode);
        inner
            .naming
            .push(Naming::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        inner.find(name)?;
        inner.names.remove(name);
        inner.naming.push(Naming::Unlink(name.to_owned()));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        inner.settle_names();
        inner.sweep();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/sim").join(name)
    }
}

struct SimFile {
    disk: SimDisk,
    inode: u64,
}

impl SimFile {
    fn grow(&self, inner: &mut Inner, to: usize) -> io::Result<()> {
        let more = to.saturating_sub(inner.inodes[&self.inode].seen.len());
        if let Some(room) = &mut inner.room {
            if more > *room {
                *room = 0;
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "no room on the disk",
                ));
            }
            *room -= more;
        }
        Ok(())
    }

    fn change(&self, inner: &mut Inner, dirty: Dirty) {
        let inode = inner.inodes.get_mut(&self.inode).expect("it is open");
        match &dirty {
            Dirty::Len(len) => inode.seen.resize(*len, 0),
            Dirty::Write { offset, bytes } => put(&mut inode.seen, *offset, bytes),
        }
        inode.dirty.push(dirty);
    }
}

impl StorageFile for SimFile {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let inner = &mut *inner;
        let offset = usize::try_from(offset).expect("small files");
        let grown = self.grow(inner, offset + bytes.len());
        let stops = inner.stops();
        // A write that does not succeed has written something, or nothing.
        let length = match (stops, &grown) {
            (false, Ok(())) => bytes.len(),
            _ => inner.random.place(bytes.len() + 1),
        };
        let bytes = bytes[..length].to_vec();
        self.change(inner, Dirty::Write { offset, bytes });
        if stops { Err(stopped()) } else { grown }
    }

    fn allocate(&mut self, bytes: u64) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let inner = &mut *inner;
        inner.step()?;
        let len = usize::try_from(bytes).expect("small files");
        self.grow(inner, len)?;
        self.change(inner, Dirty::Len(len));
        Ok(())
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let inner = &mut *inner;
        inner.step()?;
        let len = usize::try_from(bytes).expect("small files");
        self.grow(inner, len)?;
        self.change(inner, Dirty::Len(len));
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let mut inner = self.disk.inner();
        let inner = &mut *inner;
        inner.step()?;
        let inode = inner.inodes.get_mut(&self.inode).expect("it is open");
        if std::mem::take(&mut inner.sync_fails) {
            // As Linux does: the pages count as written and are not.
            inode.dirty.clear();
            return Err(io::Error::other("the disk does not take it"));
        }
        inode.settle();
        Ok(())
    }

    fn sync_all(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_stays_and_the_rest_may_not() {
        let mut lost = 0;
        let mut torn = 0;
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let mut file = disk.create("f").unwrap();
            file.write_all_at(&[1; 3000], 0).unwrap();
            file.sync_all().unwrap();
            disk.sync_names().unwrap();
            file.write_all_at(&[2; 3000], 3000).unwrap();
            disk.after_power_failure();
            let bytes = disk.read("f").unwrap();
            assert!(bytes[..3000].iter().all(|byte| *byte == 1));
            let new = bytes[3000..].iter().filter(|byte| **byte == 2).count();
            lost += usize::from(new == 0);
            torn += usize::from(0 < new && new < 3000);
        }
        assert!(lost > 20 && torn > 20, "{lost} {torn}");
    }

    #[test]
    fn a_name_that_was_not_synced_may_be_lost_and_a_failed_sync_lies() {
        let names = |seed| {
            let disk = SimDisk::new(seed);
            drop(disk.create("f").unwrap());
            disk.after_power_failure();
            disk.list().unwrap().len()
        };
        let there: usize = (0..100).map(names).sum();
        assert!(there > 10 && there < 90, "{there}");

        let disk = SimDisk::new(1);
        let mut file = disk.create("f").unwrap();
        disk.sync_names().unwrap();
        file.write_all_at(b"abc", 0).unwrap();
        disk.fail_sync();
        file.sync_data().unwrap_err();
        file.sync_data().unwrap();
        assert_eq!(disk.read("f").unwrap(), b"abc", "it looks well");
        disk.after_power_failure();
        assert_eq!(disk.read("f").unwrap(), b"", "and is lost");
    }
}
