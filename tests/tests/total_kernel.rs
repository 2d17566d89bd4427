//! `ordering = "total"` with redis, whose state all its connections share: real nodes, real kernels,
//! and clients that write at the same time while leaders die.
//!
//! Every reply is checked against what the client itself and everyone together can have done, and in
//! the end every replica's redis must hold the same, by its own digest.

#![expect(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use unbroken_tests::client::{self as bytes, Progress};
use unbroken_tests::cluster::{Cluster, Options, PATIENCE, Service, whole};
use unbroken_tests::netns::{userns, wait_until};

const NODE: &str = env!("CARGO_BIN_EXE_lab-node");
const SERVER: &str = env!("CARGO_BIN_EXE_lab-server");
const PORT: u16 = 6379;
const UPSTREAM: u16 = 6380;
const CLIENTS: usize = 50;
/// Keys that all clients write.
const SHARED_KEYS: u64 = 20;

/// redis as a service with one order, started by the node.
fn redis(keys: &str) -> Service {
    let found = Command::new("redis-server").arg("--version").output();
    assert!(
        found.is_ok(),
        "redis-server is missing: Debian package redis-server"
    );
    Service {
        name: "redis".to_owned(),
        port: PORT,
        upstream: UPSTREAM,
        server: Vec::new(),
        keys: format!(
            "ordering = \"total\"\n\
             command = [\"redis-server\", \"--port\", \"{UPSTREAM}\", \"--bind\", \"127.0.0.1\", \
             \"--save\", \"\", \"--appendonly\", \"no\", \"--enable-debug-command\", \"local\"]\n{keys}"
        ),
    }
}

/// Checkpoints of redis as docs/configuration.md tells users to take them.
const CHECKPOINTS: &str = r#"
checkpoint = ["sh", "-c", """
ask() { redis-cli -p 6380 "$@"; }
ask client list | awk '!/ cmd=client.list / && !/ flags=N db=0 sub=0 psub=0 ssub=0 multi=-1 qbuf=0 .* omem=0 .* resp=2/ { exit 1 }' || exit 75
ask bgsave && echo taken || exit 75
while ask info persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.05; done
ask info persistence | grep -q rdb_last_bgsave_status:ok && mv dump.rdb "$UNBROKEN_CHECKPOINT"
"""]
restore = ["sh", "-c", "mv \"$UNBROKEN_CHECKPOINT\" dump.rdb"]
ready = ["sh", "-c", "redis-cli -p 6380 ping | grep -q PONG"]
"#;

/// What redis answers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reply {
    Text(String),
    Number(u64),
    Bulk(Option<Vec<u8>>),
}

/// A client of the protocol that redis speaks (RESP2), one request at a time.
struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    fn call(&mut self, words: &[&[u8]]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&request)?;
        self.reply()
    }

    fn reply(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let wrong = || io::Error::other(format!("not an answer of redis: {line:?}"));
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or_else(wrong)?;
        match kind {
            "+" => Ok(Reply::Text(rest.to_owned())),
            ":" => Ok(Reply::Number(rest.parse().map_err(|_| wrong())?)),
            "$" if rest == "-1" => Ok(Reply::Bulk(None)),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().map_err(|_| wrong())? + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Ok(Reply::Bulk(Some(bytes)))
            }
            _ => Err(wrong()),
        }
    }
}

/// What all clients together have been told.
#[derive(Default)]
struct Told {
    /// Answers to INCR: each is given once.
    counts: Mutex<Vec<u64>>,
    /// Lengths of the list that LPUSH answered.
    lengths: Mutex<Vec<u64>>,
    requests: AtomicU64,
    /// How long each request since the last look took, in microseconds.
    latencies: Mutex<Vec<u128>>,
    stop: AtomicBool,
}

