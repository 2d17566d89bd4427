//! A token: at every place in the order of messages and views exactly one member holds it.
//!
//! BJ87, Birman 1993 (the token tool). The holder passes it to whom it likes, or to the one that has waited longest. When the
//! holder departs, the one that has waited longest has it from the next view on, or else the next in rank after the holder.

use super::{Machine, Replicated, UpdateError};
use crate::process::GroupView;
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Who holds the token and who waits for it, the same at every member.
///
/// Invariant: from the first view on there is a holder, and it is a member; whoever waits is a member and not the holder.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Token {
    members: Vec<MemberId>,
    holder: Option<MemberId>,
    turn: u64,
    waiting: VecDeque<MemberId>,
}

#[derive(Serialize, Deserialize)]
enum Update {
    Request,
    /// To this member, or to the first that waits.
    Pass(Option<MemberId>),
    GiveUp,
}

impl Token {
    /// Who holds it; `None` only before the first view.
    pub fn holder(&self) -> Option<&MemberId> {
        self.holder.as_ref()
    }

    /// Counts holders: whoever holds it later has a larger number. What the holder does to the world outside may be fenced by it.
    pub fn turn(&self) -> u64 {
        self.turn
    }

    /// Who waits for it, in order.
    pub fn waiting(&self) -> impl Iterator<Item = &MemberId> {
        self.waiting.iter()
    }

    fn give(&mut self, to: MemberId) {
        self.waiting.retain(|m| *m != to);
        self.holder = Some(to);
        self.turn += 1;
    }

    /// The holder is not in this view: who has it now?
    fn heir(&self, view: &GroupView) -> Option<MemberId> {
        if let Some(first) = self.waiting.front() {
            return Some(first.clone());
        }
        let rank = self.members.iter().position(|m| Some(m) == self.holder());
        let (before, after) = self.members.split_at(rank.map_or(0, |r| r + 1));
        let round = after.iter().chain(before);
        let next = round.into_iter().find(|m| view.members.contains(m));
        next.or(view.leader()).cloned()
    }
}

impl Machine for Token {
    fn apply(&mut self, from: &MemberId, update: &Bytes) -> Bytes {
        let holds = self.holder.as_ref() == Some(from);
        let done = match postcard::from_bytes(update) {
            Ok(Update::Request) => {
                if !holds && !self.waiting.contains(from) {
                    self.waiting.push_back(from.clone());
                }
                true
            }
            Ok(Update::Pass(None)) => {
                if holds && let Some(to) = self.waiting.front().cloned() {
                    self.give(to);
                }
                holds
            }
            Ok(Update::Pass(Some(to))) => {
                let may = holds && self.members.contains(&to);
                if may && to != *from {
                    self.give(to);
                }
                may
            }
            Ok(Update::GiveUp) => {
                self.waiting.retain(|m| m != from);
                true
            }
            Err(_) => false,
        };
        Bytes::from(vec![u8::from(done)])
    }

    fn view(&mut self, view: &GroupView) {
        self.waiting.retain(|m| view.members.contains(m));
        let holder = self.holder.as_ref();
        if !holder.is_some_and(|h| view.members.contains(h))
            && let Some(heir) = self.heir(view)
        {
            self.give(heir);
        }
        self.members.clone_from(&view.members);
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let bytes = postcard::to_stdvec(self).expect("names can be serialised");
        vec![Bytes::from(bytes)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

impl Replicated<Token> {
    async fn ask(&self, update: &Update) -> Result<bool, UpdateError> {
        let update = postcard::to_stdvec(update).expect("names can be serialised");
        Ok(*self.update(&update).await? == [1])
    }

    /// Who holds the token, as this member knows.
    pub fn holder(&self) -> Option<MemberId> {
        self.read(|token| token.holder.clone())?
    }

    /// Asks for the token, and waits until this member holds it; gives its turn. (If the future is dropped, the request stands: see
    /// [`Replicated::give_up`].)
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn hold(&self) -> Result<u64, UpdateError> {
        self.ask(&Update::Request).await?;
        let me = self.group().me();
        self.when(|t| (t.holder() == Some(me)).then_some(t.turn))
            .await
    }

    /// Passes the token to a member; `false`: this one does not hold it, or the other is no member.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn pass_to(&self, member: &MemberId) -> Result<bool, UpdateError> {
        self.ask(&Update::Pass(Some(member.clone()))).await
    }

    /// Passes the token to whoever has waited longest, or keeps it if nobody waits; `false`: this one does not hold it.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn pass(&self) -> Result<bool, UpdateError> {
        self.ask(&Update::Pass(None)).await
    }

    /// Waits for the token no more.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn give_up(&self) -> Result<(), UpdateError> {
        self.ask(&Update::GiveUp).await.map(|_| ())
    }
}
