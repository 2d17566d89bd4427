//! The leader's whole TCP for one VIP: demultiplexer, handshakes, connections, timers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::adopt::Library;
use crate::closed::{ClosedTuples, Ending, Past, Remembered};
use crate::config::Config;
use crate::conn_state::{ConnState, LinkAddr, Tuple};
use crate::endpoint::{Context, Endpoint, Fate, Log};
use crate::event::{ConnId, Event, EventNo, HalfOpen, OUTPUT_MARKS_MAX, OutputMark, ResetBy};
use crate::fault::planted;
use crate::icmp::TooBig;
use crate::output::{Checksum, Output, Packet};
use crate::replica::{Image, Record, Replica};
use crate::segment::{Refused, Reply, Segment, flag};
use crate::seq::SeqNum;
use crate::syn::{Due, HalfOpens, Secrets, cookie, negotiate, open_cookie};
use crate::time::{Instant, ServiceClock};
use crate::timer::Timers;

/// Connections taken up in one call: a takeover of thousands must not keep the thread from answering
/// heartbeats (slices of a millisecond; one costs about 6 us, its buffer's mapping
/// included).
const ADOPT_SLICE: usize = 64;
/// Deadlines served in one call, for the same reason.
const TIMEOUT_SLICE: usize = 1024;
/// After a takeover, a segment of no known connection is dropped in silence for this long: its
/// handshake may have been completed with the earlier leader.
const QUIET_AFTER_TAKEOVER: Duration = Duration::from_secs(3);
/// A handshake that was announced longer ago than this is not resumed by a new leader.
const HALF_OPEN_STALE: Duration = Duration::from_secs(8);
/// At most so many connections that we broke off are told again after a takeover.
const RESETS_RETOLD_MAX: usize = 1024;

/// What has been seen, counted since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Sound segments for this VIP.
    pub segments: u64,
    /// Packets that are not whole TCP segments in whole IP packets.
    pub malformed: u64,
    /// Segments with a wrong checksum.
    pub bad_checksums: u64,
    /// Fragments, which are dropped.
    pub fragments: u64,
    /// Packets of another protocol or to another address.
    pub not_ours: u64,
    /// SYNs answered with a SYN-ACK.
    pub syns: u64,
    /// Connections opened here.
    pub opened: u64,
    /// Connections taken over.
    pub adopted: u64,
    /// Old segments that would have opened a closed connection again.
    pub ghosts: u64,
    /// RSTs sent for no connection at all.
    pub stateless_resets: u64,
    /// Handshakes refused because `max_connections` are open.
    pub refused_by_limit: u64,
    /// A router's words that a segment was too large for the path.
    pub too_big: u64,
}

/// The leader's TCP for one VIP. See the crate's root for the contract.
#[derive(Debug)]
pub struct Stack {
    config: Config,
    secrets: Secrets,
    clock: ServiceClock,
    stable: EventNo,
    library: Library,
    log: Log,
    endpoints: BTreeMap<ConnId, Endpoint>,
    by_tuple: BTreeMap<Tuple, ConnId>,
    /// Taken over, and not yet taken up: in the order in which they will be.
    inherited: BTreeMap<ConnId, Record>,
    inherit_order: VecDeque<ConnId>,
    timers: Timers,
    /// Connections whose output waits for an event, by that event.
    gated: BTreeSet<(EventNo, ConnId)>,
    half_open: HalfOpens,
    closed: ClosedTuples,
    quiet_until: Option<Instant>,
    /// Bytes kept beyond gaps, by all connections together.
    held: usize,
    counters: Counters,
}

impl Stack {
    /// The stack of a VIP without connections. Its first event will be `next_event`; everything
    /// before is stable.
    ///
    /// # Panics
    /// If `next_event` is 0: numbers begin with 1.
    pub fn new(
        config: Config,
        secrets: Secrets,
        now: Instant,
        clock: ServiceClock,
        next_event: EventNo,
    ) -> Self {
        let stable = EventNo(
            next_event
                .0
                .checked_sub(1)
                .expect("event numbers begin with 1"),
        );
        Self {
            library: Library::new(now, config.segmentation_offload),
            config,
            secrets,
            clock,
            stable,
            log: Log {
                next: next_event,
                outputs: VecDeque::new(),
                unstable: VecDeque::new(),
            },
            endpoints: BTreeMap::new(),
            by_tuple: BTreeMap::new(),
            inherited: BTreeMap::new(),
            inherit_order: VecDeque::new(),
            timers: Timers::default(),
            gated: BTreeSet::new(),
            half_open: HalfOpens::default(),
            closed: ClosedTuples::default(),
            quiet_until: None,
            held: 0,
            counters: Counters::default(),
        }
    }

