//! Datagrams: one socket for all groups of a node.
//!
//! ```text
//!   0 version | 1 lane | 2 sender | 3.. group u32 | 7.. incarnation u128 | 23.. counter u64 | 31.. sealed body | tag
//! ```
//! `sender` is the rank of its name among the configured members.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use bytes::Bytes;
use mio::net::UdpSocket;
use mio::{Interest, Registry, Token};
use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use ring::aead::LessSafeKey;
use socket2::{Domain, SockRef, Socket, Type};

use super::seal::{self, GroupKey, ReplayWindow, TAG_BYTES};
use crate::view::MemberId;

const VERSION: u8 = 1;
/// The only lane so far; a node with several data-plane shards will number them.
const LANE: u8 = 0;
const HEADER_BYTES: usize = 31;
/// A received super-datagram (GRO) at most.
const SLOT_BYTES: usize = 65_536;
/// What one system call may carry; IPv4 allows 65,507.
const BURST_BYTES: usize = 65_000;
/// Lives of one member whose keys are kept: the newest that proved themselves.
const LIVES_MAX: usize = 4;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// What happened to datagrams, since the start.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Accepted.
    pub received: u64,
    /// Too short, or of another version.
    pub malformed: u64,
    /// From an address that is no member's, or of a group that is not here or not known yet.
    pub stranger: u64,
    /// Not sealed by the member that it names.
    pub forged: u64,
    /// Seen before, or too old to tell.
    pub replayed: u64,
}

/// Datagrams in.
pub struct Receiver {
    socket: Arc<UdpSocket>,
    state: Arc<UdpSocketState>,
    slots: Vec<u8>,
    names: Vec<String>,
    addresses: BTreeMap<SocketAddr, usize>,
    key: GroupKey,
    groups: BTreeMap<u32, Lives>,
    readable: bool,
    counters: Counters,
}

#[derive(Default)]
struct Lives {
    instance: Option<u128>,
    /// For each member, its lives, the newest last.
    lives: Vec<VecDeque<Life>>,
}

struct Life {
    member: MemberId,
    key: LessSafeKey,
    window: ReplayWindow,
}

/// Datagrams out.
pub struct Sender {
    socket: Arc<UdpSocket>,
    state: Arc<UdpSocketState>,
    addresses: BTreeMap<String, SocketAddr>,
    rank: u8,
    key: GroupKey,
    groups: BTreeMap<u32, Own>,
    buf: Vec<u8>,
    /// Datagrams that the kernel did not take; they are lost as if by the network.
    refused: u64,
}

#[derive(Default)]
struct Own {
    instance: Option<u128>,
    me: Option<MemberId>,
    key: Option<LessSafeKey>,
    counter: u64,
}

pub(super) fn open(
    me: &str,
    members: &BTreeMap<String, SocketAddr>,
    key: &GroupKey,
) -> io::Result<(Receiver, Sender)> {
    let address = members[me];
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    // The kernel bounds these by its own limits; bursts of events must not be lost for want of room.
    SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    let socket = UdpSocket::from_std(socket.into());
    let state = Arc::new(UdpSocketState::new(UdpSockRef::from(&socket))?);
    let socket = Arc::new(socket);
    let names: Vec<String> = members.keys().cloned().collect();
    let rank = names.iter().position(|n| n == me).expect("looked up above");
    let receiver = Receiver {
        socket: Arc::clone(&socket),
        state: Arc::clone(&state),
        slots: vec![0; BATCH_SIZE * SLOT_BYTES],
        addresses: members.values().copied().zip(0..).collect(),
        names,
        key: key.clone(),
        groups: BTreeMap::new(),
        readable: true,
        counters: Counters::default(),
    };
    let sender = Sender {
        socket,
        state,
        addresses: members.clone(),
        rank: u8::try_from(rank).map_err(|_| io::Error::other("more than 255 members"))?,
        key: key.clone(),
        groups: BTreeMap::new(),
        buf: Vec::with_capacity(BURST_BYTES),
        refused: 0,
    };
    Ok((receiver, sender))
}

