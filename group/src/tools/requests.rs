//! The requests of clients, the same at every member: which wait for an answer, and each client's last answer.
//!
//! Liskov & Cowling 2012 (the client table): a client numbers its requests and has one open at a time, so its last answer is
//! enough to tell a request that comes again from a new one.

use super::{Machine, Replicated, UpdateError};
use crate::node::SendError;
use crate::view::MemberId;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// Requests that wait at a time; more are refused.
const PENDING_MAX: usize = 10_000;
/// Clients whose last answers are remembered; beyond it, the one that was answered longest ago is forgotten.
const CLIENTS_MAX: usize = 10_000;
/// Bytes of answers that are remembered.
const ANSWERS_BYTES_MAX: usize = 16 << 20;

/// Names a request, so that it is executed once although it is asked for again, by the same member or another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestId {
    /// Names the client; at most 256 bytes.
    pub client: Bytes,
    /// The client's number for the request. It grows from request to request.
    pub number: u64,
}

/// Why a request has no answer.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The group did not take it, or this member is out: whether it was executed is not known. It may be asked for again with the
    /// same id, through any member.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The client has asked for something newer, and the answer to this is forgotten.
    #[error("this request is not its client's last, and its answer is forgotten")]
    Stale,
    /// Too many requests wait, or the client's name is too long. It was not executed.
    #[error("too many requests wait")]
    Refused,
    /// The answer is larger than a message may be. The request had no effect.
    #[error("the answer is too large")]
    TooLarge,
}

/// How a request ended; `None`: the answer was too large.
pub(super) type Outcome = Option<Bytes>;

fn bytes_of(outcome: &Outcome) -> usize {
    outcome.as_ref().map_or(0, Bytes::len)
}

/// One that waits for its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pending<T> {
    pub(super) id: RequestId,
    pub(super) body: Bytes,
    /// What else the tool has to know of it.
    pub(super) more: T,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Last {
    number: u64,
    /// When it was answered, counted in answers, and what.
    answer: Option<(u64, Outcome)>,
}

/// The table.
///
/// Invariant: it is changed only by updates of the group, in their order.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Requests<T> {
    next: u64,
    pending: BTreeMap<u64, Pending<T>>,
    clients: BTreeMap<Bytes, Last>,
    /// Clients by when they were answered.
    answered: BTreeMap<u64, Bytes>,
    next_answer: u64,
    answers_bytes: usize,
}

impl<T> Default for Requests<T> {
    fn default() -> Self {
        Self {
            next: 0,
            pending: BTreeMap::new(),
            clients: BTreeMap::new(),
            answered: BTreeMap::new(),
            next_answer: 0,
            answers_bytes: 0,
        }
    }
}

/// What becomes of a request that is asked for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Asked {
    /// It waits, or did already.
    Waits,
    Answered(Outcome),
    Stale,
    Refused,
}

impl<T> Requests<T> {
    /// Somebody asks. `more` is made of the request's place in the order if it is new.
    pub(super) fn ask(&mut self, id: RequestId, body: Bytes, more: impl Fn(u64) -> T) -> Asked {
        match self.clients.get(&id.client) {
            Some(last) if last.number > id.number => return Asked::Stale,
            Some(last) if last.number == id.number => {
                return match &last.answer {
                    Some((_, outcome)) => Asked::Answered(outcome.clone()),
                    None => Asked::Waits,
                };
            }
            _ => {}
        }
        if self.pending.len() >= PENDING_MAX || id.client.len() > 256 {
            return Asked::Refused;
        }
        let last = Last {
            number: id.number,
            answer: None,
        };
        let old = self.clients.insert(id.client.clone(), last);
        if let Some((at, outcome)) = old.and_then(|o| o.answer) {
            self.answered.remove(&at);
            self.answers_bytes -= bytes_of(&outcome);
        }
        let place = self.next;
        self.next += 1;
        let more = more(place);
        self.pending.insert(place, Pending { id, body, more });
        Asked::Waits
    }

