//! The namespace: znodes by path, and the few ways in which they change.
//!
//! Everything here is pure and the same on every server. A change either happens whole or is
//! refused with the code that a client sees; changes of an unfinished `multi` are taken back with
//! [`Tree::undo`].

mod image;
mod quota;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use self::quota::Quota;
use crate::acl;
use crate::session::SessionId;
use crate::wire::{Acl, ErrorCode, Id, Stat, perms, validate_path};

/// Where clients read who the servers are.
pub const CONFIG_PATH: &str = "/zookeeper/config";

/// What kind of znode this is, beside its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Lives until it is deleted.
    Persistent,
    /// Lives as long as this session.
    Ephemeral(SessionId),
    /// Deleted by the service some time after its last child has gone.
    Container,
    /// Deleted by the service when it has no children and its data has not been set for so many
    /// milliseconds; 1 to [`TTL_MS_MAX`].
    Ttl(i64),
}

/// The longest time that a znode may be given to live, in milliseconds: ZooKeeper's bound, who keeps
/// it beside a mark in 64 bits.
pub const TTL_MS_MAX: i64 = 0xff_ffff_ffff;

/// One znode. Its path is its key in the [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Znode {
    /// `None` is null on the wire, which is not the empty string.
    pub data: Option<Bytes>,
    /// Who may do what. Znodes with the same list share it.
    pub acl: Arc<[Acl]>,
    /// Kind.
    pub kind: Kind,
    /// zxid of the creation.
    pub czxid: u64,
    /// zxid of the last change of the data.
    pub mzxid: u64,
    /// zxid of the last creation or deletion of a child.
    pub pzxid: u64,
    /// Creation time, milliseconds since 1970.
    pub ctime: i64,
    /// Time of the last change of the data, milliseconds since 1970.
    pub mtime: i64,
    /// Number of changes of the data.
    pub version: i32,
    /// Number of changes of the access list.
    pub aversion: i32,
    /// Children ever created. Sequential names count by it; the visible `cversion` counts deletions too.
    pub created: i32,
    /// Names of the children.
    pub children: BTreeSet<String>,
}

impl Znode {
    fn new(data: Option<Bytes>, acl: Vec<Acl>, kind: Kind, stamp: Stamp) -> Self {
        Self {
            data,
            acl: acl.into(),
            kind,
            czxid: stamp.zxid,
            mzxid: stamp.zxid,
            pzxid: stamp.zxid,
            ctime: stamp.time_ms,
            mtime: stamp.time_ms,
            version: 0,
            aversion: 0,
            created: 0,
            children: BTreeSet::new(),
        }
    }

    /// A container that has had children and has none now.
    fn is_idle_container(&self) -> bool {
        self.kind == Kind::Container && self.created > 0 && self.children.is_empty()
    }

    /// When its time to live is over, should it have no children then; in milliseconds since 1970.
    fn due_ms(&self) -> Option<i64> {
        match self.kind {
            Kind::Ttl(ms) => Some(self.mtime.saturating_add(ms)),
            Kind::Persistent | Kind::Ephemeral(_) | Kind::Container => None,
        }
    }

    /// The 68 bytes of metadata that clients see.
    #[must_use]
    pub fn stat(&self) -> Stat {
        let children = i32::try_from(self.children.len()).unwrap_or(i32::MAX);
        Stat {
            czxid: self.czxid.cast_signed(),
            mzxid: self.mzxid.cast_signed(),
            ctime: self.ctime,
            mtime: self.mtime,
            version: self.version,
            // Every child that was created and is not there was deleted once.
            cversion: self.created.wrapping_mul(2).wrapping_sub(children),
            aversion: self.aversion,
            ephemeral_owner: match self.kind {
                Kind::Ephemeral(session) => session.0,
                // ZooKeeper keeps the latter two as marks in this field, and tells clients 0:
                // whatever is not 0 is ephemeral to them.
                Kind::Persistent | Kind::Container | Kind::Ttl(_) => 0,
            },
            data_length: i32::try_from(self.data.as_ref().map_or(0, Bytes::len))
                .unwrap_or(i32::MAX),
            num_children: children,
            pzxid: self.pzxid.cast_signed(),
        }
    }
}

