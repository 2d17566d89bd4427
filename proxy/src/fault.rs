//! Defects that can be planted into a node, for the tests that must find them. Never compiled into
//! a node that is used: only the feature `faults` has them.

/// `true` when one of the defects is planted; constant `false` in a build that cannot plant any.
macro_rules! planted {
    ($($fault:ident)|+) => {{
        #[cfg(feature = "faults")]
        {
            let planted = $crate::fault::Fault::of_process();
            false $(|| planted == Some($crate::fault::Fault::$fault))+
        }
        #[cfg(not(feature = "faults"))]
        {
            false
        }
    }};
}
pub(crate) use planted;

#[cfg(feature = "faults")]
unbroken_planted::faults! {
    "proxy";
    /// R1: output leaves as if every event were stable at once.
    CommitWaitSkipped,
    /// R1: output is taken to depend on the connection's opening alone.
    TagForgotten,
    /// R2: frames leave whatever the lease says; neither node nor kernel checks.
    NoFence,
    /// R2: only the node checks the lease, not the kernel.
    NoKernelFence,
    /// R2: the lease is not looked at again before frames leave; the kernel does not check either.
    ClockUnread,
    /// R2: the kernel is told of no end of the lease.
    LeaseWithoutEnd,
    /// R2: the fence stays open when it is to be shut.
    FenceLeftOpen,
    /// R2: a leader that has promised to leave its view goes on.
    WedgeIgnored,
    /// R3: a joiner's servers are given something else than the others' were.
    ReplayWrong,
    /// R3: what a server says again in a replay is taken for new.
    ReplayTakenForNew,
    /// R3: input that the server has taken is forgotten at once.
    HistoryTrimmed,
    /// R3: with one order for all connections, nobody waits until an input is taken.
    OrderIgnored,
    /// R3: a server that is behind is given no more of a connection that is over.
    SlowCutOff,
    /// R3: a backup does not compare its server's answers with the leader's.
    AnswersUnjudged,
    /// R3: what a backup's server answered otherwise than the last leader's is forgotten at once when another leads.
    DoubtForgotten,
    /// R3: a leader goes on although two others contradict it.
    OutvotedLeads,
    /// R4: a new leader's service clock is not the group's.
    ClockNotCarried,
    /// R5: a close is shown without another replica's.
    ClosesUnagreed,
    /// R5: backups say nothing of their servers' closes.
    ClosesUnreported,
    /// R5: a dead server passes for one that lives.
    DeathUnseen,
    /// A server that fails its health check goes on serving.
    HealthIgnored,
    /// R6: without a quorum of coordinators a service counts as protected.
    QuorumUnneeded,
    /// R6: a backup that is not heard of counts as one that could take over.
    SilenceUnseen,
    /// A new leader does not announce the address.
    NotAnnounced,
    /// A foreign announcement of the address is left standing.
    ClaimsUnanswered,
    /// What clients sent while nobody led is not looked at.
    GapForgotten,
    /// Frames from before a takeover are taken for new ones.
    StaleFramesTaken,
    /// The preferred node is not handed over to.
    PreferenceIgnored,
    /// A node in maintenance leads like any other.
    MaintenanceIgnored,
}
