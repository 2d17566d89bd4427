//! Garbage from a peer that has the key: a core in a view bears it, in every role and while the view is being left.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::config::Config;
use crate::core::{Core, Phase};
use crate::fbcast::NAK_RANGES_MAX;
use crate::output::{CasResult, Command, Lag, Output, ReadResult, RegistryReply, Role};
use crate::rng::Rng;
use crate::time::Instant;
use crate::view::{MemberId, View, ViewId};
use crate::wire::{self, Chunk, Header, Message, Piece, Pos};

/// Three members, a network that loses nothing, and a coordinator that answers within a step.
struct World {
    cores: Vec<Core>,
    delivered: Vec<u64>,
    znode: Option<(Bytes, i32)>,
    lease: Option<(Bytes, i32)>,
    replies: VecDeque<(usize, RegistryReply)>,
    network: VecDeque<(MemberId, MemberId, Bytes)>,
    now_us: u64,
    /// Members whose datagrams are lost and who are given none.
    silent: Vec<bool>,
    /// Whether leaders give any.
    checkpoints: bool,
    /// Bytes and outputs since last asked.
    spent: (usize, usize),
}

impl World {
    /// Runs until all are full members, or, without checkpoints, until all others are joining.
    fn new(seed: u64, silent: Vec<bool>, checkpoints: bool) -> Self {
        let names: Vec<String> = (1..=silent.len()).map(|i| format!("r{i}")).collect();
        let cores = (1..).zip(&names).map(|(incarnation, name)| {
            let me = MemberId::new(name.clone(), incarnation);
            let mut config = Config::new(1, me, names.clone(), 42);
            config.limits.reorder_bytes_max = 1000;
            let seed = seed << 8 | u64::try_from(incarnation).unwrap();
            let mut core = Core::new(config, seed, Instant::from_micros(0));
            core.handle_command(Instant::from_micros(1), Command::Join)
                .unwrap();
            core
        });
        let mut world = Self {
            cores: cores.collect(),
            delivered: vec![0; silent.len()],
            znode: None,
            lease: None,
            replies: VecDeque::new(),
            network: VecDeque::new(),
            now_us: 1,
            silent,
            checkpoints,
            spent: (0, 0),
        };
        while !world.whole() {
            assert!(world.now_us < 10_000_000, "no view of all");
            world.step(1000);
        }
        world
    }

    fn at(&self) -> Instant {
        Instant::from_micros(self.now_us)
    }

    fn whole(&self) -> bool {
        let all = self.cores.len();
        let there = |v: &View| {
            let members = v.members().count();
            members == all && (v.full.len() == all || !self.checkpoints)
        };
        let has = |c: &Core| c.view.as_ref().is_some_and(there);
        self.cores.iter().all(has) && self.cores.iter().any(Core::can_multicast)
    }

    fn leader(&self) -> usize {
        let leads = |c: &Core| c.phase == Phase::Leading;
        self.cores.iter().position(leads).unwrap()
    }

    /// Time passes, and what was sent arrives.
    fn step(&mut self, us: u64) {
        self.now_us += us;
        for i in 0..self.cores.len() {
            let at = self.at();
            self.cores[i].handle_timeout(at);
            self.drain(i);
        }
        // One that finds its write refused may try again at once: that is bounded by the coordinator's pace.
        for _ in 0..self.replies.len() {
            let (i, reply) = self.replies.pop_front().unwrap();
            let at = self.at();
            self.cores[i].handle_registry(at, reply);
            self.drain(i);
        }
        for _ in 0..self.network.len() {
            let (from, to, body) = self.network.pop_front().unwrap();
            if let Some(i) = self.cores.iter().position(|c| *c.me() == to) {
                self.datagram(i, &from, &body);
            }
        }
    }

    fn datagram(&mut self, i: usize, from: &MemberId, body: &[u8]) {
        let at = self.at();
        self.cores[i].handle_datagram(at, from, body);
        self.drain(i);
    }

