//! Transactions: several changes in one step, and optimistic ones that read before they write.
//!
//! [`Transaction`] builds a multi whose results are typed: `create` gives a token, and the token
//! gets the path out of the results. [`transact`] runs a closure on a [`View`]: what it reads is
//! recorded with its version, what it writes is kept back, and at the end one multi checks the
//! former and does the latter. If anything that was read has changed meanwhile, nothing is done and
//! the closure runs again, on a new view, a bounded number of times.
//!
//! **Guarantees.** Transactions are serializable: at the instant of its multi, everything that a
//! transaction read was as it had read it, also where it found no znode. (Versions stand for
//! contents; a znode that is deleted and created anew begins at version 0 again, and one that did
//! both since it was read is taken for the same.) Lists of children are not read, because no server
//! can check them. A closure may see two znodes at different times, and then runs in vain; what it
//! does outside its view happens each time.
//!
//! With [`Options::exactly_once`] a transaction whose connection is lost is not done twice, and its
//! outcome is known when the connection is back: the multi creates an ephemeral marker too, under
//! the directory given, which goes afterwards. Without it such a transaction ends in
//! [`ClientError::ConnectionLoss`].
//!
//! **Cost.** One round trip for each znode read, and one for the multi; that an absent znode is still
//! absent is checked by creating and deleting it in the same step, so that child watches of its
//! parent fire.
//!
//! ```no_run
//! # async fn example(client: unbroken_coord::client::Client)
//! # -> Result<(), unbroken_coord::recipes::transaction::TransactionError> {
//! use unbroken_coord::recipes::transaction::{Options, Transaction, TransactionError, transact};
//! use unbroken_coord::wire::{Acl, CreateMode};
//!
//! let mut order = Transaction::new();
//! order.check("/shop/open", -1);
//! let placed = order.create("/shop/orders/o-", "tea", CreateMode::PersistentSequential, Acl::open());
//! let results = order.commit(&client).await?;
//! println!("order {}", results.path(placed));
//!
//! let moved = transact(&client, Options::new().exactly_once("/shop/markers"), |view| async move {
//!     let from = view.number("/accounts/ada").await?;
//!     let to = view.number("/accounts/bob").await?;
//!     view.set("/accounts/ada", (from - 5).to_string());
//!     view.set("/accounts/bob", (to + 5).to_string());
//!     Ok::<_, TransactionError>(from >= 5)
//! });
//! assert!(moved.await?);
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use super::znodes::{Znodes, join, op_check, op_create, op_delete, op_set, unique};
use crate::client::{Client, ClientError};
use crate::wire::{Acl, CreateMode, ErrorCode, MultiOp, MultiResult, Stat, parent};

/// The longest pause before another attempt.
const PAUSE_MAX: Duration = Duration::from_millis(64);

/// Why a transaction was not done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// The server refused one of the operations, and did none.
    #[error("{operation} {path}: {code}")]
    Refused {
        /// `check`, `create`, `set` or `delete`.
        operation: &'static str,
        /// Of which znode.
        path: String,
        /// Why.
        code: ErrorCode,
    },
    /// Every attempt met a change by somebody else.
    #[error("each of {attempts} attempts met a change of {path} by somebody else")]
    Conflict {
        /// How many there were.
        attempts: u32,
        /// Where the last one met it.
        path: String,
    },
    /// A znode that must be there to be read is not.
    #[error("{0} does not exist")]
    Missing(String),
    /// A znode's data is not what the reader expects.
    #[error("{path} holds {found:?}, which is no {expected}")]
    Unreadable {
        /// Which.
        path: String,
        /// The beginning of its data.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The session or the connection.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// The place of a create in a [`Transaction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created(usize);

/// The place of a set in a [`Transaction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed(usize);

/// Changes to be done in one step, in their order, or not at all.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    ops: Vec<MultiOp>,
}

impl Transaction {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requires that a znode exists and has this version; -1 fits any.
    pub fn check(&mut self, path: &str, version: i32) -> &mut Self {
        self.ops.push(op_check(path, version));
        self
    }

    /// Creates a znode. The token gets its path out of the results.
    pub fn create(
        &mut self,
        path: &str,
        data: impl Into<Bytes>,
        mode: CreateMode,
        acl: Vec<Acl>,
    ) -> Created {
        self.ops.push(op_create(path, data, mode, acl));
        Created(self.ops.len() - 1)
    }

