//! Defects that can be planted, for the tests that must find them. Never compiled into a node that is used: only the
//! feature `faults` has them.

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
    "tcpstate";
    /// R1: output leaves before the event that it depends on is stable.
    CommitWaitSkipped,
    /// R1: input is acknowledged before it is stable.
    AckBeforeCommit,
    /// R1: a FIN leaves before its event is stable.
    FinBeforeCommit,
    /// R1: an RST leaves before its event is stable.
    ResetBeforeCommit,
    /// R4: the ACK is clamped and the window is not: the right edge goes back.
    ClampWithoutWindow,
    /// R4: the right edge that the former leader advertised is forgotten.
    EdgeForgotten,
    /// R4: the window opens with what is stable, though the server has not taken it.
    EdgeWithoutServer,
    /// R4: TSval begins anew at a takeover.
    TsvalReset,
    /// R4: after a takeover output goes on one byte too far.
    SndNxtWrong,
    /// R4: at a takeover the client's FIN is not counted in RCV.NXT.
    RcvNxtWrong,
    /// R4: a new leader scales its window otherwise.
    ScaleForgotten,
    /// Bytes that the client has already do not move the constant between the socket and the wire.
    TranslationNotMoved,
    /// After a takeover an acknowledgement of more than the record knows is refused.
    RecordTakenForTruth,
    /// After a takeover old segments teach nothing.
    OldSegmentsUnheard,
    /// After a takeover nothing is said until a timer fires.
    GreetingSkipped,
    /// A backup forgets output that the client has not acknowledged.
    OutputForgotten,
    /// After a takeover a segment of no known connection is answered by an RST.
    StrangersRefused,
    /// What a former leader announced of handshakes is not taken up.
    HandshakesForgotten,
    /// Closed tuples are not remembered: an old segment opens them again.
    GhostsWelcome,
    /// An RST anywhere in the window is believed.
    ResetsBelieved,
    /// Segments with an older timestamp are believed.
    TimestampsUnchecked,
    /// Checksums are not verified.
    ChecksumsUnchecked,
    /// A duplicate or a keep-alive gets no answer.
    DuplicatesUnanswered,
    /// Segments are larger than the client takes.
    MssExceeded,
}
