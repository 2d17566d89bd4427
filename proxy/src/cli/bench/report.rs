//! What was measured, as a table and as JSON.

use serde_json::{Value, json};

use super::Target;
use super::measure::{MEASUREMENTS, Measurement, Sample};

/// All samples of a run.
#[derive(Debug)]
pub(super) struct Report {
    targets: Vec<Target>,
    rounds: u32,
    seconds: f64,
    rows: Vec<Row>,
}

/// One figure of one measurement, as in "round trip 64 B, p99".
#[derive(Debug)]
struct Row {
    measurement: String,
    title: String,
    metric: &'static str,
    unit: &'static str,
    /// By target, then by round.
    samples: Vec<Vec<f64>>,
}

/// The middle of the rounds, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(super) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Self {
            median: f64::midpoint(low, high),
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        }
    }

    fn to_json(self) -> Value {
        json!({"median": round(self.median), "min": round(self.min), "max": round(self.max)})
    }
}

impl Report {
    pub(super) fn new(targets: &[Target], rounds: u32, seconds: f64) -> Self {
        let row = |measurement: &Measurement, metric, unit| Row {
            measurement: measurement.key(),
            title: measurement.title(),
            metric,
            unit,
            samples: vec![Vec::new(); targets.len()],
        };
        let rows = MEASUREMENTS
            .iter()
            .flat_map(|measurement| match measurement {
                Measurement::RoundTrip { .. } => {
                    vec![row(measurement, "p50", "us"), row(measurement, "p99", "us")]
                }
                Measurement::Down | Measurement::Up => vec![row(measurement, "throughput", "Gb/s")],
            });
        Self {
            targets: targets.to_vec(),
            rounds,
            seconds,
            rows: rows.collect(),
        }
    }

    /// Adds what `measurement` found on the target of number `target`.
    pub(super) fn add(&mut self, measurement: &Measurement, target: usize, sample: Sample) {
        let key = measurement.key();
        let figures = match sample {
            Sample::RoundTrip { p50_us, p99_us } => vec![("p50", p50_us), ("p99", p99_us)],
            Sample::Bulk { gbps } => vec![("throughput", gbps)],
        };
        for (metric, figure) in figures {
            let row = self
                .rows
                .iter_mut()
                .find(|row| row.measurement == key && row.metric == metric);
            row.expect("every measurement has its rows").samples[target].push(figure);
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let targets = self
                .targets
                .iter()
                .zip(&row.samples)
                .map(|(target, samples)| {
                    let mut value = Spread::of(samples).to_json();
                    value["rounds"] = samples.iter().map(|sample| round(*sample)).collect();
                    (target.name.clone(), value)
                });
            let ratios = (1..self.targets.len()).map(|target| {
                (
                    self.targets[target].name.clone(),
                    row.ratio(target).to_json(),
                )
            });
            json!({
                "measurement": row.measurement,
                "metric": row.metric,
                "unit": row.unit,
                "targets": targets.collect::<serde_json::Map<_, _>>(),
                "ratio_to_direct": ratios.collect::<serde_json::Map<_, _>>(),
            })
        });
        let targets = self
            .targets
            .iter()
            .map(|target| (target.name.clone(), Value::from(target.address.to_string())));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "targets": targets.collect::<serde_json::Map<_, _>>(),
            "figures": rows.collect::<Vec<_>>(),
        })
    }

    /// A line for each figure: median (min-max) by target, and the ratio to the first.
    pub(super) fn table(&self) -> String {
        let mut lines = vec![vec![String::new(), String::new()]];
        for (index, target) in self.targets.iter().enumerate() {
            lines[0].push(target.name.clone());
            if index > 0 {
                lines[0].push("ratio".to_owned());
            }
        }
        for row in &self.rows {
            let mut line = vec![row.title.clone(), format!("{} [{}]", row.metric, row.unit)];
            for (index, samples) in row.samples.iter().enumerate() {
                let Spread { median, min, max } = Spread::of(samples);
                line.push(format!(
                    "{} ({}-{})",
                    digits(median),
                    digits(min),
                    digits(max)
                ));
                if index > 0 {
                    line.push(format!("x{:.2}", row.ratio(index).median));
                }
            }
            lines.push(line);
        }
        let columns = lines[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                lines
                    .iter()
                    .map(|line| line[column].len())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text: Vec<String> = lines
            .iter()
            .map(|line| {
                let cells: Vec<String> = line
                    .iter()
                    .zip(&widths)
                    .map(|(cell, width)| format!("{cell:<width$}"))
                    .collect();
                cells.join("  ").trim_end().to_owned()
            })
            .collect();
        text.push(format!(
            "Medians of {} rounds (smallest-largest); ratios to direct are taken within each round.",
            self.rounds
        ));
        text.join("\n")
    }
}

impl Row {
    /// Of a target to the first, round by round.
    fn ratio(&self, target: usize) -> Spread {
        let pairs = self.samples[target].iter().zip(&self.samples[0]);
        let ratios: Vec<f64> = pairs.map(|(sample, direct)| sample / direct).collect();
        Spread::of(&ratios)
    }
}

/// Three significant digits, more or less.
fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// For JSON: a thousandth is finer than anything measured.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
