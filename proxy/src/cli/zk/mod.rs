//! `unbroken zk`: the coordinator's znodes, or any ZooKeeper's, by hand.

mod acl;
mod transfer;
mod tree;
mod watch;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal as _, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use unbroken_coord::client::{
    Client, ClientError, ConnectOptions, Identity, NewNode, SessionState,
};
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode, REQUEST_BYTES_MAX, Stat, parent};

use self::transfer::Existing;
use self::tree::{create_parents, delete_below};
use self::watch::Watched;
use super::EXIT_USAGE;

/// Reads and changes the coordinator's znodes, or those of any ZooKeeper ensemble
///
/// A read asks the server for all that was committed before (sync), so that it is never stale on
/// our own coordinator.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken zk ls /\n  \
    unbroken zk --server 10.98.0.11:2181,10.98.0.12:2181 get /unbroken\n  \
    unbroken zk create --parents /app/config 'answer=42'\n  \
    unbroken zk --json stat /app/config\n  \
    unbroken zk watch /app/config --count 1\n  \
    unbroken zk export /app > app.tree; unbroken zk import --to /copy app.tree\n\
    \n\
    Exit codes: 0 done, 1 failed (no such znode, wrong version, no server), 64 wrong usage.")]
pub struct ZkArgs {
    /// Servers, the preferred one first, and an optional chroot
    #[arg(
        long,
        global = true,
        env = "UNBROKEN_ZK_SERVER",
        value_name = "HOST:PORT,..[/CHROOT]",
        default_value = "127.0.0.1:2181"
    )]
    server: ConnectOptions,
    /// Who asks; may be repeated
    #[arg(
        long,
        global = true,
        env = "UNBROKEN_ZK_AUTH",
        hide_env_values = true,
        value_name = "SCHEME:AUTH",
        value_parser = acl::parse_identity
    )]
    auth: Vec<Identity>,
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    json: bool,
    /// Give up after so many seconds without an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    timeout: Duration,
    #[command(subcommand)]
    command: ZkCommand,
}

