//! A replicated dictionary: three nodes in this process, one of which dies and comes back.
//!
//! `cargo run -p unbroken-group --example dictionary`

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "an example"
)]

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::registry::MemoryRegistry;
use unbroken_group::tools::{Map, Replicated};

type Error = Box<dyn std::error::Error>;

async fn join(node: &Node) -> Result<Replicated<Map>, Error> {
    let (map, work) = Replicated::join(node, "dictionary").await?;
    tokio::spawn(work);
    map.until(|_| true).await?;
    Ok(map)
}

fn show(who: &str, map: &Replicated<Map>) {
    let words = map.read(|m| {
        m.iter()
            .map(|(k, v)| format!("{}: {}", k.escape_ascii(), v.escape_ascii()))
            .collect::<Vec<_>>()
            .join(", ")
    });
    println!("{who} has {}", words.unwrap_or_default());
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let free: Vec<TcpListener> = (0..3)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let mut members: BTreeMap<String, SocketAddr> = BTreeMap::new();
    for (i, listener) in free.iter().enumerate() {
        members.insert(format!("r{}", i + 1), listener.local_addr()?);
    }
    drop(free);
    let registry = MemoryRegistry::default();
    let start = |name: &str| {
        let config = NodeConfig::new(name, members.clone(), [7; 32]);
        Node::start(config, registry.clone())
    };
    let (one, two, three) = (start("r1")?, start("r2")?, start("r3")?);
    let (first, second) = (join(&one).await?, join(&two).await?);
    first.set("hund", "dog").await?;
    second.set("katze", "cat").await?;
    let third = join(&three).await?;
    show("r3, who has just joined,", &third);
    println!("r1 dies");
    drop((first, one));
    third.set("maus", "mouse").await?;
    second.until(|m| m.len() == 3).await?;
    show("r2", &second);
    for node in [two, three] {
        node.stop().await;
    }
    Ok(())
}
