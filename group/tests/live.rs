//! Three members on loopback, with real sockets: they come together, the leader dies, nothing stable is lost.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "helpers of tests"
)]

mod common;

use common::{Cluster, Member, Seen, until};
use unbroken_group::Role;

fn together(members: &[&Member]) -> bool {
    let seen: Vec<Seen> = members.iter().map(|m| m.seen()).collect();
    seen.iter()
        .all(|s| s.full == members.len() && s.view == seen[0].view)
}

#[test]
fn a_leaders_death_loses_nothing_that_was_stable() {
    let cluster = Cluster::new(3, 300, 100_000);
    let mut members: Vec<Member> = (1..=3u8)
        .map(|i| cluster.start(&format!("r{i}"), u128::from(i)))
        .collect();
    until("three full members", || {
        together(&members.iter().collect::<Vec<_>>())
    });
    let leader = members
        .iter()
        .position(|m| m.seen().role == Some(Role::Leader))
        .expect("somebody leads");
    until("some events are stable", || {
        members[leader].seen().stable > 3000
    });
    let killed_at = cluster.started.elapsed().as_micros();
    members[leader].kill();
    let last = members[leader].seen();
    let mut rest = members;
    rest.remove(leader);
    until("the others go on", || {
        together(&rest.iter().collect::<Vec<_>>())
    });
    let view = rest[0].seen();
    println!(
        "new view {} us after the kill",
        u128::from(view.installed_us).saturating_sub(killed_at)
    );
    until("all events are held", || {
        rest.iter().all(|m| m.seen().applied == 100_000)
    });
    let (a, b) = (rest[0].seen(), rest[1].seen());
    assert_eq!(a.digest, b.digest, "the same events in the same order");
    assert!(a.applied >= last.stable);
    // The model's events depend on their number alone, so what a single sender would have made is known.
    let whole = (1..=100_000u64).fold(0, |d, n| {
        common::fold(d, n, &[u8::try_from(n % 251).unwrap(); 300])
    });
    assert_eq!(a.digest, whole);
    for m in &mut rest {
        m.kill();
    }
}

#[test]
fn a_restarted_member_gets_the_state_and_the_events_since() {
    let cluster = Cluster::new(3, 5000, 30_000);
    let mut members: Vec<Member> = (1..=3u8)
        .map(|i| cluster.start(&format!("r{i}"), u128::from(i)))
        .collect();
    until("three full members", || {
        together(&members.iter().collect::<Vec<_>>())
    });
    let victim = members
        .iter()
        .position(|m| m.seen().role == Some(Role::Backup))
        .expect("somebody follows");
    members[victim].kill();
    let name = format!("r{}", victim + 1);
    members[victim] = cluster.start(&name, 77);
    until("three full members again", || {
        together(&members.iter().collect::<Vec<_>>())
    });
    until("all hold all", || {
        members.iter().all(|m| m.seen().applied == 30_000)
    });
    let digests: Vec<u64> = members.iter().map(|m| m.seen().digest).collect();
    assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
    for m in &mut members {
        m.kill();
    }
}
