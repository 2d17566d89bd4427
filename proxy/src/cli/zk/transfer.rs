//! Trees as files: one JSON object a line, the first a head, then the znodes, each before its children.
//!
//! ```text
//! {"format":"unbroken-tree","version":1,"root":"/app","znodes":2}
//! {"path":"","data":"answer=42"}
//! {"path":"/blob","data_hex":"ff00","acl":[{"perms":31,"scheme":"digest","id":"joe:..."}]}
//! ```
//!
//! `path` is relative to the root; `data` absent is null; `acl` absent is open to everybody; `kind` is
//! `container`, or absent; an export never says it, for nobody is told which znodes are. What a session owns,
//! metadata and the counters of sequential names stay behind.

use std::io::{BufRead, Write};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::json;
use unbroken_coord::client::{Client, ClientError};
use unbroken_coord::wire::{Acl, CreateMode, CreateOp, ErrorCode, Id, MultiOp, Stat};

use super::tree::{Progress, create_parents, pipelined, relative, walk};
use super::{Failure, at};

const FORMAT: &str = "unbroken-tree";
const VERSION: u32 = 1;

/// Znodes read at once, between two writes of the file.
const CHUNK: usize = 1024;

/// One transaction of an import holds so many znodes, and about so many bytes, at most.
const BATCH_ZNODES: usize = 256;
const BATCH_BYTES: usize = 256 * 1024;

/// What an import does about a znode that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Existing {
    /// Change nothing at all, and say which
    Fail,
    /// Leave it as it is
    Skip,
    /// Give it the file's data
    Overwrite,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: String,
    version: u32,
    root: String,
    znodes: usize,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_hex: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<Kind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    acl: Option<Vec<AclLine>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Container,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AclLine {
    perms: i32,
    scheme: String,
    id: String,
}

/// A znode of the file, ready to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Znode {
    path: String,
    data: Option<Bytes>,
    kind: Option<Kind>,
    acl: Vec<Acl>,
}

/// `zk export`: how many znodes were written, and how many were left out because a session owns them.
pub(super) async fn export(
    client: &Client,
    root: &str,
    out: &mut impl Write,
) -> anyhow::Result<(usize, usize)> {
    client.sync(root).await.map_err(at(root))?;
    let paths = walk(client, root).await?;
    let progress = Progress::new("exporting", paths.len());
    let mut lines = Vec::with_capacity(paths.len());
    let mut ephemeral = 0;
    for chunk in paths.chunks(CHUNK) {
        let read = pipelined(chunk.iter().cloned(), |path| read(client.clone(), path)).await?;
        for (path, znode) in chunk.iter().zip(read) {
            // Deleted since the walk: not there.
            let Some((data, stat, acl)) = znode else {
                continue;
            };
            // The coordinator's own, the same on no two ensembles.
            if root == "/" && (path == "/zookeeper" || path.starts_with("/zookeeper/")) {
                continue;
            }
            if stat.ephemeral_owner != 0 {
                ephemeral += 1;
                continue;
            }
            lines.push(line(relative(root, path), data, acl));
        }
        progress.advance(chunk.len());
    }
    let head = Head {
        format: FORMAT.to_owned(),
        version: VERSION,
        root: root.to_owned(),
        znodes: lines.len(),
    };
    writeln!(out, "{}", serde_json::to_string(&head)?)?;
    for line in &lines {
        writeln!(out, "{}", serde_json::to_string(line)?)?;
    }
    out.flush()?;
    Ok((lines.len(), ephemeral))
}

type Content = (Option<Bytes>, Stat, Vec<Acl>);

async fn read(client: Client, path: String) -> Result<Option<Content>, Failure> {
    let both = async {
        let (data, stat) = client.get_or_null(&path).await?;
        let (acl, _) = client.acl(&path).await?;
        Ok((data, stat, acl))
    };
    match both.await {
        Ok(content) => Ok(Some(content)),
        Err(ClientError::Zk(ErrorCode::NoNode)) => Ok(None),
        Err(error) => Err(at(&path)(error)),
    }
}

