//! The core against a tree that changes under it, in random order; and one-shot watches on a server.

#![expect(clippy::disallowed_methods, reason = "binds a port for a server")]

use std::collections::BTreeMap;

use super::core::{Answer, Ask, Core};
use super::{Cache, CacheEvent, Limits, Lookup, Node, Scope};
use crate::client::{Client, ConnectOptions};
use crate::driver::{self, ServerConfig};
use crate::wire::{Acl, CreateMode, EventType, Stat, parent};

const PATHS: [&str; 6] = ["/r", "/r/a", "/r/b", "/r/a/x", "/r/a/y", "/r/b/z"];

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from((self.0 >> 33) % u64::try_from(bound).unwrap()).unwrap()
    }
}

/// In the order of the connection.
#[derive(Clone, Debug)]
enum Told {
    Event(EventType, String, i64),
    Disconnected,
    Missed(i64),
}

/// A read under way: the server has executed as much of it as is there.
struct Reading {
    ask: Ask,
    node: Option<Option<Node>>,
    names: Option<Vec<String>>,
    /// How much was told before the last of it.
    after: usize,
}

struct World {
    dice: Dice,
    zxid: i64,
    tree: BTreeMap<String, Node>,
    /// What each path was from when on.
    history: BTreeMap<String, Vec<(i64, Option<Node>)>>,
    connected: bool,
    told: Vec<Told>,
    /// How much of it the cache has heard.
    heard: usize,
    /// The latest change of each path, and the latest interruption, that it has heard of.
    heard_of: BTreeMap<String, i64>,
    missed: i64,
    readings: Vec<Reading>,
    core: Core,
    /// What a subscriber would have.
    followed: BTreeMap<String, Node>,
}

impl World {
    fn new(seed: u64) -> Self {
        let history = PATHS.map(|path| (path.to_owned(), vec![(0, None)]));
        Self {
            dice: Dice(seed),
            zxid: 0,
            tree: BTreeMap::new(),
            history: history.into(),
            connected: true,
            told: vec![Told::Missed(0)],
            heard: 0,
            heard_of: BTreeMap::new(),
            missed: 0,
            readings: Vec::new(),
            core: Core::new("/r", Scope::Subtree, Limits::default()),
            followed: BTreeMap::new(),
        }
    }

    fn write(&mut self) {
        let path = PATHS[self.dice.below(PATHS.len())];
        let (above, _) = parent(path).unwrap();
        let prefix = format!("{path}/");
        let childless = !self.tree.keys().any(|other| other.starts_with(&prefix));
        let event = match self.tree.get(path) {
            None if above == "/" || self.tree.contains_key(above) => EventType::NodeCreated,
            None => return,
            Some(_) if childless && self.dice.below(2) == 0 => EventType::NodeDeleted,
            Some(_) => EventType::NodeDataChanged,
        };
        self.zxid += 1;
        let stat = Stat {
            czxid: self.tree.get(path).map_or(self.zxid, |old| old.stat.czxid),
            mzxid: self.zxid,
            ..Stat::default()
        };
        let new = (event != EventType::NodeDeleted).then(|| Node {
            data: self.zxid.to_string().into(),
            stat,
        });
        match &new {
            Some(node) => self.tree.insert(path.into(), node.clone()),
            None => self.tree.remove(path),
        };
        let history = self.history.get_mut(path).unwrap();
        history.push((self.zxid, new));
        if self.connected {
            self.told.push(Told::Event(event, path.into(), self.zxid));
        }
    }

    /// The cache hears what was told, this much at least.
    fn hear(&mut self, upto: usize) {
        while self.heard < upto {
            match &self.told[self.heard] {
                Told::Event(event, path, zxid) => {
                    self.heard_of.insert(path.clone(), *zxid);
                    self.core.handle_event(*event, path);
                }
                Told::Disconnected => self.core.handle_disconnected(),
                Told::Missed(zxid) => {
                    self.missed = *zxid;
                    self.core.handle_missed();
                }
            }
            self.heard += 1;
        }
    }

    /// The server executes a part of a read.
    fn execute(&mut self, which: usize) {
        let reading = &mut self.readings[which];
        let path = &reading.ask.path;
        if reading.node.is_none() {
            reading.node = Some(self.tree.get(path).cloned());
        } else if reading.names.is_none() {
            let child = |other: &&String| parent(other).is_some_and(|(above, _)| above == path);
            let names = self.tree.keys().filter(child);
            reading.names = Some(
                names
                    .map(|other| other[path.len() + 1..].to_owned())
                    .collect(),
            );
        }
        reading.after = self.told.len();
    }

