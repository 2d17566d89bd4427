use super::*;
use bytes::Bytes;

/// Bytes written as the protocol's fields, one call a field.
#[derive(Default)]
struct Golden(Vec<u8>);

impl Golden {
    fn i4(mut self, v: i32) -> Self {
        self.0.extend(v.to_be_bytes());
        self
    }
    fn i8(mut self, v: i64) -> Self {
        self.0.extend(v.to_be_bytes());
        self
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    fn s(self, v: &str) -> Self {
        self.i4(i32::try_from(v.len()).unwrap()).raw(v.as_bytes())
    }
    /// In a frame.
    fn frame(self) -> Vec<u8> {
        let prefix = u32::try_from(self.0.len()).unwrap().to_be_bytes();
        [&prefix[..], &self.0].concat()
    }
}

fn golden() -> Golden {
    Golden::default()
}

const STAT: Stat = Stat {
    czxid: 1,
    mzxid: 2,
    ctime: 3,
    mtime: 4,
    version: 5,
    cversion: 6,
    aversion: 7,
    ephemeral_owner: 8,
    data_length: 9,
    num_children: 10,
    pzxid: 11,
};

fn golden_stat(g: Golden) -> Golden {
    g.i8(1)
        .i8(2)
        .i8(3)
        .i8(4)
        .i4(5)
        .i4(6)
        .i4(7)
        .i8(8)
        .i4(9)
        .i4(10)
        .i8(11)
}

fn create(op: CreateOp, flags: i32) -> Request {
    Request::Create {
        op,
        path: "/a".into(),
        data: Some(Bytes::from_static(b"d")),
        acl: Acl::open(),
        flags,
    }
}

/// One request of every kind.
pub(crate) fn requests() -> Vec<Request> {
    let path = || "/a/b".to_owned();
    vec![
        create(CreateOp::Create, 0),
        create(CreateOp::Create2, 3),
        create(CreateOp::Container, 4),
        Request::Create {
            op: CreateOp::Create,
            path: path(),
            data: None,
            acl: Vec::new(),
            flags: 99,
        },
        Request::Delete {
            path: path(),
            version: -1,
        },
        Request::Exists {
            path: path(),
            watch: true,
        },
        Request::GetData {
            path: path(),
            watch: false,
        },
        Request::SetData {
            path: path(),
            data: None,
            version: 3,
        },
        Request::SetData {
            path: path(),
            data: Some(Bytes::new()),
            version: 3,
        },
        Request::GetAcl { path: path() },
        Request::SetAcl {
            path: path(),
            acl: Acl::read_only(),
            version: 0,
        },
        Request::GetChildren {
            path: path(),
            watch: true,
        },
        Request::GetChildren2 {
            path: path(),
            watch: true,
        },
        Request::Sync { path: path() },
        Request::Ping,
        Request::Check {
            path: path(),
            version: 7,
        },
        Request::Multi(Vec::new()),
        Request::Multi(multi_ops()),
        Request::RemoveWatches {
            path: path(),
            kind: 3,
        },
        Request::Auth {
            kind: 0,
            scheme: "digest".into(),
            auth: Some(Bytes::from_static(b"u:p")),
        },
        Request::SetWatches(SetWatches {
            relative_zxid: 5,
            data: vec![path()],
            exist: vec![],
            child: vec![path(), path()],
            ..SetWatches::default()
        }),
        Request::SetWatches(SetWatches {
            relative_zxid: 5,
            persistent: vec![path()],
            persistent_recursive: vec![path()],
            ..SetWatches::default()
        }),
        Request::AddWatch {
            path: path(),
            mode: 1,
        },
        create(CreateOp::Ttl(86_400_000), 5),
        Request::CheckWatches {
            path: path(),
            kind: 2,
        },
        Request::Reconfig {
            joining: Some("server.4=h:1:1;2".into()),
            leaving: None,
            new_members: Some(String::new()),
            config_version: -1,
        },
        Request::MultiRead(vec![
            ReadOp::GetData {
                path: path(),
                watch: false,
            },
            ReadOp::GetChildren {
                path: path(),
                watch: true,
            },
        ]),
        Request::Sasl { token: None },
        Request::GetEphemerals {
            prefix: String::new(),
        },
        Request::GetAllChildrenNumber { path: path() },
        Request::WhoAmI,
        Request::CloseSession,
    ]
}

fn multi_ops() -> Vec<MultiOp> {
    vec![
        MultiOp::Check {
            path: "/a".into(),
            version: 2,
        },
        MultiOp::Create {
            op: CreateOp::Create,
            path: "/b".into(),
            data: None,
            acl: Acl::open(),
            flags: 1,
        },
        MultiOp::Create {
            op: CreateOp::Create2,
            path: "/c".into(),
            data: Some(Bytes::new()),
            acl: Acl::open(),
            flags: 0,
        },
        MultiOp::Create {
            op: CreateOp::Container,
            path: "/d".into(),
            data: None,
            acl: Acl::open(),
            flags: 4,
        },
        MultiOp::Create {
            op: CreateOp::Ttl(7),
            path: "/t".into(),
            data: None,
            acl: Acl::open(),
            flags: 6,
        },
        MultiOp::SetData {
            path: "/a".into(),
            data: Some(Bytes::from_static(b"x")),
            version: -1,
        },
        MultiOp::Delete {
            path: "/e".into(),
            version: 0,
        },
    ]
}

/// One response of every kind, with the operation that it answers.
fn responses() -> Vec<(OpCode, Response)> {
    let path = || "/a".to_owned();
    let children = || vec!["x".to_owned(), "y".to_owned()];
    vec![
        (OpCode::Create, Response::Created { path: path() }),
        (
            OpCode::Create2,
            Response::Created2 {
                path: path(),
                stat: STAT,
            },
        ),
        (
            OpCode::CreateContainer,
            Response::Created2 {
                path: path(),
                stat: STAT,
            },
        ),
        (OpCode::Delete, Response::Empty),
        (OpCode::Exists, Response::Stat(STAT)),
        (
            OpCode::GetData,
            Response::Data {
                data: None,
                stat: STAT,
            },
        ),
        (
            OpCode::GetData,
            Response::Data {
                data: Some(Bytes::new()),
                stat: STAT,
            },
        ),
        (
            OpCode::GetAcl,
            Response::Acl {
                acl: Acl::open(),
                stat: STAT,
            },
        ),
        (OpCode::GetChildren, Response::Children(children())),
        (
            OpCode::GetChildren2,
            Response::Children2 {
                children: children(),
                stat: STAT,
            },
        ),
        (OpCode::Sync, Response::Synced { path: path() }),
        (
            OpCode::Reconfig,
            Response::Data {
                data: Some(Bytes::from_static(b"version=1")),
                stat: STAT,
            },
        ),
        (
            OpCode::MultiRead,
            Response::MultiRead(vec![
                ReadResult::Data {
                    data: None,
                    stat: STAT,
                },
                ReadResult::Error(ErrorCode::NoNode),
                ReadResult::Children(children()),
            ]),
        ),
        (OpCode::Sasl, Response::Sasl { token: None }),
        (OpCode::GetEphemerals, Response::Ephemerals(children())),
        (OpCode::GetAllChildrenNumber, Response::ChildrenNumber(3)),
        (OpCode::WhoAmI, Response::Who(vec![Id::anyone()])),
        (OpCode::AddWatch, Response::WatchAdded),
        (OpCode::Multi, Response::Multi(Vec::new())),
        (
            OpCode::Multi,
            Response::Multi(vec![
                MultiResult::Created { path: path() },
                MultiResult::Created2 {
                    path: path(),
                    stat: STAT,
                },
                MultiResult::Deleted,
                MultiResult::Set(STAT),
                MultiResult::Checked,
                MultiResult::Error(None),
                MultiResult::Error(Some(ErrorCode::NoNode)),
            ]),
        ),
    ]
}

fn encoded(request: &Request) -> Bytes {
    let mut w = Writer::new();
    request.encode(&mut w);
    w.finish()
}

#[test]
fn every_request_round_trips() {
    for request in requests() {
        let body = encoded(&request);
        assert_eq!(Request::decode(request.op().code(), &body), Ok(request));
    }
}

#[test]
fn every_response_round_trips() {
    for (op, response) in responses() {
        let frame = encode_reply(9, 77, &response);
        let (frame, _) = split_frame(&frame, REPLY_BYTES_MAX).unwrap().unwrap();
        let (header, body) = ReplyHeader::split(frame).unwrap();
        assert_eq!(
            header,
            ReplyHeader {
                xid: 9,
                zxid: 77,
                err: None
            }
        );
        assert_eq!(Response::decode(op, body), Ok(response));
    }
}

#[test]
fn a_body_cut_short_is_truncated_never_accepted() {
    for request in requests() {
        let body = encoded(&request);
        for len in 0..body.len() {
            assert_eq!(
                Request::decode(request.op().code(), &body[..len]),
                Err(DecodeError::Truncated),
                "{request:?} cut to {len}"
            );
        }
    }
}

#[test]
fn golden_create_request() {
    let expected = golden()
        .i4(7)
        .i4(15)
        .s("/a")
        .s("d")
        .i4(1)
        .i4(31)
        .s("world")
        .s("anyone")
        .i4(3)
        .frame();
    assert_eq!(encode_request(7, &create(CreateOp::Create2, 3)), expected);
}

#[test]
fn golden_null_and_empty_data_differ() {
    let set = |data| Request::SetData {
        path: "/a".into(),
        data,
        version: -1,
    };
    assert_eq!(encoded(&set(None)), golden().s("/a").i4(-1).i4(-1).0);
    assert_eq!(
        encoded(&set(Some(Bytes::new()))),
        golden().s("/a").i4(0).i4(-1).0
    );
}

/// kazoo writes the id of `auth:` so.
#[test]
fn a_null_id_reads_as_empty() {
    let acl = golden().i4(1).i4(31).s("auth").i4(-1);
    let body = golden().s("/a").raw(&acl.0).i4(-1).0;
    let id = Id {
        scheme: "auth".into(),
        id: String::new(),
    };
    let acl = vec![Acl {
        perms: perms::ALL,
        id,
    }];
    let request = Request::SetAcl {
        path: "/a".into(),
        acl,
        version: -1,
    };
    assert_eq!(Request::decode(7, &body), Ok(request));
}

#[test]
fn golden_get_data_reply() {
    let g = golden().i4(3).i8(0x1_0000_0001).i4(0).i4(-1);
    let response = Response::Data {
        data: None,
        stat: STAT,
    };
    assert_eq!(
        encode_reply(3, 0x1_0000_0001, &response),
        golden_stat(g).frame()
    );
}

#[test]
fn golden_error_reply_has_no_body() {
    let expected = golden().i4(3).i8(5).i4(-101).frame();
    assert_eq!(encode_error(3, 5, ErrorCode::NoNode), expected);
}

#[test]
fn golden_watch_event() {
    let expected = golden().i4(-1).i8(-1).i4(0).i4(3).i4(3).s("/a").frame();
    let event = WatcherEvent::new(EventType::NodeDataChanged, "/a");
    assert_eq!(encode_event(&event), expected);
    assert_eq!(WatcherEvent::decode(&expected[20..]), Ok(event));
}

#[test]
fn golden_multi_request() {
    let request = Request::Multi(vec![
        MultiOp::Check {
            path: "/a".into(),
            version: 2,
        },
        MultiOp::Delete {
            path: "/b".into(),
            version: -1,
        },
    ]);
    let expected = golden()
        .i4(1)
        .i4(14)
        .i4(13)
        .raw(&[0])
        .i4(-1)
        .s("/a")
        .i4(2)
        .i4(2)
        .raw(&[0])
        .i4(-1)
        .s("/b")
        .i4(-1)
        .i4(-1)
        .raw(&[1])
        .i4(-1)
        .frame();
    assert_eq!(encode_request(1, &request), expected);
}

/// The layout of a failed multi: header err 0; before the fault 0, there the code, -2 after.
#[test]
fn golden_failed_multi_reply() {
    let failed = Response::Multi(vec![
        MultiResult::Error(None),
        MultiResult::Error(Some(ErrorCode::BadVersion)),
        MultiResult::Error(Some(ErrorCode::RuntimeInconsistency)),
    ]);
    let mut g = golden().i4(1).i8(9).i4(0);
    for code in [0, -103, -2] {
        g = g.i4(-1).raw(&[0]).i4(code).i4(code);
    }
    assert_eq!(
        encode_reply(1, 9, &failed),
        g.i4(-1).raw(&[1]).i4(-1).frame()
    );
}

#[test]
fn golden_multi_reply() {
    let done = Response::Multi(vec![
        MultiResult::Created { path: "/a".into() },
        MultiResult::Set(STAT),
        MultiResult::Deleted,
    ]);
    let g = golden()
        .i4(1)
        .i8(9)
        .i4(0)
        .i4(1)
        .raw(&[0])
        .i4(0)
        .s("/a")
        .i4(5)
        .raw(&[0])
        .i4(0);
    let g = golden_stat(g).i4(2).raw(&[0]).i4(0).i4(-1).raw(&[1]).i4(-1);
    assert_eq!(encode_reply(1, 9, &done), g.frame());
}

#[test]
fn connect_is_44_or_45_bytes_and_its_reply_36_or_37() {
    for (read_only, request_len, reply_len) in [(None, 44, 36), (Some(false), 45, 37)] {
        let request = ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: 3,
            timeout_ms: 100,
            session_id: 0,
            password: Some(Bytes::from_static(&[0; PASSWORD_BYTES])),
            read_only,
        };
        let frame = encode_connect_request(&request);
        assert_eq!(frame.len() - 4, request_len);
        assert_eq!(ConnectRequest::decode(&frame[4..]), Ok(request));

        let reply = ConnectResponse::expired(read_only);
        let frame = encode_connect_response(&reply);
        assert_eq!(frame.len() - 4, reply_len);
        assert_eq!(ConnectResponse::decode(&frame[4..]), Ok(reply));
    }
}