    /// Sets a znode's data. The token gets its new metadata out of the results. -1 fits any
    /// version.
    pub fn set(&mut self, path: &str, data: impl Into<Bytes>, version: i32) -> Changed {
        self.ops.push(op_set(path, data, version));
        Changed(self.ops.len() - 1)
    }

    /// Deletes a znode; -1 fits any version.
    pub fn delete(&mut self, path: &str, version: i32) -> &mut Self {
        self.ops.push(op_delete(path, version));
        self
    }

    /// The operations, for what else takes them.
    pub fn into_ops(self) -> Vec<MultiOp> {
        self.ops
    }

    /// Does all of it, or nothing.
    ///
    /// # Errors
    /// [`TransactionError::Refused`] names the operation. After an error of the client that has
    /// [`ClientError::outcome_unknown`] it may have been done.
    pub async fn commit(self, client: &Client) -> Result<Results, TransactionError> {
        match client.multi(self.ops.clone()).await {
            Ok(results) => Ok(Results(results)),
            Err(error) => Err(refusal(&self.ops, error)),
        }
    }
}

/// What the operations of a [`Transaction`] gave.
#[derive(Clone, Debug)]
pub struct Results(Vec<MultiResult>);

impl Results {
    /// The path that was created.
    ///
    /// # Panics
    /// With a token of another transaction.
    pub fn path(&self, created: Created) -> &str {
        match self.0.get(created.0) {
            Some(MultiResult::Created { path } | MultiResult::Created2 { path, .. }) => path,
            other => panic!("a token of another transaction: {other:?}"),
        }
    }

    /// The metadata of the znode that was set.
    ///
    /// # Panics
    /// With a token of another transaction.
    pub fn stat(&self, changed: Changed) -> &Stat {
        match self.0.get(changed.0) {
            Some(MultiResult::Set(stat)) => stat,
            other => panic!("a token of another transaction: {other:?}"),
        }
    }
}

/// How [`transact`] goes about it.
#[derive(Clone, Debug)]
pub struct Options {
    attempts: u32,
    markers: Option<String>,
}

impl Options {
    /// 16 attempts, and connections may be lost with the outcome unknown.
    pub const fn new() -> Self {
        Self {
            attempts: 16,
            markers: None,
        }
    }

    /// How often the closure may run.
    ///
    /// # Panics
    /// With 0.
    #[must_use]
    pub const fn attempts(mut self, attempts: u32) -> Self {
        assert!(attempts > 0, "a transaction needs an attempt");
        self.attempts = attempts;
        self
    }

