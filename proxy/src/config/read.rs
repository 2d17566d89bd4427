//! Sections: walks the parsed file, collects every problem, and holds the parts against each other.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use humantime_serde::re::humantime::format_duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::document::{Complaint, ConfigErrors, Document};
use super::value;
use super::{
    AddressMode, AdminConfig, Config, CoordConfig, CoordinatorConfig, Divergence, EmbeddedCoord,
    GroupConfig, HistoryConfig, Key, NodeConfig, Ordering, Resilience, ServiceConfig,
};

/// Services of one node; each costs sockets and a share of the one data-plane thread.
const SERVICES_MAX: usize = 64;
/// Replicas of one group, and servers of one ensemble.
const MEMBERS_MAX: usize = 15;
/// Ports of one service.
const PORTS_MAX: usize = 1024;

const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);

/// A value and where it stands, for complaints that arise later.
#[derive(Debug, Clone)]
struct Found<T> {
    value: T,
    key: String,
    span: Range<usize>,
}

/// One table of the file. Remembers which keys were asked for: the others are unknown.
struct Section<'d, 't> {
    document: &'d Document<'t>,
    /// With a dot behind it, as in `group.`; empty for the file itself.
    prefix: String,
    span: Range<usize>,
    table: &'d DeTable<'d>,
    asked: RefCell<Vec<&'static str>>,
}

impl<'d, 't> Section<'d, 't> {
    fn new(
        document: &'d Document<'t>,
        path: &str,
        span: Range<usize>,
        table: &'d DeTable<'d>,
    ) -> Self {
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}.")
        };
        Self {
            document,
            prefix,
            span,
            table,
            asked: RefCell::default(),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn get(&self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.asked.borrow_mut().push(key);
        self.table.get(key)
    }

    fn missing(&self, key: &str, expected: impl Into<String>) {
        self.document.problem(
            &self.key(key),
            &self.span,
            false,
            Complaint::new("missing", expected),
        );
    }

    /// The value of `key`, if it is there and right.
    fn optional<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'_>) -> Result<T, Complaint>,
    ) -> Option<Found<T>> {
        let found = self.get(key)?;
        match parse(found.get_ref()) {
            Ok(value) => Some(Found {
                value,
                key: self.key(key),
                span: found.span(),
            }),
            Err(complaint) => {
                self.document
                    .problem(&self.key(key), &found.span(), true, complaint);
                None
            }
        }
    }

    /// The value of `key`, which must be there.
    fn required<T>(
        &self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&DeValue<'_>) -> Result<T, Complaint>,
    ) -> Option<Found<T>> {
        if self.table.get(key).is_none() {
            self.asked.borrow_mut().push(key);
            self.missing(key, expected);
            return None;
        }
        self.optional(key, parse)
    }

    /// The table under `key`, written as a section or in braces.
    fn section(&self, key: &'static str, expected: &str) -> Option<Self> {
        let found = self.get(key)?;
        let DeValue::Table(table) = found.get_ref() else {
            let complaint = value::wrong_type(found.get_ref(), expected);
            self.document
                .problem(&self.key(key), &found.span(), true, complaint);
            return None;
        };
        Some(Section::new(
            self.document,
            &self.key(key),
            found.span(),
            table,
        ))
    }

    /// A whole section that must be in the file.
    fn required_section(&self, key: &'static str, expected: &str) -> Option<Self> {
        if self.table.get(key).is_none() {
            self.asked.borrow_mut().push(key);
            let end = self.document.text().trim_end().len();
            let complaint = Complaint::new("missing: the file ends here without it", expected);
            self.document.problem(key, &(end..end), false, complaint);
            return None;
        }
        self.section(key, expected)
    }

    /// `{ name = "IP:PORT", ... }`
    fn addresses(&self, key: &'static str) -> Option<Found<BTreeMap<String, Found<SocketAddr>>>> {
        const EXPECTED: &str = "a table of names and addresses, as in { r1 = \"10.98.0.11:7400\" }";
        let found = self.get(key);
        let Some(found) = found else {
            self.missing(key, EXPECTED);
            return None;
        };
        let key = self.key(key);
        let DeValue::Table(table) = found.get_ref() else {
            let complaint = value::wrong_type(found.get_ref(), EXPECTED);
            self.document.problem(&key, &found.span(), true, complaint);
            return None;
        };
        if table.is_empty() || table.len() > MEMBERS_MAX {
            let complaint = Complaint::new(
                format!("{} entries", table.len()),
                format!("1 to {MEMBERS_MAX} entries, this node's among them"),
            );
            self.document.problem(&key, &found.span(), true, complaint);
        }
        let mut addresses: BTreeMap<String, Found<SocketAddr>> = BTreeMap::new();
        let mut all_good = true;
        for (name, address) in table.iter() {
            let path = format!("{key}.{}", name.get_ref());
            if let Err(complaint) = value::check_name(name.get_ref()) {
                self.document.problem(&path, &name.span(), false, complaint);
            }
            match value::socket_address(address.get_ref()) {
                Ok(value) => {
                    let found = Found {
                        value,
                        key: path,
                        span: address.span(),
                    };
                    addresses.insert(name.get_ref().to_string(), found);
                }
                Err(complaint) => {
                    self.document
                        .problem(&path, &address.span(), true, complaint);
                    all_good = false;
                }
            }
        }
        all_good.then(|| Found {
            value: addresses,
            key,
            span: found.span(),
        })
    }

    /// A key of the design that this version cannot honour yet: refused, never ignored.
    fn not_yet(&self, key: &'static str, help: &str) {
        if let Some(found) = self.get(key) {
            let complaint =
                value::unavailable("not available yet in this version", "the key left out")
                    .help(help);
            self.document
                .problem(&self.key(key), &found.span(), true, complaint);
        }
    }

    /// Complains about every key that nobody asked for.
    fn finish(self) {
        let asked = self.asked.into_inner();
        for (key, _) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if asked.contains(&name) {
                continue;
            }
            let place = match self.prefix.strip_suffix('.') {
                None => "in the file".to_owned(),
                Some(path) => format!("in {path}"),
            };
            let complaint = Complaint::new(
                "unknown key",
                format!("{place} one of: {}", asked.join(", ")),
            );
            let complaint = match value::suggestion(name, &asked) {
                Some(known) => complaint.help(format!("did you mean {known}?")),
                None => complaint,
            };
            self.document.problem(
                &format!("{}{name}", self.prefix),
                &key.span(),
                false,
                complaint,
            );
        }
    }
}

