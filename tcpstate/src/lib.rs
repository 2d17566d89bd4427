//! One TCP connection as a replicable state machine, on smoltcp.
