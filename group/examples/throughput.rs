//! How much the group carries: three members on loopback, the leader sends as fast as its window lets it.
//!
//! `cargo run --release -p unbroken-group --example throughput`

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "as in a test"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Cluster, Member, until};
use std::time::{Duration, Instant};
use unbroken_group::Role;

fn main() {
    println!("{:>10} {:>12} {:>10}", "bytes", "events/s", "Gb/s");
    for bytes in [64usize, 1024, 16_384, 65_536] {
        let cluster = Cluster::new(3, bytes, u64::MAX);
        let start = |i: u8| cluster.start(&format!("r{i}"), u128::from(i));
        let mut members: Vec<Member> = (1..=3u8).map(start).collect();
        until("three full members", || {
            members.iter().all(|m| m.seen().full == 3)
        });
        let leads = |m: &Member| m.seen().role == Some(Role::Leader);
        let leader = members.iter().position(leads).expect("somebody leads");
        let (before, began) = (members[leader].seen().stable, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let (after, took) = (members[leader].seen().stable, began.elapsed().as_secs_f64());
        let rate = (after - before) as f64 / took;
        println!(
            "{bytes:>10} {rate:>12.0} {:>10.2}",
            rate * bytes as f64 * 8.0 / 1e9
        );
        for m in &mut members {
            println!("           {:?}", m.seen().counters);
            m.kill();
        }
    }
}
