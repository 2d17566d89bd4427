//! Authenticated encryption of datagrams and of the control connections' answers.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;

/// Bytes that sealing adds.
pub(super) const TAG_BYTES: usize = 16;

/// The key that every member has, ready for deriving others.
#[derive(Clone)]
pub struct GroupKey(hkdf::Prk);

struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

impl GroupKey {
    /// From 32 secret bytes.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(hkdf::Salt::new(hkdf::HKDF_SHA256, b"unbroken group v1").extract(key))
    }

    fn derive(&self, info: &[&[u8]]) -> LessSafeKey {
        let mut key = [0; 32];
        self.0
            .expand(info, KeyLength)
            .and_then(|okm| okm.fill(&mut key))
            .expect("32 bytes are a length that HKDF gives");
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("AES-256 takes 32 bytes"))
    }

    /// The key of one life of one member in one group.
    pub(super) fn sender(&self, instance: u128, name: &str, incarnation: u128) -> LessSafeKey {
        let (instance, incarnation) = (instance.to_le_bytes(), incarnation.to_le_bytes());
        self.derive(&[b"datagram", &instance, &incarnation, name.as_bytes()])
    }

    /// The key under which a member answers a challenge on its control connections.
    pub(super) fn control(&self, name: &str) -> LessSafeKey {
        self.derive(&[b"control", name.as_bytes()])
    }
}

/// The nonce of the datagram with this number. A number is used once in a key's life.
pub(super) fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals `buf[from..]` in place and appends the tag; `buf[..from]` is authenticated as it stands.
pub(super) fn seal(key: &LessSafeKey, counter: u64, buf: &mut Vec<u8>, start: usize, from: usize) {
    let (head, body) = buf.split_at_mut(from);
    let tag = key
        .seal_in_place_separate_tag(nonce(counter), Aad::from(&head[start..]), body)
        .expect("a datagram is far below AES-GCM's limit");
    buf.extend_from_slice(tag.as_ref());
}

/// Opens `body` (tag at its end) in place; `None` if it was not sealed so.
pub(super) fn open<'a>(
    key: &LessSafeKey,
    counter: u64,
    head: &[u8],
    body: &'a mut [u8],
) -> Option<&'a [u8]> {
    key.open_in_place(nonce(counter), Aad::from(head), body)
        .ok()
        .map(|plain| &*plain)
}

const WINDOW_WORDS: usize = 64;
const WINDOW: u64 = 64 * WINDOW_WORDS as u64;

/// Which of a sender's numbers have been seen: a number is accepted once, and only while it is not
/// older than the newest by 4096 (the sliding window of RFC 6479).
#[derive(Clone)]
pub(super) struct ReplayWindow {
    newest: u64,
    bits: [u64; WINDOW_WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self {
            newest: 0,
            bits: [0; WINDOW_WORDS],
        }
    }
}

impl ReplayWindow {
    fn place(counter: u64) -> (usize, u64) {
        let word = (counter / 64) % WINDOW_WORDS as u64;
        (
            usize::try_from(word).expect("below 64"),
            1 << (counter % 64),
        )
    }

    /// Whether `counter` would be accepted.
    pub(super) fn fresh(&self, counter: u64) -> bool {
        if counter > self.newest {
            return true;
        }
        // One word less than the window: the newest number's own word is being filled.
        if self.newest - counter >= WINDOW - 64 {
            return false;
        }
        let (word, bit) = Self::place(counter);
        self.bits[word] & bit == 0
    }

    /// Notes an accepted number.
    pub(super) fn note(&mut self, counter: u64) {
        if counter > self.newest {
            let (from, to) = (self.newest / 64, counter / 64);
            for word in (from + 1..=to).take(WINDOW_WORDS) {
                let place = usize::try_from(word % WINDOW_WORDS as u64).expect("below 64");
                self.bits[place] = 0;
            }
            self.newest = counter;
        }
        let (word, bit) = Self::place(counter);
        self.bits[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_once() {
        let mut window = ReplayWindow::default();
        for counter in [1, 2, 5, 4, 3, 4000, 70, 9000, 8990] {
            if window.newest >= WINDOW && counter + WINDOW - 64 <= window.newest {
                continue;
            }
            assert!(window.fresh(counter), "{counter}");
            window.note(counter);
            assert!(!window.fresh(counter), "{counter} again");
        }
        assert!(!window.fresh(70), "too old");
        assert!(window.fresh(8991));
    }

    #[test]
    fn a_jump_over_the_whole_window_forgets_it() {
        let mut window = ReplayWindow::default();
        for counter in 1..=200 {
            window.note(counter);
        }
        window.note(1_000_000);
        for counter in 1_000_000 - 4000..1_000_000 {
            assert!(window.fresh(counter), "{counter}");
        }
        assert!(!window.fresh(1_000_000));
        assert!(!window.fresh(200));
    }

    #[test]
    fn nothing_opens_under_another_life_head_or_number() {
        let key = GroupKey::new(&[7; 32]);
        let sender = key.sender(1, "r1", 2);
        let mut sealed = b"headbody".to_vec();
        seal(&sender, 9, &mut sealed, 0, 4);
        let opens = |key: &LessSafeKey, counter, head: &[u8]| {
            let mut body = sealed[4..].to_vec();
            open(key, counter, head, &mut body).map(<[u8]>::to_vec)
        };
        assert_eq!(opens(&sender, 9, b"head").as_deref(), Some(&b"body"[..]));
        assert_eq!(opens(&sender, 8, b"head"), None);
        assert_eq!(opens(&sender, 9, b"heaD"), None);
        for other in [
            key.sender(2, "r1", 2),
            key.sender(1, "r2", 2),
            key.sender(1, "r1", 3),
            GroupKey::new(&[8; 32]).sender(1, "r1", 2),
        ] {
            assert_eq!(opens(&other, 9, b"head"), None);
        }
    }
}
