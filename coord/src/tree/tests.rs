//! What the tree keeps beside its znodes: quotas, shared lists, and the form of a snapshot.

use super::*;

struct Bench {
    tree: Tree,
    zxid: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            tree: Tree::default(),
            zxid: 0,
        }
    }

    fn stamp(&mut self) -> Stamp {
        self.zxid += 1;
        Stamp {
            zxid: self.zxid,
            time_ms: 1000,
        }
    }

    fn create(&mut self, path: &str, data: &str) -> Result<Undo, ErrorCode> {
        let new = NewZnode {
            path: path.into(),
            data: Some(Bytes::copy_from_slice(data.as_bytes())),
            acl: Acl::open(),
            kind: Kind::Persistent,
            sequential: false,
        };
        let stamp = self.stamp();
        let made = self.tree.create(new, &[], stamp).map(|(_, undo)| undo);
        self.tree.check_invariants();
        made
    }

    fn set(&mut self, path: &str, data: &str) -> Result<Undo, ErrorCode> {
        let data = Some(Bytes::copy_from_slice(data.as_bytes()));
        let stamp = self.stamp();
        let set = self.tree.set_data(path, data, -1, &[], stamp);
        self.tree.check_invariants();
        set.map(|(_, undo)| undo)
    }

    fn delete(&mut self, path: &str) -> Undo {
        let stamp = self.stamp();
        let undo = self.tree.delete(path, -1, &[], stamp).unwrap();
        self.tree.check_invariants();
        undo
    }

    fn undo(&mut self, undo: Undo) {
        self.tree.undo(undo);
        self.tree.check_invariants();
    }

    fn quota(&mut self, path: &str, limits: &str) {
        let mut at = "/zookeeper/quota".to_owned();
        for name in path.split('/').skip(1) {
            at = format!("{at}/{name}");
            let _: Result<Undo, ErrorCode> = self.create(&at, "");
        }
        self.create(&format!("{at}/zookeeper_limits"), limits)
            .unwrap();
        self.create(&format!("{at}/zookeeper_stats"), "count=0,bytes=0")
            .unwrap();
    }

    fn used(&self, path: &str) -> String {
        let stats = format!("/zookeeper/quota{path}/zookeeper_stats");
        let data = self.tree.znode(&stats).unwrap().data.clone().unwrap();
        String::from_utf8(data.to_vec()).unwrap()
    }
}

const EXCEEDED: Option<ErrorCode> = Some(ErrorCode::QuotaExceeded);

#[test]
fn what_there_is_is_counted_and_shown() {
    let mut bench = Bench::new();
    bench.create("/a", "12").unwrap();
    bench.create("/a/b", "345").unwrap();
    bench.create("/ab", "not below").unwrap();
    bench.quota("/a", "count=1,bytes=1");
    assert_eq!(bench.used("/a"), "count=2,bytes=5");
    let undo = bench.create("/a/c", "6").unwrap();
    assert_eq!(
        bench.used("/a"),
        "count=3,bytes=6",
        "a soft limit refuses nothing"
    );
    bench.undo(undo);
    assert_eq!(bench.used("/a"), "count=2,bytes=5");
    let undo = bench.set("/a", "123456").unwrap();
    assert_eq!(bench.used("/a"), "count=2,bytes=9");
    bench.undo(undo);
    let undo = bench.delete("/a/b");
    assert_eq!(bench.used("/a"), "count=1,bytes=2");
    bench.undo(undo);
    assert_eq!(bench.used("/a"), "count=2,bytes=5");
    let stats = bench
        .tree
        .znode("/zookeeper/quota/a/zookeeper_stats")
        .unwrap();
    assert_eq!(
        (stats.version, stats.mzxid),
        (0, stats.czxid),
        "it follows by itself"
    );
}