/// When a change happens: its place in the log and the leader's clock at the proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Log index.
    pub zxid: u64,
    /// Milliseconds since 1970.
    pub time_ms: i64,
}

/// What watches are told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This znode was created.
    Created(String),
    /// This znode was deleted.
    Deleted(String),
    /// This znode's data was set.
    Data(String),
}

/// How to take one change back.
#[derive(Debug)]
pub enum Undo {
    /// Remove what was created; the parent's `created` and `pzxid` were these.
    Create {
        /// Path created.
        path: String,
        /// Parent's counter before.
        created: i32,
        /// Parent's pzxid before.
        pzxid: u64,
    },
    /// Put back what was deleted; the parent's `pzxid` was this.
    Delete {
        /// Path deleted.
        path: String,
        /// What it was.
        znode: Box<Znode>,
        /// Parent's pzxid before.
        pzxid: u64,
    },
    /// Put back the data.
    Set {
        /// Path.
        path: String,
        /// Data before.
        data: Option<Bytes>,
        /// Version before.
        version: i32,
        /// mzxid before.
        mzxid: u64,
        /// mtime before.
        mtime: i64,
    },
}

/// A new znode, as a client asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewZnode {
    /// Path; with `sequential` a prefix of it.
    pub path: String,
    /// Data.
    pub data: Option<Bytes>,
    /// Access list, not yet normalised.
    pub acl: Vec<Acl>,
    /// Kind.
    pub kind: Kind,
    /// Append the parent's counter, ten digits.
    pub sequential: bool,
}

/// The namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Znode>,
    /// Invariant: holds exactly the paths of the znodes of kind `Ephemeral`.
    ephemerals: BTreeMap<SessionId, BTreeSet<String>>,
    /// Invariant: holds exactly the paths of the containers that have had children and have none.
    idle_containers: BTreeSet<String>,
    /// Invariant: holds exactly the znodes of kind `Ttl`, by the end of their time.
    ttls: BTreeSet<(i64, String)>,
    /// Invariant: holds exactly the access lists of all znodes, and how many have each.
    acls: BTreeMap<Arc<[Acl]>, usize>,
    /// Invariant: holds exactly the paths that have a znode with limits, and what is there.
    quotas: BTreeMap<String, Quota>,
    /// Invariant: the sum of [`footprint`] over all znodes.
    data_bytes: u64,
}

/// What a znode adds to [`Tree::data_bytes`].
fn footprint(path: &str, data: &Option<Bytes>) -> u64 {
    let bytes = path.len() + data.as_ref().map_or(0, Bytes::len);
    u64::try_from(bytes).expect("a znode fits into memory")
}

impl Default for Tree {
    /// The tree of a new cluster: the root and `/zookeeper` with its two reserved children.
    fn default() -> Self {
        let stamp = Stamp {
            zxid: 0,
            time_ms: 0,
        };
        let mut tree = Self::empty();
        for path in ["/", "/zookeeper", "/zookeeper/config", "/zookeeper/quota"] {
            let acl = if path == "/zookeeper/config" {
                Acl::read_only()
            } else {
                Acl::open()
            };
            tree.insert(
                path.into(),
                Znode::new(Some(Bytes::new()), acl, Kind::Persistent, stamp),
            );
            if let Some((parent, name)) = split(path) {
                let parent = tree.nodes.get_mut(parent);
                let parent = parent.expect("parents stand before children");
                parent.children.insert(name.into());
                parent.created += 1;
            }
        }
        tree
    }
}

/// `/a/b` into `/a` and `b`; `None` for the root.
fn split(path: &str) -> Option<(&str, &str)> {
    let (parent, name) = path.rsplit_once('/')?;
    if name.is_empty() {
        return None;
    }
    Some((if parent.is_empty() { "/" } else { parent }, name))
}

/// The parent of `path`; `None` for the root.
#[must_use]
pub fn parent(path: &str) -> Option<&str> {
    split(path).map(|(parent, _)| parent)
}

fn reserved(path: &str) -> bool {
    matches!(
        path,
        "/" | "/zookeeper" | "/zookeeper/config" | "/zookeeper/quota"
    )
}

