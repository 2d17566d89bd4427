//! The script: clients start, the leader dies again and again, the cable goes, everything is counted.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde::Serialize;
use unbroken_tests::netns::Lab;

use crate::cluster::Cluster;
use crate::pace::{now_us, seconds};
use crate::payload::mix;
use crate::screen::Screen;
use crate::traffic::{Client, Outcome};

/// A client that makes no progress for so long has failed.
const NO_PROGRESS_US: u64 = 30_000_000;

/// How long the cable stays out.
const CABLE_OUT_US: u64 = 2_000_000;

/// How long the cluster may take to be whole, at the start and after a fault.
const WHOLE_WAIT_US: u64 = 60_000_000;

/// How long the others may take to have a new leader. Clients would have failed before.
const VIEW_WAIT_US: u64 = 35_000_000;

/// How long a killed machine stays off.
const OFF_US: u64 = 500_000;

/// How long the clients flow before and after the faults.
const QUIET_US: u64 = 1_000_000;

/// How often things are looked at.
const TICK: Duration = Duration::from_millis(20);

/// What happens to the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Every process of its machine is killed; started again afterwards.
    Kill,
    /// Its cable is pulled for two seconds.
    Cable,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "SIGKILL",
            Self::Cable => "cable pulled",
        })
    }
}

/// A fault that is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) kind: Kind,
    /// After the cluster was whole, in microseconds.
    pub(crate) after_us: u64,
}

/// The faults that a seed stands for: `kills` kills at random moments, then the cable.
pub(crate) fn plan(seed: u64, kills: u32) -> Vec<Planned> {
    let moment = |index: u32| 300_000 + mix(mix(seed) ^ u64::from(index)) % 1_700_000;
    let kill = |index| Planned {
        kind: Kind::Kill,
        after_us: moment(index),
    };
    let cable = Planned {
        kind: Kind::Cable,
        after_us: moment(kills),
    };
    let last = (kills > 0).then_some(cable);
    (0..kills).map(kill).chain(last).collect()
}

/// A fault that happened. Times are of the monotonic clock, in microseconds.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) victim: String,
    pub(crate) at_us: u64,
    /// The view that the victim led.
    pub(crate) old_view: u64,
    pub(crate) new_view: u64,
    pub(crate) new_leader: String,
    /// When the new leader was first seen leading.
    pub(crate) led_us: u64,
    /// When all replicas were full members again.
    pub(crate) whole_us: u64,
}

/// Runs the drill, keeping what it saw even if it fails.
pub(crate) struct Drill<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) cluster: &'a mut Cluster,
    pub(crate) clients: &'a mut Vec<Client>,
    pub(crate) screen: &'a mut Screen,
    pub(crate) interrupted: &'a AtomicBool,
    /// Seconds over which transfers are spread while faults are to come.
    pub(crate) spread: u64,
    pub(crate) faults: Vec<Fault>,
    /// When the faults were over and the clients were let go.
    pub(crate) released_us: Option<u64>,
}

