//! A region bound to a group: the driver of [`DsmCore`], and what programs hold.

use super::slices::{Memory, Plain, Slice, SliceMut};
use super::{
    BarrierId, CommandError, Config, Diff, DsmCore, Failure, LockId, Output, Pages, SnapshotError,
};
use crate::node::{self, Event, Events, Group, Node, SendError, StateWanted};
use crate::process::{GroupView, Multicast, Order, ThreadId};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use thiserror::Error;
use tokio::sync::{Notify, OwnedMutexGuard, oneshot};

/// Version of what a joiner is given; its first byte.
const FORMAT: u8 = 1;
/// Bytes that may wait to be sent before a lock or a barrier is waited for.
const OUTGOING_BYTES_MAX: usize = 4 << 20;

/// Why a region was not joined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The group was not joined.
    #[error(transparent)]
    Group(#[from] node::JoinError),
    /// There is no memory for it: see [`Pages::new`].
    #[error("no memory for the region")]
    Memory(#[from] io::Error),
    /// The members have it in another size.
    #[error("the region has {theirs} bytes, not {ours}")]
    Size {
        /// Bytes that its members share.
        theirs: u64,
        /// Bytes that were asked for, in whole pages.
        ours: u64,
    },
    /// What came is no copy that this version can begin with.
    #[error("the copy that came cannot be used")]
    State(#[from] SnapshotError),
    /// This member is out of the group before the copy came.
    #[error("out of the group before the region was there")]
    Left,
}

/// Why a lock was not got, or a barrier not passed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionError {
    /// The region has no such lock or barrier.
    #[error("no such lock or barrier")]
    Unknown,
    /// This member is out of the group. Join again for a new copy.
    #[error("this member is out of the group")]
    Left,
    /// The copy here cannot go on. This member leaves; join again for a new copy.
    #[error("this copy of the region cannot go on")]
    Failed(#[from] Failure),
    /// All that had the region are gone, and another process began it anew. This member leaves; join again.
    #[error("all that had the region are gone, and another began it anew")]
    BegunAnew,
    /// A slice is held of bytes that another process has written: it shows what was there before. Give slices back
    /// before you lock or wait; if you do, the program has a race.
    #[error("a slice is held of bytes that another process has written")]
    Borrowed,
}

/// Memory that the members of a group share. Clones are handles of the same; see [the module](super).
///
/// Beside the locks' order, threads of one process are kept apart by slices: [`Region::slice`] and its relatives panic
/// where a `RefCell` would, by ranges of bytes.
#[derive(Clone)]
pub struct Region {
    shared: Arc<Shared>,
}

struct Shared {
    group: Group,
    memory: Memory,
    /// The driver's lock: it covers the core and the order of what it says.
    inner: Mutex<Inner>,
    to_send: Notify,
    /// There is room, or this member is out.
    room: Notify,
    /// Threads of this process that want the same lock, or come to the same barrier, take turns.
    turns: Mutex<BTreeMap<Turn, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Lock(LockId),
    Barrier(BarrierId),
}

struct Inner {
    config: Config,
    /// `None` until the region is there.
    core: Option<DsmCore>,
    me: MemberId,
    /// Each member, and the view in which it joined: a process that joins again is another member of the region.
    joined: BTreeMap<MemberId, u64>,
    /// The copy that came; it is used with the view that follows.
    copy: Option<Bytes>,
    wanted: Vec<StateWanted>,
    locks: BTreeMap<LockId, oneshot::Sender<bool>>,
    barriers: BTreeMap<BarrierId, oneshot::Sender<Vec<MemberId>>>,
    outgoing: VecDeque<(Order, Bytes)>,
    outgoing_bytes: usize,
    over: Option<RegionError>,
    /// The group has let this member go.
    out: bool,
    not_joined: Option<JoinError>,
}

/// What stands in front of the core's copy for a joiner.
#[derive(Serialize, Deserialize)]
struct Head {
    region_bytes: u64,
    joined: BTreeMap<MemberId, u64>,
}

/// A member's name in the region: never used again, as the core asks.
fn name(member: &MemberId, joined: u64) -> MemberId {
    let incarnation = member.incarnation.wrapping_add(u128::from(joined));
    MemberId::new(member.name.clone(), incarnation)
}

impl Inner {
    fn names(&self, members: &[MemberId]) -> Vec<MemberId> {
        let name = |m: &MemberId| name(m, self.joined.get(m).copied().unwrap_or(0));
        members.iter().map(name).collect()
    }

    fn core(&mut self) -> Result<&mut DsmCore, RegionError> {
        if let Some(why) = &self.over {
            return Err(why.clone());
        }
        Ok(self.core.as_mut().expect("a region is handed out with one"))
    }

    /// Nobody waits any more.
    fn end(&mut self, why: RegionError) {
        self.over.get_or_insert(why);
        self.locks.clear();
        self.barriers.clear();
        self.outgoing.clear();
        self.outgoing_bytes = 0;
    }
}

impl Region {
    /// Joins the region of this name, or founds it with zeros: `bytes` of them, in whole pages, the same at all members.
    /// It is there, with what the members have in it, when this returns. The future that comes with it does the work:
    /// spawn it; it ends when this member is out.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join(
        node: &Node,
        name: &str,
        bytes: usize,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), JoinError> {
        let pages = Pages::new(bytes)?;
        let config = Config::new(pages.len() as u64);
        let (group, events) = Group::join(node, name).await?;
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                config,
                core: None,
                me: group.me().clone(),
                joined: BTreeMap::new(),
                copy: None,
                wanted: Vec::new(),
                locks: BTreeMap::new(),
                barriers: BTreeMap::new(),
                outgoing: VecDeque::new(),
                outgoing_bytes: 0,
                over: None,
                out: false,
                not_joined: None,
            }),
            group,
            memory: Memory::new(pages),
            to_send: Notify::new(),
            room: Notify::new(),
            turns: Mutex::default(),
        });
        let mut work = Box::pin(run(Arc::clone(&shared), events));
        // The work is done here until the region is there.
        std::future::poll_fn(|cx| {
            let ended = work.as_mut().poll(cx).is_ready();
            let mut inner = shared.inner();
            if ended {
                let why = inner.not_joined.take();
                return Poll::Ready(Err(why.unwrap_or(JoinError::Left)));
            }
            if inner.core.is_some() && inner.over.is_none() {
                return Poll::Ready(Ok(()));
            }
            Poll::Pending
        })
        .await?;
        Ok((Self { shared }, work))
    }

    /// The group, for its views. To leave it, see [`Region::leave`].
    pub fn group(&self) -> &Group {
        &self.shared.group
    }

    /// This member as [`Region::barrier`] names it: its node's name, and a number for this membership alone.
    pub fn me(&self) -> MemberId {
        self.shared.inner().me.clone()
    }

    /// Waits for a lock, below 1024. No other member holds it then, and what was written under it is here. Threads of
    /// one process take turns. If this future is dropped, the lock is given back when it comes.
    ///
    /// A member that was cut off from the others does not know it at once: it may hold a lock that has passed on.
    /// What it writes then is seen by nobody.
    ///
    /// # Errors
    /// [`RegionError`].
    pub async fn lock(&self, lock: u32) -> Result<Guard, RegionError> {
        let lock = LockId(lock);
        let turn = self.turn(Turn::Lock(lock)).await;
        self.room().await;
        let granted = {
            let mut inner = self.shared.inner();
            // Where a call was given up, what it asked for still comes.
            if !inner.locks.contains_key(&lock) {
                inner.core()?.handle_local_acquire(lock).map_err(refused)?;
            }
            let (done, granted) = oneshot::channel();
            inner.locks.insert(lock, done);
            self.shared.settle(&mut inner);
            granted
        };
        let mut asking = Asking {
            region: self,
            lock,
            granted,
        };
        let Ok(abandoned) = (&mut asking.granted).await else {
            return Err(self.why());
        };
        let guard = Guard {
            region: self.clone(),
            lock,
            abandoned,
            _turn: turn,
        };
        if self.shared.memory.is_behind() {
            return Err(RegionError::Borrowed);
        }
        Ok(guard)
    }

    /// Waits until every member has come to this barrier, below 16, and gives them: the same list, in the same order,
    /// to each. What they had written before is here then. One thread of each process comes; if this future is dropped,
    /// the process counts as having come.
    ///
    /// A member that departs is not waited for, one that joins is.
    ///
    /// # Errors
    /// [`RegionError`].
    pub async fn barrier(&self, barrier: u32) -> Result<Vec<MemberId>, RegionError> {
        let barrier = BarrierId(barrier);
        let _turn = self.turn(Turn::Barrier(barrier)).await;
        self.room().await;
        loop {
            let (passed, ours) = {
                let mut inner = self.shared.inner();
                // Where a call was given up, its round comes first.
                let ours = !inner.barriers.contains_key(&barrier);
                if ours {
                    let diffs = self.shared.memory.pages.collect();
                    let arrived = inner.core()?.handle_local_barrier(barrier, diffs);
                    self.shared.settle(&mut inner);
                    arrived.map_err(refused)?;
                }
                let (done, passed) = oneshot::channel();
                inner.barriers.insert(barrier, done);
                (passed, ours)
            };
            let members = passed.await.map_err(|_| self.why())?;
            if self.shared.memory.is_behind() {
                return Err(RegionError::Borrowed);
            }
            if ours {
                return Ok(members);
            }
        }
    }

    /// A part of the region to read: `len` values from this byte on. Nobody writes it while it lives: give it back before
    /// you lock or wait.
    ///
    /// # Panics
    /// Where it does not lie within the region, where the offset does not suit the type, or where a
    /// [`Region::slice_mut`] of the same bytes lives.
    #[track_caller]
    pub fn slice<T: Plain>(&self, offset: usize, len: usize) -> Slice<'_, T> {
        self.shared.memory.slice(offset, len)
    }

    /// A part of the region to read and write. What is written is sent at this process's next release or barrier.
    ///
    /// No system call may write into it, `read(2)` neither: it would fail with `EFAULT`.
    ///
    /// # Panics
    /// As [`Region::slice`], and where any slice of the same bytes lives.
    #[track_caller]
    pub fn slice_mut<T: Plain>(&self, offset: usize, len: usize) -> SliceMut<'_, T> {
        self.shared.memory.slice_mut(offset, len)
    }

    /// One value.
    ///
    /// # Panics
    /// As [`Region::slice`].
    #[track_caller]
    pub fn get<T: Plain>(&self, offset: usize) -> T {
        self.slice(offset, 1)[0]
    }

    /// Sets one value.
    ///
    /// # Panics
    /// As [`Region::slice_mut`].
    #[track_caller]
    pub fn set<T: Plain>(&self, offset: usize, value: T) {
        self.slice_mut(offset, 1)[0] = value;
    }

    /// The memory, for who does without the slices' checks: see [`Pages::as_ptr`].
    pub fn as_ptr(&self) -> *mut u8 {
        self.shared.memory.pages.as_ptr()
    }

    /// Bytes of the region.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.shared.memory.pages.len()
    }

    /// Leaves, when what was released is with all members. What was written and not released is lost, and locks that are
    /// held pass on as those of a member that died.
    pub async fn leave(&self) {
        let drained = |inner: &Inner| inner.over.is_some() || inner.outgoing.is_empty();
        self.shared.until(drained).await;
        // One that is out already has left.
        let _ = self.shared.group.leave().await;
        self.shared.until(|inner| inner.out).await;
    }

    fn why(&self) -> RegionError {
        self.shared
            .inner()
            .over
            .clone()
            .unwrap_or(RegionError::Left)
    }

    async fn turn(&self, which: Turn) -> Option<OwnedMutexGuard<()>> {
        let known = {
            let config = &self.shared.inner().config;
            match which {
                Turn::Lock(lock) => lock.0 < config.locks_max,
                Turn::Barrier(barrier) => barrier.0 < config.barriers_max,
            }
        };
        // What the core refuses needs no turn.
        if !known {
            return None;
        }
        let turn = {
            let turns = self.shared.turns.lock();
            let mut turns = turns.unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(which).or_default())
        };
        Some(turn.lock_owned().await)
    }

    async fn room(&self) {
        let enough =
            |inner: &Inner| inner.over.is_some() || inner.outgoing_bytes <= OUTGOING_BYTES_MAX;
        self.shared.until(enough).await;
    }
}