fn line(path: &str, data: Option<Bytes>, acl: Vec<Acl>) -> Line {
    let mut line = Line {
        path: path.to_owned(),
        ..Line::default()
    };
    match data {
        None => {}
        Some(data) => match String::from_utf8(data.to_vec()) {
            Ok(text) => line.data = Some(text),
            Err(_) => line.data_hex = Some(super::hex(&data)),
        },
    }
    if acl != Acl::open() {
        let entries = acl.into_iter().map(|entry| AclLine {
            perms: entry.perms,
            scheme: entry.id.scheme,
            id: entry.id.id,
        });
        line.acl = Some(entries.collect());
    }
    line
}

/// How an import ended: znodes that the file holds, were created, were overwritten.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Imported {
    pub(super) read: usize,
    pub(super) created: usize,
    pub(super) overwritten: usize,
}

impl Imported {
    pub(super) fn write(&self, json: bool, out: &mut impl Write) -> std::io::Result<()> {
        let Self {
            read,
            created,
            overwritten,
        } = self;
        if json {
            let line = json!({ "read": read, "created": created, "overwritten": overwritten });
            writeln!(out, "{line}")
        } else {
            let left = read - created - overwritten;
            writeln!(
                out,
                "{created} created, {overwritten} overwritten, {left} left as they were"
            )
        }
    }
}

/// `zk import`: the whole file is read and checked before anything is changed.
pub(super) async fn import(
    client: &Client,
    file: impl BufRead,
    to: Option<&str>,
    existing: Existing,
) -> anyhow::Result<Imported> {
    let znodes = parse(file, to)?;
    let mut done = Imported {
        read: znodes.len(),
        ..Imported::default()
    };
    let Some(first) = znodes.first() else {
        return Ok(done);
    };
    client.sync("/").await.map_err(at("/"))?;
    if existing == Existing::Fail {
        for chunk in znodes.chunks(CHUNK) {
            let there = presence(client, chunk).await?;
            let taken = chunk
                .iter()
                .zip(there)
                .find(|(znode, there)| *there && znode.path != "/");
            if let Some((znode, _)) = taken {
                bail!(
                    "{}: znode exists already; nothing was changed (try --existing skip or overwrite)",
                    znode.path
                );
            }
        }
    }
    create_parents(client, &first.path).await?;
    let mut lists = Vec::new();
    let progress = Progress::new("importing", znodes.len());
    let mut rest = &znodes[..];
    while !rest.is_empty() {
        let batch;
        (batch, rest) = rest.split_at(batch_length(rest));
        lists.extend(write(client, batch, existing, &mut done).await?);
        progress.advance(batch.len());
    }
    set_lists(client, lists).await?;
    Ok(done)
}

/// How many of these make one transaction.
fn batch_length(znodes: &[Znode]) -> usize {
    let mut bytes = 0;
    let fitting = znodes.iter().take(BATCH_ZNODES).take_while(|znode| {
        bytes += znode.path.len() + znode.data.as_ref().map_or(0, Bytes::len) + 128;
        bytes <= BATCH_BYTES
    });
    // One alone may be larger: the server says what it takes.
    fitting.count().max(1)
}

async fn presence(client: &Client, znodes: &[Znode]) -> Result<Vec<bool>, Failure> {
    let paths = znodes.iter().map(|znode| znode.path.clone());
    pipelined(paths, |path| {
        let client = client.clone();
        async move {
            let stat = client.exists(&path).await.map_err(at(&path))?;
            Ok(stat.is_some())
        }
    })
    .await
}

/// Gives overwritten znodes the file's access lists, which no transaction can: a list may forbid what follows it.
async fn set_lists(client: &Client, znodes: Vec<Znode>) -> Result<(), Failure> {
    pipelined(znodes, |znode| {
        let client = client.clone();
        async move {
            let set = client.set_acl(&znode.path, znode.acl, -1).await;
            set.map(drop).map_err(at(&znode.path))
        }
    })
    .await
    .map(drop)
}

