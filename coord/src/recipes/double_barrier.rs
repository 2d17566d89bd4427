//! A double barrier: a number of processes begin together and end together, round after round.
//!
//! Each one creates an ephemeral sequential znode to enter. Who finds enough of them writes down who
//! is in this round, by compare-and-set; that lets all of these in. To leave, each deletes its own
//! and waits until those of all others in the round are gone; the one with the smallest number
//! deletes its own last, so that the others watch one znode. The next round begins when nobody of the
//! last one is left. More may come than a round takes: they are in a later one.
//!
//! # Layout
//!
//! ```text
//! /path/_c_<uuid>-member-0000000042        ephemeral
//! /path/ready                              who is in the current round, a name in each line
//! ```
//!
//! It is the recipe of ZooKeeper's documentation, with the round written down; Curator's and kazoo's
//! double barriers, which are good for one round, have other names and cannot be mixed with it.
//!
//! # Guarantees
//!
//! - Nobody is let in before `count` have entered. The members of a round had their znodes at the same
//!   moment.
//! - Nobody's [`leave`](Membership::leave) returns before each other member of the round has left, or
//!   its session is over.
//! - Members of different rounds are never inside together.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::double_barrier::DoubleBarrier;
//!
//! let step = DoubleBarrier::new(client, "/computation/step", 5)?;
//! loop {
//!     let inside = step.enter().await?;
//!     // All five compute.
//!     inside.leave().await?;
//! }
//! # }
//! ```

use std::collections::BTreeSet;
use std::ops::Deref;
use std::pin::pin;

use bytes::Bytes;

use super::common::{Place, code, repeat, unknown};
use super::line::{Marks, in_order};
use super::semaphore::in_range;
use super::ticket::{Ticket, until_changed};
use super::{Hold, LostReason, RecipeError};
use crate::client::{Client, WatchFuture};
use crate::wire::{Acl, CreateMode, ErrorCode, MultiOp};

/// The most that one round may take.
pub const COUNT_MAX: usize = 4096;

const MARKS: Marks<()> = &[("-member-", ())];
const READY: &str = "ready";

/// A double barrier at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct DoubleBarrier {
    place: Place,
    count: usize,
}

/// One's being inside a round.
#[derive(Debug)]
#[must_use = "who drops it has left"]
pub struct Membership {
    hold: Hold,
    place: Place,
    me: String,
    /// All of the round, in order.
    members: Vec<String>,
    round: i32,
}

/// What to do, for one that has come in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entering {
    /// Our znode is gone.
    Gone,
    /// We are in.
    In,
    /// These are the next round: write them down.
    Begin(Vec<String>),
    /// One of the last round is still there. Nothing begins before it goes.
    Behind(String),
    /// There are not enough of us. The one that completes the round writes it down.
    TooFew,
}

/// `children`: who is there; `round`: the last one that was written down.
fn entering(children: &[String], me: &str, round: &[String], count: usize) -> Entering {
    let present: Vec<&str> = in_order(children, MARKS)
        .into_iter()
        .map(|(name, ())| name)
        .collect();
    if !present.contains(&me) {
        return Entering::Gone;
    }
    if round.iter().any(|name| name == me) {
        return Entering::In;
    }
    let of_round: BTreeSet<&str> = round.iter().map(String::as_str).collect();
    if let Some(name) = present.iter().find(|name| of_round.contains(*name)) {
        return Entering::Behind((*name).to_owned());
    }
    if present.len() < count {
        return Entering::TooFew;
    }
    let next = present[..count].iter();
    Entering::Begin(next.map(|name| (*name).to_owned()).collect())
}

/// What to do, for one that leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving<'a> {
    /// Everybody else has left. We delete our own, if it is still there.
    Done,
    /// Wait until this one goes, then look again.
    Watch(&'a str),
    /// Delete our own, then look again.
    Delete,
}

/// `members`: the round, in order.
fn leaving<'a>(children: &[String], me: &str, members: &'a [String]) -> Leaving<'a> {
    let present: BTreeSet<&str> = children.iter().map(String::as_str).collect();
    let mut left = members.iter().map(String::as_str);
    let mut others = left
        .clone()
        .filter(|name| *name != me && present.contains(name));
    let lowest = left.find(|name| present.contains(name));
    match (others.next(), lowest) {
        (None, _) => Leaving::Done,
        // The others wait for us: wait for the last of them, then for the one before it.
        (Some(only), Some(lowest)) if lowest == me => {
            Leaving::Watch(others.next_back().unwrap_or(only))
        }
        (Some(first), _) if !present.contains(me) => Leaving::Watch(first),
        (Some(_), _) => Leaving::Delete,
    }
}

