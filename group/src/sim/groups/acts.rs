//! What programs do and see in a run.

use super::invariants::Seen;
use super::program::{DIRECT, Id, Program, kind};
use super::world::{Happening, NAMES, World, index, name};
use crate::process::{
    Calling, Command, GroupEvent, GroupId, Multicast, Order, Refused, Stability, ThreadId, Want,
};
use crate::sim::network::{below, chance};
use crate::time::Instant;
use bytes::Bytes;

impl World {
    pub(super) fn act(&mut self, node: usize) {
        if self.now < self.quiet_at {
            // With many members each does less: what is sent to all grows with their square.
            let members = self.nodes.len().max(4) as u64;
            let us = 500 + below(&mut self.rng, 2000 * members);
            self.after(us, Happening::Act { node });
        } else {
            self.after(20_000, Happening::Act { node });
        }
        if self.nodes[node].process.is_none() || self.nodes[node].paused_until > self.now {
            return;
        }
        let which = usize::try_from(below(&mut self.rng, 3)).expect("three");
        let wish = NAMES[which];
        let joined = self.nodes[node].names.values().any(|n| n == wish);
        if !joined {
            if self.healed || chance(&mut self.rng, 300) {
                self.join(node, wish);
            }
            return;
        }
        let found = self.nodes[node].names.iter().find(|(_, n)| *n == wish);
        let Some(group) = found.map(|(id, _)| *id) else {
            return;
        };
        if self.now >= self.quiet_at || self.nodes[node].programs[&group].leaving {
            return;
        }
        match below(&mut self.rng, 40) {
            0 if !self.healed => {
                self.nodes[node]
                    .programs
                    .get_mut(&group)
                    .expect("in")
                    .leaving = true;
                for _ in 0..3 {
                    self.send_direct(node, group);
                }
                self.command(node, Command::Leave { group }).expect("in");
            }
            1 if !self.healed && chance(&mut self.rng, 300) => {
                let members = self.nodes[node].programs[&group].members.clone();
                if let Some(member) = members.last().cloned() {
                    // It goes on sending: what it does not know yet must harm nobody.
                    let victim = index(&member);
                    for i in 0..20 {
                        let node = victim;
                        self.after(i * 30, Happening::SendSafe { node, group });
                    }
                    self.command(node, Command::Expel { group, member })
                        .expect("in");
                }
            }
            2 | 3 => self.send_direct(node, group),
            4 if !self.healed => {
                let paused = true;
                self.command(node, Command::Pause { group, paused })
                    .expect("in");
                let us = below(&mut self.rng, 400_000);
                self.after(us, Happening::Unpause { node, group });
            }
            _ => {
                for _ in 0..=below(&mut self.rng, 3) {
                    self.multicast(node, group, None);
                }
            }
        }
    }

    /// The program keeps up again.
    pub(super) fn unpause(&mut self, node: usize, group: GroupId) {
        let paused = false;
        // It may have left, or died, in the meantime.
        let _ = self.command(node, Command::Pause { group, paused });
    }

    pub(super) fn join(&mut self, node: usize, wish: &'static str) {
        let n = &mut self.nodes[node];
        if n.process.is_some() && n.wanted.insert(wish) {
            let group = wish.to_owned();
            self.command(node, Command::Join { group }).expect("it may");
        }
    }

    fn command(&mut self, node: usize, command: Command) -> Result<(), Refused> {
        let now = Instant::from_micros(self.now);
        let Some(process) = &mut self.nodes[node].process else {
            return Ok(());
        };
        process.cut(now);
        let result = process.command(now, &command);
        self.drain(node);
        result
    }

    fn send_direct(&mut self, node: usize, group: GroupId) {
        let size = usize::try_from(below(&mut self.rng, 2000)).expect("small");
        let p = self.nodes[node].programs.get_mut(&group).expect("in");
        let sender = p.sender;
        let others = p.members.len() as u64;
        let Some(to) = usize::try_from(below(&mut self.rng, others))
            .ok()
            .and_then(|i| p.members.get(i))
            .cloned()
        else {
            return;
        };
        let count = p.direct_sent.get(&to).copied().unwrap_or(0) + 1;
        let id = Id {
            sender,
            kind: DIRECT,
            count,
            safe: false,
        };
        let body = id.body(size);
        let command = Command::Send {
            group,
            to: to.clone(),
            body,
        };
        // Numbered before: a message to oneself is delivered at once.
        p.direct_sent.insert(to.clone(), count);
        if self.command(node, command).is_err()
            && let Some(p) = self.nodes[node].programs.get_mut(&group)
        {
            p.direct_sent.insert(to, count - 1);
        }
    }

