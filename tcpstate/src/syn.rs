//! The stateless SYN responder: an ISS that doubles as a cookie.
//!
//! ```text
//!  31    30     29..27  26..23   22    21..0
//! epoch  unit   MSS     shift    SACK  MAC of (tuple, IRS, unit, epoch, the bits to the left)
//! ```
//!
//! The ISS is a keyed hash of the tuple and the client's ISN (RFC 6528), with what must be known at
//! the final ACK folded in: nothing of a handshake needs to be remembered, so a SYN-ACK waits for
//! nobody, the final ACK may reach a *different* leader, and a flood costs no memory. Timestamps need
//! no bit: the final ACK carries the option exactly if both sides agreed to it (RFC 7323 §3.2).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ring::hmac;

use crate::conn_state::{Negotiated, Tuple};
use crate::event::HalfOpen;
use crate::segment::Options;
use crate::seq::SeqNum;
use crate::time::{Instant, low32};

/// A cookie names the unit of time in which it was made; that unit and the next are accepted.
const COOKIE_UNIT_US: u64 = 32_000_000;
/// After this long no cookie is valid any more.
pub(crate) const COOKIE_LIFETIME: Duration = Duration::from_micros(2 * COOKIE_UNIT_US);
/// MSS values that a cookie can say; a client's is rounded down.
const MSS_TABLE: [u16; 8] = [48, 536, 1220, 1360, 1400, 1440, 1460, 8940];
/// The shift field's value for "no window scaling".
const NO_SCALING: u32 = 15;
const MAC_BITS: u32 = 22;

/// The keys behind ISS and cookies: HKDF(group key, service name, epoch) by the caller, the same on
/// every replica.
#[derive(Clone)]
pub struct Secrets {
    epoch: u32,
    current: hmac::Key,
    neighbour: Option<hmac::Key>,
}

impl Secrets {
    /// The key of `epoch`.
    pub fn new(epoch: u32, key: &[u8; 32]) -> Self {
        Self {
            epoch,
            current: hmac::Key::new(hmac::HMAC_SHA256, key),
            neighbour: None,
        }
    }

    /// Accepts cookies of the neighbouring epoch too: the one before during a rotation, or the one
    /// after where others have rotated already.
    #[must_use]
    pub fn with_neighbour(mut self, key: &[u8; 32]) -> Self {
        self.neighbour = Some(hmac::Key::new(hmac::HMAC_SHA256, key));
        self
    }

