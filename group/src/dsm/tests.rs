//! The cores of several processes, without a network that could fail them, then with one.

use super::consistency::Fault;
use super::sim::{Plain, Plan, World};
use super::*;
use crate::rng::Rng;
use crate::view::MemberId;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;

const REGION: usize = 8192;

fn run(plan: &Plan) -> Result<super::sim::Seen, String> {
    World::new(plan.clone(), REGION, || Plain::new(REGION)).run()
}

#[test]
fn counters_are_exact_whatever_the_network_does() {
    let mut all = super::sim::Seen::default();
    for seed in 0..400 {
        let plan = Plan::new(seed);
        let seen = run(&plan).unwrap_or_else(|e| panic!("{plan:?}: {e}"));
        all.sections += seen.sections;
        all.barriers += seen.barriers;
        all.departures += seen.departures;
        all.joins += seen.joins;
        all.lost += seen.lost;
        all.abandoned += seen.abandoned;
        all.parts += seen.parts;
        all.donors += seen.donors;
    }
    println!("{all:?}");
    // The runs met what they are for.
    assert!(
        all.sections > 10_000 && all.barriers > 1000 && all.departures > 200,
        "{all:?}"
    );
    assert!(
        all.joins > 100 && all.lost > 50 && all.abandoned > 50 && all.parts > 500 && all.donors > 2,
        "{all:?}"
    );
}

#[test]
fn a_seed_is_one_run() {
    for seed in 0..5 {
        assert_eq!(run(&Plan::new(seed)), run(&Plan::new(seed)));
    }
}

/// Each of these breaks what the test above asserts, in some run: so that is what it is asserted of.
#[test]
fn the_simulation_finds_planted_defects() {
    for fault in [
        Fault::GrantWithoutUpdates,
        Fault::ApplyAsTheyCome,
        Fault::PathOfOneMember,
        Fault::KeepOrphans,
        Fault::PassWithoutUpdates,
        Fault::ApplyParts,
        Fault::KeepLockOfDeparted,
        Fault::SnapshotWithoutLocks,
        Fault::CopiedIsDelivered,
        Fault::ApplyCopiedAgain,
    ] {
        let found = (0..2000).find_map(|seed| {
            let plan = Plan {
                fault: Some(fault),
                ..Plan::new(seed)
            };
            run(&plan).err().map(|e| (seed, e))
        });
        println!("{fault:?}: {found:?}");
        assert!(found.is_some(), "{fault:?}");
    }
}

#[test]
fn real_pages_under_the_same_network() {
    for seed in 1000..1020 {
        let plan = Plan::new(seed);
        World::new(plan.clone(), REGION, || Pages::new(REGION).unwrap())
            .run()
            .unwrap_or_else(|e| panic!("{plan:?}: {e}"));
    }
}

fn name(n: u8) -> MemberId {
    MemberId::new(format!("m{n}"), u128::from(n))
}

fn low_byte(n: usize) -> u8 {
    n.to_le_bytes()[0]
}

fn view(members: &[u8]) -> Vec<MemberId> {
    members.iter().copied().map(name).collect()
}

fn cores(n: u8) -> Vec<DsmCore> {
    let members: Vec<_> = (0..n).map(name).collect();
    let core = |m: &MemberId| DsmCore::new(Config::new(REGION as u64), m.clone(), &members);
    members.iter().map(core).collect()
}

fn diff(offset: u64, bytes: &[u8]) -> Diff {
    Diff {
        offset,
        bytes: Bytes::copy_from_slice(bytes),
    }
}

fn drain(core: &mut DsmCore) -> Vec<Output> {
    std::iter::from_fn(|| core.poll_output()).collect()
}

fn granted(lock: u32, abandoned: bool) -> Output {
    Output::Granted {
        lock: LockId(lock),
        abandoned,
    }
}

/// The only thing that a core asks for: an ordered message.
fn abcast(core: &mut DsmCore) -> Bytes {
    match &drain(core)[..] {
        [Output::Abcast(bytes)] => bytes.clone(),
        other => panic!("{other:?}"),
    }
}

