//! Three servers in one process, to try clients on: `cargo run -p unbroken-coord --example three`.
//!
//! They listen for clients on ports 21811, 21812 and 21813 and keep their logs in the directory
//! given as the argument, or in a new one that is left behind. Ctrl-C ends them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use unbroken_coord::driver::{self, ServerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = match std::env::args_os().nth(1) {
        Some(dir) => dir.into(),
        None => std::env::temp_dir().join(format!("unbroken-coord-three-{}", std::process::id())),
    };
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let peers: BTreeMap<String, SocketAddr> = [("a", 28811), ("b", 28812), ("c", 28813)]
        .map(|(name, port)| (name.into(), at(port)))
        .into();
    let mut servers = Vec::new();
    for (name, client_port) in [("a", 21811), ("b", 21812), ("c", 21813)] {
        let config = ServerConfig::new(
            name,
            at(client_port),
            peers.clone(),
            dir.join(name),
            [1; 32],
        );
        servers.push(driver::start(config).await?);
    }
    println!("127.0.0.1:21811,127.0.0.1:21812,127.0.0.1:21813");
    println!("logs in {}", dir.display());
    tokio::signal::ctrl_c().await?;
    for server in servers {
        server.shutdown().await;
    }
    Ok(())
}
