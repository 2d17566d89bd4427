//! Jute, the serialisation of ZooKeeper: big-endian integers, length-prefixed strings, buffers
//! and vectors, where the length -1 means null.

use bytes::{BufMut, Bytes, BytesMut};

use super::DecodeError;

/// Reads records from one frame. Every read is checked against what is left of it.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes the next `len` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] where fewer are left.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    /// A byte; any value but 0 is true, as in Java's `readBoolean`.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn bool(&mut self) -> Result<bool, DecodeError> {
        Ok(self.array::<1>()? != [0])
    }

    /// A 32-bit integer.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn int(&mut self) -> Result<i32, DecodeError> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    /// A 64-bit integer.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn long(&mut self) -> Result<i64, DecodeError> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    /// A length: `None` for the -1 of null.
    fn len(&mut self) -> Result<Option<usize>, DecodeError> {
        match self.int()? {
            -1 => Ok(None),
            len => usize::try_from(len)
                .map(Some)
                .map_err(|_| DecodeError::NegativeLength(len)),
        }
    }

    /// A buffer, `None` where it is null. The bytes are copied, so that a small value does not
    /// keep a large frame alive.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`], [`DecodeError::NegativeLength`].
    pub fn buffer(&mut self) -> Result<Option<Bytes>, DecodeError> {
        match self.len()? {
            None => Ok(None),
            Some(len) => Ok(Some(Bytes::copy_from_slice(self.take(len)?))),
        }
    }

    /// A string that must not be null.
    ///
    /// # Errors
    /// [`DecodeError::NullString`], [`DecodeError::NotUtf8`], and those of [`Self::buffer`].
    pub fn string(&mut self) -> Result<String, DecodeError> {
        let len = self.len()?.ok_or(DecodeError::NullString)?;
        let bytes = self.take(len)?;
        core::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| DecodeError::NotUtf8)
    }

    /// A string; null reads as empty, because kazoo writes the empty string as null.
    ///
    /// # Errors
    /// [`DecodeError::NotUtf8`], and those of [`Self::buffer`].
    pub fn string_or_empty(&mut self) -> Result<String, DecodeError> {
        self.optional_string().map(Option::unwrap_or_default)
    }

    /// A string, `None` where it is null.
    ///
    /// # Errors
    /// [`DecodeError::NotUtf8`], and those of [`Self::buffer`].
    pub fn optional_string(&mut self) -> Result<Option<String>, DecodeError> {
        match self.string() {
            Ok(string) => Ok(Some(string)),
            Err(DecodeError::NullString) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A vector, read element by element; null reads as empty. A count that lies costs nothing,
    /// because memory is taken as elements arrive.
    ///
    /// # Errors
    /// The element's.
    pub fn vector<T>(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.len()?.unwrap_or(0);
        // Every element of the protocol's vectors takes at least the 4 bytes of a length.
        if count > self.rest.len() / 4 {
            return Err(DecodeError::Truncated);
        }
        (0..count).map(|_| element(self)).collect()
    }

    /// A vector of strings; null reads as empty.
    ///
    /// # Errors
    /// Those of [`Self::string`].
    pub fn strings(&mut self) -> Result<Vec<String>, DecodeError> {
        self.vector(Self::string)
    }
}

/// Writes records into one frame.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    buf: BytesMut,
}

impl Writer {
    /// An empty writer without a length prefix.
    pub fn new() -> Self {
        Self::default()
    }

    /// A writer that leaves room for the length prefix which [`Self::finish_frame`] fills in.
    pub(super) fn frame(capacity: usize) -> Self {
        let mut buf = BytesMut::with_capacity(capacity + 4);
        buf.put_i32(0);
        Self { buf }
    }

    /// The bytes written.
    pub fn finish(self) -> Bytes {
        self.buf.freeze()
    }

    /// Fills in the length prefix of a writer made by [`Self::frame`].
    pub(super) fn finish_frame(mut self) -> Bytes {
        let prefix = length(self.buf.len() - 4).to_be_bytes();
        self.buf[..4].copy_from_slice(&prefix);
        self.buf.freeze()
    }

    /// A byte, 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.buf.put_u8(u8::from(value));
    }

    /// A 32-bit integer.
    pub fn int(&mut self, value: i32) {
        self.buf.put_i32(value);
    }

    /// A 64-bit integer.
    pub fn long(&mut self, value: i64) {
        self.buf.put_i64(value);
    }

    /// A buffer; `None` as length -1.
    ///
    /// # Panics
    /// Where it is longer than 2 GiB.
    pub fn buffer(&mut self, value: Option<&[u8]>) {
        match value {
            None => self.int(-1),
            Some(bytes) => {
                self.int(length(bytes.len()));
                self.buf.put_slice(bytes);
            }
        }
    }

    /// A string.
    ///
    /// # Panics
    /// Where it is longer than 2 GiB.
    pub fn string(&mut self, value: &str) {
        self.buffer(Some(value.as_bytes()));
    }

    /// A vector, written element by element.
    ///
    /// # Panics
    /// Where it has more than 2^31 - 1 elements.
    pub fn vector<T>(&mut self, values: &[T], mut element: impl FnMut(&mut Self, &T)) {
        self.int(length(values.len()));
        for value in values {
            element(self, value);
        }
    }

    /// A vector of strings.
    ///
    /// # Panics
    /// Where it has more than 2^31 - 1 elements.
    pub fn strings(&mut self, values: &[String]) {
        self.vector(values, |w, value| w.string(value));
    }
}

fn length(len: usize) -> i32 {
    i32::try_from(len).expect("what we encode is bounded far below 2 GiB")
}