/// What a release or an arrival asks for: updates, then an ordered message.
fn sent(core: &mut DsmCore) -> (Vec<Bytes>, Bytes) {
    let mut outputs = drain(core);
    let Some(Output::Abcast(ordered)) = outputs.pop() else {
        panic!("the ordered message comes last");
    };
    let update = |o| match o {
        Output::Fbcast(bytes) => bytes,
        other => panic!("{other:?}"),
    };
    (outputs.into_iter().map(update).collect(), ordered)
}

/// Member `n` asks for a lock, and all hear of it.
fn request(cores: &mut [DsmCore], n: u8, lock: u32) {
    let core = &mut cores[usize::from(n)];
    core.handle_local_acquire(LockId(lock)).unwrap();
    let bytes = abcast(core);
    for core in cores {
        core.handle_ordered(&name(n), &bytes);
    }
}

/// Member `n` takes a free lock, writes, and releases: what it sends. Nobody but itself has had the release.
fn write_under(cores: &mut [DsmCore], n: u8, lock: u32, diffs: Vec<Diff>) -> (Bytes, Bytes) {
    request(cores, n, lock);
    let core = &mut cores[usize::from(n)];
    assert_eq!(drain(core), [granted(lock, false)]);
    core.handle_local_release(LockId(lock), diffs).unwrap();
    let (updates, release) = sent(core);
    core.handle_ordered(&name(n), &release);
    assert_eq!(updates.len(), 1);
    (updates[0].clone(), release)
}

#[test]
fn the_next_holder_waits_for_the_path_of_the_lock() {
    let mut cores = cores(2);
    let (update, release) = write_under(&mut cores, 0, 1, vec![diff(5, b"x")]);
    request(&mut cores, 1, 1);
    cores[1].handle_ordered(&name(0), &release);
    assert_eq!(
        drain(&mut cores[1]),
        [],
        "its turn, but the update is missing"
    );
    cores[1].handle_update(&name(0), &update);
    let expected = [Output::Apply(diff(5, b"x")), granted(1, false)];
    assert_eq!(drain(&mut cores[1]), expected);
}

/// FIFO is per sender: who takes no part in the lock must still not apply the newer value first.
#[test]
fn an_update_waits_for_those_it_depends_on_everywhere() {
    let mut cores = cores(3);
    let (first, release) = write_under(&mut cores, 0, 1, vec![diff(5, b"old")]);
    cores[1].handle_update(&name(0), &first);
    for core in &mut cores[1..] {
        core.handle_ordered(&name(0), &release);
    }
    assert_eq!(drain(&mut cores[1]).len(), 1);
    let (second, _) = write_under(&mut cores, 1, 1, vec![diff(5, b"new")]);
    cores[2].handle_update(&name(1), &second);
    assert_eq!(drain(&mut cores[2]), []);
    cores[2].handle_update(&name(0), &first);
    let both = [
        Output::Apply(diff(5, b"old")),
        Output::Apply(diff(5, b"new")),
    ];
    assert_eq!(drain(&mut cores[2]), both);
}

/// Member 1 saw an update of member 0 that no survivor has had, and both depart.
#[test]
fn what_depended_on_a_lost_update_is_lost_with_it() {
    for fault in [None, Some(Fault::KeepOrphans)] {
        let mut cores = cores(4);
        for core in &mut cores {
            core.fault = fault;
        }
        let (first, release) = write_under(&mut cores, 0, 1, vec![diff(5, b"lost")]);
        cores[1].handle_update(&name(0), &first);
        for core in &mut cores[1..] {
            core.handle_ordered(&name(0), &release);
        }
        assert_eq!(drain(&mut cores[1]).len(), 1);
        let (second, release) = write_under(&mut cores, 1, 1, vec![diff(9, b"orphan")]);
        request(&mut cores, 2, 1);
        for core in &mut cores[2..] {
            core.handle_update(&name(1), &second);
            core.handle_ordered(&name(1), &release);
            assert_eq!(drain(core), []);
            core.handle_view(&view(&[2, 3]));
        }
        match fault {
            // The lock passes on, and says that something is missing.
            None => {
                assert_eq!(drain(&mut cores[2]), [granted(1, true)]);
                assert_eq!(drain(&mut cores[3]), []);
            }
            _ => assert_eq!(drain(&mut cores[3]), [Output::Apply(diff(9, b"orphan"))]),
        }
    }
}