/// Writes one batch in one transaction; looks again when somebody else changed the same znodes meanwhile. Gives the
/// znodes that were overwritten.
async fn write(
    client: &Client,
    batch: &[Znode],
    existing: Existing,
    done: &mut Imported,
) -> anyhow::Result<Vec<Znode>> {
    loop {
        let there = presence(client, batch).await?;
        let mut ops = Vec::with_capacity(batch.len());
        let mut written = Vec::with_capacity(batch.len());
        let mut created = 0;
        let mut overwritten = Vec::new();
        for (znode, there) in batch.iter().zip(there) {
            // The root is always there: its data is all that can be given to it.
            let overwrite = existing == Existing::Overwrite
                || (znode.path == "/" && existing == Existing::Fail);
            if !there {
                created += 1;
                ops.push(create_op(znode));
            } else if overwrite {
                overwritten.push(znode.clone());
                ops.push(MultiOp::SetData {
                    path: znode.path.clone(),
                    data: znode.data.clone(),
                    version: -1,
                });
            } else {
                continue;
            }
            written.push(&znode.path);
        }
        if ops.is_empty() {
            return Ok(overwritten);
        }
        match client.multi(ops).await {
            Ok(_) => {
                done.created += created;
                done.overwritten += overwritten.len();
                return Ok(overwritten);
            }
            Err(ClientError::Multi {
                code: ErrorCode::NodeExists | ErrorCode::NoNode,
                ..
            }) if existing != Existing::Fail => {}
            Err(ClientError::Multi { index, code }) => {
                return Err(at(written[index])(ClientError::Zk(code)).into());
            }
            Err(error) => return Err(at(written[0])(error).into()),
        }
    }
}

fn create_op(znode: &Znode) -> MultiOp {
    let (op, mode) = match znode.kind {
        None => (CreateOp::Create, CreateMode::Persistent),
        Some(Kind::Container) => (CreateOp::Container, CreateMode::Container),
    };
    MultiOp::Create {
        op,
        path: znode.path.clone(),
        data: znode.data.clone(),
        acl: znode.acl.clone(),
        flags: mode.flags(),
    }
}

fn parse(file: impl BufRead, to: Option<&str>) -> anyhow::Result<Vec<Znode>> {
    let mut lines = file.lines().enumerate();
    let (_, first) = lines.next().context("the file is empty")?;
    let head: Head = serde_json::from_str(&first?)
        .with_context(|| format!("line 1: expected the head of an exported tree, \"{FORMAT}\""))?;
    ensure!(
        head.format == FORMAT && head.version == VERSION,
        "line 1: format {:?} version {}: expected {FORMAT:?} version {VERSION}",
        head.format,
        head.version
    );
    let root = to.unwrap_or(&head.root);
    let mut znodes: Vec<Znode> = Vec::new();
    for (number, line) in lines {
        let line = line?;
        let place = || format!("line {}", number + 1);
        let line: Line = serde_json::from_str(&line).with_context(place)?;
        znodes.push(znode(line, root).with_context(place)?);
    }
    ensure!(
        znodes.len() == head.znodes,
        "the file is cut off: its head announces {} znodes, it holds {}",
        head.znodes,
        znodes.len()
    );
    Ok(znodes)
}