fn refused(error: CommandError) -> RegionError {
    match error {
        CommandError::Unknown => RegionError::Unknown,
        CommandError::Failed => RegionError::Left,
        CommandError::Busy | CommandError::NotHeld | CommandError::OutOfRange => {
            unreachable!("threads take turns, and pages lie within the region: {error}")
        }
    }
}

/// A lock that is held, and the region. Dropped, it is passed on with all that this process has written. If its thread
/// panics meanwhile, this member leaves instead, and what it wrote is seen by nobody.
pub struct Guard {
    region: Region,
    lock: LockId,
    abandoned: bool,
    _turn: Option<OwnedMutexGuard<()>>,
}

impl Guard {
    /// Whether a holder departed without passing the lock on: what it had released before is here, what it wrote since is
    /// not. So what the lock guards may lack what the holder was about to write.
    pub fn abandoned(&self) -> bool {
        self.abandoned
    }

    /// Passes the lock on, as a drop does.
    pub fn release(self) {}
}

impl Deref for Guard {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.region
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let shared = &self.region.shared;
        let mut inner = shared.inner();
        if std::thread::panicking() {
            shared.end(&mut inner, RegionError::Left);
        } else {
            shared.release(&mut inner, self.lock);
        }
    }
}

/// A call of [`Region::lock`] that waits.
struct Asking<'a> {
    region: &'a Region,
    lock: LockId,
    granted: oneshot::Receiver<bool>,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut inner = self.region.shared.inner();
        // What was granted and not taken up; what is granted from now on finds that nobody waits.
        self.granted.close();
        if self.granted.try_recv().is_ok() {
            self.region.shared.release(&mut inner, self.lock);
        }
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is like this.
    async fn until(&self, f: impl Fn(&Inner) -> bool) {
        loop {
            let room = self.room.notified();
            let mut room = pin!(room);
            room.as_mut().enable();
            if f(&self.inner()) {
                return;
            }
            room.await;
        }
    }

    /// Collecting and releasing is one step: see the contract.
    fn release(&self, inner: &mut Inner, lock: LockId) {
        let Ok(core) = inner.core() else { return };
        match core.handle_local_release(lock, self.memory.pages.collect()) {
            Ok(()) | Err(CommandError::Failed) => {}
            Err(error) => unreachable!("who releases holds: {error}"),
        }
        self.settle(inner);
    }

    fn end(&self, inner: &mut Inner, why: RegionError) {
        inner.end(why);
        self.room.notify_waiters();
        self.to_send.notify_one();
    }

    /// Does what the core asks for.
    fn settle(&self, inner: &mut Inner) {
        while let Some(output) = inner.core.as_mut().and_then(DsmCore::poll_output) {
            match output {
                Output::Fbcast(bytes) => inner.put(Order::Fifo, bytes),
                Output::Abcast(bytes) => inner.put(Order::Total(ThreadId::default()), bytes),
                Output::Apply(diff) => {
                    if !self.memory.apply(diff) {
                        return self.end(inner, RegionError::Borrowed);
                    }
                }
                Output::Granted { lock, abandoned } => {
                    let asked = inner.locks.remove(&lock);
                    if asked.is_none_or(|a| a.send(abandoned).is_err()) {
                        self.release_unwanted(inner, lock);
                    }
                }
                Output::Passed { barrier, members } => {
                    if let Some(waits) = inner.barriers.remove(&barrier) {
                        let _ = waits.send(members);
                    }
                }
                Output::Failed(failure) => return self.end(inner, failure.into()),
            }
        }
        if !inner.outgoing.is_empty() {
            self.to_send.notify_one();
        }
    }

    /// Nobody waits for it any more. What it says is drained by the caller.
    fn release_unwanted(&self, inner: &mut Inner, lock: LockId) {
        let diffs = self.memory.pages.collect();
        if let Some(core) = &mut inner.core {
            match core.handle_local_release(lock, diffs) {
                // What a peer said may have failed the core since.
                Ok(()) | Err(CommandError::Failed) => {}
                Err(error) => unreachable!("it has just been granted: {error}"),
            }
        }
    }

    fn on_event(&self, event: Event) {
        let mut inner = self.inner();
        if inner.over.is_some() {
            return;
        }
        match event {
            Event::Init => {}
            Event::State(_) if inner.core.is_some() => {
                self.end(&mut inner, RegionError::BegunAnew);
            }
            Event::State(copy) => inner.copy = Some(copy),
            Event::View(view) => {
                if let Err(why) = self.on_view(&mut inner, &view) {
                    inner.not_joined = Some(why);
                    self.end(&mut inner, RegionError::Left);
                }
            }
            Event::Message(m) => {
                let Some(joined) = inner.joined.get(m.from()) else {
                    return;
                };
                let from = name(m.from(), *joined);
                let Some(core) = &mut inner.core else { return };
                match m.order() {
                    Some(Order::Fifo) => core.handle_update(&from, m.body()),
                    Some(Order::Total(_)) => core.handle_ordered(&from, m.body()),
                    _ => {}
                }
                self.settle(&mut inner);
            }
            // The view that joiners are in begins next.
            Event::StateWanted(wanted) => inner.wanted.push(wanted),
            Event::Left { .. } => self.end(&mut inner, RegionError::Left),
        }
    }

    fn on_view(&self, inner: &mut Inner, view: &GroupView) -> Result<(), JoinError> {
        if let Some(copy) = inner.copy.take() {
            for diff in inner.begin_with(&copy, self.group.me(), self.memory.pages.len() as u64)? {
                // Nobody has borrowed anything yet.
                assert!(self.memory.apply(diff));
            }
        } else {
            inner.joined.retain(|m, _| view.members.contains(m));
            for member in &view.members {
                inner.joined.entry(member.clone()).or_insert(view.id);
            }
            let names = inner.names(&view.members);
            if let Some(core) = &mut inner.core {
                core.handle_view(&names);
            } else {
                inner.me = name(self.group.me(), view.id);
                let core = DsmCore::new(inner.config.clone(), inner.me.clone(), &names);
                inner.core = Some(core);
            }
        }
        self.settle(inner);
        if inner.over.is_none() {
            for wanted in std::mem::take(&mut inner.wanted) {
                // A donor that cannot is passed over.
                if let Some(copy) = inner.copy_for_joiner(&self.memory) {
                    wanted.give(copy);
                }
            }
        }
        Ok(())
    }
}