impl Told {
    /// Prints how long the requests since the last look took.
    fn say_latencies(&self, phase: &str) {
        let mut all = std::mem::take(&mut *self.latencies.lock().unwrap());
        all.sort_unstable();
        let at = |per_mille: usize| all.get((all.len() * per_mille / 1000).min(all.len() - 1));
        if !all.is_empty() {
            println!(
                "{phase}: {} requests, p50 {:?} us, p99 {:?} us, longest {:?} us",
                all.len(),
                at(500).unwrap(),
                at(990).unwrap(),
                at(1000).unwrap()
            );
        }
    }
}

/// One client's life: its own key must answer what it last wrote, whoever leads.
fn client(cluster_connect: TcpStream, index: usize, told: &Told) -> Result<(), String> {
    let mut redis = Redis::new(cluster_connect);
    let own = format!("own:{index}");
    let (mut counts, mut lengths) = (Vec::new(), Vec::new());
    let mut round = 0_u64;
    while !told.stop.load(Ordering::Relaxed) {
        round += 1;
        let mut latencies = Vec::with_capacity(5);
        let mut call = |redis: &mut Redis, words: &[&[u8]]| {
            let asked = std::time::Instant::now();
            let reply = redis.call(words);
            latencies.push(asked.elapsed().as_micros());
            reply
        };
        let fail = |what: &str, got: io::Result<Reply>| {
            format!("client {index}, round {round}: {what}: {got:?}")
        };
        let value = format!(
            "{index}:{round}:{}",
            "x".repeat(usize::try_from(round % 700).unwrap())
        );
        let shared = format!("shared:{}", (round * 7 + index as u64) % SHARED_KEYS);
        match call(&mut redis, &[b"SET", own.as_bytes(), value.as_bytes()]) {
            Ok(Reply::Text(ok)) if ok == "OK" => {}
            got => return Err(fail("SET", got)),
        }
        match call(&mut redis, &[b"INCR", b"counter"]) {
            Ok(Reply::Number(n)) => counts.push(n),
            got => return Err(fail("INCR", got)),
        }
        match call(&mut redis, &[b"GET", own.as_bytes()]) {
            Ok(Reply::Bulk(Some(bytes))) if bytes == value.as_bytes() => {}
            got => return Err(fail("GET of what was just set", got)),
        }
        match call(&mut redis, &[b"LPUSH", b"list", value.as_bytes()]) {
            Ok(Reply::Number(n)) => lengths.push(n),
            got => return Err(fail("LPUSH", got)),
        }
        // The last of all writers wins, and nobody knows who that is but the order.
        match call(&mut redis, &[b"APPEND", shared.as_bytes(), own.as_bytes()]) {
            Ok(Reply::Number(_)) => {}
            got => return Err(fail("APPEND", got)),
        }
        told.requests.fetch_add(5, Ordering::Relaxed);
        told.latencies.lock().unwrap().extend(latencies);
    }
    told.counts.lock().unwrap().extend(counts);
    told.lengths.lock().unwrap().extend(lengths);
    Ok(())
}

/// Numbers 1 to n, each once.
fn exact(what: &str, told: &Mutex<Vec<u64>>) -> u64 {
    let all = told.lock().unwrap();
    let distinct: BTreeSet<u64> = all.iter().copied().collect();
    assert_eq!(
        distinct.len(),
        all.len(),
        "{what}: an answer was given twice"
    );
    let most = distinct.last().copied().unwrap_or(0);
    assert_eq!(
        most,
        all.len() as u64,
        "{what}: as many as were acknowledged"
    );
    most
}

/// What a replica's own redis says, asked on its host.
fn ask(cluster: &Cluster, replica: &str, words: &[&[u8]]) -> io::Result<Reply> {
    cluster.lab().host(replica).enter(|| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, UPSTREAM));
        Redis::new(TcpStream::connect(address)?).call(words)
    })
}

