//! A memory that several processes share, with release consistency: what a process wrote is seen by who takes the lock
//! after it.
//!
//! ```no_run
//! # async fn example(node: &unbroken_group::node::Node) -> Result<(), Box<dyn std::error::Error>> {
//! use unbroken_group::dsm::Region;
//!
//! let (region, work) = Region::join(node, "accounts", 1 << 20).await?;
//! tokio::spawn(work);
//! let lock = region.lock(7).await?; // no other process of the region holds it now
//! let mut balances = lock.slice_mut::<u64>(4096, 100); // what the last holder left
//! balances[3] += 50;
//! drop(balances);
//! lock.release(); // who locks it next finds 50 more
//! let who = region.barrier(0).await?; // all members have come; what they wrote before is here
//! println!("{} members", who.len());
//! region.leave().await;
//! # Ok(()) }
//! ```
//!
//! ```text
//!   application     lock -> Guard           slices, raw pointer  drop
//!   Region          waits for its turn                           collect + release: one step
//!   Pages                                   first write faults   diffs against the twins
//!   DsmCore         Abcast(Request)                              Fbcast(Update).. Abcast(Release)
//!   other members   queue                                        Apply, and the next one's Granted
//! ```
//!
//! Three layers: [`Pages`] notes by page protection what was written and makes [`Diff`]s of it; [`DsmCore`], a state
//! machine without I/O, says what to send and when a lock is held; [`Region`] binds them to a [`crate::node::Group`].
//!
//! **Consistency.** Keleher 1994 and Amza 1996: a process must see what others wrote before it acquired, not earlier.
//! They fetch diffs at the acquire (lazy); Carter 1991 sends them at the release (eager), and so do we: a multicast
//! reaches all members at the price of one, every member has a whole copy (so it may die), and an acquire rarely waits.
//! A program without data races, counting the locks and barriers of this module, finds what it would find in one memory.
//! Where two members write the same byte without a lock, copies may differ from then on.
//!
//! **Why vectors.** The fbcast is FIFO for each sender only. That a lock was passed on says nothing about updates that
//! its holders sent: they may arrive later. So a release carries the lock's *path*: of each member the number of its
//! updates that came before, directly or through others; the next holder waits until it has applied these. Third
//! parties need it too: one that had the second holder's update first would keep the first holder's value in the end.
//! So the update names what it comes after, and waits for that everywhere. (This is a cbcast, BSS91, whose causes are
//! locks and barriers instead of all messages.)
//!
//! **Departures.** Survivors have had the same messages when they install a view. What is lost of a departed member is
//! lost for all; updates that depended on it are dropped by all; its locks pass on, and who gets one is told by
//! `abandoned` that the data may be half written. A release is applied as a whole, however many messages it takes; but
//! a release sends *all* that its process has written, also under other locks that it still holds.
//!
//! # The driver's contract
//!
//! [`Region`] keeps it; here it is for another driver.
//!
//! One lock (a mutex of the driver) covers the core and the order of what it says: take it, hand in one input, drain
//! [`DsmCore::poll_output`] to `None`, executing in order, and let go. Reading and writing the region needs no such lock.
//!
//! - [`Output::Fbcast`]: delivered to every other member of the view in each sender's order, without gaps:
//!   [`DsmCore::handle_update`]. Own deliveries are handed in too: a copy for a joiner has to say what is on its way.
//! - [`Output::Abcast`]: delivered to every member, the sender too, in one order for all that keeps each sender's
//!   order: [`DsmCore::handle_ordered`]. Nothing is asked of the order between the two kinds.
//! - What a member has sent is delivered, in this view or a later one, unless that member departs.
//! - [`DsmCore::handle_view`]: at all survivors after the same deliveries of both kinds (virtual synchrony). A returning
//!   process has a new [`MemberId`](crate::MemberId).
//! - A joiner: right after `handle_view` a donor calls [`Pages::contents`] and [`DsmCore::snapshot`]; the joiner
//!   [`DsmCore::restore`]s, applies the diffs to a new region, and is handed what was delivered since that view. What it
//!   is handed twice is passed over, if it is an update; an ordered message must not come twice.
//! - Acquire: [`DsmCore::handle_local_acquire`], then the thread waits for [`Output::Granted`]. Threads of one process
//!   agree among themselves first who acquires: the core knows processes.
//! - Release: [`Pages::collect`] and [`DsmCore::handle_local_release`] *in one step under the driver's lock*. Else
//!   another thread's release, between the two, would pass a lock on without what was collected here. So for a barrier.
//! - [`Output::Failed`]: leave the group, and join it as a new member with a new region.
//!
//! ```
//! use unbroken_group::MemberId;
//! use unbroken_group::dsm::{Config, DsmCore, LockId, Output, Pages};
//!
//! let pages = Pages::new(8192).unwrap();
//! let me = MemberId::new("r1", 7);
//! let mut core = DsmCore::new(Config::new(pages.len() as u64), me.clone(), &[me.clone()]);
//! core.handle_local_acquire(LockId(0)).unwrap();
//! let Some(Output::Abcast(request)) = core.poll_output() else { panic!() };
//! core.handle_ordered(&me, &request); // the group delivers it, to us as to all
//! assert!(matches!(core.poll_output(), Some(Output::Granted { .. })));
//! pages.write(5000, b"shared");
//! core.handle_local_release(LockId(0), pages.collect()).unwrap();
//! assert!(matches!(core.poll_output(), Some(Output::Fbcast(_))));
//! assert!(matches!(core.poll_output(), Some(Output::Abcast(_))));
//! ```

mod consistency;
mod pages;
mod region;
#[cfg(test)]
mod sim;
mod slices;
#[cfg(test)]
mod tests;
mod vector;
mod wire;

pub use consistency::{
    BarrierId, CommandError, Config, DsmCore, Failure, LockId, Output, SnapshotError,
};
pub use pages::{OutOfRange, Pages, REGIONS_MAX};
pub use region::{Guard, JoinError, Region, RegionError};
pub use slices::{Plain, Slice, SliceMut};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Bytes that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// Where, from the region's beginning.
    pub offset: u64,
    /// What is there now.
    pub bytes: Bytes,
}

impl Diff {
    /// Where it ends, exclusive; `None` for what no memory holds.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.bytes.len() as u64)
    }
}
