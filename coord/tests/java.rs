//! The Java world's clients, unchanged, against three servers: the Java client, Curator and its recipes, `zkCli.sh`.
//!
//! What is checked stands in `tests/java/`, and holds for Apache ZooKeeper too. To see it there, name its three
//! servers, `UNBROKEN_TEST_ENSEMBLE=HOST:PORT,HOST:PORT,HOST:PORT`, and a program that does `kill HOST:PORT`, `start
//! HOST:PORT` and `replace HOST:PORT` (nothing there: a removed server waits), `UNBROKEN_TEST_CONTROL=PROGRAM`, and
//! run one test at a time. They need `extendedTypesEnabled`,
//! `reconfigEnabled`, `enforceQuota`, and the super user's digest of `super:test`.

#![expect(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "shared with the other tests, which use the rest")]
mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::Cluster;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/java");
const JARS: &str = "/usr/share/java";
const ZKCLI: &str = "/usr/share/zookeeper/bin/zkCli.sh";

/// The checks take about half a minute on an idle machine; this is for one that hangs.
const LIMIT: Duration = Duration::from_secs(400);

/// Digest of `super:test`.
const SUPER_DIGEST: &str = "super:D/InIHSb7yEEbrWz8b9l71RjZJU=";

/// What is installed, and which Debian package has it.
const NEEDED: [(&str, &str); 5] = [
    ("/usr/bin/javac", "default-jdk-headless"),
    (ZKCLI, "zookeeper"),
    ("/usr/share/java/zookeeper.jar", "libzookeeper-java"),
    (
        "/usr/share/java/curator-recipes.jar",
        "libcurator-recipes-java",
    ),
    ("/usr/share/java/slf4j-nop.jar", "libslf4j-java"),
];

/// The servers under test.
enum Ensemble {
    /// Ours.
    Ours(Cluster),
    /// Somebody else's, and the program that kills and starts them.
    Others { hosts: String, control: String },
}

impl Ensemble {
    async fn start() -> Self {
        for (path, package) in NEEDED {
            assert!(
                Path::new(path).exists(),
                "{path} is missing: install the package {package}"
            );
        }
        match std::env::var("UNBROKEN_TEST_ENSEMBLE") {
            Ok(hosts) => {
                let control = std::env::var("UNBROKEN_TEST_CONTROL").unwrap_or_default();
                Self::Others { hosts, control }
            }
            Err(_) => Self::Ours(
                Cluster::start(|config| {
                    // What is checked here is the protocol: no change of leader where the machine is
                    // busy, but for those that are asked for.
                    config.heartbeat = Duration::from_millis(20);
                    config.election_min = Duration::from_millis(500);
                    config.election_max = Duration::from_millis(1000);
                    config.extended_types = true;
                    config.reconfig = true;
                    config.super_digest = Some(SUPER_DIGEST.to_owned());
                })
                .await,
            ),
        }
    }

    fn hosts(&self) -> String {
        match self {
            Self::Ours(cluster) => cluster.hosts("a").join(","),
            Self::Others { hosts, .. } => hosts.clone(),
        }
    }

    /// `kill HOST:PORT`, `start HOST:PORT` or `replace HOST:PORT`.
    async fn control(&mut self, request: &str) {
        match self {
            Self::Ours(cluster) => {
                let (what, host) = request.split_once(' ').expect("an action and a server");
                let at = cluster.hosts("a").iter().position(|other| other == host);
                let name = ["a", "b", "c"][at.expect("one of the servers")];
                match what {
                    "kill" => cluster.kill(name),
                    "start" => cluster.up(name).await,
                    "replace" => {
                        cluster.stop(name).await;
                        cluster.wipe(name);
                        cluster.up(name).await;
                    }
                    _ => panic!("unknown request {request:?}"),
                }
            }
            Self::Others { control, .. } => {
                let status = Command::new(&control).args(request.split(' ')).status();
                let status = status.await.expect("UNBROKEN_TEST_CONTROL names a program");
                assert!(status.success(), "{control} {request}: {status}");
            }
        }
    }
}

fn class_path(classes: &Path) -> String {
    let jars = [
        "zookeeper",
        "curator-recipes",
        "slf4j-nop",
        "metrics-core",
        "snappy-java",
    ];
    let mut path = classes.display().to_string();
    for jar in jars {
        path += &format!(":{JARS}/{jar}.jar");
    }
    path
}

/// Compiles the checks.
async fn compile(classes: &Path) {
    std::fs::create_dir_all(classes).unwrap();
    let sources = std::fs::read_dir(SOURCES)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let sources = sources.filter(|path| path.extension().is_some_and(|kind| kind == "java"));
    let output = Command::new("javac")
        .args(["-Xlint:all,-path,-try", "-Werror", "-J-Xmx256m", "-cp"])
        .arg(class_path(classes))
        .arg("-d")
        .arg(classes)
        .args(sources)
        .kill_on_drop(true)
        .output();
    let output = timeout(LIMIT, output)
        .await
        .expect("the compiler ends")
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_java_client_and_curator() {
    let mut ensemble = Ensemble::start().await;
    let classes =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("java-{}", std::process::id()));
    compile(&classes).await;

    let mut program = Command::new("java")
        .args([
            "-Xmx256m",
            "-XX:+UseSerialGC",
            "-cp",
            &class_path(&classes),
            "Main",
        ])
        .arg(ensemble.hosts())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = program.stdin.take().unwrap();
    let mut output = BufReader::new(program.stdout.take().unwrap()).lines();
    let (mut passed, mut other) = (0, Vec::new());
    let run = async {
        while let Some(line) = output.next_line().await.unwrap() {
            if let Some(request) = line.strip_prefix("control ") {
                ensemble.control(request).await;
                input.write_all(b"done\n").await.unwrap();
            } else if line.starts_with("ok ") {
                passed += 1;
            } else {
                other.push(line);
            }
        }
    };
    let ended = timeout(LIMIT, run).await;
    assert!(
        ended.is_ok(),
        "no end after {passed} checks; failures: {other:#?}"
    );
    let status = program.wait().await.unwrap();
    assert_eq!(other, ["0 failed"], "{passed} checks passed");
    assert!(
        status.success() && passed > 50,
        "{status}, {passed} checks passed"
    );
    std::fs::remove_dir_all(&classes).unwrap();
}

