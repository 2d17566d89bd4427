//! Leader election: one of many leads, the best of those who stand by succeeds, anybody may follow.
//!
//! A candidate creates an ephemeral sequential znode that bears its rank. A persistent znode,
//! `leader`, names the candidate that leads; it leads as long as its own znode exists. When that is
//! gone, the first of the others (the lowest rank, and of equals the one that came first) writes its
//! name there by compare-and-set. It alone watches the leader's znode; each of the others watches the
//! one just before itself, so that a change of leaders wakes few, however many stand by.
//!
//! A better candidate that comes later does not depose who leads.
//!
//! # Layout
//!
//! ```text
//! /path/_c_<uuid>-candidate-00010-0000000042   ephemeral; 10 is the rank; its data is the label
//! /path/leader                                 the name of one of these
//! ```
//!
//! No other library has ranks, and so this layout is ours. Where kazoo's `Election` or Curator's
//! `LeaderSelector` must take part, use a [lock](super::lock): that is what theirs are.
//!
//! # Guarantees
//!
//! - Nobody is named before the znode of the one named last is gone: so at most one candidate's [`Hold`]
//!   says that it leads, and never after its session's end.
//! - The token is the zxid of the compare-and-set: it grows from leader to leader.
//! - Who follows sees every leader that stays, in order, and may miss one that was brief.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn lead(_token: i64) {}
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::election::Election;
//!
//! let election = Election::new(client, "/service/master").label("host-7:9000");
//! let leading = election.campaign(10).await?;
//! leading.run(lead(leading.token())).await?;
//!
//! // Elsewhere:
//! let mut leaders = election.follow();
//! loop {
//!     match leaders.next().await? {
//!         Some(leader) => println!("{:?} leads", leader.label),
//!         None => println!("nobody leads"),
//!     }
//! }
//! # }
//! ```

use std::pin::pin;

use bytes::Bytes;

use super::common::{Place, code, repeat, unknown};
use super::line::Sequence;
use super::ticket::{Ticket, until_changed};
use super::{Hold, RecipeError};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, CreateMode, ErrorCode, MultiOp, Stat};

const RECORD: &str = "leader";
const MARK: &str = "-candidate-";

/// An election at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct Election {
    place: Place,
    label: Bytes,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// What it says of itself.
    pub label: Bytes,
    /// Its fencing token, [`Hold::token`] at its own.
    pub token: i64,
    /// Its session.
    pub session: i64,
    /// Its candidate's znode.
    pub path: String,
}

/// A candidate that stands by, or leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its rank: the lowest succeeds.
    pub rank: u16,
    /// What it says of itself.
    pub label: Bytes,
    /// Its znode.
    pub path: String,
    /// Whether it leads.
    pub leads: bool,
}

/// What a candidate is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing<'a> {
    /// Our znode is gone.
    Gone,
    /// We are named.
    Leading,
    /// Nobody leads, and we are the best.
    Claim,
    /// Nothing changes for us before this one goes.
    Behind(&'a str),
}

fn parse(name: &str) -> Option<(u16, Sequence)> {
    let (_, rest) = name.rsplit_once(MARK)?;
    let (rank, number) = rest.split_once('-')?;
    Some((rank.parse().ok()?, Sequence::parse(number)?))
}

/// The candidates in the order in which they succeed each other.
fn by_rank(children: &[String]) -> Vec<(u16, &str)> {
    let candidates = children.iter();
    let mut line: Vec<_> = candidates
        .filter_map(|name| parse(name).map(|(rank, number)| (rank, number, name.as_str())))
        .collect();
    line.sort_by(|(a_rank, a, a_name), (b_rank, b, b_name)| {
        let arrival = match (a == b, a.before(*b)) {
            (true, _) => a_name.cmp(b_name),
            (_, true) => std::cmp::Ordering::Less,
            (_, false) => std::cmp::Ordering::Greater,
        };
        a_rank.cmp(b_rank).then(arrival)
    });
    line.into_iter()
        .map(|(rank, _, name)| (rank, name))
        .collect()
}

/// `leader` is who was named before `children` were listed: who is not among them is gone for good.
fn standing<'a>(children: &'a [String], me: &str, leader: &str) -> Standing<'a> {
    let line = by_rank(children);
    if !line.iter().any(|(_, name)| *name == me) {
        return Standing::Gone;
    }
    if leader == me {
        return Standing::Leading;
    }
    let named = line.iter().find(|(_, name)| *name == leader);
    let waiting: Vec<&str> = line
        .iter()
        .map(|(_, name)| *name)
        .filter(|name| *name != leader)
        .collect();
    match (waiting.iter().position(|name| *name == me), named) {
        (None, _) => Standing::Gone,
        (Some(0), None) => Standing::Claim,
        (Some(0), Some((_, leader))) => Standing::Behind(leader),
        (Some(place), _) => Standing::Behind(waiting[place - 1]),
    }
}

