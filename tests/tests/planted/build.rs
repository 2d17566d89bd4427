//! Builds the tests with the defects in them, once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::hunts::Hunt;

/// A program of tests, and the folder of its package, in which it runs.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) folder: PathBuf,
}

/// The programs that the hunts need, by folder and name (`tcpstate/segments`, `group/lib`).
#[derive(Debug)]
pub(crate) struct Tests {
    programs: BTreeMap<String, Program>,
    /// Where what the tests print is kept.
    pub(crate) logs: PathBuf,
}

impl Tests {
    pub(crate) fn build(hunts: &[Hunt]) -> Result<Self> {
        let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let root = root.canonicalize().context("finding the workspace")?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(root);
        command.args([
            "test",
            "--no-run",
            "--workspace",
            "--features",
            "unbroken-tests/faults",
        ]);
        command.arg("--message-format=json-render-diagnostics");
        let names: BTreeSet<&str> = hunts.iter().map(|hunt| hunt.name()).collect();
        for name in names {
            match name {
                "lib" => command.arg("--lib"),
                name => command.args(["--test", name]),
            };
        }
        let output = command.stderr(Stdio::inherit()).output();
        let output = output.context("running cargo")?;
        if !output.status.success() {
            bail!("the tests do not build");
        }
        let mut programs = BTreeMap::new();
        for line in output.stdout.split(|byte| *byte == b'\n') {
            let Ok(artifact) = serde_json::from_slice::<Value>(line) else {
                continue;
            };
            let text = |pointer| artifact.pointer(pointer).and_then(Value::as_str);
            let (Some(path), Some(manifest)) = (text("/executable"), text("/manifest_path")) else {
                continue;
            };
            let name = match text("/target/kind/0") {
                Some("test") => text("/target/name").unwrap_or_default(),
                Some("lib") => "lib",
                _ => continue,
            };
            let folder = PathBuf::from(manifest);
            let folder = folder.parent().context("a manifest is in a folder")?;
            let package = folder.file_name().unwrap_or_default().to_string_lossy();
            let program = Program {
                path: path.into(),
                folder: folder.to_owned(),
            };
            programs.insert(format!("{package}/{name}"), program);
        }
        let logs = PathBuf::from(concat!(env!("CARGO_TARGET_TMPDIR"), "/planted"));
        std::fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        Ok(Self { programs, logs })
    }

    pub(crate) fn program(&self, hunt: &Hunt) -> Result<&Program> {
        let program = self.programs.get(hunt.program);
        program.with_context(|| format!("{}: no such tests", hunt.program))
    }
}
