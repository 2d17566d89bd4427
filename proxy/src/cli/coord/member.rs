//! `unbroken coord member`: who the servers are, and how that is changed.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use unbroken_coord::client::{Client, ClientError, ConnectOptions, Identity, Reconfig};
use unbroken_coord::driver;
use unbroken_coord::members::{Listed, listed};
use unbroken_coord::tree::CONFIG_PATH;
use unbroken_coord::wire::ErrorCode;

use crate::config::CoordinatorConfig;

/// Between two looks at a server that is joining, and two attempts at what cannot be done just now.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Shows who the servers of the ensemble are, adds one, or removes one
///
/// A server that is added is sent everything first, and votes when it has caught up. A removed
/// server stops by itself. One whose data directory was lost is removed, and added again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken coord member list --server 10.98.0.11:2181\n  \
    unbroken coord member add -c /etc/unbroken/coord.toml c4 --peer 10.98.0.14:2888\n  \
    unbroken coord member remove -c /etc/unbroken/coord.toml c2\n\
    \n\
    The new server's own configuration names the others and itself in coord.peers, with\n\
    join = true; it may be started before or after it is added.")]
pub(super) struct MemberArgs {
    /// Servers to ask, the preferred one first [default: those of the configuration, or 127.0.0.1:2181]
    #[arg(
        long,
        global = true,
        env = "UNBROKEN_ZK_SERVER",
        value_name = "HOST:PORT,.."
    )]
    server: Option<ConnectOptions>,
    /// Configuration of a server of the ensemble: its key proves who asks
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Credentials of the super user, in the key's place
    #[arg(
        long,
        global = true,
        env = "UNBROKEN_SUPER_AUTH",
        hide_env_values = true,
        value_name = "USER:PASSWORD"
    )]
    auth: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Give up after so many seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(Debug, Subcommand)]
enum MemberCommand {
    /// Shows the servers, and what each says of itself
    #[command(after_help = "Example:\n  unbroken coord member list --json")]
    List,
    /// Adds a server and waits until it has caught up and votes
    #[command(
        after_help = "Example:\n  unbroken coord member add -c coord.toml c4 --peer 10.98.0.14:2888"
    )]
    Add {
        /// Its name, as its own configuration calls it
        name: String,
        /// Where it listens for the other servers
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        /// Where it listens for clients; it tells so itself when it runs
        #[arg(long, value_name = "HOST:PORT")]
        client: Option<String>,
        /// It serves clients and never votes
        #[arg(long)]
        observer: bool,
        /// Do not wait until it votes
        #[arg(long)]
        no_wait: bool,
    },
    /// Removes a server, which stops then
    #[command(after_help = "Example:\n  unbroken coord member remove -c coord.toml c2")]
    Remove {
        /// Its name, or its number
        name: String,
    },
}

