//! The client against a server that follows a script, one connection after the other.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::wire::{
    Acl, AddWatchMode, ConnectRequest, ConnectResponse, EventType, MultiOp, MultiResult,
    REPLY_BYTES_MAX, RequestHeader, SetWatches, Stat, WatcherEvent, WatcherKind,
    encode_connect_response, encode_error, encode_event, encode_reply, split_frame, xid,
};

const SESSION: i64 = 0x77;
const PASSWORD: Bytes = Bytes::from_static(b"0123456789abcdef");
const STAT: Stat = Stat {
    czxid: 1,
    mzxid: 1,
    ctime: 0,
    mtime: 0,
    version: 0,
    cversion: 0,
    aversion: 0,
    ephemeral_owner: 0,
    data_length: 0,
    num_children: 0,
    pzxid: 1,
};

/// A listener whose connections the test answers by hand.
struct Server(TcpListener);

impl Server {
    async fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn host(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }

    /// Accepts, and gives the client's greeting.
    async fn accept(&self) -> (Peer, ConnectRequest) {
        let (stream, _) = self.0.accept().await.unwrap();
        let mut peer = Peer {
            stream,
            inbox: BytesMut::new(),
        };
        let hello = ConnectRequest::decode(&peer.frame().await.unwrap()).unwrap();
        (peer, hello)
    }

    /// Accepts a client that has no session and opens [`SESSION`].
    async fn open(&self, timeout_ms: i32) -> Peer {
        let (mut peer, hello) = self.accept().await;
        assert_eq!(hello.session_id, 0);
        peer.grant(SESSION, timeout_ms).await;
        peer
    }
}

/// The server's end of one connection.
struct Peer {
    stream: TcpStream,
    inbox: BytesMut,
}

impl Peer {
    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some((frame, _)) = split_frame(&self.inbox, REPLY_BYTES_MAX).unwrap() {
                let len = frame.len();
                self.inbox.advance(4);
                return Some(self.inbox.split_to(len).freeze());
            }
            if self.stream.read_buf(&mut self.inbox).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// The next request that is not a ping.
    async fn request(&mut self) -> (i32, Request) {
        loop {
            let frame = self.frame().await.expect("a request, not the end");
            let (header, body) = RequestHeader::split(&frame).unwrap();
            let request = Request::decode(header.op, body).unwrap();
            if request != Request::Ping {
                return (header.xid, request);
            }
            self.send(encode_reply(xid::PING, 1, &Response::Empty))
                .await;
        }
    }

    async fn send(&mut self, bytes: Bytes) {
        self.stream.write_all(&bytes).await.unwrap();
    }

    async fn grant(&mut self, session_id: i64, timeout_ms: i32) {
        self.send(encode_connect_response(&ConnectResponse {
            protocol_version: 0,
            timeout_ms,
            session_id,
            password: Some(PASSWORD),
            read_only: Some(false),
        }))
        .await;
    }
}

/// Patient, so that a slow machine fails no test.
fn options(hosts: &[&Server]) -> ConnectOptions {
    ConnectOptions::new(hosts.iter().map(|server| server.host()))
        .attempt_timeout(Duration::from_secs(30))
}

async fn connected(client: &Client) {
    let session = SessionState::Connected {
        session_id: SESSION,
    };
    client
        .state()
        .wait_for(|state| *state == session)
        .await
        .unwrap();
}

fn get_data(path: &str) -> Request {
    Request::GetData {
        path: path.into(),
        watch: false,
    }
}

fn data_reply(xid: i32, zxid: i64, data: &'static str) -> Bytes {
    encode_reply(
        xid,
        zxid,
        &Response::Data {
            data: Some(data.into()),
            stat: STAT,
        },
    )
}

#[tokio::test]
async fn requests_are_pipelined_and_answered_in_order() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let script = async {
        let (first, request) = peer.request().await;
        assert_eq!((first, request), (1, get_data("/a")));
        // The second request is there although the first has no answer yet.
        let (second, request) = peer.request().await;
        assert_eq!((second, request), (2, get_data("/b")));
        peer.send(data_reply(1, 5, "a")).await;
        peer.send(encode_error(2, 5, ErrorCode::NoNode)).await;
    };
    let (a, b, ()) = tokio::join!(client.get("/a"), client.get("/b"), script);
    assert_eq!(a.unwrap().0, "a");
    assert_eq!(b, Err(ClientError::Zk(ErrorCode::NoNode)));
}

