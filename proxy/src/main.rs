//! The `unbroken` program: arguments in, exit code out.
fn main() {}
