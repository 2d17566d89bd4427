//! Between the promise to leave a view and the next view a member acknowledges nothing, answers no heartbeat and
//! delivers nothing but what the cut demands.

use super::{Invariant, Observed};
use crate::view::MemberId;
use crate::wire::{self, Item, Message, Reader};
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct NoAckAfterWedge {
    /// Wedged members, and what they delivered since: to be justified by the cut of the view that follows.
    wedged: BTreeMap<MemberId, Option<u64>>,
}

impl Invariant for NoAckAfterWedge {
    fn name(&self) -> &'static str {
        "no ack after wedge"
    }

    fn observe(&mut self, who: &MemberId, what: &Observed<'_>) -> Result<(), String> {
        match what {
            Observed::Wedged => {
                self.wedged.insert(who.clone(), None);
            }
            Observed::Installed { cut, view, .. } => {
                if let Some(Some(last)) = self.wedged.remove(who)
                    && last > *cut
                {
                    return Err(format!(
                        "{who}, wedged, delivered {last}; view {view} cuts at {cut}"
                    ));
                }
            }
            Observed::Delivered { number } => {
                if let Some(last) = self.wedged.get_mut(who) {
                    *last = Some(*number);
                }
            }
            Observed::Sent { body } => {
                if let Some(delivered) = self.wedged.get(who) {
                    if let Some(n) = delivered {
                        return Err(format!("{who}, wedged, delivered {n} and did not install"));
                    }
                    let Some((header, items)) = Reader::new(body) else {
                        return Ok(());
                    };
                    if header.has(wire::ACK) || header.has(wire::LEASE) {
                        return Err(format!("{who}, wedged, acknowledged {}", header.held));
                    }
                    for item in items {
                        if matches!(item, Item::Message(Message::Alive { .. })) {
                            return Err(format!("{who}, wedged, answered a heartbeat"));
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
