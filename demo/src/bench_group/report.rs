//! What was found, as a table and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::stats::{median, percentile, shown};

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figure {
    /// Its name in the JSON.
    pub(super) key: &'static str,
    pub(super) title: &'static str,
    pub(super) unit: &'static str,
    /// What it is compared with; empty: with nothing.
    pub(super) peer: &'static str,
    /// The project's goal, in words; may be empty.
    pub(super) goal: &'static str,
}

struct Row {
    figure: Figure,
    /// Ours and the peer's, by round.
    samples: Vec<(f64, Option<f64>)>,
}

/// All figures, in the order in which they were found.
#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// Adds what a round has found: ours, and the peer's of the same round.
    pub(super) fn add(&mut self, figure: Figure, ours: f64, peer: Option<f64>) {
        let place = self.rows.iter().position(|row| row.figure == figure);
        let place = place.unwrap_or_else(|| {
            let samples = Vec::new();
            self.rows.push(Row { figure, samples });
            self.rows.len() - 1
        });
        self.rows[place].samples.push((ours, peer));
    }

    /// Something that a reader should know.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<52}{:>10}{:>10}{:>8}  {}\n",
            "median of the rounds", "group", "peer", "ratio", "peer; goal"
        );
        for row in &self.rows {
            let title = format!("{} ({})", row.figure.title, row.figure.unit);
            let show = |value: Option<f64>| value.map_or("-".to_owned(), shown);
            let ratio = row.ratio().map_or(String::new(), |r| format!("x{r:.2}"));
            let notes = [row.figure.peer, row.figure.goal];
            let notes = notes.into_iter().filter(|note| !note.is_empty());
            let notes: Vec<_> = notes.collect();
            let _ = writeln!(
                text,
                "{title:<52}{:>10}{:>10}{ratio:>8}  {}",
                show(median(&row.ours())),
                if row.figure.peer.is_empty() {
                    String::new()
                } else {
                    show(median(&row.peers()))
                },
                notes.join("; ")
            );
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "key": row.figure.key,
                "title": row.figure.title,
                "unit": row.figure.unit,
                "group": {"median": median(&row.ours()), "rounds": row.ours()},
                "peer": row.figure.peer,
                "peers": {"median": median(&row.peers()), "rounds": row.peers()},
                "ratio": row.ratio(),
                "goal": row.figure.goal,
            })
        });
        json!({"figures": rows.collect::<Vec<_>>(), "notes": self.notes})
    }
}

impl Row {
    fn ours(&self) -> Vec<f64> {
        self.samples.iter().map(|(ours, _)| *ours).collect()
    }

    fn peers(&self) -> Vec<f64> {
        self.samples.iter().filter_map(|(_, peer)| *peer).collect()
    }

    /// Ours to the peer's, within each round, and then the median.
    fn ratio(&self) -> Option<f64> {
        let ratios = self.samples.iter();
        let ratios = ratios.filter_map(|(ours, peer)| Some(ours / (*peer)?));
        let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        median(&ratios)
    }
}

/// The value below which this share (of 1) of them lies, in microseconds of nanoseconds.
pub(super) fn percentile_us(times: &[u64], share: f64) -> f64 {
    let times: Vec<f64> = times.iter().map(|ns| micros(*ns)).collect();
    percentile(&times, share)
}

#[expect(clippy::cast_precision_loss, reason = "a figure to be shown")]
pub(super) fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIGURE: Figure = Figure {
        key: "rtt",
        title: "round trip",
        unit: "us",
        peer: "ping-pong",
        goal: "",
    };

    #[test]
    fn a_ratio_is_taken_within_each_round() {
        let mut report = Report::default();
        for (ours, peer) in [(10.0, 10.0), (30.0, 10.0), (40.0, 20.0)] {
            report.add(FIGURE, ours, Some(peer));
        }
        let alone = Figure {
            key: "alone",
            peer: "",
            ..FIGURE
        };
        report.add(alone, 1234.0, None);
        let json = report.json();
        assert_eq!(json["figures"][0]["ratio"], 2.0);
        assert_eq!(json["figures"][1]["ratio"], Value::Null);
        let table = report.table();
        assert!(table.contains("x2.00") && table.contains("1234"), "{table}");
    }
}
