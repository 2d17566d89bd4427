//! What it all came to: one screen for people, or JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::args::Coordinator;
use crate::drill::{Fault, Kind};
use crate::pace::seconds;
use crate::traffic::{Client, Outcome, Unit};

/// The whole report.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) passed: bool,
    /// Why not.
    pub(crate) failure: Option<String>,
    /// `unbroken-demo --seed` with it does the same again.
    pub(crate) seed: u64,
    pub(crate) replicas: Vec<String>,
    pub(crate) coordinator: Coordinator,
    pub(crate) seconds: f64,
    pub(crate) faults: Vec<FaultReport>,
    pub(crate) clients: Vec<ClientReport>,
    /// The picture's file.
    pub(crate) picture: Option<String>,
}

/// One fault.
#[derive(Debug, Serialize)]
pub(crate) struct FaultReport {
    /// Since the clients started.
    pub(crate) at_ms: u64,
    pub(crate) kind: Kind,
    pub(crate) victim: String,
    pub(crate) old_view: u64,
    pub(crate) new_view: u64,
    pub(crate) new_leader: String,
    /// Until the new leader said that it leads; read every 10 ms.
    pub(crate) new_view_after_ms: u64,
    /// Until all replicas were full members again, the victim's time off included.
    pub(crate) whole_after_ms: u64,
    /// Each client's longest gap between the fault and the end of the rejoin, in the clients' order.
    pub(crate) longest_gap_ms: Vec<Option<f64>>,
}

/// One client.
#[derive(Debug, Serialize)]
pub(crate) struct ClientReport {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    /// Done, and found right.
    pub(crate) verified: u64,
    pub(crate) size: Option<u64>,
    /// Of all that was verified; none where it did not come to its end.
    pub(crate) sha256: Option<String>,
    pub(crate) error: Option<String>,
    pub(crate) longest_gap_ms: Option<f64>,
}

fn ms(us: u64) -> f64 {
    seconds(us) * 1e3
}

/// Each fault with what the clients noticed of it. `from_us` is when the clients started.
pub(crate) fn faults(faults: &[Fault], clients: &[Client], from_us: u64) -> Vec<FaultReport> {
    let series: Vec<_> = clients.iter().map(Client::series).collect();
    faults
        .iter()
        .map(|fault| FaultReport {
            at_ms: (fault.at_us - from_us) / 1_000,
            kind: fault.kind,
            victim: fault.victim.clone(),
            old_view: fault.old_view,
            new_view: fault.new_view,
            new_leader: fault.new_leader.clone(),
            new_view_after_ms: (fault.led_us - fault.at_us) / 1_000,
            whole_after_ms: (fault.whole_us - fault.at_us) / 1_000,
            longest_gap_ms: series
                .iter()
                .map(|series| series.longest_gap(fault.at_us, fault.whole_us))
                .map(|gap| gap.map(|gap| ms(gap.length_us)))
                .collect(),
        })
        .collect()
}

/// Sums the clients up.
pub(crate) fn clients(clients: &[Client], from_us: u64) -> Vec<ClientReport> {
    clients
        .iter()
        .map(|client| {
            let series = client.series();
            let (sha256, error) = match client.outcome() {
                Some(Outcome::Done { sha256 }) => (Some(sha256), None),
                Some(Outcome::Failed { reason }) => (None, Some(reason)),
                None => (None, None),
            };
            // Up to its own end: what comes after is no gap.
            let end_us = series.last_us().unwrap_or(from_us);
            ClientReport {
                name: client.name,
                unit: client.unit,
                verified: series.total(),
                size: client.size,
                sha256,
                error,
                longest_gap_ms: series
                    .longest_gap(from_us, end_us)
                    .map(|gap| ms(gap.length_us)),
            }
        })
        .collect()
}