impl Tree {
    /// Without even a root.
    fn empty() -> Self {
        Self {
            nodes: BTreeMap::new(),
            ephemerals: BTreeMap::new(),
            idle_containers: BTreeSet::new(),
            ttls: BTreeSet::new(),
            acls: BTreeMap::new(),
            quotas: BTreeMap::new(),
            data_bytes: 0,
        }
    }

    /// The znode at `path`.
    #[must_use]
    pub fn znode(&self, path: &str) -> Option<&Znode> {
        self.nodes.get(path)
    }

    /// How many znodes there are, the root and the reserved ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: the root is always there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// How many znodes there are below `path`, itself not counted. Takes as long as there are.
    #[must_use]
    pub fn count_below(&self, path: &str) -> usize {
        self.below(path).count()
    }

    /// The znodes below `path`, itself excluded.
    fn below(&self, path: &str) -> impl Iterator<Item = (&String, &Znode)> {
        let prefix = if path == "/" {
            "/".to_owned()
        } else {
            format!("{path}/")
        };
        let start = (Bound::Excluded(prefix.clone()), Bound::Unbounded);
        self.nodes
            .range(start)
            .take_while(move |(path, _)| path.starts_with(&prefix))
    }

    /// All znodes in the order of their paths.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Znode)> {
        self.nodes
            .iter()
            .map(|(path, znode)| (path.as_str(), znode))
    }

    /// The ephemeral znodes of `session`, in the order of their paths.
    pub fn ephemerals(&self, session: SessionId) -> impl Iterator<Item = &str> {
        self.ephemerals
            .get(&session)
            .into_iter()
            .flatten()
            .map(String::as_str)
    }

    /// How many ephemeral znodes there are.
    #[must_use]
    pub fn ephemeral_count(&self) -> usize {
        self.ephemerals.values().map(BTreeSet::len).sum()
    }

    /// The sessions that own ephemeral znodes.
    pub fn owners(&self) -> impl ExactSizeIterator<Item = SessionId> {
        self.ephemerals.keys().copied()
    }

    /// Bytes of all paths and data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Containers that have had children and have none now.
    pub fn idle_containers(&self) -> impl Iterator<Item = &str> {
        self.idle_containers.iter().map(String::as_str)
    }

    /// Znodes whose time to live is over and that have no children, at this time of day in
    /// milliseconds since 1970.
    pub fn outlived(&self, now_ms: i64) -> impl Iterator<Item = &str> {
        self.ttls
            .iter()
            .take_while(move |(due_ms, _)| *due_ms < now_ms)
            .map(|(_, path)| path.as_str())
            .filter(|path| self.nodes[*path].children.is_empty())
    }

    /// May the service delete `path` at this time of day?
    pub(crate) fn is_reapable(&self, path: &str, now_ms: i64) -> bool {
        self.nodes.get(path).is_some_and(|znode| {
            let outlived = znode.due_ms().is_some_and(|due_ms| due_ms < now_ms);
            znode.is_idle_container() || outlived && znode.children.is_empty()
        })
    }

    fn existing(&self, path: &str) -> Result<&Znode, ErrorCode> {
        self.nodes.get(path).ok_or(ErrorCode::NoNode)
    }

    /// Reads `path` for somebody: there, and `perm` granted.
    ///
    /// # Errors
    /// `NoNode`, `NoAuth`.
    pub fn read(&self, path: &str, perm: i32, who: &[Id]) -> Result<&Znode, ErrorCode> {
        let znode = self.existing(path)?;
        permit(znode, perm, who)?;
        Ok(znode)
    }

    /// Creates a znode and answers its final path. The checks come in ZooKeeper's order.
    ///
    /// # Errors
    /// `BadArguments` (no slash), `InvalidAcl`, `NoNode` (the parent), `NoAuth`, `BadArguments` (no
    /// path otherwise), `NodeExists`, `NoChildrenForEphemerals`, `QuotaExceeded`.
    pub fn create(
        &mut self,
        new: NewZnode,
        who: &[Id],
        stamp: Stamp,
    ) -> Result<(String, Undo), ErrorCode> {
        let NewZnode {
            mut path,
            data,
            acl,
            kind,
            sequential,
        } = new;
        // A sequential name may be nothing but its number.
        let parent_path = match path.rsplit_once('/') {
            Some(("", _)) => "/".to_owned(),
            Some((parent, _)) => parent.to_owned(),
            None => return Err(ErrorCode::BadArguments),
        };
        let acl = acl::normalise(acl, who).ok_or(ErrorCode::InvalidAcl)?;
        let parent = self.nodes.get(&parent_path).ok_or(ErrorCode::NoNode)?;
        permit(parent, perms::CREATE, who)?;
        if sequential {
            let count = if planted!(SequentialByCount) {
                i32::try_from(parent.children.len()).unwrap_or(i32::MAX)
            } else {
                parent.created
            };
            path.push_str(&format!("{count:010}"));
        }
        validate_path(&path).map_err(|_| ErrorCode::BadArguments)?;
        let Some((_, name)) = split(&path) else {
            return Err(ErrorCode::NodeExists);
        };
        if parent.children.contains(name) {
            return Err(ErrorCode::NodeExists);
        }
        if matches!(parent.kind, Kind::Ephemeral(_)) {
            return Err(ErrorCode::NoChildrenForEphemerals);
        }
        self.check_quota(&path, 1, data.as_ref().map_or(0, Bytes::len))?;
        let undo = Undo::Create {
            path: path.clone(),
            created: parent.created,
            pzxid: parent.pzxid,
        };
        let name = name.to_owned();
        let parent = self.nodes.get_mut(&parent_path).expect("just seen");
        if parent.is_idle_container() {
            self.idle_containers.remove(&parent_path);
        }
        parent.children.insert(name);
        parent.created = parent.created.wrapping_add(1);
        parent.pzxid = stamp.zxid;
        self.insert(path.clone(), Znode::new(data, acl, kind, stamp));
        Ok((path, undo))
    }

    /// Deletes a znode.
    ///
    /// # Errors
    /// `BadArguments` (root and reserved paths), `NoNode`, `NoAuth`, `BadVersion`, `NotEmpty`.
    pub fn delete(
        &mut self,
        path: &str,
        version: i32,
        who: &[Id],
        stamp: Stamp,
    ) -> Result<Undo, ErrorCode> {
        if reserved(path) {
            return Err(ErrorCode::BadArguments);
        }
        let parent = parent(path).ok_or(ErrorCode::BadArguments)?;
        let parent = self.existing(parent)?;
        let znode = self.existing(path)?;
        permit(parent, perms::DELETE, who)?;
        check_version(version, znode.version)?;
        if !znode.children.is_empty() {
            return Err(ErrorCode::NotEmpty);
        }
        Ok(self.remove(path, stamp.zxid))
    }

    /// Takes away a childless znode that exists and is not the root.
    pub(crate) fn remove(&mut self, path: &str, zxid: u64) -> Undo {
        let znode = self.take(path);
        assert!(znode.children.is_empty(), "a znode with children cannot go");
        let (parent_path, name) = split(path).expect("the root is never removed");
        let parent = self.nodes.get_mut(parent_path);
        let parent = parent.expect("a znode's parent exists");
        parent.children.remove(name);
        let pzxid = std::mem::replace(&mut parent.pzxid, zxid);
        if parent.is_idle_container() {
            self.idle_containers.insert(parent_path.to_owned());
        }
        Undo::Delete {
            path: path.to_owned(),
            znode: Box::new(znode),
            pzxid,
        }
    }

    /// Sets a znode's data.
    ///
    /// # Errors
    /// `NoNode`, `NoAuth`, `QuotaExceeded`, `BadVersion`.
    pub fn set_data(
        &mut self,
        path: &str,
        data: Option<Bytes>,
        version: i32,
        who: &[Id],
        stamp: Stamp,
    ) -> Result<(Stat, Undo), ErrorCode> {
        let znode = self.read(path, perms::WRITE, who)?;
        let (before, after) = (znode.data.as_ref(), data.as_ref());
        let grows = after
            .map_or(0, Bytes::len)
            .saturating_sub(before.map_or(0, Bytes::len));
        self.check_quota(path, 0, grows)?;
        check_version(version, znode.version)?;
        let version = znode.version.wrapping_add(1);
        let undo = self.put(path, data, version, stamp);
        Ok((self.nodes[path].stat(), undo))
    }

    /// Replaces data that is there.
    fn put(&mut self, path: &str, data: Option<Bytes>, version: i32, stamp: Stamp) -> Undo {
        let znode = self.nodes.get_mut(path).expect("the caller looked it up");
        let (before, after) = (footprint(path, &znode.data), footprint(path, &data));
        if let Some(due_ms) = znode.due_ms() {
            self.ttls.remove(&(due_ms, path.to_owned()));
        }
        let undo = Undo::Set {
            path: path.to_owned(),
            data: std::mem::replace(&mut znode.data, data),
            version: std::mem::replace(&mut znode.version, version),
            mzxid: std::mem::replace(&mut znode.mzxid, stamp.zxid),
            mtime: std::mem::replace(&mut znode.mtime, stamp.time_ms),
        };
        if let Some(due_ms) = znode.due_ms() {
            self.ttls.insert((due_ms, path.to_owned()));
        }
        self.data_bytes = self.data_bytes - before + after;
        let grown = after.cast_signed() - before.cast_signed();
        self.account(path, 0, grown);
        undo
    }

    /// Sets the data of a znode that is always there, in the service's own name.
    pub(crate) fn overwrite(&mut self, path: &str, data: Bytes, stamp: Stamp) -> Stat {
        let znode = self
            .nodes
            .get_mut(path)
            .expect("a reserved znode is always there");
        znode.data = Some(data);
        znode.version = znode.version.wrapping_add(1);
        znode.mzxid = stamp.zxid;
        znode.mtime = stamp.time_ms;
        znode.stat()
    }

    /// Sets a znode's access list. (No part of a `multi`, so it needs no undo.)
    ///
    /// # Errors
    /// `InvalidAcl`, `NoNode`, `NoAuth`, `BadVersion`.
    pub fn set_acl(
        &mut self,
        path: &str,
        acl: Vec<Acl>,
        version: i32,
        who: &[Id],
    ) -> Result<Stat, ErrorCode> {
        let acl = acl::normalise(acl, who).ok_or(ErrorCode::InvalidAcl)?;
        let znode = self.nodes.get_mut(path).ok_or(ErrorCode::NoNode)?;
        permit(znode, perms::ADMIN, who)?;
        check_version(version, znode.aversion)?;
        let before = std::mem::replace(&mut znode.acl, share(&mut self.acls, acl.into()));
        znode.aversion = znode.aversion.wrapping_add(1);
        let stat = znode.stat();
        unshare(&mut self.acls, &before);
        Ok(stat)
    }

    /// Is the znode there, at that version?
    ///
    /// # Errors
    /// `NoNode`, `NoAuth`, `BadVersion`.
    pub fn check(&self, path: &str, version: i32, who: &[Id]) -> Result<(), ErrorCode> {
        check_version(version, self.read(path, perms::READ, who)?.version)
    }

    /// Takes one change back. Changes are taken back in the reverse of their order.
    pub fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Create {
                path,
                created,
                pzxid,
            } => {
                self.remove(&path, pzxid);
                let parent_path = parent(&path).expect("what was created is not the root");
                let parent = self.nodes.get_mut(parent_path);
                let parent = parent.expect("a znode's parent exists");
                parent.created = created;
                // It may never have had a child.
                if !parent.is_idle_container() {
                    self.idle_containers.remove(parent_path);
                }
            }
            Undo::Delete { path, znode, pzxid } => {
                let (parent_path, name) = split(&path).expect("what was deleted is not the root");
                self.idle_containers.remove(parent_path);
                let parent = self.nodes.get_mut(parent_path);
                let parent = parent.expect("a znode's parent exists");
                parent.children.insert(name.to_owned());
                parent.pzxid = pzxid;
                self.insert(path, *znode);
            }
            Undo::Set {
                path,
                data,
                version,
                mzxid,
                mtime,
            } => {
                let stamp = Stamp {
                    zxid: mzxid,
                    time_ms: mtime,
                };
                let _undone: Undo = self.put(&path, data, version, stamp);
            }
        }
    }

    /// Puts a znode into its place, of which its parent knows.
    fn insert(&mut self, path: String, mut znode: Znode) {
        let bytes = footprint(&path, &znode.data);
        self.data_bytes += bytes;
        znode.acl = share(&mut self.acls, znode.acl);
        match znode.kind {
            Kind::Persistent => {}
            Kind::Ephemeral(session) => {
                let own = self.ephemerals.entry(session).or_default();
                own.insert(path.clone());
            }
            Kind::Container => {
                if znode.is_idle_container() {
                    self.idle_containers.insert(path.clone());
                }
            }
            Kind::Ttl(_) => {
                let due_ms = znode.due_ms().expect("of this kind");
                self.ttls.insert((due_ms, path.clone()));
            }
        }
        let length = znode.data.as_ref().map_or(0, Bytes::len);
        if let Some(replaced) = self.nodes.insert(path.clone(), znode) {
            panic!("{path} was there already: {replaced:?}");
        }
        self.account(&path, 1, signed(length));
    }

    /// Takes a znode out of its place.
    fn take(&mut self, path: &str) -> Znode {
        let znode = self.nodes.remove(path).expect("the caller looked it up");
        self.data_bytes -= footprint(path, &znode.data);
        unshare(&mut self.acls, &znode.acl);
        match znode.kind {
            Kind::Persistent => {}
            Kind::Ephemeral(session) => {
                if let Some(paths) = self.ephemerals.get_mut(&session) {
                    paths.remove(path);
                    if paths.is_empty() {
                        self.ephemerals.remove(&session);
                    }
                }
            }
            Kind::Container => {
                self.idle_containers.remove(path);
            }
            Kind::Ttl(_) => {
                let due_ms = znode.due_ms().expect("of this kind");
                self.ttls.remove(&(due_ms, path.to_owned()));
            }
        }
        let length = znode.data.as_ref().map_or(0, Bytes::len);
        self.account(path, -1, -signed(length));
        znode
    }

    /// Checks what must hold after every change.
    ///
    /// # Panics
    /// If it does not.
    pub fn check_invariants(&self) {
        for (path, znode) in &self.nodes {
            if let Some((parent, name)) = split(path) {
                let parent = self.nodes.get(parent).expect("a znode's parent exists");
                let listed = parent.children.contains(name);
                assert!(listed, "{path} is not among its parent's children");
                let ephemeral = matches!(parent.kind, Kind::Ephemeral(_));
                assert!(!ephemeral, "{path} under an ephemeral");
            }
            for name in &znode.children {
                let child = if path == "/" {
                    format!("/{name}")
                } else {
                    format!("{path}/{name}")
                };
                let there = self.nodes.contains_key(&child);
                assert!(there, "{child} is a child that does not exist");
            }
        }
        // Everything but the znodes themselves follows from them.
        let mut again = Self::empty();
        for (path, znode) in &self.nodes {
            again.insert(path.clone(), znode.clone());
        }
        assert_eq!(*self, again, "the indexes do not fit the znodes");
    }
}

/// One copy of every access list.
fn share(acls: &mut BTreeMap<Arc<[Acl]>, usize>, acl: Arc<[Acl]>) -> Arc<[Acl]> {
    if let Some((shared, _)) = acls.get_key_value(&acl) {
        let shared = shared.clone();
        *acls.get_mut(&acl).expect("just seen") += 1;
        return shared;
    }
    acls.insert(acl.clone(), 1);
    acl
}

fn unshare(acls: &mut BTreeMap<Arc<[Acl]>, usize>, acl: &Arc<[Acl]>) {
    let count = acls.get_mut(acl).expect("every list in use is counted");
    *count -= 1;
    if *count == 0 {
        acls.remove(acl);
    }
}

fn signed(length: usize) -> i64 {
    i64::try_from(length).expect("data fits into memory")
}

fn permit(znode: &Znode, perm: i32, who: &[Id]) -> Result<(), ErrorCode> {
    if acl::allows(&znode.acl, perm, who) {
        Ok(())
    } else {
        Err(ErrorCode::NoAuth)
    }
}

fn check_version(expected: i32, actual: i32) -> Result<(), ErrorCode> {
    if expected == -1 || expected == actual {
        Ok(())
    } else {
        Err(ErrorCode::BadVersion)
    }
}