#[tokio::test]
async fn sync_and_get_costs_one_round_trip() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let script = async {
        assert_eq!(
            peer.request().await,
            (1, Request::Sync { path: "/a".into() })
        );
        assert_eq!(peer.request().await, (2, get_data("/a")));
        peer.send(encode_reply(1, 5, &Response::Synced { path: "/a".into() }))
            .await;
        peer.send(data_reply(2, 5, "a")).await;
    };
    let (a, ()) = tokio::join!(client.sync_and_get("/a"), script);
    assert_eq!(a.unwrap().0, "a");
}

#[tokio::test]
async fn a_lost_session_is_taken_up_elsewhere_with_its_watches() {
    let (one, two) = (Server::new().await, Server::new().await);
    let client = Client::start(options(&[&one, &two]));
    let mut peer = one.open(10_000).await;
    let script = async {
        let (xid, request) = peer.request().await;
        assert_eq!(
            request,
            Request::GetData {
                path: "/a".into(),
                watch: true
            }
        );
        peer.send(data_reply(xid, 41, "x")).await;
        let (xid, _) = peer.request().await;
        peer.send(encode_error(xid, 42, ErrorCode::NoNode)).await;
        let (xid, _) = peer.request().await;
        let children = Response::Children2 {
            children: vec![],
            stat: STAT,
        };
        peer.send(encode_reply(xid, 42, &children)).await;
    };
    let watched = async {
        let a = client.get_and_watch("/a").await.unwrap().2;
        let b = client.exists_and_watch("/b").await.unwrap().1;
        let c = client.children_and_watch("/c").await.unwrap().2;
        (a, b, c)
    };
    let ((a, b, c), ()) = tokio::join!(watched, script);

    // A request that was sent and not answered: its outcome is unknown.
    let script = async {
        let mut peer = peer;
        peer.request().await
    };
    let (lost, _) = tokio::join!(client.set("/a", "y", -1), script);
    assert_eq!(lost, Err(ClientError::ConnectionLoss));

    // One that is made while there is no connection waits for it.
    let script = async {
        let (mut peer, hello) = two.accept().await;
        assert_eq!(
            (hello.session_id, hello.password.clone()),
            (SESSION, Some(PASSWORD))
        );
        assert_eq!(hello.last_zxid_seen, 42);
        peer.grant(SESSION, 10_000).await;
        let (xid, request) = peer.request().await;
        assert_eq!(xid, crate::wire::xid::SET_WATCHES);
        let Request::SetWatches(watches) = request else {
            panic!("{request:?}")
        };
        assert_eq!(watches.relative_zxid, 42);
        assert_eq!(watches.data, ["/a"]);
        assert_eq!(watches.exist, ["/b"]);
        assert_eq!(watches.child, ["/c"]);
        for (event, path) in [
            (EventType::NodeDataChanged, "/a"),
            (EventType::NodeCreated, "/b"),
            (EventType::NodeDeleted, "/c"),
        ] {
            peer.send(encode_event(&WatcherEvent::new(event, path)))
                .await;
        }
        peer.send(encode_reply(
            crate::wire::xid::SET_WATCHES,
            50,
            &Response::Empty,
        ))
        .await;
        let (xid, request) = peer.request().await;
        assert_eq!(request, get_data("/z"));
        peer.send(data_reply(xid, 50, "z")).await;
        peer
    };
    let (z, _peer) = tokio::join!(client.get("/z"), script);
    assert_eq!(z.unwrap().0, "z");
    assert_eq!(a.await.unwrap().event, EventType::NodeDataChanged);
    assert_eq!(b.await.unwrap().event, EventType::NodeCreated);
    assert_eq!(c.await.unwrap().event, EventType::NodeDeleted);
    assert_eq!(client.session_id(), Some(SESSION));
}