/// Parses the text; what is not TOML becomes problems of the document.
fn parse<'t>(document: &Document<'t>) -> Spanned<DeTable<'t>> {
    let (table, errors) = DeTable::parse_recoverable(document.text());
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        document.problem("", &span, false, Complaint::new(error.message(), "TOML"));
    }
    table
}

pub(super) fn node(file: &Path, text: &str) -> Result<Config, ConfigErrors> {
    let document = Document::new(file, text);
    let table = parse(&document);
    if document.has_problems() {
        // What the parser recovered from broken text would only draw complaints that are not true.
        return Err(document.finish().expect_err("there are problems"));
    }
    let root = Section::new(&document, "", 0..0, table.get_ref());
    let node = node_section(&root);
    let coord = coord_section(&root, node.as_ref());
    let group = group_section(&root, node.as_ref());
    let admin = admin_section(&root);
    let services = service_sections(&root);
    root.finish();
    check_addresses(
        &document,
        node.as_ref(),
        coord.as_ref(),
        group.as_ref(),
        &admin,
        &services,
    );

    let warnings = document.finish()?;
    Ok(Config {
        file: file.to_path_buf(),
        node: node.expect(COMPLAINED).config,
        coord: coord.expect(COMPLAINED).config,
        group: group.expect(COMPLAINED).config,
        admin: AdminConfig {
            listen: admin.value,
        },
        services: services.into_iter().map(|service| service.config).collect(),
        warnings,
    })
}