#[derive(Debug, Subcommand)]
enum ZkCommand {
    /// Lists the children of a znode, sorted
    #[command(after_help = "Examples:\n  \
        unbroken zk ls /\n  \
        unbroken zk ls -R /app | grep config")]
    Ls {
        /// The znode
        #[arg(default_value = "/")]
        path: String,
        /// List the znode and everything below it, by full paths
        #[arg(long, short = 'R')]
        recursive: bool,
        /// Print full paths, not names
        #[arg(long, short)]
        full: bool,
    },
    /// Lists paths that begin with what was typed, one a line, for a shell's completion
    ///
    /// A slash follows those that have children.
    #[command(after_help = "Example, for bash:\n  \
        _zk() { mapfile -t COMPREPLY < <(unbroken zk complete \"${COMP_WORDS[COMP_CWORD]}\"); }\n  \
        complete -o nospace -F _zk zk-get    # where zk-get is an alias of yours for unbroken zk get")]
    Complete {
        /// The beginning of a path
        #[arg(default_value = "")]
        typed: String,
    },
    /// Writes a znode and everything below it as text, one JSON object a line
    ///
    /// Znodes that a session owns are left out. They are read one after the other: what changes
    /// meanwhile may be there or not.
    #[command(after_help = "Example:\n  unbroken zk export /app --output app.tree")]
    Export {
        /// The znode
        #[arg(default_value = "/")]
        path: String,
        /// Write to this file, which appears when it is whole
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Creates the znodes that an export holds
    ///
    /// The file is checked as a whole before anything is changed. Then it is written in
    /// transactions of some hundred znodes each.
    #[command(after_help = "Examples:\n  \
        unbroken zk import app.tree\n  \
        unbroken zk export /app | unbroken zk --server other:2181 import --existing overwrite -")]
    Import {
        /// The file; - takes it from standard input
        file: PathBuf,
        /// Put the tree here, not where it was
        #[arg(long, value_name = "PATH")]
        to: Option<String>,
        /// What to do about a znode that is there already
        #[arg(long, value_enum, default_value_t = Existing::Fail)]
        existing: Existing,
    },
    /// Prints the data of a znode, as it is
    #[command(after_help = "Example:\n  unbroken zk get /app/config > config")]
    Get {
        /// The znode
        path: String,
    },
    /// Sets the data of a znode
    #[command(after_help = "Examples:\n  \
        unbroken zk set /app/config 'answer=43' --version 7\n  \
        unbroken zk set /app/config - < config")]
    Set {
        /// The znode
        path: String,
        /// The new data; - takes it from standard input
        data: String,
        /// Only if the znode has this version
        #[arg(long, value_name = "N", default_value_t = -1, hide_default_value = true)]
        version: i32,
    },
    /// Creates a znode and prints its path
    #[command(after_help = "Examples:\n  \
        unbroken zk create --parents /app/config 'answer=42'\n  \
        unbroken zk create --sequential /app/job- < /dev/null -\n  \
        unbroken zk create --ephemeral /app/here        until interrupted")]
    Create {
        /// The znode
        path: String,
        /// Its data; - takes it from standard input
        #[arg(default_value = "", hide_default_value = true)]
        data: String,
        /// Delete it when this command ends, which it does when interrupted
        #[arg(long, short, conflicts_with = "container")]
        ephemeral: bool,
        /// Append a counter to the name
        #[arg(long, short, conflicts_with = "container")]
        sequential: bool,
        /// Delete it some time after its last child
        #[arg(long)]
        container: bool,
        /// Create what is missing above it, too
        #[arg(long, short)]
        parents: bool,
        /// Who may do what with it; may be repeated. Everybody everything if there is none
        #[arg(long, value_name = "SCHEME:ID:PERMS", value_parser = acl::parse)]
        acl: Vec<Acl>,
    },
    /// Prints who may do what with a znode, or says it anew
    ///
    /// Permissions are letters: create and delete children, read, write, administer this list.
    #[command(after_help = "Examples:\n  \
        unbroken zk acl /app\n  \
        unbroken zk --auth digest:joe:secret acl /app auth::cdrwa world:anyone:r")]
    Acl {
        /// The znode
        path: String,
        /// The whole new list
        #[arg(value_name = "SCHEME:ID:PERMS", value_parser = acl::parse)]
        entries: Vec<Acl>,
        /// Only if the list has this version (aversion)
        #[arg(long, value_name = "N", default_value_t = -1, hide_default_value = true)]
        version: i32,
    },
    /// Deletes a znode
    #[command(after_help = "Example:\n  unbroken zk delete --recursive /app")]
    Delete {
        /// The znode
        path: String,
        /// Only if the znode has this version
        #[arg(long, value_name = "N", default_value_t = -1, hide_default_value = true)]
        version: i32,
        /// Delete everything below it first
        #[arg(long, short, conflicts_with = "version")]
        recursive: bool,
    },
    /// Prints the metadata of a znode
    #[command(after_help = "Example:\n  unbroken zk --json stat /app/config")]
    Stat {
        /// The znode
        path: String,
    },
    /// Prints a line whenever a znode is created, changed or deleted
    ///
    /// Of several changes in quick succession some may be told as one.
    #[command(after_help = "Examples:\n  \
        unbroken zk watch /app/config\n  \
        unbroken zk watch --children /app --count 1\n  \
        unbroken zk --json watch --recursive /app")]
    Watch {
        /// The znode
        path: String,
        /// Watch its children come and go instead; it must exist
        #[arg(long)]
        children: bool,
        /// Watch everything below it, too; every event is told by itself
        #[arg(long, short = 'R', conflicts_with = "children")]
        recursive: bool,
        /// End after so many events
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
}

/// What went wrong, and where.
#[derive(Debug)]
struct Failure {
    subject: String,
    error: ClientError,
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.error)
    }
}

