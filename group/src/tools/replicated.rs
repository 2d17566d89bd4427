//! A state machine at every member, fed by the same updates in the same order.
//!
//! BJ87 (replicated data: updates multicast, reads local).

use crate::node::tasks::look;
use crate::node::{Event, Events, Group, JoinError, Node, SendError};
use crate::process::{GroupView, Multicast, Order, ThreadId, Want};
use crate::view::MemberId;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;
use tokio::sync::{Notify, oneshot};

/// A deterministic state: the same updates and views in the same order give the same state and answers everywhere.
pub trait Machine: Default + Send + 'static {
    /// Applies an update of a member, and answers it. What cannot be read must change nothing, the same everywhere.
    fn apply(&mut self, from: &MemberId, update: &Bytes) -> Bytes;

    /// A view begins: members may have departed.
    fn view(&mut self, _view: &GroupView) {}

    /// The state as bytes; the same state gives the same bytes.
    fn snapshot(&self) -> Vec<Bytes>;

    /// The state from [`Machine::snapshot`]'s bytes; `None` for what is not one.
    fn restore(bytes: &Bytes) -> Option<Self>;
}

/// Why an update has no answer.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// It was not sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// This member is out; whether the update was applied elsewhere is not known.
    #[error("this member is out of the group")]
    Out,
    /// The state came anew, from another member: whether the update is in it is not known.
    #[error("the state came anew, and the update may be in it or not")]
    Unknown,
}

struct Shared<M> {
    machine: M,
    /// Whether the state is there.
    there: bool,
    next: u64,
    waiting: BTreeMap<u64, oneshot::Sender<Bytes>>,
    out: bool,
}

/// A handle of a replicated machine. Clones are handles of the same.
pub struct Replicated<M> {
    group: Group,
    shared: Arc<Mutex<Shared<M>>>,
    changed: Arc<Notify>,
}

impl<M> Clone for Replicated<M> {
    fn clone(&self) -> Self {
        Self {
            group: self.group.clone(),
            shared: Arc::clone(&self.shared),
            changed: Arc::clone(&self.changed),
        }
    }
}

