//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// The one's-complement sum of big-endian 16-bit words, unfolded. An odd last byte is padded.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    // Eight bytes at a time, as two 32-bit halves: carries collect in the upper bits (RFC 1071 §2C).
    let mut chunks = bytes.chunks_exact(8);
    let mut total = 0u64;
    for chunk in &mut chunks {
        let word = u64::from_be_bytes(chunk.try_into().expect("chunks of eight"));
        total += (word >> 32) + (word & 0xffff_ffff);
    }
    let mut pairs = chunks.remainder().chunks_exact(2);
    for pair in &mut pairs {
        total += u64::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    if let [last] = pairs.remainder() {
        total += u64::from(*last) << 8;
    }
    total
}

/// Folds a sum to 16 bits.
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded below 2^16")
}

/// The sum of TCP's pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
pub(crate) fn pseudo_header(source: IpAddr, destination: IpAddr, tcp_len: usize) -> u64 {
    pseudo_header_of(source, destination, 6, tcp_len)
}

/// The sum of the pseudo header of any protocol.
pub(crate) fn pseudo_header_of(
    source: IpAddr,
    destination: IpAddr,
    protocol: u64,
    len: usize,
) -> u64 {
    let addresses = match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => sum(&a.octets()) + sum(&b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => sum(&a.octets()) + sum(&b.octets()),
        _ => 0,
    };
    addresses + protocol + len as u64
}

/// Whether a TCP segment's checksum fits.
pub(crate) fn tcp_is_sound(source: IpAddr, destination: IpAddr, tcp: &[u8]) -> bool {
    fold(pseudo_header(source, destination, tcp.len()) + sum(tcp)) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_agree_with_the_plain_definition() {
        let bytes: Vec<u8> = (0..=255u8)
            .cycle()
            .take(1003)
            .map(|b| b.wrapping_mul(97))
            .collect();
        for len in [0, 1, 2, 7, 8, 9, 15, 16, 17, 1000, 1003] {
            let plain: u64 = bytes[..len]
                .chunks(2)
                .map(|p| u64::from(p[0]) << 8 | u64::from(*p.get(1).unwrap_or(&0)))
                .sum();
            assert_eq!(fold(sum(&bytes[..len])), fold(plain), "{len} bytes");
        }
    }
}
