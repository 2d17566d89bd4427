//! `unbroken determinism` on servers that are fit, and on servers that are not.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use etherparse::PacketBuilder;
use pcap_file::DataLink;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use serde_json::Value;

const UNFIT: i32 = 1;
const EXIT_USAGE: i32 = 64;

/// A server in one loop, on $PORT or its second argument. Its first says what it is like.
const SERVER: &str = r#"
import os, selectors, socket, sys, time
kind = sys.argv[1]
port = int(sys.argv[2] if len(sys.argv) > 2 else os.environ["PORT"])
with open(os.path.join(os.path.dirname(__file__), "pid" + os.environ["COPY"]), "w") as f:
    f.write(str(os.getpid()))
listener = socket.create_server(("127.0.0.1", port))
poll = selectors.DefaultSelector()
poll.register(listener, selectors.EVENT_READ, None)
lines = {}
while True:
    for key, _ in poll.select():
        if key.fileobj is listener:
            conn = listener.accept()[0]
            lines[conn] = b""
            poll.register(conn, selectors.EVENT_READ, conn)
            continue
        conn = key.data
        got = conn.recv(65536)
        answer = b""
        if kind == "pieces":
            answer = b"%d\n" % len(got) if got else b""
        else:
            lines[conn] += got
        while b"\n" in lines[conn]:
            line, lines[conn] = lines[conn].split(b"\n", 1)
            if kind == "date":
                answer += b"Date: %d\n" % time.time()
            if kind == "flip" and os.environ["COPY"] == "2":
                line = line.replace(b"second", b"sEcond")
            answer += line[::-1] + b"\n"
        if kind == "exit" and os.environ["COPY"] == "3" and got:
            sys.exit(7)
        if answer:
            conn.sendall(answer)
        if not got or (kind == "closes" and answer and os.environ["COPY"] == "3"):
            poll.unregister(conn)
            conn.close()
"#;

const SCRIPT: &str = r#"
# Two connections, the second while the first is open.
open a
send a "first\n"
wait a "tsrif\n"
open b
send b "second\nthird\n"
wait b 13
close a
wait a
"#;

struct Lab(PathBuf);

impl Lab {
    fn new(test: &str) -> Self {
        let name = format!("unbroken-determinism-{test}-{}", std::process::id());
        let folder = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(&folder.0).unwrap();
        folder.file("server.py", SERVER);
        folder.file("script", SCRIPT);
        folder
    }

