//! The examples run to their ends, by themselves, and say what they should.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::process::{Command, Output};

fn run(example: &str, arguments: &[&str]) -> Output {
    let mut program: PathBuf = std::env::current_exe().unwrap();
    program.pop();
    program.set_file_name("examples");
    program.push(example);
    let output = Command::new(&program).args(arguments).output();
    // `cargo test` builds them before it runs any test; `cargo test --test examples` does not.
    let build = format!("cargo build -p unbroken-group --example {example}");
    output.unwrap_or_else(|e| panic!("{}: {e}; build it: {build}", program.display()))
}

fn shows(example: &str, arguments: &[&str], line: &str) {
    let output = run(example, arguments);
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{example}: {said}\n{wrong}");
    assert!(said.contains(line), "{example}: {said}\n{wrong}");
}

#[test]
fn dictionary() {
    shows(
        "dictionary",
        &[],
        "r2 has hund: dog, katze: cat, maus: mouse",
    );
}

#[test]
fn chat() {
    shows("chat", &[], "all three saw the same");
    shows("chat", &["--lines", "30"], "in the same order");
}

#[test]
fn parallel_search() {
    shows("parallel_search", &[], "one member alone finds the same");
}

#[test]
fn work_queue() {
    shows("work_queue", &[], "all 60 jobs are done, each once");
}

/// Several processes, killed by SIGKILL.
#[test]
fn durable() {
    shows("durable", &[], "5 failures of all: none of ");
}

#[test]
fn they_explain_themselves() {
    for (example, argument) in [
        ("chat", "--lines"),
        ("parallel_search", "--members"),
        ("work_queue", "--jobs"),
        ("durable", "--rounds"),
    ] {
        shows(example, &["--help"], argument);
        let wrong = run(example, &[argument, "none"]);
        assert_eq!(wrong.status.code(), Some(64));
        let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
        assert!(said.contains(&format!("{argument} none")), "{said}");
        assert_eq!(run(example, &["--nonsense"]).status.code(), Some(64));
    }
}
