//! What was measured, as a table and as JSON.

use serde_json::{Value, json};

use super::Target;
use super::measure::{MEASUREMENTS, Measurement, Sample, figure};
use super::usage::{Process, Usage};

/// All samples of a run.
#[derive(Debug)]
pub(super) struct Report {
    targets: Vec<Target>,
    rounds: u32,
    seconds: f64,
    rows: Vec<Row>,
    costs: Vec<Cost>,
}

/// What a process used for one measurement through the virtual IP, round by round.
#[derive(Debug)]
struct Cost {
    process: String,
    measurement: String,
    title: String,
    /// "request", or "GB".
    per: &'static str,
    cpu_us: Vec<f64>,
    wakeups: Vec<f64>,
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
            costs: Vec::new(),
        }
    }

    /// Adds what `measurement` found on the target of number `target`.
    pub(super) fn add(&mut self, measurement: &Measurement, target: usize, sample: Sample) {
        let key = measurement.key();
        let figures = match sample {
            Sample::RoundTrip { p50_us, p99_us, .. } => vec![("p50", p50_us), ("p99", p99_us)],
            Sample::Bulk { gbps, .. } => vec![("throughput", gbps)],
        };
        for (metric, figure) in figures {
            let row = self
                .rows
                .iter_mut()
                .find(|row| row.measurement == key && row.metric == metric);
            row.expect("every measurement has its rows").samples[target].push(figure);
        }
    }

    /// Adds what `process` used while `measurement` found `sample`.
    pub(super) fn charge(
        &mut self,
        measurement: &Measurement,
        process: &Process,
        used: Usage,
        sample: Sample,
    ) {
        let (per, count) = match sample {
            Sample::RoundTrip { requests, .. } => ("request", figure(requests)),
            Sample::Bulk { bytes, .. } => ("GB", figure(bytes) / 1e9),
        };
        let key = measurement.key();
        let same = |cost: &Cost| cost.process == process.name && cost.measurement == key;
        let at = self.costs.iter().position(same).unwrap_or_else(|| {
            self.costs.push(Cost {
                process: process.name.clone(),
                measurement: key.clone(),
                title: measurement.title(),
                per,
                cpu_us: Vec::new(),
                wakeups: Vec::new(),
            });
            self.costs.len() - 1
        });
        self.costs[at]
            .cpu_us
            .push(figure(used.cpu_ns) / 1e3 / count);
        self.costs[at].wakeups.push(figure(used.wakeups) / count);
    }

    pub(super) fn to_json(&self) -> Value {
        let costs = self.costs.iter().map(|cost| {
            json!({
                "process": cost.process,
                "measurement": cost.measurement,
                "per": cost.per,
                "cpu_us": Spread::of(&cost.cpu_us).to_json(),
                "wakeups": Spread::of(&cost.wakeups).to_json(),
            })
        });
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
            "costs": costs.collect::<Vec<_>>(),
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
        let mut text = align(&lines);
        text.push(format!(
            "Medians of {} rounds (smallest-largest); ratios to direct are taken within each round.",
            self.rounds
        ));
        if !self.costs.is_empty() {
            text.push(String::new());
            text.extend(align(&self.cost_lines()));
            text.push("Of each process, through the virtual IP alone.".to_owned());
        }
        text.join("\n")
    }

    fn cost_lines(&self) -> Vec<Vec<String>> {
        let head = ["", "process", "CPU [us]", "wake-ups", "per"]
            .map(str::to_owned)
            .to_vec();
        let lines = self.costs.iter().map(|cost| {
            let (cpu, wakeups) = (Spread::of(&cost.cpu_us), Spread::of(&cost.wakeups));
            vec![
                cost.title.clone(),
                cost.process.clone(),
                digits(cpu.median),
                digits(wakeups.median),
                cost.per.to_owned(),
            ]
        });
        std::iter::once(head).chain(lines).collect()
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

/// Pads each column to its widest cell.
fn align(lines: &[Vec<String>]) -> Vec<String> {
    let columns = lines.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].len())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let padded = |line: &Vec<String>| {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    lines.iter().map(padded).collect()
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