impl DoubleBarrier {
    /// The double barrier at this path, for so many at a time. Nothing is sent yet.
    ///
    /// # Errors
    /// [`RecipeError::OutOfRange`] unless `count` is 1 to [`COUNT_MAX`].
    pub fn new(client: &Client, path: &str, count: usize) -> Result<Self, RecipeError> {
        in_range("count", count, COUNT_MAX)?;
        Ok(Self {
            place: Place::new(client, path),
            count,
        })
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.acl = acl;
        self
    }

    /// Returns when `count` have entered, this one among them. May be dropped before: then it has
    /// not entered.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over, [`RecipeError::Removed`] where somebody
    /// else deleted our znode, [`RecipeError::Foreign`] where `ready` is not this recipe's.
    pub async fn enter(&self) -> Result<Membership, RecipeError> {
        let place = &self.place;
        let (ticket, mut seen) = Ticket::draw(place, "member-", &Bytes::new()).await?;
        let members = {
            let mut removed = pin!(ticket.until_removed());
            loop {
                // In this order: of a round that we read of, everybody was there before the list.
                let (version, round, changed) = self.round().await?;
                let children = match seen.take() {
                    Some(children) if version == 0 => children,
                    _ => place.children().await?,
                };
                match entering(&children, ticket.name(), &round, self.count) {
                    Entering::Gone => break None,
                    Entering::In => break Some((version, round)),
                    Entering::Begin(next) => self.begin(&next, version).await?,
                    Entering::Behind(name) => {
                        let path = place.child(&name);
                        tokio::select! {
                            gone = until_changed(place, &path) => gone?,
                            () = &mut removed => break None,
                        }
                    }
                    Entering::TooFew => tokio::select! {
                        told = changed => drop(told?),
                        () = &mut removed => break None,
                    },
                }
            }
        };
        let Some((round, members)) = members else {
            return Err(ticket.removed());
        };
        let (me, token) = (ticket.name().to_owned(), ticket.czxid());
        Ok(Membership {
            hold: ticket.into_hold(token).await?,
            place: place.clone(),
            me,
            members,
            round,
        })
    }

    /// The last round that was written down: its version, its members, and its successor.
    async fn round(&self) -> Result<(i32, Vec<String>, WatchFuture), RecipeError> {
        let place = &self.place;
        let path = place.child(READY);
        loop {
            let got = repeat(|| place.client.get_and_watch(&path)).await;
            if code(&got) == Some(ErrorCode::NoNode) {
                let created = repeat(|| {
                    let acl = place.acl.clone();
                    place.client.create(&path, "", CreateMode::Persistent, acl)
                })
                .await;
                match code(&created) {
                    Some(ErrorCode::NodeExists) => {}
                    Some(ErrorCode::NoNode) => place.ensure().await?,
                    _ => drop(created?),
                }
                continue;
            }
            let (data, stat, changed) = got?;
            let Ok(text) = std::str::from_utf8(&data) else {
                return Err(RecipeError::Foreign { path });
            };
            let members = text.lines().map(str::to_owned).collect();
            return Ok((stat.version, members, changed));
        }
    }

    /// Writes a round down, if its members are all there and nobody was faster.
    async fn begin(&self, members: &[String], version: i32) -> Result<(), RecipeError> {
        let exist = members.iter().map(|name| MultiOp::Check {
            path: self.place.child(name),
            version: -1,
        });
        let set = MultiOp::SetData {
            path: self.place.child(READY),
            data: Some(members.join("\n").into()),
            version,
        };
        match self.place.client.multi(exist.chain([set]).collect()).await {
            // What came of it is in what the caller reads next.
            Ok(_) => Ok(()),
            Err(error) if unknown(error) => Ok(()),
            Err(error) => match error.code() {
                Some(ErrorCode::BadVersion) => Ok(()),
                // One is gone that our server still shows.
                Some(ErrorCode::NoNode) => {
                    let place = &self.place;
                    Ok(repeat(|| place.client.sync(place.dir())).await?)
                }
                Some(ErrorCode::Throttled) => {
                    self.place.pause_refused().await;
                    Ok(())
                }
                _ => Err(error.into()),
            },
        }
    }
}

impl Membership {
    /// Returns when every member of the round has left. Dropped before, or not called at all, one
    /// leaves without waiting for the others.
    ///
    /// # Errors
    /// [`RecipeError::Lost`], [`RecipeError::Client`] where the session is over: the others may have
    /// left by now.
    pub async fn leave(self) -> Result<(), RecipeError> {
        let Self {
            hold,
            place,
            me,
            members,
            ..
        } = self;
        let mut hold = Some(hold);
        loop {
            let step = step(&place, &me, &members);
            let next = match &hold {
                None => step.await,
                // Whom the others believe to have left need not wait for a connection.
                Some(hold) => match hold.run(step).await {
                    Ok(next) => next,
                    Err(LostReason::Removed) => Ok(Next::Delete),
                    Err(reason) => return Err(reason.into()),
                },
            };
            match next? {
                Next::Look => {}
                Next::Delete => give_up(&mut hold).await?,
                Next::Done => return give_up(&mut hold).await,
            }
        }
    }