#[test]
fn a_departed_holders_lock_passes_on_and_the_next_release_mends_it() {
    let mut cores = cores(3);
    for n in 0..3 {
        request(&mut cores, n, 7);
    }
    assert_eq!(drain(&mut cores[0]), [granted(7, false)]);
    for core in &mut cores[1..] {
        core.handle_view(&view(&[1, 2]));
    }
    assert_eq!(drain(&mut cores[1]), [granted(7, true)]);
    cores[1].handle_local_release(LockId(7), vec![]).unwrap();
    let release = abcast(&mut cores[1]);
    cores[2].handle_ordered(&name(1), &release);
    assert_eq!(drain(&mut cores[2]), [granted(7, false)]);
    cores[0].handle_view(&view(&[1, 2]));
    assert_eq!(drain(&mut cores[0]), [Output::Failed(Failure::Excluded)]);
    let refused = cores[0].handle_local_release(LockId(7), vec![]);
    assert_eq!(refused, Err(CommandError::Failed));
}

#[test]
fn a_barrier_is_passed_when_all_have_come_and_their_updates_too() {
    let mut cores = cores(3);
    let barrier = BarrierId(2);
    let mut all = Vec::new();
    for n in 0..3_u8 {
        let core = &mut cores[usize::from(n)];
        core.handle_local_barrier(barrier, vec![diff(u64::from(n), &[n + 1])])
            .unwrap();
        assert_eq!(
            core.handle_local_barrier(barrier, vec![]),
            Err(CommandError::Busy)
        );
        all.push(sent(core));
    }
    for (n, (_, arrive)) in (0..).zip(&all) {
        cores[0].handle_ordered(&name(n), arrive);
    }
    cores[0].handle_update(&name(2), &all[2].0[0]);
    assert_eq!(drain(&mut cores[0]), [Output::Apply(diff(2, &[3]))]);
    cores[0].handle_update(&name(1), &all[1].0[0]);
    let passed = |who: &[u8]| Output::Passed {
        barrier,
        members: view(who),
    };
    let expected = [Output::Apply(diff(1, &[2])), passed(&[0, 1, 2])];
    assert_eq!(drain(&mut cores[0]), expected);
    // Who departs is not waited for.
    cores[1].handle_ordered(&name(0), &all[0].1);
    cores[1].handle_update(&name(0), &all[0].0[0]);
    cores[1].handle_ordered(&name(1), &all[1].1);
    assert_eq!(drain(&mut cores[1]).len(), 1);
    cores[1].handle_view(&view(&[0, 1]));
    assert_eq!(drain(&mut cores[1]), [passed(&[0, 1])]);
}

#[test]
fn a_large_release_goes_in_parts_and_is_applied_in_one() {
    let mut cores = cores(2);
    request(&mut cores, 0, 0);
    assert_eq!(drain(&mut cores[0]), [granted(0, false)]);
    cores[0].config_mut().update_bytes_max = 64;
    let bytes: Vec<u8> = (0..200).collect();
    cores[0]
        .handle_local_release(LockId(0), vec![diff(10, &bytes), diff(1000, b"end")])
        .unwrap();
    let (parts, _) = sent(&mut cores[0]);
    assert!(parts.len() > 3);
    let (last, first) = parts.split_last().unwrap();
    for part in first {
        assert!(part.len() <= 64 + 16);
        cores[1].handle_update(&name(0), part);
        assert_eq!(drain(&mut cores[1]), []);
    }
    cores[1].handle_update(&name(0), last);
    let mut seen = vec![0; 2000];
    for output in drain(&mut cores[1]) {
        let Output::Apply(d) = output else {
            panic!("{output:?}");
        };
        seen[usize::try_from(d.offset).unwrap()..][..d.bytes.len()].copy_from_slice(&d.bytes);
    }
    assert_eq!(seen[10..210], bytes);
    assert_eq!(seen[1000..1003], *b"end");
    assert_eq!(cores[1].applied(&name(0)), parts.len() as u64);
}