    fn file(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.join(name), contents).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_unbroken"));
        // Time is of no concern but where a test says so.
        command
            .args(["determinism", "--stagger", "0ms", "--timeout", "2s"])
            .args(["--settle", "200ms"])
            .args(args)
            .current_dir(&self.0);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs it and reads the result.
    fn verdict(&self, args: &[&str], kind: &[&str]) -> (Option<i32>, Value) {
        let mut all = vec!["--json"];
        all.extend(args);
        all.extend(["--", "python3", "server.py"]);
        all.extend(kind);
        let output = self.run(&all);
        let text = format!("{}{}", text(&output.stdout), text(&output.stderr));
        let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{text}"));
        (output.status.code(), json)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn installed(program: &str, package: &str) {
    let found = Command::new(program).arg("--version").output();
    assert!(
        found.is_ok() || Path::new("/usr/sbin").join(program).exists(),
        "{program} is missing (Debian package {package})"
    );
}

#[test]
fn a_server_that_answers_alike_is_fit() {
    let lab = Lab::new("fit");
    // It learns its port from its environment.
    let (code, json) = lab.verdict(&["--script", "script"], &["plain"]);
    assert_eq!(code, Some(0), "{json}");
    assert_eq!(json["fit"], true);
    assert_eq!(
        (&json["copies"], &json["connections"]),
        (&3.into(), &2.into())
    );
    assert_eq!(
        (&json["input_bytes"], &json["output_bytes"]),
        (&19.into(), &19.into())
    );
    assert_eq!(json["notes"].as_array().unwrap().len(), 0, "{json}");
}

#[test]
fn a_flipped_byte_is_found_and_shown_in_context() {
    let lab = Lab::new("flip");
    let (code, json) = lab.verdict(&["--script", "script"], &["flip", "{port}"]);
    assert_eq!(code, Some(UNFIT));
    let found = json["differences"].as_array().unwrap();
    assert_eq!(found.len(), 1, "{json}");
    assert_eq!(found[0]["connection"], "b");
    assert_eq!(
        (&found[0]["copy"], &found[0]["offset"]),
        (&2.into(), &4.into())
    );
    assert_eq!(found[0]["client_sent"], r"second\nthird\n");

    let args = ["--script", "script", "--", "python3", "server.py", "flip"];
    let output = lab.run(&args);
    let shown = text(&output.stdout);
    assert!(shown.contains("connection \"b\", offset 4"), "{shown}");
    assert!(
        shown.contains("> 00000000  64 6e 6f 63>65 73 0a"),
        "{shown}"
    );
    assert!(
        shown.contains("> 00000000  64 6e 6f 63>45 73 0a"),
        "{shown}"
    );
    assert!(shown.contains("\nUNFIT"), "{shown}");
}

#[test]
fn closes_and_ends_count() {
    let lab = Lab::new("ends");
    let (code, json) = lab.verdict(&["--script", "script"], &["closes"]);
    assert_eq!(code, Some(UNFIT), "{json}");
    assert!(
        json["differences"]
            .as_array()
            .unwrap()
            .iter()
            .all(|d| d["copy"] == 3)
    );
    let (code, json) = lab.verdict(&["--script", "script"], &["exit"]);
    assert_eq!(code, Some(UNFIT), "{json}");
    let notes = json["notes"].to_string();
    assert!(
        notes.contains("copy 3: the server ended by itself (exit code 7)"),
        "{notes}"
    );
}

#[test]
fn the_time_is_found_out_and_may_be_declared_harmless() {
    let lab = Lab::new("date");
    let args = ["--script", "script", "--stagger", "1100ms", "--copies", "2"];
    lab.file(
        "script",
        "open a\nsend a \"first\\n\"\nwait a \"tsrif\\n\"\n",
    );
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_unbroken"));
        command.arg("determinism").args(args).args(more);
        command.args(["--", "python3", "server.py", "date"]);
        command.current_dir(&lab.0).output().unwrap()
    };
    let output = run(&[]);
    assert_eq!(
        output.status.code(),
        Some(UNFIT),
        "{}",
        text(&output.stdout)
    );
    let output = run(&["--ignore", "^Date: .*"]);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{shown}");
    assert!(shown.contains("16 of them declared harmless"), "{shown}");
}

#[test]
fn a_server_that_depends_on_how_its_input_is_cut_is_unfit() {
    let lab = Lab::new("pieces");
    let script = "open a\nsend a \"a request that is long enough to be cut\\n\"\nwait a\n";
    lab.file("script", script);
    let (code, json) = lab.verdict(&["--script", "script"], &["pieces"]);
    assert_eq!(code, Some(UNFIT), "{json}");
    let (code, json) = lab.verdict(&["--script", "script", "--no-pieces"], &["pieces"]);
    assert_eq!(code, Some(0), "{json}");
}

#[test]
fn a_fixed_port_is_served_in_networks_of_their_own() {
    let lab = Lab::new("port");
    let args = ["--script", "script", "--port", "80"];
    let (code, json) = lab.verdict(&args, &["plain", "80"]);
    assert_eq!((code, &json["fit"]), (Some(0), &true.into()), "{json}");
}

#[test]
fn the_clients_of_a_capture_are_replayed() {
    let lab = Lab::new("pcap");
    let header = PcapHeader {
        datalink: DataLink::ETHERNET,
        ..PcapHeader::default()
    };
    let mut writer = PcapWriter::with_header(Vec::new(), header).unwrap();
    let mut packet = |seq: u32, syn: bool, payload: &[u8]| {
        let frame = PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
        let frame = frame.tcp(40_000, 7, seq, 1000);
        let frame = if syn { frame.syn() } else { frame.ack(1) };
        let mut bytes = Vec::new();
        frame.write(&mut bytes, payload).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        writer
            .write_packet(&PcapPacket::new(Duration::ZERO, length, &bytes))
            .unwrap();
    };
    packet(99, true, b"");
    packet(100, false, b"second\n");
    packet(107, false, b"third\n");
    lab.file("clients.pcap", writer.into_writer());
    let args = ["--pcap", "clients.pcap", "--pcap-port", "7"];
    let (code, json) = lab.verdict(&args, &["plain"]);
    assert_eq!(
        (code, &json["output_bytes"]),
        (Some(0), &13.into()),
        "{json}"
    );
    let (code, json) = lab.verdict(&args, &["flip"]);
    assert_eq!(code, Some(UNFIT), "{json}");
    assert_eq!(json["differences"][0]["connection"], "10.0.0.1:40000");
}

/// Starts it for live clients, and says where they are served.
fn listen(lab: &Lab, kind: &str) -> (std::process::Child, String) {
    let args = [
        "--json",
        "--listen",
        "127.0.0.1:0",
        "--",
        "python3",
        "server.py",
        kind,
    ];
    let mut command = lab.command(&args);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    let address = line
        .strip_prefix("serving clients on ")
        .and_then(|rest| rest.split(' ').next())
        .unwrap_or_else(|| panic!("{line}"));
    // What it says further must not stop it.
    std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
    (child, address.to_owned())
}

fn terminate(child: &std::process::Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn live_clients_are_served_and_the_others_compared() {
    for (kind, code) in [("plain", 0), ("flip", UNFIT)] {
        let lab = Lab::new(&format!("live-{kind}"));
        let (child, address) = listen(&lab, kind);
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"first\nsecond\n").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "tsrif\ndnoces\n");
        terminate(&child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stdout));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&json["connections"], &json["output_bytes"]),
            (&1.into(), &13.into())
        );
    }
}