    /// Which round this is; it grows.
    pub const fn round(&self) -> i32 {
        self.round
    }

    /// How many are in this round.
    pub fn count(&self) -> usize {
        self.members.len()
    }
}

impl Deref for Membership {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

enum Next {
    Look,
    Delete,
    Done,
}

/// One look at who is left, and the wait that it leads to.
async fn step(place: &Place, me: &str, members: &[String]) -> Result<Next, RecipeError> {
    let children = place.children().await?;
    match leaving(&children, me, members) {
        Leaving::Watch(name) => {
            until_changed(place, &place.child(name)).await?;
            Ok(Next::Look)
        }
        Leaving::Delete => Ok(Next::Delete),
        Leaving::Done => Ok(Next::Done),
    }
}

async fn give_up(hold: &mut Option<Hold>) -> Result<(), RecipeError> {
    let Some(hold) = hold.take() else {
        return Ok(());
    };
    match hold.release().await {
        // Somebody else deleted it: it is gone as well.
        Err(RecipeError::Lost(LostReason::Removed)) => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: usize) -> String {
        format!("_c_-member-{number:010}")
    }

    fn names(set: u32) -> Vec<String> {
        (0..32).filter(|i| set >> i & 1 == 1).map(name).collect()
    }

    /// Five, any of them there, any round, any count: against the definitions.
    #[test]
    fn entering_by_all_cases() {
        for present in 0..1_u32 << 5 {
            for round in 0..1_u32 << 5 {
                for me in 0..5_usize {
                    for count in 1..=3 {
                        let got = entering(&names(present), &name(me), &names(round), count);
                        let (me_there, me_in) = (present >> me & 1 == 1, round >> me & 1 == 1);
                        let wanted = if !me_there {
                            Entering::Gone
                        } else if me_in {
                            Entering::In
                        } else if present & round != 0 {
                            Entering::Behind(names(present & round)[0].clone())
                        } else if names(present).len() < count {
                            Entering::TooFew
                        } else {
                            Entering::Begin(names(present)[..count].to_vec())
                        };
                        assert_eq!(got, wanted, "{present:b} {round:b} {me} {count}");
                    }
                }
            }
        }
    }

    /// Every interleaving of four that leave, some of which die: nobody is through before all others
    /// have deleted theirs, and everybody gets through.
    #[test]
    fn leaving_in_every_order() {
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        enum At {
            Working,
            Looking,
            Waiting(usize),
            Through,
            Dead,
        }
        const N: usize = 4;
        fn explore(states: [At; N], present: u32, seen: &mut BTreeSet<([At; N], u32)>) {
            if !seen.insert((states, present)) {
                return;
            }
            let members = names((1 << N) - 1);
            let mut stuck = true;
            for who in 0..N {
                let mut next = states;
                match states[who] {
                    At::Through | At::Dead => continue,
                    At::Working => next[who] = At::Looking,
                    At::Waiting(other) if present >> other & 1 == 1 => continue,
                    At::Waiting(_) => next[who] = At::Looking,
                    At::Looking => {
                        let children = names(present);
                        match leaving(&children, &name(who), &members) {
                            Leaving::Watch(other) => {
                                let other = members.iter().position(|name| name == other);
                                next[who] = At::Waiting(other.unwrap());
                            }
                            Leaving::Delete => {
                                stuck = false;
                                explore(next, present & !(1 << who), seen);
                                continue;
                            }
                            Leaving::Done => {
                                let others = present & !(1 << who);
                                assert_eq!(others, 0, "through before the others have left");
                                next[who] = At::Through;
                                stuck = false;
                                explore(next, others, seen);
                                continue;
                            }
                        }
                    }
                }
                stuck = false;
                explore(next, present, seen);
            }
            let over = states
                .iter()
                .all(|state| matches!(state, At::Through | At::Dead));
            assert!(!stuck || over, "somebody waits for ever");
            for who in 0..N {
                // Some time, any of them may die.
                if matches!(states[who], At::Working | At::Waiting(_)) && present >> who & 1 == 1 {
                    let mut next = states;
                    next[who] = At::Dead;
                    explore(next, present & !(1 << who), seen);
                }
            }
        }
        explore([At::Working; N], (1 << N) - 1, &mut BTreeSet::new());
    }
}