#[test]
fn misuse_is_refused() {
    let mut core = cores(2).remove(0);
    let end = REGION as u64;
    assert_eq!(
        core.handle_local_acquire(LockId(1024)),
        Err(CommandError::Unknown)
    );
    assert_eq!(
        core.handle_local_release(LockId(1), vec![diff(end - 1, b"ab")]),
        Err(CommandError::OutOfRange)
    );
    assert_eq!(drain(&mut core), []);
    assert_eq!(
        core.handle_local_release(LockId(1), vec![diff(end - 2, b"ab")]),
        Err(CommandError::NotHeld)
    );
    assert!(matches!(&drain(&mut core)[..], [Output::Fbcast(_)]));
    core.handle_local_acquire(LockId(1)).unwrap();
    assert_eq!(
        core.handle_local_acquire(LockId(1)),
        Err(CommandError::Busy)
    );
}

#[test]
fn a_gap_damage_and_a_flood_end_in_failure_once() {
    let flood = |cores: &mut Vec<DsmCore>, count: usize| -> Vec<Bytes> {
        (0..count)
            .map(|n| {
                let diffs = vec![diff(0, &[low_byte(n); 100])];
                write_under(cores, 0, u32::try_from(n).unwrap(), diffs).0
            })
            .collect()
    };
    let mut three = cores(3);
    let updates = flood(&mut three, 3);
    three[1].handle_update(&name(0), &updates[0]);
    three[1].handle_update(&name(0), &updates[0]);
    assert_eq!(drain(&mut three[1]).len(), 1, "a repetition is none");
    three[1].handle_update(&name(0), &updates[2]);
    three[1].handle_update(&name(0), &updates[1]);
    let member = name(0);
    let expected = 2;
    let failure = Failure::Update { member, expected };
    assert_eq!(drain(&mut three[1]), [Output::Failed(failure)]);

    let member = name(0);
    let expected = 1;
    let failure = Failure::Update { member, expected };
    three[2].handle_update(&name(9), b"nobody");
    assert_eq!((drain(&mut three[2]), three[2].ignored()), (vec![], 1));
    three[2].handle_update(&name(0), b"\x01damage");
    assert_eq!(drain(&mut three[2]), [Output::Failed(failure)]);

    // Updates that wait for one of another member that does not come.
    let mut three = cores(3);
    let (first, release) = write_under(&mut three, 1, 900, vec![diff(0, b"x")]);
    three[0].handle_update(&name(1), &first);
    for n in [0, 2] {
        three[n].handle_ordered(&name(1), &release);
    }
    assert_eq!(drain(&mut three[0]).len(), 1);
    let mut updates = vec![write_under(&mut three, 0, 900, vec![diff(0, b"y")]).0];
    updates.extend(flood(&mut three, 20));
    three[2].config_mut().held_bytes_max = 1000;
    for update in &updates {
        three[2].handle_update(&name(0), update);
    }
    let member = name(0);
    assert_eq!(
        drain(&mut three[2]),
        [Output::Failed(Failure::Held { member })]
    );
}

/// One update always waits, never the same: what was applied no longer counts.
#[test]
fn a_queue_that_never_empties_is_no_flood() {
    let mut cores = cores(3);
    cores[2].config_mut().held_bytes_max = 1000;
    let mut late = None;
    for round in 0..40 {
        let (before, release) = write_under(&mut cores, 0, 1, vec![diff(0, &[round; 60])]);
        cores[1].handle_update(&name(0), &before);
        for core in &mut cores[1..] {
            core.handle_ordered(&name(0), &release);
        }
        drain(&mut cores[1]);
        let (after, release) = write_under(&mut cores, 1, 1, vec![diff(100, &[round; 60])]);
        cores[0].handle_update(&name(1), &after);
        for n in [0, 2] {
            cores[n].handle_ordered(&name(1), &release);
        }
        drain(&mut cores[0]);
        cores[2].handle_update(&name(1), &after);
        if let Some(late) = late.replace(before) {
            cores[2].handle_update(&name(0), &late);
            assert_eq!(drain(&mut cores[2]).len(), 2, "round {round}");
        }
    }
}

