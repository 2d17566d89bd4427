//! Three replicas whose servers close, are stopped (a server that stops closes what it has, in order and while it
//! lives) and come back, one at a time, while reports are lost: a client is shown what its server did,
//! and nothing else (R5).

use super::*;

const REPLICAS: usize = 3;
const CONNS: u64 = 4;
/// Every server looks after itself this often.
const STEP_MS: u64 = 5;
const END_MS: u64 = 8_000;
/// Nothing fails after this, so that all closes must be shown in the end.
const CALM_MS: u64 = 5_000;
const CLOSE_WAIT: Duration = Duration::from_millis(300);
/// Until here the client has sent and been answered; its server closes behind the answer to come.
const IDLE_AT: u64 = 50;
const CLOSED_AT: u64 = 100;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn replica(&mut self) -> usize {
        usize::try_from(self.below(REPLICAS as u64)).expect("there are few")
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What happens to a server that is stopped.
#[derive(Clone, Copy)]
struct Stop {
    dies_ms: u64,
    back_ms: u64,
}

struct Replica {
    name: MemberId,
    closes: Closes,
    stop: Option<Stop>,
    /// Whether the leader takes its server for sound, by the last it heard.
    sound: bool,
    /// How its server closed each connection in this run.
    closed: BTreeMap<ConnId, u64>,
}

impl Replica {
    fn is_down(&self, ms: u64) -> bool {
        self.stop.is_some_and(|stop| stop.dies_ms <= ms)
    }
}

/// What clients have been shown.
struct Clients(BTreeMap<ConnId, Closed>);

impl Shown for Clients {
    fn is_over(&self, conn: ConnId, _: Closed) -> bool {
        self.0.contains_key(&conn)
    }

    fn acked(&self, _: ConnId) -> u64 {
        CLOSED_AT
    }

    fn close_wait(&self, _: ConnId) -> Duration {
        CLOSE_WAIT
    }
}

struct World {
    random: Random,
    loss: u64,
    /// When each connection is closed by a server that is sound.
    close_ms: BTreeMap<ConnId, u64>,
    replicas: Vec<Replica>,
    leader: usize,
    clients: Clients,
    next_stop_ms: u64,
    hand_overs: u64,
    stops: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        // A connection in four lives to the end.
        let closing = (1..=CONNS).filter(|_| !random.one_in(4));
        let closing: Vec<ConnId> = closing.map(ConnId).collect();
        let close_ms = closing.iter().map(|conn| (*conn, random.below(CALM_MS)));
        let close_ms = close_ms.collect();
        let replicas = tests::members(REPLICAS as u128).into_iter();
        Self {
            loss: if random.one_in(2) { 10 } else { 100 },
            next_stop_ms: random.below(500),
            random,
            close_ms,
            replicas: replicas
                .map(|name| Replica {
                    name,
                    closes: Closes::default(),
                    stop: None,
                    sound: true,
                    closed: BTreeMap::new(),
                })
                .collect(),
            leader: 0,
            clients: Clients(BTreeMap::new()),
            hand_overs: 0,
            stops: 0,
        }
    }

    fn step(&mut self, ms: u64) {
        self.servers(ms);
        for index in 0..REPLICAS {
            if index != self.leader && !self.random.one_in(self.loss) {
                self.replicas[index].sound = !self.replicas[index].is_down(ms);
            }
        }
        self.report(ms);
        self.judge(ms);
        if self.random.one_in(200) {
            self.lead((self.leader + 1) % REPLICAS);
        }
    }

    /// Servers close, are stopped, die, come back.
    fn servers(&mut self, ms: u64) {
        if ms >= self.next_stop_ms && ms < CALM_MS {
            let index = self.random.replica();
            let dies_ms = ms + self.random.below(30);
            // Another is looked for every 50 ms (`liveness.rs`).
            let back_ms = dies_ms + 50 + self.random.below(100);
            self.next_stop_ms = back_ms + self.random.below(300);
            self.stops += 1;
            let replica = &mut self.replicas[index];
            replica.stop = Some(Stop { dies_ms, back_ms });
            for conn in (1..=CONNS).map(ConnId) {
                if !self.clients.0.contains_key(&conn) && !replica.closed.contains_key(&conn) {
                    replica.closed.insert(conn, IDLE_AT);
                    let closed = match self.random.one_in(4) {
                        true => Closed::Reset,
                        false => Closed::Fin(IDLE_AT),
                    };
                    replica.closes.note(conn, closed, IDLE_AT);
                }
            }
        }
        for replica in &mut self.replicas {
            if let Some(stop) = replica.stop {
                if stop.dies_ms <= ms && !replica.closed.is_empty() {
                    replica.closed.clear();
                    let _ = replica.closes.void(|_| true);
                }
                if ms < stop.back_ms {
                    continue;
                }
                replica.stop = None;
            }
            for (conn, at) in &self.close_ms {
                let due = ms >= *at && !self.clients.0.contains_key(conn);
                if due && !replica.closed.contains_key(conn) && self.random.one_in(3) {
                    replica.closed.insert(*conn, CLOSED_AT);
                    let closed = Closed::Fin(CLOSED_AT);
                    replica.closes.note(*conn, closed, CLOSED_AT);
                }
            }
        }
    }

    fn report(&mut self, ms: u64) {
        for index in 0..REPLICAS {
            let backup = index != self.leader;
            while backup
                && let Some((run, closes)) =
                    self.replicas[index].closes.poll_report(tests::at(ms), 3)
            {
                if self.random.one_in(self.loss) {
                    continue;
                }
                let name = self.replicas[index].name.clone();
                let over = &self.clients.0;
                let lives = |conn| !over.contains_key(&conn);
                let leader = &mut self.replicas[self.leader].closes;
                leader.handle_report(&name, run, &closes, lives);
            }
        }
    }

    fn judge(&mut self, ms: u64) {
        let others = self.replicas.iter().enumerate();
        let electable = others.filter(|(index, r)| *index != self.leader && r.sound);
        let electable: Vec<MemberId> = electable.map(|(_, r)| r.name.clone()).collect();
        let leader = &mut self.replicas[self.leader];
        leader.closes.keep_reports(&electable);
        leader.closes.again();
        let mut hand_over = leader.is_down(ms);
        for (conn, closed, verdict) in leader
            .closes
            .judge(tests::at(ms), &electable, &self.clients)
        {
            if verdict != Verdict::Show {
                assert!(self.stops > 0, "sound servers do not contradict each other");
                hand_over = true;
                continue;
            }
            let due = self.close_ms.get(&conn).is_some_and(|at| *at <= ms);
            let right = match closed {
                Closed::Fin(offset) => offset == CLOSED_AT,
                Closed::Reset => false,
            };
            assert!(due && right, "at {ms} ms {conn:?} was shown {closed:?}");
            self.clients.0.insert(conn, closed);
        }
        for replica in &mut self.replicas {
            self.clients
                .0
                .keys()
                .for_each(|conn| replica.closes.settle(*conn));
        }
        if hand_over {
            self.hand_overs += 1;
            let sound = (0..REPLICAS).filter(|i| *i != self.leader);
            let next = sound.clone().find(|i| self.replicas[*i].sound);
            self.lead(next.unwrap_or(self.leader));
        }
    }

    fn lead(&mut self, leader: usize) {
        self.leader = leader;
        for replica in &mut self.replicas {
            replica.closes.handle_view();
        }
    }
}

#[test]
fn clients_are_shown_what_their_servers_did_and_nothing_else() {
    let (mut stops, mut hand_overs, mut closes) = (0, 0, 0);
    for seed in 0..400 {
        let mut world = World::new(seed);
        for step in 0..END_MS / STEP_MS {
            world.step(step * STEP_MS);
        }
        let missing = |conn: &&ConnId| !world.clients.0.contains_key(conn);
        let missing: Vec<_> = world.close_ms.keys().filter(missing).collect();
        assert!(missing.is_empty(), "seed {seed}: {missing:?} closed unseen");
        stops += world.stops;
        hand_overs += world.hand_overs;
        closes += world.clients.0.len();
    }
    assert!(
        stops > 1000 && hand_overs > 100 && closes > 500,
        "{stops} {hand_overs} {closes}"
    );
}