pub(super) fn coordinator(file: &Path, text: &str) -> Result<CoordinatorConfig, ConfigErrors> {
    let document = Document::new(file, text);
    let table = parse(&document);
    if document.has_problems() {
        return Err(document.finish().expect_err("there are problems"));
    }
    let root = Section::new(&document, "", 0..0, table.get_ref());
    let node = node_section(&root);
    let coord = coord_section(&root, node.as_ref());
    let admin = admin_section(&root);
    for ours_alone in ["group", "service"] {
        let _ = root.get(ours_alone);
    }
    root.finish();
    check_addresses(&document, node.as_ref(), coord.as_ref(), None, &admin, &[]);
    if let Some(CoordSection {
        external: Some(found),
        ..
    }) = &coord
    {
        let complaint = Complaint::new(
            "there is no coordinator to run here",
            "client and peers in its place for `unbroken coord`",
        );
        document.problem(&found.key, &found.span, false, complaint);
    }

    let warnings = document.finish()?;
    let CoordConfig::Embedded(embedded) = coord.expect(COMPLAINED).config else {
        unreachable!("external was complained about");
    };
    Ok(CoordinatorConfig {
        file: file.to_path_buf(),
        node: node.expect(COMPLAINED).config,
        coord: embedded,
        admin: AdminConfig {
            listen: admin.value,
        },
        warnings,
    })
}

/// Why a section may be unwrapped behind `Document::finish`.
const COMPLAINED: &str = "a section that is missing or wrong was complained about";

struct NodeSection {
    config: NodeConfig,
    name: Found<String>,
}

fn node_section(root: &Section<'_, '_>) -> Option<NodeSection> {
    let section =
        root.required_section("node", "a section [node] with name, data_dir and key_file")?;
    let name = section.required("name", "this node's name, as in \"r1\"", value::name);
    let data_dir = section.required("data_dir", "a folder of this node's own", value::path);
    let key = section
        .required(
            "key_file",
            "the file with the group's key, made by `unbroken keygen`",
            value::path,
        )
        .and_then(|found| key_file(section.document, &found));
    section.finish();
    let (name, data_dir) = (name?, data_dir?);
    let data_dir = root.document.resolve(&data_dir.value);
    Some(NodeSection {
        config: NodeConfig {
            name: name.value.clone(),
            data_dir,
            key: key?,
        },
        name,
    })
}

fn key_file(document: &Document<'_>, found: &Found<String>) -> Option<Key> {
    const EXPECTED: &str = "a file with at least 32 bytes of secret, the same on every node";
    let path = document.resolve(&found.value);
    let complain = |wrong: String| {
        let complaint = Complaint::new(wrong, EXPECTED).help(format!(
            "make it once with: unbroken keygen > {}",
            path.display()
        ));
        document.problem(&found.key, &found.span, true, complaint);
    };
    let contents = match std::fs::read(&path) {
        Ok(contents) => contents,
        Err(error) => {
            complain(format!("cannot read {}: {error}", path.display()));
            return None;
        }
    };
    if let Some(mode) = mode_of(&path).filter(|mode| mode & 0o004 != 0) {
        let sentence = format!(
            "{} can be read by every user (mode {mode:04o}); use 0600",
            path.display()
        );
        document.warn(&found.span, &sentence);
    }
    let key = Key::from_file_contents(&contents);
    if key.is_none() {
        complain(format!(
            "{} holds {} bytes",
            path.display(),
            contents.trim_ascii().len()
        ));
    }
    key
}

fn mode_of(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path)
        .ok()
        .map(|metadata| metadata.permissions().mode() & 0o7777)
}

struct CoordSection {
    config: CoordConfig,
    client: Option<Found<SocketAddr>>,
    peers: BTreeMap<String, Found<SocketAddr>>,
    external: Option<Found<()>>,
}

fn coord_section(root: &Section<'_, '_>, node: Option<&NodeSection>) -> Option<CoordSection> {
    let section = root.required_section(
        "coord",
        "a section [coord] with client and peers, or with external",
    )?;
    let document = section.document;
    if section.table.contains_key("external") {
        let external = section.optional("external", value::external);
        for (key, found) in [
            ("client", section.get("client")),
            ("peers", section.get("peers")),
        ] {
            if let Some(found) = found {
                let complaint = Complaint::new(
                    "not together with external",
                    "either client and peers, or external",
                );
                document.problem(&section.key(key), &found.span(), false, complaint);
            }
        }
        section.finish();
        let external = external?;
        return Some(CoordSection {
            config: CoordConfig::External(external.value),
            client: None,
            peers: BTreeMap::new(),
            external: Some(Found {
                value: (),
                key: external.key,
                span: external.span,
            }),
        });
    }
    let client = section.required(
        "client",
        "the address for clients of the ZooKeeper protocol, as in \"10.98.0.11:2181\"",
        value::socket_address,
    );
    let peers = section.addresses("peers");
    let _ = section.get("external");
    section.finish();
    let (client, peers) = (client?, peers?);
    check_listed(document, node, &peers);
    check_distinct(document, &peers.value);
    if peers.value.len() % 2 == 0 {
        let sentence = format!(
            "an ensemble of {} bears no more failures than one of {}",
            peers.value.len(),
            peers.value.len() - 1
        );
        document.warn(&peers.span, &sentence);
    }
    let config = CoordConfig::Embedded(EmbeddedCoord {
        client: client.value,
        peers: plain(&peers.value),
    });
    Some(CoordSection {
        config,
        client: Some(client),
        peers: peers.value,
        external: None,
    })
}

