//! Access control: who may do what to one znode.
//!
//! Four schemes: `world` (anyone), `digest` (a name and the SHA-1 of name and password), `ip` (an
//! address or a prefix) and `x509` (the subject of a certificate). An access list holds entries; an
//! operation is allowed if any entry grants its permission to any identity of the session's
//! connection. The identity `super` is granted everything, and stands in no list.

use std::net::IpAddr;

use crate::wire::{Acl, Id};

/// Scheme of the identity that is granted everything.
const SUPER: &str = "super";

/// Entries in one access list at most; a longer list is refused as invalid.
pub const ACL_ENTRIES_MAX: usize = 1024;

/// Does `acl` grant `perm` to any of `identities`? An empty list grants everything, as ZooKeeper's does.
#[must_use]
pub fn allows(acl: &[Acl], perm: i32, identities: &[Id]) -> bool {
    acl.is_empty()
        || identities.iter().any(|who| who.scheme == SUPER)
        || acl
            .iter()
            .filter(|grant| grant.perms & perm != 0)
            .any(|grant| match grant.id.scheme.as_str() {
                "world" => grant.id.id == "anyone",
                "ip" => identities
                    .iter()
                    .any(|who| who.scheme == "ip" && address_matches(&grant.id.id, &who.id)),
                _ => identities.contains(&grant.id),
            })
}

/// Checks a list that a client sent and puts the client's own identities in the place of `auth`.
/// `None` if the list is not valid: empty, too long, an unknown scheme, or a malformed name.
#[must_use]
pub fn normalise(acl: Vec<Acl>, identities: &[Id]) -> Option<Vec<Acl>> {
    if acl.is_empty() || acl.len() > ACL_ENTRIES_MAX {
        return None;
    }
    let mut result: Vec<Acl> = Vec::with_capacity(acl.len());
    let mut add = |grant: Acl| {
        if !result.contains(&grant) {
            result.push(grant);
        }
    };
    for grant in acl {
        let valid = match grant.id.scheme.as_str() {
            "world" => grant.id.id == "anyone",
            // As Java splits: empty parts at the end do not count.
            "digest" => grant.id.id.trim_end_matches(':').split(':').count() == 2,
            "x509" => !grant.id.id.is_empty(),
            "ip" => parse_prefix(&grant.id.id).is_some(),
            "auth" => {
                let mut own = identities
                    .iter()
                    .filter(|who| matches!(who.scheme.as_str(), "digest" | "x509"))
                    .peekable();
                own.peek()?;
                own.for_each(|who| {
                    add(Acl {
                        perms: grant.perms,
                        id: who.clone(),
                    })
                });
                continue;
            }
            _ => false,
        };
        if !valid {
            return None;
        }
        add(grant);
    }
    Some(result)
}

/// The identity that `auth` with scheme `digest` and `user:password` proves; `None` if it is no text.
#[must_use]
pub fn digest_identity(credentials: &[u8]) -> Option<Id> {
    let text = std::str::from_utf8(credentials).ok()?;
    let user = text.split(':').next().unwrap_or_default();
    let sum = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, credentials);
    Some(Id {
        scheme: "digest".into(),
        id: format!("{user}:{}", base64(sum.as_ref())),
    })
}

/// Who may do everything: what the operator's own credentials prove beside their digest.
#[must_use]
pub fn super_user() -> Id {
    Id {
        scheme: SUPER.into(),
        id: String::new(),
    }
}

/// The list as it is shown to somebody who may read it and not set it: without what proves a name.
#[must_use]
pub fn masked(acl: &[Acl]) -> Vec<Acl> {
    let mask = |grant: &Acl| {
        let mut grant = grant.clone();
        if let ("digest", Some((user, _))) = (&*grant.id.scheme, grant.id.id.split_once(':')) {
            grant.id.id = format!("{user}:x");
        }
        grant
    };
    acl.iter().map(mask).collect()
}

/// An identity by name alone, as `whoAmI` tells it.
#[must_use]
pub fn user(id: &Id) -> Id {
    let name = match id.scheme.as_str() {
        "digest" => id.id.split(':').next().unwrap_or_default(),
        _ => &id.id,
    };
    Id {
        scheme: id.scheme.clone(),
        id: name.to_owned(),
    }
}

fn parse_prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.unwrap_or(width);
    (bits <= width).then_some((address, bits))
}

fn address_matches(pattern: &str, address: &str) -> bool {
    let Some((network, bits)) = parse_prefix(pattern) else {
        return false;
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let bits = u32::from(bits);
    match (network, address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => {
            (u32::from(n) ^ u32::from(a))
                .checked_shr(32 - bits)
                .unwrap_or(0)
                == 0
        }
        (IpAddr::V6(n), IpAddr::V6(a)) => {
            (u128::from(n) ^ u128::from(a))
                .checked_shr(128 - bits)
                .unwrap_or(0)
                == 0
        }
        _ => false,
    }
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            if place <= chunk.len() {
                text.push(char::from(
                    ALPHABET[(word >> (18 - 6 * place) & 63) as usize],
                ));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::perms::{ADMIN, ALL, READ, WRITE};

    fn who(scheme: &str, id: &str) -> Id {
        Id {
            scheme: scheme.into(),
            id: id.into(),
        }
    }

    fn grant(perms: i32, scheme: &str, id: &str) -> Acl {
        Acl {
            perms,
            id: who(scheme, id),
        }
    }

    #[test]
    fn digest_is_zookeepers() {
        // `DigestAuthenticationProvider super:test`, from ZooKeeper's administration guide.
        assert_eq!(
            digest_identity(b"super:test"),
            Some(who("digest", "super:D/InIHSb7yEEbrWz8b9l71RjZJU="))
        );
        assert_eq!(digest_identity(b"\xff:x"), None);
    }

    #[test]
    fn permissions_need_the_bit_and_the_identity() {
        let acl = [
            grant(READ, "world", "anyone"),
            grant(WRITE, "digest", "a:b"),
        ];
        assert!(allows(&acl, READ, &[]));
        assert!(!allows(&acl, WRITE, &[]));
        assert!(!allows(&acl, WRITE, &[who("digest", "a:c")]));
        assert!(allows(&acl, WRITE, &[who("digest", "a:b")]));
        assert!(!allows(&acl, ADMIN, &[who("digest", "a:b")]));
    }

    #[test]
    fn address_prefixes() {
        let acl = [grant(READ, "ip", "10.1.0.0/16")];
        assert!(allows(&acl, READ, &[who("ip", "10.1.2.3")]));
        assert!(!allows(&acl, READ, &[who("ip", "10.2.2.3")]));
        assert!(address_matches("::/0", "2001:db8::1"));
        assert!(!address_matches("::/0", "10.0.0.1"));
        assert!(address_matches("10.0.0.1", "10.0.0.1"));
    }

    #[test]
    fn malformed_lists_are_refused() {
        let me = [who("ip", "10.0.0.1"), who("digest", "a:b")];
        assert_eq!(normalise(vec![], &me), None);
        assert_eq!(normalise(vec![grant(ALL, "sasl", "x")], &me), None);
        assert_eq!(normalise(vec![grant(ALL, "ip", "10.0.0.0/33")], &me), None);
        assert_eq!(normalise(vec![grant(ALL, "world", "me")], &me), None);
        assert_eq!(normalise(vec![grant(ALL, "auth", "")], &me[..1]), None);
        assert_eq!(
            normalise(vec![grant(READ, "auth", "")], &me),
            Some(vec![grant(READ, "digest", "a:b")])
        );
    }
}
