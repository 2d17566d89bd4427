//! What is measured, and how.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use unbroken_tests::netns::{Host, Lab};

use super::iperf::{self, Over};
use super::link::Link;
use super::member::{Ask, now};
use super::report::{Figure, Report, micros, percentile_us};
use super::{Cores, Extent, LONG};
use crate::screen::show;

const fn figure(
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    peer: &'static str,
    goal: &'static str,
) -> Figure {
    Figure {
        key,
        title,
        unit,
        peer,
        goal,
    }
}

const ONE_WAY: &str = "UDP one way";
const ROUND_TRIP: &str = "UDP ping-pong";
const LATENCY: [Figure; 6] = [
    figure(
        "one_way_p50",
        "fbcast to 1, one way, p50",
        "us",
        ONE_WAY,
        "",
    ),
    figure("one_way_p99", "  p99", "us", ONE_WAY, ""),
    figure(
        "stable_p50",
        "fbcast to 1, stable, p50",
        "us",
        ROUND_TRIP,
        "x1.5",
    ),
    figure("stable_p99", "  stable, p99", "us", ROUND_TRIP, "x1.5"),
    figure(
        "stable_2_p50",
        "fbcast to 2, stable at all, p50",
        "us",
        ROUND_TRIP,
        "",
    ),
    figure("stable_2_p99", "  stable at all, p99", "us", ROUND_TRIP, ""),
];
const MESSAGES: [[Figure; 3]; 2] = [
    [
        figure(
            "messages_2",
            "messages of 100 B, 2 receivers",
            "1/s",
            "",
            "1,000,000",
        ),
        figure(
            "messages_2_sender",
            "  sender's CPU a message",
            "ns",
            "",
            "",
        ),
        figure(
            "messages_2_receiver",
            "  each receiver's CPU a message",
            "ns",
            "",
            "",
        ),
    ],
    [
        figure(
            "messages_4",
            "messages of 100 B, 4 receivers",
            "1/s",
            "",
            "1,000,000",
        ),
        figure(
            "messages_4_sender",
            "  sender's CPU a message, to 4",
            "ns",
            "",
            "",
        ),
        figure(
            "messages_4_receiver",
            "  each receiver's CPU a message, of 4",
            "ns",
            "",
            "",
        ),
    ],
];
const BYTES: [[Figure; 2]; 2] = [
    [
        figure(
            "bytes_2",
            "8 KiB messages, 2 receivers, to each",
            "MB/s",
            "iperf3 UDP",
            "",
        ),
        figure(
            "bytes_2_tcp",
            "  the same",
            "MB/s",
            "iperf3 TCP, unencrypted",
            "",
        ),
    ],
    [
        figure(
            "bytes_4",
            "8 KiB messages, 4 receivers, to each",
            "MB/s",
            "iperf3 UDP",
            "",
        ),
        figure(
            "bytes_4_tcp",
            "  the same to 4",
            "MB/s",
            "iperf3 TCP, unencrypted",
            "",
        ),
    ],
];
const LEAVE: Figure = figure("leave", "view change: a member leaves", "ms", "", "5");
const JOIN: Figure = figure("join", "view change: a member joins", "ms", "", "5");
const STOP: Figure = figure("stop", "view change: a node stops (on disk)", "ms", "", "5");
const START: Figure = figure("start", "a node starts and joins (on disk)", "ms", "", "");
const KILL: Figure = figure(
    "kill",
    "view change: a process is killed (on disk)",
    "ms",
    "",
    "",
);
const MANY: [Figure; 5] = [
    figure(
        "many_join",
        "groups of 3 joined by the third, all",
        "ms",
        "",
        "",
    ),
    figure(
        "many_memory",
        "  memory a group, in each process",
        "KiB",
        "",
        "",
    ),
    figure(
        "many_rate",
        "  messages of 100 B over all groups, 2 receivers",
        "1/s",
        "",
        "",
    ),
    figure("many_flood", "  the same, without waiting", "1/s", "", ""),
    figure(
        "many_leave",
        "  the process leaves all, each view without it",
        "ms",
        "",
        "",
    ),
];

/// Messages to each of many groups before all are waited for.
const OUTSTANDING: u64 = 4;

/// The benchmark under way.
pub(super) struct Bench<'a> {
    pub(super) lab: &'a Lab,
    /// In the order of their hosts, r1 first.
    pub(super) links: Vec<Link>,
    pub(super) members: BTreeMap<String, SocketAddr>,
    /// What starts a node.
    pub(super) start: Ask,
    pub(super) extent: &'a Extent,
    pub(super) spin: bool,
    pub(super) cores: Cores,
    pub(super) suspect_after_ms: u64,
    pub(super) report: Report,
}

