//! A region of memory whose first write to each page is noticed by the processor.
//!
//! The same memory is mapped twice. The program uses the *view*, which can only be read until the first write to a page
//! faults; the handler of that fault notes the page and makes it writable. This module itself writes through the
//! *alias*, which can always be written: so an update from another process is applied without opening the page in the
//! view, where a write that the program makes at that moment would go unnoticed. A third mapping, the *shadow*, holds
//! what all processes agreed on last; it is the twin that a page is compared with.
//!
//! Carter 1991, "delayed update queue": a page is compared with its twin, and what differs is sent, so that several
//! processes may write to one page at a time. Keleher 1994 and Amza 1996, "multiple-writer protocol": twins and diffs
//! made at the release; an update is applied to the page and to its twin. Both make a twin in the fault handler; ours
//! may not allocate, so twins are there from the start. Untouched they cost no memory.
//!
//! **Not userfaultfd:** write protection through it asks for a thread that answers each fault (two changes of context
//! more), for ioctls that no crate here offers without unsafe code, and, to catch the kernel's own writes, for a
//! privilege. `PAGEMAP_SCAN` (Linux 6.7) needs no fault at all; when kernels that lack it are gone, it is the better way.
//!
//! What the fault handler asks of the program:
//!
//! - **No system call may write into a region.** `read(2)` into a page that was not written yet ends with `EFAULT`,
//!   without a fault that anybody handles. Read into a buffer, then [`Pages::write`]. (Writing *from* it is well.)
//! - A signal handler of the program may not write into a region: it may have interrupted [`Pages::collect`].
//! - Who installs another handler of SIGSEGV later has to call ours for what it does not know.
//! - A child of `fork` that does not `exec` shares the memory, and must leave it alone.
#![expect(
    unsafe_code,
    reason = "page protection, its fault handler, and views of memory that changes underneath"
)]

use super::Diff;
use bytes::Bytes;
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use std::io;
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use thiserror::Error;

#[cfg(test)]
mod tests;

/// Regions that a process may have at one time.
pub const REGIONS_MAX: usize = 64;

/// A diff that does not lie within the region.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("not within the region")]
pub struct OutOfRange;

/// Shared memory that knows what was written to it.
///
/// All methods may be called from several threads. What [`collect`](Self::collect) and [`apply`](Self::apply) find of
/// a write that another thread makes at that moment is any part of it; the rest is found by the next `collect`.
#[derive(Debug)]
pub struct Pages {
    /// What the program sees. Invariant: while nobody holds the slot's turn, a page is writable exactly if its bit in
    /// `dirty` is set.
    view: MmapRaw,
    /// The same memory, always writable. Written only by who holds `shadow`.
    alias: MmapRaw,
    /// Invariant: differs from the memory only in dirty pages.
    shadow: Mutex<MmapMut>,
    /// A bit for each page. The handler holds a pointer to it, through the slot.
    dirty: Box<[AtomicU64]>,
    slot: &'static Slot,
}

impl Pages {
    /// A region of zeros, its length rounded up to whole pages.
    ///
    /// # Errors
    /// `InvalidInput` for no bytes, `QuotaExceeded` where the process has [`REGIONS_MAX`] regions, or what the system
    /// says about the mappings.
    pub fn new(bytes: usize) -> io::Result<Self> {
        install_handler()?;
        let page = page_bytes();
        let bytes = bytes
            .checked_next_multiple_of(page)
            .filter(|&b| b > 0 && isize::try_from(b).is_ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let memory = rustix::fs::memfd_create("unbroken-dsm", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, bytes as u64)?;
        let mut options = MmapOptions::new();
        options.len(bytes).no_reserve_swap();
        let view = options.map_raw_read_only(&memory)?;
        let alias = options.map_raw(&memory)?;
        // memmap2's "read only" says nothing about what is possible later: the file is open for writing.
        let shadow = Mutex::new(options.map_anon()?);
        let dirty: Box<[AtomicU64]> = (0..(bytes / page).div_ceil(64))
            .map(|_| AtomicU64::new(0))
            .collect();
        let slot = Slot::take(view.as_ptr() as usize, bytes, &dirty)
            .ok_or(io::ErrorKind::QuotaExceeded)?;
        Ok(Self {
            view,
            alias,
            shadow,
            dirty,
            slot,
        })
    }

    /// Bytes of the region: whole pages, never 0.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// Where the memory is, for a program with its own idea of what lies there. Reads and writes through it are the
    /// program's to order: its threads' among each other, and against `apply` (a reader that holds the lock which
    /// guards the data is safe from it). Valid for [`len`](Self::len) bytes, as long as the region lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.view.as_mut_ptr()
    }