struct GroupSection {
    config: GroupConfig,
    members: BTreeMap<String, Found<SocketAddr>>,
}

fn group_section(root: &Section<'_, '_>, node: Option<&NodeSection>) -> Option<GroupSection> {
    let section = root.required_section("group", "a section [group] with members")?;
    let document = section.document;
    let members = section.addresses("members");
    let resilience = section.optional("resilience", value::resilience);
    let timing = |key, default_ms| {
        let given = section.table.contains_key(key);
        let found = section.optional(key, value::duration(MILLISECOND, MINUTE));
        let default = Duration::from_millis(default_ms);
        (
            found.as_ref().map_or(default, |found| found.value),
            found,
            given,
        )
    };
    let (heartbeat, heartbeat_found, _) = timing("heartbeat", 10);
    let (lease, lease_found, lease_given) = timing("lease", 30);
    let (suspect_after, suspect_found, suspect_given) = timing("suspect_after", 50);
    // A value that was given and is wrong was complained about: the default in its place says nothing.
    let lease_known = lease_found.is_some() || !lease_given;
    let suspect_known = suspect_found.is_some() || !suspect_given;
    if lease_known && suspect_known && lease >= suspect_after {
        let culprit = lease_found.as_ref().or(suspect_found.as_ref());
        let (wrong, expected) = (
            format!(
                "the lease ({}) is not below suspect_after ({})",
                format_duration(lease),
                format_duration(suspect_after)
            ),
            "lease < suspect_after, so that a lease is over when its holder is suspected"
                .to_owned(),
        );
        complain_at(
            document,
            culprit,
            &section,
            "lease",
            Complaint::new(wrong, expected),
        );
    }
    if lease_known && heartbeat >= lease {
        let culprit = heartbeat_found.as_ref().or(lease_found.as_ref());
        let (wrong, expected) = (
            format!(
                "the heartbeat ({}) is not below the lease ({})",
                format_duration(heartbeat),
                format_duration(lease)
            ),
            "heartbeat < lease, so that a lease is renewed before it is over".to_owned(),
        );
        complain_at(
            document,
            culprit,
            &section,
            "heartbeat",
            Complaint::new(wrong, expected),
        );
    }
    section.finish();
    let members = members?;
    check_listed(document, node, &members);
    check_distinct(document, &members.value);
    let backups = members.value.len() - usize::from(!members.value.is_empty());
    if let Some(Found {
        value: Resilience::Backups(count),
        key,
        span,
    }) = &resilience
        && usize::try_from(*count).is_ok_and(|count| count > backups)
    {
        let complaint = Complaint::new(
            format!("{} members have {backups} backups", members.value.len()),
            format!(
                "\"majority\", \"all\", or a number from 1 to {}",
                backups.max(1)
            ),
        );
        document.problem(key, span, true, complaint);
    }
    let config = GroupConfig {
        members: plain(&members.value),
        resilience: resilience.map_or(Resilience::Majority, |found| found.value),
        heartbeat,
        lease,
        suspect_after,
    };
    Some(GroupSection {
        config,
        members: members.value,
    })
}

/// Complains where `found` stands, or at the section's head.
fn complain_at<T>(
    document: &Document<'_>,
    found: Option<&Found<T>>,
    section: &Section<'_, '_>,
    key: &str,
    complaint: Complaint,
) {
    match found {
        Some(found) => document.problem(&found.key, &found.span, true, complaint),
        None => document.problem(&section.key(key), &section.span, false, complaint),
    }
}

