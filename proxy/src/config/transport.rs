//! `group.multicast` and `group.pacing`: how the group's datagrams travel.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU32;

use toml::de::DeValue;
use unbroken_group::driver::{Multicast, Options, Pacing};

use super::document::Complaint;
use super::section::{Found, Section};
use super::value::{self, Parsed};

/// Bits a second in one byte a microsecond, the unit in which the driver paces.
const BITS_OF_UNIT: u64 = 8_000_000;

/// Both keys of `[group]`. `own`: this node's address among the members, where it is known.
pub(super) fn options(group: &Section<'_, '_>, own: Option<SocketAddr>) -> Options {
    Options {
        multicast: multicast(group, own),
        pacing: pacing(group),
    }
}

fn multicast(group: &Section<'_, '_>, own: Option<SocketAddr>) -> Option<Multicast> {
    let section = group.section("multicast", "{ address = \"239.98.0.1:7401\", hops = 1 }")?;
    let address = section.required(
        "address",
        "a multicast address and a port, the same on every node, as in \"239.98.0.1:7401\"",
        multicast_address,
    );
    let hops = section.optional("hops", hops);
    let shared_host = section.optional("shared_host", value::switch);
    let document = section.document;
    section.finish();
    let address = address?;
    let interface = match own.map(|own| own.ip()) {
        Some(IpAddr::V4(own)) => own,
        Some(IpAddr::V6(own)) => {
            let complaint = Complaint::new(
                format!("this node's address in group.members is {own}"),
                "IPv4 members: the group's multicast is IPv4",
            );
            document.problem(&address.key, &address.span, true, complaint);
            return None;
        }
        // That this node is not among the members was complained about.
        None => Ipv4Addr::UNSPECIFIED,
    };
    Some(Multicast {
        group: address.value,
        interface,
        hops: hops.map_or(1, |found| found.value),
        shared_host: shared_host.is_some_and(|found| found.value),
    })
}

fn multicast_address(value: &DeValue<'_>) -> Parsed<SocketAddrV4> {
    const EXPECTED: &str =
        "an IPv4 multicast address outside 224.0.0.0/24, and a port, as in \"239.98.0.1:7401\"";
    match value::socket_address(value)? {
        // 224.0.0.0/24 is for the protocols of the link itself (RFC 5771, section 4).
        SocketAddr::V4(v4) if v4.ip().is_multicast() && v4.ip().octets()[..3] != [224, 0, 0] => {
            Ok(v4)
        }
        other => Err(Complaint::new(
            format!("{} is none that a group may use", other.ip()),
            EXPECTED,
        )),
    }
}

fn hops(value: &DeValue<'_>) -> Parsed<u8> {
    const EXPECTED: &str = "a number from 1 (this link alone) to 255";
    value::count(value)
        .ok()
        .and_then(|n| u8::try_from(n).ok())
        .filter(|n| *n > 0)
        .ok_or_else(|| Complaint::new("not a number of hops", EXPECTED))
}

fn pacing(group: &Section<'_, '_>) -> Option<Pacing> {
    let expected = "{ rate = \"1Gbit/s\", burst = \"64KiB\", queue = \"1MiB\" }";
    let section = group.section("pacing", expected)?;
    let rate = section.required(
        "rate",
        "what one destination is sent at most, as in \"1Gbit/s\"",
        rate,
    );
    let burst = section.optional("burst", bytes);
    let queue = section.optional("queue", bytes);
    section.finish();
    let or = |found: Option<Found<u32>>, default| found.map_or(default, |found| found.value);
    Some(Pacing {
        bytes_per_us: rate?.value,
        burst_bytes: or(burst, 64 << 10),
        queue_bytes_max: or(queue, 1 << 20),
    })
}

/// "8Mbit/s" and more, in bytes a microsecond, rounded down.
fn rate(value: &DeValue<'_>) -> Parsed<NonZeroU32> {
    const EXPECTED: &str = "a rate from 8 Mbit/s on, as in \"100Mbit/s\" or \"1Gbit/s\"";
    let wrong = || Complaint::new("not a rate", EXPECTED);
    let text = value::string(value, EXPECTED)?;
    let (number, unit) = if let Some(number) = text.strip_suffix("Mbit/s") {
        (number, 1_000_000)
    } else if let Some(number) = text.strip_suffix("Gbit/s") {
        (number, 1_000_000_000)
    } else {
        return Err(wrong());
    };
    let number: u64 = number.trim_end().parse().map_err(|_| wrong())?;
    number
        .checked_mul(unit)
        .and_then(|bits| u32::try_from(bits / BITS_OF_UNIT).ok())
        .and_then(NonZeroU32::new)
        .ok_or_else(|| Complaint::new("a rate out of range", EXPECTED))
}

fn bytes(value: &DeValue<'_>) -> Parsed<u32> {
    u32::try_from(value::size(value)?)
        .map_err(|_| Complaint::new("too large", "less than 4GiB, as in \"1MiB\""))
}
