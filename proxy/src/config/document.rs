//! The text of a configuration file, places in it, and problems that point at them.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A configuration file larger than this is not one.
const FILE_BYTES_MAX: usize = 1 << 20;

/// At most this many characters of a value are repeated in a message.
const VALUE_CHARS_MAX: usize = 60;

/// Everything that is wrong with one configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors {
    file: PathBuf,
    problems: Vec<Problem>,
}

/// One thing that is wrong with a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where; `None` when the file could not be read at all.
    place: Option<Place>,
    /// The key with its sections, as in `group.lease` or `service[0].vip`; empty where no key is meant.
    pub key: String,
    /// The value as it stands in the file, shortened.
    pub value: Option<String>,
    /// What is wrong, and what was expected.
    pub complaint: Complaint,
}

/// What is wrong with a value, what was expected, and what may help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// What is wrong: "not a duration".
    pub wrong: String,
    /// What was expected: "a duration as in \"50ms\"".
    pub expected: String,
    /// A further hint, a whole sentence.
    pub help: Option<String>,
}

impl Complaint {
    pub(super) fn new(wrong: impl Into<String>, expected: impl Into<String>) -> Self {
        Self {
            wrong: wrong.into(),
            expected: expected.into(),
            help: None,
        }
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// A place in the text, with the line it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// From 1.
    line: usize,
    /// In characters, from 1.
    column: usize,
    text: String,
    /// Characters underlined, at least 1.
    width: usize,
}

impl ConfigErrors {
    /// The file could not be read.
    pub(super) fn unreadable(file: &Path, wrong: impl Into<String>, expected: &str) -> Self {
        let problem = Problem {
            place: None,
            key: String::new(),
            value: None,
            complaint: Complaint::new(wrong, expected),
        };
        Self {
            file: file.to_path_buf(),
            problems: vec![problem],
        }
    }

    /// The problems in the order of the lines they are on; never empty.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl Problem {
    /// The line it is on, from 1; `None` when the file could not be read.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        self.place.as_ref().map(|place| place.line)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for problem in &self.problems {
            let Complaint {
                wrong,
                expected,
                help,
            } = &problem.complaint;
            write!(f, "{file}:")?;
            if let Some(place) = &problem.place {
                write!(f, "{}:{}:", place.line, place.column)?;
            }
            f.write_str(" error: ")?;
            match (problem.key.as_str(), &problem.value) {
                ("", _) => {}
                (key, None) => write!(f, "{key}: ")?,
                (key, Some(value)) => write!(f, "{key} = {value}: ")?,
            }
            writeln!(f, "{wrong}")?;
            if let Some(place) = &problem.place {
                let number = place.line.to_string();
                let margin = " ".repeat(number.len());
                writeln!(f, " {margin} |")?;
                writeln!(f, " {number} | {}", place.text)?;
                // A tab stays a tab, so that the caret stands below what it points at.
                let indent: String = place
                    .text
                    .chars()
                    .take(place.column - 1)
                    .map(|c| if c == '\t' { '\t' } else { ' ' })
                    .collect();
                writeln!(
                    f,
                    " {margin} | {indent}{} expected {expected}",
                    "^".repeat(place.width)
                )?;
                if let Some(help) = help {
                    writeln!(f, " {margin} = help: {help}")?;
                }
            } else {
                writeln!(f, "  expected {expected}")?;
            }
        }
        match self.problems.len() {
            1 => write!(f, "{file}: 1 error"),
            count => write!(f, "{file}: {count} errors"),
        }
    }
}

/// The text being read and what was found wrong with it so far.
#[derive(Debug)]
pub(super) struct Document<'t> {
    file: &'t Path,
    text: &'t str,
    problems: RefCell<Vec<(usize, Problem)>>,
    warnings: RefCell<Vec<String>>,
}

impl<'t> Document<'t> {
    pub(super) fn new(file: &'t Path, text: &'t str) -> Self {
        Self {
            file,
            text,
            problems: RefCell::default(),
            warnings: RefCell::default(),
        }
    }

    pub(super) fn text(&self) -> &'t str {
        self.text
    }

    /// `path` as the file means it: relative to the file's folder.
    pub(super) fn resolve(&self, path: &str) -> PathBuf {
        match self.file.parent() {
            Some(folder) => folder.join(path),
            None => PathBuf::from(path),
        }
    }

    /// Complains about `key`; with `show_value` the text at `span` is the value.
    pub(super) fn problem(
        &self,
        key: &str,
        span: &Range<usize>,
        show_value: bool,
        complaint: Complaint,
    ) {
        self.problem_at(key, span, show_value.then_some(span), complaint);
    }

    /// Complains about `key` at `span`, with the value that stands at `value`.
    pub(super) fn problem_at(
        &self,
        key: &str,
        span: &Range<usize>,
        value: Option<&Range<usize>>,
        complaint: Complaint,
    ) {
        let value = value.map(|span| shorten(self.text.get(span.clone()).unwrap_or_default()));
        let place = Some(self.place(span));
        let problem = Problem {
            place,
            key: key.to_owned(),
            value,
            complaint,
        };
        self.problems.borrow_mut().push((span.start, problem));
    }

    pub(super) fn warn(&self, span: &Range<usize>, sentence: &str) {
        let warning = format!(
            "{}:{}: {sentence}",
            self.file.display(),
            self.place(span).line
        );
        self.warnings.borrow_mut().push(warning);
    }

    pub(super) fn has_problems(&self) -> bool {
        !self.problems.borrow().is_empty()
    }

    /// The warnings, or every problem in the order of the file.
    pub(super) fn finish(self) -> Result<Vec<String>, ConfigErrors> {
        let mut problems = self.problems.into_inner();
        if problems.is_empty() {
            return Ok(self.warnings.into_inner());
        }
        problems.sort_by_key(|(start, _)| *start);
        let problems = problems.into_iter().map(|(_, problem)| problem).collect();
        Err(ConfigErrors {
            file: self.file.to_path_buf(),
            problems,
        })
    }

    fn place(&self, span: &Range<usize>) -> Place {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[start..]
            .find('\n')
            .map_or(self.text.len(), |at| start + at);
        let text = self.text[line_start..line_end].trim_end();
        let end = span
            .end
            .clamp(start, line_start + text.len().max(start - line_start));
        Place {
            line: self.text[..line_start].matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            text: text.to_owned(),
            width: self
                .text
                .get(start..end)
                .map_or(1, |under| under.chars().count().max(1)),
        }
    }
}

/// Reads a configuration file.
pub(super) fn read_file(file: &Path) -> Result<String, ConfigErrors> {
    const EXPECTED: &str = "a configuration file (TOML)";
    let bytes = std::fs::read(file).map_err(|error| {
        ConfigErrors::unreadable(file, format!("cannot read it: {error}"), EXPECTED)
    })?;
    if bytes.len() > FILE_BYTES_MAX {
        let wrong = format!(
            "{} bytes is more than the {FILE_BYTES_MAX} that are allowed",
            bytes.len()
        );
        return Err(ConfigErrors::unreadable(file, wrong, EXPECTED));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1;
        ConfigErrors::unreadable(file, format!("line {line} is not UTF-8 text"), EXPECTED)
    })
}

/// The first line of a value, cut to a length that fits a message.
fn shorten(value: &str) -> String {
    let mut lines = value.lines();
    let first = lines.next().unwrap_or_default();
    let mut short: String = first.chars().take(VALUE_CHARS_MAX).collect();
    if short.len() < first.len() || lines.next().is_some() {
        short.push_str(" ...");
    }
    short
}
