//! Single values: from TOML to our types, or what was expected in their place.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use humantime_serde::re::humantime;
use toml::Spanned;
use toml::de::DeValue;
use unbroken_coord::tls::ClientAuth;

use super::document::Complaint;
use super::{
    AddressMode, Divergence, ExternalCoord, Failback, FenceMode, Ordering, Resilience, Upstream,
};
use crate::determinism::Harmless;

pub(super) type Parsed<T> = Result<T, Complaint>;

/// A name stands in znodes, datagrams, metrics and host names: this is what all of them can carry.
const NAME_BYTES_MAX: usize = 64;

/// Linux: IFNAMSIZ - 1.
const INTERFACE_BYTES_MAX: usize = 15;

/// `sun_path` without its terminating zero.
const UNIX_PATH_BYTES_MAX: usize = 107;

pub(super) fn string<'v>(value: &'v DeValue<'_>, expected: &str) -> Parsed<&'v str> {
    value.as_str().ok_or_else(|| wrong_type(value, expected))
}

pub(super) fn wrong_type(value: &DeValue<'_>, expected: &str) -> Complaint {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    };
    Complaint::new(format!("{article} {kind} is of the wrong type"), expected)
}

/// Whether `text` can name a node or a service.
pub(super) fn check_name(text: &str) -> Parsed<()> {
    let fits = !text.is_empty() && text.len() <= NAME_BYTES_MAX;
    let clean = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    // "." and ".." are no znode names.
    if fits && clean && !text.starts_with('.') {
        return Ok(());
    }
    Err(Complaint::new(
        "not a name",
        format!("1 to {NAME_BYTES_MAX} of the characters A-Z a-z 0-9 - _ . (no dot in front)"),
    ))
}

pub(super) fn name(value: &DeValue<'_>) -> Parsed<String> {
    let text = string(value, "a name as in \"r1\"")?;
    check_name(text)?;
    Ok(text.to_owned())
}

pub(super) fn path(value: &DeValue<'_>) -> Parsed<String> {
    const EXPECTED: &str = "a path as in \"/var/lib/unbroken\"";
    let text = string(value, EXPECTED)?;
    if text.is_empty() || text.contains('\0') {
        return Err(Complaint::new("not a path", EXPECTED));
    }
    Ok(text.to_owned())
}

pub(super) fn interface(value: &DeValue<'_>) -> Parsed<String> {
    let expected =
        format!("the name of a network interface as in \"eth0\", 1 to {INTERFACE_BYTES_MAX} bytes");
    let text = string(value, &expected)?;
    let bad = |c: char| c == '/' || c.is_whitespace() || c == '\0';
    if text.is_empty() || text.len() > INTERFACE_BYTES_MAX || text.contains(bad) {
        return Err(Complaint::new("not an interface's name", expected));
    }
    Ok(text.to_owned())
}

/// A duration from `min` to `max`.
pub(super) fn duration(min: Duration, max: Duration) -> impl Fn(&DeValue<'_>) -> Parsed<Duration> {
    move |value| {
        let expected = format!(
            "a duration from {} to {} with its unit, as in \"50ms\"",
            humantime::format_duration(min),
            humantime::format_duration(max)
        );
        let text = string(value, &expected)?;
        let duration = humantime::parse_duration(text)
            .map_err(|error| Complaint::new(format!("not a duration ({error})"), &expected))?;
        if duration < min {
            return Err(Complaint::new("too short", expected));
        }
        if duration > max {
            return Err(Complaint::new("too long", expected));
        }
        Ok(duration)
    }
}

/// A number of bytes: "256MiB", "4GB", or a plain integer.
pub(super) fn size(value: &DeValue<'_>) -> Parsed<u64> {
    const EXPECTED: &str = "a size as in \"256MiB\" (units B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)";
    let not_a_size = || Complaint::new("not a size", EXPECTED);
    if value.is_integer() {
        return integer(value)
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(not_a_size);
    }
    let text = string(value, EXPECTED)?;
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let scale: u64 = match unit.trim_start() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "" => return Err(Complaint::new("a size without its unit", EXPECTED)),
        _ => return Err(not_a_size()),
    };
    let count: u64 = digits.parse().map_err(|_| not_a_size())?;
    count
        .checked_mul(scale)
        .ok_or_else(|| Complaint::new("a size beyond 64 bits", EXPECTED))
}