    fn answer(&mut self, which: usize) {
        let reading = &self.readings[which];
        let (Some(node), Some(names)) = (&reading.node, &reading.names) else {
            return;
        };
        let names = if reading.ask.list {
            names.clone()
        } else {
            Vec::new()
        };
        let answer: Answer = node.clone().map(|node| (node.data, node.stat, names));
        let ask = reading.ask.clone();
        let after = reading.after;
        self.readings.swap_remove(which);
        let more = self.dice.below(self.told.len() - after + 1);
        self.hear(after + more);
        self.core.handle_answer(&ask, answer);
    }

    fn step(&mut self) {
        match self.dice.below(100) {
            0 if self.connected => {
                self.connected = false;
                self.told.push(Told::Disconnected);
            }
            1..20 if !self.connected => {
                self.connected = true;
                self.told.push(Told::Missed(self.zxid));
            }
            20..35 => self.write(),
            35..60 => {
                if let Some(ask) = self.core.poll_ask() {
                    self.readings.push(Reading {
                        ask,
                        node: None,
                        names: None,
                        after: 0,
                    });
                }
            }
            60..80 if self.connected && !self.readings.is_empty() => {
                let which = self.dice.below(self.readings.len());
                self.execute(which);
            }
            80..90 if !self.readings.is_empty() => {
                let which = self.dice.below(self.readings.len());
                self.answer(which);
            }
            _ => {
                let some = self.dice.below(self.told.len() - self.heard + 1);
                self.hear(self.heard + some);
            }
        }
        self.check();
    }

    /// Nothing fresh is older than what was heard.
    fn check(&mut self) {
        for event in self.core.take_events() {
            match event {
                CacheEvent::Added { path, node } => {
                    assert_eq!(self.followed.insert(path, node), None);
                }
                CacheEvent::Changed { path, node } => {
                    assert!(self.followed.insert(path, node).is_some());
                }
                CacheEvent::Removed { path } => {
                    assert!(self.followed.remove(&path).is_some());
                }
                CacheEvent::Stale | CacheEvent::Fresh | CacheEvent::Missed(_) => {}
            }
        }
        assert_eq!(self.followed, self.core.snapshot());
        for path in PATHS {
            let Lookup::Fresh(value) = self.core.get(path) else {
                continue;
            };
            let told = self
                .heard_of
                .get(path)
                .copied()
                .unwrap_or(0)
                .max(self.missed);
            let history = &self.history[path];
            let fits = history.iter().enumerate().any(|(i, (_, state))| {
                let until = history.get(i + 1).map_or(i64::MAX, |(zxid, _)| *zxid);
                *state == value && until > told
            });
            assert!(
                fits,
                "{path} is {value:?}, and {told} was heard of: {history:?}"
            );
        }
        for path in ["/r", "/r/a", "/r/b"] {
            let Lookup::Fresh(names) = self.core.children(path) else {
                continue;
            };
            for other in PATHS {
                let Some((_, name)) = parent(other).filter(|(above, _)| *above == path) else {
                    continue;
                };
                if let Lookup::Fresh(node) = self.core.get(other) {
                    assert_eq!(names.iter().any(|n| n == name), node.is_some(), "{other}");
                }
            }
        }
    }

    fn settle(&mut self) {
        if !self.connected {
            self.connected = true;
            self.told.push(Told::Missed(self.zxid));
        }
        loop {
            self.hear(self.told.len());
            while let Some(ask) = self.core.poll_ask() {
                self.readings.push(Reading {
                    ask,
                    node: None,
                    names: None,
                    after: 0,
                });
            }
            if self.readings.is_empty() {
                break;
            }
            self.execute(0);
            self.execute(0);
            self.answer(0);
            self.check();
        }
        assert!(self.core.is_fresh());
        assert_eq!(self.core.snapshot(), self.tree);
        for path in PATHS {
            let fresh = Lookup::Fresh(self.tree.get(path).cloned());
            assert_eq!(self.core.get(path), fresh);
        }
    }
}

#[test]
fn what_is_fresh_is_never_older_than_what_was_told() {
    for seed in 0..400 {
        let mut world = World::new(seed);
        for _ in 0..3 {
            for _ in 0..400 {
                world.step();
            }
            world.settle();
        }
    }
}

