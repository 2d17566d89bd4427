//! What travels: byte streams and answers that both ends can compute, so that every byte can be
//! checked and the first wrong one named.

use ring::digest::{Context, Digest, SHA256, digest};

/// Length of a request and of an answer of the exchange, in bytes.
pub(crate) const MESSAGE_BYTES: usize = 32;

/// The finaliser of splitmix64: a number in, a well-mixed number out.
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buffer` with the bytes that stand at `offset` of the stream named by `seed`.
pub(crate) fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let key = mix(seed);
    let word = |index: u64| mix(key ^ index.wrapping_mul(0xd134_2543_de82_ef95)).to_le_bytes();
    let skip = usize::try_from(offset % 8).expect("below 8");
    let mut index = offset / 8;
    let mut rest = buffer;
    if skip != 0 {
        let taken = rest.len().min(8 - skip);
        let (head, tail) = rest.split_at_mut(taken);
        head.copy_from_slice(&word(index)[skip..skip + taken]);
        rest = tail;
        index += 1;
    }
    let mut words = rest.chunks_exact_mut(8);
    for chunk in &mut words {
        chunk.copy_from_slice(&word(index));
        index += 1;
    }
    let last = words.into_remainder();
    let length = last.len();
    last.copy_from_slice(&word(index)[..length]);
}

/// SHA-256 of the first `length` bytes of the stream `seed`, in hexadecimal.
pub(crate) fn stream_sha256(seed: u64, length: u64) -> String {
    let mut hasher = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    let mut offset = 0;
    while offset < length {
        let take = usize::try_from((length - offset).min(1 << 16)).expect("at most 64 KiB");
        fill(seed, offset, &mut buffer[..take]);
        hasher.update(&buffer[..take]);
        offset += take as u64;
    }
    hex(hasher.finish())
}

/// A digest in hexadecimal.
pub(crate) fn hex(digest: Digest) -> String {
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Reads a stream that should be `seed`'s, hashing it and looking for the first wrong byte.
pub(crate) struct Checker {
    seed: u64,
    offset: u64,
    hasher: Context,
    expected: Vec<u8>,
    first_wrong: Option<u64>,
}

impl Checker {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            offset: 0,
            hasher: Context::new(&SHA256),
            expected: Vec::new(),
            first_wrong: None,
        }
    }

    /// Takes the next bytes of the stream.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if self.first_wrong.is_none() {
            self.expected.resize(bytes.len(), 0);
            fill(self.seed, self.offset, &mut self.expected);
            if let Some(at) = bytes
                .iter()
                .zip(&self.expected)
                .position(|(is, should)| is != should)
            {
                self.first_wrong = Some(self.offset + at as u64);
            }
        }
        self.offset += bytes.len() as u64;
    }

    /// How many bytes came so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.offset
    }

    /// Offset of the first byte that was not the stream's.
    pub(crate) fn first_wrong(&self) -> Option<u64> {
        self.first_wrong
    }

    /// SHA-256 of all that came, in hexadecimal.
    pub(crate) fn finish(self) -> String {
        hex(self.hasher.finish())
    }
}

/// Request number `number` of the exchange.
pub(crate) fn request(seed: u64, number: u64) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    message[..8].copy_from_slice(&number.to_be_bytes());
    fill(seed, number * 24, &mut message[8..]);
    message
}

/// The exchange's state of one connection. Each answer depends on every request before it, so a
/// replica that missed, repeated or reordered one can never answer rightly again.
#[derive(Default)]
pub(crate) struct Exchange {
    answered: u64,
    chain: [u8; 32],
}

impl Exchange {
    /// The answer to the next request.
    pub(crate) fn answer(&mut self, request: &[u8; MESSAGE_BYTES]) -> [u8; MESSAGE_BYTES] {
        let mut both = [0; 32 + MESSAGE_BYTES];
        both[..32].copy_from_slice(&self.chain);
        both[32..].copy_from_slice(request);
        self.chain.copy_from_slice(digest(&SHA256, &both).as_ref());
        let mut message = [0; MESSAGE_BYTES];
        message[..8].copy_from_slice(&self.answered.to_be_bytes());
        message[8..].copy_from_slice(&self.chain[..24]);
        self.answered += 1;
        message
    }

    /// Appends the answers to the requests in the first `held` bytes of `buffer` to `answers`; moves what is left of the next
    /// request to its front, and gives its length.
    pub(crate) fn answer_all(
        &mut self,
        buffer: &mut [u8],
        held: usize,
        answers: &mut Vec<u8>,
    ) -> usize {
        let (requests, rest) = buffer[..held].as_chunks::<MESSAGE_BYTES>();
        let left = rest.len();
        for request in requests {
            answers.extend_from_slice(&self.answer(request));
        }
        buffer.copy_within(held - left..held, 0);
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 1000];
        fill(7, 0, &mut whole);
        for cut in 0..64 {
            for length in [0, 1, 7, 8, 9, 100] {
                let mut part = vec![0; length];
                fill(7, cut, &mut part);
                let at = usize::try_from(cut).unwrap();
                assert_eq!(part, whole[at..at + length], "at {cut}, {length} bytes");
            }
        }
    }

    #[test]
    fn the_checker_names_the_first_wrong_byte() {
        let mut bytes = vec![0; 5000];
        fill(1, 0, &mut bytes);
        let mut checker = Checker::new(1);
        checker.update(&bytes[..1234]);
        bytes[4321] ^= 1;
        checker.update(&bytes[1234..]);
        assert_eq!((checker.bytes(), checker.first_wrong()), (5000, Some(4321)));
        assert_ne!(checker.finish(), stream_sha256(1, 5000));

        let mut whole = Checker::new(1);
        bytes[4321] ^= 1;
        whole.update(&bytes);
        assert_eq!(whole.first_wrong(), None);
        assert_eq!(whole.finish(), stream_sha256(1, 5000));
    }

    #[test]
    fn an_answer_depends_on_every_request_before_it() {
        let (mut a, mut b) = (Exchange::default(), Exchange::default());
        assert_eq!(a.answer(&request(1, 0)), b.answer(&request(1, 0)));
        a.answer(&request(1, 1));
        b.answer(&request(1, 2));
        assert_ne!(a.answer(&request(1, 3)), b.answer(&request(1, 3)));
    }
}
