//! What a group member is told before it starts.

use crate::view::MemberId;
use std::time::Duration;

/// How many backups must hold an event before anything that depends on it may be shown.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Resilience {
    /// Half of the full members, rounded down: the leader and `k` backups are a majority.
    Majority,
    /// Every backup of the view.
    All,
    /// This many backups; at least 1.
    Count(u8),
}

impl Resilience {
    /// The `k` of a view with `full` full members: never more than it has backups.
    pub fn k(self, full: usize) -> u8 {
        let most = full.saturating_sub(1);
        let k = match self {
            Self::Majority => full / 2,
            Self::All => most,
            Self::Count(n) => usize::from(n.max(1)),
        };
        u8::try_from(k.min(most)).unwrap_or(u8::MAX)
    }
}

/// Bounds of every queue and frame of a group.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest body of one datagram, in bytes (what the driver's header and tag add is not counted).
    pub datagram_bytes_max: usize,
    /// Largest payload of one event, in bytes.
    pub event_bytes_max: usize,
    /// Bytes that may be on their way and not yet stable; what is beyond waits in the leader's queue.
    pub flight_bytes_max: u64,
    /// Past this many unstable bytes `window_open` says no.
    pub window_bytes_max: u64,
    /// Past this many bytes that some full member does not hold `window_open` says no.
    pub retained_bytes_max: u64,
    /// Past this many bytes kept for joining members alone they are dropped and join anew.
    pub joiner_bytes_max: u64,
    /// Out-of-order bytes a receiver keeps.
    pub reorder_bytes_max: usize,
    /// Events a joiner keeps until its checkpoint is complete; past it, it joins anew.
    pub joiner_buffer_bytes_max: u64,
    /// Checkpoint bytes asked for at a time.
    pub transfer_window_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            datagram_bytes_max: 1360,
            event_bytes_max: 128 * 1024,
            // Two fit the receive buffer that a kernel gives to the unprivileged.
            flight_bytes_max: 192 << 10,
            window_bytes_max: 8 << 20,
            retained_bytes_max: 128 << 20,
            joiner_bytes_max: 512 << 20,
            reorder_bytes_max: 16 << 20,
            joiner_buffer_bytes_max: 512 << 20,
            transfer_window_bytes: 64 * 1024,
        }
    }
}

/// A group member's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The group's number, the same on every member.
    pub group_id: u32,
    /// This member: its configured name, and 128 bits drawn afresh for this life.
    pub me: MemberId,
    /// Names of all configured members, this one's too.
    pub members: Vec<String>,
    /// Fresh random bits: the instance id, should this member be the one that founds the group.
    pub fresh_instance: u128,
    /// How many backups must hold an event.
    pub resilience: Resilience,
    /// How often the leader asks for a sign of life.
    pub heartbeat: Duration,
    /// How long an answer lets the leader speak. Below `suspect_after`.
    pub lease: Duration,
    /// The lease of a leader that is alone in its view and holds a coordinator write instead.
    pub lease_alone: Duration,
    /// Silence after which a member is suspected.
    pub suspect_after: Duration,
    /// How long members that could go on are waited for before all state is declared lost.
    pub total_failure_after: Duration,
    /// Of backups that are equally fit, the one of this name leads next.
    pub prefer: Option<String>,
    /// Bounds.
    pub limits: Limits,
    /// A defect planted on purpose, so that the simulator can show that it finds it.
    #[cfg(any(test, feature = "faults"))]
    pub fault: Option<Fault>,
}

impl Config {
    /// A configuration with the default times and bounds.
    pub fn new(group_id: u32, me: MemberId, members: Vec<String>, fresh_instance: u128) -> Self {
        Self {
            group_id,
            me,
            members,
            fresh_instance,
            resilience: Resilience::Majority,
            heartbeat: Duration::from_millis(10),
            lease: Duration::from_millis(30),
            lease_alone: Duration::from_millis(400),
            suspect_after: Duration::from_millis(50),
            total_failure_after: Duration::from_secs(1),
            prefer: None,
            limits: Limits::default(),
            #[cfg(any(test, feature = "faults"))]
            fault: Fault::of_process(),
        }
    }

    /// The margin for clocks that run at different rates: a tenth of the lease and a millisecond.
    pub(crate) fn drift_margin(lease: Duration) -> Duration {
        lease / 10 + Duration::from_millis(1)
    }

    #[cfg(any(test, feature = "faults"))]
    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }
}

#[cfg(any(test, feature = "faults"))]
unbroken_planted::faults! {
    "group";
    /// A wedged member goes on acknowledging and delivering.
    AckAfterWedge,
    /// The proposer writes the new view without waiting for the old lease.
    SkipLeaseWait,
    /// The proposer takes its own highest event as the cut.
    CutIsOwnHighest,
    /// A member keeps and delivers what lies beyond the cut.
    DeliverBeyondCut,
    /// An event counts as stable with one holder too few.
    StableAtKMinusOne,
    /// A restarted process is taken for its predecessor and survives.
    RestartSurvives,
    /// Events are given up before every full member holds them.
    EarlyTrim,
    /// The successor's service clock starts where the proposer's stood, without the lease.
    ClockWithoutLease,
    /// The joiner is given a checkpoint and misses the first event after it.
    JoinerSkipsOne,
    /// A successor is chosen by rank alone, fit or not.
    LeaderUnfit,
    /// Who misses events asks for them in vain.
    NaksUnanswered,
    /// Datagrams of any view are taken for those of this one.
    ViewUnchecked,
    /// The lease runs from when an answer came, not from when the question left.
    LeaseFromAnswer,
    /// The lease needs one answer too few.
    LeaseByOneTooFew,
    /// A member of a group delivers while the view is being left.
    DeliverWhileBlocked,
    /// The view of a group ends at what the first survivor holds.
    CutIsFirstReport,
    /// A cbcast is delivered as it comes.
    CausalAtOnce,
    /// Two members place abcasts.
    TwoTokens,
    /// A safe message is delivered as it comes.
    SafeAtOnce,
    /// A gbcast is delivered as it comes.
    GbcastAtOnce,
    /// A joiner of a group lets go of what came before its state.
    JoinerForgets,
    /// What is acknowledged after the report for the end of a view counts as stable.
    VouchAfterReport,
    /// Messages of an earlier membership are taken for those of this one.
    OldDirects,
}

/// `true` when the defect is planted; constant `false` in a build that cannot plant any.
macro_rules! planted {
    ($config:expr, $($fault:ident)|+) => {{
        #[cfg(any(test, feature = "faults"))]
        {
            false $(|| $config.has($crate::config::Fault::$fault))+
        }
        #[cfg(not(any(test, feature = "faults")))]
        {
            let _ = &$config;
            false
        }
    }};
}
pub(crate) use planted;