#[tokio::test]
async fn an_expired_session_fails_everything_and_is_renewed_only_on_demand() {
    for renew in [false, true] {
        let server = Server::new().await;
        let client = Client::start(options(&[&server]).renew_session(renew));
        let mut peer = server.open(10_000).await;
        let script = async {
            let (xid, _) = peer.request().await;
            peer.send(data_reply(xid, 1, "x")).await;
        };
        let (got, ()) = tokio::join!(client.get_and_watch("/a"), script);
        let (_, _, watch) = got.unwrap();
        drop(peer);
        let (mut peer, hello) = server.accept().await;
        assert_eq!(hello.session_id, SESSION);
        peer.send(encode_connect_response(&ConnectResponse::expired(Some(
            false,
        ))))
        .await;
        assert_eq!(watch.await, Err(ClientError::SessionExpired));
        if renew {
            let (mut peer, hello) = server.accept().await;
            assert_eq!((hello.session_id, hello.last_zxid_seen), (0, 0));
            peer.grant(SESSION + 1, 10_000).await;
            let renewed = SessionState::Connected {
                session_id: SESSION + 1,
            };
            client
                .state()
                .wait_for(|state| *state == renewed)
                .await
                .unwrap();
        } else {
            assert_eq!(client.get("/a").await, Err(ClientError::SessionExpired));
            assert_eq!(*client.state().borrow(), SessionState::Expired);
        }
    }
}

/// The first host takes connections and never says a word, the second refuses.
#[tokio::test]
async fn silent_and_refusing_servers_are_passed_over() {
    let (silent, refusing, good) = (
        Server::new().await,
        Server::new().await,
        Server::new().await,
    );
    let hosts = options(&[&silent, &refusing, &good]).attempt_timeout(Duration::from_millis(50));
    drop(refusing);
    let client = Client::start(hosts);
    // Again where a slow machine made the client impatient.
    let serve = async {
        let mut peers = Vec::new();
        loop {
            peers.push(good.open(10_000).await);
        }
    };
    tokio::select! {
        () = connected(&client) => {}
        () = serve => {}
    }
}

/// A server that stops answering in the middle of a session is left for another.
#[tokio::test]
async fn a_server_that_falls_silent_is_left_before_the_session_expires() {
    let (one, two) = (Server::new().await, Server::new().await);
    let client = Client::start(options(&[&one, &two]));
    let _silent = one.open(90).await;
    let (_, hello) = two.accept().await;
    assert_eq!(hello.session_id, SESSION);
    drop(client);
}

/// Where sessions are long, silence may be cut short all the same.
#[tokio::test]
async fn a_silent_server_of_a_long_session_is_left_when_the_caller_says() {
    let (one, two) = (Server::new().await, Server::new().await);
    let mut options = options(&[&one, &two]);
    options.silence_max = Some(Duration::from_millis(60));
    let client = Client::start(options);
    let _silent = one.open(3_600_000).await;
    // Far below the 40 minutes that the session by itself would take.
    let moved = tokio::time::timeout(Duration::from_secs(60), two.accept()).await;
    let (_, hello) = moved.expect("it moves");
    assert_eq!(hello.session_id, SESSION);
    drop(client);
}

#[tokio::test]
async fn pings_keep_an_idle_session() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(1_500).await;
    for _ in 0..2 {
        let frame = peer.frame().await.expect("a ping, not the end");
        let (header, _) = RequestHeader::split(&frame).unwrap();
        assert_eq!(
            header,
            RequestHeader {
                xid: xid::PING,
                op: 11
            }
        );
        peer.send(encode_reply(xid::PING, 1, &Response::Empty))
            .await;
    }
    assert_eq!(client.session_id(), Some(SESSION));
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_the_unsent_is_never_sent() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let hasty = client.with_request_timeout(Some(Duration::from_millis(5)));
    assert_eq!(hasty.set("/a", "x", -1).await, Err(ClientError::Timeout));
    let mut peer = server.open(10_000).await;
    let request = tokio::select! {
        answer = client.get("/b") => panic!("{answer:?}"),
        (_, request) = peer.request() => request,
    };
    assert_eq!(
        request,
        get_data("/b"),
        "the write whose caller gave up was not sent"
    );
}