    fn drain(&mut self, i: usize) {
        while let Some(output) = self.cores[i].poll_output() {
            self.spent.1 += 1;
            let at = self.at();
            match output {
                Output::Send { to, bodies } => {
                    self.spent.0 += bodies.iter().map(Bytes::len).sum::<usize>() * to.len();
                    let from = self.cores[i].me().clone();
                    for to in to.iter() {
                        let other = self.cores.iter().position(|c| c.me() == to);
                        if other.is_some_and(|o| self.silent[o] != self.silent[i]) {
                            continue;
                        }
                        let sent = bodies.iter().map(|b| (from.clone(), to.clone(), b.clone()));
                        self.network.extend(sent);
                    }
                }
                Output::Deliver { number, .. } => {
                    assert!(number > self.delivered[i], "in order");
                    self.delivered[i] = number;
                }
                Output::CheckpointWanted { .. } if !self.checkpoints => {}
                Output::CheckpointWanted { joiner, .. } => {
                    let segments = vec![Bytes::from_static(b"state")];
                    let command = Command::Checkpoint { joiner, segments };
                    self.cores[i].handle_command(at, command).unwrap();
                }
                Output::CheckpointDone => {
                    // What garbage made whole may be of a member that is out by now.
                    let _ = self.cores[i].handle_command(at, Command::ReadyToBeFull);
                }
                output => {
                    if let Some(reply) = self.answer(&output) {
                        self.replies.push_back((i, reply));
                    }
                }
            }
        }
    }

    fn answer(&mut self, output: &Output) -> Option<RegistryReply> {
        let read = |node: &Option<(Bytes, i32)>| match node.clone() {
            Some((value, version)) => ReadResult::Value { value, version },
            None => ReadResult::Absent,
        };
        let version = |node: &Option<(Bytes, i32)>| node.as_ref().map(|(_, version)| *version);
        Some(match output {
            Output::ReadView => RegistryReply::View(read(&self.znode)),
            Output::ReadLease => RegistryReply::Lease(read(&self.lease)),
            Output::CompareAndSet {
                expected_version,
                value,
            } => {
                let have = version(&self.znode);
                if have != *expected_version {
                    return Some(RegistryReply::Cas(CasResult::BadVersion));
                }
                let version = have.map_or(0, |v| v + 1);
                self.znode = Some((value.clone(), version));
                RegistryReply::Cas(CasResult::Written { version })
            }
            Output::RenewLease {
                view_version,
                value,
            } => {
                if version(&self.znode) != Some(*view_version) {
                    return Some(RegistryReply::Renew(CasResult::BadVersion));
                }
                let version = version(&self.lease).map_or(0, |v| v + 1);
                self.lease = Some((value.clone(), version));
                RegistryReply::Renew(CasResult::Written { version })
            }
            _ => return None,
        })
    }
}

/// Numbers that tear at every edge, and some that fit.
struct Chaos {
    rng: Rng,
    near: Vec<u64>,
    /// Nobody asks to leave the view: what happens in it goes on for longer.
    calm: bool,
}

