//! What programs send, on its way into its group: placed at once, or held until there is room.

use std::io;

use tokio::sync::oneshot;

use super::super::Inputs;
use super::{INPUTS_MAX, Input, Sending, Worker};
use crate::process::{GroupId, Refused};

impl Worker {
    /// A message is placed in its group, or held here behind others until there is room; a call is refused then.
    pub(super) fn on_sending(
        &mut self,
        sending: Sending,
        answer: Option<oneshot::Sender<Result<(), Refused>>>,
    ) {
        if !self.is_seated(&sending.of) {
            if let Some(answer) = answer {
                let _ = answer.send(Err(Refused::NotAMember));
            }
            return;
        }
        let (group, order) = (sending.of.group, sending.message.order);
        let is_call = sending.replies.is_some();
        if !is_call
            && let Some(seat) = self.seats.get_mut(&group)
            && (!seat.held.is_empty() || !self.process.room(group, order))
        {
            seat.held.push_back(Input::Send(sending, answer));
            self.holding.insert(group);
            return;
        }
        let result = self.on_send(sending);
        if let Some(answer) = answer {
            let _ = answer.send(result);
        }
    }

    /// Places what was held, as far as there is room now, and no more of it than leaves sockets and timers their turn. Whether there
    /// is more.
    pub(super) fn place_held(&mut self, inputs: &Inputs) -> io::Result<bool> {
        let mut left = INPUTS_MAX;
        let from = self.place_from;
        let turns = self.holding.range(from..).chain(self.holding.range(..from));
        for group in turns.copied().collect::<Vec<_>>() {
            self.place_held_of(group, &mut left);
            while let Some(output) = self.process.poll_ready() {
                self.execute(inputs, output)?;
            }
            if left == 0 {
                self.place_from = group;
                break;
            }
        }
        // All that was placed is sent together: what is due is looked for in every group.
        if left < INPUTS_MAX {
            self.settle(inputs)?;
        }
        Ok(left == 0)
    }

    /// Places what was held of one group; at most `left`.
    fn place_held_of(&mut self, group: GroupId, left: &mut usize) {
        let held = self.seats.get_mut(&group).map(|s| &mut s.held);
        let mut held = held.map(std::mem::take).unwrap_or_default();
        self.holding.remove(&group);
        while *left > 0
            && let Some(input) = held.pop_front()
        {
            if let Input::Send(sending, _) = &input
                && !self.process.room(group, sending.message.order)
            {
                held.push_front(input);
                break;
            }
            *left -= 1;
            self.on_input(input);
        }
        let Some(seat) = self.seats.get_mut(&group) else {
            return;
        };
        if held.is_empty() {
            // A call that found messages waiting may be placed now.
            seat.room.news.notify_waiters();
        } else {
            seat.held = held;
            self.holding.insert(group);
        }
    }
}
