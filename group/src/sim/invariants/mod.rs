//! What must hold in every run. One file each; a checker counts once it has caught a planted fault (see `tests.rs`).

mod clock;
mod fifo;
mod fitness;
mod joiner_state;
mod no_ack_after_wedge;
mod one_leader_emits;
mod stable_survives;
mod view_synchrony;

use crate::output::Role;
use crate::view::MemberId;

/// Something that happened, as the checkers see it.
pub(crate) enum Observed<'a> {
    /// An event reached the application of a backup or joiner.
    Delivered { number: u64 },
    /// The promise to leave the view.
    Wedged,
    /// A view was installed. `applied` and `chain`: what the application stands at.
    Installed {
        generation: u32,
        view: u64,
        cut: u64,
        role: Role,
        survivor: bool,
        /// The full members, in rank order.
        full: &'a [MemberId],
        applied: u64,
        chain: u64,
        /// Digest of the application's state at the newest event that was ever stable, if it has it.
        chain_at: &'a dyn Fn(u64) -> Option<u64>,
    },
    /// The leader was told that an event is stable; the digest of its state there.
    Stable {
        generation: u32,
        view: u64,
        number: u64,
        chain: u64,
    },
    /// It reports from now on whether it is unfit to lead.
    Progress { unfit: bool },
    /// A datagram's body left.
    Sent { body: &'a [u8] },
    /// A checkpoint came in whole: what it says.
    Restored { applied: u64, chain: u64 },
    /// A checkpoint was given: what it says.
    Gave {
        joiner: &'a MemberId,
        applied: u64,
        chain: u64,
    },
    /// The service clock of one that may emit at this moment.
    Clock { generation: u32, clock_us: u64 },
    /// These may emit at this moment.
    Emitters(&'a [MemberId]),
}

/// One invariant.
pub(crate) trait Invariant {
    /// Takes note; an error is a violation.
    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String>;
    fn name(&self) -> &'static str;
}

/// All of them.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::<fifo::Fifo>::default(),
        Box::<fitness::Fitness>::default(),
        Box::<view_synchrony::ViewSynchrony>::default(),
        Box::<no_ack_after_wedge::NoAckAfterWedge>::default(),
        Box::<stable_survives::StableSurvives>::default(),
        Box::<one_leader_emits::OneLeaderEmits>::default(),
        Box::<clock::Clock>::default(),
        Box::<joiner_state::JoinerState>::default(),
    ]
}
