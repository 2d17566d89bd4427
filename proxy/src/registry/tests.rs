//! Reads against an ensemble that follows a script.

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use unbroken_coord::client::ConnectOptions;
use unbroken_coord::wire::{
    ConnectResponse, REPLY_BYTES_MAX, Request as Asked, RequestHeader, Response,
    encode_connect_response, encode_error, encode_reply, split_frame, xid,
};

use super::*;

const GROUP: &str = "/unbroken/groups/10.0.0.100";
const BARRIER: &str = "/unbroken/barriers/10.0.0.100";

/// The server's end of the only connection.
struct Peer {
    stream: TcpStream,
    inbox: BytesMut,
}

impl Peer {
    async fn frame(&mut self) -> Bytes {
        loop {
            let frame = split_frame(&self.inbox, REPLY_BYTES_MAX).unwrap();
            if let Some(len) = frame.map(|(frame, _)| frame.len()) {
                self.inbox.advance(4);
                return self.inbox.split_to(len).freeze();
            }
            let read = self.stream.read_buf(&mut self.inbox).await.unwrap();
            assert_ne!(read, 0, "the client hung up");
        }
    }

    /// The next request that is not a ping.
    async fn request(&mut self) -> (i32, Asked) {
        loop {
            let frame = self.frame().await;
            let (header, body) = RequestHeader::split(&frame).unwrap();
            match Asked::decode(header.op, body).unwrap() {
                Asked::Ping => {
                    let pong = encode_reply(xid::PING, 1, &Response::Empty);
                    self.send(pong).await;
                }
                asked => return (header.xid, asked),
            }
        }
    }

    async fn send(&mut self, bytes: Bytes) {
        self.stream.write_all(&bytes).await.unwrap();
    }
}

fn stat(version: i32) -> Stat {
    Stat {
        version,
        ..Stat::default()
    }
}

/// A client and the server's end of its connection, with a session open.
async fn connected() -> (Client, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let client = Client::start(ConnectOptions::new([host]).attempt_timeout(OPERATION_MAX * 30));
    let (stream, _) = listener.accept().await.unwrap();
    let mut peer = Peer {
        stream,
        inbox: BytesMut::new(),
    };
    peer.frame().await;
    peer.send(encode_connect_response(&ConnectResponse {
        protocol_version: 0,
        timeout_ms: 3_600_000,
        session_id: 7,
        password: Some(Bytes::from_static(&[1; 16])),
        read_only: Some(false),
    }))
    .await;
    (client, peer)
}

fn read() -> Request {
    Request {
        plane: 0,
        life: 0,
        group: GROUP.into(),
        node: Node::View,
        operation: Operation::Read,
    }
}

fn is_write(asked: &Asked) -> bool {
    matches!(asked, Asked::SetData { path, version: -1, .. } if path == BARRIER)
}

fn is_read(asked: &Asked) -> bool {
    matches!(asked, Asked::GetData { path, watch: false } if path == GROUP)
}

fn view() -> Response {
    Response::Data {
        data: Some(Bytes::from_static(b"view")),
        stat: stat(5),
    }
}

#[tokio::test]
async fn a_read_stands_behind_a_write() {
    let (client, mut peer) = connected().await;
    let reading = tokio::spawn(async move { execute(&client, Reads::Barrier, &read()).await });
    let (first, write) = peer.request().await;
    let (second, get) = peer.request().await;
    assert!(is_write(&write), "{write:?}");
    assert!(is_read(&get), "{get:?}");
    peer.send(encode_reply(first, 2, &Response::Stat(stat(1))))
        .await;
    peer.send(encode_reply(second, 2, &view())).await;
    let answer = reading.await.unwrap();
    assert!(
        matches!(&answer, Ok(Answer::Value(value, 5)) if value == "view"),
        "{answer:?}"
    );
}

/// What was read says nothing if the write before it was not done.
#[tokio::test]
async fn a_read_behind_a_failed_write_does_not_count() {
    let (client, mut peer) = connected().await;
    let reading = tokio::spawn(async move { execute(&client, Reads::Barrier, &read()).await });
    let (first, _) = peer.request().await;
    let (second, _) = peer.request().await;
    peer.send(encode_error(first, 2, ErrorCode::NoAuth)).await;
    peer.send(encode_reply(second, 2, &view())).await;
    let answer = reading.await.unwrap();
    assert!(
        matches!(answer, Err(ClientError::Zk(ErrorCode::NoAuth))),
        "{answer:?}"
    );
}

/// The first read of all makes the barrier: the creation is the write then.
#[tokio::test]
async fn a_missing_barrier_is_made_before_the_read_that_counts() {
    let (client, mut peer) = connected().await;
    let reading = tokio::spawn(async move { execute(&client, Reads::Barrier, &read()).await });
    let (first, _) = peer.request().await;
    let (second, _) = peer.request().await;
    peer.send(encode_error(first, 2, ErrorCode::NoNode)).await;
    peer.send(encode_reply(second, 2, &view())).await;
    for path in ["/unbroken", "/unbroken/barriers", BARRIER] {
        let (number, asked) = peer.request().await;
        assert!(
            matches!(&asked, Asked::Create { path: made, .. } if made == path),
            "{asked:?}"
        );
        let path = path.to_owned();
        peer.send(encode_reply(number, 3, &Response::Created { path }))
            .await;
    }
    let (number, get) = peer.request().await;
    assert!(is_read(&get), "{get:?}");
    peer.send(encode_error(number, 4, ErrorCode::NoNode)).await;
    let answer = reading.await.unwrap();
    assert!(matches!(answer, Ok(Answer::Absent)), "{answer:?}");
}
