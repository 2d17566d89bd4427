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

    /// The key of one life of one member in one group, for one epoch. The name is last: all before it has a fixed
    /// length, so that no two senders have the same input.
    pub(super) fn sender(
        &self,
        instance: u128,
        name: &str,
        incarnation: u128,
        epoch: u64,
    ) -> LessSafeKey {
        self.derive(&[
            b"datagram",
            &instance.to_le_bytes(),
            &incarnation.to_le_bytes(),
            &epoch.to_le_bytes(),
            name.as_bytes(),
        ])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_opens_under_another_life_epoch_head_or_number() {
        let key = GroupKey::new(&[7; 32]);
        let sender = key.sender(1, "r1", 2, 3);
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
            key.sender(2, "r1", 2, 3),
            key.sender(1, "r2", 2, 3),
            key.sender(1, "r1", 3, 3),
            key.sender(1, "r1", 2, 4),
            GroupKey::new(&[8; 32]).sender(1, "r1", 2, 3),
        ] {
            assert_eq!(opens(&other, 9, b"head"), None);
        }
    }
}