    /// The memory, shared by threads.
    pub fn atomics(&self) -> &[AtomicU8] {
        // SAFETY: the view is mapped, readable and initialised for `len` bytes for as long as `self` lives. `AtomicU8`
        // has the layout of `u8` and allows changes from elsewhere. A store to a protected page returns from its fault
        // as if the page had been writable.
        unsafe { std::slice::from_raw_parts(self.view.as_ptr().cast::<AtomicU8>(), self.len()) }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Where the region ends before the buffer does.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        let from = &self.atomics()[offset..][..buffer.len()];
        for (to, from) in buffer.iter_mut().zip(from) {
            *to = from.load(Ordering::Relaxed);
        }
    }

    /// Copies bytes in, as a write of this process.
    ///
    /// # Panics
    /// Where the region ends before the bytes do.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = &self.atomics()[offset..][..bytes.len()];
        for (to, from) in to.iter().zip(bytes) {
            to.store(*from, Ordering::Relaxed);
        }
    }

    /// The memory as bytes; borrowed alone, because `apply` and `write` change it through a shared reference.
    pub fn as_slice(&mut self) -> &[u8] {
        self.as_mut_slice()
    }

    /// The memory as bytes to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped and initialised for `len` bytes; `&mut self` keeps every other way to it shut meanwhile. The
        // first write to each page faults and is repeated when the page is writable.
        unsafe { std::slice::from_raw_parts_mut(self.view.as_mut_ptr(), self.len()) }
    }

    /// Pages written to since the last [`collect`](Self::collect).
    pub fn dirty_pages(&self) -> usize {
        let count = |w: &AtomicU64| w.load(Ordering::Relaxed).count_ones() as usize;
        self.dirty.iter().map(count).sum()
    }

    /// What this process has written since the last call: the bytes that differ from what was agreed on, in order, runs
    /// never touching. Afterwards they are agreed on, and the pages are protected again.
    ///
    /// A run holds nothing but bytes that changed, however close the next one is: another process may have written
    /// those in between.
    pub fn collect(&self) -> Vec<Diff> {
        let mut shadow = self.shadow();
        let (dirty, pages) = self.take_dirty();
        let page = page_bytes();
        let mut data = Vec::with_capacity(pages * 64);
        // Where a run is in the region, and where its bytes begin in `data`.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut end_of_run = usize::MAX;
        for index in bits(&dirty) {
            let start = index * page;
            let words = &self.words()[start / 8..][..page / 8];
            let twin = &mut shadow[start..][..page];
            for (n, (word, twin)) in words.iter().zip(twin.chunks_exact_mut(8)).enumerate() {
                // Read once: what is compared, sent and kept is the same even while a thread writes.
                let now = word.load(Ordering::Relaxed).to_ne_bytes();
                if now == *twin {
                    continue;
                }
                for (k, (now, twin)) in now.iter().zip(twin).enumerate() {
                    if now != twin {
                        let offset = start + n * 8 + k;
                        if offset != end_of_run {
                            runs.push((offset, data.len()));
                        }
                        data.push(*now);
                        *twin = *now;
                        end_of_run = offset + 1;
                    }
                }
            }
        }
        let data = Bytes::from(data);
        let ends = runs.iter().skip(1).map(|r| r.1).chain([data.len()]);
        runs.iter()
            .zip(ends)
            .map(|(&(offset, from), to)| Diff {
                offset: offset as u64,
                bytes: data.slice(from..to),
            })
            .collect()
    }

    /// Writes another process's update, which does not count as a write of this one.
    ///
    /// What this process wrote elsewhere in the same page stays, and is still found by the next
    /// [`collect`](Self::collect). Where both wrote the same byte (a race: no lock guarded it) the update wins, and the
    /// local write is forgotten.
    ///
    /// # Errors
    /// A diff that does not lie in the region; nothing is written.
    pub fn apply(&self, diff: &Diff) -> Result<(), OutOfRange> {
        let end = diff.end().ok_or(OutOfRange)?;
        let (Ok(start), Ok(end)) = (usize::try_from(diff.offset), usize::try_from(end)) else {
            return Err(OutOfRange);
        };
        let mut shadow = self.shadow();
        let twin = shadow.get_mut(start..end).ok_or(OutOfRange)?;
        twin.copy_from_slice(&diff.bytes);
        // Whole words where the update has them: no reader sees half of one, and it is faster.
        let head = diff.bytes.len().min(start.next_multiple_of(8) - start);
        let (head, rest) = diff.bytes.split_at(head);
        let words = rest.chunks_exact(8);
        let (tail_at, tail) = (end - words.remainder().len(), words.remainder());
        self.store_bytes(start, head);
        for (to, from) in self.words()[start.div_ceil(8)..].iter().zip(words) {
            let word = u64::from_ne_bytes(from.try_into().expect("eight bytes"));
            to.store(word, Ordering::Relaxed);
        }
        self.store_bytes(tail_at, tail);
        Ok(())
    }

    /// What was agreed on, as diffs from a region of zeros: for a process that joins. What this process wrote since its
    /// last `collect` is not in it.
    pub fn contents(&self) -> Vec<Diff> {
        let shadow = self.shadow();
        let page = page_bytes();
        let pages = shadow.chunks_exact(page).enumerate();
        pages
            .filter(|(_, bytes)| bytes.iter().any(|b| *b != 0))
            .map(|(index, bytes)| Diff {
                offset: (index * page) as u64,
                bytes: Bytes::copy_from_slice(bytes),
            })
            .collect()
    }

    fn shadow(&self) -> MutexGuard<'_, MmapMut> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory through the alias.
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: as in `atomics`; a mapping begins at a page, and its length is a multiple of one.
        unsafe {
            std::slice::from_raw_parts(self.alias.as_ptr().cast::<AtomicU64>(), self.len() / 8)
        }
    }

    fn store_bytes(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: as in `words`. Both are used only under the lock of `shadow`, so bytes and words never race.
        let alias: &[AtomicU8] = unsafe {
            std::slice::from_raw_parts(self.alias.as_ptr().cast::<AtomicU8>(), self.len())
        };
        for (to, from) in alias[offset..].iter().zip(bytes) {
            to.store(*from, Ordering::Relaxed);
        }
    }

    /// Takes the set of dirty pages, and protects these. From then on a write to one of them faults again.
    fn take_dirty(&self) -> (Vec<u64>, usize) {
        let mut taken = vec![0; self.dirty.len()];
        let page = page_bytes();
        let base = self.view.as_ptr() as usize;
        let _turn = self.slot.turn();
        for (taken, word) in taken.iter_mut().zip(&self.dirty) {
            *taken = word.swap(0, Ordering::Relaxed);
        }
        let mut pages = 0;
        // One call for neighbours.
        let mut run = 0..0;
        for index in bits(&taken).chain([usize::MAX]) {
            if index == run.end {
                run.end += 1;
            } else {
                // The run is a mapping of its own already, so this asks for none more; a kernel without memory may refuse
                // all the same. Such pages just stay open, and dirty.
                if !protect(base + run.start * page, run.len() * page, libc::PROT_READ) {
                    for open in run.clone() {
                        self.dirty[open / 64].fetch_or(1 << (open % 64), Ordering::Relaxed);
                    }
                }
                pages += run.len();
                run = index..index.wrapping_add(1);
            }
        }
        (taken, pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // Before the fields: the address may be another mapping's soon.
        self.slot.give_back();
    }
}