#[test]
fn a_hard_limit_refuses_what_would_pass_it_and_nothing_else() {
    let mut bench = Bench::new();
    bench.create("/a", "").unwrap();
    bench.quota("/a", "count=-1,bytes=-1;countHardLimit=2;byteHardLimit=10");
    bench.create("/a/b", "1234567890").unwrap();
    assert_eq!(bench.create("/a/c", "").err(), EXCEEDED);
    assert_eq!(bench.set("/a", "1").err(), EXCEEDED);
    assert!(bench.set("/a/b", "12345").is_ok(), "less is always allowed");
    assert!(bench.set("/a", "12345").is_ok());
    assert_eq!(bench.set("/a", "123456").err(), EXCEEDED);
    let _undo = bench.delete("/a/b");
    assert_eq!(bench.create("/a/c", "123456").err(), EXCEEDED);
    assert!(bench.create("/a/c", "").is_ok());
    let limits = "/zookeeper/quota/a/zookeeper_limits";
    bench.set(limits, "countHardLimit=3").unwrap();
    assert!(bench.create("/a/d", "much more than ten bytes").is_ok());
    assert_eq!(bench.create("/a/e", "").err(), EXCEEDED);
    let undo = bench.delete(limits);
    assert!(bench.create("/a/e", "").is_ok());
    bench.undo(undo);
    assert_eq!(
        bench.create("/a/f", "").err(),
        EXCEEDED,
        "the limit is back"
    );
}

#[test]
fn quotas_inside_each_other_all_count() {
    let mut bench = Bench::new();
    bench.create("/a", "").unwrap();
    bench.quota("/a", "countHardLimit=3");
    bench.create("/a/b", "").unwrap();
    bench.quota("/a/b", "countHardLimit=10");
    bench.create("/a/b/1", "").unwrap();
    assert_eq!(
        (&*bench.used("/a"), &*bench.used("/a/b")),
        ("count=3,bytes=0", "count=2,bytes=0")
    );
    assert_eq!(bench.create("/a/b/2", "").err(), EXCEEDED);
}

#[test]
fn limits_that_make_no_sense_are_none() {
    let mut bench = Bench::new();
    bench.create("/a", "").unwrap();
    bench.quota("/a", "countHardLimit=,byteHardLimit=many;=;;count,bytes=-7");
    assert!(bench.create("/a/b", "data").is_ok());
    bench.quota("/zookeeper", "countHardLimit=0");
    assert!(
        bench.create("/zookeeper/x", "").is_ok(),
        "what is reserved has no quota"
    );
}

#[test]
fn equal_access_lists_are_one() {
    let mut bench = Bench::new();
    for i in 0..100 {
        let _: Undo = bench.create(&format!("/{i}"), "").unwrap();
    }
    let acl = |bench: &Bench, path: &str| bench.tree.znode(path).unwrap().acl.clone();
    assert!(Arc::ptr_eq(&acl(&bench, "/1"), &acl(&bench, "/99")));
    assert_eq!(
        bench.tree.acls.len(),
        2,
        "open, and that of /zookeeper/config"
    );
    bench.tree.set_acl("/1", Acl::read_only(), -1, &[]).unwrap();
    bench.tree.check_invariants();
    assert!(Arc::ptr_eq(
        &acl(&bench, "/1"),
        &acl(&bench, "/zookeeper/config")
    ));
}

#[test]
fn a_snapshot_holds_everything_that_does_not_follow() {
    let mut bench = Bench::new();
    bench.create("/a", "12").unwrap();
    bench.quota("/a", "countHardLimit=3");
    bench.create("/a/b", "").unwrap();
    for (path, kind) in [
        ("/e", Kind::Ephemeral(SessionId(7))),
        ("/c", Kind::Container),
        ("/t", Kind::Ttl(5)),
    ] {
        let new = NewZnode {
            path: path.into(),
            data: None,
            acl: Acl::read_only(),
            kind,
            sequential: false,
        };
        let stamp = bench.stamp();
        bench.tree.create(new, &[], stamp).unwrap();
    }
    let bytes = postcard::to_allocvec(&bench.tree).unwrap();
    let tree: Tree = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(tree, bench.tree);
    tree.check_invariants();
    bench.tree = tree;
    bench.create("/a/c", "").unwrap();
    assert_eq!(bench.create("/a/d", "").err(), EXCEEDED);
    assert_eq!(bench.tree.outlived(1006).collect::<Vec<_>>(), ["/t"]);
    assert_eq!(bench.tree.outlived(1005).count(), 0);
}

#[test]
fn damaged_trees_are_refused() {
    let bytes = postcard::to_allocvec(&Tree::default()).unwrap();
    let mut refused = 0;
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1 << bit;
            refused += usize::from(postcard::from_bytes::<Tree>(&damaged).is_err());
        }
        assert!(postcard::from_bytes::<Tree>(&bytes[..place]).is_err());
    }
    assert!(refused > 0, "a znode without its parent, for one");
}
