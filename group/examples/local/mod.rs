//! Several nodes of this process on loopback, as the examples use them.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example")]

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::process::exit;
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::registry::MemoryRegistry;

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Names and addresses of the nodes, and where they agree.
pub(crate) struct Local {
    members: BTreeMap<String, SocketAddr>,
    registry: MemoryRegistry,
}

impl Local {
    #[expect(clippy::disallowed_methods, reason = "asks for free ports")]
    pub(crate) fn new(names: &[String]) -> Result<Self, Error> {
        // All held until each has its own.
        let free = names.iter().map(|_| TcpListener::bind("127.0.0.1:0"));
        let free: Vec<TcpListener> = free.collect::<Result<_, _>>()?;
        let mut members = BTreeMap::new();
        for (name, listener) in names.iter().zip(&free) {
            members.insert(name.clone(), listener.local_addr()?);
        }
        Ok(Self {
            members,
            registry: MemoryRegistry::default(),
        })
    }

    pub(crate) fn start(&self, name: &str) -> Result<Node, Error> {
        let config = NodeConfig::new(name, self.members.clone(), [7; 32]);
        Ok(Node::start(config, self.registry.clone())?)
    }
}

/// The argument `--NAME NUMBER`, or its default. `--help` prints the help and ends the program, what is wrong does so with 64.
pub(crate) fn argument(help: &str, name: &str, default: usize, least: usize) -> usize {
    let mut value = default;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--help" || argument == "-h" {
            println!("{help}");
            exit(0);
        }
        let given = arguments.next().unwrap_or_default();
        match given.parse() {
            Ok(number) if argument == name && (least..=100).contains(&number) => value = number,
            _ if argument == name => {
                eprintln!("{name} {given}: a number from {least} to 100 was expected");
                exit(64);
            }
            _ => {
                eprintln!("{argument}: no such argument; --help says which there are");
                exit(64);
            }
        }
    }
    value
}