#[tokio::test]
async fn closing_and_dropping_end_the_session() {
    for explicit in [true, false] {
        let server = Server::new().await;
        let client = Client::start(options(&[&server]));
        let mut peer = server.open(10_000).await;
        connected(&client).await;
        let script = async {
            let (xid, request) = peer.request().await;
            assert_eq!(request, Request::CloseSession);
            peer.send(encode_reply(xid, 9, &Response::Empty)).await;
            assert_eq!(peer.frame().await, None);
        };
        if explicit {
            let (closed, ()) = tokio::join!(client.close(), script);
            assert_eq!(closed, Ok(()));
            assert_eq!(client.get("/a").await, Err(ClientError::Closed));
        } else {
            drop(client);
            script.await;
        }
    }
}

#[tokio::test]
async fn answers_to_other_requests_end_the_connection() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let script = async {
        let (xid, _) = peer.request().await;
        peer.send(data_reply(xid + 1, 1, "x")).await;
    };
    let (lost, ()) = tokio::join!(client.get("/a"), script);
    assert_eq!(lost, Err(ClientError::ConnectionLoss));
}

#[tokio::test]
async fn what_is_wrong_in_itself_is_not_sent() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    assert!(matches!(
        client.get("a").await,
        Err(ClientError::BadPath(_))
    ));
    let huge = vec![0; REQUEST_BYTES_MAX];
    assert!(matches!(
        client.set("/a", huge, -1).await,
        Err(ClientError::TooLarge { .. })
    ));
    drop(client);
}

#[tokio::test]
async fn a_failed_multi_names_the_operation_at_fault() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let check = || MultiOp::Check {
        path: "/a".into(),
        version: 1,
    };
    let script = async {
        let (xid, _) = peer.request().await;
        let results = vec![
            MultiResult::Error(None),
            MultiResult::Error(Some(ErrorCode::BadVersion)),
            MultiResult::Error(Some(ErrorCode::RuntimeInconsistency)),
        ];
        peer.send(encode_reply(xid, 9, &Response::Multi(results)))
            .await;
    };
    let (failed, ()) = tokio::join!(client.multi(vec![check(), check(), check()]), script);
    assert_eq!(
        failed,
        Err(ClientError::Multi {
            index: 1,
            code: ErrorCode::BadVersion
        })
    );
}

#[tokio::test]
async fn a_chroot_is_invisible() {
    let server = Server::new().await;
    let options = ConnectOptions {
        chroot: "/app".into(),
        ..options(&[&server])
    };
    let client = Client::start(options);
    let mut peer = server.open(10_000).await;
    let script = async {
        let (xid, request) = peer.request().await;
        assert!(matches!(&request, Request::Create { path, .. } if path == "/app/q-"));
        peer.send(encode_reply(
            xid,
            2,
            &Response::Created {
                path: "/app/q-1".into(),
            },
        ))
        .await;
        let (xid, request) = peer.request().await;
        assert_eq!(
            request,
            Request::GetData {
                path: "/app".into(),
                watch: true
            }
        );
        peer.send(data_reply(xid, 2, "")).await;
        peer.send(encode_event(&WatcherEvent::new(
            EventType::NodeDeleted,
            "/app",
        )))
        .await;
    };
    let calls = async {
        let mode = CreateMode::PersistentSequential;
        assert_eq!(
            client.create("/q-", "", mode, Acl::open()).await.unwrap(),
            "/q-1"
        );
        client.get_and_watch("/").await
    };
    let (watched, ()) = tokio::join!(calls, script);
    assert_eq!(watched.unwrap().2.await.unwrap().path, "/");
}

async fn answer_all(peer: &mut Peer, count: usize) {
    for _ in 0..count {
        let (xid, _) = peer.request().await;
        peer.send(encode_reply(xid, 1, &Response::WatchAdded)).await;
    }
}

fn event(event: EventType, path: &str) -> Bytes {
    encode_event(&WatcherEvent::new(event, path))
}