/// The numbers of the bits that are set, ascending.
fn bits(words: &[u64]) -> impl Iterator<Item = usize> + '_ {
    words.iter().enumerate().flat_map(|(n, &word)| {
        std::iter::successors((word != 0).then_some(word), |w| {
            let rest = w & (w - 1);
            (rest != 0).then_some(rest)
        })
        .map(move |w| n * 64 + w.trailing_zeros() as usize)
    })
}

/// What the handler knows of a region. The table is static and its slots are used again, so that the handler can look
/// through it without a lock and without touching memory that was freed.
#[derive(Debug)]
struct Slot {
    /// Odd while the next three fields change.
    version: AtomicU32,
    base: AtomicUsize,
    /// 0 in a free slot.
    bytes: AtomicUsize,
    dirty: AtomicPtr<AtomicU64>,
    /// Held while bits and protection change together, by the handler or by `collect`. Neither touches the view or
    /// waits for anything else meanwhile, so that a spinning handler always gets its turn.
    turn: AtomicBool,
}

static SLOTS: [Slot; REGIONS_MAX] = [const {
    Slot {
        version: AtomicU32::new(0),
        base: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        dirty: AtomicPtr::new(std::ptr::null_mut()),
        turn: AtomicBool::new(false),
    }
}; REGIONS_MAX];