#[test]
fn set_watches_uses_the_older_operation_where_it_suffices() {
    let old = SetWatches {
        data: vec!["/a".into()],
        ..SetWatches::default()
    };
    assert_eq!(Request::SetWatches(old.clone()).op(), OpCode::SetWatches);
    let new = SetWatches {
        persistent: vec!["/a".into()],
        ..old
    };
    assert_eq!(Request::SetWatches(new).op(), OpCode::SetWatches2);
}

#[test]
fn codes_map_both_ways() {
    for &op in OpCode::ALL {
        assert_eq!(OpCode::from_code(op.code()), Some(op));
    }
    for &err in ErrorCode::ALL {
        assert_eq!(ErrorCode::from_code(err.code()), Some(err));
    }
    assert_eq!(ErrorCode::from_code(0), None);
    assert_eq!(ErrorCode::from_code(-999), Some(ErrorCode::Other(-999)));
    for (flags, mode) in CreateMode::ALL.into_iter().enumerate() {
        assert_eq!(
            CreateMode::from_flags(i32::try_from(flags).unwrap()),
            Ok(mode)
        );
        assert_eq!(usize::try_from(mode.flags()), Ok(flags));
    }
    for flags in [-1, 7, 99, i32::MIN] {
        assert_eq!(CreateMode::from_flags(flags), Err(ErrorCode::BadArguments));
    }
}