    /// Takes over every connection of a replica's record, which must be as after event
    /// `next_event - 1` (the cut, all of it stable). Those with unacknowledged output come first;
    /// each is sent an ACK or a retransmission at once, so that no client waits for its timers.
    ///
    /// The work is done in slices by [`Stack::handle_timeout`]; [`Stack::poll_timeout`] asks for it.
    ///
    /// # Panics
    /// If `next_event` is 0.
    pub fn take_over(
        config: Config,
        secrets: Secrets,
        now: Instant,
        clock: ServiceClock,
        next_event: EventNo,
        replica: Replica,
    ) -> Self {
        let mut stack = Self::new(config, secrets, now, clock, next_event);
        if planted!(TsvalReset) {
            stack.clock.value_us = 0;
        }
        stack.quiet_until = Some(now + QUIET_AFTER_TAKEOVER);
        stack.closed = replica.closed;
        let (busy, idle): (Vec<_>, Vec<_>) = replica
            .records
            .iter()
            .map(|(id, record)| (*id, !record.retained.is_empty() || record.state.window == 0))
            .partition(|(_, busy)| *busy);
        stack.inherit_order = busy.into_iter().chain(idle).map(|(id, _)| id).collect();
        stack.by_tuple = replica
            .records
            .iter()
            .map(|(id, r)| (r.state.tuple, *id))
            .collect();
        stack.inherited = replica.records;
        for (half, since) in replica.half_open.into_values() {
            if now.since(since) < HALF_OPEN_STALE && !planted!(HandshakesForgotten) {
                stack
                    .half_open
                    .inherit(now, half, stack.config.max_half_open);
            }
        }
        stack.tell_resets_again(now);
        stack.handle_timeout(now);
        stack
    }

    // --- inputs -----------------------------------------------------------------------------

    /// An IP packet from the wire (a super-segment of up to 64 KiB, too), and the link address it
    /// came from.
    pub fn handle_packet(
        &mut self,
        now: Instant,
        packet: &[u8],
        link: LinkAddr,
        checksum: Checksum,
    ) {
        let segment = match Segment::parse(packet, self.config.vip, checksum) {
            Ok(segment) => segment,
            Err(refused) => {
                if refused == Refused::NotOurs
                    && let Some(too_big) = TooBig::parse(packet, self.config.vip, checksum)
                {
                    return self.on_too_big(now, &too_big);
                }
                let counter = match refused {
                    Refused::Malformed => &mut self.counters.malformed,
                    Refused::Fragment => &mut self.counters.fragments,
                    Refused::NotOurs => &mut self.counters.not_ours,
                    Refused::Checksum => &mut self.counters.bad_checksums,
                };
                *counter += 1;
                return;
            }
        };
        self.counters.segments += 1;
        if let Some(conn) = self.by_tuple.get(&segment.tuple).copied() {
            self.with(now, conn, |endpoint, cx| {
                endpoint.handle_segment(cx, &segment, link)
            });
        } else if segment.has(flag::RST) {
            self.half_open.remove(&segment.tuple);
        } else if !self.config.ports.contains(&segment.tuple.local.port()) {
            self.refuse(&segment, link);
        } else if segment.has(flag::SYN) {
            self.on_syn(now, &segment, link);
        } else if segment.has(flag::ACK) {
            self.on_stray(now, &segment, link);
        }
    }

    /// Every event up to `stable` is held by enough backups. Never goes back.
    ///
    /// # Panics
    /// If an event is reported stable that was never announced.
    pub fn handle_stable(&mut self, now: Instant, stable: EventNo) {
        assert!(
            stable < self.log.next,
            "only announced events become stable"
        );
        if stable <= self.stable {
            return;
        }
        self.stable = stable;
        let mut concerned = BTreeSet::new();
        while let Some((number, conn)) = self.log.unstable.front().copied() {
            if number > stable {
                break;
            }
            self.log.unstable.pop_front();
            concerned.insert(conn);
        }
        while let Some((tag, conn)) = self.gated.first().copied() {
            if tag > stable {
                break;
            }
            self.gated.pop_first();
            concerned.insert(conn);
        }
        for conn in concerned {
            self.with(now, conn, Endpoint::handle_stable);
        }
    }

