//! `zk watch`: a line for every event.

use std::io::{self, Write};

use serde_json::json;
use unbroken_coord::client::{Client, ClientError, Notice, WatchEvent};
use unbroken_coord::wire::AddWatchMode;

use super::at;

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watched {
    Znode,
    Children,
    Tree,
}

/// Runs until so many events were told, or the user interrupts.
pub(super) async fn watch(
    client: &Client,
    path: &str,
    watched: Watched,
    count: u64,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    tokio::select! {
        ended = async {
            match watched {
                Watched::Tree => watch_tree(client, path, count, json, out).await,
                _ => watch_one(client, path, watched, count, json, out).await,
            }
        } => ended,
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

async fn watch_one(
    client: &Client,
    path: &str,
    watched: Watched,
    count: u64,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for _ in 0..count {
        let changed = if watched == Watched::Children {
            let set = client.children_and_watch(path).await;
            set.map(|(_, _, changed)| changed)
        } else {
            let set = client.exists_and_watch(path).await;
            set.map(|(_, changed)| changed)
        };
        let event = changed.map_err(at(path))?.await.map_err(at(path))?;
        write_event(&event, json, out)?;
    }
    Ok(())
}

/// By one persistent recursive watch: every event is told, by itself.
async fn watch_tree(
    client: &Client,
    path: &str,
    count: u64,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut notices = client
        .watch(path, AddWatchMode::PersistentRecursive)
        .await
        .map_err(at(path))?;
    let mut told = 0;
    while told < count {
        let notice = notices.next().await.unwrap_or(Err(ClientError::Closed));
        match notice.map_err(at(path))? {
            Notice::Event(event) => {
                write_event(&event, json, out)?;
                told += 1;
            }
            Notice::Missed if json => {
                writeln!(out, "{}", json!({ "event": "Missed", "path": path }))?;
                out.flush()?;
            }
            Notice::Missed => eprintln!("{path}: reconnected: events may be missing here"),
            // Of no use to somebody who reads lines: what counts is that events may be missing.
            _ => {}
        }
    }
    Ok(())
}

fn write_event(event: &WatchEvent, json: bool, out: &mut impl Write) -> io::Result<()> {
    let WatchEvent { event, path } = event;
    if json {
        writeln!(out, "{}", json!({ "event": event, "path": path }))?;
    } else {
        writeln!(out, "{event:?} {path}")?;
    }
    out.flush()
}
