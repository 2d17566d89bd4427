//! Parts of a region as slices: checked at run time, as a `RefCell` is, but by ranges.
//!
//! A `&[T]` must not change, and a `&mut [T]` is nobody else's. Threads of this process are kept apart by the table of
//! what is borrowed. Other processes are kept apart by locks; where they are not (a race of the program, or a slice
//! kept across an acquire), their update waits until the slice is given back, and who then acquires is told.
#![expect(
    unsafe_code,
    reason = "slices of memory that changes underneath, kept from doing so while they live"
)]

use super::{Diff, Pages};
use std::collections::{BTreeMap, VecDeque};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What may lie in shared memory: integers and floating-point numbers, as this machine has them, and what a program says
/// is as simple.
///
/// # Safety
/// Any bytes are a value, and no byte of a value means nothing (padding).
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($t:ty)*) => { $(
        // SAFETY: a number.
        unsafe impl Plain for $t {}
    )* };
}
plain!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64);

/// A region's memory and who has borrowed of it.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) pages: Pages,
    borrows: Mutex<Borrows>,
}

#[derive(Debug, Default)]
struct Borrows {
    next: u64,
    /// Which bytes, and whether to write.
    live: BTreeMap<u64, (Range<usize>, bool)>,
    /// Updates of others that overlap with what is borrowed, or with one before them here.
    waiting: VecDeque<Diff>,
    waiting_bytes: usize,
}

fn range(diff: &Diff) -> Range<usize> {
    let start = usize::try_from(diff.offset).expect("the core has checked it");
    start..start + diff.bytes.len()
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Borrows {
    fn hold_up(&self, diff: &Diff) -> bool {
        let diff = range(diff);
        self.live.values().any(|(live, _)| overlap(live, &diff))
            || self.waiting.iter().any(|w| overlap(&range(w), &diff))
    }

    fn put(&mut self, pages: &Pages, diff: Diff) {
        if self.hold_up(&diff) {
            self.waiting_bytes += diff.bytes.len();
            self.waiting.push_back(diff);
        } else {
            pages.apply(&diff).expect("the core has checked it");
        }
    }
}

impl Memory {
    pub(super) fn new(pages: Pages) -> Self {
        Self {
            pages,
            borrows: Mutex::default(),
        }
    }

    fn borrows(&self) -> MutexGuard<'_, Borrows> {
        self.borrows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes another process's update, or keeps it while its bytes are borrowed. `false`: more is kept than the region
    /// has bytes.
    pub(super) fn apply(&self, diff: Diff) -> bool {
        let mut borrows = self.borrows();
        borrows.put(&self.pages, diff);
        borrows.waiting_bytes <= self.pages.len()
    }

    /// Whether an update waits for a slice to be given back.
    pub(super) fn is_behind(&self) -> bool {
        !self.borrows().waiting.is_empty()
    }

    /// As [`Pages::contents`], with what waits.
    pub(super) fn contents(&self) -> Vec<Diff> {
        let borrows = self.borrows();
        let mut contents = self.pages.contents();
        contents.extend(borrows.waiting.iter().cloned());
        contents
    }

    #[track_caller]
    fn borrow<T: Plain>(&self, offset: usize, len: usize, write: bool) -> (u64, NonNull<T>) {
        let size = size_of::<T>();
        let end = len.checked_mul(size).and_then(|b| b.checked_add(offset));
        let end = end.filter(|end| *end <= self.pages.len());
        let Some(end) = end else {
            panic!("{len} values of {size} bytes at {offset} are not within the region");
        };
        assert!(
            offset.is_multiple_of(align_of::<T>()),
            "a value of this type does not begin at {offset}"
        );
        let wanted = offset..end;
        let mut borrows = self.borrows();
        let mut live = borrows.live.values();
        let taken = live.find(|(live, writes)| (write || *writes) && overlap(live, &wanted));
        if let Some((other, _)) = taken {
            let other = other.clone();
            drop(borrows);
            panic!("{wanted:?} overlaps with {other:?}, which is borrowed");
        }
        borrows.next += 1;
        let id = borrows.next;
        borrows.live.insert(id, (wanted, write));
        // SAFETY: within the view, which begins at a page: so the sum is aligned, and not null.
        let data = unsafe { NonNull::new_unchecked(self.pages.as_ptr().add(offset).cast()) };
        (id, data)
    }

    fn give_back(&self, id: u64) {
        let mut borrows = self.borrows();
        borrows.live.remove(&id);
        borrows.waiting_bytes = 0;
        for diff in std::mem::take(&mut borrows.waiting) {
            borrows.put(&self.pages, diff);
        }
    }

    #[track_caller]
    pub(super) fn slice<T: Plain>(&self, offset: usize, len: usize) -> Slice<'_, T> {
        let (id, data) = self.borrow(offset, len, false);
        Slice {
            memory: self,
            id,
            data,
            len,
            values: PhantomData,
        }
    }

    #[track_caller]
    pub(super) fn slice_mut<T: Plain>(&self, offset: usize, len: usize) -> SliceMut<'_, T> {
        let (id, data) = self.borrow(offset, len, true);
        SliceMut {
            memory: self,
            id,
            data,
            len,
            values: PhantomData,
        }
    }
}