impl Chaos {
    fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n
    }

    fn small(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap()
    }

    fn number(&mut self) -> u64 {
        let at = self.small(self.near.len());
        let near = self.near[at];
        match self.below(6) {
            0 => [0, u64::MAX, u64::MAX - 1, 1 << 63, 1 << 40][self.small(5)],
            1 => self.rng.next_u64(),
            2 => near,
            _ => near.wrapping_add(self.below(9)).wrapping_sub(4),
        }
    }

    fn number32(&mut self) -> u32 {
        u32::try_from(self.number() & u64::from(u32::MAX)).unwrap()
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.small(most + 1);
        let byte = |rng: &mut Rng| rng.next_u64().to_le_bytes()[0];
        (0..len).map(|_| byte(&mut self.rng)).collect()
    }

    fn pos(&mut self) -> Pos {
        Pos {
            number: self.number(),
            offset: if self.below(2) == 0 {
                0
            } else {
                self.number32()
            },
        }
    }

    fn lag(&mut self) -> Lag {
        let image = self.bytes(40);
        postcard::from_bytes(&image).unwrap_or_default()
    }

    fn message(&mut self, view: &View) -> Message {
        match self.below(13) {
            0 => Message::Heartbeat {
                sent_us: self.number(),
            },
            1 => Message::Alive {
                sent_us: self.number(),
                lag: self.lag(),
            },
            2 => {
                let count = self.small(2 * NAK_RANGES_MAX);
                let ranges = (0..count).map(|_| (self.pos(), self.pos())).collect();
                Message::Nak { ranges }
            }
            3 => Message::PreVote,
            4 => Message::PreVoteAnswer {
                granted: self.below(2) == 0,
            },
            5 if !self.calm => Message::Wedge,
            6 => Message::WedgeAck {
                held: self.number(),
                answered_ago_us: (self.below(2) == 0).then(|| self.number()),
                clock_us: self.number(),
                lag: self.lag(),
                ready: self.below(2) == 0,
            },
            7 => Message::WantView,
            8 => Message::JoinRequest,
            5 | 9 => Message::JoinReady,
            10 => Message::LeaveRequest,
            11 => Message::PiecesWanted {
                since: self.number(),
                offset: self.number(),
                len: self.number32(),
            },
            _ => Message::NewView {
                version: i32::from_le_bytes(self.number32().to_le_bytes()),
                znode: self.znode(view),
            },
        }
    }

    /// Never a view that could be one: those a core believes, from whoever has the key.
    fn znode(&mut self, view: &View) -> Vec<u8> {
        let mut view = view.clone();
        match self.below(6) {
            0 => view.id = ViewId(u64::MAX - self.below(3)),
            1 => view.cut = u64::MAX - self.below(3),
            2 => view.clock_us = u64::MAX - self.below(3),
            3 => view.lease_us = u64::MAX - self.below(3),
            4 => view.generation = u32::MAX,
            _ => {
                let mut bytes = view.encode();
                let len = bytes.len();
                bytes.truncate(self.small(len));
                return bytes;
            }
        }
        if view.id.0 < 1 << 60 {
            view.id.0 += 1;
        }
        view.encode()
    }

    fn body(&mut self, view: &View) -> Vec<u8> {
        if self.below(10) == 0 {
            return self.bytes(300);
        }
        let flags = self.rng.next_u64().to_le_bytes()[0];
        let header = Header {
            flags,
            view_id: if self.below(8) == 0 {
                self.number()
            } else {
                view.id.0
            },
            clock_us: self.number(),
            held: self.number(),
            stable: self.number(),
            trim: self.number(),
        };
        let mut out = BytesMut::new();
        header.put(&mut out);
        for _ in 0..self.below(4) {
            match self.below(5) {
                0 | 1 => {
                    let bytes = self.bytes(100);
                    let pos = self.pos();
                    let total = if self.below(2) == 0 {
                        u32::try_from(bytes.len()).unwrap()
                    } else {
                        self.number32()
                    };
                    let bytes = &bytes[..];
                    wire::put_chunk(&mut out, &Chunk { pos, total, bytes });
                }
                2 => {
                    let bytes = &self.bytes(100)[..];
                    let piece = Piece {
                        since: self.number(),
                        offset: self.number(),
                        total: self.number(),
                        bytes,
                    };
                    wire::put_piece(&mut out, &piece);
                }
                3 => wire::put_unicast(&mut out, &self.bytes(100)),
                _ => wire::put_message(&mut out, &self.message(view)),
            }
        }
        let mut body = out.to_vec();
        if self.below(4) == 0 {
            let (at, bit) = (self.small(body.len()), self.below(8));
            body[at] ^= 1 << bit;
        }
        if self.below(8) == 0 {
            body.truncate(self.small(body.len()));
        }
        body
    }
}

/// What one datagram can make a core send: what its requests ask for, together, and a few answers.
const ANSWER_BYTES_MAX: usize = super::RESEND_BYTES + (64 << 10);

/// The third member may be silent to the others, so that they suspect it; all speak nonsense to the victim.
fn bears_garbage(seed: u64, role: Role) {
    let mut world = World::new(seed, vec![false; 3], role != Role::Joining);
    let mut rng = Rng::new(seed);
    let leader = world.leader();
    let followers: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
    let victim = if role == Role::Leader {
        leader
    } else {
        followers[0]
    };
    assert_eq!(world.cores[victim].role(), Some(role));
    world.silent[followers[1]] = rng.next_u64().is_multiple_of(2);
    let mut chaos = Chaos {
        rng,
        near: Vec::new(),
        calm: seed.is_multiple_of(2),
    };
    for step in 0..400u64 {
        let core = &world.cores[victim];
        let Some(view) = core.view.clone() else {
            return; // out, as what a peer said made it
        };
        chaos.near = vec![core.log.held(), core.delivered, view.id.0, world.now_us];
        let from = match chaos.below(8) {
            0 => MemberId::new("r2", chaos.rng.next_u128()),
            1 => MemberId::new("nobody", 1),
            _ => {
                let members: Vec<MemberId> = view.members().cloned().collect();
                members[chaos.small(members.len())].clone()
            }
        };
        let body = chaos.body(&view);
        let ours = from == *core.me();
        let before = core.counters;
        let unreadable = wire::Reader::new(&body).is_none_or(|(_, mut items)| {
            while items.next().is_some() {}
            items.damaged()
        });
        world.spent = (0, 0);
        world.datagram(victim, &from, &body);
        assert!(
            world.spent.0 <= ANSWER_BYTES_MAX && world.spent.1 <= 1000,
            "{:?}",
            world.spent
        );
        let core = &world.cores[victim];
        if core.phase == Phase::Gone {
            return;
        }
        if !ours {
            assert_eq!(
                core.counters.malformed - before.malformed,
                u64::from(unreadable),
                "seed {seed}, step {step}"
            );
        }
        assert!(core.assembler.kept_bytes() <= core.config.limits.reorder_bytes_max);
        assert!(core.peers.len() <= 2 && core.join_requests.len() <= 2);
        if core.can_multicast() && chaos.below(4) == 0 {
            let payload = Bytes::from(chaos.bytes(3000));
            let (at, number) = (world.at(), core.log.next());
            world.cores[victim].multicast(at, number, payload, false);
            world.drain(victim);
        }
        if chaos.below(8) == 0 {
            let us = chaos.below(3000);
            world.step(us);
        }
        // What was provoked is not answered for ever.
        assert!(world.network.len() < 20_000, "{}", world.network.len());
    }
    // And what was said is borne for as long as it is kept.
    for _ in 0..300 {
        world.step(1000);
    }
}