/// A command of `zkcli.txt`: what it must print, and what watches must tell.
#[derive(Debug, Default)]
struct Step<'a> {
    command: &'a str,
    prints: Vec<&'a str>,
    told: Vec<&'a str>,
}

fn steps(text: &str) -> Vec<Step<'_>> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(command) = line.strip_prefix("> ") {
            let step = Step {
                command,
                ..Step::default()
            };
            steps.push(step);
            continue;
        }
        let step = steps.last_mut().expect("a command comes first");
        match line.strip_prefix("! ") {
            Some(event) => step.told.push(event),
            None => step.prints.push(line),
        }
    }
    steps
}

/// Whether `lines` are the `patterns`, of which one that is `...` alone stands for any lines.
fn all_fit(patterns: &[&str], lines: &[&str]) -> bool {
    match patterns {
        [] => lines.is_empty(),
        ["...", rest @ ..] => (0..=lines.len()).any(|skip| all_fit(rest, &lines[skip..])),
        [pattern, rest @ ..] => match lines {
            [] => false,
            [line, others @ ..] => fits(pattern, line) && all_fit(rest, others),
        },
    }
}

/// Whether `line` is `pattern`, in which `...` stands for anything.
fn fits(pattern: &str, line: &str) -> bool {
    let Some((start, rest)) = pattern.split_once("...") else {
        return pattern == line;
    };
    let Some(mut line) = line.strip_prefix(start) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split("...").collect();
    let end = parts.pop().expect("at least one");
    for part in parts {
        match line.find(part) {
            Some(at) => line = &line[at + part.len()..],
            None => return false,
        }
    }
    line.ends_with(end)
}

#[test]
fn patterns() {
    for (pattern, line, fit) in [
        ("a", "a", true),
        ("a", "ab", false),
        ("a...", "ab", true),
        ("a...c...e", "abcde", true),
        ("a...c...e", "abde", false),
        ("a...b", "ba", false),
    ] {
        assert_eq!(fits(pattern, line), fit, "{pattern} {line}");
    }
    assert!(all_fit(&["a", "...", "b..."], &["a", "x", "b1"]));
    assert!(!all_fit(&["a", "...", "b..."], &["a", "b1", "x"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zkcli() {
    // Its data stand between the answers.
    const MARK: &str = "== end of the answer ==";
    let ensemble = Ensemble::start().await;
    let text = std::fs::read_to_string(Path::new(SOURCES).join("zkcli.txt")).unwrap();
    let steps = steps(&text);
    let mut script = format!("create /zkcli-mark \"{MARK}\"\nget /zkcli-mark\n");
    for step in &steps {
        script += &format!("{}\nget /zkcli-mark\n", step.command);
    }
    script += "delete /zkcli-mark\nquit\n";

    let mut shell = Command::new("sh")
        .args([
            "-c",
            "exec \"$0\" -waitforconnection -server \"$1\" 2>&1",
            ZKCLI,
            &ensemble.hosts(),
        ])
        .env("CLIENT_JVMFLAGS", "-Xmx128m -XX:+UseSerialGC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = shell.stdin.take().unwrap();
    tokio::spawn(async move {
        input.write_all(script.as_bytes()).await.unwrap();
    });
    let output = timeout(LIMIT, shell.wait_with_output())
        .await
        .expect("zkCli.sh ends");
    let output = String::from_utf8(output.unwrap().stdout).unwrap();

    let mut told: Vec<String> = Vec::new();
    let mut answers: Vec<Vec<&str>> = vec![Vec::new()];
    for line in output
        .lines()
        .filter(|line| !line.is_empty() && *line != "WATCHER::")
    {
        if let Some(event) = line.strip_prefix("WatchedEvent state:SyncConnected type:") {
            if !event.starts_with("None ") {
                told.push(event.replace("path:", ""));
            }
        } else if line == MARK {
            answers.push(Vec::new());
        } else {
            answers.last_mut().expect("never empty").push(line);
        }
    }
    assert_eq!(answers.len(), steps.len() + 2, "{output}");
    // Before the first mark stands the greeting, after the last the farewell.
    let mut wrong = Vec::new();
    for (step, answer) in steps.iter().zip(answers.iter().skip(1)) {
        let fit = all_fit(&step.prints, answer);
        if !fit {
            wrong.push(format!("> {}\n{}", step.command, answer.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let expected: Vec<&str> = steps.iter().flat_map(|step| step.told.clone()).collect();
    assert_eq!(told, expected);
}
