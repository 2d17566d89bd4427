//! What members of a VIP's group tell its leader beside the events: on the group's unicast channel, one
//! datagram each, which may be lost.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::verdict::DivergenceReport;

const VERSION: u8 = 1;

/// One message to the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The server behind this member answered otherwise than the leader's.
    Diverged(DivergenceReport),
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
        let report = Report::Diverged(DivergenceReport {
            conn: 7,
            before: u64::MAX,
            hash: 1,
        });
        let bytes = report.encode();
        assert_eq!(Report::decode(&bytes), Ok(report));
        for end in 0..bytes.len() {
            assert_eq!(Report::decode(&bytes[..end]), Err(ReportError::Unreadable));
        }
        let mut newer = bytes;
        newer[0] += 1;
        assert_eq!(
            Report::decode(&newer),
            Err(ReportError::Version(VERSION + 1))
        );
    }
}
