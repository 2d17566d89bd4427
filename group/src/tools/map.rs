//! A replicated map: keys and values are bytes.

use super::{Machine, Replicated, UpdateError};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The map as each member has it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Map(BTreeMap<Bytes, Bytes>);

#[derive(Serialize, Deserialize)]
enum Update {
    Set(Bytes, Bytes),
    Remove(Bytes),
    /// Set to the second if the value is the first.
    Replace(Bytes, Option<Bytes>, Bytes),
}

impl Map {
    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&Bytes> {
        self.0.get(key)
    }

    /// Keys and values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, &Bytes)> {
        self.0.iter()
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Machine for Map {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        let old = match postcard::from_bytes(update) {
            Ok(Update::Set(key, value)) => self.0.insert(key, value),
            Ok(Update::Remove(key)) => self.0.remove(&key),
            Ok(Update::Replace(key, expected, value)) => {
                let old = self.0.get(&key).cloned();
                if old == expected {
                    self.0.insert(key, value);
                }
                old
            }
            Err(_) => None,
        };
        Bytes::from(postcard::to_stdvec(&old).expect("bytes can be serialised"))
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let bytes = postcard::to_stdvec(&self.0).expect("bytes can be serialised");
        vec![Bytes::from(bytes)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        postcard::from_bytes(bytes).ok().map(Self)
    }
}

impl Replicated<Map> {
    async fn change(&self, update: &Update) -> Result<Option<Bytes>, UpdateError> {
        let update = postcard::to_stdvec(update).expect("bytes can be serialised");
        let old = self.update(&update).await?;
        Ok(postcard::from_bytes(&old).unwrap_or(None))
    }

    /// The value of a key, as this member has it.
    pub fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.read(|map| map.get(key).cloned())?
    }

    /// Sets a key; gives its old value.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn set(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<Option<Bytes>, UpdateError> {
        self.change(&Update::Set(key.into(), value.into())).await
    }

    /// Removes a key; gives its old value.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn remove(&self, key: impl Into<Bytes>) -> Result<Option<Bytes>, UpdateError> {
        self.change(&Update::Remove(key.into())).await
    }

    /// Sets a key if its value is `expected`; gives the value that it had.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn replace(
        &self,
        key: impl Into<Bytes>,
        expected: Option<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<Option<Bytes>, UpdateError> {
        let update = Update::Replace(key.into(), expected, value.into());
        self.change(&update).await
    }
}