#[test]
fn a_leader_bears_garbage() {
    for seed in 0..500 {
        bears_garbage(seed, Role::Leader);
    }
}

#[test]
fn a_backup_bears_garbage() {
    for seed in 0..500 {
        bears_garbage(seed, Role::Backup);
    }
}

#[test]
fn a_joiner_bears_garbage() {
    for seed in 0..500 {
        bears_garbage(seed, Role::Joining);
    }
}

#[test]
fn one_datagram_of_many_requests_is_answered_as_one() {
    let mut world = World::new(1, vec![false; 3], true);
    let leader = world.leader();
    let follower = (leader + 1) % 3;
    let first = world.cores[leader].log.next();
    world.silent = (0..3).map(|i| i != leader).collect();
    for number in first..first + 400 {
        let at = world.at();
        world.cores[leader].multicast(at, number, Bytes::from(vec![7; 3000]), false);
        world.drain(leader);
    }
    let core = &world.cores[leader];
    let ranges = vec![(Pos::start(first), core.next_send)];
    let header = Header {
        view_id: core.view_id(),
        ..Header::default()
    };
    let nak = Message::Nak { ranges };
    let body = wire::body(&header, &vec![nak; 9]);
    let from = world.cores[follower].me().clone();
    world.spent = (0, 0);
    world.datagram(leader, &from, &body);
    let spent = world.spent.0;
    assert!((100 << 10..=ANSWER_BYTES_MAX).contains(&spent), "{spent}");
}

/// A peer that has the key makes up a view that is in no znode, and whose members are all dead: who would found the next
/// generation over it writes in vain, and not without rest.
#[test]
fn a_view_that_was_made_up_is_not_written_over_without_rest() {
    let names = vec!["r1".to_owned(), "r2".to_owned()];
    let me = MemberId::new("r1", 7);
    let mut core = Core::new(Config::new(1, me, names, 42), 1, Instant::from_micros(0));
    let view = |id, leader| View {
        instance: 42,
        generation: 1,
        id: ViewId(id),
        full: vec![leader],
        joining: Vec::new(),
        k: 0,
        lease_us: 1000,
        clock_us: 0,
        cut: 0,
        proposal: 1,
    };
    let written = view(3, MemberId::new("r2", 9)).encode();
    let made_up = view(99, MemberId::new("r1", 6)).encode();
    let mut now = 1;
    let at = Instant::from_micros;
    core.handle_command(at(now), Command::Join).unwrap();
    let forged = Message::NewView {
        version: 1,
        znode: made_up,
    };
    let body = wire::body(&Header::default(), &[forged]);
    core.handle_datagram(at(now), &MemberId::new("r2", 9), &body);
    let mut writes = 0;
    // A coordinator that answers at once.
    while now < 1_000_000 {
        core.handle_timeout(at(now));
        for _ in 0..100 {
            let reply = match core.poll_output() {
                None => break,
                Some(Output::ReadView) => RegistryReply::View(ReadResult::Value {
                    value: written.clone().into(),
                    version: 4,
                }),
                Some(Output::CompareAndSet { .. }) => {
                    writes += 1;
                    RegistryReply::Cas(CasResult::BadVersion)
                }
                Some(_) => continue,
            };
            core.handle_registry(at(now), reply);
        }
        now += 1000;
    }
    assert!((10..=101).contains(&writes), "{writes} writes in a second");
}
