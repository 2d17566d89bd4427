//! ZooKeeper's semantics, and the traps of it, at the point where they are decided.

use super::*;
use crate::tree::Kind;
use crate::wire::{CreateMode, Id};

struct Bench {
    state: State,
    session: SessionId,
    attached: u64,
    number: u64,
    changes: Vec<Change>,
}

const RUN: Run = Run {
    server: 1,
    incarnation: 9,
};

fn entry(command: Command) -> Entry {
    Entry {
        time_ms: 1_000_000,
        proposal: Proposal {
            origin: RUN,
            command,
        },
    }
}

fn new_znode(path: &str, mode: CreateMode, session: SessionId) -> NewZnode {
    NewZnode {
        path: path.into(),
        data: Some(Bytes::from_static(b"data")),
        acl: Acl::open(),
        kind: if mode.is_ephemeral() {
            Kind::Ephemeral(session)
        } else {
            Kind::Persistent
        },
        sequential: mode.is_sequential(),
    }
}

impl Bench {
    fn new() -> Self {
        let mut state = State::default();
        let command = Command::Create {
            request: 1,
            timeout_ms: 100,
            password: [5; 16],
        };
        let (outcome, _) = state.apply(1, &entry(command));
        let Outcome::Created { session } = outcome else {
            panic!("{outcome:?}")
        };
        Self {
            state,
            session,
            attached: 1,
            number: 0,
            changes: Vec::new(),
        }
    }

    fn apply(&mut self, command: Command) -> Outcome {
        let (outcome, changes) = self.state.apply(self.state.zxid + 1, &entry(command));
        self.changes = changes;
        self.state.tree.check_invariants();
        outcome
    }

