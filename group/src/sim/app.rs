//! The model application: it folds every event into a digest, so that two that differ anywhere differ for ever.

use bytes::Bytes;
use std::collections::BTreeMap;

#[derive(Clone, Debug, Default)]
pub(super) struct App {
    pub(super) applied: u64,
    chain: BTreeMap<u64, u64>,
    image: Vec<u8>,
}

pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(super) fn digest(bytes: &[u8]) -> u64 {
    bytes
        .chunks(8)
        .fold(bytes.len() as u64 ^ 0x9e37_79b9_7f4a_7c15, |h, c| {
            let mut word = [0; 8];
            word[..c.len()].copy_from_slice(c);
            mix(h ^ u64::from_le_bytes(word)).wrapping_add(1)
        })
}

impl App {
    pub(super) fn start_at(&mut self, applied: u64, chain: u64) {
        self.applied = applied;
        self.chain = BTreeMap::from([(applied, chain)]);
        self.image.clear();
    }

    pub(super) fn apply(&mut self, number: u64, payload: &[u8]) {
        let next = mix(self.now() ^ mix(number) ^ digest(payload));
        self.applied = number;
        self.chain.insert(number, next);
    }

    /// The digest of the state as it stands.
    pub(super) fn now(&self) -> u64 {
        self.at(self.applied).unwrap_or(0)
    }

    /// The digest of the state after `number`.
    pub(super) fn at(&self, number: u64) -> Option<u64> {
        self.chain.get(&number).copied()
    }

    /// An image with `filler` bytes beside what matters, in segments.
    pub(super) fn checkpoint(&self, filler: usize) -> Vec<Bytes> {
        let mut head = self.applied.to_le_bytes().to_vec();
        head.extend_from_slice(&self.now().to_le_bytes());
        let fill: Vec<u8> = head.iter().copied().cycle().take(filler).collect();
        let mut segments = vec![Bytes::from(head)];
        segments.extend(fill.chunks(10_000).map(Bytes::copy_from_slice));
        segments
    }

    pub(super) fn take_piece(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        if offset != self.image.len() as u64 {
            return Err(format!("piece at {offset} after {}", self.image.len()));
        }
        self.image.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn restore(&mut self, total: Option<u64>) -> Result<(), String> {
        let whole = self.image.len();
        if total.is_some_and(|t| t != whole as u64) || whole < 16 {
            return Err(format!("checkpoint of {total:?} bytes ended at {whole}"));
        }
        let word = |i: usize| {
            let bytes = self.image[i..i + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let fine = self.image[16..]
            .iter()
            .enumerate()
            .all(|(i, b)| *b == self.image[i % 16]);
        if !fine {
            return Err("the checkpoint's filler is damaged".into());
        }
        let (applied, chain) = (word(0), word(8));
        self.start_at(applied, chain);
        Ok(())
    }
}