fn notice(event: EventType, path: &str) -> Option<Result<Notice, ClientError>> {
    let path = path.into();
    Some(Ok(Notice::Event(WatchEvent { event, path })))
}

#[tokio::test]
async fn persistent_watches_are_streams_that_say_what_they_missed() {
    let (one, two) = (Server::new().await, Server::new().await);
    let client = Client::start(ConnectOptions {
        chroot: "/app".into(),
        ..options(&[&one, &two])
    });
    let mut peer = one.open(10_000).await;
    let watches = async {
        let plain = client.watch("/a", AddWatchMode::Persistent).await.unwrap();
        let mode = AddWatchMode::PersistentRecursive;
        let recursive = client.watch("/", mode).await.unwrap();
        (plain, recursive)
    };
    let ((mut plain, mut recursive), ()) = tokio::join!(watches, answer_all(&mut peer, 2));
    // The event is there before the answer that follows it.
    let script = async {
        let (xid, _) = peer.request().await;
        peer.send(event(EventType::NodeDataChanged, "/app/a")).await;
        peer.send(data_reply(xid, 5, "new")).await;
    };
    let (read, ()) = tokio::join!(client.get("/a"), script);
    assert_eq!(read.unwrap().0, "new");
    let changed = notice(EventType::NodeDataChanged, "/a");
    assert_eq!(
        (plain.try_next(), recursive.try_next()),
        (changed.clone(), changed)
    );
    assert_eq!((plain.try_next(), recursive.try_next()), (None, None));

    drop(peer);
    assert_eq!(plain.next().await, Some(Ok(Notice::Disconnected)));
    let (mut peer, _) = two.accept().await;
    peer.grant(SESSION, 10_000).await;
    let (xid, request) = peer.request().await;
    assert_eq!(xid, crate::wire::xid::SET_WATCHES);
    let again = SetWatches {
        relative_zxid: 5,
        persistent: vec!["/app/a".into()],
        persistent_recursive: vec!["/app".into()],
        ..SetWatches::default()
    };
    assert_eq!(request, Request::SetWatches(again));
    peer.send(encode_reply(xid, 6, &Response::Empty)).await;
    peer.send(event(EventType::NodeCreated, "/app/b")).await;
    assert_eq!(plain.next().await, Some(Ok(Notice::Missed)));
    assert_eq!(recursive.next().await, Some(Ok(Notice::Disconnected)));
    assert_eq!(recursive.next().await, Some(Ok(Notice::Missed)));
    assert_eq!(recursive.next().await, notice(EventType::NodeCreated, "/b"));
    assert_eq!(plain.try_next(), None);

    // Dropped: the server is asked to forget it.
    drop(plain);
    let (xid, request) = peer.request().await;
    let kind = WatcherKind::Any.code();
    let path = "/app/a".into();
    assert_eq!(request, Request::RemoveWatches { path, kind });
    peer.send(encode_reply(xid, 6, &Response::Empty)).await;
    let script = async {
        let (xid, _) = peer.request().await;
        peer.send(encode_reply(xid, 7, &Response::Empty)).await;
    };
    let (closed, ()) = tokio::join!(client.close(), script);
    closed.unwrap();
    assert_eq!(recursive.next().await, Some(Err(ClientError::Closed)));
    assert_eq!(recursive.next().await, None);
}

/// A server keeps one mode for each path, the newest.
#[tokio::test]
async fn a_plain_watch_beside_a_recursive_one_leaves_both_alive() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let watches = async {
        let mode = AddWatchMode::PersistentRecursive;
        let recursive = client.watch("/a", mode).await.unwrap();
        let plain = client.watch("/a", AddWatchMode::Persistent).await.unwrap();
        (recursive, plain)
    };
    let script = async {
        answer_all(&mut peer, 2).await;
        let (xid, request) = peer.request().await;
        let (path, mode) = ("/a".into(), AddWatchMode::PersistentRecursive.code());
        assert_eq!(request, Request::AddWatch { path, mode });
        peer.send(encode_reply(xid, 1, &Response::WatchAdded)).await;
    };
    let ((mut recursive, _plain), ()) = tokio::join!(watches, script);
    assert_eq!(recursive.next().await, Some(Ok(Notice::Missed)));
}