#[test]
fn a_signal_stops_the_copies_too() {
    let lab = Lab::new("signal");
    let (child, _) = listen(&lab, "plain");
    let pids: Vec<i32> = (1..=3)
        .map(|copy| fs::read_to_string(lab.0.join(format!("pid{copy}"))).unwrap())
        .map(|pid| pid.parse().unwrap())
        .collect();
    terminate(&child);
    let output = child.wait_with_output().unwrap();
    // Nobody said anything, so nothing is known.
    assert_eq!(output.status.code(), Some(UNFIT));
    for pid in pids {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        assert!(rustix::process::test_kill_process(pid).is_err());
    }
}

#[test]
fn a_server_that_cannot_be_tried_is_told_so() {
    let lab = Lab::new("bad");
    let args = |command: &'static str| ["--script", "script", "--", "sh", "-c", command];
    let output = lab.run(&args("echo oops; exit 3"));
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(UNFIT));
    assert!(
        error.contains("it ended (exit code 3) before it listened"),
        "{error}"
    );
    assert!(error.contains("| oops"), "{error}");
    let mut command = vec!["--start-within", "100ms"];
    command.extend(args("exec sleep 60"));
    let error = text(&lab.run(&command).stderr);
    assert!(
        error.contains("did not listen") && error.contains("--port"),
        "{error}"
    );
    // A server that says nothing proves nothing.
    lab.file("silent", "open a\n");
    let output = lab.run(&["--script", "silent", "--", "python3", "server.py", "plain"]);
    assert_eq!(output.status.code(), Some(UNFIT));
    assert!(text(&output.stderr).contains("nothing was compared"));
}

#[test]
fn wrong_usage_exits_64() {
    let lab = Lab::new("usage");
    lab.file("bad", "opn a\n");
    for args in [
        &["--script", "script"][..],
        &["--", "server"],
        &["--script", "script", "--copies", "1", "--", "server"],
        &["--script", "script", "--copies", "0", "--", "server"],
        &["--script", "script", "--pcap", "x", "--", "server"],
        &["--script", "bad", "--", "server"],
        &["--script", "missing", "--", "server"],
        &["--script", "script", "--ignore", "(", "--", "server"],
        &["--script", "script", "--for", "1s", "--", "server"],
        &[
            "--script",
            "script",
            "--ordering",
            "total",
            "--server-addr",
            "127.0.0.1:1",
        ],
    ] {
        let output = lab.run(args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_USAGE), "{args:?}: {error}");
        assert!(!error.is_empty() && output.stdout.is_empty());
    }
}

#[test]
fn redis_is_fit_for_total_order() {
    installed("redis-server", "redis-server");
    let lab = Lab::new("redis");
    let mut script = String::new();
    for i in 0..8 {
        script += &format!("open c{i}\n");
    }
    for round in 0..4 {
        for i in 0..8 {
            script +=
                &format!("send c{i} \"INCR x\\r\\nLPUSH l {round}-{i}\\r\\nLINDEX l 0\\r\\n\"\n");
        }
    }
    script += "send c0 \"LRANGE l 0 -1\\r\\n\"\nwait c0\n";
    lab.file("script", script);
    let server = [
        "redis-server",
        "--port",
        "{port}",
        "--save",
        "",
        "--dir",
        "{dir}",
    ];
    let mut args = vec!["--script", "script", "--ordering", "total", "--"];
    args.extend(server);
    let output = lab.run(&args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

#[test]
fn nginx_is_fit_but_for_the_date() {
    installed("nginx", "nginx-light");
    let lab = Lab::new("nginx");
    lab.file(
        "nginx.conf",
        "user root; pid nginx.pid; error_log stderr; events {}\n\
         http { access_log off; server { listen 80; location / { return 200 \"hello\\n\"; } } }\n",
    );
    lab.file(
        "http",
        "open a\nsend a \"GET / HTTP/1.0\\r\\n\\r\\n\"\nwait a\n",
    );
    let file = lab.0.join("nginx.conf");
    let file = file.to_str().unwrap();
    let run = |more: &[&str]| {
        let mut args = vec!["--script", "http", "--port", "80", "--ignore", "^Date: .*"];
        args.extend(more);
        args.extend([
            "--",
            "nginx",
            "-p",
            "{dir}",
            "-c",
            file,
            "-g",
            "daemon off;",
        ]);
        let mut command = lab.command(&args);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{path}:/usr/sbin"))
            .output()
            .unwrap()
    };
    let output = run(&[]);
    let shown = text(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{shown}{}",
        text(&output.stderr)
    );
    assert!(shown.contains("36 of them declared harmless"), "{shown}");
}