/// Whatever comes, no core panics, and none keeps more than it says.
#[test]
fn garbage_neither_panics_nor_piles_up() {
    let mut rng = Rng::new(1);
    let mut below = move |n: usize| usize::try_from(rng.next_u64() % n as u64).unwrap();
    let mut valid = cores(3);
    let (update, release) = write_under(&mut valid, 0, 1, vec![diff(5, b"abc"), diff(90, b"d")]);
    valid[1].handle_local_barrier(BarrierId(0), vec![]).unwrap();
    let arrive = abcast(&mut valid[1]);
    valid[2].handle_update(&name(0), &update);
    let image = valid[2].snapshot(vec![diff(5, b"abc")]).unwrap();
    let mut restored = 0;
    for _ in 0..20_000 {
        let mut core = cores(3).remove(1);
        let mut mutated = [&update, &release, &arrive][below(3)].to_vec();
        for _ in 0..1 + below(4) {
            let at = below(mutated.len());
            match below(3) {
                0 => mutated[at] = low_byte(below(256)),
                1 => mutated.insert(at, [0, 1, 0x80, 0xff][below(4)]),
                _ => mutated.truncate(at.max(1)),
            }
        }
        core.handle_ordered(&name(0), &mutated);
        core.handle_update(&name(0), &mutated);
        core.handle_view(&view(&[1, 2]));
        drain(&mut core);

        let mut mutated = image.clone();
        let end = mutated.len() - 4;
        let at = 4 + below(end - 4);
        mutated[at] = [0, 1, 0x80, 0xff, low_byte(below(256))][below(5)];
        let sum = crc32c::crc32c(&mutated[..end]);
        mutated[end..].copy_from_slice(&sum.to_le_bytes());
        let config = Config::new(REGION as u64);
        if let Ok((mut core, _)) = DsmCore::restore(&mutated, name(1), config) {
            restored += 1;
            core.handle_ordered(&name(0), &release);
            core.handle_update(&name(0), &update);
            core.handle_view(&view(&[1, 2, 5]));
            drain(&mut core);
        }
    }
    assert!(restored > 100, "{restored}");
}

#[test]
fn a_damaged_or_foreign_copy_is_refused() {
    let mut both = cores(2);
    let image = both[0].snapshot(vec![]).unwrap();
    let config = Config::new(REGION as u64);
    let restore = |image: &[u8], config: &Config| {
        DsmCore::restore(image, name(1), config.clone())
            .map(|_| ())
            .unwrap_err()
    };
    assert!(DsmCore::restore(&image, name(1), config.clone()).is_ok());
    assert_eq!(restore(b"", &config), SnapshotError::Magic);
    assert_eq!(restore(b"UBM", &config), SnapshotError::Damaged);
    assert_eq!(restore(b"UBM\x01", &config), SnapshotError::Damaged);
    assert_eq!(restore(b"UBM\x02", &config), SnapshotError::Version(2));
    for n in 4..image.len() {
        let mut damaged = image.clone();
        damaged[n] ^= 4;
        assert_eq!(restore(&damaged, &config), SnapshotError::Damaged);
        assert_eq!(restore(&image[..n], &config), SnapshotError::Damaged);
    }
    assert_eq!(restore(&image, &Config::new(4096)), SnapshotError::Config);
    let other = DsmCore::restore(&image, name(5), config.clone()).map(|_| ());
    assert_eq!(other, Err(SnapshotError::NotForUs));
    both[0].handle_view(&view(&[1]));
    assert_eq!(both[0].snapshot(vec![]), Err(SnapshotError::Failed));
}

/// Two processes in one: each a region, a core, and threads; a network between them.
struct Two {
    cores: Vec<DsmCore>,
    /// Updates on their way to each.
    updates: [VecDeque<Bytes>; 2],
    unordered: [VecDeque<Bytes>; 2],
    ordered: Vec<(usize, Bytes)>,
    position: [usize; 2],
    granted: [BTreeSet<LockId>; 2],
    passed: [bool; 2],
    rng: Rng,
}

impl Two {
    fn drain(&mut self, n: usize, regions: &[Pages; 2]) {
        while let Some(output) = self.cores[n].poll_output() {
            match output {
                Output::Fbcast(bytes) => self.updates[1 - n].push_back(bytes),
                Output::Abcast(bytes) => self.unordered[n].push_back(bytes),
                Output::Apply(diff) => regions[n].apply(&diff).unwrap(),
                Output::Granted { lock, .. } => assert!(self.granted[n].insert(lock)),
                Output::Passed { .. } => self.passed[n] = true,
                Output::Failed(failure) => panic!("{failure}"),
            }
        }
    }

