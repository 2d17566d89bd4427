//! The control connections, as the driver's real ones behave: dial, be refused or answered, learn of the end.

/// One member's connection to another.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Connection {
    /// The incarnation that answered.
    pub(super) up: Option<u128>,
    /// Attempts that are older are void.
    pub(super) attempt: u64,
}