fn integer(value: &DeValue<'_>) -> Option<i64> {
    let integer = value.as_integer()?;
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// An address to listen on or to send to: IP and port, both given.
pub(super) fn socket_address(value: &DeValue<'_>) -> Parsed<SocketAddr> {
    const EXPECTED: &str = "IP:PORT as in \"10.98.0.11:7400\" or \"[fd98::11]:7400\"";
    let text = string(value, EXPECTED)?;
    let address: SocketAddr = text.parse().map_err(|_| {
        let complaint = Complaint::new("not an address", EXPECTED);
        match text.rsplit_once(':') {
            Some((host, port))
                if port.parse::<u16>().is_ok() && host.parse::<IpAddr>().is_err() =>
            {
                complaint.help(
                    "host names are not resolved here: a cluster must come up when DNS does not",
                )
            }
            None if text.parse::<IpAddr>().is_ok() => complaint.help("the port is missing"),
            _ => complaint,
        }
    })?;
    if address.port() == 0 {
        return Err(Complaint::new("port 0 names no port", EXPECTED));
    }
    Ok(address)
}

pub(super) fn port(value: &DeValue<'_>) -> Parsed<u16> {
    const EXPECTED: &str = "a port from 1 to 65535";
    if !value.is_integer() {
        return Err(wrong_type(value, EXPECTED));
    }
    match integer(value).map(u16::try_from) {
        Some(Ok(port)) if port != 0 => Ok(port),
        _ => Err(Complaint::new("not a port", EXPECTED)),
    }
}

/// A VIP and the length of its prefix.
pub(super) fn vip(value: &DeValue<'_>) -> Parsed<(IpAddr, u8)> {
    const EXPECTED: &str =
        "an IPv4 or IPv6 address with its prefix, as in \"10.98.0.100/24\" or \"fd98::100/64\"";
    let text = string(value, EXPECTED)?;
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address
        .parse()
        .map_err(|_| Complaint::new("not an address", EXPECTED))?;
    let bits: u8 = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => bits,
        Some(prefix) => prefix
            .parse()
            .ok()
            .filter(|prefix| (1..=bits).contains(prefix))
            .ok_or_else(|| {
                Complaint::new(
                    format!("/{prefix} is no prefix length (1 to {bits})"),
                    EXPECTED,
                )
            })?,
    };
    let reason = match address {
        _ if address.is_unspecified() => Some("the unspecified address"),
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_multicast() => Some("a multicast address"),
        IpAddr::V4(address) => v4_reserved(address, prefix),
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => Some("an IPv4-mapped address"),
        IpAddr::V6(_) => None,
    };
    match reason {
        Some(reason) => Err(Complaint::new(
            format!("{reason} cannot be a virtual IP"),
            EXPECTED,
        )),
        None => Ok((address, prefix)),
    }
}

/// Why an IPv4 address cannot belong to a host.
fn v4_reserved(address: Ipv4Addr, prefix: u8) -> Option<&'static str> {
    if address.is_broadcast() {
        return Some("the broadcast address");
    }
    // RFC 3021: a /31 has neither a network nor a broadcast address.
    if prefix >= 31 {
        return None;
    }
    let host = u32::from(address) & (u32::MAX >> prefix);
    match host {
        0 => Some("the network's own address"),
        _ if host == u32::MAX >> prefix => Some("the network's broadcast address"),
        _ => None,
    }
}

pub(super) fn upstream(value: &DeValue<'_>) -> Parsed<Upstream> {
    const EXPECTED: &str = "\"127.0.0.1:7000\", \"[::1]:7000\" or \"unix:/run/app.sock\"";
    let text = string(value, EXPECTED)?;
    if let Some(path) = text.strip_prefix("unix:") {
        if !path.starts_with('/') || path.contains('\0') {
            return Err(Complaint::new("not an absolute path", EXPECTED));
        }
        if path.len() > UNIX_PATH_BYTES_MAX {
            let wrong = format!(
                "longer than the {UNIX_PATH_BYTES_MAX} bytes that a socket's path may have"
            );
            return Err(Complaint::new(wrong, EXPECTED));
        }
        return Ok(Upstream::Unix(PathBuf::from(path)));
    }
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    match numeric.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(Upstream::Tcp(address)),
        _ => Err(Complaint::new("not an address", EXPECTED)),
    }
}

