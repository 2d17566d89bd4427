//! What stands before a connection: is this segment to be believed?
//!
//! A pure judgement of one segment against what the connection has received. RFC 9293 §3.10.7.4 in
//! its order, hardened by RFC 5961 (exact-match RST, challenge ACKs) and RFC 7323 §5 (PAWS).

use crate::fault::planted;
use crate::segment::{Segment, flag};

/// What the judgement needs to know. Offsets count from the first payload byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// RCV.NXT, the FIN counted.
    pub(crate) received: u64,
    /// The latest acknowledgement that left. Lags `received` while events are not stable.
    pub(crate) last_ack: u64,
    /// The right edge that is honoured.
    pub(crate) limit: u64,
    /// TS.Recent, if timestamps are in use.
    pub(crate) ts_recent: Option<u32>,
}

/// What becomes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Process it.
    Accept,
    /// Drop it and send an ACK, always: a retransmission whose ACK was lost, or a probe.
    Answer,
    /// Drop it and send an ACK, at a limited rate (RFC 5961 §7).
    Challenge,
    /// Drop it.
    Drop,
    /// The client has broken the connection off.
    Reset,
}

/// Judges a segment whose first sequence number is stream offset `offset`.
pub(crate) fn judge(view: &View, segment: &Segment<'_>, offset: i64) -> Verdict {
    let received = view.received.cast_signed();
    let limit = view.limit.cast_signed();
    if segment.has(flag::RST) {
        // RFC 5961 §3.2. The client answers our ACK with an RST at the number that we acknowledged,
        // and that lags what we have received.
        let in_window = (received..limit).contains(&offset);
        let exact = offset == received || offset == view.last_ack.cast_signed();
        return if exact || in_window && planted!(ResetsBelieved) {
            Verdict::Reset
        } else if in_window {
            Verdict::Challenge
        } else {
            Verdict::Drop
        };
    }
    // RFC 5961 §4.2: whatever its number. A client that restarted answers with an RST.
    if segment.has(flag::SYN) {
        return Verdict::Challenge;
    }
    if !segment.has(flag::ACK) {
        return Verdict::Drop;
    }
    let len = segment.len().cast_signed();
    let timely = match (view.ts_recent, segment.options.timestamp) {
        (Some(recent), Some((tsval, _))) if !planted!(TimestampsUnchecked) => {
            tsval.wrapping_sub(recent).cast_signed() >= 0
        }
        // RFC 7323 §3.2 would drop a segment without the option; Linux does not, nor do we.
        _ => true,
    };
    // At RCV.NXT a segment's ACK counts even with a closed window.
    let in_window = offset == received
        || if len == 0 {
            offset > received && offset <= limit
        } else {
            offset < limit && offset + len > received
        };
    match (timely && in_window, len) {
        (true, _) => Verdict::Accept,
        (false, 0) if offset + 1 != received => Verdict::Challenge,
        (false, _) => Verdict::Answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn_state::Tuple;
    use crate::segment::Options;
    use crate::seq::SeqNum;

    const VIEW: View = View {
        received: 1000,
        last_ack: 900,
        limit: 2000,
        ts_recent: Some(50),
    };

    fn verdict(flags: u8, offset: i64, len: usize, tsval: Option<u32>) -> Verdict {
        let payload = vec![0; len];
        let segment = Segment {
            tuple: Tuple {
                local: "10.0.0.1:80".parse().unwrap(),
                remote: "10.0.0.2:999".parse().unwrap(),
            },
            seq: SeqNum(0),
            ack: SeqNum(0),
            flags,
            window: 100,
            options: Options {
                timestamp: tsval.map(|t| (t, 0)),
                ..Options::default()
            },
            payload: &payload,
        };
        judge(&VIEW, &segment, offset)
    }

    /// RFC 5961 §3.2.
    #[test]
    fn rst_must_match_exactly() {
        let rst = |offset| verdict(flag::RST, offset, 0, None);
        assert_eq!(rst(1000), Verdict::Reset);
        assert_eq!(
            rst(900),
            Verdict::Reset,
            "the answer to an ACK that was clamped"
        );
        assert_eq!(rst(1001), Verdict::Challenge);
        assert_eq!(rst(999), Verdict::Drop);
        assert_eq!(rst(2000), Verdict::Drop);
    }

    /// RFC 5961 §4.2.
    #[test]
    fn a_syn_on_a_live_connection_is_challenged() {
        for offset in [-1, 0, 1000, 5_000_000] {
            assert_eq!(verdict(flag::SYN, offset, 0, None), Verdict::Challenge);
        }
    }

    /// RFC 9293 §3.10.7.4, first check.
    #[test]
    fn acceptability() {
        let ack = |offset, len| verdict(flag::ACK, offset, len, Some(51));
        assert_eq!(ack(1000, 0), Verdict::Accept);
        assert_eq!(ack(1000, 5000), Verdict::Accept);
        assert_eq!(ack(990, 11), Verdict::Accept);
        assert_eq!(ack(1999, 1), Verdict::Accept);
        assert_eq!(ack(2000, 0), Verdict::Accept);
        assert_eq!(ack(990, 10), Verdict::Answer, "a duplicate");
        assert_eq!(ack(2000, 1), Verdict::Answer, "beyond the window");
        assert_eq!(ack(999, 0), Verdict::Answer, "keep-alive");
        assert_eq!(ack(999, 1), Verdict::Answer, "keep-alive with a byte");
        assert_eq!(ack(10, 0), Verdict::Challenge);
        assert_eq!(verdict(0, 1000, 1, Some(51)), Verdict::Drop, "no ACK flag");
    }

    /// RFC 7323 §5.3.
    #[test]
    fn paws_drops_and_answers() {
        assert_eq!(verdict(flag::ACK, 1000, 1, Some(49)), Verdict::Answer);
        assert_eq!(verdict(flag::ACK, 1000, 1, Some(50)), Verdict::Accept);
        assert_eq!(
            verdict(flag::ACK, 1000, 1, Some(50u32.wrapping_sub(1 << 31))),
            Verdict::Answer
        );
        assert_eq!(verdict(flag::ACK, 1000, 1, None), Verdict::Accept);
        assert_eq!(
            verdict(flag::RST, 1000, 0, Some(1)),
            Verdict::Reset,
            "RST is exempt"
        );
    }
}
