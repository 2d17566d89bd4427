//! The one-command demonstration.
fn main() {}
