//! Control connections: each member keeps a TCP connection to every other's group address.
//!
//! Its end is a hint of death at once, long before silence is one; and R2's proof of death is read off it: it ended and
//! the listener refuses, or another life of the member answers there. Nothing else is carried.
//!
//! ```text
//!   dialler -> "UBctl\0\0\1" challenge[16]
//!   member  -> length u16 | nonce[12] | sealed list of (group, incarnation)      under the member's control key
//! ```
//! The challenge is authenticated with the answer, so an old answer cannot be played again, and who has not the group's
//! key cannot speak for a member. A dialler learns nothing but incarnations, and those sealed. It asks again now and then.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use ring::aead::{Aad, LessSafeKey, Nonce};
use socket2::{SockRef, TcpKeepalive};

use super::closing::Closing;
use super::seal::{GroupKey, TAG_BYTES};
use crate::output::ControlEvent;
use crate::time::Instant;

const MAGIC: [u8; 8] = *b"UBctl\0\0\x01";
const CHALLENGE_BYTES: usize = 16;
const ASK_BYTES: usize = MAGIC.len() + CHALLENGE_BYTES;
const NONCE_BYTES: usize = 12;
/// The longest answer: some hundred groups.
const ANSWER_BYTES_MAX: usize = 4096;
const PEERS_MAX: usize = 31;
/// Connections accepted at once; more are closed at once.
const ACCEPTED_MAX: usize = 64;
/// After a refusal or a failure.
const RETRY: Duration = Duration::from_millis(20);
/// A peer is asked again now and then: evidence must be younger than the view that it is held against.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// A peer that neither answers nor refuses is tried again after this long.
const ATTEMPT_MAX: Duration = Duration::from_millis(250);
/// A path that was cut for a while must not leave a connection that one end alone believes in.
const KEEPALIVE: Duration = Duration::from_secs(1);

/// How many mio tokens the control connections use.
pub const CONTROL_TOKENS: usize = 1 + PEERS_MAX + ACCEPTED_MAX;

/// Something the control connections tell of a peer, for one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlInput {
    /// The group it concerns.
    pub group: u32,
    /// The peer's name.
    pub peer: String,
    /// What happened.
    pub event: ControlEvent,
}

/// All control connections of a node.
pub struct Control {
    listener: TcpListener,
    key: LessSafeKey,
    incarnations: BTreeMap<u32, u128>,
    peers: Vec<Peer>,
    accepted: Vec<Option<Accepted>>,
    inputs: VecDeque<ControlInput>,
    registry: Option<(Registry, usize)>,
    acceptable: bool,
}

struct Peer {
    name: String,
    address: SocketAddr,
    key: LessSafeKey,
    state: State,
    ready: bool,
}

enum State {
    Waiting {
        until: Instant,
    },
    Connecting {
        stream: TcpStream,
        since: Instant,
    },
    Asked {
        stream: TcpStream,
        since: Instant,
        challenge: [u8; CHALLENGE_BYTES],
        got: Vec<u8>,
    },
    /// `asked`: the challenge that is out, and when it was sent.
    Up {
        stream: TcpStream,
        since: Instant,
        groups: Vec<(u32, u128)>,
        asked: Option<(Instant, [u8; CHALLENGE_BYTES])>,
        got: Vec<u8>,
    },
}

/// What is kept of a connection that is up.
type Watched = (
    Instant,
    Vec<(u32, u128)>,
    Option<(Instant, [u8; CHALLENGE_BYTES])>,
    Vec<u8>,
);

enum Understood {
    NotYet,
    All(Vec<(u32, u128)>),
    /// Not sealed by the peer, or not asked for.
    Wrong,
}

struct Accepted {
    stream: TcpStream,
    got: Vec<u8>,
    ready: bool,
}

impl Control {
    pub(super) fn open(
        me: &str,
        members: &BTreeMap<String, SocketAddr>,
        key: &GroupKey,
        now: Instant,
    ) -> io::Result<Self> {
        if members.len() > PEERS_MAX + 1 {
            return Err(io::Error::other("too many members"));
        }
        #[expect(clippy::disallowed_methods, reason = "this is the driver")]
        let listener = std::net::TcpListener::bind(members[me])?;
        listener.set_nonblocking(true)?;
        let listener = Closing::First.place(listener);
        let others = members.iter().filter(|(name, _)| *name != me);
        let peers = others.map(|(name, address)| Peer {
            name: name.clone(),
            address: *address,
            key: key.control(name),
            state: State::Waiting { until: now },
            ready: false,
        });
        Ok(Self {
            listener: TcpListener::from_std(listener),
            key: key.control(me),
            incarnations: BTreeMap::new(),
            peers: peers.collect(),
            accepted: (0..ACCEPTED_MAX).map(|_| None).collect(),
            inputs: VecDeque::new(),
            registry: None,
            acceptable: true,
        })
    }