#[tokio::test]
async fn identities_are_proven_on_every_connection_before_anything_else() {
    let (one, two) = (Server::new().await, Server::new().await);
    let hosts = options(&[&one, &two]).identity(Identity::digest("first", "1"));
    let client = Client::start(hosts);
    let auth = |user: &str| Request::Auth {
        kind: 0,
        scheme: "digest".into(),
        auth: Some(user.to_owned().into()),
    };
    let mut peer = one.open(10_000).await;
    assert_eq!(peer.request().await, (xid::AUTH, auth("first:1")));
    peer.send(encode_reply(xid::AUTH, 1, &Response::Empty))
        .await;
    let script = async {
        assert_eq!(peer.request().await, (xid::AUTH, auth("second:2")));
        peer.send(encode_reply(xid::AUTH, 1, &Response::Empty))
            .await;
    };
    let (accepted, ()) = tokio::join!(client.authenticate(Identity::digest("second", "2")), script);
    accepted.unwrap();
    // One that is not accepted is forgotten, and the session goes on.
    let script = async {
        assert_eq!(peer.request().await, (xid::AUTH, auth("third:3")));
        peer.send(encode_error(xid::AUTH, 1, ErrorCode::AuthFailed))
            .await;
        drop(peer);
    };
    let (refused, ()) = tokio::join!(client.authenticate(Identity::digest("third", "3")), script);
    assert_eq!(refused, Err(ClientError::Zk(ErrorCode::AuthFailed)));
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.get("/a").await }
    });
    let (mut peer, _) = two.accept().await;
    peer.grant(SESSION, 10_000).await;
    for user in ["first:1", "second:2"] {
        assert_eq!(peer.request().await, (xid::AUTH, auth(user)));
    }
    assert_eq!(peer.request().await.1, get_data("/a"));
    // A server that does not accept an old one any more ends the client.
    peer.send(encode_error(xid::AUTH, 1, ErrorCode::AuthFailed))
        .await;
    let auth_failed = Err(ClientError::Zk(ErrorCode::AuthFailed));
    assert_eq!(read.await.unwrap(), auth_failed);
    assert_eq!(*client.state().borrow(), SessionState::AuthFailed);
    assert_eq!(client.get("/a").await, auth_failed);
}

#[tokio::test]
async fn a_lease_follows_what_the_quorum_has_confirmed_and_nothing_else() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]).attempt_timeout(Duration::from_secs(5)));
    let opening = tokio::time::Instant::now();
    let mut peer = server.open(60_000).await;
    connected(&client).await;
    let script = async {
        let (xid, request) = peer.request().await;
        assert_eq!(request, Request::Sync { path: "/".into() });
        peer.send(encode_reply(xid, 1, &Response::Synced { path: "/".into() }))
            .await;
    };
    let (lease, ()) = tokio::join!(client.lease(), script);
    let lease = lease.unwrap();
    assert_eq!(lease.session_id(), SESSION);
    let first = lease.until().unwrap();
    assert!(first >= opening + Duration::from_secs(59));
    let before = tokio::time::Instant::now();
    // Pings and reads are answered by servers that are cut off, too.
    let script = async {
        let (xid, _) = peer.request().await;
        peer.send(data_reply(xid, 1, "x")).await;
    };
    let (read, ()) = tokio::join!(client.get("/a"), script);
    read.unwrap();
    assert!(lease.until().unwrap() <= before + Duration::from_secs(60));
    drop(peer);
    let (mut peer, _) = server.accept().await;
    assert!(lease.is_certain(), "no connection, but it was heard of");
    peer.send(encode_connect_response(&ConnectResponse::expired(None)))
        .await;
    lease.gone().await;
    assert_eq!(lease.standing(), Standing::Gone);
    assert_eq!(
        client.lease().await.err(),
        Some(ClientError::SessionExpired)
    );
}

