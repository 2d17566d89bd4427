//! No ghosts: closed tuples are remembered for as long as their cookie would be valid.
//!
//! A cookie opens a connection without any memory of its SYN. So an old segment, a retransmitted
//! request for instance, could open a connection that has been served and closed already. Each
//! incarnation is told by its tuple and its ISS (the cookie); a later one of the same tuple has
//! another. The same table serves TIME-WAIT.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::conn_state::{ConnState, LinkAddr, Tuple};
use crate::fault::planted;
use crate::seq::SeqNum;
use crate::syn::COOKIE_LIFETIME;
use crate::time::{Instant, micros_of};

/// How long a tuple is remembered. TIME-WAIT (2 MSL, Linux uses 60 s) lies within.
const REMEMBERED: Duration = COOKIE_LIFETIME;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ending {
    /// Both sides closed.
    Closed,
    /// The client broke it off.
    ByPeer,
    /// We did: the client was to get an RST, and a new leader tells it again.
    ByUs,
}

/// A connection that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Past {
    pub(crate) tuple: Tuple,
    pub(crate) iss: SeqNum,
    pub(crate) ending: Ending,
    pub(crate) next_hop: LinkAddr,
    /// SND.NXT (SND.UNA, where we broke it off) and RCV.NXT at the end.
    pub(crate) snd_nxt: SeqNum,
    pub(crate) rcv_nxt: SeqNum,
    /// TS.Recent, if timestamps were in use.
    pub(crate) ts_recent: Option<u32>,
}

impl Past {
    pub(crate) fn of(state: &ConnState, ending: Ending) -> Self {
        Self {
            tuple: state.tuple,
            iss: state.iss,
            ending,
            next_hop: state.next_hop,
            snd_nxt: state.iss.at_offset(state.fin_end().unwrap_or(state.acked)),
            rcv_nxt: state
                .irs
                .at_offset(state.received + u64::from(state.peer_fin)),
            ts_recent: state.negotiated.timestamps.then_some(state.ts_recent),
        }
    }
}

/// What was closed lately, oldest first.
#[derive(Debug, Default)]
pub(crate) struct ClosedTuples {
    by_tuple: BTreeMap<(Tuple, u32), Past>,
    expiry: VecDeque<(Instant, Tuple, u32)>,
    evicted: u64,
}

/// A remembered tuple as it is handed over: what it was, and for how long it stays, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    pub(crate) past: Past,
    pub(crate) remaining_us: u64,
}

impl Remembered {
    /// One that ends now.
    pub(crate) fn new(past: Past) -> Self {
        Self {
            past,
            remaining_us: micros_of(REMEMBERED),
        }
    }
}

impl ClosedTuples {
    /// Remembers a connection; the oldest goes when more than `max` are known.
    pub(crate) fn remember(&mut self, now: Instant, past: Past, max: usize) {
        if !planted!(GhostsWelcome) {
            self.remember_for(now, past, REMEMBERED, max);
        }
    }

    fn remember_for(&mut self, now: Instant, past: Past, time: Duration, max: usize) {
        self.expire(now);
        while self.by_tuple.len() >= max {
            let Some((_, tuple, iss)) = self.expiry.pop_front() else {
                break;
            };
            self.evicted += u64::from(self.by_tuple.remove(&(tuple, iss)).is_some());
        }
        let key = (past.tuple, past.iss.0);
        if self.by_tuple.insert(key, past).is_none() {
            self.expiry.push_back((now + time, past.tuple, past.iss.0));
        }
    }

    /// Forgets what is old enough.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some(&(at, tuple, iss)) = self.expiry.front() {
            if at > now {
                break;
            }
            self.expiry.pop_front();
            self.by_tuple.remove(&(tuple, iss));
        }
    }

    /// The incarnation of `tuple` that had this ISS.
    pub(crate) fn with_iss(&self, tuple: &Tuple, iss: SeqNum) -> Option<&Past> {
        self.by_tuple.get(&(*tuple, iss.0))
    }

    /// The incarnation that an old segment of `tuple` most likely belongs to: the one whose RCV.NXT is
    /// nearest.
    pub(crate) fn nearest(&self, tuple: &Tuple, seq: SeqNum) -> Option<&Past> {
        self.by_tuple
            .range((*tuple, 0)..=(*tuple, u32::MAX))
            .map(|(_, past)| past)
            .min_by_key(|past| seq.distance(past.rcv_nxt).unsigned_abs())
    }

    /// All, in order of expiry.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Past> {
        self.expiry
            .iter()
            .filter_map(|(_, tuple, iss)| self.by_tuple.get(&(*tuple, *iss)))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_tuple.len()
    }

    /// How many were forgotten too early, for want of room.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    pub(crate) fn image(&self, now: Instant) -> Vec<Remembered> {
        self.expiry
            .iter()
            .filter_map(|(at, tuple, iss)| {
                let past = *self.by_tuple.get(&(*tuple, *iss))?;
                Some(Remembered {
                    past,
                    remaining_us: micros_of(at.since(now)),
                })
            })
            .collect()
    }

    pub(crate) fn restore(now: Instant, image: Vec<Remembered>, max: usize) -> Self {
        let mut table = Self::default();
        for Remembered { past, remaining_us } in image {
            let time = Duration::from_micros(remaining_us).min(REMEMBERED);
            table.remember_for(now, past, time, max);
        }
        table
    }
}