    /// The network does one thing, if it has one to do.
    fn pump(&mut self, regions: &[Pages; 2]) {
        let n = usize::from(self.rng.next_u64().is_multiple_of(2));
        let from = [name(0), name(1)];
        match self.rng.next_u64() % 4 {
            0 => {
                if let Some(bytes) = self.updates[n].pop_front() {
                    self.cores[n].handle_update(&from[1 - n], &bytes);
                }
            }
            1 => {
                if let Some(bytes) = self.unordered[n].pop_front() {
                    self.ordered.push((n, bytes));
                }
            }
            _ => {
                if let Some((sender, bytes)) = self.ordered.get(self.position[n]) {
                    self.position[n] += 1;
                    self.cores[n].handle_ordered(&from[*sender], bytes);
                }
            }
        }
        self.drain(n, regions);
    }
}

/// Pumps the network until something has come true.
fn until(two: &Mutex<Two>, regions: &[Pages; 2], mut done: impl FnMut(&mut Two) -> bool) {
    loop {
        let mut two = two.lock().unwrap();
        if done(&mut two) {
            return;
        }
        two.pump(regions);
        drop(two);
        std::thread::yield_now();
    }
}

#[test]
fn threads_of_two_processes_count_on_real_pages() {
    const LOCKS: u32 = 3;
    const ROUNDS: u64 = 150;
    let regions = [Pages::new(REGION).unwrap(), Pages::new(REGION).unwrap()];
    let two = Mutex::new(Two {
        cores: cores(2),
        updates: Default::default(),
        unordered: Default::default(),
        ordered: Vec::new(),
        position: [0; 2],
        granted: Default::default(),
        passed: [false; 2],
        rng: Rng::new(3),
    });
    // A counter for each lock, one of them on two pages.
    let counter = |lock: u32| 4096 - 12 + lock as usize * 8;
    // Threads of one process agree among themselves first.
    let local: [[Mutex<()>; LOCKS as usize]; 2] = Default::default();
    std::thread::scope(|scope| {
        for thread in 0..6_u64 {
            let (two, regions, local) = (&two, &regions, &local);
            scope.spawn(move || {
                let n = usize::from(thread.is_multiple_of(2));
                let region = &regions[n];
                let mut rng = Rng::new(thread);
                for _ in 0..ROUNDS {
                    let lock = u32::try_from(rng.next_u64() % u64::from(LOCKS)).unwrap();
                    let _mine = local[n][lock as usize].lock().unwrap();
                    {
                        let mut two = two.lock().unwrap();
                        two.cores[n].handle_local_acquire(LockId(lock)).unwrap();
                        two.drain(n, regions);
                    }
                    until(two, regions, |two| two.granted[n].remove(&LockId(lock)));
                    let mut bytes = [0; 8];
                    region.read(counter(lock), &mut bytes);
                    let count = u64::from_le_bytes(bytes) + 1;
                    std::thread::yield_now();
                    region.write(counter(lock), &count.to_le_bytes());
                    // A thing without a lock, its own: other threads write next to it.
                    region.write(usize::try_from(thread).unwrap(), &count.to_le_bytes()[..1]);
                    let mut two = two.lock().unwrap();
                    // In one step: another thread's release must not overtake what is collected here.
                    let diffs = region.collect();
                    two.cores[n]
                        .handle_local_release(LockId(lock), diffs)
                        .unwrap();
                    two.drain(n, regions);
                }
            });
        }
    });
    for (n, region) in regions.iter().enumerate() {
        let mut two = two.lock().unwrap();
        two.cores[n]
            .handle_local_barrier(BarrierId(0), region.collect())
            .unwrap();
        two.drain(n, &regions);
    }
    until(&two, &regions, |two| two.passed == [true; 2]);
    let all = regions.each_ref().map(|region| {
        let mut bytes = vec![0; REGION];
        region.read(0, &mut bytes);
        bytes
    });
    assert!(all[0] == all[1]);
    let count = |lock| u64::from_le_bytes(all[0][counter(lock)..][..8].try_into().unwrap());
    assert_eq!((0..LOCKS).map(count).sum::<u64>(), 6 * ROUNDS);
}