    fn write_as(&mut self, who: &[Id], op: Op) -> Result<Done, Refused> {
        self.number += 1;
        let (session, attached, number) = (self.session, self.attached, self.number);
        let who = who.to_vec();
        match self.apply(Command::Write {
            session,
            attached,
            number,
            who,
            op,
        }) {
            Outcome::Written(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn write(&mut self, op: Op) -> Result<Done, Refused> {
        self.write_as(&[], op)
    }

    fn create(&mut self, path: &str, mode: CreateMode) -> Result<String, ErrorCode> {
        match self.write(Op::Create(new_znode(path, mode, self.session))) {
            Ok(Done::Created(path, _)) => Ok(path),
            Ok(other) => panic!("{other:?}"),
            Err(refused) => Err(refused.code),
        }
    }

    fn delete(&mut self, path: &str, version: i32) -> Result<(), ErrorCode> {
        self.write(Op::Delete {
            path: path.into(),
            version,
        })
        .map(drop)
        .map_err(|r| r.code)
    }

    fn set(&mut self, path: &str, version: i32) -> Result<Stat, ErrorCode> {
        match self.write(Op::SetData {
            path: path.into(),
            data: None,
            version,
        }) {
            Ok(Done::Set(stat)) => Ok(stat),
            Ok(other) => panic!("{other:?}"),
            Err(refused) => Err(refused.code),
        }
    }

    fn stat(&self, path: &str) -> Stat {
        self.state.tree.znode(path).expect("it is there").stat()
    }
}

use CreateMode::{Ephemeral, EphemeralSequential, Persistent, PersistentSequential};

#[test]
fn creation_is_refused_in_zookeepers_order() {
    let mut bench = Bench::new();
    assert_eq!(bench.create("/a/b", Persistent), Err(ErrorCode::NoNode));
    assert_eq!(bench.create("/a", Ephemeral).as_deref(), Ok("/a"));
    assert_eq!(bench.create("/a", Persistent), Err(ErrorCode::NodeExists));
    assert_eq!(
        bench.create("/a/b", Persistent),
        Err(ErrorCode::NoChildrenForEphemerals)
    );
    assert_eq!(bench.create("/", Persistent), Err(ErrorCode::NodeExists));
    let mut bare = new_znode("/none/x", Persistent, bench.session);
    bare.acl.clear();
    let refused = bench.write(Op::Create(bare)).unwrap_err();
    assert_eq!(
        refused.code,
        ErrorCode::InvalidAcl,
        "the list is looked at before the parent"
    );
}

#[test]
fn sequential_names_count_creations_and_the_visible_cversion_deletions_too() {
    let mut bench = Bench::new();
    bench.create("/q", Persistent).unwrap();
    assert_eq!(
        bench.create("/q/n", PersistentSequential).unwrap(),
        "/q/n0000000000"
    );
    assert_eq!(bench.create("/q/x", Persistent).unwrap(), "/q/x");
    bench.delete("/q/n0000000000", -1).unwrap();
    assert_eq!(bench.stat("/q").cversion, 3);
    assert_eq!(
        bench.create("/q/", EphemeralSequential).unwrap(),
        "/q/0000000002"
    );
    assert_eq!(bench.stat("/q").num_children, 2);
    assert_eq!(bench.stat("/q").cversion, 4);
    assert_eq!(bench.stat("/q").pzxid.cast_unsigned(), bench.state.zxid);
}

#[test]
fn versions_guard_and_count() {
    let mut bench = Bench::new();
    bench.create("/v", Persistent).unwrap();
    assert_eq!(bench.set("/v", 1), Err(ErrorCode::BadVersion));
    assert_eq!(bench.set("/v", 0).map(|stat| stat.version), Ok(1));
    assert_eq!(bench.set("/v", -1).map(|stat| stat.version), Ok(2));
    assert_eq!(bench.delete("/v", 1), Err(ErrorCode::BadVersion));
    assert_eq!(bench.set("/w", -1), Err(ErrorCode::NoNode));
    let zxid = bench.state.zxid;
    assert_eq!(
        bench.stat("/v").mzxid.cast_unsigned(),
        zxid - 2,
        "refusals consume zxids too"
    );
    assert_eq!(bench.delete("/v", 2), Ok(()));
}

#[test]
fn the_root_and_the_reserved_znodes_stay() {
    let mut bench = Bench::new();
    for path in ["/", "/zookeeper", "/zookeeper/config", "/zookeeper/quota"] {
        assert_eq!(
            bench.delete(path, -1),
            Err(ErrorCode::BadArguments),
            "{path}"
        );
    }
    bench.create("/p", Persistent).unwrap();
    bench.create("/p/c", Persistent).unwrap();
    assert_eq!(bench.delete("/p", -1), Err(ErrorCode::NotEmpty));
}

#[test]
fn a_failed_multi_leaves_nothing() {
    let mut bench = Bench::new();
    bench.create("/m", Persistent).unwrap();
    bench.create("/m/old", Ephemeral).unwrap();
    let before = bench.state.tree.clone();
    let session = bench.session;
    let parts = vec![
        Op::Create(new_znode("/m/n", EphemeralSequential, session)),
        Op::SetData {
            path: "/m".into(),
            data: None,
            version: 0,
        },
        Op::SetData {
            path: "/m".into(),
            data: None,
            version: 1,
        },
        Op::Delete {
            path: "/m/old".into(),
            version: 0,
        },
        Op::Create(new_znode("/m/old", Persistent, session)),
        Op::Check {
            path: "/m".into(),
            version: 7,
        },
        Op::Delete {
            path: "/m".into(),
            version: -1,
        },
    ];
    let refused = bench.write(Op::Multi(parts)).unwrap_err();
    assert_eq!(
        refused,
        Refused {
            code: ErrorCode::BadVersion,
            part: Some(5)
        }
    );
    assert_eq!(bench.state.tree, before);
    assert_eq!(bench.changes, []);
    bench.state.tree.check_invariants();
}

#[test]
fn the_parts_of_a_multi_see_each_other_and_share_a_zxid() {
    let mut bench = Bench::new();
    let session = bench.session;
    let parts = vec![
        Op::Create(new_znode("/m", Persistent, session)),
        Op::Create(new_znode("/m/c", Persistent, session)),
        Op::Check {
            path: "/m".into(),
            version: 0,
        },
        Op::Delete {
            path: "/m/c".into(),
            version: 0,
        },
    ];
    let Ok(Done::Multi(done)) = bench.write(Op::Multi(parts)) else {
        panic!("all or none")
    };
    assert_eq!(done.len(), 4);
    assert_eq!(
        bench.changes,
        [
            Change::Created("/m".into()),
            Change::Created("/m/c".into()),
            Change::Deleted("/m/c".into())
        ]
    );
    let stat = bench.stat("/m");
    assert_eq!((stat.czxid, stat.pzxid), (stat.czxid, stat.czxid));
    assert_eq!(bench.write(Op::Multi(vec![])), Ok(Done::Multi(vec![])));
}

#[test]
fn a_malformed_part_refuses_the_whole_with_its_code() {
    let mut bench = Bench::new();
    let session = bench.session;
    let parts = vec![
        Op::Create(new_znode("/m", Persistent, session)),
        Op::Malformed(ErrorCode::Unimplemented),
    ];
    let refused = bench.write(Op::Multi(parts)).unwrap_err();
    assert_eq!(
        refused,
        Refused {
            code: ErrorCode::Unimplemented,
            part: Some(1)
        }
    );
    assert!(bench.state.tree.znode("/m").is_none());
}

#[test]
fn ephemerals_go_with_their_session_in_one_step() {
    let mut bench = Bench::new();
    bench.create("/e1", Ephemeral).unwrap();
    bench.create("/d", Persistent).unwrap();
    bench.create("/d/e2", Ephemeral).unwrap();
    assert_eq!(bench.stat("/e1").ephemeral_owner, bench.session.0);
    let (session, attached) = (bench.session, bench.attached);
    let stale = Command::Expire {
        session,
        attached: attached + 1,
    };
    assert_eq!(
        bench.apply(stale),
        Outcome::Expired { session: None },
        "it has changed hands"
    );
    let outcome = bench.apply(Command::Expire { session, attached });
    assert_eq!(
        outcome,
        Outcome::Expired {
            session: Some(session)
        }
    );
    assert_eq!(
        bench.changes,
        [
            Change::Deleted("/d/e2".into()),
            Change::Deleted("/e1".into())
        ]
    );
    assert!(bench.state.sessions.is_empty());
    assert_eq!(bench.state.tree.ephemeral_count(), 0);
    let write = Command::Write {
        session,
        attached,
        number: 4,
        who: vec![],
        op: Op::Close,
    };
    assert_eq!(
        bench.apply(write),
        Outcome::Void,
        "a dead session writes nothing"
    );
}

#[test]
fn writes_are_applied_once_and_in_order() {
    let mut bench = Bench::new();
    bench.create("/w", Persistent).unwrap();
    let (session, attached) = (bench.session, bench.attached);
    let set = |number| Command::Write {
        session,
        attached,
        number,
        who: vec![],
        op: Op::SetData {
            path: "/w".into(),
            data: None,
            version: -1,
        },
    };
    assert_eq!(
        bench.apply(set(3)),
        Outcome::Void,
        "the one before it is missing"
    );
    assert!(matches!(bench.apply(set(2)), Outcome::Written(Ok(_))));
    assert_eq!(bench.apply(set(2)), Outcome::Void, "it comes a second time");
    assert!(matches!(bench.apply(set(3)), Outcome::Written(Ok(_))));
    assert_eq!(bench.stat("/w").version, 2);
}

#[test]
fn a_session_that_moves_leaves_its_writes_behind() {
    let mut bench = Bench::new();
    bench.create("/w", Persistent).unwrap();
    let session = bench.session;
    let attach = |request, password: Vec<u8>| Command::Attach {
        request,
        session,
        password,
        timeout_ms: 200,
    };
    assert_eq!(bench.apply(attach(2, vec![6; 16])), Outcome::AttachRefused);
    assert_eq!(
        bench.apply(attach(2, vec![])),
        Outcome::AttachRefused,
        "no password is not any"
    );
    let old = bench.attached;
    assert_eq!(
        bench.apply(attach(2, vec![5; 16])),
        Outcome::Attached { session }
    );
    let attached = bench.state.zxid;
    assert_eq!(bench.state.sessions[&session].attached, attached);
    assert_eq!(bench.state.sessions[&session].timeout_ms, 200);
    assert_eq!(
        bench.apply(attach(2, vec![5; 16])),
        Outcome::Attached { session }
    );
    assert_eq!(
        bench.state.sessions[&session].attached, attached,
        "a repetition changes nothing"
    );
    let late = Command::Write {
        session,
        attached: old,
        number: 2,
        who: vec![],
        op: Op::Delete {
            path: "/w".into(),
            version: -1,
        },
    };
    assert_eq!(bench.apply(late), Outcome::Void);
    assert!(bench.state.tree.znode("/w").is_some());
}

#[test]
fn access_lists_are_kept() {
    let mut bench = Bench::new();
    let me = Id {
        scheme: "digest".into(),
        id: "me:hash".into(),
    };
    let mut own = new_znode("/mine", Persistent, bench.session);
    own.acl = vec![Acl {
        perms: 31,
        id: Id {
            scheme: "auth".into(),
            id: String::new(),
        },
    }];
    let refused = bench.write(Op::Create(own.clone())).unwrap_err();
    assert_eq!(
        refused.code,
        ErrorCode::InvalidAcl,
        "nobody has been proved"
    );
    bench
        .write_as(std::slice::from_ref(&me), Op::Create(own))
        .unwrap();
    assert_eq!(bench.set("/mine", -1), Err(ErrorCode::NoAuth));
    assert_eq!(bench.create("/mine/c", Persistent), Err(ErrorCode::NoAuth));
    let open = Op::SetAcl {
        path: "/mine".into(),
        acl: Acl::open(),
        version: 0,
    };
    assert_eq!(
        bench.write(open.clone()).unwrap_err().code,
        ErrorCode::NoAuth
    );
    let Ok(Done::Set(stat)) = bench.write_as(&[me], open) else {
        panic!("it is mine")
    };
    assert_eq!((stat.aversion, stat.version), (1, 0));
    assert_eq!(bench.set("/mine", -1).map(|stat| stat.version), Ok(1));
    bench
        .write(Op::Create(new_znode("/mine/c", Persistent, bench.session)))
        .unwrap();
    assert_eq!(bench.set("/zookeeper/config", -1), Err(ErrorCode::NoAuth));
}

#[test]
fn containers_are_reaped_when_their_last_child_has_gone() {
    let mut bench = Bench::new();
    let session = bench.session;
    let container = NewZnode {
        kind: Kind::Container,
        ..new_znode("/c", Persistent, session)
    };
    bench.write(Op::Create(container)).unwrap();
    let reap = || Command::Reap { path: "/c".into() };
    bench.apply(reap());
    assert!(
        bench.state.tree.znode("/c").is_some(),
        "it never had a child"
    );
    bench.create("/c/x", Persistent).unwrap();
    bench.apply(reap());
    assert!(bench.state.tree.znode("/c").is_some(), "it has a child");
    bench.delete("/c/x", -1).unwrap();
    assert_eq!(
        bench.state.tree.idle_containers().collect::<Vec<_>>(),
        ["/c"]
    );
    bench.apply(reap());
    assert_eq!(bench.changes, [Change::Deleted("/c".into())]);
    assert!(bench.state.tree.znode("/c").is_none());
}

#[test]
fn null_and_empty_data_differ_and_snapshots_keep_all() {
    let mut bench = Bench::new();
    bench.create("/n", Persistent).unwrap();
    bench.set("/n", -1).unwrap();
    assert_eq!(bench.state.tree.znode("/n").unwrap().data, None);
    bench.create("/e", Ephemeral).unwrap();
    let bytes = crate::snapshot::encode(&bench.state);
    assert_eq!(crate::snapshot::decode(&bytes), Ok(bench.state.clone()));
    for (place, byte) in bytes.iter().enumerate() {
        // Two bytes of the head are reserved.
        let mut damaged = bytes.to_vec();
        damaged[place] = byte ^ 1;
        let survives = crate::snapshot::decode(&damaged).is_ok();
        assert_eq!(survives, (6..8).contains(&place), "byte {place}");
        assert!(crate::snapshot::decode(&bytes[..place]).is_err());
    }
}
