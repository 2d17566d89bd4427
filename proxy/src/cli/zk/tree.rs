//! Whole trees: listing, deleting, and many requests at once.

use std::future::Future;
use std::io::{self, Write};

use serde_json::json;
use tokio::task::JoinSet;
use unbroken_coord::client::{Client, ClientError};
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode, parent};

use super::{Failure, at};

/// Requests under way at once.
const PIPELINE: usize = 256;

/// Runs `work` on each item, many at a time; gives the results in the items' order.
///
/// # Errors
/// The first that occurs; what has not begun by then is not done.
pub(super) async fn pipelined<T, R, F>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> F,
) -> Result<Vec<R>, Failure>
where
    R: Send + 'static,
    F: Future<Output = Result<R, Failure>> + Send + 'static,
{
    let mut items = items.into_iter().enumerate();
    let mut running = JoinSet::new();
    let mut results: Vec<Option<R>> = Vec::new();
    loop {
        while running.len() < PIPELINE
            && let Some((place, item)) = items.next()
        {
            let work = work(item);
            running.spawn(async move { (place, work.await) });
        }
        let Some(finished) = running.join_next().await else {
            let all = results.into_iter();
            return Ok(all
                .map(|result| result.expect("every place was filled"))
                .collect());
        };
        let (place, result) = finished.expect("the work does not panic");
        if results.len() <= place {
            results.resize_with(place + 1, || None);
        }
        results[place] = Some(result?);
    }
}

/// The path of a child.
pub(super) fn child(above: &str, name: &str) -> String {
    let slash = if above == "/" { "" } else { "/" };
    format!("{above}{slash}{name}")
}

/// The path of `below`, which is `root` or stands below it, as seen from there: empty, or with a
/// slash in front.
pub(super) fn relative<'p>(root: &str, below: &'p str) -> &'p str {
    match (root, below) {
        ("/", "/") => "",
        ("/", below) => below,
        (root, below) => &below[root.len()..],
    }
}

/// Paths of a znode and of everything below it, each before what stands below it, names in order.
/// The tree may change meanwhile: what comes or goes in that time may be there or not.
pub(super) async fn walk(client: &Client, root: &str) -> Result<Vec<String>, Failure> {
    let mut all = vec![root.to_owned()];
    let mut level = all.clone();
    while !level.is_empty() {
        let children = pipelined(level, |above| {
            let client = client.clone();
            let is_root = above == root;
            async move {
                match client.children(&above).await {
                    Ok(names) => Ok(names.iter().map(|name| child(&above, name)).collect()),
                    // Somebody deleted it; the one we were asked for must be there.
                    Err(ClientError::Zk(ErrorCode::NoNode)) if !is_root => Ok(Vec::new()),
                    Err(error) => Err(at(&above)(error)),
                }
            }
        });
        level = children.await?.into_iter().flatten().collect::<Vec<_>>();
        all.extend_from_slice(&level);
    }
    all.sort_by(|a, b| a.split('/').cmp(b.split('/')));
    Ok(all)
}

/// `zk ls`
pub(super) async fn list(
    client: &Client,
    path: &str,
    recursive: bool,
    full: bool,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    client.sync(path).await.map_err(at(path))?;
    if recursive {
        for below in walk(client, path).await? {
            if json {
                writeln!(out, "{}", json!({ "path": below }))?;
            } else {
                writeln!(out, "{below}")?;
            }
        }
        return Ok(());
    }
    let mut children = client.children(path).await.map_err(at(path))?;
    children.sort_unstable();
    if json {
        writeln!(out, "{}", json!({ "path": path, "children": children }))?;
        return Ok(());
    }
    for name in children {
        if full {
            writeln!(out, "{}", child(path, &name))?;
        } else {
            writeln!(out, "{name}")?;
        }
    }
    Ok(())
}

/// `zk complete`: paths that begin with what has been typed. A slash follows those with children.
pub(super) async fn complete(
    client: &Client,
    typed: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let above = match typed.rfind('/') {
        None => "",
        Some(0) => "/",
        Some(slash) => &typed[..slash],
    };
    if above.is_empty() {
        writeln!(out, "/")?;
        return Ok(());
    }
    let names = match client.children(above).await {
        Ok(names) => names,
        // Nothing to propose is not an error.
        Err(ClientError::Zk(_) | ClientError::BadPath(_)) => return Ok(()),
        Err(error) => return Err(at(above)(error).into()),
    };
    let paths = names.iter().map(|name| child(above, name));
    let mut fitting: Vec<String> = paths.filter(|path| path.starts_with(typed)).collect();
    fitting.sort_unstable();
    let stats = pipelined(fitting.clone(), |path| {
        let client = client.clone();
        async move { client.exists(&path).await.map_err(at(&path)) }
    });
    for (path, stat) in fitting.iter().zip(stats.await?) {
        let slash = if stat.is_some_and(|stat| stat.num_children > 0) {
            "/"
        } else {
            ""
        };
        writeln!(out, "{path}{slash}")?;
    }
    Ok(())
}

pub(super) async fn create_parents(client: &Client, path: &str) -> Result<(), Failure> {
    let mut missing = Vec::new();
    let mut below = path;
    while let Some((above, _)) = parent(below).filter(|(above, _)| *above != "/") {
        missing.push(above);
        below = above;
    }
    for above in missing.into_iter().rev() {
        match client
            .create(above, "", CreateMode::Persistent, Acl::open())
            .await
        {
            Ok(_) | Err(ClientError::Zk(ErrorCode::NodeExists)) => {}
            Err(error) => return Err(at(above)(error)),
        }
    }
    Ok(())
}

/// Deletes everything below a znode, deepest first.
pub(super) async fn delete_below(client: &Client, path: &str) -> Result<(), Failure> {
    let mut order = walk(client, path).await?.split_off(1);
    let depth = |path: &String| path.matches('/').count();
    order.sort_by_key(depth);
    let progress = Progress::new("deleting", order.len());
    while let Some(deepest) = order.last().map(depth) {
        let level = order.split_off(order.partition_point(|path| depth(path) < deepest));
        let count = level.len();
        pipelined(level, |below| {
            let client = client.clone();
            async move {
                match client.delete(&below, -1).await {
                    Ok(()) | Err(ClientError::Zk(ErrorCode::NoNode)) => Ok(()),
                    Err(error) => Err(at(&below)(error)),
                }
            }
        })
        .await?;
        progress.advance(count);
    }
    Ok(())
}

/// Tells how far long work has come, where somebody looks at it.
pub(super) struct Progress(Option<indicatif::ProgressBar>);

impl Progress {
    pub(super) fn new(what: &'static str, total: usize) -> Self {
        // Short work needs no bar.
        let shown = total > 2 * PIPELINE && io::IsTerminal::is_terminal(&io::stderr());
        Self(shown.then(|| {
            let style = "{msg} {wide_bar} {pos}/{len} znodes, {eta} left";
            let style = indicatif::ProgressStyle::with_template(style).expect("it is well formed");
            indicatif::ProgressBar::new(total as u64)
                .with_style(style)
                .with_message(what)
        }))
    }

    pub(super) fn advance(&self, count: usize) {
        if let Some(bar) = &self.0 {
            bar.inc(count as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
