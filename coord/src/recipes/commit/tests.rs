//! Every order of steps, delays and crashes that two participants, a coordinator and the rules allow.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::rules::{
    Duty, Journal, Outcome, Phase, Protocol, Vote, coordinate, participate, recover,
};

const NAMES: [&str; 2] = ["p", "q"];

/// What a participant has decided to do and not done yet: time passes between reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Intent {
    None,
    Vote(Vote),
    Acknowledge,
    /// Its own effect is there, and not yet recorded.
    Record(Outcome),
    Move(Phase, i32),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct World {
    journal: Journal,
    /// What the coordinator is about to write; `None` where it has crashed.
    coordinator: Option<Option<(Phase, i32)>>,
    intents: [Intent; 2],
    /// What each participant has done in its own world.
    effects: [BTreeSet<Outcome>; 2],
    crashes_left: u8,
}

impl World {
    fn new(protocol: Protocol) -> Self {
        Self {
            journal: Journal {
                protocol,
                participants: NAMES.map(str::to_owned).into(),
                phase: Phase::Preparing,
                version: 0,
                votes: BTreeMap::new(),
                acks: BTreeSet::new(),
                done: BTreeSet::new(),
                coordinator: true,
            },
            coordinator: Some(None),
            intents: [Intent::None; 2],
            effects: Default::default(),
            crashes_left: 3,
        }
    }

    /// Compare-and-set, as the coordinator of all this does it.
    fn move_to(&mut self, phase: Phase, version: i32) {
        if self.journal.version == version {
            self.journal.phase = phase;
            self.journal.version += 1;
        }
    }

    /// What the coordinator can do.
    fn coordinator_steps(&self) -> Vec<Self> {
        let Some(intent) = self.coordinator else {
            return Vec::new();
        };
        let mut next = Vec::new();
        if let Some((phase, version)) = intent {
            let mut world = self.clone();
            world.coordinator = Some(None);
            world.move_to(phase, version);
            next.push(world);
        } else {
            for out_of_patience in [false, true] {
                if let Some(phase) = coordinate(&self.journal, out_of_patience) {
                    let mut world = self.clone();
                    world.coordinator = Some(Some((phase, self.journal.version)));
                    next.push(world);
                }
            }
        }
        next
    }

    /// What participant `i` can do.
    fn participant_steps(&self, i: usize) -> Vec<Self> {
        let me = NAMES[i];
        let with = |intent| {
            let mut world = self.clone();
            world.intents[i] = intent;
            world
        };
        let mut world = with(Intent::None);
        match self.intents[i] {
            Intent::None => {}
            Intent::Vote(vote) => {
                // On condition that the phase is the first.
                if self.journal.version == 0 {
                    world.journal.votes.entry(me.into()).or_insert(vote);
                }
                return vec![world];
            }
            Intent::Acknowledge => {
                world.journal.acks.insert(me.into());
                return vec![world];
            }
            Intent::Record(outcome) => {
                assert_eq!(self.journal.outcome(), Some(outcome));
                world.journal.done.insert(me.into());
                return vec![world];
            }
            Intent::Move(phase, version) => {
                world.move_to(phase, version);
                return vec![world];
            }
        }
        let mut next: Vec<Self> = match participate(&self.journal, me) {
            Duty::Prepare => [Vote::Yes, Vote::No]
                .map(|vote| with(Intent::Vote(vote)))
                .into(),
            Duty::Acknowledge => vec![with(Intent::Acknowledge)],
            Duty::Apply(outcome) => {
                let mut world = with(Intent::Record(outcome));
                world.effects[i].insert(outcome);
                vec![world]
            }
            Duty::Wait | Duty::Leave => Vec::new(),
        };
        for out_of_patience in [false, true] {
            if let Some(phase) = recover(&self.journal, out_of_patience) {
                next.push(with(Intent::Move(phase, self.journal.version)));
            }
        }
        next
    }

    /// What can befall them.
    fn accidents(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let mut crashed = self.clone();
        if self.journal.coordinator {
            // Its session is gone; a coordinator that does not know yet goes on.
            let mut world = self.clone();
            world.journal.coordinator = false;
            next.push(world);
        }
        if self.crashes_left == 0 {
            return next;
        }
        crashed.crashes_left -= 1;
        if self.coordinator.is_some() {
            let mut world = crashed.clone();
            world.coordinator = None;
            next.push(world);
        }
        for i in 0..2 {
            if self.intents[i] != Intent::None {
                // It forgets what it was about to do, and starts again by reading.
                let mut world = crashed.clone();
                world.intents[i] = Intent::None;
                next.push(world);
            }
        }
        next
    }

    fn steps(&self) -> Vec<Self> {
        let mut next = self.coordinator_steps();
        next.extend(self.participant_steps(0));
        next.extend(self.participant_steps(1));
        next.extend(self.accidents());
        next
    }