/// A server that answers pings and cannot reach the quorum.
#[tokio::test]
async fn a_server_that_is_cut_off_does_not_extend_a_lease() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(1_500).await;
    connected(&client).await;
    let lease = tokio::select! {
        lease = client.lease() => lease.unwrap(),
        // Answers pings alone.
        _ = async { loop { peer.request().await; } } => unreachable!(),
    };
    let standing = tokio::select! {
        standing = lease.uncertain() => standing,
        _ = async { loop { peer.request().await; } } => unreachable!(),
    };
    assert_eq!(standing, Standing::Uncertain);
    assert_eq!(client.session_id(), Some(SESSION), "still connected");
}

#[tokio::test]
async fn events_come_in_order_and_skip_no_state() {
    let (one, two) = (Server::new().await, Server::new().await);
    let client = Client::start(options(&[&one, &two]));
    let mut events = client.events().await.unwrap();
    let mut peer = one.open(10_000).await;
    peer.send(event(EventType::NodeDeleted, "/a")).await;
    drop(peer);
    let (mut peer, _) = two.accept().await;
    peer.send(encode_connect_response(&ConnectResponse::expired(None)))
        .await;
    let session_id = SESSION;
    let (deleted, path) = (EventType::NodeDeleted, "/a".into());
    let expected = [
        SessionEvent::State(SessionState::Connected { session_id }),
        SessionEvent::Watch(WatchEvent {
            event: deleted,
            path,
        }),
        SessionEvent::State(SessionState::Disconnected),
        SessionEvent::State(SessionState::Expired),
    ];
    for event in expected {
        assert_eq!(events.next().await, Some(event));
    }
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn null_data_is_not_empty() {
    let server = Server::new().await;
    let client = Client::start(options(&[&server]));
    let mut peer = server.open(10_000).await;
    let script = async {
        let (xid, request) = peer.request().await;
        assert!(matches!(&request, Request::Create { data: None, .. }));
        let path = "/a".into();
        peer.send(encode_reply(
            xid,
            2,
            &Response::Created2 { path, stat: STAT },
        ))
        .await;
        let (xid, request) = peer.request().await;
        assert!(matches!(request, Request::SetData { data: None, .. }));
        peer.send(encode_reply(xid, 2, &Response::Stat(STAT))).await;
        let (xid, _) = peer.request().await;
        let (data, stat) = (None, STAT);
        peer.send(encode_reply(xid, 2, &Response::Data { data, stat }))
            .await;
    };
    let calls = async {
        let node = NewNode::new(crate::wire::CreateMode::Persistent);
        let created = client.create_node("/a", node).await.unwrap();
        assert_eq!(created, ("/a".into(), STAT));
        client.set_or_null("/a", None, -1).await.unwrap();
        client.get_or_null("/a").await.unwrap().0
    };
    let (read, ()) = tokio::join!(calls, script);
    assert_eq!(read, None);
}

/// One whose server has no quorum stays until another has one.
#[tokio::test]
async fn a_read_only_session_moves_to_a_server_with_a_quorum() {
    let (cut_off, whole) = (Server::new().await, Server::new().await);
    let client = Client::start(options(&[&cut_off, &whole]).read_only(true));
    let (mut peer, hello) = cut_off.accept().await;
    assert_eq!(hello.read_only, Some(true));
    peer.send(encode_connect_response(&ConnectResponse {
        protocol_version: 0,
        timeout_ms: 10_000,
        session_id: 5,
        password: Some(PASSWORD),
        read_only: Some(true),
    }))
    .await;
    // Who asks is told; and comes then, without the session that no quorum knows.
    loop {
        let (mut stream, _) = whole.0.accept().await.unwrap();
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.unwrap();
        if word == *b"isro" {
            let state = *client.state().borrow();
            assert_eq!(state, SessionState::ConnectedReadOnly { session_id: 5 });
            stream.write_all(b"rw").await.unwrap();
            continue;
        }
        let mut peer = Peer {
            stream,
            inbox: BytesMut::from(&word[..]),
        };
        let hello = ConnectRequest::decode(&peer.frame().await.unwrap()).unwrap();
        assert_eq!(hello.session_id, 0);
        peer.grant(SESSION, 10_000).await;
        connected(&client).await;
        return;
    }
}