    pub(super) fn register(&mut self, registry: &Registry, base: usize) -> io::Result<()> {
        registry.register(&mut self.listener, Token(base), Interest::READABLE)?;
        self.registry = Some((registry.try_clone()?, base));
        Ok(())
    }

    pub(super) fn handle_ready(&mut self, index: usize) {
        match index {
            0 => self.acceptable = true,
            i if i <= PEERS_MAX => {
                if let Some(peer) = self.peers.get_mut(i - 1) {
                    peer.ready = true;
                }
            }
            i => {
                if let Some(Some(accepted)) = self.accepted.get_mut(i - 1 - PEERS_MAX) {
                    accepted.ready = true;
                }
            }
        }
    }

    /// This node lives as `incarnation` in a group from now on. Peers that were told of another life are cut off, so
    /// that they ask again.
    pub fn set_incarnation(&mut self, group: u32, incarnation: u128) {
        if self
            .incarnations
            .insert(group, incarnation)
            .is_some_and(|old| old != incarnation)
        {
            for slot in &mut self.accepted {
                *slot = None;
            }
            // The new life has heard nothing yet: who is there is told again, with the time of the old challenge.
            for peer in &self.peers {
                let State::Up { groups, since, .. } = &peer.state else {
                    continue;
                };
                let there = groups.iter().filter(|(g, _)| *g == group);
                self.inputs
                    .extend(there.map(|(_, incarnation)| ControlInput {
                        group,
                        peer: peer.name.clone(),
                        event: ControlEvent::Connected {
                            incarnation: *incarnation,
                            since: *since,
                        },
                    }));
            }
        }
    }