fn admin_section(root: &Section<'_, '_>) -> Found<SocketAddr> {
    let default = Found {
        value: SocketAddr::from(([127, 0, 0, 1], 9600)),
        key: "admin.listen".to_owned(),
        span: 0..0,
    };
    let Some(section) = root.section("admin", "a section [admin] with listen") else {
        return default;
    };
    let listen = section.optional("listen", value::socket_address);
    section.finish();
    listen.unwrap_or(default)
}

struct ServiceSection {
    config: ServiceConfig,
    name: Found<String>,
    vip: Found<(IpAddr, u8)>,
    interface: Found<String>,
    ports: Vec<Found<u16>>,
}

fn service_sections(root: &Section<'_, '_>) -> Vec<ServiceSection> {
    const EXPECTED: &str =
        "at least one section [[service]] with name, vip, ports, interface and upstream";
    let document = root.document;
    let Some(found) = root.get("service") else {
        let end = document.text().trim_end().len();
        document.problem(
            "service",
            &(end..end),
            false,
            Complaint::new("missing: the file ends here without it", EXPECTED),
        );
        return Vec::new();
    };
    let DeValue::Array(array) = found.get_ref() else {
        let complaint = value::wrong_type(found.get_ref(), EXPECTED);
        let complaint = match found.get_ref() {
            DeValue::Table(_) => complaint.help("write it with two brackets: [[service]]"),
            _ => complaint,
        };
        document.problem("service", &found.span(), true, complaint);
        return Vec::new();
    };
    if array.is_empty() || array.len() > SERVICES_MAX {
        let complaint = Complaint::new(
            format!("{} services", array.len()),
            format!("1 to {SERVICES_MAX} services"),
        );
        document.problem("service", &found.span(), false, complaint);
    }
    let mut services = Vec::new();
    for (index, element) in array.iter().enumerate() {
        let path = format!("service[{index}]");
        let DeValue::Table(table) = element.get_ref() else {
            let complaint = value::wrong_type(element.get_ref(), EXPECTED);
            document.problem(&path, &element.span(), true, complaint);
            continue;
        };
        let section = Section::new(document, &path, element.span(), table);
        services.extend(service_section(section));
    }
    check_services(document, &services);
    services
}

fn service_section(section: Section<'_, '_>) -> Option<ServiceSection> {
    let document = section.document;
    let name = section.required("name", "the service's name, as in \"web\"", value::name);
    let vip = section.required(
        "vip",
        "the virtual IP with its prefix, as in \"10.98.0.100/24\"",
        value::vip,
    );
    let ports = ports(&section);
    let interface = section.required(
        "interface",
        "the network interface of the VIP, as in \"eth0\"",
        value::interface,
    );
    let upstream = section.required(
        "upstream",
        "where the server listens, as in \"127.0.0.1:7000\"",
        value::upstream,
    );
    let address = section.optional("address", value::address_mode);
    let ordering = section.optional("ordering", value::ordering);
    let close_wait = section.optional(
        "close_wait",
        value::duration(Duration::from_millis(10), Duration::from_secs(60)),
    );
    let divergence = section.optional("divergence", value::divergence);
    let history = history(&section);
    section.not_yet(
        "command",
        "start the server yourself (systemd, a container) and name its address in upstream",
    );
    for key in ["checkpoint", "restore"] {
        section.not_yet(
            key,
            "a replica that joins is brought up by replaying each connection's input",
        );
    }
    section.not_yet(
        "health",
        "a server that does not accept is seen when a connection is opened to it",
    );
    for key in ["on_promote", "on_demote"] {
        section.not_yet(
            key,
            "the address moves by gratuitous ARP or neighbour advertisement alone",
        );
    }
    section.finish();
    let (name, vip, interface, ports) = (name?, vip?, interface?, ports?);
    if let Some(Found {
        value: super::Upstream::Tcp(upstream),
        key,
        span,
    }) = &upstream
        && upstream.ip() == vip.value.0
    {
        let complaint = Complaint::new(
            "the server cannot listen on the VIP itself, which no kernel owns",
            "an address of this host, as in \"127.0.0.1:7000\"",
        );
        document.problem(key, span, true, complaint);
    }
    let config = ServiceConfig {
        name: name.value.clone(),
        vip: vip.value.0,
        prefix: vip.value.1,
        ports: ports.iter().map(|port| port.value).collect(),
        interface: interface.value.clone(),
        upstream: upstream?.value,
        address: address.map_or(AddressMode::Garp, |found| found.value),
        ordering: ordering.map_or(Ordering::Connection, |found| found.value),
        close_wait: close_wait.map_or(Duration::from_secs(1), |found| found.value),
        divergence: divergence.map_or(Divergence::Evict, |found| found.value),
        history,
    };
    Some(ServiceSection {
        config,
        name,
        vip,
        interface,
        ports,
    })
}