impl Inner {
    fn put(&mut self, order: Order, bytes: Bytes) {
        self.outgoing_bytes += bytes.len();
        self.outgoing.push_back((order, bytes));
    }

    fn copy_for_joiner(&self, memory: &Memory) -> Option<Vec<Bytes>> {
        let core = self.core.as_ref()?;
        let head = Head {
            region_bytes: self.config.region_bytes,
            joined: self.joined.clone(),
        };
        let head = postcard::to_extend(&head, vec![FORMAT]).expect("names can be serialised");
        let copy = core.snapshot(memory.contents()).ok()?;
        Some(vec![head.into(), copy.into()])
    }

    /// What to apply to the zeros that this member has.
    fn begin_with(
        &mut self,
        copy: &[u8],
        me: &MemberId,
        ours: u64,
    ) -> Result<Vec<Diff>, JoinError> {
        let head = match copy.split_first() {
            Some((&FORMAT, head)) => head,
            Some((&other, _)) => return Err(SnapshotError::Version(other).into()),
            None => return Err(SnapshotError::Damaged.into()),
        };
        let head = postcard::take_from_bytes(head);
        let (head, copy): (Head, _) = head.map_err(|_| SnapshotError::Damaged)?;
        if head.region_bytes != ours {
            let theirs = head.region_bytes;
            return Err(JoinError::Size { theirs, ours });
        }
        let joined = head.joined.get(me).ok_or(SnapshotError::NotForUs)?;
        self.me = name(me, *joined);
        let restored = DsmCore::restore(copy, self.me.clone(), self.config.clone());
        let (core, diffs) = restored?;
        self.core = Some(core);
        self.joined = head.joined;
        Ok(diffs)
    }
}