#[test]
fn faults_of_the_peer_have_the_code_that_zookeeper_answers() {
    let decode = |op, g: Golden| Request::decode(op, &g.0).unwrap_err();
    assert_eq!(decode(77, golden()).code(), ErrorCode::Unimplemented);
    assert_eq!(
        decode(4, golden().i4(1000).raw(b"/")).code(),
        ErrorCode::MarshallingError
    );
    assert_eq!(
        decode(4, golden().i4(-1).raw(&[0])),
        DecodeError::NullString
    );
    assert_eq!(
        decode(4, golden().i4(-7).raw(&[0])),
        DecodeError::NegativeLength(-7)
    );
    assert_eq!(
        decode(4, golden().i4(1).raw(&[0xff, 0])),
        DecodeError::NotUtf8
    );
    assert_eq!(
        decode(14, golden().i4(9).raw(&[0]).i4(-1)),
        DecodeError::NotInMulti(9)
    );
    // A vector that claims two thousand million elements.
    let lying = golden().s("/a").s("").i4(i32::MAX);
    assert_eq!(decode(1, lying), DecodeError::Truncated);
}

#[test]
fn a_multi_is_bounded() {
    let check = MultiOp::Check {
        path: "/".into(),
        version: -1,
    };
    let multi = |ops| encoded(&Request::Multi(vec![check.clone(); ops]));
    assert!(Request::decode(14, &multi(MULTI_OPS_MAX)).is_ok());
    assert_eq!(
        Request::decode(14, &multi(MULTI_OPS_MAX + 1)),
        Err(DecodeError::MultiTooLong)
    );
}