fn ports(section: &Section<'_, '_>) -> Option<Vec<Found<u16>>> {
    const EXPECTED: &str = "a list of ports, as in [80, 443]";
    let Some(found) = section.get("ports") else {
        section.missing("ports", EXPECTED);
        return None;
    };
    let key = section.key("ports");
    let DeValue::Array(array) = found.get_ref() else {
        let complaint = value::wrong_type(found.get_ref(), EXPECTED);
        section
            .document
            .problem(&key, &found.span(), true, complaint);
        return None;
    };
    if array.is_empty() || array.len() > PORTS_MAX {
        let complaint = Complaint::new(
            format!("{} ports", array.len()),
            format!("1 to {PORTS_MAX} ports"),
        );
        section
            .document
            .problem(&key, &found.span(), true, complaint);
        return None;
    }
    let mut ports = Vec::new();
    for element in array.iter() {
        match value::port(element.get_ref()) {
            Ok(value) => ports.push(Found {
                value,
                key: key.clone(),
                span: element.span(),
            }),
            Err(complaint) => section
                .document
                .problem(&key, &element.span(), true, complaint),
        }
    }
    Some(ports)
}

fn history(section: &Section<'_, '_>) -> HistoryConfig {
    let default = HistoryConfig {
        memory_bytes_max: 256 << 20,
        disk_bytes_max: 4 << 30,
    };
    let Some(inner) = section.section("history", "{ memory = \"256MiB\", disk = \"4GiB\" }") else {
        return default;
    };
    let memory = inner.optional("memory", value::size);
    let disk = inner.optional("disk", value::size);
    if let Some(Found {
        value: ..1_048_576,
        key,
        span,
    }) = &memory
    {
        let complaint = Complaint::new(
            "too small to bring any replica up by replay",
            "\"1MiB\" or more",
        );
        inner.document.problem(key, span, true, complaint);
    }
    inner.finish();
    HistoryConfig {
        memory_bytes_max: memory.map_or(default.memory_bytes_max, |found| found.value),
        disk_bytes_max: disk.map_or(default.disk_bytes_max, |found| found.value),
    }
}

/// Services of one VIP are one group with one leader: they must agree. Names and ports are distinct.
fn check_services(document: &Document<'_>, services: &[ServiceSection]) {
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ports: BTreeMap<(IpAddr, u16), &str> = BTreeMap::new();
    let mut firsts: BTreeMap<IpAddr, &ServiceSection> = BTreeMap::new();
    for (index, service) in services.iter().enumerate() {
        let name = service.config.name.as_str();
        if let Some(other) = names.insert(name, index) {
            let complaint = Complaint::new(
                format!("service[{other}] has this name already"),
                "a name that no other service has",
            );
            document.problem(&service.name.key, &service.name.span, true, complaint);
        }
        for port in &service.ports {
            if let Some(owner) = ports.insert((service.config.vip, port.value), name) {
                let complaint = Complaint::new(
                    format!(
                        "port {} of {} is taken by service \"{owner}\"",
                        port.value, service.config.vip
                    ),
                    "each port of a VIP once",
                );
                document.problem(&port.key, &port.span, true, complaint);
            }
        }
        let Some(first) = firsts.get(&service.config.vip) else {
            firsts.insert(service.config.vip, service);
            continue;
        };
        let other = &first.config.name;
        if service.config.interface != first.config.interface {
            let complaint = Complaint::new(
                format!(
                    "service \"{other}\" has the same VIP on \"{}\"",
                    first.config.interface
                ),
                format!(
                    "\"{}\": services of one VIP share its interface",
                    first.config.interface
                ),
            );
            document.problem(
                &service.interface.key,
                &service.interface.span,
                true,
                complaint,
            );
        }
        if service.config.prefix != first.config.prefix {
            let complaint = Complaint::new(
                format!(
                    "service \"{other}\" has the same VIP with /{}",
                    first.config.prefix
                ),
                format!(
                    "\"{}/{}\": services of one VIP share its prefix",
                    first.config.vip, first.config.prefix
                ),
            );
            document.problem(&service.vip.key, &service.vip.span, true, complaint);
        }
        // `address` and `ordering` must agree too; each has one available value in this version.
    }
}

