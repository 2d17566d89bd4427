//! The demonstration itself, made short: it passes, it fails where it must, and it leaves nothing.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_unbroken-demo");

/// One cluster at a time: each wants all of a small machine.
static STAGE: Mutex<()> = Mutex::new(());

fn stage() -> MutexGuard<'static, ()> {
    STAGE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder of a test's own for the picture.
fn out(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn demo(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--seed", "1", "--out"])
        .arg(out(name))
        .args(arguments);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(name: &str, arguments: &[&str]) -> (u32, Output) {
    let child = demo(name, arguments)
        .spawn()
        .expect("the demonstration was built");
    (
        child.id(),
        child.wait_with_output().expect("its output can be read"),
    )
}

fn text(output: &Output) -> String {
    let parts = [&output.stdout, &output.stderr].map(|part| String::from_utf8_lossy(part));
    parts.join("\n")
}

/// What a demonstration of this pid would leave behind: its namespaces, its folder.
fn leftovers(pid: u32) -> Vec<PathBuf> {
    let folders = [PathBuf::from("/run/netns"), std::env::temp_dir()];
    let prefixes = [format!("ub-{pid}-"), format!("unbroken-demo-{pid}")];
    let entries = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten());
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            prefixes.iter().any(|prefix| name.starts_with(prefix))
        })
        .collect()
}

#[test]
fn three_clients_survive_a_kill_and_a_pulled_cable() {
    let _stage = stage();
    let (pid, output) = run("survive", &["--faults", "1", "--size", "30", "--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], true);
    let faults = report["faults"].as_array().unwrap();
    let kinds: Vec<_> = faults
        .iter()
        .map(|fault| fault["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["kill", "cable"]);
    for fault in faults {
        assert_ne!(fault["victim"], fault["new_leader"]);
        assert!(fault["new_view"].as_u64() > fault["old_view"].as_u64());
        assert_eq!(fault["longest_gap_ms"].as_array().unwrap().len(), 3);
    }
    let clients = report["clients"].as_array().unwrap();
    assert_eq!(clients.len(), 3);
    for client in clients {
        assert_eq!(client["sha256"].as_str().unwrap().len(), 64);
        assert!(client["verified"].as_u64().unwrap() > 0);
        if client["unit"] == "bytes" {
            assert_eq!(client["verified"], 30_000_000);
        }
    }
    let picture = std::fs::read_to_string(out("survive").join("throughput.svg")).unwrap();
    assert!(picture.contains("SIGKILL") && picture.contains("cable pulled"));
    assert_eq!(leftovers(pid), Vec::<PathBuf>::new());
}

/// The nodes agree by an ensemble of Apache ZooKeeper, and the clients notice no difference.
#[test]
fn clients_survive_with_an_apache_zookeeper_ensemble() {
    let _stage = stage();
    let arguments = ["--coordinator", "apache", "--faults", "2", "--size", "30"];
    let (pid, output) = run("apache", &[arguments.as_slice(), &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], true);
    assert_eq!(report["coordinator"], "apache");
    let faults = report["faults"].as_array().unwrap();
    let kinds: Vec<_> = faults
        .iter()
        .map(|fault| fault["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["kill", "kill", "cable"]);
    for fault in faults {
        assert_ne!(fault["victim"], fault["new_leader"]);
        let after = &fault["new_view_after_ms"];
        eprintln!("{} of the leader: new view after {after} ms", fault["kind"]);
    }
    assert_eq!(report["clients"].as_array().unwrap().len(), 3);
    assert_eq!(leftovers(pid), Vec::<PathBuf>::new());
}

#[test]
fn a_wrong_answer_fails_the_demonstration() {
    let _stage = stage();
    // The server's first answer begins with eight zero bytes.
    let server = format!("exec '{PROGRAM}' serve exchange --listen 127.0.0.1:7001");
    let (pid, output) = run(
        "wrong",
        &[
            ["--server", &server, "--port", "7001", "--faults", "0"].as_slice(),
            &[
                "--request",
                "a request of thirty-two bytes...",
                "--response",
                "no answer of it",
            ],
        ]
        .concat(),
    );
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("FAIL: requests: answer 0 is wrong from its byte 0 on"),
        "{said}"
    );
    // A failure keeps its logs, and says where.
    let kept = std::env::temp_dir().join(format!("unbroken-demo-{pid}"));
    assert!(said.contains(&kept.display().to_string()), "{said}");
    assert!(kept.join("r1/node.log").exists());
    std::fs::remove_dir_all(&kept).unwrap();
    assert_eq!(leftovers(pid), Vec::<PathBuf>::new());
}

#[test]
fn an_interrupt_takes_everything_down() {
    let _stage = stage();
    let mut child: Child = demo("interrupt", &["--size", "30"]).spawn().unwrap();
    let pid = Pid::from_child(&child);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let running = lines
        .by_ref()
        .map_while(Result::ok)
        .any(|line| line.contains("clients running"));
    assert!(running, "the clients never ran");
    kill_process(pid, Signal::INT).unwrap();
    // Read on, so that it never waits for us.
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert_eq!(leftovers(child.id()), Vec::<PathBuf>::new());
}

/// One fault of the benchmark, with its figures and the same without the fault.
#[test]
fn a_fault_is_measured() {
    let _stage = stage();
    let mut command = Command::new(PROGRAM);
    command.args(["bench-gap", "--only", "kill", "--faults", "1", "--json"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let figures = report["figures"].as_array().unwrap();
    let keys: Vec<_> = figures
        .iter()
        .map(|figure| figure["key"].as_str().unwrap())
        .collect();
    assert_eq!(
        keys,
        [
            "garp_none_receive",
            "garp_none_ask",
            "garp_kill_receive",
            "garp_kill_ask"
        ]
    );
    for figure in figures {
        assert_eq!(figure["gaps"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn wrong_usage_of_the_benchmark_is_said() {
    let output = Command::new(PROGRAM)
        .args(["bench-gap", "--only", "flod"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", text(&output));
    assert!(text(&output).contains("'flood'"), "{}", text(&output));
}