/// A part of a region to read: nobody writes it while this lives.
#[derive(Debug)]
pub struct Slice<'a, T: Plain> {
    memory: &'a Memory,
    id: u64,
    // Not a reference: the borrow ends within `drop`, where a reference would have to be valid to the end.
    data: NonNull<T>,
    len: usize,
    values: PhantomData<&'a [T]>,
}

/// A part of a region to read and write: nobody else has it while this lives.
#[derive(Debug)]
pub struct SliceMut<'a, T: Plain> {
    memory: &'a Memory,
    id: u64,
    data: NonNull<T>,
    len: usize,
    values: PhantomData<&'a mut [T]>,
}

// SAFETY: as the references that they stand for; `Plain` is `Send` and `Sync`, and so is `Memory`.
unsafe impl<T: Plain> Send for Slice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Slice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Send for SliceMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for SliceMut<'_, T> {}

impl<T: Plain> Deref for Slice<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `borrow` has checked bounds and alignment; the view is mapped as long as the memory lives, and any
        // bytes are values. While this is in the table nothing in this process writes here: no `SliceMut`, no update.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> Deref for SliceMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: as for `Slice`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for SliceMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `Slice`, and while this is in the table there is no other slice of these bytes. The first
        // write to each page faults and is repeated when the page is writable.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Slice<'_, T> {
    fn drop(&mut self) {
        self.memory.give_back(self.id);
    }
}

impl<T: Plain> Drop for SliceMut<'_, T> {
    fn drop(&mut self) {
        self.memory.give_back(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn memory() -> Memory {
        Memory::new(Pages::new(8192).unwrap())
    }

    fn diff(offset: u64, bytes: &'static [u8]) -> Diff {
        Diff {
            offset,
            bytes: bytes.into(),
        }
    }

    fn refused(f: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(f)).is_err()
    }

    #[test]
    fn slices_that_overlap_are_refused_if_one_writes() {
        let m = memory();
        let read = m.slice::<u32>(8, 4);
        let also = m.slice::<u8>(0, 100);
        assert!(refused(|| drop(m.slice_mut::<u8>(23, 1))));
        let mut write = m.slice_mut::<u64>(104, 2);
        write[1] = 5;
        assert!(refused(|| drop(m.slice::<u8>(119, 1))));
        assert_eq!(m.slice::<u8>(120, 1)[0], 0, "beside it is free");
        drop((read, also, write));
        assert_eq!(m.slice_mut::<u64>(112, 1)[0], 5);
        assert_eq!(m.pages.collect().len(), 1);
    }

    #[test]
    fn slices_lie_within_the_region_and_are_aligned() {
        let m = memory();
        assert!(m.slice::<u8>(8192, 0).is_empty());
        assert!(refused(|| drop(m.slice::<u8>(8192, 1))));
        assert!(refused(|| drop(m.slice::<u64>(8, usize::MAX / 4))));
        assert!(refused(|| drop(m.slice_mut::<u32>(2, 1))));
    }

    #[test]
    fn an_update_waits_for_the_slice_that_it_changes_and_keeps_its_order() {
        let m = memory();
        let slice = m.slice::<u8>(10, 2);
        assert!(m.apply(diff(11, &[1, 1])));
        assert!(m.apply(diff(12, &[2])), "behind the one before");
        assert!(m.apply(diff(20, &[3])));
        assert_eq!((&slice[..], m.is_behind()), (&[0, 0][..], true));
        assert_eq!(m.slice::<u8>(20, 1)[0], 3);
        assert_eq!(m.contents().len(), 3, "a joiner gets what waits too");
        drop(slice);
        assert!(!m.is_behind());
        assert_eq!(m.slice::<u8>(11, 2)[..], [1, 2]);
        assert_eq!(m.pages.collect(), [], "no write of this process");
    }

    #[test]
    fn what_waits_is_bounded() {
        static MUCH: [u8; 8192] = [1; 8192];
        let m = memory();
        let slice = m.slice::<u8>(0, 1);
        assert!(m.apply(diff(0, &MUCH)));
        assert!(!m.apply(diff(0, &[2])));
        drop(slice);
        assert_eq!(m.slice::<u8>(0, 2)[..], [2, 1]);
    }
}
