//! A service with a primary: it executes the requests, the backups have what it did before anybody hears the answer.
//!
//! BJ87, Budhiraja 1993. Requests go to all members, in one order. The oldest member executes them one after the other and sends
//! what changed, with the answer, to all; all apply it at the same place. When the primary departs, the next in rank has every
//! request and every change that any survivor has (virtual synchrony), and goes on with the first request that has no answer.
//! So a request changes the state once, whatever fails. It may be *executed* again, at another member, if the first one died
//! before anybody had its answer: what an execution does to the world outside is its own affair.

use super::requests::{self, Answers, Asked, Numbers, RequestError, RequestId, Requests, Update};
use super::{Machine, Replicated, UpdateError};
use crate::node::{JoinError, Node, tasks};
use crate::process::GroupView;
use crate::view::MemberId;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the primary made of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// What all members apply to the state.
    pub change: Bytes,
    /// For the client.
    pub answer: Bytes,
}

/// Who has an answer, and what it changed, before its client hears it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum HeldBy {
    /// Half of the backups: an answer outlives the failure of fewer than half of the members, and a slow backup is not waited
    /// for.
    #[default]
    Half,
    /// All members, and they have applied it: an answer is never lost while any of them goes on, and who reads at a backup what
    /// a client was told finds it. Costs a round trip to the slowest member, and waits for one that is getting the state.
    All,
}

/// The state of a service. Other than of a [`Machine`], its requests need not be deterministic: one member executes them.
pub trait Service: Default + Send + 'static {
    /// At the primary: executes a request. The state does not change before [`Service::apply`]. Must not wait for the group.
    fn execute(&self, request: &Bytes) -> Executed;

    /// At every member, the primary too: applies what an execution changes. Deterministic.
    fn apply(&mut self, change: &Bytes);

    /// The state as bytes; the same state gives the same bytes.
    fn snapshot(&self) -> Vec<Bytes>;

    /// The state from [`Service::snapshot`]'s bytes; `None` for what is not one.
    fn restore(bytes: &Bytes) -> Option<Self>;
}

#[derive(Default)]
struct State<S> {
    requests: Requests<()>,
    primary: Option<MemberId>,
    service: S,
}

impl<S: Service> Machine for State<S> {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        match postcard::from_bytes(update) {
            Ok(Update::Ask(id, body)) => self.requests.ask(id, body, |_| ()).bytes(),
            Ok(Update::Answer(place, id, outcome, change)) => {
                let changes = outcome.is_some();
                if self.requests.answer(place, &id, outcome).is_some() && changes {
                    self.service.apply(&change);
                }
                Bytes::new()
            }
            Err(_) => Asked::Refused.bytes(),
        }
    }

    fn view(&mut self, view: &GroupView) {
        self.primary = view.leader().cloned();
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let table = postcard::to_stdvec(&self.requests).expect("bytes can be serialised");
        let mut head = BytesMut::with_capacity(8 + table.len());
        head.put_u64_le(table.len() as u64);
        head.extend_from_slice(&table);
        let mut segments = vec![head.freeze()];
        segments.extend(self.service.snapshot());
        segments
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        let mut rest = bytes.clone();
        let table = usize::try_from(rest.try_get_u64_le().ok()?).ok()?;
        if table > rest.len() {
            return None;
        }
        Some(Self {
            requests: Requests::restore(&rest.split_to(table))?,
            primary: None,
            service: S::restore(&rest)?,
        })
    }
}

impl<S: Service> Answers for State<S> {
    type More = ();
    fn requests(&self) -> &Requests<()> {
        &self.requests
    }
}

/// A handle of a service. Clones are handles of the same.
pub struct PrimaryBackup<S> {
    replicated: Replicated<State<S>>,
    clients: Arc<AtomicU64>,
}

impl<S> Clone for PrimaryBackup<S> {
    fn clone(&self) -> Self {
        Self {
            replicated: self.replicated.clone(),
            clients: Arc::clone(&self.clients),
        }
    }
}

impl<S: Service> PrimaryBackup<S> {
    /// Joins the service of this name, or founds it. The future that comes with the handle does the work: spawn it; it ends when
    /// this member is out.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join(
        node: &Node,
        name: &str,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<S>), JoinError> {
        let (replicated, work) = Replicated::join(node, name).await?;
        let executing = execute(replicated.clone());
        let service = Self {
            replicated,
            clients: Arc::default(),
        };
        Ok((service, tasks::both(work, executing)))
    }

    /// The group, for its views, and to leave it.
    pub fn group(&self) -> &crate::node::Group {
        self.replicated.group()
    }

    /// Who is primary; `None` before the first view.
    pub fn primary(&self) -> Option<MemberId> {
        self.replicated.read(|m| m.primary.clone())?
    }

    /// Reads the state as it is here. `None`: it has not come yet.
    pub fn read<T>(&self, f: impl FnOnce(&S) -> T) -> Option<T> {
        self.replicated.read(|m| f(&m.service))
    }

    /// Waits until the state here is like this.
    ///
    /// # Errors
    /// [`UpdateError::Out`].
    pub async fn until(&self, f: impl Fn(&S) -> bool) -> Result<(), UpdateError> {
        self.replicated.until(|m| f(&m.service)).await
    }

    /// Asks for something under an id of the client's own: asked again, here or at another member, it is answered as the first
    /// time. The answer comes when half of the backups hold it and what was changed.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        id: RequestId,
        request: impl Into<Bytes>,
    ) -> Result<Bytes, RequestError> {
        requests::request(&self.replicated, id, request.into()).await
    }

    /// As [`PrimaryBackup::request`], answered when so many have it.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request_held(
        &self,
        id: RequestId,
        request: impl Into<Bytes>,
        by: HeldBy,
    ) -> Result<Bytes, RequestError> {
        let answer = self.request(id, request).await?;
        match by {
            HeldBy::Half => {}
            HeldBy::All => self.replicated.barrier().await?,
        }
        Ok(answer)
    }

    /// A client that numbers its requests itself. One that asks for several things at once needs several.
    pub fn client(&self) -> Client<S> {
        let nth = self.clients.fetch_add(1, Ordering::Relaxed);
        Client {
            numbers: Numbers::new(self.group().me(), nth),
            service: self.clone(),
            by: HeldBy::default(),
        }
    }
}

/// A client of a service, at a member.
pub struct Client<S> {
    service: PrimaryBackup<S>,
    numbers: Numbers,
    by: HeldBy,
}

impl<S: Service> Client<S> {
    /// The same, with its answers from now on held by so many.
    #[must_use]
    pub fn held_by(mut self, by: HeldBy) -> Self {
        self.by = by;
        self
    }

    /// Asks for something, once, and waits for the answer.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn call(&mut self, request: impl Into<Bytes>) -> Result<Bytes, RequestError> {
        let id = self.numbers.next();
        self.service.request_held(id, request, self.by).await
    }
}

/// The primary's work: nothing, at the others.
async fn execute<S: Service>(replicated: Replicated<State<S>>) {
    let me = replicated.group().me().clone();
    loop {
        let next = replicated.when(|m| {
            let first = m.requests.pending().next();
            let (place, pending) = first.filter(|_| m.primary.as_ref() == Some(&me))?;
            let request = (place, pending.id.clone());
            Some((request, m.service.execute(&pending.body)))
        });
        let Ok((request, done)) = next.await else {
            return;
        };
        let told = requests::conclude(&replicated, &request, done.answer, done.change).await;
        // In a state that came anew the request waits or not: it is looked at again.
        if !matches!(told, Ok(()) | Err(UpdateError::Unknown)) {
            return;
        }
    }
}
