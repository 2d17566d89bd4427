//! What one client did over time.

/// Units done so far at moments of the monotonic clock; both only grow.
#[derive(Debug, Clone, Default)]
pub(crate) struct Series {
    samples: Vec<(u64, u64)>,
}

/// A time without progress, in microseconds of the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Gap {
    pub(crate) start_us: u64,
    pub(crate) length_us: u64,
}

impl Series {
    /// Notes that `total` units were done at `at_us`. Without progress since the last note it is
    /// nothing; notes within a quarter of a millisecond become one.
    pub(crate) fn push(&mut self, at_us: u64, total: u64) {
        if let [.., (before_us, _), (last_us, last)] = &mut self.samples[..]
            && *last_us < *before_us + 250
            && at_us < *last_us + 250
        {
            *last_us = (*last_us).max(at_us);
            *last = (*last).max(total);
            return;
        }
        let grown = self
            .samples
            .last()
            .is_none_or(|&(us, last)| total > last && at_us >= us);
        if grown {
            self.samples.push((at_us, total));
        }
    }

    /// Units done so far.
    pub(crate) fn total(&self) -> u64 {
        self.samples.last().map_or(0, |&(_, total)| total)
    }

    /// When the latest progress was.
    pub(crate) fn last_us(&self) -> Option<u64> {
        self.samples.last().map(|&(us, _)| us)
    }

    /// The longest time without progress that touches `from_us..=to_us`; a gap that is still open at
    /// `to_us` counts up to there.
    pub(crate) fn longest_gap(&self, from_us: u64, to_us: u64) -> Option<Gap> {
        let first = self
            .samples
            .partition_point(|&(us, _)| us <= from_us)
            .saturating_sub(1);
        let mut moments = self.samples[first..].iter().map(|&(us, _)| us);
        let mut before = moments.next()?;
        let mut longest = Gap {
            start_us: before,
            length_us: 0,
        };
        let mut consider = |start_us: u64, end_us: u64| {
            if end_us >= from_us && end_us.saturating_sub(start_us) > longest.length_us {
                longest = Gap {
                    start_us,
                    length_us: end_us - start_us,
                };
            }
        };
        for moment in moments {
            consider(before, moment);
            before = moment;
            if moment >= to_us {
                return Some(longest);
            }
        }
        consider(before, to_us.max(before));
        Some(longest)
    }

    /// Units done in each of `count` steps of `step_us` from `start_us` on.
    pub(crate) fn steps(&self, start_us: u64, step_us: u64, count: usize) -> Vec<u64> {
        let at = |us: u64| {
            let after = self.samples.partition_point(|&(moment, _)| moment <= us);
            after
                .checked_sub(1)
                .map_or(0, |index| self.samples[index].1)
        };
        (0..count as u64)
            .map(|step| at(start_us + (step + 1) * step_us) - at(start_us + step * step_us))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(samples: &[(u64, u64)]) -> Series {
        let mut series = Series::default();
        for &(us, total) in samples {
            series.push(us, total);
        }
        series
    }

    #[test]
    fn the_longest_gap_is_found_where_it_is_asked_for() {
        let series = series(&[
            (1_000, 1),
            (2_000, 2),
            (60_000, 3),
            (61_000, 4),
            (200_000, 5),
        ]);
        let gap = |from, to| {
            series
                .longest_gap(from, to)
                .map(|gap| (gap.start_us, gap.length_us))
        };
        assert_eq!(gap(1_500, 61_000), Some((2_000, 58_000)));
        assert_eq!(
            gap(30_000, 61_000),
            Some((2_000, 58_000)),
            "it began before"
        );
        assert_eq!(gap(60_500, 300_000), Some((61_000, 139_000)));
        assert_eq!(
            gap(200_000, 900_000),
            Some((200_000, 700_000)),
            "still open"
        );
        assert_eq!(gap(70_000, 80_000), Some((61_000, 139_000)), "ended later");
        assert_eq!(Series::default().longest_gap(0, 10), None);
    }

    #[test]
    fn steps_add_up_to_the_total() {
        let series = series(&[(1_000, 10), (2_500, 30), (9_000, 100)]);
        assert_eq!(series.steps(0, 2_000, 5), [10, 20, 0, 0, 70]);
    }

    #[test]
    fn standing_still_is_no_progress() {
        let series = series(&[(1_000, 10), (5_000, 10), (9_000, 11)]);
        assert_eq!(series.longest_gap(0, 9_000).unwrap().length_us, 8_000);
    }
}