    /// Output of this node's server. `tag` is the newest event that the server had been given on
    /// this connection (or at all, with `ordering = "total"`): the bytes leave when it is stable.
    /// Not more than [`Stack::output_room`] bytes.
    pub fn handle_server_bytes(&mut self, now: Instant, conn: ConnId, bytes: &[u8], tag: EventNo) {
        self.with(now, conn, |endpoint, cx| {
            endpoint.handle_server_bytes(cx, bytes, tag)
        });
    }

    /// This node's server closed its side. The FIN follows the last byte when the event is stable.
    pub fn handle_server_fin(&mut self, now: Instant, conn: ConnId) {
        self.with(now, conn, Endpoint::handle_server_fin);
    }

    /// This node's server broke the connection off. The RST leaves when the event is stable.
    pub fn handle_server_reset(&mut self, now: Instant, conn: ConnId) {
        self.with(now, conn, |endpoint, cx| {
            endpoint.reset(cx, ResetBy::Server)
        });
    }

    /// This node's server leaves input of the connection untaken, which others wait behind: announces
    /// that nobody shall wait for it (`ordering = "total"`).
    pub fn handle_server_stalled(&mut self, conn: ConnId) {
        self.log.append(Event::Skip { conn });
    }

    /// The client does not take what the server says, and so holds others up: it is given up. The RST
    /// leaves when the event is stable.
    pub fn handle_client_stalled(&mut self, now: Instant, conn: ConnId) {
        self.with(now, conn, |endpoint, cx| endpoint.reset(cx, ResetBy::Stack));
    }

    /// This node's server has taken its input up to stream offset `offset`.
    pub fn handle_consumed(&mut self, now: Instant, conn: ConnId, offset: u64) {
        // What is still to be taken up waits for its turn.
        if let Some(record) = self.inherited.get_mut(&conn) {
            record.consumed = record.consumed.max(offset);
            return;
        }
        self.with(now, conn, |endpoint, cx| {
            endpoint.handle_consumed(offset);
            endpoint.pump(cx)
        });
    }

    /// Tells the other replicas what the local server has answered, in short. Without effect once the
    /// connection is over.
    ///
    /// # Panics
    /// With more than [`OUTPUT_MARKS_MAX`] marks.
    pub fn handle_output_marks(&mut self, conn: ConnId, marks: Vec<OutputMark>) {
        assert!(marks.len() <= OUTPUT_MARKS_MAX, "marks are bounded");
        if self.state(conn).is_some() {
            self.log.append(Event::Answered { conn, marks });
        }
    }

