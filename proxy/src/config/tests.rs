//! A whole example is read as it stands; every way to get it wrong says what is wrong.
//!
//! The messages are kept in `testdata/config_errors.txt`: `REWRITE=1 cargo test -p unbroken config`
//! writes them anew, and the difference is to be read.

use std::fmt::Write as _;

use unbroken_group::driver::{Multicast, Options, Pacing};

use super::*;

/// A node's file with most keys (the key is beside it).
const EXAMPLE: &str = r#"[node]
name = "r1"
data_dir = "/var/lib/unbroken"
key_file = "group.key"       # unbroken keygen > group.key; the same on every node

[coord]                                    # or: external = "zk://host1:2181,host2:2181/chroot"
client = "10.98.0.11:2181"                 # ZooKeeper protocol
peers = { r1 = "10.98.0.11:2888", r2 = "10.98.0.12:2888", r3 = "10.98.0.13:2888" }

[group]
members = { r1 = "10.98.0.11:7400", r2 = "10.98.0.12:7400", r3 = "10.98.0.13:7400" }
resilience = "majority"                    # k: "majority", "all", or a number of backups
heartbeat = "10ms"
lease = "30ms"                             # below suspect_after
suspect_after = "50ms"

[admin]
listen = "127.0.0.1:9600"                  # /status.json, /metrics, /healthz, status page

[[service]]
name = "web"
vip = "10.98.0.100/24"                     # or IPv6
ports = [80]
interface = "eth0"
upstream = "127.0.0.1:7000"                # or "unix:/run/app.sock"
address = "garp"                           # "vmac", "flood"
fence = "kernel"                           # "process"
ordering = "connection"                    # "total"
close_wait = "1s"
divergence = "evict"                       # "warn", "stop"
history = { memory = "256MiB", disk = "4GiB" }
# command = ["/usr/bin/server", "..."]; checkpoint = [...]; restore = [...]; health = { ... }
# on_promote = [...]; on_demote = [...]
"#;

/// A second service, to be put behind the example.
const SECOND: &str = r#"
[[service]]
name = "echo"
vip = "10.98.0.100/24"
ports = [7]
interface = "eth0"
upstream = "127.0.0.1:7001"
"#;

