//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::bench_gap::BenchGapArgs;
use crate::bench_group::BenchGroupArgs;

/// Shows live TCP connections surviving the deaths of the servers that answer them
///
/// Makes a client host and some replica hosts (network namespaces on one switch; no root needed where
/// user namespaces are allowed), runs an `unbroken node` and copies of ordinary servers on each replica,
/// and unmodified clients against the virtual address. Then it kills the leader again and again, pulls
/// its cable, and reports what the clients noticed. Exit status: 0 PASS, 1 FAIL, 64 wrong usage.
#[derive(Debug, Parser)]
#[command(
    name = "unbroken-demo",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
      unbroken-demo                                   a download, an exchange and an upload; three kills, one cable\n  \
      unbroken-demo --faults 20 --seed 7              longer, and the same faults each time\n  \
      unbroken-demo --coordinator apache              the nodes agree by an Apache ZooKeeper ensemble\n  \
      unbroken-demo --keep                            stay up afterwards, and say how to talk to it\n  \
      unbroken-demo --server 'redis-server --port 6379' --port 6379 \\\n                \
                    --request 'PING\\r\\n' --response '+PONG\\r\\n'\n  \
      unbroken-demo --server 'socat TCP-LISTEN:7777,fork,reuseaddr EXEC:cat' --port 7777 --echo"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) drill: DrillArgs,
    #[command(subcommand)]
    pub(crate) part: Option<Part>,
}

/// What to show.
#[derive(Debug, Clone, Args)]
pub(crate) struct DrillArgs {
    /// How often the leader's machine is killed; one cable is pulled besides. 0: no fault at all
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub(crate) faults: u32,
    /// Replica hosts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=7))]
    pub(crate) replicas: u8,
    /// Who keeps the nodes' agreement
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = Coordinator::Builtin)]
    pub(crate) coordinator: Coordinator,
    /// Number that the moments of the faults follow from; a fresh one if not given
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
    /// Size of the download and of the upload, in millions of bytes
    #[arg(long, value_name = "MB", default_value_t = 220, value_parser = clap::value_parser!(u64).range(1..=900))]
    pub(crate) size: u64,
    /// Show this server instead: a shell command that each replica runs; it must listen on PORT
    #[arg(long, value_name = "COMMAND", requires = "port")]
    pub(crate) server: Option<String>,
    /// Port of the server, and of the virtual address
    #[arg(long, value_name = "PORT", requires = "server", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// Request sent each millisecond, with escapes \r \n \t \0 \\ \xHH
    #[arg(long, value_name = "BYTES", requires = "server", requires = "response", value_parser = unescape)]
    pub(crate) request: Option<Bytes>,
    /// What the server must answer to it
    #[arg(long, value_name = "BYTES", requires = "request", value_parser = unescape)]
    pub(crate) response: Option<Bytes>,
    /// Send numbered lines and expect each one back (the default with --server)
    #[arg(long, requires = "server", conflicts_with = "request")]
    pub(crate) echo: bool,
    /// Leave the cluster up afterwards, until Ctrl-C
    #[arg(long)]
    pub(crate) keep: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Folder of the picture, throughput.svg
    #[arg(long, value_name = "DIR", default_value = "demo-out")]
    pub(crate) out: PathBuf,
    /// Say more while it runs, and let the nodes log more
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// Who keeps the nodes' agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Coordinator {
    /// The nodes themselves
    Builtin,
    /// Three Apache ZooKeeper servers, on hosts of their own
    Apache,
}

/// Bytes given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

/// The parts that the demonstration starts on its hosts.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    BenchGroup(BenchGroupArgs),
    BenchGap(BenchGapArgs),
    /// Take part in the benchmark
    #[command(hide = true)]
    GroupMember {
        /// The host's name
        name: String,
    },
    /// Run one of the small servers
    #[command(subcommand, hide = true)]
    Serve(Serve),
    /// Run one of the small clients
    #[command(subcommand, hide = true)]
    Client(Client),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Serve {
    /// Files of a folder, over HTTP
    Files {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        root: PathBuf,
    },
    /// Chained answers
    Exchange {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Checksums of uploads
    Upload {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Bytes at a steady pace, or chained answers, on thousands of connections
    Pulses {
        #[arg(long)]
        listen: SocketAddr,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Client {
    /// HTTP GET to standard output
    Get {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        path: String,
    },
    /// One chained request a millisecond
    Exchange {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        seed: u64,
    },
    /// An upload whose checksum is compared
    Upload {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        bytes: u64,
        /// Bytes a second to begin with
        #[arg(long)]
        rate: u64,
    },
    /// The same request and the same answer, again and again
    Talk {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long, value_parser = unescape, allow_hyphen_values = true)]
        request: Bytes,
        #[arg(long, value_parser = unescape, allow_hyphen_values = true)]
        response: Bytes,
    },
    /// Numbered lines that must come back
    Echo {
        #[arg(long)]
        connect: SocketAddr,
    },
}

/// Reads escapes.
fn unescape(text: &str) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        bytes.push(match rest.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('0') => 0,
            Some('\\') => b'\\',
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                let whole = digits.len() == 2;
                let byte = u8::from_str_radix(&digits, 16).ok().filter(|_| whole);
                byte.ok_or(format!("\\x wants two hexadecimal digits, not {digits:?}"))?
            }
            Some(other) => {
                return Err(format!(
                    "\\{other} is no escape: \\r \\n \\t \\0 \\\\ \\xHH"
                ));
            }
            None => return Err("a backslash at the end".to_owned()),
        });
    }
    if bytes.is_empty() {
        return Err("at least one byte".to_owned());
    }
    Ok(Bytes(bytes))
}

/// Writes bytes so that [`unescape`] reads them again.
pub(crate) fn escape(bytes: &Bytes) -> String {
    bytes
        .0
        .iter()
        .map(|byte| format!("\\x{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn escapes_are_read_and_written() {
        let bytes = unescape(r"PING\r\n\x00\xff\\ü").unwrap();
        assert_eq!(bytes.0, b"PING\r\n\x00\xff\\\xc3\xbc");
        assert_eq!(unescape(&escape(&bytes)), Ok(bytes));
        for wrong in [r"\x1", r"\xzz", r"\q", "\\", ""] {
            assert!(unescape(wrong).is_err(), "{wrong:?}");
        }
    }
}