/// Says what an error is about.
fn at(subject: &str) -> impl FnOnce(ClientError) -> Failure + use<> {
    let subject = subject.to_owned();
    move |error| Failure { subject, error }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

pub(super) fn run(args: &ZkArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(connect_and_execute(args, &mut io::stdout().lock()));
    let Err(error) = result else {
        return Ok(ExitCode::SUCCESS);
    };
    match error.downcast_ref::<Failure>() {
        Some(failure) if matches!(failure.error, ClientError::BadPath(_)) => {
            eprintln!("unbroken: error: {failure}");
            Ok(ExitCode::from(EXIT_USAGE))
        }
        _ => match error.downcast_ref::<io::Error>() {
            // As any filter does when its reader has gone, `unbroken zk ls / | head -1`.
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            _ => Err(error),
        },
    }
}

async fn connect_and_execute(args: &ZkArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let mut options = args.server.clone().request_timeout(Some(args.timeout));
    options.identities.extend(args.auth.iter().cloned());
    let servers = options.hosts.join(",");
    let client = Client::connect(options).await.map_err(at(&servers))?;
    let result = execute(&client, &args.command, args.json, out).await;
    // An ephemeral znode must not outlive the command by a session timeout. What went wrong
    // before weighs more than a session that cannot be closed.
    let closed = client.close().await;
    result?;
    closed.map_err(at(&servers))?;
    Ok(())
}

async fn execute(
    client: &Client,
    command: &ZkCommand,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    match command {
        ZkCommand::Ls {
            path,
            recursive,
            full,
        } => tree::list(client, path, *recursive, *full, json, out).await?,
        ZkCommand::Complete { typed } => tree::complete(client, typed, out).await?,
        ZkCommand::Export { path, output } => export(client, path, output.as_deref(), out).await?,
        ZkCommand::Import { file, to, existing } => {
            let reader = open(file)?;
            let imported = transfer::import(client, reader, to.as_deref(), *existing)
                .await
                .with_context(|| file.display().to_string())?;
            imported.write(json, out)?;
        }
        ZkCommand::Get { path } => {
            let (data, stat) = client.sync_and_get(path).await.map_err(at(path))?;
            if json {
                let mut line = json!({ "path": path, "stat": stat });
                match std::str::from_utf8(&data) {
                    Ok(text) => line["data"] = text.into(),
                    Err(_) => line["data_hex"] = hex(&data).into(),
                }
                writeln!(out, "{line}")?;
            } else {
                out.write_all(&data)?;
                if io::stdout().is_terminal() && !data.ends_with(b"\n") {
                    writeln!(out)?;
                }
            }
        }
        ZkCommand::Set {
            path,
            data,
            version,
        } => {
            let stat = client
                .set(path, input(data)?, *version)
                .await
                .map_err(at(path))?;
            if json {
                writeln!(out, "{}", json!({ "path": path, "stat": stat }))?;
            }
        }
        ZkCommand::Create {
            path,
            data,
            ephemeral,
            sequential,
            container,
            parents,
            acl,
        } => {
            let mode = match (*container, *ephemeral, *sequential) {
                (true, _, _) => CreateMode::Container,
                (false, false, false) => CreateMode::Persistent,
                (false, true, false) => CreateMode::Ephemeral,
                (false, false, true) => CreateMode::PersistentSequential,
                (false, true, true) => CreateMode::EphemeralSequential,
            };
            if *parents {
                create_parents(client, path).await?;
            }
            let mut node = NewNode::new(mode).data(input(data)?);
            if !acl.is_empty() {
                node = node.acl(acl.clone());
            }
            let created = match client.create_node(path, node).await.map(|(path, _)| path) {
                Err(ClientError::Zk(ErrorCode::NoNode)) => {
                    let above = parent(path).map_or("/", |(above, _)| above);
                    anyhow::bail!("{path}: its parent {above} does not exist (try --parents)");
                }
                created => created.map_err(at(path))?,
            };
            if json {
                writeln!(out, "{}", json!({ "path": created }))?;
            } else {
                writeln!(out, "{created}")?;
            }
            out.flush()?;
            if *ephemeral {
                hold(client).await?;
            }
        }
        ZkCommand::Acl {
            path,
            entries,
            version,
        } => acl::acl(client, path, entries, *version, json, out).await?,
        ZkCommand::Delete {
            path,
            version,
            recursive,
        } => {
            if *recursive {
                delete_below(client, path).await?;
            }
            client.delete(path, *version).await.map_err(at(path))?;
            if json {
                writeln!(out, "{}", json!({ "path": path }))?;
            }
        }
        ZkCommand::Stat { path } => {
            client.sync(path).await.map_err(at(path))?;
            let missing = ClientError::Zk(ErrorCode::NoNode);
            let stat = client
                .exists(path)
                .await
                .and_then(|stat| stat.ok_or(missing));
            let stat = stat.map_err(at(path))?;
            if json {
                writeln!(out, "{}", json!({ "path": path, "stat": stat }))?;
            } else {
                write_stat(&stat, out)?;
            }
        }
        ZkCommand::Watch {
            path,
            children,
            recursive,
            count,
        } => {
            let watched = match (*recursive, *children) {
                (true, _) => Watched::Tree,
                (false, true) => Watched::Children,
                (false, false) => Watched::Znode,
            };
            let count = count.unwrap_or(u64::MAX);
            watch::watch(client, path, watched, count, json, out).await?;
        }
    }
    Ok(())
}

/// Waits until the user interrupts, or the session is gone.
async fn hold(client: &Client) -> anyhow::Result<()> {
    let mut state = client.state();
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        ended = state.wait_for(|state| *state == SessionState::Expired) => {
            drop(ended);
            return Err(at("session")(ClientError::SessionExpired).into());
        }
    }
    Ok(())
}