    /// When [`Self::poll_input`] has something to do of its own.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let due = |peer: &Peer| match &peer.state {
            State::Waiting { until } => Some(*until),
            State::Connecting { since, .. } | State::Asked { since, .. } => {
                Some(*since + ATTEMPT_MAX)
            }
            State::Up {
                since, asked: None, ..
            } => Some(*since + ASK_AGAIN),
            State::Up { .. } => None,
        };
        self.peers.iter().filter_map(due).min()
    }

    /// Does what is due, and gives the next thing that was learnt; drain to `None`.
    pub fn poll_input(&mut self, now: Instant) -> Option<ControlInput> {
        if self.inputs.is_empty() {
            self.accept();
            self.answer();
            for index in 0..self.peers.len() {
                self.drive(now, index);
            }
        }
        self.inputs.pop_front()
    }

    fn tell(&mut self, index: usize, event: ControlEvent) {
        let peer = &self.peers[index].name;
        let groups: Vec<u32> = self.incarnations.keys().copied().collect();
        for group in groups {
            self.inputs.push_back(ControlInput {
                group,
                peer: peer.clone(),
                event,
            });
        }
    }

    fn drive(&mut self, now: Instant, index: usize) {
        let ready = std::mem::take(&mut self.peers[index].ready);
        let waiting = State::Waiting { until: now + RETRY };
        let state = std::mem::replace(&mut self.peers[index].state, waiting);
        let next = match state {
            State::Waiting { until } if until > now => State::Waiting { until },
            State::Waiting { .. } => self.dial(now, index),
            State::Connecting { since, .. } if now >= since + ATTEMPT_MAX => {
                State::Waiting { until: now }
            }
            State::Connecting { stream, since } if ready => {
                self.connected(now, index, stream, since)
            }
            State::Asked { since, .. } if now >= since + ATTEMPT_MAX => {
                State::Waiting { until: now }
            }
            State::Asked {
                stream,
                since,
                challenge,
                got,
            } if ready => self.hear(now, index, stream, since, challenge, got),
            State::Up {
                stream,
                since,
                groups,
                asked,
                got,
            } if ready || (asked.is_none() && now >= since + ASK_AGAIN) => {
                self.watch(now, index, stream, (since, groups, asked, got))
            }
            other => other,
        };
        self.peers[index].state = next;
    }

    fn dial(&mut self, now: Instant, index: usize) -> State {
        let Some((registry, base)) = &self.registry else {
            return State::Waiting { until: now + RETRY };
        };
        let stream = TcpStream::connect(self.peers[index].address).and_then(|mut stream| {
            let token = Token(base + 1 + index);
            registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => State::Connecting { stream, since: now },
            Err(error) => self.failed(now, index, now, &error),
        }
    }

    fn failed(&mut self, now: Instant, index: usize, since: Instant, error: &io::Error) -> State {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            self.tell(index, ControlEvent::Refused { since });
        }
        State::Waiting { until: now + RETRY }
    }

    fn connected(
        &mut self,
        now: Instant,
        index: usize,
        mut stream: TcpStream,
        since: Instant,
    ) -> State {
        match stream.take_error() {
            Ok(None) => {}
            Ok(Some(error)) | Err(error) => return self.failed(now, index, since, &error),
        }
        match stream.peer_addr() {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotConnected => {
                return State::Connecting { stream, since };
            }
            Err(error) => return self.failed(now, index, since, &error),
        }
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE)
            .with_retries(2);
        if SockRef::from(&stream)
            .set_tcp_keepalive(&keepalive)
            .is_err()
        {
            return State::Waiting { until: now + RETRY };
        }
        match ask(&mut stream) {
            Some(challenge) => State::Asked {
                stream,
                since: now,
                challenge,
                got: Vec::new(),
            },
            None => State::Waiting { until: now },
        }
    }

    fn hear(
        &mut self,
        now: Instant,
        index: usize,
        mut stream: TcpStream,
        since: Instant,
        challenge: [u8; CHALLENGE_BYTES],
        mut got: Vec<u8>,
    ) -> State {
        let open = read_some(&mut stream, &mut got, ANSWER_BYTES_MAX + 2);
        let groups = match self.understand(index, &challenge, &mut got) {
            Understood::All(groups) => groups,
            Understood::NotYet if open => {
                return State::Asked {
                    stream,
                    since,
                    challenge,
                    got,
                };
            }
            Understood::NotYet => return State::Waiting { until: now },
            Understood::Wrong => {
                return State::Waiting {
                    until: now + ATTEMPT_MAX,
                };
            }
        };
        self.tell_who(index, since, &groups);
        if open {
            State::Up {
                stream,
                since,
                groups,
                asked: None,
                got: Vec::new(),
            }
        } else {
            self.ended(now, index)
        }
    }

    /// Reads an answer out of what has come.
    fn understand(
        &self,
        index: usize,
        challenge: &[u8; CHALLENGE_BYTES],
        got: &mut [u8],
    ) -> Understood {
        let Some(length) = got.get(..2) else {
            return Understood::NotYet;
        };
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        if got.len() < 2 + length && length <= ANSWER_BYTES_MAX {
            return Understood::NotYet;
        }
        let groups = got.get_mut(2..2 + length).and_then(|answer| {
            let (nonce, sealed) = answer.split_at_mut_checked(NONCE_BYTES)?;
            let nonce = Nonce::assume_unique_for_key((&*nonce).try_into().ok()?);
            let plain = self.peers[index]
                .key
                .open_in_place(nonce, Aad::from(challenge), sealed);
            postcard::from_bytes::<Vec<(u32, u128)>>(plain.ok()?).ok()
        });
        groups.map_or_else(
            || {
                tracing::warn!(
                    peer = self.peers[index].name,
                    "not a member of this group answers"
                );
                Understood::Wrong
            },
            Understood::All,
        )
    }

    fn tell_who(&mut self, index: usize, since: Instant, groups: &[(u32, u128)]) {
        for (group, incarnation) in groups {
            if self.incarnations.contains_key(group) {
                self.inputs.push_back(ControlInput {
                    group: *group,
                    peer: self.peers[index].name.clone(),
                    event: ControlEvent::Connected {
                        incarnation: *incarnation,
                        since,
                    },
                });
            }
        }
    }

    fn watch(
        &mut self,
        now: Instant,
        index: usize,
        mut stream: TcpStream,
        (mut since, mut groups, mut asked, mut got): Watched,
    ) -> State {
        let open = read_some(&mut stream, &mut got, ANSWER_BYTES_MAX + 2);
        let understood = match &asked {
            Some((_, challenge)) => self.understand(index, challenge, &mut got),
            None if got.is_empty() => Understood::NotYet,
            None => Understood::Wrong,
        };
        match (understood, asked) {
            (Understood::All(list), Some((at, _))) => {
                self.tell_who(index, at, &list);
                (since, groups, asked) = (at, list, None);
                got.clear();
            }
            (Understood::NotYet, None) if open && now >= since + ASK_AGAIN => {
                asked = ask(&mut stream).map(|challenge| (now, challenge));
                if asked.is_none() {
                    return self.ended(now, index);
                }
            }
            (Understood::NotYet, _) => {}
            (Understood::Wrong | Understood::All(_), _) => return self.ended(now, index),
        }
        if open {
            return State::Up {
                stream,
                since,
                groups,
                asked,
                got,
            };
        }
        drop(stream);
        self.ended(now, index)
    }

    /// The connection is gone: tell it, and ask at once whether anybody is there.
    fn ended(&mut self, now: Instant, index: usize) -> State {
        self.tell(index, ControlEvent::Ended { at: now });
        self.dial(now, index)
    }

    fn accept(&mut self) {
        let Some((registry, base)) = &self.registry else {
            return;
        };
        while self.acceptable {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => std::net::TcpStream::from(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.acceptable = false;
                    return;
                }
                // The peer gave up, or descriptors are short: the loop comes again.
                Err(_) => return,
            };
            let Some(slot) = self.accepted.iter().position(Option::is_none) else {
                continue;
            };
            let mut stream = TcpStream::from_std(Closing::Second.place(stream));
            let token = Token(base + 1 + PEERS_MAX + slot);
            if registry
                .register(&mut stream, token, Interest::READABLE)
                .is_ok()
            {
                let accepted = Accepted {
                    stream,
                    got: Vec::new(),
                    ready: true,
                };
                self.accepted[slot] = Some(accepted);
            }
        }
    }

    /// Answers challenges, and lets go of connections that ended or say what was not asked.
    fn answer(&mut self) {
        for slot in &mut self.accepted {
            let Some(accepted) = slot else { continue };
            if !std::mem::take(&mut accepted.ready) {
                continue;
            }
            let open = read_some(&mut accepted.stream, &mut accepted.got, ASK_BYTES + 1);
            let kept = open
                && match accepted.got.len() {
                    n if n < ASK_BYTES => true,
                    ASK_BYTES if accepted.got[..MAGIC.len()] == MAGIC => {
                        let challenge = accepted.got.split_off(MAGIC.len());
                        accepted.got.clear();
                        sealed_answer(&self.key, &self.incarnations, &challenge).is_some_and(
                            |answer| {
                                accepted
                                    .stream
                                    .write(&answer)
                                    .is_ok_and(|n| n == answer.len())
                            },
                        )
                    }
                    _ => false,
                };
            if !kept {
                *slot = None;
            }
        }
    }
}