/// Waits until every replica's redis holds the same; they do when all have taken all inputs.
fn same_everywhere(cluster: &Cluster, counter: u64, patience: Duration) {
    let began = std::time::Instant::now();
    let mut seen = Vec::new();
    let what = format!("all copies of redis are equal, with a counter of {counter}");
    let waited = wait_until(&what, patience, || {
        seen = cluster
            .replicas()
            .iter()
            .map(|replica| {
                let digest = ask(cluster, replica, &[b"DEBUG", b"DIGEST"]);
                let count = ask(cluster, replica, &[b"GET", b"counter"]);
                format!("{digest:?} {count:?}")
            })
            .collect();
        let counted = format!("{:?}", counter.to_string().into_bytes());
        seen.windows(2).all(|pair| pair[0] == pair[1]) && seen[0].contains(&counted)
    });
    waited.unwrap_or_else(|error| panic!("{error}\n{seen:#?}"));
    println!("all equal after {:?}", began.elapsed());
}

fn connect(cluster: &Cluster) -> TcpStream {
    cluster.connect(PORT).unwrap()
}

/// Runs `act` while many clients write, then checks what they were told and what every replica holds.
fn under_load(cluster: &mut Cluster, clients: usize, act: impl FnOnce(&mut Cluster, &Told)) {
    let told = Arc::new(Told::default());
    let before = match ask(cluster, "r1", &[b"GET", b"counter"]).unwrap() {
        Reply::Bulk(None) => 0,
        other => panic!("a counter before anybody counted: {other:?}"),
    };
    assert_eq!(before, 0);
    let running: Vec<_> = (0..clients)
        .map(|index| {
            let (stream, told) = (connect(cluster), Arc::clone(&told));
            std::thread::spawn(move || client(stream, index, &told))
        })
        .collect();
    act(cluster, &told);
    told.stop.store(true, Ordering::Relaxed);
    for client in running {
        if let Err(error) = client.join().unwrap() {
            panic!("{error}\n{}", cluster.tails());
        }
    }
    let count = exact("INCR", &told.counts);
    assert_eq!(exact("LPUSH", &told.lengths), count);
    println!(
        "{} requests, counted to {count}",
        told.requests.load(Ordering::Relaxed)
    );
    same_everywhere(cluster, count, patience(megabytes(0)));
}

/// Waits for so many more requests.
fn go_on(told: &Told, requests: u64) {
    let began = std::time::Instant::now();
    let from = told.requests.load(Ordering::Relaxed);
    wait_until("the clients go on", PATIENCE, || {
        told.requests.load(Ordering::Relaxed) >= from + requests
    })
    .unwrap();
    println!("{requests} requests in {:?}", began.elapsed());
}

#[test]
fn redis_is_one_across_failovers() {
    userns::privileged("redis_is_one_across_failovers", || {
        let mut cluster = Cluster::start(Options::new(NODE, [redis("")])).unwrap();
        cluster.wait_whole().unwrap();
        under_load(&mut cluster, CLIENTS, |cluster, told| {
            go_on(told, 2_000);
            for round in 0..3 {
                let (leader, view) = cluster.leader().unwrap();
                if round % 2 == 0 {
                    // Node and server together, as the loss of a machine.
                    cluster.kill(&leader).unwrap();
                } else {
                    // The node alone: its redis stays behind, and knows what others may not.
                    cluster.node(&leader).kill().unwrap();
                }
                cluster.wait_leader(view).unwrap();
                go_on(told, 1_000);
                cluster.start_replica(&leader).unwrap();
                cluster.wait_whole().unwrap();
                go_on(told, 500);
            }
        });
    });
}

/// Fills redis with so many values of 1 MB each.
fn fill(cluster: &Cluster, values: usize) {
    let mut redis = Redis::new(connect(cluster));
    for index in 0..values {
        // What redis cannot compress.
        let mut state = index as u64;
        let mut word = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_be_bytes()[0]
        };
        let value: Vec<u8> = (0..1_000_000).map(|_| word()).collect();
        let reply = redis.call(&[b"SET", format!("big:{index}").as_bytes(), &value]);
        assert_eq!(
            reply.unwrap(),
            Reply::Text("OK".to_owned()),
            "value {index}"
        );
    }
}

/// How long so much data may take to be brought up, or compared.
fn patience(megabytes: usize) -> Duration {
    PATIENCE * u32::try_from(1 + megabytes / 100).unwrap()
}

