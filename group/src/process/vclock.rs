//! Vector clocks over the ranks of one view.

use serde::{Deserialize, Serialize};

/// For each rank, how many of its messages.
///
/// FM88, M89; BSS91 §4.3. A clock is as long as its view; one of another length is a peer's error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VClock(pub(crate) Vec<u64>);

impl VClock {
    pub(crate) fn new(ranks: usize) -> Self {
        Self(vec![0; ranks])
    }

    /// BSS91 §5.1, the delay of CBCAST: whether a message with this stamp of the member of rank `sender` comes next where `self` counts what
    /// was delivered: it is the sender's next, and all that its sender had delivered was delivered here.
    pub(crate) fn admits(&self, sender: usize, stamp: &Self) -> bool {
        self.0.len() == stamp.0.len()
            && self
                .0
                .iter()
                .zip(&stamp.0)
                .enumerate()
                .all(|(rank, (delivered, stamped))| {
                    if rank == sender {
                        *stamped == delivered + 1
                    } else {
                        stamped <= delivered
                    }
                })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_waits_for_what_its_sender_had_seen() {
        let mut seen = VClock::new(3);
        let second = VClock(vec![1, 1, 0]);
        assert!(!seen.admits(1, &second), "rank 0's message is missing");
        assert!(seen.admits(0, &VClock(vec![1, 0, 0])));
        seen.0[0] = 1;
        assert!(seen.admits(1, &second));
        assert!(!seen.admits(1, &VClock(vec![1, 2, 0])), "a gap");
        assert!(!seen.admits(1, &VClock(vec![1, 1])), "another view's");
    }
}