    /// Under which znode to leave a marker for as long as it takes, so that the outcome is known
    /// however often the connection is lost. It is created where it is missing.
    #[must_use]
    pub fn exactly_once(mut self, directory: &str) -> Self {
        self.markers = Some(directory.to_owned());
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `work` on a view of the tree, and does what it wrote if nothing that it read has changed;
/// else runs it again. See the [module](self).
///
/// # Errors
/// What `work` gives, with nothing done; [`TransactionError::Conflict`] after too many attempts;
/// else as [`Transaction::commit`].
pub async fn transact<T, E, F>(
    client: &Client,
    options: Options,
    mut work: impl FnMut(View) -> F,
) -> Result<T, E>
where
    E: From<TransactionError>,
    F: Future<Output = Result<T, E>>,
{
    // The same in all attempts, so that no more than one of them can ever be done.
    let marker = options.markers.map(|markers| join(&markers, &unique()));
    let mut attempt = 1;
    loop {
        let view = View::new(client);
        let value = work(view.clone()).await?;
        let plan = view.seen().plan();
        let Err(error) = plan.carry_out(client, marker.as_deref()).await else {
            return Ok(value);
        };
        match plan.conflict(error) {
            Some(path) if attempt < options.attempts => {
                tracing::debug!(%path, attempt, "transaction met another");
            }
            Some(path) => {
                return Err(TransactionError::Conflict {
                    attempts: attempt,
                    path,
                }
                .into());
            }
            None => return Err(refusal(&plan.ops, error).into()),
        }
        tokio::time::sleep(pause(attempt)).await;
        attempt += 1;
    }
}

/// Between nothing and twice as long as before, so that two that met do not meet again.
fn pause(attempt: u32) -> Duration {
    let longest = PAUSE_MAX.min(Duration::from_millis(1 << attempt.min(10)));
    let chance = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
    longest.mul_f64(chance)
}

/// The tree as one attempt of a transaction sees it, with the attempt's own writes. Clones are the
/// same view.
#[derive(Clone, Debug)]
pub struct View {
    client: Client,
    seen: Arc<Mutex<Seen>>,
}

/// What was read, and how to make sure of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Read {
    Present {
        data: Bytes,
        version: i32,
    },
    /// There is no such znode as long as `top`, which is it or above it, is missing.
    Absent {
        top: String,
    },
    /// There is no such znode as long as `parent` is the ephemeral it was.
    Childless {
        parent: String,
        version: i32,
    },
}

#[derive(Debug, Default)]
struct Seen {
    reads: BTreeMap<String, Read>,
    writes: Vec<MultiOp>,
    /// Data as written, `None` for deleted.
    written: BTreeMap<String, Option<Bytes>>,
}

impl View {
    fn new(client: &Client) -> Self {
        Self {
            client: client.clone(),
            seen: Arc::default(),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The znode's data, `None` where there is none. Reading again gives the same.
    ///
    /// # Errors
    /// [`TransactionError::Client`].
    pub async fn get(&self, path: &str) -> Result<Option<Bytes>, TransactionError> {
        if let Some(known) = self.seen().known(path) {
            return Ok(known);
        }
        let nodes = Znodes::new(&self.client);
        let read = match nodes.get(path).await? {
            Some((data, stat)) => Read::Present {
                data,
                version: stat.version,
            },
            None => absence(&nodes, path).await?,
        };
        let mut seen = self.seen();
        seen.reads.entry(path.to_owned()).or_insert(read);
        Ok(seen.known(path).flatten())
    }

    /// As [`Self::get`], of a znode that must be there.
    ///
    /// # Errors
    /// [`TransactionError::Missing`].
    pub async fn require(&self, path: &str) -> Result<Bytes, TransactionError> {
        let found = self.get(path).await?;
        found.ok_or_else(|| TransactionError::Missing(path.to_owned()))
    }

    /// The number that the znode holds as text.
    ///
    /// # Errors
    /// [`TransactionError::Missing`], [`TransactionError::Unreadable`].
    pub async fn number(&self, path: &str) -> Result<i64, TransactionError> {
        self.parse(path, "number").await
    }

    /// The znode's text as a value; `expected` names it in the error.
    ///
    /// # Errors
    /// As [`Self::number`].
    pub async fn parse<T: FromStr>(
        &self,
        path: &str,
        expected: &'static str,
    ) -> Result<T, TransactionError> {
        let data = self.require(path).await?;
        let text = String::from_utf8_lossy(&data);
        text.parse().map_err(|_| TransactionError::Unreadable {
            path: path.to_owned(),
            found: text.chars().take(40).collect(),
            expected,
        })
    }

    /// Writes to a znode that is there.
    pub fn set(&self, path: &str, data: impl Into<Bytes>) {
        let data = data.into();
        self.seen()
            .write(op_set(path, data.clone(), -1), Some((path, Some(data))));
    }

    /// Creates a persistent znode that is open to all.
    pub fn create(&self, path: &str, data: impl Into<Bytes>) {
        self.create_with(path, data, CreateMode::Persistent, Acl::open());
    }

    /// Creates a znode.
    pub fn create_with(&self, path: &str, data: impl Into<Bytes>, mode: CreateMode, acl: Vec<Acl>) {
        let data = data.into();
        // Where a sequential one will be nobody knows yet.
        let written = (!mode.is_sequential()).then(|| (path, Some(data.clone())));
        self.seen().write(op_create(path, data, mode, acl), written);
    }

    /// Writes to a znode, and creates it where it is missing: it is read for that.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn put(&self, path: &str, data: impl Into<Bytes>) -> Result<(), TransactionError> {
        match self.get(path).await? {
            Some(_) => self.set(path, data),
            None => self.create(path, data),
        }
        Ok(())
    }

    /// Deletes a znode that is there and has no children.
    pub fn delete(&self, path: &str) {
        self.seen().write(op_delete(path, -1), Some((path, None)));
    }
}

/// What must stay as it is for `path` to stay absent.
async fn absence(nodes: &Znodes, path: &str) -> Result<Read, ClientError> {
    let mut top = path;
    while let Some((above, _)) = parent(top) {
        match nodes.repeat(|| nodes.client.exists(above)).await? {
            None => top = above,
            Some(stat) if stat.ephemeral_owner != 0 => {
                return Ok(Read::Childless {
                    parent: above.to_owned(),
                    version: stat.version,
                });
            }
            Some(_) => break,
        }
    }
    Ok(Read::Absent {
        top: top.to_owned(),
    })
}

impl Seen {
    /// `None` where it was not read, `Some(None)` where it is known to be missing.
    fn known(&self, path: &str) -> Option<Option<Bytes>> {
        if let Some(written) = self.written.get(path) {
            return Some(written.clone());
        }
        self.reads.get(path).map(|read| match read {
            Read::Present { data, .. } => Some(data.clone()),
            Read::Absent { .. } | Read::Childless { .. } => None,
        })
    }