/// Waits as long as so much data may take to be whole again.
fn wait_whole(cluster: &Cluster, megabytes: usize) {
    let began = std::time::Instant::now();
    let mut seen = String::new();
    let waited = wait_until("the cluster is whole", patience(megabytes), || {
        let statuses = cluster.statuses();
        let services = statuses.iter().flatten().filter_map(|s| s.services.first());
        let members = services.flat_map(|s| &s.members);
        let stages: Vec<String> = members
            .filter_map(|m| Some(format!("{} {:?}", m.name, m.catching_up?.stage)))
            .collect();
        let now = stages.join(", ");
        if now != seen {
            println!("{:?}: {now}", began.elapsed());
            seen = now;
        }
        whole(&statuses, &cluster.replicas()).is_ok()
    });
    waited.unwrap_or_else(|error| panic!("{error}\n{}", cluster.tails()));
}

/// Megabytes of values in redis: `UNBROKEN_MB=1000 cargo test ...` tries more.
fn megabytes(default: usize) -> usize {
    std::env::var("UNBROKEN_MB").map_or(default, |text| text.parse().unwrap())
}

/// The data outgrows what is kept of the input; a replica joins from a checkpoint under load, then
/// leads.
#[test]
fn redis_joins_from_a_checkpoint_under_load() {
    userns::privileged("redis_joins_from_a_checkpoint_under_load", || {
        let megabytes = megabytes(100);
        let history = format!(
            "history = {{ memory = \"{}MB\" }}\n{CHECKPOINTS}",
            megabytes / 10
        );
        let mut cluster = Cluster::start(Options::new(NODE, [redis(&history)])).unwrap();
        cluster.wait_whole().unwrap();
        let began = std::time::Instant::now();
        fill(&cluster, megabytes);
        println!("{megabytes} MB written in {:?}", began.elapsed());
        wait_whole(&cluster, megabytes);
        let clients = if megabytes > 100 { CLIENTS } else { 10 };
        under_load(&mut cluster, clients, |cluster, told| {
            go_on(told, 200);
            for _ in 0..2 {
                go_on(told, 100 * clients as u64);
                told.say_latencies("before");
                // None does while a view changes by itself, as it may where much is loaded on few cores.
                let (leader, view) = cluster.wait_leader(0).unwrap();
                cluster.kill(&leader).unwrap();
                cluster.wait_leader(view).unwrap();
                go_on(told, 200);
                told.say_latencies("takeover");
                let began = std::time::Instant::now();
                cluster.start_replica(&leader).unwrap();
                wait_whole(cluster, megabytes);
                println!("{leader} is back after {:?}", began.elapsed());
                told.say_latencies("joining");
                go_on(told, 200);
            }
        });
    });
}

/// A server that the node starts, on port 80, written in Python.
fn script(text: &str, keys: &str) -> Service {
    let listen = "import socket,select,time\ns=socket.socket()\n\
         s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\n\
         s.bind(('127.0.0.1',7000))\ns.listen()\n";
    Service {
        keys: format!(
            "ordering = \"total\"\ncommand = [\"python3\", \"-c\", \"\"\"\n{listen}{text}\"\"\"]\n{keys}"
        ),
        server: Vec::new(),
        ..Service::lab(SERVER)
    }
}

fn say(stream: &mut TcpStream, text: &[u8]) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(text).unwrap();
}

