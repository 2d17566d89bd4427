//! Sections: walks the parsed file, collects every problem, and holds the parts against each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use humantime_serde::re::humantime::format_duration;
use toml::Spanned;
use toml::de::DeTable;
use unbroken_coord::tls::{ClientAuth, ServerTls};

use super::document::{Complaint, ConfigErrors, Document};
use super::section::{Found, Section};
use super::service::{self, ServiceSection};
use super::transport;
use super::value;
use super::{
    AdminConfig, Config, CoordConfig, CoordinatorConfig, EmbeddedCoord, GroupConfig, Key,
    NodeConfig, Resilience,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Parses the text; what is not TOML becomes problems of the document.
fn parse<'t>(document: &Document<'t>) -> Spanned<DeTable<'t>> {
    let (table, errors) = DeTable::parse_recoverable(document.text());
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let (wrong, expected) = match error.message().split_once(", expected ") {
            Some((wrong, expected)) => (wrong, expected),
            None => (error.message(), "each key once, in valid TOML"),
        };
        document.problem("", &span, false, Complaint::new(wrong, expected));
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
    let services = service::sections(&root);
    root.finish();
    check_preferences(&document, group.as_ref(), &services);
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
    let history_dir = section.optional("history_dir", value::path);
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
    let history_dir = history_dir.map_or_else(
        || data_dir.join("history"),
        |found| root.document.resolve(&found.value),
    );
    Some(NodeSection {
        config: NodeConfig {
            name: name.value.clone(),
            data_dir,
            history_dir,
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

/// What is said of a coordinator server in this node, and of no other.
const EMBEDDED_KEYS: [&str; 13] = [
    "client",
    "secure_client",
    "tls",
    "peers",
    "super_digest",
    "extended_types",
    "reconfig",
    "join",
    "read_only",
    "sessions_max",
    "connections_max",
    "session_min",
    "session_max",
];

struct CoordSection {
    config: CoordConfig,
    client: Option<Found<SocketAddr>>,
    secure_client: Option<Found<SocketAddr>>,
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
        for (key, found) in EMBEDDED_KEYS.map(|key| (key, section.get(key))) {
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
            secure_client: None,
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
    let secure_client = section.optional("secure_client", value::socket_address);
    let tls = coord_tls(&section);
    if let (Some(secure), None) = (&secure_client, section.table.get("tls")) {
        let complaint = Complaint::new(
            "there are no certificates",
            "a section [coord.tls] with cert and key",
        );
        document.problem(&secure.key, &secure.span, true, complaint);
    }
    let super_digest = section.optional("super_digest", value::super_digest);
    let switch = |key, default| {
        let found = section.optional(key, value::switch);
        found.map_or(default, |found| found.value)
    };
    let extended_types = switch("extended_types", false);
    let reconfig = switch("reconfig", true);
    let join = switch("join", false);
    let read_only = switch("read_only", true);
    let count = |key, default| {
        let found = section.optional(key, value::count);
        found.map_or(default, |found| found.value)
    };
    let sessions_max = count("sessions_max", 500_000);
    let connections_max = count("connections_max", 20_000);
    let bound = |key, default| {
        let limits = value::duration(Duration::from_millis(10), Duration::from_secs(86_400));
        let found = section.optional(key, limits);
        found.map_or((default, None), |found| {
            (found.value, Some((found.key, found.span)))
        })
    };
    let (session_min, _) = bound("session_min", Duration::from_millis(30));
    let (session_max, max_found) = bound("session_max", Duration::from_secs(60));
    if session_max < session_min {
        let (key, span) = max_found.unwrap_or((section.key("session_max"), section.span.clone()));
        let complaint = Complaint::new(
            format!("{session_max:?} is below coord.session_min, {session_min:?}"),
            "at least coord.session_min",
        );
        document.problem(&key, &span, true, complaint);
    }
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
        secure_client: secure_client.as_ref().map(|found| found.value),
        tls,
        peers: plain(&peers.value),
        super_digest: super_digest.map(|found| found.value),
        extended_types,
        reconfig,
        join,
        read_only,
        sessions_max,
        connections_max,
        session_min,
        session_max,
    });
    Some(CoordSection {
        config,
        client: Some(client),
        secure_client,
        peers: peers.value,
        external: None,
    })
}

/// The certificates, read once to say here what is wrong with them.
fn coord_tls(coord: &Section<'_, '_>) -> Option<ServerTls> {
    coord.table.get("tls")?;
    let section = coord.section("tls", "a section [coord.tls] with cert and key")?;
    let document = section.document;
    let file = |found: Found<String>| document.resolve(&found.value);
    let cert = section.required("cert", "a file with the server's certificate", value::path);
    let key = section.required("key", "a file with its private key", value::path);
    let ca = section.optional("ca", value::path).map(file);
    let client_auth = section.optional("client_auth", value::client_auth);
    let switch = |key, default| {
        let found = section.optional(key, value::switch);
        found.map_or(default, |found| found.value)
    };
    let (peers, plain) = (switch("peers", false), switch("plain", true));
    let tls = cert.zip(key).map(|(cert, key)| {
        let mut tls = ServerTls::new(file(cert), file(key));
        tls.ca = ca;
        tls.client_auth = client_auth.map_or(ClientAuth::None, |found| found.value);
        (tls.peers, tls.plain) = (peers, plain);
        tls
    });
    if let Some(Err(error)) = tls.as_ref().map(ServerTls::check) {
        let key = error.setting();
        let given = section.table.get(key);
        let span = given.map_or_else(|| section.span.clone(), |found| found.span());
        let complaint = Complaint::new(
            error.to_string(),
            "PEM files: a certificate, its key, and the authorities that are trusted",
        );
        document.problem(&section.key(key), &span, given.is_some(), complaint);
    }
    section.finish();
    tls
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
    let own = node.zip(members.as_ref()).and_then(|(node, members)| {
        let own = members.value.get(&node.config.name)?;
        Some(own.value)
    });
    let transport = transport::options(&section, own);
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
        transport,
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

/// Only a member can be preferred.
fn check_preferences(
    document: &Document<'_>,
    group: Option<&GroupSection>,
    services: &[ServiceSection],
) {
    let Some(group) = group else { return };
    let names: Vec<&str> = group.members.keys().map(String::as_str).collect();
    let preferred = services.iter().filter_map(|s| s.prefer.as_ref());
    for found in preferred.filter(|found| !names.contains(&found.value.as_str())) {
        let complaint = Complaint::new(
            "no member of the group",
            format!("one of group.members: {}", names.join(", ")),
        );
        document.problem(&found.key, &found.span, true, complaint);
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
        bound.extend(&coord.secure_client);
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
    let peers = coord.iter().flat_map(|coord| coord.peers.values());
    let members = group.iter().flat_map(|group| group.members.values());
    let hosts: Vec<&Found<SocketAddr>> = bound.into_iter().chain(peers).chain(members).collect();
    for service in services {
        if let Some(host) = hosts
            .iter()
            .find(|host| host.value.ip() == service.config.vip)
        {
            let complaint = Complaint::new(
                format!("{} has this address", host.key),
                "an address that belongs to no host: it moves between them",
            );
            document.problem(&service.vip.key, &service.vip.span, true, complaint);
        }
    }
}

fn plain(addresses: &BTreeMap<String, Found<SocketAddr>>) -> BTreeMap<String, SocketAddr> {
    addresses
        .iter()
        .map(|(name, found)| (name.clone(), found.value))
        .collect()
}