impl Election {
    /// The election at this path. Nothing is sent yet.
    pub fn new(client: &Client, path: &str) -> Self {
        Self {
            place: Place::new(client, path),
            label: Bytes::new(),
        }
    }

    /// What others see of us: an address, say.
    #[must_use]
    pub fn label(self, label: impl Into<Bytes>) -> Self {
        Self {
            label: label.into(),
            ..self
        }
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.acl = acl;
        self
    }

    /// Stands by, and returns when it leads. The lowest rank succeeds, and among equals who came
    /// first. May be dropped at any time.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over, [`RecipeError::Removed`] where somebody
    /// else deleted our candidacy.
    pub async fn campaign(&self, rank: u16) -> Result<Hold, RecipeError> {
        let place = &self.place;
        let suffix = format!("candidate-{rank:05}-");
        let (ticket, _) = Ticket::draw(place, &suffix, &self.label).await?;
        let token = {
            let mut removed = pin!(ticket.until_removed());
            loop {
                // In this order: who was named had a znode before the list.
                let (leader, stat) = self.record().await?;
                let children = place.children().await?;
                match standing(&children, ticket.name(), &leader) {
                    Standing::Gone => break None,
                    Standing::Leading => break Some(stat.mzxid),
                    Standing::Claim => {
                        if let Some(token) = self.claim(ticket.name(), stat.version).await? {
                            break Some(token);
                        }
                    }
                    Standing::Behind(name) => {
                        let path = place.child(name);
                        tokio::select! {
                            gone = until_changed(place, &path) => gone?,
                            () = &mut removed => break None,
                        }
                    }
                }
            }
        };
        match token {
            None => Err(ticket.removed()),
            Some(token) => Ok(ticket.into_hold(token).await?),
        }
    }

    /// Who was named last, by whatever `leader` says; empty where nobody was.
    async fn record(&self) -> Result<(String, Stat), RecipeError> {
        let place = &self.place;
        let path = place.child(RECORD);
        loop {
            let got = repeat(|| place.client.get(&path)).await;
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
            let (data, stat) = got?;
            return Ok((text(&path, &data)?, stat));
        }
    }

    /// Has us named. `None`: look again.
    async fn claim(&self, me: &str, version: i32) -> Result<Option<i64>, RecipeError> {
        let place = &self.place;
        let ops = vec![
            MultiOp::Check {
                path: place.child(me),
                version: -1,
            },
            MultiOp::SetData {
                path: place.child(RECORD),
                data: Some(me.to_owned().into()),
                version,
            },
        ];
        match place.client.multi(ops).await {
            Ok(results) => match results.get(1) {
                Some(crate::wire::MultiResult::Set(stat)) => Ok(Some(stat.mzxid)),
                _ => Err(ClientError::Protocol.into()),
            },
            Err(error) if unknown(error) => Ok(None),
            Err(error) => match error.code() {
                Some(ErrorCode::BadVersion | ErrorCode::NoNode) => {
                    // Our server is behind.
                    repeat(|| place.client.sync(place.dir())).await?;
                    Ok(None)
                }
                Some(ErrorCode::Throttled) => {
                    place.pause_refused().await;
                    Ok(None)
                }
                _ => Err(error.into()),
            },
        }
    }

    /// Who leads, by the word of the session's server.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn leader(&self) -> Result<Option<Leader>, RecipeError> {
        let path = self.place.child(RECORD);
        let got = repeat(|| self.place.client.get(&path)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(None);
        }
        let (data, stat) = got?;
        let name = text(&path, &data)?;
        if name.is_empty() {
            return Ok(None);
        }
        let path = self.place.child(&name);
        let got = repeat(|| self.place.client.get(&path)).await;
        if code(&got) == Some(ErrorCode::NoNode) {
            return Ok(None);
        }
        let (label, candidate) = got?;
        Ok(Some(Leader {
            label,
            token: stat.mzxid,
            session: candidate.ephemeral_owner,
            path,
        }))
    }

    /// All candidates in the order of succession, the one that leads among them.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn candidates(&self) -> Result<Vec<Candidate>, RecipeError> {
        let leader = self.leader().await?.map(|leader| leader.path);
        let children = self.place.children().await?;
        let mut candidates = Vec::new();
        for (rank, name) in by_rank(&children) {
            let path = self.place.child(name);
            let got = repeat(|| self.place.client.get(&path)).await;
            if code(&got) == Some(ErrorCode::NoNode) {
                continue; // gone since
            }
            candidates.push(Candidate {
                rank,
                label: got?.0,
                leads: leader.as_ref() == Some(&path),
                path,
            });
        }
        Ok(candidates)
    }

    /// Follows who leads.
    pub fn follow(&self) -> Leaders {
        Leaders {
            election: self.clone(),
            told: None,
        }
    }
}

/// Who leads, now and from now on. See [`Election::follow`].
#[derive(Debug)]
pub struct Leaders {
    election: Election,
    /// What was given last.
    told: Option<Option<Leader>>,
}