    /// Serves what is due. Early, late or repeated calls are harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        for _ in 0..ADOPT_SLICE {
            let Some(conn) = self.inherit_order.pop_front() else {
                break;
            };
            self.take_up(now, conn);
        }
        for _ in 0..TIMEOUT_SLICE {
            let Some(conn) = self.timers.pop_due(now) else {
                break;
            };
            self.with(now, conn, Endpoint::handle_timeout);
        }
        for _ in 0..TIMEOUT_SLICE {
            match self.half_open.pop_due(now) {
                None => break,
                Some(Due::Announce(half)) => {
                    self.log.append(Event::HalfOpen { half });
                }
                Some(Due::Resend(half)) => self.send_syn_ack(now, &half),
            }
        }
    }

    // --- outputs ----------------------------------------------------------------------------

    /// What to do next. Drain to `None` after every input, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.log.outputs.pop_front()
    }

    /// When [`Stack::handle_timeout`] wants to be called. Read after draining the outputs.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.inherit_order.is_empty() {
            return Some(Instant::default());
        }
        [self.timers.next(), self.half_open.next()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes the buffer of a packet that was sent.
    pub fn recycle(&mut self, buf: Vec<u8>) {
        self.library.recycle(buf);
    }

    /// How many bytes may be read from this connection's server now. After 0,
    /// [`Output::Room`] says when to ask again.
    pub fn output_room(&self, conn: ConnId) -> usize {
        self.endpoints
            .get(&conn)
            .map_or(0, |e| e.output_room(&self.config))
    }

    /// Whether output of this connection's server is of use to anybody: not once it is broken off or
    /// over.
    pub fn wants_output(&self, conn: ConnId) -> bool {
        match self.endpoints.get(&conn) {
            Some(endpoint) => !endpoint.resetting(),
            None => self.inherited.contains_key(&conn),
        }
    }

    /// Offset behind the last byte that this connection's server has produced.
    pub fn output_produced(&self, conn: ConnId) -> u64 {
        match self.endpoints.get(&conn) {
            Some(endpoint) => endpoint.produced(),
            None => self
                .inherited
                .get(&conn)
                .map_or(0, |record| record.produced),
        }
    }

    /// A connection's record, as after the last announced event.
    pub fn state(&self, conn: ConnId) -> Option<&ConnState> {
        match self.endpoints.get(&conn) {
            Some(endpoint) => Some(endpoint.state()),
            None => self.inherited.get(&conn).map(|record| &record.state),
        }
    }

    /// Connections at present.
    pub fn connections(&self) -> usize {
        self.by_tuple.len()
    }

    /// The number that the next event will have.
    pub fn next_event(&self) -> EventNo {
        self.log.next
    }

    /// What has been seen so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Closed tuples that are remembered, and how many were forgotten too early for want of room.
    pub fn closed_tuples(&self) -> (usize, u64) {
        (self.closed.len(), self.closed.evicted())
    }

    /// What a joiner needs to know: exactly as after the last announced event.
    pub fn snapshot(&self, now: Instant) -> Image {
        let mut connections = Vec::new();
        let mut closed = self.closed.image(now);
        for (id, endpoint) in &self.endpoints {
            let state = endpoint.state();
            if endpoint.resetting() {
                // To whoever applies events it is over already; here its RST waits to be stable.
                closed.push(Remembered::new(Past::of(state, Ending::ByUs)));
            } else {
                connections.push((*id, state.clone()));
            }
        }
        connections.extend(self.inherited.iter().map(|(id, r)| (*id, r.state.clone())));
        connections.sort_by_key(|(id, _)| *id);
        Image {
            connections,
            half_open: self.half_open.announced(),
            closed,
        }
    }

    // --- connections ------------------------------------------------------------------------

    /// Runs one connection's reaction, and settles what follows from it.
    fn with(
        &mut self,
        now: Instant,
        conn: ConnId,
        react: impl FnOnce(&mut Endpoint, &mut Context<'_>) -> Fate,
    ) {
        if self.inherited.contains_key(&conn) {
            self.take_up(now, conn);
        }
        let Some(endpoint) = self.endpoints.get_mut(&conn) else {
            return;
        };
        let mut cx = Context {
            now,
            config: &self.config,
            clock: self.clock,
            stable: self.stable,
            reassembly_room: self.config.reassembly_max.saturating_sub(self.held),
            library: &mut self.library,
            log: &mut self.log,
        };
        self.held -= endpoint.held();
        let fate = react(endpoint, &mut cx);
        endpoint.check_invariants();
        let ending = match fate {
            Fate::Live => {
                self.held += endpoint.held();
                let at = endpoint.poll_timeout(&mut self.library, now);
                self.timers.arm(conn, at);
                if let Some(tag) = endpoint.waits_for(self.stable) {
                    self.gated.insert((tag, conn));
                }
                return;
            }
            Fate::Closed => Ending::Closed,
            Fate::ResetByPeer => Ending::ByPeer,
            Fate::ResetByUs => Ending::ByUs,
        };
        let past = Past::of(endpoint.state(), ending);
        endpoint.release_sender(&mut self.library);
        self.endpoints.remove(&conn);
        self.by_tuple.remove(&past.tuple);
        self.timers.arm(conn, None);
        self.closed.remember(now, past, self.config.max_closed);
    }

    /// Makes an inherited record a connection, and greets its client.
    fn take_up(&mut self, now: Instant, conn: ConnId) {
        let Some(mut record) = self.inherited.remove(&conn) else {
            return;
        };
        // What this server said beyond the FIN that was agreed on is not output.
        if let Some(fin) = record.state.local_fin {
            let keep =
                usize::try_from(fin.saturating_sub(record.state.acked)).unwrap_or(usize::MAX);
            let over = record.retained.len().saturating_sub(keep);
            record.retained.truncate(keep);
            record.produced -= over as u64;
        }
        let retained = record.retained.make_contiguous();
        let mut endpoint = Endpoint::adopt(
            now,
            &self.config,
            conn,
            record.state,
            retained,
            record.produced,
            true,
        );
        endpoint.handle_consumed(record.consumed);
        self.counters.adopted += 1;
        self.endpoints.insert(conn, endpoint);
        if !planted!(GreetingSkipped) {
            self.with(now, conn, Endpoint::greet);
        }
        if record.server_reset {
            self.with(now, conn, |endpoint, cx| {
                endpoint.reset(cx, ResetBy::Server)
            });
        } else if record.server_fin {
            self.with(now, conn, Endpoint::handle_server_fin);
        }
        self.log.outputs.push_back(Output::Room(conn));
    }

    /// A client may have missed that we broke its connection off. A segment from before its window
    /// makes it answer, and the answer is told exactly (RFC 5961 §3.2).
    fn tell_resets_again(&mut self, now: Instant) {
        let pasts: Vec<Past> = self
            .closed
            .iter()
            .filter(|past| past.ending == Ending::ByUs)
            .take(RESETS_RETOLD_MAX)
            .copied()
            .collect();
        for past in pasts {
            let probe = SeqNum(past.snd_nxt.0.wrapping_sub(1));
            self.send_past(now, &past, probe, past.ts_recent);
        }
    }

    // --- segments of no connection ----------------------------------------------------------

    fn on_syn(&mut self, now: Instant, segment: &Segment<'_>, link: LinkAddr) {
        if segment.has(flag::ACK) {
            return self.refuse(segment, link);
        }
        if segment.has(flag::FIN) {
            return;
        }
        let negotiated = negotiate(&segment.options, segment.tuple.is_ipv6());
        let clock_us = self.clock.read_us(now);
        let half = HalfOpen {
            tuple: segment.tuple,
            next_hop: link,
            negotiated,
            irs: segment.seq,
            iss: cookie(
                &self.secrets,
                clock_us,
                &segment.tuple,
                segment.seq,
                &negotiated,
            ),
            ts_recent: segment.options.timestamp.map_or(0, |(val, _)| val),
        };
        self.counters.syns += 1;
        self.half_open.note(now, half, self.config.max_half_open);
        self.send_syn_ack(now, &half);
    }

    fn send_syn_ack(&mut self, now: Instant, half: &HalfOpen) {
        let capacity = self.config.receive_capacity;
        let scaling = half
            .negotiated
            .peer_shift
            .map(|_| crate::conn_state::shift_for(capacity));
        let packet = Reply {
            ack: Some(half.irs.plus(1)),
            flags: flag::SYN,
            // RFC 7323 §2.2: never scaled in a SYN.
            window: u16::try_from(capacity).unwrap_or(u16::MAX),
            mss: Some(self.config.local_mss()),
            window_scale: scaling,
            sack_permitted: half.negotiated.sack,
            timestamp: half
                .negotiated
                .timestamps
                .then(|| (self.clock.tsval(now), half.ts_recent)),
            ..Reply::new(&half.tuple, half.iss)
        }
        .emit(
            self.library.buffer(),
            half.next_hop,
            self.config.partial_checksum(),
        );
        self.transmit(packet);
    }

    /// An ACK without a connection: the last of a handshake, or an old one, or a stranger's.
    fn on_stray(&mut self, now: Instant, segment: &Segment<'_>, link: LinkAddr) {
        self.closed.expire(now);
        let (irs, iss) = (segment.seq.plus(u32::MAX), segment.ack.plus(u32::MAX));
        if let Some(past) = self.closed.with_iss(&segment.tuple, iss).copied() {
            self.counters.ghosts += 1;
            return self.answer_past(now, &past, segment, link);
        }
        let valid = open_cookie(
            &self.secrets,
            self.clock.read_us(now),
            &segment.tuple,
            irs,
            iss,
            segment.options.timestamp.is_some(),
        );
        if let Some(negotiated) = valid {
            if self.by_tuple.len() >= self.config.max_connections {
                self.counters.refused_by_limit += 1;
                return;
            }
            let shift = negotiated.peer_shift.unwrap_or(0);
            let state = ConnState {
                tuple: segment.tuple,
                next_hop: link,
                receive_capacity: self.config.receive_capacity,
                negotiated,
                irs,
                iss,
                received: 0,
                acked: 0,
                window: u32::from(segment.window) << shift,
                ts_recent: segment.options.timestamp.map_or(0, |(val, _)| val),
                peer_fin: false,
                local_fin: None,
            };
            self.open(now, state, segment, link);
        } else if let Some(past) = self.closed.nearest(&segment.tuple, segment.seq).copied() {
            self.answer_past(now, &past, segment, link);
        } else if !self.half_open.contains(&segment.tuple)
            && (self.quiet_until.is_none_or(|until| until <= now) || planted!(StrangersRefused))
        {
            self.refuse(segment, link);
        }
    }

    /// Path MTU discovery: smaller segments from now on, on the connection that it was about.
    fn on_too_big(&mut self, now: Instant, too_big: &TooBig) {
        if let Some(conn) = self.by_tuple.get(&too_big.tuple).copied() {
            self.counters.too_big += 1;
            self.with(now, conn, |endpoint, cx| {
                endpoint.handle_too_big(cx, too_big.seq, too_big.mtu)
            });
        }
    }

    fn open(&mut self, now: Instant, state: ConnState, segment: &Segment<'_>, link: LinkAddr) {
        let tuple = state.tuple;
        self.half_open.remove(&tuple);
        let number = self.log.append(Event::Open {
            state: state.clone(),
        });
        let conn = ConnId(number.0);
        let endpoint = Endpoint::adopt(now, &self.config, conn, state, &[], 0, false);
        self.counters.opened += 1;
        self.endpoints.insert(conn, endpoint);
        self.by_tuple.insert(tuple, conn);
        self.with(now, conn, |endpoint, cx| {
            endpoint.handle_segment(cx, segment, link)
        });
    }

    /// A segment of a connection that was: TIME-WAIT acknowledges a FIN again (RFC 9293 §3.10.7.4);
    /// what was broken off stays so.
    fn answer_past(&mut self, now: Instant, past: &Past, segment: &Segment<'_>, link: LinkAddr) {
        match past.ending {
            Ending::ByPeer | Ending::ByUs => self.refuse(segment, link),
            Ending::Closed if segment.len() > 0 || segment.seq != past.rcv_nxt => {
                let echo = segment
                    .options
                    .timestamp
                    .map(|(val, _)| val)
                    .or(past.ts_recent);
                let echo = past.ts_recent.and(echo);
                let past = Past {
                    next_hop: link,
                    ..*past
                };
                self.send_past(now, &past, past.snd_nxt, echo);
            }
            Ending::Closed => {}
        }
    }

    fn send_past(&mut self, now: Instant, past: &Past, seq: SeqNum, echo: Option<u32>) {
        let packet = Reply {
            ack: Some(past.rcv_nxt),
            timestamp: echo.map(|echo| (self.clock.tsval(now), echo)),
            ..Reply::new(&past.tuple, seq)
        }
        .emit(
            self.library.buffer(),
            past.next_hop,
            self.config.partial_checksum(),
        );
        self.transmit(packet);
    }

    /// RFC 9293 §3.10.7.1: an RST that the other side must believe.
    fn refuse(&mut self, segment: &Segment<'_>, link: LinkAddr) {
        let tuple = segment.tuple;
        let (seq, ack) = if segment.has(flag::ACK) {
            (segment.ack, None)
        } else {
            let len = u32::try_from(segment.len()).expect("a segment is below 2^32");
            (SeqNum(0), Some(segment.seq.plus(len)))
        };
        let packet = Reply {
            ack,
            flags: flag::RST,
            ..Reply::new(&tuple, seq)
        }
        .emit(self.library.buffer(), link, self.config.partial_checksum());
        self.counters.stateless_resets += 1;
        self.transmit(packet);
    }

    fn transmit(&mut self, packet: Packet) {
        self.log.outputs.push_back(Output::Transmit(packet));
    }
}
