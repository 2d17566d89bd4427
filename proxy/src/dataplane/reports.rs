//! What members of a VIP's group tell its leader beside the events: on the group's unicast channel, one
//! datagram each, which may be lost.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use unbroken_tcpstate::ConnId;

use super::closes::Closed;
use super::verdict::DivergenceReport;

const VERSION: u8 = 2;

/// One message to the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The server behind this member answered otherwise than the leader's, at these places.
    Diverged(Vec<DivergenceReport>),
    /// The server behind this member closed these connections, and lived afterwards (R5). `run` counts
    /// the deaths of servers on this member: a report voids all those of earlier runs.
    Closes { run: u64, closes: Vec<CloseReport> },
    /// An operator asks that another lead: this one, or the fittest.
    HandOver { to: Option<String> },
}

/// How a member's server closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CloseReport {
    conn: u64,
    /// `None`: it was broken off. Else the offset behind the server's last byte.
    fin: Option<u64>,
}

impl CloseReport {
    /// Most bytes that one takes as encoded.
    pub(crate) const BYTES_MAX: usize = 10 + 1 + 10;

    pub(crate) fn new(conn: ConnId, closed: Closed) -> Self {
        let fin = match closed {
            Closed::Fin(offset) => Some(offset),
            Closed::Reset => None,
        };
        Self { conn: conn.0, fin }
    }

    pub(crate) fn conn(&self) -> ConnId {
        ConnId(self.conn)
    }

    pub(crate) fn closed(&self) -> Closed {
        self.fin.map_or(Closed::Reset, Closed::Fin)
    }
}

/// Why a message is not understood: its sender speaks another version, or is at fault.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum ReportError {
    #[error("version {0}, this program reads {VERSION}")]
    Version(u8),
    #[error("unreadable")]
    Unreadable,
}

impl Report {
    /// Bytes of a message beside its list.
    pub(crate) const OVERHEAD_BYTES: usize = 1 + 1 + 10 + 5;

    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("writing to a Vec cannot fail")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, ReportError> {
        let (version, body) = bytes.split_first().ok_or(ReportError::Unreadable)?;
        if *version != VERSION {
            return Err(ReportError::Version(*version));
        }
        match postcard::take_from_bytes(body) {
            Ok((report, [])) => Ok(report),
            _ => Err(ReportError::Unreadable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard_and_damage_is_not() {
        let closes = vec![
            CloseReport::new(ConnId(u64::MAX), Closed::Fin(u64::MAX)),
            CloseReport::new(ConnId(7), Closed::Reset),
        ];
        let most = Report::OVERHEAD_BYTES + 2 * CloseReport::BYTES_MAX;
        let run = u64::MAX;
        let report = Report::Closes { run, closes };
        let bytes = report.encode();
        assert!(bytes.len() <= most);
        assert_eq!(Report::decode(&bytes), Ok(report));
        for end in 0..bytes.len() {
            assert_eq!(
                Report::decode(&bytes[..end]),
                Err(ReportError::Unreadable),
                "cut at {end}"
            );
        }
        let mut newer = bytes;
        newer[0] += 1;
        assert_eq!(
            Report::decode(&newer),
            Err(ReportError::Version(VERSION + 1))
        );
    }
}