#[test]
fn the_scope_is_kept() {
    let covered = |scope| {
        let core = Core::new("/r", scope, Limits::default());
        // Nothing is known yet in any case, but what is out of scope is not asked for.
        let mut asked = Vec::new();
        for path in ["/r", "/r/a", "/r/a/x", "/rest", "/"] {
            let mut core = Core::new("/r", scope, Limits::default());
            core.handle_event(EventType::NodeDataChanged, path);
            if core.poll_ask().is_some() {
                asked.push(path);
            }
        }
        assert_eq!(core.get("/rest"), Lookup::Unknown);
        asked
    };
    assert_eq!(covered(Scope::Node), ["/r"]);
    assert_eq!(covered(Scope::Children), ["/r", "/r/a"]);
    assert_eq!(covered(Scope::Subtree), ["/r", "/r/a", "/r/a/x"]);
}

#[test]
fn limits_are_kept() {
    let limits = Limits {
        nodes: 2,
        bytes: 20,
    };
    let fill = |data: &[&str]| {
        let mut core = Core::new("/r", Scope::Children, limits);
        core.handle_missed();
        let names: Vec<String> = (1..data.len()).map(|i| i.to_string()).collect();
        while let Some(ask) = core.poll_ask() {
            let index = ask.path[2..].trim_start_matches('/').parse().unwrap_or(0);
            let data = data[index].to_owned().into();
            core.handle_answer(&ask, Some((data, Stat::default(), names.clone())));
        }
        core
    };
    let fits = fill(&["", "0123456789abcd"]);
    assert_eq!((fits.overflow(), fits.usage()), (false, (2, 20)));
    for too_much in [&["", "0123456789abcde"][..], &["", "", ""]] {
        let core = fill(too_much);
        assert!(core.overflow());
        assert_eq!(
            (core.get("/r"), core.snapshot().len()),
            (Lookup::Unknown, 0)
        );
    }
}

#[tokio::test]
async fn one_shot_watches_do_as_well() {
    let dir = std::env::temp_dir().join(format!("unbroken-cache-{}", std::process::id()));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let peers = [("a".to_owned(), free.local_addr().unwrap())].into();
    drop(free);
    let any = "127.0.0.1:0".parse().unwrap();
    let config = ServerConfig::new("a", any, peers, dir.clone(), [0; 32]);
    let server = driver::start(config).await.unwrap();
    let connect = || Client::connect(ConnectOptions::new([server.client_address().to_string()]));
    let (client, writer) = (connect().await.unwrap(), connect().await.unwrap());
    let cache = Cache::start_as(&client, "/r", Scope::Subtree, Limits::default(), true);
    cache.fresh().await.unwrap();
    assert_eq!(cache.get("/r"), Lookup::Fresh(None));
    let mut dice = Dice(7);
    for _ in 0..10 {
        for i in 0..60 {
            let path = PATHS[dice.below(PATHS.len())];
            // Many fail, as it happens.
            let _ = match dice.below(3) {
                0 => writer.delete(path, -1).await,
                1 => writer.set(path, i.to_string(), -1).await.map(drop),
                _ => writer
                    .create(path, "", CreateMode::Persistent, Acl::open())
                    .await
                    .map(drop),
            };
            // Whatever the session has read is not newer than what the cache calls fresh.
            let path = PATHS[dice.below(PATHS.len())];
            let read = client.get(path).await.ok();
            if let Lookup::Fresh(node) = cache.get(path) {
                let known = node.map_or(-1, |node| node.stat.mzxid);
                let read = read.map_or(-1, |(_, stat)| stat.mzxid);
                assert!(
                    known == -1 || known >= read,
                    "{path}: {known}, {read} was read"
                );
            }
        }
        client.sync("/").await.unwrap();
        loop {
            let held = cache.subscribe().0;
            let mut same = cache.fresh().await.is_ok();
            for path in PATHS {
                let there = client.get(path).await.ok();
                let there = there.map(|(data, stat)| (data, stat.mzxid));
                let held = held.get(path).cloned();
                same &= held.map(|node| (node.data, node.stat.mzxid)) == there;
            }
            if same {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    client.close().await.unwrap();
    server.shutdown().await;
    std::fs::remove_dir_all(dir).unwrap();
}