    /// Sends something; `safe`: a safe message of this order.
    pub(super) fn multicast(&mut self, node: usize, group: GroupId, safe: Option<Order>) {
        let thread = ThreadId(u16::try_from(below(&mut self.rng, 2)).expect("two"));
        let order = match below(&mut self.rng, 20) {
            0..=5 => Order::Fifo,
            6..=11 => Order::Causal(thread),
            12..=18 => Order::Total(thread),
            _ => Order::View,
        };
        let order = safe.unwrap_or(order);
        let size = usize::try_from(match below(&mut self.rng, 10) {
            0 => below(&mut self.rng, 10_000),
            _ => below(&mut self.rng, 200),
        });
        let size = size.expect("small");
        let safe = safe.is_some() || order != Order::View && chance(&mut self.rng, 300);
        let (done, calls) = (chance(&mut self.rng, 200), chance(&mut self.rng, 100));
        let want = [Want::One, Want::All, Want::Number(2)];
        let want = want[usize::try_from(below(&mut self.rng, 3)).expect("three")];
        let k = u8::try_from(below(&mut self.rng, 3)).expect("small");
        let Some(p) = self.nodes[node].programs.get_mut(&group) else {
            return;
        };
        let sender = p.sender;
        let count = p.sent.get(&kind(order)).copied().unwrap_or(0) + 1;
        let id = Id {
            sender,
            kind: kind(order),
            count,
            safe,
        };
        p.next_number += 1;
        let number = p.next_number;
        let mut m = Multicast::new(order, id.body(size));
        m.safe = safe;
        if done {
            let stability = if k == 0 {
                Stability::All
            } else {
                Stability::Held(k)
            };
            m.done = Some((number, stability));
        }
        if calls {
            m.calling = Some(Calling {
                call: number,
                want,
                timeout_us: 0,
            });
        }
        // Noted before: it may be delivered here at once.
        p.sent.insert(kind(order), count);
        if done {
            p.awaited.insert(number, true);
        }
        if calls {
            p.open_calls.insert(number, true);
        }
        self.see(node, group, &Seen::Sent { id, order });
        let message = m;
        if self
            .command(node, Command::Multicast { group, message })
            .is_err()
            && let Some(p) = self.nodes[node].programs.get_mut(&group)
        {
            p.sent.insert(kind(order), count - 1);
            p.awaited.remove(&number);
            p.open_calls.remove(&number);
        }
    }

    pub(super) fn on_event(&mut self, node: usize, group: GroupId, event: GroupEvent) {
        self.log(|| {
            let what = match &event {
                GroupEvent::Message(m) => {
                    let id = Id::read(&m.body);
                    format!("{} sends {id:?} {:?} {:?}", m.from, m.order, m.call)
                }
                GroupEvent::State(bytes) => format!("State of {} bytes", bytes.len()),
                other => format!("{other:?}"),
            };
            format!("{} {} {what}", name(node), group.0 & 0xff)
        });
        match &event {
            GroupEvent::Joined { name } => {
                self.nodes[node].names.insert(group, name.clone());
                self.memberships += 1;
                let program = Program {
                    sender: self.memberships,
                    ..Program::default()
                };
                self.nodes[node].programs.insert(group, program);
                return;
            }
            GroupEvent::View(view) => {
                self.report.views += 1;
                let state = self.nodes[node].programs[&group].state;
                if !self.nodes[node].programs[&group].has_state {
                    self.fail("state", format!("view {} before any state", view.id));
                }
                self.see(node, group, &Seen::View { view, state });
            }
            GroupEvent::State(bytes) => {
                self.report.transfers += 1;
                let mut p = Program::default();
                p.take(&GroupEvent::State(bytes.clone()));
                self.see(node, group, &Seen::Restored { state: p.state });
                if chance(&mut self.rng, 10) {
                    let us = below(&mut self.rng, 100);
                    self.after(us, Happening::KillDonors { group, but: node });
                }
            }
            GroupEvent::Message(m) => {
                self.report.delivered += 1;
                let id = Id::read(&m.body);
                let delivered = Seen::Delivered {
                    id,
                    order: m.order,
                    from: &m.from,
                };
                self.see(node, group, &delivered);
            }
            GroupEvent::Left { wished } => {
                self.see(node, group, &Seen::Left);
                if let Some(name) = self.nodes[node].names.remove(&group) {
                    self.nodes[node].wanted.retain(|w| *w != name);
                    let wish = NAMES.into_iter().find(|w| *w == name);
                    if let Some(wish) = wish.filter(|_| *wished && chance(&mut self.rng, 500)) {
                        let us = 1 + below(&mut self.rng, 1000);
                        self.after(us, Happening::Rejoin { node, wish });
                    }
                }
                self.nodes[node].programs.remove(&group);
                return;
            }
            _ => {}
        }
        let Some(p) = self.nodes[node].programs.get_mut(&group) else {
            return self.fail("events", format!("{event:?} of a group that was left"));
        };
        p.take(&event);
        match event {
            GroupEvent::Done { number } if p.awaited.remove(&number).is_none() => {
                self.fail("stability", format!("{number} is done twice"));
            }
            GroupEvent::CallDone { call, .. } if p.open_calls.remove(&call).is_none() => {
                self.fail("calls", format!("{call} ends twice"));
            }
            GroupEvent::Reply { call, .. } if !p.open_calls.contains_key(&call) => {
                self.fail("calls", format!("a reply to {call}, which is over"));
            }
            GroupEvent::StateWanted { view } => {
                let state = p.state;
                let size = usize::try_from(below(&mut self.rng, 60_000)).expect("small");
                // Every donor makes the same bytes.
                let size = if chance(&mut self.rng, 900) {
                    30_000
                } else {
                    size
                };
                let segments = p.image(size);
                self.see(node, group, &Seen::Gave { view, state });
                let command = Command::State {
                    group,
                    view,
                    segments,
                };
                self.later(node, command);
            }
            GroupEvent::Message(m) => {
                if let Some(to) = m.call {
                    let body = chance(&mut self.rng, 800).then(|| Bytes::from_static(b"yes"));
                    self.later(node, Command::Reply { group, to, body });
                }
            }
            _ => {}
        }
    }

    /// A command from within the draining of outputs: it is carried out in the same drain.
    fn later(&mut self, node: usize, command: Command) {
        let now = Instant::from_micros(self.now);
        if let Some(process) = &mut self.nodes[node].process {
            // A member that is out by now has nobody to answer.
            let _ = process.command(now, &command);
        }
    }
}
