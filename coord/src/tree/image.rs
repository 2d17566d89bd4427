//! The tree in a snapshot: each access list once, and of each znode what does not follow from others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::de::Error as _;
use serde::ser::SerializeTuple as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Kind, Tree, Znode, split};
use crate::wire::Acl;

#[derive(Serialize, Deserialize)]
struct ZnodeImage {
    data: Option<Bytes>,
    /// Its place among the lists.
    acl: usize,
    kind: Kind,
    czxid: u64,
    mzxid: u64,
    pzxid: u64,
    ctime: i64,
    mtime: i64,
    version: i32,
    aversion: i32,
    created: i32,
}

struct Nodes<'a> {
    tree: &'a Tree,
    /// Where each list stands.
    acls: BTreeMap<&'a Arc<[Acl]>, usize>,
}

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let lists: Vec<&[Acl]> = self.acls.keys().map(|acl| &acl[..]).collect();
        let nodes = Nodes {
            tree: self,
            acls: self.acls.keys().zip(0..).collect(),
        };
        let mut tuple = serializer.serialize_tuple(2)?;
        tuple.serialize_element(&lists)?;
        tuple.serialize_element(&nodes)?;
        tuple.end()
    }
}

impl Serialize for Nodes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.tree.nodes.iter().map(|(path, znode)| {
            let image = ZnodeImage {
                data: znode.data.clone(),
                acl: self.acls[&znode.acl],
                kind: znode.kind,
                czxid: znode.czxid,
                mzxid: znode.mzxid,
                pzxid: znode.pzxid,
                ctime: znode.ctime,
                mtime: znode.mtime,
                version: znode.version,
                aversion: znode.aversion,
                created: znode.created,
            };
            (path, image)
        }))
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (lists, nodes): (Vec<Vec<Acl>>, Vec<(String, ZnodeImage)>) =
            Deserialize::deserialize(deserializer)?;
        let lists: Vec<Arc<[Acl]>> = lists.into_iter().map(Into::into).collect();
        let mut children: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (path, _) in &nodes {
            if let Some((parent, name)) = split(path) {
                let siblings = children.entry(parent.to_owned()).or_default();
                siblings.insert(name.to_owned());
            }
        }
        let mut tree = Self::empty();
        for (path, image) in nodes {
            if tree.nodes.contains_key(&path) {
                return Err(D::Error::custom("a znode stands there twice"));
            }
            let acl = lists.get(image.acl);
            let acl = acl.ok_or_else(|| D::Error::custom("an access list is not there"))?;
            let znode = Znode {
                data: image.data,
                acl: acl.clone(),
                kind: image.kind,
                czxid: image.czxid,
                mzxid: image.mzxid,
                pzxid: image.pzxid,
                ctime: image.ctime,
                mtime: image.mtime,
                version: image.version,
                aversion: image.aversion,
                created: image.created,
                children: children.remove(&path).unwrap_or_default(),
            };
            tree.insert(path, znode);
        }
        match children.first_key_value() {
            Some(_) => Err(D::Error::custom("a znode has no parent")),
            None => Ok(tree),
        }
    }
}