impl Report {
    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a string takes everything");
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let agreement = match self.coordinator {
            Coordinator::Builtin => "",
            Coordinator::Apache => " that agree by Apache ZooKeeper",
        };
        writeln!(
            out,
            "\n{} replicas{agreement}, seed {}, {:.1} s\n",
            self.replicas.len(),
            self.seed,
            self.seconds
        )?;
        if !self.faults.is_empty() {
            let names: String = self
                .clients
                .iter()
                .map(|client| format!(" {:>9}", client.name))
                .collect();
            writeln!(out, "{:56}longest gap, ms", "")?;
            writeln!(
                out,
                "    at     leader's fault  view      new leader   whole {names}"
            )?;
        }
        for fault in &self.faults {
            let gaps: String = fault.longest_gap_ms.iter().map(|gap| cell(*gap)).collect();
            writeln!(
                out,
                "{:>6.1} s  {:<3}{:<13}{:>3} -> {:<3} {:<3}{:>6} ms {:>6.1} s {gaps}",
                seconds(fault.at_ms * 1_000),
                fault.victim,
                fault.kind.to_string(),
                fault.old_view,
                fault.new_view,
                fault.new_leader,
                fault.new_view_after_ms,
                seconds(fault.whole_after_ms * 1_000),
            )?;
        }
        if !self.clients.is_empty() {
            writeln!(out)?;
        }
        for client in &self.clients {
            let count = grouped(client.verified);
            let what = match client.unit {
                Unit::Bytes => "bytes",
                Unit::Requests => "answers",
            };
            let verdict = match (&client.sha256, &client.error) {
                (_, Some(error)) => error.clone(),
                (Some(sha256), None) => format!("all right, SHA-256 {:.12}...", sha256),
                (None, None) => "not finished".to_owned(),
            };
            let gap = client
                .longest_gap_ms
                .map_or(String::new(), |gap| format!("{gap:.0} ms"));
            writeln!(
                out,
                "{:<9} {count:>12} {what:<8}{verdict}; longest gap {gap}",
                client.name
            )?;
        }
        if let Some(picture) = &self.picture {
            writeln!(out, "\npicture: {picture}")?;
        }
        match &self.failure {
            None => writeln!(out, "\nPASS"),
            Some(failure) => writeln!(out, "\nFAIL: {failure}"),
        }
    }
}

fn cell(gap: Option<f64>) -> String {
    gap.map_or(format!(" {:>9}", "-"), |gap| format!(" {gap:>9.0}"))
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let texts = [0, 999, 1_000, 220_000_000].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "220,000,000"]);
    }

    fn sample() -> Report {
        Report {
            passed: true,
            failure: None,
            seed: 42,
            replicas: vec!["r1".into(), "r2".into(), "r3".into()],
            coordinator: Coordinator::Builtin,
            seconds: 41.26,
            faults: vec![FaultReport {
                at_ms: 3_210,
                kind: Kind::Cable,
                victim: "r1".into(),
                old_view: 9,
                new_view: 10,
                new_leader: "r2".into(),
                new_view_after_ms: 71,
                whole_after_ms: 4_300,
                longest_gap_ms: vec![Some(83.4), None],
            }],
            clients: vec![ClientReport {
                name: "curl",
                unit: Unit::Bytes,
                verified: 220_000_000,
                size: Some(220_000_000),
                sha256: Some("0123456789abcdef0123456789abcdef".into()),
                error: None,
                longest_gap_ms: Some(83.4),
            }],
            picture: None,
        }
    }

    #[test]
    fn a_report_for_people() {
        let text = sample().text();
        let wanted =
            "   3.2 s  r1 cable pulled   9 -> 10  r2     71 ms    4.3 s         83         -";
        assert!(text.contains(wanted), "{text}");
        assert!(text.contains("220,000,000 bytes   all right, SHA-256 0123456789ab..."));
        assert!(text.ends_with("\nPASS\n"));
        assert!(text.lines().all(|line| line.len() <= 90), "{text}");
        let failed = Report {
            passed: false,
            failure: Some("curl: byte 7 is wrong".into()),
            ..sample()
        };
        assert!(failed.text().ends_with("\nFAIL: curl: byte 7 is wrong\n"));
    }

    #[test]
    fn a_report_for_programs() {
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(json["passed"], true);
        assert_eq!(json["faults"][0]["kind"], "cable");
        assert_eq!(json["clients"][0]["verified"], 220_000_000);
    }
}
