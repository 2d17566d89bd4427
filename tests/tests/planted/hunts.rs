//! Which test must find which defect.

use anyhow::{Result, bail};

/// A defect, and the test that must find it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hunt {
    /// `package/name`.
    pub(crate) fault: &'static str,
    /// The tests' program: its folder, and its name there or `lib`.
    pub(crate) program: &'static str,
    /// The test in it.
    pub(crate) case: &'static str,
    /// A variable of its environment: more rounds than usual, say.
    pub(crate) variable: Option<(&'static str, &'static str)>,
}

impl Hunt {
    /// All, as the table has them.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let lines = include_str!("hunts.txt").lines().map(str::trim);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(Self::read).collect()
    }

    fn read(line: &'static str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (fault, program, case, variable) = match words[..] {
            [fault, program, case] => (fault, program, case, None),
            [fault, program, case, variable] => (fault, program, case, variable.split_once('=')),
            _ => bail!("hunts.txt: \"{line}\": not a defect, a program and a test"),
        };
        Ok(Self {
            fault,
            program,
            case,
            variable,
        })
    }

    /// The package that has the defect.
    pub(crate) fn package(&self) -> &'static str {
        self.fault
            .split_once('/')
            .map_or("", |(package, _)| package)
    }

    /// The name of the tests' program within its package.
    pub(crate) fn name(&self) -> &'static str {
        self.program.split_once('/').map_or("", |(_, name)| name)
    }

    /// The test, as people name it.
    pub(crate) fn test(&self) -> String {
        let (program, case) = (self.program, self.case);
        match self.variable {
            Some((name, value)) => format!("{program} {case} {name}={value}"),
            None => format!("{program} {case}"),
        }
    }

    /// Whether its test makes hosts, and starts real nodes on them.
    pub(crate) fn needs_kernels(&self) -> bool {
        self.program.starts_with("tests/")
    }
}