    fn write(&mut self, op: MultiOp, written: Option<(&str, Option<Bytes>)>) {
        self.writes.push(op);
        if let Some((path, data)) = written {
            self.written.insert(path.to_owned(), data);
        }
    }

    /// The checks, then the writes.
    fn plan(&self) -> Plan {
        let mut ops = Vec::new();
        for (path, read) in &self.reads {
            match read {
                Read::Present { version, .. } => ops.push(op_check(path, *version)),
                Read::Childless { parent, version } => ops.push(op_check(parent, *version)),
                Read::Absent { top } => {
                    let check = op_create(top, "", CreateMode::Persistent, Acl::open());
                    // Several that were read may hang from the same one.
                    if !self.creates(top) && !ops.contains(&check) {
                        ops.extend([check, op_delete(top, -1)]);
                    }
                }
            }
        }
        let checks = ops.len();
        ops.extend(self.writes.iter().cloned());
        let absent = self.reads.values().filter_map(|read| match read {
            Read::Absent { top } => Some(top.clone()),
            Read::Present { .. } | Read::Childless { .. } => None,
        });
        Plan {
            checks,
            absent: absent.collect(),
            needless: self.writes.is_empty() && self.reads.len() < 2,
            read_only: self.writes.is_empty(),
            ops,
        }
    }

    /// Whether the first thing done to `path` is to create it, which checks that it is missing.
    fn creates(&self, path: &str) -> bool {
        let first = self.writes.iter().find(|op| described(op).1 == path);
        first.is_some_and(|op| {
            matches!(op, MultiOp::Create { flags, .. }
                if CreateMode::from_flags(*flags).is_ok_and(|mode| !mode.is_sequential()))
        })
    }
}

#[derive(Debug)]
struct Plan {
    ops: Vec<MultiOp>,
    /// How many of the operations check what was read.
    checks: usize,
    /// What must be missing.
    absent: Vec<String>,
    /// One read by itself is a state of the tree.
    needless: bool,
    read_only: bool,
}

impl Plan {
    async fn carry_out(&self, client: &Client, marker: Option<&str>) -> Result<(), ClientError> {
        if self.needless {
            return Ok(());
        }
        let nodes = Znodes::new(client);
        if self.read_only {
            return nodes
                .repeat(|| nodes.client.multi(self.ops.clone()))
                .await
                .map(drop);
        }
        match marker {
            Some(marker) => nodes.multi_once(marker, &self.ops).await.map(drop),
            None => client.multi(self.ops.clone()).await.map(drop),
        }
    }

