//! How long a replica will need until it is up to date, by how fast it was in the last seconds.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::BootTime;
use crate::status::{CatchUp, CatchUpStage};

/// The rate is that of so long a time.
const WINDOW: Duration = Duration::from_secs(5);
/// And of no shorter one.
const WINDOW_MIN: Duration = Duration::from_millis(200);
/// Samples are so far apart at least.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// What is known of one replica's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) stage: CatchUpStage,
    pub(crate) left_bytes: u64,
    /// Unknown: the most that was ever left.
    pub(crate) total_bytes: Option<u64>,
}

/// The progress of one replica in one stage.
#[derive(Debug)]
pub(crate) struct Estimate {
    stage: CatchUpStage,
    left_max: u64,
    /// What was left, and when.
    samples: VecDeque<(BootTime, u64)>,
}

impl Estimate {
    /// Takes what is known now into the estimate; a new stage begins a new one.
    pub(crate) fn step(slot: &mut Option<Self>, now: BootTime, step: Step) -> CatchUp {
        let begun = slot.take().filter(|known| known.stage == step.stage);
        let this = slot.insert(begun.unwrap_or(Self {
            stage: step.stage,
            left_max: 0,
            samples: VecDeque::new(),
        }));
        this.left_max = this.left_max.max(step.left_bytes);
        let last = this.samples.back();
        if last.is_none_or(|(at, _)| now.since(*at) >= SAMPLE_EVERY) {
            this.samples.push_back((now, step.left_bytes));
        }
        // The first is the youngest of those that are older than the window.
        while let Some((next, _)) = this.samples.get(1)
            && now.since(*next) >= WINDOW
        {
            this.samples.pop_front();
        }
        let total_bytes = step.total_bytes.unwrap_or(this.left_max);
        CatchUp {
            stage: step.stage,
            done_bytes: total_bytes.saturating_sub(step.left_bytes),
            total_bytes,
            seconds_left: this.seconds_left(now, step.left_bytes),
        }
    }

    fn seconds_left(&self, now: BootTime, left: u64) -> Option<u64> {
        let (since, before) = *self.samples.front()?;
        let elapsed = now.since(since);
        let done = before.checked_sub(left).filter(|done| *done > 0)?;
        // With nothing left the stage ends when something else says so: `restore` is at its work.
        if elapsed < WINDOW_MIN || left == 0 {
            return None;
        }
        let seconds = elapsed.as_secs_f64() * left as f64 / done as f64;
        Some(Duration::try_from_secs_f64(seconds.ceil()).ok()?.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime::from_micros(ms * 1000)
    }

    fn replay(left_bytes: u64) -> Step {
        Step {
            stage: CatchUpStage::Replay,
            left_bytes,
            total_bytes: None,
        }
    }

    #[test]
    fn time_left_follows_the_rate_of_the_last_seconds() {
        let mut slot = None;
        let first = Estimate::step(&mut slot, at(0), replay(100_000));
        assert_eq!((first.total_bytes, first.seconds_left), (100_000, None));
        // 10,000 bytes a second, then 1,000.
        let mut left = 100_000;
        for ms in (100..=5_000).step_by(100) {
            left -= 1_000;
            let now = Estimate::step(&mut slot, at(ms), replay(left));
            assert_eq!(now.done_bytes, 100_000 - left);
            let expected = (ms >= 200).then(|| left.div_ceil(10_000));
            assert_eq!(now.seconds_left, expected, "after {ms} ms");
        }
        let mut now = first;
        for ms in (5_100..=11_000).step_by(100) {
            left -= 100;
            now = Estimate::step(&mut slot, at(ms), replay(left));
        }
        assert_eq!((left, now.seconds_left), (44_000, Some(44)));
        // While nothing moves nothing is promised.
        for ms in (11_000..=17_000).step_by(100) {
            now = Estimate::step(&mut slot, at(ms), replay(left));
        }
        assert_eq!(now.seconds_left, None);
        let done = Estimate::step(&mut slot, at(17_100), replay(0));
        assert_eq!((done.done_bytes, done.seconds_left), (100_000, None));
    }

    #[test]
    fn a_new_stage_begins_anew() {
        let mut slot = None;
        let transfer = |left| Step {
            stage: CatchUpStage::Transfer,
            left_bytes: left,
            total_bytes: Some(1000),
        };
        Estimate::step(&mut slot, at(0), transfer(1000));
        let now = Estimate::step(&mut slot, at(1000), transfer(500));
        assert_eq!((now.done_bytes, now.seconds_left), (500, Some(1)));
        let now = Estimate::step(&mut slot, at(2000), replay(10));
        assert_eq!((now.total_bytes, now.seconds_left), (10, None));
    }
}
