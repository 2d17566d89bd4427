//! Publish and subscribe: a topic is a group, to subscribe is to join it.
//!
//! Birman 1993 (the news facility of Isis). All subscribers of a topic see the same publications in the same order. The last
//! publication that asked for it is retained: whoever subscribes later gets it first, with the state of the group. Who only
//! publishes joins too, and takes nothing.

use crate::node::tasks::Tasks;
use crate::node::{Event, Events, Group, Inputs, JoinError, Node, SendError};
use crate::process::{NAME_BYTES_MAX, Order};
use crate::view::MemberId;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use tokio::sync::mpsc;
use tokio::sync::oneshot::{self, error::TryRecvError};

/// Publications that a subscription may leave in its queue before its process takes no more of the topic.
const QUEUE_MAX: usize = 1024;
/// Before a topic's name, so that topics are no other groups.
const PREFIX: &str = "topic/";
/// A topic's name is at most this long, in bytes.
pub const TOPIC_BYTES_MAX: usize = NAME_BYTES_MAX - PREFIX.len();

const PLAIN: u8 = 0;
const RETAIN: u8 = 1;

/// What was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Who published it.
    pub from: MemberId,
    /// What.
    pub body: Bytes,
    /// Whether it was published before this subscription began.
    pub retained: bool,
}

/// This process's topics. Clones are handles of the same.
#[derive(Clone)]
pub struct Topics(Arc<Hub>);

struct Hub {
    inputs: Inputs,
    slots: Mutex<Slots>,
    pumps: mpsc::UnboundedSender<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// By topic; those that nobody uses are forgotten when there are this many.
#[derive(Default)]
struct Slots {
    by_topic: BTreeMap<String, Arc<tokio::sync::Mutex<Slot>>>,
    tidy_at: usize,
}

impl Slots {
    fn slot(&mut self, topic: &str) -> Arc<tokio::sync::Mutex<Slot>> {
        if self.by_topic.len() >= self.tidy_at {
            self.by_topic.retain(|_, slot| {
                Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|mut s| s.is_used())
            });
            self.tidy_at = 64 + 2 * self.by_topic.len();
        }
        Arc::clone(self.by_topic.entry(topic.to_owned()).or_default())
    }
}

/// The place of one topic's membership, which this process has once, whoever uses it.
#[derive(Default)]
struct Slot {
    seat: Weak<Seat>,
    /// Told when the membership has ended.
    ended: Option<oneshot::Receiver<()>>,
}

impl Slot {
    fn is_used(&mut self) -> bool {
        let ending = self.ended.as_mut().map(oneshot::Receiver::try_recv);
        ending == Some(Err(TryRecvError::Empty))
    }
}

/// A membership; it ends when nobody uses it any more.
struct Seat {
    group: Group,
    shared: Arc<Mutex<Shared>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        // After one that has ended there may be another in its place.
        if !lock(&self.shared).out {
            self.group.begin_to_leave();
        }
    }
}

#[derive(Default)]
struct Shared {
    /// Shared with the publication that is being given.
    subscribers: Arc<BTreeMap<u64, mpsc::Sender<Publication>>>,
    next: u64,
    retained: Option<Publication>,
    out: bool,
}

impl Shared {
    fn subscribe(&mut self) -> mpsc::Receiver<Publication> {
        let (sender, publications) = mpsc::channel(QUEUE_MAX);
        if let Some(retained) = self.retained.clone() {
            let _ = sender.try_send(retained);
        }
        let number = self.next;
        self.next += 1;
        // A membership that ended meanwhile gives nothing: its queue ends at once.
        if !self.out {
            let subscribers = Arc::make_mut(&mut self.subscribers);
            // Where nothing is published, nothing else forgets them.
            subscribers.retain(|_, s| !s.is_closed());
            subscribers.insert(number, sender);
        }
        publications
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A subscription: a queue of publications. Dropped, it ends. One that is not read holds up the topic, and is made to leave when
/// that lasts. What this process publishes itself is outside that bound: whoever publishes to a topic and subscribes to it must
/// read.
pub struct Subscription {
    publications: mpsc::Receiver<Publication>,
    publisher: Publisher,
}

impl Subscription {
    /// The next publication; `None`: this process was made to leave the topic, or the node is gone.
    pub async fn next(&mut self) -> Option<Publication> {
        self.publications.recv().await
    }

    /// Publishes on the same topic.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }
}

/// A handle to publish with. Dropped, it leaves the topic if nothing else in this process uses it.
#[derive(Clone)]
pub struct Publisher(Arc<Seat>);

impl Publisher {
    /// Publishes. Returns when it is on its way.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn publish(&self, body: &[u8]) -> Result<(), SendError> {
        self.send(PLAIN, body).await
    }

    /// Publishes, and has it retained for those who subscribe later, in place of what was retained before. Nothing is retained
    /// after an empty one.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn publish_retained(&self, body: &[u8]) -> Result<(), SendError> {
        self.send(RETAIN, body).await
    }

    async fn send(&self, kind: u8, body: &[u8]) -> Result<(), SendError> {
        let mut message = BytesMut::with_capacity(1 + body.len());
        message.put_u8(kind);
        message.put_slice(body);
        self.0.group.abcast(message.freeze()).await
    }