/// Held by who changes the table.
static TABLE: Mutex<()> = Mutex::new(());

impl Slot {
    fn take(base: usize, bytes: usize, dirty: &[AtomicU64]) -> Option<&'static Self> {
        let _table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = SLOTS
            .iter()
            .find(|s| s.bytes.load(Ordering::Relaxed) == 0)?;
        slot.set(base, bytes, dirty.as_ptr().cast_mut());
        Some(slot)
    }

    fn give_back(&self) {
        let _table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(0, 0, std::ptr::null_mut());
    }

    /// Called under the lock of `TABLE`.
    fn set(&self, base: usize, bytes: usize, dirty: *mut AtomicU64) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.dirty.store(dirty, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// The region that an address lies in. A slot that changes meanwhile is not it: nobody writes to a region that is
    /// being made or dropped.
    fn find(address: usize) -> Option<&'static Self> {
        SLOTS.iter().find(|slot| {
            let before = slot.version.load(Ordering::Acquire);
            let base = slot.base.load(Ordering::Relaxed);
            let bytes = slot.bytes.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            before.is_multiple_of(2)
                && slot.version.load(Ordering::Relaxed) == before
                && address.wrapping_sub(base) < bytes
        })
    }

    fn turn(&self) -> Turn<'_> {
        while self.turn.swap(true, Ordering::Acquire) {
            std::thread::yield_now(); // sched_yield: nothing but a system call
        }
        Turn(&self.turn)
    }

    /// Notes a write to the page at `address`, and allows it. Runs in the handler: atomics and system calls only.
    fn open(&self, address: usize) -> bool {
        let page = page_bytes();
        let base = self.base.load(Ordering::Relaxed);
        let bytes = self.bytes.load(Ordering::Relaxed);
        let dirty = self.dirty.load(Ordering::Relaxed);
        let index = (address - base) / page;
        // SAFETY: the thread that faulted has the region borrowed (or owns a pointer whose contract says that the
        // region lives), so its slot and bitmap stay; the bitmap has a bit for each page.
        let dirty = unsafe { std::slice::from_raw_parts(dirty, (bytes / page).div_ceil(64)) };
        let _turn = self.turn();
        if dirty[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed) & (1 << (index % 64))
            != 0
        {
            return true; // another thread's fault came first
        }
        if protect(
            base + index * page,
            page,
            libc::PROT_READ | libc::PROT_WRITE,
        ) {
            return true;
        }
        // A page whose protection differs from its neighbours' is a mapping of its own, and the kernel bounds their
        // number (vm.max_map_count). A region that is writable throughout needs only one; it costs `collect` time.
        for (n, word) in dirty.iter().enumerate() {
            let left = bytes / page - n * 64;
            let mask = if left < 64 { (1 << left) - 1 } else { u64::MAX };
            word.store(mask, Ordering::Relaxed);
        }
        protect(base, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }
}

struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Of pages of a view only.
fn protect(address: usize, bytes: usize, protection: libc::c_int) -> bool {
    // SAFETY: called with pages of a view that is mapped: reading them stays possible, and a write to a page that
    // becomes protected ends in our handler.
    bytes == 0 || unsafe { libc::mprotect(address as *mut libc::c_void, bytes, protection) } == 0
}

/// Bytes of a page: found before the handler is installed, which cannot ask.
fn page_bytes() -> usize {
    static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);
    let known = PAGE_BYTES.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    // SAFETY: no pointers.
    let asked = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let asked = usize::try_from(asked).expect("the system has a page size");
    PAGE_BYTES.store(asked, Ordering::Relaxed);
    asked
}

/// Who handled SIGSEGV before: usually std, which looks for stack overflows.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Once in a process; the handler stays.
fn install_handler() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    page_bytes();
    // SAFETY: both structures are valid and zeros are a value of theirs; the handler has the type that SA_SIGINFO asks
    // for, and does nothing but what a handler may.
    unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut previous) != 0 {
            return Err(io::Error::last_os_error());
        }
        // Known before ours can run.
        let _ = PREVIOUS.set(previous);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_fault as *const () as usize;
        // On the alternate stack, because the handler before ours may be there for a stack that is full.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // Another signal's handler that writes into a region must not interrupt ours while it holds the turn.
        libc::sigfillset(&raw mut ours.sa_mask);
        if libc::sigaction(libc::SIGSEGV, &raw const ours, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    *installed = true;
    Ok(())
}

extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // asm-generic/siginfo.h: the page is mapped, but not for this. The libc crate lacks it.
    const SEGV_ACCERR: libc::c_int = 2;
    // SAFETY: the kernel hands a handler with SA_SIGINFO valid structures; errno is this thread's own.
    unsafe {
        let errno = *libc::__errno_location();
        let ours = (*info).si_code == SEGV_ACCERR && was_write(context) && {
            let address = (*info).si_addr() as usize;
            Slot::find(address).is_some_and(|slot| slot.open(address))
        };
        if !ours {
            pass_on(signal, info, context);
        }
        *libc::__errno_location() = errno;
    }
}

/// Whether the access was a write, where the processor tells: a jump into the region would else fault for ever.
///
/// # Safety
/// `context` is what a handler of SIGSEGV was given.
#[cfg(target_arch = "x86_64")]
unsafe fn was_write(context: *mut libc::c_void) -> bool {
    // SAFETY: the third argument of a handler with SA_SIGINFO is a `ucontext_t`.
    let error =
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs }[libc::REG_ERR as usize];
    error & 2 != 0 // the page fault's error code: W/R
}

/// Everything may be read, so what was refused was a write.
///
/// # Safety
/// None needed.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn was_write(_: *mut libc::c_void) -> bool {
    true
}

/// A fault that is none of ours, handled as if we were not there.
///
/// # Safety
/// The arguments are those of a handler with SA_SIGINFO.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let sent = |code: libc::c_int| code <= 0; // by a process, not by the kernel for an access
    let previous = PREVIOUS.get();
    // SAFETY: a handler that the kernel was given, called as the kernel would; `sigaction` and `raise` may be called
    // in a handler.
    unsafe {
        match previous.map_or(libc::SIG_DFL, |p| p.sa_sigaction) {
            libc::SIG_IGN if sent((*info).si_code) => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
                // An access is repeated when we return, and kills then, with the address that was at fault.
                if sent((*info).si_code) {
                    libc::raise(signal);
                }
            }
            handler if previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0) => {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Handler>(handler)(signal, info, context);
            }
            handler => {
                std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler)(signal);
            }
        }
    }
}
