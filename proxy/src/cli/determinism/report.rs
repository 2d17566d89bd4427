//! What is told in the end.

use std::fmt::Write as _;

use serde::Serialize;

use super::compare::Difference;

/// The result; `--json` prints it as it is.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether every copy answered alike.
    pub(super) fit: bool,
    /// The order for which that was tried.
    pub(super) ordering: &'static str,
    pub(super) copies: usize,
    pub(super) connections: usize,
    /// Bytes that clients sent to each copy.
    pub(super) input_bytes: u64,
    /// Bytes that the first copy answered.
    pub(super) output_bytes: u64,
    /// Of these, declared harmless.
    pub(super) ignored_bytes: usize,
    /// In the order of connections.
    pub(super) differences: Vec<Difference>,
    /// Differences beyond those.
    pub(super) differences_left_out: usize,
    pub(super) notes: Vec<String>,
}

impl Report {
    /// For people.
    pub(super) fn describe(&self, patterns: bool) -> String {
        let mut text = format!(
            "{} copies, {} connections: {} bytes sent, {} bytes answered",
            self.copies, self.connections, self.input_bytes, self.output_bytes
        );
        if self.ignored_bytes > 0 {
            let _ = write!(text, ", {} of them declared harmless", self.ignored_bytes);
        }
        text.push('\n');
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        for difference in &self.differences {
            let _ = write!(text, "\n{}", difference.describe());
        }
        if self.differences_left_out > 0 {
            let _ = writeln!(text, "\n... and {} more", self.differences_left_out);
        }
        text.push('\n');
        if self.fit {
            let _ = writeln!(
                text,
                "FIT: the copies answered alike (for ordering = {:?}, on this input)",
                self.ordering
            );
        } else {
            let _ = writeln!(text, "UNFIT: the copies answered differently");
            if self.ordering == "connection" {
                text.push_str(
                    "Hint: what depends on the order across connections may be fit with --ordering total.\n",
                );
            }
            if patterns {
                text.push_str(
                    "Hint: what is declared harmless must stand at the same place and have one length.\n",
                );
            } else {
                text.push_str(
                    "Hint: what may differ can be declared so, for example --ignore '^Date: .*'.\n",
                );
            }
        }
        text
    }
}
