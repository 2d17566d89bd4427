//! The network of hosts does what the other tests assume of it.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use unbroken_tests::netns::{Lab, LabOptions, userns, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// A directory that goes when the test does.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ub-netns-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// Connects from the client host and exchanges a few bytes.
fn talk(lab: &Lab, listener: &TcpListener) {
    let to = listener.local_addr().unwrap();
    lab.host("c").enter(|| {
        let mut client = TcpStream::connect_timeout(&to, SOON).unwrap();
        let (mut server, from) = listener.accept().unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        client.write_all(b"hello").unwrap();
        let mut buffer = [0; 5];
        server.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");
    });
}

/// Whether one datagram from the client host arrives, of a few sent.
fn hears(lab: &Lab, listener: &std::net::UdpSocket) -> bool {
    let to = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut buffer = [0; 64];
    while listener.recv(&mut buffer).is_ok() {}
    let sender = lab
        .host("c")
        .enter(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
    wait_until("datagram", Duration::from_millis(300), || {
        // Refused or unreachable while the cable is out: not heard.
        let _ = sender.send_to(b"ping", to);
        listener.recv(&mut buffer).is_ok()
    })
    .is_ok()
}

fn hosts_reach_each_other() {
    let lab = Lab::new(LabOptions::default()).unwrap();
    for name in ["r1", "r2", "r3"] {
        let host = lab.host(name);
        for address in [host.address().into(), host.address6().into()] {
            let at = SocketAddr::new(address, 80);
            talk(&lab, &host.enter(|| TcpListener::bind(at).unwrap()));
        }
    }
    assert_eq!(lab.host("r2").address().to_string(), "10.98.0.12");
    assert_eq!(lab.host("r2").address6().to_string(), "fd98::12");
}

#[test]
fn every_host_is_reached_by_both_families() {
    userns::privileged(
        "every_host_is_reached_by_both_families",
        hosts_reach_each_other,
    );
}

#[test]
fn a_cut_or_muted_host_hears_nothing_until_restored() {
    userns::privileged("a_cut_or_muted_host_hears_nothing_until_restored", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let r1 = lab.host("r1");
        let at = SocketAddr::new(r1.address().into(), 7);
        let listener = r1.enter(|| std::net::UdpSocket::bind(at).unwrap());
        let carrier = || {
            let mut command = Command::new("ip");
            command.args(["-o", "link", "show", "dev", "eth0"]);
            !String::from_utf8(r1.output(command).unwrap().stdout)
                .unwrap()
                .contains("NO-CARRIER")
        };
        assert!(hears(&lab, &listener) && carrier());
        lab.mute("r1").unwrap();
        assert!(!hears(&lab, &listener));
        assert!(carrier(), "a muted host is not told");
        lab.unmute("r1").unwrap();
        assert!(hears(&lab, &listener));
        lab.cut("r1").unwrap();
        assert!(!hears(&lab, &listener));
        assert!(!carrier(), "a cut cable shows");
        lab.plug("r1").unwrap();
        assert!(hears(&lab, &listener) && carrier());
    });
}

#[test]
fn killing_a_host_takes_the_node_first_and_leaves_nobody() {
    userns::privileged(
        "killing_a_host_takes_the_node_first_and_leaves_nobody",
        || {
            let scratch = Scratch::new("kill");
            let lab = Lab::new(LabOptions { replicas: 2 }).unwrap();
            let start = |host: &str, label: &str, program: &str, script: &str| {
                let mut command = shell(script);
                command.arg0(program).args(["node", "-c", "file"]);
                let log = scratch.file(&format!("{host}-{label}.log"));
                lab.host(host).spawn(label, command, &log).unwrap()
            };
            // The children of a shell are nobody's `Process`, and must go all the same.
            let family = "sleep 1000 & sleep 1000 & echo ready; wait";
            let mut server = start("r1", "server", "server", family);
            let mut node = start("r1", "node", "unbroken", family);
            let mut other = start("r2", "node", "unbroken", family);
            for process in [&mut server, &mut node, &mut other] {
                process.wait_for_line("ready", SOON).unwrap();
            }
            let killed = lab.kill_host("r1").unwrap();
            assert_eq!(killed.processes.len(), 6, "{killed:?}");
            assert_eq!(killed.processes[0].0, node.pid(), "{killed:?}");
            assert!(!server.wait(SOON).unwrap().success());
            assert!(!node.is_running());
            assert!(other.is_running(), "another host is another host");
        },
    );
}

#[test]
fn a_program_that_ends_early_says_why() {
    userns::privileged("a_program_that_ends_early_says_why", || {
        let scratch = Scratch::new("early");
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let log = scratch.file("log");
        let mut process = lab
            .host("r1")
            .spawn("server", shell("echo no such file >&2; exit 3"), &log)
            .unwrap();
        let error = process
            .wait_for_line("ready", SOON)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no such file") && error.contains("exit status: 3"),
            "{error}"
        );
    });
}

fn namespaces_of(owner: u32) -> usize {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return 0;
    };
    let prefix = format!("ub-{owner}-");
    entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .count()
}

/// Makes a lab, says so in the file, and waits to be killed.
fn hold_a_lab(note: &Path) -> ! {
    let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
    let sleeper = lab
        .host("r1")
        .spawn("sleeper", shell("exec sleep 1000"), note)
        .unwrap();
    std::fs::write(note, format!("{}\n", sleeper.pid())).unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_owner_leaves_nothing_behind() {
    if let Some(note) = std::env::var_os("UNBROKEN_LAB_HOLDER") {
        hold_a_lab(Path::new(&note));
    }
    userns::privileged("a_killed_owner_leaves_nothing_behind", || {
        let scratch = Scratch::new("owner");
        let note = scratch.file("note");
        let mut holder = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_owner_leaves_nothing_behind"])
            .env("UNBROKEN_LAB_HOLDER", &note)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let read = || std::fs::read_to_string(&note).unwrap_or_default();
        wait_until("the other lab", SOON, || read().ends_with('\n')).unwrap();
        assert_eq!(namespaces_of(holder.id()), 3);
        holder.kill().unwrap();
        holder.wait().unwrap();
        wait_until("its removal", SOON, || namespaces_of(holder.id()) == 0).unwrap();
        let sleeper = Path::new("/proc").join(read().trim());
        wait_until("the end of its process", SOON, || !sleeper.exists()).unwrap();
    });
}

#[test]
fn a_dropped_lab_leaves_nothing_behind() {
    userns::privileged("a_dropped_lab_leaves_nothing_behind", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let prefix = lab.prefix().to_owned();
        let left = || {
            let entries = std::fs::read_dir("/run/netns").unwrap().flatten();
            entries
                .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
                .count()
        };
        assert_eq!(left(), 3);
        drop(lab);
        assert_eq!(left(), 0);
    });
}

/// The way without root, tried as an ordinary user where the tests themselves run as root.
#[test]
fn an_ordinary_user_gets_a_lab_in_a_user_namespace() {
    if !rustix::process::geteuid().is_root() || userns::is_reexecuted() {
        // Then every test of this file takes that way by itself.
        return;
    }
    let scratch = Scratch::new("user");
    let program = scratch.file("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new(&program)
        .args(["--exact", "every_host_is_reached_by_both_families"])
        .args(["--nocapture", "--test-threads=1"])
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let refused = text.contains("this machine refuses both");
    assert!(output.status.success() || refused, "{text}");
    if refused {
        println!("not tried: {text}");
    }
}
