//! Which of a sender's numbers have been seen.

const WINDOW_WORDS: usize = 64;
const WINDOW: u64 = 64 * WINDOW_WORDS as u64;

/// Which of a sender's numbers have been seen: a number is accepted once, and only while it is not
/// older than the newest by 4096 (the sliding window of RFC 6479).
#[derive(Clone)]
pub(super) struct ReplayWindow {
    newest: u64,
    bits: [u64; WINDOW_WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self {
            newest: 0,
            bits: [0; WINDOW_WORDS],
        }
    }
}

impl ReplayWindow {
    fn place(counter: u64) -> (usize, u64) {
        let word = (counter / 64) % WINDOW_WORDS as u64;
        (
            usize::try_from(word).expect("below 64"),
            1 << (counter % 64),
        )
    }

    /// Whether `counter` would be accepted.
    pub(super) fn fresh(&self, counter: u64) -> bool {
        if counter > self.newest {
            return true;
        }
        // One word less than the window: the newest number's own word is being filled.
        if self.newest - counter >= WINDOW - 64 {
            return false;
        }
        let (word, bit) = Self::place(counter);
        self.bits[word] & bit == 0
    }

    /// Notes an accepted number.
    pub(super) fn note(&mut self, counter: u64) {
        if counter > self.newest {
            let (from, to) = (self.newest / 64, counter / 64);
            for word in (from + 1..=to).take(WINDOW_WORDS) {
                let place = usize::try_from(word % WINDOW_WORDS as u64).expect("below 64");
                self.bits[place] = 0;
            }
            self.newest = counter;
        }
        let (word, bit) = Self::place(counter);
        self.bits[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_once() {
        let mut window = ReplayWindow::default();
        for counter in [1, 2, 5, 4, 3, 4000, 70, 9000, 8990] {
            if window.newest >= WINDOW && counter + WINDOW - 64 <= window.newest {
                continue;
            }
            assert!(window.fresh(counter), "{counter}");
            window.note(counter);
            assert!(!window.fresh(counter), "{counter} again");
        }
        assert!(!window.fresh(70), "too old");
        assert!(window.fresh(8991));
    }

    #[test]
    fn a_jump_over_the_whole_window_forgets_it() {
        let mut window = ReplayWindow::default();
        for counter in 1..=200 {
            window.note(counter);
        }
        window.note(1_000_000);
        for counter in 1_000_000 - 4000..1_000_000 {
            assert!(window.fresh(counter), "{counter}");
        }
        assert!(!window.fresh(1_000_000));
        assert!(!window.fresh(200));
    }
}
