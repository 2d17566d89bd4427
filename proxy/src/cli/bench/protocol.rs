//! What the benchmark's client and server say to each other.
//!
//! The server is deterministic: what it answers depends on the connection's bytes alone, so that
//! it may stand behind a virtual IP.
//!
//! ```text
//! request: operation (1 byte), length n (8 bytes, big-endian), for ECHO and TAKE n bytes
//! answer:  ECHO the same n bytes; SEND n bytes of the pattern; TAKE the CRC-32C of the n bytes (4 bytes)
//! ```

/// Operation and length.
pub(super) const HEADER_BYTES: usize = 9;

/// Give the bytes back.
pub(super) const ECHO: u8 = b'E';
/// Send so many bytes.
pub(super) const SEND: u8 = b'S';
/// Take so many bytes and answer their checksum.
pub(super) const TAKE: u8 = b'T';

/// The largest echo: it is held in memory as a whole.
pub(super) const ECHO_BYTES_MAX: u64 = 1 << 20;

/// Period of the pattern.
pub(super) const PATTERN_BYTES: usize = 1 << 16;

/// The head of a request.
pub(super) fn header(operation: u8, length: u64) -> [u8; HEADER_BYTES] {
    let mut header = [operation; HEADER_BYTES];
    header[1..].copy_from_slice(&length.to_be_bytes());
    header
}

/// Operation and length of a request.
pub(super) fn parse(header: [u8; HEADER_BYTES]) -> (u8, u64) {
    let [operation, length @ ..] = header;
    (operation, u64::from_be_bytes(length))
}

/// The bytes of the pattern: they look random, so that a byte lost or moved shows.
pub(super) fn pattern() -> Vec<u8> {
    // xorshift64 (Marsaglia 2003), a fixed seed.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(PATTERN_BYTES);
    while bytes.len() < PATTERN_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
