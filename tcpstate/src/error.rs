//! What can go wrong, by operation. Peers cannot cause any of it: their faults are counted.

/// An event or image could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// It ends too early.
    #[error("truncated")]
    Truncated,
    /// A version that this program does not speak.
    #[error("version {0} is not known")]
    Version(u8),
    /// It is not what it says it is.
    #[error("malformed")]
    Malformed,
}