fn hear(stream: &mut TcpStream, text: &[u8]) {
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

/// The server reads its two connections in turn: what comes out of turn is left untaken, and what it
/// waits for stands behind that in the order.
#[test]
fn an_input_left_untaken_is_passed_over() {
    const TURNS: &str = "a=s.accept()[0]\nb=s.accept()[0]\n\
        while True:\n for c in a,b:\n  c.sendall(c.recv(1))\n";
    userns::privileged("an_input_left_untaken_is_passed_over", || {
        let service = script(TURNS, "stall = \"100ms\"");
        let mut cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
        cluster.wait_whole().unwrap();
        let mut a = cluster.connect(80).unwrap();
        let mut b = cluster.connect(80).unwrap();
        let mut turn = |round: u8| {
            say(&mut a, &[round]);
            hear(&mut a, &[round]);
            say(&mut a, &[round + 100]);
            say(&mut b, &[round]);
            hear(&mut b, &[round]);
            hear(&mut a, &[round + 100]);
            say(&mut b, &[round + 100]);
            hear(&mut b, &[round + 100]);
        };
        turn(1);
        // A replica that joins is not held up by what the others have passed over, and goes on.
        let (leader, view) = cluster.leader().unwrap();
        cluster.kill(&leader).unwrap();
        cluster.wait_leader(view).unwrap();
        turn(2);
        cluster.start_replica(&leader).unwrap();
        cluster.wait_whole().unwrap();
        turn(3);
    });
}

/// A server that blocks in writing to a client which does not read holds up all others: that client
/// is given up.
#[test]
fn a_client_that_does_not_read_is_reset() {
    const BLOCKS: &str = "all=[s]\n\
        while True:\n for c in select.select(all,[],[])[0]:\n\
        \x20 if c is s:\n   all.append(s.accept()[0])\n   continue\n\
        \x20 try:\n   d=c.recv(9)\n   c.sendall(b'x'*(64<<20) if d==b'big' else d)\n\
        \x20 except OSError: d=b''\n\
        \x20 if not d:\n   all.remove(c)\n   c.close()\n";
    userns::privileged("a_client_that_does_not_read_is_reset", || {
        let service = script(BLOCKS, "stall = \"100ms\"");
        let cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
        cluster.wait_whole().unwrap();
        let mut lazy = cluster.connect(80).unwrap();
        let mut eager = cluster.connect(80).unwrap();
        say(&mut lazy, b"big");
        // Its first bytes show that the server is at it.
        hear(&mut lazy, b"xx");
        say(&mut eager, b"hello");
        hear(&mut eager, b"hello");
        let error = io::copy(&mut lazy, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        say(&mut eager, b"still");
        hear(&mut eager, b"still");
    });
}

/// Servers whose connections share nothing do not need the order, and lose nothing by it.
#[test]
fn a_server_without_shared_state_is_served_too() {
    const BYTES: u64 = 4 << 20;
    userns::privileged("a_server_without_shared_state_is_served_too", || {
        let mut service = Service::lab(SERVER);
        let words: Vec<String> = service.server.drain(..).map(|w| format!("{w:?}")).collect();
        service.keys = format!("ordering = \"total\"\ncommand = [{}]\n", words.join(", "));
        let mut cluster = Cluster::start(Options::new(NODE, [service])).unwrap();
        let (leader, view) = cluster.wait_whole().unwrap();
        let rate = Some(BYTES);
        let progress = [(); 3].map(|()| Progress::shared());
        let stop = Arc::new(AtomicBool::new(false));
        let (down, up, ask) = (
            cluster.connect(80).unwrap(),
            cluster.connect(80).unwrap(),
            cluster.connect(80).unwrap(),
        );
        std::thread::scope(|scope| {
            let running = [
                scope.spawn(|| bytes::download(down, 7, BYTES, rate, &progress[0]).map(drop)),
                scope.spawn(|| bytes::upload(up, 8, BYTES, rate, &progress[1]).map(drop)),
                scope.spawn(|| {
                    let more = || !stop.load(Ordering::Relaxed);
                    let period = std::time::Duration::from_millis(2);
                    bytes::exchange(ask, 300, period, &progress[2], more).map(drop)
                }),
            ];
            cluster.kill(&leader).unwrap();
            cluster.wait_leader(view).unwrap();
            cluster.start_replica(&leader).unwrap();
            cluster.wait_whole().unwrap();
            stop.store(true, Ordering::Relaxed);
            for client in running {
                client
                    .join()
                    .unwrap()
                    .unwrap_or_else(|error| panic!("{error}"));
            }
        });
    });
}
