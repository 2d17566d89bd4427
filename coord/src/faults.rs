//! Defects that can be planted on purpose, so that the simulator can show that it finds them.
//!
//! Compiled in with the tests and with the feature `faults` alone; a server has none of it.

use std::cell::Cell;

unbroken_planted::faults! {
    "coord";
    /// Votes and acknowledgements go out before they are durable.
    AckBeforeSync,
    /// A restarted server has forgotten whom it voted for.
    VoteForgotten,
    /// `sync` answers at once.
    SyncIsLocal,
    /// A leader answers barriers without asking whether it still leads.
    BarrierByLease,
    /// A watch is told after the write that fired it is answered.
    WatchAfterReply,
    /// A session ends in two steps: its last ephemeral goes with the next entry.
    EndInTwoSteps,
    /// A session leaves an ephemeral behind.
    EphemeralKept,
    /// A change of data fires no watch.
    WatchLost,
    /// A write that comes twice is done twice.
    NumberUnchecked,
    /// A failed `multi` leaves its first part done.
    MultiHalfDone,
    /// Snapshots leave the sessions out.
    SnapshotWithoutSessions,
    /// A log damaged in its middle is cut off there.
    DamageCutOff,
    /// A log that ends before its mark is taken.
    MarkUnchecked,
    /// A failed sync is passed over.
    SyncErrorIgnored,
    /// A session that has just been taken up by another connection is ended for the silence before.
    ExpireUnchecked,
    /// A client that comes back is not told what it missed.
    WatchesNotCaughtUp,
    /// Sequential names count the children that are there.
    SequentialByCount,
    /// A leader's snapshot is installed and the log not told.
    ResetForgotten,
    /// A snapshot's name is not made durable before the log is trimmed.
    SnapshotNotSynced,
    /// The frame that was found last is not made durable again.
    TailNotRewritten,
    /// A server serves a client that has seen more than it.
    FutureIgnored,
    /// Who lost its session to another connection goes on with it.
    MovedKeepsServing,
}

thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Plants a defect in everything that this thread does from now on, or none any more.
pub fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}

/// What is planted: in this thread, or else by the environment in the whole process.
#[must_use]
pub fn planted() -> Option<Fault> {
    PLANTED.get().or_else(Fault::of_process)
}