impl Bench<'_> {
    fn host(&self, index: usize) -> &Host {
        self.lab.host(&self.links[index].name)
    }

    /// The first `count` members join a group.
    fn join(&mut self, group: &str, count: usize) -> Result<()> {
        let groups = vec![group.to_owned()];
        for link in &mut self.links[..count] {
            link.done(&Ask::Join {
                groups: groups.clone(),
                tasks: false,
            })?;
        }
        self.settle(&groups, count, count)
    }

    /// Waits until the first `of` members see so many in each group.
    fn settle(&mut self, groups: &[String], of: usize, members: usize) -> Result<()> {
        for link in &mut self.links[..of] {
            let groups = groups.to_vec();
            link.done(&Ask::Await { groups, members })?;
        }
        Ok(())
    }

    fn leave(&mut self, group: &str, count: usize) -> Result<()> {
        for link in &mut self.links[..count] {
            let group = group.to_owned();
            link.done(&Ask::Leave { group })?;
        }
        Ok(())
    }

    fn pin(&mut self, pinned: bool) -> Result<()> {
        for (index, link) in self.links.iter_mut().enumerate() {
            let core = match self.cores {
                Cores::Apart => Some(index),
                Cores::Same => Some(0),
                Cores::Any => None,
            };
            link.done(&Ask::Pin(core.filter(|_| pinned)))?;
        }
        Ok(())
    }

    // ---- latency -----------------------------------------------------------------------------------------------

    pub(super) fn latency(&mut self) -> Result<()> {
        self.join("pair", 2)?;
        self.join("three", 3)?;
        self.pin(true)?;
        let (count, bytes) = (self.extent.pings, 100);
        for round in 0..=self.extent.rounds {
            show(&format!("latency, round {round}"));
            let spin = self.spin;
            let to = self.members[&self.links[1].name];
            self.links[1].done(&Ask::Pong { spin })?;
            let rtt = self.links[0].times(&Ask::Ping {
                to,
                count,
                bytes,
                spin,
            })?;
            let there = self.links[1].times(&Ask::OneWay)?;
            let stable = |group: &str| Ask::Stable {
                group: group.to_owned(),
                count,
                bytes,
            };
            let pair = self.links[0].times(&stable("pair"))?;
            let one_way = self.links[1].times(&Ask::OneWay)?;
            let three = self.links[0].times(&stable("three"))?;
            for link in &mut self.links[..3] {
                link.times(&Ask::OneWay)?;
            }
            if round == 0 {
                continue; // warm now
            }
            for (pair_of, ours, peer) in
                [(0, &one_way, &there), (2, &pair, &rtt), (4, &three, &rtt)]
            {
                for (figure, share) in [(pair_of, 0.5), (pair_of + 1, 0.99)] {
                    let (ours, peer) = (percentile_us(ours, share), percentile_us(peer, share));
                    self.report.add(LATENCY[figure], ours, Some(peer));
                }
            }
        }
        self.pin(false)?;
        self.leave("pair", 2)?;
        self.leave("three", 3)
    }

    // ---- rates -------------------------------------------------------------------------------------------------

    pub(super) fn rates(&mut self) -> Result<()> {
        let iperf = iperf::is_there();
        if !iperf {
            let missing =
                "iperf3 was not measured: it is not there (Debian: apt-get install iperf3)";
            self.report.note(missing);
        }
        self.join("rate2", 3)?;
        self.join("rate4", 5)?;
        for round in 0..self.extent.rounds {
            for (which, receivers) in [2, 4].into_iter().enumerate() {
                show(&format!(
                    "rates, round {}, {receivers} receivers",
                    round + 1
                ));
                let group = format!("rate{receivers}");
                let small = self.flood(std::slice::from_ref(&group), 100, receivers, None)?;
                let [rate, sender, receiver] = MESSAGES[which];
                self.report.add(rate, small.per_second, None);
                self.report.add(sender, small.sender_ns, None);
                self.report.add(receiver, small.receiver_ns, None);
                let large = self.flood(&[group], 8192, receivers, None)?;
                let bytes = large.per_second * 8192.0 / 1e6;
                for (figure, over) in BYTES[which].into_iter().zip([Over::Udp, Over::Tcp]) {
                    let peer = iperf.then(|| {
                        let to: Vec<&Host> = (1..=receivers).map(|i| self.host(i)).collect();
                        let time = Duration::from_millis(self.extent.flood_ms.max(1000));
                        iperf::run(self.host(0), &to, over, time)
                    });
                    let peer = peer.transpose()?.map(|rate| rate / 1e6);
                    self.report.add(figure, bytes, peer);
                }
            }
        }
        self.leave("rate2", 3)?;
        self.leave("rate4", 5)
    }

    /// The first member sends, the next `receivers` take; measured until the last message was taken everywhere.
    #[expect(clippy::cast_precision_loss, reason = "figures to be shown")]
    fn flood(
        &mut self,
        groups: &[String],
        bytes: usize,
        receivers: usize,
        outstanding: Option<u64>,
    ) -> Result<Rate> {
        for link in &mut self.links {
            link.done(&Ask::Reset)?;
        }
        let sent = self.links[0].flood(&Ask::Flood {
            groups: groups.to_vec(),
            bytes,
            milliseconds: self.extent.flood_ms,
            outstanding,
        })?;
        let (mut last, mut cpu) = (0, 0);
        for link in &mut self.links[1..=receivers] {
            let began = Instant::now();
            let counted = loop {
                let counted = link.count()?;
                if counted.messages >= sent.messages {
                    break counted;
                }
                ensure!(began.elapsed() < LONG, "messages are missing: {counted:?}");
                thread::sleep(Duration::from_millis(1));
            };
            ensure!(
                counted.messages == sent.messages && counted.bytes == sent.messages * bytes as u64,
                "{} took {counted:?} of {sent:?}",
                link.name
            );
            last = last.max(counted.last);
            cpu += counted.cpu;
        }
        let messages = sent.messages as f64;
        Ok(Rate {
            per_second: messages * 1e9 / (last - sent.began) as f64,
            sender_ns: sent.cpu as f64 / messages,
            receiver_ns: cpu as f64 / messages / receivers as f64,
        })
    }

    // ---- many groups -------------------------------------------------------------------------------------------

    #[expect(clippy::cast_precision_loss, reason = "figures to be shown")]
    pub(super) fn many(&mut self) -> Result<()> {
        let count = self.extent.groups;
        let groups: Vec<String> = (0..count).map(|i| format!("many{i}")).collect();
        let before = self.links[2].resident()?;
        for member in 0..3 {
            show(&format!("{count} groups, member {}", member + 1));
            let began = now();
            let join = Ask::Join {
                groups: groups.clone(),
                tasks: true,
            };
            self.links[member].done(&join)?;
            self.settle(&groups, member + 1, member + 1)?;
            if member == 2 {
                self.report.add(MANY[0], micros(now() - began) / 1e3, None);
            }
        }
        let after = self.links[2].resident()?;
        let each = after.saturating_sub(before) as f64 / count as f64 / 1024.0;
        self.report.add(MANY[1], each, None);
        for round in 0..self.extent.rounds {
            show(&format!("{count} groups, round {}", round + 1));
            let rate = self.flood(&groups, 100, 2, Some(OUTSTANDING))?;
            self.report.add(MANY[2], rate.per_second, None);
            let rate = self.flood(&groups, 100, 2, None)?;
            self.report.add(MANY[3], rate.per_second, None);
        }
        // Its node stops: one change of the view of sites, and of each group's.
        let began = now();
        self.links[2].done(&Ask::Stop)?;
        self.settle(&groups, 2, 2)?;
        self.report.add(MANY[4], micros(now() - began) / 1e3, None);
        let start = &self.start;
        self.links[2].done(start)?;
        for link in &mut self.links[..2] {
            for group in &groups {
                let group = group.clone();
                link.tell(&Ask::Leave { group })?;
                link.wait()?;
            }
        }
        Ok(())
    }

    // ---- views -------------------------------------------------------------------------------------------------

    /// The third of three members changes; what counts is when the last of the others takes the new view.
    pub(super) fn views(&mut self) -> Result<()> {
        self.join("views", 3)?;
        for round in 0..self.extent.changes {
            show(&format!(
                "view changes, {} of {}",
                round + 1,
                self.extent.changes
            ));
            let group = "views".to_owned();
            let leave = Ask::Leave { group };
            let began = self.links[2].done(&leave)?.0;
            self.change(LEAVE, began, 2)?;
            let join = Ask::Join {
                groups: vec!["views".to_owned()],
                tasks: false,
            };
            let began = self.links[2].done(&join)?.0;
            self.change(JOIN, began, 3)?;
            let began = self.links[2].done(&Ask::Stop)?.0;
            self.change(STOP, began, 2)?;
            let began = self.links[2].done(&self.start)?.0;
            self.links[2].done(&join)?;
            self.change(START, began, 3)?;
        }
        // It has just started, and members look for its control connection every 20 ms: the hint of its death is the end of one.
        thread::sleep(Duration::from_millis(100));
        let began = now();
        self.links[2].kill()?;
        self.change(KILL, began, 2)?;
        self.report.note(format!(
            "killed: the end of its control connections hints at the death at once; where that is missing, after {} ms of \
             silence",
            self.suspect_after_ms
        ));
        Ok(())
    }

    /// How long after `began` the first two members had a view of so many.
    fn change(&mut self, figure: Figure, began: u64, members: usize) -> Result<()> {
        let mut last = 0;
        for link in &mut self.links[..2] {
            let waited = Instant::now();
            let at = loop {
                let views = link.views("views")?;
                let view = views.iter().find(|v| v.at >= began && v.members == members);
                if let Some(view) = view {
                    break view.at;
                }
                ensure!(waited.elapsed() < LONG, "no view of {members}: {views:?}");
                thread::sleep(Duration::from_millis(1));
            };
            last = last.max(at);
        }
        let took = last.checked_sub(began).context("clocks differ")?;
        self.report.add(figure, micros(took) / 1e3, None);
        Ok(())
    }
}

struct Rate {
    per_second: f64,
    sender_ns: f64,
    receiver_ns: f64,
}