impl Receiver {
    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        use std::os::fd::AsRawFd as _;
        let fd = self.socket.as_fd().as_raw_fd();
        registry.register(&mut mio::unix::SourceFd(&fd), token, interest)
    }

    pub(super) fn handle_readable(&mut self) {
        self.readable = true;
    }

    /// Whether [`Self::receive`] may give something.
    pub fn readable(&self) -> bool {
        self.readable
    }

    /// The instance of a group is known: its members can be heard.
    pub fn set_instance(&mut self, group: u32, instance: u128) {
        if self
            .groups
            .get(&group)
            .is_some_and(|g| g.instance == Some(instance))
        {
            return; // the replay windows stay
        }
        let lives = self.names.iter().map(|_| VecDeque::new()).collect();
        self.groups.insert(
            group,
            Lives {
                instance: Some(instance),
                lives,
            },
        );
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Receives one batch, and hands each body that was sealed by a member to `f`, with group and sender. Call again
    /// while [`Self::readable`].
    ///
    /// # Errors
    /// The socket failed.
    pub fn receive(&mut self, mut f: impl FnMut(u32, &MemberId, &[u8])) -> io::Result<()> {
        if !self.readable {
            return Ok(());
        }
        let mut slots = std::mem::take(&mut self.slots);
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let received = {
            let mut slices: Vec<IoSliceMut<'_>> = slots
                .chunks_exact_mut(SLOT_BYTES)
                .map(IoSliceMut::new)
                .collect();
            self.state
                .recv(UdpSockRef::from(&*self.socket), &mut slices, &mut metas)
        };
        let outcome = match received {
            Ok(n) => {
                // A short batch emptied the queue; what comes later makes the socket readable anew.
                self.readable = n == BATCH_SIZE;
                for (slot, meta) in slots.chunks_exact_mut(SLOT_BYTES).zip(&metas[..n]) {
                    let stride = meta.stride.max(1);
                    for datagram in slot[..meta.len.min(SLOT_BYTES)].chunks_mut(stride) {
                        self.open(meta.addr, datagram, &mut f);
                    }
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            // An ICMP answer to something that we sent: the member's process is not there.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        };
        self.slots = slots;
        outcome
    }

    fn open(
        &mut self,
        from: SocketAddr,
        datagram: &mut [u8],
        f: &mut impl FnMut(u32, &MemberId, &[u8]),
    ) {
        if datagram.len() < HEADER_BYTES + TAG_BYTES || datagram[0] != VERSION {
            self.counters.malformed += 1;
            return;
        }
        let (head, body) = datagram.split_at_mut(HEADER_BYTES);
        let rank = usize::from(head[2]);
        let group = u32::from_le_bytes(head[3..7].try_into().expect("four bytes"));
        let incarnation = u128::from_le_bytes(head[7..23].try_into().expect("sixteen bytes"));
        let counter = u64::from_le_bytes(head[23..31].try_into().expect("eight bytes"));
        let known = self.groups.get_mut(&group).filter(|g| g.lives.len() > rank);
        let (Some(known), true) = (known, self.addresses.get(&from) == Some(&rank)) else {
            self.counters.stranger += 1;
            return;
        };
        let Some(instance) = known.instance else {
            self.counters.stranger += 1;
            return;
        };
        let lives = &mut known.lives[rank];
        if let Some(life) = lives
            .iter_mut()
            .find(|l| l.member.incarnation == incarnation)
        {
            if !life.window.fresh(counter) {
                self.counters.replayed += 1;
                return;
            }
            match seal::open(&life.key, counter, head, body) {
                Some(plain) => {
                    life.window.note(counter);
                    self.counters.received += 1;
                    f(group, &life.member, plain);
                }
                None => self.counters.forged += 1,
            }
            return;
        }
        // A life not heard before: kept only if it proves itself.
        let name = &self.names[rank];
        let key = self.key.sender(instance, name, incarnation);
        let Some(plain) = seal::open(&key, counter, head, body) else {
            self.counters.forged += 1;
            return;
        };
        let mut window = ReplayWindow::default();
        window.note(counter);
        if lives.len() == LIVES_MAX {
            lives.pop_front();
        }
        let member = MemberId::new(name.clone(), incarnation);
        self.counters.received += 1;
        f(group, &member, plain);
        lives.push_back(Life {
            member,
            key,
            window,
        });
    }
}

impl Sender {
    /// This member's life in a group: its datagrams are sealed as this incarnation's from now on.
    pub fn set_member(&mut self, group: u32, me: MemberId) {
        let own = self.groups.entry(group).or_default();
        own.me = Some(me);
        own.counter = 0;
        own.derive(&self.key);
    }

    /// The instance of a group is known: this member can be heard.
    pub fn set_instance(&mut self, group: u32, instance: u128) {
        let own = self.groups.entry(group).or_default();
        own.instance = Some(instance);
        own.derive(&self.key);
    }

    /// Datagrams that the kernel did not take.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Seals each body once and sends it to each of `to`. All bodies but the last must be of equal size. What the
    /// kernel does not take is lost, as it could be on the way.
    pub fn send(&mut self, group: u32, to: &[MemberId], bodies: &[Bytes]) {
        let Some(own) = self.groups.get_mut(&group) else {
            return;
        };
        let (Some(me), Some(key)) = (&own.me, &own.key) else {
            return;
        };
        let stride = HEADER_BYTES + bodies.first().map_or(0, Bytes::len) + TAG_BYTES;
        let most = (BURST_BYTES / stride).clamp(1, self.state.max_gso_segments().max(1));
        for burst in bodies.chunks(most) {
            self.buf.clear();
            for body in burst {
                own.counter += 1;
                let start = self.buf.len();
                self.buf.extend_from_slice(&[VERSION, LANE, self.rank]);
                self.buf.extend_from_slice(&group.to_le_bytes());
                self.buf.extend_from_slice(&me.incarnation.to_le_bytes());
                self.buf.extend_from_slice(&own.counter.to_le_bytes());
                let from = self.buf.len();
                self.buf.extend_from_slice(body);
                seal::seal(key, own.counter, &mut self.buf, start, from);
            }
            for member in to {
                let Some(destination) = self.addresses.get(&member.name) else {
                    continue;
                };
                let transmit = Transmit {
                    destination: *destination,
                    ecn: None,
                    contents: &self.buf,
                    segment_size: (burst.len() > 1).then_some(stride),
                    src_ip: None,
                };
                if self
                    .state
                    .try_send(UdpSockRef::from(&*self.socket), &transmit)
                    .is_err()
                {
                    self.refused += burst.len() as u64;
                }
            }
        }
    }
}

impl Own {
    fn derive(&mut self, key: &GroupKey) {
        self.key = match (self.instance, &self.me) {
            (Some(instance), Some(me)) => Some(key.sender(instance, &me.name, me.incarnation)),
            _ => None,
        };
    }
}
