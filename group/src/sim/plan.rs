//! What goes wrong in a run, and when.

use super::network::{below, chance};
use crate::rng::Rng;

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Members; 0: chosen by the seed, two to five.
    pub nodes: usize,
    /// Print what happens.
    pub trace: bool,
    /// At every input, put a core restored from a snapshot in the place of the one before, and compare what it does with
    /// one that was never restored.
    pub twins: bool,
    /// Troubles that last for seconds: members that are stopped for up to half a minute, and slow hosts, which run now and then.
    /// Not for [`super::run_groups`].
    pub long: bool,
    /// A defect to plant.
    #[cfg(any(test, feature = "faults"))]
    pub fault: Option<crate::config::Fault>,
}

#[derive(Clone, Debug)]
pub(super) enum Trouble {
    Crash(usize),
    Restart(usize),
    Pause(usize, u64),
    Cut(Vec<(usize, usize)>),
    Heal,
    Noise {
        loss: u64,
        duplicates: u64,
        reorder: u64,
    },
    RegistryOff(usize),
    RegistryOn,
    HandOver,
    Leave(usize),
    /// Aimed at whoever leads just then.
    CrashLeader,
    PauseLeader(u64),
    CutLeader,
    /// Somebody on the way ends the leader's control connections, and then perhaps lets nothing through.
    ResetLeader {
        cut: bool,
    },
    /// The leader dies while some of the others do not hear each other.
    CrashLeaderAndCut,
}

/// Microseconds at which all is healed.
const HEALED_AT: u64 = 2_500_000;
/// The same, in a long run.
const HEALED_LATE: u64 = 40_000_000;
/// A process is stopped for so long in a long run, at the least and beyond that.
const LONG_PAUSE: [u64; 2] = [100_000, 29_900_000];

impl Options {
    /// Microseconds at which all is healed.
    pub(super) fn healed_at(&self) -> u64 {
        if self.long { HEALED_LATE } else { HEALED_AT }
    }

    /// What goes wrong, and when.
    pub(super) fn draw(&self, rng: &mut Rng, nodes: usize) -> Vec<(u64, Trouble)> {
        let mut plan = draw(rng, nodes);
        if self.long {
            draw_long(rng, nodes, &mut plan);
        }
        plan
    }
}

/// Adds what lasts for seconds.
fn draw_long(rng: &mut Rng, nodes: usize, plan: &mut Vec<(u64, Trouble)>) {
    for _ in 0..2 + below(rng, 4) {
        let mut at = 100_000 + below(rng, HEALED_LATE / 2);
        let [least, most] = LONG_PAUSE;
        // As often short as long.
        let shorter = below(rng, 8);
        let pause = least + below(rng, most >> shorter);
        let node = usize::try_from(below(rng, nodes as u64)).expect("few nodes");
        match below(rng, 4) {
            0 => plan.push((at, Trouble::Pause(node, pause))),
            1 | 2 => plan.push((at, Trouble::PauseLeader(pause))),
            _ => {
                let (end, busy) = (at + pause, 1_000 + below(rng, 40_000));
                while at < end {
                    let stopped = busy / 2 + below(rng, busy);
                    plan.push((at, Trouble::Pause(node, stopped)));
                    at += stopped + 500 + below(rng, 10_000);
                }
            }
        }
    }
}

fn draw(rng: &mut Rng, nodes: usize) -> Vec<(u64, Trouble)> {
    let mut plan = Vec::new();
    let node = |rng: &mut Rng| usize::try_from(below(rng, nodes as u64)).expect("few nodes");
    let troubles = 2 + below(rng, 7);
    for _ in 0..troubles {
        let at = 100_000 + below(rng, HEALED_AT - 200_000);
        let trouble = match below(rng, 17) {
            0 => Trouble::Crash(node(rng)),
            1 | 2 => Trouble::CrashLeader,
            3 => Trouble::Pause(node(rng), 5_000 + below(rng, 300_000)),
            4 | 5 => Trouble::PauseLeader(5_000 + below(rng, 300_000)),
            6 => Trouble::CutLeader,
            7 => {
                let one = node(rng);
                let ways = below(rng, 3);
                let mut cut = Vec::new();
                for other in (0..nodes).filter(|o| *o != one) {
                    if ways != 0 {
                        cut.push((one, other));
                    }
                    if ways != 1 {
                        cut.push((other, one));
                    }
                }
                Trouble::Cut(cut)
            }
            8 => {
                let mut cut = Vec::new();
                for a in 0..nodes {
                    for b in 0..nodes {
                        if a != b && chance(rng, 250) {
                            cut.push((a, b));
                        }
                    }
                }
                Trouble::Cut(cut)
            }
            9 => Trouble::RegistryOff(node(rng)),
            10 => Trouble::HandOver,
            12 | 13 => Trouble::ResetLeader {
                cut: chance(rng, 700),
            },
            14 | 15 => Trouble::CrashLeaderAndCut,
            11 => Trouble::Leave(node(rng)),
            _ => Trouble::Noise {
                loss: below(rng, 300),
                duplicates: below(rng, 200),
                reorder: below(rng, 300),
            },
        };
        match &trouble {
            Trouble::Crash(n) => {
                plan.push((at + below(rng, 400_000), Trouble::Restart(*n)));
            }
            Trouble::Cut(_)
            | Trouble::CutLeader
            | Trouble::ResetLeader { .. }
            | Trouble::CrashLeaderAndCut => {
                plan.push((at + 10_000 + below(rng, 500_000), Trouble::Heal));
            }
            Trouble::RegistryOff(_) => {
                plan.push((at + below(rng, 500_000), Trouble::RegistryOn));
            }
            _ => {}
        }
        plan.push((at, trouble));
    }
    if chance(rng, 100) {
        let at = 500_000 + below(rng, 1_000_000);
        for n in 0..nodes {
            plan.push((at + below(rng, 30_000), Trouble::Crash(n)));
            plan.push((at + 30_000 + below(rng, 200_000), Trouble::Restart(n)));
        }
    }
    plan
}
