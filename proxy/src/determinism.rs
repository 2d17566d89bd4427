//! What of a server's output may differ between replicas without harm.
//!
//! A pattern is looked for within one line, so that the same rule can be kept while the output
//! passes by (`dataplane/divergence.rs`) and when all of it is at hand (`unbroken determinism`).

use std::ops::Range;

use regex::bytes::{Regex, RegexBuilder};

/// A line that is longer is looked at in pieces of this many bytes.
pub const LINE_BYTES_MAX: usize = 4096;

/// Patterns declared harmless: what they match counts as equal, if it stands at the same place and is
/// of the same length. After a takeover a client may see a match that one server began and another
/// ended, so a pattern must not cover what a client relies on.
#[derive(Debug, Clone, Default)]
pub struct Harmless {
    patterns: Vec<Regex>,
}

impl Harmless {
    /// Compiles regular expressions over bytes; each is looked for within single lines, without the
    /// line feed at their end.
    ///
    /// # Errors
    /// One is not a regular expression, or matches the empty text.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, PatternError> {
        let compile = |pattern: &S| {
            let text = pattern.as_ref();
            let regex = RegexBuilder::new(text).unicode(false).build();
            let regex = regex.map_err(|source| PatternError::Syntax {
                pattern: text.to_owned(),
                source,
            })?;
            if regex.is_match(b"") {
                return Err(PatternError::Empty(text.to_owned()));
            }
            Ok(regex)
        };
        let patterns = patterns.iter().map(compile).collect::<Result<_, _>>()?;
        Ok(Self { patterns })
    }

    /// Whether every byte matters.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Overwrites with zeros what is harmless in one line, and says how many bytes that were.
    pub fn mask(&self, line: &mut [u8]) -> usize {
        // All patterns see the line as it came, in whichever order they stand.
        let matches: Vec<Range<usize>> = self
            .patterns
            .iter()
            .flat_map(|p| p.find_iter(line))
            .map(|m| m.range())
            .collect();
        let mut masked = 0;
        for range in matches {
            masked += line[range.clone()].iter().filter(|b| **b != 0).count();
            line[range].fill(0);
        }
        masked
    }

    /// Masks a whole output, line by line.
    pub fn mask_all(&self, output: &mut [u8]) -> usize {
        if self.is_empty() {
            return 0;
        }
        let lines = output.split_inclusive_mut(|b| *b == b'\n');
        lines
            .flat_map(|line| line.chunks_mut(LINE_BYTES_MAX))
            .map(|piece| {
                let end = piece.len() - usize::from(piece.ends_with(b"\n"));
                self.mask(&mut piece[..end])
            })
            .sum()
    }
}

/// A pattern that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// It is not a regular expression.
    #[error("{pattern:?} is not a regular expression: {source}")]
    Syntax {
        /// As it was given.
        pattern: String,
        /// What is wrong with it.
        source: regex::Error,
    },
    /// It says nothing: there is no place where it does not match.
    #[error("{0:?} matches the empty text")]
    Empty(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(patterns: &[&str], text: &str) -> String {
        let mut bytes = text.as_bytes().to_vec();
        Harmless::new(patterns).unwrap().mask_all(&mut bytes);
        String::from_utf8(bytes).unwrap().replace('\0', "-")
    }

    #[test]
    fn masks_within_lines() {
        let text = "HTTP/1.1 200 OK\r\nDate: Mon\r\nX: 1\r\n";
        assert_eq!(
            masked(&["^Date: .*"], text),
            "HTTP/1.1 200 OK\r\n----------\nX: 1\r\n"
        );
        assert_eq!(masked(&[r"\d+$", "M.n"], "a 12\nMon 3"), "a --\n--- -");
        // A match never reaches over a line's end.
        assert_eq!(masked(&[r"a\s*b"], "a\nb a b"), "a\nb ---");
    }

    #[test]
    fn refuses_what_says_nothing() {
        assert!(matches!(
            Harmless::new(&["x*"]),
            Err(PatternError::Empty(_))
        ));
        assert!(matches!(
            Harmless::new(&["("]),
            Err(PatternError::Syntax { .. })
        ));
    }
}
