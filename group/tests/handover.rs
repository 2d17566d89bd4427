//! Who leads next: the member that was named, else the fittest, the willing and the preferred first.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Duration;
use unbroken_group::{
    CasResult, Command, CommandError, Config, Core, Instant, Lag, MemberId, Notice, Output,
    ReadResult, RegistryReply, Role,
};

/// Members over a network that loses nothing and takes no time, and a coordinator in memory.
struct Group {
    now: Instant,
    cores: BTreeMap<String, Core>,
    view: Option<(Bytes, i32)>,
    lease: i32,
    unicasts: Vec<(String, Bytes)>,
    /// What was written is read before the write's own answer comes.
    read_first: bool,
    /// What a member says as soon as it has written a view is lost.
    news_lost: bool,
    suspicions: usize,
}

impl Group {
    /// `r1` leads, the others back it.
    fn of(count: u64, prefer: Option<&str>) -> Self {
        let names: Vec<String> = (1..=count).map(|i| format!("r{i}")).collect();
        let mut group = Self {
            now: Instant::from_micros(1_000_000),
            cores: BTreeMap::new(),
            view: None,
            lease: 0,
            unicasts: Vec::new(),
            read_first: false,
            news_lost: false,
            suspicions: 0,
        };
        for (name, number) in names.iter().zip(1..) {
            let me = MemberId::new(name.clone(), u128::from(number));
            let mut config = Config::new(1, me, names.clone(), 7);
            config.prefer = prefer.map(str::to_owned);
            let mut core = Core::new(config, number, group.now);
            core.handle_command(group.now, Command::Join)
                .expect("it joins once");
            group.cores.insert(name.clone(), core);
            group.run_until(|g| g.role(name).is_some_and(|r| r != Role::Joining));
        }
        assert_eq!(group.leader(), "r1");
        group
    }

    fn role(&self, name: &str) -> Option<Role> {
        self.cores[name].role()
    }

    fn leader(&self) -> &str {
        let mut leaders = self.cores.keys().filter(|n| {
            let core = &self.cores[*n];
            core.role() == Some(Role::Leader) && core.can_multicast()
        });
        leaders.next().map_or("", String::as_str)
    }

    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..20_000 {
            if done(self) {
                return;
            }
            self.now += Duration::from_millis(1);
            for name in self.cores.keys().cloned().collect::<Vec<_>>() {
                let now = self.now;
                self.core(&name).handle_timeout(now);
                self.settle(&name);
            }
        }
        panic!("it did not come about in 20 s");
    }

    fn core(&mut self, name: &str) -> &mut Core {
        self.cores.get_mut(name).expect("a member")
    }

    fn settle(&mut self, name: &str) {
        let now = self.now;
        let mut mute = false;
        while let Some(output) = self.core(name).poll_output() {
            let me = self.cores[name].me().clone();
            match output {
                Output::Send { .. } if mute => {}
                Output::Notice(Notice::Suspected { .. }) => self.suspicions += 1,
                Output::Send { to, bodies } => {
                    for to in to.iter() {
                        let Some(core) = self.cores.get_mut(&*to.name) else {
                            continue;
                        };
                        for body in &bodies {
                            core.handle_datagram(now, &me, body);
                        }
                    }
                }
                Output::ReadView => {
                    let read = self.view.clone();
                    let read = read.map_or(ReadResult::Absent, |(value, version)| {
                        ReadResult::Value { value, version }
                    });
                    self.core(name)
                        .handle_registry(now, RegistryReply::View(read));
                }
                Output::CompareAndSet {
                    expected_version,
                    value,
                } => {
                    let have = self.view.as_ref().map(|(_, version)| *version);
                    let result = if have == expected_version {
                        let version = have.map_or(0, |v| v + 1);
                        self.view = Some((value.clone(), version));
                        mute = self.news_lost;
                        if self.read_first {
                            let read = ReadResult::Value { value, version };
                            self.core(name)
                                .handle_registry(now, RegistryReply::View(read));
                        }
                        CasResult::Written { version }
                    } else {
                        CasResult::BadVersion
                    };
                    self.core(name)
                        .handle_registry(now, RegistryReply::Cas(result));
                }
                Output::RenewLease { .. } => {
                    self.lease += 1;
                    let result = CasResult::Written {
                        version: self.lease,
                    };
                    self.core(name)
                        .handle_registry(now, RegistryReply::Renew(result));
                }
                Output::CheckpointWanted { joiner, .. } => {
                    let segments = vec![Bytes::from_static(b"state")];
                    let command = Command::Checkpoint { joiner, segments };
                    self.core(name)
                        .handle_command(now, command)
                        .expect("it was asked for");
                }
                Output::CheckpointDone => self
                    .core(name)
                    .handle_command(now, Command::ReadyToBeFull)
                    .expect("it joins"),
                Output::Unicast { from, payload } => {
                    self.unicasts.push((from.name.to_string(), payload))
                }
                _ => {}
            }
        }
    }

    fn report(&mut self, name: &str, lag: Lag) {
        self.core(name).set_progress(lag);
    }

    fn hand_over(&mut self, to: Option<&str>) -> Result<(), CommandError> {
        let now = self.now;
        let leader = self.leader().to_owned();
        let to = to.map(str::to_owned);
        self.core(&leader)
            .handle_command(now, Command::HandOver { to })
    }

    /// Lets the leader hand over, and says who leads then.
    fn next_leader(&mut self, to: Option<&str>) -> String {
        let before = self.leader().to_owned();
        self.hand_over(to).expect("there are others");
        self.run_until(|g| !g.leader().is_empty() && g.leader() != before);
        self.leader().to_owned()
    }
}

