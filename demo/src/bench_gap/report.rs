//! What was found, as a table and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::stats::{percentile, shown};

/// The shares of the faults that a line shows, and what they are called.
const SHARES: [(f64, &str); 4] = [(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (1.0, "max")];

/// What a line shall stay under, by the name of its share, in milliseconds.
pub(super) type Goals = &'static [(&'static str, f64)];

struct Row {
    key: String,
    title: String,
    goals: Goals,
    /// Milliseconds, one of each fault.
    gaps: Vec<f64>,
}

/// All lines, in the order in which they were found.
#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// Adds what one fault did, in microseconds.
    pub(super) fn add(&mut self, key: &str, title: &str, goals: Goals, gap_us: u64) {
        let place = self.rows.iter().position(|row| row.key == key);
        let place = place.unwrap_or_else(|| {
            self.rows.push(Row {
                key: key.to_owned(),
                title: title.to_owned(),
                goals,
                gaps: Vec::new(),
            });
            self.rows.len() - 1
        });
        self.rows[place].gaps.push(crate::pace::float(gap_us) / 1e3);
    }

    /// Something that a reader should know.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!("{:<58}{:>7}", "what a client waited, in ms", "times");
        for (_, name) in SHARES {
            let _ = write!(text, "{name:>8}");
        }
        text += "  goal\n";
        for row in &self.rows {
            let _ = write!(text, "{:<58}{:>7}", row.title, row.gaps.len());
            for (share, _) in SHARES {
                let _ = write!(text, "{:>8}", shown(percentile(&row.gaps, share)));
            }
            let goals = row.goals.iter().map(|(name, most)| {
                let met = if row.met(name, *most) {
                    "met"
                } else {
                    "missed"
                };
                format!("{name} < {most}: {met}")
            });
            let goals: Vec<String> = goals.collect();
            let _ = writeln!(text, "  {}", goals.join(", "));
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let mut value =
                json!({"key": row.key, "title": row.title, "unit": "ms", "gaps": row.gaps});
            for (share, name) in SHARES {
                value[name] = json!(percentile(&row.gaps, share));
            }
            let goals = row.goals.iter().map(
                |(name, most)| json!({"of": name, "below": most, "met": row.met(name, *most)}),
            );
            value["goals"] = goals.collect();
            value
        });
        json!({"figures": rows.collect::<Vec<_>>(), "notes": self.notes})
    }
}

impl Row {
    fn met(&self, name: &str, most: f64) -> bool {
        let share = SHARES.iter().find(|(_, of)| *of == name);
        share.is_some_and(|(share, _)| percentile(&self.gaps, *share) < most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_missed_by_its_own_share() {
        let mut report = Report::default();
        for gap_us in (1..=100).map(|i| i * 1_000) {
            report.add("kill", "killed", &[("p50", 60.0), ("p99", 60.0)], gap_us);
        }
        let json = report.json();
        assert_eq!(json["figures"][0]["gaps"][99], 100.0);
        assert_eq!(json["figures"][0]["goals"][0]["met"], true);
        assert_eq!(json["figures"][0]["goals"][1]["met"], false);
        let table = report.table();
        assert!(table.contains("p50 < 60: met, p99 < 60: missed"), "{table}");
    }
}