impl Drill<'_> {
    /// Starts every replica and waits until the cluster is whole.
    pub(crate) fn bring_up(&mut self) -> Result<()> {
        for name in self.cluster.names() {
            self.cluster.start(&name)?;
            self.check_interrupt()?;
        }
        self.until_whole(now_us())
    }

    /// Faults, one after the other; then the clients' ends.
    pub(crate) fn run(&mut self, plan: &[Planned]) -> Result<()> {
        self.screen.say("clients running");
        self.pass(QUIET_US)?;
        for planned in plan {
            self.pass(planned.after_us)?;
            self.strike(planned.kind)?;
        }
        self.pass(QUIET_US)?;
        self.released_us = Some(now_us());
        self.screen
            .say("faults over; the clients come to their ends");
        for client in self.clients.iter_mut() {
            client.finish();
        }
        while self.clients.iter().any(|client| client.outcome().is_none()) {
            self.tick()?;
        }
        Ok(())
    }

    fn strike(&mut self, kind: Kind) -> Result<()> {
        let (victim, old_view) = self.leader()?;
        let at_us = now_us();
        match kind {
            Kind::Kill => {
                self.lab.kill_host(&victim)?;
                self.cluster.forget(&victim);
            }
            Kind::Cable => self.lab.cut(&victim)?,
        }
        self.screen
            .say(format!("{kind}: {victim}, leader of view {old_view}"));
        let sighting = loop {
            if let Some(sighting) = self.cluster.new_leader(at_us, old_view, &victim) {
                break sighting;
            }
            if now_us() > at_us + VIEW_WAIT_US {
                bail!(
                    "no new leader {} s after the fault",
                    VIEW_WAIT_US / 1_000_000
                );
            }
            self.tick()?;
        };
        self.screen.say(format!(
            "{} leads view {} after {} ms",
            sighting.by,
            sighting.view,
            (sighting.at_us - at_us) / 1_000
        ));
        match kind {
            Kind::Kill => {
                self.until(at_us + OFF_US)?;
                self.cluster.start(&victim)?;
            }
            Kind::Cable => {
                self.until(at_us + CABLE_OUT_US)?;
                self.lab.plug(&victim)?;
            }
        }
        self.until_whole(now_us())?;
        let whole_us = now_us();
        self.screen.say(format!(
            "{victim} is full again after {:.1} s",
            seconds(whole_us - at_us)
        ));
        self.faults.push(Fault {
            kind,
            victim,
            at_us,
            old_view,
            new_view: sighting.view,
            new_leader: sighting.by,
            led_us: sighting.at_us,
            whole_us,
        });
        Ok(())
    }

    /// The leader and its view. A busy machine may keep a node's page from answering for a while.
    fn leader(&mut self) -> Result<(String, u64)> {
        let from_us = now_us();
        loop {
            if let Some(leader) = self.cluster.leader() {
                return Ok(leader);
            }
            if now_us() > from_us + VIEW_WAIT_US {
                bail!("nobody leads for {} s", VIEW_WAIT_US / 1_000_000);
            }
            self.tick()?;
        }
    }

    fn until_whole(&mut self, from_us: u64) -> Result<()> {
        loop {
            let Err(why) = self.cluster.whole() else {
                return Ok(());
            };
            self.screen.waiting_for(&why);
            if now_us() > from_us + WHOLE_WAIT_US {
                bail!(
                    "the cluster is not whole after {} s: {why}",
                    WHOLE_WAIT_US / 1_000_000
                );
            }
            self.tick()?;
        }
    }

    fn pass(&mut self, time_us: u64) -> Result<()> {
        self.until(now_us() + time_us)
    }

    fn until(&mut self, moment_us: u64) -> Result<()> {
        while now_us() < moment_us {
            self.tick()?;
        }
        Ok(())
    }

    /// A moment passes: paces, shows and judges.
    fn tick(&mut self) -> Result<()> {
        thread::sleep(TICK);
        self.check_interrupt()?;
        let now = now_us();
        for client in self.clients.iter_mut() {
            let name = client.name;
            match client.outcome() {
                Some(Outcome::Failed { reason }) => return Err(anyhow!("{name}: {reason}")),
                Some(Outcome::Done { .. }) => continue,
                None => {}
            }
            if now > client.last_progress_us() + NO_PROGRESS_US {
                bail!("{name}: no progress for {} s", NO_PROGRESS_US / 1_000_000);
            }
            if self.released_us.is_none() {
                client.spread(self.spread);
            }
        }
        self.screen.draw(now, self.clients);
        if let Some(fallen) = self.cluster.fallen() {
            bail!("{fallen}");
        }
        Ok(())
    }

    fn check_interrupt(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!(Interrupted);
        }
        Ok(())
    }
}

/// Somebody pressed Ctrl-C.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_plan() {
        assert_eq!(plan(1, 3), plan(1, 3));
        assert_ne!(plan(1, 3), plan(2, 3));
        let kinds: Vec<Kind> = plan(1, 3).iter().map(|planned| planned.kind).collect();
        assert_eq!(kinds, [Kind::Kill, Kind::Kill, Kind::Kill, Kind::Cable]);
        assert_eq!(plan(1, 0), []);
    }
}