const UNFIT: Lag = Lag {
    behind_bytes: 0,
    unfit: true,
    reluctant: false,
};
const RELUCTANT: Lag = Lag {
    behind_bytes: 0,
    unfit: false,
    reluctant: true,
};

#[test]
fn the_fittest_leads_next() {
    assert_eq!(Group::of(4, None).next_leader(None), "r2");
    let mut group = Group::of(4, None);
    group.report("r2", RELUCTANT);
    assert_eq!(group.next_leader(None), "r3");
    // One that is asked not to lead is better than one that cannot.
    let mut group = Group::of(4, None);
    group.report("r2", UNFIT);
    group.report("r3", RELUCTANT);
    group.report("r4", UNFIT);
    assert_eq!(group.next_leader(None), "r3");
}

#[test]
fn the_preferred_leads_next_if_it_is_as_fit() {
    assert_eq!(Group::of(4, Some("r4")).next_leader(None), "r4");
    let mut group = Group::of(4, Some("r4"));
    group.report("r4", RELUCTANT);
    assert_eq!(group.next_leader(None), "r2");
}

#[test]
fn the_one_that_was_named_leads_next() {
    let mut group = Group::of(4, Some("r2"));
    group.report("r3", RELUCTANT);
    assert_eq!(group.next_leader(Some("r3")), "r3");
    // What was asked for holds once.
    let next = group.next_leader(None);
    assert_eq!(next, "r2");
}

#[test]
fn a_stranger_cannot_be_handed_to() {
    let mut group = Group::of(3, None);
    for nobody in ["r1", "r9"] {
        assert_eq!(
            group.hand_over(Some(nobody)),
            Err(CommandError::NoSuchMember)
        );
    }
    let mut group = Group::of(1, None);
    assert_eq!(group.hand_over(None), Err(CommandError::Alone));
}

#[test]
fn what_is_sent_to_the_leader_comes_with_its_sender() {
    let mut group = Group::of(3, None);
    let now = group.now;
    assert!(group.core("r3").send_to_leader(now, b"word"));
    group.settle("r3");
    group.settle("r1");
    let word = Bytes::from_static(b"word");
    assert_eq!(group.unicasts, [("r3".to_owned(), word)]);
    assert!(!group.core("r1").send_to_leader(now, b"to itself"));
    let long = vec![0; group.cores["r2"].unicast_bytes_max() + 1];
    assert!(!group.core("r2").send_to_leader(now, &long));
}

/// Whoever writes a view for another to lead lets it know, whichever way it learns of its own write, and again when that was lost.
#[test]
fn the_next_leader_hears_of_it_before_anybody_suspects_it() {
    for (read_first, news_lost) in [(true, false), (false, true), (true, true)] {
        let mut group = Group::of(3, None);
        group.read_first = read_first;
        group.news_lost = news_lost;
        let view = group.cores["r1"].status().view.expect("a view").id;
        group.hand_over(Some("r3")).expect("it can");
        group.run_until(|g| g.leader() == "r3");
        group.run_until(|g| g.cores.values().all(|c| c.role().is_some()));
        let after = group.cores["r3"].status().view.expect("a view");
        assert_eq!((after.id.0, after.full.len()), (view.0 + 1, 3));
        assert_eq!(group.suspicions, 0, "{read_first} {news_lost}");
    }
}