fn znode(line: Line, root: &str) -> anyhow::Result<Znode> {
    ensure!(
        line.path.is_empty() || line.path.starts_with('/'),
        "path {:?}: expected none, or one that begins with /",
        line.path
    );
    let path = match (root, &line.path[..]) {
        (root, "") => root.to_owned(),
        ("/", below) => below.to_owned(),
        (root, below) => format!("{root}{below}"),
    };
    unbroken_coord::wire::validate_path(&path).with_context(|| path.clone())?;
    let data = match (line.data, line.data_hex) {
        (Some(_), Some(_)) => bail!("{path}: both data and data_hex"),
        (Some(text), None) => Some(Bytes::from(text)),
        (None, Some(hex)) => Some(unhex(&hex).with_context(|| format!("{path}: data_hex"))?),
        (None, None) => None,
    };
    let acl = line.acl.map_or_else(Acl::open, |entries| {
        let entries = entries.into_iter().map(|entry| Acl {
            perms: entry.perms,
            id: Id {
                scheme: entry.scheme,
                id: entry.id,
            },
        });
        entries.collect()
    });
    Ok(Znode {
        path,
        data,
        kind: line.kind,
        acl,
    })
}

fn unhex(text: &str) -> anyhow::Result<Bytes> {
    ensure!(
        text.len().is_multiple_of(2) && text.is_ascii(),
        "expected an even number of hexadecimal digits"
    );
    let pairs = text.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).expect("it is ASCII");
        u8::from_str_radix(pair, 16).with_context(|| format!("{pair:?} is not hexadecimal"))
    });
    pairs.collect::<anyhow::Result<Vec<u8>>>().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = r#"{"format":"unbroken-tree","version":1,"root":"/app","znodes":2}"#;

    #[test]
    fn a_file_is_read_below_its_own_root_or_another() {
        let file = format!(
            "{HEAD}\n{{\"path\":\"\",\"data\":\"x\"}}\n{{\"path\":\"/b\",\"data_hex\":\"ff00\",\"kind\":\"container\"}}\n"
        );
        for (to, root) in [(None, "/app"), (Some("/other"), "/other")] {
            let znodes = parse(file.as_bytes(), to).unwrap();
            assert_eq!(znodes[0].path, root);
            assert_eq!(znodes[0].data.as_deref(), Some(&b"x"[..]));
            assert_eq!(znodes[1].path, format!("{root}/b"));
            assert_eq!(znodes[1].data.as_deref(), Some(&[0xff, 0][..]));
            assert_eq!(znodes[1].kind, Some(Kind::Container));
        }
        assert_eq!(parse(file.as_bytes(), Some("/")).unwrap()[1].path, "/b");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_line() {
        for (file, complaint) in [
            (String::new(), "the file is empty"),
            ("{}".into(), "line 1: expected the head"),
            (HEAD.replace(":1,", ":9,"), "version 9: expected"),
            (
                HEAD.into(),
                "cut off: its head announces 2 znodes, it holds 0",
            ),
            (
                format!("{HEAD}\n{{\"path\":\"b\"}}"),
                "line 2: path \"b\": expected",
            ),
            (
                format!("{HEAD}\n{{\"path\":\"/b\",\"datum\":1}}"),
                "line 2: unknown field `datum`",
            ),
            (
                format!("{HEAD}\n{{\"path\":\"/b\",\"data_hex\":\"f\"}}"),
                "line 2: /app/b: data_hex",
            ),
            (
                format!("{HEAD}\n{{\"path\":\"/b\",\"data\":\"\",\"data_hex\":\"\"}}"),
                "both data and data_hex",
            ),
            (
                format!("{HEAD}\n{{\"path\":\"/b/../c\"}}"),
                "line 2: /app/b/../c",
            ),
        ] {
            let error = format!("{:#}", parse(file.as_bytes(), None).unwrap_err());
            assert!(
                error.contains(complaint),
                "{file:?} gives {error:?}, not {complaint:?}"
            );
        }
    }

    #[test]
    fn a_batch_is_bounded_and_never_empty() {
        let znode = |bytes: usize| Znode {
            path: "/a".into(),
            data: Some(vec![0; bytes].into()),
            kind: None,
            acl: Acl::open(),
        };
        assert_eq!(batch_length(&vec![znode(0); 1000]), BATCH_ZNODES);
        assert_eq!(batch_length(&[znode(BATCH_BYTES), znode(0)]), 1);
        assert!(batch_length(&vec![znode(10_000); 100]) < 30);
    }
}
