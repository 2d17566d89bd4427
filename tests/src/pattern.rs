//! A byte stream that everyone can compute at any offset, so that both ends of a connection know what
//! must arrive without having seen it.

/// The eight bytes of word `index` of stream `seed` (SplitMix64).
fn word(seed: u64, index: u64) -> [u8; 8] {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ z >> 31).to_le_bytes()
}

/// Fills `buffer` with the bytes of stream `seed` from `offset` on.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut index = offset / 8;
    let within = usize::try_from(offset % 8).expect("below 8");
    let (head, body) = buffer.split_at_mut(((8 - within) % 8).min(buffer.len()));
    if !head.is_empty() {
        head.copy_from_slice(&word(seed, index)[within..within + head.len()]);
        index += 1;
    }
    for chunk in body.chunks_mut(8) {
        chunk.copy_from_slice(&word(seed, index)[..chunk.len()]);
        index += 1;
    }
}

/// Where `bytes`, said to be those of stream `seed` from `offset` on, first differ from it.
#[must_use]
pub fn first_difference(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut expected = vec![0; bytes.len()];
    fill(seed, offset, &mut expected);
    let at = expected.iter().zip(bytes).position(|(a, b)| a != b)?;
    Some(offset + u64::try_from(at).expect("a position in memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_gives_the_same_stream() {
        let mut whole = vec![0; 100];
        fill(7, 0, &mut whole);
        for from in 0..100 {
            for to in from..100 {
                let mut part = vec![0; to - from];
                fill(7, from as u64, &mut part);
                assert_eq!(part, whole[from..to], "{from}..{to}");
            }
        }
        assert_eq!(first_difference(7, 10, &whole[10..]), None);
        whole[42] ^= 1;
        assert_eq!(first_difference(7, 10, &whole[10..]), Some(42));
        assert_eq!(first_difference(8, 0, &whole[..8]), Some(0));
    }
}