impl<M: Machine> Replicated<M> {
    /// Joins the group of this name. The future that comes with the handle does the work: spawn it; it ends when this member
    /// is out.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join(
        node: &Node,
        name: &str,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<M>), JoinError> {
        let (group, events) = Group::join(node, name).await?;
        let shared = Arc::new(Mutex::new(Shared {
            machine: M::default(),
            there: false,
            next: 0,
            waiting: BTreeMap::new(),
            out: false,
        }));
        let changed = Arc::new(Notify::new());
        let me = group.me().clone();
        let work = run(me, events, Arc::clone(&shared), Arc::clone(&changed));
        let replicated = Self {
            group,
            shared,
            changed,
        };
        Ok((replicated, work))
    }

    /// The group, for its views, and to leave it.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Reads the state as it is here: everything that this member was answered is in it. `None`: the state has not come yet.
    pub fn read<T>(&self, f: impl FnOnce(&M) -> T) -> Option<T> {
        let shared = lock(&self.shared);
        shared.there.then(|| f(&shared.machine))
    }

    /// Waits until the state here is like this.
    ///
    /// # Errors
    /// [`UpdateError::Out`].
    pub async fn until(&self, f: impl Fn(&M) -> bool) -> Result<(), UpdateError> {
        self.when(|m| f(m).then_some(())).await
    }

    /// Waits until the state here has such a thing, and gives it. Asked after every change; states that pass while nobody asks
    /// are not seen.
    ///
    /// # Errors
    /// [`UpdateError::Out`].
    pub async fn when<T>(&self, f: impl Fn(&M) -> Option<T>) -> Result<T, UpdateError> {
        let found = || {
            let shared = lock(&self.shared);
            if shared.out {
                return Some(Err(UpdateError::Out));
            }
            let there = shared.there.then_some(&shared.machine);
            there.and_then(&f).map(Ok)
        };
        look(&self.changed, found).await
    }

    /// Sends an update, and gives the machine's answer when it has been applied here, and so at the same place in the order
    /// everywhere.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn update(&self, update: &[u8]) -> Result<Bytes, UpdateError> {
        self.submit(update, false).await
    }

    /// As [`Replicated::update`], but no member applies it before half of the others hold it: what the answer says outlives the
    /// failure of fewer than half of the members.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn update_safe(&self, update: &[u8]) -> Result<Bytes, UpdateError> {
        self.submit(update, true).await
    }

    /// Waits until every other member has applied all that this one has. A member that departs is not waited for; one that has
    /// just joined is, until it has the state.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn barrier(&self) -> Result<(), UpdateError> {
        // In the order of updates, and none itself: whoever takes it has taken what came before, and lets it go.
        let order = Order::Total(ThreadId::default());
        let mut replies = self
            .group
            .call(order, Bytes::new(), Want::All, None)
            .await?;
        while replies.next().await.is_some() {}
        if replies.over() {
            Ok(())
        } else {
            Err(UpdateError::Out)
        }
    }

    async fn submit(&self, update: &[u8], safe: bool) -> Result<Bytes, UpdateError> {
        // What is sent before the state is there may be in the state, and then is never delivered here.
        self.until(|_| true).await?;
        let (done, applied) = oneshot::channel();
        let number = {
            let mut shared = lock(&self.shared);
            shared.next += 1;
            let number = shared.next;
            shared.waiting.insert(number, done);
            number
        };
        let mut body = BytesMut::with_capacity(8 + update.len());
        body.put_u64_le(number);
        body.extend_from_slice(update);
        let mut message = Multicast::new(Order::Total(ThreadId::default()), body);
        message.safe = safe;
        if let Err(error) = self.group.send(message).await {
            lock(&self.shared).waiting.remove(&number);
            return Err(error.into());
        }
        applied.await.map_err(|_| match lock(&self.shared).out {
            true => UpdateError::Out,
            false => UpdateError::Unknown,
        })
    }
}

fn lock<M>(shared: &Mutex<Shared<M>>) -> std::sync::MutexGuard<'_, Shared<M>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run<M: Machine>(
    me: MemberId,
    mut events: Events,
    shared: Arc<Mutex<Shared<M>>>,
    changed: Arc<Notify>,
) {
    while let Some(event) = events.next().await {
        let mut shared = lock(&shared);
        match event {
            Event::Init => shared.there = true,
            Event::State(bytes) => {
                let Some(machine) = M::restore(&bytes) else {
                    tracing::error!("the state that came is not one; this member is of no use");
                    break;
                };
                shared.machine = machine;
                shared.there = true;
                shared.waiting.clear();
            }
            Event::View(view) => shared.machine.view(&view),
            // Only what comes in one order everywhere is an update.
            Event::Message(m) if matches!(m.order(), Some(Order::Total(_) | Order::View)) => {
                let mut body = m.body().clone();
                // What is no update is the same nothing everywhere.
                if let Ok(number) = body.try_get_u64_le() {
                    let answer = shared.machine.apply(m.from(), &body);
                    if *m.from() == me
                        && let Some(done) = shared.waiting.remove(&number)
                    {
                        let _ = done.send(answer);
                    }
                }
            }
            Event::Message(_) => {}
            Event::StateWanted(wanted) => wanted.give(shared.machine.snapshot()),
            Event::Left { .. } => break,
        }
        drop(shared);
        // Those who wait look when what came together has been taken, not after each of many.
        if !events.more_at_hand() {
            changed.notify_waiters();
        }
    }
    // Whoever waits learns that nothing comes.
    let mut shared = lock(&shared);
    shared.out = true;
    shared.waiting.clear();
    drop(shared);
    changed.notify_waiters();
}
