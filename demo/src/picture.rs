//! Throughput over time, one panel a client, with the faults marked.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use plotters::prelude::*;

use crate::drill::Fault;
use crate::pace::{float, seconds};
use crate::series::Series;
use crate::traffic::Unit;

/// One panel.
pub(crate) struct Panel {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    pub(crate) series: Series,
}

/// A step of a curve, in microseconds, unless that makes too many.
const STEP_US: u64 = 25_000;
const STEPS_MAX: u64 = 4_000;

const WIDTH: u32 = 1100;
const PANEL_HEIGHT: u32 = 220;
const COLOURS: [RGBColor; 3] = [
    RGBColor(31, 119, 180),
    RGBColor(44, 140, 60),
    RGBColor(200, 110, 20),
];

/// Draws `panels` from `from_us` to `to_us` into the file `path`. At `released_us` the transfers were
/// let go at full speed: the scale is that of the time before.
pub(crate) fn draw(
    path: &Path,
    panels: &[Panel],
    faults: &[Fault],
    from_us: u64,
    released_us: Option<u64>,
    to_us: u64,
) -> Result<()> {
    let height = PANEL_HEIGHT * u32::try_from(panels.len()).context("a few panels")?;
    let root = SVGBackend::new(path, (WIDTH, height.max(1))).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", path.display());
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let areas = root.split_evenly((panels.len().max(1), 1));
    for ((panel, area), colour) in panels.iter().zip(&areas).zip(COLOURS.iter().cycle()) {
        draw_panel(panel, area, *colour, faults, from_us, released_us, to_us)
            .map_err(|error| failed(&error))?;
    }
    root.present().map_err(|error| failed(&error))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type DrawError = DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>;

fn draw_panel(
    panel: &Panel,
    area: &Area<'_>,
    colour: RGBColor,
    faults: &[Fault],
    from_us: u64,
    released_us: Option<u64>,
    to_us: u64,
) -> Result<(), DrawError> {
    let span_us = to_us.saturating_sub(from_us).max(STEP_US);
    let step_us = STEP_US.max(span_us / STEPS_MAX);
    let count = usize::try_from(span_us / step_us).expect("at most STEPS_MAX");
    let (scale, unit) = match panel.unit {
        Unit::Bytes => (1e6, "MB/s"),
        Unit::Requests => (1.0, "answers/s"),
    };
    let per_second = 1.0 / seconds(step_us) / scale;
    let values: Vec<(f64, f64)> = panel
        .series
        .steps(from_us, step_us, count)
        .into_iter()
        .zip(1u64..)
        .map(|(units, step)| (seconds(step * step_us), float(units) * per_second))
        .collect();
    let judged = seconds(released_us.unwrap_or(to_us).saturating_sub(from_us));
    let top = values
        .iter()
        .filter(|(at, _)| *at < judged)
        .map(|(_, value)| *value)
        .fold(0.0, f64::max)
        .max(0.1)
        * 1.25;

    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .caption(panel.name, ("sans-serif", 16))
        .x_label_area_size(28)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..seconds(span_us), 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_desc("seconds")
        .y_desc(unit)
        .x_label_formatter(&|at| format!("{at:.0}"))
        .y_labels(5)
        .draw()?;
    for fault in faults {
        let x = |us: u64| seconds(us.saturating_sub(from_us));
        chart.draw_series([Rectangle::new(
            [(x(fault.at_us), 0.0), (x(fault.whole_us), top)],
            RGBColor(120, 120, 120).mix(0.12).filled(),
        )])?;
        let edge = [(x(fault.at_us), 0.0), (x(fault.at_us), top)];
        chart.draw_series([PathElement::new(edge.to_vec(), RED.stroke_width(2))])?;
        let label = format!("{} {}", fault.victim, fault.kind);
        chart.draw_series([Text::new(
            label,
            (x(fault.at_us) + seconds(span_us) / 400.0, top * 0.98),
            ("sans-serif", 12).into_font().color(&RED),
        )])?;
    }
    let shown = values.iter().map(|(at, value)| (*at, value.min(top)));
    chart.draw_series(
        AreaSeries::new(shown, 0.0, colour.mix(0.25)).border_style(colour.stroke_width(1)),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::Kind;

    #[test]
    fn a_picture_shows_panels_and_faults() {
        let path = std::env::temp_dir().join(format!("demo-picture-{}.svg", std::process::id()));
        let mut series = Series::default();
        for step in 1..1_000 {
            series.push(step * 10_000, step * 50_000);
        }
        let fault = Fault {
            kind: Kind::Kill,
            victim: "r2".into(),
            at_us: 3_000_000,
            old_view: 1,
            new_view: 2,
            new_leader: "r1".into(),
            led_us: 3_070_000,
            whole_us: 5_000_000,
        };
        let panels = [
            Panel {
                name: "curl",
                unit: Unit::Bytes,
                series: series.clone(),
            },
            Panel {
                name: "exchange",
                unit: Unit::Requests,
                series,
            },
        ];
        draw(&path, &panels, &[fault], 0, Some(9_000_000), 10_000_000).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for word in [
            "<svg",
            "curl",
            "exchange",
            "r2 SIGKILL",
            "MB/s",
            "answers/s",
        ] {
            assert!(text.contains(word), "{word} is not in the picture");
        }
    }
}
