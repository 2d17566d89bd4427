//! Handlers: the other face of a membership, beside the stream of its events.

use super::tasks::Tasks;
use super::{Event, Events, Group, Received};
use crate::process::GroupView;
use bytes::Bytes;
use futures_core::Stream as _;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

/// Handlers of messages and views that may wait at a time; beyond it no more events are taken until one has ended. As many as
/// calls of a member may be open.
const HANDLERS_MAX: usize = 65_536;

/// What a program does about what happens in a group: see [`Group::run`].
pub trait Handler: Sync {
    /// A message came. Answer it or drop it.
    fn message(&self, group: &Group, message: Received) -> impl Future<Output = ()> + Send;

    /// A view begins.
    fn view(&self, _group: &Group, _view: GroupView) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// This member is the first: the state is whatever it begins with.
    fn init(&self) {}

    /// The state came: see [`Event::State`].
    fn state(&self, _state: Bytes) {}

    /// Someone joins and needs the state. The same state gives the same bytes.
    fn snapshot(&self) -> Vec<Bytes> {
        Vec::new()
    }
}

/// A closure is a handler of messages alone, in a group without a state.
impl<F, T> Handler for F
where
    F: Fn(Received) -> T + Sync,
    T: Future<Output = ()> + Send,
{
    fn message(&self, _: &Group, message: Received) -> impl Future<Output = ()> + Send {
        self(message)
    }
}

impl Group {
    /// Hands every event to a handler until this member is out and the handlers have ended; gives whether it left by its own
    /// wish.
    ///
    /// In the way of Isis (BJ87), each message begins a task of its own. Tasks begin in the order of the events and run one at a
    /// time, each until it waits for something; while it waits, the events after it are handled. So what a handler does before
    /// its first `.await` happens at the same place among the messages at every member, and a handler may call the group and
    /// wait for the answers, its own member's among them: it holds up no delivery. Should many wait, no more events are taken,
    /// as of a program that does not keep up.
    pub async fn run(&self, mut events: Events, handler: impl Handler) -> bool {
        let handler = &handler;
        let mut tasks = Tasks::new();
        let mut by_wish = false;
        loop {
            let next = poll_fn(|cx| {
                let _ = tasks.poll(cx);
                if tasks.len() >= HANDLERS_MAX {
                    return Poll::Pending;
                }
                Pin::new(&mut events).poll_next(cx)
            });
            match next.await {
                Some(Event::Init) => handler.init(),
                Some(Event::State(state)) => handler.state(state),
                Some(Event::View(view)) => tasks.push(handler.view(self, view)),
                Some(Event::Message(m)) => tasks.push(handler.message(self, m)),
                Some(Event::StateWanted(wanted)) => wanted.give(handler.snapshot()),
                Some(Event::Left { wished }) => by_wish = wished,
                None => break,
            }
        }
        poll_fn(|cx| tasks.poll(cx)).await;
        by_wish
    }
}