/// To standard output, or to a file that appears when it is whole.
async fn export(
    client: &Client,
    path: &str,
    output: Option<&Path>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let (written, ephemeral) = match output {
        None => transfer::export(client, path, out).await?,
        Some(file) => {
            let mut name = file.as_os_str().to_owned();
            name.push(".part");
            let part = PathBuf::from(name);
            let whole = async {
                let mut writer = BufWriter::new(File::create(&part)?);
                let counts = transfer::export(client, path, &mut writer).await?;
                writer.into_inner()?.sync_all()?;
                std::fs::rename(&part, file)?;
                anyhow::Ok(counts)
            };
            whole.await.with_context(|| file.display().to_string())?
        }
    };
    if ephemeral > 0 {
        eprintln!("{written} znodes exported; {ephemeral} left out, because sessions own them");
    }
    Ok(())
}

/// A file, or standard input.
fn open(file: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if file == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let opened = File::open(file).with_context(|| file.display().to_string())?;
    Ok(Box::new(BufReader::new(opened)))
}

/// The data of the command line, or of standard input.
fn input(data: &str) -> anyhow::Result<Vec<u8>> {
    if data != "-" {
        return Ok(data.as_bytes().to_vec());
    }
    let mut bytes = Vec::new();
    // One byte more than fits, so that too much is noticed without reading it all.
    let limit = u64::try_from(REQUEST_BYTES_MAX)? + 1;
    io::stdin()
        .lock()
        .take(limit)
        .read_to_end(&mut bytes)
        .context("standard input")?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_stat(stat: &Stat, out: &mut impl Write) -> io::Result<()> {
    let Stat {
        czxid,
        mzxid,
        ctime,
        mtime,
        version,
        cversion,
        aversion,
        ..
    } = stat;
    writeln!(
        out,
        "czxid {czxid}\nmzxid {mzxid}\nctime {ctime}\nmtime {mtime}"
    )?;
    writeln!(
        out,
        "version {version}\ncversion {cversion}\naversion {aversion}"
    )?;
    let Stat {
        ephemeral_owner,
        data_length,
        num_children,
        pzxid,
        ..
    } = stat;
    writeln!(
        out,
        "ephemeral_owner {ephemeral_owner:#x}\ndata_length {data_length}"
    )?;
    writeln!(out, "num_children {num_children}\npzxid {pzxid}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clap::Parser;
    use unbroken_coord::driver::{self, ServerConfig};

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        zk: ZkArgs,
    }

    fn arguments(line: &str) -> Result<ZkArgs, clap::Error> {
        let words = std::iter::once("zk").chain(line.split_whitespace());
        Program::try_parse_from(words).map(|program| program.zk)
    }

    #[test]
    fn wrong_usage_is_noticed_before_anything_is_done() {
        for wrong in [
            "",
            "frob",
            "get",
            "--server host:0 ls /",
            "--server host/a/ ls /",
            "--timeout -1 ls /",
            "delete /a --recursive --version 3",
            "create /a --container --ephemeral",
            "--auth joe ls /",
            "acl /a world:anyone",
            "watch /a --children --recursive",
        ] {
            assert!(arguments(wrong).is_err(), "{wrong:?}");
        }
        let args = arguments("ls / --server [::1]:7,b/app --timeout 0.5").unwrap();
        assert_eq!(args.server.hosts, ["[::1]:7", "b:2181"]);
        assert_eq!(args.server.chroot, "/app");
        assert_eq!(args.timeout, Duration::from_millis(500));
    }

    /// Runs one command line; gives what it printed, or the error as it is shown.
    async fn zk(client: &Client, line: &str) -> Result<String, String> {
        let args = arguments(line).unwrap();
        let mut out = Vec::new();
        match execute(client, &args.command, args.json, &mut out).await {
            Ok(()) => Ok(String::from_utf8(out).unwrap()),
            Err(error) => Err(format!("{error:#}")),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_command_against_a_server() {
        let data_dir = std::env::temp_dir().join(format!("unbroken-zk-{}", std::process::id()));
        std::fs::create_dir_all(&data_dir).unwrap();
        // One server alone is its own quorum; nobody connects to its peer port.
        let any = "127.0.0.1:0".parse().unwrap();
        let peers = BTreeMap::from([("c1".to_owned(), any)]);
        let config = ServerConfig::new("c1", any, peers, data_dir.clone(), [7; 32]);
        let server = driver::start(config).await.unwrap();
        let hosts = [server.client_address().to_string()];
        let client = Client::connect(ConnectOptions::new(hosts)).await.unwrap();
        let zk = async |line: &str| zk(&client, line).await;
        let printed = |text: &str| Ok(text.to_owned());
        let refused = |text: &str| Err(text.to_owned());

        assert_eq!(
            zk("create /a/b one").await,
            refused("/a/b: its parent /a does not exist (try --parents)")
        );
        assert_eq!(zk("create -p /a/b one").await, printed("/a/b\n"));
        assert_eq!(
            zk("create /a/b one").await,
            refused("/a/b: znode exists already")
        );
        assert_eq!(
            zk("--json create -s /a/n-").await,
            printed("{\"path\":\"/a/n-0000000001\"}\n")
        );
        assert_eq!(zk("ls /a").await, printed("b\nn-0000000001\n"));
        assert_eq!(zk("ls -f /a").await, printed("/a/b\n/a/n-0000000001\n"));
        assert_eq!(zk("ls -R /a").await, printed("/a\n/a/b\n/a/n-0000000001\n"));
        assert_eq!(zk("complete").await, printed("/\n"));
        assert_eq!(zk("complete /a").await, printed("/a/\n"));
        assert_eq!(zk("complete /a/n").await, printed("/a/n-0000000001\n"));
        assert_eq!(zk("complete /none/x").await, printed(""));
        assert_eq!(
            zk("--json ls /a").await,
            printed("{\"children\":[\"b\",\"n-0000000001\"],\"path\":\"/a\"}\n")
        );
        assert_eq!(
            zk("set /a/b two --version 1").await,
            refused("/a/b: version conflict")
        );
        assert_eq!(zk("set /a/b two --version 0").await, printed(""));
        assert_eq!(zk("get /a/b").await.unwrap().trim_end(), "two");
        assert_eq!(zk("get /a/c").await, refused("/a/c: no such znode"));
        assert_eq!(zk("get a").await, refused("a: a path begins with /"));
        let stat = zk("stat /a/b").await.unwrap();
        assert!(
            stat.contains("\nversion 1\n") && stat.contains("\ndata_length 3\n"),
            "{stat}"
        );
        assert_eq!(zk("stat /a/c").await, refused("/a/c: no such znode"));
        client.set("/a/b", vec![0xff, 0], -1).await.unwrap();
        let got: serde_json::Value =
            serde_json::from_str(&zk("--json get /a/b").await.unwrap()).unwrap();
        assert_eq!(
            (&got["data_hex"], &got["stat"]["version"]),
            (&json!("ff00"), &json!(2))
        );

        assert_eq!(zk("delete /a").await, refused("/a: znode has children"));
        assert_eq!(
            zk("delete /a/b --version 0").await,
            refused("/a/b: version conflict")
        );
        assert_eq!(
            zk("watch --children /none").await,
            refused("/none: no such znode")
        );
        // Changed until the watch, whenever it is set, has told.
        let watching = zk("watch /a/b --count 1");
        let changing = async {
            loop {
                client.set("/a/b", "x", -1).await.unwrap();
            }
        };
        tokio::select! {
            told = watching => assert_eq!(told, printed("NodeDataChanged /a/b\n")),
            () = changing => {}
        }
        let file = data_dir.join("a.tree").display().to_string();
        assert_eq!(zk(&format!("export /a -o {file}")).await, printed(""));
        assert_eq!(
            zk(&format!("import {file}")).await,
            refused(&format!(
                "{file}: /a: znode exists already; nothing was changed (try --existing skip or overwrite)"
            ))
        );
        assert_eq!(
            zk(&format!("import --to /c/d {file}")).await,
            printed("3 created, 0 overwritten, 0 left as they were\n")
        );
        assert_eq!(
            zk("ls -R /c").await,
            printed("/c\n/c/d\n/c/d/b\n/c/d/n-0000000001\n")
        );
        client.set("/a/b", "y", -1).await.unwrap();
        assert_eq!(zk("delete /a/n-0000000001").await, printed(""));
        assert_eq!(
            zk(&format!("import --existing skip {file}")).await,
            printed("1 created, 0 overwritten, 2 left as they were\n")
        );
        assert_eq!(zk("get /a/b").await.unwrap().trim_end(), "y");
        assert_eq!(
            zk(&format!("--json import --existing overwrite {file}")).await,
            printed("{\"created\":0,\"overwritten\":3,\"read\":3}\n")
        );
        assert_eq!(zk("get /a/b").await.unwrap().trim_end(), "x");

        let watching = zk("watch -R / --count 1");
        let changing = async {
            loop {
                client.set("/a/b", "x", -1).await.unwrap();
            }
        };
        tokio::select! {
            told = watching => assert_eq!(told, printed("NodeDataChanged /a/b\n")),
            () = changing => {}
        }
        assert_eq!(zk("acl /a/b").await, printed("world:anyone:cdrwa\n"));
        assert_eq!(zk("acl /a/b world:anyone:ra").await, printed(""));
        assert_eq!(zk("acl /a/b").await, printed("world:anyone:ra\n"));
        assert_eq!(zk("set /a/b z").await, refused("/a/b: not authorized"));
        assert_eq!(
            zk("acl /a/b world:anyone:cdrwa --version 2").await,
            printed("")
        );

        assert_eq!(zk("delete -r /a").await, printed(""));
        assert_eq!(zk("delete -r /a").await, refused("/a: no such znode"));

        client.close().await.unwrap();
        server.shutdown().await;
        std::fs::remove_dir_all(&data_dir).unwrap();
    }

    #[tokio::test]
    async fn no_server_is_said_plainly() {
        let args = arguments("--server 127.0.0.1:1 --timeout 0.05 ls /").unwrap();
        let error = connect_and_execute(&args, &mut Vec::new())
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "127.0.0.1:1: no server answered");
    }
}