pub(super) fn resilience(value: &DeValue<'_>) -> Parsed<Resilience> {
    const EXPECTED: &str = "\"majority\", \"all\", or a number of backups from 1 on";
    if value.is_integer() {
        return match integer(value).map(u32::try_from) {
            Some(Ok(count)) if count > 0 => Ok(Resilience::Backups(count)),
            _ => Err(Complaint::new("not a number of backups", EXPECTED)
                .help("with 0 backups an answered request could be lost with the leader")),
        };
    }
    match string(value, EXPECTED)? {
        "majority" => Ok(Resilience::Majority),
        "all" => Ok(Resilience::All),
        text => {
            let complaint = Complaint::new("not known", EXPECTED);
            match suggestion(text, &["majority", "all"]) {
                Some(word) => Err(complaint.help(format!("did you mean \"{word}\"?"))),
                None if text.parse::<u32>().is_ok() => {
                    Err(complaint.help("write the number without quotes"))
                }
                None => Err(complaint),
            }
        }
    }
}

pub(super) fn address_mode(value: &DeValue<'_>) -> Parsed<AddressMode> {
    Ok(match word(value, &["garp", "vmac", "flood"])? {
        "vmac" => AddressMode::Vmac,
        "flood" => AddressMode::Flood,
        _ => AddressMode::Garp,
    })
}

/// A program and its arguments.
pub(super) fn command(value: &DeValue<'_>) -> Parsed<Vec<String>> {
    const EXPECTED: &str = "a list of words, as in [\"/usr/bin/server\", \"--port\", \"7000\"]";
    let DeValue::Array(array) = value else {
        return Err(wrong_type(value, EXPECTED)
            .help("no shell reads it; for one write [\"sh\", \"-c\", \"...\"]"));
    };
    let mut words = Vec::with_capacity(array.len());
    for word in array.iter() {
        match word.get_ref() {
            DeValue::String(word) if !word.contains('\0') => words.push(word.to_string()),
            _ => return Err(Complaint::new("a word that is no text", EXPECTED)),
        }
    }
    if words.first().is_none_or(String::is_empty) {
        return Err(Complaint::new("no program", EXPECTED));
    }
    Ok(words)
}

pub(super) fn fence(value: &DeValue<'_>) -> Parsed<FenceMode> {
    Ok(match word(value, &["kernel", "process"])? {
        "process" => FenceMode::Process,
        _ => FenceMode::Kernel,
    })
}

pub(super) fn ordering(value: &DeValue<'_>) -> Parsed<Ordering> {
    match word(value, &["connection", "total"])? {
        "connection" => Ok(Ordering::Connection),
        _ => Ok(Ordering::Total),
    }
}

pub(super) fn divergence(value: &DeValue<'_>) -> Parsed<Divergence> {
    Ok(match word(value, &["evict", "warn", "stop"])? {
        "warn" => Divergence::Warn,
        "stop" => Divergence::Stop,
        _ => Divergence::Evict,
    })
}

/// A list of regular expressions, as [`crate::determinism::Harmless`] takes them.
pub(super) fn patterns(value: &DeValue<'_>) -> Parsed<Vec<String>> {
    const EXPECTED: &str = "a list of regular expressions, as in [\"^Date: .*\"]";
    let DeValue::Array(items) = value else {
        return Err(wrong_type(value, EXPECTED));
    };
    let text = |item: &Spanned<DeValue<'_>>| Ok(string(item.get_ref(), EXPECTED)?.to_owned());
    let patterns: Vec<String> = items.iter().map(text).collect::<Parsed<_>>()?;
    match Harmless::new(&patterns) {
        Ok(_) => Ok(patterns),
        Err(error) => Err(Complaint::new(error.to_string(), EXPECTED)),
    }
}

/// One of `words`.
fn word<'v>(value: &'v DeValue<'_>, words: &[&str]) -> Parsed<&'v str> {
    let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    let (last, front) = quoted.split_last().expect("there are words to choose from");
    let expected = format!("{} or {last}", front.join(", "));
    let text = string(value, &expected)?;
    if words.contains(&text) {
        return Ok(text);
    }
    let complaint = Complaint::new("not known", expected);
    Err(match suggestion(text, words) {
        Some(word) => complaint.help(format!("did you mean \"{word}\"?")),
        None => complaint,
    })
}

/// A number of things, at least one.
pub(super) fn count(value: &DeValue<'_>) -> Parsed<usize> {
    const EXPECTED: &str = "a whole number from 1 on";
    let DeValue::Integer(number) = value else {
        return Err(wrong_type(value, EXPECTED));
    };
    match usize::from_str_radix(number.as_str(), number.radix()) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(Complaint::new("out of range", EXPECTED)),
    }
}