    /// Where another writer came between, if that is what the error says.
    fn conflict(&self, error: ClientError) -> Option<String> {
        let ClientError::Multi { index, code } = error else {
            return None;
        };
        let (_, path) = described(self.ops.get(index)?);
        let checks = match code {
            // A check needs no more rights than the read had; to create takes others.
            ErrorCode::NoAuth | ErrorCode::InvalidAcl => false,
            _ => index < self.checks,
        };
        let appeared = code == ErrorCode::NodeExists && self.absent.iter().any(|top| top == path);
        (checks || appeared).then(|| path.to_owned())
    }
}

fn described(op: &MultiOp) -> (&'static str, &str) {
    match op {
        MultiOp::Create { path, .. } => ("create", path),
        MultiOp::Delete { path, .. } => ("delete", path),
        MultiOp::SetData { path, .. } => ("set", path),
        MultiOp::Check { path, .. } => ("check", path),
    }
}

fn refusal(ops: &[MultiOp], error: ClientError) -> TransactionError {
    let at_fault = match error {
        ClientError::Multi { index, code } => ops.get(index).map(|op| (described(op), code)),
        _ => None,
    };
    match at_fault {
        Some(((operation, path), code)) => TransactionError::Refused {
            operation,
            path: path.to_owned(),
            code,
        },
        None => TransactionError::Client(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present(version: i32) -> Read {
        Read::Present {
            data: "x".into(),
            version,
        }
    }

    fn absent(top: &str) -> Read {
        Read::Absent { top: top.into() }
    }

    fn at_fault(index: usize, code: ErrorCode) -> ClientError {
        ClientError::Multi { index, code }
    }

    fn ops(seen: &Seen) -> String {
        let plan = seen.plan();
        let ops: Vec<String> = plan
            .ops
            .iter()
            .map(|op| {
                let (operation, path) = described(op);
                format!("{operation} {path}")
            })
            .collect();
        ops.join(", ")
    }

    #[test]
    fn what_was_read_is_checked_before_what_is_written() {
        let mut seen = Seen::default();
        seen.reads.insert("/a".into(), present(3));
        assert!(seen.plan().needless, "one read is a state of the tree");
        seen.reads.insert("/b/c/d".into(), absent("/b"));
        seen.reads.insert("/b/e".into(), absent("/b"));
        assert!(!seen.plan().needless);
        assert_eq!(ops(&seen), "check /a, create /b, delete /b");
        seen.write(op_set("/a", "y", -1), Some(("/a", Some("y".into()))));
        assert_eq!(ops(&seen), "check /a, create /b, delete /b, set /a");
        assert_eq!(seen.known("/a"), Some(Some("y".into())), "its own write");
        assert_eq!(seen.known("/b/c/d"), Some(None));
        assert_eq!(seen.known("/z"), None);
        seen.write(op_create("/b", "", CreateMode::Persistent, vec![]), None);
        assert_eq!(ops(&seen), "check /a, set /a, create /b");
    }

    #[test]
    fn to_create_a_sequential_one_checks_nothing() {
        let mut seen = Seen::default();
        seen.reads.insert("/q-".into(), absent("/q-"));
        seen.write(
            op_create("/q-", "", CreateMode::PersistentSequential, vec![]),
            None,
        );
        assert_eq!(ops(&seen), "create /q-, delete /q-, create /q-");
    }

    #[test]
    fn only_what_was_read_makes_a_conflict() {
        let mut seen = Seen::default();
        seen.reads.insert("/a".into(), present(3));
        seen.reads.insert("/b".into(), absent("/b"));
        seen.write(op_create("/b", "", CreateMode::Persistent, vec![]), None);
        seen.write(op_delete("/c", -1), None);
        let plan = seen.plan();
        assert_eq!(ops(&seen), "check /a, create /b, delete /c");
        let conflict = |index, code| plan.conflict(at_fault(index, code));
        assert_eq!(conflict(0, ErrorCode::BadVersion), Some("/a".into()));
        assert_eq!(conflict(0, ErrorCode::NoNode), Some("/a".into()));
        assert_eq!(conflict(1, ErrorCode::NodeExists), Some("/b".into()));
        assert_eq!(
            conflict(1, ErrorCode::NoNode),
            None,
            "its parent is missing"
        );
        assert_eq!(conflict(2, ErrorCode::NoNode), None, "/c was not read");
        assert_eq!(plan.conflict(ClientError::ConnectionLoss), None);
        assert_eq!(
            refusal(&plan.ops, at_fault(2, ErrorCode::NoNode)),
            TransactionError::Refused {
                operation: "delete",
                path: "/c".into(),
                code: ErrorCode::NoNode
            }
        );
    }
}