/// A folder with key files, removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("unbroken-config-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let folder = Self(path);
        for (name, contents, mode) in [
            (
                "group.key",
                "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n",
                0o600,
            ),
            (
                "open.key",
                "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n",
                0o644,
            ),
            ("short.key", "too short\n", 0o600),
        ] {
            let file = folder.0.join(name);
            std::fs::write(&file, contents).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        folder
    }

    fn parse(&self, text: &str) -> Result<Config, ConfigErrors> {
        Config::parse(&self.0.join("node.toml"), text)
    }

    /// The message without the folder's own name.
    fn message(&self, errors: &ConfigErrors) -> String {
        errors
            .to_string()
            .replace(&format!("{}/", self.0.display()), "")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn how_datagrams_travel_can_be_chosen() {
    let plain = Folder::new().parse(EXAMPLE).unwrap().group.transport;
    assert_eq!(plain, Options::default());
    let keys = r#"suspect_after = "50ms"
multicast = { address = "239.98.0.1:7401", shared_host = true }
pacing = { rate = "1Gbit/s", queue = "2MiB" }"#;
    let text = EXAMPLE.replace("suspect_after = \"50ms\"", keys);
    let transport = Folder::new().parse(&text).unwrap().group.transport;
    let multicast = Multicast {
        group: "239.98.0.1:7401".parse().unwrap(),
        interface: "10.98.0.11".parse().unwrap(),
        hops: 1,
        shared_host: true,
    };
    assert_eq!(transport.multicast, Some(multicast));
    let pacing = Pacing {
        bytes_per_us: 125.try_into().unwrap(),
        burst_bytes: 64 << 10,
        queue_bytes_max: 2 << 20,
    };
    assert_eq!(transport.pacing, Some(pacing));
}

#[test]
fn the_example_of_the_design_is_read() {
    let config = Folder::new().parse(EXAMPLE).unwrap();
    assert_eq!(config.warnings, [""; 0]);
    assert_eq!(config.node.name, "r1");
    assert_eq!(config.node.data_dir, Path::new("/var/lib/unbroken"));
    assert_eq!(
        config.node.history_dir,
        Path::new("/var/lib/unbroken/history")
    );
    let CoordConfig::Embedded(coord) = &config.coord else {
        panic!("{:?}", config.coord)
    };
    assert_eq!(coord.client, "10.98.0.11:2181".parse().unwrap());
    assert_eq!(coord.peers.len(), 3);
    assert_eq!(
        config.group.members["r3"],
        "10.98.0.13:7400".parse().unwrap()
    );
    assert_eq!(config.group.resilience, Resilience::Majority);
    assert_eq!(config.group.heartbeat, Duration::from_millis(10));
    assert_eq!(config.group.lease, Duration::from_millis(30));
    assert_eq!(config.group.suspect_after, Duration::from_millis(50));
    assert_eq!(config.admin.listen, "127.0.0.1:9600".parse().unwrap());
    let expected = ServiceConfig {
        name: "web".to_owned(),
        vip: "10.98.0.100".parse().unwrap(),
        prefix: 24,
        ports: vec![80],
        interface: "eth0".to_owned(),
        upstream: Upstream::Tcp("127.0.0.1:7000".parse().unwrap()),
        address: AddressMode::Garp,
        fence: FenceMode::Kernel,
        hooks: HooksConfig::default(),
        ordering: Ordering::Connection,
        close_wait: Duration::from_secs(1),
        divergence: Divergence::Evict,
        harmless: Vec::new(),
        history: HistoryConfig {
            memory_bytes_max: 256 << 20,
            disk_bytes_max: 4 << 30,
        },
        command: None,
        restore: None,
        ready: None,
        checkpoint: None,
        stall: Duration::from_secs(1),
        health: None,
        prefer: None,
        failback: Failback::Idle,
    };
    assert_eq!(config.services, [expected]);
}

/// What the example spells out is also what holds when it is left out.
#[test]
fn the_example_spells_out_the_defaults() {
    let folder = Folder::new();
    let full = folder.parse(EXAMPLE).unwrap();
    let optional = [
        "resilience",
        "heartbeat",
        "lease",
        "suspect_after",
        "[admin]",
        "listen",
        "address",
        "fence",
        "ordering",
        "close_wait",
        "divergence",
        "history",
    ];
    let short: String = EXAMPLE
        .lines()
        .filter(|line| !optional.iter().any(|key| line.starts_with(key)))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(
        short.lines().count(),
        EXAMPLE.lines().count() - optional.len()
    );
    let short = folder.parse(&short).unwrap();
    assert_eq!(
        (short.group, short.admin, short.services),
        (full.group, full.admin, full.services)
    );
}

#[test]
fn values_have_many_spellings() {
    let folder = Folder::new();
    let read = |from: &str, to: &str| {
        assert_eq!(EXAMPLE.matches(from).count(), 1, "{from}");
        folder
            .parse(&EXAMPLE.replace(from, to))
            .unwrap_or_else(|errors| panic!("{errors}"))
    };
    let service = |from: &str, to: &str| read(from, to).services.remove(0);
    let total = service(
        "\"connection\"",
        "\"total\"\ncommand = [\"s\", \"x y\"]\nstall = \"50ms\"",
    );
    assert_eq!(total.ordering, Ordering::Total);
    assert_eq!(total.command.unwrap(), ["s", "x y"]);
    assert_eq!(total.stall, Duration::from_millis(50));
    let vip = |to: &str| {
        let service = service("\"10.98.0.100/24\"", to);
        (service.vip.to_string(), service.prefix)
    };
    assert_eq!(vip("\"fd98::100/64\""), ("fd98::100".to_owned(), 64));
    assert_eq!(vip("\"10.98.0.100\""), ("10.98.0.100".to_owned(), 32));
    // RFC 3021: both addresses of a /31 are hosts.
    assert_eq!(vip("\"10.98.0.100/31\""), ("10.98.0.100".to_owned(), 31));

    let upstream = |to: &str| service("\"127.0.0.1:7000\"", to).upstream;
    assert_eq!(
        upstream("\"unix:/run/app.sock\""),
        Upstream::Unix("/run/app.sock".into())
    );
    assert_eq!(
        upstream("\"[::1]:7000\""),
        Upstream::Tcp("[::1]:7000".parse().unwrap())
    );
    assert_eq!(
        upstream("\"localhost:7000\""),
        Upstream::Tcp("127.0.0.1:7000".parse().unwrap())
    );

    let memory = |to: &str| service("\"256MiB\"", to).history.memory_bytes_max;
    assert_eq!(memory("\"1 GiB\""), 1 << 30);
    assert_eq!(memory("\"5MB\""), 5_000_000);
    assert_eq!(memory("1_048_576"), 1 << 20);
    assert_eq!(memory("0x10_0000"), 1 << 20);
    let disk = |to: &str| service("\"4GiB\"", to).history.disk_bytes_max;
    assert_eq!(disk("\"1TiB\""), 1 << 40);
    assert_eq!(disk("0"), 0);

    let resilience = |to: &str| read("\"majority\"   ", to).group.resilience;
    assert_eq!(resilience("2"), Resilience::Backups(2));
    assert_eq!(resilience("\"all\""), Resilience::All);
    assert_eq!(
        service("\"evict\" ", "\"stop\"").divergence,
        Divergence::Stop
    );
    assert_eq!(service("[80]", "[443, 80,]").ports, [443, 80]);
}

#[test]
fn k_is_never_more_than_there_are_backups() {
    for (resilience, full, k) in [
        (Resilience::Majority, 1, 0),
        (Resilience::Majority, 2, 1),
        (Resilience::Majority, 3, 1),
        (Resilience::Majority, 5, 2),
        (Resilience::All, 0, 0),
        (Resilience::All, 5, 4),
        (Resilience::Backups(2), 5, 2),
        (Resilience::Backups(2), 2, 1),
        (Resilience::Backups(u32::MAX), 3, 2),
    ] {
        assert_eq!(resilience.k(full), k, "{resilience:?} of {full}");
    }
}

#[test]
fn tls_says_which_setting_and_which_file_is_wrong() {
    let wrong = |coord: &str| {
        let text = EXAMPLE.replacen("[group]", &format!("{coord}\n[group]"), 1);
        let errors = Folder::new().parse(&text).unwrap_err();
        errors.to_string()
    };
    let text = wrong("[coord.tls]\ncert = \"none.pem\"\nkey = \"none.key\"\n");
    assert!(
        text.contains("coord.tls.cert") && text.contains("none.pem"),
        "{text}"
    );
    let text = wrong("[coord.tls]\ncert = \"none.pem\"\nkey = \"k\"\nclient_auth = \"requir\"\n");
    assert!(
        text.contains("coord.tls.client_auth") && text.contains("require"),
        "{text}"
    );
    let text = wrong("[coord.tls]\nkey = \"none.key\"\n");
    assert!(text.contains("coord.tls.cert"), "{text}");
    let text = wrong("secure_client = \"10.98.0.11:2281\"\n");
    assert!(
        text.contains("secure_client") && text.contains("[coord.tls]"),
        "{text}"
    );
}

#[test]
fn an_external_coordinator_takes_the_place_of_the_embedded_one() {
    let external = |value: &str| {
        let start = EXAMPLE.find("client =").unwrap();
        let end = EXAMPLE.find("[group]").unwrap();
        let text = format!(
            "{}external = {value}\n{}",
            &EXAMPLE[..start],
            &EXAMPLE[end..]
        );
        match Folder::new().parse(&text).unwrap().coord {
            CoordConfig::External(coord) => (coord.servers.join(" "), coord.chroot),
            CoordConfig::Embedded(coord) => panic!("{coord:?}"),
        }
    };
    let both = ("a:2181 b:2182".to_owned(), "/x/y".to_owned());
    assert_eq!(external("\"zk://a:2181,b:2182/x/y\""), both);
    assert_eq!(external("\"zk://a,b:2182/x/y/\""), both);
    assert_eq!(
        external("\"zk://[fd98::1]:2181\""),
        ("[fd98::1]:2181".to_owned(), String::new())
    );
}

#[test]
fn a_coordinator_alone_needs_neither_group_nor_service() {
    let folder = Folder::new();
    let file = folder.0.join("coord.toml");
    let alone = &EXAMPLE[..EXAMPLE.find("[group]").unwrap()];
    let config = CoordinatorConfig::parse(&file, alone).unwrap();
    assert_eq!(config.coord.peers.len(), 3);
    assert!(folder.parse(alone).is_err());
    // One file for both uses.
    assert!(CoordinatorConfig::parse(&file, EXAMPLE).is_ok());

    let external = "[coord]\nexternal = \"zk://a:2181\"\n";
    let text = format!("{}{external}", &alone[..alone.find("[coord]").unwrap()]);
    let errors = CoordinatorConfig::parse(&file, &text).unwrap_err();
    assert!(
        errors
            .to_string()
            .contains("there is no coordinator to run here"),
        "{errors}"
    );
}

#[test]
fn services_of_one_vip_are_one_group() {
    let other = SECOND
        .replace("\"echo\"", "\"other\"")
        .replace(".100/", ".101/");
    let config = Folder::new()
        .parse(&format!("{EXAMPLE}{other}{SECOND}"))
        .unwrap();
    let vips: Vec<(String, Vec<&str>)> = config
        .vips()
        .iter()
        .map(|vip| {
            (
                vip.vip.to_string(),
                vip.services
                    .iter()
                    .map(|service| service.name.as_str())
                    .collect(),
            )
        })
        .collect();
    assert_eq!(
        vips,
        [
            ("10.98.0.100".to_owned(), vec!["web", "echo"]),
            ("10.98.0.101".to_owned(), vec!["other"])
        ]
    );
}

#[test]
fn what_is_allowed_but_unwise_is_said() {
    let folder = Folder::new();
    let text = EXAMPLE.replace("\"group.key\"", "\"open.key\"").replacen(
        ", r3 = \"10.98.0.13:2888\"",
        "",
        1,
    );
    let warnings = folder.parse(&text).unwrap().warnings;
    let expected = [
        "node.toml:4: ",
        "open.key can be read by every user (mode 0644)",
    ];
    assert!(
        expected.iter().all(|part| warnings[0].contains(part)),
        "{warnings:?}"
    );
    assert!(warnings[1].contains("an ensemble of 2 bears no more failures than one of 1"));
}

#[test]
fn an_unreadable_file_is_named() {
    let folder = Folder::new();
    let missing = folder.0.join("missing.toml");
    let errors = Config::load(&missing).unwrap_err();
    assert!(
        errors
            .to_string()
            .starts_with(&format!("{}: error: ", missing.display())),
        "{errors}"
    );
    let binary = folder.0.join("binary.toml");
    std::fs::write(&binary, b"[node]\nname = \"\xff\"\n").unwrap();
    let errors = Config::load(&binary).unwrap_err();
    assert!(
        errors.to_string().contains("line 2 is not UTF-8 text"),
        "{errors}"
    );
}

/// Broken text must never panic: the example cut at every byte, and with every line left out.
#[test]
fn broken_files_are_refused_calmly() {
    let folder = Folder::new();
    for cut in 0..EXAMPLE.len() {
        if let Err(errors) = folder.parse(&EXAMPLE[..cut]) {
            assert!(!errors.problems().is_empty());
            assert!(errors.to_string().contains("expected "));
        }
    }
    for left_out in 0..EXAMPLE.lines().count() {
        let text: String = EXAMPLE
            .lines()
            .enumerate()
            .filter(|(line, _)| *line != left_out)
            .flat_map(|(_, line)| [line, "\n"])
            .collect();
        let _ = folder.parse(&text);
    }
}

/// (name, text of the example, what stands there instead)
const WRONG: &[(&str, &str, &str)] = &[
    ("not TOML", "name = \"r1\"", "name = r1"),
    (
        "a string without its end",
        "interface = \"eth0\"",
        "interface = \"eth0",
    ),
    (
        "a key twice",
        "heartbeat = \"10ms\"",
        "heartbeat = \"10ms\"\nheartbeat = \"20ms\"",
    ),
    ("unknown key", "resilience =", "resiliance ="),
    (
        "unknown key of no likeness",
        "heartbeat = \"10ms\"",
        "colour = \"red\"",
    ),
    ("unknown section", "[admin]", "[admim]"),
    ("missing name", "name = \"r1\"\n", ""),
    ("a name that is none", "name = \"r1\"", "name = \"r 1\""),
    ("a number for a name", "name = \"r1\"", "name = 1"),
    ("name not among the peers", "name = \"r1\"", "name = \"r9\""),
    ("no key file", "\"group.key\"", "\"nowhere.key\""),
    ("a short key", "\"group.key\"", "\"short.key\""),
    (
        "no port",
        "client = \"10.98.0.11:2181\"",
        "client = \"10.98.0.11\"",
    ),
    (
        "a host name",
        "client = \"10.98.0.11:2181\"",
        "client = \"r1.example:2181\"",
    ),
    (
        "external beside client",
        "client = ",
        "external = \"zk://a:2181\"\nclient = ",
    ),
    (
        "peers are no table",
        "r3 = \"10.98.0.13:2888\" }",
        "r3 = 5 }",
    ),
    (
        "two peers with one address",
        "\"10.98.0.13:2888\"",
        "\"10.98.0.12:2888\"",
    ),
    ("resilience misspelt", "\"majority\"   ", "\"majorty\""),
    ("resilience as a string", "\"majority\"   ", "\"2\""),
    ("resilience of none", "\"majority\"   ", "0"),
    ("resilience beyond the members", "\"majority\"   ", "3"),
    ("lease too long", "lease = \"30ms\"", "lease = \"60ms\""),
    (
        "lease equal to suspect_after",
        "suspect_after = \"50ms\"",
        "suspect_after = \"30ms\"",
    ),
    (
        "lease left out and too long",
        "lease = \"30ms\"                             # below suspect_after\nsuspect_after = \"50ms\"",
        "suspect_after = \"20ms\"",
    ),
    (
        "heartbeat too long",
        "heartbeat = \"10ms\"",
        "heartbeat = \"30ms\"",
    ),
    (
        "a duration without unit",
        "heartbeat = \"10ms\"",
        "heartbeat = \"10\"",
    ),
    (
        "a number for a duration",
        "heartbeat = \"10ms\"",
        "heartbeat = 10",
    ),
    (
        "a heartbeat of nothing",
        "heartbeat = \"10ms\"",
        "heartbeat = \"10us\"",
    ),
    (
        "multicast to one host",
        "suspect_after = \"50ms\"",
        "multicast = { address = \"10.98.0.1:7401\" }",
    ),
    (
        "multicast to the link's own protocols",
        "suspect_after = \"50ms\"",
        "multicast = { address = \"224.0.0.1:7401\", hops = 0 }",
    ),
    (
        "multicast without its address",
        "suspect_after = \"50ms\"",
        "multicast = { hop = 1 }",
    ),
    (
        "a pace in bytes",
        "suspect_after = \"50ms\"",
        "pacing = { rate = \"125MB\" }",
    ),
    (
        "a pace that is too slow",
        "suspect_after = \"50ms\"",
        "pacing = { rate = \"7Mbit/s\", queue = \"8GiB\" }",
    ),
    (
        "admin page on the coordinator's port",
        "\"127.0.0.1:9600\"",
        "\"10.98.0.11:2181\"",
    ),
    (
        "admin page everywhere, on a taken port",
        "\"127.0.0.1:9600\"",
        "\"0.0.0.0:7400\"",
    ),
    ("one bracket", "[[service]]", "[service]"),
    (
        "no vip",
        "vip = \"10.98.0.100/24\"                     # or IPv6\n",
        "",
    ),
    (
        "a vip that is none",
        "\"10.98.0.100/24\"",
        "\"10.98.0.300/24\"",
    ),
    (
        "a prefix that is none",
        "\"10.98.0.100/24\"",
        "\"10.98.0.100/33\"",
    ),
    (
        "a vip for a network",
        "\"10.98.0.100/24\"",
        "\"10.98.0.0/24\"",
    ),
    ("a loopback vip", "\"10.98.0.100/24\"", "\"127.0.0.1/8\""),
    (
        "a vip that is a member's",
        "\"10.98.0.100/24\"",
        "\"10.98.0.12/24\"",
    ),
    ("ports are no list", "[80]", "80"),
    ("no ports", "[80]", "[]"),
    ("ports that are none", "[80]", "[0, 80, 65536, \"http\"]"),
    ("a port twice", "[80]", "[80, 80]"),
    (
        "an interface that is none",
        "\"eth0\"",
        "\"an-interface-name\"",
    ),
    (
        "upstream without port",
        "\"127.0.0.1:7000\"",
        "\"127.0.0.1\"",
    ),
    (
        "upstream on the vip",
        "\"127.0.0.1:7000\"",
        "\"10.98.0.100:80\"",
    ),
    (
        "a relative socket",
        "\"127.0.0.1:7000\"",
        "\"unix:app.sock\"",
    ),
    ("an address mode that is none", "\"garp\"    ", "\"grap\""),
    (
        "one order without a command",
        "\"connection\" ",
        "\"total\"",
    ),
    (
        "a command that is no list",
        "close_wait = \"1s\"",
        "command = \"redis-server --port 7000\"",
    ),
    (
        "a command without a program",
        "close_wait = \"1s\"",
        "command = []",
    ),
    (
        "a command with a number",
        "close_wait = \"1s\"",
        "command = [\"redis-server\", \"--port\", 7000]",
    ),
    (
        "a stall too short",
        "close_wait = \"1s\"",
        "stall = \"1ms\"",
    ),
    ("a fence that is none", "\"kernel\"  ", "\"iptables\""),
    ("a close_wait too long", "\"1s\"", "\"2m\""),
    ("a divergence that is none", "\"evict\"  ", "\"ignore\""),
    ("a size without unit", "\"256MiB\"", "\"256\""),
    ("a size in a unit that is none", "\"256MiB\"", "\"256Mb\""),
    ("too little history", "\"256MiB\"", "\"1KiB\""),
    ("too little of it on disk", "\"4GiB\"", "\"512KiB\""),
    (
        "a checkpoint without a restore",
        "close_wait = \"1s\"",
        "checkpoint = [\"/usr/bin/save\"]",
    ),
    (
        "a stall and a restore without total ordering",
        "close_wait = \"1s\"",
        "stall = \"1s\"\nrestore = [\"/usr/bin/load\"]",
    ),
    (
        "a server that somebody else begins is ready",
        "close_wait = \"1s\"",
        "ready = [\"/usr/bin/ask\"]",
    ),
    (
        "a health check that nothing fails",
        "close_wait = \"1s\"",
        "health = { expect = \"\" }",
    ),
    (
        "hooks",
        "close_wait = \"1s\"",
        "on_promote = \"/bin/true\"\non_demote = []",
    ),
    (
        "a health check of two minds",
        "close_wait = \"1s\"",
        "health = { every = \"1s\", send = \"PING\", command = [], failures = 0 }",
    ),
    (
        "a health check by text and by command",
        "close_wait = \"1s\"",
        "health = { expect = \"+PONG\", command = [\"/bin/true\"], timeout = \"1\" }",
    ),
    (
        "a stranger preferred",
        "close_wait = \"1s\"",
        "prefer = \"r9\"\nfailback = \"soon\"",
    ),
    (
        "failback to nobody",
        "close_wait = \"1s\"",
        "failback = \"30s\"",
    ),
];

#[test]
fn health_and_preference_are_read() {
    let folder = Folder::new();
    let read = |keys: &str| {
        let text = EXAMPLE.replace("close_wait = \"1s\"", keys);
        folder.parse(&text).unwrap().services.remove(0)
    };
    let second = Duration::from_secs(1);
    let connect = HealthConfig {
        check: HealthCheck::Connect,
        interval: second,
        timeout: second,
        failures: 3,
    };
    assert_eq!(read("health = {}").health, Some(connect.clone()));
    let asked = HealthConfig {
        check: HealthCheck::Answer {
            send: "PING\r\n".to_owned(),
            expect: Some("+PONG".to_owned()),
        },
        interval: Duration::from_millis(50),
        timeout: Duration::from_millis(200),
        failures: 2,
    };
    let keys = r#"health = { send = "PING\r\n", expect = "+PONG", interval = "50ms", timeout = "200ms", failures = 2 }"#;
    assert_eq!(read(keys).health, Some(asked));
    let command = vec!["/bin/check".to_owned(), "-v".to_owned()];
    let checked = HealthConfig {
        check: HealthCheck::Command(command),
        ..connect
    };
    let keys = r#"health = { command = ["/bin/check", "-v"] }"#;
    assert_eq!(read(keys).health, Some(checked));
    for (keys, failback) in [
        ("", Failback::Idle),
        ("failback = \"never\"", Failback::Never),
        (
            "failback = \"30s\"",
            Failback::After(Duration::from_secs(30)),
        ),
    ] {
        let service = read(&format!("prefer = \"r2\"\n{keys}"));
        assert_eq!(service.prefer.as_deref(), Some("r2"));
        assert_eq!(service.failback, failback);
    }
}

#[test]
fn every_mistake_is_explained() {
    let folder = Folder::new();
    let mut all = String::new();
    let mut show = |name: &str, text: &str| {
        let errors = folder.parse(text).expect_err(name);
        for problem in errors.problems() {
            assert!(problem.line().is_some(), "{name}: no line");
            assert!(
                !problem.complaint.expected.is_empty(),
                "{name}: nothing expected"
            );
        }
        let _ = write!(all, "## {name}\n{}\n\n", folder.message(&errors));
    };
    for (name, from, to) in WRONG {
        assert_eq!(
            EXAMPLE.matches(from).count(),
            1,
            "{name}: \"{from}\" stands once in the example"
        );
        show(name, &EXAMPLE.replace(from, to));
    }
    let second = |from: &str, to: &str| format!("{EXAMPLE}{}", SECOND.replace(from, to));
    show("two services of one name", &second("\"echo\"", "\"web\""));
    show("two services on one port", &second("[7]", "[80]"));
    show("one vip on two interfaces", &second("\"eth0\"", "\"eth1\""));
    show("one vip with two prefixes", &second("/24", "/16"));
    let total = "ports = [7]\nordering = \"total\"\ncommand = [\"/usr/bin/server\"]";
    show("one vip with two orderings", &second("ports = [7]", total));
    let both = EXAMPLE.replace(
        "\"connection\"  ",
        "\"total\"\ncommand = [\"/usr/bin/server\"]",
    );
    let saves = format!("{total}\nrestore = [\"/usr/bin/load\"]\ncheckpoint = [\"/usr/bin/save\"]");
    show(
        "one vip of which a part has checkpoints",
        &format!("{both}{}", SECOND.replace("ports = [7]", &saves)),
    );
    let fence = "[7]\nfence = \"process\"";
    let address = "[7]\naddress = \"vmac\"";
    show("one vip with two address modes", &second("[7]", address));
    show("one vip with two fences", &second("[7]", fence));
    show("an empty file", "");
    let many = EXAMPLE
        .replace("name = \"r1\"", "nmae = \"r1\"")
        .replace("\"10ms\"", "\"10 parsecs\"")
        .replace("[80]", "[80, 99999]")
        .replace("\"garp\"", "\"gratuitous\"");
    show("many at once", &many);
    show(
        "a tab and what is not ASCII",
        "[node]\n\tname = \"größe\" # äöü\n\tnäme = 3\n",
    );

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/config_errors.txt");
    if std::env::var_os("REWRITE").is_some() {
        std::fs::write(&file, &all).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap();
    for (expected, found) in golden.split("## ").zip(all.split("## ")) {
        assert_eq!(found, expected, "REWRITE=1 takes the new message over");
    }
    assert_eq!(golden.len(), all.len());
}
