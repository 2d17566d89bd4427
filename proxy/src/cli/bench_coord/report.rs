//! What was found, as a table and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One figure of every ensemble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figure {
    /// Its name in the JSON.
    pub(super) key: &'static str,
    pub(super) title: &'static str,
    pub(super) unit: &'static str,
    /// How it is compared.
    pub(super) better: Better,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
    /// Stands for itself: the two did not do the same.
    Neither,
}

/// All figures, in the order in which they were found.
#[derive(Debug)]
pub(super) struct Report {
    /// Ours first.
    ensembles: Vec<&'static str>,
    rows: Vec<Row>,
    notes: Vec<String>,
}

#[derive(Debug)]
struct Row {
    figure: Figure,
    /// By ensemble, then by round.
    samples: Vec<Vec<f64>>,
}

impl Report {
    /// Of `ensembles`, ours first.
    pub(super) fn new(ensembles: Vec<&'static str>) -> Self {
        Self {
            ensembles,
            rows: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds what a round has found of the ensemble of this number.
    pub(super) fn add(&mut self, figure: Figure, ensemble: usize, value: f64) {
        let place = self.rows.iter().position(|row| row.figure == figure);
        let place = place.unwrap_or_else(|| {
            let samples = vec![Vec::new(); self.ensembles.len()];
            self.rows.push(Row { figure, samples });
            self.rows.len() - 1
        });
        self.rows[place].samples[ensemble].push(value);
    }

    /// Something that a reader should know.
    pub(super) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!("{:<44}", "median of the rounds");
        for name in &self.ensembles {
            let _ = write!(text, "{name:>14}");
        }
        if self.ensembles.len() > 1 {
            let _ = write!(text, "{:>10}", "ratio");
        }
        text.push('\n');
        for row in &self.rows {
            let title = format!("{} ({})", row.figure.title, row.figure.unit);
            let _ = write!(text, "{title:<44}");
            for samples in &row.samples {
                let value = median(samples).map_or("-".to_owned(), shown);
                let _ = write!(text, "{value:>14}");
            }
            if let Some(ratio) = row.ratio() {
                let _ = write!(text, "{:>10}", format!("x{ratio:.1}"));
            }
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    pub(super) fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let mut value = json!({
                "key": row.figure.key,
                "title": row.figure.title,
                "unit": row.figure.unit,
                "ratio": row.ratio(),
            });
            for (name, samples) in self.ensembles.iter().zip(&row.samples) {
                value[*name] = json!({"median": median(samples), "rounds": samples});
            }
            value
        });
        json!({"figures": rows.collect::<Vec<_>>(), "notes": self.notes})
    }
}

impl Row {
    /// How many times better ours is than the other one.
    fn ratio(&self) -> Option<f64> {
        let ours = median(self.samples.first()?)?;
        let theirs = median(self.samples.get(1)?)?;
        let ratio = match self.figure.better {
            Better::More => ours / theirs,
            Better::Less => theirs / ours,
            Better::Neither => return None,
        };
        ratio.is_finite().then_some(ratio)
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let (low, high) = (
        sorted.get(sorted.len().checked_sub(1)? / 2)?,
        sorted.get(sorted.len() / 2)?,
    );
    Some(f64::midpoint(*low, *high))
}

fn shown(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Figure = Figure {
        key: "rate",
        title: "writes",
        unit: "1/s",
        better: Better::More,
    };
    const TIME: Figure = Figure {
        key: "time",
        title: "one write, p50",
        unit: "ms",
        better: Better::Less,
    };

    #[test]
    fn ratios_say_how_many_times_better_ours_is() {
        let mut report = Report::new(vec!["unbroken", "zookeeper"]);
        for (ours, theirs) in [(40.0, 10.0), (30.0, 5.0), (90.0, 11.0)] {
            report.add(RATE, 0, ours);
            report.add(RATE, 1, theirs);
        }
        report.add(TIME, 0, 0.5);
        report.add(TIME, 1, 0.25);
        let json = report.to_json();
        assert_eq!(json["figures"][0]["ratio"], 4.0);
        assert_eq!(json["figures"][0]["unbroken"]["median"], 40.0);
        assert_eq!(json["figures"][1]["ratio"], 0.5);
        let table = report.table();
        assert!(table.contains("x4.0") && table.contains("x0.5"), "{table}");
    }

    #[test]
    fn what_is_missing_has_no_ratio() {
        let mut report = Report::new(vec!["unbroken"]);
        report.add(RATE, 0, 1234.0);
        report.note("alone".into());
        report.note("alone".into());
        let table = report.table();
        assert!(table.contains("1234") && !table.contains('x'), "{table}");
        assert_eq!(table.matches("alone").count(), 1);
        assert_eq!(report.to_json()["figures"][0]["ratio"], Value::Null);
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }
}
