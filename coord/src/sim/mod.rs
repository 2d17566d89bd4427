//! Whole clusters under a virtual clock: the real core, log and snapshots, and everything around them
//! simulated. One seed is one run.
//!
//! A run is a storm of faults, then peace. What the clients were told, and the order that the servers
//! applied, is then judged as a whole: see `check`.

mod check;
mod client;
mod disk;
mod history;
mod model;
mod plan;
mod random;
mod server;
mod told;
mod world;

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use self::check::Report;
use self::model::Model;
pub use self::world::Happened;
use self::world::World;
use crate::tree::CONFIG_PATH;
use crate::txn::State;

/// What a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// What was checked.
    pub report: Report,
    /// What went wrong around it.
    pub happened: Happened,
    /// A checksum of everything that happened, and when.
    pub digest: u32,
}

impl Summary {
    /// The sum of two; the digest stays.
    pub fn add(&mut self, other: &Self) {
        let (a, b) = (&mut self.report, &other.report);
        a.updates += b.updates;
        a.unknown += b.unknown;
        a.unknown_done += b.unknown_done;
        a.reads += b.reads;
        a.syncs += b.syncs;
        a.events += b.events;
        a.caught_up += b.caught_up;
        a.expired += b.expired;
        let (a, b) = (&mut self.happened, &other.happened);
        a.stops += b.stops;
        a.snapshots_installed += b.snapshots_installed;
        a.disk_failures += b.disk_failures;
        a.damaged += b.damaged;
        a.harmless += b.harmless;
        a.resumed += b.resumed;
        a.leaders += b.leaders;
    }
}

/// Runs one seed and checks everything. With `trace`, prints what happens.
///
/// # Errors
/// The first promise that was broken, or the panic that ended it.
pub fn run(seed: u64, trace: bool) -> Result<Summary, String> {
    let run = AssertUnwindSafe(|| whole(seed, trace));
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn whole(seed: u64, trace: bool) -> Result<Summary, String> {
    let world = played(seed, trace)?;
    let (model, report) = check::check(&world.history)?;
    check_end(&world, &model)?;
    Ok(Summary {
        report,
        happened: world.happened,
        digest: world.history.digest(),
    })
}

/// The storm, and the peace after it.
fn played(seed: u64, trace: bool) -> Result<World, String> {
    let mut world = World::new(seed, trace)?;
    let (storm, peace) = (world.plan.storm_us, world.plan.peace_us);
    world.go(storm)?;
    world.calm();
    world.go(storm + peace)?;
    // An entry may just be on its way (a session that expires); it does not stay so.
    for more in 1..=80 {
        if world.in_step() && world.clients.values().all(client::Client::is_content) {
            break;
        }
        world.go(storm + peace + more * 25_000)?;
    }
    Ok(world)
}

/// After the peace: all agree, everybody is served, and nothing that was promised is missing.
fn check_end(world: &World, model: &Model) -> Result<(), String> {
    if !world.in_step() {
        return Err("the servers do not come together in peace".into());
    }
    for (id, server) in &world.servers {
        let Some(core) = &server.core else { continue };
        let state = core.state();
        state.tree.check_invariants();
        same_state(model, state).map_err(|error| format!("server {id}: {error}"))?;
        if state.zxid != world.history.log.len() as u64 {
            return Err(format!(
                "server {id} ends at {}, and more was applied",
                state.zxid
            ));
        }
    }
    match world.clients.values().find(|client| !client.is_content()) {
        Some(client) => Err(format!("nobody serves {}", client.describe())),
        None => Ok(()),
    }
}

fn same_state(model: &Model, state: &State) -> Result<(), String> {
    for (path, znode) in state.tree.iter() {
        // It tells who the servers are.
        if path == CONFIG_PATH {
            continue;
        }
        let Some(node) = model.nodes.get(path) else {
            return Err(format!("{path} is there and should not be"));
        };
        if node.data.as_deref() != znode.data.as_deref() || node.stat != znode.stat() {
            return Err(format!("{path} is {znode:?} and should be {node:?}"));
        }
    }
    if state.tree.len() != model.nodes.len() {
        return Err("znodes are missing".into());
    }
    let there = state
        .sessions
        .iter()
        .map(|(id, s)| (id.0, s.timeout_ms, s.attached));
    let right = model
        .sessions
        .iter()
        .map(|(id, s)| (*id, s.timeout_ms, s.attached));
    if there.eq(right) {
        Ok(())
    } else {
        Err("the sessions are not those that should be there".into())
    }
}