    /// The topic's group, for its views: publishers are members too.
    pub fn group(&self) -> &Group {
        &self.0.group
    }
}

impl Topics {
    /// The topics of this node. The future that comes with the handle does the work: spawn it; it ends when the handle and all
    /// subscriptions and publishers are dropped.
    pub fn new(node: &Node) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (pumps, mut begun) = mpsc::unbounded_channel();
        let hub = Hub {
            inputs: node.inputs.clone(),
            slots: Mutex::default(),
            pumps,
        };
        let work = async move {
            let mut tasks = Tasks::new();
            poll_fn(|cx| {
                let mut more = true;
                while let Poll::Ready(pump) = begun.poll_recv(cx) {
                    match pump {
                        Some(pump) => tasks.push(pump),
                        None => {
                            more = false;
                            break;
                        }
                    }
                }
                let idle = tasks.poll(cx);
                if more { Poll::Pending } else { idle }
            })
            .await;
        };
        (Self(Arc::new(hub)), work)
    }

    /// Subscribes to a topic: every publication from now on comes, and before it the retained one, if there is one.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn subscribe(&self, topic: &str) -> Result<Subscription, JoinError> {
        let publisher = self.publisher(topic).await?;
        let publications = lock(&publisher.0.shared).subscribe();
        Ok(Subscription {
            publications,
            publisher,
        })
    }

    /// A handle to publish with, without a subscription.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn publisher(&self, topic: &str) -> Result<Publisher, JoinError> {
        if topic.is_empty() || topic.len() > TOPIC_BYTES_MAX {
            return Err(JoinError::Refused);
        }
        let slot = lock(&self.0.slots).slot(topic);
        let mut slot = slot.lock().await;
        Ok(Publisher(self.seat(topic, &mut slot).await?))
    }

    async fn seat(&self, topic: &str, slot: &mut Slot) -> Result<Arc<Seat>, JoinError> {
        let there = slot.seat.upgrade();
        if let Some(seat) = there.filter(|s| !lock(&s.shared).out) {
            return Ok(seat);
        }
        if let Some(ended) = &mut slot.ended {
            // The group takes nobody in again before it is out.
            let _ = ended.await;
            slot.ended = None;
        }
        let name = format!("{PREFIX}{topic}");
        let (group, events) = Group::join_by(&self.0.inputs, &name).await?;
        let shared = Arc::default();
        let (end, ended) = oneshot::channel();
        let pump = pump(events, Arc::clone(&shared), end);
        let seat = Arc::new(Seat { group, shared });
        slot.seat = Arc::downgrade(&seat);
        slot.ended = Some(ended);
        // If the work is not done any more, nothing comes.
        if self.0.pumps.send(Box::pin(pump)).is_err() {
            return Err(JoinError::Gone);
        }
        Ok(seat)
    }
}

/// Takes a membership's events to its subscribers.
async fn pump(mut events: Events, shared: Arc<Mutex<Shared>>, end: oneshot::Sender<()>) {
    while let Some(event) = events.next().await {
        match event {
            Event::State(state) => {
                // What is no state is as none: the next retained publication makes it good.
                let retained: Option<Publication> = postcard::from_bytes(&state).unwrap_or(None);
                let subscribers = {
                    let mut shared = lock(&shared);
                    shared.retained.clone_from(&retained);
                    shared.subscribers.clone()
                };
                if let Some(retained) = retained {
                    give(&shared, subscribers, &retained).await;
                }
            }
            Event::StateWanted(wanted) => {
                let retained = postcard::to_stdvec(&lock(&shared).retained);
                wanted.give(vec![retained.expect("bytes can be serialised").into()]);
            }
            Event::Message(m) if matches!(m.order(), Some(Order::Total(_))) => {
                let mut body = m.body().clone();
                let Ok(kind) = body.try_get_u8() else {
                    continue;
                };
                let mut publication = Publication {
                    from: m.from().clone(),
                    body,
                    retained: true,
                };
                let subscribers = {
                    let mut shared = lock(&shared);
                    if kind == RETAIN {
                        let some = !publication.body.is_empty();
                        shared.retained = some.then(|| publication.clone());
                    }
                    shared.subscribers.clone()
                };
                publication.retained = false;
                give(&shared, subscribers, &publication).await;
            }
            Event::Init | Event::View(_) | Event::Message(_) => {}
            Event::Left { .. } => break,
        }
    }
    let mut shared = lock(&shared);
    shared.out = true;
    shared.subscribers = Arc::default();
    drop(shared);
    let _ = end.send(());
}

/// Gives a publication to those who had subscribed when it came.
async fn give(
    shared: &Mutex<Shared>,
    subscribers: Arc<BTreeMap<u64, mpsc::Sender<Publication>>>,
    publication: &Publication,
) {
    for (number, subscriber) in &*subscribers {
        if subscriber.send(publication.clone()).await.is_err() {
            Arc::make_mut(&mut lock(shared).subscribers).remove(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriptions_that_ended_are_forgotten_where_nothing_is_published() {
        let mut shared = Shared::default();
        let stays = shared.subscribe();
        for _ in 0..100 {
            drop(shared.subscribe());
        }
        assert!(shared.subscribers.len() <= 2);
        assert!(!stays.is_closed() && shared.subscribers.contains_key(&0));
    }
}