/// Sends a fresh challenge; the send buffer is empty, so anything but the whole of it is the connection's end.
fn ask(stream: &mut TcpStream) -> Option<[u8; CHALLENGE_BYTES]> {
    let mut ask = [0; ASK_BYTES];
    ask[..MAGIC.len()].copy_from_slice(&MAGIC);
    getrandom::fill(&mut ask[MAGIC.len()..]).ok()?;
    let whole = stream.write(&ask).is_ok_and(|n| n == ASK_BYTES);
    whole.then(|| ask[MAGIC.len()..].try_into().expect("sixteen bytes"))
}

fn sealed_answer(
    key: &LessSafeKey,
    incarnations: &BTreeMap<u32, u128>,
    challenge: &[u8],
) -> Option<Vec<u8>> {
    let list: Vec<(u32, u128)> = incarnations.iter().map(|(g, i)| (*g, *i)).collect();
    let mut plain = postcard::to_stdvec(&list).ok()?;
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).ok()?;
    let tag = key
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(challenge),
            &mut plain,
        )
        .ok()?;
    let length = u16::try_from(NONCE_BYTES + plain.len() + TAG_BYTES).ok()?;
    let mut answer = length.to_le_bytes().to_vec();
    answer.extend_from_slice(&nonce);
    answer.extend_from_slice(&plain);
    answer.extend_from_slice(tag.as_ref());
    Some(answer)
}

/// Reads until nothing more is there or `got` has `max` bytes; false if the connection has ended.
fn read_some(stream: &mut TcpStream, got: &mut Vec<u8>, max: usize) -> bool {
    let mut buf = [0; 512];
    while got.len() < max {
        let room = buf.len().min(max - got.len());
        match stream.read(&mut buf[..room]) {
            Ok(0) => return false,
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}
