//! The program as scripts see it: exit codes, and what goes to which stream.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Wrong usage or configuration.
const EXIT_USAGE: i32 = 64;

const NODE: &str = r#"[node]
name = "r1"
data_dir = "data"
key_file = "group.key"
[coord]
client = "127.0.0.1:2181"
peers = { r1 = "127.0.0.1:2888" }
[group]
members = { r1 = "127.0.0.1:7400" }
[[service]]
name = "web"
vip = "10.98.0.100/24"
ports = [80]
interface = "eth0"
upstream = "127.0.0.1:7000"
"#;

struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("unbroken-cli-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn unbroken(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unbroken"))
        .args(args)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn help_and_version_go_to_standard_output() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["node", "--help"],
        &["help", "status"],
    ] {
        let output = unbroken(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
    }
    let version = format!("unbroken {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(text(&unbroken(&["--version"]).stdout), version);
}

#[test]
fn wrong_usage_exits_64() {
    for args in [
        &[][..],
        &["nod"],
        &["node"],
        &["check", "-c"],
        &["status", "--admin", "a:1", "-c", "b"],
        &["--log", "unbroken=loudly", "keygen"],
        &["bench", "--through", "127.0.0.1:1"],
        &[
            "bench",
            "--through",
            "127.0.0.1:1",
            "--direct",
            "127.0.0.1:1",
            "--rounds",
            "0",
        ],
    ] {
        let output = unbroken(args);
        assert_eq!(
            output.status.code(),
            Some(EXIT_USAGE),
            "{args:?}: {}",
            text(&output.stderr)
        );
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
}

#[test]
fn a_generated_key_makes_a_configuration_good() {
    let folder = Folder::new("good");
    let config = folder.file("node.toml", NODE);
    let output = unbroken(&["check", "-c", &config]);
    assert_eq!(output.status.code(), Some(EXIT_USAGE));
    assert!(
        text(&output.stderr).contains("unbroken keygen > "),
        "{}",
        text(&output.stderr)
    );

    folder.file("group.key", unbroken(&["keygen"]).stdout);
    let output = unbroken(&["check", "-c", &config]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with(&format!("{config}: ok\n")));
    assert_eq!(
        unbroken(&["check", "--coord", "-c", &config]).status.code(),
        Some(0)
    );
}

/// File, line, key, value and what was expected, for each mistake, whichever command reads the file.
#[test]
fn a_bad_configuration_exits_64_and_says_why() {
    let folder = Folder::new("bad");
    folder.file("group.key", [b'k'; 32]);
    let bad = NODE
        .replace("10.98.0.100/24", "10.98.0.300")
        .replace("7400", "74000");
    let config = folder.file("node.toml", bad);
    for args in [
        ["check", "-c", &config],
        ["node", "-c", &config],
        ["status", "-c", &config],
    ] {
        let output = unbroken(&args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_USAGE), "{args:?}: {stderr}");
        for expected in [
            format!("{config}:9:18: error: group.members.r1 = \"127.0.0.1:74000\": not an address"),
            "expected IP:PORT as in".to_owned(),
            format!("{config}:12:7: error: service[0].vip = \"10.98.0.300\": not an address"),
            "expected an IPv4 or IPv6 address with its prefix".to_owned(),
            format!("{config}: 2 errors\n"),
        ] {
            assert!(
                stderr.contains(&expected),
                "{args:?}: no \"{expected}\" in:\n{stderr}"
            );
        }
    }
}

#[test]
fn a_node_that_does_not_answer_makes_status_fail() {
    // Bound and closed again: nobody listens there.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let output = unbroken(&["status", "--admin", &free]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains(&format!("{free}: no answer: ")));
    let output = unbroken(&["status", "--json", "--admin", &free]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).starts_with(&format!("{{\"admin\":\"{free}\",\"error\":")));
}

#[test]
fn the_benchmark_runs_against_its_server() {
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap().to_string();
    let output = unbroken(&["bench-server", "--listen", &address]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains(&address),
        "{}",
        text(&output.stderr)
    );

    let mut server = Command::new(env!("CARGO_BIN_EXE_unbroken"))
        .args(["bench-server", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap();
    let output = unbroken(&[
        "bench",
        "--through",
        address,
        "--direct",
        address,
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--bulk-mib",
        "1",
        "--json",
    ]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["figures"].as_array().unwrap().len(), 8);
    assert_eq!(json["targets"]["through"], address);
}

/// A loopback address of this process's own, so that fixed ports collide with nobody's.
fn own_address() -> String {
    let [_, high, low, _] = (std::process::id() << 8).to_be_bytes();
    format!("127.{}.{high}.{low}", 64 + (std::process::id() >> 16) % 64)
}

#[test]
fn a_coordinator_alone_serves_and_stops_gracefully() {
    let folder = Folder::new("coord");
    folder.file("group.key", [b'k'; 32]);
    let ip = own_address();
    let clients = format!("{ip}:2181");
    let config = folder.file(
        "coord.toml",
        format!(
            "[node]\nname = \"c1\"\ndata_dir = \"data\"\nkey_file = \"group.key\"\n\
             [coord]\nclient = \"{clients}\"\npeers = {{ c1 = \"{ip}:2888\" }}\n\
             [admin]\nlisten = \"{ip}:9600\"\n"
        ),
    );
    let mut server = Command::new(env!("CARGO_BIN_EXE_unbroken"))
        .args(["coord", "-c", &config, "--log-format", "json"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    let mut wait_for = |message: &str| {
        let found = log.by_ref().find(|line| {
            let line: serde_json::Value = serde_json::from_str(line.as_ref().unwrap()).unwrap();
            line["fields"]["message"] == message
        });
        assert!(found.is_some(), "the log ended without \"{message}\"");
    };
    wait_for("coordinator started");

    let zk = |args: &[&str]| unbroken(&[&["zk", "--server", &clients], args].concat());
    let output = zk(&["create", "/greeting", "hello"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = unbroken(&["status", "--json", "--admin", &format!("{ip}:9600")]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&status["node"], &status["coordinator"]["role"]),
        (&"c1".into(), &"leader".into())
    );

    // What it shows may be a moment old.
    let metrics = loop {
        let mut page = std::net::TcpStream::connect(format!("{ip}:9600")).unwrap();
        page.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut metrics = String::new();
        page.read_to_string(&mut metrics).unwrap();
        if metrics.contains("operation=\"CREA\"} 1") {
            break metrics;
        }
    };
    for line in [
        "unbroken_coordinator_leads{node=\"c1\"} 1",
        "unbroken_coordinator_znodes{node=\"c1\"} ",
        "unbroken_coordinator_write_duration_seconds_count{node=\"c1\"} ",
        "unbroken_coordinator_sync_duration_seconds_bucket{node=\"c1\",le=\"+Inf\"} ",
    ] {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }

    // A second one finds the port occupied at once, and says which.
    let second = unbroken(&["coord", "-c", &config]);
    assert_eq!(second.status.code(), Some(1));
    let expected = format!("listening on admin.listen = \"{ip}:9600\"");
    assert!(
        text(&second.stderr).contains(&expected),
        "{}",
        text(&second.stderr)
    );

    let killed = Command::new("kill")
        .args(["-TERM", &server.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    wait_for("stopped");
    assert_eq!(server.wait().unwrap().code(), Some(0));
}