/// This node must be among `listed`.
fn check_listed(
    document: &Document<'_>,
    node: Option<&NodeSection>,
    listed: &Found<BTreeMap<String, Found<SocketAddr>>>,
) {
    let Some(node) = node else { return };
    let name = &node.name.value;
    if listed.value.contains_key(name) {
        return;
    }
    let names: Vec<&str> = listed.value.keys().map(String::as_str).collect();
    let complaint = Complaint::new(
        format!("not in {}", listed.key),
        format!("one of the names in {}: {}", listed.key, names.join(", ")),
    );
    document.problem(&node.name.key, &node.name.span, true, complaint);
}

/// No two names may have one address.
fn check_distinct(document: &Document<'_>, addresses: &BTreeMap<String, Found<SocketAddr>>) {
    let mut owners: BTreeMap<SocketAddr, &Found<SocketAddr>> = BTreeMap::new();
    for found in addresses.values() {
        if let Some(other) = owners.insert(found.value, found) {
            let (first, second) = if other.span.start < found.span.start {
                (other, found)
            } else {
                (found, other)
            };
            let complaint = Complaint::new(
                format!("{} has this address already", first.key),
                "an address of its own",
            );
            document.problem(&second.key, &second.span, true, complaint);
        }
    }
}

/// What this node binds must not collide, and the VIP must be nobody's own address.
fn check_addresses(
    document: &Document<'_>,
    node: Option<&NodeSection>,
    coord: Option<&CoordSection>,
    group: Option<&GroupSection>,
    admin: &Found<SocketAddr>,
    services: &[ServiceSection],
) {
    let mut bound: Vec<&Found<SocketAddr>> = Vec::new();
    let own = node.map(|node| node.name.value.as_str());
    if let Some(coord) = coord {
        bound.extend(&coord.client);
        bound.extend(own.and_then(|own| coord.peers.get(own)));
    }
    bound.extend(
        group
            .zip(own)
            .and_then(|(group, own)| group.members.get(own)),
    );
    bound.push(admin);
    for (at, found) in bound.iter().enumerate() {
        let collides = |other: &&&Found<SocketAddr>| {
            let same_ip = other.value.ip() == found.value.ip()
                || other.value.ip().is_unspecified()
                || found.value.ip().is_unspecified();
            same_ip && other.value.port() == found.value.port()
        };
        if let Some(other) = bound[..at].iter().find(collides) {
            let complaint = Complaint::new(
                format!("{} has this port of this node already", other.key),
                "an address and port that nothing else of this node listens on",
            );
            document.problem(&found.key, &found.span, true, complaint);
        }
    }
    let hosts = coord
        .iter()
        .flat_map(|coord| coord.peers.values())
        .chain(coord.and_then(|coord| coord.client.as_ref()));
    let hosts = hosts
        .chain(group.iter().flat_map(|group| group.members.values()))
        .chain([admin]);
    for host in hosts {
        if let Some(service) = services
            .iter()
            .find(|service| service.config.vip == host.value.ip())
        {
            let complaint = Complaint::new(
                format!(
                    "{} is the VIP of service \"{}\"",
                    host.value.ip(),
                    service.config.name
                ),
                "an address that stays with its host",
            );
            document.problem(&host.key, &host.span, true, complaint);
        }
    }
}

fn plain(addresses: &BTreeMap<String, Found<SocketAddr>>) -> BTreeMap<String, SocketAddr> {
    addresses
        .iter()
        .map(|(name, found)| (name.clone(), found.value))
        .collect()
}
