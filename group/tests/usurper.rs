//! R2 when a lone leader is usurped: its last renewal may have come just before it lost its view, so nobody speaks, and
//! nobody is helped to speak, until that lease is over (the model in `tests/model` found both ways).

#![expect(clippy::expect_used, reason = "helpers of tests")]

use bytes::Bytes;
use std::time::Duration;
use unbroken_group::{
    CasResult, Command, Config, ControlEvent, Core, Instant, MemberId, Output, ReadResult,
    RegistryReply, View, ViewId,
};

/// The coordinator's two nodes.
struct Registry {
    view: (Bytes, i32),
    lease: Option<(Bytes, i32)>,
}

impl Registry {
    /// `n1` is alone in its view.
    fn with_lone_leader() -> Self {
        let view = View {
            instance: 1,
            generation: 1,
            id: ViewId(7),
            full: vec![MemberId::new("n1", 1)],
            joining: Vec::new(),
            k: 0,
            lease_us: 400_000,
            clock_us: 0,
            cut: 10,
            proposal: 3,
        };
        Self {
            view: (Bytes::from(view.encode()), 1),
            lease: Some((Bytes::from_static(b"unchanged"), 1)),
        }
    }

    fn read(&self) -> View {
        View::decode(&self.view.0).expect("a view")
    }

    fn answer(&mut self, output: &Output) -> Option<RegistryReply> {
        let value = |(value, version): (Bytes, i32)| ReadResult::Value { value, version };
        Some(match output {
            Output::ReadView => RegistryReply::View(value(self.view.clone())),
            Output::ReadLease => {
                let lease = self.lease.clone();
                RegistryReply::Lease(lease.map_or(ReadResult::Absent, value))
            }
            Output::CompareAndSet {
                expected_version,
                value,
            } => RegistryReply::Cas(if *expected_version == Some(self.view.1) {
                self.view = (value.clone(), self.view.1 + 1);
                CasResult::Written {
                    version: self.view.1,
                }
            } else {
                CasResult::BadVersion
            }),
            Output::RenewLease {
                view_version,
                value,
            } => RegistryReply::Renew(if *view_version == self.view.1 {
                self.lease = Some((value.clone(), 2));
                CasResult::Written { version: 2 }
            } else {
                CasResult::BadVersion
            }),
            _ => return None,
        })
    }
}

struct Node {
    core: Core,
    wedged: bool,
}

impl Node {
    fn seeking(name: &str, now: Instant) -> Self {
        let me = MemberId::new(name, 1);
        let members = ["n1", "n2", "n3"].map(String::from).to_vec();
        let mut core = Core::new(Config::new(1, me, members, 9), 5, now);
        core.handle_command(now, Command::Join).expect("is idle");
        Self {
            core,
            wedged: false,
        }
    }

    /// Runs the timers and answers what is asked of the coordinator. Gives what was sent to whom.
    fn turn(&mut self, now: Instant, registry: &mut Registry) -> Vec<(MemberId, Bytes)> {
        self.core.handle_timeout(now);
        let mut sent = Vec::new();
        while let Some(output) = self.core.poll_output() {
            if let Some(reply) = registry.answer(&output) {
                self.core.handle_registry(now, reply);
            }
            self.wedged |= matches!(output, Output::Wedged);
            if let Output::Send { to, bodies } = output {
                for m in to.iter() {
                    sent.extend(bodies.iter().map(|b| (m.clone(), b.clone())));
                }
            }
        }
        sent
    }
}

/// Ends with `n2`'s generation in the registry, just written; gives the time.
fn usurped(registry: &mut Registry) -> (Node, Instant) {
    let mut now = Instant::from_micros(1_000_000);
    let mut n2 = Node::seeking("n2", now);
    for _ in 0..1000 {
        now += Duration::from_millis(2);
        n2.turn(now, registry);
        if registry.read().generation == 2 {
            return (n2, now);
        }
    }
    panic!("nobody usurped the silent leader");
}

/// The lease of `n1`, and the margin for its clock.
const LEASE_AND_MARGIN: Duration = Duration::from_millis(441);

#[test]
fn the_successor_of_a_dead_usurper_waits_as_well() {
    let mut registry = Registry::with_lone_leader();
    let (n2, mut now) = usurped(&mut registry);
    assert!(!n2.core.may_emit(now));
    let usurped_at = now;
    let mut n3 = Node::seeking("n3", now);
    n3.turn(now, &mut registry);
    now += Duration::from_millis(5);
    let refused = ControlEvent::Refused { since: now };
    n3.core.handle_control(now, "n2", refused);
    let mut spoke_at = None;
    for _ in 0..500 {
        n3.turn(now, &mut registry);
        if n3.core.may_emit(now) {
            spoke_at.get_or_insert(now);
        }
        now += Duration::from_millis(2);
    }
    assert_eq!(registry.read().generation, 3);
    let spoke_at = spoke_at.expect("it speaks in the end");
    assert!(spoke_at.since(usurped_at) >= LEASE_AND_MARGIN);
}

#[test]
fn a_usurper_leaves_its_view_only_after_its_wait() {
    let mut registry = Registry::with_lone_leader();
    let (mut n2, mut now) = usurped(&mut registry);
    let usurped_at = now;
    let mut n3 = Node::seeking("n3", now);
    let mut left_at = None;
    for _ in 0..500 {
        for (to, body) in n3.turn(now, &mut registry) {
            assert_eq!(&to, n2.core.me());
            n2.core.handle_datagram(now, n3.core.me(), &body);
        }
        n2.turn(now, &mut registry);
        if n2.wedged {
            left_at = Some(now);
            break;
        }
        now += Duration::from_millis(2);
    }
    let left_at = left_at.expect("it lets the other join in the end");
    assert!(left_at.since(usurped_at) >= LEASE_AND_MARGIN);
}