pub(super) fn run(args: &MemberArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the client")?;
    runtime.block_on(async {
        let limit = Duration::from_secs(args.timeout);
        let done = tokio::time::timeout(limit, connect_and_execute(args)).await;
        done.with_context(|| format!("not done after {} s", args.timeout))?
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn connect_and_execute(args: &MemberArgs) -> anyhow::Result<()> {
    let config = args
        .config
        .as_ref()
        .map(|file| CoordinatorConfig::load(file));
    let config = config.transpose()?;
    let mut options = match (&args.server, &config) {
        (Some(server), _) => server.clone(),
        (None, Some(config)) => {
            let mut own = config.coord.client;
            if own.ip().is_unspecified() {
                own.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
            }
            ConnectOptions::new([own.to_string()])
        }
        (None, None) => ConnectOptions::new(["127.0.0.1:2181".to_owned()]),
    };
    options = options.request_timeout(Some(Duration::from_secs(args.timeout)));
    match (&args.auth, &config) {
        (Some(auth), _) => {
            let (user, password) = auth.split_once(':').context("--auth is USER:PASSWORD")?;
            options.identities.push(Identity::digest(user, password));
        }
        (None, Some(config)) => {
            let (user, password) = driver::operator_credentials(config.node.key.bytes());
            options.identities.push(Identity::digest(&user, &password));
        }
        (None, None) => {}
    }
    let servers = options.hosts.join(",");
    let client = Client::connect(options);
    let client = client.await.with_context(|| servers.clone())?;
    let result = execute(args, &client).await;
    let _ = client.close().await;
    result.with_context(|| servers)
}

async fn execute(args: &MemberArgs, client: &Client) -> anyhow::Result<()> {
    let before = members(client).await?;
    match &args.command {
        MemberCommand::List => {}
        MemberCommand::Add {
            name,
            peer,
            client: clients,
            observer,
            no_wait,
        } => {
            if before
                .iter()
                .any(|member| member.name == *name && member.role == "participant")
            {
                bail!("{name} is a member already; to replace it, remove it first");
            }
            let role = if *observer { "observer" } else { "participant" };
            let port = peer.rsplit(':').next().unwrap_or_default();
            let clients = clients
                .as_ref()
                .map_or(String::new(), |at| format!(";{at}"));
            let joining = vec![format!("server.{name}={peer}:{port}:{role}{clients}")];
            let change = Reconfig::Change {
                joining,
                leaving: Vec::new(),
            };
            let there = |now: &[Listed]| now.iter().any(|member| member.name == *name);
            reconfigure(client, &change, there).await?;
            if !observer && !no_wait {
                wait_for_vote(client, name).await?;
            }
        }
        MemberCommand::Remove { name } => {
            let number =
                |member: &&Listed| member.name == *name || member.number.to_string() == *name;
            let Some(member) = before.iter().find(number) else {
                let names: Vec<&str> = before.iter().map(|member| &*member.name).collect();
                bail!("{name} is no member; members are {}", names.join(", "));
            };
            let change = Reconfig::Change {
                joining: Vec::new(),
                leaving: vec![member.name.clone()],
            };
            let gone = |now: &[Listed]| now.iter().all(|other| other.number != member.number);
            reconfigure(client, &change, gone).await?;
        }
    }
    show(args, &members(client).await?).await
}

async fn members(client: &Client) -> anyhow::Result<Vec<Listed>> {
    client.sync(CONFIG_PATH).await?;
    let (text, _) = client.get(CONFIG_PATH).await?;
    Ok(listed(&String::from_utf8_lossy(&text)).1)
}

/// Makes the change, unless it `is` made: an answer that was lost on the way leaves that open.
async fn reconfigure(
    client: &Client,
    change: &Reconfig,
    is: impl Fn(&[Listed]) -> bool,
) -> anyhow::Result<()> {
    loop {
        let error = match client.reconfig(change, -1).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        match error {
            ClientError::Zk(ErrorCode::ReconfigInProgress) => {
                bail!("another server is joining: wait until it votes, or remove it first");
            }
            ClientError::Zk(ErrorCode::NewConfigNoQuorum) => {
                bail!("refused: too few of the servers that would be left are running");
            }
            ClientError::Zk(ErrorCode::NoAuth) => {
                bail!(
                    "not allowed: -c FILE proves it with the ensemble's key, --auth as the super user"
                );
            }
            ClientError::Zk(ErrorCode::ReconfigDisabled) => {
                bail!("switched off by coord.reconfig = false in the servers' configurations");
            }
            ClientError::Zk(ErrorCode::BadArguments) => {
                bail!(
                    "refused: the address is no HOST:PORT or another server's, or it would cost the \
                     ensemble its last voter"
                );
            }
            ClientError::Zk(_) => return Err(error.into()),
            // The connection was lost: perhaps it was to the one that is removed.
            _ => {
                tokio::time::sleep(LOOK_AGAIN).await;
                if is(&members(client).await?) {
                    return Ok(());
                }
            }
        }
    }
}

async fn wait_for_vote(client: &Client, name: &str) -> anyhow::Result<()> {
    let mut said = String::new();
    loop {
        let now = members(client).await?;
        let Some(member) = now.iter().find(|member| member.name == name) else {
            bail!("{name} was removed meanwhile");
        };
        if member.role == "participant" {
            eprintln!("{name} has caught up and votes");
            return Ok(());
        }
        let zxid = client
            .exists(CONFIG_PATH)
            .await?
            .map_or(0, |stat| stat.mzxid);
        let progress = match srvr(&member.client).await {
            Some((_, at)) if at >= zxid.cast_unsigned() => "catching up".to_owned(),
            Some((_, at)) => format!("at zxid 0x{at:x}, joined at 0x{zxid:x}"),
            None => "not running yet, or it does not reach the others".to_owned(),
        };
        if progress != said {
            eprintln!("{name}: {progress}");
            said = progress;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn show(args: &MemberArgs, members: &[Listed]) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for member in members {
        rows.push((member, srvr(&member.client).await));
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(member, state)| {
                json!({
                    "name": member.name, "number": member.number, "role": member.role,
                    "joining": member.joining, "peer": member.peer, "client": member.client,
                    "state": state.as_ref().map(|(mode, _)| mode),
                    "zxid": state.as_ref().map(|(_, zxid)| zxid),
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:<12} {:<12} {:<10} {:<12} {:<24} CLIENTS",
        "NAME", "ROLE", "STATE", "ZXID", "PEERS"
    )?;
    for (member, state) in rows {
        let role = if member.joining {
            "joining"
        } else {
            &member.role
        };
        let (mode, zxid) = match &state {
            Some((mode, zxid)) => (mode.as_str(), format!("0x{zxid:x}")),
            None => ("unreached", "-".to_owned()),
        };
        let (name, peer, client) = (&member.name, &member.peer, &member.client);
        writeln!(
            out,
            "{name:<12} {role:<12} {mode:<10} {zxid:<12} {peer:<24} {client}"
        )?;
    }
    Ok(())
}

/// What a server says of itself: its mode, and its last transaction. Nothing if it does not answer soon.
async fn srvr(address: &str) -> Option<(String, u64)> {
    let ask = async {
        let address = match address.parse::<SocketAddr>() {
            Ok(at) if at.ip().is_unspecified() => format!("127.0.0.1:{}", at.port()),
            _ => address.to_owned(),
        };
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.write_all(b"srvr").await.ok()?;
        let mut text = String::new();
        stream.take(4096).read_to_string(&mut text).await.ok()?;
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let zxid = value("Zxid: 0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
        Some((value("Mode: ")?.to_owned(), zxid?))
    };
    tokio::time::timeout(Duration::from_secs(1), ask)
        .await
        .ok()?
}