/// A member's work: what comes is handed in, what the core says goes out.
async fn run(shared: Arc<Shared>, mut events: Events) {
    let mut sending = pin!(send(&shared));
    let take = async {
        while let Some(event) = events.next().await {
            let left = matches!(event, Event::Left { .. });
            shared.on_event(event);
            if left {
                break;
            }
        }
        let mut inner = shared.inner();
        inner.out = true;
        shared.end(&mut inner, RegionError::Left);
    };
    let mut take = pin!(take);
    std::future::poll_fn(|cx| {
        let _ = sending.as_mut().poll(cx);
        take.as_mut().poll(cx)
    })
    .await;
}

/// Sends in order, and leaves when this member is over. Never ends.
async fn send(shared: &Shared) {
    loop {
        let next = {
            let inner = shared.inner();
            if inner.over.is_some() {
                break;
            }
            inner.outgoing.front().cloned()
        };
        let Some((order, bytes)) = next else {
            shared.to_send.notified().await;
            continue;
        };
        let len = bytes.len();
        let sent = shared.group.send(Multicast::new(order, bytes)).await;
        let mut inner = shared.inner();
        match sent {
            Ok(()) => {
                if inner.outgoing.pop_front().is_some() {
                    inner.outgoing_bytes -= len;
                }
                if inner.outgoing.is_empty() || inner.outgoing_bytes <= OUTGOING_BYTES_MAX {
                    shared.room.notify_waiters();
                }
            }
            Err(error) => {
                if error == SendError::TooLarge {
                    tracing::error!("an update of a region does not fit an event");
                }
                shared.end(&mut inner, RegionError::Left);
            }
        }
    }
    let _ = shared.group.leave().await;
    std::future::pending().await
}
