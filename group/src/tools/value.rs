//! One replicated value: bytes, and how often they were changed.

use super::{Machine, Replicated, UpdateError};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The value as each member has it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Value {
    bytes: Bytes,
    version: u64,
}

#[derive(Serialize, Deserialize)]
enum Update {
    Set(Bytes),
    /// Set if the version is this one.
    Replace(u64, Bytes),
}

impl Value {
    /// The bytes; empty before the first change.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Counts the changes: 0 before the first.
    pub fn version(&self) -> u64 {
        self.version
    }
}

impl Machine for Value {
    fn apply(&mut self, _: &MemberId, update: &Bytes) -> Bytes {
        let value = match postcard::from_bytes(update) {
            Ok(Update::Set(value)) => Some(value),
            Ok(Update::Replace(version, value)) => (version == self.version).then_some(value),
            Err(_) => None,
        };
        let set = value.is_some();
        if let Some(value) = value {
            self.bytes = value;
            self.version += 1;
        }
        let answer = (set, self.version);
        Bytes::from(postcard::to_stdvec(&answer).expect("numbers can be serialised"))
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let bytes = postcard::to_stdvec(self).expect("bytes can be serialised");
        vec![Bytes::from(bytes)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

impl Replicated<Value> {
    async fn change(&self, update: &Update) -> Result<(bool, u64), UpdateError> {
        let update = postcard::to_stdvec(update).expect("bytes can be serialised");
        let answer = self.update(&update).await?;
        Ok(postcard::from_bytes(&answer).unwrap_or_default())
    }

    /// The value and its version, as this member has them; `None`: the state has not come yet.
    pub fn value(&self) -> Option<(Bytes, u64)> {
        self.read(|v| (v.bytes.clone(), v.version))
    }

    /// Sets the value; gives its version.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn put(&self, value: impl Into<Bytes>) -> Result<u64, UpdateError> {
        let (_, version) = self.change(&Update::Set(value.into())).await?;
        Ok(version)
    }

    /// Sets the value if its version is this one; gives the version that it then has, or has had instead as an `Err`.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn put_if(
        &self,
        version: u64,
        value: impl Into<Bytes>,
    ) -> Result<Result<u64, u64>, UpdateError> {
        let (set, version) = self.change(&Update::Replace(version, value.into())).await?;
        Ok(if set { Ok(version) } else { Err(version) })
    }

    /// Waits for a value that is newer than this version, and gives it and its version. Of several at once, the last.
    ///
    /// # Errors
    /// [`UpdateError::Out`].
    pub async fn newer_than(&self, version: u64) -> Result<(Bytes, u64), UpdateError> {
        let newer = |v: &Value| (v.version > version).then(|| (v.bytes.clone(), v.version));
        self.when(newer).await
    }
}