    /// This one at this place is answered; gives it. `None`: it was before, or the state was begun anew and another has its
    /// place.
    pub(super) fn answer(
        &mut self,
        place: u64,
        id: &RequestId,
        outcome: Outcome,
    ) -> Option<Pending<T>> {
        self.pending.get(&place).filter(|p| p.id == *id)?;
        let pending = self.pending.remove(&place)?;
        let id = &pending.id;
        let last = self.clients.get_mut(&id.client);
        // A client that has gone on to its next request does not want this answer any more.
        if let Some(last) = last.filter(|l| l.number == id.number) {
            self.answers_bytes += bytes_of(&outcome);
            last.answer = Some((self.next_answer, outcome));
            self.answered.insert(self.next_answer, id.client.clone());
            self.next_answer += 1;
        }
        while self.answered.len() > CLIENTS_MAX || self.answers_bytes > ANSWERS_BYTES_MAX {
            let Some((_, client)) = self.answered.pop_first() else {
                break;
            };
            let forgotten = self.clients.remove(&client).and_then(|l| l.answer);
            self.answers_bytes -= forgotten.map_or(0, |(_, outcome)| bytes_of(&outcome));
        }
        Some(pending)
    }

    /// What became of a request; `None`: it waits.
    pub(super) fn outcome(&self, id: &RequestId) -> Option<Result<Bytes, RequestError>> {
        let last = self.clients.get(&id.client);
        let Some(last) = last.filter(|l| l.number == id.number) else {
            return Some(Err(RequestError::Stale));
        };
        let (_, outcome) = last.answer.as_ref()?;
        Some(outcome.clone().ok_or(RequestError::TooLarge))
    }

    /// The table from a member's bytes; `None` for what is none.
    pub(super) fn restore(bytes: &[u8]) -> Option<Self>
    where
        T: DeserializeOwned,
    {
        let mut requests: Self = postcard::from_bytes(bytes).ok()?;
        let answers = requests.clients.values().filter_map(|l| l.answer.as_ref());
        requests.answers_bytes = answers.map(|(_, outcome)| bytes_of(outcome)).sum();
        Some(requests)
    }

    /// Those that wait, with their places in the order.
    pub(super) fn pending(&self) -> impl Iterator<Item = (u64, &Pending<T>)> {
        self.pending.iter().map(|(place, p)| (*place, p))
    }

    pub(super) fn pending_mut(&mut self) -> impl Iterator<Item = (u64, &mut Pending<T>)> {
        self.pending.iter_mut().map(|(place, p)| (*place, p))
    }
}

/// A machine that answers requests.
pub(super) trait Answers: Machine {
    type More;
    fn requests(&self) -> &Requests<Self::More>;
}

/// What members tell each other of requests.
#[derive(Serialize, Deserialize)]
pub(super) enum Update {
    Ask(RequestId, Bytes),
    /// This request at this place has this outcome; for all, the change of the state that it makes.
    Answer(u64, RequestId, Outcome, Bytes),
}

impl Update {
    pub(super) fn bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("bytes can be serialised")
    }
}

impl Asked {
    pub(super) fn bytes(&self) -> Bytes {
        Bytes::from(postcard::to_stdvec(self).expect("bytes can be serialised"))
    }
}

/// Asks, and waits for the answer.
pub(super) async fn request<M: Answers>(
    replicated: &Replicated<M>,
    id: RequestId,
    body: Bytes,
) -> Result<Bytes, RequestError> {
    let update = Update::Ask(id.clone(), body).bytes();
    let asked = replicated.update(&update).await?;
    match postcard::from_bytes(&asked) {
        Ok(Asked::Waits) => replicated.when(|m| m.requests().outcome(&id)).await?,
        Ok(Asked::Answered(outcome)) => outcome.ok_or(RequestError::TooLarge),
        Ok(Asked::Stale) => Err(RequestError::Stale),
        Ok(Asked::Refused) | Err(_) => Err(RequestError::Refused),
    }
}

/// Tells all how a request ended, and waits until that is so here.
pub(super) async fn conclude<M: Answers>(
    replicated: &Replicated<M>,
    (place, id): &(u64, RequestId),
    answer: Bytes,
    change: Bytes,
) -> Result<(), UpdateError> {
    let mut update = Update::Answer(*place, id.clone(), Some(answer), change);
    loop {
        match replicated.update_safe(&update.bytes()).await {
            Err(UpdateError::Send(SendError::TooLarge)) => {
                update = Update::Answer(*place, id.clone(), None, Bytes::new());
            }
            done => return done.map(|_| ()),
        }
    }
}