/// A text of any kind.
pub(super) fn text(value: &DeValue<'_>) -> Parsed<String> {
    string(value, "a text").map(str::to_owned)
}

/// A number of things of which there are few.
pub(super) fn small_count(value: &DeValue<'_>) -> Parsed<u32> {
    const MAX: u32 = 1000;
    let count = u32::try_from(count(value)?).unwrap_or(u32::MAX);
    if count > MAX {
        return Err(Complaint::new("too many", format!("1 to {MAX}")));
    }
    Ok(count)
}

pub(super) fn failback(value: &DeValue<'_>) -> Parsed<Failback> {
    match value.as_str() {
        Some("never") => Ok(Failback::Never),
        Some("idle") => Ok(Failback::Idle),
        _ => duration(Duration::from_millis(10), Duration::from_secs(24 * 3600))(value)
            .map(Failback::After)
            .map_err(|_| {
                let expected = "\"never\", \"idle\", or a duration as in \"30s\"";
                Complaint::new("not a time to hand over", expected)
            }),
    }
}

pub(super) fn switch(value: &DeValue<'_>) -> Parsed<bool> {
    let expected = "true or false";
    value.as_bool().ok_or_else(|| wrong_type(value, expected))
}

pub(super) fn client_auth(value: &DeValue<'_>) -> Parsed<ClientAuth> {
    const EXPECTED: &str = "\"none\", \"request\" or \"require\"";
    match string(value, EXPECTED)? {
        "none" => Ok(ClientAuth::None),
        "request" => Ok(ClientAuth::Request),
        "require" => Ok(ClientAuth::Require),
        text => {
            let complaint = Complaint::new("not known", EXPECTED);
            Err(match suggestion(text, &["none", "request", "require"]) {
                Some(word) => complaint.help(format!("did you mean \"{word}\"?")),
                None => complaint,
            })
        }
    }
}

/// `super:` and a digest, as it would stand in an access list.
pub(super) fn super_digest(value: &DeValue<'_>) -> Parsed<String> {
    let expected = "\"super:DIGEST\", the Base64 of the SHA-1 of \"super:PASSWORD\"";
    let text = string(value, expected)?;
    match text.split_once(':') {
        Some(("super", digest)) if digest.len() == 28 && digest.ends_with('=') => Ok(text.into()),
        _ => Err(Complaint::new("not the digest of a super user", expected)),
    }
}

pub(super) fn external(value: &DeValue<'_>) -> Parsed<ExternalCoord> {
    const EXPECTED: &str = "\"zk://host1:2181,host2:2181\" with an optional \"/chroot\" behind it";
    let text = string(value, EXPECTED)?;
    let not_external = |wrong: String| Complaint::new(wrong, EXPECTED);
    let rest = text
        .strip_prefix("zk://")
        .ok_or_else(|| not_external("does not begin with zk://".to_owned()))?;
    let (hosts, chroot) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let mut servers = Vec::new();
    for host in hosts.split(',') {
        let (host_name, port) = host.rsplit_once(':').unwrap_or((host, "2181"));
        let bare_v6 =
            host_name.contains(':') && !(host_name.starts_with('[') && host_name.ends_with(']'));
        let port: Option<u16> = port.parse().ok().filter(|&port| port != 0);
        match port {
            Some(port)
                if !host_name.is_empty()
                    && !bare_v6
                    && !host_name.contains(char::is_whitespace) =>
            {
                servers.push(format!("{host_name}:{port}"));
            }
            _ => return Err(not_external(format!("\"{host}\" is not HOST:PORT"))),
        }
    }
    let chroot = chroot.trim_end_matches('/');
    if chroot
        .split('/')
        .skip(1)
        .any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(not_external(format!("\"{chroot}\" is no znode path")));
    }
    Ok(ExternalCoord {
        servers,
        chroot: chroot.to_owned(),
    })
}

/// The word of `words` that `text` is a slip of the fingers away from.
pub(super) fn suggestion<'w>(text: &str, words: &[&'w str]) -> Option<&'w str> {
    words
        .iter()
        .map(|word| (strsim::damerau_levenshtein(text, word), *word))
        .filter(|(distance, word)| *distance <= 1 + word.len() / 4)
        .min()
        .map(|(_, word)| word)
}
