//! What a process may have on its way, over all its groups.

use super::lane;
use super::ledger::Begun;
use super::*;
use crate::config::Config;
use crate::wire::Item;

const GROUPS: u64 = 100;

fn site(i: u128) -> MemberId {
    MemberId::new(format!("r{i}"), i)
}

fn at(us: u64) -> Instant {
    Instant::from_micros(us)
}

/// r1 in a hundred groups with r2.
fn process(set: impl FnOnce(&mut ProcessConfig)) -> Process {
    let names = vec!["r1".into(), "r2".into()];
    let mut config = ProcessConfig::new(Config::new(1, site(1), names, 9));
    config.slow_after = None;
    set(&mut config);
    let mut p = Process::new(config, 7, at(1));
    for group in 1..=GROUPS {
        p.enter(&Begun {
            group: GroupId(group),
            name: format!("g{group}"),
            cut: None,
            gbcasts: Vec::new(),
            view: GroupView {
                id: 1,
                members: vec![site(1), site(2)],
                joined: Vec::new(),
                departed: Vec::new(),
            },
            wished: BTreeSet::new(),
            init: Some(site(1)),
            loading: BTreeMap::new(),
        });
    }
    sent(&mut p);
    p
}

fn send(p: &mut Process, group: u64, bytes: usize) -> Result<(), Refused> {
    let message = Multicast::new(Order::Fifo, vec![b'x'; bytes]);
    let group = GroupId(group);
    p.handle_command(p.now, Command::Multicast { group, message })
}

/// Of each group, the bytes of messages that go out now; and who is told of room.
fn sent(p: &mut Process) -> (BTreeMap<u64, usize>, BTreeSet<GroupId>) {
    let (mut bytes, mut rooms) = (BTreeMap::new(), BTreeSet::new());
    while let Some(output) = p.poll_output() {
        match output {
            Output::Send { bodies, .. } => {
                for body in bodies {
                    let Some((header, items)) = Header::read(&body) else {
                        continue; // the site group's own
                    };
                    for item in Reader::<Small>::over(items) {
                        if let Item::Chunk(chunk) = item {
                            *bytes.entry(header.group).or_default() += chunk.bytes.len();
                        }
                    }
                }
            }
            Output::Group {
                group,
                event: GroupEvent::Room,
            } => {
                rooms.insert(group);
            }
            _ => {}
        }
    }
    (bytes, rooms)
}

/// r2 holds all that was sent to this group.
fn acknowledge(p: &mut Process, group: u64) {
    let header = Header {
        lane: 1,
        group,
        view: 1,
        ..Header::default()
    };
    let body = lane::body(&header, &[Small::Acks(vec![(0, u64::MAX)])]);
    p.handle_datagram(p.now, &site(2), &body);
}

#[test]
fn what_is_on_its_way_is_bounded_over_all_groups_and_each_has_its_turn() {
    const EACH: usize = 20;
    const ALL: usize = 100 * EACH * 1000;
    let mut p = process(|_| {});
    for _ in 0..EACH {
        for group in 1..=GROUPS {
            send(&mut p, group, 1000).unwrap();
        }
    }
    let most = usize::try_from(p.config.total_flight_bytes_max).unwrap();
    let mut all: BTreeMap<u64, usize> = BTreeMap::new();
    let mut rounds = 0;
    loop {
        let (now, _) = sent(&mut p);
        if now.is_empty() {
            break;
        }
        let bytes: usize = now.values().sum();
        assert!(bytes <= most + 2000, "round {rounds}: {bytes}");
        // As long as there is enough, nothing of the bound is left unused.
        let left = ALL - all.values().sum::<usize>().min(ALL);
        assert!(
            bytes >= left.min(most) * 9 / 10,
            "{rounds}: {bytes} of {left}"
        );
        for (group, bytes) in &now {
            *all.entry(*group).or_default() += bytes;
        }
        for group in now.keys() {
            acknowledge(&mut p, *group);
        }
        rounds += 1;
    }
    assert_eq!(all.len() as u64, GROUPS);
    assert!(all.values().all(|bytes| *bytes >= EACH * 1000));
    assert_eq!((p.flight_bytes, p.backlog_bytes), (0, 0));
    assert!(p.counted.is_empty() && p.waiting.is_empty());
}

#[test]
fn a_group_in_which_nobody_answers_takes_no_room_from_the_others_for_long() {
    let mut p = process(|_| {});
    for _ in 0..200 {
        send(&mut p, 1, 1000).unwrap();
    }
    // What the first alone may have on its way leaves little.
    let (first, _) = sent(&mut p);
    assert_eq!(first.keys().copied().collect::<Vec<_>>(), [1]);
    for group in 2..=GROUPS {
        for _ in 0..10 {
            send(&mut p, group, 1000).unwrap();
        }
    }
    let (mut then, _) = sent(&mut p);
    assert!((then.len() as u64) < GROUPS / 2, "{}", then.len());
    for ms in 1..100 {
        for group in 2..=GROUPS {
            acknowledge(&mut p, group);
        }
        p.handle_timeout(at(1 + ms * 1000));
        for (group, bytes) in sent(&mut p).0 {
            *then.entry(group).or_default() += bytes;
        }
    }
    assert!((2..=GROUPS).all(|group| then.get(&group).is_some_and(|b| *b >= 10_000)));
    assert_eq!(
        p.flight_bytes, 0,
        "the first group's is not counted any more"
    );
    acknowledge(&mut p, 1);
    sent(&mut p);
    let image = p.snapshot(p.now);
    assert!(Process::restore(p.config.clone(), &image, p.now).is_ok());
}

/// A message larger than all that may be on its way, in many groups: each goes out in whole, in its turn.
#[test]
fn messages_larger_than_the_bound_go_out_one_by_one() {
    let mut p = process(|config| config.total_flight_bytes_max = 4096);
    for group in 1..=GROUPS {
        send(&mut p, group, 100_000).unwrap();
    }
    for turn in 1..=GROUPS {
        let (now, _) = sent(&mut p);
        assert_eq!(now.keys().copied().collect::<Vec<_>>(), [turn]);
        assert!(now[&turn] > 100_000);
        acknowledge(&mut p, turn);
    }
    assert_eq!(p.backlog_bytes, 0);
}

#[test]
fn what_waits_to_be_sent_is_bounded_over_all_groups() {
    const MOST: u64 = 1 << 20;
    let mut p = process(|config| config.total_backlog_bytes_max = MOST);
    let mut taken = 0;
    for group in 1..=GROUPS {
        let mut least = 0;
        while send(&mut p, group, 10_000).is_ok() {
            taken += 10_000;
            least += 1;
        }
        assert!(least > 0, "one that has nothing on its way may send");
        assert!(!p.room(GroupId(group), Order::Fifo));
    }
    assert!((MOST..MOST + GROUPS * 11_000).contains(&taken), "{taken}");
    let mut told = BTreeSet::new();
    while p.backlog_bytes > 0 {
        let (_, rooms) = sent(&mut p);
        told.extend(rooms);
        for group in 1..=GROUPS {
            acknowledge(&mut p, group);
        }
    }
    told.extend(sent(&mut p).1);
    assert_eq!(told.len() as u64, GROUPS, "each was refused, and is told");
}