/// One client's requests, one at a time.
///
/// Each client's last answer is remembered by the group, for the 10,000 clients (and 16 MiB) that were answered last.
pub(super) struct Numbers {
    client: Bytes,
    next: u64,
}

impl Numbers {
    /// Of a client that is new: `nth` of this member.
    pub(super) fn new(me: &MemberId, nth: u64) -> Self {
        let name = (me.incarnation, nth);
        let client = postcard::to_stdvec(&name).expect("numbers can be serialised");
        Self {
            client: Bytes::from(client),
            next: 0,
        }
    }

    pub(super) fn next(&mut self) -> RequestId {
        self.next += 1;
        RequestId {
            client: self.client.clone(),
            number: self.next,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(client: &'static str, number: u64) -> RequestId {
        RequestId {
            client: Bytes::from_static(client.as_bytes()),
            number,
        }
    }

    #[test]
    fn a_request_is_new_once() {
        let mut r = Requests::<()>::default();
        let ask = |r: &mut Requests<()>, number| r.ask(id("c", number), Bytes::new(), |_| ());
        assert_eq!(ask(&mut r, 5), Asked::Waits);
        assert_eq!(ask(&mut r, 5), Asked::Waits);
        assert_eq!(r.pending().count(), 1);
        assert_eq!(r.outcome(&id("c", 5)), None);
        assert!(r.answer(0, &id("c", 5), Some("five".into())).is_some());
        assert!(r.answer(0, &id("c", 5), Some("again".into())).is_none());
        assert_eq!(ask(&mut r, 5), Asked::Answered(Some("five".into())));
        assert_eq!(ask(&mut r, 4), Asked::Stale);
        assert_eq!(ask(&mut r, 6), Asked::Waits);
        assert_eq!(r.outcome(&id("c", 5)), Some(Err(RequestError::Stale)));
        assert!(r.answer(1, &id("c", 6), None).is_some());
        assert_eq!(r.outcome(&id("c", 6)), Some(Err(RequestError::TooLarge)));
    }

    #[test]
    fn an_answer_is_for_the_request_that_was_computed_and_not_for_its_place() {
        let mut r = Requests::<()>::default();
        r.ask(id("of the old state", 1), Bytes::new(), |_| ());
        // Begun anew: another request has the place.
        r = Requests::default();
        r.ask(id("c", 1), Bytes::new(), |_| ());
        let old = r.answer(0, &id("of the old state", 1), Some("another's".into()));
        assert!(old.is_none());
        assert_eq!(r.outcome(&id("c", 1)), None, "it waits for its own");
        assert_eq!(r.pending().count(), 1);
    }

    #[test]
    fn what_a_peer_says_of_its_answers_size_is_not_believed() {
        let mut r = Requests::<()>::default();
        r.ask(id("c", 1), Bytes::new(), |_| ());
        r.answer(0, &id("c", 1), Some("four".into()));
        r.answers_bytes = 0;
        let image = postcard::to_stdvec(&r).unwrap();
        let mut r = Requests::<()>::restore(&image).unwrap();
        assert_eq!(r.answers_bytes, 4);
        r.ask(id("c", 2), Bytes::new(), |_| ());
        assert_eq!(r.answers_bytes, 0);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut r = Requests::<()>::default();
        let large = Bytes::from(vec![0; ANSWERS_BYTES_MAX / 4]);
        for client in ["a", "b", "c", "d", "e"] {
            assert_eq!(r.ask(id(client, 1), Bytes::new(), |_| ()), Asked::Waits);
        }
        for (place, client) in (0..).zip(["a", "b", "c", "d", "e"]) {
            r.answer(place, &id(client, 1), Some(large.clone()))
                .unwrap();
        }
        assert_eq!(r.outcome(&id("a", 1)), Some(Err(RequestError::Stale)));
        assert_eq!(r.outcome(&id("b", 1)), Some(Ok(large.clone())));
        // The next request of a client frees its last answer.
        r.ask(id("b", 2), Bytes::new(), |_| ());
        assert_eq!(r.answers_bytes, 3 * large.len());
        assert_eq!(r.answered.len(), 3);
        for n in 0..PENDING_MAX {
            r.ask(id("z", n as u64), Bytes::new(), |_| ());
        }
        let more = r.ask(id("y", 1), Bytes::new(), |_| ());
        assert_eq!(more, Asked::Refused);
    }
}
