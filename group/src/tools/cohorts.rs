//! Coordinator and cohorts: all members get a request, one computes the answer, the others stand by.
//!
//! BJ87, Birman 1993 (the coordinator-cohort tool). Requests go to all members, in one order, and are dealt to them in turn, so
//! that many are computed at a time. The answer goes to all: the one that asked has it, the cohorts forget the request. When a
//! coordinator departs, another member takes its requests over, the same in the eyes of all; it may compute again what the
//! first had computed, but a request is answered once.

use super::requests::{self, Answers, Asked, RequestError, RequestId, Requests, Update};
use super::{Machine, Replicated, UpdateError};
use crate::node::tasks::{self, Tasks};
use crate::node::{Group, JoinError, Node};
use crate::process::GroupView;
use crate::view::MemberId;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

/// Requests that one member computes at a time.
const COMPUTING_MAX: usize = 1000;

/// The requests, and who coordinates each.
#[derive(Default)]
struct State {
    requests: Requests<Option<MemberId>>,
    members: Vec<MemberId>,
}

impl State {
    fn dealt(members: &[MemberId], place: u64) -> Option<MemberId> {
        let turn = place % u64::try_from(members.len().max(1)).expect("a group is small");
        members.get(usize::try_from(turn).ok()?).cloned()
    }
}

impl Machine for State {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        match postcard::from_bytes(update) {
            Ok(Update::Ask(id, body)) => {
                let members = &self.members;
                let asked = self
                    .requests
                    .ask(id, body, |place| Self::dealt(members, place));
                asked.bytes()
            }
            Ok(Update::Answer(place, id, outcome, _)) => {
                self.requests.answer(place, &id, outcome);
                Bytes::new()
            }
            Err(_) => Asked::Refused.bytes(),
        }
    }

    fn view(&mut self, view: &GroupView) {
        self.members.clone_from(&view.members);
        for (place, pending) in self.requests.pending_mut() {
            let there = pending.more.as_ref();
            if !there.is_some_and(|m| self.members.contains(m)) {
                pending.more = Self::dealt(&self.members, place);
            }
        }
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let bytes = postcard::to_stdvec(&self.requests).expect("bytes can be serialised");
        vec![Bytes::from(bytes)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        Some(Self {
            requests: Requests::restore(bytes)?,
            members: Vec::new(),
        })
    }
}

impl Answers for State {
    type More = Option<MemberId>;
    fn requests(&self) -> &Requests<Option<MemberId>> {
        &self.requests
    }
}

/// A member of such a group. Clones are handles of the same.
#[derive(Clone)]
pub struct Cohorts {
    replicated: Replicated<State>,
    clients: Arc<AtomicU64>,
}

impl Cohorts {
    /// Joins the group of this name, or founds it; `compute` answers the requests that this member coordinates, several at a
    /// time. (What takes a processor for long belongs on a thread of its own.) The future that comes with the handle does the
    /// work: spawn it; it ends when this member is out.
    ///
    /// # Errors
    /// [`JoinError`].
    pub async fn join<C, T>(
        node: &Node,
        name: &str,
        compute: C,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<C, T>), JoinError>
    where
        C: Fn(Bytes) -> T + Send + Sync,
        T: Future<Output = Bytes> + Send,
    {
        let (replicated, work) = Replicated::join(node, name).await?;
        let computing = coordinate(replicated.clone(), compute);
        let cohorts = Self {
            replicated,
            clients: Arc::default(),
        };
        Ok((cohorts, tasks::both(work, computing)))
    }

    /// The group, for its views, and to leave it.
    pub fn group(&self) -> &Group {
        self.replicated.group()
    }

    /// Asks for something, once, and waits for the answer.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn call(&self, request: impl Into<Bytes>) -> Result<Bytes, RequestError> {
        // Each is a client of its own: many may be open.
        let nth = self.clients.fetch_add(1, Ordering::Relaxed);
        let id = requests::Numbers::new(self.group().me(), nth).next();
        self.request(id, request).await
    }

    /// Asks for something under an id of the client's own: asked again, here or at another member, it is answered as the first
    /// time.
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

    /// The answer to a request, as every member has it. `None`: it has none yet.
    pub fn answer(&self, id: &RequestId) -> Option<Result<Bytes, RequestError>> {
        self.replicated.read(|m| m.requests.outcome(id))?
    }

    /// Requests that wait for their answers, as this member knows, and how many of them it coordinates.
    pub fn waiting(&self) -> (usize, usize) {
        let me = self.group().me();
        let count = self.replicated.read(|m| {
            let mine = m
                .requests
                .pending()
                .filter(|(_, p)| p.more.as_ref() == Some(me));
            (m.requests.pending().count(), mine.count())
        });
        count.unwrap_or_default()
    }
}

/// Computes what is this member's to compute.
async fn coordinate<C, T>(replicated: Replicated<State>, compute: C)
where
    C: Fn(Bytes) -> T + Send + Sync,
    T: Future<Output = Bytes> + Send,
{
    let me = replicated.group().me().clone();
    let (compute, replicated) = (&compute, &replicated);
    let mut computing = Tasks::new();
    // With their ids: in a state that was begun anew, others have the same places.
    let mut begun: BTreeMap<u64, RequestId> = BTreeMap::new();
    loop {
        // What is answered does not come again.
        if let Some(first) = replicated.read(|m| m.requests.pending().next().map(|(p, _)| p)) {
            begun = first.map_or_else(BTreeMap::new, |first| begun.split_off(&first));
        }
        let next = {
            let mut next = pin!(replicated.when(|m| {
                let mine = |(place, p): &(u64, &requests::Pending<Option<MemberId>>)| {
                    p.more.as_ref() == Some(&me) && begun.get(place) != Some(&p.id)
                };
                let mut pending = m.requests.pending();
                let found = pending.find(mine);
                found.map(|(place, p)| (place, p.id.clone(), p.body.clone()))
            }));
            poll_fn(|cx| {
                let _ = computing.poll(cx);
                if computing.len() >= COMPUTING_MAX {
                    return Poll::Pending;
                }
                next.as_mut().poll(cx)
            })
            .await
        };
        let Ok((place, id, body)) = next else {
            return;
        };
        begun.insert(place, id.clone());
        computing.push(async move {
            let request = (place, id);
            let answer = compute(body).await;
            // The same answer once more does nothing.
            while let Err(UpdateError::Unknown) =
                requests::conclude(replicated, &request, answer.clone(), Bytes::new()).await
            {
            }
        });
    }
}
