//! `[[service]]`: each alone, then held against each other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use toml::de::DeValue;

use super::document::{Complaint, Document};
use super::section::{Found, Section};
use super::value;
use super::{
    AddressMode, Divergence, Failback, FenceMode, HealthCheck, HealthConfig, HistoryConfig,
    HooksConfig, Ordering, ServiceConfig, Upstream,
};

/// Services of one node; each costs sockets and a share of the one data-plane thread.
const SERVICES_MAX: usize = 64;
/// Ports of one service.
const PORTS_MAX: usize = 1024;

pub(super) struct ServiceSection {
    pub(super) config: ServiceConfig,
    name: Found<String>,
    pub(super) vip: Found<(IpAddr, u8)>,
    interface: Found<String>,
    address: Option<Found<AddressMode>>,
    fence: Option<Found<FenceMode>>,
    pub(super) prefer: Option<Found<String>>,
    failback: Option<Found<Failback>>,
    ports: Vec<Found<u16>>,
    ordering: Option<Found<Ordering>>,
}

pub(super) fn sections(root: &Section<'_, '_>) -> Vec<ServiceSection> {
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
    let fence = section.optional("fence", value::fence);
    let ordering = section.optional("ordering", value::ordering);
    let close_wait = section.optional(
        "close_wait",
        value::duration(Duration::from_millis(10), Duration::from_secs(60)),
    );
    let divergence = section.optional("divergence", value::divergence);
    if let Some(found) = fence.as_ref().filter(|f| f.value == FenceMode::Process) {
        let sentence = "fence = \"process\": the kernel does not enforce the lease, so a leader that is paused at \
                        the wrong moment and wakes may send some frames beside its successor";
        document.warn(&found.span, sentence);
    }
    let harmless = section.optional("harmless", value::patterns);
    let history = history(&section);
    let health = health(&section);
    let prefer = section.optional("prefer", value::name);
    let failback = section.optional("failback", value::failback);
    if let Some(found) = &failback
        && prefer.is_none()
    {
        let complaint = Complaint::new(
            "nobody is preferred",
            "prefer = \"NODE\" beside it, or neither",
        );
        document.problem(&found.key, &found.span, true, complaint);
    }
    let command = section.optional("command", value::command);
    let restore = section.optional("restore", value::command);
    let stall = section.optional(
        "stall",
        value::duration(Duration::from_millis(10), Duration::from_secs(60)),
    );
    let total = ordering
        .as_ref()
        .is_some_and(|o| o.value == Ordering::Total);
    if let Some(found) = &ordering
        && total
        && command.is_none()
        && restore.is_none()
    {
        let complaint = Complaint::new(
            "the servers' state is shared by their connections, and nothing begins them anew",
            "command = [...] beside it, or restore = [...]",
        )
        .help("a replica whose server has seen what others have not must begin again from nothing");
        document.problem(&found.key, &found.span, true, complaint);
    }
    if let Some(found) = stall.as_ref().filter(|_| !total) {
        let complaint = Complaint::new(
            "each connection goes at its own pace",
            "ordering = \"total\" beside it, or neither",
        );
        document.problem(&found.key, &found.span, true, complaint);
    }
    if let Some(found) = restore.as_ref().filter(|_| !total) {
        let complaint = Complaint::new(
            "there is no state of which a server could begin",
            "ordering = \"total\" beside it, or neither",
        );
        document.problem(&found.key, &found.span, true, complaint);
    }
    let ready = section.optional("ready", value::command);
    if let Some(found) = &ready
        && command.is_none()
        && restore.is_none()
    {
        let complaint = Complaint::new(
            "the node begins no server that could become ready",
            "command = [...] beside it, or restore = [...]",
        );
        document.problem(&found.key, &found.span, true, complaint);
    }
    let checkpoint = section.optional("checkpoint", value::command);
    if let Some(found) = &checkpoint
        && (restore.is_none() || !total)
    {
        let complaint = Complaint::new(
            "nothing could be made of a checkpoint",
            "restore = [...] beside it, and ordering = \"total\"",
        );
        document.problem(&found.key, &found.span, true, complaint);
    }
    let on_promote = section.optional("on_promote", value::command);
    let on_demote = section.optional("on_demote", value::command);
    section.finish();
    let (name, vip, interface, ports) = (name?, vip?, interface?, ports?);
    if let Some(Found {
        value: Upstream::Tcp(upstream),
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
        address: address
            .as_ref()
            .map_or(AddressMode::Garp, |found| found.value),
        hooks: HooksConfig {
            on_promote: on_promote.map_or_else(Vec::new, |found| found.value),
            on_demote: on_demote.map_or_else(Vec::new, |found| found.value),
        },
        ordering: ordering
            .as_ref()
            .map_or(Ordering::Connection, |found| found.value),
        fence: fence
            .as_ref()
            .map_or(FenceMode::Kernel, |found| found.value),
        close_wait: close_wait.map_or(Duration::from_secs(1), |found| found.value),
        divergence: divergence.map_or(Divergence::Evict, |found| found.value),
        harmless: harmless.map_or_else(Vec::new, |found| found.value),
        history,
        command: command.map(|found| found.value),
        restore: restore.map(|found| found.value),
        ready: ready.map(|found| found.value),
        checkpoint: checkpoint.map(|found| found.value),
        stall: stall.map_or(Duration::from_secs(1), |found| found.value),
        health,
        prefer: prefer.as_ref().map(|found| found.value.clone()),
        failback: failback
            .as_ref()
            .map_or(Failback::Idle, |found| found.value),
    };
    Some(ServiceSection {
        config,
        name,
        vip,
        interface,
        address,
        fence,
        prefer,
        failback,
        ports,
        ordering,
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
    if let Some(Found {
        value: 1..1_048_576,
        key,
        span,
    }) = &disk
    {
        let complaint = Complaint::new(
            "too small to hold what memory does not",
            "\"1MiB\" or more, or 0 to keep nothing on disk",
        );
        inner.document.problem(key, span, true, complaint);
    }
    inner.finish();
    HistoryConfig {
        memory_bytes_max: memory.map_or(default.memory_bytes_max, |found| found.value),
        disk_bytes_max: disk.map_or(default.disk_bytes_max, |found| found.value),
    }
}

fn health(section: &Section<'_, '_>) -> Option<HealthConfig> {
    const EXPECTED: &str = "{ send = \"PING\\r\\n\", expect = \"+PONG\", interval = \"1s\" }";
    let inner = section.section("health", EXPECTED)?;
    let send = inner.optional("send", value::text);
    let expect = inner.optional("expect", value::text);
    if let Some(found) = expect.as_ref().filter(|found| found.value.is_empty()) {
        let complaint = Complaint::new(
            "a server that says nothing would pass",
            "a part of its answer; without it, any answer will do",
        );
        inner
            .document
            .problem(&found.key, &found.span, true, complaint);
    }
    let command = inner.optional("command", value::command);
    let span = value::duration(Duration::from_millis(10), Duration::from_secs(3600));
    let interval = inner.optional("interval", &span);
    let timeout = inner.optional("timeout", &span);
    let failures = inner.optional("failures", value::small_count);
    if let (Some(found), Some(other)) = (&command, send.as_ref().or(expect.as_ref())) {
        let complaint = Complaint::new(
            format!("{} is there too", other.key),
            "either a command, or what is sent to the server",
        );
        inner
            .document
            .problem(&found.key, &found.span, true, complaint);
    }
    let check = match (command, send, expect) {
        (Some(command), _, _) => HealthCheck::Command(command.value),
        (None, None, None) => HealthCheck::Connect,
        (None, send, expect) => HealthCheck::Answer {
            send: send.map(|found| found.value).unwrap_or_default(),
            expect: expect.map(|found| found.value),
        },
    };
    inner.finish();
    let second = Duration::from_secs(1);
    Some(HealthConfig {
        check,
        interval: interval.map_or(second, |found| found.value),
        timeout: timeout.map_or(second, |found| found.value),
        failures: failures.map_or(3, |found| found.value),
    })
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
        if service.config.ordering != first.config.ordering {
            let (key, span) = match &service.ordering {
                Some(found) => (&found.key, &found.span),
                None => (&service.vip.key, &service.vip.span),
            };
            let complaint = Complaint::new(
                format!("service \"{other}\" has the same VIP with another ordering"),
                "services of one VIP in one order, or each in the order of its connections",
            );
            document.problem(key, span, true, complaint);
        }
        let total = service.config.ordering == Ordering::Total;
        if total && service.config.checkpoint.is_some() != first.config.checkpoint.is_some() {
            let (key, span) = (&service.vip.key, &service.vip.span);
            let complaint = Complaint::new(
                format!("of \"{other}\" and \"{name}\", which share a VIP, one has no checkpoint"),
                "checkpoint = [...] in all services of a VIP, or in none: their states go together",
            );
            document.problem(key, span, true, complaint);
        }
        let differs = |what: &str, key: &str, span: &std::ops::Range<usize>| {
            let complaint = Complaint::new(
                format!("service \"{other}\" has the same VIP with another {what}"),
                format!("the same: services of one VIP share its {what}"),
            );
            document.problem(key, span, true, complaint);
        };
        if service.config.fence != first.config.fence
            && let Some(found) = service.fence.as_ref().or(first.fence.as_ref())
        {
            differs("fence", &found.key, &found.span);
        }
        if service.config.address != first.config.address
            && let Some(found) = service.address.as_ref().or(first.address.as_ref())
        {
            differs("address mode", &found.key, &found.span);
        }
        if service.config.prefer != first.config.prefer
            && let Some(found) = service.prefer.as_ref().or(first.prefer.as_ref())
        {
            differs("preferred node", &found.key, &found.span);
        }
        if service.config.failback != first.config.failback
            && let Some(found) = service.failback.as_ref().or(first.failback.as_ref())
        {
            differs("failback", &found.key, &found.span);
        }
    }
}