#[test]
fn frames_are_judged_by_their_length_alone() {
    assert_eq!(split_frame(&[], 8), Ok(None));
    assert_eq!(split_frame(&[0, 0, 0], 8), Ok(None));
    assert_eq!(split_frame(&[0, 0, 0, 8, 1], 8), Ok(None));
    assert_eq!(
        split_frame(&[0, 0, 0, 1, 1, 2], 8),
        Ok(Some((&[1][..], &[2][..])))
    );
    assert_eq!(split_frame(&[0, 0, 0, 0], 8), Ok(Some((&[][..], &[][..]))));
    let too_long = FrameError::TooLong {
        bytes: 9,
        limit_bytes: 8,
    };
    assert_eq!(split_frame(&[0, 0, 0, 9], 8), Err(too_long));
    assert_eq!(split_frame(&[255; 4], 8), Err(FrameError::Negative(-1)));
}

#[test]
fn four_letter_words_are_no_frame_lengths() {
    for &word in FourLetterWord::ALL {
        assert_eq!(FourLetterWord::detect(*word.word()), Some(word));
        assert!(split_frame(word.word(), REPLY_BYTES_MAX).is_err());
    }
    assert_eq!(FourLetterWord::detect(*b"kill"), None);
    assert_eq!(FourLetterWord::detect([0, 0, 0, 44]), None);
}