    /// The key of cookies with this epoch bit.
    fn key(&self, bit: u32) -> Option<&hmac::Key> {
        if bit == self.epoch & 1 {
            Some(&self.current)
        } else {
            self.neighbour.as_ref()
        }
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secrets")
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// What we agree to of what a SYN offers, as far as a cookie can say it.
pub(crate) fn negotiate(options: &Options, ipv6: bool) -> Negotiated {
    Negotiated {
        mss: MSS_TABLE[mss_index(options.mss_or_default(ipv6))],
        peer_shift: options.window_scale,
        sack: options.sack_permitted,
        timestamps: options.timestamp.is_some(),
    }
}

fn mss_index(mss: u16) -> usize {
    MSS_TABLE.iter().rposition(|&m| m <= mss).unwrap_or(0)
}

/// The ISS for a SYN that arrives when the service clock reads `clock_us`.
pub(crate) fn cookie(
    secrets: &Secrets,
    clock_us: u64,
    tuple: &Tuple,
    irs: SeqNum,
    negotiated: &Negotiated,
) -> SeqNum {
    let unit = clock_us / COOKIE_UNIT_US;
    let index = low32(mss_index(negotiated.mss) as u64);
    let shift = negotiated.peer_shift.map_or(NO_SCALING, u32::from);
    let epoch = secrets.epoch & 1;
    let bits = epoch << 31
        | low32(unit & 1) << 30
        | index << 27
        | shift << 23
        | u32::from(negotiated.sack) << MAC_BITS;
    SeqNum(bits | mac(&secrets.current, tuple, irs, unit, bits))
}

/// What a valid cookie says. `timestamps`: the segment that carries it has the option.
pub(crate) fn open_cookie(
    secrets: &Secrets,
    clock_us: u64,
    tuple: &Tuple,
    irs: SeqNum,
    iss: SeqNum,
    timestamps: bool,
) -> Option<Negotiated> {
    let now = clock_us / COOKIE_UNIT_US;
    let unit = if now & 1 == u64::from(iss.0 >> 30 & 1) {
        now
    } else {
        now.checked_sub(1)?
    };
    let key = secrets.key(iss.0 >> 31)?;
    let bits = iss.0 & !((1 << MAC_BITS) - 1);
    if bits | mac(key, tuple, irs, unit, bits) != iss.0 {
        return None;
    }
    let shift = bits >> 23 & 0xf;
    Some(Negotiated {
        mss: MSS_TABLE[(bits >> 27 & 7) as usize],
        peer_shift: u8::try_from(shift).ok().filter(|_| shift != NO_SCALING),
        sack: bits >> MAC_BITS & 1 == 1,
        timestamps,
    })
}

fn mac(key: &hmac::Key, tuple: &Tuple, irs: SeqNum, unit: u64, bits: u32) -> u32 {
    let mut message = Vec::with_capacity(64);
    for end in [tuple.local, tuple.remote] {
        match end.ip() {
            IpAddr::V4(a) => message.extend(a.octets()),
            IpAddr::V6(a) => message.extend(a.octets()),
        }
        message.extend(end.port().to_be_bytes());
    }
    message.extend(irs.0.to_be_bytes());
    message.extend(unit.to_be_bytes());
    message.extend(bits.to_be_bytes());
    let tag = hmac::sign(key, &message);
    let head: [u8; 4] = tag.as_ref()[..4]
        .try_into()
        .expect("SHA-256 gives 32 bytes");
    u32::from_be_bytes(head) & ((1 << MAC_BITS) - 1)
}

/// Handshakes that last this long are worth an event, so that another leader knows of them.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(5);
/// When the SYN-ACK goes out again, after the first; then the handshake is forgotten.
const RESEND_AFTER: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

#[derive(Debug)]
struct Entry {
    half: HalfOpen,
    announced: bool,
    resends: usize,
    due: Instant,
}

/// The bounded table of handshakes under way. Only a courtesy: it repeats a lost SYN-ACK, which
/// matters where the server speaks first, and spares a client with a lost final ACK an RST.
#[derive(Debug, Default)]
pub(crate) struct HalfOpens {
    entries: BTreeMap<Tuple, Entry>,
    due: BTreeSet<(Instant, Tuple)>,
}

/// What a half-open connection wants now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Announce(HalfOpen),
    Resend(HalfOpen),
}

impl HalfOpens {
    /// Notes a handshake, unless `max` are known. A later SYN replaces an earlier one.
    pub(crate) fn note(&mut self, now: Instant, half: HalfOpen, max: usize) {
        let before = self.entries.get(&half.tuple);
        let announced = before.is_some_and(|e| e.announced && e.half.iss == half.iss);
        self.remove(&half.tuple);
        if self.entries.len() < max {
            let wait = if announced {
                RESEND_AFTER[0]
            } else {
                ANNOUNCE_AFTER
            };
            self.insert(half, announced, 0, now + wait);
        }
    }

    /// Takes over a handshake that another leader announced; its SYN-ACK is due at once.
    pub(crate) fn inherit(&mut self, now: Instant, half: HalfOpen, max: usize) {
        if self.entries.len() < max {
            self.insert(half, true, 0, now);
        }
    }

    fn insert(&mut self, half: HalfOpen, announced: bool, resends: usize, due: Instant) {
        self.due.insert((due, half.tuple));
        self.entries.insert(
            half.tuple,
            Entry {
                half,
                announced,
                resends,
                due,
            },
        );
    }

    /// The handshake is over.
    pub(crate) fn remove(&mut self, tuple: &Tuple) {
        if let Some(entry) = self.entries.remove(tuple) {
            self.due.remove(&(entry.due, *tuple));
        }
    }

    pub(crate) fn contains(&self, tuple: &Tuple) -> bool {
        self.entries.contains_key(tuple)
    }

    /// Those that were announced.
    pub(crate) fn announced(&self) -> Vec<HalfOpen> {
        self.entries
            .values()
            .filter(|e| e.announced)
            .map(|e| e.half)
            .collect()
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Due> {
        loop {
            let (at, tuple) = *self.due.first()?;
            if at > now {
                return None;
            }
            self.due.pop_first();
            let Some(entry) = self.entries.remove(&tuple) else {
                continue;
            };
            let half = entry.half;
            if !entry.announced {
                self.insert(half, true, 0, now + RESEND_AFTER[0]);
                return Some(Due::Announce(half));
            }
            let Some(wait) = RESEND_AFTER.get(entry.resends) else {
                continue;
            };
            self.insert(half, true, entry.resends + 1, now + *wait);
            return Some(Due::Resend(half));
        }
    }
}
