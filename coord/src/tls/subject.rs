//! The subject of a certificate as a string, in the form of Java's `X500Principal.getName()`, which
//! is what ZooKeeper's access lists hold: RFC 2253, the last part first, `CN=me,OU=here,O=us`.

use std::fmt::Write;

/// Nesting and parts are bounded by the certificate's length, which TLS bounds.
struct Der<'a>(&'a [u8]);

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
/// `[0]`, the optional version in front of everything else.
const VERSION: u8 = 0xa0;

impl<'a> Der<'a> {
    /// The next element: its tag, and what is in it.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (length, rest) = match *first {
            short @ 0..=0x7f => (usize::from(short), rest),
            0x81..=0x84 => {
                let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                let length = bytes
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
                (length, rest)
            }
            _ => return None,
        };
        let (inside, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, inside))
    }

    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next()
            .filter(|(is, _)| *is == tag)
            .map(|(_, inside)| inside)
    }
}

/// The subject of a certificate in DER. `None` if it is no certificate.
pub(crate) fn subject(certificate: &[u8]) -> Option<String> {
    // RFC 5280 §4.1: Certificate, its TBSCertificate: version, serialNumber, signature, issuer,
    // validity, subject.
    let mut tbs = Der(Der(Der(certificate).expect(SEQUENCE)?).expect(SEQUENCE)?);
    let (tag, _) = tbs.next()?;
    if tag == VERSION {
        tbs.next()?;
    }
    for _signature_issuer_validity in 0..3 {
        tbs.expect(SEQUENCE)?;
    }
    let mut parts = Vec::new();
    let mut names = Der(tbs.expect(SEQUENCE)?);
    while !names.0.is_empty() {
        parts.push(part(names.expect(SET)?)?);
    }
    parts.reverse();
    Some(parts.join(","))
}

/// One relative name, which may have several values.
fn part(set: &[u8]) -> Option<String> {
    let mut values = Vec::new();
    let mut set = Der(set);
    while !set.0.is_empty() {
        let mut pair = Der(set.expect(SEQUENCE)?);
        let kind = pair.expect(OID)?;
        let whole = pair.0;
        let (tag, value) = pair.next()?;
        values.push(match (keyword(kind), text(tag, value)) {
            (Some(keyword), Some(text)) => format!("{keyword}={}", escape(&text)),
            (Some(keyword), None) => format!("{keyword}=#{}", hex(whole)),
            (None, _) => format!("{}=#{}", dotted(kind)?, hex(whole)),
        });
    }
    Some(values.join("+"))
}

/// RFC 2253 §2.3's table, which is all that Java names in this form.
fn keyword(oid: &[u8]) -> Option<&'static str> {
    const X520: [u8; 2] = [0x55, 0x04];
    const PILOT: [u8; 9] = [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 0x01];
    let (last, arc) = oid.split_last()?;
    Some(match (arc, *last) {
        (arc, 3) if arc == X520 => "CN",
        (arc, 6) if arc == X520 => "C",
        (arc, 7) if arc == X520 => "L",
        (arc, 8) if arc == X520 => "ST",
        (arc, 9) if arc == X520 => "STREET",
        (arc, 10) if arc == X520 => "O",
        (arc, 11) if arc == X520 => "OU",
        (arc, 1) if arc == PILOT => "UID",
        (arc, 25) if arc == PILOT => "DC",
        _ => return None,
    })
}

fn text(tag: u8, value: &[u8]) -> Option<String> {
    match tag {
        // UTF8String, NumericString, PrintableString, IA5String
        0x0c | 0x12 | 0x13 | 0x16 => String::from_utf8(value.to_vec()).ok(),
        // TeletexString, which everybody writes as Latin-1
        0x14 => Some(value.iter().map(|byte| char::from(*byte)).collect()),
        // BMPString
        0x1e => {
            let (units, rest) = value.as_chunks::<2>();
            let units: Vec<u16> = units.iter().map(|unit| u16::from_be_bytes(*unit)).collect();
            String::from_utf16(&units).ok().filter(|_| rest.is_empty())
        }
        _ => None,
    }
}

/// RFC 2253 §2.4.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let last = text.chars().count().saturating_sub(1);
    for (i, c) in text.chars().enumerate() {
        let special = matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=')
            || (i == 0 && matches!(c, '#' | ' '))
            || (i == last && c == ' ');
        if special {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").expect("memory takes everything");
        out
    })
}

/// `1.2.840.113549.1.9.1`.
fn dotted(oid: &[u8]) -> Option<String> {
    let mut numbers: Vec<u64> = Vec::new();
    let mut number = 0_u64;
    for byte in oid {
        number = number
            .checked_mul(128)?
            .checked_add(u64::from(byte & 0x7f))?;
        if byte & 0x80 == 0 {
            numbers.push(std::mem::take(&mut number));
        }
    }
    let first = *numbers.first()?;
    let top = (first / 40).min(2);
    let mut out = format!("{top}.{}", first - top * 40);
    for number in &numbers[1..] {
        write!(out, ".{number}").expect("memory takes everything");
    }
    Some(out)
}