#[test]
fn paths_are_judged_as_zookeeper_does() {
    for good in [
        "/",
        "/a",
        "/a/b",
        "/a.b",
        "/.a",
        "/...",
        "/a/..b",
        "/a b",
        "/ä",
        "/\u{d7ff}",
    ] {
        assert_eq!(validate_path(good), Ok(()), "{good:?}");
    }
    for (bad, why) in [
        ("", PathError::NotAbsolute),
        ("a", PathError::NotAbsolute),
        ("/a/", PathError::TrailingSlash),
        ("//", PathError::TrailingSlash),
        ("//a", PathError::EmptyName),
        ("/a//b", PathError::EmptyName),
        ("/.", PathError::RelativeName),
        ("/a/../b", PathError::RelativeName),
        ("/a/.", PathError::RelativeName),
        ("/a\0", PathError::BadCharacter(0)),
        ("/\u{1f}", PathError::BadCharacter(0x1f)),
        ("/\u{7f}", PathError::BadCharacter(0x7f)),
        ("/\u{9f}", PathError::BadCharacter(0x9f)),
        ("/\u{e000}", PathError::BadCharacter(0xe000)),
        ("/\u{ffff}", PathError::BadCharacter(0xffff)),
        ("/\u{1f600}", PathError::BadCharacter(0x1f600)),
    ] {
        assert_eq!(validate_path(bad), Err(why), "{bad:?}");
    }
    assert_eq!(parent("/"), None);
    assert_eq!(parent("/a"), Some(("/", "a")));
    assert_eq!(parent("/a/b"), Some(("/a", "b")));
}

#[test]
fn paths_are_bounded() {
    assert_eq!(validate_path(&"/a".repeat(PATH_NAMES_MAX)), Ok(()));
    let deep = "/a".repeat(PATH_NAMES_MAX + 1);
    assert_eq!(validate_path(&deep), Err(PathError::TooDeep));
    let long = format!("/{}", "a".repeat(PATH_BYTES_MAX - 1));
    assert_eq!(validate_path(&long), Ok(()));
    let too_long = PathError::TooLong(PATH_BYTES_MAX + 1);
    assert_eq!(validate_path(&format!("{long}a")), Err(too_long));
}

/// splitmix64: enough to make bytes from a seed.
pub(crate) struct Bytemill(pub(crate) u64);

impl Bytemill {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n).unwrap()).unwrap()
    }
}

/// No bytes make a decoder panic, and what it accepts it also writes and reads again.
#[test]
fn fuzz_decoders() {
    let seeds: Vec<(i32, Bytes)> = requests()
        .iter()
        .map(|request| (request.op().code(), encoded(request)))
        .collect();
    let replies: Vec<(OpCode, Bytes)> = responses()
        .iter()
        .map(|(op, r)| (*op, encode_reply(1, 2, r).slice(20..)))
        .collect();
    let mut accepted = 0;
    for seed in 0..200_000 {
        let mut mill = Bytemill(seed);
        let (op, body) = &seeds[mill.below(seeds.len())];
        let mut body = body.to_vec();
        for _ in 0..mill.below(4) {
            if !body.is_empty() {
                let at = mill.below(body.len());
                body[at] = mill.next().to_le_bytes()[0];
            }
        }
        if mill.below(8) == 0 {
            body.truncate(mill.below(body.len() + 1));
        }
        if let Ok(request) = Request::decode(*op, &body) {
            accepted += 1;
            let again = encoded(&request);
            let reread = Request::decode(request.op().code(), &again);
            assert_eq!(reread, Ok(request), "seed {seed}");
        }

        let (op, body) = &replies[mill.below(replies.len())];
        let mut body = body.to_vec();
        if !body.is_empty() {
            let at = mill.below(body.len());
            body[at] = mill.next().to_le_bytes()[0];
            body.truncate(body.len() - mill.below(2));
        }
        let _: Result<Response, DecodeError> = Response::decode(*op, &body);
        let noise: Vec<u8> = (0..mill.below(64))
            .map(|_| mill.next().to_le_bytes()[0])
            .collect();
        let _: Result<ConnectRequest, DecodeError> = ConnectRequest::decode(&noise);
        let _: Result<ConnectResponse, DecodeError> = ConnectResponse::decode(&noise);
        let _: Result<WatcherEvent, DecodeError> = WatcherEvent::decode(&noise);
        let _ = ReplyHeader::split(&noise);
    }
    assert!(
        accepted > 50_000,
        "the fuzz reaches the decoders' far ends: {accepted}"
    );
}
