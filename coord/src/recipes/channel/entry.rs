//! What an entry of the log holds.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Largest event, in bytes.
pub const EVENT_BYTES_MAX: usize = 512 * 1024;

/// Largest batch, in bytes; one event alone may be larger.
const BATCH_BYTES_MAX: usize = 128 * 1024;

/// Most events in a batch.
const BATCH_EVENTS_MAX: usize = 1024;

/// First byte of every entry.
const VERSION: u8 = 1;

/// A publisher's id.
pub(super) type Id = [u8; 16];

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) publisher: Id,
    /// How often the publisher had appended before.
    pub(super) append: u64,
    pub(super) events: Vec<Bytes>,
}

impl Entry {
    pub(super) fn encode(&self) -> Bytes {
        let bytes = self
            .events
            .iter()
            .map(|event| 4 + event.len())
            .sum::<usize>();
        let mut data = BytesMut::with_capacity(25 + bytes);
        data.put_u8(VERSION);
        data.put_slice(&self.publisher);
        data.put_u64(self.append);
        for event in &self.events {
            data.put_u32(u32::try_from(event.len()).expect("EVENT_BYTES_MAX is smaller"));
            data.put_slice(event);
        }
        data.freeze()
    }

    /// `None` where it is not an entry.
    pub(super) fn decode(mut data: Bytes) -> Option<Self> {
        if data.len() < 25 || data.get_u8() != VERSION {
            return None;
        }
        let mut publisher = [0; 16];
        data.copy_to_slice(&mut publisher);
        let append = data.get_u64();
        let mut events = Vec::new();
        while !data.is_empty() {
            let bytes = usize::try_from(data.try_get_u32().ok()?).ok()?;
            if bytes > data.len() {
                return None;
            }
            events.push(data.split_to(bytes));
        }
        Some(Self {
            publisher,
            append,
            events,
        })
    }
}

/// Cuts events into batches.
pub(super) fn batches(events: Vec<Bytes>) -> Vec<Vec<Bytes>> {
    let mut batches: Vec<Vec<Bytes>> = Vec::new();
    let mut bytes = 0;
    for event in events {
        bytes += event.len();
        match batches.last_mut() {
            Some(batch) if bytes <= BATCH_BYTES_MAX && batch.len() < BATCH_EVENTS_MAX => {
                batch.push(event);
            }
            _ => {
                bytes = event.len();
                batches.push(vec![event]);
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(events: Vec<Bytes>) -> Entry {
        Entry {
            publisher: [7; 16],
            append: 9,
            events,
        }
    }

    #[test]
    fn entries_go_there_and_back_and_no_others_are_taken_for_them() {
        for events in [
            vec![],
            vec!["".into()],
            vec!["a".into(), "".into(), "bc".into()],
        ] {
            let entry = entry(events);
            let data = entry.encode();
            assert_eq!(Entry::decode(data.clone()), Some(entry.clone()));
            for end in 0..data.len() {
                // Cut off between two events it is a shorter entry, else none.
                if let Some(other) = Entry::decode(data.slice(..end)) {
                    assert!(entry.events.starts_with(&other.events));
                    assert_eq!(other.encode(), data.slice(..end));
                }
            }
        }
        assert_eq!(Entry::decode(Bytes::from_static(&[2; 40])), None);
    }

    #[test]
    fn batches_are_bounded_and_keep_order() {
        let sizes = [1, 100_000, 31_071, 2, 500_000, 3].map(|size| Bytes::from(vec![0; size]));
        let batches = batches(sizes.to_vec());
        let sizes: Vec<Vec<usize>> = batches
            .iter()
            .map(|batch| batch.iter().map(Bytes::len).collect())
            .collect();
        assert_eq!(
            sizes,
            [vec![1, 100_000, 31_071], vec![2], vec![500_000], vec![3]]
        );
        let many = super::batches(vec![Bytes::new(); 2049]);
        let lengths: Vec<usize> = many.iter().map(Vec::len).collect();
        assert_eq!(lengths, [1024, 1024, 1]);
        assert_eq!(super::batches(vec![]).len(), 0);
    }
}