    fn check(&self) {
        let journal = &self.journal;
        if journal.outcome() == Some(Outcome::Committed) {
            let yes = NAMES
                .iter()
                .all(|name| journal.votes.get(*name) == Some(&Vote::Yes));
            assert!(yes, "committed without everyone's yes: {self:?}");
        }
        for (name, effects) in NAMES.iter().zip(&self.effects) {
            assert!(effects.len() <= 1, "{name} did both: {self:?}");
            assert_eq!(
                effects.first().copied(),
                journal.outcome().filter(|_| !effects.is_empty()),
                "{name} did what was not decided: {self:?}"
            );
            if journal.done.contains(*name) {
                assert_eq!(effects.first().copied(), journal.outcome());
            }
        }
        if journal.protocol == Protocol::TwoPhase {
            assert_ne!(journal.phase, Phase::PreCommitted);
        }
    }

    fn finished(&self) -> bool {
        self.journal.outcome().is_some() && self.journal.done.len() == 2
    }
}

fn check_step(before: &World, after: &World) {
    let (before, after) = (&before.journal, &after.journal);
    if let Some(outcome) = before.outcome() {
        assert_eq!(after.outcome(), Some(outcome), "a decision was changed");
    }
    if before.phase == Phase::PreCommitted {
        assert_ne!(
            after.outcome(),
            Some(Outcome::Aborted),
            "what all had agreed to"
        );
    }
    assert!(after.votes.len() >= before.votes.len());
    for (name, vote) in &before.votes {
        assert_eq!(after.votes.get(name), Some(vote), "a vote was changed");
    }
}

fn reachable(protocol: Protocol) -> BTreeSet<World> {
    let mut seen = BTreeSet::new();
    let mut queue = VecDeque::from([World::new(protocol)]);
    while let Some(world) = queue.pop_front() {
        if seen.contains(&world) {
            continue;
        }
        world.check();
        for next in world.steps() {
            check_step(&world, &next);
            if !seen.contains(&next) {
                queue.push_back(next);
            }
        }
        seen.insert(world);
    }
    seen
}

/// Those of `worlds` from which `steps` alone can lead to the end.
fn can_finish(worlds: &BTreeSet<World>, steps: impl Fn(&World) -> Vec<World>) -> BTreeSet<&World> {
    let mut before: BTreeMap<&World, Vec<&World>> = BTreeMap::new();
    for world in worlds {
        for next in steps(world) {
            let next = worlds.get(&next).expect("reachable");
            before.entry(next).or_default().push(world);
        }
    }
    let mut queue: Vec<&World> = worlds.iter().filter(|world| world.finished()).collect();
    let mut good: BTreeSet<&World> = queue.iter().copied().collect();
    while let Some(world) = queue.pop() {
        for world in before.get(world).into_iter().flatten() {
            if good.insert(world) {
                queue.push(world);
            }
        }
    }
    good
}

#[test]
fn all_orders_agree_and_can_finish() {
    for protocol in [Protocol::TwoPhase, Protocol::ThreePhase] {
        let worlds = reachable(protocol);
        assert!(worlds.len() > 1000, "{} states", worlds.len());
        for outcome in [Outcome::Committed, Outcome::Aborted] {
            let reached = |world: &World| world.journal.outcome() == Some(outcome);
            assert!(worlds.iter().any(reached), "{outcome:?} can happen");
        }
        let good = can_finish(&worlds, World::steps);
        assert_eq!(good.len(), worlds.len(), "{protocol:?}: somebody is stuck");
    }
}

/// What tells the two protocols apart: a coordinator whose session lives and which does nothing.
#[test]
fn only_two_phases_block_on_a_coordinator_that_lives() {
    let participants = |world: &World| {
        let mut next = world.participant_steps(0);
        next.extend(world.participant_steps(1));
        next
    };
    let three = reachable(Protocol::ThreePhase);
    let good = can_finish(&three, participants);
    assert_eq!(good.len(), three.len(), "three phases go on without it");

    let two = reachable(Protocol::TwoPhase);
    let good = can_finish(&two, participants);
    for world in &two {
        // A late writer may be the one to decide still.
        let blocked = world.journal.outcome().is_none() && world.journal.coordinator;
        let moving = |intent: &Intent| matches!(intent, Intent::Move(..));
        if !world.intents.iter().any(moving) {
            assert_eq!(good.contains(world), !blocked, "{world:?}");
        }
    }
}

#[test]
fn phases_are_read_as_they_are_written() {
    for phase in [
        Phase::Preparing,
        Phase::PreCommitted,
        Phase::Decided(Outcome::Committed),
        Phase::Decided(Outcome::Aborted),
    ] {
        assert_eq!(Phase::from_bytes(phase.as_str().as_bytes()), Some(phase));
    }
    assert_eq!(Phase::from_bytes(b"maybe"), None);
}