impl Leaders {
    /// At first who leads now; then waits for each change. May be dropped: nothing is lost.
    ///
    /// # Errors
    /// [`RecipeError::Client`] where the session is over. It may be called again where the client
    /// renews its session.
    pub async fn next(&mut self) -> Result<Option<Leader>, RecipeError> {
        let place = &self.election.place;
        let record = place.child(RECORD);
        loop {
            // The watches first, and then the looks: no change falls between them.
            let (named, renamed) = repeat(|| place.client.exists_and_watch(&record)).await?;
            let leader = match named {
                Some(_) => self.election.leader().await?,
                None => None,
            };
            if self.told.as_ref() != Some(&leader) {
                self.told = Some(leader.clone());
                return Ok(leader);
            }
            match leader {
                Some(leader) => tokio::select! {
                    told = renamed => drop(told?),
                    gone = until_changed(place, &leader.path) => gone?,
                },
                None => drop(renamed.await?),
            }
        }
    }
}

fn text(path: &str, data: &Bytes) -> Result<String, RecipeError> {
    match std::str::from_utf8(data) {
        Ok(text) if !text.contains('/') => Ok(text.to_owned()),
        _ => Err(RecipeError::Foreign {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn name(rank: u16, number: usize) -> String {
        format!("_c_-candidate-{rank:05}-{number:010}")
    }

    #[test]
    fn the_lowest_rank_succeeds_and_of_equals_the_first() {
        let children = [name(2, 0), name(1, 3), "leader".into(), name(1, 1)];
        let order: Vec<_> = by_rank(&children).iter().map(|(_, name)| *name).collect();
        assert_eq!(order, [&children[3], &children[1], &children[0]]);
        assert_eq!(standing(&children, &children[3], ""), Standing::Claim);
        assert_eq!(
            standing(&children, &children[1], ""),
            Standing::Behind(&children[3])
        );
        // A leader of a worse rank stays.
        assert_eq!(
            standing(&children, &children[3], &children[0]),
            Standing::Behind(&children[0])
        );
        assert_eq!(
            standing(&children, &children[0], &children[0]),
            Standing::Leading
        );
        // One that is gone is in nobody's way.
        assert_eq!(standing(&children, &children[3], "x"), Standing::Claim);
        assert_eq!(standing(&children, "x", ""), Standing::Gone);
    }

    /// Every interleaving of three candidates of any ranks that come, look, and leave: at most one
    /// leads, and as long as one is left, one leads or will.
    #[test]
    fn one_leads_and_nobody_is_forgotten() {
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        enum At {
            Away,
            Looking,
            Waiting(usize),
            Leading,
            Gone,
        }
        const N: usize = 3;
        type State = ([At; N], Option<usize>);
        fn explore(ranks: [u16; N], (states, named): State, seen: &mut BTreeSet<State>) {
            if !seen.insert((states, named)) {
                return;
            }
            let there = |i: usize| !matches!(states[i], At::Away | At::Gone);
            let children: Vec<String> = (0..N)
                .filter(|i| there(*i))
                .map(|i| name(ranks[i], i))
                .collect();
            let leading = states.iter().filter(|at| **at == At::Leading).count();
            assert!(leading <= 1, "{states:?}");
            let (mut stuck, mut waiting) = (leading == 0, false);
            for who in 0..N {
                let mut next = states;
                match states[who] {
                    // Sequential: who comes has the next number.
                    At::Away if who > 0 && states[who - 1] == At::Away => continue,
                    At::Away => next[who] = At::Looking,
                    At::Looking => {
                        stuck = false;
                        let leader = named.map_or(String::new(), |i| name(ranks[i], i));
                        match standing(&children, &name(ranks[who], who), &leader) {
                            Standing::Gone => unreachable!(),
                            Standing::Leading => next[who] = At::Leading,
                            Standing::Claim => {
                                next[who] = At::Leading;
                                explore(ranks, (next, Some(who)), seen);
                                continue;
                            }
                            Standing::Behind(other) => {
                                let other = (0..N).find(|i| name(ranks[*i], *i) == other);
                                next[who] = At::Waiting(other.unwrap());
                            }
                        }
                    }
                    At::Waiting(other) => {
                        waiting = true;
                        if there(other) {
                            // It may leave at any time, as a leader may.
                            next[who] = At::Gone;
                        } else {
                            stuck = false;
                            next[who] = At::Looking;
                        }
                    }
                    At::Leading => next[who] = At::Gone,
                    At::Gone => continue,
                }
                explore(ranks, (next, named), seen);
            }
            assert!(!(stuck && waiting), "all wait for each other: {states:?}");
        }
        for ranks in [[1, 1, 1], [1, 2, 3], [3, 2, 1], [2, 1, 2], [1, 3, 2]] {
            explore(ranks, ([At::Away; N], None), &mut BTreeSet::new());
        }
    }
}
