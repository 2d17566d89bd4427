//! What configurations are made of.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::string::FromUtf8Error;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why data is no value of the type. It prints what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadValue(Arc<str>);

impl BadValue {
    /// For this reason.
    pub fn new(why: impl fmt::Display) -> Self {
        Self(why.to_string().into())
    }
}

impl fmt::Display for BadValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for BadValue {}

impl From<FromUtf8Error> for BadValue {
    fn from(error: FromUtf8Error) -> Self {
        Self::new(error)
    }
}

impl From<Infallible> for BadValue {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// A type that can stand in a znode.
pub trait Value: Sized + Send + Sync + 'static {
    /// Reads it.
    ///
    /// # Errors
    /// [`BadValue`].
    fn from_bytes(data: &Bytes) -> Result<Self, BadValue>;

    /// Writes it.
    fn to_bytes(&self) -> Bytes;
}

impl Value for Bytes {
    fn from_bytes(data: &Bytes) -> Result<Self, BadValue> {
        Ok(data.clone())
    }

    fn to_bytes(&self) -> Bytes {
        self.clone()
    }
}

impl Value for String {
    fn from_bytes(data: &Bytes) -> Result<Self, BadValue> {
        Ok(Self::from_utf8(data.to_vec())?)
    }

    fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self.as_bytes())
    }
}

/// A value that stands in its znode as JSON, so that people can read and write it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Json<T>(pub T);

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Value for Json<T> {
    fn from_bytes(data: &Bytes) -> Result<Self, BadValue> {
        serde_json::from_slice(data)
            .map(Json)
            .map_err(BadValue::new)
    }

    /// # Panics
    /// Where the type has no form in JSON: maps whose keys are neither strings nor numbers, or an
    /// implementation of [`Serialize`] that fails.
    fn to_bytes(&self) -> Bytes {
        let text = serde_json::to_vec_pretty(&self.0);
        text.expect("the type has a form in JSON").into()
    }
}

/// A type that can stand in a directory of znodes, an entry in each.
pub trait Entries: Sized + Send + Sync + 'static {
    /// Reads it.
    ///
    /// # Errors
    /// [`BadValue`]; it should name the entry.
    fn from_entries(entries: &BTreeMap<String, Bytes>) -> Result<Self, BadValue>;

    /// Writes it. The keys are names of znodes: neither empty nor `.` or `..`, and without slash.
    fn to_entries(&self) -> BTreeMap<String, Bytes>;
}

impl<T: Value> Entries for BTreeMap<String, T> {
    fn from_entries(entries: &BTreeMap<String, Bytes>) -> Result<Self, BadValue> {
        let read = |(key, data): (&String, &Bytes)| match T::from_bytes(data) {
            Ok(value) => Ok((key.clone(), value)),
            Err(why) => Err(BadValue::new(format_args!("{key}: {why}"))),
        };
        entries.iter().map(read).collect()
    }

    fn to_entries(&self) -> BTreeMap<String, Bytes> {
        self.iter()
            .map(|(key, value)| (key.clone(), value.to_bytes()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_there_and_back() {
        let json = Json(vec![1, 2]);
        assert_eq!(Json::from_bytes(&json.to_bytes()), Ok(json));
        let bad = Json::<Vec<u32>>::from_bytes(&"[1, x]".into()).unwrap_err();
        assert!(bad.to_string().contains("column 5"), "{bad}");
        assert_eq!(String::from_bytes(&"x".into()), Ok("x".to_owned()));
        assert!(String::from_bytes(&Bytes::from_static(&[0xff])).is_err());
        let map: BTreeMap<String, String> = [("k".into(), "v".into())].into();
        assert_eq!(BTreeMap::from_entries(&map.to_entries()), Ok(map));
        let bad = [("k".to_owned(), Bytes::from_static(&[0xff]))].into();
        let bad = BTreeMap::<String, String>::from_entries(&bad).unwrap_err();
        assert!(bad.to_string().starts_with("k: "), "{bad}");
    }
}
