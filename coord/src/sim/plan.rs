//! What a seed makes of a run: how many servers, and which faults how often. Each run has some kinds
//! of fault and not others, so that one does not hide what another would show.

use super::random::Random;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A process is killed; the system lives on, and with it what was written and not synced.
    Kill,
    /// A machine loses its power.
    PowerFailure,
    /// Most or all machines do.
    Blackout,
    /// A machine loses its power between two things that its core wanted done.
    StopInOutput,
    /// A process stands still, and its timers with it.
    Pause,
    /// One server hears nobody, or nobody hears it.
    CutOneWay,
    /// One server is alone.
    Isolate,
    /// The servers fall into two halves.
    Split,
    /// Messages are lost.
    Loss,
    /// A disk answers late.
    SlowDisk,
    /// A sync fails.
    SyncError,
    /// A disk is full.
    FullDisk,
    /// What lies on a disk is damaged, and its machine starts again.
    Damage,
    /// A wall clock is set.
    WallClock,
    /// A leader is asked to hand over.
    Transfer,
    /// The network heals.
    Heal,
}

const ALL: [Kind; 16] = [
    Kind::Kill,
    Kind::PowerFailure,
    Kind::Blackout,
    Kind::StopInOutput,
    Kind::Pause,
    Kind::CutOneWay,
    Kind::Isolate,
    Kind::Split,
    Kind::Loss,
    Kind::SlowDisk,
    Kind::SyncError,
    Kind::FullDisk,
    Kind::Damage,
    Kind::WallClock,
    Kind::Transfer,
    Kind::Heal,
];

/// One run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) servers: u64,
    pub(super) clients: u64,
    /// Microseconds in which things go wrong, and of the peace after them.
    pub(super) storm_us: u64,
    pub(super) peace_us: u64,
    /// Microseconds between two faults at most.
    pub(super) fault_every_us: u64,
    pub(super) faults: Vec<Kind>,
    /// Clocks of servers run at rates that differ by so many millionths at most.
    pub(super) skew_ppm: u64,
    /// Messages between two servers come in their order.
    pub(super) in_order: bool,
    /// Of a hundred messages come twice.
    pub(super) twice_percent: u64,
    pub(super) snapshot_every: u64,
    pub(super) entries_kept: u64,
    /// Microseconds between two requests of a client at most.
    pub(super) client_every_us: u64,
}

impl Plan {
    pub(super) fn of(random: &mut Random) -> Self {
        let mut faults: Vec<Kind> = ALL.into_iter().filter(|_| random.percent(40)).collect();
        if faults.is_empty() {
            faults.push(*random.pick(&ALL));
        }
        let cuts = |kind: &Kind| {
            matches!(
                kind,
                Kind::CutOneWay | Kind::Isolate | Kind::Split | Kind::Loss
            )
        };
        // What is never healed leaves nothing to be seen.
        let heals = faults.iter().filter(|kind| cuts(kind)).count();
        faults.extend(std::iter::repeat_n(Kind::Heal, heals));
        Self {
            servers: if random.percent(30) { 5 } else { 3 },
            clients: 2 + random.below(4),
            storm_us: 1_500_000 + random.below(2_500_000),
            peace_us: 2_500_000,
            fault_every_us: *random.pick(&[60_000, 200_000, 500_000]),
            faults,
            skew_ppm: *random.pick(&[0, 1000, 50_000]),
            in_order: random.percent(60),
            twice_percent: *random.pick(&[0, 0, 5]),
            snapshot_every: *random.pick(&[15, 60, 1000]),
            entries_kept: *random.pick(&[0, 20]),
            client_every_us: *random.pick(&[8_000, 20_000, 60_000]),
        }
    }
}
